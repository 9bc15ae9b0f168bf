//! Our CUDA kernels (`kernels/kernels.cu`), and what launching one takes.
//!
//! Who uses them: Flux's blocks (`flux/cuda_blocks.rs`) and a language model's decoder
//! (`lm/cuda_step.rs`).

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaView, DeviceRepr, LaunchConfig};
use candle_core::{Result, Storage, Tensor, bail};
use half::{bf16, f16};
use std::ops::{Deref, Range};
use std::sync::LazyLock;

mod compiled {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// The kernels, for the driver to compile.
pub(crate) const PTX: &str = compiled::KERNELS;
/// The name that the driver knows them by.
pub(crate) const MODULE: &str = "simpatico";
/// Threads of a block, as in `kernels.cu`.
pub(crate) const THREADS: usize = 128;

/// Whether anybody wants to see how it would go without (`SIMPATICO_FUSED=0`).
pub(crate) static WANTED: LazyLock<bool> =
    LazyLock::new(|| !std::env::var("SIMPATICO_FUSED").is_ok_and(|wish| wish == "0"));

/// A number of a tensor's storage.
pub(crate) trait Number: CudaDType + DeviceRepr {
    /// How the kernels' names end.
    const NAME: &'static str;
}
impl Number for f32 {
    const NAME: &'static str = "f32";
}
impl Number for bf16 {
    const NAME: &'static str = "bf16";
}
impl Number for f16 {
    const NAME: &'static str = "f16";
}

/// The storage of a contiguous tensor, held while a kernel is launched on it.
pub(crate) struct Held<'a> {
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    range: Range<usize>,
}

impl<'a> Held<'a> {
    /// Of this tensor.
    pub(crate) fn of(x: &'a Tensor) -> Result<Self> {
        let (storage, layout) = x.storage_and_layout();
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("a kernel needs contiguous tensors")
        };
        Ok(Self {
            storage: Box::new(storage),
            range: from..to,
        })
    }

    /// Its numbers, as an argument.
    pub(crate) fn numbers<T: CudaDType + DeviceRepr>(&self) -> Result<CudaView<'_, T>> {
        match &**self.storage {
            Storage::Cuda(storage) => Ok(T::as_cuda_slice(storage)?.slice(self.range.clone())),
            _ => bail!("a kernel needs all of its tensors on one CUDA device"),
        }
    }
}

/// A launch of at least so many threads.
pub(crate) fn launch_of(threads: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (threads.div_ceil(THREADS) as u32, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    }
}
