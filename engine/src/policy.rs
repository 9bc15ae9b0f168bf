//! The policy: from a user, a caption and perhaps a cue to one edit instruction.
//!
//! In order: the user's edges and embedding are read from the snapshot; the likes and dislikes
//! are written into the prompt (the newest always, in an order drawn for each picture); the
//! embedding becomes the soft prompt; neighbours fill in where the user has said little; the
//! language model writes; the answer is cut to one clean sentence, and written again where it
//! takes up something the user dislikes, nothing of what was wished for, nothing that the user or
//! the neighbours like, or nothing that the bundle's picture model can draw. What a wish asks for
//! `wishes` finds out; to somebody new, what was said is put as a wish, in turn from picture to
//! picture.
//!
//! What belongs to neighbours is treated as theirs: an attribute enters the text only if at
//! least [`PolicyOptions::k_threshold`] users like it. Names, captions and cues are text to the
//! model and can never become special tokens (the tokenizer encodes them as ordinary text).
//!
//! Not here: training (`train_policy`), pictures.

use crate::bundle::{Bundle, Location};
use crate::chat::{ChatTemplate, Role, Turn};
use crate::error::{Error, Result};
use crate::generate::{Options, Prompt, Read, Sampling};
use crate::lm::{LanguageModel, Precision};
use crate::lora::Adapter;
use crate::soft_prompt::SoftPrompt;
use crate::synth::{Caption, Split, Synth, SynthPair, SynthUser};
use crate::tokenizer::Tokenizer;
use crate::train_policy::{PairGroup, SftGroup, TokenPair};
use crate::vocabulary::{self, Attribute, Cluster, EditType};
use crate::weights::Weights;
use crate::wishes::{self, Listener, Wish, Wisher, cue_words};
use crate::{grammar, synth};
use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};
use simpatico_schema::edit::{Fallback, InstructRequest, Instruction, WeightedNeighbor, Why};
use simpatico_schema::random::Philox;
use simpatico_schema::{OverlapMode, Polarity};
use simpatico_storage::{Snapshot, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

/// The first turn of every prompt.
const SYSTEM: &str = "You suggest one image edit to a person's taste.";
/// The longest caption or cue, in characters.
const TEXT_CHARS_MAX: usize = 400;
/// The longest name of a like that has a turn: it stands in the prompt once more.
const TURN_CHARS_MAX: usize = 60;
/// The longest prompt, in tokens.
const PROMPT_TOKENS_MAX: usize = 512;

/// What a prompt is written from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptText<'a> {
    /// Likes, the weightiest first. No likes and no dislikes: the prompt has no profile.
    pub likes: Vec<&'a str>,
    /// Dislikes.
    pub dislikes: Vec<&'a str>,
    /// What the picture shows.
    pub caption: &'a str,
    /// A wish.
    pub cue: Option<&'a str>,
}

/// The ids of a prompt, the model's turn opened.
pub fn prompt_ids(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    text: &PromptText,
) -> Result<Vec<u32>> {
    let one_line = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut user = String::new();
    if !text.likes.is_empty() {
        user += &format!("Likes: {}\n", one_line(&text.likes.join(", ")));
    }
    if !text.dislikes.is_empty() {
        user += &format!("Dislikes: {}\n", one_line(&text.dislikes.join(", ")));
    }
    user += &format!("Image: {}\n", one_line(text.caption));
    if let Some(cue) = text.cue {
        user += &format!("Wish: {}\n", one_line(cue));
    }
    user += "One edit:";
    let turns = [
        Turn {
            role: Role::System,
            text: SYSTEM,
        },
        Turn {
            role: Role::User,
            text: &user,
        },
    ];
    template.encode(tokenizer, &turns, true, PROMPT_TOKENS_MAX)
}

/// The ids of an instruction as the model's answer, the end of its turn included.
pub fn answer_ids(tokenizer: &Tokenizer, instruction: &str) -> Result<Vec<u32>> {
    let mut ids = tokenizer.encode(instruction)?;
    let end = tokenizer
        .specials()
        .get("<|im_end|>")
        .copied()
        .or(tokenizer.eos);
    ids.extend(end);
    Ok(ids)
}

// ------------------------------------------------------------------------------ answering

/// How many instructions are written side by side: each keeps its own keys and values.
pub const TOGETHER: usize = 32;

/// How the policy answers.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyOptions {
    /// Neighbours looked at.
    pub neighbors: usize,
    /// An attribute known only from neighbours enters only if so many users like it.
    pub k_threshold: usize,
    /// The most tokens of an instruction; never more than 64.
    pub max_tokens: usize,
    /// Likes written into the prompt.
    pub likes_shown: usize,
    /// Dislikes written into the prompt.
    pub dislikes_shown: usize,
    /// A user with fewer likes gets suggestions from neighbours up to this number.
    pub fill_up_to: usize,
    /// Whether an instruction that takes up nothing the user or the neighbours like is written
    /// anew, as one that takes up a dislike, or not what a cue asks for, always is; a user with at
    /// most `fill_up_to` likes wants to see them in turn, from picture to picture. With a cue that
    /// is asked only where something that the user likes would follow it.
    pub insist: bool,
    /// Whether one that takes up nothing which can be drawn ([`Attribute::look`]) is, too.
    pub drawn_only: bool,
    /// Whether an instruction ends where a second change would begin
    /// ([`grammar::second_changes`]), unless more than one was wished for.
    pub one_change: bool,
    /// How much more than by itself the user's embedding counts for the words
    /// ([`Options::emphasis`]).
    pub emphasis: f32,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        Self {
            neighbors: 10,
            k_threshold: 3,
            max_tokens: 48,
            likes_shown: 8,
            dislikes_shown: 4,
            fill_up_to: 4,
            insist: true,
            drawn_only: false,
            one_change: false,
            emphasis: 1.0,
        }
    }
}

impl PolicyOptions {
    /// What a bundle says.
    pub fn of_bundle(bundle: &Bundle) -> Self {
        let settings = &bundle.manifest.settings;
        Self {
            neighbors: settings.neighbors,
            max_tokens: settings.max_tokens,
            emphasis: settings.emphasis,
            drawn_only: settings.drawn_only,
            one_change: settings.one_change,
            ..Self::default()
        }
    }
}

/// A language model with our adapter and soft prompt, ready to answer.
pub struct Policy {
    /// The language model.
    pub model: LanguageModel,
    /// The trained adapter; `None` runs the base model.
    pub adapter: Option<Adapter>,
    /// The soft prompt; `None` answers from the text alone.
    pub soft: Option<SoftPrompt>,
    /// Settings.
    pub options: PolicyOptions,
    /// What hears wishes in words that no attribute has; `None` leaves them to the model.
    pub listener: Option<Listener>,
}

/// Bytes up to which a GPU takes a quantised model's weights as plain ones: it has them to spare, and
/// the adapter merged and our kernels used, a token is a sixth of the launches.
const WIDENED_MOST: usize = 4 << 30;

/// A CPU computes in f32 from what the file has; a GPU in what the bundle says, of a large
/// quantised model in f32 with what the file has.
fn precision_of(bundle: &Bundle, model: &Path, device: &Device) -> Result<Precision> {
    if device.is_cpu() {
        return Ok(Precision::Quantised);
    }
    let dtype = bundle.manifest.settings.dtype_on(device);
    let weights = Weights::open(model)?;
    let numbers = |name| {
        weights
            .shape(name)
            .map_or(0, |shape| shape.iter().product())
    };
    let count: usize = weights.names().map(numbers).sum();
    let widened = count.saturating_mul(dtype.size_in_bytes());
    Ok(match weights.gguf() {
        Some(_) if widened > WIDENED_MOST => Precision::Quantised,
        _ => Precision::Dense(dtype),
    })
}

impl Policy {
    /// Opens what a bundle says: language model, adapter and soft prompt.
    pub fn open(bundle: &Bundle, device: &Device) -> Result<Self> {
        let roles = &bundle.manifest.roles;
        let model_path = bundle.role("language_model", roles.language_model.as_ref())?;
        let precision = precision_of(bundle, &model_path, device)?;
        let mut model = LanguageModel::open(&model_path, precision, device)?;
        let mut adapter = match optional(bundle, roles.adapters.as_ref())? {
            Some(folder) => Some(Adapter::load(&folder, &model.decoder.config, device)?),
            None => None,
        };
        // Apart from the weights an adapter is six small launches for each of them, twice a
        // large model's time for a token.
        if precision != Precision::Quantised {
            if let Some(adapter) = adapter.take() {
                model.decoder.merge(&adapter)?;
            }
            model.decoder.join()?;
        }
        let soft = match optional(bundle, roles.soft_prompt.as_ref())? {
            Some(file) => Some(SoftPrompt::load(&file, device)?.0),
            None => None,
        };
        let mut policy = Self::new(model, adapter, soft, PolicyOptions::of_bundle(bundle))?;
        if let Some(vectors) = optional(bundle, roles.wishes.as_ref())? {
            policy.listener = Some(Listener::open(bundle, &vectors, device)?);
        }
        Ok(policy)
    }

    /// From parts; an error where the soft prompt does not fit the model.
    pub fn new(
        model: LanguageModel,
        adapter: Option<Adapter>,
        soft: Option<SoftPrompt>,
        options: PolicyOptions,
    ) -> Result<Self> {
        if let Some(soft) = soft
            .as_ref()
            .filter(|s| s.config.hidden != model.decoder.config.hidden)
        {
            let (expected, got) = (model.decoder.config.hidden, soft.config.hidden);
            let reason = format!("expected tokens of width {expected}, the model's, got {got}");
            return Err(Error::bad_model("soft prompt", reason));
        }
        if model.template.is_none() {
            let reason = "has no chat template; give the bundle a tokenizer_config.json";
            return Err(Error::bad_model("language model", reason));
        }
        Ok(Self {
            model,
            adapter,
            soft,
            options,
            listener: None,
        })
    }

    /// One instruction. The same request on the same snapshot gives the same words.
    pub fn instruct(&self, snapshot: &Snapshot, request: &InstructRequest) -> Result<Instruction> {
        let go_on = || ControlFlow::Continue(());
        let one = std::slice::from_ref(request);
        let mut all = self.instruct_batch(snapshot, one, go_on)?;
        all.pop().ok_or_else(no_sentence)
    }

    /// Instructions for many requests, each the one that [`Policy::instruct`] gives it. The
    /// weights are read once for up to [`TOGETHER`] of them, so that on a CPU many cost a
    /// fraction of as many calls. `go_on` is asked before every token.
    ///
    /// # Errors
    /// As `instruct`, for the first request that has one; [`Error::Cancelled`].
    pub fn instruct_batch(
        &self,
        snapshot: &Snapshot,
        requests: &[InstructRequest],
        mut go_on: impl FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<Instruction>> {
        let mut all = Vec::with_capacity(requests.len());
        for requests in requests.chunks(TOGETHER) {
            let asked = requests
                .iter()
                .map(|request| self.asked(snapshot, request))
                .collect::<Result<Vec<_>>>()?;
            let mut drafts: Vec<Option<Draft>> = requests.iter().map(|_| None).collect();
            // Who is not heeded is told the model in other words, where there are any.
            for telling in 0.. {
                let unheeded = |i: &usize| {
                    let draft = drafts[*i].as_ref();
                    let heeded = draft.is_some_and(|(faults, _)| !faults.unheeded);
                    telling < asked[*i].tellings() && !heeded
                };
                let open: Vec<usize> = (0..requests.len()).filter(unheeded).collect();
                if open.is_empty() {
                    break;
                }
                let prompts = open
                    .iter()
                    .map(|i| self.prompt(snapshot, &requests[*i], &asked[*i], telling))
                    .collect::<Result<Vec<_>>>()?;
                self.write(requests, &asked, &open, &prompts, &mut drafts, &mut go_on)
                    .map_err(|e| e.during("writing the instructions", "ask for fewer at once"))?;
            }
            for ((request, taste), draft) in requests.iter().zip(&asked).zip(drafts) {
                let (_, words) = draft.ok_or_else(no_sentence)?;
                all.push(Instruction {
                    why: self.why(snapshot, request, taste, &words)?,
                    fallback: taste.unknown.then_some(Fallback::Generic),
                    instruction: words,
                });
            }
        }
        Ok(all)
    }

    /// What is known of the user and of the wish.
    fn asked(&self, snapshot: &Snapshot, request: &InstructRequest) -> Result<Asked> {
        check_request(request)?;
        let mut taste = self.taste(snapshot, request)?;
        let mut random = Philox::new(request.seed, !picture_stream(request));
        taste.wish = match wish_of(request) {
            Some(cue) => {
                let of = Wisher {
                    likes: &taste.likes,
                    suggestions: &taste.suggestions,
                    dislikes: &taste.dislikes,
                };
                let listener = self.listener.as_ref();
                Some(wishes::understand(cue, &of, listener, &mut random)?)
            }
            None => {
                // Where one change is all that is asked for, what was said would often have to give
                // way to what is guessed.
                let said = self.options.one_change && random.uniform() < SAID;
                let explores = said && random.uniform() < request.explore;
                taste.said = said && !explores && !taste.likes.is_empty();
                let wish = turn(&self.options, &taste, request.explore, &mut random);
                taste.turn = wish.as_ref().and_then(|wish| wish.words.first().cloned());
                wish
            }
        };
        Ok(taste)
    }

    /// The prompt with the wish in one of its wordings.
    fn prompt(
        &self,
        snapshot: &Snapshot,
        request: &InstructRequest,
        taste: &Asked,
        telling: usize,
    ) -> Result<Prompt> {
        let dislikes = taste.dislikes.iter().take(self.options.dislikes_shown);
        let cue = taste.wish.as_ref().and_then(|wish| wish.words.get(telling));
        let text = PromptText {
            likes: taste.shown.iter().map(String::as_str).collect(),
            dislikes: dislikes.map(String::as_str).collect(),
            caption: &request.caption,
            cue: cue.map(String::as_str),
        };
        let Some(template) = &self.model.template else {
            return Err(Error::bad_model("language model", "has no chat template"));
        };
        Ok(Prompt {
            soft: self.soft_tokens(snapshot, request, taste)?,
            ids: prompt_ids(&self.model.tokenizer, template, &text)?,
            stream: picture_stream(request),
        })
    }

    /// Tries the requests `open`, whose prompts are given: a sentence for each; another one,
    /// warmer, for those that come out empty, name what the user dislikes, nothing of what was
    /// wished for, nothing that is liked, or nothing that can be drawn. Of all tries the draft
    /// with the fewest faults stays.
    fn write(
        &self,
        requests: &[InstructRequest],
        asked: &[Asked],
        open: &[usize],
        prompts: &[Prompt],
        drafts: &mut [Option<Draft>],
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<()> {
        let longest = open
            .iter()
            .map(|i| self.sampling(&requests[*i], &asked[*i], 0));
        let most = Options {
            emphasis: self.options.emphasis,
            ..Options::greedy(longest.map(|o| o.max_tokens).max().unwrap_or(0))
        };
        let adapter = self.adapter.as_ref();
        let mut read = Read::new(&self.model, prompts, adapter, &most, go_on)?;
        for attempt in 0..ATTEMPTS {
            let options = |at: usize| self.sampling(&requests[open[at]], &asked[open[at]], attempt);
            let mut todo: Vec<usize> = (0..open.len())
                .filter(|at| {
                    let draft = drafts[open[*at]].as_ref();
                    let faulty = draft.is_none_or(|(faults, _)| *faults > Faults::default());
                    faulty && attempt < asked[open[*at]].attempts()
                })
                .collect();
            while let Some(first) = todo.first() {
                let own = options(*first);
                let (group, others) = todo.into_iter().partition(|at| options(*at) == own);
                todo = others;
                let group: Vec<usize> = group;
                let stream = |at: &usize| (*at, prompts[*at].stream.wrapping_add(attempt));
                let which: Vec<(usize, u64)> = group.iter().map(stream).collect();
                let answers = read.answer(&which, &own, go_on)?;
                for (at, answer) in group.into_iter().zip(answers) {
                    let words = clean(&answer.text);
                    let insist = self.options.insist.then_some(&self.options);
                    let faults = Faults::of(&words, &asked[open[at]], insist);
                    let draft = &mut drafts[open[at]];
                    let better = draft.as_ref().is_none_or(|(least, _)| faults < *least);
                    if !words.is_empty() && better {
                        *draft = Some((faults, words));
                    }
                }
            }
        }
        Ok(())
    }

    fn sampling(&self, request: &InstructRequest, taste: &Asked, attempt: u64) -> Options {
        let most = request.max_tokens.unwrap_or(self.options.max_tokens);
        let temperature = match attempt {
            0 => request.temperature,
            _ => request.temperature.max(0.8),
        };
        Options {
            max_tokens: most.clamp(1, 64),
            sampling: Sampling {
                temperature,
                top_p: 0.9,
                seed: request.seed,
                ..Sampling::greedy()
            },
            stop: ends_of(taste, self.options.one_change),
            emphasis: self.options.emphasis,
        }
    }

    fn soft_tokens(
        &self,
        snapshot: &Snapshot,
        request: &InstructRequest,
        taste: &Asked,
    ) -> Result<Option<Tensor>> {
        let Some(soft) = self.soft.as_ref().filter(|_| !taste.unknown) else {
            return Ok(None);
        };
        let own = || {
            let embedding = snapshot.embedding(&request.user).map_err(store_error)?;
            Ok(embedding.vector)
        };
        // Without a trained encoder in the store the text alone must do.
        if soft.config.everyone.is_none() && own().is_err() {
            return Ok(None);
        }
        Ok(Some(soft.of_user(own)?.squeeze(0)?))
    }

    /// What the snapshot says about the user, and what of it goes into the prompt.
    fn taste(&self, snapshot: &Snapshot, request: &InstructRequest) -> Result<Asked> {
        let mut asked = Asked {
            unknown: true,
            ..Asked::default()
        };
        if !snapshot.has_user(&request.user) {
            return Ok(asked);
        }
        let mut registers = snapshot.registers(&request.user).map_err(store_error)?;
        registers.sort_by(|a, b| (b.at, &b.id, &b.attribute).cmp(&(a.at, &a.id, &a.attribute)));
        for event in registers {
            match event.polarity {
                Polarity::Like => asked.likes.push(event.attribute),
                Polarity::Dislike => asked.dislikes.push(event.attribute),
                Polarity::Pass | Polarity::Clear => {}
            }
        }
        asked.unknown = asked.likes.is_empty() && asked.dislikes.is_empty();
        if asked.unknown {
            return Ok(asked);
        }
        let profile = snapshot
            .profile(&request.user, self.options.neighbors)
            .map_err(store_error)?;
        asked.neighbors = profile
            .neighbors
            .iter()
            .map(|n| (n.user.clone(), n.overlap.unwrap_or(0)))
            .collect();
        let popular = |a: &str| {
            snapshot
                .degrees(a)
                .is_some_and(|(likes, _)| likes >= self.options.k_threshold)
        };
        asked.suggestions = profile
            .suggestions
            .into_iter()
            .filter(|s| s.weight > 0.0 && popular(&s.attribute))
            .map(|s| s.attribute)
            .take(12)
            .collect();
        let mut random = Philox::new(request.seed, picture_stream(request));
        // Everything newly said stands in the prompt; of a longer history, the newest likes and
        // a draw from the rest, so that not every picture gets the same ones.
        let most = self.options.likes_shown;
        let mut shown: Vec<String> = asked.likes.iter().take(most / 2).cloned().collect();
        let mut rest: Vec<String> = asked.likes.iter().skip(most / 2).cloned().collect();
        random.shuffle(&mut rest);
        shown.extend(rest.into_iter().take(most - shown.len()));
        let room = self.options.fill_up_to.saturating_sub(shown.len()).min(2);
        shown.extend(asked.suggestions.iter().take(room).cloned());
        random.shuffle(&mut shown);
        explore(
            snapshot,
            request.explore,
            &asked,
            &mut shown,
            self.options.k_threshold,
            &mut random,
        )?;
        asked.shown = shown;
        Ok(asked)
    }

    fn why(
        &self,
        snapshot: &Snapshot,
        request: &InstructRequest,
        asked: &Asked,
        words: &str,
    ) -> Result<Why> {
        let own = named_in(words, &asked.likes);
        let wished = asked.wish.iter().filter(|_| wish_of(request).is_some());
        let total: f64 = asked.neighbors.iter().map(|n| f64::from(n.1)).sum();
        Ok(Why {
            likes: own,
            dislikes: asked.dislikes.clone(),
            neighbors: asked
                .neighbors
                .iter()
                .map(|(user, overlap)| WeightedNeighbor {
                    user: user.clone(),
                    overlap: *overlap,
                    weight: if total > 0.0 {
                        f64::from(*overlap) / total
                    } else {
                        0.0
                    },
                })
                .collect(),
            from_neighbors: named_in(words, &asked.suggestions),
            wish: wished
                .flat_map(|wish| named_in(words, &wish.any_of))
                .collect(),
            explore: request.explore.clamp(0.0, 1.0),
            as_of: snapshot.as_of(),
        })
    }
}

/// Of somebody new, a like whose turn it is with this picture, as if it were wished for: left to
/// itself the model says of three likes the same one of every picture. Now and then it is left to
/// itself where what is beyond the user's likes shall be explored.
fn turn(options: &PolicyOptions, taste: &Asked, explore: f32, random: &mut Philox) -> Option<Wish> {
    if !options.insist || !taste.is_new(options) || random.uniform() < explore {
        return None;
    }
    let mut likes = taste.likes.clone();
    likes.retain(|name| name.chars().count() <= TURN_CHARS_MAX);
    random.shuffle(&mut likes);
    if options.drawn_only {
        likes.sort_by_key(|name| !may_show(name));
    }
    (!likes.is_empty()).then(|| Wish {
        any_of: taste.likes.clone(),
        words: likes,
        several: false,
    })
}

/// An instruction, and what speaks against it.
type Draft = (Faults, String);

/// What speaks against an instruction; the first weighs more.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Faults {
    /// How many of the user's dislikes it takes up that nobody wished for.
    dislikes: usize,
    /// That it takes up nothing of what was wished for, where we know what that is.
    unheeded: bool,
    /// 2: that it takes up nothing which the user or the neighbours like; 1: nothing which the
    /// user likes, who has said so little that it is missed, or who likes something of what was
    /// wished for, or where that is wanted of this picture.
    impersonal: u8,
    /// That it takes up nothing which can be drawn, where that matters and what was wished for can
    /// be.
    undrawn: bool,
    /// That it takes up another like than the one whose turn it is.
    out_of_turn: bool,
}

/// Whether a sentence takes up attributes of the vocabulary, none of which has a look.
fn undrawn(words: &str) -> bool {
    let found = vocabulary::mentioned(words);
    !found.is_empty() && found.iter().all(|a| a.look.is_none())
}

impl Faults {
    /// `insist`: what to insist on, if anything but that a wish is followed and dislikes are left
    /// out.
    fn of(words: &str, taste: &Asked, insist: Option<&PolicyOptions>) -> Self {
        let any_of = taste.wish.as_ref().map_or(&[][..], |wish| &wish.any_of);
        let followed = named_in(words, any_of);
        let takes_up = |list: &Vec<String>| !named_in(words, list).is_empty();
        let near = [&taste.suggestions, &taste.shown];
        let could = !taste.likes.is_empty() || near.iter().any(|list| !list.is_empty());
        let impersonal = match (insist, &taste.wish) {
            (None, _) => 0,
            // Of several things that follow a wish, one's own.
            (Some(_), Some(wish)) => {
                let own = |list: &[String]| list.iter().any(|a| taste.likes.contains(a));
                u8::from(own(&wish.any_of) && !own(&followed))
            }
            (Some(_), None) if !could || takes_up(&taste.likes) => 0,
            (Some(options), None) if near.into_iter().any(takes_up) => {
                u8::from(taste.is_new(options) || taste.said)
            }
            (Some(_), None) => 2,
        };
        let unwanted = named_in(words, &taste.dislikes).into_iter();
        let unwanted = unwanted.filter(|dislike| !any_of.contains(dislike));
        let drawn_only = insist.is_some_and(|o| o.drawn_only)
            && taste
                .wish
                .as_ref()
                .is_none_or(|wish| wish.any_of.iter().any(|name| may_show(name)));
        Self {
            dislikes: unwanted.count(),
            unheeded: !any_of.is_empty() && followed.is_empty(),
            impersonal,
            undrawn: drawn_only && undrawn(words),
            out_of_turn: taste
                .turn
                .as_ref()
                .is_some_and(|like| !followed.contains(like)),
        }
    }
}

/// Whether the attribute has a look, or may have one for all we know.
fn may_show(name: &str) -> bool {
    vocabulary::find(name).is_none_or(|a| a.look.is_some())
}

fn no_sentence() -> Error {
    Error::BadRequest(
        "the language model gave no usable sentence; try another seed, or check that adapter \
         and model belong together"
            .into(),
    )
}

fn optional(bundle: &Bundle, location: Option<&Location>) -> Result<Option<std::path::PathBuf>> {
    location.map(|l| bundle.path(l)).transpose()
}

/// What was found out about a user for one request.
#[derive(Default)]
struct Asked {
    unknown: bool,
    likes: Vec<String>,
    dislikes: Vec<String>,
    neighbors: Vec<(String, u32)>,
    suggestions: Vec<String>,
    shown: Vec<String>,
    /// What was wished for, or is treated so ([`turn`]).
    wish: Option<Wish>,
    /// The like whose turn it is.
    turn: Option<String>,
    /// Whether something that the user said is wanted, and not what the neighbours would add.
    said: bool,
}

impl Asked {
    /// Whether the user has said so little that what was said is missed where it is not taken up.
    fn is_new(&self, options: &PolicyOptions) -> bool {
        (1..=options.fill_up_to).contains(&self.likes.len())
    }

    /// In how many ways the model can be told what is asked.
    fn tellings(&self) -> usize {
        self.wish.as_ref().map_or(1, |wish| wish.words.len())
    }

    /// How often a sentence with a fault is written anew in each, the first time counted in.
    fn attempts(&self) -> u64 {
        match self.tellings() {
            1 => ATTEMPTS,
            _ => ATTEMPTS / 2,
        }
    }
}

fn store_error(e: StoreError) -> Error {
    Error::BadRequest(format!("reading the store: {e}"))
}

/// What an instruction ends before.
fn ends_of(taste: &Asked, one_change: bool) -> Vec<String> {
    let several = taste.wish.as_ref().is_some_and(|wish| wish.several);
    let seconds = match one_change && !several {
        true => grammar::second_changes(),
        false => &[],
    };
    let line = "\n".to_string();
    std::iter::once(line)
        .chain(seconds.iter().cloned())
        .collect()
}

/// The cue, unless it says nothing.
fn wish_of(request: &InstructRequest) -> Option<&str> {
    request.cue.as_deref().filter(|c| !c.trim().is_empty())
}

/// In what share of pictures an instruction that asks for one change shall take up something that
/// the user said. The others may show what is guessed.
const SAID: f32 = 0.5;

/// How often a sentence is written at most of one prompt, half as often of several. A prompt is read
/// once, so that another try costs some ten tokens.
const ATTEMPTS: u64 = 8;

/// The stream of random numbers that a picture's draws come from. Another picture, another draw:
/// or one seed would find the same like for all of them.
fn picture_stream(request: &InstructRequest) -> u64 {
    let drawn = Sha256::digest(request.caption.as_bytes());
    let first = drawn.iter().take(8);
    first.fold(0, |all, byte| all << 8 | u64::from(*byte))
}

fn check_request(request: &InstructRequest) -> Result<()> {
    let too_long = |what: &str, text: &str| {
        let n = text.chars().count();
        let reason =
            format!("the {what} has {n} characters, at most {TEXT_CHARS_MAX} are read; shorten it");
        (n > TEXT_CHARS_MAX).then_some(Error::BadRequest(reason))
    };
    if let Some(e) = too_long("caption", &request.caption) {
        return Err(e);
    }
    if let Some(e) = request.cue.as_deref().and_then(|c| too_long("cue", c)) {
        return Err(e);
    }
    if !(0.0..=1.0).contains(&request.explore) {
        return Err(Error::BadRequest(format!(
            "explore: expected 0 to 1, got {}",
            request.explore
        )));
    }
    if !(0.0..=5.0).contains(&request.temperature) {
        return Err(Error::BadRequest(format!(
            "temperature: expected 0 to 5, got {}",
            request.temperature
        )));
    }
    Ok(())
}

/// Replaces a share of the shown likes with attributes from beyond the user's circle: liked by
/// enough users, held by neither the user nor the neighbours.
fn explore(
    snapshot: &Snapshot,
    share: f32,
    asked: &Asked,
    shown: &mut Vec<String>,
    k_threshold: usize,
    random: &mut Philox,
) -> Result<()> {
    let count = (share * shown.len().max(1) as f32).round() as usize;
    if count == 0 {
        return Ok(());
    }
    let mut circle: BTreeSet<String> = asked.likes.iter().chain(&asked.dislikes).cloned().collect();
    for (neighbor, _) in &asked.neighbors {
        circle.extend(
            snapshot
                .edges(neighbor)
                .map_err(store_error)?
                .into_iter()
                .map(|e| e.0),
        );
    }
    let mut beyond: Vec<String> = snapshot
        .attributes()
        .filter(|a| !circle.contains(*a))
        .filter(|a| {
            snapshot
                .degrees(a)
                .is_some_and(|(likes, dislikes)| likes >= k_threshold && likes > dislikes)
        })
        .map(str::to_string)
        .collect();
    random.shuffle(&mut beyond);
    beyond.truncate(count);
    shown.truncate(shown.len().saturating_sub(beyond.len()));
    // What is meant to be new stands first, where it weighs most.
    beyond.append(shown);
    *shown = beyond;
    Ok(())
}

/// Which of the attributes a sentence takes up: by a known wording, or by name.
pub fn named_in(sentence: &str, attributes: &[String]) -> Vec<String> {
    let known: BTreeSet<&str> = vocabulary::mentioned(sentence)
        .iter()
        .map(|a| a.name)
        .collect();
    let spelt = vocabulary::spelt(sentence);
    let by_name = |a: &str| {
        let name = vocabulary::spelt(vocabulary::strip_article(a));
        name.len() > 2 && spelt.contains(&name)
    };
    // Words of people's own stand for what of the vocabulary is in them, too.
    let in_it = |a: &str| {
        let mentioned = vocabulary::mentioned(a);
        mentioned.iter().any(|m| known.contains(m.name))
    };
    let says = |a: &&String| match vocabulary::find(a) {
        Some(_) => known.contains(a.as_str()),
        None => by_name(a) || in_it(a),
    };
    attributes.iter().filter(says).cloned().collect()
}

/// One line, no quotes around it, no control characters, no addresses; the first sentence or
/// two, with a full stop.
pub fn clean(text: &str) -> String {
    let line = text
        .lines()
        .map(str::trim)
        .find(|l| !l.is_empty())
        .unwrap_or("");
    let line: String = line.chars().filter(|c| !c.is_control()).collect();
    let words: Vec<&str> = line.split_whitespace().filter(|w| !is_address(w)).collect();
    let line = words.join(" ");
    let line = line.trim_matches(|c: char| "\"'`*“”".contains(c)).trim();
    // What follows the last whole sentence was cut off by the limit on tokens.
    let ends = |(at, c): (usize, char)| {
        let after = line[at + c.len_utf8()..].chars().next();
        (".!?".contains(c) && after.is_none_or(char::is_whitespace)).then_some(at + c.len_utf8())
    };
    let line = match line.char_indices().filter_map(ends).next_back() {
        Some(end) => &line[..end],
        None => line,
    };
    match line.is_empty() || line.ends_with(['.', '!', '?']) {
        true => line.to_string(),
        false => format!("{}.", line.trim_end_matches([',', ';', ':', ' ', '-'])),
    }
}

fn is_address(word: &str) -> bool {
    let word = word.to_lowercase();
    word.contains("://") || word.starts_with("www.") || word.contains(".com") || word.contains('@')
}

// --------------------------------------------------------------------------- training data

/// Prompts with good instructions for supervised fine-tuning: profiles of 1 to 8 likes with
/// instructions that take them up (now and then a kindred attribute), captions alone with
/// anyone's instructions, and cues that name a kind of edit or a feeling. `n` groups of up to six.
/// Of them a share, 1 - `profiles`, is about nobody: no profile, anyone's instructions, as the
/// paper's fine-tuning has it throughout.
pub fn sft_groups(
    synth: &Synth,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    n: usize,
    profiles: f64,
    seed: u64,
) -> Result<Vec<SftGroup>> {
    let held: BTreeSet<&String> = synth.splits.held_out_users.iter().collect();
    let users: Vec<&SynthUser> = synth
        .users
        .iter()
        .filter(|u| !held.contains(&u.user))
        .collect();
    let mut groups = Vec::with_capacity(n);
    for i in 0..n {
        let mut random = Philox::new(seed, 0x7366_7400_0000 + i as u64);
        let (Some(user), Some(caption)) = (random.choose(&users), random.choose(&synth.captions))
        else {
            return Err(Error::BadRequest(
                "the data set has no users or no captions".into(),
            ));
        };
        let personal = profiles >= 1.0 || f64::from(random.uniform()) < profiles;
        let user = personal.then_some(*user);
        groups.push(sft_group(user, caption, tokenizer, template, &mut random)?);
    }
    Ok(groups)
}

/// Of nobody in particular where there is no user.
fn sft_group(
    user: Option<&SynthUser>,
    caption: &Caption,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    random: &mut Philox,
) -> Result<SftGroup> {
    let stated = |user: &SynthUser, names: &[String]| -> Vec<&'static Attribute> {
        names
            .iter()
            .filter(|n| !user.held_out_likes.contains(n))
            .filter_map(|n| vocabulary::find(n))
            .collect()
    };
    let mut likes = user.map_or_else(Vec::new, |u| stated(u, &u.likes));
    let mut dislikes = user.map_or_else(Vec::new, |u| stated(u, &u.dislikes));
    random.shuffle(&mut likes);
    random.shuffle(&mut dislikes);
    likes.truncate(1 + random.below(8) as usize);
    dislikes.truncate(random.below(5) as usize);
    let object = format!("the {}", caption.object);
    let mode = random.uniform();
    // The rarest attributes are nobody's in particular, but somebody's.
    let rarest = if user.is_some() { 0 } else { 1 };
    let common: Vec<&'static Attribute> = vocabulary::all()
        .iter()
        .filter(|a| a.rarity <= rarest)
        .collect();
    let kindred = |random: &mut Philox| match likes.is_empty() {
        true => random.choose(&common).copied(),
        false => kindred_of(&likes, &dislikes, random),
    };
    let mut cue: Option<String> = None;
    let mut tone: Option<&'static str> = None;
    let mut wanted: Vec<&'static Attribute> = Vec::new();
    if mode < 0.15 || (likes.is_empty() && mode >= 0.38) {
        wanted.extend((0..6).filter_map(|_| random.choose(&common).copied()));
    } else if mode < 0.3 {
        let kind = random
            .choose(&EditType::ALL)
            .copied()
            .unwrap_or(EditType::Color);
        cue = random.choose(cue_words(kind)).map(|c| c.to_string());
        wanted.extend(likes.iter().copied().filter(|a| a.edit_type() == kind));
        for _ in 0..40 {
            if wanted.len() >= 4 {
                break;
            }
            wanted.extend(kindred(random).filter(|a| a.edit_type() == kind));
        }
    } else if mode < 0.38 {
        let cluster = random
            .choose(&Cluster::ALL)
            .copied()
            .unwrap_or(Cluster::Cabin);
        tone = random.choose(grammar::tones(cluster)).copied();
        cue = tone.map(|t| format!("make it {t}"));
        let fits = |a: &&'static Attribute| a.clusters.contains(&cluster);
        wanted.extend(likes.iter().copied().filter(fits));
        let own: Vec<&'static Attribute> = vocabulary::all()
            .iter()
            .filter(|a| fits(a) && a.rarity < 2 && !dislikes.iter().any(|d| d.name == a.name))
            .collect();
        wanted.extend((0..4).filter_map(|_| random.choose(&own).copied()));
    } else {
        wanted.extend(likes.iter().copied().take(5));
        wanted.extend(
            likes
                .iter()
                .copied()
                .take(6usize.saturating_sub(wanted.len()).min(2)),
        );
        wanted.extend(kindred(random));
    }
    wanted.truncate(6);
    if wanted.is_empty() {
        wanted.extend(likes.first());
    }
    if mode < 0.15 {
        likes.clear();
        dislikes.clear();
    }
    let mut completions = Vec::new();
    for attribute in &wanted {
        let second = random
            .choose(&likes)
            .copied()
            .filter(|s| s.edit_type() != attribute.edit_type());
        let second = second.filter(|_| cue.is_none() && random.uniform() < 0.25);
        let both: Vec<&Attribute> = std::iter::once(*attribute).chain(second).collect();
        let feeling = random
            .choose(attribute.clusters)
            .and_then(|c| random.choose(grammar::tones(*c)).copied());
        let feeling = tone.or(feeling.filter(|_| random.uniform() < 0.2));
        completions.push(answer_ids(
            tokenizer,
            &grammar::instruction(random, &object, &both, feeling),
        )?);
    }
    let text = PromptText {
        likes: likes.iter().map(|a| a.name).collect(),
        dislikes: dislikes.iter().map(|a| a.name).collect(),
        caption: &caption.caption,
        cue: cue.as_deref(),
    };
    Ok(SftGroup {
        prompt: prompt_ids(tokenizer, template, &text)?,
        completions,
    })
}

/// An attribute that shares a cluster with the likes and is not among the dislikes.
fn kindred_of(
    likes: &[&'static Attribute],
    dislikes: &[&'static Attribute],
    random: &mut Philox,
) -> Option<&'static Attribute> {
    let mut shared: BTreeMap<Cluster, usize> = BTreeMap::new();
    likes
        .iter()
        .flat_map(|a| a.clusters)
        .for_each(|c| *shared.entry(*c).or_default() += 1);
    let most = shared.values().max().copied()?;
    let clusters: Vec<Cluster> = shared
        .into_iter()
        .filter(|(_, n)| *n == most)
        .map(|(c, _)| c)
        .collect();
    let cluster = random.choose(&clusters)?;
    let pool: Vec<&'static Attribute> = vocabulary::all()
        .iter()
        .filter(|a| a.clusters.contains(cluster) && !dislikes.iter().any(|d| d.name == a.name))
        .collect();
    random.choose(&pool).copied()
}

/// The usual share of preference prompts that show the profile in words.
pub const PROFILES: f64 = 0.5;

/// The training pairs of a data set in tokens, grouped by user, caption and whether the profile
/// is written: a share of the prompts, `profiles` of 0 to 1, show 1 to 8 of the stated likes and
/// up to 4 dislikes; the others show the caption alone, so that the embedding must carry the taste.
pub fn pair_groups(
    synth: &Synth,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    split: Split,
    users: usize,
    profiles: f64,
    seed: u64,
) -> Result<Vec<PairGroup>> {
    let by_name: BTreeMap<&str, (usize, &SynthUser)> = synth
        .users
        .iter()
        .enumerate()
        .map(|(i, u)| (u.user.as_str(), (i, u)))
        .collect();
    let mut sets: BTreeMap<(&str, &str), Vec<&SynthPair>> = BTreeMap::new();
    for pair in synth.pairs.iter().filter(|p| p.split == split) {
        sets.entry((&pair.user, &pair.caption))
            .or_default()
            .push(pair);
    }
    let mut groups = Vec::new();
    for ((name, caption), pairs) in sets {
        let Some((i, user)) = by_name.get(name).filter(|(i, _)| *i < users) else {
            continue;
        };
        let mut random = Philox::new(seed, (*i as u64) << 16 | groups.len() as u64);
        let text = training_text(user, caption, profiles, &mut random);
        let pairs = pairs.iter().filter(|p| user.teaches(p)).map(|p| {
            Ok(TokenPair {
                chosen: answer_ids(tokenizer, &p.chosen)?,
                rejected: answer_ids(tokenizer, &p.rejected)?,
            })
        });
        let pairs: Vec<TokenPair> = pairs.collect::<Result<_>>()?;
        if !pairs.is_empty() {
            groups.push(PairGroup {
                user: name.to_string(),
                prompt: prompt_ids(tokenizer, template, &text)?,
                pairs,
            });
        }
    }
    Ok(groups)
}

/// What a prompt to learn from shows: the caption, and in a share `profiles` of draws the profile.
pub fn training_text<'a>(
    user: &'a SynthUser,
    caption: &'a str,
    profiles: f64,
    random: &mut Philox,
) -> PromptText<'a> {
    let profile = f64::from(random.uniform()) < profiles;
    let (likes, dislikes) = shown_profile(user, random);
    PromptText {
        likes: if profile { likes } else { Vec::new() },
        dislikes: if profile { dislikes } else { Vec::new() },
        caption,
        cue: None,
    }
}

/// Up to 8 stated likes and up to 4 dislikes, drawn.
fn shown_profile<'a>(user: &'a SynthUser, random: &mut Philox) -> (Vec<&'a str>, Vec<&'a str>) {
    let mut likes: Vec<&str> = user.stated_likes().map(String::as_str).collect();
    let mut dislikes: Vec<&str> = user.dislikes.iter().map(String::as_str).collect();
    random.shuffle(&mut likes);
    random.shuffle(&mut dislikes);
    likes.truncate(1 + random.below(8) as usize);
    dislikes.truncate(random.below(5) as usize);
    (likes, dislikes)
}

/// Each user's neighbours in a snapshot, by agreeing attributes (`agreeing`) or Eq. 6 to the
/// letter, with their overlaps, as row numbers of `index`.
pub fn neighbor_rows(
    snapshot: &Snapshot,
    index: &BTreeMap<String, usize>,
    k: usize,
    mode: OverlapMode,
) -> Result<Vec<Vec<(usize, f64)>>> {
    let mut rows = vec![Vec::new(); index.len()];
    for (user, row) in index {
        for (name, overlap) in snapshot.overlaps(user, k, mode).map_err(store_error)? {
            if let Some(v) = index.get(name) {
                rows[*row].push((*v, f64::from(overlap)));
            }
        }
    }
    Ok(rows)
}

/// Reads a data set folder, or makes the default one when none is given.
pub fn read_or_make(folder: Option<&Path>, options: &synth::SynthOptions) -> Result<Synth> {
    match folder {
        Some(folder) => synth::read(folder),
        None => synth::generate(options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_one_clean_sentence() {
        assert_eq!(clean("  \"Add snow.\"\nMore"), "Add snow.");
        assert_eq!(
            clean("Add snow from https://x.y/z now"),
            "Add snow from now."
        );
        assert_eq!(clean("Add snow. And then th"), "Add snow.");
        assert_eq!(clean("Paint it,"), "Paint it.");
        assert_eq!(clean("\u{7}\n\n"), "");
    }

    #[test]
    fn one_change_is_asked_for_unless_more_was_wished_for() {
        let of = |several: Option<bool>, one_change| {
            let wish = several.map(|several| Wish {
                several,
                ..Wish::default()
            });
            let taste = Asked {
                wish,
                ..Asked::default()
            };
            let ends = ends_of(&taste, one_change);
            (
                ends.contains(&"\n".into()),
                ends.contains(&" and add ".into()),
            )
        };
        assert_eq!(of(None, false), (true, false));
        assert_eq!(of(None, true), (true, true));
        assert_eq!(of(Some(false), true), (true, true));
        assert_eq!(of(Some(true), true), (true, false));
        // What is left is a sentence.
        assert_eq!(
            clean("Make the mug out of jade"),
            "Make the mug out of jade."
        );
    }

    #[test]
    fn attributes_are_found_by_wording_and_by_name() {
        let own = [
            "rustic wood".to_string(),
            "Grandma's quilt".into(),
            "falling snow".into(),
        ];
        let found = named_in("Cover it with grandma's quilt over old barn wood.", &own);
        assert_eq!(found, ["rustic wood", "Grandma's quilt"]);
    }

    #[test]
    fn a_like_in_words_of_ones_own_is_found_by_what_it_names() {
        let own = ["Pastel colours".to_string(), "a big grey whale".into()];
        let pastel = named_in("Recolor the chair in soft pastels.", &own);
        assert_eq!(pastel, ["Pastel colours"]);
        let whale = named_in("Put a big gray whale behind the chair.", &own);
        assert_eq!(whale, ["a big grey whale"]);
        assert!(named_in("Recolor the chair in sky blue.", &own).is_empty());
    }

    #[test]
    fn a_dislike_weighs_more_than_nothing_liked() {
        let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let taste = Asked {
            likes: names(&["rustic wood"]),
            suggestions: names(&["exposed beams"]),
            dislikes: names(&["falling snow"]),
            ..Asked::default()
        };
        let new_up_to = |likes: usize| PolicyOptions {
            fill_up_to: likes,
            ..PolicyOptions::default()
        };
        let faults = |words: &str| Faults::of(words, &taste, Some(&new_up_to(0)));
        let none = Faults::default();
        assert!(faults("Make it out of rustic wood.") == none);
        assert!(faults("Add exposed beams above it.") == none);
        assert!(faults("Paint it blue.") > none);
        assert!(faults("Make it out of rustic wood in falling snow.") > faults("Paint it blue."));
        // Who has said one thing wants to see it.
        let four = new_up_to(4);
        let new = |words: &str| Faults::of(words, &taste, Some(&four));
        assert!(new("Make it out of rustic wood.") == none);
        assert!(new("Add exposed beams above it.") > none);
        assert!(new("Add exposed beams above it.") < new("Paint it blue."));
        // Of others it is wanted of some pictures.
        let wanted = Asked {
            said: true,
            likes: taste.likes.clone(),
            suggestions: taste.suggestions.clone(),
            ..Asked::default()
        };
        let of = |words: &str| Faults::of(words, &wanted, Some(&new_up_to(0)));
        assert!(of("Make it out of rustic wood.") == none);
        assert!(of("Add exposed beams above it.") > none);
        assert!(of("Add exposed beams above it.") < of("Paint it blue."));
        // Not where nobody insists, or nothing is known that could be taken up.
        assert!(Faults::of("Paint it blue.", &taste, None) == none);
        assert!(Faults::of("Paint it blue.", &Asked::default(), Some(&four)) == none);
    }

    #[test]
    fn a_wish_is_followed_also_where_it_is_disliked() {
        let understood = |wish| {
            let mut random = Philox::new(0, 0);
            wishes::understand(wish, &Wisher::default(), None, &mut random).unwrap()
        };
        let taste = |wish| Asked {
            likes: vec!["rustic wood".into()],
            dislikes: vec!["falling snow".into()],
            wish: Some(understood(wish)),
            ..Asked::default()
        };
        let all = PolicyOptions::default();
        let faults = |words: &str, wish| Faults::of(words, &taste(wish), Some(&all));
        let none = Faults::default();
        assert!(faults("Let falling snow drift over it.", "with falling snow") == none);
        assert!(faults("Make it out of rustic wood.", "with falling snow").unheeded);
        // Nobody is given what they do not want.
        for wish in ["No falling snow!", "please don't add falling snow"] {
            assert!(faults("Make it out of rustic wood.", wish) == none);
            assert!(faults("Let falling snow drift over it.", wish).dislikes == 1);
        }
        // What we do not know by name cannot be looked for, and nothing else is insisted on.
        assert!(faults("Paint it blue.", "as Grandma would") == none);
        assert!(faults("Let falling snow drift over it.", "as Grandma would") > none);
        assert_eq!(wish_of(&InstructRequest::default()), None);
    }

    #[test]
    fn of_what_follows_a_wish_ones_own_comes_first() {
        let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let taste = Asked {
            likes: names(&["a pine forest", "rustic wood"]),
            dislikes: names(&["falling snow"]),
            wish: Some(Wish {
                words: names(&["a pine forest"]),
                any_of: names(&["a pine forest", "a brick wall"]),
                several: false,
            }),
            ..Asked::default()
        };
        let all = PolicyOptions::default();
        let faults = |words: &str| Faults::of(words, &taste, Some(&all));
        let none = Faults::default();
        assert!(faults("Move it to a pine forest.") == none);
        assert!(faults("Put a brick wall behind it.") > none);
        assert!(faults("Put a brick wall behind it.") < faults("Make it of rustic wood."));
        assert!(faults("Make it of rustic wood.") < faults("Let falling snow drift over it."));
        // Where nobody insists, any of them will do.
        assert!(Faults::of("Put a brick wall behind it.", &taste, None) == none);
    }

    #[test]
    fn a_newcomers_likes_take_turns() {
        let taste = |likes: &[&str]| Asked {
            likes: likes.iter().map(|n| n.to_string()).collect(),
            ..Asked::default()
        };
        let all = PolicyOptions::default();
        let three = taste(&["rustic wood", "falling snow", "navy and white"]);
        let of = |options: &PolicyOptions, taste: &Asked, explore, picture| {
            turn(options, taste, explore, &mut Philox::new(7, picture))
        };
        let firsts: BTreeSet<String> = (0..20)
            .map(|picture| of(&all, &three, 0.0, picture).unwrap().words[0].clone())
            .collect();
        assert_eq!(firsts.len(), 3);
        // Another like than the one whose turn it is beats none, and not that one.
        let wish = of(&all, &three, 0.0, 0);
        let asked = Asked {
            turn: wish.as_ref().map(|wish| wish.words[0].clone()),
            wish: wish.clone(),
            ..taste(&["rustic wood", "falling snow", "navy and white"])
        };
        let said = |name: &str| Faults::of(&format!("Try {name}."), &asked, Some(&all));
        let words = wish.unwrap().words;
        assert!(said(&words[0]) == Faults::default() && said(&words[1]) > said(&words[0]));
        assert!(said("pure white") > said(&words[1]));
        // What can be drawn has the first turns where nothing else shows.
        let drawn = PolicyOptions {
            drawn_only: true,
            ..all.clone()
        };
        let unseen = vocabulary::all().iter().find(|a| a.look.is_none()).unwrap();
        let two = taste(&[unseen.name, "rustic wood"]);
        let first = |picture| of(&drawn, &two, 0.0, picture).unwrap().words[0].clone();
        assert!((0..20).all(|picture| first(picture) == "rustic wood"));
        // Nor does a name that would fill the prompt.
        let long = "x".repeat(61);
        let of_long = of(&all, &taste(&[&long, "rustic wood"]), 0.0, 0).unwrap();
        assert_eq!(of_long.words, ["rustic wood"]);
        assert_eq!(of(&all, &taste(&[&long]), 0.0, 0), None);
        // Nobody has turns who is well known, has said nothing or wants to see something else.
        let many: Vec<&str> = vocabulary::all().iter().take(5).map(|a| a.name).collect();
        assert_eq!(of(&all, &taste(&many), 0.0, 0), None);
        assert_eq!(of(&all, &taste(&[]), 0.0, 0), None);
        assert_eq!(of(&all, &three, 1.0, 0), None);
    }

    #[test]
    fn what_cannot_be_drawn_weighs_least() {
        let looks = |drawn: bool| {
            let mut all = vocabulary::all().iter();
            all.find(|a| a.look.is_some() == drawn).unwrap().name
        };
        let of = |name: &str| format!("Put {name} there.");
        assert!(!undrawn(&of(looks(true))) && undrawn(&of(looks(false))));
        assert!(!undrawn(&format!(
            "{} {}",
            of(looks(true)),
            of(looks(false))
        )));
        // What the vocabulary does not know may be drawn or not.
        assert!(!undrawn("Put Grandma's quilt there."));
        let faults = |impersonal, undrawn| Faults {
            impersonal,
            undrawn,
            ..Faults::default()
        };
        assert!(faults(0, true) > Faults::default() && faults(0, true) < faults(1, false));
        // It counts where the bundle says so and nobody wished for it.
        let all = PolicyOptions::default();
        let drawn = PolicyOptions {
            drawn_only: true,
            ..all.clone()
        };
        let found = |insist| Faults::of(&of(looks(false)), &Asked::default(), insist).undrawn;
        assert!(found(Some(&drawn)) && !found(Some(&all)) && !found(None));
    }

    #[test]
    fn requests_that_cannot_be_met_say_why() {
        let mut request = InstructRequest {
            caption: "x".repeat(401),
            ..InstructRequest::default()
        };
        assert!(
            check_request(&request)
                .unwrap_err()
                .to_string()
                .contains("shorten")
        );
        request.caption = "a cat".into();
        request.explore = 2.0;
        assert!(
            check_request(&request)
                .unwrap_err()
                .to_string()
                .contains("0 to 1")
        );
        request.explore = f32::NAN;
        assert!(check_request(&request).is_err());
    }
}
