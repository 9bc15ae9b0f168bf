//! Trains the judge of edits and measures it on held-out objects and artwork:
//! `train_judge RUN_FOLDER OUT CUT_OUTS [STEPS] [PICTURES] [EMOJI_ASSETS]`.
//!
//! CUT_OUTS holds held-out artwork (the default bundle's folder artwork). With EMOJI_ASSETS,
//! the folder package/assets of the npm package @lobehub/fluent-emoji-3d 1.1.0, the trained
//! emoji are half of what it learns from.

use simpatico_engine::attributes::{Judge, Options, accuracy, train};
use simpatico_engine::render::{Object, Subject, artwork};
use simpatico_engine::train_flux::Rhythm;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, out, cut_outs, rest @ ..] = arguments.as_slice() else {
        return Err("train_judge RUN OUT CUT_OUTS [STEPS] [PICTURES] [EMOJI_ASSETS]".into());
    };
    let number = |i: usize| rest.get(i).and_then(|s| s.parse::<usize>().ok());
    let mut options = Options::shipped();
    options.steps = number(0).unwrap_or(options.steps);
    options.pictures = number(1).unwrap_or(options.pictures);
    let mut subjects: Vec<Subject> = Object::trained().into_iter().map(Subject::from).collect();
    if let Some(assets) = rest.get(2) {
        let seen = artwork::emoji(assets.as_ref())?;
        let seen: Vec<_> = seen.into_iter().filter(|art| !art.held_out).collect();
        let even = subjects.len().max(seen.len());
        subjects = subjects.into_iter().cycle().take(even).collect();
        subjects.extend(seen.into_iter().map(Subject::from));
    }
    std::fs::create_dir_all(folder)?;
    std::fs::create_dir_all(out)?;
    let out = Path::new(out);
    train(&options, &subjects, &Rhythm::usual(folder), out, &mut |p| {
        println!(
            "{}/{} loss {:.4} {:.0} s, {:.0} s left",
            p.step, p.steps, p.loss, p.seconds, p.seconds_left
        );
        true
    })?;
    let judge = Judge::open(out)?;
    let objects: Vec<Subject> = Object::HELD_OUT.iter().map(|o| Subject::from(*o)).collect();
    let artwork = artwork::cut_outs(cut_outs.as_ref())?;
    let artwork: Vec<Subject> = artwork.into_iter().map(Subject::from).collect();
    for (what, subjects) in [("held-out objects", objects), ("held-out artwork", artwork)] {
        for row in accuracy(&judge, &subjects, 1000, 99)? {
            println!("{what}: {}", serde_json::to_string(&row)?);
        }
    }
    Ok(())
}
