//! The layers every network here is made of: linear maps, norms, activations, rotary
//! positions, attention. All of them are differentiable.
//!
//! candle's fused kernels for norms, softmax and rotary positions are fast but silently cut
//! the gradient graph. Here they are used for the value, and the gradient is attached by
//! hand ([`attach1`] and its brothers): the graph stays short, the intermediate tensors are
//! not kept, and a test below compares every gradient with finite differences. When nothing
//! needs a gradient (`Tensor::track_op` is false for all inputs) no graph is made at all.
//!
//! A weight that is not a variable is *frozen*: [`Linear`] then propagates the gradient to
//! its input only. (candle's matmul would compute and keep a gradient for the weight too:
//! 2.1 times the memory of a LoRA step, measured.)

use crate::host::{Host, Panels};
use crate::weights::{f8e4m3, to_f8e4m3};
use crate::{Error, Result};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, Layout,
    MetalStorage, Result as CandleResult, Shape, Storage, Tensor, backend::BackendStorage,
};
use candle_nn::VarBuilder;
use rayon::prelude::*;
use simpatico_schema::random::Philox;
use std::sync::{Arc, Mutex};

// ------------------------------------------------------------------- gradients by hand

/// A value computed elsewhere, waiting to enter the gradient graph. It is taken out when the
/// operation runs, so that the graph does not keep a second copy of it.
struct Ready(Mutex<Option<Tensor>>);

impl Ready {
    fn new(value: &Tensor) -> CandleResult<Self> {
        Ok(Self(Mutex::new(Some(value.detach().contiguous()?))))
    }

    fn take(&self) -> CandleResult<Tensor> {
        let mut slot = self
            .0
            .lock()
            .map_err(|_| candle_core::Error::Msg("a gradient operation panicked".into()))?;
        slot.take()
            .ok_or_else(|| candle_core::Error::Msg("a gradient operation ran twice".into()))
    }

    fn cpu(&self) -> CandleResult<(CpuStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("the value lies on another device than its inputs"),
        }
    }

    fn cuda(&self) -> CandleResult<(CudaStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("the value lies on another device than its inputs"),
        }
    }

    fn metal(&self) -> CandleResult<(MetalStorage, Shape)> {
        let value = self.take()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Metal(s) => Ok((s.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("the value lies on another device than its inputs"),
        }
    }
}

struct Attach<B> {
    value: Ready,
    backward: B,
}

impl<B> CustomOp1 for Attach<B>
where
    B: Fn(&Tensor, &Tensor, &Tensor) -> CandleResult<Option<Tensor>>,
{
    fn name(&self) -> &'static str {
        "attach1"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        self.value.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        self.value.cuda()
    }
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        self.value.metal()
    }
    fn bwd(&self, x: &Tensor, y: &Tensor, g: &Tensor) -> CandleResult<Option<Tensor>> {
        (self.backward)(x, y, g)
    }
}

/// Two optional gradients.
pub type Grads2 = (Option<Tensor>, Option<Tensor>);
/// Three optional gradients.
pub type Grads3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl<B> CustomOp2 for Attach<B>
where
    B: Fn(&Tensor, &Tensor, &Tensor, &Tensor) -> CandleResult<Grads2>,
{
    fn name(&self) -> &'static str {
        "attach2"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        self.value.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        self.value.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> CandleResult<(MetalStorage, Shape)> {
        self.value.metal()
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, g: &Tensor) -> CandleResult<Grads2> {
        (self.backward)(a, b, y, g)
    }
}

impl<B> CustomOp3 for Attach<B>
where
    B: Fn(&Tensor, &Tensor, &Tensor, &Tensor, &Tensor) -> CandleResult<Grads3>,
{
    fn name(&self) -> &'static str {
        "attach3"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        self.value.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> CandleResult<(CudaStorage, Shape)> {
        self.value.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> CandleResult<(MetalStorage, Shape)> {
        self.value.metal()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        g: &Tensor,
    ) -> CandleResult<Grads3> {
        (self.backward)(a, b, c, y, g)
    }
}

/// Makes `value`, however it was computed, a node of the graph below `x`, with
/// `backward(x, value, gradient of value)` as its gradient. Costs one copy of `value`.
pub fn attach1<B>(x: &Tensor, value: &Tensor, backward: B) -> CandleResult<Tensor>
where
    B: Fn(&Tensor, &Tensor, &Tensor) -> CandleResult<Option<Tensor>> + Send + Sync + 'static,
{
    let value = Ready::new(value)?;
    x.apply_op1(Attach { value, backward })
}

/// As [`attach1`] for two inputs: `backward(a, b, value, gradient)`.
pub fn attach2<B>(a: &Tensor, b: &Tensor, value: &Tensor, backward: B) -> CandleResult<Tensor>
where
    B: Fn(&Tensor, &Tensor, &Tensor, &Tensor) -> CandleResult<Grads2> + Send + Sync + 'static,
{
    let value = Ready::new(value)?;
    a.apply_op2(b, Attach { value, backward })
}

/// As [`attach1`] for three inputs: `backward(a, b, c, value, gradient)`.
pub fn attach3<B>(
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
    value: &Tensor,
    backward: B,
) -> CandleResult<Tensor>
where
    B: Fn(&Tensor, &Tensor, &Tensor, &Tensor, &Tensor) -> CandleResult<Grads3>
        + Send
        + Sync
        + 'static,
{
    let value = Ready::new(value)?;
    a.apply_op3(b, c, Attach { value, backward })
}

/// The dtype to compute norms and softmax in: at least f32.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Sums a gradient of shape [.., n] down to [n].
fn sum_to_last(g: &Tensor) -> CandleResult<Tensor> {
    let n = g.dim(D::Minus1)?;
    g.reshape(((), n))?.sum(0)
}

// ------------------------------------------------------------------------------ linear

/// x·Wᵀ with a constant W: the gradient goes to x only.
struct FrozenMm {
    weight: Tensor,
}

impl FrozenMm {
    /// bmnk and the layout of Wᵀ for x of shape [m, k].
    fn plan(&self, x: &Layout) -> CandleResult<((usize, usize, usize, usize), Layout, Shape)> {
        let (m, k) = x.shape().dims2()?;
        let n = self.weight.dim(0)?;
        Ok((
            (1, m, n, k),
            self.weight.layout().transpose(0, 1)?,
            (m, n).into(),
        ))
    }
}

impl CustomOp1 for FrozenMm {
    fn name(&self) -> &'static str {
        "frozen-matmul"
    }
    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (bmnk, wl, shape) = self.plan(l)?;
        match &*self.weight.storage_and_layout().0 {
            Storage::Cpu(w) => Ok((x.matmul(w, bmnk, l, &wl)?, shape)),
            _ => candle_core::bail!("the weight lies on another device than its input"),
        }
    }
    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> CandleResult<(CudaStorage, Shape)> {
        let (bmnk, wl, shape) = self.plan(l)?;
        match &*self.weight.storage_and_layout().0 {
            Storage::Cuda(w) => Ok((x.matmul(w, bmnk, l, &wl)?, shape)),
            _ => candle_core::bail!("the weight lies on another device than its input"),
        }
    }
    fn metal_fwd(&self, x: &MetalStorage, l: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        let (bmnk, wl, shape) = self.plan(l)?;
        match &*self.weight.storage_and_layout().0 {
            Storage::Metal(w) => Ok((x.matmul(w, bmnk, l, &wl)?, shape)),
            _ => candle_core::bail!("the weight lies on another device than its input"),
        }
    }
    fn bwd(&self, _x: &Tensor, _y: &Tensor, g: &Tensor) -> CandleResult<Option<Tensor>> {
        Ok(Some(g.contiguous()?.matmul(&self.weight)?))
    }
}

/// y = x·Wᵀ + b.
///
/// The weight is [out, in]. Where it is a variable (or made from one) it gets its gradient;
/// a plain tensor is frozen and costs nothing in the backward pass.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    panels: Option<Arc<Panels>>,
    /// Where the weight is kept in 8 bits: what its codes stand for.
    eight: Option<EightBit>,
}

/// What the codes of a weight in 8 bits (e4m3) stand for: `scale` times their values, in `dtype`.
#[derive(Clone, Copy, Debug)]
struct EightBit {
    scale: f32,
    dtype: DType,
}

/// Rows that one thread multiplies at a time by a layer's panels.
const PANEL_ROWS: usize = 48;

impl Linear {
    /// From a weight (out, in) and perhaps a bias (out).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight,
            bias,
            panels: None,
            eight: None,
        }
    }

    /// With the weight kept in 8 bits and widened to what it was in for each product: half the
    /// memory of half precision, a sixteenth of a number's size lost at most, and the time of
    /// reading and writing the weight once more. Not to be trained.
    pub fn in_eight_bits(self) -> Result<Self> {
        let dtype = self.weight.dtype();
        let shape = self.weight.dims2()?;
        if !(shape.0 * shape.1).is_multiple_of(8) {
            return Ok(self);
        }
        let numbers = self.weight.detach().to_device(&Device::Cpu)?;
        let numbers = numbers.to_dtype(DType::F32)?.flatten_all()?;
        let numbers = numbers.to_vec1::<f32>()?;
        let most = numbers.par_iter().map(|x| x.abs()).reduce(|| 0.0, f32::max);
        // A power of two, which rounds nothing, that brings the largest near the largest code.
        let scale = match most > 0.0 && most.is_finite() {
            true => 2f32.powi((most / 448.0).log2().ceil() as i32),
            false => 1.0,
        };
        let codes: Vec<u8> = numbers.par_iter().map(|x| to_f8e4m3(x / scale)).collect();
        let codes = Tensor::from_vec(codes, shape, &Device::Cpu)?;
        Ok(Self {
            weight: codes.to_device(self.weight.device())?,
            bias: self.bias,
            panels: None,
            eight: Some(EightBit { scale, dtype }),
        })
    }

    /// With a second copy of the weight in [`Panels`], for a layer that is applied over and over,
    /// where this CPU and dtype have them.
    pub(crate) fn with_panels(mut self) -> Result<Self> {
        if let Some(bias) = &self.bias {
            self.panels = Panels::of(&self.weight, bias)?.map(Arc::new);
        }
        Ok(self)
    }

    /// Weight and bias in panels, if [`Self::with_panels`] made them.
    pub(crate) fn panels(&self) -> Option<&Panels> {
        self.panels.as_deref()
    }

    /// The weight, [out, in]; where it is kept in 8 bits, its codes.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, (out).
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// x [.., in] to [.., out] without the bias.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self.eight {
            Some(eight) => matmul_t(x, &widened(&self.weight, eight)?),
            None => matmul_t(x, &self.weight),
        }
    }

    /// x [.., in] to [.., out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(panels) = &self.panels
            && let Some(y) = through(panels, x)?
        {
            return Ok(y);
        }
        let y = self.product(x)?;
        Ok(match &self.bias {
            Some(b) if crate::conv::learns_on_cpu(&[b, &y]) && b.track_op() => {
                crate::fused::add_bias(&y, b)?
            }
            Some(b) => y.broadcast_add(b)?,
            None => y,
        })
    }
}

/// The weight that codes stand for.
fn widened(codes: &Tensor, EightBit { scale, dtype }: EightBit) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if codes.device().is_cuda() {
        return Ok(crate::flux::cuda_blocks::widen(codes, scale, dtype)?);
    }
    let mut table = [0f32; 256];
    for (code, value) in table.iter_mut().enumerate() {
        *value = scale * f8e4m3(code as u8);
    }
    let shape = codes.shape();
    let all = codes
        .to_device(&Device::Cpu)?
        .flatten_all()?
        .to_vec1::<u8>()?;
    let all: Vec<f32> = all.iter().map(|code| table[usize::from(*code)]).collect();
    let wide = Tensor::from_vec(all, shape, &Device::Cpu)?.to_dtype(dtype)?;
    Ok(wide.to_device(codes.device())?)
}

/// x [.., in] to [.., out] by a layer's panels; `None` where x has another width, a gradient, a
/// device or a dtype that they do not know.
fn through(panels: &Panels, x: &Tensor) -> Result<Option<Tensor>> {
    let Some((wide, dims)) = x.dims().split_last() else {
        return Ok(None);
    };
    let x = x.contiguous()?;
    let Some(x) = Host::of(&x).filter(|_| *wide == panels.inputs()) else {
        return Ok(None);
    };
    let (inputs, outputs) = (panels.inputs(), panels.outputs());
    let mut y = vec![0f32; x.get().len() / inputs * outputs];
    y.par_chunks_mut(PANEL_ROWS * outputs)
        .zip(x.get().par_chunks(PANEL_ROWS * inputs))
        .for_each(|(y, x)| panels.apply(x, y));
    let mut shape = dims.to_vec();
    shape.push(outputs);
    Ok(Some(Tensor::from_vec(y, shape, &Device::Cpu)?))
}

/// x [.., k] times the transpose of w [n, k]: [.., n]. No gradient is made for a `w` that
/// does not ask for one.
pub fn matmul_t(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let dims = x.dims();
    let (n, k) = w.dims2()?;
    let Some((&last, lead)) = dims.split_last() else {
        return Err(Error::BadRequest(format!(
            "a linear layer needs an input of shape [.., {k}], got a scalar"
        )));
    };
    if last != k {
        return Err(Error::BadRequest(format!(
            "a linear layer needs an input of shape [.., {k}], got {dims:?}"
        )));
    }
    let rows = x.reshape(((), k))?.contiguous()?;
    let y = if rows.track_op() && !w.track_op() {
        rows.apply_op1(FrozenMm { weight: w.clone() })?
    } else {
        rows.matmul(&w.t()?)?
    };
    let mut shape = lead.to_vec();
    shape.push(n);
    Ok(y.reshape(shape)?)
}

/// How a linear layer's weight begins where none is loaded. Without this a builder gives zeros:
/// nothing flows, and behind norms the gradient of nothing overflows.
const FRESH: candle_nn::Init = candle_nn::init::DEFAULT_KAIMING_UNIFORM;

/// A linear layer with bias, `weight` and `bias` under the prefix of `vb`.
pub fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    Ok(Linear::new(
        vb.get_with_hints((outputs, inputs), "weight", FRESH)?,
        Some(vb.get(outputs, "bias")?),
    ))
}

/// A linear layer without bias, `weight` under the prefix of `vb`.
pub fn linear_no_bias(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = vb.get_with_hints((outputs, inputs), "weight", FRESH)?;
    Ok(Linear::new(weight, None))
}

// ------------------------------------------------------------------------------- norms

/// x / sqrt(mean(x²) + eps) · w over the last dimension; computed in f32 or better.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let value = {
        let (x, w) = (x.detach().contiguous()?, w.detach());
        match x.dtype() {
            DType::F64 => rms_norm_composed(&x, &w, eps)?,
            _ => candle_nn::ops::rms_norm(&x, &w, eps as f32)?,
        }
    };
    if !x.track_op() && !w.track_op() {
        return Ok(value);
    }
    Ok(attach2(x, w, &value, move |x, w, _, g| {
        let (dx, dw) = rms_norm_back(x, w, eps, g)?;
        Ok((Some(dx), dw))
    })?)
}

/// From the gradient of [`rms_norm`]'s value to those of x and, where it asks for one, w.
pub(crate) fn rms_norm_back(
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    g: &Tensor,
) -> CandleResult<(Tensor, Option<Tensor>)> {
    let dtype = wide(x.dtype());
    let (xw, gw) = (x.detach().to_dtype(dtype)?, g.to_dtype(dtype)?);
    let scale = (xw.sqr()?.mean_keepdim(D::Minus1)? + eps)?
        .sqrt()?
        .recip()?;
    let unit = xw.broadcast_mul(&scale)?;
    let dw = match w.track_op() {
        true => Some(sum_to_last(&(&gw * &unit)?)?.to_dtype(w.dtype())?),
        false => None,
    };
    let gw = gw.broadcast_mul(&w.detach().to_dtype(dtype)?)?;
    let along = (&gw * &unit)?.mean_keepdim(D::Minus1)?;
    let dx = (gw - unit.broadcast_mul(&along)?)?
        .broadcast_mul(&scale)?
        .to_dtype(x.dtype())?;
    Ok((dx, dw))
}

/// more + [`rms_norm_back`]'s gradient of x.
pub(crate) fn rms_norm_back_onto(
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    g: &Tensor,
    more: &Tensor,
) -> CandleResult<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(sum) = crate::cuda_learn::norm_back(x, w, eps, g, more)? {
        return Ok(sum);
    }
    more + rms_norm_back(x, w, eps, g)?.0
}

fn rms_norm_composed(x: &Tensor, w: &Tensor, eps: f64) -> CandleResult<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&scale)?.broadcast_mul(w)
}

/// (x - mean) / sqrt(var + eps) over the last dimension, then · w + b where given; computed
/// in f32 or better.
pub fn layer_norm(x: &Tensor, w: Option<&Tensor>, b: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    let value = {
        let x = x.detach().contiguous()?;
        match x.dtype() {
            DType::F64 => normalised(&x, eps)?.0,
            dtype => {
                // The fused kernel wants both; ones and zeros where we have none.
                let ones = Tensor::ones(n, dtype, x.device())?;
                let zeros = Tensor::zeros(n, dtype, x.device())?;
                candle_nn::ops::layer_norm(&x, &ones, &zeros, eps as f32)?
            }
        }
    };
    let unit = match x.track_op() {
        false => value,
        true => attach1(x, &value, move |x, _, g| {
            let dtype = wide(x.dtype());
            let g = g.to_dtype(dtype)?;
            let (unit, scale) = normalised(&x.detach().to_dtype(dtype)?, eps)?;
            let along = (&g * &unit)?.mean_keepdim(D::Minus1)?;
            let centred = g.broadcast_sub(&g.mean_keepdim(D::Minus1)?)?;
            let dx = (centred - unit.broadcast_mul(&along)?)?.broadcast_mul(&scale)?;
            Ok(Some(dx.to_dtype(x.dtype())?))
        })?,
    };
    let scaled = match w {
        Some(w) => unit.broadcast_mul(w)?,
        None => unit,
    };
    Ok(match b {
        Some(b) => scaled.broadcast_add(b)?,
        None => scaled,
    })
}

/// x with mean 0 and variance 1 over the last dimension, and 1/sqrt(var + eps).
fn normalised(x: &Tensor, eps: f64) -> CandleResult<(Tensor, Tensor)> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let scale = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?
        .sqrt()?
        .recip()?;
    Ok((centred.broadcast_mul(&scale)?, scale))
}

// ------------------------------------------------------------------------- activations

/// exp(x) / Σ exp(x) over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    let value = candle_nn::ops::softmax_last_dim(&x.detach().contiguous()?)?;
    if !x.track_op() {
        return Ok(value);
    }
    Ok(attach1(x, &value, |_, y, g| {
        Ok(Some(softmax_backward(&y.detach(), g)?))
    })?)
}

/// y·(g - Σ g·y): the gradient through y = softmax(x).
fn softmax_backward(y: &Tensor, g: &Tensor) -> CandleResult<Tensor> {
    let gy = (g * y)?;
    let along = gy.sum_keepdim(D::Minus1)?;
    gy - y.broadcast_mul(&along)?
}

/// log(exp(x) / Σ exp(x)) over the last dimension, stable.
pub fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?;
    let norm = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok(shifted.broadcast_sub(&norm)?)
}

/// Half precision is made f32 where a gradient is wanted: candle writes the slopes of these as
/// a dozen operations, each of which would round.
fn with_exact_slope(
    x: &Tensor,
    f: impl Fn(&Tensor) -> CandleResult<Tensor>,
) -> CandleResult<Tensor> {
    match x.track_op() && x.dtype() != wide(x.dtype()) {
        true => f(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype()),
        false => f(x),
    }
}

/// x·sigmoid(x).
pub fn silu(x: &Tensor) -> Result<Tensor> {
    Ok(with_exact_slope(x, Tensor::silu)?)
}

/// silu(gate)·up, the inside of a gated MLP.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let value = gated(&gate.detach(), &up.detach())?;
    if !gate.track_op() && !up.track_op() {
        return Ok(value);
    }
    Ok(attach2(gate, up, &value, |gate, up, _, g| {
        let (dgate, dup) = swiglu_back(gate, up, g)?;
        Ok((Some(dgate), Some(dup)))
    })?)
}

fn gated(gate: &Tensor, up: &Tensor) -> CandleResult<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(value) = crate::cuda_learn::gated(gate, up)? {
        return Ok(value);
    }
    gate.silu()? * up
}

/// From the gradient of [`swiglu`]'s value to those of gate and up.
pub(crate) fn swiglu_back(
    gate: &Tensor,
    up: &Tensor,
    g: &Tensor,
) -> CandleResult<(Tensor, Tensor)> {
    let (gate, up) = (gate.detach(), up.detach());
    #[cfg(feature = "cuda")]
    if let Some(both) = crate::cuda_learn::gate_back(&gate, &up, g)? {
        return Ok(both);
    }
    let sigma = candle_nn::ops::sigmoid(&gate)?;
    let silu = (&gate * &sigma)?;
    let dup = (g * &silu)?;
    // d silu / dx = σ + silu·(1 - σ)
    let slope = (&sigma + (&silu - (&silu * &sigma)?)?)?;
    Ok((((g * up)? * slope)?, dup))
}

/// GELU by the tanh approximation (Flux, GPT-2).
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    if crate::conv::learns_on_cpu(&[x]) {
        return Ok(crate::fused::gelu_tanh(x)?);
    }
    Ok(with_exact_slope(x, Tensor::gelu)?)
}

/// Exact GELU (BERT, ViT).
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    Ok(x.gelu_erf()?)
}

/// log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|)), with the gradient sigmoid(-x).
pub fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    let value = {
        let x = x.detach();
        let tail = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
        (x.minimum(&x.zeros_like()?)? - tail)?
    };
    if !x.track_op() {
        return Ok(value);
    }
    Ok(attach1(x, &value, |x, _, g| {
        Ok(Some((g * candle_nn::ops::sigmoid(&x.detach().neg()?)?)?))
    })?)
}

/// Zeroes each number with probability `p` and scales the rest by 1/(1-p), as stream `stream` of
/// the random numbers of `seed` says: a run can be repeated, on any device.
pub fn dropout(x: &Tensor, p: f32, seed: u64, stream: u64) -> Result<Tensor> {
    if p <= 0.0 {
        return Ok(x.clone());
    }
    let value = dropped(&x.detach(), p, seed, stream)?;
    if !x.track_op() {
        return Ok(value);
    }
    Ok(attach1(x, &value, move |_, _, g| {
        Ok(Some(dropped(g, p, seed, stream)?))
    })?)
}

fn dropped(x: &Tensor, p: f32, seed: u64, stream: u64) -> CandleResult<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(x) = crate::cuda_learn::dropped(x, p, seed, stream)? {
        return Ok(x);
    }
    // So many numbers at a time, four from a block of the generator.
    const PART: usize = 4 * 4096;
    let keep = 1.0 / (1.0 - p);
    let mut mask = vec![0f32; x.elem_count()];
    mask.par_chunks_mut(PART).enumerate().for_each(|(i, part)| {
        let mut rng = Philox::new(seed, stream);
        rng.seek(((i * PART / 4) as u64, 4, None));
        part.iter_mut()
            .for_each(|m| *m = if rng.uniform() < p { 0.0 } else { keep });
    });
    let mask = Tensor::from_vec(mask, x.shape(), &Device::Cpu)?
        .to_device(x.device())?
        .to_dtype(x.dtype())?;
    x * mask
}

// ------------------------------------------------------------------------------ rotary

/// Which numbers of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// i with i + d/2: Llama and Qwen as transformers writes them.
    Halves,
    /// 2i with 2i + 1: Flux, and llama.cpp's Llama.
    Pairs,
}

/// cos and sin, each [positions, d/2] in f32, of position·frequency.
///
/// `inverse_frequencies` has d/2 entries, for plain rope theta^(-2i/d)
/// ([`rope_frequencies`]). The angles are computed in f64: in bf16 positions beyond 256
/// would be rounded.
pub fn rope_tables(
    positions: &[f64],
    inverse_frequencies: &[f64],
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let shape = (positions.len(), inverse_frequencies.len());
    let angles = || {
        positions
            .iter()
            .flat_map(|p| inverse_frequencies.iter().map(move |f| p * f))
    };
    let cos: Vec<f32> = angles().map(|a| a.cos() as f32).collect();
    let sin: Vec<f32> = angles().map(|a| a.sin() as f32).collect();
    Ok((
        Tensor::from_vec(cos, shape, device)?,
        Tensor::from_vec(sin, shape, device)?,
    ))
}

/// theta^(-2i/d) for i in 0..d/2.
pub fn rope_frequencies(head_dim: usize, theta: f64) -> Vec<f64> {
    (0..head_dim / 2)
        .map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64))
        .collect()
}

/// Rotates x [b, heads, t, d] by the angles of cos and sin, f32 of shape [t, d/2] or
/// [b, t, d/2].
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    let value = rotate(&x.detach(), cos, sin, layout)?;
    if !x.track_op() {
        return Ok(value);
    }
    let (cos, sin) = (cos.clone(), sin.neg()?);
    Ok(attach1(x, &value, move |_, _, g| {
        // The inverse of a rotation is the rotation by the opposite angle.
        Ok(Some(rotate(g, &cos, &sin, layout)?))
    })?)
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> CandleResult<Tensor> {
    let dtype = wide(x.dtype());
    let xw = x.to_dtype(dtype)?.contiguous()?;
    let cos = cos.to_dtype(dtype)?.contiguous()?;
    let sin = sin.to_dtype(dtype)?.contiguous()?;
    match layout {
        RopeLayout::Halves => candle_nn::rotary_emb::rope(&xw, &cos, &sin),
        RopeLayout::Pairs => candle_nn::rotary_emb::rope_i(&xw, &cos, &sin),
    }?
    .to_dtype(x.dtype())
}

// --------------------------------------------------------------------------- attention

/// Which keys a query may see.
#[derive(Clone, Debug)]
pub enum Mask {
    /// All of them.
    None,
    /// Those not after it: query i of t sees keys 0..=(s - t + i) of s.
    Causal,
    /// Added to the scores: 0 to see, a very negative number not to. Shape [1 or b, 1, t, s]
    /// or [b, heads, t, s], f32. Not differentiated.
    Additive(Tensor),
}

/// At most so many scores exist at a time (f32: 64 MiB).
const SCORES_MAX: usize = 16 << 20;

/// softmax(q·kᵀ·scale + mask)·v.
///
/// q [b, heads, t, d], k and v [b, kv_heads, s, d] with heads a multiple of kv_heads (query
/// head h reads key head h / (heads / kv_heads)); the answer is [b, heads, t, d]. Works
/// through the queries in chunks, so that never more than `SCORES_MAX` scores exist, and
/// computes them again in the backward pass instead of keeping them. Softmax in f32. With the
/// feature `flash-attn`, inference in bf16 on a CUDA device uses that instead.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> Result<Tensor> {
    let (b, heads, t, _) = q.dims4()?;
    let (kb, kv_heads, s, _) = k.dims4()?;
    if kb != b || kv_heads == 0 || heads % kv_heads != 0 || v.dims4()?.2 != s {
        return Err(Error::BadRequest(format!(
            "attention needs q [b, h, t, d] and k, v [b, h/n, s, d], got {:?}, {:?}, {:?}",
            q.dims(),
            k.dims(),
            v.dims()
        )));
    }
    if matches!(mask, Mask::Causal) && t > s {
        return Err(Error::BadRequest(format!(
            "causal attention of {t} queries needs at least as many keys, got {s}"
        )));
    }
    let learns = q.track_op() || k.track_op() || v.track_op();
    #[cfg(feature = "flash-attn")]
    if !learns && let Some(value) = flash_attention(q, k, v, scale, mask)? {
        return Ok(value);
    }
    // A product wants rows without gaps; of the queries each chunk is made so.
    let (k_rows, v_rows) = (k.detach().contiguous()?, v.detach().contiguous()?);
    let value = attend(&q.detach(), &k_rows, &v_rows, scale, mask)?;
    if !learns {
        return Ok(value);
    }
    let mask = mask.clone();
    Ok(attach3(q, k, v, &value, move |q, k, v, y, g| {
        let (dq, dk, dv) = attention_back(q, k, v, y, g, scale, &mask)?;
        Ok((Some(dq), Some(dk), Some(dv)))
    })?)
}

/// The same by candle's flash attention, which has no gradient: in bf16 on a CUDA device, with
/// heads of 64 or 128 (which tests/gpu/build compiles) and no mask but a causal one; `None`
/// elsewhere.
#[cfg(feature = "flash-attn")]
fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    mask: &Mask,
) -> Result<Option<Tensor>> {
    let d = q.dim(3)?;
    let fits = q.dtype() == DType::BF16 && matches!(d, 64 | 128) && v.dim(3)? == d;
    if !q.device().is_cuda() || !fits || matches!(mask, Mask::Additive(_)) {
        return Ok(None);
    }
    // It takes (b, t, heads, d).
    let turned = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let causal = matches!(mask, Mask::Causal);
    let y =
        candle_flash_attn::flash_attn(&turned(q)?, &turned(k)?, &turned(v)?, scale as f32, causal)?;
    Ok(Some(y.transpose(1, 2)?))
}

/// The chunks of queries, as (first, count).
fn query_chunks(b: usize, heads: usize, t: usize, s: usize) -> Vec<(usize, usize)> {
    let rows = (SCORES_MAX / (b * heads * s).max(1)).clamp(1, t.max(1));
    (0..t).step_by(rows).map(|i| (i, rows.min(t - i))).collect()
}

/// softmax(scores) of the queries [first, first + n), in f32 or better:
/// [b, kv_heads, groups·n, seen], with `seen` keys (fewer than s under a causal mask).
fn chunk_weights(
    q: &Tensor, // (b, kv_heads, groups * n, d)
    k: &Tensor, // (b, kv_heads, seen, d)
    scale: f64,
    mask: &Mask,
    (first, n): (usize, usize),
    (t, s): (usize, usize),
) -> CandleResult<Tensor> {
    let (b, kv_heads, rows, _) = q.dims4()?;
    let seen = k.dim(2)?;
    let scores = (q.matmul(&k.transpose(2, 3)?)? * scale)?;
    let scores = scores.to_dtype(wide(scores.dtype()))?;
    let scores = match mask {
        Mask::None => scores,
        Mask::Causal if t == 1 => scores,
        Mask::Causal => {
            let hidden = causal_mask(n, seen, s - t + first, scores.dtype(), q.device())?;
            scores
                .reshape((b, kv_heads * (rows / n), n, seen))?
                .broadcast_add(&hidden)?
                .reshape((b, kv_heads, rows, seen))?
        }
        Mask::Additive(m) => scores
            .reshape((b, kv_heads * (rows / n), n, seen))?
            .broadcast_add(&m.narrow(2, first, n)?.to_dtype(scores.dtype())?)?
            .reshape((b, kv_heads, rows, seen))?,
    };
    candle_nn::ops::softmax_last_dim(&scores.contiguous()?)
}

/// [n, seen]: 0 where key j ≤ before + i, else -inf.
fn causal_mask(
    n: usize,
    seen: usize,
    before: usize,
    dtype: DType,
    device: &Device,
) -> CandleResult<Tensor> {
    let hidden: Vec<f32> = (0..n)
        .flat_map(|i| {
            (0..seen).map(move |j| {
                if j <= before + i {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            })
        })
        .collect();
    Tensor::from_vec(hidden, (n, seen), device)?.to_dtype(dtype)
}

/// How many keys the chunk's last query sees.
fn keys_seen(mask: &Mask, (first, n): (usize, usize), (t, s): (usize, usize)) -> usize {
    match mask {
        Mask::Causal => s - t + first + n,
        _ => s,
    }
}

/// Queries [first, first+n) with the heads of a group side by side:
/// (b, kv_heads, groups * n, d).
fn grouped(x: &Tensor, kv_heads: usize, (first, n): (usize, usize)) -> CandleResult<Tensor> {
    let (b, heads, _, d) = x.dims4()?;
    x.narrow(2, first, n)?
        .contiguous()?
        .reshape((b, kv_heads, heads / kv_heads * n, d))
}

fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, mask: &Mask) -> CandleResult<Tensor> {
    let (b, heads, t, _) = q.dims4()?;
    let (_, kv_heads, s, _) = k.dims4()?;
    let dv = v.dim(3)?;
    let chunks = query_chunks(b, heads, t, s);
    let mut out = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let seen = keys_seen(mask, chunk, (t, s));
        let (ks, vs) = (k.narrow(2, 0, seen)?, v.narrow(2, 0, seen)?);
        let p = chunk_weights(
            &grouped(q, kv_heads, chunk)?,
            &ks,
            scale,
            mask,
            chunk,
            (t, s),
        )?;
        let y = p.to_dtype(v.dtype())?.matmul(&vs)?;
        out.push(y.reshape((b, heads, chunk.1, dv))?);
    }
    match out.len() {
        1 => Ok(out.remove(0)),
        _ => Tensor::cat(&out, 2),
    }
}

/// From the gradient of [`attention`]'s value y to those of q, k and v.
pub(crate) fn attention_back(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    g: &Tensor,
    scale: f64,
    mask: &Mask,
) -> CandleResult<(Tensor, Tensor, Tensor)> {
    let (b, heads, t, d) = q.dims4()?;
    let (_, kv_heads, s, _) = k.dims4()?;
    let (q, k, v, y) = (q.detach(), k.detach(), v.detach(), y.detach());
    let mut dq = Vec::new();
    let (mut dk, mut dv) = (k.zeros_like()?, v.zeros_like()?);
    for chunk in query_chunks(b, heads, t, s) {
        let seen = keys_seen(mask, chunk, (t, s));
        let (ks, vs) = (
            k.narrow(2, 0, seen)?.contiguous()?,
            v.narrow(2, 0, seen)?.contiguous()?,
        );
        let qs = grouped(&q, kv_heads, chunk)?;
        let gs = grouped(g, kv_heads, chunk)?;
        let ys = grouped(&y, kv_heads, chunk)?;
        let p = chunk_weights(&qs, &ks, scale, mask, chunk, (t, s))?;
        // Σ_j P_ij dP_ij = Σ_c y_ic g_ic, cheaper over the head's width than over the keys.
        let along = (&gs * &ys)?.to_dtype(p.dtype())?.sum_keepdim(D::Minus1)?;
        let dp = gs.matmul(&vs.transpose(2, 3)?)?.to_dtype(p.dtype())?;
        let ds = ((&p * dp.broadcast_sub(&along)?)? * scale)?.to_dtype(q.dtype())?;
        dq.push(ds.matmul(&ks)?.reshape((b, heads, chunk.1, d))?);
        let p = p.to_dtype(v.dtype())?;
        dk = add_first_keys(&dk, &ds.transpose(2, 3)?.matmul(&qs)?)?;
        dv = add_first_keys(&dv, &p.transpose(2, 3)?.matmul(&gs)?)?;
    }
    let dq = match dq.len() {
        1 => dq.remove(0),
        _ => Tensor::cat(&dq, 2)?,
    };
    Ok((dq, dk, dv))
}

/// total + part, where part may cover only the first keys.
fn add_first_keys(total: &Tensor, part: &Tensor) -> CandleResult<Tensor> {
    let missing = total.dim(2)? - part.dim(2)?;
    match missing {
        0 => total + part,
        _ => total + part.pad_with_zeros(2, 0, missing)?,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Var;

    fn var(shape: &[usize], seed: u64) -> Var {
        let n: usize = shape.iter().product();
        let x: Vec<f64> = Philox::new(seed, 0)
            .normals(n)
            .into_iter()
            .map(f64::from)
            .collect();
        Var::from_tensor(&Tensor::from_vec(x, shape, &Device::Cpu).unwrap()).unwrap()
    }

    /// Every input of `f` gets a gradient, and it is that of finite differences in f64.
    fn check(name: &str, inputs: &[Var], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors).unwrap();
        // A fixed random weighting makes the sum sensitive to every output.
        let weights = var(out.dims(), 99).as_tensor().detach();
        let loss = |xs: &[Tensor]| -> f64 {
            let y = f(xs).unwrap();
            (y * &weights)
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar()
                .unwrap()
        };
        let grads = (&out * &weights).unwrap().sum_all().unwrap();
        let grads = grads.backward().unwrap();
        for (i, v) in inputs.iter().enumerate() {
            let grad = grads
                .get(v)
                .unwrap_or_else(|| panic!("{name}: input {i} got no gradient"))
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap();
            let values = v.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            let step = (values.len() / 12).max(1);
            for c in (0..values.len()).step_by(step) {
                let at = |delta: f64| {
                    let mut moved = values.clone();
                    moved[c] += delta;
                    let mut xs: Vec<Tensor> = tensors.iter().map(|t| t.detach()).collect();
                    xs[i] = Tensor::from_vec(moved, v.shape(), &Device::Cpu).unwrap();
                    loss(&xs)
                };
                let h = 1e-5;
                let numeric = (at(h) - at(-h)) / (2.0 * h);
                assert!(
                    (numeric - grad[c]).abs() < 1e-6 * (1.0 + numeric.abs()),
                    "{name}: input {i} at {c}: {} by backward, {numeric} by differences",
                    grad[c]
                );
            }
        }
    }

    #[test]
    fn every_layer_gives_every_input_its_gradient() {
        let x = var(&[2, 3, 8], 1);
        let (w, b) = (var(&[8], 2), var(&[8], 3));
        check("linear", &[x.clone(), var(&[5, 8], 4), var(&[5], 5)], |t| {
            Linear::new(t[1].clone(), Some(t[2].clone())).forward(&t[0])
        });
        let frozen = var(&[5, 8], 4).as_tensor().detach();
        check("frozen linear", std::slice::from_ref(&x), |t| {
            matmul_t(&t[0], &frozen)
        });
        check("rms_norm", &[x.clone(), w.clone()], |t| {
            rms_norm(&t[0], &t[1], 1e-5)
        });
        check("layer_norm", &[x.clone(), w, b], |t| {
            layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-5)
        });
        check("layer_norm without affine", std::slice::from_ref(&x), |t| {
            layer_norm(&t[0], None, None, 1e-5)
        });
        check("softmax", std::slice::from_ref(&x), |t| softmax(&t[0]));
        check("log_softmax", std::slice::from_ref(&x), |t| {
            log_softmax(&t[0])
        });
        check("silu", std::slice::from_ref(&x), |t| silu(&t[0]));
        check("gelu_tanh", std::slice::from_ref(&x), |t| gelu_tanh(&t[0]));
        check("gelu_erf", std::slice::from_ref(&x), |t| gelu_erf(&t[0]));
        check("log_sigmoid", std::slice::from_ref(&x), |t| {
            log_sigmoid(&t[0])
        });
        check("swiglu", &[x.clone(), var(&[2, 3, 8], 6)], |t| {
            swiglu(&t[0], &t[1])
        });
        // Every part of a long mask follows the one before.
        let ones = Tensor::ones(3 * 4 * 4096 + 5, DType::F32, &Device::Cpu).unwrap();
        let mut rng = Philox::new(6, 7);
        let dropped = dropout(&ones, 0.3, 6, 7).unwrap().to_vec1::<f32>();
        for value in dropped.unwrap() {
            assert_eq!(value == 0.0, rng.uniform() < 0.3);
        }
        check("dropout", std::slice::from_ref(&x), |t| {
            dropout(&t[0], 0.3, 5, 5)
        });
    }

    #[test]
    fn rope_turns_gradients_back_in_both_layouts() {
        let positions: Vec<f64> = (0..3).map(f64::from).collect();
        let (cos, sin) = rope_tables(&positions, &rope_frequencies(8, 1e4), &Device::Cpu).unwrap();
        for layout in [RopeLayout::Halves, RopeLayout::Pairs] {
            check("rope", &[var(&[2, 2, 3, 8], 7)], |t| {
                rope(&t[0], &cos, &sin, layout)
            });
        }
    }

    #[test]
    fn attention_gives_gradients_under_every_mask_and_grouping() {
        let hidden = Tensor::from_vec(
            vec![
                0f32, -1e9, 0.0, 0.0, 0.0, 0.0, -1e9, 0.0, 0.0, 0.0, -1e9, 0.0,
            ],
            (1, 1, 3, 4),
            &Device::Cpu,
        )
        .unwrap();
        for mask in [Mask::None, Mask::Causal, Mask::Additive(hidden)] {
            for kv_heads in [1, 2, 4] {
                check(
                    "attention",
                    &[
                        var(&[2, 4, 3, 6], 8),
                        var(&[2, kv_heads, 4, 6], 9),
                        var(&[2, kv_heads, 4, 6], 10),
                    ],
                    |t| attention(&t[0], &t[1], &t[2], 0.4, &mask),
                );
            }
        }
    }

    #[test]
    fn chunked_attention_equals_that_in_one_piece() {
        // 8 heads x 1200 x 1800 scores are more than one chunk holds.
        let (q, k, v) = (
            var(&[1, 8, 1200, 4], 1).as_tensor().detach(),
            var(&[1, 2, 1800, 4], 2).as_tensor().detach(),
            var(&[1, 2, 1800, 4], 3).as_tensor().detach(),
        );
        assert!(query_chunks(1, 8, 1200, 1800).len() > 1);
        for mask in [Mask::None, Mask::Causal] {
            let whole = attention(&q, &k, &v, 0.5, &mask).unwrap();
            for at in [0, 700, 1199] {
                let one = q.narrow(2, at, 1).unwrap();
                let seen = keys_seen(&mask, (at, 1), (1200, 1800));
                let alone = attention(
                    &one,
                    &k.narrow(2, 0, seen).unwrap(),
                    &v.narrow(2, 0, seen).unwrap(),
                    0.5,
                    &Mask::None,
                )
                .unwrap();
                let gap = (whole.narrow(2, at, 1).unwrap() - alone)
                    .unwrap()
                    .abs()
                    .unwrap()
                    .max_all()
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap();
                assert!(gap < 1e-12, "query {at}: {gap}");
            }
        }
    }

    #[test]
    fn f32_values_are_those_of_the_f64_formulas() {
        let x = var(&[4, 64], 1);
        let w = var(&[64], 2);
        let narrow = |t: &Var| t.as_tensor().detach().to_dtype(DType::F32).unwrap();
        let (xs, ws) = (narrow(&x), narrow(&w));
        let (x, w) = (x.as_tensor().detach(), w.as_tensor().detach());
        let pairs = [
            (
                rms_norm(&xs, &ws, 1e-6).unwrap(),
                rms_norm(&x, &w, 1e-6).unwrap(),
            ),
            (
                layer_norm(&xs, Some(&ws), None, 1e-6).unwrap(),
                layer_norm(&x, Some(&w), None, 1e-6).unwrap(),
            ),
            (softmax(&xs).unwrap(), softmax(&x).unwrap()),
            (log_sigmoid(&xs).unwrap(), log_sigmoid(&x).unwrap()),
        ];
        for (i, (a, b)) in pairs.into_iter().enumerate() {
            let gap = (a.to_dtype(DType::F64).unwrap() - b)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap();
            assert!(gap < 2e-6, "pair {i}: {gap}");
        }
    }

    #[test]
    fn eight_bits_are_near_and_exact_for_what_they_can_say() {
        let narrow = |t: &Var| t.as_tensor().detach().to_dtype(DType::F32).unwrap();
        let (w, b) = (narrow(&var(&[24, 40], 1)), narrow(&var(&[24], 2)));
        // Small ones too, as weights are: without a scale these would be below the least code.
        let w = (w * 0.003).unwrap();
        let plain = Linear::new(w.clone(), Some(b.clone()));
        let eight = plain.clone().in_eight_bits().unwrap();
        assert_eq!(eight.weight().dtype(), DType::U8);
        let x = narrow(&var(&[2, 5, 40], 3));
        let (exact, near) = (plain.forward(&x).unwrap(), eight.forward(&x).unwrap());
        let size = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>();
        let off = size(&(&exact - &near).unwrap()).unwrap().sqrt();
        let own = size(&exact.broadcast_sub(&b).unwrap()).unwrap().sqrt();
        assert!(off > 0.0 && off < 0.04 * own, "{off} of {own}");
        // What codes can say they say.
        let codes = widened(eight.weight(), eight.eight.unwrap()).unwrap();
        let again = Linear::new(codes.clone(), Some(b)).in_eight_bits().unwrap();
        let gap = (widened(again.weight(), again.eight.unwrap()).unwrap() - codes).unwrap();
        assert_eq!(
            gap.abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
            0.0
        );
        // No number is off by more than a sixteenth of itself, but for the very small.
        let codes = widened(eight.weight(), eight.eight.unwrap()).unwrap();
        let pairs = codes.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let truth = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (a, b) in pairs.iter().zip(truth) {
            assert!((a - b).abs() <= b.abs() / 15.9 + 1e-7, "{a} for {b}");
        }
    }

    #[test]
    fn a_frozen_weight_gets_no_gradient() {
        let x = var(&[2, 4], 1);
        let w = var(&[3, 4], 2).as_tensor().detach();
        let y = matmul_t(x.as_tensor(), &w).unwrap().sum_all().unwrap();
        let grads = y.backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&w).is_none());
    }

    #[test]
    fn log_sigmoid_stays_finite_far_out() {
        let x = Var::from_tensor(&Tensor::new(&[-1e4f32, 0.0, 1e4], &Device::Cpu).unwrap());
        let x = x.unwrap();
        let y = log_sigmoid(x.as_tensor()).unwrap();
        assert_eq!(
            y.to_vec1::<f32>().unwrap(),
            [-1e4, -std::f32::consts::LN_2, 0.0]
        );
        let g = y.sum_all().unwrap().backward().unwrap();
        assert_eq!(
            g.get(&x).unwrap().to_vec1::<f32>().unwrap(),
            [1.0, 0.5, 0.0]
        );
    }
}
