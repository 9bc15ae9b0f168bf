//! Scenes in words: captions that name the whole picture, instructions that name the change.

use super::Scene;
use crate::vocabulary::{Attribute, Category, strip_article};
use simpatico_schema::random::Philox;

impl Scene {
    /// The scene in words, each attribute by its name.
    pub fn caption(&self) -> String {
        self.caption_with(|a| a.name)
    }

    /// The scene in words, each attribute by any of its wordings.
    pub fn caption_varied(&self, random: &mut Philox) -> String {
        let chosen: Vec<_> = self.attributes.iter().map(|a| wording(a, random)).collect();
        let find = |a: &Attribute| self.attributes.iter().position(|b| b.name == a.name);
        self.caption_with(|a| find(a).map_or(a.name, |i| chosen[i]))
    }

    fn caption_with(&self, say: impl Fn(&'static Attribute) -> &'static str) -> String {
        let mut sorted = self.attributes.clone();
        sorted.sort_by_key(|a| place_in_caption(a.category));
        let painted = |a: &&Attribute| {
            matches!(
                a.category,
                Category::Color | Category::Material | Category::Pattern
            )
        };
        let object = self.subject.word();
        let mut text = match self.color.filter(|_| !sorted.iter().any(painted)) {
            Some(color) => with_article(&format!("{} {object}", color.word())),
            None => with_article(object),
        };
        for attribute in sorted {
            text += match attribute.category {
                Category::Color => " in ",
                Category::Material => " made of ",
                Category::Pattern | Category::Object | Category::Overlay | Category::Tone => {
                    " with "
                }
                Category::Background => " in front of ",
                Category::Light => " under ",
                Category::Style => " as ",
            };
            text += say(attribute);
        }
        text
    }

    /// An instruction that asks for these attributes, in varied words.
    pub fn instruction(&self, edit: &[&'static Attribute], random: &mut Philox) -> String {
        let object = self.subject.word();
        let clauses: Vec<String> = edit
            .iter()
            .map(|a| clause(a, wording(a, random), object, random))
            .collect();
        let mut text = match clauses.as_slice() {
            [] => String::new(),
            [one] => one.clone(),
            [first @ .., last] => format!("{} and {last}", first.join(", ")),
        };
        if let Some(first) = text.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        text
    }
}

fn place_in_caption(category: Category) -> u8 {
    match category {
        Category::Color => 0,
        Category::Material => 1,
        Category::Pattern => 2,
        Category::Object => 3,
        Category::Background => 4,
        Category::Light => 5,
        Category::Overlay => 6,
        Category::Tone => 7,
        Category::Style => 8,
    }
}

fn wording(attribute: &'static Attribute, random: &mut Philox) -> &'static str {
    let all: Vec<_> = attribute.wordings().collect();
    random.choose(&all).copied().unwrap_or(attribute.name)
}

/// "a" or "an" before the words.
fn with_article(words: &str) -> String {
    let vowel = words.starts_with(['a', 'e', 'i', 'o', 'u']);
    format!("{} {words}", if vowel { "an" } else { "a" })
}

/// What one attribute asks for, as an imperative.
fn clause(attribute: &Attribute, say: &str, object: &str, random: &mut Philox) -> String {
    let bare = strip_article(say);
    let forms: &[&str] = match attribute.category {
        Category::Color => &[
            "paint the {o} in {w}",
            "change the {o} to {w}",
            "give the {o} {w}",
            "make the {o} {b}",
            "recolor it in {w}",
        ],
        Category::Material => &[
            "make the {o} out of {w}",
            "turn the {o} into {w}",
            "give the {o} a texture of {w}",
            "remake it in {w}",
            "let the {o} be made of {w}",
        ],
        Category::Pattern => &[
            "cover the {o} with {w}",
            "decorate the {o} with {w}",
            "add {w} to the {o}",
            "give it {w}",
            "print {w} on the {o}",
        ],
        Category::Background => &[
            "place the {o} in front of {w}",
            "change the background to {w}",
            "set it against {w}",
            "put {w} behind the {o}",
            "replace the background with {w}",
        ],
        Category::Overlay => &[
            "add {w}",
            "overlay {w}",
            "fill the air with {w}",
            "cover the scene with {w}",
            "give it {w}",
        ],
        Category::Tone => &[
            "apply {w}",
            "shift the picture to {w}",
            "grade it with {w}",
            "give it {w}",
        ],
        Category::Light => &[
            "light it with {w}",
            "bathe the scene in {w}",
            "add {w}",
            "use {w}",
        ],
        Category::Style => &[
            "turn it into {w}",
            "redraw it as {w}",
            "render the {o} as {w}",
            "make it look like {w}",
        ],
        Category::Object => &[
            "add {w}",
            "put {w} beside the {o}",
            "include {w}",
            "place {w} next to it",
        ],
    };
    let form = random.choose(forms).copied().unwrap_or("add {w}");
    form.replace("{o}", object)
        .replace("{w}", say)
        .replace("{b}", bare)
}

#[cfg(test)]
mod tests {
    use crate::render::{Color, Object, Scene};
    use crate::vocabulary::{self, mentioned};
    use simpatico_schema::random::Philox;

    #[test]
    fn an_instruction_names_every_attribute_it_asks_for() {
        let mut random = Philox::new(5, 0);
        for seed in 0..200 {
            let scene = Scene::random(Object::Lamp, seed);
            let edit = scene.random_edit(3, &mut random);
            let text = scene.instruction(&edit, &mut random);
            let named = mentioned(&text);
            for attribute in &edit {
                assert!(named.iter().any(|a| a.name == attribute.name), "{text}");
            }
        }
    }

    #[test]
    fn a_caption_leaves_out_the_colour_that_a_material_hides() {
        let marble = vocabulary::find("white marble").expect("in the table");
        let beach = vocabulary::find("a sandy beach").expect("in the table");
        let scene = Scene::plain(Object::Umbrella, Color::Red, 1);
        assert_eq!(scene.caption(), "a red umbrella");
        let scene = scene.with(&[beach, marble]);
        assert_eq!(
            scene.caption(),
            "an umbrella made of white marble in front of a sandy beach"
        );
    }
}
