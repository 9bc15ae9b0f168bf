//! Locks, atomics, a bounded channel and threads for what runs concurrently: the standard
//! library's. With the feature `schedules` they are shuttle's, which runs one test under
//! thousands of schedules (tests/schedules.rs) and sees every deadlock.
//!
//! Not here: locks that are only held within one call that waits for nothing (the graph's
//! caches, threads that share out one question). No schedule comes between.

#[cfg(feature = "schedules")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, TryLockError, atomic, mpsc},
    thread,
};
#[cfg(not(feature = "schedules"))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, TryLockError, atomic, mpsc},
    thread,
};

use std::sync::PoisonError;
use std::time::Duration;

/// A lock whose data is right even if a thread died holding it: every change under these
/// locks is complete before anything that could panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lock, if nobody holds it.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Lets the lock go until the bell is rung.
pub(crate) fn wait<'a, T>(bell: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    bell.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Lets the lock go until the bell is rung, or for so long.
#[cfg(not(feature = "schedules"))]
pub(crate) fn wait_at_most<'a, T>(
    bell: &Condvar,
    _: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> MutexGuard<'a, T> {
    match bell.wait_timeout(guard, limit) {
        Ok((guard, _)) => guard,
        Err(e) => e.into_inner().0,
    }
}

/// Lets the lock go for a while: shuttle has no clock, so every wait with a limit runs out.
#[cfg(feature = "schedules")]
pub(crate) fn wait_at_most<'a, T>(
    _: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    _: Duration,
) -> MutexGuard<'a, T> {
    drop(guard);
    thread::yield_now();
    lock(mutex)
}
