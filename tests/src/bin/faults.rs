//! Runs the fault suite's rows and writes the table in FAULTS.md.
//!
//! `faults [--full] [--row NAME] [--seed N] [--count N] [--no-table]`, or `faults --list`.
//! Built with the bugs in it (`planted_faults`): `--planted` hunts each of them, and none;
//! `--hunt` hunts the one that SIMPATICO_PLANTED names.
//!
//! Exit status: 0 all held, 1 a row failed, 2 wrong arguments.

use simpatico_tests::suite::{self, Plan, ROWS};
use std::process::ExitCode;
use std::time::Instant;

/// Runs the program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let value = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        args.get(at + 1).cloned()
    };
    if has("--list") {
        for row in ROWS {
            println!(
                "{:16} CI {:>7}  full {:>9}  {}",
                row.name, row.small, row.full, row.what
            );
        }
        return ExitCode::SUCCESS;
    }
    #[cfg(feature = "planted")]
    if has("--planted") || has("--hunt") {
        return planted::main(has("--hunt"), value("--only"), !has("--no-table"));
    }
    let number = |flag: &str| value(flag).map(|v| v.parse::<u64>());
    let (seed, count) = (number("--seed"), number("--count"));
    let only = value("--row");
    let wrong = |n: &Option<Result<u64, _>>| matches!(n, Some(Err(_)));
    if wrong(&seed) || wrong(&count) || only.as_ref().is_some_and(|n| suite::row(n).is_none()) {
        eprintln!(
            "usage: faults [--full] [--row NAME] [--seed N] [--count N] [--no-table] | --list"
        );
        return ExitCode::from(2);
    }
    let mut failed = false;
    for row in ROWS
        .iter()
        .filter(|r| only.as_deref().is_none_or(|n| n == r.name))
    {
        let usual = if has("--full") { row.full } else { row.small };
        let plan = Plan {
            seed: seed.clone().and_then(Result::ok).unwrap_or(row.seed),
            count: count.clone().and_then(Result::ok).unwrap_or(usual),
        };
        if plan.count == 0 {
            continue;
        }
        let started = Instant::now();
        let (cases, said) = suite::attempt(row, plan);
        let seconds = started.elapsed().as_secs();
        let outcome = match &said {
            Ok(text) => text.clone(),
            Err(text) => format!("FAILED after {cases} cases: {text}"),
        };
        failed |= said.is_err();
        println!("{}: {outcome} ({seconds} s)", row.name);
        let cells = [
            row.name.to_string(),
            row.what.to_string(),
            plan.seed.to_string(),
            plan.count.to_string(),
            outcome,
            format!("{seconds} s"),
        ];
        if !has("--no-table")
            && let Err(e) = suite::record("rows", &cells)
        {
            eprintln!("{}: {e}", suite::table_path().display());
            failed = true;
        }
    }
    ExitCode::from(u8::from(failed))
}

#[cfg(feature = "planted")]
mod planted {
    use simpatico_tests::{planted, suite};
    use std::process::{Command, ExitCode};

    /// Hunts in this process, or starts one process for each bug.
    pub fn main(hunt: bool, only: Option<String>, table: bool) -> ExitCode {
        if hunt {
            return match planted::hunt() {
                None => {
                    println!("nothing found");
                    ExitCode::SUCCESS
                }
                Some((row, cases, said)) => {
                    let said: String = said.chars().take(160).collect();
                    println!("{row}\t{cases}\t{}", said.replace(['\n', '\t'], " "));
                    ExitCode::from(3)
                }
            };
        }
        let mut failed = false;
        for bug in std::iter::once("").chain(simpatico_storage::PLANTED_BUGS) {
            if only.as_deref().is_some_and(|o| o != bug) {
                continue;
            }
            let Ok(program) = std::env::current_exe() else {
                return ExitCode::from(1);
            };
            let output = Command::new(program)
                .arg("--hunt")
                .env("SIMPATICO_PLANTED", bug)
                .output();
            let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
            let text = text.unwrap_or_default();
            let mut cells: Vec<&str> = text.trim_end().splitn(3, '\t').collect();
            let found = cells.len() == 3;
            failed |= found == bug.is_empty();
            if !found {
                let right = bug.is_empty() && text.starts_with("nothing found");
                failed |= !right && bug.is_empty();
                cells = vec![
                    "none",
                    "-",
                    if right {
                        "right: nothing to find"
                    } else {
                        "NOT FOUND"
                    },
                ];
            }
            let name = if bug.is_empty() { "(no bug)" } else { bug };
            println!(
                "{name}: found by {} after {} cases: {}",
                cells[0], cells[1], cells[2]
            );
            let cells = [name, cells[0], cells[1], cells[2]].map(str::to_string);
            if table && let Err(e) = suite::record("planted", &cells) {
                eprintln!("{e}");
                failed = true;
            }
        }
        ExitCode::from(u8::from(failed))
    }
}
