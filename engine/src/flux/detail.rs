//! The detail decoder: what a small autoencoder's picture lacks, taken from the source.
//!
//! A latent that stands for 16×16 pixels cannot say where an edge runs. In an edit it need
//! not: the source has the edge. So the decoder of an edit sees the source beside the latents,
//! as in diffusers' `AsymmetricAutoencoderKL` (arXiv 2306.04632, which does it for inpainting):
//!
//! 1. The latents are decoded as usual, to a coarse picture.
//! 2. Coarse picture and source, with every 2×2 pixels as channels, go through a small U-Net of
//!    residual blocks.
//! 3. It answers with a correction of the coarse picture and, for every pixel, how much of the
//!    source to take instead.
//! 4. What is coarser than [`SIGMA`] pixels is taken from the coarse picture again: how an edit
//!    looks at large is the transformer's to say, and a network that is unsure keeps to the
//!    source.
//!
//! Where there is no source (a picture from nothing, a model that must not see it) the coarse
//! picture stands in for it. Not here: the training ([`crate::train_flux::detail`]).

use super::names::NameAndShape;
use super::vae::{GroupNorm, ResnetBlock, conv, resnet_shapes};
use crate::conv::{self, Conv2d};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// Groups of its group norms.
const GROUPS: usize = 8;

/// Channels in: the four pixels of a square, of coarse picture and source.
const INPUTS: usize = 2 * 3 * 4;

/// Channels out: a colour for each of the four pixels, then a share of the source for each.
const OUTPUTS: usize = 3 * 4 + 4;

/// Standard deviation of the Gaussian that parts the look at large from detail, in pixels: about
/// a third of the side that a token of the small Flux stands for.
pub const SIGMA: f64 = 5.0;

/// The network. Sides of a picture must be multiples of 2 to the power of how many widths it has.
#[derive(Clone, Debug)]
pub struct Detail {
    conv_in: Conv2d,
    down: Vec<(ResnetBlock, Conv2d)>,
    middle: ResnetBlock,
    up: Vec<(Conv2d, ResnetBlock)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
    dtype: DType,
}

/// The widths that ship: at half, a quarter, an eighth and a sixteenth of the picture's side;
/// 1.0 M parameters.
pub const WIDTHS: [usize; 4] = [24, 48, 96, 128];

/// # Errors
/// If widths are missing or are no multiples of the groups.
pub(super) fn check(widths: &[usize]) -> Result<()> {
    let fits = |w: &usize| *w > 0 && *w <= 4096 && w.is_multiple_of(GROUPS);
    if widths.is_empty() || widths.len() > 8 || !widths.iter().all(fits) {
        let reason = format!("detail must be 1 to 8 multiples of {GROUPS}, got {widths:?}");
        return Err(Error::bad_model("config.json", reason));
    }
    Ok(())
}

/// Every weight, under `prefix`.
pub(crate) fn shapes(widths: &[usize], prefix: &str) -> Vec<NameAndShape> {
    let mut all = Vec::new();
    let mut put = |name: String, shape: Vec<usize>| {
        all.push((format!("{prefix}{name}.weight"), shape.clone()));
        all.push((format!("{prefix}{name}.bias"), shape[..1].to_vec()));
    };
    let (Some(&first), Some(&last)) = (widths.first(), widths.last()) else {
        return all;
    };
    put("conv_in".into(), vec![first, INPUTS, 3, 3]);
    for (n, pair) in widths.windows(2).enumerate() {
        let (wide, narrow) = (pair[0], pair[1]);
        resnet_shapes(&mut put, format!("down.{n}.block"), wide, wide);
        put(format!("down.{n}.conv"), vec![narrow, wide, 3, 3]);
        put(format!("up.{n}.conv"), vec![wide, narrow, 3, 3]);
        resnet_shapes(&mut put, format!("up.{n}.block"), wide, wide);
    }
    resnet_shapes(&mut put, "middle".into(), last, last);
    put("norm_out".into(), vec![first]);
    put("conv_out".into(), vec![OUTPUTS, first, 3, 3]);
    all
}

impl Detail {
    /// From weights.
    ///
    /// # Errors
    /// If one is missing or of another shape.
    pub fn new(widths: &[usize], vb: VarBuilder) -> Result<Self> {
        check(widths)?;
        let (first, last) = (widths[0], widths[widths.len() - 1]);
        let (mut down, mut up) = (Vec::new(), Vec::new());
        for (n, pair) in widths.windows(2).enumerate() {
            let (wide, narrow) = (pair[0], pair[1]);
            let (d, u) = (vb.pp("down").pp(n), vb.pp("up").pp(n));
            down.push((
                ResnetBlock::new(wide, wide, GROUPS, d.pp("block"))?,
                conv(wide, narrow, 3, 2, 1, d.pp("conv"))?,
            ));
            up.push((
                conv(narrow, wide, 3, 1, 1, u.pp("conv"))?,
                ResnetBlock::new(wide, wide, GROUPS, u.pp("block"))?,
            ));
        }
        up.reverse();
        Ok(Self {
            conv_in: conv(INPUTS, first, 3, 1, 1, vb.pp("conv_in"))?,
            down,
            middle: ResnetBlock::new(last, last, GROUPS, vb.pp("middle"))?,
            up,
            norm_out: GroupNorm::new(first, GROUPS, vb.pp("norm_out"))?,
            conv_out: conv(first, OUTPUTS, 3, 1, 1, vb.pp("conv_out"))?,
            dtype: vb.dtype(),
        })
    }

    /// The coarse picture with the source's detail; all (b, 3, h, w), about -1..1, in the dtype
    /// of the pictures, whatever the weights'.
    ///
    /// # Errors
    /// If the two differ in shape or a side does not fit.
    pub fn forward(&self, coarse: &Tensor, source: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = coarse.dims4()?;
        let multiple = 2 << self.down.len();
        if coarse.dims() != source.dims() || h % multiple != 0 || w % multiple != 0 {
            return Err(Error::BadRequest(format!(
                "coarse picture and source must have one shape with sides that are multiples \
                 of {multiple}, got {:?} and {:?}",
                coarse.dims(),
                source.dims()
            )));
        }
        let both = Tensor::cat(&[squares(coarse)?, squares(source)?], 1)?;
        let mut x = self.conv_in.forward(&both.to_dtype(self.dtype)?)?;
        let mut kept = Vec::with_capacity(self.down.len());
        for (block, shrink) in &self.down {
            let y = block.forward(&x)?;
            x = shrink.forward(&y)?;
            kept.push(y);
        }
        x = self.middle.forward(&x)?;
        for (grow, block) in &self.up {
            let y = grow.forward(&conv::double(&x.to_dtype(self.dtype)?)?)?;
            x = match kept.pop() {
                Some(same) => block.forward(&(y.to_dtype(same.dtype())? + same)?)?,
                None => block.forward(&y)?,
            };
        }
        let out = self.conv_out.forward(&self.norm_out.silu(&x)?)?; // (b, 16, h/2, w/2)
        let out = out.to_dtype(coarse.dtype())?;
        let change = pixels(&out.narrow(1, 0, 12)?.contiguous()?)?;
        let share = pixels(&out.narrow(1, 12, 4)?.contiguous()?)?; // (b, 1, h, w)
        let share = candle_nn::ops::sigmoid(&share)?;
        let drawn = (coarse + change)?;
        let detailed = (&drawn + (source - &drawn)?.broadcast_mul(&share)?)?;
        Ok((&detailed + at_large(&(coarse - &detailed)?)?)?)
    }
}

/// A picture (b, c, h, w) without what is finer than [`SIGMA`] pixels.
fn at_large(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let blur = |n: usize| -> Result<Tensor> {
        let mut rows = Vec::with_capacity(n * n);
        for i in 0..n {
            let weight = |j: usize| (-((i as f64 - j as f64) / SIGMA).powi(2) / 2.0).exp();
            let sum: f64 = (0..n).map(weight).sum();
            rows.extend((0..n).map(|j| (weight(j) / sum) as f32));
        }
        Ok(Tensor::from_vec(rows, (n, n), x.device())?.to_dtype(x.dtype())?)
    };
    let across = x.broadcast_matmul(&blur(w)?.t()?.contiguous()?)?;
    Ok(blur(h)?.broadcast_matmul(&across)?)
}

/// Every 2×2 pixels as channels: (b, c, h, w) to (b, 4c, h/2, w/2).
pub(crate) fn squares(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    Ok(x.reshape(vec![b, c, h / 2, 2, w / 2, 2])?
        .permute(vec![0, 1, 3, 5, 2, 4])?
        .reshape((b, 4 * c, h / 2, w / 2))?)
}

/// The way back: (b, 4c, h, w) to (b, c, 2h, 2w).
fn pixels(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    Ok(x.reshape(vec![b, c / 4, 2, 2, h, w])?
        .permute(vec![0, 1, 4, 2, 5, 3])?
        .reshape((b, c / 4, 2 * h, 2 * w))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flux::init;
    use candle_core::Device;
    use simpatico_schema::random::Philox;

    fn picture(seed: u64) -> Tensor {
        let values = Philox::new(seed, 0).normals(2 * 3 * 32 * 48);
        Tensor::from_vec(values, (2, 3, 32, 48), &Device::Cpu).expect("a tensor")
    }

    #[test]
    fn squares_and_pixels_are_each_others_inverse() {
        let x = picture(1);
        let again = pixels(&squares(&x).expect("squares")).expect("pixels");
        let (x, again) = (x.flatten_all().unwrap(), again.flatten_all().unwrap());
        assert_eq!(x.to_vec1::<f32>().unwrap(), again.to_vec1::<f32>().unwrap());
    }

    #[test]
    fn an_untrained_one_answers_between_coarse_picture_and_source() {
        let widths = [8, 16, 24];
        let weights = init::random(&shapes(&widths, "detail."), 3, &Device::Cpu);
        let vb = init::builder(&weights.expect("weights"), DType::F32, &Device::Cpu);
        let detail = Detail::new(&widths, vb.pp("detail")).expect("a network");
        let (coarse, source) = (picture(1), picture(2));
        let out = detail.forward(&coarse, &source).expect("a picture");
        assert_eq!(out.dims(), coarse.dims());
        let same = detail.forward(&source, &source).expect("a picture");
        let off = (same - &source).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>());
        assert!(
            off.expect("a number") < 1e-5,
            "a silent output changes nothing"
        );
        let mean = |t: &Tensor| {
            t.mean_all()
                .and_then(|m| m.to_scalar::<f32>())
                .expect("a mean")
        };
        let shifted = (&coarse + 0.5).expect("a picture");
        let out = detail.forward(&shifted, &source).expect("a picture");
        let off = mean(&out) - mean(&shifted);
        assert!(
            off.abs() < 0.05,
            "the look at large is the coarse picture's: {off}"
        );
        let odd = coarse.narrow(3, 0, 44).expect("a part");
        let error = detail
            .forward(&odd, &odd)
            .expect_err("44 is no multiple of 8");
        assert!(error.to_string().contains("multiples"), "{error}");
    }
}
