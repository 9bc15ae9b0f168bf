//! Appends events to a store until it has done its share or the store fails; the faults
//! suite runs it under the interposer and kills it.
//!
//! `fault_worker ROOT SEED THREADS EVENTS [DUTY]`: the store is ROOT/store. Event number n
//! of thread t is fixed by the seed ([`simpatico_tests::workload::event`]). Once `append` has
//! returned, the line "t n\n" goes to ROOT/acks in one write. DUTY makes thread 0 do upkeep
//! in between: compact, snapshot, restore, forget; `bulk` makes every append longer than a page
//! of the disk, and `segments` besides begins a new segment with each. The duty `open` opens and
//! closes the store all the time; `forget-marked` appends nothing, but forgets every marked user,
//! then compacts and writes a snapshot; `volume` measures memory ([`simpatico_tests::volume`]).
//!
//! Exit status: 0 done, 4 the store said no (the message is on stderr), 5 it said no and
//! then reading did not go on.

use simpatico_schema::Event;
use simpatico_storage::{Options, Store};
use simpatico_tests::{forgetting, volume, workload};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

/// Runs the program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|a| a.parse::<u64>().ok());
    let (Some(root), Some(seed), Some(threads), Some(events)) =
        (args.first(), number(1), number(2), number(3))
    else {
        eprintln!("usage: fault_worker ROOT SEED THREADS EVENTS [DUTY]");
        return ExitCode::from(2);
    };
    let duty = args.get(4).map_or("", String::as_str);
    let root = Path::new(root);
    let done = match duty {
        "forget-marked" => forgetting::forget_marked(root),
        "volume" => {
            println!("{}", volume::measure(&root.join("store"), seed, events));
            Ok(())
        }
        "open" => reopening(root, seed, events),
        _ => work(root, seed, threads, events, duty),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(if message.contains("reading failed") {
                5
            } else {
                4
            })
        }
    }
}

fn open(root: &Path, duty: &str) -> Result<Store, String> {
    let options = Options {
        // So that the mirror is written in the middle, and segments are begun.
        checkpoint_idle: std::time::Duration::from_millis(1),
        segment_bytes: if duty == "segments" { 1_000 } else { 20_000 },
        ..Options::default()
    };
    Store::open(root.join("store"), options).map_err(|e| e.to_string())
}

fn acks(root: &Path) -> Result<File, String> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(root.join("acks"));
    file.map_err(|e| format!("acks: {e}"))
}

fn append(store: &Store, acks: &File, seed: u64, thread: u64, n: u64) -> Result<(), String> {
    append_with(store, acks, seed, thread, n, &[])
}

/// Appends event `n` with others behind it, and acknowledges it.
fn append_with(
    store: &Store,
    acks: &File,
    seed: u64,
    thread: u64,
    n: u64,
    others: &[Event],
) -> Result<(), String> {
    let mut events = vec![workload::event(seed, thread, n)];
    events.extend_from_slice(others);
    store.append(&events).map_err(|e| e.to_string())?;
    let mut acks = acks;
    acks.write_all(format!("{thread} {n}\n").as_bytes())
        .map_err(|e| format!("acks: {e}"))
}

fn reopening(root: &Path, seed: u64, events: u64) -> Result<(), String> {
    let acks = acks(root)?;
    for n in 0..events {
        let store = open(root, "open")?;
        append(&store, &acks, seed, 0, n)?;
        if n % 2 == 0 {
            store.close().map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

fn work(root: &Path, seed: u64, threads: u64, events: u64, duty: &str) -> Result<(), String> {
    let store = open(root, duty)?;
    let acks = acks(root)?;
    let bulk = matches!(duty, "bulk" | "segments");
    let appended = |thread: u64| -> Result<(), String> {
        for n in 0..events {
            let others = workload::filling(if bulk { 25 } else { 0 }, thread, n);
            append_with(&store, &acks, seed, thread, n, &others)?;
            if thread == 0 && n % 40 == 39 {
                upkeep(&store, root, duty, n)?;
            }
        }
        Ok(())
    };
    let result = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || appended(thread)))
            .collect();
        handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| Err("a thread panicked".into())))
            .find(Result::is_err)
            .unwrap_or(Ok(()))
    });
    if let Err(message) = result {
        let moment = store.snapshot();
        for user in moment.users() {
            if let Err(e) = moment.edges(user) {
                return Err(format!("{message}; and reading failed: {e}"));
            }
        }
        return Err(message);
    }
    store.close().map_err(|e| e.to_string())
}

fn upkeep(store: &Store, root: &Path, duty: &str, n: u64) -> Result<(), String> {
    let text = |e: simpatico_storage::StoreError| e.to_string();
    let file = root.join(format!("{n}.snapshot"));
    match duty {
        "compact" => store.compact().map(drop).map_err(text),
        "snapshot" => store.export_snapshot(&file).map(drop).map_err(text),
        "restore" => {
            store.export_snapshot(&file).map_err(text)?;
            let target = root.join(format!("restored-{n}"));
            // What an earlier run of this worker restored goes away under another name: a kill
            // in the middle of removing it must not look like a restore cut in half.
            let gone = root.join(format!("gone-{n}"));
            let _ = std::fs::remove_dir_all(&gone);
            let _ = std::fs::rename(&target, &gone);
            let _ = std::fs::remove_dir_all(&gone);
            Store::restore(&file, &target).map(drop).map_err(text)
        }
        "forget" => match store.forget(workload::FORGOTTEN) {
            Ok(_) => Ok(()),
            Err(e) if e.to_string().contains(workload::FORGOTTEN) => {
                // It comes again, to be forgotten again.
                let event = Event::new(
                    workload::FORGOTTEN,
                    "what it liked",
                    simpatico_schema::Polarity::Like,
                );
                store.append(&[event]).map(drop).map_err(text)
            }
            Err(e) => Err(text(e)),
        },
        _ => Ok(()),
    }
}
