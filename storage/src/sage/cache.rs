//! The cache of user embeddings, shared by a writer and all its snapshots.
//!
//! It maps a user to the embedding last computed and the version it was computed at; whether
//! that is still right is for [`super::Sage`] to decide. A slot serves one user at a time
//! (user number modulo slots), so the cache is bounded and losing an entry only costs time.

use super::UserId;
use crate::sync::atomic::AtomicU64;
use crate::sync::{Mutex, lock};
use std::sync::{Arc, OnceLock};

const CHUNK: usize = 1024;
const SLOTS_MAX: usize = 1 << 24;

/// An embedding and the version of the graph it was computed at.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) user: UserId,
    pub(super) version: u64,
    pub(super) vector: Arc<[f32]>,
}

type Slot = Mutex<Option<Entry>>;

pub(super) struct Cache {
    /// The version of the newest writer. A clone that changes when it is not the newest
    /// takes a cache of its own, so that versions here never fork.
    pub(super) newest: AtomicU64,
    slots: usize,
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
}

impl Cache {
    /// A cache of at most about `bytes`, for embeddings of `out` numbers.
    pub(super) fn new(bytes: usize, out: usize, newest: u64) -> Self {
        let one = out * 4 + 16 + size_of::<Slot>();
        let slots = (bytes / one).min(SLOTS_MAX);
        Self {
            newest: AtomicU64::new(newest),
            slots,
            chunks: (0..slots.div_ceil(CHUNK))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    pub(super) fn get(&self, user: UserId) -> Option<Entry> {
        let slot = (user.0 as usize).checked_rem(self.slots)?;
        let chunk = self.chunks[slot / CHUNK].get()?;
        let entry = lock(&chunk[slot % CHUNK]);
        entry.as_ref().filter(|entry| entry.user == user).cloned()
    }

    /// Keeps the entry, unless the same user's is there at a later version.
    pub(super) fn put(&self, entry: Entry) {
        let Some(slot) = (entry.user.0 as usize).checked_rem(self.slots) else {
            return;
        };
        let chunk = self.chunks[slot / CHUNK]
            .get_or_init(|| (0..CHUNK).map(|_| Mutex::new(None)).collect());
        let mut slot = lock(&chunk[slot % CHUNK]);
        let newer = |old: &Entry| old.user == entry.user && old.version > entry.version;
        if !slot.as_ref().is_some_and(newer) {
            *slot = Some(entry);
        }
    }
}
