//! Convolutions and doubling with gradients that are quick on a CPU.
//!
//! candle's own convolution copies number by number, and its gradient goes through a transposed
//! convolution that is written for any layout and, on a CPU, takes the time of dozens of
//! forward passes. Here a convolution is: unfold the picture into columns, multiply; for inference
//! a few rows at a time, so that the columns stay in cache. Its gradients are: multiply, fold the
//! columns back. Half precision on the CPU, for which candle
//! has no convolution, is computed in f32 and rounded, as a GPU does it. Anything else goes to
//! candle's.
//!
//! Not here: groups and dilation.

use crate::Result;
use crate::host::{Host, Rows, multiply};
use crate::nn::{attach1, attach3};
use candle_core::{CpuStorage, DType, Device, Result as CandleResult, Storage, Tensor};
use candle_nn::Conv2dConfig;
use rayon::prelude::*;

/// A convolution with weight (out, in, k, k) and bias (out).
#[derive(Clone, Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

impl Conv2d {
    /// From weights. Of the config only stride and padding count.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self {
            weight,
            bias,
            config,
        }
    }

    /// The dtype of the weights, in which it takes and gives tensors.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// x (b, in, h, w), which is brought to the weights' dtype, to (b, out, h', w') in it.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.forward_wide(x)?.to_dtype(self.dtype())?)
    }

    /// [`Self::forward`] with the sums as exact as the device has them: on a CPU they are f32
    /// whatever the weights' dtype, else of that dtype.
    pub fn forward_wide(&self, x: &Tensor) -> Result<Tensor> {
        let x = &x.to_dtype(self.dtype())?;
        let (padding, stride) = (self.config.padding, self.config.stride);
        if let Some(bias) = &self.bias
            && learns_on_cpu(&[x, &self.weight, bias])
        {
            return Ok(conv2d(x, &self.weight, bias, padding, stride)?);
        }
        if x.device().is_cpu() && matches!(x.dtype(), DType::BF16 | DType::F16) {
            let wide = |t: &Tensor| t.to_dtype(DType::F32);
            let bias = self.bias.as_ref().map(wide).transpose()?;
            let exact = Self::new(wide(&self.weight)?, bias, self.config);
            return exact.forward(&wide(x)?);
        }
        Ok(convolved(
            x,
            &self.weight,
            self.bias.as_ref(),
            padding,
            stride,
        )?)
    }
}

/// A convolution of inference: ours for f32 on a CPU, else candle's. Where a gradient is wanted
/// it is candle's own, slow on a CPU ([`Conv2d`] has a quick one).
pub fn convolved(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    padding: usize,
    stride: usize,
) -> CandleResult<Tensor> {
    let mut all = [x, weight].into_iter().chain(bias);
    if all.all(|t| !t.track_op() && plain_on_cpu(&[t])) {
        return convolve(x, weight, bias, padding, stride);
    }
    let y = x.conv2d(weight, padding, stride, 1, 1)?;
    match bias {
        Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(y),
    }
}

/// Whether one of these carries a gradient and all are f32 on the CPU.
pub fn learns_on_cpu(tensors: &[&Tensor]) -> bool {
    tensors.iter().any(|x| x.track_op()) && plain_on_cpu(tensors)
}

/// Whether all are f32 on the CPU.
pub fn plain_on_cpu(tensors: &[&Tensor]) -> bool {
    let plain = |x: &&Tensor| x.dtype() == DType::F32 && matches!(x.device(), Device::Cpu);
    tensors.iter().all(plain)
}

/// The convolution with its gradients, f32 on the CPU.
fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    padding: usize,
    stride: usize,
) -> CandleResult<Tensor> {
    let (b, _, h, w) = x.dims4()?;
    let (out, _, k, _) = weight.dims4()?;
    let window = Window { k, padding, stride };
    let (oh, ow) = (window.out(h), window.out(w));
    let columns = unfold(&x.detach(), window)?; // (b, in·k·k, oh·ow)
    let flat = weight.detach().reshape((1, out, ()))?;
    let depth = flat.dim(2)?;
    let mut value = values(&flat.expand((b, out, depth))?.matmul(&columns)?)?;
    let biases = values(bias)?;
    for (i, row) in value.chunks_exact_mut(oh * ow).enumerate() {
        let bias = biases[i % out];
        row.iter_mut().for_each(|v| *v += bias);
    }
    let value = Tensor::from_vec(value, (b, out, oh, ow), &Device::Cpu)?;
    attach3(x, weight, bias, &value, move |x, weight, _, _, g| {
        let g = g.detach().contiguous()?.reshape((b, out, oh * ow))?;
        let mut to_bias = vec![0f32; out];
        with_values(&g, |g| {
            for (i, row) in g.chunks_exact(oh * ow).enumerate() {
                to_bias[i % out] += sum(row);
            }
        })?;
        let to_bias = Tensor::from_vec(to_bias, out, &Device::Cpu)?;
        let columns = unfold(&x.detach(), window)?;
        let each = g.matmul(&columns.t()?)?; // (b, out, in·k·k)
        let to_weight = each.sum(0)?.reshape(weight.shape())?;
        let to_x = match x.track_op() {
            true => {
                let flat = weight.detach().reshape((1, out, depth))?.t()?;
                let columns = flat.expand((b, depth, out))?.matmul(&g)?;
                Some(fold(&columns, x.dims4()?, window)?)
            }
            false => None,
        };
        Ok((to_x, Some(to_weight), Some(to_bias)))
    })
}

/// Numbers of unfolded columns at a time: a quarter of a megabyte, half a core's second cache.
const COLUMNS: usize = 64 << 10;

/// The convolution for inference, f32 on the CPU. What comes out does not depend on how many
/// threads there are.
fn convolve(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    padding: usize,
    stride: usize,
) -> CandleResult<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (out, inputs, k, across) = weight.dims4()?;
    if inputs != c || k != across || h + 2 * padding < k || w + 2 * padding < k || stride == 0 {
        candle_core::bail!(
            "a convolution of {:?} with stride {stride} and padding {padding} does not fit {:?}",
            weight.dims(),
            x.dims()
        )
    }
    let window = Window { k, padding, stride };
    let (oh, ow) = (window.out(h), window.out(w));
    let (depth, area) = (c * k * k, oh * ow);
    let biases = match bias {
        Some(bias) => values(bias)?,
        None => vec![0f32; out],
    };
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let (Some(x), Some(weight)) = (Host::of(&x), Host::of(&weight)) else {
        candle_core::bail!("expected f32 on the CPU without a gradient")
    };
    let weight = Rows::new(weight.get(), depth);
    let lines = (COLUMNS / (depth * ow)).clamp(1, oh);
    let strips: Vec<(usize, usize)> = (0..b)
        .flat_map(|item| (0..oh).step_by(lines).map(move |first| (item, first)))
        .collect();
    let strip = |columns: &mut Vec<f32>, &(item, first): &(usize, usize)| {
        let picture = &x.get()[item * c * h * w..][..c * h * w];
        let n = lines.min(oh - first) * ow;
        let mut y: Vec<f32> = biases
            .iter()
            .flat_map(|b| (0..n).map(move |_| *b))
            .collect();
        let columns = match (k, stride, padding) {
            // A pixel is its own column.
            (1, 1, 0) => Rows::new(&picture[first * ow..], area),
            _ => {
                columns.resize(depth * n, 0.0);
                unfold_strip(picture, (c, h, w), window, first, columns);
                Rows::new(columns, n)
            }
        };
        multiply((out, n, depth), weight, columns, &mut y, n, true);
        y
    };
    let mut made: Vec<Vec<f32>> = match strips.len() {
        1 => strips.iter().map(|s| strip(&mut Vec::new(), s)).collect(),
        _ => strips.par_iter().map_init(Vec::new, strip).collect(),
    };
    let y = match made.len() {
        1 => made.swap_remove(0),
        _ => {
            let mut y = vec![0f32; b * out * area];
            for ((item, first), part) in strips.iter().zip(&made) {
                let n = part.len() / out.max(1);
                let to = y[item * out * area..]
                    .chunks_mut(area)
                    .map(|y| &mut y[first * ow..]);
                for (to, from) in to.zip(part.chunks_exact(n.max(1))) {
                    to[..n].copy_from_slice(from);
                }
            }
            y
        }
    };
    Tensor::from_vec(y, (b, out, oh, ow), &Device::Cpu)
}

/// The columns (c·k·k, places) of some rows of places, from row `first` on, of a picture
/// (c, h, w); as many as `columns` has room for.
fn unfold_strip(
    picture: &[f32],
    (c, h, w): (usize, usize, usize),
    window: Window,
    first: usize,
    columns: &mut [f32],
) {
    let Window { k, padding, stride } = window;
    let ow = window.out(w);
    let n = columns.len() / (c * k * k);
    for (row, column) in columns.chunks_exact_mut(n).enumerate() {
        let (channel, dy, dx) = (row / (k * k), row / k % k, row % k);
        let across = window.places(dx, w);
        for (i, line) in column.chunks_exact_mut(ow).enumerate() {
            let y = (first + i) * stride + dy;
            let Some(y) = y.checked_sub(padding).filter(|y| *y < h) else {
                line.fill(0.0);
                continue;
            };
            line[..across.start].fill(0.0);
            line[across.end..].fill(0.0);
            let line = &mut line[across.clone()];
            if line.is_empty() {
                continue;
            }
            let from = (channel * h + y) * w + across.start * stride + dx - padding;
            match stride {
                1 => line.copy_from_slice(&picture[from..from + line.len()]),
                _ => {
                    let source = picture[from..].iter().step_by(stride);
                    line.iter_mut().zip(source).for_each(|(a, b)| *a = *b);
                }
            }
        }
    }
}

/// A sum that the compiler can keep in a vector register.
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    rest + lanes.iter().sum::<f32>()
}

/// Σ a·b, likewise.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (left, right) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = left
        .remainder()
        .iter()
        .zip(right.remainder())
        .map(|(a, b)| a * b)
        .sum();
    for (x, y) in left.zip(right) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    rest + lanes.iter().sum::<f32>()
}

/// Group norm, then x·sigmoid(x), with gradients, f32 on the CPU. x (b, c, h, w).
pub fn group_norm_silu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    eps: f32,
) -> CandleResult<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (area, per) = (h * w, c / groups);
    let (xs, ws, bs) = (values(x)?, values(weight)?, values(bias)?);
    let mut moments = Vec::with_capacity(b * groups); // mean, 1/σ
    let mut out = vec![0f32; xs.len()];
    for (g, part) in xs.chunks_exact(per * area).enumerate() {
        let n = part.len() as f32;
        let mean = sum(part) / n;
        let scale = (dot(part, part) / n - mean * mean).max(0.0);
        let scale = 1.0 / (scale + eps).sqrt();
        moments.push((mean, scale));
        for (k, row) in part.chunks_exact(area).enumerate() {
            let channel = (g % groups) * per + k;
            let (gain, offset) = (scale * ws[channel], bs[channel]);
            let to = &mut out[(g * per + k) * area..][..area];
            for (y, x) in to.iter_mut().zip(row) {
                let z = (x - mean) * gain + offset;
                *y = z / (1.0 + fast_exp(-z));
            }
        }
    }
    let value = Tensor::from_vec(out, x.shape(), &Device::Cpu)?;
    attach3(x, weight, bias, &value, move |x, weight, bias, _, g| {
        let (xs, ws, bs, gs) = (values(x)?, values(weight)?, values(bias)?, values(g)?);
        let mut to_x = vec![0f32; xs.len()];
        let (mut to_weight, mut to_bias) = (vec![0f32; c], vec![0f32; c]);
        let mut normed = vec![0f32; area * per];
        let mut inner = vec![0f32; area * per];
        for (group, &(mean, scale)) in moments.iter().enumerate() {
            let at = group * per * area;
            let (mut total, mut along) = (0f32, 0f32);
            for k in 0..per {
                let channel = (group % groups) * per + k;
                let (gain, offset) = (ws[channel], bs[channel]);
                let span = at + k * area..at + (k + 1) * area;
                let n = &mut normed[k * area..(k + 1) * area];
                let d = &mut inner[k * area..(k + 1) * area];
                for (((n, d), x), g) in n
                    .iter_mut()
                    .zip(d.iter_mut())
                    .zip(&xs[span.clone()])
                    .zip(&gs[span])
                {
                    *n = (x - mean) * scale;
                    let z = *n * gain + offset;
                    let s = 1.0 / (1.0 + fast_exp(-z));
                    *d = g * s * (1.0 + z * (1.0 - s));
                }
                let (one, two) = (sum(d), dot(d, n));
                to_bias[channel] += one;
                to_weight[channel] += two;
                total += one * gain;
                along += two * gain;
            }
            let count = (per * area) as f32;
            let (total, along) = (total / count, along / count);
            for k in 0..per {
                let gain = ws[(group % groups) * per + k];
                let to = &mut to_x[at + k * area..at + (k + 1) * area];
                let (n, d) = (&normed[k * area..], &inner[k * area..]);
                for ((t, n), d) in to.iter_mut().zip(n).zip(d) {
                    *t = scale * (d * gain - total - n * along);
                }
            }
        }
        Ok((
            Some(Tensor::from_vec(to_x, x.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(to_weight, c, &Device::Cpu)?),
            Some(Tensor::from_vec(to_bias, c, &Device::Cpu)?),
        ))
    })
}

/// e^x to about 1e-6 relative, in operations that run eight or sixteen at a time.
#[inline(always)]
pub fn fast_exp(x: f32) -> f32 {
    let t = (x * std::f32::consts::LOG2_E).clamp(-126.0, 126.0);
    // Adding and taking away 1.5·2^23 rounds to a whole number without a call.
    let whole = (t + 12_582_912.0) - 12_582_912.0;
    let f = t - whole;
    let poly = 1.0
        + f * (std::f32::consts::LN_2
            + f * (0.240_226_5 + f * (0.055_504_11 + f * (0.009_618_13 + f * 0.001_339_9))));
    f32::from_bits(((whole as i32 + 127) as u32) << 23) * poly
}

/// The values of an f32 tensor on the CPU, in order.
pub fn values(x: &Tensor) -> CandleResult<Vec<f32>> {
    let mut all = Vec::new();
    with_values(x, |v| all.extend_from_slice(v))?;
    Ok(all)
}

/// Each pixel four times: (b, c, h, w) to (b, c, 2h, 2w).
pub fn double(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let value = x.detach().upsample_nearest2d(2 * h, 2 * w)?;
    if !x.track_op() {
        return Ok(value);
    }
    Ok(attach1(x, &value, move |_, _, g| {
        let g = g.detach().contiguous()?.reshape((b, c, h, 2, w, 2))?;
        Ok(Some(g.sum(5)?.sum(3)?))
    })?)
}

/// A square window that slides over a picture.
#[derive(Clone, Copy)]
struct Window {
    k: usize,
    padding: usize,
    stride: usize,
}

impl Window {
    /// How many places it has along a side of `n`.
    fn out(self, n: usize) -> usize {
        (n + 2 * self.padding).saturating_sub(self.k) / self.stride + 1
    }

    /// For offset `d` of the window: which places `o` read a pixel, as a range of `o`.
    fn places(self, d: usize, n: usize) -> std::ops::Range<usize> {
        let first = self.padding.saturating_sub(d).div_ceil(self.stride);
        let end = (n + self.padding).saturating_sub(d).div_ceil(self.stride);
        first..end.min(self.out(n)).max(first)
    }
}

/// Calls `copy(columns at, picture at, places)` for every run of places in one row.
fn rows(
    (channels, h, w): (usize, usize, usize),
    window: Window,
    mut copy: impl FnMut(usize, usize, usize),
) {
    let Window { k, padding, stride } = window;
    let (oh, ow) = (window.out(h), window.out(w));
    for channel in 0..channels {
        for dy in 0..k {
            for dx in 0..k {
                let column = ((channel * k + dy) * k + dx) * oh * ow;
                let across = window.places(dx, w);
                for oy in window.places(dy, h) {
                    let y = oy * stride + dy - padding;
                    let x = across.start * stride + dx - padding;
                    let from = (channel * h + y) * w + x;
                    copy(column + oy * ow + across.start, from, across.len());
                }
            }
        }
    }
}

/// (b, c, h, w) to (b, c·k·k, oh·ow).
fn unfold(x: &Tensor, window: Window) -> CandleResult<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let depth = c * window.k * window.k;
    let area = window.out(h) * window.out(w);
    let mut columns = vec![0f32; b * depth * area];
    with_values(x, |values| {
        for i in 0..b {
            let picture = &values[i * c * h * w..][..c * h * w];
            let part = &mut columns[i * depth * area..][..depth * area];
            rows((c, h, w), window, |to, from, n| match window.stride {
                1 => part[to..to + n].copy_from_slice(&picture[from..from + n]),
                step => {
                    let source = picture[from..].iter().step_by(step);
                    part[to..to + n]
                        .iter_mut()
                        .zip(source)
                        .for_each(|(a, b)| *a = *b);
                }
            });
        }
    })?;
    Tensor::from_vec(columns, (b, depth, area), &Device::Cpu)
}

/// The transpose of [`unfold`]: what lands on the same pixel is added up.
fn fold(
    columns: &Tensor,
    shape: (usize, usize, usize, usize),
    window: Window,
) -> CandleResult<Tensor> {
    let (b, c, h, w) = shape;
    let depth = c * window.k * window.k;
    let area = window.out(h) * window.out(w);
    let mut x = vec![0f32; b * c * h * w];
    with_values(columns, |values| {
        for i in 0..b {
            let part = &values[i * depth * area..][..depth * area];
            let picture = &mut x[i * c * h * w..][..c * h * w];
            rows((c, h, w), window, |from, to, n| {
                let source = &part[from..from + n];
                match window.stride {
                    1 => picture[to..to + n]
                        .iter_mut()
                        .zip(source)
                        .for_each(|(a, b)| *a += b),
                    step => {
                        let target = picture[to..].iter_mut().step_by(step);
                        target.zip(source).for_each(|(a, b)| *a += b);
                    }
                }
            });
        }
    })?;
    Tensor::from_vec(x, shape, &Device::Cpu)
}

/// Hands out the values of an f32 tensor on the CPU, in order.
fn with_values(x: &Tensor, f: impl FnOnce(&[f32])) -> CandleResult<()> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => {
            f(&values[start..end]);
            Ok(())
        }
        _ => candle_core::bail!("expected f32 on the CPU"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;
    use simpatico_schema::random::Philox;

    fn random(shape: (usize, usize, usize, usize), seed: u64) -> Var {
        let n = shape.0 * shape.1 * shape.2 * shape.3;
        let values = Philox::new(seed, 0).normals(n);
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        let d = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        d.max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn values_and_gradients_equal_candles() {
        for (k, padding, stride, side) in [(3, 1, 1, 6), (3, 0, 2, 7), (1, 0, 1, 5), (3, 0, 2, 9)] {
            let x = random((2, 3, side, side + 2), 1);
            let weight = random((4, 3, k, k), 2);
            let bias = Var::new(&[0.3f32, -0.1, 0.0, 2.0], &Device::Cpu).unwrap();
            let ours = conv2d(&x, &weight, &bias, padding, stride).unwrap();
            let theirs = x.conv2d(&weight, padding, stride, 1, 1).unwrap();
            let wide = bias.reshape((1, 4, 1, 1)).unwrap();
            let theirs = theirs.broadcast_add(&wide).unwrap();
            assert!(far(&ours, &theirs) < 1e-5);
            let weigh = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let (a, b) = (weigh(&ours), weigh(&theirs));
            for var in [&x, &weight, &bias] {
                assert!(far(a.get(var).unwrap(), b.get(var).unwrap()) < 1e-3);
            }
        }
    }

    #[test]
    fn for_inference_it_is_candles_too_in_strips_and_in_one() {
        for (c, side, k, padding, stride) in [
            (3, 6, 3, 1, 1),
            (40, 50, 3, 1, 1),
            (2, 9, 3, 0, 2),
            (5, 7, 1, 0, 1),
            (64, 40, 1, 0, 1),
            (3, 15, 5, 2, 4),
            (1, 1, 3, 1, 1),
            (30, 61, 3, 1, 2),
        ] {
            let x = random((2, c, side, side + 3), 1).as_tensor().detach();
            let weight = random((4, c, k, k), 2).as_tensor().detach();
            let bias = Tensor::new(&[0.3f32, -0.1, 0.0, 2.0], &Device::Cpu).unwrap();
            let theirs = x.conv2d(&weight, padding, stride, 1, 1).unwrap();
            let plain = convolve(&x, &weight, None, padding, stride).unwrap();
            assert!(far(&plain, &theirs) < 1e-4, "{c} {side} {k}");
            let ours = convolve(&x, &weight, Some(&bias), padding, stride).unwrap();
            let theirs = theirs.broadcast_add(&bias.reshape((1, 4, 1, 1)).unwrap());
            assert!(far(&ours, &theirs.unwrap()) < 1e-4, "{c} {side} {k}");
        }
        let x = random((1, 3, 4, 4), 1).as_tensor().detach();
        let weight = random((4, 2, 3, 3), 2).as_tensor().detach();
        assert!(convolve(&x, &weight, None, 1, 1).is_err(), "other channels");
    }

    #[test]
    fn fused_norm_and_activation_equal_their_parts() {
        let x = random((2, 6, 3, 5), 8);
        let weight = Var::new(&[1f32, 0.5, -1.0, 2.0, 0.1, 1.5], &Device::Cpu).unwrap();
        let bias = Var::new(&[0f32, 0.2, -0.3, 0.0, 1.0, 0.5], &Device::Cpu).unwrap();
        let ours = group_norm_silu(&x, &weight, &bias, 3, 1e-6).unwrap();
        let flat = x.reshape((2, 3, 30)).unwrap();
        let mean = flat.mean_keepdim(2).unwrap();
        let centered = flat.broadcast_sub(&mean).unwrap();
        let spread = centered.sqr().unwrap().mean_keepdim(2).unwrap();
        let normed = centered.broadcast_div(&(spread + 1e-6).unwrap().sqrt().unwrap());
        let normed = normed.unwrap().reshape((2, 6, 3, 5)).unwrap();
        let wide = |v: &Var| v.reshape((1, 6, 1, 1)).unwrap();
        let z = normed.broadcast_mul(&wide(&weight)).unwrap();
        let theirs = z.broadcast_add(&wide(&bias)).unwrap().silu().unwrap();
        assert!(far(&ours, &theirs) < 1e-5);
        let weigh = |y: &Tensor| y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let (a, b) = (weigh(&ours), weigh(&theirs));
        for var in [&x, &weight, &bias] {
            assert!(far(a.get(var).unwrap(), b.get(var).unwrap()) < 1e-4);
        }
    }

    #[test]
    fn doubling_adds_four_gradients() {
        let x = random((1, 2, 3, 4), 5);
        let y = double(&x).unwrap();
        assert_eq!(y.dims(), [1, 2, 6, 8]);
        let g = y.sum_all().unwrap().backward().unwrap();
        let four = (x.as_tensor().ones_like().unwrap() * 4.0).unwrap();
        assert!(far(g.get(&x).unwrap(), &four) < 1e-6);
    }
}
