//! What a GPU is asked to show, one stage a call, one JSON object a line:
//! `gpu_checks STAGE DEVICE BUNDLE …`; `tests/gpu/run` calls all of them. The bundle's models
//! may be random ones of true shape (tests/gpu/make_models.py): nothing here looks at taste.
//!
//! - `edit DEVICE BUNDLE SIDE STEPS BATCH [CACHE]`: whole edits through the engine, by stage.
//! - `cached DEVICE BUNDLE SIDE STEPS CACHE`: how far the cache's picture is from the exact one.
//! - `personal DEVICE BUNDLE SIDE STEPS`: a like comes in, and with it embedding, instruction and
//!   picture of who said it.
//! - `velocity DEVICE BUNDLE SIDE OUT`: one step's inputs and velocity, for another program to
//!   compare with.
//! - `attention DEVICE BUNDLE`: attention in bf16 against the CPU's in f32, in the shapes that the
//!   models have; the bundle is not looked at.
//! - `decode DEVICE BUNDLE PROMPT NEW BATCH`: tokens a second of prefill and decoding.
//! - `logits DEVICE BUNDLE LENGTH OUT`: a prompt's tokens and the logits after each.
//! - `dpo DEVICE BUNDLE GROUPS STEPS`: collaborative DPO, tokens a second.
//! - `gradients DEVICE BUNDLE PAIRS FOLDER`: a DPO loss and every adapter weight's slope, with the
//!   adapter and the pairs' tokens, for another program or device to compare with.
//! - `train DEVICE BUNDLE flow|vae STEPS BATCH`: training the small Flux as shipped, on random
//!   pairs, or an autoencoder, in the device's usual dtype and in f32; the bundle is not looked at.
//! - `full DEVICE BUNDLE SIDE`: pictures, words and training that cannot fit, each followed by some
//!   that can.
//! - `same DEVICE BUNDLE CUT_OUTS COUNT`: so many users' edits of a bundle in f32 on this device
//!   and on the CPU, in one batch each.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use simpatico_engine::bundle::{Bundle, FluxText, Location, models_folder};
use simpatico_engine::edit::{EditRequest, Hooks, Source};
use simpatico_engine::engine::Engine;
use simpatico_engine::error::Error;
use simpatico_engine::eval_images::psnr_outside;
use simpatico_engine::flux::controlnet::{Control, ControlNet};
use simpatico_engine::flux::names::Kind;
use simpatico_engine::flux::transformer::{FluxTransformer, Inputs, image_ids, text_ids};
use simpatico_engine::generate::{self, generate_batch};
use simpatico_engine::lm::{LanguageModel, Precision};
use simpatico_engine::lora::LoraConfig;
use simpatico_engine::lpips::{Lpips, Net};
use simpatico_engine::nn;
use simpatico_engine::params::save_tensors;
use simpatico_engine::picture::{Mask, Picture};
use simpatico_engine::soft_prompt::{SoftPrompt, SoftPromptConfig};
use simpatico_engine::text_vectors::{self, TextEncoder};
use simpatico_engine::train_flux::pairs::Pairs;
use simpatico_engine::train_flux::{Compute, Progress, Rhythm, autoencoder, flow};
use simpatico_engine::train_policy::{
    Conditioning, DpoOptions, Loss, LossOptions, PairGroup, Policy, Row, TokenPair, dpo_batch,
    dpo_optimizer, pair_losses, score,
};
use simpatico_schema::edit::{Backend, EditSettings};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::Store;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [stage, device, bundle, rest @ ..] = arguments.as_slice() else {
        return Err("gpu_checks STAGE DEVICE BUNDLE …; see its first lines".into());
    };
    let device = simpatico_engine::engine::device(Some(device))?;
    let number = |i: usize| -> Result<usize> {
        let text = rest.get(i).ok_or("a number is missing")?;
        Ok(text.parse()?)
    };
    let file = |i: usize| rest.get(i).map(Path::new).ok_or("a path is missing");
    let found = match stage.as_str() {
        "edit" => edit(
            bundle,
            &device,
            number(0)? as u32,
            number(1)?,
            number(2)?,
            rest.get(3).map(|c| c.parse()).transpose()?,
        )?,
        "cached" => {
            let threshold = rest.get(2).ok_or("a threshold is missing")?.parse()?;
            cached(bundle, &device, number(0)? as u32, number(1)?, threshold)?
        }
        "personal" => personal(bundle, &device, number(0)? as u32, number(1)?)?,
        "velocity" => velocity(bundle, &device, number(0)?, file(1)?)?,
        "attention" => attention(&device)?,
        "decode" => decode(bundle, &device, number(0)?, number(1)?, number(2)?)?,
        "logits" => logits(bundle, &device, number(0)?, file(1)?)?,
        "dpo" => dpo(bundle, &device, number(0)?, number(1)?)?,
        "gradients" => gradients(bundle, &device, number(0)?, file(1)?)?,
        "train" => train(
            &device,
            rest.first().ok_or("flow or vae")?,
            number(1)?,
            number(2)?,
        )?,
        "full" => full(bundle, &device, number(0)? as u32)?,
        "same" => same(bundle, &device, file(0)?, number(1)?)?,
        other => return Err(format!("no stage {other}").into()),
    };
    let mut line = json!({
        "stage": stage, "device": simpatico_engine::engine::device_word(&device),
        "bundle": bundle, "arguments": rest,
    });
    if let (Some(line), Value::Object(found)) = (line.as_object_mut(), found) {
        line.extend(found);
    }
    println!("{line}");
    Ok(())
}

/// A picture with something in it for the edge detector.
fn picture(side: u32, seed: u64) -> Picture {
    let mut picture = Picture::filled(side, side, [90, 120, 150]);
    let mut random = Philox::new(seed, 0);
    for _ in 0..24 {
        let (x0, y0) = (random.below(side), random.below(side));
        let (w, h) = (random.below(side / 3 + 1), random.below(side / 3 + 1));
        let color = [0, 1, 2].map(|_| random.below(256) as u8);
        for y in y0..(y0 + h).min(side) {
            for x in x0..(x0 + w).min(side) {
                let at = ((y * side + x) * 3) as usize;
                picture.rgb[at..at + 3].copy_from_slice(&color);
            }
        }
    }
    picture
}

/// A request for a picture of this side with an instruction of its own.
fn request(side: u32, seed: u64, settings: EditSettings) -> EditRequest {
    EditRequest {
        source: Some(Source::of(picture(side, seed))),
        caption: Some("coloured boxes".into()),
        instructions: vec!["Turn the boxes into rustic wood".into()],
        settings: EditSettings {
            seed,
            count: 1,
            ..settings
        },
        ..EditRequest::default()
    }
}

/// The paper's way to edit, from edges alone.
fn settings(steps: usize, cache_threshold: Option<f32>) -> EditSettings {
    EditSettings {
        steps: Some(steps),
        backend: Some(Backend::Canny),
        control_scale: Some(0.7),
        cache_threshold,
        ..EditSettings::default()
    }
}

fn no_users() -> Result<(tempfile::TempDir, Store)> {
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path(), Default::default())?;
    Ok((folder, store))
}

fn edit(
    bundle: &str,
    device: &Device,
    side: u32,
    steps: usize,
    batch: usize,
    cache: Option<f32>,
) -> Result<Value> {
    let (_folder, store) = no_users()?;
    let engine = Engine::open(bundle, device)?;
    let all = |steps| -> Vec<EditRequest> {
        (0..batch as u64)
            .map(|seed| request(side, seed, settings(steps, cache)))
            .collect()
    };
    let begun = Instant::now();
    engine.edit_batch(&store.snapshot(), &all(1), &mut Hooks::default())?;
    let first = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let edits = engine.edit_batch(&store.snapshot(), &all(steps), &mut Hooks::default())?;
    let whole = begun.elapsed().as_secs_f64();
    let seconds = edits.first().map(|e| e.seconds).ok_or("no edit")?;
    let tflop = velocity_tflop(&Bundle::find(bundle)?, side)?;
    let done = tflop * (steps * batch) as f64 / seconds.sample;
    Ok(json!({
        "side": side, "steps": steps, "batch": batch, "cache": cache,
        "seconds": whole, "load_and_one_step": first, "stages": seconds,
        "a_step": seconds.sample / steps as f64,
        // The cache leaves out what it can, and nobody counts what.
        "tflop_a_velocity": tflop, "tflop_per_s": cache.is_none().then_some(done),
    }))
}

/// Multiplications and additions of one velocity of a square picture with its ControlNet, in
/// 10¹²: of the blocks' linear layers and attention, which leaves out less than a hundredth.
fn velocity_tflop(bundle: &Bundle, side: u32) -> Result<f64> {
    let flux = bundle.manifest.roles.flux.as_ref();
    let flux = flux.ok_or("the bundle makes no pictures")?;
    let text = match &flux.text {
        FluxText::Minilm { tokens, .. } | FluxText::T5Clip { tokens, .. } => *tokens as f64,
    };
    let image = f64::from(side / 16 * (side / 16));
    let mut flop = 0.0;
    for location in [Some(&flux.transformer), flux.controlnet.as_ref()] {
        let Some(location) = location else { continue };
        let config: Value =
            serde_json::from_slice(&std::fs::read(bundle.path(location)?.join("config.json"))?)?;
        let number = |key: &str| config[key].as_f64().ok_or(format!("no {key}"));
        let width = number("num_attention_heads")? * number("attention_head_dim")?;
        let blocks = number("num_layers")? + number("num_single_layers")?;
        let all = text + image;
        // Either kind of block has twelve matrices of width x width for a token.
        flop += blocks * (2.0 * 12.0 * width * width * all + 4.0 * all * all * width);
        if Some(location) == flux.controlnet.as_ref() {
            // What each of its blocks hands over goes through one more.
            flop += blocks * 2.0 * width * width * image;
        }
    }
    Ok(flop / 1e12)
}

/// Weights of a language model's matrices: of its layers, which every token goes through, and of
/// the head, which only those do that are to be guessed.
fn weights_of(model: &LanguageModel) -> (f64, f64) {
    let c = &model.decoder.config;
    let attention = 2 * (c.heads + c.kv_heads) * c.head_dim * c.hidden;
    let layers = c.layers * (attention + 3 * c.hidden * c.intermediate);
    (layers as f64, (c.vocab * c.hidden) as f64)
}

/// bf16 products of an H200 without sparsity, as its maker states them, in 10¹² a second.
const PEAK_TFLOP: f64 = 989.0;

fn cached(bundle: &str, device: &Device, side: u32, steps: usize, threshold: f32) -> Result<Value> {
    let (_folder, store) = no_users()?;
    let engine = Engine::open(bundle, device)?;
    let made = |cache_threshold| -> Result<(Picture, f64)> {
        let asked = request(side, 0, settings(steps, cache_threshold));
        let edit = engine.edit(&store.snapshot(), &asked, &mut Hooks::default())?;
        let seconds = edit.seconds.sample;
        let picture = edit.images.into_iter().next().ok_or("no picture")?;
        Ok((picture, seconds))
    };
    made(None)?; // loads, compiles and allocates
    let (exact, exact_s) = made(None)?;
    let (near, near_s) = made(Some(threshold))?;
    let everywhere = Mask::from_picture(&Picture::filled(side, side, [0; 3]));
    let psnr = psnr_outside(&exact, &near, &everywhere)?;
    let eyes = models_folder().join("lpips");
    let lpips = match eyes.exists() {
        true => Some(Lpips::open(&eyes, Net::AlexNet, &Device::Cpu)?.distance(&exact, &near)?),
        false => None,
    };
    Ok(json!({
        "side": side, "steps": steps, "cache": threshold, "sample_exact_s": exact_s,
        "sample_cached_s": near_s, "psnr": psnr, "lpips": lpips,
    }))
}

/// A store in which `count` users have said five likes each, with vectors and embeddings.
fn community(bundle: &Bundle, count: usize) -> Result<(tempfile::TempDir, Store, TextEncoder)> {
    let (folder, store) = no_users()?;
    let roles = &bundle.manifest.roles;
    store.set_encoder(&bundle.role("sage", roles.sage.as_ref())?)?;
    let path = bundle.role("text_encoder", roles.text_encoder.as_ref())?;
    let encoder = TextEncoder::open(&path, &Device::Cpu)?;
    store.append(&common::likes(count))?;
    text_vectors::featurize(&store, &encoder, |_, _| {})?;
    Ok((folder, store, encoder))
}

fn personal(bundle: &str, device: &Device, side: u32, steps: usize) -> Result<Value> {
    let found = Bundle::find(bundle)?;
    let (_folder, store, encoder) = community(&found, 64)?;
    let engine = Engine::open(bundle, device)?;
    let asked = |steps| EditRequest {
        user: "user 0".into(),
        instructions: Vec::new(),
        ..request(
            side,
            0,
            EditSettings {
                steps: Some(steps),
                ..EditSettings::default()
            },
        )
    };
    engine.edit(&store.snapshot(), &asked(1), &mut Hooks::default())?; // loads
    let begun = Instant::now();
    store.append(&[Event::new("user 0", "weathered driftwood", Polarity::Like)])?;
    text_vectors::featurize(&store, &encoder, |_, _| {})?;
    let learnt = begun.elapsed().as_secs_f64();
    let edit = engine.edit(&store.snapshot(), &asked(steps), &mut Hooks::default())?;
    Ok(json!({
        "side": side, "steps": steps, "seconds": begun.elapsed().as_secs_f64(),
        "event_s": learnt, "stages": edit.seconds,
        "instruction_bytes": edit.instruction.instruction.len(),
    }))
}

/// A network of a bundle in its own folder.
fn network<C: DeserializeOwned>(
    bundle: &Bundle,
    location: &Location,
    kind: Kind,
    device: &Device,
) -> Result<(C, VarBuilder<'static>)> {
    let dtype = match device.is_cpu() {
        true => DType::F32,
        false => DType::BF16,
    };
    let folder = bundle.path(location)?;
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let weights = simpatico_engine::weights::Weights::open(&folder)?;
    let vb = simpatico_engine::flux::names::open(&weights, kind, 0, dtype, device)?;
    Ok((config, vb))
}

fn velocity(bundle: &str, device: &Device, side: usize, out: &Path) -> Result<Value> {
    let bundle = Bundle::find(bundle)?;
    let flux = bundle
        .manifest
        .roles
        .flux
        .clone()
        .ok_or("the bundle makes no pictures")?;
    let location = flux
        .controlnet
        .as_ref()
        .ok_or("the bundle has no ControlNet")?;
    let (config, vb) = network(&bundle, &flux.transformer, Kind::Transformer, device)?;
    let transformer = FluxTransformer::new(&config, vb)?;
    let (small, vb) = network(&bundle, location, Kind::ControlNet, device)?;
    let control = ControlNet::new(&small, vb)?;
    let config = transformer.config();
    let rows = side / 16;
    let mut random = Philox::new(7, 0);
    let mut normals = |shape: &[usize]| -> Result<Tensor> {
        let values = random.normals(shape.iter().product());
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_device(device)?)
    };
    let latents = normals(&[1, rows * rows, config.in_channels])?;
    let condition = normals(&[1, rows * rows, config.in_channels])?;
    let text = normals(&[1, 128, config.joint_attention_dim])?;
    let pooled = normals(&[1, config.pooled_projection_dim])?;
    let ids = image_ids(rows, rows, device)?;
    let words = text_ids(128, device)?;
    let timestep = Tensor::new(&[0.7f32], device)?;
    let guidance = Tensor::new(&[3.5f32], device)?;
    let mut inputs = Inputs {
        latents: &latents,
        ids: &ids,
        text: &text,
        text_ids: &words,
        pooled: &pooled,
        timestep: &timestep,
        guidance: config.guidance_embeds.then_some(&guidance),
        residuals: None,
    };
    let residuals = control.forward(
        &inputs,
        &Control {
            condition: &condition,
            modes: small.num_mode.map(|_| &[0u32][..]),
            scale: 0.7,
        },
    )?;
    inputs.residuals = Some(&residuals);
    let velocity = transformer.forward(&inputs)?;
    let named = [
        ("latents", &latents),
        ("condition", &condition),
        ("text", &text),
        ("pooled", &pooled),
        ("velocity", &velocity),
    ]
    .map(|(name, t)| {
        Ok((
            name.to_string(),
            t.to_dtype(DType::F32)?.to_device(&Device::Cpu)?,
        ))
    });
    let named = named.into_iter().collect::<Result<Vec<_>>>()?;
    save_tensors(out, &named, &[])?;
    Ok(json!({"side": side, "out": out}))
}

/// How far attention in bf16 is from the CPU's in f32, of the same numbers: the most of any element,
/// as a share of the largest. Heads of both widths that models have, fewer keys' heads than queries',
/// lengths that fill no block, and a causal mask over keys from before.
fn attention(device: &Device) -> Result<Value> {
    let mut worst = 0f64;
    let mut found = serde_json::Map::new();
    for d in [64, 128] {
        for (mask, name) in [(nn::Mask::None, "all"), (nn::Mask::Causal, "causal")] {
            for (t, s) in [(1, 1), (33, 33), (7, 150), (130, 200), (192, 192)] {
                let normals = |stream, heads, count| -> Result<Tensor> {
                    let x = Philox::new(3, stream).normals(2 * heads * count * d);
                    let x = Tensor::from_vec(x, (2, heads, count, d), &Device::Cpu)?;
                    Ok(x.to_dtype(DType::BF16)?)
                };
                let [q, k, v] = [normals(1, 4, t)?, normals(2, 2, s)?, normals(3, 2, s)?];
                let on = |device: &Device, dtype: DType| -> Result<Vec<f32>> {
                    let there = |x: &Tensor| x.to_device(device)?.to_dtype(dtype);
                    let scale = (d as f64).powf(-0.5);
                    let y = nn::attention(&there(&q)?, &there(&k)?, &there(&v)?, scale, &mask)?;
                    Ok(y.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
                };
                let (ours, wanted) = (on(device, DType::BF16)?, on(&Device::Cpu, DType::F32)?);
                let most = wanted.iter().fold(0f32, |most, v| most.max(v.abs()));
                // A number that is none must not pass for a small one.
                let off = ours.iter().zip(&wanted).map(|(a, b)| (a - b).abs());
                let off = off.fold(0f32, |most, v| if v <= most { most } else { v });
                let off = f64::from(off / most);
                worst = if off <= worst { worst } else { off };
                found.insert(format!("{name}, {t} to {s} of {d}"), json!(off));
            }
        }
    }
    Ok(json!({"off_by": worst, "each": found}))
}

fn language_model(bundle: &str, device: &Device) -> Result<LanguageModel> {
    let bundle = Bundle::find(bundle)?;
    let role = bundle.manifest.roles.language_model.as_ref();
    let path = bundle.role("language_model", role)?;
    let precision = match device.is_cpu() {
        true => DType::F32,
        false => DType::BF16,
    };
    Ok(LanguageModel::open(
        &path,
        Precision::Dense(precision),
        device,
    )?)
}

fn tokens(model: &LanguageModel, count: usize, stream: u64) -> Vec<u32> {
    let mut random = Philox::new(11, stream);
    let vocabulary = model.decoder.config.vocab as u32;
    (0..count).map(|_| random.below(vocabulary)).collect()
}

fn decode(bundle: &str, device: &Device, prompt: usize, new: usize, batch: usize) -> Result<Value> {
    let mut model = language_model(bundle, device)?;
    // Every answer has the length asked for.
    model.stop.clear();
    model.decoder.join()?;
    let prompts: Vec<generate::Prompt> = (0..batch as u64)
        .map(|i| generate::Prompt::tokens(tokens(&model, prompt, i)))
        .collect();
    let run = |tokens: usize| -> Result<f64> {
        let options = generate::Options::greedy(tokens);
        let begun = Instant::now();
        generate_batch(&model, &prompts, None, &options, || {
            ControlFlow::Continue(())
        })?;
        Ok(begun.elapsed().as_secs_f64())
    };
    run(2)?;
    let prefill = run(1)?;
    let whole = run(new)?;
    let (layers, head) = weights_of(&model);
    Ok(json!({
        "prompt": prompt, "new": new, "batch": batch,
        "prefill_tokens_per_s": (batch * prompt) as f64 / prefill,
        "prefill_tflop_per_s": 2e-12 * layers * (batch * prompt) as f64 / prefill,
        "decode_tokens_per_s": (batch * (new - 1)) as f64 / (whole - prefill),
        // Of weights alone, which a step reads once for the whole batch.
        "decode_gb_per_s": 2e-9 * (layers + head) * (new - 1) as f64 / (whole - prefill),
        "steps_off_by": steps_off_by(&model)?,
    }))
}

/// By how much tokens read one by one behind others differ from the same read at once, as a share
/// of the largest number: two ways to compute one thing, on a GPU by other kernels.
fn steps_off_by(model: &LanguageModel) -> Result<f64> {
    let (together, apart) = (24, 8);
    let decoder = &model.decoder;
    let x = model.embed_tokens(&tokens(model, together + apart, 0))?;
    let causal = simpatico_engine::lm::Placement::Causal;
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let at_once = wide(&decoder.hidden(&x, &causal, None, None, None)?)?;
    let mut cache = simpatico_engine::lm::Cache::new(&decoder.config, together + apart);
    let mut one_by_one = Vec::new();
    for (first, count) in [(0, together)]
        .into_iter()
        .chain((together..together + apart).map(|i| (i, 1)))
    {
        let part = x.narrow(1, first, count)?;
        one_by_one.extend(wide(&decoder.hidden(
            &part,
            &causal,
            None,
            None,
            Some(&mut cache),
        )?)?);
    }
    let most = at_once.iter().fold(0f32, |most, v| most.max(v.abs()));
    let off = at_once.iter().zip(&one_by_one);
    let off = off.fold(0f32, |off, (a, b)| off.max((a - b).abs()));
    Ok(f64::from(off / most))
}

fn logits(bundle: &str, device: &Device, length: usize, out: &Path) -> Result<Value> {
    let model = language_model(bundle, device)?;
    let ids = tokens(&model, length, 0);
    let x = model.embed_tokens(&ids)?;
    let causal = simpatico_engine::lm::Placement::Causal;
    let hidden = model.decoder.hidden(&x, &causal, None, None, None)?;
    let logits = model.decoder.logits(&hidden)?.to_dtype(DType::F32)?;
    let ids = Tensor::new(ids, &Device::Cpu)?;
    let named = [
        ("ids".to_string(), ids),
        ("logits".to_string(), logits.to_device(&Device::Cpu)?),
    ];
    save_tensors(out, &named, &[])?;
    Ok(json!({"length": length, "out": out}))
}

fn dpo(bundle: &str, device: &Device, count: usize, steps: usize) -> Result<Value> {
    let model = language_model(bundle, device)?;
    let adapter = model.trainable(LoraConfig::paper(), 1)?;
    let config = SoftPromptConfig {
        embedding: 1024,
        inner: 1024,
        tokens: 8,
        hidden: model.decoder.config.hidden,
        scale: 1.0,
        normalize: true,
        bounded: false,
        everyone: None,
    };
    let (soft, params) = SoftPrompt::fresh(config, 2, device)?;
    let users = Tensor::from_vec(Philox::new(3, 0).normals(64 * 1024), (64, 1024), device)?;
    let conditioning = Conditioning {
        index: (0..64).map(|i| (format!("user {i}"), i)).collect(),
        embeddings: Box::new(|| Ok(users.clone())),
        vars: Vec::new(),
        neighbors: (0..64)
            .map(|i| (1..4).map(|j| ((i + j) % 64, 1.0 / 3.0)).collect())
            .collect(),
    };
    let policy = Policy {
        adapter: &adapter,
        soft: Some((&soft, &params)),
        users: Some(&conditioning),
    };
    let groups: Vec<PairGroup> = (0..count as u64)
        .map(|i| PairGroup {
            user: format!("user {}", i % 64),
            prompt: tokens(&model, 160, 2 * i),
            pairs: vec![TokenPair {
                chosen: tokens(&model, 32, 1 << 32 | i),
                rejected: tokens(&model, 32, 1 << 33 | i),
            }],
        })
        .collect();
    let options = DpoOptions {
        groups: count,
        ..DpoOptions::paper(DpoOptions::collaborative())
    };
    let mut optimizer = dpo_optimizer(&policy, &options)?;
    let reference = vec![vec![-100.0, -100.0]; count];
    let picked: Vec<usize> = (0..count).collect();
    let mut each = Vec::new();
    for step in 0..=steps {
        let begun = Instant::now();
        dpo_batch(
            &model.decoder,
            &policy,
            &groups,
            &reference,
            &picked,
            &options,
            step,
            &mut optimizer,
        )?;
        optimizer.step(1.0)?;
        device.synchronize()?;
        each.push(begun.elapsed().as_secs_f64());
    }
    // The first step also compiles and allocates.
    let seconds = each[1..].iter().sum::<f64>() / steps.max(1) as f64;
    // As work counts: the prompt once and both answers, for the user and three neighbours.
    let worked = (count * 4 * (8 + 160 + 64)) as f64;
    let guessed = (count * 4 * 64) as f64;
    // Forwards, and backwards to the inputs: the weights themselves are not learned.
    let (layers, head) = weights_of(&model);
    let tflop = 4e-12 * (layers * worked + head * guessed) / seconds;
    Ok(json!({
        "groups": count, "k": 3, "steps": steps, "seconds_a_step": seconds,
        "tokens_per_s": worked / seconds, "tflop_per_s": tflop, "mfu": tflop / PEAK_TFLOP,
    }))
}

fn gradients(bundle: &str, device: &Device, count: usize, folder: &Path) -> Result<Value> {
    let model = language_model(bundle, device)?;
    let mut config = LoraConfig::paper();
    config.dropout = 0.0;
    let adapter = model.trainable(config, 1)?;
    // A fresh adapter does nothing, and only half of its weights have a slope.
    for (stream, (name, var)) in (0..).zip(adapter.vars()) {
        if name.contains("lora_B") {
            let values = Philox::new(17, stream).normals(var.elem_count());
            let values = Tensor::from_vec(values, var.shape(), &Device::Cpu)?;
            var.set(&(values * 0.02)?.to_device(device)?)?;
        }
    }
    adapter.save(folder, None)?;
    let (prompt, answer) = (48, 16);
    let all = |i: u64| tokens(&model, prompt + answer, i);
    let pairs: Vec<(Vec<u32>, Vec<u32>)> = (0..count as u64)
        .map(|i| {
            let (chosen, mut rejected) = (all(2 * i), all(2 * i + 1));
            rejected[..prompt].copy_from_slice(&chosen[..prompt]);
            (chosen, rejected)
        })
        .collect();
    let rows: Vec<Row> = pairs
        .iter()
        .map(|(chosen, rejected)| Row {
            prompt: &chosen[..prompt],
            completions: vec![&chosen[prompt..], &rejected[prompt..]],
        })
        .collect();
    let logps = |adapter| score(&model.decoder, adapter, None, None, &rows, false);
    let before = logps(None)?.logps.detach();
    let ratios = (logps(Some(&adapter))?.logps - before)?.reshape((count, 2))?;
    let side = |i| ratios.narrow(1, i, 1)?.squeeze(1);
    let lengths = vec![answer; count];
    let options = LossOptions {
        loss: Loss::Sigmoid,
        beta: 0.1,
        label_smoothing: 0.0,
    };
    let loss = pair_losses(&options, &side(0)?, &side(1)?, (&lengths, &lengths))?.mean_all()?;
    let slopes = loss.backward()?;
    let ids: Vec<u32> = pairs
        .into_iter()
        .flat_map(|(a, b)| [a, b])
        .flatten()
        .collect();
    let ids = Tensor::from_vec(ids, (2 * count, prompt + answer), &Device::Cpu)?;
    let loss = loss.detach().to_device(&Device::Cpu)?;
    let mut named = vec![
        ("answers".to_string(), ids.narrow(1, prompt, answer)?),
        ("ids".to_string(), ids),
        ("loss".to_string(), loss.clone()),
    ];
    for (name, var) in adapter.vars() {
        let slope = slopes
            .get(var)
            .ok_or_else(|| format!("{name} has no slope"))?;
        let slope = slope.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        named.push((name.clone(), slope));
    }
    save_tensors(&folder.join("slopes.safetensors"), &named, &[])?;
    Ok(json!({"pairs": count, "loss": loss.to_scalar::<f32>()?}))
}

fn train(device: &Device, network: &str, steps: usize, batch: usize) -> Result<Value> {
    let shipped = flow::Options::shipped();
    let config = &shipped.config;
    let random = |stream, shape: &[usize]| {
        let values = Philox::new(13, stream).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu)
    };
    let latents = [64, config.in_channels / 4, 16, 16];
    let pairs = Pairs {
        source: random(0, &latents)?,
        target: random(1, &latents)?,
        control: random(2, &latents)?,
        text: random(3, &[64, 20, config.joint_attention_dim])?,
        pooled: random(4, &[64, config.pooled_projection_dim])?,
        no_text: random(5, &[1, 20, config.joint_attention_dim])?,
        no_pooled: random(6, &[1, config.pooled_projection_dim])?,
    };
    // The mean loss of the steps and the seconds they took.
    let run = |compute: &Compute, steps| -> Result<(f64, f64)> {
        let folder = tempfile::tempdir()?;
        let rhythm = Rhythm {
            report_s: 1e9,
            checkpoint_s: 1e9,
            ..Rhythm::usual(folder.path())
        };
        let mut last = (0.0, 0.0);
        let mut tell = |p: &Progress| {
            last = (p.loss, p.seconds);
            true
        };
        if network == "vae" {
            let options = autoencoder::Options {
                steps,
                batch,
                ..autoencoder::Options::shipped()
            };
            autoencoder::run(&options, compute, &rhythm, &mut tell)?;
        } else {
            let options = flow::Options {
                steps,
                batch,
                ..shipped.clone()
            };
            flow::run(&options, &pairs, compute, &rhythm, &mut tell)?;
        }
        Ok(last)
    };
    let samples_per_s = |compute: &Compute, steps: usize| -> Result<f64> {
        run(compute, 2)?; // compiles and allocates
        Ok((steps * batch) as f64 / run(compute, steps)?.1)
    };
    let here = Compute::on(device.clone(), None)?;
    let exact = Compute::on(device.clone(), Some("f32"))?;
    let cpu = Compute::cpu();
    let (loss, wanted) = (run(&here, 1)?.0, run(&cpu, 1)?.0);
    Ok(json!({
        "network": network, "steps": steps, "batch": batch, "dtype": format!("{:?}", here.dtype),
        "samples_per_s": samples_per_s(&here, steps)?,
        "samples_per_s_in_f32": samples_per_s(&exact, steps)?,
        "samples_per_s_on_the_cpu": samples_per_s(&cpu, steps.min(10))?,
        "loss_off_the_cpus": (loss - wanted).abs() / wanted,
    }))
}

fn full(bundle: &str, device: &Device, side: u32) -> Result<Value> {
    // What is too large must be told by name, and leave the device as it was.
    let told = |error: Option<Error>, what: &str| match error {
        Some(e @ (Error::NotEnoughMemory { .. } | Error::OutOfMemory { .. })) => Ok(e.to_string()),
        Some(e) => Err(format!("{what}: {e}")),
        None => Err(format!("{what}: all of it fitted")),
    };
    let (_folder, store) = no_users()?;
    let engine = Engine::open(bundle, device)?;
    let settings = || EditSettings {
        steps: Some(1),
        ..EditSettings::default()
    };
    let many: Vec<EditRequest> = (0..1024)
        .map(|seed| request(side, seed, settings()))
        .collect();
    let refused = engine.edit_batch(&store.snapshot(), &many, &mut Hooks::default());
    let pictures = told(refused.err(), "pictures")?;
    engine.edit(&store.snapshot(), &many[0], &mut Hooks::default())?;
    drop(engine);

    let model = language_model(bundle, device)?;
    let write = |count: u64, length: usize| {
        let prompts: Vec<generate::Prompt> = (0..count)
            .map(|i| generate::Prompt::tokens(tokens(&model, length, i)))
            .collect();
        let options = generate::Options::greedy(2);
        let go_on = || ControlFlow::Continue(());
        generate_batch(&model, &prompts, None, &options, go_on)
    };
    let words = told(write(4096, 2000).err(), "words")?;
    write(1, 20)?;

    let adapter = model.trainable(LoraConfig::paper(), 1)?;
    let learn = |count: u64, length: usize| {
        let ids: Vec<Vec<u32>> = (0..count).map(|i| tokens(&model, length, i)).collect();
        let rows: Vec<Row> = ids
            .iter()
            .map(|ids| Row {
                prompt: &ids[..length - 8],
                completions: vec![&ids[length - 8..]],
            })
            .collect();
        let scores = score(&model.decoder, Some(&adapter), None, None, &rows, false)?;
        Ok(scores.logps.sum_all()?.backward().map(|_| ())?)
    };
    let training = told(learn(1024, 2000).err(), "training")?;
    learn(1, 20)?;
    Ok(json!({
        "side": side, "pictures": pictures, "words": words, "training": training,
        "then_smaller_ones_worked": true,
    }))
}

fn same(bundle: &str, device: &Device, cut_outs: &Path, count: usize) -> Result<Value> {
    let (_folder, store, _) = community(&Bundle::find(bundle)?, count)?;
    let files = common::pngs(cut_outs)?;
    let requests = (0..count)
        .map(|i| {
            Ok(EditRequest {
                user: format!("user {i}"),
                source: Some(Source::open(&files[i % files.len()])?),
                caption: Some("a small picture".into()),
                settings: EditSettings {
                    count: 1,
                    ..EditSettings::default()
                },
                ..EditRequest::default()
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let run = |device: &Device| -> Result<(Vec<_>, f64)> {
        let engine = Engine::open(bundle, device)?;
        engine.edit(&store.snapshot(), &requests[0], &mut Hooks::default())?;
        let begun = Instant::now();
        let edits = engine.edit_batch(&store.snapshot(), &requests, &mut Hooks::default())?;
        Ok((edits, begun.elapsed().as_secs_f64()))
    };
    let (here, seconds) = run(device)?;
    let (cpu, cpu_seconds) = run(&Device::Cpu)?;
    let pairs = || here.iter().zip(&cpu);
    let words = pairs().all(|(a, b)| a.instruction.instruction == b.instruction.instruction);
    let off = pairs().flat_map(|(a, b)| {
        let (a, b) = (&a.images[0].rgb, &b.images[0].rgb);
        a.iter().zip(b).map(|(a, b)| a.abs_diff(*b))
    });
    Ok(json!({
        "edits": here.len(), "same_instructions": words, "largest_difference": off.max(),
        "edits_per_s": here.len() as f64 / seconds,
        "edits_per_s_on_the_cpu": here.len() as f64 / cpu_seconds,
    }))
}
