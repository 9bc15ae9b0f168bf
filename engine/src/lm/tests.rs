//! What `lm` promises, tested.

use super::*;
use crate::lora::{Adapter, LoraConfig};
use candle_core::Var;
use simpatico_schema::random::Philox;
use std::path::PathBuf;

/// The folder of the tiny checkpoints; its `make_tiny.py` tells how they were made.
pub(crate) fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/lm")
        .join(file)
}

pub(crate) fn tiny(name: &str, precision: Precision) -> Decoder {
    let folder = golden(name);
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = Config::from_json(name, &text).unwrap();
    let weights = Weights::open(&folder).unwrap();
    Decoder::load(&weights, &config, precision, &Device::Cpu).unwrap()
}

fn expected(name: &str) -> Tensor {
    let all = Weights::open(&golden("expected.safetensors")).unwrap();
    all.get_any(name, DType::F32, &Device::Cpu).unwrap()
}

fn ids() -> Vec<u32> {
    let ids = expected("ids").flatten_all().unwrap();
    ids.to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(|i| i as u32)
        .collect()
}

fn largest_gap(a: &Tensor, b: &Tensor) -> f32 {
    let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    gap.to_scalar().unwrap()
}

fn logits(model: &Decoder, adapter: Option<&Adapter>) -> Tensor {
    let x = model.embed(&[&ids()]).unwrap();
    let h = model
        .hidden(&x, &Placement::Causal, adapter, None, None)
        .unwrap();
    model.logits(&h).unwrap().squeeze(0).unwrap()
}

#[test]
fn half_precision_has_no_plain_form_and_says_so_without_an_error() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::BF16));
        assert!(model.plain().unwrap().is_none(), "{name}");
        let model = tiny(name, Precision::Dense(DType::F32));
        assert!(model.plain().unwrap().is_some(), "{name}");
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::F32));
        let gap = largest_gap(&logits(&model, None), &expected(name));
        assert!(gap < 1e-4, "{name}: {gap}");
    }
}

#[test]
fn an_adapter_gives_the_logits_of_peft_merged_or_not_and_unmerging_is_exact() {
    let mut model = tiny("qwen2", Precision::Dense(DType::F32));
    let adapter = Adapter::load(&golden("sft_adapter"), &model.config, &Device::Cpu).unwrap();
    let plain = logits(&model, None);
    let gap = largest_gap(
        &logits(&model, Some(&adapter)),
        &expected("qwen2.sft_adapter"),
    );
    assert!(gap < 1e-4, "{gap}");
    model.merge(&adapter).unwrap();
    let gap = largest_gap(&logits(&model, None), &expected("qwen2.merged"));
    assert!(gap < 1e-4, "{gap}");
    model.unmerge();
    assert_eq!(largest_gap(&logits(&model, None), &plain), 0.0);
}

#[test]
fn joined_matrices_are_the_same_matrices() {
    for name in ["qwen2", "llama"] {
        let mut model = tiny(name, Precision::Dense(DType::F32));
        let plain = logits(&model, None);
        model.join().unwrap();
        assert_eq!(largest_gap(&logits(&model, None), &plain), 0.0);
        let x = Tensor::from_vec(
            Philox::new(1, 0).normals(model.config.hidden),
            (1, 1, model.config.hidden),
            &Device::Cpu,
        );
        let x = x.unwrap();
        let layer = &model.layers[1];
        let [qkv, gate_up] = layer.joined.as_ref().unwrap();
        for (together, modules) in [(qkv, &[0, 1, 2][..]), (gate_up, &[4, 5])] {
            let run = model
                .run(&Placement::Causal, (1, 1), 0, None, None)
                .unwrap();
            let apart: Vec<Tensor> = modules
                .iter()
                .map(|m| layer.projections[*m].forward(&x, 1, *m, &run).unwrap())
                .collect();
            let gap = largest_gap(
                &together.forward(&x).unwrap(),
                &Tensor::cat(&apart, 2).unwrap(),
            );
            assert!(gap < 1e-6, "{name}: {gap}");
        }
        // Merging takes them apart: one of them alone may change.
        if name == "qwen2" {
            let adapter = Adapter::load(&golden("sft_adapter"), &model.config, &Device::Cpu);
            model.merge(&adapter.unwrap()).unwrap();
            assert!(model.layers.iter().all(|layer| layer.joined.is_none()));
            model.unmerge();
            assert_eq!(largest_gap(&logits(&model, None), &plain), 0.0);
        }
    }
    // Where only one of them has a bias they stay apart.
    let mut uneven = tiny("llama", Precision::Dense(DType::F32));
    uneven.layers[0].projections[1].bias =
        Some(Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap());
    uneven.join().unwrap();
    assert!(uneven.layers[0].joined.is_none() && uneven.layers[1].joined.is_some());
}

#[test]
fn tokens_one_by_one_through_the_cache_equal_all_at_once() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::F32));
        let whole = logits(&model, None);
        let mut cache = Cache::new(&model.config, 20);
        let mut rows = Vec::new();
        for chunk in ids().chunks(3) {
            let x = model.embed(&[chunk]).unwrap();
            let h = model
                .hidden(&x, &Placement::Causal, None, None, Some(&mut cache))
                .unwrap();
            rows.push(model.logits(&h).unwrap().squeeze(0).unwrap());
        }
        let gap = largest_gap(&Tensor::cat(&rows, 0).unwrap(), &whole);
        assert!(gap < 1e-5, "{name}: {gap}");
        let x = model.embed(&[&[1]]).unwrap();
        let full = model.hidden(&x, &Placement::Causal, None, None, Some(&mut cache));
        assert!(full.unwrap_err().to_string().contains("room for 20"));
    }
}

#[test]
fn a_row_padded_in_front_equals_the_row_alone_and_transformers() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::F32));
        let ids = ids();
        let padded = [[0; 6].as_slice(), &ids[..14]].concat();
        let x = model.embed(&[&ids, &padded]).unwrap();
        let placement = Placement::LeftPadded(vec![0, 6]);
        let h = model.hidden(&x, &placement, None, None, None).unwrap();
        let row = |i: usize, from: usize| {
            let h = h.get(i).unwrap().narrow(0, from, 20 - from).unwrap();
            model.logits(&h).unwrap()
        };
        assert!(largest_gap(&row(0, 0), &logits(&model, None)) < 1e-5);
        let gap = largest_gap(&row(1, 6), &expected(&format!("{name}.padded")));
        assert!(gap < 1e-4, "{name}: {gap}");
    }
}

#[test]
fn a_shared_prompt_with_a_mask_of_its_own_equals_two_rows() {
    let model = tiny("qwen2", Precision::Dense(DType::F32));
    let (prompt, one, two) = ([3u32, 4, 5], [6u32, 7], [8u32, 9]);
    // One row: prompt, first answer, second answer; the answers do not see each other.
    let row = [&prompt[..], &one, &two].concat();
    let mask: Vec<f32> = (0..7usize)
        .flat_map(|q| {
            (0..7usize).map(move |k| {
                let other = q >= 5 && (3..5).contains(&k);
                if k > q || other { -1e30 } else { 0.0 }
            })
        })
        .collect();
    let placement = Placement::Custom {
        positions: vec![vec![0, 1, 2, 3, 4, 3, 4]],
        mask: Tensor::from_vec(mask, (1, 1, 7, 7), &Device::Cpu).unwrap(),
    };
    let run = |ids: &[u32], placement: &Placement| {
        let x = model.embed(&[ids]).unwrap();
        let h = model.hidden(&x, placement, None, None, None).unwrap();
        h.squeeze(0).unwrap()
    };
    let shared = run(&row, &placement).narrow(0, 5, 2).unwrap();
    let alone = run(&[&prompt[..], &two].concat(), &Placement::Causal);
    assert!(largest_gap(&shared, &alone.narrow(0, 3, 2).unwrap()) < 1e-5);
}

#[test]
fn every_trainable_tensor_and_the_soft_prompt_get_a_gradient() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::F32));
        let adapter = Adapter::fresh(LoraConfig::paper(), &model.config, 1, &Device::Cpu).unwrap();
        // With B zero, A's gradient is rightly zero: move B first.
        for (key, var) in adapter.vars() {
            if key.contains("lora_B") {
                let b = Philox::new(2, 0).normals(var.elem_count());
                let b = Tensor::from_vec(b, var.shape(), &Device::Cpu).unwrap();
                var.set(&(b * 0.1).unwrap()).unwrap();
            }
        }
        let soft = Philox::new(3, 0).normals(8 * 32);
        let soft = Var::from_tensor(&Tensor::from_vec(soft, (1, 8, 32), &Device::Cpu).unwrap());
        let soft = soft.unwrap();
        let x = Tensor::cat(&[soft.as_tensor(), &model.embed(&[&ids()]).unwrap()], 1).unwrap();
        let dropout = Dropout {
            p: 0.1,
            seed: 0,
            step: 3,
        };
        let h = model
            .hidden(&x, &Placement::Causal, Some(&adapter), Some(dropout), None)
            .unwrap();
        let weights = Tensor::from_vec(Philox::new(4, 0).normals(64), 64, &Device::Cpu).unwrap();
        let loss = model.logits(&h).unwrap().broadcast_mul(&weights).unwrap();
        let grads = loss.sum_all().unwrap().backward().unwrap();
        assert_eq!(adapter.vars().len(), 2 * 2 * 7);
        let all = adapter.vars().iter().map(|(k, v)| (k.as_str(), v));
        for (key, var) in all.chain([("soft prompt", &soft)]) {
            let g = grads
                .get(var)
                .unwrap_or_else(|| panic!("{name}: {key} got no gradient"));
            let size = g
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            assert!(size > 0.0 && size.is_finite(), "{name}: {key}: {size}");
        }
    }
}

#[test]
fn a_layer_as_one_node_has_the_gradients_of_its_operations() {
    for name in ["qwen2", "llama"] {
        let model = tiny(name, Precision::Dense(DType::F32));
        let adapter = Adapter::fresh(LoraConfig::paper(), &model.config, 1, &Device::Cpu).unwrap();
        for (i, var) in adapter.vars().values().enumerate() {
            let values = Philox::new(2, i as u64).normals(var.elem_count());
            let values = Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap();
            var.set(&(values * 0.2).unwrap()).unwrap();
        }
        // Who learns the norms too gets operations.
        let mut operations = model.clone();
        for layer in &mut operations.layers {
            let norm = Var::from_tensor(&layer.attention_norm).unwrap();
            layer.attention_norm = norm.as_tensor().clone();
        }
        let (b, t) = (2, 20);
        let x = Philox::new(3, 0).normals(b * t * 32);
        let x = Var::from_tensor(&Tensor::from_vec(x, (b, t, 32), &Device::Cpu).unwrap()).unwrap();
        // The second half of each row sees the first quarter and itself.
        let hidden = |i: usize, j: usize| j > i || (i >= t / 2 && (t / 4..t / 2).contains(&j));
        let mask = (0..b * t * t).map(|at| match hidden(at / t % t, at % t) {
            true => -1e30f32,
            false => 0.0,
        });
        let mask = Tensor::from_vec(mask.collect::<Vec<_>>(), (b, 1, t, t), &Device::Cpu).unwrap();
        let positions = vec![(0..t as u32).map(|i| i % 15).collect(); b];
        let placement = Placement::Custom { positions, mask };
        let weights = Tensor::from_vec(Philox::new(4, 0).normals(64), 64, &Device::Cpu).unwrap();
        for p in [0.0, 0.2] {
            let (seed, step) = (7, 1);
            let dropout = Some(Dropout { p, seed, step });
            let pass = |decoder: &Decoder| {
                let h = decoder.hidden(&x, &placement, Some(&adapter), dropout, None);
                let logits = decoder.logits(&h.unwrap()).unwrap();
                let loss = logits.tanh().unwrap().broadcast_mul(&weights).unwrap();
                (logits, loss.sum_all().unwrap().backward().unwrap())
            };
            let ((ours, to), (theirs, wanted)) = (pass(&model), pass(&operations));
            let near = |a: &Tensor, b: &Tensor, key: &str| {
                let most = b.abs().unwrap().max_all().unwrap();
                let most = most.to_scalar::<f32>().unwrap();
                assert!(
                    most > 0.0 && largest_gap(a, b) <= 2e-5 * most,
                    "{name}: {key}"
                );
            };
            near(&ours, &theirs, "logits");
            let all = adapter.vars().iter().map(|(k, v)| (k.as_str(), v));
            for (key, var) in all.chain([("input", &x)]) {
                near(to.get(var).unwrap(), wanted.get(var).unwrap(), key);
            }
        }
    }
}

#[test]
fn recomputing_layer_by_layer_gives_the_gradients_of_the_whole() {
    let model = tiny("qwen2", Precision::Dense(DType::F32));
    let adapter = Adapter::load(&golden("sft_adapter"), &model.config, &Device::Cpu)
        .unwrap()
        .trainable()
        .unwrap();
    let dropout = Some(Dropout {
        p: 0.2,
        seed: 7,
        step: 1,
    });
    let x = model.embed(&[&ids()]).unwrap();
    let loss = |h: &Tensor| model.logits(h).unwrap().sqr().unwrap().sum_all().unwrap();
    let h = model
        .hidden(&x, &Placement::Causal, Some(&adapter), dropout, None)
        .unwrap();
    let whole = loss(&h).backward().unwrap();

    let run = model
        .run(&Placement::Causal, (1, 20), 0, Some(&adapter), dropout)
        .unwrap();
    let first = model.layer(0, &x, &run, None).unwrap().detach();
    let boundary = Var::from_tensor(&first).unwrap();
    let last = model.layer(1, boundary.as_tensor(), &run, None).unwrap();
    let top = loss(&model.finish(&last).unwrap()).backward().unwrap();
    let cotangent = top.get(&boundary).unwrap();
    let below = model.layer(0, &x, &run, None).unwrap();
    let below = (below * cotangent)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    for (key, var) in adapter.vars() {
        let part = if key.contains("layers.1.") {
            &top
        } else {
            &below
        };
        let (a, b) = (whole.get(var).unwrap(), part.get(var).unwrap());
        let scale = a
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(largest_gap(a, b) <= 1e-5 * scale, "{key}");
    }
}

#[test]
fn an_embedding_id_outside_the_vocabulary_is_an_error() {
    let model = tiny("llama", Precision::Dense(DType::F32));
    let error = model.embed(&[&[64]]).unwrap_err().to_string();
    assert!(error.contains("64 entries"), "{error}");
    assert!(model.embed(&[]).is_err() && model.embed(&[&[]]).is_err());
    let long = vec![1; 200];
    let x = model.embed(&[&long]).unwrap();
    let error = model
        .hidden(&x, &Placement::Causal, None, None, None)
        .unwrap_err();
    assert!(error.to_string().contains("shorten the prompt"), "{error}");
}

#[test]
fn old_and_new_spellings_of_the_config_mean_the_same() {
    let text = std::fs::read_to_string(golden("qwen2/config.json")).unwrap();
    let new = Config::from_json("new", &text).unwrap();
    assert_eq!(new.rope_theta, 1_000_000.0);
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let map = json.as_object_mut().unwrap();
    for key in ["rope_parameters", "layer_types", "dtype"] {
        map.remove(key);
    }
    map.insert("rope_theta".into(), 1_000_000.0.into());
    map.insert("torch_dtype".into(), "float32".into());
    assert_eq!(Config::from_json("old", &json.to_string()).unwrap(), new);
}

#[test]
fn absurd_configs_are_refused() {
    let text = std::fs::read_to_string(golden("qwen2/config.json")).unwrap();
    for (from, to) in [
        ("\"hidden_size\": 32", "\"hidden_size\": 4294967296"),
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": 0"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 9999999"),
        ("\"qwen2\"", "\"gpt_bigcode\""),
        ("\"vocab_size\": 64", "\"vocab_size\": -1"),
        ("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\""),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        assert!(Config::from_json("absurd", &changed).is_err(), "{to}");
    }
    // A config that promises another shape than the file has.
    let changed = text.replace("\"intermediate_size\": 64", "\"intermediate_size\": 65");
    let config = Config::from_json("other", &changed).unwrap();
    let weights = Weights::open(&golden("qwen2")).unwrap();
    let precision = Precision::Dense(DType::F32);
    let error = Decoder::load(&weights, &config, precision, &Device::Cpu).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("expected shape [65, 32], got [64, 32]"),
        "{error}"
    );
}

#[test]
fn llama_rows_from_llama_cpp_are_put_back_in_order() {
    // Two heads of width 4: llama.cpp stores 0 2 1 3 of each.
    let stored = [0u8, 2, 1, 3, 4, 6, 5, 7];
    assert_eq!(unpermuted(&stored, 8, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
}
