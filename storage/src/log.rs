//! The event log: the truth of a store. Append-only segments of checksummed, chained frames.
//!
//! Not here: what a record means for the graph (state.rs), who waits for whom (store.rs).
//!
//! A frame is one group commit. Names appear in it once, where they are defined; an event is
//! numbers, about seven bytes. The layout, byte by byte, is in FORMAT.md.

use crate::error::{Result, StoreError};
use crate::mark::{Mark, MarkFile};
use simpatico_schema::Polarity;
use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64_with_seed;

#[cfg(feature = "planted")]
#[path = "planted.rs"]
pub(crate) mod planted;

/// The version of the segment format.
pub(crate) const LOG_VERSION: u32 = 1;
const SEGMENT_MAGIC: &[u8; 8] = b"SIMPSLOG";
/// Bytes before the first frame of a segment.
pub(crate) const SEGMENT_HEADER: usize = 64;
/// Bytes of a frame before its payload: length, checksum, first sequence number, digest.
pub(crate) const FRAME_HEADER: usize = 24;
/// A payload is closed when it has this many bytes; the next record starts another. (Tests
/// of schedules are of few events, and some are to fill one.)
pub(crate) const PAYLOAD_FULL: usize = if cfg!(feature = "schedules") {
    80
} else {
    4 << 20
};
/// The longest payload a reader takes. One record never has more than [`RECORD_MAX`].
const PAYLOAD_MAX: usize = PAYLOAD_FULL + RECORD_MAX + 1024;
/// The longest record.
pub(crate) const RECORD_MAX: usize = 2 << 20;

const TAG_USER: u8 = 1;
const TAG_ATTRIBUTE: u8 = 2;
const TAG_EVENTS: u8 = 3;
const TAG_FORGET: u8 = 4;
const TAG_FEATURE: u8 = 5;
const TAG_USER_FEATURE: u8 = 6;
const TAG_ENCODER: u8 = 7;
const TAG_PAIR: u8 = 8;
const TAG_EDIT: u8 = 9;
const TAG_BASE_END: u8 = 10;

/// What a record may take when it is read. bincode counts numbers and strings at their size in
/// memory, where a string of one byte in the log is a `Cow` of 24: with the writer's own limit a
/// reader would refuse long records that were written and acknowledged.
const READ_MAX: usize = 32 * RECORD_MAX;

const BINCODE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<{ READ_MAX }>,
> = bincode::config::standard().with_limit::<READ_MAX>();

/// One thing the log says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record<'a> {
    /// From here on, `number` stands for this user.
    DefineUser { number: u32, name: Cow<'a, str> },
    /// From here on, `number` stands for this attribute.
    DefineAttribute { number: u32, name: Cow<'a, str> },
    /// A user said something of an attribute. `at` is final: clamped, never absent.
    Event(EventRecord<'a>),
    /// Everything of this user is void. Without the name, which is to vanish.
    Forget { user: u32 },
    /// An attribute's text vector.
    Feature {
        attribute: u32,
        vector: Cow<'a, [f32]>,
    },
    /// A user's learned vector.
    UserFeature { user: u32, vector: Cow<'a, [f32]> },
    /// From here on, embeddings are made with the weights of this digest.
    Encoder { digest: Cow<'a, str> },
    /// A preference pair.
    Pair { user: u32, pair: PairRecord<'a> },
    /// An edit, or a newer state of one.
    Edit { user: u32, edit: StoredEdit<'a> },
    /// A compaction's base ends here: it is whole.
    BaseEnd,
}

/// An event in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EventRecord<'a> {
    pub user: u32,
    pub attribute: u32,
    pub polarity: Polarity,
    /// Milliseconds since 1970.
    pub at: i64,
    /// "" where the event had none.
    pub id: &'a str,
}

/// A preference pair without its user.
#[derive(Clone, Debug, PartialEq, bincode::Encode, bincode::BorrowDecode)]
pub(crate) struct PairRecord<'a> {
    pub caption: Cow<'a, str>,
    pub chosen: Cow<'a, str>,
    pub rejected: Cow<'a, str>,
    pub source: Cow<'a, str>,
}

/// An edit record without its user.
#[derive(Clone, Debug, PartialEq, bincode::Encode, bincode::BorrowDecode)]
pub(crate) struct StoredEdit<'a> {
    pub id: Cow<'a, str>,
    pub caption: Cow<'a, str>,
    pub instruction: Cow<'a, str>,
    pub attributes: Vec<Cow<'a, str>>,
    pub at: i64,
    pub accepted: Option<bool>,
}

/// Little-endian u32 at a place that the caller knows to be inside.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

/// Little-endian u64 at a place that the caller knows to be inside.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    #[cfg(feature = "planted")]
    if planted::is("skip-directory-sync") {
        return Ok(());
    }
    let handle = File::open(dir).map_err(StoreError::io("open", dir))?;
    handle.sync_all().map_err(StoreError::io("sync", dir))
}

/// Makes the directory entry of a file durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => sync_dir(dir),
        _ => sync_dir(Path::new(".")),
    }
}

#[inline]
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[inline]
pub(crate) fn zigzag(value: i64) -> u64 {
    (value << 1) as u64 ^ (value >> 63) as u64
}

#[inline]
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// The bytes of one frame while it is being filled. Room for the frame's header is kept in
/// front, so that the whole goes out in one write.
pub(crate) struct Payload {
    bytes: Vec<u8>,
    /// The sequence number of its first operation.
    first_seq: u64,
    /// How many sequence numbers it takes.
    count: u32,
    /// Where the count of the open run of events stands, and how many it has.
    run: Option<(usize, u32)>,
    previous_user: u32,
    previous_at: i64,
}

impl Payload {
    /// An empty payload. `bytes` is a buffer to use again.
    pub(crate) fn new(first_seq: u64, mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        bytes.resize(FRAME_HEADER + 4, 0);
        Self {
            bytes,
            first_seq,
            count: 0,
            run: None,
            previous_user: 0,
            previous_at: 0,
        }
    }

    /// Whether nothing is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.len() == FRAME_HEADER + 4
    }

    /// Whether the next record belongs into another payload.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes.len() >= PAYLOAD_FULL
    }

    /// Its length so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The sequence number after its last operation.
    pub(crate) fn next_seq(&self) -> u64 {
        self.first_seq + u64::from(self.count)
    }

    /// Says that the last records were one operation with a sequence number.
    #[inline]
    pub(crate) fn count_one(&mut self) {
        self.count += 1;
    }

    /// Adds an event.
    #[inline]
    pub(crate) fn push_event(&mut self, event: &EventRecord<'_>) {
        let run = match &mut self.run {
            Some(run) => run,
            none => {
                self.bytes.push(TAG_EVENTS);
                let run = none.insert((self.bytes.len(), 0));
                self.bytes.extend_from_slice(&[0; 4]);
                run
            }
        };
        run.1 += 1;
        let out = &mut self.bytes;
        put_varint(
            out,
            zigzag(i64::from(event.user) - i64::from(self.previous_user)),
        );
        let flags = u64::from(event.polarity.code()) | u64::from(!event.id.is_empty()) << 2;
        put_varint(out, u64::from(event.attribute) << 3 | flags);
        put_varint(out, zigzag(event.at.wrapping_sub(self.previous_at)));
        if !event.id.is_empty() {
            put_varint(out, event.id.len() as u64);
            out.extend_from_slice(event.id.as_bytes());
        }
        self.previous_user = event.user;
        self.previous_at = event.at;
    }

    fn close_run(&mut self) {
        if let Some((place, count)) = self.run.take() {
            self.bytes[place..place + 4].copy_from_slice(&count.to_le_bytes());
        }
    }

    /// Adds any record.
    pub(crate) fn push(&mut self, record: &Record<'_>) -> Result<()> {
        if let Record::Event(event) = record {
            self.push_event(event);
            return Ok(());
        }
        self.close_run();
        let start = self.bytes.len();
        let out = &mut self.bytes;
        let written = match record {
            Record::Event(_) => Ok(()),
            Record::DefineUser { number, name } => {
                put_body(out, TAG_USER, (*number, name.as_ref()))
            }
            Record::DefineAttribute { number, name } => {
                put_body(out, TAG_ATTRIBUTE, (*number, name.as_ref()))
            }
            Record::Forget { user } => put_body(out, TAG_FORGET, *user),
            Record::Feature { attribute, vector } => {
                put_body(out, TAG_FEATURE, (*attribute, vector.as_ref()))
            }
            Record::UserFeature { user, vector } => {
                put_body(out, TAG_USER_FEATURE, (*user, vector.as_ref()))
            }
            Record::Encoder { digest } => put_body(out, TAG_ENCODER, digest.as_ref()),
            Record::Pair { user, pair } => put_body(out, TAG_PAIR, (*user, pair)),
            Record::Edit { user, edit } => put_body(out, TAG_EDIT, (*user, edit)),
            Record::BaseEnd => put_body(out, TAG_BASE_END, ()),
        };
        let bytes = self.bytes.len() - start;
        if written.is_err() || bytes > RECORD_MAX {
            self.bytes.truncate(start);
            return Err(StoreError::Invalid {
                what: "record",
                expected: format!("at most {RECORD_MAX} bytes"),
                got: format!("{bytes} bytes"),
            });
        }
        Ok(())
    }

    /// Completes the frame behind the given chain and gives its bytes and its digest.
    fn seal(&mut self, previous_digest: u64) -> (&[u8], u64) {
        self.close_run();
        let count = self.count.to_le_bytes();
        self.bytes[FRAME_HEADER..FRAME_HEADER + 4].copy_from_slice(&count);
        let payload_len = (self.bytes.len() - FRAME_HEADER) as u32;
        self.bytes[..4].copy_from_slice(&payload_len.to_le_bytes());
        self.bytes[8..16].copy_from_slice(&self.first_seq.to_le_bytes());
        self.bytes[16..24].copy_from_slice(&previous_digest.to_le_bytes());
        let crc = frame_crc(&self.bytes);
        self.bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        let digest = frame_digest(&self.bytes, previous_digest);
        (&self.bytes, digest)
    }

    /// The payload's bytes, complete, as a frame would carry them.
    pub(crate) fn body(&mut self) -> &[u8] {
        self.close_run();
        &self.bytes[FRAME_HEADER..]
    }

    /// Gives the buffer back.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

fn put_body<T: bincode::Encode>(
    out: &mut Vec<u8>,
    tag: u8,
    body: T,
) -> Result<(), bincode::error::EncodeError> {
    out.push(tag);
    bincode::encode_into_std_write(body, out, BINCODE).map(|_| ())
}

/// The checksum of a whole frame: everything but itself.
fn frame_crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..])
}

/// The chain digest after a frame.
fn frame_digest(frame: &[u8], previous: u64) -> u64 {
    xxh3_64_with_seed(&frame[4..], previous)
}

/// The chain digest before the first frame of a log.
pub(crate) fn genesis_digest(store_id: u64, generation: u64) -> u64 {
    xxh3_64_with_seed(&generation.to_le_bytes(), store_id)
}

/// Reads numbers and strings out of a payload without ever reading past its end.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// At the beginning of the bytes.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// What was not read yet.
    pub(crate) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    #[inline]
    pub(crate) fn byte(&mut self) -> Result<u8, String> {
        let byte = *self.bytes.get(self.at).ok_or("expected another byte")?;
        self.at += 1;
        Ok(byte)
    }

    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u64, String> {
        let first = self.byte()?;
        if first < 0x80 {
            return Ok(u64::from(first));
        }
        let mut value = u64::from(first & 0x7f);
        for shift in (7..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("expected a number of at most 64 bits".into())
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(len).filter(|e| *e <= self.bytes.len());
        let end =
            end.ok_or_else(|| format!("expected {len} bytes, got {}", self.bytes.len() - self.at))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn body<T: bincode::BorrowDecode<'a, ()>>(&mut self) -> Result<T, String> {
        let (value, used) = bincode::borrow_decode_from_slice(&self.bytes[self.at..], BINCODE)
            .map_err(|e| format!("record: {e}"))?;
        self.at += used;
        Ok(value)
    }
}

/// Gives every record of a payload to `visit`, in order; an error names the byte.
pub(crate) fn decode_payload<'a>(
    payload: &'a [u8],
    mut visit: impl FnMut(Record<'a>) -> Result<(), String>,
) -> Result<(), (usize, String)> {
    let mut cursor = Cursor {
        bytes: payload,
        at: 4,
    };
    let (mut previous_user, mut previous_at) = (0u32, 0i64);
    while cursor.at < payload.len() {
        let start = cursor.at;
        let tag = cursor.byte().map_err(|e| (start, e))?;
        if tag == TAG_EVENTS {
            decode_run(
                &mut cursor,
                &mut previous_user,
                &mut previous_at,
                &mut visit,
            )
            .map_err(|e| (cursor.at, e))?;
        } else {
            decode_record(tag, &mut cursor)
                .and_then(&mut visit)
                .map_err(|e| (start, e))?;
        }
    }
    Ok(())
}

fn decode_run<'a>(
    cursor: &mut Cursor<'a>,
    previous_user: &mut u32,
    previous_at: &mut i64,
    visit: &mut impl FnMut(Record<'a>) -> Result<(), String>,
) -> Result<(), String> {
    let count = u32_at(cursor.take(4)?, 0);
    for _ in 0..count {
        let user = i64::from(*previous_user).wrapping_add(unzigzag(cursor.varint()?));
        let user = u32::try_from(user).map_err(|_| format!("user number {user}"))?;
        let packed = cursor.varint()?;
        let attribute = u32::try_from(packed >> 3).map_err(|_| "attribute number".to_string())?;
        let polarity = Polarity::from_code((packed & 3) as u8).ok_or("polarity")?;
        let at = previous_at.wrapping_add(unzigzag(cursor.varint()?));
        let id = if packed & 4 == 0 {
            ""
        } else {
            let len = cursor.varint()?;
            let len = usize::try_from(len).map_err(|_| "length of an id")?;
            std::str::from_utf8(cursor.take(len)?).map_err(|e| format!("id: {e}"))?
        };
        *previous_user = user;
        *previous_at = at;
        visit(Record::Event(EventRecord {
            user,
            attribute,
            polarity,
            at,
            id,
        }))?;
    }
    Ok(())
}

fn decode_record<'a>(tag: u8, cursor: &mut Cursor<'a>) -> Result<Record<'a>, String> {
    Ok(match tag {
        TAG_USER => {
            let (number, name): (u32, &str) = cursor.body()?;
            let name = name.into();
            Record::DefineUser { number, name }
        }
        TAG_ATTRIBUTE => {
            let (number, name): (u32, &str) = cursor.body()?;
            let name = name.into();
            Record::DefineAttribute { number, name }
        }
        TAG_FORGET => Record::Forget {
            user: cursor.body()?,
        },
        TAG_FEATURE => {
            let (attribute, vector): (u32, Vec<f32>) = cursor.body()?;
            let vector = vector.into();
            Record::Feature { attribute, vector }
        }
        TAG_USER_FEATURE => {
            let (user, vector): (u32, Vec<f32>) = cursor.body()?;
            let vector = vector.into();
            Record::UserFeature { user, vector }
        }
        TAG_ENCODER => Record::Encoder {
            digest: Cow::Borrowed(cursor.body::<&str>()?),
        },
        TAG_PAIR => {
            let (user, pair) = cursor.body()?;
            Record::Pair { user, pair }
        }
        TAG_EDIT => {
            let (user, edit) = cursor.body()?;
            Record::Edit { user, edit }
        }
        TAG_BASE_END => Record::BaseEnd,
        other => return Err(format!("expected a record tag 1 to 10, got {other}")),
    })
}

/// The file name of a segment.
pub(crate) fn segment_path(dir: &Path, generation: u64, number: u64) -> PathBuf {
    dir.join(format!("{generation:06}-{number:08}.log"))
}

/// The generation and number in a segment's file name.
fn parse_segment_name(name: &str) -> Option<(u64, u64)> {
    let (generation, number) = name.strip_suffix(".log")?.split_once('-')?;
    Some((generation.parse().ok()?, number.parse().ok()?))
}

/// All segments in a log directory as (generation, number, path), in order.
pub(crate) fn list_segments(dir: &Path) -> Result<Vec<(u64, u64, PathBuf)>> {
    let mut segments = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(StoreError::io("open", dir))? {
        let path = entry.map_err(StoreError::io("read", dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if let Some((generation, number)) = parse_segment_name(name) {
            segments.push((generation, number, path));
        }
    }
    segments.sort();
    Ok(segments)
}

fn segment_header(mark: &Mark, number: u64) -> [u8; SEGMENT_HEADER] {
    let mut header = [0u8; SEGMENT_HEADER];
    header[..8].copy_from_slice(SEGMENT_MAGIC);
    header[8..12].copy_from_slice(&LOG_VERSION.to_le_bytes());
    for (place, value) in [
        mark.generation,
        number,
        mark.store_id,
        mark.seq + 1,
        mark.digest,
    ]
    .into_iter()
    .enumerate()
    {
        header[16 + place * 8..24 + place * 8].copy_from_slice(&value.to_le_bytes());
    }
    let crc = crc32c::crc32c(&header[..60]);
    header[60..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// The end of a log that is being written.
pub(crate) struct LogWriter {
    dir: PathBuf,
    segment_bytes: u64,
    file: File,
    path: PathBuf,
    number: u64,
    offset: u64,
    /// What is on disk: generation, store id, last sequence number, digest, frames.
    pub at: Mark,
    mark: Option<MarkFile>,
    /// Bytes of all earlier segments.
    pub earlier_bytes: u64,
    /// The payloads written since a compaction began: what the log it writes lacks.
    pub tail: Option<Vec<TailPayload>>,
}

/// A payload that was written while a compaction is at work.
pub(crate) struct TailPayload {
    /// The sequence number of its first operation.
    pub first_seq: u64,
    /// As [`Frame::payload`].
    pub bytes: Vec<u8>,
}

impl LogWriter {
    /// Starts segment `number` of a log; with `mark`, each commit is recorded there.
    pub(crate) fn create(
        dir: &Path,
        at: Mark,
        number: u64,
        segment_bytes: u64,
        mark: Option<MarkFile>,
    ) -> Result<Self> {
        let path = segment_path(dir, at.generation, number);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(StoreError::io("create", &path))?;
        file.write_all_at(&segment_header(&at, number), 0)
            .map_err(StoreError::io("write", &path))?;
        file.sync_all().map_err(StoreError::io("sync", &path))?;
        sync_dir(dir)?;
        Ok(Self {
            dir: dir.into(),
            segment_bytes,
            file,
            path,
            number,
            offset: SEGMENT_HEADER as u64,
            at,
            mark,
            earlier_bytes: 0,
            tail: None,
        })
    }

    /// Goes on at the end that [`replay`] found. What lies beyond the mark is written once
    /// more and synced: after a failed sync the kernel may believe it clean although it never
    /// reached the disk, and no acknowledged frame may stand behind such a hole.
    pub(crate) fn resume(end: LogEnd, segment_bytes: u64) -> Result<Self> {
        let path = end.path;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(StoreError::io("open", &path))?;
        let length = file
            .metadata()
            .map_err(StoreError::io("read", &path))?
            .len();
        if length > end.offset {
            file.set_len(end.offset)
                .map_err(StoreError::io("truncate", &path))?;
        }
        let mut at = end.unsure_from;
        let mut piece = vec![0; 1 << 20];
        while at < end.offset {
            let size = piece.len().min((end.offset - at) as usize);
            file.read_exact_at(&mut piece[..size], at)
                .map_err(StoreError::io("read", &path))?;
            file.write_all_at(&piece[..size], at)
                .map_err(StoreError::io("write", &path))?;
            at += size as u64;
        }
        if length > end.offset || end.unsure_from < end.offset {
            file.sync_all().map_err(StoreError::io("sync", &path))?;
            // If it was the sync of a new segment that failed, its name is not on the disk either.
            sync_parent(&path)?;
        }
        Ok(Self {
            dir: path.parent().map(Path::to_path_buf).unwrap_or_default(),
            segment_bytes,
            file,
            path,
            number: end.number,
            offset: end.offset,
            at: end.at,
            mark: None,
            earlier_bytes: end.earlier_bytes,
            tail: None,
        })
    }

    /// From here on, commits are recorded in this mark.
    pub(crate) fn set_mark(&mut self, mark: MarkFile) {
        self.mark = Some(mark);
    }

    /// The last segment's file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The number of the last segment, and where it ends.
    pub(crate) fn position(&self) -> (u64, u64) {
        (self.number, self.offset)
    }

    /// Bytes of the log.
    pub(crate) fn bytes(&self) -> u64 {
        self.earlier_bytes + self.offset
    }

    /// Writes the frames, syncs them, and moves the mark. After an error the end of the log
    /// is unknown: the caller must not write again before a new [`replay`].
    pub(crate) fn commit(&mut self, payloads: &mut [Payload]) -> Result<()> {
        #[cfg(feature = "planted")]
        if let Some(done) = self.planted_commit(payloads) {
            return done;
        }
        for payload in payloads.iter_mut() {
            self.write_frame(payload)?;
        }
        self.file
            .sync_data()
            .map_err(StoreError::io("sync", &self.path))?;
        match &mut self.mark {
            Some(mark) => mark.write(&self.at),
            None => Ok(()),
        }
    }

    /// Writes one frame, unsynced: a following [`Self::commit`] vouches for it.
    pub(crate) fn write_frame(&mut self, payload: &mut Payload) -> Result<()> {
        if self.offset > SEGMENT_HEADER as u64
            && self.offset + payload.len() as u64 > self.segment_bytes
        {
            self.roll()?;
        }
        let (frame, digest) = payload.seal(self.at.digest);
        self.file
            .write_all_at(frame, self.offset)
            .map_err(StoreError::io("write", &self.path))?;
        self.offset += frame.len() as u64;
        if let Some(tail) = &mut self.tail {
            tail.push(TailPayload {
                first_seq: self.at.seq + 1,
                bytes: frame[FRAME_HEADER..].to_vec(),
            });
        }
        self.at.digest = digest;
        self.at.seq = payload.next_seq() - 1;
        self.at.frames += 1;
        Ok(())
    }

    fn roll(&mut self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(StoreError::io("sync", &self.path))?;
        let earlier_bytes = self.bytes();
        let (mark, tail) = (self.mark.take(), self.tail.take());
        let number = self.number + 1;
        *self = Self::create(&self.dir, self.at, number, self.segment_bytes, mark)?;
        (self.earlier_bytes, self.tail) = (earlier_bytes, tail);
        Ok(())
    }

    /// Writes both slots of the mark and syncs it: the close of a log.
    pub(crate) fn sync_mark(&mut self) -> Result<()> {
        if let Some(mark) = &mut self.mark {
            mark.write(&self.at)?;
            mark.write(&self.at)?;
            mark.sync()?;
        }
        Ok(())
    }
}

/// Where a log ends.
#[derive(Clone, Debug)]
pub(crate) struct LogEnd {
    /// The last segment.
    pub path: PathBuf,
    /// Its number.
    pub number: u64,
    /// The end of its last whole frame.
    pub offset: u64,
    /// From here on the mark does not vouch that the last segment is synced.
    pub unsure_from: u64,
    /// The chain at the end.
    pub at: Mark,
    /// Bytes of the earlier segments.
    pub earlier_bytes: u64,
    /// Bytes of a torn tail that nobody was promised.
    pub torn_bytes: u64,
    /// What was wrong, where damage was passed over ([`Strictness::Repair`]).
    pub damage: Option<String>,
}

impl LogEnd {
    /// Before the first byte of a log's first segment.
    fn before(path: &Path, number: u64) -> Self {
        Self {
            path: path.into(),
            number,
            offset: 0,
            unsure_from: 0,
            at: Mark::default(),
            earlier_bytes: 0,
            torn_bytes: 0,
            damage: None,
        }
    }
}

/// What a replay does at damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// Damage to what the mark vouches for is an error.
    Exact,
    /// The log ends before the damage.
    Repair,
}

/// One whole frame, checked.
pub(crate) struct Frame<'a> {
    /// The sequence number of its first operation.
    pub first_seq: u64,
    /// How many sequence numbers it takes; 0 in a compaction's base.
    pub count: u32,
    /// The chain digest before it.
    pub previous: u64,
    /// Its records ([`decode_payload`]).
    pub payload: &'a [u8],
    /// Its segment.
    pub path: &'a Path,
    /// Where its payload stands there.
    pub payload_offset: u64,
}

impl Frame<'_> {
    /// Gives each record to `visit`; damage is named by its place in the segment.
    pub(crate) fn visit<'s>(
        &'s self,
        visit: impl FnMut(Record<'s>) -> Result<(), String>,
    ) -> Result<()> {
        decode_payload(self.payload, visit).map_err(|(at, reason)| {
            StoreError::corrupt(self.path, self.payload_offset + at as u64, reason)
        })
    }
}

/// Reads the log of one generation from its beginning, checks every frame, and gives each to
/// `visit`. Returns where it ends. With `until_frames` it reads that many and no more.
///
/// A damaged frame that the mark vouches for is [`StoreError::Corrupt`]; one beyond the mark
/// in the last segment is a torn tail, and the log ends before it. A log that ends before the
/// mark is [`StoreError::RolledBack`].
pub(crate) fn replay(
    store: &Path,
    dir: &Path,
    generation: u64,
    mark: Option<&Mark>,
    strictness: Strictness,
    until_frames: Option<u64>,
    mut visit: impl FnMut(&Frame<'_>) -> Result<()>,
) -> Result<LogEnd> {
    let segments: Vec<_> = list_segments(dir)?
        .into_iter()
        .filter(|(g, _, _)| *g == generation)
        .collect();
    let Some((_, first_number, first_path)) = segments.first() else {
        return Err(StoreError::corrupt(
            &segment_path(dir, generation, 1),
            0,
            "expected a log segment, got no file",
        ));
    };
    let mut end = LogEnd::before(first_path, *first_number);
    let mut buffer = Vec::new();
    for (place, (_, number, path)) in segments.iter().enumerate() {
        let last = place + 1 == segments.len();
        let expected = place as u64 + 1;
        let damage = if *number != expected {
            Some(Damage {
                path: segment_path(dir, generation, expected),
                offset: 0,
                reason: "expected this segment, got no file".into(),
            })
        } else {
            let context = Context {
                path,
                number: *number,
                generation,
                mark,
                strictness,
                until_frames,
            };
            let file = File::open(path).map_err(StoreError::io("open", path))?;
            let length = file.metadata().map_err(StoreError::io("read", path))?.len();
            let mut input = BufReader::with_capacity(1 << 18, file);
            replay_segment(
                &context,
                &mut input,
                length,
                &mut end,
                &mut buffer,
                &mut visit,
            )?
        };
        if until_frames.is_some_and(|until| end.at.frames >= until) {
            break;
        }
        let Some(damage) = damage else { continue };
        let vouched = mark.is_none_or(|m| m.frames > end.at.frames);
        if strictness == Strictness::Exact && (vouched || !last) {
            return Err(StoreError::corrupt(
                &damage.path,
                damage.offset,
                damage.reason,
            ));
        }
        if vouched || !last {
            end.damage = Some(format!(
                "{} at byte {}: {}",
                damage.path.display(),
                damage.offset,
                damage.reason
            ));
        }
        let length = std::fs::metadata(path).map_or(0, |m| m.len());
        end.torn_bytes = length.saturating_sub(if end.path == *path { end.offset } else { 0 });
        break;
    }
    match mark {
        Some(mark) if mark.frames > end.at.frames && strictness == Strictness::Exact => {
            Err(StoreError::RolledBack {
                path: store.into(),
                expected: mark.seq,
                found: end.at.seq,
            })
        }
        _ => Ok(end),
    }
}

/// [`replay`] of a log that is one segment in memory, without a mark. Whether it is whole.
pub(crate) fn replay_bytes(
    bytes: &[u8],
    mut visit: impl FnMut(&Frame<'_>) -> Result<()>,
) -> Result<bool> {
    let path = Path::new("memory");
    let context = Context {
        until_frames: None,
        path,
        number: 1,
        generation: 1,
        mark: None,
        strictness: Strictness::Exact,
    };
    let (mut end, mut buffer) = (LogEnd::before(path, 1), Vec::new());
    let length = bytes.len() as u64;
    let mut input = bytes;
    let damage = replay_segment(
        &context,
        &mut input,
        length,
        &mut end,
        &mut buffer,
        &mut visit,
    )?;
    Ok(damage.is_none())
}

#[derive(Clone, Copy)]
struct Context<'a> {
    until_frames: Option<u64>,
    path: &'a Path,
    number: u64,
    generation: u64,
    mark: Option<&'a Mark>,
    strictness: Strictness,
}

struct Damage {
    path: PathBuf,
    offset: u64,
    reason: String,
}

/// Reads one segment up to its end or the first damage. Of `input` there are `length` bytes.
fn replay_segment(
    context: &Context<'_>,
    input: &mut impl Read,
    length: u64,
    end: &mut LogEnd,
    buffer: &mut Vec<u8>,
    visit: &mut impl FnMut(&Frame<'_>) -> Result<()>,
) -> Result<Option<Damage>> {
    let path = context.path;
    let damage = |offset: u64, reason: String| {
        Ok(Some(Damage {
            path: path.into(),
            offset,
            reason,
        }))
    };
    let mut header = [0u8; SEGMENT_HEADER];
    if length < SEGMENT_HEADER as u64 {
        return damage(0, format!("expected a segment header, got {length} bytes"));
    }
    input
        .read_exact(&mut header)
        .map_err(StoreError::io("read", path))?;
    if let Err(reason) = check_segment_header(context, end, &header)? {
        return damage(0, reason);
    }
    if end.number != context.number {
        end.earlier_bytes += end.offset;
    }
    end.path = path.into();
    end.number = context.number;
    end.offset = SEGMENT_HEADER as u64;
    // Until a frame of it is known to be on the disk, neither is its header.
    end.unsure_from = 0;
    while end.offset < length && context.until_frames != Some(end.at.frames) {
        let left = length - end.offset;
        let frame = match read_frame(input, left, end, buffer) {
            Ok(frame) => frame,
            Err(FrameError::Io(e)) => return Err(StoreError::io("read", path)(e)),
            Err(FrameError::Damaged(reason)) => return damage(end.offset, reason),
        };
        let digest = frame_digest(buffer, end.at.digest);
        let after = Mark {
            seq: frame.0 + u64::from(frame.1) - 1,
            digest,
            frames: end.at.frames + 1,
            ..end.at
        };
        let marked = context.mark.filter(|m| m.frames == after.frames);
        if let Some(mark) = marked
            && (mark.seq, mark.digest) != (after.seq, after.digest)
        {
            let reason = format!(
                "expected the frame that ends with {} and has digest {:016x}, got {} and {:016x}",
                mark.seq, mark.digest, after.seq, after.digest
            );
            if context.strictness == Strictness::Exact {
                return damage(end.offset, reason);
            }
            // The log itself is whole; it is the mark that is of another one.
            let place = format!("{} at byte {}", path.display(), end.offset);
            end.damage = Some(format!("{place}: {reason}"));
        }
        let frame = Frame {
            first_seq: frame.0,
            count: frame.1,
            previous: end.at.digest,
            payload: &buffer[FRAME_HEADER..],
            path,
            payload_offset: end.offset + FRAME_HEADER as u64,
        };
        match visit(&frame) {
            Err(StoreError::Corrupt { offset, reason, .. })
                if context.strictness == Strictness::Repair =>
            {
                return damage(offset, reason);
            }
            other => other?,
        }
        end.offset += buffer.len() as u64;
        end.at = after;
        if marked.is_some() {
            end.unsure_from = end.offset;
        }
    }
    Ok(None)
}

enum FrameError {
    Io(std::io::Error),
    Damaged(String),
}

/// Reads one frame into `buffer`; gives its first sequence number and count.
fn read_frame(
    input: &mut impl Read,
    left: u64,
    end: &LogEnd,
    buffer: &mut Vec<u8>,
) -> Result<(u64, u32), FrameError> {
    let damaged = |reason: String| Err(FrameError::Damaged(reason));
    if left < (FRAME_HEADER + 4) as u64 {
        return damaged(format!("expected a frame header, got {left} bytes"));
    }
    buffer.resize(FRAME_HEADER, 0);
    input.read_exact(buffer).map_err(FrameError::Io)?;
    let len = u32_at(buffer, 0) as usize;
    if !(4..=PAYLOAD_MAX).contains(&len) || (len + FRAME_HEADER) as u64 > left {
        return damaged(format!(
            "expected a frame of at most {} bytes, got length {len}",
            left - FRAME_HEADER as u64
        ));
    }
    buffer.resize(FRAME_HEADER + len, 0);
    input
        .read_exact(&mut buffer[FRAME_HEADER..])
        .map_err(FrameError::Io)?;
    let (stored, computed) = (u32_at(buffer, 4), frame_crc(buffer));
    #[cfg(feature = "planted")]
    let computed = match planted::is("skip-checksum") {
        true => stored,
        false => computed,
    };
    if stored != computed {
        return damaged(format!(
            "expected checksum {stored:08x}, got {computed:08x}"
        ));
    }
    let (first_seq, previous) = (u64_at(buffer, 8), u64_at(buffer, 16));
    if first_seq != end.at.seq + 1 || previous != end.at.digest {
        return damaged(format!(
            "expected a frame from {} after digest {:016x}, got {first_seq} after {previous:016x}",
            end.at.seq + 1,
            end.at.digest
        ));
    }
    let count = u32_at(buffer, FRAME_HEADER);
    if first_seq.checked_add(u64::from(count)).is_none() {
        return damaged("sequence numbers overflow".into());
    }
    Ok((first_seq, count))
}

/// What [`salvage`] found.
pub(crate) struct Salvaged {
    /// The last frame that was given to the visitor.
    pub at: Mark,
    /// Sequence numbers between the first and the mark's that were not found.
    pub lost: u64,
    /// The places that were gone past, because frames behind them were found.
    pub gaps: Vec<String>,
}

/// The beginning of a log, for [`salvage`]. A base and the operations after it begin with the
/// number that the first segment's header has; where that is damaged, with the first frame's.
pub(crate) fn beginning(dir: &Path, mark: &Mark) -> Result<(u64, u64, Mark)> {
    let path = segment_path(dir, mark.generation, 1);
    let bytes = std::fs::read(&path).map_err(StoreError::io("read", &path))?;
    let digest = genesis_digest(mark.store_id, mark.generation);
    let runs = find_runs(&bytes, SEGMENT_HEADER, 1);
    let mut frames = runs.iter().flatten();
    // Of a first frame that is lost nothing is known but what its header may have said.
    let first_seq = match (segment_digest(&path), frames.next()) {
        (Some(_), _) => u64_at(&bytes, 40),
        (None, Some(found)) if found.previous == digest => found.first_seq,
        _ => 1,
    };
    let at = Mark {
        seq: first_seq.wrapping_sub(1),
        digest,
        frames: 0,
        ..*mark
    };
    Ok((1, SEGMENT_HEADER as u64, at))
}

/// A frame that was found whole, and where.
struct Found {
    offset: usize,
    length: usize,
    first_seq: u64,
    count: u32,
    previous: u64,
    digest: u64,
}

impl Found {
    fn last_seq(&self) -> u64 {
        self.first_seq + u64::from(self.count) - 1
    }

    fn follows(&self, seq: u64, digest: u64) -> bool {
        (self.first_seq, self.previous) == (seq.wrapping_add(1), digest)
    }
}

/// Reads a damaged log as far as it can be believed, from the frame after `from` at a byte of
/// its segment, and gives `visit` every frame that is proven to belong to it: those that the chain
/// leads to without a gap and, with `past_gaps`, the frames behind a gap if the chain leads on
/// from them to the digest that the mark or the next segment's header has. Whatever else lies
/// between two gaps may be anybody's bytes, and is given up.
pub(crate) fn salvage(
    dir: &Path,
    from: (u64, u64, Mark),
    mark: Option<&Mark>,
    past_gaps: bool,
    mut visit: impl FnMut(&Frame<'_>) -> Result<()>,
) -> Result<Salvaged> {
    let (first_number, first_offset, at) = from;
    let mut segments = list_segments(dir)?;
    segments
        .retain(|(generation, number, _)| *generation == at.generation && *number >= first_number);
    let (lost, gaps) = (0, Vec::new());
    let mut salvaged = Salvaged { at, lost, gaps };
    for (place, (_, number, path)) in segments.iter().enumerate() {
        let bytes = std::fs::read(path).map_err(StoreError::io("read", path))?;
        let start = match *number == first_number {
            true => first_offset as usize,
            false => SEGMENT_HEADER,
        };
        let next = segments.get(place + 1).and_then(|s| segment_digest(&s.2));
        for run in find_runs(&bytes, start, salvaged.at.seq.wrapping_add(1)) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let is_next = first.follows(salvaged.at.seq, salvaged.at.digest);
            let ends_right = |digest| mark.is_some_and(|m| m.digest == digest);
            let proven = next == Some(last.digest) || run.iter().any(|f| ends_right(f.digest));
            if !is_next {
                if !proven || first.first_seq <= salvaged.at.seq {
                    continue;
                }
                if !past_gaps {
                    return Ok(salvaged.without(mark));
                }
                salvaged.lost += first.first_seq - salvaged.at.seq - 1;
                let place = format!("{} before byte {}", path.display(), first.offset);
                salvaged.gaps.push(place);
            }
            for found in &run {
                let payload = found.offset + FRAME_HEADER..found.offset + found.length;
                visit(&Frame {
                    first_seq: found.first_seq,
                    count: found.count,
                    previous: found.previous,
                    payload_offset: payload.start as u64,
                    payload: &bytes[payload],
                    path,
                })?;
                (salvaged.at.seq, salvaged.at.digest) = (found.last_seq(), found.digest);
            }
        }
    }
    Ok(salvaged.without(mark))
}

impl Salvaged {
    /// Counts what lacks up to the mark.
    fn without(mut self, mark: Option<&Mark>) -> Self {
        self.lost += mark.map_or(0, |m| m.seq.saturating_sub(self.at.seq));
        self
    }
}

/// The whole frames of a segment from `start` on, those that follow each other together.
fn find_runs(bytes: &[u8], start: usize, least_seq: u64) -> Vec<Vec<Found>> {
    let mut runs: Vec<Vec<Found>> = Vec::new();
    let (mut at, mut unbroken) = (start, false);
    while at + FRAME_HEADER + 4 <= bytes.len() {
        let Some(found) = find_frame(bytes, at, least_seq) else {
            (at, unbroken) = (at + 1, false);
            continue;
        };
        at += found.length;
        match runs.last_mut() {
            Some(run)
                if unbroken
                    && run
                        .last()
                        .is_some_and(|last| found.follows(last.last_seq(), last.digest)) =>
            {
                run.push(found);
            }
            _ => runs.push(vec![found]),
        }
        unbroken = true;
    }
    runs
}

/// The frame at this byte, if there is a whole one that does not begin before `least_seq`.
fn find_frame(bytes: &[u8], at: usize, least_seq: u64) -> Option<Found> {
    let rest = &bytes[at..];
    let len = u32_at(rest, 0) as usize;
    let first_seq = u64_at(rest, 8);
    let plausible = (4..=PAYLOAD_MAX).contains(&len) && first_seq >= least_seq.max(1);
    let frame = rest.get(..FRAME_HEADER + len).filter(|_| plausible)?;
    let count = u32_at(frame, FRAME_HEADER);
    first_seq.checked_add(u64::from(count))?;
    let previous = u64_at(frame, 16);
    (u32_at(frame, 4) == frame_crc(frame)).then(|| Found {
        offset: at,
        length: frame.len(),
        first_seq,
        count,
        previous,
        digest: frame_digest(frame, previous),
    })
}

/// The chain digest that a segment's header begins with, if the header is whole.
fn segment_digest(path: &Path) -> Option<u64> {
    let mut header = [0; SEGMENT_HEADER];
    File::open(path).ok()?.read_exact(&mut header).ok()?;
    let whole =
        header.starts_with(SEGMENT_MAGIC) && u32_at(&header, 60) == crc32c::crc32c(&header[..60]);
    whole.then(|| u64_at(&header, 48))
}

/// Checks a segment's header against the chain so far; the first one starts the chain.
fn check_segment_header(
    context: &Context<'_>,
    end: &mut LogEnd,
    header: &[u8; SEGMENT_HEADER],
) -> Result<Result<(), String>> {
    let crc = u32_at(header, 60);
    if &header[..8] != SEGMENT_MAGIC || crc != crc32c::crc32c(&header[..60]) {
        return Ok(Err(
            "expected a segment header with its checksum, got other bytes".into(),
        ));
    }
    let version = u32_at(header, 8);
    if version != LOG_VERSION {
        return Err(StoreError::Version {
            path: context.path.into(),
            format: "log segment",
            expected: LOG_VERSION,
            got: version,
        });
    }
    let word = |place: usize| u64_at(header, 16 + place * 8);
    let (generation, number, store_id) = (word(0), word(1), word(2));
    let (first_seq, digest) = (word(3), word(4));
    if number == 1 && context.number == 1 {
        end.at = Mark {
            generation,
            store_id,
            seq: first_seq.wrapping_sub(1),
            digest: genesis_digest(store_id, generation),
            frames: 0,
        };
    }
    let store_expected = context.mark.map_or(end.at.store_id, |m| m.store_id);
    let expected = (
        context.generation,
        context.number,
        store_expected,
        end.at.seq.wrapping_add(1),
        end.at.digest,
    );
    let got = (generation, number, store_id, first_seq, digest);
    if expected != got || first_seq == 0 {
        return Ok(Err(format!(
            "expected the segment (generation, number, store, first, digest) {expected:x?}, got {got:x?}"
        )));
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests;
