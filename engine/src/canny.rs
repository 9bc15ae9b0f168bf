//! Control images: Canny edges exactly as `cv2.Canny` draws them on a colour picture, and the
//! grey, blurred, tiled and palette pictures the other modes of a Union ControlNet expect.
//!
//! The edges, step by step (J. Canny 1986, in OpenCV's integers):
//! 1. Sobel 3 x 3 in x and y of each channel, the border repeated.
//! 2. Magnitude |dx| + |dy|; of the three channels the strongest one counts, the first on ties.
//! 3. A pixel above `low` stays if it is a maximum along its gradient, in four sectors cut at
//!    tan 22.5 degrees in 15-bit fixed point; outside the picture the magnitude is 0.
//! 4. From the pixels above `high` everything connected (8 neighbours) is an edge.
//!
//! Not here: other apertures, the L2 norm, smoothing beforehand. `imageproc` smooths and works
//! on one channel with real angles, so its edges differ.

use rayon::prelude::*;

use crate::picture::Picture;

/// tan(22.5 degrees) with 15 fractional bits, rounded.
const TAN_22: i32 = 13_573;

/// The edges of a picture: one value a pixel, 255 on an edge and 0 elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edges {
    /// Pixels from left to right.
    pub width: u32,
    /// Pixels from top to bottom.
    pub height: u32,
    /// Rows from the top.
    pub values: Vec<u8>,
}

/// What a Union ControlNet is shown of the source.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Control {
    /// White edges on black.
    Canny {
        /// Weaker pixels are never edges (the paper's backend: 100).
        low: u16,
        /// Stronger pixels always are (the paper's backend: 200).
        high: u16,
    },
    /// The picture itself without its fine detail: shrunk by `factor` and grown again.
    Tile {
        /// Source pixels a coarse pixel, at least 1.
        factor: u32,
    },
    /// The picture through a Gaussian.
    Blur {
        /// Standard deviation in pixels.
        sigma: f32,
    },
    /// Brightness alone.
    Grey,
    /// Where which colours lie: squares of one colour.
    Palette {
        /// Side of a square in pixels, at least 1.
        square: u32,
    },
}

impl Default for Control {
    fn default() -> Self {
        Self::Canny {
            low: 100,
            high: 200,
        }
    }
}

impl Control {
    /// The mode number of InstantX's Union ControlNet. Its list has none for palettes: they
    /// are handed over as tiles, which are coarse pictures too.
    pub fn union_mode(self) -> u32 {
        match self {
            Self::Canny { .. } => 0,
            Self::Tile { .. } | Self::Palette { .. } => 1,
            Self::Blur { .. } => 3,
            Self::Grey => 5,
        }
    }

    /// The control picture, of the source's size.
    pub fn of(self, source: &Picture) -> Picture {
        let (w, h) = (source.width, source.height);
        let coarse = |by: u32| (w.div_ceil(by.max(1)), h.div_ceil(by.max(1)));
        match self {
            Self::Canny { low, high } => canny(source, low, high).to_picture(),
            Self::Tile { factor } => {
                let (cw, ch) = coarse(factor);
                source.resized(cw, ch).resized(w, h)
            }
            Self::Blur { sigma } => {
                let blurred = image::imageops::blur(&source.to_rgb_image(), sigma.max(0.1));
                Picture::from_rgb(w, h, blurred.into_raw())
            }
            Self::Grey => {
                let grey = source.rgb.chunks_exact(3);
                let rgb = grey.flat_map(|p| [crate::picture::luma(p); 3]).collect();
                Picture::from_rgb(w, h, rgb)
            }
            Self::Palette { square } => {
                let (cw, ch) = coarse(square);
                let colours = source.resized(cw, ch);
                let pixels = (0..h).flat_map(|y| (0..w).map(move |x| (x, y)));
                let square = square.max(1);
                let rgb = pixels.flat_map(|(x, y)| colours.at(x / square, y / square));
                Picture::from_rgb(w, h, rgb.collect())
            }
        }
    }
}

impl Edges {
    /// White on black, three equal channels.
    pub fn to_picture(&self) -> Picture {
        let rgb = self.values.iter().flat_map(|v| [*v; 3]).collect();
        Picture::from_rgb(self.width, self.height, rgb)
    }

    /// The share of pixels that are edges.
    pub fn density(&self) -> f64 {
        self.count() as f64 / self.values.len() as f64
    }

    fn count(&self) -> usize {
        self.values.iter().filter(|v| **v != 0).count()
    }

    /// Every pixel within `radius` (in both directions) of an edge.
    fn widened(&self, radius: usize) -> Vec<bool> {
        let (w, h) = (self.width as usize, self.height as usize);
        let mut wide = vec![false; w * h];
        for (i, _) in self.values.iter().enumerate().filter(|(_, v)| **v != 0) {
            let (x, y) = (i % w, i / w);
            for row in y.saturating_sub(radius)..(y + radius + 1).min(h) {
                let from = row * w + x.saturating_sub(radius);
                let to = row * w + (x + radius + 1).min(w);
                wide[from..to].fill(true);
            }
        }
        wide
    }
}

/// How well two edge maps of one size agree: the F-measure (harmonic mean of precision and
/// recall) where an edge counts as found if the other map has one within `tolerance` pixels.
/// 1 where both are empty, 0 where only one is.
pub fn edge_agreement(a: &Edges, b: &Edges, tolerance: usize) -> f64 {
    let found = |of: &Edges, within: &Edges| {
        let wide = within.widened(tolerance);
        let hits = of.values.iter().zip(&wide).filter(|(v, w)| **v != 0 && **w);
        hits.count() as f64 / of.count().max(1) as f64
    };
    match (a.count(), b.count()) {
        (0, 0) => 1.0,
        (0, _) | (_, 0) => 0.0,
        _ => {
            let (precision, recall) = (found(a, b), found(b, a));
            2.0 * precision * recall / (precision + recall).max(f64::MIN_POSITIVE)
        }
    }
}

/// The edges of a picture's colours, bit for bit those of `cv2.Canny(rgb, low, high)`.
/// Thresholds are on the Sobel magnitude (0 to 2,040); given the wrong way round they are
/// exchanged. Linear in pixels; about 20 bytes a pixel.
pub fn canny(source: &Picture, low: u16, high: u16) -> Edges {
    let (low, high) = (i32::from(low.min(high)), i32::from(low.max(high)));
    let gradients = strongest_gradients(source);
    let (w, h) = (source.width as usize, source.height as usize);
    let mut marks = vec![Mark::None; w * h];
    marks.par_chunks_mut(w).enumerate().for_each(|(y, row)| {
        for (x, mark) in row.iter_mut().enumerate() {
            *mark = gradients.mark(x, y, low, high);
        }
    });
    Edges {
        width: source.width,
        height: source.height,
        values: connected(marks, w, h),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    None,
    Maybe,
    Edge,
}

/// The gradient of each pixel's strongest channel, with its magnitude.
struct Gradients {
    width: usize,
    height: usize,
    dx_dy: Vec<(i16, i16)>,
}

fn strongest_gradients(source: &Picture) -> Gradients {
    let (w, h) = (source.width as usize, source.height as usize);
    let mut dx_dy = vec![(0, 0); w * h];
    dx_dy.par_chunks_mut(w).enumerate().for_each(|(y, row)| {
        let rows = [y.saturating_sub(1), y, (y + 1).min(h - 1)];
        let line = |i: usize| &source.rgb[rows[i] * w * 3..(rows[i] + 1) * w * 3];
        let (above, here, below) = (line(0), line(1), line(2));
        for (x, out) in row.iter_mut().enumerate() {
            let (left, right) = (x.saturating_sub(1) * 3, (x + 1).min(w - 1) * 3);
            *out = (0..3)
                .map(|c| {
                    let at = |line: &[u8], i: usize| i16::from(line[i + c]);
                    let column = |i| at(above, i) + 2 * at(here, i) + at(below, i);
                    let across = |l| at(l, left) + 2 * at(l, x * 3) + at(l, right);
                    (column(right) - column(left), across(below) - across(above))
                })
                .reduce(|best, next| if norm(next) > norm(best) { next } else { best })
                .unwrap_or_default();
        }
    });
    Gradients {
        width: w,
        height: h,
        dx_dy,
    }
}

fn norm((dx, dy): (i16, i16)) -> i32 {
    i32::from(dx.abs()) + i32::from(dy.abs())
}

impl Gradients {
    /// The magnitude at an offset from a pixel; 0 outside the picture.
    fn magnitude(&self, x: usize, y: usize, right: isize, down: isize) -> i32 {
        match (x.checked_add_signed(right), y.checked_add_signed(down)) {
            (Some(x), Some(y)) if x < self.width && y < self.height => {
                norm(self.dx_dy[y * self.width + x])
            }
            _ => 0,
        }
    }

    fn mark(&self, x: usize, y: usize, low: i32, high: i32) -> Mark {
        let (dx, dy) = self.dx_dy[y * self.width + x];
        let m = norm((dx, dy));
        if m <= low {
            return Mark::None;
        }
        let near = |right, down| self.magnitude(x, y, right, down);
        let (ax, ay) = (i32::from(dx.abs()), i32::from(dy.abs()) << 15);
        let tan_22_x = ax * TAN_22;
        // tan 67.5 = 2 + tan 22.5
        let tan_67_x = tan_22_x + (ax << 16);
        let is_maximum = if ay < tan_22_x {
            m > near(-1, 0) && m >= near(1, 0)
        } else if ay > tan_67_x {
            m > near(0, -1) && m >= near(0, 1)
        } else {
            let s = if (dx ^ dy) < 0 { -1 } else { 1 };
            m > near(-s, -1) && m > near(s, 1)
        };
        match (is_maximum, m > high) {
            (false, _) => Mark::None,
            (true, false) => Mark::Maybe,
            (true, true) => Mark::Edge,
        }
    }
}

fn connected(mut marks: Vec<Mark>, w: usize, h: usize) -> Vec<u8> {
    let is_edge = |i: &usize| marks[*i] == Mark::Edge;
    let mut open: Vec<usize> = (0..marks.len()).filter(is_edge).collect();
    while let Some(i) = open.pop() {
        let (x, y) = (i % w, i / w);
        for row in y.saturating_sub(1)..(y + 2).min(h) {
            for column in x.saturating_sub(1)..(x + 2).min(w) {
                let j = row * w + column;
                if marks[j] == Mark::Maybe {
                    marks[j] = Mark::Edge;
                    open.push(j);
                }
            }
        }
    }
    let value = |m: Mark| if m == Mark::Edge { 255 } else { 0 };
    marks.into_iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::decode;

    fn golden(name: &str) -> Picture {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/canny/");
        decode(&std::fs::read(format!("{folder}{name}.png")).unwrap())
            .unwrap()
            .0
    }

    #[test]
    fn edges_are_opencvs_bit_for_bit() {
        let photos = ["astronaut", "chelsea", "coffee", "rocket"];
        let made = ["noise", "soft_noise", "steps", "row", "column", "dot"];
        for name in photos.iter().chain(&made) {
            for (low, high) in [(100, 200), (50, 200), (30, 60)] {
                let ours = canny(&golden(name), low, high).to_picture();
                let theirs = golden(&format!("{name}.{low}_{high}"));
                let wrong = ours.rgb.iter().zip(&theirs.rgb).filter(|(a, b)| a != b);
                assert_eq!(wrong.count(), 0, "{name} {low} {high}");
            }
        }
    }

    #[test]
    fn thresholds_the_wrong_way_round_are_exchanged() {
        let p = golden("coffee");
        assert_eq!(canny(&p, 200, 100), canny(&p, 100, 200));
    }

    #[test]
    fn agreement_is_one_with_itself_tolerates_a_shift_and_falls_with_other_pictures() {
        let a = canny(&golden("coffee"), 100, 200);
        let b = canny(&golden("chelsea"), 100, 200);
        assert_eq!(edge_agreement(&a, &a, 0), 1.0);
        let mut shifted = a.clone();
        shifted.values.rotate_right(1);
        assert!(edge_agreement(&a, &shifted, 1) > 0.98);
        assert!(edge_agreement(&a, &b, 1) < edge_agreement(&a, &shifted, 1) - 0.3);
        let empty = Edges {
            values: vec![0; a.values.len()],
            ..a.clone()
        };
        assert_eq!(edge_agreement(&a, &empty, 2), 0.0);
        assert_eq!(edge_agreement(&empty, &empty, 2), 1.0);
    }

    #[test]
    fn control_pictures_have_the_sources_size_and_say_what_they_keep() {
        let p = golden("coffee");
        for control in [
            Control::default(),
            Control::Tile { factor: 4 },
            Control::Blur { sigma: 3.0 },
            Control::Grey,
            Control::Palette { square: 32 },
        ] {
            let c = control.of(&p);
            assert_eq!((c.width, c.height), (p.width, p.height), "{control:?}");
        }
        let palette = Control::Palette { square: 32 }.of(&p);
        assert_eq!(palette.at(0, 0), palette.at(31, 31));
        let plain = Picture::filled(9, 5, [10, 20, 30]);
        assert_eq!(Control::Blur { sigma: 2.0 }.of(&plain), plain);
        assert_eq!(Control::Tile { factor: 3 }.of(&plain), plain);
    }
}
