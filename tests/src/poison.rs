//! The row of poison: one event in a hundred that is none, in a stream that must not stop.

use crate::files::in_memory;
use crate::suite::{Plan, case};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Ack, Options, Store, Stream, StreamOptions};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Event `n` of the stream, and whether the store must refuse it.
fn event(seed: u64, n: u64) -> (Event, bool) {
    let mut random = Philox::new(seed, n);
    let (user, attribute) = (random.below(300), random.below(200));
    let polarity = Polarity::ALL[random.below(4) as usize];
    let at = n as i64;
    let mut event = Event::new(
        &format!("user {user}"),
        &format!("attribute {attribute}"),
        polarity,
    )
    .at(at);
    let poison = random.below(100) == 0;
    if poison {
        match random.below(4) {
            0 => event.user = String::new(),
            1 => event.user.push('\u{7}'),
            2 => event.attribute = "a".repeat(257),
            _ => event.attribute.insert(0, '\n'),
        }
    }
    (event, poison)
}

/// The row.
pub fn row(plan: Plan) -> String {
    let folder = in_memory();
    let path = folder.path().join("store");
    let store = Arc::new(Store::open(&path, Options::default()).expect("a store"));
    let options = StreamOptions {
        ack: Ack::Accepted,
        ..StreamOptions::default()
    };
    let stream = Stream::start(store.clone(), options).expect("a stream");
    let mut expected: BTreeMap<(String, String), (i64, Polarity)> = BTreeMap::new();
    let mut poisoned = Vec::new();
    for n in 0..plan.count {
        case();
        let (event, poison) = event(plan.seed, n);
        if poison {
            poisoned.push(n + 1);
        } else {
            let key = (event.user.clone(), event.attribute.clone());
            expected.insert(key, (n as i64, event.polarity));
        }
        stream.send(event).expect("the stream goes on");
    }
    let counts = stream.finish().expect("the stream goes on");
    assert_eq!(counts.rejected, poisoned.len() as u64);
    assert_eq!(
        counts.applied + counts.unchanged + counts.rejected,
        plan.count
    );
    let text = std::fs::read_to_string(path.join("rejected.jsonl")).unwrap_or_default();
    let mut kept = Vec::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(
            line["reason"].as_str().is_some_and(|r| !r.is_empty()),
            "{line}"
        );
        let raw = line["raw"].as_str().expect("what came");
        let number = line["line"].as_u64().expect("a place");
        let (sent, _) = event(plan.seed, number - 1);
        assert_eq!(raw, serde_json::to_string(&sent).expect("JSON"));
        kept.push(number);
    }
    assert_eq!(kept, poisoned, "the places of what was refused");
    let moment = store.snapshot();
    let mut got = BTreeMap::new();
    for user in moment.users() {
        for e in moment.registers(user).expect("a known user") {
            got.insert((e.user, e.attribute), (e.at.unwrap_or(-1), e.polarity));
        }
    }
    assert!(got == expected, "the good events are not all there");
    format!(
        "{} refused, each kept with its place and its reason; the other {} all applied",
        kept.len(),
        plan.count - kept.len() as u64
    )
}
