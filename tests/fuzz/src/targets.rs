//! What is fuzzed.

use crate::repair;
use simpatico_engine::gguf::Header;
use simpatico_engine::lora::LoraConfig;
use simpatico_engine::tokenizer::Tokenizer;
use simpatico_engine::weights::Weights;
use simpatico_engine::{picture, provenance};
use simpatico_schema::formats::{Column, Delimited, Format, Line, Lines, read_event};
use simpatico_storage::{Options, Snapshot, Store, fuzzing};
use simpatico_tests::processes::wait;
use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// One reader of foreign bytes.
pub struct Target {
    /// Its name, and its corpus's folder.
    pub name: &'static str,
    /// Files or folders of tests/golden that belong to the corpus too.
    pub also: &'static [&'static str],
    /// Words to put in.
    pub words: &'static [&'static str],
    /// Makes checksums right after a mutation.
    pub mend: fn(&mut Vec<u8>),
    /// Reads the bytes. Whether they were taken as valid.
    pub run: fn(&[u8]) -> bool,
    /// Whether the corpus has valid files.
    pub must_accept: bool,
    /// Cases of a test; about a second's worth.
    pub small: u64,
    /// Cases in full.
    pub full: u64,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "event-lines",
        also: &[],
        words: &[
            "\"user\":",
            "\"at\":-1",
            "\\u0000",
            "\\ud800",
            "{",
            "[",
            "null",
            "1e999",
        ],
        mend: repair::nothing,
        run: event_lines,
        must_accept: true,
        small: 20_000,
        full: 100_000_000,
    },
    Target {
        name: "csv",
        also: &[],
        words: &["\"", "\"\"", ",,", "\r\n", "::", "\u{feff}"],
        mend: repair::nothing,
        run: csv,
        must_accept: true,
        small: 20_000,
        full: 1_000_000,
    },
    Target {
        name: "log-segment",
        also: &[],
        words: &["\u{3}", "\u{9}"],
        mend: |bytes| repair::log_segment(bytes),
        run: log_segment,
        must_accept: true,
        small: 20_000,
        full: 100_000_000,
    },
    Target {
        name: "log-in-a-store",
        also: &["../fuzz/corpus/log-segment"],
        words: &["\u{3}", "\u{9}"],
        mend: |bytes| repair::log_segment(bytes),
        run: log_in_a_store,
        must_accept: true,
        small: 500,
        full: 10_000,
    },
    Target {
        name: "sled-rows",
        also: &[],
        words: &["\u{3}"],
        mend: repair::nothing,
        run: sled_rows,
        must_accept: true,
        small: 5_000,
        full: 1_000_000,
    },
    Target {
        name: "rows-in-a-store",
        also: &["../fuzz/corpus/sled-rows"],
        words: &["\u{3}"],
        mend: repair::nothing,
        run: rows_in_a_store,
        must_accept: true,
        small: 40,
        full: 2_000,
    },
    Target {
        name: "snapshot-file",
        also: &[],
        words: &["\u{3}"],
        mend: repair::snapshot_file,
        run: snapshot_file,
        must_accept: true,
        small: 20_000,
        full: 100_000_000,
    },
    Target {
        name: "snapshot-restored",
        also: &["../fuzz/corpus/snapshot-file"],
        words: &["\u{3}"],
        mend: repair::snapshot_file,
        run: snapshot_restored,
        must_accept: true,
        small: 500,
        full: 100_000,
    },
    Target {
        name: "safetensors",
        also: &[
            "policy/dpo_adapter/adapter_model.safetensors",
            "sage/blind.safetensors",
        ],
        words: &[
            "\"shape\":[",
            "\"F32\"",
            "\"BF16\"",
            "[0,0]",
            "4294967296",
            "{",
        ],
        mend: |bytes| repair::safetensors(bytes),
        run: safetensors,
        must_accept: true,
        small: 3_000,
        full: 10_000_000,
    },
    Target {
        name: "gguf",
        also: &[],
        words: &["general.alignment", "GGUF"],
        mend: repair::nothing,
        run: gguf,
        must_accept: true,
        small: 10_000,
        full: 10_000_000,
    },
    Target {
        name: "tokenizer",
        also: &["lm/tok/tokenizer.json"],
        words: &[
            "\"Regex\":\"(a+)+$\"",
            "\"Split\"",
            "\"Replace\"",
            "null",
            "\"type\":",
            "{",
        ],
        mend: repair::nothing,
        run: tokenizer,
        must_accept: true,
        small: 300,
        full: 10_000_000,
    },
    Target {
        name: "adapter-config",
        also: &[
            "lm/adapter/adapter_config.json",
            "policy/dpo_adapter/adapter_config.json",
        ],
        words: &["\"r\":0", "\"(.*)+\"", "-1", "null", "[", "1e308"],
        mend: repair::nothing,
        run: adapter_config,
        must_accept: true,
        small: 10_000,
        full: 10_000_000,
    },
    Target {
        name: "images",
        also: &["pictures"],
        words: &["IHDR", "VP8L", "ALPH", "ANMF", "eXIf"],
        mend: |bytes| repair::png(bytes),
        run: images,
        must_accept: true,
        small: 600,
        full: 1_000_000,
    },
    Target {
        name: "provenance",
        also: &[],
        words: &["\"version\":", "null", "1e999", "[", "simpatico"],
        mend: |bytes| repair::png(bytes),
        run: provenance_file,
        must_accept: false,
        small: 1_500,
        full: 1_000_000,
    },
    Target {
        name: "arguments",
        also: &[],
        words: &["--store\n", "--\n", "-", "=", "\u{202e}", "../"],
        mend: repair::nothing,
        run: arguments,
        must_accept: false,
        small: 60,
        full: 10_000,
    },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// This thread's folder, in memory where that is possible.
fn folder() -> PathBuf {
    FOLDER.with(|folder| {
        let made = || {
            tempfile::tempdir_in("/dev/shm")
                .or_else(|_| tempfile::tempdir())
                .expect("a temporary folder")
        };
        folder.get_or_init(made).path().to_path_buf()
    })
}

fn lines(bytes: &[u8], format: &Format) -> bool {
    let Ok(mut lines) = Lines::new(bytes) else {
        return false;
    };
    let mut accepted = false;
    while let Ok(Some((number, line))) = lines.next_line() {
        if let Line::Text(text) = line {
            accepted |= matches!(read_event(text, number, format), Ok(Some(_)));
        }
    }
    accepted
}

fn event_lines(bytes: &[u8]) -> bool {
    lines(bytes, &Format::Jsonl)
}

fn csv(bytes: &[u8]) -> bool {
    let columns = vec![
        Column::User,
        Column::Attribute,
        Column::Value,
        Column::At,
        Column::Id,
    ];
    let comma = Delimited {
        columns: columns.clone(),
        ..Delimited::default()
    };
    let colons = Delimited {
        delimiter: "::".into(),
        columns,
        ..Delimited::default()
    };
    let first = lines(bytes, &Format::Delimited(comma));
    lines(bytes, &Format::Delimited(colons)) | first
}

fn plain() -> Options {
    Options {
        mirror: false,
        ..Options::default()
    }
}

/// Reads everything once, as a program would.
fn look_at(moment: &Snapshot) {
    let users: Vec<String> = moment.users().map(str::to_string).collect();
    for user in users.iter().take(20) {
        let _ = moment.registers(user);
        let _ = moment.profile(user, 3);
        let _ = moment.embedding(user);
    }
    let _ = moment.digest();
}

fn log_segment(bytes: &[u8]) -> bool {
    match fuzzing::log_segment(bytes) {
        Ok((moment, whole)) => {
            look_at(&moment);
            whole
        }
        Err(_) => false,
    }
}

/// The same bytes as a store's log, opened and repaired.
fn log_in_a_store(bytes: &[u8]) -> bool {
    let store = folder().join("log-store");
    let _ = std::fs::remove_dir_all(&store);
    std::fs::create_dir_all(store.join("log")).expect("a folder");
    let file = store.join("log/000001-00000001.log");
    std::fs::write(file, bytes).expect("written");
    match Store::open(&store, plain()) {
        Ok(open) => {
            look_at(&open.snapshot());
            true
        }
        Err(_) => {
            let _ = Store::repair(&store);
            false
        }
    }
}

fn snapshot_file(bytes: &[u8]) -> bool {
    let moment = fuzzing::snapshot_file(bytes);
    moment.inspect(look_at).is_ok()
}

/// The same bytes as a file, restored and opened.
fn snapshot_restored(bytes: &[u8]) -> bool {
    let (file, store) = (folder().join("snapshot"), folder().join("restored"));
    let _ = std::fs::remove_dir_all(&store);
    std::fs::write(&file, bytes).expect("written");
    if Store::restore(&file, &store).is_err() {
        assert!(!store.exists(), "a refused snapshot leaves nothing");
        return false;
    }
    let open = Store::open(&store, plain()).expect("what was restored opens");
    look_at(&open.snapshot());
    true
}

/// The first byte picks one of sled's trees, the second a row of it, and the rest is the row's
/// value.
fn sled_rows(bytes: &[u8]) -> bool {
    let [tree, row, value @ ..] = bytes else {
        return false;
    };
    thread_local! {
        static ROWS: OnceCell<fuzzing::Rows> = const { OnceCell::new() };
    }
    let read = ROWS.with(|rows| {
        let rows = rows.get_or_init(|| open_rows(&folder().join("rows open")));
        rows.with(usize::from(*tree), usize::from(*row), value)
    });
    read.inspect(look_at).is_ok()
}

/// The rows of a store that is made for it.
pub(crate) fn open_rows(store: &Path) -> fuzzing::Rows {
    write_store(store, 2);
    fuzzing::Rows::open(store).expect("rows")
}

/// The same in a store whose seal is made right, so that an open reads the rows.
fn rows_in_a_store(bytes: &[u8]) -> bool {
    let [tree, row, value @ ..] = bytes else {
        return false;
    };
    let (template, store) = (folder().join("rows"), folder().join("rows now"));
    if !template.exists() {
        write_store(&template, 90);
    }
    let _ = std::fs::remove_dir_all(&store);
    copy(&template, &store);
    let trees = ["users", "attributes", "learned", "pairs", "edits"];
    {
        let config = sled::Config::new()
            .path(store.join("sled"))
            .flush_every_ms(None);
        let db = config.open().expect("sled opens");
        let tree = db
            .open_tree(trees[usize::from(*tree) % trees.len()])
            .expect("a tree");
        let keys: Vec<_> = tree.iter().keys().flatten().collect();
        if let Some(key) = keys.get(usize::from(*row) % keys.len().max(1)) {
            tree.insert(key, value).expect("inserted");
        }
        db.flush().expect("flushed");
    }
    seal(&store);
    let options = Options::default();
    match Store::open(&store, options) {
        Ok(open) => {
            look_at(&open.snapshot());
            true
        }
        Err(e) => panic!("the log is whole, and yet: {e}"),
    }
}

/// A store with everything in it. After 90 rounds its log is so long that its rows in sled
/// are read at an open.
pub(crate) fn write_store(path: &Path, rounds: usize) {
    use simpatico_schema::{Event, Polarity};
    let store = Store::open(path, Options::default()).expect("a store");
    for round in 0..rounds {
        let events: Vec<Event> = (0..60)
            .map(|n| {
                let (user, attribute) = (format!("user {}", n % 10), format!("attribute {n}"));
                Event::new(&user, &attribute, Polarity::ALL[(round + n) % 4]).at(round as i64)
            })
            .collect();
        store.append(&events).expect("appended");
    }
    let vector = vec![0.5; 8];
    store
        .set_features(&[("attribute 1".into(), vector.clone())])
        .expect("set");
    store
        .set_user_features(&[("user 1".into(), vector)])
        .expect("set");
    let pair = simpatico_schema::edit::PreferencePair {
        user: "user 1".into(),
        caption: "a room".into(),
        chosen: "a lamp".into(),
        rejected: "a tree".into(),
        source: "feedback".into(),
    };
    store.put_pairs(&[pair]).expect("put");
    let edit = simpatico_schema::edit::EditRecord {
        id: "edit".into(),
        user: "user 1".into(),
        caption: "a room".into(),
        instruction: "a lamp".into(),
        attributes: vec!["attribute 1".into()],
        at: 1,
        accepted: None,
    };
    store.put_edit(&edit).expect("put");
    store.close().expect("closed");
}

fn seal(store: &Path) {
    let path = store.join("sled.seal");
    let text = std::fs::read_to_string(&path).expect("a seal");
    let body = text.lines().next().unwrap_or_default();
    let mut seal: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let mut files: Vec<(String, u64, String)> = Vec::new();
    let sled = store.join("sled");
    let mut folders = vec![sled.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).expect("a file");
            let name = path
                .strip_prefix(&sled)
                .expect("below")
                .display()
                .to_string();
            let digest = blake3::hash(&bytes).to_hex().to_string();
            files.push((name, bytes.len() as u64, digest));
        }
    }
    files.sort();
    seal["files"] = serde_json::json!(files);
    let body = seal.to_string();
    let text = format!("{body}\n{}\n", blake3::hash(body.as_bytes()).to_hex());
    std::fs::write(path, text).expect("written");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

fn safetensors(bytes: &[u8]) -> bool {
    let _ = simpatico_storage::sage::Encoder::from_bytes(bytes);
    let Ok(weights) = Weights::from_bytes("fuzz", bytes.to_vec()) else {
        return false;
    };
    let names: Vec<String> = weights.names().map(str::to_owned).collect();
    for name in names.iter().take(20) {
        let _ = weights.raw(name);
    }
    true
}

fn gguf(bytes: &[u8]) -> bool {
    let header = Header::read("fuzz", bytes, bytes.len() as u64);
    if let Ok(header) = &header {
        let _ = Tokenizer::from_gguf("fuzz", header);
    }
    if let Ok(weights) = Weights::from_bytes("fuzz", bytes.to_vec()) {
        let names: Vec<String> = weights.names().map(str::to_owned).collect();
        for name in names.iter().take(20) {
            let _ = weights.raw(name);
        }
    }
    header.is_ok()
}

fn tokenizer(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Ok(tokenizer) = Tokenizer::from_json("fuzz", &text, None) else {
        return false;
    };
    let long = "a".repeat(400) + "!";
    for sample in ["add a lamp, warm light", "", "\u{1f600}<|im_start|>", &long] {
        if let Ok(ids) = tokenizer.encode(sample) {
            let _ = tokenizer.decode(&ids);
        }
    }
    true
}

fn adapter_config(bytes: &[u8]) -> bool {
    LoraConfig::from_json("fuzz", &String::from_utf8_lossy(bytes)).is_ok()
}

fn images(bytes: &[u8]) -> bool {
    picture::decode(bytes).is_ok()
}

fn provenance_file(bytes: &[u8]) -> bool {
    provenance::from_bytes("fuzz", bytes).is_ok()
}

/// The program, if it was built beside this one.
fn program() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let path = own
        .ancestors()
        .skip(1)
        .map(|f| f.join("simpatico"))
        .find(|p| p.is_file());
    path.filter(|_| !cfg!(miri))
}

/// One argument a line. Where the program is not built there is nothing to run.
fn arguments(bytes: &[u8]) -> bool {
    let Some(program) = program() else {
        return false;
    };
    let text = String::from_utf8_lossy(bytes).replace('\0', "");
    let here = folder().join("arguments");
    std::fs::create_dir_all(&here).expect("a folder");
    let (said, limit) = (here.join("said"), Duration::from_secs(30));
    let mut child = Command::new(program)
        .args(text.lines().take(40))
        .current_dir(&here)
        .env("HOME", &here)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&said).expect("a file"))
        .spawn()
        .expect("the program runs");
    let code = wait(&mut child, limit);
    let said = String::from_utf8_lossy(&std::fs::read(&said).expect("a file")).into_owned();
    assert!(
        code.is_some_and(|c| c < 100) && !said.contains("panicked"),
        "{text:?}: {code:?} {said}"
    );
    code == Some(0)
}
