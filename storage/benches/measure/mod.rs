//! What both benchmarks share: medians, the machine's name, memory, and the report.

use serde_json::{Map, Value, json};
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
                // Cargo says it to every benchmark.
                "--bench" => {}
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
        println!("{figure}: {value}");
        self.figures.insert(figure.into(), value);
    }

    /// Writes NAME.json. Figures of an earlier run that this one did not take are kept.
    pub fn save(self, wanted: &Wanted) -> Outcome {
        std::fs::create_dir_all(&wanted.out)?;
        let path = wanted.out.join(format!("{}.json", self.name));
        let old = std::fs::read(&path).unwrap_or_default();
        let mut all: Map<String, Value> = serde_json::from_slice(&old).unwrap_or_default();
        all.extend(self.figures);
        std::fs::write(&path, serde_json::to_string_pretty(&all)? + "\n")?;
        println!("written: {}", path.display());
        Ok(())
    }
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
