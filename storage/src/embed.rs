//! Embeddings of a snapshot's users, and how the GraphSAGE state follows the store.
//!
//! The arithmetic is in [`crate::sage`]; here it meets names, edges and files.

use crate::graph::{AttributeId, UserId};
use crate::sage::{Encoder, Sage, SageError};
use crate::snapshot::{By, Embedding, Similar, Snapshot};
use crate::state::State;
use crate::{Result, StoreError, threads};
use simpatico_schema::{Neighbor, Sign};
use std::path::Path;
use std::sync::Arc;

/// What is there of the encoder that the log names.
#[derive(Clone, Default)]
pub(crate) enum Embedder {
    /// None was ever set.
    #[default]
    Unset,
    /// At work.
    Ready(Sage),
    /// Its weights cannot be used; everything but embeddings goes on.
    Broken(Arc<(std::path::PathBuf, String)>),
}

fn refuse(path: &Path) -> impl FnOnce(SageError) -> StoreError {
    move |e| StoreError::Encoder {
        path: path.into(),
        reason: e.to_string(),
    }
}

/// An embedder without a graph, from the bytes of a weights file.
pub(crate) fn new_sage(path: &Path, bytes: &[u8], cache_bytes: usize) -> Result<Sage> {
    let encoder = Encoder::from_bytes(bytes).map_err(refuse(path))?;
    Ok(Sage::with_cache(Arc::new(encoder), cache_bytes))
}

impl State {
    /// Loads the weights that the log names and takes the whole state in.
    pub(crate) fn load_encoder(&mut self, encoders: &Path, cache_bytes: usize) {
        self.sage = match &self.encoder {
            None => Embedder::Unset,
            Some(digest) => {
                let path = encoders.join(format!("{digest}.safetensors"));
                match self.read_encoder(&path, digest, cache_bytes) {
                    Ok(sage) => Embedder::Ready(sage),
                    Err(e) => Embedder::Broken(Arc::new((path, e.to_string()))),
                }
            }
        };
    }

    fn read_encoder(&self, path: &Path, digest: &str, cache_bytes: usize) -> Result<Sage> {
        let bytes = std::fs::read(path).map_err(StoreError::io("read", path))?;
        let found = blake3::hash(&bytes).to_hex();
        if found.as_str() != digest {
            let reason = format!("expected BLAKE3 {digest}, got {found}");
            return Err(StoreError::corrupt(path, 0, reason));
        }
        self.fill_sage(new_sage(path, &bytes, cache_bytes)?, path)
    }

    /// Takes features and edges in. Fails where a feature has not the encoder's length.
    pub(crate) fn fill_sage(&self, mut sage: Sage, path: &Path) -> Result<Sage> {
        let attributes = (0..self.graph.attribute_count() as u32).map(AttributeId);
        let with_feature = |a| self.feature(a).map(|feature| (a, feature.as_ref()));
        let features: Vec<_> = attributes.filter_map(with_feature).collect();
        sage.set_attribute_features(&features, threads::count())
            .map_err(refuse(path))?;
        let learned = self.user_features.iter();
        let learned: Vec<_> = learned.map(|(u, f)| (UserId(*u), f.as_ref())).collect();
        // Their edges come with everybody's.
        sage.set_user_features(&learned, |_, _| (), threads::count())
            .map_err(refuse(path))?;
        let (graph, attributes) = (&self.graph, self.graph.attribute_count() as u32);
        let posting = |attribute, sign| graph.posting(attribute, sign);
        sage.load_edges(self.users(), attributes, posting, threads::count());
        Ok(sage)
    }

    /// The length of attribute vectors the encoder takes, if one is set.
    pub(crate) fn attribute_dim(&self) -> Option<usize> {
        match &self.sage {
            Embedder::Ready(sage) => Some(sage.encoder().config().in_dim_attribute),
            _ => None,
        }
    }

    /// The length of user vectors the encoder takes, if one is set.
    pub(crate) fn user_dim(&self) -> Option<usize> {
        match &self.sage {
            Embedder::Ready(sage) => Some(sage.encoder().config().in_dim_user),
            _ => None,
        }
    }

    /// Lets the embedder follow an edge.
    #[inline]
    pub(crate) fn on_edge(
        &mut self,
        user: UserId,
        attribute: AttributeId,
        old: Option<Sign>,
        new: Option<Sign>,
    ) {
        if let Embedder::Ready(sage) = &mut self.sage {
            sage.on_edge(user, attribute, old, new);
        }
    }

    /// Lets the embedder follow an attribute's vector. The caller has checked its length.
    pub(crate) fn on_feature(&mut self, attribute: AttributeId, vector: &[f32]) {
        self.on_features(&[(attribute, vector)]);
    }

    /// Lets the embedder follow many attributes' vectors. The caller has checked their length.
    pub(crate) fn on_features(&mut self, features: &[(AttributeId, &[f32])]) {
        if let Embedder::Ready(sage) = &mut self.sage
            && let Err(e) = sage.set_attribute_features(features, threads::count())
        {
            self.break_encoder(&e);
        }
    }

    /// Lets the embedder follow a user's vector. The caller has checked its length.
    pub(crate) fn on_user_feature(&mut self, user: UserId, vector: &[f32]) {
        self.on_user_features(&[(user, vector)]);
    }

    /// Lets the embedder follow many users' vectors. The caller has checked their length.
    pub(crate) fn on_user_features(&mut self, features: &[(UserId, &[f32])]) {
        let graph = &self.graph;
        let edges_of = |user, edges: &mut Vec<_>| edges.extend(graph.edges(user));
        if let Embedder::Ready(sage) = &mut self.sage
            && let Err(e) = sage.set_user_features(features, edges_of, threads::count())
        {
            self.break_encoder(&e);
        }
    }

    /// Takes a user out of the embedder, while its edges are still there.
    pub(crate) fn on_forget(&mut self, user: UserId) {
        if let Embedder::Ready(sage) = &mut self.sage {
            let edges: Vec<_> = self.graph.edges(user).collect();
            for &(attribute, sign) in &edges {
                sage.on_edge(user, attribute, Some(sign), None);
            }
            if self.user_features.contains_key(&user.0)
                && let Err(e) = sage.set_user_feature(user, None, &[])
            {
                self.break_encoder(&e);
            }
        }
    }

    fn break_encoder(&mut self, error: &SageError) {
        self.sage = Embedder::Broken(Arc::new((Default::default(), error.to_string())));
    }
}

impl Snapshot {
    fn sage(&self) -> Result<(&Sage, &str)> {
        let digest = self.state.encoder.as_deref().unwrap_or("");
        match &self.state.sage {
            Embedder::Ready(sage) => Ok((sage, digest)),
            Embedder::Unset => Err(StoreError::NoEncoder),
            Embedder::Broken(why) => Err(StoreError::Encoder {
                path: why.0.clone(),
                reason: why.1.clone(),
            }),
        }
    }

    fn edges_of(&self) -> impl Fn(UserId, &mut Vec<(AttributeId, Sign)>) + Sync + '_ {
        |user, edges| edges.extend(self.state.graph.edges(user))
    }

    /// The user's embedding at this moment: equal, to the last bit, to a computation from
    /// nothing. Costs O(edges · hidden) at most, less where the answer is cached.
    pub fn embedding(&self, user: &str) -> Result<Embedding> {
        let id = self.user(user)?;
        let (sage, digest) = self.sage()?;
        let edges: Vec<_> = self.state.graph.edges(id).collect();
        Ok(Embedding {
            user: user.into(),
            encoder: digest.into(),
            as_of: self.as_of(),
            vector: sage.embedding(id, &edges),
        })
    }

    /// The embeddings of many users on `threads` threads, in their order.
    pub fn embeddings(&self, users: &[&str], threads: usize) -> Result<Vec<Embedding>> {
        let ids = users.iter().map(|user| self.user(user));
        let ids = ids.collect::<Result<Vec<_>>>()?;
        let (sage, digest) = self.sage()?;
        let vectors = sage.embeddings(&ids, self.edges_of(), threads);
        let rows = vectors.chunks_exact(sage.encoder().config().out);
        let embedding = |(user, row): (&&str, &[f32])| Embedding {
            user: user.to_string(),
            encoder: digest.into(),
            as_of: self.as_of(),
            vector: row.to_vec(),
        };
        Ok(users.iter().zip(rows).map(embedding).collect())
    }

    /// The `k` users whose embeddings have the greatest cosine with this user's: exact,
    /// ties by name.
    pub fn similar_by_embedding(&self, user: &str, k: usize) -> Result<Similar> {
        let id = self.user(user)?;
        let (sage, _) = self.sage()?;
        let graph = &self.state.graph;
        let users: Vec<UserId> = self.state.users().collect();
        let tie = |a, b| graph.user_name(a).cmp(graph.user_name(b));
        let top = sage.top_by_cosine(id, &users, k, self.edges_of(), tie, threads::count());
        let neighbor = |(id, cosine)| Neighbor {
            user: graph.user_name(id).into(),
            overlap: None,
            similarity: cosine,
        };
        Ok(Similar {
            user: user.into(),
            by: By::Embedding,
            overlap_mode: None,
            max_overlap: None,
            neighbors: top.into_iter().map(neighbor).collect(),
        })
    }
}
