//! How fast a language model reads a prompt and writes after it, on the CPU: beside
//! tests/peers/decode.py, which asks llama.cpp the same.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example bench_decode -- MODEL.gguf
//! ```
//! Prints a JSON object: tokens a second, read and written, the medians of seven runs after one to
//! warm up.

use candle_core::Device;
use simpatico_engine::generate::{Options, Prompt, generate};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::{Error, Result};
use std::ops::ControlFlow;
use std::time::Instant;

const WRITTEN: usize = 64;

fn main() -> Result<()> {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let Some(path) = std::env::args().nth(1) else {
        return Err(Error::BadRequest("usage: bench_decode MODEL.gguf".into()));
    };
    let mut model = LanguageModel::open(path.as_ref(), Precision::Quantised, &Device::Cpu)?;
    model.stop.clear();
    let prompt = model
        .tokenizer
        .encode(include_str!("../../tests/peers/prompt.txt"))?;
    let options = Options::greedy(WRITTEN);
    let (mut read, mut written) = (Vec::new(), Vec::new());
    for run in 0..8 {
        let begun = Instant::now();
        let mut first = None;
        let asked = Prompt::tokens(prompt.clone());
        let answer = generate(&model, &asked, None, &options, |_| {
            first.get_or_insert_with(|| begun.elapsed());
            ControlFlow::Continue(())
        })?;
        let whole = begun.elapsed();
        let first = first.unwrap_or(whole);
        if run > 0 {
            read.push(prompt.len() as f64 / first.as_secs_f64());
            written.push((answer.tokens.len() - 1) as f64 / (whole - first).as_secs_f64());
        }
    }
    let median = |of: &mut Vec<f64>| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    let line = serde_json::json!({
        "runner": "simpatico", "threads": rayon::current_num_threads(),
        "prompt_tokens": prompt.len(), "written": WRITTEN,
        "read_per_second": median(&mut read), "written_per_second": median(&mut written),
    });
    println!("{line}");
    Ok(())
}
