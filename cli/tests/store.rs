//! The store's commands as people use them: exit status, stdout and stderr together, on
//! real events.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

struct Bench {
    dir: tempfile::TempDir,
}

struct Answer {
    status: i32,
    lines: Vec<Value>,
    stderr: String,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn run(&self, args: &[&str]) -> Answer {
        self.run_with_input(args, b"")
    }

    fn run_with_input(&self, args: &[&str], input: &[u8]) -> Answer {
        let mut child = Command::new(env!("CARGO_BIN_EXE_simpatico"))
            .args(args)
            .arg("--json")
            .env("SIMPATICO_STORE", self.dir.path().join("store"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // The program may end before it has read everything; that is its right.
        let _ = child.stdin.take().unwrap().write_all(input);
        answer(&child.wait_with_output().unwrap())
    }

    /// Runs a command that must succeed with one answer.
    fn ask(&self, args: &[&str]) -> Value {
        let answer = self.run(args);
        assert_eq!(answer.status, 0, "{args:?}: {}", answer.stderr);
        assert_eq!(answer.lines.len(), 1, "{args:?}");
        answer.lines[0].clone()
    }
}

fn answer(output: &Output) -> Answer {
    let stdout = std::str::from_utf8(&output.stdout).unwrap();
    Answer {
        status: output.status.code().unwrap(),
        lines: stdout
            .lines()
            .map(|l| serde_json::from_str(l).expect(l))
            .collect(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn data(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data")
        .join(name)
        .display()
        .to_string()
}

/// The edges of a file of events, by the rule of registers, computed the plain way.
fn edges_of(events: &[(String, String, i64, String)]) -> BTreeMap<String, BTreeMap<String, bool>> {
    let rank = |p: &str| {
        ["clear", "pass", "dislike", "like"]
            .iter()
            .position(|w| *w == p)
    };
    let mut registers: BTreeMap<(String, String), (i64, Option<usize>)> = BTreeMap::new();
    for (user, attribute, at, polarity) in events {
        let new = (*at, rank(polarity));
        let register = registers
            .entry((user.clone(), attribute.clone()))
            .or_insert(new);
        *register = (*register).max(new);
    }
    let mut edges: BTreeMap<String, BTreeMap<String, bool>> = BTreeMap::new();
    for ((user, attribute), (_, polarity)) in registers {
        let of_user = edges.entry(user).or_default();
        if polarity >= Some(2) {
            of_user.insert(attribute, polarity == Some(3));
        }
    }
    edges
}

/// Everyone's neighbours by counting every pair.
fn brute_force(
    edges: &BTreeMap<String, BTreeMap<String, bool>>,
    agreeing: bool,
    k: usize,
) -> (BTreeMap<String, Vec<(String, u64)>>, u64) {
    let mut holders: BTreeMap<(&str, bool), Vec<&str>> = BTreeMap::new();
    for (user, attributes) in edges {
        for (attribute, like) in attributes {
            holders
                .entry((attribute, agreeing && *like))
                .or_default()
                .push(user);
        }
    }
    let mut most = 0;
    let mut answers = BTreeMap::new();
    for (user, attributes) in edges {
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        for (attribute, like) in attributes {
            for other in &holders[&(attribute.as_str(), agreeing && *like)] {
                *counts.entry(other).or_default() += 1;
            }
        }
        counts.remove(user.as_str());
        let mut ranked: Vec<(String, u64)> = counts
            .into_iter()
            .map(|(u, n)| (u.to_string(), n))
            .collect();
        ranked.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        most = most.max(ranked.first().map_or(0, |r| r.1));
        ranked.truncate(k);
        answers.insert(user.clone(), ranked);
    }
    (answers, most)
}

fn assert_everyone_is_right(bench: &Bench, events: &[(String, String, i64, String)]) {
    let edges = edges_of(events);
    for (mode, agreeing) in [("shared", false), ("agreeing", true)] {
        let (expected, most) = brute_force(&edges, agreeing, 10);
        let answer = bench.run(&["similar", "--all", "-k", "10", "--overlap", mode]);
        assert_eq!(answer.status, 0, "{}", answer.stderr);
        assert_eq!(answer.lines.len(), expected.len());
        for line in &answer.lines {
            assert_eq!(line["max_overlap"].as_u64(), Some(most), "{mode}");
            assert_eq!(line["overlap_mode"], mode);
            let got: Vec<(String, u64)> = line["neighbors"]
                .as_array()
                .unwrap()
                .iter()
                .map(|n| {
                    (
                        n["user"].as_str().unwrap().into(),
                        n["overlap"].as_u64().unwrap(),
                    )
                })
                .collect();
            assert_eq!(
                &got,
                &expected[line["user"].as_str().unwrap()],
                "{mode} {}",
                line["user"]
            );
            for n in line["neighbors"].as_array().unwrap() {
                let ratio = n["overlap"].as_f64().unwrap() / most as f64;
                assert!((n["similarity"].as_f64().unwrap() - ratio).abs() < 1e-12);
            }
        }
    }
}

fn polis_events() -> Vec<(String, String, i64, String)> {
    let file = std::fs::File::open(data("polis-events.jsonl.gz")).unwrap();
    let mut lines = simpatico_schema::formats::Lines::new(file).unwrap();
    let mut events = Vec::new();
    while let Some((_, line)) = lines.next_line().unwrap() {
        let simpatico_schema::formats::Line::Text(text) = line else {
            panic!("long line")
        };
        let value: Value = serde_json::from_slice(text).unwrap();
        let word = |name: &str| value[name].as_str().unwrap().to_string();
        events.push((
            word("user"),
            word("attribute"),
            value["at"].as_i64().unwrap(),
            word("polarity"),
        ));
    }
    events
}

fn jsonl(events: &[(String, String, i64, String)]) -> String {
    events
        .iter()
        .map(|(user, attribute, at, polarity)| {
            serde_json::json!({"user": user, "attribute": attribute, "at": at, "polarity": polarity})
                .to_string()
                + "\n"
        })
        .collect()
}

#[test]
fn real_opinions_give_everyone_the_neighbours_a_brute_force_count_gives() {
    let bench = Bench::new();
    let mut events = polis_events();
    let report = bench.ask(&["ingest", &data("polis-events.jsonl.gz")]);
    assert_eq!(report["read"].as_u64(), Some(events.len() as u64));
    assert_eq!(report["rejected"], 0);
    assert_everyone_is_right(&bench, &events);
    assert_eq!(bench.ask(&["check"])["identical"], true);

    // The same again changes nothing.
    let again = bench.ask(&["ingest", &data("polis-events.jsonl.gz")]);
    assert_eq!(again["applied"], 0);
    assert_eq!(again["unchanged"], again["read"]);

    // Clears later than everything, in the middle of a shuffled replay in a new store.
    let latest = events.iter().map(|e| e.2).max().unwrap();
    let cleared: Vec<_> = events
        .iter()
        .step_by(7)
        .map(|(user, attribute, ..)| {
            (
                user.clone(),
                attribute.clone(),
                latest + 1,
                "clear".to_string(),
            )
        })
        .collect();
    events.extend(cleared);
    simpatico_schema::random::Philox::new(3, 0).shuffle(&mut events);
    let shuffled = Bench::new();
    let file = shuffled.file("shuffled.jsonl", &jsonl(&events));
    shuffled.ask(&["ingest", file.to_str().unwrap()]);
    assert_everyone_is_right(&shuffled, &events);
    assert_eq!(shuffled.ask(&["check"])["identical"], true);
}

#[test]
fn ratings_with_thresholds_are_read_by_the_documented_command() {
    let bench = Bench::new();
    let report = bench.ask(&[
        "ingest",
        &data("movietweetings-ratings.dat.gz"),
        "--format",
        "csv",
        "--delimiter",
        "::",
        "--columns",
        "user,attribute,value,at",
        "--like-at",
        "7",
        "--dislike-at",
        "4",
        "--time-unit",
        "s",
    ]);
    assert_eq!(report["read"], 20_000);
    let file = std::fs::File::open(data("movietweetings-ratings.dat.gz")).unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(file), &mut text).unwrap();
    let events: Vec<_> = text
        .lines()
        .map(|line| {
            let f: Vec<&str> = line.split("::").collect();
            let polarity = match f[2].parse::<i32>().unwrap() {
                7.. => "like",
                ..=4 => "dislike",
                _ => "pass",
            };
            let at = f[3].parse::<i64>().unwrap() * 1000;
            (f[0].to_string(), f[1].to_string(), at, polarity.to_string())
        })
        .collect();
    assert_everyone_is_right(&bench, &events);
}

#[test]
fn bad_lines_are_named_and_kept_and_the_rest_goes_on() {
    let bench = Bench::new();
    let file = bench.file(
        "mixed.jsonl",
        "{\"user\":\"a\",\"attribute\":\"x\",\"polarity\":\"like\"}\n\
         not json\n\
         {\"user\":\"\",\"attribute\":\"x\",\"polarity\":\"like\"}\n\
         {\"user\":\"b\",\"attribute\":\"x\",\"polarity\":\"love\"}\n\
         {\"user\":\"b\",\"attribute\":\"x\",\"polarity\":\"like\"}\n",
    );
    let answer = bench.run(&["ingest", file.to_str().unwrap()]);
    assert_eq!(answer.status, 3);
    assert_eq!(answer.lines[0]["applied"], 2);
    assert_eq!(answer.lines[0]["rejected"], 3);
    assert!(answer.stderr.contains("mixed.jsonl:2"), "{}", answer.stderr);
    let kept = std::fs::read_to_string(bench.dir.path().join("store/rejected.jsonl")).unwrap();
    let lines: BTreeSet<u64> = kept
        .lines()
        .map(|l| {
            serde_json::from_str::<Value>(l).unwrap()["line"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(lines, BTreeSet::from([2, 3, 4]));
    let similar = bench.ask(&["similar", "a"]);
    assert_eq!(similar["neighbors"][0]["user"], "b");

    let strict = Bench::new();
    assert_eq!(
        strict
            .run(&["ingest", "--strict", file.to_str().unwrap()])
            .status,
        1
    );
}

#[test]
fn wrong_use_is_met_with_help() {
    let bench = Bench::new();
    for (args, status, word) in [
        (vec!["similar", "a"], 1, "ingest"),
        (vec!["frobnicate"], 2, "Usage"),
        (vec!["ingest", "no-such-file"], 1, "no-such-file"),
        (vec!["similar"], 2, "USER"),
        (vec!["ingest", "-", "--delimiter", ""], 2, "delimiter"),
    ] {
        let answer = bench.run(&args);
        assert_eq!(answer.status, status, "{args:?}: {}", answer.stderr);
        assert!(answer.stderr.contains(word), "{args:?}: {}", answer.stderr);
        assert!(answer.lines.is_empty());
    }
    bench.run_with_input(
        &["ingest", "-"],
        br#"{"user":"a","attribute":"x","polarity":"like"}"#,
    );
    let unknown = bench.run(&["similar", "nobody"]);
    assert_eq!(unknown.status, 1);
    assert!(unknown.stderr.contains("nobody"), "{}", unknown.stderr);
}

#[test]
fn a_forgotten_user_leaves_no_byte_behind_and_a_snapshot_restores_the_rest() {
    let bench = Bench::new();
    let mut text = String::new();
    for user in ["ada", "marker-zq-user", "bob"] {
        for attribute in ["oak", "brass"] {
            text += &format!(
                "{{\"user\":\"{user}\",\"attribute\":\"{attribute}\",\"polarity\":\"like\",\"at\":5}}\n"
            );
        }
    }
    bench.run_with_input(&["ingest", "-"], text.as_bytes());
    assert_eq!(
        bench.ask(&["similar", "ada"])["neighbors"]
            .as_array()
            .unwrap()
            .len(),
        2
    );
    // Pages of ours go with the user, others' files are told, and nobody else's are touched.
    let made = bench.dir.path().join("made");
    std::fs::create_dir(&made).unwrap();
    let page = |user: &str| format!("<meta name=generator content=Simpatico><p>{user}");
    std::fs::write(made.join("mine.html"), page("marker-zq-user")).unwrap();
    std::fs::write(made.join("other.html"), page("marker-zq-username")).unwrap();
    std::fs::write(made.join("notes.txt"), "seen: marker-zq-user").unwrap();
    let made = made.display().to_string();
    let receipt = bench.ask(&["forget", "marker-zq-user", "--files", &made]);
    assert!(!receipt.to_string().contains("marker-zq-user"));
    assert_eq!(
        receipt["removed"],
        serde_json::json!([made.clone() + "/mine.html"])
    );
    assert_eq!(
        receipt["still_naming"],
        serde_json::json!([made.clone() + "/notes.txt"])
    );
    assert_eq!(std::fs::read_dir(&made).unwrap().count(), 2);
    bench.ask(&["compact"]);
    assert_eq!(
        bench.ask(&["similar", "ada"])["neighbors"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let store = bench.dir.path().join("store");
    assert!(!contains(&store, b"marker-zq-user"));
    assert!(contains(&store, b"ada"));

    let file = bench
        .dir
        .path()
        .join("whole.snapshot")
        .display()
        .to_string();
    bench.ask(&["snapshot", &file]);
    let other = Bench::new();
    other.ask(&["restore", &file]);
    assert_eq!(
        other.ask(&["similar", "ada"]),
        bench.ask(&["similar", "ada"])
    );
    assert_eq!(other.ask(&["check"])["identical"], true);
    assert_eq!(
        other.run(&["restore", &file]).status,
        1,
        "a store is already there"
    );
}

fn contains(dir: &Path, needle: &[u8]) -> bool {
    std::fs::read_dir(dir).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return contains(&path, needle);
        }
        let bytes = std::fs::read(&path).unwrap();
        bytes.windows(needle.len()).any(|w| w == needle)
    })
}
