//! Random histories with crashes in them, against a plain model.

use crate::files::{copy, in_memory};
use crate::suite::{Plan, case};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, OverlapMode, Polarity, Sign};
use simpatico_storage::sage::{ENCODER_VERSION, EncoderConfig, Relations};
use simpatico_storage::{Ack, Options, Snapshot, Store};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Moves of a history. A longer one begins with the moves of the shorter one of its seed.
const MOVES: u32 = 100;
/// The same where there are more histories than CI runs.
const MANY_MOVES: u32 = 200;
/// As many as CI runs.
pub(crate) const FEW: u64 = 2_000;
const DIM: usize = 4;

/// Writes a small GraphSAGE encoder with random weights, and says where.
pub fn write_encoder(folder: &Path) -> PathBuf {
    let relations = Relations::Separated;
    let config = EncoderConfig {
        version: ENCODER_VERSION,
        in_dim_attribute: DIM,
        in_dim_user: DIM,
        hidden: 6,
        out: 5,
        relations,
    };
    let mut random = Philox::new(3, 3);
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    let mut put = |name: String, shape: &[usize]| {
        let start = data.len();
        let numbers = random.normals(shape.iter().product());
        data.extend(numbers.iter().flat_map(|x| (x * 0.3).to_le_bytes()));
        let place = serde_json::json!({
            "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]
        });
        header.insert(name, place);
    };
    for name in relations.names() {
        for (layer, ends, from, to, rows) in [
            ("c1", format!("user__{name}__attr"), DIM, DIM, 6),
            ("c1", format!("attr__rev_{name}__user"), DIM, DIM, 6),
            ("c2", format!("attr__rev_{name}__user"), 6, 6, 5),
        ] {
            put(format!("{layer}.{ends}.lin_l.bias"), &[rows]);
            put(format!("{layer}.{ends}.lin_l.weight"), &[rows, from]);
            put(format!("{layer}.{ends}.lin_r.weight"), &[rows, to]);
        }
    }
    let config = serde_json::to_string(&config).expect("plain numbers");
    let metadata = serde_json::json!({ "simpatico": config });
    header.insert("__metadata__".into(), metadata);
    let mut header = serde_json::to_vec(&header).expect("plain numbers");
    header.resize(header.len().next_multiple_of(8), b' ');
    let path = folder.join("encoder.safetensors");
    let mut file = std::fs::File::create(&path).expect("a file");
    let length = (header.len() as u64).to_le_bytes();
    for bytes in [&length[..], &header, &data] {
        file.write_all(bytes).expect("written");
    }
    path
}

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
        let new = (event.at.unwrap_or(0), id, event.polarity);
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

    fn edges(&self) -> BTreeMap<&str, BTreeMap<&str, Sign>> {
        let mut edges: BTreeMap<&str, BTreeMap<&str, Sign>> = BTreeMap::new();
        for ((user, attribute), (_, _, polarity)) in &self.registers {
            if let Some(sign) = polarity.sign() {
                edges.entry(user).or_default().insert(attribute, sign);
            }
        }
        edges
    }

    /// Everybody's neighbours.
    fn similar(&self, k: usize, mode: OverlapMode) -> BTreeMap<String, Vec<(String, u32)>> {
        let (edges, none) = (self.edges(), BTreeMap::new());
        let of = |user: &str| edges.get(user).unwrap_or(&none);
        let overlap = |a: &str, b: &str| {
            let theirs = of(b);
            let counts = |(name, sign): &(&&str, &Sign)| {
                let other = theirs.get(*name);
                other.is_some_and(|s| mode == OverlapMode::Shared || s == *sign)
            };
            of(a).iter().filter(counts).count() as u32
        };
        let neighbours = |user: &String| {
            let others = self.users.iter().filter(|other| *other != user);
            let mut all: Vec<_> = others
                .map(|other| (other.clone(), overlap(user, other)))
                .filter(|(_, overlap)| *overlap > 0)
                .collect();
            all.sort_by_key(|(name, overlap)| (Reverse(*overlap), name.clone()));
            all.truncate(k);
            (user.clone(), all)
        };
        self.users.iter().map(neighbours).collect()
    }
}

fn assert_same(snapshot: &Snapshot, model: &Model, what: &str) {
    let users: BTreeSet<String> = snapshot.users().map(str::to_string).collect();
    assert_eq!(users, model.users, "{what}: users");
    let mut registers = BTreeMap::new();
    for user in &users {
        for e in snapshot.registers(user).unwrap_or_default() {
            let value = (e.at.unwrap_or(0), e.id.unwrap_or_default(), e.polarity);
            registers.insert((e.user, e.attribute), value);
        }
    }
    assert_eq!(registers, model.registers, "{what}: registers");
    for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
        let expected = model.similar(3, mode);
        let best = expected
            .values()
            .filter_map(|n| n.first())
            .map(|n| n.1)
            .max();
        assert_eq!(
            snapshot.max_overlap(mode),
            best.unwrap_or(0),
            "{what}: {mode:?}"
        );
        for (user, neighbours) in expected {
            let similar = snapshot.similar(&user, 3, mode).expect("a known user");
            let got: Vec<_> = similar
                .neighbors
                .into_iter()
                .map(|n| (n.user, n.overlap.unwrap_or(0)))
                .collect();
            assert_eq!(got, neighbours, "{what}: {user}, {mode:?}");
        }
    }
}

fn random_event(random: &mut Philox) -> Event {
    let user = format!("user {}", random.below(9));
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
        // sled costs a hundred times the rest of a reopening.
        mirror: random.below(16) == 0,
        segment_bytes: 200 + u64::from(random.below(2000)),
        ..Options::default()
    }
}

struct History<'a> {
    random: Philox,
    model: Model,
    store: Option<Store>,
    folder: &'a Path,
    place: PathBuf,
    moved: u32,
    past: Vec<Event>,
}

impl History<'_> {
    fn store(&self) -> &Store {
        self.store.as_ref().expect("open between moves")
    }

    /// Goes on in another folder, that was made by a crash or a restore.
    fn go_on_in(&mut self, place: PathBuf, what: &str) {
        let old = std::mem::replace(&mut self.place, place);
        self.store = None;
        let _ = std::fs::remove_dir_all(old);
        self.open(what);
    }

    fn open(&mut self, what: &str) {
        let options = options(&mut self.random);
        match Store::open(&self.place, options) {
            Ok(store) => self.store = Some(store),
            Err(error) => panic!("{what}: {error}"),
        }
    }

    fn next_place(&mut self) -> PathBuf {
        self.moved += 1;
        self.folder.join(format!("place {}", self.moved))
    }

    /// What is on disk at this moment, as the next process finds it after a crash; now and
    /// then with a torn write behind it.
    fn crash(&mut self, what: &str) {
        self.store().flush().expect("flushed");
        let place = self.next_place();
        copy(&self.place, &place);
        if self.random.below(2) == 0 {
            let log = crate::files::files(&place.join("log"))
                .pop()
                .expect("a log");
            let torn: Vec<u8> = (0..1 + self.random.below(60))
                .map(|_| self.random.next_u32() as u8)
                .collect();
            let mut file = std::fs::OpenOptions::new()
                .append(true)
                .open(log)
                .expect("a log");
            file.write_all(&torn).expect("written");
        }
        self.go_on_in(place, what);
    }

    fn restore(&mut self, what: &str) {
        let file = self.folder.join("snapshot");
        self.store().export_snapshot(&file).expect("a snapshot");
        let place = self.next_place();
        if let Err(error) = Store::restore(&file, &place) {
            panic!("{what}: {error}");
        }
        self.go_on_in(place, what);
    }

    fn append(&mut self, what: &str) {
        let random = &mut self.random;
        let mut batch: Vec<Event> = (0..1 + random.below(5))
            .map(|_| match random.choose(&self.past) {
                Some(again) if random.below(4) == 0 => again.clone(),
                _ => random_event(random),
            })
            .collect();
        random.shuffle(&mut batch);
        let ack = [Ack::Durable, Ack::Accepted][random.below(2) as usize];
        let applied = batch.iter().filter(|e| self.model.offer(e)).count() as u64;
        let receipt = self.store().append_with(&batch, ack).expect("appended");
        assert_eq!(
            receipt.applied, applied,
            "{what}: events that changed something"
        );
        self.past.extend(batch);
    }

    /// Fills the caches, so that a stale one is seen later.
    fn embed(&self) {
        let moment = self.store().snapshot();
        for user in moment.users() {
            let _ = moment.embedding(user);
        }
    }

    fn step(&mut self, old: &mut Option<(Snapshot, Model)>, what: &str) {
        match self.random.below(32) {
            0 => {
                self.store.take().expect("open").close().expect("closed");
                self.open(what);
            }
            1 => {
                let user = format!("user {}", self.random.below(9));
                let known = self.model.users.contains(&user);
                assert_eq!(self.store().forget(&user).is_ok(), known, "{what}: forget");
                self.model.forget(&user);
                self.past.retain(|e| e.user != user);
            }
            2 => *old = Some((self.store().snapshot(), self.model.clone())),
            3 => {
                self.store().compact().expect("compacted");
            }
            4 => self.crash(what),
            5 => self.restore(what),
            6 => self.embed(),
            7 => {
                let vector: Vec<f32> = self.random.normals(DIM);
                let attribute = format!("attribute {}", self.random.below(8));
                let set = self.store().set_features(&[(attribute, vector)]);
                assert!(set.is_ok(), "{what}: {set:?}");
            }
            8 => {
                let vector: Vec<f32> = self.random.normals(DIM);
                let user = format!("user {}", self.random.below(9));
                self.model.users.insert(user.clone());
                let set = self.store().set_user_features(&[(user, vector)]);
                assert!(set.is_ok(), "{what}: {set:?}");
            }
            _ => self.append(what),
        }
    }
}

fn history(seed: u64, moves: u32, folder: &Path, encoder: &Path) {
    let place = folder.join("place 0");
    let mut history = History {
        random: Philox::new(seed, 9),
        model: Model::default(),
        store: None,
        folder,
        place,
        moved: 0,
        past: Vec::new(),
    };
    history.open("the first open");
    history.store().set_encoder(encoder).expect("an encoder");
    let mut old: Option<(Snapshot, Model)> = None;
    for step in 0..moves {
        let what = format!("seed {seed}, move {step}");
        history.step(&mut old, &what);
        match history.random.below(40) {
            0 | 1 => assert_same(&history.store().snapshot(), &history.model, &what),
            2 => prove(history.store(), &what),
            _ => {}
        }
    }
    let what = format!("seed {seed}, end");
    history.embed();
    assert_same(&history.store().snapshot(), &history.model, &what);
    if let Some((snapshot, model)) = &old {
        assert_same(snapshot, model, &format!("seed {seed}, old snapshot"));
    }
    prove(history.store(), &what);
}

fn prove(store: &Store, what: &str) {
    match store.check() {
        Ok(report) => assert!(report.ok(), "{what}: {report:?}"),
        Err(error) => panic!("{what}: check: {error}"),
    }
}

/// The row of histories.
pub fn row(plan: Plan) -> String {
    let folder = in_memory();
    let encoder = write_encoder(folder.path());
    let moves = if plan.count > FEW { MANY_MOVES } else { MOVES };
    for number in 0..plan.count {
        case();
        let own = folder.path().join(number.to_string());
        std::fs::create_dir_all(&own).expect("a folder");
        history(plan.seed + number, moves, &own, &encoder);
        let _ = std::fs::remove_dir_all(&own);
    }
    format!("equal in all {} histories of {moves} moves", plan.count)
}
