//! The commands that train: the graph encoder, the policy, the picture model.
//!
//! Each writes into a folder of its own: `metrics.jsonl`, `metrics.svg`, a checkpoint, the
//! trained files, and `bundle/`, a copy of the bundle it started from with the trained files
//! in their places, ready for `--bundle`. Ctrl-C writes a checkpoint; `--resume` goes on.

use crate::learn_commands::{encoded, prepare_embeddings};
use crate::output::{Output, Usage};
use crate::store_commands::open_existing;
use crate::{Common, Outcome, cancelled};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use serde::Serialize;
use simpatico_engine::bundle::{Bundle, Location, Manifest, seal};
use simpatico_engine::eval_links::auc_of;
use simpatico_engine::flux::{init, names, vae::Vae};
use simpatico_engine::lm::learn::Products;
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::params::{load_tensors, save_tensors, write_whole};
use simpatico_engine::plot::{Axis, Lines, Series};
use simpatico_engine::sage_train::{
    Checkpoint, LinkData, LinkSplit, SageEpoch, SageTrainOptions, train,
};
use simpatico_engine::synth::{self, Synth, SynthOptions};
use simpatico_engine::table;
use simpatico_engine::text_vectors::{self, TextEncoder};
use simpatico_engine::train_flux::{self, Compute, Rhythm, autoencoder, flow, pairs, patches};
use simpatico_engine::train_policy::runs::{Method, Preset, RunOptions, Tweaks, run as run_policy};
use simpatico_engine::train_policy::{Loss, NeighborMode, Progress};
use simpatico_engine::{DType, Device, Error};
use simpatico_schema::Sign;
use simpatico_schema::edit::PreferencePair;
use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Subcommand)]
pub enum TrainCommand {
    /// The graph encoder, on who likes and dislikes what
    Sage(SageArgs),
    /// The policy's language, by supervised fine-tuning
    Sft(SftArgs),
    /// The policy's taste, by preference pairs
    Dpo(DpoArgs),
    /// The small picture model, on drawn before/after pairs
    Flux(FluxArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum PresetName {
    /// Settings that learn in little time
    Default,
    /// The paper's
    Paper,
}

/// Where the data come from.
#[derive(Args, Clone)]
pub struct DataArgs {
    /// A folder of `dataset synth`; without it the community of --seed is made on the spot
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Users of the community made on the spot
    #[arg(long, value_name = "N", conflicts_with = "data")]
    pub users: Option<usize>,
}

/// What all trainings take.
#[derive(Args)]
struct RunArgs {
    /// Where everything goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Whose settings
    #[arg(long, value_enum, default_value_t = PresetName::Default)]
    preset: PresetName,
    /// Go on from the folder's checkpoint, if it has one
    #[arg(long)]
    resume: bool,
    /// Steps (for the graph encoder: epochs) in place of the preset's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
}

#[derive(Args)]
pub struct SageArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Learn from the store's own users instead of a data set
    #[arg(long, conflicts_with_all = ["data", "users"])]
    from_store: bool,
    /// Give each attribute a random vector instead of its text's (to see what the text adds)
    #[arg(long)]
    no_text: bool,
    /// Length of the hidden layer
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Length of an embedding
    #[arg(long, value_name = "N")]
    size: Option<usize>,
}

#[derive(Args)]
pub struct PolicyArgs {
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    data: DataArgs,
    /// The adapter to start from, a folder in PEFT's form
    #[arg(long, value_name = "DIR")]
    start: Option<PathBuf>,
    /// Prompts in a step
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Peak learning rate of the adapter
    #[arg(long, value_name = "X")]
    lr: Option<f64>,
    /// Steps between checkpoints
    #[arg(long, value_name = "N")]
    checkpoint_steps: Option<usize>,
    /// How constant weights are multiplied [default: bf16, where the processor can]
    #[arg(long, value_enum)]
    products: Option<ProductsName>,
}

#[derive(Args)]
pub struct SftArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Edit instructions of others, for half of the prompts: InstructPix2Pix's prompt files,
    /// picture folders or tables, or lists of instructions (.jsonl, .jsonl.gz, .parquet)
    #[arg(long, value_name = "PATH")]
    edits: Option<PathBuf>,
    /// Share of prompts made of a profile, 0 to 1; the others are anyone's, as all of the paper's
    /// are [default: 1]
    #[arg(long, value_name = "X")]
    profiles: Option<f64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ProductsName {
    /// Sums in f32 of numbers rounded to bf16
    Bf16,
    /// All in f32
    F32,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum MethodName {
    /// The text alone
    Vanilla,
    /// A learned vector for each user
    User,
    /// The graph's embedding, and the neighbours' term
    Collaborative,
}

#[derive(Clone, Copy, ValueEnum)]
enum LossName {
    Sigmoid,
    Ipo,
    Robust,
    SigmoidNorm,
}

#[derive(Clone, Copy, ValueEnum)]
enum NeighborTerm {
    /// The user's pairs under the neighbour's conditioning: Eq. 7
    TargetPairs,
    /// The neighbour's pairs under the user's conditioning
    NeighborPairsTarget,
    /// The neighbour's pairs under the neighbour's conditioning
    NeighborPairsNeighbor,
}

#[derive(Args)]
pub struct DpoArgs {
    /// Which form [default: collaborative]
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Learn from the answers recorded in the store (`feedback`), mixed with the data set,
    /// from where the bundle is
    #[arg(long = "continue")]
    go_on: bool,
    /// With --continue: prompts of the data set for each recorded one
    #[arg(long, default_value_t = 3, value_name = "N")]
    replay: usize,
    /// Start from the bare language model instead of the bundle's fine-tuned adapter
    #[arg(long, conflicts_with_all = ["start", "go_on"])]
    from_base: bool,
    /// The loss
    #[arg(long, value_enum)]
    loss: Option<LossName>,
    /// The temperature of Eq. 1
    #[arg(long, value_name = "X")]
    beta: Option<f64>,
    /// The share of wrong pairs that the robust loss reckons with, below 0.5
    #[arg(long, value_name = "X")]
    label_smoothing: Option<f64>,
    /// Weight of the preferred answers' own likelihood
    #[arg(long, value_name = "X")]
    sft_weight: Option<f64>,
    /// Weight of reading on beside the preferences, for a policy that has learnt --reading
    #[arg(long, value_name = "X", conflicts_with = "reading")]
    reading_weight: Option<f64>,
    /// Peak learning rate of the soft prompt's maps
    #[arg(long, value_name = "X")]
    lr_soft: Option<f64>,
    /// Peak learning rate of the graph encoder, or of the users' vectors
    #[arg(long, value_name = "X")]
    lr_users: Option<f64>,
    /// Leave the graph encoder as it is; without this the collaborative form trains it along,
    /// except with --continue, where everyone's embeddings would change for a few answers
    #[arg(long)]
    freeze_encoder: bool,
    /// Share of prompts with the profile in words, 0 to 1 [default: 0.5]
    #[arg(long, value_name = "X")]
    profiles: Option<f64>,
    /// Share of each user's stated likes, 0 to below 1, that graph and profile leave out and the
    /// pairs are about, so that what is learnt is to guess; newcomers keep theirs
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    hidden: f64,
    /// Learn to say what the soft prompt names, before what people prefer; graph encoder and soft
    /// prompt stay as they are
    #[arg(long, conflicts_with = "go_on")]
    reading: bool,
    /// Soft prompt to start from, a file of an earlier run
    #[arg(long, value_name = "FILE")]
    start_soft: Option<PathBuf>,
    /// How many neighbours
    #[arg(short, value_name = "N")]
    k: Option<usize>,
    /// The weight of their term
    #[arg(long, value_name = "X")]
    lambda: Option<f64>,
    /// What their term scores
    #[arg(long, value_enum)]
    neighbor_term: Option<NeighborTerm>,
}

#[derive(Args)]
pub struct FluxArgs {
    /// Where everything goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on where the folder's run stopped
    #[arg(long)]
    resume: bool,
    /// Steps in place of the shipped model's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Before/after pairs in place of the shipped model's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pairs: Option<u64>,
    /// Drawings the picture autoencoder is fitted to
    #[arg(long, value_name = "N", default_value_t = 400)]
    drawings: usize,
    /// What to compute in, f32 or bf16; without it f32 on a CPU and bf16 on a GPU
    #[arg(long, value_name = "DTYPE", value_parser = ["f32", "bf16"])]
    dtype: Option<String>,
}

pub fn run(command: TrainCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        TrainCommand::Sage(args) => sage(&args, common, output)?,
        TrainCommand::Sft(args) => sft(&args, common, output)?,
        TrainCommand::Dpo(args) => dpo(&args, common, output)?,
        TrainCommand::Flux(args) => flux(&args, common, output)?,
    }
    Ok(Outcome::Done)
}

// ------------------------------------------------------------------------------ what is shared

/// The data set of a command: read from its folder, or made.
pub fn community(args: &DataArgs, most: usize, common: &Common) -> Result<Synth> {
    let Some(folder) = &args.data else {
        return Ok(synth::generate(&SynthOptions {
            users: args.users.unwrap_or(most),
            seed: common.seed,
            ..SynthOptions::default()
        })?);
    };
    if !folder.join("splits.json").is_file() {
        bail!(
            "{}: no data set there; make one with `simpatico dataset synth --out {0}`",
            folder.display()
        );
    }
    Ok(synth::read(folder)?)
}

/// The likes and dislikes of a data set's events.
pub fn edges_of(data: &Synth) -> Vec<(String, String, Sign)> {
    let edge = |e: &simpatico_schema::Event| {
        let sign = e.polarity.sign()?;
        Some((e.user.clone(), e.attribute.clone(), sign))
    };
    data.events.iter().filter_map(edge).collect()
}

/// The graph that an encoder is trained or judged on.
pub fn link_data(
    edges: Vec<(String, String, Sign)>,
    no_text: bool,
    common: &Common,
    output: &Output,
) -> Result<LinkData> {
    let mut names: Vec<&str> = edges.iter().map(|e| e.1.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let vectors: Vec<Vec<f32>> = match no_text {
        true => (0..names.len() as u64)
            .map(|i| {
                let mut random = Philox::new(common.seed, i);
                (0..64).map(|_| random.normal() / 8.0).collect()
            })
            .collect(),
        false => encoded(&names, common, output)?,
    };
    let features: std::collections::BTreeMap<String, Vec<f32>> =
        names.into_iter().map(str::to_string).zip(vectors).collect();
    Ok(LinkData::new(edges, |name| features.get(name).cloned())?)
}

/// A store of the data set's opinions in a folder of its own, with text vectors and the
/// bundle's encoder; opened again if it is there. With `held_out`, held-out users have said
/// what they would have said.
pub fn community_store(
    folder: &Path,
    data: &Synth,
    held_out: bool,
    common: &Common,
    output: &Output,
) -> Result<Store> {
    let store = Store::open(
        folder,
        Options {
            mirror: false,
            ..Options::default()
        },
    )?;
    let mut events = data.events.clone();
    if held_out {
        let new = |u: &&synth::SynthUser| data.splits.held_out_users.contains(&u.user);
        for user in data.users.iter().filter(new) {
            events.extend(synth::events_of(user, &mut Philox::new(0, 0)));
        }
    }
    store.append(&events)?;
    let bundle = Bundle::find(&common.bundle)?;
    let text = bundle.role("text_encoder", bundle.manifest.roles.text_encoder.as_ref())?;
    if !store.attributes_without_feature().is_empty() {
        output.note("text vectors of the attributes …");
        let encoder = TextEncoder::open(&text, &Device::Cpu)?;
        text_vectors::featurize(&store, &encoder, |_, _| {})?;
    }
    store.set_encoder(&bundle.role("sage", bundle.manifest.roles.sage.as_ref())?)?;
    Ok(store)
}

/// The language model of the bundle, as training wants it.
fn language_model(
    args: &PolicyArgs,
    common: &Common,
    output: &Output,
) -> Result<(Bundle, LanguageModel)> {
    let bundle = Bundle::find(&common.bundle)?;
    let path = bundle.role(
        "language_model",
        bundle.manifest.roles.language_model.as_ref(),
    )?;
    let device = simpatico_engine::device(common.device.as_deref())?;
    output.note("reading the language model …");
    let mut model = LanguageModel::open(&path, Precision::Dense(DType::F32), &device)?;
    model.decoder.learn_in(match args.products {
        Some(ProductsName::F32) => Products::F32,
        Some(ProductsName::Bf16) | None => Products::Bf16,
    });
    Ok((bundle, model))
}

/// A folder for a run. Without --resume a run that is there is not written over.
fn prepare_folder(out: &Path, resume: bool, sign: &str) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    if !resume && out.join(sign).exists() {
        bail!(
            "{}: a run is there already; go on with it by --resume, or choose another --out",
            out.display()
        );
    }
    Ok(())
}

/// Progress on stderr: a bar on a terminal, elsewhere a line now and then.
struct Teller<'a> {
    bar: ProgressBar,
    output: &'a Output,
    told: Option<Instant>,
}

impl<'a> Teller<'a> {
    fn new(output: &'a Output, unit: &str) -> Self {
        let bar = output.bar(1, unit);
        Self {
            bar,
            output,
            told: None,
        }
    }

    fn tell(&mut self, done: usize, all: usize, left: Option<f64>, words: &str) {
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
        self.bar.set_message(words.to_string());
        let due = self
            .told
            .is_none_or(|t| t.elapsed() > Duration::from_secs(10));
        if self.bar.is_hidden() && (due || done == all) {
            let left = left.map_or(String::new(), |s| format!(", {} left", duration(s)));
            self.output.note(format_args!("{done}/{all} {words}{left}"));
            self.told = Some(Instant::now());
        }
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// What a cancelled run says.
fn interrupted<T>(result: simpatico_engine::Result<T>, out: &Path) -> Result<T> {
    match result {
        Err(Error::Cancelled) => bail!(
            "interrupted; what was reached is in {}, go on with --resume",
            out.display()
        ),
        other => Ok(other?),
    }
}

fn go_on() -> ControlFlow<()> {
    match cancelled() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// Copies a bundle's own files and puts trained ones in their places. `change` is given the
/// new folder and the manifest.
fn trained_bundle(
    base: &Bundle,
    out: &Path,
    change: impl FnOnce(&Path, &mut Manifest) -> Result<()>,
) -> Result<PathBuf> {
    let folder = out.join("bundle");
    for file in &base.manifest.files {
        copy(&base.folder.join(&file.path), &folder.join(&file.path))?;
    }
    let mut manifest = base.manifest.clone();
    manifest.name = format!(
        "{}-trained",
        base.manifest.name.trim_end_matches("-trained")
    );
    change(&folder, &mut manifest)?;
    write_whole(
        &folder.join("manifest.json"),
        &serde_json::to_vec_pretty(&manifest)?,
    )?;
    seal(&folder)?;
    Ok(folder)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    std::fs::copy(from, to).with_context(|| from.display().to_string())?;
    Ok(())
}

fn write_metrics<T: Serialize>(out: &Path, lines: &[T]) -> Result<()> {
    let mut text = Vec::new();
    for line in lines {
        serde_json::to_writer(&mut text, line)?;
        text.push(b'\n');
    }
    Ok(write_whole(&out.join("metrics.jsonl"), &text)?)
}

// ---------------------------------------------------------------------------------------- sage

fn sage(args: &SageArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    let out = &args.run.out;
    prepare_folder(out, args.run.resume, "checkpoint")?;
    let data = match args.from_store {
        true => {
            let store = open_existing(common)?;
            prepare_embeddings(&store, common, output)?;
            LinkData::from_snapshot(&store.snapshot())?
        }
        false => {
            let edges = edges_of(&community(&args.data, 3000, common)?);
            link_data(edges, args.no_text, common, output)?
        }
    };
    let preset = match args.run.preset {
        PresetName::Paper => SageTrainOptions::paper(),
        // What is kept back for a test is `eval links`' business.
        PresetName::Default => SageTrainOptions {
            train_share: 0.9,
            valid_share: 0.1,
            epochs: 120,
            ..SageTrainOptions::default()
        },
    };
    let options = SageTrainOptions {
        epochs: args.run.steps.map_or(preset.epochs, |n| n as usize),
        hidden: args.hidden.unwrap_or(preset.hidden),
        out: args.size.unwrap_or(preset.out),
        seed: common.seed,
        ..preset
    };
    let split = LinkSplit::random(
        &data.links,
        options.train_share,
        options.valid_share,
        options.seed,
    );
    let checkpoint = Checkpoint {
        folder: out.join("checkpoint"),
        every: 10,
    };
    let device = simpatico_engine::device(common.device.as_deref())?;
    let mut teller = Teller::new(output, "epochs");
    let mut first = None;
    let mut lines: Vec<SageEpoch> = Vec::new();
    let result = train(&data, &split, &options, &device, Some(&checkpoint), |at| {
        let begun = *first.get_or_insert(at.epoch);
        let each = started.elapsed().as_secs_f64() / (at.epoch + 1 - begun) as f64;
        let words = match at.valid_auc {
            Some(auc) => format!("loss {:.4}, validation AUC {auc:.4}", at.loss),
            None => format!("loss {:.4}", at.loss),
        };
        let left = each * (at.epochs - at.epoch - 1) as f64;
        teller.tell(at.epoch + 1, at.epochs, Some(left), &words);
        lines.push(at.clone());
        go_on()
    });
    if result.is_err() {
        write_metrics(out, &lines)?;
    }
    let trained = interrupted(result, out)?;
    teller.bar.finish_and_clear();
    write_metrics(out, &trained.history)?;
    write_whole(
        &out.join("metrics.svg"),
        sage_plot(&trained.history).as_bytes(),
    )?;
    let file = out.join("sage.safetensors");
    trained.save(&file, DType::F16)?;
    let test_auc = match split.test.is_empty() {
        true => None,
        false => auc_of(
            &trained.scores(&data, &split.train, &split.test)?,
            &split.test,
        ),
    };
    let bundle = match args.no_text {
        true => None, // such an encoder fits no text vectors
        false => Some(trained_bundle(
            &Bundle::find(&common.bundle)?,
            out,
            |folder, manifest| {
                copy(&file, &folder.join("sage.safetensors"))?;
                manifest.roles.sage = Some(Location("sage.safetensors".into()));
                Ok(())
            },
        )?),
    };
    let answer = serde_json::json!({
        "out": out, "encoder": file, "bundle": bundle, "epochs": trained.history.len(),
        "validation_auc": trained.valid_auc, "test_auc": test_auc,
        "users": data.users.len(), "attributes": data.attributes.len(), "edges": data.links.len(),
        "seconds": started.elapsed().as_secs_f64(),
    });
    output.answer(&answer, || {
        let auc = trained.valid_auc.map_or("-".into(), |a| format!("{a:.4}"));
        let epochs = trained.history.len();
        format!("{}: {epochs} epochs, validation AUC {auc}", file.display())
    })
}

fn sage_plot(history: &[SageEpoch]) -> String {
    let x = |e: &SageEpoch| (e.epoch + 1) as f64;
    let loss = history.iter().map(|e| (x(e), f64::from(e.loss)));
    let auc = history
        .iter()
        .filter_map(|e| Some((x(e), f64::from(e.valid_auc?))));
    let plot = Lines {
        title: "The graph encoder".into(),
        x: Axis::linear("epoch"),
        y: Axis::linear("value"),
        series: vec![
            Series::new("loss", loss),
            Series::new("validation AUC", auc),
        ],
    };
    plot.to_svg()
}

// -------------------------------------------------------------------------------------- policy

fn run_options(args: &PolicyArgs, method: Method, common: &Common) -> RunOptions {
    RunOptions {
        preset: match args.run.preset {
            PresetName::Default => Preset::Default,
            PresetName::Paper => Preset::Paper,
        },
        tweaks: Tweaks {
            steps: args.run.steps.map(|n| n as usize),
            groups: args.batch,
            lr: args.lr,
            checkpoint_steps: args.checkpoint_steps,
            ..Tweaks::default()
        },
        seed: common.seed,
        start: args.start.clone(),
        resume: args.run.resume,
        ..RunOptions::new(method, &args.run.out)
    }
}

/// A share of prompts, as given on the command line.
fn share(profiles: Option<f64>) -> Result<Option<f64>> {
    match profiles.filter(|s| !(0.0..=1.0).contains(s)) {
        Some(wrong) => Err(Usage(format!("--profiles: expected 0 to 1, got {wrong}")).into()),
        None => Ok(profiles),
    }
}

fn sft(args: &SftArgs, common: &Common, output: &Output) -> Result<()> {
    let policy = &args.policy;
    let profiles = share(args.profiles)?;
    prepare_folder(&policy.run.out, policy.run.resume, "checkpoint")?;
    let data = community(&policy.data, 3000, common)?;
    let (bundle, model) = language_model(policy, common, output)?;
    let mut options = run_options(policy, Method::Sft, common);
    options.edits = args.edits.clone();
    options.tweaks.profiles = profiles;
    train_policy(&bundle, &model, &data, &[], &options, output)
}

fn dpo(args: &DpoArgs, common: &Common, output: &Output) -> Result<()> {
    let out = &args.policy.run.out;
    prepare_folder(out, args.policy.run.resume, "checkpoint")?;
    let smoothing = args.label_smoothing.unwrap_or(0.0);
    if !(0.0..0.5).contains(&smoothing) {
        return Err(Usage("--label-smoothing: expected 0 to below 0.5".into()).into());
    }
    let profiles = share(args.profiles)?;
    if !(0.0..1.0).contains(&args.hidden) {
        let text = format!("--hidden: expected 0 to below 1, got {}", args.hidden);
        return Err(Usage(text).into());
    }
    let own = match args.go_on {
        true => Some(open_existing(common)?),
        false => None,
    };
    let recorded = match &own {
        Some(store) => recorded_pairs(store)?,
        None => Vec::new(),
    };
    let data = community(&args.policy.data, 3000, common)?;
    let (bundle, model) = language_model(&args.policy, common, output)?;
    let roles = &bundle.manifest.roles;
    let place = |l: &Option<Location>| l.as_ref().map(|l| bundle.path(l)).transpose();
    let (adapter, soft) = (place(&roles.adapters)?, place(&roles.soft_prompt)?);
    let method = match (args.method, args.go_on, &soft) {
        (Some(MethodName::Vanilla), ..) => Method::Vanilla,
        (Some(MethodName::User), true, _) => {
            let text = "--continue: vectors learned for each user have no place for new users; \
                        use --method collaborative or vanilla";
            return Err(Usage(text.into()).into());
        }
        (Some(MethodName::User), ..) => Method::User,
        // A bundle without a soft prompt goes on as it is: by its words alone.
        (None, true, None) => Method::Vanilla,
        _ => Method::Collaborative,
    };
    // All methods learn from the same pairs.
    let data = synth::with_hidden(&data, args.hidden, common.seed);
    let data = synth::with_newcomers(&data, common.seed);
    let mut snapshots = Vec::new();
    let mut stores = Vec::new();
    if method == Method::Collaborative {
        if let Some(store) = &own {
            prepare_embeddings(store, common, output)?;
        }
        let folder = out.join("community");
        stores.push(community_store(&folder, &data, false, common, output)?);
    }
    snapshots.extend(own.iter().chain(&stores).map(Store::snapshot));
    let mut options = run_options(&args.policy, method, common);
    if options.start.is_none() && !args.from_base {
        // Anew from the fine-tuning; with --continue from what people answered.
        let fine_tuned = place(&roles.fine_tuned)?.filter(|_| !args.go_on);
        options.start = fine_tuned.or(adapter);
    }
    options.start_soft = match (&args.start_soft, args.go_on) {
        (Some(file), _) => Some(file.clone()),
        (None, true) => soft,
        (None, false) => None,
    };
    let constant = args.go_on || args.reading || args.freeze_encoder;
    if method == Method::Collaborative && !constant {
        options.encoder = place(&roles.sage)?;
    }
    options.reading = args.reading;
    options.recorded = recorded;
    options.replay = args.replay;
    let tweaks = &mut options.tweaks;
    tweaks.loss = args.loss.map(|l| match l {
        LossName::Sigmoid => Loss::Sigmoid,
        LossName::Ipo => Loss::Ipo,
        LossName::Robust => Loss::Robust,
        LossName::SigmoidNorm => Loss::SigmoidNorm,
    });
    tweaks.neighbor_mode = args.neighbor_term.map(|t| match t {
        NeighborTerm::TargetPairs => NeighborMode::TargetPairs,
        NeighborTerm::NeighborPairsTarget => NeighborMode::NeighborPairsTarget,
        NeighborTerm::NeighborPairsNeighbor => NeighborMode::NeighborPairsNeighbor,
    });
    (tweaks.beta, tweaks.label_smoothing) = (args.beta, args.label_smoothing);
    (tweaks.sft_weight, tweaks.reading_weight) = (args.sft_weight, args.reading_weight);
    (tweaks.k, tweaks.lambda) = (args.k, args.lambda);
    (tweaks.lr_soft, tweaks.lr_users, tweaks.profiles) = (args.lr_soft, args.lr_users, profiles);
    train_policy(&bundle, &model, &data, &snapshots, &options, output)
}

/// The pairs that people's answers left in the store.
fn recorded_pairs(store: &Store) -> Result<Vec<PreferencePair>> {
    let pairs: Vec<PreferencePair> = store
        .pairs()
        .filter(|p| p.source != "synth")
        .map(|p| PreferencePair::clone(&p))
        .collect();
    if pairs.is_empty() {
        bail!(
            "no answers to learn from: {} holds no recorded pair; answer edits with `simpatico \
             feedback EDIT_ID accept|reject` (a pair needs an accepted and a rejected edit of \
             one caption, or --instead)",
            store.path().display()
        );
    }
    Ok(pairs)
}

fn train_policy(
    bundle: &Bundle,
    model: &LanguageModel,
    data: &Synth,
    snapshots: &[simpatico_storage::Snapshot],
    options: &RunOptions,
    output: &Output,
) -> Result<()> {
    let started = Instant::now();
    let out = &options.folder;
    let mut teller = Teller::new(output, "steps");
    let mut warned = None;
    let result = run_policy(model, data, snapshots, options, &mut |at| {
        match at {
            Progress::Reference(done, all) => {
                teller.tell(*done, *all, None, "of the reference's prompts");
            }
            Progress::Step {
                metrics: m,
                steps,
                seconds_left,
                warning,
            } => {
                if let Some(text) = warning.filter(|w| warned != Some(*w)) {
                    warned = Some(text);
                    teller
                        .bar
                        .suspend(|| output.note(format_args!("warning: {text}")));
                }
                let words = match options.method {
                    method if method == Method::Sft || options.reading => format!(
                        "loss {:.3}, token accuracy {:.2}, {:.0} tokens/s, MFU {:.2}",
                        m.loss, m.mean_token_accuracy, m.tokens_per_second, m.mfu
                    ),
                    _ => format!(
                        "loss {:.3}, accuracy {:.2}, margin {:.3}, {:.0} tokens/s, MFU {:.2}",
                        m.loss, m.rewards_accuracies, m.rewards_margins, m.tokens_per_second, m.mfu
                    ),
                };
                teller.tell(m.step, *steps, Some(*seconds_left), &words);
            }
        }
        go_on()
    });
    let metrics = interrupted(result, out)?;
    teller.bar.finish_and_clear();
    let made = trained_bundle(bundle, out, |folder, manifest| {
        let adapter = folder.join("trained-policy");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            copy(&out.join("adapter").join(name), &adapter.join(name))?;
        }
        manifest.roles.adapters = Some(Location("trained-policy".into()));
        if options.method == Method::Sft {
            manifest.roles.fine_tuned = manifest.roles.adapters.clone();
        }
        manifest.roles.soft_prompt = match options.method {
            Method::Collaborative | Method::User => {
                let name = "trained-policy/soft_prompt.safetensors";
                copy(&out.join("soft_prompt.safetensors"), &folder.join(name))?;
                Some(Location(name.into()))
            }
            _ => None,
        };
        if options.encoder.is_some() {
            let name = "trained-policy/sage.safetensors";
            copy(&out.join("sage.safetensors"), &folder.join(name))?;
            manifest.roles.sage = Some(Location(name.into()));
        }
        Ok(())
    })?;
    let answer = serde_json::json!({
        "out": out, "method": options.method, "bundle": made, "adapter": out.join("adapter"),
        "recorded_pairs": options.recorded.len(), "metrics": metrics,
        "seconds": started.elapsed().as_secs_f64(),
    });
    output.answer(&answer, || {
        format!(
            "{} steps, loss {:.4}; use it with --bundle {}",
            metrics.step,
            metrics.loss,
            made.display()
        )
    })
}

// ---------------------------------------------------------------------------------------- flux

fn flux(args: &FluxArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    let out = &args.out;
    let device = simpatico_engine::device(common.device.as_deref())?;
    let compute = Compute::on(device, args.dtype.as_deref())?;
    prepare_folder(out, args.resume, "flow.json")?;
    let bundle = Bundle::find(&common.bundle)?;
    let text = bundle.role("text_encoder", bundle.manifest.roles.text_encoder.as_ref())?;
    let rhythm = Rhythm::usual(out);
    let fitted = out.join("patches.safetensors");
    if !args.resume || !fitted.is_file() {
        output.note("1 of 4: the picture autoencoder …");
        let seen = autoencoder::pictures(&autoencoder::sample_scenes(args.drawings), 128)?;
        let weights: Vec<_> = patches::fit(&patches::config(), &seen)?
            .into_iter()
            .collect();
        save_tensors(&fitted, &weights, &[])?;
    }
    let weights = load_tensors(&fitted, &Device::Cpu)?;
    let vae = Vae::new(
        &patches::config(),
        init::builder(&weights, DType::F32, &Device::Cpu),
    )?;
    let vae = autoencoder::scaled(vae)?;
    let mut options = pairs::Options::shipped();
    options.pairs = args.pairs.map_or(options.pairs, |n| n as usize);
    let file = out.join("pairs-0000000.safetensors");
    if !args.resume || !file.is_file() {
        output.note("2 of 4: before/after pairs …");
        let encoder = TextEncoder::open(&text, &Device::Cpu)?;
        let mut teller = Teller::new(output, "pairs");
        pairs::prepare(&options, &vae, &encoder, &file, &mut |done, all| {
            let each = started.elapsed().as_secs_f64() / done.max(1) as f64;
            teller.tell(done, all, Some(each * (all - done) as f64), "pairs");
        })?;
        teller.bar.finish_and_clear();
    }
    output.note("3 of 4: the flow …");
    let mut options = flow::Options::shipped();
    options.steps = args.steps.map_or(options.steps, |n| n as usize);
    options.cooldown = options.cooldown.min(options.steps / 4);
    options.seed = common.seed;
    let made = pairs::Pairs::open_all(out)?;
    let mut teller = Teller::new(output, "steps");
    flow::run(&options, &made, &compute, &rhythm, &mut |at| {
        let words = format!("loss {:.4}", at.loss);
        teller.tell(at.step, at.steps, Some(at.seconds_left), &words);
        !cancelled()
    })?;
    teller.bar.finish_and_clear();
    let lines: Vec<train_flux::Progress> = table::read_rows(&out.join("metrics.jsonl"))?;
    let curve = Lines {
        title: "The picture model".into(),
        x: Axis::linear("step"),
        y: Axis::linear("loss"),
        series: vec![Series::new(
            "loss",
            lines.iter().map(|p| (p.step as f64, p.loss)),
        )],
    };
    write_whole(&out.join("metrics.svg"), curve.to_svg().as_bytes())?;
    if cancelled() {
        return interrupted(Err(Error::Cancelled), out);
    }
    output.note("4 of 4: the files …");
    let made = trained_bundle(&bundle, out, |folder, manifest| {
        let flux = folder.join("flux");
        let (kind, class) = (names::Kind::Vae, "AutoencoderKL");
        train_flux::export(&flux.join("vae"), kind, 1, &weights, vae.config(), class)?;
        flow::export(out, &options.config, &flux)?;
        if let Some(roles) = &mut manifest.roles.flux {
            roles.transformer = Location("flux/transformer".into());
            roles.controlnet = Some(Location("flux/controlnet".into()));
            roles.vae = Location("flux/vae".into());
        }
        Ok(())
    })?;
    let last = lines.last();
    let answer = serde_json::json!({
        "out": out, "bundle": made, "steps": last.map(|p| p.step), "loss": last.map(|p| p.loss),
        "seconds": started.elapsed().as_secs_f64(),
    });
    output.answer(&answer, || {
        format!("trained; use it with --bundle {}", made.display())
    })
}
