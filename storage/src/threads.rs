//! Work shared out among threads.

use std::sync::{Mutex, PoisonError};

/// As many as this process has cores.
pub(crate) fn count() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does the work on this thread and `threads` - 1 others, each of which takes what it works on
/// from a queue ([`next`]).
pub(crate) fn run(threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(&work);
        }
        work();
    });
}

/// The next of what is left.
pub(crate) fn next<I: Iterator>(queue: &Mutex<I>) -> Option<I::Item> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).next()
}
