//! Faults, injected and counted: power cuts, failing calls, kill -9. Small counts here;
//! `FAULTS=full cargo test --release -p simpatico-tests --test faults` runs the full ones
//! and prints the table's rows.
//!
//! Every case is fixed by its seed, which a failure prints.

use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};
use simpatico_tests::power_cut::{self, Change, Survival};
use simpatico_tests::workload;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// How many cases: the small count, or the full one.
fn count(small: usize, full: usize) -> usize {
    if std::env::var("FAULTS").is_ok_and(|v| v == "full") {
        full
    } else {
        small
    }
}

/// The preloaded library, built once. It cannot be a dependency: its functions would take
/// libc's place in this very process.
fn interposer() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let worker = Path::new(env!("CARGO_BIN_EXE_fault_worker"));
        let target = worker
            .ancestors()
            .nth(2)
            .expect("target/PROFILE/fault_worker");
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--release",
                "--quiet",
                "-p",
                "simpatico-interposer",
                "--target-dir",
            ])
            .arg(target.join("interposer"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(status.success());
        target.join("interposer/release/libsimpatico_interposer.so")
    })
}

struct Run {
    root: tempfile::TempDir,
}

impl Run {
    fn new() -> Self {
        Self {
            root: tempfile::tempdir().unwrap(),
        }
    }

    fn watched(&self) -> PathBuf {
        self.root.path().join("watched")
    }

    fn command(&self, seed: u64, threads: u64, events: u64, duty: &str) -> Command {
        std::fs::create_dir_all(self.watched()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_fault_worker"));
        command
            .arg(self.watched())
            .args([
                seed.to_string(),
                threads.to_string(),
                events.to_string(),
                duty.to_string(),
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn preloaded(&self, seed: u64, threads: u64, events: u64, duty: &str) -> Command {
        let mut command = self.command(seed, threads, events, duty);
        command
            .env("LD_PRELOAD", interposer())
            .env("FAULT_ROOT", self.watched());
        command
    }

    fn trace(&self, seed: u64, threads: u64, events: u64, duty: &str) -> Vec<Change> {
        let file = self.root.path().join("trace");
        let output = self
            .preloaded(seed, threads, events, duty)
            .env("FAULT_TRACE", &file)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        power_cut::read_trace(&file).unwrap()
    }
}

/// The acks written before a cut: the bytes of the `acks` file in the trace up to there.
fn acks_before(changes: &[Change], count: usize) -> Vec<u8> {
    let mut inode = None;
    let mut acks = Vec::new();
    for change in &changes[..count] {
        match change {
            Change::Create { inode: i, path } if path.ends_with("acks") => inode = Some(*i),
            Change::Write { inode: i, data, .. } if inode == Some(*i) => acks.extend(data),
            _ => {}
        }
    }
    acks
}

/// Opens what is left and compares it: every acknowledged event is there; of each thread,
/// what is there is a prefix of what it sent; everything derived agrees with the log.
fn assert_survived(store: &Path, acks: &[u8], seed: u64, threads: u64, events: u64, what: &str) {
    let acked = workload::acknowledged(acks);
    if !Store::exists(store) {
        assert!(
            acked.is_empty(),
            "{what}: events were acknowledged, but no store is left"
        );
        return;
    }
    let store = match Store::open(store, Options::default()) {
        Ok(store) => store,
        Err(error) => panic!("{what}: the store does not open: {error}"),
    };
    let report = store
        .check()
        .unwrap_or_else(|e| panic!("{what}: check: {e}"));
    assert!(report.identical, "{what}: {report:?}");
    let snapshot = store.snapshot();
    let mut got: BTreeMap<String, BTreeMap<_, _>> = BTreeMap::new();
    for user in snapshot.users() {
        let edges: BTreeMap<_, _> = snapshot
            .edges(user)
            .unwrap()
            .into_iter()
            .map(|(a, s)| (a.to_string(), s))
            .collect();
        if !edges.is_empty() {
            got.insert(user.to_string(), edges);
        }
    }
    for thread in 0..threads {
        let prefix = format!("user-{thread}-");
        let of_thread: BTreeMap<_, _> = got
            .iter()
            .filter(|(u, _)| u.starts_with(&prefix))
            .map(|(u, e)| (u.clone(), e.clone()))
            .collect();
        let all: Vec<_> = (0..events)
            .map(|n| workload::event(seed, thread, n))
            .collect();
        let least = acked
            .get(&thread)
            .and_then(BTreeSet::last)
            .map_or(0, |n| *n as usize + 1);
        let fits = (least..=all.len()).any(|n| workload::edges(&all[..n]) == of_thread);
        assert!(
            fits,
            "{what}: thread {thread} had {least} events acknowledged; they are not all there"
        );
    }
}

#[test]
fn no_power_cut_loses_an_acknowledged_event() {
    let duties = ["", "compact", "forget", "snapshot"];
    for (seed, duty) in duties.into_iter().enumerate() {
        let seed = seed as u64;
        let (threads, events) = (4, 60);
        let run = Run::new();
        let changes = run.trace(seed, threads, events, duty);
        let syncs: Vec<usize> = (0..changes.len())
            .filter(|i| changes[*i].is_sync())
            .flat_map(|i| [i, i + 1])
            .collect();
        assert!(syncs.len() > 20, "{} sync points", syncs.len());
        let mut random = Philox::new(seed, 5);
        let mut points: Vec<(usize, Survival)> = Vec::new();
        for _ in 0..count(25, 125) {
            points.push((*random.choose(&syncs).unwrap(), Survival::None));
            let anywhere = random.below(changes.len() as u32 + 1) as usize;
            points.push((anywhere, Survival::Random(random.next_u64())));
        }
        for (at, survival) in points {
            assert_cut(&run, &changes, at, survival, seed, threads, events, duty);
        }
    }
}

#[test]
fn every_sync_point_of_a_run_survives_a_power_cut() {
    let (seed, threads, events) = (11, 1, count(60, 500) as u64);
    let run = Run::new();
    let changes = run.trace(seed, threads, events, "");
    for at in 0..=changes.len() {
        if at == changes.len() || changes[at].is_sync() {
            assert_cut(
                &run,
                &changes,
                at,
                Survival::None,
                seed,
                threads,
                events,
                "",
            );
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "they are the case's name")]
fn assert_cut(
    run: &Run,
    changes: &[Change],
    at: usize,
    survival: Survival,
    seed: u64,
    threads: u64,
    events: u64,
    duty: &str,
) {
    let left = tempfile::tempdir().unwrap();
    power_cut::cut(changes, at, survival, &run.watched(), left.path()).unwrap();
    let what = format!(
        "seed {seed}, duty {duty:?}, cut after {at} of {}, {survival:?}",
        changes.len()
    );
    let acks = acks_before(changes, at);
    assert_survived(
        &left.path().join("store"),
        &acks,
        seed,
        threads,
        events,
        &what,
    );
}

#[test]
fn a_failing_call_is_a_named_error_and_nothing_acknowledged_is_lost() {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    const EFBIG: i32 = 27;
    let mut random = Philox::new(21, 0);
    let operations = ["write", "sync", "rename", "open", "read"];
    for case in 0..count(60, 3000) {
        let op = operations[case % operations.len()];
        let n = 1 + random.below(count(60, 300) as u32);
        let errno = *random.choose(&[EIO, ENOSPC, EFBIG]).unwrap();
        let sticky = if random.below(2) == 1 { ":sticky" } else { "" };
        let (seed, threads, events) = (case as u64, 3, 40);
        let duty = ["", "compact", "forget"][random.below(3) as usize];
        let run = Run::new();
        let fail = format!("{op}:{n}:{errno}{sticky}");
        let mut child = run
            .preloaded(seed, threads, events, duty)
            .env("FAULT_FAIL", &fail)
            .spawn()
            .unwrap();
        let what = format!("case {case}: {fail}, duty {duty:?}");
        let status =
            wait(&mut child, Duration::from_secs(20)).unwrap_or_else(|| panic!("{what}: hangs"));
        let mut said = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
        assert!(!said.contains("panicked"), "{what}: {said}");
        assert!(matches!(status, 0 | 4), "{what}: status {status}: {said}");
        let acks = std::fs::read(run.watched().join("acks")).unwrap_or_default();
        assert_survived(
            &run.watched().join("store"),
            &acks,
            seed,
            threads,
            events,
            &what,
        );
    }
}

/// The exit status (a signal counts as 128 + its number), or `None` after the time limit.
fn wait(child: &mut std::process::Child, limit: Duration) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let started = std::time::Instant::now();
    while started.elapsed() < limit {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(
                status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    None
}

#[test]
fn kill_nine_at_a_random_moment_loses_nothing_acknowledged() {
    let mut random = Philox::new(31, 0);
    for case in 0..count(50, 1000) {
        let duty = ["", "compact", "forget", "snapshot"][random.below(4) as usize];
        let (seed, threads, events) = (case as u64, 8, 2_000);
        let run = Run::new();
        let mut child = run.command(seed, threads, events, duty).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(u64::from(random.below(150))));
        child.kill().unwrap();
        child.wait().unwrap();
        let acks = std::fs::read(run.watched().join("acks")).unwrap_or_default();
        let what = format!("case {case}, duty {duty:?}");
        assert_survived(
            &run.watched().join("store"),
            &acks,
            seed,
            threads,
            events,
            &what,
        );
    }
}
