//! Reading GGUF headers, with nothing believed.
//!
//! candle's own reader divides by zero on `general.alignment = 0` and lets a shape whose
//! product wraps around pass, so a file never reaches it: this parser checks every count
//! against the bytes that remain before it allocates, and every tensor against the file.
//! The tensors' bytes are then read by [`crate::weights`].
//!
//! Limits (far above any real model): 65,536 tensors and as many keys, names of 512 bytes,
//! strings of 1 MiB and 64 MiB of text in all, arrays of 4 Mi items nested 4 deep, rank 4,
//! alignment a power of two in 8..=4096. Format: ggml's `docs/gguf.md`, versions 2 and 3.

use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::io::Read;

/// What a GGUF file says about itself.
#[derive(Debug)]
pub struct Header {
    /// The key-value pairs.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors, by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// One tensor of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its storage format.
    pub dtype: GgmlDType,
    /// Its shape, the fastest dimension last (the reverse of the file's order).
    pub shape: Vec<usize>,
    /// Where its bytes begin, from the beginning of the file.
    pub start: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

/// A metadata value. All integers become i64, all floats f64.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any integer.
    Integer(i64),
    /// Any float.
    Float(f64),
    /// true or false.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of integers or bools.
    Integers(Vec<i64>),
    /// An array of floats.
    Floats(Vec<f64>),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of arrays.
    Arrays(Vec<Value>),
}

const TENSORS_MAX: u64 = 65_536;
const NAME_MAX: u64 = 512;
const STRING_MAX: u64 = 1 << 20;
const TEXT_MAX: u64 = 64 << 20;
const ARRAY_MAX: u64 = 4 << 20;
const DEPTH_MAX: usize = 4;

impl Header {
    /// Reads and checks the header of a file of `file_bytes` bytes; `name` is for messages.
    pub fn read(name: &str, from: impl Read, file_bytes: u64) -> Result<Self> {
        let mut parser = Parser {
            name,
            from,
            at: 0,
            end: file_bytes,
            text: 0,
        };
        parser.header()
    }

    /// The integer under `key`.
    pub fn integer(&self, key: &str) -> Option<i64> {
        match self.metadata.get(key)? {
            Value::Integer(i) => Some(*i),
            _ => None,
        }
    }

    /// The number under `key`.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Float(x) => Some(*x),
            Value::Integer(i) => Some(*i as f64),
            _ => None,
        }
    }

    /// The bool under `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// The string under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::Text(s) => Some(s),
            _ => None,
        }
    }

    /// The strings under `key`.
    pub fn texts(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            Value::Texts(s) => Some(s),
            _ => None,
        }
    }

    /// The integers under `key`.
    pub fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            Value::Integers(s) => Some(s),
            _ => None,
        }
    }
}

/// The storage format behind a GGUF type number.
pub fn storage_type(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Whether every scale in the blocks of a quantised tensor is a finite number.
pub fn scales_are_finite(dtype: GgmlDType, blocks: &[u8]) -> bool {
    let size = dtype.type_size();
    // Where in a block its f16 scales stand.
    let scales = match dtype {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => 0..2,
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => 0..4,
        GgmlDType::Q2K => size - 4..size,
        GgmlDType::Q3K | GgmlDType::Q6K => size - 2..size,
        GgmlDType::F16 => 0..2,
        GgmlDType::BF16 => return all_finite::<2>(blocks, 0x7f80),
        GgmlDType::F32 => return all_finite::<4>(blocks, 0x7f80_0000),
        GgmlDType::Q8_1 | GgmlDType::Q8K => return false,
    };
    blocks
        .chunks_exact(size)
        .all(|block| all_finite::<2>(&block[scales.clone()], 0x7c00))
}

/// Whether no little-endian float of `N` bytes has all its exponent bits set.
pub(crate) fn all_finite<const N: usize>(bytes: &[u8], exponent: u32) -> bool {
    // Counting instead of stopping early lets the compiler use vectors.
    let bad: usize = bytes
        .chunks_exact(N)
        .map(|c| {
            let mut word = [0u8; 4];
            word[..N].copy_from_slice(c);
            usize::from(u32::from_le_bytes(word) & exponent == exponent)
        })
        .sum();
    bad == 0
}

struct Parser<'a, R> {
    name: &'a str,
    from: R,
    at: u64,
    end: u64,
    /// Bytes of string read so far.
    text: u64,
}

impl<R: Read> Parser<'_, R> {
    fn bad<T>(&self, reason: impl std::fmt::Display) -> Result<T> {
        Err(Error::bad_model(
            self.name,
            format!("damaged GGUF header at byte {}: {reason}", self.at),
        ))
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut buffer = [0; N];
        self.fill(&mut buffer)?;
        Ok(buffer)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        if (buffer.len() as u64) > self.end - self.at {
            return self.bad("the file ends within it (truncated download?)");
        }
        if let Err(e) = self.from.read_exact(buffer) {
            return self.bad(e);
        }
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    /// A count of things of at least `min_bytes` bytes each, at most `max` of them.
    fn count(&mut self, what: &str, max: u64, min_bytes: u64) -> Result<usize> {
        let n = self.u64()?;
        let fits = n
            .checked_mul(min_bytes)
            .is_some_and(|b| b <= self.end - self.at);
        if n > max || !fits {
            return self.bad(format!(
                "{n} {what}; at most {max}, and no more than the file has bytes for"
            ));
        }
        Ok(n as usize)
    }

    fn string(&mut self, what: &str, max: u64) -> Result<String> {
        let n = self.count(what, max, 1)?;
        self.text += n as u64;
        if self.text > TEXT_MAX {
            return self.bad(format!("more than {TEXT_MAX} bytes of text"));
        }
        let mut buffer = vec![0; n];
        self.fill(&mut buffer)?;
        match String::from_utf8(buffer) {
            Ok(s) => Ok(s),
            Err(_) => self.bad(format!("{what} that are not UTF-8")),
        }
    }

    fn header(&mut self) -> Result<Header> {
        if self.end < 24 || &self.bytes::<4>()? != b"GGUF" {
            return self.bad("no GGUF file");
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return self.bad(format!(
                "version {version}; 2 and 3 are known, and only little-endian"
            ));
        }
        // A tensor's entry takes at least 8 + 4 + 8 + 4 + 8 bytes, a key's 8 + 4 + 1.
        let tensors = self.count("tensors", TENSORS_MAX, 32)?;
        let keys = self.count("keys", TENSORS_MAX, 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = self.string("bytes of key", NAME_MAX)?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return self.bad(format!("the key {key:?} twice"));
            }
        }
        let mut infos = BTreeMap::new();
        for _ in 0..tensors {
            let (name, info) = self.tensor()?;
            if infos.insert(name.clone(), info).is_some() {
                return self.bad(format!("the tensor {name:?} twice"));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(a @ 8..=4096)) if (*a as u64).is_power_of_two() => *a as u64,
            Some(other) => {
                return self.bad(format!(
                    "general.alignment {other:?}; a power of two in 8..=4096 is needed"
                ));
            }
        };
        self.place(&mut infos, alignment)?;
        Ok(Header {
            metadata,
            tensors: infos,
        })
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0..=5 | 10 | 11 => Value::Integer(self.integer(kind)?),
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.integer(7)? != 0),
            8 => Value::Text(self.string("bytes of string", STRING_MAX)?),
            9 => self.array(depth + 1)?,
            _ => return self.bad(format!("value of unknown type {kind}")),
        })
    }

    fn integer(&mut self, kind: u32) -> Result<i64> {
        Ok(match kind {
            0 | 7 => i64::from(self.bytes::<1>()?[0]),
            1 => i64::from(self.bytes::<1>()?[0] as i8),
            2 => i64::from(u16::from_le_bytes(self.bytes()?)),
            3 => i64::from(i16::from_le_bytes(self.bytes()?)),
            4 => i64::from(self.u32()?),
            5 => i64::from(self.u32()? as i32),
            10 => match i64::try_from(self.u64()?) {
                Ok(i) => i,
                Err(_) => return self.bad("an integer over 2^63"),
            },
            _ => self.u64()? as i64,
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        Ok(match kind {
            6 => f64::from(f32::from_le_bytes(self.bytes()?)),
            _ => f64::from_le_bytes(self.bytes()?),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Value> {
        if depth > DEPTH_MAX {
            return self.bad(format!("arrays nested deeper than {DEPTH_MAX}"));
        }
        let kind = self.u32()?;
        let item_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => return self.bad(format!("array of unknown type {kind}")),
        };
        let n = self.count("array items", ARRAY_MAX, item_bytes)?;
        Ok(match kind {
            6 | 12 => Value::Floats((0..n).map(|_| self.float(kind)).collect::<Result<_>>()?),
            8 => Value::Texts(
                (0..n)
                    .map(|_| self.string("bytes of string", STRING_MAX))
                    .collect::<Result<_>>()?,
            ),
            9 => Value::Arrays(
                (0..n)
                    .map(|_| self.array(depth + 1))
                    .collect::<Result<_>>()?,
            ),
            _ => Value::Integers((0..n).map(|_| self.integer(kind)).collect::<Result<_>>()?),
        })
    }

    /// One tensor's entry; `start` is still relative to the data.
    fn tensor(&mut self) -> Result<(String, TensorInfo)> {
        let name = self.string("bytes of tensor name", NAME_MAX)?;
        let rank = self.u32()?;
        if !(1..=4).contains(&rank) {
            return self.bad(format!("tensor {name:?} of rank {rank}; 1 to 4 are known"));
        }
        let mut shape = Vec::with_capacity(4);
        for _ in 0..rank {
            shape.push(self.u64()?);
        }
        let number = self.u32()?;
        let Some(dtype) = storage_type(number) else {
            return self.bad(format!(
                "tensor {name:?} in format {number}; known are F32, F16, BF16, Q4_0, Q4_1, \
                 Q5_0, Q5_1, Q8_0 and the K-quants"
            ));
        };
        let start = self.u64()?;
        let block = dtype.block_size() as u64;
        let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
        let bytes = elements
            .filter(|n| *n > 0 && shape[0].is_multiple_of(block))
            .and_then(|n| (n / block).checked_mul(dtype.type_size() as u64))
            .filter(|bytes| *bytes <= self.end);
        let Some(bytes) = bytes else {
            return self.bad(format!(
                "tensor {name:?} of shape {shape:?} as {dtype:?}: it must not be empty nor \
                 larger than the file, and its first dimension a multiple of {block}"
            ));
        };
        let shape = shape.iter().rev().map(|d| *d as usize).collect();
        Ok((
            name,
            TensorInfo {
                dtype,
                shape,
                start,
                bytes,
            },
        ))
    }

    /// Makes the offsets absolute and sees that the tensors lie in the file, one after the
    /// other.
    fn place(&self, infos: &mut BTreeMap<String, TensorInfo>, alignment: u64) -> Result<()> {
        let data = self.at.next_multiple_of(alignment);
        let mut spans = Vec::with_capacity(infos.len());
        for (name, info) in infos.iter_mut() {
            let start = data.checked_add(info.start);
            let end = start.and_then(|s| s.checked_add(info.bytes));
            let (Some(start), Some(end)) = (start, end) else {
                return self.bad(format!("tensor {name:?} begins at {}", info.start));
            };
            if !info.start.is_multiple_of(alignment) || end > self.end {
                return self.bad(format!(
                    "tensor {name:?} at bytes {start}..{end} of {}: outside of the file \
                     (truncated download?) or not aligned to {alignment}",
                    self.end
                ));
            }
            info.start = start;
            spans.push((start, end, name.as_str()));
        }
        spans.sort_unstable();
        for pair in spans.windows(2) {
            if pair[1].0 < pair[0].1 {
                return self.bad(format!(
                    "tensors {:?} and {:?} overlap",
                    pair[0].2, pair[1].2
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes small GGUF files, right or wrong.
    pub(crate) struct Writer(pub Vec<u8>);

    impl Writer {
        pub(crate) fn new(tensors: u64, keys: u64) -> Self {
            let mut w = Self(b"GGUF".to_vec());
            w.u32(3).u64(tensors).u64(keys);
            w
        }
        pub(crate) fn u32(&mut self, x: u32) -> &mut Self {
            self.0.extend(x.to_le_bytes());
            self
        }
        pub(crate) fn u64(&mut self, x: u64) -> &mut Self {
            self.0.extend(x.to_le_bytes());
            self
        }
        pub(crate) fn text(&mut self, s: &str) -> &mut Self {
            self.u64(s.len() as u64);
            self.0.extend(s.as_bytes());
            self
        }
        pub(crate) fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, at: u64) -> &mut Self {
            self.text(name).u32(dims.len() as u32);
            for d in dims {
                self.u64(*d);
            }
            self.u32(kind).u64(at)
        }
        pub(crate) fn pad(&mut self, alignment: usize, data: usize) -> Vec<u8> {
            let n = self.0.len().next_multiple_of(alignment) + data;
            self.0.resize(n, 0);
            self.0.clone()
        }
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        Header::read("test.gguf", bytes, bytes.len() as u64)
    }

    fn refused(bytes: &[u8], because: &str) {
        let message = read(bytes).expect_err(because).to_string();
        assert!(message.contains(because), "{message:?} lacks {because:?}");
    }

    #[test]
    fn a_sound_file_is_read() {
        let mut w = Writer::new(2, 3);
        w.text("general.alignment").u32(4).u32(64);
        w.text("names").u32(9).u32(8).u64(2).text("a").text("bc");
        w.text("theta").u32(6).u32(1.5f32.to_bits());
        w.tensor("x", &[32, 2], 8, 0).tensor("y", &[3], 0, 128);
        let bytes = w.pad(64, 128 + 12);
        let h = read(&bytes).unwrap();
        assert_eq!(h.texts("names").unwrap(), ["a", "bc"]);
        assert_eq!(h.float("theta"), Some(1.5));
        assert_eq!(h.tensors["x"].shape, [2, 32]);
        assert_eq!(h.tensors["x"].bytes, 68);
        assert_eq!(h.tensors["y"].start as usize, bytes.len() - 12);
        for cut in 0..bytes.len() {
            assert!(read(&bytes[..cut]).is_err(), "cut at {cut} passed");
        }
    }

    #[test]
    fn alignment_zero_in_57_bytes_is_refused() {
        let mut w = Writer::new(0, 1);
        w.text("general.alignment").u32(4).u32(0);
        assert_eq!(w.0.len(), 57);
        refused(&w.0, "general.alignment");
    }

    #[test]
    fn a_shape_whose_product_wraps_is_refused() {
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[1 << 33, 1 << 33], 0, 0);
        refused(&w.pad(32, 64), "larger than the file");
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[1 << 32, 1 << 32], 0, 0);
        refused(&w.pad(32, 64), "larger than the file");
    }

    #[test]
    fn huge_counts_are_refused_before_anything_is_allocated() {
        refused(&Writer::new(1 << 63, 0).pad(32, 64), "tensors");
        refused(&Writer::new(0, u64::MAX).pad(32, 64), "keys");
        let mut w = Writer::new(0, 1);
        w.text("a").u32(9).u32(0).u64(1 << 63);
        refused(&w.pad(32, 64), "array items");
        let mut w = Writer::new(0, 1);
        w.text("a").u32(8).u64(1 << 62);
        refused(&w.pad(32, 64), "bytes of string");
    }

    #[test]
    fn deeply_nested_arrays_are_refused() {
        let mut w = Writer::new(0, 1);
        w.text("a").u32(9);
        for _ in 0..2000 {
            w.u32(9).u64(1);
        }
        refused(&w.pad(32, 64), "nested deeper");
    }

    #[test]
    fn tensors_that_overlap_or_leave_the_file_are_refused() {
        let mut w = Writer::new(2, 0);
        w.tensor("x", &[16], 0, 0).tensor("y", &[16], 0, 32);
        refused(&w.pad(32, 128), "overlap");
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[16], 0, 64);
        refused(&w.pad(32, 64), "outside of the file");
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[16], 0, u64::MAX - 31);
        refused(&w.pad(32, 64), "begins at");
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[16], 0, 8);
        refused(&w.pad(32, 128), "not aligned");
    }

    #[test]
    fn names_given_twice_are_refused() {
        let mut w = Writer::new(2, 0);
        w.tensor("x", &[8], 0, 0).tensor("x", &[8], 0, 32);
        refused(&w.pad(32, 64), "twice");
    }

    #[test]
    fn no_prefix_or_flipped_byte_makes_the_parser_panic() {
        let mut w = Writer::new(1, 2);
        w.text("names").u32(9).u32(8).u64(2).text("a").text("bc");
        w.text("n").u32(10).u64(7);
        w.tensor("x", &[32, 2], 3, 0);
        let sound = w.pad(32, 40);
        for at in 0..sound.len() {
            for bit in 0..8 {
                let mut bytes = sound.clone();
                bytes[at] ^= 1 << bit;
                let _ = read(&bytes);
            }
        }
    }

    #[test]
    fn a_scale_that_is_not_a_number_is_seen() {
        let mut block = vec![0u8; 20];
        assert!(scales_are_finite(GgmlDType::Q4_1, &block));
        block[3] = 0x7e;
        assert!(!scales_are_finite(GgmlDType::Q4_1, &block));
        // Quants may have any bits.
        assert!(scales_are_finite(
            GgmlDType::Q8_0,
            &[[0, 0].as_slice(), &[255; 32]].concat()
        ));
    }
}
