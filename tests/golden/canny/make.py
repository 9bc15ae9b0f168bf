"""Makes the reference edge maps. Needs opencv-python-headless and numpy.

    python make.py FOLDER_WITH_THE_PHOTOGRAPHS

The photographs are CC0 / public domain samples of scikit-image: astronaut,
chelsea, coffee, rocket; see LICENSE.txt. Crops of 160 x 120 after
scaling to a width of 320 are kept as PNG beside their edges.
"""
import sys

import cv2
import numpy as np

cases = []
for i, name in enumerate(["astronaut", "chelsea", "coffee", "rocket"]):
    photo = cv2.imread(f"{sys.argv[1]}/{name}.jpg")
    scale = 320 / photo.shape[1]
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    x, y = 40 + 20 * i, 10 + 15 * i
    cases.append((name, photo[y : y + 120, x : x + 160]))
rng = np.random.default_rng(0)
cases.append(("noise", rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)))
smooth = rng.integers(0, 256, (67, 59, 3), dtype=np.uint8)
cases.append(("soft_noise", cv2.GaussianBlur(smooth, (0, 0), 1.6)))
cases.append(("steps", (rng.integers(0, 3, (40, 40, 3)) * 100).astype(np.uint8)))
cases.append(("row", rng.integers(0, 256, (1, 31, 3), dtype=np.uint8)))
cases.append(("column", rng.integers(0, 256, (31, 1, 3), dtype=np.uint8)))
cases.append(("dot", rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)))

for name, bgr in cases:
    bgr = np.ascontiguousarray(bgr)
    cv2.imwrite(f"{name}.png", bgr)
    for low, high in [(100, 200), (50, 200), (30, 60)]:
        # OpenCV works on each channel alike, so RGB and BGR give the same edges.
        edges = cv2.Canny(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), low, high)
        cv2.imwrite(f"{name}.{low}_{high}.png", edges, [cv2.IMWRITE_PNG_BILEVEL, 1])
