//! A layer as one node of the gradient graph, for training an adapter or a soft prompt on any
//! device.
//!
//! As tensor operations a layer with an adapter is some seventy nodes, and on the way back candle
//! fills a tensor with zeros and adds to it for every input of every node. Here a layer's way back
//! is written out: norms and activations are computed again, and of the forward pass only what
//! follows is kept: queries, keys, values, attention's output, the sum after it, gate and up, and
//! what each module's A made of its input.
//!
//! f32 on a CPU without dropout does without graphs altogether ([`super::learn`]).

use super::{Decoder, Dropout, Layer, MODULES, Run};
use crate::lora::Pair;
use crate::nn::{self, Mask, RopeLayout};
use crate::{Error, Result};
use candle_core::{DType, Result as CandleResult, Tensor};

/// Everything that a layer's two ways need, apart from its input.
struct Node {
    layer: Layer,
    index: usize,
    /// The adapter's factors (scale in B) in the numbers of x.
    pairs: [Option<Pair>; MODULES.len()],
    dropout: Option<Dropout>,
    cos: Tensor,
    sin: Tensor,
    mask: Mask,
    eps: f64,
    /// Rows and tokens of each.
    shape: (usize, usize),
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// What the way back needs of the way there.
struct Kept {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixed: Tensor,
    middle: Tensor,
    gate: Tensor,
    up: Tensor,
    low: [Option<Tensor>; MODULES.len()],
}

/// Layer `index` on x (b, t, hidden), with gradients to x and to the adapter; `None` where nothing
/// is to be learnt, or the layer's own weights are.
pub(super) fn layer(
    decoder: &Decoder,
    index: usize,
    x: &Tensor,
    run: &Run,
) -> Result<Option<Tensor>> {
    let own = &decoder.layers[index];
    let pair = |module| run.adapter.and_then(|a| a.pair(index, module));
    let factors: Vec<&Tensor> = (0..MODULES.len())
        .filter_map(pair)
        .flat_map(|pair| [&pair.a, &pair.b])
        .collect();
    let learns = x.track_op() || factors.iter().any(|t| t.track_op());
    if !learns || own.learns() {
        return Ok(None);
    }
    let (b, t, width) = x.dims3()?;
    let mut pairs = [const { None }; MODULES.len()];
    for (module, own) in pairs.iter_mut().enumerate() {
        *own = match pair(module) {
            Some(pair) => Some(Pair {
                a: pair.a.detach().to_dtype(x.dtype())?,
                b: (pair.b.detach() * pair.scale)?.to_dtype(x.dtype())?,
                scale: pair.scale,
            }),
            None => None,
        };
    }
    let c = &decoder.config;
    let node = Node {
        layer: own.clone(),
        index,
        pairs,
        dropout: run.dropout,
        cos: run.cos.clone(),
        sin: run.sin.clone(),
        mask: run.mask.clone(),
        eps: c.eps,
        shape: (b, t),
        heads: c.heads,
        kv_heads: c.kv_heads,
        head_dim: c.head_dim,
    };
    let (value, kept) = node.forward(&x.detach().reshape((b * t, width))?)?;
    let value = value.reshape((b, t, width))?;
    let back = move |x: &Tensor, g: &Tensor| -> CandleResult<(Tensor, Vec<Tensor>)> {
        let rows = |x: &Tensor| x.detach().reshape((b * t, width))?.contiguous();
        let (dx, factors) = node.back(&rows(x)?, &kept, &rows(g)?)?;
        Ok((dx.reshape((b, t, width))?, factors))
    };
    if factors.is_empty() {
        let learnt = nn::attach1(x, &value, move |x, _, g| Ok(Some(back(x, g)?.0)))?;
        return Ok(Some(learnt));
    }
    // A node has few inputs: all factors come as one.
    let flat = factors
        .iter()
        .map(|t| t.to_dtype(DType::F32)?.flatten_all())
        .collect::<CandleResult<Vec<_>>>()?;
    let flat = Tensor::cat(&flat, 0)?;
    let learnt = nn::attach2(x, &flat, &value, move |x, _, _, g| {
        let (dx, factors) = back(x, g)?;
        Ok((Some(dx), Some(Tensor::cat(&factors, 0)?)))
    })?;
    Ok(Some(learnt))
}

impl Layer {
    /// Whether its own weights are being learnt.
    fn learns(&self) -> bool {
        let maps = self.projections.iter().any(|p| {
            p.bias.as_ref().is_some_and(Tensor::track_op)
                || matches!(&p.matrix, super::Matrix::Dense(w) if w.track_op())
        });
        maps || self.attention_norm.track_op() || self.mlp_norm.track_op()
    }
}

impl Node {
    /// x (n, inputs) with a module's numbers dropped.
    fn dropped(&self, module: usize, x: &Tensor) -> Result<Tensor> {
        match self.dropout {
            Some(d) => d.of(x, self.index, module),
            None => Ok(x.clone()),
        }
    }

    /// x (n, inputs) through a module; and what its A made of x.
    fn project(&self, module: usize, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let own = &self.layer.projections[module];
        let mut y = own.matrix.forward(x)?;
        let mut low = None;
        if let Some(pair) = &self.pairs[module] {
            let made = nn::matmul_t(&self.dropped(module, x)?, &pair.a)?;
            y = (y + nn::matmul_t(&made, &pair.b)?)?;
            low = Some(made);
        }
        if let Some(bias) = &own.bias {
            y = y.broadcast_add(bias)?;
        }
        Ok((y, low))
    }

    /// From the gradient g (n, outputs) of [`Self::project`] to that of x; puts those of A and B
    /// into `factors`.
    fn project_back(
        &self,
        module: usize,
        (x, low): (&Tensor, &Option<Tensor>),
        g: &Tensor,
        factors: &mut [Option<[Tensor; 2]>; MODULES.len()],
    ) -> Result<Tensor> {
        let own = &self.layer.projections[module];
        let dx = g.matmul(&own.matrix.dense(g.dtype(), g.device())?)?;
        let (Some(pair), Some(low)) = (&self.pairs[module], low) else {
            return Ok(dx);
        };
        let to_low = g.matmul(&pair.b)?;
        let flat = |t: Tensor| t.to_dtype(DType::F32)?.flatten_all();
        let a = to_low.t()?.matmul(&self.dropped(module, x)?)?;
        let b = g.t()?.matmul(low)?;
        // B has the scale in it, its gradient has not.
        factors[module] = Some([flat(a)?, (flat(b)? * pair.scale)?]);
        Ok((dx + self.dropped(module, &to_low.matmul(&pair.a)?)?)?)
    }

    /// (n, heads · head_dim) to (b, heads, t, head_dim).
    fn heads(&self, x: &Tensor, heads: usize) -> CandleResult<Tensor> {
        let (b, t) = self.shape;
        x.reshape((b, t, heads, self.head_dim))?.transpose(1, 2)
    }

    /// And back.
    fn rows(&self, x: &Tensor) -> CandleResult<Tensor> {
        let (b, t) = self.shape;
        let heads = x.dim(1)?;
        x.transpose(1, 2)?.reshape((b * t, heads * self.head_dim))
    }

    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    fn forward(&self, x: &Tensor) -> Result<(Tensor, Kept)> {
        let normed = nn::rms_norm(x, &self.layer.attention_norm, self.eps)?;
        let (q, low0) = self.project(0, &normed)?;
        let (k, low1) = self.project(1, &normed)?;
        let (v, low2) = self.project(2, &normed)?;
        let turn = |x: &Tensor| nn::rope(x, &self.cos, &self.sin, RopeLayout::Halves);
        let q = turn(&self.heads(&q, self.heads)?)?;
        let k = turn(&self.heads(&k, self.kv_heads)?)?;
        let v = self.heads(&v, self.kv_heads)?.contiguous()?;
        let mixed = nn::attention(&q, &k, &v, self.scale(), &self.mask)?;
        let (out, low3) = self.project(3, &self.rows(&mixed)?)?;
        let middle = (x + out)?;
        let normed = nn::rms_norm(&middle, &self.layer.mlp_norm, self.eps)?;
        let (gate, low4) = self.project(4, &normed)?;
        let (up, low5) = self.project(5, &normed)?;
        let (down, low6) = self.project(6, &nn::swiglu(&gate, &up)?)?;
        let value = (&middle + down)?;
        let kept = Kept {
            q,
            k,
            v,
            mixed,
            middle,
            gate,
            up,
            low: [low0, low1, low2, low3, low4, low5, low6],
        };
        Ok((value, kept))
    }

    /// From the gradient g of the value to those of x, and of all factors one after the other.
    fn back(&self, x: &Tensor, kept: &Kept, g: &Tensor) -> CandleResult<(Tensor, Vec<Tensor>)> {
        self.back_or_why(x, kept, g).map_err(|error| match error {
            Error::Tensor(error) => error,
            other => candle_core::Error::wrap(other),
        })
    }

    fn back_or_why(&self, x: &Tensor, kept: &Kept, g: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
        let mut factors = [const { None }; MODULES.len()];
        let mut through = |module: usize, x: &Tensor, g: &Tensor| {
            self.project_back(module, (x, &kept.low[module]), g, &mut factors)
        };
        let inner = nn::swiglu(&kept.gate, &kept.up)?;
        let to_inner = through(6, &inner, g)?;
        let (to_gate, to_up) = nn::swiglu_back(&kept.gate, &kept.up, &to_inner)?;
        let normed = nn::rms_norm(&kept.middle, &self.layer.mlp_norm, self.eps)?;
        let to_normed = (through(4, &normed, &to_gate)? + through(5, &normed, &to_up)?)?;
        let norm = &self.layer.mlp_norm;
        let g = nn::rms_norm_back_onto(&kept.middle, norm, self.eps, &to_normed, g)?;

        let to_mixed = through(3, &self.rows(&kept.mixed)?, &g)?;
        let to_mixed = self.heads(&to_mixed, self.heads)?;
        let (q, k, v) = (&kept.q, &kept.k, &kept.v);
        let (scale, mask) = (self.scale(), &self.mask);
        let (to_q, to_k, to_v) = nn::attention_back(q, k, v, &kept.mixed, &to_mixed, scale, mask)?;
        // The inverse of a rotation is the rotation by the opposite angle.
        let back = self.sin.neg()?;
        let turn = |x: &Tensor| nn::rope(x, &self.cos, &back, RopeLayout::Halves);
        let normed = nn::rms_norm(x, &self.layer.attention_norm, self.eps)?;
        let to_normed = through(0, &normed, &self.rows(&turn(&to_q)?)?)?;
        let to_normed = (to_normed + through(1, &normed, &self.rows(&turn(&to_k)?)?)?)?;
        let to_normed = (to_normed + through(2, &normed, &self.rows(&to_v)?)?)?;
        let norm = &self.layer.attention_norm;
        let to_x = nn::rms_norm_back_onto(x, norm, self.eps, &to_normed, &g)?;
        Ok((to_x, factors.into_iter().flatten().flatten().collect()))
    }
}
