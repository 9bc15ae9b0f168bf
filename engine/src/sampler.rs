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
use candle_core::{D, DType, Device, Tensor};
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
        // In this order a strength of 1 is a level of 1, not a rounding step beyond it.
        factor * strength / (factor * strength + (1.0 - strength))
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
        self.scale.abs() >= 1e-6
            && step as f64 / steps as f64 >= self.start
            && ends_within(step, steps, self.end)
    }
}

/// Whether a step is over by this share of them all.
fn ends_within(step: usize, steps: usize, share: f64) -> bool {
    (step + 1) as f64 / steps as f64 <= share
}

/// Everything that decides a velocity besides latents and time.
#[derive(Clone)]
pub struct Conditions<'a> {
    /// The transformer.
    pub flux: &'a FluxTransformer,
    /// What to make.
    pub prompt: Prompt,
    /// What else to make in the same picture; see [`together`].
    pub more: Vec<Prompt>,
    /// What not to make; used when `true_cfg` is not 1 or there is `more` than one prompt.
    pub negative: Option<Prompt>,
    /// v = v_negative + true_cfg · (v_prompt - v_negative); 1 runs one prompt alone.
    pub true_cfg: f64,
    /// The share of the steps after which `true_cfg` is 1. What a picture shows is decided
    /// early; later, guidance costs a second run a step and adds little (arXiv 2404.07724).
    pub true_cfg_end: f64,
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
    /// Whether the networks may let go of the weights that only make modulations (a quarter
    /// of FLUX.1-dev), once this run has what it needs of them: nothing else can run after.
    pub last_run: bool,
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
    cache: Cache<Residuals>,
}

/// The velocity of a run's every step: what [`Conditions`] say, with all that does not
/// change from step to step computed.
pub struct Field<'a> {
    flux: &'a FluxTransformer,
    times: Vec<f32>,
    rope: Rope,
    prompts: Vec<Branch>,
    /// Its scale, and the share of the steps after which that is 1.
    negative: Option<(Branch, f64, f64)>,
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
        let ids = image_ids(c.rows, c.columns, &Device::Cpu)?;
        let rope_for = |prompt: &Prompt| {
            Rope::new(
                c.flux.config(),
                &text_ids(prompt.text.dim(1)?, &Device::Cpu)?,
                &ids,
                device,
            )
        };
        let rope = rope_for(&c.prompt)?;
        let length = c.prompt.text.dim(1)?;
        let beside = |prompt: &Prompt| -> Result<Branch> {
            if prompt.text.dim(1)? != length {
                return Err(Error::BadRequest(
                    "all prompts of a run must be padded to one length".into(),
                ));
            }
            Branch::new(c, prompt, times, b)
        };
        let negative = match (&c.negative, c.true_cfg) {
            (_, 1.0) if c.more.is_empty() => None,
            (Some(negative), scale) => Some((beside(negative)?, scale, c.true_cfg_end)),
            (None, scale) => {
                return Err(Error::BadRequest(format!(
                    "{} prompts with true guidance of {scale} need a negative prompt (the empty \
                     one will do)",
                    1 + c.more.len()
                )));
            }
        };
        // Every prompt has its say in the control too, in equal parts.
        let share = 1.0 / (1 + c.more.len()) as f64;
        let mut controls = Vec::new();
        for input in c.controls.iter().filter(|i| i.scale.abs() >= 1e-6) {
            let condition = to_batch(&input.condition, b, "the control image")?;
            let modes = input.mode.map(|m| [m]);
            let control = Control {
                condition: &condition,
                modes: modes.as_ref().map(|m| m.as_slice()),
                scale: input.scale * share,
            };
            for prompt in std::iter::once(&c.prompt).chain(&c.more) {
                let text = to_batch(&prompt.text, b, "the prompt's text")?;
                controls.push(ControlBranch {
                    prepared: input.net.prepare(&text, &control, &rope)?,
                    modulations: Modulations::new(
                        input.net.modulator()?,
                        &prompt.pooled,
                        c.guidance,
                        times,
                    )?,
                    input: input.clone(),
                    cache: Cache::new(c.cache_threshold),
                });
            }
        }
        let prompts = std::iter::once(&c.prompt).chain(&c.more).map(beside);
        let prompts = prompts.collect::<Result<_>>()?;
        if c.last_run {
            c.flux.drop_modulator();
            c.controls.iter().for_each(|i| i.net.drop_modulator());
        }
        Ok(Self {
            flux: c.flux,
            times: times.to_vec(),
            rope,
            prompts,
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
        let controls = self.controls.iter_mut();
        for control in controls.filter(|c| c.input.acts(step, steps)) {
            stop_if(cancel)?;
            let modulation = control.modulations.at(step, time)?;
            let ControlBranch {
                prepared, cache, ..
            } = control;
            let net = control.input.net;
            all.push(net.forward_prepared(latents, prepared, &modulation, Some(cache))?);
        }
        let residuals = Residuals::sum(all)?;
        let (flux, rope) = (self.flux, &self.rope);
        let run = |branch: &mut Branch| -> Result<Tensor> {
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
            let prediction = flux.config().prediction;
            prediction.velocity(latents, v.to_dtype(DType::F32)?, time)
        };
        let mut all = Vec::with_capacity(self.prompts.len());
        for prompt in &mut self.prompts {
            all.push(run(prompt)?);
            self.evaluations += 1;
        }
        let Some((negative, scale, end)) = &mut self.negative else {
            return Ok(all.swap_remove(0));
        };
        let scale = match ends_within(step, steps, *end) {
            true => *scale,
            false => 1.0,
        };
        if let (1.0, [_]) = (scale, all.as_slice()) {
            return Ok(all.swap_remove(0));
        }
        let away = run(negative)?;
        self.evaluations += 1;
        let asked = all.into_iter().map(|v| Ok((v - &away)?));
        let asked = together(&asked.collect::<Result<Vec<_>>>()?)?;
        Ok((&away + (asked * scale)?)?)
    }

    /// How often the transformer was run, counting those the cache cut short.
    pub fn evaluations(&self) -> usize {
        self.evaluations
    }

    /// How many of them the first-block cache cut short.
    pub fn skipped(&self) -> usize {
        let negative = self
            .negative
            .as_ref()
            .map_or(0, |(b, ..)| b.cache.skipped());
        let prompts = self.prompts.iter().map(|b| b.cache.skipped());
        prompts.sum::<usize>() + negative
    }
}

/// What several prompts ask for in one picture, each given as its velocity minus that of no
/// prompt, (b, n, c).
///
/// Token by token, what they ask for alike counts once and what they ask for apart adds up:
/// Σ_k a_k·d_k with a_k = |d_k|² / Σ_j max(0, d_k·d_j). So one prompt is itself, the same one
/// twice is itself again, and where a prompt asks for nothing the others have their way, as
/// under the implicit masks of LEDITS++ (arXiv 2311.16711). A plain sum (arXiv 2206.01714)
/// would move everything that all prompts move, such as what they keep of the source, as many
/// times too far as there are prompts.
pub fn together(asked: &[Tensor]) -> Result<Tensor> {
    let [one] = asked else {
        let mut sum: Option<Tensor> = None;
        for d in asked {
            let own = d.sqr()?.sum_keepdim(D::Minus1)?; // (b, n, 1)
            // The least positive number keeps 0 / 0 from arising where nothing is asked for.
            let mut all = own.affine(1.0, f64::from(f32::MIN_POSITIVE))?;
            for other in asked.iter().filter(|other| !std::ptr::eq(*other, d)) {
                all = (all + (d * other)?.sum_keepdim(D::Minus1)?.relu()?)?;
            }
            let share = d.broadcast_mul(&(own / all)?)?;
            sum = Some(match sum {
                Some(sum) => (sum + share)?,
                None => share,
            });
        }
        return sum.ok_or_else(|| Error::BadRequest("there is no prompt".into()));
    };
    Ok(one.clone())
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
    // Only the second of the two fields may take the modulation weights with it.
    let empty = &Conditions {
        last_run: false,
        ..empty.clone()
    };
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
    let origin = &Conditions {
        last_run: false,
        ..origin.clone()
    };
    let target = &Conditions {
        last_run: target.last_run && tail == 0,
        ..target.clone()
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flux::controlnet::Config as ControlConfig;
    use crate::flux::golden_tests::{Golden, builder, config, gap};
    use crate::flux::transformer::{Config, pack, unpack};
    use crate::flux::vae::Vae;

    const DEV: Device = Device::Cpu;

    /// The small networks of the golden files and their inputs: a picture of 2×3 tokens.
    struct World {
        golden: Golden,
        flux: FluxTransformer,
        union: ControlNet,
        vae: Vae,
    }

    impl World {
        fn new() -> Self {
            let nets = Golden::open("networks.safetensors");
            let load = |case: &str, levels| {
                builder(nets.all(&format!("{case}/weights")), DType::F32, levels)
            };
            let flux: Config = config("networks.json", "transformer");
            let union: ControlConfig = config("networks.json", "union");
            let vae = config("networks.json", "vae_f8");
            Self {
                flux: FluxTransformer::new(&flux, load("transformer", 0)).unwrap(),
                union: ControlNet::new(&union, load("union", 0)).unwrap(),
                vae: Vae::new(&vae, load("vae_f8", 4)).unwrap(),
                golden: Golden::open("pipelines.safetensors"),
            }
        }

        fn prompt(&self) -> Prompt {
            Prompt {
                text: self.golden.get("text"),
                pooled: self.golden.get("pooled"),
            }
        }

        /// A picture of the golden file as packed latents.
        fn latents(&self, name: &str) -> Tensor {
            let picture = ((self.golden.get(name) * 2.0).unwrap() - 1.0).unwrap();
            pack(&self.vae.encode(&picture).unwrap()).unwrap()
        }

        fn noise(&self) -> Tensor {
            pack(&self.golden.get("noise")).unwrap()
        }

        fn conditions(&self, scale: f64) -> Conditions<'_> {
            Conditions {
                flux: &self.flux,
                prompt: self.prompt(),
                more: Vec::new(),
                negative: None,
                true_cfg: 1.0,
                true_cfg_end: 1.0,
                guidance: 3.5,
                controls: vec![ControlInput::new(
                    &self.union,
                    self.latents("control"),
                    Some(0),
                    scale,
                )],
                rows: 2,
                columns: 3,
                cache_threshold: 0.0,
                last_run: false,
            }
        }

        fn decoded(&self, latents: &Tensor) -> Tensor {
            let picture = self.vae.decode(&unpack(latents, 4, 6).unwrap()).unwrap();
            ((picture / 2.0).unwrap() + 0.5)
                .unwrap()
                .clamp(0f32, 1f32)
                .unwrap()
        }
    }

    /// Six tokens stand for the smallest size's schedule.
    fn schedule(steps: usize) -> Schedule {
        Schedule::full(&ScheduleConfig::dev(), steps, 6).unwrap()
    }

    #[test]
    fn noise_levels_equal_diffusers_at_five_sizes() {
        let golden = Golden::open("pipelines.safetensors");
        for (tokens, steps) in [(64, 4), (256, 20), (1024, 28), (4096, 60), (16384, 50)] {
            let ours = Schedule::full(&ScheduleConfig::dev(), steps, tokens).unwrap();
            let ours = Tensor::new(ours.sigmas, &DEV).unwrap();
            let worst = gap(&ours, &golden.get(&format!("sigmas/{tokens}_{steps}")));
            assert!(worst < 1e-6, "{tokens} tokens: {worst}");
        }
        // A start level keeps the steps, and strength names the level that diffusers skips to.
        let config = ScheduleConfig::dev();
        for tokens in 1..5000 {
            let level = Schedule::level_of_strength(&config, tokens, 1.0);
            assert_eq!(level, 1.0, "{tokens} tokens");
        }
        let level = Schedule::level_of_strength(&config, 4096, 0.3);
        let short = Schedule::from_level(&config, 60, 4096, level).unwrap();
        assert_eq!(short.steps(), 60);
        let cut = Schedule::full(&config, 60, 4096).unwrap().cut(0.3);
        assert_eq!(cut.steps(), 18);
        assert!((short.start() - cut.start()).abs() < 1e-6 && (cut.start() - 0.575).abs() < 1e-3);
        assert!(Schedule::from_level(&config, 0, 64, 1.0).is_err());
        assert!(Schedule::from_level(&config, 4, 64, f64::NAN).is_err());
    }

    #[test]
    fn the_canny_pipeline_equals_diffusers_at_4_and_20_steps_and_within_a_control_window() {
        let world = World::new();
        for (steps, start, end) in [(4, 0.0, 1.0), (20, 0.0, 1.0), (20, 0.1, 0.6)] {
            let mut conditions = world.conditions(0.6);
            conditions.controls[0].start = start;
            conditions.controls[0].end = end;
            let watch = &mut Watch::default();
            let out = generate(&conditions, &schedule(steps), &world.noise(), None, watch);
            let out = out.unwrap();
            let end = if end == 1.0 { "1.0" } else { "0.6" };
            let expected = |kind| world.golden.get(&format!("canny_{steps}_{end}/{kind}"));
            let (a, b) = (
                gap(&out, &expected("latent")),
                gap(&world.decoded(&out), &expected("pt")),
            );
            assert!(
                a < 1e-4 && b < 1e-4,
                "{steps} steps: latents {a}, picture {b}"
            );
        }
    }

    #[test]
    fn the_img2img_pipeline_equals_diffusers_at_4_and_20_steps() {
        let world = World::new();
        for steps in [4, 20] {
            let schedule = schedule(steps).cut(0.6);
            let source = world.latents("picture");
            let out = img2img(
                &world.conditions(0.6),
                &schedule,
                &source,
                &world.noise(),
                None,
                &mut Watch::default(),
            );
            let out = out.unwrap();
            let expected = |kind| world.golden.get(&format!("img2img_{steps}/{kind}"));
            let (a, b) = (
                gap(&out, &expected("latent")),
                gap(&world.decoded(&out), &expected("pt")),
            );
            assert!(
                a < 1e-4 && b < 1e-4,
                "{steps} steps: latents {a}, picture {b}"
            );
        }
    }

    #[test]
    fn a_batch_of_four_equals_four_singles() {
        let world = World::new();
        let shape = (2, 4, 6);
        let pictures = [0, 1, 2, 3];
        let all = packed_noise(7, &pictures, 0, shape, &DEV).unwrap();
        let batch = generate(
            &world.conditions(0.6),
            &schedule(4),
            &all,
            None,
            &mut Watch::default(),
        )
        .unwrap();
        for i in pictures {
            let one = packed_noise(7, &[i], 0, shape, &DEV).unwrap();
            assert_eq!(gap(&one, &all.narrow(0, i as usize, 1).unwrap()), 0.0);
            let alone = generate(
                &world.conditions(0.6),
                &schedule(4),
                &one,
                None,
                &mut Watch::default(),
            )
            .unwrap();
            let worst = gap(&alone, &batch.narrow(0, i as usize, 1).unwrap());
            assert!(worst < 1e-5, "picture {i}: {worst}");
        }
    }

    #[test]
    fn a_batch_of_different_prompts_equals_each_alone() {
        let world = World::new();
        let noise = packed_noise(1, &[0, 1], 0, (2, 4, 6), &DEV).unwrap();
        let run = |prompt: Prompt, noise: &Tensor| {
            let conditions = Conditions {
                prompt,
                negative: Some(world.prompt()),
                true_cfg: 2.0,
                true_cfg_end: 1.0,
                ..world.conditions(0.6)
            };
            generate(
                &conditions,
                &schedule(3),
                noise,
                None,
                &mut Watch::default(),
            )
            .unwrap()
        };
        let prompt = |x: f64| Prompt {
            text: (world.prompt().text * x).unwrap(),
            pooled: (world.prompt().pooled * x).unwrap(),
        };
        let both = Prompt {
            text: Tensor::cat(&[prompt(1.0).text, prompt(-0.5).text], 0).unwrap(),
            pooled: Tensor::cat(&[prompt(1.0).pooled, prompt(-0.5).pooled], 0).unwrap(),
        };
        let batch = run(both, &noise);
        for (i, x) in [1.0, -0.5].into_iter().enumerate() {
            let alone = run(prompt(x), &noise.narrow(0, i, 1).unwrap());
            let worst = gap(&alone, &batch.narrow(0, i, 1).unwrap());
            assert!(worst < 1e-5, "prompt {i}: {worst}");
        }
    }

    #[test]
    fn true_guidance_ends_when_it_should_and_then_costs_nothing() {
        let world = World::new();
        let run = |true_cfg: f64, true_cfg_end: f64| {
            let conditions = Conditions {
                negative: Some(Prompt {
                    text: world.prompt().text.zeros_like().unwrap(),
                    pooled: world.prompt().pooled.zeros_like().unwrap(),
                }),
                true_cfg,
                true_cfg_end,
                ..world.conditions(0.6)
            };
            let schedule = schedule(4);
            let mut field =
                Field::new(&conditions, &schedule, world.noise().dim(0).unwrap()).unwrap();
            let watch = &mut Watch::default();
            let made = integrate(world.noise(), &schedule, None, watch, |i, _, x| {
                field.at(i, x, None)
            });
            (made.unwrap(), field.evaluations())
        };
        let (always, never, half) = (run(3.0, 1.0), run(1.0, 1.0), run(3.0, 0.5));
        assert_eq!((always.1, never.1, half.1), (8, 4, 6));
        assert_eq!(gap(&run(3.0, 0.0).0, &never.0), 0.0);
        assert!(gap(&half.0, &always.0) > 1e-4 && gap(&half.0, &never.0) > 1e-4);
    }

    #[test]
    fn what_prompts_ask_for_alike_counts_once_and_what_they_ask_apart_adds_up() {
        let d = |rows: [[f32; 2]; 3]| Tensor::new(&[rows], &DEV).unwrap();
        let a = d([[1.0, 0.0], [2.0, 1.0], [0.0, 0.0]]);
        let b = d([[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]);
        let both = together(&[a.clone(), b.clone()]).unwrap();
        // Apart: both. One silent: the other. Both silent: nothing, and no 0 / 0.
        assert_eq!(gap(&both, &(&a + &b).unwrap()), 0.0);
        for all in [vec![a.clone()], vec![a.clone(); 2], vec![a.clone(); 5]] {
            assert!(gap(&together(&all).unwrap(), &a) < 1e-6);
        }
        // Against one another: what is left between them.
        let against = together(&[a.clone(), a.neg().unwrap()]).unwrap();
        assert_eq!(gap(&against, &a.zeros_like().unwrap()), 0.0);
        assert!(together(&[]).is_err());
    }

    #[test]
    fn several_prompts_act_in_one_picture_and_the_same_one_twice_is_one() {
        let world = World::new();
        let prompt = |x: f64| Prompt {
            text: (world.prompt().text * x).unwrap(),
            pooled: (world.prompt().pooled * x).unwrap(),
        };
        let run = |prompts: &[f64]| {
            let conditions = Conditions {
                prompt: prompt(prompts[0]),
                more: prompts[1..].iter().map(|x| prompt(*x)).collect(),
                negative: Some(prompt(0.0)),
                true_cfg: 2.0,
                true_cfg_end: 1.0,
                ..world.conditions(0.6)
            };
            let watch = &mut Watch::default();
            generate(&conditions, &schedule(3), &world.noise(), None, watch).unwrap()
        };
        assert!(gap(&run(&[1.0, 1.0]), &run(&[1.0])) < 1e-5);
        let both = run(&[1.0, -0.7]);
        assert!(gap(&both, &run(&[1.0])) > 1e-3 && gap(&both, &run(&[-0.7])) > 1e-3);
        let turned = gap(&both, &run(&[-0.7, 1.0]));
        assert!(
            turned < 1e-4,
            "their order changes more than rounding: {turned}"
        );
        let without = Conditions {
            more: vec![prompt(1.0)],
            ..world.conditions(0.0)
        };
        let watch = &mut Watch::default();
        let said = generate(&without, &schedule(1), &world.noise(), None, watch).unwrap_err();
        assert!(said.to_string().contains("negative prompt"), "{said}");
    }

    /// The networks in half precision, as they run on a GPU, against diffusers in f32.
    #[test]
    fn whole_pipelines_in_half_precision_stay_within_two_hundredths() {
        let world = World::new();
        let nets = Golden::open("networks.safetensors");
        let expected = |name: &str| world.golden.get(name);
        let largest = |x: &Tensor| gap(x, &x.zeros_like().unwrap());
        for dtype in [DType::BF16, DType::F16] {
            let load = |case: &str| builder(nets.all(&format!("{case}/weights")), dtype, 0);
            let flux: Config = config("networks.json", "transformer");
            let union: ControlConfig = config("networks.json", "union");
            let flux = FluxTransformer::new(&flux, load("transformer")).unwrap();
            let union = ControlNet::new(&union, load("union")).unwrap();
            let mut conditions = world.conditions(0.6);
            conditions.flux = &flux;
            conditions.controls[0].net = &union;
            for steps in [4, 20] {
                let watch = &mut Watch::default();
                let canny = generate(&conditions, &schedule(steps), &world.noise(), None, watch);
                let source = world.latents("picture");
                let cut = schedule(steps).cut(0.6);
                let img2img = img2img(&conditions, &cut, &source, &world.noise(), None, watch);
                for (name, ours) in [
                    (format!("canny_{steps}_1.0/latent"), canny.unwrap()),
                    (format!("img2img_{steps}/latent"), img2img.unwrap()),
                ] {
                    let truth = expected(&name);
                    let relative = gap(&ours, &truth) / largest(&truth);
                    assert!(relative < 2e-2, "{dtype:?} {name}: {relative}");
                }
            }
        }
    }

    #[test]
    fn several_controls_add_up_and_scale_nought_is_none() {
        let world = World::new();
        let run = |scales: &[f64]| {
            let mut conditions = world.conditions(0.0);
            let one = conditions.controls.remove(0);
            conditions.controls = scales
                .iter()
                .map(|&scale| ControlInput {
                    scale,
                    ..one.clone()
                })
                .collect();
            let watch = &mut Watch::default();
            generate(&conditions, &schedule(3), &world.noise(), None, watch).unwrap()
        };
        assert!(gap(&run(&[0.6]), &run(&[0.4, 0.2])) < 1e-5);
        assert_eq!(gap(&run(&[0.0]), &run(&[])), 0.0);
        assert!(gap(&run(&[0.6]), &run(&[])) > 1e-2);
    }

    #[test]
    fn flowedit_with_equal_conditions_returns_the_source_to_the_bit() {
        let world = World::new();
        let source = world.latents("picture");
        let conditions = world.conditions(0.3);
        let run = |origin: &Conditions, options: FlowEdit| {
            flowedit(
                origin,
                &conditions,
                &schedule(6),
                &source,
                |draw| packed_noise(3, &[0], draw, (2, 4, 6), &DEV),
                &options,
                None,
                &mut Watch::default(),
            )
            .unwrap()
        };
        let options = FlowEdit {
            n_max: 5,
            n_min: 0,
            n_avg: 2,
        };
        assert_eq!(gap(&run(&conditions, options.clone()), &source), 0.0);
        let other = Conditions {
            guidance: 1.0,
            ..conditions.clone()
        };
        assert!(gap(&run(&other, options), &source) > 1e-3);
        let tail = FlowEdit {
            n_max: 5,
            n_min: 2,
            n_avg: 1,
        };
        assert!(gap(&run(&conditions, tail), &source) > 1e-3);
    }

    #[test]
    fn rf_inversion_drawn_all_the_way_returns_the_source() {
        let world = World::new();
        let source = world.latents("picture");
        let conditions = world.conditions(0.3);
        let empty = Conditions {
            guidance: 0.0,
            controls: Vec::new(),
            ..conditions.clone()
        };
        let run = |options: RfInversion| {
            rf_inversion(
                &empty,
                &conditions,
                &schedule(8),
                &source,
                &world.noise(),
                &options,
                None,
                &mut Watch::default(),
            )
            .unwrap()
        };
        let drawn = |eta: f64, stop: f64| RfInversion {
            eta,
            stop,
            ..RfInversion::paper()
        };
        let worst = gap(&run(drawn(1.0, 1.1)), &source);
        assert!(worst < 1e-5, "{worst}");
        // The longer it is drawn, the nearer it stays.
        let mean = |x: &Tensor| {
            let d = (x - &source).unwrap().abs().unwrap().mean_all().unwrap();
            d.to_scalar::<f32>().unwrap()
        };
        let (short, long) = (mean(&run(drawn(0.9, 0.25))), mean(&run(drawn(0.9, 0.9))));
        assert!(long < short, "{long} {short}");
        // Down again along the field that led up (no draw either way): only the steps' own
        // error remains, and it shrinks with them.
        let there_and_back = |steps: usize| {
            let free = RfInversion {
                gamma: 0.0,
                eta: 0.0,
                ..RfInversion::paper()
            };
            let out = rf_inversion(
                &empty,
                &empty,
                &schedule(steps),
                &source,
                &world.noise(),
                &free,
                None,
                &mut Watch::default(),
            );
            mean(&out.unwrap())
        };
        let (coarse, fine) = (there_and_back(8), there_and_back(128));
        assert!(fine < coarse / 4.0, "{fine} {coarse}");
    }

    #[test]
    fn what_must_be_kept_is_the_source_at_the_end() {
        let world = World::new();
        let source = world.latents("picture");
        let noise = world.noise();
        let mut pixels = vec![0f32; 32 * 48];
        pixels[..32 * 48 / 2].fill(1.0);
        let pixels = Tensor::from_vec(pixels, (32, 48), &DEV).unwrap();
        let mask = mask_tokens(&pixels, 16).unwrap();
        assert_eq!(
            mask.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            [1., 1., 1., 0., 0., 0.]
        );
        let keep = Keep {
            mask: &mask,
            source: &source,
            noise: &noise,
        };
        let watch = &mut Watch::default();
        let conditions = world.conditions(0.5);
        let out = img2img(
            &conditions,
            &schedule(4),
            &source,
            &noise,
            Some(&keep),
            watch,
        )
        .unwrap();
        let part = |x: &Tensor, first| x.narrow(1, first, 3).unwrap();
        assert_eq!(gap(&part(&out, 3), &part(&source, 3)), 0.0);
        assert!(gap(&part(&out, 0), &part(&source, 0)) > 1e-2);
        assert!(mask_tokens(&pixels, 15).is_err());
    }

    #[test]
    fn a_run_is_watched_and_can_be_cancelled_at_every_step() {
        let world = World::new();
        let conditions = world.conditions(0.5);
        for stop_at in 1..=4 {
            let flag = AtomicBool::new(false);
            let mut seen = Vec::new();
            let mut after = |step: &Step| {
                assert_eq!(step.preview()?.dims(), step.latents.dims());
                seen.push((step.done, step.total));
                flag.store(step.done == stop_at, Ordering::Relaxed);
                Ok(())
            };
            let mut watch = Watch::new(Some(&mut after), Some(&flag));
            let out = generate(&conditions, &schedule(4), &world.noise(), None, &mut watch);
            assert_eq!(seen.len(), stop_at);
            assert_eq!(seen[0], (1, 4));
            match stop_at {
                4 => assert!(out.is_ok(), "cancelled after the last step: it is done"),
                _ => assert!(matches!(out, Err(Error::Cancelled))),
            }
        }
        // At the end the preview is the result.
        let mut last = None;
        let mut after = |step: &Step| {
            last = Some(step.preview()?);
            Ok(())
        };
        let mut watch = Watch::new(Some(&mut after), None);
        let out = generate(&conditions, &schedule(2), &world.noise(), None, &mut watch).unwrap();
        assert_eq!(gap(&last.unwrap(), &out), 0.0);
    }

    #[test]
    fn dropping_the_modulation_weights_leaves_a_prepared_run_intact() {
        let world = World::new();
        let conditions = world.conditions(0.5);
        let mut field = Field::new(&conditions, &schedule(2), 1).unwrap();
        let before = field.at(1, &world.noise(), None).unwrap();
        world.flux.drop_modulator();
        world.union.drop_modulator();
        assert_eq!(
            gap(&field.at(1, &world.noise(), None).unwrap(), &before),
            0.0
        );
        assert!(Field::new(&conditions, &schedule(2), 1).is_err());
    }

    #[test]
    fn the_last_run_of_every_backend_takes_the_modulation_weights_with_it_and_is_the_same() {
        type Run = fn(&World, &Conditions) -> Result<Tensor>;
        let backends: [Run; 4] = [
            |w, c| generate(c, &schedule(2), &w.noise(), None, &mut Watch::default()),
            |w, c| {
                let (source, watch) = (w.latents("picture"), &mut Watch::default());
                img2img(c, &schedule(2).cut(0.6), &source, &w.noise(), None, watch)
            },
            |w, c| {
                let options = RfInversion::paper();
                let (source, watch) = (w.latents("picture"), &mut Watch::default());
                let noise = w.noise();
                rf_inversion(c, c, &schedule(2), &source, &noise, &options, None, watch)
            },
            |w, c| {
                let options = FlowEdit {
                    n_max: 2,
                    ..FlowEdit::paper()
                };
                let origin = Conditions {
                    guidance: 1.0,
                    ..c.clone()
                };
                let (source, watch) = (w.latents("picture"), &mut Watch::default());
                let noise = |draw| packed_noise(3, &[0], draw, (2, 4, 6), &DEV);
                flowedit(
                    &origin,
                    c,
                    &schedule(2),
                    &source,
                    noise,
                    &options,
                    None,
                    watch,
                )
            },
        ];
        for (i, run) in backends.into_iter().enumerate() {
            let world = World::new();
            let mut conditions = world.conditions(0.5);
            let kept = run(&world, &conditions).unwrap();
            conditions.last_run = true;
            assert_eq!(gap(&run(&world, &conditions).unwrap(), &kept), 0.0, "{i}");
            assert!(world.flux.modulator().is_err(), "{i}: still held");
            assert!(run(&world, &conditions).is_err(), "{i}");
        }
    }
}
