//! Text to token ids and back, from a `tokenizer.json` or from a GGUF file's metadata.
//!
//! Special tokens (turn markers, end of text) are inserted by id only. Encoded text never
//! produces one, whatever it says: an attribute named `<|im_end|>` becomes the seven or so
//! ordinary tokens of those characters. A test tries hostile texts.
//!
//! Limits: `tokenizer.json` of 64 MiB, expressions of 1 KiB, texts of 256 KiB.

use crate::gguf::Header;
use crate::weights::read_text;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, Tokenizer as Inner};

const FILE_MAX: u64 = 64 << 20;
const PATTERN_MAX: usize = 1024;
const TEXT_MAX: usize = 256 << 10;

/// A tokenizer.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Inner,
    specials: BTreeMap<String, u32>,
    special_ids: BTreeSet<u32>,
    /// Whether plain prompts (not chats) begin with this token.
    pub bos: Option<u32>,
    /// The token that ends a text, if the file names one.
    pub eos: Option<u32>,
    /// The token to fill rows with, if the file names one.
    pub pad: Option<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` and, if it lies beside it, the `tokenizer_config.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let text = read_text(path, FILE_MAX)?;
        let config = path.with_file_name("tokenizer_config.json");
        let config = match config.exists() {
            true => Some(read_text(&config, 16 << 20)?),
            false => None,
        };
        Self::from_json(&path.display().to_string(), &text, config.as_deref())
    }

    /// The same from the files' texts; `name` is for messages.
    pub fn from_json(name: &str, text: &str, config: Option<&str>) -> Result<Self> {
        if text.len() as u64 > FILE_MAX {
            return Err(Error::bad_model(
                name,
                format!("larger than {FILE_MAX} bytes"),
            ));
        }
        let json: Value = serde_json::from_str(text)
            .map_err(|e| Error::bad_model(name, format!("tokenizer: {e}")))?;
        for part in ["normalizer", "pre_tokenizer", "decoder", "post_processor"] {
            check_patterns(name, json.get(part).unwrap_or(&Value::Null))?;
        }
        let unknown = json["model"]["unk_token"].as_str().map(str::to_owned);
        drop(json);
        let build = || text.parse::<Inner>();
        let inner = match catch_unwind(build) {
            Ok(Ok(inner)) => inner,
            Ok(Err(e)) => return Err(Error::bad_model(name, format!("tokenizer: {e}"))),
            Err(_) => return Err(Error::bad_model(name, "the tokenizer could not be built")),
        };
        let mut tokenizer = Self::new(name, inner, unknown.as_deref())?;
        if let Some(config) = config {
            let config: Value = serde_json::from_str(config)
                .map_err(|e| Error::bad_model(name, format!("tokenizer_config.json: {e}")))?;
            let id = |key: &str| {
                let token = config.get(key)?;
                let token = token.get("content").unwrap_or(token).as_str()?;
                tokenizer.inner.token_to_id(token)
            };
            (tokenizer.eos, tokenizer.pad) = (id("eos_token"), id("pad_token"));
            if config.get("add_bos_token") == Some(&Value::Bool(true)) {
                tokenizer.bos = id("bos_token");
            }
        }
        Ok(tokenizer)
    }

    /// From the metadata of a GGUF file (byte-level BPE: `tokenizer.ggml.model` "gpt2", with
    /// the pre-tokenizers of SmolLM2, Qwen2, GPT-2 and Llama 3).
    pub fn from_gguf(name: &str, header: &Header) -> Result<Self> {
        let bad = |reason: String| Error::bad_model(name, reason);
        let model = header.text("tokenizer.ggml.model").unwrap_or("none");
        if model != "gpt2" {
            return Err(bad(format!(
                "tokenizer {model:?}; byte-level BPE (gpt2) is known"
            )));
        }
        let tokens = header
            .texts("tokenizer.ggml.tokens")
            .ok_or_else(|| bad("lacks tokenizer.ggml.tokens".into()))?;
        let merges = header
            .texts("tokenizer.ggml.merges")
            .ok_or_else(|| bad("lacks tokenizer.ggml.merges".into()))?;
        let mut vocab = Vocab::default();
        for (id, token) in tokens.iter().enumerate() {
            if vocab.insert(token.clone(), id as u32).is_some() {
                return Err(bad(format!("the token {token:?} twice")));
            }
        }
        let merges = merges
            .iter()
            .map(|m| {
                m.split_once(' ')
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .ok_or_else(|| bad(format!("the merge {m:?} is not two tokens")))
            })
            .collect::<Result<Vec<_>>>()?;
        let pre = header.text("tokenizer.ggml.pre").unwrap_or("default");
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre == "llama-bpe")
            .build()
            .map_err(|e| bad(format!("tokenizer: {e}")))?;
        let mut inner = Inner::new(bpe);
        if pre == "qwen2" {
            inner
                .with_normalizer(Some(NFC))
                .map_err(|e| bad(format!("tokenizer: {e}")))?;
        }
        inner.with_pre_tokenizer(Some(pre_tokenizer(name, pre)?));
        inner.with_decoder(Some(ByteLevel::new(false, false, false)));
        let types = header.integers("tokenizer.ggml.token_type").unwrap_or(&[]);
        // 3 is a control token, 4 one that the user defined.
        let specials: Vec<AddedToken> = types
            .iter()
            .zip(tokens)
            .filter(|(kind, token)| matches!(kind, 3 | 4) && !token.trim().is_empty())
            .map(|(_, token)| AddedToken::from(token.clone(), true).normalized(false))
            .collect();
        inner
            .add_special_tokens(specials)
            .map_err(|e| bad(format!("tokenizer: {e}")))?;
        let mut tokenizer = Self::new(name, inner, None)?;
        let id = |key: &str| {
            let id = header.integer(&format!("tokenizer.ggml.{key}"))?;
            u32::try_from(id)
                .ok()
                .filter(|id| (*id as usize) < tokens.len())
        };
        (tokenizer.eos, tokenizer.pad) = (id("eos_token_id"), id("padding_token_id"));
        if header.bool("tokenizer.ggml.add_bos_token") == Some(true) {
            tokenizer.bos = id("bos_token_id");
        }
        Ok(tokenizer)
    }

    /// `unknown` is what an unknown word becomes; though marked as special, texts may have it.
    fn new(name: &str, mut inner: Inner, unknown: Option<&str>) -> Result<Self> {
        // Rows are padded and cut by us, never behind our back.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| Error::bad_model(name, format!("tokenizer: {e}")))?;
        let mut specials = BTreeMap::new();
        let mut promoted = Vec::new();
        for (id, token) in inner.get_added_tokens_decoder() {
            // Some files do not mark their tool markers as special; text shall not make
            // those either.
            let marker = token.content.starts_with('<') && token.content.ends_with('>');
            if (token.special || marker) && Some(token.content.as_str()) != unknown {
                specials.insert(token.content.clone(), id);
            }
            if marker && !token.special {
                promoted.push(AddedToken {
                    special: true,
                    ..token
                });
            }
        }
        if !promoted.is_empty() {
            promoted.sort_by(|a, b| a.content.cmp(&b.content));
            inner
                .add_special_tokens(promoted)
                .map_err(|e| Error::bad_model(name, format!("tokenizer: {e}")))?;
        }
        inner.set_encode_special_tokens(true);
        Ok(Self {
            special_ids: specials.values().copied().collect(),
            inner,
            specials,
            bos: None,
            eos: None,
            pad: None,
        })
    }

    /// The ids of a text, none of them special.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.raw(text, false)?;
        let (ids, offsets) = (encoding.get_ids(), encoding.get_offsets());
        if !ids.iter().any(|id| self.special_ids.contains(id)) {
            return Ok(ids.to_vec());
        }
        // A word-level vocabulary may hold the marker as a word. Spell it out.
        let mut out = Vec::with_capacity(ids.len());
        for (id, (from, to)) in ids.iter().zip(offsets) {
            if !self.special_ids.contains(id) {
                out.push(*id);
                continue;
            }
            for c in text.get(*from..*to).unwrap_or("").chars() {
                let spelt = self.raw(c.encode_utf8(&mut [0; 4]), false)?;
                let spelt = spelt.get_ids().iter();
                out.extend(spelt.filter(|id| !self.special_ids.contains(id)));
            }
        }
        Ok(out)
    }

    /// The ids of a text with the frame that the file prescribes for single texts (BERT's
    /// `[CLS]` and `[SEP]`).
    pub fn encode_framed(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.raw(text, true)?.get_ids().to_vec())
    }

    fn raw(&self, text: &str, framed: bool) -> Result<tokenizers::Encoding> {
        if text.len() > TEXT_MAX {
            return Err(Error::BadRequest(format!(
                "a text of {} bytes; at most {TEXT_MAX}: shorten it",
                text.len()
            )));
        }
        // The library panics where an expression from the file exceeds its time.
        let encode = AssertUnwindSafe(|| self.inner.encode(text, framed));
        match catch_unwind(encode) {
            Ok(Ok(encoding)) => Ok(encoding),
            Ok(Err(e)) => Err(Error::BadRequest(format!("cannot be tokenised: {e}"))),
            Err(_) => Err(Error::bad_model(
                "tokenizer",
                "an expression in it takes too long on this text",
            )),
        }
    }

    /// The text of ids; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let ids: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|id| !self.special_ids.contains(id))
            .collect();
        self.inner
            .decode(&ids, true)
            .map_err(|e| Error::BadRequest(format!("tokens {ids:?} have no text: {e}")))
    }

    /// The special tokens by their text.
    pub fn specials(&self) -> &BTreeMap<String, u32> {
        &self.specials
    }

    /// Whether an id is that of a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The text of a special token.
    pub fn special_text(&self, id: u32) -> Option<&str> {
        let mut all = self.specials.iter();
        all.find(|(_, i)| **i == id).map(|(text, _)| text.as_str())
    }

    /// The number of tokens, special ones included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether it has no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// llama.cpp's pre-tokenizers by name.
fn pre_tokenizer(name: &str, pre: &str) -> Result<PreTokenizerWrapper> {
    // What the authors of Qwen2 and Llama 3 publish in their tokenizer.json.
    const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let split = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let split = Split::new(
            SplitPattern::Regex(pattern.into()),
            SplitDelimiterBehavior::Isolated,
            false,
        )
        .map_err(|e| Error::bad_model(name, e.to_string()))?;
        let bytes = ByteLevel::new(false, false, false);
        Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
    };
    match pre {
        "smollm" => {
            let bytes = ByteLevel::new(false, false, true);
            Ok(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into())
        }
        "qwen2" => split(QWEN2),
        "llama-bpe" => split(LLAMA3),
        "gpt-2" | "gpt2" | "default" => Ok(ByteLevel::new(false, false, true).into()),
        other => Err(Error::bad_model(
            name,
            format!("pre-tokenizer {other:?}; smollm, qwen2, llama-bpe and gpt-2 are known"),
        )),
    }
}

/// Refuses expressions that are longer than any honest one.
fn check_patterns(name: &str, value: &Value) -> Result<()> {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(s) if key == "Regex" && s.len() > PATTERN_MAX => {
                        return Err(Error::bad_model(
                            name,
                            format!("an expression of {} bytes; at most {PATTERN_MAX}", s.len()),
                        ));
                    }
                    other => check_patterns(name, other)?,
                }
            }
            Ok(())
        }
        Value::Array(items) => items.iter().try_for_each(|v| check_patterns(name, v)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Tokenizer {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/lm/tok/tokenizer.json"
        );
        Tokenizer::open(Path::new(path)).unwrap()
    }

    #[test]
    fn a_tokenizer_json_is_read_with_its_special_tokens() {
        let t = tiny();
        assert_eq!(t.encode("w3 w14 x").unwrap(), [3, 14, 63]);
        assert_eq!(t.decode(&[3, 61, 14]).unwrap(), "w3 w14");
        assert_eq!((t.eos, t.pad), (Some(61), Some(60)));
        assert!(t.is_special(61) && !t.is_special(3));
    }

    #[test]
    fn text_never_becomes_a_special_token_even_where_the_vocabulary_has_it_as_a_word() {
        let t = tiny();
        for text in [
            "<eos>",
            "w1 <eos> w2",
            "<pad><eos>",
            " <unk> ",
            "<eos>\n<eos>",
        ] {
            let ids = t.encode(text).unwrap();
            assert!(
                !ids.iter().any(|id| [60, 61].contains(id)),
                "{text:?}: {ids:?}"
            );
        }
    }

    #[test]
    fn damaged_tokenizers_are_refused() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/lm/tok/tokenizer.json"
        );
        let text = std::fs::read_to_string(path).unwrap();
        for cut in (0..text.len()).step_by(97) {
            assert!(Tokenizer::from_json("cut", &text[..cut], None).is_err());
        }
        let long = format!(
            r#"{{"type":"Split","pattern":{{"Regex":"{}"}},"behavior":"Isolated","invert":false}}"#,
            "(a+)+".repeat(1000)
        );
        let hostile = text.replace(r#""type": "WhitespaceSplit""#, r#""type": "Nothing""#);
        assert!(Tokenizer::from_json("type", &hostile, None).is_err());
        let start = text.find("\"pre_tokenizer\": ").unwrap() + 17;
        let end = start + text[start..].find('}').unwrap() + 1;
        let hostile = format!("{}{long}{}", &text[..start], &text[end..]);
        let error = Tokenizer::from_json("regex", &hostile, None).unwrap_err();
        assert!(
            error.to_string().contains("an expression of 5000 bytes"),
            "{error}"
        );
    }

    #[test]
    fn an_exponential_expression_ends_in_an_answer_or_an_error_soon() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/lm/tok/tokenizer.json"
        );
        let text = std::fs::read_to_string(path).unwrap();
        let start = text.find("\"pre_tokenizer\": ").unwrap() + 17;
        let end = start + text[start..].find('}').unwrap() + 1;
        for pattern in ["(a+)+$", r"(a+)+(?=b)", r"(a|a)*(?!a)c"] {
            let split = format!(
                r#"{{"type":"Split","pattern":{{"Regex":{pattern:?}}},"behavior":"Isolated","invert":false}}"#
            );
            let hostile = format!("{}{split}{}", &text[..start], &text[end..]);
            if let Ok(t) = Tokenizer::from_json("regex", &hostile, None) {
                let begun = std::time::Instant::now();
                let _ = t.encode(&"a".repeat(40));
                assert!(begun.elapsed().as_secs() < 5, "{pattern}");
            }
        }
    }

    #[test]
    fn overlong_text_is_an_error() {
        let error = tiny()
            .encode(&"w1 ".repeat(100_000))
            .unwrap_err()
            .to_string();
        assert!(error.contains("shorten it"), "{error}");
    }
}
