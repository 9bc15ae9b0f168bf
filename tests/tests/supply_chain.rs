//! What we build upon: only from the registry, only under licences we list in .deny.toml, in two
//! versions only where it says why, and what is unmaintained is known by name. cargo-deny reads
//! the same file; these tests need no program that a machine may lack.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates known to be unmaintained, and why they are here all the same.
const UNMAINTAINED: [(&str, &str); 5] = [
    (
        "sled",
        "0.34.7 is of 2021; it is a copy behind a seal, never the truth (storage/FORMAT.md)",
    ),
    ("fxhash", "comes with sled; nothing foreign reaches it"),
    ("instant", "comes with sled through parking_lot 0.11"),
    (
        "bincode",
        "finished and no longer developed; codes records behind a checksum, each length limited",
    ),
    (
        "paste",
        "comes with gemm and tokenizers; runs at build time only",
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The licences that .deny.toml allows.
fn allowed() -> Vec<String> {
    let text = std::fs::read_to_string(root().join(".deny.toml")).unwrap();
    let (_, list) = text.split_once("allow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_string)
        .collect()
}

/// Whether a licence expression can be met with what is allowed.
fn met(expression: &str, allowed: &[String]) -> bool {
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    // "A AND B OR C" is met here only if some alternative of each AND part is allowed.
    plain.split(" AND ").all(|part| {
        part.split(" OR ")
            .any(|name| allowed.iter().any(|a| a == name.trim()))
    })
}

#[test]
fn every_crate_is_of_the_registry_and_under_a_licence_we_list() {
    let (metadata, allowed) = (metadata(), allowed());
    assert!(allowed.len() > 5);
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let name = package["name"].as_str().unwrap();
        match package["source"].as_str() {
            None => assert!(name.starts_with("simpatico"), "{name} is of this machine"),
            Some(source) => assert!(source.starts_with("registry+"), "{name}: {source}"),
        }
        let licence = package["license"].as_str().unwrap_or("none");
        assert!(met(licence, &allowed), "{name}: {licence}");
    }
}

/// What stands in .deny.toml as `crate = "NAME@VERSION"`: the versions that may stand beside
/// another of the same name.
fn excused() -> Vec<String> {
    let text = std::fs::read_to_string(root().join(".deny.toml")).unwrap();
    let named = text.split("crate = \"").skip(1);
    named
        .map(|rest| rest.split('"').next().unwrap().to_string())
        .collect()
}

#[test]
fn a_second_version_of_a_crate_has_its_reason() {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--duplicates",
            "--workspace",
            "--offline",
            "--locked",
        ])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["--depth", "0", "--prefix", "none"])
        .current_dir(root())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    // "base64 v0.13.1 (proc-macro)": the name, and the version.
    let doubles: BTreeSet<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.split(" (").next()?.split_once(" v"))
        .collect();
    assert!(doubles.len() > 10, "{text}");
    let excused = excused();
    let is = |excuse: &str, (name, version): (&str, &str)| {
        let (n, v) = excuse.split_once('@').unwrap();
        n == name && version.strip_prefix(v).is_some_and(|r| r.starts_with('.'))
    };
    for excuse in &excused {
        let found = doubles.iter().any(|double| is(excuse, *double));
        assert!(found, "{excuse} is alone now: take it off .deny.toml");
    }
    let names: BTreeSet<&str> = doubles.iter().map(|d| d.0).collect();
    for name in names {
        let left: Vec<_> = doubles
            .iter()
            .filter(|d| d.0 == name && !excused.iter().any(|e| is(e, **d)))
            .collect();
        assert!(left.len() <= 1, "{left:?}: .deny.toml excuses none of them");
    }
}

#[test]
fn what_is_unmaintained_is_known_and_no_crate_we_refuse_came_in() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let has = |name: &str| packages.iter().any(|p| p["name"] == name);
    for (name, why) in UNMAINTAINED {
        assert!(has(name), "{name} is gone ({why}): take it off the list");
    }
    // Network clients and other programs' code have no place in a local program.
    for name in [
        "openssl-sys",
        "reqwest",
        "hyper",
        "git2",
        "tar",
        "pyo3",
        "libloading",
    ] {
        assert!(!has(name), "{name} came in with a dependency");
    }
}
