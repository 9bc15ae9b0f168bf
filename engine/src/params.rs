//! Named parameters: what a network's weights live in while they train.
//!
//! [`Params`] is a map from names to candle variables that a network written against
//! `VarBuilder` fills as it is built. It differs from candle's `VarMap` in three ways that
//! training needs: the order is the names' (never a hash's), a parameter's first value depends
//! only on the seed and its name (so that adding a layer moves no other), and files are
//! checked before anything is changed. Variables made here are f32, whatever dtype a network
//! computes in.
//!
//! Not here: optimisation (`optim`), or any network.
//!
//! ```
//! use candle_core::{DType, Device};
//! use simpatico_engine::params::Params;
//! let params = Params::new(0, Device::Cpu);
//! let layer = candle_nn::linear(4, 2, params.builder(DType::F32).pp("mlp.0")).unwrap();
//! assert_eq!(params.names(), ["mlp.0.bias", "mlp.0.weight"]);
//! # let _ = layer;
//! ```

use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::init::{Init, NormalOrUniform};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A set of named variables. Cloning shares them.
#[derive(Clone)]
pub struct Params {
    vars: Arc<Mutex<BTreeMap<String, Var>>>,
    seed: u64,
    device: Device,
}

impl Params {
    /// No parameters yet. `seed` decides every first value.
    pub fn new(seed: u64, device: Device) -> Self {
        Self {
            vars: Arc::default(),
            seed,
            device,
        }
    }

    /// A builder that networks take their weights from; names not yet known are made.
    ///
    /// With another dtype than f32 a network gets copies that pass their gradient on to the
    /// variables: build it anew after each step, or it goes on computing with the old weights.
    pub fn builder(&self, dtype: DType) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, self.device.clone())
    }

    /// The variables in the order of their names.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.lock()
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect()
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    /// The variable of that name.
    pub fn get(&self, name: &str) -> Option<Var> {
        self.lock().get(name).cloned()
    }

    /// Adds or replaces a variable.
    pub fn insert(&self, name: impl Into<String>, value: &Tensor) -> Result<Var> {
        let var = Var::from_tensor(&value.to_device(&self.device)?.contiguous()?)?;
        self.lock().insert(name.into(), var.clone());
        Ok(var)
    }

    /// How many numbers there are in all.
    pub fn count(&self) -> usize {
        self.lock().values().map(|v| v.elem_count()).sum()
    }

    /// Writes all of them as `dtype` to a safetensors file with the given metadata. The file
    /// appears whole or not at all.
    pub fn save(&self, path: &Path, dtype: DType, metadata: &[(&str, String)]) -> Result<()> {
        let tensors = self
            .vars()
            .into_iter()
            .map(|(name, var)| Ok((name, var.as_tensor().to_dtype(dtype)?)))
            .collect::<Result<Vec<_>>>()?;
        save_tensors(path, &tensors, metadata)
    }

    /// Sets every variable from a safetensors file. An error, with nothing changed, where a
    /// name is missing, left over, or of another shape.
    pub fn load(&self, path: &Path) -> Result<()> {
        let file = path.display().to_string();
        let found = load_tensors(path, &self.device)?;
        let vars = self.vars();
        for (name, var) in &vars {
            match found.get(name) {
                None => {
                    return Err(Error::bad_model(
                        &file,
                        format!("expected tensor {name}, which is missing"),
                    ));
                }
                Some(t) if t.dims() != var.dims() => {
                    let reason = format!(
                        "{name}: expected shape {:?}, got {:?}",
                        var.dims(),
                        t.dims()
                    );
                    return Err(Error::bad_model(&file, reason));
                }
                Some(_) => {}
            }
        }
        if let Some(extra) = found.keys().find(|n| !vars.iter().any(|(v, _)| v == *n)) {
            return Err(Error::bad_model(
                &file,
                format!("tensor {extra} belongs to nothing here"),
            ));
        }
        for (name, var) in &vars {
            var.set(&found[name].to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimpleBackend for Params {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if let Some(var) = self.lock().get(name) {
            if var.shape() != &shape {
                let (expected, got) = (shape.dims(), var.dims());
                candle_core::bail!("parameter {name}: expected shape {expected:?}, got {got:?}");
            }
            return var.as_tensor().to_dtype(dtype);
        }
        let value = initial_value(self.seed, name, &shape, init)?;
        let var = Var::from_tensor(&value.to_device(device)?)?;
        let tensor = var.as_tensor().to_dtype(dtype)?;
        self.lock().insert(name.to_string(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.lock().get(name) {
            Some(var) => var.as_tensor().to_dtype(dtype),
            None => candle_core::bail!("parameter {name}: not there, and its shape is unknown"),
        }
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true // whatever a network asks for can be made
    }
}

/// The first value of the parameter `name`: a pure function of seed and name.
pub fn initial_value(
    seed: u64,
    name: &str,
    shape: &Shape,
    init: Init,
) -> candle_core::Result<Tensor> {
    let n = shape.elem_count();
    let mut random = Philox::new(seed, name_stream(name));
    let values: Vec<f32> = match init {
        Init::Const(value) => vec![value as f32; n],
        Init::Randn { mean, stdev } => normals(&mut random, n, mean, stdev),
        Init::Uniform { lo, up } => uniforms(&mut random, n, lo, up),
        Init::Kaiming {
            dist,
            fan,
            non_linearity,
        } => {
            let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                NormalOrUniform::Normal => normals(&mut random, n, 0.0, stdev),
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * stdev;
                    uniforms(&mut random, n, -bound, bound)
                }
            }
        }
    };
    Tensor::from_vec(values, shape.clone(), &Device::Cpu)
}

fn normals(random: &mut Philox, n: usize, mean: f64, stdev: f64) -> Vec<f32> {
    (0..n)
        .map(|_| (mean + stdev * f64::from(random.normal())) as f32)
        .collect()
}

fn uniforms(random: &mut Philox, n: usize, low: f64, high: f64) -> Vec<f32> {
    (0..n)
        .map(|_| (low + (high - low) * random.uniform_f64()) as f32)
        .collect()
}

/// FNV-1a: the stream number of a name.
fn name_stream(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Writes tensors to a safetensors file, sorted by name; the file appears whole or not at all.
pub fn save_tensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &[(&str, String)],
) -> Result<()> {
    let contiguous = tensors
        .iter()
        .map(|(n, t)| Ok((n.clone(), t.to_device(&Device::Cpu)?.contiguous()?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    let failed = |reason: String| Error::bad_model(path.display().to_string(), reason);
    let plain = safetensors::serialize(contiguous.iter().map(|(n, t)| (n.as_str(), t)), None)
        .map_err(|e| failed(e.to_string()))?;
    let bytes = with_metadata(plain, metadata).map_err(|e| failed(e.to_string()))?;
    write_whole(path, &bytes)
}

/// A safetensors file without metadata, given some. The library takes metadata as a hash map
/// and writes them in its order, which differs from run to run; here they are in order of key.
fn with_metadata(file: Vec<u8>, metadata: &[(&str, String)]) -> serde_json::Result<Vec<u8>> {
    let Some((length, _)) = file
        .split_first_chunk::<8>()
        .filter(|_| !metadata.is_empty())
    else {
        return Ok(file);
    };
    let (header, tensors) = file[8..].split_at(u64::from_le_bytes(*length) as usize);
    let metadata: BTreeMap<&str, &str> = metadata.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let mut new = b"{\"__metadata__\":".to_vec();
    serde_json::to_writer(&mut new, &metadata)?;
    let rest = header[1..].trim_ascii_end();
    if rest != b"}" {
        new.push(b',');
    }
    new.extend_from_slice(rest);
    new.resize(new.len().next_multiple_of(8), b' ');
    let length = (new.len() as u64).to_le_bytes();
    Ok([&length[..], &new, tensors].concat())
}

/// What a JSON file holds.
///
/// # Errors
/// If it cannot be read, or holds something else.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::bad_model(path.display().to_string(), e.to_string()))
}

/// Reads all tensors of a safetensors file.
pub fn load_tensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    candle_core::safetensors::load_buffer(&bytes, device)
        .map(|map| map.into_iter().collect())
        .map_err(|e| Error::bad_model(path.display().to_string(), e.to_string()))
}

/// [`crate::picture::write_whole`], making the folder where there is none.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    crate::picture::write_whole(path, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_are_written_in_order_and_read_back_by_the_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let metadata = ["d", "b", "a", "c"].map(|k| (k, format!("{k} \"quoted\" ä")));
        let one = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
        for tensors in [vec![], vec![("x".to_string(), one)]] {
            save_tensors(&path, &tensors, &metadata).unwrap();
            let bytes = std::fs::read(&path).unwrap();
            for _ in 0..4 {
                save_tensors(&path, &tensors, &metadata).unwrap();
                assert_eq!(std::fs::read(&path).unwrap(), bytes);
            }
            let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            let read = header.metadata().clone().unwrap();
            assert_eq!(read.len(), 4);
            assert!(metadata.iter().all(|(k, v)| read[*k] == *v));
            let back = load_tensors(&path, &Device::Cpu).unwrap();
            assert_eq!(back.len(), tensors.len());
            for (name, tensor) in &tensors {
                let (read, was) = (back[name].to_vec1::<f32>(), tensor.to_vec1::<f32>());
                assert_eq!(read.unwrap(), was.unwrap());
            }
            // One key: what the library itself would write.
            save_tensors(&path, &tensors, &[("k", "v".into())]).unwrap();
            let map = Some([("k".to_string(), "v".to_string())].into());
            let own = tensors.iter().map(|(n, t)| (n.as_str(), t));
            let own = safetensors::serialize(own, map).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), own);
        }
    }

    fn values(params: &Params, name: &str) -> Vec<f32> {
        params
            .get(name)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn first_values_depend_on_seed_and_name_alone() {
        let one = Params::new(3, Device::Cpu);
        candle_nn::linear(4, 3, one.builder(DType::F32).pp("a")).unwrap();
        let two = Params::new(3, Device::Cpu);
        candle_nn::linear(7, 7, two.builder(DType::F32).pp("0")).unwrap();
        candle_nn::linear(4, 3, two.builder(DType::F32).pp("a")).unwrap();
        assert_eq!(values(&one, "a.weight"), values(&two, "a.weight"));
        let other = Params::new(4, Device::Cpu);
        candle_nn::linear(4, 3, other.builder(DType::F32).pp("a")).unwrap();
        assert_ne!(values(&one, "a.weight"), values(&other, "a.weight"));
    }

    #[test]
    fn a_saved_set_loads_exactly_and_a_wrong_one_changes_nothing() {
        let folder = std::env::temp_dir().join(format!("simpatico-params-{}", std::process::id()));
        let file = folder.join("p.safetensors");
        let saved = Params::new(1, Device::Cpu);
        candle_nn::linear(4, 3, saved.builder(DType::F32).pp("a")).unwrap();
        saved
            .save(&file, DType::F32, &[("made", "here".into())])
            .unwrap();
        let loaded = Params::new(2, Device::Cpu);
        candle_nn::linear(4, 3, loaded.builder(DType::F32).pp("a")).unwrap();
        loaded.load(&file).unwrap();
        assert_eq!(values(&saved, "a.weight"), values(&loaded, "a.weight"));
        let wrong = Params::new(2, Device::Cpu);
        candle_nn::linear(5, 3, wrong.builder(DType::F32).pp("a")).unwrap();
        let before = values(&wrong, "a.weight");
        assert!(
            wrong
                .load(&file)
                .unwrap_err()
                .to_string()
                .contains("expected shape")
        );
        assert_eq!(before, values(&wrong, "a.weight"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
