//! Quantised matrices laid out for this processor's dot products.
//!
//! candle multiplies by Q4_1 one number at a time. Here the blocks of 16 rows are
//! interleaved when the model is loaded, so that one instruction (AVX-512 VNNI `vpdpbusd`)
//! multiplies 4 numbers of each of 16 rows, no sum runs across lanes, and a row's scales
//! meet the row's sum in the same lane. The weights themselves are not changed: Q4_1 stays
//! d·q + m, Q8_0 stays d·q, with the file's own 16-bit scales.
//!
//! Activations are rounded to 16 bits in blocks of 32, and each of their two bytes is
//! multiplied apart; the dot products of these integers are exact. llama.cpp rounds to 8 bits,
//! which moves a logit of a small model by 0.1 or 0.2 and so decides close choices by chance.
//! While one token is decoded the weights' way from memory takes longer than the second
//! multiplication, so the precision costs nothing there.
//!
//! Processors without VNNI multiply the 16 bits at once, in pairs (AVX2 `vpmaddwd`, or plain
//! code): the same integers and the same sums in the same order, so the same bits.
//!
//! Layout, for each tile of 16 rows and each block of 32 columns:
//! 1. lines of 64 bytes, 4 bytes of each row: Q4_1 has four (column k in the low nibble of
//!    byte k of its row, column 16 + k in the high one), Q8_0 has eight, stored with 128
//!    added because `vpdpbusd` takes one unsigned factor;
//! 2. the 16 scales d as f16, then, for Q4_1, the 16 offsets m.

use candle_core::quantized::GgmlDType;
use half::f16;
use rayon::prelude::*;

const ROWS: usize = 16;
const BLOCK: usize = 32;

/// 64 bytes where a register expects them.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Which of the two formats a matrix has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Q4_1,
    Q8_0,
}

impl Kind {
    fn lines(self) -> usize {
        match self {
            Self::Q4_1 => 4,
            Self::Q8_0 => 8,
        }
    }

    fn scales(self) -> usize {
        match self {
            Self::Q4_1 => 2 * ROWS,
            Self::Q8_0 => ROWS,
        }
    }
}

/// A matrix [rows, cols] in blocks of 4 or 8 bits.
pub struct Packed {
    kind: Kind,
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
    scales: Vec<f16>,
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Packed[{:?}; {} x {}]", self.kind, self.rows, self.cols)
    }
}

/// What multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
enum Kernel {
    /// AVX-512 with VNNI.
    Vnni,
    /// AVX2.
    Avx2,
    /// Any processor.
    Portable,
}

impl Kernel {
    /// The fastest that this processor has.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if vnni::available() {
                return Self::Vnni;
            }
            if avx2::available() {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Rows of activations that it takes at once, at most: as many as leave their sums in
    /// registers.
    fn rows(self) -> usize {
        match self {
            Self::Vnni => 8,
            Self::Avx2 => 4,
            Self::Portable => 1,
        }
    }
}

/// Rows of activations, rounded to 16 bits in blocks of 32.
pub struct Activations {
    /// Whom they are laid out for.
    kernel: Kernel,
    rows: usize,
    cols: usize,
    /// Two words for each four numbers. For VNNI their upper bytes, then their lower bytes;
    /// for the others numbers 0 and 2, then numbers 1 and 3, which is how the weights' bytes
    /// come apart in 16-bit lanes.
    words: Vec<[i32; 2]>,
    /// The scale of each block.
    scale: Vec<f32>,
    /// scale · sum of each block, for Q4_1's offsets.
    weighted_sum: Vec<f32>,
    /// -128 · sum of the upper and of the lower bytes of each block, for Q8_0's added 128.
    correction: Vec<[i32; 2]>,
}

impl Activations {
    /// Rounds x, rows of `cols` numbers; `cols` must be a multiple of 32.
    pub fn new(x: &[f32], cols: usize) -> Self {
        Self::laid_out_for(Kernel::best(), x, cols)
    }

    fn laid_out_for(kernel: Kernel, x: &[f32], cols: usize) -> Self {
        let blocks = x.len() / BLOCK;
        let mut acts = Self {
            kernel,
            rows: x.len() / cols.max(1),
            cols,
            words: Vec::with_capacity(blocks * 8),
            scale: Vec::with_capacity(blocks),
            weighted_sum: Vec::with_capacity(blocks),
            correction: Vec::with_capacity(blocks),
        };
        for block in x.as_chunks::<BLOCK>().0 {
            acts.push(block);
        }
        acts
    }

    fn push(&mut self, block: &[f32; BLOCK]) {
        let mut lanes = [0f32; 8];
        for part in block.as_chunks::<8>().0 {
            for (l, x) in lanes.iter_mut().zip(part) {
                *l = l.max(x.abs());
            }
        }
        let largest = lanes.iter().fold(0f32, |a, b| a.max(*b));
        let inverse = if largest > 0.0 { STEPS / largest } else { 0.0 };
        let mut whole = [0i16; BLOCK];
        let (mut sum_upper, mut sum_lower) = (0i32, 0i32);
        for (whole, x) in whole.iter_mut().zip(block) {
            // Adding 1.5 · 2^23 rounds to the nearest integer, ties to even, and leaves it
            // in the low bits.
            let q = (x * inverse + 12_582_912.0).to_bits() as i32;
            let q = q.wrapping_sub(0x4b40_0000);
            *whole = q as i16;
            let (upper, lower) = bytes(*whole);
            sum_upper += i32::from(upper);
            sum_lower += i32::from(lower);
        }
        let quads = whole.as_chunks::<4>().0.iter();
        match self.kernel {
            Kernel::Vnni => self.words.extend(quads.map(|quad| {
                let (upper, lower) = (quad.map(|q| bytes(q).0), quad.map(|q| bytes(q).1));
                [upper, lower].map(|four| i32::from_le_bytes(four.map(|b| b as u8)))
            })),
            Kernel::Avx2 | Kernel::Portable => self
                .words
                .extend(quads.map(|q| [pair(q[0], q[2]), pair(q[1], q[3])])),
        }
        let scale = largest / STEPS;
        self.scale.push(scale);
        self.weighted_sum
            .push(scale * (256 * sum_upper + sum_lower) as f32);
        self.correction.push([-128 * sum_upper, -128 * sum_lower]);
    }
}

/// q as 256 · upper + lower, both within a signed byte.
fn bytes(q: i16) -> (i8, i8) {
    (((i32::from(q) + 128) >> 8) as i8, q as i8)
}

/// Two numbers in the halves of a word, the first in the lower.
fn pair(low: i16, high: i16) -> i32 {
    i32::from(high) << 16 | i32::from(low as u16)
}

/// What a block's largest activation becomes: 127 · 256, so that upper bytes stay within 127.
const STEPS: f32 = 32512.0;

impl Packed {
    /// Interleaves the blocks of a GGUF tensor. `None` where the format, or a number of rows
    /// that is no multiple of 16, is not ours.
    pub fn new(dtype: GgmlDType, rows: usize, cols: usize, blocks: &[u8]) -> Option<Self> {
        let kind = match dtype {
            GgmlDType::Q4_1 => Kind::Q4_1,
            GgmlDType::Q8_0 => Kind::Q8_0,
            _ => return None,
        };
        let per_row = cols / BLOCK;
        let size = dtype.type_size();
        if !rows.is_multiple_of(ROWS)
            || !cols.is_multiple_of(BLOCK)
            || blocks.len() != rows * per_row * size
        {
            return None;
        }
        let mut lines = vec![Line([0; 64]); rows / ROWS * per_row * kind.lines()];
        let mut scales = vec![f16::ZERO; rows / ROWS * per_row * kind.scales()];
        for (i, block) in blocks.chunks_exact(size).enumerate() {
            let (row, b) = (i / per_row, i % per_row);
            let (tile, lane) = (row / ROWS, row % ROWS);
            let at = tile * per_row + b;
            let scales = &mut scales[at * kind.scales()..][..kind.scales()];
            scales[lane] = f16::from_le_bytes([block[0], block[1]]);
            let (quants, flip) = match kind {
                Kind::Q4_1 => {
                    scales[ROWS + lane] = f16::from_le_bytes([block[2], block[3]]);
                    (&block[4..], 0)
                }
                Kind::Q8_0 => (&block[2..], 0x80),
            };
            let lines = &mut lines[at * kind.lines()..][..kind.lines()];
            for (line, four) in lines.iter_mut().zip(quants.chunks_exact(4)) {
                for (to, from) in line.0[lane * 4..].iter_mut().zip(four) {
                    *to = from ^ flip;
                }
            }
        }
        Some(Self {
            kind,
            rows,
            cols,
            lines,
            scales,
        })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many columns there are.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `row` in f32.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let per_row = self.cols / BLOCK;
        let (tile, lane) = (row / ROWS, row % ROWS);
        for (b, out) in out.chunks_exact_mut(BLOCK).enumerate().take(per_row) {
            let at = tile * per_row + b;
            let scales = &self.scales[at * self.kind.scales()..];
            let d = scales[lane].to_f32();
            let lines = &self.lines[at * self.kind.lines()..];
            for (k, x) in out.iter_mut().enumerate() {
                *x = match self.kind {
                    Kind::Q8_0 => {
                        let q = lines[k / 4].0[lane * 4 + k % 4] ^ 0x80;
                        d * f32::from(q as i8)
                    }
                    Kind::Q4_1 => {
                        let byte = lines[k % 16 / 4].0[lane * 4 + k % 4];
                        let q = if k < 16 { byte & 15 } else { byte >> 4 };
                        d * f32::from(q) + scales[ROWS + lane].to_f32()
                    }
                };
            }
        }
    }

    /// The whole matrix in f32, row after row.
    pub fn dequantised(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.rows * self.cols];
        for (i, row) in all.chunks_exact_mut(self.cols).enumerate() {
            self.row(i, row);
        }
        all
    }

    /// x·Wᵀ: for each row of x its products with all rows of the matrix, [x.rows, rows].
    pub fn times(&self, x: &Activations) -> Vec<f32> {
        Self::times_all(&[self], x).pop().unwrap_or_default()
    }

    /// The same for several matrices that take the same input, in one parallel pass.
    pub fn times_all(matrices: &[&Self], x: &Activations) -> Vec<Vec<f32>> {
        // Tile after tile, within it row of x after row of x: a tile is one thread's.
        let mut outs: Vec<Vec<f32>> = matrices
            .iter()
            .map(|m| {
                assert_eq!(x.cols, m.cols, "activations of another width");
                vec![0f32; x.rows * m.rows]
            })
            .collect();
        let tiles: usize = matrices.iter().map(|m| m.rows / ROWS).sum();
        let share = (tiles / (2 * rayon::current_num_threads())).clamp(4, 64);
        let tile_len = (x.rows * ROWS).max(1);
        let mut tasks: Vec<(&Self, usize, &mut [f32])> = Vec::new();
        for (m, out) in matrices.iter().zip(&mut outs) {
            let parts = out.chunks_mut(share * tile_len).enumerate();
            tasks.extend(parts.map(|(i, part)| (*m, i * share, part)));
        }
        let work = |(m, first, out): &mut (&Self, usize, &mut [f32])| {
            for (i, out) in out.chunks_exact_mut(tile_len).enumerate() {
                m.tile(*first + i, x, out);
            }
        };
        match tiles * x.rows * x.cols < 1 << 13 {
            true => tasks.iter_mut().for_each(work),
            false => tasks.par_iter_mut().with_max_len(1).for_each(work),
        }
        let by_rows = matrices.iter().zip(outs);
        by_rows.map(|(m, out)| m.by_rows(out, x.rows)).collect()
    }

    fn by_rows(&self, tiles: Vec<f32>, rows: usize) -> Vec<f32> {
        if rows <= 1 {
            return tiles;
        }
        let mut out = vec![0f32; tiles.len()];
        out.par_chunks_mut(self.rows)
            .enumerate()
            .for_each(|(r, out)| {
                for (tile, to) in out.chunks_exact_mut(ROWS).enumerate() {
                    to.copy_from_slice(&tiles[(tile * rows + r) * ROWS..][..ROWS]);
                }
            });
        out
    }

    /// One tile times every row of x.
    fn tile(&self, tile: usize, x: &Activations, out: &mut [f32]) {
        let blocks = self.cols / BLOCK;
        let lines = &self.lines[tile * blocks * self.kind.lines()..][..blocks * self.kind.lines()];
        let scales =
            &self.scales[tile * blocks * self.kind.scales()..][..blocks * self.kind.scales()];
        let mut row = 0;
        for (n, out) in pieces(x.rows, x.kernel.rows(), out) {
            match x.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Vnni => vnni::tile(self.kind, lines, scales, x, row, n, out),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => avx2::tile(self.kind, lines, scales, x, row, n, out),
                _ => portable_tile(self.kind, lines, scales, x, row, out),
            }
            row += n;
        }
    }
}

/// Cuts the output of a tile into pieces of 8, 4, 2 and 1 rows of x, the first `most` rows.
fn pieces(
    rows: usize,
    most: usize,
    mut out: &mut [f32],
) -> impl Iterator<Item = (usize, &mut [f32])> {
    let mut left = rows;
    std::iter::from_fn(move || {
        let n = [8, 4, 2, 1].into_iter().find(|n| *n <= left.min(most))?;
        left -= n;
        let (piece, rest) = std::mem::take(&mut out).split_at_mut(n * ROWS);
        out = rest;
        Some((n, piece))
    })
}

/// The same sums as the vector kernels, in the same order, for any processor.
fn portable_tile(
    kind: Kind,
    lines: &[Line],
    scales: &[f16],
    x: &Activations,
    row: usize,
    out: &mut [f32],
) {
    let blocks = x.cols / BLOCK;
    let mut sum = [0f32; ROWS];
    for b in 0..blocks {
        let at = row * blocks + b;
        let words = &x.words[at * 8..][..8];
        let lines = &lines[b * kind.lines()..][..kind.lines()];
        let scales = &scales[b * kind.scales()..][..kind.scales()];
        let mut dot = match kind {
            Kind::Q4_1 => [0; ROWS],
            Kind::Q8_0 => [whole_correction(x.correction[at]); ROWS],
        };
        for (g, line) in lines.iter().enumerate() {
            match kind {
                Kind::Q4_1 => {
                    add_products(&mut dot, &line.0, words[g], |w| w & 15);
                    add_products(&mut dot, &line.0, words[4 + g], |w| w >> 4);
                }
                Kind::Q8_0 => add_products(&mut dot, &line.0, words[g], |w| w),
            }
        }
        for lane in 0..ROWS {
            let d = scales[lane].to_f32() * x.scale[at];
            sum[lane] = (dot[lane] as f32).mul_add(d, sum[lane]);
            if kind == Kind::Q4_1 {
                let m = scales[ROWS + lane].to_f32();
                sum[lane] = m.mul_add(x.weighted_sum[at], sum[lane]);
            }
        }
    }
    out.copy_from_slice(&sum);
}

/// How many blocks a row has, and the number of row `row`'s first. The vector kernels read and
/// write through pointers: all that rows [row, row + n) of x times one tile need is asserted to
/// exist.
#[cfg(target_arch = "x86_64")]
fn blocks_within(
    kind: Kind,
    lines: &[Line],
    scales: &[f16],
    x: &Activations,
    (row, n): (usize, usize),
    out: &[f32],
) -> (usize, usize) {
    let blocks = x.cols / BLOCK;
    assert!(lines.len() >= blocks * kind.lines() && scales.len() >= blocks * kind.scales());
    assert!(x.scale.len() >= (row + n) * blocks && x.words.len() >= (row + n) * blocks * 8);
    assert!(x.weighted_sum.len() >= (row + n) * blocks);
    assert!(x.correction.len() >= (row + n) * blocks && out.len() >= n * ROWS);
    (blocks, row * blocks)
}

/// A block's correction for 16-bit products.
fn whole_correction([upper, lower]: [i32; 2]) -> i32 {
    256 * upper + lower
}

fn add_products(
    dot: &mut [i32; ROWS],
    line: &[u8; 64],
    [even, odd]: [i32; 2],
    weight: impl Fn(u8) -> u8,
) {
    let a = [
        even as i16,
        odd as i16,
        (even >> 16) as i16,
        (odd >> 16) as i16,
    ];
    for (dot, four) in dot.iter_mut().zip(line.chunks_exact(4)) {
        for (w, a) in four.iter().zip(a) {
            *dot += i32::from(weight(*w)) * i32::from(a);
        }
    }
}

// SAFETY of the whole module: its functions run only where the processor was asked for these
// instructions first; each pointer's bounds are argued where it is used.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod vnni {
    use super::{Activations, Kind, Line, ROWS, blocks_within, f16};
    use std::arch::x86_64::*;

    /// Whether this processor has the instructions.
    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("f16c")
    }

    /// Rows [row, row + n) of x times one tile; n is 1, 2, 4 or 8. [`available`] must have
    /// said yes.
    pub(super) fn tile(
        kind: Kind,
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        row: usize,
        n: usize,
        out: &mut [f32],
    ) {
        let (blocks, first) = blocks_within(kind, lines, scales, x, (row, n), out);
        // SAFETY: the caller has asked `available`, so the instructions exist; the bounds of
        // every pointer used within were asserted by `blocks_within`.
        unsafe {
            match (kind, n) {
                (Kind::Q4_1, 1) => q4_1::<1>(lines, scales, x, first, blocks, out),
                (Kind::Q4_1, 2) => q4_1::<2>(lines, scales, x, first, blocks, out),
                (Kind::Q4_1, 4) => q4_1::<4>(lines, scales, x, first, blocks, out),
                (Kind::Q4_1, _) => q4_1::<8>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, 1) => q8_0::<1>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, 2) => q8_0::<2>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, 4) => q8_0::<4>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, _) => q8_0::<8>(lines, scales, x, first, blocks, out),
            }
        }
    }

    // SAFETY (of both kernels): the caller guarantees the target features, `blocks` blocks of
    // lines and scales, (first + N · blocks) blocks of activations, and N · 16 outputs; all
    // reads and writes below stay within these.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
    unsafe fn q4_1<const N: usize>(
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        first: usize,
        blocks: usize,
        out: &mut [f32],
    ) {
        let nibble = _mm512_set1_epi8(15);
        let mut sum = [_mm512_setzero_ps(); N];
        let (words, scale) = (x.words.as_ptr(), x.scale.as_ptr());
        let weighted = x.weighted_sum.as_ptr();
        for b in 0..blocks {
            let mut upper = [_mm512_setzero_si512(); N];
            let mut lower = [_mm512_setzero_si512(); N];
            for g in 0..4 {
                // SAFETY: line b·4 + g exists; `Line` is 64 bytes aligned to 64.
                let w = unsafe { _mm512_load_si512(lines.as_ptr().add(b * 4 + g).cast()) };
                let lo = _mm512_and_si512(w, nibble);
                let hi = _mm512_and_si512(_mm512_srli_epi16::<4>(w), nibble);
                for j in 0..N {
                    let at = (first + j * blocks + b) * 8 + g;
                    // SAFETY: row j has 8 words for each block; at + 4 is the last used.
                    let (a, c) = unsafe { (*words.add(at), *words.add(at + 4)) };
                    upper[j] = _mm512_dpbusd_epi32(upper[j], lo, _mm512_set1_epi32(a[0]));
                    lower[j] = _mm512_dpbusd_epi32(lower[j], lo, _mm512_set1_epi32(a[1]));
                    upper[j] = _mm512_dpbusd_epi32(upper[j], hi, _mm512_set1_epi32(c[0]));
                    lower[j] = _mm512_dpbusd_epi32(lower[j], hi, _mm512_set1_epi32(c[1]));
                }
            }
            // SAFETY: block b has 32 scales: d of 16 rows, then m.
            let (d, m) = unsafe {
                let at = scales.as_ptr().add(b * 32).cast::<__m256i>();
                (
                    _mm512_cvtph_ps(_mm256_loadu_si256(at)),
                    _mm512_cvtph_ps(_mm256_loadu_si256(at.add(1))),
                )
            };
            for j in 0..N {
                let at = first + j * blocks + b;
                // SAFETY: one scale and one weighted sum for each block of row j.
                let (s, ws) = unsafe { (*scale.add(at), *weighted.add(at)) };
                let dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper[j]), lower[j]);
                let dot = _mm512_cvtepi32_ps(dot);
                sum[j] = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, _mm512_set1_ps(s)), sum[j]);
                sum[j] = _mm512_fmadd_ps(m, _mm512_set1_ps(ws), sum[j]);
            }
        }
        for (j, sum) in sum.iter().enumerate() {
            // SAFETY: out holds N · 16 numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(j * ROWS), *sum) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni,f16c")]
    unsafe fn q8_0<const N: usize>(
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        first: usize,
        blocks: usize,
        out: &mut [f32],
    ) {
        let mut sum = [_mm512_setzero_ps(); N];
        let (words, scale) = (x.words.as_ptr(), x.scale.as_ptr());
        let correction = x.correction.as_ptr();
        for b in 0..blocks {
            let mut upper = [_mm512_setzero_si512(); N];
            let mut lower = [_mm512_setzero_si512(); N];
            for j in 0..N {
                // SAFETY: one correction for each block of row j.
                let c = unsafe { *correction.add(first + j * blocks + b) };
                upper[j] = _mm512_set1_epi32(c[0]);
                lower[j] = _mm512_set1_epi32(c[1]);
            }
            for g in 0..8 {
                // SAFETY: line b·8 + g exists; `Line` is 64 bytes aligned to 64.
                let w = unsafe { _mm512_load_si512(lines.as_ptr().add(b * 8 + g).cast()) };
                for j in 0..N {
                    // SAFETY: row j has 8 words for each block.
                    let a = unsafe { *words.add((first + j * blocks + b) * 8 + g) };
                    upper[j] = _mm512_dpbusd_epi32(upper[j], w, _mm512_set1_epi32(a[0]));
                    lower[j] = _mm512_dpbusd_epi32(lower[j], w, _mm512_set1_epi32(a[1]));
                }
            }
            // SAFETY: block b has 16 scales.
            let d =
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().add(b * 16).cast())) };
            for j in 0..N {
                // SAFETY: one scale for each block of row j.
                let s = unsafe { *scale.add(first + j * blocks + b) };
                let dot = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper[j]), lower[j]);
                let dot = _mm512_cvtepi32_ps(dot);
                sum[j] = _mm512_fmadd_ps(dot, _mm512_mul_ps(d, _mm512_set1_ps(s)), sum[j]);
            }
        }
        for (j, sum) in sum.iter().enumerate() {
            // SAFETY: out holds N · 16 numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(j * ROWS), *sum) };
        }
    }
}

// SAFETY of the whole module: as of [`vnni`].
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx2 {
    use super::{Activations, Kind, Line, blocks_within, f16, whole_correction};
    use std::arch::x86_64::*;

    /// Whether this processor has the instructions.
    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// Rows [row, row + n) of x times one tile; n is 1, 2 or 4. [`available`] must have said
    /// yes.
    pub(super) fn tile(
        kind: Kind,
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        row: usize,
        n: usize,
        out: &mut [f32],
    ) {
        let (blocks, first) = blocks_within(kind, lines, scales, x, (row, n), out);
        // SAFETY: the caller has asked `available`, so the instructions exist; the bounds of
        // every pointer used within were asserted by `blocks_within`.
        unsafe {
            match (kind, n) {
                (Kind::Q4_1, 1) => q4_1::<1>(lines, scales, x, first, blocks, out),
                (Kind::Q4_1, 2) => q4_1::<2>(lines, scales, x, first, blocks, out),
                (Kind::Q4_1, _) => q4_1::<4>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, 1) => q8_0::<1>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, 2) => q8_0::<2>(lines, scales, x, first, blocks, out),
                (Kind::Q8_0, _) => q8_0::<4>(lines, scales, x, first, blocks, out),
            }
        }
    }

    /// sum + dot · (d · s), eight rows of the matrix.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn scaled(sum: __m256, dot: __m256i, d: __m256, s: f32) -> __m256 {
        let scale = _mm256_mul_ps(d, _mm256_set1_ps(s));
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sum)
    }

    // SAFETY (of both kernels): the caller guarantees the target features, `blocks` blocks of
    // lines and scales, (first + N · blocks) blocks of activations, and N · 16 outputs; all
    // reads and writes below stay within these.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn q4_1<const N: usize>(
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        first: usize,
        blocks: usize,
        out: &mut [f32],
    ) {
        let nibble = _mm256_set1_epi16(15);
        let mut sum = [[_mm256_setzero_ps(); 2]; N];
        let (words, scale) = (x.words.as_ptr(), x.scale.as_ptr());
        let weighted = x.weighted_sum.as_ptr();
        for b in 0..blocks {
            // Eight rows of the matrix after the other eight: their sums fill the registers.
            for half in 0..2 {
                let mut dot = [_mm256_setzero_si256(); N];
                for g in 0..4 {
                    // SAFETY: line b·4 + g exists; its 64 bytes are two halves.
                    let w = unsafe {
                        let line = lines.as_ptr().add(b * 4 + g).cast::<__m256i>();
                        _mm256_load_si256(line.add(half))
                    };
                    let low = [w, _mm256_srli_epi16::<8>(w)];
                    let low = low.map(|w| _mm256_and_si256(w, nibble));
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble);
                    let high = [high, _mm256_srli_epi16::<12>(w)];
                    for j in 0..N {
                        let at = (first + j * blocks + b) * 8 + g;
                        // SAFETY: row j has 8 words for each block; at + 4 is the last used.
                        let (a, c) = unsafe { (*words.add(at), *words.add(at + 4)) };
                        let products = _mm256_add_epi32(
                            _mm256_add_epi32(
                                _mm256_madd_epi16(low[0], _mm256_set1_epi32(a[0])),
                                _mm256_madd_epi16(low[1], _mm256_set1_epi32(a[1])),
                            ),
                            _mm256_add_epi32(
                                _mm256_madd_epi16(high[0], _mm256_set1_epi32(c[0])),
                                _mm256_madd_epi16(high[1], _mm256_set1_epi32(c[1])),
                            ),
                        );
                        dot[j] = _mm256_add_epi32(dot[j], products);
                    }
                }
                // SAFETY: block b has 32 scales: d of 16 rows, then m.
                let (d, m) = unsafe {
                    let at = scales.as_ptr().add(b * 32).cast::<__m128i>();
                    (
                        _mm256_cvtph_ps(_mm_loadu_si128(at.add(half))),
                        _mm256_cvtph_ps(_mm_loadu_si128(at.add(2 + half))),
                    )
                };
                for j in 0..N {
                    let at = first + j * blocks + b;
                    // SAFETY: one scale and one weighted sum for each block of row j.
                    let (s, ws) = unsafe { (*scale.add(at), *weighted.add(at)) };
                    let with_dot = scaled(sum[j][half], dot[j], d, s);
                    sum[j][half] = _mm256_fmadd_ps(m, _mm256_set1_ps(ws), with_dot);
                }
            }
        }
        for (j, sum) in sum.iter().flatten().enumerate() {
            // SAFETY: out holds N · 16 numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(j * 8), *sum) };
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn q8_0<const N: usize>(
        lines: &[Line],
        scales: &[f16],
        x: &Activations,
        first: usize,
        blocks: usize,
        out: &mut [f32],
    ) {
        let byte = _mm256_set1_epi16(255);
        let mut sum = [[_mm256_setzero_ps(); 2]; N];
        let (words, scale) = (x.words.as_ptr(), x.scale.as_ptr());
        let correction = x.correction.as_ptr();
        for b in 0..blocks {
            for half in 0..2 {
                let mut dot = [_mm256_setzero_si256(); N];
                for (j, dot) in dot.iter_mut().enumerate() {
                    // SAFETY: one correction for each block of row j.
                    let c = unsafe { *correction.add(first + j * blocks + b) };
                    *dot = _mm256_set1_epi32(whole_correction(c));
                }
                for g in 0..8 {
                    // SAFETY: line b·8 + g exists; its 64 bytes are two halves.
                    let w = unsafe {
                        let line = lines.as_ptr().add(b * 8 + g).cast::<__m256i>();
                        _mm256_load_si256(line.add(half))
                    };
                    let (even, odd) = (_mm256_and_si256(w, byte), _mm256_srli_epi16::<8>(w));
                    for j in 0..N {
                        // SAFETY: row j has 8 words for each block.
                        let a = unsafe { *words.add((first + j * blocks + b) * 8 + g) };
                        let products = _mm256_add_epi32(
                            _mm256_madd_epi16(even, _mm256_set1_epi32(a[0])),
                            _mm256_madd_epi16(odd, _mm256_set1_epi32(a[1])),
                        );
                        dot[j] = _mm256_add_epi32(dot[j], products);
                    }
                }
                // SAFETY: block b has 16 scales.
                let d = unsafe {
                    let at = scales.as_ptr().add(b * 16).cast::<__m128i>();
                    _mm256_cvtph_ps(_mm_loadu_si128(at.add(half)))
                };
                for j in 0..N {
                    // SAFETY: one scale for each block of row j.
                    let s = unsafe { *scale.add(first + j * blocks + b) };
                    sum[j][half] = scaled(sum[j][half], dot[j], d, s);
                }
            }
        }
        for (j, sum) in sum.iter().flatten().enumerate() {
            // SAFETY: out holds N · 16 numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(j * 8), *sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};
    use simpatico_schema::random::Philox;

    fn quantised(dtype: GgmlDType, rows: usize, cols: usize) -> (Vec<f32>, Packed) {
        let w = Tensor::from_vec(
            Philox::new(1, 0).normals(rows * cols),
            (rows, cols),
            &Device::Cpu,
        )
        .unwrap();
        let q = QTensor::quantize(&w, dtype).unwrap();
        let exact = q.dequantize(&Device::Cpu).unwrap();
        let packed = Packed::new(dtype, rows, cols, &q.data().unwrap()).unwrap();
        (exact.flatten_all().unwrap().to_vec1().unwrap(), packed)
    }

    #[test]
    fn packing_keeps_every_weight() {
        for dtype in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let (exact, packed) = quantised(dtype, 48, 96);
            assert_eq!(packed.dequantised(), exact, "{dtype:?}");
        }
    }

    #[test]
    fn products_are_nearly_those_of_the_activations_as_they_were() {
        for dtype in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let (w, packed) = quantised(dtype, 64, 96);
            for rows in [1, 2, 3, 15] {
                let x = Philox::new(2, 0).normals(rows * 96);
                let acts = Activations::new(&x, 96);
                let got = packed.times(&acts);
                for (i, got) in got.iter().enumerate() {
                    let (r, n) = (i / 64, i % 64);
                    let plain: f64 = (0..96)
                        .map(|k| f64::from(x[r * 96 + k]) * f64::from(w[n * 96 + k]))
                        .sum();
                    assert!(
                        (plain - f64::from(*got)).abs() < 0.25,
                        "{dtype:?} {plain} {got}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_kernel_of_this_processor_gives_the_portable_ones_bits() {
        let mut kernels = vec![Kernel::best(), Kernel::Portable];
        #[cfg(target_arch = "x86_64")]
        if avx2::available() {
            kernels.push(Kernel::Avx2);
        }
        for dtype in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let (_, packed) = quantised(dtype, 16, 160);
            // Some blocks with one number that dwarfs the rest, where rounding is coarse.
            let mut x = Philox::new(3, 0).normals(11 * 160);
            x.iter_mut().step_by(37).for_each(|x| *x *= 1e4);
            for kernel in &kernels {
                let acts = Activations::laid_out_for(*kernel, &x, 160);
                let plain = Activations::laid_out_for(Kernel::Portable, &x, 160);
                let (got, mut portable) = (packed.times(&acts), [0f32; ROWS]);
                for (row, got) in got.chunks_exact(ROWS).enumerate() {
                    portable_tile(
                        packed.kind,
                        &packed.lines,
                        &packed.scales,
                        &plain,
                        row,
                        &mut portable,
                    );
                    assert_eq!(got, portable, "{kernel:?}, {dtype:?}, row {row}");
                }
            }
        }
    }
}
