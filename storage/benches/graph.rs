//! The index alone: `cargo bench -p simpatico-storage --bench graph [-- w1 w2 w3 curves export]`
//!
//! Medians of top-10 questions on W1, W2 and W3, one thread, beside byte counters over
//! posting lists in the same run (whose answers must be equal); everyone's top-10; bulk
//! speed; memory; the maximum; and how cost grows with users, degree and k. Figures go to
//! `target/bench/graph.json`, curves to costs.svg beside it (`--out DIR` elsewhere).

mod measure;

use measure::plot::{Axis, Lines, Series};
use measure::{Outcome, Report, SEED, Wanted, median_us, resident_mib, seconds};
use serde_json::json;
use simpatico_schema::random::Philox;
use simpatico_schema::{OverlapMode, Polarity, Sign};
use simpatico_storage::graph::{AttributeId, Graph, Register, UserId};
use simpatico_storage::workload::Workload;
use std::io::{BufWriter, Write};

fn main() -> Outcome {
    let wanted = Wanted::from_args();
    let mut report = Report::new("graph");
    let named = [
        ("w1", Workload::w1(SEED), 20_000),
        ("w2", Workload::w2(SEED), 2_000),
        ("w3", Workload::w3(SEED), 500),
    ];
    for (name, workload, questions) in named {
        if wanted.has(name) {
            measure_workload(name, &workload, questions, &mut report);
        }
    }
    std::fs::create_dir_all(&wanted.out)?;
    if wanted.has("export") {
        export("w1", &Workload::w1(SEED), &wanted)?;
        export("w2", &Workload::w2(SEED), &wanted)?;
    }
    if wanted.has("curves") {
        let curves = [
            users_curve(&mut report),
            degree_curve(&mut report),
            event_curve(&mut report),
            k_curve(&mut report),
        ];
        std::fs::write(wanted.out.join("costs.svg"), side_by_side(&curves))?;
    }
    report.save(&wanted)
}

/// Writes NAME.csv, a line `user,attribute` for each edge, and NAME.top10.csv, the overlaps
/// of the ten most similar users of each of the first 100: what tests/peers works on.
fn export(name: &str, workload: &Workload, wanted: &Wanted) -> Outcome {
    let file = |suffix| std::fs::File::create(wanted.out.join(format!("{name}{suffix}")));
    let mut edges = BufWriter::new(file(".csv")?);
    for (user, attribute, _, _) in workload.edges() {
        writeln!(edges, "{user},{attribute}")?;
    }
    edges.flush()?;
    let (graph, _) = build(workload, workload.edges());
    let mut answers = BufWriter::new(file(".top10.csv")?);
    for user in (0..100).map(UserId) {
        let best = graph.similar(user, 10, OverlapMode::Shared);
        let overlaps: Vec<_> = best
            .iter()
            .map(|(_, overlap)| overlap.to_string())
            .collect();
        writeln!(answers, "{}", overlaps.join(","))?;
    }
    answers.flush()?;
    Ok(())
}

/// A graph with the workload's names and edges, and the seconds the edges took.
fn build(workload: &Workload, edges: impl Iterator<Item = (u32, u32, Sign, i64)>) -> (Graph, f64) {
    let mut graph = Graph::new();
    for attribute in 0..workload.attributes {
        graph.add_attribute(&workload.attribute_name(attribute));
    }
    for user in 0..workload.users {
        graph.add_user(&workload.user_name(user));
    }
    let mut taken = 0.0;
    let mut batch = Vec::new();
    let mut edges = edges.peekable();
    while let Some((user, attribute, sign, at)) = edges.next() {
        let (polarity, id) = (sign.polarity(), "");
        let register = Register { polarity, at, id };
        batch.push((UserId(user), AttributeId(attribute), register));
        if batch.len() == 1 << 16 || edges.peek().is_none() {
            taken += seconds(|| graph.set_batch(&batch)).0;
            batch.clear();
        }
    }
    (graph, taken)
}

fn some_users(workload: &Workload, n: usize) -> Vec<UserId> {
    let mut random = Philox::new(SEED, 1 << 62);
    (0..n)
        .map(|_| UserId(random.below(workload.users)))
        .collect()
}

fn measure_workload(name: &str, workload: &Workload, questions: usize, report: &mut Report) {
    let before = resident_mib();
    let (mut graph, taken) = build(workload, workload.edges());
    let speed = workload.edge_count() as f64 / taken / 1e6;
    report.add(&format!("{name} bulk, M events/s"), json!(round(speed)));
    report.add(
        &format!("{name} memory, MiB"),
        json!(resident_mib() - before),
    );
    if name == "w2" {
        let (_, taken) = build(workload, workload.shuffled_edges(4_096));
        let speed = workload.edge_count() as f64 / taken / 1e6;
        report.add("w2 bulk in random order, M events/s", json!(round(speed)));
    }
    let users = some_users(workload, questions);
    let lists = ByteCounters::new(&graph);
    let mut scratch = vec![0; workload.users as usize];
    for &user in users.iter().take(200) {
        let expected = lists.similar(&graph, user, 10, &mut scratch);
        assert_eq!(graph.similar(user, 10, OverlapMode::Shared), expected);
    }
    for mode in [OverlapMode::Shared, OverlapMode::Agreeing] {
        let (median, p99) = median_us(&users, |user| {
            graph.similar(*user, 10, mode);
        });
        let figure = format!("{name} top-10 {mode:?}, us (median, p99)");
        report.add(&figure, json!([median, p99]));
    }
    let (median, p99) = median_us(users.iter().take(questions.min(1_000)), |user| {
        lists.similar(&graph, *user, 10, &mut scratch);
    });
    let figure = format!("{name} byte counters over lists, us (median, p99)");
    report.add(&figure, json!([median, p99]));
    drop(lists);
    while_events_arrive(name, workload, &mut graph, &users, report);
    if workload.users <= 100_000 {
        let (taken, answers) = seconds(|| {
            let mut answers = 0;
            graph.similar_all(10, OverlapMode::Shared, cores(), |_, best| {
                answers += best.len()
            });
            answers
        });
        let figure = format!("{name} top-10 of everyone, s");
        report.add(&figure, json!(round(taken)));
        report.add(&format!("{name} answers"), json!(answers));
        maximum(name, workload, &mut graph, report);
    }
}

/// One event and one snapshot before each question; only the question is timed.
fn while_events_arrive(
    name: &str,
    workload: &Workload,
    graph: &mut Graph,
    users: &[UserId],
    report: &mut Report,
) {
    let mut random = Philox::new(SEED, 1 << 61);
    let mut questions = Vec::new();
    let mut events = Vec::new();
    for user in users {
        let (taken, ()) = seconds(|| random_event(workload, graph, &mut random));
        events.push(taken);
        let snapshot = graph.clone();
        let (taken, _) = seconds(|| snapshot.similar(*user, 10, OverlapMode::Shared));
        questions.push(taken);
    }
    let (question, p99) = median_us_of(questions);
    let (event, _) = median_us_of(events);
    let figure = format!("{name} top-10 between events, us (median, p99)");
    report.add(&figure, json!([question, p99]));
    let figure = format!("{name} event after a snapshot, us (median)");
    report.add(&figure, json!(event));
}

fn random_event(workload: &Workload, graph: &mut Graph, random: &mut Philox) {
    let user = UserId(random.below(workload.users));
    let attribute = AttributeId(random.below(workload.attributes));
    let polarity = Polarity::ALL[random.below(4) as usize];
    let at = 1_800_000_000_000 + i64::from(random.below(1_000_000));
    let id = "";
    graph.set(user, attribute, Register { polarity, at, id });
}

fn median_us_of(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize);
    let us = |time: Option<&f64>| round(time.unwrap_or(&0.0) * 1e6);
    (us(at(0.5)), us(at(0.99)))
}

fn maximum(name: &str, workload: &Workload, graph: &mut Graph, report: &mut Report) {
    let (first, max) = seconds(|| graph.max_overlap(OverlapMode::Shared));
    report.add(&format!("{name} maximum overlap"), json!(max));
    report.add(
        &format!("{name} maximum, first time, s"),
        json!(round(first)),
    );
    let mut random = Philox::new(SEED, 1 << 60);
    let (median, p99) = median_us(0..500, |_| {
        random_event(workload, graph, &mut random);
        graph.clone().max_overlap(OverlapMode::Shared);
    });
    let figure = format!("{name} an event and the maximum after it, us (median, p99)");
    report.add(&figure, json!([median, p99]));
}

/// The plain way, for comparison: a counter a user, a list an attribute.
struct ByteCounters {
    lists: Vec<Vec<u32>>,
}

impl ByteCounters {
    fn new(graph: &Graph) -> Self {
        let mut lists = vec![Vec::new(); graph.attribute_count()];
        for user in (0..graph.user_id_end()).map(UserId) {
            for (attribute, _) in graph.edges(user) {
                lists[attribute.0 as usize].push(user.0);
            }
        }
        Self { lists }
    }

    fn similar(
        &self,
        graph: &Graph,
        user: UserId,
        k: usize,
        counters: &mut [u8],
    ) -> Vec<(UserId, u32)> {
        counters.fill(0);
        for (attribute, _) in graph.edges(user) {
            for other in &self.lists[attribute.0 as usize] {
                counters[*other as usize] += 1;
            }
        }
        counters[user.0 as usize] = 0;
        // The k-th best count, then all that reach it, then their names.
        let mut with_count = [0_usize; 256];
        counters
            .iter()
            .for_each(|c| with_count[usize::from(*c)] += 1);
        let mut least = 255;
        let mut reach = with_count[255];
        while least > 1 && reach < k {
            least -= 1;
            reach += with_count[least];
        }
        let all = counters.iter().enumerate();
        let reaching = all.filter(|(_, c)| usize::from(**c) >= least);
        let mut best: Vec<_> = reaching
            .map(|(other, c)| (UserId(other as u32), u32::from(*c)))
            .collect();
        best.sort_by(|a, b| {
            let names = || graph.user_name(a.0).cmp(graph.user_name(b.0));
            b.1.cmp(&a.1).then_with(names)
        });
        best.truncate(k);
        best
    }
}

fn users_curve(report: &mut Report) -> String {
    let sizes = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000];
    let points = sizes.map(|users| {
        let workload = Workload::new(users, 5_000, 50, SEED);
        let (graph, _) = build(&workload, workload.edges());
        let asked = some_users(&workload, 300);
        let mode = OverlapMode::Shared;
        let (median, _) = median_us(&asked, |user| drop(graph.similar(*user, 10, mode)));
        (f64::from(users), median)
    });
    report.add(
        "top-10 us by users (5,000 attributes, 50 edges a user)",
        json!(points),
    );
    curve(
        "Top-10 by users",
        "users",
        "microseconds",
        "5,000 attributes, 50 edges",
        &points,
    )
}

fn degree_curve(report: &mut Report) -> String {
    let points = [5, 10, 20, 50, 100, 200, 400, 800].map(|edges| {
        let workload = Workload::new(30_000, 5_000, edges, SEED);
        let (graph, _) = build(&workload, workload.edges());
        let asked = some_users(&workload, 300);
        let mode = OverlapMode::Shared;
        let (median, _) = median_us(&asked, |user| drop(graph.similar(*user, 10, mode)));
        (f64::from(edges), median)
    });
    report.add(
        "top-10 us by edges a user (30,000 users, 5,000 attributes)",
        json!(points),
    );
    curve(
        "Top-10 by degree",
        "edges a user",
        "microseconds",
        "30,000 users",
        &points,
    )
}

fn k_curve(report: &mut Report) -> String {
    let workload = Workload::w2(SEED);
    let (graph, _) = build(&workload, workload.edges());
    let asked = some_users(&workload, 300);
    let points = [1, 3, 10, 30, 100, 300, 1_000, 3_000].map(|k| {
        let mode = OverlapMode::Shared;
        let (median, _) = median_us(&asked, |user| drop(graph.similar(*user, k, mode)));
        (k as f64, median)
    });
    report.add("top-k us by k (W2)", json!(points));
    curve("Top-k by k", "k", "microseconds", "W2", &points)
}

/// An event on an attribute that so many of a million users share, all of whom have ten edges
/// more: the records of users are equally long and equally cold whatever the degree.
fn event_curve(report: &mut Report) -> String {
    const DEGREES: [u32; 6] = [10, 100, 1_000, 10_000, 100_000, 1_000_000];
    let workload = Workload::new(1_000_000, 1_000, 10, SEED);
    let (mut graph, _) = build(&workload, workload.edges());
    let mut at = 1 << 50;
    let mut set = |graph: &mut Graph, user: u32, attribute, polarity| {
        at += 1;
        let register = Register {
            polarity,
            at,
            id: "",
        };
        graph.set(UserId(user), attribute, register);
    };
    let attributes = DEGREES.map(|degree| {
        let attribute = graph.add_attribute(&format!("shared by {degree}"));
        for user in 0..workload.users {
            let is_member = user % (workload.users / degree) == 0;
            // Those who do not share it passed over it.
            let polarity = [Polarity::Pass, Polarity::Like][usize::from(is_member)];
            set(&mut graph, user, attribute, polarity);
        }
        attribute
    });
    let mut random = Philox::new(SEED, 5);
    let mut times = DEGREES.map(|_| Vec::new());
    for _ in 0..300 {
        for ((degree, attribute), times) in DEGREES.iter().zip(attributes).zip(&mut times) {
            let users: Vec<_> = (0..100).map(|_| random.below(workload.users)).collect();
            let (taken, ()) = seconds(|| {
                for user in users {
                    let is_member = user % (workload.users / degree) == 0;
                    let (first, then) = match is_member {
                        true => (Polarity::Clear, Polarity::Like),
                        false => (Polarity::Like, Polarity::Clear),
                    };
                    set(&mut graph, user, attribute, first);
                    set(&mut graph, user, attribute, then);
                }
            });
            times.push(taken / 200.0);
        }
    }
    let medians = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        (times[times.len() / 2] * 1e9).round()
    });
    let points = std::array::from_fn::<_, 6, _>(|i| (f64::from(DEGREES[i]), medians[i]));
    report.add(
        "event ns by degree of its attribute (1,000,000 users)",
        json!(points),
    );
    curve(
        "An event by its attribute's degree",
        "users who share the attribute",
        "nanoseconds",
        "1,000,000 users, ten edges more each",
        &points,
    )
}

/// Four plots in one picture, two to a row.
fn side_by_side(plots: &[String]) -> String {
    const SIZE: (usize, usize) = (720, 420);
    let rows = plots.len().div_ceil(2);
    let mut all = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}">"#,
        SIZE.0 * 2,
        SIZE.1 * rows
    );
    for (i, plot) in plots.iter().enumerate() {
        let place = format!(r#"<svg x="{}" y="{}""#, i % 2 * SIZE.0, i / 2 * SIZE.1);
        all += "\n";
        all += &plot.replacen("<svg", &place, 1);
    }
    all + "</svg>\n"
}

fn curve(title: &str, x: &str, y: &str, line: &str, points: &[(f64, f64)]) -> String {
    let plot = Lines {
        title: title.into(),
        x: Axis::logarithmic(x),
        y: Axis::logarithmic(y),
        series: vec![Series::new(line, points.iter().copied())],
    };
    plot.to_svg()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn round(x: f64) -> f64 {
    (x * 100.0).round() / 100.0
}
