//! The one loop that everything here trains with: a loss that is a function of weights and
//! step, on any device, in f32 or bf16.
//!
//! In bf16 a network computes with copies of its weights, made anew for every step; gradients
//! go through them to the f32 weights, whose moments and averages are f32 too. So a checkpoint
//! does not say where or in what it was made, and any device goes on from it.
//!
//! A step may be made of several micro-batches, computed side by side on a thread each: on a CPU
//! that is where the second core goes, since most of what a small network does, a product's
//! threads cannot share. Their gradients are added in order, so the bytes do not depend on who
//! was done first.
//!
//! A step asks its device one question, the size of the gradient, which decides whether the
//! weights move at all. Losses stay on the device until they are reported.

use super::{Compute, Report, Rhythm, Run};
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::Params;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_core::backprop::GradStore;
use candle_nn::VarBuilder;
use rayon::{ThreadPool, ThreadPoolBuilder};

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
    /// Micro-batches a step.
    pub parts: usize,
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
            parts: 1,
        }
    }
}

/// Trains `params`, or goes on training, until the steps are done or `report` says stop.
///
/// `build` makes the network, `draw` micro-batch n (step n's only one, where a step has one),
/// `loss` an f32 number of the two.
pub(crate) fn run<M, B: Send>(
    training: &Training,
    compute: &Compute,
    params: &Params,
    rhythm: &Rhythm,
    build: impl Fn(VarBuilder) -> Result<M> + Sync,
    draw: impl Fn(usize) -> Result<B> + Sync,
    loss: impl Fn(&M, &B) -> Result<Tensor> + Sync,
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
    let learn = |batch: &B| -> Result<(Tensor, GradStore)> {
        let worked_out = || -> Result<(Tensor, GradStore)> {
            let loss = loss(&build(params.builder(compute.dtype))?, batch)?;
            Ok((loss.detach(), loss.backward()?))
        };
        worked_out().map_err(|e| e.during("training", "train with a smaller batch"))
    };
    let parts = training.parts.max(1);
    let pools = match parts {
        1 => Vec::new(),
        _ => (0..parts).map(|_| own_thread()).collect::<Result<_>>()?,
    };
    let mut drawn = None;
    while run.state.step < training.steps {
        let step = run.state.step;
        let learned = match pools.is_empty() {
            false => side_by_side(&pools, |part| learn(&draw(step * parts + part)?))?,
            true => {
                let batch = match drawn.take() {
                    Some(batch) => batch,
                    None => draw(step)?,
                };
                let learned = learn(&batch)?;
                // The device works on what it was told while the next batch is made.
                if step + 1 < training.steps {
                    drawn = Some(draw(step + 1)?);
                }
                vec![learned]
            }
        };
        let share = 1.0 / parts as f64;
        let mut mean: Option<Tensor> = None;
        for (loss, gradients) in &learned {
            adam.accumulate(gradients, share)?;
            let loss = (loss * share)?;
            mean = Some(match mean {
                Some(mean) => (mean + loss)?,
                None => loss,
            });
        }
        let norm = adam.step(training.schedule.factor(step))?;
        let Some(loss) = mean else { break };
        if !run.after_step(loss, norm, params, &adam, report)? {
            break;
        }
    }
    Ok(())
}

/// A thread with a pool of its own: operations that would spread over all cores stay on it.
fn own_thread() -> Result<ThreadPool> {
    let pool = ThreadPoolBuilder::new().num_threads(1).build();
    pool.map_err(|e| Error::BadRequest(format!("a thread to train on could not be started: {e}")))
}

/// `work` of 0, 1, ..., each on its thread; the answers in order, or the first error.
fn side_by_side<T: Send>(
    pools: &[ThreadPool],
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let mut threads = Vec::new();
        for (part, pool) in pools.iter().enumerate() {
            threads.push(scope.spawn(move || pool.install(|| work(part))));
        }
        let finish = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(finish).collect()
    })
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
