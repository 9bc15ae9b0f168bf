//! The rows of the fault table at their small counts. `tests/faults --full` runs them in
//! full and writes FAULTS.md; a failing case says its seed.

use simpatico_tests::suite::run_small;
use std::path::Path;
use std::process::Command;

macro_rules! rows {
    ($($test:ident: $name:literal),* $(,)?) => {
        $(#[test]
        fn $test() {
            run_small($name);
        })*
    };
}

rows! {
    histories_with_crashes_equal_a_plain_model: "histories",
    a_torn_tail_is_healed_or_named: "torn-tails",
    flipped_bits_are_never_a_wrong_answer: "bit-flips",
    lost_and_older_files_are_never_a_wrong_answer: "lost-files",
    no_power_cut_loses_an_acknowledged_event: "power-cuts",
    every_sync_point_of_a_run_survives_a_power_cut: "every-sync-point",
    what_a_failed_sync_left_is_not_built_upon: "failed-syncs",
    a_failing_call_is_a_named_error_and_nothing_acknowledged_is_lost: "failing-calls",
    a_full_disk_is_a_named_error_and_nothing_acknowledged_is_lost: "full-disk",
    kill_nine_at_a_random_moment_loses_nothing_acknowledged: "kills",
    forgotten_users_leave_no_byte: "forget",
    writers_and_readers_see_whole_batches: "threads",
    no_schedule_breaks_the_concurrent_parts: "schedules",
    concurrent_calls_are_linearizable: "linearizable",
    what_is_no_event_is_kept_apart_and_stops_nothing: "poison",
    the_program_survives_signals_lost_readers_and_full_disks: "commands",
    many_events_leave_memory_flat: "volume",
}

/// The suite is tried on bugs planted for it: it finds each, and finds none where none is.
#[test]
fn every_planted_bug_is_found() {
    let programs = Path::new(env!("CARGO_BIN_EXE_faults")).parent().unwrap();
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "-p", "simpatico-tests"])
        .args([
            "--features",
            "planted",
            "--bin",
            "planted_faults",
            "--bin",
            "planted_worker",
        ])
        .arg("--target-dir")
        .arg(programs.parent().unwrap())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(status.success());
    let output = Command::new(programs.join("planted_faults"))
        .args(["--planted", "--no-table"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(output.status.success(), "{said}");
}
