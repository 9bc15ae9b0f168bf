//! What lies between the products of a layer that learns, on a CUDA device: one kernel each
//! (`kernels/learn.inc`) for what is five to twenty-five tensor operations, and dropout without
//! its mask being made and sent by the host. tests/gpu/NOTES.md says what that should win.
//!
//! Each function answers `None` where a kernel does not serve: another device, widths that are no
//! multiple of 8, `SIMPATICO_FUSED=0`.

use crate::kernels::{self, Held, Kernel, Number, launch_of, through};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{D, DType, Result, Shape, Tensor};

enum Pass<'a> {
    /// Dropout by this stream of random numbers.
    Drop { p: f32, seed: u64, stream: u64 },
    /// An RMS norm's gradient g to its input's, on top of `more`.
    NormBack {
        weight: &'a Tensor,
        g: &'a Tensor,
        more: &'a Tensor,
        eps: f32,
    },
    /// A step of AdamW for a weight (x): it and its two means afterwards.
    AdamW {
        means: (&'a Tensor, &'a Tensor),
        g: &'a Tensor,
        numbers: [f32; 9],
    },
    /// silu(x)·up.
    Gated { up: &'a Tensor },
    /// The gradient g of silu(gate)·up to those of gate (x) and up, one after the other.
    GateBack { up: &'a Tensor, g: &'a Tensor },
}

impl kernels::Pass for Pass<'_> {
    fn kernel(&self) -> &'static str {
        match self {
            Self::Drop { .. } => "drop",
            Self::NormBack { .. } => "norm_back",
            Self::AdamW { .. } => "adamw",
            Self::Gated { .. } => "gated",
            Self::GateBack { .. } => "gate_back",
        }
    }

    fn shape(&self, x: &Shape) -> Result<Shape> {
        Ok(match self {
            Self::Drop { .. } | Self::NormBack { .. } | Self::Gated { .. } => x.clone(),
            Self::AdamW { .. } => [&[3], x.dims()].concat().into(),
            Self::GateBack { .. } => [&[2], x.dims()].concat().into(),
        })
    }

    fn launch<T: Number>(
        &self,
        kernel: &Kernel,
        (x, shape): (&CudaView<T>, &Shape),
        out: &CudaSlice<T>,
    ) -> Result<()> {
        let mut call = kernel.call();
        let eights = (shape.elem_count() / 8) as i64;
        let each = launch_of(eights as usize);
        match self {
            Self::Drop { p, seed, stream } => {
                let (keep, halves) = (kept(*p), |n: u64| (n as u32, (n >> 32) as u32));
                let (key, stream) = (halves(*seed), halves(*stream));
                call.arg(x).arg(out).arg(&eights).arg(&key.0).arg(&key.1);
                call.arg(&stream.0).arg(&stream.1).arg(p).arg(&keep);
                // SAFETY: the arguments are drop's, and it goes over as many eights as x has.
                #[allow(unsafe_code)]
                unsafe { call.launch(each) }.w()?;
            }
            Self::NormBack {
                weight,
                g,
                more,
                eps,
            } => {
                let width = shape.dims().last().copied().unwrap_or(1);
                let rows = shape.elem_count() / width;
                let held = (Held::of(weight)?, Held::of(g)?, Held::of(more)?);
                let (weight, g) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                let (more, wide) = (held.2.numbers::<T>()?, width as i32);
                call.arg(x).arg(&weight).arg(&g).arg(&more);
                call.arg(out).arg(&wide).arg(eps);
                // SAFETY: the arguments are norm_back's, with a block for each row; `norm_back` has
                // compared their shapes.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(rows * kernels::THREADS)) }.w()?;
            }
            Self::AdamW { means, g, numbers } => {
                let held = (Held::of(means.0)?, Held::of(means.1)?, Held::of(g)?);
                let (first, second) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                let (g, count) = (held.2.numbers::<T>()?, shape.elem_count());
                let all = count as i64;
                call.arg(x)
                    .arg(&first)
                    .arg(&second)
                    .arg(&g)
                    .arg(out)
                    .arg(&all);
                for number in numbers {
                    call.arg(number);
                }
                // SAFETY: the arguments are adamw's, which writes three times what x has; `adamw`
                // has compared shapes and types.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(count)) }.w()?;
            }
            Self::Gated { up } => {
                let held = Held::of(up)?;
                let up = held.numbers::<T>()?;
                call.arg(x).arg(&up).arg(out).arg(&eights);
                // SAFETY: the arguments are gated's; `gated` has compared their shapes.
                #[allow(unsafe_code)]
                unsafe { call.launch(each) }.w()?;
            }
            Self::GateBack { up, g } => {
                let held = (Held::of(up)?, Held::of(g)?);
                let (up, g) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                call.arg(x).arg(&up).arg(&g).arg(out).arg(&eights);
                // SAFETY: the arguments are gate_back's, which writes twice what x has; `gate_back`
                // has compared their shapes.
                #[allow(unsafe_code)]
                unsafe { call.launch(each) }.w()?;
            }
        }
        Ok(())
    }
}

/// What stands for what was dropped.
fn kept(p: f32) -> f32 {
    1.0 / (1.0 - p)
}

fn serves(x: &Tensor, others: &[&Tensor]) -> bool {
    let number = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let eights = x.dim(D::Minus1).is_ok_and(|width| width % 8 == 0);
    let alike = |t: &&Tensor| t.dtype() == x.dtype() && t.is_contiguous();
    x.device().is_cuda() && *kernels::WANTED && number && eights && others.iter().all(alike)
}

/// x with its numbers dropped as [`crate::nn::dropout`] says.
pub(crate) fn dropped(x: &Tensor, p: f32, seed: u64, stream: u64) -> Result<Option<Tensor>> {
    if !serves(x, &[]) {
        return Ok(None);
    }
    through(&x.contiguous()?, &Pass::Drop { p, seed, stream }).map(Some)
}

/// more + [`crate::nn::rms_norm_back`] of x and g.
pub(crate) fn norm_back(
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    g: &Tensor,
    more: &Tensor,
) -> Result<Option<Tensor>> {
    let alike = g.shape() == x.shape() && more.shape() == x.shape();
    let fits = alike && weight.dims1()? == x.dim(D::Minus1)?;
    if !fits || !serves(x, &[x, weight, g, more]) {
        return Ok(None);
    }
    let eps = eps as f32;
    let pass = Pass::NormBack {
        weight,
        g,
        more,
        eps,
    };
    through(x, &pass).map(Some)
}

/// A weight and its two means after a step of AdamW, in one tensor (3, ..); `numbers` are those of
/// `optim.rs`'s `Step::numbers`.
pub(crate) fn adamw(
    weight: &Tensor,
    means: (&Tensor, &Tensor),
    g: &Tensor,
    numbers: [f32; 9],
) -> Result<Option<Tensor>> {
    let fits =
        |t: &&Tensor| t.dtype() == DType::F32 && t.shape() == weight.shape() && t.is_contiguous();
    let all = [weight, means.0, means.1, g];
    if !weight.device().is_cuda() || !*kernels::WANTED || !all.iter().all(fits) {
        return Ok(None);
    }
    through(weight, &Pass::AdamW { means, g, numbers }).map(Some)
}

/// As [`crate::nn::swiglu`], without a gradient.
pub(crate) fn gated(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    if up.shape() != gate.shape() || !serves(gate, &[gate, up]) {
        return Ok(None);
    }
    through(gate, &Pass::Gated { up }).map(Some)
}

/// As [`crate::nn::swiglu_back`].
pub(crate) fn gate_back(
    gate: &Tensor,
    up: &Tensor,
    g: &Tensor,
) -> Result<Option<(Tensor, Tensor)>> {
    let alike = up.shape() == gate.shape() && g.shape() == gate.shape();
    if !alike || !serves(gate, &[gate, up, g]) {
        return Ok(None);
    }
    let both = through(gate, &Pass::GateBack { up, g })?;
    Ok(Some((both.get(0)?, both.get(1)?)))
}
