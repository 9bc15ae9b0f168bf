//! The sizes of a decoder, from a transformers `config.json` (old or new spellings) or from
//! the metadata of a GGUF file.

use crate::gguf::Header;
use crate::nn;
use crate::weights::Weights;
use crate::{Error, Result};
use serde_json::Value;

/// Which family a decoder belongs to; they differ in biases and in llama.cpp's row order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Llama, and SmolLM2.
    Llama,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// All divided by this.
    Linear(f64),
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Wavelengths over original / this are low.
        low: f64,
        /// Wavelengths under original / this are high.
        high: f64,
        /// The context length before the stretch.
        original: f64,
    },
}

/// The sizes of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Its family.
    pub family: Family,
    /// Entries of the vocabulary.
    pub vocab: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Longest sequence it was made for.
    pub positions: usize,
    /// Epsilon of the norms.
    pub eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretch, if any.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Whether q, k and v must have biases.
    pub qkv_bias: bool,
    /// Tokens that end an answer, as far as the file says.
    pub eos: Vec<u32>,
}

impl Config {
    /// From the text of a `config.json`; `name` is for messages.
    pub fn from_json(name: &str, text: &str) -> Result<Self> {
        let json: Value =
            serde_json::from_str(text).map_err(|e| Error::bad_model(name, e.to_string()))?;
        let read = Json { name, json: &json };
        let family = match read.text("model_type")? {
            "qwen2" => Family::Qwen2,
            // The same network; its window is seen to below.
            "llama" | "mistral" => Family::Llama,
            other => {
                return Err(Error::bad_model(
                    name,
                    format!("model_type {other:?}; qwen2, llama and mistral are known"),
                ));
            }
        };
        let sliding = json.get("layer_types").and_then(Value::as_array);
        let mistral = json.get("model_type").and_then(Value::as_str) == Some("mistral");
        if !mistral && sliding.is_some_and(|l| l.iter().any(|t| t != "full_attention"))
            || json.get("use_sliding_window") == Some(&Value::Bool(true))
        {
            return Err(Error::bad_model(
                name,
                "sliding-window attention is not known",
            ));
        }
        if !matches!(json.get("hidden_act"), None | Some(Value::Null))
            && read.text("hidden_act")? != "silu"
        {
            return Err(Error::bad_model(name, "hidden_act is not silu"));
        }
        let (hidden, heads) = (read.size("hidden_size")?, read.size("num_attention_heads")?);
        // Within a sliding window all attention is full.
        let window = json.get("sliding_window").and_then(Value::as_u64);
        let window = window.filter(|_| mistral);
        let window = window.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        // transformers 5 gathers what was rope_theta and rope_scaling.
        let rope = json.get("rope_parameters").or(json.get("rope_scaling"));
        let rope_theta = rope
            .and_then(|r| r.get("rope_theta"))
            .or(json.get("rope_theta"))
            .and_then(Value::as_f64)
            .unwrap_or(10_000.0);
        let eos = match json.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
            Some(id) => id.as_u64().into_iter().collect(),
            None => Vec::new(),
        };
        Self {
            family,
            vocab: read.size("vocab_size")?,
            hidden,
            intermediate: read.size("intermediate_size")?,
            layers: read.size("num_hidden_layers")?,
            heads,
            kv_heads: read.size_or("num_key_value_heads", heads)?,
            head_dim: read.size_or("head_dim", hidden / heads.max(1))?,
            positions: read.size("max_position_embeddings")?.min(window),
            eps: json
                .get("rms_norm_eps")
                .and_then(Value::as_f64)
                .unwrap_or(1e-6),
            rope_theta,
            rope_scaling: rope.map_or(Ok(None), |r| read.scaling(r))?,
            // Both families' own default is not to tie.
            tied: json.get("tie_word_embeddings") == Some(&Value::Bool(true)),
            qkv_bias: family == Family::Qwen2,
            eos: eos
                .into_iter()
                .filter_map(|id| id.try_into().ok())
                .collect(),
        }
        .checked(name)
    }

    /// From the metadata of a GGUF file.
    pub fn from_gguf(weights: &Weights) -> Result<Self> {
        let name = weights.name();
        let Some(header) = weights.gguf() else {
            return Err(Error::bad_model(name, "not a GGUF file"));
        };
        let arch = header.text("general.architecture").unwrap_or("");
        let family = match arch {
            "qwen2" => Family::Qwen2,
            "llama" => Family::Llama,
            other => {
                return Err(Error::bad_model(
                    name,
                    format!("architecture {other:?}; qwen2 and llama are known"),
                ));
            }
        };
        let vocab = weights
            .shape("token_embd.weight")
            .and_then(|s| s.first().copied())
            .unwrap_or(0);
        let size = |key: &str| gguf_size(name, header, &format!("{arch}.{key}"));
        let (hidden, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let float = |key: &str| header.float(&format!("{arch}.{key}"));
        let scaling = match header.text(&format!("{arch}.rope.scaling.type")) {
            None | Some("none") => None,
            Some("linear") => float("rope.scaling.factor").map(RopeScaling::Linear),
            Some(other) => {
                return Err(Error::bad_model(
                    name,
                    format!("rope scaling {other:?}; none and linear are known"),
                ));
            }
        };
        Self {
            family,
            vocab,
            hidden,
            intermediate: size("feed_forward_length")?,
            layers: size("block_count")?,
            heads,
            kv_heads: size("attention.head_count_kv").unwrap_or(heads),
            head_dim: size("attention.key_length").unwrap_or(hidden / heads.max(1)),
            positions: size("context_length")?,
            eps: float("attention.layer_norm_rms_epsilon").unwrap_or(1e-6),
            rope_theta: float("rope.freq_base").unwrap_or(10_000.0),
            rope_scaling: scaling,
            tied: !weights.contains("output.weight"),
            qkv_bias: family == Family::Qwen2,
            eos: header
                .integer("tokenizer.ggml.eos_token_id")
                .and_then(|id| u32::try_from(id).ok())
                .into_iter()
                .collect(),
        }
        .checked(name)
    }

    /// Refuses sizes that no model has, before anything is computed or allocated from them.
    fn checked(self, name: &str) -> Result<Self> {
        let limits = [
            ("vocabulary", self.vocab, 1 << 20),
            ("hidden size", self.hidden, 1 << 16),
            ("intermediate size", self.intermediate, 1 << 18),
            ("number of layers", self.layers, 512),
            ("number of heads", self.heads, 1024),
            ("number of key heads", self.kv_heads, 1024),
            ("head size", self.head_dim, 1024),
            ("context length", self.positions, 1 << 24),
        ];
        for (what, got, most) in limits {
            if got == 0 || got > most {
                return Err(Error::bad_model(
                    name,
                    format!("{what} {got}; expected 1 to {most}"),
                ));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return Err(Error::bad_model(
                name,
                format!(
                    "{} heads over {} key heads of size {}; expected a multiple and an even size",
                    self.heads, self.kv_heads, self.head_dim
                ),
            ));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0 && self.eps > 0.0) {
            return Err(Error::bad_model(
                name,
                "rope_theta and eps must be positive",
            ));
        }
        Ok(self)
    }

    /// The rotary frequencies, head_dim/2 of them.
    pub fn frequencies(&self) -> Vec<f64> {
        let mut frequencies = nn::rope_frequencies(self.head_dim, self.rope_theta);
        for f in &mut frequencies {
            *f = match self.rope_scaling {
                None => *f,
                Some(RopeScaling::Linear(factor)) => *f / factor,
                Some(RopeScaling::Llama3 {
                    factor,
                    low,
                    high,
                    original,
                }) => {
                    let turns = original * *f / std::f64::consts::TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * *f + (1.0 - keep) * *f / factor
                }
            };
        }
        frequencies
    }
}

fn gguf_size(name: &str, header: &Header, key: &str) -> Result<usize> {
    header
        .integer(key)
        .and_then(|i| usize::try_from(i).ok())
        .ok_or_else(|| Error::bad_model(name, format!("lacks the metadata key {key:?}")))
}

struct Json<'a> {
    name: &'a str,
    json: &'a Value,
}

impl Json<'_> {
    fn text(&self, key: &str) -> Result<&str> {
        self.json
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| Error::bad_model(self.name, format!("lacks the text {key:?}")))
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.json
            .get(key)
            .and_then(Value::as_u64)
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| Error::bad_model(self.name, format!("lacks the number {key:?}")))
    }

    fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.size(key),
        }
    }

    fn scaling(&self, rope: &Value) -> Result<Option<RopeScaling>> {
        let number = |key: &str| {
            rope.get(key)
                .and_then(Value::as_f64)
                .filter(|x| x.is_finite() && *x > 0.0)
                .ok_or_else(|| {
                    Error::bad_model(self.name, format!("rope scaling lacks the number {key:?}"))
                })
        };
        let kind = rope.get("rope_type").or(rope.get("type"));
        match kind.and_then(Value::as_str) {
            None | Some("default") => Ok(None),
            Some("linear") => Ok(Some(RopeScaling::Linear(number("factor")?))),
            Some("llama3") => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(Error::bad_model(
                        self.name,
                        "low_freq_factor is not the lower",
                    ));
                }
                Ok(Some(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low,
                    high,
                    original: number("original_max_position_embeddings")?,
                }))
            }
            Some(other) => Err(Error::bad_model(
                self.name,
                format!("rope scaling {other:?}; default, linear and llama3 are known"),
            )),
        }
    }
}
