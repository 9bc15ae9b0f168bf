//! The rules about the repository, kept by a test.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Every file git knows of. Empty outside a checkout (a source archive), where these rules
/// have nothing to say.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output();
    let Ok(output) = output else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(PathBuf::from)
        .filter(|name| root().join(name).exists())
        .collect()
}

fn sources() -> Vec<(PathBuf, String)> {
    files()
        .into_iter()
        .filter(|f| f.extension().is_some_and(|e| e == "rs"))
        .map(|f| {
            let text = std::fs::read_to_string(root().join(&f)).unwrap();
            (f, text)
        })
        .collect()
}

#[test]
fn sled_is_named_only_in_storage_and_candle_only_in_engine() {
    let manifest =
        |name: &str| std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
    for (package, home) in [
        ("sled", "storage"),
        ("candle-core", "engine"),
        ("clap", "cli"),
    ] {
        for part in ["schema", "storage", "engine", "cli"] {
            let named = manifest(part)
                .lines()
                .any(|l| l.starts_with(&format!("{package} ")));
            assert_eq!(named, part == home, "{package} in {part}/Cargo.toml");
        }
    }
    assert!(!manifest("storage").contains("simpatico-engine"));
    assert!(!manifest("schema").contains("simpatico-storage"));
}

#[test]
fn nothing_is_left_unfinished_or_ignored() {
    // Spelt apart so that this file does not find itself.
    let marks = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("FIX", "ME"),
        concat!("#[ig", "nore"),
    ];
    for (file, text) in sources() {
        for mark in marks {
            assert!(!text.contains(mark), "{}: {mark}", file.display());
        }
    }
}

#[test]
fn every_source_file_opens_with_what_it_is() {
    for (file, text) in sources() {
        let first = text.lines().find(|l| !l.starts_with("#!")).unwrap_or("");
        assert!(
            first.starts_with("//!"),
            "{}: begins with {first:?}",
            file.display()
        );
    }
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    // That every unsafe block has its own comment is clippy's to check.
    for (file, text) in sources() {
        if text.contains("allow(unsafe_code") {
            assert!(text.contains("SAFETY"), "{}", file.display());
        }
    }
}

#[test]
fn the_repository_stays_small_and_data_keeps_its_licence() {
    let mut total = 0;
    for file in files() {
        let size = std::fs::metadata(root().join(&file)).unwrap().len();
        assert!(size <= 24 << 20, "{}: {size} bytes", file.display());
        total += size;
        let is_data = file.to_string_lossy().ends_with(".gz")
            || file
                .extension()
                .is_some_and(|e| e == "jpg" || e == "png" || e == "webp");
        if is_data {
            // A licence or a note on the origin stands in the same folder or in one above.
            let noted = file
                .ancestors()
                .skip(1)
                .take(3)
                .filter(|d| !d.as_os_str().is_empty())
                .any(|d| {
                    std::fs::read_dir(root().join(d)).is_ok_and(|mut entries| {
                        entries.any(|e| {
                            let name = e.unwrap().file_name().to_string_lossy().to_uppercase();
                            name.starts_with("LICENSE")
                                || name.starts_with("LICENCE")
                                || name.starts_with("README")
                                || name.starts_with("MODEL_CARD")
                        })
                    })
                });
            assert!(noted, "{}: no licence or origin beside it", file.display());
        }
    }
    assert!(total < 120 << 20, "{total} bytes in all");
}

#[test]
fn the_readme_names_the_two_commands() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(readme.lines().any(|l| l.starts_with("cargo test ")));
    assert!(readme.lines().any(|l| l.starts_with("cargo run ")));
}
