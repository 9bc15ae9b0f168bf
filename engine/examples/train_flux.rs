//! Trains the small Flux: `train_flux STAGE FOLDER [ARGUMENTS] [--device cpu|cuda|cuda:N|metal]
//! [--dtype f32|bf16] [--parts N]`. What each stage takes stands at its place below.
//!
//! `flow`, `detail`, `guidance` and `vae` train on the device (default: the best there is), in
//! bf16 on a GPU and f32 on a CPU unless told; they save every two minutes and go on from where
//! they stopped, on whatever device, when called again. `samples` and `sample` use it too. The
//! rest is drawing pictures and fitting them, on the CPU. What ships, on a GPU:
//!
//! ```text
//! cargo run --release --features cuda --example train_flux -- flow RUN 21000 6000 [FLUX]
//! ```
//!
//! with RUN from `patches`, `pairs`, `artwork` and `photos`, and FLUX what to begin with, such as
//! bundles/default/flux (its MODEL_CARD.md); then `patches` is given FLUX/vae, so that the latents
//! are those which FLUX knows.

use candle_core::{Device, Tensor};
use simpatico_engine::canny::canny;
use simpatico_engine::flux::controlnet::Mode;
use simpatico_engine::flux::text::prompt_of_texts;
use simpatico_engine::params::save_tensors;
use simpatico_engine::picture::Picture;
use simpatico_engine::render::artwork::{self, Artwork};
use simpatico_engine::render::{Object, Scene, Subject};
use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::train_flux::{
    Compute, Progress, Rhythm, autoencoder, detail, flow, guidance, pairs, patches, save_grid,
};
use simpatico_schema::random::Philox;
use std::path::Path;
use std::sync::Arc;

/// Those that training may see.
fn trained(all: Vec<Arc<Artwork>>) -> Vec<Subject> {
    let seen = all.into_iter().filter(|art| !art.held_out);
    seen.map(Subject::from).collect()
}

/// Pairs number `first` to `first + count` of these subjects, in a file named after the kind.
fn prepare_pairs(
    folder: &Path,
    kind: &str,
    subjects: &[Subject],
    count: Option<usize>,
    first: Option<usize>,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut options = pairs::Options::shipped();
    options.pairs = count.unwrap_or(options.pairs);
    options.first = first.unwrap_or(0);
    let vae = patches::open(folder, &Device::Cpu)?;
    let config = vae.config();
    println!(
        "scaling {} shift {}",
        config.scaling_factor, config.shift_factor
    );
    let encoder = TextEncoder::open(std::env::var("SIMPATICO_MINILM")?.as_ref(), &Device::Cpu)?;
    let begun = std::time::Instant::now();
    let file = folder.join(format!("{kind}-{:07}.safetensors", options.first));
    pairs::prepare_of(
        &options,
        subjects,
        &vae,
        &encoder,
        &file,
        &mut |done, all| {
            if done % 160 == 0 {
                println!("pairs {done}/{all} {:.0} s", begun.elapsed().as_secs_f64());
            }
        },
    )?;
    Ok(())
}

/// Edits of pairs that the flow never saw, decoded without detail: what the detail decoder learns
/// from. A few steps of sampling are enough to show the flow's faults; most edits begin at the
/// noised right result, so that what was asked for is there.
fn prepare_samples(
    folder: &Path,
    kind: &str,
    subjects: &[Subject],
    (count, first): (usize, usize),
    device: &Device,
) -> Result<(), Box<dyn std::error::Error>> {
    const STEPS: usize = 8;
    const BATCH: usize = 16;
    const GUIDANCE: f64 = 2.0;
    /// The share of batches that begin at pure noise, and the noise level of the others.
    const PURE: f32 = 0.25;
    const LEVEL: std::ops::Range<f32> = 0.6..0.95;
    let vae = patches::open(folder, device)?;
    let encoder = TextEncoder::open(std::env::var("SIMPATICO_MINILM")?.as_ref(), device)?;
    let begun = std::time::Instant::now();
    let bytes = |pictures: &Tensor| -> Result<Vec<u8>, simpatico_engine::Error> {
        let pictures = Picture::from_tensor(pictures)?;
        Ok(pictures.into_iter().flat_map(|p| p.rgb).collect())
    };
    let (mut source, mut coarse, mut target) = (Vec::new(), Vec::new(), Vec::new());
    for start in (first..first + count).step_by(BATCH) {
        let made: Vec<pairs::Pair> = (start..(start + BATCH).min(first + count))
            .map(|i| pairs::pair(subjects, 2, detail::SEED, i as u64))
            .collect();
        let scenes = |f: &dyn Fn(&pairs::Pair) -> Scene| {
            let all: Vec<Scene> = made.iter().map(f).collect();
            autoencoder::pictures(&all, 128)?
                .to_device(device)
                .map_err(simpatico_engine::Error::from)
        };
        let (before, after) = (
            scenes(&|p| p.source.clone())?,
            scenes(&|p| p.target.clone())?,
        );
        let texts: Vec<&str> = made.iter().map(|p| p.text.as_str()).collect();
        let mut random = Philox::new(detail::SEED, start as u64);
        let level = match random.uniform() < PURE {
            true => 1.0,
            false => LEVEL.start + random.uniform() * (LEVEL.end - LEVEL.start),
        };
        let edited = flow::edit(
            folder,
            &flow::config(),
            &vae,
            &after,
            (&before, Mode::Tile),
            prompt_of_texts(&encoder, &texts, 20)?,
            (level.into(), STEPS, GUIDANCE),
        )?;
        source.extend(bytes(&before)?);
        target.extend(bytes(&after)?);
        coarse.extend(bytes(&edited)?);
        if start % 160 == 0 {
            let done = start - first + made.len();
            println!(
                "samples {done}/{count} {:.0} s",
                begun.elapsed().as_secs_f64()
            );
        }
    }
    let named = [("source", source), ("coarse", coarse), ("target", target)].map(|(name, all)| {
        let tensor = Tensor::from_vec(all, (count, 128, 128, 3), &Device::Cpu);
        tensor.map(|t| (name.to_string(), t))
    });
    let named = named.into_iter().collect::<Result<Vec<_>, _>>()?;
    save_tensors(
        &folder.join(format!("{kind}-{first:07}.safetensors")),
        &named,
        &[],
    )?;
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // SAFETY: nothing has started a thread yet.
    #[allow(unsafe_code)]
    unsafe {
        simpatico_engine::use_own_cores()
    };
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut option = |name: &str| -> Result<Option<String>, String> {
        let Some(at) = arguments.iter().position(|a| a == name) else {
            return Ok(None);
        };
        let told = arguments.drain(at..(at + 2).min(arguments.len())).nth(1);
        told.map(Some).ok_or(format!("{name} wants a word"))
    };
    let (device, dtype) = (option("--device")?, option("--dtype")?);
    let parts = option("--parts")?.map_or(Ok(1), |n| n.parse::<usize>())?;
    let device = simpatico_engine::device(device.as_deref())?;
    let compute = Compute::on(device.clone(), dtype.as_deref())?;
    let [stage, folder, rest @ ..] = arguments.as_slice() else {
        return Err(
            "train_flux STAGE FOLDER [ARGUMENTS] [--device D] [--dtype T] [--parts N]".into(),
        );
    };
    let rhythm = Rhythm::usual(folder);
    std::fs::create_dir_all(folder)?;
    let number = |i: usize| rest.get(i).and_then(|s| s.parse::<usize>().ok());
    let mut tell = |p: &Progress| {
        println!(
            "{} {}/{} loss {:.4} grad {:.2} {:.0} s, {:.0} s left",
            p.stage, p.step, p.steps, p.loss, p.gradient, p.seconds, p.seconds_left
        );
        true
    };
    match stage.as_str() {
        "vae" => {
            let mut options = autoencoder::Options::shipped();
            options.steps = number(0).unwrap_or(options.steps);
            autoencoder::run(&options, &compute, &rhythm, &mut tell)?;
        }
        // FOLDER [VAE]: fitted anew, or that of an exported flow to go on from.
        "patches" => match rest.first() {
            None => patches::begin(&rhythm.folder)?,
            Some(vae) => patches::take_over(&rhythm.folder, vae.as_ref())?,
        },
        "rebuild" => {
            let vae = patches::open(&rhythm.folder, &Device::Cpu)?;
            let scenes: Vec<_> = (0..16)
                .map(|i| pairs::pair(Object::HELD_OUT, 2, 9, i).target)
                .collect();
            let pictures = autoencoder::pictures(&scenes, 128)?;
            let rebuilt = vae.decode(&vae.encode(&pictures)?)?;
            println!(
                "mean absolute error {:.4}",
                (&rebuilt - &pictures)?
                    .abs()?
                    .mean_all()?
                    .to_scalar::<f32>()?
            );
            save_grid(
                &rhythm.folder.join("rebuilt.png"),
                &Tensor::cat(&[&pictures, &rebuilt], 0)?,
                16,
            )?;
        }
        // FOLDER [COUNT] [FIRST]: pairs of the renderer's objects.
        "pairs" => {
            let subjects: Vec<Subject> = Object::trained().into_iter().map(Subject::from).collect();
            prepare_pairs(&rhythm.folder, "pairs", &subjects, number(0), number(1))?;
        }
        // FOLDER COUNT FIRST ASSETS: pairs of emoji, from the unpacked npm package
        // @lobehub/fluent-emoji-3d 1.1.0 (MIT), its folder package/assets.
        "artwork" => {
            let assets = rest.get(2).ok_or("artwork FOLDER COUNT FIRST ASSETS")?;
            let subjects = trained(artwork::emoji(assets.as_ref())?);
            prepare_pairs(&rhythm.folder, "pairs-art", &subjects, number(0), number(1))?;
        }
        // FOLDER COUNT FIRST PHOTOS: pairs of photographs, changed as a whole.
        "photos" => {
            let photos = rest.get(2).ok_or("photos FOLDER COUNT FIRST PHOTOS")?;
            let subjects = trained(artwork::photographs(photos.as_ref())?);
            prepare_pairs(
                &rhythm.folder,
                "pairs-photo",
                &subjects,
                number(0),
                number(1),
            )?;
        }
        // FOLDER COUNT FIRST [ASSETS | PHOTOS]: edits of drawn objects, of emoji or of
        // photographs by the run's flow.
        "samples" | "samples-art" | "samples-photo" => {
            let pictures = rest.get(2).map(String::as_str).unwrap_or_default();
            let subjects: Vec<Subject> = match stage.as_str() {
                "samples" => Object::trained().into_iter().map(Subject::from).collect(),
                "samples-art" => trained(artwork::emoji(pictures.as_ref())?),
                _ => trained(artwork::photographs(pictures.as_ref())?),
            };
            let range = (number(0).unwrap_or(4000), number(1).unwrap_or(0));
            prepare_samples(&rhythm.folder, stage, &subjects, range, &device)?;
        }
        // FOLDER [STEPS] [COOLDOWN] [FLUX]: from an exported model, or from nothing.
        "flow" => {
            let mut options = flow::Options::shipped();
            options.parts = parts;
            options.from = rest.get(2).map(Into::into);
            options.steps = number(0).unwrap_or(options.steps);
            options.cooldown = number(1).unwrap_or(options.steps / 4);
            let pairs = pairs::Pairs::open_all(&rhythm.folder)?;
            flow::run(&options, &pairs, &compute, &rhythm, &mut tell)?;
        }
        // FOLDER [STEPS] [VAE]: from the network of an exported autoencoder, or from nothing.
        "detail" => {
            let mut options = detail::Options::shipped();
            options.parts = parts;
            options.steps = number(0).unwrap_or(options.steps);
            options.from = rest.get(1).map(Into::into);
            let samples = detail::Samples::open_all(&rhythm.folder)?;
            detail::run(&options, &samples, &compute, &rhythm, &mut tell)?;
        }
        // FOLDER VAE: into the autoencoder of an exported flow.
        "export-detail" => {
            let vae = rest.first().ok_or("export-detail FOLDER VAE")?;
            let widths = detail::Options::shipped().widths;
            detail::export(&rhythm.folder, &widths, vae.as_ref())?;
        }
        // VAE BY: how much less (negative) or more of the source an exported detail network keeps.
        "source-share" => {
            let by = rest.first().ok_or("source-share VAE BY")?.parse()?;
            detail::shift_source_share(folder.as_ref(), by)?;
        }
        // FOLDER [STEPS]: after `flow`, the guidance scale as an input.
        "guidance" => {
            let mut options = guidance::options();
            options.steps = number(0).unwrap_or(options.steps);
            options.cooldown = options.cooldown.min(options.steps / 4);
            let pairs = pairs::Pairs::open_all(&rhythm.folder)?;
            guidance::run(&options, &pairs, &compute, &rhythm, &mut tell)?;
            let missed = guidance::missed(&rhythm.folder, &options, &pairs, &compute, 16)?;
            println!("of what guidance adds it misses {missed:.3} (mean square)");
        }
        // FOLDER OUT; `export-guided` after the stage `guidance`.
        "export" | "export-guided" => {
            let out = Path::new(rest.first().ok_or("export FOLDER OUT")?);
            patches::export(&rhythm.folder, &out.join("vae"))?;
            match stage.as_str() {
                "export" => flow::export(&rhythm.folder, &flow::config(), out)?,
                _ => guidance::export(&rhythm.folder, &flow::config(), out)?,
            }
        }
        "sample" => {
            let vae = patches::open(&rhythm.folder, &device)?;
            let encoder = TextEncoder::open(std::env::var("SIMPATICO_MINILM")?.as_ref(), &device)?;
            let made: Vec<_> = (0..10)
                .map(|i| pairs::pair(Object::HELD_OUT, 1, 77, i))
                .collect();
            let scenes = |f: &dyn Fn(&pairs::Pair) -> Scene| {
                autoencoder::pictures(&made.iter().map(f).collect::<Vec<_>>(), 128)?
                    .to_device(&device)
                    .map_err(simpatico_engine::Error::from)
            };
            let before = scenes(&|p| p.source.clone())?;
            let wanted = scenes(&|p| p.target.clone())?;
            let drawn: Vec<Tensor> = made
                .iter()
                .map(|p| {
                    let picture = Picture::from_rgb(128, 128, p.source.render(128));
                    canny(&picture, 100, 200).to_picture().to_tensor(&device)
                })
                .collect::<Result<_, _>>()?;
            let drawn = Tensor::cat(&drawn, 0)?;
            let texts: Vec<&str> = made.iter().map(|p| p.text.as_str()).collect();
            texts.iter().for_each(|text| println!("{text}"));
            let prompt = prompt_of_texts(&encoder, &texts, 20)?;
            let mut rows = vec![before.clone(), wanted];
            for (control, mode, start, cfg) in [
                (&before, Mode::Tile, 1.0, 1.0),
                (&before, Mode::Tile, 1.0, 2.5),
                (&drawn, Mode::Canny, 0.9, 1.5),
                (&drawn, Mode::Canny, 1.0, 2.5),
            ] {
                let settings = (start, 20, cfg);
                rows.push(flow::edit(
                    &rhythm.folder,
                    &flow::config(),
                    &vae,
                    &before,
                    (control, mode),
                    prompt.clone(),
                    settings,
                )?);
            }
            save_grid(
                &rhythm.folder.join("samples.png"),
                &Tensor::cat(&rows, 0)?,
                10,
            )?;
        }
        other => return Err(format!("no stage {other}").into()),
    }
    Ok(())
}
