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
//! 3. What was appended meanwhile follows, under the new numbers, frame for frame; for the
//!    last of it appends wait. All of it is synced.
//! 4. The mark is replaced by one that names the new generation (written aside, synced,
//!    renamed, directory synced). This is the commit.
//! 5. The old segments are deleted, the first one first, before anyone appends again; a crash
//!    here leaves files that the next open deletes.

use crate::embed::Embedder;
use crate::error::{Result, StoreError};
use crate::graph::AttributeId;
use crate::log::{
    self, EventRecord, LogWriter, PairRecord, Payload, Record, StoredEdit, Strictness, TailPayload,
};
use crate::mark::{Mark, MarkFile};
use crate::maximum_file::MaximumFile;
use crate::renumber::{Renumber, Taken};
use crate::sled_mirror::Dirty;
use crate::state::{Replay, State};
use crate::store::{Inner, Options, Places, Shared, Store, directory_bytes, lock};
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
/// A new log that lacks less than this has caught up: the rest takes milliseconds.
const CAUGHT_UP_BYTES: usize = 64 << 10;
/// Writers may be faster than whoever catches up; after so many rounds they wait for the rest.
const CATCH_UP_ROUNDS: usize = 12;

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

/// What a base leaves out, and the numbers it gives.
pub(crate) struct BaseWritten {
    attributes_dropped: u64,
    /// By old number; `u32::MAX` for one left out.
    attributes: Vec<u32>,
}

/// Gives the payloads of a state's base to `sink`.
fn write_base(
    state: &State,
    mut sink: impl FnMut(&mut Payload) -> Result<()>,
) -> Result<BaseWritten> {
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
    Ok(BaseWritten {
        attributes_dropped: kept.iter().filter(|keep| !**keep).count() as u64,
        attributes: numbers,
    })
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
pub(crate) fn write_log(
    dir: &Path,
    state: &State,
    at: Mark,
    segment_bytes: u64,
) -> Result<(LogWriter, BaseWritten)> {
    let mut new = LogWriter::create(dir, at, 1, segment_bytes, None)?;
    let base = write_base(state, |payload| new.write_frame(payload))?;
    new.commit(&mut [])?;
    Ok((new, base))
}

/// Removes segments, the first ones first, so that what remains after a failure is no log.
pub(crate) fn remove_segments(dir: &Path, which: impl Fn(u64) -> bool) -> Result<()> {
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

/// A new log beside the one in use, and the state it comes to.
struct NewLog {
    log: LogWriter,
    state: State,
    attributes_dropped: u64,
    /// From the numbers of the log in use to its own.
    numbers: Renumber,
}

impl NewLog {
    /// Takes in what the log in use got since. `old` is the state of its base.
    fn follow(&mut self, tail: &[TailPayload], old: &State, shared: &Shared) -> Result<()> {
        let encoder = self.state.encoder.clone();
        for payload in tail {
            self.follow_payload(payload, old)?;
        }
        if self.state.encoder != encoder {
            let encoders = Places::of(&shared.path).encoders;
            let cache = shared.options.embedding_cache_bytes;
            self.state.load_encoder(&encoders, cache);
        }
        Ok(())
    }

    fn follow_payload(&mut self, tail: &TailPayload, old: &State) -> Result<()> {
        let mut payload = Payload::new(tail.first_seq, Vec::new());
        let mut failed = None;
        let (state, numbers, log) = (&mut self.state, &mut self.numbers, &mut self.log);
        let name = |attribute| old.graph.attribute_name(AttributeId(attribute));
        let decoded = log::decode_payload(&tail.bytes, |record| {
            if payload.is_full() {
                if let Err(e) = log.write_frame(&mut payload) {
                    failed = Some(e);
                    return Err("writing".into());
                }
                payload = Payload::new(payload.next_seq(), Vec::new());
            }
            let taken = numbers.take(&record, state, name, |renumbered| {
                payload.push(renumbered).map_err(|e| e.to_string())
            })?;
            if taken != Taken::Taken {
                return Err("expected a known user and attribute".into());
            }
            if record.is_operation() {
                payload.count_one();
            }
            Ok(())
        });
        if let Some(failure) = failed {
            return Err(failure);
        }
        if let Err((_, reason)) = decoded {
            return Err(StoreError::corrupt(log.path(), 0, reason));
        }
        if payload.next_seq() != tail.first_seq + u64::from(log::u32_at(&tail.bytes, 0)) {
            return Err(self.differs());
        }
        self.state.seq = payload.next_seq() - 1;
        self.log.write_frame(&mut payload)
    }

    fn differs(&self) -> StoreError {
        let reason = "expected the rewritten log to end where the log in use does, got another end";
        StoreError::corrupt(self.log.path(), 0, reason)
    }
}

impl Store {
    /// Rewrites the log to what is live, and the mirror with it: afterwards no byte of a user
    /// who was forgotten before this call is left in any file of the store, nor any event that
    /// was overtaken. Appends and snapshots go on meanwhile; at the end they wait for some
    /// milliseconds while the store goes over to the new log. Costs about an open and a load of
    /// what is live. Needs room for the log and, in memory, for the state a second time and for
    /// what is appended meanwhile, encoded.
    pub fn compact(&self) -> Result<CompactReport> {
        let shared = &self.shared;
        let _one_at_a_time = lock(&shared.maintenance);
        let bytes_before = directory_bytes(&shared.path);
        let (state, at) = shared.at_length(|inner| {
            let mut log = shared.commit_all(inner)?;
            log.tail = Some(Vec::new());
            Ok((inner.state.clone(), log.at))
        })?;
        let new = self.write_aside(&state, at).inspect_err(|_| {
            // Nothing happened yet: the old log is whole and goes on.
            lock(&shared.log).tail = None;
            let dir = Places::of(&shared.path).log;
            let _ = remove_segments(&dir, |g| g != at.generation);
        })?;
        let attributes_dropped = new.attributes_dropped;
        let old = shared.at_length(|inner| self.go_over(inner, new, &state))?;
        drop((old, state));
        let mut left_behind = Vec::new();
        let places = Places::of(&shared.path);
        if let Err(e) = remove_segments(&places.log, |g| g == at.generation) {
            left_behind.push(e.to_string());
        }
        let encoder = self.encoder_digest();
        remove_old_encoders(&places.encoders, encoder.as_deref(), &mut left_behind);
        if let Err(e) = shared.rebuild_mirror() {
            left_behind.push(e.to_string());
        }
        Ok(CompactReport {
            bytes_before,
            bytes_after: directory_bytes(&shared.path),
            attributes_dropped,
            generation: at.generation + 1,
            left_behind,
        })
    }

    /// Writes a state, which the log in use had at `at`, as a new log beside it, and lets that
    /// catch up, until little is lacking.
    fn write_aside(&self, old: &State, at: Mark) -> Result<NewLog> {
        let shared = &self.shared;
        let dir = Places::of(&shared.path).log;
        remove_segments(&dir, |g| g != at.generation)?;
        let generation = at.generation + 1;
        let start = Mark {
            generation,
            digest: log::genesis_digest(at.store_id, generation),
            frames: 0,
            ..at
        };
        let (log, base) = write_log(&dir, old, start, shared.options.segment_bytes)?;
        let state = self.read_back(&log, old)?;
        carry_maximum(old, &state, &log.at);
        let mut new = NewLog {
            log,
            state,
            attributes_dropped: base.attributes_dropped,
            numbers: Renumber::of_base(old, base.attributes),
        };
        for _ in 0..CATCH_UP_ROUNDS {
            let tail = lock(&shared.log).tail.replace(Vec::new());
            let tail = tail.unwrap_or_default();
            new.follow(&tail, old, shared)?;
            if tail.iter().map(|t| t.bytes.len()).sum::<usize>() < CAUGHT_UP_BYTES {
                break;
            }
        }
        new.log.commit(&mut [])?;
        Ok(new)
    }

    /// The rest of the log in use, which nobody appends to now, and then the new one in its
    /// place. Returns the old state.
    fn go_over(&self, inner: &mut Inner, mut new: NewLog, old: &State) -> Result<State> {
        let shared = &self.shared;
        let places = Places::of(&shared.path);
        let mut log = shared.commit_all(inner)?;
        let generation = log.at.generation;
        let tail = log.tail.take().unwrap_or_default();
        let caught_up = new
            .follow(&tail, old, shared)
            .and_then(|()| new.log.commit(&mut []))
            .and_then(|()| match new.log.at.seq == log.at.seq {
                true => Ok(()),
                false => Err(new.differs()),
            });
        if let Err(e) = caught_up {
            let _ = remove_segments(&places.log, |g| g != generation);
            return Err(e);
        }
        let mark =
            MarkFile::replace(&places.mark, &new.log.at).inspect_err(|e| shared.poison(e))?;
        new.log.set_mark(mark);
        crate::forgotten::start(&shared.path, new.log.at.generation, &new.state);
        // Without a mark the older log counts while it has its first segment.
        let first = log::segment_path(&places.log, generation, 1);
        std::fs::remove_file(&first)
            .map_err(StoreError::io("remove", &first))
            .and_then(|()| log::sync_dir(&places.log))
            .inspect_err(|e| shared.poison(e))?;
        *log = new.log;
        inner.payload = Payload::new(new.state.seq + 1, Vec::new());
        // Of the old numbers; the mirror is made anew.
        (inner.dirty, inner.seal) = (Dirty::default(), None);
        Ok(std::mem::replace(&mut inner.state, new.state))
    }

    /// Reads a new log back and compares it with the state it was written from.
    fn read_back(&self, new: &LogWriter, live: &State) -> Result<State> {
        let places = Places::of(&self.shared.path);
        let mut replay = Replay::default();
        log::replay(
            &self.shared.path,
            &places.log,
            new.at.generation,
            Some(&new.at),
            Strictness::Exact,
            None,
            |frame| replay.apply_frame(frame),
        )?;
        let mut state = replay.finish();
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
    replay: Replay,
    encoder: Vec<u8>,
}

impl<'a> Restored<'a> {
    fn new(file: &'a Path) -> Self {
        Self {
            file,
            replay: Replay::default(),
            encoder: Vec::new(),
        }
    }

    fn take(&mut self, seq: u64, kind: u8, body: &[u8], offset: u64) -> Result<()> {
        if kind == CHUNK_ENCODER {
            self.encoder.extend_from_slice(body);
            return Ok(());
        }
        self.replay.apply_frame(&log::Frame {
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
    Ok(restored.replay.finish())
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
    let Restored {
        replay, encoder, ..
    } = restored;
    let state = replay.finish();
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
