//! All pairs of users with at least so great an overlap.
//!
//! One user at a time would be counted against everyone, which is what a question does, and
//! most of a question's time goes into lists and into memory. Here a block of users is turned
//! into bitmaps that stay in a cache, everybody who comes after is counted against it with
//! nothing but bitmaps, and each pair is met once.

use super::Graph;
use super::kernel::{Bitmaps, MAX_COUNTED};
use super::postings::BLOCK_USERS;
use super::registers::Edges;
use simpatico_schema::{OverlapMode, Sign};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Users of a block.
const BLOCK: usize = 8 * BLOCK_USERS;
/// Words of a block's bitmap.
const WORDS: usize = BLOCK / 64;
/// Pairs of one user with a block that are kept; with more, the user is left out.
const FOUND_MAX: usize = 64;
/// Users taken by a thread at once.
const STEP: usize = 1_024;

/// What a join found.
#[derive(Default)]
pub(crate) struct Joined {
    /// Pairs with at least the overlap asked for, in no order, some twice.
    pub pairs: Vec<(u32, u32, u32)>,
    /// Users with very many such pairs, or more edges than are counted here: nothing is said
    /// of their pairs.
    pub left_out: Vec<u32>,
}

/// A block of users as bitmaps, by token.
struct Block {
    from: usize,
    /// Where a token's words begin; `u32::MAX` for a token nobody in the block has.
    places: Vec<u32>,
    words: Vec<u64>,
}

impl Graph {
    /// All pairs with an overlap of at least `least`, which is 1 to 255, of which one is a
    /// probing user; `None` probes everyone. About a fifth of a nanosecond a pair looked at,
    /// on `threads` threads; some ten megabytes.
    pub(crate) fn join(
        &self,
        probing: Option<&[u32]>,
        least: u8,
        mode: OverlapMode,
        threads: usize,
    ) -> Joined {
        let joined = Mutex::new(Joined::default());
        let end = self.users.end();
        for from in (0..end).step_by(BLOCK) {
            let block = self.block(from, mode);
            // Where everyone probes, the later of two users finds the pair.
            let first = if probing.is_none() { from } else { 0 };
            let count = probing.map_or((end - first) as usize, <[u32]>::len);
            let next = AtomicUsize::new(0);
            let work = || {
                let mut found = Joined::default();
                let (mut counts, mut singles) = (vec![0; BLOCK], Vec::new());
                loop {
                    let start = next.fetch_add(STEP, Ordering::Relaxed);
                    if start >= count {
                        break;
                    }
                    for i in start..count.min(start + STEP) {
                        let user = probing.map_or(first + i as u32, |users| users[i]);
                        let bitmaps = Bitmaps {
                            singles: std::mem::take(&mut singles),
                            pairs: Vec::new(),
                        };
                        singles =
                            self.probe(user, &block, least, bitmaps, &mut counts, mode, &mut found);
                    }
                }
                let mut joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
                joined.pairs.append(&mut found.pairs);
                joined.left_out.append(&mut found.left_out);
            };
            std::thread::scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(work);
                }
                work();
            });
        }
        let mut joined = joined.into_inner().unwrap_or_else(PoisonError::into_inner);
        joined.left_out.sort_unstable();
        joined.left_out.dedup();
        joined
    }

    /// What is common to two users: an attribute, or an attribute and a sign.
    fn tokens(&self, user: u32, mode: OverlapMode) -> impl Iterator<Item = usize> {
        let token = move |(attribute, sign): (u32, Sign)| match mode {
            OverlapMode::Shared => attribute as usize,
            OverlapMode::Agreeing => attribute as usize * 2 + sign.index(),
        };
        Edges::new(self.records.get(user as usize)).map(token)
    }

    fn block(&self, from: u32, mode: OverlapMode) -> Block {
        let tokens = self.attributes.end() as usize * 2;
        let (mut places, mut words) = (vec![u32::MAX; tokens], Vec::new());
        let users = from..self.users.end().min(from + BLOCK as u32);
        for user in users {
            let bit = (user - from) as usize;
            for token in self.tokens(user, mode) {
                if places[token] == u32::MAX {
                    places[token] = words.len() as u32;
                    words.resize(words.len() + WORDS, 0);
                }
                words[places[token] as usize + bit / 64] |= 1 << (bit % 64);
            }
        }
        let from = from as usize;
        Block {
            from,
            places,
            words,
        }
    }

    /// Finds a user's pairs with a block. Gives the list that `bitmaps` was made of back.
    #[allow(clippy::too_many_arguments)]
    fn probe<'b>(
        &self,
        user: u32,
        block: &'b Block,
        least: u8,
        mut bitmaps: Bitmaps<'b>,
        counts: &mut [u8],
        mode: OverlapMode,
        found: &mut Joined,
    ) -> Vec<&'b [u64]> {
        bitmaps.singles.clear();
        let mut degree = 0;
        for token in self.tokens(user, mode) {
            degree += 1;
            let place = block.places[token] as usize;
            if let Some(words) = block.words.get(place..place.saturating_add(WORDS)) {
                bitmaps.singles.push(words);
            }
        }
        if degree > MAX_COUNTED {
            found.left_out.push(user);
            return bitmaps.singles;
        }
        if bitmaps.singles.len() < usize::from(least) {
            return bitmaps.singles;
        }
        self.kernel.count(&bitmaps, counts);
        let before = found.pairs.len();
        self.kernel.scan(counts, least, &mut |index, count| {
            let other = (block.from + index) as u32;
            if other != user {
                found.pairs.push((user, other, u32::from(count)));
            }
            match found.pairs.len() - before > FOUND_MAX {
                true => u8::MAX,
                false => least,
            }
        });
        if found.pairs.len() - before > FOUND_MAX {
            found.pairs.truncate(before);
            found.left_out.push(user);
        }
        bitmaps.singles
    }
}
