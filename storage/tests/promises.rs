//! What the documentation promises of a whole store, beyond what tests/histories.rs says of
//! registers and overlaps: embeddings, the kept maximum, streams, exports, limits.

use simpatico_schema::random::Philox;
use simpatico_schema::{Event, OverlapMode, Polarity, Sign, read_jsonl_event};
use simpatico_storage::graph::{AttributeId, UserId};
use simpatico_storage::sage::{Encoder, EncoderConfig, Relations, embed_all_from_nothing};
use simpatico_storage::{
    Ack, Options, Snapshot, Store, StoreError, Stream, StreamOptions, WhenFull,
};
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

const DIMS: [usize; 4] = [6, 3, 8, 5];

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn open(path: &Path) -> Store {
    Store::open(path, Options::default()).unwrap()
}

fn like(user: &str, attribute: &str) -> Event {
    Event::new(user, attribute, Polarity::Like).at(1)
}

/// A small encoder with random weights, as a weights file has it.
fn encoder_bytes(seed: u64, relations: Relations) -> Vec<u8> {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let [in_dim_attribute, in_dim_user, hidden, out] = DIMS;
    let config = EncoderConfig {
        version: 1,
        in_dim_attribute,
        in_dim_user,
        hidden,
        out,
        relations,
    };
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for name in relations.names() {
        let (a, u) = (in_dim_attribute, in_dim_user);
        for (layer, from, to, rows) in [
            (format!("c1.user__{name}__attr"), u, a, hidden),
            (format!("c1.attr__rev_{name}__user"), a, u, hidden),
            (format!("c2.attr__rev_{name}__user"), hidden, hidden, out),
        ] {
            for (tensor, shape) in [
                ("lin_l.weight", vec![rows, from]),
                ("lin_l.bias", vec![rows]),
                ("lin_r.weight", vec![rows, to]),
            ] {
                let mut random = Philox::new(seed, tensors.len() as u64);
                let count = shape.iter().product();
                let numbers = (0..count).map(|_| random.uniform() - 0.5);
                let bytes = numbers.flat_map(f32::to_le_bytes).collect();
                tensors.push((format!("{layer}.{tensor}"), shape, bytes));
            }
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    let json = serde_json::to_string(&config).unwrap();
    serialize(
        views,
        Some(HashMap::from([("simpatico".to_string(), json)])),
    )
    .unwrap()
}

/// The embeddings of a snapshot's users, computed from its edges and vectors alone.
fn from_nothing(snapshot: &Snapshot, encoder: &Encoder) -> Vec<(String, Vec<u32>)> {
    let users: Vec<String> = snapshot.users().map(str::to_string).collect();
    let attributes: Vec<String> = snapshot.attributes().map(str::to_string).collect();
    let number = |name: &String| attributes.iter().position(|a| a == name).unwrap() as u32;
    let mut edges = Vec::new();
    for (id, user) in users.iter().enumerate() {
        for (attribute, sign) in snapshot.edges(user).unwrap() {
            let attribute = AttributeId(number(&attribute));
            edges.push((UserId(id as u32), attribute, sign));
        }
    }
    let features: Vec<_> = attributes.iter().map(|a| snapshot.feature(a)).collect();
    let learned: Vec<_> = users.iter().map(|u| snapshot.user_feature(u)).collect();
    let all = embed_all_from_nothing(encoder, &features, &learned, &edges).unwrap();
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    users.into_iter().zip(all.into_iter().map(bits)).collect()
}

fn assert_embeddings(store: &Store, encoder: &Encoder, what: &str) {
    let snapshot = store.snapshot();
    let expected = from_nothing(&snapshot, encoder);
    let names: Vec<&str> = expected.iter().map(|(user, _)| user.as_str()).collect();
    let together = snapshot.embeddings(&names, 2).unwrap();
    for ((user, bits), batch) in expected.iter().zip(together) {
        let got = snapshot.embedding(user).unwrap();
        assert_eq!(got.encoder, encoder.digest_hex(), "{what}");
        assert_eq!(got.as_of, snapshot.as_of(), "{what}");
        let got: Vec<u32> = got.vector.into_iter().map(f32::to_bits).collect();
        assert_eq!(&got, bits, "{what}, {user}");
        let batch: Vec<u32> = batch.vector.into_iter().map(f32::to_bits).collect();
        assert_eq!(&batch, bits, "{what}, {user}, many at once");
    }
}

fn random_vector(random: &mut Philox, len: usize) -> Vec<f32> {
    (0..len).map(|_| random.uniform() * 2.0 - 1.0).collect()
}

#[test]
fn embeddings_equal_a_recomputation_to_the_bit_through_random_histories() {
    let dir = temporary();
    for seed in 0..25 {
        let mut random = Philox::new(seed, 9);
        let path = dir.path().join(seed.to_string());
        let relations = [Relations::Separated, Relations::Blind][seed as usize % 2];
        let weights = dir.path().join("weights.safetensors");
        std::fs::write(&weights, encoder_bytes(seed, relations)).unwrap();
        let mut encoder = Encoder::load(&weights).unwrap();
        let mut store = open(&path);
        store.set_encoder(&weights).unwrap();
        for step in 0..60 {
            let what = format!("seed {seed}, step {step}");
            let user = format!("user {}", random.below(7));
            let attribute = format!("attribute {}", random.below(9));
            match random.below(20) {
                0 => {
                    store.close().unwrap();
                    store = open(&path);
                }
                1 => drop(store.forget(&user)),
                2 | 3 => {
                    let vector = random_vector(&mut random, DIMS[0]);
                    store.set_features(&[(attribute, vector)]).unwrap();
                }
                4 => {
                    let vector = random_vector(&mut random, DIMS[1]);
                    store.set_user_features(&[(user, vector)]).unwrap();
                }
                5 if random.below(3) == 0 => {
                    std::fs::write(&weights, encoder_bytes(seed + 1_000 + step, relations))
                        .unwrap();
                    encoder = Encoder::load(&weights).unwrap();
                    assert_eq!(store.set_encoder(&weights).unwrap(), encoder.digest_hex());
                }
                6 if random.below(3) == 0 => drop(store.compact().unwrap()),
                _ => {
                    let polarity = Polarity::ALL[[3, 3, 2, 1, 0][random.below(5) as usize]];
                    let at = i64::from(random.below(30));
                    let event = Event::new(&user, &attribute, polarity).at(at);
                    store.append_with(&[event], Ack::Accepted).unwrap();
                }
            }
            if random.below(4) == 0 {
                assert_embeddings(&store, &encoder, &what);
            }
        }
        assert_embeddings(&store, &encoder, &format!("seed {seed}, end"));
        let report = store.check().unwrap();
        assert!(report.ok() && report.embeddings > 0, "{report:?}");
    }
}

#[test]
fn similar_by_embedding_is_exact_with_ties_by_name() {
    let dir = temporary();
    let weights = dir.path().join("weights.safetensors");
    std::fs::write(&weights, encoder_bytes(3, Relations::Separated)).unwrap();
    let store = open(&dir.path().join("store"));
    store.set_encoder(&weights).unwrap();
    let mut random = Philox::new(4, 0);
    for a in 0..12 {
        let vector = random_vector(&mut random, DIMS[0]);
        store.set_features(&[(format!("a{a}"), vector)]).unwrap();
    }
    let mut events = Vec::new();
    for user in 0..120 {
        for a in 0..12 {
            if random.below(3) == 0 {
                let polarity = [Polarity::Like, Polarity::Dislike][random.below(2) as usize];
                events.push(Event::new(&format!("u{user}"), &format!("a{a}"), polarity).at(1));
            }
        }
    }
    // Twins, who tie in everything but their names.
    events.extend(["zed", "amy", "mia"].map(|twin| like(twin, "a1")));
    store.append(&events).unwrap();
    let snapshot = store.snapshot();
    let users: Vec<String> = snapshot.users().map(str::to_string).collect();
    let vector = |user: &str| snapshot.embedding(user).unwrap().vector;
    let cosine = |a: &[f32], b: &[f32]| {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(x, y)| f64::from(*x) * f64::from(*y))
                .sum()
        };
        let norms = (dot(a, a) * dot(b, b)).sqrt();
        if norms == 0.0 { 0.0 } else { dot(a, b) / norms }
    };
    for user in ["u0", "u77", "amy"] {
        let mine = vector(user);
        let others = users.iter().filter(|other| *other != user);
        let mut expected: Vec<(f64, &str)> = others
            .map(|other| (cosine(&mine, &vector(other)), other.as_str()))
            .collect();
        expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        let got = snapshot.similar_by_embedding(user, 9).unwrap().neighbors;
        assert_eq!(got.len(), 9);
        for (place, neighbor) in got.iter().enumerate() {
            // The sums are in another order, so that equal cosines may differ in the last bits.
            let true_one = expected
                .iter()
                .find(|(_, name)| *name == neighbor.user)
                .unwrap();
            assert!((true_one.0 - neighbor.similarity).abs() < 1e-9, "{user}");
            assert!(
                (expected[place].0 - neighbor.similarity).abs() < 1e-9,
                "{user}"
            );
        }
        assert!(got.windows(2).all(|pair| {
            let [a, b] = pair else { return false };
            a.similarity > b.similarity || (a.similarity == b.similarity && a.user < b.user)
        }));
    }
    let twins = snapshot.similar_by_embedding("mia", 2).unwrap().neighbors;
    let names: Vec<_> = twins.iter().map(|n| n.user.as_str()).collect();
    assert_eq!(names, ["amy", "zed"]);
}

fn maxima(store: &Store) -> [u32; 2] {
    let snapshot = store.snapshot();
    [OverlapMode::Shared, OverlapMode::Agreeing].map(|mode| snapshot.max_overlap(mode))
}

fn counted_maxima(store: &Store) -> [u32; 2] {
    let snapshot = store.snapshot();
    [OverlapMode::Shared, OverlapMode::Agreeing].map(|mode| {
        let mut max = 0;
        snapshot.similar_all(1, mode, 2, |similar| {
            max = max.max(similar.neighbors.first().map_or(0, |n| n.overlap.unwrap()));
        });
        max
    })
}

fn random_events(random: &mut Philox, users: u32, n: u32) -> Vec<Event> {
    let event = |at| {
        let user = format!("user {}", random.below(users));
        let attribute = format!("attribute {}", random.below(60));
        Event::new(&user, &attribute, Polarity::ALL[random.below(4) as usize]).at(at)
    };
    (0..i64::from(n)).map(event).collect()
}

#[test]
fn the_kept_maximum_is_right_after_events_reopening_compaction_and_damage() {
    let dir = temporary();
    let path = dir.path().join("store");
    let file = path.join("maximum");
    let mut random = Philox::new(11, 0);
    let mut store = open(&path);
    // Enough users for the join.
    store
        .append(&random_events(&mut random, 5_000, 60_000))
        .unwrap();
    assert_eq!(maxima(&store), counted_maxima(&store));
    store.close().unwrap();
    let older = std::fs::read(&file).unwrap();
    for round in 0..8 {
        store = open(&path);
        let n = [1, 40, 9_000][round % 3];
        store.append(&random_events(&mut random, 5_000, n)).unwrap();
        if round == 4 {
            store.forget("user 17").unwrap();
            store.compact().unwrap();
        }
        assert_eq!(maxima(&store), counted_maxima(&store), "round {round}");
        store.close().unwrap();
        let whole = std::fs::read(&file).unwrap();
        match round {
            // A bit flipped, a piece lost, an older file, none.
            1 | 5 => {
                let mut bytes = whole.clone();
                let at = random.below(bytes.len() as u32) as usize;
                bytes[at] ^= 1 << random.below(8);
                std::fs::write(&file, bytes).unwrap();
            }
            2 => std::fs::write(&file, &whole[..whole.len() / 2]).unwrap(),
            3 | 6 => std::fs::write(&file, &older).unwrap(),
            7 => std::fs::remove_file(&file).unwrap(),
            _ => {}
        }
    }
    store = open(&path);
    assert_eq!(maxima(&store), counted_maxima(&store));
}

#[test]
fn readers_see_a_long_append_wholly_or_not_at_all_and_do_not_wait_for_it() {
    let dir = temporary();
    let store = open(&dir.path().join("store"));
    store.append(&[like("first", "a")]).unwrap();
    let mut random = Philox::new(12, 0);
    let events = random_events(&mut random, 2_000, 300_000);
    let applied = std::thread::scope(|scope| {
        let writer = scope.spawn(|| store.append(&events).unwrap());
        let mut seen = 0;
        while !writer.is_finished() {
            let snapshot = store.snapshot();
            let as_of = snapshot.as_of();
            assert!(as_of >= seen);
            assert!(as_of == 1 || snapshot.counts().users == 2_001, "{as_of}");
            seen = as_of;
        }
        writer.join().unwrap()
    });
    assert_eq!(store.snapshot().as_of(), 1 + applied.applied);
}

#[test]
fn a_receipt_of_forgetting_names_its_own_operation_while_others_write() {
    let dir = temporary();
    let store = open(&dir.path().join("store"));
    let users: Vec<String> = (0..40).map(|u| format!("gone {u}")).collect();
    let events: Vec<Event> = users.iter().map(|u| like(u, "a")).collect();
    store.append(&events).unwrap();
    let receipts = std::thread::scope(|scope| {
        for writer in 0..3 {
            let store = &store;
            scope.spawn(move || {
                for i in 0..200 {
                    store
                        .append(&[like(&format!("w{writer}"), &format!("b{i}"))])
                        .unwrap();
                }
            });
        }
        users
            .iter()
            .map(|user| store.forget(user).unwrap())
            .collect::<Vec<_>>()
    });
    // Each operation has one number, so that no two receipts share theirs.
    assert!(receipts.windows(2).all(|w| w[0].as_of < w[1].as_of));
    assert_eq!(store.snapshot().as_of(), 40 + 600 + 40);
    assert!(
        receipts
            .iter()
            .all(|r| r.registers == 1 && r.compact_needed)
    );
}

#[test]
fn a_stream_settles_everything_keeps_what_is_no_event_and_says_when_it_is_busy() {
    let dir = temporary();
    let store = Arc::new(open(&dir.path().join("store")));
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = progress.clone();
    let options = StreamOptions {
        capacity: 64,
        batch: 50,
        name: "feed".into(),
        progress: Some(Arc::new(move |counts| seen.lock().unwrap().push(counts))),
        ..StreamOptions::default()
    };
    let stream = Stream::start(store.clone(), options).unwrap();
    std::thread::scope(|scope| {
        for producer in 0..4 {
            let stream = stream.clone();
            scope.spawn(move || {
                for i in 0..500 {
                    let attribute = if i % 100 == 7 {
                        "bad\nname".into()
                    } else {
                        format!("a{i}")
                    };
                    stream
                        .send(like(&format!("p{producer}"), &attribute))
                        .unwrap();
                }
            });
        }
    });
    let counts = stream.finish().unwrap();
    assert_eq!(
        (counts.sent, counts.applied, counts.rejected),
        (2_000, 1_980, 20)
    );
    let progress = progress.lock().unwrap();
    assert_eq!(progress.last().unwrap().applied, 1_980);
    assert!(progress.windows(2).all(|w| w[0].applied <= w[1].applied));
    let rejected = std::fs::read_to_string(store.path().join("rejected.jsonl")).unwrap();
    assert_eq!(rejected.lines().count(), 20);
    for line in rejected.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["file"], "feed");
        assert!(line["reason"].as_str().unwrap().contains("attribute"));
    }

    let options = StreamOptions {
        capacity: 1,
        batch: 1,
        when_full: WhenFull::Busy,
        ..StreamOptions::default()
    };
    let stream = Stream::start(store.clone(), options).unwrap();
    let mut busy = 0;
    let mut sent = 0;
    for i in 0..3_000 {
        match stream.send(like("busy", &format!("c{i}"))) {
            Ok(()) => sent += 1,
            Err(StoreError::Busy { capacity: 1 }) => busy += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(stream.finish().unwrap().applied, sent);
    assert!(busy > 0, "no send met a full queue");
    assert_eq!(store.snapshot().edges("busy").unwrap().len() as u64, sent);
}

#[test]
fn exports_are_read_again() {
    let dir = temporary();
    let store = open(&dir.path().join("store"));
    let mut random = Philox::new(13, 0);
    let mut events = random_events(&mut random, 40, 900);
    let odd = "<a & \"b\"> \\ 'ü'";
    events.push(like(odd, odd));
    store.append(&events).unwrap();
    let snapshot = store.snapshot();

    let mut jsonl = Vec::new();
    let lines = snapshot.export_jsonl(&mut jsonl).unwrap();
    let again: Vec<Event> = jsonl
        .split(|b| *b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| read_jsonl_event(line).unwrap())
        .collect();
    assert_eq!(again.len() as u64, lines);
    let other = open(&dir.path().join("other"));
    other.append(&again).unwrap();
    assert_eq!(other.snapshot().digest(), snapshot.digest());

    let edges = snapshot.counts().edges as usize;
    let mut graphml = Vec::new();
    assert_eq!(
        snapshot.export_graphml(&mut graphml).unwrap() as usize,
        edges
    );
    let graphml = String::from_utf8(graphml).unwrap();
    let nodes = (snapshot.counts().users + snapshot.counts().attributes) as usize;
    assert_eq!(graphml.matches("<node ").count(), nodes);
    assert_eq!(graphml.matches("<edge ").count(), edges);
    assert_balanced_xml(&graphml);
    assert!(graphml.contains("&lt;a &amp; "), "names are escaped");

    let mut dot = Vec::new();
    assert_eq!(snapshot.export_dot(&mut dot).unwrap() as usize, edges);
    let dot = String::from_utf8(dot).unwrap();
    assert_eq!(dot.matches(" -- ").count(), edges);
    assert!(dot.starts_with("graph ") && dot.trim_end().ends_with('}'));
    // Outside of escapes, quotes come in pairs on every line.
    for line in dot.lines() {
        let bare = line.replace("\\\\", "").replace("\\\"", "");
        assert!(bare.matches('"').count().is_multiple_of(2), "{line}");
    }

    let graph = snapshot.to_petgraph();
    assert_eq!((graph.node_count(), graph.edge_count()), (nodes, edges));
    let likes = graph.edge_weights().filter(|sign| **sign == Sign::Like);
    assert_eq!(likes.count() as u64, store.stats().unwrap().registers.likes);
}

/// Every tag that is opened is closed, in order, and no bare `<` or `&` is in a text.
fn assert_balanced_xml(text: &str) {
    let mut open = Vec::new();
    for piece in text.split('<').skip(1) {
        let (tag, after) = piece.split_once('>').expect("a tag ends");
        assert!(!after.contains('>') && !after.replace("&amp;", "").contains("& "));
        let name = tag
            .trim_start_matches('/')
            .split([' ', '/'])
            .next()
            .unwrap();
        match tag.as_bytes() {
            [b'?', ..] | [.., b'/'] => {}
            [b'/', ..] => assert_eq!(open.pop().as_deref(), Some(name)),
            _ => open.push(name.to_string()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn names_at_their_limits_are_taken_and_beyond_them_refused_one_by_one() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = open(&path);
    let longest = "é".repeat(128);
    let good = ["x", "é", &longest, " ", "~", "\u{1f600}", "a\u{a0}b"];
    let too_long = format!("{longest}x");
    let bad = ["", &too_long, "a\nb", "\u{0}", "\u{7f}", "\u{85}", "tab\t"];
    let mut events = Vec::new();
    for name in good.iter().chain(&bad) {
        events.push(like(name, "attribute"));
        events.push(like("user", name));
    }
    let receipt = store.append(&events).unwrap();
    assert_eq!(receipt.applied, 2 * good.len() as u64);
    let places: Vec<usize> = receipt.rejected.iter().map(|r| r.0).collect();
    assert_eq!(
        places,
        (2 * good.len()..2 * (good.len() + bad.len())).collect::<Vec<_>>()
    );
    assert!(
        receipt
            .rejected
            .iter()
            .all(|(_, reason)| !reason.is_empty())
    );
    let digest = store.snapshot().digest();
    store.close().unwrap();
    let store = open(&path);
    assert_eq!(store.snapshot().digest(), digest);
    for name in good {
        assert_eq!(store.snapshot().edges(name).unwrap().len(), 1, "{name:?}");
    }
}

#[test]
fn a_time_far_in_the_future_is_clamped_and_cannot_win_for_ever() {
    let dir = temporary();
    let options = Options {
        future_max_ms: 20,
        ..Options::default()
    };
    let store = Store::open(dir.path().join("store"), options).unwrap();
    let say = |polarity, at| Event::new("ada", "wood", polarity).at(at);
    store.append(&[say(Polarity::Like, i64::MAX)]).unwrap();
    let held = store.snapshot().registers("ada").unwrap()[0].at.unwrap();
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let now = now.as_millis() as i64;
    assert!(held <= now + 20, "{held} {now}");
    std::thread::sleep(std::time::Duration::from_millis(40));
    let receipt = store
        .append(&[Event::new("ada", "wood", Polarity::Dislike)])
        .unwrap();
    assert_eq!(receipt.applied, 1);
    let snapshot = store.snapshot();
    assert_eq!(
        snapshot.registers("ada").unwrap()[0].polarity,
        Polarity::Dislike
    );
    // And the far past is taken as it is.
    store.append(&[say(Polarity::Like, i64::MIN)]).unwrap();
    assert_eq!(store.snapshot().digest(), snapshot.digest());
}

#[test]
fn a_second_opener_is_refused_and_told_who_owns_the_store() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = open(&path);
    let Err(refused) = Store::open(&path, Options::default()) else {
        panic!("opened twice");
    };
    assert!(matches!(refused, StoreError::Locked { .. }));
    let text = refused.to_string();
    assert!(text.contains(&std::process::id().to_string()), "{text}");
    drop(store);
    open(&path);
}

#[test]
fn another_version_of_a_format_is_named_with_what_was_expected() {
    let dir = temporary();
    let path = dir.path().join("store");
    let store = open(&path);
    store.append(&[like("ada", "wood")]).unwrap();
    let exported = dir.path().join("snapshot");
    store.export_snapshot(&exported).unwrap();
    store.close().unwrap();

    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&exported)
        .unwrap();
    file.write_all_at(&7u32.to_le_bytes(), 8).unwrap();
    let Err(error) = Store::restore(&exported, &dir.path().join("restored")) else {
        panic!("restored an unknown version");
    };
    assert!(
        matches!(
            error,
            StoreError::Version {
                expected: 1,
                got: 7,
                ..
            }
        ),
        "{error}"
    );

    let segment = std::fs::read_dir(path.join("log"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[8..12].copy_from_slice(&0u32.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&segment, bytes).unwrap();
    let Err(error) = Store::open(&path, Options::default()) else {
        panic!("opened an unknown version");
    };
    assert!(
        matches!(
            error,
            StoreError::Version {
                expected: 1,
                got: 0,
                ..
            }
        ),
        "{error}"
    );
    let text = error.to_string();
    assert!(
        text.contains(".log") && text.contains('1') && text.contains('0'),
        "{text}"
    );
}
