//! Two instructions for one picture, three ways: `eval_together JUDGE CUT_OUTS BUNDLE [PAIRS]`.
//!
//! Held-out objects and artwork, each asked for two attributes of different kinds: *together*
//! (two instructions in one call), in *one sentence* (one instruction that names both), and in
//! *turn* (the second edits the first one's result, at twice the steps). Printed: in how many
//! edits the judge finds the first, the second and both, and how much of the source's edges
//! is left.

use candle_core::Device;
use simpatico_engine::attributes::{Judge, KINDS, picture_of, tried};
use simpatico_engine::canny::{canny, edge_agreement};
use simpatico_engine::edit::{EditRequest, Hooks, Source};
use simpatico_engine::engine::Engine;
use simpatico_engine::picture::Picture;
use simpatico_engine::render::{Object, Scene, Subject, artwork};
use simpatico_engine::vocabulary::Attribute;
use simpatico_schema::edit::EditSettings;
use simpatico_schema::random::Philox;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// One picture and the two attributes asked for, by their place among the kinds.
struct Case {
    source: Picture,
    asked: [(usize, &'static Attribute); 2],
    each: Vec<String>,
    one: String,
}

fn cases(cut_outs: &str, count: usize) -> Result<Vec<Case>> {
    let art = artwork::cut_outs(cut_outs.as_ref())?;
    let mut random = Philox::new(37, 0);
    let mut cases = Vec::new();
    for i in 0..count {
        let kinds = random.below(KINDS.len() as u32) as usize;
        let kinds = [kinds, (kinds + 1 + random.below(4) as usize) % KINDS.len()];
        let asked = kinds.map(|k| {
            let common = tried(KINDS[k], 6);
            (k, common[random.below(common.len() as u32) as usize])
        });
        let subject = match (i % 2, random.choose(&art)) {
            (1, Some(art)) => Subject::from(art.clone()),
            _ => Subject::from(*random.choose(Object::HELD_OUT).unwrap_or(&Object::Boot)),
        };
        let scene = Scene::plain(subject, None, random.next_u64());
        let attributes = asked.map(|(_, a)| a);
        cases.push(Case {
            source: picture_of(&scene),
            each: attributes
                .iter()
                .map(|a| scene.instruction(&[*a], &mut random))
                .collect(),
            one: scene.instruction(&attributes, &mut random),
            asked,
        });
    }
    Ok(cases)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [judge, cut_outs, bundle, rest @ ..] = arguments.as_slice() else {
        return Err("eval_together JUDGE CUT_OUTS BUNDLE [PAIRS]".into());
    };
    let count = rest.first().map_or(Ok(60), |n| n.parse())?;
    let cases = cases(cut_outs, count)?;
    let engine = Engine::open(bundle, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    let store = simpatico_storage::Store::open(folder.path(), Default::default())?;
    let edit = |sources: &[Picture], told: &dyn Fn(&Case) -> Vec<String>| -> Result<Vec<Picture>> {
        let requests = cases.iter().zip(sources).map(|(case, source)| EditRequest {
            user: "nobody".into(),
            source: Some(Source::of(source.clone())),
            instructions: told(case),
            settings: EditSettings {
                count: 1,
                ..EditSettings::default()
            },
            ..EditRequest::default()
        });
        let requests: Vec<EditRequest> = requests.collect();
        let edits = engine.edit_batch(&store.snapshot(), &requests, &mut Hooks::default())?;
        Ok(edits.into_iter().flat_map(|e| e.images).collect())
    };
    let sources: Vec<Picture> = cases.iter().map(|c| c.source.clone()).collect();
    let first = edit(&sources, &|c| c.each[..1].to_vec())?;
    let ways = [
        ("together", edit(&sources, &|c| c.each.clone())?),
        ("one sentence", edit(&sources, &|c| vec![c.one.clone()])?),
        ("in turn", edit(&first, &|c| c.each[1..].to_vec())?),
    ];
    let judge = Judge::open(judge.as_ref())?;
    println!("{count} pictures: first / second / both found, edges left");
    for (name, pictures) in ways {
        let answers = judge.look(&pictures)?;
        let (mut found, mut both, mut edges) = ([0; 2], 0, 0.0);
        for ((case, picture), seen) in cases.iter().zip(&pictures).zip(answers) {
            let shown = case
                .asked
                .map(|(k, asked)| seen[k].attribute.is_some_and(|a| a.name == asked.name));
            found[0] += usize::from(shown[0]);
            found[1] += usize::from(shown[1]);
            both += usize::from(shown[0] && shown[1]);
            let drawn = |p: &Picture| canny(p, 100, 200);
            edges += edge_agreement(&drawn(&case.source), &drawn(picture), 2);
        }
        let share = |n: usize| 100.0 * n as f64 / count as f64;
        println!(
            "{name:>12} {:5.1} % {:5.1} % {:5.1} %  {:.3}",
            share(found[0]),
            share(found[1]),
            share(both),
            edges / count as f64
        );
    }
    Ok(())
}
