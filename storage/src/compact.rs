//! Writing a state anew with nothing else in it: compaction, and the files that snapshots
//! are kept in.
//!
//! A state's *base* is the shortest log that leads to it: every name, then what is said of
//! it, users in their order. Users that were forgotten are not in it, nor are attributes that
//! only they had.
//!
//! # How a compaction survives a crash at any point
//!
//! 1. The base goes into segments of the next generation, beside those of the present one,
//!    and is synced. The mark still names the present one: a crash here leaves the old log,
//!    and the next open deletes the new segments.
//! 2. The new log is read back and must give the same state.
//! 3. The mark is replaced by one that names the new generation (written aside, synced,
//!    renamed, directory synced). This is the commit.
//! 4. The old segments are deleted, the first one first; a crash here leaves files that the
//!    next open deletes.

use crate::embed::Embedder;
use crate::error::{Result, StoreError};
use crate::graph::AttributeId;
use crate::log::{
    self, EventRecord, LogWriter, PairRecord, Payload, Record, StoredEdit, Strictness,
};
use crate::mark::{Mark, MarkFile};
use crate::maximum_file::MaximumFile;
use crate::state::State;
use crate::store::{Inner, Options, Places, Store, directory_bytes, lock};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

const FILE_MAGIC: &[u8; 8] = b"SIMPSNAP";
/// The version of the snapshot file.
const FILE_VERSION: u32 = 1;
const FILE_HEADER: usize = 32;
const CHUNK_END: u8 = 0;
const CHUNK_ENCODER: u8 = 1;
const CHUNK_RECORDS: u8 = 2;
/// The longest chunk of a snapshot file.
const CHUNK_MAX: usize = 8 << 20;
const ENCODER_CHUNK: usize = 1 << 20;

/// What a compaction did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompactReport {
    /// Bytes of the store's files before.
    pub bytes_before: u64,
    /// Bytes of the store's files after.
    pub bytes_after: u64,
    /// Attributes that went with those who alone had them.
    pub attributes_dropped: u64,
    /// The log's new generation.
    pub generation: u64,
    /// Old files that could not be deleted, and why: their bytes are still there. The next
    /// open or compaction tries again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_behind: Vec<String>,
}

/// What [`Store::export_snapshot`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Bytes of the file.
    pub bytes: u64,
    /// The sequence number of the moment it holds.
    pub as_of: u64,
}

/// What [`Store::restore`] made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// Users restored.
    pub users: u64,
    /// Edges restored.
    pub edges: u64,
    /// The sequence number the store goes on from.
    pub as_of: u64,
}

/// Gives the payloads of a state's base to `sink`. Returns how many attributes were left out.
fn write_base(state: &State, mut sink: impl FnMut(&mut Payload) -> Result<()>) -> Result<u64> {
    let mut base = Base {
        payload: Payload::new(state.seq + 1, Vec::new()),
        sink: &mut sink,
    };
    let kept = kept_attributes(state);
    let mut numbers = vec![u32::MAX; kept.len()];
    let live = kept.iter().enumerate().filter(|(_, keep)| **keep);
    for (next, (old, _)) in (0u32..).zip(live) {
        numbers[old] = next;
        let name = state.graph.attribute_name(AttributeId(old as u32));
        let name = Cow::Borrowed(name);
        base.push(&Record::DefineAttribute { number: next, name })?;
    }
    for (old, feature) in state.features.iter().enumerate() {
        if let Some(vector) = feature
            && kept[old]
        {
            let (attribute, vector) = (numbers[old], Cow::Borrowed(vector.as_ref()));
            base.push(&Record::Feature { attribute, vector })?;
        }
    }
    base.push_users(state, &numbers)?;
    if let Some(digest) = &state.encoder {
        let digest = Cow::Borrowed(digest.as_ref());
        base.push(&Record::Encoder { digest })?;
    }
    base.push(&Record::BaseEnd)?;
    base.flush()?;
    Ok(kept.iter().filter(|keep| !**keep).count() as u64)
}

/// Which attributes a base keeps: those somebody says something of, and those that no
/// forgotten user ever touched (a vocabulary may wait for its first user).
fn kept_attributes(state: &State) -> Vec<bool> {
    let mut kept = vec![false; state.graph.attribute_count()];
    for user in state.users() {
        for (attribute, _) in state.graph.registers(user) {
            kept[attribute.0 as usize] = true;
        }
    }
    for (attribute, kept) in kept.iter_mut().enumerate() {
        *kept |= !state.touched_by_forget.contains(&(attribute as u32));
    }
    kept
}

struct Base<'a, F> {
    payload: Payload,
    sink: &'a mut F,
}

impl<F: FnMut(&mut Payload) -> Result<()>> Base<'_, F> {
    fn push(&mut self, record: &Record<'_>) -> Result<()> {
        self.payload.push(record)?;
        if self.payload.is_full() {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.payload.is_empty() {
            (self.sink)(&mut self.payload)?;
            let next = self.payload.next_seq();
            let spare = std::mem::replace(&mut self.payload, Payload::new(next, Vec::new()));
            self.payload = Payload::new(next, spare.into_bytes());
        }
        Ok(())
    }

    fn push_users(&mut self, state: &State, attributes: &[u32]) -> Result<()> {
        let mut numbers = vec![u32::MAX; state.graph.user_id_end() as usize];
        for (number, id) in state.users().enumerate() {
            let number = number as u32;
            numbers[id.0 as usize] = number;
            let name = Cow::Borrowed(state.graph.user_name(id));
            self.push(&Record::DefineUser { number, name })?;
            for (attribute, register) in state.graph.registers(id) {
                self.payload.push_event(&EventRecord {
                    user: number,
                    attribute: attributes[attribute.0 as usize],
                    polarity: register.polarity,
                    at: register.at,
                    id: register.id,
                });
            }
        }
        for (user, vector) in state.user_features.iter() {
            let (user, vector) = (numbers[*user as usize], Cow::Borrowed(vector.as_ref()));
            self.push(&Record::UserFeature { user, vector })?;
        }
        for (user, pair) in state.pairs.iter() {
            let (user, pair) = (numbers[*user as usize], PairRecord::from_schema(pair));
            self.push(&Record::Pair { user, pair })?;
        }
        for (user, edit) in state.edits.values() {
            let (user, edit) = (numbers[*user as usize], StoredEdit::from_schema(edit));
            self.push(&Record::Edit { user, edit })?;
        }
        Ok(())
    }
}

/// Writes a state's base as the log of `at`'s generation, synced.
fn write_log(dir: &Path, state: &State, at: Mark, segment_bytes: u64) -> Result<(LogWriter, u64)> {
    let mut new = LogWriter::create(dir, at, 1, segment_bytes, None)?;
    let dropped = write_base(state, |payload| new.write_frame(payload))?;
    new.commit(&mut [])?;
    Ok((new, dropped))
}

/// Removes segments, the first ones first, so that what remains after a failure is no log.
fn remove_segments(dir: &Path, which: impl Fn(u64) -> bool) -> Result<()> {
    for (generation, _, path) in log::list_segments(dir)? {
        if which(generation) {
            std::fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
        }
    }
    log::sync_dir(dir)
}

/// Removes the weights that the state does not name.
fn remove_old_encoders(dir: &Path, keep: Option<&str>, left_behind: &mut Vec<String>) {
    let keep = keep.map(|digest| dir.join(format!("{digest}.safetensors")));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if Some(&path) != keep.as_ref()
            && let Err(e) = std::fs::remove_file(&path)
        {
            left_behind.push(StoreError::io("remove", &path)(e).to_string());
        }
    }
}

/// Takes what is known of the maximum over to the same state under new user numbers.
fn carry_maximum(old: &State, new: &State, at: &Mark) {
    let mut numbers = vec![None; old.graph.user_id_end() as usize];
    for (number, user) in (0u32..).zip(old.users()) {
        numbers[user.0 as usize] = Some(number);
    }
    let number = |user: u32| numbers.get(user as usize).copied().flatten();
    if let Some(known) = MaximumFile::of(old, at) {
        let users = new.graph.user_id_end();
        known.renumbered(number, users).restore(new);
    }
}

impl Store {
    /// Rewrites the log to what is live, and the mirror with it: afterwards no byte of a
    /// forgotten user is left in any file of the store, nor any event that was overtaken.
    /// Appends wait meanwhile, all the way through: the base numbers users anew, so that no
    /// event can be logged in between (about a second for 3 million registers). Snapshots do
    /// not wait; until the end they are of the moment before. Needs room for the log and, in
    /// memory, for the state a second time.
    pub fn compact(&self) -> Result<CompactReport> {
        let shared = &self.shared;
        let _one_at_a_time = lock(&shared.maintenance);
        let bytes_before = directory_bytes(&shared.path);
        let (generation, attributes_dropped, mut left_behind) =
            shared.at_length(|inner| self.rewrite(inner))?;
        if let Err(e) = shared.rebuild_mirror() {
            left_behind.push(e.to_string());
        }
        Ok(CompactReport {
            bytes_before,
            bytes_after: directory_bytes(&shared.path),
            attributes_dropped,
            generation,
            left_behind,
        })
    }

    /// Writes the state as a new log and goes over to it. Returns the generation, how many
    /// attributes were dropped, and what could not be deleted.
    fn rewrite(&self, inner: &mut Inner) -> Result<(u64, u64, Vec<String>)> {
        let shared = &self.shared;
        let places = Places::of(&shared.path);
        let mut log = shared.commit_all(inner)?;
        let generation = log.at.generation + 1;
        let at = Mark {
            generation,
            digest: log::genesis_digest(log.at.store_id, generation),
            frames: 0,
            ..log.at
        };
        remove_segments(&places.log, |g| g != log.at.generation)?;
        let written = write_log(&places.log, &inner.state, at, shared.options.segment_bytes)
            .and_then(|(new, dropped)| {
                let state = self.read_back(&new, &inner.state)?;
                Ok((new, dropped, state))
            });
        let (mut new, attributes_dropped, state) = match written {
            Ok(written) => written,
            Err(e) => {
                // Nothing happened yet: the old log is whole and goes on.
                let _ = remove_segments(&places.log, |g| g == generation);
                return Err(e);
            }
        };
        let mark = MarkFile::replace(&places.mark, &new.at).inspect_err(|e| shared.poison(e))?;
        new.set_mark(mark);
        carry_maximum(&inner.state, &state, &new.at);
        let old = log.at.generation;
        *log = new;
        inner.state = state;
        inner.payload = Payload::new(inner.state.seq + 1, Vec::new());
        let mut left_behind = Vec::new();
        if let Err(e) = remove_segments(&places.log, |g| g == old) {
            left_behind.push(e.to_string());
        }
        remove_old_encoders(
            &places.encoders,
            inner.state.encoder.as_deref(),
            &mut left_behind,
        );
        Ok((generation, attributes_dropped, left_behind))
    }

    /// Reads a new log back and compares it with the state it was written from.
    fn read_back(&self, new: &LogWriter, live: &State) -> Result<State> {
        let places = Places::of(&self.shared.path);
        let mut state = State::default();
        log::replay(
            &self.shared.path,
            &places.log,
            new.at.generation,
            Some(&new.at),
            Strictness::Exact,
            None,
            |frame| state.apply_frame(frame),
        )?;
        state.seq = live.seq;
        let same = state.registers_digest() == live.registers_digest()
            && state.graph.user_count() == live.graph.user_count()
            && state.pairs.len() == live.pairs.len()
            && state.edits.len() == live.edits.len();
        if !same {
            return Err(StoreError::corrupt(
                &places.log,
                0,
                "expected the rewritten log to give the same registers, got others",
            ));
        }
        if let Embedder::Ready(sage) = &live.sage {
            let cache = self.shared.options.embedding_cache_bytes;
            let fresh = crate::sage::Sage::with_cache(sage.encoder().clone(), cache);
            state.sage = Embedder::Ready(state.fill_sage(fresh, &places.encoders)?);
        }
        Ok(state)
    }

    /// Writes everything the store holds at this moment into one file that [`Self::restore`]
    /// reads: checksummed, the encoder included, forgotten users not. The file appears whole
    /// or not at all.
    pub fn export_snapshot(&self, file: &Path) -> Result<SnapshotReport> {
        let state = self.snapshot().state;
        let fresh = with_suffix(file, ".tmp");
        let written = write_snapshot_file(&fresh, &state, &Places::of(&self.shared.path));
        let bytes = match written {
            Ok(bytes) => bytes,
            Err(e) => {
                let _ = std::fs::remove_file(&fresh);
                return Err(e);
            }
        };
        std::fs::rename(&fresh, file).map_err(StoreError::io("rename", &fresh))?;
        log::sync_parent(file)?;
        Ok(SnapshotReport {
            bytes,
            as_of: state.seq,
        })
    }

    /// Makes a store in an empty directory (or one that does not exist) from a file of
    /// [`Self::export_snapshot`]. A damaged file is refused, with the place, before anything
    /// is written; a restore that is cut short leaves a directory that restore takes again.
    pub fn restore(file: &Path, dir: &Path) -> Result<RestoreReport> {
        check_snapshot_file(file)?;
        let aside = with_suffix(dir, ".restoring");
        if aside.exists() {
            std::fs::remove_dir_all(&aside).map_err(StoreError::io("remove", &aside))?;
        }
        match std::fs::read_dir(dir).map(|mut d| d.next()) {
            Ok(None) | Err(_) => {}
            Ok(Some(entry)) => {
                let found = entry.map_or("files".into(), |e| e.file_name());
                return Err(StoreError::NotAStore {
                    path: dir.into(),
                    found: found.to_string_lossy().into_owned(),
                });
            }
        }
        let report = restore_into(file, &aside).inspect_err(|_| {
            let _ = std::fs::remove_dir_all(&aside);
        })?;
        std::fs::rename(&aside, dir).map_err(StoreError::io("rename", &aside))?;
        log::sync_parent(dir)?;
        Ok(report)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    path.with_file_name(name)
}

/// Writes chunks behind a running BLAKE3.
struct ChunkWriter<'a> {
    out: BufWriter<File>,
    hasher: blake3::Hasher,
    path: &'a Path,
    bytes: u64,
}

impl ChunkWriter<'_> {
    fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out
            .write_all(bytes)
            .map_err(StoreError::io("write", self.path))
    }

    fn chunk(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        let mut header = [0u8; 9];
        header[0] = kind;
        header[1..5].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..5]), body);
        header[5..].copy_from_slice(&crc.to_le_bytes());
        self.raw(&header)?;
        self.raw(body)
    }
}

fn write_snapshot_file(path: &Path, state: &State, places: &Places) -> Result<u64> {
    let file = File::create(path).map_err(StoreError::io("create", path))?;
    let mut writer = ChunkWriter {
        out: BufWriter::with_capacity(1 << 20, file),
        hasher: blake3::Hasher::new(),
        path,
        bytes: 0,
    };
    let mut header = [0u8; FILE_HEADER];
    header[..8].copy_from_slice(FILE_MAGIC);
    header[8..12].copy_from_slice(&FILE_VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&state.seq.to_le_bytes());
    writer.raw(&header)?;
    if let Some(digest) = &state.encoder {
        let weights = places.encoders.join(format!("{digest}.safetensors"));
        let bytes = std::fs::read(&weights).map_err(StoreError::io("read", &weights))?;
        for piece in bytes.chunks(ENCODER_CHUNK) {
            writer.chunk(CHUNK_ENCODER, piece)?;
        }
    }
    write_base(state, |payload| writer.chunk(CHUNK_RECORDS, payload.body()))?;
    writer.chunk(CHUNK_END, &[])?;
    let digest = *writer.hasher.finalize().as_bytes();
    writer.raw(&digest)?;
    let bytes = writer.bytes;
    let file = writer
        .out
        .into_inner()
        .map_err(|e| StoreError::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(StoreError::io("sync", path))?;
    Ok(bytes)
}

/// Reads a snapshot file's chunks, each checked, and the whole at the end.
fn read_snapshot_file(
    path: &Path,
    visit: impl FnMut(u64, u8, &[u8], u64) -> Result<()>,
) -> Result<()> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let length = file.metadata().map_err(StoreError::io("read", path))?.len();
    let input = BufReader::with_capacity(1 << 20, file);
    read_chunks(path, input, length, visit)
}

/// [`read_snapshot_file`] of the `length` bytes of `input`.
fn read_chunks(
    path: &Path,
    mut input: impl Read,
    length: u64,
    mut visit: impl FnMut(u64, u8, &[u8], u64) -> Result<()>,
) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0u64;
    let mut buffer = Vec::new();
    let mut take = |buffer: &mut Vec<u8>, size: usize, hashed: bool| -> Result<u64> {
        if size as u64 > length - offset {
            let reason = format!("expected {size} more bytes, got {}", length - offset);
            return Err(StoreError::corrupt(path, offset, reason));
        }
        let start = buffer.len();
        buffer.resize(start + size, 0);
        input
            .read_exact(&mut buffer[start..])
            .map_err(StoreError::io("read", path))?;
        if hashed {
            hasher.update(&buffer[start..]);
        }
        offset += size as u64;
        Ok(offset)
    };
    take(&mut buffer, FILE_HEADER, true)?;
    if &buffer[..8] != FILE_MAGIC {
        return Err(StoreError::corrupt(path, 0, "expected a snapshot file"));
    }
    let version = log::u32_at(&buffer, 8);
    if version != FILE_VERSION {
        return Err(StoreError::Version {
            path: path.into(),
            format: "snapshot file",
            expected: FILE_VERSION,
            got: version,
        });
    }
    let seq = log::u64_at(&buffer, 16);
    loop {
        buffer.clear();
        let start = take(&mut buffer, 9, true)? - 9;
        let size = log::u32_at(&buffer, 1) as usize;
        if size > CHUNK_MAX {
            let reason = format!("expected a chunk of at most {CHUNK_MAX} bytes, got {size}");
            return Err(StoreError::corrupt(path, start, reason));
        }
        take(&mut buffer, size, true)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&buffer[..5]), &buffer[9..]);
        if crc != log::u32_at(&buffer, 5) {
            let reason = format!(
                "expected checksum {:08x}, got {crc:08x}",
                log::u32_at(&buffer, 5)
            );
            return Err(StoreError::corrupt(path, start, reason));
        }
        if buffer[0] == CHUNK_END {
            break;
        }
        visit(seq, buffer[0], &buffer[9..], start + 9)?;
    }
    buffer.clear();
    let end = take(&mut buffer, 32, false)?;
    if buffer != hasher.finalize().as_bytes() || end != length {
        let reason = "expected the file to end with its BLAKE3, got other bytes";
        return Err(StoreError::corrupt(path, end - 32, reason));
    }
    Ok(())
}

/// Reads a whole snapshot file without keeping anything.
fn check_snapshot_file(path: &Path) -> Result<()> {
    read_snapshot_file(path, |_, kind, _, offset| {
        if kind == CHUNK_ENCODER || kind == CHUNK_RECORDS {
            return Ok(());
        }
        let reason = format!("expected a chunk of kind 1 or 2, got {kind}");
        Err(StoreError::corrupt(path, offset, reason))
    })
}

/// Takes a snapshot file's chunks in: the state, and the bytes of its encoder.
struct Restored<'a> {
    file: &'a Path,
    state: State,
    encoder: Vec<u8>,
}

impl<'a> Restored<'a> {
    fn new(file: &'a Path) -> Self {
        Self {
            file,
            state: State::default(),
            encoder: Vec::new(),
        }
    }

    fn take(&mut self, seq: u64, kind: u8, body: &[u8], offset: u64) -> Result<()> {
        if kind == CHUNK_ENCODER {
            self.encoder.extend_from_slice(body);
            return Ok(());
        }
        self.state.apply_frame(&log::Frame {
            first_seq: seq.saturating_add(1),
            count: 0,
            previous: 0,
            payload: body,
            path: self.file,
            payload_offset: offset,
        })
    }
}

/// The state of a snapshot file in memory.
pub(crate) fn state_of(bytes: &[u8]) -> Result<State> {
    let path = Path::new("memory");
    let mut restored = Restored::new(path);
    read_chunks(
        path,
        bytes,
        bytes.len() as u64,
        |seq, kind, body, offset| restored.take(seq, kind, body, offset),
    )?;
    Ok(restored.state)
}

fn restore_into(file: &Path, dir: &Path) -> Result<RestoreReport> {
    let places = Places::of(dir);
    for dir in [dir, &places.log, &places.encoders] {
        std::fs::create_dir_all(dir).map_err(StoreError::io("create", dir))?;
    }
    let mut restored = Restored::new(file);
    read_snapshot_file(file, |seq, kind, body, offset| {
        restored.take(seq, kind, body, offset)
    })?;
    let Restored { state, encoder, .. } = restored;
    if let Some(digest) = state.encoder.clone() {
        let found = blake3::hash(&encoder).to_hex();
        if found.as_str() != digest.as_ref() {
            let reason = format!("expected an encoder of BLAKE3 {digest}, got {found}");
            return Err(StoreError::corrupt(file, FILE_HEADER as u64, reason));
        }
        let path = places.encoders.join(format!("{digest}.safetensors"));
        crate::store::write_whole(&path, &encoder)?;
    }
    let store_id = crate::store::random_id();
    let at = Mark {
        generation: 1,
        store_id,
        seq: state.seq,
        digest: log::genesis_digest(store_id, 1),
        frames: 0,
    };
    let (log, _) = write_log(&places.log, &state, at, Options::default().segment_bytes)?;
    MarkFile::replace(&places.mark, &log.at)?;
    log::sync_dir(dir)?;
    Ok(RestoreReport {
        users: state.graph.user_count() as u64,
        edges: state.graph.edge_count(),
        as_of: state.seq,
    })
}
