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

use super::flow::{self, Batch, Networks, Options};
use super::pairs::Pairs;
use super::{Compute, Report, Rhythm, latest, training};
use crate::flux::transformer::{self, FluxTransformer, Inputs};
use crate::flux::{init, names};
use crate::params::Params;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// The least and the greatest guidance scale.
const SCALES: (f32, f32) = (1.0, 7.0);

/// For the transformer that ships, with the times and modes it was trained on. The config is
/// the teacher's.
pub fn options() -> Options {
    Options {
        steps: 2_000,
        cooldown: 500,
        lr: 3e-4,
        warmup: 100,
        drop_text: 0.0,
        drop_control: 0.0,
        seed: 3,
        ..Options::shipped()
    }
}

/// The student's shape: the teacher's, with the guidance input.
pub fn student_config(teacher: &transformer::Config) -> transformer::Config {
    transformer::Config {
        guidance_embeds: true,
        ..teacher.clone()
    }
}

fn teacher(
    all: &BTreeMap<String, Tensor>,
    config: &transformer::Config,
    compute: &Compute,
) -> Result<Networks> {
    if config.guidance_embeds {
        return Err(Error::BadRequest(
            "guidance distillation: expected a teacher without a guidance input".into(),
        ));
    }
    Networks::new(config, init::builder(all, compute.dtype, &compute.device))
}

/// The student's fresh parameters: the teacher's transformer, and a guidance embedding whose
/// last matrix is nought, so that it begins as the teacher's answer with the text.
fn student(
    teacher: &BTreeMap<String, Tensor>,
    config: &transformer::Config,
    seed: u64,
    device: &Device,
) -> Result<Params> {
    let params = Params::new(seed, device.clone());
    let shapes = names::transformer_shapes(&student_config(config));
    for (name, fresh) in init::random(&shapes, seed, &Device::Cpu)? {
        let value = match teacher.get(&format!("transformer.{name}")) {
            Some(learned) => learned.clone(),
            None if name.starts_with("guidance_in.out_layer") => fresh.zeros_like()?,
            None => fresh,
        };
        params.insert(name, &value)?;
    }
    Ok(params)
}

/// Trains, or goes on training, until the steps are done or `report` says stop. The teacher is
/// the stage `flow` of the same folder. The loss is [`missed`] of the step's batch.
pub fn run(
    options: &Options,
    pairs: &Pairs,
    compute: &Compute,
    rhythm: &Rhythm,
    report: Report,
) -> Result<()> {
    pairs.check()?;
    let learned = latest(&rhythm.folder, "flow")?;
    let teacher = teacher(&learned, &options.config, compute)?;
    let config = student_config(&options.config);
    let part = options.part()?;
    training::run(
        &options.training("guidance", 0.0, 0.99),
        compute,
        &student(&learned, &options.config, options.seed, &compute.device)?,
        rhythm,
        |vb| FluxTransformer::new(&config, vb),
        |n| Question::new(&part, pairs, n as u64, compute),
        |student, question| {
            let (error, added) = errors(&teacher, student, question)?;
            // Scales of 1 add nothing: nothing to divide by either.
            Ok((error / added.clamp(1e-12, f64::INFINITY)?)?)
        },
        report,
    )
}

/// The share of what guidance adds that the run's averaged student still misses, over
/// `batches` batches that its training did not draw: the mean square of its error over that of
/// the teacher's answer with guidance minus the one without. 1 is no better than no guidance.
///
/// # Errors
/// If the stages `flow` and `guidance` have no checkpoint in the folder yet.
pub fn missed(
    run: &Path,
    options: &Options,
    pairs: &Pairs,
    compute: &Compute,
    batches: u64,
) -> Result<f64> {
    let teacher = teacher(&latest(run, "flow")?, &options.config, compute)?;
    let vb = init::builder(&latest(run, "guidance")?, compute.dtype, &compute.device);
    let student = FluxTransformer::new(&student_config(&options.config), vb)?;
    let (mut missed, mut added) = (0.0, 0.0);
    for i in 0..batches {
        let question = Question::new(options, pairs, 1 << 40 | i, compute)?;
        let (error, step) = errors(&teacher, &student, &question)?;
        missed += f64::from(error.to_scalar::<f32>()?);
        added += f64::from(step.to_scalar::<f32>()?);
    }
    Ok(missed / added)
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

/// What teacher and student are asked in one step.
struct Question {
    batch: Batch,
    scales: Tensor,
    no_text: Tensor,
    no_pooled: Tensor,
}

impl Question {
    fn new(options: &Options, pairs: &Pairs, step: u64, compute: &Compute) -> Result<Self> {
        let batch = Batch::new(options, pairs, step, &compute.device)?;
        let mut random = Philox::new(options.seed, 1 << 50 | step);
        let (least, most) = SCALES;
        let scales: Vec<f32> = (0..options.batch)
            .map(|_| least + (most - least) * random.uniform())
            .collect();
        Ok(Self {
            scales: Tensor::from_vec(scales, options.batch, &compute.device)?,
            no_text: flow::like(&pairs.no_text, batch.inputs().text)?,
            no_pooled: flow::like(&pairs.no_pooled, batch.inputs().pooled)?,
            batch,
        })
    }
}

/// The mean square of the student's error, and that of what guidance adds to the teacher's
/// answer with the text.
fn errors(
    teacher: &Networks,
    student: &FluxTransformer,
    question: &Question,
) -> Result<(Tensor, Tensor)> {
    let mut inputs = question.batch.inputs();
    let residuals = teacher
        .control
        .forward(&inputs, &question.batch.control())?;
    inputs.residuals = Some(&residuals);
    let with = teacher.flux.forward(&inputs)?.to_dtype(DType::F32)?;
    let without = teacher.flux.forward(&Inputs {
        text: &question.no_text,
        pooled: &question.no_pooled,
        ..inputs
    })?;
    let without = without.to_dtype(DType::F32)?;
    let scales = question.scales.reshape(((), 1, 1))?;
    let wanted = (&without + (&with - &without)?.broadcast_mul(&scales)?)?;
    let ours = student.forward(&Inputs {
        guidance: Some(&question.scales),
        ..inputs
    })?;
    let added = (&wanted - &with)?.sqr()?.mean_all()?;
    let error = (ours.to_dtype(DType::F32)? - wanted)?;
    Ok((error.sqr()?.mean_all()?, added))
}

#[cfg(test)]
mod tests {
    use super::flow::tests::{pairs, small};
    use super::*;
    use crate::params::{save_tensors, write_whole};
    use crate::weights::Weights;

    /// A random teacher whose every weight speaks, in a folder as the stage `flow` leaves it.
    fn leave_a_teacher(folder: &Path, config: &transformer::Config) {
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

    #[test]
    fn a_student_learns_in_one_run_what_guidance_takes_two_for() {
        let config = small();
        let folder = tempfile::tempdir().unwrap();
        leave_a_teacher(folder.path(), &config);
        let pairs = pairs(&config);
        let at = |steps| Options {
            config: config.clone(),
            steps,
            cooldown: 100,
            batch: 8,
            lr: 1e-3,
            warmup: 10,
            ..options()
        };
        let cpu = Compute::cpu();
        let rhythm = Rhythm::usual(folder.path());
        let missed = |o: &Options| missed(folder.path(), o, &pairs, &cpu, 8).unwrap();
        // Untrained it is the teacher with the text and without guidance, to rounding.
        let still = Options { lr: 0.0, ..at(1) };
        run(&still, &pairs, &cpu, &rhythm, &mut |_| true).unwrap();
        let untrained = missed(&still);
        assert!((untrained - 1.0).abs() < 1e-4, "{untrained}");
        // From there on, over two sessions.
        run(&at(100), &pairs, &cpu, &rhythm, &mut |_| true).unwrap();
        let early = missed(&at(100));
        run(&at(300), &pairs, &cpu, &rhythm, &mut |_| true).unwrap();
        let late = missed(&at(300));
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
