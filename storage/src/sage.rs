//! GraphSAGE embeddings of users: incremental, always fresh, and exact to the bit.
//!
//! This is the encoder at work in the store, not its training, and it holds no edges: the
//! graph index does, and hands a user's edges in. The model is PyG's two-layer
//! `to_hetero(SAGE, aggr="sum")` with mean aggregation (see [`Encoder`]).
//!
//! # How
//!
//! Layer 1 is linear before its ReLU, so what an edge adds to a node can be added when the
//! edge appears and taken back when it goes:
//!
//! 1. A feature is multiplied by the first layer's weights once, when it is set. That gives
//!    an attribute's *root* (its hidden layer before its neighbors) and its *message* to
//!    users, one per relation; and the same for a user with a learned feature.
//! 2. An attribute keeps, per relation, its degree and the sum of its users' messages. An
//!    event is one vector addition, whatever the degree. Users without a learned feature
//!    have no message and cost nothing; while all are such, no sum is stored.
//! 3. A read takes the user's attributes, sums their hidden layers and their messages into
//!    means, and multiplies once by the second layer's weights.
//! 4. The answer is cached with the version of the graph. It is right as long as neither the
//!    user nor one of its attributes has changed since; nothing is ever pushed to neighbors.
//!
//! # Exactness
//!
//! Every answer equals [`embed_all_from_nothing`] to the last bit, whatever the history, the
//! order of arrival and the numbering of users and attributes: neighbor sums are sums of
//! integers (multiples of 2^-26), and products have one order of operations on every
//! machine. Against PyG the difference is rounding, below 1e-5. An attribute may
//! have up to 2^22 users before terms near the limit of ±32,767 could overflow.
//!
//! # Cost
//!
//! An event: O(hidden) if the user has a learned feature, else O(1). A read: O(edges ·
//! hidden + hidden · out), or O(edges) if the cached answer is right. Memory: per attribute
//! 3 · hidden numbers of 4 bytes, and 2 · hidden of 8 bytes once it has users with learned
//! features; per such user 3 · hidden of 4 bytes; and the cache.

mod cache;
mod encoder;
mod kernel;
#[cfg(test)]
mod tests;

pub use crate::graph::{AttributeId, UserId};
pub use encoder::{ENCODER_VERSION, Encoder, EncoderConfig, MAX_DIM, Relations, SageError};

use crate::graph::{prefetch, tree::Tree};
use crate::threads;
use cache::{Cache, Entry};
use kernel::Level;
use simpatico_schema::Sign;
use std::cmp::Ordering;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// What the cache of embeddings may take by default, in bytes.
pub const DEFAULT_CACHE_BYTES: usize = 128 << 20;
/// Users a batch takes through the arithmetic together.
const BATCH: usize = 384;

/// The state behind all embeddings of one moment.
///
/// `clone` is O(1) and is a snapshot: it sees that moment for ever, while the original goes
/// on; both share what did not change, and the cache. `Send + Sync`.
#[derive(Clone)]
pub struct Sage {
    encoder: Arc<Encoder>,
    level: Level,
    /// Counts changes; cached answers and what they rest on are compared by it.
    version: u64,
    /// The version of the last change to any attribute's hidden layer or message.
    attributes_changed: u64,
    attributes: Tree<Attribute, 32>,
    /// The version of each user's last change of edges or feature.
    users: Tree<u64, 64>,
    /// [root | message per relation] of users with a learned feature.
    learned: Tree<Option<Arc<[f32]>>, 32>,
    /// The same of an attribute without a feature: a zero vector.
    blank: Arc<[f32]>,
    cache: Arc<Cache>,
    cache_bytes: usize,
}

#[derive(Clone, Default)]
struct Attribute {
    /// The version of the last change to its hidden layer or message.
    version: u64,
    /// [root | message per relation]; `None` without a feature.
    parts: Option<Arc<[f32]>>,
    degree: [u32; 2],
    /// `None` while no user with a learned feature is connected.
    sums: Option<Arc<Sums>>,
}

/// What the learned users of an attribute tell it.
struct Sums {
    /// How many they are.
    users: u32,
    /// Per relation, the sum of their messages.
    totals: Vec<i64>,
    /// The hidden layer that follows, made at the first read.
    hidden: OnceLock<Box<[f32]>>,
}

impl Clone for Sums {
    /// Copied only to be changed, so the hidden layer is left behind.
    fn clone(&self) -> Self {
        Self {
            users: self.users,
            totals: self.totals.clone(),
            hidden: OnceLock::new(),
        }
    }
}

/// Space that reads use again and again.
struct Scratch {
    /// Per relation the sum of hidden layers, then per relation the sum of messages.
    sums: Vec<i64>,
    edges: Vec<(AttributeId, Sign)>,
}

impl Sage {
    /// Embeddings of an empty graph, with a cache of [`DEFAULT_CACHE_BYTES`].
    pub fn new(encoder: Arc<Encoder>) -> Self {
        Self::with_cache(encoder, DEFAULT_CACHE_BYTES)
    }

    /// Embeddings of an empty graph, with a cache of about `cache_bytes`; 0 for none.
    pub fn with_cache(encoder: Arc<Encoder>, cache_bytes: usize) -> Self {
        let level = Level::best();
        let blank = parts_of_attribute(&encoder, level, None);
        Self {
            level,
            version: 0,
            attributes_changed: 0,
            attributes: Tree::default(),
            users: Tree::default(),
            learned: Tree::default(),
            blank,
            cache: Arc::new(Cache::new(cache_bytes, encoder.config().out, 0)),
            cache_bytes,
            encoder,
        }
    }

    /// The encoder in use.
    pub fn encoder(&self) -> &Arc<Encoder> {
        &self.encoder
    }

    /// Sets an attribute's text vector; `None` removes it. An attribute without one counts
    /// as having a zero vector. Fails, with nothing changed, on a wrong length or a number
    /// that is not finite. Costs one product with the first layer's weights.
    pub fn set_attribute_feature(
        &mut self,
        attribute: AttributeId,
        feature: Option<&[f32]>,
    ) -> Result<(), SageError> {
        let expected = self.encoder.config().in_dim_attribute;
        check_feature("an attribute's feature", feature, expected)?;
        let parts = feature.map(|x| parts_of_attribute(&self.encoder, self.level, Some(x)));
        self.set_attribute_parts(attribute, parts);
        Ok(())
    }

    /// [`Self::set_attribute_feature`] of many attributes, one after the other, but many times
    /// faster: their products are made together, on `threads` threads. Fails with nothing
    /// changed.
    pub fn set_attribute_features(
        &mut self,
        features: &[(AttributeId, &[f32])],
        threads: usize,
    ) -> Result<(), SageError> {
        let expected = self.encoder.config().in_dim_attribute;
        let what = "an attribute's feature";
        for (_, feature) in features {
            check_feature(what, Some(feature), expected)?;
        }
        let parts = parts_of_many(&self.encoder.attribute_in, self.level, features, threads);
        for ((attribute, _), parts) in features.iter().zip(parts) {
            self.set_attribute_parts(*attribute, parts);
        }
        Ok(())
    }

    fn set_attribute_parts(&mut self, attribute: AttributeId, parts: Option<Arc<[f32]>>) {
        let version = self.tick();
        let state = self.attributes.get_mut(attribute.0 as usize);
        state.parts = parts;
        state.touch(version);
        self.attributes_changed = version;
    }

    /// Sets a user's learned vector; `None` removes it. A user without one counts as having
    /// a zero vector. `edges` are all edges the user has now, as [`Self::on_edge`] was told.
    /// Fails, with nothing changed, on a wrong length or a number that is not finite. Costs
    /// one product with the first layer's weights and O(edges · hidden).
    pub fn set_user_feature(
        &mut self,
        user: UserId,
        feature: Option<&[f32]>,
        edges: &[(AttributeId, Sign)],
    ) -> Result<(), SageError> {
        let expected = self.encoder.config().in_dim_user;
        check_feature("a user's feature", feature, expected)?;
        let parts = feature.map(|x| parts_of_user(&self.encoder, self.level, x));
        self.set_user_parts(user, parts, edges);
        Ok(())
    }

    /// [`Self::set_user_feature`] of many users, one after the other, but many times faster:
    /// their products are made together, on `threads` threads. `edges_of` appends a user's
    /// edges. Fails with nothing changed.
    pub fn set_user_features(
        &mut self,
        features: &[(UserId, &[f32])],
        edges_of: impl Fn(UserId, &mut Vec<(AttributeId, Sign)>),
        threads: usize,
    ) -> Result<(), SageError> {
        let expected = self.encoder.config().in_dim_user;
        for (_, feature) in features {
            check_feature("a user's feature", Some(feature), expected)?;
        }
        let parts = parts_of_many(&self.encoder.user_in, self.level, features, threads);
        let mut edges = Vec::new();
        for ((user, _), parts) in features.iter().zip(parts) {
            edges.clear();
            edges_of(*user, &mut edges);
            self.set_user_parts(*user, parts, &edges);
        }
        Ok(())
    }

    fn set_user_parts(
        &mut self,
        user: UserId,
        parts: Option<Arc<[f32]>>,
        edges: &[(AttributeId, Sign)],
    ) {
        let version = self.tick();
        *self.users.get_mut(user.0 as usize) = version;
        let old = self.learned_parts(user).cloned();
        if old.is_none() && parts.is_none() {
            return;
        }
        *self.learned.get_mut(user.0 as usize) = parts.clone();
        for &(attribute, sign) in edges {
            let relation = self.relation(sign);
            let state = self.attributes.get_mut(attribute.0 as usize);
            if let Some(old) = &old {
                state.take(self.level, &self.encoder, relation, old);
            }
            if let Some(parts) = &parts {
                state.add(self.level, &self.encoder, relation, parts);
            }
            state.touch(version);
        }
        self.attributes_changed = version;
    }

    /// Takes in that the edge between user and attribute was `old` and is `new`. Costs
    /// O(hidden) at most, whatever the degrees.
    pub fn on_edge(
        &mut self,
        user: UserId,
        attribute: AttributeId,
        old: Option<Sign>,
        new: Option<Sign>,
    ) {
        let old = old.map(|sign| self.relation(sign));
        let new = new.map(|sign| self.relation(sign));
        if old == new {
            return;
        }
        let version = self.tick();
        #[cfg(feature = "planted")]
        let before = *self.users.get_mut(user.0 as usize);
        *self.users.get_mut(user.0 as usize) = version;
        #[cfg(feature = "planted")]
        if crate::log::planted::is("forget-one-cache") {
            *self.users.get_mut(user.0 as usize) = before;
        }
        let learned = self.learned_parts(user).cloned();
        let state = self.attributes.get_mut(attribute.0 as usize);
        let mattered = state.sums.is_some();
        if let Some(relation) = old {
            state.degree[relation] = state.degree[relation].saturating_sub(1);
        }
        if let Some(relation) = new {
            state.degree[relation] += 1;
        }
        if let Some(parts) = &learned {
            if let Some(relation) = old {
                state.take(self.level, &self.encoder, relation, parts);
            }
            if let Some(relation) = new {
                state.add(self.level, &self.encoder, relation, parts);
            }
        }
        // Without learned users the hidden layer does not depend on degrees.
        if mattered || state.sums.is_some() {
            state.touch(version);
            self.attributes_changed = version;
        }
    }

    /// Takes in the edges of a whole graph, none of which was there: [`Self::on_edge`] for each,
    /// but many times faster, on `threads` threads. `users` are those with edges; `posting`
    /// gives the users with an edge of a sign to an attribute, and there are `attributes`.
    pub fn load_edges<P: Iterator<Item = UserId>>(
        &mut self,
        users: impl IntoIterator<Item = UserId>,
        attributes: u32,
        posting: impl Fn(AttributeId, Sign) -> P + Sync,
        threads: usize,
    ) {
        let version = self.tick();
        for user in users {
            *self.users.get_mut(user.0 as usize) = version;
        }
        let hidden = self.encoder.config().hidden;
        let numbers = Mutex::new(0..attributes);
        let loaded = Mutex::new(Vec::with_capacity(attributes as usize));
        threads::run(threads, || {
            while let Some(number) = threads::next(&numbers) {
                let mut state = Attribute::default();
                for sign in [Sign::Like, Sign::Dislike] {
                    let relation = self.relation(sign);
                    let users: Vec<UserId> = posting(AttributeId(number), sign).collect();
                    state.degree[relation] += users.len() as u32;
                    let learned = users.iter().filter_map(|user| self.learned_parts(*user));
                    let learned: Vec<&[f32]> = learned.map(|parts| parts.as_ref()).collect();
                    for (i, parts) in learned.iter().enumerate() {
                        // Users of one attribute are far from each other in memory.
                        if let Some(later) = learned.get(i + 4) {
                            let message = &later[(1 + relation) * hidden..][..hidden];
                            message.chunks(16).for_each(|line| prefetch(line.as_ptr()));
                        }
                        state.add(self.level, &self.encoder, relation, parts);
                    }
                }
                let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
                loaded.push((number, state.degree, state.sums));
            }
        });
        for (number, degree, sums) in loaded.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let state = self.attributes.get_mut(number as usize);
            (state.degree, state.sums) = (degree, sums);
            // Without learned users the hidden layer does not depend on degrees.
            if state.sums.is_some() {
                state.touch(version);
                self.attributes_changed = version;
            }
        }
    }

    /// The user's embedding, of length `out`. `edges` are the user's edges of this moment,
    /// as [`Self::on_edge`] was told, in any order.
    pub fn embedding(&self, user: UserId, edges: &[(AttributeId, Sign)]) -> Vec<f32> {
        if let Some(entry) = self.cached(user, || edges) {
            return entry.vector.to_vec();
        }
        let mut input = vec![0.0; self.encoder.user_out.inputs()];
        self.gather(user, edges, &mut self.scratch().sums, &mut input);
        let vector = self.encoder.user_out.apply(self.level, &input);
        self.remember(user, &vector);
        vector
    }

    /// The embeddings of many users, (users, out) row by row, on `threads` threads: the same
    /// bits as [`Self::embedding`] of each. `edges_of` appends a user's edges.
    pub fn embeddings(
        &self,
        users: &[UserId],
        edges_of: impl Fn(UserId, &mut Vec<(AttributeId, Sign)>) + Sync,
        threads: usize,
    ) -> Vec<f32> {
        let out = self.encoder.config().out;
        let mut vectors = vec![0.0; users.len() * out];
        let blocks = users.chunks(BATCH).zip(vectors.chunks_mut(BATCH * out));
        let blocks = Mutex::new(blocks);
        threads::run(threads, || {
            let mut scratch = self.scratch();
            while let Some((users, vectors)) = threads::next(&blocks) {
                self.embed_block(users, &edges_of, &mut scratch, vectors);
            }
        });
        vectors
    }

    /// The `k` users among `users` whose embeddings have the greatest cosine with `user`'s:
    /// exact, cosine falling, ties by `tie`; `user` itself is left out. A zero embedding has
    /// cosine 0 with all. `edges_of` appends a user's edges.
    pub fn top_by_cosine(
        &self,
        user: UserId,
        users: &[UserId],
        k: usize,
        edges_of: impl Fn(UserId, &mut Vec<(AttributeId, Sign)>) + Sync,
        tie: impl Fn(UserId, UserId) -> Ordering,
        threads: usize,
    ) -> Vec<(UserId, f64)> {
        let out = self.encoder.config().out;
        let target = self.embeddings(&[user], &edges_of, 1);
        let blocks = Mutex::new(users.chunks(BATCH));
        let scored = Mutex::new(Vec::with_capacity(users.len()));
        threads::run(threads, || {
            let (mut scratch, mut vectors) = (self.scratch(), vec![0.0; BATCH * out]);
            while let Some(users) = threads::next(&blocks) {
                let vectors = &mut vectors[..users.len() * out];
                self.embed_block(users, &edges_of, &mut scratch, vectors);
                let rows = users.iter().zip(vectors.chunks_exact(out));
                let others = rows.filter(|(other, _)| **other != user);
                let scores = others.map(|(&u, row)| (u, cosine(self.level, &target, row)));
                let mut scored = scored.lock().unwrap_or_else(PoisonError::into_inner);
                scored.extend(scores);
            }
        });
        let mut scored = scored.into_inner().unwrap_or_else(PoisonError::into_inner);
        let order =
            |a: &(UserId, f64), b: &(UserId, f64)| b.1.total_cmp(&a.1).then_with(|| tie(a.0, b.0));
        if k < scored.len() {
            scored.select_nth_unstable_by(k, order);
            scored.truncate(k);
        }
        scored.sort_unstable_by(order);
        scored
    }

    fn relation(&self, sign: Sign) -> usize {
        self.encoder.config().relations.of(sign)
    }

    fn learned_parts(&self, user: UserId) -> Option<&Arc<[f32]>> {
        self.learned.get(user.0 as usize)?.as_ref()
    }

    /// The next version. A clone that changes although it is not the newest of its line gets
    /// a cache of its own, since versions of two lines cannot be compared.
    fn tick(&mut self) -> u64 {
        let next = self.version + 1;
        let newest = &self.cache.newest;
        if newest
            .compare_exchange(self.version, next, Relaxed, Relaxed)
            .is_err()
        {
            let out = self.encoder.config().out;
            self.cache = Arc::new(Cache::new(self.cache_bytes, out, next));
        }
        self.version = next;
        next
    }

    /// The cached answer, if it is right at this moment.
    fn cached<'e>(
        &self,
        user: UserId,
        edges: impl FnOnce() -> &'e [(AttributeId, Sign)],
    ) -> Option<Entry> {
        let entry = self.cache.get(user)?;
        let as_of = entry.version;
        let unchanged = |version: Option<&u64>| version.is_none_or(|&v| v <= as_of);
        if as_of > self.version || !unchanged(self.users.get(user.0 as usize)) {
            return None;
        }
        let attribute = |a: AttributeId| {
            self.attributes
                .get(a.0 as usize)
                .map(|state| &state.version)
        };
        let right = self.attributes_changed <= as_of
            || edges().iter().all(|&(a, _)| unchanged(attribute(a)));
        right.then_some(entry)
    }

    fn remember(&self, user: UserId, vector: &[f32]) {
        self.cache.put(Entry {
            user,
            version: self.version,
            vector: vector.into(),
        });
    }

    fn scratch(&self) -> Scratch {
        let config = self.encoder.config();
        Scratch {
            sums: vec![0; 2 * self.encoder.relations() * config.hidden],
            edges: Vec::new(),
        }
    }

    /// One block of a batch: cached answers where they are right, the rest together.
    fn embed_block(
        &self,
        users: &[UserId],
        edges_of: &(impl Fn(UserId, &mut Vec<(AttributeId, Sign)>) + Sync),
        scratch: &mut Scratch,
        vectors: &mut [f32],
    ) {
        let (out, width) = (self.encoder.config().out, self.encoder.user_out.inputs());
        let (mut missing, mut inputs) = (Vec::new(), Vec::new());
        let Scratch { sums, edges } = scratch;
        for (row, &user) in users.iter().enumerate() {
            edges.clear();
            let cached = self.cached(user, || {
                edges_of(user, edges);
                edges
            });
            if let Some(entry) = cached {
                vectors[row * out..][..out].copy_from_slice(&entry.vector);
                continue;
            }
            edges.clear();
            edges_of(user, edges);
            inputs.resize((missing.len() + 1) * width, 0.0);
            self.gather(user, edges, sums, &mut inputs[missing.len() * width..]);
            missing.push(row);
        }
        let fresh = self.encoder.user_out.apply_many(self.level, &inputs);
        for (&row, vector) in missing.iter().zip(fresh.chunks_exact(out)) {
            self.remember(users[row], vector);
            vectors[row * out..][..out].copy_from_slice(vector);
        }
    }

    /// What the last product takes: per relation the mean hidden layer of the user's
    /// attributes, then the user's own hidden layer.
    fn gather(
        &self,
        user: UserId,
        edges: &[(AttributeId, Sign)],
        sums: &mut [i64],
        input: &mut [f32],
    ) {
        let (hidden, relations) = (self.encoder.config().hidden, self.encoder.relations());
        let mut counts = [0u32; 2];
        sums.fill(0);
        let (hidden_sums, message_sums) = sums.split_at_mut(relations * hidden);
        for &(attribute, sign) in edges {
            let relation = self.relation(sign);
            counts[relation] += 1;
            let state = self.attributes.get(attribute.0 as usize);
            let parts = state.and_then(|s| s.parts.as_ref()).unwrap_or(&self.blank);
            let sum = &mut hidden_sums[relation * hidden..][..hidden];
            match state.and_then(|s| Some((s, s.sums.as_ref()?))) {
                None => kernel::add_relu(self.level, sum, &parts[..hidden]),
                Some((state, sums)) => {
                    let made =
                        || hidden_layer(self.level, parts, &sums.totals, state.degree, hidden);
                    kernel::add(self.level, sum, sums.hidden.get_or_init(made));
                }
            }
            let message = &parts[(1 + relation) * hidden..][..hidden];
            let sum = &mut message_sums[relation * hidden..][..hidden];
            kernel::add(self.level, sum, message);
        }
        let learned = self.learned_parts(user).map(|parts| &parts[..hidden]);
        finish_input(self.level, &self.encoder, learned, sums, counts, input);
    }
}

impl Attribute {
    /// Marks a change to the hidden layer or message.
    fn touch(&mut self, version: u64) {
        self.version = version;
        if let Some(sums) = &mut self.sums {
            Arc::make_mut(sums).hidden = OnceLock::new();
        }
    }

    /// Adds a learned user's message.
    fn add(&mut self, level: Level, encoder: &Encoder, relation: usize, parts: &[f32]) {
        let hidden = encoder.config().hidden;
        let sums = self.sums.get_or_insert_with(|| {
            Arc::new(Sums {
                users: 0,
                totals: vec![0; encoder.relations() * hidden],
                hidden: OnceLock::new(),
            })
        });
        let sums = Arc::make_mut(sums);
        sums.users += 1;
        let total = &mut sums.totals[relation * hidden..][..hidden];
        kernel::add(level, total, &parts[(1 + relation) * hidden..][..hidden]);
    }

    /// Takes a learned user's message back.
    fn take(&mut self, level: Level, encoder: &Encoder, relation: usize, parts: &[f32]) {
        let hidden = encoder.config().hidden;
        let Some(sums) = &mut self.sums else { return };
        if sums.users == 1 {
            self.sums = None;
            return;
        }
        let sums = Arc::make_mut(sums);
        sums.users -= 1;
        let total = &mut sums.totals[relation * hidden..][..hidden];
        kernel::take(level, total, &parts[(1 + relation) * hidden..][..hidden]);
    }
}

/// The embeddings of all users, computed from features and edges alone, row by row: what
/// every incremental answer must equal bit for bit. Users are numbered along
/// `user_features`, attributes along `attribute_features`; edges beyond them, or given
/// twice, are the caller's mistake (the first kind is passed over).
pub fn embed_all_from_nothing(
    encoder: &Encoder,
    attribute_features: &[Option<Vec<f32>>],
    user_features: &[Option<Vec<f32>>],
    edges: &[(UserId, AttributeId, Sign)],
) -> Result<Vec<Vec<f32>>, SageError> {
    let (level, config) = (Level::best(), encoder.config());
    let (hidden, relations) = (config.hidden, encoder.relations());
    let mut attribute_parts = Vec::new();
    for feature in attribute_features.iter().map(Option::as_deref) {
        check_feature("an attribute's feature", feature, config.in_dim_attribute)?;
        attribute_parts.push(parts_of_attribute(encoder, level, feature));
    }
    let mut user_parts = Vec::new();
    for feature in user_features.iter().map(Option::as_deref) {
        check_feature("a user's feature", feature, config.in_dim_user)?;
        user_parts.push(feature.map(|x| parts_of_user(encoder, level, x)));
    }
    let known = |&&(user, attribute, _): &&(UserId, AttributeId, Sign)| {
        (user.0 as usize) < user_parts.len() && (attribute.0 as usize) < attribute_parts.len()
    };
    let edges: Vec<_> = edges.iter().filter(known).collect();

    let mut totals = vec![vec![0i64; relations * hidden]; attribute_parts.len()];
    let mut degrees = vec![[0u32; 2]; attribute_parts.len()];
    for &&(user, attribute, sign) in &edges {
        let (a, relation) = (attribute.0 as usize, config.relations.of(sign));
        degrees[a][relation] += 1;
        if let Some(parts) = &user_parts[user.0 as usize] {
            let total = &mut totals[a][relation * hidden..][..hidden];
            kernel::add(level, total, &parts[(1 + relation) * hidden..][..hidden]);
        }
    }
    let hidden_layers: Vec<_> = (0..attribute_parts.len())
        .map(|a| hidden_layer(level, &attribute_parts[a], &totals[a], degrees[a], hidden))
        .collect();

    let mut of_user = vec![Vec::new(); user_parts.len()];
    for &&(user, attribute, sign) in &edges {
        of_user[user.0 as usize].push((attribute.0 as usize, config.relations.of(sign)));
    }
    let embed = |own: Option<&[f32]>, edges: &[(usize, usize)]| {
        let mut sums = vec![0i64; 2 * relations * hidden];
        let mut counts = [0u32; 2];
        for &(a, relation) in edges {
            counts[relation] += 1;
            let sum = &mut sums[relation * hidden..][..hidden];
            kernel::add(level, sum, &hidden_layers[a]);
            let sum = &mut sums[(relations + relation) * hidden..][..hidden];
            let message = &attribute_parts[a][(1 + relation) * hidden..][..hidden];
            kernel::add(level, sum, message);
        }
        let mut input = vec![0.0; encoder.user_out.inputs()];
        let own = own.map(|parts| &parts[..hidden]);
        finish_input(level, encoder, own, &sums, counts, &mut input);
        encoder.user_out.apply(level, &input)
    };
    let users = user_parts.iter().zip(&of_user);
    Ok(users
        .map(|(own, edges)| embed(own.as_deref(), edges))
        .collect())
}

fn check_feature(
    what: &'static str,
    feature: Option<&[f32]>,
    expected: usize,
) -> Result<(), SageError> {
    let Some(feature) = feature else {
        return Ok(());
    };
    if feature.len() != expected {
        let got = feature.len();
        return Err(SageError::Length {
            what,
            got,
            expected,
        });
    }
    encoder::check_values(&|| what.to_string(), feature)
}

/// [root | message per relation] of an attribute, from its feature.
fn parts_of_attribute(encoder: &Encoder, level: Level, feature: Option<&[f32]>) -> Arc<[f32]> {
    let zero;
    let feature = match feature {
        Some(feature) => feature,
        None => {
            zero = vec![0.0; encoder.config().in_dim_attribute];
            &zero
        }
    };
    limited(encoder.attribute_in.apply(level, feature))
}

/// [root | message per relation] of a user, from its learned feature.
fn parts_of_user(encoder: &Encoder, level: Level, feature: &[f32]) -> Arc<[f32]> {
    limited(encoder.user_in.apply(level, feature))
}

/// The parts of many attributes or users, from features of the right length: the same bits as
/// one by one.
fn parts_of_many<I: Sync>(
    panels: &kernel::Panels,
    level: Level,
    features: &[(I, &[f32])],
    threads: usize,
) -> Vec<Option<Arc<[f32]>>> {
    let mut parts = vec![None; features.len()];
    let blocks = Mutex::new(features.chunks(BATCH).zip(parts.chunks_mut(BATCH)));
    threads::run(threads.min(features.len().div_ceil(BATCH)), || {
        while let Some((features, parts)) = threads::next(&blocks) {
            // Without inputs there is nothing to tell rows apart by.
            if panels.inputs() == 0 {
                parts.fill_with(|| Some(limited(panels.apply(level, &[]))));
                continue;
            }
            let rows: Vec<&[f32]> = features.iter().map(|(_, feature)| *feature).collect();
            let products = panels.apply_many(level, &rows.concat());
            let width = products.len() / features.len();
            for (part, product) in parts.iter_mut().zip(products.chunks_exact(width)) {
                *part = Some(limited(product.to_vec()));
            }
        }
    });
    parts
}

fn limited(mut parts: Vec<f32>) -> Arc<[f32]> {
    kernel::limit(&mut parts);
    parts.into()
}

/// An attribute's hidden layer: relu(root + mean message of its users, per relation).
fn hidden_layer(
    level: Level,
    parts: &[f32],
    totals: &[i64],
    degree: [u32; 2],
    hidden: usize,
) -> Box<[f32]> {
    let mut values = parts[..hidden].to_vec();
    for (total, count) in totals.chunks_exact(hidden).zip(degree) {
        kernel::add_mean(level, &mut values, total, count);
    }
    kernel::relu(&mut values);
    values.into()
}

/// From a user's sums to what the last product takes.
fn finish_input(
    level: Level,
    encoder: &Encoder,
    learned_root: Option<&[f32]>,
    sums: &[i64],
    counts: [u32; 2],
    input: &mut [f32],
) {
    let (hidden, relations) = (encoder.config().hidden, encoder.relations());
    input.fill(0.0);
    let (means, own) = input.split_at_mut(relations * hidden);
    let (hidden_sums, message_sums) = sums.split_at(relations * hidden);
    own.copy_from_slice(&encoder.user_bias);
    for (value, root) in own.iter_mut().zip(learned_root.unwrap_or_default()) {
        *value += root;
    }
    for (relation, count) in (0..relations).zip(counts) {
        let slot = relation * hidden..(relation + 1) * hidden;
        kernel::add_mean(
            level,
            &mut means[slot.clone()],
            &hidden_sums[slot.clone()],
            count,
        );
        kernel::add_mean(level, own, &message_sums[slot], count);
    }
    kernel::relu(own);
}

/// The cosine of two vectors; 0 if either is zero.
fn cosine(level: Level, a: &[f32], b: &[f32]) -> f64 {
    let (mut parts, mut own) = ([0.0; 2], [0.0; 2]);
    kernel::dot_and_square(level, a, b, &mut parts);
    kernel::dot_and_square(level, a, a, &mut own);
    let norms = (parts[1] * own[1]).sqrt();
    if norms == 0.0 { 0.0 } else { parts[0] / norms }
}
