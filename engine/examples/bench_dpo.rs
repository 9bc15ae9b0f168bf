//! How fast the policy learns: one step of DPO without users and of Collaborative DPO, on pairs that
//! it also writes down, for tests/peers/dpo.py to train TRL on.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example bench_dpo -- MODEL.gguf PAIRS.jsonl [f32|bf16]
//! ```
//! Prints a JSON object a line: seconds a step (the median of three), pairs and tokens a second.
//! Tokens count as if every answer were a sequence of its own with its prompt, and once for each
//! of the 1 + K conditionings: the work a trainer without shared prompts would do.

use candle_core::{DType, Device, Tensor};
use simpatico_engine::lm::learn::Products;
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::lora::LoraConfig;
use simpatico_engine::policy::pair_groups;
use simpatico_engine::soft_prompt::{SoftPrompt, SoftPromptConfig};
use simpatico_engine::synth::{Split, SynthOptions, generate};
use simpatico_engine::train_policy::{
    Conditioning, DpoOptions, Form, PairGroup, Policy, dpo_batch, dpo_optimizer, reference_logps,
};
use simpatico_engine::{Error, Result, table};
use simpatico_schema::random::Philox;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// Prompts of a step, and what users' embeddings have.
const GROUPS: usize = 2;
const EMBEDDING: usize = 256;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (model, pairs, products) = match &args[..] {
        [model, pairs] => (model, pairs, Products::Bf16),
        [model, pairs, word] if word == "bf16" => (model, pairs, Products::Bf16),
        [model, pairs, word] if word == "f32" => (model, pairs, Products::F32),
        _ => {
            let usage = "usage: bench_dpo MODEL.gguf PAIRS.jsonl [f32|bf16]";
            return Err(Error::BadRequest(usage.into()));
        }
    };
    let dense = Precision::Dense(DType::F32);
    let mut model = LanguageModel::open(model.as_ref(), dense, &Device::Cpu)?;
    model.decoder.learn_in(products);
    let Some(template) = &model.template else {
        return Err(Error::bad_model("language model", "has no chat template"));
    };
    let synth = generate(&SynthOptions {
        users: 40,
        ..SynthOptions::default()
    })?;
    let tokenizer = &model.tokenizer;
    let groups = pair_groups(&synth, tokenizer, template, Split::Train, 40, 0.5, 0)?;
    let groups = &groups[..GROUPS];
    write_pairs(&model, groups, pairs.as_ref())?;
    let tokens: usize = groups
        .iter()
        .flat_map(|g| g.pairs.iter().map(|p| (g.prompt.len(), p)))
        .map(|(prompt, p)| 2 * prompt + p.chosen.len() + p.rejected.len())
        .sum();
    let count: usize = groups.iter().map(|g| g.pairs.len()).sum();

    let config = SoftPromptConfig {
        embedding: EMBEDDING,
        inner: 128,
        tokens: 8,
        hidden: model.decoder.config.hidden,
        scale: 0.1,
        normalize: true,
        bounded: false,
        everyone: None,
    };
    let (soft, params) = SoftPrompt::fresh(config, 0, &Device::Cpu)?;
    let vectors = Philox::new(1, 0).normals(4 * GROUPS * EMBEDDING);
    let vectors = Tensor::from_vec(vectors, (4 * GROUPS, EMBEDDING), &Device::Cpu)?;
    let users = Conditioning {
        index: groups
            .iter()
            .enumerate()
            .map(|(i, g)| (g.user.clone(), i))
            .collect(),
        embeddings: Box::new(|| Ok(vectors.clone())),
        vars: Vec::new(),
        neighbors: (0..4 * GROUPS)
            .map(|_| (0..3).map(|k| (GROUPS + k, 1.0)).collect())
            .collect(),
    };
    let adapter = model.trainable(LoraConfig::new(8, 16.0), 0)?;
    let go_on = |_, _| ControlFlow::Continue(());
    let reference = reference_logps(&model.decoder, None, groups, None, go_on)?;
    for (name, form, rows) in [
        ("vanilla", Form::Vanilla, 1),
        ("collaborative, K 3", DpoOptions::collaborative(), 4),
    ] {
        let options = DpoOptions::default_for(form);
        let conditioned = form != Form::Vanilla;
        let policy = Policy {
            adapter: &adapter,
            soft: conditioned.then_some((&soft, &params)),
            users: conditioned.then_some(&users),
        };
        let mut optimizer = dpo_optimizer(&policy, &options)?;
        let picked: Vec<usize> = (0..GROUPS).collect();
        let mut seconds = Vec::new();
        for step in 0..4 {
            let start = Instant::now();
            dpo_batch(
                &model.decoder,
                &policy,
                groups,
                &reference,
                &picked,
                &options,
                step,
                &mut optimizer,
            )?;
            optimizer.step(1.0)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let mut seconds = seconds.split_off(1); // the first prepares the weights
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let line = serde_json::json!({
            "trainer": format!("simpatico, {name}, {products:?}"), "pairs": count,
            "sequence_tokens": rows * tokens, "threads": rayon::current_num_threads(),
            "seconds": median, "pairs_per_second": (rows * count) as f64 / median,
            "tokens_per_second": (rows * tokens) as f64 / median,
        });
        println!("{line}");
    }
    Ok(())
}

/// The pairs as TRL takes them: the prompt with its template, and the answers with their end.
fn write_pairs(model: &LanguageModel, groups: &[PairGroup], path: &Path) -> Result<()> {
    let text = |ids: &[u32]| -> Result<String> {
        let mut text = String::new();
        for id in ids {
            match model.tokenizer.special_text(*id) {
                Some(special) => text += special,
                None => text += &model.tokenizer.decode(&[*id])?,
            }
        }
        Ok(text)
    };
    let mut rows = Vec::new();
    for group in groups {
        for pair in &group.pairs {
            rows.push(serde_json::json!({
                "prompt": text(&group.prompt)?, "chosen": text(&pair.chosen)?,
                "rejected": text(&pair.rejected)?,
            }));
        }
    }
    table::write_rows(path, &rows)
}
