//! Rows that damage the files of a closed store: cut, flipped, deleted, older.

use crate::files::{copy, files, in_memory};
use crate::histories;
use crate::suite::{Plan, case};
use simpatico_schema::edit::PreferencePair;
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Ack, Options, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn event(n: u64) -> Event {
    let mut random = Philox::new(5, n);
    let user = format!("user {}", random.below(40));
    let attribute = format!("attribute {}", random.below(30));
    let polarity = Polarity::ALL[random.below(4) as usize];
    let mut event = Event::new(&user, &attribute, polarity).at(n as i64);
    if random.below(2) == 0 {
        event.id = Some(format!("an id of some length, number {n}"));
    }
    event
}

/// Counts outcomes, for the table.
#[derive(Default)]
struct Outcomes(BTreeMap<&'static str, u64>);

impl Outcomes {
    fn add(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    fn text(&self) -> String {
        let parts: Vec<String> = self
            .0
            .iter()
            .map(|(what, n)| format!("{n} {what}"))
            .collect();
        format!("no wrong answer; {}", parts.join(", "))
    }
}

/// Opens a damaged store: right, or named and then repaired to something that was once true.
fn judge(
    store: &Path,
    right: &str,
    once: &dyn Fn(u64) -> Option<String>,
    outcomes: &mut Outcomes,
    prove: bool,
    what: &str,
) {
    match Store::open(store, Options::default()) {
        Ok(open) => {
            assert_eq!(open.snapshot().digest(), right, "{what}: another state");
            if prove {
                let report = open
                    .check()
                    .unwrap_or_else(|e| panic!("{what}: check: {e}"));
                let known = report.problems.iter().all(|p| p.starts_with("encoder"));
                assert!(report.identical || known, "{what}: {report:?}");
            }
            outcomes.add("right");
        }
        Err(
            StoreError::Corrupt { .. } | StoreError::RolledBack { .. } | StoreError::Version { .. },
        ) => {
            let report = match Store::repair(store) {
                Ok(report) => report,
                Err(e) => panic!("{what}: repair: {e}"),
            };
            let known = report.problems.iter().all(|p| p.starts_with("encoder"));
            assert!(report.identical || known, "{what}: {report:?}");
            let open = Store::open(store, Options::default());
            let open = open.unwrap_or_else(|e| panic!("{what}: after the repair: {e}"));
            let snapshot = open.snapshot();
            // Past a gap it is the truth less what was lost, which no moment ever was.
            if report.passed_over == 0
                && let Some(then) = once(snapshot.as_of())
            {
                assert_eq!(snapshot.digest(), then, "{what}: repaired to another state");
            }
            outcomes.add("named and repaired");
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

/// The row of torn tails.
pub fn torn_tails(plan: Plan) -> String {
    let folder = in_memory();
    let path = folder.path().join("store");
    let plain = || Options {
        mirror: false,
        ..Options::default()
    };
    let store = Store::open(&path, plain()).expect("a store");
    let mut digests = vec![store.snapshot().digest()];
    let (mut half, mut vouched, mut n) = (Vec::new(), 0, 0);
    let log = |path: &Path| files(&path.join("log")).remove(0);
    // 70 KiB, and a mark that vouches for a tenth of it.
    while vouched == 0 || std::fs::metadata(log(&path)).map_or(0, |m| m.len()) < 70 << 10 {
        store.append(&[event(n)]).expect("appended");
        digests.push(store.snapshot().digest());
        n += 1;
        let length = std::fs::metadata(log(&path)).map_or(0, |m| m.len());
        if vouched == 0 && length > 7 << 10 {
            store.flush().expect("flushed");
            // The writer moves the mark after the sync, and only then takes the next.
            let _ = store.stats();
            half = std::fs::read(path.join("mark")).expect("a mark");
            vouched = length as usize;
        }
    }
    store.close().expect("closed");
    let whole_mark = std::fs::read(path.join("mark")).expect("a mark");
    let bytes = std::fs::read(log(&path)).expect("a log");
    let from = bytes.len() - (64 << 10);
    let mut random = Philox::new(plan.seed, 0);
    let mut outcomes = Outcomes::default();
    let damaged = folder.path().join("damaged");
    let once = |as_of: u64| digests.get(as_of as usize).cloned();
    for number in 0..plan.count {
        case();
        // Every byte in turn when there are enough cases, and evenly spread when not.
        let tail = (64 << 10) as u64;
        let way = number % 4;
        let at = from + ((number / 4) * tail / plan.count.div_ceil(4).max(1)) as usize;
        let mut now = bytes.clone();
        match way {
            0 | 1 => now.truncate(at),
            2 => {
                let end = (at + 4096).min(now.len());
                let zero = random.below(2) == 0;
                now[at..end].fill_with(|| if zero { 0 } else { random.next_u32() as u8 });
            }
            _ => now[at] ^= 1 << random.below(8),
        }
        let _ = std::fs::remove_dir_all(&damaged);
        std::fs::create_dir_all(damaged.join("log")).expect("a folder");
        std::fs::create_dir_all(damaged.join("encoders")).expect("a folder");
        let name = log(&path);
        let name = name.file_name().expect("a name");
        std::fs::write(damaged.join("log").join(name), &now).expect("written");
        let what = format!("way {way} at byte {at}");
        if way == 0 {
            // With the mark of the close, every loss is seen.
            std::fs::write(damaged.join("mark"), &whole_mark).expect("written");
            assert!(
                Store::open(&damaged, plain()).is_err(),
                "{what}: opened without what was acknowledged"
            );
            judge(&damaged, "", &once, &mut outcomes, true, &what);
            continue;
        }
        // With an older mark: all that it vouches for, and whole frames beyond it.
        std::fs::write(damaged.join("mark"), &half).expect("written");
        match Store::open(&damaged, plain()) {
            Ok(store) => {
                let snapshot = store.snapshot();
                let as_of = snapshot.as_of() as usize;
                assert_eq!(
                    snapshot.digest(),
                    digests[as_of],
                    "{what}: no earlier state"
                );
                outcomes.add("healed");
            }
            Err(error) => {
                let place = matches!(
                    error,
                    StoreError::Corrupt { .. } | StoreError::RolledBack { .. }
                );
                assert!(place && at < vouched, "{what}: {error}");
                outcomes.add("named");
            }
        }
    }
    outcomes.text()
}

/// A store with everything in it, some of it twice; and an older copy of it.
fn rich(folder: &Path, long: bool) -> (String, BTreeMap<u64, String>) {
    let (path, older) = (folder.join("store"), folder.join("older"));
    let options = || Options {
        segment_bytes: 4_000,
        ..Options::default()
    };
    let store = Store::open(&path, options()).expect("a store");
    let encoder = histories::write_encoder(folder);
    let mut digests = BTreeMap::new();
    let note = |store: &Store, digests: &mut BTreeMap<u64, String>| {
        let snapshot = store.snapshot();
        digests.insert(snapshot.as_of(), snapshot.digest());
    };
    note(&store, &mut digests);
    for n in 0..60 {
        store.append(&[event(n)]).expect("appended");
        note(&store, &mut digests);
    }
    store.set_encoder(&encoder).expect("an encoder");
    note(&store, &mut digests);
    let pair = |user: &str| PreferencePair {
        user: user.into(),
        caption: "a room".into(),
        chosen: "add a lamp".into(),
        rejected: "add a tree".into(),
        source: "feedback".into(),
    };
    for n in 0..4 {
        store
            .put_pairs(&[pair(&format!("user {n}"))])
            .expect("a pair");
        note(&store, &mut digests);
    }
    store
        .reject("in.jsonl", 3, "no event", b"{}")
        .expect("kept");
    store.close().expect("closed");
    copy(&path, &older);
    let store = Store::open(&path, options()).expect("reopened");
    for n in 60..120 {
        store.append(&[event(n)]).expect("appended");
        note(&store, &mut digests);
    }
    if long {
        // Long beside what is live, so that the rows in sled are read at an open.
        for round in 0..90i64 {
            let mut batch = Vec::new();
            for n in 0..60 {
                let mut event = event(n);
                event.at = Some(10_000 + round);
                batch.push(event);
            }
            store.append_with(&batch, Ack::Accepted).expect("appended");
        }
        store.flush().expect("flushed");
        note(&store, &mut digests);
    }
    let digest = store.snapshot().digest();
    store
        .export_snapshot(&folder.join("snapshot"))
        .expect("a snapshot");
    store.close().expect("closed");
    (digest, digests)
}

/// The row of flipped bits.
pub fn bit_flips(plan: Plan) -> String {
    let folder = in_memory();
    let (short, long) = (folder.path().join("short"), folder.path().join("long"));
    let mut kinds = Vec::new();
    for (path, is_long) in [(&short, false), (&long, true)] {
        std::fs::create_dir_all(path).expect("a folder");
        kinds.push((path, rich(path, is_long)));
    }
    let mut random = Philox::new(plan.seed, 0);
    let mut outcomes = Outcomes::default();
    let damaged = folder.path().join("damaged");
    for number in 0..plan.count {
        case();
        let (path, (digest, digests)) = &kinds[number as usize % 2];
        let _ = std::fs::remove_dir_all(&damaged);
        copy(&path.join("store"), &damaged);
        let mut all = files(&damaged);
        // One of the snapshot file now and then.
        let snapshot = damaged.join("snapshot-file");
        if number % 16 == 15 {
            std::fs::copy(path.join("snapshot"), &snapshot).expect("copied");
            all = vec![snapshot.clone()];
        }
        let file = &all[random.below(all.len() as u32) as usize];
        let mut bytes = std::fs::read(file).expect("a file");
        if bytes.is_empty() {
            continue;
        }
        let mut places = BTreeSet::new();
        for _ in 0..1 + random.below(8) {
            places.insert(random.below(bytes.len() as u32 * 8) as usize);
        }
        for bit in &places {
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        std::fs::write(file, &bytes).expect("written");
        let what = format!("flip {number}: bits {places:?} of {}", file.display());
        if *file == snapshot {
            let target = folder.path().join("restored");
            let error = Store::restore(&snapshot, &target);
            let named = matches!(
                error,
                Err(StoreError::Corrupt { .. } | StoreError::Version { .. })
            );
            assert!(named && !target.exists(), "{what}: {error:?}");
            outcomes.add("snapshots refused with the place");
            continue;
        }
        let once = |as_of: u64| digests.get(&as_of).cloned();
        judge(
            &damaged,
            digest,
            &once,
            &mut outcomes,
            number % 4 == 0,
            &what,
        );
    }
    outcomes.text()
}

/// The row of lost and older files.
pub fn lost_files(plan: Plan) -> String {
    let folder = in_memory();
    let mut kinds = Vec::new();
    for is_long in [false, true] {
        let path = folder.path().join(if is_long { "long" } else { "short" });
        std::fs::create_dir_all(&path).expect("a folder");
        let made = rich(&path, is_long);
        kinds.push((path, made));
    }
    let mut random = Philox::new(plan.seed, 0);
    let mut outcomes = Outcomes::default();
    let damaged = folder.path().join("damaged");
    for number in 0..plan.count {
        case();
        let (path, (digest, digests)) = &kinds[number as usize % 2];
        let _ = std::fs::remove_dir_all(&damaged);
        copy(&path.join("store"), &damaged);
        let mut all = files(&damaged);
        let sled = damaged.join("sled");
        let (in_sled, others): (Vec<_>, Vec<_>) = all.drain(..).partition(|f| f.starts_with(&sled));
        // One file that is not sled's, or any number of sled's with or without its seal.
        let mut chosen = Vec::new();
        if number % 3 == 0 {
            chosen.extend(random.choose(&others).cloned());
        } else {
            let odds = 1 + random.below(3);
            chosen.extend(in_sled.into_iter().filter(|_| random.below(3) < odds));
            if random.below(2) == 0 {
                chosen.push(damaged.join("sled.seal"));
            }
        }
        let mut did = Vec::new();
        for file in &chosen {
            let below = file.strip_prefix(&damaged).expect("a file of the store");
            let old = path.join("older").join(below);
            if random.below(2) == 0 && old.exists() {
                std::fs::copy(&old, file).expect("copied");
                did.push(format!("older {}", below.display()));
            } else {
                std::fs::remove_file(file).expect("removed");
                did.push(format!("without {}", below.display()));
            }
        }
        let what = format!("case {number}: {did:?}");
        let once = |as_of: u64| digests.get(&as_of).cloned();
        judge(&damaged, digest, &once, &mut outcomes, true, &what);
    }
    outcomes.text()
}
