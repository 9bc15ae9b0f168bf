//! The row of recorded histories: whether registers under concurrent hands are linearizable.
//!
//! A register keeps the greatest event, so it is a max-register, and of those a history is
//! linearizable if and only if (all by the times of calls and returns):
//!
//! 1. a read returns nothing that was not being written before it returned,
//! 2. a read returns no less than any write that had returned before it was called,
//! 3. a read returns no less than any read that had returned before it was called.
//!
//! (Then the order is: by value; writes that no read shows go where their time allows, since
//! a smaller value changes nothing.)

use crate::files::in_memory;
use crate::suite::{Plan, case};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Ack, Options, Store};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

const HANDS: u64 = 8;
/// What each hand does to one register.
const CALLS: u64 = 4;
/// Registers between two meetings of all hands.
const ROUND: u64 = 20;

#[derive(Clone, Copy, Debug)]
struct Call {
    register: u64,
    write: bool,
    /// The time of the event written or read; 0: none.
    value: i64,
    called: u64,
    returned: u64,
}

/// What is wrong with the history of one register.
fn violation(history: &[Call]) -> Option<String> {
    for read in history.iter().filter(|c| !c.write) {
        let written = |c: &&Call| c.write && c.value == read.value && c.called < read.returned;
        if read.value != 0 && history.iter().find(written).is_none() {
            return Some(format!("{read:?} read what nobody had written"));
        }
        let missed = |c: &&Call| c.returned < read.called && c.value > read.value;
        if let Some(missed) = history.iter().find(missed) {
            return Some(format!("{read:?} came after {missed:?}"));
        }
    }
    None
}

/// Does one hand's calls on a register.
fn hand(
    store: &Store,
    clock: &AtomicU64,
    seed: u64,
    register: u64,
    hand: u64,
    calls: &mut Vec<Call>,
) {
    let mut random = Philox::new(seed ^ hand << 40, register);
    let user = format!("user {}", register % 64);
    let attribute = format!("attribute {register}");
    for n in 0..CALLS {
        let write = random.below(2) == 0;
        let now = || clock.fetch_add(1, Ordering::SeqCst);
        let called = now();
        let value = if write {
            // No value twice: the last digits say whose it is.
            let value = i64::from(random.below(100)) * 1_000 + (hand * CALLS + n) as i64 + 1;
            let event = Event::new(&user, &attribute, Polarity::Like).at(value);
            let ack = [Ack::Accepted, Ack::Durable][random.below(2) as usize];
            store.append_with(&[event], ack).expect("appended");
            value
        } else {
            let registers = store.snapshot().registers(&user).unwrap_or_default();
            let held = registers.iter().find(|r| r.attribute == attribute);
            held.and_then(|r| r.at).unwrap_or(0)
        };
        calls.push(Call {
            register,
            write,
            value,
            called,
            returned: now(),
        });
    }
}

/// The row. `count` is in registers, each with a history of its own.
pub fn row(plan: Plan) -> String {
    let folder = in_memory();
    let store = Store::open(folder.path().join("store"), Options::default()).expect("a store");
    let (clock, meeting) = (AtomicU64::new(1), Barrier::new(HANDS as usize));
    let mut calls: Vec<Call> = std::thread::scope(|scope| {
        let hands: Vec<_> = (0..HANDS)
            .map(|number| {
                let (store, clock, meeting) = (&store, &clock, &meeting);
                scope.spawn(move || {
                    let mut calls = Vec::new();
                    for register in 0..plan.count {
                        if register % ROUND == 0 {
                            meeting.wait();
                        }
                        hand(store, clock, plan.seed, register, number, &mut calls);
                    }
                    calls
                })
            })
            .collect();
        let all = hands.into_iter().flat_map(|h| h.join().expect("a hand"));
        all.collect()
    });
    calls.sort_by_key(|c| (c.register, c.called));
    let mut overlapping = 0;
    for history in calls.chunk_by(|a, b| a.register == b.register) {
        case();
        if let Some(wrong) = violation(history) {
            panic!("register {}: {wrong} in {history:#?}", history[0].register);
        }
        let meets = |pair: &[Call]| pair[1].called < pair[0].returned;
        overlapping += u64::from(history.windows(2).any(meets));
    }
    format!(
        "linearizable: {} histories of {} calls by {HANDS} threads; calls overlapped in {overlapping}",
        plan.count,
        HANDS * CALLS
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(write: bool, value: i64, called: u64, returned: u64) -> Call {
        Call {
            register: 0,
            write,
            value,
            called,
            returned,
        }
    }

    #[test]
    fn the_judge_knows_right_histories_from_wrong_ones() {
        let right = [
            call(true, 5, 0, 9),
            call(false, 0, 1, 2),
            call(false, 5, 3, 4),
            call(true, 3, 5, 6),
            call(false, 5, 10, 11),
        ];
        assert_eq!(violation(&right), None);
        let nobody_wrote = [call(false, 5, 0, 1), call(true, 5, 2, 3)];
        assert!(violation(&nobody_wrote).is_some());
        let write_unseen = [call(true, 5, 0, 1), call(false, 0, 2, 3)];
        assert!(violation(&write_unseen).is_some());
        let went_back = [
            call(true, 5, 0, 9),
            call(false, 5, 1, 2),
            call(false, 0, 3, 4),
        ];
        assert!(violation(&went_back).is_some());
    }
}
