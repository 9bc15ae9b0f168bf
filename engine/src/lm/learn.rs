//! The decoder's forward and backward pass by hand, for training an adapter on the CPU.
//!
//! As tensor operations a layer is some forty nodes of a gradient graph, most of them passes
//! over memory by one core, with the prompts' shared mask multiplied out. Here the whole stack
//! of layers is one node, and so is everything from the last hidden state to the
//! log-probabilities of given tokens:
//!
//! * rows are of any length, one after the other without padding; a row is a [`Tree`], a trunk
//!   (soft prompt and prompt) and branches (completions) that see the trunk and themselves;
//! * of a layer its input, queries, keys, values, attention weights and gate are kept; norms and
//!   activations are computed again on the way back;
//! * constant weights are multiplied in f32, or in bf16 with sums in f32 ([`Products`]);
//!   everything else is f32;
//! * the gradient of a token's log-probability reaches its hidden state as a number times a
//!   vector that is known in the forward pass, so that no logits are kept.
//!
//! Rows are worked on side by side, each apart from the others: its numbers depend neither on the
//! number of cores nor on its company, so that a policy that is still its reference has a margin of
//! exactly 0.
//!
//! Not here: dropout, quantised or bf16 weights, other devices; `Plain::of` says no, and the
//! caller goes through tensor operations ([`Decoder::hidden`]), of which this is a faster copy
//! (a test compares them).

use super::bf16::{self, Bf16Matrix, Pairs};
use super::{Decoder, Matrix};
use crate::Result;
use crate::conv::values;
use crate::host::{Host, Rows, exp, kernel, largest, multiply, sum};
use crate::lora::Adapter;
use crate::nn;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// How constant weights are multiplied while an adapter learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Products {
    /// In f32.
    #[default]
    F32,
    /// Both factors rounded to bf16, sums in f32: about twice as fast on processors with
    /// AVX-512 BF16. On others it is f32.
    Bf16,
}

/// A row: so many tokens that see what came before, then branches that each see those and
/// themselves, and stand in the positions after them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Tokens before the branches.
    pub trunk: usize,
    /// Tokens of each branch.
    pub branches: Vec<usize>,
}

impl Tree {
    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.trunk + self.branches.iter().sum::<usize>()
    }

    /// For each token its position, and where the keys that it sees behind the trunk begin.
    fn places(&self) -> Vec<(usize, usize)> {
        let mut places: Vec<(usize, usize)> = (0..self.trunk).map(|i| (i, 0)).collect();
        for branch in &self.branches {
            let begin = places.len();
            places.extend((0..*branch).map(|i| (self.trunk + i, begin)));
        }
        places
    }
}

// ------------------------------------------------------------------------ constant weights

/// Linear maps of one input, side by side: weights (outputs of each, inputs).
#[derive(Debug)]
struct Frozen {
    weights: Vec<Tensor>,
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
    /// In bf16: the transpose, to multiply activations, and the weights, to multiply gradients.
    halved: Option<(Bf16Matrix, Bf16Matrix)>,
}

impl Frozen {
    fn new(
        weights: Vec<Tensor>,
        bias: Option<Vec<f32>>,
        products: Products,
    ) -> Result<Option<Self>> {
        let inputs = weights[0].dim(1)?;
        let mut outputs = 0;
        let mut starts = Vec::new(); // for each output, the map it belongs to and its row there
        for (i, w) in weights.iter().enumerate() {
            let rows = w.dim(0)?;
            starts.extend((0..rows).map(|r| (i, r)));
            outputs += rows;
        }
        let Some(hosts) = weights.iter().map(Host::of).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let halved = match products {
            Products::F32 => None,
            Products::Bf16 => {
                let maps: Vec<&[f32]> = hosts.iter().map(Host::get).collect();
                let at = |output: usize, input: usize| {
                    let (map, row) = starts[output];
                    maps[map][row * inputs + input]
                };
                Bf16Matrix::new(inputs, outputs, |i, o| at(o, i))
                    .zip(Bf16Matrix::new(outputs, inputs, at))
            }
        };
        drop(hosts);
        Ok(Some(Self {
            weights,
            bias,
            inputs,
            outputs,
            halved,
        }))
    }

    /// x (m, inputs) to (m, outputs), with the adapter's part; and its low-rank (m, ranks).
    fn times(&self, x: &[f32], pack: &Pack) -> (Vec<f32>, Vec<f32>) {
        let m = x.len() / self.inputs;
        let mut y = match &self.bias {
            Some(bias) => bias.repeat(m),
            None => vec![0f32; m * self.outputs],
        };
        let mut u = vec![0f32; m * pack.ranks];
        if let Some((transpose, _)) = &self.halved {
            let x = Pairs::new(x, self.inputs);
            transpose.add_times(&x, &mut y);
            if let Some(half) = &pack.halved {
                half.a_transpose.add_times(&x, &mut u);
                half.b_transpose
                    .add_times(&Pairs::new(&u, pack.ranks), &mut y);
            }
            return (y, u);
        }
        let mut first = 0;
        for w in &self.weights {
            let (Some(host), Ok(n)) = (Host::of(w), w.dim(0)) else {
                unreachable!("`new` has seen that it is plain");
            };
            let w = Rows::new(host.get(), self.inputs).t();
            let shape = (m, n, self.inputs);
            let x = Rows::new(x, self.inputs);
            multiply(shape, x, w, &mut y[first..], self.outputs, true);
            first += n;
        }
        pack.add(x, &mut u, &mut y);
        (y, u)
    }

    /// Gradients g (m, outputs) back to the input x, (m, inputs), given what [`Self::times`] made
    /// of it; adds those of the adapter's factors to `flat`.
    fn back(&self, x: &[f32], u: &[f32], g: &[f32], pack: &Pack, flat: &mut [f32]) -> Vec<f32> {
        let m = g.len() / self.outputs;
        let mut to_x = vec![0f32; m * self.inputs];
        let mut to_u = vec![0f32; m * pack.ranks];
        if let Some((_, weights)) = &self.halved {
            let g = Pairs::new(g, self.outputs);
            weights.add_times(&g, &mut to_x);
            if let Some(half) = &pack.halved {
                half.b.add_times(&g, &mut to_u);
                half.a.add_times(&Pairs::new(&to_u, pack.ranks), &mut to_x);
            }
        } else {
            let mut first = 0;
            for w in &self.weights {
                let (Some(host), Ok(n)) = (Host::of(w), w.dim(0)) else {
                    unreachable!("`new` has seen that it is plain");
                };
                let g = Rows::new(&g[first..], self.outputs);
                let w = Rows::new(host.get(), self.inputs);
                multiply((m, self.inputs, n), g, w, &mut to_x, self.inputs, true);
                first += n;
            }
            pack.add_back(g, &mut to_u, &mut to_x);
        }
        pack.factors_back(x, u, g, &to_u, flat);
        to_x
    }
}

/// Which modules ([`super::MODULES`]) share an input and are multiplied in one.
const TOGETHER: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4, 5], &[6]];
const QKV: usize = 0;
const OUT: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;

#[derive(Debug)]
struct PlainLayer {
    attention_norm: Vec<f32>,
    mlp_norm: Vec<f32>,
    maps: [Frozen; 4],
}

/// A decoder's weights as the passes here want them.
#[derive(Debug)]
pub struct Plain {
    layers: Vec<PlainLayer>,
    norm: Vec<f32>,
    head: Frozen,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    hidden: usize,
    eps: f32,
    frequencies: Vec<f64>,
}

impl Plain {
    /// `None` where the decoder is not f32 on the CPU.
    pub(super) fn of(decoder: &Decoder, products: Products) -> Result<Option<Self>> {
        if decoder.dtype() != DType::F32 || !decoder.device().is_cpu() {
            return Ok(None);
        }
        let dense = |m: &Matrix| match m {
            Matrix::Dense(w) if w.is_contiguous() && !w.track_op() => Some(w.clone()),
            _ => None,
        };
        let mut layers = Vec::with_capacity(decoder.layers.len());
        for layer in &decoder.layers {
            let mut maps = Vec::with_capacity(TOGETHER.len());
            for modules in TOGETHER {
                let parts = modules.iter().map(|m| &layer.projections[*m]);
                let weights = parts.clone().map(|p| dense(&p.matrix)).collect();
                let Some(weights) = weights else {
                    return Ok(None);
                };
                let weights: Vec<Tensor> = weights;
                let mut bias = Vec::new();
                for (part, w) in parts.clone().zip(&weights) {
                    match &part.bias {
                        Some(b) => bias.extend(values(b)?),
                        None => bias.resize(bias.len() + w.dim(0)?, 0.0),
                    }
                }
                let bias = parts.clone().any(|p| p.bias.is_some()).then_some(bias);
                let Some(map) = Frozen::new(weights, bias, products)? else {
                    return Ok(None);
                };
                maps.push(map);
            }
            let Ok(maps) = <[Frozen; 4]>::try_from(maps) else {
                return Ok(None);
            };
            layers.push(PlainLayer {
                attention_norm: values(&layer.attention_norm)?,
                mlp_norm: values(&layer.mlp_norm)?,
                maps,
            });
        }
        let head = match dense(&decoder.head) {
            Some(head) => Frozen::new(vec![head], None, products)?,
            None => None,
        };
        let Some(head) = head else {
            return Ok(None);
        };
        let c = &decoder.config;
        Ok(Some(Self {
            layers,
            norm: values(&decoder.norm)?,
            head,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            hidden: c.hidden,
            eps: c.eps as f32,
            frequencies: decoder.frequencies.clone(),
        }))
    }

    /// Columns of queries, keys and values together.
    fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Operations a second of a product of 512 × 576 × 1,536 in these products on one core: what
/// the share of a machine that a run uses is measured against.
pub fn peak(products: Products) -> f64 {
    let (m, k, n) = (512, 576, 1536);
    let (x, w) = (vec![1f32; m * k], vec![1f32; k * n]);
    let mut y = vec![0f32; m * n];
    let halved = match products {
        Products::Bf16 => Bf16Matrix::new(k, n, |_, _| 1.0),
        Products::F32 => None,
    };
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = std::time::Instant::now();
        match &halved {
            Some(w) => w.add_times(&Pairs::new(&x, k), &mut y),
            None => multiply(
                (m, n, k),
                Rows::new(&x, k),
                Rows::new(&w, n),
                &mut y,
                n,
                true,
            ),
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (m * k * n) as f64 / best
}

/// What products really are on this processor.
pub fn possible(products: Products) -> Products {
    match bf16::available() {
        true => products,
        false => Products::F32,
    }
}

// -------------------------------------------------------------------------------- adapters

/// One module's factors in the list of all of them.
#[derive(Debug)]
struct Factors {
    /// Where A (r, inputs) and B (outputs, r) begin in the list.
    a: usize,
    b: usize,
    r: usize,
    outputs: usize,
    scale: f32,
    /// First column of the module's output among those of its group, and of its rank among the
    /// group's ranks.
    column: usize,
    rank: usize,
}

/// The factors of the modules that share an input.
#[derive(Debug, Default)]
struct Pack {
    parts: Vec<Factors>,
    /// All A, one under the other: (ranks, inputs).
    a: Vec<f32>,
    /// scale·B of each.
    b: Vec<Vec<f32>>,
    ranks: usize,
    inputs: usize,
    outputs: usize,
    halved: Option<HalvedPack>,
}

/// The same in bf16: A (ranks, inputs), all scale·B as one (outputs, ranks) with zeros where an
/// output belongs to another module, and their transposes.
#[derive(Debug)]
struct HalvedPack {
    a: Bf16Matrix,
    a_transpose: Bf16Matrix,
    b: Bf16Matrix,
    b_transpose: Bf16Matrix,
}

impl Pack {
    fn halve(&mut self) {
        if self.ranks == 0 {
            return;
        }
        let mut b = vec![0f32; self.outputs * self.ranks];
        for (part, values) in self.parts.iter().zip(&self.b) {
            for (i, row) in values.chunks_exact(part.r).enumerate() {
                let at = (part.column + i) * self.ranks + part.rank;
                b[at..at + part.r].copy_from_slice(row);
            }
        }
        let (ranks, inputs, outputs) = (self.ranks, self.inputs, self.outputs);
        let a = |i: usize, j: usize| self.a[i * inputs + j];
        let b = |i: usize, j: usize| b[i * ranks + j];
        let all = (
            Bf16Matrix::new(ranks, inputs, a),
            Bf16Matrix::new(inputs, ranks, |i, j| a(j, i)),
            Bf16Matrix::new(outputs, ranks, b),
            Bf16Matrix::new(ranks, outputs, |i, j| b(j, i)),
        );
        self.halved = match all {
            (Some(a), Some(a_transpose), Some(b), Some(b_transpose)) => Some(HalvedPack {
                a,
                a_transpose,
                b,
                b_transpose,
            }),
            _ => None,
        };
    }

    /// u = x·Aᵀ (m, ranks), and y += u·(scale·B)ᵀ.
    fn add(&self, x: &[f32], u: &mut [f32], y: &mut [f32]) {
        if self.ranks == 0 {
            return;
        }
        let m = x.len() / self.inputs;
        let a = Rows::new(&self.a, self.inputs).t();
        let shape = (m, self.ranks, self.inputs);
        multiply(shape, Rows::new(x, self.inputs), a, u, self.ranks, false);
        for (part, b) in self.parts.iter().zip(&self.b) {
            let shape = (m, part.outputs, part.r);
            let u = Rows::new(&u[part.rank..], self.ranks);
            let y = &mut y[part.column..];
            multiply(shape, u, Rows::new(b, part.r).t(), y, self.outputs, true);
        }
    }

    /// From the gradient g (m, outputs) of y to that of u, and on to that of x.
    fn add_back(&self, g: &[f32], to_u: &mut [f32], to_x: &mut [f32]) {
        if self.ranks == 0 {
            return;
        }
        let m = g.len() / self.outputs;
        for (part, b) in self.parts.iter().zip(&self.b) {
            let g = Rows::new(&g[part.column..], self.outputs);
            let to_u = &mut to_u[part.rank..];
            let shape = (m, part.r, part.outputs);
            multiply(shape, g, Rows::new(b, part.r), to_u, self.ranks, true);
        }
        let (a, to_u) = (Rows::new(&self.a, self.inputs), Rows::new(to_u, self.ranks));
        multiply(
            (m, self.inputs, self.ranks),
            to_u,
            a,
            to_x,
            self.inputs,
            true,
        );
    }

    /// Adds the gradients of A and B to their places in `flat`.
    fn factors_back(&self, x: &[f32], u: &[f32], g: &[f32], to_u: &[f32], flat: &mut [f32]) {
        if self.ranks == 0 {
            return;
        }
        let m = x.len() / self.inputs;
        for part in &self.parts {
            // Its transpose, (r, outputs): long rows suit the product.
            let mut to_b = vec![0f32; part.r * part.outputs];
            let u = Rows::new(&u[part.rank..], self.ranks).t();
            let g = Rows::new(&g[part.column..], self.outputs);
            let shape = (part.r, part.outputs, m);
            multiply(shape, u, g, &mut to_b, part.outputs, false);
            let to = &mut flat[part.b..part.b + to_b.len()];
            for (k, row) in to_b.chunks_exact(part.outputs).enumerate() {
                for (i, b) in row.iter().enumerate() {
                    to[i * part.r + k] += part.scale * b;
                }
            }
        }
        let mut to_a = vec![0f32; self.ranks * self.inputs];
        let to_u = Rows::new(to_u, self.ranks).t();
        let shape = (self.ranks, self.inputs, m);
        let x = Rows::new(x, self.inputs);
        multiply(shape, to_u, x, &mut to_a, self.inputs, false);
        for part in &self.parts {
            let n = part.r * self.inputs;
            let from = &to_a[part.rank * self.inputs..][..n];
            add(&mut flat[part.a..part.a + n], from);
        }
    }
}

/// An adapter's factors as one tensor (with its gradient), and in packs.
struct Lora {
    flat: Tensor,
    packs: Vec<[Pack; 4]>,
}

impl Lora {
    fn of(plain: &Plain, adapter: Option<&Adapter>) -> Result<Self> {
        let mut all = Vec::new();
        let mut packs = Vec::with_capacity(plain.layers.len());
        let mut at = 0;
        for (index, layer) in plain.layers.iter().enumerate() {
            let mut here: [Pack; 4] = std::array::from_fn(|_| Pack::default());
            for (group, pack) in here.iter_mut().enumerate() {
                let map = &layer.maps[group];
                (pack.inputs, pack.outputs) = (map.inputs, map.outputs);
                let mut column = 0;
                for (module, w) in TOGETHER[group].iter().zip(&map.weights) {
                    let outputs = w.dim(0)?;
                    if let Some(pair) = adapter.and_then(|a| a.pair(index, *module)) {
                        let r = pair.a.dim(0)?;
                        let (a, b) = (at, at + r * map.inputs);
                        at = b + outputs * r;
                        all.push(pair.a.to_dtype(DType::F32)?.flatten_all()?);
                        all.push(pair.b.to_dtype(DType::F32)?.flatten_all()?);
                        pack.a.extend(values(&pair.a)?);
                        let scale = pair.scale as f32;
                        let mut scaled = values(&pair.b)?;
                        scaled.iter_mut().for_each(|b| *b *= scale);
                        pack.b.push(scaled);
                        pack.parts.push(Factors {
                            a,
                            b,
                            r,
                            outputs,
                            scale,
                            column,
                            rank: pack.ranks,
                        });
                        pack.ranks += r;
                    }
                    column += outputs;
                }
            }
            if plain.head.halved.is_some() {
                here.iter_mut().for_each(Pack::halve);
            }
            packs.push(here);
        }
        let flat = match all.is_empty() {
            true => Tensor::zeros(1, DType::F32, &Device::Cpu)?,
            false => Tensor::cat(&all, 0)?,
        };
        Ok(Self { flat, packs })
    }
}

// ------------------------------------------------------------------------------ the passes

kernel! {
    /// Each row of x over its root mean square, times w; one over the root into `scales`.
    fn norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32], scales: &mut [f32]) {
        let d = w.len();
        let rows = x.chunks_exact(d).zip(out.chunks_exact_mut(d)).zip(scales);
        for ((x, out), scale) in rows {
            *scale = 1.0 / (sum(x, |x| x * x) / d as f32 + eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                *out = x * *scale * w;
            }
        }
    }
}

kernel! {
    /// Adds to `to` the gradient through [`norm`].
    fn norm_back(x: &[f32], w: &[f32], scales: &[f32], g: &[f32], to: &mut [f32]) {
        let d = w.len();
        let rows = x.chunks_exact(d).zip(g.chunks_exact(d)).zip(to.chunks_exact_mut(d));
        let mut weighed = vec![0f32; d];
        for (((x, g), to), scale) in rows.zip(scales) {
            for (((t, g), w), x) in weighed.iter_mut().zip(g).zip(w).zip(x) {
                *t = g * w * x;
            }
            let along = sum(&weighed, |x| x) / d as f32 * scale * scale;
            for (((to, g), w), x) in to.iter_mut().zip(g).zip(w).zip(x) {
                *to += scale * (g * w - x * along);
            }
        }
    }
}

kernel! {
    /// silu(gate)·up for rows of gate and up side by side.
    fn gated(both: &[f32], out: &mut [f32], d: usize) {
        for (row, out) in both.chunks_exact(2 * d).zip(out.chunks_exact_mut(d)) {
            let (gate, up) = row.split_at(d);
            for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}

kernel! {
    /// The gradient of [`gated`].
    fn gated_back(both: &[f32], g: &[f32], out: &mut [f32], d: usize) {
        let rows = both.chunks_exact(2 * d).zip(g.chunks_exact(d));
        for ((row, g), out) in rows.zip(out.chunks_exact_mut(2 * d)) {
            let (gate, up) = row.split_at(d);
            let (to_gate, to_up) = out.split_at_mut(d);
            let tos = to_gate.iter_mut().zip(to_up);
            for (((to_gate, to_up), g), (gate, up)) in tos.zip(g).zip(gate.iter().zip(up)) {
                let s = 1.0 / (1.0 + exp(-gate));
                let silu = gate * s;
                *to_up = g * silu;
                *to_gate = g * up * (s + silu * (1.0 - s));
            }
        }
    }
}

kernel! {
    /// Rotates i with i + d/2 in one head; `turn` 1 forwards, -1 backwards.
    fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], turn: f32) {
        let (a, b) = x.split_at_mut(cos.len());
        for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let s = turn * s;
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

kernel! {
    /// Scores to e^(scale·(score - largest)) over their sum, in place.
    fn soften(row: &mut [f32], scale: f32, most: f32, total: &mut f32) {
        for x in row.iter_mut() {
            *x = exp(scale * (*x - most));
        }
        *total += sum(row, |x| x);
    }
}

kernel! {
    fn times_all(row: &mut [f32], factor: f32) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

kernel! {
    /// Weights p and their gradients g to the gradients of scores, in g.
    fn soften_back(p: &[f32], g: &mut [f32], scale: f32, keys: usize) {
        let mut both = vec![0f32; keys];
        for (p, g) in p.chunks_exact(keys).zip(g.chunks_exact_mut(keys)) {
            both.iter_mut().zip(p).zip(g.iter()).for_each(|((b, p), g)| *b = p * g);
            let along = sum(&both, |x| x);
            g.iter_mut().zip(p).for_each(|(g, p)| *g = scale * p * (*g - along));
        }
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// A row, and where each of its tokens stands.
struct Unit {
    tree: Tree,
    /// First token among those of all rows, and tokens.
    first: usize,
    tokens: usize,
    /// For each token, cos and sin of its position: (tokens, head_dim / 2).
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Unit {
    fn all(trees: &[Tree], frequencies: &[f64]) -> Vec<Self> {
        let mut units: Vec<Self> = Vec::with_capacity(trees.len());
        for tree in trees {
            let (mut cos, mut sin) = (Vec::new(), Vec::new());
            for (position, _) in tree.places() {
                for f in frequencies {
                    let angle = position as f64 * f;
                    cos.push(angle.cos() as f32);
                    sin.push(angle.sin() as f32);
                }
            }
            units.push(Self {
                tree: tree.clone(),
                first: units.last().map_or(0, |u| u.first + u.tokens),
                tokens: tree.tokens(),
                cos,
                sin,
            });
        }
        units
    }
}

/// What the way back needs of a layer.
struct Kept {
    x: Vec<f32>,
    qkv: Vec<f32>,
    /// Attention weights: head after head, the trunk's queries, then the branches'.
    weights: Vec<f32>,
    mixed: Vec<f32>,
    middle: Vec<f32>,
    both: Vec<f32>,
    /// u of each pack.
    low: [Vec<f32>; 4],
    scales: [Vec<f32>; 2],
}

impl Plain {
    /// The queries of a tree that see as many keys: (first, how many, keys). The trunk's see
    /// the trunk, the branches' see everything but other branches.
    fn spans(tree: &Tree) -> [(usize, usize, usize); 2] {
        let (trunk, all) = (tree.trunk, tree.tokens());
        [(0, trunk, trunk), (trunk, all - trunk, all)]
    }

    /// Where a head's queries, keys and values begin in a row.
    fn columns(&self, head: usize) -> (usize, usize, usize) {
        let (d, kv) = (self.head_dim, head / (self.heads / self.kv_heads));
        (
            head * d,
            (self.heads + kv) * d,
            (self.heads + self.kv_heads + kv) * d,
        )
    }

    fn rotate_all(&self, unit: &Unit, qkv: &mut [f32], turn: f32) {
        let half = self.head_dim / 2;
        for (i, row) in qkv.chunks_exact_mut(self.qkv()).enumerate() {
            let at = i * half..(i + 1) * half;
            let turned = (self.heads + self.kv_heads) * self.head_dim;
            for head in row[..turned].chunks_exact_mut(self.head_dim) {
                rotate(head, &unit.cos[at.clone()], &unit.sin[at.clone()], turn);
            }
        }
    }

    /// Attention of a row, (tokens, heads · head_dim), and its weights.
    fn attend(&self, unit: &Unit, qkv: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (d, wide, width) = (self.head_dim, self.qkv(), self.heads * self.head_dim);
        let scale = 1.0 / (d as f32).sqrt();
        let mut out = vec![0f32; unit.tokens * width];
        let mut all = Vec::new();
        let (trunk_tokens, places) = (unit.tree.trunk, unit.tree.places());
        for head in 0..self.heads {
            let (q, k, v) = self.columns(head);
            for (first, n, keys) in Self::spans(&unit.tree) {
                if n == 0 {
                    continue;
                }
                let at = all.len();
                all.resize(at + n * keys, 0f32);
                let p = &mut all[at..];
                let queries = Rows::new(&qkv[first * wide + q..], wide);
                let transposed = Rows::new(&qkv[k..], wide).t();
                multiply((n, keys, d), queries, transposed, p, keys, false);
                for (i, row) in p.chunks_exact_mut(keys).enumerate() {
                    let query = first + i;
                    // The trunk as far as the query, and the query's own branch.
                    let trunk = (query + 1).min(trunk_tokens);
                    let own = places[query].1.max(trunk);
                    let end = (query + 1).max(own);
                    let most = largest(&row[..trunk]).max(largest(&row[own..end]));
                    row[trunk..own].fill(0.0);
                    row[end..].fill(0.0);
                    let mut total = 0.0;
                    soften(&mut row[..trunk], scale, most, &mut total);
                    soften(&mut row[own..end], scale, most, &mut total);
                    times_all(row, 1.0 / total);
                }
                let to = &mut out[first * width + head * d..];
                let values = Rows::new(&qkv[v..], wide);
                multiply((n, d, keys), Rows::new(p, keys), values, to, width, false);
            }
        }
        (out, all)
    }

    /// The gradient of queries, keys and values from that of [`Self::attend`]'s output.
    fn attend_back(&self, unit: &Unit, qkv: &[f32], weights: &[f32], g: &[f32]) -> Vec<f32> {
        let (d, wide, width) = (self.head_dim, self.qkv(), self.heads * self.head_dim);
        let scale = 1.0 / (d as f32).sqrt();
        let mut to = vec![0f32; qkv.len()];
        let mut at = 0;
        for head in 0..self.heads {
            let (q, k, v) = self.columns(head);
            for (first, n, keys) in Self::spans(&unit.tree) {
                if n == 0 {
                    continue;
                }
                let p = &weights[at..at + n * keys];
                at += n * keys;
                let g = Rows::new(&g[first * width + head * d..], width);
                let pt = Rows::new(p, keys).t();
                multiply((keys, d, n), pt, g, &mut to[v..], wide, true);
                let mut ds = vec![0f32; n * keys];
                let values = Rows::new(&qkv[v..], wide).t();
                multiply((n, keys, d), g, values, &mut ds, keys, false);
                soften_back(p, &mut ds, scale, keys);
                let ds = Rows::new(&ds, keys);
                let keys_here = Rows::new(&qkv[k..], wide);
                let to_q = &mut to[first * wide + q..];
                multiply((n, d, keys), ds, keys_here, to_q, wide, true);
                let queries = Rows::new(&qkv[first * wide + q..], wide);
                multiply((keys, d, n), ds.t(), queries, &mut to[k..], wide, true);
            }
        }
        to
    }

    fn normed(&self, x: &[f32], w: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![0f32; x.len()];
        let mut scales = vec![0f32; x.len() / w.len()];
        norm(x, w, self.eps, &mut out, &mut scales);
        (out, scales)
    }

    /// A row through all layers and the last norm; with what the way back needs if `keep`.
    fn forward(
        &self,
        unit: &Unit,
        mut x: Vec<f32>,
        packs: &[[Pack; 4]],
        keep: bool,
    ) -> (Vec<f32>, Vec<Kept>, Vec<f32>) {
        let mut kept = Vec::new();
        for (layer, packs) in self.layers.iter().zip(packs) {
            let (n, scale1) = self.normed(&x, &layer.attention_norm);
            let (mut qkv, low0) = layer.maps[QKV].times(&n, &packs[QKV]);
            self.rotate_all(unit, &mut qkv, 1.0);
            let (mixed, weights) = self.attend(unit, &qkv);
            let (mut middle, low1) = layer.maps[OUT].times(&mixed, &packs[OUT]);
            add(&mut middle, &x);
            let (n, scale2) = self.normed(&middle, &layer.mlp_norm);
            let (both, low2) = layer.maps[GATE_UP].times(&n, &packs[GATE_UP]);
            let inner = layer.maps[DOWN].inputs;
            let mut active = vec![0f32; unit.tokens * inner];
            gated(&both, &mut active, inner);
            let (mut y, low3) = layer.maps[DOWN].times(&active, &packs[DOWN]);
            add(&mut y, &middle);
            let x_before = std::mem::replace(&mut x, y);
            if keep {
                kept.push(Kept {
                    x: x_before,
                    qkv,
                    weights,
                    mixed,
                    middle,
                    both,
                    low: [low0, low1, low2, low3],
                    scales: [scale1, scale2],
                });
            }
        }
        let (out, _) = self.normed(&x, &self.norm);
        (out, kept, x)
    }

    /// From the gradient of [`Self::forward`]'s output to that of its input; adds those of the
    /// adapter's factors to `flat`.
    fn backward(
        &self,
        unit: &Unit,
        (kept, last): (&[Kept], &[f32]),
        packs: &[[Pack; 4]],
        g: &[f32],
        flat: &mut [f32],
    ) -> Vec<f32> {
        let (_, scale) = self.normed(last, &self.norm);
        let mut dx = vec![0f32; g.len()];
        norm_back(last, &self.norm, &scale, g, &mut dx);
        let layers = self.layers.iter().zip(packs).zip(kept);
        for ((layer, packs), kept) in layers.rev() {
            let inner = layer.maps[DOWN].inputs;
            let mut active = vec![0f32; unit.tokens * inner];
            gated(&kept.both, &mut active, inner);
            let back = |map: usize, x: &[f32], g: &[f32], flat: &mut [f32]| {
                layer.maps[map].back(x, &kept.low[map], g, &packs[map], flat)
            };
            let to_active = back(DOWN, &active, &dx, flat);
            let mut to_both = vec![0f32; kept.both.len()];
            gated_back(&kept.both, &to_active, &mut to_both, inner);
            let (n, _) = self.normed(&kept.middle, &layer.mlp_norm);
            let to_n = back(GATE_UP, &n, &to_both, flat);
            norm_back(
                &kept.middle,
                &layer.mlp_norm,
                &kept.scales[1],
                &to_n,
                &mut dx,
            );
            let to_mixed = back(OUT, &kept.mixed, &dx, flat);
            let mut to_qkv = self.attend_back(unit, &kept.qkv, &kept.weights, &to_mixed);
            self.rotate_all(unit, &mut to_qkv, -1.0);
            let (n, _) = self.normed(&kept.x, &layer.attention_norm);
            let to_n = back(QKV, &n, &to_qkv, flat);
            norm_back(
                &kept.x,
                &layer.attention_norm,
                &kept.scales[0],
                &to_n,
                &mut dx,
            );
        }
        dx
    }
}

/// Embeddings x (tokens of all trees, hidden) to hidden states after the final norm, of the
/// same shape, with gradients to x and to the adapter's variables.
pub fn hidden(
    plain: &Arc<Plain>,
    x: &Tensor,
    trees: &[Tree],
    adapter: Option<&Adapter>,
) -> Result<Tensor> {
    let lora = Lora::of(plain, adapter)?;
    let units = Unit::all(trees, &plain.frequencies);
    let width = plain.hidden;
    let of =
        move |all: &[f32], u: &Unit| all[u.first * width..(u.first + u.tokens) * width].to_vec();
    let keep = x.track_op() || lora.flat.track_op();
    let inputs = values(&x.detach())?;
    let passes: Vec<_> = units
        .par_iter()
        .map(|unit| plain.forward(unit, of(&inputs, unit), &lora.packs, keep))
        .collect();
    let out: Vec<f32> = passes.iter().flat_map(|p| p.0.iter().copied()).collect();
    let value = Tensor::from_vec(out, x.shape(), &Device::Cpu)?;
    if !keep {
        return Ok(value);
    }
    let (plain, packs, flat) = (plain.clone(), lora.packs, lora.flat);
    let kept: Vec<_> = passes
        .into_iter()
        .map(|(_, kept, last)| (kept, last))
        .collect();
    Ok(nn::attach2(x, &flat, &value, move |x, flat, _, g| {
        let (g, n) = (values(g)?, flat.elem_count());
        let parts: Vec<(Vec<f32>, Vec<f32>)> = units
            .par_iter()
            .zip(&kept)
            .map(|(unit, (kept, last))| {
                let mut to_flat = vec![0f32; n];
                let g = of(&g, unit);
                let dx = plain.backward(unit, (kept, last), &packs, &g, &mut to_flat);
                (dx, to_flat)
            })
            .collect();
        let (mut to_x, mut to_flat) = (Vec::with_capacity(g.len()), vec![0f32; n]);
        for (dx, part) in parts {
            to_x.extend(dx);
            add(&mut to_flat, &part);
        }
        Ok((
            Some(Tensor::from_vec(to_x, x.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(to_flat, n, &Device::Cpu)?),
        ))
    })?)
}

/// What the head says of one token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Said {
    /// Entropy of all tokens' probabilities.
    pub entropy: f32,
    /// Mean logit.
    pub mean: f32,
    /// Whether it was the likeliest.
    pub best: bool,
}

/// Tokens whose logits exist at a time (a core).
const LOGITS_ROWS: usize = 48;

/// Hidden states (n, hidden) to the log-probabilities (n) of `targets`, with a gradient. `rows`
/// has how many of them belong to each row.
pub fn log_probabilities(
    plain: &Arc<Plain>,
    hidden: &Tensor,
    targets: &[u32],
    rows: &[usize],
) -> Result<(Tensor, Vec<Said>)> {
    let width = plain.hidden;
    let keep = hidden.track_op();
    let states = values(&hidden.detach())?;
    let none = Pack::default();
    let mut spans = Vec::new();
    let mut first = 0;
    for n in rows {
        let end = first + n;
        spans.extend(
            (first..end)
                .step_by(LOGITS_ROWS)
                .map(|at| at..(at + LOGITS_ROWS).min(end)),
        );
        first = end;
    }
    let parts: Vec<(Vec<f32>, Vec<Said>, Vec<f32>)> = spans
        .into_par_iter()
        .map(|span| {
            let states = &states[span.start * width..span.end * width];
            let targets = &targets[span];
            let mut logits = plain.head.times(states, &none).0;
            let vocab = plain.head.outputs;
            let (mut logps, mut said) = (Vec::new(), Vec::new());
            for (row, target) in logits.chunks_exact_mut(vocab).zip(targets) {
                let most = largest(row);
                let own = row[*target as usize];
                let mean = sum(row, |x| x) / vocab as f32;
                let (mut total, mut weighted) = (0.0, 0.0);
                logits_row(row, most, &mut total, &mut weighted);
                let log_total = total.ln();
                logps.push(own - most - log_total);
                said.push(Said {
                    entropy: log_total - weighted / total,
                    mean,
                    best: own == most,
                });
                if keep {
                    // d logp / d logits = (1 at the target) - probabilities
                    times_all(row, -1.0 / total);
                    row[*target as usize] += 1.0;
                }
            }
            let slope = match keep {
                true => plain.head.back(states, &[], &logits, &none, &mut []),
                false => Vec::new(),
            };
            (logps, said, slope)
        })
        .collect();
    let logps: Vec<f32> = parts.iter().flat_map(|p| p.0.iter().copied()).collect();
    let said = parts.iter().flat_map(|p| p.1.iter().copied()).collect();
    let value = Tensor::from_vec(logps, targets.len(), &Device::Cpu)?;
    if !keep {
        return Ok((value, said));
    }
    let slopes: Vec<Vec<f32>> = parts.into_iter().map(|p| p.2).collect();
    let logps = nn::attach1(hidden, &value, move |hidden, _, g| {
        let mut to = slopes.concat();
        for (row, g) in to.chunks_exact_mut(width).zip(values(g)?) {
            times_all(row, g);
        }
        Ok(Some(Tensor::from_vec(to, hidden.shape(), &Device::Cpu)?))
    })?;
    Ok((logps, said))
}

kernel! {
    /// Logits to e^(logit - most), with their sum and the sum of (logit - most)·e^(logit - most).
    fn logits_row(row: &mut [f32], most: f32, total: &mut f32, weighted: &mut f32) {
        // Some thousand at a time, so that the three passes meet in the cache.
        for part in row.chunks_mut(4096) {
            let mut products = [0f32; 4096];
            for (x, y) in part.iter_mut().zip(&mut products) {
                let shifted = *x - most;
                *x = exp(shifted);
                *y = shifted * *x;
            }
            *total += sum(part, |x| x);
            *weighted += sum(&products[..part.len()], |x| x);
        }
    }
}
