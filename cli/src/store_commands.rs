//! The commands on the store: events in, questions answered, upkeep.

use crate::forget::{self, Forget};
use crate::output::{Output, Usage};
use crate::{Common, Outcome, cancelled};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use simpatico_schema::formats::{Delimited, Format, Line, Lines, TimeUnit, read_event};
use simpatico_schema::{Event, OverlapMode};
use simpatico_storage::{Options, Profile, Snapshot, Store};
use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

#[derive(Subcommand)]
pub enum StoreCommand {
    /// Read events from a file (or - for stdin) into the store
    Ingest(Ingest),
    /// The most similar users of a user
    Similar(Similar),
    /// The embedding of a user
    Embed {
        /// The user
        user: String,
    },
    /// A user's likes, dislikes, neighbours and what those would add, in words
    Profile {
        /// The user
        user: String,
        /// How many neighbours to ask
        #[arg(short, default_value_t = 3, allow_negative_numbers = true)]
        k: usize,
    },
    /// Counts and sizes
    Stats,
    /// Recompute everything from the log and compare bit for bit
    Check {
        /// Rebuild what does not agree with the log
        #[arg(long)]
        repair: bool,
    },
    /// Remove every trace of a user; prints a receipt
    Forget(Forget),
    /// Rewrite the store to what is live
    Compact,
    /// Write the graph to stdout
    Export {
        /// The format
        #[arg(long, value_enum, default_value_t = ExportFormat::Jsonl)]
        format: ExportFormat,
    },
    /// Write the whole store into one file
    Snapshot {
        /// The file, which must not exist
        file: PathBuf,
    },
    /// Make a store of a snapshot file
    Restore {
        /// The file
        file: PathBuf,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum ExportFormat {
    /// One event a line
    Jsonl,
    /// GraphML
    Graphml,
    /// Graphviz
    Dot,
}

#[derive(Clone, Copy, ValueEnum)]
enum InputFormat {
    Jsonl,
    Csv,
}

#[derive(Clone, Copy, ValueEnum)]
enum Unit {
    S,
    Ms,
}

#[derive(Args)]
pub struct Ingest {
    /// The file, plain or gzip, or - for stdin
    file: PathBuf,
    /// The format; told by the file's name if not given
    #[arg(long, value_enum)]
    format: Option<InputFormat>,
    /// What stands between columns
    #[arg(long, value_name = "S")]
    delimiter: Option<String>,
    /// What the columns hold: user, attribute, value, at, id, skip
    #[arg(long, value_name = "LIST")]
    columns: Option<String>,
    /// Values at or above are likes
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    like_at: Option<f64>,
    /// Values at or below are dislikes
    #[arg(long, value_name = "Y", allow_negative_numbers = true)]
    dislike_at: Option<f64>,
    /// The unit of the time column
    #[arg(long, value_enum, default_value_t = Unit::Ms)]
    time_unit: Unit,
    /// Stop at the first bad line, taking nothing of the file from there on
    #[arg(long)]
    strict: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum By {
    Overlap,
    Embedding,
}

#[derive(Clone, Copy, ValueEnum)]
enum Overlap {
    Shared,
    Agreeing,
}

#[derive(Args)]
pub struct Similar {
    /// The user
    #[arg(required_unless_present_any = ["users", "all"])]
    user: Option<String>,
    /// How many
    #[arg(short, default_value_t = 10, allow_negative_numbers = true)]
    k: usize,
    /// What to compare
    #[arg(long, value_enum, default_value_t = By::Overlap)]
    by: By,
    /// Which common attributes count
    #[arg(long, value_enum, default_value_t = Overlap::Shared)]
    overlap: Overlap,
    /// Answer for the users in this file, one a line (- for stdin)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "all"])]
    users: Option<PathBuf>,
    /// Answer for everyone
    #[arg(long, conflicts_with = "user")]
    all: bool,
}

pub fn run(command: StoreCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        StoreCommand::Ingest(args) => return ingest(&args, common, output),
        StoreCommand::Similar(args) => return similar(&args, common, output),
        StoreCommand::Embed { user } => {
            let store = open_existing(common)?;
            crate::learn_commands::prepare_embedding(&store, &user, common, output)?;
            let embedding = store.snapshot().embedding(&user)?;
            output.answer(&embedding, || {
                let head: Vec<String> = embedding
                    .vector
                    .iter()
                    .take(8)
                    .map(|x| format!("{x:+.4}"))
                    .collect();
                format!(
                    "{}: {} numbers by encoder {} as of {}: {} …",
                    embedding.user,
                    embedding.vector.len(),
                    embedding.encoder,
                    embedding.as_of,
                    head.join(" ")
                )
            })?;
        }
        StoreCommand::Profile { user, k } => {
            let profile = open_existing(common)?.snapshot().profile(&user, k)?;
            output.answer(&profile, || profile_words(&profile))?;
        }
        StoreCommand::Stats => {
            let stats = open_existing(common)?.stats()?;
            output.answer(&stats, || object_words(&stats))?;
        }
        StoreCommand::Check { repair } => check(repair, common, output)?,
        StoreCommand::Forget(args) => forget::forget(&args, common, output)?,
        StoreCommand::Compact => {
            let report = open_existing(common)?.compact()?;
            output.answer(&report, || object_words(&report))?;
        }
        StoreCommand::Export { format } => {
            let snapshot = open_existing(common)?.snapshot();
            let mut stdout = io::BufWriter::new(io::stdout().lock());
            let _edges = match format {
                ExportFormat::Jsonl => snapshot.export_jsonl(&mut stdout)?,
                ExportFormat::Graphml => snapshot.export_graphml(&mut stdout)?,
                ExportFormat::Dot => snapshot.export_dot(&mut stdout)?,
            };
            stdout.flush()?;
        }
        StoreCommand::Snapshot { file } => {
            if file.exists() {
                bail!(
                    "{}: it is there already; remove it or give another name",
                    file.display()
                );
            }
            let report = open_existing(common)?.export_snapshot(&file)?;
            output.answer(&report, || {
                format!("{}: written, {} bytes", file.display(), report.bytes)
            })?;
        }
        StoreCommand::Restore { file } => {
            if Store::exists(&common.store) {
                bail!(
                    "{}: a store is there already; name another place with --store",
                    common.store.display()
                );
            }
            let report = Store::restore(&file, &common.store)?;
            output.answer(&report, || {
                format!(
                    "{}: restored from {}",
                    common.store.display(),
                    file.display()
                )
            })?;
        }
    }
    Ok(Outcome::Done)
}

/// Opens a store that must be there: a question to a store that is not is a mistake.
pub fn open_existing(common: &Common) -> Result<Store> {
    if !Store::exists(&common.store) {
        bail!(
            "{}: no store there; make one with `simpatico ingest FILE`, or name another with --store",
            common.store.display()
        );
    }
    open_or_create(common)
}

/// Opens the store, making it where there is none.
pub fn open_or_create(common: &Common) -> Result<Store> {
    Ok(Store::open(&common.store, Options::default())?)
}

fn overlap_mode(overlap: Overlap) -> OverlapMode {
    match overlap {
        Overlap::Shared => OverlapMode::Shared,
        Overlap::Agreeing => OverlapMode::Agreeing,
    }
}

fn similar(args: &Similar, common: &Common, output: &Output) -> Result<Outcome> {
    let store = open_existing(common)?;
    let mode = overlap_mode(args.overlap);
    if matches!(args.by, By::Embedding) {
        match &args.user {
            Some(user) => crate::learn_commands::prepare_embedding(&store, user, common, output)?,
            None => crate::learn_commands::prepare_embeddings(&store, common, output)?,
        }
    }
    let snapshot = store.snapshot();
    let one = |user: &str| -> Result<()> {
        let answer = match args.by {
            By::Overlap => snapshot.similar(user, args.k, mode)?,
            By::Embedding => snapshot.similar_by_embedding(user, args.k)?,
        };
        output.answer(&answer, || {
            let mut words = format!("{user} is most like");
            for n in &answer.neighbors {
                words += &match n.overlap {
                    Some(overlap) => format!("\n  {:.4}  {overlap:>4}  {}", n.similarity, n.user),
                    None => format!("\n  {:.4}  {}", n.similarity, n.user),
                };
            }
            if answer.neighbors.is_empty() {
                words += " nobody yet";
            }
            words
        })
    };
    if let Some(user) = &args.user {
        one(user)?;
        return Ok(Outcome::Done);
    }
    let asked: Vec<String> = match &args.users {
        Some(file) => read_names(file)?,
        None => snapshot.users().map(str::to_string).collect(),
    };
    let (users, unknown): (Vec<String>, Vec<String>) =
        asked.into_iter().partition(|user| snapshot.has_user(user));
    for user in &unknown {
        output.note(format_args!(
            "{user:?}: no such user in {}",
            common.store.display()
        ));
    }
    match args.by {
        By::Overlap => similar_many(&snapshot, &users, args.k, mode, output)?,
        By::Embedding => users.iter().try_for_each(|user| one(user))?,
    }
    Ok(if unknown.is_empty() {
        Outcome::Done
    } else {
        Outcome::SomeRejected
    })
}

/// A profile as one would tell it.
fn profile_words(profile: &Profile) -> String {
    let list = |words: &[String]| {
        if words.is_empty() {
            "nothing yet".into()
        } else {
            words.join(", ")
        }
    };
    let neighbors: Vec<String> = profile
        .neighbors
        .iter()
        .map(|n| format!("{} ({} in common)", n.user, n.overlap.unwrap_or(0)))
        .collect();
    let added: Vec<String> = profile
        .suggestions
        .iter()
        .filter(|s| s.weight > 0.0)
        .take(10)
        .map(|s| s.attribute.clone())
        .collect();
    format!(
        "{}\n  likes            {}\n  dislikes         {}\n  is most like     {}\n  they would add   {}",
        profile.user,
        list(&profile.likes),
        list(&profile.dislikes),
        list(&neighbors),
        list(&added)
    )
}

/// The fields of a flat record, a line each.
pub fn object_words(record: &impl Serialize) -> String {
    match serde_json::to_value(record) {
        Ok(serde_json::Value::Object(fields)) => {
            let lines: Vec<String> = fields
                .iter()
                .map(|(name, value)| format!("{:<18} {value}", name.replace('_', " ")))
                .collect();
            lines.join("\n")
        }
        _ => String::new(),
    }
}

/// Many users at once, on every core, answered in the order asked.
fn similar_many(
    snapshot: &Snapshot,
    users: &[String],
    k: usize,
    mode: OverlapMode,
    output: &Output,
) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let bar = output.bar(users.len() as u64, "users");
    // So many that the store asks them of all users at once, and a step takes seconds.
    for some in users.chunks(1 << 16) {
        let names: Vec<&str> = some.iter().map(String::as_str).collect();
        for answer in snapshot.similar_many(&names, k, mode, threads)? {
            output.answer(&answer, || {
                let list: Vec<&str> = answer.neighbors.iter().map(|n| n.user.as_str()).collect();
                format!("{}: {}", answer.user, list.join(", "))
            })?;
        }
        bar.inc(some.len() as u64);
        if cancelled() {
            bail!("interrupted");
        }
    }
    bar.finish_and_clear();
    Ok(())
}

fn read_names(file: &Path) -> Result<Vec<String>> {
    let input: Box<dyn Read> = if file == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(file).with_context(|| file.display().to_string())?)
    };
    let lines: io::Result<Vec<String>> = io::BufReader::new(input).lines().collect();
    let mut names = lines.with_context(|| file.display().to_string())?;
    names.retain(|name| !name.is_empty());
    Ok(names)
}

fn check(repair: bool, common: &Common, output: &Output) -> Result<()> {
    let report = if repair {
        if !Store::exists(&common.store) {
            bail!("{}: no store there", common.store.display());
        }
        Store::repair(&common.store)?
    } else {
        open_existing(common)?.check()?
    };
    output.answer(&report, || object_words(&report))?;
    if !report.identical {
        bail!(
            "{}: what is kept does not agree with the log; `simpatico check --repair` rebuilds it",
            common.store.display()
        );
    }
    Ok(())
}

/// What `ingest` prints.
#[derive(Serialize, Default)]
struct IngestReport {
    read: u64,
    applied: u64,
    unchanged: u64,
    rejected: u64,
    seconds: f64,
    events_per_second: f64,
}

/// Lines parsed together, in the order of the file.
struct Parsed {
    events: Vec<Event>,
    rejects: Vec<Reject>,
    /// Why reading ended before the end of the file.
    stopped: Option<anyhow::Error>,
}

struct Reject {
    line: u64,
    reason: String,
    raw: Vec<u8>,
}

/// Events appended together: large enough that one sync is shared by many, small enough
/// that memory stays in the tens of MB.
const BATCH: usize = 32_768;
/// Rejected lines that are shown; all of them are kept.
const REJECTS_SHOWN: u64 = 5;

fn ingest(args: &Ingest, common: &Common, output: &Output) -> Result<Outcome> {
    let format = input_format(args)?;
    let name = args.file.display().to_string();
    let bytes_read = Arc::new(AtomicU64::new(0));
    let (input, size) = open_input(&args.file, bytes_read.clone()).with_context(|| name.clone())?;
    let store = open_or_create(common)?;
    let bar = output.bar(size, "bytes");
    let started = Instant::now();
    let mut report = IngestReport::default();
    let mut stopped = None;
    std::thread::scope(|scope| -> Result<()> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(4);
        let strict = args.strict;
        let format = &format;
        scope.spawn(move || parse(input, format, strict, &sender));
        for parsed in receiver {
            report.read += (parsed.events.len() + parsed.rejects.len()) as u64;
            for reject in &parsed.rejects {
                store.reject(&name, reject.line, &reject.reason, &reject.raw)?;
                report.rejected += 1;
                if report.rejected <= REJECTS_SHOWN {
                    output.note(format_args!("{name}:{}: {}", reject.line, reject.reason));
                }
            }
            let receipt = store.append(&parsed.events)?;
            report.applied += receipt.applied;
            report.unchanged += receipt.unchanged;
            bar.set_position(bytes_read.load(Ordering::Relaxed));
            if parsed.stopped.is_some() {
                stopped = parsed.stopped;
            }
            if cancelled() {
                bail!(
                    "interrupted after {} lines; what was read so far is safe",
                    report.read
                );
            }
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    report.seconds = started.elapsed().as_secs_f64();
    report.events_per_second = (report.read as f64 / report.seconds.max(1e-9)).round();
    output.answer(&report, || {
        format!(
            "{} read, {} applied, {} unchanged, {} rejected in {:.2} s ({:.0} events/s)",
            report.read,
            report.applied,
            report.unchanged,
            report.rejected,
            report.seconds,
            report.events_per_second
        )
    })?;
    if report.rejected > REJECTS_SHOWN {
        output.note(format_args!(
            "{} lines rejected in all; see {}",
            report.rejected,
            common.store.join("rejected.jsonl").display()
        ));
    }
    match stopped {
        Some(error) => Err(error.context(name)),
        None if report.rejected > 0 => Ok(Outcome::SomeRejected),
        None => Ok(Outcome::Done),
    }
}

/// Reads lines, parses them and sends them on in batches, until the end or a receiver that
/// went away.
fn parse(
    input: Box<dyn Read + Send>,
    format: &Format,
    strict: bool,
    sender: &std::sync::mpsc::SyncSender<Parsed>,
) {
    let empty = || Parsed {
        events: Vec::with_capacity(BATCH),
        rejects: Vec::new(),
        stopped: None,
    };
    let mut batch = empty();
    let mut lines = match Lines::new(input) {
        Ok(lines) => lines,
        Err(error) => {
            batch.stopped = Some(error.into());
            let _ = sender.send(batch);
            return;
        }
    };
    loop {
        match lines.next_line() {
            Ok(None) => break,
            Ok(Some((number, line))) => {
                let (result, raw) = match line {
                    Line::Text(text) => (read_event(text, number, format), text),
                    Line::TooLong(start) => (
                        Err(simpatico_schema::EventError::Syntax {
                            reason: format!(
                                "expected lines of at most {} bytes",
                                simpatico_schema::formats::MAX_LINE_BYTES
                            ),
                        }),
                        start,
                    ),
                };
                match result {
                    Ok(Some(event)) => batch.events.push(event),
                    Ok(None) => {}
                    Err(error) => {
                        let reason = error.to_string();
                        batch.rejects.push(Reject {
                            line: number,
                            reason,
                            raw: raw.to_vec(),
                        });
                        if strict {
                            batch.stopped = Some(anyhow::anyhow!(
                                "line {number}: {error} (--strict stops here)"
                            ));
                            break;
                        }
                    }
                }
            }
            Err(error) => {
                batch.stopped =
                    Some(anyhow::Error::new(error).context("the file ends in the middle"));
                break;
            }
        }
        if batch.events.len() + batch.rejects.len() >= BATCH
            && sender.send(std::mem::replace(&mut batch, empty())).is_err()
        {
            return;
        }
    }
    let _ = sender.send(batch);
}

/// The input and its size in bytes (0 where unknown), counting what is read.
fn open_input(file: &Path, count: Arc<AtomicU64>) -> io::Result<(Box<dyn Read + Send>, u64)> {
    if file == Path::new("-") {
        return Ok((Box::new(io::stdin()), 0));
    }
    let input = File::open(file)?;
    let metadata = input.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::IsADirectory,
            "expected a file, got a folder",
        ));
    }
    Ok((Box::new(Counted { input, count }), metadata.len()))
}

struct Counted {
    input: File,
    count: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

fn input_format(args: &Ingest) -> Result<Format> {
    let name = args.file.to_string_lossy();
    let stem = name.strip_suffix(".gz").unwrap_or(&name);
    let delimited_flags = args.delimiter.is_some()
        || args.columns.is_some()
        || args.like_at.is_some()
        || args.dislike_at.is_some();
    let told = args.format.unwrap_or({
        if delimited_flags
            || [".csv", ".tsv", ".dat"]
                .iter()
                .any(|end| stem.ends_with(end))
        {
            InputFormat::Csv
        } else {
            InputFormat::Jsonl
        }
    });
    if matches!(told, InputFormat::Jsonl) {
        if delimited_flags {
            return Err(Usage(
                "--delimiter, --columns, --like-at and --dislike-at are for --format csv".into(),
            )
            .into());
        }
        return Ok(Format::Jsonl);
    }
    let mut format = Delimited {
        like_at: args.like_at,
        dislike_at: args.dislike_at,
        time_unit: match args.time_unit {
            Unit::S => TimeUnit::Seconds,
            Unit::Ms => TimeUnit::Milliseconds,
        },
        ..Delimited::default()
    };
    match &args.delimiter {
        Some(delimiter) if delimiter.is_empty() => {
            return Err(Usage("--delimiter: expected at least one character".into()).into());
        }
        Some(delimiter) => format.delimiter = delimiter.replace("\\t", "\t"),
        None if stem.ends_with(".tsv") => format.delimiter = "\t".into(),
        None => {}
    }
    if let Some(columns) = &args.columns {
        let columns: std::result::Result<_, _> = columns.split(',').map(str::parse).collect();
        format.columns = columns.map_err(|e| Usage(format!("--columns: {e}")))?;
        use simpatico_schema::formats::Column;
        for (column, word) in [
            (Column::User, "user"),
            (Column::Attribute, "attribute"),
            (Column::Value, "value"),
        ] {
            let times = format.columns.iter().filter(|c| **c == column).count();
            if times != 1 {
                return Err(Usage(format!(
                    "--columns: expected {word} once, got it {times} times"
                ))
                .into());
            }
        }
    }
    if let (Some(like), Some(dislike)) = (args.like_at, args.dislike_at)
        && dislike >= like
    {
        return Err(Usage(format!(
            "--dislike-at: expected less than --like-at {like}, got {dislike}"
        ))
        .into());
    }
    Ok(Format::Delimited(format))
}
