//! Bundles: folders with everything the engine loads, described by a `manifest.json`.
//!
//! The manifest lists the folder's files with sizes and digests, says which file plays which
//! role, and holds the settings that fit these weights. Models too large for the repository
//! are named with a `cache:` in front and lie in the models' cache folder, where
//! [`packages::pull`] puts them.
//!
//! Not here: loading a model. Opening a bundle reads the manifest and nothing else.

use std::path::{Component, Path, PathBuf};

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::ModelDigest;

use simpatico_schema::edit::{Backend, ControlKind};

use crate::picture::Fit;
use crate::provenance::sha256_file;
use crate::{Error, Result};

pub mod archive;
pub mod onnx;
pub mod packages;
pub mod pickle;

use packages::{Model, State};

/// The version of the manifest format.
pub const VERSION: u32 = 1;
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const MANIFEST: &str = "manifest.json";

/// A path within the bundle, `cache:MODEL/FILE` in the models' cache folder, or `default:FILE` of the
/// bundle `default`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Location(pub String);

/// What a manifest says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format, [`VERSION`].
    pub version: u32,
    /// The bundle's name.
    pub name: String,
    /// One sentence.
    #[serde(default)]
    pub about: String,
    /// Licence of the weights in the folder.
    #[serde(default)]
    pub licence: String,
    /// The files in the folder.
    #[serde(default)]
    pub files: Vec<BundleFile>,
    /// Models of the cache folder that are needed, by name.
    #[serde(default)]
    pub models: Vec<String>,
    /// Which file does what.
    pub roles: Roles,
    /// The settings an edit has unless it says otherwise.
    #[serde(default)]
    pub settings: Settings,
}

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleFile {
    /// Path within the folder, with forward slashes.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// Its digest in lower-case hex.
    pub sha256: String,
}

/// Which file does what. A role that is absent is a thing the bundle cannot do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Roles {
    /// The language model: a GGUF file, or a folder with safetensors and config.json.
    pub language_model: Option<Location>,
    /// The language model's tokenizer.json, where it is not inside the model.
    pub tokenizer: Option<Location>,
    /// The policy's adapters: a folder in PEFT's form.
    pub adapters: Option<Location>,
    /// The adapter of the supervised fine-tuning that these came of, in the same form: what
    /// preferences are learnt from anew, and compared with.
    pub fine_tuned: Option<Location>,
    /// From embedding to soft prompt.
    pub soft_prompt: Option<Location>,
    /// GraphSAGE.
    pub sage: Option<Location>,
    /// Text vectors of attributes: a folder with model.safetensors and tokenizer.json.
    pub text_encoder: Option<Location>,
    /// Vectors by which a wish in anybody's words is put in those that the policy learnt
    /// ([`crate::wishes`]); absent: the language model understands wishes as they are.
    pub wishes: Option<Location>,
    /// The picture model.
    pub flux: Option<Flux>,
}

/// The parts of a picture model: folders as diffusers writes them, each with its weights (one
/// file or shards) and config.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flux {
    /// The transformer.
    pub transformer: Location,
    /// The ControlNet; without it only backends without control run.
    #[serde(default)]
    pub controlnet: Option<Location>,
    /// The picture autoencoder.
    pub vae: Location,
    /// The folder of scheduler_config.json; without it FLUX.1-dev's schedule.
    #[serde(default)]
    pub scheduler: Option<Location>,
    /// What reads the instruction.
    pub text: FluxText,
}

/// What turns words into the picture model's conditioning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind", deny_unknown_fields)]
pub enum FluxText {
    /// MiniLM's token states, and their mean as the pooled vector.
    Minilm {
        /// A folder with model.safetensors and tokenizer.json.
        model: Location,
        /// Tokens an instruction is padded or cut to.
        tokens: usize,
    },
    /// T5 states and CLIP's pooled vector, as FLUX.1 takes them.
    T5Clip {
        /// T5 encoder, a folder.
        t5: Location,
        /// T5's tokenizer.json.
        t5_tokenizer: Location,
        /// CLIP text encoder, a folder.
        clip: Location,
        /// CLIP's tokenizer.json.
        clip_tokenizer: Location,
        /// Tokens for T5.
        tokens: usize,
    },
}

/// The settings an edit has unless it says otherwise, and what the picture model was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How the source enters.
    pub backend: Backend,
    /// What the control picture of the backend `img2img` shows; absent: it has none.
    pub control: Option<ControlKind>,
    /// Sampling steps.
    pub steps: usize,
    /// The guidance scalar.
    pub guidance: f32,
    /// True classifier-free guidance; 1 is off.
    pub true_cfg: f32,
    /// Share of the steps after which true guidance ends; 1: it never does.
    pub true_cfg_end: f32,
    /// How strongly control holds.
    pub control_scale: f32,
    /// Share of the steps after which control ends.
    pub control_end: f32,
    /// How far from the source, for backends that start from it.
    pub strength: f32,
    /// Canny's thresholds.
    pub canny: (u16, u16),
    /// Pixels of a side the model works on at least, for small sources.
    pub side_min: u32,
    /// Pixels of a side the model works on at most.
    pub side_max: u32,
    /// Sides are multiples of this many pixels.
    pub multiple: u32,
    /// Squares only, or any shape.
    pub square: bool,
    /// The caption of a picture that came without one.
    pub neutral_caption: String,
    /// Neighbours counted in.
    pub neighbors: usize,
    /// The most tokens of an instruction.
    pub max_tokens: usize,
    /// How much more than by itself a user's embedding counts for the words; 1 to leave it be
    /// and read every prompt once. See [`crate::generate::Options::emphasis`].
    pub emphasis: f32,
    /// Whether the picture model draws nothing but what the vocabulary has a look for: an
    /// instruction that takes up none of it is then written anew.
    pub drawn_only: bool,
    /// Whether the picture model draws one change well and two badly: an instruction then asks for
    /// its first only, unless more was wished for.
    pub one_change: bool,
    /// The weights' type in memory on a GPU: "f32", "bf16", "f16", or "fp8", in which the picture
    /// model's blocks have 8 bits a weight and compute in bf16. On a CPU always f32.
    pub dtype: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            backend: Backend::Canny,
            control: None,
            steps: 20,
            guidance: 3.5,
            true_cfg: 1.0,
            true_cfg_end: 1.0,
            control_scale: 0.7,
            control_end: 1.0,
            strength: 0.8,
            canny: (100, 200),
            side_min: 128,
            side_max: 128,
            multiple: 16,
            square: true,
            neutral_caption: "a picture".into(),
            neighbors: 10,
            max_tokens: 48,
            emphasis: 1.0,
            drawn_only: false,
            one_change: false,
            dtype: "bf16".into(),
        }
    }
}

impl Settings {
    /// What the paper states: 60 steps, control 0.4 (its "guidance 35" read as 3.5), FLUX.1's
    /// sizes. Sec. 5 of arXiv 2511.05616.
    pub fn paper() -> Self {
        Self {
            steps: 60,
            control_scale: 0.4,
            side_min: 256,
            side_max: 1_024,
            square: false,
            max_tokens: 77,
            ..Self::default()
        }
    }

    /// How a source is brought to the model's shape.
    pub fn fit(&self) -> Fit {
        if self.square {
            Fit::Square
        } else {
            Fit::Aspect
        }
    }

    /// The side of a square with about as many pixels as the model shall work on, for a
    /// picture of this size.
    pub fn side_for(&self, (width, height): (u32, u32)) -> u32 {
        let side = (f64::from(width) * f64::from(height)).sqrt().round() as u32;
        side.clamp(self.side_min, self.side_max.max(self.side_min))
    }

    /// What models compute in on a device.
    pub fn dtype_on(&self, device: &Device) -> DType {
        match (device, self.dtype.as_str()) {
            (Device::Cpu, _) | (_, "f32") => DType::F32,
            (_, "f16") => DType::F16,
            _ => DType::BF16,
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        let sides = self.side_min >= 8 && (self.side_min..=8_192).contains(&self.side_max);
        if !sides || self.multiple == 0 || self.multiple > self.side_max {
            return Err("settings: side_min, side_max and multiple make no sense".into());
        }
        if !(1..=1_000).contains(&self.steps) {
            return Err("settings: expected steps from 1 to 1000".into());
        }
        if !["f32", "bf16", "f16", "fp8"].contains(&self.dtype.as_str()) {
            return Err("settings: expected dtype f32, bf16, f16 or fp8".into());
        }
        Ok(())
    }
}

/// A bundle that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    /// Its folder.
    pub folder: PathBuf,
    /// The models' cache folder.
    pub cache: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
}

/// The folder fetched models lie in: the environment's SIMPATICO_MODELS, else the platform's
/// cache folder with `simpatico/models`.
pub fn models_folder() -> PathBuf {
    let home = || std::env::var_os("HOME").or_else(|| std::env::var_os("USERPROFILE"));
    let home = PathBuf::from(home().unwrap_or_else(|| ".".into()));
    if let Some(given) = std::env::var_os("SIMPATICO_MODELS").filter(|v| !v.is_empty()) {
        return given.into();
    }
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(cache) => cache.into(),
        None if cfg!(target_os = "macos") => home.join("Library/Caches"),
        None if cfg!(windows) => home.join("AppData/Local"),
        None => home.join(".cache"),
    };
    cache.join("simpatico").join("models")
}

/// The folders a bundle's name is looked up in, first to last: SIMPATICO_BUNDLES, `bundles`
/// beside the program, the repository it was built from, the user's data folder.
pub fn bundle_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    folders.extend(std::env::var_os("SIMPATICO_BUNDLES").map(PathBuf::from));
    if let Ok(program) = std::env::current_exe() {
        folders.extend(program.parent().map(|p| p.join("bundles")));
    }
    folders.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles"));
    if let Some(home) = std::env::var_os("HOME") {
        folders.push(Path::new(&home).join(".local/share/simpatico/bundles"));
    }
    folders
}

impl Bundle {
    /// Finds a bundle by folder or by name and reads its manifest.
    ///
    /// # Errors
    /// [`Error::MissingModel`] with the places that were looked in.
    pub fn find(name_or_folder: &str) -> Result<Self> {
        let given = Path::new(name_or_folder);
        if given.join(MANIFEST).is_file() {
            return Self::open(given);
        }
        let is_name = given.components().count() == 1 && !name_or_folder.starts_with('.');
        let folders = if is_name {
            bundle_folders()
        } else {
            Vec::new()
        };
        let found = folders.iter().map(|f| f.join(name_or_folder));
        if let Some(folder) = found.into_iter().find(|f| f.join(MANIFEST).is_file()) {
            return Self::open(&folder);
        }
        let places: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
        Err(Error::MissingModel {
            path: given.join(MANIFEST),
            help: format!(
                "give a folder with a manifest.json, or the name of a bundle in one of: {}",
                places.join(", ")
            ),
        })
    }

    /// Reads the manifest of the bundle in a folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadModel`] where the manifest makes no sense.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let bad = |reason: String| Error::bad_model(path.display().to_string(), reason);
        let length = path.metadata().map_err(Error::io(&path))?.len();
        if length > MAX_MANIFEST_BYTES {
            return Err(bad(format!(
                "expected at most {MAX_MANIFEST_BYTES} bytes, got {length}"
            )));
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        check(&manifest).map_err(bad)?;
        Ok(Self {
            folder: folder.to_path_buf(),
            cache: models_folder(),
            manifest,
        })
    }

    /// The path of a location, whether or not there is anything.
    pub fn place(&self, location: &Location) -> PathBuf {
        match location.0.split_once(':') {
            Some(("cache", within)) => self.cache.join(within),
            Some(("default", within)) => {
                let mut folders = bundle_folders().into_iter().map(|f| f.join("default"));
                let found = folders.find(|f| f.join(MANIFEST).is_file());
                found.unwrap_or_else(|| "default".into()).join(within)
            }
            _ => self.folder.join(&location.0),
        }
    }

    /// The path of a location that must be there.
    ///
    /// # Errors
    /// [`Error::MissingModel`] that says how to get it.
    pub fn path(&self, location: &Location) -> Result<PathBuf> {
        let path = self.place(location);
        if path.exists() {
            return Ok(path);
        }
        let within = location.0.strip_prefix("cache:");
        let model = within.and_then(|w| Model::named(w.split('/').next().unwrap_or(w)));
        let help = match (model, within) {
            (Some(model), _) => model.help(&self.cache),
            (None, Some(_)) => "put the file there; its source is in the bundle's README".into(),
            (None, None) => format!(
                "the bundle {} is not whole: restore the file from where the bundle came from",
                self.manifest.name
            ),
        };
        Err(Error::MissingModel { path, help })
    }

    /// The path that plays a role.
    ///
    /// # Errors
    /// [`Error::BadRequest`] where the bundle has nobody for it, else as [`Bundle::path`].
    pub fn role(&self, role: &str, location: Option<&Location>) -> Result<PathBuf> {
        let location = location.ok_or_else(|| {
            let name = &self.manifest.name;
            Error::BadRequest(format!(
                "the bundle {name} has no {role}; choose another bundle"
            ))
        })?;
        self.path(location)
    }

    /// Compares every file of the folder and every needed model with its digest. One line a
    /// file or model: its name, and what is wrong if something is.
    pub fn verify(&self) -> Result<Vec<(String, Option<String>)>> {
        let mut lines = Vec::new();
        for file in &self.manifest.files {
            let path = self.folder.join(&file.path);
            let wrong = if !path.is_file() {
                Some("missing".to_string())
            } else {
                let got = sha256_file(&path)?;
                (got != file.sha256).then(|| format!("expected SHA-256 {}, got {got}", file.sha256))
            };
            lines.push((file.path.clone(), wrong));
        }
        for name in &self.manifest.models {
            let wrong = match Model::named(name)
                .map(|m| m.state(&self.cache))
                .transpose()?
            {
                Some(State::Whole) => None,
                Some(State::Missing(path)) => Some(format!("missing: {}", path.display())),
                Some(State::Wrong(path, why)) => Some(format!("{}: {why}", path.display())),
                None if self.cache.join(name).is_dir() => None,
                None => Some(format!("missing: {}", self.cache.join(name).display())),
            };
            lines.push((format!("cache:{name}"), wrong));
        }
        Ok(lines)
    }

    /// The digests of files and folders that take part, for provenance: in a folder every
    /// file, by name. What is missing is left out.
    pub fn digests(&self, locations: &[Location]) -> Result<Vec<ModelDigest>> {
        let mut digests = Vec::new();
        for location in locations {
            for (name, path) in self.files_at(location)? {
                digests.push(ModelDigest {
                    file: name,
                    sha256: sha256_file(&path)?,
                });
            }
        }
        digests.sort_by(|a, b| a.file.cmp(&b.file));
        digests.dedup();
        Ok(digests)
    }

    fn files_at(&self, location: &Location) -> Result<Vec<(String, PathBuf)>> {
        let path = self.place(location);
        if path.is_file() {
            return Ok(vec![(location.0.clone(), path)]);
        }
        let mut files = Vec::new();
        if path.is_dir() {
            for entry in std::fs::read_dir(&path)
                .map_err(Error::io(&path))?
                .flatten()
            {
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.path().is_file() && !name.starts_with('.') {
                    files.push((format!("{}/{name}", location.0), entry.path()));
                }
            }
        }
        files.sort();
        Ok(files)
    }
}

/// Whether a manifest makes sense and stays within its folder.
fn check(manifest: &Manifest) -> std::result::Result<(), String> {
    if manifest.version != VERSION {
        return Err(format!(
            "expected version {VERSION}, got {}",
            manifest.version
        ));
    }
    manifest.settings.check()?;
    let files = manifest.files.iter().map(|f| f.path.as_str());
    for path in files.chain(locations(&manifest.roles).iter().map(|l| l.0.as_str())) {
        let elsewhere = ["cache:", "default:"]
            .iter()
            .find_map(|p| path.strip_prefix(p));
        stays_inside(elsewhere.unwrap_or(path))?;
    }
    for name in &manifest.models {
        stays_inside(name)?;
    }
    Ok(())
}

fn stays_inside(path: &str) -> std::result::Result<(), String> {
    let plain = |c: Component| matches!(c, Component::Normal(_));
    let ok = !path.is_empty() && !path.contains('\\') && Path::new(path).components().all(plain);
    ok.then_some(())
        .ok_or(format!("{path:?} is not a path within the bundle"))
}

/// Every location that a bundle's roles name.
pub fn locations(roles: &Roles) -> Vec<Location> {
    let single = [
        &roles.language_model,
        &roles.tokenizer,
        &roles.adapters,
        &roles.fine_tuned,
        &roles.soft_prompt,
        &roles.sage,
        &roles.text_encoder,
        &roles.wishes,
    ];
    let mut all: Vec<Location> = single.into_iter().flatten().cloned().collect();
    if let Some(flux) = &roles.flux {
        all.extend(flux.locations());
    }
    all
}

impl Flux {
    /// Every file or folder of the picture model.
    pub fn locations(&self) -> Vec<Location> {
        let mut all = vec![self.transformer.clone(), self.vae.clone()];
        all.extend(self.controlnet.iter().chain(&self.scheduler).cloned());
        match &self.text {
            FluxText::Minilm { model, .. } => all.push(model.clone()),
            FluxText::T5Clip {
                t5,
                t5_tokenizer,
                clip,
                clip_tokenizer,
                ..
            } => all.extend([t5, t5_tokenizer, clip, clip_tokenizer].map(Location::clone)),
        }
        all
    }
}

/// Writes sizes and digests of every file in a bundle's folder into its manifest: the last
/// step of making or retraining one. Hidden files and the manifest itself are left out.
pub fn seal(folder: &Path) -> Result<Manifest> {
    let mut manifest = Bundle::open(folder)?.manifest;
    manifest.files.clear();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next)
            .map_err(Error::io(&next))?
            .flatten()
        {
            let (path, name) = (entry.path(), entry.file_name());
            let hidden = name.to_string_lossy().starts_with('.');
            if path.is_dir() && !hidden {
                open.push(path);
            } else if !hidden && path != folder.join(MANIFEST) {
                let within = path.strip_prefix(folder).unwrap_or(&path);
                let parts: Vec<_> = within.iter().map(|p| p.to_string_lossy()).collect();
                manifest.files.push(BundleFile {
                    path: parts.join("/"),
                    bytes: entry.metadata().map_err(Error::io(&path))?.len(),
                    sha256: sha256_file(&path)?,
                });
            }
        }
    }
    manifest.files.sort_by(|a, b| a.path.cmp(&b.path));
    let json = serde_json::to_string_pretty(&manifest)
        .map_err(|e| Error::bad_model(MANIFEST, e.to_string()))?;
    crate::picture::write_whole(&folder.join(MANIFEST), format!("{json}\n").as_bytes())?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, manifest: &Manifest) {
        let json = serde_json::to_string(manifest).unwrap();
        std::fs::write(folder.join(MANIFEST), json).unwrap();
    }

    fn small() -> Manifest {
        Manifest {
            version: VERSION,
            name: "small".into(),
            roles: Roles {
                sage: Some(Location("sage.safetensors".into())),
                text_encoder: Some(Location("cache:all-minilm-l6-v2".into())),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn a_sealed_bundle_verifies_until_a_byte_changes() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &small());
        std::fs::create_dir(folder.path().join("flux")).unwrap();
        std::fs::write(folder.path().join("sage.safetensors"), b"weights").unwrap();
        std::fs::write(folder.path().join("flux/vae.json"), b"{}").unwrap();
        let sealed = seal(folder.path()).unwrap();
        let names: Vec<_> = sealed.files.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(names, ["flux/vae.json", "sage.safetensors"]);
        let bundle = Bundle::find(folder.path().to_str().unwrap()).unwrap();
        assert!(
            bundle
                .verify()
                .unwrap()
                .iter()
                .all(|(_, wrong)| wrong.is_none())
        );
        std::fs::write(folder.path().join("sage.safetensors"), b"weightz!").unwrap();
        let wrong = bundle.verify().unwrap();
        assert!(wrong[1].1.as_ref().unwrap().contains("SHA-256"));
    }

    #[test]
    fn a_missing_model_says_which_command_brings_it() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &small());
        let mut bundle = Bundle::open(folder.path()).unwrap();
        bundle.cache = folder.path().join("no-cache");
        let encoder = bundle.manifest.roles.text_encoder.clone();
        let said = bundle
            .role("text encoder", encoder.as_ref())
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("simpatico models pull all-minilm-l6-v2"),
            "{said}"
        );
        let said = bundle.role("picture model", None).unwrap_err().to_string();
        assert!(said.contains("no picture model"), "{said}");
    }

    #[test]
    fn a_bundle_that_is_nowhere_says_where_it_was_looked_for() {
        let said = Bundle::find("no-such-bundle").unwrap_err().to_string();
        assert!(said.contains("bundles"), "{said}");
    }

    #[test]
    fn manifests_cannot_reach_outside_their_folder() {
        for path in [
            "../../etc/passwd",
            "/etc/passwd",
            "a/../../b",
            "cache:../x",
            "default:../x",
            "",
        ] {
            let mut manifest = small();
            manifest.roles.sage = Some(Location(path.into()));
            assert!(check(&manifest).is_err(), "{path}");
        }
    }

    #[test]
    fn the_repositorys_own_manifests_can_be_read() {
        let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("bundles");
        for name in ["default", "qwen-1.5b", "paper"] {
            let bundle = Bundle::open(&bundles.join(name)).unwrap();
            assert_eq!(bundle.manifest.name, name);
            assert!(bundle.manifest.roles.flux.is_some());
            // What is said to be the default bundle's is there.
            for location in locations(&bundle.manifest.roles) {
                if location.0.starts_with("default:") {
                    bundle.path(&location).unwrap();
                }
            }
        }
    }
}
