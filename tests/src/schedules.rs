//! The row of schedules: the concurrent parts of the store under a scheduler of tests
//! (storage/tests/schedules.rs), built for it.

use crate::processes::programs;
use crate::suite::Plan;
use std::process::Command;

/// The row. `count` is in schedules of each kind, shared out among the scenarios.
pub fn row(plan: Plan) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = programs().parent().expect("target").to_path_buf();
    let output = Command::new(cargo)
        .args(["test", "--release", "--quiet", "-p", "simpatico-storage"])
        .args(["--features", "schedules", "--test", "schedules"])
        .arg("--target-dir")
        .arg(target)
        .args(["--", "--nocapture"])
        .env("SCHEDULES", plan.count.to_string())
        .env("SCHEDULES_SEED", plan.seed.to_string())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{failed}");
    let all = said.lines().find(|l| l.contains("which are all"));
    let all = all.unwrap_or("no schedules of the cache cell").trim();
    format!(
        "no assertion failed, no deadlock; {} random and {} PCT schedules; of the cache cell {}",
        plan.count,
        plan.count,
        all.trim_start_matches(|c: char| !c.is_ascii_digit())
    )
}
