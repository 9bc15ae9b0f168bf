//! Wishes: what a cue asks for, in anybody's words.
//!
//! A small language model hears what it was taught to hear: attributes by their names, kinds of
//! edits, feelings. What a wish names it is left to say in its own words. Any other is compared
//! with all that the model knows how to follow, by the text encoder that attributes have their
//! vectors from: "more snow" lies near "falling snow", "swap the backdrop" near "a new backdrop".
//! The model is then told the nearest of them by its name, one that the user likes before others;
//! for a kind or a feeling, something that carries it out. An instruction is written anew until it
//! takes up one of those near ([`Wish::any_of`]).
//!
//! A bundle says with its role `wishes` that it wants that: the file has the phrases' vectors
//! ([`save_vectors`]). Without it every wish goes to the model as it is, which is right for models
//! that understand plain English.
//!
//! Not here: writing (`policy`).

use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::grammar;
use crate::picture::hex;
use crate::policy::named_in;
use crate::slot::Slot;
use crate::text_vectors::TextEncoder;
use crate::vocabulary::{self, Attribute, Cluster, EditType};
use crate::weights::{Weights, save_safetensors};
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The least cosine at which a phrase says what was wished for. Of fifty wishes looked through,
/// those below it ("surprise me", "bigger") meant nothing we know.
const NEAR: f32 = 0.48;
/// What is so little farther than the nearest phrase is meant as well.
const AS_NEAR: f32 = 0.1;
/// In how many ways the model is told a wish at most.
const TOLD: usize = 3;

/// What a wish asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wish {
    /// The words that the language model is told it in; further ones for where it does not follow
    /// the first.
    pub words: Vec<String>,
    /// The attributes of which an instruction that follows it takes up one. None: we do not know
    /// what it asks for.
    pub any_of: Vec<String>,
    /// Whether more than one thing was wished for, so that one is not enough.
    pub several: bool,
}

/// What a phrase stands for.
#[derive(Clone, Copy, Debug)]
enum Means {
    Attribute(&'static Attribute),
    Kind(EditType),
    Feeling(Cluster),
}

impl Means {
    /// Whether an instruction that takes up the attribute does what the phrase says.
    fn covers(self, attribute: &Attribute) -> bool {
        match self {
            Self::Attribute(a) => a.name == attribute.name,
            Self::Kind(kind) => attribute.edit_type() == kind,
            Self::Feeling(cluster) => attribute.clusters.contains(&cluster),
        }
    }
}

/// All that a policy of ours learns to follow, in a fixed order.
fn phrases() -> Vec<(&'static str, Means)> {
    let names = vocabulary::all()
        .iter()
        .flat_map(|a| a.wordings().map(|w| (w, Means::Attribute(a))));
    let kinds = EditType::ALL
        .into_iter()
        .flat_map(|kind| cue_words(kind).iter().map(move |w| (*w, Means::Kind(kind))));
    let feelings = Cluster::ALL.into_iter().flat_map(|c| {
        grammar::tones(c)
            .iter()
            .map(move |t| (*t, Means::Feeling(c)))
    });
    names.chain(kinds).chain(feelings).collect()
}

fn digest_of(phrases: &[(&str, Means)]) -> String {
    let mut digest = Sha256::new();
    for (words, _) in phrases {
        digest.update(words.as_bytes());
        digest.update(b"\n");
    }
    hex(&digest.finalize())
}

/// Writes the file that the role `wishes` names: the vectors of all phrases, (n, dim) in f16, and
/// the digest of the phrases that they are of.
pub fn save_vectors(encoder: &TextEncoder, file: &Path) -> Result<()> {
    let phrases = phrases();
    let words: Vec<&str> = phrases.iter().map(|(words, _)| *words).collect();
    let vectors = encoder.encode(&words)?;
    let shape = (vectors.len(), encoder.dim);
    let vectors = Tensor::from_vec(vectors.concat(), shape, &Device::Cpu)?.to_dtype(DType::F16)?;
    let tensors = BTreeMap::from([("vectors".to_string(), vectors)]);
    let metadata = BTreeMap::from([("phrases_sha256".to_string(), digest_of(&phrases))]);
    save_safetensors(file, &tensors, &metadata)
}

/// Hears wishes in words that no attribute has.
pub struct Listener {
    phrases: Vec<(&'static str, Means)>,
    vectors: Vec<Vec<f32>>,
    bundle: Bundle,
    device: Device,
    encoder: Slot<Arc<TextEncoder>>,
}

impl Listener {
    /// Reads the vectors; the text encoder only at the first wish that needs it.
    ///
    /// # Errors
    /// [`Error::BadModel`] where the vectors are not those of this vocabulary's phrases.
    pub fn open(bundle: &Bundle, vectors: &Path, device: &Device) -> Result<Self> {
        let phrases = phrases();
        let weights = Weights::open(vectors)?;
        let expected = digest_of(&phrases);
        if weights.metadata().get("phrases_sha256") != Some(&expected) {
            let reason = "holds the vectors of another vocabulary; make it anew with the example \
                          `wish_vectors`";
            return Err(Error::bad_model(vectors.display().to_string(), reason));
        }
        let rows = weights.get_any("vectors", DType::F32, &Device::Cpu)?;
        let vectors = rows.to_vec2::<f32>()?;
        if vectors.len() != phrases.len() {
            let (n, got) = (phrases.len(), vectors.len());
            let reason = format!("tensor \"vectors\": expected {n} rows, got {got}");
            return Err(Error::bad_model(weights.name(), reason));
        }
        Ok(Self {
            phrases,
            vectors,
            bundle: bundle.clone(),
            device: device.clone(),
            encoder: Slot::empty(),
        })
    }

    /// The wish as the policy learnt to hear it, and what follows it.
    fn hear(&self, wish: &str, of: &Wisher, random: &mut Philox) -> Result<Option<Wish>> {
        let encoder = self.encoder.get(|| {
            let role = self.bundle.manifest.roles.text_encoder.as_ref();
            TextEncoder::shared(&self.bundle.role("text_encoder", role)?, &self.device)
        })?;
        let vector = encoder.encode(&[&vocabulary::spelt(wish)])?.concat();
        match self.vectors.first() {
            Some(row) if row.len() == vector.len() => Ok(self.meant(&vector, of, random)),
            _ => {
                let reason = "its vectors have another length than the phrases' of the role wishes";
                Err(Error::bad_model("text encoder", reason))
            }
        }
    }

    /// As `hear`, of the wish's vector at length 1.
    fn meant(&self, vector: &[f32], of: &Wisher, random: &mut Philox) -> Option<Wish> {
        let cosine = |row: &Vec<f32>| row.iter().zip(vector).map(|(a, b)| a * b).sum::<f32>();
        let cosines: Vec<f32> = self.vectors.iter().map(cosine).collect();
        let mut near: Vec<usize> = (0..cosines.len()).collect();
        near.sort_by(|a, b| cosines[*b].total_cmp(&cosines[*a]));
        let least = (cosines[*near.first()?] - AS_NEAR).max(NEAR);
        near.retain(|i| cosines[*i] >= least);
        let follows = |a: &Attribute| near.iter().position(|i| self.phrases[*i].1.covers(a));
        let mut meant: Vec<(&Attribute, usize)> = vocabulary::all()
            .iter()
            .filter_map(|a| Some((a, follows(a)?)))
            .collect();
        // What one dislikes was not meant, unless there is nothing else.
        if meant.iter().any(|(a, _)| !has(of.dislikes, a)) {
            meant.retain(|(a, _)| !has(of.dislikes, a));
        }
        let any_of = meant.iter().map(|(a, _)| a.name.to_string()).collect();
        // The model follows names far better than other words for them, or than what is said in
        // general, and some names better than others.
        random.shuffle(&mut meant);
        meant.sort_by_cached_key(|(a, place)| {
            let means = self.phrases[near[*place]].1;
            let liked = match (has(of.likes, a), has(of.suggestions, a)) {
                (true, _) => 0,
                (false, true) => 1,
                (false, false) => 2,
            };
            let own = matches!(means, Means::Attribute(_)) && liked == 0;
            let far = match means {
                Means::Kind(_) => u32::from(a.rarity),
                Means::Attribute(_) | Means::Feeling(_) => self.distance(&cosines, a),
            };
            (!own, *place, liked, a.look.is_none(), far)
        });
        let told = meant.iter().take(TOLD).map(|(a, _)| a.name.to_string());
        let words: Vec<String> = told.collect();
        (!words.is_empty()).then_some(Wish {
            words,
            any_of,
            several: false,
        })
    }

    /// How far an attribute's names are from the wish, in thousandths.
    fn distance(&self, cosines: &[f32], attribute: &Attribute) -> u32 {
        let named = self
            .phrases
            .iter()
            .zip(cosines)
            .filter_map(|((_, m), c)| match m {
                Means::Attribute(a) if a.name == attribute.name => Some(*c),
                _ => None,
            });
        ((1.0 - named.fold(-1.0, f32::max)) * 1e3) as u32
    }
}

/// Who wishes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wisher<'a> {
    /// Likes.
    pub likes: &'a [String],
    /// What the neighbours like.
    pub suggestions: &'a [String],
    /// Dislikes.
    pub dislikes: &'a [String],
}

fn has(list: &[String], attribute: &Attribute) -> bool {
    list.iter().any(|name| name == attribute.name)
}

/// What `words` ask for. What they name of the vocabulary or of one's own likes is known; for others a `listener`
/// finds what is near, and draws from `random` what of much to say first. A wish that may deny
/// something asks for nothing.
///
/// # Errors
/// [`Error::MissingModel`] where the listener's text encoder is not there.
pub fn understand(
    words: &str,
    of: &Wisher,
    listener: Option<&Listener>,
    random: &mut Philox,
) -> Result<Wish> {
    let as_it_is = |any_of: Vec<String>| Wish {
        words: vec![words.to_string()],
        several: match any_of.len() {
            0 => words.contains(" and "),
            n => n > 1,
        },
        any_of,
    };
    if denies(words) {
        return Ok(as_it_is(Vec::new()));
    }
    let known = vocabulary::mentioned(words).into_iter();
    let mut named: Vec<String> = known.map(|a| a.name.to_string()).collect();
    // What is liked in words of one's own is known by these.
    named.extend(named_in(words, of.likes));
    named.sort_unstable();
    named.dedup();
    if !named.is_empty() {
        return Ok(as_it_is(named));
    }
    let heard = match listener {
        Some(listener) => listener.hear(words, of, random)?,
        None => None,
    };
    Ok(heard.unwrap_or_else(|| as_it_is(Vec::new())))
}

/// Whether a wish may name what is not wanted.
fn denies(wish: &str) -> bool {
    const WORDS: &[&str] = &[
        "no", "not", "never", "nothing", "without", "less", "fewer", "don't", "remove", "avoid",
    ];
    let wish = wish.replace('’', "'");
    let mut words = wish.split(|c: char| !c.is_alphanumeric() && c != '\'');
    words.any(|word| WORDS.contains(&&*word.to_lowercase()))
}

/// What a cue asks for a kind of edit in.
pub(crate) fn cue_words(kind: EditType) -> &'static [&'static str] {
    match kind {
        EditType::Color => &["new colors", "change the colors", "a different color mood"],
        EditType::Style => &[
            "another art style",
            "change the style",
            "make it a piece of art",
        ],
        EditType::ObjectAddition => &[
            "add something",
            "put an object in the scene",
            "one more thing in it",
        ],
        EditType::Background => &["change the background", "another place", "a new backdrop"],
        EditType::Texture => &[
            "another material",
            "change its surface",
            "a new texture or pattern",
        ],
        EditType::Overlay => &[
            "light and atmosphere",
            "something over the picture",
            "change the light",
        ],
    }
}

/// A wish to learn to follow, and what follows it.
pub struct Lesson {
    /// The wish in words.
    pub cue: String,
    /// What an instruction takes up that follows it.
    pub attribute: &'static Attribute,
    /// The feeling that it gives, where that was the wish.
    pub tone: Option<&'static str>,
}

/// A wish to learn to follow: for something by one of its names, whoever likes it; for a kind of
/// edit, which what is `liked` carries out; or for a feeling that goes with something liked.
pub fn lesson(liked: &[&'static Attribute], random: &mut Philox) -> Option<Lesson> {
    const NAMED: &[&str] = &[
        "{}",
        "{}",
        "with {}",
        "make it {}",
        "something with {}",
        "{} please",
    ];
    const FELT: &[&str] = &["make it {}", "{}", "a {} mood"];
    let put = |into: Option<&&str>, words: &str| into.map(|cue| cue.replace("{}", words));
    let draw = random.uniform();
    if draw < 0.6 || liked.is_empty() {
        let attribute = random.choose(vocabulary::all())?;
        let names: Vec<&str> = attribute.wordings().collect();
        let name = *random.choose(&names)?;
        return Some(Lesson {
            cue: put(random.choose(NAMED), name)?,
            attribute,
            tone: None,
        });
    }
    let attribute = *random.choose(liked)?;
    if draw < 0.85 || attribute.clusters.is_empty() {
        let cue = random.choose(cue_words(attribute.edit_type()))?.to_string();
        return Some(Lesson {
            cue,
            attribute,
            tone: None,
        });
    }
    let cluster = *random.choose(attribute.clusters)?;
    let tone = *random.choose(grammar::tones(cluster))?;
    Some(Lesson {
        cue: put(random.choose(FELT), tone)?,
        attribute,
        tone: Some(tone),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener to whom every phrase is a direction of its own, which the text encoder of a
    /// bundle does not have to be there for.
    fn listener() -> Listener {
        let phrases = phrases();
        let n = phrases.len();
        let row = |i| (0..n).map(|j| f32::from(u8::from(i == j))).collect();
        Listener {
            vectors: (0..n).map(row).collect(),
            phrases,
            bundle: Bundle::find("default").unwrap(),
            device: Device::Cpu,
            encoder: Slot::empty(),
        }
    }

    /// The wish whose vector has these cosines to the phrases.
    fn meant(cosines: &[(&str, f32)], of: &Wisher) -> Option<Wish> {
        let listener = listener();
        let mut vector = vec![0.0; listener.phrases.len()];
        for (words, cosine) in cosines {
            let found = listener.phrases.iter().position(|(w, _)| w == words);
            vector[found.unwrap()] = *cosine;
        }
        listener.meant(&vector, of, &mut Philox::new(1, 0))
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn the_nearest_is_told_and_what_is_liked_before_it() {
        let near = [
            ("pure white", 0.6),
            ("a gentle snowfall", 0.7),
            ("a snowy village", 0.65),
        ];
        let nobody = Wisher::default();
        let wish = meant(&near, &nobody).unwrap();
        assert_eq!(
            wish.words,
            ["falling snow", "a snowy village", "pure white"]
        );
        let mut any_of = wish.any_of.clone();
        any_of.sort();
        assert_eq!(any_of, ["a snowy village", "falling snow", "pure white"]);
        let likes = names(&["pure white", "rustic wood"]);
        let dislikes = names(&["falling snow"]);
        let of = Wisher {
            likes: &likes,
            dislikes: &dislikes,
            ..nobody
        };
        let wish = meant(&near, &of).unwrap();
        assert_eq!(wish.words, ["pure white", "a snowy village"]);
        assert!(!wish.any_of.contains(&dislikes[0]));
        // What is disliked is meant where there is nothing else.
        assert_eq!(meant(&near[1..2], &of).unwrap().words, dislikes);
        // What is far is not meant, with others or alone.
        let far = [("a gentle snowfall", 0.7), ("pure white", 0.59)];
        assert_eq!(meant(&far, &nobody).unwrap().any_of, ["falling snow"]);
        assert_eq!(meant(&[("pure white", 0.47)], &nobody), None);
    }

    #[test]
    fn kinds_and_feelings_are_told_by_something_that_one_likes() {
        let likes = names(&["rustic wood", "a pine forest"]);
        let suggestions = names(&["a brick wall", "firelight"]);
        let of = Wisher {
            likes: &likes,
            suggestions: &suggestions,
            ..Wisher::default()
        };
        let place = meant(&[("another place", 0.9)], &of).unwrap();
        assert_eq!(place.words[..2], ["a pine forest", "a brick wall"]);
        let background =
            |name: &String| vocabulary::find(name).unwrap().edit_type() == EditType::Background;
        assert!(place.any_of.iter().all(background) && place.any_of.len() > 20);
        let cozy = meant(
            &[("cozy", 0.9), ("a wool blanket", 0.4)],
            &Wisher::default(),
        )
        .unwrap();
        let cabin = |name: &String| {
            vocabulary::find(name)
                .unwrap()
                .clusters
                .contains(&Cluster::Cabin)
        };
        assert!(
            cozy.any_of.iter().all(cabin) && cozy.words.iter().all(cabin),
            "{cozy:?}"
        );
    }

    #[test]
    fn names_need_no_listener_and_denials_ask_for_nothing() {
        let understood =
            |words| understand(words, &Wisher::default(), None, &mut Philox::new(0, 0)).unwrap();
        let named = understood("some old barn wood please");
        assert_eq!(named.words, ["some old barn wood please"]);
        assert_eq!(named.any_of, ["rustic wood"]);
        for denial in ["no rustic wood", "please don’t make it rustic wood"] {
            assert!(understood(denial).any_of.is_empty());
        }
        let likes = names(&["Grandma's quilt"]);
        let of = Wisher {
            likes: &likes,
            ..Wisher::default()
        };
        let own = understand("with grandma's quilt", &of, None, &mut Philox::new(0, 0)).unwrap();
        assert_eq!(
            (own.words, own.any_of),
            (names(&["with grandma's quilt"]), likes)
        );
        assert!(understood("as Grandma would").any_of.is_empty());
        // Of several wishes one is not enough.
        assert!(understood("rustic wood in falling snow").several);
        assert!(understood("as Grandma and Grandpa would").several);
        assert!(!understood("black and gold").several && !named.several);
    }

    #[test]
    fn the_bundle_has_the_vectors_of_this_vocabulary() {
        let bundle = Bundle::find("default").unwrap();
        let location = bundle.manifest.roles.wishes.clone().unwrap();
        let file = bundle.path(&location).unwrap();
        let listener = Listener::open(&bundle, &file, &Device::Cpu).unwrap();
        for i in [0, 500, listener.phrases.len() - 1] {
            let length: f32 = listener.vectors[i].iter().map(|x| x * x).sum();
            assert!((length - 1.0).abs() < 2e-3, "{length}");
        }
        // A file of other phrases is refused by name.
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("wishes.safetensors");
        let rows = Tensor::zeros((2, 4), DType::F16, &Device::Cpu).unwrap();
        let tensors = BTreeMap::from([("vectors".to_string(), rows)]);
        save_safetensors(&other, &tensors, &BTreeMap::new()).unwrap();
        let said = Listener::open(&bundle, &other, &Device::Cpu)
            .err()
            .unwrap()
            .to_string();
        assert!(said.contains("wish_vectors"), "{said}");
    }

    #[test]
    fn wishes_to_learn_from_are_followed_by_what_they_go_with() {
        let liked: Vec<&Attribute> = vocabulary::all().iter().step_by(40).collect();
        let (mut random, mut kinds) = (Philox::new(4, 0), [0; 3]);
        for _ in 0..300 {
            let wish = lesson(&liked, &mut random).unwrap();
            let named = vocabulary::mentioned(&wish.cue);
            let asks_for_kind = cue_words(wish.attribute.edit_type()).contains(&&*wish.cue);
            let own = liked.iter().any(|a| a.name == wish.attribute.name);
            match wish.tone {
                Some(tone) => assert!(own && wish.cue.contains(tone), "{}", wish.cue),
                None if asks_for_kind => assert!(own),
                None => assert!(
                    named.iter().any(|a| a.name == wish.attribute.name),
                    "{} for {}",
                    wish.attribute.name,
                    wish.cue
                ),
            }
            let kind = match wish.tone {
                Some(_) => 2,
                None => usize::from(asks_for_kind),
            };
            kinds[kind] += 1;
        }
        assert!(kinds.iter().all(|n| *n > 20), "{kinds:?}");
        assert!(lesson(&[], &mut random).is_some());
    }
}
