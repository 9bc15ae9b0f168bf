//! One decoder for the Qwen2, Qwen2.5, Llama and Mistral families.
//!
//! It is not a text generator (see [`crate::generate`]) and knows no strings: it takes token
//! ids or embeddings (a soft prompt goes in front of the embedded text), and gives hidden
//! states for every position; logits are computed only for the positions asked for.
//!
//! Weights come from safetensors or GGUF, dense (for training, in f32 or bf16) or quantised
//! (for inference). A LoRA [`Adapter`] is not part of the decoder but of a [`Run`], so that
//! a policy and its reference share one copy of the weights.
//!
//! Each layer, with x (b, t, hidden):
//! 1. x += o(attention(rope(q(n)), rope(k(n)), v(n))), n = rms_norm(x);
//! 2. x += down(silu(gate(n)) · up(n)), n = rms_norm(x).
//!
//! Reference: transformers' `modeling_qwen2.py`, `modeling_llama.py` and `modeling_mistral.py`.

pub mod bf16;
mod config;
#[cfg(feature = "cuda")]
mod cuda_step;
mod language;
pub mod learn;
mod node;
pub mod packed;
mod session;

pub use config::{Config, Family, RopeScaling};
pub use language::LanguageModel;
pub use session::Session;

use crate::lora::Adapter;
use crate::nn::{self, Linear, Mask, RopeLayout};
use crate::weights::{Stored, Weights};
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, DType, Device, Module, Tensor};
use learn::{Plain, Products};
use packed::{Activations, Packed};
use std::sync::{Arc, OnceLock};

/// The linear maps of a layer that an adapter can change, as the checkpoint names them.
pub const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// How the weights are kept in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As plain tensors: the form for training. f32 on a CPU; bf16 halves a GPU's memory.
    Dense(DType),
    /// As the file has them, where it is a quantised GGUF; else as f32. Gradients still pass
    /// through to the input (and so to adapters and soft prompts).
    Quantised,
}

/// A matrix [out, in] in one of its forms.
#[derive(Clone, Debug)]
enum Matrix {
    Dense(Tensor),
    /// In candle's layout, with its kernels.
    Quantised(Arc<QTensor>, QMatMul),
    /// In our own layout, with our kernels.
    Packed(Arc<Packed>),
}

impl Matrix {
    /// x [.., in] to [.., out].
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let value = match self {
            Self::Dense(w) => return nn::matmul_t(x, w),
            Self::Quantised(_, m) => {
                // candle's quantised kernels want f32.
                m.forward(&x.detach().to_dtype(DType::F32)?.contiguous()?)?
                    .to_dtype(x.dtype())?
            }
            Self::Packed(w) => packed_times(w, x)?,
        };
        if !x.track_op() {
            return Ok(value);
        }
        let w = self.clone();
        Ok(nn::attach1(x, &value, move |x, _, g| {
            let w = w.dense(g.dtype(), x.device())?;
            let (n, k) = w.dims2()?;
            let g = g.reshape(((), n))?.contiguous()?;
            Ok(Some(g.matmul(&w)?.reshape(lead_and(x, k))?))
        })?)
    }

    /// The matrix as a plain tensor.
    fn dense(&self, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(w) => w.to_dtype(dtype),
            Self::Quantised(q, _) => q.dequantize(device)?.to_dtype(dtype),
            Self::Packed(p) => {
                Tensor::from_vec(p.dequantised(), (p.rows(), p.cols()), device)?.to_dtype(dtype)
            }
        }
    }

    /// Rows `ids` in `dtype`.
    fn rows(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(w) => w.index_select(ids, 0)?,
            Self::Quantised(q, _) => q.embedding(ids)?.to_dtype(dtype)?,
            Self::Packed(p) => {
                let ids = ids.to_vec1::<u32>()?;
                let mut out = vec![0f32; ids.len() * p.cols()];
                for (id, row) in ids.iter().zip(out.chunks_exact_mut(p.cols())) {
                    p.row(*id as usize, row);
                }
                Tensor::from_vec(out, (ids.len(), p.cols()), &Device::Cpu)?
            }
        })
    }
}

/// The shape of x with another last dimension.
fn lead_and(x: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(end) = shape.last_mut() {
        *end = last;
    }
    shape
}

fn packed_times(w: &Packed, x: &Tensor) -> Result<Tensor> {
    if x.dim(D::Minus1)? != w.cols() {
        return Err(Error::BadRequest(format!(
            "a matrix of {} columns met an input of shape {:?}",
            w.cols(),
            x.dims()
        )));
    }
    let rows = x.detach().flatten_all()?.to_dtype(DType::F32)?;
    let out = w.times(&Activations::new(&rows.to_vec1()?, w.cols()));
    Ok(Tensor::from_vec(out, lead_and(x, w.rows()), &Device::Cpu)?)
}

/// A linear map of a layer, and what it was before an adapter was merged into it.
#[derive(Clone, Debug)]
struct Projection {
    matrix: Matrix,
    bias: Option<Tensor>,
    unmerged: Option<Matrix>,
}

impl Projection {
    fn forward(&self, x: &Tensor, layer: usize, module: usize, run: &Run) -> Result<Tensor> {
        let mut y = self.matrix.forward(x)?;
        if let Some(pair) = run.adapter.and_then(|a| a.pair(layer, module)) {
            let x = match run.dropout {
                Some(d) => d.of(x, layer, module)?,
                None => x.clone(),
            };
            y = (y + pair.forward(&x)?)?;
        }
        Ok(match &self.bias {
            Some(b) => y.broadcast_add(b)?,
            None => y,
        })
    }
}

#[derive(Clone, Debug)]
struct Layer {
    attention_norm: Tensor,
    mlp_norm: Tensor,
    projections: [Projection; 7],
    /// Query, key and value as one map, gate and up as one ([`Decoder::join`]).
    joined: Option<[Linear; 2]>,
}

/// One map of maps that take the same input. Their matrices become parts of its own, so that it
/// costs no memory; `None`, and nothing happens, where they are not all plain tensors.
fn joined(parts: &mut [&mut Projection]) -> Result<Option<Linear>> {
    let mut weights = Vec::new();
    for part in parts.iter() {
        match &part.matrix {
            Matrix::Dense(w) if !w.track_op() => weights.push(w.clone()),
            _ => return Ok(None),
        }
    }
    let biases: Vec<&Tensor> = parts.iter().filter_map(|p| p.bias.as_ref()).collect();
    if !biases.is_empty() && biases.len() != parts.len() {
        return Ok(None);
    }
    let bias = match biases.is_empty() {
        true => None,
        false => Some(Tensor::cat(&biases, 0)?),
    };
    let all = Tensor::cat(&weights, 0)?;
    let mut first = 0;
    for (part, weight) in parts.iter_mut().zip(&weights) {
        let rows = weight.dim(0)?;
        part.matrix = Matrix::Dense(all.narrow(0, first, rows)?);
        first += rows;
    }
    Ok(Some(Linear::new(all, bias)))
}

/// The network.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Its sizes.
    pub config: Config,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Matrix,
    frequencies: Vec<f64>,
    device: Device,
    dtype: DType,
    /// How it is multiplied while an adapter learns, and its weights prepared for that, when
    /// they are first asked for.
    products: Products,
    plain: OnceLock<Option<Arc<Plain>>>,
}

/// Dropout on the inputs of the adapter, the same again for the same seed and step: layers
/// can be recomputed in a backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// The probability that a number is dropped.
    pub p: f32,
    /// The seed of the run.
    pub seed: u64,
    /// The number of the forward pass within it.
    pub step: u64,
}

impl Dropout {
    /// x, a module's input, with numbers dropped.
    fn of(&self, x: &Tensor, layer: usize, module: usize) -> Result<Tensor> {
        // Seeds are small numbers; a constant keeps these streams apart from other uses.
        let seed = self.seed ^ 0x6c6f_7261_6472_6f70;
        let place = (layer * MODULES.len() + module) as u64;
        nn::dropout(x, self.p, seed, self.step << 16 | place)
    }
}

/// Where the tokens of a batch stand and which of them see each other.
#[derive(Clone, Debug)]
pub enum Placement {
    /// One after the other, each seeing what came before (also in the cache). Right for
    /// single sequences and for rows padded at the end, whose padding nobody reads.
    Causal,
    /// Rows padded in front with so many tokens, which nobody sees and which have no
    /// position.
    LeftPadded(Vec<usize>),
    /// Positions (b, t) and a mask of its own, for sequences that share a prompt.
    Custom {
        /// Position of each token.
        positions: Vec<Vec<u32>>,
        /// Additive, [b, 1, t, t + cached].
        mask: Tensor,
    },
}

/// What a forward pass goes by, made once and used by all layers.
#[derive(Debug)]
pub struct Run<'a> {
    cos: Tensor,
    sin: Tensor,
    mask: Mask,
    adapter: Option<&'a Adapter>,
    dropout: Option<Dropout>,
}

/// Keys and values of the tokens so far, room for `capacity` of them reserved at once.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<Option<(Tensor, Tensor)>>,
    capacity: usize,
    len: usize,
}

impl Cache {
    /// Room for `capacity` tokens in each row of a batch.
    pub fn new(config: &Config, capacity: usize) -> Self {
        Self {
            layers: vec![None; config.layers],
            capacity,
            len: 0,
        }
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Adds k and v (b, heads, t, d) of a layer behind the `len` tokens before this pass,
    /// and gives all of them.
    fn extend(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, heads, t, d) = k.dims4()?;
        let end = self.len + t;
        if end > self.capacity {
            return Err(Error::BadRequest(format!(
                "the sequence has {end} tokens, its cache has room for {}",
                self.capacity
            )));
        }
        if self.layers[layer].is_none() {
            let room = || Tensor::zeros((b, heads, self.capacity, d), k.dtype(), k.device());
            self.layers[layer] = Some((room()?, room()?));
        }
        let Some((keys, values)) = &self.layers[layer] else {
            unreachable!("it was filled two lines above");
        };
        if keys.dim(0)? != b {
            return Err(Error::BadRequest(format!(
                "a batch of {b} rows met a cache of {}",
                keys.dim(0)?
            )));
        }
        keys.slice_set(&k.detach().contiguous()?, 2, self.len)?;
        values.slice_set(&v.detach().contiguous()?, 2, self.len)?;
        Ok((keys.narrow(2, 0, end)?, values.narrow(2, 0, end)?))
    }
}

impl Decoder {
    /// Loads the weights that `config` describes. Errors name the tensor, its expected shape
    /// and the shape found.
    pub fn load(
        weights: &Weights,
        config: &Config,
        precision: Precision,
        device: &Device,
    ) -> Result<Self> {
        let loader = Loader {
            weights,
            config,
            precision,
            device,
        };
        let embedding = loader.matrix("model.embed_tokens", config.vocab, config.hidden, None)?;
        // Nobody asks the bare network for logits.
        let head = match config.tied || loader.bare() {
            true => embedding.clone(),
            false => loader.matrix("lm_head", config.vocab, config.hidden, None)?,
        };
        Ok(Self {
            layers: (0..config.layers)
                .map(|i| loader.layer(i))
                .collect::<Result<_>>()?,
            norm: loader.vector("model.norm", config.hidden)?,
            frequencies: loader.frequencies()?,
            embedding,
            head,
            config: config.clone(),
            device: device.clone(),
            dtype: loader.dtype(),
            products: Products::F32,
            plain: OnceLock::new(),
        })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sets how constant weights are multiplied in [`learn`]'s passes.
    pub fn learn_in(&mut self, products: Products) {
        self.products = products;
        self.plain = OnceLock::new();
    }

    /// How constant weights are multiplied in [`learn`]'s passes.
    pub fn products(&self) -> Products {
        learn::possible(self.products)
    }

    /// The weights for [`learn`]'s passes, prepared by the first call; `None` where this
    /// decoder is not f32 on the CPU.
    pub fn plain(&self) -> Result<Option<&Arc<Plain>>> {
        if self.plain.get().is_none() {
            let plain = Plain::of(self, self.products)?.map(Arc::new);
            // Another thread's is the same.
            let _ = self.plain.set(plain);
        }
        Ok(self.plain.get().and_then(Option::as_ref))
    }

    /// The dtype of hidden states.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The embeddings of rows of ids, all of one length: [b, t, hidden].
    pub fn embed(&self, ids: &[&[u32]]) -> Result<Tensor> {
        let t = ids.first().map_or(0, |row| row.len());
        if t == 0 || ids.iter().any(|row| row.len() != t) {
            return Err(Error::BadRequest(
                "a batch needs at least one token, and rows of one length".into(),
            ));
        }
        let flat = ids.concat();
        if let Some(id) = flat.iter().find(|id| **id as usize >= self.config.vocab) {
            return Err(Error::BadRequest(format!(
                "token id {id}, but the vocabulary has {} entries",
                self.config.vocab
            )));
        }
        let flat = Tensor::from_vec(flat, ids.len() * t, &self.device)?;
        let rows = self.embedding.rows(&flat, self.dtype)?;
        Ok(rows.reshape((ids.len(), t, self.config.hidden))?)
    }

    /// Prepares a forward pass of b rows of t tokens after `cached` tokens.
    pub fn run<'a>(
        &self,
        placement: &Placement,
        (b, t): (usize, usize),
        cached: usize,
        adapter: Option<&'a Adapter>,
        dropout: Option<Dropout>,
    ) -> Result<Run<'a>> {
        if cached + t > self.config.positions {
            return Err(Error::BadRequest(format!(
                "{} tokens, but the model was made for {}; shorten the prompt",
                cached + t,
                self.config.positions
            )));
        }
        let table =
            |positions: Vec<f64>| nn::rope_tables(&positions, &self.frequencies, &self.device);
        let ((cos, sin), mask) = match placement {
            Placement::Causal => (
                table((cached..cached + t).map(|p| p as f64).collect())?,
                Mask::Causal,
            ),
            Placement::LeftPadded(pads) => {
                if pads.len() != b {
                    return Err(Error::BadRequest(format!(
                        "{} paddings for {b} rows",
                        pads.len()
                    )));
                }
                let positions = pads
                    .iter()
                    .flat_map(|pad| (cached..cached + t).map(move |p| p.saturating_sub(*pad)))
                    .map(|p| p as f64)
                    .collect();
                (
                    by_rows(table(positions)?, b, t)?,
                    Mask::Additive(left_padding_mask(pads, t, cached, &self.device)?),
                )
            }
            Placement::Custom { positions, mask } => {
                let flat: Vec<f64> = positions.iter().flatten().map(|p| f64::from(*p)).collect();
                if flat.len() != b * t {
                    return Err(Error::BadRequest(format!(
                        "{} positions for {b} rows of {t} tokens",
                        flat.len()
                    )));
                }
                (
                    by_rows(table(flat)?, b, t)?,
                    Mask::Additive(mask.to_device(&self.device)?),
                )
            }
        };
        Ok(Run {
            cos,
            sin,
            mask,
            adapter,
            dropout: dropout.filter(|d| d.p > 0.0),
        })
    }

    /// Layer `index` on x [b, t, hidden]; for callers that recompute layers to save memory.
    pub fn layer(
        &self,
        index: usize,
        x: &Tensor,
        run: &Run,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        if cache.is_none()
            && let Some(x) = node::layer(self, index, x, run)?
        {
            return Ok(x);
        }
        let layer = &self.layers[index];
        let normed = nn::rms_norm(x, &layer.attention_norm, self.config.eps)?;
        let x = (x + self.attention(index, &normed, run, cache)?)?;
        let normed = nn::rms_norm(&x, &layer.mlp_norm, self.config.eps)?;
        let project =
            |module: usize, x: &Tensor| layer.projections[module].forward(x, index, module, run);
        let inner = nn::swiglu(&project(4, &normed)?, &project(5, &normed)?)?;
        Ok((x + project(6, &inner)?)?)
    }

    fn attention(
        &self,
        index: usize,
        x: &Tensor,
        run: &Run,
        cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let c = &self.config;
        let project = |module: usize, x: &Tensor| {
            self.layers[index].projections[module].forward(x, index, module, run)
        };
        // (b, t, heads * d) to (b, heads, t, d)
        let heads = |x: Tensor, n: usize| -> Result<Tensor> {
            Ok(x.reshape((b, t, n, c.head_dim))?.transpose(1, 2)?)
        };
        let turn = |x: &Tensor| nn::rope(x, &run.cos, &run.sin, RopeLayout::Halves);
        let q = turn(&heads(project(0, x)?, c.heads)?)?;
        let k = turn(&heads(project(1, x)?, c.kv_heads)?)?;
        let v = heads(project(2, x)?, c.kv_heads)?.contiguous()?;
        let (k, v) = match cache {
            Some(cache) => cache.extend(index, &k, &v)?,
            None => (k, v),
        };
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let y = nn::attention(&q, &k, &v, scale, &run.mask)?;
        project(
            3,
            &y.transpose(1, 2)?.reshape((b, t, c.heads * c.head_dim))?,
        )
    }

    /// The final norm: hidden states as the head takes them.
    pub fn finish(&self, x: &Tensor) -> Result<Tensor> {
        nn::rms_norm(x, &self.norm, self.config.eps)
    }

    /// Embeddings [b, t, hidden] to hidden states [b, t, hidden] after the final norm.
    ///
    /// With a cache, the tokens follow those in it and are added to it; gradients then do
    /// not reach the cached ones.
    pub fn hidden(
        &self,
        embeddings: &Tensor,
        placement: &Placement,
        adapter: Option<&Adapter>,
        dropout: Option<Dropout>,
        mut cache: Option<&mut Cache>,
    ) -> Result<Tensor> {
        let (b, t, _) = embeddings.dims3()?;
        let cached = cache.as_ref().map_or(0, |c| c.len);
        let run = self.run(placement, (b, t), cached, adapter, dropout)?;
        #[cfg(feature = "cuda")]
        if let Some(cache) = cache.as_deref_mut()
            && let Some(x) = cuda_step::hidden(self, embeddings, placement, &run, cache)?
        {
            return Ok(x);
        }
        let mut x = embeddings.to_dtype(self.dtype)?;
        for index in 0..self.layers.len() {
            x = self.layer(index, &x, &run, cache.as_deref_mut())?;
        }
        if let Some(cache) = cache {
            cache.len += t;
        }
        self.finish(&x)
    }

    /// Hidden states [.., hidden] to logits [.., vocab] in f32. Select the positions first:
    /// this is the widest matrix of all.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(hidden)?.to_dtype(DType::F32)?)
    }

    /// Puts the matrices that take the same input behind one another, where they are plain tensors:
    /// on a CUDA device a token is then written in a third of the launches (`cuda_step`). Nothing
    /// else changes, and no memory is taken. For models that write; an adapter is to be merged
    /// before, since merging takes them apart again.
    pub fn join(&mut self) -> Result<()> {
        for layer in &mut self.layers {
            let [q, k, v, _, gate, up, _] = &mut layer.projections;
            let both = (joined(&mut [q, k, v])?, joined(&mut [gate, up])?);
            layer.joined = match both {
                (Some(qkv), Some(gate_up)) => Some([qkv, gate_up]),
                _ => None,
            };
        }
        Ok(())
    }

    /// Adds an adapter's changes to the weights themselves. Quantised matrices that it
    /// touches become plain ones. [`Self::unmerge`] brings back the originals, to the bit.
    pub fn merge(&mut self, adapter: &Adapter) -> Result<()> {
        self.plain = OnceLock::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.joined = None;
            for (module, projection) in layer.projections.iter_mut().enumerate() {
                let Some(pair) = adapter.pair(index, module) else {
                    continue;
                };
                let w = projection.matrix.dense(DType::F32, &self.device)?;
                let change = pair.delta()?.to_device(&self.device)?;
                let merged = Matrix::Dense((w + change)?.to_dtype(self.dtype)?.detach());
                let before = std::mem::replace(&mut projection.matrix, merged);
                projection.unmerged.get_or_insert(before);
            }
        }
        Ok(())
    }

    /// Takes back everything that [`Self::merge`] did.
    pub fn unmerge(&mut self) {
        self.plain = OnceLock::new();
        for layer in &mut self.layers {
            layer.joined = None;
            for projection in &mut layer.projections {
                if let Some(before) = projection.unmerged.take() {
                    projection.matrix = before;
                }
            }
        }
    }

    /// The [out, in] of module `module` of every layer.
    pub fn module_shape(config: &Config, module: usize) -> (usize, usize) {
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        match module {
            0 => (q, config.hidden),
            1 | 2 => (kv, config.hidden),
            3 => (config.hidden, q),
            4 | 5 => (config.intermediate, config.hidden),
            _ => (config.hidden, config.intermediate),
        }
    }

    /// A dense linear map from the weights of a module, for tests and tools.
    pub fn linear(&self, layer: usize, module: usize) -> Result<Linear> {
        let p = &self.layers[layer].projections[module];
        Ok(Linear::new(
            p.matrix.dense(DType::F32, &self.device)?,
            p.bias.clone(),
        ))
    }
}

/// The place of the greatest of each row of logits (rows, vocab), the first of equals, found where
/// the logits are; NaN where one of a row is none. `None` where that is on the host.
pub(crate) fn likeliest(logits: &Tensor) -> Result<Option<Vec<f32>>> {
    #[cfg(feature = "cuda")]
    return cuda_step::likeliest(logits);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = logits;
        Ok(None)
    }
}

/// Tables of b·t positions as [b, t, d/2].
fn by_rows((cos, sin): (Tensor, Tensor), b: usize, t: usize) -> Result<(Tensor, Tensor)> {
    let half = cos.dim(1)?;
    Ok((cos.reshape((b, t, half))?, sin.reshape((b, t, half))?))
}

/// Far below any score, yet not -inf: a row of padding sees nothing, and must not be NaN.
const HIDDEN: f32 = -1e30;

/// [b, 1, t, cached + t]: causal, and blind to the first `pad` tokens of each row.
fn left_padding_mask(pads: &[usize], t: usize, cached: usize, device: &Device) -> Result<Tensor> {
    let s = cached + t;
    let mut mask = vec![0f32; pads.len() * t * s];
    for (row, mask) in mask.chunks_exact_mut(s).enumerate() {
        let (pad, query) = (pads[row / t], cached + row % t);
        for (key, m) in mask.iter_mut().enumerate() {
            if key > query || key < pad {
                *m = HIDDEN;
            }
        }
    }
    Ok(Tensor::from_vec(mask, (pads.len(), 1, t, s), device)?)
}

// ----------------------------------------------------------------------------- loading

struct Loader<'a> {
    weights: &'a Weights,
    config: &'a Config,
    precision: Precision,
    device: &'a Device,
}

impl Loader<'_> {
    fn dtype(&self) -> DType {
        match self.precision {
            Precision::Dense(dtype) => dtype,
            Precision::Quantised => DType::F32,
        }
    }

    /// Whether this is the bare network, without a head.
    fn bare(&self) -> bool {
        self.weights.contains("embed_tokens.weight")
    }

    /// The file's name for a checkpoint's tensor.
    fn name(&self, module: &str, part: &str) -> String {
        match self.weights.gguf() {
            // A checkpoint of the bare network (an encoder's) has no "model." in front.
            None if self.bare() => {
                format!("{}.{part}", module.strip_prefix("model.").unwrap_or(module))
            }
            None => format!("{module}.{part}"),
            Some(_) => format!("{}.{part}", gguf_name(module)),
        }
    }

    fn vector(&self, module: &str, n: usize) -> Result<Tensor> {
        let name = self.name(module, "weight");
        self.weights.get(&name, n, self.dtype(), self.device)
    }

    /// A matrix; `heads` where its rows are query or key heads.
    fn matrix(
        &self,
        module: &str,
        rows: usize,
        cols: usize,
        heads: Option<usize>,
    ) -> Result<Matrix> {
        let name = self.name(module, "weight");
        self.weights.expect_shape(&name, &[rows, cols])?;
        // llama.cpp stores the rows of q and k of Llama models in its own order.
        let heads =
            heads.filter(|_| self.weights.gguf().is_some() && self.config.family == Family::Llama);
        let quantised = match (self.precision, self.weights.stored(&name)) {
            (Precision::Quantised, Some(Stored::Ggml(d))) => d.block_size() > 1,
            _ => false,
        };
        if !quantised {
            let w = self.weights.get_any(&name, self.dtype(), self.device)?;
            return Ok(Matrix::Dense(match heads {
                None => w,
                Some(heads) => w
                    .reshape((heads, rows / heads / 2, 2, cols))?
                    .transpose(1, 2)?
                    .contiguous()?
                    .reshape((rows, cols))?,
            }));
        }
        let (stored, _, mut bytes) = self.weights.raw(&name)?;
        let Stored::Ggml(dtype) = stored else {
            return Err(Error::bad_model(name, "not a GGUF tensor"));
        };
        if let Some(heads) = heads {
            bytes = unpermuted(&bytes, rows, heads);
        }
        self.quantised(dtype, rows, cols, &bytes)
    }

    fn quantised(
        &self,
        dtype: GgmlDType,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Matrix> {
        if self.device.is_cpu()
            && let Some(packed) = Packed::new(dtype, rows, cols, bytes)
        {
            return Ok(Matrix::Packed(Arc::new(packed)));
        }
        let q = crate::weights::quantised(dtype, bytes, &[rows, cols], self.device)?;
        let q = Arc::new(q);
        Ok(Matrix::Quantised(q.clone(), QMatMul::from_arc(q)?))
    }

    fn layer(&self, index: usize) -> Result<Layer> {
        let prefix = format!("model.layers.{index}");
        let projection = |module: usize| -> Result<Projection> {
            let (rows, cols) = Decoder::module_shape(self.config, module);
            let name = format!("{prefix}.{}", MODULES[module]);
            let heads = match module {
                0 => Some(self.config.heads),
                1 => Some(self.config.kv_heads),
                _ => None,
            };
            let bias = self.name(&name, "bias");
            let needed = self.config.qkv_bias && module < 3;
            let bias = match needed || self.weights.contains(&bias) {
                true => Some(self.weights.get(&bias, rows, self.dtype(), self.device)?),
                false => None,
            };
            Ok(Projection {
                matrix: self.matrix(&name, rows, cols, heads)?,
                bias,
                unmerged: None,
            })
        };
        let hidden = self.config.hidden;
        Ok(Layer {
            attention_norm: self.vector(&format!("{prefix}.input_layernorm"), hidden)?,
            mlp_norm: self.vector(&format!("{prefix}.post_attention_layernorm"), hidden)?,
            projections: [
                projection(0)?,
                projection(1)?,
                projection(2)?,
                projection(3)?,
                projection(4)?,
                projection(5)?,
                projection(6)?,
            ],
            joined: None,
        })
    }

    /// Rope frequencies; GGUF files of Llama 3.1 and later carry their divisors.
    fn frequencies(&self) -> Result<Vec<f64>> {
        let mut frequencies = self.config.frequencies();
        if self.weights.gguf().is_some() && self.weights.contains("rope_freqs.weight") {
            let n = frequencies.len();
            let by = self
                .weights
                .get("rope_freqs.weight", n, DType::F32, &Device::Cpu)?;
            for (f, by) in frequencies.iter_mut().zip(by.to_vec1::<f32>()?) {
                if by <= 0.0 {
                    return Err(Error::bad_model("rope_freqs.weight", "not positive"));
                }
                *f /= f64::from(by);
            }
        }
        Ok(frequencies)
    }
}

/// Rows from llama.cpp's order (of each head: 0, d/2, 1, d/2 + 1, ..) to the checkpoint's
/// (0, 1, .. d/2, d/2 + 1, ..).
fn unpermuted(bytes: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / rows;
    let d = rows / heads;
    let mut out = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / d, row % d);
        let from = head * d + within % (d / 2) * 2 + within / (d / 2);
        out.extend_from_slice(&bytes[from * row_bytes..][..row_bytes]);
    }
    out
}

/// llama.cpp's name of a module.
fn gguf_name(module: &str) -> String {
    let top = match module {
        "model.embed_tokens" => Some("token_embd"),
        "model.norm" => Some("output_norm"),
        "lm_head" => Some("output"),
        _ => None,
    };
    if let Some(name) = top {
        return name.into();
    }
    let rest = module.strip_prefix("model.layers.").unwrap_or(module);
    let (index, part) = rest.split_once('.').unwrap_or((rest, ""));
    let part = match part {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    format!("blk.{index}.{part}")
}

#[cfg(test)]
mod tests;
