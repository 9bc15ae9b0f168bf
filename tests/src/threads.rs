//! The row of threads: 64 writers and 8 readers on one store.

use crate::suite::{Plan, case};
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Options, Store};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WRITERS: u64 = 64;
const READERS: u64 = 8;
const ATTRIBUTES: usize = 4;

/// Checks a user's registers: all of one batch. Returns its number.
fn whole(store: &Store, user: &str) -> Option<i64> {
    let snapshot = store.snapshot();
    let registers = snapshot.registers(user).ok()?;
    assert_eq!(registers.len(), ATTRIBUTES, "{user}: a torn batch");
    let first = registers[0].at;
    let same = registers.iter().all(|r| r.at == first);
    assert!(same, "{user}: a torn batch: {registers:?}");
    first
}

/// The row. `count` is in seconds.
pub fn row(plan: Plan) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path().join("store"), Options::default()).expect("a store");
    let stop = AtomicBool::new(false);
    let (batches, reads, slowest) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(plan.count);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (store, stop, batches, slowest) = (&store, &stop, &batches, &slowest);
            scope.spawn(move || {
                let user = format!("user {writer}");
                for n in 1i64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let batch: Vec<Event> = (0..ATTRIBUTES)
                        .map(|a| {
                            let polarity = Polarity::ALL[(n as usize + a) % 4];
                            Event::new(&user, &format!("attribute {a}"), polarity).at(n)
                        })
                        .collect();
                    let started = Instant::now();
                    store.append(&batch).expect("appended");
                    let ms = started.elapsed().as_millis() as u64;
                    slowest.fetch_max(ms, Ordering::Relaxed);
                    let seen = whole(store, &user);
                    assert_eq!(seen, Some(n), "{user} does not read its own write");
                    batches.fetch_add(1, Ordering::Relaxed);
                    case();
                }
            });
        }
        for reader in 0..READERS {
            let (store, stop, reads) = (&store, &stop, &reads);
            scope.spawn(move || {
                let (mut last, mut seen) = (0, vec![0i64; WRITERS as usize]);
                for n in reader as usize.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let as_of = store.snapshot().as_of();
                    assert!(as_of >= last, "time went back from {last} to {as_of}");
                    last = as_of;
                    let writer = n % WRITERS as usize;
                    if let Some(now) = whole(store, &format!("user {writer}")) {
                        assert!(now >= seen[writer], "user {writer} went back to {now}");
                        seen[writer] = now;
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let report = store.check().unwrap_or_else(|e| panic!("check: {e}"));
    assert!(report.identical, "{report:?}");
    format!(
        "none torn; {} batches, {} reads in {} s; the longest append took {} ms",
        batches.load(Ordering::Relaxed),
        reads.load(Ordering::Relaxed),
        plan.count,
        slowest.load(Ordering::Relaxed)
    )
}
