//! DINOv2 (ViT-S/14 with registers, or any of its family): one vector a picture, for how
//! alike two pictures are in what they show. arXiv 2304.07193 and 2309.16588.
//!
//! Written anew because candle-transformers' has another LayerNorm epsilon, takes the nearest
//! position instead of resizing the table, knows no registers and asks for a head. Not here:
//! patch tokens, training.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::nn::{self, Linear, Mask};
use crate::picture::Picture;
use crate::weights::Weights;
use crate::{Error, Result};

const EPS: f64 = 1e-6;
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];
/// The side pictures are scaled to: 16 patches of 14.
const SIDE: u32 = 224;
const BATCH: usize = 8;

struct Norm(Tensor, Tensor);

impl Norm {
    fn new(d: usize, vb: VarBuilder) -> Result<Self> {
        Ok(Self(vb.get(d, "weight")?, vb.get(d, "bias")?))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        nn::layer_norm(x, Some(&self.0), Some(&self.1), EPS)
    }
}

struct Block {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    scale1: Tensor,
    norm2: Norm,
    fc1: Linear,
    fc2: Linear,
    scale2: Tensor,
}

/// The network.
pub struct Dino {
    patch: (Tensor, Tensor),
    class: Tensor,
    registers: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    heads: usize,
}

impl Dino {
    /// Opens model.safetensors in a folder, as `simpatico models pull dinov2-s14-registers`
    /// leaves it. Heads are 64 wide, as in every DINOv2.
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        Self::new(&Weights::open(folder)?, None, device)
    }

    /// From weights with the names of the original (and timm's); the sizes are read off the
    /// shapes. `heads`: `None` for a head of every 64 channels.
    pub fn new(weights: &Weights, heads: Option<usize>, device: &Device) -> Result<Self> {
        let shape = |name: &str| {
            weights.shape(name).map(<[usize]>::to_vec).ok_or_else(|| {
                Error::bad_model(weights.name(), format!("expected a DINOv2 with {name}"))
            })
        };
        let patch = shape("patch_embed.proj.weight")?;
        let (positions, registers) = (shape("pos_embed")?, shape("register_tokens")?);
        let (&[d, 3, p, q], [_, n, _], [_, r, _]) =
            (patch.as_slice(), positions.as_slice(), registers.as_slice())
        else {
            return Err(Error::bad_model(
                weights.name(),
                "shapes that no DINOv2 has",
            ));
        };
        let vb = weights.var_builder(DType::F32, device);
        let hidden = shape("blocks.0.mlp.fc1.weight")?[0];
        let depth = (0..)
            .take_while(|i| weights.contains(&format!("blocks.{i}.norm1.weight")))
            .count();
        let block = |i: usize| -> Result<Block> {
            let vb = vb.pp("blocks").pp(i);
            Ok(Block {
                norm1: Norm::new(d, vb.pp("norm1"))?,
                qkv: nn::linear(d, 3 * d, vb.pp("attn.qkv"))?,
                proj: nn::linear(d, d, vb.pp("attn.proj"))?,
                scale1: vb.get(d, "ls1.gamma")?,
                norm2: Norm::new(d, vb.pp("norm2"))?,
                fc1: nn::linear(d, hidden, vb.pp("mlp.fc1"))?,
                fc2: nn::linear(hidden, d, vb.pp("mlp.fc2"))?,
                scale2: vb.get(d, "ls2.gamma")?,
            })
        };
        Ok(Self {
            patch: (
                vb.get((d, 3, p, q), "patch_embed.proj.weight")?,
                vb.get(d, "patch_embed.proj.bias")?,
            ),
            class: vb.get((1, 1, d), "cls_token")?,
            registers: vb.get((1, *r, d), "register_tokens")?,
            positions: vb.get((1, *n, d), "pos_embed")?,
            blocks: (0..depth).map(block).collect::<Result<_>>()?,
            norm: Norm::new(d, vb.pp("norm"))?,
            heads: heads.unwrap_or((d / 64).max(1)),
        })
    }

    /// The class token's vector of each picture, (b, d); `x` is (b, 3, h, w), normalised, its
    /// sides multiples of the patch.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = x.dims4()?;
        let p = self.patch.0.dim(2)?;
        let (rows, columns) = (h / p, w / p);
        let x = x.conv2d(&self.patch.0, 0, p, 1, 1)?; // (b, d, rows, columns)
        let x = x
            .flatten_from(2)?
            .transpose(1, 2)?
            .broadcast_add(&self.patch.1)?;
        let x = x.broadcast_add(&self.resized_positions(rows, columns)?)?; // (b, n, d)
        let class = (&self.class + self.positions.narrow(1, 0, 1)?)?;
        let every = |t: &Tensor| t.repeat((b, 1, 1));
        let mut x = Tensor::cat(&[every(&class)?, every(&self.registers)?, x], 1)?;
        for block in &self.blocks {
            x = block.forward(&x, self.heads)?;
        }
        let class = x.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        self.norm.forward(&class)
    }

    /// The position table without its class entry for a grid, (1, rows · columns, d).
    fn resized_positions(&self, rows: usize, columns: usize) -> Result<Tensor> {
        let (_, n, d) = self.positions.dims3()?;
        let side = ((n - 1) as f64).sqrt().round() as usize;
        let grid = self.positions.narrow(1, 1, n - 1)?;
        if (rows, columns) == (side, side) {
            return Ok(grid);
        }
        let device = self.positions.device();
        let down = Tensor::from_vec(cubic(side, rows), (rows, side), device)?;
        let across = Tensor::from_vec(cubic(side, columns), (columns, side), device)?;
        let grid = grid.reshape((side, side * d))?;
        let grid = down.matmul(&grid)?.reshape((rows, side, d))?; // rows first
        let grid = across.broadcast_left(rows)?.matmul(&grid)?; // (rows, columns, d)
        Ok(grid.reshape((1, rows * columns, d))?)
    }

    /// The vectors of pictures, of length 1, each scaled to 224 x 224.
    pub fn embed(&self, pictures: &[Picture]) -> Result<Vec<Vec<f32>>> {
        let mut all = Vec::new();
        for chunk in pictures.chunks(BATCH) {
            let inputs = chunk.iter().map(|p| self.input(p));
            let inputs = Tensor::cat(&inputs.collect::<Result<Vec<_>>>()?, 0)?;
            let y = self.forward(&inputs)?;
            let length = y.sqr()?.sum_keepdim(1)?.sqrt()?;
            all.extend(y.broadcast_div(&length)?.to_vec2::<f32>()?);
        }
        Ok(all)
    }

    fn input(&self, picture: &Picture) -> Result<Tensor> {
        let device = self.class.device();
        let small = picture.on([255; 3]).resized(SIDE, SIDE);
        let values = small.rgb.iter().enumerate();
        let values = values.map(|(i, v)| (f32::from(*v) / 255.0 - MEAN[i % 3]) / STD[i % 3]);
        let side = SIDE as usize;
        let hwc = Tensor::from_vec(values.collect::<Vec<_>>(), (1, side, side, 3), device)?;
        Ok(hwc.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

impl Block {
    fn forward(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (b, n, d) = x.dims3()?;
        let qkv = self.qkv.forward(&self.norm1.forward(x)?)?;
        let part = |i: usize| -> Result<Tensor> {
            let part = qkv.narrow(2, i * d, d)?.reshape((b, n, heads, d / heads))?;
            Ok(part.transpose(1, 2)?.contiguous()?) // (b, heads, n, d / heads)
        };
        let scale = ((d / heads) as f64).sqrt().recip();
        let a = nn::attention(&part(0)?, &part(1)?, &part(2)?, scale, &Mask::None)?;
        let a = a.transpose(1, 2)?.reshape((b, n, d))?;
        let x = (x + self.proj.forward(&a)?.broadcast_mul(&self.scale1)?)?;
        let m = self.fc1.forward(&self.norm2.forward(&x)?)?;
        let m = self.fc2.forward(&nn::gelu_erf(&m)?)?;
        Ok((x + m.broadcast_mul(&self.scale2)?)?)
    }
}

/// The cosine of two vectors of length 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(x, y)| f64::from(*x) * f64::from(*y))
        .sum()
}

/// How each of `to` points is mixed from `from`: cubic (a = -0.5), widened when shrinking, as
/// torch's `interpolate(mode="bicubic", antialias=True)`. (to, from), rows first.
fn cubic(from: usize, to: usize) -> Vec<f32> {
    let scale = from as f64 / to as f64;
    let wide = scale.max(1.0);
    let kernel = |x: f64| match x.abs() {
        x if x < 1.0 => 1.5 * x * x * x - 2.5 * x * x + 1.0,
        x if x < 2.0 => -0.5 * x * x * x + 2.5 * x * x - 4.0 * x + 2.0,
        _ => 0.0,
    };
    let mut table = Vec::with_capacity(from * to);
    for i in 0..to {
        let center = (i as f64 + 0.5) * scale;
        let at = |j: usize| kernel((j as f64 + 0.5 - center) / wide);
        let total: f64 = (0..from).map(at).sum();
        table.extend((0..from).map(|j| (at(j) / total) as f32));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_network_gives_what_torch_gives_also_when_positions_are_resized() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/golden/dino/tiny.safetensors"
        );
        let weights = Weights::open(path.as_ref()).unwrap();
        let get = |name| weights.get_any(name, DType::F32, &Device::Cpu).unwrap();
        let dino = Dino::new(&weights, Some(2), &Device::Cpu).unwrap();
        for (x, y) in [("x", "y"), ("square", "square_y")] {
            let ours = dino.forward(&get(x)).unwrap();
            let worst = (ours - get(y)).unwrap().abs().unwrap().max_all().unwrap();
            let worst = worst.to_scalar::<f32>().unwrap();
            assert!(worst <= 1e-4, "{x}: {worst}");
        }
    }

    /// Looks for the model in the models' cache folder, and in SIMPATICO_DINO_REFERENCE for
    /// the folder with the pictures and out.json that tests/golden/dino/make.py wrote.
    #[test]
    fn real_weights_agree_with_the_reference_forward_on_photographs() {
        let model = crate::bundle::models_folder().join("dinov2-s14-registers");
        let reference = std::env::var_os("SIMPATICO_DINO_REFERENCE");
        let (true, Some(reference)) = (model.is_dir(), reference) else {
            println!("skipped: no dinov2-s14-registers or no reference");
            return;
        };
        let dino = Dino::open(&model, &Device::Cpu).unwrap();
        let reference = Path::new(&reference);
        let json = std::fs::read(reference.join("out.json")).unwrap();
        let expected: std::collections::BTreeMap<String, Vec<f32>> =
            serde_json::from_slice(&json).unwrap();
        let mut worst = 0f32;
        for (name, expected) in &expected {
            let path = reference.join(format!("{name}.png"));
            let (picture, _) = crate::picture::open(&path).unwrap();
            let input = dino.input(&picture).unwrap();
            let ours = dino.forward(&input).unwrap().to_vec2::<f32>().unwrap();
            for (a, b) in ours[0].iter().zip(expected) {
                worst = worst.max((a - b).abs());
            }
        }
        println!(
            "{} photographs, worst difference {worst:.2e}",
            expected.len()
        );
        assert!(worst <= 1e-3, "{worst}");
    }
}
