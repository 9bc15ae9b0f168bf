//! Appends events to a store until it has done its share or the store fails; the faults
//! suite runs it under the interposer and kills it.
//!
//! `fault_worker ROOT SEED THREADS EVENTS [DUTY]`: the store is ROOT/store. Event number n
//! of thread t is fixed by the seed ([`simpatico_tests::workload::event`]). Once `append` has
//! returned, the line "t n\n" goes to ROOT/acks in one write. DUTY makes thread 0 do upkeep
//! in between: compact, snapshot or forget.
//!
//! Exit status: 0 done, 4 the store said no (the message is on stderr).

use simpatico_storage::{Options, Store};
use simpatico_tests::workload;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| args.get(at).and_then(|a| a.parse::<u64>().ok());
    let (Some(root), Some(seed), Some(threads), Some(events)) =
        (args.first(), number(1), number(2), number(3))
    else {
        eprintln!("usage: fault_worker ROOT SEED THREADS EVENTS [compact|snapshot|forget]");
        return ExitCode::from(2);
    };
    let duty = args.get(4).map_or("", String::as_str);
    match work(Path::new(root), seed, threads, events, duty) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::from(4)
        }
    }
}

fn work(root: &Path, seed: u64, threads: u64, events: u64, duty: &str) -> Result<(), String> {
    let store = Store::open(root.join("store"), Options::default()).map_err(|e| e.to_string())?;
    let acks = OpenOptions::new()
        .create(true)
        .append(true)
        .open(root.join("acks"))
        .map_err(|e| format!("acks: {e}"))?;
    let appended = |thread: u64| -> Result<(), String> {
        for n in 0..events {
            let event = workload::event(seed, thread, n);
            store
                .append(std::slice::from_ref(&event))
                .map_err(|e| e.to_string())?;
            (&acks)
                .write_all(format!("{thread} {n}\n").as_bytes())
                .map_err(|e| format!("acks: {e}"))?;
            if thread == 0 && n % 40 == 39 {
                upkeep(&store, root, duty, n)?;
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || appended(thread)))
            .collect();
        handles
            .into_iter()
            .map(|h| h.join().unwrap_or_else(|_| Err("a thread panicked".into())))
            .find(Result::is_err)
            .unwrap_or(Ok(()))
    })?;
    store.close().map_err(|e| e.to_string())
}

fn upkeep(store: &Store, root: &Path, duty: &str, n: u64) -> Result<(), String> {
    match duty {
        "compact" => store.compact().map(drop).map_err(|e| e.to_string()),
        "snapshot" => {
            let file = root.join(format!("{n}.snapshot"));
            store
                .export_snapshot(&file)
                .map(drop)
                .map_err(|e| e.to_string())
        }
        "forget" => match store.forget(workload::FORGOTTEN) {
            Ok(_) => Ok(()),
            Err(e) if e.to_string().contains(workload::FORGOTTEN) => Ok(()),
            Err(e) => Err(e.to_string()),
        },
        _ => Ok(()),
    }
}
