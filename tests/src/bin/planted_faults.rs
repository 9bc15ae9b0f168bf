//! `faults` under another name, so that a build with the bugs in it never takes the place of one
//! without.

#[path = "faults.rs"]
mod same;

fn main() -> std::process::ExitCode {
    same::main()
}
