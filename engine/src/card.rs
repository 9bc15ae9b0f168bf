//! Opening a CUDA card, and what memory it has left.
//!
//! Set up as candle does, every tensor costs more on the host than its kernel: candle takes each
//! host thread's own stream and lets cudarc guard each tensor with two events, made, recorded,
//! waited for and destroyed; and the driver gives freed memory back to the system whenever
//! somebody waits for a result, once a token when text is written. Here all threads share one
//! stream, so that nothing is left to guard, and what was freed stays with the process for the
//! next tensor.

use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute, CUmemoryPool};
use candle_core::cuda_backend::cudarc::driver::{DriverError, result};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{Device, Result};
use std::ffi::c_void;

/// Card `n`, with one stream for all threads.
#[allow(unsafe_code)]
pub(crate) fn open(n: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(n)?;
    if let Device::Cuda(cuda) = &device {
        // SAFETY: events keep what several streams do to a tensor in order. A device's tensors are
        // made, used and freed on its one stream, which keeps order by itself: its kernels, its
        // products and those of flash attention are all given this stream.
        unsafe { cuda.disable_event_tracking() };
        // Else a quantised matrix's product rounds what it is multiplied with to 8 bits, which
        // moves a logit of a small model by a tenth, and other words are written than on a CPU.
        candle_core::quantized::cuda::set_force_dmmv(true);
        // A card without such a pool does without.
        let _ = pool_of(cuda).map(|pool| {
            let mut everything = u64::MAX;
            let value: *mut c_void = (&raw mut everything).cast();
            let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            // SAFETY: the pool is the device's own and lives as long as the process; this
            // attribute is read as an unsigned number of 64 bits, which `value` points to.
            unsafe { result::mem_pool::set_attribute(pool, attribute, value) }
        });
    }
    Ok(device)
}

/// Bytes that can still be taken: what the card has left, and what the process keeps unused.
#[allow(unsafe_code)]
pub(crate) fn free_bytes(cuda: &CudaDevice) -> Result<u64> {
    cuda.cuda_stream().context().bind_to_thread().w()?;
    let (free, _) = result::mem_get_info().w()?;
    let kept = pool_of(cuda).and_then(|pool| {
        let bytes = |attribute| {
            let mut bytes = 0u64;
            let value: *mut c_void = (&raw mut bytes).cast();
            // SAFETY: as in `open`; both attributes are written as 64 bits.
            unsafe { result::mem_pool::get_attribute(pool, attribute, value) }.map(|()| bytes)
        };
        let reserved = bytes(CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = bytes(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(reserved.saturating_sub(used))
    });
    Ok(free as u64 + kept.unwrap_or(0))
}

/// Gives the system what the process keeps unused, for those that take memory from elsewhere: cuBLAS
/// and the driver itself.
#[allow(unsafe_code)]
pub(crate) fn give_back(cuda: &CudaDevice) -> Result<()> {
    let stream = cuda.cuda_stream();
    stream.context().bind_to_thread().w()?;
    stream.synchronize().w()?;
    let pool = pool_of(cuda).w()?;
    // SAFETY: the pool is the device's own; nothing in use is taken from it.
    unsafe { result::mem_pool::trim_to(pool, 0) }.w()
}

/// The pool that tensors' memory comes from.
#[allow(unsafe_code)]
fn pool_of(cuda: &CudaDevice) -> std::result::Result<CUmemoryPool, DriverError> {
    let device = cuda.cuda_stream().context().cu_device();
    // SAFETY: a context's device is one that the driver gave out.
    unsafe { result::device::get_default_mem_pool(device) }
}
