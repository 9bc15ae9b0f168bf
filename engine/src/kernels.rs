//! Our CUDA kernels (`kernels/kernels.cu`), and what launching one takes.
//!
//! Who uses them: Flux's blocks (`flux/cuda_blocks.rs`), a language model's decoder
//! (`lm/cuda_step.rs`) and layers that learn (`cuda_learn.rs`).

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, DeviceRepr, LaunchArgs, LaunchConfig,
};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Storage, Tensor, bail,
};
use half::{bf16, f16};
use std::ops::{Deref, Range};
use std::sync::{Arc, LazyLock};

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

/// A kernel of one number type, and the stream that it is launched in.
pub(crate) struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// A launch, which wants the kernel's arguments in their order.
    pub(crate) fn call(&self) -> LaunchArgs<'_> {
        self.stream.launch_builder(&self.function)
    }
}

/// What a kernel computes of a tensor and of others that it holds.
pub(crate) trait Pass {
    /// The kernel, without the type at the end of its name.
    fn kernel(&self) -> &'static str;

    /// The shape of what comes out.
    fn shape(&self, x: &Shape) -> Result<Shape>;

    /// Puts it into the stream's queue: from x, contiguous and of the shape that stands beside it,
    /// into `out`, every number of which it writes.
    fn launch<T: Number>(
        &self,
        kernel: &Kernel,
        x: (&CudaView<T>, &Shape),
        out: &CudaSlice<T>,
    ) -> Result<()>;
}

/// x after the pass. It has no gradient.
pub(crate) fn through(x: &Tensor, pass: &impl Pass) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Through(pass))
}

struct Through<'a, P>(&'a P);

impl<P: Pass> Through<'_, P> {
    fn run<T: Number>(
        &self,
        storage: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = storage.device();
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("a kernel needs contiguous tensors")
        };
        let x = T::as_cuda_slice(storage)?.slice(from..to);
        let shape = self.0.shape(layout.shape())?;
        // SAFETY: the pass writes every number of it.
        #[allow(unsafe_code)]
        let out = unsafe { device.alloc::<T>(shape.elem_count())? };
        let name = format!("{}_{}", self.0.kernel(), T::NAME);
        let function = device.get_or_load_custom_func(&name, MODULE, PTX)?;
        let kernel = Kernel {
            function: function.into_cuda_function(),
            stream: device.cuda_stream(),
        };
        self.0.launch(&kernel, (&x, layout.shape()), &out)?;
        Ok((CudaStorage::wrap_cuda_slice(out, device.clone()), shape))
    }
}

impl<P: Pass> CustomOp1 for Through<'_, P> {
    fn name(&self) -> &'static str {
        self.0.kernel()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} is for CUDA devices", self.0.kernel())
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        match x.dtype() {
            DType::F32 => self.run::<f32>(x, layout),
            DType::BF16 => self.run::<bf16>(x, layout),
            DType::F16 => self.run::<f16>(x, layout),
            other => bail!(
                "{} computes in f32, bf16 or f16, not in {other:?}",
                self.0.kernel()
            ),
        }
    }
}
