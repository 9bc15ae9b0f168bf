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
//! After a removal step 4 starts from what the best pair still has. Answers after some events
//! look at those users that had several, near the maximum.
//!
//! Looking at very many users, at first at everyone, goes faster by a [join](super::join): it
//! finds all pairs within [`SLACK`] of a maximum known to be possible, and so bounds all users
//! at once. The slack is what a user's later events may use up before the user is looked at.
//! A certificate is also kept on disk ([`Kept`]), so that an open goes on where a close was.

use super::query::{Counters, Counts, Question, Top, chunks};
use super::registers::Edges;
use super::tree::Tree;
use super::{Graph, UserId};
use crate::threads;
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
    /// Whether `max` is the maximum; else only the bounds are right.
    settled: bool,
}

/// What of a certificate is kept on disk. The bounds hold for the moment they are kept with,
/// whether or not `max` is the maximum then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// The overlap of `pair`.
    pub max: u32,
    pub pair: (u32, u32),
    /// By user.
    pub bounds: Vec<u32>,
}

/// A join finds the pairs that have at most so much less than the maximum.
const SLACK: u32 = 2;
/// Users looked at before a join, twice so many.
const SAMPLED: usize = 512;

impl Certificate {
    fn found(&mut self, a: u32, b: u32, overlap: u32) {
        if overlap > self.max {
            (self.max, self.pair) = (overlap, (a, b));
        }
    }
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
    /// The first call joins all users with all others, on all cores; it takes a fraction of
    /// [`Graph::similar_all`]. What it learns is shared by all clones of this graph, so that
    /// later calls, after more events, count for few users or none.
    pub fn max_overlap(&self, mode: OverlapMode) -> u32 {
        let shared = &self.maximum.certificates[mode as usize];
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        match shared.as_ref() {
            Some(known) if known.version == self.version && known.settled => known.max,
            // An older snapshot must not take the certificate back in time.
            Some(newer) if newer.version > self.version => {
                let mut own = newer.clone();
                drop(shared);
                own.settled = false;
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
            // Right whatever the other user's bound is.
            bounds: (0..self.users.end())
                .map(|u| self.user_degree(u).saturating_mul(2))
                .collect(),
            max: 0,
            pair: (0, 0),
            settled: false,
        }
    }

    /// Makes a certificate of another moment of this history one of now.
    fn renew(&self, certificate: &mut Certificate, mode: OverlapMode) {
        let changed = self.follow(certificate);
        let users = certificate.bounds.len();
        let before = certificate.max;
        let (a, b) = certificate.pair;
        certificate.max = self.overlap(a, b, mode);
        let mut suspects = match certificate.settled && certificate.max >= before {
            true => changed,
            false => (0..users as u32).collect(),
        };
        self.keep_suspects(certificate, &mut suspects);
        let many = self.layout.join_users.max(users / 32);
        if users >= self.layout.join_users && suspects.len() > many.min(users / 2) {
            suspects = self.look_by_join(certificate, suspects, mode);
        }
        self.look_at_all(certificate, suspects, mode);
        certificate.settled = true;
    }

    /// What is known of the maximum at this moment, if anything is and no one is at work on
    /// it. O(users with events since).
    pub(crate) fn kept_maximum(&self, mode: OverlapMode) -> Option<Kept> {
        let shared = self.maximum.certificates[mode as usize].try_lock().ok()?;
        let known = shared.as_ref().filter(|c| c.version <= self.version);
        let mut certificate = known?.clone();
        drop(shared);
        self.follow(&mut certificate);
        let (a, b) = certificate.pair;
        Some(Kept {
            max: self.overlap(a, b, mode),
            pair: (a, b),
            bounds: certificate.bounds,
        })
    }

    /// Goes on from what was kept of this very moment; false if it cannot be of it.
    pub(crate) fn restore_maximum(&self, mode: OverlapMode, kept: Kept) -> bool {
        let (a, b) = kept.pair;
        let end = self.users.end();
        let fits = kept.bounds.len() <= end as usize && a < end.max(1) && b < end.max(1);
        if !fits || self.overlap(a, b, mode) != kept.max {
            return false;
        }
        let mut bounds = kept.bounds;
        bounds.resize(end as usize, 0);
        let shared = &self.maximum.certificates[mode as usize];
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(Certificate {
            version: self.version,
            changes: self.changes.clone(),
            bounds,
            max: kept.max,
            pair: kept.pair,
            settled: false,
        });
        true
    }

    /// Step 2: bounds that hold now. Returns the users with events since.
    fn follow(&self, certificate: &mut Certificate) -> Vec<u32> {
        let bounds = &mut certificate.bounds;
        let users = bounds.len().max(self.users.end() as usize);
        bounds.resize(users, 0);
        let mut changed = Vec::new();
        self.changes
            .for_each_difference(&certificate.changes, &mut |user, now, then| {
                let change = now.unwrap_or(&0).abs_diff(*then.unwrap_or(&0));
                if change > 0 && user < users {
                    bounds[user] = bounds[user].saturating_add(change.saturating_mul(2));
                    changed.push(user as u32);
                }
            });
        certificate.changes = self.changes.clone();
        certificate.version = self.version;
        changed
    }

    /// Leaves the users who may have more than the maximum.
    fn keep_suspects(&self, certificate: &Certificate, suspects: &mut Vec<u32>) {
        let (max, bounds) = (certificate.max, &certificate.bounds);
        suspects.retain(|&user| bounds[user as usize] > max && self.user_degree(user) > max);
    }

    /// Looks at all suspects at once. Returns those who must still be looked at.
    fn look_by_join(
        &self,
        certificate: &mut Certificate,
        mut suspects: Vec<u32>,
        mode: OverlapMode,
    ) -> Vec<u32> {
        // A maximum close to the true one first: fewer pairs come near it. Of those with the
        // most edges, and of others evenly.
        let threads = threads::count();
        let step = suspects.len() / SAMPLED + 1;
        let mut sample: Vec<_> = suspects.iter().step_by(step).copied().collect();
        let mut by_degree = suspects.clone();
        let degrees: Vec<u32> = (0..self.users.end()).map(|u| self.user_degree(u)).collect();
        by_degree.sort_unstable_by_key(|user| std::cmp::Reverse(degrees[*user as usize]));
        sample.extend(by_degree.iter().take(SAMPLED));
        let sample: Vec<_> = sample.into_iter().map(UserId).collect();
        let looks = self.in_blocks(&sample, threads, |users, counters| {
            self.look_at_block(users, mode, None, counters)
        });
        for (user, look) in sample.iter().zip(looks) {
            certificate.found(user.0, look.with, look.best);
        }
        let least = certificate.max - SLACK.min(certificate.max / 5) + 1;
        self.keep_suspects(certificate, &mut suspects);
        let everyone = suspects.len() * 4 > self.users.end() as usize * 3;
        let probing = (!everyone).then_some(suspects.as_slice());
        let Ok(threshold) = u8::try_from(least) else {
            return suspects; // Few users can have so many, and those are not counted there.
        };
        let joined = self.join(probing, threshold, mode, threads);
        // A pair that was not found has less than `least`; so much everyone is granted, for a
        // bound is only right together with the other user's.
        let bounds = &mut certificate.bounds;
        let lowered: Vec<u32> = match everyone {
            true => (0..bounds.len() as u32).collect(),
            false => suspects,
        };
        bounds
            .iter_mut()
            .for_each(|bound| *bound = (*bound).max(least - 1));
        for &user in &lowered {
            bounds[user as usize] = least - 1;
        }
        for (a, b, overlap) in joined.pairs {
            for user in [a, b] {
                let bound = &mut certificate.bounds[user as usize];
                *bound = (*bound).max(overlap);
            }
            certificate.found(a, b, overlap);
        }
        for &user in &joined.left_out {
            let bound = &mut certificate.bounds[user as usize];
            *bound = (*bound).max(degrees[user as usize].saturating_mul(2));
        }
        joined.left_out
    }

    /// Step 4. No other user than the `suspects` may be above the maximum.
    fn look_at_all(
        &self,
        certificate: &mut Certificate,
        mut suspects: Vec<u32>,
        mode: OverlapMode,
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
            let known = Some(bounds.as_slice());
            let looks = self.in_blocks(&now, threads::count(), |users, counters| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{AttributeId, Register};
    use simpatico_schema::Polarity;
    use simpatico_schema::random::Philox;

    #[test]
    fn counts_above_their_bounds_are_found() {
        let mut random = Philox::new(1, 6);
        for users in [1_usize, 1, 1, 1, 1, 2, 3, 63, 64, 65, 200] {
            // Mostly none: the way by blocks is to be gone too.
            for rare in [2, 300] {
                let bounds: Vec<u32> = (0..users).map(|_| 3 + random.below(9)).collect();
                let mut count =
                    |bound: &u32| bound + u32::from(random.below(rare) == 0) - random.below(2);
                let wide: Vec<u32> = bounds.iter().map(&mut count).collect();
                let mut bytes: Vec<u8> = wide.iter().map(|c| *c as u8).collect();
                bytes.resize(users.next_multiple_of(512), 0);
                let pairs = wide.iter().copied().zip(&bounds).enumerate();
                let above = pairs.filter(|(_, (count, bound))| count > bound);
                let expected: Vec<_> = above.map(|(at, (count, _))| (at, count)).collect();
                for counts in [Counts::Bytes(&bytes), Counts::Wide(&wide)] {
                    let mut found = Vec::new();
                    find_below(&counts, &bounds, &mut |at, count| found.push((at, count)));
                    assert_eq!(found, expected);
                }
            }
        }
    }

    /// Three users, of whom the first two have two attributes in common, one with another sign.
    fn three() -> Graph {
        let mut graph = Graph::new();
        for name in ["a", "b", "c"] {
            graph.add_user(name);
            graph.add_attribute(name);
        }
        let (like, dislike) = (Polarity::Like, Polarity::Dislike);
        for (user, attribute, polarity) in [
            (0, 0, like),
            (0, 1, like),
            (1, 0, like),
            (1, 1, dislike),
            (1, 2, like),
            (2, 2, dislike),
        ] {
            let to = Register {
                polarity,
                at: 1,
                id: "",
            };
            graph.set(UserId(user), AttributeId(attribute), to);
        }
        graph
    }

    #[test]
    fn what_was_kept_is_taken_up_only_where_it_can_be_of_this_moment() {
        let graph = three();
        let overlap = |a, b, mode| graph.overlap(a, b, mode);
        for (mode, most, other) in [(OverlapMode::Shared, 2, 1), (OverlapMode::Agreeing, 1, 0)] {
            assert_eq!((overlap(0, 1, mode), overlap(1, 0, mode)), (most, most));
            assert_eq!((overlap(1, 2, mode), overlap(2, 0, mode)), (other, 0));
            assert_eq!(overlap(1, 1, mode), 0);
            assert_eq!(graph.kept_maximum(mode), None);
            assert_eq!(graph.max_overlap(mode), most);
            let kept = graph.kept_maximum(mode).unwrap();
            assert_eq!(
                (kept.max, overlap(kept.pair.0, kept.pair.1, mode)),
                (most, most)
            );
            assert!(kept.bounds.len() == 3 && kept.bounds.iter().all(|b| *b <= most));
            let with = |change: &dyn Fn(&mut Kept)| {
                let mut kept = kept.clone();
                change(&mut kept);
                let fresh = three();
                let taken = fresh.restore_maximum(mode, kept);
                // Right in any case.
                assert_eq!(fresh.max_overlap(mode), most);
                taken
            };
            assert!(with(&|_| {}));
            assert!(with(&|kept| kept.bounds.truncate(2)));
            assert!(!with(&|kept| kept.max += 1));
            assert!(!with(&|kept| kept.pair.0 = 3));
            assert!(!with(&|kept| kept.pair.1 = 3));
            assert!(!with(&|kept| kept.bounds.push(0)));
        }
        let nobody = Kept {
            max: 0,
            pair: (0, 0),
            bounds: Vec::new(),
        };
        assert!(Graph::new().restore_maximum(OverlapMode::Shared, nobody));
    }
}
