//! `simpatico forget`: a user out of the store, and out of the files that were made for them.
//!
//! Not here: files that went elsewhere. The store does not know what was copied out of it.

use crate::output::Output;
use crate::store_commands::{object_words, open_existing};
use crate::{Common, cancelled};
use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use simpatico_engine::provenance::{self, with_id};
use simpatico_schema::edit::Provenance;
use simpatico_storage::{ForgetReceipt, Store};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Forget {
    /// The user
    user: String,
    /// Folders with pictures and pages: what was made for the user there is removed, and what
    /// else names them is listed
    #[arg(long, value_name = "DIR")]
    files: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    receipt: ForgetReceipt,
    /// Pictures of the user's edits with their records, and pages that named the user.
    removed: BTreeSet<PathBuf>,
    /// Other files that name the user: nobody but their owner knows what they are for.
    still_naming: BTreeSet<PathBuf>,
}

/// Files first: the store knows which edits were the user's, and a forgetting that was
/// interrupted is begun again.
pub fn forget(args: &Forget, common: &Common, output: &Output) -> Result<()> {
    let store = open_existing(common)?;
    let mut files = Files {
        store: common.store.canonicalize()?,
        names: names(&args.user),
        edits: edits_of(&store, &args.user),
        removed: BTreeSet::new(),
        still_naming: BTreeSet::new(),
    };
    if store.snapshot().has_user(&args.user) {
        for folder in args.files.iter().chain([&common.store]) {
            files.clear(folder)?;
        }
    }
    let receipt = store.forget(&args.user)?;
    let answer = Answer {
        receipt,
        removed: files.removed,
        still_naming: files.still_naming,
    };
    output.answer(&answer, || object_words(&answer))
}

fn edits_of(store: &Store, user: &str) -> BTreeSet<String> {
    let edits = store.edits().into_iter().filter(|edit| edit.user == user);
    edits.map(|edit| edit.id.clone()).collect()
}

/// A name as it stands in text, JSON and HTML.
fn names(user: &str) -> BTreeSet<Vec<u8>> {
    let json = serde_json::Value::from(user).to_string();
    let html = simpatico_engine::plot::escape(user);
    // Only JSON's own quotes come off: a name may end with one.
    let forms = [user, &json[1..json.len() - 1], &html];
    forms.map(|form| form.as_bytes().to_vec()).into()
}

struct Files {
    store: PathBuf,
    names: BTreeSet<Vec<u8>>,
    edits: BTreeSet<String>,
    removed: BTreeSet<PathBuf>,
    still_naming: BTreeSet<PathBuf>,
}

impl Files {
    /// Removes what was made for the user below a folder, and lists what else names them. Links
    /// are not followed, and the store's own files are left to the store.
    fn clear(&mut self, folder: &Path) -> Result<()> {
        let named = || folder.display().to_string();
        let is_store = folder.canonicalize().with_context(named)? == self.store;
        let mut entries: Vec<_> = std::fs::read_dir(folder)
            .with_context(named)?
            .collect::<std::io::Result<_>>()
            .with_context(named)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            if cancelled() {
                bail!("stopped; nothing is forgotten yet, the same command goes on");
            }
            let (path, kind) = (entry.path(), entry.file_type()?);
            if is_store && Store::owns(&entry.file_name()) {
                continue;
            }
            if kind.is_dir() {
                self.clear(&path)?;
            } else if kind.is_file() {
                self.clear_file(path)?;
            }
        }
        Ok(())
    }

    fn clear_file(&mut self, path: PathBuf) -> Result<()> {
        let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
        let picture = ["png", "json"].iter().any(|e| *e == ending)
            && provenance::read(&path).is_ok_and(|record| self.is_theirs(&record));
        let holds = |needles: &BTreeSet<Vec<u8>>| {
            holds(&path, needles).with_context(|| path.display().to_string())
        };
        if !picture && !holds(&self.names)? {
            return Ok(());
        }
        let page = ending == "html" && holds(&[simpatico_engine::plot::MADE_HERE.into()].into())?;
        if picture || page {
            std::fs::remove_file(&path).with_context(|| path.display().to_string())?;
            self.removed.insert(path);
        } else {
            self.still_naming.insert(path);
        }
        Ok(())
    }

    /// The edit is kept under the id of its first picture.
    fn is_theirs(&self, record: &Provenance) -> bool {
        let first = Provenance {
            index: 0,
            ..record.clone()
        };
        self.edits.contains(&record.edit_id) || self.edits.contains(&with_id(first).edit_id)
    }
}

/// Whether a file holds one of these, not as a piece of a longer word or number. It is read a
/// megabyte at a time, each with the end of the one before it.
fn holds(path: &Path, needles: &BTreeSet<Vec<u8>>) -> std::io::Result<bool> {
    let longest = needles.iter().map(Vec::len).max().unwrap_or(0);
    let mut file = File::open(path)?;
    // What is before the first byte and behind the last is no letter.
    let mut window = vec![b' '];
    loop {
        let read = file.by_ref().take(1 << 20).read_to_end(&mut window)?;
        if read == 0 {
            window.push(b' ');
        }
        if needles.iter().any(|needle| has_word(&window, needle)) {
            return Ok(true);
        }
        if read == 0 {
            return Ok(false);
        }
        let kept = window.len().min(longest + 1);
        window.drain(..window.len() - kept);
    }
}

fn has_word(text: &[u8], word: &[u8]) -> bool {
    let joins = |byte: u8, end: Option<&u8>| {
        byte.is_ascii_alphanumeric() && end.is_some_and(u8::is_ascii_alphanumeric)
    };
    let found = |around: &[u8]| {
        let (before, rest) = around.split_at(1);
        let (inside, after) = rest.split_at(word.len());
        inside == word && !joins(before[0], word.first()) && !joins(after[0], word.last())
    };
    text.windows(word.len() + 2).any(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_across_pieces_and_at_both_ends_but_not_within_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let is_in = |text: &str| {
            std::fs::write(&path, text).unwrap();
            holds(&path, &names("ada & co")).unwrap()
        };
        let filling = "x ".repeat((1 << 19) - 3);
        for text in ["ada & co", "(ada &amp; co)", &format!("{filling}ada & co.")] {
            assert!(is_in(text), "{} bytes", text.len());
        }
        for text in ["", "ada", "ada & cord", "Canada & co", "canada & co"] {
            assert!(!is_in(text), "{text}");
        }
    }
}
