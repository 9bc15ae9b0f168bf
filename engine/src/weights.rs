//! Named tensors from model files: safetensors (one file, or a folder of shards), GGUF, or
//! bytes in memory.
//!
//! The kind of file is told by its first bytes, never by its name. Pickle is refused: it is
//! a program, not data. Headers are checked here, within the limits below, before anything
//! is allocated; files are read, not mapped, because a mapped file that another process
//! truncates kills this one.
//!
//! Limits for safetensors: header 10 MB, 65,536 tensors, rank 8, names of 512 bytes, 64 KiB
//! of `__metadata__`, no name twice, the tensors side by side and filling the file exactly.
//! Those of GGUF stand in [`crate::gguf`].

use crate::gguf::{self, all_finite};
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::VarBuilder;
use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const HEADER_MAX: u64 = 10_000_000;
const TENSORS_MAX: usize = 65_536;
const NAME_MAX: usize = 512;
const RANK_MAX: usize = 8;
const METADATA_MAX: usize = 64 << 10;
const INDEX_MAX: u64 = 32 << 20;
const SHARDS_MAX: usize = 1024;

/// How a tensor is stored in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE.
    F16,
    /// Upper half of a 32-bit float.
    BF16,
    /// 8-bit float with 4 exponent bits, without infinities.
    F8E4M3,
    /// Signed 64-bit integer.
    I64,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Byte or bool.
    U8,
    /// One of GGUF's formats.
    Ggml(GgmlDType),
}

impl Stored {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "F64" => Self::F64,
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "F8_E4M3" => Self::F8E4M3,
            "I64" => Self::I64,
            "I32" => Self::I32,
            "U32" => Self::U32,
            "U8" | "BOOL" => Self::U8,
            _ => return None,
        })
    }

    /// Bytes of one number.
    fn size(self) -> u64 {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 | Self::U8 => 1,
            Self::Ggml(d) => d.type_size() as u64,
        }
    }

    /// The tensor type that holds it without loss.
    fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 | Self::F8E4M3 | Self::Ggml(_) => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::I64 => DType::I64,
            Self::I32 => DType::I32,
            Self::U32 => DType::U32,
            Self::U8 => DType::U8,
        }
    }
}

/// Where the bytes of a file are.
#[derive(Debug)]
enum Source {
    File(PathBuf, Mutex<File>),
    Bytes(String, Vec<u8>),
}

impl Source {
    fn name(&self) -> String {
        match self {
            Self::File(path, _) => path.display().to_string(),
            Self::Bytes(name, _) => name.clone(),
        }
    }

    fn read(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        match self {
            Self::Bytes(_, bytes) => Ok(bytes[start as usize..(start + len) as usize].to_vec()),
            Self::File(path, file) => {
                let mut file = file
                    .lock()
                    .map_err(|_| Error::bad_model(self.name(), "a reader of it panicked"))?;
                let mut bytes = vec![0; len as usize];
                file.seek(SeekFrom::Start(start))
                    .and_then(|_| file.read_exact(&mut bytes))
                    .map_err(Error::io(path))?;
                Ok(bytes)
            }
        }
    }
}

#[derive(Debug)]
struct Entry {
    source: usize,
    stored: Stored,
    shape: Vec<usize>,
    start: u64,
    bytes: u64,
}

/// Named tensors, read from their files when asked for.
#[derive(Clone, Debug)]
pub struct Weights(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    sources: Vec<Source>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    gguf: Option<gguf::Header>,
}

impl Weights {
    /// Opens a safetensors or GGUF file, or a folder that holds one: sharded
    /// (`*.safetensors.index.json`) or whole.
    ///
    /// Reads and checks headers only. Errors name the file, what was expected and what was
    /// found.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return open_folder(path);
        }
        let mut inner = Inner::empty(path.display().to_string());
        inner.add_file(path)?;
        Ok(Self(Arc::new(inner)))
    }

    /// The same from bytes in memory; `name` is for messages.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        let mut inner = Inner::empty(name.into());
        inner.add(&bytes[..], bytes.len() as u64, name)?;
        inner.sources.push(Source::Bytes(name.into(), bytes));
        Ok(Self(Arc::new(inner)))
    }

    /// The file or folder.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.entries.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.0.entries.contains_key(name)
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.0.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// How a tensor is stored.
    pub fn stored(&self, name: &str) -> Option<Stored> {
        self.0.entries.get(name).map(|e| e.stored)
    }

    /// The `__metadata__` of the safetensors file or files.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// The header, where this is a GGUF file.
    pub fn gguf(&self) -> Option<&gguf::Header> {
        self.0.gguf.as_ref()
    }

    /// A tensor of the expected shape as `dtype` on `device`; GGUF's are dequantised.
    ///
    /// Fails when it is missing, has another shape, or holds a number that is not finite.
    pub fn get(
        &self,
        name: &str,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.expect_shape(name, shape.into().dims())?;
        self.get_any(name, dtype, device)
    }

    /// A tensor of whatever shape it has.
    pub fn get_any(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (entry, bytes) = self.read(name)?;
        let tensor = match entry.stored {
            Stored::Ggml(ggml) => {
                quantised(ggml, &bytes, &entry.shape, &Device::Cpu)?.dequantize(&Device::Cpu)?
            }
            Stored::F8E4M3 => {
                let table: Vec<f32> = (0..=255).map(f8e4m3).collect();
                let values = bytes.iter().map(|b| table[*b as usize]).collect();
                Tensor::from_vec(values, entry.shape.as_slice(), &Device::Cpu)?
            }
            stored => Tensor::from_raw_buffer(&bytes, stored.dtype(), &entry.shape, &Device::Cpu)?,
        };
        Ok(match device {
            Device::Cpu => tensor.to_dtype(dtype)?,
            // Converting after the transfer moves the smaller of the two.
            _ if dtype.size_in_bytes() < tensor.dtype().size_in_bytes() => {
                tensor.to_dtype(dtype)?.to_device(device)?
            }
            _ => tensor.to_device(device)?.to_dtype(dtype)?,
        })
    }

    /// The bytes of a tensor as they are stored, with its format and shape.
    pub fn raw(&self, name: &str) -> Result<(Stored, &[usize], Vec<u8>)> {
        let (entry, bytes) = self.read(name)?;
        Ok((entry.stored, &entry.shape, bytes))
    }

    /// A tensor of a GGUF file in its quantised form.
    pub fn get_quantised(
        &self,
        name: &str,
        shape: impl Into<Shape>,
        device: &Device,
    ) -> Result<QTensor> {
        self.expect_shape(name, shape.into().dims())?;
        let (entry, bytes) = self.read(name)?;
        match entry.stored {
            Stored::Ggml(ggml) => quantised(ggml, &bytes, &entry.shape, device),
            other => Err(self.bad(name, format!("expected a GGUF tensor, got {other:?}"))),
        }
    }

    /// candle's way to reach the tensors, for models written with `vb.pp("name")`.
    pub fn var_builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// Fails unless the tensor exists and has this shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        match self.shape(name) {
            Some(got) if got == shape => Ok(()),
            Some(got) => Err(self.bad(name, format!("expected shape {shape:?}, got {got:?}"))),
            None => Err(self.missing(name)),
        }
    }

    fn missing(&self, name: &str) -> Error {
        let some: Vec<&str> = self.names().take(3).collect();
        Error::bad_model(
            &self.0.name,
            format!(
                "has no tensor {name:?} (it has {}, such as {some:?}): a model of another kind?",
                self.0.entries.len()
            ),
        )
    }

    fn bad(&self, tensor: &str, reason: impl std::fmt::Display) -> Error {
        Error::bad_model(&self.0.name, format!("tensor {tensor:?}: {reason}"))
    }

    fn read(&self, name: &str) -> Result<(&Entry, Vec<u8>)> {
        let entry = self.0.entries.get(name).ok_or_else(|| self.missing(name))?;
        let bytes = self.0.sources[entry.source].read(entry.start, entry.bytes)?;
        let finite = match entry.stored {
            Stored::F32 => all_finite::<4>(&bytes, 0x7f80_0000),
            Stored::F16 => all_finite::<2>(&bytes, 0x7c00),
            Stored::BF16 => all_finite::<2>(&bytes, 0x7f80),
            Stored::F8E4M3 => bytes.iter().all(|b| b & 0x7f != 0x7f),
            Stored::F64 => bytes
                .chunks_exact(8)
                .all(|c| f64::from_le_bytes(c.try_into().unwrap_or([0xff; 8])).is_finite()),
            Stored::Ggml(dtype) => gguf::scales_are_finite(dtype, &bytes),
            Stored::I64 | Stored::I32 | Stored::U32 | Stored::U8 => true,
        };
        match finite {
            true => Ok((entry, bytes)),
            false => Err(self.bad(name, "holds a number that is not finite (NaN or infinity)")),
        }
    }
}

impl candle_nn::var_builder::SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.get(name, shape, dtype, device)
            .map_err(candle_core::Error::wrap)
    }

    fn get_unchecked(
        &self,
        name: &str,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.get_any(name, dtype, device)
            .map_err(candle_core::Error::wrap)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.contains(name)
    }
}

/// A quantised tensor from its blocks.
pub(crate) fn quantised(
    dtype: GgmlDType,
    blocks: &[u8],
    shape: &[usize],
    device: &Device,
) -> Result<QTensor> {
    // candle reads blocks in place and insists on their alignment.
    let mut room = vec![0u8; blocks.len() + 16];
    let skip = room.as_ptr().align_offset(16);
    room[skip..skip + blocks.len()].copy_from_slice(blocks);
    let aligned = Cow::Borrowed(&room[skip..skip + blocks.len()]);
    Ok(QTensor::new(
        QStorage::from_data(aligned, device, dtype)?,
        shape,
    )?)
}

/// The value of an 8-bit float (S.1111.111 is NaN, the rest finite).
pub(crate) fn f8e4m3(bits: u8) -> f32 {
    let sign = if bits & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    sign * match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// The nearest 8-bit float, ties to even; what is larger than 448 becomes that.
pub(crate) fn to_f8e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let size = x.abs();
    sign | if size.is_nan() {
        0x7f
    } else if size < 2f32.powi(-6) {
        // Eighths of the least normal one; eight of them are that.
        (size * 512.0).round_ties_even() as u8
    } else {
        let bits = size.min(448.0).to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        // The exponent's bias is 7 where a float's is 127.
        ((rounded >> 20) - (120 << 3)).min(0x7e) as u8
    }
}

// ----------------------------------------------------------------------------- opening

impl Inner {
    fn empty(name: String) -> Self {
        Self {
            name,
            sources: Vec::new(),
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
            gguf: None,
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let mut file = open_model_file(path)?;
        let bytes = file.metadata().map_err(Error::io(path))?.len();
        self.add(
            BufReader::new(&mut file),
            bytes,
            &path.display().to_string(),
        )?;
        self.sources
            .push(Source::File(path.into(), Mutex::new(file)));
        Ok(())
    }

    /// Adds the tensors of a file that will be the next source.
    fn add(&mut self, mut from: impl Read, bytes: u64, name: &str) -> Result<()> {
        let mut start = [0u8; 9];
        let got =
            read_up_to(&mut from, &mut start).map_err(|e| Error::bad_model(name, e.to_string()))?;
        let start = &start[..got];
        let source = self.sources.len();
        if start.starts_with(b"GGUF") {
            if source > 0 {
                return Err(Error::bad_model(name, "a GGUF file among several"));
            }
            let header = gguf::Header::read(name, start.chain(from), bytes)?;
            for (tensor, info) in &header.tensors {
                let entry = Entry {
                    source,
                    stored: Stored::Ggml(info.dtype),
                    shape: info.shape.clone(),
                    start: info.start,
                    bytes: info.bytes,
                };
                self.entries.insert(tensor.clone(), entry);
            }
            self.gguf = Some(header);
            return Ok(());
        }
        let header_bytes = match start {
            [len @ .., b'{'] if len.len() == 8 => {
                len.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))
            }
            _ => return Err(refuse(name, start)),
        };
        // The first byte of the header has been read: an empty one is none.
        if header_bytes == 0 || header_bytes > HEADER_MAX || header_bytes + 8 > bytes {
            if is_pickle(start) {
                return Err(refuse(name, start));
            }
            return Err(Error::bad_model(
                name,
                format!(
                    "safetensors header of {header_bytes} bytes; expected 1 to {HEADER_MAX} and no \
                     more than the file's {bytes} (truncated download?)"
                ),
            ));
        }
        let mut header = vec![b'{'; header_bytes as usize];
        from.read_exact(&mut header[1..])
            .map_err(|e| Error::bad_model(name, e.to_string()))?;
        let parsed: RawHeader = serde_json::from_slice(&header)
            .map_err(|e| Error::bad_model(name, format!("safetensors header: {e}")))?;
        self.add_safetensors(parsed, header_bytes + 8, bytes, name)
    }

    fn add_safetensors(
        &mut self,
        header: RawHeader,
        data: u64,
        file_bytes: u64,
        name: &str,
    ) -> Result<()> {
        let source = self.sources.len();
        let bad = |reason: String| Err(Error::bad_model(name, reason));
        let text: usize = header.metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
        if text > METADATA_MAX {
            return bad(format!("{text} bytes of metadata; at most {METADATA_MAX}"));
        }
        let mut spans = Vec::with_capacity(header.tensors.len());
        for (tensor, raw) in header.tensors {
            if tensor.len() > NAME_MAX || raw.shape.len() > RANK_MAX {
                return bad(format!(
                    "tensor {:.64?}: names of {NAME_MAX} bytes and rank {RANK_MAX} at most",
                    tensor
                ));
            }
            let Some(stored) = Stored::from_name(&raw.dtype) else {
                return bad(format!(
                    "tensor {tensor:?}: dtype {:.32?}; known are F64, F32, F16, BF16, F8_E4M3, \
                     I64, I32, U32, U8, BOOL",
                    raw.dtype
                ));
            };
            let [begin, end] = raw.data_offsets;
            let bytes = raw
                .shape
                .iter()
                .try_fold(stored.size(), |n, d| n.checked_mul(*d));
            if bytes.is_none() || end.checked_sub(begin) != bytes || end > file_bytes - data {
                return bad(format!(
                    "tensor {tensor:?} of shape {:?} as {} at data bytes {begin}..{end} of {}: \
                     its size differs or it leaves the file (truncated download?)",
                    raw.shape,
                    raw.dtype,
                    file_bytes - data
                ));
            }
            spans.push((begin, end, tensor.clone()));
            let entry = Entry {
                source,
                stored,
                shape: raw.shape.iter().map(|d| *d as usize).collect(),
                start: data + begin,
                bytes: end - begin,
            };
            if self.entries.insert(tensor.clone(), entry).is_some() {
                return bad(format!("the tensor {tensor:?} twice"));
            }
        }
        spans.sort_unstable();
        let mut at = 0;
        for (begin, end, tensor) in spans {
            if begin != at {
                return bad(format!(
                    "tensor {tensor:?} begins at {begin}, expected {at}"
                ));
            }
            at = end;
        }
        if at != file_bytes - data {
            return bad(format!(
                "the tensors end at data byte {at}, the file at {}",
                file_bytes - data
            ));
        }
        self.metadata.extend(header.metadata);
        Ok(())
    }
}

fn open_model_file(path: &Path) -> Result<File> {
    match File::open(path) {
        Ok(file) => Ok(file),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(Error::MissingModel {
            path: path.into(),
            help: "fetch it with `simpatico models pull`".into(),
        }),
        Err(e) => Err(Error::io(path)(e)),
    }
}

fn read_up_to(from: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match from.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

fn is_pickle(start: &[u8]) -> bool {
    start.starts_with(b"PK\x03\x04") || (start.first() == Some(&0x80) && start.get(1) < Some(&6))
}

fn refuse(name: &str, start: &[u8]) -> Error {
    let reason = if is_pickle(start) {
        "a pickle or zip archive (PyTorch .pt, .bin, .ckpt): it can run code when loaded, so \
         it is refused whatever its name; convert it to safetensors first"
            .into()
    } else {
        format!("neither safetensors nor GGUF: it begins with {start:02x?}")
    };
    Error::bad_model(name, reason)
}

/// A safetensors header as it stands in the file.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: de::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader {
                    metadata: BTreeMap::new(),
                    tensors: Vec::new(),
                };
                let mut described = false;
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        if std::mem::replace(&mut described, true) {
                            return Err(de::Error::custom("__metadata__ twice"));
                        }
                        header.metadata = map.next_value()?;
                    } else if header.tensors.len() == TENSORS_MAX {
                        return Err(de::Error::custom(format!("over {TENSORS_MAX} tensors")));
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        d.deserialize_map(Entries)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn open_folder(folder: &Path) -> Result<Weights> {
    let mut files = Vec::new();
    for item in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let item = item.map_err(Error::io(folder))?;
        if let Ok(name) = item.file_name().into_string() {
            files.push(name);
        }
    }
    files.sort();
    let with = |ending: &str| {
        files
            .iter()
            .filter(|f| f.ends_with(ending))
            .collect::<Vec<_>>()
    };
    let mut inner = Inner::empty(folder.display().to_string());
    match with(".safetensors.index.json")[..] {
        [] => {}
        [index] => {
            add_shards(&mut inner, folder, index)?;
            return Ok(Weights(Arc::new(inner)));
        }
        _ => {
            return Err(Error::bad_model(
                &inner.name,
                "holds several .safetensors.index.json; name one file",
            ));
        }
    }
    let whole = with(".safetensors");
    let file = match (&whole[..], &with(".gguf")[..]) {
        ([one], _) | ([], [one]) => *one,
        ([], []) => {
            return Err(Error::MissingModel {
                path: folder.join("model.safetensors"),
                help: "the folder holds neither .safetensors nor .gguf".into(),
            });
        }
        _ => match files.iter().find(|f| *f == "model.safetensors") {
            Some(f) => f,
            None => {
                return Err(Error::bad_model(
                    &inner.name,
                    "holds several model files; name one",
                ));
            }
        },
    };
    inner.add_file(&folder.join(file))?;
    Ok(Weights(Arc::new(inner)))
}

fn add_shards(inner: &mut Inner, folder: &Path, index: &str) -> Result<()> {
    let path = folder.join(index);
    let text = read_text(&path, INDEX_MAX)?;
    let bad = |reason: String| Err(Error::bad_model(path.display().to_string(), reason));
    let index: Index = match serde_json::from_str(&text) {
        Ok(index) => index,
        Err(e) => return bad(e.to_string()),
    };
    let shards: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    if shards.len() > SHARDS_MAX {
        return bad(format!("{} shards; at most {SHARDS_MAX}", shards.len()));
    }
    for shard in shards {
        // A name from a file is never a path.
        if shard.contains(['/', '\\', ':']) || shard.starts_with('.') {
            return bad(format!(
                "the shard name {shard:.64?} is not a plain file name"
            ));
        }
        inner.add_file(&folder.join(shard))?;
    }
    match index
        .weight_map
        .keys()
        .find(|t| !inner.entries.contains_key(*t))
    {
        Some(tensor) => bad(format!("lists the tensor {tensor:?}, but no shard has it")),
        None => Ok(()),
    }
}

/// A text file of at most `max` bytes.
pub(crate) fn read_text(path: &Path, max: u64) -> Result<String> {
    let file = open_model_file(path)?;
    let mut text = String::new();
    let read = file.take(max + 1).read_to_string(&mut text);
    match read {
        Ok(n) if n as u64 <= max => Ok(text),
        Ok(_) => Err(Error::bad_model(
            path.display().to_string(),
            format!("larger than {max} bytes"),
        )),
        Err(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            Err(Error::bad_model(path.display().to_string(), "not UTF-8"))
        }
        Err(e) => Err(Error::io(path)(e)),
    }
}

// ------------------------------------------------------------------------------ saving

/// Writes tensors and metadata as safetensors, byte for byte as the Python library does.
/// The file appears whole or not at all.
pub fn save_safetensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    write_whole(path, &to_safetensors(tensors, metadata)?)
}

/// Writes a file under a temporary name and renames it.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|e| {
        // The error that matters is the first one.
        let _ = std::fs::remove_file(&temporary);
        Error::io(path)(e)
    })
}

/// The bytes of such a file: the widest dtype first, then by name, as the Python library
/// orders them.
pub fn to_safetensors(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut order = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let (rank, dtype) = match tensor.dtype() {
            DType::F64 => (0, "F64"),
            DType::I64 => (1, "I64"),
            DType::F32 => (2, "F32"),
            DType::U32 => (3, "U32"),
            DType::I32 => (4, "I32"),
            DType::BF16 => (5, "BF16"),
            DType::F16 => (6, "F16"),
            DType::U8 => (7, "U8"),
            other => {
                return Err(Error::BadRequest(format!(
                    "tensor {name:?}: {other:?} cannot be saved"
                )));
            }
        };
        order.push((rank, name, dtype, tensor));
    }
    order.sort_by_key(|(rank, name, _, _)| (*rank, *name));

    let mut header = String::from("{");
    if !metadata.is_empty() {
        header.push_str("\"__metadata__\":");
        header.push_str(&json(metadata)?);
    }
    let mut data = Vec::new();
    for (_, name, dtype, tensor) in order {
        let begin = data.len();
        append_bytes(&mut data, tensor)?;
        if header.len() > 1 {
            header.push(',');
        }
        header.push_str(&format!(
            "{}:{{\"dtype\":\"{dtype}\",\"shape\":{},\"data_offsets\":[{begin},{}]}}",
            json(name)?,
            json(tensor.dims())?,
            data.len()
        ));
    }
    header.push('}');
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = Vec::with_capacity(8 + header.len() + data.len());
    file.extend((header.len() as u64).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(data);
    Ok(file)
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::BadRequest(e.to_string()))
}

fn append_bytes(out: &mut Vec<u8>, tensor: &Tensor) -> Result<()> {
    macro_rules! append {
        ($type:ty) => {
            for x in tensor.flatten_all()?.to_vec1::<$type>()? {
                out.extend(x.to_le_bytes());
            }
        };
    }
    match tensor.dtype() {
        DType::F64 => append!(f64),
        DType::I64 => append!(i64),
        DType::F32 => append!(f32),
        DType::U32 => append!(u32),
        DType::I32 => append!(i32),
        DType::BF16 => append!(half::bf16),
        DType::F16 => append!(half::f16),
        _ => append!(u8),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::tests::Writer;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn refused(bytes: Vec<u8>, because: &str) {
        let message = Weights::from_bytes("test.safetensors", bytes)
            .and_then(|w| {
                let name = w.names().next().unwrap_or("none").to_owned();
                w.get_any(&name, DType::F32, &Device::Cpu)
            })
            .expect_err(because)
            .to_string();
        assert!(message.contains(because), "{message:?} lacks {because:?}");
    }

    fn sample() -> BTreeMap<String, Tensor> {
        let t = |dtype| {
            Tensor::new(&[[1f32, -2.5], [0.25, 3.0]], &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap()
        };
        [
            ("wide", t(DType::F32)),
            ("half", t(DType::F16)),
            ("brain", t(DType::BF16)),
            ("double", t(DType::F64)),
        ]
        .into_iter()
        .map(|(n, t)| (n.to_owned(), t))
        .collect()
    }

    #[test]
    fn what_is_saved_is_loaded_in_any_dtype() {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = to_safetensors(&sample(), &metadata).unwrap();
        let w = Weights::from_bytes("sample", bytes).unwrap();
        assert_eq!(w.metadata(), &metadata);
        for name in ["wide", "half", "brain", "double"] {
            let t = w.get(name, (2, 2), DType::F32, &Device::Cpu).unwrap();
            assert_eq!(
                t.to_vec2::<f32>().unwrap(),
                [[1.0, -2.5], [0.25, 3.0]],
                "{name}"
            );
        }
        let vb = w.var_builder(DType::F32, &Device::Cpu);
        assert!(vb.get((2, 2), "half").is_ok());
        let wrong = vb.get((4, 1), "half").unwrap_err().to_string();
        assert!(
            wrong.contains("expected shape [4, 1], got [2, 2]"),
            "{wrong}"
        );
    }

    #[test]
    fn every_truncation_and_every_flipped_header_bit_is_an_error_or_harmless() {
        let bytes = to_safetensors(&sample(), &BTreeMap::new()).unwrap();
        for cut in 0..bytes.len() {
            assert!(Weights::from_bytes("cut", bytes[..cut].to_vec()).is_err());
        }
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for at in 0..header {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                if let Ok(w) = Weights::from_bytes("flip", flipped) {
                    for name in w.names().map(str::to_owned).collect::<Vec<_>>() {
                        let _ = w.get_any(&name, DType::F32, &Device::Cpu);
                    }
                }
            }
        }
    }

    #[test]
    fn pickle_is_refused_whatever_its_name() {
        refused(b"\x80\x02}q\x00(X\x05\x00\x00\x00".to_vec(), "pickle");
        refused(b"PK\x03\x04\x00\x00\x08\x08\x00\x00rest".to_vec(), "pickle");
        refused(b"\x80\x02\x8a\x0al\xfc\x9cF{\x20\x6a".to_vec(), "pickle");
        refused(b"hello".to_vec(), "neither safetensors nor GGUF");
        refused(Vec::new(), "neither safetensors nor GGUF");
    }

    #[test]
    fn lying_headers_are_refused() {
        let one = |shape: &str, dtype: &str, offsets: &str| {
            format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        refused(file(&one("[2]", "F32", "[0,4]"), &[0; 4]), "size differs");
        refused(
            file(&one("[2]", "F32", "[0,8]"), &[0; 4]),
            "leaves the file",
        );
        refused(file(&one("[1]", "F32", "[4,8]"), &[0; 8]), "expected 0");
        refused(file(&one("[1]", "F32", "[0,4]"), &[0; 8]), "the file at");
        refused(file(&one("[1]", "F31", "[0,4]"), &[0; 4]), "dtype");
        refused(
            file(&one("[4294967296,4294967296]", "F32", "[0,0]"), &[]),
            "size differs",
        );
        refused(file(&one("[1]", "F32", "[8,4]"), &[0; 4]), "size differs");
        refused(
            file(&one("[1,1,1,1,1,1,1,1,1]", "F32", "[0,4]"), &[0; 4]),
            "rank",
        );
        let entry = r#""x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        refused(file(&format!("{{{entry},{entry}}}"), &[0]), "twice");
        refused(
            file(&one("[1]", "F32", "[0,4]"), &f32::NAN.to_le_bytes()),
            "finite",
        );
        let mut huge = u64::MAX.to_le_bytes().to_vec();
        huge.extend(b"{}");
        refused(huge, "safetensors header of");
    }

    #[test]
    fn eight_bit_floats_have_their_published_values() {
        // OCP 8-bit floating point, table 2: largest normal 448, smallest 2^-9.
        assert_eq!(f8e4m3(0x7e), 448.0);
        assert_eq!(f8e4m3(0x01), 2f32.powi(-9));
        assert_eq!(f8e4m3(0xb8), -1.0);
        assert!(f8e4m3(0x7f).is_nan());
        // Every code is the nearest of its own value, and of what lies nearest to it.
        for code in (0..=0xfe).filter(|c| c & 0x7f != 0x7f) {
            let value = f8e4m3(code);
            assert_eq!(to_f8e4m3(value), code, "{value}");
            if code & 0x7f < 0x7e {
                let next = f8e4m3(code + 1);
                assert_eq!(to_f8e4m3(value + 0.49 * (next - value)), code);
                assert_eq!(to_f8e4m3(value + 0.51 * (next - value)), code + 1);
                // A tie goes to the even one.
                let even = code + code % 2;
                assert_eq!(to_f8e4m3(value + 0.5 * (next - value)), even);
            }
        }
        assert_eq!((to_f8e4m3(1e9), to_f8e4m3(-1e9)), (0x7e, 0xfe));
        assert!(f8e4m3(to_f8e4m3(f32::NAN)).is_nan());
        let header = r#"{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}"#;
        let w = Weights::from_bytes("f8", file(header, &[0x7e, 0xb8])).unwrap();
        let t = w.get("x", 2, DType::BF16, &Device::Cpu).unwrap();
        let t = t.to_dtype(DType::F32).unwrap();
        assert_eq!(t.to_vec1::<f32>().unwrap(), [448.0, -1.0]);
    }

    #[test]
    fn shards_are_found_through_their_index_and_not_outside_the_folder() {
        let folder = std::env::temp_dir().join(format!("simpatico-shards-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut sample = sample();
        let last = sample.split_off("half");
        save_safetensors(&folder.join("a.safetensors"), &sample, &BTreeMap::new()).unwrap();
        save_safetensors(&folder.join("b.safetensors"), &last, &BTreeMap::new()).unwrap();
        let index = folder.join("model.safetensors.index.json");
        std::fs::write(
            &index,
            r#"{"weight_map":{"brain":"a.safetensors","wide":"b.safetensors"}}"#,
        )
        .unwrap();
        let w = Weights::open(&folder).unwrap();
        assert_eq!(w.names().count(), 4);
        assert!(w.get("wide", (2, 2), DType::F32, &Device::Cpu).is_ok());
        std::fs::write(&index, r#"{"weight_map":{"brain":"../a.safetensors"}}"#).unwrap();
        let error = Weights::open(&folder).unwrap_err().to_string();
        assert!(error.contains("plain file name"), "{error}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn gguf_tensors_are_dequantised() {
        let mut w = Writer::new(1, 0);
        w.tensor("x", &[32], 3, 0);
        let mut bytes = w.pad(32, 0);
        bytes.extend(half::f16::from_f32(0.5).to_le_bytes());
        bytes.extend(half::f16::from_f32(-1.0).to_le_bytes());
        bytes.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let w = Weights::from_bytes("x.gguf", bytes).unwrap();
        let x = w.get("x", 32, DType::F32, &Device::Cpu).unwrap();
        let x = x.to_vec1::<f32>().unwrap();
        assert_eq!((x[0], x[1], x[16], x[31]), (-1.0, -0.5, 6.5, -1.0));
        let q = w.get_quantised("x", 32, &Device::Cpu).unwrap();
        let q = q
            .dequantize(&Device::Cpu)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        assert_eq!(q, x);
    }
}
