//! The store: one directory, one owner, one log; appends from many threads.
//!
//! # How an append becomes durable
//!
//! 1. The caller takes the state's lock, offers the events to the graph (so that the next
//!    snapshot sees them), and encodes those that changed something into the open payload.
//! 2. It lets the lock go, rings the writer thread, and waits.
//! 3. The writer takes whatever all callers have encoded since its last turn, writes it as
//!    one frame, syncs once, moves the mark, and wakes everyone whose events are in it.
//!
//! While the writer syncs, others fill the next payload: one sync serves all who wait.
//! After any failed write or sync nothing more is taken: what the kernel holds and what the
//! disk holds can no longer be told apart, and only a reopening, which reads, settles it.
//!
//! Locks are taken in the order state, log, queue; the writer, which holds the log, only
//! *tries* for the state.

use crate::embed::{self, Embedder};
use crate::error::{Result, StoreError};
use crate::graph::{AttributeId, Change, Register, UserId};
use crate::log::{
    self, EventRecord, LogWriter, PairRecord, Payload, Record, StoredEdit, Strictness,
};
use crate::mark::{self, Mark, MarkFile};
use crate::maximum_file::MaximumFile;
use crate::renumber::{Renumber, Taken};
use crate::sled_mirror::{self, Dirty, MirrorState, Seal};
use crate::snapshot::{Counts, Polarities, Snapshot};
use crate::state::{Replay, State, edge_change, invalid};
use crate::sync::atomic::{AtomicBool, Ordering};
pub(crate) use crate::sync::lock;
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard, try_lock, wait, wait_at_most};
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::{EditRecord, PreferencePair};
use simpatico_schema::{Event, check_name};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Readers do not wait for an append of more events. (Tests of schedules are of few events.)
const LONG_APPEND: usize = if cfg!(feature = "schedules") {
    3
} else {
    16_384
};
/// Nor for one of so many, if they have asked since the last.
const MIDDLING_APPEND: usize = if cfg!(feature = "schedules") { 1 } else { 256 };
/// How events of one append are taken to the graph: so many at a time.
const BATCH: usize = 8_192;
/// An event without a time that meets a register of the same millisecond comes after it, but
/// never by more than this, in milliseconds.
const ARRIVAL_BUMP_MAX_MS: i64 = 1000;
/// The longest feature vector.
const FEATURE_MAX: usize = 65_536;

/// How a store is opened. [`Options::default`] suits nearly everyone.
#[derive(Clone, Debug)]
pub struct Options {
    /// Makes the store where there is none.
    pub create: bool,
    /// How far ahead of the clock an event's time may lie, in milliseconds; a later time is
    /// taken as this much ahead, so that a wrong clock cannot win for ever.
    pub future_max_ms: i64,
    /// Bytes accepted but not yet written; beyond it, appends wait.
    pub pending_max_bytes: usize,
    /// Bytes of a log segment before the next one is begun.
    pub segment_bytes: u64,
    /// What cached embeddings may take, in bytes.
    pub embedding_cache_bytes: usize,
    /// Whether sled mirrors what is looked up. Without it a store opens from its log alone.
    pub mirror: bool,
    /// sled's page cache, in bytes.
    pub mirror_cache_bytes: u64,
    /// After this many changed users without a checkpoint the mirror is brought up to date.
    pub checkpoint_users: usize,
    /// After this long without an event the mirror is brought up to date.
    pub checkpoint_idle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            create: true,
            future_max_ms: 5 * 60 * 1000,
            pending_max_bytes: 64 << 20,
            segment_bytes: 64 << 20,
            embedding_cache_bytes: crate::sage::DEFAULT_CACHE_BYTES,
            mirror: true,
            mirror_cache_bytes: 16 << 20,
            checkpoint_users: 1 << 20,
            checkpoint_idle: Duration::from_secs(2),
        }
    }
}

/// When an append returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ack {
    /// When the events are on disk (`fdatasync` has returned).
    #[default]
    Durable,
    /// When readers see them; they reach the disk within milliseconds, unless it fails.
    Accepted,
}

/// What an append did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Events that changed a register.
    pub applied: u64,
    /// Events that lost against what the register held, or repeated it.
    pub unchanged: u64,
    /// Events that are none, by their place in the batch, and why. They were passed over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rejected: Vec<(usize, String)>,
    /// A snapshot as of this sequence number or later includes them all.
    pub as_of: u64,
}

/// What a forget removed. Holds no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetReceipt {
    /// The sequence number of the forgetting.
    pub as_of: u64,
    /// When, in milliseconds since 1970.
    pub at: i64,
    /// Registers removed, passes and clears included.
    pub registers: u64,
    /// Edges among them.
    pub edges: u64,
    /// Preference pairs removed.
    pub pairs: u64,
    /// Edit records removed.
    pub edits: u64,
    /// Lines removed from the rejected events.
    pub rejected: u64,
    /// Whether bytes are left in files until the next compaction.
    pub compact_needed: bool,
}

/// What a store holds and takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// How many there are of everything.
    #[serde(flatten)]
    pub counts: Counts,
    /// Registers by what they say.
    #[serde(flatten)]
    pub registers: Polarities,
    /// The sequence number of the last operation.
    pub as_of: u64,
    /// The last sequence number that is on disk.
    pub durable: u64,
    /// BLAKE3 of the encoder's weights, in hex.
    pub encoder: Option<String>,
    /// How often the log was compacted.
    pub generation: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of all files of the store.
    pub disk_bytes: u64,
}

/// An open store. `Send + Sync`: share it by reference or `Arc`. Dropping it closes it.
pub struct Store {
    pub(crate) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the store's threads share.
pub(crate) struct Shared {
    pub path: PathBuf,
    pub options: Options,
    pub inner: Mutex<Inner>,
    pub log: Mutex<LogWriter>,
    pub queue: Mutex<Queue>,
    /// Rung when the queue has work for the writer.
    work: Condvar,
    /// Rung when the queue has room again.
    room: Condvar,
    commit: Mutex<Commit>,
    /// Rung after each commit.
    done: Condvar,
    refused: AtomicBool,
    /// Held while everything is looked at or rewritten: one such work at a time.
    pub maintenance: Mutex<()>,
    /// sled. Taken before the state's lock.
    pub mirror: Mutex<MirrorState>,
    mirror_closing: Mutex<bool>,
    mirror_wake: Condvar,
    /// Up to which chain digest the maximum's file goes.
    pub maximum_saved: Mutex<Option<u64>>,
    /// The moment before the long operation that is being applied; see [`Store::snapshot`].
    /// Taken before the state's lock.
    published: Mutex<Option<State>>,
    /// Whether somebody took a snapshot since the last append of some length.
    asked: AtomicBool,
    /// Held through a long operation. Taken before `published`.
    long: Mutex<()>,
    /// Held for its lock.
    lock_file: File,
}

/// The live state, and what of it is not on its way to disk yet.
pub(crate) struct Inner {
    pub state: State,
    pub payload: Payload,
    /// What the mirror lacks.
    pub dirty: Dirty,
    /// The mirror's seal, until the mirror is opened.
    pub seal: Option<Seal>,
    scratch: Vec<(u32, u32)>,
}

/// Payloads on their way to disk.
#[derive(Default)]
pub(crate) struct Queue {
    full: VecDeque<Payload>,
    bytes: usize,
    /// Somebody waits for the open payload.
    wanted: bool,
    closing: bool,
    spare: Vec<Vec<u8>>,
}

#[derive(Default)]
struct Commit {
    durable: u64,
    failure: Option<String>,
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> i64 {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    elapsed.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// The places inside a store's directory.
pub(crate) struct Places {
    pub log: PathBuf,
    pub mark: PathBuf,
    pub sled: PathBuf,
    pub encoders: PathBuf,
    pub rejected: PathBuf,
}

impl Places {
    pub(crate) fn of(store: &Path) -> Self {
        Self {
            log: store.join("log"),
            mark: store.join("mark"),
            sled: store.join("sled"),
            encoders: store.join("encoders"),
            rejected: store.join("rejected.jsonl"),
        }
    }
}

/// Takes the lock, trying for half a second: a process that is just being started holds its
/// parent's descriptors, locks and all, until it has become its own program.
fn lock_soon(file: &File) -> std::result::Result<(), TryLockError> {
    const TRIES: u32 = 50;
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            other => return other,
        }
    }
    file.try_lock()
}

/// Takes the directory for this handle alone.
fn lock_store(path: &Path) -> Result<File> {
    let lock_path = path.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path)
        .map_err(StoreError::io("open", &lock_path))?;
    match lock_soon(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let _ = (&mut file).take(64).read_to_string(&mut text);
            let owner = match text.trim().parse::<u32>() {
                Ok(pid) => format!("process {pid}"),
                Err(_) => "another process".into(),
            };
            return Err(StoreError::Locked {
                path: path.into(),
                owner,
            });
        }
        Err(TryLockError::Error(e)) => return Err(StoreError::io("lock", &lock_path)(e)),
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(StoreError::io("write", &lock_path))?;
    Ok(file)
}

/// Makes the directory if it may, and sees that it holds a store or nothing.
fn prepare_directory(path: &Path, create: bool) -> Result<()> {
    let places = Places::of(path);
    match std::fs::read_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            if !create {
                return Err(StoreError::Missing { path: path.into() });
            }
            std::fs::create_dir_all(path).map_err(StoreError::io("create", path))?;
            log::sync_parent(path)?;
        }
        Err(e) => return Err(StoreError::io("open", path)(e)),
        Ok(_) if places.log.is_dir() || path.join("lock").is_file() => {}
        Ok(mut entries) => match entries.next() {
            Some(Ok(entry)) => {
                return Err(StoreError::NotAStore {
                    path: path.into(),
                    found: entry.file_name().to_string_lossy().into_owned(),
                });
            }
            _ if !create => return Err(StoreError::Missing { path: path.into() }),
            _ => {}
        },
    }
    for dir in [&places.log, &places.encoders] {
        if !dir.is_dir() {
            std::fs::create_dir(dir).map_err(StoreError::io("create", dir))?;
            log::sync_dir(path)?;
        }
    }
    Ok(())
}

/// What a repair did about a damaged log.
#[derive(Clone, Debug)]
pub(crate) struct Mended {
    /// What was wrong, and what was done.
    pub what: String,
    /// Acknowledged operations that are lost, where the log was gone through to its end; the
    /// others are those after the last one found.
    pub lost: u64,
    /// Damaged places that were gone past.
    pub passed_over: u64,
}

/// A log that was read, and the state it leads to.
pub(crate) struct Loaded {
    pub state: State,
    pub log: LogWriter,
    pub damage: Option<Mended>,
    pub dirty: Dirty,
    pub seal: Option<Seal>,
    pub mirror: MirrorState,
}

/// Reads the valid log of a directory, or starts one.
pub(crate) fn load(path: &Path, options: &Options, strictness: Strictness) -> Result<Loaded> {
    let places = Places::of(path);
    let mark = mark::read(&places.mark)?;
    let segments = log::list_segments(&places.log)?;
    let Some(generation) = valid_generation(mark.as_ref(), &segments)? else {
        return start_log(&places, options);
    };
    for (other, _, file) in &segments {
        if *other != generation {
            std::fs::remove_file(file).map_err(StoreError::io("remove", file))?;
        }
    }
    let live: Vec<_> = segments.iter().filter(|s| s.0 == generation).collect();
    let mut seal = sled_mirror::read_seal(&places);
    let mut maximum = MaximumFile::read(path);
    if strictness == Strictness::Exact
        && options.mirror
        && let Some(loaded) = load_rows(&places, options, mark.as_ref(), seal.as_ref(), &live)?
    {
        restore_maximum(maximum, &loaded);
        return Ok(loaded);
    }
    let (mut replay, mut dirty, mut frames) = (Replay::default(), Dirty::default(), 0);
    let end = log::replay(
        path,
        &places.log,
        generation,
        mark.as_ref(),
        strictness,
        None,
        |frame| {
            // What came after the seal is what the mirror lacks.
            if let Some(held) = seal.as_ref().filter(|held| frames >= held.frames) {
                if frames == held.frames && frame.previous != held.digest {
                    seal = None;
                } else {
                    frame.visit(|record| {
                        dirty.note(&record);
                        Ok(())
                    })?;
                }
            }
            frames += 1;
            if let Some(kept) =
                maximum.take_if(|kept| kept.is_at(frame.first_seq - 1, frame.previous))
            {
                kept.restore(&replay.state);
            }
            replay.apply_frame(frame)
        },
    )?;
    let mut state = replay.finish();
    let ends_early = mark.as_ref().is_some_and(|m| m.frames > end.at.frames);
    if strictness == Strictness::Repair
        && (end.damage.is_some() || ends_early)
        && let Ok(Some(mut what)) = mend(path, generation, mark.as_ref(), end.at.frames)
    {
        let damage = end.damage.as_deref().unwrap_or("the log ended early");
        // The log is another now, and whole.
        what.what = format!("{damage}; {}", what.what);
        let damage = Some(what);
        let loaded = load(path, options, Strictness::Exact)?;
        return Ok(Loaded { damage, ..loaded });
    }
    let seal = seal.filter(|held| held.belongs_to(&end.at));
    for (_, number, file) in segments.iter().filter(|s| s.0 == generation) {
        if *number > end.number {
            std::fs::remove_file(file).map_err(StoreError::io("remove", file))?;
        }
    }
    let damage = end.damage.clone().map(|what| Mended {
        what,
        lost: 0,
        passed_over: 0,
    });
    let mut log = if end.at.store_id == 0 && end.offset == 0 {
        // Not even the first segment's header is whole.
        return Ok(Loaded {
            damage,
            ..start_log(&places, options)?
        });
    } else {
        LogWriter::resume(end, options.segment_bytes)?
    };
    log.set_mark(MarkFile::replace(&places.mark, &log.at)?);
    state.seq = log.at.seq;
    let loaded = Loaded {
        state,
        log,
        damage,
        dirty,
        seal,
        mirror: MirrorState::Closed,
    };
    restore_maximum(maximum, &loaded);
    Ok(loaded)
}

/// Mends a log that is damaged after so many frames, by writing it anew as the base of a state
/// that has more than what is before the damage. `None` where that cannot be had safely.
///
/// 1. sled's rows, if their seal is right and of a moment behind the damage, hold all that was
///    said before it: nothing is lost. The frames after the seal follow.
/// 2. Else every frame that the chain proves, wherever the damage is. Names given in a lost frame
///    are unknown, and what is said of them is lost too. The file of the forgotten sees that
///    nobody comes back whose forgetting was lost; without it there is no going past a gap.
fn mend(
    path: &Path,
    generation: u64,
    mark: Option<&Mark>,
    whole_frames: u64,
) -> Result<Option<Mended>> {
    let places = Places::of(path);
    let forgotten = crate::forgotten::read(path, generation);
    let seal = sled_mirror::read_seal(&places)
        .filter(|seal| seal.frames > whole_frames && mark.is_some_and(|m| seal.belongs_to(m)));
    let rows = seal.and_then(|seal| Some((sled_mirror::load(&places, &seal)?.0, seal)));
    let from_rows = rows.is_some();
    let (mut state, from) = match rows {
        Some((state, seal)) => (state, seal.position()),
        None => match mark.filter(|_| forgotten.is_some()) {
            None => return Ok(None),
            Some(mark) => (State::default(), log::beginning(&places.log, mark)?),
        },
    };
    let mut numbers = Renumber::same(&state);
    let mut unknown = 0;
    let found = log::salvage(&places.log, from, mark, forgotten.is_some(), |frame| {
        frame.visit(|record| {
            let taken = numbers.take(&record, &mut state, |_| "", |_| Ok(()))?;
            unknown += u64::from(taken == Taken::Unknown && record.is_operation());
            Ok(())
        })
    })?;
    if found.gaps.is_empty() && !from_rows {
        // Nothing is behind the damage: the log is cut there.
        return Ok(None);
    }
    for user in forgotten.iter().flatten().filter_map(|u| numbers.user(*u)) {
        if !state.graph.user_name(UserId(user)).is_empty() {
            state.forget(user);
        }
    }
    state.seq = found.at.seq;
    let at = Mark {
        generation: generation + 1,
        digest: log::genesis_digest(found.at.store_id, generation + 1),
        frames: 0,
        ..found.at
    };
    crate::compact::remove_segments(&places.log, |g| g != generation)?;
    let (new, _) =
        crate::compact::write_log(&places.log, &state, at, Options::default().segment_bytes)?;
    MarkFile::replace(&places.mark, &new.at)?;
    crate::compact::remove_segments(&places.log, |g| g == generation)?;
    let source = match from_rows {
        true => "what was said before is whole in sled".to_string(),
        false => "the frames before and behind it were kept".to_string(),
    };
    let gaps = match found.gaps.is_empty() {
        true => String::new(),
        false => format!("; lost: {}", found.gaps.join(", ")),
    };
    Ok(Some(Mended {
        what: source + &gaps,
        lost: found.lost + unknown,
        passed_over: found.gaps.len() as u64 + u64::from(from_rows),
    }))
}

/// What was kept of the maximum, where it was kept at the log's very end.
fn restore_maximum(maximum: Option<MaximumFile>, loaded: &Loaded) {
    let at = &loaded.log.at;
    if let Some(kept) = maximum.filter(|kept| kept.is_at(at.seq, at.digest)) {
        kept.restore(&loaded.state);
    }
}

/// The state by way of sled's rows, where that is shorter and nothing speaks against it.
fn load_rows(
    places: &Places,
    options: &Options,
    mark: Option<&Mark>,
    seal: Option<&Seal>,
    segments: &[&(u64, u64, PathBuf)],
) -> Result<Option<Loaded>> {
    let (Some(mark), Some(seal), Some((_, number, last))) = (mark, seal, segments.last()) else {
        return Ok(None);
    };
    let length = |path: &PathBuf| std::fs::metadata(path).map_or(0, |m| m.len());
    let bytes = segments.iter().map(|s| length(&s.2)).sum();
    if *number != segments.len() as u64 || !seal.is_shortcut(mark, *number, bytes) {
        return Ok(None);
    }
    let Some((state, mirror)) = sled_mirror::load(places, seal) else {
        return Ok(None);
    };
    let end = seal.log_end(last.clone(), *mark);
    let mut log = LogWriter::resume(end, options.segment_bytes)?;
    log.set_mark(MarkFile::replace(&places.mark, &log.at)?);
    Ok(Some(Loaded {
        state,
        log,
        damage: None,
        dirty: Dirty::default(),
        seal: None,
        mirror: MirrorState::Open(mirror),
    }))
}

/// The generation that counts; `None` where no log was ever completed.
fn valid_generation(mark: Option<&Mark>, segments: &[(u64, u64, PathBuf)]) -> Result<Option<u64>> {
    if let Some(mark) = mark {
        return Ok(Some(mark.generation));
    }
    let has_first = |g: u64| segments.iter().any(|(og, n, _)| *og == g && *n == 1);
    let mut generations = segments.iter().map(|s| s.0).filter(|g| has_first(*g));
    // Of two, the older counts: a compaction deletes it, beginning with its first segment,
    // before it lets anyone append to the newer.
    let Some(oldest) = generations.next() else {
        return match segments.first() {
            None => Ok(None),
            Some((_, _, file)) => Err(StoreError::corrupt(
                file,
                0,
                "expected the first segment of this log beside it, and a mark; got neither",
            )),
        };
    };
    let bytes = segments
        .iter()
        .map(|(_, _, file)| std::fs::metadata(file).map_or(0, |m| m.len()));
    // Without a mark, segments that hold no frame were never acknowledged to anyone.
    if bytes.max() <= Some(log::SEGMENT_HEADER as u64) {
        for (_, _, file) in segments {
            std::fs::remove_file(file).map_err(StoreError::io("remove", file))?;
        }
        return Ok(None);
    }
    Ok(Some(oldest))
}

fn start_log(places: &Places, options: &Options) -> Result<Loaded> {
    let store_id = random_id();
    let at = Mark {
        generation: 1,
        store_id,
        seq: 0,
        digest: log::genesis_digest(store_id, 1),
        frames: 0,
    };
    let mut log = LogWriter::create(&places.log, at, 1, options.segment_bytes, None)?;
    log.set_mark(MarkFile::replace(&places.mark, &at)?);
    Ok(Loaded {
        state: State::default(),
        log,
        damage: None,
        dirty: Dirty::default(),
        seal: None,
        mirror: MirrorState::Closed,
    })
}

/// A number that tells stores apart; not a secret.
pub(crate) fn random_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_i64(now_ms());
    hasher.write_u32(std::process::id());
    hasher.finish() | 1
}

impl Store {
    /// Whether a store was made in this directory.
    pub fn exists(path: impl AsRef<Path>) -> bool {
        let places = Places::of(path.as_ref());
        places.mark.is_file() || log::list_segments(&places.log).is_ok_and(|s| !s.is_empty())
    }

    /// Whether an entry of a store's directory is one of the store's own.
    pub fn owns(name: &OsStr) -> bool {
        let own = [
            "log",
            "mark",
            "sled",
            "encoders",
            "rejected",
            "lock",
            "forgotten",
            "maximum",
        ];
        // What follows a dot is an ending or a file that is being written.
        let name = name.to_string_lossy();
        own.contains(&name.split('.').next().unwrap_or_default())
    }

    /// Opens the store in a directory, or makes one there. Reads what is needed to answer
    /// (about 5 million events a second), heals a torn end, and owns the directory until it
    /// is dropped: a second open, from whatever process, is [`StoreError::Locked`].
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self> {
        Ok(Self::open_with(path.as_ref(), options, Strictness::Exact)?.0)
    }

    /// Opens, and says where damage was passed over ([`Strictness::Repair`]).
    pub(crate) fn open_with(
        path: &Path,
        options: Options,
        strictness: Strictness,
    ) -> Result<(Self, Option<Mended>)> {
        prepare_directory(path, options.create)?;
        let lock_file = lock_store(path)?;
        let loaded = load(path, &options, strictness)?;
        crate::forgotten::ensure(path, loaded.log.at.generation, &loaded.state);
        let damage = loaded.damage.clone();
        Ok((Self::start(path, options, lock_file, loaded)?, damage))
    }

    fn start(path: &Path, options: Options, lock_file: File, loaded: Loaded) -> Result<Self> {
        let Loaded { mut state, log, .. } = loaded;
        let seal = loaded.seal;
        state.load_encoder(&Places::of(path).encoders, options.embedding_cache_bytes);
        let durable = state.seq;
        let shared = Arc::new(Shared {
            path: path.into(),
            options,
            inner: Mutex::new(Inner {
                payload: Payload::new(state.seq + 1, Vec::new()),
                state,
                dirty: loaded.dirty,
                seal,
                scratch: Vec::new(),
            }),
            log: Mutex::new(log),
            queue: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            commit: Mutex::new(Commit {
                durable,
                failure: None,
            }),
            done: Condvar::new(),
            refused: AtomicBool::new(false),
            maintenance: Mutex::new(()),
            mirror: Mutex::new(loaded.mirror),
            mirror_closing: Mutex::new(false),
            mirror_wake: Condvar::new(),
            maximum_saved: Mutex::default(),
            published: Mutex::default(),
            asked: AtomicBool::new(false),
            long: Mutex::default(),
            lock_file,
        });
        let mut store = Self {
            shared,
            threads: Vec::new(),
        };
        store.spawn("simpatico-log", Shared::write_loop)?;
        if store.shared.options.mirror {
            store.spawn("simpatico-sled", Shared::mirror_loop)?;
        }
        Ok(store)
    }

    fn spawn(&mut self, name: &str, work: fn(&Shared)) -> Result<()> {
        let shared = self.shared.clone();
        let thread = thread::Builder::new()
            .name(name.into())
            .spawn(move || work(&shared))
            .map_err(StoreError::io("start a thread for", &self.shared.path))?;
        self.threads.push(thread);
        Ok(())
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Takes events and returns when they are on disk. See [`Self::append_with`].
    pub fn append(&self, events: &[Event]) -> Result<Receipt> {
        self.append_with(events, Ack::Durable)
    }

    /// Takes events, in the caller's order (which only matters for those without a time).
    ///
    /// Events whose names the store does not take are passed over and come back in the
    /// receipt. After a crash the rest of the batch is there wholly or not at all, up to
    /// 4 MiB encoded (about half a million events); a longer one may be cut between such
    /// pieces. A snapshot sees it wholly.
    /// Costs about 0.2 µs an event, and one `fdatasync` shared with all who wait.
    pub fn append_with(&self, events: &[Event], ack: Ack) -> Result<Receipt> {
        let mut rejected = Vec::new();
        for (index, event) in events.iter().enumerate() {
            if let Err(reason) = event.check_names() {
                rejected.push((index, reason.to_string()));
            }
        }
        self.shared.check_writable()?;
        self.shared.wait_for_room()?;
        let good;
        let taken = match rejected.is_empty() {
            true => events,
            false => {
                good = without(events, &rejected);
                &good
            }
        };
        let append = |inner: &mut Inner| {
            self.shared.check_writable()?;
            inner.append(&self.shared, taken)
        };
        // Publishing makes this append copy what it writes, which is for readers alone.
        let is_long = taken.len() > LONG_APPEND
            || (taken.len() > MIDDLING_APPEND && self.shared.asked.swap(false, Ordering::Relaxed));
        let receipt = match is_long {
            true => self.shared.at_length(append)?,
            false => append(&mut lock(&self.shared.inner))?,
        };
        self.shared.ring(receipt.as_of, ack)?;
        Ok(Receipt {
            rejected,
            ..receipt
        })
    }

    /// A consistent moment to read from, which includes every append that has returned.
    /// O(1). During an append of more than 256 events, and while anything else that takes long is
    /// applied, it is the moment before and waits for nothing. (The first snapshot since an append
    /// began may wait for that one, if it is of no more than 16,384 events: a few milliseconds.)
    pub fn snapshot(&self) -> Snapshot {
        if !self.shared.asked.load(Ordering::Relaxed) {
            self.shared.asked.store(true, Ordering::Relaxed);
        }
        let published = lock(&self.shared.published);
        let state = match &*published {
            Some(state) => state.clone(),
            None => lock(&self.shared.inner).state.clone(),
        };
        Snapshot { state }
    }

    /// Gives attributes their text vectors. All finite, 1 to 65,536 numbers, and of the
    /// encoder's length where one is set; an attribute the store does not know is made known.
    pub fn set_features(&self, features: &[(String, Vec<f32>)]) -> Result<()> {
        for (name, vector) in features {
            check_vector("attribute", name, vector)?;
        }
        self.shared.operate(|inner, shared| {
            if let Some(dim) = inner.state.attribute_dim() {
                check_dims(features, dim)?;
            }
            // The embedder follows at the end, all at once, which is many times faster.
            let sage = std::mem::take(&mut inner.state.sage);
            let mut set = Vec::with_capacity(features.len());
            let done = features.iter().try_for_each(|(name, vector)| {
                let attribute = inner.define_attribute(shared, name)?;
                let record = Record::Feature {
                    attribute,
                    vector: Cow::Borrowed(vector),
                };
                inner.record(shared, &record)?;
                set.push((AttributeId(attribute), vector.as_slice()));
                Ok(())
            });
            inner.state.sage = sage;
            inner.state.on_features(&set);
            done
        })?;
        Ok(())
    }

    /// Gives users their learned vectors; like [`Self::set_features`].
    pub fn set_user_features(&self, features: &[(String, Vec<f32>)]) -> Result<()> {
        for (name, vector) in features {
            check_vector("user", name, vector)?;
        }
        self.shared.operate(|inner, shared| {
            if let Some(dim) = inner.state.user_dim() {
                check_dims(features, dim)?;
            }
            let sage = std::mem::take(&mut inner.state.sage);
            let mut set = Vec::with_capacity(features.len());
            let done = features.iter().try_for_each(|(name, vector)| {
                let user = inner.define_user(shared, name)?;
                let record = Record::UserFeature {
                    user,
                    vector: Cow::Borrowed(vector),
                };
                inner.record(shared, &record)?;
                set.push((UserId(user), vector.as_slice()));
                Ok(())
            });
            inner.state.sage = sage;
            inner.state.on_user_features(&set);
            done
        })?;
        Ok(())
    }

    /// Sets the GraphSAGE weights that embeddings are made with: a safetensors file with its
    /// config in the metadata, which is copied into the store. Returns its BLAKE3 in hex.
    /// Every embedding made before is void; O(edges).
    pub fn set_encoder(&self, weights: &Path) -> Result<String> {
        let bytes = std::fs::read(weights).map_err(StoreError::io("read", weights))?;
        // A compaction removes weights that nothing names yet.
        let _no_compaction = lock(&self.shared.maintenance);
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let cache_bytes = self.shared.options.embedding_cache_bytes;
        let sage = embed::new_sage(weights, &bytes, cache_bytes)?;
        let places = Places::of(&self.shared.path);
        let file = places.encoders.join(format!("{digest}.safetensors"));
        write_whole(&file, &bytes)?;
        self.shared.operate(|inner, shared| {
            let sage = inner.state.fill_sage(sage, weights)?;
            let record = Record::Encoder {
                digest: Cow::Borrowed(&digest),
            };
            inner.record(shared, &record)?;
            inner.state.sage = Embedder::Ready(sage);
            Ok(())
        })?;
        Ok(digest)
    }

    /// BLAKE3 of the encoder's weights, in hex.
    pub fn encoder_digest(&self) -> Option<String> {
        self.snapshot().encoder_digest().map(str::to_string)
    }

    /// An attribute's text vector.
    pub fn feature(&self, attribute: &str) -> Option<Vec<f32>> {
        self.snapshot().feature(attribute)
    }

    /// The attributes without a text vector, in order of first appearance.
    pub fn attributes_without_feature(&self) -> Vec<String> {
        self.snapshot().attributes_without_feature()
    }

    /// Adds preference pairs.
    pub fn put_pairs(&self, pairs: &[PreferencePair]) -> Result<()> {
        for (index, pair) in pairs.iter().enumerate() {
            check_name("user", &pair.user).map_err(|reason| StoreError::Event { index, reason })?;
        }
        self.shared.operate(|inner, shared| {
            for pair in pairs {
                let user = inner.define_user(shared, &pair.user)?;
                let pair = PairRecord::from_schema(pair);
                inner.record(shared, &Record::Pair { user, pair })?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// All preference pairs of this moment, in order of arrival.
    pub fn pairs(&self) -> impl Iterator<Item = Arc<PreferencePair>> + use<> {
        let pairs = self.snapshot().state.pairs;
        (0..pairs.len()).map(move |place| pairs[place].1.clone())
    }

    /// Adds an edit record, or replaces the one of the same id.
    pub fn put_edit(&self, edit: &EditRecord) -> Result<()> {
        let bad = |reason| StoreError::Event { index: 0, reason };
        check_name("user", &edit.user).map_err(bad)?;
        check_name("edit id", &edit.id).map_err(bad)?;
        self.shared.operate(|inner, shared| {
            let user = inner.define_user(shared, &edit.user)?;
            let edit = StoredEdit::from_schema(edit);
            inner.record(shared, &Record::Edit { user, edit })
        })?;
        Ok(())
    }

    /// The edit of this id.
    pub fn edit(&self, id: &str) -> Option<EditRecord> {
        self.snapshot().edit(id)
    }

    /// All edits of this moment, by id.
    pub fn edits(&self) -> Vec<Arc<EditRecord>> {
        self.snapshot().edits().collect()
    }

    /// Removes a user: registers, pairs, edits, vectors, rejected lines. The log keeps the
    /// old bytes until [`Self::compact`]; the forgetting itself names nobody.
    pub fn forget(&self, user: &str) -> Result<ForgetReceipt> {
        let unknown = || StoreError::UnknownUser { user: user.into() };
        if !self.snapshot().has_user(user) {
            return Err(unknown());
        }
        let rejected = self.shared.forget_rejected(user)?;
        let mut gone = None;
        let as_of = self.shared.operate(|inner, shared| {
            let id = inner.state.graph.user_id(user).ok_or_else(unknown)?;
            let generation = lock(&shared.log).at.generation;
            crate::forgotten::add(&shared.path, generation, id.0)?;
            inner.log_record(shared, &Record::Forget { user: id.0 })?;
            gone = Some(inner.state.forget(id.0));
            Ok(())
        })?;
        let gone = gone.unwrap_or_default();
        Ok(ForgetReceipt {
            as_of,
            at: now_ms(),
            registers: gone.registers,
            edges: gone.edges,
            pairs: gone.pairs,
            edits: gone.edits,
            rejected,
            compact_needed: true,
        })
    }

    /// Keeps an input line that was no event, with where it came from and why, in
    /// `rejected.jsonl`. At most 4 KiB of it are kept.
    pub fn reject(&self, file: &str, line: u64, reason: &str, raw: &[u8]) -> Result<()> {
        let raw = String::from_utf8_lossy(&raw[..raw.len().min(4096)]);
        let mut text = serde_json::json!({
            "file": file, "line": line, "reason": reason, "raw": raw, "at": now_ms()
        })
        .to_string();
        text.push('\n');
        let path = Places::of(&self.shared.path).rejected;
        let _order = lock(&self.shared.queue);
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .and_then(|mut f| f.write_all(text.as_bytes()))
            .map_err(StoreError::io("write", &path))
    }

    /// How much there is of everything, counted now: O(registers).
    pub fn stats(&self) -> Result<Stats> {
        let snapshot = self.snapshot();
        let mut registers = Polarities::default();
        for user in snapshot.state.users() {
            for (_, register) in snapshot.state.graph.registers(user) {
                registers.add(register.polarity);
            }
        }
        let (generation, log_bytes) = {
            let log = lock(&self.shared.log);
            (log.at.generation, log.bytes())
        };
        Ok(Stats {
            counts: snapshot.counts(),
            registers,
            as_of: snapshot.as_of(),
            durable: lock(&self.shared.commit).durable,
            encoder: snapshot.encoder_digest().map(str::to_string),
            generation,
            log_bytes,
            disk_bytes: directory_bytes(&self.shared.path),
        })
    }

    /// Waits until everything accepted so far is on disk.
    pub fn flush(&self) -> Result<()> {
        let seq = lock(&self.shared.inner).state.seq;
        self.shared.ring(seq, Ack::Durable)
    }

    /// Closes the store and says whether everything reached the disk. Dropping does the
    /// same, silently.
    pub fn close(mut self) -> Result<()> {
        self.shut()
    }

    fn shut(&mut self) -> Result<()> {
        if self.threads.is_empty() {
            return Ok(());
        }
        *lock(&self.shared.mirror_closing) = true;
        self.shared.mirror_wake.notify_all();
        lock(&self.shared.queue).closing = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let result = match self.shared.failure() {
            Some(failure) => Err(failure),
            None => {
                self.shared.seal_mirror();
                let at = lock(&self.shared.log).at;
                let state = lock(&self.shared.inner).state.clone();
                self.shared.save_maximum(&state, &at);
                lock(&self.shared.log).sync_mark()
            }
        };
        self.shared.refused.store(true, Ordering::Release);
        let _ = self.shared.lock_file.unlock();
        result
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.shut();
    }
}

impl Shared {
    /// The error that everything gets after the first failure.
    fn failure(&self) -> Option<StoreError> {
        let reason = lock(&self.commit).failure.clone()?;
        Some(StoreError::Poisoned { reason })
    }

    fn check_writable(&self) -> Result<()> {
        if self.refused.load(Ordering::Acquire) {
            return Err(self.failure().unwrap_or(StoreError::Closed));
        }
        Ok(())
    }

    /// Remembers the first failure and lets everyone know.
    pub(crate) fn poison(&self, error: &StoreError) {
        lock(&self.commit)
            .failure
            .get_or_insert_with(|| error.to_string());
        self.refused.store(true, Ordering::Release);
        self.done.notify_all();
        let _queue = lock(&self.queue);
        self.room.notify_all();
    }

    fn wait_for_room(&self) -> Result<()> {
        let mut queue = lock(&self.queue);
        while queue.bytes > self.options.pending_max_bytes {
            self.check_writable()?;
            queue = wait(&self.room, queue);
        }
        Ok(())
    }

    /// Hands a full payload to the writer, waiting while too much is on its way.
    fn enqueue(&self, payload: Payload) -> Result<Vec<u8>> {
        let mut queue = lock(&self.queue);
        while queue.bytes > self.options.pending_max_bytes {
            self.check_writable()?;
            queue = wait(&self.room, queue);
        }
        queue.bytes += payload.len();
        queue.full.push_back(payload);
        self.work.notify_one();
        Ok(queue.spare.pop().unwrap_or_default())
    }

    /// Rings the writer; with [`Ack::Durable`] waits until `seq` is on disk.
    fn ring(&self, seq: u64, ack: Ack) -> Result<()> {
        let mut commit = lock(&self.commit);
        if commit.durable >= seq {
            return Ok(());
        }
        drop(commit);
        {
            let mut queue = lock(&self.queue);
            if !queue.wanted {
                queue.wanted = true;
                self.work.notify_one();
            }
        }
        if ack == Ack::Accepted {
            return Ok(());
        }
        commit = lock(&self.commit);
        loop {
            if commit.durable >= seq {
                return Ok(());
            }
            if let Some(reason) = &commit.failure {
                let reason = reason.clone();
                return Err(StoreError::Poisoned { reason });
            }
            commit = wait(&self.done, commit);
        }
    }

    /// Runs an operation other than an append, and waits until it is on disk. Returns its
    /// sequence number.
    fn operate(&self, operation: impl FnOnce(&mut Inner, &Self) -> Result<()>) -> Result<u64> {
        self.check_writable()?;
        self.wait_for_room()?;
        let seq = self.at_length(|inner| {
            self.check_writable()?;
            operation(inner, self)?;
            Ok(inner.state.seq)
        })?;
        self.ring(seq, Ack::Durable)?;
        Ok(seq)
    }

    /// Changes the state in a way that may take long: snapshots do not wait for it, but are of
    /// the moment before. Writers wait.
    pub(crate) fn at_length<T>(&self, work: impl FnOnce(&mut Inner) -> Result<T>) -> Result<T> {
        let _one_at_a_time = lock(&self.long);
        let (mut inner, _published);
        {
            // Whoever waits for the state with this lock goes first. After that nobody waits
            // with it: all find what is published.
            let mut published = lock(&self.published);
            inner = lock(&self.inner);
            *published = Some(inner.state.clone());
            // Ends before the state is let go, so that no snapshot misses what was done.
            _published = Published(&self.published);
        }
        work(&mut inner)
    }

    /// The writer thread.
    fn write_loop(&self) {
        loop {
            let closing = {
                let mut queue = lock(&self.queue);
                while !queue.wanted && queue.full.is_empty() && !queue.closing {
                    queue = wait(&self.work, queue);
                }
                queue.closing
            };
            let wrote = self.write_once(closing);
            if let Err(error) = wrote {
                self.poison(&error);
                return;
            }
            if closing {
                return;
            }
        }
    }

    /// The mirror's thread: a checkpoint when nothing comes in, or when much has.
    fn mirror_loop(&self) {
        let (mut last_seq, mut since) = (0, Instant::now());
        let mut closing = lock(&self.mirror_closing);
        while !*closing {
            let limit = Duration::from_millis(250);
            closing = wait_at_most(&self.mirror_wake, &self.mirror_closing, closing, limit);
            if *closing || self.refused.load(Ordering::Acquire) {
                return;
            }
            let (seq, rows) = {
                let inner = lock(&self.inner);
                (inner.state.seq, inner.dirty.rows)
            };
            if seq != last_seq {
                (last_seq, since) = (seq, Instant::now());
            }
            let idle = since.elapsed() >= self.options.checkpoint_idle;
            if rows > 0 && (idle || rows >= self.options.checkpoint_users) {
                drop(closing);
                self.checkpoint();
                closing = lock(&self.mirror_closing);
            }
        }
    }

    /// One group commit. Takes the open payload too if the state's lock is free; `must`
    /// waits for it.
    fn write_once(&self, must: bool) -> Result<()> {
        if must {
            let mut inner = lock(&self.inner);
            return self.commit_all(&mut inner).map(|_| ());
        }
        let mut log = lock(&self.log);
        // Before the open payload is taken: who rings after this, rings for the next turn.
        lock(&self.queue).wanted = false;
        let mut inner = try_lock(&self.inner);
        let open = inner.as_mut().map(|inner| inner.take_payload(self));
        let mut payloads: Vec<Payload> = {
            let mut queue = lock(&self.queue);
            // The state is let go only here. Before, somebody could put a payload into the queue
            // that comes after the open one, and it would be written before it.
            drop(inner);
            if open.is_none() {
                queue.wanted = true;
            }
            if open.is_none() && queue.full.is_empty() {
                // Whoever is at work may not ring (a snapshot does not), so look again soon.
                drop(log);
                let limit = Duration::from_micros(50);
                drop(wait_at_most(&self.work, &self.queue, queue, limit));
                return Ok(());
            }
            queue.full.drain(..).collect()
        };
        payloads.extend(open.filter(|p| !p.is_empty()));
        self.commit_payloads(&mut log, payloads)
    }

    /// Brings everything to disk while the caller holds the state, and returns the log.
    pub(crate) fn commit_all(&self, inner: &mut Inner) -> Result<MutexGuard<'_, LogWriter>> {
        let mut log = lock(&self.log);
        let open = inner.take_payload(self);
        let mut payloads: Vec<Payload> = lock(&self.queue).full.drain(..).collect();
        payloads.push(open);
        payloads.retain(|p| !p.is_empty());
        self.check_writable()?;
        self.commit_payloads(&mut log, payloads)
            .inspect_err(|e| self.poison(e))?;
        Ok(log)
    }

    fn commit_payloads(&self, log: &mut LogWriter, mut payloads: Vec<Payload>) -> Result<()> {
        if payloads.is_empty() {
            return Ok(());
        }
        #[cfg(feature = "planted")]
        if log::planted::is("acknowledge-before-sync") {
            lock(&self.commit).durable = payloads.last().map_or(0, Payload::next_seq) - 1;
            self.done.notify_all();
            std::thread::sleep(Duration::from_millis(1));
        }
        log.commit(&mut payloads)?;
        let bytes: usize = payloads.iter().map(Payload::len).sum();
        lock(&self.commit).durable = log.at.seq;
        self.done.notify_all();
        let mut queue = lock(&self.queue);
        // An open payload was never counted.
        queue.bytes = queue.bytes.saturating_sub(bytes);
        if queue.full.is_empty() {
            queue.bytes = 0;
        }
        for payload in payloads {
            if queue.spare.len() < 4 {
                queue.spare.push(payload.into_bytes());
            }
        }
        self.room.notify_all();
        Ok(())
    }

    /// Drops the rejected lines that hold a user's name. Returns how many.
    fn forget_rejected(&self, user: &str) -> Result<u64> {
        let path = Places::of(&self.path).rejected;
        let _order = lock(&self.queue);
        let text = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            other => other.map_err(StoreError::io("read", &path))?,
        };
        let holds = |line: &[u8]| {
            let escaped = serde_json::to_string(user).unwrap_or_default();
            let escaped = escaped.trim_matches('"');
            let twice = serde_json::to_string(escaped).unwrap_or_default();
            let forms = [user, escaped, twice.trim_matches('"')];
            let line = String::from_utf8_lossy(line);
            forms.iter().any(|form| line.contains(form))
        };
        let (mut kept, mut dropped) = (Vec::with_capacity(text.len()), 0);
        for line in text.split_inclusive(|b| *b == b'\n') {
            if holds(line) {
                dropped += 1;
            } else {
                kept.extend_from_slice(line);
            }
        }
        if dropped > 0 {
            write_whole(&path, &kept)?;
        }
        Ok(dropped)
    }
}

/// While it lives, readers get what is published.
struct Published<'a>(&'a Mutex<Option<State>>);

impl Drop for Published<'_> {
    fn drop(&mut self) {
        *lock(self.0) = None;
    }
}

impl Inner {
    /// The open payload, with an empty one in its place.
    fn take_payload(&mut self, shared: &Shared) -> Payload {
        let spare = lock(&shared.queue).spare.pop().unwrap_or_default();
        let next = Payload::new(self.payload.next_seq(), spare);
        std::mem::replace(&mut self.payload, next)
    }

    fn make_room(&mut self, shared: &Shared) -> Result<()> {
        match self.payload.is_full() {
            true => self.close_payload(shared),
            false => Ok(()),
        }
    }

    fn close_payload(&mut self, shared: &Shared) -> Result<()> {
        if self.payload.is_empty() {
            return Ok(());
        }
        let next = Payload::new(self.payload.next_seq(), Vec::new());
        let full = std::mem::replace(&mut self.payload, next);
        let spare = shared.enqueue(full)?;
        self.payload = Payload::new(self.payload.next_seq(), spare);
        Ok(())
    }

    /// Logs one record with a sequence number of its own, without applying it.
    fn log_record(&mut self, shared: &Shared, record: &Record<'_>) -> Result<()> {
        self.make_room(shared)?;
        self.payload.push(record)?;
        self.dirty.note(record);
        self.payload.count_one();
        self.state.seq += 1;
        Ok(())
    }

    /// Logs and applies one record.
    fn record(&mut self, shared: &Shared, record: &Record<'_>) -> Result<()> {
        self.log_record(shared, record)?;
        self.state
            .apply(record)
            .map_err(|e| invalid("record", "one the state takes", e))
    }

    fn define_user(&mut self, shared: &Shared, name: &str) -> Result<u32> {
        if let Some(id) = self.state.graph.user_id(name) {
            return Ok(id.0);
        }
        self.make_room(shared)?;
        let number = self.state.graph.user_id_end();
        if number == u32::MAX {
            return Err(StoreError::TooMany {
                what: "users",
                max: u64::from(number),
            });
        }
        let name_record = Cow::Borrowed(name);
        let record = Record::DefineUser {
            number,
            name: name_record,
        };
        self.payload.push(&record)?;
        self.dirty.note(&record);
        Ok(self.state.graph.add_user(name).0)
    }

    fn define_attribute(&mut self, shared: &Shared, name: &str) -> Result<u32> {
        if let Some(id) = self.state.graph.attribute_id(name) {
            return Ok(id.0);
        }
        self.make_room(shared)?;
        let number = self.state.graph.attribute_count() as u32;
        if number == u32::MAX >> 3 {
            return Err(StoreError::TooMany {
                what: "attributes",
                max: u64::from(number),
            });
        }
        let name_record = Cow::Borrowed(name);
        let record = Record::DefineAttribute {
            number,
            name: name_record,
        };
        self.payload.push(&record)?;
        self.dirty.note(&record);
        Ok(self.state.graph.add_attribute(name).0)
    }

    /// Applies events and encodes those that changed something.
    fn append(&mut self, shared: &Shared, events: &[Event]) -> Result<Receipt> {
        let now = now_ms();
        let latest = now.saturating_add(shared.options.future_max_ms);
        let mut receipt = Receipt::default();
        // A batch that one payload can hold is not begun at the end of another: a payload is a
        // frame, and what a crash leaves is whole frames.
        let bytes: usize = events.iter().map(bytes_at_most).sum();
        if self.payload.len() + bytes > log::PAYLOAD_FULL {
            self.close_payload(shared)?;
        }
        let mut numbers = std::mem::take(&mut self.scratch);
        let mut batch = Vec::with_capacity(BATCH.min(events.len()));
        for events in events.chunks(BATCH) {
            self.resolve(shared, events, &mut numbers)?;
            batch.clear();
            batch.extend(
                events
                    .iter()
                    .zip(&numbers)
                    .map(|(event, &(user, attribute))| {
                        let register = Register {
                            polarity: event.polarity,
                            at: event.at.map_or(now, |at| at.min(latest)),
                            id: event.id.as_deref().unwrap_or(""),
                        };
                        (UserId(user), AttributeId(attribute), register)
                    }),
            );
            let changes = self.state.graph.set_batch(&batch);
            for ((event, to), change) in events.iter().zip(&batch).zip(changes) {
                self.take_change(shared, *to, change, event.at.is_none(), &mut receipt)?;
            }
        }
        self.scratch = numbers;
        receipt.as_of = self.state.seq;
        Ok(receipt)
    }

    /// The numbers of the events' users and attributes, new ones defined.
    fn resolve(
        &mut self,
        shared: &Shared,
        events: &[Event],
        numbers: &mut Vec<(u32, u32)>,
    ) -> Result<()> {
        numbers.clear();
        let mut previous: Option<(&str, u32)> = None;
        for event in events {
            let user = match previous {
                Some((name, number)) if name == event.user => number,
                _ => self.define_user(shared, &event.user)?,
            };
            previous = Some((&event.user, user));
            let attribute = self.define_attribute(shared, &event.attribute)?;
            numbers.push((user, attribute));
        }
        Ok(())
    }

    /// Logs what an event changed.
    fn take_change(
        &mut self,
        shared: &Shared,
        (user, attribute, mut register): (UserId, AttributeId, Register<'_>),
        mut change: Change,
        timeless: bool,
        receipt: &mut Receipt,
    ) -> Result<()> {
        if change == Change::Unchanged
            && timeless
            && let Some(at) = self.arrival_after(user, attribute, &register)
        {
            register.at = at;
            change = self.state.graph.set(user, attribute, register);
        }
        if change == Change::Unchanged {
            receipt.unchanged += 1;
            return Ok(());
        }
        receipt.applied += 1;
        self.dirty.user(user.0);
        self.make_room(shared)?;
        self.payload.push_event(&EventRecord {
            user: user.0,
            attribute: attribute.0,
            polarity: register.polarity,
            at: register.at,
            id: register.id,
        });
        self.payload.count_one();
        self.state.seq += 1;
        if let Some((old, new)) = edge_change(change) {
            self.state.on_edge(user, attribute, old, new);
        }
        Ok(())
    }

    /// An event without a time counts from its arrival, and what arrives later in the same
    /// millisecond is later: the time just after the register it meets there.
    fn arrival_after(
        &self,
        user: UserId,
        attribute: AttributeId,
        register: &Register<'_>,
    ) -> Option<i64> {
        let mut held = self.state.graph.registers(user);
        let (_, held) = held.find(|(a, _)| *a == attribute)?;
        let ahead = held.at.checked_sub(register.at)?;
        let differs = held.polarity != register.polarity;
        (differs && (0..ARRIVAL_BUMP_MAX_MS).contains(&ahead)).then(|| held.at + 1)
    }
}

/// What an event takes in a payload, if both its names are new, and a little more.
fn bytes_at_most(event: &Event) -> usize {
    let id = event.id.as_ref().map_or(0, String::len);
    48 + event.user.len() + event.attribute.len() + id
}

/// The events that were not rejected.
fn without(events: &[Event], rejected: &[(usize, String)]) -> Vec<Event> {
    let mut bad = rejected.iter().map(|r| r.0).peekable();
    let good = events.iter().enumerate();
    good.filter(|(index, _)| bad.next_if_eq(index).is_none())
        .map(|(_, event)| event.clone())
        .collect()
}

fn check_vector(what: &'static str, name: &str, vector: &[f32]) -> Result<()> {
    check_name(what, name).map_err(|reason| StoreError::Event { index: 0, reason })?;
    if vector.is_empty() || vector.len() > FEATURE_MAX {
        return Err(invalid("feature", "1 to 65,536 numbers", vector.len()));
    }
    match vector.iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(invalid("feature", "finite numbers", bad)),
        None => Ok(()),
    }
}

fn check_dims(features: &[(String, Vec<f32>)], dim: usize) -> Result<()> {
    match features.iter().find(|(_, vector)| vector.len() != dim) {
        Some((name, vector)) => Err(StoreError::Invalid {
            what: "feature",
            expected: format!("{dim} numbers, as the encoder takes"),
            got: format!("{} for {name:?}", vector.len()),
        }),
        None => Ok(()),
    }
}

/// Writes a file beside its place, syncs it, and renames it there: whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let fresh = path.with_extension("tmp");
    let mut file = File::create(&fresh).map_err(StoreError::io("create", &fresh))?;
    file.write_all(bytes)
        .map_err(StoreError::io("write", &fresh))?;
    file.sync_all().map_err(StoreError::io("sync", &fresh))?;
    std::fs::rename(&fresh, path).map_err(StoreError::io("rename", &fresh))?;
    log::sync_parent(path)
}

/// Bytes of all files in a directory, as far as they can be looked at.
pub(crate) fn directory_bytes(path: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else {
        return 0;
    };
    let bytes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => directory_bytes(&entry.path()),
        _ => entry.metadata().map_or(0, |m| m.len()),
    });
    bytes.sum()
}
