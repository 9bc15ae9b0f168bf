//! The commands that measure. Each prints a table and writes `NAME.json` and `NAME.html`.

use crate::edit_commands::open_engine;
use crate::learn_commands::prepare_embeddings;
use crate::output::{Output, Usage};
use crate::store_commands::open_existing;
use crate::train_commands::{DataArgs, community, community_store, edges_of, link_data};
use crate::{CANCELLED, Common, Outcome, cancelled};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use simpatico_engine::bundle::packages::{Model, State};
use simpatico_engine::bundle::{Bundle, Location, models_folder};
use simpatico_engine::clip::{Clip, Framing};
use simpatico_engine::dino::Dino;
use simpatico_engine::edit::{EditRequest, Hooks, Source};
use simpatico_engine::eval_images::{self, Judges, Sample, spread_between_users};
use simpatico_engine::eval_links;
use simpatico_engine::eval_neighbors::{self, NeighborOptions};
use simpatico_engine::eval_prompts::{self, Condition, EvalOptions, System};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::lpips::{Lpips, Net};
use simpatico_engine::params::write_whole;
use simpatico_engine::picture::Picture;
use simpatico_engine::plot;
use simpatico_engine::policy::{PROFILES, Policy, PolicyOptions, pair_groups};
use simpatico_engine::provenance;
use simpatico_engine::render::{Color, Object, Scene};
use simpatico_engine::sage_train::{LinkData, SageTrainOptions};
use simpatico_engine::soft_prompt::SoftPrompt;
use simpatico_engine::synth::{Split, Synth};
use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::train_policy::PairGroup;
use simpatico_engine::{Device, Error};
use simpatico_schema::edit::{Backend, EditSettings};
use simpatico_storage::{Options, Store};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(Subcommand)]
pub enum EvalCommand {
    /// Does the graph encoder tell likes from dislikes, beside baselines?
    Links(LinksArgs),
    /// Do neighbours know what a user will like, beside popularity?
    Neighbors(NeighborsArgs),
    /// Are instructions the user's own, or anyone's?
    Prompts(PromptsArgs),
    /// What is left of a picture after an edit, and do users' pictures differ?
    Images(ImagesArgs),
}

#[derive(Args)]
struct EvalArgs {
    /// Where the JSON and the HTML page go
    #[arg(long, value_name = "DIR", default_value = "./simpatico-eval")]
    out: PathBuf,
    /// As little as makes sense: a look, no result to quote
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// As much as a report wants: all users, three seeds
    #[arg(long)]
    full: bool,
}

impl EvalArgs {
    fn size<T>(&self, quick: T, usual: T, full: T) -> T {
        match (self.quick, self.full) {
            (true, _) => quick,
            (_, true) => full,
            _ => usual,
        }
    }

    fn seeds(&self, common: &Common) -> Vec<u64> {
        (0..self.size(1, 1, 3)).map(|i| common.seed + i).collect()
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum SagePreset {
    Default,
    Paper,
}

#[derive(Args)]
pub struct LinksArgs {
    #[command(flatten)]
    eval: EvalArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Judge on the store's own users instead of a data set
    #[arg(long, conflicts_with_all = ["data", "users"])]
    from_store: bool,
    /// Give each attribute a random vector instead of its text's
    #[arg(long)]
    no_text: bool,
    /// Whose training settings
    #[arg(long, value_enum, default_value_t = SagePreset::Default)]
    preset: SagePreset,
    /// Epochs in place of the preset's
    #[arg(long, value_name = "N")]
    epochs: Option<usize>,
    /// The share of users held out whole
    #[arg(long, default_value_t = 0.1, value_name = "X")]
    held_out: f64,
}

#[derive(Args)]
pub struct NeighborsArgs {
    #[command(flatten)]
    eval: EvalArgs,
    #[command(flatten)]
    data: DataArgs,
    /// How many neighbours vote
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// Leave embeddings out (no models needed)
    #[arg(long)]
    no_embedding: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum ConditionName {
    /// Likes and dislikes in words
    Both,
    /// Likes in words
    Likes,
    /// Dislikes in words
    Dislikes,
    /// No words: the embedding alone
    Embedding,
    /// Another judged user's likes, dislikes and embedding: a control
    Mismatched,
}

impl ConditionName {
    fn condition(self) -> Condition {
        match self {
            Self::Both => Condition::Both,
            Self::Likes => Condition::Likes,
            Self::Dislikes => Condition::Dislikes,
            Self::Embedding => Condition::Embedding,
            Self::Mismatched => Condition::Mismatched,
        }
    }
}

#[derive(Args)]
pub struct PromptsArgs {
    #[command(flatten)]
    eval: EvalArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Held-out users that are judged
    #[arg(long, value_name = "N")]
    judged: Option<usize>,
    /// A further system: NAME=ADAPTER_FOLDER, or NAME=ADAPTER_FOLDER:SOFT_PROMPT_FILE (may be
    /// given several times; of one NAME: one system, trained with several seeds).
    /// For ablations of K and λ: train each with `train dpo -k N --lambda X`, name them here
    #[arg(long, value_name = "NAME=DIR[:FILE]")]
    system: Vec<String>,
    /// An earlier report, prompts.json: what its systems wrote is judged again beside the others
    /// (may be given several times; of one NAME: one system)
    #[arg(long, value_name = "FILE")]
    written: Vec<PathBuf>,
    /// Judge only the systems given by --system and --written, without the base model and the
    /// bundle
    #[arg(long)]
    only: bool,
    /// Let every system write as `instruct` does: anew where it takes up nothing that is liked, and
    /// otherwise as the bundle's settings say;
    /// without this what is judged is what training did, not what the store mends afterwards
    #[arg(long)]
    insist: bool,
    /// How much more than by itself a user's embedding counts for the words, 0 to 10; 1 leaves
    /// it be [default: the bundle's]
    #[arg(long, value_name = "X")]
    emphasis: Option<f32>,
    /// What is written of the profile (may be given several times) [default: both and
    /// embedding; with --full all five]
    #[arg(long, value_enum)]
    condition: Vec<ConditionName>,
    /// Held-out prompts whose pairs the policies are asked about
    #[arg(long, value_name = "N")]
    pairs: Option<usize>,
    /// The adapter that pairs are measured against [default: the bundle's fine-tuned one, or the
    /// base model]
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
    /// Also newcomers known by 0, 1, 2, 4, 8, 16 opinions (in --full anyway)
    #[arg(long)]
    cold_start: bool,
    /// The judge: a folder with a sentence encoder [default: gte-small]
    #[arg(long, value_name = "DIR")]
    judge: Option<PathBuf>,
}

#[derive(Args)]
pub struct ImagesArgs {
    #[command(flatten)]
    eval: EvalArgs,
    /// A folder of edits: source/NAME.png and METHOD/NAME.png, or
    /// METHOD/NAME--USER--SEED.png, with the instruction in the PNG's provenance or in a .txt
    /// beside it; without it edits are made on the spot
    #[arg(long, value_name = "DIR")]
    edits: Option<PathBuf>,
    /// CLIP's folder, for CLIP-Ref and CLIP-T: weights and tokenizer.json, transformers' or
    /// OpenCLIP's
    #[arg(long, value_name = "DIR")]
    clip: Option<PathBuf>,
    /// HPSv2's folder: its checkpoint as safetensors, and CLIP's tokenizer.json
    #[arg(long, value_name = "DIR")]
    hps: Option<PathBuf>,
    /// Edits on the spot: how many users
    #[arg(long, value_name = "N")]
    users: Option<usize>,
    /// Edits on the spot: how many pictures
    #[arg(long, value_name = "N")]
    pictures: Option<usize>,
    /// Edits on the spot: sampling steps
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
}

pub fn run(command: EvalCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        EvalCommand::Links(args) => links(&args, common, output)?,
        EvalCommand::Neighbors(args) => neighbors(&args, common, output)?,
        EvalCommand::Prompts(args) => prompts(&args, common, output)?,
        EvalCommand::Images(args) => images(&args, common, output)?,
    }
    Ok(Outcome::Done)
}

/// Writes the JSON and the page, and prints the answer with the table.
fn finish<T: Serialize>(
    name: &str,
    (report, table, html): (&T, String, String),
    (out, started): (&Path, Instant),
    output: &Output,
) -> Result<()> {
    let [json, page] = save(name, report, &html, out)?;
    let seconds = started.elapsed().as_secs_f64();
    let answer = serde_json::json!({
        "report": report, "json": json, "html": page, "seconds": seconds,
    });
    output.answer(&answer, || {
        format!(
            "{table}\n{} and {}, {seconds:.0} s",
            json.display(),
            page.display()
        )
    })
}

/// Writes the report and its page, and returns their files.
fn save<T: Serialize>(name: &str, report: &T, html: &str, out: &Path) -> Result<[PathBuf; 2]> {
    std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let [json, page] = ["json", "html"].map(|end| out.join(format!("{name}.{end}")));
    write_whole(&json, &serde_json::to_vec_pretty(report)?)?;
    write_whole(&page, html.as_bytes())?;
    Ok([json, page])
}

fn go_on() -> ControlFlow<()> {
    match cancelled() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

// --------------------------------------------------------------------------------------- links

fn links(args: &LinksArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    if !(0.0..1.0).contains(&args.held_out) {
        return Err(Usage("--held-out: expected a share from 0 to below 1".into()).into());
    }
    let data = match args.from_store {
        true => {
            let store = open_existing(common)?;
            prepare_embeddings(&store, common, output)?;
            LinkData::from_snapshot(&store.snapshot())?
        }
        false => {
            let most = args.eval.size(300, 1000, 3000);
            let edges = edges_of(&community(&args.data, most, common)?);
            link_data(edges, args.no_text, common, output)?
        }
    };
    let mut reports = Vec::new();
    for seed in args.eval.seeds(common) {
        let preset = match args.preset {
            SagePreset::Default => SageTrainOptions::default(),
            SagePreset::Paper => SageTrainOptions::paper(),
        };
        let epochs = args.eval.size(60, 100, preset.epochs);
        let options = SageTrainOptions {
            epochs: args.epochs.unwrap_or(epochs),
            seed,
            ..preset
        };
        let bar = output.bar(options.epochs as u64, "epochs");
        let device = simpatico_engine::device(common.device.as_deref())?;
        let (report, _) = eval_links::evaluate(&data, &options, args.held_out, &device, |e| {
            bar.set_position(e.epoch as u64 + 1);
            if let Some(auc) = e
                .valid_auc
                .filter(|_| bar.is_hidden() && (e.epoch + 1) % 20 == 0)
            {
                let epoch = e.epoch + 1;
                output.note(format_args!("epoch {epoch}: validation AUC {auc:.4}"));
            }
            go_on()
        })?;
        bar.finish_and_clear();
        reports.push(report);
    }
    let table = reports
        .iter()
        .map(|r| r.to_text())
        .collect::<Vec<_>>()
        .join("\n");
    let mut parts = vec![plot::verbatim(&table)];
    parts.extend(reports.iter().map(|r| r.to_svg()));
    let html = plot::page("Who will like what", &parts);
    let place = (args.eval.out.as_path(), started);
    finish("links", (&reports, table, html), place, output)
}

// ----------------------------------------------------------------------------------- neighbours

/// A folder that is gone when this is.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("simpatico-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self(folder))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn neighbors(args: &NeighborsArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    let most = args.eval.size(300, 1500, 3000);
    let data = community(&args.data, most, common)?;
    let scratch = Scratch::new("neighbors")?;
    let embedding = match args.no_embedding {
        true => None,
        false => match community_store(&scratch.0, &data, false, common, output) {
            Ok(store) => Some(store),
            Err(error) if error.is::<Error>() => {
                output.note(format_args!("without embeddings: {error:#}"));
                None
            }
            Err(error) => return Err(error),
        },
    };
    let by_embedding = embedding.is_some();
    let store = match embedding {
        Some(store) => store,
        None => {
            let options = Options {
                mirror: false,
                ..Options::default()
            };
            let store = Store::open(&scratch.0, options)?;
            store.append(&data.events)?;
            store
        }
    };
    let options = NeighborOptions {
        users: args.eval.size(60, 300, usize::MAX),
        k: args.k,
        by_embedding,
        seed: common.seed,
    };
    let bar = output.bar(1, "users");
    let report = eval_neighbors::evaluate(&store, &data, &options, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        go_on()
    })?;
    bar.finish_and_clear();
    let shown = (&report, report.to_text(), report.to_html());
    finish("neighbors", shown, (&args.eval.out, started), output)
}

// -------------------------------------------------------------------------------------- prompts

/// A model of the cache folder, if it is there.
fn cached(name: &str) -> Result<Option<PathBuf>> {
    let cache = models_folder();
    let Some(model) = Model::named(name) else {
        return Ok(None);
    };
    let here = matches!(model.state(&cache)?, State::Whole);
    Ok(here.then(|| cache.join(name)))
}

fn prompts(args: &PromptsArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    if args.only && args.system.is_empty() && args.written.is_empty() {
        let help = "--only: name the systems to judge, with --system or --written";
        return Err(Usage(help.into()).into());
    }
    let earlier = args.written.iter().map(|file| {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: not a report of `eval prompts`", file.display()))
    });
    let earlier: Vec<eval_prompts::Report> = earlier.collect::<Result<_>>()?;
    let device = simpatico_engine::device(common.device.as_deref())?;
    let (judge_name, judge) = judge(args, output)?;
    let judge = TextEncoder::open(&judge, &Device::Cpu)?;
    let bundle = Bundle::find(&common.bundle)?;
    let roles = &bundle.manifest.roles;
    let path = bundle.role("language_model", roles.language_model.as_ref())?;
    let place = |l: &Option<Location>| l.as_ref().map(|l| bundle.path(l)).transpose();
    let fine_tuned = place(&roles.fine_tuned)?;
    let mut systems: Vec<(String, Option<PathBuf>, Option<PathBuf>)> = Vec::new();
    if !args.only {
        systems.push(("base".into(), None, None));
        if let Some(adapter) = &fine_tuned {
            systems.push(("fine-tuned".into(), Some(adapter.clone()), None));
        }
    }
    if let Some(adapter) = place(&roles.adapters)?.filter(|_| !args.only) {
        systems.push((NEIGHBORS_TEXT.into(), Some(adapter.clone()), None));
        systems.push(("bundle".into(), Some(adapter), place(&roles.soft_prompt)?));
    }
    for text in &args.system {
        let Some((name, files)) = text.split_once('=') else {
            let help = format!("--system {text}: expected NAME=ADAPTER_FOLDER[:SOFT_PROMPT_FILE]");
            return Err(Usage(help).into());
        };
        let (adapter, soft) = files.split_once(':').unwrap_or((files, ""));
        let path = |t: &str| (!t.is_empty()).then(|| PathBuf::from(t));
        systems.push((name.into(), path(adapter), path(soft)));
    }
    let as_trained = PolicyOptions {
        insist: false,
        drawn_only: false,
        one_change: false,
        ..PolicyOptions::of_bundle(&bundle)
    };
    let mut policy_options = match args.insist {
        true => PolicyOptions::of_bundle(&bundle),
        false => as_trained,
    };
    if let Some(emphasis) = args.emphasis {
        policy_options.emphasis = emphasis;
    }
    let mut loaded = Vec::new();
    for (name, adapter, soft) in &systems {
        let model = LanguageModel::open(&path, Precision::Quantised, &device)?;
        let adapter = adapter
            .as_deref()
            .map(|a| model.load_adapter(a))
            .transpose()?;
        let soft = match soft {
            Some(file) => Some(SoftPrompt::load(file, &device)?.0),
            None => None,
        };
        loaded.push(System {
            name: name.clone(),
            policy: Policy::new(model, adapter, soft, policy_options.clone())?,
            neighbors_text: name == NEIGHBORS_TEXT,
        });
    }
    let data = community(&args.data, args.eval.size(300, 1000, 3000), common)?;
    let scratch = Scratch::new("prompts")?;
    let store = community_store(&scratch.0, &data, true, common, output)?;
    let options = EvalOptions {
        users: args.judged.unwrap_or(args.eval.size(4, 12, 100)),
        instructions: args.eval.size(1, 2, 2),
        seeds: args.eval.seeds(common),
        conditions: match args.condition.as_slice() {
            [] if !args.eval.full => vec![Condition::Both, Condition::Embedding],
            [] => Condition::ALL.to_vec(),
            some => some.iter().map(|c| c.condition()).collect(),
        },
        ..EvalOptions::default()
    };
    let bar = output.bar(1, "users");
    let tell = |name: &str, done: usize, all: usize| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(name.to_string());
        if bar.is_hidden() && (done.is_multiple_of(10) || done == all) {
            output.note(format_args!("{name}: {done}/{all}"));
        }
        go_on()
    };
    let snapshot = store.snapshot();
    let named = (judge_name.as_str(), &judge);
    let mut report = eval_prompts::evaluate(
        &mut loaded,
        &earlier,
        &snapshot,
        &data,
        named,
        &options,
        tell,
    )?;
    // What is known so far is on disk before the next hour begins.
    let so_far = |report: &eval_prompts::Report| {
        save(
            "prompts",
            report,
            &eval_prompts::page(report),
            &args.eval.out,
        )
    };
    let prompts = args.pairs.unwrap_or(args.eval.size(2, 8, 200));
    if prompts > 0 && !loaded.is_empty() {
        let reference = match args.reference.as_ref().or(fine_tuned.as_ref()) {
            Some(folder) => Some(loaded[0].policy.model.load_adapter(folder)?),
            None => None,
        };
        let groups = held_out_pairs(&loaded[0].policy, &data, prompts, common)?;
        let mut names: Vec<&str> = Vec::new();
        for system in loaded.iter().filter(|s| s.policy.adapter.is_some()) {
            if names.contains(&system.name.as_str()) {
                continue;
            }
            names.push(&system.name);
            so_far(&report)?;
            let label = format!("{}, held-out pairs", system.name);
            let tell = |done, all| tell(&label, done, all);
            let same = loaded.iter().filter(|s| s.name == system.name);
            let same: Vec<&System> = same.collect();
            let reference = reference.as_ref();
            let scores =
                eval_prompts::pair_scores(&same, reference, &snapshot, &groups, 0.1, tell)?;
            report.pairs.push(scores);
        }
    }
    drop(snapshot);
    // Without the flag newcomers of earlier reports are judged again, and nothing is written.
    let newcomers = match args.cold_start || args.eval.full {
        true => loaded.as_slice(),
        false => &[],
    };
    if !newcomers.is_empty() || earlier.iter().any(|report| !report.cold.is_empty()) {
        so_far(&report)?;
        (report.cold, report.cold_differences) =
            eval_prompts::cold_start(newcomers, &earlier, &store, &data, &judge, &options, tell)?;
    }
    bar.finish_and_clear();
    let table = eval_prompts::table(&report);
    let html = eval_prompts::page(&report);
    let place = (args.eval.out.as_path(), started);
    finish("prompts", (&report, table, html), place, output)
}

/// The name of the system that writes what neighbours like into the prompt.
const NEIGHBORS_TEXT: &str = "neighbours' text";

/// Held-out users' pairs in tokens, as many prompts as asked, evenly from all users.
fn held_out_pairs(
    policy: &Policy,
    data: &Synth,
    prompts: usize,
    common: &Common,
) -> Result<Vec<PairGroup>> {
    let model = &policy.model;
    let Some(template) = &model.template else {
        bail!("the language model has no chat template");
    };
    let split = Split::HeldOutUser;
    let all = pair_groups(
        data,
        &model.tokenizer,
        template,
        split,
        usize::MAX,
        PROFILES,
        common.seed,
    )?;
    let every = (all.len() / prompts).max(1);
    Ok(all.into_iter().step_by(every).take(prompts).collect())
}

/// The encoder that judges: one that no training uses, if there is one.
fn judge(args: &PromptsArgs, output: &Output) -> Result<(String, PathBuf)> {
    if let Some(folder) = &args.judge {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        return Ok((name.into_owned(), folder.clone()));
    }
    if let Some(folder) = cached("gte-small")? {
        return Ok(("gte-small".into(), folder));
    }
    let Some(folder) = cached("all-minilm-l6-v2")? else {
        bail!("no sentence encoder to judge by: `simpatico models pull default eval` fetches one");
    };
    output.note(
        "gte-small is not here, so MiniLM judges, which also made the features: take the figures \
         as a hint, and fetch the judge with `simpatico models pull gte-small`",
    );
    Ok((
        "all-minilm-l6-v2 (also the features' encoder)".into(),
        folder,
    ))
}

// --------------------------------------------------------------------------------------- images

/// An edited picture on disk or in memory.
struct Edited {
    method: String,
    name: String,
    user: Option<String>,
    instruction: Option<String>,
    picture: Picture,
}

#[derive(Serialize)]
struct ImageReport {
    /// In the form of the paper's Tables 3, 4 and 9.
    tables: Vec<eval_images::Table>,
    /// Distance between users over that between seeds, by method.
    users_over_seeds: BTreeMap<String, f64>,
    /// Models that were not there, so their columns are empty.
    without: Vec<String>,
}

fn images(args: &ImagesArgs, common: &Common, output: &Output) -> Result<()> {
    let started = Instant::now();
    let (sources, edits) = match &args.edits {
        Some(folder) => read_edits(folder)?,
        None => make_edits(args, common, output)?,
    };
    let mut without = Vec::new();
    let dino = match cached("dinov2-s14-registers")? {
        Some(folder) => Some(Dino::open(&folder, &Device::Cpu)?),
        None => {
            without.push("dinov2-s14-registers".to_string());
            None
        }
    };
    let lpips = match cached("lpips")? {
        Some(folder) => Some(Lpips::open(&folder, Net::AlexNet, &Device::Cpu)?),
        None => {
            without.push("lpips".to_string());
            None
        }
    };
    if !without.is_empty() {
        output.note(format_args!(
            "not here, so left out: {}; `simpatico models pull eval` fetches them",
            without.join(", ")
        ));
    }
    let open = |folder: &Option<PathBuf>, framing| {
        let clip = folder
            .as_ref()
            .map(|f| Clip::open(f, framing, &Device::Cpu));
        clip.transpose()
    };
    let clip = open(&args.clip, Framing::Crop)?;
    let hps = open(&args.hps, Framing::Letterbox)?;
    for (model, flag, here) in [
        ("CLIP", "--clip", clip.is_some()),
        ("HPSv2", "--hps", hps.is_some()),
    ] {
        if !here {
            without.push(format!("{model} ({flag} DIR)"));
        }
    }
    let judges = Judges {
        dino: dino.as_ref(),
        lpips: lpips.as_ref(),
        clip: clip.as_ref(),
        hps: hps.as_ref(),
    };
    let sized: Vec<(&Edited, Picture)> = edits
        .iter()
        .map(|e| {
            let source = sources.get(&e.name).with_context(|| {
                format!(
                    "{}/{}: no source/{}.png beside it",
                    e.method, e.name, e.name
                )
            })?;
            Ok((e, source.resized(e.picture.width, e.picture.height)))
        })
        .collect::<Result<_>>()?;
    let samples: Vec<Sample> = sized
        .iter()
        .map(|(e, source)| Sample {
            method: &e.method,
            user: e.user.as_deref(),
            instruction: e.instruction.as_deref(),
            source,
            edited: &e.picture,
            mask: None,
        })
        .collect();
    let scores = eval_images::judge(&samples, judges)?;
    let report = ImageReport {
        tables: eval_images::tables(&samples, &scores),
        users_over_seeds: users_over_seeds(&edits)?,
        without,
    };
    let texts: Vec<String> = report.tables.iter().map(|t| t.to_text()).collect();
    let mut text = texts.join("\n\n");
    for (method, ratio) in &report.users_over_seeds {
        text += &format!("\n{method}: users' pictures differ {ratio:.2} times as much as seeds'");
    }
    let mut parts: Vec<String> = report.tables.iter().map(|t| t.to_html()).collect();
    for (method, ratio) in &report.users_over_seeds {
        parts.push(format!(
            "<p>{}: users' pictures differ {ratio:.2} times as much as seeds'.</p>",
            plot::escape(method)
        ));
    }
    let html = plot::page("Edited pictures", &parts);
    let place = (args.eval.out.as_path(), started);
    finish("images", (&report, text, html), place, output)
}

/// By method, the mean over sources of distance between users over distance between seeds.
fn users_over_seeds(edits: &[Edited]) -> Result<BTreeMap<String, f64>> {
    let mut groups: BTreeMap<(&str, &str), BTreeMap<&str, Vec<Picture>>> = BTreeMap::new();
    for edit in edits {
        if let Some(user) = &edit.user {
            let of_source = groups.entry((&edit.method, &edit.name)).or_default();
            let pictures = of_source.entry(user).or_default();
            pictures.push(edit.picture.clone());
        }
    }
    let mut ratios: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for ((method, _), users) in groups {
        let users: Vec<Vec<Picture>> = users.into_values().collect();
        if let Some(ratio) = spread_between_users(&users)? {
            ratios.entry(method.to_string()).or_default().push(ratio);
        }
    }
    let mean = |v: Vec<f64>| v.iter().sum::<f64>() / v.len() as f64;
    Ok(ratios.into_iter().map(|(m, v)| (m, mean(v))).collect())
}

type Pictures = (BTreeMap<String, Picture>, Vec<Edited>);

fn read_edits(folder: &Path) -> Result<Pictures> {
    let pngs = |folder: &Path| -> Result<Vec<(String, Picture, Option<String>)>> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
            .with_context(|| folder.display().to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|p| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("png")))
            .collect();
        files.sort();
        let name = |p: &Path| {
            p.file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned()
        };
        let open = |p: PathBuf| {
            // Pictures of ours carry what was asked; others may have it in a text beside them.
            let beside = || std::fs::read_to_string(p.with_extension("txt")).ok();
            let asked = provenance::read(&p).ok().map(|r| r.instruction);
            let asked = asked.or_else(beside).map(|text| text.trim().to_string());
            Ok((name(&p), Source::open(&p)?.picture, asked))
        };
        files.into_iter().map(open).collect()
    };
    let source = folder.join("source");
    if !source.is_dir() {
        bail!(
            "{}: expected a folder source/ with the pictures before, and a folder for each \
             method with the pictures after, under the same names",
            folder.display()
        );
    }
    let sources = pngs(&source)?.into_iter().map(|(name, p, _)| (name, p));
    let sources: BTreeMap<String, Picture> = sources.collect();
    let mut methods: Vec<PathBuf> = std::fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| p.is_dir() && *p != source)
        .collect();
    methods.sort();
    let mut edits = Vec::new();
    for method in methods {
        let words = method.file_name().unwrap_or_default().to_string_lossy();
        for (file, picture, instruction) in pngs(&method)? {
            let mut parts = file.split("--");
            let name = parts.next().unwrap_or_default().to_string();
            let user = parts.next().map(str::to_string);
            edits.push(Edited {
                method: words.to_string(),
                name,
                user,
                instruction,
                picture,
            });
        }
    }
    if edits.is_empty() {
        bail!(
            "{}: no edited pictures (METHOD/NAME.png) there",
            folder.display()
        );
    }
    Ok((sources, edits))
}

/// Edits of drawings of objects that no training has seen, for users of different taste, two
/// seeds each; written beside the report so that they can be looked at. The second seed carries
/// out the first one's instruction: what differs between seeds is then the sampler's noise alone,
/// and what differs between users their taste.
fn make_edits(args: &ImagesArgs, common: &Common, output: &Output) -> Result<Pictures> {
    let users = args.users.unwrap_or(args.eval.size(2, 3, 8)).max(1);
    let pictures = args.pictures.unwrap_or(args.eval.size(1, 3, 10)).max(1);
    let data = community(
        &DataArgs {
            data: None,
            users: Some(args.eval.size(200, 500, 3000)),
        },
        3000,
        common,
    )?;
    let engine = open_engine(common)?;
    let scratch = Scratch::new("images")?;
    let store = community_store(&scratch.0, &data, true, common, output)?;
    let names = different_tastes(&data, users);
    let bar = output.bar((names.len() * pictures * 4) as u64, "edits");
    let folder = args.eval.out.join("edits");
    let (mut sources, mut edits) = (BTreeMap::new(), Vec::new());
    let colors = [Color::Red, Color::Blue, Color::Green, Color::Yellow];
    for at in 0..pictures {
        let object = Object::HELD_OUT[at % Object::HELD_OUT.len()];
        let scene = Scene::plain(object, colors[at % colors.len()], common.seed + at as u64);
        let source = Picture::from_rgb(128, 128, scene.render(128));
        let name = format!("{at:02}");
        let file = folder.join("source").join(format!("{name}.png"));
        make_folder_of(&file)?;
        write_whole(&file, &source.to_png(&[])?)?;
        for backend in [Backend::Canny, Backend::Img2img] {
            let method = backend.as_str().to_string();
            let mut asked: Vec<Vec<String>> = vec![Vec::new(); names.len()];
            for seed in [common.seed, common.seed + 1] {
                if cancelled() {
                    bail!("interrupted");
                }
                let request = |(user, instructions): (&String, &Vec<String>)| EditRequest {
                    user: user.clone(),
                    source: Some(Source::of(source.clone())),
                    caption: Some(scene.caption()),
                    instructions: instructions.clone(),
                    settings: EditSettings {
                        backend: Some(backend),
                        steps: args.steps,
                        seed,
                        count: 1,
                        ..EditSettings::default()
                    },
                    ..EditRequest::default()
                };
                let requests: Vec<EditRequest> = names.iter().zip(&asked).map(request).collect();
                let mut hooks = Hooks {
                    cancel: Some(&CANCELLED),
                    ..Hooks::default()
                };
                let made = engine.edit_batch(&store.snapshot(), &requests, &mut hooks)?;
                for ((user, asked), edit) in names.iter().zip(&mut asked).zip(made) {
                    let (images, records) = (edit.images, edit.provenance);
                    let Some((picture, record)) = images.into_iter().zip(records).next() else {
                        continue;
                    };
                    *asked = vec![record.instruction.clone()];
                    let file = folder
                        .join(&method)
                        .join(format!("{name}--{user}--{seed}.png"));
                    make_folder_of(&file)?;
                    provenance::write(&file, &picture, &record)?;
                    edits.push(Edited {
                        method: method.clone(),
                        name: name.clone(),
                        user: Some(user.clone()),
                        instruction: Some(record.instruction),
                        picture,
                    });
                    bar.inc(1);
                }
            }
        }
        sources.insert(name, source);
    }
    bar.finish_and_clear();
    Ok((sources, edits))
}

fn make_folder_of(file: &Path) -> Result<()> {
    match file.parent() {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())
        }
        None => Ok(()),
    }
}

/// Held-out users whose main tastes differ.
fn different_tastes(data: &Synth, most: usize) -> Vec<String> {
    let mut seen: Vec<&str> = Vec::new();
    let mut names = Vec::new();
    for user in &data.users {
        let Some((taste, _)) = user.clusters.first() else {
            continue;
        };
        let held = data.splits.held_out_users.contains(&user.user);
        if names.len() < most && held && !seen.contains(&taste.as_str()) {
            seen.push(taste);
            names.push(user.user.clone());
        }
    }
    names
}
