//! Many users against everyone: who is most like each of them, or all pairs that share much.
//!
//! One user at a time would be counted against everyone, which is what a question does, and
//! most of a question's time goes into lists and into memory. Here a thousand users at a time
//! become a table with a row of bits for each token, and everybody who asks is counted against
//! it with nothing but those rows. Counts are compared as digits, so that a pair of no interest
//! is never written down.

use super::kernel::{MAX_COUNTED, Row, TABLE_USERS};
use super::registers::Edges;
use super::{Graph, UserId};
use crate::threads;
use simpatico_schema::{OverlapMode, Sign};
use std::sync::{Mutex, PoisonError};

/// Pairs of one user with a block that are kept; with more, the user is left out.
const FOUND_MAX: usize = 16;
/// Users taken by a thread at once.
const STEP: usize = 1_024;
/// Users who ask at once, so many that making the tables is little beside asking them.
const ASKING: usize = 1 << 17;
/// Neighbors of all who ask at once, so few that they fit the memory of a small machine.
const KEPT: usize = 1 << 23;

/// What a join found.
#[derive(Default)]
pub(crate) struct Joined {
    /// Pairs with at least the overlap asked for, in no order, some twice.
    pub pairs: Vec<(u32, u32, u32)>,
    /// Users with very many such pairs, or more edges than are counted here: nothing is said
    /// of their pairs.
    pub left_out: Vec<u32>,
}

/// The tokens of the users who ask, read from their records once for all blocks.
struct Asking {
    /// Where each user's tokens end.
    ends: Vec<usize>,
    tokens: Vec<u32>,
}

/// The best of one user so far.
struct Best<'a> {
    /// What an overlap must reach to be among them.
    least: u8,
    found: usize,
    /// (overlap, rank) by overlap falling, then rank rising; the first `found` of them.
    kept: &'a mut [(u32, u32)],
}

impl Graph {
    /// All pairs with an overlap of at least `least`, which is 1 to 255, of which one is a
    /// probing user; `None` probes everyone. About a tenth of a nanosecond a pair looked at,
    /// on `threads` threads; 128 bytes an attribute, and four an edge of those who probe.
    pub(crate) fn join(
        &self,
        probing: Option<&[u32]>,
        least: u8,
        mode: OverlapMode,
        threads: usize,
    ) -> Joined {
        let everyone: Vec<u32> = (0..self.users.end()).collect();
        let users = probing.unwrap_or(&everyone);
        let asking = self.asking(users, mode);
        let joined = Mutex::new(Joined::default());
        let mut table = self.table(mode);
        for (number, members) in everyone.chunks(TABLE_USERS).enumerate() {
            self.flip(&mut table, members, mode);
            // Where everyone probes, the later of two users finds the pair.
            let first = if probing.is_none() {
                number * TABLE_USERS
            } else {
                0
            };
            let steps = Mutex::new((first..users.len()).step_by(STEP));
            threads::run(threads, || {
                let mut found = Joined::default();
                while let Some(from) = threads::next(&steps) {
                    for at in from..users.len().min(from + STEP) {
                        let asker = (users[at], asking.tokens(at));
                        self.probe(asker, (members, &table), least, &mut found);
                    }
                }
                let mut joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
                joined.pairs.append(&mut found.pairs);
                joined.left_out.append(&mut found.left_out);
            });
            self.flip(&mut table, members, mode);
        }
        let mut joined = joined.into_inner().unwrap_or_else(PoisonError::into_inner);
        joined.left_out.sort_unstable();
        joined.left_out.dedup();
        joined
    }

    /// The most similar users of each of these many users, in their order, as
    /// [`Graph::similar`] finds them.
    ///
    /// Blocks are made of users in the order of their names, so that of two with one overlap
    /// the earlier found is the better, and one more of the same is passed over unseen.
    pub(super) fn most_similar(
        &self,
        users: &[UserId],
        k: usize,
        mode: OverlapMode,
        threads: usize,
        mut sink: impl FnMut(UserId, &[(UserId, u32)]),
    ) {
        let order = self.users_by_name();
        let mut table = self.table(mode);
        let k = k.min(order.len());
        if k == 0 {
            users.iter().for_each(|user| sink(*user, &[]));
            return;
        }
        let at_once = (KEPT / k).clamp(1, ASKING);
        for users in users.chunks(at_once) {
            let ids: Vec<u32> = users.iter().map(|user| user.0).collect();
            let asking = self.asking(&ids, mode);
            let mut kept = vec![(0, 0); users.len() * k];
            let rows = kept.chunks_mut(k);
            let (least, found) = (1, 0);
            let best = rows.map(|kept| Best { least, found, kept });
            let mut best: Vec<_> = best.collect();
            for (number, members) in order.chunks(TABLE_USERS).enumerate() {
                self.flip(&mut table, members, mode);
                let first = number * TABLE_USERS;
                let steps = Mutex::new(best.chunks_mut(STEP).enumerate());
                threads::run(threads, || {
                    while let Some((step, best)) = threads::next(&steps) {
                        for (i, best) in best.iter_mut().enumerate() {
                            let at = step * STEP + i;
                            let tokens = asking.tokens(at);
                            if tokens.len() > MAX_COUNTED {
                                continue;
                            }
                            let (kernel, least) = (self.kernel, best.least);
                            kernel.find(
                                &table,
                                tokens,
                                least,
                                k,
                                &mut |index, count| match members[index] == ids[at] {
                                    true => best.least,
                                    false => best.offer((first + index) as u32, count),
                                },
                            );
                        }
                    }
                });
                self.flip(&mut table, members, mode);
            }
            let is_wide = |at: &usize| asking.tokens(*at).len() > MAX_COUNTED;
            let wide: Vec<_> = (0..users.len()).filter(is_wide).map(|i| users[i]).collect();
            let mut wide = self.ask_each(&wide, k, mode, threads).into_iter();
            for ((at, &user), best) in users.iter().enumerate().zip(&best) {
                if is_wide(&at) {
                    sink(user, &wide.next().unwrap_or_default());
                    continue;
                }
                let named = best.kept[..best.found].iter();
                let named = named.map(|&(count, rank)| (UserId(order[rank as usize]), count));
                sink(user, &named.collect::<Vec<_>>());
            }
        }
    }

    /// All users but the forgotten, by name rising. O(n log n).
    fn users_by_name(&self) -> Vec<u32> {
        let all = (0..self.users.end()).map(|user| (self.users.bytes(user), user));
        let mut order: Vec<_> = all.filter(|(name, _)| !name.is_empty()).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, user)| user).collect()
    }

    /// What is common to two users: an attribute, or an attribute and a sign.
    fn tokens(&self, user: u32, mode: OverlapMode) -> impl Iterator<Item = u32> {
        let token = move |(attribute, sign): (u32, Sign)| match mode {
            OverlapMode::Shared => attribute,
            OverlapMode::Agreeing => attribute * 2 + sign.index() as u32,
        };
        Edges::new(self.records.get(user as usize)).map(token)
    }

    fn asking(&self, users: &[u32], mode: OverlapMode) -> Asking {
        let (mut ends, mut tokens) = (Vec::with_capacity(users.len()), Vec::new());
        for &user in users {
            tokens.extend(self.tokens(user, mode));
            ends.push(tokens.len());
        }
        Asking { ends, tokens }
    }

    /// A table of no users: a row for each token.
    fn table(&self, mode: OverlapMode) -> Vec<Row> {
        let signs = 1 + usize::from(mode == OverlapMode::Agreeing);
        vec![Row::default(); self.attributes.end() as usize * signs]
    }

    /// Puts at most [`TABLE_USERS`] users into a table, or takes them out again.
    fn flip(&self, table: &mut [Row], members: &[u32], mode: OverlapMode) {
        for (index, &user) in members.iter().enumerate() {
            for token in self.tokens(user, mode) {
                table[token as usize].flip(index);
            }
        }
    }

    /// Finds a user's pairs with the users of a table.
    fn probe(
        &self,
        (user, tokens): (u32, &[u32]),
        (members, table): (&[u32], &[Row]),
        least: u8,
        found: &mut Joined,
    ) {
        if tokens.len() > MAX_COUNTED {
            found.left_out.push(user);
            return;
        }
        if tokens.len() < usize::from(least) {
            return;
        }
        let before = found.pairs.len();
        let mut offer = |index: usize, count| {
            let other = members[index];
            if other != user {
                found.pairs.push((user, other, u32::from(count)));
            }
            match found.pairs.len() - before > FOUND_MAX {
                true => u8::MAX,
                false => least,
            }
        };
        self.kernel
            .find(table, tokens, least, usize::MAX, &mut offer);
        if found.pairs.len() - before > FOUND_MAX {
            found.pairs.truncate(before);
            found.left_out.push(user);
        }
    }
}

impl Asking {
    fn tokens(&self, at: usize) -> &[u32] {
        let from = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[from..self.ends[at]]
    }
}

impl Best<'_> {
    /// Takes one in who ranks after all before; returns what the next one must reach.
    fn offer(&mut self, rank: u32, count: u8) -> u8 {
        let overlap = u32::from(count);
        let place = self.kept[..self.found].partition_point(|kept| kept.0 >= overlap);
        if place < self.kept.len() {
            self.found = (self.found + 1).min(self.kept.len());
            self.kept[place..self.found].rotate_right(1);
            self.kept[place] = (overlap, rank);
        }
        if self.found == self.kept.len() {
            let last = self.kept.last().map_or(u32::MAX, |kept| kept.0);
            self.least = u8::try_from(last + 1).unwrap_or(u8::MAX);
        }
        self.least
    }
}
