//! Flux's blocks on the CPU, for inference in f32, with few passes over memory.
//!
//! Written as tensor operations a block is some thirty passes over its activations, most of
//! them on one core, and the score matrix in full. Here it is three:
//!
//! 1. *in*: some rows at a time: norm, modulate, multiply by the fused matrix, then normalise
//!    and rotate query and key (and apply GELU to the MLP's part) while they are in cache;
//! 2. *attend*: some queries at a time, one head after the other: scores, softmax, values;
//! 3. *out*: some rows at a time: the output matrices (and in a double block the whole MLP),
//!    gated and added to the input.
//!
//! Pictures of a batch are worked on side by side, each with buffers of its own, and the row
//! groups within a picture too. The arithmetic of a row does not depend on the batch.
//!
//! Not for training (no gradient is recorded), not for other devices or dtypes, and not for
//! hidden sizes where reading the weights once per row group would cost more than it saves:
//! then each function here answers `None` and the caller does it with tensor operations.

use crate::Result;
use crate::host::{Host, LANES, Panels, Rows, exp, kernel, largest, multiply, sum};
use crate::nn::Linear;
use candle_core::Tensor;
use rayon::prelude::*;

/// Wider networks go the other way: their weights do not stay in cache.
pub(super) const HIDDEN_MAX: usize = 1024;
/// Rows of a group: the matrix product takes six at a time, and a group's widest activations
/// (5.4 kB a row at 192 wide) should stay in the second cache.
const ROWS: usize = 72;
/// Added to variances and mean squares.
const EPS: f32 = 1e-6;

/// A linear layer: its panels, or its weight as (in, out) and its bias.
enum Layer<'a> {
    Panels(&'a Panels),
    Plain { weight: Tensor, bias: Tensor },
}

impl<'a> Layer<'a> {
    fn of(linear: &'a Linear) -> Result<Option<Self>> {
        if let Some(panels) = linear.panels() {
            return Ok(Some(Self::Panels(panels)));
        }
        let weight = linear.weight().t()?;
        Ok(match linear.bias() {
            Some(bias) if weight.is_contiguous() => Some(Self::Plain {
                weight,
                bias: bias.clone(),
            }),
            _ => None,
        })
    }

    fn host(&self) -> Option<Matrix<'_>> {
        match self {
            Self::Panels(panels) => Some(Matrix::Panels(panels)),
            Self::Plain { weight, bias } => Some(Matrix::Plain {
                inputs: weight.dim(0).ok()?,
                outputs: weight.dim(1).ok()?,
                weight: Host::of(weight)?,
                bias: Host::of(bias)?,
            }),
        }
    }
}

/// The same, at hand.
enum Matrix<'a> {
    Panels(&'a Panels),
    Plain {
        weight: Host<'a>,
        bias: Host<'a>,
        inputs: usize,
        outputs: usize,
    },
}

impl Matrix<'_> {
    /// (inputs, outputs).
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Panels(panels) => (panels.inputs(), panels.outputs()),
            Self::Plain {
                inputs, outputs, ..
            } => (*inputs, *outputs),
        }
    }

    /// y (m, outputs) = x (m, inputs)·W + b.
    fn apply(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Panels(panels) => panels.apply(x, y),
            Self::Plain {
                weight,
                bias,
                inputs,
                outputs,
            } => {
                let m = y.len() / outputs;
                y.chunks_exact_mut(*outputs)
                    .for_each(|row| row.copy_from_slice(bias.get()));
                let (x, w) = (Rows::new(x, *inputs), Rows::new(weight.get(), *outputs));
                multiply((m, *outputs, *inputs), x, w, y, *outputs, true);
            }
        }
    }
}

// -------------------------------------------------------------------------------- kernels

kernel! {
    /// Each row of x, normalised to mean 0 and variance 1, times (1 + scale), plus shift.
    fn norm_modulate(x: &[f32], shift: &[f32], scale: &[f32], out: &mut [f32]) {
        let d = shift.len();
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            let mean = sum(x, |x| x) / d as f32;
            let variance = sum(x, |x| (x - mean) * (x - mean)) / d as f32;
            let inverse = 1.0 / (variance + EPS).sqrt();
            for (((out, x), shift), scale) in out.iter_mut().zip(x).zip(shift).zip(scale) {
                *out = (x - mean) * inverse * (1.0 + scale) + shift;
            }
        }
    }
}

kernel! {
    /// GELU by the tanh approximation: x·σ(2·sqrt(2/π)·(x + 0.044715·x³)).
    fn gelu(x: &[f32], out: &mut [f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            let u = 1.595_769 * (x + 0.044_715 * x * x * x);
            *out = x / (1.0 + exp(-u));
        }
    }
}

kernel! {
    /// As [`gelu`], where it lies.
    fn gelu_in_place(x: &mut [f32]) {
        for x in x {
            let u = 1.595_769 * (*x + 0.044_715 * *x * *x * *x);
            *x /= 1.0 + exp(-u);
        }
    }
}

kernel! {
    /// x + gate·y, row by row.
    fn gate_add(x: &[f32], gate: &[f32], y: &[f32], out: &mut [f32]) {
        let d = gate.len();
        let rows = x.chunks_exact(d).zip(y.chunks_exact(d)).zip(out.chunks_exact_mut(d));
        for ((x, y), out) in rows {
            for (((out, x), y), gate) in out.iter_mut().zip(x).zip(y).zip(gate) {
                *out = x + gate * y;
            }
        }
    }
}

kernel! {
    /// One head of one token: RMS norm with weight, then each pair (2i, 2i+1) rotated.
    fn norm_rotate(x: &mut [f32], weight: &[f32], cos: &[f32], sin: &[f32]) {
        let inverse = 1.0 / (sum(x, |x| x * x) / x.len() as f32 + EPS).sqrt();
        let pairs = x.chunks_exact_mut(2).zip(weight.chunks_exact(2));
        for (((x, w), c), s) in pairs.zip(cos).zip(sin) {
            let (a, b) = (x[0] * inverse * w[0], x[1] * inverse * w[1]);
            x[0] = a * c - b * s;
            x[1] = a * s + b * c;
        }
    }
}

kernel! {
    /// The first s of each row of scores (rows `width` apart) as e^(scale·(score - largest));
    /// 1/Σ into `inverse`.
    fn soften(scores: &mut [f32], width: usize, s: usize, scale: f32, inverse: &mut [f32]) {
        for (row, inverse) in scores.chunks_exact_mut(width).zip(inverse) {
            let row = &mut row[..s];
            let most = largest(row);
            for x in row.iter_mut() {
                *x = exp(scale * (*x - most));
            }
            *inverse = 1.0 / sum(row, |x| x);
        }
    }
}

kernel! {
    /// Columns [at, at + head) of rows `width` apart as rows `across` apart, in squares that fit in
    /// registers and cache: number by number each would go to another line. What `keys` has
    /// beyond the rows of x becomes 0.
    fn turn(x: &[f32], width: usize, at: usize, keys: &mut [f32], across: usize) {
        let head = keys.len() / across;
        for first in (0..across).step_by(LANES) {
            for i in (0..head).step_by(LANES) {
                let n = LANES.min(head - i);
                let mut square = [[0f32; LANES]; LANES];
                let rows = x[(first * width).min(x.len())..].chunks(width);
                for (line, row) in square.iter_mut().zip(rows) {
                    line[..n].copy_from_slice(&row[at + i..][..n]);
                }
                for (j, keys) in keys[i * across..].chunks_mut(across).take(n).enumerate() {
                    for (key, line) in keys[first..first + LANES].iter_mut().zip(&square) {
                        *key = line[j];
                    }
                }
            }
        }
    }
}

// --------------------------------------------------------------------------------- blocks

/// What both kinds of block need to know.
struct Shape<'a> {
    /// Tokens of text and image together.
    tokens: usize,
    /// Hidden size.
    d: usize,
    heads: usize,
    /// (tokens, head_dim / 2) each.
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Shape<'_> {
    fn head(&self) -> usize {
        self.d / self.heads
    }

    /// Normalises and rotates query and key of the tokens from `first` on, in rows of at
    /// least 3·d: query, key, value.
    fn finish_heads(&self, rows: &mut [f32], width: usize, first: usize, q: &[f32], k: &[f32]) {
        let (head, half) = (self.head(), self.head() / 2);
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let at = (first + i) * half..(first + i + 1) * half;
            let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
            for (j, part) in row[..2 * self.d].chunks_exact_mut(head).enumerate() {
                let weight = if j < self.heads { q } else { k };
                norm_rotate(part, weight, cos, sin);
            }
        }
    }

    /// Attention of all tokens over `qkv` (tokens, 3·d), into the first d columns of `out`,
    /// whose rows are `width` wide.
    fn attend(&self, qkv: &[f32], out: &mut [f32], width: usize) {
        let (d, head, s) = (self.d, self.head(), self.tokens);
        let scale = 1.0 / (head as f32).sqrt();
        // The keys as columns, head after head, with rows of whole vectors: the product would
        // otherwise turn them round again for every group of queries.
        let wide = s.next_multiple_of(LANES);
        let mut keys = vec![0f32; d * wide];
        keys.par_chunks_mut(head * wide)
            .enumerate()
            .for_each(|(h, keys)| turn(qkv, 3 * d, d + h * head, keys, wide));
        out.par_chunks_mut(ROWS * width)
            .enumerate()
            .for_each(|(group, out)| {
                let m = out.len() / width;
                let first = group * ROWS;
                let mut scores = vec![0f32; m * wide];
                let mut inverse = vec![0f32; m];
                for h in 0..self.heads {
                    let q = Rows::new(&qkv[first * 3 * d + h * head..], 3 * d);
                    let k = Rows::new(&keys[h * head * wide..], wide);
                    let v = Rows::new(&qkv[2 * d + h * head..], 3 * d);
                    multiply((m, wide, head), q, k, &mut scores, wide, false);
                    soften(&mut scores, wide, s, scale, &mut inverse);
                    let p = Rows::new(&scores, wide);
                    multiply((m, head, s), p, v, &mut out[h * head..], width, false);
                    for (row, inverse) in out.chunks_exact_mut(width).zip(&inverse) {
                        row[h * head..(h + 1) * head]
                            .iter_mut()
                            .for_each(|x| *x *= inverse);
                    }
                }
            });
    }
}

/// Item i of a modulation whose batch is 1 or b: parts of d each.
fn parts(modulation: &[f32], i: usize, count: usize, d: usize) -> Vec<&[f32]> {
    let items = (modulation.len() / (count * d)).max(1);
    let at = if items == 1 { 0 } else { i } * count * d;
    modulation[at..at + count * d].chunks_exact(d).collect()
}

/// Whether a modulation of `count` parts suits b pictures.
fn suits(modulation: &[f32], count: usize, b: usize, d: usize) -> bool {
    modulation.len() == count * d || modulation.len() == b * count * d
}

/// A single block; see `SingleBlock` in [`super::transformer`].
pub(super) struct Single<'a> {
    pub first: &'a Linear,
    pub second: &'a Linear,
    pub norm_q: &'a Tensor,
    pub norm_k: &'a Tensor,
    pub heads: usize,
}

impl Single<'_> {
    /// x (b, tokens, d) after the block, or `None` where this is not the way.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        modulation: &Tensor,
        (cos, sin): (&Tensor, &Tensor),
    ) -> Result<Option<Tensor>> {
        let (b, tokens, d) = x.dims3()?;
        if x.track_op() {
            return Ok(None);
        }
        let x = x.contiguous()?;
        let modulation = modulation.contiguous()?;
        let (Some(first), Some(second)) = (Layer::of(self.first)?, Layer::of(self.second)?) else {
            return Ok(None);
        };
        let hosts = (
            (Host::of(&x), Host::of(&modulation)),
            (first.host(), second.host()),
            (Host::of(self.norm_q), Host::of(self.norm_k)),
            (Host::of(cos), Host::of(sin)),
        );
        let (
            (Some(input), Some(modulation)),
            (Some(first), Some(second)),
            (Some(norm_q), Some(norm_k)),
            (Some(cos), Some(sin)),
        ) = hosts
        else {
            return Ok(None);
        };
        let half = d / self.heads / 2;
        if d > HIDDEN_MAX
            || tokens == 0
            || first.shape() != (d, 7 * d)
            || second.shape() != (5 * d, d)
            || cos.get().len() != tokens * half
            || !suits(modulation.get(), 3, b, d)
        {
            return Ok(None);
        }
        let shape = Shape {
            tokens,
            d,
            heads: self.heads,
            cos: cos.get(),
            sin: sin.get(),
        };
        let (norm_q, norm_k) = (norm_q.get(), norm_k.get());
        let mut out = vec![0f32; b * tokens * d];
        out.par_chunks_mut(tokens * d)
            .zip(input.get().par_chunks(tokens * d))
            .enumerate()
            .for_each(|(item, (out, x))| {
                let parts = parts(modulation.get(), item, 3, d);
                let mut qkv = vec![0f32; tokens * 3 * d];
                // Attention's output in the first d columns, the MLP's in the other 4·d.
                let mut wide = vec![0f32; tokens * 5 * d];
                qkv.par_chunks_mut(ROWS * 3 * d)
                    .zip(wide.par_chunks_mut(ROWS * 5 * d))
                    .zip(x.par_chunks(ROWS * d))
                    .enumerate()
                    .for_each(|(group, ((qkv, wide), x))| {
                        let mut normed = vec![0f32; x.len()];
                        norm_modulate(x, parts[0], parts[1], &mut normed);
                        let mut h = vec![0f32; x.len() * 7];
                        first.apply(&normed, &mut h);
                        shape.finish_heads(&mut h, 7 * d, group * ROWS, norm_q, norm_k);
                        let rows = h.chunks_exact(7 * d);
                        let ends = qkv
                            .chunks_exact_mut(3 * d)
                            .zip(wide.chunks_exact_mut(5 * d));
                        for (h, (qkv, wide)) in rows.zip(ends) {
                            qkv.copy_from_slice(&h[..3 * d]);
                            gelu(&h[3 * d..], &mut wide[d..]);
                        }
                    });
                shape.attend(&qkv, &mut wide, 5 * d);
                out.par_chunks_mut(ROWS * d)
                    .zip(x.par_chunks(ROWS * d))
                    .zip(wide.par_chunks(ROWS * 5 * d))
                    .for_each(|((out, x), wide)| {
                        let mut y = vec![0f32; x.len()];
                        second.apply(wide, &mut y);
                        gate_add(x, parts[2], &y, out);
                    });
            });
        Ok(Some(Tensor::from_vec(out, (b, tokens, d), x.device())?))
    }
}

/// One stream of a double block; see `Stream` in [`super::transformer`].
pub(super) struct Stream<'a> {
    pub qkv: &'a Linear,
    pub norm_q: &'a Tensor,
    pub norm_k: &'a Tensor,
    pub proj: &'a Linear,
    pub up: &'a Linear,
    pub down: &'a Linear,
}

impl<'a> Stream<'a> {
    fn layers(&self) -> Result<Option<[Layer<'a>; 4]>> {
        let all = [
            Layer::of(self.qkv)?,
            Layer::of(self.proj)?,
            Layer::of(self.up)?,
            Layer::of(self.down)?,
        ];
        Ok(match all {
            [Some(a), Some(b), Some(c), Some(d)] => Some([a, b, c, d]),
            _ => None,
        })
    }
}

/// A stream's numbers, at hand.
struct Side<'a> {
    x: Host<'a>,
    modulation: Host<'a>,
    qkv: Matrix<'a>,
    proj: Matrix<'a>,
    up: Matrix<'a>,
    down: Matrix<'a>,
    norm_q: Host<'a>,
    norm_k: Host<'a>,
}

impl<'a> Side<'a> {
    fn of(
        x: &'a Tensor,
        modulation: &'a Tensor,
        layers: &'a [Layer<'a>; 4],
        stream: &Stream<'a>,
    ) -> Option<Self> {
        Some(Self {
            x: Host::of(x)?,
            modulation: Host::of(modulation)?,
            qkv: layers[0].host()?,
            proj: layers[1].host()?,
            up: layers[2].host()?,
            down: layers[3].host()?,
            norm_q: Host::of(stream.norm_q)?,
            norm_k: Host::of(stream.norm_k)?,
        })
    }

    fn fits(&self, b: usize, d: usize) -> bool {
        self.qkv.shape() == (d, 3 * d)
            && self.proj.shape() == (d, d)
            && self.up.shape() == (d, 4 * d)
            && self.down.shape() == (4 * d, d)
            && suits(self.modulation.get(), 6, b, d)
    }

    /// Query, key and value of one picture's rows, which are the tokens from `first` on.
    fn project(&self, shape: &Shape, first: usize, item: usize, x: &[f32], qkv: &mut [f32]) {
        let d = shape.d;
        let parts = parts(self.modulation.get(), item, 6, d);
        qkv.par_chunks_mut(ROWS * 3 * d)
            .zip(x.par_chunks(ROWS * d))
            .enumerate()
            .for_each(|(group, (qkv, x))| {
                let mut normed = vec![0f32; x.len()];
                norm_modulate(x, parts[0], parts[1], &mut normed);
                self.qkv.apply(&normed, qkv);
                let (q, k) = (self.norm_q.get(), self.norm_k.get());
                shape.finish_heads(qkv, 3 * d, first + group * ROWS, q, k);
            });
    }

    /// x + gate·proj(attended), then that + gate·MLP, for one picture's rows.
    fn finish(&self, d: usize, item: usize, x: &[f32], attended: &[f32], out: &mut [f32]) {
        let parts = parts(self.modulation.get(), item, 6, d);
        out.par_chunks_mut(ROWS * d)
            .zip(x.par_chunks(ROWS * d))
            .zip(attended.par_chunks(ROWS * d))
            .for_each(|((out, x), attended)| {
                let mut y = vec![0f32; x.len()];
                self.proj.apply(attended, &mut y);
                let mut middle = vec![0f32; x.len()];
                gate_add(x, parts[2], &y, &mut middle);
                norm_modulate(&middle, parts[3], parts[4], &mut y);
                let mut h = vec![0f32; x.len() * 4];
                self.up.apply(&y, &mut h);
                gelu_in_place(&mut h);
                self.down.apply(&h, &mut y);
                gate_add(&middle, parts[5], &y, out);
            });
    }
}

/// A double block: image (b, n, d) and text (b, t, d) after it, or `None` where this is not
/// the way.
pub(super) fn double(
    (image, image_mod, image_stream): (&Tensor, &Tensor, &Stream),
    (text, text_mod, text_stream): (&Tensor, &Tensor, &Stream),
    heads: usize,
    (cos, sin): (&Tensor, &Tensor),
) -> Result<Option<(Tensor, Tensor)>> {
    let ((b, n, d), (tb, t, _)) = (image.dims3()?, text.dims3()?);
    if image.track_op() || text.track_op() {
        return Ok(None);
    }
    let (image, text) = (image.contiguous()?, text.contiguous()?);
    let (image_mod, text_mod) = (image_mod.contiguous()?, text_mod.contiguous()?);
    let (Some(image_layers), Some(text_layers)) = (image_stream.layers()?, text_stream.layers()?)
    else {
        return Ok(None);
    };
    let (Some(of_image), Some(of_text), Some(cos), Some(sin)) = (
        Side::of(&image, &image_mod, &image_layers, image_stream),
        Side::of(&text, &text_mod, &text_layers, text_stream),
        Host::of(cos),
        Host::of(sin),
    ) else {
        return Ok(None);
    };
    let half = d / heads / 2;
    if d > HIDDEN_MAX
        || tb != b
        || n == 0
        || t == 0
        || cos.get().len() != (t + n) * half
        || !of_image.fits(b, d)
        || !of_text.fits(b, d)
    {
        return Ok(None);
    }
    let shape = Shape {
        tokens: t + n,
        d,
        heads,
        cos: cos.get(),
        sin: sin.get(),
    };
    let mut image_out = vec![0f32; b * n * d];
    let mut text_out = vec![0f32; b * t * d];
    image_out
        .par_chunks_mut(n * d)
        .zip(text_out.par_chunks_mut(t * d))
        .zip(of_image.x.get().par_chunks(n * d))
        .zip(of_text.x.get().par_chunks(t * d))
        .enumerate()
        .for_each(|(item, (((image_out, text_out), image), text))| {
            let mut qkv = vec![0f32; (t + n) * 3 * d];
            let (text_qkv, image_qkv) = qkv.split_at_mut(t * 3 * d);
            rayon::join(
                || of_text.project(&shape, 0, item, text, text_qkv),
                || of_image.project(&shape, t, item, image, image_qkv),
            );
            let mut attended = vec![0f32; (t + n) * d];
            shape.attend(&qkv, &mut attended, d);
            let (text_part, image_part) = attended.split_at(t * d);
            rayon::join(
                || of_text.finish(d, item, text, text_part, text_out),
                || of_image.finish(d, item, image, image_part, image_out),
            );
        });
    let device = image.device();
    Ok(Some((
        Tensor::from_vec(image_out, (b, n, d), device)?,
        Tensor::from_vec(text_out, (b, t, d), device)?,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_exponential_and_gelu_are_exact_to_a_few_units() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let truth = f64::from(x).exp();
            let error = (f64::from(exp(x)) - truth).abs() / truth;
            assert!(error < 3e-7, "e^{x}: {error}");
        }
        assert!(exp(f32::NAN).is_nan() && exp(-1e9) < 1e-37);
        let xs: Vec<f32> = (-1000..1000).map(|i| i as f32 / 100.0).collect();
        let mut out = vec![0f32; xs.len()];
        gelu(&xs, &mut out);
        for (x, y) in xs.iter().zip(out) {
            let x = f64::from(*x);
            let truth = 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh());
            assert!(
                (f64::from(y) - truth).abs() < 2e-6,
                "gelu({x}): {y}, {truth}"
            );
        }
    }

    #[test]
    fn columns_become_rows() {
        // Widths that squares divide and that they do not; the tokens fill no square.
        for (tokens, head, at) in [(20, 16, 3), (33, 24, 0), (5, 40, 7), (16, 8, 1)] {
            let (width, wide) = (at + head + 2, usize::next_multiple_of(tokens, LANES));
            let x: Vec<f32> = (0..tokens * width).map(|i| i as f32).collect();
            let mut keys = vec![-1f32; head * wide];
            turn(&x, width, at, &mut keys, wide);
            for (place, key) in keys.iter().enumerate() {
                let (i, token) = (place / wide, place % wide);
                let right = if token < tokens {
                    x[token * width + at + i]
                } else {
                    0.0
                };
                assert_eq!(*key, right, "{tokens} tokens, head {head}: {i}, {token}");
            }
        }
    }

    #[test]
    fn products_of_any_stride_are_the_sums_they_should_be() {
        let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..20).map(|i| (i as f32) - 7.0).collect();
        // a: 3×2 of rows 4 apart; b: the transpose of 5×2 of rows 4 apart.
        let mut y = vec![1f32; 3 * 6];
        multiply(
            (3, 5, 2),
            Rows::new(&a, 4),
            Rows::new(&b, 4).t(),
            &mut y,
            6,
            true,
        );
        for i in 0..3 {
            for j in 0..5 {
                let dot = a[4 * i] * b[4 * j] + a[4 * i + 1] * b[4 * j + 1];
                assert_eq!(y[6 * i + j], 1.0 + dot);
            }
            assert_eq!(y[6 * i + 5], 1.0);
        }
    }
}
