//! Judges instructions: are they this user's, or anyone's?
//!
//! # The protocol
//!
//! 1. The users are held-out ones: no training saw them. A fifth of their likes is in no graph,
//!    no prompt and no pair; only against these is judged.
//! 2. A judge that took no part in training (gte-small, or any sentence encoder) embeds
//!    instructions and *reference sentences*: for each attribute three whole instructions that
//!    ask for it, about three different things. From both sides the side's own mean vector is
//!    subtracted first: what all instructions have in common tells nothing about taste, and
//!    without it all cosines lie near 0.8.
//! 3. Every system writes under four conditions, the paper's Like+Dislike, Likes, Dislikes,
//!    and with no profile in words, so that only the embedding can tell (for a system without
//!    a soft prompt that is the control: nobody's instruction).
//! 4. For each: *own − other*, the mean cosine with the user's held-out likes less that with
//!    the other judged users'; the same on *all likes*, those the system was told of too (the
//!    paper's prompt score, with its control: here it counts to say what somebody said);
//!    *like − dislike*; the *rank* of the user among those judged (mean reciprocal, beside
//!    chance); *neighbours*, own − other on the held-out likes that the user's neighbours would
//!    have suggested, instruction against instruction on the same likes; the share of
//!    instructions that *copy* a stated like, that name a held-out one (a *guess* that came
//!    true), that are *distinct*, and that name the thing in the picture (*on topic*); how far
//!    apart instructions lie *within* a user and *between* users. As a control a fifth condition
//!    writes with *another's* profile and embedding.
//! 5. Five rows that no model wrote: *ceiling*, fresh sentences for the very likes that were
//!    held out; *profile copied*, sentences for stated likes; *floor*, sentences for another
//!    user's stated likes; *a neighbour's own*, what the nearest neighbour's training pairs
//!    prefer; *neighbours' likes*, sentences for what ten neighbours would add. *Of ceiling* is
//!    own − other as a share of the way from the floor.
//! 6. Intervals are 95%, by bootstrap over users, paired where systems are compared; seeds are
//!    averaged within a user first. Systems of one name are one system trained with several
//!    seeds, and count as one.
//!
//! Beside it the policy itself is asked ([`pair_scores`]): on held-out pairs, is the preferred
//! answer the one whose probability rose over the reference, and is the implied probability
//! calibrated? [`cold_start`] repeats Like+Dislike for newcomers known by 0 to 16 opinions, and says
//! by how much one system leads the one before. What a newcomer likes is the same throughout,
//! however much of it was told.
//!
//! One thing no condition switches off: a policy writes anew where it names a stated dislike. That
//! it also does so where it names nothing that is liked ([`crate::policy::PolicyOptions::insist`])
//! is for the caller to switch off where methods are compared.
//! Not here: pictures (`eval_images`), links (`eval_links`).

use crate::error::{Error, Result};
use crate::grammar;
use crate::lora::Adapter;
use crate::plot;
use crate::policy::{Policy, TOGETHER};
use crate::synth::{Caption, Split, Synth, SynthPair, SynthUser};
use crate::text_vectors::TextEncoder;
use crate::train_policy::{PairGroup, Row, reference_logps, score};
use crate::vocabulary;
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::{InstructRequest, TEMPERATURE};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, OverlapMode, Polarity};
use simpatico_storage::{Snapshot, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::ControlFlow;

/// How many opinions a newcomer is known by.
pub const KNOWN: [usize; 6] = [0, 1, 2, 4, 8, 16];

/// How much is judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalOptions {
    /// How many held-out users.
    pub users: usize,
    /// Instructions for each under each seed, each for another caption.
    pub instructions: usize,
    /// Sampling temperature.
    pub temperature: f32,
    /// The seeds of sampling.
    pub seeds: Vec<u64>,
    /// What is written of the profile.
    pub conditions: Vec<Condition>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            users: 100,
            instructions: 2,
            temperature: TEMPERATURE,
            seeds: vec![0],
            conditions: Condition::ALL.to_vec(),
        }
    }
}

/// What is written of a user's profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// Likes and dislikes.
    Both,
    /// Likes.
    Likes,
    /// Dislikes.
    Dislikes,
    /// Nothing.
    Embedding,
    /// Everything, of another judged user: what it scores is what the judge makes of anyone's.
    Mismatched,
}

impl Condition {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Both,
        Self::Likes,
        Self::Dislikes,
        Self::Embedding,
        Self::Mismatched,
    ];

    fn words(self) -> &'static str {
        match self {
            Self::Both => "like+dislike",
            Self::Likes => "likes",
            Self::Dislikes => "dislikes",
            Self::Embedding => "no words",
            Self::Mismatched => "another's",
        }
    }
}

/// One way to write instructions.
pub struct System {
    /// Its name.
    pub name: String,
    /// The policy.
    pub policy: Policy,
    /// Whether what the user's neighbours would suggest is written into the prompt as a wish:
    /// prompt engineering in place of training.
    pub neighbors_text: bool,
}

/// A mean over users and its 95% interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its interval's lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl Mean {
    /// Of one value a user.
    pub fn of(values: &[f64]) -> Self {
        let (low, high) = bootstrap(values, 0);
        Self {
            mean: mean(values),
            low,
            high,
        }
    }
}

/// One system's numbers under one condition; means over users.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// The system's name.
    pub system: String,
    /// What was written of the profile; `None` for rows that no model wrote.
    pub condition: Option<Condition>,
    /// Cosine with the user's held-out likes.
    pub own: f64,
    /// Less that with the other users'.
    pub own_minus_other: Mean,
    /// Own − other on all of the user's likes, stated and held-out.
    #[serde(default)]
    pub all_likes: Mean,
    /// Cosine with held-out likes less that with dislikes.
    pub like_minus_dislike: Mean,
    /// Mean reciprocal rank of the user among those judged.
    pub reciprocal_rank: Mean,
    /// Own less others' instructions on the held-out likes that neighbours would suggest.
    pub neighbor_lift: Option<Mean>,
    /// Own − other as a share of the way from floor to ceiling.
    pub of_ceiling: f64,
    /// Share of instructions that take up a stated like.
    pub copied: f64,
    /// Share of instructions that take up a held-out like: guesses that came true.
    #[serde(default)]
    pub guessed: f64,
    /// Different instructions as a share of all.
    pub distinct: f64,
    /// Share of instructions that name the thing in the picture.
    pub on_topic: f64,
    /// How far a user's instructions lie apart, 1 less their mean cosine.
    pub within: f64,
    /// How far different users' lie apart.
    pub between: f64,
    /// Own − other by seed.
    pub by_seed: Vec<f64>,
    /// Each user's own − other, for paired comparisons.
    pub by_user: Vec<f64>,
    /// Each user's own − other on all likes.
    #[serde(default)]
    pub all_likes_by_user: Vec<f64>,
    /// What was written: user, caption, instruction.
    pub written: Vec<(String, String, String)>,
}

/// One system less the one before it, under one condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The system, and the one it is compared with.
    pub systems: (String, String),
    /// The condition.
    pub condition: Condition,
    /// Own − other, paired by user.
    pub difference: Mean,
    /// Own − other on all likes, paired by user.
    #[serde(default)]
    pub all_likes: Mean,
}

/// How well a policy tells held-out pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairScores {
    /// The system's name.
    pub system: String,
    /// Pairs asked.
    pub pairs: usize,
    /// The share told right, a mean over users' prompts.
    pub accuracy: Mean,
    /// The mean gap of log-ratios, preferred less rejected.
    pub margin: f64,
    /// Expected calibration error of σ(β · gap) in ten bins.
    pub calibration_error: f64,
}

/// What a system writes for newcomers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColdScore {
    /// The system's name.
    pub system: String,
    /// Opinions known.
    pub known: usize,
    /// Own − other, on held-out likes.
    pub own_minus_other: Mean,
    /// Own − other on all that they like, told or not.
    #[serde(default)]
    pub all_likes: Mean,
    /// Share of instructions that take up a like that was told.
    #[serde(default)]
    pub copied: f64,
    /// Share of instructions that take up a held-out like.
    #[serde(default)]
    pub guessed: f64,
    /// What was written: user, caption, instruction.
    #[serde(default)]
    pub written: Vec<(String, String, String)>,
}

/// One system less the one before it, for newcomers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColdDifference {
    /// The system, and the one it is compared with.
    pub systems: (String, String),
    /// Opinions known.
    pub known: usize,
    /// Own − other, paired by user.
    pub difference: Mean,
    /// Own − other on all likes, paired by user.
    #[serde(default)]
    pub all_likes: Mean,
}

/// The whole report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Users judged.
    pub users: usize,
    /// The mean reciprocal rank that chance gives among so many.
    pub rank_by_chance: f64,
    /// The judge's name.
    pub judge: String,
    /// The rows.
    pub systems: Vec<Scores>,
    /// Each system less the one before, in the order given.
    pub differences: Vec<Difference>,
    /// Held-out pairs, where asked.
    pub pairs: Vec<PairScores>,
    /// Newcomers, where asked.
    pub cold: Vec<ColdScore>,
    /// For newcomers, each system less the one before.
    pub cold_differences: Vec<ColdDifference>,
}

/// The held-out users that are judged.
fn judged_users(synth: &Synth, most: usize) -> Result<Vec<&SynthUser>> {
    let held: BTreeSet<&String> = synth.splits.held_out_users.iter().collect();
    let fit = |u: &&SynthUser| {
        let whole = [&u.held_out_likes, &u.dislikes, &u.captions];
        held.contains(&u.user) && whole.iter().all(|list| !list.is_empty())
    };
    let users: Vec<&SynthUser> = synth.users.iter().filter(fit).take(most).collect();
    match users.len() {
        0 | 1 => Err(Error::BadRequest(
            "at least two held-out users are needed; make a larger data set".into(),
        )),
        _ => Ok(users),
    }
}

/// Writes and judges. The snapshot must hold the users' stated opinions. What `earlier` reports'
/// systems wrote is judged again beside the rest; of one name they are one system.
///
/// `progress` is told of the row that is written, users done and all; [`Error::Cancelled`] when
/// it breaks.
pub fn evaluate(
    systems: &mut [System],
    earlier: &[Report],
    snapshot: &Snapshot,
    synth: &Synth,
    (judge_name, judge): (&str, &TextEncoder),
    options: &EvalOptions,
    mut progress: impl FnMut(&str, usize, usize) -> ControlFlow<()>,
) -> Result<Report> {
    let users = judged_users(synth, options.users)?;
    let near = users.iter().map(|u| suggested(snapshot, &u.user, 5));
    let near: Vec<Vec<String>> = near.collect::<Result<_>>()?;
    let mut rows = unwritten(&users, &near, synth);
    rows.push(retrieved(&users, synth, snapshot)?);
    for row in earlier.iter().flat_map(|report| &report.systems) {
        if row.condition.is_some() {
            let texts = read_back(&row.written, row.by_seed.len(), &users)?;
            add(&mut rows, &row.system, row.condition, texts);
        }
    }
    for system in systems.iter_mut() {
        for condition in &options.conditions {
            let label = format!("{}, {}", system.name, condition.words());
            let mut tell = |done| progress(&label, done, users.len());
            let texts = write(system, *condition, snapshot, &users, options, &mut tell)?;
            add(&mut rows, &system.name, Some(*condition), texts);
        }
    }
    let names = synth.attributes.iter().map(|a| a.attribute.as_str());
    let references = References::new(names, &synth.captions, judge)?;
    let truth: Vec<Truth> = users
        .iter()
        .map(|u| Truth::of(u, Some(snapshot), &references))
        .collect::<Result<_>>()?;
    let vectors = embedded(&rows, judge)?;
    let mut scores: Vec<Scores> = rows
        .iter()
        .zip(&vectors)
        .map(|(row, v)| scored(row, v, &users, &truth, &synth.captions))
        .collect();
    let of = |name: &str| scores.iter().find(|s| s.system == name);
    let ends = of(FLOOR)
        .zip(of(CEILING))
        .map(|(f, c)| (f.own_minus_other.mean, c.own_minus_other.mean));
    for row in &mut scores {
        row.of_ceiling = ends.map_or(f64::NAN, |(floor, ceiling)| {
            (row.own_minus_other.mean - floor) / (ceiling - floor)
        });
    }
    let n = users.len();
    Ok(Report {
        users: n,
        rank_by_chance: (1..=n).map(|r| 1.0 / r as f64).sum::<f64>() / n as f64,
        judge: judge_name.to_string(),
        differences: differences(&scores),
        systems: scores,
        ..Report::default()
    })
}

// ----------------------------------------------------------------------------------- writing

/// What one row wrote: by user, by seed and caption.
struct Texts {
    system: String,
    condition: Option<Condition>,
    texts: ByUser,
}

/// For each user the (seed number, caption, instruction)s.
type ByUser = Vec<Vec<(usize, String, String)>>;

impl Texts {
    /// Takes in what the same system wrote after training with another seed.
    fn join(&mut self, other: ByUser) {
        let seeds = self.texts.iter().flatten().map(|t| t.0 + 1).max();
        for (texts, more) in self.texts.iter_mut().zip(other) {
            let more = more.into_iter();
            texts.extend(more.map(|(n, caption, words)| (n + seeds.unwrap_or(0), caption, words)));
        }
    }

    /// User, caption, instruction, one after another.
    fn written(&self, users: &[&SynthUser]) -> Vec<(String, String, String)> {
        let of = |(user, texts): (&&SynthUser, &Vec<(usize, String, String)>)| {
            let one = |t: &(usize, String, String)| (user.user.clone(), t.1.clone(), t.2.clone());
            texts.iter().map(one).collect::<Vec<_>>()
        };
        users.iter().zip(&self.texts).flat_map(of).collect()
    }

    /// The share of instructions that name one of `likes` of their user's, given by number.
    fn take_up(&self, likes: impl Fn(usize) -> Vec<String>) -> f64 {
        let (mut all, mut named) = (0, 0);
        for (user, texts) in self.texts.iter().enumerate() {
            let likes = likes(user);
            let names =
                |t: &&(usize, String, String)| !crate::policy::named_in(&t.2, &likes).is_empty();
            named += texts.iter().filter(names).count();
            all += texts.len();
        }
        named as f64 / all.max(1) as f64
    }
}

/// Adds what a system wrote to its row, or a row for it.
fn add(rows: &mut Vec<Texts>, system: &str, condition: Option<Condition>, texts: ByUser) {
    let same = |r: &&mut Texts| r.system == system && r.condition == condition;
    match rows.iter_mut().find(same) {
        Some(row) => row.join(texts),
        None => rows.push(Texts {
            system: system.into(),
            condition,
            texts,
        }),
    }
}

/// What a report says was written, of the users that are judged now. A user's instructions stand
/// there seed after seed, as many of each.
fn read_back(
    written: &[(String, String, String)],
    seeds: usize,
    users: &[&SynthUser],
) -> Result<ByUser> {
    let mut of: BTreeMap<&str, Vec<(&String, &String)>> = BTreeMap::new();
    for (user, caption, words) in written {
        of.entry(user).or_default().push((caption, words));
    }
    let texts = users.iter().map(|user| {
        let Some(texts) = of.get(user.user.as_str()) else {
            return Err(Error::BadRequest(format!(
                "the earlier report has no instruction for {}: judge no more users than then, \
                 of the same data",
                user.user
            )));
        };
        let numbered = texts.iter().enumerate().map(|(n, (caption, words))| {
            let seed = n * seeds.max(1) / texts.len();
            (seed, caption.to_string(), words.to_string())
        });
        Ok(numbered.collect())
    });
    texts.collect()
}

const CEILING: &str = "(ceiling)";
const COPY: &str = "(profile copied)";
const FLOOR: &str = "(floor)";
const RETRIEVED: &str = "(a neighbour's own)";
const SUGGESTED: &str = "(neighbours' likes)";

fn write(
    system: &mut System,
    condition: Condition,
    snapshot: &Snapshot,
    users: &[&SynthUser],
    options: &EvalOptions,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<ByUser> {
    let usual = system.policy.options.clone();
    let shown = &mut system.policy.options;
    if matches!(condition, Condition::Dislikes | Condition::Embedding) {
        (shown.likes_shown, shown.fill_up_to) = (0, 0);
    }
    if matches!(condition, Condition::Likes | Condition::Embedding) {
        shown.dislikes_shown = 0;
    }
    let n = users.len();
    let names: Vec<&str> = (0..n)
        .map(|i| match condition {
            Condition::Mismatched => users[(i + n / 2) % n].user.as_str(),
            _ => users[i].user.as_str(),
        })
        .collect();
    let written = write_for(system, &names, users, snapshot, options, progress);
    system.policy.options = usual;
    written
}

/// The instructions for users, who go by `names` in the store: one after the other those of a
/// seed and a caption for everyone, which are written side by side.
fn write_for(
    system: &System,
    names: &[&str],
    users: &[&SynthUser],
    snapshot: &Snapshot,
    options: &EvalOptions,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<ByUser> {
    let mut cues = Vec::with_capacity(names.len());
    for name in names {
        cues.push(match system.neighbors_text && snapshot.has_user(name) {
            true => neighbors_wish(snapshot, name)?,
            false => None,
        });
    }
    let mut all = vec![Vec::new(); users.len()];
    let rounds = options.seeds.len() * options.instructions;
    let mut round = 0;
    for (number, seed) in options.seeds.iter().enumerate() {
        for i in 0..options.instructions {
            let caption = |user: &SynthUser| user.captions[i % user.captions.len().max(1)].clone();
            let requests: Vec<InstructRequest> = names
                .iter()
                .zip(users)
                .zip(&cues)
                .map(|((name, user), cue)| InstructRequest {
                    user: name.to_string(),
                    caption: caption(user),
                    cue: cue.clone(),
                    seed: seed.wrapping_mul(1000).wrapping_add(i as u64),
                    temperature: options.temperature,
                    ..InstructRequest::default()
                })
                .collect();
            for (part, requests) in requests.chunks(TOGETHER).enumerate() {
                let done = (round * users.len() + part * TOGETHER) / rounds;
                let answers = system
                    .policy
                    .instruct_batch(snapshot, requests, || progress(done))?;
                let first = part * TOGETHER;
                for ((texts, request), answer) in all[first..].iter_mut().zip(requests).zip(answers)
                {
                    texts.push((number, request.caption.clone(), answer.instruction));
                }
            }
            round += 1;
        }
    }
    match progress(users.len()) {
        ControlFlow::Break(()) => Err(Error::Cancelled),
        ControlFlow::Continue(()) => Ok(all),
    }
}

/// What neighbours like, as words for a prompt.
fn neighbors_wish(snapshot: &Snapshot, user: &str) -> Result<Option<String>> {
    let suggested = suggested(snapshot, user, 5)?;
    Ok((!suggested.is_empty())
        .then(|| format!("people of like taste love {}", suggested.join(", "))))
}

/// What a user's ten neighbours would add, weightiest first.
fn suggested(snapshot: &Snapshot, user: &str, most: usize) -> Result<Vec<String>> {
    let profile = snapshot
        .profile(user, 10)
        .map_err(|e| Error::BadRequest(e.to_string()))?;
    let liked = profile.suggestions.into_iter().filter(|s| s.weight > 0.0);
    Ok(liked.map(|s| s.attribute).take(most).collect())
}

/// The rows that no model wrote; `near` is what each user's neighbours would add.
fn unwritten(users: &[&SynthUser], near: &[Vec<String>], synth: &Synth) -> Vec<Texts> {
    let n = users.len();
    let about = |user: &SynthUser, likes: &[String], stream: u64| {
        let mut random = Philox::new(stream, 0x6365_696c);
        let texts = user.captions.iter().take(4).map(|caption| {
            let object = object(caption, &synth.captions);
            let like = random.choose(likes).cloned().unwrap_or_default();
            let words = sentence(&like, &format!("the {object}"), &mut random);
            (0, caption.clone(), words)
        });
        texts.collect::<Vec<_>>()
    };
    let stated = |u: &SynthUser| -> Vec<String> {
        let those = u.stated_likes();
        those.cloned().collect()
    };
    let row = |system: &str, likes: &dyn Fn(usize) -> Vec<String>| Texts {
        system: system.into(),
        condition: None,
        texts: (0..n)
            .map(|i| about(users[i], &likes(i), i as u64))
            .collect(),
    };
    vec![
        row(CEILING, &|i| users[i].held_out_likes.clone()),
        row(COPY, &|i| stated(users[i])),
        row(FLOOR, &|i| stated(users[(i + n / 2) % n])),
        row(SUGGESTED, &|i| near[i].clone()),
    ]
}

/// What the nearest neighbour's pairs prefer, word for word.
fn retrieved(users: &[&SynthUser], synth: &Synth, snapshot: &Snapshot) -> Result<Texts> {
    let mut chosen: BTreeMap<&str, Vec<&SynthPair>> = BTreeMap::new();
    for pair in synth.pairs.iter().filter(|p| p.split == Split::Train) {
        chosen.entry(&pair.user).or_default().push(pair);
    }
    let mut texts = Vec::with_capacity(users.len());
    for user in users {
        let near = snapshot
            .overlaps(&user.user, 10, OverlapMode::Shared)
            .map_err(|e| Error::BadRequest(e.to_string()))?;
        let of = near.iter().find_map(|(name, _)| chosen.get(name));
        let pairs = of.into_iter().flatten().step_by(4).take(4);
        texts.push(
            pairs
                .map(|p| (0, p.caption.clone(), p.chosen.clone()))
                .collect(),
        );
    }
    Ok(Texts {
        system: RETRIEVED.into(),
        condition: None,
        texts,
    })
}

fn object<'a>(caption: &str, captions: &'a [Caption]) -> &'a str {
    let found = captions.iter().find(|c| c.caption == caption);
    found.map_or("subject", |c| c.object.as_str())
}

/// A whole instruction that asks for an attribute.
fn sentence(attribute: &str, object: &str, random: &mut Philox) -> String {
    match vocabulary::find(attribute) {
        Some(known) => grammar::instruction(random, object, &[known], None),
        None => format!("Edit {object} with {attribute}."),
    }
}

// ----------------------------------------------------------------------------------- judging

/// The judge's vector of each attribute: the mean of its reference sentences' directions, less
/// the mean of all.
struct References {
    by_name: BTreeMap<String, Vec<f32>>,
}

impl References {
    fn new<'a>(
        names: impl Iterator<Item = &'a str>,
        captions: &[Caption],
        judge: &TextEncoder,
    ) -> Result<Self> {
        let names: Vec<&str> = names.collect();
        let mut sentences = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let mut random = Philox::new(i as u64, 0x7265_6673);
            for _ in 0..3 {
                let thing = random.choose(captions).map_or("subject", |c| &c.object);
                let thing = format!("the {thing}");
                sentences.push(sentence(name, &thing, &mut random));
            }
        }
        let mut vectors = encode_all(judge, &sentences)?;
        let corpus = mean_vector(vectors.iter());
        vectors.iter_mut().for_each(|v| centre(v, &corpus));
        let by_name = names
            .iter()
            .zip(vectors.chunks_exact(3))
            .map(|(name, three)| (name.to_string(), mean_vector(three.iter())));
        Ok(Self {
            by_name: by_name.collect(),
        })
    }

    fn of(&self, names: &[String]) -> Vec<f32> {
        mean_vector(names.iter().filter_map(|n| self.by_name.get(n)))
    }
}

fn encode_all(judge: &TextEncoder, texts: &[String]) -> Result<Vec<Vec<f32>>> {
    let refs: Vec<&str> = texts.iter().map(String::as_str).collect();
    judge.encode(&refs)
}

fn mean_vector<'a>(vectors: impl Iterator<Item = &'a Vec<f32>>) -> Vec<f32> {
    let (mut sum, mut n) = (Vec::new(), 0f32);
    for v in vectors {
        sum.resize(v.len(), 0.0);
        sum.iter_mut().zip(v).for_each(|(s, x)| *s += x);
        n += 1.0;
    }
    sum.iter_mut().for_each(|s| *s /= n.max(1.0));
    sum
}

/// Takes the mean away and brings what is left to length 1.
fn centre(v: &mut [f32], mean: &[f32]) {
    v.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
    let length = v.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    v.iter_mut().for_each(|x| *x /= length);
}

/// The vectors of all rows' instructions, the mean of all taken away. Each text is read once, in
/// company.
fn embedded(rows: &[Texts], judge: &TextEncoder) -> Result<Vec<Vec<Vec<Vec<f32>>>>> {
    let texts = rows.iter().flat_map(|row| row.texts.iter().flatten());
    let different: BTreeSet<&String> = texts.map(|t| &t.2).collect();
    let different: Vec<String> = different.into_iter().cloned().collect();
    let vectors = encode_all(judge, &different)?;
    let by_text: BTreeMap<&String, &Vec<f32>> = different.iter().zip(&vectors).collect();
    let of_user = |texts: &Vec<(usize, String, String)>| -> Vec<Vec<f32>> {
        texts.iter().map(|t| by_text[&t.2].clone()).collect()
    };
    let of_row = |row: &Texts| -> Vec<_> { row.texts.iter().map(of_user).collect() };
    let mut all: Vec<Vec<Vec<Vec<f32>>>> = rows.iter().map(of_row).collect();
    let corpus = mean_vector(all.iter().flatten().flatten());
    for v in all.iter_mut().flatten().flatten() {
        centre(v, &corpus);
    }
    Ok(all)
}

/// What a user likes and dislikes, as the judge sees it: of each list the mean of its
/// attributes' directions, so that a product with it is the mean cosine.
struct Truth {
    held_out: Vec<f32>,
    /// Stated and held-out ones.
    likes: Vec<f32>,
    dislikes: Vec<f32>,
    /// Held-out likes that neighbours would suggest; `None` where there are none.
    from_neighbors: Option<Vec<f32>>,
}

impl Truth {
    fn of(user: &SynthUser, snapshot: Option<&Snapshot>, references: &References) -> Result<Self> {
        let near = match snapshot.filter(|s| s.has_user(&user.user)) {
            Some(snapshot) => suggested(snapshot, &user.user, 20)?,
            None => Vec::new(),
        };
        let both = user.held_out_likes.iter().filter(|l| near.contains(l));
        let both: Vec<String> = both.cloned().collect();
        Ok(Self {
            held_out: references.of(&user.held_out_likes),
            likes: references.of(&user.likes),
            dislikes: references.of(&user.dislikes),
            from_neighbors: (!both.is_empty()).then(|| references.of(&both)),
        })
    }
}

fn scored(
    row: &Texts,
    vectors: &[Vec<Vec<f32>>],
    users: &[&SynthUser],
    truth: &[Truth],
    captions: &[Caption],
) -> Scores {
    let n = truth.len();
    let own: Vec<f64> = (0..n)
        .map(|i| cosine(&vectors[i], &truth[i].held_out))
        .collect();
    let by_user = own_minus_other(vectors, truth, |t| &t.held_out);
    let all_likes_by_user = own_minus_other(vectors, truth, |t| &t.likes);
    let like: Vec<f64> = (0..n)
        .map(|i| own[i] - cosine(&vectors[i], &truth[i].dislikes))
        .collect();
    let rank = |i: usize| {
        let better = truth
            .iter()
            .filter(|t| cosine(&vectors[i], &t.held_out) > own[i])
            .count();
        1.0 / (1 + better) as f64
    };
    let lift: Vec<f64> = (0..n)
        .filter_map(|i| {
            let on = truth[i].from_neighbors.as_ref()?;
            let others = (0..n).filter(|j| *j != i);
            let others: Vec<f64> = others.map(|j| cosine(&vectors[j], on)).collect();
            Some(cosine(&vectors[i], on) - mean(&others))
        })
        .collect();
    let seeds = row
        .texts
        .iter()
        .flatten()
        .map(|t| t.0 + 1)
        .max()
        .unwrap_or(0);
    let by_seed = (0..seeds).map(|seed| {
        let of_seed: Vec<Vec<Vec<f32>>> = row
            .texts
            .iter()
            .zip(vectors)
            .map(|(texts, v)| {
                let those = texts.iter().zip(v).filter(|(t, _)| t.0 == seed);
                those.map(|(_, v)| v.clone()).collect()
            })
            .collect();
        mean(&own_minus_other(&of_seed, truth, |t| &t.held_out))
    });
    let written = row.written(users);
    let all = written.len().max(1) as f64;
    let different: BTreeSet<&String> = written.iter().map(|w| &w.2).collect();
    let names_it = |w: &&(String, String, String)| {
        w.2.to_lowercase()
            .contains(&object(&w.1, captions).to_lowercase())
    };
    Scores {
        system: row.system.clone(),
        condition: row.condition,
        own: mean(&own),
        own_minus_other: Mean::of(&by_user),
        all_likes: Mean::of(&all_likes_by_user),
        like_minus_dislike: Mean::of(&like),
        reciprocal_rank: Mean::of(&(0..n).map(rank).collect::<Vec<_>>()),
        neighbor_lift: (!lift.is_empty()).then(|| Mean::of(&lift)),
        of_ceiling: 0.0,
        copied: row.take_up(|i| users[i].stated_likes().cloned().collect()),
        guessed: row.take_up(|i| users[i].held_out_likes.clone()),
        distinct: different.len() as f64 / all,
        on_topic: written.iter().filter(names_it).count() as f64 / all,
        within: spread(vectors, true),
        between: spread(vectors, false),
        by_seed: by_seed.collect(),
        by_user,
        all_likes_by_user,
        written,
    }
}

/// One less the mean cosine of two instructions: of the same user, or of different ones.
fn spread(vectors: &[Vec<Vec<f32>>], same: bool) -> f64 {
    let (mut sum, mut n) = (0.0, 0.0);
    for (i, of_user) in vectors.iter().enumerate() {
        for (a, x) in of_user.iter().enumerate() {
            for (j, others) in vectors
                .iter()
                .enumerate()
                .filter(|(j, _)| (i == *j) == same)
            {
                for (b, y) in others.iter().enumerate() {
                    if i != j || a != b {
                        sum += dot(x, y);
                        n += 1.0;
                    }
                }
            }
        }
    }
    1.0 - sum / f64::max(n, 1.0)
}

/// Own less the mean over all other users, for each user, on `likes` of theirs.
fn own_minus_other(
    vectors: &[Vec<Vec<f32>>],
    truth: &[Truth],
    likes: impl Fn(&Truth) -> &Vec<f32>,
) -> Vec<f64> {
    let others = (truth.len() - 1).max(1) as f64;
    let gap = |i: usize| {
        let sum: f64 = (0..truth.len())
            .filter(|j| *j != i)
            .map(|j| cosine(&vectors[i], likes(&truth[j])))
            .sum();
        cosine(&vectors[i], likes(&truth[i])) - sum / others
    };
    (0..truth.len()).map(gap).collect()
}

/// The mean product of instructions' directions with the mean of some attributes'.
fn cosine(a: &[Vec<f32>], b: &[f32]) -> f64 {
    a.iter().map(|x| dot(x, b)).sum::<f64>() / a.len().max(1) as f64
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum()
}

fn differences(scores: &[Scores]) -> Vec<Difference> {
    let mut found = Vec::new();
    for condition in Condition::ALL {
        let of: Vec<&Scores> = scores
            .iter()
            .filter(|s| s.condition == Some(condition))
            .collect();
        for two in of.windows(2) {
            found.push(Difference {
                systems: (two[1].system.clone(), two[0].system.clone()),
                condition,
                difference: Mean::of(&less(&two[1].by_user, &two[0].by_user)),
                all_likes: Mean::of(&less(&two[1].all_likes_by_user, &two[0].all_likes_by_user)),
            });
        }
    }
    found
}

fn less(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The 95% interval of the mean, by 2,000 draws of users with replacement.
pub fn bootstrap(values: &[f64], seed: u64) -> (f64, f64) {
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let mut random = Philox::new(seed, 0x626f_6f74);
    let n = values.len() as u32;
    let mut means: Vec<f64> = (0..2000)
        .map(|_| {
            (0..n)
                .map(|_| values[random.below(n) as usize])
                .sum::<f64>()
                / f64::from(n)
        })
        .collect();
    means.sort_by(f64::total_cmp);
    (means[50], means[1949])
}

// ------------------------------------------------------------------------------ held-out pairs

/// Asks a policy about held-out pairs; several are one trained with several seeds. `reference` is
/// the adapter its training was measured against (`None`: the base model); `beta` the temperature
/// that turns gaps into probabilities.
pub fn pair_scores(
    systems: &[&System],
    reference: Option<&Adapter>,
    snapshot: &Snapshot,
    groups: &[PairGroup],
    beta: f64,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<PairScores> {
    let mut right = vec![Vec::new(); groups.len()];
    let mut gaps = Vec::new();
    for (n, group) in groups.iter().enumerate() {
        let one = std::slice::from_ref(group);
        let mut base: Option<Vec<f32>> = None;
        for System { policy, .. } in systems {
            let model = &policy.model.decoder;
            // The seeds differ in what was trained on top, not in the model or the reference.
            let base = match &mut base {
                Some(base) => base,
                none => {
                    let go_on = |_, _| ControlFlow::Continue(());
                    none.insert(reference_logps(model, reference, one, None, go_on)?.concat())
                }
            };
            let row = Row {
                prompt: &group.prompt,
                completions: group
                    .pairs
                    .iter()
                    .flat_map(|p| [&p.chosen[..], &p.rejected[..]])
                    .collect(),
            };
            let own = || {
                let embedding = snapshot.embedding(&group.user);
                let embedding = embedding.map_err(|e| Error::BadRequest(e.to_string()))?;
                Ok(embedding.vector)
            };
            let soft = policy.soft.as_ref().map(|s| s.of_user(own)).transpose()?;
            let adapter = policy.adapter.as_ref();
            let logps = score(model, adapter, None, soft.as_ref(), &[row], false)?
                .logps
                .to_vec1::<f32>()?;
            let gains = logps.iter().zip(&*base).map(|(l, b)| f64::from(l - b));
            let gains: Vec<f64> = gains.collect();
            let own = gains.chunks_exact(2).map(|g| g[0] - g[1]);
            gaps.extend(own.clone());
            right[n].extend(own.map(|g| f64::from(u8::from(g > 0.0))));
        }
        if progress(n + 1, groups.len()).is_break() {
            return Err(Error::Cancelled);
        }
    }
    let right: Vec<f64> = right.iter().map(|r| mean(r)).collect();
    Ok(PairScores {
        system: systems.first().map(|s| s.name.clone()).unwrap_or_default(),
        pairs: gaps.len(),
        accuracy: Mean::of(&right),
        margin: mean(&gaps),
        calibration_error: calibration_error(&gaps, beta),
    })
}

/// Ten bins of confidence in the answer given; the mean over answers of |confidence − share
/// right| in their bin.
fn calibration_error(gaps: &[f64], beta: f64) -> f64 {
    let mut bins = [(0.0, 0.0, 0.0); 10]; // answers, confidence, right
    for gap in gaps {
        let confidence = 1.0 / (1.0 + (-beta * gap.abs()).exp());
        let bin = &mut bins[(((confidence - 0.5) * 20.0) as usize).min(9)];
        bin.0 += 1.0;
        bin.1 += confidence;
        bin.2 += f64::from(u8::from(*gap > 0.0));
    }
    let off: f64 = bins.iter().map(|(_, c, r)| (c - r).abs()).sum();
    off / gaps.len().max(1) as f64
}

// ---------------------------------------------------------------------------------- newcomers

/// Like+Dislike for newcomers known by 0 to 16 opinions. The store must be nobody else's:
/// newcomers come and go in it. `earlier` as for [`evaluate`].
pub fn cold_start(
    systems: &[System],
    earlier: &[Report],
    store: &Store,
    synth: &Synth,
    judge: &TextEncoder,
    options: &EvalOptions,
    mut progress: impl FnMut(&str, usize, usize) -> ControlFlow<()>,
) -> Result<(Vec<ColdScore>, Vec<ColdDifference>)> {
    let failed = |e: simpatico_storage::StoreError| Error::BadRequest(e.to_string());
    let users = judged_users(synth, options.users)?;
    let mut by_known = KNOWN.map(|_| Vec::new());
    for row in earlier.iter().flat_map(|report| &report.cold) {
        if let Some(n) = KNOWN.iter().position(|known| *known == row.known) {
            let texts = read_back(&row.written, 1, &users)?;
            add(&mut by_known[n], &row.system, Some(Condition::Both), texts);
        }
    }
    for system in systems {
        for (n, known) in KNOWN.into_iter().enumerate() {
            let label = format!("{}, {known} known", system.name);
            let names: Vec<String> = users
                .iter()
                .map(|u| format!("{} after {known}", u.user))
                .collect();
            for (user, name) in users.iter().zip(&names) {
                store.append(&opinions(user, name, known)).map_err(failed)?;
            }
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let snapshot = store.snapshot();
            let mut tell = |done| progress(&label, done, users.len());
            let texts = write_for(system, &names, &users, &snapshot, options, &mut tell)?;
            drop(snapshot);
            for name in names.into_iter().filter(|_| known > 0) {
                store.forget(name).map_err(failed)?;
            }
            let condition = Some(Condition::Both);
            add(&mut by_known[n], &system.name, condition, texts);
        }
    }
    // As they are shown: all of one system, then the next.
    let mut all = Vec::new();
    for (known, rows) in KNOWN.into_iter().zip(by_known) {
        let rows = rows.into_iter().enumerate();
        all.extend(rows.map(|(system, row)| (system, known, row)));
    }
    all.sort_by_key(|(system, known, _)| (*system, *known));
    let (known, rows): (Vec<usize>, Vec<Texts>) =
        all.into_iter().map(|(_, known, row)| (known, row)).unzip();
    let names = synth.attributes.iter().map(|a| a.attribute.as_str());
    let references = References::new(names, &synth.captions, judge)?;
    let truth: Vec<Truth> = users
        .iter()
        .map(|u| Truth::of(u, None, &references))
        .collect::<Result<_>>()?;
    let vectors = embedded(&rows, judge)?;
    let held_out = |v: &Vec<_>| own_minus_other(v, &truth, |t| &t.held_out);
    let likes = |v: &Vec<_>| own_minus_other(v, &truth, |t| &t.likes);
    let gaps: Vec<Vec<f64>> = vectors.iter().map(held_out).collect();
    let all_likes: Vec<Vec<f64>> = vectors.iter().map(likes).collect();
    let scores = rows.iter().enumerate().map(|(n, row)| ColdScore {
        system: row.system.clone(),
        known: known[n],
        own_minus_other: Mean::of(&gaps[n]),
        all_likes: Mean::of(&all_likes[n]),
        copied: row.take_up(|i| told(users[i], known[n])),
        guessed: row.take_up(|i| users[i].held_out_likes.clone()),
        written: row.written(&users),
    });
    let mut differences = Vec::new();
    for count in KNOWN {
        let of: Vec<usize> = (0..rows.len()).filter(|i| known[*i] == count).collect();
        differences.extend(of.windows(2).map(|two| ColdDifference {
            systems: (rows[two[1]].system.clone(), rows[two[0]].system.clone()),
            known: count,
            difference: Mean::of(&less(&gaps[two[1]], &gaps[two[0]])),
            all_likes: Mean::of(&less(&all_likes[two[1]], &all_likes[two[0]])),
        }));
    }
    Ok((scores.collect(), differences))
}

/// A newcomer's first opinions: three likes to each dislike.
fn opinions(user: &SynthUser, name: &str, count: usize) -> Vec<Event> {
    let mut likes = user
        .likes
        .iter()
        .filter(|l| !user.held_out_likes.contains(l));
    let mut dislikes = user.dislikes.iter();
    let mut events = Vec::new();
    while events.len() < count {
        let dislike = events.len() % 4 == 3;
        let next = match dislike {
            true => dislikes.next().map(|a| (a, Polarity::Dislike)),
            false => likes.next().map(|a| (a, Polarity::Like)),
        };
        let next = next
            .or_else(|| likes.next().map(|a| (a, Polarity::Like)))
            .or_else(|| dislikes.next().map(|a| (a, Polarity::Dislike)));
        let Some((attribute, polarity)) = next else {
            break;
        };
        events.push(Event::new(name, attribute, polarity));
    }
    events
}

/// The likes among a newcomer's first opinions.
fn told(user: &SynthUser, count: usize) -> Vec<String> {
    let events = opinions(user, &user.user, count).into_iter();
    let likes = events.filter(|e| e.polarity == Polarity::Like);
    likes.map(|e| e.attribute).collect()
}

// ----------------------------------------------------------------------------------- the report

fn interval(m: &Mean) -> String {
    format!("{:+.3} [{:+.3}, {:+.3}]", m.mean, m.low, m.high)
}

/// The report as a table for people.
pub fn table(report: &Report) -> String {
    let mut text = format!(
        "{} held-out users, judge {}; reciprocal rank by chance {:.3}\n{:<18}{:<14}{:>24}{:>24}{:>24}{:>7}{:>24}{:>9}{:>8}{:>9}{:>9}{:>9}{:>8}{:>9}\n",
        report.users,
        report.judge,
        report.rank_by_chance,
        "system",
        "profile",
        "own-other",
        "on all likes",
        "like-dislike",
        "rank",
        "neighbours",
        "ceiling",
        "copied",
        "guessed",
        "distinct",
        "on topic",
        "within",
        "between",
    );
    for s in &report.systems {
        let lift = s.neighbor_lift.as_ref().map_or("-".into(), interval);
        let _ = writeln!(
            text,
            "{:<18}{:<14}{:>24}{:>24}{:>24}{:>7.3}{:>24}{:>8.0}%{:>8.2}{:>9.3}{:>9.2}{:>9.2}{:>8.2}{:>9.2}",
            s.system,
            s.condition.map_or("", Condition::words),
            interval(&s.own_minus_other),
            interval(&s.all_likes),
            interval(&s.like_minus_dislike),
            s.reciprocal_rank.mean,
            lift,
            100.0 * s.of_ceiling,
            s.copied,
            s.guessed,
            s.distinct,
            s.on_topic,
            s.within,
            s.between,
        );
    }
    for d in &report.differences {
        let (name, words) = (&d.systems, d.condition.words());
        let (gap, all) = (interval(&d.difference), interval(&d.all_likes));
        let _ = writeln!(
            text,
            "{} less {}, {words}: {gap}, on all likes {all}",
            name.0, name.1
        );
    }
    for p in &report.pairs {
        let _ = writeln!(
            text,
            "{}: {} held-out pairs, {:.3} [{:.3}, {:.3}] told right, margin {:+.2}, calibration error {:.3}",
            p.system,
            p.pairs,
            p.accuracy.mean,
            p.accuracy.low,
            p.accuracy.high,
            p.margin,
            p.calibration_error
        );
    }
    for c in &report.cold {
        let _ = writeln!(
            text,
            "{}, {} opinions known: {}, on all likes {}, copied {:.2}, guessed {:.3}",
            c.system,
            c.known,
            interval(&c.own_minus_other),
            interval(&c.all_likes),
            c.copied,
            c.guessed
        );
    }
    for d in &report.cold_differences {
        let (name, known) = (&d.systems, d.known);
        let (gap, all) = (interval(&d.difference), interval(&d.all_likes));
        let _ = writeln!(
            text,
            "{} less {}, {known} opinions known: {gap}, on all likes {all}",
            name.0, name.1
        );
    }
    text
}

/// The report as an HTML page with plots.
pub fn page(report: &Report) -> String {
    let value = |m: Mean| plot::Value {
        value: m.mean,
        interval: Some((m.low, m.high)),
    };
    let mut names: Vec<&str> = report.systems.iter().map(|s| s.system.as_str()).collect();
    names.dedup();
    let bars = |title: &str, of: &dyn Fn(&Scores) -> Mean| {
        let series = Condition::ALL.iter().map(|condition| {
            let values = names.iter().map(|name| {
                let fits = |s: &&Scores| {
                    s.system == *name
                        && s.condition
                            .map_or(*condition == Condition::Both, |c| c == *condition)
                };
                report.systems.iter().find(fits).map(|s| value(of(s)))
            });
            (condition.words().to_string(), values.collect())
        });
        plot::Bars {
            title: title.into(),
            y_label: "cosine, 95%".into(),
            groups: names.iter().map(|n| n.to_string()).collect(),
            series: series.collect(),
        }
        .to_svg()
    };
    let mut parts = vec![
        plot::verbatim(&table(report)),
        bars("Own less other users", &|s| s.own_minus_other),
        bars("Own less other users, on all likes", &|s| s.all_likes),
        bars("Like less dislike", &|s| s.like_minus_dislike),
    ];
    if !report.cold.is_empty() {
        let mut systems: Vec<&str> = report.cold.iter().map(|c| c.system.as_str()).collect();
        systems.dedup();
        let curve = |title: &str, score: &dyn Fn(&ColdScore) -> Mean| {
            let series = systems.iter().map(|name| {
                let of = report.cold.iter().filter(|c| c.system == *name);
                plot::Series::new(name, of.map(|c| (c.known as f64, value(score(c)))))
            });
            plot::Lines {
                title: title.into(),
                x: plot::Axis::linear("opinions known"),
                y: plot::Axis::linear("own less other users, 95%"),
                series: series.collect(),
            }
            .to_svg()
        };
        parts.push(curve("Newcomers", &|c| c.own_minus_other));
        parts.push(curve("Newcomers, on all likes", &|c| c.all_likes));
    }
    for s in &report.systems {
        let row = |(user, caption, words): &(String, String, String)| {
            let cells = [user, caption, words].map(|t| format!("<td>{}", plot::escape(t)));
            format!("<tr>{}", cells.concat())
        };
        let rows: String = s.written.iter().take(20).map(row).collect();
        parts.push(format!(
            "<h2>{}, {}</h2><table>{rows}</table>",
            plot::escape(&s.system),
            s.condition.map_or("no model", Condition::words)
        ));
    }
    plot::page("Instructions, judged", &parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn community(users: usize) -> Synth {
        let options = crate::synth::SynthOptions {
            users,
            ..Default::default()
        };
        crate::synth::generate(&options).unwrap()
    }

    fn axis(i: usize) -> Vec<f32> {
        (0..4).map(|j| f32::from(u8::from(i == j))).collect()
    }

    #[test]
    fn a_system_that_writes_for_its_user_beats_one_that_writes_for_anyone() {
        // Four users on four axes; "own" instructions lie on the axis, anyone's between all.
        let truth: Vec<Truth> = (0..4)
            .map(|i| Truth {
                held_out: axis(i),
                likes: mean_vector([axis(i), axis((i + 2) % 4)].iter()),
                dislikes: axis((i + 1) % 4),
                from_neighbors: None,
            })
            .collect();
        let personal: Vec<Vec<Vec<f32>>> = (0..4).map(|i| vec![axis(i)]).collect();
        let anyone: Vec<Vec<Vec<f32>>> = (0..4).map(|_| vec![vec![0.5; 4]]).collect();
        let held_out = |v: &[Vec<Vec<f32>>]| own_minus_other(v, &truth, |t| &t.held_out);
        assert_eq!(held_out(&personal), [1.0; 4]);
        assert_eq!(held_out(&anyone), [0.0; 4]);
        // Of two likes one is taken up, and one other user of three shares both.
        let all: Vec<f64> = own_minus_other(&personal, &truth, |t| &t.likes);
        assert_eq!(all, [0.5 - 0.5 / 3.0; 4]);
    }

    #[test]
    fn what_a_report_holds_is_judged_again_by_user_and_seed() {
        let synth = community(3);
        let users: Vec<&SynthUser> = synth.users.iter().take(2).collect();
        let text = |n: usize, words: &str| (n, "a dog".to_string(), words.to_string());
        let mut rows = Vec::new();
        for seed in ["first", "second"] {
            let texts = vec![vec![text(0, seed), text(0, seed)]; 2];
            add(&mut rows, "C-DPO", Some(Condition::Both), texts);
        }
        let written = rows[0].written(&users);
        assert_eq!(written.len(), 8);
        assert_eq!(read_back(&written, 2, &users).unwrap(), rows[0].texts);
        assert_eq!(rows[0].texts[1][2], text(1, "second"));
        // Somebody the report knows nothing of is no zero, but an error.
        let more: Vec<&SynthUser> = synth.users.iter().collect();
        assert!(read_back(&written, 2, &more).is_err());
    }

    #[test]
    fn what_all_vectors_share_is_taken_away() {
        // A large common part hides two opposite directions until it is subtracted.
        let mut vectors = vec![vec![10.0, 1.0], vec![10.0, -1.0]];
        let mean = mean_vector(vectors.iter());
        vectors.iter_mut().for_each(|v| centre(v, &mean));
        assert_eq!(vectors, [[0.0, 1.0], [0.0, -1.0]]);
    }

    #[test]
    fn confidence_that_comes_true_is_calibrated() {
        // σ(2) = 0.88: with 88 of 100 right the error is small, with all wrong it is large.
        let gaps = |right: usize| -> Vec<f64> {
            (0..100)
                .map(|i| if i < right { 20.0 } else { -20.0 })
                .collect()
        };
        assert!(calibration_error(&gaps(88), 0.1) < 0.01);
        assert!(calibration_error(&gaps(0), 0.1) > 0.8);
    }

    #[test]
    fn newcomers_say_what_they_like_three_times_as_often() {
        let synth = community(5);
        let user = &synth.users[0];
        assert!(opinions(user, "n", 0).is_empty());
        let eight = opinions(user, "n", 8);
        let dislikes = eight.iter().filter(|e| e.polarity == Polarity::Dislike);
        assert_eq!((eight.len(), dislikes.count()), (8, 2));
        let held = |e: &Event| user.held_out_likes.contains(&e.attribute);
        assert!(!opinions(user, "n", 99).iter().any(held));
    }

    #[test]
    fn the_interval_holds_the_mean_and_narrows_with_more_users() {
        let values = |n: u64| -> Vec<f64> {
            (0..n)
                .map(|i| f64::from(Philox::new(1, i).normal()) + 1.0)
                .collect()
        };
        let (few, many) = (values(20), values(500));
        let width = |v: &[f64]| {
            let (low, high) = bootstrap(v, 3);
            assert!(low < mean(v) && mean(v) < high);
            high - low
        };
        assert!(width(&many) < width(&few) / 3.0);
    }
}
