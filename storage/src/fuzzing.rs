//! The readers of foreign bytes over bytes in memory, for tests/fuzz: the same code as a store
//! runs, without its files, threads and locks, and so a thousand times as often.

use crate::sled_mirror;
use crate::snapshot::Snapshot;
use crate::state::Replay;
use crate::{Result, compact, log};
use std::path::Path;

/// The state that a log of this one segment leads to, and whether the segment is whole.
pub fn log_segment(bytes: &[u8]) -> Result<(Snapshot, bool)> {
    let mut replay = Replay::default();
    let whole = log::replay_bytes(bytes, |frame| replay.apply_frame(frame))?;
    let state = replay.finish();
    Ok((Snapshot { state }, whole))
}

/// What a snapshot file holds.
pub fn snapshot_file(bytes: &[u8]) -> Result<Snapshot> {
    let state = compact::state_of(bytes)?;
    Ok(Snapshot { state })
}

/// sled's rows of a closed store. Opening them breaks the store's seal.
pub struct Rows(sled_mirror::Rows);

impl Rows {
    /// Opens a closed store's rows.
    pub fn open(store: &Path) -> Result<Self> {
        sled_mirror::Rows::open(store).map(Self)
    }

    /// The value of a row of a tree, both counted round.
    pub fn value(&self, tree: usize, row: usize) -> Option<Vec<u8>> {
        Some(self.0.get(tree, row)?.1.to_vec())
    }

    /// What the rows say with another value in one of them: tree and row are counted round.
    pub fn with(&self, tree: usize, row: usize, value: &[u8]) -> Result<Snapshot, String> {
        let state = self.0.with(tree, row, value)?;
        Ok(Snapshot { state })
    }
}
