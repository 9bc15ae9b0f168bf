//! Each target at its small count, or for FUZZ_SECONDS seconds each.

use simpatico_fuzz::TARGETS;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The same readers once more, with a store around them: they get a third of the time.
const IN_A_STORE: [&str; 3] = ["log-in-a-store", "rows-in-a-store", "snapshot-restored"];

/// Each target is a process of its own, for the memory of a case is counted over the whole
/// process. Two more run at once than there are processors: some wait for the disk.
#[test]
fn nothing_that_reads_foreign_bytes_panics_hangs_or_swells() {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    let seconds: Option<u32> = seconds.map(|s| s.parse().expect("FUZZ_SECONDS is a number"));
    let (next, findings) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let at_once = std::thread::available_parallelism().map_or(1, usize::from) + 2;
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(target) = TARGETS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut command = Command::new(env!("CARGO_BIN_EXE_fuzz"));
                    command.arg(target.name);
                    // Else glibc gives its top pages back after each case and asks for them again.
                    command.env("MALLOC_TRIM_THRESHOLD_", "100000000");
                    command.env("MALLOC_TOP_PAD_", "10000000");
                    if let Some(seconds) = seconds {
                        let share = if IN_A_STORE.contains(&target.name) {
                            3
                        } else {
                            1
                        };
                        command.args(["--seconds", &(seconds / share).to_string()]);
                    }
                    let output = command.output().expect("the fuzzer runs");
                    let said = String::from_utf8_lossy(&output.stdout);
                    print!("{said}");
                    if !output.status.success() {
                        let trouble = String::from_utf8_lossy(&output.stderr);
                        let found = format!("{}: {said}{trouble}", target.name);
                        findings.lock().expect("not poisoned").push(found);
                    }
                }
            });
        }
    });
    let findings = findings.into_inner().expect("not poisoned");
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}
