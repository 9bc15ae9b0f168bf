//! What is asked of an edit, what watches it, and what comes back; and what an answer to it
//! ("yes, keep it", "no, rather that one") says about taste.
//!
//! Not here: running it ([`crate::engine`]); writing anything to a store. [`feedback`] returns
//! what to append and the caller commits it.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use simpatico_schema::edit::{
    EditRecord, EditSettings, Instruction, PreferencePair, Provenance, Why,
};
use simpatico_schema::{Event, Polarity};
use simpatico_storage::Snapshot;

use crate::picture::{Mask, Picture};
use crate::{Error, Result};

/// Asks for one edit of one picture, or for a new picture where there is no source.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EditRequest {
    /// For whom. Unknown users get the generic instruction.
    pub user: String,
    /// The picture to edit; `None` makes one from words alone.
    pub source: Option<Source>,
    /// What the source shows, or what to make; `None`: the bundle's neutral caption.
    pub caption: Option<String>,
    /// A wish that comes with the request.
    pub cue: Option<String>,
    /// The caller's own instructions, all carried out in the same picture, each read by the
    /// model for itself ([`crate::sampler::together`]); at most 8, and each costs a run of the
    /// network a step. What must come after something else is a second edit of the first one's
    /// result. Empty: a personal one is written for the user.
    pub instructions: Vec<String>,
    /// How to carry it out; what is `None` is the bundle's setting. A `count` of 0 means 1.
    pub settings: EditSettings,
    /// Where the picture may change; of the source's size. `None`: everywhere.
    pub mask: Option<MaskInput>,
    /// 0 = only the user's own circle, 1 = mostly tastes beyond it.
    pub explore: f32,
}

/// A source picture and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// The picture.
    pub picture: Picture,
    /// SHA-256 of its file.
    pub sha256: String,
}

/// How wide a mask's soft edge usually is, in pixels.
pub const MASK_SOFTEN: u32 = 4;

/// A mask and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskInput {
    /// The mask, softened already if it shall be.
    pub mask: Mask,
    /// SHA-256 of its file.
    pub sha256: String,
    /// Over how many pixels its edge was softened.
    pub soften: u32,
}

impl Source {
    /// Reads a picture file.
    pub fn open(path: &std::path::Path) -> Result<Self> {
        let (picture, sha256) = crate::picture::open(path)?;
        Ok(Self { picture, sha256 })
    }

    /// A picture that never was a file; its digest is of size and bytes.
    pub fn of(picture: Picture) -> Self {
        let mut bytes = Vec::from(picture.width.to_le_bytes());
        bytes.extend(picture.height.to_le_bytes());
        bytes.extend(&picture.rgb);
        bytes.extend(picture.alpha.iter().flatten());
        Self {
            sha256: crate::provenance::sha256(&bytes),
            picture,
        }
    }
}

impl MaskInput {
    /// Reads a mask file and softens its edge inwards over `soften` pixels.
    pub fn open(path: &std::path::Path, soften: u32) -> Result<Self> {
        let (mask, sha256) = Mask::open(path)?;
        Ok(Self {
            mask: mask.softened(soften),
            sha256,
            soften,
        })
    }

    /// Reads the mask of a recorded edit, softened as it was then.
    pub fn recorded(path: &std::path::Path, record: &Provenance) -> Result<Self> {
        let (mask, sha256) = Mask::open(path)?;
        let soften = record.mask_soften.unwrap_or(MASK_SOFTEN);
        let mask = match record.version {
            0..3 => mask.softened_until_2(soften),
            _ => mask.softened(soften),
        };
        Ok(Self {
            mask,
            sha256,
            soften,
        })
    }
}

/// What an edit made.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    /// The pictures, in order of their index, at the size asked for.
    pub images: Vec<Picture>,
    /// The instruction that was carried out, and why.
    pub instruction: Instruction,
    /// For each picture all that is needed to make it again.
    pub provenance: Vec<Provenance>,
    /// Seconds spent on it, by stage. In a batch: on the whole batch.
    pub seconds: Seconds,
}

/// Seconds by stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Seconds {
    /// Writing the instruction.
    pub instruct: f64,
    /// Reading the words for the picture model.
    pub words: f64,
    /// Taking the source and its control picture to latents.
    pub encode: f64,
    /// All steps of the sampler.
    pub sample: f64,
    /// Latents to pictures of the size asked for.
    pub decode: f64,
}

/// The stages of an edit, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// A model is read from its files.
    Load,
    /// Writing the instruction.
    Instruct,
    /// Reading the words for the picture model.
    Words,
    /// Taking the source and its control picture to latents.
    Encode,
    /// The sampler's steps.
    Sample,
    /// Latents to pictures.
    Decode,
}

/// How far an edit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Parts of the stage done.
    pub done: usize,
    /// Parts in all.
    pub total: usize,
}

/// Who watches an edit. All of it is optional.
#[derive(Default)]
pub struct Hooks<'a> {
    /// Told at every stage and after every step.
    pub progress: Option<&'a mut dyn FnMut(Progress)>,
    /// Shown what the pictures would become if the flow went straight on: number of the
    /// step, and the pictures at the model's size. Costs a decoding each time.
    pub preview: Option<&'a mut dyn FnMut(usize, &[Picture])>,
    /// A preview every so many steps; 0: none.
    pub preview_every: usize,
    /// Once set the work ends with [`Error::Cancelled`] before the next network is run.
    pub cancel: Option<&'a AtomicBool>,
}

impl Hooks<'_> {
    pub(crate) fn tell(&mut self, stage: Stage, done: usize, total: usize) {
        if let Some(progress) = self.progress.as_mut() {
            progress(Progress { stage, done, total });
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self.cancel {
            Some(flag) if flag.load(std::sync::atomic::Ordering::Relaxed) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}

// ------------------------------------------------------------------------------- attributes

/// The attributes of a vocabulary that a text takes up, in order of appearance, each once.
///
/// Words are compared without case and endings ("golden mugs" takes up "golden mug"); of
/// attributes that overlap in the text the longest counts, the earlier on ties.
pub fn attributes_in<'a>(text: &str, vocabulary: impl Iterator<Item = &'a str>) -> Vec<String> {
    let words = stems(text);
    let mut by_first: BTreeMap<String, Vec<(Vec<String>, &str)>> = BTreeMap::new();
    for attribute in vocabulary {
        let stems = stems(attribute);
        if let Some(first) = stems.first().cloned() {
            by_first.entry(first).or_default().push((stems, attribute));
        }
    }
    let mut found: Vec<(usize, usize, &str)> = Vec::new();
    for at in 0..words.len() {
        for (stems, attribute) in by_first.get(&words[at]).into_iter().flatten() {
            if words[at..].starts_with(stems) {
                found.push((at, stems.len(), attribute));
            }
        }
    }
    found.sort_by_key(|(at, length, name)| (std::cmp::Reverse(*length), *at, *name));
    let mut taken = vec![false; words.len()];
    let mut kept: Vec<(usize, &str)> = Vec::new();
    for (at, length, name) in found {
        if !taken[at..at + length].iter().any(|t| *t) {
            taken[at..at + length].fill(true);
            kept.push((at, name));
        }
    }
    kept.sort_unstable();
    let mut names: Vec<String> = Vec::new();
    for (_, name) in kept {
        if !names.iter().any(|n| n == name) {
            names.push(name.to_string());
        }
    }
    names
}

/// Lower-case words without their commonest English endings; articles are left out.
fn stems(text: &str) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty() && !["a", "an", "the"].contains(word))
        .map(stem)
        .collect()
}

fn stem(word: &str) -> String {
    for (ending, instead) in [("ies", "y"), ("ing", ""), ("ed", ""), ("es", ""), ("s", "")] {
        if let Some(front) = word.strip_suffix(ending) {
            // Short words are all stem: "red" is not "r", "glass" not "glas".
            if front.len() >= 3 && !front.ends_with('s') {
                return format!("{front}{instead}")
                    .trim_end_matches('e')
                    .to_string();
            }
        }
    }
    match word.strip_suffix('e') {
        Some(front) if front.len() >= 3 => front.to_string(),
        _ => word.to_string(),
    }
}

// ---------------------------------------------------------------------------------- records

/// The record to keep of an edit, so that an answer to it means something later.
pub fn record_of(edit: &Edit, request: &EditRequest, snapshot: &Snapshot, at: i64) -> EditRecord {
    let instruction = &edit.instruction.instruction;
    EditRecord {
        id: edit
            .provenance
            .first()
            .map(|p| p.edit_id.clone())
            .unwrap_or_default(),
        user: request.user.clone(),
        caption: request.caption.clone().unwrap_or_default(),
        instruction: instruction.clone(),
        attributes: attributes_in(instruction, snapshot.attributes()),
        at,
        accepted: None,
    }
}

/// A `why` in which other users stand by pseudonym, fit to leave the machine; without a key
/// they are only numbered.
pub(crate) fn without_names(why: &Why, key: Option<&[u8; 32]>) -> Why {
    let mut why = why.clone();
    for (i, neighbor) in why.neighbors.iter_mut().enumerate() {
        neighbor.user = match key {
            Some(key) => crate::provenance::pseudonym(key, &neighbor.user),
            None => format!("neighbor {}", i + 1),
        };
    }
    why
}

// --------------------------------------------------------------------------------- feedback

/// An answer to an edit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is liked.
    Accept,
    /// It is not.
    Reject,
}

/// What an answer adds to a store: to be appended together.
#[derive(Clone, Debug, PartialEq)]
pub struct Feedback {
    /// Likes and dislikes of the attributes that the instruction took up.
    pub events: Vec<Event>,
    /// What the user would rather have heard, where there is something to compare with.
    pub pair: Option<PreferencePair>,
    /// The edit, answered.
    pub record: EditRecord,
    /// The other edit, answered, where one was named.
    pub instead: Option<EditRecord>,
}

/// What an answer to the edit `id` says: events on the attributes its instruction took up,
/// and a preference pair against the edit named in `instead`, else against the latest edit
/// with the opposite answer for the same user and caption.
///
/// With `instead` only the attributes in which the two differ are judged. `at` is the time of
/// the answer in milliseconds since 1970. Nothing is written.
///
/// # Errors
/// [`Error::BadRequest`] for an edit the store does not know, or one of another user.
pub fn feedback(
    snapshot: &Snapshot,
    id: &str,
    answer: Answer,
    instead: Option<&str>,
    at: i64,
) -> Result<Feedback> {
    let find = |id: &str| {
        snapshot.edit(id).ok_or_else(|| {
            Error::BadRequest(format!(
                "no edit {id:?} in this store; its id is in the provenance beside the picture"
            ))
        })
    };
    let record = find(id)?;
    let other = instead.map(find).transpose()?;
    if let Some(other) = other.as_ref().filter(|o| o.user != record.user) {
        let message = format!("edits {id:?} and {:?} are of different users", other.id);
        return Err(Error::BadRequest(message));
    }
    let opposite = || {
        let opposite = Some(answer == Answer::Reject);
        let fits = |e: &EditRecord| {
            e.user == record.user
                && e.caption == record.caption
                && e.accepted == opposite
                && e.instruction != record.instruction
        };
        let edits = snapshot.edits().map(|e| (*e).clone()).filter(fits);
        edits.max_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)))
    };
    let against = other.clone().or_else(opposite);
    Ok(answered(record, answer, other, against.as_ref(), at))
}

fn answered(
    mut record: EditRecord,
    answer: Answer,
    mut instead: Option<EditRecord>,
    against: Option<&EditRecord>,
    at: i64,
) -> Feedback {
    let (mine, theirs) = match answer {
        Answer::Accept => (Polarity::Like, Polarity::Dislike),
        Answer::Reject => (Polarity::Dislike, Polarity::Like),
    };
    let shared = |a: &String| {
        let other = instead.as_ref();
        record.attributes.contains(a) && other.is_some_and(|o| o.attributes.contains(a))
    };
    let events_on = |of: &EditRecord, polarity| -> Vec<Event> {
        let event = |attribute: &String| {
            let mut event = Event::new(&of.user, attribute, polarity).at(at);
            event.id = Some(format!("feedback {}", record.id));
            event
        };
        of.attributes
            .iter()
            .filter(|a| !shared(a))
            .map(event)
            .collect()
    };
    let mut events = events_on(&record, mine);
    events.extend(instead.iter().flat_map(|other| events_on(other, theirs)));
    let pair = against
        .filter(|o| o.instruction != record.instruction)
        .map(|other| {
            let (chosen, rejected) = match answer {
                Answer::Accept => (&record, other),
                Answer::Reject => (other, &record),
            };
            PreferencePair {
                user: record.user.clone(),
                caption: record.caption.clone(),
                chosen: chosen.instruction.clone(),
                rejected: rejected.instruction.clone(),
                source: "feedback".into(),
            }
        });
    record.accepted = Some(answer == Answer::Accept);
    if let Some(other) = instead.as_mut() {
        other.accepted = Some(answer == Answer::Reject);
    }
    Feedback {
        events,
        pair,
        record,
        instead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_whatever_their_endings_and_the_longest_wins() {
        let vocabulary = [
            "wood",
            "rustic wood",
            "glowing star",
            "red",
            "glass",
            "city lights",
        ];
        let found = |text| attributes_in(text, vocabulary.into_iter());
        assert_eq!(
            found("Carve it in rustic woods, with Glowing Stars."),
            ["rustic wood", "glowing star"]
        );
        assert_eq!(found("wood on rustic wood"), ["wood", "rustic wood"]);
        assert_eq!(found("add a city light"), ["city lights"]);
        assert_eq!(found("reduce the glare"), [""; 0]);
        assert_eq!(found("glass and red glass"), ["glass", "red"]);
    }

    fn record(id: &str, instruction: &str, attributes: &[&str]) -> EditRecord {
        EditRecord {
            id: id.into(),
            user: "ada".into(),
            caption: "a mug".into(),
            instruction: instruction.into(),
            attributes: attributes.iter().map(|a| a.to_string()).collect(),
            at: 1,
            accepted: None,
        }
    }

    #[test]
    fn rejecting_one_for_another_judges_what_differs_and_makes_a_pair() {
        let wood = record("1", "make it wood at night", &["wood", "night"]);
        let gold = record("2", "make it gold at night", &["gold", "night"]);
        let feedback = answered(wood, Answer::Reject, Some(gold.clone()), Some(&gold), 5);
        let said: Vec<_> = feedback
            .events
            .iter()
            .map(|e| (e.attribute.as_str(), e.polarity))
            .collect();
        assert_eq!(
            said,
            [("wood", Polarity::Dislike), ("gold", Polarity::Like)]
        );
        let pair = feedback.pair.unwrap();
        assert_eq!(
            (pair.chosen.as_str(), pair.rejected.as_str()),
            ("make it gold at night", "make it wood at night")
        );
        assert_eq!(feedback.record.accepted, Some(false));
        assert_eq!(feedback.instead.unwrap().accepted, Some(true));
    }

    #[test]
    fn accepting_alone_likes_everything_taken_up_and_makes_no_pair() {
        let wood = record("1", "make it wood", &["wood"]);
        let feedback = answered(wood, Answer::Accept, None, None, 5);
        assert_eq!(feedback.events.len(), 1);
        assert_eq!(feedback.events[0].polarity, Polarity::Like);
        assert_eq!(feedback.events[0].at, Some(5));
        assert_eq!(feedback.pair, None);
    }
}
