//! Events, their names and their order.

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::fmt;

/// The longest user, attribute or event id, in bytes of UTF-8.
pub const MAX_NAME_BYTES: usize = 256;

/// What a user says of an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Polarity {
    /// The edge is removed.
    Clear = 0,
    /// Seen, without opinion: kept in the history, no edge.
    Pass = 1,
    /// An edge of sign [`Sign::Dislike`].
    Dislike = 2,
    /// An edge of sign [`Sign::Like`].
    Like = 3,
}

impl Polarity {
    /// All four, in register order.
    pub const ALL: [Self; 4] = [Self::Clear, Self::Pass, Self::Dislike, Self::Like];

    /// The sign of the edge this polarity stands for, if it stands for one.
    #[inline]
    pub fn sign(self) -> Option<Sign> {
        match self {
            Self::Like => Some(Sign::Like),
            Self::Dislike => Some(Sign::Dislike),
            Self::Pass | Self::Clear => None,
        }
    }

    /// The polarity with this stored number.
    #[inline]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// The stored number, 0 to 3.
    #[inline]
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The word used in every outer format.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Clear => "clear",
            Self::Pass => "pass",
            Self::Dislike => "dislike",
            Self::Like => "like",
        }
    }
}

impl std::str::FromStr for Polarity {
    type Err = EventError;
    fn from_str(word: &str) -> Result<Self, EventError> {
        Self::ALL
            .into_iter()
            .find(|p| p.as_str() == word)
            .ok_or_else(|| EventError::Polarity { got: clip(word) })
    }
}

/// The two kinds of edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Sign {
    /// The user dislikes the attribute.
    Dislike = 0,
    /// The user likes the attribute.
    Like = 1,
}

impl Sign {
    /// 0 for dislike, 1 for like.
    #[inline]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The polarity that sets an edge of this sign.
    pub fn polarity(self) -> Polarity {
        match self {
            Self::Like => Polarity::Like,
            Self::Dislike => Polarity::Dislike,
        }
    }
}

/// One statement of a user on an attribute.
///
/// Events on one (user, attribute) form a register: the greatest
/// ([`at`](Self::at), [`id`](Self::id)) wins whatever the order of arrival. Should two
/// events have both equal, the greater [`Polarity`] wins, so that the outcome never depends
/// on which came first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Who says it.
    pub user: String,
    /// Of what.
    pub attribute: String,
    /// What.
    pub polarity: Polarity,
    /// When, in milliseconds since 1970. `None`: the time of arrival.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<i64>,
    /// Breaks ties between events of the same millisecond. `None` counts as "".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

impl Event {
    /// An event without a time (it counts from its arrival) and without an id.
    pub fn new(user: &str, attribute: &str, polarity: Polarity) -> Self {
        Self {
            user: user.into(),
            attribute: attribute.into(),
            polarity,
            at: None,
            id: None,
        }
    }

    /// The same event with a time in milliseconds since 1970.
    pub fn at(mut self, at_ms: i64) -> Self {
        self.at = Some(at_ms);
        self
    }

    /// Whether user, attribute and id are names the store takes.
    pub fn check_names(&self) -> Result<(), EventError> {
        check_name("user", &self.user)?;
        check_name("attribute", &self.attribute)?;
        match &self.id {
            None => Ok(()),
            Some(id) if id.is_empty() => Ok(()),
            Some(id) => check_name("id", id),
        }
    }

    /// The order of registers: by time, then id by bytes, then polarity.
    /// An `at` of `None` is taken as `arrival_ms`.
    pub fn register_cmp(&self, other: &Self, arrival_ms: i64) -> Ordering {
        let key = |e: &Self| e.at.unwrap_or(arrival_ms);
        key(self)
            .cmp(&key(other))
            .then_with(|| {
                let id = |e: &'_ Self| e.id.clone().unwrap_or_default();
                id(self).as_bytes().cmp(id(other).as_bytes())
            })
            .then_with(|| self.polarity.cmp(&other.polarity))
    }
}

/// Checks one name: 1 to [`MAX_NAME_BYTES`] bytes of UTF-8 without control characters.
/// `what` ("user", "attribute", "id") goes into the message.
pub fn check_name(what: &'static str, name: &str) -> Result<(), EventError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(EventError::NameLength {
            what,
            got: name.len(),
        });
    }
    // Bytes 0x20..0x7f need no decoding, and nearly every name is made of them.
    if name.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Ok(());
    }
    match name.char_indices().find(|(_, c)| c.is_control()) {
        Some((at_byte, c)) => Err(EventError::NameControl {
            what,
            at_byte,
            code: c as u32,
        }),
        None => Ok(()),
    }
}

/// Why an event was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventError {
    /// A name is empty or too long.
    NameLength {
        /// Which name.
        what: &'static str,
        /// Its length in bytes.
        got: usize,
    },
    /// A name has a control character.
    NameControl {
        /// Which name.
        what: &'static str,
        /// Where in it.
        at_byte: usize,
        /// The character's code point.
        code: u32,
    },
    /// A word that is no polarity.
    Polarity {
        /// The word, clipped.
        got: String,
    },
    /// A line that cannot be read.
    Syntax {
        /// What is wrong with it.
        reason: String,
    },
}

impl fmt::Display for EventError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NameLength { what, got } => write!(
                f,
                "{what}: expected 1 to {MAX_NAME_BYTES} bytes of UTF-8, got {got}"
            ),
            Self::NameControl {
                what,
                at_byte,
                code,
            } => write!(
                f,
                "{what}: expected no control characters, got U+{code:04X} at byte {at_byte}"
            ),
            Self::Polarity { got } => {
                write!(
                    f,
                    "polarity: expected like, dislike, pass or clear, got {got:?}"
                )
            }
            Self::Syntax { reason } => f.write_str(reason),
        }
    }
}

impl std::error::Error for EventError {}

/// The first characters of a text, for messages.
pub(crate) fn clip(text: &str) -> String {
    match text.char_indices().nth(40) {
        None => text.to_string(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// Which common attributes count towards an overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlapMode {
    /// Every common attribute, whatever the signs: Eq. 6 to the letter.
    #[default]
    Shared,
    /// Only attributes both like or both dislike.
    Agreeing,
}

/// One of a user's most similar users.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Neighbor {
    /// The neighbor's name.
    pub user: String,
    /// How many attributes the two share; `None` where embeddings were compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<u32>,
    /// Overlap divided by the graph-wide maximum, or the cosine of the two embeddings.
    pub similarity: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_by_bytes_and_control_characters() {
        assert!(check_name("user", "a").is_ok());
        assert!(check_name("user", "Zoë 🦊").is_ok());
        assert_eq!(
            check_name("user", ""),
            Err(EventError::NameLength {
                what: "user",
                got: 0
            })
        );
        assert!(check_name("user", &"x".repeat(256)).is_ok());
        assert!(check_name("user", &"x".repeat(257)).is_err());
        assert!(check_name("user", &"é".repeat(129)).is_err());
        for bad in ["a\nb", "\u{7f}", "\u{85}", "a\0"] {
            assert!(
                matches!(check_name("user", bad), Err(EventError::NameControl { .. })),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn register_order_is_time_then_id_then_polarity() {
        let like = Event::new("u", "a", Polarity::Like).at(5);
        let late = Event::new("u", "a", Polarity::Clear).at(6);
        assert_eq!(like.register_cmp(&late, 0), Ordering::Less);
        let mut with_id = Event::new("u", "a", Polarity::Clear).at(5);
        with_id.id = Some("x".into());
        assert_eq!(like.register_cmp(&with_id, 0), Ordering::Less);
        let dislike = Event::new("u", "a", Polarity::Dislike).at(5);
        assert_eq!(like.register_cmp(&dislike, 0), Ordering::Greater);
        let now = Event::new("u", "a", Polarity::Clear);
        assert_eq!(now.register_cmp(&like, 9), Ordering::Greater);
    }

    #[test]
    fn an_events_names_are_checked_and_its_id_may_be_missing() {
        let mut event = Event::new("u", "a", Polarity::Pass);
        assert_eq!(event.check_names(), Ok(()));
        for (id, good) in [("", true), ("x", true), ("a\nb", false)] {
            event.id = Some(id.into());
            assert_eq!(event.check_names().is_ok(), good, "{id:?}");
        }
        event.id = Some("x".repeat(257));
        assert!(event.check_names().is_err());
        assert!(Event::new("", "a", Polarity::Pass).check_names().is_err());
        assert!(Event::new("u", "", Polarity::Pass).check_names().is_err());
    }

    #[test]
    fn signs_and_polarities_belong_together() {
        for (place, sign) in [Sign::Dislike, Sign::Like].into_iter().enumerate() {
            assert_eq!(sign.index(), place);
            assert_eq!(sign.polarity().sign(), Some(sign));
        }
        assert_eq!(Polarity::Pass.sign(), None);
        assert_eq!(Polarity::Clear.sign(), None);
        let got = "l".repeat(41);
        let clipped = format!("{}…", "l".repeat(40));
        let error = got.parse::<Polarity>();
        assert_eq!(error, Err(EventError::Polarity { got: clipped }));
        let got = "l".repeat(40);
        let error = got.parse::<Polarity>();
        assert_eq!(error, Err(EventError::Polarity { got }));
    }

    #[test]
    fn stored_codes_are_stable() {
        for p in Polarity::ALL {
            assert_eq!(Polarity::from_code(p.code()), Some(p));
            assert_eq!(p.as_str().parse::<Polarity>(), Ok(p));
        }
        assert_eq!(Polarity::Like.code(), 3);
        assert_eq!(Polarity::from_code(4), None);
    }
}
