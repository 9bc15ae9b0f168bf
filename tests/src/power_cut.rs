//! What a power cut would have left of a folder, computed from a trace of what a process did
//! to it (the trace comes from `simpatico-interposer`).
//!
//! The model is stricter than any file system we know:
//!
//! 1. File content reaches the disk by a sync of that file only. Of what was not synced, a
//!    chosen subset of 4 KiB pages survives, none by default; pages that a longer size
//!    uncovers without having survived read as zeros.
//! 2. A name (creation, rename, removal) reaches the disk by a sync of its folder only. Of
//!    the names not synced, a chosen prefix of the changes survives.
//! 3. What the process did after the cut never happened.

use simpatico_schema::random::Philox;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const PAGE: usize = 4096;

/// One change, as traced.
#[derive(Clone, Debug)]
pub enum Change {
    /// A file came to be under a name.
    Create {
        /// Which file.
        inode: u64,
        /// Its name.
        path: PathBuf,
    },
    /// Bytes were written.
    Write {
        /// Which file.
        inode: u64,
        /// Where in it.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// The length was set.
    Truncate {
        /// Which file.
        inode: u64,
        /// The new length.
        length: u64,
    },
    /// A file's content and length were synced.
    SyncFile {
        /// Which file.
        inode: u64,
    },
    /// A sync failed: the kernel holds the file's dirty pages as clean from here on, and
    /// no later sync brings them to disk unless they are written again.
    SyncFailed {
        /// Which file.
        inode: u64,
    },
    /// A folder's names were synced.
    SyncFolder {
        /// Which folder.
        path: PathBuf,
    },
    /// A name was changed.
    Rename {
        /// The old name.
        from: PathBuf,
        /// The new name.
        to: PathBuf,
    },
    /// A file's name was removed.
    Remove {
        /// The name.
        path: PathBuf,
    },
    /// A folder was made.
    MakeFolder {
        /// The name.
        path: PathBuf,
    },
    /// A folder was removed.
    RemoveFolder {
        /// The name.
        path: PathBuf,
    },
}

impl Change {
    /// Whether this is a moment at which something becomes durable.
    pub fn is_sync(&self) -> bool {
        matches!(self, Self::SyncFile { .. } | Self::SyncFolder { .. })
    }
}

/// Reads a trace. A record cut off at the end (the process was killed) is left out.
pub fn read_trace(path: &Path) -> io::Result<Vec<Change>> {
    let bytes = std::fs::read(path)?;
    let mut rest = &bytes[..];
    let mut changes = Vec::new();
    while let Some((op, a, b, data, after)) = record(rest) {
        let path = || PathBuf::from(OsStr::from_bytes(data));
        changes.push(match op {
            1 => Change::Create {
                inode: a,
                path: path(),
            },
            2 => Change::Write {
                inode: a,
                offset: b,
                data: data.to_vec(),
            },
            3 => Change::Truncate {
                inode: a,
                length: b,
            },
            4 => Change::SyncFile { inode: a },
            5 => Change::SyncFolder { path: path() },
            6 => {
                let (from, to) = data.split_at(a as usize);
                let path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
                Change::Rename {
                    from: path(from),
                    to: path(to),
                }
            }
            7 => Change::Remove { path: path() },
            8 => Change::MakeFolder { path: path() },
            9 => Change::RemoveFolder { path: path() },
            10 => Change::SyncFailed { inode: a },
            other => return Err(io::Error::other(format!("trace: unknown record {other}"))),
        });
        rest = after;
    }
    Ok(changes)
}

type Record<'a> = (u8, u64, u64, &'a [u8], &'a [u8]);

fn record(bytes: &[u8]) -> Option<Record<'_>> {
    let (head, rest) = bytes.split_at_checked(21)?;
    let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap_or_default());
    let length = u32::from_le_bytes(head[17..21].try_into().ok()?) as usize;
    let (data, after) = rest.split_at_checked(length)?;
    Some((head[0], word(1), word(9), data, after))
}

/// How much of what was not synced survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    None,
    /// A random subset of pages and a random prefix of the name changes, by this seed.
    Random(u64),
}

#[derive(Default, Clone)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// Pages that a failed sync left behind.
    lost: BTreeSet<usize>,
}

impl Content {
    /// The disk's content once what can still get there is there.
    fn sync(&mut self) {
        let mut bytes = self.now.clone();
        for page in &self.lost {
            let (start, end) = (page * PAGE, ((page + 1) * PAGE).min(bytes.len()));
            for at in start..end {
                bytes[at] = self.durable.get(at).copied().unwrap_or(0);
            }
        }
        self.durable = bytes;
        self.dirty.clear();
    }
}

/// An entry of a folder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Entry {
    File(u64),
    Folder,
}

type Names = BTreeMap<PathBuf, Entry>;

#[derive(Default)]
struct Disk {
    contents: BTreeMap<u64, Content>,
    now: Names,
    durable: Names,
    /// Name changes not synced, in order: name, and what stands there afterwards.
    pending: Vec<(PathBuf, Option<Entry>)>,
}

impl Disk {
    fn name(&mut self, path: &Path, entry: Option<Entry>) {
        match entry {
            Some(entry) => self.now.insert(path.to_path_buf(), entry),
            None => self.now.remove(path),
        };
        self.pending.push((path.to_path_buf(), entry));
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Create { inode, path } => {
                // An inode number may be used again for a new file.
                self.contents.insert(*inode, Content::default());
                self.name(path, Some(Entry::File(*inode)));
            }
            Change::Write {
                inode,
                offset,
                data,
            } => {
                let content = self.contents.entry(*inode).or_default();
                let (start, end) = (*offset as usize, *offset as usize + data.len());
                if content.now.len() < end {
                    content.now.resize(end, 0);
                }
                content.now[start..end].copy_from_slice(data);
                content.dirty.extend(start / PAGE..end.div_ceil(PAGE));
                content
                    .lost
                    .retain(|page| !(start / PAGE..end.div_ceil(PAGE)).contains(page));
            }
            Change::Truncate { inode, length } => {
                let content = self.contents.entry(*inode).or_default();
                let (old, new) = (content.now.len(), *length as usize);
                content.now.resize(new, 0);
                content
                    .dirty
                    .extend(old.min(new) / PAGE..old.max(new).div_ceil(PAGE));
            }
            Change::SyncFile { inode } => self.contents.entry(*inode).or_default().sync(),
            Change::SyncFailed { inode } => {
                let content = self.contents.entry(*inode).or_default();
                let dirty = std::mem::take(&mut content.dirty);
                content.lost.extend(dirty);
            }
            Change::SyncFolder { path } => {
                let here = |p: &Path| p.parent() == Some(path);
                self.durable.retain(|p, _| !here(p));
                let entries: Vec<_> = self
                    .now
                    .iter()
                    .filter(|(p, _)| here(p))
                    .map(|(p, e)| (p.clone(), *e))
                    .collect();
                self.durable.extend(entries);
                self.pending.retain(|(p, _)| !here(p));
            }
            Change::Rename { from, to } => self.rename(from, to),
            Change::Remove { path } | Change::RemoveFolder { path } => self.name(path, None),
            Change::MakeFolder { path } => self.name(path, Some(Entry::Folder)),
        }
    }

    /// Moves a name, and what lies below it where it is a folder.
    fn rename(&mut self, from: &Path, to: &Path) {
        let moved: Vec<(PathBuf, Entry)> = self
            .now
            .iter()
            .filter(|(p, _)| p.starts_with(from))
            .map(|(p, e)| (p.clone(), *e))
            .collect();
        for (path, entry) in moved {
            let target = match path.strip_prefix(from) {
                Ok(rest) if rest.as_os_str().is_empty() => to.to_path_buf(),
                Ok(rest) => to.join(rest),
                Err(_) => continue,
            };
            // What lies below a folder moves with it on the disk, too.
            if target != to && self.durable.get(&path) == Some(&entry) {
                self.durable.remove(&path);
                self.durable.insert(target.clone(), entry);
            }
            self.name(&path, None);
            self.name(&target, Some(entry));
        }
    }

    /// The names and contents that the disk holds after a cut at this moment.
    fn after_cut(&self, survival: Survival) -> (Names, BTreeMap<u64, Vec<u8>>) {
        let mut names = self.durable.clone();
        let mut random = match survival {
            Survival::None => None,
            Survival::Random(seed) => Some(Philox::new(seed, 77)),
        };
        if let Some(random) = &mut random {
            let kept = random.below(self.pending.len() as u32 + 1) as usize;
            for (path, entry) in &self.pending[..kept] {
                match entry {
                    Some(entry) => names.insert(path.clone(), *entry),
                    None => names.remove(path),
                };
            }
        }
        let contents = self
            .contents
            .iter()
            .map(|(inode, content)| (*inode, surviving_bytes(content, random.as_mut())))
            .collect();
        (names, contents)
    }
}

fn surviving_bytes(content: &Content, random: Option<&mut Philox>) -> Vec<u8> {
    let Some(random) = random else {
        return content.durable.clone();
    };
    let mut bytes = content.durable.clone();
    if content.dirty.is_empty() {
        return bytes;
    }
    // The new length may or may not have got there.
    if random.below(2) == 1 {
        bytes.resize(content.now.len(), 0);
    }
    for page in &content.dirty {
        let (start, end) = (page * PAGE, ((page + 1) * PAGE).min(bytes.len()));
        if start < end && random.below(2) == 1 {
            for at in start..end {
                bytes[at] = content.now.get(at).copied().unwrap_or(0);
            }
        }
    }
    bytes
}

/// Writes into `into` what is left of `root` when the power fails after the first `count`
/// changes.
pub fn cut(
    changes: &[Change],
    count: usize,
    survival: Survival,
    root: &Path,
    into: &Path,
) -> io::Result<()> {
    let mut disk = Disk::default();
    changes[..count]
        .iter()
        .for_each(|change| disk.apply(change));
    let (names, contents) = disk.after_cut(survival);
    std::fs::create_dir_all(into)?;
    for (path, entry) in &names {
        let Ok(below) = path.strip_prefix(root) else {
            continue;
        };
        let target = into.join(below);
        // A file whose folder's own name was lost cannot be reached any more.
        let reachable = below
            .ancestors()
            .skip(1)
            .filter(|a| !a.as_os_str().is_empty())
            .all(|a| names.get(&root.join(a)) == Some(&Entry::Folder));
        if !reachable || below.as_os_str().is_empty() {
            continue;
        }
        match entry {
            Entry::Folder => std::fs::create_dir_all(&target)?,
            Entry::File(inode) => {
                std::fs::write(&target, contents.get(inode).map_or(&[][..], |c| c))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(changes: &[Change], survival: Survival) -> BTreeMap<String, Vec<u8>> {
        let into = tempfile::tempdir().unwrap();
        cut(
            changes,
            changes.len(),
            survival,
            Path::new("/r"),
            into.path(),
        )
        .unwrap();
        std::fs::read_dir(into.path())
            .unwrap()
            .map(|e| e.unwrap())
            .map(|e| {
                (
                    e.file_name().into_string().unwrap(),
                    std::fs::read(e.path()).unwrap(),
                )
            })
            .collect()
    }

    fn create(inode: u64, path: &str) -> Change {
        Change::Create {
            inode,
            path: path.into(),
        }
    }

    fn write(inode: u64, offset: u64, data: &[u8]) -> Change {
        Change::Write {
            inode,
            offset,
            data: data.to_vec(),
        }
    }

    #[test]
    fn only_what_was_synced_is_left_and_a_name_needs_its_folder_synced() {
        let folder = || Change::SyncFolder { path: "/r".into() };
        let mut changes = vec![
            create(1, "/r/a"),
            write(1, 0, b"safe"),
            Change::SyncFile { inode: 1 },
        ];
        assert!(
            left(&changes, Survival::None).is_empty(),
            "the name was never synced"
        );
        changes.extend([folder(), write(1, 4, b"lost")]);
        assert_eq!(left(&changes, Survival::None)["a"], b"safe");
        changes.push(Change::Rename {
            from: "/r/a".into(),
            to: "/r/b".into(),
        });
        assert!(left(&changes, Survival::None).contains_key("a"));
        changes.push(folder());
        assert_eq!(left(&changes, Survival::None)["b"], b"safe");
    }

    #[test]
    fn what_a_failed_sync_left_is_not_brought_to_disk_by_the_next_one() {
        let mut changes = vec![
            create(1, "/r/a"),
            Change::SyncFolder { path: "/r".into() },
            write(1, 0, b"lost"),
            Change::SyncFailed { inode: 1 },
            Change::SyncFile { inode: 1 },
        ];
        assert_eq!(left(&changes, Survival::None)["a"], [0; 4]);
        changes.extend([write(1, 0, b"safe"), Change::SyncFile { inode: 1 }]);
        assert_eq!(left(&changes, Survival::None)["a"], b"safe");
    }

    #[test]
    fn random_survival_keeps_some_pages_and_never_invents_bytes() {
        let data: Vec<u8> = (0..3 * PAGE).map(|i| (i / PAGE) as u8 + 1).collect();
        let changes = [
            create(1, "/r/a"),
            Change::SyncFolder { path: "/r".into() },
            write(1, 0, &data),
        ];
        let mut seen = BTreeSet::new();
        for seed in 0..64 {
            let bytes = left(&changes, Survival::Random(seed))["a"].clone();
            assert!(
                bytes
                    .iter()
                    .zip(&data)
                    .all(|(got, was)| got == was || *got == 0)
            );
            seen.insert(bytes);
        }
        assert!(seen.len() > 4, "{} different outcomes", seen.len());
    }
}
