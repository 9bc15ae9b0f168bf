//! Rows that run a worker process: power cuts, failing calls, full disks, kill -9.

use crate::files::in_memory;
use crate::power_cut::{self, Change, Survival};
use crate::suite::{Plan, case};
use crate::workload;
use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

const EIO: i32 = 5;
const EFBIG: i32 = 27;
const ENOSPC: i32 = 28;

/// The folder of the built programs.
pub(crate) fn programs() -> PathBuf {
    let own = std::env::current_exe().expect("this program's path");
    let folder = own.parent().expect("a folder");
    // Tests lie one folder deeper.
    match folder.ends_with("deps") {
        true => folder.parent().expect("target/release").to_path_buf(),
        false => folder.to_path_buf(),
    }
}

/// The worker, built with the same bugs as this program.
pub(crate) fn worker() -> PathBuf {
    let name = match cfg!(feature = "planted") {
        true => "planted_worker",
        false => "fault_worker",
    };
    programs().join(name)
}

/// The preloaded library, built once. It cannot be a dependency: its functions would take
/// libc's place in this very process.
fn interposer() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = programs().join("interposer");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args([
                "build",
                "--release",
                "--quiet",
                "-p",
                "simpatico-interposer",
            ])
            .arg("--target-dir")
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(status.success());
        target.join("release/libsimpatico_interposer.so")
    })
}

/// What the worker is to do.
#[derive(Clone, Copy, Debug)]
struct Job {
    seed: u64,
    threads: u64,
    events: u64,
    duty: &'static str,
}

struct Run {
    root: tempfile::TempDir,
}

impl Run {
    fn in_memory() -> Self {
        Self { root: in_memory() }
    }

    fn watched(&self) -> PathBuf {
        self.root.path().join("watched")
    }

    fn acks(&self) -> Vec<u8> {
        std::fs::read(self.watched().join("acks")).unwrap_or_default()
    }

    fn command(&self, job: Job) -> Command {
        std::fs::create_dir_all(self.watched()).expect("a folder");
        let mut command = Command::new(worker());
        command
            .arg(self.watched())
            .args([job.seed, job.threads, job.events].map(|n| n.to_string()))
            .arg(job.duty)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn preloaded(&self, job: Job) -> Command {
        let mut command = self.command(job);
        command
            .env("LD_PRELOAD", interposer())
            .env("FAULT_ROOT", self.watched());
        command
    }

    fn trace_file(&self) -> PathBuf {
        self.root.path().join("trace")
    }

    fn trace(&self, job: Job) -> Vec<Change> {
        let output = self
            .preloaded(job)
            .env("FAULT_TRACE", self.trace_file())
            .output()
            .expect("the worker runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{job:?}: {said}");
        power_cut::read_trace(&self.trace_file()).expect("a trace")
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
fn assert_survived(store: &Path, acks: &[u8], job: Job, what: &str) {
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
    let report = match store.check() {
        Ok(report) => report,
        Err(error) => panic!("{what}: check: {error}"),
    };
    assert!(report.identical, "{what}: {report:?}");
    let snapshot = store.snapshot();
    let mut got: BTreeMap<String, BTreeMap<_, _>> = BTreeMap::new();
    for user in snapshot.users() {
        let edges = snapshot.edges(user).expect("a known user");
        let edges: BTreeMap<_, _> = edges.into_iter().collect();
        if !edges.is_empty() {
            got.insert(user.to_string(), edges);
        }
    }
    for thread in 0..job.threads {
        let prefix = format!("user-{thread}-");
        let of_thread: BTreeMap<_, _> = got
            .iter()
            .filter(|(u, _)| u.starts_with(&prefix))
            .map(|(u, e)| (u.clone(), e.clone()))
            .collect();
        let all: Vec<_> = (0..job.events)
            .map(|n| workload::event(job.seed, thread, n))
            .collect();
        let least = acked.get(&thread).and_then(BTreeSet::last);
        let least = least.map_or(0, |n| *n as usize + 1);
        let fits = (least..=all.len()).any(|n| workload::edges(&all[..n]) == of_thread);
        assert!(
            fits,
            "{what}: thread {thread} had {least} events acknowledged; they are not all there"
        );
    }
}

fn assert_cut(run: &Run, changes: &[Change], at: usize, survival: Survival, job: Job) {
    case();
    let left = in_memory();
    power_cut::cut(changes, at, survival, &run.watched(), left.path()).expect("a cut");
    let what = format!("{job:?}, cut after {at} of {}, {survival:?}", changes.len());
    let acks = acks_before(changes, at);
    assert_survived(&left.path().join("store"), &acks, job, &what);
    // What a restore had made by then is whole, or not there.
    for entry in std::fs::read_dir(left.path())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("restored-")
            && !name.ends_with(".restoring")
            && let Err(e) = Store::open(entry.path(), Options::default())
        {
            panic!("{what}: {name} does not open: {e}");
        }
    }
}

/// The row of power cuts.
pub fn power_cuts(plan: Plan) -> String {
    let duties = ["", "compact", "forget", "snapshot", "restore"];
    let per_run = plan.count.min(50);
    let (mut done, mut changed) = (0, 0);
    for number in 0.. {
        let job = Job {
            seed: plan.seed + number,
            threads: 4,
            events: 60,
            duty: duties[number as usize % duties.len()],
        };
        let run = Run::in_memory();
        let changes = run.trace(job);
        changed += changes.len();
        let syncs: Vec<usize> = (0..changes.len())
            .filter(|i| changes[*i].is_sync())
            .flat_map(|i| [i, i + 1])
            .collect();
        assert!(syncs.len() > 20, "{} sync points", syncs.len());
        let mut random = Philox::new(job.seed, 5);
        for cut in 0..per_run {
            if done == plan.count {
                return format!(
                    "none lost; {done} cuts in {} runs of {changed} changes",
                    number + 1
                );
            }
            let (at, survival) = if cut % 2 == 0 {
                let at = random.choose(&syncs).copied().unwrap_or(0);
                (at, Survival::None)
            } else {
                let at = random.below(changes.len() as u32 + 1) as usize;
                (at, Survival::Random(random.next_u64()))
            };
            assert_cut(&run, &changes, at, survival, job);
            done += 1;
        }
    }
    unreachable!("the loop returns")
}

/// The row of every sync point.
pub fn every_sync_point(plan: Plan) -> String {
    let job = Job {
        seed: plan.seed,
        threads: 1,
        events: plan.count,
        duty: "",
    };
    let run = Run::in_memory();
    let changes = run.trace(job);
    let mut cuts = 0;
    for at in 0..=changes.len() {
        if at == changes.len() || changes[at].is_sync() {
            assert_cut(&run, &changes, at, Survival::None, job);
            cuts += 1;
        }
    }
    format!("none lost; {cuts} sync points")
}

/// The row of failed syncs: fail once, take up the work again, then cut the power.
pub fn failed_syncs(plan: Plan) -> String {
    let mut random = Philox::new(plan.seed, 0);
    let mut refused = 0;
    for number in 0..plan.count {
        let job = Job {
            seed: plan.seed + number,
            threads: 3,
            events: 30,
            duty: ["bulk", "compact", "segments"][random.below(3) as usize],
        };
        let run = Run::in_memory();
        let fail = format!("sync:{}:{EIO}", 6 + random.below(40));
        let first = run
            .preloaded(job)
            .env("FAULT_TRACE", run.trace_file())
            .env("FAULT_FAIL", &fail)
            .output()
            .expect("the worker runs");
        refused += u32::from(!first.status.success());
        let what = format!("{job:?}, {fail}");
        let before = power_cut::read_trace(&run.trace_file()).expect("a trace");
        let cut = |changes: &[Change], at: usize, survival: Survival, when: &str| {
            case();
            let left = in_memory();
            power_cut::cut(changes, at, survival, &run.watched(), left.path()).expect("a cut");
            let acks = acks_before(changes, at);
            let what = format!("{what}, cut {when}");
            assert_survived(&left.path().join("store"), &acks, job, &what);
        };
        cut(&before, before.len(), Survival::None, "after the failure");
        // Now and then it is only opened and closed: what an open vouches for is on the disk, too.
        let events = if random.below(3) == 0 { 0 } else { job.events };
        let changes = run.trace(Job { events, ..job });
        cut(
            &changes,
            changes.len(),
            Survival::None,
            "after the second run",
        );
        let more = (changes.len() - before.len()).max(1) as u32;
        let late = before.len() + random.below(more) as usize;
        cut(
            &changes,
            late,
            Survival::Random(number),
            "in the second run",
        );
    }
    format!(
        "none lost; {} runs, {refused} stopped by the failure, 3 cuts each",
        plan.count
    )
}

/// The row of failing calls.
pub fn failing_calls(plan: Plan) -> String {
    let mut random = Philox::new(plan.seed, 0);
    let operations = ["write", "sync", "rename", "open", "read"];
    let (mut hit, mut refused) = (0, 0);
    for number in 1..=plan.count {
        case();
        let op = operations[number as usize % operations.len()];
        let errno = random.choose(&[EIO, ENOSPC, EFBIG]).copied().unwrap_or(EIO);
        let sticky = if random.below(2) == 1 { ":sticky" } else { "" };
        let duties = ["", "compact", "forget", "snapshot", "restore"];
        let job = Job {
            seed: number,
            threads: 3,
            events: 40 + number / 6,
            duty: duties[random.below(5) as usize],
        };
        // Rare calls are failed early, or they would never be reached.
        let n = match op {
            "write" | "sync" => number,
            _ => 1 + number % 60,
        };
        let run = Run::in_memory();
        let fail = format!("{op}:{n}:{errno}{sticky}");
        let what = format!("{fail}, {job:?}");
        let mark = run.root.path().join("hit");
        let mut command = run.preloaded(job);
        command.env("FAULT_FAIL", &fail).env("FAULT_HIT", &mark);
        refused += u32::from(ended(&mut command, &what) != 0);
        hit += u32::from(mark.exists());
        assert_survived(&run.watched().join("store"), &run.acks(), job, &what);
    }
    format!(
        "all named; {} cases, {hit} reached their call, {refused} stopped the worker",
        plan.count
    )
}

/// Runs a worker to its end: done, or a named error; no panic, no hang.
fn ended(command: &mut Command, what: &str) -> i32 {
    let mut child = command.spawn().expect("the worker runs");
    let status = wait(&mut child, Duration::from_secs(60));
    let Some(status) = status else {
        panic!("{what}: hangs");
    };
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
    }
    // What sled's own threads say while the store catches them reaches nobody.
    let ours = |line: &&str| line.contains("panicked") && !line.contains("/sled-0.34");
    assert!(said.lines().find(ours).is_none(), "{what}: {said}");
    assert!(matches!(status, 0 | 4), "{what}: status {status}: {said}");
    status
}

/// The exit status (a signal counts as 128 + its number), or `None` after the time limit.
pub fn wait(child: &mut Child, limit: Duration) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let started = std::time::Instant::now();
    while started.elapsed() < limit {
        if let Ok(Some(status)) = child.try_wait() {
            let signal = || 128 + status.signal().unwrap_or(0);
            return Some(status.code().unwrap_or_else(signal));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Mounts a file system in memory, where this process may.
pub(crate) fn mount(arguments: &[&str], at: &Path) -> bool {
    let mut command = Command::new("mount");
    command
        .args(["-t", "tmpfs", "-o"])
        .args(arguments)
        .arg("tmpfs")
        .arg(at);
    command
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Takes away what [`mount`] mounted.
pub(crate) fn unmount(at: &Path) {
    let _ = Command::new("umount").arg(at).status();
}

/// The row of full disks. Where this process may not mount, only file-size limits are tried,
/// and the outcome says so.
pub fn full_disk(plan: Plan) -> String {
    let mut random = Philox::new(plan.seed, 0);
    let (mut disks, mut limits, mut refused) = (0, 0, 0);
    for number in 0..plan.count {
        case();
        let job = Job {
            seed: number,
            threads: 4,
            events: 1_500,
            duty: ["", "compact", "snapshot"][random.below(3) as usize],
        };
        let run = Run::in_memory();
        std::fs::create_dir_all(run.watched()).expect("a folder");
        let kib = 64 + random.below(600);
        let size = format!("size={kib}k");
        let mounted = number % 2 == 0 && mount(&[&size], &run.watched());
        let what = format!("{kib} KiB, mounted {mounted}, {job:?}");
        let status = if mounted {
            disks += 1;
            ended(&mut run.command(job), &what)
        } else {
            limits += 1;
            // The signal is ignored so that the write fails instead.
            let plain = run.command(job);
            let mut command = Command::new("bash");
            command
                .args([
                    "-c",
                    &format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", kib / 8),
                    "-",
                ])
                .arg(plain.get_program())
                .args(plain.get_args())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            ended(&mut command, &what)
        };
        refused += u32::from(status != 0);
        let acks = run.acks();
        if mounted {
            mount(&["remount,size=64m"], &run.watched());
        }
        // The panic of a failed case must not leave the mount behind.
        let check = || assert_survived(&run.watched().join("store"), &acks, job, &what);
        let survived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
        if mounted {
            unmount(&run.watched());
        }
        if let Err(panic) = survived {
            std::panic::resume_unwind(panic);
        }
    }
    let none = if disks == 0 {
        " (mounting was not permitted)"
    } else {
        ""
    };
    format!(
        "none lost; {disks} full disks{none}, {limits} file-size limits, {refused} stopped the worker"
    )
}

/// The row of kills. Up to three in a row on one store: the second falls on a store that is
/// being healed.
pub fn kills(plan: Plan) -> String {
    let mut random = Philox::new(plan.seed, 0);
    let duties = ["", "open", "compact", "snapshot", "restore", "forget"];
    let (mut kills, mut acked, mut stores) = (0, 0, 0);
    while kills < plan.count {
        let duty = duties[stores as usize % duties.len()];
        let job = Job {
            seed: stores,
            threads: if duty.is_empty() { 64 } else { 8 },
            events: 300,
            duty,
        };
        let root = tempfile::tempdir().expect("a temporary folder");
        let run = Run { root };
        stores += 1;
        for _ in 0..1 + random.below(3) {
            case();
            let mut child = run.command(job).spawn().expect("the worker runs");
            std::thread::sleep(Duration::from_millis(u64::from(random.below(120))));
            let _ = child.kill();
            let _ = child.wait();
            kills += 1;
        }
        let acks = run.acks();
        acked += acks.iter().filter(|b| **b == b'\n').count();
        let what = format!("kill {kills}, {job:?}");
        assert_survived(&run.watched().join("store"), &acks, job, &what);
        for entry in std::fs::read_dir(run.watched())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("restored-")
                && !name.ends_with(".restoring")
                && let Err(e) = Store::open(entry.path(), Options::default())
            {
                panic!("{what}: {name} does not open: {e}");
            }
        }
    }
    format!("none lost of {acked} acknowledged; {kills} kills of {stores} stores")
}
