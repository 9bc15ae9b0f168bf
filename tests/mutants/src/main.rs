//! Mutation testing with one build.
//!
//! cargo-mutants lists the mutants; all that can be are written into one copy of the source,
//! each behind a switch that an environment variable throws, so that trying one costs a run
//! of the tests that reach it and no build. What cannot be switched (a constant, a deleted
//! field) is left to cargo-mutants itself, and said.

mod switch;
mod trial;

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mutant as `cargo mutants --list --json` gives it.
#[derive(Clone, Debug, Deserialize)]
struct Mutant {
    name: String,
    file: String,
    genre: String,
    replacement: String,
    span: Span,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Span {
    start: Place,
    end: Place,
}

/// A line and a column, both from 1.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Place {
    line: usize,
    column: usize,
}

/// Where the switch is put.
const LIB: &str = "schema/src/lib.rs";
/// The switch: which mutant is on, and, for a trace, which are reached.
const SWITCH: &str = r#"
#[doc(hidden)]
pub mod mutants {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    const UNREAD: u32 = u32::MAX;
    static ON: AtomicU32 = AtomicU32::new(UNREAD);
    static SEEN: [AtomicBool; 8192] = [const { AtomicBool::new(false) }; 8192];
    #[inline]
    pub fn on(id: u32) -> bool {
        let on = ON.load(Ordering::Relaxed);
        on == id || on == UNREAD && first(id)
    }
    #[cold]
    fn first(id: u32) -> bool {
        if SEEN[id as usize].load(Ordering::Relaxed) {
            return false;
        }
        if let Some(path) = std::env::var_os("MUTANTS_SEEN") {
            if !SEEN[id as usize].swap(true, Ordering::Relaxed) {
                use std::io::Write;
                let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
                file.unwrap().write_all(format!("{id}\n").as_bytes()).unwrap();
            }
            return false;
        }
        let on = std::env::var("MUTANT").map_or(UNREAD - 1, |id| id.parse().unwrap_or(UNREAD - 1));
        ON.store(on, Ordering::Relaxed);
        on == id
    }
}
"#;

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let work = root
        .canonicalize()
        .expect("the project")
        .join("target/mutants");
    let listed = Command::new("cargo")
        .args(["mutants", "--list", "--json"])
        .current_dir(&root)
        .output()
        .expect("cargo-mutants");
    let mutants: Vec<Mutant> = serde_json::from_slice(&listed.stdout).expect("a list of mutants");
    let tree = work.join("tree");
    copy_tree(&root, &tree, &mutants);
    // What did not compile the last time is not tried again.
    let list = work.join("unswitched.txt");
    let known = std::fs::read_to_string(&list).unwrap_or_default();
    let known: BTreeSet<&str> = known.lines().collect();
    let dropped = (0..mutants.len()).filter(|&i| known.contains(mutants[i].name.as_str()));
    let dropped = switch_all(&root, &tree, &mutants, dropped.collect());
    let names = dropped.iter().map(|&i| mutants[i].name.clone() + "\n");
    write(&list, names.collect::<String>());
    println!(
        "{} mutants, {} of them cannot be switched",
        mutants.len(),
        dropped.len()
    );
    let switched: Vec<usize> = (0..mutants.len())
        .filter(|i| !dropped.contains(i))
        .collect();
    trial::all(&work, &tree, &mutants, &switched);
}

fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    // A file that stays as it was is not built again.
    if std::fs::read(path).is_ok_and(|old| old == bytes.as_ref()) {
        return;
    }
    std::fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Copies the crates that the log, the index and the codec are tested by, but for what is
/// switched.
fn copy_tree(root: &Path, tree: &Path, mutants: &[Mutant]) {
    let switched = |file: &str| file == LIB || mutants.iter().any(|m| m.file == file);
    let parts = [
        "schema",
        "storage",
        "tests/Cargo.toml",
        "tests/src",
        "tests/tests",
        "tests/interposer",
        "tests/golden/sage",
        "tests/golden/pictures",
        "Cargo.lock",
        ".cargo",
    ];
    let listed = Command::new("git")
        .arg("ls-files")
        .args(parts)
        .current_dir(root)
        .output()
        .expect("git");
    for file in String::from_utf8(listed.stdout)
        .expect("UTF-8")
        .lines()
        .filter(|f| !switched(f))
    {
        let bytes = std::fs::read(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        write(&tree.join(file), &bytes);
    }
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).expect("Cargo.toml");
    let members = manifest
        .lines()
        .find(|l| l.starts_with("members"))
        .expect("members");
    let fewer = r#"members = ["schema", "storage", "tests", "tests/interposer"]"#;
    write(&tree.join("Cargo.toml"), &manifest.replace(members, fewer));
}

/// Writes the switches into the copy, and drops those that do not compile until it does.
/// Returns which were dropped, those given included.
fn switch_all(
    root: &Path,
    tree: &Path,
    mutants: &[Mutant],
    mut dropped: BTreeSet<usize>,
) -> BTreeSet<usize> {
    let mut files: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (id, mutant) in mutants.iter().enumerate() {
        files.entry(&mutant.file).or_default().push(id);
    }
    loop {
        for (file, ids) in &files {
            let source = std::fs::read_to_string(root.join(file)).expect("source");
            let wanted: Vec<usize> = ids
                .iter()
                .copied()
                .filter(|i| !dropped.contains(i))
                .collect();
            let (text, left) = switch::file(
                &source,
                mutants,
                &wanted,
                if file.starts_with("schema") {
                    "crate"
                } else {
                    "simpatico_schema"
                },
            );
            dropped.extend(left);
            write(&tree.join(file), &text);
        }
        let lib = std::fs::read_to_string(root.join(LIB)).expect("source");
        write(&tree.join(LIB), lib + SWITCH);
        let wrong = errors(tree);
        println!(
            "{} dropped, {} more do not compile",
            dropped.len(),
            wrong.len()
        );
        if wrong.is_empty() {
            return dropped;
        }
        dropped.extend(wrong);
    }
}

/// The mutants in whose text the compiler finds errors.
fn errors(tree: &Path) -> BTreeSet<usize> {
    let checked = cargo(
        tree,
        &[
            "check",
            "--release",
            "-p",
            "simpatico-storage",
            "--message-format=json",
        ],
    );
    let mut wrong = BTreeSet::new();
    let mut said = String::new();
    for line in checked.stdout.split(|b| *b == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        let message = &message["message"];
        if message["level"] != "error" {
            continue;
        }
        said += message["rendered"].as_str().unwrap_or("");
        for span in message["spans"].as_array().into_iter().flatten() {
            if span["is_primary"] == true {
                let file: PathBuf = tree.join(span["file_name"].as_str().unwrap_or(""));
                let source = std::fs::read_to_string(file).unwrap_or_default();
                wrong.extend(switch::innermost(
                    &source,
                    span["byte_start"].as_u64().unwrap_or(0) as usize,
                ));
            }
        }
    }
    assert!(
        checked.status.success() || !wrong.is_empty(),
        "{said}{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    wrong
}

fn cargo(tree: &Path, args: &[&str]) -> std::process::Output {
    Command::new("cargo")
        .args(args)
        .current_dir(tree)
        .env(
            "CARGO_TARGET_DIR",
            tree.parent().expect("a folder").join("build"),
        )
        .output()
        .expect("cargo runs")
}
