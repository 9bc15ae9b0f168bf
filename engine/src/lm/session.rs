//! Reading and writing sequences on a CPU, without tensors.
//!
//! A token of a small model takes a few milliseconds, of which the thirty small tensor
//! operations of each layer would be a third. Here a layer is four passes over weights
//! (q, k and v together; o; gate and up together; down) with plain loops between them, on
//! buffers of f32. Several sequences share each pass, so that the weights come from memory
//! once for all of them; with quantised weights a sequence's numbers are the same to the bit
//! whatever is read beside it. It computes what [`Decoder::hidden`] computes; a test compares them.
//!
//! No gradients, no masks: for these there is the decoder itself.

use super::packed::{Activations, Packed};
use super::{Decoder, MODULES, Matrix};
use crate::lora::Adapter;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// The model, perhaps an adapter, and sequences with their keys and values so far.
pub struct Session<'a> {
    weights: Weights<'a>,
    sequences: Vec<Sequence>,
}

/// What all sequences are read with.
struct Weights<'a> {
    decoder: &'a Decoder,
    layers: Vec<LayerWeights>,
    norm: Vec<f32>,
}

struct LayerWeights {
    attention_norm: Vec<f32>,
    mlp_norm: Vec<f32>,
    bias: [Option<Vec<f32>>; 7],
    adapter: [Option<LowRank>; 7],
}

/// What one sequence has read.
struct Sequence {
    capacity: usize,
    len: usize,
    /// By layer, [kv_heads, capacity, head_dim].
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// A row of a pass: a token of a sequence.
#[derive(Clone, Copy)]
struct Row {
    sequence: usize,
    position: usize,
}

/// An adapter's factors, laid out for a single vector.
struct LowRank {
    rank: usize,
    /// [rank, in]
    a: Vec<f32>,
    /// The transpose of B, with the scale in it: [rank, out].
    b: Vec<f32>,
}

impl LowRank {
    /// y += scale·B·A·x, row by row.
    fn add(&self, x: &[f32], y: &mut [f32]) {
        let (inputs, outputs) = (self.a.len() / self.rank, self.b.len() / self.rank);
        let add = |(x, y): (&[f32], &mut [f32])| {
            for (a, b) in self
                .a
                .chunks_exact(inputs)
                .zip(self.b.chunks_exact(outputs))
            {
                simd::add_scaled(simd::dot(a, x), b, y);
            }
        };
        let rows = x.chunks_exact(inputs).zip(y.chunks_exact_mut(outputs));
        match x.len() > 8 * inputs {
            false => rows.for_each(add),
            true => rows.collect::<Vec<_>>().into_par_iter().for_each(add),
        }
    }
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

impl<'a> Session<'a> {
    /// A session of sequences with room for so many tokens each; `None` where the decoder
    /// does not compute in f32 on a CPU.
    pub fn new(
        decoder: &'a Decoder,
        adapter: Option<&Adapter>,
        capacities: &[usize],
    ) -> Result<Option<Self>> {
        let c = &decoder.config;
        if !decoder.device.is_cpu() || decoder.dtype != DType::F32 {
            return Ok(None);
        }
        if let Some(capacity) = capacities.iter().find(|n| **n > c.positions) {
            return Err(Error::BadRequest(format!(
                "{capacity} tokens, but the model was made for {}; shorten the prompt",
                c.positions
            )));
        }
        let mut layers = Vec::with_capacity(decoder.layers.len());
        for (index, layer) in decoder.layers.iter().enumerate() {
            let mut weights = LayerWeights {
                attention_norm: numbers(&layer.attention_norm)?,
                mlp_norm: numbers(&layer.mlp_norm)?,
                bias: Default::default(),
                adapter: Default::default(),
            };
            for module in 0..MODULES.len() {
                if let Some(bias) = &layer.projections[module].bias {
                    weights.bias[module] = Some(numbers(bias)?);
                }
                if let Some(pair) = adapter.and_then(|a| a.pair(index, module)) {
                    weights.adapter[module] = Some(LowRank {
                        rank: pair.a.dim(0)?,
                        a: numbers(&pair.a.detach())?,
                        b: numbers(&(pair.b.detach().t()? * pair.scale)?)?,
                    });
                }
            }
            layers.push(weights);
        }
        let room = |capacity: usize| vec![vec![0.0; c.kv_heads * capacity * c.head_dim]; c.layers];
        let empty = |capacity: &usize| Sequence {
            capacity: *capacity,
            len: 0,
            keys: room(*capacity),
            values: room(*capacity),
        };
        Ok(Some(Self {
            weights: Weights {
                norm: numbers(&decoder.norm)?,
                decoder,
                layers,
            },
            sequences: capacities.iter().map(empty).collect(),
        }))
    }

    /// How many tokens a sequence has read.
    #[cfg(test)]
    fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].len
    }

    /// Forgets what a sequence has read after its first `len` tokens.
    pub fn rewind(&mut self, sequence: usize, len: usize) {
        let sequence = &mut self.sequences[sequence];
        sequence.len = sequence.len.min(len);
    }

    /// Gives an empty sequence the first `len` tokens that another has read.
    pub fn share(&mut self, from: usize, to: usize, len: usize) {
        let c = &self.weights.decoder.config;
        let (heads, d) = (c.kv_heads, c.head_dim);
        assert!(
            from != to && self.sequences[to].len == 0,
            "an empty sequence is filled"
        );
        assert!(len <= self.sequences[from].len && len <= self.sequences[to].capacity);
        let mut filled = std::mem::replace(
            &mut self.sequences[to],
            Sequence {
                capacity: 0,
                len: 0,
                keys: Vec::new(),
                values: Vec::new(),
            },
        );
        let source = &self.sequences[from];
        for layer in 0..self.weights.layers.len() {
            for head in 0..heads {
                let (at, into) = (head * source.capacity * d, head * filled.capacity * d);
                let (at, into) = (at..at + len * d, into..into + len * d);
                filled.keys[layer][into.clone()].copy_from_slice(&source.keys[layer][at.clone()]);
                filled.values[layer][into].copy_from_slice(&source.values[layer][at]);
            }
        }
        filled.len = len;
        self.sequences[to] = filled;
    }

    /// Reads embedded tokens [1, t, hidden] into each of the sequences named, each at most
    /// once, and gives the logits after the last token of each.
    pub fn read(&mut self, parts: &[(usize, Tensor)]) -> Result<Vec<Vec<f32>>> {
        let (mut x, mut rows, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, embeddings) in parts {
            let (one, positions) = self.weights.taken(&self.sequences[*sequence], embeddings)?;
            x.extend(one);
            rows.extend(positions.map(|position| Row {
                sequence: *sequence,
                position,
            }));
            ends.push(rows.len() - 1);
        }
        // Inside the pool a parallel pass starts at once; from outside, each would put this
        // thread to sleep and wake it again.
        let mut logits = Ok(Vec::new());
        let (weights, sequences) = (&self.weights, self.sequences.as_mut_slice());
        rayon::scope(|_| logits = weights.read_rows(sequences, x, &rows, &ends));
        logits
    }

    /// The same for sequences from `first` on, one for each of `texts`, each by itself and several
    /// at a time: what is long enough to fill a pass needs no company, and cores that work on
    /// sequences of their own need not wait for one another.
    pub fn read_each(&mut self, first: usize, texts: &[Tensor]) -> Result<Vec<Vec<f32>>> {
        let weights = &self.weights;
        let read = |(sequence, text): (&mut Sequence, &Tensor)| {
            let (x, positions) = weights.taken(sequence, text)?;
            let rows: Vec<Row> = positions
                .map(|position| Row {
                    sequence: 0,
                    position,
                })
                .collect();
            let ends = [rows.len() - 1];
            let one = std::slice::from_mut(sequence);
            Ok(weights.read_rows(one, x, &rows, &ends)?.swap_remove(0))
        };
        let sequences = self.sequences[first..].par_iter_mut();
        sequences.zip(texts).with_max_len(1).map(read).collect()
    }
}

impl Weights<'_> {
    /// The numbers of embedded tokens, and the positions that they get in a sequence.
    fn taken(&self, sequence: &Sequence, x: &Tensor) -> Result<(Vec<f32>, Range<usize>)> {
        let ((b, t, hidden), wanted) = (x.dims3()?, self.decoder.config.hidden);
        if b != 1 || t == 0 || hidden != wanted {
            return Err(Error::BadRequest(format!(
                "a session reads [1, tokens, {wanted}], got {:?}",
                x.dims()
            )));
        }
        let Sequence { len, capacity, .. } = sequence;
        if len + t > *capacity {
            return Err(Error::BadRequest(format!(
                "the sequence has {} tokens, its session has room for {capacity}",
                len + t,
            )));
        }
        Ok((numbers(&x.detach())?, *len..len + t))
    }

    /// The logits after the rows named by `ends`.
    fn read_rows(
        &self,
        sequences: &mut [Sequence],
        mut x: Vec<f32>,
        rows: &[Row],
        ends: &[usize],
    ) -> Result<Vec<Vec<f32>>> {
        let c = &self.decoder.config;
        let half = c.head_dim / 2;
        let mut cos = vec![0f32; rows.len() * half];
        let mut sin = vec![0f32; rows.len() * half];
        for (r, row) in rows.iter().enumerate() {
            for (i, f) in self.decoder.frequencies.iter().enumerate() {
                let angle = row.position as f64 * f;
                cos[r * half + i] = angle.cos() as f32;
                sin[r * half + i] = angle.sin() as f32;
            }
        }
        for index in 0..self.layers.len() {
            let normed = self.normed(&x, &self.layers[index].attention_norm);
            let mut qkv = self.project(index, &[0, 1, 2], &normed)?;
            let (v, k) = (qkv.pop(), qkv.pop());
            let (Some(mut q), Some(mut k), Some(v)) = (qkv.pop(), k, v) else {
                unreachable!("three modules give three outputs");
            };
            turn(&mut q, c.heads, &cos, &sin, half);
            turn(&mut k, c.kv_heads, &cos, &sin, half);
            self.remember(sequences, index, (&k, &v), rows);
            let y = self.attend(sequences, index, &q, rows);
            for (x, y) in x.iter_mut().zip(&self.project(index, &[3], &y)?[0]) {
                *x += y;
            }
            let normed = self.normed(&x, &self.layers[index].mlp_norm);
            let mut inner = self.project(index, &[4, 5], &normed)?;
            let (up, gate) = (inner.pop(), inner.pop());
            let (Some(mut gate), Some(up)) = (gate, up) else {
                unreachable!("two modules give two outputs");
            };
            gate.par_chunks_mut(4096)
                .zip(up.par_chunks(4096))
                .for_each(|(gate, up)| simd::swiglu(gate, up));
            for (x, y) in x.iter_mut().zip(&self.project(index, &[6], &gate)?[0]) {
                *x += y;
            }
        }
        for row in rows {
            let sequence = &mut sequences[row.sequence];
            sequence.len = sequence.len.max(row.position + 1);
        }
        let last: Vec<f32> = ends
            .iter()
            .flat_map(|row| &x[row * c.hidden..(row + 1) * c.hidden])
            .copied()
            .collect();
        let last = self.normed(&last, &self.norm);
        let all = times(&[&self.decoder.head], &last, c.hidden)?.swap_remove(0);
        let each = all.len() / ends.len().max(1);
        Ok(all.chunks_exact(each.max(1)).map(<[f32]>::to_vec).collect())
    }

    /// rms_norm of each row of x.
    fn normed(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; x.len()];
        let rows = x.chunks_exact(weight.len());
        for (x, out) in rows.zip(out.chunks_exact_mut(weight.len())) {
            let mean = f64::from(simd::dot(x, x)) / weight.len() as f64;
            let scale = (1.0 / (mean + self.decoder.config.eps).sqrt()) as f32;
            for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * w;
            }
        }
        out
    }

    /// The outputs of modules that take the same input, biases and adapter included.
    fn project(&self, layer: usize, modules: &[usize], x: &[f32]) -> Result<Vec<Vec<f32>>> {
        let matrices: Vec<&Matrix> = modules
            .iter()
            .map(|m| &self.decoder.layers[layer].projections[*m].matrix)
            .collect();
        let (_, inputs) = Decoder::module_shape(&self.decoder.config, modules[0]);
        let mut outs = times(&matrices, x, inputs)?;
        let state = &self.layers[layer];
        for (module, out) in modules.iter().zip(&mut outs) {
            if let Some(bias) = &state.bias[*module] {
                for row in out.chunks_exact_mut(bias.len()) {
                    for (y, b) in row.iter_mut().zip(bias) {
                        *y += b;
                    }
                }
            }
            if let Some(low_rank) = &state.adapter[*module] {
                low_rank.add(x, out);
            }
        }
        Ok(outs)
    }

    /// Puts the rows' keys and values at their positions.
    fn remember(
        &self,
        sequences: &mut [Sequence],
        layer: usize,
        (k, v): (&[f32], &[f32]),
        rows: &[Row],
    ) {
        let (heads, d) = (self.decoder.config.kv_heads, self.decoder.config.head_dim);
        for (r, row) in rows.iter().enumerate() {
            let sequence = &mut sequences[row.sequence];
            for head in 0..heads {
                let to = (head * sequence.capacity + row.position) * d;
                let from = (r * heads + head) * d;
                sequence.keys[layer][to..to + d].copy_from_slice(&k[from..from + d]);
                sequence.values[layer][to..to + d].copy_from_slice(&v[from..from + d]);
            }
        }
    }

    /// Causal attention of each row to its own sequence: [rows, heads · head_dim].
    fn attend(&self, sequences: &[Sequence], layer: usize, q: &[f32], rows: &[Row]) -> Vec<f32> {
        let c = &self.decoder.config;
        let (d, group) = (c.head_dim, c.heads / c.kv_heads);
        let scale = 1.0 / (d as f32).sqrt();
        let mut out = vec![0f32; q.len()];
        let work = |i: usize, q: &[f32], out: &mut [f32], scores: &mut Vec<f32>| {
            let (row, head) = (rows[i / c.heads], i % c.heads);
            let sequence = &sequences[row.sequence];
            let seen = row.position + 1;
            let from = head / group * sequence.capacity * d;
            let keys = &sequence.keys[layer][from..from + seen * d];
            let values = &sequence.values[layer][from..from + seen * d];
            simd::attend(q, keys, values, scale, scores, out);
        };
        let items = q
            .par_chunks_exact(d)
            .zip(out.par_chunks_exact_mut(d))
            .enumerate();
        // A few heads over a few hundred tokens are done before another thread wakes.
        let seen: usize = rows.iter().map(|row| row.position + 1).sum();
        let alone = seen * c.heads < 1 << 13;
        items
            .with_min_len(if alone { rows.len() * c.heads } else { 1 })
            .for_each_init(Vec::new, |scores, (i, (q, out))| work(i, q, out, scores));
        out
    }
}

/// x times each of the matrices, transposed; rows of x have `inputs` numbers.
fn times(matrices: &[&Matrix], x: &[f32], inputs: usize) -> Result<Vec<Vec<f32>>> {
    let packed: Option<Vec<&Packed>> = matrices
        .iter()
        .map(|m| match m {
            Matrix::Packed(p) => Some(p.as_ref()),
            _ => None,
        })
        .collect();
    if let Some(packed) = packed {
        return Ok(Packed::times_all(&packed, &Activations::new(x, inputs)));
    }
    let x = Tensor::from_slice(x, (x.len() / inputs, inputs), &Device::Cpu)?;
    matrices.iter().map(|m| numbers(&m.forward(&x)?)).collect()
}

/// Rotates the heads of each row: number i with number i + half.
fn turn(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], half: usize) {
    for (i, head) in x.chunks_exact_mut(2 * half).enumerate() {
        let row = i / heads;
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = x * cos[i] - y * sin[i];
            b[i] = y * cos[i] + x * sin[i];
        }
    }
}

/// The inner loops, compiled once for any processor and once for AVX2.
#[allow(unsafe_code)]
mod simd {
    macro_rules! for_this_processor {
        ($(#[$doc:meta])* $name:ident = $body:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?) => {
            $(#[$doc])*
            #[inline]
            pub(super) fn $name($($arg: $type),*) $(-> $out)? {
                #[cfg(target_arch = "x86_64")]
                {
                    #[target_feature(enable = "avx2,fma")]
                    fn wide($($arg: $type),*) $(-> $out)? {
                        $body($($arg),*)
                    }
                    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                        // SAFETY: the processor was just asked for these features; the body
                        // is safe code.
                        return unsafe { wide($($arg),*) };
                    }
                }
                $body($($arg),*)
            }
        };
    }

    /// Σ a·b.
    #[inline]
    pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
        #[cfg(target_arch = "x86_64")]
        if avx2::available() {
            // SAFETY: the processor was just asked for what these are compiled for.
            return unsafe { avx2::dot(a, b) };
        }
        // Lanes that the compiler can keep in vectors of any width.
        let mut lanes = [0f32; 32];
        let (a, b) = (a.as_chunks::<32>(), b.as_chunks::<32>());
        for (a, b) in a.0.iter().zip(b.0) {
            for i in 0..32 {
                lanes[i] += a[i] * b[i];
            }
        }
        let tail: f32 = a.1.iter().zip(b.1).map(|(a, b)| a * b).sum();
        lanes.iter().sum::<f32>() + tail
    }

    /// out = Σ softmax(q·kᵀ·scale)·v over the rows of k and v; `scores` is room to work in.
    #[inline]
    pub(super) fn attend(
        q: &[f32],
        k: &[f32],
        v: &[f32],
        scale: f32,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        scores.clear();
        scores.resize(k.len() / q.len(), 0.0);
        #[cfg(target_arch = "x86_64")]
        if avx2::available() {
            // SAFETY: the processor was just asked for what these are compiled for.
            unsafe {
                avx2::dots(q, k, scores);
                avx2::soften(scores, scale);
                avx2::mix(scores, v, out);
            }
            return;
        }
        for (s, k) in scores.iter_mut().zip(k.chunks_exact(q.len())) {
            *s = dot(q, k);
        }
        soften_loop(scores, scale);
        out.fill(0.0);
        for (s, v) in scores.iter().zip(v.chunks_exact(out.len())) {
            add_scaled_loop(*s, v, out);
        }
    }

    for_this_processor!(
        /// y += s·x.
        add_scaled = add_scaled_loop(s: f32, x: &[f32], y: &mut [f32])
    );
    for_this_processor!(
        /// gate = silu(gate)·up.
        swiglu = swiglu_loop(gate: &mut [f32], up: &[f32])
    );
    #[inline(always)]
    fn add_scaled_loop(s: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += s * x;
        }
    }

    #[inline(always)]
    fn swiglu_loop(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }

    /// scores = softmax(scores·scale).
    #[inline(always)]
    fn soften_loop(scores: &mut [f32], scale: f32) {
        let highest = scores.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        for s in scores.iter_mut() {
            *s = exp(scale * (*s - highest));
        }
        let mut lanes = [0f32; 8];
        let (eights, rest) = scores.as_chunks::<8>();
        for eight in eights {
            for (lane, s) in lanes.iter_mut().zip(eight) {
                *lane += s;
            }
        }
        let total = lanes.iter().chain(rest).sum::<f32>();
        for s in scores.iter_mut() {
            *s /= total;
        }
    }

    /// The same in AVX2 with FMA, by hand: left to itself the compiler adds a vector's numbers up
    /// one after the other, which takes longer than everything before.
    // SAFETY of its loads and stores: each is of a whole vector of a chunk of that size.
    #[cfg(target_arch = "x86_64")]
    mod avx2 {
        use std::arch::x86_64::*;

        #[inline]
        pub(super) fn available() -> bool {
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
        }

        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn load(x: &[f32; 8]) -> __m256 {
            // SAFETY: eight numbers are 32 bytes.
            unsafe { _mm256_loadu_ps(x.as_ptr()) }
        }

        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn store(x: __m256, to: &mut [f32; 8]) {
            // SAFETY: eight numbers are 32 bytes.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) };
        }

        /// Products of the first whole eights, in four sums, then in one.
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn products(a: &[[f32; 8]], b: &[[f32; 8]]) -> __m256 {
            let mut sums = [_mm256_setzero_ps(); 4];
            let (a, b) = (a.as_chunks::<4>(), b.as_chunks::<4>());
            for (a, b) in a.0.iter().zip(b.0) {
                for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                    *sum = _mm256_fmadd_ps(load(a), load(b), *sum);
                }
            }
            for (a, b) in a.1.iter().zip(b.1) {
                sums[0] = _mm256_fmadd_ps(load(a), load(b), sums[0]);
            }
            let [p, q, r, s] = sums;
            _mm256_add_ps(_mm256_add_ps(p, q), _mm256_add_ps(r, s))
        }

        /// The sum of each of four vectors.
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn sums_of([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
            let pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let (low, high) = (
                _mm256_castps256_ps128(pairs),
                _mm256_extractf128_ps::<1>(pairs),
            );
            let mut sums = [0f32; 4];
            // SAFETY: four numbers are 16 bytes.
            unsafe { _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(low, high)) };
            sums
        }

        #[inline]
        fn tail(a: &[f32], b: &[f32]) -> f32 {
            a.iter().zip(b).map(|(a, b)| a * b).sum()
        }

        #[target_feature(enable = "avx2,fma")]
        pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
            let n = a.len().min(b.len());
            let (a, b) = (a[..n].as_chunks::<8>(), b[..n].as_chunks::<8>());
            let zero = _mm256_setzero_ps();
            sums_of([products(a.0, b.0), zero, zero, zero])[0] + tail(a.1, b.1)
        }

        /// q times each row of k.
        #[target_feature(enable = "avx2,fma")]
        pub(super) fn dots(q: &[f32], k: &[f32], out: &mut [f32]) {
            let d = q.len();
            let (eights, rest) = q.as_chunks::<8>();
            let row = |k: &[f32]| products(eights, k.as_chunks::<8>().0);
            let (fours, mut fewer) = (k.chunks_exact(4 * d), out.chunks_exact_mut(4));
            let last = fours.remainder();
            for (k, out) in fours.zip(fewer.by_ref()) {
                let (k0, k1) = (&k[..d], &k[d..2 * d]);
                let (k2, k3) = (&k[2 * d..3 * d], &k[3 * d..]);
                let sums = sums_of([row(k0), row(k1), row(k2), row(k3)]);
                for ((out, sum), k) in out.iter_mut().zip(sums).zip([k0, k1, k2, k3]) {
                    *out = sum + tail(rest, &k[d - rest.len()..]);
                }
            }
            let fewer = fewer.into_remainder().iter_mut();
            for (out, k) in fewer.zip(last.chunks_exact(d)) {
                *out = dot(q, k);
            }
        }

        #[target_feature(enable = "avx2,fma")]
        pub(super) fn soften(scores: &mut [f32], scale: f32) {
            super::soften_loop(scores, scale);
        }

        /// out = Σ weight · row of v.
        #[target_feature(enable = "avx2,fma")]
        pub(super) fn mix(weights: &[f32], v: &[f32], out: &mut [f32]) {
            /// Vectors of the output that stay in registers while all rows pass.
            const HELD: usize = 8;
            let d = out.len();
            for (part, out) in out.chunks_mut(8 * HELD).enumerate() {
                let at = part * 8 * HELD;
                let wide = out.len();
                let rows = v.chunks_exact(d).map(|v| &v[at..at + wide]);
                let (whole, rest) = out.as_chunks_mut::<8>();
                if let Ok(whole) = <&mut [[f32; 8]; HELD]>::try_from(&mut *whole) {
                    let mut sums = [_mm256_setzero_ps(); HELD];
                    for (weight, v) in weights.iter().zip(rows) {
                        let weight = _mm256_set1_ps(*weight);
                        for (sum, v) in sums.iter_mut().zip(v.as_chunks::<8>().0) {
                            *sum = _mm256_fmadd_ps(weight, load(v), *sum);
                        }
                    }
                    for (out, sum) in whole.iter_mut().zip(sums) {
                        store(sum, out);
                    }
                    continue;
                }
                for (i, out) in whole.as_flattened_mut().iter_mut().chain(rest).enumerate() {
                    *out = tail_of(weights, &v[(at + i).min(v.len())..], d);
                }
            }
        }

        /// Σ weight · every d-th number of v.
        #[inline]
        fn tail_of(weights: &[f32], v: &[f32], d: usize) -> f32 {
            let numbers = v.iter().step_by(d);
            weights.iter().zip(numbers).map(|(w, v)| w * v).sum()
        }
    }

    /// e^x within 2 units in the last place, in operations that become vector instructions:
    /// 2^n·e^r with n the nearest integer to x/ln 2, and e^r by its series.
    #[inline(always)]
    pub(super) fn exp(x: f32) -> f32 {
        let x = x.clamp(-87.0, 88.0);
        // 1.5 · 2^23 rounds to an integer, which then stands in the low bits.
        let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0;
        let n = shifted - 12_582_912.0;
        // ln 2 in two parts, the first exact for |n| < 2^9.
        let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
        let series = 1.0 / 5040.0;
        let series = series * r + 1.0 / 720.0;
        let series = series * r + 1.0 / 120.0;
        let series = series * r + 1.0 / 24.0;
        let series = series * r + 1.0 / 6.0;
        let series = series * r + 0.5;
        let series = (series * r + 1.0) * r + 1.0;
        let power = (shifted.to_bits() << 23).wrapping_add(0x3f80_0000);
        series * f32::from_bits(power)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{golden, tiny};
    use super::super::{Placement, Precision};
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, exact) = (f64::from(simd::exp(x)), f64::from(x).exp());
            assert!((got / exact - 1.0).abs() < 3e-7, "{x}: {got} {exact}");
        }
    }

    #[test]
    fn a_session_gives_the_logits_of_the_decoder_with_and_without_an_adapter() {
        for (name, with_adapter) in [("qwen2", false), ("qwen2", true), ("llama", false)] {
            let decoder = tiny(name, Precision::Dense(DType::F32));
            let adapter = with_adapter.then(|| {
                Adapter::load(&golden("sft_adapter"), &decoder.config, &Device::Cpu).unwrap()
            });
            let adapter = adapter.as_ref();
            let x = decoder
                .embed(&[&[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]])
                .unwrap();
            let h = decoder
                .hidden(&x, &Placement::Causal, adapter, None, None)
                .unwrap();
            let all = decoder.logits(&h).unwrap().squeeze(0).unwrap();
            let all = all.to_vec2::<f32>().unwrap();
            let mut session = Session::new(&decoder, adapter, &[11, 8]).unwrap().unwrap();
            let part = |from, n| x.narrow(1, from, n).unwrap();
            let close = |got: &[f32], at: usize| {
                for (a, b) in got.iter().zip(&all[at]) {
                    assert!((a - b).abs() < 2e-5, "{name} at {at}: {a} {b}");
                }
            };
            for (from, n) in [(0, 4), (4, 1), (5, 1), (6, 5)] {
                let got = session.read(&[(0, part(from, n))]).unwrap().remove(0);
                close(&got, from + n - 1);
            }
            let full = session.read(&[(0, part(0, 1))]).unwrap_err();
            assert!(full.to_string().contains("room for 11"), "{full}");

            // From a shared beginning, and beside another sequence.
            session.share(0, 1, 4);
            assert_eq!(session.len(1), 4);
            close(&session.read(&[(1, part(4, 1))]).unwrap()[0], 4);
            let mut both = Session::new(&decoder, adapter, &[11, 4]).unwrap().unwrap();
            both.read(&[(0, part(0, 4))]).unwrap();
            let got = both.read(&[(1, part(0, 4)), (0, part(4, 1))]).unwrap();
            close(&got[0], 3);
            close(&got[1], 4);
        }
    }
}
