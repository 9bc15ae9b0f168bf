//! What the log says, in memory: the graph and all that is stored beside it.
//!
//! A pure middle: no files, no clocks, no locks. Replaying the log and taking a live event
//! go through the same functions, so that a reopened store is the store that was closed.
//! `clone` is O(1); a clone is a [`crate::Snapshot`]'s inside.

use crate::embed::Embedder;
use crate::graph::{AttributeId, Change, Graph, Register, UserId};
use crate::log::{EventRecord, Frame, PairRecord, Record, StoredEdit};
use crate::{Result, StoreError};
use simpatico_schema::edit::{EditRecord, PreferencePair};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// How many events go to the graph at once.
const BATCH: usize = 65_536;

/// Everything a store knows.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub graph: Graph,
    /// The sequence number of the last operation.
    pub seq: u64,
    /// BLAKE3 of the encoder's weights file, in hex.
    pub encoder: Option<Arc<str>>,
    /// The embedder, which follows every edge and feature once it is loaded.
    pub sage: Embedder,
    /// By attribute number.
    pub features: Arc<Vec<Option<Arc<[f32]>>>>,
    /// By user number.
    pub user_features: Arc<BTreeMap<u32, Arc<[f32]>>>,
    /// In order of arrival, with the user's number.
    pub pairs: Arc<Vec<(u32, Arc<PreferencePair>)>>,
    /// By edit id, with the user's number.
    pub edits: Arc<BTreeMap<String, (u32, Arc<EditRecord>)>>,
    /// Attributes a forgotten user had: a compaction drops those nobody else has, because
    /// their very names may tell who is gone.
    pub touched_by_forget: Arc<BTreeSet<u32>>,
}

/// How much of a user a forget removed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Forgotten {
    pub registers: u64,
    pub edges: u64,
    pub pairs: u64,
    pub edits: u64,
}

/// A state on its way through a log. Its graph answers nothing before [`Replay::finish`].
#[derive(Default)]
pub(crate) struct Replay {
    pub state: State,
}

impl Replay {
    /// Does what a frame says. An error names what the log should not have said.
    pub(crate) fn apply_frame(&mut self, frame: &Frame<'_>) -> Result<()> {
        let state = &mut self.state;
        let mut batch: Vec<(UserId, AttributeId, Register<'_>)> = Vec::new();
        let (users, attributes) = (
            state.graph.user_id_end(),
            state.graph.attribute_count() as u32,
        );
        let (mut users, mut attributes) = (users, attributes);
        frame.visit(|record| {
            if let Record::Event(event) = record {
                if event.user >= users || event.attribute >= attributes {
                    return Err(format!(
                        "expected a user below {users} and an attribute below {attributes}, got {} and {}",
                        event.user, event.attribute
                    ));
                }
                batch.push(event.as_graph());
                if batch.len() == BATCH {
                    state.graph.set_registers(&mut batch);
                    batch.clear();
                }
                return Ok(());
            }
            if !batch.is_empty() && !matches!(record, Record::DefineUser { .. } | Record::DefineAttribute { .. }) {
                state.graph.set_registers(&mut batch);
                batch.clear();
            }
            state.apply(&record)?;
            users = state.graph.user_id_end();
            attributes = state.graph.attribute_count() as u32;
            Ok(())
        })?;
        state.graph.set_registers(&mut batch);
        state.seq = frame.first_seq + u64::from(frame.count) - 1;
        Ok(())
    }

    /// The state at the end.
    pub(crate) fn finish(self) -> State {
        let mut state = self.state;
        state.graph.post_all();
        state
    }
}

impl State {
    /// Does what one record says.
    pub(crate) fn apply(&mut self, record: &Record<'_>) -> Result<(), String> {
        match record {
            Record::Event(event) => {
                let (user, attribute, register) = event.as_graph();
                let change = self.graph.set(user, attribute, register);
                if let Some((old, new)) = edge_change(change) {
                    self.on_edge(user, attribute, old, new);
                }
            }
            Record::DefineUser { number, name } => {
                if *number != self.graph.user_id_end() || self.graph.add_user(name).0 != *number {
                    return Err(format!(
                        "expected user number {} with a new name, got {number}",
                        self.graph.user_id_end()
                    ));
                }
            }
            Record::DefineAttribute { number, name } => {
                let expected = self.graph.attribute_count() as u32;
                if *number != expected || self.graph.add_attribute(name).0 != *number {
                    return Err(format!(
                        "expected attribute number {expected} with a new name, got {number}"
                    ));
                }
            }
            Record::Forget { user } => {
                self.check_user(*user)?;
                self.forget(*user);
            }
            Record::Feature { attribute, vector } => {
                let at = *attribute as usize;
                if at >= self.graph.attribute_count() {
                    return Err(format!("feature of unknown attribute {attribute}"));
                }
                let features = Arc::make_mut(&mut self.features);
                if features.len() <= at {
                    features.resize(at + 1, None);
                }
                features[at] = Some(vector.as_ref().into());
                self.on_feature(AttributeId(*attribute), vector);
            }
            Record::UserFeature { user, vector } => {
                self.check_user(*user)?;
                Arc::make_mut(&mut self.user_features).insert(*user, vector.as_ref().into());
                self.on_user_feature(UserId(*user), vector);
            }
            Record::Encoder { digest } => {
                self.encoder = (!digest.is_empty()).then(|| digest.as_ref().into());
            }
            Record::Pair { user, pair } => {
                self.check_user(*user)?;
                let pair = pair.to_schema(self.graph.user_name(UserId(*user)));
                Arc::make_mut(&mut self.pairs).push((*user, Arc::new(pair)));
            }
            Record::Edit { user, edit } => {
                self.check_user(*user)?;
                let edit = edit.to_schema(self.graph.user_name(UserId(*user)));
                Arc::make_mut(&mut self.edits).insert(edit.id.clone(), (*user, Arc::new(edit)));
            }
            Record::BaseEnd => {}
        }
        Ok(())
    }

    fn check_user(&self, user: u32) -> Result<(), String> {
        if self.graph.user_name(UserId(user)).is_empty() {
            return Err(format!("expected a known user, got number {user}"));
        }
        Ok(())
    }

    /// Removes everything of a user.
    pub(crate) fn forget(&mut self, user: u32) -> Forgotten {
        let attributes: Vec<u32> = self
            .graph
            .registers(UserId(user))
            .map(|(a, _)| a.0)
            .collect();
        Arc::make_mut(&mut self.touched_by_forget).extend(&attributes);
        self.on_forget(UserId(user));
        let edges = self.graph.forget_user(UserId(user)).len() as u64;
        if self.user_features.contains_key(&user) {
            Arc::make_mut(&mut self.user_features).remove(&user);
        }
        let mut gone = Forgotten {
            registers: attributes.len() as u64,
            edges,
            ..Forgotten::default()
        };
        gone.pairs = self.pairs.iter().filter(|(u, _)| *u == user).count() as u64;
        if gone.pairs > 0 {
            Arc::make_mut(&mut self.pairs).retain(|(u, _)| *u != user);
        }
        gone.edits = self.edits.values().filter(|(u, _)| *u == user).count() as u64;
        if gone.edits > 0 {
            Arc::make_mut(&mut self.edits).retain(|_, (u, _)| *u != user);
        }
        gone
    }

    /// The numbers of all users there are, rising.
    pub(crate) fn users(&self) -> impl Iterator<Item = UserId> + '_ {
        (0..self.graph.user_id_end())
            .map(UserId)
            .filter(|u| !self.graph.user_name(*u).is_empty())
    }

    /// An attribute's text vector.
    pub(crate) fn feature(&self, attribute: AttributeId) -> Option<&Arc<[f32]>> {
        self.features.get(attribute.0 as usize)?.as_ref()
    }

    /// A number that two states share only if they hold the same: a sum over all that is
    /// held, each by its names, so that neither order nor numbering matters.
    pub(crate) fn digest(&self) -> u128 {
        self.registers_digest().wrapping_add(self.rest_digest())
    }

    /// The registers' share of [`Self::digest`].
    pub(crate) fn registers_digest(&self) -> u128 {
        let names: Vec<u64> = (0..self.graph.attribute_count() as u32)
            .map(|a| name_hash(self.graph.attribute_name(AttributeId(a))))
            .collect();
        let mut sum = 0u128;
        for user in self.users() {
            let user_hash = name_hash(self.graph.user_name(user));
            for (attribute, register) in self.graph.registers(user) {
                let attribute_hash = names[attribute.0 as usize];
                sum = sum.wrapping_add(register_hash(user_hash, attribute_hash, &register));
            }
        }
        sum
    }

    /// Names, features, pairs, edits and the encoder.
    fn rest_digest(&self) -> u128 {
        let mut sum = 0u128;
        let mut add = |seed: u64, bytes: &[u8]| {
            sum = sum.wrapping_add(xxh3_128_with_seed(bytes, seed));
        };
        for user in self.users() {
            add(1, self.graph.user_name(user).as_bytes());
        }
        let vector = |name: &str, vector: &[f32]| {
            let mut bytes = name.as_bytes().to_vec();
            bytes.push(0);
            bytes.extend(vector.iter().flat_map(|x| x.to_le_bytes()));
            bytes
        };
        for attribute in (0..self.graph.attribute_count() as u32).map(AttributeId) {
            if let Some(feature) = self.feature(attribute) {
                add(2, &vector(self.graph.attribute_name(attribute), feature));
            }
        }
        for (user, feature) in self.user_features.iter() {
            add(3, &vector(self.graph.user_name(UserId(*user)), feature));
        }
        for (place, (_, pair)) in self.pairs.iter().enumerate() {
            add(4 + ((place as u64) << 8), format!("{pair:?}").as_bytes());
        }
        for (_, edit) in self.edits.values() {
            add(5, format!("{edit:?}").as_bytes());
        }
        if let Some(encoder) = &self.encoder {
            add(6, encoder.as_bytes());
        }
        sum
    }
}

fn name_hash(name: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(name.as_bytes())
}

/// 128 bits of one register, by names.
pub(crate) fn register_hash(user: u64, attribute: u64, register: &Register<'_>) -> u128 {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&user.to_le_bytes());
    bytes[8..16].copy_from_slice(&attribute.to_le_bytes());
    bytes[16..24].copy_from_slice(&register.at.to_le_bytes());
    bytes[24] = register.polarity.code();
    let seed = if register.id.is_empty() {
        0
    } else {
        name_hash(register.id)
    };
    xxh3_128_with_seed(&bytes, seed)
}

impl<'a> EventRecord<'a> {
    /// The event as the graph takes it.
    #[inline]
    pub(crate) fn as_graph(&self) -> (UserId, AttributeId, Register<'a>) {
        let register = Register {
            polarity: self.polarity,
            at: self.at,
            id: self.id,
        };
        (UserId(self.user), AttributeId(self.attribute), register)
    }
}

impl<'a> PairRecord<'a> {
    /// A pair as it is stored.
    pub(crate) fn from_schema(pair: &'a PreferencePair) -> Self {
        Self {
            caption: Cow::Borrowed(&pair.caption),
            chosen: Cow::Borrowed(&pair.chosen),
            rejected: Cow::Borrowed(&pair.rejected),
            source: Cow::Borrowed(&pair.source),
        }
    }

    fn to_schema(&self, user: &str) -> PreferencePair {
        PreferencePair {
            user: user.into(),
            caption: self.caption.clone().into(),
            chosen: self.chosen.clone().into(),
            rejected: self.rejected.clone().into(),
            source: self.source.clone().into(),
        }
    }
}

impl<'a> StoredEdit<'a> {
    /// An edit as it is stored.
    pub(crate) fn from_schema(edit: &'a EditRecord) -> Self {
        Self {
            id: Cow::Borrowed(&edit.id),
            caption: Cow::Borrowed(&edit.caption),
            instruction: Cow::Borrowed(&edit.instruction),
            attributes: edit.attributes.iter().map(|a| a.as_str().into()).collect(),
            at: edit.at,
            accepted: edit.accepted,
        }
    }

    fn to_schema(&self, user: &str) -> EditRecord {
        EditRecord {
            id: self.id.clone().into(),
            user: user.into(),
            caption: self.caption.clone().into(),
            instruction: self.instruction.clone().into(),
            attributes: self.attributes.iter().map(|a| a.to_string()).collect(),
            at: self.at,
            accepted: self.accepted,
        }
    }
}

/// Whether a change touched an edge, for the caches that follow edges.
pub(crate) fn edge_change(
    change: Change,
) -> Option<(
    Option<simpatico_schema::Sign>,
    Option<simpatico_schema::Sign>,
)> {
    match change {
        Change::Applied { old, new } if old != new => Some((old, new)),
        _ => None,
    }
}

/// An error for a value that cannot be stored.
pub(crate) fn invalid(what: &'static str, expected: &str, got: impl ToString) -> StoreError {
    StoreError::Invalid {
        what,
        expected: expected.into(),
        got: got.to_string(),
    }
}
