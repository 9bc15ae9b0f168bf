//! Tries each mutant on the tests that reach it.

use crate::{Mutant, cargo, write};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows of the fault suite, at counts that end within seconds.
const ROWS: &[(&str, u32)] = &[
    ("histories", 40),
    ("torn-tails", 200),
    ("bit-flips", 200),
    ("lost-files", 40),
    ("power-cuts", 25),
    ("every-sync-point", 20),
    ("failed-syncs", 30),
    ("failing-calls", 40),
    ("kills", 8),
    ("linearizable", 100),
    ("poison", 5_000),
];

/// One test: a program with its arguments.
struct Check {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    folder: PathBuf,
    /// Processor time without a mutant.
    seconds: f64,
    /// The mutants whose switch it asks for.
    reaches: BTreeSet<usize>,
}

impl Check {
    /// Runs it with a mutant on (or tracing what is reached, into a file): whether it passed,
    /// and whether it ran out of processor time or stood still. Processor time is what an endless
    /// loop spends, however busy the machine is.
    fn run(&self, variable: &str, value: &str, limit: Limit) -> (bool, bool) {
        let limits = "ulimit -v 16000000; ulimit -t \"$1\"; shift; exec timeout -s KILL \"$@\"";
        let status = Command::new("sh")
            .args(["-c", limits, "sh"])
            .args([limit.processor.to_string(), limit.wall.to_string()])
            .arg(&self.program)
            .args(&self.args)
            .current_dir(&self.folder)
            .env(variable, value)
            .env("RUST_MIN_STACK", "67108864")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("sh runs");
        (
            status.success(),
            status.code() == Some(137) || status.code().is_none(),
        )
    }

    /// Thrice what it takes without a mutant, and two seconds.
    fn limit(&self) -> Limit {
        Limit {
            processor: (3.0 * self.seconds + 2.0).ceil() as u64,
            wall: (12.0 * self.seconds + 20.0).ceil() as u64,
        }
    }
}

/// How long a check may take, in seconds.
#[derive(Clone, Copy)]
struct Limit {
    processor: u64,
    wall: u64,
}

const GENEROUS: Limit = Limit {
    processor: 3600,
    wall: 3600,
};

/// Processor time of the children waited for so far, in seconds.
fn spent() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc");
    let fields = stat.rsplit(')').next().unwrap_or_default();
    // cutime and cstime, in hundredths of a second (proc(5)).
    let ticks = fields.split_whitespace().skip(13).take(2);
    ticks
        .map(|n| n.parse::<f64>().expect("a number"))
        .sum::<f64>()
        / 100.0
}

/// Every test by itself, and the rows.
fn checks(tree: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |name: String, program: &Path, args: &[&str], folder: &Path| {
        let args = args.iter().map(|a| a.to_string()).collect();
        checks.push(Check {
            name,
            program: program.into(),
            args,
            folder: folder.into(),
            seconds: 0.0,
            reaches: BTreeSet::new(),
        });
    };
    let built = cargo(
        tree,
        &[
            "test",
            "--release",
            "-p",
            "simpatico-schema",
            "-p",
            "simpatico-storage",
            "--tests",
            "--no-run",
            "--message-format=json",
        ],
    );
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    for line in built.stdout.split(|b| *b == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        let (Some(program), Some(manifest)) = (
            message["executable"].as_str(),
            message["manifest_path"].as_str(),
        ) else {
            continue;
        };
        let folder = Path::new(manifest).parent().expect("a folder");
        let listed = Command::new(program)
            .args(["--list", "--format", "terse"])
            .output()
            .expect("a list of tests");
        for test in String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter_map(|l| l.strip_suffix(": test"))
        {
            add(
                test.to_string(),
                Path::new(program),
                &["--exact", test],
                folder,
            );
        }
    }
    let built = cargo(
        tree,
        &["build", "--release", "-p", "simpatico-tests", "--bins"],
    );
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let program = tree
        .parent()
        .expect("a folder")
        .join("build/release/faults");
    for (row, count) in ROWS {
        add(
            format!("row {row}"),
            &program,
            &["--no-table", "--row", row, "--count", &count.to_string()],
            tree,
        );
    }
    checks
}

/// Runs a check without a mutant, for its time and for the mutants it reaches, and keeps both in a
/// file: a program that was not built anew is not asked again.
fn measure(check: &mut Check, work: &Path) {
    let file = work.join("reached").join(check.name.replace("::", "."));
    let changed = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if changed(&file) <= changed(&check.program) {
        let before = spent();
        let (passed, _) = check.run("MUTANT", "none", GENEROUS);
        assert!(passed, "{} fails without a mutant", check.name);
        write(&file, format!("{}\n", spent() - before));
        check.run("MUTANTS_SEEN", file.to_str().expect("UTF-8"), GENEROUS);
    }
    let text = std::fs::read_to_string(&file).expect("what was measured");
    let (seconds, ids) = text.split_once('\n').expect("lines");
    check.seconds = seconds.parse().expect("seconds");
    check.reaches = ids
        .lines()
        .map(|id| id.parse().expect("a number"))
        .collect();
}

/// Tries all of these mutants, or those named in the file behind `--only`, `--jobs` at once, on
/// the tests that take no longer than `--within` seconds and have `--tests` in their name. Writes
/// what came of each, and what was missed, into `work`.
pub fn all(work: &Path, tree: &Path, mutants: &[Mutant], switched: &[usize]) {
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| {
        args.iter()
            .position(|a| a == flag)
            .map(|at| args[at + 1].clone())
    };
    let number = |flag: &str| value(flag).map(|n| n.parse::<u32>().expect("a number"));
    let names = value("--only").map(|path| std::fs::read_to_string(path).expect("a file of names"));
    let jobs = number("--jobs").unwrap_or(1);
    let mut checks = checks(tree);
    if let Some(part) = value("--tests") {
        checks.retain(|check| check.name.contains(&part));
    }
    for check in &mut checks {
        measure(check, work);
    }
    checks.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    if let Some(most) = number("--within") {
        checks.retain(|check| check.seconds <= f64::from(most));
    }
    let named = |id: &&usize| {
        names
            .as_ref()
            .is_none_or(|n| n.lines().any(|l| l == mutants[**id].name))
    };
    let mut wanted: Vec<usize> = switched.iter().filter(named).copied().collect();
    // In an order that is fixed and any, so that a run that is stopped is a fair sample.
    wanted.sort_by_key(|id| (*id as u32).wrapping_mul(2_654_435_761));
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let kills = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(&id) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let said = attempt(&checks, id, &mutants[id].file, &kills);
                    println!("{said}: {}", mutants[id].name);
                    results.lock().expect("not poisoned").push((id, said));
                }
            });
        }
    });
    let mut results = results.into_inner().expect("not poisoned");
    results.sort();
    let lines = |of: &dyn Fn(&str) -> bool| {
        results
            .iter()
            .filter(|(_, s)| of(s))
            .map(|(id, _)| mutants[*id].name.clone() + "\n")
            .collect::<String>()
    };
    let missed = lines(&|s| s.starts_with("missed"));
    write(&work.join("missed.txt"), &missed);
    let all: String = results
        .iter()
        .map(|(id, said)| format!("{said}: {}\n", mutants[*id].name))
        .collect();
    write(&work.join("results.txt"), &all);
    let late = lines(&|s| s.starts_with("late")).lines().count();
    let (n, m) = (results.len(), missed.lines().count());
    println!(
        "{n} tried, {} caught ({late} of them by time), {m} missed: {:.1} % caught",
        n - m,
        100.0 * (n - m) as f64 / n.max(1) as f64
    );
}

/// What came of a mutant. Tests that caught many in its file for the time they take are tried first,
/// then quick ones.
fn attempt<'a>(
    checks: &[Check],
    id: usize,
    file: &'a str,
    kills: &Mutex<BTreeMap<(&'a str, usize), u32>>,
) -> String {
    let mut order: Vec<usize> = (0..checks.len())
        .filter(|&i| checks[i].reaches.contains(&id))
        .collect();
    if order.is_empty() {
        return "missed, reached by no test".into();
    }
    let count = |i: &usize| {
        kills
            .lock()
            .expect("not poisoned")
            .get(&(file, *i))
            .copied()
    };
    let worth = |i: &usize| f64::from(count(i).unwrap_or(0)) / (checks[*i].seconds + 0.05);
    order.sort_by_cached_key(|i| std::cmp::Reverse((worth(i) * 1000.0) as u64));
    for i in order {
        let (passed, late) = checks[i].run("MUTANT", &id.to_string(), checks[i].limit());
        if !passed {
            *kills
                .lock()
                .expect("not poisoned")
                .entry((file, i))
                .or_insert(0) += 1;
            return format!(
                "{} {}",
                if late { "late" } else { "caught" },
                checks[i].name
            );
        }
    }
    "missed".into()
}
