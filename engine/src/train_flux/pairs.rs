//! Before/after pairs, rendered, encoded and written to one file.
//!
//! Encoding three pictures and a text takes longer than training on them once, and every
//! pair can be trained on many times with other noise, so it is done once.

use super::autoencoder::pictures;
use super::prepared;
use crate::canny::canny;
use crate::flux::text::prompt_of_states;
use crate::flux::vae::Vae;
use crate::params::{load_tensors, save_tensors};
use crate::picture::Picture;
use crate::render::{Object, Scene, Subject};
use crate::text_vectors::TextEncoder;
use crate::vocabulary::Attribute;
use crate::{Error, Result, grammar};
use candle_core::{DType, Device, Tensor};
use simpatico_schema::random::Philox;
use std::path::Path;

/// The settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// How many pairs.
    pub pairs: usize,
    /// The number of the first one: several programs can prepare parts of one set.
    pub first: usize,
    /// Side of the pictures, in pixels.
    pub size: usize,
    /// Text tokens that the transformer sees.
    pub tokens: usize,
    /// The most attributes that one edit changes.
    pub most_changes: usize,
    /// Decides everything that is random.
    pub seed: u64,
}

impl Options {
    /// What the shipped model was trained on.
    pub fn shipped() -> Self {
        Self {
            pairs: 24_000,
            first: 0,
            size: 128,
            tokens: 20,
            most_changes: 2,
            seed: 1,
        }
    }
}

/// One before/after pair and its text.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Before.
    pub source: Scene,
    /// After: the same geometry.
    pub target: Scene,
    /// An instruction, or the caption of the target.
    pub text: String,
}

/// Pair number `i`: three in four with an instruction, half of these in the words that the
/// policy learns ([`grammar`]), the fourth with the caption of the result.
///
/// # Panics
/// If there are no subjects.
pub fn pair<S: Clone + Into<Subject>>(
    subjects: &[S],
    most_changes: usize,
    seed: u64,
    i: u64,
) -> Pair {
    let mut random = Philox::new(seed, i);
    let subject = subjects[random.below(subjects.len() as u32) as usize].clone();
    let source = Scene::random(subject, random.next_u64());
    let edit = source.random_edit(most_changes, &mut random);
    let target = source.clone().with(&edit);
    let text = match random.uniform() {
        p if p < 0.375 => source.instruction(&edit, &mut random),
        p if p < 0.75 => {
            let named: Vec<&Attribute> = edit.iter().take(2).copied().collect();
            let object = format!("the {}", source.subject.word());
            grammar::instruction(&mut random, &object, &named, None)
        }
        _ => target.caption_varied(&mut random),
    };
    Pair {
        source,
        target,
        text,
    }
}

/// The edges of a scene as a ControlNet picture, (3, size, size) in -1..1, with random
/// thresholds and, at times, a part of them wiped out, so that the network does not learn to
/// expect exactly these edges.
fn edges(scene: &Scene, size: usize, random: &mut Philox) -> Result<Tensor> {
    let picture = Picture::from_rgb(size as u32, size as u32, scene.render(size));
    let low = 60 + random.below(80) as u16;
    let high = low * 2 + random.below(60) as u16;
    let drawn = canny(&picture, low, high).to_picture();
    let mut tensor = drawn.to_tensor(&Device::Cpu)?;
    if random.uniform() < 0.1 {
        let keep: Vec<f32> = (0..64)
            .map(|_| f32::from(random.uniform() > 0.15))
            .collect();
        let keep = Tensor::from_vec(keep, (1, 1, 8, 8), &Device::Cpu)?;
        let keep = keep.upsample_nearest2d(size, size)?;
        tensor = ((tensor + 1.0)?.broadcast_mul(&keep)? - 1.0)?;
    }
    Ok(tensor)
}

/// Makes pairs of the renderer's trained objects and writes them; see [`prepare_of`].
///
/// # Errors
/// If the file cannot be written.
pub fn prepare(
    options: &Options,
    vae: &Vae,
    encoder: &TextEncoder,
    file: &Path,
    tell: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    let subjects: Vec<Subject> = Object::trained().into_iter().map(Subject::from).collect();
    prepare_of(options, &subjects, vae, encoder, file, tell)
}

/// Makes pairs of these subjects and writes them; `tell(done, all)` between batches. The file
/// has its name once it is whole. About 20 ms a pair and core.
///
/// # Errors
/// If there are no subjects, or the file cannot be written.
pub fn prepare_of(
    options: &Options,
    subjects: &[Subject],
    vae: &Vae,
    encoder: &TextEncoder,
    file: &Path,
    tell: &mut dyn FnMut(usize, usize),
) -> Result<()> {
    if subjects.is_empty() {
        return Err(Error::BadRequest(
            "there is nothing to make pairs of: expected at least one subject".into(),
        ));
    }
    let (mut source, mut target, mut control) = (Vec::new(), Vec::new(), Vec::new());
    let (mut text, mut pooled) = (Vec::new(), Vec::new());
    let half = |x: Tensor| x.to_dtype(DType::F16);
    const BATCH: usize = 16;
    for done in (0..options.pairs).step_by(BATCH) {
        let count = BATCH.min(options.pairs - done);
        let start = options.first + done;
        let made: Vec<Pair> = (start..start + count)
            .map(|i| pair(subjects, options.most_changes, options.seed, i as u64))
            .collect();
        let mut random = Philox::new(options.seed, 1 << 40 | start as u64);
        let before: Vec<Scene> = made.iter().map(|p| p.source.clone()).collect();
        let after: Vec<Scene> = made.iter().map(|p| p.target.clone()).collect();
        let drawn = before
            .iter()
            .map(|scene| edges(scene, options.size, &mut random))
            .collect::<Result<Vec<_>>>()?;
        source.push(half(vae.encode(&pictures(&before, options.size)?)?)?);
        target.push(half(vae.encode(&pictures(&after, options.size)?)?)?);
        control.push(half(vae.encode(&Tensor::cat(&drawn, 0)?)?)?);
        let texts: Vec<&str> = made.iter().map(|p| p.text.as_str()).collect();
        let seen = encoder.encode_tokens(&texts, options.tokens)?;
        let lengths = seen.mask.sum(1)?.to_vec1::<f32>()?;
        let states = lengths
            .iter()
            .enumerate()
            .map(|(i, n)| Ok(seen.states.get(i)?.narrow(0, 0, *n as usize)?))
            .collect::<Result<Vec<_>>>()?;
        let prompt = prompt_of_states(&states, options.tokens)?;
        text.push(half(prompt.text)?);
        pooled.push(half(prompt.pooled)?);
        tell(done + count, options.pairs);
    }
    let none = Tensor::zeros((0, encoder.dim), DType::F32, &Device::Cpu)?;
    let nothing = prompt_of_states(&[none], options.tokens)?;
    let tensors = [
        ("source", Tensor::cat(&source, 0)?),
        ("target", Tensor::cat(&target, 0)?),
        ("control", Tensor::cat(&control, 0)?),
        ("text", Tensor::cat(&text, 0)?),
        ("pooled", Tensor::cat(&pooled, 0)?),
        ("no_text", half(nothing.text)?),
        ("no_pooled", half(nothing.pooled)?),
    ];
    let named: Vec<(String, Tensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| (name.to_string(), tensor))
        .collect();
    save_tensors(file, &named, &[])
}

/// What [`prepare`] wrote, in memory, f16. First dimension: the pair.
pub struct Pairs {
    /// Latents before, (n, c, h, w).
    pub source: Tensor,
    /// Latents after.
    pub target: Tensor,
    /// Latents of the source's edges.
    pub control: Tensor,
    /// Text states, (n, tokens, dim).
    pub text: Tensor,
    /// Pooled text, (n, dim).
    pub pooled: Tensor,
    /// The states of no text, (1, tokens, dim).
    pub no_text: Tensor,
    /// Its pooled vector, (1, dim).
    pub no_pooled: Tensor,
}

impl Pairs {
    /// Reads a file of pairs.
    pub fn open(file: &Path) -> Result<Self> {
        let mut found = load_tensors(file, &Device::Cpu)?;
        let mut take = |name: &str| {
            found.remove(name).ok_or_else(|| {
                Error::bad_model(file.display().to_string(), format!("{name} is missing"))
            })
        };
        Ok(Self {
            source: take("source")?,
            target: take("target")?,
            control: take("control")?,
            text: take("text")?,
            pooled: take("pooled")?,
            no_text: take("no_text")?,
            no_pooled: take("no_pooled")?,
        })
    }

    /// Every `pairs*.safetensors` of a folder, by name.
    ///
    /// # Errors
    /// If there is none, or one is damaged.
    pub fn open_all(folder: &Path) -> Result<Self> {
        let files = prepared(folder, "pairs", "prepare pairs first")?;
        let parts = files
            .iter()
            .map(|file| Self::open(file))
            .collect::<Result<Vec<_>>>()?;
        let first = &parts[0];
        let join = |of: &dyn Fn(&Self) -> &Tensor| -> Result<Tensor> {
            let all: Vec<&Tensor> = parts.iter().map(of).collect();
            Ok(Tensor::cat(&all, 0)?)
        };
        Ok(Self {
            source: join(&|p| &p.source)?,
            target: join(&|p| &p.target)?,
            control: join(&|p| &p.control)?,
            text: join(&|p| &p.text)?,
            pooled: join(&|p| &p.pooled)?,
            no_text: first.no_text.clone(),
            no_pooled: first.no_pooled.clone(),
        })
    }

    /// # Errors
    /// If there is nothing to train on.
    pub(super) fn check(&self) -> Result<()> {
        match self.is_empty() {
            true => Err(Error::BadRequest(
                "there are no pairs to train on: prepare some".into(),
            )),
            false => Ok(()),
        }
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.source.dim(0).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::artwork;

    fn shipped() -> Vec<Subject> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/bundles/default/artwork");
        let art = artwork::cut_outs(folder.as_ref()).expect("the shipped artwork");
        art.into_iter().map(Subject::from).collect()
    }

    #[test]
    fn a_pair_is_a_function_of_seed_and_number() {
        let subjects = shipped();
        for i in 0..6 {
            let (a, b) = (pair(&subjects, 2, 3, i), pair(&subjects, 2, 3, i));
            assert_eq!(a.text, b.text);
            assert_eq!(a.source.render(64), b.source.render(64));
            assert_eq!(a.target.render(64), b.target.render(64));
            assert_ne!(a.source.render(64), a.target.render(64), "{}", a.text);
        }
    }

    #[test]
    fn trained_objects_leave_out_the_held_out_ones() {
        let trained = Object::trained();
        assert!(Object::HELD_OUT.iter().all(|o| !trained.contains(o)));
        assert_eq!(trained.len() + Object::HELD_OUT.len(), Object::ALL.len());
    }
}
