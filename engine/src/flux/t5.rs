//! T5's encoder: the token states that FLUX.1 reads.
//!
//! A pre-norm transformer: attention without scaling whose scores get a bias by the distance of
//! the two tokens (the first block's, for all blocks), then a gated MLP. Padding is seen like
//! any token, as FLUX.1 was trained.
//!
//! In half precision products are computed in it, and the rest in f32: the sum that runs through
//! the blocks, norms, scores and softmax. (candle-transformers' T5 computes softmax in bf16 on a
//! CPU and the running sum everywhere: in bf16 it is 2.1 % off the golden file, transformers' 1.7 %,
//! this 1.5 %. T5-XXL's sum overflows f16.)
//!
//! Weights have transformers' names, or llama.cpp's (GGUF). Reference: transformers 5.24
//! `modeling_t5.py`.

use super::text::ids_tensor;
use crate::nn::{self, Linear, Mask, linear_no_bias};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// The shape of a T5 encoder, with the field names of its `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
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

impl Default for Config {
    fn default() -> Self {
        Self::xxl()
    }
}

impl Config {
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

    /// Whether the MLP is gated.
    fn gated(&self) -> Result<bool> {
        match self.feed_forward_proj.as_str() {
            "gated-gelu" => Ok(true),
            "relu" => Ok(false),
            other => Err(Error::bad_model(
                "config.json",
                format!("feed_forward_proj: expected gated-gelu or relu, got {other:?}"),
            )),
        }
    }
}

/// x / sqrt(mean(x²) + eps)·w of f32 x, in the dtype of w.
struct Norm {
    weight: Tensor,
    eps: f64,
}

impl Norm {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get(config.d_model, "weight")?,
            eps: config.layer_norm_epsilon,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = nn::rms_norm(x, &self.weight.to_dtype(x.dtype())?, self.eps)?;
        Ok(normed.to_dtype(self.weight.dtype())?)
    }
}

struct Block {
    norm_attention: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm_mlp: Norm,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    heads: usize,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let (d, inner) = (config.d_model, config.num_heads * config.d_kv);
        let vb = vb.pp("layer");
        let attention = vb.pp("0.SelfAttention");
        let mlp = vb.pp("1.DenseReluDense");
        let gated = config.gated()?;
        Ok(Self {
            norm_attention: Norm::new(config, vb.pp("0.layer_norm"))?,
            q: linear_no_bias(d, inner, attention.pp("q"))?,
            k: linear_no_bias(d, inner, attention.pp("k"))?,
            v: linear_no_bias(d, inner, attention.pp("v"))?,
            o: linear_no_bias(inner, d, attention.pp("o"))?,
            norm_mlp: Norm::new(config, vb.pp("1.layer_norm"))?,
            gate: match gated {
                true => Some(linear_no_bias(d, config.d_ff, mlp.pp("wi_0"))?),
                false => None,
            },
            up: linear_no_bias(d, config.d_ff, mlp.pp(if gated { "wi_1" } else { "wi" }))?,
            down: linear_no_bias(config.d_ff, d, mlp.pp("wo"))?,
            heads: config.num_heads,
        })
    }

    /// x (b, t, d_model) f32 after the block; `bias` (1, heads, t, t) is added to the scores.
    fn forward(&self, x: &Tensor, bias: &Mask) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let normed = self.norm_attention.forward(x)?;
        let heads = |linear: &Linear| -> Result<Tensor> {
            let y = linear.forward(&normed)?.reshape((b, t, self.heads, ()))?;
            Ok(y.transpose(1, 2)?.contiguous()?) // (b, heads, t, d_kv)
        };
        let (q, k, v) = (heads(&self.q)?, heads(&self.k)?, heads(&self.v)?);
        let attended = nn::attention(&q, &k, &v, 1.0, bias)?;
        let attended = attended.transpose(1, 2)?.reshape((b, t, ()))?;
        let x = (x + self.o.forward(&attended)?.to_dtype(x.dtype())?)?;
        let normed = self.norm_mlp.forward(&x)?;
        let up = self.up.forward(&normed)?;
        let inside = match &self.gate {
            Some(gate) => (nn::gelu_tanh(&gate.forward(&normed)?)? * up)?,
            None => up.relu()?,
        };
        Ok((&x + self.down.forward(&inside)?.to_dtype(x.dtype())?)?)
    }
}

/// The encoder.
pub struct T5 {
    embedding: Tensor,
    /// The bias of each bucket and head, f32.
    biases: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    config: Config,
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

impl T5 {
    /// From weights with transformers' names, or llama.cpp's.
    pub fn new(config: &Config, vb: VarBuilder<'static>) -> Result<Self> {
        let vb = match vb.contains_tensor("token_embd.weight") {
            true => vb.rename_f(|name| llama_cpp_name(name).unwrap_or_else(|| name.into())),
            false => vb,
        };
        let name = match vb.contains_tensor("shared.weight") {
            true => "shared.weight",
            false => "encoder.embed_tokens.weight",
        };
        let (buckets, heads) = (config.relative_attention_num_buckets, config.num_heads);
        let blocks = vb.pp("encoder.block");
        let biases = blocks.pp("0.layer.0.SelfAttention.relative_attention_bias");
        Ok(Self {
            embedding: vb.get((config.vocab_size, config.d_model), name)?,
            biases: biases
                .get((buckets, heads), "weight")?
                .to_dtype(DType::F32)?,
            blocks: (0..config.num_layers)
                .map(|i| Block::new(config, blocks.pp(i)))
                .collect::<Result<_>>()?,
            norm: Norm::new(config, vb.pp("encoder.final_layer_norm"))?,
            config: config.clone(),
        })
    }

    /// Token states (b, t, d_model). FLUX.1 takes 512 tokens, padded with 0.
    pub fn states(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let device = self.embedding.device();
        let ids = ids_tensor(ids, self.config.vocab_size, device)?;
        let (b, t) = ids.dims2()?;
        let buckets: Vec<u32> = (0..t)
            .flat_map(|query| (0..t).map(move |key| (query, key)))
            .map(|(query, key)| bucket(&self.config, query, key))
            .collect();
        let buckets = Tensor::from_vec(buckets, t * t, device)?;
        let bias = self.biases.index_select(&buckets, 0)?.t()?;
        let bias = Mask::Additive(bias.reshape((1, self.config.num_heads, t, t))?);
        let x = self.embedding.index_select(&ids.flatten_all()?, 0)?;
        let mut x = x.reshape((b, t, ()))?.to_dtype(DType::F32)?;
        for block in &self.blocks {
            x = block.forward(&x, &bias)?;
        }
        self.norm.forward(&x)
    }
}

/// The bucket of a distance: half of them for keys after the query. Of each half the first half
/// is one distance each, the rest ever more in equal ratios up to the greatest.
fn bucket(config: &Config, query: usize, key: usize) -> u32 {
    let half = config.relative_attention_num_buckets / 2;
    let exact = half / 2;
    let distance = query.abs_diff(key);
    let of_distance = match distance < exact {
        true => distance,
        false => {
            let most = config.relative_attention_max_distance as f32 / exact as f32;
            let share = (distance as f32 / exact as f32).ln() / most.ln();
            (exact + (share * (half - exact) as f32) as usize).min(half - 1)
        }
    };
    (of_distance + if key > query { half } else { 0 }) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_fall_into_transformers_buckets() {
        // Where `T5Attention._relative_position_bucket` (32 buckets, 128) begins a new one.
        let begins = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91];
        let config = Config::xxl();
        for distance in 0..600 {
            let expected = begins.iter().filter(|b| **b <= distance).count() as u32 - 1;
            assert_eq!(bucket(&config, distance, 0), expected, "{distance}");
            if distance > 0 {
                assert_eq!(bucket(&config, 0, distance), 16 + expected, "{distance}");
            }
        }
    }
}
