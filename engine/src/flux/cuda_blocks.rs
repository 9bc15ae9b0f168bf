//! Flux's blocks on a CUDA device, for inference, with few passes over memory.
//!
//! Products and attention stay cuBLAS's and flash attention's. What lies between them (norm and
//! modulation; bias, norm and rotation of query and key; bias and GELU; bias, gate and sum) is
//! one kernel each, from `kernels/flux.inc`: a single block goes over its activations five
//! times between its products where tensor operations take some twenty. tests/gpu/NOTES.md says
//! what that should win.
//!
//! Each function answers `None` where this is not the way (a gradient is wanted, another dtype or
//! odd widths, `SIMPATICO_FUSED=0` for comparing) and the caller does it with tensor operations.
//! The kernels compute in f32, so that half precision rounds less often than these do.

use super::cpu_blocks::{Single, Stream};
use crate::kernels::{self, Held, Kernel, Number, THREADS, launch_of, through};
use crate::nn::{self, Linear, Mask};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result as CandleResult, Shape, Tensor, bail,
};
use half::{bf16, f16};

/// Added to variances and mean squares.
const EPS: f32 = 1e-6;
/// The widest head that a warp keeps in registers.
const HEAD_MAX: usize = 256;

/// What a kernel is to do; each has its own tensors.
enum Pass {
    /// norm and modulation, from part `part` on.
    Norm { modulation: Tensor, part: usize },
    /// x + gate·(y + bias).
    Gate {
        modulation: Tensor,
        y: Tensor,
        bias: Tensor,
        part: usize,
    },
    /// Query, key and value of all streams' products, one after the other in the sequence; the
    /// first stream's product is what the operation is applied to.
    Heads {
        sides: Vec<Side>,
        cos: Tensor,
        sin: Tensor,
        heads: usize,
    },
    /// Attention's output beside GELU of the product's last columns; without it GELU alone.
    Gelu {
        attended: Option<Tensor>,
        bias: Tensor,
        inner: usize,
    },
}

/// One stream's product, before its bias, and its norms' weights.
#[derive(Clone)]
struct Side {
    h: Tensor,
    bias: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
}

/// From one picture's modulation to the next's: 0 where all share one.
fn stride(modulation: &Tensor) -> CandleResult<i32> {
    let (pictures, width) = modulation.dims2()?;
    Ok(if pictures == 1 { 0 } else { width as i32 })
}

impl kernels::Pass for Pass {
    fn kernel(&self) -> &'static str {
        match self {
            Self::Norm { .. } => "norm",
            Self::Gate { .. } => "gate",
            Self::Heads { .. } => "heads",
            Self::Gelu { .. } => "gelu",
        }
    }

    fn shape(&self, x: &Shape) -> CandleResult<Shape> {
        Ok(match self {
            Self::Norm { .. } | Self::Gate { .. } => x.clone(),
            Self::Heads {
                sides, cos, heads, ..
            } => {
                let b = x.dims3()?.0;
                let head = sides[0].norm_q.dim(0)?;
                (3, b, cos.dim(0)?, *heads, head).into()
            }
            Self::Gelu {
                attended, inner, ..
            } => {
                let (b, t, _) = x.dims3()?;
                let joined = attended.as_ref().map_or(Ok(0), |a| a.dim(2))?;
                (b, t, joined + inner).into()
            }
        })
    }

    fn launch<T: Number>(
        &self,
        kernel: &Kernel,
        (x, shape): (&CudaView<T>, &Shape),
        out: &CudaSlice<T>,
    ) -> CandleResult<()> {
        let (b, tokens, width) = shape.dims3()?;
        let count = out.len() / 8;
        let (eights, rows, wide) = (count as i64, tokens as i32, width as i32);
        let mut call = kernel.call();
        match self {
            Self::Norm { modulation, part } => {
                let held = Held::of(modulation)?;
                let (at, part) = (held.numbers::<T>()?, *part as i32);
                let stride = stride(modulation)?;
                call.arg(x).arg(&at).arg(out);
                call.arg(&rows).arg(&wide).arg(&stride).arg(&part).arg(&EPS);
                // SAFETY: the arguments are those of `norm` in flux.inc. x and out are b·tokens
                // rows of `wide` numbers, a multiple of 8, and the modulation has these parts
                // (`suits`); the tensors are held until the launch is in the stream's queue,
                // and their memory is freed in its order.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(b * tokens * THREADS)) }.w()?;
            }
            Self::Gate {
                modulation,
                y,
                bias,
                part,
            } => {
                let held = (Held::of(modulation)?, Held::of(y)?, Held::of(bias)?);
                let (at, y) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                let (bias, part) = (held.2.numbers::<T>()?, *part as i32);
                let stride = stride(modulation)?;
                call.arg(x).arg(&at).arg(&y).arg(&bias).arg(out);
                call.arg(&eights).arg(&rows).arg(&wide);
                call.arg(&stride).arg(&part);
                // SAFETY: as above, for `gate`; y is a product of x's rows and as wide, and the
                // bias has one row's numbers (`bias_of`).
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(count)) }.w()?;
            }
            Self::Gelu {
                attended,
                bias,
                inner,
            } => {
                let joined = attended.as_ref().map_or(Ok(0), |a| a.dim(2))? as i32;
                let (from, inner) = ((width - inner) as i32, *inner as i32);
                let held = (
                    attended.as_ref().map(Held::of).transpose()?,
                    Held::of(bias)?,
                );
                // Without an attended part nothing of the first argument is read.
                let beside = held.0.as_ref().map(Held::numbers::<T>).transpose()?;
                let bias = held.1.numbers::<T>()?;
                call.arg(beside.as_ref().unwrap_or(x)).arg(x);
                call.arg(&bias).arg(out);
                call.arg(&eights).arg(&joined).arg(&inner);
                call.arg(&wide).arg(&from);
                // SAFETY: as above, for `gelu`; the bias has one row's numbers, and what stands
                // beside has `joined` numbers for each row.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(count)) }.w()?;
            }
            Self::Heads {
                sides,
                cos,
                sin,
                heads,
            } => {
                let (held_cos, held_sin) = (Held::of(cos)?, Held::of(sin)?);
                let (cosine, sine) = (held_cos.numbers::<f32>()?, held_sin.numbers::<f32>()?);
                let (pictures, total) = (b as i32, cos.dim(0)? as i32);
                let mut first = 0i32;
                for side in sides {
                    let (_, tokens, width) = side.h.dims3()?;
                    let head = side.norm_q.dim(0)?;
                    let warps = b * tokens * 3 * heads;
                    let (count, rows, wide) = (warps as i64, tokens as i32, width as i32);
                    let (heads, head) = (*heads as i32, head as i32);
                    let held = (
                        Held::of(&side.h)?,
                        Held::of(&side.bias)?,
                        Held::of(&side.norm_q)?,
                        Held::of(&side.norm_k)?,
                    );
                    let (h, bias) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                    let (norm_q, norm_k) = (held.2.numbers::<T>()?, held.3.numbers::<T>()?);
                    let mut call = kernel.call();
                    call.arg(&h).arg(&bias).arg(&norm_q).arg(&norm_k);
                    call.arg(&cosine).arg(&sine).arg(out);
                    call.arg(&count).arg(&pictures).arg(&rows).arg(&wide);
                    call.arg(&heads).arg(&head).arg(&total);
                    call.arg(&first).arg(&EPS);
                    // SAFETY: as above, for `heads`; h has 3·heads·head columns or more (it is
                    // d to 3d or 7d), the tables have head / 2 numbers for each of `total`
                    // places (`attend`), which the streams fill one after the other.
                    #[allow(unsafe_code)]
                    unsafe { call.launch(launch_of(warps * 32)) }.w()?;
                    first += rows;
                }
            }
        }
        Ok(())
    }
}

/// The weight that 8-bit codes and their scale stand for.
struct Widen {
    scale: f32,
    dtype: DType,
}

impl Widen {
    fn run<T: Number>(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        let device = storage.device();
        let (count, Some((from, to))) = (
            layout.shape().elem_count() / 8,
            layout
                .contiguous_offsets()
                .filter(|(a, b)| (b - a) % 8 == 0),
        ) else {
            bail!("8-bit weights need to be contiguous, and a multiple of 8 in number")
        };
        let codes = u8::as_cuda_slice(storage)?.slice(from..to);
        // SAFETY: the kernel writes every number of it.
        #[allow(unsafe_code)]
        let out = unsafe { device.alloc::<T>(count * 8)? };
        let name = format!("widen_{}", T::NAME);
        let function = device.get_or_load_custom_func(&name, kernels::MODULE, kernels::PTX)?;
        let eights = count as i64;
        let mut call = function.builder();
        call.arg(&codes).arg(&out).arg(&eights).arg(&self.scale);
        // SAFETY: the arguments are those of `widen` in flux.inc; both have 8·count numbers.
        #[allow(unsafe_code)]
        unsafe { call.launch(launch_of(count)) }.w()?;
        let out = CudaStorage::wrap_cuda_slice(out, device.clone());
        Ok((out, layout.shape().clone()))
    }
}

impl CustomOp1 for Widen {
    fn name(&self) -> &'static str {
        "widen"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        bail!("on a CPU weights are widened by a table")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        match self.dtype {
            DType::F32 => self.run::<f32>(x, layout),
            DType::BF16 => self.run::<bf16>(x, layout),
            DType::F16 => self.run::<f16>(x, layout),
            other => bail!("8-bit weights become f32, bf16 or f16, not {other:?}"),
        }
    }
}

/// What the codes of [`crate::nn::EightBit`] stand for.
pub(crate) fn widen(codes: &Tensor, scale: f32, dtype: DType) -> CandleResult<Tensor> {
    codes.apply_op1_no_bwd(&Widen { scale, dtype })
}

/// Whether this is the way for these activations.
fn suits(x: &Tensor, modulation: &Tensor, parts: usize, (heads, norm): (usize, &Tensor)) -> bool {
    let Ok((b, _, d)) = x.dims3() else {
        return false;
    };
    let known = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let modulated = matches!(modulation.dims(), [n, w] if (*n == 1 || *n == b) && *w == parts * d);
    let head = d / heads.max(1);
    *kernels::WANTED
        && x.device().is_cuda()
        && known
        && modulated
        && modulation.dtype() == x.dtype()
        && !x.track_op()
        && !modulation.track_op()
        && d % 8 == 0
        && head * heads == d
        && head % 2 == 0
        && head <= HEAD_MAX
        && norm.dims() == [head]
        && norm.dtype() == x.dtype()
}

/// The bias of a layer of these inputs and outputs that is not being trained.
fn bias_of(layer: &Linear, inputs: usize, outputs: usize) -> Option<Tensor> {
    let fits = layer.weight().dims() == [outputs, inputs] && !layer.weight().track_op();
    let bias = layer.bias().filter(|b| fits && !b.track_op())?;
    (bias.dims() == [outputs] && bias.is_contiguous()).then(|| bias.clone())
}

fn norm(x: &Tensor, modulation: &Tensor, part: usize) -> Result<Tensor> {
    let modulation = modulation.clone();
    Ok(through(x, &Pass::Norm { modulation, part })?)
}

fn gate(x: &Tensor, modulation: &Tensor, part: usize, y: Tensor, bias: Tensor) -> Result<Tensor> {
    let pass = Pass::Gate {
        modulation: modulation.clone(),
        y,
        bias,
        part,
    };
    Ok(through(x, &pass)?)
}

/// softmax(q·kᵀ)·v of all streams' tokens, one stream after the other: (b, tokens, d).
fn attend(sides: Vec<Side>, heads: usize, (cos, sin): (&Tensor, &Tensor)) -> Result<Tensor> {
    let h = sides[0].h.clone();
    let d = heads * sides[0].norm_q.dim(0)?;
    let tokens = sides
        .iter()
        .map(|s| s.h.dim(1))
        .sum::<CandleResult<usize>>()?;
    let head = d / heads;
    if cos.dims() != [tokens, head / 2] || sin.dims() != cos.dims() {
        return Err(Error::BadRequest(format!(
            "positions of {tokens} tokens, {} angles each, are needed, got {:?}",
            head / 2,
            cos.dims()
        )));
    }
    let b = h.dim(0)?;
    let pass = Pass::Heads {
        sides,
        cos: cos.contiguous()?,
        sin: sin.contiguous()?,
        heads,
    };
    let all = through(&h, &pass)?; // (3, b, tokens, heads, head)
    // As attention takes them; flash attention turns them back, which then moves nothing.
    let part = |i: usize| -> Result<Tensor> { Ok(all.get(i)?.transpose(1, 2)?) };
    let scale = 1.0 / (head as f64).sqrt();
    let y = nn::attention(&part(0)?, &part(1)?, &part(2)?, scale, &Mask::None)?;
    Ok(y.transpose(1, 2)?.reshape((b, tokens, d))?)
}

impl Single<'_> {
    /// As [`Single::forward`], on a CUDA device.
    pub(super) fn on_cuda(
        &self,
        x: &Tensor,
        modulation: &Tensor,
        angles: (&Tensor, &Tensor),
    ) -> Result<Option<Tensor>> {
        if !suits(x, modulation, 3, (self.heads, self.norm_q)) {
            return Ok(None);
        }
        let d = x.dim(2)?;
        let (Some(first), Some(second)) = (
            bias_of(self.first, d, 7 * d),
            bias_of(self.second, 5 * d, d),
        ) else {
            return Ok(None);
        };
        let (x, modulation) = (x.contiguous()?, modulation.contiguous()?);
        let h = self.first.product(&norm(&x, &modulation, 0)?)?; // (b, tokens, 7d)
        let side = Side {
            h: h.clone(),
            bias: first.clone(),
            norm_q: self.norm_q.clone(),
            norm_k: self.norm_k.clone(),
        };
        let attended = attend(vec![side], self.heads, angles)?;
        let pass = Pass::Gelu {
            attended: Some(attended),
            bias: first,
            inner: 4 * d,
        };
        let wide = through(&h, &pass)?; // (b, tokens, 5d)
        let y = self.second.product(&wide)?;
        Ok(Some(gate(&x, &modulation, 2, y, second)?))
    }
}

/// The biases of a stream's four layers.
struct Biases {
    qkv: Tensor,
    proj: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Biases {
    fn of(stream: &Stream, d: usize) -> Option<Self> {
        Some(Self {
            qkv: bias_of(stream.qkv, d, 3 * d)?,
            proj: bias_of(stream.proj, d, d)?,
            up: bias_of(stream.up, d, 4 * d)?,
            down: bias_of(stream.down, 4 * d, d)?,
        })
    }
}

impl Stream<'_> {
    fn side(&self, x: &Tensor, modulation: &Tensor, biases: &Biases) -> Result<Side> {
        Ok(Side {
            h: self.qkv.product(&norm(x, modulation, 0)?)?,
            bias: biases.qkv.clone(),
            norm_q: self.norm_q.clone(),
            norm_k: self.norm_k.clone(),
        })
    }

    fn finish(
        &self,
        x: &Tensor,
        modulation: &Tensor,
        attended: &Tensor,
        biases: Biases,
    ) -> Result<Tensor> {
        let y = self.proj.product(attended)?;
        let x = gate(x, modulation, 2, y, biases.proj)?;
        let h = self.up.product(&norm(&x, modulation, 3)?)?;
        let inner = h.dim(2)?;
        let pass = Pass::Gelu {
            attended: None,
            bias: biases.up,
            inner,
        };
        let h = through(&h, &pass)?;
        gate(&x, modulation, 5, self.down.product(&h)?, biases.down)
    }
}

/// As [`super::cpu_blocks::double`], on a CUDA device.
pub(super) fn double(
    (image, image_mod, image_stream): (&Tensor, &Tensor, &Stream),
    (text, text_mod, text_stream): (&Tensor, &Tensor, &Stream),
    heads: usize,
    angles: (&Tensor, &Tensor),
) -> Result<Option<(Tensor, Tensor)>> {
    if !suits(image, image_mod, 6, (heads, image_stream.norm_q))
        || !suits(text, text_mod, 6, (heads, text_stream.norm_q))
    {
        return Ok(None);
    }
    let (n, t, d) = (image.dim(1)?, text.dim(1)?, image.dim(2)?);
    let (Some(of_image), Some(of_text)) = (Biases::of(image_stream, d), Biases::of(text_stream, d))
    else {
        return Ok(None);
    };
    let (image, image_mod) = (image.contiguous()?, image_mod.contiguous()?);
    let (text, text_mod) = (text.contiguous()?, text_mod.contiguous()?);
    let sides = vec![
        text_stream.side(&text, &text_mod, &of_text)?,
        image_stream.side(&image, &image_mod, &of_image)?,
    ];
    let attended = attend(sides, heads, angles)?;
    let part = |from, count| attended.narrow(1, from, count)?.contiguous();
    Ok(Some((
        image_stream.finish(&image, &image_mod, &part(t, n)?, of_image)?,
        text_stream.finish(&text, &text_mod, &part(0, t)?, of_text)?,
    )))
}
