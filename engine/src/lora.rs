//! Low-rank adapters in PEFT's format, both ways.
//!
//! y = W·x + b + s·B·A·dropout(x), with A [r, in], B [out, r] and s = alpha/r, or alpha/√r
//! with `use_rslora` (LoRA: arXiv 2106.09685; rsLoRA: 2312.03732).
//!
//! On disk an adapter is a folder with `adapter_config.json` and
//! `adapter_model.safetensors`, tensors `base_model.model.{module}.lora_{A|B}.weight`. What
//! was loaded and is saved again has the same bytes. A key on either side that finds no
//! partner is an error, never a silent skip; so is an option of PEFT that we do not have
//! (DoRA, trained biases, ...).

use crate::lm::{Config, Decoder, MODULES};
use crate::nn;
use crate::weights::{self, Weights};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use serde_json::{Map, Value, json};
use simpatico_schema::random::Philox;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const CONFIG_MAX: u64 = 1 << 20;
const RANK_MAX: usize = 4096;

/// Which linear maps get an adapter.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Every one except the head.
    AllLinear,
    /// Those with one of these names, or whose name ends with a dot and one of them.
    Names(Vec<String>),
    /// Those whose whole name matches this expression.
    Regex(String),
}

/// What an adapter is like.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// The rank.
    pub r: usize,
    /// The scale's numerator.
    pub alpha: f64,
    /// Probability that an input of the adapter is dropped in training.
    pub dropout: f32,
    /// Where it applies.
    pub targets: Targets,
    /// Whether the scale is alpha/√r.
    pub rslora: bool,
    /// Ranks for modules whose name ends with the key (an expression).
    pub rank_pattern: BTreeMap<String, usize>,
    /// Alphas likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// The base model's name, if known.
    pub base_model: Option<String>,
    /// Every key of the file it came from, to be saved again.
    raw: BTreeMap<String, Value>,
}

impl LoraConfig {
    /// The paper's adapter: r 16, alpha 32, dropout 0.05, all linear maps.
    pub fn paper() -> Self {
        Self::new(16, 32.0)
    }

    /// An adapter of rank `r` on all linear maps, dropout 0.05.
    pub fn new(r: usize, alpha: f64) -> Self {
        Self {
            r,
            alpha,
            dropout: 0.05,
            targets: Targets::AllLinear,
            rslora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            base_model: None,
            raw: BTreeMap::new(),
        }
    }

    /// From the text of an `adapter_config.json`; `name` is for messages.
    pub fn from_json(name: &str, text: &str) -> Result<Self> {
        let bad = |reason: String| Error::bad_model(name, reason);
        let raw: BTreeMap<String, Value> =
            serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        refuse_unknown_options(name, &raw)?;
        let get = |key: &str| raw.get(key).filter(|v| !v.is_null());
        let targets = match get("target_modules") {
            Some(Value::String(s)) if s == "all-linear" => Targets::AllLinear,
            Some(Value::String(s)) => Targets::Regex(s.clone()),
            Some(Value::Array(names)) => Targets::Names(
                names
                    .iter()
                    .map(|n| n.as_str().map(str::to_owned))
                    .collect::<Option<_>>()
                    .ok_or_else(|| bad("target_modules is not a list of names".into()))?,
            ),
            _ => return Err(bad("lacks target_modules".into())),
        };
        let pattern = |key: &str| -> Result<BTreeMap<String, f64>> {
            let Some(Value::Object(map)) = get(key) else {
                return Ok(BTreeMap::new());
            };
            map.iter()
                .map(|(k, v)| match v.as_f64() {
                    Some(x) if x > 0.0 => Ok((k.clone(), x)),
                    _ => Err(bad(format!("{key}: {k:?} is not a positive number"))),
                })
                .collect()
        };
        let config = Self {
            r: get("r").and_then(Value::as_u64).unwrap_or(8) as usize,
            alpha: get("lora_alpha").and_then(Value::as_f64).unwrap_or(8.0),
            dropout: get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0) as f32,
            targets,
            rslora: get("use_rslora") == Some(&Value::Bool(true)),
            rank_pattern: pattern("rank_pattern")?
                .into_iter()
                .map(|(k, r)| (k, r as usize))
                .collect(),
            alpha_pattern: pattern("alpha_pattern")?,
            base_model: get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(str::to_owned),
            raw,
        };
        let ranks = config.rank_pattern.values().chain([&config.r]);
        for r in ranks {
            if !(1..=RANK_MAX).contains(r) {
                return Err(bad(format!("rank {r}; expected 1 to {RANK_MAX}")));
            }
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(bad(format!(
                "lora_dropout {}; expected 0 to below 1",
                config.dropout
            )));
        }
        Ok(config)
    }

    /// The text of the `adapter_config.json`: the keys it was loaded with, or PEFT's.
    pub fn to_json(&self) -> Result<String> {
        let targets = match &self.targets {
            Targets::AllLinear => json!(
                MODULES
                    .iter()
                    .filter_map(|m| m.split('.').nth(1))
                    .collect::<Vec<_>>()
            ),
            Targets::Names(names) => json!(names),
            Targets::Regex(r) => json!(r),
        };
        let mut keys = self.raw.clone();
        let mut set = |key: &str, value: Value| {
            // 32 and 32.0 are the same to PEFT; the file's own spelling stays.
            let same = keys.get(key).is_some_and(|old| {
                *old == value || (old.is_number() && old.as_f64() == value.as_f64())
            });
            if !same {
                keys.insert(key.to_owned(), value);
            }
        };
        set("r", json!(self.r));
        set("lora_alpha", whole_if_so(self.alpha));
        // As decimal digits say it, not as the nearest f32 does.
        let dropout: f64 = self.dropout.to_string().parse().unwrap_or(0.0);
        set("lora_dropout", json!(dropout));
        set("target_modules", targets);
        set("use_rslora", json!(self.rslora));
        set("rank_pattern", json!(self.rank_pattern));
        let alphas: Map<String, Value> = self
            .alpha_pattern
            .iter()
            .map(|(k, a)| (k.clone(), whole_if_so(*a)))
            .collect();
        set("alpha_pattern", Value::Object(alphas));
        set("base_model_name_or_path", json!(self.base_model));
        for (key, value) in [
            ("peft_type", json!("LORA")),
            ("task_type", json!("CAUSAL_LM")),
            ("bias", json!("none")),
            ("fan_in_fan_out", json!(false)),
            ("init_lora_weights", json!(true)),
            ("inference_mode", json!(true)),
            ("use_dora", json!(false)),
            ("modules_to_save", Value::Null),
        ] {
            keys.entry(key.to_owned()).or_insert(value);
        }
        serde_json::to_string_pretty(&keys).map_err(|e| Error::BadRequest(e.to_string()))
    }

    /// Whether module `name` gets an adapter.
    fn covers(&self, name: &str, regex: Option<&regex::Regex>) -> bool {
        match &self.targets {
            Targets::AllLinear => true,
            Targets::Names(names) => names.iter().any(|n| is_or_ends_with(name, n)),
            Targets::Regex(_) => regex.is_some_and(|r| r.is_match(name)),
        }
    }

    fn scale(&self, name: &str) -> Result<(usize, f64)> {
        let r = *matching(&self.rank_pattern, name)?.unwrap_or(&self.r);
        let alpha = *matching(&self.alpha_pattern, name)?.unwrap_or(&self.alpha);
        let divisor = match self.rslora {
            true => (r as f64).sqrt(),
            false => r as f64,
        };
        Ok((r, alpha / divisor))
    }
}

fn whole_if_so(x: f64) -> Value {
    match x.fract() == 0.0 && x.abs() < 1e15 {
        true => json!(x as i64),
        false => json!(x),
    }
}

fn is_or_ends_with(name: &str, target: &str) -> bool {
    name.strip_suffix(target)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The value of the first key that, as an expression, matches the end of `name`.
fn matching<'a, T>(pattern: &'a BTreeMap<String, T>, name: &str) -> Result<Option<&'a T>> {
    for (key, value) in pattern {
        if whole(&format!("(.*\\.)?({key})"))?.is_match(name) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// An expression that must match a whole name. (This engine's time is linear in the text, so
/// a hostile expression costs nothing; its size is limited.)
fn whole(expression: &str) -> Result<regex::Regex> {
    regex::RegexBuilder::new(&format!("^(?:{expression})$"))
        .size_limit(1 << 20)
        .build()
        .map_err(|e| Error::bad_model("adapter_config.json", format!("{e}")))
}

/// Options that change the meaning of the tensors and that we do not have must be off.
fn refuse_unknown_options(name: &str, raw: &BTreeMap<String, Value>) -> Result<()> {
    let off = |v: &Value| {
        v.is_null()
            || *v == json!(false)
            || *v == json!("none")
            || v.as_array().is_some_and(Vec::is_empty)
            || v.as_object().is_some_and(Map::is_empty)
    };
    for key in [
        "alora_invocation_tokens",
        "arrow_config",
        "bias",
        "corda_config",
        "exclude_modules",
        "fan_in_fan_out",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "megatron_config",
        "modules_to_save",
        "monteclora_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    ] {
        if let Some(value) = raw.get(key).filter(|v| !off(v)) {
            return Err(Error::bad_model(
                name,
                format!("{key} is {value}, which is not supported; plain LoRA is"),
            ));
        }
    }
    match raw.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => Ok(()),
        other => Err(Error::bad_model(
            name,
            format!("peft_type {other:?}; LORA is supported"),
        )),
    }
}

/// The two factors of one module.
#[derive(Clone, Debug)]
pub struct Pair {
    /// [r, in]
    pub a: Tensor,
    /// [out, r]
    pub b: Tensor,
    /// alpha/r or alpha/√r.
    pub scale: f64,
}

impl Pair {
    /// scale·B·A·x for x [.., in]: [.., out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.a.to_dtype(x.dtype())?, self.b.to_dtype(x.dtype())?);
        Ok((nn::matmul_t(&nn::matmul_t(x, &a)?, &b)? * self.scale)?)
    }

    /// scale·B·A [out, in] in f32: what the adapter adds to the weight.
    pub fn delta(&self) -> Result<Tensor> {
        let (a, b) = (self.a.to_dtype(DType::F32)?, self.b.to_dtype(DType::F32)?);
        Ok((b.matmul(&a)? * self.scale)?.detach())
    }
}

/// An adapter for all layers of a decoder.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// What it is like.
    pub config: LoraConfig,
    layers: Vec<[Option<Pair>; 7]>,
    vars: BTreeMap<String, Var>,
    /// The tensors' dtype on disk.
    stored: DType,
}

impl Adapter {
    /// A fresh adapter: A uniform within ±1/√in (PEFT's kaiming_uniform with a = √5), B
    /// zero, so that it changes nothing yet. Its factors are f32 variables.
    pub fn fresh(config: LoraConfig, model: &Config, seed: u64, device: &Device) -> Result<Self> {
        let mut vars = BTreeMap::new();
        let layers = place(&config, model, |stream, name, (out, inputs), r| {
            let bound = 1.0 / (inputs as f32).sqrt();
            let mut rng = Philox::new(seed, stream);
            let a = (0..r * inputs)
                .map(|_| (2.0 * rng.uniform() - 1.0) * bound)
                .collect();
            let a = Tensor::from_vec(a, (r, inputs), &Device::Cpu)?.to_device(device)?;
            let b = Tensor::zeros((out, r), DType::F32, device)?;
            trained(&mut vars, name, a, b)
        })?;
        Ok(Self {
            config,
            layers,
            vars,
            stored: DType::F32,
        })
    }

    /// Loads the folder of an adapter that fits `model`, as constants.
    pub fn load(folder: &Path, model: &Config, device: &Device) -> Result<Self> {
        let path = folder.join("adapter_config.json");
        let text = weights::read_text(&path, CONFIG_MAX)?;
        let config = LoraConfig::from_json(&path.display().to_string(), &text)?;
        let weights = Weights::open(&folder.join("adapter_model.safetensors"))?;
        Self::from_weights(config, &weights, model, device)
    }

    /// The same from its parts.
    pub fn from_weights(
        config: LoraConfig,
        weights: &Weights,
        model: &Config,
        device: &Device,
    ) -> Result<Self> {
        let mut left: BTreeSet<&str> = weights.names().collect();
        let mut stored = DType::F32;
        let layers = place(&config, model, |_, name, (out, inputs), r| {
            let mut take = |factor: &str, shape: (usize, usize)| -> Result<Tensor> {
                let key = key(name, factor);
                let tensor = weights.get(&key, shape, DType::F32, device)?;
                left.remove(key.as_str());
                if let Some(
                    dtype @ (weights::Stored::F16 | weights::Stored::BF16 | weights::Stored::F64),
                ) = weights.stored(&key)
                {
                    stored = match dtype {
                        weights::Stored::F16 => DType::F16,
                        weights::Stored::BF16 => DType::BF16,
                        _ => DType::F64,
                    };
                }
                Ok(tensor)
            };
            Ok((take("A", (r, inputs))?, take("B", (out, r))?))
        })?;
        if let Some(key) = left.first() {
            return Err(Error::bad_model(
                weights.name(),
                format!(
                    "{} tensors belong to no targeted module of the model, such as {key:?}",
                    left.len()
                ),
            ));
        }
        Ok(Self {
            config,
            layers,
            vars: BTreeMap::new(),
            stored,
        })
    }

    /// The same adapter with factors that are variables of their own, to go on training it;
    /// the original stays as it is (the frozen reference of a DPO run).
    pub fn trainable(&self) -> Result<Self> {
        let mut copy = self.clone();
        copy.vars.clear();
        for (index, layer) in copy.layers.iter_mut().enumerate() {
            for (module, pair) in layer.iter_mut().enumerate() {
                if let Some(pair) = pair {
                    let name = module_name(index, module);
                    let (a, b) = (pair.a.detach().copy()?, pair.b.detach().copy()?);
                    (pair.a, pair.b) = trained(&mut copy.vars, &name, a, b)?;
                }
            }
        }
        Ok(copy)
    }

    /// The same adapter with constant factors: a copy of their values now.
    pub fn frozen(&self) -> Result<Self> {
        let mut copy = self.clone();
        copy.vars.clear();
        for pair in copy.layers.iter_mut().flatten().flatten() {
            pair.a = pair.a.detach().copy()?;
            pair.b = pair.b.detach().copy()?;
        }
        Ok(copy)
    }

    /// The variables by their key on disk, in order; empty for a constant adapter.
    pub fn vars(&self) -> &BTreeMap<String, Var> {
        &self.vars
    }

    /// The factors of module `module` ([`MODULES`]) in layer `layer`.
    pub fn pair(&self, layer: usize, module: usize) -> Option<&Pair> {
        self.layers.get(layer)?.get(module)?.as_ref()
    }

    /// All tensors by their key on disk.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut tensors = BTreeMap::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for (module, pair) in layer.iter().enumerate() {
                if let Some(pair) = pair {
                    let name = module_name(index, module);
                    tensors.insert(key(&name, "A"), pair.a.clone());
                    tensors.insert(key(&name, "B"), pair.b.clone());
                }
            }
        }
        tensors
    }

    /// Writes the folder, tensors in the dtype they were loaded in (f32 for a fresh one), or
    /// in `dtype`.
    pub fn save(&self, folder: &Path, dtype: Option<DType>) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let dtype = dtype.unwrap_or(self.stored);
        let mut tensors = self.tensors();
        for tensor in tensors.values_mut() {
            *tensor = tensor.detach().to_dtype(dtype)?;
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        weights::save_safetensors(
            &folder.join("adapter_model.safetensors"),
            &tensors,
            &metadata,
        )?;
        weights::write_whole(
            &folder.join("adapter_config.json"),
            self.config.to_json()?.as_bytes(),
        )
    }
}

/// The name of a module in the checkpoint.
fn module_name(layer: usize, module: usize) -> String {
    format!("model.layers.{layer}.{}", MODULES[module])
}

/// PEFT's key for a factor.
fn key(module: &str, factor: &str) -> String {
    format!("base_model.model.{module}.lora_{factor}.weight")
}

/// Makes variables of two factors and notes them.
fn trained(
    vars: &mut BTreeMap<String, Var>,
    module: &str,
    a: Tensor,
    b: Tensor,
) -> Result<(Tensor, Tensor)> {
    let (a, b) = (Var::from_tensor(&a)?, Var::from_tensor(&b)?);
    let tensors = (a.as_tensor().clone(), b.as_tensor().clone());
    vars.insert(key(module, "A"), a);
    vars.insert(key(module, "B"), b);
    Ok(tensors)
}

/// Makes the pair of every module that the config targets: `make(number, name, [out, in],
/// r)`. Fails when a target matches nothing.
fn place(
    config: &LoraConfig,
    model: &Config,
    mut make: impl FnMut(u64, &str, (usize, usize), usize) -> Result<(Tensor, Tensor)>,
) -> Result<Vec<[Option<Pair>; 7]>> {
    let regex = match &config.targets {
        Targets::Regex(r) => Some(whole(r)?),
        _ => None,
    };
    let mut unused: BTreeSet<&str> = match &config.targets {
        Targets::Names(names) => names.iter().map(String::as_str).collect(),
        _ => BTreeSet::new(),
    };
    let mut layers = Vec::with_capacity(model.layers);
    let mut number = 0;
    for index in 0..model.layers {
        let mut layer = [const { None }; 7];
        for (module, slot) in layer.iter_mut().enumerate() {
            let name = module_name(index, module);
            if !config.covers(&name, regex.as_ref()) {
                continue;
            }
            unused.retain(|target| !is_or_ends_with(&name, target));
            let (r, scale) = config.scale(&name)?;
            let shape = Decoder::module_shape(model, module);
            let (a, b) = make(number, &name, shape, r)?;
            number += 1;
            *slot = Some(Pair { a, b, scale });
        }
        layers.push(layer);
    }
    if let Some(target) = unused.first() {
        return Err(Error::bad_model(
            "adapter_config.json",
            format!("target_modules names {target:?}, which the model does not have"),
        ));
    }
    if number == 0 {
        return Err(Error::bad_model(
            "adapter_config.json",
            "target_modules matches no module of the model",
        ));
    }
    Ok(layers)
}

#[cfg(test)]
mod tests;
