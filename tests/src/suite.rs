//! The rows of the fault table: what each does, how often, and how the table is written.

use crate::{
    commands, damage, forgetting, histories, linearizable, poison, processes, schedules, threads,
    volume,
};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How often a row runs, and from which seed.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Fixes every case.
    pub seed: u64,
    /// How many cases.
    pub count: u64,
}

/// One row. `run` panics at the first case that fails, with that case's name, and else says
/// what came of the cases.
pub struct Row {
    /// The name that `--row` takes.
    pub name: &'static str,
    /// What is done, and what must hold.
    pub what: &'static str,
    /// The seed of all counts.
    pub seed: u64,
    /// The count in CI; 0: not there.
    pub small: u64,
    /// The full count.
    pub full: u64,
    /// Does it.
    pub run: fn(Plan) -> String,
}

static CASES: AtomicU64 = AtomicU64::new(0);

/// Counts a case, before it is tried.
pub fn case() {
    CASES.fetch_add(1, Ordering::Relaxed);
}

/// All rows, the quick ones of a bug hunt first.
pub const ROWS: &[Row] = &[
    Row {
        name: "histories",
        what: "random histories (events, repeated and late ones, forget, compact, snapshot and restore, crash, reopen; 100 moves each, 200 where there are more than in CI) against a plain model: registers, neighbours with ties, counts, and embeddings bit for bit against a rebuild",
        seed: 1,
        small: histories::FEW,
        full: 100_000,
        run: histories::row,
    },
    Row {
        name: "torn-tails",
        what: "the log cut at a byte of its last 64 KiB, or a page there zeroed, garbled or with one bit flipped: what the mark vouches for is there or its loss is named, and a repair gives the bytes of a rebuild",
        seed: 2,
        small: 2_000,
        full: 4 * 65_536,
        run: damage::torn_tails,
    },
    Row {
        name: "bit-flips",
        what: "1 to 8 flipped bits in any file of a store (log, mark, seal, sled, encoder, lock, rejected lines) or in a snapshot file: the right answer or an error that names the place; a repair gives the bytes of a rebuild",
        seed: 3,
        small: 2_000,
        full: 20_000,
        run: damage::bit_flips,
    },
    Row {
        name: "lost-files",
        what: "one file, or any set of sled's files, deleted or replaced by an older copy: the same",
        seed: 4,
        small: 100,
        full: 500,
        run: damage::lost_files,
    },
    Row {
        name: "power-cuts",
        what: "a power cut at a sync point with all unsynced data gone, or anywhere with random 4 KiB pages and name changes kept: no acknowledged event lost, no half batch, the rest bit-identical to a rebuild",
        seed: 5,
        small: 200,
        full: 1_000,
        run: processes::power_cuts,
    },
    Row {
        name: "every-sync-point",
        what: "a power cut before every sync point of one run (of 60 events in CI, 500 in full)",
        seed: 11,
        small: 60,
        full: 500,
        run: processes::every_sync_point,
    },
    Row {
        name: "failed-syncs",
        what: "one failed sync, then the program again (or only an open and a close), then a power cut; what a failed sync left is taken as clean and lost by the kernel: no acknowledged event lost",
        seed: 6,
        small: 50,
        full: 500,
        run: processes::failed_syncs,
    },
    Row {
        name: "failing-calls",
        what: "EIO, ENOSPC or EFBIG from the n-th write, sync, rename, open or read, once or from then on; n up to the count: a named error, no panic, no hang, reopens with all that was acknowledged",
        seed: 21,
        small: 300,
        full: 3_000,
        run: processes::failing_calls,
    },
    Row {
        name: "full-disk",
        what: "a real full disk (a small tmpfs, or a file-size limit): a named error, reading goes on, reopens with all that was acknowledged once there is room",
        seed: 22,
        small: 10,
        full: 200,
        run: processes::full_disk,
    },
    Row {
        name: "kills",
        what: "kill -9 at a random moment (64 threads appending; or opening, compacting, writing snapshots, restoring, forgetting): no acknowledged event lost, opens, and is bit-identical to a rebuild",
        seed: 31,
        small: 200,
        full: 1_000,
        run: processes::kills,
    },
    Row {
        name: "forget",
        what: "100 marked users forgotten and the store compacted, killed in the middle and taken up again: no byte of them in any file (log, sled, rejected lines, snapshots, exports, and in a fifth of the cases pictures with their provenance and pages); all others as in a store that never knew them",
        seed: 41,
        small: 6,
        full: 100,
        run: forgetting::row,
    },
    Row {
        name: "threads",
        what: "64 writers and 8 readers for so many seconds: no torn batch seen, every writer reads its own writes, time never goes back",
        seed: 51,
        small: 10,
        full: 3_600,
        run: threads::row,
    },
    Row {
        name: "schedules",
        what: "group commit, snapshots, long operations, compaction, streams and a failing log under so many random and so many PCT schedules (shuttle), shared out among six scenarios; the cell of the cache under all there are",
        seed: 71,
        small: 20_000,
        full: 1_000_000,
        run: schedules::row,
    },
    Row {
        name: "linearizable",
        what: "so many registers, each written and read by 8 threads at once, with the times of all calls recorded: each history is linearizable",
        seed: 52,
        small: 2_000,
        full: 10_000,
        run: linearizable::row,
    },
    Row {
        name: "poison",
        what: "a stream of so many events of which one in a hundred is none: each is kept with its place and reason, all others are applied, the stream goes on",
        seed: 53,
        small: 100_000,
        full: 10_000_000,
        run: poison::row,
    },
    Row {
        name: "commands",
        what: "the program under SIGINT, SIGTERM and SIGKILL at a random moment (ingest, snapshot, restore, compact), its reader gone (export), its disk full (export, snapshot): the right exit status, files whole or absent, stores that open as they were",
        seed: 54,
        small: 60,
        full: 500,
        run: commands::row,
    },
    Row {
        name: "volume",
        what: "so many events through one store in a process of its own, from half of them on: bytes held flat within 5 %, resident memory within 10 %, descriptors and threads flat, the log at most 4 times what is live after a compaction; opens again as it was",
        seed: 61,
        small: 1_000_000,
        full: 100_000_000,
        run: volume::row,
    },
];

/// The row of this name.
pub fn row(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

/// Runs a row as a test: panics if it fails.
pub fn run_small(name: &str) {
    let row = row(name).expect("a row of this name");
    let plan = Plan {
        seed: row.seed,
        count: row.small,
    };
    println!("{name}: {}", (row.run)(plan));
}

/// What came of a row: how many cases were tried, and what it said or how it failed.
pub fn attempt(row: &Row, plan: Plan) -> (u64, Result<String, String>) {
    let before = CASES.load(Ordering::Relaxed);
    let result = catch_unwind(AssertUnwindSafe(|| (row.run)(plan)));
    let cases = CASES.load(Ordering::Relaxed) - before;
    let said = result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        text.unwrap_or_else(|| "it panicked".into())
    });
    (cases, said)
}

/// Where the table stands: FAULTS.md, or the file that FAULTS_TABLE names.
pub fn table_path() -> PathBuf {
    if let Some(path) = std::env::var_os("FAULTS_TABLE") {
        return path.into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("FAULTS.md")
}

/// Writes a line of one of the table's parts in place of the one with the same first cell.
pub fn record(part: &str, cells: &[String]) -> std::io::Result<()> {
    let path = table_path();
    let text = std::fs::read_to_string(&path)?;
    let (start, end) = (format!("<!-- {part} -->\n"), "<!-- end -->");
    let wrong = || std::io::Error::other(format!("FAULTS.md has no part {part}"));
    let (before, rest) = text.split_once(&start).ok_or_else(wrong)?;
    let (table, after) = rest.split_once(end).ok_or_else(wrong)?;
    let mut lines = table.lines();
    let head: Vec<&str> = lines.by_ref().take(2).collect();
    let clean = |c: &String| c.replace(['\n', '\r'], " ").replace('|', "/");
    let cells: Vec<String> = cells.iter().map(clean).collect();
    let mut rows: BTreeMap<String, String> = BTreeMap::new();
    let mut order: Vec<String> = Vec::new();
    let first = |line: &str| line.split('|').nth(1).unwrap_or("").trim().to_string();
    let fresh = format!("| {} |", cells.join(" | "));
    for line in lines.chain([fresh.as_str()]) {
        let key = first(line);
        if rows.insert(key.clone(), line.to_string()).is_none() {
            order.push(key);
        }
    }
    let body: Vec<&str> = order
        .iter()
        .filter_map(|k| rows.get(k))
        .map(|s| s.as_str())
        .collect();
    let text = format!(
        "{before}{start}{}\n{}\n{end}{after}",
        head.join("\n"),
        body.join("\n")
    );
    std::fs::write(&path, text)
}
