//! The plain loop of a training whose loss is a function of weights and step: what the judge
//! of edits ([`crate::attributes`]) and the detail decoder ([`super::detail`]) are trained with.

use super::{Report, Rhythm, Run, latest};
use crate::Result;
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::Params;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

/// The settings of a run.
pub(crate) struct Training {
    /// Its name in reports and files.
    pub stage: &'static str,
    /// Steps in all.
    pub steps: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Decides the first weights.
    pub seed: u64,
}

/// Trains, or goes on training; the averaged weights.
pub(crate) fn run<M>(
    training: &Training,
    rhythm: &Rhythm,
    build: impl Fn(VarBuilder) -> Result<M>,
    loss: impl Fn(&M, usize) -> Result<Tensor>,
    report: Report,
) -> Result<Vec<(String, Tensor)>> {
    let params = Params::new(training.seed, Device::Cpu);
    let model = build(params.builder(DType::F32))?;
    run_from(training, rhythm, &params, |step| loss(&model, step), report)
}

/// As [`run`], with parameters that are there already.
pub(crate) fn run_from(
    training: &Training,
    rhythm: &Rhythm,
    params: &Params,
    loss: impl Fn(usize) -> Result<Tensor>,
    report: Report,
) -> Result<Vec<(String, Tensor)>> {
    let group = Group {
        vars: params.vars(),
        lr: training.lr,
        weight_decay: 0.02,
    };
    let settings = AdamWOptions {
        ema: Some(0.99),
        ..AdamWOptions::default()
    };
    let mut adam = AdamW::new(vec![group], settings)?;
    let mut run = Run::open(training.stage, rhythm, training.steps, params, &mut adam)?;
    let schedule = Schedule::Cosine {
        warmup: 40.min(training.steps / 4),
        total: training.steps,
        floor: 0.01,
    };
    while run.state.step < training.steps {
        let step = run.state.step;
        let loss = loss(step)?;
        adam.accumulate(&loss.backward()?, 1.0)?;
        let norm = adam.step(schedule.factor(step))?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        if !run.after_step(loss, norm, params, &adam, report)? {
            break;
        }
    }
    Ok(latest(&rhythm.folder, training.stage)?
        .into_iter()
        .collect())
}
