//! The row of volume: very many events through one store.

use crate::suite::{Plan, case};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Ack, Options, Store};

const BATCH: u64 = 10_000;
const ATTRIBUTES: u32 = 500;

/// Resident memory in KiB, and how many descriptors and threads this process has.
fn own() -> (u64, usize, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let number = |key: &str| {
        let line = status.lines().find(|l| l.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let descriptors = std::fs::read_dir("/proc/self/fd").map_or(0, |d| d.count());
    (
        number("VmRSS:").unwrap_or(0),
        descriptors,
        number("Threads:").unwrap_or(0),
    )
}

/// The row. There are ten events for each register there can be, so that after half of them
/// next to all are there: what grows from then on leaks.
pub fn row(plan: Plan) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path().join("store"), Options::default()).expect("a store");
    let users = (plan.count / 10 / u64::from(ATTRIBUTES)).clamp(20, 1 << 20) as u32;
    let batches = plan.count.div_ceil(BATCH).max(10);
    let mut warm = (0, 0, 0);
    let mut most = (0, 0, 0);
    for number in 0..batches {
        case();
        let mut random = Philox::new(plan.seed, number);
        let events: Vec<Event> = (0..BATCH)
            .map(|n| {
                let user = format!("user {}", random.below(users));
                let attribute = format!("attribute {}", random.below(ATTRIBUTES));
                let polarity = Polarity::ALL[random.below(4) as usize];
                Event::new(&user, &attribute, polarity).at((number * BATCH + n) as i64)
            })
            .collect();
        store.append_with(&events, Ack::Durable).expect("appended");
        // As an operator would: the log never holds many times what is live.
        if (number + 1) % (batches / 10).max(1) == 0 {
            store.compact().expect("compacted");
            let now = own();
            if warm.0 == 0 && number * 2 >= batches {
                warm = now;
            } else if warm.0 > 0 {
                most = (most.0.max(now.0), most.1.max(now.1), most.2.max(now.2));
            }
        }
    }
    let stats = store.stats().unwrap_or_default();
    let live = stats.registers.likes
        + stats.registers.dislikes
        + stats.registers.passes
        + stats.registers.clears;
    assert!(
        most.1 <= warm.1 + 2 && most.2 <= warm.2,
        "from {warm:?} to {most:?}"
    );
    assert!(
        most.0 <= warm.0 * 11 / 10,
        "memory from {} to {} KiB",
        warm.0,
        most.0
    );
    let snapshot = folder.path().join("snapshot");
    let written = store.export_snapshot(&snapshot).expect("a snapshot");
    assert!(
        stats.log_bytes <= 4 * written.bytes,
        "the log takes {} bytes for {} live",
        stats.log_bytes,
        written.bytes
    );
    let report = store.check().unwrap_or_else(|e| panic!("check: {e}"));
    assert!(report.identical, "{report:?}");
    format!(
        "{} events, {live} live registers: {} MB after half, at most {} MB later; {} descriptors, {} threads; log {:.1} MB, all files {:.1} MB, live {:.1} MB",
        batches * BATCH,
        warm.0 / 1024,
        most.0 / 1024,
        most.1,
        most.2,
        stats.log_bytes as f64 / 1e6,
        stats.disk_bytes as f64 / 1e6,
        written.bytes as f64 / 1e6
    )
}
