"""Makes the small picture files that the decoding tests read. Needs Pillow and numpy.

    python make.py

Every file shows the same 24 x 16 picture: red left half, blue right half, a white
8 x 4 corner at the top left.
"""
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

rgb = np.zeros((16, 24, 3), np.uint8)
rgb[:, :12] = (200, 30, 30)
rgb[:, 12:] = (30, 30, 200)
rgb[:4, :8] = 255
picture = Image.fromarray(rgb)

picture.save("plain.png")
picture.save("plain.jpg", quality=95, subsampling=0)
picture.save("plain.webp", lossless=True)
picture.convert("CMYK").save("cmyk.jpg", quality=95)
picture.convert("L").save("grey.png")
picture.convert("P").save("palette.png")
picture.save("profile.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
picture.convert("L").save("grey.jpg", quality=95)

# Exif orientation 6: the stored pixels must be turned 90 degrees clockwise to be upright.
exif = Image.Exif()
exif[0x0112] = 6
picture.transpose(Image.ROTATE_90).save("turned.jpg", quality=95, subsampling=0, exif=exif)

alpha = np.full((16, 24), 255, np.uint8)
alpha[8:, :] = 0
alpha[7, :] = 128
Image.fromarray(np.dstack([rgb, alpha])).save("alpha.png")

second = Image.fromarray(255 - rgb)
picture.save("animated.webp", save_all=True, append_images=[second], lossless=True, duration=100)
picture.save("animated.png", save_all=True, append_images=[second], duration=100)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


deep = (rgb.astype(">u2") * 257).tobytes()
rows = b"".join(b"\0" + deep[i : i + 24 * 6] for i in range(0, len(deep), 24 * 6))
with open("deep.png", "wb") as f:
    f.write(b"\x89PNG\r\n\x1a\n")
    f.write(chunk(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, 2, 0, 0, 0)))
    f.write(chunk(b"IDAT", zlib.compress(rows)))
    f.write(chunk(b"IEND", b""))
