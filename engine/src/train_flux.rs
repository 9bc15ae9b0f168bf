//! Training the small Flux on the renderer's pictures, in stages that each resume exactly where
//! they stopped.
//!
//! 1. [`autoencoder`]: pictures to latents and back.
//! 2. [`pairs`]: before/after pairs, encoded once and kept in a file, since the autoencoder
//!    costs more than a training step of the transformer.
//! 3. [`flow`]: transformer and ControlNet, as a rectified flow. The ControlNet sees the
//!    edges of the *source* (mode canny) or the source itself (mode tile), the text asks for
//!    the edit or names the result, and the target is the edited picture.
//! 4. [`detail`]: the end of the decoder, which brings the source's detail into an edit.
//! 5. [`guidance`], where wanted: the guidance scale becomes an input, so that a step runs the
//!    transformer once instead of twice.
//!
//! What step n trains on is a pure function of the seed and n, drawn on the CPU whatever the
//! device ([`Compute`]), so a checkpoint is weights, moments and a number. Not here: sampling
//! with the trained model ([`crate::sampler`]).

pub mod autoencoder;
pub mod detail;
pub mod flow;
pub mod guidance;
pub mod pairs;
pub mod patches;
pub(crate) mod training;

use crate::flux::names::NameAndShape;
use crate::flux::{init, names};
use crate::optim::AdamW;
use crate::params::{Params, load_tensors, save_tensors, write_whole};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What diffusers calls the file of a model's weights.
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// Where a run computes, and in what.
#[derive(Clone, Debug)]
pub struct Compute {
    /// The device of weights, moments and batches.
    pub device: Device,
    /// The dtype that networks compute in, f32 or bf16. Weights, moments, averages and losses
    /// are f32 whatever it is.
    pub dtype: DType,
}

impl Compute {
    /// f32 on the CPU: the same bytes every time.
    pub fn cpu() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
        }
    }

    /// On this device in what `word` says, "f32" or "bf16"; `None`: f32 on a CPU, bf16 on a GPU.
    ///
    /// # Errors
    /// For other words. (f16 would need its losses scaled.) A card too old for bf16, below compute
    /// capability 8.0, says so at the first step.
    pub fn on(device: Device, word: Option<&str>) -> Result<Self> {
        let dtype = match word {
            None if device.is_cpu() => DType::F32,
            None | Some("bf16") => DType::BF16,
            Some("f32") => DType::F32,
            Some(other) => {
                return Err(Error::BadRequest(format!(
                    "dtype: expected f32 or bf16, got {other:?}"
                )));
            }
        };
        Ok(Self { device, dtype })
    }
}

/// Where a run stands, told once every few seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Which stage.
    pub stage: String,
    /// Steps done, over all sessions of this run.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// The mean loss since the last report.
    pub loss: f64,
    /// The gradient's norm at the last step.
    pub gradient: f64,
    /// Seconds trained, over all sessions of this run.
    pub seconds: f64,
    /// Seconds still to go at the pace of this session.
    pub seconds_left: f64,
}

/// Called with every report; `false` stops the run after a checkpoint.
pub type Report<'a> = &'a mut dyn FnMut(&Progress) -> bool;

/// How often a run reports and saves, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Rhythm {
    /// The folder of checkpoints and metrics.
    pub folder: PathBuf,
    /// Seconds between checkpoints.
    pub checkpoint_s: f64,
    /// Seconds between reports.
    pub report_s: f64,
}

impl Rhythm {
    /// Checkpoints every two minutes, reports every ten seconds.
    pub fn usual(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            checkpoint_s: 120.0,
            report_s: 10.0,
        }
    }
}

/// The state of one run: what a checkpoint holds besides weights and moments.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct State {
    step: usize,
    seconds: f64,
}

/// A training loop's clock, files and reports.
struct Run<'a> {
    stage: &'static str,
    rhythm: &'a Rhythm,
    state: State,
    steps: usize,
    begun: Instant,
    begun_at: State,
    reported: Instant,
    saved: Instant,
    /// Since the last report; on the device, so that a step need not wait for it.
    losses: Vec<Tensor>,
}

impl<'a> Run<'a> {
    /// Goes on from the checkpoint in the folder, if there is one.
    fn open(
        stage: &'static str,
        rhythm: &'a Rhythm,
        steps: usize,
        params: &Params,
        adam: &mut AdamW,
    ) -> Result<Self> {
        let state_file = rhythm.folder.join(format!("{stage}.json"));
        let mut state = State::default();
        if state_file.exists() {
            let text = std::fs::read(&state_file).map_err(Error::io(&state_file))?;
            state = serde_json::from_slice(&text)
                .map_err(|e| Error::bad_model(state_file.display().to_string(), e.to_string()))?;
            let folder = checkpoint_folder(rhythm, stage, state.step);
            params.load(&folder.join("weights.safetensors"))?;
            adam.load(&folder.join("moments.safetensors"))?;
        }
        let now = Instant::now();
        Ok(Self {
            stage,
            rhythm,
            state,
            steps,
            begun: now,
            begun_at: state,
            reported: now,
            saved: now,
            losses: Vec::new(),
        })
    }

    /// Books one step; saves and reports when it is time. `false`: stop.
    fn after_step(
        &mut self,
        loss: Tensor,
        gradient: f64,
        params: &Params,
        adam: &AdamW,
        report: Report,
    ) -> Result<bool> {
        self.state.step += 1;
        self.state.seconds = self.begun_at.seconds + self.begun.elapsed().as_secs_f64();
        self.losses.push(loss);
        let done = self.state.step >= self.steps;
        let due = |since: Instant, every: f64| since.elapsed() > Duration::from_secs_f64(every);
        let save = done || due(self.saved, self.rhythm.checkpoint_s);
        let mut go_on = true;
        if save || due(self.reported, self.rhythm.report_s) {
            go_on = self.tell(gradient, report)?;
        }
        if save || !go_on {
            self.save(params, adam)?;
        }
        Ok(go_on && !done)
    }

    fn tell(&mut self, gradient: f64, report: Report) -> Result<bool> {
        let losses = Tensor::stack(&self.losses, 0)?.to_vec1::<f32>()?;
        let first = self.state.step - losses.len();
        if let Some(i) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::BadRequest(format!(
                "step {}: the loss is {}; lower the learning rate and resume from the last \
                 checkpoint in {}",
                first + i,
                losses[i],
                self.rhythm.folder.display()
            )));
        }
        let here = (self.state.step - self.begun_at.step).max(1) as f64;
        let pace = self.begun.elapsed().as_secs_f64() / here;
        let progress = Progress {
            stage: self.stage.into(),
            step: self.state.step,
            steps: self.steps,
            loss: losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() / losses.len() as f64,
            gradient,
            seconds: self.state.seconds,
            seconds_left: pace * self.steps.saturating_sub(self.state.step) as f64,
        };
        self.losses.clear();
        self.reported = Instant::now();
        append_line(&self.rhythm.folder.join("metrics.jsonl"), &progress)?;
        Ok(report(&progress))
    }

    /// The new checkpoint is whole before the state names it; then older ones go.
    fn save(&mut self, params: &Params, adam: &AdamW) -> Result<()> {
        let folder = checkpoint_folder(self.rhythm, self.stage, self.state.step);
        params.save(&folder.join("weights.safetensors"), DType::F32, &[])?;
        adam.save(&folder.join("moments.safetensors"))?;
        let averages = adam.averages()?;
        if !averages.is_empty() {
            save_tensors(&folder.join("average.safetensors"), &averages, &[])?;
        }
        let text = serde_json::to_vec(&self.state).unwrap_or_default();
        write_whole(
            &self.rhythm.folder.join(format!("{}.json", self.stage)),
            &text,
        )?;
        let prefix = format!("{}-", self.stage);
        let entries =
            std::fs::read_dir(&self.rhythm.folder).map_err(Error::io(&self.rhythm.folder))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) && entry.path() != folder {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        self.saved = Instant::now();
        Ok(())
    }
}

fn checkpoint_folder(rhythm: &Rhythm, stage: &str, step: usize) -> PathBuf {
    rhythm.folder.join(format!("{stage}-{step}"))
}

fn append_line(path: &Path, line: &impl Serialize) -> Result<()> {
    use std::io::Write;
    let text = serde_json::to_string(line).unwrap_or_default();
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(Error::io(path))?;
    writeln!(file, "{text}").map_err(Error::io(path))
}

/// The safetensors files of a folder whose names begin with `prefix`, by name; at least one.
fn prepared(folder: &Path, prefix: &str, help: &str) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(prefix) && name.ends_with(".safetensors")
        })
        .collect();
    files.sort();
    match files.is_empty() {
        true => Err(Error::MissingModel {
            path: folder.join(format!("{prefix}.safetensors")),
            help: help.into(),
        }),
        false => Ok(files),
    }
}

/// Fresh parameters for these weights, under a prefix.
fn fresh(params: &Params, prefix: &str, shapes: &[NameAndShape], seed: u64) -> Result<()> {
    for (name, value) in init::random(shapes, seed, &Device::Cpu)? {
        params.insert(format!("{prefix}{name}"), &value)?;
    }
    Ok(())
}

/// How many of a step's samples each of its micro-batches has.
fn part_of(batch: usize, parts: usize) -> Result<usize> {
    let parts = parts.max(1);
    match batch % parts {
        0 => Ok(batch / parts),
        _ => Err(Error::BadRequest(format!(
            "a batch of {batch} cannot be divided into {parts} parts of one size"
        ))),
    }
}

/// The averaged weights of a stage's latest checkpoint (or, where none are kept, the weights).
///
/// # Errors
/// If the stage has no checkpoint yet.
pub fn latest(folder: &Path, stage: &str) -> Result<BTreeMap<String, Tensor>> {
    let state_file = folder.join(format!("{stage}.json"));
    let text = std::fs::read(&state_file).map_err(|_| Error::MissingModel {
        path: state_file.clone(),
        help: format!("train the stage {stage} first"),
    })?;
    let state: State = serde_json::from_slice(&text)
        .map_err(|e| Error::bad_model(state_file.display().to_string(), e.to_string()))?;
    let at = folder.join(format!("{stage}-{}", state.step));
    let average = at.join("average.safetensors");
    match average.exists() {
        true => load_tensors(&average, &Device::Cpu),
        false => load_tensors(&at.join("weights.safetensors"), &Device::Cpu),
    }
}

/// Writes weights in half precision under diffusers' names, with the config beside them.
///
/// # Errors
/// If a weight has another shape than its name asks for, or a file cannot be written.
pub fn export(
    folder: &Path,
    kind: names::Kind,
    levels: usize,
    ours: &BTreeMap<String, Tensor>,
    config: &impl Serialize,
    class: &str,
) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, value) in ours {
        let recipe = names::recipe(kind, names::Naming::Diffusers, levels, name);
        let rows = value.dim(0)?;
        let heights: Vec<usize> = match recipe.join {
            names::Join::Rows(parts) => {
                let total: usize = parts.iter().sum();
                parts.iter().map(|part| rows * part / total).collect()
            }
            names::Join::Same | names::Join::SwapHalves => vec![rows],
        };
        let value = match recipe.join {
            names::Join::SwapHalves => {
                let half = rows / 2;
                Tensor::cat(
                    &[value.narrow(0, half, half)?, value.narrow(0, 0, half)?],
                    0,
                )?
            }
            _ => value.clone(),
        };
        let mut start = 0;
        for (part, height) in recipe.parts.into_iter().zip(heights) {
            let mut tensor = value.narrow(0, start, height)?;
            if kind == names::Kind::Vae && part.contains(".attentions.") && tensor.rank() == 4 {
                tensor = tensor.flatten_from(1)?;
            }
            tensors.push((part, tensor.to_dtype(DType::F16)?));
            start += height;
        }
    }
    save_tensors(&folder.join(WEIGHTS), &tensors, &[("format", "pt".into())])?;
    let mut json = serde_json::to_value(config)
        .map_err(|e| Error::BadRequest(format!("the config cannot be written: {e}")))?;
    if let Some(fields) = json.as_object_mut() {
        fields.insert("_class_name".into(), class.into());
    }
    let text = serde_json::to_vec_pretty(&json).unwrap_or_default();
    write_whole(&folder.join("config.json"), &text)
}

/// Writes pictures (b, 3, h, w) in -1..1 as a PNG, `across` in a row.
///
/// # Errors
/// If a value is not a number, or the file cannot be written.
pub fn save_grid(path: &Path, pictures: &Tensor, across: usize) -> Result<()> {
    let all = crate::picture::Picture::from_tensor(pictures)?;
    let (_, _, h, w) = pictures.dims4()?;
    let across = across.max(1);
    let (wide, high) = ((across * w) as u32, (all.len().div_ceil(across) * h) as u32);
    let mut sheet = crate::picture::Picture::filled(wide, high, [255; 3]);
    for (i, picture) in all.iter().enumerate() {
        for y in 0..h {
            let to = (((i / across) * h + y) * wide as usize + (i % across) * w) * 3;
            let from = y * w * 3;
            sheet.rgb[to..to + 3 * w].copy_from_slice(&picture.rgb[from..from + 3 * w]);
        }
    }
    write_whole(path, &sheet.to_png(&[])?)
}
