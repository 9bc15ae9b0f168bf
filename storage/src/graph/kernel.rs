//! Counting: how many of some postings each user of a chunk is in.
//!
//! Bitmaps are added bit-sliced. 512 users at a time, the sum of all bitmaps is kept as
//! binary digits, one vector per digit; a carry-save adder (Harley and Seal) takes three
//! vectors of one weight and gives one of that weight and one of the next. That is two
//! instructions per bitmap and 512 users where AVX-512 has its three-input logic, against
//! sixteen for adding under a mask. Only the finished digits are spread to one byte a user.
//! Lists are added to the bytes after that, one increment an entry.
//!
//! The same program runs on three kinds of vector: AVX-512, AVX2, and plain u64 words that
//! every machine has. The best present one is chosen at run time; all give equal counts.

use super::postings::BLOCK_USERS;

/// Words of a bitmap per block.
const BLOCK_WORDS: usize = BLOCK_USERS / 64;
/// How many blocks ahead bitmaps are fetched.
const AHEAD: usize = 4;
/// Binary digits of a sum of at most 255 bitmaps.
const DIGITS: usize = 8;
/// The most postings whose sum fits the byte counters.
pub(crate) const MAX_COUNTED: usize = 255;

/// Which vectors count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// u64 words: every machine.
    Portable,
    /// 256-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512-bit vectors with byte masks.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Kernel blocks of a table's row: two, for a processor's caches fetch lines in pairs.
const ROW_BLOCKS: usize = 2;
/// The users of a table.
pub(crate) const TABLE_USERS: usize = ROW_BLOCKS * BLOCK_USERS;

/// Who of a table's users has a token; aligned, for a load that crosses cache lines costs two.
#[derive(Clone, Copy, Default)]
#[repr(align(128))]
pub(crate) struct Row([[u64; BLOCK_WORDS]; ROW_BLOCKS]);

impl Row {
    /// Puts a user in, or out.
    pub fn flip(&mut self, place: usize) {
        self.0[place / BLOCK_USERS][place % BLOCK_USERS / 64] ^= 1 << (place % 64);
    }
}

/// Bitmaps to be added: singly, or two that exclude each other (one attribute's likes and
/// dislikes), which are joined before they are added. Bits past a bitmap's end are 0.
#[derive(Default)]
pub(crate) struct Bitmaps<'a> {
    pub singles: Vec<&'a [u64]>,
    pub pairs: Vec<(&'a [u64], &'a [u64])>,
}

impl Kernel {
    /// The best this machine has.
    pub fn best() -> Self {
        *Self::present().last().unwrap_or(&Self::Portable)
    }

    /// All this machine has, the best last.
    pub fn present() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                return &[Self::Portable, Self::Avx2, Self::Avx512];
            }
            if is_x86_feature_detected!("avx2") {
                return &[Self::Portable, Self::Avx2];
            }
        }
        &[Self::Portable]
    }

    /// Sets `counts[user]` to the number of bitmaps with that user's bit, for all of
    /// `counts`, whose length is a multiple of [`BLOCK_USERS`]. At most [`MAX_COUNTED`]
    /// bitmaps, a pair being one.
    #[allow(unsafe_code)]
    pub fn count(self, bitmaps: &Bitmaps<'_>, counts: &mut [u8]) {
        let end = counts.len() / BLOCK_USERS;
        let blocks = |words: &[u64]| (words.len() / BLOCK_WORDS).min(end);
        let singles = bitmaps.singles.iter().copied().map(blocks);
        let pairs = bitmaps.pairs.iter();
        let pairs = pairs.flat_map(|(a, b)| [blocks(a), blocks(b)]);
        // Bitmaps are mostly of one length; where they are not, each stretch between two
        // lengths has its own set of those that reach over it.
        let mut ends: Vec<usize> = singles.chain(pairs).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut from = 0;
        for to in ends {
            let counts = &mut counts[from * BLOCK_USERS..to * BLOCK_USERS];
            let stretch = stretch(bitmaps, from * BLOCK_WORDS, to * BLOCK_WORDS);
            match self {
                Self::Portable => add_up::<[u64; 8]>(&stretch, counts),
                #[cfg(target_arch = "x86_64")]
                // SAFETY: this value is only made by `present`, after it found the feature.
                Self::Avx2 => unsafe { x86::add_up_avx2(&stretch, counts) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: this value is only made by `present`, after it found the features.
                Self::Avx512 => unsafe { x86::add_up_avx512(&stretch, counts) },
            }
            from = to;
        }
        counts[from * BLOCK_USERS..].fill(0);
    }

    /// Calls `found(index, count)` for the counts that are at least `least()`, by index
    /// rising; `least` may rise meanwhile. The length is a multiple of 64.
    #[allow(unsafe_code)]
    pub fn scan(self, counts: &[u8], least: u8, found: &mut impl FnMut(usize, u8) -> u8) {
        match self {
            Self::Portable => scan::<[u64; 8]>(counts, least, found),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the feature.
            Self::Avx2 => unsafe { x86::scan_avx2(counts, least, found) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the features.
            Self::Avx512 => unsafe { x86::scan_avx512(counts, least, found) },
        }
    }

    /// Calls `found(place, count)` for the [`TABLE_USERS`] places that are in at least `least`,
    /// which is positive, of these `tokens`' rows of the `table`; each call says what `least`
    /// is from then on. Where more than `enough` of 512 places are in more than that, it rises
    /// before they are told. At most [`MAX_COUNTED`] tokens; one the table has no row for is
    /// passed over. Sums are compared as digits, a few instructions for 512 places, and only
    /// what is found is read out.
    #[allow(unsafe_code)]
    pub fn find(
        self,
        table: &[Row],
        tokens: &[u32],
        least: u8,
        enough: usize,
        found: &mut impl FnMut(usize, u8) -> u8,
    ) {
        match self {
            Self::Portable => find::<[u64; 8]>(table, tokens, least, enough, found),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the feature.
            Self::Avx2 => unsafe { x86::find_avx2(table, tokens, least, enough, found) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the features.
            Self::Avx512 => unsafe { x86::find_avx512(table, tokens, least, enough, found) },
        }
    }

    /// The greatest count in each residue class of the index modulo 64.
    #[allow(unsafe_code)]
    pub fn lane_maxima(self, counts: &[u8]) -> [u8; 64] {
        match self {
            Self::Portable => lane_maxima(counts),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the feature.
            Self::Avx2 => unsafe { x86::lane_maxima_avx2(counts) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value is only made by `present`, after it found the features.
            Self::Avx512 => unsafe { x86::lane_maxima_avx512(counts) },
        }
    }
}

/// Adds the entries of a list to the counters, which wrap past 255.
pub(crate) fn count_list(ids: &[u16], counts: &mut [u8; 65_536]) {
    for &id in ids {
        let count = &mut counts[usize::from(id)];
        *count = count.wrapping_add(1);
    }
}

/// Fetches some cache lines of a list, as far as it has them.
pub(crate) fn prefetch_list(ids: &[u16], lines: std::ops::Range<usize>) {
    for line in lines.start..lines.end.min(ids.len() / 32 + 1) {
        prefetch(ids.as_ptr().wrapping_add(line * 32));
    }
}

/// Fetches a cache line, whose address need not be valid.
#[inline(always)]
#[allow(unsafe_code)]
pub(crate) fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint that never faults, at any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// The bitmaps that reach to word `to`, from word `from` on, all cut to that.
fn stretch<'a>(bitmaps: &Bitmaps<'a>, from: usize, to: usize) -> Bitmaps<'a> {
    let reaches = |words: &&[u64]| words.len() >= to;
    let singles = bitmaps.singles.iter().copied().filter(reaches);
    let mut cut = Bitmaps {
        singles: singles.map(|words| &words[from..to]).collect(),
        pairs: Vec::with_capacity(bitmaps.pairs.len()),
    };
    for &(a, b) in &bitmaps.pairs {
        match (a.len() >= to, b.len() >= to) {
            (true, true) => cut.pairs.push((&a[from..to], &b[from..to])),
            (true, false) => cut.singles.push(&a[from..to]),
            (false, true) => cut.singles.push(&b[from..to]),
            (false, false) => {}
        }
    }
    cut
}

/// A vector of 512 bits, however the machine makes it up.
///
/// # Safety
/// The methods may only run where the machine has the features of the implementation.
#[allow(unsafe_code)]
trait Lanes: Copy {
    /// All bits 0.
    unsafe fn zero() -> Self;
    unsafe fn load(words: &[u64; BLOCK_WORDS]) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn xor(self, other: Self) -> Self;
    unsafe fn and(self, other: Self) -> Self;
    /// The sum of three bits in each place: (weight one, weight two).
    unsafe fn add(a: Self, b: Self, c: Self) -> (Self, Self);
    /// The bits as words.
    unsafe fn words(self) -> [u64; BLOCK_WORDS];
    /// Writes the number with these binary digits for each of the 512 places.
    unsafe fn spread(digits: &[Self], counts: &mut [u8; BLOCK_USERS]);
    /// Bit i says whether `counts[i]` is at least `least`.
    unsafe fn at_least(counts: &[u8; 64], least: u8) -> u64;
}

#[inline(always)]
#[allow(unsafe_code)]
fn add_up<L: Lanes>(bitmaps: &Bitmaps<'_>, counts: &mut [u8]) {
    let total = bitmaps.singles.len() + bitmaps.pairs.len();
    let digit_count = (usize::BITS - total.leading_zeros()) as usize;
    let digit_count = digit_count.min(DIGITS);
    for (block, counts) in counts
        .as_chunks_mut::<BLOCK_USERS>()
        .0
        .iter_mut()
        .enumerate()
    {
        let at = block * BLOCK_WORDS;
        // SAFETY: the caller has made sure of the machine's features (trait's contract), and
        // every slice is as long as `counts` has blocks, by `stretch`.
        unsafe {
            let single = |i: usize| L::load(block_at(bitmaps.singles[i], at));
            let pair = |i: usize| {
                let (a, b) = bitmaps.pairs[i];
                L::load(block_at(a, at)).or(L::load(block_at(b, at)))
            };
            let mut digits = [L::zero(); DIGITS];
            add_each(&mut digits, digit_count, bitmaps.singles.len(), single);
            add_each(&mut digits, digit_count, bitmaps.pairs.len(), pair);
            L::spread(&digits[..digit_count], counts);
        }
    }
}

/// One block of a bitmap. Asks for a later one at the same time: the processor's own
/// prefetching follows a few streams, not the fifty that are read here side by side.
#[inline(always)]
fn block_at(words: &[u64], at: usize) -> &[u64; BLOCK_WORDS] {
    const NONE: &[u64; BLOCK_WORDS] = &[0; BLOCK_WORDS];
    prefetch(words.as_ptr().wrapping_add(at + AHEAD * BLOCK_WORDS));
    words
        .get(at..)
        .and_then(|w| w.first_chunk())
        .unwrap_or(NONE)
}

/// Adds `n` one-bit vectors to the digits.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn add_each<L: Lanes, const D: usize>(
    digits: &mut [L; D],
    digit_count: usize,
    n: usize,
    input: impl Fn(usize) -> L,
) {
    // SAFETY: as of the caller.
    unsafe {
        let mut i = 0;
        while i + 8 <= n {
            add_eight(digits, digit_count, |j| input(i + j));
            i += 8;
        }
        add_few(digits, digit_count, n - i, |j| input(i + j));
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn add_eight<L: Lanes, const D: usize>(
    digits: &mut [L; D],
    digit_count: usize,
    input: impl Fn(usize) -> L,
) {
    // SAFETY: as of the caller.
    unsafe {
        let (ones, twos_a) = L::add(digits[0], input(0), input(1));
        let (ones, twos_b) = L::add(ones, input(2), input(3));
        let (twos, fours_a) = L::add(digits[1], twos_a, twos_b);
        let (ones, twos_a) = L::add(ones, input(4), input(5));
        let (ones, twos_b) = L::add(ones, input(6), input(7));
        let (twos, fours_b) = L::add(twos, twos_a, twos_b);
        let (fours, eights) = L::add(digits[2], fours_a, fours_b);
        (digits[0], digits[1], digits[2]) = (ones, twos, fours);
        carry_into(digits, 3, digit_count, eights);
    }
}

#[inline(always)]
#[allow(unsafe_code)]
unsafe fn add_few<L: Lanes, const D: usize>(
    digits: &mut [L; D],
    digit_count: usize,
    n: usize,
    input: impl Fn(usize) -> L,
) {
    // SAFETY: as of the caller.
    unsafe {
        let mut i = 0;
        while i + 2 <= n {
            let (ones, twos) = L::add(digits[0], input(i), input(i + 1));
            digits[0] = ones;
            carry_into(digits, 1, digit_count, twos);
            i += 2;
        }
        if i < n {
            carry_into(digits, 0, digit_count, input(i));
        }
    }
}

/// Adds a one-bit vector of weight `1 << digit`.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn carry_into<L: Lanes, const D: usize>(
    digits: &mut [L; D],
    from: usize,
    to: usize,
    mut carry: L,
) {
    for digit in &mut digits[from..to.max(from)] {
        // SAFETY: as of the caller.
        unsafe {
            let sum = digit.xor(carry);
            carry = digit.and(carry);
            *digit = sum;
        }
    }
}

#[inline(always)]
fn find<L: Lanes>(
    table: &[Row],
    tokens: &[u32],
    least: u8,
    enough: usize,
    found: &mut impl FnMut(usize, u8) -> u8,
) {
    // With their number known the digits stay in registers.
    match tokens.len() {
        0..32 => find_among::<L, 5>(table, tokens, least, enough, found),
        32..64 => find_among::<L, 6>(table, tokens, least, enough, found),
        _ => find_among::<L, DIGITS>(table, tokens, least, enough, found),
    }
}

#[inline(always)]
#[allow(unsafe_code)]
fn find_among<L: Lanes, const D: usize>(
    table: &[Row],
    tokens: &[u32],
    mut least: u8,
    enough: usize,
    found: &mut impl FnMut(usize, u8) -> u8,
) {
    let row = |token: &u32| {
        table
            .get(*token as usize)
            .unwrap_or(&Row([[0; BLOCK_WORDS]; ROW_BLOCKS]))
    };
    // SAFETY: the caller has made sure of the machine's features (trait's contract).
    let sums = unsafe {
        let mut sums = [[L::zero(); D]; ROW_BLOCKS];
        let (eights, rest) = tokens.as_chunks::<8>();
        for eight in eights {
            let rows = eight.each_ref().map(row);
            for (block, digits) in sums.iter_mut().enumerate() {
                add_eight(digits, D, |i| L::load(&rows[i].0[block]));
            }
        }
        for (block, digits) in sums.iter_mut().enumerate() {
            add_few(digits, D, rest.len(), |i| L::load(&row(&rest[i]).0[block]));
        }
        sums
    };
    for (block, digits) in sums.iter().enumerate() {
        // SAFETY: as above.
        let mut hits = unsafe { have_at_least(digits, least) };
        if hits == [0; BLOCK_WORDS] {
            continue;
        }
        let ones = |hits: &[u64; BLOCK_WORDS]| hits.iter().map(|w| w.count_ones()).sum::<u32>();
        while ones(&hits) as usize > enough && least < u8::MAX {
            // SAFETY: as above.
            let more = unsafe { have_at_least(digits, least + 1) };
            if ones(&more) as usize <= enough {
                break;
            }
            (hits, least) = (more, least + 1);
        }
        // SAFETY: as above.
        let digits = digits.map(|digit| unsafe { digit.words() });
        for (word, mut hits) in hits.into_iter().enumerate() {
            while hits != 0 {
                let bit = hits.trailing_zeros();
                hits &= hits - 1;
                let digits = digits.iter().enumerate();
                let count = digits.map(|(weight, digit)| (digit[word] >> bit & 1) << weight);
                let count = count.sum::<u64>() as u8;
                if count >= least {
                    least = found(block * BLOCK_USERS + word * 64 + bit as usize, count);
                }
            }
        }
    }
}

/// The places where the number with these digits is at least `least`, which is positive.
#[inline(always)]
#[allow(unsafe_code)]
unsafe fn have_at_least<L: Lanes>(digits: &[L], least: u8) -> [u64; BLOCK_WORDS] {
    let first = least.trailing_zeros() as usize;
    if first >= digits.len() || u32::from(least) >> digits.len() != 0 {
        return [0; BLOCK_WORDS];
    }
    // From the lowest digit up: a digit above that of `least` decides, an equal one leaves it.
    let mut hits = digits[first];
    for (weight, digit) in digits.iter().enumerate().skip(first + 1) {
        // SAFETY: as of the caller.
        hits = unsafe {
            match least >> weight & 1 {
                1 => digit.and(hits),
                _ => digit.or(hits),
            }
        };
    }
    // SAFETY: as of the caller.
    unsafe { hits.words() }
}

#[inline(always)]
#[allow(unsafe_code)]
fn scan<L: Lanes>(counts: &[u8], mut least: u8, found: &mut impl FnMut(usize, u8) -> u8) {
    for (block, counts) in counts.as_chunks::<64>().0.iter().enumerate() {
        // SAFETY: the caller has made sure of the machine's features (trait's contract).
        let mut hits = unsafe { L::at_least(counts, least) };
        while hits != 0 {
            let i = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            if counts[i] >= least {
                least = found(block * 64 + i, counts[i]);
            }
        }
    }
}

#[inline(always)]
fn lane_maxima(counts: &[u8]) -> [u8; 64] {
    let mut maxima = [0; 64];
    for counts in counts.as_chunks::<64>().0 {
        for (max, count) in maxima.iter_mut().zip(counts) {
            *max = (*max).max(*count);
        }
    }
    maxima
}

#[allow(unsafe_code)]
impl Lanes for [u64; 8] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn load(words: &[u64; BLOCK_WORDS]) -> Self {
        *words
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] | other[i])
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] ^ other[i])
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] & other[i])
    }

    #[inline(always)]
    unsafe fn add(a: Self, b: Self, c: Self) -> (Self, Self) {
        let sum = std::array::from_fn(|i| a[i] ^ b[i] ^ c[i]);
        let carry = std::array::from_fn(|i| (a[i] & b[i]) | (c[i] & (a[i] ^ b[i])));
        (sum, carry)
    }

    #[inline(always)]
    unsafe fn words(self) -> [u64; BLOCK_WORDS] {
        self
    }

    #[inline(always)]
    unsafe fn spread(digits: &[Self], counts: &mut [u8; BLOCK_USERS]) {
        const EACH: u64 = 0x0101_0101_0101_0101;
        for (eight, counts) in counts.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let mut sum = 0;
            for (weight, digit) in digits.iter().enumerate() {
                let bits = digit[eight / 8] >> (eight % 8 * 8) & 0xFF;
                // Byte i keeps bit i only; adding 0x7F carries it to the top of its byte.
                let picked = (bits * EACH) & 0x8040_2010_0804_0201;
                let ones = ((picked + EACH * 0x7F) >> 7) & EACH;
                sum += ones << weight;
            }
            *counts = sum.to_le_bytes();
        }
    }

    #[inline(always)]
    unsafe fn at_least(counts: &[u8; 64], least: u8) -> u64 {
        if counts.iter().all(|c| *c < least) {
            return 0;
        }
        let bit = |(i, c): (usize, &u8)| u64::from(*c >= least) << i;
        counts.iter().enumerate().map(bit).sum()
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use super::{BLOCK_USERS, BLOCK_WORDS, Bitmaps, Lanes, Row};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
    pub fn add_up_avx2(bitmaps: &Bitmaps<'_>, counts: &mut [u8]) {
        super::add_up::<[__m256i; 2]>(bitmaps, counts);
    }

    #[target_feature(enable = "avx512f,avx512bw,bmi1,bmi2,popcnt")]
    pub fn add_up_avx512(bitmaps: &Bitmaps<'_>, counts: &mut [u8]) {
        super::add_up::<__m512i>(bitmaps, counts);
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
    pub fn scan_avx2(counts: &[u8], least: u8, found: &mut impl FnMut(usize, u8) -> u8) {
        super::scan::<[__m256i; 2]>(counts, least, found);
    }

    #[target_feature(enable = "avx512f,avx512bw,bmi1,bmi2,popcnt")]
    pub fn scan_avx512(counts: &[u8], least: u8, found: &mut impl FnMut(usize, u8) -> u8) {
        super::scan::<__m512i>(counts, least, found);
    }

    #[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
    pub fn find_avx2(
        table: &[Row],
        tokens: &[u32],
        least: u8,
        enough: usize,
        found: &mut impl FnMut(usize, u8) -> u8,
    ) {
        super::find::<[__m256i; 2]>(table, tokens, least, enough, found);
    }

    #[target_feature(enable = "avx512f,avx512bw,bmi1,bmi2,popcnt")]
    pub fn find_avx512(
        table: &[Row],
        tokens: &[u32],
        least: u8,
        enough: usize,
        found: &mut impl FnMut(usize, u8) -> u8,
    ) {
        super::find::<__m512i>(table, tokens, least, enough, found);
    }

    #[target_feature(enable = "avx2")]
    pub fn lane_maxima_avx2(counts: &[u8]) -> [u8; 64] {
        super::lane_maxima(counts)
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn lane_maxima_avx512(counts: &[u8]) -> [u8; 64] {
        let mut maxima = _mm512_setzero_si512();
        for counts in counts.as_chunks::<64>().0 {
            // SAFETY: 64 bytes are read from a reference to 64 bytes.
            let counts = unsafe { _mm512_loadu_si512(counts.as_ptr().cast()) };
            maxima = _mm512_max_epu8(maxima, counts);
        }
        let mut out = [0; 64];
        // SAFETY: 64 bytes are written to an array of 64 bytes.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), maxima) };
        out
    }

    // SAFETY of every block below: the trait's contract gives the features, and all loads and
    // stores go through references to arrays of exactly the bytes touched.
    impl Lanes for __m512i {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see above the impl.
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        unsafe fn load(words: &[u64; BLOCK_WORDS]) -> Self {
            // SAFETY: see above the impl.
            unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
        }

        #[inline(always)]
        unsafe fn or(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe { _mm512_or_si512(self, other) }
        }

        #[inline(always)]
        unsafe fn xor(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe { _mm512_xor_si512(self, other) }
        }

        #[inline(always)]
        unsafe fn and(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe { _mm512_and_si512(self, other) }
        }

        #[inline(always)]
        unsafe fn add(a: Self, b: Self, c: Self) -> (Self, Self) {
            // 0x96 is the truth table of a ^ b ^ c, 0xE8 that of the majority.
            // SAFETY: see above the impl.
            unsafe {
                (
                    _mm512_ternarylogic_epi64::<0x96>(a, b, c),
                    _mm512_ternarylogic_epi64::<0xE8>(a, b, c),
                )
            }
        }

        #[inline(always)]
        unsafe fn words(self) -> [u64; BLOCK_WORDS] {
            let mut words = [0; BLOCK_WORDS];
            // SAFETY: see above the impl.
            unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), self) };
            words
        }

        #[inline(always)]
        unsafe fn spread(digits: &[Self], counts: &mut [u8; BLOCK_USERS]) {
            let mut masks = [[0_u64; BLOCK_WORDS]; super::DIGITS];
            for (masks, digit) in masks.iter_mut().zip(digits) {
                // SAFETY: see above the impl.
                *masks = unsafe { digit.words() };
            }
            for (word, counts) in counts.as_chunks_mut::<64>().0.iter_mut().enumerate() {
                // SAFETY: see above the impl.
                unsafe {
                    let mut sum = _mm512_setzero_si512();
                    for (weight, masks) in masks[..digits.len()].iter().enumerate() {
                        let value = _mm512_set1_epi8((1_u8 << weight) as i8);
                        sum = _mm512_mask_add_epi8(sum, masks[word], sum, value);
                    }
                    _mm512_storeu_si512(counts.as_mut_ptr().cast(), sum);
                }
            }
        }

        #[inline(always)]
        unsafe fn at_least(counts: &[u8; 64], least: u8) -> u64 {
            // SAFETY: see above the impl.
            unsafe {
                let counts = _mm512_loadu_si512(counts.as_ptr().cast());
                _mm512_cmpge_epu8_mask(counts, _mm512_set1_epi8(least as i8))
            }
        }
    }

    // SAFETY of every block below: as above, for AVX2.
    impl Lanes for [__m256i; 2] {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see above the impl.
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        unsafe fn load(words: &[u64; BLOCK_WORDS]) -> Self {
            let at = words.as_ptr().cast::<__m256i>();
            // SAFETY: see above the impl; the second half starts 32 bytes on.
            unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
        }

        #[inline(always)]
        unsafe fn or(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe {
                [
                    _mm256_or_si256(self[0], other[0]),
                    _mm256_or_si256(self[1], other[1]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn xor(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe {
                [
                    _mm256_xor_si256(self[0], other[0]),
                    _mm256_xor_si256(self[1], other[1]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn and(self, other: Self) -> Self {
            // SAFETY: see above the impl.
            unsafe {
                [
                    _mm256_and_si256(self[0], other[0]),
                    _mm256_and_si256(self[1], other[1]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn add(a: Self, b: Self, c: Self) -> (Self, Self) {
            // SAFETY: as of the caller.
            unsafe {
                let half = a.xor(b);
                (half.xor(c), a.and(b).or(half.and(c)))
            }
        }

        #[inline(always)]
        unsafe fn words(self) -> [u64; BLOCK_WORDS] {
            let mut words = [0; BLOCK_WORDS];
            let at = words.as_mut_ptr().cast::<__m256i>();
            // SAFETY: see above the impl; 64 bytes are written to 8 u64.
            unsafe {
                _mm256_storeu_si256(at, self[0]);
                _mm256_storeu_si256(at.add(1), self[1]);
            }
            words
        }

        #[inline(always)]
        unsafe fn spread(digits: &[Self], counts: &mut [u8; BLOCK_USERS]) {
            let mut words = [[0_u32; BLOCK_USERS / 32]; super::DIGITS];
            for (words, digit) in words.iter_mut().zip(digits) {
                let at = words.as_mut_ptr().cast::<__m256i>();
                // SAFETY: see above the impl; 64 bytes are written to 16 u32.
                unsafe {
                    _mm256_storeu_si256(at, digit[0]);
                    _mm256_storeu_si256(at.add(1), digit[1]);
                }
            }
            for (word, counts) in counts.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                // SAFETY: see above the impl.
                unsafe {
                    // Byte i of the vector gets byte i / 8 of the word, then keeps bit i % 8.
                    let to_byte = _mm256_setr_epi64x(
                        0,
                        0x0101_0101_0101_0101,
                        0x0202_0202_0202_0202,
                        0x0303_0303_0303_0303,
                    );
                    let own_bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
                    let mut sum = _mm256_setzero_si256();
                    for (weight, words) in words[..digits.len()].iter().enumerate() {
                        let bytes =
                            _mm256_shuffle_epi8(_mm256_set1_epi32(words[word] as i32), to_byte);
                        let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own_bit), own_bit);
                        let value = _mm256_set1_epi8((1_u8 << weight) as i8);
                        sum = _mm256_add_epi8(sum, _mm256_and_si256(is_set, value));
                    }
                    _mm256_storeu_si256(counts.as_mut_ptr().cast(), sum);
                }
            }
        }

        #[inline(always)]
        unsafe fn at_least(counts: &[u8; 64], least: u8) -> u64 {
            let at = counts.as_ptr().cast::<__m256i>();
            let mut mask = 0;
            for half in 0..2 {
                // SAFETY: see above the impl; halves are 32 bytes apart.
                unsafe {
                    let counts = _mm256_loadu_si256(at.add(half));
                    let least = _mm256_set1_epi8(least as i8);
                    let is_hit = _mm256_cmpeq_epi8(_mm256_max_epu8(counts, least), counts);
                    let bits = _mm256_movemask_epi8(is_hit) as u32;
                    mask |= u64::from(bits) << (half * 32);
                }
            }
            mask
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    fn bitmap(random: &mut Philox, blocks: usize) -> Vec<u64> {
        let mut word = || u64::from(random.next_u32()) << 32 | u64::from(random.next_u32());
        (0..blocks * BLOCK_WORDS).map(|_| word() & word()).collect()
    }

    fn has(words: &[u64], place: usize) -> bool {
        words
            .get(place / 64)
            .is_some_and(|w| w >> (place % 64) & 1 == 1)
    }

    #[test]
    fn every_kernel_counts_as_one_by_one() {
        let mut random = Philox::new(1, 5);
        for n in [0, 1, 2, 3, 7, 8, 9, 17, 40, 64, 200, MAX_COUNTED] {
            let blocks = 1 + random.below(4) as usize;
            let mut one = || {
                let blocks = random.below(blocks as u32 + 2) as usize;
                bitmap(&mut random, blocks)
            };
            let singles: Vec<_> = (0..n - n / 3).map(|_| one()).collect();
            let pairs: Vec<_> = (0..n / 3)
                .map(|_| {
                    let (a, mut b) = (one(), one());
                    a.iter().zip(&mut b).for_each(|(a, b)| *b &= !a);
                    (a, b)
                })
                .collect();
            let bitmaps = Bitmaps {
                singles: singles.iter().map(Vec::as_slice).collect(),
                pairs: pairs.iter().map(|(a, b)| (&a[..], &b[..])).collect(),
            };
            let expected: Vec<u8> = (0..blocks * BLOCK_USERS)
                .map(|place| {
                    let single = singles.iter().filter(|words| has(words, place)).count();
                    let pair = |(a, b): &&(Vec<u64>, Vec<u64>)| has(a, place) || has(b, place);
                    (single + pairs.iter().filter(pair).count()) as u8
                })
                .collect();
            for &kernel in Kernel::present() {
                let mut counts = vec![7; blocks * BLOCK_USERS];
                kernel.count(&bitmaps, &mut counts);
                assert_eq!(counts, expected, "{kernel:?}, {n}");
                let lanes = kernel.lane_maxima(&counts);
                for (lane, max) in lanes.into_iter().enumerate() {
                    assert_eq!(Some(&max), expected.iter().skip(lane).step_by(64).max());
                }
                for least in [1, 2, n as u8 / 4] {
                    let mut found = Vec::new();
                    kernel.scan(&counts, least, &mut |place, count| {
                        found.push((place, count));
                        least
                    });
                    let all = expected.iter().copied().enumerate();
                    assert!(all.filter(|(_, count)| *count >= least).eq(found));
                }
            }
        }
    }

    #[test]
    fn every_kernel_finds_in_a_table_what_is_in_enough_rows() {
        let mut random = Philox::new(2, 5);
        for tokens in [1, 5, 8, 31, 32, 33, 63, 64, 100, MAX_COUNTED] {
            let mut table = vec![Row::default(); tokens];
            let mut expected = vec![0u8; TABLE_USERS];
            for (place, count) in expected.iter_mut().enumerate() {
                for row in &mut table {
                    // Few of all in the first half, so that numbers differ in size.
                    if random.below(if place < 700 { 12 } else { 3 }) == 0 {
                        row.flip(place);
                        *count += 1;
                    }
                }
            }
            // A token without a row is passed over.
            let mut asked: Vec<u32> = (0..tokens as u32).collect();
            if tokens < MAX_COUNTED {
                asked.push(tokens as u32 + 3);
            }
            for least in [1, 2, 9, tokens as u8 / 3] {
                for enough in [0, 3, 40, usize::MAX] {
                    let expected = told(&expected, least.max(1), enough);
                    for &kernel in Kernel::present() {
                        let mut found = Vec::new();
                        let least = least.max(1);
                        kernel.find(&table, &asked, least, enough, &mut |place, count| {
                            found.push((place, count));
                            least
                        });
                        assert_eq!(found, expected, "{kernel:?}, {tokens}, {least}, {enough}");
                    }
                }
            }
        }
    }

    /// What is told of these counts, where the asker never asks for more.
    fn told(counts: &[u8], least: u8, enough: usize) -> Vec<(usize, u8)> {
        let mut all = Vec::new();
        for (block, counts) in counts.chunks(BLOCK_USERS).enumerate() {
            let having = |least: u8| counts.iter().filter(|count| **count >= least).count();
            let mut from = least;
            while having(from) > enough && from < u8::MAX && having(from + 1) > enough {
                from += 1;
            }
            let counts = counts.iter().copied().enumerate();
            let some = counts.filter(|(_, count)| *count >= from);
            // The first that is told takes the asker's own number up again.
            let some: Vec<_> = some.collect();
            all.extend(
                some.into_iter()
                    .map(|(at, count)| (block * BLOCK_USERS + at, count)),
            );
        }
        all
    }
}
