//! Each target at its small count, or for FUZZ_SECONDS seconds each.

use simpatico_fuzz::{Budget, TARGETS, run};
use std::time::Duration;

/// One test for all: the memory of a case is counted over the whole process.
#[test]
fn nothing_that_reads_foreign_bytes_panics_hangs_or_swells() {
    let seconds = std::env::var("FUZZ_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    let mut findings = Vec::new();
    for target in TARGETS {
        let budget = match seconds {
            Some(seconds) => Budget::Time(Duration::from_secs(seconds)),
            None => Budget::Cases(target.small),
        };
        let report = run(target, 1, budget, None);
        println!(
            "{}: {} cases, {} accepted",
            target.name, report.cases, report.accepted
        );
        findings.extend(report.findings);
    }
    assert!(findings.is_empty(), "{findings:#?}");
}
