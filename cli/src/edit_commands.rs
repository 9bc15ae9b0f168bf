//! The commands that edit: instructions, pictures, feedback.

use crate::learn_commands::prepare_embedding;
use crate::output::{Output, Usage};
use crate::store_commands::{open_existing, open_or_create};
use crate::{CANCELLED, Common, Outcome};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::ProgressBar;
use simpatico_engine::edit::{
    Answer, Edit, EditRequest, Hooks, MASK_SOFTEN, MaskInput, Progress, Source, Stage, feedback,
    record_of,
};
use simpatico_engine::engine::Engine;
use simpatico_engine::provenance;
use simpatico_schema::edit::{Backend, ControlKind, EditSettings, InstructRequest, TEMPERATURE};
use simpatico_storage::Store;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Subcommand)]
pub enum EditCommand {
    /// Write a personal edit instruction
    Instruct(InstructArgs),
    /// Edit a picture for a user
    Edit(EditArgs),
    /// Make a picture for a user from words alone
    Generate(GenerateArgs),
    /// Say what a user thought of an edit
    Feedback {
        /// The edit's id, from its provenance
        edit_id: String,
        /// The answer
        #[arg(value_enum)]
        verdict: Verdict,
        /// The edit the user would rather have had
        #[arg(long, value_name = "EDIT_ID")]
        instead: Option<String>,
    },
    /// Make the same picture again from its provenance
    Replay {
        /// The PNG, or the JSON beside it
        provenance: PathBuf,
        /// The source picture
        #[arg(long)]
        image: Option<PathBuf>,
        /// The mask
        #[arg(long)]
        mask: Option<PathBuf>,
        /// The LoRAs it was made with, in their order
        #[arg(long, value_name = "FILE[=STRENGTH]", value_parser = lora)]
        lora: Vec<LoraFile>,
        /// Where the picture goes
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Verdict {
    /// Keep it
    Accept,
    /// Not that
    Reject,
}

#[derive(Args)]
pub struct InstructArgs {
    /// For whom
    #[arg(long)]
    user: String,
    /// What the picture shows
    #[arg(long)]
    caption: String,
    /// A wish that comes with it
    #[arg(long)]
    cue: Option<String>,
    /// 0: only the user's own circle; 1: mostly tastes beyond it
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    explore: f32,
    /// Sampling temperature; 0 takes the likeliest words, and with them often the same like for all
    /// of a user's pictures
    #[arg(long, default_value_t = TEMPERATURE)]
    temperature: f32,
}

#[derive(Args)]
pub struct Settings {
    /// Sampling steps
    #[arg(long)]
    steps: Option<usize>,
    /// Guidance
    #[arg(long)]
    guidance: Option<f32>,
    /// True classifier-free guidance (twice the work a step)
    #[arg(long)]
    true_cfg: Option<f32>,
    /// The share of the steps after which true guidance ends, 0 to 1
    #[arg(long, value_parser = share)]
    true_cfg_end: Option<f32>,
    /// How many pictures
    #[arg(short = 'n', default_value_t = 1, value_name = "COUNT", value_parser = pictures)]
    count: usize,
    /// Output size
    #[arg(long, value_name = "WxH", value_parser = size)]
    size: Option<(u32, u32)>,
    /// A LoRA for the picture model (may be given several times): diffusers', Black Forest
    /// Labs', kohya's or XLabs' names
    #[arg(long, value_name = "FILE[=STRENGTH]", value_parser = lora)]
    lora: Vec<LoraFile>,
    /// 0: only the user's own circle; 1: mostly tastes beyond it
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    explore: f32,
    /// Where the picture goes; further pictures get -1, -2, … before the extension
    #[arg(long, value_name = "OUT.png")]
    out: PathBuf,
}

#[derive(Args)]
pub struct EditArgs {
    /// For whom
    #[arg(long)]
    user: String,
    /// The picture: PNG, JPEG or WebP
    #[arg(long)]
    image: PathBuf,
    /// What it shows
    #[arg(long)]
    caption: Option<String>,
    /// A wish that comes with it
    #[arg(long)]
    cue: Option<String>,
    /// An instruction of your own (may be given up to 8 times: all are carried out together in
    /// the same picture, each read for itself; what shall come after another is an edit of its
    /// result)
    #[arg(long)]
    instruction: Vec<String>,
    /// How the source enters: canny, img2img, rf-inversion or flowedit
    #[arg(long)]
    backend: Option<Backend>,
    /// What the control picture shows of the source: canny, tile, blur, grey or palette
    #[arg(long)]
    control: Option<ControlKind>,
    /// How strongly the control picture holds, 0 to 2
    #[arg(long)]
    control_scale: Option<f32>,
    /// The share of the steps after which the control picture is let go, 0 to 1
    #[arg(long, value_parser = share)]
    control_end: Option<f32>,
    /// How far from the source, 0 to 1
    #[arg(long, value_parser = share)]
    strength: Option<f32>,
    /// The noise level to start from, 0 to 1, in place of a strength
    #[arg(long, value_parser = share, conflicts_with = "strength")]
    noise_level: Option<f32>,
    /// Where the picture may change: a grey PNG of its size, white where it may
    #[arg(long, value_name = "PNG")]
    mask: Option<PathBuf>,
    /// The width of the mask's soft edge, in pixels
    #[arg(long, default_value_t = MASK_SOFTEN)]
    mask_soften: u32,
    /// How much of the source's fine detail comes back where nothing was changed, 0 to 1
    #[arg(long, value_name = "X", value_parser = share)]
    fine_detail: Option<f32>,
    /// Reuse the network's answer while its first block changes less than this
    #[arg(long, value_name = "X")]
    cache: Option<f32>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// For whom
    #[arg(long)]
    user: String,
    /// What to make
    #[arg(long)]
    prompt: String,
    #[command(flatten)]
    settings: Settings,
}

fn share(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(x) if (0.0..=1.0).contains(&x) => Ok(x),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

fn pictures(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|n| *n > 0);
    count.ok_or_else(|| "expected at least 1".into())
}

/// A LoRA file and how strongly it acts.
#[derive(Clone, Debug)]
pub struct LoraFile {
    file: PathBuf,
    strength: f32,
}

/// FILE, or FILE=STRENGTH; a file whose own name ends in = and a number needs a strength.
fn lora(text: &str) -> Result<LoraFile, String> {
    let split = text.rsplit_once('=');
    let with_strength = split.and_then(|(file, x)| Some((file, x.parse::<f32>().ok()?)));
    let (file, strength) = with_strength.unwrap_or((text, 1.0));
    if file.is_empty() || !strength.is_finite() {
        return Err("expected FILE or FILE=STRENGTH, such as style.safetensors=0.8".into());
    }
    Ok(LoraFile {
        file: file.into(),
        strength,
    })
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once(['x', 'X', '×']);
    parts
        .and_then(|(w, h)| Some((w.trim().parse().ok()?, h.trim().parse().ok()?)))
        .filter(|(w, h)| (1..=8192).contains(w) && (1..=8192).contains(h))
        .ok_or_else(|| "expected WIDTHxHEIGHT, each from 1 to 8192".into())
}

pub fn run(command: EditCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        EditCommand::Instruct(args) => instruct(&args, common, output)?,
        EditCommand::Edit(args) => edit(&args, common, output)?,
        EditCommand::Generate(args) => generate(&args, common, output)?,
        EditCommand::Feedback {
            edit_id,
            verdict,
            instead,
        } => {
            answer(&edit_id, verdict, instead.as_deref(), common, output)?;
        }
        EditCommand::Replay {
            provenance,
            image,
            mask,
            lora,
            out,
        } => {
            replay(
                &provenance,
                image.as_deref(),
                mask.as_deref(),
                &lora,
                &out,
                common,
                output,
            )?;
        }
    }
    Ok(Outcome::Done)
}

pub fn open_engine(common: &Common) -> Result<Engine> {
    let device = simpatico_engine::device(common.device.as_deref())?;
    Ok(Engine::open(&common.bundle, &device)?)
}

fn with_loras(engine: Engine, loras: &[LoraFile]) -> Result<Engine> {
    loras.iter().try_fold(engine, |engine, lora| {
        // Now rather than after the instruction was written.
        if !lora.file.is_file() {
            bail!("{}: no such LoRA file", lora.file.display());
        }
        Ok(engine.with_lora(&lora.file, lora.strength)?)
    })
}

/// Opens the store and sees to it that the user's embedding is there to be read.
///
/// `written`: whether an instruction will be written for the user.
fn open_for(user: &str, written: bool, common: &Common, output: &Output) -> Result<Store> {
    let store = open_or_create(common)?;
    if store.snapshot().has_user(user) {
        prepare_embedding(&store, user, common, output)?;
    } else if written {
        output.note(format_args!(
            "{user:?} is not in {}: the instruction will be anyone's; `simpatico ingest` takes likes and dislikes",
            common.store.display()
        ));
    }
    Ok(store)
}

fn instruct(args: &InstructArgs, common: &Common, output: &Output) -> Result<()> {
    let engine = open_engine(common)?;
    let store = open_for(&args.user, true, common, output)?;
    let request = InstructRequest {
        user: args.user.clone(),
        caption: args.caption.clone(),
        cue: args.cue.clone(),
        explore: args.explore,
        seed: common.seed,
        temperature: args.temperature,
        max_tokens: None,
    };
    let instruction = engine.instruct(&store.snapshot(), &request)?;
    output.answer(&instruction, || instruction.instruction.clone())
}

fn edit(args: &EditArgs, common: &Common, output: &Output) -> Result<()> {
    // The pictures first: a wrong file is told before any model is read.
    let source = Source::open(&args.image)?;
    let mask = args
        .mask
        .as_deref()
        .map(|m| MaskInput::open(m, args.mask_soften))
        .transpose()?;
    let request = EditRequest {
        user: args.user.clone(),
        source: Some(source),
        caption: args.caption.clone(),
        cue: args.cue.clone(),
        instructions: args.instruction.clone(),
        settings: EditSettings {
            backend: args.backend,
            control: args.control,
            control_scale: args.control_scale,
            control_end: args.control_end,
            strength: args.strength,
            noise_level: args.noise_level,
            cache_threshold: args.cache,
            fine_detail: args.fine_detail,
            ..shared_settings(&args.settings, common)
        },
        mask,
        explore: args.settings.explore,
    };
    carry_out(
        &request,
        &args.settings,
        common,
        output,
        |engine, store, hooks| Ok(engine.edit(&store.snapshot(), &request, hooks)?),
    )
}

fn generate(args: &GenerateArgs, common: &Common, output: &Output) -> Result<()> {
    let request = EditRequest {
        user: args.user.clone(),
        caption: Some(args.prompt.clone()),
        settings: shared_settings(&args.settings, common),
        explore: args.settings.explore,
        ..EditRequest::default()
    };
    carry_out(
        &request,
        &args.settings,
        common,
        output,
        |engine, store, hooks| Ok(engine.generate(&store.snapshot(), &request, hooks)?),
    )
}

fn shared_settings(args: &Settings, common: &Common) -> EditSettings {
    EditSettings {
        steps: args.steps,
        guidance: args.guidance,
        true_cfg: args.true_cfg,
        true_cfg_end: args.true_cfg_end,
        size: args.size,
        seed: common.seed,
        count: args.count,
        ..EditSettings::default()
    }
}

/// Runs an edit with progress and Ctrl-C, writes its pictures, and records it in the store.
fn carry_out(
    request: &EditRequest,
    args: &Settings,
    common: &Common,
    output: &Output,
    work: impl FnOnce(&Engine, &Store, &mut Hooks) -> Result<Edit>,
) -> Result<()> {
    let out = args.out.as_path();
    if out
        .extension()
        .is_none_or(|e| !e.eq_ignore_ascii_case("png"))
    {
        return Err(Usage(format!(
            "--out: expected a name ending in .png, got {}",
            out.display()
        ))
        .into());
    }
    let engine = with_loras(open_engine(common)?, &args.lora)?;
    let store = open_for(
        &request.user,
        request.instructions.is_empty(),
        common,
        output,
    )?;
    let bar = output.bar(1, "steps");
    let mut show = |at: Progress| show_progress(&bar, at);
    let mut hooks = Hooks {
        progress: Some(&mut show),
        cancel: Some(&CANCELLED),
        ..Hooks::default()
    };
    let edit = work(&engine, &store, &mut hooks)?;
    bar.finish_and_clear();
    let mut files = Vec::new();
    for (index, (picture, record)) in edit.images.iter().zip(&edit.provenance).enumerate() {
        let path = numbered(out, index);
        provenance::write(&path, picture, record).with_context(|| path.display().to_string())?;
        files.push(path);
    }
    let record = record_of(&edit, request, &store.snapshot(), now_ms()?);
    store.put_edit(&record)?;
    let answer = serde_json::json!({
        "edit_id": record.id, "files": files, "instruction": edit.instruction.instruction,
        "why": edit.instruction.why, "fallback": edit.instruction.fallback,
        "attributes": record.attributes, "seconds": edit.seconds,
    });
    output.answer(&answer, || {
        let names: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
        format!(
            "“{}”\n{}\nedit {}: answer it with `simpatico feedback {} accept|reject`",
            edit.instruction.instruction,
            names.join("\n"),
            record.id,
            record.id
        )
    })
}

fn show_progress(bar: &ProgressBar, at: Progress) {
    bar.set_length(at.total as u64);
    bar.set_position(at.done as u64);
    bar.set_message(match at.stage {
        Stage::Load => "loading",
        Stage::Instruct => "writing the instruction",
        Stage::Words => "reading the words",
        Stage::Encode => "reading the picture",
        Stage::Sample => "painting",
        Stage::Decode => "finishing",
    });
}

/// OUT.png for the first picture, OUT-1.png for the second.
fn numbered(out: &Path, index: usize) -> PathBuf {
    if index == 0 {
        return out.to_path_buf();
    }
    let stem = out
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    out.with_file_name(format!("{stem}-{index}.png"))
}

fn now_ms() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as i64)
}

fn answer(
    edit_id: &str,
    verdict: Verdict,
    instead: Option<&str>,
    common: &Common,
    output: &Output,
) -> Result<()> {
    let store = open_existing(common)?;
    let verdict = match verdict {
        Verdict::Accept => Answer::Accept,
        Verdict::Reject => Answer::Reject,
    };
    let learned = feedback(&store.snapshot(), edit_id, verdict, instead, now_ms()?)?;
    commit(&store, &learned)?;
    let answer = serde_json::json!({
        "edit_id": edit_id, "user": learned.record.user, "events": learned.events,
        "pair": learned.pair,
    });
    output.answer(&answer, || {
        let words: Vec<String> = learned
            .events
            .iter()
            .map(|e| format!("{} {}", e.polarity.as_str(), e.attribute))
            .collect();
        format!("{} now: {}", learned.record.user, words.join(", "))
    })
}

/// Writes down what an answer said.
pub fn commit(store: &Store, learned: &simpatico_engine::edit::Feedback) -> Result<()> {
    store.append(&learned.events)?;
    if let Some(pair) = &learned.pair {
        store.put_pairs(std::slice::from_ref(pair))?;
    }
    for record in std::iter::once(&learned.record).chain(&learned.instead) {
        store.put_edit(record)?;
    }
    Ok(())
}

fn replay(
    file: &Path,
    image: Option<&Path>,
    mask: Option<&Path>,
    loras: &[LoraFile],
    out: &Path,
    common: &Common,
    output: &Output,
) -> Result<()> {
    let record = provenance::read(file)?;
    let source = image.map(Source::open).transpose()?;
    let mask = mask.map(|m| MaskInput::recorded(m, &record));
    let mask = mask.transpose()?;
    let engine = with_loras(open_engine(common)?, loras)?;
    let bar = output.bar(1, "steps");
    let mut show = |at: Progress| show_progress(&bar, at);
    let mut hooks = Hooks {
        progress: Some(&mut show),
        cancel: Some(&CANCELLED),
        ..Hooks::default()
    };
    let (picture, again) = engine.replay(&record, source.as_ref(), mask.as_ref(), &mut hooks)?;
    bar.finish_and_clear();
    provenance::write(out, &picture, &again)?;
    let answer = serde_json::json!({"edit_id": again.edit_id, "files": [out]});
    output.answer(&answer, || out.display().to_string())
}
