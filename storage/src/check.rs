//! Proving a store: everything once more from the log alone, compared bit for bit; and
//! mending what can be mended.

use crate::embed::Embedder;
use crate::error::Result;
use crate::graph::{AttributeId, UserId};
use crate::log::{self, Strictness};
use crate::state::{Replay, State};
use crate::store::{Options, Places, Store, lock};
use serde::{Deserialize, Serialize};
use simpatico_schema::{OverlapMode, Sign};
use std::path::Path;
use std::time::Instant;

/// Up to so many users, the graph-wide maximum is compared too: it costs all pairs.
const MAX_OVERLAP_USERS: usize = 5_000;
/// Up to so many users' embeddings are compared; evenly spaced where there are more.
const EMBEDDINGS_MAX: usize = 20_000;
/// Problems named in a report.
const PROBLEMS_MAX: usize = 20;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The sequence number that was checked.
    pub as_of: u64,
    /// Users compared.
    pub users: u64,
    /// Registers compared.
    pub registers: u64,
    /// Edges compared.
    pub edges: u64,
    /// Embeddings compared.
    pub embeddings: u64,
    /// Rows of the mirror compared.
    pub mirror_rows: u64,
    /// 128 bits of everything, in hex.
    pub digest: String,
    /// What is not as the log says; empty if all is well. At most 20.
    pub problems: Vec<String>,
    /// Whether there are none.
    pub identical: bool,
    /// What was wrong with the log, and what a repair made of it; `None` where it was whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mended: Option<String>,
    /// Damaged places of the log that a repair went past.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub passed_over: u64,
    /// What a repair had to give up; `None` where nothing was, or nothing was repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<String>,
    /// How long it took.
    pub seconds: f64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl CheckReport {
    /// Whether everything is, to the bit, as the log says.
    pub fn ok(&self) -> bool {
        self.problems.is_empty()
    }

    fn problem(&mut self, text: impl FnOnce() -> String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text());
        }
    }
}

impl Store {
    /// Recomputes everything from the log and compares it, bit for bit, with what answers
    /// are given from: names, registers, edges, postings, features, pairs, edits,
    /// embeddings, and the rows in sled. Writers go on meanwhile. Costs about an open.
    pub fn check(&self) -> Result<CheckReport> {
        let start = Instant::now();
        let shared = &self.shared;
        let _one_at_a_time = lock(&shared.maintenance);
        let (live, at) = shared.at_length(|inner| {
            let at = shared.commit_all(inner)?.at;
            Ok((inner.state.clone(), at))
        })?;
        let mut replay = Replay::default();
        log::replay(
            &shared.path,
            &Places::of(&shared.path).log,
            at.generation,
            Some(&at),
            Strictness::Exact,
            Some(at.frames),
            |frame| replay.apply_frame(frame),
        )?;
        let mut fresh = replay.finish();
        fresh.seq = at.seq;
        let mut report = CheckReport {
            as_of: live.seq,
            digest: format!("{:032x}", live.digest()),
            ..CheckReport::default()
        };
        compare_states(&live, &fresh, &mut report);
        compare_embeddings(&live, &fresh, &mut report);
        let (rows, problems) = shared.check_mirror();
        report.mirror_rows = rows;
        for text in problems {
            report.problem(|| text);
        }
        report.identical = report.ok();
        report.seconds = start.elapsed().as_secs_f64();
        Ok(report)
    }

    /// Makes a store that does not open usable again, and then checks it: its log as far as it
    /// can be believed, its mirror anew. Where sled's rows are whole and of a moment behind
    /// the damage nothing is lost; else the frames behind the damage are kept if the chain of
    /// digests proves them; what is lost is said. The store must not be open.
    pub fn repair(path: impl AsRef<Path>) -> Result<CheckReport> {
        let path = path.as_ref();
        let mark = crate::mark::read(&Places::of(path).mark).ok().flatten();
        let options = Options {
            create: false,
            ..Options::default()
        };
        let (store, damage) = Self::open_with(path, options, Strictness::Repair)?;
        let as_of = store.snapshot().as_of();
        let after = mark.map_or(0, |m| m.seq.saturating_sub(as_of));
        let mut report = store.check()?;
        let lost = damage.as_ref().map_or(0, |d| d.lost).max(after);
        report.passed_over = damage.as_ref().map_or(0, |d| d.passed_over);
        report.mended = damage.map(|d| d.what);
        if lost > 0 || (report.mended.is_some() && report.passed_over == 0) {
            let what = report.mended.as_deref().unwrap_or("the log ended early");
            report.given_up = Some(format!("{lost} acknowledged operations: {what}"));
        }
        store.close()?;
        Ok(report)
    }
}

fn compare_states(live: &State, fresh: &State, report: &mut CheckReport) {
    let (a, b) = (&live.graph, &fresh.graph);
    let numbers = |s: &State| {
        let g = &s.graph;
        let counts = [g.user_count(), g.attribute_count(), g.edge_count() as usize];
        (s.seq, g.user_id_end(), counts, s.encoder.clone())
    };
    if numbers(live) != numbers(fresh) {
        report.problem(|| {
            format!(
                "counts: the log gives {:?}, got {:?}",
                numbers(fresh),
                numbers(live)
            )
        });
    }
    for user in (0..a.user_id_end().max(b.user_id_end())).map(UserId) {
        if a.user_name(user) != b.user_name(user) {
            report.problem(|| format!("user {}: another name than in the log", user.0));
        }
        report.users += 1;
        let mut theirs = b.registers(user);
        for mine in a.registers(user) {
            report.registers += 1;
            report.edges += u64::from(mine.1.polarity.sign().is_some());
            if theirs.next() != Some(mine) {
                report.problem(|| format!("user {}: another register than in the log", user.0));
                break;
            }
        }
        if theirs.next().is_some() {
            report.problem(|| format!("user {}: a register of the log is missing", user.0));
        }
        if !a.edges(user).eq(b.edges(user)) {
            report.problem(|| format!("user {}: other edges than in the log", user.0));
        }
    }
    for attribute in (0..a.attribute_count() as u32).map(AttributeId) {
        if a.attribute_name(attribute) != b.attribute_name(attribute) {
            report.problem(|| format!("attribute {}: another name", attribute.0));
        }
        for sign in [Sign::Like, Sign::Dislike] {
            if !a.posting(attribute, sign).eq(b.posting(attribute, sign)) {
                report.problem(|| format!("attribute {}: another posting", attribute.0));
            }
        }
        if live.feature(attribute) != fresh.feature(attribute) {
            report.problem(|| format!("attribute {}: another text vector", attribute.0));
        }
    }
    let rest = |s: &State| (s.user_features.clone(), s.pairs.clone(), s.edits.clone());
    if rest(live) != rest(fresh) {
        report.problem(|| "learned vectors, pairs or edits: others than in the log".into());
    }
    if a.user_count() <= MAX_OVERLAP_USERS {
        for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
            if a.max_overlap(mode) != b.max_overlap(mode) {
                report
                    .problem(|| format!("greatest overlap ({mode:?}): another than from the log"));
            }
        }
    }
}

fn compare_embeddings(live: &State, fresh: &State, report: &mut CheckReport) {
    let sage = match &live.sage {
        Embedder::Ready(sage) => sage,
        Embedder::Unset => return,
        Embedder::Broken(why) => return report.problem(|| format!("encoder: {}", why.1)),
    };
    let empty = crate::sage::Sage::with_cache(sage.encoder().clone(), 0);
    let again = match fresh.fill_sage(empty, Path::new("")) {
        Ok(again) => again,
        Err(e) => return report.problem(|| e.to_string()),
    };
    let users: Vec<UserId> = live.users().collect();
    for user in users.iter().step_by(users.len() / EMBEDDINGS_MAX + 1) {
        let mine: Vec<_> = live.graph.edges(*user).collect();
        let theirs: Vec<_> = fresh.graph.edges(*user).collect();
        let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        report.embeddings += 1;
        if bits(sage.embedding(*user, &mine)) != bits(again.embedding(*user, &theirs)) {
            report.problem(|| format!("user {}: another embedding than from the log", user.0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Register;
    use simpatico_schema::{Event, Polarity};

    fn store(dir: &Path) -> Store {
        let store = Store::open(dir, Options::default()).unwrap();
        let like = |user: &str, attribute: &str| Event::new(user, attribute, Polarity::Like).at(1);
        let events = ["ada", "ben"].map(|user| like(user, "wood"));
        store.append(&events).unwrap();
        store.append(&[like("ada", "neon")]).unwrap();
        store
    }

    #[test]
    fn a_difference_in_registers_postings_or_the_maximum_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        assert!(store.check().unwrap().ok());
        let before = lock(&store.shared.inner).state.graph.clone();
        let register = Register {
            polarity: Polarity::Dislike,
            at: 2,
            id: "",
        };
        // In memory alone: the log knows nothing of it.
        let set = |user, attribute| {
            let mut inner = lock(&store.shared.inner);
            inner
                .state
                .graph
                .set(UserId(user), AttributeId(attribute), register);
        };
        set(1, 1);
        assert!(!store.check().unwrap().ok());
        lock(&store.shared.inner).state.graph = before;
        assert!(store.check().unwrap().ok());
        set(0, 0);
        let report = store.check().unwrap();
        assert!(
            report.problems.iter().any(|p| p.contains("register")),
            "{report:?}"
        );
    }

    #[test]
    fn a_difference_in_an_embedding_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let golden = "../tests/golden/sage/separated.safetensors";
        let weights = Path::new(env!("CARGO_MANIFEST_DIR")).join(golden);
        store.set_encoder(&weights).unwrap();
        let dim = lock(&store.shared.inner).state.attribute_dim().unwrap();
        let wood = ("wood".to_string(), vec![0.5; dim]);
        store.set_features(&[wood]).unwrap();
        let report = store.check().unwrap();
        assert!(report.ok() && report.embeddings == 2, "{report:?}");
        // A vector that only the embedder got.
        if let Embedder::Ready(sage) = &mut lock(&store.shared.inner).state.sage {
            let other = vec![-0.25; dim];
            sage.set_attribute_feature(AttributeId(1), Some(&other))
                .unwrap();
        }
        let report = store.check().unwrap();
        assert!(
            report.problems.iter().any(|p| p.contains("embedding")),
            "{report:?}"
        );
    }
}
