//! Judges policies on the synthetic community's held-out users.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example eval_prompts -- \
//!     MODEL.gguf JUDGE_FOLDER STORE USERS OUT NAME=ADAPTER[:SOFT_PROMPT] …
//! ```
//! STORE: a store with the community's events, such as train_policy's collaborative method makes.
//! ADAPTER may be empty: the base model.

use candle_core::Device;
use simpatico_engine::eval_prompts::{EvalOptions, evaluate, table, write};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::policy::{Policy, PolicyOptions};
use simpatico_engine::soft_prompt::SoftPrompt;
use simpatico_engine::synth::{SynthOptions, generate};
use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::{Error, Result};
use simpatico_storage::{Options, Store};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, judge, store, users, out, systems @ ..] = &args[..] else {
        let text = "usage: eval_prompts MODEL JUDGE STORE USERS OUT NAME=ADAPTER[:SOFT] ...";
        return Err(Error::BadRequest(text.into()));
    };
    let device = Device::Cpu;
    let store =
        Store::open(store, Options::default()).map_err(|e| Error::BadRequest(e.to_string()))?;
    let mut policies = Vec::new();
    for system in systems {
        let (name, files) = system.split_once('=').unwrap_or((system, ""));
        let (adapter, soft) = files.split_once(':').unwrap_or((files, ""));
        let model = LanguageModel::open(model.as_ref(), Precision::Quantised, &device)?;
        let adapter = match adapter {
            "" => None,
            folder => Some(model.load_adapter(folder.as_ref())?),
        };
        let soft = match soft {
            "" => None,
            file => Some(SoftPrompt::load(file.as_ref(), &device)?.0),
        };
        policies.push((
            name,
            Policy::new(model, adapter, soft, PolicyOptions::default())?,
        ));
    }
    let systems: Vec<(&str, &Policy)> = policies.iter().map(|(n, p)| (*n, p)).collect();
    let options = EvalOptions {
        users: users.parse().unwrap_or(100),
        ..EvalOptions::default()
    };
    let synth = generate(&SynthOptions::default())?;
    let judge = TextEncoder::open(judge.as_ref(), &device)?;
    let report = evaluate(
        &systems,
        &store.snapshot(),
        &synth,
        ("gte-small", &judge),
        &options,
        |name, n, of| {
            eprintln!("{name} {n}/{of}");
        },
    )?;
    print!("{}", table(&report));
    write(&report, out.as_ref())
}
