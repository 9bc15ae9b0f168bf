//! Random histories against a plain model: whatever happens to a store, it holds what a
//! `BTreeMap` of registers would hold, to the bit, and answers as a brute-force count would.

use simpatico_schema::random::Philox;
use simpatico_schema::{Event, OverlapMode, Polarity, Sign};
use simpatico_storage::{Ack, Options, Snapshot, Store};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

type Key = (String, String);
type Value = (i64, String, Polarity);

/// The registers, with nothing clever about them.
#[derive(Clone, Default)]
struct Model {
    users: BTreeSet<String>,
    registers: BTreeMap<Key, Value>,
}

impl Model {
    /// Takes an event; tells whether its register changed.
    fn offer(&mut self, event: &Event) -> bool {
        self.users.insert(event.user.clone());
        let key = (event.user.clone(), event.attribute.clone());
        let id = event.id.clone().unwrap_or_default();
        let new = (event.at.unwrap(), id, event.polarity);
        let wins = self.registers.get(&key).is_none_or(|old| *old < new);
        if wins {
            self.registers.insert(key, new);
        }
        wins
    }

    fn forget(&mut self, user: &str) {
        self.users.remove(user);
        self.registers.retain(|(u, _), _| u != user);
    }

    fn edges(&self, user: &str) -> BTreeMap<&str, Sign> {
        let of_user = self.registers.iter().filter(|((u, _), _)| u == user);
        of_user
            .filter_map(|((_, a), (_, _, p))| Some((a.as_str(), p.sign()?)))
            .collect()
    }

    fn overlap(&self, a: &str, b: &str, mode: OverlapMode) -> u32 {
        let other = self.edges(b);
        let counts = |(name, sign): &(&str, Sign)| {
            let theirs = other.get(name);
            theirs.is_some_and(|s| mode == OverlapMode::Shared || s == sign)
        };
        self.edges(a).into_iter().filter(counts).count() as u32
    }

    fn similar(&self, user: &str, k: usize, mode: OverlapMode) -> Vec<(String, u32)> {
        let others = self.users.iter().filter(|other| *other != user);
        let mut all: Vec<_> = others
            .map(|other| (other.clone(), self.overlap(user, other, mode)))
            .filter(|(_, overlap)| *overlap > 0)
            .collect();
        all.sort_by_key(|(name, overlap)| (Reverse(*overlap), name.clone()));
        all.truncate(k);
        all
    }

    fn max_overlap(&self, mode: OverlapMode) -> u32 {
        let best = |u: &String| self.similar(u, 1, mode).first().map_or(0, |n| n.1);
        self.users.iter().map(best).max().unwrap_or(0)
    }
}

fn assert_same(snapshot: &Snapshot, model: &Model, what: &str) {
    let users: BTreeSet<String> = snapshot.users().map(str::to_string).collect();
    assert_eq!(users, model.users, "{what}");
    let mut registers = BTreeMap::new();
    for user in &users {
        for e in snapshot.registers(user).unwrap() {
            let value = (e.at.unwrap(), e.id.unwrap_or_default(), e.polarity);
            registers.insert((e.user, e.attribute), value);
        }
    }
    assert_eq!(registers, model.registers, "{what}");
    for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
        assert_eq!(
            snapshot.max_overlap(mode),
            model.max_overlap(mode),
            "{what}"
        );
        for user in &users {
            let similar = snapshot.similar(user, 3, mode).unwrap();
            let got: Vec<_> = similar
                .neighbors
                .into_iter()
                .map(|n| (n.user, n.overlap.unwrap()))
                .collect();
            assert_eq!(
                got,
                model.similar(user, 3, mode),
                "{what}, {user}, {mode:?}"
            );
        }
    }
}

fn random_event(random: &mut Philox) -> Event {
    let user = format!("user {}", random.below(6));
    let attribute = format!("attribute {}", random.below(8));
    let polarity = Polarity::ALL[random.below(4) as usize];
    let mut event = Event::new(&user, &attribute, polarity).at(i64::from(random.below(12)) - 3);
    if random.below(3) == 0 {
        event.id = Some(format!("id {}", random.below(3)));
    }
    event
}

fn options(random: &mut Philox) -> Options {
    Options {
        mirror: random.below(2) == 0,
        segment_bytes: 200 + u64::from(random.below(2000)),
        ..Options::default()
    }
}

/// One history of `steps` moves on one store.
fn history(seed: u64, steps: u32, path: &Path) {
    let mut random = Philox::new(seed, 0);
    let mut model = Model::default();
    let mut store = Store::open(path, options(&mut random)).unwrap();
    let mut past: Vec<Event> = Vec::new();
    let mut old: Option<(Snapshot, Model)> = None;
    for step in 0..steps {
        let what = format!("seed {seed}, step {step}");
        match random.below(24) {
            0 => {
                store.close().unwrap();
                store = Store::open(path, options(&mut random)).unwrap();
            }
            1 => {
                let user = format!("user {}", random.below(6));
                let known = model.users.contains(&user);
                assert_eq!(store.forget(&user).is_ok(), known, "{what}");
                model.forget(&user);
                past.retain(|e| e.user != user);
            }
            2 => old = Some((store.snapshot(), model.clone())),
            3 if random.below(4) == 0 => drop(store.compact().unwrap()),
            _ => {
                let mut batch: Vec<Event> = (0..1 + random.below(5))
                    .map(|_| match random.choose(&past) {
                        Some(again) if random.below(4) == 0 => again.clone(),
                        _ => random_event(&mut random),
                    })
                    .collect();
                if random.below(2) == 0 {
                    random.shuffle(&mut batch);
                }
                let applied = batch.iter().filter(|e| model.offer(e)).count() as u64;
                let ack = [Ack::Durable, Ack::Accepted][random.below(2) as usize];
                let receipt = store.append_with(&batch, ack).unwrap();
                assert_eq!(receipt.applied, applied, "{what}");
                past.extend(batch);
            }
        }
        if random.below(8) == 0 {
            assert_same(&store.snapshot(), &model, &what);
        }
    }
    assert_same(&store.snapshot(), &model, &format!("seed {seed}, end"));
    if let Some((snapshot, model)) = &old {
        assert_same(snapshot, model, &format!("seed {seed}, old snapshot"));
    }
    let digest = store.snapshot().digest();
    let report = store.check().unwrap();
    assert!(report.ok(), "seed {seed}: {report:?}");
    store.close().unwrap();
    let store = Store::open(path, Options::default()).unwrap();
    assert_same(&store.snapshot(), &model, &format!("seed {seed}, reopened"));
    assert_eq!(store.snapshot().digest(), digest, "seed {seed}");
}

#[test]
fn random_histories_equal_a_plain_model() {
    let histories = std::env::var("SIMPATICO_HISTORIES").map_or(2_000, |n| n.parse().unwrap());
    // Thousands of syncs: in memory where that is possible, since no power is cut here.
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    for seed in 0..histories {
        let path = dir.path().join(seed.to_string());
        history(seed, 40, &path);
        std::fs::remove_dir_all(&path).unwrap();
    }
}
