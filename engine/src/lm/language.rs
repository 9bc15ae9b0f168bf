//! A model, its tokenizer and its template, opened together.

use super::{Config, Decoder, Precision};
use crate::chat::{ChatTemplate, Turn};
use crate::lora::{Adapter, LoraConfig};
use crate::tokenizer::Tokenizer;
use crate::weights::{Weights, read_text};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::Path;

/// A decoder with the tokenizer and chat template that belong to it.
#[derive(Clone, Debug)]
pub struct LanguageModel {
    /// The network.
    pub decoder: Decoder,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, where the files have one.
    pub template: Option<ChatTemplate>,
    /// The tokens that end an answer.
    pub stop: Vec<u32>,
}

/// Texts of tokens that end an answer in the families we know, whether or not the file
/// names them so.
const ENDS: [&str; 4] = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"];

impl LanguageModel {
    /// Opens a GGUF file, or a folder with `config.json`, `tokenizer.json`, safetensors, and
    /// perhaps `tokenizer_config.json` (or with one GGUF file).
    pub fn open(path: &Path, precision: Precision, device: &Device) -> Result<Self> {
        let weights = Weights::open(path)?;
        let (config, tokenizer, template) = match weights.gguf() {
            Some(header) => {
                let tokenizer = Tokenizer::from_gguf(weights.name(), header)?;
                let template = ChatTemplate::from_gguf(&weights, &tokenizer)?;
                (Config::from_gguf(&weights)?, tokenizer, template)
            }
            None => {
                let folder = match path.is_dir() {
                    true => path,
                    false => path.parent().unwrap_or(Path::new(".")),
                };
                let config = folder.join("config.json");
                let text = read_text(&config, 1 << 20)?;
                let config = Config::from_json(&config.display().to_string(), &text)?;
                let tokenizer = Tokenizer::open(&folder.join("tokenizer.json"))?;
                let template = ChatTemplate::open(folder, &tokenizer)?;
                (config, tokenizer, template)
            }
        };
        if let Some((token, id)) = tokenizer
            .specials()
            .iter()
            .find(|(_, id)| **id as usize >= config.vocab)
        {
            return Err(Error::bad_model(
                weights.name(),
                format!(
                    "the token {token:?} has id {id}, but the model has {} embeddings",
                    config.vocab
                ),
            ));
        }
        let mut stop = config.eos.clone();
        stop.extend(tokenizer.eos);
        stop.extend(ENDS.iter().filter_map(|t| tokenizer.specials().get(*t)));
        stop.sort_unstable();
        stop.dedup();
        let decoder = Decoder::load(&weights, &config, precision, device);
        let instead = "use a bundle with a smaller language model, or --device cpu";
        Ok(Self {
            decoder: decoder.map_err(|e| e.during("loading the language model", instead))?,
            tokenizer,
            template,
            stop,
        })
    }

    /// The ids of a chat, the model's turn opened at the end where `answer_next`.
    pub fn chat(&self, turns: &[Turn], answer_next: bool, max_tokens: usize) -> Result<Vec<u32>> {
        let Some(template) = &self.template else {
            return Err(Error::BadRequest(
                "the model came without a chat template; add chat_template.jinja to its folder"
                    .into(),
            ));
        };
        template.encode(&self.tokenizer, turns, answer_next, max_tokens)
    }

    /// The embeddings of one row of ids: [1, t, hidden].
    pub fn embed_tokens(&self, ids: &[u32]) -> Result<Tensor> {
        self.decoder.embed(&[ids])
    }

    /// A fresh adapter for this model, its factors variables.
    pub fn trainable(&self, config: LoraConfig, seed: u64) -> Result<Adapter> {
        Adapter::fresh(config, &self.decoder.config, seed, self.decoder.device())
    }

    /// Loads an adapter that fits this model.
    pub fn load_adapter(&self, folder: &Path) -> Result<Adapter> {
        Adapter::load(folder, &self.decoder.config, self.decoder.device())
    }
}
