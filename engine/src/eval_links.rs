//! Does the encoder know who will like what? Held-out edges, held-out users, and baselines.
//!
//! Not here: training (`sage_train`) and prompts or pictures (`eval_prompts`, `eval_images`).
//!
//! # The protocol
//!
//! 1. A share of the users is held out whole (only users with enough edges); the others'
//!    edges are split in training, validation and test.
//! 2. Everything learns from the training edges and chooses its settings by the validation
//!    edges: the encoder, and beside it *bias-only* (a constant, a bias per user, a bias per
//!    attribute) and *matrix factorisation* (the same plus a product of vectors), both with a
//!    logistic loss. A learned method that does not beat them has learned little.
//! 3. *Held-out edges*: the test edges, told from the training edges.
//! 4. *Held-out users*: each gives 0, 1, 2, 4, 8, 16 edges to be known by, in a random order,
//!    and is judged on the same other edges each time. The encoder takes the known edges as
//!    they are; the baselines fit the user's own numbers to them, the rest frozen.
//!
//! AUC is pooled over all edges told. Macro-F1 is the mean of the F1 of likes and of
//! dislikes, at the threshold that was best on the validation edges.

use crate::error::{Error, Result};
use crate::plot::{Axis, Lines, Series};
use crate::sage_train::{
    Link, LinkData, LinkSplit, SageEpoch, SageTrainOptions, TrainedSage, train,
};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use simpatico_schema::Sign;
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::ControlFlow;

/// How many edges a held-out user is known by.
pub const KNOWN: [usize; 6] = [0, 1, 2, 4, 8, 16];
/// The least number of edges a held-out user is judged on.
const JUDGED_LEAST: usize = 4;
/// Streams of the seed.
const USERS_STREAM: u64 = 1 << 40;
const FACTORS_STREAM: u64 = 1 << 41;

/// The probability that a liked edge scores above a disliked one, ties counting half (the
/// Mann-Whitney statistic). `None` unless there are both.
pub fn auc(scores: &[f32], liked: &[bool]) -> Option<f64> {
    let mut order: Vec<usize> = (0..scores.len().min(liked.len())).collect();
    order.sort_unstable_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let likes = order.iter().filter(|&&i| liked[i]).count();
    let dislikes = order.len() - likes;
    if likes == 0 || dislikes == 0 {
        return None;
    }
    // The sum of the likes' ranks, those of equal scores averaged.
    let (mut ranks, mut first) = (0.0, 0);
    while first < order.len() {
        let score = scores[order[first]];
        let equal = order[first..].iter().take_while(|&&i| scores[i] == score);
        let (count, likes) = equal.fold((0, 0), |(n, l), &i| (n + 1, l + usize::from(liked[i])));
        // A NaN equals nothing, not even itself; it stands alone.
        let count = count.max(1);
        ranks += likes as f64 * (first as f64 + (count as f64 + 1.0) / 2.0);
        first += count;
    }
    let (likes, dislikes) = (likes as f64, dislikes as f64);
    Some((ranks - likes * (likes + 1.0) / 2.0) / (likes * dislikes))
}

/// The mean of the F1 of likes and of dislikes, if scores from `threshold` on say "like".
pub fn macro_f1(scores: &[f32], liked: &[bool], threshold: f32) -> f64 {
    let count = |said: bool, is: bool| {
        let both = scores.iter().zip(liked);
        both.filter(|(score, liked)| (**score >= threshold) == said && **liked == is)
            .count()
    };
    f1_of_counts([
        [count(false, false), count(false, true)],
        [count(true, false), count(true, true)],
    ])
}

/// From counts `[said like][is like]`.
fn f1_of_counts(n: [[usize; 2]; 2]) -> f64 {
    let f1 = |right: usize, wrong: usize| match 2 * right + wrong {
        0 => 0.0,
        all => 2.0 * right as f64 / all as f64,
    };
    let wrong = n[0][1] + n[1][0];
    (f1(n[0][0], wrong) + f1(n[1][1], wrong)) / 2.0
}

/// The threshold with the greatest macro-F1.
fn best_threshold(scores: &[f32], liked: &[bool]) -> f32 {
    let mut order: Vec<usize> = (0..scores.len().min(liked.len())).collect();
    order.sort_unstable_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let likes = order.iter().filter(|&&i| liked[i]).count();
    // With the threshold below all scores, everything is said to be liked.
    let mut n = [[0, 0], [order.len() - likes, likes]];
    let mut best = (f1_of_counts(n), f32::NEG_INFINITY);
    for (place, &i) in order.iter().enumerate() {
        let is = usize::from(liked[i]);
        n[1][is] -= 1;
        n[0][is] += 1;
        let Some(&next) = order.get(place + 1) else {
            break;
        };
        let f1 = f1_of_counts(n);
        if scores[next] > scores[i] && f1 > best.0 {
            best = (f1, scores[next]);
        }
    }
    best.1
}

/// [`auc`] of edges.
pub fn auc_of(scores: &[f32], links: &[Link]) -> Option<f64> {
    auc(scores, &liked(links))
}

fn liked(links: &[Link]) -> Vec<bool> {
    links.iter().map(|link| link.sign == Sign::Like).collect()
}

// ------------------------------------------------------------------------------- the plan

/// Which edges teach, and which are asked about.
#[derive(Clone, Debug, Default)]
pub struct LinkPlan {
    /// The edges of the users that are not held out.
    pub split: LinkSplit,
    /// Each held-out user's edges, in the order in which they become known. Those from
    /// number `KNOWN.last()` on are asked about.
    pub held_out: Vec<Vec<Link>>,
}

impl LinkPlan {
    /// Holds out `share` of the users, drawn from those with enough edges, and splits the
    /// rest as the options say.
    pub fn new(data: &LinkData, options: &SageTrainOptions, share: f64) -> Self {
        let mut of_user: BTreeMap<u32, Vec<Link>> = BTreeMap::new();
        for link in &data.links {
            of_user.entry(link.user).or_default().push(*link);
        }
        let enough = KNOWN[KNOWN.len() - 1] + JUDGED_LEAST;
        let mut eligible: Vec<u32> = of_user
            .iter()
            .filter(|(_, links)| links.len() >= enough)
            .map(|(user, _)| *user)
            .collect();
        let mut random = Philox::new(options.seed, USERS_STREAM);
        random.shuffle(&mut eligible);
        let count = (of_user.len() as f64 * share.clamp(0.0, 1.0)).round() as usize;
        eligible.truncate(count);
        eligible.sort_unstable();
        let mut held_out = Vec::new();
        for user in &eligible {
            if let Some(mut links) = of_user.remove(user) {
                random.shuffle(&mut links);
                held_out.push(links);
            }
        }
        let rest: Vec<Link> = of_user.into_values().flatten().collect();
        let (train, valid, seed) = (options.train_share, options.valid_share, options.seed);
        Self {
            split: LinkSplit::random(&rest, train, valid, seed),
            held_out,
        }
    }

    /// The first `known` edges of every held-out user.
    fn known(&self, known: usize) -> Vec<Link> {
        let users = self.held_out.iter();
        users
            .flat_map(|links| links.iter().take(known))
            .copied()
            .collect()
    }

    /// The edges held-out users are asked about.
    fn asked(&self) -> Vec<Link> {
        let users = self.held_out.iter();
        let skip = KNOWN[KNOWN.len() - 1];
        users
            .flat_map(|links| links.iter().skip(skip))
            .copied()
            .collect()
    }
}

// ---------------------------------------------------------------------------- the baselines

/// Logistic matrix factorisation with biases: logit = b + b_u + b_a + p_u · q_a. With vectors
/// of length 0 it is the bias-only model.
pub struct Factors {
    width: usize,
    /// The prior's strength: each user's and each attribute's numbers are taken to be normal
    /// with this precision.
    precision: f32,
    constant: f32,
    /// Per user [bias, vector].
    users: Vec<f32>,
    /// Per attribute [bias, vector].
    attributes: Vec<f32>,
}

impl Factors {
    /// Fits by Adagrad, choosing precision and epoch by the validation AUC.
    pub fn fit(data: &LinkData, split: &LinkSplit, width: usize, seed: u64) -> Self {
        let mut best: Option<(f64, Self)> = None;
        for precision in [0.3, 1.0, 3.0] {
            let mut model = Self::start(data, split, width, precision, seed);
            let mut squares = (
                vec![1e-6; model.users.len()],
                vec![1e-6; model.attributes.len()],
            );
            let degrees = Degrees::new(data, &split.train);
            let mut order = split.train.clone();
            let mut worse = 0;
            let mut own_best = f64::NEG_INFINITY;
            for epoch in 0..80 {
                Philox::new(seed, FACTORS_STREAM + 1 + epoch).shuffle(&mut order);
                for link in &order {
                    model.learn(link, &degrees, &mut squares);
                }
                let valid = model.scores(&split.valid);
                let valid = auc(&valid, &liked(&split.valid)).unwrap_or(0.5);
                if best.as_ref().is_none_or(|(b, _)| valid > *b) {
                    best = Some((valid, model.copy()));
                }
                worse = if valid > own_best { 0 } else { worse + 1 };
                own_best = own_best.max(valid);
                if worse == 6 {
                    break;
                }
            }
        }
        match best {
            Some((_, model)) => model,
            None => Self::start(data, split, width, 1.0, seed),
        }
    }

    fn start(data: &LinkData, split: &LinkSplit, width: usize, precision: f32, seed: u64) -> Self {
        let likes = liked(&split.train).into_iter().filter(|l| *l).count() as f32;
        let all = split.train.len() as f32;
        let mut random = Philox::new(seed, FACTORS_STREAM);
        let mut numbers = |rows: usize| -> Vec<f32> {
            let number = |i: usize, z: f32| {
                if i.is_multiple_of(width + 1) {
                    0.0
                } else {
                    0.1 * z
                }
            };
            (0..rows * (width + 1))
                .map(|i| number(i, random.normal()))
                .collect()
        };
        Self {
            width,
            precision,
            constant: ((likes + 1.0) / (all - likes + 1.0)).ln(),
            users: numbers(data.users.len()),
            attributes: numbers(data.attributes.len()),
        }
    }

    fn copy(&self) -> Self {
        Self {
            users: self.users.clone(),
            attributes: self.attributes.clone(),
            ..*self
        }
    }

    fn logit(&self, user: &[f32], attribute: &[f32]) -> f32 {
        let dot: f32 = user[1..]
            .iter()
            .zip(&attribute[1..])
            .map(|(p, q)| p * q)
            .sum();
        self.constant + user[0] + attribute[0] + dot
    }

    fn row(&self, index: u32) -> std::ops::Range<usize> {
        let start = index as usize * (self.width + 1);
        start..start + self.width + 1
    }

    /// One step of Adagrad on one edge, with its share of the prior.
    fn learn(&mut self, link: &Link, degrees: &Degrees, squares: &mut (Vec<f32>, Vec<f32>)) {
        let (u, a) = (self.row(link.user), self.row(link.attribute));
        let (user, attribute) = (&self.users[u.clone()], &self.attributes[a.clone()]);
        let error = sigmoid(self.logit(user, attribute)) - f32::from(link.sign == Sign::Like);
        let user_prior = self.precision / degrees.users[link.user as usize];
        let attribute_prior = self.precision / degrees.attributes[link.attribute as usize];
        for i in 0..=self.width {
            let (p, q) = (self.users[u.start + i], self.attributes[a.start + i]);
            let (toward_p, toward_q) = if i == 0 { (1.0, 1.0) } else { (q, p) };
            let gradient = error * toward_p + user_prior * p;
            adagrad(
                &mut self.users[u.start + i],
                &mut squares.0[u.start + i],
                gradient,
            );
            let gradient = error * toward_q + attribute_prior * q;
            let square = &mut squares.1[a.start + i];
            adagrad(&mut self.attributes[a.start + i], square, gradient);
        }
    }

    /// The logits of edges, users as fitted.
    pub fn scores(&self, links: &[Link]) -> Vec<f32> {
        let score = |link: &Link| {
            let (u, a) = (self.row(link.user), self.row(link.attribute));
            self.logit(&self.users[u], &self.attributes[a])
        };
        links.iter().map(score).collect()
    }

    /// The logits of a new user's edges, the user's numbers fitted to the known ones with all
    /// else frozen (full-batch Adagrad on a convex loss).
    pub fn scores_of_new_user(&self, known: &[Link], asked: &[Link]) -> Vec<f32> {
        let mut user = vec![0.0; self.width + 1];
        let mut squares = vec![1e-6; self.width + 1];
        for _ in 0..if known.is_empty() { 0 } else { 200 } {
            let mut gradient: Vec<f32> = user.iter().map(|p| self.precision * p).collect();
            for link in known {
                let attribute = &self.attributes[self.row(link.attribute)];
                let error =
                    sigmoid(self.logit(&user, attribute)) - f32::from(link.sign == Sign::Like);
                gradient[0] += error;
                for (g, q) in gradient[1..].iter_mut().zip(&attribute[1..]) {
                    *g += error * q;
                }
            }
            for ((value, square), g) in user.iter_mut().zip(&mut squares).zip(gradient) {
                adagrad(value, square, g);
            }
        }
        let score = |link: &Link| self.logit(&user, &self.attributes[self.row(link.attribute)]);
        asked.iter().map(score).collect()
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn adagrad(value: &mut f32, square: &mut f32, gradient: f32) {
    *square += gradient * gradient;
    *value -= 0.1 * gradient / square.sqrt();
}

struct Degrees {
    users: Vec<f32>,
    attributes: Vec<f32>,
}

impl Degrees {
    fn new(data: &LinkData, links: &[Link]) -> Self {
        let mut degrees = Self {
            users: vec![0.0; data.users.len()],
            attributes: vec![0.0; data.attributes.len()],
        };
        for link in links {
            degrees.users[link.user as usize] += 1.0;
            degrees.attributes[link.attribute as usize] += 1.0;
        }
        degrees
    }
}

// ------------------------------------------------------------------------------ the report

/// How well some edges were told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkScore {
    /// `None` unless there were likes and dislikes.
    pub auc: Option<f64>,
    /// At the threshold best on the validation edges.
    pub macro_f1: f64,
}

/// How well held-out users were told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColdScore {
    /// How many edges each was known by.
    pub known: usize,
    /// How well.
    pub score: LinkScore,
}

/// One method's results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MethodReport {
    /// "sage", "matrix factorisation" or "bias only".
    pub method: String,
    /// On held-out edges of known users.
    pub held_out_edges: LinkScore,
    /// On held-out users.
    pub held_out_users: Vec<ColdScore>,
}

/// The result of `eval links`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// The training's settings, the seed among them.
    pub options: SageTrainOptions,
    /// Users in all.
    pub users: usize,
    /// Attributes.
    pub attributes: usize,
    /// Edges in all.
    pub edges: usize,
    /// The share of likes among them.
    pub liked_share: f64,
    /// Edges that were told of known users.
    pub told_edges: usize,
    /// Users held out.
    pub held_out_users: usize,
    /// Edges that were told of them.
    pub told_cold_edges: usize,
    /// Epochs the encoder trained.
    pub epochs: usize,
    /// One for each method.
    pub methods: Vec<MethodReport>,
}

/// Trains the encoder and the baselines on one plan and judges them. `share` of the users is
/// held out. `progress` is told of the encoder's epochs, and can cancel.
pub fn evaluate(
    data: &LinkData,
    options: &SageTrainOptions,
    share: f64,
    device: &Device,
    progress: impl FnMut(&SageEpoch) -> ControlFlow<()>,
) -> Result<(LinkReport, TrainedSage)> {
    let plan = LinkPlan::new(data, options, share);
    if plan.split.test.is_empty() || plan.split.valid.is_empty() {
        return Err(Error::BadRequest(format!(
            "{} edges are too few to hold some out; ingest more",
            data.links.len()
        )));
    }
    let trained = train(data, &plan.split, options, device, None, progress)?;
    let report = judge(data, &plan, &trained)?;
    Ok((report, trained))
}

/// Judges an encoder trained on this plan, beside the baselines.
pub fn judge(data: &LinkData, plan: &LinkPlan, trained: &TrainedSage) -> Result<LinkReport> {
    let options = &trained.options;
    let mut methods = vec![judge_sage(data, plan, trained)?];
    for (name, width) in [("matrix factorisation", 16), ("bias only", 0)] {
        let model = Factors::fit(data, &plan.split, width, options.seed);
        methods.push(judge_factors(name, plan, &model));
    }
    let likes = data.links.iter().filter(|l| l.sign == Sign::Like).count();
    Ok(LinkReport {
        options: options.clone(),
        users: data.users.len(),
        attributes: data.attributes.len(),
        edges: data.links.len(),
        liked_share: likes as f64 / data.links.len().max(1) as f64,
        told_edges: plan.split.test.len(),
        held_out_users: plan.held_out.len(),
        told_cold_edges: plan.asked().len(),
        epochs: trained.history.len(),
        methods,
    })
}

fn score(scores: &[f32], links: &[Link], threshold: f32) -> LinkScore {
    let liked = liked(links);
    LinkScore {
        auc: auc(scores, &liked),
        macro_f1: macro_f1(scores, &liked, threshold),
    }
}

fn judge_sage(data: &LinkData, plan: &LinkPlan, trained: &TrainedSage) -> Result<MethodReport> {
    let LinkSplit { train, valid, test } = &plan.split;
    let threshold = best_threshold(&trained.scores(data, train, valid)?, &liked(valid));
    let held_out_edges = score(&trained.scores(data, train, test)?, test, threshold);
    let asked = plan.asked();
    let mut held_out_users = Vec::new();
    for known in KNOWN {
        let messages = [train.as_slice(), &plan.known(known)].concat();
        let scores = trained.scores(data, &messages, &asked)?;
        let score = score(&scores, &asked, threshold);
        held_out_users.push(ColdScore { known, score });
    }
    Ok(MethodReport {
        method: "sage".into(),
        held_out_edges,
        held_out_users,
    })
}

fn judge_factors(method: &str, plan: &LinkPlan, model: &Factors) -> MethodReport {
    let LinkSplit { valid, test, .. } = &plan.split;
    let threshold = best_threshold(&model.scores(valid), &liked(valid));
    let asked = plan.asked();
    let cold = |known: usize| {
        let of_user = |links: &Vec<Link>| {
            let asked = links.get(KNOWN[KNOWN.len() - 1]..).unwrap_or_default();
            model.scores_of_new_user(&links[..known.min(links.len())], asked)
        };
        let scores: Vec<f32> = plan.held_out.iter().flat_map(of_user).collect();
        let score = score(&scores, &asked, threshold);
        ColdScore { known, score }
    };
    MethodReport {
        method: method.into(),
        held_out_edges: score(&model.scores(test), test, threshold),
        held_out_users: KNOWN.map(cold).to_vec(),
    }
}

impl LinkReport {
    /// The report as a table of plain text.
    pub fn to_text(&self) -> String {
        let mut out = format!(
            "{} users, {} attributes, {} edges ({:.0}% likes), seed {}; told: {} held-out edges, \
             and {} edges of {} held-out users\n",
            self.users,
            self.attributes,
            self.edges,
            100.0 * self.liked_share,
            self.options.seed,
            self.told_edges,
            self.told_cold_edges,
            self.held_out_users,
        );
        let _ = write!(out, "{:<22}{:>9}{:>9}", "method", "AUC", "macro-F1");
        for known in KNOWN {
            let _ = write!(out, "{:>9}", format!("new@{known}"));
        }
        out.push('\n');
        let number = |auc: Option<f64>| auc.map_or("-".into(), |auc| format!("{auc:.4}"));
        for method in &self.methods {
            let edges = &method.held_out_edges;
            let auc = number(edges.auc);
            let _ = write!(out, "{:<22}{auc:>9}{:>9.4}", method.method, edges.macro_f1);
            for cold in &method.held_out_users {
                let _ = write!(out, "{:>9}", number(cold.score.auc));
            }
            out.push('\n');
        }
        out.push_str("new@k: AUC on held-out users known by k edges\n");
        out
    }

    /// The cold-start curve as a plot.
    pub fn to_svg(&self) -> String {
        let series = |method: &MethodReport| {
            let points = method.held_out_users.iter();
            let points = points.filter_map(|c| Some((c.known as f64, c.score.auc?)));
            Series::new(&method.method, points)
        };
        let plot = Lines {
            title: "Users not seen in training".into(),
            x: Axis::linear("edges known of the user"),
            y: Axis::linear("AUC of the others"),
            series: self.methods.iter().map(series).collect(),
        };
        plot.to_svg()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sage_train::tests::planted;

    #[test]
    fn auc_counts_pairs_in_order_with_ties_half() {
        let liked = [true, false, true, false];
        assert_eq!(auc(&[4.0, 3.0, 2.0, 1.0], &liked), Some(0.75));
        assert_eq!(auc(&[1.0; 4], &liked), Some(0.5));
        assert_eq!(auc(&[2.0, 2.0, 3.0, 1.0], &liked), Some(0.875));
        assert_eq!(auc(&[1.0, 2.0], &[true, true]), None);
        assert!(auc(&[f32::NAN, 1.0, f32::NAN], &[true, false, false]).is_some());
        // Against the definition, on random scores with ties.
        let mut random = Philox::new(9, 0);
        let scores: Vec<f32> = (0..200).map(|_| random.below(20) as f32).collect();
        let liked: Vec<bool> = (0..200).map(|_| random.below(3) == 0).collect();
        let (mut won, mut pairs) = (0.0, 0.0);
        for (a, _) in scores.iter().zip(&liked).filter(|(_, l)| **l) {
            for (b, _) in scores.iter().zip(&liked).filter(|(_, l)| !**l) {
                pairs += 1.0;
                won += if a > b { 1.0 } else { 0.5 * f64::from(a == b) };
            }
        }
        assert!((auc(&scores, &liked).unwrap() - won / pairs).abs() < 1e-12);
    }

    #[test]
    fn the_best_threshold_is_the_best_of_all() {
        let mut random = Philox::new(10, 0);
        for _ in 0..50 {
            let scores: Vec<f32> = (0..30).map(|_| random.below(12) as f32).collect();
            let liked: Vec<bool> = scores
                .iter()
                .map(|s| random.below(12) < *s as u32)
                .collect();
            let best = macro_f1(&scores, &liked, best_threshold(&scores, &liked));
            for threshold in 0..14 {
                assert!(macro_f1(&scores, &liked, threshold as f32 - 0.5) <= best + 1e-12);
            }
        }
        assert_eq!(macro_f1(&[1.0, -1.0], &[true, false], 0.0), 1.0);
        assert_eq!(macro_f1(&[1.0, -1.0], &[false, true], 0.0), 0.0);
    }

    #[test]
    fn a_plan_never_asks_what_it_teaches() {
        let data = planted(60, 75, 1);
        let options = SageTrainOptions::default();
        let plan = LinkPlan::new(&data, &options, 0.2);
        assert_eq!(plan.held_out.len(), 12);
        let LinkSplit { train, valid, test } = &plan.split;
        let cold = plan.held_out.iter().flatten();
        let mut all: Vec<Link> = [train, valid, test]
            .into_iter()
            .flatten()
            .chain(cold)
            .copied()
            .collect();
        all.sort_unstable();
        assert_eq!(all, data.links);
        for links in &plan.held_out {
            assert!(train.iter().all(|link| link.user != links[0].user));
        }
        assert!(
            plan.asked()
                .iter()
                .all(|link| !plan.known(16).contains(link))
        );
    }

    #[test]
    fn two_planted_tastes_are_found_and_biases_cannot_find_them() {
        let data = planted(80, 75, 2);
        let options = SageTrainOptions {
            hidden: 16,
            out: 16,
            epochs: 120,
            lr: 1e-2,
            ..SageTrainOptions::default()
        };
        let go_on = |_: &SageEpoch| ControlFlow::Continue(());
        let (report, _) = evaluate(&data, &options, 0.2, &Device::Cpu, go_on).unwrap();
        let of = |name: &str| report.methods.iter().find(|m| m.method == name).unwrap();
        let edges = |name: &str| of(name).held_out_edges.auc.unwrap();
        // A tenth of the signs is noise, so 0.9 is nearly all there is to find.
        assert!(edges("sage") > 0.8, "{}", report.to_text());
        assert!(edges("matrix factorisation") > 0.7, "{}", report.to_text());
        assert!(edges("bias only") < 0.65, "{}", report.to_text());
        let cold = |known: usize| {
            let scores = &of("sage").held_out_users;
            scores
                .iter()
                .find(|c| c.known == known)
                .unwrap()
                .score
                .auc
                .unwrap()
        };
        assert!(cold(0) < 0.65 && cold(16) > 0.8, "{}", report.to_text());
        assert!(report.to_svg().contains("polyline"));
        let json = serde_json::to_string(&report).unwrap();
        let read: LinkReport = serde_json::from_str(&json).unwrap();
        assert_eq!(read.to_text(), report.to_text());
    }
}
