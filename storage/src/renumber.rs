//! Records of one log, taken to a state that gives users and attributes other numbers.
//!
//! A compaction numbers densely anew while events go on under the old numbers; a repair reads
//! frames behind a gap in which numbers may have been given. Both follow a log with this.

use crate::graph::{AttributeId, UserId};
use crate::log::Record;
use crate::state::State;
use std::borrow::Cow;

/// A number that stands for nothing in the new state.
const GONE: u32 = u32::MAX;

/// What a number of the log is in the state.
#[derive(Default)]
pub(crate) struct Renumber {
    users: Vec<u32>,
    attributes: Vec<u32>,
}

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The state has it.
    Taken,
    /// It speaks of a user or an attribute that the state never heard of.
    Unknown,
}

fn put(numbers: &mut Vec<u32>, old: u32, new: u32) {
    let old = old as usize;
    if numbers.len() <= old {
        numbers.resize(old + 1, GONE);
    }
    numbers[old] = new;
}

fn get(numbers: &[u32], old: u32) -> Option<u32> {
    numbers
        .get(old as usize)
        .copied()
        .filter(|new| *new != GONE)
}

impl Renumber {
    /// The numbers that a base gives: `old`'s users in their order, and the attributes kept.
    pub(crate) fn of_base(old: &State, attributes: Vec<u32>) -> Self {
        let mut users = vec![GONE; old.graph.user_id_end() as usize];
        for (number, user) in (0u32..).zip(old.users()) {
            users[user.0 as usize] = number;
        }
        Self { users, attributes }
    }

    /// A state's own numbers, for a log that goes on from it.
    pub(crate) fn same(state: &State) -> Self {
        let live = |user| match state.graph.user_name(UserId(user)) {
            "" => GONE,
            _ => user,
        };
        Self {
            users: (0..state.graph.user_id_end()).map(live).collect(),
            attributes: (0..state.graph.attribute_count() as u32).collect(),
        }
    }

    /// The user's number in the state.
    pub(crate) fn user(&self, old: u32) -> Option<u32> {
        get(&self.users, old)
    }

    /// Takes a record of the old log to the state, and gives it, under its new numbers, to
    /// `emit` first. An attribute that the state lacks is made known by the name that
    /// `attribute_name` has for its old number.
    pub(crate) fn take<'n>(
        &mut self,
        record: &Record<'_>,
        state: &mut State,
        attribute_name: impl Fn(u32) -> &'n str,
        mut emit: impl FnMut(&Record<'_>) -> Result<(), String>,
    ) -> Result<Taken, String> {
        let mut apply = |state: &mut State, record: &Record<'_>| {
            emit(record)?;
            state.apply(record)
        };
        let mut attribute_of = |this: &mut Self, state: &mut State, old: u32| {
            if let Some(new) = get(&this.attributes, old) {
                return Ok(Some(new));
            }
            let name = attribute_name(old);
            if name.is_empty() {
                return Ok::<_, String>(None);
            }
            let number = state.graph.attribute_count() as u32;
            let name = Cow::Borrowed(name);
            apply(state, &Record::DefineAttribute { number, name })?;
            put(&mut this.attributes, old, number);
            Ok(Some(number))
        };
        let renumbered = match record {
            Record::DefineUser { number, name } => {
                if let Some(before) = state.graph.user_id(name) {
                    // The log gave the name a new number, so its old user was forgotten, in a
                    // frame that is lost.
                    apply(state, &Record::Forget { user: before.0 })?;
                }
                let new = state.graph.user_id_end();
                put(&mut self.users, *number, new);
                let name = Cow::Borrowed(name.as_ref());
                Record::DefineUser { number: new, name }
            }
            Record::DefineAttribute { number, name } => {
                if let Some(AttributeId(known)) = state.graph.attribute_id(name) {
                    put(&mut self.attributes, *number, known);
                    return Ok(Taken::Taken);
                }
                let new = state.graph.attribute_count() as u32;
                put(&mut self.attributes, *number, new);
                let name = Cow::Borrowed(name.as_ref());
                Record::DefineAttribute { number: new, name }
            }
            Record::Event(event) => {
                let Some(user) = self.user(event.user) else {
                    return Ok(Taken::Unknown);
                };
                let Some(attribute) = attribute_of(self, state, event.attribute)? else {
                    return Ok(Taken::Unknown);
                };
                let mut event = *event;
                (event.user, event.attribute) = (user, attribute);
                Record::Event(event)
            }
            Record::Feature { attribute, vector } => {
                let Some(attribute) = attribute_of(self, state, *attribute)? else {
                    return Ok(Taken::Unknown);
                };
                let vector = Cow::Borrowed(vector.as_ref());
                Record::Feature { attribute, vector }
            }
            Record::Forget { user }
            | Record::UserFeature { user, .. }
            | Record::Pair { user, .. }
            | Record::Edit { user, .. } => {
                let Some(user) = self.user(*user) else {
                    return Ok(Taken::Unknown);
                };
                // Behind a gap, more of a user whose forgetting was taken may still come.
                if state.graph.user_name(UserId(user)).is_empty() {
                    return Ok(Taken::Unknown);
                }
                of_user(record, user)
            }
            Record::Encoder { .. } | Record::BaseEnd => record.clone(),
        };
        apply(state, &renumbered)?;
        Ok(Taken::Taken)
    }
}

/// A user's record under another number.
fn of_user<'a>(record: &Record<'a>, number: u32) -> Record<'a> {
    let mut record = record.clone();
    match &mut record {
        Record::Forget { user }
        | Record::UserFeature { user, .. }
        | Record::Pair { user, .. }
        | Record::Edit { user, .. } => *user = number,
        _ => {}
    }
    record
}

impl Record<'_> {
    /// Whether it takes a sequence number of its own, where it is no part of a base.
    pub(crate) fn is_operation(&self) -> bool {
        !matches!(
            self,
            Self::DefineUser { .. } | Self::DefineAttribute { .. } | Self::BaseEnd
        )
    }
}
