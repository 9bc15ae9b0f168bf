//! Do neighbours know what a user will like?
//!
//! Everything is asked on likes that were held out of the graph. For a user, each neighbour
//! votes for what it likes and against what it dislikes, weighing as much as it is similar;
//! what the user has an opinion on already is left out; the first N are what the neighbours
//! add. *Hit* is the share of users with a held-out like among the first N, *recall* the
//! mean share of a user's held-out likes there. Beside it stand *popularity* (what most users
//! like, to everyone) and *chance*.
//!
//! Two questions: known users with all their stated opinions, and newcomers known by their
//! first 1, 2, 4, 8 likes. Not here: the sign of given edges (`eval_links`).

use crate::error::{Error, Result};
use crate::eval_prompts::bootstrap;
use crate::plot::{Axis, Lines, Series, Value, page, verbatim};
use crate::synth::{Synth, SynthUser};
use serde::{Deserialize, Serialize};
use simpatico_schema::{Event, OverlapMode, Polarity, Sign};
use simpatico_storage::{Snapshot, Store, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::ops::ControlFlow;

/// How many suggestions are looked at.
pub const FIRST: [usize; 3] = [5, 10, 20];
/// How many likes a newcomer is known by.
pub const KNOWN: [usize; 4] = [1, 2, 4, 8];

/// How much is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeighborOptions {
    /// The most users of each kind.
    pub users: usize,
    /// Neighbours that vote.
    pub k: usize,
    /// Whether embeddings are asked too; the store must be able to compute them.
    pub by_embedding: bool,
    /// Seed of the intervals.
    pub seed: u64,
}

/// How likes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finder {
    /// Neighbours by common attributes, whatever the sign.
    Shared,
    /// Neighbours by attributes with the same sign.
    Agreeing,
    /// Neighbours by embedding.
    Embedding,
    /// What most users like.
    Popularity,
    /// Anything.
    Chance,
}

/// What one way to find likes came to; entries as in [`FIRST`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// The way.
    pub finder: Finder,
    /// Share of users with a held-out like among the first N.
    pub hit: [f64; 3],
    /// Mean share of a user's held-out likes among the first N.
    pub recall: [f64; 3],
    /// 95% interval over users of recall among the first 10.
    pub recall_10_ci: (f64, f64),
    /// Recall among the first 10 less that of popularity: mean and 95% interval, paired.
    pub lift_10: (f64, (f64, f64)),
}

/// The result of `eval neighbors`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeighborReport {
    /// The settings.
    pub options: NeighborOptions,
    /// Known users asked about.
    pub users: usize,
    /// Their held-out likes.
    pub held_out_likes: usize,
    /// The known users' table.
    pub known: Vec<Found>,
    /// Newcomers asked about.
    pub newcomers: usize,
    /// By likes known, the newcomers' tables.
    pub cold: Vec<(usize, Vec<Found>)>,
}

fn failed(e: StoreError) -> Error {
    Error::BadRequest(format!("the store: {e}"))
}

/// Asks. The store must hold the data set's events and be nobody else's: newcomers come and
/// go in it. [`Error::Cancelled`] when `progress` (users asked, and all) breaks.
pub fn evaluate(
    store: &Store,
    synth: &Synth,
    options: &NeighborOptions,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<NeighborReport> {
    let held: BTreeSet<&String> = synth.splits.held_out_users.iter().collect();
    let asked = |new: bool| -> Vec<&SynthUser> {
        let those = synth
            .users
            .iter()
            .filter(|u| held.contains(&u.user) == new && !u.held_out_likes.is_empty());
        those.take(options.users).collect()
    };
    let (users, newcomers) = (asked(false), asked(true));
    if users.is_empty() {
        let text = "no user of the data set has held-out likes; make a larger data set";
        return Err(Error::BadRequest(text.into()));
    }
    let all = users.len() + newcomers.len() * KNOWN.len();
    let mut done = 0;
    let mut step = || {
        done += 1;
        match progress(done, all) {
            ControlFlow::Break(()) => Err(Error::Cancelled),
            ControlFlow::Continue(()) => Ok(()),
        }
    };
    let snapshot = store.snapshot();
    let popular = by_popularity(&snapshot);
    let mut tally = Tally::default();
    for user in &users {
        tally.ask(
            &snapshot,
            &user.user,
            &user.held_out_likes,
            &popular,
            options,
        )?;
        step()?;
    }
    let known = tally.found(options.seed);
    let mut cold = Vec::new();
    for count in KNOWN {
        let mut tally = Tally::default();
        for user in &newcomers {
            let name = format!("{} after {count}", user.user);
            let stated = user
                .likes
                .iter()
                .filter(|l| !user.held_out_likes.contains(l));
            let events: Vec<Event> = stated
                .take(count)
                .map(|l| Event::new(&name, l, Polarity::Like))
                .collect();
            store.append(&events).map_err(failed)?;
            let snapshot = store.snapshot();
            tally.ask(&snapshot, &name, &user.held_out_likes, &popular, options)?;
            drop(snapshot);
            store.forget(&name).map_err(failed)?;
            step()?;
        }
        cold.push((count, tally.found(options.seed)));
    }
    Ok(NeighborReport {
        options: options.clone(),
        users: users.len(),
        held_out_likes: users.iter().map(|u| u.held_out_likes.len()).sum(),
        known,
        newcomers: newcomers.len(),
        cold,
    })
}

/// Attributes by how many like them, most first.
fn by_popularity(snapshot: &Snapshot) -> Vec<String> {
    let mut all: Vec<(usize, String)> = snapshot
        .attributes()
        .map(|a| (snapshot.degrees(a).map_or(0, |d| d.0), a.to_string()))
        .collect();
    all.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    all.into_iter().map(|a| a.1).collect()
}

/// One user's chances of a hit, and recalls.
type Asked = ([f64; 3], [f64; 3]);

/// Each user's hits by finder.
#[derive(Default)]
struct Tally {
    by_finder: BTreeMap<Finder, Vec<Asked>>,
}

impl Tally {
    fn ask(
        &mut self,
        snapshot: &Snapshot,
        user: &str,
        truth: &[String],
        popular: &[String],
        options: &NeighborOptions,
    ) -> Result<()> {
        let own: BTreeSet<String> = snapshot
            .edges(user)
            .map_err(failed)?
            .into_iter()
            .map(|e| e.0)
            .collect();
        let truth: BTreeSet<&str> = truth.iter().map(String::as_str).collect();
        for finder in [Finder::Shared, Finder::Agreeing, Finder::Embedding] {
            if finder == Finder::Embedding && !options.by_embedding {
                continue;
            }
            let added = suggestions(snapshot, user, &own, finder, options.k)?;
            self.add(finder, recall(added.iter().map(String::as_str), &truth));
        }
        let new = || popular.iter().filter(|a| !own.contains(*a));
        self.add(
            Finder::Popularity,
            recall(new().map(String::as_str), &truth),
        );
        let (all, wanted) = (new().count().max(1) as f64, truth.len() as f64);
        let miss = |n: usize| -> f64 {
            let draws = (0..n).map(|i| ((all - wanted - i as f64) / (all - i as f64)).max(0.0));
            draws.product()
        };
        let chance = (
            FIRST.map(|n| 1.0 - miss(n)),
            FIRST.map(|n| (n as f64 / all).min(1.0)),
        );
        let rows = self.by_finder.entry(Finder::Chance).or_default();
        rows.push(chance);
        Ok(())
    }

    fn add(&mut self, finder: Finder, recall: [f64; 3]) {
        let hit = recall.map(|r| f64::from(u8::from(r > 0.0)));
        self.by_finder
            .entry(finder)
            .or_default()
            .push((hit, recall));
    }

    fn found(&self, seed: u64) -> Vec<Found> {
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        let tens = |rows: &[Asked]| rows.iter().map(|r| r.1[1]).collect::<Vec<_>>();
        let popular = self.by_finder.get(&Finder::Popularity);
        let popular = popular.map_or(Vec::new(), |rows| tens(rows));
        let found = |(finder, rows): (&Finder, &Vec<Asked>)| {
            let column = |i: usize| rows.iter().map(|r| r.1[i]).collect::<Vec<_>>();
            let hit = |i: usize| mean(&rows.iter().map(|r| r.0[i]).collect::<Vec<_>>());
            let lift: Vec<f64> = tens(rows)
                .iter()
                .zip(&popular)
                .map(|(a, b)| a - b)
                .collect();
            Found {
                finder: *finder,
                hit: [0, 1, 2].map(hit),
                recall: [0, 1, 2].map(|i| mean(&column(i))),
                recall_10_ci: bootstrap(&column(1), seed),
                lift_10: (mean(&lift), bootstrap(&lift, seed)),
            }
        };
        self.by_finder.iter().map(found).collect()
    }
}

/// What the neighbours add to a user, weightiest first.
fn suggestions(
    snapshot: &Snapshot,
    user: &str,
    own: &BTreeSet<String>,
    finder: Finder,
    k: usize,
) -> Result<Vec<String>> {
    let similar = match finder {
        Finder::Embedding => snapshot.similar_by_embedding(user, k),
        Finder::Agreeing => snapshot.similar(user, k, OverlapMode::Agreeing),
        _ => snapshot.similar(user, k, OverlapMode::Shared),
    };
    let mut votes: BTreeMap<String, f64> = BTreeMap::new();
    for neighbor in similar.map_err(failed)?.neighbors {
        for (attribute, sign) in snapshot.edges(&neighbor.user).map_err(failed)? {
            let weight = match sign {
                Sign::Like => neighbor.similarity,
                Sign::Dislike => -neighbor.similarity,
            };
            *votes.entry(attribute).or_default() += weight;
        }
    }
    let mut ranked: Vec<(String, f64)> = votes
        .into_iter()
        .filter(|(a, w)| *w > 0.0 && !own.contains(a))
        .collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    Ok(ranked.into_iter().map(|r| r.0).collect())
}

/// The share of the truth among the first N.
fn recall<'a>(added: impl Iterator<Item = &'a str>, truth: &BTreeSet<&str>) -> [f64; 3] {
    let most = FIRST[FIRST.len() - 1];
    let right: Vec<bool> = added.take(most).map(|a| truth.contains(a)).collect();
    FIRST.map(|n| right.iter().take(n).filter(|r| **r).count() as f64 / truth.len().max(1) as f64)
}

impl Finder {
    fn words(self) -> &'static str {
        match self {
            Self::Shared => "overlap, shared",
            Self::Agreeing => "overlap, agreeing",
            Self::Embedding => "embedding",
            Self::Popularity => "popularity",
            Self::Chance => "chance",
        }
    }
}

impl NeighborReport {
    /// The report as a table of plain text.
    pub fn to_text(&self) -> String {
        let mut out = format!(
            "{} known users with {} held-out likes; {} neighbours vote\n{:<20}",
            self.users, self.held_out_likes, self.options.k, "by"
        );
        for n in FIRST {
            let _ = write!(
                out,
                "{:>9}{:>11}",
                format!("hit@{n}"),
                format!("recall@{n}")
            );
        }
        out += "  recall@10 over popularity\n";
        for found in &self.known {
            let _ = write!(out, "{:<20}", found.finder.words());
            for i in 0..FIRST.len() {
                let _ = write!(out, "{:>9.3}{:>11.3}", found.hit[i], found.recall[i]);
            }
            let (lift, (low, high)) = found.lift_10;
            let _ = writeln!(out, "  {lift:+.3} [{low:+.3}, {high:+.3}]");
        }
        let _ = writeln!(
            out,
            "\n{} newcomers, recall@10 by likes known",
            self.newcomers
        );
        let _ = write!(out, "{:<20}", "by");
        for (known, _) in &self.cold {
            let _ = write!(out, "{known:>9}");
        }
        out.push('\n');
        for finder in self.known.iter().map(|f| f.finder) {
            let _ = write!(out, "{:<20}", finder.words());
            for (_, found) in &self.cold {
                let of = found.iter().find(|f| f.finder == finder);
                let text = of.map_or("-".into(), |f| format!("{:.3}", f.recall[1]));
                let _ = write!(out, "{text:>9}");
            }
            out.push('\n');
        }
        out
    }

    /// The report as an HTML page with plots.
    pub fn to_html(&self) -> String {
        let known = Lines {
            title: "Held-out likes of known users".into(),
            x: Axis::linear("first N suggestions"),
            y: Axis::linear("recall"),
            series: self
                .known
                .iter()
                .map(|f| {
                    let points = FIRST.iter().zip(f.recall).map(|(n, r)| (*n as f64, r));
                    Series::new(f.finder.words(), points)
                })
                .collect(),
        };
        let series = |finder: Finder| {
            let points = self.cold.iter().filter_map(|(known, found)| {
                let f = found.iter().find(|f| f.finder == finder)?;
                let value = Value {
                    value: f.recall[1],
                    interval: Some(f.recall_10_ci),
                };
                Some((*known as f64, value))
            });
            Series::new(finder.words(), points)
        };
        let cold = Lines {
            title: "Newcomers".into(),
            x: Axis::linear("likes known"),
            y: Axis::linear("recall@10, 95%"),
            series: self.known.iter().map(|f| series(f.finder)).collect(),
        };
        let parts = [verbatim(&self.to_text()), known.to_svg(), cold.to_svg()];
        page("What neighbours know", &parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{SynthOptions, generate};
    use simpatico_storage::Options;

    #[test]
    fn neighbours_find_more_of_what_was_held_out_than_popularity_does() {
        let synth = generate(&SynthOptions {
            users: 400,
            ..SynthOptions::default()
        })
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(
            folder.path(),
            Options {
                mirror: false,
                ..Options::default()
            },
        )
        .unwrap();
        store.append(&synth.events).unwrap();
        let options = NeighborOptions {
            users: 80,
            k: 10,
            by_embedding: false,
            seed: 0,
        };
        let users = store.snapshot().users().count();
        let go_on = |_, _| ControlFlow::Continue(());
        let report = evaluate(&store, &synth, &options, go_on).unwrap();
        assert_eq!(
            store.snapshot().users().count(),
            users,
            "newcomers left again"
        );
        let of = |finder| report.known.iter().find(|f| f.finder == finder).unwrap();
        let (near, popular) = (of(Finder::Agreeing), of(Finder::Popularity));
        assert!(near.lift_10.1.0 > 0.0, "{}", report.to_text());
        assert!(popular.recall[1] > of(Finder::Chance).recall[1]);
        assert!(report.to_html().contains("polyline"));
        let cancelled = evaluate(&store, &synth, &options, |_, _| ControlFlow::Break(()));
        assert!(matches!(cancelled, Err(Error::Cancelled)));
    }

    #[test]
    fn recall_counts_the_truth_among_the_first() {
        let truth: BTreeSet<&str> = ["a", "b"].into();
        let added = ["x", "y", "a", "z", "w", "b"];
        assert_eq!(recall(added.into_iter(), &truth), [0.5, 1.0, 1.0]);
    }
}
