//! The networks against diffusers, with small random weights. The files and the scripts that
//! made them are in tests/golden/flux.

use super::controlnet::{self, Control, ControlNet};
use super::names::{self, Kind, Layout, Naming};
use super::transformer::{
    self, Cache, FluxTransformer, Inputs, Residuals, Rope, Spread, image_ids, text_ids,
};
use super::vae::{self, Vae};
use super::{init, lora, t5, text};
use crate::weights::Weights;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use simpatico_schema::random::Philox;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

pub(crate) fn golden(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden/flux")
        .join(file)
}

/// One file of golden tensors.
pub(crate) struct Golden(Weights);

impl Golden {
    pub(crate) fn open(file: &str) -> Self {
        Self(Weights::open(&golden(file)).unwrap())
    }

    pub(crate) fn get(&self, name: &str) -> Tensor {
        self.0.get_any(name, DType::F32, &Device::Cpu).unwrap()
    }

    pub(crate) fn maybe(&self, name: &str) -> Option<Tensor> {
        self.0.contains(name).then(|| self.get(name))
    }

    /// The tensors `prefix.0`, `prefix.1`, …
    fn list(&self, prefix: &str) -> Vec<Tensor> {
        (0..)
            .map_while(|i| self.maybe(&format!("{prefix}.{i}")))
            .collect()
    }

    /// All tensors under `prefix/`, by the rest of their names.
    pub(crate) fn all(&self, prefix: &str) -> HashMap<String, Tensor> {
        let prefix = format!("{prefix}/");
        self.0
            .names()
            .filter_map(|n| Some((n.strip_prefix(&prefix)?.to_string(), self.get(n))))
            .collect()
    }
}

pub(crate) fn config<T: serde::de::DeserializeOwned>(file: &str, case: &str) -> T {
    let text = std::fs::read_to_string(golden(file)).unwrap();
    let mut all: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    serde_json::from_value(all.remove(case).unwrap()).unwrap()
}

pub(crate) fn builder(
    weights: HashMap<String, Tensor>,
    dtype: DType,
    levels: usize,
) -> VarBuilder<'static> {
    let list: Vec<&str> = weights.keys().map(String::as_str).collect();
    let layout = names::detect(&list).unwrap();
    let vb = VarBuilder::from_tensors(weights, dtype, &Device::Cpu);
    names::renamed(vb, layout, levels)
}

/// Our weights under BFL's names, as one of their files would hold them.
fn as_bfl(ours: &[names::NameAndShape], vb: &VarBuilder) -> HashMap<String, Tensor> {
    ours.iter()
        .map(|(name, shape)| (name.clone(), vb.get(shape.as_slice(), name).unwrap()))
        .collect()
}

pub(crate) fn gap(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let a = a.to_dtype(DType::F32).unwrap();
    let worst = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    worst.to_scalar().unwrap()
}

/// The root mean square of a difference as a share of the truth's.
fn relative(ours: &Tensor, truth: &Tensor) -> f32 {
    let size = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>();
    let off = (ours.to_dtype(DType::F32).unwrap() - truth).unwrap();
    (size(&off).unwrap() / size(truth).unwrap()).sqrt()
}

fn largest(a: &Tensor) -> f32 {
    a.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// The inputs of a case, whose pictures are `rows` × `columns` tokens.
struct Case {
    latents: Tensor,
    ids: Tensor,
    text: Tensor,
    text_ids: Tensor,
    pooled: Tensor,
    timestep: Tensor,
    guidance: Option<Tensor>,
}

impl Case {
    fn new(g: &Golden, case: &str, rows: usize, columns: usize) -> Self {
        let text = g.get(&format!("{case}/text"));
        Self {
            latents: g.get(&format!("{case}/latents")),
            ids: image_ids(rows, columns, &Device::Cpu).unwrap(),
            text_ids: text_ids(text.dim(1).unwrap(), &Device::Cpu).unwrap(),
            text,
            pooled: g.get(&format!("{case}/pooled")),
            timestep: g.get(&format!("{case}/timestep")),
            guidance: g.maybe(&format!("{case}/guidance")),
        }
    }

    fn inputs<'a>(&'a self, residuals: Option<&'a Residuals>) -> Inputs<'a> {
        Inputs {
            latents: &self.latents,
            ids: &self.ids,
            text: &self.text,
            text_ids: &self.text_ids,
            pooled: &self.pooled,
            timestep: &self.timestep,
            guidance: self.guidance.as_ref(),
            residuals,
        }
    }
}

#[test]
fn the_transformer_equals_diffusers_under_both_namings_and_in_half_precision() {
    let g = Golden::open("networks.safetensors");
    for case in ["transformer", "schnell"] {
        let config: transformer::Config = config("networks.json", case);
        let x = Case::new(&g, case, 3, 5);
        let expected = g.get(&format!("{case}/velocity"));
        let from_diffusers = builder(g.all(&format!("{case}/weights")), DType::F32, 0);
        let flux = FluxTransformer::new(&config, from_diffusers.clone()).unwrap();
        let worst = gap(&flux.forward(&x.inputs(None)).unwrap(), &expected);
        assert!(worst < 1e-4, "{case}, diffusers' names: {worst}");

        let weights = as_bfl(&names::transformer_shapes(&config), &from_diffusers);
        let prefixed = weights
            .iter()
            .map(|(k, v)| (format!("model.diffusion_model.{k}"), v.clone()))
            .collect();
        let flux = FluxTransformer::new(&config, builder(prefixed, DType::F32, 0)).unwrap();
        let worst = gap(&flux.forward(&x.inputs(None)).unwrap(), &expected);
        assert!(worst < 1e-4, "{case}, BFL's names: {worst}");

        let streamed =
            FluxTransformer::streamed(&config, builder(weights.clone(), DType::F32, 0)).unwrap();
        let again = streamed.forward(&x.inputs(None)).unwrap();
        assert_eq!(gap(&again, &flux.forward(&x.inputs(None)).unwrap()), 0.0);

        for half in [DType::BF16, DType::F16] {
            let vb = builder(weights.clone(), half, 0);
            let flux = FluxTransformer::new(&config, vb).unwrap();
            let worst = gap(&flux.forward(&x.inputs(None)).unwrap(), &expected);
            let relative = worst / largest(&expected);
            assert!(relative < 2e-2, "{case}, {half:?}: {relative}");
        }
    }
}

#[test]
fn residuals_are_spread_over_the_blocks_as_in_diffusers() {
    let g = Golden::open("networks.safetensors");
    for case in [
        "spread_19_5",
        "spread_38_10",
        "spread_3_1",
        "spread_6_2",
        "spread_6_0",
        "spread_xlabs",
    ] {
        let config: transformer::Config = config("networks.json", case);
        let mut weights = HashMap::new();
        for (name, tensor) in g.all(&format!("{case}/weights")) {
            for (stem, n) in [
                ("transformer_blocks.", config.num_layers),
                ("single_transformer_blocks.", config.num_single_layers),
            ] {
                // All blocks are alike and stored once.
                if let Some(rest) = name.strip_prefix(&format!("{stem}0.")) {
                    for i in 1..n {
                        weights.insert(format!("{stem}{i}.{rest}"), tensor.clone());
                    }
                }
            }
            weights.insert(name, tensor);
        }
        let flux = FluxTransformer::new(&config, builder(weights, DType::F32, 0)).unwrap();
        let residuals = Residuals {
            double: g.list(&format!("{case}/double")),
            single: g.list(&format!("{case}/single")),
            spread: match case {
                "spread_xlabs" => Spread::Repeat,
                _ => Spread::Interval,
            },
        };
        let x = Case::new(&g, case, 2, 2);
        let velocity = flux.forward(&x.inputs(Some(&residuals))).unwrap();
        let worst = gap(&velocity, &g.get(&format!("{case}/velocity")));
        assert!(worst < 1e-4, "{case}: {worst}");
    }
    // The true sizes, as the reference counts them.
    let doubles: Vec<_> = (0..19)
        .map(|i| Residuals::index(Spread::Interval, i, 19, 5).unwrap())
        .collect();
    assert_eq!(
        doubles,
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    );
    assert_eq!(Residuals::index(Spread::Interval, 37, 38, 10), Some(9));
    assert_eq!(Residuals::index(Spread::Interval, 3, 6, 0), None);
}

#[test]
fn controlnets_of_all_three_layouts_equal_diffusers() {
    let g = Golden::open("networks.safetensors");
    let flux: transformer::Config = config("networks.json", "transformer");
    let weights = builder(g.all("transformer/weights"), DType::F32, 0);
    let flux = FluxTransformer::new(&flux, weights).unwrap();
    for case in ["union", "pro2", "xlabs"] {
        let config: controlnet::Config = config("networks.json", case);
        let vb = builder(g.all(&format!("{case}/weights")), DType::F32, 0);
        let mut layouts = vec![vb.clone()];
        let ours = names::controlnet_shapes(&config);
        let bfl = as_bfl(&ours, &vb);
        if case == "xlabs" {
            // As XLabs' own file has it.
            let spelled = bfl.iter().map(|(name, t)| {
                let recipe = names::recipe(Kind::ControlNet, Naming::Xlabs, 0, name);
                (recipe.parts[0].clone(), t.clone())
            });
            layouts.push(builder(spelled.collect(), DType::F32, 0));
        }
        layouts.push(builder(bfl, DType::F32, 0));
        for vb in layouts {
            let net = ControlNet::new(&config, vb).unwrap();
            let x = Case::new(&g, case, 3, 5);
            let condition = g.get(&format!("{case}/condition"));
            let control = Control {
                condition: &condition,
                modes: (case == "union").then_some(&[0, 3]),
                scale: 0.7,
            };
            let out = net.forward(&x.inputs(None), &control).unwrap();
            let (double, single) = (
                g.list(&format!("{case}/double")),
                g.list(&format!("{case}/single")),
            );
            assert_eq!(
                (out.double.len(), out.single.len()),
                (double.len(), single.len())
            );
            for (a, b) in out
                .double
                .iter()
                .chain(&out.single)
                .zip(double.iter().chain(&single))
            {
                assert!(gap(a, b) < 1e-4, "{case}: {}", gap(a, b));
            }
            let velocity = flux.forward(&x.inputs(Some(&out))).unwrap();
            let worst = gap(&velocity, &g.get(&format!("{case}/velocity")));
            assert!(worst < 1e-4, "{case}: {worst}");
        }
        // XLabs' convolutions have no half precision on the CPU.
        for half in [DType::BF16, DType::F16] {
            if case == "xlabs" {
                continue;
            }
            let vb = builder(g.all(&format!("{case}/weights")), half, 0);
            let net = ControlNet::new(&config, vb).unwrap();
            let x = Case::new(&g, case, 3, 5);
            let condition = g.get(&format!("{case}/condition"));
            let control = Control {
                condition: &condition,
                modes: (case == "union").then_some(&[0, 3]),
                scale: 0.7,
            };
            let out = net.forward(&x.inputs(None), &control).unwrap();
            for (kind, ours) in [("double", out.double), ("single", out.single)] {
                let theirs = g.list(&format!("{case}/{kind}"));
                for (a, b) in ours.iter().zip(&theirs) {
                    let relative = gap(a, b) / largest(b);
                    assert!(relative < 2e-2, "{case}, {half:?}: {relative}");
                }
            }
        }
    }
}

#[test]
fn the_autoencoder_equals_diffusers_under_both_namings() {
    let g = Golden::open("networks.safetensors");
    for case in ["vae_f8", "vae_f4"] {
        let config: vae::Config = config("networks.json", case);
        let levels = config.block_out_channels.len();
        let vb = builder(g.all(&format!("{case}/weights")), DType::F32, levels);
        let bfl = as_bfl(&names::vae_shapes(&config), &vb);
        for vb in [vb, builder(bfl, DType::F32, levels)] {
            let vae = Vae::new(&config, vb).unwrap();
            let picture = g.get(&format!("{case}/picture"));
            let (mean, log_variance) = vae.posterior(&picture).unwrap();
            assert!(gap(&mean, &g.get(&format!("{case}/mean"))) < 1e-4, "{case}");
            let worst = gap(&log_variance, &g.get(&format!("{case}/log_variance")));
            assert!(worst < 1e-4, "{case}: {worst}");
            let decoded = vae.decode(&vae.encode(&picture).unwrap()).unwrap();
            let worst = gap(&decoded, &g.get(&format!("{case}/decoded")));
            assert!(worst < 1e-4, "{case}: {worst}");
        }
        // In half precision it only trains: an edit encodes and decodes in f32 everywhere.
        let vb = |dtype| builder(g.all(&format!("{case}/weights")), dtype, levels);
        let vae = Vae::new(&config, vb(DType::BF16)).unwrap();
        let picture = g.get(&format!("{case}/picture"));
        let latents = Vae::new(&config, vb(DType::F32)).and_then(|v| v.encode(&picture));
        let half = |x: &Tensor| x.to_dtype(DType::BF16).unwrap();
        // diffusers' own, so small and random a decoder, loses 0.029.
        for (name, ours, limit) in [
            ("mean", vae.posterior(&half(&picture)).unwrap().0, 2e-2),
            (
                "decoded",
                vae.decode(&half(&latents.unwrap())).unwrap(),
                2e-2,
            ),
        ] {
            let worst = relative(&ours, &g.get(&format!("{case}/{name}")));
            assert!(worst < limit, "{case}, {name} in bf16: {worst}");
        }
    }
}

#[test]
fn tiles_cover_the_picture_and_one_tile_is_the_whole() {
    let g = Golden::open("networks.safetensors");
    let config: vae::Config = config("networks.json", "vae_f4");
    let vb = builder(g.all("vae_f4/weights"), DType::F32, 3);
    let vae = Vae::new(&config, vb).unwrap();
    let flat = Tensor::full(0.3f32, (1, 3, 96, 160), &Device::Cpu).unwrap();
    let whole = vae.encode(&flat).unwrap();
    let tiles = vae.clone().with_tile(64).encode(&flat).unwrap();
    assert_eq!(whole.dims(), tiles.dims());
    let decoded = vae.clone().with_tile(64).decode(&whole).unwrap();
    assert_eq!(decoded.dims(), [1, 3, 96, 160]);
    // One tile over all is the whole.
    let one = vae.with_tile(160).encode(&flat).unwrap();
    assert_eq!(gap(&one, &whole), 0.0);
}

#[test]
fn a_cache_skips_when_nothing_changes_and_sees_the_control_change() {
    let g = Golden::open("networks.safetensors");
    let config: transformer::Config = config("networks.json", "transformer");
    let flux = FluxTransformer::new(
        &config,
        builder(g.all("transformer/weights"), DType::F32, 0),
    );
    let flux = flux.unwrap();
    let x = Case::new(&g, "transformer", 3, 5);
    let residuals = |size: f64| Residuals {
        double: vec![
            x.latents.zeros_like().unwrap().repeat((1, 1, 2)).unwrap(),
            (x.latents.repeat((1, 1, 2)).unwrap() * size).unwrap(),
        ],
        ..Default::default()
    };
    let rope = Rope::new(&config, &x.text_ids, &x.ids, &Device::Cpu).unwrap();
    let text = flux.embed_text(&x.text).unwrap();
    let at = |t: f32| {
        let t = Tensor::new(&[t, t], &Device::Cpu).unwrap();
        let modulator = flux.modulator().unwrap();
        modulator.at(&t, x.guidance.as_ref(), &x.pooled).unwrap()
    };
    let mut cache = Cache::new(0.1);
    let mut run = |t: f32, r: &Residuals| {
        let out = flux
            .forward_modulated(&x.latents, &text, &at(t), &rope, Some(r), Some(&mut cache))
            .unwrap();
        let exact = flux
            .forward_modulated(&x.latents, &text, &at(t), &rope, Some(r), None)
            .unwrap();
        (cache.skipped(), gap(&out, &exact))
    };
    assert_eq!(run(0.9, &residuals(1.0)), (0, 0.0));
    let (skipped, error) = run(0.9, &residuals(1.0));
    assert!(skipped == 1 && error < 1e-5, "{skipped} {error}");
    // The first block's output is the same; only the control of later blocks differs.
    assert_eq!(run(0.9, &residuals(2.0)), (1, 0.0));
    assert_eq!(run(0.1, &residuals(2.0)).0, 1);
}

#[test]
fn blocks_in_eight_bits_give_nearly_the_same_velocity() {
    let g = Golden::open("networks.safetensors");
    let config: transformer::Config = config("networks.json", "transformer");
    let vb = builder(g.all("transformer/weights"), DType::F32, 0);
    let x = Case::new(&g, "transformer", 3, 5);
    let exact = FluxTransformer::new(&config, vb.clone()).unwrap();
    let exact = exact.forward(&x.inputs(None)).unwrap();
    let eight = FluxTransformer::in_eight_bits(&config, vb).unwrap();
    let eight = eight.forward(&x.inputs(None)).unwrap();
    let off = gap(&eight, &exact) / largest(&exact);
    assert!(off > 0.0 && off < 0.1, "{off}");
}

#[test]
fn a_controlnets_cache_gives_the_same_residuals_until_its_inputs_change() {
    let g = Golden::open("networks.safetensors");
    for (case, modes) in [("union", Some(&[0u32, 3][..])), ("pro2", None)] {
        let config: controlnet::Config = config("networks.json", case);
        let vb = builder(g.all(&format!("{case}/weights")), DType::F32, 0);
        let net = ControlNet::new(&config, vb).unwrap();
        let x = Case::new(&g, case, 3, 5);
        let condition = g.get(&format!("{case}/condition"));
        let control = Control {
            condition: &condition,
            modes,
            scale: 0.7,
        };
        let rope = Rope::new(&config.trunk, &x.text_ids, &x.ids, &Device::Cpu).unwrap();
        let prepared = net.prepare(&x.text, &control, &rope).unwrap();
        let modulator = net.modulator().unwrap();
        let guidance = x.guidance.as_ref().filter(|_| modulator.takes_guidance());
        let mut cache = Cache::new(0.1);
        // How many were skipped, and how far the residuals are from those without a cache.
        let mut run = |t: f32| {
            let t = Tensor::new(&[t, t], &Device::Cpu).unwrap();
            let modulation = modulator.at(&t, guidance, &x.pooled).unwrap();
            let run = |cache| net.forward_prepared(&x.latents, &prepared, &modulation, cache);
            let (ours, exact) = (run(Some(&mut cache)).unwrap(), run(None).unwrap());
            assert_eq!(ours.double.len(), exact.double.len());
            assert_eq!(ours.single.len(), exact.single.len());
            let all = |r: Residuals| r.double.into_iter().chain(r.single);
            let far = all(ours).zip(all(exact)).map(|(a, b)| gap(&a, &b));
            (cache.skipped(), far.fold(0.0, f32::max))
        };
        assert_eq!(run(0.9), (0, 0.0), "{case}: nothing is known yet");
        assert_eq!(run(0.9), (1, 0.0), "{case}: nothing has changed");
        assert_eq!(run(0.1), (1, 0.0), "{case}: another time is another matter");
        assert_eq!(run(0.1), (2, 0.0), "{case}: and then that is known");
    }
}

#[test]
fn wrong_inputs_are_named() {
    let g = Golden::open("networks.safetensors");
    let config: transformer::Config = config("networks.json", "transformer");
    let vb = builder(g.all("transformer/weights"), DType::F32, 0);
    let flux = FluxTransformer::new(&config, vb.clone()).unwrap();
    let mut x = Case::new(&g, "transformer", 3, 5);
    x.guidance = None;
    let message = flux.forward(&x.inputs(None)).unwrap_err().to_string();
    assert!(message.contains("guidance"), "{message}");
    let mut wrong = config.clone();
    wrong.joint_attention_dim = 13;
    let message = FluxTransformer::new(&wrong, vb).err().unwrap().to_string();
    assert!(message.contains("context_embedder.weight"), "{message}");
    // A damaged config is refused before anything of its size is made.
    type Change = fn(&mut transformer::Config);
    let damage: [Change; 4] = [
        |c| c.num_layers = 1 << 40,
        |c| c.num_attention_heads = 1 << 60,
        |c| c.in_channels = 0,
        |c| c.joint_attention_dim = usize::MAX,
    ];
    for change in damage {
        let mut wrong = config.clone();
        change(&mut wrong);
        let message = wrong.check().unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
    }
    let levels = vae::Config {
        block_out_channels: vec![8; 40],
        norm_num_groups: 8,
        ..vae::Config::flux()
    };
    let message = levels.check().unwrap_err().to_string();
    assert!(message.contains("8 levels"), "{message}");
    let message = names::detect(&["a.weight", "b"]).unwrap_err().to_string();
    assert!(message.contains("a.weight"), "{message}");
    let layout = names::detect(&["diffusion_model.double_blocks.0.img_attn.qkv.weight"]).unwrap();
    assert_eq!(
        layout,
        Layout {
            kind: Kind::Transformer,
            naming: Naming::Bfl,
            prefix: "diffusion_model.".into()
        }
    );
}

#[test]
fn the_text_encoders_equal_transformers() {
    let g = Golden::open("text.safetensors");
    let ids = |name: &str| -> Vec<Vec<u32>> {
        let ids = g.get(name).to_dtype(DType::U32).unwrap();
        ids.to_vec2().unwrap()
    };
    let vb = |case: &str| {
        VarBuilder::from_tensors(g.all(&format!("{case}/weights")), DType::F32, &Device::Cpu)
    };
    let t5 = t5::T5::new(&config("text.json", "t5"), vb("t5")).unwrap();
    let worst = gap(&t5.states(&ids("t5/ids")).unwrap(), &g.get("t5/states"));
    assert!(worst < 1e-4, "T5: {worst}");
    // The same as llama.cpp's converter would name it.
    let spelled: BTreeMap<String, Tensor> = g
        .all("t5/weights")
        .into_iter()
        .map(|(name, t)| {
            let name = name.replace("encoder.block", "enc.blk");
            let name = name.replace(
                "layer.0.SelfAttention.relative_attention_bias",
                "attn_rel_b",
            );
            let name = name.replace("layer.0.SelfAttention.", "attn_");
            let name = name.replace("layer.0.layer_norm", "attn_norm");
            let name = name.replace("layer.1.DenseReluDense.wi_0", "ffn_gate");
            let name = name.replace("layer.1.DenseReluDense.wi_1", "ffn_up");
            let name = name.replace("layer.1.DenseReluDense.wo", "ffn_down");
            let name = name.replace("layer.1.layer_norm", "ffn_norm");
            let name = name.replace("encoder.final_layer_norm", "enc.output_norm");
            (name.replace("shared.", "token_embd."), t)
        })
        .collect();
    let file = gguf(&spelled, GgmlDType::F32).0;
    let from_gguf = t5::T5::new(
        &config("text.json", "t5"),
        file.var_builder(DType::F32, &Device::Cpu),
    );
    let states = from_gguf.unwrap().states(&ids("t5/ids")).unwrap();
    assert_eq!(gap(&states, &t5.states(&ids("t5/ids")).unwrap()), 0.0);
    assert!(t5.states(&[vec![1, 40]]).is_err());

    let clip = text::Clip::new(&config("text.json", "clip"), vb("clip")).unwrap();
    let (states, pooled) = clip.encode(&ids("clip/ids")).unwrap();
    let (a, b) = (
        gap(&states, &g.get("clip/states")),
        gap(&pooled, &g.get("clip/pooled")),
    );
    assert!(a < 1e-4 && b < 1e-4, "CLIP: states {a}, pooled {b}");
    for half in [DType::BF16, DType::F16] {
        let vb = |case: &str| {
            VarBuilder::from_tensors(g.all(&format!("{case}/weights")), half, &Device::Cpu)
        };
        let t5 = t5::T5::new(&config("text.json", "t5"), vb("t5")).unwrap();
        let clip = text::Clip::new(&config("text.json", "clip"), vb("clip")).unwrap();
        for (name, ours) in [
            ("t5/states", t5.states(&ids("t5/ids")).unwrap()),
            ("clip/pooled", clip.encode(&ids("clip/ids")).unwrap().1),
        ] {
            // Of so small a T5 in bf16 transformers itself loses 0.0166.
            let relative = relative(&ours, &g.get(name));
            assert!(relative < 2e-2, "{name}, {half:?}: {relative}");
        }
    }
    assert!(clip.encode(&[vec![1, 2, 3]]).is_err(), "no end token");
    assert_eq!(text::padded(&[5, 6, 7, 8], 3, 0, 9), [5, 6, 9]);
    assert_eq!(text::padded(&[5], 3, 0, 9), [5, 0, 0]);
}

#[test]
fn states_of_any_encoder_become_a_prompt() {
    let one = Tensor::new(
        &[[0.1f32, 0.2, 0.3, 0.2], [0.4, 0.1, 0.1, 0.0]],
        &Device::Cpu,
    )
    .unwrap();
    let none = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    let prompt = text::prompt_of_states(&[one, none], 3).unwrap();
    assert_eq!(prompt.text.dims(), [2, 3, 4]);
    let rows = prompt
        .text
        .squeeze(0)
        .unwrap_or(prompt.text)
        .to_vec3::<f32>()
        .unwrap();
    let (sum, squares) = rows[0][0]
        .iter()
        .fold((0., 0.), |(s, q), x| (s + x, q + x * x));
    assert!(
        sum.abs() < 1e-5 && (squares / 4.0 - 1.0f32).abs() < 1e-2,
        "{:?}",
        rows[0][0]
    );
    assert_eq!(rows[0][2], [0.0; 4]);
    assert_eq!(rows[1], vec![vec![0.0; 4]; 3]);
    assert_eq!(prompt.pooled.dims(), [2, 4]);
}

#[test]
fn the_true_sizes_have_the_published_weights() {
    use std::io::Read;
    let file = std::fs::File::open(golden("names.txt.gz")).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap();
    let published = |case: &str| -> Vec<names::NameAndShape> {
        text.lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                (words.next()? == case).then_some(())?;
                let name = words.next()?.to_string();
                let shape = words.next()?.split('x').map(|n| n.parse().unwrap());
                Some((name, shape.collect()))
            })
            .collect()
    };
    // As in the published config.json.
    let dev: transformer::Config = serde_json::from_str(
        r#"{"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0",
            "attention_head_dim": 128, "guidance_embeds": true, "in_channels": 64,
            "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19,
            "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768}"#,
    )
    .unwrap();
    assert_eq!(dev, transformer::Config::dev());
    let transformer = names::transformer_shapes;
    let control = names::controlnet_shapes;
    for (case, kind, ours, count) in [
        ("dev", Kind::Transformer, transformer(&dev), 11_901_408_320),
        (
            "schnell",
            Kind::Transformer,
            transformer(&transformer::Config::schnell()),
            11_891_178_560,
        ),
        (
            "union",
            Kind::ControlNet,
            control(&controlnet::Config::union()),
            3_301_956_608,
        ),
        (
            "union_pro_2",
            Kind::ControlNet,
            control(&controlnet::Config::union_pro_2()),
            2_140_876_800,
        ),
        (
            "xlabs",
            Kind::ControlNet,
            control(&controlnet::Config::xlabs()),
            743_807_280,
        ),
        (
            "vae",
            Kind::Vae,
            names::vae_shapes(&vae::Config::flux()),
            83_819_683,
        ),
    ] {
        let mut spelled = names::spelled(kind, Naming::Diffusers, 4, &ours);
        spelled.sort();
        assert_eq!(spelled, published(case), "{case}");
        assert_eq!(names::count(&ours), count, "{case}");
    }
    // The presets for small machines are as small as they say.
    let small = names::count(&transformer(&transformer::Config::small()));
    let tiny = names::count(&transformer(&transformer::Config::tiny()));
    let vae = names::count(&names::vae_shapes(&vae::Config::small()));
    assert!((7_000_000..8_500_000).contains(&small), "{small}");
    assert!((2_000_000..2_800_000).contains(&tiny), "{tiny}");
    assert!((500_000..1_000_000).contains(&vae), "{vae}");
}

#[test]
fn loras_of_four_spellings_equal_diffusers_and_strange_keys_are_refused() {
    let g = Golden::open("lora.safetensors");
    let nets = Golden::open("networks.safetensors");
    let config: transformer::Config = config("networks.json", "transformer");
    let base = || builder(nets.all("transformer/weights"), DType::F32, 0);
    let ours = names::transformer_shapes(&config);
    let x = Case::new(&nets, "transformer", 3, 5);
    let file = |tensors: &HashMap<String, Tensor>| {
        let list: Vec<(String, Tensor)> = tensors
            .iter()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let bytes =
            safetensors::serialize(list.iter().map(|(k, v)| (k.as_str(), v)), None).unwrap();
        Weights::from_bytes("lora.safetensors", bytes).unwrap()
    };
    let run = |tensors: &HashMap<String, Tensor>, strength: f64| {
        let lora = lora::Lora::new(&file(tensors), &ours)?;
        let flux = FluxTransformer::new(&config, lora.added_to(base(), strength))?;
        flux.forward(&x.inputs(None))
    };
    for case in ["diffusers", "kohya", "xlabs"] {
        let tensors = g.all(&format!("{case}/lora"));
        let worst = gap(
            &run(&tensors, 1.0).unwrap(),
            &g.get(&format!("{case}/velocity")),
        );
        assert!(worst < 1e-4, "{case}: {worst}");
        let none = gap(
            &run(&tensors, 0.0).unwrap(),
            &nets.get("transformer/velocity"),
        );
        assert!(none < 1e-4, "{case} at strength 0: {none}");
    }
    // BFL's spelling of a fused matrix is the same as diffusers' of its parts.
    let (down, up) = (
        g.get("kohya/lora/lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
        g.get("kohya/lora/lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"),
    );
    let mut fused = HashMap::new();
    let stem = "diffusion_model.single_blocks.1.linear1";
    let up7 = up.repeat((3, 1)).unwrap().narrow(0, 0, 112).unwrap();
    fused.insert(format!("{stem}.lora_A.weight"), down.clone());
    fused.insert(format!("{stem}.lora_B.weight"), up7.clone());
    let mut parts = HashMap::new();
    for (name, first, rows) in [
        ("attn.to_q", 0, 16),
        ("attn.to_k", 16, 16),
        ("attn.to_v", 32, 16),
        ("proj_mlp", 48, 64),
    ] {
        let stem = format!("transformer.single_transformer_blocks.1.{name}");
        parts.insert(format!("{stem}.lora_A.weight"), down.clone());
        parts.insert(
            format!("{stem}.lora_B.weight"),
            up7.narrow(0, first, rows).unwrap(),
        );
    }
    assert_eq!(
        gap(&run(&fused, 0.7).unwrap(), &run(&parts, 0.7).unwrap()),
        0.0
    );

    let mut strange = g.all("diffusers/lora");
    strange.insert(
        "transformer.single_transformer_blocks.99.proj_mlp.lora_A.weight".into(),
        down,
    );
    let message = run(&strange, 1.0).unwrap_err().to_string();
    assert!(message.contains("blocks.99"), "{message}");
    let half = fused.keys().find(|k| k.contains("lora_B")).unwrap().clone();
    fused.remove(&half);
    let message = run(&fused, 1.0).unwrap_err().to_string();
    assert!(message.contains("only one"), "{message}");
}

/// A GGUF file of these weights with the matrices in `kind` where their rows allow it, and
/// the weights as rounded.
fn gguf(
    weights: &BTreeMap<String, Tensor>,
    kind: GgmlDType,
) -> (Weights, BTreeMap<String, Tensor>) {
    let (mut all, mut rounded) = (Vec::new(), BTreeMap::new());
    for (name, t) in weights {
        let fits = t.rank() == 2 && t.dim(1).unwrap().is_multiple_of(kind.block_size());
        let q = QTensor::quantize(t, if fits { kind } else { GgmlDType::F32 }).unwrap();
        rounded.insert(name.clone(), q.dequantize(&Device::Cpu).unwrap());
        all.push((name.as_str(), q));
    }
    let list: Vec<(&str, &QTensor)> = all.iter().map(|(n, q)| (*n, q)).collect();
    let mut file = std::io::Cursor::new(Vec::new());
    gguf_file::write(&mut file, &[], &list).unwrap();
    (
        Weights::from_bytes("model.gguf", file.into_inner()).unwrap(),
        rounded,
    )
}

/// A small network of random weights, none of them nought, and its inputs for three pictures.
fn random_network(
    heads: usize,
    head_dim: usize,
) -> (transformer::Config, BTreeMap<String, Tensor>) {
    let config = transformer::Config {
        in_channels: 8,
        num_layers: 1,
        num_single_layers: 1,
        attention_head_dim: head_dim,
        num_attention_heads: heads,
        joint_attention_dim: 256,
        pooled_projection_dim: 256,
        axes_dims_rope: vec![head_dim / 8, head_dim / 16 * 7, head_dim / 16 * 7],
        ..transformer::Config::schnell()
    };
    let shapes = names::transformer_shapes(&config);
    let weights = shapes.into_iter().enumerate().map(|(i, (name, shape))| {
        let n = shape.iter().product();
        let mean = if name.ends_with(".scale") { 1.0 } else { 0.0 };
        let values = Philox::new(5, i as u64).normals(n);
        let values: Vec<f32> = values.iter().map(|x| mean + 0.05 * x).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    });
    (config, weights.collect())
}

fn random_case(config: &transformer::Config, rows: usize, columns: usize) -> Case {
    let random = |stream: u64, shape: &[usize]| {
        let values = Philox::new(6, stream).normals(shape.iter().product());
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    Case {
        latents: random(0, &[3, rows * columns, config.in_channels]),
        ids: image_ids(rows, columns, &Device::Cpu).unwrap(),
        text: random(1, &[3, 5, config.joint_attention_dim]),
        text_ids: text_ids(5, &Device::Cpu).unwrap(),
        pooled: random(2, &[3, config.pooled_projection_dim]),
        timestep: Tensor::new(&[0.9f32, 0.5, 0.1], &Device::Cpu).unwrap(),
        guidance: None,
    }
}

#[test]
fn quantised_and_eight_bit_files_give_the_network_of_the_rounded_weights() {
    let (config, weights) = random_network(2, 128);
    let x = random_case(&config, 2, 3);
    let run = |vb: VarBuilder| {
        let flux = FluxTransformer::new(&config, vb).unwrap();
        flux.forward(&x.inputs(None)).unwrap()
    };
    let dense =
        |weights: &BTreeMap<String, Tensor>| init::builder(weights, DType::F32, &Device::Cpu);
    let open =
        |file: &Weights| names::open(file, Kind::Transformer, 0, DType::F32, &Device::Cpu).unwrap();
    let exact = run(dense(&weights));
    // How far rounding may lead; Q4_K has 4.5 bits for a weight.
    for (kind, limit) in [
        (GgmlDType::F16, 0.005),
        (GgmlDType::Q8_0, 0.03),
        (GgmlDType::Q6K, 0.1),
        (GgmlDType::Q5K, 0.2),
        (GgmlDType::Q4K, 0.4),
        (GgmlDType::Q4_0, 0.4),
    ] {
        let (file, rounded) = gguf(&weights, kind);
        let ours = run(open(&file));
        assert_eq!(gap(&ours, &run(dense(&rounded))), 0.0, "{kind:?}");
        let far = gap(&ours, &exact) / largest(&exact);
        assert!(far > 0.0 && far < limit, "{kind:?}: {far}");
    }
    let eight = |t: &Tensor| match t.rank() {
        2 => t.to_dtype(DType::F8E4M3).unwrap(),
        _ => t.clone(),
    };
    let stored: Vec<(String, Tensor)> = weights
        .iter()
        .map(|(n, t)| (format!("model.diffusion_model.{n}"), eight(t)))
        .collect();
    let views = stored.iter().map(|(n, t)| (n.as_str(), t));
    let bytes = safetensors::serialize(views, None).unwrap();
    let file = Weights::from_bytes("flux-fp8.safetensors", bytes).unwrap();
    let rounded = weights
        .iter()
        .map(|(n, t)| (n.clone(), eight(t).to_dtype(DType::F32).unwrap()))
        .collect();
    let ours = run(open(&file));
    assert_eq!(gap(&ours, &run(dense(&rounded))), 0.0);
    let far = gap(&ours, &exact) / largest(&exact);
    assert!(far > 0.0 && far < 0.3, "{far}");
}

#[test]
fn inference_on_the_cpu_equals_training_and_does_not_depend_on_batch_or_threads() {
    let (config, weights) = random_network(2, 64);
    // More tokens than are worked on at a time.
    let x = random_case(&config, 10, 19);
    let vars: BTreeMap<String, Var> = weights
        .iter()
        .map(|(n, t)| (n.clone(), Var::from_tensor(t).unwrap()))
        .collect();
    let followed = vars
        .iter()
        .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
        .collect();
    let network = |weights| {
        let vb = init::builder(weights, DType::F32, &Device::Cpu);
        FluxTransformer::new(&config, vb).unwrap()
    };
    let (flux, learner) = (network(&weights), network(&followed));
    let velocity = flux.forward(&x.inputs(None)).unwrap();
    let learned = learner.forward(&x.inputs(None)).unwrap();
    assert!(!velocity.track_op() && learned.track_op());
    let far = gap(&velocity, &learned.detach()) / largest(&velocity);
    assert!(far < 1e-5, "{far}");
    let gradients = learned.sqr().unwrap().sum_all().unwrap().backward();
    let gradients = gradients.unwrap();
    for (name, var) in &vars {
        let gradient = gradients.get(var).map(largest);
        assert!(
            gradient.is_some_and(|g| g > 0.0 && g.is_finite()),
            "{name}: {gradient:?}"
        );
    }

    let three = rayon::ThreadPoolBuilder::new().num_threads(3).build();
    let again = three.unwrap().install(|| flux.forward(&x.inputs(None)));
    assert_eq!(gap(&again.unwrap(), &velocity), 0.0);
    for i in 0..3 {
        let row = |t: &Tensor| t.narrow(0, i, 1).unwrap();
        let one = Case {
            latents: row(&x.latents),
            ids: x.ids.clone(),
            text: row(&x.text),
            text_ids: x.text_ids.clone(),
            pooled: row(&x.pooled),
            timestep: row(&x.timestep),
            guidance: None,
        };
        let alone = flux.forward(&one.inputs(None)).unwrap();
        assert_eq!(gap(&alone, &row(&velocity)), 0.0, "picture {i}");
    }
}
