//! Where a picture may change.

use std::path::Path;

use super::{Picture, PictureProblem, mix, open};
use crate::Result;

/// How much of the edit each pixel takes: 0 keeps the source bit for bit, 255 takes the edit,
/// values between mix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// One value a pixel, rows from the top.
    pub values: Vec<u8>,
}

impl Mask {
    /// Reads a mask from a picture file by its brightness (transparent counts as black), and
    /// the SHA-256 of the file.
    pub fn open(path: &Path) -> Result<(Self, String)> {
        let (picture, digest) = open(path)?;
        Ok((Self::from_picture(&picture), digest))
    }

    /// The brightness of a picture, transparent parts black.
    pub fn from_picture(picture: &Picture) -> Self {
        let on_black = picture.on([0; 3]);
        Self {
            width: picture.width,
            height: picture.height,
            values: on_black.rgb.chunks_exact(3).map(luma).collect(),
        }
    }

    /// Whether the mask belongs to a picture of this size.
    pub fn check(&self, width: u32, height: u32) -> std::result::Result<(), PictureProblem> {
        if (self.width, self.height) == (width, height) {
            return Ok(());
        }
        Err(PictureProblem::MaskSize {
            expected_width: width,
            expected_height: height,
            got_width: self.width,
            got_height: self.height,
        })
    }

    /// The mask with its edge softened inwards: from where it is 0 it rises evenly over `width`
    /// pixels, so nothing outside begins to change, and a part that is thinner changes in part.
    pub fn softened(&self, width: u32) -> Self {
        if width == 0 {
            return self.clone();
        }
        let w = self.width as usize;
        let straight = 255.0 / (f64::from(width) + 1.0);
        let slanted = straight * std::f64::consts::SQRT_2;
        let mut soft: Vec<f64> = self.values.iter().map(|v| f64::from(*v)).collect();
        // A distance transform in two passes, the second from the other corner: each pixel is
        // at most a step higher than those beside and above it.
        for _ in 0..2 {
            for at in 0..soft.len() {
                let (x, below) = (at % w, at >= w);
                let mut hold = |there: bool, back: usize, step: f64| {
                    if there {
                        soft[at] = soft[at].min(soft[at - back] + step);
                    }
                };
                hold(x > 0, 1, straight);
                hold(below, w, straight);
                hold(below && x > 0, w + 1, slanted);
                hold(below && x + 1 < w, w - 1, slanted);
            }
            soft.reverse();
        }
        Self {
            values: soft.into_iter().map(|v| v.round() as u8).collect(),
            ..self.clone()
        }
    }

    /// As edges were softened until version 2 of the provenance, for making such pictures
    /// again: over twice the radius, and parts thinner than that were lost.
    pub(crate) fn softened_until_2(&self, radius: u32) -> Self {
        if radius == 0 {
            return self.clone();
        }
        let (w, h) = (self.width as usize, self.height as usize);
        let narrowed = sliding(&self.values, w, h, radius as usize, |window| {
            window.iter().copied().min().unwrap_or(0)
        });
        let mut values = sliding(&narrowed, w, h, radius as usize, |window| {
            let sum: u32 = window.iter().map(|v| u32::from(*v)).sum();
            (sum / window.len() as u32) as u8
        });
        for (soft, hard) in values.iter_mut().zip(&self.values) {
            *soft = (*soft).min(*hard);
        }
        Self {
            values,
            ..self.clone()
        }
    }

    /// The source where the mask is 0, the edit where it is 255. The three must have one size.
    pub fn blend(&self, source: &Picture, edit: &Picture) -> Picture {
        let mut out = source.clone();
        let pixels = out.rgb.chunks_exact_mut(3).zip(edit.rgb.chunks_exact(3));
        for ((under, over), share) in pixels.zip(&self.values) {
            for (u, o) in under.iter_mut().zip(over) {
                *u = mix(*u, *o, *share);
            }
        }
        out
    }
}

/// Rec. 601 brightness in the integers every codec uses.
pub(crate) fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 32_768) >> 16) as u8
}

/// Applies `of` to the window of `2 * radius + 1` values around each value (less at the
/// border), along rows and then along columns.
fn sliding(v: &[u8], w: usize, h: usize, radius: usize, of: impl Fn(&[u8]) -> u8) -> Vec<u8> {
    let line = |line: &[u8]| -> Vec<u8> {
        (0..line.len())
            .map(|i| of(&line[i.saturating_sub(radius)..(i + radius + 1).min(line.len())]))
            .collect()
    };
    let rows: Vec<u8> = v.chunks_exact(w).flat_map(line).collect();
    let mut out = vec![0; v.len()];
    for x in 0..w {
        let column: Vec<u8> = (0..h).map(|y| rows[y * w + x]).collect();
        for (y, value) in line(&column).into_iter().enumerate() {
            out[y * w + x] = value;
        }
    }
    out
}
