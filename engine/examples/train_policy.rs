//! Makes the policy weights that ship in engine/bundles/default.
//!
//! ```text
//! cargo run --release -p simpatico-engine --example train_policy -- \\
//!     METHOD MODEL.gguf FOLDER STEPS [ADAPTER [MINILM_FOLDER SAGE.safetensors]]
//! ```
//! METHOD: sft, vanilla, user or collaborative. ADAPTER: where to start, and for DPO the reference
//! too. The last two are for collaborative: they make embeddings of the synthetic community; STEPS
//! then counts twice, for learning to read the embedding and for Eq. 7. A run
//! that was stopped goes on where it was.

use candle_core::{DType, Device};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::synth::{Synth, SynthOptions, events_of, generate, with_newcomers};
use simpatico_engine::text_vectors::{TextEncoder, featurize};
use simpatico_engine::train_policy::Progress;
use simpatico_engine::train_policy::runs::{Method, RunOptions, Tweaks, run};
use simpatico_engine::{Error, Result};
use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};
use std::ops::ControlFlow;
use std::path::Path;

fn main() -> Result<()> {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = || {
        let text = "usage: train_policy sft|vanilla|user|collaborative MODEL FOLDER STEPS [ADAPTER [MINILM SAGE]]";
        Error::BadRequest(text.into())
    };
    let [method, model, folder, steps, rest @ ..] = &args[..] else {
        return Err(usage());
    };
    let method = match method.as_str() {
        "sft" => Method::Sft,
        "vanilla" => Method::Vanilla,
        "user" => Method::User,
        "collaborative" => Method::Collaborative,
        _ => return Err(usage()),
    };
    let model = LanguageModel::open(model.as_ref(), Precision::Dense(DType::F32), &Device::Cpu)?;
    let mut synth = generate(&SynthOptions::default())?;
    if method != Method::Sft {
        synth = with_newcomers(&synth, 0);
    }
    let store = match rest {
        [_, minilm, sage] => {
            let folder = Path::new(folder).with_extension("store");
            Some(community(&folder, &synth, minilm.as_ref(), sage.as_ref())?)
        }
        _ => None,
    };
    let steps: usize = steps.parse().map_err(|_| usage())?;
    let options = RunOptions {
        tweaks: Tweaks {
            steps: Some(steps),
            ..Tweaks::default()
        },
        start: rest.first().map(Into::into),
        resume: true,
        ..RunOptions::new(method, folder)
    };
    let snapshots: Vec<_> = store.iter().map(Store::snapshot).collect();
    let mut show = |at: &Progress| {
        match at {
            Progress::Reference(done, all) if done % 50 == 0 => {
                eprintln!("reference {done}/{all}")
            }
            Progress::Reference(..) => {}
            Progress::Step {
                metrics: m,
                seconds_left,
                warning,
                ..
            } => eprintln!(
                "step {} loss {:.4} accuracy {:.3} margin {:.4} chosen {:.3} win {:.2} norm {:.2} {:.0} tokens/s mfu {:.2} left {seconds_left:.0} s {}",
                m.step,
                m.loss,
                m.mean_token_accuracy,
                m.rewards_margins,
                m.rewards_chosen,
                m.rewards_accuracies,
                m.grad_norm,
                m.tokens_per_second,
                m.mfu,
                warning.unwrap_or("")
            ),
        }
        ControlFlow::Continue(())
    };
    if method != Method::Collaborative {
        run(&model, &synth, &snapshots, &options, &mut show)?;
        return Ok(());
    }
    // First to read the embedding at all: no neighbours (their rows cost three times the user's
    // own), no profile in words to lean on, and the preferred answers' likelihood at full weight.
    let reading = RunOptions {
        tweaks: Tweaks {
            k: Some(0),
            profiles: Some(0.0),
            sft_weight: Some(1.0),
            groups: Some(4),
            lr: Some(3e-4),
            ..options.tweaks.clone()
        },
        folder: Path::new(folder).join("reading"),
        ..options.clone()
    };
    run(&model, &synth, &snapshots, &reading, &mut show)?;
    // Then Eq. 7, from there.
    let collaborative = RunOptions {
        start: Some(reading.folder.join("adapter")),
        start_soft: Some(reading.folder.join("soft_prompt.safetensors")),
        ..options
    };
    run(&model, &synth, &snapshots, &collaborative, &mut show)?;
    Ok(())
}

/// A store with the community's events, held-out users included, so that evaluation can use it.
fn community(folder: &Path, synth: &Synth, minilm: &Path, sage: &Path) -> Result<Store> {
    let failed = |e: simpatico_storage::StoreError| Error::BadRequest(e.to_string());
    let store = Store::open(folder, Options::default()).map_err(failed)?;
    let mut events = synth.events.clone();
    for user in synth
        .users
        .iter()
        .filter(|u| synth.splits.held_out_users.contains(&u.user))
    {
        events.extend(events_of(user, &mut Philox::new(0, 0)));
    }
    store.append(&events).map_err(failed)?;
    featurize(&store, &TextEncoder::open(minilm, &Device::Cpu)?, |_, _| {})?;
    store.set_encoder(sage).map_err(failed)?;
    Ok(store)
}
