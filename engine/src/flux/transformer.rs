//! The Flux transformer: a velocity field over packed latents, given text and time.
//!
//! It is a rectified flow: at time t (1 = noise, 0 = picture) x_t = (1-t)·x_0 + t·ε, and the
//! network estimates the velocity ε - x_0.
//!
//! 1. Latent tokens and text tokens each go through a linear map to the hidden size d.
//! 2. A vector made of time, guidance and the pooled text decides, through one linear map per
//!    block, how each block shifts, scales and gates its streams ([`Modulation`]).
//! 3. *Double* blocks keep two streams with weights of their own that attend together, text
//!    first; *single* blocks work on both as one sequence.
//! 4. After each block the image tokens get a ControlNet's residual, if there is one.
//! 5. The image tokens are normalised, modulated and mapped back to latent channels.
//!
//! Positions enter as rotations over three axes (Flux uses the second and third: row and
//! column). Their angles are computed in f64 and applied in f32 whatever the weights' dtype.
//!
//! Reference: the FLUX.1 sources (`src/flux/model.py`, `modules/layers.py`) and diffusers
//! 0.42 `transformer_flux.py`.

use super::cpu_blocks;
use crate::conv::learns_on_cpu;
use crate::fused;
use crate::nn::{self, Linear, Mask, RopeLayout};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, RwLock};

/// The shape of a Flux transformer, with the field names of diffusers' `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Channels of a packed latent token (4 × the autoencoder's channels).
    pub in_channels: usize,
    /// Channels of a velocity token; `None`: `in_channels`.
    pub out_channels: Option<usize>,
    /// Double blocks.
    pub num_layers: usize,
    /// Single blocks.
    pub num_single_layers: usize,
    /// Channels per attention head.
    pub attention_head_dim: usize,
    /// Attention heads; the hidden size is heads × head_dim.
    pub num_attention_heads: usize,
    /// Channels of a text token.
    pub joint_attention_dim: usize,
    /// Channels of the pooled text.
    pub pooled_projection_dim: usize,
    /// Whether the guidance scale is an input (FLUX.1-dev) or not (schnell).
    pub guidance_embeds: bool,
    /// How a head's channels are shared among the three position axes.
    pub axes_dims_rope: Vec<usize>,
    /// What the output estimates. Not in diffusers' files, whose models all give velocities.
    #[serde(skip_serializing_if = "Prediction::is_velocity")]
    pub prediction: Prediction,
}

/// What a transformer's output estimates, at x_t = (1-t)·x_0 + t·ε.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prediction {
    /// ε - x_0, as every released Flux.
    #[default]
    Velocity,
    /// x_0 itself: what a network can learn whose tokens are nearly as wide as it is
    /// (arXiv 2511.13720), such as the bundle's small one.
    Sample,
}

/// The least time by which an error of x_0 is divided to give one of the velocity.
pub const LEAST_TIME: f32 = 0.05;

impl Prediction {
    fn is_velocity(&self) -> bool {
        *self == Self::Velocity
    }

    /// The velocity ε - x_0 = (x_t - x_0) / t that an output means at time t.
    pub fn velocity(self, latents: &Tensor, output: Tensor, time: f32) -> Result<Tensor> {
        match self {
            Self::Velocity => Ok(output),
            Self::Sample => {
                let by = 1.0 / f64::from(time.max(LEAST_TIME));
                Ok(((latents - output)? * by)?)
            }
        }
    }
}

impl Default for Config {
    /// diffusers' defaults: FLUX.1-schnell.
    fn default() -> Self {
        Self {
            in_channels: 64,
            out_channels: None,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: false,
            axes_dims_rope: vec![16, 56, 56],
            prediction: Prediction::Velocity,
        }
    }
}

/// More channels than any model has: beyond, a config is damaged.
const WIDTH_MAX: usize = 1 << 16;
/// More blocks of one kind than any model has.
const BLOCKS_MAX: usize = 1024;

impl Config {
    /// FLUX.1-dev: 11.90 B parameters.
    pub fn dev() -> Self {
        Self {
            guidance_embeds: true,
            ..Self::default()
        }
    }

    /// FLUX.1-schnell: as dev, without the guidance input.
    pub fn schnell() -> Self {
        Self::default()
    }

    /// About 7.7 M parameters, for 128 px with the small autoencoder (256 tokens of 32
    /// channels) and MiniLM text; a third of a gigaflop per token-step and picture.
    pub fn small() -> Self {
        Self {
            in_channels: 32,
            out_channels: None,
            num_layers: 3,
            num_single_layers: 6,
            attention_head_dim: 64,
            num_attention_heads: 3,
            joint_attention_dim: 384,
            pooled_projection_dim: 384,
            guidance_embeds: true,
            axes_dims_rope: vec![8, 28, 28],
            prediction: Prediction::Velocity,
        }
    }

    /// About 2.4 M parameters: trains on two CPU cores at 64 px.
    pub fn tiny() -> Self {
        Self {
            num_layers: 2,
            num_single_layers: 4,
            num_attention_heads: 2,
            ..Self::small()
        }
    }

    /// The hidden size d.
    pub fn hidden(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Channels of a velocity token.
    pub fn out(&self) -> usize {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Refuses a shape that no checkpoint can have.
    pub fn check(&self) -> Result<()> {
        let wrong = |reason: String| Err(Error::bad_model("config.json", reason));
        let widths = [
            self.in_channels,
            self.out(),
            self.attention_head_dim,
            self.num_attention_heads,
            self.joint_attention_dim,
            self.pooled_projection_dim,
        ];
        if widths.iter().any(|n| !(1..=WIDTH_MAX).contains(n))
            || self.num_layers.max(self.num_single_layers) > BLOCKS_MAX
        {
            return wrong(format!(
                "channels and heads must be 1 to {WIDTH_MAX}, layers at most {BLOCKS_MAX}"
            ));
        }
        if self.axes_dims_rope.len() != 3
            || self.axes_dims_rope.iter().any(|d| d % 2 != 0)
            || self.axes_dims_rope.iter().sum::<usize>() != self.attention_head_dim
        {
            return wrong(format!(
                "axes_dims_rope must be three even numbers that add up to attention_head_dim \
                 {}, got {:?}",
                self.attention_head_dim, self.axes_dims_rope
            ));
        }
        Ok(())
    }
}

/// What one evaluation of the network takes.
pub struct Inputs<'a> {
    /// Packed noisy latents, (b, n, in_channels).
    pub latents: &'a Tensor,
    /// Positions of the image tokens, (n, 3), see [`image_ids`]. These and the text's are read on
    /// the host: best they lie there.
    pub ids: &'a Tensor,
    /// Text token states, (b, t, joint_attention_dim).
    pub text: &'a Tensor,
    /// Positions of the text tokens, (t, 3), see [`text_ids`].
    pub text_ids: &'a Tensor,
    /// Pooled text, (b, pooled_projection_dim).
    pub pooled: &'a Tensor,
    /// Time from 0 (picture) to 1 (noise), f32, (b).
    pub timestep: &'a Tensor,
    /// Guidance scale, f32, (b). Required exactly when the config has `guidance_embeds`.
    pub guidance: Option<&'a Tensor>,
    /// A ControlNet's output.
    pub residuals: Option<&'a Residuals>,
}

// --------------------------------------------------------------------------- positions

/// Positions (0, row, column) of `rows` × `columns` latent tokens, f32, (rows·columns, 3).
pub fn image_ids(rows: usize, columns: usize, device: &Device) -> Result<Tensor> {
    let ids: Vec<f32> = (0..rows)
        .flat_map(|y| (0..columns).flat_map(move |x| [0.0, y as f32, x as f32]))
        .collect();
    Ok(Tensor::from_vec(ids, (rows * columns, 3), device)?)
}

/// Positions of `tokens` text tokens: all zero, f32, (tokens, 3).
pub fn text_ids(tokens: usize, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((tokens, 3), DType::F32, device)?)
}

/// Latents (b, c, h, w) as tokens (b, h/2·w/2, 4c): each token is a 2×2 patch, its channels
/// in the order (c, dy, dx).
pub fn pack(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    if h % 2 != 0 || w % 2 != 0 {
        return Err(Error::BadRequest(format!(
            "latents must have even height and width to be packed, got {h}×{w}"
        )));
    }
    Ok(latents
        .reshape((b, c, h / 2, 2, w / 2, 2))?
        .permute((0, 2, 4, 1, 3, 5))?
        .reshape((b, h / 2 * (w / 2), c * 4))?)
}

/// The inverse of [`pack`]: tokens (b, h/2·w/2, 4c) as latents (b, c, h, w).
pub fn unpack(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, n, c4) = tokens.dims3()?;
    if !h.is_multiple_of(2) || !w.is_multiple_of(2) || n != h / 2 * (w / 2) || c4 % 4 != 0 {
        return Err(Error::BadRequest(format!(
            "tokens {:?} are not latents of {h}×{w}",
            tokens.dims()
        )));
    }
    Ok(tokens
        .reshape((b, h / 2, w / 2, c4 / 4, 2, 2))?
        .permute((0, 3, 1, 4, 2, 5))?
        .reshape((b, c4 / 4, h, w))?)
}

/// cos and sin of every token's rotation, f32, each (t + n, head_dim / 2), text first.
#[derive(Clone, Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// From the positions of text and image, on `device`. Costs (t + n)·head_dim sines on the
    /// host: make it once per edit.
    pub fn new(config: &Config, text_ids: &Tensor, ids: &Tensor, device: &Device) -> Result<Self> {
        let ids = Tensor::cat(&[text_ids, ids], 0)?;
        let positions = ids.to_dtype(DType::F64)?.to_device(&Device::Cpu)?;
        let mut parts = (Vec::new(), Vec::new());
        for (axis, &dim) in config.axes_dims_rope.iter().enumerate() {
            let column = positions
                .narrow(1, axis, 1)?
                .flatten_all()?
                .to_vec1::<f64>()?;
            let frequencies = nn::rope_frequencies(dim, 10_000.0);
            let (cos, sin) = nn::rope_tables(&column, &frequencies, device)?;
            parts.0.push(cos);
            parts.1.push(sin);
        }
        Ok(Self {
            cos: Tensor::cat(&parts.0, 1)?,
            sin: Tensor::cat(&parts.1, 1)?,
        })
    }

    /// With the first position repeated `extra` times in front, as for a mode token.
    pub fn with_leading(&self, extra: usize) -> Result<Self> {
        let lead = |x: &Tensor| -> Result<Tensor> {
            let first = x.narrow(0, 0, 1)?;
            let mut parts = vec![&first; extra];
            parts.push(x);
            Ok(Tensor::cat(&parts, 0)?)
        };
        Ok(Self {
            cos: lead(&self.cos)?,
            sin: lead(&self.sin)?,
        })
    }
}

// -------------------------------------------------------------------------- modulation

/// Sine embedding of a time in [0, 1] or of a guidance scale, f32 (b) to (b, 256): cosines
/// first, wavelengths from 2π to 2π·10,000, of 1,000 × the value.
pub fn sinusoid(values: &Tensor) -> Result<Tensor> {
    const HALF: usize = 128;
    let frequencies: Vec<f32> = (0..HALF)
        .map(|i| (-(10_000f32.ln()) * i as f32 / HALF as f32).exp())
        .collect();
    let frequencies = Tensor::from_vec(frequencies, (1, HALF), values.device())?;
    let angles = (values.to_dtype(DType::F32)? * 1000.0)?
        .unsqueeze(1)?
        .broadcast_mul(&frequencies)?;
    Ok(Tensor::cat(&[angles.cos()?, angles.sin()?], 1)?)
}

/// linear → silu → linear.
#[derive(Clone, Debug)]
struct Mlp {
    first: Linear,
    second: Linear,
}

impl Mlp {
    fn new(inputs: usize, hidden: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            first: linear(inputs, hidden, vb.pp("in_layer"))?,
            second: linear(hidden, hidden, vb.pp("out_layer"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&nn::silu(&self.first.forward(x)?)?)
    }
}

/// The part of the network that sees only time, guidance and pooled text. A quarter of
/// FLUX.1-dev's parameters, next to no work: compute all steps' [`Modulation`] up front,
/// then drop this (see [`FluxTransformer::drop_modulator`]).
#[derive(Clone, Debug)]
pub struct Modulator {
    time: Mlp,
    guidance: Option<Mlp>,
    pooled: Mlp,
    double: Vec<(Linear, Linear)>,
    single: Vec<Linear>,
    last: Option<Linear>,
    dtype: DType,
}

/// The modulator, unless it was dropped.
pub(crate) fn held(modulator: &RwLock<Option<Arc<Modulator>>>) -> Result<Arc<Modulator>> {
    let held = modulator.read().unwrap_or_else(|e| e.into_inner());
    held.clone().ok_or_else(|| {
        Error::BadRequest("the modulation weights were dropped: load the model again".into())
    })
}

/// Drops it.
pub(crate) fn drop_held(modulator: &RwLock<Option<Arc<Modulator>>>) {
    *modulator.write().unwrap_or_else(|e| e.into_inner()) = None;
}

/// All shifts, scales and gates of one evaluation. Each tensor is (b, k·d).
#[derive(Clone, Debug)]
pub struct Modulation {
    double: Vec<(Tensor, Tensor)>,
    single: Vec<Tensor>,
    last: Option<Tensor>,
}

impl Modulation {
    /// Items `first` to `first + n` of the batch, as when several steps were computed at once.
    pub fn rows(&self, first: usize, n: usize) -> Result<Self> {
        let rows = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(0, first, n)?) };
        Ok(Self {
            double: self
                .double
                .iter()
                .map(|(image, text)| Ok((rows(image)?, rows(text)?)))
                .collect::<Result<_>>()?,
            single: self.single.iter().map(rows).collect::<Result<_>>()?,
            last: self.last.as_ref().map(rows).transpose()?,
        })
    }
}

impl Modulator {
    pub(crate) fn new(config: &Config, last: bool, vb: &VarBuilder) -> Result<Self> {
        let d = config.hidden();
        let double = (0..config.num_layers).map(|i| {
            let vb = vb.pp("double_blocks").pp(i);
            let image = linear(d, 6 * d, vb.pp("img_mod.lin"))?;
            Ok((image, linear(d, 6 * d, vb.pp("txt_mod.lin"))?))
        });
        let single = (0..config.num_single_layers)
            .map(|i| linear(d, 3 * d, vb.pp("single_blocks").pp(i).pp("modulation.lin")));
        Ok(Self {
            time: Mlp::new(256, d, vb.pp("time_in"))?,
            guidance: match config.guidance_embeds {
                true => Some(Mlp::new(256, d, vb.pp("guidance_in"))?),
                false => None,
            },
            pooled: Mlp::new(config.pooled_projection_dim, d, vb.pp("vector_in"))?,
            double: double.collect::<Result<_>>()?,
            single: single.collect::<Result<_>>()?,
            last: match last {
                true => Some(linear(d, 2 * d, vb.pp("final_layer.adaLN_modulation.1"))?),
                false => None,
            },
            dtype: vb.dtype(),
        })
    }

    /// The modulation at these times. `timestep` and `guidance` are f32 (b), `pooled` is
    /// (b, pooled_projection_dim).
    pub fn at(
        &self,
        timestep: &Tensor,
        guidance: Option<&Tensor>,
        pooled: &Tensor,
    ) -> Result<Modulation> {
        let mut vector = self
            .time
            .forward(&sinusoid(timestep)?.to_dtype(self.dtype)?)?;
        match (&self.guidance, guidance) {
            (Some(mlp), Some(g)) => {
                vector = (vector + mlp.forward(&sinusoid(g)?.to_dtype(self.dtype)?)?)?;
            }
            (None, None) => {}
            (Some(_), None) => {
                return Err(Error::BadRequest(
                    "this Flux model takes a guidance scale and got none: give one (3.5 is usual)"
                        .into(),
                ));
            }
            (None, Some(_)) => {
                return Err(Error::BadRequest(
                    "this Flux model has no guidance input (schnell): leave the guidance out"
                        .into(),
                ));
            }
        }
        let vector = (vector + self.pooled.forward(&pooled.to_dtype(self.dtype)?)?)?;
        let vector = nn::silu(&vector)?;
        Ok(Modulation {
            double: self
                .double
                .iter()
                .map(|(image, text)| Ok((image.forward(&vector)?, text.forward(&vector)?)))
                .collect::<Result<_>>()?,
            single: self
                .single
                .iter()
                .map(|l| l.forward(&vector))
                .collect::<Result<_>>()?,
            last: self.last.as_ref().map(|l| l.forward(&vector)).transpose()?,
        })
    }

    /// Whether a guidance scale is an input.
    pub fn takes_guidance(&self) -> bool {
        self.guidance.is_some()
    }
}

/// Part `i` of (b, k·d), as (b, 1, d).
fn part(modulation: &Tensor, i: usize, d: usize) -> Result<Tensor> {
    Ok(modulation.narrow(D::Minus1, i * d, d)?.unsqueeze(1)?)
}

/// LayerNorm without weights, then ·(1 + scale) + shift with parts `shift`, `shift + 1` of
/// the modulation. x (b, t, d).
fn modulated_norm(x: &Tensor, modulation: &Tensor, shift: usize) -> Result<Tensor> {
    if learns_on_cpu(&[x, modulation]) {
        return Ok(fused::modulated_norm(x, modulation, shift)?);
    }
    let d = x.dim(D::Minus1)?;
    let (shift, scale) = (part(modulation, shift, d)?, part(modulation, shift + 1, d)?);
    let x = nn::layer_norm(x, None, None, 1e-6)?;
    Ok(x.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(&shift)?)
}

/// x + gate·y with part `gate` of the modulation.
fn gated_add(x: &Tensor, modulation: &Tensor, gate: usize, y: &Tensor) -> Result<Tensor> {
    if learns_on_cpu(&[x, modulation, y]) {
        return Ok(fused::gated_add(x, modulation, gate, y)?);
    }
    let gate = part(modulation, gate, x.dim(D::Minus1)?)?;
    in_range((x + y.broadcast_mul(&gate)?)?)
}

/// Half precision overflows in the late blocks of FLUX.1: held to its finite range.
fn in_range(x: Tensor) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F16 => x.clamp(-65504f32, 65504f32)?,
        _ => x,
    })
}

// -------------------------------------------------------------------------------- blocks

/// A linear layer whose frozen weight lies in memory the way the CPU's matrix product likes
/// it best: (in, out) contiguous, up to twice as fast for few rows. A variable is left alone,
/// since a copy of it would not follow its training.
pub(crate) fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get((outputs, inputs), "weight")?;
    let bias = vb.get(outputs, "bias")?;
    let weight = match weight.device().is_cpu() && !weight.track_op() {
        true => weight.t()?.contiguous()?.t()?,
        false => weight,
    };
    let linear = Linear::new(weight, Some(bias));
    match inputs.min(outputs) <= cpu_blocks::HIDDEN_MAX {
        true => linear.with_panels(),
        false => Ok(linear),
    }
}

/// Query, key and value (b, heads, t, head_dim) out of (b, t, 3·d), query and key normalised.
fn split_heads(
    qkv: &Tensor,
    heads: usize,
    norm_q: &Tensor,
    norm_k: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (b, t, d3) = qkv.dims3()?;
    let qkv = qkv.reshape((b, t, 3, heads, d3 / 3 / heads))?;
    let one = |i: usize| -> Result<Tensor> {
        Ok(qkv
            .narrow(2, i, 1)?
            .squeeze(2)?
            .transpose(1, 2)?
            .contiguous()?)
    };
    Ok((
        nn::rms_norm(&one(0)?, norm_q, 1e-6)?,
        nn::rms_norm(&one(1)?, norm_k, 1e-6)?,
        one(2)?,
    ))
}

/// Attention with rotated positions; (b, heads, t, head_dim) in, (b, t, d) out.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, rope: &Rope) -> Result<Tensor> {
    let (b, heads, t, head_dim) = q.dims4()?;
    let q = nn::rope(q, &rope.cos, &rope.sin, RopeLayout::Pairs)?;
    let k = nn::rope(k, &rope.cos, &rope.sin, RopeLayout::Pairs)?;
    let scale = 1.0 / (head_dim as f64).sqrt();
    Ok(nn::attention(&q, &k, v, scale, &Mask::None)?
        .transpose(1, 2)?
        .reshape((b, t, heads * head_dim))?)
}

/// One stream's half of a double block.
#[derive(Clone, Debug)]
struct Stream {
    qkv: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    proj: Linear,
    up: Linear,
    down: Linear,
}

impl Stream {
    fn new(d: usize, head_dim: usize, name: &str, vb: &VarBuilder) -> Result<Self> {
        let attention = vb.pp(format!("{name}_attn"));
        let mlp = vb.pp(format!("{name}_mlp"));
        Ok(Self {
            qkv: linear(d, 3 * d, attention.pp("qkv"))?,
            norm_q: attention.get(head_dim, "norm.query_norm.scale")?,
            norm_k: attention.get(head_dim, "norm.key_norm.scale")?,
            proj: linear(d, d, attention.pp("proj"))?,
            up: linear(d, 4 * d, mlp.pp("0"))?,
            down: linear(4 * d, d, mlp.pp("2"))?,
        })
    }

    fn in_eight_bits(self) -> Result<Self> {
        Ok(Self {
            qkv: self.qkv.in_eight_bits()?,
            proj: self.proj.in_eight_bits()?,
            up: self.up.in_eight_bits()?,
            down: self.down.in_eight_bits()?,
            ..self
        })
    }

    fn parts(&self) -> cpu_blocks::Stream<'_> {
        cpu_blocks::Stream {
            qkv: &self.qkv,
            norm_q: &self.norm_q,
            norm_k: &self.norm_k,
            proj: &self.proj,
            up: &self.up,
            down: &self.down,
        }
    }

    fn qkv(&self, x: &Tensor, modulation: &Tensor, heads: usize) -> Result<[Tensor; 3]> {
        let qkv = self.qkv.forward(&modulated_norm(x, modulation, 0)?)?;
        let (q, k, v) = split_heads(&qkv, heads, &self.norm_q, &self.norm_k)?;
        Ok([q, k, v])
    }

    /// The stream after its attention output and its MLP are added.
    fn finish(&self, x: &Tensor, modulation: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let x = gated_add(x, modulation, 2, &self.proj.forward(attended)?)?;
        let h = self.up.forward(&modulated_norm(&x, modulation, 3)?)?;
        gated_add(&x, modulation, 5, &self.down.forward(&nn::gelu_tanh(&h)?)?)
    }
}

/// A block with weights of its own for image and text, which attend together.
#[derive(Clone, Debug)]
pub struct DoubleBlock {
    image: Stream,
    text: Stream,
    heads: usize,
}

impl DoubleBlock {
    pub(crate) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (d, head_dim) = (config.hidden(), config.attention_head_dim);
        Ok(Self {
            image: Stream::new(d, head_dim, "img", vb)?,
            text: Stream::new(d, head_dim, "txt", vb)?,
            heads: config.num_attention_heads,
        })
    }

    /// Image (b, n, d) and text (b, t, d) after the block.
    fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        (image_mod, text_mod): &(Tensor, Tensor),
        rope: &Rope,
    ) -> Result<(Tensor, Tensor)> {
        let done = cpu_blocks::double(
            (image, image_mod, &self.image.parts()),
            (text, text_mod, &self.text.parts()),
            self.heads,
            (&rope.cos, &rope.sin),
        )?;
        if let Some(both) = done {
            return Ok(both);
        }
        #[cfg(feature = "cuda")]
        if let Some(both) = super::cuda_blocks::double(
            (image, image_mod, &self.image.parts()),
            (text, text_mod, &self.text.parts()),
            self.heads,
            (&rope.cos, &rope.sin),
        )? {
            return Ok(both);
        }
        let t = text.dim(1)?;
        let of_image = self.image.qkv(image, image_mod, self.heads)?;
        let of_text = self.text.qkv(text, text_mod, self.heads)?;
        let join = |i: usize| Tensor::cat(&[&of_text[i], &of_image[i]], 2);
        let attended = attend(&join(0)?, &join(1)?, &join(2)?, rope)?;
        let text_part = attended.narrow(1, 0, t)?;
        let image_part = attended.narrow(1, t, image.dim(1)?)?;
        Ok((
            self.image.finish(image, image_mod, &image_part)?,
            self.text.finish(text, text_mod, &text_part)?,
        ))
    }
}

/// A block over text and image as one sequence, attention and MLP side by side.
#[derive(Clone, Debug)]
pub struct SingleBlock {
    first: Linear,
    second: Linear,
    norm_q: Tensor,
    norm_k: Tensor,
    heads: usize,
}

impl SingleBlock {
    pub(crate) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (d, head_dim) = (config.hidden(), config.attention_head_dim);
        Ok(Self {
            first: linear(d, 7 * d, vb.pp("linear1"))?,
            second: linear(5 * d, d, vb.pp("linear2"))?,
            norm_q: vb.get(head_dim, "norm.query_norm.scale")?,
            norm_k: vb.get(head_dim, "norm.key_norm.scale")?,
            heads: config.num_attention_heads,
        })
    }

    /// (b, t + n, d) after the block.
    fn forward(&self, x: &Tensor, modulation: &Tensor, rope: &Rope) -> Result<Tensor> {
        let block = cpu_blocks::Single {
            first: &self.first,
            second: &self.second,
            norm_q: &self.norm_q,
            norm_k: &self.norm_k,
            heads: self.heads,
        };
        if let Some(x) = block.forward(x, modulation, (&rope.cos, &rope.sin))? {
            return Ok(x);
        }
        #[cfg(feature = "cuda")]
        if let Some(x) = block.on_cuda(x, modulation, (&rope.cos, &rope.sin))? {
            return Ok(x);
        }
        let d = x.dim(D::Minus1)?;
        let h = self.first.forward(&modulated_norm(x, modulation, 0)?)?; // (b, t + n, 7d)
        let qkv = h.narrow(2, 0, 3 * d)?;
        let (q, k, v) = split_heads(&qkv, self.heads, &self.norm_q, &self.norm_k)?;
        let attended = attend(&q, &k, &v, rope)?;
        let mlp = nn::gelu_tanh(&h.narrow(2, 3 * d, 4 * d)?.contiguous()?)?;
        let y = self.second.forward(&Tensor::cat(&[&attended, &mlp], 2)?)?;
        gated_add(x, modulation, 2, &y)
    }
}

/// Blocks held in memory, or read anew each time they are used.
pub enum Blocks<B> {
    /// All at hand.
    Resident(Vec<B>),
    /// `load(i)` reads block i of `count`; only one is in memory at a time.
    Streamed {
        /// How many there are.
        count: usize,
        /// Reads one.
        load: Box<dyn Fn(usize) -> Result<B> + Send + Sync>,
    },
}

impl<B> Blocks<B> {
    fn len(&self) -> usize {
        match self {
            Self::Resident(blocks) => blocks.len(),
            Self::Streamed { count, .. } => *count,
        }
    }

    fn with<R>(&self, i: usize, f: impl FnOnce(&B) -> Result<R>) -> Result<R> {
        match self {
            Self::Resident(blocks) => f(&blocks[i]),
            Self::Streamed { load, .. } => f(&load(i)?),
        }
    }
}

/// The double and single blocks, which transformer and ControlNet have in common.
pub struct Trunk {
    double: Blocks<DoubleBlock>,
    single: Blocks<SingleBlock>,
}

impl Trunk {
    pub(crate) fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let double =
            (0..config.num_layers).map(|i| DoubleBlock::new(config, &vb.pp("double_blocks").pp(i)));
        let single = (0..config.num_single_layers)
            .map(|i| SingleBlock::new(config, &vb.pp("single_blocks").pp(i)));
        Ok(Self {
            double: Blocks::Resident(double.collect::<Result<_>>()?),
            single: Blocks::Resident(single.collect::<Result<_>>()?),
        })
    }

    /// As [`Self::new`], the blocks' matrices kept in 8 bits ([`Linear::in_eight_bits`]).
    pub(crate) fn in_eight_bits(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let double = (0..config.num_layers).map(|i| {
            let block = DoubleBlock::new(config, &vb.pp("double_blocks").pp(i))?;
            Ok(DoubleBlock {
                image: block.image.in_eight_bits()?,
                text: block.text.in_eight_bits()?,
                heads: block.heads,
            })
        });
        let single = (0..config.num_single_layers).map(|i| {
            let block = SingleBlock::new(config, &vb.pp("single_blocks").pp(i))?;
            Ok(SingleBlock {
                first: block.first.in_eight_bits()?,
                second: block.second.in_eight_bits()?,
                ..block
            })
        });
        Ok(Self {
            double: Blocks::Resident(double.collect::<Result<_>>()?),
            single: Blocks::Resident(single.collect::<Result<_>>()?),
        })
    }

    /// Blocks are read from `vb` each time they are used and dropped after: the memory of one
    /// block instead of all, at the price of reading the weights once per evaluation.
    pub(crate) fn streamed(config: &Config, vb: &VarBuilder<'static>) -> Self {
        let (c1, c2) = (config.clone(), config.clone());
        let (v1, v2) = (vb.pp("double_blocks"), vb.pp("single_blocks"));
        Self {
            double: Blocks::Streamed {
                count: config.num_layers,
                load: Box::new(move |i| DoubleBlock::new(&c1, &v1.pp(i))),
            },
            single: Blocks::Streamed {
                count: config.num_single_layers,
                load: Box::new(move |i| SingleBlock::new(&c2, &v2.pp(i))),
            },
        }
    }

    /// Runs all blocks over image (b, n, d) and text (b, t, d); the image tokens after them.
    /// `after(index, of_single_blocks, image)` sees the image tokens after each block and
    /// may change them.
    pub(crate) fn forward(
        &self,
        image: Tensor,
        text: Tensor,
        modulation: &Modulation,
        rope: &Rope,
        mut after: impl FnMut(Block, Tensor) -> Result<After>,
    ) -> Result<Tensor> {
        let (mut image, mut text) = (image, text);
        let (t, n) = (text.dim(1)?, image.dim(1)?);
        for i in 0..self.double.len() {
            let (x, y) = self
                .double
                .with(i, |b| b.forward(&image, &text, &modulation.double[i], rope))?;
            text = y;
            image = match after(Block::Double(i), x)? {
                After::Changed(x) | After::Same(x) => x,
                After::Done(x) => return Ok(x),
            };
        }
        if self.single.len() == 0 {
            return Ok(image);
        }
        let mut both = Tensor::cat(&[&text, &image], 1)?;
        for i in 0..self.single.len() {
            both = self
                .single
                .with(i, |b| b.forward(&both, &modulation.single[i], rope))?;
            both = match after(Block::Single(i), both.narrow(1, t, n)?)? {
                After::Same(_) => both,
                After::Changed(image) => Tensor::cat(&[&both.narrow(1, 0, t)?, &image], 1)?,
                After::Done(x) => return Ok(x),
            };
        }
        Ok(both.narrow(1, t, n)?)
    }
}

/// Which block has just run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Double block i.
    Double(usize),
    /// Single block i.
    Single(usize),
}

/// What becomes of the image tokens after a block.
pub(crate) enum After {
    /// They stay as they are.
    Same(Tensor),
    /// These take their place.
    Changed(Tensor),
    /// These are the result: the remaining blocks are skipped.
    Done(Tensor),
}

// ----------------------------------------------------------------------------- residuals

/// How a ControlNet's few residuals are shared among the transformer's many blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spread {
    /// Neighbouring blocks share one: block i of n takes residual i / ceil(n / m) (diffusers,
    /// InstantX, Shakker).
    #[default]
    Interval,
    /// They take turns: block i takes residual i mod m (XLabs; double blocks only).
    Repeat,
}

/// What a ControlNet adds to the image tokens after each block; each tensor (b, n, d).
#[derive(Clone, Debug, Default)]
pub struct Residuals {
    /// For the double blocks; may be empty.
    pub double: Vec<Tensor>,
    /// For the single blocks; may be empty.
    pub single: Vec<Tensor>,
    /// How `double` is shared among the blocks.
    pub spread: Spread,
}

impl Residuals {
    /// Which of `m` residuals block `i` of `n` takes; `None` if there is none for it.
    pub fn index(spread: Spread, i: usize, n: usize, m: usize) -> Option<usize> {
        match (m, spread) {
            (0, _) => None,
            (m, Spread::Repeat) => Some(i % m),
            (m, Spread::Interval) => Some(i / n.div_ceil(m)),
        }
    }

    fn of(&self, block: Block, config: &Config) -> Option<&Tensor> {
        match block {
            Block::Double(i) => {
                let m = self.double.len();
                self.double
                    .get(Self::index(self.spread, i, config.num_layers, m)?)
            }
            Block::Single(i) => {
                let (n, m) = (config.num_single_layers, self.single.len());
                self.single.get(Self::index(Spread::Interval, i, n, m)?)
            }
        }
    }

    /// The sum of several ControlNets' residuals, which must have equal counts and spread.
    pub fn sum(all: Vec<Self>) -> Result<Option<Self>> {
        let mut all = all.into_iter();
        let Some(mut total) = all.next() else {
            return Ok(None);
        };
        for one in all {
            let (double, single) = (total.double.len(), total.single.len());
            if one.spread != total.spread
                || one.double.len() != double
                || one.single.len() != single
            {
                return Err(Error::BadRequest(format!(
                    "ControlNets of different depth cannot be summed: {double}+{single} and {}+{} \
                     residuals; use one ControlNet for all control images",
                    one.double.len(),
                    one.single.len()
                )));
            }
            for (sum, x) in total.double.iter_mut().zip(&one.double) {
                *sum = (&*sum + x)?;
            }
            for (sum, x) in total.single.iter_mut().zip(&one.single) {
                *sum = (&*sum + x)?;
            }
        }
        Ok(Some(total))
    }

    /// All residuals times `scale`.
    pub fn scaled(self, scale: f64) -> Result<Self> {
        let scaled = |all: Vec<Tensor>| -> Result<Vec<Tensor>> {
            all.into_iter().map(|x| Ok((x * scale)?)).collect()
        };
        Ok(Self {
            double: scaled(self.double)?,
            single: scaled(self.single)?,
            spread: self.spread,
        })
    }

    /// Refuses residuals that are more than the blocks or of another shape than `image`.
    fn check(&self, config: &Config, image: &Tensor) -> Result<()> {
        let limits = [
            (self.double.len(), config.num_layers, "double"),
            (self.single.len(), config.num_single_layers, "single"),
        ];
        for (m, n, what) in limits {
            if m > n {
                return Err(Error::BadRequest(format!(
                    "the ControlNet has {m} {what} residuals for a transformer of {n} {what} blocks"
                )));
            }
        }
        match self
            .double
            .iter()
            .chain(&self.single)
            .find(|x| x.dims() != image.dims())
        {
            Some(x) => Err(Error::BadRequest(format!(
                "the ControlNet's residuals are {:?}, the transformer's image tokens {:?}: they \
                 must have the same batch, tokens and hidden size",
                x.dims(),
                image.dims()
            ))),
            None => Ok(()),
        }
    }
}

/// Skips all blocks after the first where little has changed since the step before
/// ("first-block cache").
///
/// The change is the largest of: the relative L1 change of what the first block added, and
/// that of every ControlNet residual. (A cache that watched only the first block would let
/// the control vanish.) One cache per conditioning: prompt and negative prompt each need
/// their own. `Rest` is what the blocks after the first came to: of a transformer what they
/// added, of a ControlNet all residuals.
#[derive(Debug)]
pub struct Cache<Rest = Tensor> {
    threshold: f64,
    key: Option<Vec<Tensor>>,
    rest: Option<Rest>,
    skipped: usize,
}

impl<Rest> Cache<Rest> {
    /// Skips below this relative change; 0.05 to 0.12 is usual, 0 never skips.
    pub fn new(threshold: f64) -> Self {
        Self {
            threshold,
            key: None,
            rest: None,
            skipped: 0,
        }
    }

    /// Whether it ever skips.
    pub(super) fn acts(&self) -> bool {
        self.threshold > 0.0
    }

    /// What the later blocks came to when `key` was last about the same, if it was; else it is
    /// kept as the new key, and [`Self::keep`] is to follow.
    pub(super) fn look_up(&mut self, key: Vec<Tensor>) -> Result<Option<&Rest>> {
        if self.is_close(&key)? {
            self.skipped += 1;
            return Ok(self.rest.as_ref());
        }
        self.key = Some(key);
        self.rest = None;
        Ok(None)
    }

    /// What the later blocks came to.
    pub(super) fn keep(&mut self, rest: Rest) {
        self.rest = Some(rest);
    }

    /// How many evaluations were cut short.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    fn is_close(&self, key: &[Tensor]) -> Result<bool> {
        let Some(old) = &self.key else {
            return Ok(false);
        };
        if old.len() != key.len() {
            return Ok(false);
        }
        for (old, new) in old.iter().zip(key) {
            if old.dims() != new.dims() {
                return Ok(false);
            }
            let mean = |x: Tensor| -> Result<f64> {
                Ok(f64::from(
                    x.abs()?
                        .to_dtype(DType::F32)?
                        .mean_all()?
                        .to_scalar::<f32>()?,
                ))
            };
            // NaN compares as not close.
            let close = mean((old - new)?)? <= self.threshold * mean(old.clone())?;
            if !close {
                return Ok(false);
            }
        }
        Ok(self.rest.is_some())
    }
}

// --------------------------------------------------------------------------- transformer

/// The whole network.
pub struct FluxTransformer {
    config: Config,
    image_in: Linear,
    text_in: Linear,
    modulator: RwLock<Option<Arc<Modulator>>>,
    trunk: Trunk,
    last: Linear,
    dtype: DType,
}

impl FluxTransformer {
    /// From weights with Black Forest Labs' names; see [`super::names`] for other layouts.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let trunk = Trunk::new(config, &vb)?;
        Self::with_trunk(config, trunk, &vb)
    }

    /// As [`Self::new`], but each block is read from `vb` when it is used and dropped after.
    pub fn streamed(config: &Config, vb: VarBuilder<'static>) -> Result<Self> {
        Self::with_trunk(config, Trunk::streamed(config, &vb), &vb)
    }

    /// As [`Self::new`], but the blocks' matrices are kept in 8 bits: half the memory, pictures
    /// nearly the same.
    pub fn in_eight_bits(config: &Config, vb: VarBuilder) -> Result<Self> {
        Self::with_trunk(config, Trunk::in_eight_bits(config, &vb)?, &vb)
    }

    fn with_trunk(config: &Config, trunk: Trunk, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let d = config.hidden();
        Ok(Self {
            image_in: linear(config.in_channels, d, vb.pp("img_in"))?,
            text_in: linear(config.joint_attention_dim, d, vb.pp("txt_in"))?,
            modulator: RwLock::new(Some(Arc::new(Modulator::new(config, true, vb)?))),
            trunk,
            last: linear(d, config.out(), vb.pp("final_layer.linear"))?,
            config: config.clone(),
            dtype: vb.dtype(),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The dtype it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The velocity ε - x_0 (or what else [`Config::prediction`] says), (b, n, out_channels), in
    /// the dtype of the weights.
    pub fn forward(&self, inputs: &Inputs) -> Result<Tensor> {
        let modulation = self
            .modulator()?
            .at(inputs.timestep, inputs.guidance, inputs.pooled)?;
        let device = inputs.latents.device();
        let rope = Rope::new(&self.config, inputs.text_ids, inputs.ids, device)?;
        let text = self.embed_text(inputs.text)?;
        self.forward_modulated(
            inputs.latents,
            &text,
            &modulation,
            &rope,
            inputs.residuals,
            None,
        )
    }

    /// The part that makes modulations.
    ///
    /// # Errors
    /// Once it has been dropped.
    pub fn modulator(&self) -> Result<Arc<Modulator>> {
        held(&self.modulator)
    }

    /// Frees the modulation weights, once all steps' modulation has been computed: a quarter
    /// of FLUX.1-dev.
    pub fn drop_modulator(&self) {
        drop_held(&self.modulator);
    }

    /// Text token states (b, t, joint_attention_dim) to (b, t, d); the same at every step.
    pub fn embed_text(&self, text: &Tensor) -> Result<Tensor> {
        self.text_in.forward(&text.to_dtype(self.dtype)?)
    }

    /// As [`Self::forward`], with everything that is known before the step computed already.
    /// `text` comes from [`Self::embed_text`].
    pub fn forward_modulated(
        &self,
        latents: &Tensor,
        text: &Tensor,
        modulation: &Modulation,
        rope: &Rope,
        residuals: Option<&Residuals>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let image = self.image_in.forward(&latents.to_dtype(self.dtype)?)?;
        if let Some(r) = residuals {
            r.check(&self.config, &image)?;
        }
        let image = self.blocks(image, text, modulation, rope, residuals, cache)?;
        let last = modulation.last.as_ref().ok_or_else(|| {
            Error::BadRequest("this modulation belongs to a ControlNet, not a transformer".into())
        })?;
        // BFL's final layer: first shift, then scale. diffusers has them the other way round.
        self.last.forward(&modulated_norm(&image, last, 0)?)
    }

    fn blocks(
        &self,
        image: Tensor,
        text: &Tensor,
        modulation: &Modulation,
        rope: &Rope,
        residuals: Option<&Residuals>,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let add = |block: Block, x: Tensor| -> Result<After> {
            Ok(match residuals.and_then(|r| r.of(block, &self.config)) {
                Some(r) => After::Changed((x + r.to_dtype(self.dtype)?)?),
                None => After::Same(x),
            })
        };
        let Some(cache) = cache.filter(|c| c.acts()) else {
            return self
                .trunk
                .forward(image, text.clone(), modulation, rope, add);
        };
        let before = image.clone();
        let mut after_first = None;
        let out = self
            .trunk
            .forward(image, text.clone(), modulation, rope, |block, x| {
                if block != Block::Double(0) {
                    return add(block, x);
                }
                let mut key = vec![(&x - &before)?];
                if let Some(r) = residuals {
                    key.extend(r.double.iter().chain(&r.single).cloned());
                }
                let x = add(block, x)?;
                if let After::Same(first) | After::Changed(first) = &x {
                    if let Some(rest) = cache.look_up(key)? {
                        return Ok(After::Done((first + rest)?));
                    }
                    after_first = Some(first.clone());
                }
                Ok(x)
            })?;
        if let Some(first) = after_first {
            cache.keep((&out - first)?);
        }
        Ok(out)
    }
}
