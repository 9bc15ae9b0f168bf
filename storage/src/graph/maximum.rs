//! The greatest overlap of any two users, exact, without counting everyone for every answer.
//!
//! A certificate bounds overlaps: `bounds[u]`, such that for every two users
//!
//! > 2 · overlap(u, v) ≤ bounds\[u\] + bounds\[v\].  (1)
//!
//! 1. At first `bounds[u]` is u's degree, which is right for any pair.
//! 2. An event at u changes u's overlaps by one at most: adding 2 to `bounds[u]` keeps (1),
//!    whoever else is concerned. So events cost nothing but a counter per user; which users'
//!    counters moved is read off the persistent tree that holds them, in the time it takes
//!    to look at just those.
//! 3. To look at u is to count u's overlaps: `bounds[u]` becomes the greatest of them, and
//!    where some v had a bound below overlap(u, v), it is raised to that. (1) holds again.
//! 4. With `max` a true overlap, each u with `bounds[u]` and degree above `max` is looked at,
//!    largest bound first, until none is left. Then (1) says no pair has more than `max`.
//!
//! After a removal step 4 starts from what the best pair still has. The first answer looks
//! at about everyone whose degree is above the maximum; later ones at users with several
//! events since, near the maximum.

use super::query::{Counters, Counts, Question, Top, chunks};
use super::registers::Edges;
use super::tree::Tree;
use super::{Graph, UserId};
use simpatico_schema::OverlapMode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How often each user's edges changed, by user.
pub(crate) type ChangeCounts = Tree<u32, 64>;

/// What all snapshots of one history share, by mode: the latest certificate.
#[derive(Debug, Default)]
pub(crate) struct Maximum {
    /// The history's newest version. Only the graph at that version may extend the history;
    /// another clone that is written to starts its own.
    newest: AtomicU64,
    certificates: [Mutex<Option<Certificate>>; 2],
}

#[derive(Clone, Debug)]
struct Certificate {
    version: u64,
    changes: ChangeCounts,
    /// By user.
    bounds: Vec<u32>,
    max: u32,
    /// Two users with that overlap.
    pair: (u32, u32),
}

/// What looking at a user found.
#[derive(Clone, Default)]
struct Look {
    best: u32,
    with: u32,
    /// Users whose bound is below this overlap.
    raise: Vec<(u32, u32)>,
}

/// Moves a history on by one version; a graph that is not at its end gets its own.
pub(crate) fn next_version(maximum: &mut Arc<Maximum>, version: &mut u64) {
    let (old, new) = (*version, *version + 1);
    let order = Ordering::Relaxed;
    if maximum
        .newest
        .compare_exchange(old, new, order, order)
        .is_err()
    {
        *maximum = Arc::default();
        maximum.newest.store(new, order);
    }
    *version = new;
}

impl Graph {
    /// The greatest overlap of any two users (Eq. 6's denominator); 0 if none overlap. Exact.
    ///
    /// The first call counts for nearly everyone, on all cores, and takes as long as
    /// [`Graph::similar_all`]. What it learns is shared by all clones of this graph, so that
    /// later calls, after more events, count for few users or none.
    pub fn max_overlap(&self, mode: OverlapMode) -> u32 {
        let shared = &self.maximum.certificates[mode as usize];
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        match shared.as_ref() {
            Some(known) if known.version == self.version => known.max,
            // An older snapshot must not take the certificate back in time.
            Some(newer) if newer.version > self.version => {
                let mut own = newer.clone();
                drop(shared);
                self.renew(&mut own, mode);
                own.max
            }
            _ => {
                let mut certificate = shared.take().unwrap_or_else(|| self.first_certificate());
                self.renew(&mut certificate, mode);
                let max = certificate.max;
                *shared = Some(certificate);
                max
            }
        }
    }

    fn first_certificate(&self) -> Certificate {
        Certificate {
            version: self.version,
            changes: self.changes.clone(),
            bounds: (0..self.users.end()).map(|u| self.user_degree(u)).collect(),
            // No pair: nothing is known of the maximum yet.
            max: u32::MAX,
            pair: (0, 0),
        }
    }

    /// Makes a certificate of another moment of this history one of now.
    fn renew(&self, certificate: &mut Certificate, mode: OverlapMode) {
        let bounds = &mut certificate.bounds;
        let users = bounds.len().max(self.users.end() as usize);
        bounds.resize(users, 0);
        let mut suspects = Vec::new();
        self.changes
            .for_each_difference(&certificate.changes, &mut |user, now, then| {
                let change = now.unwrap_or(&0).abs_diff(*then.unwrap_or(&0));
                if change > 0 && user < users {
                    bounds[user] = bounds[user].saturating_add(change.saturating_mul(2));
                    suspects.push(user as u32);
                }
            });
        certificate.changes = self.changes.clone();
        certificate.version = self.version;
        let before = certificate.max;
        certificate.max = match before {
            u32::MAX => 0,
            _ => self.overlap(certificate.pair.0, certificate.pair.1, mode),
        };
        let is_first = before == u32::MAX;
        if certificate.max < before {
            suspects = (0..users as u32).collect();
        }
        self.look_at_all(certificate, suspects, mode, is_first);
    }

    /// Step 4. No other user than the `suspects` may be above the maximum.
    fn look_at_all(
        &self,
        certificate: &mut Certificate,
        mut suspects: Vec<u32>,
        mode: OverlapMode,
        is_first: bool,
    ) {
        let mut at_once = 64_usize;
        loop {
            let max = certificate.max;
            let bounds = &mut certificate.bounds;
            suspects.retain(|&user| bounds[user as usize] > max && self.user_degree(user) > max);
            if suspects.is_empty() {
                return;
            }
            suspects.sort_unstable_by_key(|&user| std::cmp::Reverse(bounds[user as usize]));
            let now: Vec<_> = suspects.iter().take(at_once).map(|u| UserId(*u)).collect();
            // Bounds as they are at first, degrees, are never below an overlap.
            let known = if is_first {
                None
            } else {
                Some(bounds.as_slice())
            };
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let looks = self.in_blocks(&now, threads, |users, counters| {
                self.look_at_block(users, mode, known, counters)
            });
            for (user, look) in now.iter().zip(looks) {
                bounds[user.0 as usize] = look.best;
                for (other, overlap) in look.raise {
                    let bound = &mut bounds[other as usize];
                    *bound = (*bound).max(overlap);
                }
                if look.best > certificate.max {
                    certificate.max = look.best;
                    certificate.pair = (user.0, look.with);
                }
            }
            let looked_at: std::collections::HashSet<_> = now.iter().map(|u| u.0).collect();
            suspects.retain(|user| !looked_at.contains(user));
            at_once *= 4;
        }
    }

    fn look_at_block(
        &self,
        users: &[UserId],
        mode: OverlapMode,
        bounds: Option<&[u32]>,
        counters: &mut Counters,
    ) -> Vec<Look> {
        let ask = |user: &UserId| {
            let sources = self.sources(*user, mode);
            let top = Top::new(1, user.0, sources.len());
            (Question::new(sources), top, Vec::new())
        };
        let mut asked: Vec<_> = users.iter().map(ask).collect();
        for (chunk, in_chunk) in chunks(self.users.end(), self.layout) {
            let base = chunk << self.layout.chunk_bits;
            for (user, (question, top, raise)) in users.iter().zip(&mut asked) {
                let counts = question.count(chunk, in_chunk, self.kernel, counters);
                if let Some(bounds) = bounds {
                    let bounds = &bounds[base..base + in_chunk];
                    find_below(&counts, bounds, &mut |index, count| {
                        let other = (base + index) as u32;
                        if other != user.0 {
                            raise.push((other, count));
                        }
                    });
                }
                top.scan(base as u32, counts, self.kernel);
            }
        }
        let look = |(_, top, raise): (Question<'_>, Top, Vec<_>)| {
            let (with, best) = top.best().unwrap_or_default();
            Look { best, with, raise }
        };
        asked.into_iter().map(look).collect()
    }

    fn user_degree(&self, user: u32) -> u32 {
        Edges::new(self.records.get(user as usize)).count() as u32
    }

    /// The overlap of two users.
    fn overlap(&self, a: u32, b: u32, mode: OverlapMode) -> u32 {
        let edges = |user| Edges::new(self.records.get(user as usize));
        let mut theirs = edges(b).peekable();
        let mut overlap = 0;
        for (attribute, sign) in edges(a) {
            while theirs.next_if(|other| other.0 < attribute).is_some() {}
            let same = theirs.next_if(|other| other.0 == attribute);
            let counts = |other: (u32, _)| mode == OverlapMode::Shared || other.1 == sign;
            overlap += u32::from(a != b && same.is_some_and(counts));
        }
        overlap
    }
}

/// Calls `below(index, count)` where the bound is below the count.
fn find_below(counts: &Counts<'_>, bounds: &[u32], below: &mut impl FnMut(usize, u32)) {
    match counts {
        Counts::Bytes(counts) => {
            for (block, bounds) in bounds.chunks(64).enumerate() {
                let counts = &counts[block * 64..block * 64 + bounds.len()];
                let pairs = counts.iter().zip(bounds);
                let any = pairs
                    .clone()
                    .fold(false, |any, (c, b)| any | (u32::from(*c) > *b));
                if any {
                    for (i, (count, bound)) in pairs.enumerate() {
                        if u32::from(*count) > *bound {
                            below(block * 64 + i, u32::from(*count));
                        }
                    }
                }
            }
        }
        Counts::Wide(counts) => {
            for (i, (count, bound)) in counts.iter().zip(bounds).enumerate() {
                if *count > *bound {
                    below(i, *count);
                }
            }
        }
    }
}
