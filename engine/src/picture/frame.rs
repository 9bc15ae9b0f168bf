//! Where a source picture lies within the picture a model works on, there and back.

use super::Picture;

/// How many steps of 255 a pixel may have changed for about a third of its detail to return.
const CALM: f32 = 24.0;

/// How a source is brought to the shape a model works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// The shape follows the source (a stretch of less than one multiple is allowed); very
    /// long sources get borders. For models trained on many shapes.
    Aspect,
    /// Always a square; the missing sides are filled with the border's own colours. For small
    /// models trained on squares only.
    Square,
}

/// The plan of a scaling: made once from the sizes alone, applied there and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Width and height the model works on.
    pub model: (u32, u32),
    /// Width and height of the result.
    pub output: (u32, u32),
    /// Where the picture lies within the model's: x, y, width, height. Around it is border.
    pub inner: (u32, u32, u32, u32),
}

impl Frame {
    /// Plans for a picture of size `output`, a model that works on about `side` x `side`
    /// pixels, and sides that are multiples of `multiple`. All must be at least 1.
    pub fn plan(output: (u32, u32), side: u32, multiple: u32, fit: Fit) -> Self {
        let (w, h) = (f64::from(output.0), f64::from(output.1));
        let round = |v: f64| ((v / f64::from(multiple)).round().max(1.0) as u32) * multiple;
        let model = match fit {
            Fit::Square => (round(f64::from(side)), round(f64::from(side))),
            Fit::Aspect => {
                // Beyond 1:4 a model sees nothing it was trained on.
                let aspect = (w / h).clamp(0.25, 4.0).sqrt();
                let side = f64::from(side);
                (round(side * aspect), round(side / aspect))
            }
        };
        Self {
            model,
            output,
            inner: place(output, model, multiple),
        }
    }

    /// The picture as the model gets it: opaque (on white), scaled, with its borders.
    pub fn to_model(&self, source: &Picture) -> Picture {
        let (x, y, w, h) = self.inner;
        let scaled = source.on([255; 3]).resized(w, h);
        if (w, h) == self.model {
            return scaled;
        }
        // Borders repeat the nearest pixel: they make no edge for a control image to hold on to.
        let pixel = |i: u32| {
            let (column, row) = (i % self.model.0, i / self.model.0);
            scaled.at(
                column.saturating_sub(x).min(w - 1),
                row.saturating_sub(y).min(h - 1),
            )
        };
        let pixels = self.model.0 * self.model.1;
        let rgb = (0..pixels).flat_map(pixel).collect();
        Picture::from_rgb(self.model.0, self.model.1, rgb)
    }

    /// The model's picture at the output size, borders cut away.
    pub fn from_model(&self, picture: &Picture) -> Picture {
        let (x, y, w, h) = self.inner;
        let inner = picture.cropped(x, y, w, h);
        inner.resized(self.output.0, self.output.1)
    }

    /// As [`Frame::from_model`], with `share` (0 to 1) of the source's fine detail that the model's
    /// size has no room for, where the model left the picture as it was.
    ///
    /// Detail is the source minus itself scaled down and up again. It fades as
    /// exp(-(change / 24)²) with the change of the model's pixel in steps of 255, so what was
    /// edited shows none of what it was. A picture of the model's own size has no such detail.
    pub fn from_model_with_fine_detail(
        &self,
        picture: &Picture,
        source: &Picture,
        share: f32,
    ) -> Picture {
        let (x, y, w, h) = self.inner;
        let edited = self.from_model(picture);
        if share <= 0.0 || (w, h) == self.output {
            return edited;
        }
        let (width, height) = self.output;
        let opaque = source.on([255; 3]);
        let small = opaque.resized(w, h);
        let inner = picture.cropped(x, y, w, h);
        let pixels = inner.rgb.chunks_exact(3).zip(small.rgb.chunks_exact(3));
        let calm = pixels.flat_map(|(a, b)| {
            let change = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).max();
            let change = f32::from(change.unwrap_or(0)) / CALM;
            [(255.0 * (-change * change).exp()).round() as u8; 3]
        });
        let calm = Picture::from_rgb(w, h, calm.collect()).resized(width, height);
        let (full, rough) = (opaque.resized(width, height), small.resized(width, height));
        let detail = full.rgb.iter().zip(&rough.rgb).zip(&calm.rgb);
        let rgb = edited.rgb.iter().zip(detail).map(|(e, ((f, r), c))| {
            let detail = f32::from(*f) - f32::from(*r);
            let value = f32::from(*e) + share * f32::from(*c) / 255.0 * detail;
            value.round().clamp(0.0, 255.0) as u8
        });
        Picture::from_rgb(width, height, rgb.collect())
    }
}

fn place(output: (u32, u32), model: (u32, u32), multiple: u32) -> (u32, u32, u32, u32) {
    let (w, h) = (f64::from(output.0), f64::from(output.1));
    let scale = (f64::from(model.0) / w).min(f64::from(model.1) / h);
    let fitted = |v: f64, max: u32| ((v * scale).round() as u32).clamp(1, max);
    let (iw, ih) = (fitted(w, model.0), fitted(h, model.1));
    if model.0 - iw < multiple && model.1 - ih < multiple {
        return (0, 0, model.0, model.1);
    }
    ((model.0 - iw) / 2, (model.1 - ih) / 2, iw, ih)
}
