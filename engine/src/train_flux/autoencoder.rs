//! Training the picture autoencoder on crops of rendered scenes.
//!
//! The loss is the mean absolute error, plus that of the differences between neighbouring
//! pixels (edges matter more to the eye than flats do), plus a little KL divergence that
//! keeps the latents from running away. Crops are enough, since all its layers but the group
//! norms look at small neighbourhoods, and they are four times cheaper than pictures.

use super::training::{self, Training};
use super::{Compute, Report, Rhythm, fresh, latest};
use crate::Result;
use crate::flux::vae::{Config, Vae};
use crate::flux::{init, names};
use crate::optim::Schedule;
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
pub fn run(options: &Options, compute: &Compute, rhythm: &Rhythm, report: Report) -> Result<()> {
    let params = Params::new(options.seed, compute.device.clone());
    let shapes = names::vae_shapes(&options.config);
    fresh(&params, "", &shapes, options.seed)?;
    let training = Training {
        stage: "vae",
        steps: options.steps,
        lr: options.lr,
        schedule: Schedule::Cosine {
            warmup: 50,
            total: options.steps,
            floor: 0.05,
        },
        weight_decay: 0.0,
        beta2: 0.99,
        ema: 0.995,
        parts: 1,
    };
    training::run(
        &training,
        compute,
        &params,
        rhythm,
        |vb| Ok((vb.dtype(), Vae::new(&options.config, vb)?)),
        |step| draw(options, step as u64, &compute.device),
        |(dtype, vae), batch| loss(vae, *dtype, batch, options),
        report,
    )
}

/// A step's pictures, (b, 3, h, w) in -1..1, and the noise of their latents, f32.
struct Batch {
    pictures: Tensor,
    noise: Tensor,
}

fn draw(options: &Options, step: u64, device: &Device) -> Result<Batch> {
    let side = options.crop / options.config.factor();
    let shape = (options.batch, options.config.latent_channels, side, side);
    let count = shape.0 * shape.1 * side * side;
    let noise = Philox::new(options.seed, step << 8 | 1).normals(count);
    Ok(Batch {
        pictures: crops(options, step)?.to_device(device)?,
        noise: Tensor::from_vec(noise, shape, device)?,
    })
}

/// The loss of a step; what is not the network's own is computed in f32.
fn loss(vae: &Vae, dtype: DType, batch: &Batch, options: &Options) -> Result<Tensor> {
    let pictures = &batch.pictures;
    let (mean, log_variance) = vae.posterior(&pictures.to_dtype(dtype)?)?;
    let mean = mean.to_dtype(DType::F32)?;
    let log_variance = log_variance.to_dtype(DType::F32)?;
    let latents = (&mean + ((&log_variance * 0.5)?.exp()? * &batch.noise)?)?;
    let rebuilt = vae.decode(&vae.normalise(&latents)?.to_dtype(dtype)?)?;
    let error = (rebuilt.to_dtype(DType::F32)? - pictures)?;
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

#[cfg(test)]
mod tests {
    use super::training::tests::{apart, curves_apart, gradient};
    use super::*;

    #[test]
    fn in_bf16_gradients_and_losses_are_nearly_those_of_f32() {
        let options = Options {
            config: Config {
                latent_channels: 4,
                block_out_channels: vec![8, 16],
                norm_num_groups: 4,
                mid_block_add_attention: true,
                ..config()
            },
            steps: 30,
            crop: 16,
            size: 32,
            ..Options::shipped()
        };
        let curve = |compute: &Compute| {
            let folder = tempfile::tempdir().unwrap();
            let mut rhythm = Rhythm::usual(folder.path());
            rhythm.report_s = 0.0;
            let mut losses = Vec::new();
            run(&options, compute, &rhythm, &mut |p| {
                losses.push(p.loss);
                true
            })
            .unwrap();
            (losses, latest(folder.path(), "vae").unwrap())
        };
        let (exact, weights) = curve(&Compute::cpu());
        let (rounded, _) = curve(&Compute::on(Device::Cpu, Some("bf16")).unwrap());
        assert!(exact[29] < 0.8 * exact[0], "{exact:?}");
        let worst = curves_apart(&exact, &rounded);
        assert!(worst < 0.02, "losses: {worst}");
        // An absolute error has the slope of a sign, which rounding turns over near nought.
        let batch = draw(&options, 1 << 40, &Device::Cpu).unwrap();
        let at = |dtype| {
            gradient(&weights, dtype, |vb| {
                loss(&Vae::new(&options.config, vb)?, dtype, &batch, &options)
            })
        };
        let worst = apart(&at(DType::F32), &at(DType::BF16));
        assert!(worst < 0.05, "gradient: {worst}");
    }
}
