//! How long each kernel and product of a CUDA program takes: preloaded (`LD_PRELOAD`) in front of the
//! driver and cuBLAS, it puts an event before and behind each and adds up what lies between.
//! `tests/gpu/kernel_times.py` makes a table of it.
//!
//! * `CARD_PROFILE`: the file that gets the sums as JSON when the process ends: by name how often,
//!   milliseconds, and of products the multiplications and additions in billions.
//!
//! A pair of events adds two or three microseconds to what it measures, and to the program a few
//! more for each launch: whoever wants the whole's time measures without.

#![allow(unsafe_code)] // The driver's interface is pointers; each use says what makes it sound.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::sync::{LazyLock, Mutex};

/// `CUresult`, `cublasStatus_t`, `cudaError_t`.
pub type Code = c_int;

type Pointer = *mut c_void;

/// A function of the library behind this one.
macro_rules! behind {
    ($($name:ident: fn($($of:ty),*) -> $back:ty = $symbol:literal;)*) => {$(
        #[allow(non_snake_case)]
        fn $name() -> unsafe extern "C" fn($($of),*) -> $back {
            static FOUND: LazyLock<usize> = LazyLock::new(|| found($symbol));
            // SAFETY: the library's function of this name has this type.
            unsafe { std::mem::transmute::<usize, unsafe extern "C" fn($($of),*) -> $back>(*FOUND) }
        }
    )*};
}

fn found(symbol: &CStr) -> usize {
    // SAFETY: a lookup by a name that ends with a zero.
    let at = unsafe { libc::dlsym(libc::RTLD_NEXT, symbol.as_ptr()) };
    if at.is_null() {
        eprintln!("profiler: no {}", symbol.to_string_lossy());
        std::process::abort();
    }
    at as usize
}

behind! {
    init: fn(c_uint) -> Code = c"cuInit";
    release: fn(c_int) -> Code = c"cuDevicePrimaryCtxRelease_v2";
    wait_for_all: fn() -> Code = c"cuCtxSynchronize";
    wait_for: fn(Pointer) -> Code = c"cuStreamSynchronize";
    event: fn(*mut Pointer, c_uint) -> Code = c"cuEventCreate";
    record: fn(Pointer, Pointer) -> Code = c"cuEventRecord";
    elapsed: fn(*mut f32, Pointer, Pointer) -> Code = c"cuEventElapsedTime";
    function: fn(*mut Pointer, Pointer, *const c_char) -> Code = c"cuModuleGetFunction";
    launch: fn(Pointer, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Pointer, *mut Pointer,
        *mut Pointer) -> Code = c"cuLaunchKernel";
    copy: fn(u64, u64, usize, Pointer) -> Code = c"cuMemcpyDtoDAsync_v2";
    copy_up: fn(u64, *const c_void, usize, Pointer) -> Code = c"cuMemcpyHtoDAsync_v2";
    stream_of: fn(Pointer, Pointer) -> Code = c"cublasSetStream_v2";
    multiply: fn(Pointer, c_int, c_int, c_int, c_int, c_int, *const c_void, *const c_void, c_int, c_int,
        c_longlong, *const c_void, c_int, c_int, c_longlong, *const c_void, Pointer, c_int, c_int,
        c_longlong, c_int, c_int, c_int) -> Code = c"cublasGemmStridedBatchedEx";
    register: fn(*mut Pointer, *const c_char, *mut c_char, *const c_char, c_int, Pointer, Pointer,
        Pointer, Pointer, *mut c_int) -> () = c"__cudaRegisterFunction";
    handle: fn(*mut Pointer, *const c_void) -> Code = c"__cudaGetKernel";
    launch_by_runtime: fn(Pointer, Three, Three, *mut Pointer, usize, Pointer) -> Code =
        c"__cudaLaunchKernel_ptsz";
}

/// `dim3`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Three([c_uint; 3]);

/// Between which events something ran, as numbers in the list of all.
struct Measured {
    name: String,
    gflop: f64,
    events: usize,
}

#[derive(Default)]
struct Profile {
    /// Events, two for each that is pending; used again and again.
    events: Vec<usize>,
    pending: Vec<Measured>,
    /// By name: times, milliseconds, billions of multiplications and additions.
    sums: BTreeMap<String, (u64, f64, f64)>,
    /// What kernels are called, by the driver's function and by the runtime library's.
    names: HashMap<usize, String>,
    /// cuBLAS's streams, by handle.
    streams: HashMap<usize, usize>,
}

static PROFILE: LazyLock<Mutex<Profile>> = LazyLock::new(Mutex::default);

thread_local! {
    /// Whether this thread is in a library's function already: what that calls is part of it.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// With what is known, unless a library asks.
fn with<T>(f: impl FnOnce(&mut Profile) -> T) -> Option<T> {
    if INSIDE.replace(true) {
        return None;
    }
    let done = f(&mut PROFILE.lock().unwrap_or_else(|e| e.into_inner()));
    INSIDE.set(false);
    Some(done)
}

/// Measures what is called by this name and runs in this stream, as `what` says, unless a library
/// asks.
fn measured(
    what: impl FnOnce(&Profile) -> (String, f64, Pointer),
    work: impl Fn() -> Code,
) -> Code {
    let code = with(|profile| {
        let (name, gflop, stream) = what(profile);
        profile.measure(name, gflop, stream, &work)
    });
    code.unwrap_or_else(work)
}

impl Profile {
    /// A kernel's name, by its function or handle.
    fn called(&self, kernel: Pointer) -> String {
        let name = self.names.get(&(kernel as usize)).cloned();
        name.unwrap_or_else(|| "no name".into())
    }

    /// Does it between two events.
    fn measure(
        &mut self,
        name: String,
        gflop: f64,
        stream: Pointer,
        work: impl FnOnce() -> Code,
    ) -> Code {
        let first = 2 * self.pending.len();
        while self.events.len() < first + 2 {
            let mut new = std::ptr::null_mut();
            // SAFETY: the driver makes an event there.
            if unsafe { event()(&mut new, 0) } != 0 {
                return work();
            }
            self.events.push(new as usize);
        }
        let at = |number: usize| std::ptr::without_provenance_mut(self.events[number]);
        let (before, behind) = (at(first), at(first + 1));
        // SAFETY: the events are the driver's, and the stream the program's own.
        let begun = unsafe { record()(before, stream) };
        let code = work();
        // SAFETY: the same.
        let ended = unsafe { record()(behind, stream) };
        if (begun, code, ended) == (0, 0, 0) {
            let events = first;
            self.pending.push(Measured {
                name,
                gflop,
                events,
            });
        }
        code
    }

    /// Adds up what has been measured; everything has been waited for.
    fn add_up(&mut self) {
        for one in std::mem::take(&mut self.pending) {
            let at = |number: usize| std::ptr::without_provenance_mut(self.events[number]);
            let mut milliseconds = 0f32;
            // SAFETY: both are events of the driver, and a number can be written there.
            let code = unsafe { elapsed()(&mut milliseconds, at(one.events), at(one.events + 1)) };
            if code == 0 {
                let sum = self.sums.entry(one.name).or_default();
                sum.0 += 1;
                sum.1 += f64::from(milliseconds);
                sum.2 += one.gflop;
            }
        }
    }
}

/// Waits, and adds up.
fn settled(wait: impl FnOnce() -> Code) -> Code {
    let code = wait();
    with(Profile::add_up);
    code
}

/// Writes the sums.
extern "C" fn report() {
    let Ok(file) = std::env::var("CARD_PROFILE") else {
        return;
    };
    let one = |(name, (times, ms, gflop)): (&String, &(u64, f64, f64))| {
        format!(" {name:?}: [{times}, {ms:.6}, {gflop:.6}]")
    };
    let sums = with(|profile| profile.sums.iter().map(one).collect::<Vec<_>>());
    let sums = sums.unwrap_or_default();
    if let Err(e) = std::fs::write(&file, format!("{{\n{}\n}}\n", sums.join(",\n"))) {
        eprintln!("profiler: {file}: {e}");
    }
}

/// Has the sums written when the process ends.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Code {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: `report` takes nothing and lives as long as the process.
        unsafe { libc::atexit(report) };
    });
    // SAFETY: passed on.
    unsafe { init()(flags) }
}

/// What is pending is added up before its events are gone.
#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    // SAFETY: passed on.
    settled(|| unsafe { wait_for_all()() });
    with(|profile| profile.events.clear());
    // SAFETY: passed on.
    unsafe { release()(device) }
}

/// Waits.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Code {
    // SAFETY: passed on.
    settled(|| unsafe { wait_for_all()() })
}

/// Waits.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: Pointer) -> Code {
    // SAFETY: passed on.
    settled(|| unsafe { wait_for()(stream) })
}

/// Remembers the kernel's name.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    to: *mut Pointer,
    module: Pointer,
    name: *const c_char,
) -> Code {
    // SAFETY: passed on; what the driver wrote can be read.
    unsafe {
        let code = function()(to, module, name);
        if code == 0 {
            let name = CStr::from_ptr(name).to_string_lossy().into();
            with(|profile| profile.names.insert(*to as usize, name));
        }
        code
    }
}

/// Measures a kernel.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    kernel: Pointer,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    stream: Pointer,
    parameters: *mut Pointer,
    extra: *mut Pointer,
) -> Code {
    // SAFETY: passed on.
    let work = || unsafe {
        launch()(
            kernel, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, parameters,
            extra,
        )
    };
    measured(|profile| (profile.called(kernel), 0.0, stream), work)
}

/// Measures a copy.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    stream: Pointer,
) -> Code {
    // SAFETY: passed on.
    let work = || unsafe { copy()(to, from, bytes, stream) };
    measured(|_| ("copy on the card".into(), 0.0, stream), work)
}

/// Measures a copy from the host.
///
/// # Safety
/// As the driver's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: Pointer,
) -> Code {
    // SAFETY: passed on.
    let work = || unsafe { copy_up()(to, from, bytes, stream) };
    measured(|_| ("copy to the card".into(), 0.0, stream), work)
}

/// Remembers the stream that products go to.
///
/// # Safety
/// As cuBLAS's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasSetStream_v2(cublas: Pointer, stream: Pointer) -> Code {
    with(|profile| profile.streams.insert(cublas as usize, stream as usize));
    // SAFETY: passed on.
    unsafe { stream_of()(cublas, stream) }
}

/// Measures a product, each shape by itself.
///
/// # Safety
/// As cuBLAS's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    cublas: Pointer,
    a_op: c_int,
    b_op: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: *const c_void,
    a_type: c_int,
    lda: c_int,
    a_stride: c_longlong,
    b: *const c_void,
    b_type: c_int,
    ldb: c_int,
    b_stride: c_longlong,
    beta: *const c_void,
    c: Pointer,
    c_type: c_int,
    ldc: c_int,
    c_stride: c_longlong,
    batch: c_int,
    compute: c_int,
    algorithm: c_int,
) -> Code {
    // library_types.h.
    let kind = match a_type {
        0 => "f32",
        1 => "f64",
        2 => "f16",
        14 => "bf16",
        _ => "other",
    };
    let times = if batch > 1 {
        format!(" x{batch}")
    } else {
        String::new()
    };
    let name = format!("product {n} x {m} of {k}{times} {kind}");
    let gflop = 2e-9 * f64::from(m) * f64::from(n) * f64::from(k) * f64::from(batch);
    let what = |profile: &Profile| {
        let stream = profile.streams.get(&(cublas as usize)).copied();
        let stream = std::ptr::without_provenance_mut(stream.unwrap_or_default());
        (name, gflop, stream)
    };
    // SAFETY: passed on.
    let work = || unsafe {
        multiply()(
            cublas, a_op, b_op, m, n, k, alpha, a, a_type, lda, a_stride, b, b_type, ldb, b_stride,
            beta, c, c_type, ldc, c_stride, batch, compute, algorithm,
        )
    };
    measured(what, work)
}

/// Remembers the name of a kernel of the runtime library.
///
/// # Safety
/// As the library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaRegisterFunction(
    module: *mut Pointer,
    host: *const c_char,
    function: *mut c_char,
    name: *const c_char,
    threads: c_int,
    thread: Pointer,
    block: Pointer,
    threads_of: Pointer,
    blocks_of: Pointer,
    warp: *mut c_int,
) {
    // SAFETY: passed on; the name ends with a zero.
    unsafe {
        let called = plain(&CStr::from_ptr(name).to_string_lossy()).to_string();
        with(|profile| profile.names.insert(host as usize, called));
        register()(
            module, host, function, name, threads, thread, block, threads_of, blocks_of, warp,
        );
    }
}

/// Remembers the name for the handle too.
///
/// # Safety
/// As the library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaGetKernel(to: *mut Pointer, host: *const c_void) -> Code {
    // SAFETY: passed on; what the library wrote can be read.
    unsafe {
        let code = handle()(to, host);
        if code == 0 {
            with(|profile| {
                let name = profile.called(host.cast_mut());
                profile.names.insert(*to as usize, name)
            });
        }
        code
    }
}

/// Measures a kernel of the runtime library.
///
/// # Safety
/// As the library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaLaunchKernel_ptsz(
    kernel: Pointer,
    grid: Three,
    block: Three,
    parameters: *mut Pointer,
    shared: usize,
    stream: Pointer,
) -> Code {
    // SAFETY: passed on.
    let work = || unsafe { launch_by_runtime()(kernel, grid, block, parameters, shared, stream) };
    measured(|profile| (profile.called(kernel), 0.0, stream), work)
}

/// A C++ function's bare name: `_Z16flash_fwd_kernelI…` is flash_fwd_kernel.
fn plain(mangled: &str) -> &str {
    let bare = || {
        let rest = mangled.strip_prefix("_Z")?;
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let length: usize = rest[..digits].parse().ok()?;
        rest.get(digits..digits + length)
    };
    bare().unwrap_or(mangled)
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn names_of_templates_are_told_without_their_arguments() {
        assert_eq!(
            plain("_Z16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi64"),
            "flash_fwd_kernel"
        );
        assert_eq!(plain("norm_bf16"), "norm_bf16");
        for odd in ["_Z", "_Z9", "_Z99short", "_Zx", ""] {
            assert_eq!(plain(odd), odd);
        }
    }
}
