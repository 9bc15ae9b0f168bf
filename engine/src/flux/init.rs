//! Weights to begin with: random ones for training, and any map of tensors as a
//! `VarBuilder`.
//!
//! Not candle's `VarMap`: its random numbers cannot be seeded and its order is not fixed.

use super::names::NameAndShape;
use crate::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;

/// Random weights in f32, the same for the same seed on every machine and in any order.
///
/// Matrices and convolutions are normal with standard deviation 1/sqrt(inputs), so that the
/// size of the activations is kept; biases are 0, norms 1. What must start silent is 0: the
/// modulations (each block starts as the identity, as in DiT's adaLN-Zero), the last layer,
/// and a ControlNet's outputs and control input.
pub fn random(
    weights: &[NameAndShape],
    seed: u64,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut all = BTreeMap::new();
    for (stream, (name, shape)) in weights.iter().enumerate() {
        let n: usize = shape.iter().product();
        let values = if is_norm(name) && !name.ends_with(".bias") {
            vec![1.0; n]
        } else if name.ends_with(".bias") || is_silent(name) {
            vec![0.0; n]
        } else {
            let inputs: usize = shape[1..].iter().product();
            let std = (inputs.max(1) as f32).sqrt().recip();
            let mut values = Philox::new(seed, stream as u64).normals(n);
            values.iter_mut().for_each(|x| *x *= std);
            values
        };
        all.insert(
            name.clone(),
            Tensor::from_vec(values, shape.as_slice(), device)?,
        );
    }
    Ok(all)
}

fn is_norm(name: &str) -> bool {
    name.ends_with(".scale") || name.contains("norm")
}

fn is_silent(name: &str) -> bool {
    const SILENT: &[&str] = &[
        "_mod.lin.",
        ".modulation.lin.",
        "adaLN_modulation",
        "final_layer.linear",
        "controlnet_x_embedder",
        "controlnet_blocks",
        "controlnet_single_blocks",
        "input_hint_block.conv_out",
        "detail.conv_out",
    ];
    SILENT.iter().any(|s| name.contains(s))
}

/// A `VarBuilder` over tensors; where they belong to a `Var` (give `var.as_tensor()`), the
/// network made from it is trained by changing the `Var`.
pub fn builder(
    weights: &BTreeMap<String, Tensor>,
    dtype: DType,
    device: &Device,
) -> VarBuilder<'static> {
    let weights = weights
        .iter()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    VarBuilder::from_tensors(weights, dtype, device)
}
