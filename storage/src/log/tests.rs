//! The log byte by byte, as FORMAT.md has it.

use super::*;
use crate::mark;
use simpatico_schema::random::Philox;

fn event(user: u32, attribute: u32, at: i64, id: &str) -> EventRecord<'_> {
    EventRecord {
        user,
        attribute,
        polarity: Polarity::Like,
        at,
        id,
    }
}

fn decoded(payload: &[u8]) -> Result<Vec<Record<'_>>, (usize, String)> {
    let mut all = Vec::new();
    decode_payload(payload, |record| {
        all.push(record);
        Ok(())
    })?;
    Ok(all)
}

fn pair<'a>(caption: &str) -> PairRecord<'a> {
    PairRecord {
        caption: Cow::Owned(caption.to_string()),
        chosen: "a lamp".into(),
        rejected: "a tree".into(),
        source: "feedback".into(),
    }
}

#[test]
fn every_record_comes_back_as_it_was() {
    let mut random = Philox::new(1, 0);
    let edges = [0, 1, 63, 64, 127, 128, 8_191, 1 << 21, u32::MAX >> 3];
    let times = [0, 1, -1, 63, -64, 64, 1 << 40, i64::MAX, i64::MIN];
    for _ in 0..300 {
        let mut payload = Payload::new(1, Vec::new());
        let mut pushed = Vec::new();
        for _ in 0..random.below(12) {
            let number = *random.choose(&edges).unwrap();
            let other = *random.choose(&edges).unwrap();
            let length = random.below(5) as usize;
            let vector = random.normals(length);
            let record = match random.below(14) {
                0 => Record::DefineUser {
                    number,
                    name: "ada 🦊".into(),
                },
                1 => Record::DefineAttribute {
                    number,
                    name: "wood".into(),
                },
                2 => Record::Forget { user: number },
                3 => Record::Feature {
                    attribute: number,
                    vector: vector.into(),
                },
                4 => Record::UserFeature {
                    user: number,
                    vector: vector.into(),
                },
                5 => Record::Encoder {
                    digest: "ab12".into(),
                },
                6 => Record::Pair {
                    user: number,
                    pair: pair("a room"),
                },
                7 => Record::Edit {
                    user: number,
                    edit: StoredEdit {
                        id: "e".into(),
                        caption: "c".into(),
                        instruction: "i".into(),
                        attributes: vec!["a".into(), "b".into()],
                        at: *random.choose(&times).unwrap(),
                        accepted: [None, Some(true), Some(false)][random.below(3) as usize],
                    },
                },
                8 => Record::BaseEnd,
                _ => Record::Event(EventRecord {
                    user: number,
                    attribute: other,
                    polarity: Polarity::ALL[random.below(4) as usize],
                    at: *random.choose(&times).unwrap(),
                    id: ["", "x", "an id"][random.below(3) as usize],
                }),
            };
            payload.push(&record).unwrap();
            pushed.push(record);
        }
        assert_eq!(payload.is_empty(), pushed.is_empty());
        assert_eq!(decoded(payload.body()).unwrap(), pushed);
    }
}

#[test]
fn a_payload_has_the_bytes_that_the_format_says() {
    let mut payload = Payload::new(7, vec![9; 3]);
    payload.push_event(&event(2, 3, 5, "x"));
    payload.push_event(&event(1, 300, 5, ""));
    payload.push(&Record::Forget { user: 4 }).unwrap();
    payload.push_event(&event(1, 0, 4, ""));
    for _ in 0..4 {
        payload.count_one();
    }
    assert_eq!((payload.first_seq, payload.next_seq()), (7, 11));
    let expected = [
        &[0, 0, 0, 0][..],
        &[TAG_EVENTS, 2, 0, 0, 0],
        &[4, 3 << 3 | 4 | 3, 10, 1, b'x'],
        // 300 << 3 | 3 is 2403: the low seven bits are 0x63, and 18 are left.
        &[1, 0x80 | 0x63, 18, 0],
        &[TAG_FORGET, 4],
        &[TAG_EVENTS, 1, 0, 0, 0, 0, 3, 1],
    ];
    assert_eq!(payload.body(), expected.concat());
    let (frame, digest) = payload.seal(0x1122_3344_5566_7788);
    assert_eq!(u32_at(frame, 0) as usize, frame.len() - FRAME_HEADER);
    assert_eq!(u64_at(frame, 8), 7);
    assert_eq!(u64_at(frame, 16), 0x1122_3344_5566_7788);
    assert_eq!(u32_at(frame, 24), 4);
    let crc = crc32c::crc32c(&[&frame[..4], &frame[8..]].concat());
    assert_eq!(u32_at(frame, 4), crc);
    let expected = xxh3_64_with_seed(&frame[4..], 0x1122_3344_5566_7788);
    assert_eq!(digest, expected);
    let buffer = payload.bytes.as_ptr();
    let bytes = payload.into_bytes();
    assert_eq!(bytes.as_ptr(), buffer);
    // What the first frame of a log is chained to.
    let first = xxh3_64_with_seed(&[3, 0, 0, 0, 0, 0, 0, 0], 77);
    assert_eq!(genesis_digest(77, 3), first);
}

#[test]
fn a_name_without_a_folder_is_synced_in_the_folder_at_hand() {
    sync_parent(Path::new("Cargo.toml")).unwrap();
    let missing = sync_parent(Path::new("no folder/file")).unwrap_err();
    assert!(matches!(missing, StoreError::Io { .. }));
}

#[test]
fn numbers_keep_their_value_at_every_width() {
    let mut numbers = vec![0, u64::MAX];
    for shift in 0..64 {
        numbers.extend([1 << shift, (1 << shift) - 1]);
    }
    for number in numbers {
        let mut bytes = Vec::new();
        put_varint(&mut bytes, number);
        let width = (64 - number.leading_zeros()).div_ceil(7).max(1);
        assert_eq!(bytes.len(), width as usize, "{number}");
        bytes.push(0xff);
        let mut cursor = Cursor::new(&bytes);
        assert_eq!(cursor.varint(), Ok(number));
        assert_eq!(cursor.rest(), [0xff]);
        for signed in [number as i64, (number as i64).wrapping_neg()] {
            assert_eq!(unzigzag(zigzag(signed)), signed);
        }
    }
    assert_eq!([0, -1, 1, -2, 2].map(zigzag), [0, 1, 2, 3, 4]);
    assert!(Cursor::new(&[0x80; 10]).varint().is_err());
    assert!(Cursor::new(&[0x80; 3]).varint().is_err());
    let mut cursor = Cursor::new(&[1, 2, 3]);
    assert_eq!(cursor.take(2), Ok(&[1, 2][..]));
    assert!(cursor.take(2).is_err());
    assert!(cursor.take(usize::MAX).is_err());
    assert_eq!(cursor.take(1), Ok(&[3][..]));
    assert_eq!(cursor.take(0), Ok(&[][..]));
    assert!(cursor.byte().is_err());
}

#[test]
fn a_payload_closes_at_its_limit_and_refuses_a_record_beyond_its_own() {
    let mut payload = Payload::new(1, Vec::new());
    let id = "x".repeat(250);
    while payload.len() + 300 < PAYLOAD_FULL {
        payload.push_event(&event(1, 1, 1, &id));
    }
    assert!(!payload.is_full());
    while payload.len() < PAYLOAD_FULL {
        assert!(!payload.is_full());
        payload.push_event(&event(1, 1, 1, ""));
    }
    assert!(payload.is_full());

    let mut payload = Payload::new(1, Vec::new());
    payload.push(&Record::Forget { user: 1 }).unwrap();
    let before = payload.len();
    let long = Record::Pair {
        user: 1,
        pair: pair(&"x".repeat(RECORD_MAX)),
    };
    let refused = payload.push(&long);
    assert!(matches!(refused, Err(StoreError::Invalid { .. })));
    assert_eq!(payload.len(), before);
    let rest = pair("").chosen.len() + pair("").rejected.len() + pair("").source.len();
    // The tag, the user, the lengths of four texts: of the caption five bytes.
    let most = RECORD_MAX - rest - 1 - 1 - 3 - 5;
    let caption = "x".repeat(most);
    let fits = Record::Pair {
        user: 1,
        pair: pair(&caption),
    };
    payload.push(&fits).unwrap();
    assert_eq!(payload.len(), before + RECORD_MAX);
    let more = Record::Pair {
        user: 1,
        pair: pair(&format!("{caption}y")),
    };
    assert!(payload.push(&more).is_err());
    assert_eq!(decoded(payload.body()).unwrap().len(), 2);

    // As many strings as fit: 24 bytes each in memory.
    let mut payload = Payload::new(1, Vec::new());
    let edit = StoredEdit {
        id: "e".into(),
        caption: "".into(),
        instruction: "".into(),
        attributes: vec!["".into(); RECORD_MAX - 20],
        at: 0,
        accepted: None,
    };
    payload.push(&Record::Edit { user: 1, edit }).unwrap();
    assert_eq!(decoded(payload.body()).unwrap().len(), 1);
}

#[test]
fn what_no_writer_writes_is_refused_with_its_place() {
    let run = |events: &[u8]| [&[0, 0, 0, 0, TAG_EVENTS][..], events].concat();
    let refused = |payload: &[u8]| decoded(payload).unwrap_err();
    let whole = run(&[1, 0, 0, 0, 4, 31, 10, 1, b'x']);
    assert_eq!(
        decoded(&whole).unwrap(),
        [Record::Event(event(2, 3, 5, "x"))]
    );
    for cut in 5..whole.len() {
        refused(&whole[..cut]);
    }
    // A user below 0, an attribute beyond 32 bits, an id that is no UTF-8, an unknown tag.
    refused(&run(&[1, 0, 0, 0, 1, 31, 10, 1, b'x']));
    refused(&run(&[1, 0, 0, 0, 4, 0xfb, 0xff, 0xff, 0xff, 0xff, 1, 10]));
    refused(&run(&[1, 0, 0, 0, 4, 31, 10, 1, 0xff]));
    assert_eq!(refused(&[0, 0, 0, 0, TAG_FORGET, 1, 11, 1]).0, 6);
    assert_eq!(refused(&[0, 0, 0, 0, 0]).0, 4);
    // What the reader of records says is passed on, with the record's place.
    let mut payload = Payload::new(1, Vec::new());
    payload.push(&Record::Forget { user: 1 }).unwrap();
    payload.push(&Record::Forget { user: 2 }).unwrap();
    let told = decode_payload(payload.body(), |record| match record {
        Record::Forget { user: 2 } => Err("no".into()),
        _ => Ok(()),
    });
    assert_eq!(told, Err((6, "no".into())));
}

/// A log in a folder, of frames of one forgetting each, and what the frames say.
struct Log {
    dir: tempfile::TempDir,
    writer: LogWriter,
}

impl Log {
    fn new(segment_bytes: u64) -> Self {
        Self::after(0, segment_bytes)
    }

    /// A log that begins after this sequence number, as one that a compaction wrote.
    fn after(seq: u64, segment_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = Mark {
            generation: 3,
            store_id: 77,
            seq,
            digest: genesis_digest(77, 3),
            frames: 0,
        };
        let writer = LogWriter::create(dir.path(), at, 1, segment_bytes, None).unwrap();
        Self { dir, writer }
    }

    fn commit(&mut self, users: &[u32]) {
        let mut payloads: Vec<Payload> = Vec::new();
        for user in users {
            let first = payloads
                .last()
                .map_or(self.writer.at.seq + 1, Payload::next_seq);
            let mut payload = Payload::new(first, Vec::new());
            payload.push(&Record::Forget { user: *user }).unwrap();
            payload.count_one();
            payloads.push(payload);
        }
        self.writer.commit(&mut payloads).unwrap();
    }

    fn read(
        &self,
        mark: Option<&Mark>,
        strictness: Strictness,
        until: Option<u64>,
    ) -> Result<(Vec<u32>, LogEnd)> {
        let mut users = Vec::new();
        let dir = self.dir.path();
        let end = replay(dir, dir, 3, mark, strictness, until, |frame| {
            assert_eq!(frame.first_seq, users.len() as u64 + 1);
            assert_eq!(frame.count, 1);
            frame.visit(|record| {
                if let Record::Forget { user } = record {
                    users.push(user);
                }
                Ok(())
            })
        })?;
        Ok((users, end))
    }

    fn salvaged(
        &self,
        from: (u64, u64, Mark),
        mark: Option<&Mark>,
        past_gaps: bool,
    ) -> (Vec<u32>, u64, usize) {
        let mut users = Vec::new();
        let found = salvage(self.dir.path(), from, mark, past_gaps, |frame| {
            frame.visit(|record| {
                if let Record::Forget { user } = record {
                    users.push(user);
                }
                Ok(())
            })
        });
        let found = found.unwrap();
        (users, found.lost, found.gaps.len())
    }

    fn segments(&self) -> Vec<(u64, u64, PathBuf)> {
        list_segments(self.dir.path()).unwrap()
    }

    fn lengths(&self) -> Vec<u64> {
        let length = |s: &(u64, u64, PathBuf)| std::fs::metadata(&s.2).unwrap().len();
        self.segments().iter().map(length).collect()
    }
}

#[test]
fn a_log_goes_on_in_segments_and_is_read_back_in_order() {
    // A frame of one forgetting is 30 bytes: three to a segment.
    let mut log = Log::new(64 + 95);
    log.commit(&[1, 2]);
    log.commit(&[3]);
    assert_eq!(log.lengths(), [64 + 90]);
    log.commit(&[4, 5, 6, 7, 8]);
    assert_eq!(log.lengths(), [64 + 90, 64 + 90, 64 + 60]);
    assert_eq!(log.writer.position(), (3, 64 + 60));
    assert_eq!(log.writer.bytes(), 3 * 64 + 240);
    assert_eq!((log.writer.at.seq, log.writer.at.frames), (8, 8));
    let names: Vec<(u64, u64)> = log.segments().iter().map(|s| (s.0, s.1)).collect();
    assert_eq!(names, [(3, 1), (3, 2), (3, 3)]);

    let (users, end) = log.read(None, Strictness::Exact, None).unwrap();
    assert_eq!(users, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!((end.number, end.offset, end.torn_bytes), (3, 64 + 60, 0));
    assert_eq!(end.earlier_bytes, 2 * (64 + 90));
    assert_eq!(end.at, log.writer.at);
    assert_eq!(end.damage, None);
    for until in 1..8 {
        let (users, end) = log.read(None, Strictness::Exact, Some(until)).unwrap();
        assert_eq!(users.len() as u64, until);
        assert_eq!(end.at.frames, until);
    }
    // With a mark, what it vouches for is sure, and no more.
    let sure = log.read(None, Strictness::Exact, Some(7)).unwrap().1.at;
    let (_, end) = log.read(Some(&sure), Strictness::Exact, None).unwrap();
    assert_eq!((end.unsure_from, end.offset), (64 + 30, 64 + 60));

    // A writer that goes on from there writes what it would have written.
    let bytes_before = std::fs::read(&log.segments()[2].2).unwrap();
    log.writer = LogWriter::resume(end, 64 + 95).unwrap();
    assert_eq!(std::fs::read(&log.segments()[2].2).unwrap(), bytes_before);
    assert_eq!(log.writer.bytes(), 3 * 64 + 240);
    log.commit(&[9, 10]);
    assert_eq!(log.lengths(), [64 + 90, 64 + 90, 64 + 90, 64 + 30]);
    let (users, _) = log.read(None, Strictness::Exact, None).unwrap();
    assert_eq!(users.len(), 10);
}

#[test]
fn a_tail_keeps_each_payload_and_the_number_of_its_first_record() {
    let mut log = Log::new(64 + 95);
    log.commit(&[1, 2]);
    log.writer.tail = Some(Vec::new());
    // Into the next segment, too.
    log.commit(&[3, 4, 5]);
    log.commit(&[6]);
    let tail = log.writer.tail.take().unwrap();
    let firsts: Vec<u64> = tail.iter().map(|payload| payload.first_seq).collect();
    assert_eq!(firsts, [3, 4, 5, 6]);
    assert!(
        tail.iter()
            .all(|payload| payload.bytes.len() == 30 - FRAME_HEADER)
    );
}

#[test]
fn a_commit_moves_the_mark_and_a_close_writes_both_its_slots() {
    let mut log = Log::new(1 << 20);
    let path = log.dir.path().join("mark");
    log.writer
        .set_mark(MarkFile::replace(&path, &log.writer.at).unwrap());
    log.commit(&[1, 2, 3]);
    assert_eq!(mark::read(&path).unwrap(), Some(log.writer.at));
    log.writer.sync_mark().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes[..64], bytes[4096..4096 + 64]);
}

#[test]
fn a_torn_tail_ends_the_log_and_damage_before_it_is_named() {
    let mut log = Log::new(64 + 95);
    log.commit(&[1, 2, 3, 4, 5]);
    let segments = log.segments();
    let (first, last) = (&segments[0].2, &segments[1].2);
    let (whole_first, whole) = (std::fs::read(first).unwrap(), std::fs::read(last).unwrap());
    let all = log.writer.at;
    let three = log.read(None, Strictness::Exact, Some(3)).unwrap().1.at;
    for cut in 64..whole.len() {
        std::fs::write(last, &whole[..cut]).unwrap();
        let kept = 3 + (cut - 64) / 30;
        // The mark vouches for three: the rest may be torn.
        let (users, end) = log.read(Some(&three), Strictness::Exact, None).unwrap();
        assert_eq!(users.len(), kept, "cut at {cut}");
        assert_eq!(end.torn_bytes, (cut - 64) as u64 % 30);
        assert_eq!(end.damage, None);
        let writer = LogWriter::resume(end, 1 << 20).unwrap();
        assert_eq!(writer.at.frames as usize, kept);
        let length = std::fs::metadata(last).unwrap().len();
        assert_eq!(length, 64 + 30 * (kept as u64 - 3));
        // It vouches for all five: their loss is named, and can be passed over.
        std::fs::write(last, &whole[..cut]).unwrap();
        let error = log.read(Some(&all), Strictness::Exact, None).unwrap_err();
        match error {
            StoreError::Corrupt { offset, .. } => {
                assert_eq!(offset as usize, cut - (cut - 64) % 30)
            }
            StoreError::RolledBack {
                expected, found, ..
            } => {
                assert_eq!((expected, found), (5, kept as u64));
                assert_eq!((cut - 64) % 30, 0);
            }
            other => panic!("{other}"),
        }
        let (users, end) = log.read(Some(&all), Strictness::Repair, None).unwrap();
        assert_eq!(users.len(), kept);
        assert_eq!(end.damage.is_some(), (cut - 64) % 30 != 0, "cut at {cut}");
    }
    // Before the last segment nothing may be damaged, whatever the mark says.
    std::fs::write(last, &whole).unwrap();
    std::fs::write(first, &whole_first[..64 + 75]).unwrap();
    let error = log.read(Some(&three), Strictness::Exact, None).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { offset, .. } if offset == 64 + 60));
    let one = log.read(None, Strictness::Repair, Some(1)).unwrap().1.at;
    let error = log.read(Some(&one), Strictness::Exact, None).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }));
    let (users, end) = log.read(Some(&one), Strictness::Repair, None).unwrap();
    assert_eq!(users, [1, 2]);
    assert!(end.damage.unwrap().contains("at byte 124"));
    assert_eq!(end.torn_bytes, 15);
    // A segment that is missing is named by the place it should have.
    std::fs::remove_file(first).unwrap();
    let error = log.read(Some(&three), Strictness::Exact, None).unwrap_err();
    let StoreError::Corrupt { file, offset, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((file.as_path(), offset), (first.as_path(), 0));
    std::fs::remove_file(last).unwrap();
    assert!(log.read(None, Strictness::Exact, None).is_err());
}

/// Makes a changed header's or frame's checksum right again.
fn reseal(segment: &mut [u8]) {
    let crc = crc32c::crc32c(&segment[..60]);
    segment[60..64].copy_from_slice(&crc.to_le_bytes());
    let crc = crc32c::crc32c(&[&segment[64..68], &segment[72..94]].concat());
    segment[68..72].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn a_header_or_frame_of_another_log_or_place_is_no_part_of_this_one() {
    let mut log = Log::new(64 + 32);
    log.commit(&[1, 2]);
    let second = log.segments()[1].2.clone();
    let whole = std::fs::read(&second).unwrap();
    let one = log.read(None, Strictness::Exact, Some(1)).unwrap().1.at;
    // Magic, version, generation, number, store, first, digest; then the frame's own.
    let words = [0, 8, 16, 24, 32, 40, 48, 64, 72, 80];
    for at in words {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        reseal(&mut bytes);
        std::fs::write(&second, &bytes).unwrap();
        let error = log.read(Some(&log.writer.at), Strictness::Exact, None);
        match error {
            Err(StoreError::Version { got: 0, .. }) if at == 8 => {}
            Err(StoreError::Corrupt { offset, .. }) if at != 8 => {
                assert_eq!(offset, if at < 64 { 0 } else { 64 }, "byte {at}");
            }
            other => panic!("byte {at}: {:?}", other.map(|o| o.0)),
        }
        if at >= 72 {
            // Where the mark does not vouch for it, the log ends before it.
            let (users, end) = log.read(Some(&one), Strictness::Exact, None).unwrap();
            assert_eq!((users, end.torn_bytes), (vec![1], 30));
        }
        bytes[60] ^= 1;
        std::fs::write(&second, &bytes).unwrap();
        let error = log.read(Some(&log.writer.at), Strictness::Exact, None);
        assert!(matches!(error, Err(StoreError::Corrupt { offset: 0, .. })));
    }
    // The mark knows the frame it vouches for by its digest and by its number.
    std::fs::write(&second, &whole).unwrap();
    for wrong in [
        Mark {
            digest: 1,
            ..log.writer.at
        },
        Mark {
            seq: 9,
            ..log.writer.at
        },
    ] {
        let error = log.read(Some(&wrong), Strictness::Exact, None);
        assert!(matches!(error, Err(StoreError::Corrupt { offset: 64, .. })));
        let (users, end) = log.read(Some(&wrong), Strictness::Repair, None).unwrap();
        assert_eq!(users, [1, 2]);
        assert!(end.damage.is_some());
    }
}

#[test]
fn what_a_reader_refuses_is_named_and_a_repair_ends_before_it() {
    let mut log = Log::new(1 << 20);
    log.commit(&[1, 2]);
    // A frame that says nothing is one, too.
    let mut nothing = Payload::new(3, Vec::new());
    nothing.count_one();
    log.writer.commit(&mut [nothing]).unwrap();
    assert_eq!(log.lengths(), [64 + 60 + 28]);
    let (users, end) = log.read(None, Strictness::Exact, None).unwrap();
    assert_eq!((users, end.at.seq, end.torn_bytes), (vec![1, 2], 3, 0));
    let refusing = |strictness| {
        let dir = log.dir.path();
        replay(
            dir,
            dir,
            3,
            Some(&log.writer.at),
            strictness,
            None,
            |frame| {
                frame.visit(|record| match record {
                    Record::Forget { user: 2 } => Err("no".into()),
                    _ => Ok(()),
                })
            },
        )
    };
    // The second frame's record: behind its header and its count.
    let place = 64 + 30 + FRAME_HEADER as u64 + 4;
    let error = refusing(Strictness::Exact).err().unwrap();
    assert!(matches!(error, StoreError::Corrupt { offset, .. } if offset == place));
    let end = refusing(Strictness::Repair).unwrap();
    assert_eq!(end.at.frames, 1);
    assert!(end.damage.unwrap().contains(&format!("at byte {place}")));
}

#[test]
fn a_salvage_gives_what_the_chain_proves_and_counts_what_lacks() {
    // Three frames a segment: 1 to 3, 4 to 6, 7 and 8.
    let mut log = Log::new(64 + 95);
    log.commit(&[1, 2, 3, 4, 5, 6, 7, 8]);
    let all = log.writer.at;
    let paths: Vec<PathBuf> = log.segments().into_iter().map(|s| s.2).collect();
    let whole: Vec<Vec<u8>> = paths.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let put = |segment: usize, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole[segment].clone();
        change(&mut bytes);
        std::fs::write(&paths[segment], bytes).unwrap();
    };
    let start = beginning(log.dir.path(), &all).unwrap();
    let none_yet = Mark {
        seq: 0,
        frames: 0,
        digest: genesis_digest(77, 3),
        ..all
    };
    assert_eq!(start, (1, 64, none_yet));
    let salvaged = |mark: Option<&Mark>, past_gaps| log.salvaged(start, mark, past_gaps);
    assert_eq!(
        salvaged(Some(&all), true),
        (vec![1, 2, 3, 4, 5, 6, 7, 8], 0, 0)
    );

    // Frame 5 is damaged: 6 leads to the digest that the next segment begins with.
    let broken = |at: usize| move |bytes: &mut Vec<u8>| bytes[at] ^= 1;
    put(1, &broken(64 + 59));
    assert_eq!(
        salvaged(Some(&all), true),
        (vec![1, 2, 3, 4, 6, 7, 8], 1, 1)
    );
    assert_eq!(salvaged(None, true), (vec![1, 2, 3, 4, 6, 7, 8], 1, 1));
    assert_eq!(salvaged(Some(&all), false), (vec![1, 2, 3, 4], 4, 0));
    // Where that header is not whole, or of something else, it proves nothing.
    put(2, &broken(50));
    assert_eq!(salvaged(Some(&all), true), (vec![1, 2, 3, 4, 7, 8], 2, 1));
    put(2, &|bytes| {
        bytes[0] ^= 1;
        reseal(bytes);
    });
    assert_eq!(salvaged(Some(&all), true), (vec![1, 2, 3, 4, 7, 8], 2, 1));
    put(2, &|_| {});

    // Frame 5 is cut out: what stands side by side does not follow.
    put(1, &|bytes| drop(bytes.drain(64 + 30..64 + 60)));
    assert_eq!(
        salvaged(Some(&all), true),
        (vec![1, 2, 3, 4, 6, 7, 8], 1, 1)
    );
    // Frame 6 is there twice.
    put(1, &|bytes| bytes.extend_from_within(64 + 60..));
    assert_eq!(
        salvaged(Some(&all), true),
        (vec![1, 2, 3, 4, 5, 6, 7, 8], 0, 0)
    );

    // Frame 6 is damaged: 7 and 8 are proven by the mark alone.
    put(1, &broken(64 + 89));
    assert_eq!(
        salvaged(Some(&all), true),
        (vec![1, 2, 3, 4, 5, 7, 8], 1, 1)
    );
    assert_eq!(salvaged(None, true), (vec![1, 2, 3, 4, 5], 0, 0));
    // And 8: nothing proves 7.
    put(2, &broken(64 + 59));
    assert_eq!(salvaged(Some(&all), true), (vec![1, 2, 3, 4, 5], 3, 0));
    put(2, &|_| {});
    // And 4: what lies between two gaps may be anybody's.
    put(1, &|bytes| {
        bytes[64 + 29] ^= 1;
        bytes[64 + 89] ^= 1;
    });
    assert_eq!(salvaged(Some(&all), true), (vec![1, 2, 3, 7, 8], 3, 1));
    put(1, &|_| {});

    // From the middle of a segment on; other generations' segments are no part of it.
    std::fs::copy(&paths[2], segment_path(log.dir.path(), 2, 9)).unwrap();
    let four = log.read(None, Strictness::Exact, Some(4)).unwrap().1.at;
    let from = (2, 64 + 30, four);
    assert_eq!(
        log.salvaged(from, Some(&all), true),
        (vec![5, 6, 7, 8], 0, 0)
    );
}

#[test]
fn a_log_begins_where_its_header_says_or_else_its_first_frame() {
    let mut log = Log::after(40, 1 << 20);
    log.commit(&[1, 2]);
    let path = log.segments()[0].2.clone();
    let whole = std::fs::read(&path).unwrap();
    let begins = |broken: &[usize]| {
        let mut bytes = whole.clone();
        broken.iter().for_each(|at| bytes[*at] ^= 1);
        std::fs::write(&path, bytes).unwrap();
        beginning(log.dir.path(), &log.writer.at).unwrap().2.seq
    };
    let (header, first, second) = (50, 64 + 29, 64 + 59);
    assert_eq!(begins(&[]), 40);
    assert_eq!(begins(&[first, second]), 40);
    assert_eq!(begins(&[header]), 40);
    // Nothing says where the second frame belongs.
    assert_eq!(begins(&[header, first]), 0);
}

#[test]
fn only_names_of_segments_are_segments() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "000002-00000001.log",
        "000001-00000010.log",
        "000001-00000002.log",
        "1-1.txt",
        "a-1.log",
        "1-b.log",
        "11.log",
    ] {
        std::fs::write(dir.path().join(name), b"").unwrap();
    }
    let found = list_segments(dir.path()).unwrap();
    let numbers: Vec<_> = found.iter().map(|s| (s.0, s.1)).collect();
    assert_eq!(numbers, [(1, 2), (1, 10), (2, 1)]);
    assert_eq!(segment_path(dir.path(), 1, 2), found[0].2);
}
