//! Words for Flux: CLIP's text model (pooled) of FLUX.1, and the plain path of the small models,
//! whose token states come from any sentence encoder. FLUX.1's token states are
//! [`super::t5`]'s.
//!
//! CLIP is candle-transformers', but pooled at the first end token, found on the host (its
//! arg-max over ids depends on how ties are broken, and padding has the end token's number).
//!
//! Tokenizers are not here: ids come in, padded by [`padded`].

use crate::sampler::Prompt;
use crate::text_vectors::TextEncoder;
use crate::{Error, Result, nn};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::text_model as clip;
use rayon::prelude::*;
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
pub(super) fn ids_tensor(ids: &[Vec<u32>], vocabulary: usize, device: &Device) -> Result<Tensor> {
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

/// The prompt of some texts by a sentence encoder, a row each: one text a pass, since what it says
/// must not depend on its company in a batch; of a blank one nothing is read.
pub fn prompt_of_texts(encoder: &TextEncoder, texts: &[&str], tokens: usize) -> Result<Prompt> {
    let states = |text: &&str| {
        let states = encoder.encode_tokens(&[*text], tokens)?.states.squeeze(0)?;
        let read = if text.trim().is_empty() {
            0
        } else {
            states.dim(0)?
        };
        Ok(states.narrow(0, 0, read)?)
    };
    let states: Vec<Tensor> = match encoder.device().is_cpu() {
        true => texts.par_iter().map(states).collect::<Result<_>>()?,
        false => texts.iter().map(states).collect::<Result<_>>()?,
    };
    prompt_of_states(&states, tokens)
}

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
