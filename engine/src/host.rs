//! Plain f32 numbers on the CPU: what hand-written passes over tensors are made of.
//!
//! Not here: anything with a gradient, a device or another dtype.

use candle_core::{CpuStorage, DType, Result as CandleResult, Storage, Tensor};
use std::ops::{Deref, Range};

/// The numbers of a contiguous f32 tensor on the CPU that needs no gradient.
pub struct Host<'a> {
    storage: Box<dyn Deref<Target = Storage> + Sync + 'a>,
    range: Range<usize>,
}

impl<'a> Host<'a> {
    /// `None` for any other tensor.
    pub fn of(x: &'a Tensor) -> Option<Self> {
        if x.track_op() || x.dtype() != DType::F32 || !x.device().is_cpu() {
            return None;
        }
        let (storage, layout) = x.storage_and_layout();
        let (start, end) = layout.contiguous_offsets()?;
        Some(Self {
            storage: Box::new(storage),
            range: start..end,
        })
    }

    /// They.
    pub fn get(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(all)) => &all[self.range.clone()],
            _ => &[],
        }
    }
}

/// A matrix in memory: entry (i, j) is at i·rows + j·columns.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// All of them.
    pub data: &'a [f32],
    /// From a row to the next.
    pub rows: usize,
    /// From a column to the next.
    pub columns: usize,
}

impl<'a> Rows<'a> {
    /// Row after row, `width` apart.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            rows: width,
            columns: 1,
        }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
        }
    }

    /// Whether an m×n matrix lies inside.
    fn holds(&self, m: usize, n: usize) -> bool {
        m == 0 || n == 0 || (m - 1) * self.rows + (n - 1) * self.columns < self.data.len()
    }
}

/// y (m, n), rows `stride` apart, = a (m, k)·b (k, n), or that added to y.
pub fn multiply(
    (m, n, k): (usize, usize, usize),
    a: Rows,
    b: Rows,
    y: &mut [f32],
    stride: usize,
    add: bool,
) {
    let fits = stride >= n && (m == 0 || n == 0 || (m - 1) * stride + n <= y.len());
    assert!(
        a.holds(m, k) && b.holds(k, n) && fits,
        "a matrix is smaller than it should be"
    );
    // SAFETY: the assertion keeps every entry gemm reads (m×k of a, k×n of b) and writes
    // (m×n of y, rows not overlapping since stride ≥ n) inside its slice; y is borrowed
    // mutably, so it overlaps neither a nor b, and f32 has no invalid bit patterns. Slices
    // are at most isize::MAX bytes long, so the strides fit isize.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.columns as isize,
            a.rows as isize,
            b.data.as_ptr(),
            b.columns as isize,
            b.rows as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A linear layer's constant weight as a product of few rows likes it: columns in panels of 16, of
/// which row after row lies together.
///
/// A general product packs both of its sides at every call. Between two steps of a sampler the
/// weights stay, and so few rows are read as they are.
#[derive(Debug)]
pub struct Panels {
    inputs: usize,
    outputs: usize,
    /// (panels, inputs, 16); columns that there are not are 0.
    numbers: Vec<[f32; PANEL]>,
    /// (panels, 16).
    bias: Vec<[f32; PANEL]>,
}

/// Columns of a panel: two vectors of AVX2.
const PANEL: usize = 16;

impl Panels {
    /// Of a weight (outputs, inputs) and a bias; `None` where they are not f32 on a CPU that has
    /// AVX2 and FMA and nothing wider, or a gradient is wanted.
    pub fn of(weight: &Tensor, bias: &Tensor) -> CandleResult<Option<Self>> {
        if !panels::available() || weight.track_op() || bias.track_op() {
            return Ok(None);
        }
        let (outputs, inputs) = weight.dims2()?;
        let (weight, bias) = (weight.t()?.contiguous()?, bias.contiguous()?);
        let (Some(weight), Some(bias)) = (Host::of(&weight), Host::of(&bias)) else {
            return Ok(None);
        };
        let (weight, bias) = (weight.get(), bias.get());
        if bias.len() != outputs || outputs == 0 || inputs == 0 {
            return Ok(None);
        }
        let piece = |row: &[f32], panel: usize| {
            let mut piece = [0f32; PANEL];
            let row = &row[panel * PANEL..];
            piece.iter_mut().zip(row).for_each(|(a, b)| *a = *b);
            piece
        };
        let count = outputs.div_ceil(PANEL);
        let rows = |panel| {
            weight
                .chunks_exact(outputs)
                .map(move |row| piece(row, panel))
        };
        Ok(Some(Self {
            inputs,
            outputs,
            numbers: (0..count).flat_map(rows).collect(),
            bias: (0..count).map(|panel| piece(bias, panel)).collect(),
        }))
    }

    /// y (m, outputs) = x (m, inputs)·Wᵀ + b. A row's numbers do not depend on the other rows.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        let m = y.len() / self.outputs;
        assert!(
            x.len() == m * self.inputs && y.len() == m * self.outputs,
            "rows of another width"
        );
        let panels = self.numbers.chunks(self.inputs).zip(&self.bias);
        for (i, (panel, bias)) in panels.enumerate() {
            panels::times(x, panel, bias, y, (self.outputs, i * PANEL));
        }
    }

    /// How many numbers a row of x has.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// How many numbers a row of y has.
    pub fn outputs(&self) -> usize {
        self.outputs
    }
}

/// The product of rows and one panel.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod panels {
    use super::PANEL;
    use std::arch::x86_64::*;

    /// Where there are wider vectors the general product knows how to use them.
    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && !is_x86_feature_detected!("avx512f")
    }

    /// Rows of x times `panel`, plus `bias`, into columns [at, at + 16) of the rows of y, which are
    /// `width` wide.
    pub(super) fn times(
        x: &[f32],
        panel: &[[f32; PANEL]],
        bias: &[f32; PANEL],
        y: &mut [f32],
        (width, at): (usize, usize),
    ) {
        let k = panel.len();
        // Six rows' sums, two vectors each, and what is multiplied fill the sixteen registers.
        let (xs, ys) = (x.chunks(6 * k), y.chunks_mut(6 * width));
        for (x, y) in xs.zip(ys) {
            // SAFETY: `Panels::of` has asked `available`.
            unsafe {
                match x.len() / k {
                    6 => rows::<6>(x, panel, bias, y, width, at),
                    5 => rows::<5>(x, panel, bias, y, width, at),
                    4 => rows::<4>(x, panel, bias, y, width, at),
                    3 => rows::<3>(x, panel, bias, y, width, at),
                    2 => rows::<2>(x, panel, bias, y, width, at),
                    _ => rows::<1>(x, panel, bias, y, width, at),
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn rows<const N: usize>(
        x: &[f32],
        panel: &[[f32; PANEL]],
        bias: &[f32; PANEL],
        y: &mut [f32],
        width: usize,
        at: usize,
    ) {
        let k = panel.len();
        assert!(x.len() >= N * k && y.len() >= N * width && at < width);
        let two = |numbers: &[f32; PANEL]| {
            // SAFETY: sixteen numbers are two vectors.
            unsafe {
                let from = numbers.as_ptr();
                [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
            }
        };
        let mut sums = [two(bias); N];
        for (i, line) in panel.iter().enumerate() {
            let [low, high] = two(line);
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: i is below k, and x has N rows of k numbers.
                let factor = unsafe { _mm256_broadcast_ss(x.get_unchecked(j * k + i)) };
                sum[0] = _mm256_fmadd_ps(factor, low, sum[0]);
                sum[1] = _mm256_fmadd_ps(factor, high, sum[1]);
            }
        }
        let store = |to: &mut [f32; PANEL], [low, high]: [__m256; 2]| {
            // SAFETY: sixteen numbers are two vectors.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), low);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), high);
            }
        };
        for (sum, y) in sums.into_iter().zip(y.chunks_exact_mut(width)) {
            let y = &mut y[at..];
            if let Some(to) = y.first_chunk_mut() {
                store(to, sum);
                continue;
            }
            let mut whole = [0f32; PANEL];
            store(&mut whole, sum);
            let n = y.len();
            y.copy_from_slice(&whole[..n]);
        }
    }
}

/// Other processors have the general product.
#[cfg(not(target_arch = "x86_64"))]
mod panels {
    use super::PANEL;

    pub(super) fn available() -> bool {
        false
    }

    pub(super) fn times(
        _: &[f32],
        _: &[[f32; PANEL]],
        _: &[f32; PANEL],
        _: &mut [f32],
        _: (usize, usize),
    ) {
        unreachable!("no panels are made here")
    }
}

/// Defines a function whose loops are compiled twice: for any processor, and for 256-bit
/// vectors where the running one has them.
macro_rules! kernel {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        fn $name($($arg: $ty),*) {
            #[inline(always)]
            fn plain($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn wide($($arg: $ty),*) {
                    plain($($arg),*)
                }
                if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has just been asked for both features.
                    #[allow(unsafe_code)]
                    return unsafe { wide($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    };
}

pub(crate) use kernel;

/// Numbers that the loops below work on at a time.
pub const LANES: usize = 16;

/// Σ f(x) in a fixed order that suits vectors.
#[inline(always)]
pub fn sum(xs: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = xs.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|x| f(*x)).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// The largest, in lanes.
#[inline(always)]
pub fn largest(xs: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = xs.chunks_exact(LANES);
    let tail = chunks
        .remainder()
        .iter()
        .fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().fold(tail, |m, x| m.max(*x))
}

/// e^x to about 2 units in the last place, for x ≤ 88; below -87 it is e^-87. (Cephes'
/// polynomial; NaN stays NaN.)
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to a whole number
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    y * f32::from_bits((power.wrapping_add(127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use simpatico_schema::random::Philox;

    #[test]
    fn panels_multiply_as_the_general_product_does_whatever_is_beside_a_row() {
        // Whole panels and not; more rows than are taken together, and fewer.
        for (inputs, outputs, rows) in [(24, 32, 13), (7, 21, 6), (1, 5, 1), (40, 16, 5)] {
            let random = |seed, n| Philox::new(seed, 0).normals(n);
            let (w, b) = (random(1, inputs * outputs), random(2, outputs));
            let x = random(3, rows * inputs);
            let weight = Tensor::from_slice(&w, (outputs, inputs), &Device::Cpu).unwrap();
            let bias = Tensor::from_slice(&b, outputs, &Device::Cpu).unwrap();
            let Some(panels) = Panels::of(&weight, &bias).unwrap() else {
                assert!(!panels::available(), "none where the processor could");
                return;
            };
            assert_eq!((panels.inputs(), panels.outputs()), (inputs, outputs));
            let mut y = vec![f32::NAN; rows * outputs];
            panels.apply(&x, &mut y);
            for (i, y) in y.iter().enumerate() {
                let (row, column) = (i / outputs, i % outputs);
                let products = x[row * inputs..].iter().zip(&w[column * inputs..]);
                let truth: f64 = products
                    .take(inputs)
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                let truth = truth + f64::from(b[column]);
                let gap = (truth - f64::from(*y)).abs();
                assert!(gap < 1e-4, "{inputs} {outputs} {rows}: {truth} {y}");
            }
            let mut alone = vec![0f32; outputs];
            let last = rows - 1;
            panels.apply(&x[last * inputs..], &mut alone);
            assert_eq!(alone, y[last * outputs..]);
        }
    }

    #[test]
    fn a_layer_with_panels_is_the_layer_without() {
        let random = |seed, shape: (usize, usize)| {
            let values = Philox::new(seed, 0).normals(shape.0 * shape.1);
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (weight, bias) = (random(1, (24, 10)), random(2, (1, 24)).squeeze(0).unwrap());
        let plain = crate::nn::Linear::new(weight, Some(bias));
        let quick = plain.clone().with_panels().unwrap();
        let x = random(3, (60, 20)).reshape((2, 60, 10)).unwrap();
        for x in [x.clone(), x.transpose(0, 1).unwrap()] {
            let (a, b) = (plain.forward(&x).unwrap(), quick.forward(&x).unwrap());
            assert_eq!(a.dims(), b.dims());
            let gap = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-5);
        }
        assert!(quick.forward(&random(4, (3, 9))).is_err(), "another width");
    }
}
