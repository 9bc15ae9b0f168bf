//! The row of commands: the program itself, interrupted, killed, its reader gone, its disk full.

use crate::files::{copy, in_memory};
use crate::processes::{mount, programs, unmount, wait};
use crate::suite::{Plan, case};
use simpatico_schema::random::Philox;
use simpatico_storage::{Options, Store};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Lines of the file that is ingested; more than the program appends at once.
const LINES: u64 = 80_000;
const USERS: u64 = 400;
/// How long a command gets until it counts as hanging.
const LIMIT: Duration = Duration::from_secs(60);

/// The program, built where it is not there yet.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program = programs().join("simpatico");
        if !program.is_file() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let target = programs().parent().expect("target").to_path_buf();
            let status = Command::new(cargo)
                .args(["build", "--release", "--quiet", "-p", "simpatico"])
                .arg("--target-dir")
                .arg(target)
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status()
                .expect("cargo runs");
            assert!(status.success());
        }
        program
    })
}

/// What a signal is to a command: asked to stop, told to stop, or stopped.
const SIGNALS: [(&str, i32); 3] = [("INT", 2), ("TERM", 15), ("KILL", 9)];

struct Bench {
    folder: tempfile::TempDir,
    random: Philox,
    /// Of the store that holds everything.
    digest: String,
    outcomes: BTreeMap<&'static str, u64>,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let folder = in_memory();
        let line = |n: u64| {
            format!(
                "{{\"user\":\"user {}\",\"attribute\":\"attribute {}\",\"polarity\":\"like\",\"at\":{n}}}\n",
                n % USERS,
                n / USERS
            )
        };
        let text: String = (0..LINES).map(line).collect();
        std::fs::write(folder.path().join("events.jsonl"), text).expect("written");
        let mut bench = Self {
            folder,
            random: Philox::new(seed, 0),
            digest: String::new(),
            outcomes: BTreeMap::new(),
        };
        let whole = bench.at("whole");
        let status = bench.command(&whole, &["ingest", "events.jsonl"]).status();
        assert!(status.expect("the program runs").success());
        let store = Store::open(&whole, Options::default()).expect("opens");
        bench.digest = store.snapshot().digest();
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, store: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .args(args)
            .args(["--quiet", "--store"])
            .arg(store)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// Sends a signal at some moment of a command, unless it has ended. Returns the exit status
    /// (128 and more: the signal) and whether it is one that the command may end with.
    fn signalled(&mut self, mut command: Command, most_ms: u32, what: &str) {
        let (name, number) = SIGNALS[self.random.below(3) as usize];
        let mut child = command.spawn().expect("the program runs");
        std::thread::sleep(Duration::from_millis(u64::from(self.random.below(most_ms))));
        let pid = child.id().to_string();
        let _ = Command::new("kill")
            .args(["-s", name, &pid])
            .stderr(Stdio::null())
            .status();
        let status = self.ended(&mut child, what);
        // Interrupted work says so with 1; what cannot stop in the middle goes on to its end.
        // 130: before the program could listen.
        let right = match name {
            "INT" => [0, 1, 130].contains(&status),
            _ => [0, 128 + number].contains(&status),
        };
        assert!(right, "{what}: SIG{name}, status {status}");
        let stopped = if status == 0 {
            "ended first"
        } else {
            "stopped"
        };
        *self.outcomes.entry(stopped).or_default() += 1;
    }

    fn ended(&self, child: &mut Child, what: &str) -> i32 {
        let status = wait(child, LIMIT);
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        assert!(!said.contains("panicked"), "{what}: {said}");
        status.unwrap_or_else(|| panic!("{what}: hangs"))
    }

    /// A command whose output cannot be written: status 1, and a reason.
    fn refused(&self, mut command: Command, what: &str) {
        let output = command.output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{what}: {said}");
        assert!(said.starts_with("error: "), "{what}: {said}");
    }

    /// A copy of the store that holds everything.
    fn copied(&self) -> PathBuf {
        let store = self.at("store");
        let _ = std::fs::remove_dir_all(&store);
        copy(&self.at("whole"), &store);
        store
    }

    /// Opens a store, which agrees with its log.
    fn checked(&self, store: &Path, what: &str) -> Store {
        let open = Store::open(store, Options::default());
        let open = open.unwrap_or_else(|e| panic!("{what}: {e}"));
        let report = open.check().unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(report.identical, "{what}: {report:?}");
        open
    }

    fn ingest(&mut self, what: &str) {
        let store = self.at("store");
        let _ = std::fs::remove_dir_all(&store);
        let command = self.command(&store, &["ingest", "events.jsonl"]);
        self.signalled(command, 250, what);
        if !Store::exists(&store) {
            return;
        }
        // The lines up to some place, and no others.
        let moment = self.checked(&store, what).snapshot();
        let mut times: Vec<i64> = Vec::new();
        for user in moment.users() {
            let registers = moment.registers(user).expect("a known user");
            times.extend(registers.iter().filter_map(|r| r.at));
        }
        times.sort_unstable();
        assert!(times.iter().copied().eq(0..times.len() as i64), "{what}");
    }

    /// A file that is written under a signal is there whole or not at all.
    fn snapshot(&mut self, what: &str) {
        let (whole, file) = (self.at("whole"), self.at("file"));
        let _ = std::fs::remove_file(&file);
        let command = self.command(&whole, &["snapshot", "file"]);
        self.signalled(command, 120, what);
        self.absent_or_whole(&file, what);
    }

    fn absent_or_whole(&self, file: &Path, what: &str) {
        if file.exists() {
            let restored = self.at("restored");
            let _ = std::fs::remove_dir_all(&restored);
            let report = Store::restore(file, &restored);
            assert!(report.is_ok(), "{what}: half a file: {report:?}");
        }
    }

    fn restore(&mut self, what: &str) {
        let (whole, file, store) = (self.at("whole"), self.at("file"), self.at("store"));
        let _ = std::fs::remove_file(&file);
        let _ = std::fs::remove_dir_all(&store);
        let made = self.command(&whole, &["snapshot", "file"]).status();
        assert!(made.expect("the program runs").success(), "{what}");
        let command = self.command(&store, &["restore", "file"]);
        self.signalled(command, 120, what);
        if store.exists() {
            let open = self.checked(&store, what);
            assert_eq!(open.snapshot().digest(), self.digest, "{what}");
        }
    }

    fn compact(&mut self, what: &str) {
        let store = self.copied();
        let command = self.command(&store, &["compact"]);
        self.signalled(command, 150, what);
        let open = self.checked(&store, what);
        assert_eq!(open.snapshot().digest(), self.digest, "{what}");
    }

    /// `export | head`: whoever reads goes away, which is no failure.
    fn reader_gone(&mut self, what: &str) {
        let whole = self.at("whole");
        let mut command = self.command(&whole, &["export"]);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it runs");
        let mut some = vec![0; self.random.below(200_000) as usize];
        let mut stdout = child.stdout.take().expect("a pipe");
        stdout.read_exact(&mut some).expect("an export of 8 MB");
        drop(stdout);
        assert_eq!(self.ended(&mut child, what), 0, "{what}");
    }

    /// A snapshot file on a disk with too little room, and an export to a full device.
    fn disk_full(&mut self, what: &str) {
        let whole = self.at("whole");
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        let mut export = self.command(&whole, &["export"]);
        export.stdout(full.expect("a full device"));
        self.refused(export, what);
        let disk = self.at("disk");
        std::fs::create_dir_all(&disk).expect("a folder");
        let room = format!("size={}k", 4 * (1 + self.random.below(20)));
        if !mount(&[&room], &disk) {
            return;
        }
        let attempt = || {
            self.refused(self.command(&whole, &["snapshot", "disk/file"]), what);
            self.absent_or_whole(&disk.join("file"), what);
        };
        let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt));
        // The panic of a failed case must not leave the mount behind.
        unmount(&disk);
        if let Err(panic) = attempt {
            std::panic::resume_unwind(panic);
        }
        *self.outcomes.entry("on a full disk").or_default() += 1;
    }
}

/// The row.
pub fn row(plan: Plan) -> String {
    let mut bench = Bench::new(plan.seed);
    for number in 0..plan.count {
        case();
        let (kind, name): (fn(&mut Bench, &str), _) = match number % 6 {
            0 => (Bench::ingest, "ingest"),
            1 => (Bench::snapshot, "snapshot"),
            2 => (Bench::restore, "restore"),
            3 => (Bench::compact, "compact"),
            4 => (Bench::reader_gone, "reader gone"),
            _ => (Bench::disk_full, "disk full"),
        };
        kind(&mut bench, &format!("case {number}, {name}"));
    }
    let parts = bench.outcomes.iter().map(|(what, n)| format!("{n} {what}"));
    let parts: Vec<String> = parts.collect();
    format!(
        "nothing half-written; {} commands: {}",
        plan.count,
        parts.join(", ")
    )
}
