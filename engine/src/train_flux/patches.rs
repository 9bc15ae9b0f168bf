//! The best linear autoencoder of patches, in closed form and in seconds.
//!
//! 1. Encoder: the principal components of the patches (orthogonal iteration on their
//!    covariance), each divided by the root of its standard deviation: halfway to equal
//!    variances, so that the flow neither drowns the fine components in noise nor spends
//!    itself on them.
//! 2. Decoder: the ridge regression of a patch on the 3×3 latents around it.

use super::{WEIGHTS, autoencoder, write_whole};
use crate::flux::init;
use crate::flux::names::Kind;
use crate::flux::vae::{Config, Vae, patches};
use crate::params::{load_tensors, read_json, save_tensors};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// The shipped autoencoder: 8×8 patches, 24 channels.
pub fn config() -> Config {
    Config {
        latent_channels: 24,
        patch: Some(8),
        scaling_factor: 1.0,
        shift_factor: 0.0,
        ..Config::flux()
    }
}

/// A run's weights, and beside them its config: latents must keep their scale for as long as
/// anything is trained on them, also when the renderer they were fitted to changes.
const FILES: [&str; 2] = ["patches.safetensors", "patches.json"];

/// Fits a run's autoencoder to rendered pictures and writes it.
pub fn begin(run: &Path) -> Result<()> {
    let seen = autoencoder::pictures(&autoencoder::sample_scenes(400), 128)?;
    let weights = fit(&config(), &seen)?;
    let builder = init::builder(&weights, DType::F32, &Device::Cpu);
    let scaled = autoencoder::scaled(Vae::new(&config(), builder)?)?;
    write(run, &weights, scaled.config())
}

/// Takes over the exported autoencoder in `vae`, for a run that goes on from an exported flow:
/// that knows only its latents.
///
/// # Errors
/// If there is none, or it is not one of patches.
pub fn take_over(run: &Path, vae: &Path) -> Result<()> {
    let mut weights = load_tensors(&vae.join(WEIGHTS), &Device::Cpu)?;
    weights.retain(|name, _| name.contains(".patch."));
    for value in weights.values_mut() {
        *value = value.to_dtype(DType::F32)?;
    }
    let config = Config {
        detail: None,
        ..read_json(&vae.join("config.json"))?
    };
    Vae::new(&config, init::builder(&weights, DType::F32, &Device::Cpu))?;
    write(run, &weights, &config)
}

/// A run's autoencoder.
///
/// # Errors
/// If the run has none yet.
pub fn open(run: &Path, device: &Device) -> Result<Vae> {
    let [weights, config] = FILES.map(|file| run.join(file));
    if let Some(path) = [&weights, &config].into_iter().find(|p| !p.exists()) {
        return Err(Error::MissingModel {
            path: path.clone(),
            help: "begin with the stage patches".into(),
        });
    }
    let weights = load_tensors(&weights, &Device::Cpu)?;
    let builder = init::builder(&weights, DType::F32, device);
    Vae::new(&read_json(&config)?, builder)
}

/// Writes a run's autoencoder as one of diffusers' folders.
///
/// # Errors
/// If the run has none yet, or a file cannot be written.
pub fn export(run: &Path, folder: &Path) -> Result<()> {
    let config = open(run, &Device::Cpu)?.config().clone();
    let weights = load_tensors(&run.join(FILES[0]), &Device::Cpu)?;
    super::export(folder, Kind::Vae, 1, &weights, &config, "AutoencoderKL")
}

fn write(run: &Path, weights: &BTreeMap<String, Tensor>, config: &Config) -> Result<()> {
    let named: Vec<_> = weights.clone().into_iter().collect();
    save_tensors(&run.join(FILES[0]), &named, &[])?;
    let text = serde_json::to_vec_pretty(config)
        .map_err(|e| Error::BadRequest(format!("the config cannot be written: {e}")))?;
    write_whole(&run.join(FILES[1]), &text)
}

/// Fits weights to pictures (b, 3, h, w) in -1..1, whose sides are multiples of the patch.
///
/// # Errors
/// If the config is not of a patch autoencoder.
pub fn fit(config: &Config, pictures: &Tensor) -> Result<BTreeMap<String, Tensor>> {
    let Some(p) = config.patch else {
        return Err(Error::BadRequest(
            "a patch autoencoder's config gives the patch".into(),
        ));
    };
    let c = config.latent_channels;
    let all = patches(pictures, p)?.flatten_to(1)?; // (n, pixels)
    let (n, pixels) = all.dims2()?;
    let mean = all.mean_keepdim(0)?;
    let centered = all.broadcast_sub(&mean)?;
    let covariance = (centered.t()?.matmul(&centered)? / n as f64)?;
    let basis = principal(&covariance.to_vec2::<f32>()?, c);
    let basis = Tensor::from_vec(basis, (c, pixels), &Device::Cpu)?;
    let raw = centered.matmul(&basis.t()?)?;
    let spread = raw.sqr()?.mean_keepdim(0)?.sqrt()?.sqrt()?.t()?; // (c, 1)
    let encode = basis.broadcast_div(&spread)?;
    let bias = encode.matmul(&mean.t()?)?.neg()?.flatten_all()?;
    let mut weights = BTreeMap::from([
        ("encoder.patch.weight".to_string(), encode),
        ("encoder.patch.bias".to_string(), bias),
        (
            "decoder.patch.weight".to_string(),
            Tensor::zeros((pixels, c, 3, 3), DType::F32, &Device::Cpu)?,
        ),
        (
            "decoder.patch.bias".to_string(),
            Tensor::zeros(pixels, DType::F32, &Device::Cpu)?,
        ),
    ]);
    let vae = Vae::new(config, init::builder(&weights, DType::F32, &Device::Cpu))?;
    let (latents, _) = vae.posterior(pictures)?;
    let around = neighbourhoods(&latents)?; // (n, 9c + 1)
    let wide = around.dim(1)?;
    let gram = around.t()?.matmul(&around)?.to_vec2::<f32>()?;
    let aims = around.t()?.matmul(&all)?.to_vec2::<f32>()?;
    let solution = ridge(&gram, &aims, 1e-4 * n as f64)?; // wide × pixels
    let solution = Tensor::from_vec(solution, (wide, pixels), &Device::Cpu)?;
    // Rows lie as (dy, dx, c); the convolution wants (pixels, c, dy, dx).
    let decode = solution
        .narrow(0, 0, 9 * c)?
        .reshape((3, 3, c, pixels))?
        .permute((3, 2, 0, 1))?
        .contiguous()?;
    weights.insert("decoder.patch.weight".into(), decode);
    weights.insert(
        "decoder.patch.bias".into(),
        solution.get(9 * c)?.contiguous()?,
    );
    Ok(weights)
}

/// Each place's 3×3 latents, zero beyond the rim, and a 1: (b·h·w, 9c + 1).
fn neighbourhoods(latents: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = latents.dims4()?;
    let padded = latents.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    let mut parts = Vec::with_capacity(10);
    for (dy, dx) in (0..3).flat_map(|dy| (0..3).map(move |dx| (dy, dx))) {
        let part = padded.narrow(2, dy, h)?.narrow(3, dx, w)?;
        parts.push(part.permute((0, 2, 3, 1))?.reshape((b * h * w, c))?);
    }
    parts.push(Tensor::ones((b * h * w, 1), DType::F32, &Device::Cpu)?);
    Ok(Tensor::cat(&parts, 1)?)
}

/// The `count` strongest eigenvectors of a symmetric matrix, in rows, strongest first.
fn principal(matrix: &[Vec<f32>], count: usize) -> Vec<f32> {
    let n = matrix.len();
    let mut random = Philox::new(0, 0);
    let mut vectors: Vec<Vec<f64>> = (0..count)
        .map(|_| (0..n).map(|_| f64::from(random.normal())).collect())
        .collect();
    for _ in 0..120 {
        for vector in &mut vectors {
            *vector = matrix
                .iter()
                .map(|row| {
                    row.iter()
                        .zip(&*vector)
                        .map(|(m, v)| f64::from(*m) * v)
                        .sum()
                })
                .collect();
        }
        for i in 0..count {
            let (done, rest) = vectors.split_at_mut(i);
            for other in done.iter() {
                let along: f64 = other.iter().zip(&rest[0]).map(|(a, b)| a * b).sum();
                rest[0]
                    .iter_mut()
                    .zip(other)
                    .for_each(|(v, o)| *v -= along * o);
            }
            let length = rest[0].iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-30);
            rest[0].iter_mut().for_each(|v| *v /= length);
        }
    }
    vectors.into_iter().flatten().map(|v| v as f32).collect()
}

/// Solves (gram + λ·1)·x = aims by Cholesky; x in rows.
fn ridge(gram: &[Vec<f32>], aims: &[Vec<f32>], lambda: f64) -> Result<Vec<f32>> {
    let n = gram.len();
    let mut lower = vec![vec![0f64; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| lower[i][k] * lower[j][k]).sum();
            let left = f64::from(gram[i][j]) - dot + if i == j { lambda } else { 0.0 };
            if i == j && left <= 0.0 {
                return Err(Error::BadRequest(
                    "too few pictures to fit patches to".into(),
                ));
            }
            lower[i][j] = if i == j {
                left.sqrt()
            } else {
                left / lower[j][j]
            };
        }
    }
    let columns = aims.first().map_or(0, Vec::len);
    let mut x: Vec<Vec<f64>> = aims
        .iter()
        .map(|row| row.iter().map(|v| f64::from(*v)).collect())
        .collect();
    let subtract = |x: &mut [Vec<f64>], i: usize, k: usize, factor: f64| {
        let from = x[k].clone();
        x[i].iter_mut()
            .zip(from)
            .for_each(|(a, b)| *a -= factor * b);
    };
    for i in 0..n {
        for k in 0..i {
            subtract(&mut x, i, k, lower[i][k]);
        }
        x[i].iter_mut().for_each(|v| *v /= lower[i][i]);
    }
    for i in (0..n).rev() {
        for k in i + 1..n {
            subtract(&mut x, i, k, lower[k][i]);
        }
        x[i].iter_mut().for_each(|v| *v /= lower[i][i]);
    }
    Ok(x.into_iter()
        .take(n)
        .flat_map(|row| row.into_iter().take(columns))
        .map(|v| v as f32)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Object, Scene};
    use crate::train_flux::autoencoder::pictures;

    #[test]
    fn unseen_pictures_come_back_nearly_as_they_were() {
        let scenes = |from: u64, count: u64| -> Vec<Scene> {
            let of = |i: u64| Scene::random(Object::ALL[i as usize % Object::ALL.len()], i);
            (from..from + count).map(of).collect()
        };
        let config = config();
        let seen = pictures(&scenes(0, 40), 64).unwrap();
        let weights = fit(&config, &seen).unwrap();
        let vae = Vae::new(&config, init::builder(&weights, DType::F32, &Device::Cpu)).unwrap();
        let unseen = pictures(&scenes(1000, 12), 64).unwrap();
        let again = vae.decode(&vae.encode(&unseen).unwrap()).unwrap();
        let error = (again - &unseen)
            .unwrap()
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap();
        let spread = unseen.sqr().unwrap().mean_all().unwrap();
        let share = error.to_scalar::<f32>().unwrap() / spread.to_scalar::<f32>().unwrap();
        assert!(share < 0.04, "{share} of the signal is lost");
    }

    #[test]
    fn a_run_goes_on_with_the_latents_of_what_was_exported() {
        let scenes: Vec<Scene> = (0..20).map(|i| Scene::random(Object::ALL[i], 7)).collect();
        let seen = pictures(&scenes, 64).unwrap();
        let weights = fit(&config(), &seen).unwrap();
        let builder = init::builder(&weights, DType::F32, &Device::Cpu);
        let vae = Vae::new(&config(), builder).unwrap();
        let vae = vae.with_scaling(1.3, 0.125);
        let [first, exported, next] = [(); 3].map(|_| tempfile::tempdir().unwrap());
        write(first.path(), &weights, vae.config()).unwrap();
        export(first.path(), exported.path()).unwrap();
        take_over(next.path(), exported.path()).unwrap();
        let open = |run: &tempfile::TempDir| open(run.path(), &Device::Cpu).unwrap();
        let (first, next) = (open(&first), open(&next));
        assert_eq!(first.config(), vae.config());
        assert_eq!(next.config(), vae.config());
        let latents = first.encode(&seen).unwrap();
        // Exported in half precision.
        let off = (next.encode(&seen).unwrap() - latents).unwrap();
        let off = off.abs().unwrap().max_all().unwrap().to_scalar::<f32>();
        assert!(off.unwrap() < 0.02);
        let empty = tempfile::tempdir().unwrap();
        let refused = super::open(empty.path(), &Device::Cpu).unwrap_err();
        assert!(refused.to_string().contains("stage patches"), "{refused}");
    }
}
