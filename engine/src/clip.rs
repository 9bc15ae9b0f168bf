//! CLIP (arXiv 2103.00020), pictures and words as vectors of one space: how alike two pictures
//! are (CLIP-I), how well a picture fits words (CLIP-T), and, with weights trained on people's
//! choices, how much people would like a picture for its words (HPSv2, arXiv 2306.09341).
//!
//! Two layouts are read, told apart by their names: transformers' `CLIPModel` (OpenAI's
//! checkpoints; quick-GELU unless its config says otherwise) and OpenCLIP's (fused `in_proj`,
//! GELU; LAION's ViT-H/14 and HPSv2). Sizes are read off the shapes.
//!
//! Written anew because candle-transformers' CLIP has no exact GELU, no fused projections and
//! pools where its arg-max falls. Not here: training, and the text encoder of FLUX.1, which
//! gives hidden states ([`crate::flux::text`]).

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use tokenizers::Tokenizer;

use crate::flux::text::padded;
use crate::nn::{self, Linear, Mask};
use crate::picture::Picture;
use crate::weights::Weights;
use crate::{Error, Result};

const EPS: f64 = 1e-5;
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
const BATCH: usize = 8;

/// How a picture becomes the network's square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// The middle square, as CLIP was trained.
    Crop,
    /// All of it, with black around, as HPSv2 was.
    Letterbox,
}

/// The activation of the MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activation {
    /// x·σ(1.702·x), OpenAI's.
    QuickGelu,
    /// The exact one.
    Gelu,
}

/// Whose names the weights have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Transformers,
    OpenClip,
}

/// What a layout calls the parts of a tower's blocks.
struct Names {
    blocks: &'static str,
    norms: [&'static str; 2],
    out: &'static str,
    mlp: [&'static str; 2],
}

impl Layout {
    fn names(self) -> Names {
        match self {
            Self::Transformers => Names {
                blocks: "encoder.layers",
                norms: ["layer_norm1", "layer_norm2"],
                out: "self_attn.out_proj",
                mlp: ["mlp.fc1", "mlp.fc2"],
            },
            Self::OpenClip => Names {
                blocks: "transformer.resblocks",
                norms: ["ln_1", "ln_2"],
                out: "attn.out_proj",
                mlp: ["mlp.c_fc", "mlp.c_proj"],
            },
        }
    }
}

/// The parts of transformers' `config.json`, or of `open_clip_config.json`, that shapes do
/// not tell.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    text_config: TowerConfig,
    vision_config: TowerConfig,
    model_cfg: Option<OpenClipConfig>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TowerConfig {
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
    eos_token_id: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OpenClipConfig {
    quick_gelu: bool,
    vision_cfg: OpenClipTower,
    text_cfg: OpenClipTower,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OpenClipTower {
    heads: Option<usize>,
    head_width: Option<usize>,
}

struct Norm(Tensor, Tensor);

impl Norm {
    fn new(d: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self(vb.get(d, "weight")?, vb.get(d, "bias")?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        nn::layer_norm(x, Some(&self.0), Some(&self.1), EPS)
    }
}

struct Block {
    norm1: Norm,
    qkv: Linear,
    out: Linear,
    norm2: Norm,
    up: Linear,
    down: Linear,
}

/// The blocks of one side.
struct Tower {
    blocks: Vec<Block>,
    heads: usize,
    activation: Activation,
}

impl Tower {
    fn new(
        d: usize,
        heads: usize,
        activation: Activation,
        layout: Layout,
        vb: VarBuilder,
    ) -> Result<Self> {
        if heads == 0 || !d.is_multiple_of(heads) {
            let reason = format!("{d} channels cannot be shared among {heads} heads");
            return Err(Error::bad_model("CLIP", reason));
        }
        let names = layout.names();
        let blocks = vb.pp(names.blocks);
        let first_norm = |i: usize| format!("{i}.{}.weight", names.norms[0]);
        let depth = (0..).take_while(|i| blocks.contains_tensor(&first_norm(*i)));
        let block = |i: usize| -> Result<Block> {
            let vb = blocks.pp(i);
            let qkv = match layout {
                Layout::OpenClip => Linear::new(
                    vb.get((3 * d, d), "attn.in_proj_weight")?,
                    Some(vb.get(3 * d, "attn.in_proj_bias")?),
                ),
                Layout::Transformers => {
                    let parts = ["q_proj", "k_proj", "v_proj"].map(|n| vb.pp("self_attn").pp(n));
                    let weights = parts.iter().map(|p| Ok(p.get((d, d), "weight")?));
                    let biases = parts.iter().map(|p| Ok(p.get(d, "bias")?));
                    Linear::new(
                        Tensor::cat(&weights.collect::<Result<Vec<_>>>()?, 0)?,
                        Some(Tensor::cat(&biases.collect::<Result<Vec<_>>>()?, 0)?),
                    )
                }
            };
            let hidden = vb.pp(names.mlp[0]).get_unchecked("bias")?.dim(0)?;
            Ok(Block {
                norm1: Norm::new(d, vb.pp(names.norms[0]))?,
                qkv,
                out: nn::linear(d, d, vb.pp(names.out))?,
                norm2: Norm::new(d, vb.pp(names.norms[1]))?,
                up: nn::linear(d, hidden, vb.pp(names.mlp[0]))?,
                down: nn::linear(hidden, d, vb.pp(names.mlp[1]))?,
            })
        };
        Ok(Self {
            blocks: depth.map(block).collect::<Result<_>>()?,
            heads,
            activation,
        })
    }

    /// x (b, t, d) after all blocks.
    fn forward(&self, x: Tensor, mask: &Mask) -> Result<Tensor> {
        let (b, t, d) = x.dims3()?;
        let scale = ((d / self.heads) as f64).sqrt().recip();
        let mut x = x;
        for block in &self.blocks {
            let qkv = block.qkv.forward(&block.norm1.forward(&x)?)?;
            let part = |i: usize| -> Result<Tensor> {
                let part = qkv.narrow(2, i * d, d)?;
                let part = part.reshape((b, t, self.heads, d / self.heads))?;
                Ok(part.transpose(1, 2)?.contiguous()?) // (b, heads, t, d / heads)
            };
            let a = nn::attention(&part(0)?, &part(1)?, &part(2)?, scale, mask)?;
            let a = a.transpose(1, 2)?.reshape((b, t, d))?;
            x = (x + block.out.forward(&a)?)?;
            let h = block.up.forward(&block.norm2.forward(&x)?)?;
            let h = match self.activation {
                Activation::Gelu => nn::gelu_erf(&h)?,
                Activation::QuickGelu => (&h * candle_nn::ops::sigmoid(&(&h * 1.702)?)?)?,
            };
            x = (x + block.down.forward(&h)?)?;
        }
        Ok(x)
    }
}

/// Pictures to vectors.
struct Vision {
    patch: Tensor,
    class: Tensor,
    positions: Tensor,
    pre: Norm,
    tower: Tower,
    post: Norm,
    /// (d, vector).
    projection: Tensor,
    side: u32,
}

/// Words to vectors.
struct Text {
    tokens: Tensor,
    positions: Tensor,
    tower: Tower,
    post: Norm,
    /// (d, vector).
    projection: Tensor,
    end: u32,
}

/// The network, and its tokenizer where there is one.
pub struct Clip {
    vision: Vision,
    text: Text,
    tokenizer: Option<Tokenizer>,
    framing: Framing,
}

impl Clip {
    /// Opens a folder with the weights as safetensors (`model.safetensors` of transformers,
    /// `open_clip_model.safetensors`, or HPSv2's checkpoint saved so), tokenizer.json, and
    /// config.json or open_clip_config.json where there is one.
    ///
    /// # Errors
    /// [`Error::BadModel`] where the weights are no CLIP, [`Error::MissingModel`] without a
    /// tokenizer.
    pub fn open(folder: &Path, framing: Framing, device: &Device) -> Result<Self> {
        let weights = match folder.join("open_clip_model.safetensors") {
            file if file.is_file() => Weights::open(&file)?,
            _ => Weights::open(folder)?,
        };
        let read = |name: &str| -> Result<Option<String>> {
            let path = folder.join(name);
            let there = path.is_file();
            there
                .then(|| std::fs::read_to_string(&path).map_err(Error::io(&path)))
                .transpose()
        };
        let config = match read("open_clip_config.json")? {
            Some(text) => Some(text),
            None => read("config.json")?,
        };
        let tokenizer = folder.join("tokenizer.json");
        let json = read("tokenizer.json")?.ok_or_else(|| Error::MissingModel {
            path: tokenizer.clone(),
            help: "CLIP's tokenizer.json lies beside its weights on the hub, for instance in \
                   openai/clip-vit-large-patch14"
                .into(),
        })?;
        let tokenizer = Tokenizer::from_bytes(json)
            .map_err(|e| Error::bad_model(tokenizer.display().to_string(), e.to_string()))?;
        let mut clip = Self::new(&weights, config.as_deref(), device)?;
        clip.tokenizer = Some(tokenizer);
        clip.framing = framing;
        Ok(clip)
    }

    /// From weights, and the text of their config where there is one. Without it heads have
    /// 64 channels (80 in the picture tower of a ViT-H, 88 in a ViT-g, 104 in a ViT-G), and
    /// the end token is the last of the vocabulary.
    ///
    /// # Errors
    /// [`Error::BadModel`] for anything but the two layouts.
    pub fn new(weights: &Weights, config: Option<&str>, device: &Device) -> Result<Self> {
        let bad = |reason: String| Error::bad_model(weights.name(), reason);
        let config: Config = match config {
            Some(text) => serde_json::from_str(text).map_err(|e| bad(format!("config: {e}")))?,
            None => Config::default(),
        };
        let prefix = ["", "state_dict.", "module.", "state_dict.module."]
            .into_iter()
            .find(|p| weights.contains(&format!("{p}logit_scale")))
            .ok_or_else(|| {
                let help = "expected a CLIP of transformers or OpenCLIP (with logit_scale), \
                            both towers in one file";
                bad(help.into())
            })?;
        let layout = match weights.contains(&format!("{prefix}visual.class_embedding")) {
            true => Layout::OpenClip,
            false => Layout::Transformers,
        };
        let shape = |name: &str| -> Result<Vec<usize>> {
            let name = format!("{prefix}{name}");
            let shape = weights.shape(&name).map(<[usize]>::to_vec);
            shape.ok_or_else(|| bad(format!("expected a CLIP with {name}")))
        };
        let vb = weights.var_builder(DType::F32, device);
        let vb = match prefix.strip_suffix('.') {
            Some(prefix) => vb.pp(prefix),
            None => vb,
        };
        let vision = Vision::new(&config, layout, &shape, &vb)?;
        let text = Text::new(&config, layout, &shape, &vb)?;
        if vision.projection.dim(1)? != text.projection.dim(1)? {
            return Err(bad("its two towers project to different sizes".into()));
        }
        Ok(Self {
            vision,
            text,
            tokenizer: None,
            framing: Framing::Crop,
        })
    }

    /// Vectors (b, v) of pictures (b, 3, side, side), normalised.
    pub fn pictures(&self, x: &Tensor) -> Result<Tensor> {
        self.vision.forward(x)
    }

    /// Vectors (b, v) of rows of token ids, each with its end token.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for rows of different length, beyond the context, of unknown
    /// tokens, or without an end.
    pub fn texts(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        self.text.forward(ids)
    }

    /// The vectors of pictures, of length 1, each brought to the network's size.
    pub fn embed_pictures(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::new();
        for chunk in pictures.chunks(BATCH) {
            let inputs = chunk.iter().map(|p| self.input(p));
            let inputs = Tensor::cat(&inputs.collect::<Result<Vec<_>>>()?, 0)?;
            all.extend(of_length_one(&self.pictures(&inputs)?)?);
        }
        Ok(all)
    }

    /// The vectors of texts, of length 1; of a longer text the first 77 tokens count.
    ///
    /// # Errors
    /// [`Error::BadRequest`] where the network was opened without a tokenizer.
    pub fn embed_texts(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>> {
        let tokenizer = self.tokenizer.as_ref().ok_or_else(|| {
            Error::BadRequest("this CLIP was opened without its tokenizer".into())
        })?;
        let length = self.text.positions.dim(0)?;
        let end = self.text.end;
        let mut all = Vec::new();
        for chunk in texts.chunks(BATCH) {
            let ids = chunk.iter().map(|text| {
                let encoding = tokenizer
                    .encode(*text, true)
                    .map_err(|e| Error::BadRequest(format!("tokenizing: {e}")))?;
                // What follows the first end token is never looked at.
                Ok(padded(encoding.get_ids(), length, end, end))
            });
            let ids = ids.collect::<Result<Vec<_>>>()?;
            all.extend(of_length_one(&self.texts(&ids)?)?);
        }
        Ok(all)
    }

    /// A picture as the network takes it, (1, 3, side, side).
    fn input(&self, picture: &Picture) -> Result<Tensor> {
        let device = self.vision.class.device();
        let framed = framed(&picture.on([255; 3]), self.vision.side, self.framing);
        let values = framed.rgb.iter().enumerate();
        let values = values.map(|(i, v)| (f32::from(*v) / 255.0 - MEAN[i % 3]) / STD[i % 3]);
        let side = self.vision.side as usize;
        let hwc = Tensor::from_vec(values.collect::<Vec<_>>(), (1, side, side, 3), device)?;
        Ok(hwc.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

/// A square of `side` pixels out of a picture.
fn framed(picture: &Picture, side: u32, framing: Framing) -> Picture {
    let (w, h) = (picture.width, picture.height);
    let scaled = |length: u32, of: u32| {
        // As the reference rounds: down when cropping, to the nearest when padding.
        let exact = f64::from(length) * f64::from(side) / f64::from(of);
        let length = match framing {
            Framing::Crop => exact.floor(),
            Framing::Letterbox => exact.round(),
        };
        (length as u32).max(1)
    };
    match framing {
        Framing::Crop => {
            let short = w.min(h);
            let (w, h) = (scaled(w, short), scaled(h, short));
            let middle = |length: u32| (f64::from(length - side) / 2.0).round_ties_even() as u32;
            picture
                .resized(w, h)
                .cropped(middle(w), middle(h), side, side)
        }
        Framing::Letterbox => {
            let long = w.max(h);
            let small = picture.resized(scaled(w, long), scaled(h, long));
            let mut square = Picture::filled(side, side, [0; 3]);
            let (left, top) = ((side - small.width) / 2, (side - small.height) / 2);
            let row = small.width as usize * 3;
            for y in 0..small.height {
                let to = ((top + y) as usize * side as usize + left as usize) * 3;
                let from = y as usize * row;
                square.rgb[to..to + row].copy_from_slice(&small.rgb[from..from + row]);
            }
            square
        }
    }
}

fn of_length_one(x: &Tensor) -> Result<Vec<Vec<f32>>> {
    let length = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(x.broadcast_div(&length)?.to_vec2()?)
}

fn activation(word: Option<&str>, layout: Layout, quick: bool) -> Result<Activation> {
    match (word, layout, quick) {
        (Some("quick_gelu"), ..) | (None, Layout::Transformers, _) | (None, _, true) => {
            Ok(Activation::QuickGelu)
        }
        (Some("gelu"), ..) | (None, ..) => Ok(Activation::Gelu),
        (Some(other), ..) => Err(Error::bad_model(
            "config.json",
            format!("hidden_act: expected quick_gelu or gelu, got {other:?}"),
        )),
    }
}

impl Vision {
    fn new(
        config: &Config,
        layout: Layout,
        shape: &dyn Fn(&str) -> Result<Vec<usize>>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let open = config.model_cfg.as_ref();
        let (folder, patch, class, positions, pre, post) = match layout {
            Layout::OpenClip => (
                "visual",
                "conv1.weight",
                "class_embedding",
                "positional_embedding",
                "ln_pre",
                "ln_post",
            ),
            Layout::Transformers => (
                "vision_model",
                "embeddings.patch_embedding.weight",
                "embeddings.class_embedding",
                "embeddings.position_embedding.weight",
                "pre_layrnorm",
                "post_layernorm",
            ),
        };
        let projection = match layout {
            Layout::OpenClip => vb.get_unchecked("visual.proj")?,
            Layout::Transformers => vb.get_unchecked("visual_projection.weight")?.t()?,
        };
        let vb = vb.pp(folder);
        let patches = shape(&format!("{folder}.{patch}"))?;
        let places = shape(&format!("{folder}.{positions}"))?;
        let (&[d, 3, p, q], &[n, _]) = (patches.as_slice(), places.as_slice()) else {
            return Err(Error::bad_model("CLIP", "shapes that no CLIP has"));
        };
        let grid = (n.saturating_sub(1) as f64).sqrt().round() as usize;
        if p != q || p == 0 || grid * grid + 1 != n {
            return Err(Error::bad_model(
                "CLIP",
                "expected square patches on a square",
            ));
        }
        let head_width = match d {
            1280 => 80,
            1408 => 88,
            1664 => 104,
            _ => 64,
        };
        let named = open.and_then(|c| {
            let tower = &c.vision_cfg;
            tower.heads.or(tower.head_width.map(|w| d / w.max(1)))
        });
        let heads = config.vision_config.num_attention_heads.or(named);
        let heads = heads.unwrap_or((d / head_width).max(1));
        let quick = open.is_some_and(|c| c.quick_gelu);
        let activation = activation(config.vision_config.hidden_act.as_deref(), layout, quick)?;
        Ok(Self {
            patch: vb.get((d, 3, p, p), patch)?,
            class: vb.get(d, class)?,
            positions: vb.get((n, d), positions)?,
            pre: Norm::new(d, vb.pp(pre))?,
            tower: Tower::new(d, heads, activation, layout, vb.clone())?,
            post: Norm::new(d, vb.pp(post))?,
            projection: projection.contiguous()?,
            side: (grid * p) as u32,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = x.dims4()?;
        let side = self.side as usize;
        if (h, w) != (side, side) {
            return Err(Error::BadRequest(format!(
                "this CLIP takes pictures of {side} x {side}, got {w} x {h}"
            )));
        }
        let (d, p) = (self.patch.dim(0)?, self.patch.dim(2)?);
        let x = x.conv2d(&self.patch, 0, p, 1, 1)?; // (b, d, rows, columns)
        let x = x.flatten_from(2)?.transpose(1, 2)?;
        let class = self.class.reshape((1, 1, d))?.repeat((b, 1, 1))?;
        let x = Tensor::cat(&[class, x], 1)?.broadcast_add(&self.positions)?;
        let x = self.tower.forward(self.pre.forward(&x)?, &Mask::None)?;
        let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        Ok(self.post.forward(&class)?.matmul(&self.projection)?)
    }
}

impl Text {
    fn new(
        config: &Config,
        layout: Layout,
        shape: &dyn Fn(&str) -> Result<Vec<usize>>,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let open = config.model_cfg.as_ref();
        let (folder, tokens, positions, post) = match layout {
            Layout::OpenClip => (
                None,
                "token_embedding.weight",
                "positional_embedding",
                "ln_final",
            ),
            Layout::Transformers => (
                Some("text_model"),
                "embeddings.token_embedding.weight",
                "embeddings.position_embedding.weight",
                "final_layer_norm",
            ),
        };
        let at = |name: &str| match folder {
            Some(folder) => shape(&format!("{folder}.{name}")),
            None => shape(name),
        };
        let (words, places) = (at(tokens)?, at(positions)?);
        let (&[vocabulary, d], &[context, _]) = (words.as_slice(), places.as_slice()) else {
            return Err(Error::bad_model("CLIP", "shapes that no CLIP has"));
        };
        let projection = match layout {
            Layout::OpenClip => vb.get_unchecked("text_projection")?,
            Layout::Transformers => vb.get_unchecked("text_projection.weight")?.t()?,
        };
        let vb = match folder {
            Some(folder) => vb.pp(folder),
            None => vb.clone(),
        };
        let heads = config.text_config.num_attention_heads;
        let heads = heads.or(open.and_then(|c| c.text_cfg.heads));
        let quick = open.is_some_and(|c| c.quick_gelu);
        let activation = activation(config.text_config.hidden_act.as_deref(), layout, quick)?;
        Ok(Self {
            tokens: vb.get((vocabulary, d), tokens)?,
            positions: vb.get((context, d), positions)?,
            tower: Tower::new(
                d,
                heads.unwrap_or((d / 64).max(1)),
                activation,
                layout,
                vb.clone(),
            )?,
            post: Norm::new(d, vb.pp(post))?,
            projection: projection.contiguous()?,
            // OpenAI's configs say 2 and mean the last.
            end: match config.text_config.eos_token_id {
                Some(id) if id != 2 => id,
                _ => vocabulary as u32 - 1,
            },
        })
    }

    fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let (context, _) = self.positions.dims2()?;
        let vocabulary = self.tokens.dim(0)?;
        let (b, t) = (ids.len(), ids.first().map_or(0, Vec::len));
        if t == 0 || t > context || ids.iter().any(|row| row.len() != t) {
            return Err(Error::BadRequest(format!(
                "CLIP takes rows of one length from 1 to {context} tokens"
            )));
        }
        if let Some(bad) = ids.iter().flatten().find(|id| **id as usize >= vocabulary) {
            return Err(Error::BadRequest(format!(
                "token {bad} is beyond CLIP's vocabulary of {vocabulary}: the tokenizer belongs \
                 to another model"
            )));
        }
        let ends = ids.iter().enumerate().map(|(i, row)| {
            let end = row.iter().position(|id| *id == self.end);
            let end = end.ok_or_else(|| {
                Error::BadRequest(format!("text {i} has no end token {} for CLIP", self.end))
            })?;
            Ok((i * t + end) as u32)
        });
        let ends = ends.collect::<Result<Vec<_>>>()?;
        let device = self.tokens.device();
        let flat = Tensor::from_vec(ids.concat(), b * t, device)?;
        let x = self.tokens.index_select(&flat, 0)?.reshape((b, t, ()))?;
        let x = x.broadcast_add(&self.positions.narrow(0, 0, t)?)?;
        let x = self.tower.forward(x, &Mask::Causal)?;
        let ends = Tensor::from_vec(ends, b, device)?;
        let x = x.flatten_to(1)?.index_select(&ends, 0)?; // (b, d)
        Ok(self.post.forward(&x)?.matmul(&self.projection)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(file: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/clip")
            .join(file)
    }

    fn gap(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let worst = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        worst.to_scalar().unwrap()
    }

    #[test]
    fn both_layouts_give_what_transformers_and_open_clip_give() {
        let expected = Weights::open(&golden("expected.safetensors")).unwrap();
        let get = |name: &str| expected.get_any(name, DType::F32, &Device::Cpu).unwrap();
        for case in ["transformers", "open_clip", "hpsv2"] {
            let file = if case == "hpsv2" { "open_clip" } else { case };
            let config = std::fs::read_to_string(golden(&format!("{file}.json"))).unwrap();
            let mut weights = Weights::open(&golden(&format!("{file}.safetensors"))).unwrap();
            if case == "hpsv2" {
                // Its checkpoint is OpenCLIP's one level down.
                let all = weights.names().map(|name| {
                    let tensor = weights.get_any(name, DType::F32, &Device::Cpu);
                    (format!("state_dict.{name}"), tensor.unwrap())
                });
                let bytes = safetensors::serialize(all.collect::<Vec<_>>(), None).unwrap();
                weights = Weights::from_bytes("HPS_v2.safetensors", bytes).unwrap();
            }
            let clip = Clip::new(&weights, Some(&config), &Device::Cpu).unwrap();
            let ids = get(&format!("{file}/ids")).to_dtype(DType::U32).unwrap();
            let texts = clip.texts(&ids.to_vec2::<u32>().unwrap()).unwrap();
            let worst = gap(&texts, &get(&format!("{file}/texts")));
            assert!(worst <= 1e-4, "{case}, texts: {worst}");
            let pictures = clip.pictures(&get(&format!("{file}/pictures"))).unwrap();
            let worst = gap(&pictures, &get(&format!("{file}/vectors")));
            assert!(worst <= 1e-4, "{case}, pictures: {worst}");
            assert!(clip.texts(&[vec![1, 2]]).is_err(), "no end token");
            assert!(clip.texts(&[vec![60_000]]).is_err());
        }
    }

    #[test]
    fn pictures_are_framed_as_the_references_frame_them() {
        let expected = Weights::open(&golden("expected.safetensors")).unwrap();
        for (name, framing) in [("crop", Framing::Crop), ("letterbox", Framing::Letterbox)] {
            for shape in ["wide", "tall"] {
                let get = |n: &str| {
                    let t = expected.get_any(n, DType::F32, &Device::Cpu).unwrap();
                    let (h, w, _) = t.dims3().unwrap();
                    let bytes = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let bytes = bytes.iter().map(|v| v.round() as u8).collect();
                    Picture::from_rgb(w as u32, h as u32, bytes)
                };
                let want = get(&format!("framing/{shape}/{name}"));
                let ours = framed(&get(&format!("framing/{shape}")), want.width, framing);
                let apart = ours.rgb.iter().zip(&want.rgb).map(|(a, b)| a.abs_diff(*b));
                // The reference rounds between its two passes; ours does not.
                assert!(apart.clone().max() <= Some(3), "{shape} {name}");
                let mean = apart.map(f64::from).sum::<f64>() / want.rgb.len() as f64;
                assert!(mean < 0.5, "{shape} {name}: {mean}");
            }
        }
    }

    #[test]
    fn what_is_no_clip_is_refused_by_name() {
        let one = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let bytes = safetensors::serialize([("a.weight", &one)], None).unwrap();
        let weights = Weights::from_bytes("other.safetensors", bytes).unwrap();
        let said = Clip::new(&weights, None, &Device::Cpu).err().unwrap();
        assert!(said.to_string().contains("other.safetensors"), "{said}");
    }
}
