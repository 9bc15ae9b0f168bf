//! One more token of each sequence on a CUDA device, in few launches.
//!
//! A token of one sequence waits for the host rather than for the weights: as tensor operations
//! a layer is some twenty-seven launches, at five microseconds each twice what reading 14 GB takes.
//! Here it is nine: four products, and between them one kernel each (`kernels/decoder.inc`).
//! Keys and values go straight into the cache. tests/gpu/NOTES.md says what that should win.
//!
//! Sums are in f32, so that half precision rounds less often than operations do.

use super::{Cache, Decoder, Placement, Run};
use crate::Result;
use crate::kernels::{self, Held, Kernel, Number, launch_of, through};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, PushKernelArg};
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor};

/// What a kernel is to do; each has its own tensors.
enum Pass<'a> {
    /// x + more and its norm, one after the other.
    SumNorm {
        more: Option<&'a Tensor>,
        weight: &'a Tensor,
        eps: f32,
    },
    /// A product's query; its key and value go into the cache as token `at`.
    Place {
        bias: Option<&'a Tensor>,
        angles: (&'a Tensor, &'a Tensor),
        cache: (&'a Tensor, &'a Tensor),
        heads: usize,
        at: usize,
    },
    /// Attention of a query over the first `seen` tokens of the cache.
    Attend {
        cache: (&'a Tensor, &'a Tensor),
        pads: Option<&'a Tensor>,
        heads: usize,
        seen: usize,
    },
    /// silu(gate)·up.
    Swiglu,
    /// The place of each row's greatest number.
    FirstOfMost,
}

impl kernels::Pass for Pass<'_> {
    fn kernel(&self) -> &'static str {
        match self {
            Self::SumNorm { .. } => "sum_norm",
            Self::Place { .. } => "place",
            Self::Attend { .. } => "attend",
            Self::Swiglu => "swiglu",
            Self::FirstOfMost => "first_of_most",
        }
    }

    fn shape(&self, x: &Shape) -> CandleResult<Shape> {
        let (b, _, width) = x.dims3()?;
        Ok(match self {
            Self::FirstOfMost => b.into(),
            Self::SumNorm { .. } => (2, b, 1, width).into(),
            Self::Place { cache, heads, .. } => (b, 1, heads * cache.0.dim(3)?).into(),
            Self::Attend { .. } => (b, 1, width).into(),
            Self::Swiglu => (b, 1, width / 2).into(),
        })
    }

    fn launch<T: Number>(
        &self,
        kernel: &Kernel,
        (x, shape): (&CudaView<T>, &Shape),
        out: &CudaSlice<T>,
    ) -> CandleResult<()> {
        let (b, _, width) = shape.dims3()?;
        let mut call = kernel.call();
        let (rows, wide) = (b as i32, width as i32);
        match self {
            Self::SumNorm { more, weight, eps } => {
                let held = (more.map(Held::of).transpose()?, Held::of(weight)?);
                // Without something to add nothing of the second argument is read.
                let more = held.0.as_ref().map(Held::numbers::<T>).transpose()?;
                let (weight, adds) = (held.1.numbers::<T>()?, i32::from(more.is_some()));
                call.arg(x).arg(more.as_ref().unwrap_or(x)).arg(&weight);
                call.arg(out).arg(&rows).arg(&wide).arg(&adds).arg(eps);
                // SAFETY: the arguments are those of `sum_norm` in decoder.inc. x and what is
                // added have b rows of `wide` numbers, a multiple of 8 (`hidden`), the weight has
                // one row's, out twice x's; the tensors are held until the launch is in the
                // stream's queue, and their memory is freed in its order.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(b * kernels::THREADS)) }.w()?;
            }
            Self::Place {
                bias,
                angles,
                cache,
                heads,
                at,
            } => {
                let (_, kv, room, head) = cache.0.dims4()?;
                let held = (
                    bias.map(Held::of).transpose()?,
                    Held::of(angles.0)?,
                    Held::of(angles.1)?,
                    Held::of(cache.0)?,
                    Held::of(cache.1)?,
                );
                let bias = held.0.as_ref().map(Held::numbers::<T>).transpose()?;
                let (cosine, sine) = (held.1.numbers::<f32>()?, held.2.numbers::<f32>()?);
                let (keys, values) = (held.3.numbers::<T>()?, held.4.numbers::<T>()?);
                let pairs = b * (heads + 2 * kv) * head / 2;
                // One row of angles, or one for each.
                let turn = match angles.0.elem_count() * 2 == head {
                    true => 0,
                    false => head as i32 / 2,
                };
                let (biased, count) = (i32::from(bias.is_some()), pairs as i64);
                let (heads, kv, head) = (*heads as i32, kv as i32, head as i32);
                let (room, at) = (room as i32, *at as i32);
                call.arg(x).arg(bias.as_ref().unwrap_or(x));
                call.arg(&cosine).arg(&sine).arg(out);
                call.arg(&keys).arg(&values).arg(&count);
                call.arg(&heads).arg(&kv).arg(&head);
                call.arg(&room).arg(&at).arg(&turn).arg(&biased);
                // SAFETY: as above, for `place`; x has b rows of heads + 2·kv heads, the bias one
                // such row, the tables head / 2 numbers for all rows or for each, and the caches
                // b·kv·room·head numbers of which nobody else reads token `at` < room: the cache
                // is borrowed for writing (`hidden`).
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(pairs)) }.w()?;
            }
            Self::Attend {
                cache,
                pads,
                heads,
                seen,
            } => {
                let (_, kv, room, head) = cache.0.dims4()?;
                let held = (
                    Held::of(cache.0)?,
                    Held::of(cache.1)?,
                    pads.map(Held::of).transpose()?,
                );
                let (keys, values) = (held.0.numbers::<T>()?, held.1.numbers::<T>()?);
                let pads = held.2.as_ref().map(Held::numbers::<u32>).transpose()?;
                let scale = 1.0 / (head as f32).sqrt();
                let (blocks, padded) = (b * heads, i32::from(pads.is_some()));
                let (heads, kv, head) = (*heads as i32, kv as i32, head as i32);
                let (room, seen) = (room as i32, *seen as i32);
                call.arg(x).arg(&keys).arg(&values);
                // Where no row is padded nothing of this argument is read.
                match &pads {
                    Some(pads) => call.arg(pads),
                    None => call.arg(x),
                };
                call.arg(out).arg(&heads).arg(&kv).arg(&head);
                call.arg(&room).arg(&seen).arg(&padded).arg(&scale);
                // SAFETY: as above, for `attend`; x has b rows of `heads` heads of 64 to 256
                // numbers (`hidden`), the caches room for `seen` tokens or more, and pads a number
                // for each row.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(blocks * kernels::THREADS)) }.w()?;
            }
            Self::Swiglu => {
                let count = out.len() / 8;
                let (eights, inner) = (count as i64, wide / 2);
                call.arg(x).arg(out).arg(&eights).arg(&inner);
                // SAFETY: as above, for `swiglu`; rows have twice `inner` numbers, a multiple of 8.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(count)) }.w()?;
            }
            Self::FirstOfMost => {
                call.arg(x).arg(out).arg(&wide);
                // SAFETY: as above, for `first_of_most`; `likeliest` gives rows of f32, of which
                // each gets a number of out.
                #[allow(unsafe_code)]
                unsafe { call.launch(launch_of(b * kernels::THREADS)) }.w()?;
            }
        }
        Ok(())
    }
}

/// Of each row of logits (rows, vocab) the place of the greatest, the first of equals, which is
/// what a host would look for if it had them all; NaN where one of a row is none. `None` where this
/// is not the way.
pub(super) fn likeliest(logits: &Tensor) -> Result<Option<Vec<f32>>> {
    let (_, vocab) = logits.dims2()?;
    // A place is a whole number that f32 has.
    let fits = logits.dtype() == DType::F32 && vocab <= 1 << 24;
    if !fits || !logits.device().is_cuda() || !*kernels::WANTED {
        return Ok(None);
    }
    let rows = logits.contiguous()?.unsqueeze(1)?;
    Ok(Some(through(&rows, &Pass::FirstOfMost)?.to_vec1()?))
}

/// x + more and its norm.
fn sum_norm(
    x: &Tensor,
    more: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let eps = eps as f32;
    let both = through(x, &Pass::SumNorm { more, weight, eps })?;
    Ok((both.get(0)?, both.get(1)?))
}

/// Tokens that are in front of each row and that nobody sees: `None` where there are none, an empty
/// answer where rows are placed in another way.
fn pads_of(placement: &Placement, device: &Device) -> Result<Option<Option<Tensor>>> {
    Ok(match placement {
        Placement::Causal => Some(None),
        Placement::LeftPadded(pads) if pads.iter().all(|pad| *pad == 0) => Some(None),
        Placement::LeftPadded(pads) => {
            let pads: Vec<u32> = pads.iter().map(|pad| *pad as u32).collect();
            Some(Some(Tensor::new(pads, device)?))
        }
        Placement::Custom { .. } => None,
    })
}

/// As [`Decoder::hidden`] for one token a row, (b, 1, hidden), behind those in the cache, which it
/// is added to; `None` where this is not the way: elsewhere than on a CUDA device, for more tokens,
/// with an adapter beside the weights, gradients, weights that are not joined ([`Decoder::join`]),
/// odd sizes, or `SIMPATICO_FUSED=0`.
pub(super) fn hidden(
    decoder: &Decoder,
    x: &Tensor,
    placement: &Placement,
    run: &Run,
    cache: &mut Cache,
) -> Result<Option<Tensor>> {
    let (c, (b, tokens, d)) = (&decoder.config, x.dims3()?);
    let known = matches!(decoder.dtype, DType::F32 | DType::BF16 | DType::F16);
    let even = d % 8 == 0 && c.intermediate % 8 == 0;
    let heads = c.head_dim % 64 == 0 && c.head_dim <= 256 && c.heads % c.kv_heads == 0;
    let alone = run.adapter.is_none() && !x.track_op();
    let wanted = *kernels::WANTED && x.device().is_cuda() && tokens == 1;
    let room = [b, c.kv_heads, cache.capacity, c.head_dim];
    let follows = cache.len < cache.capacity
        && cache.layers.iter().all(|layer| {
            let fits = |t: &Tensor| t.dims() == room && t.dtype() == decoder.dtype;
            layer.as_ref().is_some_and(|(k, v)| fits(k) && fits(v))
        });
    let plain = |module: usize| {
        let mut layers = decoder.layers.iter();
        layers.all(|layer| layer.projections[module].bias.is_none())
    };
    if !(wanted && known && even && heads && alone && follows && plain(3) && plain(6)) {
        return Ok(None);
    }
    let Some(pads) = pads_of(placement, x.device())? else {
        return Ok(None);
    };
    let mut joined = Vec::with_capacity(decoder.layers.len());
    for layer in &decoder.layers {
        match &layer.joined {
            Some(both) if both[1].bias().is_none() => joined.push(both),
            _ => return Ok(None),
        }
    }
    let (cos, sin) = (run.cos.contiguous()?, run.sin.contiguous()?);
    let mut x = x.to_dtype(decoder.dtype)?.contiguous()?;
    let mut more: Option<Tensor> = None;
    let layers = decoder.layers.iter().zip(joined).zip(&cache.layers);
    for ((layer, [qkv, gate_up]), kept) in layers {
        let Some((keys, values)) = kept else {
            unreachable!("every layer was looked at above");
        };
        let kept = (keys, values);
        let (sum, normed) = sum_norm(&x, more.as_ref(), &layer.attention_norm, c.eps)?;
        let place = Pass::Place {
            bias: qkv.bias(),
            angles: (&cos, &sin),
            cache: kept,
            heads: c.heads,
            at: cache.len,
        };
        let attend = Pass::Attend {
            cache: kept,
            pads: pads.as_ref(),
            heads: c.heads,
            seen: cache.len + 1,
        };
        let query = through(&qkv.product(&normed)?, &place)?;
        let y = through(&query, &attend)?;
        let y = layer.projections[3].matrix.forward(&y)?;
        let (sum, normed) = sum_norm(&sum, Some(&y), &layer.mlp_norm, c.eps)?;
        let inner = through(&gate_up.product(&normed)?, &Pass::Swiglu)?;
        more = Some(layer.projections[6].matrix.forward(&inner)?);
        x = sum;
    }
    let (_, normed) = sum_norm(&x, more.as_ref(), &decoder.norm, c.eps)?;
    cache.len += 1;
    Ok(Some(normed))
}
