//! Guidance distillation: a transformer that takes the guidance scale as an input, as
//! FLUX.1-dev does, out of one that needs two runs a step for it (arXiv 2210.03142).
//!
//! 1. The teacher answers with the text and without; with scale g that means
//!    u_∅ + g·(u - u_∅).
//! 2. The student, a copy of the teacher with a guidance embedding that begins silent, learns
//!    to give that in one run, for g between 1 and 7.
//!
//! The ControlNet stays the teacher's; both see its residuals. Not here: training the teacher
//! ([`super::flow`]).

use super::pairs::Pairs;
use super::{Report, Rhythm, Run, flow, latest};
use crate::flux::controlnet::{Control, ControlNet, Mode};
use crate::flux::transformer::{self, FluxTransformer, Inputs, image_ids, pack, text_ids};
use crate::flux::{init, names};
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::Params;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The teacher's transformer, without a guidance input.
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
    /// The factor that times are shifted by.
    pub shift: f64,
    /// The least and the greatest guidance scale.
    pub scales: (f32, f32),
    /// How often the control picture is the source itself (mode tile), not its edges (canny).
    pub tile: f32,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// For the transformer that ships, with the times and modes it was trained on.
    pub fn shipped() -> Self {
        let teacher = flow::Options::shipped();
        Self {
            config: teacher.config,
            steps: 2_000,
            cooldown: 500,
            batch: teacher.batch,
            lr: 3e-4,
            warmup: 100,
            shift: teacher.shift,
            scales: (1.0, 7.0),
            tile: teacher.tile,
            seed: 3,
        }
    }
}

/// The student's shape: the teacher's, with the guidance input.
pub fn student_config(teacher: &transformer::Config) -> transformer::Config {
    transformer::Config {
        guidance_embeds: true,
        ..teacher.clone()
    }
}

struct Teacher {
    flux: FluxTransformer,
    control: ControlNet,
}

impl Teacher {
    fn new(all: &BTreeMap<String, Tensor>, config: &transformer::Config) -> Result<Self> {
        if config.guidance_embeds {
            return Err(Error::BadRequest(
                "guidance distillation: expected a teacher without a guidance input".into(),
            ));
        }
        let vb = init::builder(all, DType::F32, &Device::Cpu);
        Ok(Self {
            flux: FluxTransformer::new(config, vb.pp("transformer"))?,
            control: ControlNet::new(&flow::control_config(config), vb.pp("controlnet"))?,
        })
    }
}

/// The student's fresh parameters: the teacher's transformer, and a guidance embedding whose
/// last matrix is nought, so that it begins as the teacher's answer with the text.
fn student(
    teacher: &BTreeMap<String, Tensor>,
    config: &transformer::Config,
    seed: u64,
) -> Result<(Params, FluxTransformer)> {
    let params = Params::new(seed, Device::Cpu);
    let config = student_config(config);
    for (name, fresh) in init::random(&names::transformer_shapes(&config), seed, &Device::Cpu)? {
        let value = match teacher.get(&format!("transformer.{name}")) {
            Some(learned) => learned.clone(),
            None if name.starts_with("guidance_in.out_layer") => fresh.zeros_like()?,
            None => fresh,
        };
        params.insert(name, &value)?;
    }
    let flux = FluxTransformer::new(&config, params.builder(DType::F32))?;
    Ok((params, flux))
}

/// Trains, or goes on training, until the steps are done or `report` says stop. The teacher is
/// the stage `flow` of the same folder. The loss told is [`missed`] on the step's batch.
pub fn run(options: &Options, pairs: &Pairs, rhythm: &Rhythm, report: Report) -> Result<()> {
    if pairs.is_empty() {
        return Err(Error::BadRequest(
            "there are no pairs to train on: prepare some".into(),
        ));
    }
    let learned = latest(&rhythm.folder, "flow")?;
    let teacher = Teacher::new(&learned, &options.config)?;
    let (params, flux) = student(&learned, &options.config, options.seed)?;
    drop(learned);
    let group = Group {
        vars: params.vars(),
        lr: options.lr,
        weight_decay: 0.0,
    };
    let settings = AdamWOptions {
        beta2: 0.99,
        ema: Some(0.99),
        ..AdamWOptions::default()
    };
    let mut adam = AdamW::new(vec![group], settings)?;
    let mut run = Run::open("guidance", rhythm, options.steps, &params, &mut adam)?;
    let schedule = Schedule::Trapezoid {
        warmup: options.warmup,
        total: options.steps,
        cooldown: options.cooldown,
    };
    while run.state.step < options.steps {
        let step = run.state.step;
        let batch = Batch::new(options, pairs, step as u64)?;
        let (error, added) = errors(&teacher, &flux, &batch)?;
        let gradients = error.backward()?;
        adam.accumulate(&gradients, 1.0)?;
        let norm = adam.step(schedule.factor(step))?;
        let missed = f64::from(error.to_scalar::<f32>()?) / added;
        if !run.after_step(missed, norm, &params, &adam, report)? {
            break;
        }
    }
    Ok(())
}

/// The share of what guidance adds that the run's averaged student still misses, over
/// `batches` batches that its training did not draw: the mean square of its error over that of
/// the teacher's answer with guidance minus the one without. 1 is no better than no guidance.
///
/// # Errors
/// If the stages `flow` and `guidance` have no checkpoint in the folder yet.
pub fn missed(run: &Path, options: &Options, pairs: &Pairs, batches: u64) -> Result<f64> {
    let teacher = Teacher::new(&latest(run, "flow")?, &options.config)?;
    let vb = init::builder(&latest(run, "guidance")?, DType::F32, &Device::Cpu);
    let flux = FluxTransformer::new(&student_config(&options.config), vb)?;
    let (mut error, mut added) = (0.0, 0.0);
    for i in 0..batches {
        let batch = Batch::new(options, pairs, 1 << 40 | i)?;
        let one = errors(&teacher, &flux, &batch)?;
        error += f64::from(one.0.to_scalar::<f32>()?);
        added += one.1;
    }
    Ok(error / added)
}

/// Writes the run's averaged student and the teacher's ControlNet as two model folders,
/// `transformer` and `controlnet`, as [`flow::export`] does for the teacher.
pub fn export(run: &Path, config: &transformer::Config, out: &Path) -> Result<()> {
    flow::export(run, config, out)?;
    super::export(
        &out.join("transformer"),
        names::Kind::Transformer,
        0,
        &latest(run, "guidance")?,
        &student_config(config),
        "FluxTransformer2DModel",
    )
}

/// What the two networks are asked in one step.
struct Batch {
    noisy: Tensor,
    times: Tensor,
    scales: Tensor,
    text: Tensor,
    pooled: Tensor,
    no_text: Tensor,
    no_pooled: Tensor,
    condition: Tensor,
    modes: Vec<u32>,
    ids: Tensor,
    words: Tensor,
}

impl Batch {
    fn new(options: &Options, pairs: &Pairs, step: u64) -> Result<Self> {
        let (b, device) = (options.batch, Device::Cpu);
        let mut random = Philox::new(options.seed, step);
        let rows: Vec<u32> = (0..b).map(|_| random.below(pairs.len() as u32)).collect();
        let rows = Tensor::from_vec(rows, b, &device)?;
        let of = |all: &Tensor| -> Result<Tensor> {
            Ok(all.index_select(&rows, 0)?.to_dtype(DType::F32)?)
        };
        let times: Vec<f32> = (0..b)
            .map(|_| {
                let odds = f64::from(random.normal()).exp() * options.shift;
                (odds / (1.0 + odds)) as f32
            })
            .collect();
        let (least, most) = options.scales;
        let scales: Vec<f32> = (0..b)
            .map(|_| least + (most - least) * random.uniform())
            .collect();
        let modes: Vec<u32> = (0..b)
            .map(|_| match random.uniform() < options.tile {
                true => Mode::Tile as u32,
                false => Mode::Canny as u32,
            })
            .collect();
        let tile: Vec<f32> = modes
            .iter()
            .map(|m| f32::from(*m == Mode::Tile as u32))
            .collect();
        let tile = Tensor::from_vec(tile, (b, 1, 1, 1), &device)?;
        let shown = (of(&pairs.source)?.broadcast_mul(&tile)?
            + of(&pairs.control)?.broadcast_mul(&(1.0 - &tile)?)?)?;
        let clean = pack(&of(&pairs.target)?)?; // (b, n, 4c)
        let noise = Tensor::from_vec(random.normals(clean.elem_count()), clean.shape(), &device)?;
        let times = Tensor::from_vec(times, b, &device)?;
        let t = times.reshape((b, 1, 1))?;
        let noisy = (noise.broadcast_mul(&t)? + clean.broadcast_mul(&(1.0 - &t)?)?)?;
        let (text, pooled) = (of(&pairs.text)?, of(&pairs.pooled)?);
        let nothing = |none: &Tensor, like: &Tensor| -> Result<Tensor> {
            let none = none.to_dtype(DType::F32)?.broadcast_as(like.shape())?;
            Ok(none.contiguous()?)
        };
        let (_, _, h, w) = pairs.source.dims4()?;
        Ok(Self {
            no_text: nothing(&pairs.no_text, &text)?,
            no_pooled: nothing(&pairs.no_pooled, &pooled)?,
            words: text_ids(text.dim(1)?, &device)?,
            ids: image_ids(h / 2, w / 2, &device)?,
            scales: Tensor::from_vec(scales, b, &device)?,
            condition: pack(&shown)?,
            noisy,
            times,
            text,
            pooled,
            modes,
        })
    }
}

/// The mean square of the student's error, and that of what guidance adds to the teacher's
/// answer with the text.
fn errors(teacher: &Teacher, student: &FluxTransformer, batch: &Batch) -> Result<(Tensor, f64)> {
    let mut inputs = Inputs {
        latents: &batch.noisy,
        ids: &batch.ids,
        text: &batch.text,
        text_ids: &batch.words,
        pooled: &batch.pooled,
        timestep: &batch.times,
        guidance: None,
        residuals: None,
    };
    let control = Control {
        condition: &batch.condition,
        modes: Some(&batch.modes),
        scale: 1.0,
    };
    let residuals = teacher.control.forward(&inputs, &control)?;
    inputs.residuals = Some(&residuals);
    let with = teacher.flux.forward(&inputs)?;
    let without = teacher.flux.forward(&Inputs {
        text: &batch.no_text,
        pooled: &batch.no_pooled,
        ..inputs
    })?;
    let scales = batch.scales.reshape(((), 1, 1))?;
    let wanted = (&without + (&with - &without)?.broadcast_mul(&scales)?)?;
    let ours = student.forward(&Inputs {
        guidance: Some(&batch.scales),
        ..inputs
    })?;
    let added = (&wanted - &with)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    // A scale of 1 adds nothing: nothing to divide by either.
    let added = f64::from(added).max(1e-12);
    Ok(((ours - wanted)?.sqr()?.mean_all()?, added))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{save_tensors, write_whole};
    use crate::weights::Weights;

    /// A random teacher whose every weight speaks, in a folder as the stage `flow` leaves it.
    fn teacher(folder: &Path, config: &transformer::Config) {
        let mut all = Vec::new();
        let control = names::controlnet_shapes(&flow::control_config(config));
        for (prefix, shapes) in [
            ("transformer", names::transformer_shapes(config)),
            ("controlnet", control),
        ] {
            for (i, (name, shape)) in shapes.into_iter().enumerate() {
                let n = shape.iter().product();
                let mean = if name.ends_with(".scale") { 1.0 } else { 0.0 };
                let values = Philox::new(prefix.len() as u64, i as u64).normals(n);
                let values: Vec<f32> = values.iter().map(|x| mean + 0.08 * x).collect();
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
                all.push((format!("{prefix}.{name}"), tensor));
            }
        }
        std::fs::create_dir(folder.join("flow-1")).unwrap();
        save_tensors(&folder.join("flow-1/weights.safetensors"), &all, &[]).unwrap();
        write_whole(&folder.join("flow.json"), br#"{"step": 1, "seconds": 0.0}"#).unwrap();
    }

    fn pairs(config: &transformer::Config) -> Pairs {
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

    fn small() -> transformer::Config {
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

    #[test]
    fn a_student_learns_in_one_run_what_guidance_takes_two_for() {
        let config = small();
        let folder = tempfile::tempdir().unwrap();
        teacher(folder.path(), &config);
        let pairs = pairs(&config);
        let options = |steps| Options {
            config: config.clone(),
            steps,
            cooldown: 100,
            batch: 8,
            lr: 1e-3,
            warmup: 10,
            ..Options::shipped()
        };
        let rhythm = Rhythm::usual(folder.path());
        let mut first = None;
        let mut tell = |p: &super::super::Progress| {
            first.get_or_insert(p.loss);
            true
        };
        run(&options(1), &pairs, &rhythm, &mut tell).unwrap();
        // Untrained it is the teacher with the text and without guidance, to rounding.
        assert!(first.is_some_and(|f| (f - 1.0).abs() < 1e-4), "{first:?}");
        // From there on, over two sessions.
        run(&options(100), &pairs, &rhythm, &mut |_| true).unwrap();
        let early = missed(folder.path(), &options(100), &pairs, 8).unwrap();
        run(&options(300), &pairs, &rhythm, &mut |_| true).unwrap();
        let late = missed(folder.path(), &options(300), &pairs, 8).unwrap();
        assert!(early < 0.6 && late < 0.3 && late < early, "{early} {late}");

        let out = tempfile::tempdir().unwrap();
        export(folder.path(), &config, out.path()).unwrap();
        let at = out.path().join("transformer");
        let json = std::fs::read(at.join("config.json")).unwrap();
        let exported: transformer::Config = serde_json::from_slice(&json).unwrap();
        assert_eq!(exported, student_config(&config));
        let weights = Weights::open(&at).unwrap();
        let vb = names::open(
            &weights,
            names::Kind::Transformer,
            0,
            DType::F32,
            &Device::Cpu,
        );
        assert!(FluxTransformer::new(&exported, vb.unwrap()).is_ok());
    }
}
