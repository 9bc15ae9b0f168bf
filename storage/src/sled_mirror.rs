//! sled's copy of what is looked up: names, registers, vectors, pairs, edits.
//!
//! sled never decides what is true. It is written from the state at checkpoints, and read
//! back at an open only if its files are, byte for byte, those of a clean close: their
//! digests stand in a *seal* beside them, which is checked before sled sees a byte. sled
//! 0.34 drops data silently after a flipped bit and may panic on a torn file; behind the
//! seal it meets neither. A mirror without a right seal is deleted and written anew.
//!
//! Not here: postings. They follow from the registers by a counting sort, which takes a fraction
//! of the time that reading them would. Nor embeddings, for the same reason.
//!
//! # When it is read
//!
//! An open replays the log's tail anyway. Where the log is much longer than what is live
//! (more than four operations for each register), the rows are read instead of the log.

use crate::error::{Result, StoreError};
use crate::graph::{AttributeId, Register, UserId};
use crate::log::{self, Cursor, PairRecord, Record, StoredEdit, put_varint, unzigzag, zigzag};
use crate::mark::Mark;
use crate::state::State;
use crate::store::{Places, Shared, lock, write_whole};
use serde::{Deserialize, Serialize};
use simpatico_schema::Polarity;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// The version of the rows and the seal.
const MIRROR_VERSION: u32 = 2;
/// sled keeps values above an eighth of a page badly; rows are cut to this.
const CHUNK: usize = 2000;
/// Rows of one sled batch.
const BATCH_ROWS: usize = 512;
/// A close that would have to write more rows than this leaves the mirror behind; the next
/// process catches up when it is idle.
const CLOSE_ROWS_MAX: usize = 200_000;

/// How long an open waits for sled's lock.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// What changed since the mirror was last brought up to date.
#[derive(Clone, Default)]
pub(crate) struct Dirty {
    users: Vec<u64>,
    /// Rows to write, about.
    pub rows: usize,
    attributes: BTreeSet<u32>,
    learned: BTreeSet<u32>,
    pairs: bool,
    edits: BTreeSet<String>,
    /// A user went: lists are written anew.
    forgot: bool,
}

impl Dirty {
    #[inline]
    pub(crate) fn user(&mut self, user: u32) {
        let (word, bit) = (user as usize / 64, 1u64 << (user % 64));
        if self.users.len() <= word {
            self.users.resize(word + 1 + word / 2, 0);
        }
        if self.users[word] & bit == 0 {
            self.users[word] |= bit;
            self.rows += 1;
        }
    }

    /// Notes what a record changes.
    pub(crate) fn note(&mut self, record: &Record<'_>) {
        match record {
            Record::Event(event) => return self.user(event.user),
            Record::DefineUser { number, .. } => return self.user(*number),
            Record::DefineAttribute { number, .. } => drop(self.attributes.insert(*number)),
            Record::Feature { attribute, .. } => drop(self.attributes.insert(*attribute)),
            Record::UserFeature { user, .. } => drop(self.learned.insert(*user)),
            Record::Forget { user } => {
                self.user(*user);
                self.learned.insert(*user);
                self.forgot = true;
            }
            Record::Pair { .. } => self.pairs = true,
            Record::Edit { edit, .. } => drop(self.edits.insert(edit.id.to_string())),
            Record::Encoder { .. } | Record::BaseEnd => {}
        }
        self.rows += 1;
    }

    fn users(&self) -> impl Iterator<Item = u32> + '_ {
        self.users.iter().enumerate().flat_map(|(word, bits)| {
            (0..64u32)
                .filter(move |bit| bits >> bit & 1 == 1)
                .map(move |bit| word as u32 * 64 + bit)
        })
    }

    /// Everything a state holds.
    fn everything(state: &State) -> Self {
        let mut all = Self::default();
        (0..state.graph.user_id_end()).for_each(|u| all.user(u));
        all.attributes = (0..state.graph.attribute_count() as u32).collect();
        all.learned = state.user_features.keys().copied().collect();
        all.pairs = true;
        all.edits = state.edits.keys().cloned().collect();
        all.forgot = true;
        all
    }
}

/// The proof that sled's files are those of a clean close.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Seal {
    version: u32,
    pub generation: u64,
    store_id: u64,
    pub seq: u64,
    pub frames: u64,
    pub digest: u64,
    /// Where the log ended.
    segment: u64,
    offset: u64,
    earlier_bytes: u64,
    /// What the rows must add up to, in hex.
    state: String,
    registers: u64,
    encoder: Option<String>,
    /// Name, length and BLAKE3 of each file.
    files: Vec<(String, u64, String)>,
}

/// sled, once it is open, and up to where it goes.
pub(crate) struct Mirror {
    db: sled::Db,
    trees: Trees,
}

struct Trees {
    users: sled::Tree,
    attributes: sled::Tree,
    learned: sled::Tree,
    pairs: sled::Tree,
    edits: sled::Tree,
    meta: sled::Tree,
}

/// In the tree `meta`: the sequence number that the rows are of, big-endian.
const APPLIED_SEQ: &str = "applied_seq";

/// A mirror whose end reaches nobody: sled writes when it is dropped, and panics where the disk
/// says no.
pub(crate) struct OpenMirror(Option<Box<Mirror>>);

impl OpenMirror {
    /// Lets sled go. Whether it went without a panic.
    fn close(mut self) -> bool {
        self.let_go()
    }

    fn let_go(&mut self) -> bool {
        let mirror = self.0.take();
        catch_unwind(AssertUnwindSafe(|| drop(mirror))).is_ok()
    }
}

impl std::ops::Deref for OpenMirror {
    type Target = Mirror;

    fn deref(&self) -> &Mirror {
        match &self.0 {
            Some(mirror) => mirror,
            None => unreachable!("it is taken out by close and drop alone"),
        }
    }
}

impl Drop for OpenMirror {
    fn drop(&mut self) {
        self.let_go();
    }
}

/// Whether there is a mirror to go on with.
#[derive(Default)]
pub(crate) enum MirrorState {
    /// Not looked at yet, or none: the first checkpoint starts anew unless a seal holds.
    #[default]
    Closed,
    /// In use.
    Open(OpenMirror),
    /// It failed; the store goes on without it.
    Failed(String),
}

fn failed(path: &Path, reason: impl ToString) -> StoreError {
    StoreError::Mirror {
        path: path.into(),
        reason: reason.to_string(),
    }
}

/// Runs sled where neither its errors nor its panics reach anyone.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T, sled::Error>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| failed(path, e)),
        Err(_) => Err(failed(path, "it panicked")),
    }
}

/// sled has no kind of its own for this error.
fn is_locked(e: &sled::Error) -> bool {
    matches!(e, sled::Error::Io(e) if e.to_string().contains("could not acquire lock"))
}

fn key(number: u32, chunk: u16) -> [u8; 6] {
    let mut key = [0; 6];
    key[..4].copy_from_slice(&number.to_be_bytes());
    key[4..].copy_from_slice(&chunk.to_be_bytes());
    key
}

/// Writes rows, many to a batch.
struct RowWriter<'a> {
    tree: &'a sled::Tree,
    batch: sled::Batch,
    rows: usize,
    fresh: bool,
}

impl<'a> RowWriter<'a> {
    fn new(tree: &'a sled::Tree, fresh: bool) -> Self {
        Self {
            tree,
            batch: sled::Batch::default(),
            rows: 0,
            fresh,
        }
    }

    /// Puts a row in chunks in place of the one there was; an empty one is removed.
    fn put(&mut self, number: u32, row: &[u8]) -> sled::Result<()> {
        let mut chunk = 0u16;
        for piece in row.chunks(CHUNK) {
            self.batch.insert(&key(number, chunk), piece);
            self.rows += 1;
            chunk = chunk.saturating_add(1);
        }
        while !self.fresh && self.tree.contains_key(key(number, chunk))? {
            self.batch.remove(&key(number, chunk));
            chunk = chunk.saturating_add(1);
        }
        if self.rows >= BATCH_ROWS {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> sled::Result<()> {
        self.rows = 0;
        self.tree.apply_batch(std::mem::take(&mut self.batch))
    }
}

/// The bytes of a user's row: name, then registers. Empty for a forgotten user.
fn user_row(state: &State, user: u32, row: &mut Vec<u8>) {
    row.clear();
    let name = state.graph.user_name(UserId(user));
    if name.is_empty() {
        return;
    }
    put_varint(row, name.len() as u64);
    row.extend_from_slice(name.as_bytes());
    let (mut last, mut last_at) = (0u32, 0i64);
    for (attribute, register) in state.graph.registers(UserId(user)) {
        let flags = u64::from(register.polarity.code()) | u64::from(!register.id.is_empty()) << 2;
        put_varint(row, u64::from(attribute.0 - last) << 3 | flags);
        put_varint(row, zigzag(register.at.wrapping_sub(last_at)));
        if !register.id.is_empty() {
            put_varint(row, register.id.len() as u64);
            row.extend_from_slice(register.id.as_bytes());
        }
        (last, last_at) = (attribute.0, register.at);
    }
}

fn attribute_row(state: &State, attribute: u32, row: &mut Vec<u8>) {
    row.clear();
    let name = state.graph.attribute_name(AttributeId(attribute));
    put_varint(row, name.len() as u64);
    row.extend_from_slice(name.as_bytes());
    row.push(u8::from(state.touched_by_forget.contains(&attribute)));
    if let Some(feature) = state.feature(AttributeId(attribute)) {
        row.extend(feature.iter().flat_map(|x| x.to_le_bytes()));
    }
}

fn learned_row(state: &State, user: u32, row: &mut Vec<u8>) {
    row.clear();
    if let Some(vector) = state.user_features.get(&user) {
        row.extend(vector.iter().flat_map(|x| x.to_le_bytes()));
    }
}

fn encoded<T: bincode::Encode>(value: T) -> Vec<u8> {
    bincode::encode_to_vec(value, bincode::config::standard()).unwrap_or_default()
}

fn pair_row(state: &State, place: usize) -> Vec<u8> {
    let (user, pair) = &state.pairs[place];
    encoded((*user, PairRecord::from_schema(pair)))
}

fn edit_row(state: &State, id: &str) -> Vec<u8> {
    match state.edits.get(id) {
        Some((user, edit)) => encoded((*user, StoredEdit::from_schema(edit))),
        None => Vec::new(),
    }
}

impl Mirror {
    /// Opens sled. Nobody else has it, since the store's own lock is held; but threads of a sled
    /// that was closed a moment ago may still be letting go of its lock: that is waited for.
    fn open(path: &Path, cache_bytes: u64) -> Result<OpenMirror> {
        let open = guarded(path, || {
            let config = sled::Config::new()
                .path(path)
                .cache_capacity(cache_bytes)
                .flush_every_ms(None);
            let started = Instant::now();
            let db = loop {
                match config.open() {
                    Err(e) if is_locked(&e) && started.elapsed() < LOCK_WAIT => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    other => break other?,
                }
            };
            let trees = Trees {
                users: db.open_tree("users")?,
                attributes: db.open_tree("attributes")?,
                learned: db.open_tree("learned")?,
                pairs: db.open_tree("pairs")?,
                edits: db.open_tree("edits")?,
                meta: db.open_tree("meta")?,
            };
            Ok(Self { db, trees })
        })?;
        Ok(OpenMirror(Some(Box::new(open))))
    }

    /// Writes what is dirty; `fresh` where nothing was there before.
    fn write(&self, state: &State, dirty: &Dirty, fresh: bool) -> sled::Result<()> {
        let mut row = Vec::new();
        let mut users = RowWriter::new(&self.trees.users, fresh);
        for user in dirty.users() {
            user_row(state, user, &mut row);
            users.put(user, &row)?;
        }
        users.flush()?;
        let mut attributes = RowWriter::new(&self.trees.attributes, fresh);
        let touched = state.touched_by_forget.iter().filter(|_| dirty.forgot);
        for attribute in dirty.attributes.iter().chain(touched) {
            attribute_row(state, *attribute, &mut row);
            attributes.put(*attribute, &row)?;
        }
        attributes.flush()?;
        let mut learned = RowWriter::new(&self.trees.learned, fresh);
        for user in &dirty.learned {
            learned_row(state, *user, &mut row);
            learned.put(*user, &row)?;
        }
        learned.flush()?;
        self.write_lists(state, dirty)?;
        let seq = state.seq.to_be_bytes();
        self.trees.meta.insert(APPLIED_SEQ, &seq).map(drop)
    }

    /// The sequence number that the rows are of.
    fn applied_seq(&self) -> sled::Result<Option<u64>> {
        let bytes = self.trees.meta.get(APPLIED_SEQ)?;
        Ok(bytes.and_then(|b| Some(u64::from_be_bytes(b.as_ref().try_into().ok()?))))
    }

    fn write_lists(&self, state: &State, dirty: &Dirty) -> sled::Result<()> {
        if dirty.forgot {
            self.trees.pairs.clear()?;
            self.trees.edits.clear()?;
        }
        if dirty.pairs || dirty.forgot {
            let mut pairs = RowWriter::new(&self.trees.pairs, true);
            let from = match self.trees.pairs.last()? {
                Some((last, _)) if last.len() == 6 => {
                    u32::from_be_bytes([last[0], last[1], last[2], last[3]]) as usize + 1
                }
                _ => 0,
            };
            for place in from..state.pairs.len() {
                pairs.put(place as u32, &pair_row(state, place))?;
            }
            pairs.flush()?;
        }
        // An edit's row is found by the digest of its id: keys stay short, and chunks in order.
        let all = state.edits.keys().filter(|_| dirty.forgot);
        for id in dirty.edits.iter().chain(all) {
            let mut key = xxhash_rust::xxh3::xxh3_128(id.as_bytes())
                .to_be_bytes()
                .to_vec();
            key.extend([0, 0]);
            let row = edit_row(state, id);
            let mut chunks = row.chunks(CHUNK);
            for chunk in 0u16.. {
                key[16..].copy_from_slice(&chunk.to_be_bytes());
                match chunks.next() {
                    Some(piece) => drop(self.trees.edits.insert(&key, piece)?),
                    None if self.trees.edits.remove(&key)?.is_none() => break,
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// flush writes to the kernel only; the sync is ours.
    fn sync(&self, path: &Path) -> Result<()> {
        guarded(path, || self.db.flush())?;
        for name in ["db", "conf"] {
            let file = path.join(name);
            let open = File::open(&file).map_err(StoreError::io("open", &file))?;
            open.sync_data().map_err(StoreError::io("sync", &file))?;
        }
        log::sync_dir(path)
    }
}

/// The whole rows of a tree, chunks joined, in order of their keys.
fn rows(
    tree: &sled::Tree,
    key_len: usize,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let mut held: Option<(Vec<u8>, Vec<u8>, u16)> = None;
    for item in tree.iter() {
        let (key, value) = item.map_err(|e| e.to_string())?;
        if key.len() != key_len + 2 {
            return Err(format!(
                "expected keys of {} bytes, got {}",
                key_len + 2,
                key.len()
            ));
        }
        let chunk = u16::from_be_bytes([key[key_len], key[key_len + 1]]);
        match &mut held {
            Some((row, bytes, last)) if **row == key[..key_len] && chunk == *last + 1 => {
                bytes.extend_from_slice(&value);
                *last = chunk;
            }
            _ if chunk != 0 => return Err("expected a row to begin with chunk 0".into()),
            _ => {
                if let Some((row, bytes, _)) = held.take() {
                    visit(&row, &bytes)?;
                }
                held = Some((key[..key_len].to_vec(), value.to_vec(), 0));
            }
        }
    }
    match held {
        Some((row, bytes, _)) => visit(&row, &bytes),
        None => Ok(()),
    }
}

fn number_of(key: &[u8]) -> u32 {
    key.try_into().map_or(u32::MAX, u32::from_be_bytes)
}

fn vector_of(bytes: &[u8]) -> Vec<f32> {
    let numbers = bytes.chunks_exact(4);
    numbers
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

fn name_of<'a>(cursor: &mut Cursor<'a>) -> Result<&'a str, String> {
    let len = usize::try_from(cursor.varint()?).map_err(|_| "length of a name")?;
    std::str::from_utf8(cursor.take(len)?).map_err(|e| e.to_string())
}

/// The state that the rows hold.
fn read_rows(mirror: &Mirror) -> Result<State, String> {
    let mut state = State::default();
    let mut touched = BTreeSet::new();
    rows(&mirror.trees.attributes, 4, |key, row| {
        let mut cursor = Cursor::new(row);
        let (number, name) = (number_of(key), name_of(&mut cursor)?);
        let name = std::borrow::Cow::Borrowed(name);
        state.apply(&Record::DefineAttribute { number, name })?;
        if cursor.byte()? == 1 {
            touched.insert(number);
        }
        let vector = vector_of(cursor.rest());
        if !vector.is_empty() {
            let (attribute, vector) = (number, vector.into());
            state.apply(&Record::Feature { attribute, vector })?;
        }
        Ok(())
    })?;
    state.touched_by_forget = touched.into();
    let mut events: Vec<(UserId, AttributeId, i64, Polarity, String)> = Vec::new();
    let flush = |state: &mut State,
                 events: &mut Vec<(UserId, AttributeId, i64, Polarity, String)>| {
        let mut batch: Vec<_> = events
            .iter()
            .map(|(user, attribute, at, polarity, id)| {
                let (polarity, at) = (*polarity, *at);
                (*user, *attribute, Register { polarity, at, id })
            })
            .collect();
        state.graph.set_registers(&mut batch);
        events.clear();
    };
    rows(&mirror.trees.users, 4, |key, row| {
        let user = number_of(key);
        while state.graph.user_id_end() < user {
            // A forgotten user's number stays taken. No name begins with a control character.
            let hole = format!("\u{0}{}", state.graph.user_id_end());
            let id = state.graph.add_user(&hole);
            state.graph.forget_user(id);
        }
        let mut cursor = Cursor::new(row);
        let name = std::borrow::Cow::Borrowed(name_of(&mut cursor)?);
        state.apply(&Record::DefineUser { number: user, name })?;
        let (mut attribute, mut at) = (0u32, 0i64);
        while !cursor.rest().is_empty() {
            let packed = cursor.varint()?;
            attribute = u32::try_from(packed >> 3)
                .ok()
                .and_then(|step| attribute.checked_add(step))
                .filter(|a| (*a as usize) < state.graph.attribute_count())
                .ok_or("attribute number")?;
            let polarity = Polarity::from_code((packed & 3) as u8).ok_or("polarity")?;
            at = at.wrapping_add(unzigzag(cursor.varint()?));
            let id = match packed & 4 {
                0 => String::new(),
                _ => name_of(&mut cursor)?.to_string(),
            };
            events.push((UserId(user), AttributeId(attribute), at, polarity, id));
        }
        if events.len() >= 4096 {
            flush(&mut state, &mut events);
        }
        Ok(())
    })?;
    flush(&mut state, &mut events);
    state.graph.post_all();
    read_lists(mirror, &mut state)?;
    Ok(state)
}

fn read_lists(mirror: &Mirror, state: &mut State) -> Result<(), String> {
    rows(&mirror.trees.learned, 4, |key, row| {
        let (user, vector) = (number_of(key), vector_of(row).into());
        state.apply(&Record::UserFeature { user, vector })
    })?;
    rows(&mirror.trees.pairs, 4, |_, row| {
        let (user, pair) = Cursor::new(row).body()?;
        state.apply(&Record::Pair { user, pair })
    })?;
    rows(&mirror.trees.edits, 16, |_, row| {
        let (user, edit) = Cursor::new(row).body()?;
        state.apply(&Record::Edit { user, edit })
    })
}

fn seal_path(places: &Places) -> std::path::PathBuf {
    places.sled.with_file_name("sled.seal")
}

/// Every file of sled's directory: name, length, BLAKE3.
fn file_digests(dir: &Path) -> Result<Vec<(String, u64, String)>> {
    let mut files = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(at) = pending.pop() {
        for entry in std::fs::read_dir(&at).map_err(StoreError::io("open", &at))? {
            let path = entry.map_err(StoreError::io("read", &at))?.path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let mut file = File::open(&path).map_err(StoreError::io("open", &path))?;
            let (mut hasher, mut length) = (blake3::Hasher::new(), 0u64);
            let mut buffer = vec![0; 1 << 18];
            loop {
                let n = file
                    .read(&mut buffer)
                    .map_err(StoreError::io("read", &path))?;
                if n == 0 {
                    break;
                }
                hasher.update(&buffer[..n]);
                length += n as u64;
            }
            let name = path.strip_prefix(dir).unwrap_or(&path);
            let name = name.to_string_lossy().into_owned();
            files.push((name, length, hasher.finalize().to_hex().to_string()));
        }
    }
    files.sort();
    Ok(files)
}

/// The seal, if it is whole: its last line is the BLAKE3 of the rest.
pub(crate) fn read_seal(places: &Places) -> Option<Seal> {
    let mut text = String::new();
    let file = File::open(seal_path(places)).ok()?;
    file.take(1 << 20).read_to_string(&mut text).ok()?;
    let (body, digest) = text.trim_end().rsplit_once('\n')?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != digest {
        return None;
    }
    let seal: Seal = serde_json::from_str(body).ok()?;
    (seal.version == MIRROR_VERSION).then_some(seal)
}

impl Seal {
    /// Whether rows instead of the log are the shorter way to the state, and the log stands
    /// exactly where this seal says: nothing was written since.
    pub(crate) fn is_shortcut(&self, mark: &Mark, segment: u64, log_length: u64) -> bool {
        self.position().2 == *mark
            && segment == self.segment
            && log_length == self.earlier_bytes + self.offset
            && self.seq > 4 * self.registers.max(1000)
    }

    /// The segment, the byte in it and the chain where the log goes on after this seal.
    pub(crate) fn position(&self) -> (u64, u64, Mark) {
        let at = Mark {
            generation: self.generation,
            store_id: self.store_id,
            seq: self.seq,
            digest: self.digest,
            frames: self.frames,
        };
        (self.segment, self.offset, at)
    }

    /// Where the log ends.
    pub(crate) fn log_end(&self, path: std::path::PathBuf, mark: Mark) -> log::LogEnd {
        log::LogEnd {
            path,
            number: self.segment,
            offset: self.offset,
            unsure_from: self.offset,
            at: mark,
            earlier_bytes: self.earlier_bytes,
            torn_bytes: 0,
            damage: None,
        }
    }
}

/// Reads the state from sled's rows, if its files are as sealed and add up. `None`: go by
/// the log.
pub(crate) fn load(places: &Places, seal: &Seal) -> Option<(State, OpenMirror)> {
    if file_digests(&places.sled).ok()? != seal.files {
        return None;
    }
    // Opening changes the files: from here on the seal does not hold.
    std::fs::remove_file(seal_path(places)).ok()?;
    log::sync_parent(&places.sled).ok()?;
    let mirror = Mirror::open(&places.sled, 16 << 20).ok()?;
    let read = catch_unwind(AssertUnwindSafe(|| read_rows(&mirror)));
    let mut state = read.ok()?.ok()?;
    if guarded(&places.sled, || mirror.applied_seq()).ok()? != Some(seal.seq) {
        return None;
    }
    state.encoder = seal.encoder.as_deref().map(Into::into);
    state.seq = seal.seq;
    (format!("{:032x}", state.digest()) == seal.state).then_some((state, mirror))
}

impl Seal {
    /// Whether this seal's mirror can be caught up with from a log that is at or beyond it.
    pub(crate) fn belongs_to(&self, at: &Mark) -> bool {
        let same = (self.generation, self.store_id) == (at.generation, at.store_id);
        let level = self.frames < at.frames || (self.frames, self.digest) == (at.frames, at.digest);
        same && level
    }
}

impl Shared {
    /// Deletes sled's files, and the seal before them.
    fn wipe_mirror(&self) -> Result<()> {
        let places = Places::of(&self.path);
        let seal = seal_path(&places);
        match std::fs::remove_file(&seal) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", &seal)(e));
            }
            _ => {}
        }
        match std::fs::remove_dir_all(&places.sled) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", &places.sled)(e))
            }
            _ => log::sync_dir(&self.path),
        }
    }

    /// Opens the mirror if it is not. Returns whether it is new, and so lacks everything.
    fn open_mirror(&self, mirror: &mut MirrorState, seal: Option<&Seal>) -> Result<bool> {
        match mirror {
            MirrorState::Open(_) => return Ok(false),
            MirrorState::Failed(reason) => {
                let reason = reason.clone();
                return Err(failed(&Places::of(&self.path).sled, reason));
            }
            MirrorState::Closed => {}
        }
        let places = Places::of(&self.path);
        let whole = seal.is_some_and(|s| file_digests(&places.sled).is_ok_and(|f| f == s.files));
        if whole {
            // From here on the files change, and the seal no longer holds.
            let seal = seal_path(&places);
            std::fs::remove_file(&seal).map_err(StoreError::io("remove", &seal))?;
            log::sync_dir(&self.path)?;
        } else {
            self.wipe_mirror()?;
        }
        let open = Mirror::open(&places.sled, self.options.mirror_cache_bytes)?;
        *mirror = MirrorState::Open(open);
        Ok(!whole)
    }

    /// Brings the mirror up to date. Its failure is remembered and hurts no answer.
    pub(crate) fn checkpoint(&self) {
        if !self.options.mirror {
            return;
        }
        let mut mirror = lock(&self.mirror);
        let Ok((state, at, mut dirty, seal)) = self.take_dirty() else {
            return;
        };
        self.save_maximum(&state, &at);
        let written = self
            .open_mirror(&mut mirror, seal.as_ref())
            .and_then(|fresh| {
                if fresh {
                    dirty = Dirty::everything(&state);
                }
                let sled = Places::of(&self.path).sled;
                match &*mirror {
                    MirrorState::Open(open) => {
                        guarded(&sled, || open.write(&state, &dirty, fresh))?;
                        open.sync(&sled)
                    }
                    _ => Ok(()),
                }
            });
        if let Err(e) = written {
            *mirror = MirrorState::Failed(e.to_string());
        }
    }

    /// The state, all of it on disk in the log, and what the mirror lacks of it.
    fn take_dirty(&self) -> Result<(State, Mark, Dirty, Option<Seal>)> {
        self.at_length(|inner| {
            let at = self.commit_all(inner)?.at;
            let dirty = std::mem::take(&mut inner.dirty);
            let seal = inner.seal.take();
            Ok((inner.state.clone(), at, dirty, seal))
        })
    }

    /// Starts the mirror anew after a compaction.
    pub(crate) fn rebuild_mirror(&self) -> Result<()> {
        let mut mirror = lock(&self.mirror);
        *mirror = MirrorState::Closed;
        self.wipe_mirror()?;
        drop(mirror);
        self.checkpoint();
        Ok(())
    }

    /// The close: a last checkpoint, if it is small, and the seal.
    pub(crate) fn seal_mirror(&self) {
        let rows = lock(&self.inner).dirty.rows;
        if !self.options.mirror || rows > CLOSE_ROWS_MAX {
            return;
        }
        if rows > 0 {
            self.checkpoint();
        }
        let mut mirror = lock(&self.mirror);
        let MirrorState::Open(open) = std::mem::take(&mut *mirror) else {
            return;
        };
        if !open.close() {
            return;
        }
        let Ok(seal) = self.make_seal() else { return };
        let Ok(body) = serde_json::to_string(&seal) else {
            return;
        };
        let text = format!("{body}\n{}\n", blake3::hash(body.as_bytes()).to_hex());
        let _ = write_whole(&seal_path(&Places::of(&self.path)), text.as_bytes());
    }

    fn make_seal(&self) -> Result<Seal> {
        let state = lock(&self.inner).state.clone();
        let log = lock(&self.log);
        let (segment, offset) = log.position();
        let registers = state
            .users()
            .map(|u| state.graph.registers(u).count() as u64);
        Ok(Seal {
            version: MIRROR_VERSION,
            generation: log.at.generation,
            store_id: log.at.store_id,
            seq: log.at.seq,
            frames: log.at.frames,
            digest: log.at.digest,
            segment,
            offset,
            earlier_bytes: log.earlier_bytes,
            state: format!("{:032x}", state.digest()),
            registers: registers.sum(),
            encoder: state.encoder.as_deref().map(str::to_string),
            files: file_digests(&Places::of(&self.path).sled)?,
        })
    }

    /// Brings the mirror up to date and compares every row with the state. Returns how many
    /// rows there were, and what is wrong.
    pub(crate) fn check_mirror(&self) -> (u64, Vec<String>) {
        if !self.options.mirror {
            return (0, Vec::new());
        }
        self.checkpoint();
        let mirror = lock(&self.mirror);
        let open = match &*mirror {
            MirrorState::Open(open) => open,
            MirrorState::Failed(reason) => return (0, vec![reason.clone()]),
            MirrorState::Closed => return (0, Vec::new()),
        };
        // What changes while rows are compared is dirty again, and not compared.
        let (state, dirty) = {
            let inner = lock(&self.inner);
            (inner.state.clone(), inner.dirty.clone())
        };
        let changing: BTreeSet<u32> = dirty.users().collect();
        let (mut count, mut problems, mut row) = (0, Vec::new(), Vec::new());
        let compared = catch_unwind(AssertUnwindSafe(|| {
            let applied = open.applied_seq().map_err(|e| e.to_string())?;
            if dirty.rows == 0 && applied != Some(state.seq) {
                let (expected, got) = (state.seq, applied);
                problems.push(format!(
                    "sled: expected applied_seq {expected}, got {got:?}"
                ));
            }
            rows(&open.trees.users, 4, |key, bytes| {
                count += 1;
                let user = number_of(key);
                user_row(&state, user, &mut row);
                if row != bytes && !changing.contains(&user) {
                    problems.push(format!("sled: the row of user {user} is another"));
                }
                Ok(())
            })?;
            rows(&open.trees.attributes, 4, |key, bytes| {
                count += 1;
                let attribute = number_of(key);
                attribute_row(&state, attribute, &mut row);
                if row != bytes && dirty.rows == 0 {
                    problems.push(format!("sled: the row of attribute {attribute} is another"));
                }
                Ok(())
            })
        }));
        match compared {
            Ok(Ok(())) => {}
            Ok(Err(e)) => problems.push(format!("sled: {e}")),
            Err(_) => problems.push("sled: it panicked".into()),
        }
        let expected = state.graph.user_count() + state.graph.attribute_count();
        if dirty.rows == 0 && count != expected as u64 {
            problems.push(format!("sled: expected {expected} rows, got {count}"));
        }
        problems.truncate(20);
        (count, problems)
    }
}

/// A closed store's rows, kept open so that many values can be tried in them.
pub(crate) struct Rows(OpenMirror);

impl Rows {
    pub(crate) fn open(store: &Path) -> Result<Self> {
        Mirror::open(&Places::of(store).sled, 16 << 20).map(Self)
    }

    fn tree(&self, number: usize) -> &sled::Tree {
        let trees = &self.0.trees;
        match number % 5 {
            0 => &trees.users,
            1 => &trees.attributes,
            2 => &trees.learned,
            3 => &trees.pairs,
            _ => &trees.edits,
        }
    }

    /// A row of a tree, both counted round.
    pub(crate) fn get(&self, tree: usize, row: usize) -> Option<(sled::IVec, sled::IVec)> {
        let rows: Vec<_> = self.tree(tree).iter().flatten().collect();
        rows.get(row % rows.len().max(1)).cloned()
    }

    /// The state with another value in a row.
    pub(crate) fn with(&self, tree: usize, row: usize, value: &[u8]) -> Result<State, String> {
        let (key, before) = self.get(tree, row).ok_or("no row")?;
        let text = |e: sled::Error| e.to_string();
        self.tree(tree).insert(&key, value).map_err(text)?;
        let state = read_rows(&self.0);
        self.tree(tree).insert(&key, before).map_err(text)?;
        state
    }
}
