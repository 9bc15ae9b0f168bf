//! What both benchmarks share: medians, the machine's name, memory, and the report.

use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

#[path = "../../../engine/src/plot.rs"]
#[allow(dead_code)]
pub mod plot;

/// The seed of every workload here.
pub const SEED: u64 = 0;

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The command line: what to run (all, if nothing is named) and where figures go.
pub struct Wanted {
    names: Vec<String>,
    pub out: PathBuf,
}

impl Wanted {
    pub fn from_args() -> Self {
        let mut names = Vec::new();
        let mut out = PathBuf::from("target/bench");
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--out" => out = args.next().map_or(out, PathBuf::from),
                // Cargo says it to every benchmark; `--only NAME` reads as `NAME` does.
                "--bench" | "--only" => {}
                _ => names.push(arg),
            }
        }
        Self { names, out }
    }

    pub fn has(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|n| n == name)
    }
}

/// Figures by name, in order, printed as they come and saved at the end.
pub struct Report {
    name: &'static str,
    figures: Map<String, Value>,
}

impl Report {
    pub fn new(name: &'static str) -> Self {
        let mut report = Self {
            name,
            figures: Map::new(),
        };
        report.add("machine", json!(machine()));
        report.add("seed", json!(SEED));
        report
    }

    pub fn add(&mut self, figure: &str, value: Value) {
        match goal(figure) {
            Some(goal) => println!("{figure}: {value} (goal: {goal})"),
            None => println!("{figure}: {value}"),
        }
        self.figures.insert(figure.into(), value);
    }

    /// Writes NAME.json. Figures of an earlier run that this one did not take are kept.
    pub fn save(self, wanted: &Wanted) -> Outcome {
        std::fs::create_dir_all(&wanted.out)?;
        let mut lines = String::new();
        for (figure, value) in &self.figures {
            let line = json!({
                "bench": self.name, "figure": figure, "value": value, "goal": goal(figure),
                "seed": SEED, "machine": self.figures.get("machine"),
            });
            lines += &format!("{line}\n");
        }
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(wanted.out.join("results.jsonl"))?
            .write_all(lines.as_bytes())?;
        let path = wanted.out.join(format!("{}.json", self.name));
        let old = std::fs::read(&path).unwrap_or_default();
        let mut all: Map<String, Value> = serde_json::from_slice(&old).unwrap_or_default();
        all.extend(self.figures);
        std::fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")?;
        println!("written: {}", path.display());
        Ok(())
    }
}

/// What a figure is to be compared with: twice the best sketch or rival measured beforehand,
/// or what was promised. Medians come first in a pair.
fn goal(figure: &str) -> Option<&'static str> {
    let goals = [
        ("w1 top-10 Shared", "10 us"),
        ("w2 top-10 Shared", "100 us"),
        ("w3 top-10 Shared", "600 us"),
        ("w1 snapshot and top-10", "10 us"),
        ("w2 snapshot and top-10", "100 us"),
        ("w3 snapshot and top-10", "600 us"),
        ("w2 bulk load, durable, M", "at least 2"),
        ("w3 bulk load, durable, s", "40 s"),
        ("w3 memory", "700 MiB"),
        ("w3 open", "10 s"),
        ("JSONL file", "at least 500,000"),
        ("64 threads", "20 times SQLite"),
    ];
    let found = goals.iter().find(|(start, _)| figure.starts_with(start));
    found.map(|(_, goal)| *goal)
}

/// Seconds of processor time this process has used, all threads together.
#[allow(dead_code)] // Not every benchmark that includes this file asks.
pub fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after.split_whitespace().skip(11).take(2);
    // Linux reports hundredths whatever its own clock.
    ticks.filter_map(|t| t.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// The processor, how many of it, and the system's load when asked.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|l| l.strip_prefix("model name\t: "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?").to_string();
    let wide = std::env::consts::ARCH;
    format!(
        "{}, {wide}, {cores} cores, load {load}",
        model.unwrap_or("?")
    )
}

/// Resident memory in MiB.
pub fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
    (kib.unwrap_or(0.0) / 1024.0).round()
}

/// Seconds of one call, and its result.
pub fn seconds<T>(call: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let result = call();
    (start.elapsed().as_secs_f64(), result)
}

/// Median and 99th percentile of the calls' times, in microseconds.
pub fn median_us<I>(items: impl IntoIterator<Item = I>, mut call: impl FnMut(I)) -> (f64, f64) {
    let each = items.into_iter().map(|item| seconds(|| call(item)).0 * 1e6);
    let mut times: Vec<f64> = each.collect();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize);
    let rounded = |t: Option<&f64>| (t.unwrap_or(&0.0) * 100.0).round() / 100.0;
    (rounded(at(0.5)), rounded(at(0.99)))
}
