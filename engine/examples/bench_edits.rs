//! How long an edit takes, and what a batch saves: `bench_edits BUNDLE CUT_OUTS [COUNT
//! [pictures]]`.
//!
//! COUNT users (16) of made-up taste each want a picture of the folder CUT_OUTS edited, first
//! one call after another, then in one call, seven times over; each round's ratio and their median
//! are printed. Both must give the same words, and pictures within a rounding step. Beside each
//! round stands what the machine's cores do together of pure arithmetic then, one alone being 1:
//! rented cores are whole ones at one time and two threads of one at another, and a batch's gain
//! is mostly that edits side by side keep all of them busy. With `pictures` the instructions are
//! given and only pictures made.

mod common;

use candle_core::Device;
use simpatico_engine::edit::{Edit, EditRequest, Hooks, Source};
use simpatico_engine::engine::Engine;
use simpatico_schema::edit::EditSettings;
use simpatico_storage::Store;
use std::time::Instant;

/// How often everything is measured.
const ROUNDS: usize = 7;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Multiplications and additions in registers, as many as a core has room for; the seconds they take.
fn arithmetic() -> f64 {
    let begun = Instant::now();
    for _ in 0..10_000 {
        let mut lanes = std::hint::black_box([0.5f32; 48]);
        for _ in 0..1_000 {
            lanes.iter_mut().for_each(|x| *x = *x * 0.999 + 0.002);
        }
        std::hint::black_box(lanes);
    }
    begun.elapsed().as_secs_f64()
}

/// How many times one core's arithmetic all of them do together.
fn cores_worth() -> f64 {
    let alone = arithmetic();
    let begun = Instant::now();
    rayon::broadcast(|_| arithmetic());
    rayon::current_num_threads() as f64 * alone / begun.elapsed().as_secs_f64()
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, cut_outs, rest @ ..] = arguments.as_slice() else {
        return Err("bench_edits BUNDLE CUT_OUTS [COUNT [pictures]]".into());
    };
    let pictures = rest.get(1).is_some_and(|word| word == "pictures");
    let count = rest.first().map_or(Ok(16), |n| n.parse::<usize>())?;
    let files = common::pngs(cut_outs.as_ref())?;
    let folder = tempfile::tempdir()?;
    let store = Store::open(folder.path(), Default::default())?;
    store.append(&common::likes(count))?;
    let attributes = common::drawn();
    let snapshot = store.snapshot();
    let requests = (0..count)
        .map(|i| {
            let file = &files[i % files.len()];
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            Ok(EditRequest {
                user: format!("user {i}"),
                source: Some(Source::open(file)?),
                caption: Some(format!("a {name}")),
                instructions: match pictures {
                    true => vec![format!("Add {}", attributes[i * 37 % attributes.len()])],
                    false => Vec::new(),
                },
                settings: EditSettings {
                    count: 1,
                    ..EditSettings::default()
                },
                ..EditRequest::default()
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let engine = Engine::open(bundle, &Device::Cpu)?;
    // The models are loaded by the first call.
    engine.edit(&snapshot, &requests[0], &mut Hooks::default())?;
    let (mut apart, mut together) = (Vec::new(), Vec::new());
    let (mut ratios, mut worths) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let before = cores_worth();
        let begun = Instant::now();
        let singles = requests
            .iter()
            .map(|r| Ok(engine.edit(&snapshot, r, &mut Hooks::default())?))
            .collect::<Result<Vec<Edit>>>()?;
        apart.push(begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        let batch = engine.edit_batch(&snapshot, &requests, &mut Hooks::default())?;
        together.push(begun.elapsed().as_secs_f64());
        let words = |edits: &[Edit]| -> Vec<String> {
            let of = |e: &Edit| e.instruction.instruction.clone();
            edits.iter().map(of).collect()
        };
        if words(&singles) != words(&batch) {
            return Err("a batch wrote other instructions than single calls".into());
        }
        let pairs = singles.iter().zip(&batch);
        let off = pairs.flat_map(|(a, b)| {
            let (a, b) = (&a.images[0].rgb, &b.images[0].rgb);
            a.iter().zip(b).map(|(a, b)| a.abs_diff(*b))
        });
        let sum = |f: fn(&Edit) -> f64, all: &[Edit]| all.iter().map(f).sum::<f64>();
        ratios.push(apart[round] / together[round]);
        worths.push((before + cores_worth()) / 2.0);
        println!(
            "round {round}: {count} edits apart {:.2} s (instructions {:.2} s), together {:.2} s \
             (instructions {:.2} s): {:.2} times the throughput where all threads do {:.2} times \
             the arithmetic of one; pictures differ by at most {}",
            apart[round],
            sum(|e| e.seconds.instruct, &singles),
            together[round],
            sum(|e| e.seconds.instruct, &batch),
            ratios[round],
            worths[round],
            off.max().unwrap_or(0)
        );
        let stages: [(&str, fn(&Edit) -> f64); 4] = [
            ("words", |e| e.seconds.words),
            ("encode", |e| e.seconds.encode),
            ("sample", |e| e.seconds.sample),
            ("decode", |e| e.seconds.decode),
        ];
        for (stage, of) in stages {
            println!(
                "  {stage} apart {:.2} s, together {:.2} s",
                sum(of, &singles),
                sum(of, &batch)
            );
        }
    }
    let median = |all: &mut Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    println!(
        "medians: an edit alone {:.3} s; in a batch of {count} {:.3} s; {:.2} times the throughput \
         ({} threads do {:.2} times the arithmetic of one)",
        median(&mut apart) / count as f64,
        median(&mut together) / count as f64,
        median(&mut ratios),
        rayon::current_num_threads(),
        median(&mut worths),
    );
    Ok(())
}
