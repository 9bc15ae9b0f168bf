//! What `lora` promises, tested.

use super::*;
use std::path::PathBuf;

fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/lm")
        .join(file)
}

fn model() -> Config {
    let text = std::fs::read_to_string(golden("qwen2/config.json")).unwrap();
    Config::from_json("qwen2", &text).unwrap()
}

#[test]
fn a_loaded_adapter_is_saved_to_the_same_bytes() {
    for name in ["adapter", "sft_adapter"] {
        let adapter = Adapter::load(&golden(name), &model(), &Device::Cpu).unwrap();
        let to = std::env::temp_dir().join(format!("simpatico-{name}-{}", std::process::id()));
        adapter.save(&to, None).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            let (a, b) = (
                std::fs::read(golden(name).join(file)).unwrap(),
                std::fs::read(to.join(file)).unwrap(),
            );
            assert!(a == b, "{name}/{file} changed");
        }
        std::fs::remove_dir_all(to).unwrap();
    }
}

#[test]
fn a_fresh_adapter_is_what_peft_would_make_and_is_loaded_again() {
    let adapter = Adapter::fresh(LoraConfig::paper(), &model(), 3, &Device::Cpu).unwrap();
    let to = std::env::temp_dir().join(format!("simpatico-fresh-{}", std::process::id()));
    adapter.save(&to, None).unwrap();
    let again = Adapter::load(&to, &model(), &Device::Cpu).unwrap();
    std::fs::remove_dir_all(to).unwrap();
    let (before, after) = (adapter.tensors(), again.tensors());
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    for (key, t) in &before {
        let (a, b) = (t.flatten_all().unwrap(), after[key].flatten_all().unwrap());
        let (a, b) = (a.to_vec1::<f32>().unwrap(), b.to_vec1::<f32>().unwrap());
        assert_eq!(a, b);
        let bound = 1.0 / (t.dims()[1] as f32).sqrt();
        match key.contains("lora_B") {
            true => assert!(b.iter().all(|x| *x == 0.0)),
            false => assert!(b.iter().all(|x| x.abs() <= bound) && b.iter().any(|x| *x > 0.0)),
        }
    }
}

#[test]
fn a_key_without_a_partner_is_an_error_on_either_side() {
    let adapter = Adapter::load(&golden("sft_adapter"), &model(), &Device::Cpu).unwrap();
    let weights = |tensors: &BTreeMap<String, Tensor>| {
        let bytes = weights::to_safetensors(tensors, &BTreeMap::new()).unwrap();
        Weights::from_bytes("changed", bytes).unwrap()
    };
    let load = |tensors: &BTreeMap<String, Tensor>| {
        let config = adapter.config.clone();
        Adapter::from_weights(config, &weights(tensors), &model(), &Device::Cpu)
            .map_err(|e| e.to_string())
    };
    let mut tensors = adapter.tensors();
    assert!(load(&tensors).is_ok());
    let key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    let b = tensors.remove(key).unwrap();
    assert!(load(&tensors).unwrap_err().contains(key));
    tensors.insert(key.replace("layers.1", "layers.2"), b.clone());
    tensors.insert(key.into(), b.clone());
    assert!(
        load(&tensors)
            .unwrap_err()
            .contains("belong to no targeted module")
    );
    tensors.remove(&key.replace("layers.1", "layers.2"));
    tensors.insert(key.into(), b.t().unwrap());
    assert!(load(&tensors).unwrap_err().contains("expected shape"));
}

#[test]
fn targets_by_name_suffix_and_expression() {
    let count = |targets| {
        let config = LoraConfig {
            targets,
            ..LoraConfig::new(2, 4.0)
        };
        Adapter::fresh(config, &model(), 0, &Device::Cpu)
            .map(|a| a.vars().len() / 2)
            .map_err(|e| e.to_string())
    };
    let names = |n: &[&str]| Targets::Names(n.iter().map(|s| s.to_string()).collect());
    assert_eq!(count(Targets::AllLinear), Ok(14));
    assert_eq!(count(names(&["q_proj", "v_proj"])), Ok(4));
    assert_eq!(count(names(&["model.layers.0.mlp.up_proj"])), Ok(1));
    assert_eq!(
        count(Targets::Regex(r".*\.layers\.1\..*_proj".into())),
        Ok(7)
    );
    assert!(
        count(Targets::Regex(r"q_proj".into()))
            .unwrap_err()
            .contains("no module")
    );
    assert!(
        count(names(&["q_proj", "w_proj"]))
            .unwrap_err()
            .contains("w_proj")
    );
    assert!(count(names(&["_proj"])).unwrap_err().contains("_proj"));
    assert!(count(Targets::Regex("(".into())).is_err());
}

#[test]
fn ranks_and_alphas_by_pattern_and_rslora() {
    let mut config = LoraConfig::new(4, 8.0);
    config.rank_pattern.insert("q_proj".into(), 2);
    config.alpha_pattern.insert(r"layers\.1\..*".into(), 16.0);
    config.rslora = true;
    let adapter = Adapter::fresh(config, &model(), 0, &Device::Cpu).unwrap();
    let pair = |l, m| adapter.pair(l, m).unwrap();
    assert_eq!(pair(0, 0).a.dims(), [2, 32]);
    assert_eq!(pair(0, 1).a.dims(), [4, 32]);
    assert_eq!(pair(0, 1).scale, 8.0 / 2.0);
    assert_eq!(pair(1, 1).scale, 16.0 / 2.0);
    assert_eq!(pair(1, 0).scale, 16.0 / 2f64.sqrt());
}

#[test]
fn options_that_we_do_not_have_are_refused_by_name() {
    let text = std::fs::read_to_string(golden("adapter/adapter_config.json")).unwrap();
    for (from, to, named) in [
        ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        (
            "\"modules_to_save\": null",
            "\"modules_to_save\": [\"lm_head\"]",
            "modules_to_save",
        ),
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("\"r\": 16", "\"r\": 0", "rank 0"),
        ("\"r\": 16", "\"r\": 4294967296", "rank 4294967296"),
        (
            "\"lora_dropout\": 0.05",
            "\"lora_dropout\": 1.5",
            "lora_dropout",
        ),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        let error = LoraConfig::from_json("a", &changed)
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{error}");
    }
    assert!(LoraConfig::from_json("a", &text[..text.len() / 2]).is_err());
}

#[test]
fn a_trainable_copy_leaves_the_original_alone() {
    let original = Adapter::load(&golden("sft_adapter"), &model(), &Device::Cpu).unwrap();
    let before = original.tensors();
    let copy = original.trainable().unwrap();
    assert_eq!(copy.vars().len(), before.len());
    for var in copy.vars().values() {
        var.set(&var.zeros_like().unwrap()).unwrap();
    }
    let sum = |t: &Tensor| {
        t.abs()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
    };
    assert!(original.tensors().values().all(|t| sum(t) > 0.0));
    assert!(copy.tensors().values().all(|t| sum(t) == 0.0));
}
