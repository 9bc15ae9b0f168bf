//! Mutational fuzzing of everything that reads foreign bytes, on stable Rust.
//!
//! Not here: coverage. libFuzzer and its sanitizers need a nightly compiler. What this has in
//! its place is knowledge of the formats: checksums, chain digests and seals are made right
//! again after a mutation, so that the bytes behind them are reached.
//!
//! A case is fixed by target, seed and number. A panic that leaves our code, more than two
//! seconds of processor time, or more than 1 GiB held at once is a finding.

mod mutate;
mod repair;
mod targets;

pub use simpatico_tests::memory::peak_bytes;
pub use targets::{TARGETS, Target, target};

use simpatico_schema::random::Philox;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest a case may take, in processor time of its thread.
pub const SLOW: Duration = Duration::from_secs(2);
/// The most memory a case may hold.
pub const LARGE: usize = 1 << 30;

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// After so many cases.
    Cases(u64),
    /// After so long.
    Time(Duration),
}

/// What a run found.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases run.
    pub cases: u64,
    /// How many inputs were taken as valid.
    pub accepted: u64,
    /// The slowest case.
    pub slowest: Duration,
    /// The most memory one case held, in bytes.
    pub peak: usize,
    /// What is wrong, with the case's number; at most 20.
    pub findings: Vec<String>,
}

/// The files that a target's mutations begin with, in order.
pub fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> = Vec::new();
    for folder in std::iter::once(format!("corpus/{}", target.name))
        .chain(target.also.iter().map(|f| format!("../golden/{f}")))
    {
        let path = here.join(folder);
        if path.is_file() {
            files.push(path);
            continue;
        }
        let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
        let mut own: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| p.is_file()).collect();
        own.sort();
        files.extend(own);
    }
    let read = |path: &PathBuf| std::fs::read(path).expect("a file of the corpus");
    files.iter().map(read).collect()
}

/// Writes the files of the corpus that stores make: a log segment, a snapshot file, rows, and a
/// picture with its provenance. They are committed; this is how they came to be.
pub fn write_corpus() {
    use simpatico_schema::edit::Provenance;
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    targets::write_store(&path, 2);
    let log = path.join("log/000001-00000001.log");
    std::fs::copy(log, corpus.join("log-segment/store.log")).expect("copied");
    let store = simpatico_storage::Store::open(&path, Default::default()).expect("opens");
    let snapshot = corpus.join("snapshot-file/store.snapshot");
    store.export_snapshot(&snapshot).expect("a snapshot");
    let rows = targets::open_rows(&folder.path().join("rows"));
    for (tree, name) in (0..).zip(["user", "attribute", "learned", "pair", "edit"]) {
        let row = 1;
        let mut bytes = vec![tree, row];
        bytes.extend(
            rows.value(usize::from(tree), usize::from(row))
                .expect("a row"),
        );
        std::fs::write(corpus.join("sled-rows").join(name), bytes).expect("written");
    }
    let mut record = Provenance {
        version: 1,
        software: "simpatico".into(),
        instruction: "add a lamp".into(),
        digital_source_type: "trainedAlgorithmicMedia".into(),
        ..Provenance::default()
    };
    record.settings.steps = Some(4);
    let picture = simpatico_engine::picture::Picture::filled(3, 2, [9, 80, 200]);
    let png = corpus.join("provenance/picture.png");
    simpatico_engine::provenance::write(&png, &picture, &record).expect("written");
}

/// The bytes of one case.
pub fn input(target: &Target, corpus: &[Vec<u8>], seed: u64, number: u64) -> Vec<u8> {
    if let Some(whole) = corpus.get(number as usize) {
        return whole.clone();
    }
    let mut random = Philox::new(seed, number);
    let mut bytes = random.choose(corpus).cloned().unwrap_or_default();
    let other = random.choose(corpus).cloned().unwrap_or_default();
    mutate::mutate(&mut bytes, &other, target.words, &mut random);
    // Some cases go as they are: what stands before the checksums is to be reached too.
    if random.below(8) != 0 {
        (target.mend)(&mut bytes);
    }
    bytes
}

/// How long this thread was on a processor: unlike the clock, hardly moved by other programs.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Writes down a case before it is tried: the length in eight bytes, and the bytes. What a longer
/// case left behind them stays: giving pages back and asking for them again would be half of a
/// small case's time.
fn write_down(bytes: &[u8], page: &mut Vec<u8>, keep: &File) {
    page.clear();
    page.extend((bytes.len() as u64).to_le_bytes());
    page.extend(bytes);
    let _ = keep.write_all_at(page, 0);
}

/// Says once a minute how far a long run is.
fn tell(target: &Target, begun: Instant, report: &Report, budget: Budget, told: &mut u64) {
    let minutes = begun.elapsed().as_secs() / 60;
    if !report.cases.is_multiple_of(256) || minutes == *told {
        return;
    }
    *told = minutes;
    let of = match budget {
        Budget::Cases(most) => {
            let left = begun.elapsed().mul_f64(most as f64 / report.cases as f64);
            let left = left.saturating_sub(begun.elapsed()).as_secs() / 60;
            format!(" of {most}, about {left} min left")
        }
        Budget::Time(most) => format!(", {minutes} of {} min", most.as_secs() / 60),
    };
    let findings = report.findings.len();
    eprintln!(
        "{}: {} cases{of}; {findings} findings",
        target.name, report.cases
    );
}

/// Runs a target from a case on, after all that was found under coverage. `keep` holds each case's
/// bytes while it is tried, so that an abort leaves its cause behind.
pub fn run(target: &Target, seed: u64, from: u64, budget: Budget, keep: &File) -> Report {
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "{} has no corpus", target.name);
    let mut report = Report::default();
    let mut page = Vec::new();
    for (number, bytes) in grown(target).iter().enumerate() {
        write_down(bytes, &mut page, keep);
        attempt(
            target,
            format_args!("grown case {number}"),
            bytes,
            &mut report,
        );
    }
    report.accepted = 0;
    let begun = Instant::now();
    let mut told = 0;
    loop {
        match budget {
            Budget::Cases(most) if report.cases >= most => return report,
            Budget::Time(most) if begun.elapsed() >= most => return report,
            _ => {}
        }
        let number = from + report.cases;
        tell(target, begun, &report, budget, &mut told);
        let bytes = input(target, &corpus, seed, number);
        write_down(&bytes, &mut page, keep);
        attempt(target, format_args!("case {number}"), &bytes, &mut report);
        report.cases += 1;
        if number < corpus.len() as u64 && report.accepted == 0 && target.must_accept {
            let name = target.name;
            let what = format!("{name} case {number}: the corpus itself is not accepted");
            report.findings.push(what);
        }
    }
}

/// Tries one case.
fn attempt(target: &Target, name: std::fmt::Arguments<'_>, bytes: &[u8], report: &mut Report) {
    let started = processor_time();
    let (outcome, peak) = peak_bytes(|| catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))));
    let took = processor_time().saturating_sub(started);
    report.slowest = report.slowest.max(took);
    report.peak = report.peak.max(peak);
    let mut finding = |what: String| {
        if report.findings.len() < 20 {
            report
                .findings
                .push(format!("{} {name}: {what}", target.name));
        }
    };
    match outcome {
        Ok(accepted) => report.accepted += u64::from(accepted),
        Err(_) => finding("it panicked".into()),
    }
    if took > SLOW {
        finding(format!("it took {took:?}"));
    }
    if peak > LARGE {
        finding(format!("it held {peak} bytes"));
    }
}

/// Where the cases of a target lie that were found under coverage (`guided`): each is its length
/// in four bytes, little-endian, and its bytes. Whole, they are tried by every run; mutations do
/// not begin with them, so that a case keeps its number when they grow.
fn grown_file(target: &Target) -> PathBuf {
    let grown = Path::new(env!("CARGO_MANIFEST_DIR")).join("grown");
    grown.join(format!("{}.cases", target.name))
}

/// The cases of a target that were found under coverage.
pub fn grown(target: &Target) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(grown_file(target)).unwrap_or_default();
    let (mut rest, mut cases) = (&bytes[..], Vec::new());
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (case, behind) = behind.split_at_checked(length).expect("a whole case");
        cases.push(case.to_vec());
        rest = behind;
    }
    cases
}

/// Writes each case of the corpus and each grown one into a file of its own, for libFuzzer to begin
/// with. Says how many.
pub fn unpack(target: &Target, folder: &Path) -> std::io::Result<usize> {
    std::fs::create_dir_all(folder)?;
    let cases = [corpus(target), grown(target)].concat();
    for (number, case) in cases.iter().enumerate() {
        std::fs::write(folder.join(format!("known-{number}")), case)?;
    }
    Ok(cases.len())
}

/// The most that the grown cases of a target may come to, in bytes: they are committed.
const ROOM: usize = 1 << 18;

/// Makes a folder's files the grown cases, in the order of their length, then bytes, as many as
/// there is room for. Says how many.
pub fn pack(target: &Target, folder: &Path) -> std::io::Result<usize> {
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        cases.push(std::fs::read(entry?.path())?);
    }
    cases.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    cases.dedup();
    let (mut bytes, mut taken) = (Vec::new(), 0);
    for case in &cases {
        if bytes.len() + 4 + case.len() > ROOM {
            break;
        }
        bytes.extend((case.len() as u32).to_le_bytes());
        bytes.extend(case);
        taken += 1;
    }
    let path = grown_file(target);
    std::fs::create_dir_all(path.parent().expect("a folder"))?;
    std::fs::write(path, bytes)?;
    Ok(taken)
}
