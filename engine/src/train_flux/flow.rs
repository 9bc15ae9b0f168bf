//! Training transformer and ControlNet together, as a rectified flow.
//!
//! At time t the network sees x_t = (1-t)·x_0 + t·ε and estimates ε - x_0, or x_0. Times are
//! logit-normal and shifted as sampling shifts them (arXiv 2403.03206, Sec. 3.1). The text is
//! left out at times, so that sampling can do without it (classifier-free guidance); so is
//! the control, so that the transformer stands alone.
//!
//! FLUX.1's ControlNets were trained against a finished transformer. With hours instead of
//! months it pays to train both at once: the transformer need not learn to make layouts from
//! nothing before it is of use.

use super::pairs::Pairs;
use super::{Report, Rhythm, Run, fresh, latest};
use crate::flux::controlnet::{self, Control, ControlNet, Mode};
use crate::flux::init;
use crate::flux::names;
use crate::flux::transformer::{
    self, FluxTransformer, Inputs, Prediction, Residuals, image_ids, pack, text_ids,
};
use crate::flux::vae::Vae;
use crate::optim::{AdamW, AdamWOptions, Group, Schedule as RateSchedule};
use crate::params::Params;
use crate::sampler::{
    Conditions, ControlInput, Prompt, Schedule, ScheduleConfig, Watch, img2img, packed_noise,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The transformer.
    pub config: transformer::Config,
    /// Steps in all.
    pub steps: usize,
    /// The last steps, over which the learning rate falls to nothing.
    pub cooldown: usize,
    /// Pairs a step.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of warm-up.
    pub warmup: usize,
    /// The factor that times are shifted by; 1 leaves them as they are.
    pub shift: f64,
    /// How often the text is left out.
    pub drop_text: f32,
    /// How often the control is left out.
    pub drop_control: f32,
    /// How often the control, where there is one, is the source itself (mode tile) rather
    /// than its edges (mode canny).
    pub tile: f32,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// What the shipped model was trained with.
    pub fn shipped() -> Self {
        Self {
            config: config(),
            steps: 11_000,
            cooldown: 3_000,
            batch: 16,
            lr: 1.5e-3,
            warmup: 200,
            shift: 2.5,
            drop_text: 0.1,
            drop_control: 0.03,
            tile: 0.8,
            seed: 2,
        }
    }
}

/// The shipped transformer: 64 tokens of 96 channels for 128 px.
pub fn config() -> transformer::Config {
    transformer::Config {
        in_channels: 96,
        num_layers: 2,
        num_single_layers: 3,
        num_attention_heads: 3,
        guidance_embeds: false,
        prediction: Prediction::Sample,
        ..transformer::Config::tiny()
    }
}

/// The shipped ControlNet: one double and one single block, the Union's ten modes.
pub fn control_config(config: &transformer::Config) -> controlnet::Config {
    let mut small = controlnet::Config::small(config);
    small.trunk.num_single_layers = 1;
    // Residuals estimate nothing by themselves.
    small.trunk.prediction = Prediction::Velocity;
    small
}

/// Transformer and ControlNet over one set of parameters.
pub struct Networks {
    /// Named `transformer.…` and `controlnet.…`.
    pub params: Params,
    flux: FluxTransformer,
    control: ControlNet,
}

impl Networks {
    /// Fresh networks.
    pub fn new(config: &transformer::Config, seed: u64) -> Result<Self> {
        let params = Params::new(seed, Device::Cpu);
        let small = control_config(config);
        fresh(
            &params,
            "transformer.",
            &names::transformer_shapes(config),
            seed,
        )?;
        fresh(
            &params,
            "controlnet.",
            &names::controlnet_shapes(&small),
            seed + 1,
        )?;
        begin_as_copy(&params, config)?;
        let vb = params.builder(DType::F32);
        Ok(Self {
            flux: FluxTransformer::new(config, vb.pp("transformer"))?,
            control: ControlNet::new(&small, vb.pp("controlnet"))?,
            params,
        })
    }
}

/// Weights with which the two networks, all blocks still silent, estimate in mode tile that
/// the result is the source: an edit then is what remains to be learnt. From random weights
/// the network needs ten thousand steps to copy half as well.
///
/// The first hidden channels are for the control's latents, the rest for the noisy ones and a
/// large constant, so that the last norm divides every token by nearly the same number. Where
/// the hidden size has no room for that, the weights stay random.
fn begin_as_copy(params: &Params, config: &transformer::Config) -> Result<()> {
    /// What a latent becomes in a hidden channel, and the rest's constant.
    const SCALE: f32 = 0.5;
    const REST: f32 = 2.0;
    let (d, c) = (config.hidden(), config.in_channels);
    if d < 2 * c || config.out() != c {
        return Ok(());
    }
    let diagonal = |rows: usize, columns: usize, first: usize, value: f32| -> Result<Tensor> {
        let mut all = vec![0f32; rows * columns];
        (0..c).for_each(|i| all[(first + i) * columns + i] = value);
        Ok(Tensor::from_vec(all, (rows, columns), &Device::Cpu)?)
    };
    let rest: Vec<f32> = (0..d)
        .map(|i| match i {
            i if i < c => 0.0,
            i if i % 2 == 0 => REST,
            _ => -REST,
        })
        .collect();
    let rest = Tensor::from_vec(rest, d, &Device::Cpu)?;
    // The residual is added after every double block.
    let share = SCALE / config.num_layers as f32;
    // Two kinds of latents of variance 1 and the rest: what the last norm divides by.
    let energy = 2.0 * c as f32 * SCALE * SCALE + (d - c) as f32 * REST * REST;
    let size = (energy / d as f32).sqrt();
    for (name, value) in [
        ("transformer.img_in.weight", diagonal(d, c, c, SCALE)?),
        ("transformer.img_in.bias", rest.clone()),
        ("controlnet.img_in.weight", diagonal(d, c, c, SCALE)?),
        ("controlnet.img_in.bias", rest),
        (
            "controlnet.controlnet_x_embedder.weight",
            diagonal(d, c, 0, 1.0)?,
        ),
        (
            "controlnet.controlnet_blocks.0.weight",
            diagonal(d, d, 0, share)?,
        ),
        (
            "transformer.final_layer.linear.weight",
            diagonal(c, d, 0, size / SCALE)?,
        ),
    ] {
        match params.get(name) {
            Some(var) => var.set(&value)?,
            None => return Err(Error::BadRequest(format!("there is no weight {name}"))),
        }
    }
    Ok(())
}

/// Trains, or goes on training, until the steps are done or `report` says stop.
pub fn run(options: &Options, pairs: &Pairs, rhythm: &Rhythm, report: Report) -> Result<()> {
    if pairs.is_empty() {
        return Err(Error::BadRequest(
            "there are no pairs to train on: prepare some".into(),
        ));
    }
    let networks = Networks::new(&options.config, options.seed)?;
    let group = Group {
        vars: networks.params.vars(),
        lr: options.lr,
        weight_decay: 0.01,
    };
    let settings = AdamWOptions {
        beta2: 0.99,
        ema: Some(0.998),
        ..AdamWOptions::default()
    };
    let mut adam = AdamW::new(vec![group], settings)?;
    let mut run = Run::open("flow", rhythm, options.steps, &networks.params, &mut adam)?;
    let schedule = RateSchedule::Trapezoid {
        warmup: options.warmup,
        total: options.steps,
        cooldown: options.cooldown,
    };
    while run.state.step < options.steps {
        let step = run.state.step;
        let loss = loss(&networks, options, pairs, step as u64)?;
        let gradients = loss.backward()?;
        adam.accumulate(&gradients, 1.0)?;
        let norm = adam.step(schedule.factor(step))?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        if !run.after_step(loss, norm, &networks.params, &adam, report)? {
            break;
        }
    }
    Ok(())
}

/// What is random about one member of a batch.
struct Draw {
    pair: u32,
    time: f32,
    text: bool,
    control: bool,
    tile: bool,
}

fn draw(options: &Options, pairs: usize, random: &mut Philox) -> Draw {
    let odds = f64::from(random.normal()).exp() * options.shift;
    Draw {
        pair: random.below(pairs as u32),
        time: (odds / (1.0 + odds)) as f32,
        text: random.uniform() >= options.drop_text,
        control: random.uniform() >= options.drop_control,
        tile: random.uniform() < options.tile,
    }
}

/// The loss of a step: the mean squared error of the velocity, or the weighted one of the
/// result, whichever of the two the network estimates.
fn loss(networks: &Networks, options: &Options, pairs: &Pairs, step: u64) -> Result<Tensor> {
    let mut random = Philox::new(options.seed, step);
    let draws: Vec<Draw> = (0..options.batch)
        .map(|_| draw(options, pairs.len(), &mut random))
        .collect();
    let b = draws.len();
    let device = Device::Cpu;
    let rows = Tensor::from_vec(draws.iter().map(|d| d.pair).collect::<Vec<_>>(), b, &device)?;
    let of =
        |all: &Tensor| -> Result<Tensor> { Ok(all.index_select(&rows, 0)?.to_dtype(DType::F32)?) };
    let choose = |yes: &dyn Fn(&Draw) -> bool, rank: usize| -> Result<Tensor> {
        let mask: Vec<f32> = draws.iter().map(|d| f32::from(yes(d))).collect();
        let mut shape = vec![1; rank];
        shape[0] = b;
        Ok(Tensor::from_vec(mask, shape, &device)?)
    };
    let blend = |a: &Tensor, b: &Tensor, mask: &Tensor| -> Result<Tensor> {
        let rest = (1.0 - mask)?;
        Ok((a.broadcast_mul(mask)? + b.broadcast_mul(&rest)?)?)
    };
    let clean = pack(&of(&pairs.target)?)?; // (b, n, 4c)
    let tile = choose(&|d| d.tile, 4)?;
    let condition = pack(&blend(&of(&pairs.source)?, &of(&pairs.control)?, &tile)?)?;
    let nothing = |none: &Tensor, like: &Tensor| -> Result<Tensor> {
        Ok(none
            .to_dtype(DType::F32)?
            .broadcast_as(like.shape())?
            .contiguous()?)
    };
    let (text, pooled) = (of(&pairs.text)?, of(&pairs.pooled)?);
    let text = blend(
        &text,
        &nothing(&pairs.no_text, &text)?,
        &choose(&|d| d.text, 3)?,
    )?;
    let pooled = blend(
        &pooled,
        &nothing(&pairs.no_pooled, &pooled)?,
        &choose(&|d| d.text, 2)?,
    )?;
    let noise = Tensor::from_vec(random.normals(clean.elem_count()), clean.shape(), &device)?;
    let times: Vec<f32> = draws.iter().map(|d| d.time).collect();
    let times = Tensor::from_vec(times, b, &device)?;
    let t = times.reshape((b, 1, 1))?;
    let noisy = (noise.broadcast_mul(&t)? + clean.broadcast_mul(&(1.0 - &t)?)?)?;
    let side = pairs.source.dim(3)? / 2;
    let ids = image_ids(pairs.source.dim(2)? / 2, side, &device)?;
    let words = text_ids(text.dim(1)?, &device)?;
    let mut inputs = Inputs {
        latents: &noisy,
        ids: &ids,
        text: &text,
        text_ids: &words,
        pooled: &pooled,
        timestep: &times,
        guidance: None,
        residuals: None,
    };
    let modes: Vec<u32> = draws
        .iter()
        .map(|d| if d.tile { Mode::Tile } else { Mode::Canny } as u32)
        .collect();
    let control = Control {
        condition: &condition,
        modes: Some(&modes),
        scale: 1.0,
    };
    let residuals = networks.control.forward(&inputs, &control)?;
    let heard = choose(&|d| d.control, 3)?;
    let quiet = |all: &[Tensor]| -> Result<Vec<Tensor>> {
        all.iter().map(|r| Ok(r.broadcast_mul(&heard)?)).collect()
    };
    let residuals = Residuals {
        double: quiet(&residuals.double)?,
        single: quiet(&residuals.single)?,
        spread: residuals.spread,
    };
    inputs.residuals = Some(&residuals);
    let output = networks.flux.forward(&inputs)?;
    let error = match options.config.prediction {
        Prediction::Velocity => (output - (noise - clean)?)?,
        Prediction::Sample => {
            let change = (&clean - pack(&of(&pairs.source)?)?)?.sqr()?.mean((1, 2))?;
            let weights = sample_weights(&draws, &change.to_vec1()?);
            let weights = Tensor::from_vec(weights, (b, 1, 1), &device)?;
            (output - clean)?.broadcast_mul(&weights)?
        }
    };
    Ok(error.sqr()?.mean_all()?)
}

/// What the error of the estimated result counts, by member of the batch. In mode tile it is
/// measured by how much the edit changes, so that a new print on a small object counts as much
/// as a new background. (1/t², which makes it the velocity's error, would spend nearly all
/// on removing the last traces of noise.)
fn sample_weights(draws: &[Draw], changes: &[f32]) -> Vec<f32> {
    let of = |(d, change): (&Draw, &f32)| {
        let edit = if d.tile && d.control {
            change + 0.2
        } else {
            1.0
        };
        (edit * (d.time + 0.25)).sqrt().recip()
    };
    draws.iter().zip(changes).map(of).collect()
}

/// Writes the run's averaged weights as two model folders, `transformer` and `controlnet`,
/// under diffusers' names in half precision.
pub fn export(run: &Path, config: &transformer::Config, out: &Path) -> Result<()> {
    let all = latest(run, "flow")?;
    let part = |prefix: &str| -> BTreeMap<String, Tensor> {
        let own = all.iter().filter_map(|(name, value)| {
            let name = name.strip_prefix(prefix)?;
            Some((name.to_string(), value.clone()))
        });
        own.collect()
    };
    let (transformer, control) = (part("transformer."), part("controlnet."));
    let kind = names::Kind::Transformer;
    let folder = out.join("transformer");
    super::export(
        &folder,
        kind,
        0,
        &transformer,
        config,
        "FluxTransformer2DModel",
    )?;
    let kind = names::Kind::ControlNet;
    let folder = out.join("controlnet");
    super::export(
        &folder,
        kind,
        0,
        &control,
        &control_config(config),
        "FluxControlNetModel",
    )
}

/// Edits pictures with the run's averaged weights: (b, 3, h, w) in -1..1 in and out. The
/// noised source at level `start` is followed down over `steps` steps, steered by the source
/// itself (mode tile) or by its edges (mode canny) given as `control`.
#[allow(clippy::too_many_arguments)]
pub fn edit(
    run: &Path,
    config: &transformer::Config,
    vae: &Vae,
    source: &Tensor,
    control: (&Tensor, Mode),
    prompt: Prompt,
    (start, steps, true_cfg): (f64, usize, f64),
) -> Result<Tensor> {
    let all = latest(run, "flow")?;
    let vb = init::builder(&all, DType::F32, &Device::Cpu);
    let flux = FluxTransformer::new(config, vb.pp("transformer"))?;
    let net = ControlNet::new(&control_config(config), vb.pp("controlnet"))?;
    let latents = vae.encode(source)?;
    let (b, c, h, w) = latents.dims4()?;
    let condition = pack(&vae.encode(control.0)?)?;
    let negative = Prompt {
        text: prompt.text.zeros_like()?,
        pooled: prompt.pooled.zeros_like()?,
    };
    let conditions = Conditions {
        flux: &flux,
        prompt,
        more: Vec::new(),
        negative: Some(negative),
        true_cfg,
        guidance: 1.0,
        controls: vec![ControlInput::new(
            &net,
            condition,
            Some(control.1 as u32),
            1.0,
        )],
        rows: h / 2,
        columns: w / 2,
        cache_threshold: 0.0,
        last_run: false,
    };
    let schedule = Schedule::from_level(&ScheduleConfig::dev(), steps, h * w / 4, start)?;
    let pictures: Vec<u32> = (0..b as u32).collect();
    let noise = packed_noise(0, &pictures, 0, (c, h, w), &Device::Cpu)?;
    let edited = img2img(
        &conditions,
        &schedule,
        &pack(&latents)?,
        &noise,
        None,
        &mut Watch::default(),
    )?;
    vae.decode(&crate::flux::transformer::unpack(&edited, h, w)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn training_begins_with_a_copy_of_the_source() {
        let config = config();
        let networks = Networks::new(&config, 3).expect("networks");
        let (b, n, c) = (2, 64, config.in_channels);
        let mut random = Philox::new(1, 1);
        let mut normals = |shape: &[usize]| -> Tensor {
            let count = shape.iter().product();
            Tensor::from_vec(random.normals(count), shape, &Device::Cpu).expect("a tensor")
        };
        let (source, noisy) = (normals(&[b, n, c]), normals(&[b, n, c]));
        let text = normals(&[b, 20, config.joint_attention_dim]);
        let pooled = normals(&[b, config.pooled_projection_dim]);
        let ids = image_ids(8, 8, &Device::Cpu).expect("ids");
        let words = text_ids(20, &Device::Cpu).expect("ids");
        let times = Tensor::new(&[0.9f32, 0.4], &Device::Cpu).expect("times");
        let mut inputs = Inputs {
            latents: &noisy,
            ids: &ids,
            text: &text,
            text_ids: &words,
            pooled: &pooled,
            timestep: &times,
            guidance: None,
            residuals: None,
        };
        let control = Control {
            condition: &source,
            modes: Some(&[Mode::Tile as u32]),
            scale: 1.0,
        };
        let residuals = networks
            .control
            .forward(&inputs, &control)
            .expect("residuals");
        inputs.residuals = Some(&residuals);
        let estimate = networks.flux.forward(&inputs).expect("an estimate");
        let off = (estimate - &source).and_then(|e| e.sqr()?.mean_all()?.to_scalar::<f32>());
        let off = off.expect("a number");
        assert!(off < 0.01, "{off} of a variance of 1");
    }
}
