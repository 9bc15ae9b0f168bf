//! The picture model of a bundle: its parts, loaded when first needed and kept or let go, and
//! one run through them for many pictures at once.
//!
//! A run has four stages: words, source to latents, sampling, latents to pictures. Where all
//! parts fit in memory together they stay; where they do not, each stage's part is let go
//! before the next is loaded; where even the transformer alone does not fit, its blocks are
//! read one by one in every step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use simpatico_schema::edit::{Backend, ControlKind};
use tokenizers::Tokenizer;

use crate::bundle::{Bundle, Flux, FluxText, Location};
use crate::canny::Control;
use crate::edit::{Hooks, Progress, Seconds, Stage};
use crate::flux::controlnet::{self, ControlNet};
use crate::flux::lora::Lora;
use crate::flux::names::{self, Kind};
use crate::flux::t5::{self, T5};
use crate::flux::text::{self, Clip, ClipConfig};
use crate::flux::transformer::{self, FluxTransformer, pack, unpack};
use crate::flux::vae::{self, Vae};
use crate::params::read_json;
use crate::picture::{Frame, Mask, Picture};
use crate::sampler::{
    self, Conditions, ControlInput, FlowEdit, Keep, Prompt, RfInversion, Schedule, ScheduleConfig,
    Step, Watch,
};
use crate::slot::Slot;
use crate::text_vectors::TextEncoder;
use crate::weights::Weights;
use crate::{Error, Result};

/// About so many image tokens go through the transformer at once: 32 small pictures or two of
/// 1024 x 1024.
const BATCH_TOKENS: usize = 8_192;
/// Pictures decoded at once.
const BATCH_DECODE: usize = 8;

enum Words {
    Minilm {
        encoder: Arc<TextEncoder>,
        tokens: usize,
    },
    T5Clip {
        t5: T5,
        t5_tokenizer: Tokenizer,
        clip: Clip,
        clip_config: ClipConfig,
        clip_tokenizer: Tokenizer,
        tokens: usize,
    },
}

struct Networks {
    flux: FluxTransformer,
    control: Option<ControlNet>,
}

/// How the parts share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Residency {
    /// All stay.
    Together,
    /// One stage's part at a time.
    Sequential,
    /// As sequential, and the transformer's blocks one at a time.
    Streamed,
}

/// What the stages take, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Need {
    pub words: u64,
    pub networks: u64,
    /// The networks when their blocks are read one by one.
    pub streamed: u64,
    pub vae: u64,
    /// Beside the networks while sampling.
    pub sampling: u64,
    /// Beside the autoencoder while decoding.
    pub decoding: u64,
}

impl Need {
    /// The roomiest way that fits into `free` bytes; `None`: not known, so all stay.
    pub fn residency(&self, free: Option<u64>, device: &str) -> Result<Residency> {
        let Some(free) = free else {
            return Ok(Residency::Together);
        };
        let work = self.sampling.max(self.decoding);
        if self.words + self.networks + self.vae + work <= free {
            return Ok(Residency::Together);
        }
        let others = self.words.max(self.vae + self.decoding);
        if others.max(self.networks + self.sampling) <= free {
            return Ok(Residency::Sequential);
        }
        let least = others.max(self.streamed + self.sampling);
        if least <= free {
            return Ok(Residency::Streamed);
        }
        Err(Error::NotEnoughMemory {
            stage: "the edit".into(),
            device: device.into(),
            need_bytes: least,
            free_bytes: free,
            help: "ask for a smaller --size, fewer pictures at once, or a smaller bundle".into(),
        })
    }
}

/// Everything about a run that its pictures must share.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub backend: Backend,
    pub steps: usize,
    pub guidance: f32,
    pub true_cfg: f32,
    /// The share of the steps after which true guidance ends.
    pub true_cfg_end: f32,
    pub control: Option<ControlKind>,
    pub control_scale: f32,
    pub control_end: f32,
    /// Where a backend that starts from the source begins.
    pub start: Start,
    pub cache_threshold: f32,
    /// How many instructions are carried out in each picture.
    pub prompts: usize,
    /// Width and height the model works on.
    pub model: (u32, u32),
    pub has_source: bool,
    pub has_mask: bool,
}

/// How far from the source a run begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Start {
    Strength(f32),
    NoiseLevel(f32),
}

/// One picture to make.
pub(super) struct Job<'a> {
    /// The source and its mask, and how they lie in the model's picture.
    pub source: Option<&'a Picture>,
    pub mask: Option<&'a Mask>,
    pub frame: Frame,
    /// What the source shows.
    pub caption: &'a str,
    /// What the model is told, an instruction each.
    pub texts: &'a [String],
    /// The share of the source's fine detail that comes back where the model changed nothing.
    pub fine_detail: f32,
    pub seed: u64,
    pub index: u32,
}

/// The picture model of a bundle.
pub(super) struct Pictures {
    bundle: Bundle,
    loras: Vec<(PathBuf, f32)>,
    roles: Flux,
    pub device: Device,
    dtype: DType,
    /// Whether the blocks' matrices are kept in 8 bits.
    eight: bool,
    schedule: ScheduleConfig,
    pub vae_config: vae::Config,
    words: Slot<Words>,
    networks: Slot<Networks>,
    vae: Slot<Vae>,
}

fn bytes_of(shape: &[usize], dtype: DType) -> u64 {
    (shape.iter().product::<usize>() * dtype.size_in_bytes()) as u64
}

/// What stays in memory of a network whose blocks are read one by one (its modulation weights
/// among it), and what its largest block takes.
pub(super) fn streamed_bytes(shapes: &[names::NameAndShape], dtype: DType) -> (u64, u64) {
    let (mut resident, mut blocks) = (0, BTreeMap::<&str, u64>::new());
    for (name, shape) in shapes {
        let block = ["double_blocks.", "single_blocks."]
            .iter()
            .find_map(|stem| {
                let index = name.strip_prefix(stem)?.find('.')?;
                Some(&name[..stem.len() + index])
            });
        let modulates = name.contains("mod.lin") || name.contains("modulation.lin");
        match block.filter(|_| !modulates) {
            Some(block) => *blocks.entry(block).or_default() += bytes_of(shape, dtype),
            None => resident += bytes_of(shape, dtype),
        }
    }
    (resident, blocks.into_values().max().unwrap_or(0))
}

fn tokenizer(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    Tokenizer::from_bytes(bytes)
        .map_err(|e| Error::bad_model(path.display().to_string(), e.to_string()))
}

impl Pictures {
    /// Reads configurations only. `loras` are added to the transformer when it is loaded,
    /// each with its strength.
    pub fn open(bundle: &Bundle, loras: &[(PathBuf, f32)], device: &Device) -> Result<Self> {
        let roles = bundle.manifest.roles.flux.clone().ok_or_else(|| {
            let name = &bundle.manifest.name;
            Error::BadRequest(format!(
                "the bundle {name} has no picture model; choose another"
            ))
        })?;
        let dtype = bundle.manifest.settings.dtype_on(device);
        let schedule = match &roles.scheduler {
            Some(folder) => read_json(&bundle.path(folder)?.join("scheduler_config.json"))?,
            None => ScheduleConfig::dev(),
        };
        let vae_config: vae::Config = read_json(&bundle.path(&roles.vae)?.join("config.json"))?;
        vae_config.check()?;
        Ok(Self {
            vae_config,
            bundle: bundle.clone(),
            loras: loras.to_vec(),
            roles,
            device: device.clone(),
            dtype,
            eight: !device.is_cpu() && bundle.manifest.settings.dtype == "fp8",
            schedule,
            words: Slot::empty(),
            networks: Slot::empty(),
            vae: Slot::empty(),
        })
    }

    /// Pixels of a latent token's side: sizes are multiples of it.
    pub fn token_pixels(&self) -> u32 {
        2 * self.vae_config.factor() as u32
    }

    /// Whether there is a ControlNet.
    pub fn has_control(&self) -> bool {
        self.roles.controlnet.is_some()
    }

    // ---------------------------------------------------------------------------- loading

    fn words(&self) -> Result<Arc<Words>> {
        self.words.get(|| match &self.roles.text {
            FluxText::Minilm { model, tokens } => Ok(Words::Minilm {
                encoder: TextEncoder::shared(&self.bundle.path(model)?, &self.device)?,
                tokens: *tokens,
            }),
            FluxText::T5Clip {
                t5,
                t5_tokenizer,
                clip,
                clip_tokenizer,
                tokens,
            } => {
                let folder = self.bundle.path(t5)?;
                let t5_config: t5::Config = read_json(&folder.join("config.json"))?;
                let t5_weights = Weights::open(&folder)?;
                let folder = self.bundle.path(clip)?;
                let clip_config: ClipConfig = read_json(&folder.join("config.json"))?;
                let clip_weights = Weights::open(&folder)?;
                Ok(Words::T5Clip {
                    t5: T5::new(&t5_config, t5_weights.var_builder(self.dtype, &self.device))?,
                    t5_tokenizer: tokenizer(&self.bundle.path(t5_tokenizer)?)?,
                    clip: Clip::new(
                        &clip_config,
                        clip_weights.var_builder(self.dtype, &self.device),
                    )?,
                    clip_config,
                    clip_tokenizer: tokenizer(&self.bundle.path(clip_tokenizer)?)?,
                    tokens: *tokens,
                })
            }
        })
    }

    fn transformer_config(&self) -> Result<transformer::Config> {
        let folder = self.bundle.path(&self.roles.transformer)?;
        let config: transformer::Config = read_json(&folder.join("config.json"))?;
        config.check()?;
        Ok(config)
    }

    fn networks(&self, residency: Residency) -> Result<Arc<Networks>> {
        self.networks.get(|| {
            let streamed = residency == Residency::Streamed;
            let folder = self.bundle.path(&self.roles.transformer)?;
            let config = self.transformer_config()?;
            let weights = Weights::open(&folder)?;
            let mut vb = names::open(&weights, Kind::Transformer, 0, self.dtype, &self.device)?;
            let shapes = names::transformer_shapes(&config);
            for (file, strength) in &self.loras {
                let lora = Lora::new(&Weights::open(file)?, &shapes)?;
                vb = lora.added_to(vb, f64::from(*strength));
            }
            let flux = match (streamed, self.eight) {
                (true, _) => FluxTransformer::streamed(&config, vb)?,
                (false, true) => FluxTransformer::in_eight_bits(&config, vb)?,
                (false, false) => FluxTransformer::new(&config, vb)?,
            };
            let control = self.roles.controlnet.as_ref().map(|location| {
                let folder = self.bundle.path(location)?;
                let config: controlnet::Config = read_json(&folder.join("config.json"))?;
                let weights = Weights::open(&folder)?;
                let vb = names::open(&weights, Kind::ControlNet, 0, self.dtype, &self.device)?;
                match (streamed, self.eight) {
                    (true, _) => ControlNet::streamed(&config, vb),
                    (false, true) => ControlNet::in_eight_bits(&config, vb),
                    (false, false) => ControlNet::new(&config, vb),
                }
            });
            Ok(Networks {
                flux,
                control: control.transpose()?,
            })
        })
    }

    fn vae(&self) -> Result<Arc<Vae>> {
        self.vae.get(|| {
            let weights = Weights::open(&self.bundle.path(&self.roles.vae)?)?;
            let levels = self.vae_config.block_out_channels.len();
            // In f32 everywhere: FLUX.1's overflows f16, and it runs once.
            let vb = names::open(&weights, Kind::Vae, levels, DType::F32, &self.device)?;
            Vae::new(&self.vae_config, vb)
        })
    }

    /// What a run of `pictures` at this size takes, from the files' headers.
    pub fn need(&self, (width, height): (u32, u32), pictures: usize) -> Result<Need> {
        let bytes = |location: &Location, dtype: DType| -> Result<u64> {
            let weights = Weights::open(&self.bundle.path(location)?)?;
            let sizes = weights
                .names()
                .map(|n| bytes_of(weights.shape(n).unwrap_or_default(), dtype));
            Ok(sizes.sum())
        };
        let words = match &self.roles.text {
            FluxText::Minilm { model, .. } => bytes(model, DType::F32)?,
            FluxText::T5Clip { t5, clip, .. } => bytes(t5, self.dtype)? + bytes(clip, self.dtype)?,
        };
        let flux = bytes(&self.roles.transformer, self.dtype)?;
        let config = self.transformer_config()?;
        let mut streamed = streamed_bytes(&names::transformer_shapes(&config), self.dtype);
        let mut control = 0;
        if let Some(location) = &self.roles.controlnet {
            control = bytes(location, self.dtype)?;
            let folder = self.bundle.path(location)?;
            let config: controlnet::Config = read_json(&folder.join("config.json"))?;
            config.trunk.check()?;
            let own = streamed_bytes(&names::controlnet_shapes(&config), self.dtype);
            streamed = (streamed.0 + own.0, streamed.1.max(own.1));
        }
        let networks = match self.eight {
            // The blocks in half of their bytes, and one of them whole while it is converted.
            true => streamed.0 + (flux + control).saturating_sub(streamed.0) / 2 + streamed.1,
            false => flux + control,
        };
        let pixels = u64::from(width) * u64::from(height);
        let side = u64::from(self.token_pixels());
        let at_once = pictures.min(self.batch((width, height))) as u64;
        let tokens = at_once * (pixels / (side * side) + 512);
        let channels = self
            .vae_config
            .block_out_channels
            .first()
            .copied()
            .unwrap_or(128) as u64;
        Ok(Need {
            words,
            networks,
            streamed: streamed.0 + streamed.1,
            vae: bytes(&self.roles.vae, DType::F32)?,
            // input, normed, qkv, attention, the four-fold hidden layer and its result
            sampling: tokens * config.hidden() as u64 * 16 * 4,
            // beyond a tile's pixels the autoencoder works in tiles
            decoding: at_once.min(BATCH_DECODE as u64)
                * pixels.min((vae::TILE_ABOVE * vae::TILE_ABOVE) as u64)
                * channels
                * 4
                * 5,
        })
    }

    /// Bytes of the parts that are loaded now.
    pub fn loaded(&self, need: &Need) -> u64 {
        let bytes = |is_loaded, bytes| if is_loaded { bytes } else { 0 };
        bytes(self.words.is_loaded(), need.words)
            + bytes(self.networks.is_loaded(), need.networks)
            + bytes(self.vae.is_loaded(), need.vae)
    }

    /// How many pictures of a size go through the networks at once.
    fn batch(&self, (width, height): (u32, u32)) -> usize {
        let side = self.token_pixels();
        let tokens = (width / side).max(1) as usize * (height / side).max(1) as usize;
        (BATCH_TOKENS / tokens).max(1)
    }

    /// Whether so many pictures are made each on a core of its own: between the operations of a
    /// batch cores wait for one another, between pictures they need not. From a thread of the
    /// pool it cannot be: that thread will wait, and may be all there is.
    fn side_by_side(&self, pictures: usize) -> bool {
        self.device.is_cpu()
            && pictures > 1
            && rayon::current_num_threads() > 1
            && rayon::current_thread_index().is_none()
    }

    // ---------------------------------------------------------------------------- stages

    /// The prompts of some texts; equal texts are read once.
    fn read(&self, words: &Words, texts: &[&str]) -> Result<Prompt> {
        let mut unique: Vec<&str> = texts.to_vec();
        unique.sort_unstable();
        unique.dedup();
        let prompt = match words {
            Words::Minilm { encoder, tokens } => {
                let prompt = text::prompt_of_texts(encoder, &unique, *tokens)?;
                Prompt {
                    text: prompt.text.to_dtype(self.dtype)?,
                    pooled: prompt.pooled.to_dtype(self.dtype)?,
                }
            }
            Words::T5Clip {
                t5,
                t5_tokenizer,
                clip,
                clip_config,
                clip_tokenizer,
                tokens,
            } => {
                let ids = |tokenizer: &Tokenizer, length, pad, end| -> Result<Vec<Vec<u32>>> {
                    let rows = unique.iter().map(|text| {
                        let encoding = tokenizer
                            .encode(*text, true)
                            .map_err(|e| Error::BadRequest(format!("tokenizing: {e}")))?;
                        Ok(text::padded(encoding.get_ids(), length, pad, end))
                    });
                    rows.collect()
                };
                let end = match clip_config.eos_token_id {
                    2 => clip_config.vocab_size as u32 - 1,
                    end => end,
                };
                let length = clip_config.max_position_embeddings;
                Prompt {
                    text: t5.states(&ids(t5_tokenizer, *tokens, 0, 1)?)?,
                    pooled: clip.encode(&ids(clip_tokenizer, length, end, end)?)?.1,
                }
            }
        };
        let place = |t: &&str| unique.binary_search(t).unwrap_or(0) as u32;
        let rows: Vec<u32> = texts.iter().map(place).collect();
        let rows = Tensor::from_vec(rows, texts.len(), &self.device)?;
        Ok(Prompt {
            text: prompt.text.index_select(&rows, 0)?,
            pooled: prompt.pooled.index_select(&rows, 0)?,
        })
    }

    /// Packed latents of pictures at the model's size, equal ones encoded once.
    fn encode(&self, vae: &Vae, pictures: &[Picture], hooks: &Hooks) -> Result<Tensor> {
        let mut known: Vec<(&Picture, Tensor)> = Vec::new();
        let mut all = Vec::new();
        for picture in pictures {
            if let Some((_, latents)) = known.iter().find(|(p, _)| *p == picture) {
                all.push(latents.clone());
                continue;
            }
            hooks.check()?;
            let latents = pack(&vae.encode(&picture.to_tensor(&self.device)?)?)?;
            known.push((picture, latents.clone()));
            all.push(latents);
        }
        Ok(Tensor::cat(&all, 0)?)
    }

    /// Makes one picture a job, at the size of its frame's output. All jobs share the plan.
    pub fn run(
        &self,
        plan: &Plan,
        jobs: &[Job],
        residency: Residency,
        hooks: &mut Hooks,
    ) -> Result<(Vec<Picture>, Seconds)> {
        let mut seconds = Seconds::default();
        let keep_loaded = residency == Residency::Together;
        let begin = Instant::now();
        hooks.tell(Stage::Words, 0, 1);
        let texts = self.texts(plan, jobs)?;
        if !keep_loaded {
            self.words.release();
        }
        seconds.words = begin.elapsed().as_secs_f64();

        let begin = Instant::now();
        hooks.tell(Stage::Encode, 0, 1);
        let encoded = self.sources(plan, jobs, hooks)?;
        if !keep_loaded && hooks.preview.is_none() {
            self.vae.release();
        }
        seconds.encode = begin.elapsed().as_secs_f64();

        let begin = Instant::now();
        hooks.tell(Stage::Load, 0, 1);
        let networks = self.networks(residency)?;
        let batch = self.batch(plan.model);
        let chunks = jobs.len().div_ceil(batch);
        let mut latents = Vec::new();
        for (i, chunk) in jobs.chunks(batch).enumerate() {
            let first = i * batch;
            let texts = texts.rows(first, chunk.len())?;
            let encoded = encoded.rows(first, chunk.len())?;
            // Once out of the slot nobody new gets them: if nobody else has, this is their end.
            let mut last = false;
            if !keep_loaded && i + 1 == chunks {
                self.networks.release();
                last = Arc::strong_count(&networks) == 1;
            }
            let part = Part {
                pictures: self,
                plan,
                networks: &networks,
                jobs: chunk,
                texts: &texts,
                encoded: &encoded,
                last,
            };
            if keep_loaded && self.side_by_side(chunk.len()) && hooks.preview.is_none() {
                latents.extend(part.sample_side_by_side((i, chunks), hooks)?);
            } else {
                latents.push(part.sample((i, chunks), hooks)?);
            }
        }
        drop(networks);
        seconds.sample = begin.elapsed().as_secs_f64();

        let begin = Instant::now();
        let pictures = self.decode(plan, jobs, &Tensor::cat(&latents, 0)?, hooks)?;
        if !keep_loaded {
            self.vae.release();
        }
        let finished = jobs
            .par_iter()
            .zip(&pictures)
            .map(|(job, picture)| job.finish(picture))
            .collect();
        seconds.decode = begin.elapsed().as_secs_f64();
        Ok((finished, seconds))
    }

    fn texts(&self, plan: &Plan, jobs: &[Job]) -> Result<Texts> {
        let words = self.words()?;
        let read = |texts: Vec<&str>| self.read(&words, &texts);
        let captions = || jobs.iter().map(|j| j.caption).collect();
        let empty = || vec![""; jobs.len()];
        let told = |i: usize| read(jobs.iter().map(|j| j.texts[i].as_str()).collect());
        Ok(Texts {
            prompts: (0..plan.prompts).map(told).collect::<Result<_>>()?,
            origin: match plan.backend {
                Backend::Flowedit => Some(read(captions())?),
                Backend::RfInversion => Some(read(empty())?),
                _ => None,
            },
            negative: match plan.true_cfg {
                1.0 if plan.prompts == 1 => None,
                _ => Some(read(empty())?),
            },
        })
    }

    fn sources(&self, plan: &Plan, jobs: &[Job], hooks: &Hooks) -> Result<Encoded> {
        if !plan.has_source {
            return Ok(Encoded::default());
        }
        let sources: Vec<Picture> = jobs
            .iter()
            .filter_map(|job| Some(job.frame.to_model(job.source?)))
            .collect();
        let vae = self.vae()?;
        let control = match plan.control.filter(|_| self.has_control()) {
            None => None,
            Some(kind) => {
                let control = self.control(kind);
                let shown: Vec<Picture> = sources.iter().map(|p| control.of(p)).collect();
                Some(self.encode(&vae, &shown, hooks)?)
            }
        };
        let needs_source = plan.backend != Backend::Canny || plan.has_mask;
        let source = match needs_source {
            false => None,
            true => Some(self.encode(&vae, &sources, hooks)?),
        };
        let mask = match plan.has_mask {
            false => None,
            true => {
                let masks = jobs.iter().map(|job| self.mask_tokens(job));
                Some(Tensor::cat(&masks.collect::<Result<Vec<_>>>()?, 0)?)
            }
        };
        Ok(Encoded {
            control,
            source,
            mask,
        })
    }

    /// How the control picture of a kind is made.
    fn control(&self, kind: ControlKind) -> Control {
        let (low, high) = self.bundle.manifest.settings.canny;
        match kind {
            ControlKind::Canny => Control::Canny { low, high },
            ControlKind::Tile => Control::Tile { factor: 1 },
            ControlKind::Blur => Control::Blur { sigma: 4.0 },
            ControlKind::Grey => Control::Grey,
            ControlKind::Palette => Control::Palette {
                square: self.token_pixels(),
            },
        }
    }

    fn mask_tokens(&self, job: &Job) -> Result<Tensor> {
        let (w, h) = (job.frame.output.0, job.frame.output.1);
        let values = job.mask.map(|m| m.values.clone());
        let values = values.unwrap_or_else(|| vec![255; w as usize * h as usize]);
        let grey = values.iter().flat_map(|v| [*v; 3]).collect();
        let grey = job.frame.to_model(&Picture::from_rgb(w, h, grey));
        let shares: Vec<f32> = grey
            .rgb
            .chunks_exact(3)
            .map(|p| f32::from(p[0]) / 255.0)
            .collect();
        let shape = (grey.height as usize, grey.width as usize);
        let mask = Tensor::from_vec(shares, shape, &self.device)?;
        sampler::mask_tokens(&mask, self.token_pixels() as usize)
    }

    /// Packed latents (b, n, c) to pictures at the model's size. The decoder sees the source
    /// where the transformer has seen it: not where only its edges steered.
    fn decode(
        &self,
        plan: &Plan,
        jobs: &[Job],
        packed: &Tensor,
        hooks: &mut Hooks,
    ) -> Result<Vec<Picture>> {
        let saw = plan.backend != Backend::Canny || plan.control == Some(ControlKind::Tile);
        let source = |job: &Job| -> Result<Option<Tensor>> {
            let source = job.source.filter(|_| saw).map(|s| job.frame.to_model(s));
            source.map(|s| s.to_tensor(&self.device)).transpose()
        };
        let vae = self.vae()?;
        let factor = self.vae_config.factor();
        let (w, h) = (
            plan.model.0 as usize / factor,
            plan.model.1 as usize / factor,
        );
        let latents = unpack(packed, h, w)?.to_dtype(DType::F32)?;
        let b = latents.dim(0)?;
        let part = |first: usize, count: usize| -> Result<Vec<Picture>> {
            let part = latents.narrow(0, first, count)?;
            let sources = jobs.iter().skip(first).take(count).map(source);
            let sources: Option<Vec<Tensor>> =
                sources.collect::<Result<Vec<_>>>()?.into_iter().collect();
            let sources = sources.map(|all| Tensor::cat(&all, 0)).transpose()?;
            let decoded = vae.decode_beside(&part, sources.as_ref())?;
            Picture::from_tensor(&decoded)
        };
        let side_by_side = self.side_by_side(b);
        let mut pictures = Vec::new();
        for first in (0..b).step_by(BATCH_DECODE) {
            hooks.check()?;
            hooks.tell(Stage::Decode, first, b);
            let count = BATCH_DECODE.min(b - first);
            if side_by_side {
                let each = (first..first + count).into_par_iter();
                let each = each.map(|i| part(i, 1)).collect::<Result<Vec<_>>>()?;
                pictures.extend(each.into_iter().flatten());
            } else {
                pictures.extend(part(first, count)?);
            }
        }
        Ok(pictures)
    }
}

impl Job<'_> {
    /// The model's picture at the output size, with what must stay from the source.
    fn finish(&self, picture: &Picture) -> Picture {
        let Some(source) = self.source else {
            return self.frame.from_model(picture);
        };
        let frame = &self.frame;
        let mut out = frame.from_model_with_fine_detail(picture, source, self.fine_detail);
        if (source.width, source.height) == frame.output {
            if let Some(mask) = self.mask {
                out = mask.blend(source, &out);
            }
            out.alpha.clone_from(&source.alpha);
        }
        out.icc.clone_from(&source.icc);
        out
    }
}

struct Texts {
    /// An instruction each; at least one.
    prompts: Vec<Prompt>,
    /// What the source is described by: its caption, or nothing.
    origin: Option<Prompt>,
    negative: Option<Prompt>,
}

fn prompt_rows(prompt: &Prompt, first: usize, n: usize) -> Result<Prompt> {
    Ok(Prompt {
        text: prompt.text.narrow(0, first, n)?,
        pooled: prompt.pooled.narrow(0, first, n)?,
    })
}

impl Texts {
    fn rows(&self, first: usize, n: usize) -> Result<Self> {
        let rows = |p: &Option<Prompt>| p.as_ref().map(|p| prompt_rows(p, first, n)).transpose();
        Ok(Self {
            prompts: self
                .prompts
                .iter()
                .map(|p| prompt_rows(p, first, n))
                .collect::<Result<_>>()?,
            origin: rows(&self.origin)?,
            negative: rows(&self.negative)?,
        })
    }
}

/// What was made of the sources, one row a job.
#[derive(Default)]
struct Encoded {
    control: Option<Tensor>,
    source: Option<Tensor>,
    mask: Option<Tensor>,
}

impl Encoded {
    fn rows(&self, first: usize, n: usize) -> Result<Self> {
        let rows = |t: &Option<Tensor>| {
            let part = t.as_ref().map(|t| t.narrow(0, first, n)?.contiguous());
            part.transpose()
        };
        Ok(Self {
            control: rows(&self.control)?,
            source: rows(&self.source)?,
            mask: rows(&self.mask)?,
        })
    }
}

/// Some of a run's jobs, that go through the networks together.
struct Part<'a> {
    pictures: &'a Pictures,
    plan: &'a Plan,
    networks: &'a Networks,
    jobs: &'a [Job<'a>],
    texts: &'a Texts,
    encoded: &'a Encoded,
    /// Whether the networks are let go after it.
    last: bool,
}

impl<'a> Part<'a> {
    fn grid(&self) -> (usize, usize) {
        let side = self.pictures.token_pixels();
        let (w, h) = self.plan.model;
        ((h / side) as usize, (w / side) as usize)
    }

    fn noise(&self, draw: u32) -> Result<Tensor> {
        let config = &self.pictures.vae_config;
        let (rows, columns) = self.grid();
        let shape = (config.latent_channels, 2 * rows, 2 * columns);
        let each = self.jobs.iter().map(|job| {
            sampler::packed_noise(job.seed, &[job.index], draw, shape, &self.pictures.device)
        });
        Ok(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn conditions(&self, prompts: &[Prompt], guidance: f32, true_cfg: f32) -> Conditions<'a> {
        let (rows, columns) = self.grid();
        let control = self
            .networks
            .control
            .as_ref()
            .zip(self.encoded.control.clone());
        let input = control.map(|(net, condition)| {
            // Nets without modes take none.
            let kind = self.plan.control.unwrap_or(ControlKind::Canny);
            let mode = net
                .config()
                .num_mode
                .map(|_| self.pictures.control(kind).union_mode());
            let mut input =
                ControlInput::new(net, condition, mode, f64::from(self.plan.control_scale));
            input.end = f64::from(self.plan.control_end);
            input
        });
        Conditions {
            flux: &self.networks.flux,
            prompt: prompts[0].clone(),
            more: prompts[1..].to_vec(),
            negative: self.texts.negative.clone(),
            true_cfg: f64::from(true_cfg),
            true_cfg_end: f64::from(self.plan.true_cfg_end),
            guidance,
            controls: input.into_iter().collect(),
            rows,
            columns,
            cache_threshold: f64::from(self.plan.cache_threshold),
            last_run: self.last,
        }
    }

    fn source(&self) -> Result<&Tensor> {
        self.encoded.source.as_ref().ok_or_else(|| {
            let backend = self.plan.backend.as_str();
            Error::BadRequest(format!("the backend {backend} needs a source picture"))
        })
    }

    /// Runs the sampler for every job by itself, several at a time; `(part, parts)` as in
    /// [`Self::sample`]. This thread only passes on how far they are.
    fn sample_side_by_side(
        &self,
        (part, parts): (usize, usize),
        hooks: &mut Hooks,
    ) -> Result<Vec<Tensor>> {
        let n = self.jobs.len();
        let cancel = hooks.cancel;
        let one = |at: usize, progress: &mut dyn FnMut(Progress)| {
            let part = Part {
                jobs: &self.jobs[at..=at],
                texts: &self.texts.rows(at, 1)?,
                encoded: &self.encoded.rows(at, 1)?,
                ..*self
            };
            let mut hooks = Hooks {
                progress: Some(progress),
                cancel,
                ..Hooks::default()
            };
            part.sample((0, 1), &mut hooks)
        };
        let (one, (tell, told)) = (&one, mpsc::channel());
        let mut made: Vec<Option<Result<Tensor>>> = (0..n).map(|_| None).collect();
        rayon::in_place_scope(|scope| {
            for (at, made) in made.iter_mut().enumerate() {
                let tell = tell.clone();
                scope.spawn(move |_| {
                    let mut progress = |p: Progress| {
                        // Nobody listens once this thread has gone on.
                        let _ = tell.send(p.total);
                    };
                    *made = Some(one(at, &mut progress));
                });
            }
            drop(tell);
            for (steps, total) in (1..).zip(told) {
                if steps % n == 0 {
                    hooks.tell(Stage::Sample, part * total + steps / n, parts * total);
                }
            }
        });
        let all = made.into_iter();
        all.map(|one| one.unwrap_or(Err(Error::Cancelled)))
            .collect()
    }

    /// Runs the sampler; `(part, parts)` places this part within the progress.
    fn sample(&self, (part, parts): (usize, usize), hooks: &mut Hooks) -> Result<Tensor> {
        let (plan, schedule) = (self.plan, &self.pictures.schedule);
        let (rows, columns) = self.grid();
        let tokens = rows * columns;
        let noise = self.noise(0)?;
        let prompts = &self.texts.prompts;
        let conditions = self.conditions(prompts, plan.guidance, plan.true_cfg);
        let origin = self.texts.origin.as_ref().map(std::slice::from_ref);
        let origin = origin.unwrap_or(&prompts[..1]);
        let keep = match (&self.encoded.mask, &self.encoded.source) {
            (Some(mask), Some(source)) => Some(Keep {
                mask,
                source,
                noise: &noise,
            }),
            _ => None,
        };
        let keep = keep.as_ref();
        let level = match plan.start {
            Start::NoiseLevel(level) => f64::from(level),
            Start::Strength(s) => Schedule::level_of_strength(schedule, tokens, f64::from(s)),
        };
        let cancel = hooks.cancel;
        let every = hooks.preview_every;
        let mut after = |step: &Step| -> Result<()> {
            let (done, total) = (part * step.total + step.done, parts * step.total);
            hooks.tell(Stage::Sample, done, total);
            if every > 0
                && step.done.is_multiple_of(every)
                && step.done < step.total
                && hooks.preview.is_some()
            {
                let soon = step.preview()?;
                let pictures =
                    self.pictures
                        .decode(plan, self.jobs, &soon, &mut Hooks::default())?;
                if let Some(preview) = hooks.preview.as_mut() {
                    preview(step.done, &pictures);
                }
            }
            Ok(())
        };
        let mut watch = Watch::new(Some(&mut after), cancel);
        let watch = &mut watch;
        match plan.backend {
            Backend::Canny => {
                let schedule = Schedule::full(schedule, plan.steps, tokens)?;
                sampler::generate(&conditions, &schedule, &noise, keep, watch)
            }
            // Below a thousandth nothing would change but rounding.
            Backend::Img2img if level < 1e-3 => Ok(self.source()?.clone()),
            Backend::Img2img => {
                let schedule = Schedule::from_level(schedule, plan.steps, tokens, level)?;
                sampler::img2img(&conditions, &schedule, self.source()?, &noise, keep, watch)
            }
            Backend::RfInversion => {
                let schedule = Schedule::full(schedule, plan.steps, tokens)?;
                let mut empty = self.conditions(origin, 0.0, 1.0);
                empty.controls.clear();
                let source = self.source()?;
                let options = RfInversion {
                    eta: f64::from(1.0 - strength_of(plan)).clamp(0.0, 1.0),
                    ..RfInversion::paper()
                };
                sampler::rf_inversion(
                    &empty,
                    &conditions,
                    &schedule,
                    source,
                    &noise,
                    &options,
                    keep,
                    watch,
                )
            }
            Backend::Flowedit => {
                let schedule = Schedule::full(schedule, plan.steps, tokens)?;
                let origin = self.conditions(origin, plan.guidance.min(1.5), 1.0);
                let steps = (plan.steps as f32 * strength_of(plan)).round() as usize;
                let options = FlowEdit {
                    n_max: steps.clamp(1, plan.steps),
                    ..FlowEdit::paper()
                };
                let fresh = |draw| self.noise(draw);
                let source = self.source()?;
                let moved = sampler::flowedit(
                    &origin,
                    &conditions,
                    &schedule,
                    source,
                    fresh,
                    &options,
                    keep,
                    watch,
                )?;
                // Who asks for what the caption says asks for nothing, whatever the guidance of
                // source and target.
                let asks = |job: &Job| u8::from(job.texts.iter().any(|t| t != job.caption));
                let asks: Vec<u8> = self.jobs.iter().map(asks).collect();
                let asks = Tensor::from_vec(asks, (self.jobs.len(), 1, 1), moved.device())?;
                let source = source.to_dtype(moved.dtype())?;
                Ok(asks
                    .broadcast_as(moved.shape())?
                    .where_cond(&moved, &source)?)
            }
        }
    }
}

fn strength_of(plan: &Plan) -> f32 {
    match plan.start {
        Start::Strength(s) | Start::NoiseLevel(s) => s,
    }
}

/// Bytes of memory that can still be taken on a device, where that can be known.
pub(super) fn free_bytes(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return crate::card::free_bytes(cuda).ok();
    }
    if !device.is_cpu() {
        return None;
    }
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
