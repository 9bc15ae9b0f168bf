//! What `sage` promises, tested.

use super::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use simpatico_schema::random::Philox;
use std::collections::{BTreeMap, HashMap};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn golden(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/sage/");
    std::fs::read(format!("{folder}{name}.safetensors")).unwrap()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data().to_vec();
    let words = data.as_chunks::<4>().0.iter();
    words.map(|w| f32::from_le_bytes(*w)).collect()
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let data = file.tensor(name).unwrap().data().to_vec();
    let words = data.as_chunks::<8>().0.iter();
    words.map(|w| i64::from_le_bytes(*w)).collect()
}

fn save(config: &str, tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .values()
        .map(|(_, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, (shape, _)), data)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), data).unwrap();
            (name.clone(), view)
        });
    let metadata = HashMap::from([("simpatico".to_string(), config.to_string())]);
    serialize(views, Some(metadata)).unwrap()
}

fn config(relations: Relations, dims: [usize; 4]) -> String {
    let [in_dim_attribute, in_dim_user, hidden, out] = dims;
    let config = EncoderConfig {
        version: ENCODER_VERSION,
        in_dim_attribute,
        in_dim_user,
        hidden,
        out,
        relations,
    };
    serde_json::to_string(&config).unwrap()
}

/// Random weights under PyG's names.
fn random_weights(relations: Relations, dims: [usize; 4], random: &mut Philox) -> Tensors {
    let [attribute, user, hidden, out] = dims;
    let mut tensors = Tensors::new();
    for name in relations.names() {
        for (layer, ends, from, to, rows) in [
            ("c1", format!("user__{name}__attr"), user, attribute, hidden),
            (
                "c1",
                format!("attr__rev_{name}__user"),
                attribute,
                user,
                hidden,
            ),
            ("c2", format!("attr__rev_{name}__user"), hidden, hidden, out),
        ] {
            let mut put = |tensor: &str, shape: Vec<usize>| {
                let numbers = random.normals(shape.iter().product());
                let numbers = numbers.iter().map(|x| x * 0.3).collect();
                tensors.insert(format!("{layer}.{ends}.{tensor}"), (shape, numbers));
            };
            put("lin_l.bias", vec![rows]);
            if from > 0 {
                put("lin_l.weight", vec![rows, from]);
            }
            if to > 0 {
                put("lin_r.weight", vec![rows, to]);
            }
        }
    }
    tensors
}

fn random_encoder(relations: Relations, dims: [usize; 4], random: &mut Philox) -> Arc<Encoder> {
    let tensors = random_weights(relations, dims, random);
    let bytes = save(&config(relations, dims), &tensors);
    Arc::new(Encoder::from_bytes(&bytes).unwrap())
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|x| x.to_bits()).collect()
}

fn assert_near(ours: &[f32], reference: &[f32]) {
    assert_eq!(ours.len(), reference.len());
    for (i, (a, b)) in ours.iter().zip(reference).enumerate() {
        assert!((a - b).abs() < 1e-5, "number {i}: {a}, PyG has {b}");
    }
}

/// A Sage with these rows as features (zero rows: none) and these edges, event by event.
fn build(
    encoder: &Arc<Encoder>,
    users: &[Vec<f32>],
    attributes: &[Vec<f32>],
    edges: &[(UserId, AttributeId, Sign)],
) -> Sage {
    let mut sage = Sage::new(encoder.clone());
    for (id, x) in (0..).zip(users) {
        if x.iter().any(|v| *v != 0.0) {
            sage.set_user_feature(UserId(id), Some(x), &[]).unwrap();
        }
    }
    for &(user, attribute, sign) in edges {
        sage.on_edge(user, attribute, None, Some(sign));
    }
    for (id, x) in (0..).zip(attributes) {
        sage.set_attribute_feature(AttributeId(id), Some(x))
            .unwrap();
    }
    sage
}

fn rows(flat: &[f32], width: usize) -> Vec<Vec<f32>> {
    flat.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn edges_of(edges: &[(UserId, AttributeId, Sign)], user: UserId) -> Vec<(AttributeId, Sign)> {
    let own = edges.iter().filter(|e| e.0 == user);
    own.map(|e| (e.1, e.2)).collect()
}

#[test]
fn embeddings_match_pyg_on_its_oracle() {
    let bytes = golden("pyg_sage_oracle");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = Tensors::new();
    for name in file.names() {
        if let Some(own) = name.strip_prefix("het.") {
            let shape = file.tensor(name).unwrap().shape().to_vec();
            tensors.insert(own.to_string(), (shape, floats(&file, name)));
        }
    }
    let bytes = save(&config(Relations::Separated, [6, 6, 8, 8]), &tensors);
    let encoder = Arc::new(Encoder::from_bytes(&bytes).unwrap());
    let mut edges = Vec::new();
    for (name, sign) in [("like", Sign::Like), ("dis", Sign::Dislike)] {
        let pairs = integers(&file, name);
        let (users, attributes) = pairs.split_at(pairs.len() / 2);
        for (&u, &a) in users.iter().zip(attributes) {
            edges.push((UserId(u as u32), AttributeId(a as u32), sign));
        }
    }
    let users = rows(&floats(&file, "xu"), 6);
    let attributes = rows(&floats(&file, "xa"), 6);
    let sage = build(&encoder, &users, &attributes, &edges);
    let reference = floats(&file, "het_out.user");
    for (id, expected) in (0..).zip(reference.chunks_exact(8)) {
        let user = UserId(id);
        assert_near(&sage.embedding(user, &edges_of(&edges, user)), expected);
    }
}

#[test]
fn embeddings_match_pyg_in_both_forms_with_new_users_and_lonely_ones() {
    for name in ["separated", "blind"] {
        let bytes = golden(name);
        let encoder = Arc::new(Encoder::from_bytes(&bytes).unwrap());
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let users = rows(&floats(&file, "x_user"), 5);
        let attributes = rows(&floats(&file, "x_attribute"), 9);
        let mut edges = Vec::new();
        for (i, sign) in integers(&file, "sign").into_iter().enumerate() {
            let ends = (UserId(i as u32 / 30), AttributeId(i as u32 % 30));
            match sign {
                1 => edges.push((ends.0, ends.1, Sign::Like)),
                -1 => edges.push((ends.0, ends.1, Sign::Dislike)),
                _ => {}
            }
        }
        let sage = build(&encoder, &users, &attributes, &edges);
        let reference = floats(&file, "embedding");
        for (id, expected) in (0..).zip(reference.chunks_exact(12)) {
            let user = UserId(id);
            assert_near(&sage.embedding(user, &edges_of(&edges, user)), expected);
        }
    }
}

/// A plain copy of everything a Sage was told.
#[derive(Clone, Default)]
struct Model {
    edges: BTreeMap<(u32, u32), Sign>,
    users: BTreeMap<u32, Vec<f32>>,
    attributes: BTreeMap<u32, Vec<f32>>,
}

const USERS: u32 = 5;
const ATTRIBUTES: u32 = 6;

impl Model {
    fn own_edges(&self, user: u32) -> Vec<(AttributeId, Sign)> {
        let range = self.edges.range((user, 0)..=(user, u32::MAX));
        range
            .map(|(key, sign)| (AttributeId(key.1), *sign))
            .collect()
    }

    fn recomputed(&self, encoder: &Encoder) -> Vec<Vec<f32>> {
        let users: Vec<_> = (0..USERS).map(|u| self.users.get(&u).cloned()).collect();
        let attributes = (0..ATTRIBUTES).map(|a| self.attributes.get(&a).cloned());
        let attributes: Vec<_> = attributes.collect();
        let edges = self
            .edges
            .iter()
            .map(|(k, s)| (UserId(k.0), AttributeId(k.1), *s));
        let edges: Vec<_> = edges.collect();
        embed_all_from_nothing(encoder, &attributes, &users, &edges).unwrap()
    }

    /// A Sage that took all of this in at once; the vectors in two goes, the second after the
    /// edges.
    fn loaded(&self, encoder: &Arc<Encoder>, cache_bytes: usize, random: &mut Philox) -> Sage {
        let mut sage = Sage::with_cache(encoder.clone(), cache_bytes);
        let of = |user: UserId, edges: &mut Vec<_>| edges.extend(self.own_edges(user.0));
        let (late_users, late) = (random.below(USERS), random.below(ATTRIBUTES));
        let users = self.users.iter().map(|(u, x)| (UserId(*u), x.as_slice()));
        let (first, then): (Vec<_>, Vec<_>) = users.partition(|(u, _)| u.0 < late_users);
        sage.set_user_features(&first, |_, _| (), 2).unwrap();
        let attributes = self.attributes.iter();
        let attributes = attributes.map(|(a, x)| (AttributeId(*a), x.as_slice()));
        let (early, later): (Vec<_>, Vec<_>) = attributes.partition(|(a, _)| a.0 < late);
        sage.set_attribute_features(&early, 1).unwrap();
        let posting = |attribute: AttributeId, sign| {
            let edges = self.edges.iter();
            let these = edges.filter(move |(key, s)| key.1 == attribute.0 && **s == sign);
            these.map(|(key, _)| UserId(key.0))
        };
        sage.load_edges((0..USERS).map(UserId), ATTRIBUTES, posting, 2);
        sage.set_attribute_features(&later, 2).unwrap();
        sage.set_user_features(&then, of, 1).unwrap();
        sage
    }

    /// Every user's embedding, alone and in a batch, is the recomputed one.
    fn assert_equal(&self, sage: &Sage) {
        let expected = self.recomputed(sage.encoder());
        for (user, expected) in (0..).zip(&expected) {
            let ours = sage.embedding(UserId(user), &self.own_edges(user));
            assert_eq!(bits(&ours), bits(expected), "user {user}");
        }
        let users: Vec<_> = (0..USERS).map(UserId).collect();
        let batch = sage.embeddings(&users, |u, to| to.extend(self.own_edges(u.0)), 1);
        assert_eq!(bits(&batch), bits(&expected.concat()));
    }
}

fn random_feature(dim: usize, random: &mut Philox) -> Option<Vec<f32>> {
    (dim > 0 && random.below(4) > 0).then(|| random.normals(dim))
}

/// One random event or feature, told to both.
fn step(sage: &mut Sage, model: &mut Model, random: &mut Philox) {
    let (user, attribute) = (random.below(USERS), random.below(ATTRIBUTES));
    let dims = sage.encoder().config().clone();
    match random.below(12) {
        0 => {
            let feature = random_feature(dims.in_dim_user, random);
            let edges = model.own_edges(user);
            sage.set_user_feature(UserId(user), feature.as_deref(), &edges)
                .unwrap();
            match feature {
                Some(x) => model.users.insert(user, x),
                None => model.users.remove(&user),
            };
        }
        1 => {
            let feature = random_feature(dims.in_dim_attribute, random);
            sage.set_attribute_feature(AttributeId(attribute), feature.as_deref())
                .unwrap();
            match feature {
                Some(x) => model.attributes.insert(attribute, x),
                None => model.attributes.remove(&attribute),
            };
        }
        kind => {
            let key = (user, attribute);
            let old = model.edges.get(&key).copied();
            let new = match kind {
                2..=5 => Some(Sign::Like),
                6..=8 => Some(Sign::Dislike),
                _ => None,
            };
            sage.on_edge(UserId(user), AttributeId(attribute), old, new);
            match new {
                Some(sign) => model.edges.insert(key, sign),
                None => model.edges.remove(&key),
            };
        }
    }
}

#[test]
fn thousands_of_random_histories_equal_a_recomputation_from_nothing_bit_for_bit() {
    for history in 0..3000u64 {
        let mut random = Philox::new(11, history);
        let relations = match history % 3 {
            0 => Relations::Blind,
            _ => Relations::Separated,
        };
        let in_dim_user = if history % 4 == 0 { 0 } else { 3 };
        let dims = [4, in_dim_user, 1 + (history % 7) as usize, 5];
        let encoder = random_encoder(relations, dims, &mut random);
        // Caches of no, two and many slots.
        let bytes = [0, 170, 1 << 16][history as usize % 3];
        let mut sage = Sage::with_cache(encoder, bytes);
        let mut model = Model::default();
        let mut kept = Vec::new();
        for _ in 0..25 {
            step(&mut sage, &mut model, &mut random);
            if random.below(16) == 0 {
                sage = model.loaded(sage.encoder(), bytes, &mut random);
            }
            if random.below(4) == 0 {
                model.assert_equal(&sage);
            }
            if random.below(8) == 0 {
                kept.push((sage.clone(), model.clone()));
            }
        }
        model.assert_equal(&sage);
        // Snapshots still see their moment, read after the writer went on and filled the
        // cache they share; and one of them goes its own way.
        for (snapshot, model) in &kept {
            model.assert_equal(snapshot);
        }
        if let Some((mut fork, mut forked)) = kept.pop() {
            for _ in 0..5 {
                step(&mut fork, &mut forked, &mut random);
                step(&mut sage, &mut model, &mut random);
                forked.assert_equal(&fork);
                model.assert_equal(&sage);
            }
        }
    }
}

#[test]
fn numbering_and_order_of_arrival_do_not_change_a_bit() {
    let mut random = Philox::new(12, 0);
    let encoder = random_encoder(Relations::Separated, [7, 5, 70, 66], &mut random);
    let (users, attributes) = (60u32, 40u32);
    let mut edges = Vec::new();
    for user in 0..users {
        for attribute in 0..attributes {
            match random.below(6) {
                0 => edges.push((user, attribute, Sign::Dislike)),
                1 | 2 => edges.push((user, attribute, Sign::Like)),
                _ => {}
            }
        }
    }
    let of_user: Vec<_> = (0..users).map(|_| random_feature(5, &mut random)).collect();
    let of_attribute: Vec<_> = (0..attributes).map(|_| random.normals(7)).collect();
    let mut answers = Vec::new();
    for arrival in 0..4 {
        let mut random = Philox::new(13, arrival);
        let (mut new_user, mut new_attribute) = (
            (0..users).collect::<Vec<_>>(),
            (0..attributes).collect::<Vec<_>>(),
        );
        random.shuffle(&mut new_user);
        random.shuffle(&mut new_attribute);
        random.shuffle(&mut edges);
        let told: Vec<_> = edges
            .iter()
            .map(|&(u, a, s)| {
                let user = UserId(new_user[u as usize]);
                (user, AttributeId(new_attribute[a as usize]), s)
            })
            .collect();
        let mut sage = Sage::new(encoder.clone());
        for (a, x) in new_attribute.iter().zip(&of_attribute) {
            sage.set_attribute_feature(AttributeId(*a), Some(x))
                .unwrap();
        }
        let (before, after) = told.split_at(told.len() / 2);
        for &(user, attribute, sign) in before {
            sage.on_edge(user, attribute, None, Some(sign.other()));
            sage.on_edge(user, attribute, Some(sign.other()), Some(sign));
        }
        for (u, x) in new_user.iter().zip(&of_user) {
            let own = edges_of(before, UserId(*u));
            sage.set_user_feature(UserId(*u), x.as_deref(), &own)
                .unwrap();
        }
        for &(user, attribute, sign) in after {
            sage.on_edge(user, attribute, None, Some(sign));
        }
        let ids: Vec<_> = new_user.iter().map(|&u| UserId(u)).collect();
        let all = sage.embeddings(&ids, |u, to| to.extend(edges_of(&told, u)), 2);
        answers.push(bits(&all));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
}

trait Other {
    fn other(self) -> Self;
}

impl Other for Sign {
    fn other(self) -> Self {
        match self {
            Self::Like => Self::Dislike,
            Self::Dislike => Self::Like,
        }
    }
}

#[test]
fn the_cache_answers_only_while_nothing_it_rests_on_has_changed() {
    let mut random = Philox::new(14, 0);
    let encoder = random_encoder(Relations::Separated, [3, 3, 4, 4], &mut random);
    let mut sage = Sage::new(encoder);
    let (ada, bob, oak) = (UserId(0), UserId(1), AttributeId(0));
    let liked = [(oak, Sign::Like)];
    sage.on_edge(ada, oak, None, Some(Sign::Like));
    sage.embedding(ada, &liked);
    let hit = |sage: &Sage| sage.cached(ada, || &liked).is_some();
    assert!(hit(&sage));
    // A new user at the same attribute has no message, so the answer stays right ...
    sage.on_edge(bob, oak, None, Some(Sign::Dislike));
    assert!(hit(&sage));
    // ... until it gets a learned feature.
    sage.set_user_feature(bob, Some(&[1.0, 2.0, 3.0]), &[(oak, Sign::Dislike)])
        .unwrap();
    assert!(!hit(&sage));
    sage.embedding(ada, &liked);
    assert!(hit(&sage));
    // Nor does a change elsewhere matter.
    sage.set_attribute_feature(AttributeId(7), Some(&[1.0; 3]))
        .unwrap();
    assert!(hit(&sage));
    sage.set_attribute_feature(oak, Some(&[1.0; 3])).unwrap();
    assert!(!hit(&sage));
}

#[test]
fn the_nearest_by_cosine_are_those_of_a_plain_scan() {
    let mut random = Philox::new(15, 0);
    let encoder = random_encoder(Relations::Blind, [4, 4, 9, 6], &mut random);
    let mut sage = Sage::new(encoder);
    let mut edges = Vec::new();
    let users: Vec<_> = (0..900).map(UserId).collect();
    for a in 0..30 {
        let x = random.normals(4);
        sage.set_attribute_feature(AttributeId(a), Some(&x))
            .unwrap();
    }
    for &user in &users {
        // Few attributes each, so that many users tie exactly.
        for _ in 0..2 {
            let attribute = AttributeId(random.below(30));
            if !edges
                .iter()
                .any(|e: &(UserId, AttributeId, Sign)| e.0 == user && e.1 == attribute)
            {
                edges.push((user, attribute, Sign::Like));
                sage.on_edge(user, attribute, None, Some(Sign::Like));
            }
        }
    }
    let of = |u: UserId, to: &mut Vec<_>| to.extend(edges_of(&edges, u));
    let vector = |u| sage.embedding(u, &edges_of(&edges, u));
    for user in [UserId(0), UserId(77)] {
        let target = vector(user);
        let mut plain: Vec<_> = users
            .iter()
            .filter(|&&u| u != user)
            .map(|&u| (u, cosine(sage.level, &target, &vector(u))))
            .collect();
        // Ties go to the greater number here, to see that the caller's order is kept.
        plain.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
        for (k, threads) in [(1, 1), (10, 2), (5000, 2)] {
            let top = sage.top_by_cosine(user, &users, k, of, |a, b| b.cmp(&a), threads);
            assert_eq!(top, plain[..k.min(plain.len())]);
        }
    }
}

#[test]
fn a_damaged_encoder_is_named_and_never_panics() {
    let mut random = Philox::new(16, 0);
    let dims = [3, 2, 4, 5];
    let good = random_weights(Relations::Separated, dims, &mut random);
    let settings = config(Relations::Separated, dims);
    let load = |settings: &str, tensors: &Tensors| {
        let error = Encoder::from_bytes(&save(settings, tensors)).unwrap_err();
        error.to_string()
    };
    let bytes = save(&settings, &good);
    assert!(Encoder::from_bytes(&bytes).is_ok());
    for cut in 0..bytes.len() {
        assert!(matches!(
            Encoder::from_bytes(&bytes[..cut]),
            Err(SageError::Damaged(_))
        ));
    }
    for round in 0..2000 {
        let mut bytes = bytes.clone();
        let mut random = Philox::new(17, round);
        for _ in 0..3 {
            let at = random.below(bytes.len() as u32) as usize;
            bytes[at] ^= 1 << random.below(8);
        }
        // Whatever it says, it says it without a panic and without a wild allocation.
        let _ = Encoder::from_bytes(&bytes);
    }
    let later = settings.replace("\"version\":1", "\"version\":2,\"more\":3");
    assert!(load(&later, &good).contains("version 2"));
    assert!(load("{}", &good).contains("version"));
    let huge = settings.replace("\"hidden\":4", "\"hidden\":99999999999");
    assert!(load(&huge, &good).contains("hidden is 99999999999"));
    let wide = settings.replace("\"hidden\":4", "\"hidden\":8");
    assert!(load(&wide, &good).contains("[4, 2]"));
    let name = "c1.attr__rev_likes__user.lin_l.bias";
    let mut lacking = good.clone();
    lacking.remove(name);
    assert!(load(&settings, &lacking).contains(name));
    for value in [f32::NAN, f32::NEG_INFINITY, 1e30] {
        let mut spoiled = good.clone();
        spoiled.get_mut(name).unwrap().1[2] = value;
        assert!(load(&settings, &spoiled).contains("at 2"));
    }
}

#[test]
fn an_unsuitable_feature_is_refused_and_changes_nothing() {
    let mut random = Philox::new(18, 0);
    let encoder = random_encoder(Relations::Separated, [3, 0, 4, 4], &mut random);
    let mut sage = Sage::new(encoder);
    let edges = [(AttributeId(0), Sign::Like)];
    sage.on_edge(UserId(0), AttributeId(0), None, Some(Sign::Like));
    let before = sage.embedding(UserId(0), &edges);
    let attribute = AttributeId(0);
    assert!(matches!(
        sage.set_attribute_feature(attribute, Some(&[1.0])),
        Err(SageError::Length {
            got: 1,
            expected: 3,
            ..
        })
    ));
    assert!(matches!(
        sage.set_attribute_feature(attribute, Some(&[1.0, f32::NAN, 0.0])),
        Err(SageError::Value { at: 1, .. })
    ));
    assert!(
        sage.set_user_feature(UserId(0), Some(&[1.0]), &edges)
            .is_err()
    );
    assert_eq!(bits(&sage.embedding(UserId(0), &edges)), bits(&before));
}

#[test]
fn extreme_features_stay_finite_and_reversible() {
    let mut random = Philox::new(19, 0);
    let encoder = random_encoder(Relations::Separated, [3, 3, 4, 4], &mut random);
    let mut sage = Sage::new(encoder);
    let edges = [(AttributeId(0), Sign::Like)];
    sage.on_edge(UserId(0), AttributeId(0), None, Some(Sign::Like));
    let before = sage.embedding(UserId(0), &edges);
    for user in 1..50 {
        let x = [1e6, -1e6, 1e6];
        sage.set_user_feature(UserId(user), Some(&x), &[]).unwrap();
        sage.on_edge(UserId(user), AttributeId(0), None, Some(Sign::Like));
    }
    assert!(
        sage.embedding(UserId(0), &edges)
            .iter()
            .all(|x| x.is_finite())
    );
    for user in 1..50 {
        sage.on_edge(UserId(user), AttributeId(0), Some(Sign::Like), None);
    }
    assert_eq!(bits(&sage.embedding(UserId(0), &edges)), bits(&before));
}
