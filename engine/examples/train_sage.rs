//! Trains the encoder that ships, and reports how well it tells links.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example train_sage -- \
//!     --model MINILM --epochs 120 --out engine/bundles/default/sage.safetensors [--report DIR]
//! ```
//!
//! MINILM is the folder of all-MiniLM-L6-v2. The graph is the synthetic community of seed 0,
//! or the events of `--events FILE` (JSON lines, plain or gzip), whose attributes may have
//! longer texts in `--texts FILE`, `{"attribute": str, "text": str}` a line. With `--report`
//! the protocol of `eval links` runs too, for `--seeds N` seeds, and for the paper's preset if
//! `--paper` is given.

use candle_core::{DType, Device};
use serde::Deserialize;
use simpatico_engine::eval_links::evaluate;
use simpatico_engine::sage_train::{LinkData, LinkSplit, SageEpoch, SageTrainOptions, train};
use simpatico_engine::synth::{SynthOptions, generate};
use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::{Error, Result};
use simpatico_schema::formats::{Line, Lines};
use simpatico_schema::{Sign, read_jsonl_event};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

#[derive(Deserialize)]
struct Row {
    attribute: String,
    text: String,
}

fn main() -> Result<()> {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let flags: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = flags.iter().position(|flag| flag == name)?;
        flags.get(at + 1).map(String::as_str)
    };
    let number = |name: &str, default: f64| -> Result<f64> {
        let bad = |_| Error::BadRequest(format!("{name} wants a number"));
        value(name).map_or(Ok(default), |text| text.parse().map_err(bad))
    };
    let model = value("--model")
        .ok_or_else(|| Error::BadRequest("--model FOLDER with MiniLM is needed".into()))?;
    let model = TextEncoder::open(Path::new(model), &Device::Cpu)?;
    let texts = value("--texts").map_or(Ok(BTreeMap::new()), |path| read_texts(Path::new(path)))?;
    let edges = match value("--events") {
        Some(path) => read_edges(Path::new(path))?,
        None => synthetic_edges()?,
    };
    let features = features(&model, &edges, &texts)?;
    let data = LinkData::new(edges, |name| features.get(name).cloned())?;
    let default = SageTrainOptions::default();
    let options = SageTrainOptions {
        hidden: number("--hidden", default.hidden as f64)? as usize,
        out: number("--size", default.out as f64)? as usize,
        lr: number("--lr", default.lr)?,
        weight_decay: number("--decay", default.weight_decay)?,
        epochs: number("--epochs", default.epochs as f64)? as usize,
        ..default
    };
    if let Some(folder) = value("--report") {
        for seed in 0..number("--seeds", 1.0)? as u64 {
            report(
                &data,
                &SageTrainOptions {
                    seed,
                    ..options.clone()
                },
                folder,
                "default",
            )?;
            if flags.iter().any(|flag| flag == "--paper") {
                let paper = SageTrainOptions::paper();
                report(&data, &SageTrainOptions { seed, ..paper }, folder, "paper")?;
            }
        }
    }
    if let Some(out) = value("--out") {
        // Nothing is kept back for a test: that is what the report is for.
        let split = LinkSplit::random(&data.links, 0.9, 0.1, options.seed);
        let trained = train(&data, &split, &options, &Device::Cpu, None, say)?;
        trained.save(Path::new(out), DType::F16)?;
        println!("{out}: validation AUC {:?}", trained.valid_auc);
    }
    Ok(())
}

fn report(data: &LinkData, options: &SageTrainOptions, folder: &str, name: &str) -> Result<()> {
    let started = std::time::Instant::now();
    let (report, trained) = evaluate(data, options, 0.1, &Device::Cpu, say)?;
    let (text, seed) = (report.to_text(), options.seed);
    println!(
        "{name} preset, {} epochs, {:.0?}",
        trained.history.len(),
        started.elapsed()
    );
    println!("{text}");
    let file = |kind: &str| Path::new(folder).join(format!("links-{name}-{seed}.{kind}"));
    let json =
        serde_json::to_string_pretty(&report).map_err(|e| Error::BadRequest(e.to_string()))?;
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (kind, text) in [("txt", text), ("json", json), ("svg", report.to_svg())] {
        std::fs::write(file(kind), text).map_err(Error::io(file(kind)))?;
    }
    Ok(())
}

fn say(epoch: &SageEpoch) -> ControlFlow<()> {
    if let Some(auc) = epoch.valid_auc {
        eprintln!(
            "epoch {:>4}  loss {:.4}  validation AUC {auc:.4}",
            epoch.epoch, epoch.loss
        );
    }
    ControlFlow::Continue(())
}

fn synthetic_edges() -> Result<Vec<(String, String, Sign)>> {
    let synth = generate(&SynthOptions::default())?;
    let edge = |event: simpatico_schema::Event| {
        let sign = event.polarity.sign()?;
        Some((event.user, event.attribute, sign))
    };
    Ok(synth.events.into_iter().filter_map(edge).collect())
}

/// The text vector of every attribute, of its text or else its name.
fn features(
    model: &TextEncoder,
    edges: &[(String, String, Sign)],
    texts: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Vec<f32>>> {
    let names: BTreeSet<&String> = edges.iter().map(|edge| &edge.1).collect();
    let text = names.iter().map(|&name| match texts.get(name) {
        Some(text) => text.as_str(),
        None => name.as_str(),
    });
    let vectors = model.encode(&text.collect::<Vec<&str>>())?;
    Ok(names.into_iter().cloned().zip(vectors).collect())
}

fn read_texts(path: &Path) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    for_lines(path, |line| {
        let row: Row = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        texts.insert(row.attribute, row.text);
        Ok(())
    })?;
    Ok(texts)
}

/// The last statement of each user on each attribute.
fn read_edges(path: &Path) -> Result<Vec<(String, String, Sign)>> {
    let mut last = BTreeMap::new();
    for_lines(path, |line| {
        let event = read_jsonl_event(line).map_err(|e| e.to_string())?;
        let key = (event.user, event.attribute);
        let stamp = (event.at, event.id);
        let old: Option<&(_, _)> = last.get(&key);
        if old.is_none_or(|(old, _)| stamp > *old) {
            last.insert(key, (stamp, event.polarity));
        }
        Ok(())
    })?;
    let edge = |((user, attribute), (_, polarity)): (_, (_, simpatico_schema::Polarity))| {
        Some((user, attribute, polarity.sign()?))
    };
    Ok(last.into_iter().filter_map(edge).collect())
}

fn for_lines(
    path: &Path,
    mut take: impl FnMut(&[u8]) -> std::result::Result<(), String>,
) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut lines = Lines::new(file).map_err(Error::io(path))?;
    while let Some((number, line)) = lines.next_line().map_err(Error::io(path))? {
        if let Line::Text(text) = line {
            let bad = |e| Error::BadRequest(format!("{}:{number}: {e}", path.display()));
            take(text).map_err(bad)?;
        }
    }
    Ok(())
}
