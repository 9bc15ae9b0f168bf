//! Texts as vectors: what an attribute's words mean.
//!
//! MiniLM (BERT; mean over the tokens, length 1) as sentence-transformers computes it. The same
//! code reads any BERT sentence encoder with mean pooling (gte-small, the judge of `eval
//! prompts`), and decoders made into encoders, with the last token's state for a text
//! (Linq-Embed-Mistral, the paper's). The token states serve the small picture model as its text
//! input.
//!
//! Not here: training of encoders.
//!
//! ```no_run
//! use candle_core::Device;
//! use simpatico_engine::text_vectors::TextEncoder;
//! let encoder = TextEncoder::open("models/minilm".as_ref(), &Device::Cpu)?;
//! let vectors = encoder.encode(&["rustic wood", "weathered timber"])?;
//! assert_eq!(vectors[0].len(), 384);
//! # Ok::<(), simpatico_engine::Error>(())
//! ```

use crate::error::{Error, Result};
use crate::lm::{self, Decoder, Placement, Precision};
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::bert::{BertModel, Config};
use simpatico_storage::Store;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use tokenizers::Tokenizer;

/// The most texts in one forward pass.
const BATCH_TEXTS: usize = 64;

/// The networks that are known.
enum Network {
    /// BERT; a text is the mean of its tokens.
    Bert(BertModel),
    /// A decoder; a text is its last token, which has seen the others.
    Decoder {
        decoder: Decoder,
        /// Put behind each text where the tokenizer does not do so itself.
        end: Option<u32>,
    },
}

/// A sentence encoder.
pub struct TextEncoder {
    network: Network,
    tokenizer: Tokenizer,
    device: Device,
    /// Length of a vector.
    pub dim: usize,
    /// Longer texts are cut to so many tokens, the two special ones included.
    pub max_tokens: usize,
}

/// Texts as the network saw them.
pub struct TokenStates {
    /// The last layer's states, (b, t, dim); 0 where the mask is 0.
    pub states: Tensor,
    /// The texts' vectors at length 1, (b, dim): their states' mean, or a decoder's last state.
    pub pooled: Tensor,
    /// (b, t), f32: 1 for a token, 0 for padding.
    pub mask: Tensor,
}

impl TextEncoder {
    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// As [`Self::open`]; but while somebody holds the encoder of this folder on this device, theirs.
    /// The picture model reads instructions with it, the policy wishes, and a store's attributes
    /// get their vectors from it: 90 MB for MiniLM, once.
    pub fn shared(folder: &Path, device: &Device) -> Result<Arc<Self>> {
        static OPEN: Mutex<Vec<(PathBuf, Weak<TextEncoder>)>> = Mutex::new(Vec::new());
        let place = folder.canonicalize().unwrap_or_else(|_| folder.into());
        // Held while it loads: who comes second waits rather than load it too.
        let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
        open.retain(|(_, encoder)| encoder.strong_count() > 0);
        let of_this = open.iter().filter(|(at, _)| *at == place);
        let mut held = of_this.filter_map(|(_, encoder)| encoder.upgrade());
        if let Some(encoder) = held.find(|e| e.device.same_device(device)) {
            return Ok(encoder);
        }
        let encoder = Arc::new(Self::open(folder, device)?);
        open.push((place, Arc::downgrade(&encoder)));
        Ok(encoder)
    }

    /// Opens a folder with config.json, tokenizer.json and model.safetensors (or shards with their
    /// index); the maximum length is sentence_bert_config.json's, or the positions the model has.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let read = |name: &str| -> Result<Vec<u8>> {
            let path = folder.join(name);
            std::fs::read(&path).map_err(|_| Error::MissingModel {
                help: "a sentence encoder has config.json, tokenizer.json and model.safetensors; \
                       `simpatico models pull` fetches it"
                    .into(),
                path,
            })
        };
        let file = |name: &str| folder.join(name).display().to_string();
        let json = |name: &str| -> Result<serde_json::Value> {
            serde_json::from_slice(&read(name)?)
                .map_err(|e| Error::bad_model(file(name), e.to_string()))
        };
        let config = json("config.json")?;
        let mut tokenizer = Tokenizer::from_bytes(read("tokenizer.json")?)
            .map_err(|e| Error::bad_model(file("tokenizer.json"), e.to_string()))?;
        tokenizer.with_padding(None);
        // Texts are cut in `token_ids`: the tokenizer's own cut is a setting of it, and to set it
        // for a call takes a copy of the whole vocabulary.
        let cleared = tokenizer.with_truncation(None).map(|_| ());
        cleared.map_err(|e| Error::bad_model(file("tokenizer.json"), e.to_string()))?;
        let decoder = matches!(
            config["model_type"].as_str(),
            Some("mistral" | "llama" | "qwen2")
        );
        let (network, dim, positions) = if decoder {
            let text = config.to_string();
            let config = lm::Config::from_json(&file("config.json"), &text)?;
            let end = match json("tokenizer_config.json") {
                Ok(settings) if settings["add_eos_token"].as_bool() == Some(true) => {
                    config.eos.first().copied()
                }
                _ => None,
            };
            let weights = Weights::open(folder)?;
            let dense = Precision::Dense(DType::F32);
            let decoder = Decoder::load(&weights, &config, dense, device)?;
            let (dim, positions) = (config.hidden, config.positions);
            (Network::Decoder { decoder, end }, dim, positions)
        } else {
            let weights = folder.join("model.safetensors");
            if !weights.is_file() {
                read("model.safetensors")?;
            }
            let config: Config = serde_json::from_value(config)
                .map_err(|e| Error::bad_model(file("config.json"), e.to_string()))?;
            let vb = Weights::open(&weights)?.var_builder(DType::F32, device);
            let model = BertModel::load(vb, &config)?;
            let (dim, positions) = (config.hidden_size, config.max_position_embeddings);
            (Network::Bert(model), dim, positions)
        };
        let given = match folder.join("sentence_bert_config.json").is_file() {
            true => json("sentence_bert_config.json")?["max_seq_length"].as_u64(),
            false => None,
        };
        let given = given.and_then(|n| usize::try_from(n).ok());
        Ok(Self {
            network,
            tokenizer,
            device: device.clone(),
            dim,
            max_tokens: given.unwrap_or(positions).min(positions),
        })
    }

    /// One vector of length 1 for each text. Texts of like length share a pass, so the order of
    /// work differs from the order given; the answers are in the order given.
    pub fn encode(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|i| texts[*i].len());
        let mut vectors = vec![Vec::new(); texts.len()];
        for chunk in order.chunks(BATCH_TEXTS) {
            let batch: Vec<&str> = chunk.iter().map(|i| texts[*i]).collect();
            let rows = self
                .encode_tokens(&batch, self.max_tokens)?
                .pooled
                .to_vec2::<f32>()?;
            for (i, row) in chunk.iter().zip(rows) {
                vectors[*i] = row;
            }
        }
        Ok(vectors)
    }

    /// Token states, their mean and the mask, padded to the longest text of the batch. Texts
    /// longer than `max_tokens` are cut.
    pub fn encode_tokens(&self, texts: &[&str], max_tokens: usize) -> Result<TokenStates> {
        let rows = self.token_ids(texts, max_tokens.min(self.max_tokens))?;
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let mut ids = vec![0u32; rows.len() * longest];
        let mut mask = vec![0f32; rows.len() * longest];
        for (i, row) in rows.iter().enumerate() {
            ids[i * longest..i * longest + row.len()].copy_from_slice(row);
            mask[i * longest..i * longest + row.len()].fill(1.0);
        }
        let shape = (rows.len(), longest);
        let ids = Tensor::from_vec(ids, shape, &self.device)?;
        let mask = Tensor::from_vec(mask, shape, &self.device)?;
        let (states, of_text) = match &self.network {
            Network::Bert(model) => {
                // The padding adds the lowest f32 to the scores: exp gives exactly 0, so a text's
                // states do not depend on its company beyond the order of additions.
                let states = model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
                let states = states.broadcast_mul(&mask.unsqueeze(2)?)?; // (b, t, dim)
                let count = mask.sum_keepdim(1)?.clamp(1e-9, f64::INFINITY)?;
                let mean = states.sum(1)?.broadcast_div(&count)?; // (b, dim)
                (states, mean)
            }
            Network::Decoder { decoder, .. } => {
                let rows_of_ids: Vec<Vec<u32>> = ids.to_vec2()?;
                let refs: Vec<&[u32]> = rows_of_ids.iter().map(Vec::as_slice).collect();
                // Padding stands behind, where no text's token sees it.
                let x = decoder.embed(&refs)?;
                let states = decoder.hidden(&x, &Placement::Causal, None, None, None)?;
                let last = rows
                    .iter()
                    .enumerate()
                    .map(|(i, row)| states.get(i)?.get(row.len().saturating_sub(1)));
                let last = last.collect::<candle_core::Result<Vec<_>>>()?;
                let states = states.broadcast_mul(&mask.unsqueeze(2)?)?;
                (states, Tensor::stack(&last, 0)?)
            }
        };
        let length = of_text
            .sqr()?
            .sum_keepdim(1)?
            .sqrt()?
            .clamp(1e-12, f64::INFINITY)?;
        Ok(TokenStates {
            pooled: of_text.broadcast_div(&length)?,
            states,
            mask,
        })
    }

    fn token_ids(&self, texts: &[&str], max_tokens: usize) -> Result<Vec<Vec<u32>>> {
        let end = match &self.network {
            Network::Decoder { end, .. } => *end,
            Network::Bert(_) => None,
        };
        let most = max_tokens - usize::from(end.is_some());
        let failed = |e: tokenizers::Error| Error::BadRequest(format!("tokenizing: {e}"));
        let of_text = |text: &&str| {
            let framed = self.tokenizer.encode(text.trim(), true).map_err(failed)?;
            let mut ids = framed.get_ids().to_vec();
            if ids.len() > most {
                // What the tokenizer puts behind a text stays behind what is left of it.
                let specials = framed.get_special_tokens_mask().iter().rev();
                let behind = specials.take_while(|s| **s == 1).count().min(most);
                ids.drain(most - behind..ids.len() - behind);
            }
            if end.is_some() && ids.last().copied() != end {
                ids.extend(end);
            }
            Ok(ids)
        };
        texts.iter().map(of_text).collect()
    }
}

/// Gives every attribute of the store that has none its text vector, in batches; returns how
/// many. `progress` is told how many of how many are done.
pub fn featurize(
    store: &Store,
    encoder: &TextEncoder,
    progress: impl FnMut(usize, usize),
) -> Result<usize> {
    let missing = store.attributes_without_feature();
    featurize_these(store, encoder, &missing, progress)?;
    Ok(missing.len())
}

/// Gives these attributes their text vectors, in batches.
pub fn featurize_these(
    store: &Store,
    encoder: &TextEncoder,
    attributes: &[String],
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    for (n, chunk) in attributes.chunks(BATCH_TEXTS).enumerate() {
        let texts: Vec<&str> = chunk.iter().map(String::as_str).collect();
        let rows: Vec<(String, Vec<f32>)> =
            chunk.iter().cloned().zip(encoder.encode(&texts)?).collect();
        store
            .set_features(&rows)
            .map_err(|e| Error::BadRequest(format!("storing attribute vectors: {e}")))?;
        progress(n * BATCH_TEXTS + chunk.len(), attributes.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MiniLM is not in the repository; it is looked for where `models pull` puts it.
    fn minilm() -> Option<TextEncoder> {
        let folder = std::env::var_os("SIMPATICO_MINILM").map(std::path::PathBuf::from)?;
        TextEncoder::open(&folder, &Device::Cpu).ok()
    }

    #[test]
    fn a_decoders_sentence_vectors_are_those_of_transformers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lm/mistral");
        let encoder = TextEncoder::open(&folder, &Device::Cpu).unwrap();
        let golden = std::fs::read(folder.join("sentences.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_slice(&golden).unwrap();
        let golden = golden.as_array().unwrap();
        let texts: Vec<&str> = golden.iter().map(|g| g["text"].as_str().unwrap()).collect();
        for (vector, want) in encoder.encode(&texts).unwrap().iter().zip(golden) {
            let want = want["vector"].as_array().unwrap();
            assert_eq!(vector.len(), want.len());
            for (x, y) in vector.iter().zip(want) {
                assert!((f64::from(*x) - y.as_f64().unwrap()).abs() <= 1e-4);
            }
        }
    }

    #[test]
    fn whoever_asks_for_the_same_folder_shares_its_encoder_while_it_is_held() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/lm/mistral");
        let encoder = TextEncoder::shared(&folder, &Device::Cpu).unwrap();
        let round_about = folder.join("../mistral");
        let again = TextEncoder::shared(&round_about, &Device::Cpu).unwrap();
        assert!(Arc::ptr_eq(&encoder, &again));
        let gone = Arc::downgrade(&encoder);
        drop((encoder, again));
        assert!(gone.upgrade().is_none(), "nobody holds it any more");
        assert!(TextEncoder::shared(&folder, &Device::Cpu).is_ok());
        assert!(TextEncoder::shared(Path::new("/nowhere"), &Device::Cpu).is_err());
    }

    #[test]
    fn long_texts_are_cut_before_what_the_tokenizer_puts_behind_them() {
        let Some(encoder) = minilm() else {
            eprintln!("skipped: SIMPATICO_MINILM names no folder with MiniLM");
            return;
        };
        let long = "red ".repeat(1000);
        let ids = encoder.token_ids(&[&long, "red"], 6).unwrap();
        let [start, red, end] = ids[1][..] else {
            panic!("{:?}", ids[1]);
        };
        assert_eq!(ids[0], [start, red, red, red, red, end]);
    }

    #[test]
    fn sentence_vectors_equal_those_of_sentence_transformers() {
        let Some(encoder) = minilm() else {
            eprintln!("skipped: SIMPATICO_MINILM names no folder with MiniLM");
            return;
        };
        let golden: serde_json::Value = serde_json::from_str(include_str!(
            "../../tests/golden/policy/minilm_sentences.json"
        ))
        .unwrap();
        let texts: Vec<&str> = golden["sentences"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s.as_str().unwrap())
            .collect();
        let vectors = encoder.encode(&texts).unwrap();
        let mut worst = 0f64;
        for (row, want) in vectors.iter().zip(golden["vectors"].as_array().unwrap()) {
            for (x, y) in row.iter().zip(want.as_array().unwrap()) {
                worst = worst.max((f64::from(*x) - y.as_f64().unwrap()).abs());
            }
        }
        assert!(worst <= 1e-4, "largest difference {worst}");
        eprintln!("largest difference {worst:.2e}");
    }
}
