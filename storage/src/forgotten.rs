//! The numbers of forgotten users, beside the log: `STORE/forgotten`.
//!
//! The log says who is forgotten, and no open needs this file. A repair does: behind a gap in a
//! damaged log it cannot know whether the lost frames held a forgetting, and without this file
//! it would bring back somebody who is to stay gone. So a number is written and synced here
//! before the log says so. No names; a compaction, which gives new numbers, starts it anew.

use crate::error::{Result, StoreError};
use crate::graph::UserId;
use crate::log::{sync_parent, u32_at, u64_at};
use crate::state::State;
use crate::store::write_whole;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"SIMPFORG";
const VERSION: u32 = 1;
/// Magic, version, four zero bytes, generation.
const HEADER: usize = 24;
/// Generation u64, user u32, CRC-32C of those.
const ROW: usize = 16;

fn file_path(store: &Path) -> PathBuf {
    store.join("forgotten")
}

fn row(generation: u64, user: u32) -> [u8; ROW] {
    let mut row = [0; ROW];
    row[..8].copy_from_slice(&generation.to_le_bytes());
    row[8..12].copy_from_slice(&user.to_le_bytes());
    let crc = crc32c::crc32c(&row[..12]);
    row[12..].copy_from_slice(&crc.to_le_bytes());
    row
}

/// Everyone forgotten in this generation of the log, by number; `None` where the file cannot
/// say: it is missing, of another generation, or damaged.
pub(crate) fn read(store: &Path, generation: u64) -> Option<BTreeSet<u32>> {
    let bytes = std::fs::read(file_path(store)).ok()?;
    let (header, rows) = bytes.split_at_checked(HEADER)?;
    let right = header.starts_with(MAGIC) && u32_at(header, 8) == VERSION;
    if !right || u64_at(header, 16) != generation {
        return None;
    }
    // A piece of a row at the end is of a forgetting that nobody was promised.
    let number = |bytes: &[u8]| {
        let user = u32_at(bytes, 8);
        (bytes == row(generation, user)).then_some(user)
    };
    rows.chunks_exact(ROW).map(number).collect()
}

/// Starts the file of a generation with everyone who is forgotten in a state of it. A failure
/// leaves none, and a repair then goes no further than the first damage.
pub(crate) fn start(store: &Path, generation: u64, state: &State) {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(generation.to_le_bytes());
    let gone = (0..state.graph.user_id_end())
        .filter(|user| state.graph.user_name(UserId(*user)).is_empty());
    bytes.extend(gone.flat_map(|user| row(generation, user)));
    let path = file_path(store);
    if write_whole(&path, &bytes).is_err() {
        let _ = std::fs::remove_file(&path);
    }
}

/// Sees that the file is there and says no less than a state that was read from the log.
pub(crate) fn ensure(store: &Path, generation: u64, state: &State) {
    let gone = state.graph.user_id_end() as usize - state.graph.user_count();
    if read(store, generation).is_none_or(|known| known.len() < gone) {
        start(store, generation, state);
    }
}

/// Adds a user, on disk when this returns; nothing where there is no file.
pub(crate) fn add(store: &Path, generation: u64, user: u32) -> Result<()> {
    let path = file_path(store);
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(StoreError::io("open", &path))?,
    };
    let length = file
        .metadata()
        .map_err(StoreError::io("read", &path))?
        .len();
    let rows = length.saturating_sub(HEADER as u64) / ROW as u64;
    file.write_all_at(&row(generation, user), HEADER as u64 + rows * ROW as u64)
        .map_err(StoreError::io("write", &path))?;
    file.sync_data().map_err(StoreError::io("sync", &path))?;
    sync_parent(&path)
}
