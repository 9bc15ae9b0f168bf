//! The commands that train and measure, as people use them, at tiny sizes. What needs a
//! language model or MiniLM looks for it in the models folder and says so when it is absent.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

struct Answer {
    status: i32,
    lines: Vec<Value>,
    stderr: String,
}

fn program(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_simpatico"));
    command
        .args(args)
        .arg("--json")
        .current_dir(dir)
        .env("SIMPATICO_STORE", dir.join("store"))
        .stdin(Stdio::null());
    command
}

fn run(dir: &Path, args: &[&str]) -> Answer {
    let output = program(dir, args).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    Answer {
        status: output.status.code().unwrap(),
        lines: stdout
            .lines()
            .map(|l| serde_json::from_str(l).expect(l))
            .collect(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn ask(dir: &Path, args: &[&str]) -> Value {
    let answer = run(dir, args);
    assert_eq!(answer.status, 0, "{args:?}: {}", answer.stderr);
    assert_eq!(answer.lines.len(), 1, "{args:?}");
    answer.lines[0].clone()
}

/// Whether a model of the default bundle is here.
fn has_model(dir: &Path, name: &str) -> bool {
    let here = run(dir, &["models", "list"])
        .lines
        .iter()
        .any(|row| row["model"] == name && row["state"] == "here");
    if !here {
        eprintln!("skipped: {name} is not in the models folder");
    }
    here
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn metrics(folder: &Path) -> Vec<Value> {
    text(folder.join("metrics.jsonl"))
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect()
}

#[test]
fn the_graph_encoder_trains_resumes_to_the_same_bits_and_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ask(
        dir,
        &["dataset", "synth", "--users", "120", "--out", "data"],
    );
    let args = |out: &'static str, steps: &'static str| {
        vec![
            "train",
            "sage",
            "--data",
            "data",
            "--no-text",
            "--hidden",
            "16",
            "--size",
            "16",
            "--out",
            out,
            "--steps",
            steps,
        ]
    };
    let whole = ask(dir, &args("whole", "20"));
    assert_eq!(whole["epochs"], 20);
    assert!(whole["validation_auc"].as_f64().unwrap() > 0.4);
    assert_eq!(metrics(&dir.join("whole")).len(), 20);
    assert!(text(dir.join("whole/metrics.svg")).starts_with("<svg"));

    let again = run(dir, &args("whole", "20"));
    assert_eq!(again.status, 1);
    assert!(again.stderr.contains("--resume"), "{}", again.stderr);

    // Interrupted as Ctrl-C does, in the middle; then resumed.
    let steps = "400";
    let mut child = program(dir, &args("cut", steps))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let checkpoint = dir.join("cut/checkpoint");
    while !checkpoint.is_dir() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "ended before its first checkpoint"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("--resume"), "{words}");
    let reached = metrics(&dir.join("cut")).len();
    assert!(reached > 0 && reached < 400, "{reached}");
    let mut resumed = args("cut", steps);
    resumed.push("--resume");
    let resumed = ask(dir, &resumed);
    let straight = ask(dir, &args("straight", steps));
    assert_eq!(resumed["validation_auc"], straight["validation_auc"]);
    let bytes = |name: &str| std::fs::read(dir.join(name)).unwrap();
    assert!(bytes("cut/sage.safetensors") == bytes("straight/sage.safetensors"));
}

fn interrupt(child: &std::process::Child) {
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn links_and_neighbours_are_measured_without_any_model() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let links = ask(
        dir,
        &[
            "eval",
            "links",
            "--users",
            "200",
            "--no-text",
            "--epochs",
            "20",
            "--out",
            "seen",
        ],
    );
    let methods = links["report"][0]["methods"].as_array().unwrap();
    assert_eq!(methods.len(), 3);
    for method in methods {
        let auc = method["held_out_edges"]["auc"].as_f64().unwrap();
        assert!((0.3..=1.0).contains(&auc), "{method}");
        assert_eq!(method["held_out_users"].as_array().unwrap().len(), 6);
    }
    let near = ask(
        dir,
        &[
            "eval",
            "neighbors",
            "--users",
            "300",
            "--quick",
            "--no-embedding",
            "--out",
            "seen",
        ],
    );
    let known = near["report"]["known"].as_array().unwrap();
    let recall = |finder: &str| {
        let of = known.iter().find(|f| f["finder"] == finder).unwrap();
        of["recall"][1].as_f64().unwrap()
    };
    assert!(recall("agreeing") > recall("popularity"), "{near}");
    assert!(recall("popularity") > recall("chance"), "{near}");
    for page in ["links", "neighbors"] {
        assert!(text(dir.join(format!("seen/{page}.html"))).contains("<svg"));
        let json: Value =
            serde_json::from_str(&text(dir.join(format!("seen/{page}.json")))).unwrap();
        assert!(!json.is_null());
    }
}

#[test]
fn a_folder_of_edits_is_judged() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Any PNG will do: the same picture before and after has all its edges left.
    let png = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/docs");
    let Some(picture) = find_png(&png) else {
        eprintln!("skipped: no PNG in docs");
        return;
    };
    for place in ["edits/source/a.png", "edits/same/a.png"] {
        let place = dir.join(place);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::copy(&picture, place).unwrap();
    }
    let seen = ask(
        dir,
        &["eval", "images", "--edits", "edits", "--out", "seen"],
    );
    let tables = seen["report"]["tables"].as_array().unwrap();
    let kept = |t: &&Value| t["title"].as_str().is_some_and(|t| t.contains("Table 4"));
    let row = &tables.iter().find(kept).unwrap()["rows"][0];
    assert_eq!(row["method"], "same");
    assert_eq!(row["scores"]["edges"]["mean"].as_f64(), Some(1.0));
    assert!(text(dir.join("seen/images.html")).contains("same"));

    // With a CLIP (a tiny one, in both layouts) there are its columns too.
    std::fs::write(dir.join("edits/same/a.txt"), "make it red\n").unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/clip");
    for (folder, case, config, start, end) in [
        ("clip", "transformers", "config.json", 48, 49),
        ("hps", "open_clip", "open_clip_config.json", 58, 59),
    ] {
        let folder = dir.join(folder);
        std::fs::create_dir(&folder).unwrap();
        let copy = |from: String, to: &str| {
            std::fs::copy(golden.join(from), folder.join(to)).unwrap();
        };
        copy(format!("{case}.safetensors"), "model.safetensors");
        copy(format!("{case}.json"), config);
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                           {"Sequence": {"id": "A", "type_id": 0}},
                           {"SpecialToken": {"id": "</s>", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                         {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {
                    "<s>": {"id": "<s>", "ids": [start], "tokens": ["<s>"]},
                    "</s>": {"id": "</s>", "ids": [end], "tokens": ["</s>"]}
                }
            },
            "model": {
                "type": "WordLevel", "unk_token": "[UNK]",
                "vocab": {"[UNK]": 0, "make": 1, "it": 2, "red": 3, "<s>": start, "</s>": end}
            }
        });
        std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }
    let judged = [
        "eval", "images", "--edits", "edits", "--clip", "clip", "--hps", "hps", "--out", "seen",
    ];
    let seen = ask(dir, &judged);
    let tables = seen["report"]["tables"].as_array().unwrap();
    let faithful = |t: &&Value| t["title"].as_str().is_some_and(|t| t.contains("Table 3"));
    let scores = &tables.iter().find(faithful).unwrap()["rows"][0]["scores"];
    let mean = |column: &str| scores[column]["mean"].as_f64().unwrap();
    assert!((mean("clip-ref") - 1.0).abs() < 1e-6, "{scores}");
    assert!(
        mean("clip-t").abs() <= 1.0 && mean("hps").abs() <= 1.0,
        "{scores}"
    );
    std::fs::remove_file(dir.join("clip/tokenizer.json")).unwrap();
    let without = run(dir, &judged);
    assert_eq!(without.status, 1);
    assert!(
        without.stderr.contains("tokenizer.json"),
        "{}",
        without.stderr
    );

    std::fs::remove_file(dir.join("edits/source/a.png")).unwrap();
    let orphan = run(dir, &["eval", "images", "--edits", "edits"]);
    assert_eq!(orphan.status, 1);
    assert!(orphan.stderr.contains("source"), "{}", orphan.stderr);
}

fn find_png(folder: &Path) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    entries.sort();
    entries.iter().find_map(|path| match path.is_dir() {
        true => find_png(path),
        false => path
            .extension()
            .is_some_and(|e| e == "png")
            .then(|| path.clone()),
    })
}

#[test]
fn wrong_use_is_met_with_help() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("empty")).unwrap();
    std::fs::write(dir.join("other.json"), "{}").unwrap();
    for (args, status, word) in [
        (vec!["train", "sft"], 2, "--out"),
        (
            vec!["train", "sage", "--data", "empty", "--out", "o"],
            1,
            "dataset synth",
        ),
        (
            vec!["train", "dpo", "--continue", "--out", "o"],
            1,
            "ingest",
        ),
        (
            vec!["train", "dpo", "--method", "magic", "--out", "o"],
            2,
            "collaborative",
        ),
        (
            vec!["train", "dpo", "--out", "o", "--label-smoothing", "0.7"],
            2,
            "label-smoothing",
        ),
        (
            vec!["train", "sage", "--out", "o", "--steps", "0"],
            2,
            "--steps",
        ),
        (vec!["eval", "images", "--edits", "empty"], 1, "source"),
        (vec!["eval", "prompts", "--only"], 2, "--written"),
        (
            vec!["eval", "prompts", "--written", "other.json"],
            1,
            "not a report",
        ),
        (
            vec!["eval", "links", "--held-out", "2", "--no-text"],
            2,
            "--held-out",
        ),
    ] {
        let answer = run(dir, &args);
        assert_eq!(answer.status, status, "{args:?}: {}", answer.stderr);
        assert!(answer.stderr.contains(word), "{args:?}: {}", answer.stderr);
        assert!(answer.lines.is_empty());
    }
    // A store without answers has nothing to go on from.
    std::fs::write(
        dir.join("events.jsonl"),
        r#"{"user":"ada","attribute":"rustic wood","polarity":"like"}"#,
    )
    .unwrap();
    ask(dir, &["ingest", "events.jsonl"]);
    let nothing = run(dir, &["train", "dpo", "--continue", "--out", "o"]);
    assert_eq!(nothing.status, 1);
    assert!(nothing.stderr.contains("feedback"), "{}", nothing.stderr);
}

#[test]
fn a_data_set_goes_in_and_out_as_parquet_as_it_does_as_json_lines() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let synth = ["dataset", "synth", "--users", "12", "--out"];
    let made = ask(dir, &[&synth[..], &["p", "--format", "parquet"]].concat());
    assert!(made["files"].to_string().contains("pairs.parquet"));
    ask(dir, &[&synth[..], &["j"]].concat());
    let imported = ask(dir, &["dataset", "import", "p"]);
    assert!(imported["applied"].as_u64().unwrap() > 50);
    // The same again, from the other format, changes nothing.
    let again = ask(dir, &["dataset", "import", "j"]);
    assert_eq!(again["applied"], 0);
    assert_eq!(again["pairs"], imported["pairs"]);
    let out = ask(dir, &["dataset", "export", "o", "--format", "parquet"]);
    assert_eq!(out["events"], imported["applied"]);
    let back = ask(dir, &["dataset", "import", "o"]);
    assert_eq!(
        (&back["applied"], &back["events"]),
        (&0.into(), &out["events"])
    );
    std::fs::write(dir.join("o/pairs.parquet"), b"PAR1 no more").unwrap();
    let damaged = run(dir, &["dataset", "import", "o"]);
    assert_eq!(damaged.status, 1);
    assert!(
        damaged.stderr.contains("pairs.parquet"),
        "{}",
        damaged.stderr
    );
}

#[test]
fn the_policy_trains_and_its_bundle_opens() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    if !has_model(dir, "smollm2-135m-instruct") || !has_model(dir, "all-minilm-l6-v2") {
        return;
    }
    ask(
        dir,
        &[
            "dataset", "synth", "--users", "20", "--out", "data", "--page",
        ],
    );
    assert!(text(dir.join("data/statistics.html")).contains("<svg"));
    let mut bundles = Vec::new();
    // The other forms take parts of what the collaborative one takes; the engine's tests have
    // them. Each run here costs seconds: it reads the whole model.
    for method in ["sft", "reading", "collaborative"] {
        let out = method;
        let mut args = vec!["train"];
        match method {
            "sft" => {
                let edits = "{\"input\": \"a cat\", \"edit\": \"make it a dog\"}\n";
                std::fs::write(dir.join("edits.jsonl"), edits).unwrap();
                args.extend(["sft", "--edits", "edits.jsonl"]);
            }
            "reading" => args.extend(["dpo", "--reading", "--hidden", "0.5"]),
            method => {
                args.extend(["dpo", "--method", method, "-k", "1"]);
                args.extend(["--hidden", "0.5", "--reading-weight", "0.5"]);
            }
        }
        args.extend([
            "--data", "data", "--out", out, "--steps", "1", "--batch", "1",
        ]);
        let answer = ask(dir, &args);
        let lines = metrics(&dir.join(out));
        assert_eq!(lines.len(), 1, "{method}");
        // A norm that is not finite is written as null.
        assert!(lines[0]["grad_norm"].as_f64().unwrap() > 0.0, "{method}");
        assert!(dir.join(out).join("metrics.svg").is_file());
        bundles.push(answer["bundle"].as_str().unwrap().to_string());
    }
    // Adapter, soft prompt and graph encoder trained together.
    let trained = dir.join("collaborative/bundle/trained-policy/sage.safetensors");
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/bundles/default");
    let shipped = std::fs::read(shipped.join("sage.safetensors")).unwrap();
    assert_ne!(std::fs::read(trained).unwrap(), shipped);
    // Answers in the store; then on from the bundle that has a soft prompt.
    ask(dir, &["ingest", "data/events.jsonl.gz"]);
    let pairs = text_gz(&dir.join("data/pairs.jsonl.gz"));
    let pair: Value = serde_json::from_str(pairs.lines().next().unwrap()).unwrap();
    record(dir, &pair);
    let answer = ask(
        dir,
        &[
            "train",
            "dpo",
            "--continue",
            "--data",
            "data",
            "--out",
            "more",
            "--steps",
            "1",
            "--batch",
            "1",
            "--replay",
            "1",
            "-k",
            "1",
            "--bundle",
            &bundles[2],
        ],
    );
    assert_eq!(answer["recorded_pairs"], 1);
    assert_eq!(answer["method"], "collaborative");
    let user = pair["user"].as_str().unwrap();
    let bundle = answer["bundle"].as_str().unwrap();
    let words = ask(
        dir,
        &[
            "instruct",
            "--user",
            user,
            "--caption",
            "a cat on a sofa",
            "--bundle",
            bundle,
        ],
    );
    assert!(words["instruction"].as_str().unwrap().len() > 5, "{words}");
    assert!(words["fallback"].is_null(), "{words}");
}

/// Puts a pair into the store as an answer would.
fn record(dir: &Path, pair: &Value) {
    let word = |key: &str| pair[key].as_str().unwrap().to_string();
    let store =
        simpatico_storage::Store::open(dir.join("store"), simpatico_storage::Options::default())
            .unwrap();
    let pair = simpatico_schema::edit::PreferencePair {
        user: word("user"),
        caption: word("caption"),
        chosen: word("chosen"),
        rejected: word("rejected"),
        source: "feedback".into(),
    };
    store.put_pairs(&[pair]).unwrap();
    store.close().unwrap();
}

fn text_gz(path: &Path) -> String {
    let mut text = String::new();
    let file = std::fs::File::open(path).unwrap();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(file), &mut text).unwrap();
    text
}
