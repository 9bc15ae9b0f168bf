//! The index against a plain model: ordered maps, and overlaps counted one by one.

use super::kernel::TABLE_USERS;
use super::*;
use simpatico_schema::random::Philox;
use std::cmp::Reverse;
use std::collections::BTreeMap;

#[derive(Clone, Default)]
struct Model {
    users: Vec<Option<String>>,
    registers: BTreeMap<(u32, u32), (i64, String, Polarity)>,
}

impl Model {
    fn set(&mut self, user: u32, attribute: u32, to: Register<'_>) -> Change {
        let old = self.registers.get(&(user, attribute));
        let new = (to.at, to.id.to_string(), to.polarity);
        if old.is_some_and(|old| *old >= new) {
            return Change::Unchanged;
        }
        let old = old.and_then(|old| old.2.sign());
        self.registers.insert((user, attribute), new);
        let new = to.polarity.sign();
        Change::Applied { old, new }
    }

    fn edges(&self, user: u32) -> BTreeMap<u32, Sign> {
        let all = self.registers.range((user, 0)..=(user, u32::MAX));
        all.filter_map(|(key, value)| Some((key.1, value.2.sign()?)))
            .collect()
    }

    fn overlap(&self, a: u32, b: u32, mode: OverlapMode) -> u32 {
        let theirs = self.edges(b);
        let common = |(attribute, sign): &(u32, Sign)| match theirs.get(attribute) {
            Some(other) => mode == OverlapMode::Shared || other == sign,
            None => false,
        };
        self.edges(a).into_iter().filter(common).count() as u32
    }

    fn similar(&self, user: u32, k: usize, mode: OverlapMode) -> Vec<(UserId, u32)> {
        let others = (0..self.users.len() as u32).filter(|&other| other != user);
        let overlaps = others.map(|other| (UserId(other), self.overlap(user, other, mode)));
        let mut all: Vec<_> = overlaps.filter(|(_, overlap)| *overlap > 0).collect();
        all.sort_by_key(|&(other, n)| (Reverse(n), self.users[other.0 as usize].clone()));
        all.truncate(k);
        all
    }

    fn max_overlap(&self, mode: OverlapMode) -> u32 {
        let users = 0..self.users.len() as u32;
        let best = |u| self.similar(u, 1, mode).first().map_or(0, |n| n.1);
        users.map(best).max().unwrap_or(0)
    }
}

fn assert_same(graph: &Graph, model: &Model, random: &mut Philox) {
    assert_eq!(graph.user_id_end() as usize, model.users.len());
    for (id, name) in model.users.iter().enumerate() {
        let user = UserId(id as u32);
        assert_eq!(graph.user_name(user), name.as_deref().unwrap_or(""));
        if let Some(name) = name {
            assert_eq!(graph.user_id(name), Some(user));
        }
        let registers: Vec<_> = graph
            .registers(user)
            .map(|(a, r)| ((user.0, a.0), (r.at, r.id.to_string(), r.polarity)))
            .collect();
        let range = (user.0, 0)..=(user.0, u32::MAX);
        let expected: Vec<_> = model.registers.range(range).collect();
        assert!(
            registers
                .iter()
                .map(|(k, v)| (k, v))
                .eq(expected.iter().copied())
        );
    }
    for attribute in 0..graph.attribute_count() as u32 {
        for sign in [Sign::Dislike, Sign::Like] {
            let users: Vec<_> = graph.posting(AttributeId(attribute), sign).collect();
            let expected = model
                .registers
                .iter()
                .filter(|(key, value)| key.1 == attribute && value.2.sign() == Some(sign));
            assert!(users.iter().map(|u| u.0).eq(expected.map(|(key, _)| key.0)));
            assert_eq!(graph.degree(AttributeId(attribute), sign), users.len());
        }
    }
    let edges = model.registers.values().filter(|r| r.2.sign().is_some());
    assert_eq!(graph.edge_count(), edges.count() as u64);
    for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
        let k = random.below(6) as usize;
        for user in 0..model.users.len() as u32 {
            let expected = model.similar(user, k, mode);
            assert_eq!(graph.similar(UserId(user), k, mode), expected, "{user} {k}");
        }
        let mut asked = Vec::new();
        graph.similar_all(k, mode, 1, |user, best| {
            assert_eq!(best, model.similar(user.0, k, mode), "{user:?} {k}");
            asked.push(user.0);
        });
        let live = (0..model.users.len()).filter(|user| model.users[*user].is_some());
        assert!(live.eq(asked.iter().map(|user| *user as usize)));
        assert_eq!(graph.max_overlap(mode), model.max_overlap(mode));
    }
}

fn random_name(random: &mut Philox) -> String {
    let letters = 1 + random.below(3);
    (0..letters)
        .map(|_| char::from(b'a' + random.below(4) as u8))
        .collect()
}

/// One random step on both.
fn step(graph: &mut Graph, model: &mut Model, attributes: u32, random: &mut Philox) {
    let user = match random.below(if graph.user_count() < 3 { 1 } else { 8 }) {
        0 => {
            let name = random_name(random);
            let user = graph.add_user(&name);
            if user.0 as usize == model.users.len() {
                model.users.push(Some(name));
            }
            assert!(model.users[user.0 as usize].is_some());
            user.0
        }
        _ => random.below(graph.user_id_end()),
    };
    if random.below(40) == 0 {
        let edges: Vec<_> = model.edges(user).into_iter().collect();
        let forgotten = graph.forget_user(UserId(user));
        assert!(forgotten.iter().map(|(a, s)| (a.0, *s)).eq(edges));
        model.users[user as usize] = None;
        model.registers.retain(|key, _| key.0 != user);
        return;
    }
    let attribute = random.below(attributes);
    let to = Register {
        polarity: Polarity::ALL[[3, 3, 2, 3, 1, 0][random.below(6) as usize]],
        at: i64::from(random.below(5)) * [1, 1 << 40, i64::MIN][random.below(3) as usize],
        id: ["", "", "x", "longer id"][random.below(4) as usize],
    };
    let expected = match model.users[user as usize] {
        Some(_) => model.set(user, attribute, to),
        None => Change::Unchanged,
    };
    assert_eq!(
        graph.set(UserId(user), AttributeId(attribute), to),
        expected
    );
}

#[test]
fn random_histories_equal_the_plain_model_in_every_snapshot() {
    for seed in 0..1_500 {
        let mut random = Philox::new(seed, 1);
        let kernels = Kernel::present();
        let layout = Layout {
            chunk_bits: 9,
            dense_divisor: [64, 100, 512][random.below(3) as usize],
            join_users: random.below(12) as usize,
        };
        let mut graph = Graph::with(layout, kernels[random.below(kernels.len() as u32) as usize]);
        let mut model = Model::default();
        let attributes = 1 + random.below(12);
        for attribute in 0..attributes {
            graph.add_attribute(&format!("a{attribute}"));
        }
        let mut snapshots = Vec::new();
        for _ in 0..random.below(150) {
            if random.below(30) == 0 {
                snapshots.push((graph.clone(), model.clone()));
            }
            if random.below(10) == 0 {
                let mode = [OverlapMode::Shared, OverlapMode::Agreeing][random.below(2) as usize];
                assert_eq!(graph.max_overlap(mode), model.max_overlap(mode), "{seed}");
            }
            if random.below(40) == 0 {
                graph.post_all();
            }
            if random.below(60) == 0 {
                // Go on from an older moment, as another history.
                let back = random.below(snapshots.len() as u32 + 1) as usize;
                if let Some((old_graph, old_model)) = snapshots.get(back) {
                    (graph, model) = (old_graph.clone(), old_model.clone());
                }
            }
            step(&mut graph, &mut model, attributes, &mut random);
        }
        snapshots.push((graph, model));
        for (graph, model) in &snapshots {
            assert_same(graph, model, &mut random);
        }
    }
}

#[test]
fn many_users_in_many_chunks_count_alike_with_lists_bitmaps_and_every_kernel() {
    for seed in 0..12 {
        many_users(seed, 2_000, 3_000);
    }
}

/// The same with so few that it is quick to tell what is wrong.
#[test]
fn some_users_in_two_chunks_count_alike_with_lists_bitmaps_and_every_kernel() {
    for seed in 100..105 {
        many_users(seed, 750, 200);
    }
}

fn many_users(seed: u64, most: u32, changes: u32) {
    let mut random = Philox::new(seed, 2);
    let users = 600 + random.below(most - 600);
    let attributes = 4 + random.below(300);
    let layout = Layout {
        chunk_bits: 9 + random.below(3),
        dense_divisor: [8, 64, 128, 512][random.below(4) as usize],
        join_users: [0, 5_000][random.below(2) as usize],
    };
    let mut graph = Graph::with(layout, Kernel::Portable);
    for attribute in 0..attributes {
        graph.add_attribute(&format!("a{attribute}"));
    }
    let mut edges = vec![BTreeMap::new(); users as usize];
    for user in 0..users {
        graph.add_user(&format!("{}", u64::from(user) * 7_919 % 2_003));
        // One user likes everything, more than the byte counters hold, and one half of it.
        let wanted = match user {
            99 => attributes,
            98 => attributes / 2,
            _ => random.below(40),
        };
        for i in 0..wanted {
            let attribute = match user {
                98 | 99 => i,
                _ => random.below(attributes),
            };
            set_edge(&mut graph, &mut edges, user, attribute, &mut random);
        }
    }
    // Postings made at once, chunk by chunk, are those that grew.
    let mut posted = graph.clone();
    posted.post_all();
    for attribute in (0..attributes).map(AttributeId) {
        for sign in [Sign::Dislike, Sign::Like] {
            let (grown, made) = (
                graph.posting(attribute, sign),
                posted.posting(attribute, sign),
            );
            assert!(grown.eq(made), "{attribute:?}");
        }
    }
    for at in 0..changes {
        let (user, attribute) = (random.below(users), random.below(attributes.min(20)));
        set_edge(&mut graph, &mut edges, user, attribute, &mut random);
        if at % 1_000 == 0 {
            check_some(&mut graph, &edges, &mut random);
        }
    }
    check_some(&mut graph, &edges, &mut random);
}

fn set_edge(
    graph: &mut Graph,
    edges: &mut [BTreeMap<u32, Sign>],
    user: u32,
    attribute: u32,
    random: &mut Philox,
) {
    let polarity = Polarity::ALL[random.below(4) as usize];
    let at = i64::from(random.next_u32());
    let to = Register {
        polarity,
        at,
        id: "",
    };
    let change = graph.set(UserId(user), AttributeId(attribute), to);
    if let Change::Applied { new, .. } = change {
        match new {
            Some(sign) => edges[user as usize].insert(attribute, sign),
            None => edges[user as usize].remove(&attribute),
        };
    }
}

fn check_some(graph: &mut Graph, edges: &[BTreeMap<u32, Sign>], random: &mut Philox) {
    let users = edges.len() as u32;
    let overlap = |a: &BTreeMap<u32, Sign>, b: &BTreeMap<u32, Sign>, mode| {
        let common = a.iter().filter(|(attribute, sign)| match b.get(attribute) {
            Some(other) => mode == OverlapMode::Shared || other == *sign,
            None => false,
        });
        common.count() as u32
    };
    let mut asked: Vec<_> = (0..6).map(|_| UserId(random.below(users))).collect();
    asked.extend([UserId(98), UserId(99)]);
    for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
        let k = [1, 10, 70, 5_000][random.below(4) as usize];
        let mut expected = Vec::new();
        for &UserId(user) in &asked {
            let mut all: Vec<_> = (0..users)
                .filter(|&other| other != user)
                .map(|other| {
                    (
                        UserId(other),
                        overlap(&edges[user as usize], &edges[other as usize], mode),
                    )
                })
                .filter(|(_, overlap)| *overlap > 0)
                .collect();
            all.sort_by_key(|&(other, n)| (Reverse(n), graph.user_name(other)));
            all.truncate(k);
            expected.push(all);
        }
        for &kernel in Kernel::present() {
            graph.kernel = kernel;
            assert_eq!(
                graph.similar_many(&asked, k, mode, 2),
                expected,
                "{kernel:?}"
            );
            assert_eq!(graph.similar(asked[0], k, mode), expected[0], "{kernel:?}");
            // The way of very many questions.
            let mut answers = Vec::new();
            graph.most_similar(&asked, k, mode, 2, |_, best| answers.push(best.to_vec()));
            assert_eq!(answers, expected, "{kernel:?}");
        }
        let mut max = 0;
        graph.similar_all(k, mode, 2, |user, best| {
            assert_eq!(graph.similar(user, k, mode), best);
            max = max.max(best.first().map_or(0, |n| n.1));
        });
        assert_eq!(graph.max_overlap(mode), max);
    }
}

#[test]
fn a_batch_does_what_its_events_do_one_by_one() {
    for seed in 0..200 {
        let mut random = Philox::new(seed, 3);
        let mut one_by_one = Graph::new();
        for i in 0..20 {
            one_by_one.add_user(&format!("u{i}"));
            one_by_one.add_attribute(&format!("a{i}"));
        }
        let (mut batched, mut loaded) = (one_by_one.clone(), one_by_one.clone());
        for _ in 0..4 {
            let event = |_| {
                let to = Register {
                    polarity: Polarity::ALL[random.below(4) as usize],
                    at: i64::from(random.below(6)),
                    id: ["", "b"][random.below(2) as usize],
                };
                (UserId(random.below(21)), AttributeId(random.below(21)), to)
            };
            let mut events: Vec<_> = (0..150).map(event).collect();
            let changes: Vec<_> = events
                .iter()
                .map(|e| one_by_one.set(e.0, e.1, e.2))
                .collect();
            assert_eq!(batched.set_batch(&events), changes);
            loaded.set_registers(&mut events);
        }
        loaded.post_all();
        for other in [batched, loaded] {
            assert_eq!(other.edge_count(), one_by_one.edge_count());
            for user in (0..20).map(UserId) {
                assert!(other.registers(user).eq(one_by_one.registers(user)));
                for sign in [Sign::Dislike, Sign::Like] {
                    let attribute = AttributeId(user.0);
                    let posting = one_by_one.posting(attribute, sign);
                    assert!(other.posting(attribute, sign).eq(posting));
                    let degree = one_by_one.degree(attribute, sign);
                    assert_eq!(other.degree(attribute, sign), degree);
                }
            }
        }
    }
}

#[test]
fn a_user_who_ties_with_everyone_gets_the_first_by_name() {
    let mut graph = Graph::new();
    let attribute = graph.add_attribute("a");
    let like = Register {
        polarity: Polarity::Like,
        at: 0,
        id: "",
    };
    let names: Vec<_> = (0..20_000_u32)
        .map(|i| format!("{}", i.wrapping_mul(2_654_435_761)))
        .collect();
    for name in &names {
        let user = graph.add_user(name);
        graph.set(user, attribute, like);
    }
    let mut sorted: Vec<_> = names[1..].to_vec();
    sorted.sort();
    let assert_first = |graph: &Graph, sorted: &[String]| {
        let found = graph.similar(UserId(0), 10, OverlapMode::Agreeing);
        let found: Vec<_> = found
            .iter()
            .map(|&(u, n)| (graph.user_name(u), n))
            .collect();
        let expected: Vec<_> = sorted[..10].iter().map(|name| (name.as_str(), 1)).collect();
        assert_eq!(found, expected);
    };
    assert_first(&graph, &sorted);
    // Once they are made, ranks decide, but not over users who came after them, nor over those
    // of another history.
    while ranks::get(&graph.ranks, &graph.users).is_none() {
        std::thread::yield_now();
    }
    assert_first(&graph, &sorted);
    let mut other = graph.clone();
    for (graph, name) in [(&mut graph, "0 new"), (&mut other, "00 other")] {
        let user = graph.add_user(name);
        graph.set(user, attribute, like);
        let mut sorted = sorted.clone();
        sorted.push(name.into());
        sorted.sort();
        assert_first(graph, &sorted);
    }
}

#[test]
fn a_join_finds_every_pair_that_has_enough_and_says_whose_it_did_not() {
    let mut random = Philox::new(1, 4);
    let mut graph = Graph::new();
    for attribute in 0..700 {
        graph.add_attribute(&format!("a{attribute}"));
    }
    // More than a table has, and one with more edges than are counted.
    let users = TABLE_USERS as u32 + 200;
    let mut edges = vec![BTreeMap::new(); users as usize];
    for user in 0..users {
        graph.add_user(&format!("{user}"));
        let (wanted, among) = match user {
            77 => (700, 700),
            _ => (1 + random.below(25), 60),
        };
        for i in 0..wanted {
            let attribute = if user == 77 { i } else { random.below(among) };
            set_edge(&mut graph, &mut edges, user, attribute, &mut random);
        }
    }
    let overlap = |a: u32, b: u32, mode| {
        let theirs = &edges[b as usize];
        let common = edges[a as usize].iter().filter(|(attribute, sign)| {
            let other = theirs.get(attribute);
            other.is_some_and(|s| mode == OverlapMode::Shared || s == *sign)
        });
        common.count() as u32
    };
    let some: Vec<u32> = (0..users).filter(|user| user % 7 == 0).collect();
    for (mode, least) in [
        (OverlapMode::Shared, 6),
        (OverlapMode::Shared, 4),
        (OverlapMode::Agreeing, 4),
    ] {
        for probing in [None, Some(some.as_slice())] {
            let joined = graph.join(probing, least, mode, 2);
            let out = &joined.left_out;
            assert!(probing.is_some() || out.contains(&77));
            let found: BTreeMap<(u32, u32), u32> = joined
                .pairs
                .iter()
                .map(|&(a, b, n)| ((a.min(b), a.max(b)), n))
                .collect();
            for (&(a, b), &n) in &found {
                assert!(a != b && n >= u32::from(least) && n == overlap(a, b, mode));
            }
            let asks = |user: u32| probing.is_none_or(|some| some.contains(&user));
            for a in 0..users {
                for b in a + 1..users {
                    // The later of two finds the pair where everyone asks.
                    let asked = match probing {
                        None => !out.contains(&b) && !out.contains(&a),
                        Some(_) => [a, b].iter().any(|u| asks(*u) && !out.contains(u)),
                    };
                    let enough = overlap(a, b, mode) >= u32::from(least);
                    assert!(!asked || !enough || found.contains_key(&(a, b)), "{a} {b}");
                }
            }
            if least == 6 {
                assert!(out.len() < 20 && !found.is_empty(), "{out:?}");
            }
        }
    }
}

/// More than the byte counters hold, for users of the first chunk and of the second.
#[test]
fn more_than_255_attributes_in_common_are_counted_in_every_chunk() {
    let layout = Layout {
        chunk_bits: 9,
        ..Layout::default()
    };
    let mut graph = Graph::with(layout, Kernel::Portable);
    for attribute in 0..600 {
        graph.add_attribute(&format!("a{attribute}"));
    }
    let like = Register {
        polarity: Polarity::Like,
        at: 0,
        id: "",
    };
    for user in 0..700 {
        graph.add_user(&format!("{user:03}"));
        let likes = match user {
            5 => 600,
            7 => 300,
            600 => 511,
            690 => 255,
            _ => user % 3,
        };
        for attribute in 0..likes {
            graph.set(UserId(user), AttributeId(attribute), like);
        }
    }
    let best = graph.similar(UserId(5), 4, OverlapMode::Agreeing);
    let of = |user, overlap| (UserId(user), overlap);
    let expected = [of(600, 511), of(7, 300), of(690, 255), of(2, 2)];
    assert_eq!(best, expected);
    let best = graph.similar(UserId(600), 2, OverlapMode::Shared);
    assert_eq!(best, [of(5, 511), of(7, 300)]);
}
