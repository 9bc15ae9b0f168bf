//! The picture autoencoder (AutoencoderKL): pictures to latents an eighth (or, in the small
//! one, a quarter) of their size, and back.
//!
//! Encoder: a 3×3 convolution, then at each level residual blocks and (but for the last
//! level) a convolution of stride 2; a middle of block, attention, block. The decoder is the
//! mirror image with one more block a level and nearest-neighbour doubling. Latents are
//! normalised: (z - shift)·scaling.
//!
//! Encoding takes the posterior's mean unless a generator is given: an edit must not depend
//! on a draw.
//!
//! Reference: the FLUX.1 sources (`modules/autoencoder.py`), diffusers 0.42
//! `autoencoder_kl.py`.

use super::detail::{self, Detail};
use super::names::NameAndShape;
use crate::conv::{self, Conv2d};
use crate::nn;
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};
use serde::{Deserialize, Serialize};
use simpatico_schema::random::Philox;

/// The shape of an autoencoder, with the field names of diffusers' `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Picture channels in.
    pub in_channels: usize,
    /// Picture channels out.
    pub out_channels: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Channels at each level; each level but the last halves the size.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level of the encoder (the decoder has one more).
    pub layers_per_block: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
    /// `Some(p)`: no convolutional network but one linear map of p×p patches, see
    /// [`PatchCoder`]; the fields about blocks then mean nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch: Option<usize>,
    /// `Some(widths)`: the decoder ends with a [`Detail`] network of these widths, which sees
    /// the picture that is edited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<Vec<usize>>,
    /// Latents are multiplied by this,
    pub scaling_factor: f64,
    /// after this is subtracted.
    pub shift_factor: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self::flux()
    }
}

impl Config {
    /// FLUX.1's: 8× smaller, 16 channels, 83.8 M parameters.
    pub fn flux() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 16,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            mid_block_add_attention: true,
            patch: None,
            detail: None,
            scaling_factor: 0.3611,
            shift_factor: 0.1159,
        }
    }

    /// For the small Flux: 4× smaller, 8 channels, about 0.7 M parameters. Scaling and shift
    /// are to be set from the trained latents.
    pub fn small() -> Self {
        Self {
            latent_channels: 8,
            block_out_channels: vec![32, 64, 64],
            layers_per_block: 1,
            norm_num_groups: 8,
            scaling_factor: 1.0,
            shift_factor: 0.0,
            ..Self::flux()
        }
    }

    /// How many times smaller latents are than pictures, along each side.
    pub fn factor(&self) -> usize {
        if let Some(p) = self.patch {
            return p;
        }
        1 << (self.block_out_channels.len().max(1) - 1)
    }

    /// Refuses a shape that no checkpoint can have.
    pub fn check(&self) -> Result<()> {
        if self.block_out_channels.len() > 8
            || self.layers_per_block > 64
            || !(1..=1024).contains(&self.latent_channels)
        {
            let reason = "expected at most 8 levels of 64 layers and 1 to 1024 latent channels";
            return Err(Error::bad_model("config.json", reason));
        }
        if self.patch.is_some_and(|p| p == 0 || p > 64) {
            return Err(Error::bad_model("config.json", "patch must be 1 to 64"));
        }
        if let Some(widths) = &self.detail {
            detail::check(widths)?;
        }
        let groups = self.norm_num_groups;
        let fits = |c: &usize| groups > 0 && (1..=1 << 16).contains(c) && c.is_multiple_of(groups);
        if self.block_out_channels.is_empty() || !self.block_out_channels.iter().all(fits) {
            return Err(Error::bad_model(
                "config.json",
                format!(
                    "block_out_channels must be multiples of norm_num_groups {groups}, got {:?}",
                    self.block_out_channels
                ),
            ));
        }
        Ok(())
    }
}

/// Every weight of an autoencoder of this shape.
pub(super) fn shapes(config: &Config) -> Vec<NameAndShape> {
    let mut all = match &config.detail {
        Some(widths) => detail::shapes(widths, "decoder.detail."),
        None => Vec::new(),
    };
    if let Some(p) = config.patch {
        let (c, pixels) = (config.latent_channels, config.in_channels * p * p);
        all.push(("encoder.patch.weight".into(), vec![c, pixels]));
        all.push(("encoder.patch.bias".into(), vec![c]));
        all.push(("decoder.patch.weight".into(), vec![pixels, c, 3, 3]));
        all.push(("decoder.patch.bias".into(), vec![pixels]));
        return all;
    }
    let channels = &config.block_out_channels;
    let top = channels.last().copied().unwrap_or(0);
    let levels = channels.len();
    let mut put = |name: String, shape: Vec<usize>| {
        all.push((format!("{name}.weight"), shape.clone()));
        all.push((format!("{name}.bias"), shape[..1].to_vec()));
    };
    fn middle(put: &mut impl FnMut(String, Vec<usize>), p: &str, c: usize, attention: bool) {
        resnet_shapes(put, format!("{p}.mid.block_1"), c, c);
        if attention {
            put(format!("{p}.mid.attn_1.norm"), vec![c]);
            for one in ["q", "k", "v", "proj_out"] {
                put(format!("{p}.mid.attn_1.{one}"), vec![c, c, 1, 1]);
            }
        }
        resnet_shapes(put, format!("{p}.mid.block_2"), c, c);
    }
    put(
        "encoder.conv_in".into(),
        vec![channels[0], config.in_channels, 3, 3],
    );
    let mut c = channels[0];
    for (n, &c_out) in channels.iter().enumerate() {
        for m in 0..config.layers_per_block {
            resnet_shapes(&mut put, format!("encoder.down.{n}.block.{m}"), c, c_out);
            c = c_out;
        }
        if n + 1 < levels {
            put(
                format!("encoder.down.{n}.downsample.conv"),
                vec![c, c, 3, 3],
            );
        }
    }
    middle(&mut put, "encoder", top, config.mid_block_add_attention);
    put("encoder.norm_out".into(), vec![top]);
    put(
        "encoder.conv_out".into(),
        vec![2 * config.latent_channels, top, 3, 3],
    );
    put(
        "decoder.conv_in".into(),
        vec![top, config.latent_channels, 3, 3],
    );
    middle(&mut put, "decoder", top, config.mid_block_add_attention);
    for (n, &c_out) in channels.iter().enumerate().rev() {
        for m in 0..=config.layers_per_block {
            resnet_shapes(&mut put, format!("decoder.up.{n}.block.{m}"), c, c_out);
            c = c_out;
        }
        if n > 0 {
            put(format!("decoder.up.{n}.upsample.conv"), vec![c, c, 3, 3]);
        }
    }
    put("decoder.norm_out".into(), vec![channels[0]]);
    put(
        "decoder.conv_out".into(),
        vec![config.out_channels, channels[0], 3, 3],
    );
    all
}

/// Every weight of a residual block named `p`.
pub(super) fn resnet_shapes(
    put: &mut impl FnMut(String, Vec<usize>),
    p: String,
    c_in: usize,
    c_out: usize,
) {
    put(format!("{p}.norm1"), vec![c_in]);
    put(format!("{p}.conv1"), vec![c_out, c_in, 3, 3]);
    put(format!("{p}.norm2"), vec![c_out]);
    put(format!("{p}.conv2"), vec![c_out, c_out, 3, 3]);
    if c_in != c_out {
        put(format!("{p}.nin_shortcut"), vec![c_out, c_in, 1, 1]);
    }
}

// -------------------------------------------------------------------------------- layers

pub(super) fn conv(
    c_in: usize,
    c_out: usize,
    size: usize,
    stride: usize,
    padding: usize,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let config = Conv2dConfig {
        padding,
        stride,
        ..Default::default()
    };
    let weight = vb.get((c_out, c_in, size, size), "weight")?;
    Ok(Conv2d::new(weight, Some(vb.get(c_out, "bias")?), config))
}

/// Group norm with weights; eps 1e-6.
#[derive(Clone, Debug)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    pub(super) fn new(channels: usize, groups: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get(channels, "weight")?,
            bias: vb.get(channels, "bias")?,
            groups,
        })
    }

    /// The norm, then x·sigmoid(x); in f32, rounded once to the weights' dtype.
    pub(super) fn silu(&self, x: &Tensor) -> Result<Tensor> {
        let (wide, weight, bias) = self.widened(x)?;
        let y = match conv::plain_on_cpu(&[&wide, &weight, &bias]) {
            true => conv::group_norm_silu(&wide, &weight, &bias, self.groups, 1e-6)?,
            false => nn::silu(&self.normed(&wide, &weight, &bias)?)?,
        };
        Ok(y.to_dtype(self.weight.dtype())?)
    }

    /// x (b, c, h, w).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (wide, weight, bias) = self.widened(x)?;
        let y = self.normed(&wide, &weight, &bias)?;
        Ok(y.to_dtype(self.weight.dtype())?)
    }

    fn widened(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let wide = |t: &Tensor| t.to_dtype(DType::F32);
        Ok((wide(x)?, wide(&self.weight)?, wide(&self.bias)?))
    }

    fn normed(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let grouped = x.reshape((b, self.groups, c / self.groups * h * w))?;
        let x = nn::layer_norm(&grouped, None, None, 1e-6)?.reshape((b, c, h, w))?;
        Ok(x.broadcast_mul(&weight.reshape((1, c, 1, 1))?)?
            .broadcast_add(&bias.reshape((1, c, 1, 1))?)?)
    }
}

#[derive(Clone, Debug)]
pub(super) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub(super) fn new(c_in: usize, c_out: usize, groups: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            norm1: GroupNorm::new(c_in, groups, vb.pp("norm1"))?,
            conv1: conv(c_in, c_out, 3, 1, 1, vb.pp("conv1"))?,
            norm2: GroupNorm::new(c_out, groups, vb.pp("norm2"))?,
            conv2: conv(c_out, c_out, 3, 1, 1, vb.pp("conv2"))?,
            shortcut: match c_in == c_out {
                true => None,
                false => Some(conv(c_in, c_out, 1, 1, 0, vb.pp("nin_shortcut"))?),
            },
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward_wide(&self.norm1.silu(x)?)?;
        let h = self.conv2.forward_wide(&self.norm2.silu(&h)?)?;
        match &self.shortcut {
            Some(shortcut) => wide_sum(&shortcut.forward_wide(x)?, &h),
            None => wide_sum(x, &h),
        }
    }
}

/// The sum that goes on from block to block, in f32 whatever the weights' dtype: rounded at each
/// block, it alone takes a half-precision decoder past two hundredths.
fn wide_sum(x: &Tensor, h: &Tensor) -> Result<Tensor> {
    Ok((x.to_dtype(DType::F32)? + h.to_dtype(DType::F32)?)?)
}

/// Self-attention over all places, one head.
#[derive(Clone, Debug)]
struct Attention {
    norm: GroupNorm,
    q: Conv2d,
    k: Conv2d,
    v: Conv2d,
    out: Conv2d,
}

impl Attention {
    fn new(c: usize, groups: usize, vb: VarBuilder) -> Result<Self> {
        let one = |name: &str| conv(c, c, 1, 1, 0, vb.pp(name));
        Ok(Self {
            norm: GroupNorm::new(c, groups, vb.pp("norm"))?,
            q: one("q")?,
            k: one("k")?,
            v: one("v")?,
            out: one("proj_out")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = x.dims4()?;
        let normed = self.norm.forward(x)?;
        let tokens = |conv: &Conv2d| -> Result<Tensor> {
            let y = conv.forward(&normed)?.reshape((b, 1, c, h * w))?;
            Ok(y.transpose(2, 3)?.contiguous()?) // (b, 1, h·w, c)
        };
        let scale = 1.0 / (c as f64).sqrt();
        let (q, k, v) = (tokens(&self.q)?, tokens(&self.k)?, tokens(&self.v)?);
        let y = nn::attention(&q, &k, &v, scale, &nn::Mask::None)?
            .transpose(2, 3)?
            .reshape((b, c, h, w))?;
        wide_sum(x, &self.out.forward_wide(&y)?)
    }
}

#[derive(Clone, Debug)]
struct Middle {
    first: ResnetBlock,
    attention: Option<Attention>,
    second: ResnetBlock,
}

impl Middle {
    fn new(c: usize, config: &Config, vb: VarBuilder) -> Result<Self> {
        let groups = config.norm_num_groups;
        Ok(Self {
            first: ResnetBlock::new(c, c, groups, vb.pp("block_1"))?,
            attention: match config.mid_block_add_attention {
                true => Some(Attention::new(c, groups, vb.pp("attn_1"))?),
                false => None,
            },
            second: ResnetBlock::new(c, c, groups, vb.pp("block_2"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.second.forward(&x)
    }
}

/// A level of encoder or decoder: residual blocks, then perhaps a change of size.
#[derive(Clone, Debug)]
struct Level {
    blocks: Vec<ResnetBlock>,
    resize: Option<Conv2d>,
}

#[derive(Clone, Debug)]
struct Encoder {
    conv_in: Conv2d,
    levels: Vec<Level>,
    middle: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let groups = config.norm_num_groups;
        let channels = &config.block_out_channels;
        let mut c = channels[0];
        let mut levels = Vec::new();
        for (n, &c_out) in channels.iter().enumerate() {
            let vb = vb.pp("down").pp(n);
            let mut blocks = Vec::new();
            for m in 0..config.layers_per_block {
                blocks.push(ResnetBlock::new(c, c_out, groups, vb.pp("block").pp(m))?);
                c = c_out;
            }
            levels.push(Level {
                blocks,
                resize: match n + 1 < channels.len() {
                    // Padded by hand, on the right and below only.
                    true => Some(conv(c, c, 3, 2, 0, vb.pp("downsample.conv"))?),
                    false => None,
                },
            });
        }
        Ok(Self {
            conv_in: conv(config.in_channels, channels[0], 3, 1, 1, vb.pp("conv_in"))?,
            levels,
            middle: Middle::new(c, config, vb.pp("mid"))?,
            norm_out: GroupNorm::new(c, groups, vb.pp("norm_out"))?,
            conv_out: conv(c, 2 * config.latent_channels, 3, 1, 1, vb.pp("conv_out"))?,
        })
    }

    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = self.conv_in.forward(picture)?;
        for level in &self.levels {
            for block in &level.blocks {
                x = block.forward(&x)?;
            }
            if let Some(conv) = &level.resize {
                let padded = x.pad_with_zeros(D::Minus1, 0, 1)?;
                x = conv.forward(&padded.pad_with_zeros(D::Minus2, 0, 1)?)?;
            }
        }
        let x = self.middle.forward(&x)?;
        self.conv_out.forward(&self.norm_out.silu(&x)?)
    }
}

#[derive(Clone, Debug)]
struct Decoder {
    conv_in: Conv2d,
    middle: Middle,
    levels: Vec<Level>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Decoder {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let groups = config.norm_num_groups;
        let channels = &config.block_out_channels;
        let top = channels[channels.len() - 1];
        let mut c = top;
        let mut levels = Vec::new();
        for (n, &c_out) in channels.iter().enumerate().rev() {
            let vb = vb.pp("up").pp(n);
            let mut blocks = Vec::new();
            for m in 0..=config.layers_per_block {
                blocks.push(ResnetBlock::new(c, c_out, groups, vb.pp("block").pp(m))?);
                c = c_out;
            }
            levels.push(Level {
                blocks,
                resize: match n > 0 {
                    true => Some(conv(c, c, 3, 1, 1, vb.pp("upsample.conv"))?),
                    false => None,
                },
            });
        }
        Ok(Self {
            conv_in: conv(config.latent_channels, top, 3, 1, 1, vb.pp("conv_in"))?,
            middle: Middle::new(top, config, vb.pp("mid"))?,
            levels,
            norm_out: GroupNorm::new(c, groups, vb.pp("norm_out"))?,
            conv_out: conv(c, config.out_channels, 3, 1, 1, vb.pp("conv_out"))?,
        })
    }

    fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut x = self.middle.forward(&self.conv_in.forward(latents)?)?;
        for level in &self.levels {
            for block in &level.blocks {
                x = block.forward(&x)?;
            }
            if let Some(conv) = &level.resize {
                x = conv.forward(&conv::double(&x.to_dtype(conv.dtype())?)?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.silu(&x)?)
    }
}

// --------------------------------------------------------------------------- autoencoder

/// Pictures larger than this along a side are worked on in tiles, in pixels.
pub const TILE_ABOVE: usize = 1024;

/// The whole autoencoder.
#[derive(Clone, Debug)]
pub struct Vae {
    config: Config,
    coder: Coder,
    detail: Option<Detail>,
    tile: usize,
}

/// The two kinds of autoencoder.
#[derive(Clone, Debug)]
enum Coder {
    Deep(Box<(Encoder, Decoder)>),
    Patch(PatchCoder),
}

/// An autoencoder without a hidden layer, for when there is no time to train a deep one: a
/// latent is a linear map of its p×p patch, a patch a linear map of the 3×3 latents around
/// it (so that blocks do not show). Its best weights have a closed form, see
/// [`crate::train_flux::patches`].
#[derive(Clone, Debug)]
pub struct PatchCoder {
    encode: nn::Linear,
    decode: Tensor,
    bias: Tensor,
    patch: usize,
}

impl Coder {
    fn encode(&self, picture: &Tensor) -> Result<Tensor> {
        match self {
            Self::Deep(both) => both.0.forward(picture),
            Self::Patch(patch) => patch.encode(picture),
        }
    }

    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        match self {
            Self::Deep(both) => both.1.forward(latents),
            Self::Patch(patch) => patch.decode(latents),
        }
    }
}

impl PatchCoder {
    fn new(config: &Config, patch: usize, vb: VarBuilder) -> Result<Self> {
        let (c, pixels) = (config.latent_channels, config.in_channels * patch * patch);
        let weight = vb.get((c, pixels), "encoder.patch.weight")?;
        Ok(Self {
            encode: nn::Linear::new(weight, Some(vb.get(c, "encoder.patch.bias")?)),
            decode: vb.get((pixels, c, 3, 3), "decoder.patch.weight")?,
            bias: vb.get(pixels, "decoder.patch.bias")?,
            patch,
        })
    }

    /// (b, 3, h, w) to mean and log-variance as one, (b, 2c, h/p, w/p).
    fn encode(&self, picture: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = picture.dims4()?;
        let (rows, columns) = (h / self.patch, w / self.patch);
        let latents = self.encode.forward(&patches(picture, self.patch)?)?;
        let c = latents.dim(2)?;
        let mean = latents.transpose(1, 2)?.reshape((b, c, rows, columns))?;
        let sure = (mean.zeros_like()? - 30.0)?;
        Ok(Tensor::cat(&[&mean, &sure], 1)?)
    }

    /// (b, c, h, w) to (b, 3, p·h, p·w).
    fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = latents.dims4()?;
        let p = self.patch;
        let pixels = conv::convolved(latents, &self.decode, Some(&self.bias), 1, 1)?;
        let c = pixels.dim(1)? / (p * p);
        Ok(pixels
            .reshape((b, c, p, p, h, w))?
            .permute([0, 1, 4, 2, 5, 3].as_slice())?
            .reshape((b, c, p * h, p * w))?)
    }
}

/// (b, c, h, w) as its patches in rows, (b, h/p·w/p, c·p·p), a patch's values in the order
/// (c, dy, dx).
pub fn patches(picture: &Tensor, p: usize) -> Result<Tensor> {
    let (b, c, h, w) = picture.dims4()?;
    Ok(picture
        .reshape((b, c, h / p, p, w / p, p))?
        .permute([0, 2, 4, 1, 3, 5].as_slice())?
        .reshape((b, h / p * (w / p), c * p * p))?)
}

impl Vae {
    /// From weights with Black Forest Labs' names; see [`super::names`] for diffusers'.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        Ok(Self {
            config: config.clone(),
            coder: match config.patch {
                Some(p) => Coder::Patch(PatchCoder::new(config, p, vb.clone())?),
                None => Coder::Deep(Box::new((
                    Encoder::new(config, vb.pp("encoder"))?,
                    Decoder::new(config, vb.pp("decoder"))?,
                ))),
            },
            detail: match &config.detail {
                Some(widths) => Some(Detail::new(widths, vb.pp("decoder.detail"))?),
                None => None,
            },
            tile: TILE_ABOVE,
        })
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The same with another scaling and shift of the latents, as after training.
    pub fn with_scaling(mut self, scaling_factor: f64, shift_factor: f64) -> Self {
        self.config.scaling_factor = scaling_factor;
        self.config.shift_factor = shift_factor;
        self
    }

    /// The same with tiles of this many pixels a side (rounded to whole latents).
    pub fn with_tile(mut self, pixels: usize) -> Self {
        let factor = self.config.factor();
        self.tile = (pixels / factor).max(8) * factor;
        self
    }

    /// Mean and log-variance of the posterior, each (b, c, h/f, w/f), not normalised.
    /// `picture` is (b, 3, h, w) in [-1, 1], h and w multiples of the factor f.
    pub fn posterior(&self, picture: &Tensor) -> Result<(Tensor, Tensor)> {
        let (_, channels, h, w) = picture.dims4()?;
        let f = self.config.factor();
        if channels != self.config.in_channels || h == 0 || w == 0 || h % f != 0 || w % f != 0 {
            return Err(Error::BadRequest(format!(
                "a picture to encode must be (b, {}, h, w) with h and w multiples of {f}, got {:?}",
                self.config.in_channels,
                picture.dims()
            )));
        }
        let moments = match h.max(w) > self.tile {
            false => self.coder.encode(picture)?,
            true => tiled(picture, self.tile, (1, f), |x| self.coder.encode(x))?,
        };
        let c = self.config.latent_channels;
        let log_variance = moments.narrow(1, c, c)?.clamp(-30f32, 20f32)?;
        Ok((moments.narrow(1, 0, c)?.contiguous()?, log_variance))
    }

    /// Latents of a picture: the posterior's mean, normalised. (b, 3, h, w) in [-1, 1] to
    /// (b, c, h/f, w/f).
    pub fn encode(&self, picture: &Tensor) -> Result<Tensor> {
        self.normalise(&self.posterior(picture)?.0)
    }

    /// As [`Self::encode`], but drawn from the posterior with this generator.
    pub fn encode_sample(&self, picture: &Tensor, rng: &mut Philox) -> Result<Tensor> {
        let (mean, log_variance) = self.posterior(picture)?;
        let noise = rng.normals(mean.elem_count());
        let noise = Tensor::from_vec(noise, mean.shape(), &Device::Cpu)?
            .to_device(mean.device())?
            .to_dtype(mean.dtype())?;
        self.normalise(&(mean + ((log_variance * 0.5)?.exp()? * noise)?)?)
    }

    /// (z - shift)·scaling.
    pub fn normalise(&self, z: &Tensor) -> Result<Tensor> {
        Ok(((z - self.config.shift_factor)? * self.config.scaling_factor)?)
    }

    /// Normalised latents (b, c, h, w) to pictures (b, 3, f·h, f·w), about [-1, 1].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_beside(latents, None)
    }

    /// As [`Self::decode`], with the pictures that were edited at hand, (b, 3, f·h, f·w): a
    /// decoder with a [`Detail`] network takes edges and what did not change from them (in one
    /// piece, whatever the size), any other does without.
    pub fn decode_beside(&self, latents: &Tensor, source: Option<&Tensor>) -> Result<Tensor> {
        let coarse = self.decode_coarse(latents)?;
        match &self.detail {
            Some(detail) => detail.forward(&coarse, source.unwrap_or(&coarse)),
            None => Ok(coarse),
        }
    }

    fn decode_coarse(&self, latents: &Tensor) -> Result<Tensor> {
        let (_, c, h, w) = latents.dims4()?;
        if c != self.config.latent_channels || h == 0 || w == 0 {
            return Err(Error::BadRequest(format!(
                "latents to decode must have {} channels, got {:?}",
                self.config.latent_channels,
                latents.dims()
            )));
        }
        let z = ((latents / self.config.scaling_factor)? + self.config.shift_factor)?;
        let f = self.config.factor();
        match h.max(w) * f > self.tile {
            false => self.coder.decode(&z),
            true => tiled(&z, self.tile / f, (f, 1), |x| self.coder.decode(x)),
        }
    }
}

/// Works through x (b, c, h, w) in overlapping tiles of `tile` a side and blends the results
/// linearly over the overlap (a quarter of a tile). `(up, down)` is how the size changes.
///
/// Each tile has group norms and attention of its own, so the result differs slightly from
/// that in one piece (as it does in diffusers).
fn tiled(
    x: &Tensor,
    tile: usize,
    (up, down): (usize, usize),
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    // Positions are multiples of `down`, so that they are whole in the result.
    let starts = |n: usize| -> Vec<usize> {
        let step = (tile * 3 / 4 / down).max(1) * down;
        match n.checked_sub(tile) {
            None | Some(0) => vec![0],
            Some(last) => (0..last).step_by(step).chain([last]).collect(),
        }
    };
    let (oh, ow) = (h * up / down, w * up / down);
    let scaled = |n: usize| n * up / down;
    let mut total: Option<Tensor> = None;
    let mut weight = Tensor::zeros((1, 1, oh, ow), DType::F32, x.device())?;
    for &y0 in &starts(h) {
        for &x0 in &starts(w) {
            let (th, tw) = (tile.min(h), tile.min(w));
            let out = f(&x.narrow(2, y0, th)?.narrow(3, x0, tw)?.contiguous()?)?;
            let ramp = |n: usize| -> Vec<f32> {
                let edge = (n / 4).max(1);
                (0..n)
                    .map(|i| (i + 1).min(n - i).min(edge) as f32 / edge as f32)
                    .collect()
            };
            let (rows, columns) = (ramp(scaled(th)), ramp(scaled(tw)));
            let rows = Tensor::from_vec(rows, (1, 1, scaled(th), 1), x.device())?;
            let columns = Tensor::from_vec(columns, (1, 1, 1, scaled(tw)), x.device())?;
            let mask = rows.broadcast_mul(&columns)?;
            let place = |t: &Tensor| -> Result<Tensor> {
                let (y1, x1) = (scaled(y0), scaled(x0));
                Ok(t.pad_with_zeros(2, y1, oh - y1 - scaled(th))?
                    .pad_with_zeros(3, x1, ow - x1 - scaled(tw))?)
            };
            let part = place(&out.to_dtype(DType::F32)?.broadcast_mul(&mask)?)?;
            total = Some(match total {
                Some(sum) => (sum + part)?,
                None => part,
            });
            weight = (weight + place(&mask)?)?;
        }
    }
    match total {
        Some(sum) => Ok(sum.broadcast_div(&weight)?.to_dtype(x.dtype())?),
        None => Ok(Tensor::zeros((b, 0, oh, ow), x.dtype(), x.device())?),
    }
}
