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
use super::training::{self, Training};
use super::{Compute, Report, Rhythm, fresh, latest, part_of};
use crate::flux::controlnet::{self, Control, ControlNet, Mode};
use crate::flux::init;
use crate::flux::names;
use crate::flux::transformer::{
    self, FluxTransformer, Inputs, Prediction, Residuals, image_ids, pack, text_ids,
};
use crate::flux::vae::Vae;
use crate::optim::Schedule as RateSchedule;
use crate::params::Params;
use crate::sampler::{
    Conditions, ControlInput, Prompt, Schedule, ScheduleConfig, Watch, img2img, packed_noise,
};
use crate::weights::Weights;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The settings of a run, of this stage or of [`super::guidance`].
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The transformer.
    pub config: transformer::Config,
    /// An exported model (folders `transformer` and `controlnet`) to begin with.
    pub from: Option<PathBuf>,
    /// Steps in all.
    pub steps: usize,
    /// The last steps, over which the learning rate falls to nothing.
    pub cooldown: usize,
    /// Pairs a step.
    pub batch: usize,
    /// Micro-batches that they come in, each computed on a thread of its own. It decides what is
    /// drawn: a run must go on with the number it began with to end in the same bytes.
    pub parts: usize,
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
            from: None,
            steps: 11_000,
            cooldown: 3_000,
            batch: 16,
            parts: 1,
            lr: 1.5e-3,
            warmup: 200,
            shift: 5.0,
            drop_text: 0.1,
            drop_control: 0.03,
            tile: 0.8,
            seed: 2,
        }
    }

    pub(super) fn training(&self, stage: &'static str, weight_decay: f64, ema: f64) -> Training {
        Training {
            stage,
            steps: self.steps,
            lr: self.lr,
            schedule: RateSchedule::Trapezoid {
                warmup: self.warmup,
                total: self.steps,
                cooldown: self.cooldown,
            },
            weight_decay,
            beta2: 0.99,
            ema,
            parts: self.parts,
        }
    }

    /// The same for one micro-batch.
    ///
    /// # Errors
    /// If the batch cannot be divided by the parts.
    pub(super) fn part(&self) -> Result<Self> {
        Ok(Self {
            batch: part_of(self.batch, self.parts)?,
            parts: 1,
            ..self.clone()
        })
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

/// Transformer and ControlNet.
pub(super) struct Networks {
    pub(super) flux: FluxTransformer,
    pub(super) control: ControlNet,
}

impl Networks {
    /// From weights named `transformer.…` and `controlnet.…`.
    pub(super) fn new(config: &transformer::Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            flux: FluxTransformer::new(config, vb.pp("transformer"))?,
            control: ControlNet::new(&control_config(config), vb.pp("controlnet"))?,
        })
    }
}

/// The weights that training begins with.
fn begin(options: &Options, device: &Device) -> Result<Params> {
    let (config, seed) = (&options.config, options.seed);
    let params = Params::new(seed, device.clone());
    let transformer = names::transformer_shapes(config);
    let control = names::controlnet_shapes(&control_config(config));
    match &options.from {
        None => {
            fresh(&params, "transformer.", &transformer, seed)?;
            fresh(&params, "controlnet.", &control, seed + 1)?;
            begin_as_copy(&params, config)?;
        }
        Some(from) => {
            let kind = names::Kind::Transformer;
            exported(&params, from, "transformer", kind, transformer)?;
            let kind = names::Kind::ControlNet;
            exported(&params, from, "controlnet", kind, control)?;
        }
    }
    Ok(params)
}

/// The parameters of one part of an exported model, under the part's name.
fn exported(
    params: &Params,
    from: &Path,
    part: &str,
    kind: names::Kind,
    shapes: Vec<names::NameAndShape>,
) -> Result<()> {
    let weights = Weights::open(&from.join(part))?;
    let vb = names::open(&weights, kind, 0, DType::F32, &Device::Cpu)?;
    for (name, shape) in shapes {
        params.insert(format!("{part}.{name}"), &vb.get(shape, &name)?)?;
    }
    Ok(())
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
            Some(var) => var.set(&value.to_device(var.device())?)?,
            None => return Err(Error::BadRequest(format!("there is no weight {name}"))),
        }
    }
    Ok(())
}

/// Trains, or goes on training, until the steps are done or `report` says stop.
pub fn run(
    options: &Options,
    pairs: &Pairs,
    compute: &Compute,
    rhythm: &Rhythm,
    report: Report,
) -> Result<()> {
    pairs.check()?;
    let part = options.part()?;
    training::run(
        &options.training("flow", 0.01, 0.998),
        compute,
        &begin(options, &compute.device)?,
        rhythm,
        |vb| Networks::new(&options.config, vb),
        |n| Batch::new(&part, pairs, n as u64, &compute.device),
        loss,
        report,
    )
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

/// What the networks are asked in one step, in f32 on their device but for the positions.
pub(super) struct Batch {
    noisy: Tensor,
    times: Tensor,
    text: Tensor,
    pooled: Tensor,
    condition: Tensor,
    modes: Vec<u32>,
    /// 0 where the control is left out, (b, 1, 1).
    heard: Tensor,
    /// What the output should be, and what its error counts, (b, 1, 1).
    wanted: Tensor,
    weights: Tensor,
    ids: Tensor,
    words: Tensor,
}

impl Batch {
    pub(super) fn new(
        options: &Options,
        pairs: &Pairs,
        step: u64,
        device: &Device,
    ) -> Result<Self> {
        let mut random = Philox::new(options.seed, step);
        let draws: Vec<Draw> = (0..options.batch)
            .map(|_| draw(options, pairs.len(), &mut random))
            .collect();
        let b = draws.len();
        let cpu = Device::Cpu;
        let rows = Tensor::from_vec(draws.iter().map(|d| d.pair).collect::<Vec<_>>(), b, &cpu)?;
        let of = |all: &Tensor| -> Result<Tensor> {
            Ok(all.index_select(&rows, 0)?.to_dtype(DType::F32)?)
        };
        let choose = |yes: &dyn Fn(&Draw) -> bool, rank: usize| -> Result<Tensor> {
            let mask: Vec<f32> = draws.iter().map(|d| f32::from(yes(d))).collect();
            let mut shape = vec![1; rank];
            shape[0] = b;
            Ok(Tensor::from_vec(mask, shape, &cpu)?)
        };
        let blend = |a: &Tensor, b: &Tensor, mask: &Tensor| -> Result<Tensor> {
            let rest = (1.0 - mask)?;
            Ok((a.broadcast_mul(mask)? + b.broadcast_mul(&rest)?)?)
        };
        let or_none = |all: &Tensor, none: &Tensor, rank: usize| -> Result<Tensor> {
            let some = of(all)?;
            blend(&some, &like(none, &some)?, &choose(&|d| d.text, rank)?)
        };
        let clean = pack(&of(&pairs.target)?)?; // (b, n, 4c)
        let source = of(&pairs.source)?;
        let tile = choose(&|d| d.tile, 4)?;
        let condition = pack(&blend(&source, &of(&pairs.control)?, &tile)?)?;
        let noise = Tensor::from_vec(random.normals(clean.elem_count()), clean.shape(), &cpu)?;
        let times: Vec<f32> = draws.iter().map(|d| d.time).collect();
        let times = Tensor::from_vec(times, b, &cpu)?;
        let t = times.reshape((b, 1, 1))?;
        let noisy = (noise.broadcast_mul(&t)? + clean.broadcast_mul(&(1.0 - &t)?)?)?;
        let (wanted, weights) = match options.config.prediction {
            Prediction::Velocity => ((noise - clean)?, vec![1.0; b]),
            Prediction::Sample => {
                let change = (&clean - pack(&source)?)?.sqr()?.mean((1, 2))?;
                (clean, sample_weights(&draws, &change.to_vec1()?))
            }
        };
        let text = or_none(&pairs.text, &pairs.no_text, 3)?;
        let (_, _, h, w) = source.dims4()?;
        let there = |x: Tensor| x.to_device(device);
        Ok(Self {
            ids: image_ids(h / 2, w / 2, &cpu)?,
            words: text_ids(text.dim(1)?, &cpu)?,
            modes: draws
                .iter()
                .map(|d| if d.tile { Mode::Tile } else { Mode::Canny } as u32)
                .collect(),
            heard: there(choose(&|d| d.control, 3)?)?,
            weights: Tensor::from_vec(weights, (b, 1, 1), device)?,
            pooled: there(or_none(&pairs.pooled, &pairs.no_pooled, 2)?)?,
            text: there(text)?,
            condition: there(condition)?,
            noisy: there(noisy)?,
            wanted: there(wanted)?,
            times: there(times)?,
        })
    }

    /// What both networks see; no residuals yet.
    pub(super) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            latents: &self.noisy,
            ids: &self.ids,
            text: &self.text,
            text_ids: &self.words,
            pooled: &self.pooled,
            timestep: &self.times,
            guidance: None,
            residuals: None,
        }
    }

    /// What the ControlNet sees besides.
    pub(super) fn control(&self) -> Control<'_> {
        Control {
            condition: &self.condition,
            modes: Some(&self.modes),
            scale: 1.0,
        }
    }
}

/// The one row of `none` as f32, repeated to the shape of `other`.
pub(super) fn like(none: &Tensor, other: &Tensor) -> Result<Tensor> {
    let none = none.to_dtype(DType::F32)?.to_device(other.device())?;
    Ok(none.broadcast_as(other.shape())?.contiguous()?)
}

/// The loss of a step: the mean squared error of the velocity, or the weighted one of the
/// result, whichever of the two the network estimates.
fn loss(networks: &Networks, batch: &Batch) -> Result<Tensor> {
    let mut inputs = batch.inputs();
    let residuals = networks.control.forward(&inputs, &batch.control())?;
    let quiet = |all: &[Tensor]| -> Result<Vec<Tensor>> {
        let quieten = |r: &Tensor| Ok(r.broadcast_mul(&batch.heard.to_dtype(r.dtype())?)?);
        all.iter().map(quieten).collect()
    };
    let residuals = Residuals {
        double: quiet(&residuals.double)?,
        single: quiet(&residuals.single)?,
        spread: residuals.spread,
    };
    inputs.residuals = Some(&residuals);
    let output = networks.flux.forward(&inputs)?.to_dtype(DType::F32)?;
    let error = (output - &batch.wanted)?.broadcast_mul(&batch.weights)?;
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
    let device = source.device();
    let networks = Networks::new(config, init::builder(&all, DType::F32, device))?;
    let latents = vae.encode(source)?;
    let (b, c, h, w) = latents.dims4()?;
    let condition = pack(&vae.encode(control.0)?)?;
    let negative = Prompt {
        text: prompt.text.zeros_like()?,
        pooled: prompt.pooled.zeros_like()?,
    };
    let conditions = Conditions {
        flux: &networks.flux,
        prompt,
        more: Vec::new(),
        negative: Some(negative),
        true_cfg,
        true_cfg_end: 1.0,
        guidance: 1.0,
        controls: vec![ControlInput::new(
            &networks.control,
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
    let noise = packed_noise(0, &pictures, 0, (c, h, w), device)?;
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
pub(super) mod tests {
    use super::training::tests::{apart, curves_apart, gradient};
    use super::*;
    use crate::optim::{AdamW, AdamWOptions, Group};

    pub(in crate::train_flux) fn small() -> transformer::Config {
        transformer::Config {
            in_channels: 8,
            num_layers: 1,
            num_single_layers: 1,
            attention_head_dim: 16,
            num_attention_heads: 2,
            joint_attention_dim: 12,
            pooled_projection_dim: 12,
            axes_dims_rope: vec![4, 6, 6],
            guidance_embeds: false,
            ..transformer::Config::tiny()
        }
    }

    pub(in crate::train_flux) fn pairs(config: &transformer::Config) -> Pairs {
        let c = config.in_channels / 4;
        let random = |stream, shape: &[usize]| {
            let values = Philox::new(9, stream).normals(shape.iter().product());
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        Pairs {
            source: random(0, &[8, c, 4, 4]),
            target: random(1, &[8, c, 4, 4]),
            control: random(2, &[8, c, 4, 4]),
            text: random(3, &[8, 3, config.joint_attention_dim]),
            pooled: random(4, &[8, config.pooled_projection_dim]),
            no_text: random(5, &[1, 3, config.joint_attention_dim]),
            no_pooled: random(6, &[1, config.pooled_projection_dim]),
        }
    }

    fn options(steps: usize) -> Options {
        Options {
            config: transformer::Config {
                prediction: Prediction::Sample,
                ..small()
            },
            steps,
            cooldown: steps / 4,
            batch: 4,
            warmup: 10,
            ..Options::shipped()
        }
    }

    /// The averaged weights of a run that is stopped after each of these steps, and the losses.
    fn trained(options: &Options, compute: &[&Compute], stops: &[usize]) -> (Weights, Vec<f64>) {
        let folder = tempfile::tempdir().unwrap();
        let mut rhythm = Rhythm::usual(folder.path());
        rhythm.report_s = 0.0;
        let pairs = pairs(&options.config);
        let mut losses = Vec::new();
        for (compute, stop) in compute.iter().zip(stops) {
            run(options, &pairs, compute, &rhythm, &mut |p| {
                losses.push(p.loss);
                p.step < *stop
            })
            .unwrap();
        }
        (latest(folder.path(), "flow").unwrap(), losses)
    }

    type Weights = BTreeMap<String, Tensor>;

    fn values(all: &Weights) -> Vec<f32> {
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        all.values().flat_map(flat).collect()
    }

    fn bf16() -> Compute {
        Compute::on(Device::Cpu, Some("bf16")).unwrap()
    }

    /// The optimiser that a run of the flow has.
    fn plain_adam(options: &Options, params: &Params) -> AdamW {
        let group = Group {
            vars: params.vars(),
            lr: options.lr,
            weight_decay: 0.01,
        };
        let settings = AdamWOptions {
            beta2: 0.99,
            ema: Some(0.998),
            ..AdamWOptions::default()
        };
        AdamW::new(vec![group], settings).unwrap()
    }

    #[test]
    fn a_run_on_the_cpu_is_the_plain_loop_to_the_bit() {
        let options = options(8);
        let pairs = pairs(&options.config);
        let params = begin(&options, &Device::Cpu).unwrap();
        let networks = Networks::new(&options.config, params.builder(DType::F32)).unwrap();
        let mut adam = plain_adam(&options, &params);
        for step in 0..options.steps {
            let batch = Batch::new(&options, &pairs, step as u64, &Device::Cpu).unwrap();
            let loss = loss(&networks, &batch).unwrap();
            adam.accumulate(&loss.backward().unwrap(), 1.0).unwrap();
            let up = (step + 1) as f64 / 10.0;
            let down = (8 - step) as f64 / 2.0;
            adam.step(up.min(down).min(1.0)).unwrap();
        }
        let by_hand = values(&adam.averages().unwrap().into_iter().collect());
        let cpu = Compute::cpu();
        assert_eq!(values(&trained(&options, &[&cpu], &[8]).0), by_hand);
        // Stopped and resumed it is the same.
        let resumed = trained(&options, &[&cpu, &cpu], &[3, 8]).0;
        assert_eq!(values(&resumed), by_hand);
    }

    #[test]
    fn micro_batches_side_by_side_are_the_same_one_after_the_other() {
        let options = Options {
            parts: 2,
            ..options(6)
        };
        let pairs = pairs(&options.config);
        let part = options.part().unwrap();
        let params = begin(&options, &Device::Cpu).unwrap();
        let mut adam = plain_adam(&options, &params);
        let schedule = options.training("flow", 0.01, 0.998).schedule;
        for step in 0..options.steps {
            for n in [2 * step, 2 * step + 1] {
                let networks = Networks::new(&options.config, params.builder(DType::F32)).unwrap();
                let batch = Batch::new(&part, &pairs, n as u64, &Device::Cpu).unwrap();
                let loss = loss(&networks, &batch).unwrap();
                adam.accumulate(&loss.backward().unwrap(), 0.5).unwrap();
            }
            adam.step(schedule.factor(step)).unwrap();
        }
        let by_hand = values(&adam.averages().unwrap().into_iter().collect());
        let cpu = Compute::cpu();
        assert_eq!(
            values(&trained(&options, &[&cpu, &cpu], &[2, 6]).0),
            by_hand
        );
        let odd = Options {
            parts: 3,
            ..options.clone()
        };
        assert!(odd.part().unwrap_err().to_string().contains("4 cannot"));
    }

    #[test]
    fn in_bf16_gradients_and_losses_are_nearly_those_of_f32() {
        let options = options(60);
        let (cpu, half) = (Compute::cpu(), bf16());
        let (weights, exact) = trained(&options, &[&cpu], &[60]);
        let (_, rounded) = trained(&options, &[&half], &[60]);
        assert!(exact[59] < 0.8 * exact[0], "{exact:?}");
        let worst = curves_apart(&exact, &rounded);
        assert!(worst < 0.02, "losses: {worst}");
        // At trained weights no block is silent.
        let pairs = pairs(&options.config);
        let batch = Batch::new(&options, &pairs, 1 << 40, &Device::Cpu).unwrap();
        let at = |dtype| {
            gradient(&weights, dtype, |vb| {
                loss(&Networks::new(&options.config, vb)?, &batch)
            })
        };
        let worst = apart(&at(DType::F32), &at(DType::BF16));
        assert!(worst < 0.02, "gradient: {worst}");
    }

    #[test]
    fn a_checkpoint_does_not_depend_on_what_it_was_made_in() {
        let (cpu, half) = (Compute::cpu(), bf16());
        let options = options(8);
        let begun_in_half = trained(&options, &[&half, &cpu], &[4, 8]).0;
        assert!(begun_in_half.values().all(|t| t.dtype() == DType::F32));
        let (whole, _) = trained(&options, &[&cpu], &[8]);
        let (a, b) = (values(&begun_in_half), values(&whole));
        let worst = a
            .iter()
            .zip(&b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // Eight steps of at most the learning rate, of which some went another way.
        assert!(worst > 0.0 && worst < 8.0 * options.lr as f32, "{worst}");
    }

    #[test]
    fn training_goes_on_from_an_exported_model() {
        let mut options = options(4);
        let folder = tempfile::tempdir().unwrap();
        let (rhythm, pairs) = (Rhythm::usual(folder.path()), pairs(&options.config));
        run(&options, &pairs, &Compute::cpu(), &rhythm, &mut |_| true).unwrap();
        let out = folder.path().join("exported");
        export(folder.path(), &options.config, &out).unwrap();
        let rounded = |t: &Tensor| t.to_dtype(DType::F16)?.to_dtype(DType::F32);
        let averages = latest(folder.path(), "flow").unwrap();
        let wanted: Weights = averages
            .iter()
            .map(|(name, t)| (name.clone(), rounded(t).unwrap()))
            .collect();
        options.from = Some(out);
        let begun = begin(&options, &Device::Cpu).unwrap();
        let begun: Weights = begun
            .vars()
            .into_iter()
            .map(|(name, var)| (name, var.as_detached_tensor()))
            .collect();
        assert!(begun.keys().eq(wanted.keys()));
        assert_eq!(values(&begun), values(&wanted));
    }

    #[test]
    fn training_begins_with_a_copy_of_the_source() {
        let options = Options::shipped();
        let config = options.config.clone();
        let params = begin(&options, &Device::Cpu).expect("weights");
        let networks = Networks::new(&config, params.builder(DType::F32)).expect("networks");
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
