//! Who has an edge to an attribute: per chunk of users a short list or a bitmap.
//!
//! A chunk is 65,536 users by id. While few of them are in the posting, a chunk is an
//! unsorted list of 16-bit offsets; when more than one in 128 is, a bitmap, which counts
//! faster from there on. An event sets a bit or appends two bytes, so it costs the same
//! whether ten users share the attribute or a million. Everything is behind `Arc`: what a
//! snapshot holds is copied before it is changed, one chunk at a time.

use super::kernel::prefetch;
use std::sync::Arc;

/// Users per 8-word block of a bitmap, the step in which kernels count.
pub(crate) const BLOCK_USERS: usize = 512;

/// How postings are cut and when they switch. Tests make everything tiny.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// A chunk is `1 << chunk_bits` users; 9 to 16.
    pub chunk_bits: u32,
    /// A list longer than the chunk's users divided by this becomes a bitmap.
    pub dense_divisor: usize,
    /// With fewer users the maximum is found by counting for each of them.
    pub join_users: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            chunk_bits: 16,
            dense_divisor: 128,
            join_users: 4_096,
        }
    }
}

impl Layout {
    /// Users per chunk.
    pub fn chunk_users(self) -> usize {
        1 << self.chunk_bits
    }

    /// Words of a bitmap for a chunk that has `users` users now: a power of two of at least
    /// 8, so that bitmaps double as the last chunk fills.
    fn words(self, users: usize) -> usize {
        let users = users.clamp(1, self.chunk_users());
        users.div_ceil(64).next_power_of_two().max(8)
    }
}

/// The users with an edge of one sign to one attribute.
#[derive(Clone, Debug, Default)]
pub(crate) struct Posting {
    chunks: Arc<[Chunk]>,
    count: u32,
}

/// The part of a posting within one chunk of users.
#[derive(Clone, Debug, Default)]
pub(crate) enum Chunk {
    #[default]
    Empty,
    /// The first `len` of `ids`, in any order, none twice.
    List { len: u32, ids: Arc<[u16]> },
    /// Bit `id`; the number of words is a power of two and at least 8.
    Bits { len: u32, words: Arc<[u64]> },
}

impl Posting {
    /// A posting of these chunks.
    pub fn of(chunks: Vec<Chunk>) -> Self {
        let count = chunks.iter().map(Chunk::count).sum();
        let chunks = chunks.into();
        Self { chunks, count }
    }

    pub fn count(&self) -> usize {
        self.count as usize
    }

    pub fn chunk(&self, chunk: usize) -> &Chunk {
        self.chunks.get(chunk).unwrap_or(&Chunk::Empty)
    }

    /// Fetches the head of the chunk a user is in.
    pub fn fetch_chunk(&self, user: u32, layout: Layout) {
        let chunk = (user >> layout.chunk_bits) as usize;
        prefetch(self.chunks.as_ptr().wrapping_add(chunk));
        // The reference counts stand before the first chunk.
        prefetch(self.chunks.as_ptr().cast::<u8>().wrapping_sub(16));
    }

    /// Fetches where a user's entry would be written.
    pub fn fetch_place(&self, user: u32, layout: Layout) {
        match self.chunk((user >> layout.chunk_bits) as usize) {
            Chunk::Empty => {}
            Chunk::List { len, ids } => {
                prefetch(ids.as_ptr().cast::<u8>().wrapping_sub(16));
                prefetch(ids.as_ptr().wrapping_add(*len as usize));
            }
            Chunk::Bits { words, .. } => {
                let word = user as usize % layout.chunk_users() / 64;
                prefetch(words.as_ptr().cast::<u8>().wrapping_sub(16));
                prefetch(words.as_ptr().wrapping_add(word));
            }
        }
    }

    /// Adds a user who is not in it. `user_end` is one more than the greatest user id.
    pub fn insert(&mut self, user: u32, user_end: u32, layout: Layout) {
        let (chunk, id, users) = locate(user, user_end, layout);
        if chunk >= self.chunks.len() {
            let old = self.chunks.iter().cloned();
            let new = std::iter::repeat_n(Chunk::Empty, chunk + 1 - self.chunks.len());
            self.chunks = old.chain(new).collect();
        }
        Arc::make_mut(&mut self.chunks)[chunk].insert(id, users, layout);
        self.count += 1;
    }

    /// Removes a user who is in it.
    pub fn remove(&mut self, user: u32, user_end: u32, layout: Layout) {
        let (chunk, id, _) = locate(user, user_end, layout);
        if chunk < self.chunks.len() && Arc::make_mut(&mut self.chunks)[chunk].remove(id, layout) {
            self.count -= 1;
        }
    }

    /// The users in it, by id rising.
    pub fn users(&self, layout: Layout) -> impl Iterator<Item = u32> {
        let chunks = self.chunks.iter().enumerate();
        chunks.flat_map(move |(number, chunk)| {
            let base = (number as u32) << layout.chunk_bits;
            let mut ids = chunk.ids();
            ids.sort_unstable();
            ids.into_iter().map(move |id| base + u32::from(id))
        })
    }
}

/// A user's chunk, place in it, and how many users the chunk has by now.
fn locate(user: u32, user_end: u32, layout: Layout) -> (usize, u16, usize) {
    let chunk = (user >> layout.chunk_bits) as usize;
    let offset = user as usize % layout.chunk_users();
    let users = user_end as usize - chunk * layout.chunk_users();
    (chunk, offset as u16, users.max(offset + 1))
}

impl Chunk {
    /// Of these users, none twice, in a chunk that has `users` users.
    pub fn of_users(ids: &[u16], users: usize, layout: Layout) -> Self {
        Self::of(ids, layout.words(users), layout)
    }

    fn count(&self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::List { len, .. } | Self::Bits { len, .. } => *len,
        }
    }

    fn insert(&mut self, id: u16, users: usize, layout: Layout) {
        match self {
            Self::Empty => {
                let (len, ids) = (1, Arc::new([id, 0, 0, 0]));
                *self = Self::List { len, ids };
            }
            Self::List { len, ids } => {
                let n = *len as usize;
                let words = layout.words(users);
                if n >= words * 64 / layout.dense_divisor {
                    let mut all = ids[..n].to_vec();
                    all.push(id);
                    *self = Self::bits(&all, words);
                    return;
                }
                match Arc::get_mut(ids) {
                    Some(ids) if n < ids.len() => ids[n] = id,
                    _ => *ids = with_one_more(&ids[..n], id),
                }
                *len += 1;
            }
            Self::Bits { len, words } => {
                let word = usize::from(id) / 64;
                if word >= words.len() {
                    let mut all = self.ids();
                    all.push(id);
                    *self = Self::of(&all, layout.words(users), layout);
                    return;
                }
                Arc::make_mut(words)[word] |= 1 << (id % 64);
                *len += 1;
            }
        }
    }

    /// Whether it was there.
    fn remove(&mut self, id: u16, layout: Layout) -> bool {
        match self {
            Self::Empty => return false,
            Self::List { len, ids } => {
                let n = *len as usize;
                let Some(at) = ids[..n].iter().position(|i| *i == id) else {
                    return false;
                };
                let ids = Arc::make_mut(ids);
                ids[at] = ids[n - 1];
                *len -= 1;
            }
            Self::Bits { len, words } => {
                let (word, bit) = (usize::from(id) / 64, 1 << (id % 64));
                if words.get(word).is_none_or(|w| w & bit == 0) {
                    return false;
                }
                Arc::make_mut(words)[word] &= !bit;
                *len -= 1;
                // Well below where a list became a bitmap, or one user could flip it at will.
                if *len as usize * 4 < words.len() * 64 / layout.dense_divisor {
                    *self = Self::list(&self.ids());
                }
            }
        }
        if matches!(self, Self::List { len: 0, .. } | Self::Bits { len: 0, .. }) {
            *self = Self::Empty;
        }
        true
    }

    /// Its users, in no particular order.
    fn ids(&self) -> Vec<u16> {
        match self {
            Self::Empty => Vec::new(),
            Self::List { len, ids } => ids[..*len as usize].to_vec(),
            Self::Bits { len, words } => {
                let mut ids = Vec::with_capacity(*len as usize);
                for (at, word) in words.iter().enumerate() {
                    let mut rest = *word;
                    while rest != 0 {
                        ids.push((at * 64) as u16 + rest.trailing_zeros() as u16);
                        rest &= rest - 1;
                    }
                }
                ids
            }
        }
    }

    fn of(ids: &[u16], words: usize, layout: Layout) -> Self {
        match ids.len() > words * 64 / layout.dense_divisor {
            true => Self::bits(ids, words),
            false => Self::list(ids),
        }
    }

    fn list(ids: &[u16]) -> Self {
        let (len, ids) = (ids.len() as u32, Arc::from(ids));
        Self::List { len, ids }
    }

    fn bits(ids: &[u16], words: usize) -> Self {
        let mut bits = vec![0; words];
        for id in ids {
            bits[usize::from(*id) / 64] |= 1 << (id % 64);
        }
        let (len, words) = (ids.len() as u32, bits.into());
        Self::Bits { len, words }
    }
}

/// A list with one more id and room for some more: a quarter, and whole 16-byte granules.
fn with_one_more(ids: &[u16], id: u16) -> Arc<[u16]> {
    let len = ids.len() + 1;
    // Two words of reference counts stand before the ids in the same allocation.
    let room = (len + len / 5 + 12).next_multiple_of(8) - 8;
    let zeros = std::iter::repeat_n(0, room - len);
    let ids = ids.iter().copied();
    ids.chain([id]).chain(zeros).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        chunk_bits: 9,
        dense_divisor: 64,
        join_users: 0,
    };

    #[test]
    fn a_user_is_in_one_place_of_one_chunk() {
        assert_eq!(locate(0, 1, LAYOUT), (0, 0, 1));
        assert_eq!(locate(511, 600, LAYOUT), (0, 511, 600));
        assert_eq!(locate(1_025, 1_100, LAYOUT), (2, 1, 76));
        // A user who is not counted yet.
        assert_eq!(locate(1_027, 1_025, LAYOUT), (2, 3, 4));
    }

    #[test]
    fn a_list_that_grows_has_room_for_a_fifth_and_not_much_more() {
        for n in 0..300_u16 {
            let ids: Vec<u16> = (0..n).collect();
            let list = with_one_more(&ids, 999);
            let len = usize::from(n) + 1;
            assert_eq!((&list[..len - 1], list[len - 1]), (&ids[..], 999));
            assert!(list[len..].iter().all(|id| *id == 0));
            let room = list.len() - len;
            assert!((len / 5 + 4..=len / 5 + 11).contains(&room), "{n}: {room}");
            // With its two counts of references a whole number of granules.
            assert_eq!((list.len() + 8) % 8, 0);
        }
    }

    #[test]
    fn a_chunk_is_a_list_while_it_is_sparse_and_a_bitmap_while_it_is_dense() {
        let is_list = |chunk: &Chunk| matches!(chunk, Chunk::List { .. });
        // 512 users divided by 64: up to eight are a list.
        let id = |n: usize| (n * 37 % 512) as u16;
        let mut chunk = Chunk::Empty;
        for n in 0..20 {
            let before = match &chunk {
                Chunk::List { ids, .. } if n < ids.len() && n < 8 => Some(ids.as_ptr()),
                _ => None,
            };
            chunk.insert(id(n), 512, LAYOUT);
            assert_eq!(is_list(&chunk), n < 8, "{n}");
            assert_eq!(chunk.count() as usize, n + 1);
            // Where there is room nothing is moved.
            if let (Some(before), Chunk::List { ids, .. }) = (before, &chunk) {
                assert_eq!(ids.as_ptr(), before);
            }
            let ids: Vec<u16> = (0..=n).map(id).collect();
            let (mut made, mut grown) = (Chunk::of_users(&ids, 512, LAYOUT), chunk.clone());
            assert_eq!(is_list(&made), n < 8);
            for chunk in [&mut made, &mut grown] {
                let mut all = chunk.ids();
                all.sort_unstable();
                let mut expected = ids.clone();
                expected.sort_unstable();
                assert_eq!(all, expected);
                assert!(!chunk.remove(id(n + 1), LAYOUT));
            }
        }
        // It is a list again below a quarter of what made it a bitmap.
        for n in (0..20).rev() {
            assert!(chunk.remove(id(n), LAYOUT), "{n}");
            assert!(!chunk.remove(id(n), LAYOUT), "{n}");
            assert_eq!(chunk.count() as usize, n);
            assert_eq!(is_list(&chunk), n == 1, "{n}");
        }
        assert!(matches!(chunk, Chunk::Empty));
    }

    #[test]
    fn the_users_of_a_posting_come_by_number_from_all_chunks() {
        let mut posting = Posting::default();
        let users = [1_030, 3, 600, 511, 512, 1_024];
        for user in users {
            posting.insert(user, 1_100, LAYOUT);
        }
        let now = |posting: &Posting| posting.users(LAYOUT).collect::<Vec<_>>();
        assert_eq!(now(&posting), [3, 511, 512, 600, 1_024, 1_030]);
        posting.remove(600, 1_100, LAYOUT);
        posting.remove(601, 1_100, LAYOUT);
        assert_eq!(now(&posting), [3, 511, 512, 1_024, 1_030]);
        assert_eq!((posting.count, posting.chunks.len()), (5, 3));
    }
}
