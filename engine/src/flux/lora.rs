//! LoRA for Flux: small additions B·A to linear weights, added while the weights are read.
//!
//! Four spellings are understood: diffusers/PEFT (`transformer.….to_q.lora_A.weight`), Black
//! Forest Labs' (`double_blocks.0.img_attn.qkv.lora_A.weight`), kohya's
//! (`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`, with `.alpha`), and XLabs'
//! (`double_blocks.0.processor.qkv_lora1.down.weight`). Our matrices are fused: a LoRA for
//! diffusers' `to_k` is added to the middle third of `qkv`'s rows, one for the fused matrix
//! to all of them. A key that fits nowhere is an error: silence would be an edit that does
//! not happen.

use super::names::{self, Join, Kind, NameAndShape, Naming};
use crate::weights::Weights;
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use std::collections::BTreeMap;

/// One B·A, for some rows of one weight.
#[derive(Clone, Debug)]
struct Addition {
    /// (r, in).
    down: Tensor,
    /// (rows, r).
    up: Tensor,
    /// alpha / r.
    scale: f64,
    /// The first row.
    first: usize,
    /// Whether the halves of `up` change places (diffusers' last modulation).
    swap: bool,
}

/// A LoRA, fitted to a transformer.
#[derive(Clone, Debug, Default)]
pub struct Lora {
    additions: BTreeMap<String, Vec<Addition>>,
}

/// Where a checkpoint's stem belongs: our stem, first row, rows, whether halves are swapped.
struct Place {
    stem: String,
    first: usize,
    rows: usize,
    columns: usize,
    swap: bool,
}

/// The two matrices of one stem, as they are found.
#[derive(Default)]
struct Found {
    key: String,
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<f64>,
}

const DOWN: &[&str] = &[
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora_down.weight",
    ".lora.down.weight",
    ".down.weight",
];
const UP: &[&str] = &[
    ".lora_B.weight",
    ".lora_B.default.weight",
    ".lora_up.weight",
    ".lora.up.weight",
    ".up.weight",
];
const PREFIXES: &[&str] = &[
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
];

impl Lora {
    /// Reads a LoRA for a transformer of these weights ([`names::transformer_shapes`]).
    ///
    /// # Errors
    /// Names every key that fits nowhere, a matrix without its partner, and shapes that do
    /// not fit the transformer.
    pub fn new(file: &Weights, ours: &[NameAndShape]) -> Result<Self> {
        let places = places(ours);
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        let mut unmatched = Vec::new();
        for key in file.names() {
            let Some((stem, part)) = split(key) else {
                unmatched.push(key.to_string());
                continue;
            };
            let Some(name) = canonical(stem).into_iter().find(|s| places.contains_key(s)) else {
                unmatched.push(key.to_string());
                continue;
            };
            let entry = found.entry(name).or_default();
            entry.key = stem.to_string();
            let tensor = file.get_any(key, DType::F32, &Device::Cpu)?;
            match part {
                Part::Down => entry.down = Some(tensor),
                Part::Up => entry.up = Some(tensor),
                Part::Alpha => {
                    let alpha = tensor.flatten_all()?.to_vec1::<f32>()?;
                    entry.alpha = alpha.first().map(|a| f64::from(*a));
                }
            }
        }
        if !unmatched.is_empty() {
            let shown = unmatched
                .iter()
                .take(5)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ");
            return Err(Error::bad_model(
                file.name(),
                format!(
                    "{} of the LoRA's keys fit nothing in this transformer: {shown}; is it made \
                     for another model, or does it also train text encoders (not supported)?",
                    unmatched.len()
                ),
            ));
        }
        if found.is_empty() {
            return Err(Error::bad_model(file.name(), "holds no LoRA matrices"));
        }
        let mut lora = Self::default();
        for (name, found) in found {
            let place = &places[&name];
            let addition = fitted(file.name(), found, place)?;
            lora.additions
                .entry(place.stem.clone())
                .or_default()
                .push(addition);
        }
        Ok(lora)
    }

    /// How many of the transformer's weights it changes.
    pub fn len(&self) -> usize {
        self.additions.len()
    }

    /// Whether it changes none.
    pub fn is_empty(&self) -> bool {
        self.additions.is_empty()
    }

    /// The weights of `base` (with our names) with `strength` times this LoRA added. Several
    /// are added one after the other.
    pub fn added_to(&self, base: VarBuilder<'static>, strength: f64) -> VarBuilder<'static> {
        let (dtype, device) = (base.dtype(), base.device().clone());
        let backend = WithLora {
            base,
            lora: self.clone(),
            strength,
        };
        VarBuilder::from_backend(Box::new(backend), dtype, device)
    }
}

enum Part {
    Down,
    Up,
    Alpha,
}

fn split(key: &str) -> Option<(&str, Part)> {
    let ends = |ends: &[&str]| ends.iter().find_map(|e| key.strip_suffix(e));
    if let Some(stem) = ends(DOWN) {
        return Some((stem, Part::Down));
    }
    if let Some(stem) = ends(UP) {
        return Some((stem, Part::Up));
    }
    Some((key.strip_suffix(".alpha")?, Part::Alpha))
}

/// The forms under which a stem may be found among [`places`].
fn canonical(stem: &str) -> Vec<String> {
    let mut forms = vec![stem.to_string()];
    for prefix in PREFIXES {
        if let Some(rest) = stem.strip_prefix(prefix) {
            forms.push(rest.to_string());
        }
    }
    forms
}

/// Every stem a LoRA may name, in all four spellings.
fn places(ours: &[NameAndShape]) -> BTreeMap<String, Place> {
    let mut all = BTreeMap::new();
    let mut put = |key: &str, place: &dyn Fn() -> Place| {
        all.insert(key.replace('.', "_"), place());
        all.insert(key.to_string(), place());
    };
    for (name, shape) in ours {
        let (Some(stem), [rows, columns]) = (name.strip_suffix(".weight"), shape.as_slice()) else {
            continue;
        };
        let whole = || Place {
            stem: stem.to_string(),
            first: 0,
            rows: *rows,
            columns: *columns,
            swap: false,
        };
        put(stem, &whole);
        if let Some(alias) = xlabs(stem) {
            put(&alias, &whole);
        }
        let recipe = names::recipe(Kind::Transformer, Naming::Diffusers, 0, name);
        let heights: &[usize] = match recipe.join {
            Join::Rows(heights) => heights,
            _ => &[1],
        };
        let unit = rows / heights.iter().sum::<usize>();
        let mut first = 0;
        for (part, height) in recipe.parts.iter().zip(heights) {
            let Some(part) = part.strip_suffix(".weight") else {
                continue;
            };
            put(part, &|| Place {
                stem: stem.to_string(),
                first,
                rows: unit * height,
                columns: *columns,
                swap: recipe.join == Join::SwapHalves,
            });
            first += unit * height;
        }
    }
    all
}

/// XLabs' names for one of our stems.
fn xlabs(stem: &str) -> Option<String> {
    let table = [
        (".img_attn.qkv", ".processor.qkv_lora1"),
        (".txt_attn.qkv", ".processor.qkv_lora2"),
        (".img_attn.proj", ".processor.proj_lora1"),
        (".txt_attn.proj", ".processor.proj_lora2"),
        (".linear1", ".processor.qkv_lora"),
        (".linear2", ".processor.proj_lora"),
    ];
    table
        .iter()
        .find_map(|(end, theirs)| Some(format!("{}{theirs}", stem.strip_suffix(end)?)))
}

fn fitted(file: &str, found: Found, place: &Place) -> Result<Addition> {
    let (Some(down), Some(up)) = (found.down, found.up) else {
        return Err(Error::bad_model(
            file,
            format!("{}: the LoRA has only one of its two matrices", found.key),
        ));
    };
    let flat = |x: Tensor| -> Result<Tensor> {
        let rows = x.dim(0)?;
        Ok(x.reshape((rows, ()))?)
    };
    let (down, up) = (flat(down)?, flat(up)?);
    let ((r, columns), (rows, r_up)) = (down.dims2()?, up.dims2()?);
    // XLabs' single blocks name the query, key and value rows of the fused matrix only.
    let qkv_only = place.stem.ends_with(".linear1") && rows * 7 == place.rows * 3;
    let fits = rows == place.rows || qkv_only;
    if r == 0 || r != r_up || columns != place.columns || !fits {
        return Err(Error::bad_model(
            file,
            format!(
                "{}: the LoRA's matrices are {r}×{columns} and {rows}×{r_up}, the weight is \
                 {}×{}",
                found.key, place.rows, place.columns
            ),
        ));
    }
    Ok(Addition {
        scale: found.alpha.map_or(1.0, |alpha| alpha / r as f64),
        down,
        up,
        first: place.first,
        swap: place.swap,
    })
}

struct WithLora {
    base: VarBuilder<'static>,
    lora: Lora,
    strength: f64,
}

impl WithLora {
    fn add(&self, name: &str, weight: Tensor) -> candle_core::Result<Tensor> {
        let additions = name
            .strip_suffix(".weight")
            .and_then(|stem| self.lora.additions.get(stem));
        let Some(additions) = additions else {
            return Ok(weight);
        };
        let dtype = weight.dtype();
        let mut sum = weight.to_dtype(DType::F32)?;
        for a in additions {
            let delta = (a.up.matmul(&a.down)? * (a.scale * self.strength))?;
            let rows = delta.dim(0)?;
            let delta = match a.swap {
                true => Tensor::cat(
                    &[
                        &delta.narrow(0, rows / 2, rows - rows / 2)?,
                        &delta.narrow(0, 0, rows / 2)?,
                    ],
                    0,
                )?,
                false => delta,
            };
            let below = sum.dim(0)?.saturating_sub(a.first + rows);
            let delta = delta
                .pad_with_zeros(0, a.first, below)?
                .to_device(sum.device())?;
            sum = (sum + delta)?;
        }
        sum.to_dtype(dtype)
    }
}

impl SimpleBackend for WithLora {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        _: &Device,
    ) -> candle_core::Result<Tensor> {
        self.add(
            name,
            self.base
                .get_with_hints_dtype(shape, name, Init::Const(0.0), dtype)?,
        )
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        self.add(name, self.base.get_unchecked_dtype(name, dtype)?)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.base.contains_tensor(name)
    }
}
