//! Pictures in and out: decoding within limits, fitting to a model's size and back, masks,
//! and PNG files that carry their provenance.
//!
//! Not here: any colour management beyond carrying an RGB profile along, any format besides
//! PNG, JPEG and WebP, any depth beyond 8 bits a channel (16-bit files are read at 8).
//!
//! ```
//! use simpatico_engine::picture::{Picture, decode};
//! let grey = Picture::filled(3, 2, [128, 128, 128]);
//! let file = grey.to_png(&[("Comment", "three by two")])?;
//! let (again, _) = decode(&file).map_err(|p| p.named("grey.png"))?;
//! assert_eq!(again, grey);
//! # Ok::<(), simpatico_engine::Error>(())
//! ```

use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageEncoder, ImageError, RgbImage};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

pub mod chunks;
mod frame;
mod mask;

pub use frame::{Fit, Frame};
pub use mask::Mask;
pub(crate) use mask::luma;

/// The most bytes a picture file may have.
pub const MAX_BYTES: u64 = 32 << 20;
/// The most pixels a side may have.
pub const MAX_SIDE: u32 = 8_192;
/// The most pixels a picture may have.
pub const MAX_PIXELS: u64 = 40_000_000;
/// A colour profile larger than this is left behind.
const MAX_ICC_BYTES: usize = 1 << 20;

/// An upright picture with 8 bits a channel, rows from the top, pixels from the left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels from left to right, at least 1.
    pub width: u32,
    /// Pixels from top to bottom, at least 1.
    pub height: u32,
    /// Red, green, blue of every pixel: `width * height * 3` bytes. Under transparent pixels
    /// whatever the file held.
    pub rgb: Vec<u8>,
    /// Opacity of every pixel; `None` where all are opaque.
    pub alpha: Option<Vec<u8>>,
    /// The RGB colour profile the file carried, to be written out again.
    pub icc: Option<Vec<u8>>,
}

/// The file formats that are read, told apart by their first bytes, never by their name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Portable Network Graphics.
    Png,
    /// JPEG (JFIF or Exif).
    Jpeg,
    /// WebP, lossy or lossless.
    Webp,
}

impl Format {
    /// The format whose signature the file begins with.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [
                b'R',
                b'I',
                b'F',
                b'F',
                _,
                _,
                _,
                _,
                b'W',
                b'E',
                b'B',
                b'P',
                ..,
            ] => Some(Self::Webp),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::Webp => "WebP",
        }
    }
}

/// Why a file is not a picture we take. The words are ours: what a decoder said about hostile
/// bytes is not repeated to anyone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PictureProblem {
    /// No known signature.
    #[error("expected a PNG, JPEG or WebP file, got {0}; convert it first")]
    UnknownFormat(&'static str),
    /// More bytes than are read.
    #[error("expected at most {MAX_BYTES} bytes, got {0}; save it smaller")]
    TooManyBytes(u64),
    /// More pixels than are decoded.
    #[error(
        "expected sides of at most {MAX_SIDE} and {MAX_PIXELS} pixels in all, got {0} x {1}; \
         scale it down first"
    )]
    TooLarge(u32, u32),
    /// The file ends before the picture does.
    #[error("the {0} file ends early or is damaged; fetch or export it again")]
    Damaged(&'static str),
    /// A rare kind of a known format.
    #[error("this kind of {0} is not read; export it as an 8-bit RGB PNG")]
    Unsupported(&'static str),
    /// A mask for another picture.
    #[error(
        "expected a mask of {expected_width} x {expected_height} like the picture, \
         got {got_width} x {got_height}"
    )]
    MaskSize {
        /// The picture's width.
        expected_width: u32,
        /// The picture's height.
        expected_height: u32,
        /// The mask's width.
        got_width: u32,
        /// The mask's height.
        got_height: u32,
    },
}

impl PictureProblem {
    /// The crate's error, with the name of the picture it happened to.
    pub fn named(self, what: impl Into<String>) -> Error {
        Error::BadImage {
            what: what.into(),
            reason: self.to_string(),
        }
    }
}

/// Reads and decodes a picture file: the picture, upright, and the SHA-256 of the file's bytes.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, [`Error::BadImage`] where it is not a picture within
/// the limits. Memory stays below about eight bytes a pixel and the file itself.
pub fn open(path: &Path) -> Result<(Picture, String)> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        let told = path.metadata().map_or(0, |m| m.len());
        let got = told.max(bytes.len() as u64);
        return Err(PictureProblem::TooManyBytes(got).named(path.display().to_string()));
    }
    decode(&bytes).map_err(|problem| problem.named(path.display().to_string()))
}

/// Decodes a picture file held in memory: the picture, and the SHA-256 of the bytes.
///
/// Of an animation the first frame; Exif orientation is applied; CMYK and grey become RGB.
///
/// # Errors
/// See [`PictureProblem`]; sizes are judged from the header, before anything is decoded.
pub fn decode(bytes: &[u8]) -> std::result::Result<(Picture, String), PictureProblem> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(PictureProblem::TooManyBytes(bytes.len() as u64));
    }
    let format = Format::of(bytes).ok_or(PictureProblem::UnknownFormat(guess_at(bytes)))?;
    // The decoders are fuzzed, yet they are other people's code on hostile bytes.
    let picture = catch_unwind(AssertUnwindSafe(|| match format {
        Format::Png => {
            // This decoder refuses what is too large while opening, without saying how large.
            check_size(png_size(bytes).ok_or(PictureProblem::Damaged("PNG"))?)?;
            let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits());
            decode_with(decoder, format)
        }
        Format::Jpeg if !jpeg_is_whole(bytes) => Err(PictureProblem::Damaged(format.name())),
        Format::Jpeg => decode_with(JpegDecoder::new(Cursor::new(bytes)), format),
        Format::Webp => decode_with(WebPDecoder::new(Cursor::new(bytes)), format),
    }))
    .unwrap_or(Err(PictureProblem::Damaged(format.name())))?;
    Ok((picture, hex(&Sha256::digest(bytes))))
}

fn limits() -> image::Limits {
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(512 << 20);
    limits
}

fn decode_with<D: ImageDecoder>(
    decoder: std::result::Result<D, ImageError>,
    format: Format,
) -> std::result::Result<Picture, PictureProblem> {
    let ours = |size: (u32, u32)| {
        move |error: ImageError| match error {
            ImageError::Unsupported(_) => PictureProblem::Unsupported(format.name()),
            ImageError::Limits(_) => PictureProblem::TooLarge(size.0, size.1),
            _ => PictureProblem::Damaged(format.name()),
        }
    };
    let mut decoder = decoder.map_err(ours((0, 0)))?;
    let (width, height) = decoder.dimensions();
    check_size((width, height))?;
    if width == 0 || height == 0 {
        return Err(PictureProblem::Damaged(format.name()));
    }
    decoder
        .set_limits(limits())
        .map_err(ours((width, height)))?;
    // A broken profile or orientation costs the profile or orientation, not the picture.
    let icc = decoder.icc_profile().ok().flatten();
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(ours((width, height)))?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    let mut picture = Picture::from_dynamic(image);
    picture.icc = icc.filter(|icc| icc.len() <= MAX_ICC_BYTES && icc.get(16..20) == Some(b"RGB "));
    Ok(picture)
}

fn check_size((width, height): (u32, u32)) -> std::result::Result<(), PictureProblem> {
    if width.max(height) > MAX_SIDE || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(PictureProblem::TooLarge(width, height));
    }
    Ok(())
}

/// Width and height from the header chunk, which comes first in every PNG.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at: usize| {
        bytes
            .get(at..at + 4)?
            .try_into()
            .ok()
            .map(u32::from_be_bytes)
    };
    Some((side(16)?, side(20)?))
}

/// Whether the last scan is closed by an end-of-image marker. The decoder fills what is
/// missing with grey and says nothing; within a scan 0xff never precedes 0xd9.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let last_scan = bytes.windows(2).rposition(|w| w == [0xff, 0xda]);
    last_scan.is_some_and(|at| bytes[at..].windows(2).any(|w| w == [0xff, 0xd9]))
}

/// A word for what the bytes look like instead, for the error message.
fn guess_at(bytes: &[u8]) -> &'static str {
    let head = &bytes[..bytes.len().min(64)];
    match head {
        [] => "an empty file",
        [b'G', b'I', b'F', b'8', ..] => "a GIF",
        [b'B', b'M', ..] => "a BMP",
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => "a TIFF",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "a HEIC, AVIF or video file",
        [b'%', b'P', b'D', b'F', ..] => "a PDF",
        _ if head.iter().all(|b| *b >= 0x20 || b.is_ascii_whitespace()) => "text",
        _ => "something else",
    }
}

impl Picture {
    /// A picture of one colour.
    pub fn filled(width: u32, height: u32, colour: [u8; 3]) -> Self {
        let pixels = width as usize * height as usize;
        Self::from_rgb(width, height, colour.repeat(pixels))
    }

    /// An opaque picture from its bytes, `width * height * 3` of them.
    ///
    /// # Panics
    /// If the length is another: a mistake of the program, not of its input.
    pub fn from_rgb(width: u32, height: u32, rgb: Vec<u8>) -> Self {
        assert_eq!(rgb.len(), width as usize * height as usize * 3, "rgb bytes");
        Self {
            width,
            height,
            rgb,
            alpha: None,
            icc: None,
        }
    }

    fn from_dynamic(image: DynamicImage) -> Self {
        let (width, height) = (image.width(), image.height());
        if !image.color().has_alpha() {
            return Self::from_rgb(width, height, image.into_rgb8().into_raw());
        }
        let rgba = image.into_rgba8().into_raw();
        let alpha: Vec<u8> = rgba.chunks_exact(4).map(|p| p[3]).collect();
        let rgb = rgba.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]);
        let mut picture = Self::from_rgb(width, height, rgb.collect());
        picture.alpha = Some(alpha).filter(|a| a.iter().any(|v| *v != 255));
        picture
    }

    /// Red, green, blue at a place.
    pub fn at(&self, x: u32, y: u32) -> [u8; 3] {
        let i = (y as usize * self.width as usize + x as usize) * 3;
        [self.rgb[i], self.rgb[i + 1], self.rgb[i + 2]]
    }

    /// The picture without transparency, laid on a colour.
    pub fn on(&self, background: [u8; 3]) -> Self {
        let mut opaque = Self::from_rgb(self.width, self.height, self.rgb.clone());
        opaque.icc.clone_from(&self.icc);
        if let Some(alpha) = &self.alpha {
            for (pixel, a) in opaque.rgb.chunks_exact_mut(3).zip(alpha) {
                for (value, under) in pixel.iter_mut().zip(background) {
                    *value = mix(under, *value, *a);
                }
            }
        }
        opaque
    }

    /// The colours (without alpha and profile) at another size: a cubic filter when growing,
    /// the same filter widened over the pixels it gathers when shrinking.
    pub fn resized(&self, width: u32, height: u32) -> Self {
        if (width, height) == (self.width, self.height) {
            return Self::from_rgb(width, height, self.rgb.clone());
        }
        let from = self.to_rgb_image();
        let to = image::imageops::resize(&from, width, height, FilterType::CatmullRom);
        Self::from_rgb(width, height, to.into_raw())
    }

    /// The part of the picture that begins at (`x`, `y`), colours only.
    pub fn cropped(&self, x: u32, y: u32, width: u32, height: u32) -> Self {
        let row = |r: u32| {
            let begin = (r as usize * self.width as usize + x as usize) * 3;
            self.rgb[begin..begin + width as usize * 3].iter().copied()
        };
        Self::from_rgb(width, height, (y..y + height).flat_map(row).collect())
    }

    /// The pixels as a tensor (1, 3, height, width) in -1..1, f32.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let (h, w) = (self.height as usize, self.width as usize);
        let values: Vec<f32> = self
            .rgb
            .iter()
            .map(|v| f32::from(*v) / 127.5 - 1.0)
            .collect();
        let hwc = Tensor::from_vec(values, (1, h, w, 3), device)?;
        Ok(hwc.permute((0, 3, 1, 2))?.contiguous()?)
    }

    /// The pictures in a tensor (b, 3, height, width) in -1..1; what lies outside is clipped.
    ///
    /// # Errors
    /// [`Error::BadModel`] where a value is not a number: weights are damaged, or a type too
    /// narrow overflowed.
    pub fn from_tensor(batch: &Tensor) -> Result<Vec<Self>> {
        let (b, _, h, w) = batch.dims4()?;
        let values = batch.permute((0, 2, 3, 1))?.to_dtype(DType::F32)?;
        let values = values.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|v| !v.is_finite()) {
            let reason = "the picture came out as not-a-number; the weights are damaged or \
                          overflow in this type: run `simpatico models verify`";
            return Err(Error::bad_model("decoded picture", reason));
        }
        let bytes = |v: &f32| ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8;
        let one = |i: usize| {
            let part = &values[i * h * w * 3..(i + 1) * h * w * 3];
            Self::from_rgb(w as u32, h as u32, part.iter().map(bytes).collect())
        };
        Ok((0..b).map(one).collect())
    }

    /// The PNG file, with the given (keyword, text) pairs in it and the profile if there is one.
    pub fn to_png(&self, text: &[(&str, &str)]) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = image::codecs::png::PngEncoder::new(&mut file);
        let refused = |e: ImageError| Error::BadImage {
            what: "PNG to be written".into(),
            reason: e.to_string(),
        };
        if let Some(icc) = &self.icc {
            encoder
                .set_icc_profile(icc.clone())
                .map_err(|e| refused(ImageError::Unsupported(e)))?;
        }
        let (w, h) = (self.width, self.height);
        match &self.alpha {
            None => encoder.write_image(&self.rgb, w, h, image::ExtendedColorType::Rgb8),
            Some(alpha) => {
                let pixels = self.rgb.chunks_exact(3).zip(alpha);
                let rgba: Vec<u8> = pixels.flat_map(|(p, a)| [p[0], p[1], p[2], *a]).collect();
                encoder.write_image(&rgba, w, h, image::ExtendedColorType::Rgba8)
            }
        }
        .map_err(refused)?;
        Ok(chunks::with_text(&file, text))
    }

    pub(crate) fn to_rgb_image(&self) -> RgbImage {
        RgbImage::from_raw(self.width, self.height, self.rgb.clone())
            .expect("from_rgb checked the length")
    }
}

/// `under` at 0, `over` at 255, rounded to the nearest between.
pub(crate) fn mix(under: u8, over: u8, share: u8) -> u8 {
    let (u, o, s) = (u32::from(under), u32::from(over), u32::from(share));
    ((u * (255 - s) + o * s + 127) / 255) as u8
}

/// Lower-case hex of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes a file so that there is the old one or the whole new one, never half of it, and the
/// new one stays after a power cut.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let written = (|| {
        let mut file = File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&part, path)?;
        // Only some systems can open a folder; where not, the rename is as durable as can be.
        if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
            folder.sync_all().ok();
        }
        Ok(())
    })();
    if written.is_err() {
        std::fs::remove_file(&part).ok();
    }
    written.map_err(Error::io(path))
}

#[cfg(test)]
mod tests;
