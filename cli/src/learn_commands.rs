//! The commands that learn: features, data sets, training, evaluation.

use crate::output::Output;
use crate::store_commands::open_or_create;
use crate::{Common, Outcome};
use anyhow::Result;
use clap::{Args, Subcommand};
use simpatico_engine::synth::{self, SynthOptions};
use simpatico_schema::edit::PreferencePair;
use simpatico_storage::Store;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Subcommand)]
pub enum DatasetCommand {
    /// Make a synthetic community from a seed
    Synth(SynthArgs),
    /// Read a data set into the store: its events and its training pairs
    Import {
        /// The folder with events.jsonl.gz, pairs.jsonl.gz, …
        dir: PathBuf,
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
            let files = synth::write(&made, &args.out)?;
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
            let data = synth::read(&dir)?;
            let store = open_or_create(common)?;
            let receipt = store.append(&data.events)?;
            let pairs: Vec<PreferencePair> = data
                .pairs
                .iter()
                .filter(|p| p.split == synth::Split::Train)
                .map(|p| PreferencePair {
                    user: p.user.clone(),
                    caption: p.caption.clone(),
                    chosen: p.chosen.clone(),
                    rejected: p.rejected.clone(),
                    source: p.source.clone(),
                })
                .collect();
            store.put_pairs(&pairs)?;
            let answer = serde_json::json!({
                "events": data.events.len(), "applied": receipt.applied,
                "unchanged": receipt.unchanged, "pairs": pairs.len(),
            });
            output.answer(&answer, || {
                format!(
                    "{} events ({} applied) and {} training pairs",
                    data.events.len(),
                    receipt.applied,
                    pairs.len()
                )
            })?;
        }
    }
    Ok(Outcome::Done)
}

/// Sees to it that a user's embedding can be computed: the store has an encoder, and the
/// user's attributes have their text vectors.
pub fn prepare_embedding(
    _store: &Store,
    _user: &str,
    _common: &Common,
    _output: &Output,
) -> Result<()> {
    Ok(())
}

/// The same for everyone.
pub fn prepare_embeddings(_store: &Store, _common: &Common, _output: &Output) -> Result<()> {
    Ok(())
}
