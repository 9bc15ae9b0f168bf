//! Constant matrices in bf16 for this processor's dot products, summed in f32.
//!
//! AVX-512 BF16 (`vdpbf16ps`) multiplies twice as many numbers at a time as f32 arithmetic does. Here a
//! constant factor is rounded to bf16 once, the other factor (activations, or gradients on the
//! way back) as it comes; sums are kept in f32, in one order whatever the number of rows.
//!
//! Layout: panels of 32 columns; in a panel, for each two rows, 32 pairs of numbers, one of
//! each row: two registers.
//!
//! Not here: anything for processors without these instructions; [`Bf16Matrix::new`] says no.

/// Columns of a panel.
const COLUMNS: usize = 32;

/// 64 bytes where a register expects them: 16 pairs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// A matrix (rows, columns) that activations (m, rows) are multiplied by.
pub struct Bf16Matrix {
    rows: usize,
    columns: usize,
    lines: Vec<Line>,
}

impl std::fmt::Debug for Bf16Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bf16Matrix[{} x {}]", self.rows, self.columns)
    }
}

/// To the nearest bf16, ties to even, in the lower half of a word. NaN may become infinite.
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
}

/// Rows of activations or gradients, rounded, two numbers a word; a row of odd width ends with a
/// zero.
pub struct Pairs {
    words: Vec<u32>,
    rows: usize,
    width: usize,
}

impl Pairs {
    /// Rounds x, rows of `width` numbers.
    pub fn new(x: &[f32], width: usize) -> Self {
        let mut words = Vec::with_capacity(x.len().div_ceil(2));
        for row in x.chunks_exact(width) {
            let (whole, rest) = row.as_chunks::<2>();
            words.extend(whole.iter().map(|[a, b]| rounded(*a) | rounded(*b) << 16));
            words.extend(rest.iter().map(|a| rounded(*a)));
        }
        Self {
            words,
            rows: x.len() / width,
            width,
        }
    }
}

/// Whether this processor has the instructions.
pub fn available() -> bool {
    kernels::available()
}

impl Bf16Matrix {
    /// From entry(row, column); `None` on processors without the instructions.
    pub fn new(rows: usize, columns: usize, entry: impl Fn(usize, usize) -> f32) -> Option<Self> {
        if !available() {
            return None;
        }
        let half = rows.div_ceil(2);
        let mut lines = vec![Line([0; 16]); columns.div_ceil(COLUMNS) * half * 2];
        for (panel, lines) in lines.chunks_exact_mut(half * 2).enumerate() {
            for (pair, lines) in lines.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                for j in 0..COLUMNS.min(columns - panel * COLUMNS) {
                    let column = panel * COLUMNS + j;
                    let first = rounded(entry(2 * pair, column));
                    let second = match 2 * pair + 1 < rows {
                        true => rounded(entry(2 * pair + 1, column)),
                        false => 0,
                    };
                    lines[j / 16].0[j % 16] = first | second << 16;
                }
            }
        }
        Some(Self {
            rows,
            columns,
            lines,
        })
    }

    /// x (m, rows) times this, added to y (m, columns).
    pub fn add_times(&self, x: &Pairs, y: &mut [f32]) {
        assert!(
            x.width == self.rows && y.len() == x.rows * self.columns,
            "{} rows of {} numbers, to be {} numbers, for a matrix of {} x {}",
            x.rows,
            x.width,
            y.len(),
            self.rows,
            self.columns
        );
        let half = self.rows.div_ceil(2);
        kernels::add_times(&x.words, half, &self.lines, y, self.columns);
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod kernels {
    use super::{COLUMNS, Line};
    use std::arch::x86_64::*;

    /// Rows of a tile: 12 · 2 sums, two columns' registers and one row's fill the 32 there are.
    const ROWS: usize = 12;

    pub fn available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }

    /// y (m, columns) += x (m, half) pairs times the panels.
    pub fn add_times(x: &[u32], half: usize, panels: &[Line], y: &mut [f32], columns: usize) {
        assert!(available(), "a bf16 matrix on a processor without bf16");
        for (p, panel) in panels.chunks_exact(2 * half).enumerate() {
            let first = p * COLUMNS;
            let wide = COLUMNS.min(columns - first);
            let rows = x.chunks(ROWS * half).zip(y.chunks_mut(ROWS * columns));
            for (x, y) in rows {
                let y = &mut y[first..];
                // SAFETY: `available` has just said that the processor has the features.
                unsafe {
                    match x.len() / half {
                        1 => tile::<1>(x, half, panel, y, columns, wide),
                        2 => tile::<2>(x, half, panel, y, columns, wide),
                        3 => tile::<3>(x, half, panel, y, columns, wide),
                        4 => tile::<4>(x, half, panel, y, columns, wide),
                        5 => tile::<5>(x, half, panel, y, columns, wide),
                        6 => tile::<6>(x, half, panel, y, columns, wide),
                        7 => tile::<7>(x, half, panel, y, columns, wide),
                        8 => tile::<8>(x, half, panel, y, columns, wide),
                        9 => tile::<9>(x, half, panel, y, columns, wide),
                        10 => tile::<10>(x, half, panel, y, columns, wide),
                        11 => tile::<11>(x, half, panel, y, columns, wide),
                        _ => tile::<ROWS>(x, half, panel, y, columns, wide),
                    }
                }
            }
        }
    }

    /// N rows by one panel, of which `wide` columns are real.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tile<const N: usize>(
        x: &[u32],
        half: usize,
        panel: &[Line],
        y: &mut [f32],
        stride: usize,
        wide: usize,
    ) {
        assert!(x.len() >= N * half && panel.len() == 2 * half);
        assert!(wide <= COLUMNS && y.len() >= (N - 1) * stride + wide);
        let mut sums = [[_mm512_setzero_ps(); 2]; N];
        for k in 0..half {
            // SAFETY: 2k + 1 < panel.len(), and a Line is aligned for a register.
            let b: [__m512bh; 2] = unsafe {
                [
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(
                        panel.as_ptr().add(2 * k).cast(),
                    )),
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(
                        panel.as_ptr().add(2 * k + 1).cast(),
                    )),
                ]
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: r·half + k < N·half ≤ x.len(); any 512 bits are 32 bf16.
                let a: __m512bh = unsafe {
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(
                        *x.get_unchecked(r * half + k) as i32,
                    ))
                };
                sum[0] = _mm512_dpbf16_ps(sum[0], a, b[0]);
                sum[1] = _mm512_dpbf16_ps(sum[1], a, b[1]);
            }
        }
        let real = ((1u64 << wide) - 1) as u32;
        let masks: [__mmask16; 2] = [real as u16, (real >> 16) as u16];
        for (r, sum) in sums.iter().enumerate() {
            for c in 0..2 {
                if masks[c] == 0 {
                    continue;
                }
                // SAFETY: the mask lets through columns below `wide` only, and
                // r·stride + wide ≤ y.len().
                unsafe {
                    let to = y.as_mut_ptr().add(r * stride + 16 * c);
                    let old = _mm512_maskz_loadu_ps(masks[c], to);
                    _mm512_mask_storeu_ps(to, masks[c], _mm512_add_ps(old, sum[c]));
                }
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod kernels {
    use super::Line;

    pub fn available() -> bool {
        false
    }

    pub fn add_times(_: &[u32], _: usize, _: &[Line], _: &mut [f32], _: usize) {
        unreachable!("no bf16 matrix exists where the instructions do not");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    #[test]
    fn products_are_those_of_the_rounded_factors_whatever_the_shape() {
        let round = |x: f32| f64::from(f32::from_bits(rounded(x) << 16));
        for (m, k, n) in [
            (1, 2, 1),
            (5, 7, 31),
            (12, 64, 32),
            (13, 33, 70),
            (40, 96, 33),
        ] {
            let x = Philox::new(1, m as u64).normals(m * k);
            let w = Philox::new(2, n as u64).normals(k * n);
            let Some(matrix) = Bf16Matrix::new(k, n, |i, j| w[i * n + j]) else {
                return; // not on this processor
            };
            let mut y = vec![1f32; m * n];
            matrix.add_times(&Pairs::new(&x, k), &mut y);
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k)
                        .map(|c| round(x[i * k + c]) * round(w[c * n + j]))
                        .sum();
                    let gap = (f64::from(y[i * n + j]) - 1.0 - sum).abs();
                    assert!(gap < 1e-4, "{m} x {k} x {n} at {i}, {j}: {gap}");
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_and_to_even() {
        for x in [1.0f32, -3.5, 1e-30, 0.1, -1.003_906_3, 65_535.0] {
            let want = half::bf16::from_f32(x).to_bits();
            assert_eq!(rounded(x), u32::from(want), "{x}");
        }
    }
}
