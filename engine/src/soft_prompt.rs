//! The soft prompt: a user's embedding as eight tokens that no word stands for.
//!
//! Two linear maps with a GELU between (the paper's two-layer MLP), reshaped to
//! [tokens, hidden] and put at the very front of the sequence, before the system turn. The
//! embedding is first brought to length √d, and the output is scaled to the size of the language
//! model's own token embeddings, so that a fresh soft prompt neither drowns nor is drowned. Where
//! the tokens are *bounded*, none is larger than that, however sure the maps are of what they say.
//!
//! Not here: who has which embedding (`storage`), or how it is trained (`train_policy`).

use crate::error::{Error, Result};
use crate::nn::{self, Linear};
use crate::params::{Params, load_tensors};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The sizes of a soft prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoftPromptConfig {
    /// Length of a user's embedding.
    pub embedding: usize,
    /// Width between the two maps.
    pub inner: usize,
    /// How many tokens.
    pub tokens: usize,
    /// The language model's width.
    pub hidden: usize,
    /// Factor on the output.
    pub scale: f64,
    /// Whether embeddings are brought to length √d first.
    pub normalize: bool,
    /// Whether each token t, in units of `scale`, becomes t / √(mean t² + [`SILENCE`]²): small ones
    /// stay small, larger ones come to size 1.
    #[serde(default)]
    pub bounded: bool,
    /// The vector that stands for everyone, where training gave each of its users one of their
    /// own and no graph gives one to anybody else (DPO-user): their mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub everyone: Option<Vec<f32>>,
}

/// The size of a bounded token, in units of its scale, below which it says hardly anything.
pub const SILENCE: f64 = 0.3;

/// The maps.
#[derive(Clone, Debug)]
pub struct SoftPrompt {
    /// Its sizes.
    pub config: SoftPromptConfig,
    first: Linear,
    second: Linear,
}

impl SoftPrompt {
    /// Takes `mlp.0` and `mlp.2` from the builder.
    pub fn new(config: SoftPromptConfig, vb: VarBuilder) -> Result<Self> {
        let vb = vb.pp("mlp");
        Ok(Self {
            first: nn::linear(config.embedding, config.inner, vb.pp("0"))?,
            second: nn::linear(config.inner, config.tokens * config.hidden, vb.pp("2"))?,
            config,
        })
    }

    /// A fresh one in its own parameters.
    pub fn fresh(config: SoftPromptConfig, seed: u64, device: &Device) -> Result<(Self, Params)> {
        let params = Params::new(seed, device.clone());
        let soft = Self::new(config, params.builder(DType::F32))?;
        Ok((soft, params))
    }

    /// Embeddings (b, d) to soft tokens (b, tokens, hidden).
    pub fn forward(&self, embeddings: &Tensor) -> Result<Tensor> {
        let (b, d) = embeddings.dims2()?;
        if d != self.config.embedding {
            return Err(Error::BadRequest(format!(
                "the soft prompt expects embeddings of {} numbers, got {d}; the encoder and the \
                 policy belong to different bundles",
                self.config.embedding
            )));
        }
        let x = self.unit(embeddings)?;
        let inner = nn::gelu_erf(&self.first.forward(&x)?)?; // (b, inner)
        let out = self.second.forward(&inner)?;
        let mut out = out.reshape((b, self.config.tokens, self.config.hidden))?;
        if self.config.bounded {
            let size = (out.sqr()?.mean_keepdim(2)? + SILENCE * SILENCE)?.sqrt()?;
            out = out.broadcast_div(&size)?;
        }
        Ok(out.affine(self.config.scale, 0.0)?)
    }

    /// Embeddings (b, d) as the first map takes them.
    pub fn unit(&self, embeddings: &Tensor) -> Result<Tensor> {
        Ok(match self.config.normalize {
            true => {
                let length = (embeddings.sqr()?.mean_keepdim(1)? + 1e-12)?.sqrt()?;
                embeddings.broadcast_div(&length)?
            }
            false => embeddings.clone(),
        })
    }

    /// Tokens (1, tokens, hidden) for one user, whose embedding `own` reads if it is wanted.
    pub fn of_user(&self, own: impl FnOnce() -> Result<Vec<f32>>) -> Result<Tensor> {
        let vector = match &self.config.everyone {
            Some(mean) => mean.clone(),
            None => own()?,
        };
        let n = vector.len();
        self.forward(&Tensor::from_vec(
            vector,
            (1, n),
            self.first.weight().device(),
        )?)
    }

    /// Writes parameters that [`Self::fresh`] made, with the sizes in the file's metadata.
    pub fn save(
        config: &SoftPromptConfig,
        params: &Params,
        path: &Path,
        dtype: DType,
    ) -> Result<()> {
        let json = serde_json::to_string(config)
            .map_err(|e| Error::BadRequest(format!("soft prompt sizes: {e}")))?;
        params.save(path, dtype, &[("simpatico", json)])
    }

    /// Opens a file of [`Self::save`], with its parameters, ready to run or to train on.
    pub fn load(path: &Path, device: &Device) -> Result<(Self, Params)> {
        let file = path.display().to_string();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let bad = |reason: String| Error::bad_model(&file, reason);
        let (_, header) =
            safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let json = header.metadata().as_ref().and_then(|m| m.get("simpatico"));
        let json = json.ok_or_else(|| bad("expected the metadata key \"simpatico\"".into()))?;
        let config: SoftPromptConfig =
            serde_json::from_str(json).map_err(|e| bad(format!("metadata: {e}")))?;
        let found = load_tensors(path, device)?;
        let want = [
            ("mlp.0.weight", vec![config.inner, config.embedding]),
            (
                "mlp.2.weight",
                vec![config.tokens * config.hidden, config.inner],
            ),
        ];
        for (name, shape) in want {
            let got = found.get(name).map(|t| t.dims().to_vec());
            if got.as_ref() != Some(&shape) {
                return Err(bad(format!(
                    "{name}: expected shape {shape:?}, got {got:?}"
                )));
            }
        }
        let (soft, params) = Self::fresh(config, 0, device)?;
        params.load(path)?;
        Ok((soft, params))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    #[test]
    fn a_fresh_soft_prompt_says_something_and_is_of_the_size_asked_for() {
        let config = SoftPromptConfig {
            embedding: 32,
            inner: 64,
            tokens: 8,
            hidden: 48,
            scale: 0.1,
            normalize: true,
            bounded: false,
            everyone: None,
        };
        let (soft, _) = SoftPrompt::fresh(config, 3, &Device::Cpu).unwrap();
        let users = Tensor::from_vec(Philox::new(1, 1).normals(64), (2, 32), &Device::Cpu).unwrap();
        let tokens = soft.forward(&users).unwrap();
        let size = tokens.sqr().unwrap().mean_all().unwrap();
        let size = size.to_scalar::<f32>().unwrap().sqrt();
        assert!((0.005..0.2).contains(&size), "{size}");
    }

    #[test]
    fn a_soft_prompt_saves_loads_and_refuses_what_does_not_fit() {
        let config = SoftPromptConfig {
            embedding: 6,
            inner: 5,
            tokens: 8,
            hidden: 4,
            scale: 0.5,
            normalize: true,
            bounded: false,
            everyone: None,
        };
        let (soft, params) = SoftPrompt::fresh(config.clone(), 3, &Device::Cpu).unwrap();
        let x = Tensor::new(&[[1f32, 2.0, 3.0, -1.0, 0.0, 0.5]], &Device::Cpu).unwrap();
        let y = soft.forward(&x).unwrap();
        assert_eq!(y.dims(), [1, 8, 4]);
        // Only the direction of an embedding counts.
        let twice = soft.forward(&(&x * 2.0).unwrap()).unwrap();
        let apart = (twice - &y).unwrap().abs().unwrap().max_all().unwrap();
        assert!(apart.to_scalar::<f32>().unwrap() < 1e-5);
        let path = std::env::temp_dir().join(format!("simpatico-soft-{}", std::process::id()));
        SoftPrompt::save(&config, &params, &path, DType::F32).unwrap();
        let (back, _) = SoftPrompt::load(&path, &Device::Cpu).unwrap();
        let z = back.forward(&x).unwrap();
        assert_eq!(
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            z.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
        assert!(
            back.forward(&Tensor::zeros((1, 7), DType::F32, &Device::Cpu).unwrap())
                .is_err()
        );
        // A vector for everyone takes the place of the user's own.
        let everyone = SoftPromptConfig {
            everyone: Some(vec![1.0, 2.0, 3.0, -1.0, 0.0, 0.5]),
            ..config
        };
        SoftPrompt::save(&everyone, &params, &path, DType::F32).unwrap();
        let (back, _) = SoftPrompt::load(&path, &Device::Cpu).unwrap();
        let for_all = back.of_user(|| unreachable!("nobody's own is asked for"));
        let gap = (for_all.unwrap() - &y).unwrap().abs().unwrap().max_all();
        assert!(gap.unwrap().to_scalar::<f32>().unwrap() < 1e-6);
        std::fs::write(&path, b"short").unwrap();
        assert!(SoftPrompt::load(&path, &Device::Cpu).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
