//! Training the detail decoder ([`crate::flux::detail`]) on edits as the flow makes them.
//!
//! 1. Samples: pairs that the flow never saw are edited with the finished flow and decoded
//!    without detail. A file holds source, that coarse result and what the renderer itself
//!    makes of the edit. Most edits begin not at pure noise but at the noised right result, so
//!    that they show what was asked for with the flow's faults: from edits that miss it the
//!    network would learn to keep the source.
//! 2. The network learns to turn coarse result and source into the right one. What it learns is
//!    where edges run and what the flow's faults look like; what the edit *is* it can only read
//!    off the coarse result.
//!
//! The loss is the mean absolute error, plus that of the means of 8×8 pixels, plus a little of
//! that of the differences between neighbouring pixels; pixels that the edit changes count five
//! times. With edges at full weight the network keeps the source's look wherever the flow was
//! unsure, since a sharp wrong picture then costs less than a soft right one.

use super::training::{self, Training};
use super::{Compute, Report, Rhythm, WEIGHTS, fresh, latest, part_of, prepared};
use crate::flux::detail::{Detail, shapes};
use crate::flux::init;
use crate::params::{Params, load_tensors, save_tensors, write_whole};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::path::{Path, PathBuf};

/// What its weights' names begin with.
const PREFIX: &str = "detail.";

/// The seed of its pairs, another than the flow's.
pub const SEED: u64 = 41;

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The network's widths.
    pub widths: Vec<usize>,
    /// An exported autoencoder whose network to begin with.
    pub from: Option<PathBuf>,
    /// Steps in all.
    pub steps: usize,
    /// Pictures a step.
    pub batch: usize,
    /// Micro-batches that they come in; see [`super::flow::Options::parts`].
    pub parts: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// How often there is no source.
    pub drop_source: f32,
    /// How often the coarse picture is a share of the way to the right one: the flow is
    /// better on some pictures than on others, and may yet be trained on.
    pub better: f32,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// What the shipped one was trained with.
    pub fn shipped() -> Self {
        Self {
            widths: crate::flux::detail::WIDTHS.to_vec(),
            from: None,
            steps: 6000,
            batch: 8,
            parts: 1,
            lr: 2e-3,
            drop_source: 0.1,
            better: 0.15,
            seed: 6,
        }
    }
}

/// Edits, 8 bits a channel: (n, h, w, 3) each.
pub struct Samples {
    /// Before.
    pub source: Tensor,
    /// After, by the flow, decoded without detail.
    pub coarse: Tensor,
    /// After, by the renderer.
    pub target: Tensor,
}

impl Samples {
    /// Every `samples*.safetensors` of a folder.
    ///
    /// # Errors
    /// If there is none, or one is damaged.
    pub fn open_all(folder: &Path) -> Result<Self> {
        let files = prepared(folder, "samples", "make samples first")?;
        let mut parts: [Vec<Tensor>; 3] = Default::default();
        for file in &files {
            let mut found = load_tensors(file, &Device::Cpu)?;
            for (all, name) in parts.iter_mut().zip(["source", "coarse", "target"]) {
                let one = found.remove(name).ok_or_else(|| {
                    Error::bad_model(file.display().to_string(), format!("{name} is missing"))
                })?;
                all.push(one);
            }
        }
        let [source, coarse, target] = parts;
        Ok(Self {
            source: Tensor::cat(&source, 0)?,
            coarse: Tensor::cat(&coarse, 0)?,
            target: Tensor::cat(&target, 0)?,
        })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.source.dim(0).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One step's pictures, (b, 3, h, w) in -1..1.
struct Batch {
    source: Tensor,
    coarse: Tensor,
    target: Tensor,
}

fn batch(options: &Options, samples: &Samples, step: u64, device: &Device) -> Result<Batch> {
    let mut random = Philox::new(options.seed, step);
    let b = options.batch;
    let rows: Vec<u32> = (0..b).map(|_| random.below(samples.len() as u32)).collect();
    let rows = Tensor::from_vec(rows, b, &Device::Cpu)?;
    let turned = random.uniform() < 0.5;
    let of = |all: &Tensor| -> Result<Tensor> {
        let some = all.index_select(&rows, 0)?.to_dtype(DType::F32)?;
        let some = ((some / 127.5)? - 1.0)?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        Ok(match turned {
            true => some.flip(&[3])?.contiguous()?,
            false => some,
        })
    };
    let shares = |random: &mut Philox, p: f32, of: &dyn Fn(f32) -> f32| -> Result<Tensor> {
        let all: Vec<f32> = (0..b)
            .map(|_| match random.uniform() < p {
                true => of(random.uniform()),
                false => 0.0,
            })
            .collect();
        Ok(Tensor::from_vec(all, (b, 1, 1, 1), &Device::Cpu)?)
    };
    let target = of(&samples.target)?;
    let coarse = of(&samples.coarse)?;
    let source = of(&samples.source)?;
    let better = shares(&mut random, options.better, &|u| u)?;
    let coarse = (&coarse + (&target - &coarse)?.broadcast_mul(&better)?)?;
    let missing = shares(&mut random, options.drop_source, &|_| 1.0)?;
    let source = (&source + (&coarse - &source)?.broadcast_mul(&missing)?)?;
    Ok(Batch {
        source: source.to_device(device)?,
        coarse: coarse.to_device(device)?,
        target: target.to_device(device)?,
    })
}

fn loss(detail: &Detail, batch: &Batch) -> Result<Tensor> {
    let made = detail.forward(&batch.coarse, &batch.source)?;
    let changed = (&batch.target - &batch.source)?.abs()?.max_keepdim(1)?;
    let weight = ((changed.gt(0.08)?.to_dtype(DType::F32)? * 4.0)? + 1.0)?; // (b, 1, h, w)
    let error = (made - &batch.target)?.broadcast_mul(&weight)?;
    let look = error.avg_pool2d(8)?.abs()?.mean_all()?;
    let (_, _, h, w) = error.dims4()?;
    let across = (error.narrow(3, 1, w - 1)? - error.narrow(3, 0, w - 1)?)?;
    let down = (error.narrow(2, 1, h - 1)? - error.narrow(2, 0, h - 1)?)?;
    let edges = (across.abs()?.mean_all()? + down.abs()?.mean_all()?)?;
    Ok(((error.abs()?.mean_all()? + look)? + (edges * 0.15)?)?)
}

/// Adds a run's averaged network to the autoencoder in `vae`, in half precision; one that is
/// there already is replaced.
///
/// # Errors
/// If the run has no checkpoint, or the folder holds no autoencoder.
pub fn export(run: &Path, widths: &[usize], vae: &Path) -> Result<()> {
    let (weights, config) = (vae.join(WEIGHTS), vae.join("config.json"));
    let mut all = load_tensors(&weights, &Device::Cpu)?;
    all.retain(|name, _| !name.starts_with("decoder.detail."));
    for (name, value) in latest(run, "detail")? {
        all.insert(format!("decoder.{name}"), value.to_dtype(DType::F16)?);
    }
    let all: Vec<_> = all.into_iter().collect();
    save_tensors(&weights, &all, &[("format", "pt".into())])?;
    let text = std::fs::read(&config).map_err(Error::io(&config))?;
    let bad = |e: serde_json::Error| Error::bad_model(config.display().to_string(), e.to_string());
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(bad)?;
    json["detail"] = widths.into();
    write_whole(&config, &serde_json::to_vec_pretty(&json).map_err(bad)?)
}

/// Adds to the logit of how much of the source the exported network of the autoencoder in `vae`
/// takes over, everywhere alike. It learns that share from one flow's edits; beside a flow that
/// has become surer, it takes over too much where that flow changed the picture.
///
/// # Errors
/// If the folder holds no autoencoder with such a network.
pub fn shift_source_share(vae: &Path, by: f64) -> Result<()> {
    const BIAS: &str = "decoder.detail.conv_out.bias";
    let weights = vae.join(WEIGHTS);
    let mut all = load_tensors(&weights, &Device::Cpu)?;
    let Some(bias) = all.get(BIAS) else {
        let reason = format!("has no {BIAS}: expected an autoencoder with a detail network");
        return Err(Error::bad_model(weights.display().to_string(), reason));
    };
    let (change, share) = (bias.narrow(0, 0, 12)?, bias.narrow(0, 12, 4)?);
    let share = share.to_dtype(DType::F32)?.affine(1.0, by)?;
    let bias = Tensor::cat(&[change, share.to_dtype(bias.dtype())?], 0)?;
    all.insert(BIAS.into(), bias);
    let all: Vec<_> = all.into_iter().collect();
    save_tensors(&weights, &all, &[("format", "pt".into())])
}

/// Trains, or goes on training, until the steps are done or `report` says stop.
///
/// # Errors
/// If there are no samples, or a checkpoint cannot be written.
pub fn run(
    options: &Options,
    samples: &Samples,
    compute: &Compute,
    rhythm: &Rhythm,
    report: Report,
) -> Result<()> {
    if samples.is_empty() {
        return Err(Error::BadRequest(
            "there are no samples to train on: make some".into(),
        ));
    }
    let part = Options {
        batch: part_of(options.batch, options.parts)?,
        ..options.clone()
    };
    let params = Params::new(options.seed, compute.device.clone());
    let shapes = shapes(&options.widths, PREFIX);
    match &options.from {
        None => fresh(&params, "", &shapes, options.seed)?,
        Some(vae) => {
            let all = load_tensors(&vae.join(WEIGHTS), &Device::Cpu)?;
            let vb = init::builder(&all, DType::F32, &Device::Cpu).pp("decoder");
            for (name, shape) in shapes {
                params.insert(name.clone(), &vb.get(shape, &name)?)?;
            }
        }
    }
    let training = Training {
        parts: options.parts,
        ..Training::cosine("detail", options.steps, options.lr)
    };
    training::run(
        &training,
        compute,
        &params,
        rhythm,
        |vb| Detail::new(&options.widths, vb.pp("detail")),
        |n| batch(&part, samples, n as u64, &compute.device),
        loss,
        report,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Object, Scene};
    use std::collections::BTreeMap;

    /// Edits of plain scenes to another colour, the coarse ones in blocks of 8 pixels.
    fn samples(count: u64) -> Samples {
        let (mut source, mut coarse, mut target) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..count {
            let mut random = Philox::new(3, i);
            let scene = Scene::random(Object::ALL[i as usize % Object::ALL.len()], i);
            let edit = scene.random_edit(1, &mut random);
            let after = scene.clone().with(&edit).render(32);
            source.extend(scene.render(32));
            for at in 0..after.len() {
                let (pixel, channel) = (at / 3, at % 3);
                let (y, x) = (pixel / 32 / 8 * 8 + 4, pixel % 32 / 8 * 8 + 4);
                coarse.push(after[(y * 32 + x) * 3 + channel]);
            }
            target.extend(after);
        }
        let of = |all| Tensor::from_vec(all, (count as usize, 32, 32, 3), &Device::Cpu).unwrap();
        Samples {
            source: of(source),
            coarse: of(coarse),
            target: of(target),
        }
    }

    #[test]
    fn the_share_of_the_source_is_shifted_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("diffusion_pytorch_model.safetensors");
        let name = "decoder.detail.conv_out.bias".to_string();
        let before = Tensor::arange(0f32, 16.0, &Device::Cpu).unwrap();
        save_tensors(&file, &[(name.clone(), before.clone())], &[]).unwrap();
        shift_source_share(folder.path(), -1.5).unwrap();
        let after = load_tensors(&file, &Device::Cpu).unwrap()[&name].clone();
        let moved: Vec<f32> = (after - before).unwrap().to_vec1().unwrap();
        assert!(
            moved
                .iter()
                .enumerate()
                .all(|(i, m)| *m == if i < 12 { 0.0 } else { -1.5 })
        );
        save_tensors(
            &file,
            &[(
                "other".into(),
                Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap(),
            )],
            &[],
        )
        .unwrap();
        let refused = shift_source_share(folder.path(), -1.5).unwrap_err();
        assert!(refused.to_string().contains("detail network"), "{refused}");
    }

    #[test]
    fn a_few_steps_bring_blocks_nearer_to_the_right_picture_and_resume_exactly() {
        let samples = samples(48);
        let options = Options {
            widths: vec![16, 16, 16],
            steps: 120,
            batch: 8,
            ..Options::shipped()
        };
        let measure = |weights: &BTreeMap<String, Tensor>| -> f32 {
            let vb = crate::flux::init::builder(weights, DType::F32, &Device::Cpu);
            let detail = Detail::new(&options.widths, vb.pp("detail")).unwrap();
            let fresh = batch(&options, &samples, 1 << 50, &Device::Cpu).unwrap();
            loss(&detail, &fresh).unwrap().to_scalar().unwrap()
        };
        let start = crate::flux::init::random(&shapes(&options.widths, PREFIX), 6, &Device::Cpu);
        let start = start.unwrap();
        let cpu = Compute::cpu();
        let folder = tempfile::tempdir().unwrap();
        let rhythm = Rhythm::usual(folder.path());
        run(&options, &samples, &cpu, &rhythm, &mut |_| true).unwrap();
        let whole = latest(folder.path(), "detail").unwrap();
        let (before, after) = (measure(&start), measure(&whole));
        assert!(after < 0.9 * before, "loss {before} before, {after} after");
        // What was exported can be begun with.
        let vae = tempfile::tempdir().unwrap();
        save_tensors(&vae.path().join(WEIGHTS), &[], &[]).unwrap();
        std::fs::write(vae.path().join("config.json"), "{}").unwrap();
        export(folder.path(), &options.widths, vae.path()).unwrap();
        let onwards = Options {
            from: Some(vae.path().into()),
            steps: 4,
            lr: 0.0,
            parts: 2,
            ..options.clone()
        };
        let next = tempfile::tempdir().unwrap();
        let still = Rhythm::usual(next.path());
        run(&onwards, &samples, &cpu, &still, &mut |_| true).unwrap();
        let still = measure(&latest(next.path(), "detail").unwrap());
        assert!((still - after).abs() < 1e-3 * after, "{still} {after}");
        let folder = tempfile::tempdir().unwrap();
        let mut rhythm = Rhythm::usual(folder.path());
        rhythm.report_s = 0.0;
        run(&options, &samples, &cpu, &rhythm, &mut |p| p.step < 25).unwrap();
        run(&options, &samples, &cpu, &rhythm, &mut |_| true).unwrap();
        let resumed = latest(folder.path(), "detail").unwrap();
        for ((name, a), (_, b)) in whole.iter().zip(&resumed) {
            let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(a), values(b), "{name}");
        }
    }
}
