//! The row of volume: very many events through one store, in a process that does nothing else.
//!
//! Two kinds of memory are watched. What is *held* is counted at the allocator: after the last two
//! tenths, or after one of them, it must be within a twentieth of the most that it was until half.
//! (What leaks is there after both; sled's threads hold a tenth more for a while, whenever it
//! suits them.) What is *resident* also counts pages that the allocator keeps of what
//! was freed, a compaction's second state above all, and those pages of sled's fixed buffers
//! that were touched so far: it comes to rest only after some compactions, so it has a tenth
//! over the most that it was until half, and at least `RESIDENT_SLACK_KIB`.

use crate::memory::held;
use crate::processes::worker;
use crate::suite::Plan;
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Ack, Options, Store};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const BATCH: u64 = 10_000;
const ATTRIBUTES: u32 = 500;
/// Resident memory may grow by this whatever it was: pages of sled's buffers that are touched for
/// the first time late, where its threads get little of a processor, came to 9 MB. What leaks is
/// seen in what is held.
const RESIDENT_SLACK_KIB: u64 = 16 << 10;

/// What this process takes.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    held_kib: u64,
    resident_kib: u64,
    descriptors: usize,
    threads: u64,
}

impl Use {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let number = |key: &str| {
            let line = status.lines().find(|l| l.starts_with(key))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        Self {
            held_kib: held() as u64 / 1024,
            resident_kib: number("VmRSS:").unwrap_or(0),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |d| d.count()),
            threads: number("Threads:").unwrap_or(0),
        }
    }

    /// The least of some readings within a second, or within fifteen while there is more than
    /// there was at half: the mirror's thread and sled's own hold a few megabytes while they are at
    /// work, which is no growth, and on a busy machine they come to rest later.
    fn at_rest(half: Option<Self>) -> Self {
        let mut least = Self::now();
        for reading in 1..=150 {
            std::thread::sleep(Duration::from_millis(100));
            let now = Self::now();
            least = Self {
                held_kib: least.held_kib.min(now.held_kib),
                resident_kib: least.resident_kib.min(now.resident_kib),
                ..now
            };
            if reading >= 10 && half.is_none_or(|half| half.is_flat_to(least)) {
                break;
            }
        }
        least
    }

    fn max(self, other: Self) -> Self {
        Self {
            held_kib: self.held_kib.max(other.held_kib),
            resident_kib: self.resident_kib.max(other.resident_kib),
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
        }
    }

    fn is_flat_to(self, later: Self) -> bool {
        let resident = self.resident_kib * 11 / 10;
        let resident = resident.max(self.resident_kib + RESIDENT_SLACK_KIB);
        later.descriptors <= self.descriptors + 2
            && later.threads <= self.threads
            && later.held_kib <= self.held_kib * 21 / 20
            && later.resident_kib <= resident
    }
}

/// The row.
pub fn row(plan: Plan) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = Command::new(worker())
        .arg(folder.path())
        .args([plan.seed, 1, plan.count].map(|n| n.to_string()))
        .arg("volume")
        .output()
        .expect("the worker runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

fn batch(seed: u64, number: u64, users: u32) -> Vec<Event> {
    let mut random = Philox::new(seed, number);
    let event = |n: u64| {
        let user = format!("user {}", random.below(users));
        let attribute = format!("attribute {}", random.below(ATTRIBUTES));
        let polarity = Polarity::ALL[random.below(4) as usize];
        Event::new(&user, &attribute, polarity).at((number * BATCH + n) as i64)
    };
    (0..BATCH).map(event).collect()
}

/// The 99th percentile.
fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[(times.len() * 99).div_ceil(100) - 1]
}

/// Appends, compacting ten times, and panics if anything grows that must not. There are ten
/// events for each register there can be, so that after half of them next to all are there:
/// what grows from then on leaks. VOLUME_MIRROR=off leaves sled out, to tell its memory from ours.
pub fn measure(path: &Path, seed: u64, count: u64) -> String {
    let options = Options {
        mirror: std::env::var("VOLUME_MIRROR").as_deref() != Ok("off"),
        ..Options::default()
    };
    let store = Store::open(path, options).expect("a store");
    let users = (count / 10 / u64::from(ATTRIBUTES)).clamp(20, 1 << 20) as u32;
    let batches = count.div_ceil(BATCH).next_multiple_of(10);
    let (mut half, mut most) = (Use::default(), Use::default());
    let (mut slowest, mut held_kib) = (Vec::new(), Vec::new());
    for decile in 1..=10 {
        let mut times = Vec::new();
        for number in (decile - 1) * batches / 10..decile * batches / 10 {
            let events = batch(seed, number, users);
            let started = Instant::now();
            store.append_with(&events, Ack::Durable).expect("appended");
            times.push(started.elapsed());
        }
        slowest.push(p99(times));
        // As an operator would: the log never holds many times what is live.
        store.compact().expect("compacted");
        let now = Use::at_rest((decile > 5).then_some(half));
        held_kib.push(now.held_kib);
        match decile {
            // A system that takes idle pages away makes a process look small for a while.
            ..=5 => {
                half = Use {
                    descriptors: now.descriptors,
                    threads: now.threads,
                    ..half.max(now)
                }
            }
            _ => most = most.max(now),
        }
    }
    most.held_kib = held_kib[8].min(held_kib[9]);
    eprintln!("KiB held after each tenth: {held_kib:?}");
    let said = format!("after half {half:?}, later at most {most:?}");
    assert!(half.is_flat_to(most), "{said}");
    let stats = store.stats().expect("counted");
    let counts = stats.registers;
    let live = counts.likes + counts.dislikes + counts.passes + counts.clears;
    let written = store
        .export_snapshot(&path.with_extension("snapshot"))
        .expect("a snapshot");
    assert!(
        stats.log_bytes <= 4 * written.bytes,
        "the log takes {} bytes for {} live",
        stats.log_bytes,
        written.bytes
    );
    let report = store.check().unwrap_or_else(|e| panic!("check: {e}"));
    assert!(report.identical, "{report:?}");
    store.close().expect("closed");
    let started = Instant::now();
    let reopened = Store::open(path, Options::default()).expect("opens again");
    let opening = started.elapsed();
    assert_eq!(reopened.stats().expect("counted").registers, counts);
    format!(
        "{} events, {live} live registers: after half {} KiB held and {} resident, later at most {} and {}; {} descriptors, {} threads; log {:.1} MB, all files {:.1} MB, live {:.1} MB; p99 of an append of {BATCH} in the second tenth {:.1} ms, in the last {:.1} ms; reopened in {:.2} s",
        batches * BATCH,
        half.held_kib,
        half.resident_kib,
        most.held_kib,
        most.resident_kib,
        most.descriptors,
        most.threads,
        stats.log_bytes as f64 / 1e6,
        stats.disk_bytes as f64 / 1e6,
        written.bytes as f64 / 1e6,
        slowest[1].as_secs_f64() * 1e3,
        slowest[9].as_secs_f64() * 1e3,
        opening.as_secs_f64(),
    )
}
