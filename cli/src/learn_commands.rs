//! The commands that learn: features, data sets, training, evaluation.

use crate::output::Output;
use crate::store_commands::{open_existing, open_or_create};
use crate::{Common, Outcome};
use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use simpatico_engine::Device;
use simpatico_engine::bundle::Bundle;
use simpatico_engine::params::write_whole;
use simpatico_engine::synth::{self, SynthOptions};
use simpatico_engine::table;
use simpatico_engine::text_vectors::{self, TextEncoder};
use simpatico_schema::edit::PreferencePair;
use simpatico_storage::Store;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Subcommand)]
pub enum DatasetCommand {
    /// Make a synthetic community from a seed
    Synth(SynthArgs),
    /// Read a data set into the store: its events and its pairs, held-out ones aside
    Import {
        /// The folder with events and pairs, .jsonl.gz or .parquet
        dir: PathBuf,
    },
    /// Write the store's opinions and pairs as a data set's tables
    Export {
        /// Where the files go
        dir: PathBuf,
        /// How they are written
        #[arg(long, value_enum, default_value_t = FormatName::Jsonl)]
        format: FormatName,
    },
}

#[derive(Args)]
pub struct SynthArgs {
    /// How many users
    #[arg(long, default_value_t = 3000)]
    users: usize,
    /// Where the files go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How the tables are written
    #[arg(long, value_enum, default_value_t = FormatName::Jsonl)]
    format: FormatName,
    /// Also write statistics.html: the data set's shape, with plots
    #[arg(long)]
    page: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum FormatName {
    /// gzip JSON lines
    Jsonl,
    /// Parquet
    Parquet,
}

pub fn dataset(command: DatasetCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        DatasetCommand::Synth(args) => {
            let started = Instant::now();
            let options = SynthOptions {
                users: args.users,
                seed: common.seed,
                ..SynthOptions::default()
            };
            let made = synth::generate(&options)?;
            std::fs::create_dir_all(&args.out)?;
            let mut files = synth::write(&made, &args.out, args.format.into())?;
            if args.page {
                let page = synth::page(&made);
                write_whole(&args.out.join("statistics.html"), page.as_bytes())?;
                files.push("statistics.html".into());
            }
            let statistics = synth::statistics(&made);
            let answer = serde_json::json!({
                "dir": args.out, "files": files, "counts": statistics.counts,
                "pairs_by_type": statistics.pairs_by_type,
                "distinct_instructions": statistics.distinct_instructions,
                "seconds": started.elapsed().as_secs_f64(),
            });
            output.answer(&answer, || {
                let counts: Vec<String> = statistics
                    .counts
                    .iter()
                    .map(|(what, n)| format!("{n} {what}"))
                    .collect();
                format!("{}: {}", args.out.display(), counts.join(", "))
            })?;
        }
        DatasetCommand::Import { dir } => {
            let (events, pairs) = synth::read_to_store(&dir)?;
            let store = open_or_create(common)?;
            let receipt = store.append(&events)?;
            store.put_pairs(&pairs)?;
            let answer = serde_json::json!({
                "events": events.len(), "applied": receipt.applied,
                "unchanged": receipt.unchanged, "pairs": pairs.len(),
            });
            output.answer(&answer, || {
                format!(
                    "{} events ({} applied) and {} training pairs",
                    events.len(),
                    receipt.applied,
                    pairs.len()
                )
            })?;
        }
        DatasetCommand::Export { dir, format } => {
            let store = open_existing(common)?;
            let snapshot = store.snapshot();
            let mut events = Vec::new();
            for user in snapshot.users() {
                events.extend(snapshot.registers(user)?);
            }
            events.sort_by(|a, b| (a.at, &a.id, &a.user).cmp(&(b.at, &b.id, &b.user)));
            let pairs: Vec<PreferencePair> = snapshot.pairs().map(|p| (*p).clone()).collect();
            std::fs::create_dir_all(&dir)?;
            let format = synth::Format::from(format);
            let files = ["events", "pairs"].map(|table| format.file(table));
            table::write_rows(&dir.join(&files[0]), &events)?;
            table::write_rows(&dir.join(&files[1]), &pairs)?;
            let answer = serde_json::json!({
                "dir": dir, "files": files, "events": events.len(), "pairs": pairs.len(),
            });
            output.answer(&answer, || {
                let (events, pairs) = (events.len(), pairs.len());
                format!("{}: {events} events, {pairs} pairs", dir.display())
            })?;
        }
    }
    Ok(Outcome::Done)
}

impl From<FormatName> for synth::Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Jsonl => Self::Jsonl,
            FormatName::Parquet => Self::Parquet,
        }
    }
}

/// Gives each attribute without one its text vector.
pub fn featurize(common: &Common, output: &Output) -> Result<Outcome> {
    let store = open_existing(common)?;
    let started = Instant::now();
    let missing = store.attributes_without_feature();
    encode_attributes(&store, &missing, common, output)?;
    let answer = serde_json::json!({
        "attributes": missing.len(), "seconds": started.elapsed().as_secs_f64(),
    });
    output.answer(&answer, || {
        format!("{} attributes got their text vectors", missing.len())
    })?;
    Ok(Outcome::Done)
}

fn encode_attributes(
    store: &Store,
    attributes: &[String],
    common: &Common,
    output: &Output,
) -> Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let bundle = Bundle::find(&common.bundle)?;
    let folder = bundle.role("text_encoder", bundle.manifest.roles.text_encoder.as_ref())?;
    let encoder = TextEncoder::shared(&folder, &Device::Cpu)?;
    let bar = output.bar(attributes.len() as u64, "attributes");
    text_vectors::featurize_these(store, &encoder, attributes, |done, _| {
        bar.set_position(done as u64)
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// The text vectors of these words by the bundle's encoder.
pub fn encoded(words: &[&str], common: &Common, output: &Output) -> Result<Vec<Vec<f32>>> {
    let bundle = Bundle::find(&common.bundle)?;
    let folder = bundle.role("text_encoder", bundle.manifest.roles.text_encoder.as_ref())?;
    let encoder = TextEncoder::shared(&folder, &Device::Cpu)?;
    let bar = output.bar(words.len() as u64, "attributes");
    let mut vectors = Vec::with_capacity(words.len());
    for part in words.chunks(64) {
        vectors.extend(encoder.encode(part)?);
        bar.inc(part.len() as u64);
    }
    bar.finish_and_clear();
    Ok(vectors)
}

/// Sees to it that a user's embedding can be computed: the store has the bundle's encoder if
/// it has none, and the user's own attributes have their text vectors (nobody else's enter
/// that user's embedding).
pub fn prepare_embedding(
    store: &Store,
    user: &str,
    common: &Common,
    output: &Output,
) -> Result<()> {
    prepare_encoder(store, common)?;
    let snapshot = store.snapshot();
    let missing: Vec<String> = snapshot
        .edges(user)?
        .into_iter()
        .map(|(attribute, _)| attribute)
        .filter(|attribute| snapshot.feature(attribute).is_none())
        .collect();
    encode_attributes(store, &missing, common, output)
}

/// The same for everyone.
pub fn prepare_embeddings(store: &Store, common: &Common, output: &Output) -> Result<()> {
    prepare_encoder(store, common)?;
    encode_attributes(store, &store.attributes_without_feature(), common, output)
}

fn prepare_encoder(store: &Store, common: &Common) -> Result<()> {
    if store.encoder_digest().is_none() {
        let bundle = Bundle::find(&common.bundle)?;
        store.set_encoder(&bundle.role("sage", bundle.manifest.roles.sage.as_ref())?)?;
    }
    Ok(())
}
