//! Writing text with a [`LanguageModel`]: greedy or by chance, alone or in batches.
//!
//! The steps for each token: penalise repetitions, divide by the temperature, keep the top k,
//! keep the fewest whose probabilities reach top p, draw. The draws come from Philox under
//! the caller's seed and the prompt's stream, so a prompt gets the same answer in a batch as
//! alone.

use crate::lm::{self, Cache, LanguageModel, Placement, Session};
use crate::lora::Adapter;
use crate::{Error, Result};
use candle_core::{D, Tensor};
use simpatico_schema::random::Philox;
use std::ops::ControlFlow;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token (the lowest id among equals); 1 draws from the model's
    /// own distribution.
    pub temperature: f32,
    /// Draw among the k likeliest. `None`: all.
    pub top_k: Option<usize>,
    /// Draw among the fewest tokens that hold this probability together. 1: all.
    pub top_p: f32,
    /// Logits of tokens already present are divided by this if positive, else multiplied
    /// (CTRL, arXiv 1909.05858). 1: no penalty.
    pub repetition_penalty: f32,
    /// The seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }

    /// Whether it is the likeliest token, of unchanged logits.
    fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// Temperature 0.7, top p 0.9.
    pub fn lively(seed: u64) -> Self {
        Self {
            temperature: 0.7,
            top_p: 0.9,
            seed,
            ..Self::greedy()
        }
    }
}

/// When an answer ends, and how it is made.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Texts at which the answer ends; they are not part of it.
    pub stop: Vec<String>,
    /// How much more than by itself a soft prompt counts, 1 being by itself: logits are
    /// without + emphasis·(with - without), among the tokens that with it are at least a
    /// tenth as likely as the likeliest (classifier-free guidance, arXiv 2306.17806; the bound,
    /// arXiv 2210.15097). Other than 1, every prompt with a soft prompt is read twice.
    pub emphasis: f32,
}

impl Options {
    /// Greedy, at most `max_tokens`, until the model ends its turn.
    pub fn greedy(max_tokens: usize) -> Self {
        Self {
            max_tokens,
            sampling: Sampling::greedy(),
            stop: Vec::new(),
            emphasis: 1.0,
        }
    }

    /// The same prompt without its soft tokens, if it has to be read too.
    fn without(&self, prompt: &Prompt) -> Option<Prompt> {
        let twice = prompt.soft.is_some() && !prompt.ids.is_empty() && self.emphasis != 1.0;
        twice.then(|| Prompt::tokens(prompt.ids.clone()))
    }

    /// Makes logits with the soft prompt count as much as asked beside those without.
    fn emphasise(&self, with: &mut [f32], without: &[f32]) {
        let most = with.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = most - 10f32.ln();
        for (a, b) in with.iter_mut().zip(without) {
            *a = match *a >= least {
                true => b + self.emphasis * (*a - b),
                false => f32::NEG_INFINITY,
            };
        }
    }
}

/// What to go on from.
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// A soft prompt [n, hidden] at the front of the sequence.
    pub soft: Option<Tensor>,
    /// The tokens after it.
    pub ids: Vec<u32>,
    /// Which stream of random numbers it draws from; give different ones to prompts that
    /// should differ.
    pub stream: u64,
}

impl Prompt {
    /// Tokens alone.
    pub fn tokens(ids: Vec<u32>) -> Self {
        Self {
            ids,
            ..Self::default()
        }
    }

    fn len(&self) -> Result<usize> {
        let soft = self.soft.as_ref().map_or(Ok(0), |s| s.dim(0))?;
        Ok(soft + self.ids.len())
    }

    /// [1, t, hidden]
    fn embedded(&self, model: &LanguageModel) -> Result<Tensor> {
        let soft = match &self.soft {
            Some(soft) => Some(soft.to_dtype(model.decoder.dtype())?.unsqueeze(0)?),
            None => None,
        };
        match (soft, self.ids.is_empty()) {
            (Some(soft), true) => Ok(soft),
            (Some(soft), false) => Ok(Tensor::cat(&[soft, model.embed_tokens(&self.ids)?], 1)?),
            (None, _) => model.embed_tokens(&self.ids),
        }
    }
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The model ended its turn.
    Turn,
    /// A stop text came up.
    Stop,
    /// It was as long as allowed.
    Length,
}

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text, without special tokens and stop texts.
    pub text: String,
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub ended: Ended,
}

/// Writes the answer to one prompt. `piece` gets the text as it grows, in whole characters;
/// when it breaks, the answer is given up with [`Error::Cancelled`], at most one token later.
pub fn generate(
    model: &LanguageModel,
    prompt: &Prompt,
    adapter: Option<&Adapter>,
    options: &Options,
    mut piece: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Answer> {
    check(model, std::slice::from_ref(prompt), options)?;
    let mut writer = Writer::new(model, &prompt.ids, prompt.stream, options);
    let room = prompt.len()? + options.max_tokens;
    let mut state = State::new(model, adapter, room)?;
    let mut logits = state.read(model, &prompt.embedded(model)?)?;
    let mut beside = match options.without(prompt) {
        Some(without) => Some((State::new(model, adapter, room)?, without)),
        None => None,
    };
    if let Some((state, without)) = &mut beside {
        let other = state.read(model, &without.embedded(model)?)?;
        options.emphasise(&mut logits, &other);
    }
    loop {
        let Some(token) = writer.take(&mut logits)? else {
            break;
        };
        if piece(writer.fresh()).is_break() {
            return Err(Error::Cancelled);
        }
        if writer.ended.is_some() {
            break;
        }
        logits = state.next(model, token)?;
        if let Some((state, _)) = &mut beside {
            options.emphasise(&mut logits, &state.next(model, token)?);
        }
    }
    // What was held back because a stop text might have begun.
    if piece(writer.fresh()).is_break() {
        return Err(Error::Cancelled);
    }
    writer.answer()
}

/// Answers to several prompts at once: with quantised weights on a CPU each to the bit what
/// [`generate`] would give it alone, else up to the order of additions. `go_on` is asked
/// before every token.
pub fn generate_batch(
    model: &LanguageModel,
    prompts: &[Prompt],
    adapter: Option<&Adapter>,
    options: &Options,
    mut go_on: impl FnMut() -> ControlFlow<()>,
) -> Result<Vec<Answer>> {
    let mut written = || {
        let mut read = Read::new(model, prompts, adapter, options, &mut go_on)?;
        let all: Vec<(usize, u64)> = prompts.iter().map(|p| p.stream).enumerate().collect();
        read.answer(&all, options, &mut go_on)
    };
    written().map_err(|e| {
        e.during(
            "writing the answers",
            "ask for fewer or shorter ones at once",
        )
    })
}

/// Prompts that were read and can be answered, again and again: on a CPU reading a prompt takes
/// as long as writing a sentence, so who wants another answer should not pay for it again.
pub struct Read<'a> {
    model: &'a LanguageModel,
    adapter: Option<&'a Adapter>,
    /// The prompts, and after them those again without their soft tokens that need it.
    all: Vec<Prompt>,
    lengths: Vec<usize>,
    /// For each prompt the number of the sequence without soft tokens.
    without: Vec<Option<usize>>,
    /// What they were read for.
    emphasis: f32,
    max_tokens: usize,
    /// On a CPU the sequences, and the logits after each prompt.
    session: Option<(Session<'a>, Vec<Vec<f32>>)>,
}

impl<'a> Read<'a> {
    /// Reads prompts that will be answered with at most `options.max_tokens` tokens and
    /// `options.emphasis`.
    pub fn new(
        model: &'a LanguageModel,
        prompts: &[Prompt],
        adapter: Option<&'a Adapter>,
        options: &Options,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Self> {
        check(model, prompts, options)?;
        let mut all = prompts.to_vec();
        let without = prompts.iter().map(|prompt| {
            let number = all.len();
            all.push(options.without(prompt)?);
            Some(number)
        });
        let without = without.collect();
        let lengths = all.iter().map(Prompt::len).collect::<Result<Vec<_>>>()?;
        let rooms: Vec<usize> = lengths.iter().map(|n| n + options.max_tokens).collect();
        let session = match Session::new(&model.decoder, adapter, &rooms)? {
            Some(session) => Some(read_all(session, model, &all, go_on)?),
            None => None,
        };
        Ok(Self {
            model,
            adapter,
            all,
            lengths,
            without,
            emphasis: options.emphasis,
            max_tokens: options.max_tokens,
            session,
        })
    }

    /// An answer to each of these prompts, which are given by number, each at most once, with
    /// the stream that its random numbers come from. `go_on` is asked before every token.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; options that the prompts were not read for.
    pub fn answer(
        &mut self,
        which: &[(usize, u64)],
        options: &Options,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<Answer>> {
        if options.max_tokens > self.max_tokens || options.emphasis != self.emphasis {
            return Err(Error::BadRequest(format!(
                "the prompts were read for at most {} tokens and an emphasis of {}, got {} and {}",
                self.max_tokens, self.emphasis, options.max_tokens, options.emphasis
            )));
        }
        check(self.model, &[], options)?;
        // The prompts' own sequences, then those without soft tokens.
        let mut numbers: Vec<usize> = which.iter().map(|(i, _)| *i).collect();
        let without = which.iter().map(|(i, _)| {
            numbers.push(self.without[*i]?);
            Some(numbers.len() - 1)
        });
        let without: Vec<Option<usize>> = without.collect();
        let model = self.model;
        let writers = which.iter().map(|(i, stream)| {
            let prompt = &self.all[*i];
            Writer::new(model, &prompt.ids, *stream, options)
        });
        let answers = Answers {
            writers: writers.collect(),
            without,
            options,
        };
        match &mut self.session {
            Some((session, logits)) => {
                for i in &numbers {
                    session.rewind(*i, self.lengths[*i]);
                }
                let logits = numbers.iter().map(|i| logits[*i].clone()).collect();
                answers.in_session(session, model, &numbers, logits, go_on)
            }
            None => {
                let prompts: Vec<&Prompt> = numbers.iter().map(|i| &self.all[*i]).collect();
                answers.in_tensors(model, &prompts, self.adapter, go_on)
            }
        }
    }
}

fn unless_cancelled(go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<()> {
    match go_on() {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}

/// Every prompt in a sequence of its own, and the logits after each; what sequences without
/// soft tokens begin with alike is read once, by the first of them.
fn read_all<'a>(
    mut session: Session<'a>,
    model: &LanguageModel,
    all: &[Prompt],
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<(Session<'a>, Vec<Vec<f32>>)> {
    let plain = || (0..all.len()).filter(|i| all[*i].soft.is_none());
    let shared = shared_beginning(plain().map(|i| &all[i].ids));
    let first = plain().next().filter(|_| shared > 0);
    let texts = all.iter().map(|prompt| prompt.embedded(model));
    let mut texts = texts.collect::<Result<Vec<_>>>()?;
    let mut logits: Vec<Vec<f32>> = Vec::with_capacity(all.len());
    // So many at a time that whoever gives up need not wait long.
    let together = 4 * rayon::current_num_threads();
    while logits.len() < all.len() {
        let from = logits.len();
        // The first of those that share reads for all of them.
        let until = match first {
            Some(first) if from <= first => first + 1,
            _ => all.len(),
        };
        let until = until.min(from + together);
        for to in from..until {
            if let Some(first) = first.filter(|f| to > *f && all[to].soft.is_none()) {
                session.share(first, to, shared);
                texts[to] = texts[to].narrow(1, shared, texts[to].dim(1)? - shared)?;
            }
        }
        unless_cancelled(go_on)?;
        logits.extend(session.read_each(from, &texts[from..until])?);
    }
    Ok((session, logits))
}

/// Answers in the making.
struct Answers<'a> {
    writers: Vec<Writer<'a>>,
    /// For each answer the place of its sequence without soft tokens, after all answers' own.
    without: Vec<Option<usize>>,
    options: &'a Options,
}

impl Answers<'_> {
    /// The token that each sequence goes on with, chosen from the logits of all of them (those
    /// used are taken out); `None` where the answer has ended.
    fn choose(&mut self, logits: &mut [Vec<f32>]) -> Result<Vec<Option<u32>>> {
        let mut next = vec![None; logits.len()];
        for (i, writer) in self.writers.iter_mut().enumerate() {
            if writer.ended.is_some() {
                continue;
            }
            let mut own = std::mem::take(&mut logits[i]);
            if let Some(j) = self.without[i] {
                self.options.emphasise(&mut own, &logits[j]);
            }
            let token = writer.take(&mut own)?;
            next[i] = token.filter(|_| writer.ended.is_none());
            if let Some(j) = self.without[i] {
                next[j] = next[i];
            }
        }
        Ok(next)
    }

    /// The same, by a look at the logits where they are, where the likeliest are wanted and nothing
    /// else is: of 150,000 numbers a sequence one comes to the host.
    fn choose_from(&mut self, logits: &Tensor) -> Result<Vec<Option<u32>>> {
        let plain = self.options.sampling.is_greedy() && self.without.iter().all(Option::is_none);
        let likeliest = match plain {
            true => lm::likeliest(logits)?,
            false => None,
        };
        let Some(likeliest) = likeliest else {
            return self.choose(&mut logits.to_vec2::<f32>()?);
        };
        let mut next = vec![None; likeliest.len()];
        for (i, (writer, place)) in self.writers.iter_mut().zip(likeliest).enumerate() {
            if writer.ended.is_some() {
                continue;
            }
            if place.is_nan() {
                return Err(no_number());
            }
            let token = writer.go_on_with(place as u32)?;
            next[i] = token.filter(|_| writer.ended.is_none());
        }
        Ok(next)
    }

    fn finish(self) -> Result<Vec<Answer>> {
        self.writers.into_iter().map(Writer::answer).collect()
    }

    /// Going on in the session's sequences `numbers`; an answer that has ended costs nothing
    /// more.
    fn in_session(
        mut self,
        session: &mut Session,
        model: &LanguageModel,
        numbers: &[usize],
        mut logits: Vec<Vec<f32>>,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<Answer>> {
        loop {
            let (mut places, mut next) = (Vec::new(), Vec::new());
            for (place, token) in self.choose(&mut logits)?.into_iter().enumerate() {
                if let Some(token) = token {
                    places.push(place);
                    next.push((numbers[place], model.embed_tokens(&[token])?));
                }
            }
            if next.is_empty() {
                return self.finish();
            }
            unless_cancelled(go_on)?;
            for (place, read) in places.into_iter().zip(session.read(&next)?) {
                logits[place] = read;
            }
        }
    }

    /// Left-padded rows of one batch, through the decoder itself.
    fn in_tensors(
        mut self,
        model: &LanguageModel,
        prompts: &[&Prompt],
        adapter: Option<&Adapter>,
        go_on: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Vec<Answer>> {
        let lengths = prompts.iter().map(|p| p.len());
        let lengths = lengths.collect::<Result<Vec<_>>>()?;
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let pads: Vec<usize> = lengths.iter().map(|n| longest - n).collect();
        let rows = prompts
            .iter()
            .zip(&pads)
            .map(|(prompt, pad)| Ok(prompt.embedded(model)?.pad_with_zeros(1, *pad, 0)?))
            .collect::<Result<Vec<_>>>()?;
        if rows.is_empty() {
            return self.finish();
        }
        let decoder = &model.decoder;
        let placement = Placement::LeftPadded(pads);
        let mut cache = Cache::new(&decoder.config, longest + self.options.max_tokens);
        let mut x = Tensor::cat(&rows, 0)?;
        loop {
            unless_cancelled(go_on)?;
            let h = decoder.hidden(&x, &placement, adapter, None, Some(&mut cache))?;
            let last = h.narrow(1, h.dim(1)? - 1, 1)?.squeeze(1)?;
            let chosen = self.choose_from(&decoder.logits(&last)?)?;
            if self.writers.iter().all(|w| w.ended.is_some()) {
                return self.finish();
            }
            // A row that has ended goes on with anything; nobody reads it.
            let next: Vec<u32> = chosen.into_iter().map(Option::unwrap_or_default).collect();
            let rows: Vec<&[u32]> = next.chunks(1).collect();
            x = decoder.embed(&rows)?;
        }
    }
}

/// How many tokens all of these begin with, leaving each at least one of its own.
fn shared_beginning<'a>(all: impl Iterator<Item = &'a Vec<u32>> + Clone) -> usize {
    let Some(first) = all.clone().next() else {
        return 0;
    };
    let same = |ids: &Vec<u32>| first.iter().zip(ids).take_while(|(a, b)| a == b).count();
    all.map(|ids| same(ids).min(ids.len() - 1))
        .min()
        .unwrap_or(0)
}

fn check(model: &LanguageModel, prompts: &[Prompt], options: &Options) -> Result<()> {
    let s = &options.sampling;
    // Written so that a NaN fails every comparison and is refused.
    let fits = s.temperature >= 0.0
        && s.temperature.is_finite()
        && s.top_p > 0.0
        && s.top_p <= 1.0
        && s.top_k != Some(0)
        && s.repetition_penalty > 0.0
        && s.repetition_penalty.is_finite();
    if !fits {
        return Err(Error::BadRequest(format!(
            "sampling needs temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 1 and a penalty > 0, got {s:?}"
        )));
    }
    if !(0.0..=10.0).contains(&options.emphasis) {
        return Err(Error::BadRequest(format!(
            "emphasis of the soft prompt: expected 0 to 10, got {}",
            options.emphasis
        )));
    }
    let room = model.decoder.config.positions;
    for prompt in prompts {
        let n = prompt.len()?;
        if n == 0 {
            return Err(Error::BadRequest("an empty prompt".into()));
        }
        if n + options.max_tokens > room {
            return Err(Error::BadRequest(format!(
                "a prompt of {n} tokens and an answer of {} exceed the model's {room}; shorten \
                 the prompt",
                options.max_tokens
            )));
        }
    }
    Ok(())
}

/// The model's memory of one sequence.
enum State<'a> {
    /// On a CPU: without tensors.
    Session(Session<'a>),
    /// Elsewhere.
    Cached(Cache, Option<&'a Adapter>),
}

impl<'a> State<'a> {
    fn new(
        model: &'a LanguageModel,
        adapter: Option<&'a Adapter>,
        capacity: usize,
    ) -> Result<Self> {
        Ok(match Session::new(&model.decoder, adapter, &[capacity])? {
            Some(session) => Self::Session(session),
            None => Self::Cached(Cache::new(&model.decoder.config, capacity), adapter),
        })
    }

    fn next(&mut self, model: &LanguageModel, token: u32) -> Result<Vec<f32>> {
        self.read(model, &model.embed_tokens(&[token])?)
    }

    /// The logits after the last of the embedded tokens.
    fn read(&mut self, model: &LanguageModel, x: &Tensor) -> Result<Vec<f32>> {
        let (cache, adapter) = match self {
            Self::Session(session) => return Ok(session.read(&[(0, x.clone())])?.swap_remove(0)),
            Self::Cached(cache, adapter) => (cache, adapter),
        };
        let decoder = &model.decoder;
        let h = decoder.hidden(x, &Placement::Causal, *adapter, None, Some(cache))?;
        let last = h.narrow(1, h.dim(1)? - 1, 1)?.squeeze(1)?;
        Ok(decoder.logits(&last)?.squeeze(D::Minus2)?.to_vec1()?)
    }
}

/// One answer in the making.
struct Writer<'a> {
    model: &'a LanguageModel,
    options: &'a Options,
    rng: Philox,
    /// Prompt and answer, for the penalty.
    seen: Vec<u32>,
    tokens: Vec<u32>,
    text: String,
    /// How much of the text was handed out.
    told: usize,
    ended: Option<Ended>,
}

impl<'a> Writer<'a> {
    fn new(model: &'a LanguageModel, ids: &[u32], stream: u64, options: &'a Options) -> Self {
        Self {
            model,
            options,
            rng: Philox::new(options.sampling.seed, stream),
            seen: ids.to_vec(),
            tokens: Vec::new(),
            text: String::new(),
            told: 0,
            ended: match options.max_tokens {
                0 => Some(Ended::Length),
                _ => None,
            },
        }
    }

    /// Chooses the next token; `None` when the answer ended instead.
    fn take(&mut self, logits: &mut [f32]) -> Result<Option<u32>> {
        if self.ended.is_some() {
            return Ok(None);
        }
        let token = choose(logits, &self.options.sampling, &self.seen, &mut self.rng)?;
        self.go_on_with(token)
    }

    /// Adds a token; `None` when it ended the answer instead.
    fn go_on_with(&mut self, token: u32) -> Result<Option<u32>> {
        if self.model.stop.contains(&token) {
            self.ended = Some(Ended::Turn);
            return Ok(None);
        }
        self.tokens.push(token);
        self.seen.push(token);
        self.text = self.model.tokenizer.decode(&self.tokens)?;
        if let Some(at) = first_stop(&self.text, &self.options.stop) {
            self.text.truncate(at);
            self.ended = Some(Ended::Stop);
        } else if self.tokens.len() == self.options.max_tokens {
            self.ended = Some(Ended::Length);
        }
        Ok(Some(token))
    }

    /// The text not yet handed out, without what might become a stop text or is half a
    /// character.
    fn fresh(&mut self) -> &str {
        let mut end = self.text.len();
        if self.ended.is_none() {
            end = self.text.trim_end_matches('\u{FFFD}').len();
            for stop in &self.options.stop {
                let held = (1..stop.len())
                    .rev()
                    .filter(|n| stop.is_char_boundary(*n))
                    .find(|n| self.text[..end].ends_with(&stop[..*n]));
                end -= held.unwrap_or(0);
            }
        }
        let from = self.told.min(end);
        self.told = end.max(self.told);
        self.text.get(from..end).unwrap_or("")
    }

    fn answer(self) -> Result<Answer> {
        Ok(Answer {
            text: self.text,
            tokens: self.tokens,
            ended: self.ended.unwrap_or(Ended::Length),
        })
    }
}

fn first_stop(text: &str, stops: &[String]) -> Option<usize> {
    stops
        .iter()
        .filter(|s| !s.is_empty())
        .filter_map(|s| text.find(s.as_str()))
        .min()
}

fn no_number() -> Error {
    Error::bad_model(
        "the language model",
        "gave a logit that is not a number; its weights or adapter are damaged",
    )
}

/// Chooses a token by its logits; they are changed on the way.
fn choose(logits: &mut [f32], s: &Sampling, seen: &[u32], rng: &mut Philox) -> Result<u32> {
    if logits.iter().any(|x| x.is_nan()) {
        return Err(no_number());
    }
    if s.repetition_penalty != 1.0 {
        penalise(logits, s.repetition_penalty, seen);
    }
    if s.temperature == 0.0 {
        let best = logits
            .iter()
            .enumerate()
            .reduce(|a, b| if b.1 > a.1 { b } else { a });
        return Ok(best.map_or(0, |(id, _)| id as u32));
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let falling = |a: &u32, b: &u32| {
        let (x, y) = (logits[*a as usize], logits[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    if let Some(k) = s.top_k.filter(|k| *k < order.len()) {
        order.select_nth_unstable_by(k, falling);
        order.truncate(k);
        order.sort_unstable();
    }
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: &u32| {
        let below = f64::from(logits[*id as usize]) - f64::from(highest);
        (below / f64::from(s.temperature)).exp()
    };
    // In the order of their ids.
    let total: f64 = order.iter().map(weight).sum();
    // Of a vocabulary few tokens are likely: only as many are sorted as the draw can reach.
    let (mut kept, mut n, mut sorted) = (0.0, 0, 0);
    while n < order.len() && (n == 0 || kept < f64::from(s.top_p) * total) {
        if n == sorted {
            let more = (8 * sorted).max(64).min(order.len() - sorted);
            let rest = &mut order[sorted..];
            if more < rest.len() {
                rest.select_nth_unstable_by(more, falling);
            }
            rest[..more].sort_unstable_by(falling);
            sorted += more;
        }
        kept += weight(&order[n]);
        n += 1;
    }
    let mut left = rng.uniform_f64() * kept;
    for id in &order[..n] {
        left -= weight(id);
        if left < 0.0 {
            return Ok(*id);
        }
    }
    Ok(order[n - 1])
}

fn penalise(logits: &mut [f32], penalty: f32, seen: &[u32]) {
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
    }
}

#[cfg(test)]
mod pretrained_tests;
#[cfg(test)]
mod tests;
