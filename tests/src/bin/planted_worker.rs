//! `fault_worker` under another name, so that a build with the bugs in it never takes the place of one
//! without.

#[path = "fault_worker.rs"]
mod same;

fn main() -> std::process::ExitCode {
    same::main()
}
