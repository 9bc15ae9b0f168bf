//! Many short byte strings in few allocations, persistent: sixteen to an allocation.
//!
//! One string per user costs an allocation's overhead per user and, after a snapshot, a
//! reference count per user copied. Sixteen side by side cost a memory move of a few
//! kilobytes at most when one of them grows, and are copied in one piece.

use super::kernel::prefetch;
use super::tree::Tree;

/// Strings in one allocation.
const STRINGS: usize = 16;
/// The most bytes that a pack keeps to spare.
const SPARE_MAX: usize = 512;

/// Byte strings by number; those never written are empty.
#[derive(Clone, Debug, Default)]
pub(crate) struct Packs {
    tree: Tree<Pack, 1>,
}

#[derive(Debug, Default)]
struct Pack {
    ends: [u32; STRINGS],
    bytes: Vec<u8>,
}

impl Clone for Pack {
    fn clone(&self) -> Self {
        // Room to grow as well: whoever copies a pack does so to write into it.
        let mut bytes = Vec::with_capacity(self.bytes.capacity());
        bytes.extend_from_slice(&self.bytes);
        Self {
            ends: self.ends,
            bytes,
        }
    }
}

impl Packs {
    /// String number `index`.
    pub fn get(&self, index: usize) -> &[u8] {
        match self.tree.get(index / STRINGS) {
            Some(pack) => pack.get(index % STRINGS),
            None => &[],
        }
    }

    /// Fetches what leads to string number `index`, for a read that comes later.
    pub fn fetch_pack(&self, index: usize) {
        if let Some(pack) = self.tree.get(index / STRINGS) {
            prefetch(pack);
            prefetch(&pack.bytes);
        }
    }

    /// Fetches string number `index`, best after [`Self::fetch_pack`].
    pub fn fetch_string(&self, index: usize) {
        let string = self.get(index);
        for line in string.chunks(64).take(6) {
            prefetch(line.as_ptr());
        }
    }

    /// Replaces the bytes `from..to` of string number `index` by `with`.
    pub fn splice(&mut self, index: usize, (from, to): (usize, usize), with: &[u8]) {
        self.tree
            .get_mut(index / STRINGS)
            .splice(index % STRINGS, (from, to), with);
    }

    /// Replaces string number `index`.
    pub fn put(&mut self, index: usize, with: &[u8]) {
        let to = self.get(index).len();
        self.splice(index, (0, to), with);
    }
}

impl Pack {
    fn start(&self, i: usize) -> usize {
        i.checked_sub(1).map_or(0, |before| self.ends[before]) as usize
    }

    fn get(&self, i: usize) -> &[u8] {
        &self.bytes[self.start(i)..self.ends[i] as usize]
    }

    fn splice(&mut self, i: usize, (from, to): (usize, usize), with: &[u8]) {
        let start = self.start(i);
        let (from, to) = (start + from, start + to);
        let old_len = self.bytes.len();
        let new_len = old_len - (to - from) + with.len();
        if new_len > self.bytes.capacity() {
            self.bytes.reserve_exact(room(new_len) - old_len);
        }
        if new_len > old_len {
            self.bytes.resize(new_len, 0);
        }
        self.bytes.copy_within(to..old_len, from + with.len());
        self.bytes.truncate(new_len);
        self.bytes[from..from + with.len()].copy_from_slice(with);
        let grown = (new_len as u32).wrapping_sub(old_len as u32);
        for end in &mut self.ends[i..] {
            *end = end.wrapping_add(grown);
        }
        if self.bytes.capacity() > 64 && new_len < self.bytes.capacity() / 2 {
            self.bytes.shrink_to(room(new_len));
        }
    }
}

/// The capacity for so many bytes. Packs are most of the memory, and those of users with
/// equally long records grow at the same moment: an eighth to spare whatever the length made a
/// store of full-grown records swell by an eighth when one more register in a hundred came. A
/// write moves half a pack's bytes anyway, so copying it once in hundreds of bytes is little.
fn room(len: usize) -> usize {
    len.next_multiple_of(16) + (len / 8).min(SPARE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    #[test]
    fn a_pack_that_grows_and_shrinks_never_keeps_much_to_spare() {
        let mut pack = Pack::default();
        let entry = [7; 5];
        for n in 0..10_000 {
            pack.splice(n % STRINGS, (0, 0), &entry);
            let spare = pack.bytes.capacity() - pack.bytes.len();
            assert!(spare <= SPARE_MAX + 16, "{spare} to spare");
        }
        for n in 0..9_900 {
            pack.splice(n % STRINGS, (0, entry.len()), &[]);
            let (capacity, len) = (pack.bytes.capacity(), pack.bytes.len());
            assert!(
                capacity <= 64 || capacity <= 2 * len,
                "{capacity} for {len}"
            );
        }
    }

    #[test]
    fn splices_equal_those_of_plain_vectors() {
        let mut random = Philox::new(4, 0);
        let mut packs = Packs::default();
        let mut plain = vec![Vec::new(); 40];
        for _ in 0..5_000 {
            let i = random.below(40) as usize;
            let to = random.below(plain[i].len() as u32 + 1);
            let from = random.below(to + 1) as usize;
            let with = vec![random.next_u32() as u8; random.below(9) as usize];
            let before = packs.clone();
            plain[i].splice(from..to as usize, with.iter().copied());
            packs.splice(i, (from, to as usize), &with);
            if random.below(50) == 0 {
                plain[i].clear();
                packs.put(i, &[]);
            }
            assert!((0..40).all(|i| packs.get(i) == plain[i]));
            drop(before);
        }
    }
}
