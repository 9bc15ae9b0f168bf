//! ControlNets for Flux: a copy of a few of its blocks that sees a control picture and says
//! what the transformer's image tokens should have added.
//!
//! Three layouts, told apart by the config: InstantX' Union (a mode token in front of the
//! text says what the control picture is), Shakker's Union-Pro-2.0 (no mode), and XLabs'
//! (the control picture goes through convolutions instead of the autoencoder; its residuals
//! take turns).
//!
//! Reference: diffusers 0.42 `controlnet_flux.py`.

use super::transformer::{
    After, Block, Cache, Config as TrunkConfig, Inputs, Modulation, Modulator, Residuals, Rope,
    Spread, Trunk, drop_held, held, linear, pack,
};
use crate::conv::Conv2d;
use crate::nn::Linear;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Conv2dConfig, VarBuilder};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, RwLock};

/// The shape of a ControlNet, with the field names of diffusers' `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Its blocks: as the transformer's, only fewer.
    #[serde(flatten)]
    pub trunk: TrunkConfig,
    /// How many modes it knows; `None`: no mode token.
    #[serde(default)]
    pub num_mode: Option<usize>,
    /// Channels of the convolved control picture; `None`: the control is packed latents.
    #[serde(default)]
    pub conditioning_embedding_channels: Option<usize>,
}

impl Config {
    /// InstantX/FLUX.1-dev-Controlnet-Union: 3.30 B parameters.
    pub fn union() -> Self {
        Self {
            trunk: TrunkConfig {
                num_layers: 5,
                num_single_layers: 10,
                ..TrunkConfig::dev()
            },
            num_mode: Some(10),
            conditioning_embedding_channels: None,
        }
    }

    /// Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0: 2.14 B parameters.
    pub fn union_pro_2() -> Self {
        Self {
            trunk: TrunkConfig {
                num_layers: 6,
                num_single_layers: 0,
                ..TrunkConfig::dev()
            },
            num_mode: None,
            conditioning_embedding_channels: None,
        }
    }

    /// XLabs' ControlNets.
    pub fn xlabs() -> Self {
        Self {
            trunk: TrunkConfig {
                num_layers: 2,
                num_single_layers: 0,
                ..TrunkConfig::dev()
            },
            num_mode: None,
            conditioning_embedding_channels: Some(16),
        }
    }

    /// One double and two single blocks of a small transformer, with the Union's ten modes.
    pub fn small(transformer: &TrunkConfig) -> Self {
        Self {
            trunk: TrunkConfig {
                num_layers: 1,
                num_single_layers: 2,
                ..transformer.clone()
            },
            num_mode: Some(10),
            conditioning_embedding_channels: None,
        }
    }

    /// Whether the control is a picture (XLabs) rather than packed latents.
    pub fn takes_picture(&self) -> bool {
        self.conditioning_embedding_channels.is_some()
    }
}

/// What a Union ControlNet's control picture is. The numbers are InstantX'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Edges.
    Canny = 0,
    /// The picture itself, to be refined.
    Tile = 1,
    /// Depth.
    Depth = 2,
    /// The picture blurred.
    Blur = 3,
    /// Body poses.
    Pose = 4,
    /// The picture without colour.
    Gray = 5,
    /// The picture in low quality.
    LowQuality = 6,
}

/// What one evaluation takes beyond the transformer's own inputs.
pub struct Control<'a> {
    /// Packed latents (b, n, in_channels), or for XLabs' layout the picture
    /// (b, 3, 16·rows, 16·columns) in [-1, 1].
    pub condition: &'a Tensor,
    /// The mode of each item, for a Union.
    pub modes: Option<&'a [u32]>,
    /// Everything it returns is multiplied by this.
    pub scale: f64,
}

/// The network.
pub struct ControlNet {
    config: Config,
    image_in: Linear,
    text_in: Linear,
    control_in: Linear,
    hint: Option<Hint>,
    mode: Option<Tensor>,
    modulator: RwLock<Option<Arc<Modulator>>>,
    trunk: Trunk,
    double_out: Vec<Linear>,
    single_out: Vec<Linear>,
    dtype: DType,
}

impl ControlNet {
    /// From weights with our names; see [`super::names`] for diffusers' and XLabs'.
    pub fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let trunk = Trunk::new(&config.trunk, &vb)?;
        Self::with_trunk(config, trunk, &vb)
    }

    /// As [`Self::new`], but each block is read from `vb` when it is used and dropped after.
    pub fn streamed(config: &Config, vb: VarBuilder<'static>) -> Result<Self> {
        Self::with_trunk(config, Trunk::streamed(&config.trunk, &vb), &vb)
    }

    /// As [`Self::new`], but the blocks' matrices are kept in 8 bits.
    pub fn in_eight_bits(config: &Config, vb: VarBuilder) -> Result<Self> {
        Self::with_trunk(config, Trunk::in_eight_bits(&config.trunk, &vb)?, &vb)
    }

    fn with_trunk(config: &Config, trunk: Trunk, vb: &VarBuilder) -> Result<Self> {
        let shape = &config.trunk;
        shape.check()?;
        let d = shape.hidden();
        let outs = |name: &str, n: usize| -> Result<Vec<Linear>> {
            (0..n).map(|i| linear(d, d, vb.pp(name).pp(i))).collect()
        };
        Ok(Self {
            image_in: linear(shape.in_channels, d, vb.pp("img_in"))?,
            text_in: linear(shape.joint_attention_dim, d, vb.pp("txt_in"))?,
            control_in: linear(shape.in_channels, d, vb.pp("controlnet_x_embedder"))?,
            hint: config
                .conditioning_embedding_channels
                .map(|c| Hint::new(c, vb.pp("input_hint_block")))
                .transpose()?,
            mode: config
                .num_mode
                .map(|m| vb.get((m, d), "controlnet_mode_embedder.weight"))
                .transpose()?,
            modulator: RwLock::new(Some(Arc::new(Modulator::new(shape, false, vb)?))),
            trunk,
            double_out: outs("controlnet_blocks", shape.num_layers)?,
            single_out: outs("controlnet_single_blocks", shape.num_single_layers)?,
            config: config.clone(),
            dtype: vb.dtype(),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The residuals for a transformer at the same inputs (`inputs.residuals` is not looked
    /// at; `inputs.guidance` is used if this network takes one, whatever the transformer).
    pub fn forward(&self, inputs: &Inputs, control: &Control) -> Result<Residuals> {
        let modulator = self.modulator()?;
        let guidance = inputs.guidance.filter(|_| modulator.takes_guidance());
        let modulation = modulator.at(inputs.timestep, guidance, inputs.pooled)?;
        let device = inputs.latents.device();
        let rope = Rope::new(&self.config.trunk, inputs.text_ids, inputs.ids, device)?;
        let prepared = self.prepare(inputs.text, control, &rope)?;
        self.forward_prepared(inputs.latents, &prepared, &modulation, None)
    }

    /// The part that makes modulations.
    ///
    /// # Errors
    /// Once it has been dropped.
    pub fn modulator(&self) -> Result<Arc<Modulator>> {
        held(&self.modulator)
    }

    /// Frees the modulation weights, once all steps' modulation has been computed.
    pub fn drop_modulator(&self) {
        drop_held(&self.modulator);
    }

    /// What does not change from step to step.
    pub fn prepare(&self, text: &Tensor, control: &Control, rope: &Rope) -> Result<Prepared> {
        let (mut text, mut rope) = (
            self.text_in.forward(&text.to_dtype(self.dtype)?)?,
            rope.clone(),
        );
        match (&self.mode, control.modes) {
            (Some(table), Some(modes)) => {
                text = Tensor::cat(&[&mode_tokens(table, modes, text.dim(0)?)?, &text], 1)?;
                rope = rope.with_leading(1)?;
            }
            (None, None) => {}
            (Some(_), None) => {
                return Err(Error::BadRequest(
                    "a Union ControlNet needs to know what the control image is: give a mode \
                     (canny is 0)"
                        .into(),
                ));
            }
            (None, Some(_)) => {
                return Err(Error::BadRequest(
                    "this ControlNet has no modes: leave the mode out".into(),
                ));
            }
        }
        let condition = control.condition.to_dtype(self.dtype)?;
        let condition = match &self.hint {
            Some(hint) => pack(&hint.forward(&condition)?)?,
            None => condition,
        };
        Ok(Prepared {
            text,
            rope,
            condition: self.control_in.forward(&condition)?,
            scale: control.scale,
        })
    }

    /// As [`Self::forward`], with everything that is known before the step computed already. With a
    /// cache, the residuals of a step before where what the first block adds has hardly changed.
    pub fn forward_prepared(
        &self,
        latents: &Tensor,
        prepared: &Prepared,
        modulation: &Modulation,
        cache: Option<&mut Cache<Residuals>>,
    ) -> Result<Residuals> {
        let image = self.image_in.forward(&latents.to_dtype(self.dtype)?)?;
        if prepared.condition.dims() != image.dims() {
            return Err(Error::BadRequest(format!(
                "the control image makes {:?} tokens, the picture {:?}: they must have the same \
                 size and batch",
                prepared.condition.dims(),
                image.dims()
            )));
        }
        let image = (image + &prepared.condition)?;
        let (text, rope) = (prepared.text.clone(), &prepared.rope);
        let mut out = Residuals {
            double: Vec::new(),
            single: Vec::new(),
            spread: match self.config.takes_picture() {
                true => Spread::Repeat,
                false => Spread::Interval,
            },
        };
        let mut cache = cache.filter(|c| c.acts());
        let (before, mut kept) = (image.clone(), None);
        self.trunk
            .forward(image, text, modulation, rope, |block, x| {
                // The first block has not added anything yet.
                let first = out.double.is_empty() && out.single.is_empty();
                if let Some(cache) = cache.as_mut().filter(|_| first)
                    && let Some(residuals) = cache.look_up(vec![(&x - &before)?])?
                {
                    kept = Some(residuals.clone());
                    return Ok(After::Done(x));
                }
                match block {
                    Block::Double(i) => out.double.push(self.double_out[i].forward(&x)?),
                    Block::Single(i) => out.single.push(self.single_out[i].forward(&x)?),
                }
                Ok(After::Same(x))
            })?;
        if let Some(kept) = kept {
            return Ok(kept);
        }
        let out = match prepared.scale {
            1.0 => out,
            scale => out.scaled(scale)?,
        };
        if let Some(cache) = cache {
            cache.keep(out.clone());
        }
        Ok(out)
    }
}

/// What [`ControlNet::prepare`] computed once for all steps.
#[derive(Clone, Debug)]
pub struct Prepared {
    text: Tensor,
    rope: Rope,
    condition: Tensor,
    scale: f64,
}

impl Prepared {
    /// The same at another strength.
    pub fn at_scale(&self, scale: f64) -> Self {
        Self {
            scale,
            ..self.clone()
        }
    }
}

/// One mode token for each item: (b, 1, d). A single mode serves the whole batch.
fn mode_tokens(table: &Tensor, modes: &[u32], b: usize) -> Result<Tensor> {
    let (count, d) = table.dims2()?;
    if let Some(bad) = modes.iter().find(|m| **m as usize >= count) {
        return Err(Error::BadRequest(format!(
            "control mode {bad}: this ControlNet has modes 0 to {}",
            count.saturating_sub(1)
        )));
    }
    let modes = match modes {
        [one] => vec![*one; b],
        many if many.len() == b => many.to_vec(),
        many => {
            return Err(Error::BadRequest(format!(
                "{} control modes for a batch of {b}: give one, or one for each",
                many.len()
            )));
        }
    };
    let ids = Tensor::from_vec(modes, b, &Device::Cpu)?.to_device(table.device())?;
    Ok(table.index_select(&ids, 0)?.reshape((b, 1, d))?)
}

/// XLabs' eight convolutions from a picture to an eighth of its size.
struct Hint {
    convs: Vec<Conv2d>,
}

impl Hint {
    fn new(channels: usize, vb: VarBuilder) -> Result<Self> {
        let conv = |name: &str, inputs, outputs, stride| -> Result<Conv2d> {
            let config = Conv2dConfig {
                padding: 1,
                stride,
                ..Default::default()
            };
            let vb = vb.pp(name);
            let weight = vb.get((outputs, inputs, 3, 3), "weight")?;
            Ok(Conv2d::new(weight, Some(vb.get(outputs, "bias")?), config))
        };
        let mut convs = vec![conv("conv_in", 3, 16, 1)?];
        for i in 0..6 {
            convs.push(conv(&format!("blocks.{i}"), 16, 16, 1 + i % 2)?);
        }
        convs.push(conv("conv_out", 16, channels, 1)?);
        Ok(Self { convs })
    }

    fn forward(&self, picture: &Tensor) -> Result<Tensor> {
        let mut x = picture.clone();
        for (i, conv) in self.convs.iter().enumerate() {
            if i > 0 {
                x = x.silu()?;
            }
            x = conv.forward(&x)?;
        }
        Ok(x)
    }
}
