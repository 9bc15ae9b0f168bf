//! `fuzz [TARGET] [--seconds N | --count N | --full] [--seed S] [--from CASE] [--case N] [--table]`: runs
//! targets and says what was found, with `--table` in FAULTS.md too. `--from` goes on where another
//! run ended (its cases are counted in the table with these), `--case` runs one case again. The
//! bytes of the case in work lie in /dev/shm/fuzz-TARGET behind their length in eight bytes, so that
//! an abort leaves its cause behind. `fuzz TARGET --unpack FOLDER` writes the corpus and
//! what was found under coverage into files, `--pack FOLDER` makes a folder's files what was found
//! (`guided` calls both).

use simpatico_fuzz::{Budget, TARGETS, corpus, input, pack, run, target, unpack};
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        args.get(at + 1)?.parse::<u64>().ok()
    };
    if args.iter().any(|a| a == "--write-corpus") {
        simpatico_fuzz::write_corpus();
        return ExitCode::SUCCESS;
    }
    let only = args.first().filter(|a| !a.starts_with("--"));
    if only.is_some_and(|n| target(n).is_none()) {
        let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
        eprintln!("expected a target, one of {}", names.join(", "));
        return ExitCode::from(2);
    }
    let folder = |flag: &str| {
        let at = args.iter().position(|a| a == flag)?;
        args.get(at + 1).map(Path::new)
    };
    if let Some(target) = only.and_then(|n| target(n)) {
        let done = match (folder("--unpack"), folder("--pack")) {
            (Some(folder), _) => Some(unpack(target, folder)),
            (None, Some(folder)) => Some(pack(target, folder)),
            (None, None) => None,
        };
        match done {
            Some(Ok(cases)) => {
                println!("{}: {cases} cases", target.name);
                return ExitCode::SUCCESS;
            }
            Some(Err(e)) => {
                eprintln!("{}: {e}", target.name);
                return ExitCode::FAILURE;
            }
            None => {}
        }
    }
    let seed = value("--seed").unwrap_or(1);
    let mut failed = false;
    for target in TARGETS.iter().filter(|t| only.is_none_or(|n| n == t.name)) {
        if let Some(number) = value("--case") {
            let bytes = input(target, &corpus(target), seed, number);
            println!("{}", String::from_utf8_lossy(&bytes));
            println!("accepted: {}", (target.run)(&bytes));
            continue;
        }
        let budget = match (value("--seconds"), value("--count")) {
            (Some(seconds), _) => Budget::Time(Duration::from_secs(seconds)),
            (None, Some(count)) => Budget::Cases(count),
            (None, None) if args.iter().any(|a| a == "--full") => Budget::Cases(target.full),
            (None, None) => Budget::Cases(target.small),
        };
        // In memory: on a disk this would be most of a case's time.
        let memory = Path::new("/dev/shm");
        let folder = match memory.is_dir() {
            true => memory.to_path_buf(),
            false => std::env::temp_dir(),
        };
        let path = folder.join(format!("fuzz-{}", target.name));
        let keep = match File::create(&path) {
            Ok(file) => file,
            Err(e) => {
                eprintln!("{}: {e}", path.display());
                return ExitCode::FAILURE;
            }
        };
        let from = value("--from").unwrap_or(0);
        let report = run(target, seed, from, budget, &keep);
        let cells = [
            target.name.to_string(),
            seed.to_string(),
            (from + report.cases).to_string(),
            format!("{} findings", report.findings.len()),
            report.accepted.to_string(),
            format!("{} ms", report.slowest.as_millis()),
            format!("{:.1} MB", report.peak as f64 / 1e6),
        ];
        println!("{}", cells.join(" | "));
        if args.iter().any(|a| a == "--table")
            && let Err(e) = simpatico_tests::suite::record("fuzz", &cells)
        {
            eprintln!("FAULTS.md: {e}");
            failed = true;
        }
        for finding in &report.findings {
            println!("{finding}");
        }
        failed |= !report.findings.is_empty();
    }
    ExitCode::from(u8::from(failed))
}
