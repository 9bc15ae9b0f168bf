//! The whole store: `cargo bench -p simpatico-storage --bench store [-- w1 w2 w3 jsonl threads upkeep]`
//!
//! Bulk loads (appends of 8,192 events, all on disk at the end), opening, memory, questions through the
//! public API while another thread appends, JSONL from a file, 64 threads that append one
//! durable event at a time, and how long readers and writers wait for batches and a compaction. Figures go to `target/bench/store.json` (`--out DIR`
//! elsewhere). tests/peers measures other systems on the same data.

mod measure;

use measure::{Outcome, Report, SEED, Wanted, cpu_seconds, median_us, resident_mib, seconds};
use serde_json::json;
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, OverlapMode, Polarity, read_jsonl_event};
use simpatico_storage::workload::Workload;
use simpatico_storage::{Ack, Options, Store};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Events to an append.
const APPEND: usize = 8_192;
/// Events made ahead of time, which is not counted.
const PIECE: usize = 64 * APPEND;

fn main() -> Outcome {
    let wanted = Wanted::from_args();
    let mut report = Report::new("store");
    let folder = tempfile::tempdir_in(std::env::var("BENCH_DISK").unwrap_or(".".into()))?;
    let named = [
        ("w1", Workload::w1(SEED), 5_000),
        ("w2", Workload::w2(SEED), 2_000),
        ("w3", Workload::w3(SEED), 500),
    ];
    for (name, workload, questions) in named {
        if wanted.has(name) {
            let folder = folder.path().join(name);
            measure_workload(name, &workload, questions, &folder, &mut report)?;
        }
    }
    if wanted.has("jsonl") {
        jsonl(folder.path(), &mut report)?;
    }
    if wanted.has("threads") {
        threads(folder.path(), &mut report)?;
    }
    if wanted.has("upkeep") {
        upkeep(folder.path(), &mut report)?;
    }
    report.save(&wanted)
}

fn measure_workload(
    name: &str,
    workload: &Workload,
    questions: usize,
    folder: &Path,
    report: &mut Report,
) -> Outcome {
    let before = resident_mib();
    let store = Store::open(folder, Options::default())?;
    // Making the strings is the caller's work and is not timed.
    let (mut taken, mut cpu) = (0.0, 0.0);
    let mut piece = Vec::with_capacity(PIECE);
    let mut all = workload.events().peekable();
    while let Some(event) = all.next() {
        piece.push(event);
        if piece.len() == PIECE || all.peek().is_none() {
            let used = cpu_seconds();
            let (append, done) = seconds(|| -> Outcome {
                for events in piece.chunks(APPEND) {
                    store.append_with(events, Ack::Accepted)?;
                }
                Ok(())
            });
            done?;
            (taken, cpu) = (taken + append, cpu + cpu_seconds() - used);
            piece.clear();
        }
    }
    drop(piece);
    // The load is done when all of it is on disk.
    let used = cpu_seconds();
    let (flush, flushed) = seconds(|| store.flush());
    flushed?;
    (taken, cpu) = (taken + flush, cpu + cpu_seconds() - used);
    report.add(
        &format!("{name} bulk load, processor seconds"),
        json!(round(cpu)),
    );
    let speed = workload.edge_count() as f64 / taken / 1e6;
    report.add(
        &format!("{name} bulk load, durable, s"),
        json!(round(taken)),
    );
    report.add(
        &format!("{name} bulk load, durable, M events/s"),
        json!(round(speed)),
    );
    report.add(
        &format!("{name} memory, MiB"),
        json!(resident_mib() - before),
    );
    let (closing, closed) = seconds(|| store.close());
    closed?;
    report.add(&format!("{name} close, s"), json!(round(closing)));
    let (opening, store) = seconds(|| Store::open(folder, Options::default()));
    let store = store?;
    report.add(&format!("{name} open, s"), json!(round(opening)));
    report.add(
        &format!("{name} memory after open, MiB"),
        json!(resident_mib() - before),
    );
    ask(name, workload, questions, &store, report)?;
    if workload.users <= 100_000 {
        store.close()?;
        let store = Store::open(folder, Options::default())?;
        let (first, _) = seconds(|| store.snapshot().max_overlap(OverlapMode::Shared));
        let figure = format!("{name} first maximum after a close and an open, s");
        report.add(&figure, json!(round(first)));
    }
    Ok(())
}

fn ask(
    name: &str,
    workload: &Workload,
    questions: usize,
    store: &Store,
    report: &mut Report,
) -> Outcome {
    let mut random = Philox::new(SEED, 1 << 62);
    let users: Vec<_> = (0..questions)
        .map(|_| workload.user_name(random.below(workload.users)))
        .collect();
    let mode = OverlapMode::Shared;
    let (median, p99) = median_us(&users, |user| {
        let _ = store
            .snapshot()
            .overlaps(user, 10, mode)
            .map(|found| found.len());
    });
    let figure = format!("{name} snapshot and top-10, us (median, p99)");
    report.add(&figure, json!([median, p99]));
    for (words, pause) in [
        ("a stream", Duration::from_micros(1_280)),
        ("a flood", Duration::ZERO),
    ] {
        let asked = Asked {
            users: &users,
            mode,
        };
        while_events_arrive(name, workload, store, &asked, (words, pause), report);
    }
    // At W3 from nothing it takes half a minute and more, which is measured where asked for.
    if workload.users <= 100_000 || std::env::var_os("BENCH_W3_MAXIMUM").is_some() {
        let (first, answer) = seconds(|| store.snapshot().max_overlap(mode));
        report.add(
            &format!("{name} first maximum, s"),
            json!([round(first), answer]),
        );
        let (median, p99) = median_us(&users, |user| {
            let _ = store.append_with(&[random_event(workload, &mut random)], Ack::Accepted);
            let _ = store
                .snapshot()
                .similar(user, 10, mode)
                .map(|found| found.neighbors.len());
        });
        let figure = format!("{name} an event, a snapshot, top-10 with similarities, us");
        report.add(&figure, json!([median, p99]));
    }
    Ok(())
}

struct Asked<'a> {
    users: &'a [String],
    mode: OverlapMode,
}

/// Questions while another thread appends 64 durable events at a time, with this pause between
/// the beginnings of two appends.
fn while_events_arrive(
    name: &str,
    workload: &Workload,
    store: &Store,
    asked: &Asked<'_>,
    (words, pause): (&str, Duration),
    report: &mut Report,
) {
    let stop = AtomicBool::new(false);
    let appended = AtomicU64::new(0);
    let (taken, (median, p99)) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Philox::new(SEED, 1 << 61);
            let mut next = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                let events: Vec<_> = (0..64)
                    .map(|_| random_event(workload, &mut random))
                    .collect();
                if store.append(&events).is_err() {
                    return;
                }
                appended.fetch_add(64, Ordering::Relaxed);
                next = (next + pause).max(Instant::now());
                std::thread::sleep(next - Instant::now());
            }
        });
        let measured = seconds(|| {
            median_us(asked.users, |user| {
                let _ = store
                    .snapshot()
                    .overlaps(user, 10, asked.mode)
                    .map(|found| found.len());
            })
        });
        stop.store(true, Ordering::Relaxed);
        measured
    });
    let figure = format!("{name} snapshot and top-10 under {words}, us (median, p99)");
    report.add(&figure, json!([median, p99]));
    let rate = appended.into_inner() as f64 / taken;
    let figure = format!("{name} that {}, durable events/s", &words[2..]);
    report.add(&figure, json!(rate.round()));
}

fn random_event(workload: &Workload, random: &mut Philox) -> Event {
    let user = workload.user_name(random.below(workload.users));
    let attribute = workload.attribute_name(random.below(workload.attributes));
    let polarity = Polarity::ALL[random.below(4) as usize];
    Event::new(&user, &attribute, polarity)
}

/// Reads, parses and appends W2 from a file of JSON lines, durably.
fn jsonl(folder: &Path, report: &mut Report) -> Outcome {
    let workload = Workload::w2(SEED);
    let path = folder.join("events.jsonl");
    let mut file = BufWriter::new(std::fs::File::create(&path)?);
    for event in workload.events() {
        serde_json::to_writer(&mut file, &event)?;
        file.write_all(b"\n")?;
    }
    file.flush()?;
    let store = Store::open(folder.join("jsonl"), Options::default())?;
    let (taken, outcome) = seconds(|| -> Outcome {
        let mut lines = BufReader::with_capacity(1 << 20, std::fs::File::open(&path)?);
        let mut line = Vec::new();
        let mut events = Vec::with_capacity(APPEND);
        loop {
            line.clear();
            if lines.read_until(b'\n', &mut line)? == 0 {
                store.append_with(&events, Ack::Accepted)?;
                return Ok(store.flush()?);
            }
            events.push(read_jsonl_event(line.trim_ascii_end())?);
            if events.len() == APPEND {
                store.append_with(&events, Ack::Accepted)?;
                events.clear();
            }
        }
    });
    outcome?;
    let speed = workload.edge_count() as f64 / taken;
    report.add("JSONL file (W2), durable, events/s", json!(speed.round()));
    Ok(())
}

/// Snapshots while another thread appends batches, and appends while the store is compacted.
fn upkeep(folder: &Path, report: &mut Report) -> Outcome {
    let workload = Workload::w2(SEED);
    let store = Store::open(folder.join("upkeep"), Options::default())?;
    let events: Vec<_> = workload.events().collect();
    let loading = AtomicBool::new(true);
    let snapshots = std::thread::scope(|scope| {
        scope.spawn(|| {
            for events in events.chunks(APPEND) {
                if store.append_with(events, Ack::Accepted).is_err() {
                    break;
                }
            }
            loading.store(false, Ordering::Relaxed);
        });
        let mut taken = Vec::new();
        while loading.load(Ordering::Relaxed) {
            taken.push(seconds(|| drop(store.snapshot())).0);
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        taken
    });
    let waits = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times.get((times.len() as f64 * share) as usize);
        let us = |t: Option<&f64>| round(t.unwrap_or(&0.0) * 1e6);
        json!([us(at(0.5)), us(at(0.99)), us(times.last())])
    };
    let figure = "a snapshot while batches of 8,192 are appended, us (median, p99, most)";
    report.add(figure, waits(snapshots));
    drop(events);
    store.flush()?;
    let compacting = AtomicBool::new(true);
    let (taken, appends) = std::thread::scope(|scope| {
        let appends = scope.spawn(|| {
            let mut random = Philox::new(SEED, 1 << 59);
            let mut taken = Vec::new();
            while compacting.load(Ordering::Relaxed) {
                let event = [random_event(&workload, &mut random)];
                taken.push(seconds(|| drop(store.append(&event))).0);
            }
            taken
        });
        let (taken, compacted) = seconds(|| store.compact());
        compacting.store(false, Ordering::Relaxed);
        compacted.map(|_| (taken, appends.join().unwrap_or_default()))
    })?;
    report.add("w2 compaction, s", json!(round(taken)));
    let figure = "a durable event while w2 is compacted, us (median, p99, most)";
    report.add(figure, waits(appends));
    Ok(())
}

/// 64 threads, each waiting for its own event to be on disk before the next.
fn threads(folder: &Path, report: &mut Report) -> Outcome {
    const EACH: u32 = 200;
    let store = Store::open(folder.join("threads"), Options::default())?;
    let failed = AtomicBool::new(false);
    let (taken, ()) = seconds(|| {
        std::thread::scope(|scope| {
            for thread in 0..64 {
                let (store, failed) = (&store, &failed);
                scope.spawn(move || {
                    let mut random = Philox::new(SEED, thread);
                    let workload = Workload::w1(SEED);
                    for _ in 0..EACH {
                        if store
                            .append(&[random_event(&workload, &mut random)])
                            .is_err()
                        {
                            failed.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
    });
    assert!(!failed.into_inner(), "an append failed");
    let speed = f64::from(64 * EACH) / taken;
    report.add(
        "64 threads, one durable event each, events/s",
        json!(speed.round()),
    );
    Ok(())
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}
