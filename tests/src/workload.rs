//! The events that the fault suite appends, each a pure function of its numbers, and the
//! plain model they are compared with.

use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity, Sign};
use std::collections::{BTreeMap, BTreeSet};

/// The user that the `forget` duty removes again and again. No thread's events name it.
pub const FORGOTTEN: &str = "to-be-forgotten";

/// Event number `n` of a thread. Each thread has its own users, so that its events apply in
/// its own order whatever the others do; attributes are shared by all.
pub fn event(seed: u64, thread: u64, n: u64) -> Event {
    let mut random = Philox::new(seed ^ thread << 32, n);
    let user = format!("user-{thread}-{}", random.below(7));
    let attribute = format!("attribute {}", random.below(23));
    let polarity = Polarity::ALL[random.below(4) as usize];
    // Some arrive late, some twice in the same millisecond.
    let at = 1_700_000_000_000 + (n as i64 - i64::from(random.below(5))) * 3;
    let mut event = Event::new(&user, &attribute, polarity).at(at);
    if random.below(3) == 0 {
        event.id = Some(format!("id-{n}"));
    }
    event
}

/// Long events of a user that nobody looks at, to fill pages of the disk.
pub fn filling(count: usize, thread: u64, n: u64) -> Vec<Event> {
    let one = |k: usize| {
        let user = format!("filling {thread}");
        let mut event = Event::new(&user, &format!("filling {k}"), Polarity::Like).at(n as i64);
        event.id = Some(format!("{n:0>200}"));
        event
    };
    (0..count).map(one).collect()
}

/// The edges left by a set of events, by the rule of registers.
pub fn edges<'a>(
    events: impl IntoIterator<Item = &'a Event>,
) -> BTreeMap<String, BTreeMap<String, Sign>> {
    let mut registers: BTreeMap<(&str, &str), &Event> = BTreeMap::new();
    for event in events {
        let slot = registers
            .entry((&event.user, &event.attribute))
            .or_insert(event);
        if event.register_cmp(slot, 0).is_gt() {
            *slot = event;
        }
    }
    let mut edges: BTreeMap<String, BTreeMap<String, Sign>> = BTreeMap::new();
    for ((user, attribute), event) in registers {
        if let Some(sign) = event.polarity.sign() {
            edges
                .entry(user.into())
                .or_default()
                .insert(attribute.into(), sign);
        }
    }
    edges
}

/// What was acknowledged, of each thread: the lines "t n" of an acks file.
pub fn acknowledged(acks: &[u8]) -> BTreeMap<u64, BTreeSet<u64>> {
    let mut of_thread: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for line in String::from_utf8_lossy(acks).split_inclusive('\n') {
        let mut words = line
            .strip_suffix('\n')
            .unwrap_or("")
            .split(' ')
            .map(str::parse::<u64>);
        if let (Some(Ok(thread)), Some(Ok(n))) = (words.next(), words.next()) {
            of_thread.entry(thread).or_default().insert(n);
        }
    }
    of_thread
}
