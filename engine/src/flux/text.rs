//! Words for Flux: the T5 encoder (token states) and CLIP's text model (pooled) of FLUX.1,
//! and the plain path of the small models, whose token states come from any sentence encoder.
//!
//! The networks are candle-transformers'; what it gets wrong for FLUX.1 is done here. CLIP is
//! pooled at the first end token, found on the host (its arg-max over ids depends on how ties
//! are broken, and padding has the end token's number). T5 sees its padding, as FLUX.1 was
//! trained.
//!
//! T5 is also read from GGUF files, which have names of llama.cpp's.
//!
//! Tokenizers are not here: ids come in, padded by [`padded`].

use crate::sampler::Prompt;
use crate::{Error, Result, nn};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use candle_transformers::models::{clip::text_model as clip, t5};
use serde::{Deserialize, Serialize};

/// Token ids cut or padded to `length`; a cut keeps `end` as the last.
pub fn padded(ids: &[u32], length: usize, pad: u32, end: u32) -> Vec<u32> {
    let mut ids = ids.to_vec();
    if ids.len() > length {
        ids.truncate(length);
        if let Some(last) = ids.last_mut() {
            *last = end;
        }
    }
    ids.resize(length, pad);
    ids
}

/// Rows of equal length as a (b, t) tensor.
fn ids_tensor(ids: &[Vec<u32>], vocabulary: usize, device: &Device) -> Result<Tensor> {
    let t = ids.first().map_or(0, Vec::len);
    if t == 0 || ids.iter().any(|row| row.len() != t) {
        return Err(Error::BadRequest(
            "token ids must be padded to one length of at least 1".into(),
        ));
    }
    if let Some(bad) = ids.iter().flatten().find(|id| **id as usize >= vocabulary) {
        return Err(Error::BadRequest(format!(
            "token {bad} is beyond the text encoder's vocabulary of {vocabulary}: the tokenizer \
             belongs to another model"
        )));
    }
    Ok(Tensor::from_vec(ids.concat(), (ids.len(), t), device)?)
}

// ---------------------------------------------------------------------------------- T5

/// The shape of a T5 encoder, with the field names of its `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Hidden size.
    pub d_model: usize,
    /// Channels per head.
    pub d_kv: usize,
    /// Hidden size of the MLP.
    pub d_ff: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads.
    pub num_heads: usize,
    /// Buckets of relative positions.
    pub relative_attention_num_buckets: usize,
    /// Distances beyond share the last bucket.
    pub relative_attention_max_distance: usize,
    /// Added to the variance of norms.
    pub layer_norm_epsilon: f64,
    /// "gated-gelu" (v1.1) or "relu" (v1.0).
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self::xxl()
    }
}

impl T5Config {
    /// T5-v1.1-XXL, FLUX.1's: 4.76 B parameters.
    pub fn xxl() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 4096,
            d_kv: 64,
            d_ff: 10240,
            num_layers: 24,
            num_heads: 64,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "gated-gelu".into(),
        }
    }

    /// flan-t5-small's encoder: 35 M parameters.
    pub fn flan_small() -> Self {
        Self {
            d_model: 512,
            d_ff: 1024,
            num_layers: 8,
            num_heads: 6,
            ..Self::xxl()
        }
    }

    fn theirs(&self) -> Result<t5::Config> {
        let feed_forward_proj = match self.feed_forward_proj.as_str() {
            "gated-gelu" => t5::ActivationWithOptionalGating {
                gated: true,
                activation: candle_nn::Activation::NewGelu,
            },
            "relu" => t5::ActivationWithOptionalGating {
                gated: false,
                activation: candle_nn::Activation::Relu,
            },
            other => {
                return Err(Error::bad_model(
                    "config.json",
                    format!("feed_forward_proj: expected gated-gelu or relu, got {other:?}"),
                ));
            }
        };
        Ok(t5::Config {
            vocab_size: self.vocab_size,
            d_model: self.d_model,
            d_kv: self.d_kv,
            d_ff: self.d_ff,
            num_layers: self.num_layers,
            num_heads: self.num_heads,
            relative_attention_num_buckets: self.relative_attention_num_buckets,
            relative_attention_max_distance: self.relative_attention_max_distance,
            layer_norm_epsilon: self.layer_norm_epsilon,
            feed_forward_proj,
            use_cache: false,
            ..t5::Config::default()
        })
    }
}

/// A T5 encoder.
pub struct T5 {
    model: t5::T5EncoderModel,
    vocabulary: usize,
}

/// llama.cpp's name for one of transformers' T5 weights.
fn llama_cpp_name(name: &str) -> Option<String> {
    match name {
        "shared.weight" => return Some("token_embd.weight".into()),
        "encoder.final_layer_norm.weight" => return Some("enc.output_norm.weight".into()),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("encoder.block.")?.split_once('.')?;
    let ours = match rest.strip_prefix("layer.")?.strip_suffix(".weight")? {
        "0.SelfAttention.q" => "attn_q",
        "0.SelfAttention.k" => "attn_k",
        "0.SelfAttention.v" => "attn_v",
        "0.SelfAttention.o" => "attn_o",
        "0.SelfAttention.relative_attention_bias" => "attn_rel_b",
        "0.layer_norm" => "attn_norm",
        "1.DenseReluDense.wi_0" => "ffn_gate",
        "1.DenseReluDense.wi_1" | "1.DenseReluDense.wi" => "ffn_up",
        "1.DenseReluDense.wo" => "ffn_down",
        "1.layer_norm" => "ffn_norm",
        _ => return None,
    };
    Some(format!("enc.blk.{block}.{ours}.weight"))
}

/// A T5 with llama.cpp's names, read under transformers'.
struct LlamaCpp(VarBuilder<'static>);

impl SimpleBackend for LlamaCpp {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let file = llama_cpp_name(name).unwrap_or_else(|| name.to_string());
        self.0
            .get_with_hints_dtype(shape, &file, Init::default(), dtype)?
            .to_device(device)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let file = llama_cpp_name(name).unwrap_or_else(|| name.to_string());
        self.0.get_unchecked_dtype(&file, dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        llama_cpp_name(name).is_some_and(|n| self.0.contains_tensor(&n))
    }
}

impl T5 {
    /// From weights with transformers' names, or llama.cpp's.
    pub fn new(config: &T5Config, vb: VarBuilder<'static>) -> Result<Self> {
        let vb = match vb.contains_tensor("token_embd.weight") {
            true => {
                let (dtype, device) = (vb.dtype(), vb.device().clone());
                VarBuilder::from_backend(Box::new(LlamaCpp(vb)), dtype, device)
            }
            false => vb,
        };
        Ok(Self {
            model: t5::T5EncoderModel::load(vb, &config.theirs()?)?,
            vocabulary: config.vocab_size,
        })
    }

    /// Token states (b, t, d_model). FLUX.1 takes 512 tokens, padded with 0.
    pub fn states(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let ids = ids_tensor(ids, self.vocabulary, self.model.device())?;
        // The model wants itself mutable for a cache that encoders do not use; a copy shares
        // the weights.
        Ok(self.model.clone().forward(&ids)?)
    }
}

// -------------------------------------------------------------------------------- CLIP

/// The shape of a CLIP text model, with the field names of its `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Hidden size, and that of the pooled output.
    pub hidden_size: usize,
    /// Hidden size of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Most tokens.
    pub max_position_embeddings: usize,
    /// The end token. OpenAI's files say 2 and mean the last of the vocabulary.
    pub eos_token_id: u32,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self::vit_l_14()
    }
}

impl ClipConfig {
    /// OpenAI's ViT-L/14, FLUX.1's.
    pub fn vit_l_14() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
            eos_token_id: 49407,
        }
    }
}

/// A CLIP text model (quick-GELU, as OpenAI's).
pub struct Clip {
    model: clip::ClipTextTransformer,
    config: ClipConfig,
    device: Device,
}

impl Clip {
    /// From weights with transformers' names, with `text_model.` before them (up to its fourth
    /// version) or without.
    pub fn new(config: &ClipConfig, vb: VarBuilder) -> Result<Self> {
        let theirs = clip::ClipTextConfig {
            vocab_size: config.vocab_size,
            embed_dim: config.hidden_size,
            activation: clip::Activation::QuickGelu,
            intermediate_size: config.intermediate_size,
            max_position_embeddings: config.max_position_embeddings,
            pad_with: None,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            projection_dim: config.hidden_size,
        };
        let device = vb.device().clone();
        let vb = match vb.contains_tensor("embeddings.token_embedding.weight") {
            true => vb,
            false => vb.pp("text_model"),
        };
        Ok(Self {
            model: clip::ClipTextTransformer::new(vb, &theirs)?,
            config: config.clone(),
            device,
        })
    }

    /// States (b, t, hidden) and those at the first end token, (b, hidden). FLUX.1 takes 77
    /// tokens.
    ///
    /// # Errors
    /// Also where a row has no end token.
    pub fn encode(&self, ids: &[Vec<u32>]) -> Result<(Tensor, Tensor)> {
        let input = ids_tensor(ids, self.config.vocab_size, &self.device)?;
        if input.dim(1)? > self.config.max_position_embeddings {
            return Err(Error::BadRequest(format!(
                "CLIP takes at most {} tokens, got {}",
                self.config.max_position_embeddings,
                input.dim(1)?
            )));
        }
        let end = match self.config.eos_token_id {
            2 => self.config.vocab_size as u32 - 1,
            id => id,
        };
        let states = self.model.forward_with_mask(&input, usize::MAX)?;
        let mut pooled = Vec::with_capacity(ids.len());
        for (i, row) in ids.iter().enumerate() {
            let at = row.iter().position(|&id| id == end).ok_or_else(|| {
                Error::BadRequest(format!("text {i} has no end token {end} for CLIP"))
            })?;
            pooled.push(states.narrow(0, i, 1)?.narrow(1, at, 1)?.squeeze(1)?);
        }
        Ok((states, Tensor::cat(&pooled, 0)?))
    }
}

// ------------------------------------------------------------------------- small models

/// A prompt from a sentence encoder's token states, for the small models.
///
/// Each of `states` is (t_i, d); of each at most `tokens` are taken. Every state is normalised
/// to mean 0 and variance 1 (MiniLM's are small and uneven), then padded with zeros to
/// (b, tokens, d); pooled is the mean over the real tokens, normalised alike. A text of no
/// tokens is all zeros: the empty prompt.
pub fn prompt_of_states(states: &[Tensor], tokens: usize) -> Result<Prompt> {
    let (mut text, mut pooled) = (Vec::new(), Vec::new());
    for one in states {
        let (t, d) = one.dims2()?;
        let one = one.to_dtype(DType::F32)?.narrow(0, 0, t.min(tokens))?;
        if t == 0 || tokens == 0 {
            text.push(Tensor::zeros((1, tokens, d), DType::F32, one.device())?);
            pooled.push(Tensor::zeros((1, d), DType::F32, one.device())?);
            continue;
        }
        let mean = one.mean_keepdim(0)?;
        let one = nn::layer_norm(&one, None, None, 1e-6)?;
        text.push(
            one.pad_with_zeros(0, 0, tokens - t.min(tokens))?
                .unsqueeze(0)?,
        );
        pooled.push(nn::layer_norm(&mean, None, None, 1e-6)?);
    }
    Ok(Prompt {
        text: Tensor::cat(&text, 0)?,
        pooled: Tensor::cat(&pooled, 0)?,
    })
}
