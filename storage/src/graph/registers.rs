//! A user's registers as bytes, about six for each.
//!
//! A record starts with the `at` of the user's first event, eight bytes, little-endian.
//! Then comes one entry per attribute, by id rising:
//!
//! - `gap << 3 | has_id << 2 | polarity`, a varint; the gap is from the attribute before
//! - `at` minus the record's, zig-zag, a varint
//! - if `has_id`: the id's length, a varint, and its bytes
//!
//! The empty record is a user without registers; [`FORGOTTEN`] one that takes none.

use super::Register;
use simpatico_schema::{Polarity, Sign};

/// The record of a forgotten user: no valid record is one byte long.
pub(crate) const FORGOTTEN: &[u8] = &[0];

const BASE_BYTES: usize = 8;

/// How one event changes a record: its bytes `from..to` are replaced.
pub(crate) struct Splice {
    pub from: usize,
    pub to: usize,
    pub old: Option<Sign>,
}

/// The registers of a record, by attribute id rising.
#[derive(Clone)]
pub(crate) struct Registers<'a> {
    bytes: &'a [u8],
    position: usize,
    base: i64,
    attribute: u32,
}

/// The edges of a record, by attribute id rising.
pub(crate) struct Edges<'a>(Registers<'a>);

impl Register<'_> {
    /// Which of two events wins: greater time, then id, then polarity.
    pub(crate) fn order(&self, other: &Register<'_>) -> std::cmp::Ordering {
        let ids = || self.id.as_bytes().cmp(other.id.as_bytes());
        let polarities = || self.polarity.cmp(&other.polarity);
        self.at.cmp(&other.at).then_with(ids).then_with(polarities)
    }
}

impl<'a> Registers<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let base = bytes.first_chunk().map_or(0, |b| i64::from_le_bytes(*b));
        Self {
            bytes,
            position: BASE_BYTES,
            base,
            attribute: 0,
        }
    }

    fn varint(&mut self) -> u64 {
        let mut value = 0;
        let mut shift = 0;
        while let Some(&byte) = self.bytes.get(self.position) {
            self.position += 1;
            value |= u64::from(byte & 0x7F) << (shift & 63);
            if byte < 0x80 {
                break;
            }
            shift += 7;
        }
        value
    }

    fn skip_varint(&mut self) {
        while let Some(&byte) = self.bytes.get(self.position) {
            self.position += 1;
            if byte < 0x80 {
                break;
            }
        }
    }

    /// Goes past an entry's head; `Some((polarity code, has_id))` if there is one.
    fn head(&mut self) -> Option<(u8, bool)> {
        if self.position >= self.bytes.len() {
            return None;
        }
        let head = self.varint();
        self.attribute = self.attribute.wrapping_add((head >> 3) as u32);
        Some((head as u8 & 3, head & 4 != 0))
    }

    fn id(&mut self, has_id: bool) -> &'a [u8] {
        let len = if has_id { self.varint() as usize } else { 0 };
        let id = self.bytes.get(self.position..self.position + len);
        self.position += len;
        id.unwrap_or(&[])
    }

    fn at(&mut self) -> i64 {
        let zigzag = self.varint();
        let delta = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        self.base.wrapping_add(delta)
    }
}

impl<'a> Iterator for Registers<'a> {
    type Item = (u32, Register<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let (code, has_id) = self.head()?;
        let at = self.at();
        let id = std::str::from_utf8(self.id(has_id)).unwrap_or("");
        let polarity = Polarity::from_code(code).unwrap_or(Polarity::Clear);
        Some((self.attribute, Register { polarity, at, id }))
    }
}

impl<'a> Edges<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Registers::new(bytes))
    }
}

impl Iterator for Edges<'_> {
    type Item = (u32, Sign);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (code, has_id) = self.0.head()?;
            self.0.skip_varint();
            self.0.id(has_id);
            if code >= Polarity::Dislike.code() {
                let sign = if code == Polarity::Like.code() {
                    Sign::Like
                } else {
                    Sign::Dislike
                };
                return Some((self.0.attribute, sign));
            }
        }
    }
}

/// What `to` changes in a record: `None` if nothing, else the bytes to replace and, in `new`,
/// those to put there.
pub(crate) fn plan(
    record: &[u8],
    attribute: u32,
    to: Register<'_>,
    new: &mut Vec<u8>,
) -> Option<Splice> {
    new.clear();
    let mut all = Registers::new(record);
    let mut from = BASE_BYTES.min(record.len());
    if record.is_empty() {
        new.extend_from_slice(&to.at.to_le_bytes());
        all.base = to.at;
    }
    let mut before = 0;
    while let Some((code, has_id)) = all.head() {
        if all.attribute < attribute {
            all.skip_varint();
            all.id(has_id);
            (before, from) = (all.attribute, all.position);
            continue;
        }
        let after = all.attribute;
        if after == attribute {
            let polarity = Polarity::from_code(code).unwrap_or(Polarity::Clear);
            let (at, id) = (all.at(), all.id(has_id));
            let held = (at, id, polarity);
            let stays = held >= (to.at, to.id.as_bytes(), to.polarity);
            #[cfg(feature = "planted")]
            let stays = match crate::log::planted::is("register-less-than") {
                true => held > (to.at, to.id.as_bytes(), to.polarity),
                false => stays,
            };
            if stays {
                return None;
            }
            push_entry(new, attribute - before, to, all.base);
            let (to, old) = (all.position, polarity.sign());
            return Some(Splice { from, to, old });
        }
        push_entry(new, attribute - before, to, all.base);
        push_head(new, after - attribute, has_id, code);
        let (to, old) = (all.position, None);
        return Some(Splice { from, to, old });
    }
    push_entry(new, attribute - before, to, all.base);
    let (to, old) = (from, None);
    Some(Splice { from, to, old })
}

/// What [`merge`] did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Merged {
    /// Registers that took an event.
    pub changed: u32,
    /// Registers whose edge is another.
    pub moved: u32,
    /// Edges more than before.
    pub edges: i64,
}

/// A record that has taken events, at most one an attribute and those rising, into `new`.
pub(crate) fn merge<'a>(
    record: &[u8],
    events: impl Iterator<Item = (u32, Register<'a>)>,
    new: &mut Vec<u8>,
) -> Merged {
    new.clear();
    let mut events = events.peekable();
    let mut held = Registers::new(record).peekable();
    let base = match (record.first_chunk(), events.peek()) {
        (Some(base), _) => i64::from_le_bytes(*base),
        (None, first) => first.map_or(0, |(_, to)| to.at),
    };
    new.extend_from_slice(&base.to_le_bytes());
    let (mut merged, mut before) = (Merged::default(), 0);
    loop {
        let (attribute, register) = match (held.peek(), events.peek()) {
            (None, None) => return merged,
            (Some(&(a, _)), Some(&(b, _))) if a < b => (a, held.next()),
            (Some(&(a, _)), None) => (a, held.next()),
            (_, Some(&(b, to))) => {
                events.next();
                let old = held.next_if(|(a, _)| *a == b);
                let stays = old.as_ref().is_some_and(|(_, old)| old.order(&to).is_ge());
                if stays {
                    (b, old)
                } else {
                    let old = old.and_then(|(_, old)| old.polarity.sign());
                    merged.changed += 1;
                    merged.moved += u32::from(old != to.polarity.sign());
                    merged.edges +=
                        i64::from(to.polarity.sign().is_some()) - i64::from(old.is_some());
                    push_entry(new, b - before, to, base);
                    before = b;
                    continue;
                }
            }
        };
        if let Some((_, register)) = register {
            push_entry(new, attribute - before, register, base);
            before = attribute;
        }
    }
}

/// Appends an entry. `gap` is from the attribute before, `base` the record's.
pub(crate) fn push_entry(out: &mut Vec<u8>, gap: u32, to: Register<'_>, base: i64) {
    push_head(out, gap, !to.id.is_empty(), to.polarity.code());
    let delta = to.at.wrapping_sub(base);
    push_varint(out, (delta << 1 ^ delta >> 63) as u64);
    if !to.id.is_empty() {
        push_varint(out, to.id.len() as u64);
        out.extend_from_slice(to.id.as_bytes());
    }
}

fn push_head(out: &mut Vec<u8>, gap: u32, has_id: bool, polarity_code: u8) {
    let flags = u64::from(has_id) << 2 | u64::from(polarity_code);
    push_varint(out, u64::from(gap) << 3 | flags);
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_says_what_it_changed_what_it_moved_and_how_many_edges_came() {
        let to = |polarity, at| Register {
            polarity,
            at,
            id: "",
        };
        let (like, dislike, clear) = (Polarity::Like, Polarity::Dislike, Polarity::Clear);
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let events = [(1, to(like, 5)), (4, to(like, 5)), (6, to(clear, 5))];
        let merged = merge(&[], events.into_iter(), &mut first);
        assert_eq!((merged.changed, merged.moved, merged.edges), (3, 2, 2));
        // One is too late, one says the same again later, one turns, one goes, one comes.
        let events = [
            (1, to(dislike, 4)),
            (4, to(like, 6)),
            (6, to(dislike, 6)),
            (7, to(like, 6)),
        ];
        let merged = merge(&first, events.into_iter(), &mut second);
        assert_eq!((merged.changed, merged.moved, merged.edges), (3, 2, 2));
        let events = [(1, to(dislike, 7)), (4, to(clear, 7))];
        let merged = merge(&second, events.into_iter(), &mut first);
        assert_eq!((merged.changed, merged.moved, merged.edges), (2, 2, -1));
    }
}
