//! Edits through the whole engine on a small random bundle made on the spot.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use serde_json::json;
use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};

use super::*;
use crate::flux::{controlnet, init, names, transformer, vae};
use crate::picture::Mask;

type Tensors = BTreeMap<String, Tensor>;

fn save(folder: &Path, config: &impl serde::Serialize, tensors: &Tensors) {
    std::fs::create_dir_all(folder).unwrap();
    let config = serde_json::to_vec(config).unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
    let none = BTreeMap::new();
    crate::weights::save_safetensors(&folder.join("model.safetensors"), tensors, &none).unwrap();
}

/// Random weights in which nothing is silent, so that words and control really matter.
fn loud(shapes: &[(String, Vec<usize>)], seed: u64) -> Tensors {
    let mut all = init::random(shapes, seed, &Device::Cpu).unwrap();
    for (i, tensor) in all.values_mut().enumerate() {
        let sum = tensor.abs().unwrap().sum_all().unwrap();
        if sum.to_scalar::<f32>().unwrap() == 0.0 {
            let values = Philox::new(seed + 1, i as u64).normals(tensor.elem_count());
            let noise = Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap();
            *tensor = (noise * 0.08).unwrap();
        }
    }
    all
}

fn small_bert(folder: &Path) {
    let d = 32;
    let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
    let mut add = |name: &str, shape: &[usize]| shapes.push((name.into(), shape.to_vec()));
    add("embeddings.word_embeddings.weight", &[16, d]);
    add("embeddings.position_embeddings.weight", &[32, d]);
    add("embeddings.token_type_embeddings.weight", &[2, d]);
    let layer = "encoder.layer.0.";
    for (name, rows, columns) in [
        ("attention.self.query", d, d),
        ("attention.self.key", d, d),
        ("attention.self.value", d, d),
        ("attention.output.dense", d, d),
        ("intermediate.dense", 64, d),
        ("output.dense", d, 64),
    ] {
        add(&format!("{layer}{name}.weight"), &[rows, columns]);
        add(&format!("{layer}{name}.bias"), &[rows]);
    }
    let mut tensors = loud(&shapes, 7);
    for name in [
        "embeddings.LayerNorm",
        "encoder.layer.0.attention.output.LayerNorm",
        "encoder.layer.0.output.LayerNorm",
    ] {
        let ones = Tensor::ones(d, candle_core::DType::F32, &Device::Cpu).unwrap();
        tensors.insert(format!("{name}.weight"), ones.clone());
        tensors.insert(format!("{name}.bias"), ones.zeros_like().unwrap());
    }
    let config = json!({
        "vocab_size": 16, "hidden_size": d, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "max_position_embeddings": 32, "type_vocab_size": 2, "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "use_cache": true, "classifier_dropout": null, "model_type": "bert"
    });
    save(folder, &config, &tensors);
    let words = [
        "[UNK]", "make", "it", "red", "blue", "wood", "gold", "a", "mug", ".",
    ];
    let vocabulary: BTreeMap<&str, usize> =
        words.iter().enumerate().map(|(i, w)| (*w, i)).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// A bundle of random networks that make 32 x 32 pictures out of 16 tokens.
fn small_bundle(folder: &Path) -> Bundle {
    let vae = vae::Config {
        latent_channels: 4,
        block_out_channels: vec![8, 8, 8],
        norm_num_groups: 4,
        layers_per_block: 1,
        ..vae::Config::small()
    };
    let trunk = transformer::Config {
        in_channels: 16,
        num_layers: 1,
        num_single_layers: 2,
        attention_head_dim: 16,
        num_attention_heads: 2,
        joint_attention_dim: 32,
        pooled_projection_dim: 32,
        axes_dims_rope: vec![4, 6, 6],
        ..transformer::Config::small()
    };
    let control = controlnet::Config {
        num_mode: Some(6),
        ..controlnet::Config::small(&trunk)
    };
    save(
        &folder.join("vae"),
        &vae,
        &loud(&names::vae_shapes(&vae), 1),
    );
    save(
        &folder.join("transformer"),
        &trunk,
        &loud(&names::transformer_shapes(&trunk), 2),
    );
    save(
        &folder.join("controlnet"),
        &control,
        &loud(&names::controlnet_shapes(&control), 3),
    );
    small_bert(&folder.join("text"));
    let manifest = json!({
        "version": 1, "name": "small",
        "roles": {"flux": {
            "transformer": "transformer", "controlnet": "controlnet", "vae": "vae",
            "text": {"kind": "minilm", "model": "text", "tokens": 8}
        }},
        "settings": {"steps": 3, "side_min": 32, "side_max": 32, "multiple": 8, "control_scale": 1.0}
    });
    std::fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
    Bundle::open(folder).unwrap()
}

struct Bench {
    _folder: tempfile::TempDir,
    engine: Engine,
    snapshot: Snapshot,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let bundle = small_bundle(&folder.path().join("bundle"));
    let store = Store::open(folder.path().join("store"), Options::default()).unwrap();
    let snapshot = store.snapshot();
    Bench {
        engine: Engine::new(bundle, &Device::Cpu).with_pseudonym_key([3; 32]),
        snapshot,
        _folder: folder,
    }
}

fn checker(seed: u8) -> Picture {
    let pixel = |i: u32| {
        let (x, y) = (i % 40, i / 40);
        let on = (x / 5 + y / 5) % 2 == 0;
        [
            if on { 230 } else { 20 },
            (x * 5) as u8,
            seed.wrapping_mul(40),
        ]
    };
    Picture::from_rgb(40, 24, (0..40 * 24).flat_map(pixel).collect())
}

fn request(instruction: &str, seed: u64) -> EditRequest {
    EditRequest {
        user: "ada".into(),
        source: Some(Source::of(checker(1))),
        caption: Some("a mug".into()),
        instructions: vec![instruction.into()],
        settings: EditSettings {
            seed,
            ..EditSettings::default()
        },
        ..EditRequest::default()
    }
}

impl Bench {
    fn edit(&self, request: &EditRequest) -> Result<Edit> {
        self.engine
            .edit(&self.snapshot, request, &mut Hooks::default())
    }

    fn one(&self, request: &EditRequest) -> Picture {
        self.edit(request).unwrap().images.remove(0)
    }
}

fn worst(a: &Picture, b: &Picture) -> u8 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    a.rgb
        .iter()
        .zip(&b.rgb)
        .map(|(x, y)| x.abs_diff(*y))
        .max()
        .unwrap_or(0)
}

#[test]
fn the_engine_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Engine>();
}

#[test]
fn an_edit_has_the_sources_size_and_depends_on_words_source_and_seed() {
    let b = bench();
    let first = b.one(&request("make it red", 1));
    assert_eq!((first.width, first.height), (40, 24));
    assert_eq!(first, b.one(&request("make it red", 1)));
    assert_ne!(first, b.one(&request("make it blue", 1)));
    assert_ne!(first, b.one(&request("make it red", 2)));
    let mut other = request("make it red", 1);
    let mut flipped = checker(1);
    flipped.rgb.reverse();
    other.source = Some(Source::of(flipped));
    assert_ne!(first, b.one(&other));
}

#[test]
fn transparency_and_profile_of_the_source_are_kept() {
    let b = bench();
    let mut r = request("make it red", 1);
    let mut source = checker(1);
    source.alpha = Some((0..40 * 24).map(|i| (i % 256) as u8).collect());
    source.icc = Some(vec![7; 40]);
    r.source = Some(Source::of(source.clone()));
    let out = b.one(&r);
    assert_eq!((out.alpha, out.icc), (source.alpha, source.icc));
}

#[test]
fn provenance_makes_the_same_bytes_again_and_refuses_another_source() {
    let b = bench();
    let mut r = request("make it gold", 5);
    r.settings.count = 3;
    let edit = b.edit(&r).unwrap();
    assert_eq!(edit.images.len(), 3);
    for (image, record) in edit.images.iter().zip(&edit.provenance) {
        let again = b
            .engine
            .replay(record, r.source.as_ref(), None, &mut Hooks::default())
            .unwrap()
            .0;
        let png = |p| provenance::to_png(p, record).unwrap();
        assert_eq!(png(&again), png(image));
    }
    let record = &edit.provenance[0];
    assert_ne!(record.user_pseudonym.as_deref(), Some("ada"));
    assert!(
        record
            .models
            .iter()
            .any(|m| m.file.starts_with("transformer/"))
    );
    let other = Source::of(checker(9));
    let said = b
        .engine
        .replay(record, Some(&other), None, &mut Hooks::default());
    assert!(said.unwrap_err().to_string().contains("SHA-256"));
    let mut changed = record.clone();
    changed.models[0].sha256 = "0".repeat(64);
    let said = b
        .engine
        .replay(&changed, r.source.as_ref(), None, &mut Hooks::default());
    assert!(said.unwrap_err().to_string().contains("model file"));
}

#[test]
fn several_instructions_are_carried_out_together_and_recorded_each() {
    let b = bench();
    let mut r = request("make it red", 1);
    let red = b.one(&r);
    r.instructions = vec!["make it red".into(), "make it red".into()];
    let twice = b.one(&r);
    // The same one twice is that one, with guidance from the empty prompt as before.
    r.instructions = vec!["make it red".into(), "make it wood".into()];
    for backend in [
        Backend::Canny,
        Backend::Img2img,
        Backend::RfInversion,
        Backend::Flowedit,
    ] {
        r.settings.backend = Some(backend);
        let edit = b.edit(&r).unwrap();
        let record = &edit.provenance[0];
        assert_eq!(record.instructions, r.instructions);
        assert_eq!(record.instruction, "make it red; make it wood");
        let again = b
            .engine
            .replay(record, r.source.as_ref(), None, &mut Hooks::default());
        assert_eq!(again.unwrap().0, edit.images[0], "{backend:?}");
        // Not the two read as one sentence, nor either of them alone.
        for words in ["make it red make it wood", "make it red", "make it wood"] {
            let mut other = request(words, 1);
            other.settings.backend = Some(backend);
            assert_ne!(b.one(&other), edit.images[0], "{backend:?} {words}");
        }
    }
    assert!(worst(&twice, &red) <= 1, "{}", worst(&twice, &red));
    // Calls of one and of two instructions may share a batch.
    let requests = [request("make it blue", 2), r.clone()];
    let edits = b
        .engine
        .edit_batch(&b.snapshot, &requests, &mut Hooks::default())
        .unwrap();
    for (request, edit) in requests.iter().zip(edits) {
        assert!(worst(&edit.images[0], &b.one(request)) <= 1);
    }
    r.instructions = vec!["make it red".into(); 9];
    let said = b.edit(&r).unwrap_err().to_string();
    assert!(said.contains("at most 8"), "{said}");
}

#[test]
fn a_lora_changes_the_picture_and_is_named_in_its_record() {
    let b = bench();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, key: &str| {
        let normals = |stream, rows: usize, columns: usize| {
            let values = Philox::new(4, stream).normals(rows * columns);
            Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let tensors = BTreeMap::from([
            (format!("{key}.lora_A.weight"), normals(0, 2, 32)),
            (format!("{key}.lora_B.weight"), normals(1, 32, 2)),
        ]);
        let path = folder.path().join(name);
        crate::weights::save_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        path
    };
    let fits = file(
        "style.safetensors",
        "transformer.transformer_blocks.0.attn.to_q",
    );
    let stranger = file(
        "other.safetensors",
        "transformer.transformer_blocks.7.attn.to_q",
    );
    let with = |loras: &[(&Path, f32)]| {
        let engine = Engine::new(b.engine.bundle().clone(), &Device::Cpu);
        let mut loras = loras.iter();
        loras.try_fold(engine, |e, (file, strength)| e.with_lora(file, *strength))
    };
    let r = request("make it red", 1);
    let edit = |engine: &Engine| engine.edit(&b.snapshot, &r, &mut Hooks::default());
    let styled = with(&[(&fits, 0.8)]).unwrap();
    let made = edit(&styled).unwrap();
    assert_ne!(made.images[0], b.one(&r));
    let silent = edit(&with(&[(&fits, 0.0)]).unwrap()).unwrap();
    assert_eq!(silent.images[0], b.one(&r));
    let record = &made.provenance[0];
    let used = &record.loras[0];
    assert_eq!(
        (used.file.as_str(), used.strength),
        ("style.safetensors", 0.8)
    );
    // Made again with it; refused without, and with another strength.
    let replay =
        |engine: &Engine| engine.replay(record, r.source.as_ref(), None, &mut Hooks::default());
    assert_eq!(replay(&styled).unwrap().0, made.images[0]);
    for other in [with(&[]), with(&[(&fits, 0.7)])] {
        let said = replay(&other.unwrap()).unwrap_err().to_string();
        assert!(
            said.contains("LoRA") && said.contains(&used.sha256),
            "{said}"
        );
    }
    // One that fits nothing is an error, not a picture.
    let said = edit(&with(&[(&stranger, 1.0)]).unwrap()).unwrap_err();
    assert!(said.to_string().contains("transformer_blocks.7"), "{said}");
    assert!(with(&[(&fits, f32::NAN)]).is_err());
}

#[test]
fn a_batch_over_users_sources_and_seeds_gives_what_each_gives_alone() {
    let b = bench();
    let mut requests: Vec<EditRequest> = (0..4)
        .map(|i| request(["make it red", "make it blue"][i % 2], i as u64))
        .collect();
    requests[2].source = Some(Source::of(checker(4)));
    requests[3].user = "bob".into();
    requests[3].settings.backend = Some(Backend::Img2img);
    requests[1].settings.count = 2;
    let edits = b
        .engine
        .edit_batch(&b.snapshot, &requests, &mut Hooks::default())
        .unwrap();
    for (request, edit) in requests.iter().zip(&edits) {
        let alone = b.edit(request).unwrap();
        assert_eq!(alone.images.len(), edit.images.len());
        for (x, y) in alone.images.iter().zip(&edit.images) {
            assert!(worst(x, y) <= 1, "{}", worst(x, y));
        }
        assert_eq!(alone.provenance, edit.provenance);
    }
}

#[test]
fn every_backend_edits_and_no_strength_returns_the_source_through_the_autoencoder() {
    let b = bench();
    let mut seen = Vec::new();
    for backend in [
        Backend::Canny,
        Backend::Img2img,
        Backend::RfInversion,
        Backend::Flowedit,
    ] {
        let mut r = request("make it wood", 1);
        r.settings.backend = Some(backend);
        let edit = b.edit(&r).unwrap();
        assert_eq!(edit.provenance[0].settings.backend, Some(backend));
        assert!(!seen.contains(&edit.images[0]), "{backend:?}");
        seen.push(edit.images[0].clone());
    }
    let mut r = request("make it wood", 1);
    r.settings.backend = Some(Backend::Img2img);
    r.settings.strength = Some(0.0);
    let still = b.one(&r);
    r.instructions = vec!["make it blue".into()];
    assert_eq!(still, b.one(&r), "words cannot matter");
    // Nor can guidance, where the words ask for what is there.
    for (guidance, true_cfg) in [(1.0, 1.0), (5.5, 1.0), (3.5, 4.0)] {
        let mut r = request("a mug", 2);
        r.settings.backend = Some(Backend::Flowedit);
        (r.settings.guidance, r.settings.true_cfg) = (Some(guidance), Some(true_cfg));
        assert_eq!(b.one(&r), still);
        r.instructions = vec!["a red mug".into()];
        assert_ne!(b.one(&r), still);
    }
}

#[test]
fn true_guidance_that_ends_early_is_in_the_record_and_older_records_know_no_end() {
    let b = bench();
    let source = request("make it wood", 1).source;
    let edit = |true_cfg_end: Option<f32>| {
        let mut r = request("make it wood", 1);
        r.settings.true_cfg = Some(4.0);
        r.settings.true_cfg_end = true_cfg_end;
        b.edit(&r).unwrap()
    };
    let (early, always) = (edit(Some(0.4)), edit(None));
    assert_ne!(early.images[0], always.images[0]);
    let again = |record: &Provenance| {
        let hooks = &mut Hooks::default();
        let made = b.engine.replay(record, source.as_ref(), None, hooks);
        made.unwrap().0
    };
    assert_eq!(again(&early.provenance[0]), early.images[0]);
    let mut old = early.provenance[0].clone();
    (old.version, old.settings.true_cfg_end) = (3, None);
    assert_eq!(again(&old), always.images[0]);
    let mut wrong = request("make it wood", 1);
    wrong.settings.true_cfg_end = Some(1.5);
    let refused = b.edit(&wrong).unwrap_err().to_string();
    assert!(refused.contains("true guidance's end"), "{refused}");
}

#[test]
fn outside_the_mask_the_source_stays_bit_for_bit() {
    let b = bench();
    let source = checker(1);
    let values = (0..40 * 24)
        .map(|i| if i % 40 >= 20 { 255 } else { 0 })
        .collect();
    let mask = Mask {
        width: 40,
        height: 24,
        values,
    };
    for backend in [
        Backend::Canny,
        Backend::Img2img,
        Backend::RfInversion,
        Backend::Flowedit,
    ] {
        let mut r = request("make it wood", 1);
        r.settings.backend = Some(backend);
        r.mask = Some(MaskInput {
            mask: mask.softened(2),
            sha256: provenance::sha256(b"mask"),
            soften: 2,
        });
        let edit = b.edit(&r).unwrap();
        let out = &edit.images[0];
        for y in 0..24 {
            for x in 0..20 {
                assert_eq!(out.at(x, y), source.at(x, y));
            }
        }
        assert!((24..36).any(|x| out.at(x, 12) != source.at(x, 12)));
        assert_eq!(edit.provenance[0].digital_source_type, COMPOSITE);
        let again = b.engine.replay(
            &edit.provenance[0],
            r.source.as_ref(),
            r.mask.as_ref(),
            &mut Hooks::default(),
        );
        assert_eq!(&again.unwrap().0, out);
    }
}

#[test]
fn cancelling_at_any_step_of_any_backend_ends_the_edit_and_leaves_the_engine_whole() {
    let b = bench();
    for backend in [
        Backend::Canny,
        Backend::Img2img,
        Backend::RfInversion,
        Backend::Flowedit,
    ] {
        let mut r = request("make it red", 1);
        r.settings.backend = Some(backend);
        let mut total = 0;
        let mut progress = |p: crate::edit::Progress| {
            if p.stage == Stage::Sample {
                total = p.total;
            }
        };
        let mut hooks = Hooks {
            progress: Some(&mut progress),
            ..Hooks::default()
        };
        let whole = b.engine.edit(&b.snapshot, &r, &mut hooks).unwrap();
        assert!(total >= 2, "{backend:?}: {total}");
        for stop_at in 0..=total {
            let cancel = AtomicBool::new(false);
            let mut after = 0;
            let mut progress = |p: crate::edit::Progress| {
                let begins = stop_at == 0 && p.stage == Stage::Encode;
                if p.stage == Stage::Sample {
                    after = p.done;
                }
                if begins || (p.stage == Stage::Sample && p.done == stop_at) {
                    cancel.store(true, Ordering::Relaxed);
                }
            };
            let mut hooks = Hooks {
                progress: Some(&mut progress),
                cancel: Some(&cancel),
                ..Hooks::default()
            };
            let ended = b.engine.edit(&b.snapshot, &r, &mut hooks);
            assert!(
                matches!(ended, Err(Error::Cancelled)),
                "{backend:?} {stop_at}"
            );
            assert_eq!(after, stop_at, "{backend:?}");
        }
        assert_eq!(b.edit(&r).unwrap().images, whole.images);
    }
}

#[test]
fn previews_come_as_pictures_and_change_nothing() {
    let b = bench();
    let r = request("make it red", 1);
    let mut seen = Vec::new();
    let mut preview = |step: usize, pictures: &[Picture]| {
        seen.push((step, pictures.len(), pictures[0].width));
    };
    let mut hooks = Hooks {
        preview: Some(&mut preview),
        preview_every: 1,
        ..Hooks::default()
    };
    let edit = b.engine.edit(&b.snapshot, &r, &mut hooks).unwrap();
    assert_eq!(seen, [(1, 1, 32), (2, 1, 32)]);
    assert_eq!(edit.images[0], b.one(&r));
}

#[test]
fn with_little_memory_parts_take_turns_and_with_too_little_the_figures_are_named() {
    let b = bench();
    let r = request("make it red", 1);
    let whole = b.one(&r);
    let need = b.engine.pictures().unwrap().need((32, 32), 1).unwrap();
    let limited = |bytes| {
        let engine = Engine::new(b.engine.bundle().clone(), &Device::Cpu);
        let engine = engine.with_memory_limit(bytes);
        engine.edit(&b.snapshot, &r, &mut Hooks::default())
    };
    let sequential = need.networks + need.sampling;
    assert!(sequential < need.words + need.networks + need.vae + need.sampling);
    let sequential = sequential.max(need.vae + need.decoding).max(need.words);
    assert_eq!(limited(sequential).unwrap().images[0], whole);
    // Where not even the networks fit whole, their blocks are read one by one.
    let streamed = need.streamed + need.sampling;
    let streamed = streamed.max(need.vae + need.decoding).max(need.words);
    assert!(need.streamed < need.networks, "{need:?}");
    let blockwise = need.residency(Some(streamed), "cpu").unwrap();
    if streamed < need.networks + need.sampling {
        assert_eq!(blockwise, pictures::Residency::Streamed);
    }
    assert_eq!(limited(streamed).unwrap().images[0], whole);
    match limited(1_000) {
        Err(Error::NotEnoughMemory {
            need_bytes,
            free_bytes,
            ..
        }) => {
            assert!(need_bytes > 1_000);
            assert_eq!(free_bytes, 1_000);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn flux_at_its_true_size_needs_what_its_shapes_say() {
    let need = pictures::Need {
        words: 10 << 30,
        networks: 30 << 30,
        streamed: 10 << 30,
        vae: 1 << 28,
        sampling: 1 << 30,
        decoding: 3 << 30,
    };
    let way = |free: u64| need.residency(Some(free << 30), "cuda:0");
    assert_eq!(way(48).unwrap(), pictures::Residency::Together);
    assert_eq!(way(32).unwrap(), pictures::Residency::Sequential);
    assert_eq!(way(16).unwrap(), pictures::Residency::Streamed);
    let said = way(8).unwrap_err().to_string();
    assert!(said.contains("cuda:0") && said.contains("--size"), "{said}");
    // 11.9 B parameters: a resident part of 3.3 B (the modulations), blocks of 226 M at most.
    let shapes = names::transformer_shapes(&transformer::Config::dev());
    let (resident, block) = pictures::streamed_bytes(&shapes, candle_core::DType::BF16);
    let (resident, block) = (resident as f64 / 2e9, block as f64 / 2e6);
    assert!((3.0..3.6).contains(&resident), "{resident}");
    assert!((200.0..240.0).contains(&block), "{block}");
}

#[test]
fn requests_that_make_no_sense_are_refused_by_name() {
    let b = bench();
    let change = |change: &dyn Fn(&mut EditRequest)| {
        let mut r = request("make it red", 1);
        change(&mut r);
        let said = b.edit(&r).unwrap_err().to_string();
        // The same before any word is written: this bundle has no policy to write one.
        r.instructions.clear();
        assert_eq!(b.edit(&r).unwrap_err().to_string(), said);
        said
    };
    let said = [
        ("steps", change(&|r| r.settings.steps = Some(0))),
        ("steps", change(&|r| r.settings.steps = Some(1_001))),
        (
            "guidance",
            change(&|r| r.settings.guidance = Some(f32::NAN)),
        ),
        (
            "control scale",
            change(&|r| r.settings.control_scale = Some(3.0)),
        ),
        (
            "strength",
            change(&|r| {
                r.settings.backend = Some(Backend::Img2img);
                r.settings.strength = Some(-0.5);
            }),
        ),
        (
            "size",
            change(&|r| r.settings.size = Some((20_000, 20_000))),
        ),
        (
            "--caption",
            change(&|r| {
                r.settings.backend = Some(Backend::Flowedit);
                r.caption = None;
            }),
        ),
        (
            "source",
            change(&|r| {
                r.settings.backend = Some(Backend::Img2img);
                r.source = None;
            }),
        ),
        ("pictures", change(&|r| r.settings.count = 1_000_000)),
        ("4096", change(&|r| r.caption = Some("x".repeat(5_000)))),
        (
            "expected a mask of 40 x 24",
            change(&|r| {
                let mask = Mask {
                    width: 1,
                    height: 1,
                    values: vec![0],
                };
                r.mask = Some(MaskInput {
                    mask,
                    sha256: String::new(),
                    soften: 0,
                });
            }),
        ),
    ];
    for (word, said) in said {
        assert!(said.contains(word), "{word}: {said}");
    }
}

#[test]
fn a_picture_is_made_from_words_alone() {
    let b = bench();
    let mut r = request("make it red", 1);
    let made = b
        .engine
        .generate(&b.snapshot, &r, &mut Hooks::default())
        .unwrap();
    assert_eq!((made.images[0].width, made.images[0].height), (32, 32));
    assert_eq!(made.provenance[0].source_sha256, None);
    r.settings.size = Some((50, 30));
    let made = b
        .engine
        .generate(&b.snapshot, &r, &mut Hooks::default())
        .unwrap();
    assert_eq!((made.images[0].width, made.images[0].height), (50, 30));
}

#[test]
fn damaged_weights_are_named_and_never_crash() {
    let b = bench();
    let file = b
        .engine
        .bundle()
        .folder
        .join("transformer/model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let with = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let engine = Engine::new(b.engine.bundle().clone(), &Device::Cpu);
        let r = request("make it red", 1);
        engine
            .edit(&b.snapshot, &r, &mut Hooks::default())
            .unwrap_err()
    };
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        assert!(
            matches!(with(&whole[..cut]), Error::BadModel { .. }),
            "{cut}"
        );
    }
    let mut nan = whole.clone();
    let last = nan.len();
    nan[last - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    let said = with(&nan).to_string();
    assert!(
        said.contains("transformer") && said.contains("finite"),
        "{said}"
    );
    std::fs::remove_file(&file).unwrap();
    let engine = Engine::new(b.engine.bundle().clone(), &Device::Cpu);
    let said = engine.edit(
        &b.snapshot,
        &request("make it red", 1),
        &mut Hooks::default(),
    );
    assert!(said.is_err());
}
