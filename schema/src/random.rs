//! The seeded generator behind every random number of the project.
//!
//! Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) is
//! counter-based: number *n* of stream *s* under seed *k* is a pure function of (k, s, n),
//! the same on every machine and in any order, so image 3 of a batch gets the same noise
//! as image 3 alone.

/// A stream of random numbers: seed chooses the key, stream the upper half of the counter.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: u64,
    block: u64,
    buffer: [u32; 4],
    used: usize,
    spare_normal: Option<f32>,
}

impl Philox {
    /// The generator number `stream` under `seed`, at its beginning.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            stream,
            block: 0,
            buffer: [0; 4],
            used: 4,
            spare_normal: None,
        }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = philox_block(self.key, self.block, self.stream);
            self.block = self.block.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in [0, 1), with 24 random bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in [0, 1), with 53 random bits.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// Uniform among 0..n without bias (Lemire's method). `n` must not be 0.
    pub fn below(&mut self, n: u32) -> u32 {
        assert!(n > 0, "below(0) has no answer");
        loop {
            let product = u64::from(self.next_u32()) * u64::from(n);
            if product as u32 >= n.wrapping_neg() % n {
                return (product >> 32) as u32;
            }
        }
    }

    /// Standard normal, by Box and Muller in f64 (the same bits on every machine whose libm
    /// rounds ln, sin and cos alike; ours are the `libm`-free std ones).
    pub fn normal(&mut self) -> f32 {
        if let Some(z) = self.spare_normal.take() {
            return z;
        }
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform_f64()).sin_cos();
        self.spare_normal = Some((radius * sin) as f32);
        (radius * cos) as f32
    }

    /// `n` standard normal numbers.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// One of the items, or `None` of an empty slice.
    pub fn choose<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        match u32::try_from(items.len()) {
            Ok(0) | Err(_) => None,
            Ok(n) => Some(&items[self.below(n) as usize]),
        }
    }

    /// Puts the items in a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u32 + 1) as usize);
        }
    }

    /// The position in the stream, for checkpoints: give it to [`Self::seek`].
    pub fn position(&self) -> (u64, u32, Option<f32>) {
        (self.block, self.used as u32, self.spare_normal)
    }

    /// Goes to a position that [`Self::position`] gave.
    pub fn seek(&mut self, (block, used, spare_normal): (u64, u32, Option<f32>)) {
        self.block = block;
        self.used = (used as usize).min(4);
        self.spare_normal = spare_normal;
        if self.used < 4 {
            self.buffer = philox_block(self.key, block.wrapping_sub(1), self.stream);
        }
    }
}

/// Ten rounds of Philox on one counter.
fn philox_block(key: [u32; 2], block: u64, stream: u64) -> [u32; 4] {
    let mut c = [
        block as u32,
        (block >> 32) as u32,
        stream as u32,
        (stream >> 32) as u32,
    ];
    let mut k = key;
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ k[1],
            p0 as u32,
        ];
        k = [
            k[0].wrapping_add(0x9E37_79B9),
            k[1].wrapping_add(0xBB67_AE85),
        ];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_published_test_vectors() {
        // Random123 kat_vectors, philox4x32 10.
        assert_eq!(
            philox_block([0, 0], 0, 0),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox_block([u32::MAX; 2], u64::MAX, u64::MAX),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn a_sought_stream_goes_on_as_before() {
        let mut a = Philox::new(7, 3);
        for _ in 0..5 {
            a.normal();
        }
        let mut b = Philox::new(7, 3);
        b.seek(a.position());
        let next = |g: &mut Philox| (g.normal(), g.next_u32(), g.below(10));
        assert_eq!(next(&mut a), next(&mut b));
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let z = Philox::new(1, 0).normals(100_000);
        let mean = z.iter().sum::<f32>() / 1e5;
        let variance = z.iter().map(|x| x * x).sum::<f32>() / 1e5;
        assert!(
            mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02,
            "{mean} {variance}"
        );
    }
}
