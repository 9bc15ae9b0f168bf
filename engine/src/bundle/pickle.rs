//! Tensors out of PyTorch and numpy pickles without running anything.
//!
//! A pickle is a program. This reader is a machine for the dozen and a half instructions that
//! a plain dictionary of tensors needs; the only names it knows are the four constructors
//! below, and it builds values of its own instead of calling them. Every other instruction
//! or name ends the reading. Used for files whose SHA-256 is on our list, to turn them into
//! safetensors once.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::rc::Rc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::archive::{ZipEntry, unzip, zip_entries};
use crate::{Error, Result};

const MAX_PICKLE_BYTES: u64 = 256 << 20;
const MAX_OBJECTS: usize = 1 << 20;
const MAX_DEPTH: usize = 16;

type Step<T> = std::result::Result<T, String>;

/// A named tensor as it lay in the file: shape and little-endian bytes.
struct Dense {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Value {
    Nothing,
    Mark,
    Int(i64),
    Bool,
    Text(Rc<str>),
    Bytes(std::ops::Range<usize>),
    /// Items, and how deep tuples nest in it. Shared: a pickle may name one thing many times.
    Tuple(Rc<[Value]>, u8),
    Name(Name),
    Storage(Dtype, Rc<str>),
    /// storage key, first element, shape: row-major.
    Tensor(Dtype, Rc<str>, usize, Rc<[usize]>),
    NumpyF4,
    /// Something that later instructions change, by its number.
    Object(usize),
}

#[derive(Clone, Copy, Debug)]
enum Name {
    OrderedDict,
    RebuildTensor,
    Storage(Dtype),
    NumpyReconstruct,
    NumpyArray,
    NumpyDtype,
}

#[derive(Debug)]
enum Object {
    Dict(Vec<(Value, Value)>),
    /// numpy array: shape and where its bytes lie in the pickle, once known.
    Array(Option<(Vec<usize>, std::ops::Range<usize>)>),
}

/// Converts a file of named tensors, a PyTorch zip or a bare numpy pickle, to safetensors.
/// Nested dictionaries become names joined with dots. The output is the same every time.
///
/// # Errors
/// [`Error::BadModel`] for everything that is not plainly tensors.
pub fn to_safetensors(from: &Path, to: &Path) -> Result<()> {
    let tensors = read(from)?;
    let views: Vec<(&String, TensorView)> = tensors
        .iter()
        .map(|(name, t)| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            Ok((
                name,
                view.map_err(|e| Error::bad_model(name, e.to_string()))?,
            ))
        })
        .collect::<Result<_>>()?;
    let bytes = safetensors::serialize(views, None)
        .map_err(|e| Error::bad_model(from.display().to_string(), e.to_string()))?;
    crate::picture::write_whole(to, &bytes)
}

fn read(path: &Path) -> Result<BTreeMap<String, Dense>> {
    let bad = |reason: String| Error::bad_model(path.display().to_string(), reason);
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut magic = [0; 2];
    std::io::Read::read_exact(&mut file, &mut magic).map_err(Error::io(path))?;
    if &magic != b"PK" {
        let length = file.metadata().map_err(Error::io(path))?.len();
        if length > MAX_PICKLE_BYTES {
            return Err(bad(format!(
                "expected a pickle of at most {MAX_PICKLE_BYTES} bytes"
            )));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        return tensors_of(&bytes, |_, _| Err("a storage outside a zip".into())).map_err(bad);
    }
    let entries = zip_entries(&mut file).map_err(|e| bad(e.to_string()))?;
    let find = |end: &str| entries.iter().find(|e| e.name.ends_with(end));
    let main = find("/data.pkl").ok_or_else(|| bad("no data.pkl in it".into()))?;
    let folder = main.name.trim_end_matches("data.pkl").to_string();
    let unpack = |file: &mut File, entry: &ZipEntry| {
        let mut bytes = Vec::new();
        unzip(file, entry, MAX_PICKLE_BYTES, &mut bytes).map_err(|e| e.to_string())?;
        Ok::<_, String>(bytes)
    };
    let program = unpack(&mut file, main).map_err(bad)?;
    tensors_of(&program, |key, range| {
        let name = format!("{folder}data/{key}");
        let entry = entries.iter().find(|e| e.name == name);
        let bytes = unpack(&mut file, entry.ok_or(format!("no storage {key}"))?)?;
        let part = bytes
            .get(range)
            .ok_or("a tensor lies outside its storage")?;
        Ok(part.to_vec())
    })
    .map_err(bad)
}

fn width(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

fn tensors_of(
    program: &[u8],
    mut storage: impl FnMut(&str, std::ops::Range<usize>) -> Step<Vec<u8>>,
) -> Step<BTreeMap<String, Dense>> {
    let mut machine = Machine::new(program);
    let top = machine.run()?;
    let mut found = Vec::new();
    machine.collect(&top, String::new(), 0, &mut found)?;
    let mut tensors = BTreeMap::new();
    for (name, value) in found {
        let dense = match value {
            Value::Tensor(dtype, key, first, shape) => {
                let elements = elements(&shape)?;
                let from = first
                    .checked_mul(width(dtype))
                    .ok_or("an offset overflows")?;
                let to = from
                    .checked_add(elements * width(dtype))
                    .ok_or("an offset overflows")?;
                Dense {
                    dtype,
                    shape: shape.to_vec(),
                    bytes: storage(&key, from..to)?,
                }
            }
            Value::Object(i) => match &machine.objects[i] {
                Object::Array(Some((shape, range))) => Dense {
                    dtype: Dtype::F32,
                    shape: shape.clone(),
                    bytes: program[range.clone()].to_vec(),
                },
                _ => return Err(format!("{name} is not a tensor")),
            },
            _ => return Err(format!("{name} is not a tensor")),
        };
        if dense.bytes.len() != elements(&dense.shape)? * width(dense.dtype) {
            return Err(format!("{name}: its bytes do not fill its shape"));
        }
        tensors.insert(name, dense);
    }
    Ok(tensors)
}

/// The number of elements of a shape, below 2^40.
fn elements(shape: &[usize]) -> Step<usize> {
    let product = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let product = product.filter(|n| *n < 1 << 40);
    product.ok_or_else(|| format!("shape {shape:?} is too large"))
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: BTreeMap<u32, Value>,
    objects: Vec<Object>,
}

impl<'a> Machine<'a> {
    fn new(program: &'a [u8]) -> Self {
        Self {
            program,
            at: 0,
            stack: Vec::new(),
            memo: BTreeMap::new(),
            objects: Vec::new(),
        }
    }

    fn take(&mut self, n: usize) -> Step<std::ops::Range<usize>> {
        let end = self
            .at
            .checked_add(n)
            .filter(|end| *end <= self.program.len());
        let range = self.at..end.ok_or("the pickle ends early")?;
        self.at = range.end;
        Ok(range)
    }

    fn number(&mut self, bytes: usize) -> Step<u32> {
        let range = self.take(bytes)?;
        let bytes = self.program[range].iter().rev();
        Ok(bytes.fold(0, |n, b| n << 8 | u32::from(*b)))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.program[self.at..];
        let end = rest
            .iter()
            .position(|b| *b == b'\n')
            .ok_or("a name is cut")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name is not text".into())
    }

    fn pop(&mut self) -> Step<Value> {
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_to_mark(&mut self) -> Step<Vec<Value>> {
        let is_mark = |v: &Value| matches!(v, Value::Mark);
        let mark = self.stack.iter().rposition(is_mark).ok_or("no mark")?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn pop_many(&mut self, n: usize) -> Step<Vec<Value>> {
        let from = self
            .stack
            .len()
            .checked_sub(n)
            .ok_or("the stack is empty")?;
        Ok(self.stack.split_off(from))
    }

    fn object(&mut self, object: Object) -> Step<Value> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err("too many objects".into());
        }
        self.objects.push(object);
        Ok(Value::Object(self.objects.len() - 1))
    }

    /// Executes to the end: one instruction a turn, named as in Python's pickletools.
    fn run(&mut self) -> Step<Value> {
        loop {
            let at = self.at;
            let code = self.number(1)? as u8;
            let value = match code {
                0x80 => {
                    self.number(1)?; // PROTO
                    continue;
                }
                b'.' => return self.pop(), // STOP
                b'q' | b'r' => {
                    // BINPUT, LONG_BINPUT
                    let slot = self.number(if code == b'q' { 1 } else { 4 })?;
                    let top = self.stack.last().cloned().ok_or("the stack is empty")?;
                    self.memo.insert(slot, top);
                    continue;
                }
                b's' | b'u' | b'b' => {
                    self.change(code)?; // SETITEM, SETITEMS, BUILD
                    continue;
                }
                b'h' | b'j' => {
                    // BINGET, LONG_BINGET
                    let slot = self.number(if code == b'h' { 1 } else { 4 })?;
                    self.memo.get(&slot).cloned().ok_or("an empty memo")?
                }
                b'c' => self.name()?, // GLOBAL
                b'(' => Value::Mark,
                b')' => tuple(Vec::new())?,
                b't' => tuple(self.pop_to_mark()?)?,
                0x85..=0x87 => tuple(self.pop_many(usize::from(code - 0x84))?)?,
                b'}' => self.object(Object::Dict(Vec::new()))?,
                b'R' => self.reduce()?,     // REDUCE
                b'Q' => self.persistent()?, // BINPERSID
                b'X' => {
                    let n = self.number(4)? as usize; // BINUNICODE
                    let range = self.take(n)?;
                    let text = std::str::from_utf8(&self.program[range]);
                    Value::Text(text.map_err(|_| "text is not UTF-8")?.into())
                }
                b'B' | b'C' => {
                    // BINBYTES, SHORT_BINBYTES
                    let n = self.number(if code == b'B' { 4 } else { 1 })? as usize;
                    Value::Bytes(self.take(n)?)
                }
                b'J' => Value::Int(i64::from(self.number(4)? as i32)),
                b'K' => Value::Int(i64::from(self.number(1)?)),
                b'M' => Value::Int(i64::from(self.number(2)?)),
                0x88 | 0x89 => Value::Bool,
                b'N' => Value::Nothing,
                other => {
                    return Err(format!(
                        "instruction {other:#04x} at byte {at} is not part of a plain file of \
                         tensors; convert it to safetensors with the program it came from"
                    ));
                }
            };
            self.stack.push(value);
        }
    }

    fn name(&mut self) -> Step<Value> {
        let (module, name) = (self.line()?, self.line()?);
        Ok(Value::Name(match (module, name) {
            ("collections", "OrderedDict") => Name::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Name::RebuildTensor,
            ("torch", "FloatStorage") => Name::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Name::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Name::Storage(Dtype::BF16),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => {
                Name::NumpyReconstruct
            }
            ("numpy", "ndarray") => Name::NumpyArray,
            ("numpy", "dtype") => Name::NumpyDtype,
            _ => {
                return Err(format!(
                    "it asks for {module:?}.{name:?}; only plain tensors are read, never code"
                ));
            }
        }))
    }

    fn reduce(&mut self) -> Step<Value> {
        let (Value::Tuple(args, _), Value::Name(name)) = (self.pop()?, self.pop()?) else {
            return Err("a call of something unknown".into());
        };
        match (name, &*args) {
            (Name::OrderedDict, []) => self.object(Object::Dict(Vec::new())),
            (Name::NumpyReconstruct, [Value::Name(Name::NumpyArray), ..]) => {
                self.object(Object::Array(None))
            }
            (Name::NumpyDtype, [Value::Text(kind), ..]) if **kind == *"f4" => Ok(Value::NumpyF4),
            (
                Name::RebuildTensor,
                [
                    Value::Storage(dtype, key),
                    Value::Int(first),
                    Value::Tuple(shape, _),
                    Value::Tuple(stride, _),
                    ..,
                ],
            ) => {
                let shape = sizes(shape)?;
                if !is_row_major(&shape, &sizes(stride)?) {
                    return Err("a tensor is not stored row by row".into());
                }
                let first = usize::try_from(*first).map_err(|_| "a negative offset")?;
                Ok(Value::Tensor(*dtype, key.clone(), first, shape.into()))
            }
            _ => Err("a call with arguments that make no sense".into()),
        }
    }

    fn persistent(&mut self) -> Step<Value> {
        let Value::Tuple(id, _) = self.pop()? else {
            return Err("a storage without a name".into());
        };
        match &*id {
            [
                Value::Text(word),
                Value::Name(Name::Storage(dtype)),
                Value::Text(key),
                ..,
            ] if **word == *"storage" && key.bytes().all(|b| b.is_ascii_digit()) => {
                Ok(Value::Storage(*dtype, key.clone()))
            }
            _ => Err("a storage of an unknown kind".into()),
        }
    }

    fn change(&mut self, code: u8) -> Step<()> {
        let items = match code {
            b'u' => self.pop_to_mark()?,
            b's' => self.pop_many(2)?,
            _ => vec![self.pop()?],
        };
        let target = match self.stack.last() {
            Some(Value::Object(i)) => *i,
            // dtype state: byte order and the like; only little-endian is given a meaning
            Some(Value::NumpyF4) if code == b'b' => return little_endian(&items),
            _ => return Err("a change of something that cannot change".into()),
        };
        match &mut self.objects[target] {
            Object::Dict(pairs) if code != b'b' => {
                let mut items = items.into_iter();
                while let (Some(key), Some(value)) = (items.next(), items.next()) {
                    pairs.push((key, value));
                }
            }
            // attributes of a dictionary carry versions, no tensors
            Object::Dict(_) => {}
            Object::Array(array) => {
                let [Value::Tuple(state, _)] = items.as_slice() else {
                    return Err("an array without state".into());
                };
                let [
                    _,
                    Value::Tuple(shape, _),
                    Value::NumpyF4,
                    Value::Bool,
                    Value::Bytes(range),
                ] = &**state
                else {
                    return Err("an array that is not of f32".into());
                };
                *array = Some((sizes(shape)?, range.clone()));
            }
        }
        Ok(())
    }

    fn collect(
        &self,
        value: &Value,
        name: String,
        depth: usize,
        found: &mut Vec<(String, Value)>,
    ) -> Step<()> {
        if depth > MAX_DEPTH || found.len() > 65_536 {
            return Err("nested too deeply, or too many tensors".into());
        }
        let Value::Object(i) = value else {
            found.push((name, value.clone()));
            return Ok(());
        };
        let Object::Dict(pairs) = &self.objects[*i] else {
            found.push((name, value.clone()));
            return Ok(());
        };
        for (key, value) in pairs {
            let Value::Text(key) = key else {
                return Err("a tensor's name is not text".into());
            };
            let dot = if name.is_empty() { "" } else { "." };
            self.collect(value, format!("{name}{dot}{key}"), depth + 1, found)?;
        }
        Ok(())
    }
}

/// A tuple, unless it nests deeper than a tensor's description does.
fn tuple(items: Vec<Value>) -> Step<Value> {
    let depth = |v: &Value| {
        if let Value::Tuple(_, depth) = v {
            *depth
        } else {
            0
        }
    };
    match items.iter().map(depth).max().unwrap_or(0) {
        deep if deep >= 4 => Err("tuples nest too deeply".into()),
        deep => Ok(Value::Tuple(items.into(), deep + 1)),
    }
}

fn little_endian(items: &[Value]) -> Step<()> {
    match items {
        [Value::Tuple(state, _)] if matches!(state.get(1), Some(Value::Text(o)) if **o == *"<") => {
            Ok(())
        }
        _ => Err("an array that is not little-endian".into()),
    }
}

fn sizes(tuple: &[Value]) -> Step<Vec<usize>> {
    let size = |v: &Value| match v {
        Value::Int(n) => usize::try_from(*n).map_err(|_| "a negative size".to_string()),
        _ => Err("a size is not a number".to_string()),
    };
    tuple.iter().map(size).collect()
}

fn is_row_major(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.len() == stride.len()
        && shape.iter().zip(stride).rev().all(|(size, stride)| {
            let fits = *size == 1 || *stride == expected;
            expected = expected.saturating_mul(*size);
            fits
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/dino")
            .join(name)
    }

    #[test]
    fn a_torch_file_becomes_the_same_tensors() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("model.safetensors");
        to_safetensors(&golden("two_tensors.pt"), &to).unwrap();
        let bytes = std::fs::read(&to).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let a = tensors.tensor("a").unwrap();
        assert_eq!((a.shape(), a.dtype()), ([2, 3].as_slice(), Dtype::F32));
        let values: Vec<f32> = a
            .data()
            .chunks(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        assert_eq!(values, [0., 1., 2., 3., 4., 5.]);
        assert_eq!(tensors.tensor("b.c").unwrap().dtype(), Dtype::F16);
    }

    #[test]
    fn a_numpy_pickle_becomes_the_same_tensors() {
        let tensors = read(&golden("numpy.pkl")).unwrap();
        assert_eq!(tensors["net.kernel"].shape, [2, 2]);
        assert_eq!(tensors["net.kernel"].bytes[4..8], 1f32.to_le_bytes());
    }

    #[test]
    fn a_pickle_that_calls_anything_else_is_refused_by_name() {
        let evil = b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.";
        let said = tensors_of(evil, |_, _| Ok(Vec::new())).err().unwrap();
        assert!(
            said.contains("posix") && said.contains("never code"),
            "{said}"
        );
    }

    #[test]
    fn a_pickle_cut_or_changed_anywhere_is_an_error_or_other_numbers_never_a_panic() {
        let whole = std::fs::read(golden("numpy.pkl")).unwrap();
        for at in 0..whole.len() {
            tensors_of(&whole[..at], |_, _| Ok(Vec::new())).ok();
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                tensors_of(&bytes, |_, _| Ok(Vec::new())).ok();
            }
        }
    }
}
