//! How an edit is put into words: the grammar behind every synthetic instruction.
//!
//! An instruction is a clause for a main attribute, sometimes a second clause ("and add … beside
//! it"), sometimes a tail with a feeling ("for a cozy mood"). Each category has its own clauses;
//! each attribute its own wordings; so that one taste is said in dozens of ways and no clause
//! gives the attribute away. Not here: who wants what (`synth`).
//!
//! ```
//! use simpatico_engine::{grammar, vocabulary};
//! use simpatico_schema::random::Philox;
//! let snow = vocabulary::find("falling snow").unwrap();
//! let words = grammar::instruction(&mut Philox::new(0, 0), "the cat", &[snow], None);
//! assert!(vocabulary::mentioned(&words).iter().any(|a| a.name == "falling snow"), "{words}");
//! ```

use crate::vocabulary::{Attribute, Category, Cluster, Look, OverlayKind};
use simpatico_schema::random::Philox;

/// Main clauses that fit an attribute in this wording: {o} is the thing, {a} the wording. The
/// verb must suit what is asked for: snow can fill the air, film grain cannot; a frame goes
/// around a picture; one can turn something into "a watercolor" but hardly into "line art".
fn clauses(attribute: &Attribute, wording: &str) -> &'static [&'static str] {
    let says = |words: &[&str]| words.iter().any(|w| wording.contains(w));
    let counted = ["a ", "an ", "the "].iter().any(|w| wording.starts_with(w));
    match attribute.category {
        Category::Color => &[
            "Recolor {o} in {a}",
            "Change the colors of {o} to {a}",
            "Give {o} a color scheme of {a}",
            "Repaint {o} with {a}",
            "Shift the palette of {o} to {a}",
            "Make {o} stand out in {a}",
            "Dress {o} in {a}",
        ],
        Category::Tone if says(&["contrast", "black", "monochrome", "processing"]) => &[
            "Regrade the picture of {o} for {a}",
            "Finish the picture of {o} with {a}",
            "Develop the picture of {o} with {a}",
            "Go for {a} in the picture of {o}",
        ],
        Category::Tone => &[
            "Grade the whole picture with {a}",
            "Apply {a} to the scene around {o}",
            "Give the picture of {o} {a}",
            "Render {o} with {a}",
            "Wash the image in {a}",
            "Set a mood with {a} across the image",
        ],
        Category::Style if counted => &[
            "Redraw {o} as {a}",
            "Turn the picture of {o} into {a}",
            "Present {o} as if it were {a}",
            "Transform the scene with {o} into {a}",
            "Reimagine {o} in the manner of {a}",
        ],
        Category::Style => &[
            "Redraw {o} in the look of {a}",
            "Reimagine {o} in the manner of {a}",
            "Restyle the image after {a}",
            "Redo the picture of {o} in the style of {a}",
            "Give the picture of {o} the character of {a}",
        ],
        Category::Object => &[
            "Add {a} next to {o}",
            "Place {a} beside {o}",
            "Put {a} close to {o}",
            "Include {a} in the scene with {o}",
            "Surround {o} with {a}",
            "Bring {a} into the picture near {o}",
            "Let {a} accompany {o}",
        ],
        Category::Background => &[
            "Place {o} in front of {a}",
            "Set {o} against {a}",
            "Replace the background behind {o} with {a}",
            "Move {o} to a scene with {a}",
            "Show {a} behind {o}",
            "Swap the backdrop for {a}",
        ],
        Category::Material if says(&["finish", "surface", "coat", "shell", "lattice"]) => &[
            "Give {o} {a}",
            "Remake {o} with {a}",
            "Let {o} have {a}",
            "Replace the outside of {o} with {a}",
        ],
        Category::Material => &[
            "Make {o} out of {a}",
            "Give {o} a surface of {a}",
            "Remake {o} in {a}",
            "Cover {o} with {a}",
            "Let {o} look as if made from {a}",
            "Change the material of {o} to {a}",
        ],
        Category::Pattern => &[
            "Cover {o} with {a}",
            "Print {a} on {o}",
            "Decorate {o} with {a}",
            "Wrap {o} in {a}",
            "Let {a} run across {o}",
            "Give {o} a surface with {a}",
        ],
        Category::Overlay => match attribute.look {
            Some(Look::Overlay(OverlayKind::Frame, ..)) => &[
                "Put {a} around the picture of {o}",
                "Frame {o} with {a}",
                "Set the picture of {o} inside {a}",
                "Finish the image with {a} around {o}",
            ],
            Some(Look::Overlay(
                OverlayKind::Grain
                | OverlayKind::Scratches
                | OverlayKind::LightLeak
                | OverlayKind::Scanlines
                | OverlayKind::Vignette,
                ..,
            )) => &[
                "Finish the picture of {o} with {a}",
                "Overlay {a} on the picture",
                "Give the image of {o} {a}",
                "Let the picture of {o} show {a}",
                "Print the picture of {o} with {a}",
            ],
            _ => &[
                "Overlay {a} on the picture",
                "Fill the air around {o} with {a}",
                "Add {a} over the whole scene",
                "Let {a} drift across {o}",
                "Blend {a} over the image of {o}",
                "Top off the image with {a}",
            ],
        },
        Category::Light if says(&["shad", "blinds", "dusk", "hour"]) => &[
            "Relight {o} using {a}",
            "Let {a} fall on {o}",
            "Show {o} in {a}",
            "Set the scene with {o} in {a}",
        ],
        Category::Light => &[
            "Light {o} with {a}",
            "Bathe {o} in {a}",
            "Illuminate the scene with {a}",
            "Relight {o} using {a}",
            "Let {a} fall on {o}",
            "Cast {a} over {o}",
        ],
    }
}

/// Second clauses, after "and": {a} is the wording, "it" the thing.
fn second_clauses(attribute: &Attribute, wording: &str) -> &'static [&'static str] {
    let says = |words: &[&str]| words.iter().any(|w| wording.contains(w));
    match attribute.category {
        Category::Color => &["recolor it in {a}", "shift its colors to {a}"],
        Category::Tone => &["grade everything with {a}", "finish with {a}"],
        Category::Style => &["style it all like {a}", "give it the look of {a}"],
        Category::Object => &["add {a} beside it", "place {a} nearby", "include {a}"],
        Category::Background => &["set it against {a}", "put {a} behind it"],
        Category::Material => &["make it look like {a}", "give it the feel of {a}"],
        Category::Pattern => &["decorate it with {a}", "print {a} on it"],
        Category::Overlay => match attribute.look {
            Some(Look::Overlay(OverlayKind::Frame, ..)) => &["put {a} around it all"],
            Some(Look::Overlay(
                OverlayKind::Grain
                | OverlayKind::Scratches
                | OverlayKind::LightLeak
                | OverlayKind::Scanlines
                | OverlayKind::Vignette,
                ..,
            )) => &["add {a} over the scene", "finish with {a}"],
            _ => &[
                "add {a} over the scene",
                "finish with {a}",
                "let {a} drift over it",
            ],
        },
        Category::Light if says(&["shad", "blinds", "dusk", "hour"]) => &["show it in {a}"],
        Category::Light => &["light it with {a}", "bathe it in {a}"],
    }
}

const TAILS: &[&str] = &[
    "for a {t} mood",
    "to give it a {t} feel",
    "for a {t} touch",
    "so that it feels {t}",
    "with a {t} spirit",
];

/// Feelings that go with a taste.
pub fn tones(cluster: Cluster) -> &'static [&'static str] {
    match cluster {
        Cluster::Cabin => &["cozy", "rugged"],
        Cluster::Coastal => &["breezy", "relaxed"],
        Cluster::Cyber => &["futuristic", "electric"],
        Cluster::Botanic => &["fresh", "organic"],
        Cluster::Minimal => &["calm", "clean"],
        Cluster::Retro => &["nostalgic", "groovy"],
        Cluster::Gothic => &["dark", "haunting"],
        Cluster::Kawaii => &["cute", "sweet"],
        Cluster::Steam => &["inventive", "mechanical"],
        Cluster::Cosmic => &["cosmic", "vast"],
        Cluster::Fantasy => &["magical", "enchanted"],
        Cluster::Boho => &["free-spirited", "earthy"],
        Cluster::Luxury => &["elegant", "opulent"],
        Cluster::Urban => &["edgy", "raw"],
        Cluster::Zen => &["serene", "balanced"],
        Cluster::Festive => &["festive", "merry"],
        Cluster::Harvest => &["homely", "mellow"],
        Cluster::Tropical => &["sunny", "exotic"],
        Cluster::Pop => &["bold", "playful"],
        Cluster::Noir => &["mysterious", "dramatic"],
        Cluster::Western => &["dusty", "adventurous"],
        Cluster::Painterly => &["artistic", "gentle"],
        Cluster::Abyss => &["deep", "dreamlike"],
        Cluster::Party => &["joyful", "lively"],
    }
}

/// Puts the first attribute, and the second if there is one, into a sentence about the thing
/// `object` ("the red mug"). Ends with a full stop. Panics on no attribute.
pub fn instruction(
    random: &mut Philox,
    object: &str,
    attributes: &[&Attribute],
    tone: Option<&str>,
) -> String {
    let main = attributes[0];
    let wording = say(random, main);
    let clause = pick(random, clauses(main, &wording));
    let mut text = fill(clause, object, &wording);
    if let Some(second) = attributes.get(1) {
        let wording = say(random, second);
        let clause = pick(random, second_clauses(second, &wording));
        text += " and ";
        text += &fill(clause, object, &wording);
    }
    if let Some(tone) = tone {
        let tail = pick(random, TAILS).replace("{t}", tone);
        text += if random.uniform() < 0.3 { ", " } else { " " };
        text += &with_article(&tail, tone);
    }
    text + "."
}

fn pick<'a>(random: &mut Philox, from: &[&'a str]) -> &'a str {
    random.choose(from).copied().unwrap_or("")
}

/// One of the attribute's wordings; the name itself four times in ten.
pub fn say(random: &mut Philox, attribute: &Attribute) -> String {
    let wordings: Vec<_> = attribute.wordings().collect();
    match random.uniform() < 0.4 {
        true => attribute.name.to_string(),
        false => pick(random, &wordings).to_string(),
    }
}

fn fill(clause: &str, object: &str, wording: &str) -> String {
    clause.replace("{o}", object).replace("{a}", wording)
}

/// "a elegant" becomes "an elegant".
fn with_article(tail: &str, tone: &str) -> String {
    let vowel = tone.starts_with(['a', 'e', 'i', 'o', 'u']);
    match vowel {
        true => tail.replace(&format!("a {tone}"), &format!("an {tone}")),
        false => tail.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vocabulary;
    use std::collections::BTreeSet;

    #[test]
    fn every_attribute_is_recognised_in_its_own_instructions() {
        let mut random = Philox::new(5, 0);
        for a in vocabulary::all() {
            for _ in 0..4 {
                let text = instruction(&mut random, "the mug", &[a], Some("calm"));
                let found = vocabulary::mentioned(&text);
                assert!(found.iter().any(|f| f.name == a.name), "{}: {text}", a.name);
                assert!(!text.contains('{') && text.ends_with('.'), "{text}");
            }
        }
    }

    #[test]
    fn verbs_suit_what_is_asked_for() {
        let said = |name: &str| -> String {
            let attribute = vocabulary::find(name).unwrap();
            let one = |i| instruction(&mut Philox::new(2, i), "the mug", &[attribute], None);
            (0..60).map(one).collect::<Vec<_>>().join("\n")
        };
        for (name, misfits) in [
            ("film grain", &["the air", "drift", "Paint", "Wash"][..]),
            ("a polaroid frame", &["the air", "drift", "over the whole"]),
            ("a dark vignette", &["drift", "the air"]),
            ("line art", &["into line art", "as line art"]),
            ("high contrast", &["Wash"]),
            ("window-blind shadows", &["Light", "Illuminate", "Bathe"]),
        ] {
            let text = said(name);
            for misfit in misfits {
                assert!(!text.contains(misfit), "{name}: {misfit} in\n{text}");
            }
        }
        assert!(said("falling snow").contains("the air"));
    }

    #[test]
    fn one_taste_is_said_in_many_ways() {
        let wood = vocabulary::find("rustic wood").unwrap();
        let snow = vocabulary::find("falling snow").unwrap();
        let said: BTreeSet<_> = (0..200)
            .map(|i| instruction(&mut Philox::new(1, i), "the chair", &[wood, snow], None))
            .collect();
        assert!(said.len() > 80, "{} different of 200", said.len());
    }
}
