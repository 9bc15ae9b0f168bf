//! The weights of a BERT encoder out of an ONNX file, as safetensors: all that is read of ONNX.
//!
//! An exporter keeps the names of most tensors, but stores the matrices of linear maps transposed and
//! under numbers. Which map a matrix belongs to is told by the bias that is added to its product.
//! The file is protobuf; of it the graph's initializers and its MatMul and Add nodes are looked at.
//!
//! Not here: running ONNX graphs.

use crate::weights::save_safetensors;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Converts the file; the output is the same every time.
///
/// # Errors
/// [`Error::BadModel`] for what is not plainly such a file.
pub fn to_safetensors(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).map_err(Error::io(from))?;
    let bad = |reason: &str| Error::bad_model(from.display().to_string(), reason);
    let tensors = encoder(&bytes).ok_or_else(|| bad("not an ONNX file of a BERT encoder"))?;
    if tensors.is_empty() {
        return Err(bad("an ONNX file without an encoder's tensors"));
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    save_safetensors(to, &tensors, &metadata)
}

/// One field of a message.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message with their numbers; `None` for what is not protobuf.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Field<'_>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = number(&mut bytes)?;
        let field = match key & 7 {
            0 => Field::Number(number(&mut bytes)?),
            1 => Field::Bytes(taken(&mut bytes, 8)?),
            2 => {
                let length = usize::try_from(number(&mut bytes)?).ok()?;
                Field::Bytes(taken(&mut bytes, length)?)
            }
            5 => Field::Bytes(taken(&mut bytes, 4)?),
            _ => return None,
        };
        all.push((key >> 3, field));
    }
    Some(all)
}

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn taken<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (part, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(part)
}

/// The bytes of the fields with this number.
fn all_of<'a>(message: &[(u64, Field<'a>)], wanted: u64) -> Vec<&'a [u8]> {
    let bytes = |(n, field): &(u64, Field<'a>)| match field {
        Field::Bytes(bytes) if *n == wanted => Some(*bytes),
        _ => None,
    };
    message.iter().filter_map(bytes).collect()
}

fn texts(message: &[(u64, Field<'_>)], wanted: u64) -> Vec<String> {
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    all_of(message, wanted).into_iter().map(text).collect()
}

/// Name and values of an f32 initializer (TensorProto: dims 1, data_type 2, name 8, raw_data 9).
fn initializer(bytes: &[u8]) -> Option<Option<(String, Tensor)>> {
    let message = fields(bytes)?;
    let (mut dims, mut float) = (Vec::new(), false);
    for (n, field) in &message {
        match (n, field) {
            (1, Field::Number(d)) => dims.push(usize::try_from(*d).ok()?),
            (1, Field::Bytes(packed)) => {
                let mut packed = *packed;
                while !packed.is_empty() {
                    dims.push(usize::try_from(number(&mut packed)?).ok()?);
                }
            }
            (2, Field::Number(kind)) => float = *kind == 1,
            _ => {}
        }
    }
    let (Some(name), Some(raw)) = (texts(&message, 8).pop(), all_of(&message, 9).pop()) else {
        return Some(None);
    };
    let count = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
    if !float || raw.len() != count.checked_mul(4)? {
        return Some(None);
    }
    let values: Vec<f32> = raw
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let tensor = Tensor::from_vec(values, dims, &Device::Cpu).ok()?;
    Some(Some((name, tensor)))
}

/// The encoder's tensors by their names in a checkpoint (ModelProto: graph 7; GraphProto: node 1,
/// initializer 5; NodeProto: input 1, output 2, op_type 4).
fn encoder(bytes: &[u8]) -> Option<BTreeMap<String, Tensor>> {
    let graph = fields(all_of(&fields(bytes)?, 7).pop()?)?;
    let mut weights = BTreeMap::new();
    for bytes in all_of(&graph, 5) {
        weights.extend(initializer(bytes)?);
    }
    // The node that adds to a product, by the product's name.
    let mut adds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut products = Vec::new();
    for bytes in all_of(&graph, 1) {
        let node = fields(bytes)?;
        let (inputs, outputs) = (texts(&node, 1), texts(&node, 2));
        match texts(&node, 4).first().map(String::as_str) {
            Some("Add") => {
                for input in &inputs {
                    adds.insert(input.clone(), inputs.clone());
                }
            }
            Some("MatMul") => products.push((inputs, outputs)),
            _ => {}
        }
    }
    let mut tensors: BTreeMap<String, Tensor> = weights
        .iter()
        .filter(|(name, _)| name.starts_with("embeddings.") || name.starts_with("encoder."))
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .collect();
    for (inputs, outputs) in products {
        let Some(matrix) = inputs.iter().find_map(|i| weights.get(i)) else {
            continue; // of two activations: attention
        };
        let bias = adds.get(outputs.first()?)?;
        let bias = bias.iter().find(|i| weights.contains_key(*i))?;
        let name = format!("{}.weight", bias.strip_suffix(".bias")?);
        tensors.insert(name, matrix.t().ok()?.contiguous().ok()?);
    }
    Some(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(n: u64, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![(n << 3 | 2) as u8];
        let mut length = bytes.len();
        while length > 127 {
            out.push((length & 0x7f | 0x80) as u8);
            length >>= 7;
        }
        out.push(length as u8);
        out.extend(bytes);
        out
    }

    fn tensor(name: &str, dims: &[u8], values: &[f32]) -> Vec<u8> {
        let mut out: Vec<u8> = dims.iter().flat_map(|d| [1 << 3, *d]).collect();
        out.extend([2 << 3, 1]);
        out.extend(field(8, name.as_bytes()));
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        out.extend(field(9, &raw));
        out
    }

    fn node(kind: &str, inputs: &[&str], output: &str) -> Vec<u8> {
        let mut out: Vec<u8> = inputs.iter().flat_map(|i| field(1, i.as_bytes())).collect();
        out.extend(field(2, output.as_bytes()));
        out.extend(field(4, kind.as_bytes()));
        out
    }

    #[test]
    fn matrices_get_the_names_their_biases_tell_and_nothing_damaged_is_read() {
        let graph = [
            field(1, &node("MatMul", &["x", "onnx::MatMul_7"], "y")),
            field(1, &node("Add", &["encoder.a.bias", "y"], "z")),
            field(1, &node("MatMul", &["z", "x"], "scores")),
            field(
                5,
                &tensor("onnx::MatMul_7", &[2, 3], &[1., 2., 3., 4., 5., 6.]),
            ),
            field(5, &tensor("encoder.a.bias", &[3], &[7., 8., 9.])),
            field(5, &tensor("other", &[1], &[0.])),
        ]
        .concat();
        let file = field(7, &graph);
        let found = encoder(&file).unwrap();
        let names: Vec<&str> = found.keys().map(String::as_str).collect();
        assert_eq!(names, ["encoder.a.bias", "encoder.a.weight"]);
        let weight = found["encoder.a.weight"].to_vec2::<f32>().unwrap();
        assert_eq!(weight, [[1., 4.], [2., 5.], [3., 6.]]);
        for cut in 0..file.len() {
            // Shorter files are none, or lack tensors; they are never a panic.
            assert!(encoder(&file[..cut]).is_none_or(|t| t.len() < 2));
        }
    }
}
