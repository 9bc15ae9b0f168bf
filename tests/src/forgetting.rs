//! The row of forgetting: nothing of a hundred marked users is left in any file.

use crate::commands::program;
use crate::files::{copy, files, holding, in_memory};
use crate::suite::{Plan, case};
use simpatico_schema::edit::{EditRecord, PreferencePair, Provenance};
use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Polarity};
use simpatico_storage::{Options, Store, StoreError};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// In every name, id and text of those who will be forgotten, and in nothing else.
const MARKER: &str = "zqmarked";
const MARKED: u64 = 100;
/// So many of them have pictures and a page, and are forgotten by the program.
const PICTURED: u64 = 10;
/// In one of so many cases.
const PICTURED_CASES: u64 = 5;

fn marked(n: u64) -> String {
    format!("{MARKER}-user-{n}")
}

fn event(n: u64) -> Event {
    let mut random = Philox::new(8, n);
    let user = format!("user {}", random.below(50));
    let attribute = format!("attribute {}", random.below(40));
    let mut event = Event::new(&user, &attribute, Polarity::ALL[random.below(4) as usize]);
    event.id = Some(format!("id {n}"));
    event.at(n as i64)
}

fn pair(user: &str, text: &str) -> PreferencePair {
    PreferencePair {
        user: user.into(),
        caption: format!("a room {text}"),
        chosen: format!("add a lamp {text}"),
        rejected: "add a tree".into(),
        source: "feedback".into(),
    }
}

fn edit_id(n: u64) -> String {
    format!("{MARKER} edit {n}")
}

fn edit(user: &str, id: &str) -> EditRecord {
    EditRecord {
        id: id.into(),
        user: user.into(),
        caption: format!("a room of {id}"),
        instruction: "add a lamp".into(),
        attributes: vec![format!("an attribute of {id}")],
        at: 5,
        accepted: Some(true),
    }
}

/// Fills a store with others, and with the marked where they are wanted.
fn fill(path: &Path, with_marked: bool) -> Result<(), StoreError> {
    let store = Store::open(path, Options::default())?;
    for n in 0..400u64 {
        store.append_with(&[event(n)], simpatico_storage::Ack::Accepted)?;
        if n == 200 && with_marked {
            // The middle of the file, and sled holds them too.
            add_marked(&store)?;
            store.check()?;
        }
    }
    store.put_pairs(&[pair("user 1", "")])?;
    store.put_edit(&edit("user 2", "edit 1"))?;
    store.set_features(&[("attribute 1".into(), vec![0.5; 8])])?;
    store.reject("in.jsonl", 1, "no event", b"{}")?;
    store.close()
}

fn add_marked(store: &Store) -> Result<(), StoreError> {
    for n in 0..MARKED {
        let user = marked(n);
        let own = format!("{MARKER} attribute {n}");
        let mut first = Event::new(&user, &own, Polarity::Like).at(9);
        first.id = Some(format!("{MARKER} id {n}"));
        let shared = Event::new(&user, &format!("attribute {}", n % 40), Polarity::Dislike).at(9);
        store.append(&[first, shared])?;
        store.put_pairs(&[pair(&user, MARKER)])?;
        store.put_edit(&edit(&user, &edit_id(n)))?;
        store.set_user_features(&[(user.clone(), vec![1.0; 8])])?;
        let line = format!("{{\"user\":\"{user}\",\"attribute\":3}}");
        store.reject("in.jsonl", n, "no event", line.as_bytes())?;
    }
    Ok(())
}

/// What the program writes for a user, into a folder of the user's choice or the store's own: a
/// picture with its record in it and beside it, and a page.
fn write_pictures(folder: &Path, user: &str, edit_id: &str) {
    std::fs::create_dir_all(folder).expect("a folder");
    let mut record = Provenance {
        version: 3,
        edit_id: edit_id.into(),
        instruction: format!("an instruction of {edit_id}"),
        digital_source_type: "trainedAlgorithmicMedia".into(),
        ..Provenance::default()
    };
    record.settings.steps = Some(4);
    let json = serde_json::to_string(&record).expect("JSON");
    let mut chunk = b"iTXtsimpatico\0\0\0\0\0".to_vec();
    chunk.extend(json.as_bytes());
    let mut sum = flate2::Crc::new();
    sum.update(&chunk);
    // Behind the signature and the header.
    let (head, rest) = include_bytes!("../golden/pictures/plain.png").split_at(33);
    let length = (chunk.len() as u32 - 4).to_be_bytes();
    let png = [head, &length, &chunk, &sum.sum().to_be_bytes(), rest].concat();
    let page = format!(
        "<!doctype html><meta name=generator content=Simpatico><p>{user}: an edit, {edit_id}"
    );
    for (ending, bytes) in [
        ("png", &png[..]),
        ("json", json.as_bytes()),
        ("html", page.as_bytes()),
    ] {
        std::fs::write(folder.join(format!("{user}.{ending}")), bytes).expect("written");
    }
}

/// Makes the pictures, and has the program forget whom they were made for, killed now and then.
fn forget_pictured(root: &Path, random: &mut Philox) {
    let out = [root.join("out"), root.join("store/out")];
    for n in 0..PICTURED {
        write_pictures(&out[n as usize % 2], &marked(n), &edit_id(n));
    }
    write_pictures(&out[0], "user 2", "edit 1");
    for n in 0..PICTURED {
        let mut command = Command::new(program());
        command
            .args(["forget", &marked(n), "--json", "--store"])
            .arg(root.join("store"))
            .arg("--files")
            .arg(&out[0])
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        std::thread::sleep(Duration::from_millis(u64::from(random.below(60))));
        let _ = child.kill();
        let _ = child.wait();
        let output = command.output().expect("the program runs");
        let said = String::from_utf8_lossy(&output.stderr);
        // Killed late, it was done.
        let done = output.status.success() || said.contains("is not in the store");
        assert!(done, "forgetting {}: {said}", marked(n));
    }
    let left: Vec<_> = out.iter().flat_map(|folder| files(folder)).collect();
    assert_eq!(
        left.len(),
        3,
        "another's picture, record and page: {left:?}"
    );
}

/// Forgets every marked user, then compacts and writes a snapshot and the exports: what the
/// worker does.
pub fn forget_marked(root: &Path) -> Result<(), String> {
    let text = |e: StoreError| e.to_string();
    let store = Store::open(root.join("store"), Options::default()).map_err(text)?;
    let users: Vec<String> = store.snapshot().users().map(str::to_string).collect();
    for user in users.iter().filter(|u| u.starts_with(MARKER)) {
        store.forget(user).map_err(text)?;
    }
    store.compact().map_err(text)?;
    store
        .export_snapshot(&root.join("snapshot"))
        .map_err(text)?;
    let io = |e: std::io::Error| e.to_string();
    let moment = store.snapshot();
    let file = |name: &str| std::fs::File::create(root.join(name)).map_err(io);
    moment
        .export_jsonl(&mut file("export.jsonl")?)
        .map_err(io)?;
    moment
        .export_graphml(&mut file("export.graphml")?)
        .map_err(io)?;
    moment.export_dot(&mut file("export.dot")?).map_err(io)?;
    store.close().map_err(text)
}

/// The row.
pub fn row(plan: Plan) -> String {
    let folder = in_memory();
    let (with, without) = (folder.path().join("with"), folder.path().join("without"));
    for (path, marked) in [(&with, true), (&without, false)] {
        if let Err(e) = fill(path, marked) {
            panic!("filling a store: {e}");
        }
    }
    let before = holding(&files(&with), MARKER.as_bytes()).len();
    assert!(before >= 3, "the marker was in {before} files");
    let never = Store::open(&without, Options::default()).expect("opens");
    let expected = never.snapshot().digest();
    let mut random = Philox::new(plan.seed, 0);
    for number in 0..plan.count {
        case();
        let root = folder.path().join("root");
        let _ = std::fs::remove_dir_all(&root);
        copy(&with, &root.join("store"));
        if number % PICTURED_CASES == 0 {
            forget_pictured(&root, &mut random);
        }
        let program = std::env::current_exe().expect("this program's path");
        let mut place = program.parent().expect("a folder");
        if place.ends_with("deps") {
            place = place.parent().expect("a folder");
        }
        let worker = place.join(match cfg!(feature = "planted") {
            true => "planted_worker",
            false => "fault_worker",
        });
        let command = || {
            let mut command = Command::new(&worker);
            command
                .arg(&root)
                .args(["0", "0", "0", "forget-marked"])
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            command
        };
        // The first case is not killed, the others are, one to three times.
        for _ in 0..if number == 0 { 0 } else { 1 + random.below(3) } {
            let mut child = command().spawn().expect("the worker runs");
            std::thread::sleep(Duration::from_millis(u64::from(random.below(250))));
            let _ = child.kill();
            let _ = child.wait();
        }
        let output = command().output().expect("the worker runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "case {number}: {said}");
        let left = holding(&files(&root), MARKER.as_bytes());
        assert!(
            left.is_empty(),
            "case {number}: the marker is left in {left:?}"
        );
        let store = Store::open(root.join("store"), Options::default()).expect("opens");
        assert_eq!(
            store.snapshot().digest(),
            expected,
            "case {number}: others differ"
        );
        let report = store
            .check()
            .unwrap_or_else(|e| panic!("case {number}: {e}"));
        assert!(report.identical, "case {number}: {report:?}");
    }
    let names: Vec<String> = files(&folder.path().join("root"))
        .iter()
        .filter_map(|f| Some(f.file_name()?.to_string_lossy().into_owned()))
        .collect();
    format!(
        "no byte of them in any of {} files ({before} held them); others identical; {} cases",
        names.len(),
        plan.count
    )
}
