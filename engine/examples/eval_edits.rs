//! How often an edit shows what was asked for:
//! `eval_edits OUT JUDGE CUT_OUTS (exact | encoded RUN | bundle DIR | run FOLDER) [ATTRIBUTES] [STEPS] [START] [CFG]`.
//!
//! Sources are held out: drawn objects and the artwork of the folder CUT_OUTS. For each kind,
//! ATTRIBUTES common attributes are asked for, each of two sources. `exact` judges what the
//! renderer itself would make of it, the best that can be had, and `encoded` the same through
//! the autoencoder of a training; `bundle` goes through the
//! engine with the bundle's own settings; `run` takes the averaged weights of a training
//! (mode tile). Writes OUT/report.json and OUT/grid.png: source, wanted, edited, in threes.

use candle_core::{Device, Tensor};
use simpatico_engine::attributes::{Edited, Judge, KINDS, picture_of, score, tried};
use simpatico_engine::edit::{EditRequest, Hooks, Source};
use simpatico_engine::engine::Engine;
use simpatico_engine::flux::controlnet::Mode;
use simpatico_engine::flux::text::prompt_of_texts;
use simpatico_engine::picture::{Picture, write_whole};
use simpatico_engine::render::{Color, Object, Scene, Subject, artwork};
use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::train_flux::{autoencoder, flow, patches, save_grid};
use simpatico_engine::vocabulary::Attribute;
use simpatico_schema::edit::EditSettings;
use simpatico_schema::random::Philox;
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// One thing to be tried.
struct Case {
    scene: Scene,
    asked: &'static Attribute,
    text: String,
}

fn cases(cut_outs: &Path, attributes: usize) -> Result<Vec<Case>> {
    let art = artwork::cut_outs(cut_outs)?;
    let mut random = Philox::new(31, 0);
    let mut cases = Vec::new();
    for kind in KINDS {
        for asked in tried(kind, attributes) {
            let object = *random.choose(Object::HELD_OUT).unwrap_or(&Object::Boot);
            let color = random.choose(Color::ALL).copied();
            let mut both = vec![Scene::plain(object, color, random.next_u64())];
            if let Some(art) = random.choose(&art) {
                let subject = Subject::from(art.clone());
                both.push(Scene::plain(subject, None, random.next_u64()));
            }
            for scene in both {
                let text = scene.instruction(&[asked], &mut random);
                cases.push(Case { scene, asked, text });
            }
        }
    }
    Ok(cases)
}

/// Edits through the engine, with the bundle's settings.
fn by_bundle(bundle: &str, cases: &[Case], steps: Option<usize>) -> Result<Vec<Picture>> {
    let engine = Engine::open(bundle, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    let store = simpatico_storage::Store::open(folder.path(), Default::default())?;
    let mut pictures = Vec::new();
    for some in cases.chunks(16) {
        let request = |case: &Case| EditRequest {
            user: "nobody".into(),
            source: Some(Source::of(picture_of(&case.scene))),
            caption: Some(case.scene.caption()),
            instructions: vec![case.text.clone()],
            settings: EditSettings {
                steps,
                count: 1,
                ..EditSettings::default()
            },
            ..EditRequest::default()
        };
        let requests: Vec<EditRequest> = some.iter().map(request).collect();
        let edits = engine.edit_batch(&store.snapshot(), &requests, &mut Hooks::default())?;
        pictures.extend(edits.into_iter().flat_map(|e| e.images));
        println!("{}/{} edits", pictures.len(), cases.len());
    }
    Ok(pictures)
}

/// Pictures through a run's autoencoder.
fn encoded(run: &Path, pictures: &[Picture]) -> Result<Vec<Picture>> {
    let vae = patches::open(run, &Device::Cpu)?;
    let there_and_back = |picture: &Picture| -> Result<Picture> {
        let decoded = vae.decode(&vae.encode(&picture.to_tensor(&Device::Cpu)?)?)?;
        Ok(Picture::from_tensor(&decoded)?.remove(0))
    };
    pictures.iter().map(there_and_back).collect()
}

/// Edits with the averaged weights of a training run.
fn by_run(
    folder: &Path,
    cases: &[Case],
    (start, steps, cfg): (f64, usize, f64),
) -> Result<Vec<Picture>> {
    let vae = patches::open(folder, &Device::Cpu)?;
    let encoder = TextEncoder::open(std::env::var("SIMPATICO_MINILM")?.as_ref(), &Device::Cpu)?;
    let mut pictures = Vec::new();
    for some in cases.chunks(16) {
        let scenes: Vec<Scene> = some.iter().map(|c| c.scene.clone()).collect();
        let source = autoencoder::pictures(&scenes, 128)?;
        let texts: Vec<&str> = some.iter().map(|c| c.text.as_str()).collect();
        let edited = flow::edit(
            folder,
            &flow::config(),
            &vae,
            &source,
            (&source, Mode::Tile),
            prompt_of_texts(&encoder, &texts, 20)?,
            (start, steps, cfg),
        )?;
        pictures.extend(Picture::from_tensor(&edited)?);
        println!("{}/{} edits", pictures.len(), cases.len());
    }
    Ok(pictures)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, judge, cut_outs, method, rest @ ..] = arguments.as_slice() else {
        return Err(
            "eval_edits OUT JUDGE CUT_OUTS (exact | encoded RUN | bundle DIR | run FOLDER) \
                    [ATTRIBUTES] [STEPS] [START] [CFG]"
                .into(),
        );
    };
    let (from, rest) = match method.as_str() {
        "exact" => ("", rest),
        _ => match rest.split_first() {
            Some((from, rest)) => (from.as_str(), rest),
            None => return Err(format!("{method}: of which folder?").into()),
        },
    };
    let number = |i: usize| rest.get(i).and_then(|s| s.parse::<f64>().ok());
    let cases = cases(cut_outs.as_ref(), number(0).unwrap_or(8.0) as usize)?;
    let steps = number(1).map(|n| n as usize);
    let wanted = |c: &Case| picture_of(&c.scene.clone().with(&[c.asked]));
    let pictures = match method.as_str() {
        "exact" => cases.iter().map(wanted).collect(),
        "encoded" => encoded(from.as_ref(), &cases.iter().map(wanted).collect::<Vec<_>>())?,
        "bundle" => by_bundle(from, &cases, steps)?,
        "run" => {
            let settings = (
                number(2).unwrap_or(1.0),
                steps.unwrap_or(20),
                number(3).unwrap_or(1.0),
            );
            by_run(from.as_ref(), &cases, settings)?
        }
        other => return Err(format!("no method {other}").into()),
    };
    let edits: Vec<Edited> = cases
        .iter()
        .zip(pictures)
        .map(|(case, picture)| Edited {
            source: picture_of(&case.scene),
            asked: case.asked,
            picture: picture.resized(128, 128),
        })
        .collect();
    let judge = Judge::open(judge.as_ref())?;
    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    let mut report = serde_json::Map::new();
    let drawn = |i: &usize| matches!(cases[*i].scene.subject, Subject::Drawn(_));
    let (objects, art): (Vec<usize>, Vec<usize>) = (0..edits.len()).partition(drawn);
    for (what, which) in [("objects", objects), ("artwork", art)] {
        let some: Vec<Edited> = which.iter().map(|i| edits[*i].clone()).collect();
        let rows = score(&judge, &some)?;
        println!("{what}: found / found in edits that asked for another / mistaken / edges");
        for r in &rows {
            println!(
                "{:>12} {:4} {:6.1} % {:6.2} % {:6.1} % {:6.3}",
                r.kind,
                r.edits,
                100.0 * r.found,
                100.0 * r.found_elsewhere,
                100.0 * r.mistaken,
                r.edges
            );
        }
        report.insert(what.into(), serde_json::to_value(rows)?);
    }
    write_whole(
        &out.join("report.json"),
        &serde_json::to_vec_pretty(&report)?,
    )?;
    let rows = cases.iter().zip(&edits).flat_map(|(case, edit)| {
        let all = [&edit.source, &wanted(case), &edit.picture].map(|p| p.to_tensor(&Device::Cpu));
        println!("{} | {}", case.asked.name, case.text);
        all
    });
    let grid = rows.collect::<std::result::Result<Vec<_>, _>>()?;
    save_grid(&out.join("grid.png"), &Tensor::cat(&grid, 0)?, 12)?;
    Ok(())
}
