//! Whether the suite finds the bugs that were planted for it (storage/src/planted.rs).

use crate::suite::{Plan, attempt, row};

/// The rows that hunt, each with the most cases it gets.
const HUNT: [(&str, u64); 7] = [
    ("histories", 40),
    ("torn-tails", 400),
    ("bit-flips", 60),
    ("power-cuts", 300),
    ("failed-syncs", 12),
    ("failing-calls", 30),
    ("kills", 6),
];

/// Runs the rows until one fails: its name, after how many cases, and what it said. `None`:
/// all passed.
pub fn hunt() -> Option<(&'static str, u64, String)> {
    for (name, count) in HUNT {
        let row = row(name)?;
        let plan = Plan {
            seed: row.seed,
            count,
        };
        if let (cases, Err(said)) = attempt(row, plan) {
            return Some((name, cases, said));
        }
    }
    None
}
