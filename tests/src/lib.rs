//! What spans crates: parity with reference implementations, crashes, end to end.
//!
//! The library holds the means (what a power cut leaves behind, the events that are
//! appended); the tests are in tests/.

pub mod power_cut;
pub mod workload;
