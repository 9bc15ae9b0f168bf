//! The names of Flux's weights: which there are, their shapes, and how checkpoints of other
//! layouts spell them. One table for all of it.
//!
//! Ours are those of Black Forest Labs' files. diffusers splits the fused matrices
//! (query/key/value in one, and in single blocks the MLP too) and has the two halves of the
//! last modulation the other way round; XLabs' ControlNets keep BFL's blocks and rename the
//! rest; ComfyUI and GGUF files put a prefix in front of everything.
//!
//! Nothing here reads files: give [`renamed`] a `VarBuilder` over any of them.

use super::{controlnet, transformer, vae};
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

/// A weight's name and shape.
pub type NameAndShape = (String, Vec<usize>);

/// How one of our weights is made of a checkpoint's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// It is the same.
    Same,
    /// Rows one after the other; the numbers are the parts' relative heights.
    Rows(&'static [usize]),
    /// The upper and lower half of the rows change places.
    SwapHalves,
}

/// The checkpoint's names for one of our weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Names in the checkpoint.
    pub parts: Vec<String>,
    /// How they make up ours.
    pub join: Join,
}

const QKV: Join = Join::Rows(&[1, 1, 1]);
const QKV_MLP: Join = Join::Rows(&[1, 1, 1, 4]);

type Row = (&'static str, &'static [&'static str], Join);

/// Outside the blocks. A name stands for its `.weight` and `.bias`.
const TOP: &[Row] = &[
    ("img_in", &["x_embedder"], Join::Same),
    ("txt_in", &["context_embedder"], Join::Same),
    (
        "time_in.in_layer",
        &["time_text_embed.timestep_embedder.linear_1"],
        Join::Same,
    ),
    (
        "time_in.out_layer",
        &["time_text_embed.timestep_embedder.linear_2"],
        Join::Same,
    ),
    (
        "guidance_in.in_layer",
        &["time_text_embed.guidance_embedder.linear_1"],
        Join::Same,
    ),
    (
        "guidance_in.out_layer",
        &["time_text_embed.guidance_embedder.linear_2"],
        Join::Same,
    ),
    (
        "vector_in.in_layer",
        &["time_text_embed.text_embedder.linear_1"],
        Join::Same,
    ),
    (
        "vector_in.out_layer",
        &["time_text_embed.text_embedder.linear_2"],
        Join::Same,
    ),
    ("final_layer.linear", &["proj_out"], Join::Same),
    (
        "final_layer.adaLN_modulation.1",
        &["norm_out.linear"],
        Join::SwapHalves,
    ),
];

/// Inside `double_blocks.i` ↔ `transformer_blocks.i`.
const DOUBLE: &[Row] = &[
    ("img_mod.lin", &["norm1.linear"], Join::Same),
    ("txt_mod.lin", &["norm1_context.linear"], Join::Same),
    (
        "img_attn.qkv",
        &["attn.to_q", "attn.to_k", "attn.to_v"],
        QKV,
    ),
    (
        "txt_attn.qkv",
        &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        QKV,
    ),
    ("img_attn.norm.query_norm", &["attn.norm_q"], Join::Same),
    ("img_attn.norm.key_norm", &["attn.norm_k"], Join::Same),
    (
        "txt_attn.norm.query_norm",
        &["attn.norm_added_q"],
        Join::Same,
    ),
    ("txt_attn.norm.key_norm", &["attn.norm_added_k"], Join::Same),
    ("img_attn.proj", &["attn.to_out.0"], Join::Same),
    ("txt_attn.proj", &["attn.to_add_out"], Join::Same),
    ("img_mlp.0", &["ff.net.0.proj"], Join::Same),
    ("img_mlp.2", &["ff.net.2"], Join::Same),
    ("txt_mlp.0", &["ff_context.net.0.proj"], Join::Same),
    ("txt_mlp.2", &["ff_context.net.2"], Join::Same),
];

/// Inside `single_blocks.i` ↔ `single_transformer_blocks.i`.
const SINGLE: &[Row] = &[
    ("modulation.lin", &["norm.linear"], Join::Same),
    (
        "linear1",
        &["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        QKV_MLP,
    ),
    ("linear2", &["proj_out"], Join::Same),
    ("norm.query_norm", &["attn.norm_q"], Join::Same),
    ("norm.key_norm", &["attn.norm_k"], Join::Same),
];

/// Our XLabs ControlNet names ↔ those of XLabs' own files.
const XLABS: &[Row] = &[
    ("controlnet_x_embedder", &["pos_embed_input"], Join::Same),
    (
        "input_hint_block.conv_in",
        &["input_hint_block.0"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.0",
        &["input_hint_block.2"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.1",
        &["input_hint_block.4"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.2",
        &["input_hint_block.6"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.3",
        &["input_hint_block.8"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.4",
        &["input_hint_block.10"],
        Join::Same,
    ),
    (
        "input_hint_block.blocks.5",
        &["input_hint_block.12"],
        Join::Same,
    ),
    (
        "input_hint_block.conv_out",
        &["input_hint_block.14"],
        Join::Same,
    ),
];

/// Whose names a checkpoint uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// Black Forest Labs, and ours.
    Bfl,
    /// diffusers.
    Diffusers,
    /// XLabs' own ControlNet files.
    Xlabs,
}

/// What a checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Flux transformer.
    Transformer,
    /// A ControlNet for one.
    ControlNet,
    /// A picture autoencoder.
    Vae,
}

/// How a checkpoint is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Which network.
    pub kind: Kind,
    /// Whose names.
    pub naming: Naming,
    /// What stands before every name, with its dot, or nothing.
    pub prefix: String,
}

/// Prefixes that ComfyUI, stable-diffusion.cpp and trainers put in front.
const PREFIXES: &[&str] = &[
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "controlnet.",
    "first_stage_model.",
    "vae.",
];

/// Finds a checkpoint's layout from the names in its header.
///
/// # Errors
/// If it is none of ours, with some of the names found.
pub fn detect(names: &[&str]) -> Result<Layout> {
    let has = |name: &str| names.contains(&name);
    for &prefix in PREFIXES {
        let p = |name: &str| has(&format!("{prefix}{name}"));
        let controlled = p("controlnet_x_embedder.weight") || p("pos_embed_input.weight");
        let kind = if controlled {
            Kind::ControlNet
        } else {
            Kind::Transformer
        };
        let any = |stem: &str| {
            let stem = format!("{prefix}{stem}");
            names.iter().any(|n| n.starts_with(&stem))
        };
        let naming = if any("transformer_blocks.0.attn.") && p("x_embedder.weight") {
            Some(Naming::Diffusers)
        } else if p("pos_embed_input.weight") {
            Some(Naming::Xlabs)
        } else if any("double_blocks.0.img_attn.") {
            Some(Naming::Bfl)
        } else {
            None
        };
        let layout = |kind, naming| Layout {
            kind,
            naming,
            prefix: prefix.into(),
        };
        if let Some(naming) = naming {
            return Ok(layout(kind, naming));
        }
        if p("encoder.down_blocks.0.resnets.0.conv1.weight") {
            return Ok(layout(Kind::Vae, Naming::Diffusers));
        }
        if p("encoder.down.0.block.0.conv1.weight") || p("encoder.patch.weight") {
            return Ok(layout(Kind::Vae, Naming::Bfl));
        }
    }
    let some: Vec<&str> = names.iter().take(3).copied().collect();
    Err(Error::bad_model(
        "checkpoint",
        format!(
            "expected the weights of a Flux transformer, its ControlNet or its autoencoder \
             under BFL's or diffusers' names; got {} tensors such as {some:?}",
            names.len()
        ),
    ))
}

/// The checkpoint's names for our weight `name`, without prefix. `levels` is the number of
/// an autoencoder's resolutions; it matters for no other.
pub fn recipe(kind: Kind, naming: Naming, levels: usize, name: &str) -> Recipe {
    let same = Recipe {
        parts: vec![name.to_string()],
        join: Join::Same,
    };
    match (kind, naming) {
        (_, Naming::Bfl) => same,
        (Kind::Vae, _) => Recipe {
            parts: vec![vae_name(levels, name)],
            join: Join::Same,
        },
        (_, Naming::Xlabs) => by_table(XLABS, "", "", name).unwrap_or(same),
        (_, Naming::Diffusers) => diffusers_recipe(name).unwrap_or(same),
    }
}

fn diffusers_recipe(name: &str) -> Option<Recipe> {
    let block = |ours: &str, theirs: &str, table| {
        let rest = name.strip_prefix(ours)?;
        let (i, _) = rest.split_once('.')?;
        by_table(
            table,
            &format!("{ours}{i}."),
            &format!("{theirs}{i}."),
            name,
        )
    };
    block("double_blocks.", "transformer_blocks.", DOUBLE)
        .or_else(|| block("single_blocks.", "single_transformer_blocks.", SINGLE))
        .or_else(|| by_table(TOP, "", "", name))
}

fn by_table(table: &[Row], ours: &str, theirs: &str, name: &str) -> Option<Recipe> {
    let (stem, leaf) = name.strip_prefix(ours)?.rsplit_once('.')?;
    let (_, parts, join) = table.iter().find(|row| row.0 == stem)?;
    let leaf = if leaf == "scale" { "weight" } else { leaf };
    Some(Recipe {
        parts: parts
            .iter()
            .map(|p| format!("{theirs}{p}.{leaf}"))
            .collect(),
        join: *join,
    })
}

/// BFL's autoencoder name as diffusers writes it. The decoder's levels run the other way.
fn vae_name(levels: usize, name: &str) -> String {
    let mut parts: Vec<String> = name.split('.').map(str::to_string).collect();
    if let [_, way, n, ..] = parts.as_mut_slice()
        && (way == "down" || way == "up")
    {
        let level: usize = n.parse().unwrap_or(0);
        if way == "up" {
            *n = (levels.saturating_sub(1 + level)).to_string();
        }
        way.push_str("_blocks");
    }
    parts
        .join(".")
        .replace(".mid.block_1.", ".mid_block.resnets.0.")
        .replace(".mid.block_2.", ".mid_block.resnets.1.")
        .replace(".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm.")
        .replace(".mid.attn_1.q.", ".mid_block.attentions.0.to_q.")
        .replace(".mid.attn_1.k.", ".mid_block.attentions.0.to_k.")
        .replace(".mid.attn_1.v.", ".mid_block.attentions.0.to_v.")
        .replace(".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0.")
        .replace(".block.", ".resnets.")
        .replace(".nin_shortcut.", ".conv_shortcut.")
        .replace(".downsample.", ".downsamplers.0.")
        .replace(".upsample.", ".upsamplers.0.")
        .replace("coder.norm_out.", "coder.conv_norm_out.")
}

/// The checkpoint's weights for our names and shapes: what a file of that naming must hold.
pub fn spelled(
    kind: Kind,
    naming: Naming,
    levels: usize,
    ours: &[NameAndShape],
) -> Vec<NameAndShape> {
    let mut all = Vec::new();
    for (name, shape) in ours {
        let recipe = recipe(kind, naming, levels, name);
        let heights: &[usize] = match recipe.join {
            Join::Rows(heights) => heights,
            _ => &[1],
        };
        let total: usize = heights.iter().sum();
        for (part, height) in recipe.parts.into_iter().zip(heights) {
            let mut shape = shape.clone();
            shape[0] = shape[0] / total * height;
            // diffusers' attention in the autoencoder is linear, BFL's a 1×1 convolution.
            if kind == Kind::Vae && part.contains(".attentions.") {
                shape.truncate(2);
            }
            all.push((part, shape));
        }
    }
    all
}

/// Reads a checkpoint of another layout under our names.
pub fn renamed(
    checkpoint: VarBuilder<'static>,
    layout: Layout,
    levels: usize,
) -> VarBuilder<'static> {
    let (dtype, device) = (checkpoint.dtype(), checkpoint.device().clone());
    let backend = Renamed {
        checkpoint,
        layout,
        levels,
    };
    VarBuilder::from_backend(Box::new(backend), dtype, device)
}

struct Renamed {
    checkpoint: VarBuilder<'static>,
    layout: Layout,
    levels: usize,
}

impl Renamed {
    fn recipe(&self, name: &str) -> Recipe {
        let mut recipe = recipe(self.layout.kind, self.layout.naming, self.levels, name);
        for part in &mut recipe.parts {
            part.insert_str(0, &self.layout.prefix);
        }
        recipe
    }
}

impl SimpleBackend for Renamed {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() == &shape {
            return Ok(tensor);
        }
        // A 1×1 convolution and a linear map differ in trailing ones only.
        let core = |dims: &[usize]| -> Vec<usize> {
            let ones = dims.iter().rev().take_while(|&&d| d == 1).count();
            dims[..dims.len() - ones].to_vec()
        };
        if core(tensor.dims()) == core(shape.dims()) {
            return tensor.reshape(shape);
        }
        Err(candle_core::Error::Msg(format!(
            "{}: expected {:?}, got {:?}: the config does not belong to this checkpoint",
            self.recipe(name).parts.join(" + "),
            shape.dims(),
            tensor.dims()
        )))
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let recipe = self.recipe(name);
        let parts = recipe
            .parts
            .iter()
            .map(|p| {
                self.checkpoint
                    .get_unchecked_dtype(p, dtype)?
                    .to_device(device)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        match (recipe.join, parts.as_slice()) {
            (Join::Rows(_), parts) => Tensor::cat(parts, 0),
            (Join::SwapHalves, [whole]) => {
                let half = whole.dim(0)? / 2;
                let rest = whole.dim(0)? - half;
                Tensor::cat(
                    &[&whole.narrow(0, half, rest)?, &whole.narrow(0, 0, half)?],
                    0,
                )
            }
            (_, [whole]) => Ok(whole.clone()),
            _ => candle_core::bail!("{name}: several parts and no way to join them"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        let recipe = self.recipe(name);
        recipe
            .parts
            .iter()
            .all(|p| self.checkpoint.contains_tensor(p))
    }
}

// --------------------------------------------------------------------- names and shapes

fn with_bias(all: &mut Vec<NameAndShape>, name: String, outputs: usize, inputs: usize) {
    all.push((format!("{name}.weight"), vec![outputs, inputs]));
    all.push((format!("{name}.bias"), vec![outputs]));
}

/// Names and shapes of the part that transformer and ControlNet share.
fn trunk_shapes(config: &transformer::Config) -> Vec<NameAndShape> {
    let (d, head) = (config.hidden(), config.attention_head_dim);
    let mut all = Vec::new();
    let mut mlp = |name: &str, inputs| {
        with_bias(&mut all, format!("{name}.in_layer"), d, inputs);
        with_bias(&mut all, format!("{name}.out_layer"), d, d);
    };
    mlp("time_in", 256);
    mlp("vector_in", config.pooled_projection_dim);
    if config.guidance_embeds {
        mlp("guidance_in", 256);
    }
    with_bias(&mut all, "img_in".into(), d, config.in_channels);
    with_bias(&mut all, "txt_in".into(), d, config.joint_attention_dim);
    for i in 0..config.num_layers {
        for stream in ["img", "txt"] {
            let p = format!("double_blocks.{i}.{stream}");
            with_bias(&mut all, format!("{p}_mod.lin"), 6 * d, d);
            with_bias(&mut all, format!("{p}_attn.qkv"), 3 * d, d);
            all.push((format!("{p}_attn.norm.query_norm.scale"), vec![head]));
            all.push((format!("{p}_attn.norm.key_norm.scale"), vec![head]));
            with_bias(&mut all, format!("{p}_attn.proj"), d, d);
            with_bias(&mut all, format!("{p}_mlp.0"), 4 * d, d);
            with_bias(&mut all, format!("{p}_mlp.2"), d, 4 * d);
        }
    }
    for i in 0..config.num_single_layers {
        let p = format!("single_blocks.{i}");
        with_bias(&mut all, format!("{p}.modulation.lin"), 3 * d, d);
        with_bias(&mut all, format!("{p}.linear1"), 7 * d, d);
        with_bias(&mut all, format!("{p}.linear2"), d, 5 * d);
        all.push((format!("{p}.norm.query_norm.scale"), vec![head]));
        all.push((format!("{p}.norm.key_norm.scale"), vec![head]));
    }
    all
}

/// Every weight of a transformer of this shape, under our names.
pub fn transformer_shapes(config: &transformer::Config) -> Vec<NameAndShape> {
    let d = config.hidden();
    let mut all = trunk_shapes(config);
    with_bias(&mut all, "final_layer.adaLN_modulation.1".into(), 2 * d, d);
    with_bias(&mut all, "final_layer.linear".into(), config.out(), d);
    all
}

/// Every weight of a ControlNet of this shape, under our names.
pub fn controlnet_shapes(config: &controlnet::Config) -> Vec<NameAndShape> {
    let d = config.trunk.hidden();
    let mut all = trunk_shapes(&config.trunk);
    with_bias(
        &mut all,
        "controlnet_x_embedder".into(),
        d,
        config.trunk.in_channels,
    );
    for i in 0..config.trunk.num_layers {
        with_bias(&mut all, format!("controlnet_blocks.{i}"), d, d);
    }
    for i in 0..config.trunk.num_single_layers {
        with_bias(&mut all, format!("controlnet_single_blocks.{i}"), d, d);
    }
    if let Some(modes) = config.num_mode {
        all.push(("controlnet_mode_embedder.weight".into(), vec![modes, d]));
    }
    if let Some(channels) = config.conditioning_embedding_channels {
        let mut conv = |name: String, outputs, inputs| {
            all.push((
                format!("input_hint_block.{name}.weight"),
                vec![outputs, inputs, 3, 3],
            ));
            all.push((format!("input_hint_block.{name}.bias"), vec![outputs]));
        };
        conv("conv_in".into(), 16, 3);
        (0..6).for_each(|i| conv(format!("blocks.{i}"), 16, 16));
        conv("conv_out".into(), channels, 16);
    }
    all
}

/// Every weight of an autoencoder of this shape, under our names.
pub fn vae_shapes(config: &vae::Config) -> Vec<NameAndShape> {
    vae::shapes(config)
}

/// How many numbers these weights are.
pub fn count(weights: &[NameAndShape]) -> usize {
    weights
        .iter()
        .map(|(_, s)| s.iter().product::<usize>())
        .sum()
}

/// Opens a checkpoint of any layout as a `VarBuilder` with our names, for a network of
/// `kind`; `levels` as in [`recipe`].
///
/// # Errors
/// Unreadable files, and files that hold something else.
pub fn open(
    weights: &crate::weights::Weights,
    kind: Kind,
    levels: usize,
    dtype: DType,
    device: &Device,
) -> Result<VarBuilder<'static>> {
    let names: Vec<&str> = weights.names().collect();
    let layout = detect(&names).map_err(|e| match e {
        Error::BadModel { reason, .. } => Error::bad_model(weights.name(), reason),
        other => other,
    })?;
    if layout.kind != kind {
        return Err(Error::bad_model(
            weights.name(),
            format!("expected a {kind:?}, got a {:?}", layout.kind),
        ));
    }
    Ok(renamed(weights.var_builder(dtype, device), layout, levels))
}
