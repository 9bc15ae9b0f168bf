//! The engine: a bundle's models behind four calls, [`Engine::instruct`], [`Engine::edit`],
//! [`Engine::edit_batch`] and [`Engine::generate`].
//!
//! Models are loaded when a call first needs them, so opening costs nothing and a caller who
//! only wants instructions never loads a picture model. Everything is `Send + Sync`; calls
//! from several threads share the models and their memory. The engine reads a snapshot and
//! returns values: it never writes to a store. No async runtime is asked for.
//!
//! ```no_run
//! use simpatico_engine::edit::{EditRequest, Hooks, Source};
//! use simpatico_engine::{engine::Engine, provenance};
//! use simpatico_storage::{Options, Store};
//!
//! let store = Store::open("simpatico.store", Options::default()).unwrap();
//! let engine = Engine::open("default", &candle_core::Device::Cpu)?;
//! let request = EditRequest {
//!     user: "ada".into(),
//!     source: Some(Source::open("mug.png".as_ref())?),
//!     caption: Some("a white mug on a table".into()),
//!     ..EditRequest::default()
//! };
//! let edit = engine.edit(&store.snapshot(), &request, &mut Hooks::default())?;
//! provenance::write("out.png".as_ref(), &edit.images[0], &edit.provenance[0])?;
//! # Ok::<(), simpatico_engine::Error>(())
//! ```

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use simpatico_schema::edit::{
    Backend, ControlKind, EditSettings, InstructRequest, Instruction, LoraUse, ModelDigest,
    Provenance, Why,
};
use simpatico_storage::Snapshot;

use crate::bundle::{Bundle, Location};
use crate::edit::{Edit, EditRequest, Hooks, MaskInput, Source, Stage, without_names};
use crate::picture::{Frame, Picture};
use crate::policy::Policy;
use crate::provenance::{self, COMPOSITE, TRAINED, with_id};
use crate::slot::Slot;
use crate::{Error, Result};

mod pictures;

use pictures::{Job, Pictures, Plan, Start};

/// The most pictures of one call.
const MAX_PICTURES: usize = 1_024;
/// The longest words taken, in bytes.
const MAX_WORDS: usize = 4_096;
/// The most instructions of one picture: each costs a run of the network a step.
const MAX_INSTRUCTIONS: usize = 8;

/// A bundle's models, ready when needed.
pub struct Engine {
    bundle: Bundle,
    device: Device,
    pseudonym_key: Option<[u8; 32]>,
    memory_limit: Option<u64>,
    loras: Vec<(PathBuf, f32)>,
    policy: Slot<Policy>,
    pictures: Slot<Pictures>,
}

/// Has candle use the cores this process may use, unless CANDLE_NUM_THREADS or
/// RAYON_NUM_THREADS says otherwise. It counts the machine's, and its threads wait for each
/// other by spinning: held to one core of two, a training step took four times as long.
///
/// # Safety
/// It changes the environment: to be called before the process has a second thread.
#[allow(unsafe_code)]
pub unsafe fn use_own_cores() {
    const CANDLE: &str = "CANDLE_NUM_THREADS";
    if [CANDLE, "RAYON_NUM_THREADS"].map(std::env::var_os) == [None, None] {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: the caller promises that no other thread reads the environment meanwhile.
        unsafe { std::env::set_var(CANDLE, cores.to_string()) };
    }
}

/// The device a word names: "cpu", "cuda", "cuda:1", "metal"; `None`: the best this build and
/// machine have.
///
/// # Errors
/// [`Error::BadRequest`] for other words, and where the build has no such device.
pub fn device(word: Option<&str>) -> Result<Device> {
    let absent = |e: candle_core::Error| {
        Error::BadRequest(format!(
            "no such device here ({e}); use --device cpu, or build with `--features cuda` or \
             `metal`"
        ))
    };
    let number = |n: &str| {
        n.parse()
            .map_err(|_| Error::BadRequest(format!("device: expected a number, got {n:?}")))
    };
    match word {
        None if cfg!(feature = "cuda") => cuda(0).map_err(absent),
        None if cfg!(feature = "metal") => Device::metal_if_available(0).map_err(absent),
        None | Some("cpu") => Ok(Device::Cpu),
        Some("cuda") => cuda(0).map_err(absent),
        Some("metal") => Device::new_metal(0).map_err(absent),
        Some(other) => match other.strip_prefix("cuda:") {
            Some(n) => cuda(number(n)?).map_err(absent),
            None => Err(Error::BadRequest(format!(
                "device: expected cpu, cuda, cuda:N or metal, got {other:?}"
            ))),
        },
    }
}

#[cfg(feature = "cuda")]
use crate::card::open as cuda;

/// An error that says what is missing.
#[cfg(not(feature = "cuda"))]
fn cuda(n: usize) -> candle_core::Result<Device> {
    Device::new_cuda(n)
}

/// The word for a device, as in provenance.
pub fn device_word(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// A request with every setting filled in and checked, and its frame planned.
struct Planned {
    settings: EditSettings,
    frame: Frame,
    plan: Plan,
}

/// A planned request with its words.
struct Ready {
    planned: Planned,
    instruction: Instruction,
    /// What the picture model is told, an instruction each.
    texts: Vec<String>,
    caption: String,
    instruct_seconds: f64,
}

impl Engine {
    /// An engine on the bundle of this name or folder (see [`Bundle::find`]). Reads the
    /// manifest and loads nothing yet.
    ///
    /// # Errors
    /// [`Error::MissingModel`] where there is no such bundle, with where it was looked for.
    pub fn open(bundle: &str, device: &Device) -> Result<Self> {
        Ok(Self::new(Bundle::find(bundle)?, device))
    }

    /// An engine on a bundle already found.
    pub fn new(bundle: Bundle, device: &Device) -> Self {
        Self {
            bundle,
            device: device.clone(),
            pseudonym_key: None,
            memory_limit: None,
            loras: Vec::new(),
            policy: Slot::empty(),
            pictures: Slot::empty(),
        }
    }

    /// The same, writing users' pseudonyms under this key into provenance (see
    /// [`provenance::key_at`]). Without a key provenance names no user.
    pub fn with_pseudonym_key(mut self, key: [u8; 32]) -> Self {
        self.pseudonym_key = Some(key);
        self
    }

    /// The same, keeping its models and work within so many bytes, in place of what is free.
    pub fn with_memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// The same, with a LoRA for the picture model, `strength` times what its file says; may
    /// be called for several. Files are read with the model, when it is first needed.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for a strength that is no number from -4 to 4.
    pub fn with_lora(mut self, file: &Path, strength: f32) -> Result<Self> {
        if !(-4.0..=4.0).contains(&strength) {
            return Err(Error::BadRequest(format!(
                "LoRA strength: expected -4 to 4, got {strength}"
            )));
        }
        self.loras.push((file.to_path_buf(), strength));
        self.pictures = Slot::empty();
        Ok(self)
    }

    /// The bundle.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// One instruction for a user and a caption.
    ///
    /// # Errors
    /// [`Error::MissingModel`] where a model of the policy is not there; [`Error::BadRequest`]
    /// for words beyond the limits.
    pub fn instruct(&self, snapshot: &Snapshot, request: &InstructRequest) -> Result<Instruction> {
        let one = self.policy()?.instruct(snapshot, request);
        one.map_err(|e| self.recovered(e))
    }

    /// Many instructions at once, each the one that [`Engine::instruct`] gives; see
    /// [`Policy::instruct_batch`].
    ///
    /// # Errors
    /// As `instruct`, for the first request that has one.
    pub fn instruct_batch(
        &self,
        snapshot: &Snapshot,
        requests: &[InstructRequest],
    ) -> Result<Vec<Instruction>> {
        self.write(snapshot, requests, || ControlFlow::Continue(()))
    }

    fn write(
        &self,
        snapshot: &Snapshot,
        requests: &[InstructRequest],
        go_on: impl FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<Instruction>> {
        let all = self.policy()?.instruct_batch(snapshot, requests, go_on);
        all.map_err(|e| self.recovered(e))
    }

    /// An error after which a device whose memory was used up is ready for something smaller.
    fn recovered(&self, error: Error) -> Error {
        #[cfg(feature = "cuda")]
        if let (Error::OutOfMemory { .. }, Device::Cuda(cuda)) = (&error, &self.device) {
            // What happened first is what is told.
            let _ = crate::card::give_back(cuda);
        }
        error
    }

    /// The policy, loaded if it was not.
    pub fn policy(&self) -> Result<Arc<Policy>> {
        let policy = self.policy.get(|| Policy::open(&self.bundle, &self.device));
        policy.map_err(|e| self.recovered(e))
    }

    fn pictures(&self) -> Result<Arc<Pictures>> {
        self.pictures
            .get(|| Pictures::open(&self.bundle, &self.loras, &self.device))
    }

    /// Edits one picture for one user: writes the instruction unless the request brings its
    /// own, and makes `settings.count` pictures, picture i from (seed, i).
    ///
    /// # Errors
    /// Named ones for everything a request, a picture or a bundle can have wrong;
    /// [`Error::Cancelled`] within one step of the flag being set.
    pub fn edit(
        &self,
        snapshot: &Snapshot,
        request: &EditRequest,
        hooks: &mut Hooks,
    ) -> Result<Edit> {
        let mut edits = self.edit_batch(snapshot, std::slice::from_ref(request), hooks)?;
        edits
            .pop()
            .ok_or_else(|| Error::BadRequest("nothing was asked for".into()))
    }

    /// Makes a new picture for a user from words: `request.caption` says what, and the
    /// instruction adds the user's taste. The same as [`Engine::edit`] without a source.
    pub fn generate(
        &self,
        snapshot: &Snapshot,
        request: &EditRequest,
        hooks: &mut Hooks,
    ) -> Result<Edit> {
        let request = EditRequest {
            source: None,
            mask: None,
            ..request.clone()
        };
        if request.caption.as_deref().unwrap_or("").trim().is_empty() {
            return Err(Error::BadRequest("generate: say what to make".into()));
        }
        self.edit(snapshot, &request, hooks)
    }

    /// Carries out many requests, in their order. Those that share settings and shape go
    /// through the networks together, whoever's and of whatever source they are; each picture
    /// is the one that its request alone would give, up to the order of additions.
    pub fn edit_batch(
        &self,
        snapshot: &Snapshot,
        requests: &[EditRequest],
        hooks: &mut Hooks,
    ) -> Result<Vec<Edit>> {
        let pictures = self.pictures()?;
        requests.iter().try_for_each(check_words)?;
        // All that can be wrong with a request is said before the words, which take longer.
        let planned = requests
            .iter()
            .map(|request| self.plan(request, &pictures))
            .collect::<Result<Vec<_>>>()?;
        let total: usize = planned.iter().map(|p| p.settings.count).sum();
        if total > MAX_PICTURES {
            return Err(Error::BadRequest(format!(
                "expected at most {MAX_PICTURES} pictures in one call, got {total}"
            )));
        }
        let written = self.instructions(snapshot, requests, hooks)?;
        let ready: Vec<Ready> = requests
            .iter()
            .zip(planned)
            .zip(written)
            .map(|((request, planned), (words, seconds))| {
                self.ready(request, planned, words, seconds)
            })
            .collect();
        let mut edits: Vec<Option<Edit>> = requests.iter().map(|_| None).collect();
        for first in 0..requests.len() {
            if edits[first].is_some() {
                continue;
            }
            let plan = &ready[first].planned.plan;
            let group: Vec<usize> = (first..requests.len())
                .filter(|i| ready[*i].planned.plan == *plan)
                .collect();
            let jobs: Vec<Job> = group
                .iter()
                .flat_map(|i| jobs_of(&requests[*i], &ready[*i]))
                .collect();
            let (mut images, seconds) = self.run(&pictures, plan, &jobs, hooks)?;
            for i in group {
                let rest = images.split_off(ready[i].planned.settings.count.min(images.len()));
                let own = std::mem::replace(&mut images, rest);
                let mut seconds = seconds;
                seconds.instruct = ready[i].instruct_seconds;
                edits[i] = Some(Edit {
                    provenance: self.provenance(&requests[i], &ready[i], own.len())?,
                    images: own,
                    instruction: ready[i].instruction.clone(),
                    seconds,
                });
            }
        }
        Ok(edits.into_iter().flatten().collect())
    }

    fn run(
        &self,
        pictures: &Pictures,
        plan: &Plan,
        jobs: &[Job],
        hooks: &mut Hooks,
    ) -> Result<(Vec<Picture>, crate::edit::Seconds)> {
        let need = pictures.need(plan.model, jobs.len())?;
        let free = match self.memory_limit {
            Some(limit) => Some(limit),
            // What is loaded already is part of what may be used.
            None => pictures::free_bytes(&self.device).map(|free| free + pictures.loaded(&need)),
        };
        let residency = need.residency(free, &device_word(&self.device))?;
        let made = pictures.run(plan, jobs, residency, hooks);
        made.map_err(|e| {
            let instead = "ask for a smaller --size, fewer pictures at once, or a smaller bundle";
            self.recovered(e.during("making the pictures", instead))
        })
    }

    /// Makes the picture of a provenance record again, with the record: the same bytes on the
    /// same device.
    ///
    /// # Errors
    /// [`Error::BadRequest`] where source or mask are not the recorded ones, or a model file
    /// has changed since.
    pub fn replay(
        &self,
        record: &Provenance,
        source: Option<&Source>,
        mask: Option<&MaskInput>,
        hooks: &mut Hooks,
    ) -> Result<(Picture, Provenance)> {
        provenance::check(record).map_err(Error::BadRequest)?;
        let same = |what: &str, want: &Option<String>, got: Option<&String>| {
            if want.as_ref() == got {
                return Ok(());
            }
            Err(Error::BadRequest(format!(
                "replay: expected the {what} with SHA-256 {}, got {}",
                want.as_deref().unwrap_or("(none)"),
                got.map_or("none", String::as_str)
            )))
        };
        same("source", &record.source_sha256, source.map(|s| &s.sha256))?;
        same("mask", &record.mask_sha256, mask.map(|m| &m.sha256))?;
        let pictures = self.pictures()?;
        // Names may change, what is in the files may not.
        let loras = |uses: &[LoraUse]| -> String {
            let each = |l: &LoraUse| format!("{} at {}", l.sha256, l.strength);
            uses.iter().map(each).collect::<Vec<_>>().join(", ")
        };
        let (expected, got) = (loras(&record.loras), loras(&self.lora_uses()?));
        if expected != got {
            return Err(Error::BadRequest(format!(
                "replay: expected these LoRAs, by SHA-256 and strength: [{expected}], got [{got}]"
            )));
        }
        if let Some((soften, mask)) = record.mask_soften.zip(mask)
            && soften != mask.soften
        {
            return Err(Error::BadRequest(format!(
                "replay: expected a mask softened over {soften} pixels, got {}",
                mask.soften
            )));
        }
        let taking_part: Vec<ModelDigest> = self.digests(&record.settings)?;
        for model in taking_part {
            let recorded = record.models.iter().find(|m| m.file == model.file);
            same(
                &format!("model file {}", model.file),
                &recorded.map(|m| m.sha256.clone()),
                Some(&model.sha256),
            )?;
        }
        let mut settings = record.settings.clone();
        if record.version < 2 {
            // Fine detail did not come back then.
            settings.fine_detail = Some(0.0);
        }
        if record.version < 4 {
            // True guidance acted in every step.
            settings.true_cfg_end = Some(1.0);
        }
        let request = EditRequest {
            source: source.cloned(),
            mask: mask.cloned(),
            caption: record.caption.clone(),
            instructions: match record.instructions.is_empty() {
                true => vec![record.instruction.clone()],
                false => record.instructions.clone(),
            },
            settings,
            ..EditRequest::default()
        };
        let instruction = Instruction {
            instruction: record.instruction.clone(),
            why: Why::default(),
            fallback: None,
        };
        let planned = self.plan(&request, &pictures)?;
        let ready = self.ready(&request, planned, instruction, 0.0);
        // The whole call again: a picture must not depend on what else is in its batch, but
        // additions in another order may round another way.
        let jobs = jobs_of(&request, &ready);
        let (mut images, _) = self.run(&pictures, &ready.planned.plan, &jobs, hooks)?;
        if record.index >= images.len() {
            let (index, count) = (record.index, images.len());
            let message = format!("replay: picture {index} of a call for {count}");
            return Err(Error::BadRequest(message));
        }
        Ok((images.swap_remove(record.index), record.clone()))
    }

    // -------------------------------------------------------------------------- preparing

    /// The instruction of each request, its own or written for it, and the seconds it took.
    fn instructions(
        &self,
        snapshot: &Snapshot,
        requests: &[EditRequest],
        hooks: &mut Hooks,
    ) -> Result<Vec<(Instruction, f64)>> {
        let own = |request: &EditRequest| Instruction {
            instruction: request.instructions.join("; "),
            why: Why {
                as_of: snapshot.as_of(),
                ..Why::default()
            },
            fallback: None,
        };
        let asked: Vec<InstructRequest> = requests
            .iter()
            .filter(|request| request.instructions.is_empty())
            .map(|request| InstructRequest {
                user: request.user.clone(),
                caption: self.caption(request),
                cue: request.cue.clone(),
                explore: request.explore,
                seed: request.settings.seed,
                ..InstructRequest::default()
            })
            .collect();
        let mut written = Vec::with_capacity(asked.len());
        for some in asked.chunks(crate::policy::TOGETHER) {
            hooks.check()?;
            hooks.tell(Stage::Instruct, written.len(), asked.len());
            let begin = Instant::now();
            let go_on = || match hooks.check() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            };
            let words = self.write(snapshot, some, go_on)?;
            let seconds = begin.elapsed().as_secs_f64() / some.len() as f64;
            written.extend(words.into_iter().map(|words| (words, seconds)));
        }
        let mut written = written.into_iter();
        let each = requests.iter().map(|request| {
            match request.instructions.is_empty() {
                true => written.next(),
                false => Some((own(request), 0.0)),
            }
            .ok_or_else(|| Error::BadRequest("an instruction is missing".into()))
        });
        each.collect()
    }

    fn caption(&self, request: &EditRequest) -> String {
        let neutral = &self.bundle.manifest.settings.neutral_caption;
        request.caption.as_ref().unwrap_or(neutral).clone()
    }

    fn plan(&self, request: &EditRequest, pictures: &Pictures) -> Result<Planned> {
        let source = request.source.as_ref().map(|s| &s.picture);
        let settings = self.settings(request, pictures)?;
        let output = settings.size.unwrap_or((1, 1));
        if let Some(input) = &request.mask {
            let Some(source) = source else {
                return Err(Error::BadRequest("a mask needs a source picture".into()));
            };
            input
                .mask
                .check(source.width, source.height)
                .map_err(|p| p.named("mask"))?;
            if output != (source.width, source.height) {
                let message = "a mask keeps pixels of the source, so --size cannot change them";
                return Err(Error::BadRequest(message.into()));
            }
        }
        let defaults = &self.bundle.manifest.settings;
        let multiple = defaults.multiple.next_multiple_of(pictures.token_pixels());
        let frame = Frame::plan(output, defaults.side_for(output), multiple, defaults.fit());
        let plan = Plan {
            backend: settings.backend.unwrap_or_default(),
            steps: settings.steps.unwrap_or(defaults.steps),
            guidance: settings.guidance.unwrap_or(defaults.guidance),
            true_cfg: settings.true_cfg.unwrap_or(1.0),
            true_cfg_end: settings.true_cfg_end.unwrap_or(1.0),
            control: settings.control,
            control_scale: settings.control_scale.unwrap_or(0.0),
            control_end: settings.control_end.unwrap_or(1.0),
            start: match (settings.noise_level, settings.strength) {
                (Some(level), _) => Start::NoiseLevel(level),
                (None, strength) => Start::Strength(strength.unwrap_or(1.0)),
            },
            cache_threshold: settings.cache_threshold.unwrap_or(0.0),
            // One that is written is the only one.
            prompts: request.instructions.len().max(1),
            model: frame.model,
            has_source: source.is_some(),
            has_mask: request.mask.is_some(),
        };
        Ok(Planned {
            settings,
            frame,
            plan,
        })
    }

    fn ready(
        &self,
        request: &EditRequest,
        planned: Planned,
        instruction: Instruction,
        instruct_seconds: f64,
    ) -> Ready {
        let caption = self.caption(request);
        let source = request.source.as_ref();
        let backend = planned.settings.backend.unwrap_or_default();
        let text = |told: &String| match (source, backend, told.trim()) {
            // What is made from nothing, and FlowEdit's target, are described whole.
            (None, _, told) | (_, Backend::Flowedit, told) if told != caption => {
                format!("{caption}. {told}")
            }
            (_, _, told) => told.to_string(),
        };
        // One that was written is the only one.
        let texts: Vec<String> = match request.instructions.as_slice() {
            [] => [&instruction.instruction].into_iter().map(text).collect(),
            own => own.iter().map(text).collect(),
        };
        Ready {
            planned,
            instruction,
            texts,
            caption,
            instruct_seconds,
        }
    }

    /// The request's settings with the bundle's in every gap, checked.
    fn settings(&self, request: &EditRequest, pictures: &Pictures) -> Result<EditSettings> {
        let (asked, defaults) = (&request.settings, &self.bundle.manifest.settings);
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(value);
            }
            Err(Error::BadRequest(format!(
                "{name}: expected {low} to {high}, got {value}"
            )))
        };
        let source = request.source.as_ref().map(|s| &s.picture);
        let backend = match source {
            Some(_) => asked.backend.unwrap_or(defaults.backend),
            None => asked.backend.unwrap_or_default(),
        };
        let control = match backend {
            Backend::Canny => asked.control.or(Some(ControlKind::Canny)),
            Backend::Img2img => asked.control.or(defaults.control),
            Backend::RfInversion | Backend::Flowedit => asked.control,
        };
        if source.is_none() && backend != Backend::Canny {
            let word = backend.as_str();
            let message = format!("the backend {word} edits a source picture; none was given");
            return Err(Error::BadRequest(message));
        }
        if backend == Backend::Flowedit && request.caption.is_none() {
            let message = "flowedit needs --caption: it moves from what the source shows to what \
                           the instruction asks for";
            return Err(Error::BadRequest(message.into()));
        }
        let steps = asked.steps.unwrap_or(defaults.steps);
        if !(1..=1_000).contains(&steps) {
            return Err(Error::BadRequest(format!(
                "steps: expected 1 to 1000, got {steps}"
            )));
        }
        let control_scale = match (source, asked.control_scale) {
            (None, _) => 0.0,
            (Some(_), Some(scale)) => within("control scale", scale, 0.0, 2.0)?,
            (Some(_), None) if control.is_some() => defaults.control_scale,
            (Some(_), None) => 0.0,
        };
        // A scale without a kind means edges, the paper's control.
        let control = (control_scale > 0.0).then(|| control.unwrap_or(ControlKind::Canny));
        if control_scale > 0.0 && !pictures.has_control() {
            let name = &self.bundle.manifest.name;
            return Err(Error::BadRequest(format!(
                "the bundle {name} has no ControlNet; use --backend img2img without a control \
                 scale"
            )));
        }
        let starts = backend != Backend::Canny;
        // A bundle's strength is img2img's. The other two have their papers' own (η of 0.9, 24 of
        // 28 steps), without which an inversion would hold nothing of the source at strength 1.
        let usual = match backend {
            Backend::RfInversion => 0.1,
            Backend::Flowedit => 24.0 / 28.0,
            Backend::Canny | Backend::Img2img => defaults.strength,
        };
        let strength = asked.strength.unwrap_or(usual);
        let size = match (asked.size, source) {
            (Some((w, h)), _) => {
                let most = u64::from(w) * u64::from(h);
                let sides = 1..=crate::picture::MAX_SIDE;
                let fits = sides.contains(&w) && sides.contains(&h);
                if !fits || most > crate::picture::MAX_PIXELS {
                    let message = format!("size: {w} x {h} is not within the limits");
                    return Err(Error::BadRequest(message));
                }
                (w, h)
            }
            (None, Some(source)) => (source.width, source.height),
            (None, None) => (defaults.side_max, defaults.side_max),
        };
        let noise_level = asked
            .noise_level
            .map(|l| within("noise level", l, 0.0, 1.0));
        let cache = asked
            .cache_threshold
            .map(|t| within("cache threshold", t, 0.0, 1.0));
        Ok(EditSettings {
            backend: Some(backend),
            steps: Some(steps),
            guidance: Some(within(
                "guidance",
                asked.guidance.unwrap_or(defaults.guidance),
                0.0,
                1_000.0,
            )?),
            true_cfg: Some(within(
                "true guidance",
                asked.true_cfg.unwrap_or(defaults.true_cfg),
                0.0,
                100.0,
            )?),
            true_cfg_end: Some(within(
                "true guidance's end",
                asked.true_cfg_end.unwrap_or(defaults.true_cfg_end),
                0.0,
                1.0,
            )?),
            control,
            control_scale: Some(control_scale),
            control_end: Some(within(
                "control end",
                asked.control_end.unwrap_or(defaults.control_end),
                0.0,
                1.0,
            )?),
            strength: match starts && asked.noise_level.is_none() {
                true => Some(within("strength", strength, 0.0, 1.0)?),
                false => None,
            },
            noise_level: noise_level.transpose()?.filter(|_| starts),
            size: Some(size),
            cache_threshold: cache.transpose()?,
            fine_detail: match source {
                Some(_) => Some(within(
                    "fine detail",
                    asked.fine_detail.unwrap_or(1.0),
                    0.0,
                    1.0,
                )?),
                None => None,
            },
            seed: asked.seed,
            count: asked.count.max(1),
        })
    }

    // ------------------------------------------------------------------------- provenance

    /// The files that take part in making the picture.
    fn digests(&self, settings: &EditSettings) -> Result<Vec<ModelDigest>> {
        let Some(flux) = &self.bundle.manifest.roles.flux else {
            return Ok(Vec::new());
        };
        let control = settings.control_scale.unwrap_or(0.0) > 0.0;
        let unused = flux.controlnet.as_ref().filter(|_| !control);
        let mut locations = flux.locations();
        locations.retain(|l| Some(l) != unused);
        self.bundle.digests(&locations)
    }

    /// The LoRAs in use.
    fn lora_uses(&self) -> Result<Vec<LoraUse>> {
        let each = self.loras.iter().map(|(path, strength)| {
            Ok(LoraUse {
                file: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                sha256: provenance::sha256_file(path)?,
                strength: *strength,
            })
        });
        each.collect()
    }

    /// The files that take part in writing the instruction.
    fn policy_digests(&self) -> Result<Vec<ModelDigest>> {
        let roles = &self.bundle.manifest.roles;
        let parts = [
            &roles.language_model,
            &roles.tokenizer,
            &roles.adapters,
            &roles.soft_prompt,
            &roles.sage,
        ];
        let locations: Vec<Location> = parts.into_iter().flatten().cloned().collect();
        self.bundle.digests(&locations)
    }

    fn provenance(
        &self,
        request: &EditRequest,
        ready: &Ready,
        count: usize,
    ) -> Result<Vec<Provenance>> {
        let key = self.pseudonym_key.as_ref();
        let mut models = self.digests(&ready.planned.settings)?;
        if request.instructions.is_empty() {
            models.extend(self.policy_digests()?);
            models.sort_by(|a, b| a.file.cmp(&b.file));
            models.dedup();
        }
        let kept_pixels = request.mask.is_some();
        let loras = self.lora_uses()?;
        let record = |index| {
            with_id(Provenance {
                version: provenance::VERSION,
                software: format!("simpatico {}", env!("CARGO_PKG_VERSION")),
                user_pseudonym: key
                    .filter(|_| !request.user.is_empty())
                    .map(|key| provenance::pseudonym(key, &request.user)),
                instruction: ready.instruction.instruction.clone(),
                // One says it all in the field above.
                instructions: match request.instructions.len() {
                    0 | 1 => Vec::new(),
                    _ => request.instructions.clone(),
                },
                caption: Some(ready.caption.clone()),
                cue: request.cue.clone(),
                why: Some(without_names(&ready.instruction.why, key)),
                fallback: ready.instruction.fallback,
                settings: ready.planned.settings.clone(),
                index,
                source_sha256: request.source.as_ref().map(|s| s.sha256.clone()),
                mask_sha256: request.mask.as_ref().map(|m| m.sha256.clone()),
                mask_soften: request.mask.as_ref().map(|m| m.soften),
                bundle: self.bundle.manifest.name.clone(),
                models: models.clone(),
                loras: loras.clone(),
                device: device_word(&self.device),
                digital_source_type: if kept_pixels { COMPOSITE } else { TRAINED }.into(),
                ..Provenance::default()
            })
        };
        Ok((0..count).map(record).collect())
    }
}

fn check_words(request: &EditRequest) -> Result<()> {
    if request.instructions.len() > MAX_INSTRUCTIONS {
        return Err(Error::BadRequest(format!(
            "expected at most {MAX_INSTRUCTIONS} instructions for one picture, got {}; carry out \
             the rest on its result",
            request.instructions.len()
        )));
    }
    let words = request
        .instructions
        .iter()
        .chain(&request.caption)
        .chain(&request.cue);
    if let Some(long) = words.map(String::len).find(|n| *n > MAX_WORDS) {
        return Err(Error::BadRequest(format!(
            "expected caption, cue and instructions of at most {MAX_WORDS} bytes, got {long}"
        )));
    }
    Ok(())
}

fn jobs_of<'a>(request: &'a EditRequest, ready: &'a Ready) -> Vec<Job<'a>> {
    let job = |index| Job {
        source: request.source.as_ref().map(|s| &s.picture),
        mask: request.mask.as_ref().map(|m| &m.mask),
        frame: ready.planned.frame,
        caption: &ready.caption,
        texts: &ready.texts,
        fine_detail: ready.planned.settings.fine_detail.unwrap_or(0.0),
        seed: ready.planned.settings.seed,
        index,
    };
    (0..ready.planned.settings.count as u32).map(job).collect()
}

#[cfg(test)]
mod tests;
