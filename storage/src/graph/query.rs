//! The top k by overlap, one chunk of users at a time.
//!
//! 1. A user's attributes name the postings to count.
//! 2. Per chunk, [`Kernel::count`] adds the bitmaps, then the lists are added.
//! 3. A scan finds the counters that reach the k-th best count so far; they become
//!    candidates and raise that count.
//! 4. At the end few candidates are left; only those that tie for the last places have
//!    their names compared.

use super::kernel::{Bitmaps, Kernel, MAX_COUNTED, count_list, prefetch_list};
use super::postings::{BLOCK_USERS, Chunk, Layout, Posting};
use std::sync::Arc;

/// With more ties, ranks decide instead of names where they are at hand.
const MANY_TIES: usize = 2_048;

/// Cache lines of each list that are fetched while bitmaps are added; the rest, of the longest
/// one that is no bitmap, is while the lists before it are.
const LINES_FIRST: usize = 4;
const LINES_MOST: usize = 16;

/// An attribute's posting, or its likes and its dislikes.
pub(crate) type Source<'a> = (&'a Posting, Option<&'a Posting>);

/// Counters for one chunk, kept between queries.
pub(crate) struct Counters {
    bytes: Box<[u8; 65_536]>,
    /// Only for users with more than 255 edges.
    wide: Vec<u32>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            bytes: Box::new([0; 65_536]),
            wide: Vec::new(),
        }
    }
}

/// The overlaps of one user with a chunk of users.
pub(crate) enum Counts<'a> {
    /// Of a user with at most 255 edges; whole blocks, zero past the last user.
    Bytes(&'a [u8]),
    /// Of any other user.
    Wide(&'a [u32]),
}

/// One user's question: the sources to count, over and over, chunk by chunk.
pub(crate) struct Question<'a> {
    sources: Vec<Source<'a>>,
    bitmaps: Bitmaps<'a>,
    lists: Vec<&'a [u16]>,
}

impl<'a> Question<'a> {
    pub fn new(sources: Vec<Source<'a>>) -> Self {
        Self {
            bitmaps: Bitmaps {
                singles: Vec::with_capacity(sources.len()),
                pairs: Vec::with_capacity(sources.len()),
            },
            lists: Vec::with_capacity(sources.len()),
            sources,
        }
    }

    /// The overlaps with the `users` users of a chunk.
    pub fn count<'c>(
        &mut self,
        chunk: usize,
        users: usize,
        kernel: Kernel,
        counters: &'c mut Counters,
    ) -> Counts<'c> {
        let end = users.next_multiple_of(BLOCK_USERS);
        if self.sources.len() <= MAX_COUNTED {
            self.count_some(0..self.sources.len(), chunk, end, kernel, counters);
            return Counts::Bytes(&counters.bytes[..end]);
        }
        counters.wide.clear();
        counters.wide.resize(end, 0);
        for from in (0..self.sources.len()).step_by(MAX_COUNTED) {
            let to = (from + MAX_COUNTED).min(self.sources.len());
            self.count_some(from..to, chunk, end, kernel, counters);
            for (wide, count) in counters.wide.iter_mut().zip(&counters.bytes[..end]) {
                *wide += u32::from(*count);
            }
        }
        Counts::Wide(&counters.wide)
    }

    fn count_some(
        &mut self,
        range: std::ops::Range<usize>,
        chunk: usize,
        end: usize,
        kernel: Kernel,
        counters: &mut Counters,
    ) {
        self.bitmaps.singles.clear();
        self.bitmaps.pairs.clear();
        self.lists.clear();
        for (one, other) in &self.sources[range] {
            let a = split(one.chunk(chunk), &mut self.lists);
            let b = other.and_then(|other| split(other.chunk(chunk), &mut self.lists));
            match (a, b) {
                (Some(a), Some(b)) => self.bitmaps.pairs.push((a, b)),
                (Some(words), None) | (None, Some(words)) => self.bitmaps.singles.push(words),
                (None, None) => {}
            }
        }
        for ids in &self.lists {
            prefetch_list(ids, 0..LINES_FIRST);
        }
        kernel.count(&self.bitmaps, &mut counters.bytes[..end]);
        for (i, ids) in self.lists.iter().enumerate() {
            if let Some(later) = self.lists.get(i + 4) {
                prefetch_list(later, LINES_FIRST..LINES_MOST);
            }
            count_list(ids, &mut counters.bytes);
        }
    }
}

/// The bitmap of a chunk, if it is one; a list joins the lists.
fn split<'a>(chunk: &'a Chunk, lists: &mut Vec<&'a [u16]>) -> Option<&'a [u64]> {
    match chunk {
        Chunk::Empty => None,
        Chunk::List { len, ids } => {
            lists.push(&ids[..*len as usize]);
            None
        }
        Chunk::Bits { words, .. } => Some(words),
    }
}

/// The best k so far, by count; ties at the last place are all kept until the end.
pub(crate) struct Top {
    k: usize,
    myself: u32,
    /// What a count must reach to matter: the k-th best so far, or 1.
    least: u32,
    /// How many candidates are above `least`; fewer than k.
    above: usize,
    /// How many candidates have each count.
    with_count: Vec<u32>,
    candidates: Vec<(u32, u32)>,
    compact_at: usize,
}

impl Top {
    /// Looks for the best `k` besides `myself`; no overlap is above `most`.
    pub fn new(k: usize, myself: u32, most: usize) -> Self {
        Self {
            k,
            myself,
            least: 1,
            above: 0,
            with_count: vec![0; most + 1],
            candidates: Vec::with_capacity(256),
            compact_at: (4 * k).max(4_096),
        }
    }

    /// Looks through a chunk's counts; `base` is the id of its first user.
    pub fn scan(&mut self, base: u32, counts: Counts<'_>, kernel: Kernel) {
        if self.k == 0 {
            return;
        }
        match counts {
            Counts::Bytes(counts) => {
                if self.candidates.is_empty() {
                    self.guess_least(counts, kernel);
                }
                kernel.scan(counts, self.least as u8, &mut |index, count| {
                    self.offer(base + index as u32, u32::from(count));
                    self.least as u8
                });
            }
            Counts::Wide(counts) => {
                for (index, &count) in counts.iter().enumerate() {
                    if count >= self.least {
                        self.offer(base + index as u32, count);
                    }
                }
            }
        }
    }

    /// Starts with a good `least`: the maxima of 64 disjoint groups of users are the counts
    /// of 64 users, so the k-th best of all is no less than the k-th best of them. One more
    /// is left out, for the user who asks may be among them.
    fn guess_least(&mut self, counts: &[u8], kernel: Kernel) {
        if self.k + 1 > 64 || counts.len() < 1_024 {
            return;
        }
        let mut maxima = kernel.lane_maxima(counts);
        let (_, kth, _) = maxima.select_nth_unstable_by(self.k, |a, b| b.cmp(a));
        self.least = self.least.max(u32::from(*kth));
    }

    fn offer(&mut self, user: u32, count: u32) {
        if user == self.myself {
            return;
        }
        self.candidates.push((user, count));
        self.with_count[count as usize] += 1;
        if count > self.least {
            self.above += 1;
            while self.above >= self.k {
                self.least += 1;
                self.above -= self.with_count[self.least as usize] as usize;
            }
        }
        if self.candidates.len() >= self.compact_at {
            self.candidates.retain(|c| c.1 >= self.least);
            self.compact_at = (2 * self.candidates.len()).max(self.compact_at);
        }
    }

    /// One of the best and its count.
    pub fn best(self) -> Option<(u32, u32)> {
        let candidates = self.candidates.into_iter();
        candidates.max_by_key(|&(user, count)| (count, std::cmp::Reverse(user)))
    }

    /// The best k, by count falling, then name rising.
    /// `ranks` gives the first users' places in the order of names, or nothing.
    pub fn finish<'n>(
        mut self,
        name: impl Fn(u32) -> &'n [u8],
        ranks: impl FnOnce() -> Option<Arc<Vec<u32>>>,
    ) -> Vec<(u32, u32)> {
        let least = self.least;
        self.candidates.retain(|c| c.1 >= least);
        let (mut best, mut ties): (Vec<_>, Vec<_>) =
            self.candidates.into_iter().partition(|c| c.1 > least);
        let places = self.k - best.len().min(self.k);
        if ties.len() > MANY_TIES.max(places)
            && let Some(ranks) = ranks()
        {
            ties = first_by_rank(ties, places, &ranks);
        }
        if ties.len() > places {
            ties = first_by_name(ties, places, &name);
        }
        best.append(&mut ties);
        best.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| name(a.0).cmp(name(b.0))));
        #[cfg(feature = "planted")]
        crate::log::planted::scramble(&mut best);
        best
    }
}

/// The candidates without those who have a rank but not one of the `places` least.
fn first_by_rank(ties: Vec<(u32, u32)>, places: usize, ranks: &[u32]) -> Vec<(u32, u32)> {
    let (mut ranked, mut rest): (Vec<_>, Vec<_>) = ties
        .into_iter()
        .partition(|(user, _)| (*user as usize) < ranks.len());
    if ranked.len() > places {
        ranked.select_nth_unstable_by_key(places, |(user, _)| ranks[*user as usize]);
        ranked.truncate(places);
    }
    ranked.append(&mut rest);
    ranked
}

/// The `places` candidates with the least names.
fn first_by_name<'n>(
    ties: Vec<(u32, u32)>,
    places: usize,
    name: &impl Fn(u32) -> &'n [u8],
) -> Vec<(u32, u32)> {
    let mut first = std::collections::BinaryHeap::with_capacity(places + 1);
    for (user, count) in ties {
        let name = name(user);
        if first.len() < places {
            first.push((name, user, count));
        } else if let Some(mut last) = first.peek_mut()
            && name < last.0
        {
            *last = (name, user, count);
        }
    }
    first
        .into_iter()
        .map(|(_, user, count)| (user, count))
        .collect()
}

/// How many chunks hold `users` users, and how many of them chunk number `chunk` holds.
pub(crate) fn chunks(users: u32, layout: Layout) -> impl Iterator<Item = (usize, usize)> {
    let size = layout.chunk_users();
    (0..(users as usize).div_ceil(size))
        .map(move |chunk| (chunk, size.min(users as usize - chunk * size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn ranks_keep_the_first_of_those_who_have_one_and_all_others() {
        let ranks = [3, 0, 2, 1];
        let ties = |users: &[u32]| users.iter().map(|u| (*u, 7)).collect::<Vec<_>>();
        let kept = |users: &[u32], places| {
            let mut kept: Vec<u32> = first_by_rank(ties(users), places, &ranks)
                .into_iter()
                .map(|(user, _)| user)
                .collect();
            kept.sort_unstable();
            kept
        };
        assert_eq!(kept(&[0, 1, 2, 3, 4, 9], 2), [1, 3, 4, 9]);
        assert_eq!(kept(&[0, 1, 2, 3], 4), [0, 1, 2, 3]);
        assert_eq!(kept(&[0, 2], 3), [0, 2]);
        assert_eq!(kept(&[4, 5], 1), [4, 5]);
    }

    #[test]
    fn ranks_are_asked_for_only_where_very_many_tie() {
        let names: Vec<String> = (0..10_000).map(|n| format!("{n:05}")).collect();
        for (ties, asked) in [(MANY_TIES, false), (MANY_TIES + 1, true)] {
            let mut top = Top::new(3, u32::MAX, 5);
            (0..ties as u32).for_each(|user| top.offer(9_000 - user, 1));
            let was = Cell::new(false);
            let ranks = || {
                was.set(true);
                None
            };
            let best = top.finish(|user| names[user as usize].as_bytes(), ranks);
            let least = 9_001 - ties as u32;
            assert_eq!(best, [(least, 1), (least + 1, 1), (least + 2, 1)]);
            assert_eq!(was.get(), asked, "{ties}");
        }
    }

    #[test]
    fn who_is_no_longer_among_the_best_is_let_go() {
        let mut top = Top::new(10, u32::MAX, 200_000);
        for user in 0..100_000 {
            top.offer(user, user + 1);
            assert!(top.candidates.len() <= 4_096, "{}", top.candidates.len());
        }
        let best = top.finish(|_| b"", || None);
        assert!(best.iter().map(|b| b.0).eq((99_990..100_000).rev()));
    }
}
