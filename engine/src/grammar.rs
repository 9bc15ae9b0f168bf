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

use crate::vocabulary::{self, Attribute, Category, Cluster, LightKind, Look, OverlayKind};
use simpatico_schema::random::Philox;
use std::collections::BTreeSet;
use std::sync::OnceLock;

/// How a wording of a style goes into a sentence.
enum Manner {
    /// A thing one can turn a picture into: "a watercolor painting".
    Thing,
    /// Something a picture has: "a comic panel look".
    Look,
    /// What it is done in: "anime style", "tiny painted dots".
    In,
    /// An art: "pixel art".
    Art,
}

fn manner(wording: &str) -> Manner {
    let last = wording.rsplit(' ').next().unwrap_or(wording);
    match last {
        "look" => Manner::Look,
        _ if counted(wording) => Manner::Thing,
        "style" | "brushwork" | "work" | "inks" | "panes" | "paint" | "dots" | "stones"
        | "tiles" | "shapes" | "lines" | "strokes" | "washes" | "paper" | "graphics"
        | "printing" => Manner::In,
        _ => Manner::Art,
    }
}

fn counted(wording: &str) -> bool {
    ["a ", "an ", "the "].iter().any(|w| wording.starts_with(w))
}

/// Whether something hangs or floats above, rather than stands beside.
fn overhead(name: &str) -> bool {
    [
        "exposed beams",
        "antlers on the wall",
        "a crystal chandelier",
        "an airship",
        "a ringed planet",
        "a crescent moon",
        "a drone",
        "a dreamcatcher",
    ]
    .contains(&name)
}

/// Main clauses that fit an attribute in this wording: {o} is the thing, {a} the wording. The
/// verb must suit what is asked for: snow can fill the air, film grain cannot; a frame goes
/// around a picture; beams are above, not beside; one thing surrounds nothing; one can turn
/// something into "a watercolor" but hardly into "line art".
fn clauses(attribute: &Attribute, wording: &str) -> &'static [&'static str] {
    let says = |words: &[&str]| words.iter().any(|w| wording.contains(w));
    let many = !counted(wording) || says(&["bunch of", "row of", "cluster of", "strands"]);
    match attribute.category {
        Category::Color => &[
            "Recolor {o} in {a}",
            "Change the colors of {o} to {a}",
            "Give {o} a color scheme of {a}",
            "Repaint {o} in {a}",
            "Shift the palette of {o} to {a}",
            "Make {o} stand out in {a}",
            "Dress {o} in {a}",
        ],
        Category::Tone if says(&["contrast", "black", "monochrome", "processing", "look"]) => &[
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
        Category::Style => match manner(wording) {
            Manner::Thing => &[
                "Redraw {o} as {a}",
                "Turn the picture of {o} into {a}",
                "Present {o} as if it were {a}",
                "Transform the scene with {o} into {a}",
                "Reimagine {o} in the manner of {a}",
            ],
            Manner::Look => &[
                "Give {o} {a}",
                "Give the picture of {o} {a}",
                "Restyle {o} with {a}",
                "Redo the picture of {o} with {a}",
                "Go for {a} in the picture of {o}",
            ],
            Manner::In => &[
                "Redraw {o} in {a}",
                "Render {o} in {a}",
                "Restyle the image of {o} in {a}",
                "Redo the picture of {o} in {a}",
                "Show {o} done in {a}",
            ],
            Manner::Art => &[
                "Redraw {o} in the style of {a}",
                "Reimagine {o} in the manner of {a}",
                "Restyle the image of {o} after {a}",
                "Redo the picture of {o} in the style of {a}",
                "Give the picture of {o} the character of {a}",
            ],
        },
        Category::Object if overhead(attribute.name) => match says(&["overhead"]) {
            true => &["Include {a} in the scene with {o}", "Show {o} with {a}"],
            false => &[
                "Add {a} above {o}",
                "Put {a} high over {o}",
                "Include {a} in the scene with {o}",
                "Let {a} appear above {o}",
                "Show {o} below {a}",
            ],
        },
        Category::Object if many => &[
            "Add {a} next to {o}",
            "Place {a} around {o}",
            "Put {a} close to {o}",
            "Include {a} in the scene with {o}",
            "Surround {o} with {a}",
            "Bring {a} into the picture near {o}",
        ],
        Category::Object => &[
            "Add {a} next to {o}",
            "Place {a} beside {o}",
            "Put {a} close to {o}",
            "Include {a} in the scene with {o}",
            "Bring {a} into the picture near {o}",
            "Let {a} accompany {o}",
        ],
        Category::Background => &[
            "Place {o} in front of {a}",
            "Set {o} against {a}",
            "Replace the background behind {o} with {a}",
            "Move {o} to a scene with {a}",
            "Show {a} behind {o}",
            "Swap the backdrop of {o} for {a}",
        ],
        Category::Material
            if says(&[
                "finish", "surface", "coat", "shell", "lattice", "weave", "folds",
            ]) =>
        {
            &[
                "Give {o} {a}",
                "Remake {o} with {a}",
                "Let {o} have {a}",
                "Replace the outside of {o} with {a}",
            ]
        }
        Category::Material => &[
            "Make {o} out of {a}",
            "Give {o} a surface of {a}",
            "Remake {o} in {a}",
            "Cover {o} with {a}",
            "Let {o} look as if made from {a}",
            "Change the material of {o} to {a}",
        ],
        Category::Pattern if says(&["stripe", "line", "wave", "zigzag", "chevron", "swirl"]) => &[
            "Cover {o} with {a}",
            "Print {a} on {o}",
            "Decorate {o} with {a}",
            "Let {a} run across {o}",
            "Put {a} all over {o}",
        ],
        Category::Pattern => &[
            "Cover {o} with {a}",
            "Print {a} on {o}",
            "Decorate {o} with {a}",
            "Wrap {o} in {a}",
            "Put {a} all over {o}",
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
                | OverlayKind::Vignette
                | OverlayKind::Splatter,
                ..,
            )) => &[
                "Finish the picture of {o} with {a}",
                "Overlay {a} on the picture of {o}",
                "Give the image of {o} {a}",
                "Let the picture of {o} show {a}",
            ],
            Some(Look::Overlay(OverlayKind::Rain, ..)) => &[
                "Let {a} fall around {o}",
                "Fill the air around {o} with {a}",
                "Show {o} in {a}",
                "Add {a} over the whole scene with {o}",
                "Blend {a} over the image of {o}",
            ],
            _ => &[
                "Overlay {a} on the picture of {o}",
                "Fill the air around {o} with {a}",
                "Add {a} over the whole scene with {o}",
                "Let {a} drift across {o}",
                "Blend {a} over the image of {o}",
                "Top off the image of {o} with {a}",
            ],
        },
        Category::Light if matches!(attribute.look, Some(Look::Light(LightKind::Rim, ..))) => &[
            "Give {o} {a}",
            "Relight {o} using {a}",
            "Pick {o} out with {a}",
            "Set {o} apart with {a}",
        ],
        Category::Light if says(&["shad", "blinds", "dusk", "hour"]) => &[
            "Relight {o} using {a}",
            "Let {a} fall on {o}",
            "Show {o} in {a}",
            "Set the scene with {o} in {a}",
        ],
        Category::Light if says(&["spotlight"]) => &[
            "Light {o} with {a}",
            "Put {o} under {a}",
            "Turn {a} on {o}",
            "Let {a} fall on {o}",
        ],
        Category::Light => &[
            "Light {o} with {a}",
            "Bathe {o} in {a}",
            "Illuminate the scene around {o} with {a}",
            "Relight {o} using {a}",
            "Let {a} fall on {o}",
            "Cast {a} over {o}",
        ],
    }
}

/// Second clauses, after "and": {a} is the wording, {o} the thing, or "it" for it.
fn second_clauses(attribute: &Attribute, wording: &str) -> &'static [&'static str] {
    let says = |words: &[&str]| words.iter().any(|w| wording.contains(w));
    match attribute.category {
        Category::Color => &["recolor {o} in {a}", "repaint {o} in {a}"],
        Category::Tone => &["grade everything with {a}", "finish with {a}"],
        Category::Style => match manner(wording) {
            Manner::Thing => &["style it all like {a}", "make {o} look like {a}"],
            Manner::Look => &["give it all {a}", "finish with {a}"],
            Manner::In => &["render it all in {a}", "redraw {o} in {a}"],
            Manner::Art => &["style it all like {a}", "give {o} the look of {a}"],
        },
        Category::Object if overhead(attribute.name) => &["include {a}", "add {a}"],
        Category::Object => &["add {a} beside {o}", "place {a} nearby", "include {a}"],
        Category::Background => &["set {o} against {a}", "put {a} behind {o}"],
        Category::Material => &["make {o} look like {a}", "give {o} the feel of {a}"],
        Category::Pattern => &["decorate {o} with {a}", "print {a} on {o}"],
        Category::Overlay => match attribute.look {
            Some(Look::Overlay(OverlayKind::Frame, ..)) => &["put {a} around it all"],
            Some(Look::Overlay(
                OverlayKind::Grain
                | OverlayKind::Scratches
                | OverlayKind::LightLeak
                | OverlayKind::Scanlines
                | OverlayKind::Vignette
                | OverlayKind::Splatter,
                ..,
            )) => &["add {a} over the scene", "finish with {a}"],
            Some(Look::Overlay(OverlayKind::Rain, ..)) => {
                &["let {a} fall around {o}", "add {a} over the scene"]
            }
            _ => &[
                "add {a} over the scene",
                "finish with {a}",
                "let {a} drift over {o}",
            ],
        },
        Category::Light if matches!(attribute.look, Some(Look::Light(LightKind::Rim, ..))) => {
            &["give {o} {a}", "pick {o} out with {a}"]
        }
        Category::Light if says(&["shad", "blinds", "dusk", "hour"]) => &["show {o} in {a}"],
        Category::Light if says(&["spotlight"]) => &["put {o} under {a}", "light {o} with {a}"],
        Category::Light => &["light {o} with {a}", "bathe {o} in {a}"],
    }
}

const TAILS: &[&str] = &[
    "for a {t} mood",
    "to give it a {t} feel",
    "for a {t} touch",
    "so that it feels {t}",
    "with a {t} air",
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
        Cluster::Cosmic => &["cosmic", "otherworldly"],
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
        Cluster::Abyss => &["quiet", "dreamlike"],
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
    let clause = pick_apart(random, clauses(main, &wording), &wording);
    let mut text = fill(clause, object, &wording);
    if let Some(second) = attributes.get(1) {
        let wording = say(random, second);
        let clause = pick_apart(random, second_clauses(second, &wording), &wording);
        // "It" is the thing only where the thing was named last, and is one.
        let thing =
            match main.category == Category::Object || !text.contains(object) || plural(object) {
                true => object,
                false => "it",
            };
        text += " and ";
        text += &fill(clause, thing, &wording);
    }
    if let Some(tone) = tone {
        let tail = pick(random, TAILS).replace("{t}", tone);
        text += if random.uniform() < 0.3 { ", " } else { " " };
        text += &with_article(&tail, tone);
    }
    text + "."
}

/// What the second change of an instruction begins with: " and add ", " and recolor " and so on.
/// "Black and gold" is one thing.
pub fn second_changes() -> &'static [String] {
    static BEGINNINGS: OnceLock<Vec<String>> = OnceLock::new();
    BEGINNINGS.get_or_init(|| {
        let wordings = vocabulary::all().iter();
        let wordings = wordings.flat_map(|a| a.wordings().map(move |w| (a, w)));
        let changes = wordings.flat_map(|(a, w)| [clauses(a, w), second_clauses(a, w)].concat());
        let verbs = changes.filter_map(|clause| Some(clause.split(' ').next()?.to_lowercase()));
        let verbs: BTreeSet<String> = verbs.collect();
        verbs.iter().map(|verb| format!(" and {verb} ")).collect()
    })
}

fn pick<'a>(random: &mut Philox, from: &[&'a str]) -> &'a str {
    random.choose(from).copied().unwrap_or("")
}

/// A clause that does not say again what the wording says: no "print a floral print", no "let
/// drifting petals drift".
fn pick_apart<'a>(random: &mut Philox, from: &[&'a str], wording: &str) -> &'a str {
    let fresh: Vec<&str> = from
        .iter()
        .copied()
        .filter(|c| !echoes(c, wording))
        .collect();
    match fresh.is_empty() {
        true => pick(random, from),
        false => pick(random, &fresh),
    }
}

/// Whether two texts share a word of four letters or more, endings aside.
fn echoes(a: &str, b: &str) -> bool {
    let stems = |text: &str| -> Vec<String> {
        text.to_lowercase()
            .split(|c: char| !c.is_alphabetic())
            .filter(|w| w.len() >= 4 && !["with", "from", "into", "look"].contains(w))
            .map(|w| w.chars().take(5).collect::<String>())
            .map(|w| w.trim_end_matches(['s', 'e', 'i']).to_string())
            .collect()
    };
    let (a, b) = (stems(a), stems(b));
    a.iter().any(|x| b.contains(x))
}

/// Whether a thing's name is a plural.
fn plural(object: &str) -> bool {
    object.ends_with('s') && !object.ends_with("ss") && !object.ends_with("us")
}

/// One of the attribute's wordings, as it stands in a sentence; the name itself four times in
/// ten.
pub fn say(random: &mut Philox, attribute: &Attribute) -> String {
    let wordings: Vec<_> = attribute.wordings().collect();
    let wording = match random.uniform() < 0.4 {
        true => attribute.name,
        false => pick(random, &wordings),
    };
    // Names are bare ("woodcut print"); a single thing wants its article.
    let last = wording.rsplit(' ').next().unwrap_or(wording);
    let single = match attribute.category {
        Category::Style => [
            "painting",
            "sketch",
            "drawing",
            "print",
            "screenprint",
            "poster",
            "still",
            "mural",
            "illustration",
            "engraving",
            "etching",
            "portrait",
            "render",
            "collage",
            "card",
            "page",
            "design",
        ]
        .contains(&last),
        Category::Tone => ["tone", "tint", "grade", "haze", "cast"].contains(&last),
        _ => false,
    };
    match single && !counted(wording) {
        true if wording.starts_with(['a', 'e', 'i', 'o']) => format!("an {wording}"),
        true => format!("a {wording}"),
        false => wording.to_string(),
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
    fn single_things_have_their_article_and_clauses_do_not_echo_the_wording() {
        for a in vocabulary::all() {
            for i in 0..60 {
                let text = instruction(&mut Philox::new(3, i), "the skis", &[a], None);
                for fault in [
                    "of woodcut print",
                    "after woodcut print",
                    "like chalk drawing",
                    "with sepia tone",
                    "a golden tint tint",
                    "into a comic panel look",
                    "as a comic panel look",
                    "drifting petals drift",
                    "Print printed",
                    "Print a floral print",
                    "with a warm amber grade to",
                    "Grade the whole picture with a warm amber grade",
                    "Wash the image in an old sepia wash",
                    "Surround the skis with a ",
                    "beams next to",
                    "rain drift",
                ] {
                    let several = ["a bunch of", "a row of", "a cluster of"];
                    let right = several.iter().any(|w| text.contains(w));
                    assert!(right || !text.contains(fault), "{fault:?}: {text}");
                }
            }
        }
    }

    #[test]
    fn it_is_the_thing_and_nothing_else() {
        let airship = vocabulary::find("an airship").unwrap();
        let coral = vocabulary::find("coral").unwrap();
        let snow = vocabulary::find("snowy mountains").unwrap();
        for i in 0..40 {
            let random = &mut Philox::new(4, i);
            let text = instruction(random, "the couch", &[airship, coral], None);
            assert!(!text.contains(" it ") && !text.contains(" its "), "{text}");
            let text = instruction(random, "the skis", &[snow, coral], None);
            assert!(!text.contains(" it "), "{text}");
        }
    }

    #[test]
    fn second_changes_begin_so_and_first_ones_hold_no_such_words() {
        let (mut random, all) = (Philox::new(6, 0), vocabulary::all());
        let cut = |text: &str| -> String {
            let ends = second_changes().iter().filter_map(|and| text.find(and));
            text[..ends.min().unwrap_or(text.len())].to_string()
        };
        for (i, a) in all.iter().enumerate() {
            let b = &all[(i * 7 + 11) % all.len()];
            // The same draws but for the second change.
            let (mut one, mut two) = (random.clone(), random.clone());
            let first = instruction(&mut one, "the salt and pepper", &[a], None);
            let both = instruction(&mut two, "the salt and pepper", &[a, b], Some("elegant"));
            assert_eq!(cut(&both) + ".", first, "{both}");
            let alone = instruction(&mut random, "the salt and pepper", &[a], Some("calm"));
            assert_eq!(cut(&alone), alone);
        }
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
