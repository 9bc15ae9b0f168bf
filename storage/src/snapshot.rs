//! One consistent moment of a store, to read from while writers go on.

use crate::graph::{AttributeId, UserId};
use crate::state::State;
use crate::{Result, StoreError};
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::{EditRecord, PreferencePair};
use simpatico_schema::{Event, Neighbor, OverlapMode, Polarity, Sign};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A moment of a store. Taking one is O(1); it never changes, never blocks a writer, and
/// keeps the memory of its moment until it is dropped. `Clone`, `Send` and `Sync`.
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) state: State,
}

/// What the similarity of users was computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Common attributes (Eq. 6).
    Overlap,
    /// The cosine of embeddings.
    Embedding,
}

/// A user's most similar users.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Similar {
    /// Whose.
    pub user: String,
    /// By what.
    pub by: By,
    /// Which common attributes counted; `None` where embeddings were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap_mode: Option<OverlapMode>,
    /// The greatest overlap of any two users of the store at this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_overlap: Option<u32>,
    /// Overlap (or cosine) falling, then name rising by bytes.
    pub neighbors: Vec<Neighbor>,
}

/// A user's vector.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// Whose.
    pub user: String,
    /// BLAKE3 of the encoder's weights, in hex.
    pub encoder: String,
    /// The sequence number of the moment.
    pub as_of: u64,
    /// The vector, as long as the encoder's output.
    pub vector: Vec<f32>,
}

/// A user in words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Who.
    pub user: String,
    /// What the user likes, by name.
    pub likes: Vec<String>,
    /// What the user dislikes, by name.
    pub dislikes: Vec<String>,
    /// The most similar users.
    pub neighbors: Vec<Neighbor>,
    /// What the neighbours have and the user does not, weightiest first.
    pub suggestions: Vec<Suggestion>,
    /// The sequence number of the moment.
    pub as_of: u64,
}

/// An attribute that neighbours would add to a user.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Suggestion {
    /// The attribute.
    pub attribute: String,
    /// The neighbours' similarities that like it less those that dislike it, from -K to K.
    pub weight: f64,
    /// How many neighbours like it.
    pub liked_by: u32,
    /// How many neighbours dislike it.
    pub disliked_by: u32,
}

/// How many there are of everything in a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Users.
    pub users: u64,
    /// Attributes.
    pub attributes: u64,
    /// Edges.
    pub edges: u64,
    /// Attributes with a text vector.
    pub features: u64,
    /// Users with a learned vector.
    pub user_features: u64,
    /// Preference pairs.
    pub pairs: u64,
    /// Edit records.
    pub edits: u64,
}

impl Snapshot {
    pub(crate) fn user(&self, user: &str) -> Result<UserId> {
        self.state
            .graph
            .user_id(user)
            .ok_or_else(|| StoreError::UnknownUser { user: user.into() })
    }

    /// The sequence number of the last operation this moment includes.
    pub fn as_of(&self) -> u64 {
        self.state.seq
    }

    /// Whether the store knows the user.
    pub fn has_user(&self, user: &str) -> bool {
        self.state.graph.user_id(user).is_some()
    }

    /// The names of all users, in order of first appearance.
    pub fn users(&self) -> impl Iterator<Item = &str> + '_ {
        self.state.users().map(|u| self.state.graph.user_name(u))
    }

    /// The names of all attributes, in order of first appearance.
    pub fn attributes(&self) -> impl Iterator<Item = &str> + '_ {
        (0..self.state.graph.attribute_count() as u32)
            .map(|a| self.state.graph.attribute_name(AttributeId(a)))
    }

    /// A user's edges, by attribute in order of the attributes' first appearance.
    pub fn edges(&self, user: &str) -> Result<Vec<(String, Sign)>> {
        let user = self.user(user)?;
        let graph = &self.state.graph;
        let name = |(a, sign)| (graph.attribute_name(a).to_string(), sign);
        Ok(graph.edges(user).map(name).collect())
    }

    /// A user's registers as events: the history that counts, passes and clears included.
    pub fn registers(&self, user: &str) -> Result<Vec<Event>> {
        let id = self.user(user)?;
        Ok(self.registers_of(id).collect())
    }

    pub(crate) fn registers_of(&self, user: UserId) -> impl Iterator<Item = Event> + '_ {
        let graph = &self.state.graph;
        graph
            .registers(user)
            .map(move |(attribute, register)| Event {
                user: graph.user_name(user).into(),
                attribute: graph.attribute_name(attribute).into(),
                polarity: register.polarity,
                at: Some(register.at),
                id: (!register.id.is_empty()).then(|| register.id.into()),
            })
    }

    /// How many users like and dislike an attribute; `None` if the store does not know it.
    pub fn degrees(&self, attribute: &str) -> Option<(usize, usize)> {
        let graph = &self.state.graph;
        let attribute = graph.attribute_id(attribute)?;
        let degree = |sign| graph.degree(attribute, sign);
        Some((degree(Sign::Like), degree(Sign::Dislike)))
    }

    /// The `k` users with the greatest overlap (Eq. 6): exact, as of this moment. Users
    /// without a common attribute are no neighbors.
    pub fn similar(&self, user: &str, k: usize, mode: OverlapMode) -> Result<Similar> {
        let id = self.user(user)?;
        let neighbors = self.state.graph.similar(id, k, mode);
        Ok(self.name_similar(id, &neighbors, mode, self.max_overlap(mode)))
    }

    /// The `k` users with the greatest overlap as numbers: names, similarities and the
    /// graph-wide maximum left out, for those who only need who.
    pub fn overlaps(&self, user: &str, k: usize, mode: OverlapMode) -> Result<Vec<(&str, u32)>> {
        let neighbors = self.state.graph.similar(self.user(user)?, k, mode);
        let name = |(id, overlap)| (self.state.graph.user_name(id), overlap);
        Ok(neighbors.into_iter().map(name).collect())
    }

    /// [`Self::similar`] for many users on `threads` threads, in their order.
    pub fn similar_many(
        &self,
        users: &[&str],
        k: usize,
        mode: OverlapMode,
        threads: usize,
    ) -> Result<Vec<Similar>> {
        let ids = users.iter().map(|u| self.user(u));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        let max = self.max_overlap(mode);
        let all = self.state.graph.similar_many(&ids, k, mode, threads);
        let name =
            |(id, neighbors): (&UserId, Vec<_>)| self.name_similar(*id, &neighbors, mode, max);
        Ok(ids.iter().zip(all).map(name).collect())
    }

    /// [`Self::similar`] for everyone on `threads` threads, each handed to `sink`.
    pub fn similar_all(
        &self,
        k: usize,
        mode: OverlapMode,
        threads: usize,
        mut sink: impl FnMut(Similar),
    ) {
        let max = self.max_overlap(mode);
        self.state
            .graph
            .similar_all(k, mode, threads, |id, neighbors| {
                sink(self.name_similar(id, neighbors, mode, max));
            });
    }

    /// The greatest overlap of any two users.
    pub fn max_overlap(&self, mode: OverlapMode) -> u32 {
        self.state.graph.max_overlap(mode)
    }

    fn name_similar(
        &self,
        user: UserId,
        neighbors: &[(UserId, u32)],
        mode: OverlapMode,
        max: u32,
    ) -> Similar {
        let graph = &self.state.graph;
        let neighbor = |&(id, overlap): &(UserId, u32)| Neighbor {
            user: graph.user_name(id).into(),
            overlap: Some(overlap),
            similarity: f64::from(overlap) / f64::from(max.max(1)),
        };
        Similar {
            user: graph.user_name(user).into(),
            by: By::Overlap,
            overlap_mode: Some(mode),
            max_overlap: Some(max),
            neighbors: neighbors.iter().map(neighbor).collect(),
        }
    }

    /// The user's likes and dislikes, the `k` nearest neighbours (by agreeing attributes),
    /// and what those would add.
    pub fn profile(&self, user: &str, k: usize) -> Result<Profile> {
        let similar = self.similar(user, k, OverlapMode::Agreeing)?;
        let own: BTreeMap<String, Sign> = self.edges(user)?.into_iter().collect();
        let mut suggestions: BTreeMap<String, Suggestion> = BTreeMap::new();
        for neighbor in &similar.neighbors {
            for (attribute, sign) in self.edges(&neighbor.user)? {
                if own.contains_key(&attribute) {
                    continue;
                }
                let entry = suggestions
                    .entry(attribute)
                    .or_insert_with_key(|name| Suggestion {
                        attribute: name.clone(),
                        weight: 0.0,
                        liked_by: 0,
                        disliked_by: 0,
                    });
                match sign {
                    Sign::Like => {
                        entry.liked_by += 1;
                        entry.weight += neighbor.similarity;
                    }
                    Sign::Dislike => {
                        entry.disliked_by += 1;
                        entry.weight -= neighbor.similarity;
                    }
                }
            }
        }
        let mut suggestions: Vec<_> = suggestions.into_values().collect();
        suggestions.sort_by(|a, b| {
            let weight = b.weight.abs().total_cmp(&a.weight.abs());
            weight.then_with(|| a.attribute.cmp(&b.attribute))
        });
        let with = |sign| {
            let names = own.iter().filter(|(_, s)| **s == sign);
            names.map(|(name, _)| name.clone()).collect()
        };
        Ok(Profile {
            user: user.into(),
            likes: with(Sign::Like),
            dislikes: with(Sign::Dislike),
            neighbors: similar.neighbors,
            suggestions,
            as_of: self.as_of(),
        })
    }

    /// An attribute's text vector.
    pub fn feature(&self, attribute: &str) -> Option<Vec<f32>> {
        let id = self.state.graph.attribute_id(attribute)?;
        Some(self.state.feature(id)?.to_vec())
    }

    /// A user's learned vector.
    pub fn user_feature(&self, user: &str) -> Option<Vec<f32>> {
        let id = self.state.graph.user_id(user)?;
        Some(self.state.user_features.get(&id.0)?.to_vec())
    }

    /// The attributes without a text vector, in order of first appearance.
    pub fn attributes_without_feature(&self) -> Vec<String> {
        (0..self.state.graph.attribute_count() as u32)
            .map(AttributeId)
            .filter(|a| self.state.feature(*a).is_none())
            .map(|a| self.state.graph.attribute_name(a).to_string())
            .collect()
    }

    /// BLAKE3 of the encoder's weights file, in hex.
    pub fn encoder_digest(&self) -> Option<&str> {
        self.state.encoder.as_deref()
    }

    /// All preference pairs, in order of arrival.
    pub fn pairs(&self) -> impl Iterator<Item = Arc<PreferencePair>> + '_ {
        self.state.pairs.iter().map(|(_, pair)| pair.clone())
    }

    /// The edit of this id.
    pub fn edit(&self, id: &str) -> Option<EditRecord> {
        self.state
            .edits
            .get(id)
            .map(|(_, edit)| edit.as_ref().clone())
    }

    /// All edits, by id.
    pub fn edits(&self) -> impl Iterator<Item = Arc<EditRecord>> + '_ {
        self.state.edits.values().map(|(_, edit)| edit.clone())
    }

    /// How many there are of everything.
    pub fn counts(&self) -> Counts {
        Counts {
            users: self.state.graph.user_count() as u64,
            attributes: self.state.graph.attribute_count() as u64,
            edges: self.state.graph.edge_count(),
            features: self.state.features.iter().flatten().count() as u64,
            user_features: self.state.user_features.len() as u64,
            pairs: self.state.pairs.len() as u64,
            edits: self.state.edits.len() as u64,
        }
    }

    /// 128 bits, in hex, that two stores share only if they hold the same.
    pub fn digest(&self) -> String {
        format!("{:032x}", self.state.digest())
    }
}

impl Polarities {
    pub(crate) fn add(&mut self, polarity: Polarity) {
        match polarity {
            Polarity::Like => self.likes += 1,
            Polarity::Dislike => self.dislikes += 1,
            Polarity::Pass => self.passes += 1,
            Polarity::Clear => self.clears += 1,
        }
    }
}

/// Registers by what they say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Polarities {
    /// Likes.
    pub likes: u64,
    /// Dislikes.
    pub dislikes: u64,
    /// Seen without opinion.
    pub passes: u64,
    /// Removed.
    pub clears: u64,
}
