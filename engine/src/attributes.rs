//! A judge of edits: which attributes of the vocabulary a picture shows.
//!
//! A small convolutional network over the picture at 128 px, with one answer for each of five
//! kinds: the object's colour, material and pattern, what lies behind it and what lies over
//! it; each answer is an attribute's name or "none". It is trained apart from the networks it
//! judges, on our own renderer's pictures ([`train`]), and its own accuracy is measured on
//! objects that neither has seen ([`accuracy`]). [`score`] asks it about edits: how often the
//! asked-for attribute is found, and how often it is found where another was asked for.
//!
//! The judge answers by kind, with one name each: of two attributes that look alike (two
//! browns, two stones) it must choose one. Not here: the making of edits.

use crate::canny::{canny, edge_agreement};
use crate::conv::{Conv2d, group_norm_silu};
use crate::flux::detail::squares;
use crate::params::{Params, load_tensors, save_tensors, write_whole};
use crate::picture::Picture;
use crate::render::{Scene, Subject};
use crate::train_flux::training::{self, Training};
use crate::train_flux::{Compute, Report as Tell, Rhythm, latest};
use crate::vocabulary::{self, Attribute, Category};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::init::Init;
use candle_nn::{Conv2dConfig, VarBuilder};
use serde::{Deserialize, Serialize};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::Path;

/// What the judge answers, in the order of its heads.
pub const KINDS: [Category; 5] = [
    Category::Color,
    Category::Material,
    Category::Pattern,
    Category::Background,
    Category::Overlay,
];

/// Side of the pictures it sees.
const SIDE: usize = 128;

/// Widths of its convolutions; each but the last halves the picture, which first becomes half
/// as wide and high, with the four pixels of a square as channels: grain and thin lines are
/// gone in a picture that is merely made smaller.
const WIDTHS: [usize; 4] = [24, 48, 96, 128];

const GROUPS: usize = 8;

/// The attributes of a kind that can be drawn, in the vocabulary's order: class 0 is none of
/// them, class i the i-th.
pub fn classes(kind: Category) -> Vec<&'static Attribute> {
    let own = |a: &&Attribute| a.category == kind && a.look.is_some();
    vocabulary::all().iter().filter(own).collect()
}

/// One convolution with its norm.
struct Layer {
    conv: Conv2d,
    scale: Tensor,
    offset: Tensor,
}

/// The network.
pub struct Judge {
    layers: Vec<Layer>,
    heads: Vec<(Tensor, Tensor)>,
}

/// An answer: an attribute, or none of them, and how sure the judge is, 0 to 1.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// What it sees.
    pub attribute: Option<&'static Attribute>,
    /// The probability it gives that.
    pub probability: f32,
}

/// What is written beside the weights: they mean nothing under another vocabulary.
#[derive(Serialize, Deserialize, PartialEq)]
struct Names {
    kinds: Vec<(String, Vec<String>)>,
}

impl Names {
    fn ours() -> Self {
        let names = |kind| classes(kind).iter().map(|a| a.name.to_string()).collect();
        Self {
            kinds: KINDS
                .map(|kind| (kind.as_str().to_string(), names(kind)))
                .to_vec(),
        }
    }
}

impl Judge {
    /// The network over these weights.
    pub(crate) fn new(vb: VarBuilder) -> Result<Self> {
        let mut layers = Vec::new();
        let mut inputs = 12;
        for (i, width) in WIDTHS.into_iter().enumerate() {
            let vb = vb.pp(format!("layers.{i}"));
            let stdev = (2.0 / (inputs * 9) as f64).sqrt();
            let normal = Init::Randn { mean: 0.0, stdev };
            let weight = vb.get_with_hints((width, inputs, 3, 3), "weight", normal)?;
            let bias = vb.get_with_hints(width, "bias", Init::Const(0.0))?;
            let config = Conv2dConfig {
                padding: 1,
                stride: if i + 1 < WIDTHS.len() { 2 } else { 1 },
                ..Conv2dConfig::default()
            };
            layers.push(Layer {
                conv: Conv2d::new(weight, Some(bias), config),
                scale: vb.get_with_hints(width, "scale", Init::Const(1.0))?,
                offset: vb.get_with_hints(width, "offset", Init::Const(0.0))?,
            });
            inputs = width;
        }
        let features = 3 * inputs;
        let head = |kind: Category| -> Result<(Tensor, Tensor)> {
            let vb = vb.pp(format!("heads.{}", kind.as_str()));
            let count = classes(kind).len() + 1;
            let stdev = (1.0 / features as f64).sqrt();
            let normal = Init::Randn { mean: 0.0, stdev };
            Ok((
                vb.get_with_hints((count, features), "weight", normal)?,
                vb.get_with_hints(count, "bias", Init::Const(0.0))?,
            ))
        };
        let heads = KINDS.into_iter().map(head).collect::<Result<_>>()?;
        Ok(Self { layers, heads })
    }

    /// Opens a folder that [`train`] wrote.
    ///
    /// # Errors
    /// If a file is missing or damaged, or was made for another vocabulary.
    pub fn open(folder: &Path) -> Result<Self> {
        let file = folder.join("classes.json");
        let text = std::fs::read(&file).map_err(|_| Error::MissingModel {
            path: file.clone(),
            help: "expected a judge of edits; train one with the example train_judge".into(),
        })?;
        let names: Names = serde_json::from_slice(&text)
            .map_err(|e| Error::bad_model(file.display().to_string(), e.to_string()))?;
        if names != Names::ours() {
            let reason = "it was trained on another vocabulary: train it again";
            return Err(Error::bad_model(file.display().to_string(), reason));
        }
        let weights = load_tensors(&folder.join("judge.safetensors"), &Device::Cpu)?;
        Self::new(crate::flux::init::builder(
            &weights,
            DType::F32,
            &Device::Cpu,
        ))
    }

    /// Pictures (b, 3, 128, 128) in -1..1 to one (b, classes) of scores a kind.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = squares(x)?;
        for layer in &self.layers {
            x = layer.conv.forward(&x)?;
            x = group_norm_silu(&x, &layer.scale, &layer.offset, GROUPS, 1e-5)?;
        }
        // The mean says what most of the picture is like; the middle, what the object is;
        // the strongest answer, what there is a little of.
        let (_, _, h, w) = x.dims4()?;
        let middle = x.narrow(2, h / 4, h / 2)?.narrow(3, w / 4, w / 2)?;
        let mean = |x: &Tensor| -> Result<Tensor> { Ok(x.flatten_from(2)?.mean(D::Minus1)?) };
        let strongest = x.flatten_from(2)?.contiguous()?.max(D::Minus1)?;
        let features = Tensor::cat(&[mean(&x)?, mean(&middle.contiguous()?)?, strongest], 1)?;
        let answer = |(weight, bias): &(Tensor, Tensor)| -> Result<Tensor> {
            Ok(features.matmul(&weight.t()?)?.broadcast_add(bias)?)
        };
        self.heads.iter().map(answer).collect()
    }

    /// What each picture shows: one answer for each of [`KINDS`]. Any size of picture; under a
    /// millisecond each.
    ///
    /// # Errors
    /// If the weights are damaged.
    pub fn look(&self, pictures: &[Picture]) -> Result<Vec<[Answer; 5]>> {
        let mut all = Vec::with_capacity(pictures.len());
        for some in pictures.chunks(32) {
            let seen: Vec<Vec<u8>> = some.iter().map(small).collect();
            let scores = self.forward(&batch(&seen.iter().collect::<Vec<_>>())?)?;
            let tables = scores
                .iter()
                .map(|s| Ok(candle_nn::ops::softmax(s, 1)?.to_vec2::<f32>()?))
                .collect::<Result<Vec<_>>>()?;
            for i in 0..some.len() {
                all.push(std::array::from_fn(|kind| {
                    let row = &tables[kind][i];
                    let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
                    let best = best.unwrap_or(0);
                    let known = classes(KINDS[kind]);
                    Answer {
                        attribute: best.checked_sub(1).map(|i| known[i]),
                        probability: row[best],
                    }
                }));
            }
        }
        Ok(all)
    }
}

/// The picture at 128 px, as bytes.
fn small(picture: &Picture) -> Vec<u8> {
    let side = SIDE as u32;
    match (picture.width, picture.height) == (side, side) {
        true => picture.rgb.clone(),
        false => picture.resized(side, side).rgb,
    }
}

/// Rows of bytes to (b, 3, 128, 128) in -1..1.
fn batch(pictures: &[&Vec<u8>]) -> Result<Tensor> {
    let mut values = Vec::with_capacity(pictures.len() * 3 * SIDE * SIDE);
    for picture in pictures {
        for c in 0..3 {
            let one = picture.iter().skip(c).step_by(3);
            values.extend(one.map(|v| f32::from(*v) / 127.5 - 1.0));
        }
    }
    let shape = (pictures.len(), 3, SIDE, SIDE);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// The settings of a training.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Rendered pictures to learn from; each is seen several times, changed a little.
    pub pictures: usize,
    /// Steps in all.
    pub steps: usize,
    /// Pictures a step.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// What the shipped judge was trained with: about half an hour of one core.
    pub fn shipped() -> Self {
        Self {
            pictures: 30_000,
            steps: 7_000,
            batch: 48,
            lr: 3e-3,
            seed: 5,
        }
    }
}

/// Picture `i` of a set: the bytes at 128 px and the class of each kind.
struct Shown {
    rgb: Vec<u8>,
    classes: [u32; 5],
}

/// A scene to learn or be tested on: every attribute of a kind equally often, unlike the
/// scenes that the small Flux learns from, where common ones are common.
fn scene(subjects: &[Subject], seed: u64, i: u64) -> Scene {
    let mut random = Philox::new(seed, i);
    let subject = subjects[random.below(subjects.len() as u32) as usize].clone();
    let drawn = matches!(subject, Subject::Drawn(_));
    let all = crate::render::Color::ALL;
    let color = all[random.below(all.len() as u32) as usize];
    let color = (drawn || random.uniform() < 0.15).then_some(color);
    let plain = Scene::plain(subject, color, random.next_u64());
    let mut chosen = Vec::new();
    let mut draw = |kind: Category, chance: f32, random: &mut Philox| {
        if random.uniform() < chance {
            let all = classes(kind);
            chosen.push(all[random.below(all.len() as u32) as usize]);
        }
    };
    let surface = random.uniform();
    let kinds = [Category::Color, Category::Material, Category::Pattern];
    if let Some(kind) = kinds.get((surface * 3.6) as usize) {
        draw(*kind, 1.0, &mut random);
    }
    draw(Category::Background, 0.6, &mut random);
    draw(Category::Overlay, 0.4, &mut random);
    draw(Category::Tone, 0.06, &mut random);
    draw(Category::Light, 0.06, &mut random);
    plain.with(&chosen)
}

fn show(subjects: &[Subject], seed: u64, i: u64) -> Shown {
    let scene = scene(subjects, seed, i);
    let class = |kind: Category| {
        let has = scene.attributes.iter().find(|a| a.category == kind);
        has.and_then(|a| classes(kind).iter().position(|b| b.name == a.name))
            .map_or(0, |i| i as u32 + 1)
    };
    Shown {
        rgb: scene.render(SIDE),
        classes: KINDS.map(class),
    }
}

/// A picture a little changed: mirrored, moved, brighter or darker, blurred, noisy. Edits
/// come out of an autoencoder, and the judge must not mind.
fn vary(rgb: &[u8], random: &mut Philox) -> Vec<u8> {
    let mirrored = random.uniform() < 0.5;
    let (dx, dy) = (random.below(5) as i32 - 2, random.below(5) as i32 - 2);
    let gain = 1.0 + 0.12 * (random.uniform() - 0.5);
    let noise = if random.uniform() < 0.5 { 9.0 } else { 0.0 } * random.uniform();
    let blurred = random.uniform() < 0.4;
    let last = SIDE as i32 - 1;
    let at = |x: i32, y: i32, c: usize| {
        let (x, y) = ((x + dx).clamp(0, last), (y + dy).clamp(0, last));
        let x = if mirrored { last - x } else { x };
        f32::from(rgb[(y as usize * SIDE + x as usize) * 3 + c])
    };
    (0..SIDE * SIDE * 3)
        .map(|i| {
            let (c, x, y) = (i % 3, (i / 3 % SIDE) as i32, (i / 3 / SIDE) as i32);
            let mut v = at(x, y, c);
            if blurred {
                let near = at(x - 1, y, c) + at(x + 1, y, c) + at(x, y - 1, c) + at(x, y + 1, c);
                v = 0.5 * v + 0.125 * near;
            }
            let speck = if noise > 0.0 {
                noise * (random.uniform() * 2.0 - 1.0)
            } else {
                0.0
            };
            (v * gain + speck).clamp(0.0, 255.0) as u8
        })
        .collect()
}

/// Trains a judge on scenes of these subjects on the CPU, or goes on training, and writes it (half
/// precision) into `out`. The same options give the same weights, however often interrupted.
///
/// # Errors
/// If there are no subjects, or a file cannot be written.
pub fn train(
    options: &Options,
    subjects: &[Subject],
    rhythm: &Rhythm,
    out: &Path,
    tell: Tell,
) -> Result<()> {
    if subjects.is_empty() {
        return Err(Error::BadRequest(
            "the judge has nothing to learn from".into(),
        ));
    }
    let pool: Vec<Shown> = (0..options.pictures as u64)
        .map(|i| show(subjects, options.seed, i))
        .collect();
    let draw = |step: usize| -> Result<_> {
        let mut random = Philox::new(options.seed, 1 << 40 | step as u64);
        let mut pictures = Vec::new();
        let mut targets: [Vec<u32>; 5] = Default::default();
        for _ in 0..options.batch {
            let shown = &pool[random.below(pool.len() as u32) as usize];
            pictures.push(vary(&shown.rgb, &mut random));
            for (all, class) in targets.iter_mut().zip(shown.classes) {
                all.push(class);
            }
        }
        Ok((batch(&pictures.iter().collect::<Vec<_>>())?, targets))
    };
    let loss = |judge: &Judge, (pictures, targets): &(Tensor, [Vec<u32>; 5])| -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (scores, classes) in judge.forward(pictures)?.iter().zip(targets) {
            let classes = Tensor::new(classes.as_slice(), &Device::Cpu)?;
            sum = (sum + candle_nn::loss::cross_entropy(scores, &classes)?)?;
        }
        Ok(sum)
    };
    let compute = Compute::cpu();
    let params = Params::new(options.seed, compute.device.clone());
    Judge::new(params.builder(compute.dtype))?;
    let training = Training::cosine("judge", options.steps, options.lr);
    training::run(
        &training,
        &compute,
        &params,
        rhythm,
        Judge::new,
        draw,
        loss,
        tell,
    )?;
    let half = latest(&rhythm.folder, "judge")?
        .into_iter()
        .map(|(name, value)| Ok((name, value.to_dtype(DType::F16)?)))
        .collect::<Result<Vec<_>>>()?;
    save_tensors(&out.join("judge.safetensors"), &half, &[])?;
    let text = serde_json::to_vec(&Names::ours()).unwrap_or_default();
    write_whole(&out.join("classes.json"), &text)
}

/// How often the judge is right on fresh scenes of these subjects, by kind: over all pictures,
/// and over those that show an attribute of the kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// The kind.
    pub kind: String,
    /// Share of right answers, "none" included.
    pub all: f64,
    /// Share of right names where there is one.
    pub named: f64,
    /// Pictures that show an attribute of the kind.
    pub shown: usize,
}

/// Measures the judge on `count` scenes of subjects, best held-out ones.
///
/// # Errors
/// If there are no subjects.
pub fn accuracy(
    judge: &Judge,
    subjects: &[Subject],
    count: usize,
    seed: u64,
) -> Result<Vec<Accuracy>> {
    if subjects.is_empty() {
        return Err(Error::BadRequest("nothing to measure the judge on".into()));
    }
    let mut right = [[0usize; 2]; 5];
    let mut shown = [0usize; 5];
    for first in (0..count).step_by(32) {
        let made: Vec<Scene> = (first..count.min(first + 32))
            .map(|i| scene(subjects, seed, i as u64))
            .collect();
        let pictures: Vec<Picture> = made.iter().map(picture_of).collect();
        for (scene, answers) in made.iter().zip(judge.look(&pictures)?) {
            for (k, kind) in KINDS.into_iter().enumerate() {
                let truth = scene.attributes.iter().find(|a| a.category == kind);
                let hit = truth.map(|a| a.name) == answers[k].attribute.map(|a| a.name);
                shown[k] += usize::from(truth.is_some());
                right[k][0] += usize::from(hit);
                right[k][1] += usize::from(hit && truth.is_some());
            }
        }
    }
    let row = |k: usize| Accuracy {
        kind: KINDS[k].as_str().into(),
        all: right[k][0] as f64 / count.max(1) as f64,
        named: right[k][1] as f64 / shown[k].max(1) as f64,
        shown: shown[k],
    };
    Ok((0..KINDS.len()).map(row).collect())
}

/// A scene at 128 px.
pub fn picture_of(scene: &Scene) -> Picture {
    Picture::from_rgb(128, 128, scene.render(128))
}

/// One edit to be judged.
#[derive(Clone, Debug)]
pub struct Edited {
    /// Before.
    pub source: Picture,
    /// What was asked for.
    pub asked: &'static Attribute,
    /// After.
    pub picture: Picture,
}

/// How the edits of one kind fared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The kind of attribute asked for, or "all".
    pub kind: String,
    /// Edits judged.
    pub edits: usize,
    /// Share in which the judge names the asked-for attribute.
    pub found: f64,
    /// Share of (edit, attribute of its kind asked for elsewhere but not here) in which the
    /// judge names that other attribute.
    pub found_elsewhere: f64,
    /// Share in which the judge names another attribute of the kind that was asked for.
    pub mistaken: f64,
    /// Mean agreement of the Canny edges with the source's, within two pixels.
    pub edges: f64,
}

/// Judges edits: a row a kind of [`KINDS`] that was asked for, then one over all.
///
/// # Errors
/// If the weights are damaged.
pub fn score(judge: &Judge, edits: &[Edited]) -> Result<Vec<Row>> {
    let pictures: Vec<Picture> = edits.iter().map(|e| e.picture.clone()).collect();
    let answers = judge.look(&pictures)?;
    let mut asked: BTreeMap<Category, Vec<&str>> = BTreeMap::new();
    for edit in edits {
        let names = asked.entry(edit.asked.category).or_default();
        if !names.contains(&edit.asked.name) {
            names.push(edit.asked.name);
        }
    }
    let mut rows: Vec<Row> = Vec::new();
    for (k, kind) in KINDS.into_iter().enumerate() {
        let own: Vec<(&Edited, Option<&str>)> = edits
            .iter()
            .zip(&answers)
            .filter(|(e, _)| e.asked.category == kind)
            .map(|(e, a)| (e, a[k].attribute.map(|a| a.name)))
            .collect();
        if own.is_empty() {
            continue;
        }
        let names = &asked[&kind];
        let share = |hits: usize, of: usize| hits as f64 / of.max(1) as f64;
        let found = own
            .iter()
            .filter(|(e, said)| *said == Some(e.asked.name))
            .count();
        let other = |e: &Edited, said: &Option<&str>| said.is_some_and(|s| s != e.asked.name);
        let mistaken = own.iter().filter(|(e, said)| other(e, said)).count();
        let elsewhere = own
            .iter()
            .filter(|(e, said)| other(e, said) && said.is_some_and(|s| names.contains(&s)))
            .count();
        let agreement: f64 = own.iter().map(|(e, _)| kept_edges(e)).sum();
        rows.push(Row {
            kind: kind.as_str().into(),
            edits: own.len(),
            found: share(found, own.len()),
            found_elsewhere: share(elsewhere, own.len() * names.len().saturating_sub(1)),
            mistaken: share(mistaken, own.len()),
            edges: agreement / own.len() as f64,
        });
    }
    let all: usize = rows.iter().map(|r| r.edits).sum();
    let mean = |of: &dyn Fn(&Row) -> f64| {
        let sum: f64 = rows.iter().map(|r| of(r) * r.edits as f64).sum();
        sum / all.max(1) as f64
    };
    rows.push(Row {
        kind: "all".into(),
        edits: all,
        found: mean(&|r| r.found),
        found_elsewhere: mean(&|r| r.found_elsewhere),
        mistaken: mean(&|r| r.mistaken),
        edges: mean(&|r| r.edges),
    });
    Ok(rows)
}

fn kept_edges(edit: &Edited) -> f64 {
    let (w, h) = (edit.source.width, edit.source.height);
    let after = edit.picture.resized(w, h);
    edge_agreement(&canny(&edit.source, 100, 200), &canny(&after, 100, 200), 2)
}

/// The attributes of a kind that edits are tried with: the most common ones.
pub fn tried(kind: Category, most: usize) -> Vec<&'static Attribute> {
    let mut all = classes(kind);
    all.sort_by(|a, b| b.weight().total_cmp(&a.weight()));
    all.truncate(most);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::Object;

    /// The default bundle's judge, where it has one.
    fn judge() -> Option<Judge> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/bundles/default/judge");
        if !Path::new(folder).exists() {
            println!("skipped: {folder} is absent; the example train_judge makes it");
            return None;
        }
        Some(Judge::open(folder.as_ref()).expect("the shipped judge"))
    }

    #[test]
    fn a_judge_of_another_vocabulary_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(
            Judge::open(folder.path()),
            Err(Error::MissingModel { .. })
        ));
        let names = br#"{"kinds":[["color",["mauve"]]]}"#;
        std::fs::write(folder.path().join("classes.json"), names).expect("written");
        assert!(matches!(
            Judge::open(folder.path()),
            Err(Error::BadModel { .. })
        ));
    }

    fn held_out() -> Vec<Subject> {
        Object::HELD_OUT.iter().map(|o| Subject::from(*o)).collect()
    }

    #[test]
    fn the_judge_knows_objects_that_it_never_saw() {
        let Some(judge) = judge() else { return };
        // As many scenes as its card was measured on, which says 59 % for the hardest kind.
        for row in accuracy(&judge, &held_out(), 1000, 77).expect("measures") {
            assert!(row.named > 0.55, "{row:?}");
        }
    }

    #[test]
    fn right_edits_score_high_and_untouched_sources_low() {
        let Some(judge) = judge() else { return };
        let mut right = Vec::new();
        for (i, kind) in KINDS.into_iter().enumerate() {
            for (j, asked) in tried(kind, 4).into_iter().enumerate() {
                let object = Object::HELD_OUT[j % Object::HELD_OUT.len()];
                let scene = Scene::plain(object, crate::render::Color::Red, (i * 9 + j) as u64);
                right.push(Edited {
                    source: picture_of(&scene),
                    asked,
                    picture: picture_of(&scene.with(&[asked])),
                });
            }
        }
        let mut untouched = right.clone();
        for edit in &mut untouched {
            edit.picture = edit.source.clone();
        }
        let last = |edits: &[Edited]| score(&judge, edits).expect("scores").pop();
        let (good, bad) = (last(&right).expect("rows"), last(&untouched).expect("rows"));
        assert!(good.found > 0.7 && good.found_elsewhere < 0.1, "{good:?}");
        assert!(bad.found < 0.1 && bad.edges == 1.0, "{bad:?}");
    }

    #[test]
    fn training_is_deterministic_and_resumes_exactly() {
        let subjects = held_out();
        let options = Options {
            pictures: 8,
            steps: 4,
            batch: 4,
            ..Options::shipped()
        };
        let folder = tempfile::tempdir().expect("a folder");
        let run = |name: &str, stop_after: Option<usize>| {
            let out = folder.path().join(name);
            std::fs::create_dir_all(&out).expect("a folder");
            let rhythm = Rhythm {
                folder: out.clone(),
                checkpoint_s: 0.0,
                report_s: 0.0,
            };
            if let Some(stop) = stop_after {
                let mut tell = |p: &crate::train_flux::Progress| p.step < stop;
                train(&options, &subjects, &rhythm, &out, &mut tell).expect("begins");
            }
            train(&options, &subjects, &rhythm, &out, &mut |_| true).expect("trains");
            std::fs::read(out.join("judge.safetensors")).expect("weights")
        };
        assert_eq!(run("at once", None), run("in two parts", Some(2)));
    }
}
