//! The concurrent parts under thousands of schedules: random ones, and PCT ones, which find a
//! bug of few ordered steps with a known chance. shuttle sees every deadlock by itself.
//!
//! `cargo test --release -p simpatico-storage --features schedules --test schedules`; with
//! SCHEDULES=N, N of each kind in place of 20,000, shared out among the scenarios; SCHEDULES_SEED
//! picks others. A failure prints its schedule, which `shuttle::replay` runs again.

use shuttle::scheduler::{DfsScheduler, PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner, thread};
use simpatico_schema::{Event, Polarity, Sign};
use simpatico_storage::sage::{AttributeId, Encoder, Sage, UserId, embed_all_from_nothing};
use simpatico_storage::{
    Ack, Options, Receipt, Snapshot, Store, StoreError, Stream, StreamOptions, WhenFull,
};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Scenarios that take a share of the schedules.
const SCENARIOS: u64 = 6;
/// How many ordered steps a bug may need that PCT is sure to meet in the end.
const PCT_DEPTH: usize = 3;

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config
}

fn under(schedules: impl Scheduler + 'static, scenario: fn()) -> usize {
    Runner::new(schedules, config()).run(scenario)
}

/// Runs a scenario under its share of both kinds of schedules.
fn explore(scenario: fn()) {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let seed = number("SCHEDULES_SEED").unwrap_or(71);
    let share = number("SCHEDULES").unwrap_or(20_000).div_ceil(SCENARIOS) as usize;
    let random = under(RandomScheduler::new_from_seed(seed, share), scenario);
    let pct = PctScheduler::new_from_seed(seed, PCT_DEPTH, share);
    let pct = under(pct, scenario);
    assert_eq!((random, pct), (share, share));
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}

/// Without sled, whose threads no schedule leads; segments of a few events; and an append
/// waits as soon as one payload is on its way.
fn options() -> Options {
    Options {
        mirror: false,
        segment_bytes: 400,
        pending_max_bytes: 60,
        ..Options::default()
    }
}

fn open(path: &Path) -> Arc<Store> {
    Arc::new(Store::open(path, options()).expect("a store"))
}

const ATTRIBUTES: usize = 2;

/// Everything a user says at one moment.
fn batch(user: &str, at: i64) -> Vec<Event> {
    let say = |a| Event::new(user, &format!("attribute {a}"), Polarity::Like).at(at);
    (0..ATTRIBUTES).map(say).collect()
}

/// The moment of a user's registers, which are all of one batch.
fn whole(moment: &Snapshot, user: &str) -> i64 {
    let Ok(registers) = moment.registers(user) else {
        return 0;
    };
    assert_eq!(registers.len(), ATTRIBUTES, "{user}: a torn batch");
    let at = registers[0].at;
    let same = registers.iter().all(|r| r.at == at);
    assert!(same, "{user}: a torn batch: {registers:?}");
    at.expect("events had times")
}

/// Appends, and sees what it wrote.
fn append(store: &Store, user: &str, at: i64, ack: Ack) -> Result<Receipt, StoreError> {
    let receipt = store.append_with(&batch(user, at), ack)?;
    let moment = store.snapshot();
    assert!(moment.as_of() >= receipt.as_of, "{user}: an older moment");
    assert_eq!(whole(&moment, user), at, "{user} does not read its write");
    Ok(receipt)
}

/// Looks three times: whole batches, and time never goes back.
fn watch(store: &Store, users: &[&str]) {
    let (mut last, mut seen) = (0, vec![0; users.len()]);
    for _ in 0..3 {
        let moment = store.snapshot();
        assert!(moment.as_of() >= last, "time went back from {last}");
        last = moment.as_of();
        for (user, seen) in users.iter().zip(&mut seen) {
            let now = whole(&moment, user);
            assert!(now >= *seen, "{user} went back to {now}");
            *seen = now;
        }
        thread::yield_now();
    }
}

fn closed(store: Arc<Store>) -> Result<(), StoreError> {
    Arc::into_inner(store).expect("the last handle").close()
}

#[test]
fn a_group_commit_makes_durable_whoever_waits_for_it() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let store = open(&path);
        let users = ["ada", "ben", "cy"];
        let writers = users.map(|user| {
            let store = store.clone();
            thread::spawn(move || {
                for at in 1..3 {
                    let ack = [Ack::Durable, Ack::Accepted][usize::from(at == 1 && user == "cy")];
                    append(&store, user, at, ack).expect("appended");
                }
            })
        });
        watch(&store, &users);
        for writer in writers {
            writer.join().expect("a writer");
        }
        let stats = store.stats().expect("counted");
        assert_eq!(stats.durable, stats.as_of, "acknowledged, but not on disk");
        let digest = store.snapshot().digest();
        closed(store).expect("closed");
        assert_eq!(open(&path).snapshot().digest(), digest);
    });
}

#[test]
fn a_failed_write_stops_everyone_and_takes_nothing_that_was_acknowledged() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let options = Options {
            segment_bytes: 150,
            ..options()
        };
        let store = Arc::new(Store::open(&path, options).expect("a store"));
        // Where the second segment would be stands a folder: the log cannot go on.
        let obstacle = path.join("log/000001-00000002.log");
        std::fs::create_dir(&obstacle).expect("a folder");
        let writers = ["ada", "ben", "cy"].map(|user| {
            let store = store.clone();
            thread::spawn(move || {
                let mut acknowledged = 0;
                let mut refused = false;
                for at in 1..6 {
                    match append(&store, user, at, Ack::Durable) {
                        Ok(_) => {
                            assert!(!refused, "{user} was refused before");
                            acknowledged = at;
                        }
                        Err(StoreError::Poisoned { .. } | StoreError::Io { .. }) => refused = true,
                        Err(other) => panic!("{user}: {other}"),
                    }
                }
                (user, acknowledged)
            })
        });
        let acknowledged = writers.map(|writer| writer.join().expect("a writer"));
        assert!(store.flush().is_err(), "the log went on");
        assert!(closed(store).is_err(), "the failure is not told");
        std::fs::remove_dir(&obstacle).expect("removed");
        let moment = open(&path).snapshot();
        for (user, at) in acknowledged {
            assert!(whole(&moment, user) >= at, "{user}: {at} was acknowledged");
        }
    });
}

#[test]
fn long_operations_are_seen_whole_or_not_at_all() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let store = open(&path);
        append(&store, "gone", 1, Ack::Durable).expect("appended");
        let run = |work: fn(&Store)| {
            let store = store.clone();
            thread::spawn(move || work(&store))
        };
        let workers = [
            run(|store| {
                store.forget("gone").expect("forgotten");
                assert!(!store.snapshot().has_user("gone"));
            }),
            run(|store| {
                // Long enough that readers get what was published before it.
                let events = [batch("ada", 1), batch("ben", 1)].concat();
                let receipt = store.append(&events).expect("appended");
                let moment = store.snapshot();
                assert!(moment.as_of() >= receipt.as_of);
                assert_eq!((whole(&moment, "ada"), whole(&moment, "ben")), (1, 1));
            }),
            run(|store| drop(append(store, "cy", 1, Ack::Durable).expect("appended"))),
        ];
        let (mut last, mut was_gone) = (0, false);
        for _ in 0..3 {
            let moment = store.snapshot();
            assert!(moment.as_of() >= last, "time went back from {last}");
            last = moment.as_of();
            assert_eq!(whole(&moment, "ada"), whole(&moment, "ben"), "a torn batch");
            assert!(!was_gone || !moment.has_user("gone"), "back again");
            was_gone = !moment.has_user("gone");
            thread::yield_now();
        }
        for worker in workers {
            worker.join().expect("a worker");
        }
        let digest = store.snapshot().digest();
        closed(store).expect("closed");
        assert_eq!(open(&path).snapshot().digest(), digest);
    });
}

#[test]
fn a_compaction_loses_nothing_that_comes_meanwhile() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let store = open(&path);
        append(&store, "ada", 1, Ack::Accepted).expect("appended");
        let compacting = {
            let store = store.clone();
            thread::spawn(move || {
                let report = store.compact().expect("compacted");
                assert_eq!(report.generation, 2);
            })
        };
        let writing = {
            let store = store.clone();
            thread::spawn(move || {
                for at in 2..4 {
                    append(&store, "ben", at, Ack::Durable).expect("appended");
                }
            })
        };
        watch(&store, &["ada", "ben"]);
        compacting.join().expect("the compaction");
        writing.join().expect("the writer");
        let digest = store.snapshot().digest();
        closed(store).expect("closed");
        assert_eq!(open(&path).snapshot().digest(), digest);
    });
}

#[test]
fn a_stream_settles_all_that_was_sent_before_a_flush() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let store = open(&path);
        let options = StreamOptions {
            capacity: 1,
            batch: 2,
            when_full: WhenFull::Busy,
            ..StreamOptions::default()
        };
        let patient = StreamOptions {
            when_full: WhenFull::Wait,
            ..options.clone()
        };
        let stream = Stream::start(store.clone(), patient).expect("a stream");
        let hasty = Stream::start(store.clone(), options).expect("a stream");
        let say = |user: &str, n: usize| {
            Event::new(user, &format!("attribute {n}"), Polarity::Like).at(1)
        };
        let producers = ["ada", "ben"].map(|user| {
            let (stream, store) = (stream.clone(), store.clone());
            thread::spawn(move || {
                for n in 0..2 {
                    stream.send(say(user, n)).expect("sent");
                }
                stream.flush().expect("settled");
                let registers = store.snapshot().registers(user).expect("known");
                assert_eq!(registers.len(), 2, "{user}: flushed, but not there");
            })
        });
        let mut taken = 0;
        for n in 0..3 {
            match hasty.send(say("cy", n)) {
                Ok(()) => taken += 1,
                Err(StoreError::Busy { capacity: 1 }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let counts = hasty.finish().expect("finished");
        assert_eq!((counts.sent, counts.applied), (taken, taken));
        for producer in producers {
            producer.join().expect("a producer");
        }
        let counts = stream.finish().expect("finished");
        assert_eq!((counts.sent, counts.applied), (4, 4));
        closed(store).expect("closed");
    });
}

#[test]
fn a_stream_over_a_failed_store_refuses_and_does_not_hang() {
    explore(|| {
        let folder = folder();
        let path = folder.path().join("store");
        let store = open(&path);
        std::fs::create_dir(path.join("log/000001-00000002.log")).expect("a folder");
        let options = StreamOptions {
            capacity: 1,
            batch: 1,
            ..StreamOptions::default()
        };
        let stream = Stream::start(store.clone(), options).expect("a stream");
        let producers = ["ada", "ben"].map(|user| {
            let stream = stream.clone();
            thread::spawn(move || {
                let sent = (1..12).try_for_each(|at| {
                    let id = format!("{at:0>60}");
                    let mut event = Event::new(user, "attribute", Polarity::Like).at(at);
                    event.id = Some(id);
                    stream.send(event)
                });
                match sent.and_then(|()| stream.flush().map(drop)) {
                    Err(StoreError::Poisoned { .. }) => {}
                    other => panic!("{user}: {other:?}"),
                }
            })
        });
        for producer in producers {
            producer.join().expect("a producer");
        }
        assert!(stream.finish().is_err(), "the failure is not told");
    });
}

/// A writer that changes one user's edge, and two readers of its moments: all three share one
/// slot of the cache.
fn cache_cell() {
    static ENCODER: OnceLock<Arc<Encoder>> = OnceLock::new();
    let encoder = ENCODER.get_or_init(|| {
        let bytes = std::fs::read("../tests/golden/sage/blind.safetensors").expect("weights");
        Arc::new(Encoder::from_bytes(&bytes).expect("an encoder"))
    });
    let (user, attribute) = (UserId(0), AttributeId(0));
    let mut feature = vec![0.5; encoder.config().in_dim_attribute];
    feature[0] = -1.5;
    let mut sage = Sage::with_cache(encoder.clone(), 1 << 12);
    sage.set_attribute_feature(attribute, Some(&feature))
        .expect("a feature");
    let read = move |sage: &Sage, liked: bool| {
        let own = [(attribute, Sign::Like)];
        let edges = if liked { &own[..] } else { &[] };
        let all = edges.iter().map(|&(a, sign)| (user, a, sign));
        let all: Vec<_> = all.collect();
        let features = [Some(feature.clone())];
        let expected = embed_all_from_nothing(sage.encoder(), &features, &[None], &all);
        let expected = expected.expect("vectors");
        assert_eq!(sage.embedding(user, edges), expected[0], "liked: {liked}");
    };
    let reader = |sage: &Sage, liked| {
        let (sage, read) = (sage.clone(), read.clone());
        thread::spawn(move || read(&sage, liked))
    };
    let first = reader(&sage, false);
    sage.on_edge(user, attribute, None, Some(Sign::Like));
    let second = reader(&sage, true);
    sage.on_edge(user, attribute, Some(Sign::Like), None);
    read(&sage, false);
    first.join().expect("a reader");
    second.join().expect("a reader");
}

/// All there are, up to sequential consistency: the cell is guarded by locks and one counter
/// that only its writer changes.
#[test]
fn the_cache_cell_is_right_under_every_schedule() {
    let schedules = under(DfsScheduler::new(None, false), cache_cell);
    println!("{schedules} schedules, which are all");
    assert!(schedules > 100);
}
