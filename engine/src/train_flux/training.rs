//! The one loop that everything here trains with: a loss that is a function of weights and
//! step, on any device, in f32 or bf16.
//!
//! In bf16 a network computes with copies of its weights, made anew for every step; gradients
//! go through them to the f32 weights, whose moments and averages are f32 too. So a checkpoint
//! does not say where or in what it was made, and any device goes on from it.
//!
//! A step asks its device one question, the size of the gradient, which decides whether the
//! weights move at all. Losses stay on the device until they are reported.

use super::{Compute, Report, Rhythm, Run};
use crate::Result;
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::Params;
use candle_core::Tensor;
use candle_nn::VarBuilder;

/// The settings of a run.
pub(crate) struct Training {
    /// Its name in reports and files.
    pub stage: &'static str,
    /// Steps in all.
    pub steps: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// How it moves.
    pub schedule: Schedule,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decay of the weights' average.
    pub ema: f64,
}

impl Training {
    /// For convolutional networks that are judged by their own loss.
    pub(crate) fn cosine(stage: &'static str, steps: usize, lr: f64) -> Self {
        Self {
            stage,
            steps,
            lr,
            schedule: Schedule::Cosine {
                warmup: 40.min(steps / 4),
                total: steps,
                floor: 0.01,
            },
            weight_decay: 0.02,
            beta2: 0.999,
            ema: 0.99,
        }
    }
}

/// Trains `params`, or goes on training, until the steps are done or `report` says stop.
///
/// `build` makes the network, `draw` what step n is trained on, `loss` an f32 number of the two.
pub(crate) fn run<M, B>(
    training: &Training,
    compute: &Compute,
    params: &Params,
    rhythm: &Rhythm,
    build: impl Fn(VarBuilder) -> Result<M>,
    draw: impl Fn(usize) -> Result<B>,
    loss: impl Fn(&M, &B) -> Result<Tensor>,
    report: Report,
) -> Result<()> {
    let group = Group {
        vars: params.vars(),
        lr: training.lr,
        weight_decay: training.weight_decay,
    };
    let settings = AdamWOptions {
        beta2: training.beta2,
        ema: Some(training.ema),
        ..AdamWOptions::default()
    };
    let mut adam = AdamW::new(vec![group], settings)?;
    let mut run = Run::open(training.stage, rhythm, training.steps, params, &mut adam)?;
    let mut drawn = None;
    while run.state.step < training.steps {
        let step = run.state.step;
        let batch = match drawn.take() {
            Some(batch) => batch,
            None => draw(step)?,
        };
        let loss = loss(&build(params.builder(compute.dtype))?, &batch)?;
        adam.accumulate(&loss.backward()?, 1.0)?;
        // The device works on what it was told while the next batch is made.
        if step + 1 < training.steps {
            drawn = Some(draw(step + 1)?);
        }
        let norm = adam.step(training.schedule.factor(step))?;
        if !run.after_step(loss.detach(), norm, params, &adam, report)? {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use std::collections::BTreeMap;

    /// The gradients of a loss over these weights, made in this dtype, one after the other.
    pub fn gradient(
        weights: &BTreeMap<String, Tensor>,
        dtype: DType,
        loss: impl Fn(VarBuilder) -> Result<Tensor>,
    ) -> Vec<f32> {
        let params = Params::new(0, Device::Cpu);
        for (name, value) in weights {
            params.insert(name.clone(), value).unwrap();
        }
        let gradients = loss(params.builder(dtype)).unwrap().backward().unwrap();
        let flat = |(_, var): (String, candle_core::Var)| {
            let g = gradients.get(&var).unwrap().flatten_all().unwrap();
            g.to_vec1::<f32>().unwrap()
        };
        params.vars().into_iter().flat_map(flat).collect()
    }

    /// The length of a - b as a share of that of a.
    pub fn apart(a: &[f32], b: &[f32]) -> f64 {
        let square =
            |all: &mut dyn Iterator<Item = f32>| -> f64 { all.map(|x| f64::from(x).powi(2)).sum() };
        let off = square(&mut a.iter().zip(b).map(|(a, b)| a - b));
        (off / square(&mut a.iter().copied())).sqrt()
    }

    /// The largest difference of two curves, as a share of the first.
    pub fn curves_apart(a: &[f64], b: &[f64]) -> f64 {
        let off = a.iter().zip(b).map(|(a, b)| (a - b).abs() / a);
        off.fold(0.0, f64::max)
    }
}
