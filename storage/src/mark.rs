//! The high-water mark: up to where the log is known to be on disk.
//!
//! A log alone cannot tell a torn tail (bytes that nobody was promised) from a damaged end
//! (bytes somebody was). The mark says which: it holds the last sequence number whose sync
//! succeeded and the chain digest there. It is written after every group without a sync of
//! its own, into two slots in turn, so that one slot is whole at any moment; a clean close
//! writes both and syncs. The mark also names the log's generation: replacing the mark is
//! the one step that makes a compaction valid (see FORMAT.md).

use crate::error::{Result, StoreError};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"SIMPMARK";
const SLOT_BYTES: usize = 64;
/// The slots lie in different pages, so that one torn page leaves the other slot whole.
const SLOT_OFFSETS: [u64; 2] = [0, 4096];
const FILE_BYTES: u64 = 8192;
/// The version of the mark's format.
pub(crate) const MARK_VERSION: u32 = 1;

/// What a slot says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Which log is the valid one.
    pub generation: u64,
    /// Random number of the store, the same in its log.
    pub store_id: u64,
    /// The last sequence number that is on disk.
    pub seq: u64,
    /// The chain digest after the frame that ends with `seq`.
    pub digest: u64,
    /// Counts frames, for marks of equal `seq` (frames without sequence numbers of their own).
    pub frames: u64,
}

/// The open mark file.
pub(crate) struct MarkFile {
    file: File,
    path: PathBuf,
    next_slot: usize,
}

fn encode(mark: &Mark) -> [u8; SLOT_BYTES] {
    let mut slot = [0u8; SLOT_BYTES];
    slot[..8].copy_from_slice(MAGIC);
    slot[8..12].copy_from_slice(&MARK_VERSION.to_le_bytes());
    for (place, value) in [
        mark.generation,
        mark.store_id,
        mark.seq,
        mark.digest,
        mark.frames,
    ]
    .into_iter()
    .enumerate()
    {
        slot[16 + place * 8..24 + place * 8].copy_from_slice(&value.to_le_bytes());
    }
    let crc = crc32c::crc32c(&slot[..60]);
    slot[60..].copy_from_slice(&crc.to_le_bytes());
    slot
}

fn decode(slot: &[u8], path: &Path) -> Result<Option<Mark>> {
    let (Some(body), Some(crc)) = (slot.get(..60), slot.get(60..64)) else {
        return Ok(None);
    };
    if crc != crc32c::crc32c(body).to_le_bytes() || &body[..8] != MAGIC {
        return Ok(None);
    }
    let version = crate::log::u32_at(body, 8);
    if version != MARK_VERSION {
        return Err(StoreError::Version {
            path: path.into(),
            format: "high-water mark",
            expected: MARK_VERSION,
            got: version,
        });
    }
    let word = |place: usize| crate::log::u64_at(body, 16 + place * 8);
    Ok(Some(Mark {
        generation: word(0),
        store_id: word(1),
        seq: word(2),
        digest: word(3),
        frames: word(4),
    }))
}

/// Reads the newest whole slot. `None`: the file is missing, or both slots are damaged.
pub(crate) fn read(path: &Path) -> Result<Option<Mark>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StoreError::io("open", path)(e)),
        Ok(file) => file
            .take(FILE_BYTES)
            .read_to_end(&mut bytes)
            .map_err(StoreError::io("read", path))?,
    };
    let mut newest: Option<Mark> = None;
    for offset in SLOT_OFFSETS {
        let slot = bytes.get(offset as usize..).unwrap_or_default();
        if let Some(mark) = decode(slot, path)?
            && newest.is_none_or(|n| {
                (mark.generation, mark.seq, mark.frames) > (n.generation, n.seq, n.frames)
            })
        {
            newest = Some(mark);
        }
    }
    Ok(newest)
}

impl MarkFile {
    /// Puts a new mark file in place of whatever was there: beside it first, synced, then
    /// renamed over it, and the directory synced. This is the commit of a compaction.
    pub(crate) fn replace(path: &Path, mark: &Mark) -> Result<Self> {
        let fresh = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&fresh)
            .map_err(StoreError::io("create", &fresh))?;
        file.set_len(FILE_BYTES)
            .map_err(StoreError::io("write", &fresh))?;
        let mut this = Self {
            file,
            path: fresh.clone(),
            next_slot: 0,
        };
        this.write(mark)?;
        this.write(mark)?;
        this.sync()?;
        std::fs::rename(&fresh, path).map_err(StoreError::io("rename", &fresh))?;
        this.path = path.into();
        crate::log::sync_parent(path)?;
        Ok(this)
    }

    /// Writes the slot that is due. Not synced: the log is, and the mark may be behind.
    pub(crate) fn write(&mut self, mark: &Mark) -> Result<()> {
        self.file
            .write_all_at(&encode(mark), SLOT_OFFSETS[self.next_slot])
            .map_err(StoreError::io("write", &self.path))?;
        self.next_slot = 1 - self.next_slot;
        Ok(())
    }

    /// Brings what was written to disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(StoreError::io("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_slot_counts_and_another_version_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mark");
        let mark = |generation, seq, frames| Mark {
            generation,
            store_id: 9,
            seq,
            digest: 3,
            frames,
        };
        // By generation, then sequence number, then frames; whichever slot it is in.
        let rising = [mark(1, 9, 9), mark(2, 1, 9), mark(2, 5, 1), mark(2, 5, 2)];
        for pair in rising.windows(2) {
            for (first, second) in [(pair[0], pair[1]), (pair[1], pair[0])] {
                let mut file = MarkFile::replace(&path, &first).unwrap();
                file.write(&second).unwrap();
                file.sync().unwrap();
                assert_eq!(read(&path).unwrap(), Some(pair[1]));
                assert_eq!(std::fs::metadata(&path).unwrap().len(), FILE_BYTES);
            }
        }
        let mut bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..8], b"SIMPMARK");
        bytes[8] = 2;
        let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
        bytes[60..64].copy_from_slice(&crc);
        std::fs::write(&path, &bytes).unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(
            error,
            StoreError::Version {
                expected: 1,
                got: 2,
                ..
            }
        ));
        // Other bytes with a right checksum are no mark.
        bytes[0] = b'X';
        let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
        bytes[60..64].copy_from_slice(&crc);
        std::fs::write(&path, &bytes[..64]).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }

    #[test]
    fn any_flipped_bit_leaves_the_other_slot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mark");
        let old = Mark {
            generation: 1,
            store_id: 9,
            seq: 7,
            digest: 3,
            frames: 2,
        };
        let new = Mark {
            seq: 8,
            frames: 3,
            ..old
        };
        let mut file = MarkFile::replace(&path, &old).unwrap();
        file.write(&new).unwrap();
        assert_eq!(read(&path).unwrap(), Some(new));
        let bytes = std::fs::read(&path).unwrap();
        for bit in 0..SLOT_BYTES * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            // The version is under the checksum too, so no flip can pass as another version.
            assert_eq!(read(&path).unwrap(), Some(old), "bit {bit}");
        }
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(read(&path).unwrap(), None);
        // A file that is missing is no mark, one that cannot be looked for an error.
        assert!(matches!(
            read(&path.join("mark")),
            Err(StoreError::Io { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path).unwrap(), None);
    }
}
