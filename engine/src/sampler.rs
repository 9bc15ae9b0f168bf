//! From noise (or a noised picture) to latents: the schedule, the one Euler loop, and the
//! ways to edit that run on it.
//!
//! Flux is a rectified flow: x_σ = (1-σ)·x_0 + σ·ε, and the network's velocity is dx/dσ. All
//! ways to edit follow that velocity from a start σ down to 0 and differ in where they start
//! and what they add to it:
//!
//! - [`generate`]: from pure noise; with a ControlNet on the source's edges this is the
//!   paper's edit, `canny`.
//! - [`img2img`]: from the noised source (SDEdit, arXiv 2108.01073), with or without control.
//! - [`rf_inversion`]: the source is first taken up to noise by a controlled flow, then down
//!   again, drawn to the source for the first steps (arXiv 2410.10792).
//! - [`flowedit`]: no inversion; the source is moved by the difference of two velocities
//!   (arXiv 2412.08629).
//!
//! Latents are f32 here whatever the network computes in: rounding them to bf16 at each of
//! sixty small steps loses detail. Noise is drawn on the host from (seed, picture), so that
//! picture 3 of a batch is picture 3 alone, on every device. What does not change from step to
//! step (text, positions, modulations of all steps, control) is computed once, in [`Field`].
//!
//! Pictures, words and models are not opened here; see [`crate::edit`].

use crate::flux::controlnet::{Control, ControlNet, Prepared};
use crate::flux::transformer::{
    Cache, FluxTransformer, Modulation, Modulator, Residuals, Rope, image_ids, text_ids,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use simpatico_schema::random::Philox;
use std::sync::atomic::{AtomicBool, Ordering};

// ------------------------------------------------------------------------------ schedule

/// How noise levels are spread, with the field names of diffusers' `scheduler_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScheduleConfig {
    /// Whether the shift depends on the number of tokens (dev) or is `shift` (schnell).
    pub use_dynamic_shifting: bool,
    /// The fixed shift factor, where it is fixed.
    pub shift: f64,
    /// log of the shift factor at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// log of the shift factor at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// Fewest image tokens.
    pub base_image_seq_len: usize,
    /// Most image tokens; beyond, the line goes on.
    pub max_image_seq_len: usize,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::dev()
    }
}

impl ScheduleConfig {
    /// FLUX.1-dev.
    pub fn dev() -> Self {
        Self {
            use_dynamic_shifting: true,
            shift: 3.0,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
        }
    }

    /// FLUX.1-schnell.
    pub fn schnell() -> Self {
        Self {
            use_dynamic_shifting: false,
            shift: 1.0,
            ..Self::dev()
        }
    }

    /// The factor by which odds σ/(1-σ) are multiplied for a picture of so many tokens.
    pub fn factor(&self, tokens: usize) -> f64 {
        if !self.use_dynamic_shifting {
            return self.shift;
        }
        let span = self.max_image_seq_len as f64 - self.base_image_seq_len as f64;
        let slope = (self.max_shift - self.base_shift) / span;
        let mu = tokens as f64 * slope + (self.base_shift - slope * self.base_image_seq_len as f64);
        mu.exp()
    }
}

/// The noise levels of a sampling run: one before each step, and 0 at the end.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Falling (for an inversion rising) noise levels, one more than there are steps.
    pub sigmas: Vec<f32>,
}

impl Schedule {
    /// `steps` steps from noise level `start` (1 = pure noise) to 0 for a picture of `tokens`
    /// tokens. All steps are kept whatever the start: they only get shorter.
    ///
    /// # Errors
    /// For 0 or more than 1,000 steps, and a start outside (0, 1].
    pub fn from_level(
        config: &ScheduleConfig,
        steps: usize,
        tokens: usize,
        start: f64,
    ) -> Result<Self> {
        if !(1..=1000).contains(&steps) {
            return Err(Error::BadRequest(format!(
                "steps: expected 1 to 1000, got {steps}"
            )));
        }
        if !(start > 0.0 && start <= 1.0) {
            return Err(Error::BadRequest(format!(
                "noise level: expected above 0 and at most 1, got {start}"
            )));
        }
        let factor = config.factor(tokens);
        // The level that the shift takes to `start`, then equal steps down to 0.
        let first = start / (start + factor * (1.0 - start));
        let shifted = |i: usize| {
            let sigma = first * (1.0 - i as f64 / steps as f64);
            factor * sigma / (factor * sigma + 1.0 - sigma)
        };
        Ok(Self {
            sigmas: (0..=steps).map(|i| shifted(i) as f32).collect(),
        })
    }

    /// From pure noise.
    pub fn full(config: &ScheduleConfig, steps: usize, tokens: usize) -> Result<Self> {
        Self::from_level(config, steps, tokens, 1.0)
    }

    /// The noise level at which `strength` starts: where a full schedule stands after
    /// skipping the first 1 - strength of its steps. Far from linear, because of the shift:
    /// 0.3 of a 1024² picture is a level of 0.58.
    pub fn level_of_strength(config: &ScheduleConfig, tokens: usize, strength: f64) -> f64 {
        let factor = config.factor(tokens);
        factor * strength / (factor * strength + 1.0 - strength)
    }

    /// As diffusers' img2img counts: the last `steps · strength` of the steps of a full
    /// schedule, so that a lower strength runs fewer steps.
    pub fn cut(&self, strength: f64) -> Self {
        let n = self.steps();
        let run = (n as f64 * strength).min(n as f64);
        let first = (n as f64 - run).max(0.0) as usize;
        Self {
            sigmas: self.sigmas[first.min(n)..].to_vec(),
        }
    }

    /// The same levels from 0 up, for an inversion.
    pub fn rising(&self) -> Self {
        Self {
            sigmas: self.sigmas.iter().rev().copied().collect(),
        }
    }

    /// The part from step `first` on.
    pub fn from_step(&self, first: usize) -> Self {
        Self {
            sigmas: self.sigmas[first.min(self.steps())..].to_vec(),
        }
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.sigmas.len().saturating_sub(1)
    }

    /// The first noise level.
    pub fn start(&self) -> f32 {
        self.sigmas.first().copied().unwrap_or(0.0)
    }
}

// --------------------------------------------------------------------------------- noise

/// Standard normal noise, f32, (pictures, …shape): that of picture i depends on `seed`,
/// `pictures[i]` and `draw` alone. Drawn on the host, then moved.
pub fn noise(
    seed: u64,
    pictures: &[u32],
    draw: u32,
    shape: &[usize],
    device: &Device,
) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let mut all = Vec::with_capacity(n * pictures.len());
    for &picture in pictures {
        let stream = u64::from(draw) << 32 | u64::from(picture);
        all.extend(Philox::new(seed, stream).normals(n));
    }
    let mut dims = vec![pictures.len()];
    dims.extend(shape);
    Ok(Tensor::from_vec(all, dims, device)?)
}

/// The same for latents (c, h, w), packed into tokens (pictures, n, 4c).
pub fn packed_noise(
    seed: u64,
    pictures: &[u32],
    draw: u32,
    latents: (usize, usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let (c, h, w) = latents;
    crate::flux::transformer::pack(&noise(seed, pictures, draw, &[c, h, w], device)?)
}

// --------------------------------------------------------------------------------- field

/// What a text encoder said.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Token states, (b, t, joint_attention_dim); b may be 1 for a larger batch.
    pub text: Tensor,
    /// Pooled, (b, pooled_projection_dim); b may be 1 for a larger batch.
    pub pooled: Tensor,
}

/// A control picture and how it acts.
#[derive(Clone)]
pub struct ControlInput<'a> {
    /// The network.
    pub net: &'a ControlNet,
    /// Packed latents of the control picture (b, n, c), or the picture itself for XLabs'
    /// layout; b may be 1 for a larger batch.
    pub condition: Tensor,
    /// What the picture is, for a Union.
    pub mode: Option<u32>,
    /// Strength; below 1e-6 in size the network is not run.
    pub scale: f64,
    /// It acts from this share of the steps,
    pub start: f64,
    /// to this one.
    pub end: f64,
}

impl<'a> ControlInput<'a> {
    /// Acting in all steps.
    pub fn new(net: &'a ControlNet, condition: Tensor, mode: Option<u32>, scale: f64) -> Self {
        Self {
            net,
            condition,
            mode,
            scale,
            start: 0.0,
            end: 1.0,
        }
    }

    fn acts(&self, step: usize, steps: usize) -> bool {
        let n = steps as f64;
        self.scale.abs() >= 1e-6
            && step as f64 / n >= self.start
            && (step + 1) as f64 / n <= self.end
    }
}

/// Everything that decides a velocity besides latents and time.
#[derive(Clone)]
pub struct Conditions<'a> {
    /// The transformer.
    pub flux: &'a FluxTransformer,
    /// What to make.
    pub prompt: Prompt,
    /// What not to make; used when `true_cfg` is not 1.
    pub negative: Option<Prompt>,
    /// v = v_negative + true_cfg · (v_prompt - v_negative); 1 runs the prompt alone.
    pub true_cfg: f64,
    /// The guidance scale given to the networks that take one.
    pub guidance: f32,
    /// Control pictures.
    pub controls: Vec<ControlInput<'a>>,
    /// Rows of latent tokens.
    pub rows: usize,
    /// Columns of latent tokens.
    pub columns: usize,
    /// First-block cache threshold; 0 computes every step in full.
    pub cache_threshold: f64,
}

/// Modulations of at most so many (step, picture) pairs are held at a time.
const MODULATIONS_MAX: usize = 512;

/// The modulations of all steps, or the means to make each.
enum Modulations {
    /// (steps · b) rows.
    All { rows: Modulation, b: usize },
    /// Too many to hold.
    Each {
        modulator: std::sync::Arc<Modulator>,
        pooled: Tensor,
        guidance: Option<f32>,
    },
}

impl Modulations {
    fn new(
        modulator: std::sync::Arc<Modulator>,
        pooled: &Tensor,
        guidance: f32,
        times: &[f32],
    ) -> Result<Self> {
        let guidance = modulator.takes_guidance().then_some(guidance);
        let b = pooled.dim(0)?;
        if times.len() * b > MODULATIONS_MAX {
            return Ok(Self::Each {
                modulator,
                pooled: pooled.clone(),
                guidance,
            });
        }
        let pooled = Tensor::cat(&vec![pooled; times.len()], 0)?;
        let rows = modulation(&modulator, &pooled, guidance, times, b)?;
        Ok(Self::All { rows, b })
    }

    fn at(&self, step: usize, time: f32) -> Result<Modulation> {
        match self {
            Self::All { rows, b } => rows.rows(step * b, *b),
            Self::Each {
                modulator,
                pooled,
                guidance,
            } => modulation(modulator, pooled, *guidance, &[time], pooled.dim(0)?),
        }
    }
}

/// The modulation at each of `times` for b pictures, times outermost.
fn modulation(
    modulator: &Modulator,
    pooled: &Tensor,
    guidance: Option<f32>,
    times: &[f32],
    b: usize,
) -> Result<Modulation> {
    let device = pooled.device();
    let times: Vec<f32> = times.iter().flat_map(|t| vec![*t; b]).collect();
    let n = times.len();
    let times = Tensor::from_vec(times, n, device)?;
    let guidance = guidance
        .map(|g| Tensor::from_vec(vec![g; n], n, device))
        .transpose()?;
    modulator.at(&times, guidance.as_ref(), pooled)
}

/// One text conditioning of the transformer.
struct Branch {
    text: Tensor,
    modulations: Modulations,
    cache: Cache,
}

impl Branch {
    fn new(c: &Conditions, prompt: &Prompt, times: &[f32], b: usize) -> Result<Self> {
        let modulator = c.flux.modulator()?;
        Ok(Self {
            text: to_batch(&c.flux.embed_text(&prompt.text)?, b, "the prompt's text")?,
            modulations: Modulations::new(modulator, &prompt.pooled, c.guidance, times)?,
            cache: Cache::new(c.cache_threshold),
        })
    }
}

struct ControlBranch<'a> {
    input: ControlInput<'a>,
    prepared: Prepared,
    modulations: Modulations,
}

/// The velocity of a run's every step: what [`Conditions`] say, with all that does not
/// change from step to step computed.
pub struct Field<'a> {
    flux: &'a FluxTransformer,
    times: Vec<f32>,
    rope: Rope,
    prompt: Branch,
    negative: Option<(Branch, f64)>,
    controls: Vec<ControlBranch<'a>>,
    evaluations: usize,
}

/// x (1 or b, …) as (b, …).
fn to_batch(x: &Tensor, b: usize, what: &str) -> Result<Tensor> {
    match x.dim(0)? {
        n if n == b => Ok(x.clone()),
        1 => Ok(Tensor::cat(&vec![x; b], 0)?),
        n => Err(Error::BadRequest(format!(
            "{what}: expected a batch of 1 or {b}, got {n}"
        ))),
    }
}

impl<'a> Field<'a> {
    /// For b pictures along a schedule.
    ///
    /// # Errors
    /// If batch sizes, channels or modes do not go together.
    pub fn new(c: &Conditions<'a>, schedule: &Schedule, b: usize) -> Result<Self> {
        let device = c.prompt.text.device();
        let times = &schedule.sigmas[..schedule.steps()];
        let ids = image_ids(c.rows, c.columns, device)?;
        let rope_for = |prompt: &Prompt| {
            Rope::new(
                c.flux.config(),
                &text_ids(prompt.text.dim(1)?, device)?,
                &ids,
            )
        };
        let rope = rope_for(&c.prompt)?;
        let negative = match (&c.negative, c.true_cfg) {
            (_, 1.0) => None,
            (Some(negative), scale) => {
                if negative.text.dim(1)? != c.prompt.text.dim(1)? {
                    return Err(Error::BadRequest(
                        "prompt and negative prompt must be padded to one length".into(),
                    ));
                }
                Some((Branch::new(c, negative, times, b)?, scale))
            }
            (None, scale) => {
                return Err(Error::BadRequest(format!(
                    "true guidance of {scale} needs a negative prompt (the empty one will do)"
                )));
            }
        };
        let mut controls = Vec::new();
        for input in c.controls.iter().filter(|i| i.scale.abs() >= 1e-6) {
            let condition = to_batch(&input.condition, b, "the control image")?;
            let modes = input.mode.map(|m| [m]);
            let control = Control {
                condition: &condition,
                modes: modes.as_ref().map(|m| m.as_slice()),
                scale: input.scale,
            };
            let text = to_batch(&c.prompt.text, b, "the prompt's text")?;
            controls.push(ControlBranch {
                prepared: input.net.prepare(&text, &control, &rope)?,
                modulations: Modulations::new(
                    input.net.modulator()?,
                    &c.prompt.pooled,
                    c.guidance,
                    times,
                )?,
                input: input.clone(),
            });
        }
        Ok(Self {
            flux: c.flux,
            times: times.to_vec(),
            rope,
            prompt: Branch::new(c, &c.prompt, times, b)?,
            negative,
            controls,
            evaluations: 0,
        })
    }

    /// The velocity at `latents` (b, n, c), f32, before step `step` of the schedule.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once `cancel` is set: it is looked at before each network.
    pub fn at(
        &mut self,
        step: usize,
        latents: &Tensor,
        cancel: Option<&AtomicBool>,
    ) -> Result<Tensor> {
        let steps = self.times.len();
        let time = self.times[step];
        let mut all = Vec::new();
        for control in self.controls.iter().filter(|c| c.input.acts(step, steps)) {
            stop_if(cancel)?;
            let modulation = control.modulations.at(step, time)?;
            let net = control.input.net;
            all.push(net.forward_prepared(latents, &control.prepared, &modulation)?);
        }
        let residuals = Residuals::sum(all)?;
        let (flux, rope) = (self.flux, &self.rope);
        let mut run = |branch: &mut Branch| -> Result<Tensor> {
            stop_if(cancel)?;
            let modulation = branch.modulations.at(step, time)?;
            let v = flux.forward_modulated(
                latents,
                &branch.text,
                &modulation,
                rope,
                residuals.as_ref(),
                Some(&mut branch.cache),
            )?;
            Ok(v.to_dtype(DType::F32)?)
        };
        let v = run(&mut self.prompt)?;
        self.evaluations += 1;
        let Some((negative, scale)) = &mut self.negative else {
            return Ok(v);
        };
        let away = run(negative)?;
        self.evaluations += 1;
        Ok((&away + ((v - &away)? * *scale)?)?)
    }

    /// How often the transformer was run, counting those the cache cut short.
    pub fn evaluations(&self) -> usize {
        self.evaluations
    }

    /// How many of them the first-block cache cut short.
    pub fn skipped(&self) -> usize {
        let negative = self.negative.as_ref().map_or(0, |(b, _)| b.cache.skipped());
        self.prompt.cache.skipped() + negative
    }
}

fn stop_if(cancel: Option<&AtomicBool>) -> Result<()> {
    match cancel {
        Some(flag) if flag.load(Ordering::Relaxed) => Err(Error::Cancelled),
        _ => Ok(()),
    }
}

// ---------------------------------------------------------------------------------- loop

/// What a step made, for progress and preview.
pub struct Step<'a> {
    /// Steps done, from 1.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
    /// The noise level now.
    pub sigma: f32,
    /// The latents now, packed.
    pub latents: &'a Tensor,
    velocity: &'a Tensor,
}

impl Step<'_> {
    /// What the latents would end as, going straight on: x - σ·v.
    pub fn preview(&self) -> Result<Tensor> {
        Ok((self.latents - (self.velocity * f64::from(self.sigma))?)?)
    }
}

/// Who watches a run.
#[derive(Default)]
pub struct Watch<'a> {
    /// Called after each step; an error ends the run and is its result.
    pub after_step: Option<&'a mut dyn FnMut(&Step) -> Result<()>>,
    /// Ends the run with [`Error::Cancelled`] before the next network is run.
    pub cancel: Option<&'a AtomicBool>,
    done: usize,
    total: usize,
}

impl<'a> Watch<'a> {
    /// With these two.
    pub fn new(
        after_step: Option<&'a mut dyn FnMut(&Step) -> Result<()>>,
        cancel: Option<&'a AtomicBool>,
    ) -> Self {
        Self {
            after_step,
            cancel,
            ..Self::default()
        }
    }
}

/// The part of the picture that must stay the source.
pub struct Keep<'a> {
    /// 1 where it may change, 0 where it must not, (b or 1, n, 1).
    pub mask: &'a Tensor,
    /// The source's latents, packed.
    pub source: &'a Tensor,
    /// The noise the source is taken to each level with.
    pub noise: &'a Tensor,
}

impl Keep<'_> {
    /// m·x + (1-m)·((1-σ)·source + σ·noise).
    fn merge(&self, x: &Tensor, sigma: f32) -> Result<Tensor> {
        let kept = noised(self.source, self.noise, sigma)?;
        Ok((&kept + (x - &kept)?.broadcast_mul(self.mask)?)?)
    }
}

/// (1-σ)·x + σ·ε.
pub fn noised(x: &Tensor, noise: &Tensor, sigma: f32) -> Result<Tensor> {
    let sigma = f64::from(sigma);
    Ok(((x * (1.0 - sigma))? + (noise * sigma)?)?)
}

/// Euler steps along `schedule`: x ← x + (σ_next - σ)·v(step, σ, x). x is f32.
fn integrate(
    x: Tensor,
    schedule: &Schedule,
    keep: Option<&Keep>,
    watch: &mut Watch,
    mut velocity: impl FnMut(usize, f32, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut x = x.to_dtype(DType::F32)?;
    for (i, pair) in schedule.sigmas.windows(2).enumerate() {
        let (sigma, next) = (pair[0], pair[1]);
        stop_if(watch.cancel)?;
        let v = velocity(i, sigma, &x)?;
        x = (x + (&v * f64::from(next - sigma))?)?;
        if let Some(keep) = keep {
            x = keep.merge(&x, next)?;
        }
        watch.done += 1;
        if let Some(after) = watch.after_step.as_mut() {
            after(&Step {
                done: watch.done,
                total: watch.total,
                sigma: next,
                latents: &x,
                velocity: &v,
            })?;
        }
    }
    Ok(x)
}

// ------------------------------------------------------------------------- ways to edit

/// From pure noise (b, n, c). `schedule` should start at 1.
pub fn generate(
    conditions: &Conditions,
    schedule: &Schedule,
    noise: &Tensor,
    keep: Option<&Keep>,
    watch: &mut Watch,
) -> Result<Tensor> {
    let mut field = Field::new(conditions, schedule, noise.dim(0)?)?;
    watch.total += schedule.steps();
    let cancel = watch.cancel;
    integrate(noise.clone(), schedule, keep, watch, |i, _, x| {
        field.at(i, x, cancel)
    })
}

/// From the source (b, n, c), noised to where `schedule` starts.
pub fn img2img(
    conditions: &Conditions,
    schedule: &Schedule,
    source: &Tensor,
    noise: &Tensor,
    keep: Option<&Keep>,
    watch: &mut Watch,
) -> Result<Tensor> {
    let x = noised(source, noise, schedule.start())?;
    generate(conditions, schedule, &x, keep, watch)
}

/// The settings of [`rf_inversion`].
#[derive(Clone, Debug, PartialEq)]
pub struct RfInversion {
    /// How strongly the way up is drawn to the given noise, 0 to 1.
    pub gamma: f64,
    /// How strongly the way down is drawn to the source, 0 to 1.
    pub eta: f64,
    /// From this share of the steps
    pub start: f64,
    /// to this one.
    pub stop: f64,
    /// `eta` falls as (1 - i/N)^decay over the steps; 0 keeps it.
    pub decay: f64,
}

impl RfInversion {
    /// The paper's: γ 0.5, η 0.9 over the first quarter of the steps.
    pub fn paper() -> Self {
        Self {
            gamma: 0.5,
            eta: 0.9,
            start: 0.0,
            stop: 0.25,
            decay: 0.0,
        }
    }

    fn eta_at(&self, i: usize, n: usize) -> f64 {
        let at = i as f64 / n as f64;
        match at >= self.start && at < self.stop {
            true => self.eta * (1.0 - at).powf(self.decay),
            false => 0.0,
        }
    }
}

/// Inverts the source under `empty` (no words, no guidance), then edits under `conditions`.
///
/// One schedule serves both ways. (The reference code mixes an even grid in its controller
/// with shifted levels in its steps.) The way up runs first: watchers see twice the steps.
pub fn rf_inversion(
    empty: &Conditions,
    conditions: &Conditions,
    schedule: &Schedule,
    source: &Tensor,
    noise: &Tensor,
    options: &RfInversion,
    keep: Option<&Keep>,
    watch: &mut Watch,
) -> Result<Tensor> {
    let b = source.dim(0)?;
    let rising = schedule.rising();
    let cancel = watch.cancel;
    watch.total += 2 * schedule.steps();
    let mut up = Field::new(empty, &rising, b)?;
    let x = integrate(source.clone(), &rising, None, watch, |i, sigma, y| {
        let u = up.at(i, y, cancel)?;
        // The straight way to the noise, which the last level must not divide by zero.
        let straight = ((noise - y)? / f64::from(1.0 - sigma).max(1e-6))?;
        Ok((&u + ((straight - &u)? * options.gamma)?)?)
    })?;
    drop(up);
    let mut down = Field::new(conditions, schedule, b)?;
    let n = schedule.steps();
    integrate(x, schedule, keep, watch, |i, sigma, x| {
        let v = down.at(i, x, cancel)?;
        let eta = options.eta_at(i, n);
        if eta == 0.0 {
            return Ok(v);
        }
        let straight = ((x - source)? / f64::from(sigma))?;
        Ok((&v + ((straight - &v)? * eta)?)?)
    })
}

/// The settings of [`flowedit`].
#[derive(Clone, Debug, PartialEq)]
pub struct FlowEdit {
    /// Of N steps, the last `n_max` are run.
    pub n_max: usize,
    /// The last `n_min` of them are plain sampling under the target.
    pub n_min: usize,
    /// Noises averaged per step.
    pub n_avg: usize,
}

impl FlowEdit {
    /// The paper's for FLUX.1-dev: 24 of 28 steps; guidance 1.5 for the source, 5.5 for the
    /// target.
    pub fn paper() -> Self {
        Self {
            n_max: 24,
            n_min: 0,
            n_avg: 1,
        }
    }
}

/// Moves the source by the difference of the velocities under `target` and `origin` (which
/// describes the source). With equal conditions the result is the source, bit for bit.
///
/// `noise(draw)` gives fresh noise of the source's shape.
pub fn flowedit(
    origin: &Conditions,
    target: &Conditions,
    schedule: &Schedule,
    source: &Tensor,
    mut noise: impl FnMut(u32) -> Result<Tensor>,
    options: &FlowEdit,
    keep: Option<&Keep>,
    watch: &mut Watch,
) -> Result<Tensor> {
    if options.n_avg == 0 || options.n_min > options.n_max {
        return Err(Error::BadRequest(format!(
            "flowedit: n_avg must be at least 1 and n_min at most n_max, got {options:?}"
        )));
    }
    let b = source.dim(0)?;
    let n = schedule.steps();
    let tail = options.n_min.min(n);
    let moved = Schedule {
        sigmas: schedule.sigmas[n - options.n_max.min(n)..=n - tail].to_vec(),
    };
    let cancel = watch.cancel;
    watch.total += moved.steps() + tail;
    let source = source.to_dtype(DType::F32)?;
    let mut from = Field::new(origin, &moved, b)?;
    let mut to = Field::new(target, &moved, b)?;
    let mut draws = 0u32;
    let mut fresh = || {
        draws += 1;
        noise(draws - 1)
    };
    let mut z = integrate(source.clone(), &moved, None, watch, |i, sigma, z| {
        let mut total: Option<Tensor> = None;
        for _ in 0..options.n_avg {
            let at_source = noised(&source, &fresh()?, sigma)?;
            // In this order: where z is the source, the sum is `at_source` to the bit.
            let at_target = (&at_source + (z - &source)?)?;
            let v = (to.at(i, &at_target, cancel)? - from.at(i, &at_source, cancel)?)?;
            total = Some(match total {
                Some(sum) => (sum + v)?,
                None => v,
            });
        }
        match total {
            Some(sum) => Ok((sum / options.n_avg as f64)?),
            None => Ok(z.zeros_like()?),
        }
    })?;
    if tail > 0 {
        drop((from, to));
        let rest = schedule.from_step(n - tail);
        let at_source = noised(&source, &fresh()?, rest.start())?;
        let x = (at_source + (z - &source)?)?;
        let mut field = Field::new(target, &rest, b)?;
        z = integrate(x, &rest, None, watch, |i, _, x| field.at(i, x, cancel))?;
    }
    match keep {
        Some(keep) => keep.merge(&z, 0.0),
        None => Ok(z),
    }
}

/// A picture mask (1 = may change) of (h, w) pixels as one number per token, (1, n, 1):
/// the share of the token's pixels that may change, with `pixels` to a token's side.
pub fn mask_tokens(mask: &Tensor, pixels: usize) -> Result<Tensor> {
    let (h, w) = mask.dims2()?;
    if pixels == 0 || h % pixels != 0 || w % pixels != 0 {
        return Err(Error::BadRequest(format!(
            "a mask of {w}×{h} pixels cannot be cut into tokens of {pixels}×{pixels}"
        )));
    }
    let (rows, columns) = (h / pixels, w / pixels);
    Ok(mask
        .to_dtype(DType::F32)?
        .reshape((rows, pixels, columns, pixels))?
        .mean((1, 3))?
        .reshape((1, rows * columns, 1))?)
}
