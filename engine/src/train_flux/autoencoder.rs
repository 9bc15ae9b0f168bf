//! Training the picture autoencoder on crops of rendered scenes.
//!
//! The loss is the mean absolute error, plus that of the differences between neighbouring
//! pixels (edges matter more to the eye than flats do), plus a little KL divergence that
//! keeps the latents from running away. Crops are enough, since all its layers but the group
//! norms look at small neighbourhoods, and they are four times cheaper than pictures.

use super::{Report, Rhythm, Run, fresh, latest};
use crate::Result;
use crate::flux::vae::{Config, Vae};
use crate::flux::{init, names};
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::Params;
use crate::render::{Object, Scene};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::path::Path;

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The network.
    pub config: Config,
    /// Steps in all.
    pub steps: usize,
    /// Crops a step.
    pub batch: usize,
    /// Side of a crop, in pixels.
    pub crop: usize,
    /// Side of the pictures that crops are cut from, in pixels.
    pub size: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Weight of the edge term beside the mean absolute error.
    pub edge_weight: f64,
    /// Weight of the KL divergence.
    pub kl_weight: f64,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// What the shipped autoencoder was trained with.
    pub fn shipped() -> Self {
        Self {
            config: config(),
            steps: 2000,
            batch: 4,
            crop: 64,
            size: 128,
            lr: 2e-3,
            edge_weight: 1.0,
            kl_weight: 1e-6,
            seed: 0,
        }
    }
}

/// The shipped autoencoder: 8 times smaller, 16 channels, no attention (so that crops
/// train it and any size fits).
pub fn config() -> Config {
    Config {
        latent_channels: 16,
        block_out_channels: vec![16, 32, 64, 64],
        layers_per_block: 1,
        norm_num_groups: 8,
        mid_block_add_attention: false,
        scaling_factor: 1.0,
        shift_factor: 0.0,
        ..Config::flux()
    }
}

/// Trains, or goes on training, until the steps are done or `report` says stop.
pub fn run(options: &Options, rhythm: &Rhythm, report: Report) -> Result<()> {
    let params = Params::new(options.seed, Device::Cpu);
    fresh(
        &params,
        "",
        &names::vae_shapes(&options.config),
        options.seed,
    )?;
    let vae = Vae::new(&options.config, params.builder(DType::F32))?;
    let group = Group {
        vars: params.vars(),
        lr: options.lr,
        weight_decay: 0.0,
    };
    let settings = AdamWOptions {
        beta2: 0.99,
        ema: Some(0.995),
        ..AdamWOptions::default()
    };
    let mut adam = AdamW::new(vec![group], settings)?;
    let mut run = Run::open("vae", rhythm, options.steps, &params, &mut adam)?;
    let schedule = Schedule::Cosine {
        warmup: 50,
        total: options.steps,
        floor: 0.05,
    };
    while run.state.step < options.steps {
        let step = run.state.step;
        let pictures = crops(options, step as u64)?;
        let loss = loss(&vae, &pictures, options, step as u64)?;
        let gradients = loss.backward()?;
        adam.accumulate(&gradients, 1.0)?;
        let norm = adam.step(schedule.factor(step))?;
        let loss = f64::from(loss.to_scalar::<f32>()?);
        if !run.after_step(loss, norm, &params, &adam, report)? {
            break;
        }
    }
    Ok(())
}

fn loss(vae: &Vae, pictures: &Tensor, options: &Options, step: u64) -> Result<Tensor> {
    let (mean, log_variance) = vae.posterior(pictures)?;
    let noise = Philox::new(options.seed, step << 8 | 1).normals(mean.elem_count());
    let noise = Tensor::from_vec(noise, mean.shape(), &Device::Cpu)?;
    let latents = (&mean + ((&log_variance * 0.5)?.exp()? * noise)?)?;
    let rebuilt = vae.decode(&vae.normalise(&latents)?)?;
    let error = (rebuilt - pictures)?;
    let (_, _, h, w) = error.dims4()?;
    let across = (error.narrow(3, 1, w - 1)? - error.narrow(3, 0, w - 1)?)?;
    let down = (error.narrow(2, 1, h - 1)? - error.narrow(2, 0, h - 1)?)?;
    let edges = (across.abs()?.mean_all()? + down.abs()?.mean_all()?)?;
    // -1/2 Σ (1 + log σ² - μ² - σ²), a mean over the batch.
    let kl = ((mean.sqr()? + log_variance.exp()?)? - (log_variance + 1.0)?)?;
    let kl = (kl.sum_all()? * (0.5 * options.kl_weight / pictures.dim(0)? as f64))?;
    Ok(((error.abs()?.mean_all()? + (edges * options.edge_weight)?)? + kl)?)
}

/// The crops of a step, (batch, 3, crop, crop) in -1..1: four from each picture, half of
/// the pictures being before and half after an edit.
fn crops(options: &Options, step: u64) -> Result<Tensor> {
    let Options { crop, size, .. } = *options;
    let mut random = Philox::new(options.seed, step << 8);
    let objects = Object::trained();
    let mut values = Vec::with_capacity(options.batch * 3 * crop * crop);
    let mut picture = Vec::new();
    for i in 0..options.batch {
        if i % 4 == 0 {
            let object = objects[random.below(objects.len() as u32) as usize];
            let mut scene = Scene::random(object, random.next_u64());
            if random.uniform() < 0.5 {
                let edit = scene.random_edit(3, &mut random);
                scene = scene.with(&edit);
            }
            picture = scene.render(size);
        }
        let most = (size - crop) as u32 + 1;
        let (x, y) = (random.below(most) as usize, random.below(most) as usize);
        for channel in 0..3 {
            for row in y..y + crop {
                let at = |column: usize| picture[(row * size + column) * 3 + channel];
                values.extend((x..x + crop).map(|column| f32::from(at(column)) / 127.5 - 1.0));
            }
        }
    }
    Ok(Tensor::from_vec(
        values,
        (options.batch, 3, crop, crop),
        &Device::Cpu,
    )?)
}

/// A batch of rendered pictures, (b, 3, size, size) in -1..1.
pub fn pictures(scenes: &[Scene], size: usize) -> Result<Tensor> {
    let mut values = Vec::with_capacity(scenes.len() * 3 * size * size);
    for scene in scenes {
        let picture = scene.render(size);
        for channel in 0..3 {
            let one = picture.iter().skip(channel).step_by(3);
            values.extend(one.map(|v| f32::from(*v) / 127.5 - 1.0));
        }
    }
    Ok(Tensor::from_vec(
        values,
        (scenes.len(), 3, size, size),
        &Device::Cpu,
    )?)
}

/// Scenes to measure latents on: before and after edits, all trained objects.
pub fn sample_scenes(count: usize) -> Vec<Scene> {
    let objects = Object::trained();
    let mut random = Philox::new(17, 0);
    (0..count)
        .map(|i| {
            let scene = Scene::random(objects[i % objects.len()], random.next_u64());
            let edit = scene.random_edit(2, &mut random);
            scene.with(&edit)
        })
        .collect()
}

/// The same autoencoder, its shift and scaling set so that latents of rendered pictures have
/// mean 0 and variance 1.
pub fn scaled(vae: Vae) -> Result<Vae> {
    let (latents, _) = vae.posterior(&pictures(&sample_scenes(48), 128)?)?;
    let mean = f64::from(latents.mean_all()?.to_scalar::<f32>()?);
    let spread = (latents - mean)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    Ok(vae.with_scaling(1.0 / f64::from(spread).sqrt().max(1e-6), mean))
}

/// The deep autoencoder of a folder, trained by [`run`].
pub fn trained(folder: &Path, config: &Config) -> Result<Vae> {
    let weights = latest(folder, "vae")?;
    scaled(Vae::new(
        config,
        init::builder(&weights, DType::F32, &Device::Cpu),
    )?)
}
