//! A CUDA card that is none: the driver's functions, cuBLAS's products and the kernels of any
//! program that brings its own as PTX, on a CPU. `tests/gpu/rehearse` preloads it (`LD_PRELOAD`) in
//! front of a CUDA build on a machine without a GPU.
//!
//! What it shows is whether a program's use of a card is right, not how fast it is: results, every
//! access of a kernel to the byte, launches the driver would refuse, memory that runs out and how
//! much was in use, and how many launches, copies and allocations something takes.
//!
//! * `CARD_MIB`: the card's memory (8192).
//! * `CARD_REPORT`: a file that gets counts as JSON when the process ends.
//! * `CARD_REVERSED=1`: a block's later warps go first.
//! * `CARD_PTX`: a folder with the PTX of kernels that are launched by the runtime library, as those
//!   of flash attention are: the program itself has them as a card's machine code.
//!
//! Everything is done at once and in order, so that what only goes wrong between streams does not
//! show; and products are summed in f32 whatever they are asked for in.

#![allow(unsafe_code)] // The driver's interface is pointers; each use says what makes it sound.

mod alu;
pub mod blas;
mod memory;
mod ptx;
mod run;
pub mod runtime;
#[cfg(test)]
mod tests;

use memory::Memory;
use ptx::{Kernel, Module};
use run::{FaultKind, Launch};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_void};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

/// `CUresult`, `cublasStatus_t`, `curandStatus_t`.
pub type Code = c_int;

const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const INVALID_FUNCTION: Code = 98;
const INVALID_DEVICE: Code = 101;
const INVALID_PTX: Code = 218;
const NOT_FOUND: Code = 500;
const ILLEGAL_ADDRESS: Code = 700;
const ASSERT: Code = 710;
const MISALIGNED_ADDRESS: Code = 716;
const LAUNCH_FAILED: Code = 719;

/// What stands for a context, a stream, an event, a pool or a handle: there is one of each.
const TOKEN: *mut c_void = std::ptr::without_provenance_mut(0x100);

#[derive(Debug, Default)]
struct Counts {
    /// By kernel: launches and threads.
    launches: BTreeMap<String, (u64, u64)>,
    products: u64,
    flop: u64,
    /// Times and bytes.
    up: (u64, u64),
    down: (u64, u64),
    across: (u64, u64),
    waits: u64,
}

struct Loaded {
    text: Module,
    variables: HashMap<String, u64>,
    kernels: HashMap<String, &'static Kernel>,
}

impl Loaded {
    /// Reads a module's text and gives its variables their place.
    fn new(text: &str, memory: &mut Memory) -> Result<Self, Code> {
        let text = Module::read(text).map_err(|e| {
            eprintln!("emulated card: a module was refused: {e}");
            INVALID_PTX
        })?;
        let mut variables = HashMap::new();
        for variable in &text.variables {
            let bytes = &variable.bytes;
            let at = memory.allocate(bytes.len()).ok_or(OUT_OF_MEMORY)?;
            // SAFETY: as many bytes were allocated there.
            unsafe { std::ptr::copy(bytes.as_ptr(), at as *mut u8, bytes.len()) };
            variables.insert(variable.name.clone(), at);
        }
        Ok(Self {
            text,
            variables,
            kernels: HashMap::new(),
        })
    }

    /// The kernel of this name, if the module has it.
    fn kernel(&mut self, name: &str) -> Result<Option<&'static Kernel>, Code> {
        if let Some(kernel) = self.kernels.get(name) {
            return Ok(Some(kernel));
        }
        let read = self.text.kernel(name, &self.variables);
        let read = read.map_err(|e| {
            eprintln!("emulated card: {e}");
            INVALID_PTX
        })?;
        // Functions are never given back.
        Ok(read.map(|kernel| {
            let kernel: &'static Kernel = Box::leak(Box::new(kernel));
            self.kernels.insert(name.to_string(), kernel);
            kernel
        }))
    }
}

struct Card {
    memory: Memory,
    modules: Vec<Loaded>,
    counts: Counts,
    /// Every call after a fault ends with its code, as on a card.
    failed: Option<Code>,
    runtime: runtime::Runtime,
}

static CARD: LazyLock<Mutex<Card>> = LazyLock::new(|| {
    let mib = std::env::var("CARD_MIB").ok().and_then(|v| v.parse().ok());
    Mutex::new(Card {
        memory: Memory::new(mib.unwrap_or(8192u64) << 20),
        modules: Vec::new(),
        counts: Counts::default(),
        failed: None,
        runtime: runtime::Runtime::default(),
    })
});
static REVERSED: LazyLock<bool> =
    LazyLock::new(|| std::env::var("CARD_REVERSED").is_ok_and(|v| v == "1"));

/// With the card, unless it has failed.
fn with(f: impl FnOnce(&mut Card) -> Result<(), Code>) -> Code {
    let mut card = CARD.lock().unwrap_or_else(|e| e.into_inner());
    match card.failed.map_or_else(|| f(&mut card), Err) {
        Ok(()) => SUCCESS,
        Err(code) => code,
    }
}

/// Writes what was counted.
extern "C" fn report() {
    let Ok(file) = std::env::var("CARD_REPORT") else {
        return;
    };
    let card = CARD.lock().unwrap_or_else(|e| e.into_inner());
    let counts = &card.counts;
    let kernels: Vec<String> = counts
        .launches
        .iter()
        .map(|(name, (times, threads))| format!("  {name:?}: [{times}, {threads}]"))
        .collect();
    let launches: u64 = counts.launches.values().map(|(times, _)| times).sum();
    let (up, down, across) = (counts.up, counts.down, counts.across);
    let text = format!(
        "{{\n \"launches\": {launches},\n \"products\": {},\n \"gflop\": {:.3},\n \"allocations\": {},\n \
         \"waits\": {},\n \"copies_up\": [{}, {}],\n \"copies_down\": [{}, {}],\n \"copies_across\": [{}, {}],\n \
         \"memory_mib\": {:.1},\n \"kernels\": {{\n{}\n }}\n}}\n",
        counts.products,
        counts.flop as f64 / 1e9,
        card.memory.allocations,
        counts.waits,
        up.0,
        up.1,
        down.0,
        down.1,
        across.0,
        across.1,
        card.memory.most as f64 / (1 << 20) as f64,
        kernels.join(",\n")
    );
    if let Err(e) = std::fs::write(&file, text) {
        eprintln!("emulated card: {file}: {e}");
    }
}

/// Has the report written when the process ends.
#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> Code {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: `report` takes nothing and lives as long as the process.
        unsafe { libc::atexit(report) };
    });
    SUCCESS
}

/// Writes what a function gives back.
///
/// # Safety
/// `to` can be written.
unsafe fn give<T>(to: *mut T, value: T) -> Code {
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    SUCCESS
}

macro_rules! gives {
    ($($name:ident($to:ident: $of:ty $(, $argument:ident: $kind:ty)*) = $value:expr;)*) => {$(
        /// Gives what there is one of.
        ///
        /// # Safety
        /// The first pointer can be written.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($to: *mut $of $(, $argument: $kind)*) -> Code {
            // SAFETY: the caller's promise.
            unsafe { give($to, $value) }
        }
    )*};
}
gives! {
    cuDeviceGetCount(count: c_int) = 1;
    cuDeviceGetDefaultMemPool(pool: *mut c_void, _device: c_int) = TOKEN;
    cuDevicePrimaryCtxRetain(context: *mut c_void, _device: c_int) = TOKEN;
    cuCtxGetCurrent(context: *mut c_void) = TOKEN;
    cuStreamCreate(stream: *mut c_void, _flags: c_uint) = TOKEN;
}

macro_rules! agree {
    ($($name:ident($($argument:ident: $of:ty),*);)*) => {$(
        /// There is nothing to do.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $of),*) -> Code {
            SUCCESS
        }
    )*};
}
agree! {
    cuDevicePrimaryCtxRelease_v2(_device: c_int);
    cuCtxSetCurrent(_context: *mut c_void);
    cuCtxDestroy_v2(_context: *mut c_void);
    cuStreamDestroy_v2(_stream: *mut c_void);
    cuStreamWaitEvent(_stream: *mut c_void, _event: *mut c_void, _flags: c_uint);
    cuModuleUnload(_module: *mut c_void);
    cuMemPoolSetAttribute(_pool: *mut c_void, _attribute: c_int, _value: *mut c_void);
}

/// When an event was recorded.
type Event = Mutex<Option<Instant>>;

/// An event.
///
/// # Safety
/// `event` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> Code {
    let new = Box::into_raw(Box::new(Event::default()));
    // SAFETY: the caller's promise.
    unsafe { give(event, new.cast()) }
}

/// Its end.
///
/// # Safety
/// It was made, and is not used any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> Code {
    // SAFETY: the caller's promise: it came from a box.
    drop(unsafe { Box::from_raw(event.cast::<Event>()) });
    SUCCESS
}

/// Everything is done at once: now.
///
/// # Safety
/// It was made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, _stream: *mut c_void) -> Code {
    // SAFETY: the caller's promise.
    let event = unsafe { &*event.cast::<Event>() };
    *event.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
    SUCCESS
}

/// Milliseconds of this machine from one to the other.
///
/// # Safety
/// Both were made, and a number can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(
    milliseconds: *mut f32,
    from: *mut c_void,
    to: *mut c_void,
) -> Code {
    // SAFETY: the caller's promise.
    let [from, to] = [from, to].map(|event| unsafe { &*event.cast::<Event>() });
    let [from, to] = [from, to].map(|event| *event.lock().unwrap_or_else(|e| e.into_inner()));
    let (Some(from), Some(to)) = (from, to) else {
        return INVALID_VALUE;
    };
    let apart = to.saturating_duration_since(from).as_secs_f32();
    // SAFETY: the caller's promise.
    unsafe { give(milliseconds, 1e3 * apart) }
}

/// Device 0.
///
/// # Safety
/// `device` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    match ordinal {
        // SAFETY: the caller's promise.
        0 => unsafe { give(device, 0) },
        _ => INVALID_DEVICE,
    }
}

/// As an H200 answers, where anybody asks.
///
/// # Safety
/// `value` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    _device: c_int,
) -> Code {
    let found = match attribute {
        1..=3 => 1024,   // threads of a block
        4 => 64,         // its depth
        5 => i32::MAX,   // blocks of a grid
        6 | 7 => 65535,  // its height and depth
        8 => 48 << 10,   // shared memory of a block
        10 => 32,        // a warp
        16 => 132,       // multiprocessors
        75 => 9,         // compute capability
        97 => 227 << 10, // shared memory of a block that asks for it
        115 => 1,        // memory pools
        _ => 0,
    };
    // SAFETY: the caller's promise.
    unsafe { give(value, found) }
}

/// Waits for nothing, since everything is done at once.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> Code {
    with(|card| {
        card.counts.waits += 1;
        Ok(())
    })
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: *mut c_void) -> Code {
    cuCtxSynchronize()
}

/// Nothing is recorded.
///
/// # Safety
/// `status` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_stream: *mut c_void, status: *mut c_int) -> Code {
    // SAFETY: the caller's promise.
    unsafe { give(status, 0) }
}

fn words(code: Code) -> &'static CStr {
    match code {
        SUCCESS => c"no error",
        INVALID_VALUE => c"invalid argument",
        OUT_OF_MEMORY => c"out of memory",
        INVALID_FUNCTION => c"invalid device function",
        INVALID_DEVICE => c"invalid device ordinal",
        INVALID_PTX => c"a PTX JIT compilation failed",
        NOT_FOUND => c"named symbol not found",
        ILLEGAL_ADDRESS => c"an illegal memory access was encountered",
        ASSERT => c"device-side assert triggered",
        MISALIGNED_ADDRESS => c"misaligned address",
        LAUNCH_FAILED => c"unspecified launch failure",
        _ => c"unknown error",
    }
}

/// A code in words.
///
/// # Safety
/// `text` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: the caller's promise.
    unsafe { give(text, words(code).as_ptr()) }
}

/// The same.
///
/// # Safety
/// As [`cuGetErrorString`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: the caller's promise.
    unsafe { give(text, words(code).as_ptr()) }
}

/// So many bytes.
///
/// # Safety
/// `to` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(to: *mut u64, bytes: usize) -> Code {
    with(|card| {
        // A driver refuses this.
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let start = card.memory.allocate(bytes).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: the caller's promise.
        unsafe { give(to, start) };
        Ok(())
    })
}

/// The same.
///
/// # Safety
/// As [`cuMemAlloc_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(to: *mut u64, bytes: usize, _stream: *mut c_void) -> Code {
    // SAFETY: the caller's promise.
    unsafe { cuMemAlloc_v2(to, bytes) }
}

/// Gives an allocation back.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(start: u64) -> Code {
    with(|card| match card.memory.free(start) {
        true => Ok(()),
        false => Err(INVALID_VALUE),
    })
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(start: u64, _stream: *mut c_void) -> Code {
    cuMemFree_v2(start)
}

/// What is left, where freed memory stays with the process (`engine/src/card.rs` asks for that).
///
/// # Safety
/// Both can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    with(|card| {
        // SAFETY: the caller's promise.
        unsafe {
            give(free, (card.memory.size - card.memory.kept) as usize);
            give(total, card.memory.size as usize);
        }
        Ok(())
    })
}

/// Bytes that the pool has and that are in use, now and at most.
///
/// # Safety
/// `value` points to 64 bits, as these attributes have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolGetAttribute(
    _pool: *mut c_void,
    attribute: c_int,
    value: *mut c_void,
) -> Code {
    with(|card| {
        let found = match attribute {
            5 => card.memory.kept,
            6 | 8 => card.memory.most,
            7 => card.memory.used,
            _ => return Err(INVALID_VALUE),
        };
        // SAFETY: the caller's promise.
        unsafe { give(value.cast(), found) };
        Ok(())
    })
}

/// Gives the system what is not in use.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(_pool: *mut c_void, least: usize) -> Code {
    with(|card| {
        card.memory.kept = card.memory.used.max(least as u64).min(card.memory.kept);
        Ok(())
    })
}

/// Whether all that is touched on the card is allocated.
fn reached(card: &Card, what: &str, on_card: &[u64], bytes: usize) -> Result<(), Code> {
    for at in on_card {
        if !card.memory.blocks.hold(*at, bytes) {
            let around = card.memory.blocks.around(*at);
            eprintln!("emulated card: {what} of {bytes} bytes at {at:#x}, {around}");
            return Err(INVALID_VALUE);
        }
    }
    Ok(())
}

/// Copies and counts.
///
/// # Safety
/// As many bytes can be read at `from` and written at `to`, where these are not on the card.
unsafe fn copied(
    way: &str,
    counted: fn(&mut Counts) -> &mut (u64, u64),
    (to, from): (u64, u64),
    on_card: &[u64],
    bytes: usize,
) -> Code {
    with(|card| {
        let (times, all) = counted(&mut card.counts);
        *times += 1;
        *all += bytes as u64;
        reached(card, way, on_card, bytes)?;
        // SAFETY: what is on the card was looked up, the rest is the caller's promise.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    })
}

/// From the host.
///
/// # Safety
/// As many bytes at `from` can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    _stream: *mut c_void,
) -> Code {
    let both = (to, from as u64);
    // SAFETY: the caller's promise.
    unsafe { copied("a copy to the card", |c| &mut c.up, both, &[to], bytes) }
}

/// To the host.
///
/// # Safety
/// As many bytes at `to` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    _stream: *mut c_void,
) -> Code {
    let both = (to as u64, from);
    // SAFETY: the caller's promise.
    unsafe {
        copied(
            "a copy from the card",
            |c| &mut c.down,
            both,
            &[from],
            bytes,
        )
    }
}

/// On the card.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    _stream: *mut c_void,
) -> Code {
    let both = (to, from);
    // SAFETY: both are on the card.
    unsafe {
        copied(
            "a copy on the card",
            |c| &mut c.across,
            both,
            &[to, from],
            bytes,
        )
    }
}

/// Sets each byte.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(
    to: u64,
    value: c_uchar,
    bytes: usize,
    _stream: *mut c_void,
) -> Code {
    with(|card| {
        reached(card, "setting", &[to], bytes)?;
        // SAFETY: it was looked up.
        unsafe { (to as *mut u8).write_bytes(value, bytes) };
        Ok(())
    })
}

/// Takes a module's PTX.
///
/// # Safety
/// `module` can be written, and `image` points to text that ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> Code {
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(image.cast()) };
    with(|card| {
        let text = text.to_str().map_err(|_| INVALID_PTX)?;
        card.modules.push(Loaded::new(text, &mut card.memory)?);
        let number = std::ptr::without_provenance_mut(card.modules.len());
        // SAFETY: the caller's promise.
        unsafe { give(module, number) };
        Ok(())
    })
}

/// Looks a kernel up.
///
/// # Safety
/// `function` can be written, and `name` is text that ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Code {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    with(|card| {
        let loaded = card.modules.get_mut((module as usize).wrapping_sub(1));
        let loaded = loaded.ok_or(INVALID_VALUE)?;
        let kernel = loaded.kernel(&name)?.ok_or(NOT_FOUND)?;
        let handle: *const Kernel = kernel;
        // SAFETY: the caller's promise.
        unsafe { give(function, handle.cast_mut().cast()) };
        Ok(())
    })
}

/// Runs a kernel.
///
/// # Safety
/// `function` is one that was looked up, and `parameters` points to as many pointers as it has
/// parameters, each to one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    _stream: *mut c_void,
    parameters: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Code {
    // SAFETY: the caller's promise; kernels live as long as the process.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    with(|card| {
        // SAFETY: the caller's promise.
        let given = unsafe { given(kernel, parameters) };
        card.launch(kernel, grid, block, shared as usize, &given, USUAL_SHARED)
    })
}

/// Bytes of shared memory that a block may have if nothing else was said of its kernel.
const USUAL_SHARED: usize = 48 << 10;

/// A kernel's parameters as they lie.
///
/// # Safety
/// `parameters` points to as many pointers as it has parameters, each to one.
unsafe fn given(kernel: &Kernel, parameters: *mut *mut c_void) -> Vec<u8> {
    let size = kernel.parameters.last().map_or(0, |(at, bytes)| at + bytes);
    let mut given = vec![0u8; size];
    for (i, (at, bytes)) in kernel.parameters.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let from = (*parameters.add(i)).cast::<u8>();
            std::ptr::copy(from, given[*at..].as_mut_ptr(), *bytes);
        }
    }
    given
}

impl Card {
    fn launch(
        &mut self,
        kernel: &Kernel,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        parameters: &[u8],
        most_shared: usize,
    ) -> Result<(), Code> {
        let threads: u64 = block.iter().map(|n| u64::from(*n)).product();
        let blocks: u64 = grid.iter().map(|n| u64::from(*n)).product();
        let most = kernel.most_threads.unwrap_or(1024) as u64;
        let refused = blocks == 0
            || threads == 0
            || threads > most
            || block[2] > 64
            || grid[0] > i32::MAX as u32
            || grid[1] > 65535
            || grid[2] > 65535
            || kernel.shared + shared > most_shared;
        if refused {
            eprintln!(
                "emulated card: a launch of {} is refused: grid {grid:?}, {block:?} threads of at most {most}, \
                 {} bytes of shared memory of at most {most_shared}",
                kernel.name,
                kernel.shared + shared
            );
            return Err(INVALID_VALUE);
        }
        let counted = self.counts.launches.entry(kernel.name.clone()).or_default();
        counted.0 += 1;
        counted.1 += threads * blocks;
        let launch = Launch {
            kernel,
            grid,
            block,
            shared,
            parameters,
            reversed: *REVERSED,
        };
        run::run(&launch, &self.memory.blocks).map_err(|fault| {
            eprintln!("emulated card: {}", fault.text);
            let code = match fault.kind {
                FaultKind::IllegalAddress => ILLEGAL_ADDRESS,
                FaultKind::Misaligned => MISALIGNED_ADDRESS,
                FaultKind::Assertion => ASSERT,
                FaultKind::Launch => LAUNCH_FAILED,
            };
            self.failed = Some(code);
            code
        })
    }
}
