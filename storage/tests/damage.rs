//! Damage staged on the files of closed and killed stores: never a wrong answer. A store
//! opens with all that was acknowledged, or says what is wrong and where; and after a repair
//! it proves itself.

use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Options, Store, StoreError};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn event(n: u64) -> Event {
    let mut random = Philox::new(5, n);
    let user = format!("user {}", random.below(40));
    let attribute = format!("attribute {}", random.below(30));
    let polarity = Polarity::ALL[random.below(4) as usize];
    Event::new(&user, &attribute, polarity).at(n as i64)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push(path),
        }
    }
    all.sort();
    all
}

/// A store of `n` events, one frame each, closed. Returns its digest after each of them.
fn made(path: &Path, n: u64, mirror: bool) -> Vec<String> {
    let options = Options {
        mirror,
        segment_bytes: 3000,
        ..Options::default()
    };
    let store = Store::open(path, options).unwrap();
    let mut digests = vec![store.snapshot().digest()];
    for number in 0..n {
        store.append(&[event(number)]).unwrap();
        digests.push(store.snapshot().digest());
    }
    store.close().unwrap();
    digests
}

#[test]
fn a_torn_tail_loses_only_what_nobody_was_promised() {
    let dir = temporary();
    let whole = dir.path().join("whole");
    let digests = made(&whole, 60, false);
    let last = files(&whole.join("log")).pop().unwrap();
    let name = last.file_name().unwrap().to_owned();
    let bytes = std::fs::read(&last).unwrap();
    for keep in 0..bytes.len() {
        let torn = dir.path().join("torn");
        copy(&whole, &torn);
        std::fs::write(torn.join("log").join(&name), &bytes[..keep]).unwrap();
        // With the mark of the close, the loss is seen.
        match Store::open(&torn, Options::default()) {
            Err(StoreError::Corrupt { file, .. }) => assert_eq!(file.file_name(), Some(&*name)),
            Err(StoreError::RolledBack {
                expected, found, ..
            }) => assert!(found < expected),
            Err(other) => panic!("cut at {keep}: {other}"),
            Ok(_) => panic!("cut at {keep}: opened without what was acknowledged"),
        }
        let report = Store::repair(&torn).unwrap();
        assert!(
            report.identical && report.given_up.is_some(),
            "cut at {keep}"
        );
        let store = Store::open(&torn, Options::default()).unwrap();
        let as_of = store.snapshot().as_of() as usize;
        assert_eq!(store.snapshot().digest(), digests[as_of], "cut at {keep}");
        drop(store);
        std::fs::remove_dir_all(&torn).unwrap();
    }
}

/// As after a power cut: the mark is of an earlier moment than the log's last frames, which
/// are cut at any byte. What the mark vouches for is there, and whole batches beyond it.
#[test]
fn a_tail_torn_beyond_the_mark_is_healed() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = Store::open(
        &path,
        Options {
            mirror: false,
            ..Options::default()
        },
    )
    .unwrap();
    let mut digests = vec![store.snapshot().digest()];
    for number in 0..12 {
        store.append(&[event(number)]).unwrap();
        digests.push(store.snapshot().digest());
    }
    store.flush().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mark = std::fs::read(path.join("mark")).unwrap();
    let log = files(&path.join("log")).remove(0);
    let vouched = std::fs::metadata(&log).unwrap().len() as usize;
    for number in 12..24 {
        store.append(&[event(number)]).unwrap();
        digests.push(store.snapshot().digest());
    }
    store.close().unwrap();
    let bytes = std::fs::read(&log).unwrap();
    for keep in vouched..bytes.len() {
        std::fs::write(&log, &bytes[..keep]).unwrap();
        std::fs::write(path.join("mark"), &mark).unwrap();
        let store = Store::open(&path, Options::default()).unwrap();
        let as_of = store.snapshot().as_of() as usize;
        assert!(as_of >= 12, "cut at {keep}");
        assert_eq!(store.snapshot().digest(), digests[as_of], "cut at {keep}");
    }
}

#[test]
fn unacknowledged_garbage_behind_the_mark_is_cut_off() {
    let dir = temporary();
    let path = dir.path().join("store");
    let digests = made(&path, 20, false);
    let last = files(&path.join("log")).pop().unwrap();
    let whole = std::fs::read(&last).unwrap();
    let mut random = Philox::new(1, 1);
    for length in 1..200 {
        let mut bytes = whole.clone();
        bytes.extend((0..length).map(|_| random.next_u32() as u8));
        std::fs::write(&last, &bytes).unwrap();
        let store = Store::open(&path, Options::default()).unwrap();
        assert_eq!(&store.snapshot().digest(), digests.last().unwrap());
        drop(store);
        assert_eq!(std::fs::read(&last).unwrap(), whole);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_never_a_wrong_answer() {
    let flips = std::env::var("SIMPATICO_FLIPS").map_or(600, |n| n.parse().unwrap());
    let dir = temporary();
    let whole = dir.path().join("whole");
    let digest = made(&whole, 120, true).pop().unwrap();
    let mut random = Philox::new(2, 0);
    let mut outcomes: BTreeMap<&str, u32> = BTreeMap::new();
    for flip in 0..flips {
        let store_path = dir.path().join("flipped");
        copy(&whole, &store_path);
        let all = files(&store_path);
        let file = &all[random.below(all.len() as u32) as usize];
        let mut bytes = std::fs::read(file).unwrap();
        if bytes.is_empty() {
            continue;
        }
        let bit = random.below(bytes.len() as u32 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(file, &bytes).unwrap();
        let what = format!("flip {flip}, bit {bit} of {}", file.display());
        let outcome = match Store::open(&store_path, Options::default()) {
            Ok(store) => {
                assert_eq!(store.snapshot().digest(), digest, "{what}");
                assert!(store.check().unwrap().identical, "{what}");
                "right"
            }
            Err(StoreError::Corrupt { .. } | StoreError::RolledBack { .. }) => {
                let report = Store::repair(&store_path).unwrap();
                assert!(report.identical, "{what}: {report:?}");
                "named, then repaired"
            }
            Err(other) => panic!("{what}: {other}"),
        };
        *outcomes.entry(outcome).or_default() += 1;
        std::fs::remove_dir_all(&store_path).unwrap();
    }
    println!("{outcomes:?}");
    assert!(outcomes.len() == 2, "{outcomes:?}");
}

#[test]
fn a_deleted_or_older_mirror_changes_no_answer() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = Store::open(&path, Options::default()).unwrap();
    store.append(&[event(1)]).unwrap();
    store.close().unwrap();
    let older = dir.path().join("older");
    copy(&path, &older);
    let store = Store::open(&path, Options::default()).unwrap();
    for number in 2..200 {
        store.append(&[event(number)]).unwrap();
    }
    let digest = store.snapshot().digest();
    store.close().unwrap();
    for what in [
        "all of sled",
        "sled.seal",
        "older sled",
        "older sled and seal",
    ] {
        let damaged = dir.path().join("damaged");
        copy(&path, &damaged);
        let (sled, seal) = (damaged.join("sled"), damaged.join("sled.seal"));
        if what != "sled.seal" {
            std::fs::remove_dir_all(&sled).unwrap();
        }
        match what {
            "sled.seal" => std::fs::remove_file(&seal).unwrap(),
            "older sled" => copy(&older.join("sled"), &sled),
            "older sled and seal" => {
                copy(&older.join("sled"), &sled);
                std::fs::copy(older.join("sled.seal"), &seal).unwrap();
            }
            _ => {}
        }
        let store = Store::open(&damaged, Options::default()).unwrap();
        assert_eq!(store.snapshot().digest(), digest, "{what}");
        let report = store.check().unwrap();
        assert!(
            report.identical && report.mirror_rows > 0,
            "{what}: {report:?}"
        );
        drop(store);
        std::fs::remove_dir_all(&damaged).unwrap();
    }
}

/// A store whose log is long beside what is live opens from sled's rows; the same answers,
/// the same numbers, and the log goes on where it ended.
#[test]
fn a_long_log_is_opened_by_way_of_the_rows() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = Store::open(&path, Options::default()).unwrap();
    let again = |round: i64, user: i64| {
        let events: Vec<Event> = (0..20)
            .map(|a| {
                let polarity = Polarity::ALL[((round + user + a) % 4) as usize];
                let mut e =
                    Event::new(&format!("user {user}"), &format!("attribute {a}"), polarity);
                e.id = (a % 3 == 0).then(|| format!("id {round}"));
                e.at(round)
            })
            .collect();
        events
    };
    for round in 0..40 {
        for user in 0..10 {
            store
                .append_with(&again(round, user), simpatico_storage::Ack::Accepted)
                .unwrap();
        }
    }
    store.forget("user 3").unwrap();
    store
        .set_features(&[("attribute 1".into(), vec![0.5; 700])])
        .unwrap();
    store.put_pairs(&[pair("user 1"), pair("user 2")]).unwrap();
    let digest = store.snapshot().digest();
    store.close().unwrap();
    // The log's middle is unreadable: whoever opens the store now has not read it.
    let log = files(&path.join("log")).remove(0);
    let mut bytes = std::fs::read(&log).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&log, &bytes).unwrap();
    let store = Store::open(&path, Options::default()).unwrap();
    assert_eq!(store.snapshot().digest(), digest);
    assert!(
        matches!(store.check(), Err(StoreError::Corrupt { .. })),
        "check reads the log"
    );
    store.append(&again(99, 4)).unwrap();
    let digest = store.snapshot().digest();
    store.close().unwrap();
    bytes[middle] ^= 1;
    let grown = std::fs::read(&log).unwrap();
    bytes.extend_from_slice(&grown[bytes.len()..]);
    std::fs::write(&log, &bytes).unwrap();
    std::fs::remove_dir_all(path.join("sled")).unwrap();
    let store = Store::open(&path, Options::default()).unwrap();
    assert_eq!(
        store.snapshot().digest(),
        digest,
        "the log leads to the same"
    );
    assert!(store.check().unwrap().identical);
}

/// Where the frames of a log begin, segment by segment, and how long each is.
fn frames(store: &Path) -> Vec<(PathBuf, usize, usize)> {
    let mut all = Vec::new();
    for file in files(&store.join("log")) {
        let bytes = std::fs::read(&file).unwrap();
        let mut at = 64;
        while at < bytes.len() {
            let length = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize + 24;
            all.push((file.clone(), at, length));
            at += length;
        }
    }
    all
}

fn damage(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= 0x10;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_repair_loses_nothing_where_sled_has_what_was_said() {
    let dir = temporary();
    let path = dir.path().join("store");
    let digest = made(&path, 120, true).pop().unwrap();
    let (file, at, length) = frames(&path).swap_remove(20);
    damage(&file, at + length / 2);
    let refused = Store::open(&path, Options::default());
    assert!(matches!(refused, Err(StoreError::Corrupt { .. })));
    let report = Store::repair(&path).unwrap();
    assert!(report.identical && report.given_up.is_none(), "{report:?}");
    assert_eq!(report.passed_over, 1);
    let store = Store::open(&path, Options::default()).unwrap();
    assert_eq!(store.snapshot().digest(), digest);
    assert_eq!(store.snapshot().as_of(), 120);
}

/// Without sled, what is lost is what the damaged frames held.
#[test]
fn a_repair_keeps_the_frames_behind_the_damage() {
    let dir = temporary();
    let whole = dir.path().join("whole");
    made(&whole, 120, false);
    let named = |n: u64| {
        let of = event(n);
        (0..n).any(|m| event(m).user == of.user)
            && (0..n).any(|m| event(m).attribute == of.attribute)
    };
    let all: Vec<u64> = (0..120).collect();
    // Operation 0 is in the log's first frame; an unchanged event would be in none.
    let places = frames(&whole);
    assert_eq!(places.len(), all.len());
    let known: Vec<u64> = all.iter().copied().filter(|n| named(*n)).collect();
    for lost in known.iter().step_by(known.len() / 7) {
        let path = dir.path().join("damaged");
        copy(&whole, &path);
        let (file, at, length) = &places[*lost as usize];
        damage(
            &path.join("log").join(file.file_name().unwrap()),
            at + length - 2,
        );
        let report = Store::repair(&path).unwrap();
        assert!(
            report.identical && report.passed_over == 1,
            "{lost}: {report:?}"
        );
        let given_up = report.given_up.unwrap();
        assert!(given_up.starts_with("1 acknowledged"), "{lost}: {given_up}");
        let expected = dir.path().join("expected");
        let store = Store::open(&expected, Options::default()).unwrap();
        for n in all.iter().filter(|n| *n != lost) {
            store.append(&[event(*n)]).unwrap();
        }
        let repaired = Store::open(&path, Options::default()).unwrap();
        assert_eq!(
            repaired.snapshot().digest(),
            store.snapshot().digest(),
            "{lost}"
        );
        drop((store, repaired));
        std::fs::remove_dir_all(&path).unwrap();
        std::fs::remove_dir_all(&expected).unwrap();
    }
}

#[test]
fn nobody_comes_back_whose_forgetting_was_damaged() {
    let dir = temporary();
    let like = |user: &str, at| Event::new(user, "wood", Polarity::Like).at(at);
    for with_the_file in [true, false] {
        let path = dir.path().join(format!("store {with_the_file}"));
        let options = Options {
            mirror: false,
            ..Options::default()
        };
        let store = Store::open(&path, options).unwrap();
        store.append(&[like("ada", 1)]).unwrap();
        store.append(&[like("ben", 2)]).unwrap();
        store.forget("ada").unwrap();
        store.append(&[like("ben", 3)]).unwrap();
        store.close().unwrap();
        let (file, at, length) = frames(&path).swap_remove(2);
        damage(&file, at + length - 1);
        if !with_the_file {
            std::fs::remove_file(path.join("forgotten")).unwrap();
        }
        let report = Store::repair(&path).unwrap();
        assert!(report.identical && report.given_up.is_some(), "{report:?}");
        let store = Store::open(&path, Options::default()).unwrap();
        let moment = store.snapshot();
        // Without the file nothing behind the damage is believed.
        let (as_of, users) = match with_the_file {
            true => (4, vec!["ben"]),
            false => (2, vec!["ada", "ben"]),
        };
        assert_eq!(moment.as_of(), as_of);
        assert_eq!(moment.users().collect::<Vec<_>>(), users);
    }
}

/// The log is written anew while events, new names and forgettings go on arriving.
#[test]
fn appends_go_on_while_the_store_is_compacted() {
    let dir = temporary();
    let take = |store: &Store, n: u64| {
        store.append(&[event(n)]).unwrap();
        if n % 150 == 149 {
            let gone = event(n).user;
            store.forget(&gone).unwrap();
        }
        if n.is_multiple_of(40) {
            let name = format!("new {n}");
            let new = Event::new(&name, &name, Polarity::Like).at(n as i64);
            store
                .append_with(&[new], simpatico_storage::Ack::Accepted)
                .unwrap();
        }
    };
    let plain = Store::open(dir.path().join("plain"), Options::default()).unwrap();
    let path = dir.path().join("compacted");
    let store = Store::open(&path, Options::default()).unwrap();
    const EVENTS: u64 = 3_000;
    (0..EVENTS).for_each(|n| take(&plain, n));
    let reached = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..EVENTS {
                take(&store, n);
                reached.store(n, std::sync::atomic::Ordering::Relaxed);
            }
        });
        let mut compactions = 0;
        while reached.load(std::sync::atomic::Ordering::Relaxed) + 1 < EVENTS {
            store.compact().unwrap();
            compactions += 1;
        }
        assert!(compactions > 0);
    });
    let digest = plain.snapshot().digest();
    assert_eq!(store.snapshot().digest(), digest);
    assert_eq!(store.snapshot().as_of(), plain.snapshot().as_of());
    let report = store.check().unwrap();
    assert!(report.identical, "{report:?}");
    store.close().unwrap();
    let again = Store::open(&path, Options::default()).unwrap();
    assert_eq!(again.snapshot().digest(), digest);
}

fn pair(user: &str) -> simpatico_schema::edit::PreferencePair {
    simpatico_schema::edit::PreferencePair {
        user: user.into(),
        caption: "a room".into(),
        chosen: "add a lamp".into(),
        rejected: "add a tree".into(),
        source: "feedback".into(),
    }
}

#[test]
fn a_forgotten_user_leaves_no_byte() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = Store::open(&path, Options::default()).unwrap();
    for number in 0..200 {
        store.append(&[event(number)]).unwrap();
    }
    let marked = "zebra-marker";
    let mut own = Event::new(marked, "zebra-only attribute", Polarity::Like);
    own.id = Some("zebra-id".into());
    store
        .append(&[own, Event::new(marked, "attribute 1", Polarity::Dislike)])
        .unwrap();
    store.put_pairs(&[pair(marked)]).unwrap();
    store
        .set_user_features(&[(marked.into(), vec![1.0; 8])])
        .unwrap();
    store
        .set_features(&[("zebra-only attribute".into(), vec![1.0; 8])])
        .unwrap();
    store
        .reject("in.jsonl", 7, "bad", br#"{"user":"zebra-marker","x":1}"#)
        .unwrap();
    assert!(store.check().unwrap().identical); // and so written to sled
    let receipt = store.forget(marked).unwrap();
    assert_eq!(
        (
            receipt.registers,
            receipt.edges,
            receipt.pairs,
            receipt.rejected
        ),
        (2, 2, 1, 1)
    );
    assert!(matches!(
        store.forget(marked),
        Err(StoreError::UnknownUser { .. })
    ));
    let before = store.snapshot().as_of();
    let report = store.compact().unwrap();
    assert_eq!(report.attributes_dropped, 1);
    assert_eq!(store.snapshot().as_of(), before);
    assert!(store.check().unwrap().identical);
    let snapshot = dir.path().join("snapshot");
    store.export_snapshot(&snapshot).unwrap();
    let digest = store.snapshot().digest();
    store.close().unwrap();
    let mut all = files(&path);
    all.push(snapshot.clone());
    for file in all {
        let bytes = std::fs::read(&file).unwrap();
        let found = bytes.windows(5).any(|w| w == b"zebra");
        assert!(!found, "{}", file.display());
    }
    let restored = dir.path().join("restored");
    Store::restore(&snapshot, &restored).unwrap();
    assert!(matches!(
        Store::restore(&snapshot, &restored),
        Err(StoreError::NotAStore { .. })
    ));
    let store = Store::open(&restored, Options::default()).unwrap();
    assert_eq!(store.snapshot().digest(), digest);
    // A model of what is left: the same events without that user.
    let other = Store::open(dir.path().join("other"), Options::default()).unwrap();
    for number in 0..200 {
        other.append(&[event(number)]).unwrap();
    }
    assert_eq!(other.snapshot().digest(), digest);
}

#[test]
fn a_damaged_snapshot_file_is_refused_with_its_place() {
    let dir = temporary();
    let path = dir.path().join("store");
    made(&path, 30, false);
    let store = Store::open(&path, Options::default()).unwrap();
    let file = dir.path().join("snapshot");
    store.export_snapshot(&file).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    let target = dir.path().join("restored");
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        std::fs::write(&file, &flipped).unwrap();
        let error = Store::restore(&file, &target).unwrap_err();
        let named = matches!(
            error,
            StoreError::Corrupt { .. } | StoreError::Version { .. }
        );
        assert!(named, "byte {at}: {error}");
        std::fs::write(&file, &bytes[..at]).unwrap();
        assert!(Store::restore(&file, &target).is_err(), "cut at {at}");
        assert!(!target.exists());
    }
}

/// What the child of the next test does: 8 threads append one event at a time and say so.
#[test]
fn child_that_appends_until_it_is_killed() {
    let Ok(path) = std::env::var("SIMPATICO_KILL_STORE") else {
        return;
    };
    let options = Options {
        segment_bytes: 20_000,
        checkpoint_idle: std::time::Duration::from_millis(0),
        ..Options::default()
    };
    let store = Store::open(path, options).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let store = &store;
            scope.spawn(move || {
                for n in 0.. {
                    let id = format!("{thread}-{n}");
                    let mut event = event(n * 8 + thread);
                    event.id = Some(id.clone());
                    event.user = format!("thread {thread} {}", n % 50);
                    event.attribute = format!("n {n}");
                    store.append(&[event]).unwrap();
                    let line = format!("acked {thread} {n}\n");
                    std::io::stdout().write_all(line.as_bytes()).unwrap();
                }
            });
        }
    });
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let kills = std::env::var("SIMPATICO_KILLS").map_or(50, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut random = Philox::new(3, 0);
    for kill in 0..kills {
        let _ = std::fs::remove_dir_all(&path);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_that_appends_until_it_is_killed",
                "--nocapture",
            ])
            .env("SIMPATICO_KILL_STORE", &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut acked: BTreeMap<u64, u64> = BTreeMap::new();
            let mut total = 0u64;
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                let Some((_, words)) = line.split_once("acked ") else {
                    continue;
                };
                let numbers: Vec<u64> = words.split(' ').filter_map(|w| w.parse().ok()).collect();
                if let [thread, n] = numbers[..] {
                    acked.insert(thread, n);
                    total += 1;
                }
            }
            (acked, total)
        });
        std::thread::sleep(std::time::Duration::from_millis(
            30 + u64::from(random.below(120)),
        ));
        child.kill().unwrap();
        child.wait().unwrap();
        let (acked, total) = reader.join().unwrap();
        if !Store::exists(&path) {
            assert_eq!(total, 0);
            continue;
        }
        let store = Store::open(&path, Options::default()).unwrap();
        let snapshot = store.snapshot();
        for (thread, last) in acked {
            for n in 0..=last {
                let user = format!("thread {thread} {}", n % 50);
                let id = format!("{thread}-{n}");
                let held = snapshot.registers(&user).unwrap();
                assert!(
                    held.iter().any(|e| e.id.as_ref() == Some(&id)),
                    "kill {kill}: {id} was acknowledged and is lost"
                );
            }
        }
        assert!(store.check().unwrap().identical, "kill {kill}");
    }
}
