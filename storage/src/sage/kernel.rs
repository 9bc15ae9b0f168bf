//! The arithmetic of the encoder, with one defined order of operations.
//!
//! A read must give the same bits whether it is done alone or in a batch, on a machine with
//! AVX-512 or without, so the order is fixed here:
//!
//! 1. A product `W x + b` is, per output, one chain of fused multiply-adds that starts at
//!    the bias and runs over the inputs from first to last. Lanes are outputs, so vector
//!    width never regroups a sum. A zero input may be left out: it cannot change a chain,
//!    save for the sign of a zero, which the last step (`+ 0.0`) removes.
//! 2. A sum over neighbors is a sum of integers: each term is rounded to a multiple of
//!    2^-26 and added as i64, which is exact, reversible and blind to order. Terms are kept
//!    within ±[`LIMIT`], so 2^22 of them cannot overflow.
//!
//! The bodies below are plain loops; `multiversion!` compiles each for the vector units at
//! hand and picks one at run time.

/// Outputs that one panel of weights serves.
pub(super) const PANEL: usize = 64;
/// The largest magnitude a term of a neighbor sum may have.
pub(super) const LIMIT: f32 = 32_767.0;
/// Fixed-point steps in 1.0.
const STEPS: f64 = 67_108_864.0;
/// Adding this to a double of magnitude below 2^51 leaves its nearest integer in the low
/// bits.
const MAGIC: f64 = 6_755_399_441_055_744.0;
/// Inputs that one block of the batch product runs over before it moves to other outputs.
const BLOCK_INPUTS: usize = 256;
/// Vectors that one tile of the batch product takes through a panel together.
const TILE: usize = 6;

/// Which vector units to use. Only [`Level::best`] and [`Level::present`] make one, so the
/// units a level names are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Level(Units);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Units {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Level {
    /// Every level this machine can run, best first.
    pub(super) fn present() -> Vec<Self> {
        let mut levels = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                levels.push(Self(Units::Avx512));
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                levels.push(Self(Units::Avx2));
            }
        }
        levels.push(Self(Units::Portable));
        levels
    }

    /// The best level of this machine.
    pub(super) fn best() -> Self {
        Self::present()[0]
    }
}

macro_rules! multiversion {
    ($(#[$doc:meta])* fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        #[allow(unsafe_code)]
        pub(super) fn $name(level: Level, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) {
                $body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body($($arg),*)
            }
            match level.0 {
                // SAFETY: the only needs of these two are the vector units they name, and a
                // `Level` that names them is made only after they were detected.
                #[cfg(target_arch = "x86_64")]
                Units::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Units::Avx2 => unsafe { avx2($($arg),*) },
                Units::Portable => $body($($arg),*),
            }
        }
    };
}

/// A weight matrix with its bias, laid out so that products read it straight through:
/// panel by panel of [`PANEL`] outputs, and within a panel input by input.
pub(super) struct Panels {
    inputs: usize,
    outputs: usize,
    /// (panels, inputs, PANEL), zero beyond `outputs`.
    weights: Vec<f32>,
    /// (panels, PANEL)
    bias: Vec<f32>,
}

impl Panels {
    /// Lays out a matrix given by rows, `rows[output * inputs + input]`.
    pub(super) fn new(inputs: usize, rows: &[f32], bias: &[f32]) -> Self {
        let outputs = bias.len();
        assert_eq!(rows.len(), inputs * outputs);
        let panels = outputs.div_ceil(PANEL);
        let mut weights = vec![0.0; panels * inputs * PANEL];
        for output in 0..outputs {
            let (panel, lane) = (output / PANEL, output % PANEL);
            for input in 0..inputs {
                weights[(panel * inputs + input) * PANEL + lane] = rows[output * inputs + input];
            }
        }
        let mut padded = vec![0.0; panels * PANEL];
        for (to, from) in padded.iter_mut().zip(bias) {
            *to = from + 0.0;
        }
        Self {
            inputs,
            outputs,
            weights,
            bias: padded,
        }
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Bytes of weights that one product reads.
    pub(super) fn bytes(&self) -> usize {
        (self.weights.len() + self.bias.len()) * 4
    }

    /// `W x + b` of one vector.
    pub(super) fn apply(&self, level: Level, x: &[f32]) -> Vec<f32> {
        assert_eq!(x.len(), self.inputs);
        let mut out = vec![0.0; self.bias.len()];
        apply_one(level, &self.weights, &self.bias, x, &mut out);
        out.truncate(self.outputs);
        out
    }

    /// `W x + b` of many vectors: `xs` is (n, inputs), the answer (n, outputs).
    pub(super) fn apply_many(&self, level: Level, xs: &[f32]) -> Vec<f32> {
        let n = xs.len() / self.inputs.max(1);
        assert_eq!(xs.len(), n * self.inputs);
        let width = self.bias.len();
        let mut padded = vec![0.0; n * width];
        apply_block(
            level,
            &self.weights,
            &self.bias,
            self.inputs,
            xs,
            &mut padded,
        );
        if width == self.outputs {
            return padded;
        }
        let rows = padded.chunks_exact(width);
        rows.flat_map(|row| &row[..self.outputs]).copied().collect()
    }
}

multiversion! {
    /// One vector through all panels.
    fn apply_one = apply_one_body(weights: &[f32], bias: &[f32], x: &[f32], out: &mut [f32])
}

#[inline(always)]
fn apply_one_body(weights: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) {
    let live: Vec<u32> = (0u32..)
        .zip(x)
        .filter_map(|(i, &value)| (value != 0.0).then_some(i))
        .collect();
    let panels = weights.chunks_exact((x.len() * PANEL).max(PANEL));
    // With no inputs there are no panels to walk, only biases.
    out.copy_from_slice(bias);
    for (panel, out) in panels.zip(out.as_chunks_mut::<PANEL>().0) {
        let (rows, _) = panel.as_chunks::<PANEL>();
        let mut chain = *out;
        for &i in &live {
            let (row, value) = (&rows[i as usize], x[i as usize]);
            for lane in 0..PANEL {
                chain[lane] = row[lane].mul_add(value, chain[lane]);
            }
        }
        *out = chain;
    }
    for value in out {
        *value += 0.0;
    }
}

multiversion! {
    /// Many vectors through all panels; `out` is (n, panels * PANEL).
    fn apply_block = apply_block_body(
        weights: &[f32],
        bias: &[f32],
        inputs: usize,
        xs: &[f32],
        out: &mut [f32],
    )
}

#[inline(always)]
fn apply_block_body(weights: &[f32], bias: &[f32], inputs: usize, xs: &[f32], out: &mut [f32]) {
    let width = bias.len();
    for row in out.chunks_exact_mut(width.max(1)) {
        row.copy_from_slice(bias);
    }
    let n = out.len() / width.max(1);
    for first in (0..inputs).step_by(BLOCK_INPUTS) {
        let last = (first + BLOCK_INPUTS).min(inputs);
        for panel in 0..width / PANEL {
            let rows = &weights[(panel * inputs + first) * PANEL..][..(last - first) * PANEL];
            let (rows, _) = rows.as_chunks::<PANEL>();
            let mut row = 0;
            while row + TILE <= n {
                tile_body::<TILE>(rows, xs, inputs, first, out, width, panel, row);
                row += TILE;
            }
            while row < n {
                tile_body::<1>(rows, xs, inputs, first, out, width, panel, row);
                row += 1;
            }
        }
    }
    for value in out {
        *value += 0.0;
    }
}

/// `M` vectors through a block of one panel's inputs: `M * PANEL` chains go on.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile_body<const M: usize>(
    rows: &[[f32; PANEL]],
    xs: &[f32],
    inputs: usize,
    first: usize,
    out: &mut [f32],
    width: usize,
    panel: usize,
    row: usize,
) {
    let x: [&[f32]; M] = std::array::from_fn(|m| &xs[(row + m) * inputs + first..][..rows.len()]);
    let mut chains = [[0.0f32; PANEL]; M];
    for (m, chain) in chains.iter_mut().enumerate() {
        chain.copy_from_slice(&out[(row + m) * width + panel * PANEL..][..PANEL]);
    }
    for (i, weights) in rows.iter().enumerate() {
        for m in 0..M {
            let value = x[m][i];
            for lane in 0..PANEL {
                chains[m][lane] = weights[lane].mul_add(value, chains[m][lane]);
            }
        }
    }
    for (m, chain) in chains.iter().enumerate() {
        out[(row + m) * width + panel * PANEL..][..PANEL].copy_from_slice(chain);
    }
}

/// A term of a neighbor sum: the value in fixed point, to nearest, ties to even.
#[inline(always)]
fn fixed(value: f32) -> i64 {
    let shifted = f64::from(value).mul_add(STEPS, 0.0) + MAGIC;
    shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i64
}

multiversion! {
    /// Adds each value's fixed point to its sum.
    fn add = add_body(sums: &mut [i64], values: &[f32])
}

#[inline(always)]
fn add_body(sums: &mut [i64], values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum = sum.wrapping_add(fixed(value));
    }
}

multiversion! {
    /// Takes each value's fixed point from its sum: the exact reverse of [`add`].
    fn take = take_body(sums: &mut [i64], values: &[f32])
}

#[inline(always)]
fn take_body(sums: &mut [i64], values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum = sum.wrapping_sub(fixed(value));
    }
}

multiversion! {
    /// Adds each value's positive part to its sum.
    fn add_relu = add_relu_body(sums: &mut [i64], values: &[f32])
}

#[inline(always)]
fn add_relu_body(sums: &mut [i64], values: &[f32]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum = sum.wrapping_add(fixed(value.max(0.0)));
    }
}

multiversion! {
    /// Adds the mean, sum / count, to each value. A mean of nothing is 0, as in PyG.
    fn add_mean = add_mean_body(values: &mut [f32], sums: &[i64], count: u32)
}

#[inline(always)]
fn add_mean_body(values: &mut [f32], sums: &[i64], count: u32) {
    if count == 0 {
        return;
    }
    let divisor = f64::from(count) * STEPS;
    for (value, &sum) in values.iter_mut().zip(sums) {
        *value += (sum as f64 / divisor) as f32;
    }
}

/// Brings the values into the range a neighbor sum takes.
pub(super) fn limit(values: &mut [f32]) {
    for value in values {
        *value = value.clamp(-LIMIT, LIMIT);
    }
}

/// The positive part, in the range a neighbor sum takes.
pub(super) fn relu(values: &mut [f32]) {
    for value in values {
        *value = value.clamp(0.0, LIMIT);
    }
}

multiversion! {
    /// `out[0]` = Σ a b and `out[1]` = Σ b b, in double, over 16 lanes that are added in
    /// order at the end.
    fn dot_and_square = dot_and_square_body(a: &[f32], b: &[f32], out: &mut [f64; 2])
}

#[inline(always)]
fn dot_and_square_body(a: &[f32], b: &[f32], out: &mut [f64; 2]) {
    const LANES: usize = 16;
    let (mut dot, mut square) = ([0.0f64; LANES], [0.0f64; LANES]);
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            let (a, b) = (f64::from(a[lane]), f64::from(b[lane]));
            dot[lane] = a.mul_add(b, dot[lane]);
            square[lane] = b.mul_add(b, square[lane]);
        }
    }
    for (lane, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        let (a, b) = (f64::from(a), f64::from(b));
        dot[lane] = a.mul_add(b, dot[lane]);
        square[lane] = b.mul_add(b, square[lane]);
    }
    *out = [dot.iter().sum(), square.iter().sum()];
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    fn naive(inputs: usize, rows: &[f32], bias: &[f32], x: &[f32]) -> Vec<u32> {
        let chain = |o: usize| {
            let row = &rows[o * inputs..][..inputs];
            let chain = row
                .iter()
                .zip(x)
                .fold(bias[o] + 0.0, |c, (w, x)| w.mul_add(*x, c));
            (chain + 0.0).to_bits()
        };
        (0..bias.len()).map(chain).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn every_product_is_the_same_chain_on_every_path() {
        for (inputs, outputs, n) in [
            (1, 1, 1),
            (6, 8, 7),
            (300, 65, 13),
            (768, 128, 6),
            (0, 3, 2),
        ] {
            let mut random = Philox::new(5, inputs as u64);
            let rows = random.normals(inputs * outputs);
            let bias = random.normals(outputs);
            let mut xs = random.normals(inputs * n);
            for x in xs.iter_mut().step_by(3) {
                *x = 0.0;
            }
            let panels = Panels::new(inputs, &rows, &bias);
            for level in Level::present() {
                let many = panels.apply_many(level, &xs);
                for i in 0..n {
                    let x = &xs[i * inputs..][..inputs];
                    let expected = naive(inputs, &rows, &bias, x);
                    assert_eq!(bits(&panels.apply(level, x)), expected, "{level:?}");
                    if inputs > 0 {
                        assert_eq!(bits(&many[i * outputs..][..outputs]), expected, "{level:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn fixed_point_is_the_rounded_value_on_every_path() {
        let mut random = Philox::new(6, 0);
        let mut values: Vec<f32> = random.normals(1000).iter().map(|v| v * 900.0).collect();
        values.extend([0.0, -0.0, LIMIT, -LIMIT, 1e-9, -1e-9, 2f32.powi(-27), 0.5]);
        for level in Level::present() {
            let mut sums = vec![3i64; values.len()];
            add(level, &mut sums, &values);
            for (sum, value) in sums.iter().zip(&values) {
                let exact = (f64::from(*value) * STEPS).round_ties_even() as i64;
                assert_eq!(*sum, 3 + exact, "{value} {level:?}");
            }
            take(level, &mut sums, &values);
            assert!(sums.iter().all(|&sum| sum == 3));
            let mut positive = vec![0i64; values.len()];
            add_relu(level, &mut positive, &values);
            for (sum, value) in positive.iter().zip(&values) {
                let exact = (f64::from(value.max(0.0)) * STEPS).round_ties_even() as i64;
                assert_eq!(*sum, exact);
            }
        }
    }

    #[test]
    fn means_and_cosine_parts_agree_on_every_path() {
        let mut random = Philox::new(7, 0);
        let sums: Vec<i64> = (0..333).map(|_| random.next_u64() as i64 >> 9).collect();
        let (a, b) = (random.normals(333), random.normals(333));
        let run = |level| {
            let (mut mean, mut parts) = (a.clone(), [0.0; 2]);
            add_mean(level, &mut mean, &sums, 7);
            dot_and_square(level, &a, &b, &mut parts);
            (bits(&mean), parts.map(f64::to_bits))
        };
        for level in Level::present() {
            assert_eq!(run(level), run(Level(Units::Portable)));
        }
    }
}
