//! Plain f32 numbers on the CPU: what hand-written passes over tensors are made of.
//!
//! Not here: anything with a gradient, a device or another dtype.

use candle_core::{CpuStorage, DType, Storage, Tensor};
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
