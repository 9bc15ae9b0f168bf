//! The runtime library's functions, which flash attention is launched by.
//!
//! A program says at its start which host function stands for which kernel; the kernels' text comes
//! from the folder `CARD_PTX`. A kernel's handle is its host function's address.

use crate::{
    Code, INVALID_FUNCTION, INVALID_VALUE, Loaded, SUCCESS, TOKEN, USUAL_SHARED, given, with, words,
};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

/// What the card knows of kernels launched this way.
#[derive(Default)]
pub(crate) struct Runtime {
    /// The modules of the folder, once one was wanted.
    modules: Option<Vec<Loaded>>,
    /// Bytes of shared memory that a kernel's blocks may have, where its program asked for more.
    shared: HashMap<usize, usize>,
}

/// By host function: a kernel's name. Filled before the program's own code runs.
static NAMES: Mutex<Vec<(usize, String)>> = Mutex::new(Vec::new());

/// The last call's error, and launches that a program has begun to describe.
static LAST: Mutex<Code> = Mutex::new(SUCCESS);
static BEGUN: Mutex<Vec<(Three, Three, usize, usize)>> = Mutex::new(Vec::new());

/// `dim3`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Three {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

impl Three {
    fn all(self) -> [u32; 3] {
        [self.x, self.y, self.z]
    }
}

fn said(code: Code) -> Code {
    if code != SUCCESS {
        *LAST.lock().unwrap_or_else(|e| e.into_inner()) = code;
    }
    code
}

/// A program's kernels as machine code, which nobody here can read.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinary(_binary: *mut c_void) -> *mut *mut c_void {
    TOKEN.cast()
}

/// There is nothing to do.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinaryEnd(_handle: *mut *mut c_void) {}

/// There is nothing to do.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaUnregisterFatBinary(_handle: *mut *mut c_void) {}

/// A variable; kernels find theirs in their own module.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterVar(
    _handle: *mut *mut c_void,
    _host: *mut c_char,
    _address: *mut c_char,
    _name: *const c_char,
    _external: c_int,
    _size: usize,
    _constant: c_int,
    _global: c_int,
) {
}

/// The kernel that a host function stands for.
///
/// # Safety
/// `name` is text that ends with a zero.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaRegisterFunction(
    _handle: *mut *mut c_void,
    host: *const c_char,
    _function: *mut c_char,
    name: *const c_char,
    _threads: c_int,
    _thread: *mut c_void,
    _block: *mut c_void,
    _threads_of: *mut c_void,
    _blocks_of: *mut c_void,
    _warp: *mut c_int,
) {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into();
    let mut names = NAMES.lock().unwrap_or_else(|e| e.into_inner());
    names.push((host as usize, name));
}

/// The handle of the kernel that a host function stands for.
///
/// # Safety
/// `kernel` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaGetKernel(kernel: *mut *mut c_void, host: *const c_void) -> Code {
    // SAFETY: the caller's promise.
    unsafe { kernel.write(host.cast_mut()) };
    SUCCESS
}

/// The shape of the launch that comes next.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaPushCallConfiguration(
    grid: Three,
    block: Three,
    shared: usize,
    stream: *mut c_void,
) -> c_uint {
    let mut begun = BEGUN.lock().unwrap_or_else(|e| e.into_inner());
    begun.push((grid, block, shared, stream as usize));
    0
}

/// Gives it to the launch itself.
///
/// # Safety
/// Everything can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaPopCallConfiguration(
    grid: *mut Three,
    block: *mut Three,
    shared: *mut usize,
    stream: *mut *mut c_void,
) -> Code {
    let mut begun = BEGUN.lock().unwrap_or_else(|e| e.into_inner());
    let Some(last) = begun.pop() else {
        return said(INVALID_VALUE);
    };
    // SAFETY: the caller's promise.
    unsafe {
        grid.write(last.0);
        block.write(last.1);
        shared.write(last.2);
        stream.write(std::ptr::without_provenance_mut(last.3));
    }
    SUCCESS
}

/// The modules of the folder.
fn modules(memory: &mut crate::Memory) -> Result<Vec<Loaded>, Code> {
    let Ok(folder) = std::env::var("CARD_PTX") else {
        return Ok(Vec::new());
    };
    let texts = || -> std::io::Result<Vec<String>> {
        let mut files = std::fs::read_dir(&folder)?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        files.retain(|file| file.extension().is_some_and(|e| e == "ptx"));
        files.sort();
        files.iter().map(std::fs::read_to_string).collect()
    };
    let texts = texts().map_err(|e| {
        eprintln!("emulated card: {folder}: {e}");
        INVALID_FUNCTION
    })?;
    texts.iter().map(|text| Loaded::new(text, memory)).collect()
}

/// Runs a kernel.
///
/// # Safety
/// `parameters` points to as many pointers as the kernel has parameters, each to one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaLaunchKernel_ptsz(
    kernel: *mut c_void,
    grid: Three,
    block: Three,
    parameters: *mut *mut c_void,
    shared: usize,
    _stream: *mut c_void,
) -> Code {
    let host = kernel as usize;
    let names = NAMES.lock().unwrap_or_else(|e| e.into_inner());
    let name = names.iter().find(|(address, _)| *address == host);
    let Some((_, name)) = name else {
        return said(INVALID_FUNCTION);
    };
    said(with(|card| {
        if card.runtime.modules.is_none() {
            card.runtime.modules = Some(modules(&mut card.memory)?);
        }
        let modules = card.runtime.modules.iter_mut().flatten();
        let mut found = None;
        for module in modules {
            found = found.or(module.kernel(name)?);
        }
        let kernel = found.ok_or_else(|| {
            eprintln!("emulated card: no file of the folder CARD_PTX has the kernel {name}");
            INVALID_FUNCTION
        })?;
        let most = card.runtime.shared.get(&host);
        let most = most.map_or(USUAL_SHARED, |most| *most);
        // SAFETY: the caller's promise.
        let given = unsafe { given(kernel, parameters) };
        card.launch(kernel, grid.all(), block.all(), shared, &given, most)
    }))
}

/// Takes how much shared memory a kernel's blocks may have.
#[unsafe(no_mangle)]
pub extern "C" fn cudaFuncSetAttribute(
    function: *const c_void,
    attribute: c_int,
    value: c_int,
) -> Code {
    said(with(|card| match (attribute, usize::try_from(value)) {
        (8, Ok(bytes)) if bytes <= 227 << 10 => {
            card.runtime.shared.insert(function as usize, bytes);
            Ok(())
        }
        _ => Err(INVALID_VALUE),
    }))
}

/// As the driver answers: the two number attributes alike.
///
/// # Safety
/// `value` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> Code {
    // SAFETY: the caller's promise.
    unsafe { crate::cuDeviceGetAttribute(value, attribute, device) }
}

/// Device 0.
///
/// # Safety
/// `device` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cudaGetDevice(device: *mut c_int) -> Code {
    // SAFETY: the caller's promise.
    unsafe { device.write(0) };
    SUCCESS
}

/// The last error, which is thereby forgotten.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetLastError() -> Code {
    std::mem::take(&mut LAST.lock().unwrap_or_else(|e| e.into_inner()))
}

/// The last error.
#[unsafe(no_mangle)]
pub extern "C" fn cudaPeekAtLastError() -> Code {
    *LAST.lock().unwrap_or_else(|e| e.into_inner())
}

/// An error in words.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorString(code: Code) -> *const c_char {
    words(code).as_ptr()
}
