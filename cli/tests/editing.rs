//! Instructions, edits, answers and replays as people ask for them, on shipped artwork. What
//! needs a model looks for it in the models folder and says so when it is absent.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const LIKES: [&str; 3] = ["rustic wood", "deep forest", "warm tungsten glow"];

/// A folder with a store of three likes, and the program run in it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let like = |a: &str| format!(r#"{{"user":"ada","attribute":"{a}","polarity":"like"}}"#);
        let likes = LIKES.map(like);
        std::fs::write(bench.path("events.jsonl"), likes.join("\n")).unwrap();
        bench.answer(&["ingest", "events.jsonl"]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_simpatico"));
        command
            .args(args)
            .args(["--json", "--device", "cpu"])
            .args(["--bundle", &bundle().to_string_lossy()])
            .current_dir(self.dir.path())
            .env("SIMPATICO_STORE", self.path("store"))
            .stdin(Stdio::null());
        command
    }

    /// The one answer of a command that must do well.
    fn answer(&self, args: &[&str]) -> Value {
        let output = self.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a command that must fail says; it must have answered nothing.
    fn refusal(&self, command: &mut Command, status: i32) -> String {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", said(&output));
        assert!(output.stdout.is_empty(), "{command:?}");
        assert!(!said(&output).contains("panicked"), "{}", said(&output));
        said(&output)
    }

    fn has(&self, model: &str) -> bool {
        let output = self.command(&["models", "list"]).output().unwrap();
        let rows = String::from_utf8(output.stdout).unwrap();
        let here = rows.lines().any(|row| {
            let row: Value = serde_json::from_str(row).unwrap();
            row["model"] == model && row["state"] == "here"
        });
        if !here {
            eprintln!("skipped: {model} is not in the models folder");
        }
        here
    }
}

fn bundle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/bundles/default")
}

fn artwork(name: &str) -> String {
    let file = bundle().join("artwork").join(name);
    file.to_string_lossy().into_owned()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const MODELS: [&str; 2] = ["smollm2-135m-instruct", "all-minilm-l6-v2"];

#[test]
fn an_edit_is_made_answered_and_made_again_to_the_byte() {
    let bench = Bench::new();
    if !MODELS.into_iter().all(|model| bench.has(model)) {
        return;
    }
    let teapot = artwork("teapot.png");
    let edit = |out: &str, seed: &str| {
        bench.answer(&[
            "edit",
            "--user",
            "ada",
            "--image",
            &teapot,
            "--caption",
            "a teapot",
            "--steps",
            "4",
            "--seed",
            seed,
            "--out",
            out,
        ])
    };
    let first = edit("first.png", "1");
    assert_eq!(first["fallback"], Value::Null);
    let likes = first["why"]["likes"].as_array().unwrap();
    assert!(!likes.is_empty(), "{first}");
    assert!(likes.iter().all(|like| LIKES.iter().any(|own| like == own)));
    let picture = |name: &str| std::fs::read(bench.path(name)).unwrap();

    // The same request gives the same bytes, another seed another picture.
    edit("again.png", "1");
    edit("other.png", "2");
    assert_eq!(pixels(&picture("first.png")), pixels(&picture("again.png")));
    assert_ne!(pixels(&picture("first.png")), pixels(&picture("other.png")));

    // It keeps the source's size and its alpha.
    let source = image::open(&teapot).unwrap();
    let edited = image::open(bench.path("first.png")).unwrap();
    assert_eq!(
        (source.width(), source.height()),
        (edited.width(), edited.height())
    );
    assert_eq!(source.color().has_alpha(), edited.color().has_alpha());

    // From the PNG alone (and the source) the same file comes out.
    bench.answer(&[
        "replay",
        "first.png",
        "--image",
        &teapot,
        "--out",
        "replayed.png",
    ]);
    assert_eq!(picture("first.png"), picture("replayed.png"));
    assert!(bench.path("first.json").exists() || bench.path("first.png.json").exists());

    // An answer becomes events, and the next instruction knows them.
    let id = first["edit_id"].as_str().unwrap();
    let learned = bench.answer(&["feedback", id, "accept"]);
    let events = learned["events"].as_array().unwrap();
    assert!(!events.is_empty(), "{learned}");
    let liked = events[0]["attribute"].as_str().unwrap();
    let profile = bench.answer(&["profile", "ada"]).to_string();
    assert!(profile.contains(liked), "{profile}");

    // Somebody new gets anyone's instruction, and is told so.
    let generic = bench.answer(&["instruct", "--user", "nobody", "--caption", "a red chair"]);
    assert_eq!(generic["fallback"], "generic");
    let check = bench.answer(&["check"]);
    assert!(
        check["problems"].as_array().is_none_or(Vec::is_empty),
        "{check}"
    );
}

#[test]
fn wishes_in_plain_words_are_followed() {
    let bench = Bench::new();
    if !MODELS.into_iter().all(|model| bench.has(model)) {
        return;
    }
    let wished = |cue: &str| {
        let words = [
            "instruct",
            "--user",
            "ada",
            "--caption",
            "a red chair",
            "--cue",
            cue,
        ];
        bench.answer(&words)["why"]["wish"].clone()
    };
    // None of these is a name of the vocabulary's.
    for cue in [
        "more snow",
        "turn it purple",
        "swap the backdrop",
        "make it cosy",
    ] {
        let followed = wished(cue);
        assert!(
            followed.as_array().is_some_and(|w| !w.is_empty()),
            "{cue}: {followed}"
        );
    }
    // Nothing is looked for where a wish denies something, or means nothing that is known.
    for cue in ["no snow please", "surprise me"] {
        assert_eq!(wished(cue), Value::Null, "{cue}");
    }
}

/// A mask was softened at the edit and not at the replay: other bytes at its edge.
#[test]
fn an_edit_with_mask_and_two_instructions_is_made_again_to_the_byte() {
    let bench = Bench::new();
    if !MODELS.into_iter().all(|model| bench.has(model)) {
        return;
    }
    let teapot = artwork("teapot.png");
    let size = image::open(&teapot).unwrap();
    let mask = image::GrayImage::from_fn(size.width(), size.height(), |x, _| {
        image::Luma([if x > size.width() / 2 { 255 } else { 0 }])
    });
    mask.save(bench.path("mask.png")).unwrap();
    let edit = |soften: &str, out: &str| {
        bench.answer(&[
            "edit",
            "--user",
            "ada",
            "--image",
            &teapot,
            "--instruction",
            "make the teapot blue",
            "--instruction",
            "put it in a forest",
            "--mask",
            "mask.png",
            "--mask-soften",
            soften,
            "--steps",
            "2",
            "--out",
            out,
        ])
    };
    let made = edit("20", "masked.png");
    assert_eq!(
        made["instruction"],
        "make the teapot blue; put it in a forest"
    );
    edit("0", "hard.png");
    let picture = |name: &str| std::fs::read(bench.path(name)).unwrap();
    assert_ne!(
        pixels(&picture("masked.png")),
        pixels(&picture("hard.png")),
        "the edge matters"
    );
    for name in ["masked.png", "hard.png"] {
        let again = format!("again-{name}");
        bench.answer(&[
            "replay", name, "--image", &teapot, "--mask", "mask.png", "--out", &again,
        ]);
        assert_eq!(picture(name), picture(&again), "{name}");
    }
    let record = String::from_utf8(picture("masked.json")).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    assert_eq!(record["instructions"].as_array().unwrap().len(), 2);
}

fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png)
        .unwrap()
        .into_rgba8()
        .into_raw()
}

#[test]
fn wrong_use_of_pictures_is_met_with_help() {
    let bench = Bench::new();
    std::fs::write(bench.path("notes.png"), "these are notes").unwrap();
    let good = artwork("teapot.png");
    let whole = std::fs::read(&good).unwrap();
    std::fs::write(bench.path("half.png"), &whole[..whole.len() / 2]).unwrap();
    let edit = |image: &str, more: &[&str]| {
        let mut args = vec!["edit", "--user", "ada", "--image", image];
        args.extend(more);
        bench.command(&args)
    };
    for (image, more, status, word) in [
        (
            "missing.png",
            ["--out", "o.png"].as_slice(),
            1,
            "missing.png",
        ),
        ("notes.png", &["--out", "o.png"], 1, "notes.png"),
        ("half.png", &["--out", "o.png"], 1, "half.png"),
        (".", &["--out", "o.png"], 1, "."),
        (&good, &["--out", "o.jpg"], 2, ".png"),
        (&good, &["--out", "o.png", "--strength", "2"], 2, "0 to 1"),
        (
            &good,
            &["--out", "o.png", "--size", "0x9"],
            2,
            "WIDTHxHEIGHT",
        ),
        (
            &good,
            &["--out", "o.png", "--lora", "none.safetensors=0.5"],
            1,
            "none.safetensors",
        ),
        (
            &good,
            &["--out", "o.png", "--backend", "magic"],
            2,
            "img2img",
        ),
        (
            &good,
            &["--out", "o.png", "--mask", "notes.png"],
            1,
            "notes.png",
        ),
    ] {
        let text = bench.refusal(&mut edit(image, more), status);
        assert!(text.contains(word), "{image} {more:?}: {text}");
        assert!(!bench.path("o.png").exists());
    }
    // No models: what to fetch, and where to put it by hand.
    let none = bench.path("no models");
    std::fs::create_dir(&none).unwrap();
    let text = bench.refusal(
        edit(&good, &["--out", "o.png"]).env("SIMPATICO_MODELS", &none),
        1,
    );
    assert!(
        text.contains("models pull") && text.contains("no models"),
        "{text}"
    );
    // A bundle that is none.
    let mut other = Command::new(env!("CARGO_BIN_EXE_simpatico"));
    other.args([
        "instruct",
        "--user",
        "ada",
        "--caption",
        "x",
        "--bundle",
        "nowhere",
    ]);
    other.current_dir(bench.dir.path());
    let text = bench.refusal(&mut other, 1);
    assert!(text.contains("nowhere"), "{text}");
    // Answers to what was never asked.
    let text = bench.refusal(&mut bench.command(&["feedback", "e-1", "accept"]), 1);
    assert!(text.contains("e-1"), "{text}");
    let mut elsewhere = bench.command(&["feedback", "e-1", "accept"]);
    let text = bench.refusal(elsewhere.env("SIMPATICO_STORE", bench.path("no store")), 1);
    assert!(text.contains("no store"), "{text}");
}

#[test]
fn a_picture_that_cannot_be_written_leaves_nothing_half_done() {
    let bench = Bench::new();
    if !MODELS.into_iter().all(|model| bench.has(model)) {
        return;
    }
    let teapot = artwork("teapot.png");
    let mut edit = bench.command(&[
        "edit",
        "--user",
        "ada",
        "--image",
        &teapot,
        "--steps",
        "1",
        "--out",
        "gone/o.png",
    ]);
    let text = bench.refusal(&mut edit, 1);
    assert!(text.contains("gone"), "{text}");
    assert!(!bench.path("gone").exists());
}
