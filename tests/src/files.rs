//! Folders to work in, and their files.

use std::path::{Path, PathBuf};

/// A temporary folder; in memory where that is possible, for rows that cut no real power and
/// sync thousands of times.
pub fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary folder")
}

/// Copies a folder with all below it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            copy(&entry.path(), &target);
        } else {
            // A file may be gone between the listing and the copy, as at a real crash.
            let _ = std::fs::copy(entry.path(), target);
        }
    }
}

/// All files below a folder, in order.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push(path);
        }
    }
    all.sort();
    all
}

/// The files that hold these bytes.
pub fn holding(all: &[PathBuf], needle: &[u8]) -> Vec<PathBuf> {
    let holds = |path: &&PathBuf| {
        let bytes = std::fs::read(path).unwrap_or_default();
        let first = needle[0];
        bytes
            .iter()
            .enumerate()
            .any(|(at, byte)| *byte == first && bytes[at..].starts_with(needle))
    };
    all.iter().filter(holds).cloned().collect()
}
