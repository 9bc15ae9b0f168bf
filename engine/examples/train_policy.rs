//! Makes the policy weights that ship in bundles/default.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example train_policy -- sft MODEL.gguf WORK_FOLDER STEPS
//! cargo run --release -p simpatico-engine --example train_policy -- dpo MODEL.gguf WORK_FOLDER STEPS FORM SFT_ADAPTER EMBEDDINGS
//! cargo run --release -p simpatico-engine --example train_policy -- embeddings MINILM_FOLDER SAGE.safetensors EMBEDDINGS
//! ```
//! FORM: vanilla, user or collaborative. EMBEDDINGS: a safetensors file with `users` (n, d), row i
//! being user i of the default synthetic community, and the users' `neighbors` with their
//! `weights`; made by the mode of that name from a store with the community's events. A run that
//! was stopped goes on where it was.

use candle_core::{DType, Device, Tensor};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::lora::{Adapter, LoraConfig};
use simpatico_engine::params::{Params, save_tensors};
use simpatico_engine::policy::{neighbor_rows, pair_groups, sft_groups};
use simpatico_engine::soft_prompt::{SoftPrompt, SoftPromptConfig};
use simpatico_engine::synth::{Split, Synth, SynthOptions, events_of, generate};
use simpatico_engine::text_vectors::{TextEncoder, featurize};
use simpatico_engine::train_policy::*;
use simpatico_engine::{Error, Result};
use simpatico_schema::OverlapMode;
use simpatico_schema::random::Philox;
use simpatico_storage::Store;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["sft", model, work, steps] => sft(model.as_ref(), work.as_ref(), number(steps)?),
        ["dpo", model, work, steps, form, adapter, embeddings] => {
            let paths = (model.as_ref(), work.as_ref());
            dpo(paths, number(steps)?, form, adapter.as_ref(), embeddings.as_ref())
        }
        ["embeddings", minilm, sage, out] => embeddings(minilm.as_ref(), sage.as_ref(), out.as_ref()),
        _ => Err(Error::BadRequest(
            "usage: train_policy sft MODEL WORK STEPS | dpo MODEL WORK STEPS FORM ADAPTER EMBEDDINGS".into(),
        )),
    }
}

fn number(text: &str) -> Result<usize> {
    text.parse()
        .map_err(|_| Error::BadRequest(format!("expected a number of steps, got {text:?}")))
}

fn journal(folder: PathBuf) -> Journal<'static> {
    Journal {
        folder,
        resume: true,
        progress: Box::new(|m: &Metrics, left, warning| {
            eprintln!(
                "step {} loss {:.4} accuracy {:.3} margin {:.4} chosen {:.3} win {:.2} norm {:.2} {:.0} tokens/s mfu {:.2} left {:.0} s {}",
                m.step,
                m.loss,
                m.mean_token_accuracy,
                m.rewards_margins,
                m.rewards_chosen,
                m.rewards_accuracies,
                m.grad_norm,
                m.tokens_per_second,
                m.mfu,
                left,
                warning.unwrap_or("")
            );
        }),
    }
}

fn open(model: &Path) -> Result<LanguageModel> {
    LanguageModel::open(model, Precision::Dense(DType::F32), &Device::Cpu)
}

fn sft(model: &Path, work: &Path, steps: usize) -> Result<()> {
    let model = open(model)?;
    let synth = generate(&SynthOptions::default())?;
    let Some(template) = &model.template else {
        return Ok(());
    };
    let options = SftOptions {
        steps,
        ..SftOptions::default()
    };
    let groups = sft_groups(
        &synth,
        &model.tokenizer,
        template,
        steps * options.groups,
        0,
    )?;
    let tokens: usize = groups
        .iter()
        .map(|g| g.prompt.len() + g.completions.iter().map(Vec::len).sum::<usize>())
        .sum();
    let prompts: usize = groups.iter().map(|g| g.prompt.len()).sum();
    eprintln!(
        "{} prompts of {} tokens, {} tokens in all",
        groups.len(),
        prompts / groups.len(),
        tokens
    );
    for g in groups.iter().take(4) {
        eprintln!("--- {}", model.tokenizer.decode(&g.prompt)?);
        for c in &g.completions {
            eprintln!("    > {}", model.tokenizer.decode(c)?);
        }
    }
    let adapter = model.trainable(LoraConfig::new(8, 16.0), 0)?;
    train_sft(
        &model.decoder,
        &adapter,
        &groups,
        &options,
        journal(work.join("sft")),
    )?;
    adapter.save(&work.join("sft/adapter"), Some(DType::F16))
}

fn dpo(
    (model, work): (&Path, &Path),
    steps: usize,
    form: &str,
    adapter: &Path,
    embeddings: &Path,
) -> Result<()> {
    let model = open(model)?;
    let synth = generate(&SynthOptions::default())?;
    let Some(template) = &model.template else {
        return Ok(());
    };
    let form_options = match form {
        "vanilla" => Form::Vanilla,
        "user" => Form::User,
        "collaborative" => DpoOptions::collaborative(),
        other => {
            return Err(Error::BadRequest(format!(
                "form: vanilla, user or collaborative, got {other:?}"
            )));
        }
    };
    let options = DpoOptions {
        steps,
        ..DpoOptions::default_for(form_options)
    };
    let groups = pair_groups(
        &synth,
        &model.tokenizer,
        template,
        Split::Train,
        usize::MAX,
        0,
    )?;
    let index: BTreeMap<String, usize> = synth
        .users
        .iter()
        .enumerate()
        .map(|(i, u)| (u.user.clone(), i))
        .collect();
    let found = simpatico_engine::params::load_tensors(embeddings, &Device::Cpu)?;
    let (Some(graph), Some(near)) = (found.get("users"), found.get("neighbors")) else {
        return Err(Error::bad_model(
            embeddings.display().to_string(),
            "expected users and neighbors",
        ));
    };
    let weights = found
        .get("weights")
        .map(|t| t.to_vec2::<f32>())
        .transpose()?
        .unwrap_or_default();
    let near = near.to_vec2::<u32>()?;
    let neighbors: Vec<Vec<(usize, f64)>> = near
        .iter()
        .zip(&weights)
        .map(|(n, w)| {
            let pairs = n.iter().zip(w).filter(|(_, w)| **w > 0.0);
            pairs.map(|(v, w)| (*v as usize, f64::from(*w))).collect()
        })
        .collect();
    let width = graph.dim(1)?;
    // A learned vector for each user: as wide as the graph's embeddings, drawn at random.
    let table = Params::new(7, Device::Cpu);
    let init = candle_nn::Init::Randn {
        mean: 0.0,
        stdev: 1.0,
    };
    if form == "user" {
        table
            .builder(DType::F32)
            .get_with_hints((index.len(), width), "users", init)?;
    }
    let users = Conditioning {
        index,
        embeddings: match table.get("users") {
            Some(var) => Box::new(move || Ok(var.as_tensor().clone())),
            None => Box::new(|| Ok(graph.clone())),
        },
        vars: table.vars(),
        neighbors,
    };
    let config = SoftPromptConfig {
        embedding: width,
        inner: 128,
        tokens: 8,
        hidden: model.decoder.config.hidden,
        scale: embedding_size(&model)?,
        normalize: true,
    };
    let (soft, params) = SoftPrompt::fresh(config.clone(), 0, &Device::Cpu)?;
    let sft = Adapter::load(adapter, &model.decoder.config, &Device::Cpu)?;
    let trained = sft.trainable()?;
    let conditioned = form_options != Form::Vanilla;
    let policy = Policy {
        adapter: &trained,
        soft: conditioned.then_some((&soft, &params)),
        users: conditioned.then_some(&users),
    };
    let folder = work.join(form);
    train_dpo(
        &model.decoder,
        &policy,
        Some(&sft),
        &groups,
        &options,
        journal(folder.clone()),
    )?;
    trained.save(&folder.join("adapter"), Some(DType::F16))?;
    table.save(&folder.join("users.safetensors"), DType::F16, &[])?;
    SoftPrompt::save(
        &config,
        &params,
        &folder.join("soft_prompt.safetensors"),
        DType::F16,
    )
}

/// The root mean square of the model's token embeddings.
fn embedding_size(model: &LanguageModel) -> Result<f64> {
    let ids: Vec<u32> = (1000..2000).collect();
    let rows = model.embed_tokens(&ids)?;
    Ok(f64::from(rows.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
}

/// What the store says about every user of the community: held-out users' events included, so
/// that the file serves evaluation too.
fn embeddings(minilm: &Path, sage: &Path, out: &Path) -> Result<()> {
    let synth = generate(&SynthOptions::default())?;
    let folder = out.with_extension("store");
    let store = open_store(&folder, &synth, minilm, sage)?;
    let snapshot = store.snapshot();
    let index: BTreeMap<String, usize> = synth
        .users
        .iter()
        .enumerate()
        .map(|(i, u)| (u.user.clone(), i))
        .collect();
    let mut vectors = Vec::new();
    for user in &synth.users {
        vectors.push(snapshot.embedding(&user.user).map_err(failed)?.vector);
    }
    const K: usize = 10;
    let near = neighbor_rows(&snapshot, &index, K, OverlapMode::Shared)?;
    let (mut rows, mut weights) = (Vec::new(), Vec::new());
    for list in near {
        for i in 0..K {
            let (v, w) = list.get(i).copied().unwrap_or((0, 0.0));
            rows.push(v as u32);
            weights.push(w as f32);
        }
    }
    let n = synth.users.len();
    let tensors = [
        ("users".to_string(), Tensor::new(vectors, &Device::Cpu)?),
        (
            "neighbors".to_string(),
            Tensor::from_vec(rows, (n, K), &Device::Cpu)?,
        ),
        (
            "weights".to_string(),
            Tensor::from_vec(weights, (n, K), &Device::Cpu)?,
        ),
    ];
    save_tensors(out, &tensors, &[])
}

fn open_store(folder: &Path, synth: &Synth, minilm: &Path, sage: &Path) -> Result<Store> {
    let store = Store::open(folder, simpatico_storage::Options::default()).map_err(failed)?;
    let mut events = synth.events.clone();
    for user in synth
        .users
        .iter()
        .filter(|u| synth.splits.held_out_users.contains(&u.user))
    {
        events.extend(events_of(user, &mut Philox::new(0, 0)));
    }
    store.append(&events).map_err(failed)?;
    let encoder = TextEncoder::open(minilm, &Device::Cpu)?;
    featurize(&store, &encoder, |_, _| {})?;
    store.set_encoder(sage).map_err(failed)?;
    Ok(store)
}

fn failed(e: simpatico_storage::StoreError) -> Error {
    Error::BadRequest(e.to_string())
}
