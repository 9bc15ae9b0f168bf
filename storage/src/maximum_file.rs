//! What is known of the greatest overlap, kept beside the log: `STORE/maximum`.
//!
//! It saves the next open from bounding all pairs of users anew. It is never trusted further
//! than this: its bytes have the right BLAKE3; the log, when it is replayed, comes to the very
//! chain digest the file was made at; and the two users it names have the overlap it says.
//! Else it is passed over, and the maximum is found again from nothing.

use crate::graph::maximum::Kept;
use crate::log::{Cursor, put_varint, u32_at, u64_at};
use crate::mark::Mark;
use crate::state::State;
use crate::store::{Shared, lock, write_whole};
use simpatico_schema::OverlapMode;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"SIMPMAXI";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const MODES: [OverlapMode; 2] = [OverlapMode::Shared, OverlapMode::Agreeing];

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MaximumFile {
    /// The last operation the bounds include.
    pub seq: u64,
    /// The log's chain digest there.
    pub digest: u64,
    kept: [Option<Kept>; 2],
}

fn file_path(store: &Path) -> PathBuf {
    store.join("maximum")
}

impl MaximumFile {
    /// What a state knows; `None` if nothing.
    pub(crate) fn of(state: &State, at: &Mark) -> Option<Self> {
        let kept = MODES.map(|mode| state.graph.kept_maximum(mode));
        kept.iter().any(Option::is_some).then_some(Self {
            seq: at.seq,
            digest: at.digest,
            kept,
        })
    }

    /// Whether the log is at the moment this is of.
    pub(crate) fn is_at(&self, seq: u64, digest: u64) -> bool {
        (self.seq, self.digest) == (seq, digest)
    }

    /// Gives a state of this moment what is known.
    pub(crate) fn restore(self, state: &State) {
        for (mode, kept) in MODES.into_iter().zip(self.kept) {
            if let Some(kept) = kept {
                state.graph.restore_maximum(mode, kept);
            }
        }
    }

    /// The same with other user numbers; a user without a new number is gone.
    pub(crate) fn renumbered(mut self, number: impl Fn(u32) -> Option<u32>, users: u32) -> Self {
        for kept in self.kept.iter_mut().flatten() {
            let mut bounds = vec![0; users as usize];
            for (old, bound) in (0u32..).zip(&kept.bounds) {
                if let Some(place) = number(old).and_then(|new| bounds.get_mut(new as usize)) {
                    *place = *bound;
                }
            }
            kept.bounds = bounds;
            match (number(kept.pair.0), number(kept.pair.1)) {
                (Some(a), Some(b)) => kept.pair = (a, b),
                _ => (kept.pair, kept.max) = ((0, 0), 0),
            }
        }
        self
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.seq.to_le_bytes());
        out.extend(self.digest.to_le_bytes());
        for kept in &self.kept {
            let Some(kept) = kept else {
                out.push(0);
                continue;
            };
            out.push(1);
            let (a, b) = kept.pair;
            for number in [kept.max, a, b, kept.bounds.len() as u32] {
                put_varint(&mut out, u64::from(number));
            }
            for bound in &kept.bounds {
                put_varint(&mut out, u64::from(*bound));
            }
        }
        let digest = *blake3::hash(&out).as_bytes();
        out.extend(digest);
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, digest) = bytes.split_last_chunk::<32>()?;
        let whole = blake3::hash(body).as_bytes() == digest;
        if !whole || body.len() < HEADER || !body.starts_with(MAGIC) || u32_at(body, 8) != VERSION {
            return None;
        }
        let mut cursor = Cursor::new(&body[HEADER..]);
        let mut kept = [None, None];
        for place in &mut kept {
            *place = read_kept(&mut cursor).ok()?;
        }
        Some(Self {
            seq: u64_at(body, 16),
            digest: u64_at(body, 24),
            kept,
        })
    }

    /// The file of a store, if it is there and whole.
    pub(crate) fn read(store: &Path) -> Option<Self> {
        Self::from_bytes(&std::fs::read(file_path(store)).ok()?)
    }
}

fn read_kept(cursor: &mut Cursor<'_>) -> Result<Option<Kept>, String> {
    if cursor.byte()? == 0 {
        return Ok(None);
    }
    let mut number =
        || -> Result<u32, String> { u32::try_from(cursor.varint()?).map_err(|e| e.to_string()) };
    let (max, a, b, users) = (number()?, number()?, number()?, number()?);
    // Grown as bytes are there, not as the file says.
    let bounds = (0..users).map(|_| number()).collect::<Result<_, _>>()?;
    let pair = (a, b);
    Ok(Some(Kept { max, pair, bounds }))
}

impl Shared {
    /// Keeps what a state knows of the maximum, unless that is on disk already. It can be found
    /// again, so that a failure hurts nobody.
    pub(crate) fn save_maximum(&self, state: &State, at: &Mark) {
        let mut saved = lock(&self.maximum_saved);
        if *saved == Some(at.digest) {
            return;
        }
        if let Some(file) = MaximumFile::of(state, at)
            && write_whole(&file_path(&self.path), &file.to_bytes()).is_ok()
        {
            *saved = Some(at.digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> MaximumFile {
        let kept = |max, pair, bounds: &[u32]| {
            let bounds = bounds.to_vec();
            Some(Kept { max, pair, bounds })
        };
        MaximumFile {
            seq: 7,
            digest: 1 << 63 | 5,
            kept: [kept(3, (0, 2), &[3, 0, 4]), None],
        }
    }

    #[test]
    fn a_file_comes_back_as_it_was_and_a_changed_one_does_not() {
        let mut both = file();
        both.kept[1] = both.kept[0].clone();
        for file in [file(), both] {
            let bytes = file.to_bytes();
            assert_eq!(MaximumFile::from_bytes(&bytes), Some(file));
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(MaximumFile::from_bytes(&flipped), None, "bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_under_a_right_digest_is_still_looked_at() {
        let bytes = file().to_bytes();
        let body = &bytes[..bytes.len() - 32];
        let with = |body: &[u8]| {
            let digest = *blake3::hash(body).as_bytes();
            MaximumFile::from_bytes(&[body, &digest[..]].concat())
        };
        assert_eq!(with(body), Some(file()));
        for cut in 0..body.len() {
            assert_eq!(with(&body[..cut]), None, "cut at {cut}");
        }
        for at in [0, 8] {
            let mut other = body.to_vec();
            other[at] ^= 2;
            assert_eq!(with(&other), None, "byte {at}");
        }
        assert!(file().is_at(7, 1 << 63 | 5));
        assert!(!file().is_at(7, 5) && !file().is_at(6, 1 << 63 | 5));
    }

    #[test]
    fn other_numbers_carry_the_bounds_along_and_who_is_gone_takes_the_pair_along() {
        let swapped = file().renumbered(|old| Some(2 - old), 3);
        let kept = swapped.kept[0].clone().unwrap();
        assert_eq!((kept.max, kept.pair), (3, (2, 0)));
        assert_eq!(kept.bounds, [4, 0, 3]);
        for gone in [0, 2] {
            let without = file().renumbered(|old| (old != gone).then_some(old), 4);
            let kept = without.kept[0].clone().unwrap();
            assert_eq!((kept.max, kept.pair), (0, (0, 0)));
            assert_eq!(kept.bounds.len(), 4);
            assert_eq!(kept.bounds[gone as usize], 0);
        }
    }

    #[test]
    fn a_store_s_file_is_read_where_it_is_there_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(MaximumFile::read(folder.path()), None);
        std::fs::write(file_path(folder.path()), file().to_bytes()).unwrap();
        assert_eq!(MaximumFile::read(folder.path()), Some(file()));
    }
}
