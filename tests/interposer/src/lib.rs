//! A library to be preloaded (`LD_PRELOAD`) in front of libc: it watches what a process does
//! to the files below one folder, and makes chosen calls fail.
//!
//! * `FAULT_ROOT`: the folder. Calls on other paths pass untouched.
//! * `FAULT_TRACE`: a file that receives every change, in order: creations, writes with
//!   their bytes, truncations, syncs, renames, removals. The test replays the trace to build
//!   what a power cut at any moment would have left (see `simpatico_tests::power_cut`).
//! * `FAULT_FAIL=OP:N:ERRNO[:sticky]`: the N-th call of OP (write, sync, rename, open, read)
//!   fails with that error number, once or from then on.
//! * `FAULT_HIT`: a file that is made when the first call is failed, so that the test can
//!   tell a fault survived from a fault that never came.
//!
//! A record of the trace is `op u8, a u64, b u64, len u32, bytes`, little-endian; the op
//! numbers stand in [`op`]. Not handled, because the store does not use them: mmap, hard
//! links, io_uring. `copy_file_range` and `sendfile` report ENOSYS so that std falls back to
//! reads and writes, which are seen.

#![allow(unsafe_code)] // SAFETY: each function forwards its caller's arguments to libc's own.

use libc::{c_char, c_int, c_void, mode_t, off64_t, size_t, ssize_t};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

/// The numbers of the trace's records.
pub mod op {
    /// a = inode; bytes = path. The file came to be (or was opened for the first time).
    pub const OPEN: u8 = 1;
    /// a = inode, b = offset; bytes = data.
    pub const WRITE: u8 = 2;
    /// a = inode, b = length.
    pub const TRUNCATE: u8 = 3;
    /// a = inode. File content and size are on disk.
    pub const SYNC_FILE: u8 = 4;
    /// bytes = path of the folder. Its entries are on disk.
    pub const SYNC_DIR: u8 = 5;
    /// a = length of the old path; bytes = old path, new path.
    pub const RENAME: u8 = 6;
    /// bytes = path.
    pub const UNLINK: u8 = 7;
    /// bytes = path.
    pub const MKDIR: u8 = 8;
    /// bytes = path.
    pub const RMDIR: u8 = 9;
    /// a = inode. A sync was failed: what was dirty is clean to the kernel and not on disk.
    pub const SYNC_FAILED: u8 = 10;
}

struct State {
    root: PathBuf,
    trace: c_int,
    /// Open descriptors below the root: inode and whether it is a folder.
    open: HashMap<c_int, Descriptor>,
    fail: Option<Fail>,
}

#[derive(Clone)]
struct Descriptor {
    inode: u64,
    folder: Option<PathBuf>,
    append: bool,
}

struct Fail {
    op: String,
    left: u64,
    errno: c_int,
    sticky: bool,
    spent: bool,
}

/// `None` where `FAULT_ROOT` is not set.
fn state() -> Option<&'static Mutex<State>> {
    static STATE: OnceLock<Option<Mutex<State>>> = OnceLock::new();
    STATE
        .get_or_init(|| {
            let root = PathBuf::from(std::env::var_os("FAULT_ROOT")?);
            let trace = std::env::var_os("FAULT_TRACE").map_or(-1, |path| {
                let mut bytes = path.as_bytes().to_vec();
                bytes.push(0);
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_APPEND;
                // SAFETY: bytes ends in NUL and lives through the call.
                unsafe { real_open(bytes.as_ptr().cast(), flags, 0o644) }
            });
            let fail = std::env::var("FAULT_FAIL").ok().and_then(|text| {
                let parts: Vec<&str> = text.split(':').collect();
                Some(Fail {
                    op: parts.first()?.to_string(),
                    left: parts.get(1)?.parse().ok()?,
                    errno: parts.get(2)?.parse().ok()?,
                    sticky: parts.get(3) == Some(&"sticky"),
                    spent: false,
                })
            });
            Some(Mutex::new(State {
                root,
                trace,
                open: HashMap::new(),
                fail,
            }))
        })
        .as_ref()
}

thread_local! {
    /// Set while this library itself calls libc, so that its own calls pass untouched.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `watched` with the state locked, or `plain` where nothing is watched.
fn with_state<R>(plain: impl FnOnce() -> R, watched: impl FnOnce(&mut State) -> R) -> R {
    let inside = INSIDE.try_with(|i| i.replace(true)).unwrap_or(true);
    if inside {
        return plain();
    }
    let result = match state() {
        None => plain(),
        Some(state) => {
            let mut guard = state.lock().unwrap_or_else(|e| e.into_inner());
            watched(&mut guard)
        }
    };
    let _ = INSIDE.try_with(|i| i.set(false));
    result
}

impl State {
    fn below_root(&self, path: &Path) -> Option<PathBuf> {
        let path = if path.is_absolute() {
            path.to_path_buf()
        } else {
            std::env::current_dir().ok()?.join(path)
        };
        path.starts_with(&self.root).then_some(path)
    }

    /// Whether this call is the one to fail; sets errno if so.
    fn fails(&mut self, op: &str) -> bool {
        let Some(fail) = self.fail.as_mut().filter(|f| f.op == op) else {
            return false;
        };
        if fail.spent && !fail.sticky {
            return false;
        }
        if !fail.spent {
            fail.left = fail.left.saturating_sub(1);
            if fail.left > 0 {
                return false;
            }
            fail.spent = true;
            if let Some(path) = std::env::var_os("FAULT_HIT") {
                let mut bytes = path.as_bytes().to_vec();
                bytes.push(0);
                // SAFETY: bytes ends in NUL and lives through the call.
                unsafe { real_open(bytes.as_ptr().cast(), libc::O_CREAT | libc::O_WRONLY, 0o644) };
            }
        }
        set_errno(fail.errno);
        true
    }

    fn record(&self, op: u8, a: u64, b: u64, bytes: &[u8]) {
        if self.trace < 0 {
            return;
        }
        let mut record = Vec::with_capacity(21 + bytes.len());
        record.push(op);
        record.extend(a.to_le_bytes());
        record.extend(b.to_le_bytes());
        record.extend((bytes.len() as u32).to_le_bytes());
        record.extend(bytes);
        // SAFETY: the buffer is live and as long as said; the descriptor is ours.
        unsafe { real_write(self.trace, record.as_ptr().cast(), record.len()) };
    }
}

fn set_errno(code: c_int) {
    // SAFETY: __errno_location always points to this thread's errno.
    unsafe { *libc::__errno_location() = code };
}

/// # Safety
/// `path` must be a NUL-terminated string, as libc's own callers promise.
unsafe fn path_of<'a>(path: *const c_char) -> &'a Path {
    // SAFETY: by this function's contract.
    Path::new(OsStr::from_bytes(
        unsafe { CStr::from_ptr(path) }.to_bytes(),
    ))
}

macro_rules! real {
    ($name:ident, $symbol:literal, ($($arg:ident: $type:ty),*) -> $ret:ty) => {
        /// libc's own function of this name.
        unsafe fn $name($($arg: $type),*) -> $ret {
            static ADDRESS: OnceLock<usize> = OnceLock::new();
            let address = *ADDRESS.get_or_init(|| {
                // SAFETY: the name is a NUL-terminated literal.
                unsafe { libc::dlsym(libc::RTLD_NEXT, concat!($symbol, "\0").as_ptr().cast()) as usize }
            });
            // SAFETY: dlsym gave the address of the function with this signature.
            let function: unsafe extern "C" fn($($type),*) -> $ret = unsafe { std::mem::transmute(address) };
            // SAFETY: the caller's promises are passed on.
            unsafe { function($($arg),*) }
        }
    };
}

real!(real_open, "open64", (path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
real!(real_openat, "openat64", (dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int);
real!(real_close, "close", (fd: c_int) -> c_int);
real!(real_read, "read", (fd: c_int, buffer: *mut c_void, n: size_t) -> ssize_t);
real!(real_pread, "pread64", (fd: c_int, buffer: *mut c_void, n: size_t, at: off64_t) -> ssize_t);
real!(real_write, "write", (fd: c_int, buffer: *const c_void, n: size_t) -> ssize_t);
real!(real_pwrite, "pwrite64", (fd: c_int, buffer: *const c_void, n: size_t, at: off64_t) -> ssize_t);
real!(real_writev, "writev", (fd: c_int, parts: *const libc::iovec, n: c_int) -> ssize_t);
real!(real_fsync, "fsync", (fd: c_int) -> c_int);
real!(real_fdatasync, "fdatasync", (fd: c_int) -> c_int);
real!(real_ftruncate, "ftruncate64", (fd: c_int, length: off64_t) -> c_int);
real!(real_rename, "rename", (old: *const c_char, new: *const c_char) -> c_int);
real!(real_unlink, "unlink", (path: *const c_char) -> c_int);
real!(real_unlinkat, "unlinkat", (dir: c_int, path: *const c_char, flags: c_int) -> c_int);
real!(real_mkdir, "mkdir", (path: *const c_char, mode: mode_t) -> c_int);
real!(real_rmdir, "rmdir", (path: *const c_char) -> c_int);
real!(real_fcntl, "fcntl64", (fd: c_int, command: c_int, arg: usize) -> c_int);

fn stat_of(fd: c_int) -> Option<libc::stat64> {
    let mut stat = std::mem::MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: the buffer has room for one stat64, which fstat64 fills on success.
    unsafe { (libc::fstat64(fd, stat.as_mut_ptr()) == 0).then(|| stat.assume_init()) }
}

fn offset_of(fd: c_int) -> u64 {
    // SAFETY: lseek by 0 from the current place changes nothing.
    unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) }.max(0) as u64
}

/// Notes a fresh descriptor below the root.
fn opened(state: &mut State, fd: c_int, path: PathBuf, flags: c_int, existed: bool) {
    let Some(stat) = stat_of(fd) else { return };
    let folder = (stat.st_mode & libc::S_IFMT == libc::S_IFDIR).then(|| path.clone());
    if folder.is_none() {
        if !existed {
            state.record(op::OPEN, stat.st_ino, 0, path.as_os_str().as_bytes());
        } else if flags & libc::O_TRUNC != 0 {
            state.record(op::TRUNCATE, stat.st_ino, 0, &[]);
        }
    }
    let append = flags & libc::O_APPEND != 0;
    state.open.insert(
        fd,
        Descriptor {
            inode: stat.st_ino,
            folder,
            append,
        },
    );
}

fn watched_open(path: &Path, flags: c_int, call: impl Fn() -> c_int) -> c_int {
    with_state(&call, |state| {
        let Some(path) = state.below_root(path) else {
            return call();
        };
        if state.fails("open") {
            return -1;
        }
        let existed = path.symlink_metadata().is_ok();
        let fd = call();
        if fd >= 0 {
            opened(state, fd, path, flags, existed);
        }
        fd
    })
}

/// # Safety
/// As libc's `open64`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: by this function's contract.
    watched_open(unsafe { path_of(path) }, flags, || unsafe {
        real_open(path, flags, mode)
    })
}

/// # Safety
/// As libc's `open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: by this function's contract.
    unsafe { open64(path, flags, mode) }
}

/// # Safety
/// As libc's `openat64`. Only the current folder and absolute paths are watched, and the
/// folders that `remove_dir_all` walks, which never writes through them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: by this function's contract.
    let name = unsafe { path_of(path) };
    // SAFETY: the caller's promises are passed on.
    let call = || unsafe { real_openat(dir, path, flags, mode) };
    match absolute(dir, name) {
        Some(full) => watched_open(&full, flags, call),
        None => call(),
    }
}

/// # Safety
/// As libc's `openat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: by this function's contract.
    unsafe { openat64(dir, path, flags, mode) }
}

/// The full path of a name relative to a folder's descriptor.
fn absolute(dir: c_int, name: &Path) -> Option<PathBuf> {
    if name.is_absolute() || dir == libc::AT_FDCWD {
        return Some(name.to_path_buf());
    }
    with_state(
        || None,
        |state| Some(state.open.get(&dir)?.folder.as_ref()?.join(name)),
    )
}

/// # Safety
/// As libc's `close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    with_state(
        // SAFETY: the caller's promises are passed on.
        || unsafe { real_close(fd) },
        |state| {
            state.open.remove(&fd);
            // SAFETY: the caller's promises are passed on.
            unsafe { real_close(fd) }
        },
    )
}

/// # Safety
/// As libc's `fcntl64`, whose third argument is an int or a pointer: a word either way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int {
    // SAFETY: the caller's promises are passed on.
    let result = unsafe { real_fcntl(fd, command, arg) };
    if (command == libc::F_DUPFD || command == libc::F_DUPFD_CLOEXEC) && result >= 0 {
        with_state(
            || (),
            |state| {
                if let Some(descriptor) = state.open.get(&fd).cloned() {
                    state.open.insert(result, descriptor);
                }
            },
        );
    }
    result
}

/// # Safety
/// As libc's `fcntl`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, arg: usize) -> c_int {
    // SAFETY: by this function's contract.
    unsafe { fcntl64(fd, command, arg) }
}

fn watched_read(fd: c_int, call: impl Fn() -> ssize_t) -> ssize_t {
    with_state(&call, |state| {
        if state.open.contains_key(&fd) && state.fails("read") {
            return -1;
        }
        call()
    })
}

/// # Safety
/// As libc's `read`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buffer: *mut c_void, n: size_t) -> ssize_t {
    // SAFETY: the caller's promises are passed on.
    watched_read(fd, || unsafe { real_read(fd, buffer, n) })
}

/// # Safety
/// As libc's `pread64`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(
    fd: c_int,
    buffer: *mut c_void,
    n: size_t,
    at: off64_t,
) -> ssize_t {
    // SAFETY: the caller's promises are passed on.
    watched_read(fd, || unsafe { real_pread(fd, buffer, n, at) })
}

/// A write at an offset (`None`: where the descriptor stands), recorded as far as it went.
fn watched_write(fd: c_int, at: Option<u64>, bytes: &[u8], call: impl Fn() -> ssize_t) -> ssize_t {
    with_state(&call, |state| {
        let Some(descriptor) = state.open.get(&fd).cloned() else {
            return call();
        };
        if state.fails("write") {
            return -1;
        }
        let end = || stat_of(fd).map_or(0, |s| s.st_size as u64);
        let offset = at.unwrap_or_else(|| {
            if descriptor.append {
                end()
            } else {
                offset_of(fd)
            }
        });
        let written = call();
        if written > 0 {
            state.record(
                op::WRITE,
                descriptor.inode,
                offset,
                &bytes[..written as usize],
            );
        }
        written
    })
}

/// # Safety
/// As libc's `write`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buffer: *const c_void, n: size_t) -> ssize_t {
    if buffer.is_null() || n == 0 {
        // SAFETY: the caller's promises are passed on.
        return unsafe { real_write(fd, buffer, n) };
    }
    // SAFETY: the caller promises n readable bytes at buffer.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.cast(), n) };
    // SAFETY: the caller's promises are passed on.
    watched_write(fd, None, bytes, || unsafe { real_write(fd, buffer, n) })
}

/// # Safety
/// As libc's `pwrite64`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: c_int,
    buffer: *const c_void,
    n: size_t,
    at: off64_t,
) -> ssize_t {
    if buffer.is_null() || n == 0 {
        // SAFETY: the caller's promises are passed on.
        return unsafe { real_pwrite(fd, buffer, n, at) };
    }
    // SAFETY: the caller promises n readable bytes at buffer.
    let bytes = unsafe { std::slice::from_raw_parts(buffer.cast(), n) };
    // SAFETY: the caller's promises are passed on.
    watched_write(fd, Some(at.max(0) as u64), bytes, || unsafe {
        real_pwrite(fd, buffer, n, at)
    })
}

/// # Safety
/// As libc's `pwrite`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(
    fd: c_int,
    buffer: *const c_void,
    n: size_t,
    at: off64_t,
) -> ssize_t {
    // SAFETY: by this function's contract.
    unsafe { pwrite64(fd, buffer, n, at) }
}

/// # Safety
/// As libc's `writev`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const libc::iovec, n: c_int) -> ssize_t {
    let mut bytes = Vec::new();
    if !parts.is_null() && n > 0 {
        // SAFETY: the caller promises n parts, each with its length of readable bytes.
        for part in unsafe { std::slice::from_raw_parts(parts, n as usize) } {
            if part.iov_len > 0 {
                // SAFETY: as above.
                bytes.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len)
                });
            }
        }
    }
    // SAFETY: the caller's promises are passed on.
    watched_write(fd, None, &bytes, || unsafe { real_writev(fd, parts, n) })
}

/// # Safety
/// As libc's `copy_file_range`; always says that the kernel has no such call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    _: c_int,
    _: *mut off64_t,
    _: c_int,
    _: *mut off64_t,
    _: size_t,
    _: libc::c_uint,
) -> ssize_t {
    set_errno(libc::ENOSYS);
    -1
}

/// # Safety
/// As libc's `sendfile64`; always says that the kernel has no such call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile64(_: c_int, _: c_int, _: *mut off64_t, _: size_t) -> ssize_t {
    set_errno(libc::ENOSYS);
    -1
}

fn watched_sync(fd: c_int, call: impl Fn() -> c_int) -> c_int {
    with_state(&call, |state| {
        let Some(descriptor) = state.open.get(&fd).cloned() else {
            return call();
        };
        if state.fails("sync") {
            if descriptor.folder.is_none() {
                state.record(op::SYNC_FAILED, descriptor.inode, 0, &[]);
            }
            return -1;
        }
        // The trace decides what survives, so the real sync would only cost time.
        let result = if state.trace >= 0 { 0 } else { call() };
        if result == 0 {
            match &descriptor.folder {
                Some(path) => state.record(op::SYNC_DIR, 0, 0, path.as_os_str().as_bytes()),
                None => state.record(op::SYNC_FILE, descriptor.inode, 0, &[]),
            }
        }
        result
    })
}

/// # Safety
/// As libc's `fsync`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are passed on.
    watched_sync(fd, || unsafe { real_fsync(fd) })
}

/// # Safety
/// As libc's `fdatasync`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are passed on.
    watched_sync(fd, || unsafe { real_fdatasync(fd) })
}

/// # Safety
/// As libc's `ftruncate64`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off64_t) -> c_int {
    // SAFETY: the caller's promises are passed on.
    let call = || unsafe { real_ftruncate(fd, length) };
    with_state(call, |state| {
        let Some(descriptor) = state.open.get(&fd).cloned() else {
            return call();
        };
        if state.fails("write") {
            return -1;
        }
        let result = call();
        if result == 0 {
            state.record(op::TRUNCATE, descriptor.inode, length.max(0) as u64, &[]);
        }
        result
    })
}

/// # Safety
/// As libc's `ftruncate`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off64_t) -> c_int {
    // SAFETY: by this function's contract.
    unsafe { ftruncate64(fd, length) }
}

/// # Safety
/// As libc's `rename`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(old: *const c_char, new: *const c_char) -> c_int {
    // SAFETY: by this function's contract.
    let (from, to) = unsafe { (path_of(old), path_of(new)) };
    // SAFETY: the caller's promises are passed on.
    let call = || unsafe { real_rename(old, new) };
    with_state(call, |state| {
        let (Some(from), Some(to)) = (state.below_root(from), state.below_root(to)) else {
            return call();
        };
        if state.fails("rename") {
            return -1;
        }
        let result = call();
        if result == 0 {
            let (from, to) = (from.as_os_str().as_bytes(), to.as_os_str().as_bytes());
            state.record(op::RENAME, from.len() as u64, 0, &[from, to].concat());
        }
        result
    })
}

fn watched_path(path: Option<PathBuf>, number: u8, call: impl Fn() -> c_int) -> c_int {
    with_state(&call, |state| {
        let Some(path) = path.as_deref().and_then(|p| state.below_root(p)) else {
            return call();
        };
        if state.fails("rename") {
            return -1;
        }
        let result = call();
        if result == 0 {
            state.record(number, 0, 0, path.as_os_str().as_bytes());
        }
        result
    })
}

/// # Safety
/// As libc's `unlink`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: by this function's contract.
    let name = unsafe { path_of(path) }.to_path_buf();
    // SAFETY: the caller's promises are passed on.
    watched_path(Some(name), op::UNLINK, || unsafe { real_unlink(path) })
}

/// # Safety
/// As libc's `unlinkat`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: by this function's contract.
    let full = absolute(dir, unsafe { path_of(path) });
    let number = if flags & libc::AT_REMOVEDIR != 0 {
        op::RMDIR
    } else {
        op::UNLINK
    };
    // SAFETY: the caller's promises are passed on.
    watched_path(full, number, || unsafe { real_unlinkat(dir, path, flags) })
}

/// # Safety
/// As libc's `mkdir`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: by this function's contract.
    let name = unsafe { path_of(path) }.to_path_buf();
    // SAFETY: the caller's promises are passed on.
    watched_path(Some(name), op::MKDIR, || unsafe { real_mkdir(path, mode) })
}

/// # Safety
/// As libc's `rmdir`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    // SAFETY: by this function's contract.
    let name = unsafe { path_of(path) }.to_path_buf();
    // SAFETY: the caller's promises are passed on.
    watched_path(Some(name), op::RMDIR, || unsafe { real_rmdir(path) })
}
