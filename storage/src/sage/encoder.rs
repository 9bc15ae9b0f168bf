//! The encoder's weights: read from a file, checked, laid out for the arithmetic.

use super::kernel::Panels;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The version of the weights file this program reads and writes.
pub const ENCODER_VERSION: u32 = 1;
/// The largest dimension accepted.
pub const MAX_DIM: usize = 16_384;
/// The largest magnitude of a weight or of a feature accepted; more is a damaged file, and
/// less keeps every later number finite.
pub const MAX_MAGNITUDE: f32 = 1e6;
/// The largest weights file accepted, in bytes.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// Whether likes and dislikes are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Relations {
    /// Likes and dislikes are two relations, each with weights of its own.
    Separated,
    /// One relation whatever the sign: the paper's letter.
    Blind,
}

impl Relations {
    /// The names of the relations from user to attribute, as in the weights file; the way
    /// back is the same with `rev_` in front. Number `i` serves
    /// [`Relations::of`]` == i`.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Separated => &["dislikes", "likes"],
            Self::Blind => &["prefers"],
        }
    }

    /// The number of the relation an edge of this sign belongs to.
    pub fn of(self, sign: simpatico_schema::Sign) -> usize {
        match self {
            Self::Separated => sign.index(),
            Self::Blind => 0,
        }
    }
}

/// The shape of an encoder; stored as JSON under the key `simpatico` of the file's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderConfig {
    /// [`ENCODER_VERSION`].
    pub version: u32,
    /// Length of an attribute's feature, 1 to [`MAX_DIM`].
    pub in_dim_attribute: usize,
    /// Length of a user's feature, 0 to [`MAX_DIM`]. 0: users have no features, and the
    /// tensors that would take them are absent.
    pub in_dim_user: usize,
    /// Length of the hidden layer, 1 to [`MAX_DIM`].
    pub hidden: usize,
    /// Length of an embedding, 1 to [`MAX_DIM`].
    pub out: usize,
    /// Whether likes and dislikes are told apart.
    pub relations: Relations,
}

/// Why weights or features could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SageError {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not a whole safetensors file.
    #[error("the encoder is not a whole safetensors file ({0}); copy or train it again")]
    Damaged(String),
    /// The config is absent or does not parse.
    #[error("the encoder's metadata has no usable \"simpatico\" entry: {0}")]
    Config(String),
    /// A version from the future or the past.
    #[error(
        "the encoder is of version {got}, this program reads {ENCODER_VERSION}; \
         train it again or use the program that made it"
    )]
    Version {
        /// What the file says.
        got: u32,
    },
    /// A dimension out of range.
    #[error("the encoder's {name} is {got}, expected {least} to {MAX_DIM}")]
    Dimension {
        /// Which one.
        name: &'static str,
        /// What the file says.
        got: usize,
        /// The least accepted.
        least: usize,
    },
    /// A tensor that is absent.
    #[error("the encoder lacks the tensor {0}; it was not saved whole")]
    Missing(String),
    /// A tensor of the wrong shape or type.
    #[error("the encoder's tensor {name} is {got}, expected {expected}")]
    Tensor {
        /// Its name.
        name: String,
        /// Shape and type found.
        got: String,
        /// Shape and type needed.
        expected: String,
    },
    /// A number that is not finite, or absurdly large.
    #[error("{what} holds {value} at {at}; every number must lie within ±{MAX_MAGNITUDE:e}")]
    Value {
        /// The tensor or feature.
        what: String,
        /// Its position.
        at: usize,
        /// The number.
        value: f32,
    },
    /// A feature of the wrong length.
    #[error(
        "{what} has {got} numbers, but the encoder takes {expected}; \
         make it with the text model this encoder was trained on"
    )]
    Length {
        /// Whose feature.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The encoder's.
        expected: usize,
    },
}

/// A GraphSAGE encoder of two layers in PyG's `to_hetero(aggr="sum")` form.
///
/// Per relation, `SAGEConv(x)_i = lin_l(mean of neighbors' x) + lin_r(x_i)`; per node the
/// relations' results are added, so each relation's `lin_r` counts once
/// (PyG `sage_conv.py`, `to_hetero_transformer.py`). ReLU after the first layer. Immutable.
pub struct Encoder {
    config: EncoderConfig,
    digest: [u8; 32],
    /// Attribute feature -> [hidden before its neighbors | message to users per relation].
    pub(super) attribute_in: Panels,
    /// User feature -> the same, the other way; without bias, so that no feature gives 0.
    pub(super) user_in: Panels,
    /// What a user's hidden layer starts from.
    pub(super) user_bias: Vec<f32>,
    /// [mean hidden of neighbors per relation | own hidden] -> embedding.
    pub(super) user_out: Panels,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Encoder");
        out.field("config", &self.config)
            .field("digest", &self.digest_hex());
        out.finish_non_exhaustive()
    }
}

impl Encoder {
    /// Reads the weights from a safetensors file.
    pub fn load(path: &Path) -> Result<Self, SageError> {
        let io = |source| SageError::Io {
            path: path.to_path_buf(),
            source,
        };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_FILE_BYTES {
            return Err(SageError::Damaged(format!("{size} bytes are too many")));
        }
        Self::from_bytes(&std::fs::read(path).map_err(io)?)
    }

    /// Takes the weights from the bytes of a safetensors file: tensors of f32, f16 or bf16
    /// under PyG's names, and the config in the metadata. Tensors it does not need (a
    /// decoder's, the second layer towards attributes) are passed over.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SageError> {
        let damaged = |e: safetensors::SafeTensorError| SageError::Damaged(e.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let json = metadata
            .metadata()
            .as_ref()
            .and_then(|m| m.get("simpatico"));
        let json = json.ok_or_else(|| SageError::Config("it is absent".into()))?;
        let config = read_config(json)?;
        let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
        Self::build(config, *blake3::hash(bytes).as_bytes(), &file)
    }

    /// The shape.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The blake3 digest of the file's bytes.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The digest in 64 hexadecimal letters.
    pub fn digest_hex(&self) -> String {
        blake3::Hash::from_bytes(self.digest).to_hex().to_string()
    }

    /// Bytes of weights held.
    pub fn bytes(&self) -> usize {
        self.attribute_in.bytes() + self.user_in.bytes() + self.user_out.bytes()
    }

    pub(super) fn relations(&self) -> usize {
        self.config.relations.names().len()
    }

    fn build(
        config: EncoderConfig,
        digest: [u8; 32],
        file: &SafeTensors<'_>,
    ) -> Result<Self, SageError> {
        let EncoderConfig {
            in_dim_attribute: attribute,
            in_dim_user: user,
            hidden,
            out,
            ..
        } = config;
        let names = config.relations.names();
        let bias = vec![0.0; hidden];
        let (mut attribute_root, mut attribute_bias) =
            (vec![0.0; hidden * attribute], bias.clone());
        let (mut user_root, mut user_bias) = (vec![0.0; hidden * user], bias.clone());
        let (mut out_root, mut out_bias) = (vec![0.0; out * hidden], vec![0.0; out]);
        let (mut to_users, mut to_attributes, mut from_neighbors) = (vec![], vec![], vec![]);
        for name in names {
            let there = |tensor: &str| format!("c1.user__{name}__attr.{tensor}");
            let back = |tensor: &str| format!("c1.attr__rev_{name}__user.{tensor}");
            let last = |tensor: &str| format!("c2.attr__rev_{name}__user.{tensor}");
            to_attributes.push(matrix(file, &there("lin_l.weight"), hidden, user)?);
            add(
                &mut attribute_root,
                &matrix(file, &there("lin_r.weight"), hidden, attribute)?,
            );
            add(
                &mut attribute_bias,
                &vector(file, &there("lin_l.bias"), hidden)?,
            );
            to_users.push(matrix(file, &back("lin_l.weight"), hidden, attribute)?);
            add(
                &mut user_root,
                &matrix(file, &back("lin_r.weight"), hidden, user)?,
            );
            add(&mut user_bias, &vector(file, &back("lin_l.bias"), hidden)?);
            from_neighbors.push(matrix(file, &last("lin_l.weight"), out, hidden)?);
            add(
                &mut out_root,
                &matrix(file, &last("lin_r.weight"), out, hidden)?,
            );
            add(&mut out_bias, &vector(file, &last("lin_l.bias"), out)?);
        }
        let stacked = hidden * (1 + names.len());
        attribute_bias.resize(stacked, 0.0);
        let attribute_rows = [attribute_root, to_users.concat()].concat();
        let user_rows = [user_root, to_attributes.concat()].concat();
        from_neighbors.push(out_root);
        Ok(Self {
            attribute_in: Panels::new(attribute, &attribute_rows, &attribute_bias),
            user_in: Panels::new(user, &user_rows, &vec![0.0; stacked]),
            user_bias,
            user_out: Panels::new(
                stacked,
                &side_by_side(&from_neighbors, out, hidden),
                &out_bias,
            ),
            config,
            digest,
        })
    }
}

fn read_config(json: &str) -> Result<EncoderConfig, SageError> {
    /// The version alone, so that a later format is named as such.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let bad = |e: serde_json::Error| SageError::Config(e.to_string());
    let Version { version: got } = serde_json::from_str(json).map_err(bad)?;
    if got != ENCODER_VERSION {
        return Err(SageError::Version { got });
    }
    let config: EncoderConfig = serde_json::from_str(json).map_err(bad)?;
    for (name, got, least) in [
        ("in_dim_attribute", config.in_dim_attribute, 1),
        ("in_dim_user", config.in_dim_user, 0),
        ("hidden", config.hidden, 1),
        ("out", config.out, 1),
    ] {
        if !(least..=MAX_DIM).contains(&got) {
            return Err(SageError::Dimension { name, got, least });
        }
    }
    Ok(config)
}

/// Checks that every number is finite and of sane size.
pub(super) fn check_values(what: &dyn Fn() -> String, values: &[f32]) -> Result<(), SageError> {
    // NaN lies in no range.
    let sane = -MAX_MAGNITUDE..=MAX_MAGNITUDE;
    match values.iter().position(|v| !sane.contains(v)) {
        None => Ok(()),
        Some(at) => Err(SageError::Value {
            what: what(),
            at,
            value: values[at],
        }),
    }
}

fn matrix(
    file: &SafeTensors<'_>,
    name: &str,
    rows: usize,
    columns: usize,
) -> Result<Vec<f32>, SageError> {
    if columns == 0 {
        return Ok(Vec::new());
    }
    read(file, name, &[rows, columns])
}

fn vector(file: &SafeTensors<'_>, name: &str, len: usize) -> Result<Vec<f32>, SageError> {
    read(file, name, &[len])
}

fn read(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>, SageError> {
    let tensor = file
        .tensor(name)
        .map_err(|_| SageError::Missing(name.into()))?;
    let numbers = (tensor.shape() == shape)
        .then(|| numbers(&tensor))
        .flatten();
    let numbers = numbers.ok_or_else(|| SageError::Tensor {
        name: name.into(),
        got: format!("{:?} of {:?}", tensor.shape(), tensor.dtype()),
        expected: format!("{shape:?} of F32, F16 or BF16"),
    })?;
    check_values(&|| format!("the encoder's tensor {name}"), &numbers)?;
    Ok(numbers)
}

fn numbers(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let (halves, _) = tensor.data().as_chunks::<2>();
    Some(match tensor.dtype() {
        Dtype::F32 => {
            let (words, _) = tensor.data().as_chunks::<4>();
            words.iter().map(|w| f32::from_le_bytes(*w)).collect()
        }
        Dtype::F16 => halves
            .iter()
            .map(|h| half(u16::from_le_bytes(*h)))
            .collect(),
        Dtype::BF16 => {
            let word = |h: &[u8; 2]| u32::from(u16::from_le_bytes(*h)) << 16;
            halves.iter().map(|h| f32::from_bits(word(h))).collect()
        }
        _ => return None,
    })
}

/// The value of an IEEE half-precision number.
fn half(bits: u16) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    let magnitude = match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    };
    if bits >> 15 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

fn add(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// One matrix whose rows are the rows of all blocks, one after the other.
fn side_by_side(blocks: &[Vec<f32>], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows)
        .flat_map(|row| {
            blocks
                .iter()
                .flat_map(move |b| &b[row * columns..][..columns])
        })
        .copied()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::half;

    #[test]
    fn half_precision_reads_as_published() {
        for (bits, value) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x3555, 0.333_251_95),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(half(bits), value);
        }
        assert!(half(0x7e00).is_nan());
    }
}
