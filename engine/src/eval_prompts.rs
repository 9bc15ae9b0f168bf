//! Judges instructions: are they this user's, or anyone's?
//!
//! A judge that took no part in training (gte-small, or any sentence encoder) embeds each
//! instruction and what the user is known to like. For every held-out user and system:
//! * *own*: mean cosine with the user's likes that were held back from graph, prompt and pairs;
//! * *own − mismatched*: less the same with another user's held-back likes: 0 for a system that
//!   writes for anyone;
//! * *like − dislike*: less the mean cosine with the user's dislikes;
//! * *rank*: where the user comes among all judged users by *own*, as a mean reciprocal rank;
//! * *copied*: the share of instructions that take up an attribute written in the prompt;
//! * *distinct*: different instructions as a share of all.
//!
//! [`pair_accuracy`] asks the policy itself: on held-out pairs, is the preferred answer the one
//! whose probability rose? Differences between systems come with 95% intervals by a paired
//! bootstrap over users.
//!
//! Not here: pictures (`eval_images`), links (`eval_links`).

use crate::error::{Error, Result};
use crate::lm::Decoder;
use crate::lora::Adapter;
use crate::params::write_whole;
use crate::plot;
use crate::policy::Policy;
use crate::soft_prompt::SoftPrompt;
use crate::synth::{Synth, SynthUser};
use crate::text_vectors::TextEncoder;
use crate::train_policy::{PairGroup, Row, reference_logps, score};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use simpatico_schema::edit::InstructRequest;
use simpatico_schema::random::Philox;
use simpatico_storage::Snapshot;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How much is judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalOptions {
    /// How many held-out users.
    pub users: usize,
    /// Instructions for each, each for another caption.
    pub instructions: usize,
    /// Sampling temperature.
    pub temperature: f32,
    /// Seed of sampling and bootstrap.
    pub seed: u64,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            users: 100,
            instructions: 2,
            temperature: 0.7,
            seed: 0,
        }
    }
}

/// One system's numbers; means over users.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SystemScores {
    /// The system's name.
    pub system: String,
    /// Cosine with the user's held-back likes.
    pub own: f64,
    /// Less that with another user's.
    pub own_minus_mismatched: f64,
    /// Its 95% interval.
    pub own_minus_mismatched_ci: (f64, f64),
    /// Less that with the user's dislikes.
    pub like_minus_dislike: f64,
    /// Mean reciprocal rank of the user among those judged.
    pub reciprocal_rank: f64,
    /// Share of instructions that take up something written in the prompt's source, the stated likes.
    pub copied: f64,
    /// Different instructions as a share of all.
    pub distinct: f64,
    /// Each user's own − mismatched, for paired comparisons.
    pub by_user: Vec<f64>,
    /// What was written: user, caption, instruction.
    pub written: Vec<(String, String, String)>,
}

/// The whole report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Users judged.
    pub users: usize,
    /// The judge's name.
    pub judge: String,
    /// Random other users' likes in place of an instruction: what nothing at all scores.
    pub floor: f64,
    /// The user's stated likes in place of an instruction: a retrieval that only copies.
    pub profile_copy: f64,
    /// The systems.
    pub systems: Vec<SystemScores>,
    /// Between systems in the order given, each against the one before: mean difference of own − mismatched and
    /// its 95% interval.
    pub differences: Vec<(String, f64, (f64, f64))>,
}

/// Writes and judges instructions of several systems for the first held-out users. The snapshot
/// must hold these users' stated opinions.
pub fn evaluate(
    systems: &[(&str, &Policy)],
    snapshot: &Snapshot,
    synth: &Synth,
    (judge_name, judge): (&str, &TextEncoder),
    options: &EvalOptions,
    mut progress: impl FnMut(&str, usize, usize),
) -> Result<Report> {
    let held: BTreeSet<&String> = synth.splits.held_out_users.iter().collect();
    let users: Vec<&SynthUser> = synth
        .users
        .iter()
        .filter(|u| {
            held.contains(&u.user) && !u.held_out_likes.is_empty() && !u.dislikes.is_empty()
        })
        .take(options.users)
        .collect();
    if users.len() < 2 {
        return Err(Error::BadRequest(
            "at least two held-out users are needed; make a larger data set".into(),
        ));
    }
    let truth = users
        .iter()
        .map(|u| Truth::of(u, judge))
        .collect::<Result<Vec<_>>>()?;
    let mut report = Report {
        users: users.len(),
        judge: judge_name.to_string(),
        ..Report::default()
    };
    let copies: Vec<Vec<Vec<f32>>> = truth.iter().map(|t| t.stated.clone()).collect();
    report.profile_copy = mean(&own_minus_mismatched(&copies, &truth));
    let n = truth.len();
    let shifted: Vec<Vec<Vec<f32>>> = (0..n).map(|i| copies[(i + n / 2) % n].clone()).collect();
    report.floor = mean(&own_minus_mismatched(&shifted, &truth));
    for (name, policy) in systems {
        let mut written = Vec::new();
        let mut vectors = Vec::new();
        for (done, user) in users.iter().enumerate() {
            let mut texts = Vec::new();
            for i in 0..options.instructions {
                let caption = user.captions[i % user.captions.len()].clone();
                let request = InstructRequest {
                    user: user.user.clone(),
                    caption: caption.clone(),
                    seed: options.seed + i as u64,
                    temperature: options.temperature,
                    ..InstructRequest::default()
                };
                let answer = policy.instruct(snapshot, &request)?;
                written.push((user.user.clone(), caption, answer.instruction.clone()));
                texts.push(answer.instruction);
            }
            vectors.push(judge.encode(&texts.iter().map(String::as_str).collect::<Vec<_>>())?);
            progress(name, done + 1, users.len());
        }
        report.systems.push(judged(
            name,
            &users,
            &truth,
            &vectors,
            written,
            options.seed,
        ));
    }
    for pair in report.systems.windows(2) {
        let gaps: Vec<f64> = pair[1]
            .by_user
            .iter()
            .zip(&pair[0].by_user)
            .map(|(a, b)| a - b)
            .collect();
        let name = format!("{} - {}", pair[1].system, pair[0].system);
        report
            .differences
            .push((name, mean(&gaps), bootstrap(&gaps, options.seed)));
    }
    Ok(report)
}

/// What a user likes and dislikes, as the judge sees it.
struct Truth {
    held_back: Vec<Vec<f32>>,
    stated: Vec<Vec<f32>>,
    dislikes: Vec<Vec<f32>>,
}

impl Truth {
    fn of(user: &SynthUser, judge: &TextEncoder) -> Result<Self> {
        let encode = |names: Vec<&String>| {
            judge.encode(&names.iter().map(|n| n.as_str()).collect::<Vec<_>>())
        };
        Ok(Self {
            held_back: encode(user.held_out_likes.iter().collect())?,
            stated: encode(
                user.likes
                    .iter()
                    .filter(|l| !user.held_out_likes.contains(l))
                    .collect(),
            )?,
            dislikes: encode(user.dislikes.iter().collect())?,
        })
    }
}

fn judged(
    name: &str,
    users: &[&SynthUser],
    truth: &[Truth],
    vectors: &[Vec<Vec<f32>>],
    written: Vec<(String, String, String)>,
    seed: u64,
) -> SystemScores {
    let own: Vec<f64> = vectors
        .iter()
        .zip(truth)
        .map(|(v, t)| cosine(v, &t.held_back))
        .collect();
    let dislike: Vec<f64> = vectors
        .iter()
        .zip(truth)
        .map(|(v, t)| cosine(v, &t.dislikes))
        .collect();
    let by_user = own_minus_mismatched(vectors, truth);
    let ranks = vectors.iter().enumerate().map(|(i, v)| {
        let better = truth
            .iter()
            .filter(|t| cosine(v, &t.held_back) > own[i])
            .count();
        1.0 / (1 + better) as f64
    });
    let by_name: BTreeMap<&str, &SynthUser> = users.iter().map(|u| (u.user.as_str(), *u)).collect();
    let copied = written
        .iter()
        .filter(|(user, _, words)| {
            by_name.get(user.as_str()).is_some_and(|u| {
                let stated = u
                    .likes
                    .iter()
                    .filter(|l| !u.held_out_likes.contains(l))
                    .cloned();
                !crate::policy::named_in(words, &stated.collect::<Vec<_>>()).is_empty()
            })
        })
        .count();
    let different: BTreeSet<&String> = written.iter().map(|w| &w.2).collect();
    SystemScores {
        system: name.to_string(),
        own: mean(&own),
        own_minus_mismatched: mean(&by_user),
        own_minus_mismatched_ci: bootstrap(&by_user, seed),
        like_minus_dislike: mean(&own) - mean(&dislike),
        reciprocal_rank: mean(&ranks.collect::<Vec<_>>()),
        copied: copied as f64 / written.len().max(1) as f64,
        distinct: different.len() as f64 / written.len().max(1) as f64,
        by_user,
        written,
    }
}

/// Own less the mean over all other users, for each user.
fn own_minus_mismatched(vectors: &[Vec<Vec<f32>>], truth: &[Truth]) -> Vec<f64> {
    let others = (truth.len() - 1).max(1) as f64;
    let gap = |i: usize| {
        let sum: f64 = (0..truth.len())
            .filter(|j| *j != i)
            .map(|j| cosine(&vectors[i], &truth[j].held_back))
            .sum();
        cosine(&vectors[i], &truth[i].held_back) - sum / others
    };
    (0..truth.len()).map(gap).collect()
}

/// Mean cosine of vectors of length 1.
fn cosine(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let dot =
        |x: &[f32], y: &[f32]| -> f64 { x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum() };
    let sum: f64 = a
        .iter()
        .flat_map(|x| b.iter().map(move |y| dot(x, y)))
        .sum();
    sum / (a.len() * b.len()).max(1) as f64
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

/// On held-out pairs: how often the preferred answer gained more over the reference than the
/// rejected one, for each group's user, and the mean margin. `embedding` gives a user's vector.
pub fn pair_accuracy(
    model: &Decoder,
    (adapter, reference): (Option<&Adapter>, Option<&Adapter>),
    soft: Option<&SoftPrompt>,
    embedding: impl Fn(&str) -> Result<Vec<f32>>,
    groups: &[PairGroup],
    mut progress: impl FnMut(usize, usize),
) -> Result<(Vec<f64>, f64)> {
    let go_on = |_, _| std::ops::ControlFlow::Continue(());
    let base = reference_logps(model, reference, groups, None, go_on)?;
    let mut accuracy = Vec::new();
    let mut margins = Vec::new();
    for (n, (group, base)) in groups.iter().zip(&base).enumerate() {
        let row = Row {
            prompt: &group.prompt,
            completions: group
                .pairs
                .iter()
                .flat_map(|p| [&p.chosen[..], &p.rejected[..]])
                .collect(),
        };
        let soft = match soft {
            Some(soft) => {
                let vector = embedding(&group.user)?;
                let width = vector.len();
                Some(soft.forward(&Tensor::from_vec(vector, (1, width), model.device())?)?)
            }
            None => None,
        };
        let logps = score(model, adapter, None, soft.as_ref(), &[row], false)?
            .logps
            .to_vec1::<f32>()?;
        let gains: Vec<f64> = logps
            .iter()
            .zip(base)
            .map(|(l, b)| f64::from(l - b))
            .collect();
        let gaps: Vec<f64> = gains.chunks_exact(2).map(|g| g[0] - g[1]).collect();
        accuracy.push(gaps.iter().filter(|g| **g > 0.0).count() as f64 / gaps.len().max(1) as f64);
        margins.push(mean(&gaps));
        progress(n + 1, groups.len());
    }
    Ok((accuracy, mean(&margins)))
}

/// The report as a table for people.
pub fn table(report: &Report) -> String {
    let mut text = format!(
        "{} held-out users, judge {}; floor {:+.4}, profile copied {:+.4}\n{:<16} {:>7} {:>9} {:>20} {:>9} {:>6} {:>7} {:>9}\n",
        report.users,
        report.judge,
        report.floor,
        report.profile_copy,
        "system",
        "own",
        "own-other",
        "95%",
        "like-dis",
        "rank",
        "copied",
        "distinct"
    );
    for s in &report.systems {
        let (low, high) = s.own_minus_mismatched_ci;
        text += &format!(
            "{:<16} {:>7.4} {:>+9.4} {:>20} {:>+9.4} {:>6.3} {:>7.2} {:>9.2}\n",
            s.system,
            s.own,
            s.own_minus_mismatched,
            format!("[{low:+.4}, {high:+.4}]"),
            s.like_minus_dislike,
            s.reciprocal_rank,
            s.copied,
            s.distinct
        );
    }
    for (name, gap, (low, high)) in &report.differences {
        text += &format!("{name}: {gap:+.4} [{low:+.4}, {high:+.4}]\n");
    }
    text
}

/// The report as an HTML page.
pub fn page(report: &Report) -> String {
    let bars = plot::Bars {
        title: "Own minus mismatched users".into(),
        y_label: "cosine, 95%".into(),
        groups: report.systems.iter().map(|s| s.system.clone()).collect(),
        series: vec![(
            "own - mismatched".into(),
            report
                .systems
                .iter()
                .map(|s| {
                    Some(plot::Value {
                        value: s.own_minus_mismatched,
                        interval: Some(s.own_minus_mismatched_ci),
                    })
                })
                .collect(),
        )],
    };
    let mut parts = vec![plot::verbatim(&table(report)), bars.to_svg()];
    for s in &report.systems {
        let row = |(user, caption, words): &(String, String, String)| {
            let cells = [user, caption, words].map(|t| format!("<td>{}", plot::escape(t)));
            format!("<tr>{}", cells.concat())
        };
        let rows: String = s.written.iter().take(40).map(row).collect();
        parts.push(format!(
            "<h2>{}</h2><table>{rows}</table>",
            plot::escape(&s.system)
        ));
    }
    plot::page("Instructions, judged", &parts)
}

/// Writes `prompts.json` and `prompts.html` into a folder.
pub fn write(report: &Report, folder: &Path) -> Result<()> {
    let json =
        serde_json::to_vec_pretty(report).map_err(|e| Error::BadRequest(format!("report: {e}")))?;
    write_whole(&folder.join("prompts.json"), &json)?;
    write_whole(&folder.join("prompts.html"), page(report).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_that_writes_for_its_user_beats_one_that_writes_for_anyone() {
        // Four users on four axes; "own" instructions lie on the axis, anyone's between all.
        let axis = |i: usize| {
            (0..4)
                .map(|j| f32::from(u8::from(i == j)))
                .collect::<Vec<f32>>()
        };
        let truth: Vec<Truth> = (0..4)
            .map(|i| Truth {
                held_back: vec![axis(i)],
                stated: vec![axis(i)],
                dislikes: vec![axis((i + 1) % 4)],
            })
            .collect();
        let personal: Vec<Vec<Vec<f32>>> = (0..4).map(|i| vec![axis(i)]).collect();
        let anyone: Vec<Vec<Vec<f32>>> = (0..4).map(|_| vec![vec![0.5; 4]]).collect();
        assert_eq!(own_minus_mismatched(&personal, &truth), [1.0; 4]);
        assert_eq!(own_minus_mismatched(&anyone, &truth), [0.0; 4]);
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
