//! The in-memory index of similar users: registers, postings, names, all copy-on-write.

use simpatico_schema::{OverlapMode, Polarity, Sign};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A user's number, dense in order of first appearance and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(pub u32);

/// An attribute's number, dense in order of first appearance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttributeId(pub u32);

/// The state of one (user, attribute): the event with the greatest (`at`, `id`, `polarity`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register<'a> {
    /// What was said.
    pub polarity: Polarity,
    /// When, in milliseconds since 1970.
    pub at: i64,
    /// The tie-breaker of one millisecond; "" when none was given.
    pub id: &'a str,
}

/// What an event did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The register already held a greater or equal event.
    Unchanged,
    /// The register was set; `old` and `new` say which edge there was and is.
    Applied {
        /// The sign of the edge before.
        old: Option<Sign>,
        /// The sign of the edge after.
        new: Option<Sign>,
    },
}

#[derive(Clone, Default)]
struct Model {
    users: Vec<Option<String>>,
    attributes: Vec<String>,
    user_ids: BTreeMap<String, u32>,
    attribute_ids: BTreeMap<String, u32>,
    registers: BTreeMap<(u32, u32), (i64, String, Polarity)>,
}

/// The index. `clone` is O(1) and is a snapshot: it sees one moment for ever.
#[derive(Clone, Default)]
pub struct Graph {
    model: Arc<Model>,
}

impl Graph {
    /// An index with nobody in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// The id of this user, which is new if the name is.
    pub fn add_user(&mut self, name: &str) -> UserId {
        if let Some(id) = self.user_id(name) {
            return id;
        }
        let model = Arc::make_mut(&mut self.model);
        let id = model.users.len() as u32;
        model.users.push(Some(name.into()));
        model.user_ids.insert(name.into(), id);
        UserId(id)
    }

    /// The id of this attribute, which is new if the name is.
    pub fn add_attribute(&mut self, name: &str) -> AttributeId {
        if let Some(id) = self.attribute_id(name) {
            return id;
        }
        let model = Arc::make_mut(&mut self.model);
        let id = model.attributes.len() as u32;
        model.attributes.push(name.into());
        model.attribute_ids.insert(name.into(), id);
        AttributeId(id)
    }

    /// The id of a known user.
    pub fn user_id(&self, name: &str) -> Option<UserId> {
        self.model.user_ids.get(name).map(|&id| UserId(id))
    }

    /// The id of a known attribute.
    pub fn attribute_id(&self, name: &str) -> Option<AttributeId> {
        self.model
            .attribute_ids
            .get(name)
            .map(|&id| AttributeId(id))
    }

    /// The user's name; "" for an id never given or forgotten.
    pub fn user_name(&self, user: UserId) -> &str {
        let name = self.model.users.get(user.0 as usize);
        name.and_then(Option::as_deref).unwrap_or("")
    }

    /// The attribute's name; "" for an id never given.
    pub fn attribute_name(&self, attribute: AttributeId) -> &str {
        let name = self.model.attributes.get(attribute.0 as usize);
        name.map_or("", String::as_str)
    }

    /// How many user ids were given out, forgotten users included: ids are below this.
    pub fn user_id_end(&self) -> u32 {
        self.model.users.len() as u32
    }

    /// How many users there are.
    pub fn user_count(&self) -> usize {
        self.model.user_ids.len()
    }

    /// How many attributes there are.
    pub fn attribute_count(&self) -> usize {
        self.model.attributes.len()
    }

    /// How many edges there are.
    pub fn edge_count(&self) -> u64 {
        let polarities = self.model.registers.values().map(|r| r.2);
        polarities.filter(|p| p.sign().is_some()).count() as u64
    }

    /// Offers an event to its register.
    pub fn set(&mut self, user: UserId, attribute: AttributeId, to: Register<'_>) -> Change {
        let key = (user.0, attribute.0);
        let old = self.model.registers.get(&key);
        let new = (to.at, to.id.to_string(), to.polarity);
        if old.is_some_and(|old| *old >= new) {
            return Change::Unchanged;
        }
        let old = old.and_then(|old| old.2.sign());
        Arc::make_mut(&mut self.model).registers.insert(key, new);
        let new = to.polarity.sign();
        Change::Applied { old, new }
    }

    /// Offers many events, as if one after the other; faster where users repeat.
    pub fn set_batch(&mut self, events: &[(UserId, AttributeId, Register<'_>)]) -> Vec<Change> {
        let set = |&(user, attribute, to): &_| self.set(user, attribute, to);
        events.iter().map(set).collect()
    }

    /// Removes a user's registers and name; the id is never given again.
    /// Returns the edges there were.
    pub fn forget_user(&mut self, user: UserId) -> Vec<(AttributeId, Sign)> {
        let edges = self.edges(user).collect();
        let model = Arc::make_mut(&mut self.model);
        if let Some(name) = model.users.get_mut(user.0 as usize).and_then(Option::take) {
            model.user_ids.remove(&name);
        }
        model.registers.retain(|key, _| key.0 != user.0);
        edges
    }

    /// The user's registers, by attribute id rising.
    pub fn registers(&self, user: UserId) -> impl Iterator<Item = (AttributeId, Register<'_>)> {
        let range = self.model.registers.range((user.0, 0)..=(user.0, u32::MAX));
        range.map(|(key, (at, id, polarity))| {
            let (polarity, at) = (*polarity, *at);
            (AttributeId(key.1), Register { polarity, at, id })
        })
    }

    /// The user's edges, by attribute id rising.
    pub fn edges(&self, user: UserId) -> impl Iterator<Item = (AttributeId, Sign)> {
        self.registers(user)
            .filter_map(|(attribute, register)| Some((attribute, register.polarity.sign()?)))
    }

    /// How many users have an edge of this sign to the attribute.
    pub fn degree(&self, attribute: AttributeId, sign: Sign) -> usize {
        self.posting(attribute, sign).count()
    }

    /// The users with an edge of this sign to the attribute, by id rising.
    pub fn posting(&self, attribute: AttributeId, sign: Sign) -> impl Iterator<Item = UserId> {
        let registers = self.model.registers.iter();
        registers
            .filter(move |(key, value)| key.1 == attribute.0 && value.2.sign() == Some(sign))
            .map(|(key, _)| UserId(key.0))
    }

    /// The `k` users with the greatest overlap with `user`, which is positive: overlap
    /// falling, then name rising by bytes.
    pub fn similar(&self, user: UserId, k: usize, mode: OverlapMode) -> Vec<(UserId, u32)> {
        let mine: BTreeMap<_, _> = self.edges(user).collect();
        let mut all: Vec<_> = (0..self.user_id_end())
            .filter(|&other| other != user.0)
            .map(|other| {
                let agrees = |(a, sign): &(AttributeId, Sign)| match mine.get(a) {
                    Some(own) => mode == OverlapMode::Shared || own == sign,
                    None => false,
                };
                let overlap = self.edges(UserId(other)).filter(agrees).count() as u32;
                (UserId(other), overlap)
            })
            .filter(|(_, overlap)| *overlap > 0)
            .collect();
        all.sort_by_key(|&(other, overlap)| (std::cmp::Reverse(overlap), self.user_name(other)));
        all.truncate(k);
        all
    }

    /// [`Self::similar`] for many users, in their order, on `threads` threads.
    pub fn similar_many(
        &self,
        users: &[UserId],
        k: usize,
        mode: OverlapMode,
        threads: usize,
    ) -> Vec<Vec<(UserId, u32)>> {
        let _ = threads;
        users.iter().map(|&u| self.similar(u, k, mode)).collect()
    }

    /// [`Self::similar`] for everyone, handed to `sink` by user id rising.
    pub fn similar_all(
        &self,
        k: usize,
        mode: OverlapMode,
        threads: usize,
        mut sink: impl FnMut(UserId, &[(UserId, u32)]),
    ) {
        let _ = threads;
        for user in (0..self.user_id_end()).map(UserId) {
            if !self.user_name(user).is_empty() {
                sink(user, &self.similar(user, k, mode));
            }
        }
    }

    /// The greatest overlap of any two users (Eq. 6's denominator); 0 if none overlap.
    pub fn max_overlap(&self, mode: OverlapMode) -> u32 {
        let users = (0..self.user_id_end()).map(UserId);
        let best = |u| self.similar(u, 1, mode).first().map_or(0, |n| n.1);
        users.map(best).max().unwrap_or(0)
    }
}
