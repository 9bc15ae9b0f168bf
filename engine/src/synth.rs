//! The synthetic community: users with taste, what they said, and what they would rather hear.
//!
//! How a user comes to be, in order: two or three taste clusters with shares (clusters are not
//! equally common); likes drawn from the clusters by share and rarity, plus one to three quirks
//! from anywhere; dislikes drawn mostly from clusters that rub the main one the wrong way; a
//! small part of both flipped by noise. A fifth of the likes is then *held out*: they appear in
//! no event and no training pair. A tenth of the users is held out whole.
//!
//! What makes it worth learning from: the clusters overlap and are nowhere named in the events,
//! so that a like nobody stated ("exposed beams" for a lover of leather sofas) can be known from
//! neighbours only; a third of the training pairs prefer such unstated attributes. Wording comes
//! from a grammar; a thirtieth of the pairs is the wrong way round.
//!
//! 3,000 users × 4 captions × 6 edit types give 72,000 pairs, 144,000 instructions. Everything is
//! a function of the seed; user *i* uses stream *i* alone, so fewer users are a prefix of more.
//!
//! Files (`dataset synth`): events, attributes, users, captions, pairs as gzip JSON lines or as
//! Parquet, and splits.json. [`read`] takes the same back.

use crate::error::{Error, Result};
use crate::grammar;
use crate::params::write_whole;
use crate::plot;
use crate::table::{read_rows, write_rows};
use crate::vocabulary::{self, Attribute, Category, Cluster, EditType};
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::PreferencePair;
use simpatico_schema::formats::{Line, Lines};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What to make.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SynthOptions {
    /// How many users.
    pub users: usize,
    /// Decides everything.
    pub seed: u64,
    /// The share of users held out whole.
    pub held_out_users: f32,
    /// The share of each user's likes held out.
    pub held_out_likes: f32,
    /// The share of pairs and of opinions that are wrong.
    pub noise: f32,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self {
            users: 3000,
            seed: 0,
            held_out_users: 0.1,
            held_out_likes: 0.2,
            noise: 0.03,
        }
    }
}

/// A user as generated. The clusters are the truth behind; no model is shown them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SynthUser {
    /// The name, as in events.
    pub user: String,
    /// Age, geography and means, as the paper's profiles have them.
    pub demographics: Demographics,
    /// Themes in the user's own words.
    pub themes: Vec<String>,
    /// Feelings the user goes for.
    pub tones: Vec<String>,
    /// Overlays the user goes for.
    pub overlays: Vec<String>,
    /// Attributes liked, those held out included.
    pub likes: Vec<String>,
    /// Attributes disliked.
    pub dislikes: Vec<String>,
    /// Likes that appear in no event and no training pair.
    pub held_out_likes: Vec<String>,
    /// Likes that training pairs speak of but no event and no profile, for a policy to guess;
    /// see [`with_hidden`]. None in a data set as generated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden_likes: Vec<String>,
    /// The user's four captions.
    pub captions: Vec<String>,
    /// The truth: clusters and their shares.
    pub clusters: Vec<(String, f32)>,
}

/// Who somebody is; drawn apart from taste, so nothing can be read off it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Demographics {
    /// Years.
    pub age: u32,
    /// Where the user lives.
    pub region: String,
    /// Socioeconomic status, in words.
    pub means: String,
}

/// A caption and the thing it is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Caption {
    /// The caption.
    pub caption: String,
    /// The thing, as one word or two ("fire hydrant").
    pub object: String,
}

/// Which part of the data a pair belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// To learn from.
    Train,
    /// A known user's held-out likes.
    HeldOutLikes,
    /// A held-out user.
    HeldOutUser,
}

/// A preference pair with what it is about. Reads as a plain `PreferencePair` too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SynthPair {
    /// Whose preference.
    pub user: String,
    /// The picture's caption.
    pub caption: String,
    /// The instruction preferred.
    pub chosen: String,
    /// The instruction rejected.
    pub rejected: String,
    /// Always "synth".
    pub source: String,
    /// The kind of edit.
    pub edit_type: String,
    /// What the preferred instruction takes up, the main attribute first.
    pub chosen_attributes: Vec<String>,
    /// What the rejected one takes up.
    pub rejected_attributes: Vec<String>,
    /// Which part it belongs to.
    pub split: Split,
}

/// Which users and likes are kept apart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Splits {
    /// The options' seed.
    pub seed: u64,
    /// Users to learn from.
    pub train_users: Vec<String>,
    /// Users held out whole: no event of theirs is in the events file. Their opinions are in
    /// the users file, to be fed in one by one.
    pub held_out_users: Vec<String>,
    /// Likes of every user that are in no event and no training pair.
    pub held_out_likes: BTreeMap<String, Vec<String>>,
}

/// An attribute as the attributes file has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttributeRow {
    /// Its name.
    pub attribute: String,
    /// Its category.
    pub category: String,
    /// The kind of edit it asks for.
    pub edit_type: String,
    /// Other ways to say it.
    pub wordings: Vec<String>,
    /// The clusters it belongs to.
    pub clusters: Vec<String>,
}

/// The whole data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Synth {
    /// What was said, in order of time.
    pub events: Vec<Event>,
    /// The vocabulary.
    pub attributes: Vec<AttributeRow>,
    /// The users.
    pub users: Vec<SynthUser>,
    /// All captions.
    pub captions: Vec<Caption>,
    /// Six kinds of edit for each of four captions of each user.
    pub pairs: Vec<SynthPair>,
    /// What is kept apart.
    pub splits: Splits,
}

/// 2,000 COCO captions (CC BY 4.0, COCO Consortium; licence in engine/data).
pub fn captions() -> Result<Vec<Caption>> {
    let bytes: &[u8] = include_bytes!("../data/coco_captions.tsv.gz");
    let mut lines = Lines::new(bytes).map_err(Error::io("coco_captions.tsv.gz"))?;
    let mut captions = Vec::with_capacity(2000);
    while let Some((_, line)) = lines
        .next_line()
        .map_err(Error::io("coco_captions.tsv.gz"))?
    {
        if let Line::Text(text) = line
            && let Some((object, caption)) = String::from_utf8_lossy(text).split_once('\t')
        {
            captions.push(Caption {
                caption: caption.to_string(),
                object: object.to_string(),
            });
        }
    }
    Ok(captions)
}

/// The thing a caption is about: the first of the known things it names, or "subject".
pub fn object_of(caption: &str) -> String {
    static THINGS: std::sync::OnceLock<BTreeSet<String>> = std::sync::OnceLock::new();
    let things = THINGS.get_or_init(|| {
        captions()
            .unwrap_or_default()
            .into_iter()
            .map(|c| c.object)
            .collect()
    });
    let text = caption.to_lowercase();
    let words: Vec<&str> = text
        .split(|c: char| !c.is_alphanumeric())
        .filter(|w| !w.is_empty())
        .collect();
    for i in 0..words.len() {
        if let Some(two) = words
            .get(i..i + 2)
            .map(|w| w.join(" "))
            .filter(|w| things.contains(w))
        {
            return two;
        }
        let one = words[i]
            .strip_suffix('s')
            .filter(|w| things.contains(*w))
            .unwrap_or(words[i]);
        if things.contains(one) {
            return one.to_string();
        }
    }
    "subject".into()
}

/// Makes the data set. Seconds for 3,000 users.
pub fn generate(options: &SynthOptions) -> Result<Synth> {
    let captions = captions()?;
    let held_out = held_out_users(options);
    let mut synth = Synth {
        events: Vec::new(),
        attributes: vocabulary::all().iter().map(attribute_row).collect(),
        users: Vec::with_capacity(options.users),
        captions: captions.clone(),
        pairs: Vec::with_capacity(options.users * 24),
        splits: Splits {
            seed: options.seed,
            ..Splits::default()
        },
    };
    for i in 0..options.users {
        let mut random = Philox::new(options.seed, 1 + i as u64);
        let user = make_user(i, options, &captions, &mut random);
        if held_out.contains(&i) {
            synth.splits.held_out_users.push(user.user.clone());
        } else {
            synth.splits.train_users.push(user.user.clone());
            synth.events.extend(events_of(&user, &mut random));
        }
        synth
            .splits
            .held_out_likes
            .insert(user.user.clone(), user.held_out_likes.clone());
        pairs_of(
            &user,
            held_out.contains(&i),
            options,
            &captions,
            &mut random,
            &mut synth.pairs,
        );
        synth.users.push(user);
    }
    synth
        .events
        .sort_by(|a, b| (a.at, &a.id).cmp(&(b.at, &b.id)));
    Ok(synth)
}

impl SynthUser {
    /// The likes that are neither held out nor hidden, in order.
    pub fn stated_likes(&self) -> impl Iterator<Item = &String> + Clone {
        let stated =
            |l: &&String| !self.held_out_likes.contains(l) && !self.hidden_likes.contains(l);
        self.likes.iter().filter(stated)
    }

    /// Whether a policy learns from this pair of the user's: one that asks first of all for what
    /// is hidden, where anything is.
    pub fn teaches(&self, pair: &SynthPair) -> bool {
        let hidden = |a: &String| self.hidden_likes.contains(a);
        self.hidden_likes.is_empty() || pair.chosen_attributes.first().is_some_and(hidden)
    }
}

/// The events a user's stated opinions amount to: what a held-out user would have said.
/// Ids make repeating them harmless.
pub fn events_of(user: &SynthUser, random: &mut Philox) -> Vec<Event> {
    const START: i64 = 1_735_689_600_000; // 2025-01-01
    const SPAN: u32 = 90 * 24 * 3600;
    let likes = user.stated_likes().map(|a| (a, Polarity::Like));
    let dislikes = user.dislikes.iter().map(|a| (a, Polarity::Dislike));
    let mut events = Vec::new();
    for (n, (attribute, polarity)) in likes.chain(dislikes).enumerate() {
        let mut event = Event::new(user.user.as_str(), attribute.as_str(), polarity);
        event.at = Some(START + i64::from(random.below(SPAN)) * 1000);
        event.id = Some(format!("{}-{n}", user.user));
        events.push(event);
    }
    events
}

/// The data set with a share of the stated likes of each user who is trained on hidden: out of
/// the events and so of the graph, and out of the profile in words. The pairs stay, and those that
/// ask for what is hidden are what the user then teaches ([`SynthUser::teaches`]). Held-out likes
/// are judged by, and who has only ever learnt to repeat what the graph says has not learnt to
/// guess them. Everyone keeps at least one stated like. 0 hides nothing.
pub fn with_hidden(synth: &Synth, share: f64, seed: u64) -> Synth {
    let mut with = synth.clone();
    for (i, user) in with.users.iter_mut().enumerate() {
        if synth.splits.held_out_users.contains(&user.user) {
            continue;
        }
        let mut random = Philox::new(seed, 0x6869_6400_0000_0000 | i as u64);
        let mut likes: Vec<String> = user.stated_likes().cloned().collect();
        random.shuffle(&mut likes);
        let count = (likes.len() as f64 * share.clamp(0.0, 1.0)).round() as usize;
        likes.truncate(count.min(likes.len().saturating_sub(1)));
        user.hidden_likes = likes;
    }
    let users = with.users.iter().map(|u| (u.user.as_str(), u));
    let users: BTreeMap<&str, &SynthUser> = users.collect();
    with.events.retain(|e| {
        let of = users.get(e.user.as_str());
        of.is_none_or(|u| !u.hidden_likes.contains(&e.attribute))
    });
    with
}

/// The data set with a newcomer beside each user who is trained on: somebody of the same taste
/// who has said little so far, one to four of the user's stated likes and at most one dislike.
/// Their pairs are those of the user's whose preferred instruction asks for nothing else. Without
/// them a policy only ever meets embeddings of people with dozens of edges, and takes the one of
/// a person with three for somebody else's.
pub fn with_newcomers(synth: &Synth, seed: u64) -> Synth {
    let mut with = synth.clone();
    let mut pairs: BTreeMap<&str, Vec<&SynthPair>> = BTreeMap::new();
    for pair in synth.pairs.iter().filter(|p| p.split == Split::Train) {
        pairs.entry(&pair.user).or_default().push(pair);
    }
    for (i, user) in synth.users.iter().enumerate() {
        let Some(pairs) = pairs.get(user.user.as_str()) else {
            continue;
        };
        let mut random = Philox::new(seed, 0x6e65_7700_0000_0000 | i as u64);
        let mut newcomer = SynthUser {
            user: format!("{} as a newcomer", user.user),
            likes: user.stated_likes().cloned().collect(),
            held_out_likes: Vec::new(),
            hidden_likes: Vec::new(),
            ..user.clone()
        };
        random.shuffle(&mut newcomer.likes);
        newcomer.likes.truncate(1 + random.below(4) as usize);
        random.shuffle(&mut newcomer.dislikes);
        newcomer.dislikes.truncate(random.below(2) as usize);
        let asks_for_known = |p: &SynthPair| {
            let known = |a: &String| newcomer.likes.contains(a);
            !p.chosen_attributes.is_empty() && p.chosen_attributes.iter().all(known)
        };
        let own = pairs.iter().filter(|p| asks_for_known(p));
        with.pairs.extend(own.map(|p| SynthPair {
            user: newcomer.user.clone(),
            ..SynthPair::clone(p)
        }));
        with.events.extend(events_of(&newcomer, &mut random));
        with.splits.train_users.push(newcomer.user.clone());
        with.users.push(newcomer);
    }
    with
}

fn held_out_users(options: &SynthOptions) -> BTreeSet<usize> {
    let mut order: Vec<usize> = (0..options.users).collect();
    Philox::new(options.seed, 0).shuffle(&mut order);
    let n = (options.users as f32 * options.held_out_users).round() as usize;
    order.into_iter().take(n).collect()
}

fn attribute_row(a: &Attribute) -> AttributeRow {
    AttributeRow {
        attribute: a.name.into(),
        category: a.category.as_str().into(),
        edit_type: a.edit_type().as_str().into(),
        wordings: a.wordings().map(str::to_string).collect(),
        clusters: a
            .clusters
            .iter()
            .map(|c| format!("{c:?}").to_lowercase())
            .collect(),
    }
}

/// One of the items, by weight.
fn weighted<T: Copy>(random: &mut Philox, items: &[(T, f32)]) -> Option<T> {
    let total: f32 = items.iter().map(|i| i.1).sum();
    let mut at = random.uniform() * total;
    for (item, weight) in items {
        at -= weight;
        if at < 0.0 {
            return Some(*item);
        }
    }
    items.last().map(|i| i.0)
}

/// Clusters by popularity: the first in the list are the commonest (Zipf).
fn draw_clusters(random: &mut Philox) -> Vec<(Cluster, f32)> {
    let popular: Vec<(Cluster, f32)> = Cluster::ALL
        .iter()
        .enumerate()
        .map(|(i, c)| (*c, 1.0 / (2.0 + i as f32)))
        .collect();
    let count = if random.uniform() < 0.6 { 2 } else { 3 };
    let mut chosen: Vec<Cluster> = Vec::new();
    while chosen.len() < count {
        // A second taste is seldom one that rubs the first the wrong way.
        if let Some(c) = weighted(random, &popular)
            && !chosen.contains(&c)
            && (!chosen.iter().any(|d| d.opposites().contains(&c)) || random.uniform() < 0.1)
        {
            chosen.push(c);
        }
    }
    let shares: &[f32] = if count == 2 {
        &[0.65, 0.35]
    } else {
        &[0.5, 0.3, 0.2]
    };
    chosen.into_iter().zip(shares.iter().copied()).collect()
}

/// How much a user of these clusters takes to an attribute, quirks aside.
fn affinity(clusters: &[(Cluster, f32)], attribute: &Attribute) -> f32 {
    let share = clusters
        .iter()
        .filter(|(c, _)| attribute.clusters.contains(c));
    share.map(|(_, s)| s).sum::<f32>() * attribute.weight()
}

fn draw_distinct(
    random: &mut Philox,
    mut pool: Vec<(usize, f32)>,
    count: usize,
    taken: &mut BTreeSet<usize>,
) -> Vec<usize> {
    let mut drawn = Vec::new();
    while drawn.len() < count {
        pool.retain(|(i, w)| *w > 0.0 && !taken.contains(i));
        let Some(i) = weighted(random, &pool) else {
            break;
        };
        taken.insert(i);
        drawn.push(i);
    }
    drawn
}

fn make_user(
    i: usize,
    options: &SynthOptions,
    captions: &[Caption],
    random: &mut Philox,
) -> SynthUser {
    let all = vocabulary::all();
    let clusters = draw_clusters(random);
    let mut taken = BTreeSet::new();
    let wanted: Vec<(usize, f32)> = all
        .iter()
        .map(|a| affinity(&clusters, a))
        .enumerate()
        .collect();
    let count = 8 + random.below(13) as usize;
    let mut likes = draw_distinct(random, wanted, count, &mut taken);
    let anything: Vec<(usize, f32)> = all.iter().map(Attribute::weight).enumerate().collect();
    let quirks = 1 + random.below(3) as usize;
    likes.extend(draw_distinct(random, anything.clone(), quirks, &mut taken));
    let against = opposed(&clusters);
    let unwanted = all.iter().map(|a| {
        let own: f32 = affinity(&clusters, a);
        if own > 0.0 {
            0.0
        } else {
            affinity(&against, a)
        }
    });
    let count = 4 + random.below(6) as usize;
    let mut dislikes = draw_distinct(random, unwanted.enumerate().collect(), count, &mut taken);
    dislikes.extend(draw_distinct(random, anything, 1, &mut taken));
    flip_some(&mut likes, &mut dislikes, options.noise, random);
    random.shuffle(&mut likes);
    let held = ((likes.len() as f32 * options.held_out_likes).round() as usize).min(likes.len());
    let name = |i: &usize| all[*i].name.to_string();
    let mut tones = Vec::new();
    for (c, _) in &clusters {
        tones.extend(random.choose(grammar::tones(*c)).map(|t| t.to_string()));
    }
    let overlays = likes
        .iter()
        .filter(|i| all[**i].category == Category::Overlay)
        .map(name);
    SynthUser {
        user: format!("u{i:04}"),
        demographics: demographics(random),
        themes: clusters
            .iter()
            .map(|(c, _)| c.theme().to_string())
            .collect(),
        tones,
        overlays: overlays.collect(),
        held_out_likes: likes[..held].iter().map(name).collect(),
        hidden_likes: Vec::new(),
        likes: likes.iter().map(name).collect(),
        dislikes: dislikes.iter().map(name).collect(),
        captions: (0..4)
            .filter_map(|_| random.choose(captions).map(|c| c.caption.clone()))
            .collect(),
        clusters: clusters
            .iter()
            .map(|(c, s)| (format!("{c:?}").to_lowercase(), *s))
            .collect(),
    }
}

fn opposed(clusters: &[(Cluster, f32)]) -> Vec<(Cluster, f32)> {
    let own: Vec<Cluster> = clusters.iter().map(|c| c.0).collect();
    clusters
        .iter()
        .flat_map(|(c, s)| c.opposites().iter().map(move |o| (*o, *s)))
        .filter(|(o, _)| !own.contains(o))
        .collect()
}

/// Noise: an opinion now and then is the other way round.
fn flip_some(likes: &mut Vec<usize>, dislikes: &mut Vec<usize>, share: f32, random: &mut Philox) {
    let mut flip = |from: &mut Vec<usize>| -> Vec<usize> {
        let (gone, kept) = from.drain(..).partition(|_| random.uniform() < share);
        *from = kept;
        gone
    };
    let (to_dislikes, to_likes) = (flip(likes), flip(dislikes));
    likes.extend(to_likes);
    dislikes.extend(to_dislikes);
}

fn demographics(random: &mut Philox) -> Demographics {
    const REGIONS: &[&str] = &[
        "North America",
        "South America",
        "Northern Europe",
        "Southern Europe",
        "West Africa",
        "East Africa",
        "Middle East",
        "South Asia",
        "East Asia",
        "Southeast Asia",
        "Oceania",
    ];
    const MEANS: &[&str] = &["modest", "middle", "comfortable", "wealthy"];
    Demographics {
        age: 16 + random.below(60),
        region: random.choose(REGIONS).copied().unwrap_or_default().into(),
        means: random.choose(MEANS).copied().unwrap_or_default().into(),
    }
}

/// The 24 pairs of a user. The last caption's are about held-out likes and are never trained on.
fn pairs_of(
    user: &SynthUser,
    held_out_user: bool,
    options: &SynthOptions,
    captions: &[Caption],
    random: &mut Philox,
    pairs: &mut Vec<SynthPair>,
) {
    let taste = Taste::of(user);
    for (n, caption) in user.captions.iter().enumerate() {
        let object = captions.iter().find(|c| &c.caption == caption);
        let object = format!("the {}", object.map_or("subject", |c| c.object.as_str()));
        let testing = n + 1 == user.captions.len();
        for edit_type in EditType::ALL {
            let chosen = taste.preferred(edit_type, testing, random);
            let rejected = taste.unwanted(edit_type, random);
            let (Some(chosen), Some(rejected)) = (chosen, rejected) else {
                continue;
            };
            let chosen = with_second(
                chosen,
                taste.preferred(any_type(random), testing, random),
                random,
            );
            let rejected = with_second(rejected, taste.unwanted(any_type(random), random), random);
            let feeling = |random: &mut Philox, a: &Attribute| {
                let cluster = random.choose(a.clusters).copied()?;
                (random.uniform() < 0.3).then_some(())?;
                random.choose(grammar::tones(cluster)).copied()
            };
            let (good_tone, bad_tone) = (feeling(random, chosen[0]), feeling(random, rejected[0]));
            let mut sides = [
                (
                    grammar::instruction(random, &object, &chosen, good_tone),
                    names(&chosen),
                ),
                (
                    grammar::instruction(random, &object, &rejected, bad_tone),
                    names(&rejected),
                ),
            ];
            if !testing && random.uniform() < options.noise {
                sides.swap(0, 1);
            }
            let [(chosen, chosen_attributes), (rejected, rejected_attributes)] = sides;
            pairs.push(SynthPair {
                user: user.user.clone(),
                caption: caption.clone(),
                chosen,
                rejected,
                source: "synth".into(),
                edit_type: edit_type.as_str().into(),
                chosen_attributes,
                rejected_attributes,
                split: match (held_out_user, testing) {
                    (true, _) => Split::HeldOutUser,
                    (false, true) => Split::HeldOutLikes,
                    (false, false) => Split::Train,
                },
            });
        }
    }
}

fn names(attributes: &[&'static Attribute]) -> Vec<String> {
    attributes.iter().map(|a| a.name.to_string()).collect()
}

fn any_type(random: &mut Philox) -> EditType {
    random
        .choose(&EditType::ALL)
        .copied()
        .unwrap_or(EditType::Color)
}

/// A second attribute in one instruction of four, never of the first one's kind.
fn with_second(
    first: &'static Attribute,
    second: Option<&'static Attribute>,
    random: &mut Philox,
) -> Vec<&'static Attribute> {
    let take = random.uniform() < 0.25;
    match second.filter(|s| take && s.edit_type() != first.edit_type()) {
        Some(second) => vec![first, second],
        None => vec![first],
    }
}

/// A user's taste, ready to be asked.
struct Taste {
    stated: Vec<&'static Attribute>,
    held_out: Vec<&'static Attribute>,
    dislikes: Vec<&'static Attribute>,
    clusters: Vec<(Cluster, f32)>,
    against: Vec<(Cluster, f32)>,
}

impl Taste {
    fn of(user: &SynthUser) -> Self {
        let look_up = |names: &[String]| names.iter().filter_map(|n| vocabulary::find(n)).collect();
        let likes: Vec<&'static Attribute> = look_up(&user.likes);
        let held_out: Vec<&'static Attribute> = look_up(&user.held_out_likes);
        let is_held = |a: &&'static Attribute| held_out.iter().any(|h| h.name == a.name);
        let clusters: Vec<(Cluster, f32)> = Cluster::ALL
            .iter()
            .filter_map(|c| {
                let word = format!("{c:?}").to_lowercase();
                user.clusters
                    .iter()
                    .find(|(n, _)| *n == word)
                    .map(|(_, s)| (*c, *s))
            })
            .collect();
        Self {
            stated: likes.into_iter().filter(|a| !is_held(a)).collect(),
            dislikes: look_up(&user.dislikes),
            against: opposed(&clusters),
            clusters,
            held_out,
        }
    }

    /// Something of that kind the user would love. In training a stated like two times in
    /// three, else an unstated one that only the neighbours' tastes give away; in testing a
    /// held-out like where there is one of that kind.
    fn preferred(
        &self,
        kind: EditType,
        testing: bool,
        random: &mut Philox,
    ) -> Option<&'static Attribute> {
        let of_kind = |list: &[&'static Attribute]| -> Vec<&'static Attribute> {
            list.iter()
                .copied()
                .filter(|a| a.edit_type() == kind)
                .collect()
        };
        let direct = if testing {
            of_kind(&self.held_out)
        } else {
            of_kind(&self.stated)
        };
        if !direct.is_empty() && (testing || random.uniform() < 0.67) {
            return random.choose(&direct).copied();
        }
        let known = |a: &Attribute| {
            let lists = [&self.stated, &self.held_out, &self.dislikes];
            lists.iter().any(|l| l.iter().any(|k| k.name == a.name))
        };
        let unstated: Vec<(&'static Attribute, f32)> = vocabulary::all()
            .iter()
            .filter(|a| a.edit_type() == kind && !known(a))
            .map(|a| (a, affinity(&self.clusters, a)))
            .filter(|(_, w)| *w > 0.0)
            .collect();
        let near =
            |a: &&'static Attribute| affinity(&self.clusters, a) > 0.0 && a.edit_type() == kind;
        let near: Vec<&'static Attribute> = vocabulary::all().iter().filter(near).collect();
        let allowed =
            |a: &&&'static Attribute| testing || !self.held_out.iter().any(|h| h.name == a.name);
        let near: Vec<&'static Attribute> = near.iter().filter(allowed).copied().collect();
        weighted(random, &unstated)
            .or_else(|| random.choose(&direct).copied())
            .or_else(|| random.choose(&near).copied())
    }

    /// Something of that kind the user would not want: a stated dislike half of the time, else
    /// something of an opposite taste, else anything that is not to the user's taste.
    fn unwanted(&self, kind: EditType, random: &mut Philox) -> Option<&'static Attribute> {
        let stated: Vec<_> = self
            .dislikes
            .iter()
            .copied()
            .filter(|a| a.edit_type() == kind)
            .collect();
        if !stated.is_empty() && random.uniform() < 0.5 {
            return random.choose(&stated).copied();
        }
        let clusters: &[(Cluster, f32)] = if random.uniform() < 0.6 {
            &self.against
        } else {
            &[]
        };
        let liked = |a: &Attribute| {
            affinity(&self.clusters, a) > 0.0
                || self
                    .stated
                    .iter()
                    .chain(&self.held_out)
                    .any(|k| k.name == a.name)
        };
        let pool: Vec<(&'static Attribute, f32)> = vocabulary::all()
            .iter()
            .filter(|a| a.edit_type() == kind && !liked(a))
            .map(|a| {
                (
                    a,
                    if clusters.is_empty() {
                        a.weight()
                    } else {
                        affinity(clusters, a)
                    },
                )
            })
            .filter(|(_, w)| *w > 0.0)
            .collect();
        let any = || vocabulary::all().iter().filter(|a| a.edit_type() == kind);
        let any: Vec<&'static Attribute> = any().filter(|a| !liked(a)).collect();
        weighted(random, &pool)
            .or_else(|| random.choose(&stated).copied())
            .or_else(|| random.choose(&any).copied())
    }
}

/// The tables of a data set.
const TABLES: [&str; 5] = ["events", "attributes", "users", "captions", "pairs"];

/// How a data set's tables are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// gzip JSON lines.
    Jsonl,
    /// Parquet.
    Parquet,
}

impl Format {
    /// The file of a table.
    pub fn file(self, table: &str) -> String {
        match self {
            Self::Jsonl => format!("{table}.jsonl.gz"),
            Self::Parquet => format!("{table}.parquet"),
        }
    }
}

/// Writes the data set's files into a folder and returns their names.
pub fn write(synth: &Synth, folder: &Path, format: Format) -> Result<Vec<String>> {
    let path = |table: &str| folder.join(format.file(table));
    write_rows(&path("events"), &synth.events)?;
    write_rows(&path("attributes"), &synth.attributes)?;
    write_rows(&path("users"), &synth.users)?;
    write_rows(&path("captions"), &synth.captions)?;
    write_rows(&path("pairs"), &synth.pairs)?;
    let splits = serde_json::to_vec_pretty(&synth.splits).map_err(json_error("splits.json"))?;
    write_whole(&folder.join("splits.json"), &splits)?;
    let mut files: Vec<String> = TABLES.iter().map(|t| format.file(t)).collect();
    files.push("splits.json".into());
    Ok(files)
}

/// Reads a data set back from its folder, each table in whichever format is there.
pub fn read(folder: &Path) -> Result<Synth> {
    let splits = folder.join("splits.json");
    let splits = std::fs::read(&splits).map_err(Error::io(&splits))?;
    let path = |table: &str| table_of(folder, table);
    Ok(Synth {
        events: read_rows(&path("events"))?,
        attributes: read_rows(&path("attributes"))?,
        users: read_rows(&path("users"))?,
        captions: read_rows(&path("captions"))?,
        pairs: read_rows(&path("pairs"))?,
        splits: serde_json::from_slice(&splits).map_err(json_error("splits.json"))?,
    })
}

/// A table's file, in whichever format is there.
fn table_of(folder: &Path, table: &str) -> PathBuf {
    let parquet = folder.join(Format::Parquet.file(table));
    match parquet.is_file() {
        true => parquet,
        false => folder.join(Format::Jsonl.file(table)),
    }
}

/// What of a data set goes into a store: its events, and the pairs that are not held out. A
/// folder of these two tables is enough.
pub fn read_to_store(folder: &Path) -> Result<(Vec<Event>, Vec<PreferencePair>)> {
    #[derive(Deserialize)]
    struct Row {
        #[serde(flatten)]
        pair: PreferencePair,
        split: Option<Split>,
    }
    let rows: Vec<Row> = read_rows(&table_of(folder, "pairs"))?;
    let kept = rows
        .into_iter()
        .filter(|r| r.split.is_none_or(|s| s == Split::Train))
        .map(|r| r.pair)
        .collect();
    Ok((read_rows(&table_of(folder, "events"))?, kept))
}

fn json_error(file: &str) -> impl Fn(serde_json::Error) -> Error {
    move |e| Error::bad_model(file, format!("JSON: {e}"))
}

/// What the statistics page and the tests look at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// Users, events, attributes, pairs and instructions.
    pub counts: BTreeMap<String, usize>,
    /// How many users like each attribute, most first.
    pub likes_by_attribute: Vec<(String, usize)>,
    /// Pairs by edit type.
    pub pairs_by_type: BTreeMap<String, usize>,
    /// Pairs by split.
    pub pairs_by_split: BTreeMap<String, usize>,
    /// Different instructions as a share of all.
    pub distinct_instructions: f64,
    /// Words in an instruction: how many instructions have n words.
    pub words: BTreeMap<usize, usize>,
    /// Stated opinions of a user: how many users have n.
    pub edges: BTreeMap<usize, usize>,
    /// The share of likes among all stated opinions.
    pub liked_share: f64,
    /// Users by their main taste, most first.
    pub main_tastes: Vec<(String, usize)>,
}

/// A page with the data set's shape: what it counts, and plots of it.
pub fn page(synth: &Synth) -> String {
    let found = statistics(synth);
    let mut table = String::new();
    let rows = [&found.counts, &found.pairs_by_type, &found.pairs_by_split];
    for (name, count) in rows.into_iter().flatten() {
        table += &format!("{name:<24}{count:>9}\n");
    }
    table += &format!(
        "{:<24}{:>8.1}%\n{:<24}{:>8.1}%\n",
        "likes among opinions",
        100.0 * found.liked_share,
        "different instructions",
        100.0 * found.distinct_instructions
    );
    let histogram = |title: &str, x: &str, y: &str, counts: &BTreeMap<usize, usize>| {
        let points = counts.iter().map(|(n, count)| (*n as f64, *count as f64));
        plot::Lines {
            title: title.into(),
            x: plot::Axis::linear(x),
            y: plot::Axis::linear(y),
            series: vec![plot::Series::new(y, points)],
        }
        .to_svg()
    };
    let ranks = found.likes_by_attribute.iter().enumerate();
    let tail = plot::Lines {
        title: "The long tail".into(),
        x: plot::Axis::logarithmic("rank of the attribute"),
        y: plot::Axis::logarithmic("users who like it"),
        series: vec![plot::Series::new(
            "likes",
            ranks.map(|(i, (_, n))| ((i + 1) as f64, *n as f64)),
        )],
    };
    let tastes = |from: usize| plot::Bars {
        title: "Users by main taste".into(),
        y_label: "users".into(),
        groups: found
            .main_tastes
            .iter()
            .skip(from)
            .take(8)
            .map(|t| t.0.clone())
            .collect(),
        series: vec![(
            "users".into(),
            found
                .main_tastes
                .iter()
                .skip(from)
                .take(8)
                .map(|t| Some((t.1 as f64).into()))
                .collect(),
        )],
    };
    let mut sample = String::new();
    for pair in synth
        .pairs
        .iter()
        .step_by((synth.pairs.len() / 12).max(1))
        .take(12)
    {
        sample += &format!(
            "{}\n  + {}\n  - {}\n",
            pair.caption, pair.chosen, pair.rejected
        );
    }
    plot::page(
        "The synthetic community",
        &[
            plot::verbatim(&table),
            histogram(
                "Stated opinions of a user",
                "opinions",
                "users",
                &found.edges,
            ),
            tail.to_svg(),
            tastes(0).to_svg(),
            tastes(8).to_svg(),
            tastes(16).to_svg(),
            histogram(
                "Length of an instruction",
                "words",
                "instructions",
                &found.words,
            ),
            "<h2>Some pairs</h2>".into(),
            plot::verbatim(&sample),
        ],
    )
}

/// Counts what is in the data set.
pub fn statistics(synth: &Synth) -> Statistics {
    let mut likes: BTreeMap<&str, usize> = BTreeMap::new();
    let mut edges: BTreeMap<&str, usize> = BTreeMap::new();
    for e in &synth.events {
        *edges.entry(&e.user).or_default() += 1;
        if e.polarity == Polarity::Like {
            *likes.entry(&e.attribute).or_default() += 1;
        }
    }
    let mut likes: Vec<(String, usize)> = likes.into_iter().map(|(a, n)| (a.into(), n)).collect();
    likes.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    let instructions = || {
        synth
            .pairs
            .iter()
            .flat_map(|p| [p.chosen.as_str(), p.rejected.as_str()])
    };
    let distinct = instructions().collect::<BTreeSet<_>>().len();
    let tally = |keys: &mut dyn Iterator<Item = String>| {
        let mut counts = BTreeMap::new();
        keys.for_each(|k| *counts.entry(k).or_default() += 1);
        counts
    };
    let mut words: BTreeMap<usize, usize> = BTreeMap::new();
    instructions().for_each(|i| *words.entry(i.split(' ').count()).or_default() += 1);
    let mut by_edges: BTreeMap<usize, usize> = BTreeMap::new();
    edges
        .values()
        .for_each(|n| *by_edges.entry(*n).or_default() += 1);
    let likes_said = synth
        .events
        .iter()
        .filter(|e| e.polarity == Polarity::Like)
        .count();
    let main = synth.users.iter().filter_map(|u| u.clusters.first());
    let main: BTreeMap<String, usize> = tally(&mut main.map(|c| c.0.clone()));
    let mut main_tastes: Vec<(String, usize)> = main.into_iter().collect();
    main_tastes.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let counts = [
        ("users", synth.users.len()),
        ("held-out users", synth.splits.held_out_users.len()),
        ("events", synth.events.len()),
        ("attributes", synth.attributes.len()),
        ("captions", synth.captions.len()),
        ("pairs", synth.pairs.len()),
        ("instructions", synth.pairs.len() * 2),
    ];
    Statistics {
        counts: counts.iter().map(|(k, n)| (k.to_string(), *n)).collect(),
        likes_by_attribute: likes,
        pairs_by_type: tally(&mut synth.pairs.iter().map(|p| p.edit_type.clone())),
        pairs_by_split: tally(&mut synth.pairs.iter().map(|p| format!("{:?}", p.split))),
        distinct_instructions: distinct as f64 / (synth.pairs.len() * 2).max(1) as f64,
        words,
        edges: by_edges,
        liked_share: likes_said as f64 / synth.events.len().max(1) as f64,
        main_tastes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Synth {
        generate(&SynthOptions {
            users: 300,
            ..SynthOptions::default()
        })
        .unwrap()
    }

    #[test]
    fn the_page_shows_the_shape() {
        let synth = small();
        let page = page(&synth);
        assert!(page.matches("<svg").count() >= 5 && page.contains("long tail"));
        let found = statistics(&synth);
        assert!(
            (0.5..0.95).contains(&found.liked_share),
            "{}",
            found.liked_share
        );
        let users: usize = found.main_tastes.iter().map(|t| t.1).sum();
        assert_eq!(users, 300);
    }

    #[test]
    fn the_same_seed_gives_the_same_data_and_fewer_users_are_a_prefix() {
        let options = SynthOptions {
            users: 60,
            ..SynthOptions::default()
        };
        let (a, b) = (generate(&options).unwrap(), generate(&options).unwrap());
        assert_eq!(a, b);
        assert_eq!(small().users[..60], a.users[..]);
        let other = generate(&SynthOptions { seed: 1, ..options }).unwrap();
        assert_ne!(a.users, other.users);
    }

    #[test]
    fn held_out_likes_are_in_no_event_and_no_training_pair() {
        let synth = small();
        let held = &synth.splits.held_out_likes;
        let total: usize = held.values().map(Vec::len).sum();
        let likes: usize = synth.users.iter().map(|u| u.likes.len()).sum();
        assert!((0.17..0.23).contains(&(total as f64 / likes as f64)));
        for e in &synth.events {
            assert!(!held[&e.user].contains(&e.attribute));
            assert!(!synth.splits.held_out_users.contains(&e.user));
        }
        for p in synth.pairs.iter().filter(|p| p.split == Split::Train) {
            assert!(
                p.chosen_attributes
                    .iter()
                    .all(|a| !held[&p.user].contains(a)),
                "{p:?}"
            );
        }
        assert_eq!(synth.splits.held_out_users.len(), 30);
    }

    #[test]
    fn hidden_likes_are_in_no_event_and_are_what_is_taught() {
        let synth = small();
        assert_eq!(with_hidden(&synth, 0.0, 1), synth);
        let with = with_hidden(&synth, 0.5, 1);
        assert_eq!(with, with_hidden(&synth, 0.5, 1));
        let users: BTreeMap<&str, &SynthUser> =
            with.users.iter().map(|u| (u.user.as_str(), u)).collect();
        for user in &with.users {
            let new = synth.splits.held_out_users.contains(&user.user);
            let (stated, hidden) = (user.stated_likes().count(), user.hidden_likes.len());
            assert!(stated >= 1 && stated + hidden + user.held_out_likes.len() == user.likes.len());
            assert_eq!(new || stated < 2, hidden == 0, "{}", user.user);
            let held = |l: &String| user.held_out_likes.contains(l);
            assert!(!user.hidden_likes.iter().any(held));
        }
        for e in &with.events {
            assert!(!users[e.user.as_str()].hidden_likes.contains(&e.attribute));
        }
        let train = || with.pairs.iter().filter(|p| p.split == Split::Train);
        let taught: Vec<&SynthPair> = train()
            .filter(|p| users[p.user.as_str()].teaches(p))
            .collect();
        let share = taught.len() as f64 / train().count() as f64;
        // Half of those about a stated like; the rest take up what neighbours like, or nothing.
        assert!((0.2..0.4).contains(&share), "{share}");
        // Who is new keeps to what is stated.
        let newer = with_newcomers(&with, 1);
        for user in &newer.users[with.users.len()..] {
            assert!(user.hidden_likes.is_empty() && user.stated_likes().count() >= 1);
        }
    }

    #[test]
    fn newcomers_say_little_and_want_only_what_they_said() {
        let synth = small();
        let with = with_newcomers(&synth, 1);
        assert_eq!(with, with_newcomers(&synth, 1));
        assert_eq!(with.users[..synth.users.len()], synth.users[..]);
        let trained = synth.splits.train_users.len();
        assert_eq!(with.users.len(), synth.users.len() + trained);
        let held_out = &synth.splits.held_out_users;
        let mut pairs = 0;
        for newcomer in &with.users[synth.users.len()..] {
            let name = newcomer.user.strip_suffix(" as a newcomer").unwrap();
            assert!(!held_out.iter().any(|u| u == name));
            let user = synth.users.iter().find(|u| u.user == name).unwrap();
            assert!((1..=4).contains(&newcomer.likes.len()) && newcomer.dislikes.len() <= 1);
            let stated = |l: &String| user.likes.contains(l) && !user.held_out_likes.contains(l);
            assert!(newcomer.likes.iter().all(stated));
            let said = with.events.iter().filter(|e| e.user == newcomer.user);
            let edges = newcomer.likes.len() + newcomer.dislikes.len();
            assert_eq!(said.count(), edges);
            for pair in with.pairs.iter().filter(|p| p.user == newcomer.user) {
                let known = |a: &String| newcomer.likes.contains(a);
                assert!(pair.split == Split::Train && pair.chosen_attributes.iter().all(known));
                pairs += 1;
            }
        }
        assert!(pairs > trained, "{pairs} pairs of {trained} newcomers");
    }

    #[test]
    fn every_user_has_24_pairs_whose_words_say_their_attributes() {
        let synth = small();
        assert!(
            synth.pairs.len() as f64 > 300.0 * 24.0 * 0.99,
            "{}",
            synth.pairs.len()
        );
        for p in synth.pairs.iter().step_by(7) {
            let said = vocabulary::mentioned(&p.chosen);
            let main = &p.chosen_attributes[0];
            assert!(said.iter().any(|a| a.name == main), "{main}: {}", p.chosen);
            assert_ne!(p.chosen, p.rejected);
        }
        let stats = statistics(&synth);
        assert!(
            stats.distinct_instructions > 0.9,
            "{}",
            stats.distinct_instructions
        );
    }

    #[test]
    fn likes_have_a_long_tail_and_neighbours_know_what_was_not_said() {
        let synth = small();
        let stats = statistics(&synth);
        let counts: Vec<usize> = stats.likes_by_attribute.iter().map(|a| a.1).collect();
        let top: usize = counts.iter().take(30).sum();
        assert!(
            top * 4 > counts.iter().sum::<usize>(),
            "a tenth of the attributes hold {top}"
        );
        // A held-out like is held by users who share two stated likes more often than by others.
        let likes: BTreeMap<&str, BTreeSet<&str>> = synth
            .users
            .iter()
            .map(|u| {
                (
                    u.user.as_str(),
                    u.likes.iter().map(String::as_str).collect(),
                )
            })
            .collect();
        let (mut near, mut near_n, mut far, mut far_n) = (0, 0, 0, 0);
        for u in synth.users.iter().take(100) {
            let stated: BTreeSet<&str> = u
                .likes
                .iter()
                .filter(|l| !u.held_out_likes.contains(l))
                .map(String::as_str)
                .collect();
            for v in synth.users.iter().filter(|v| v.user != u.user) {
                let shared = likes[v.user.as_str()].intersection(&stated).count();
                let hits = u
                    .held_out_likes
                    .iter()
                    .filter(|h| likes[v.user.as_str()].contains(h.as_str()))
                    .count();
                let (sum, n) = if shared >= 3 {
                    (&mut near, &mut near_n)
                } else {
                    (&mut far, &mut far_n)
                };
                *sum += hits;
                *n += u.held_out_likes.len();
            }
        }
        let (near, far) = (near as f64 / near_n as f64, far as f64 / far_n as f64);
        assert!(near > 2.0 * far, "near {near:.3} far {far:.3}");
    }

    #[test]
    fn files_read_back_as_written() {
        let folder = std::env::temp_dir().join(format!("simpatico-synth-{}", std::process::id()));
        let synth = generate(&SynthOptions {
            users: 20,
            ..SynthOptions::default()
        })
        .unwrap();
        for format in [Format::Jsonl, Format::Parquet] {
            let files = write(&synth, &folder, format).unwrap();
            assert_eq!(files.len(), 6);
            assert_eq!(read(&folder).unwrap(), synth);
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }

    #[test]
    fn the_thing_a_caption_is_about_is_found() {
        assert_eq!(object_of("A red fire hydrant on a street"), "fire hydrant");
        assert_eq!(object_of("Two dogs in the snow"), "dog");
        assert_eq!(object_of("Qwerty"), "subject");
    }
}
