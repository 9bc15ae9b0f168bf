//! What spans crates: faults injected and counted, parity with other programs, rules.
//!
//! The library holds the means (what a power cut leaves behind, the events that are
//! appended) and the rows of the fault table, each a function of a seed and a count. The
//! program `faults` runs them in full and writes FAULTS.md; the tests in tests/ run them
//! small.

pub mod commands;
pub mod damage;
pub mod files;
pub mod forgetting;
pub mod histories;
pub mod linearizable;
pub mod memory;
pub mod planted;
pub mod poison;
pub mod power_cut;
pub mod processes;
pub mod schedules;
pub mod suite;
pub mod threads;
pub mod volume;
pub mod workload;
