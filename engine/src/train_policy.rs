//! Training the policy: supervised fine-tuning, and DPO in three forms.
//!
//! **One prompt, many completions.** All completions of a prompt (chosen and rejected of several
//! pairs) go through the network in one sequence `[soft prompt | prompt | c1 | r1 | c2 | …]`; a
//! mask keeps them from seeing each other and each starts at the position after the prompt, so
//! the numbers are those of separate sequences while the prompt is computed once. Only
//! completion tokens pass the head. Rows for a user and for the user's neighbours differ in the
//! soft prompt alone.
//!
//! **Eq. 7 to the letter** (`Form::Collaborative`, [`NeighborMode::TargetPairs`]): the loss of
//! (u, caption, chosen, rejected) plus λ/Σw · Σ w_uv × the loss of the *same* pair with the
//! policy conditioned on neighbour v. The reference sees no soft prompt, so its log-probabilities
//! belong to the pair alone: they are computed once and kept on disk.
//!
//! What is random (order, dropout, who sees the written profile) is a function of seed and step,
//! so a run that was killed goes on exactly.
//!
//! At every checkpoint the result's files are written too: `adapter/` in PEFT's form and
//! `soft_prompt.safetensors`, both f16. [`runs::run`] does a whole run.
//!
//! Numerics follow TRL 1.16: sums of log-probabilities over completion tokens, means over pairs,
//! the names of the metrics.

pub mod edits;
pub mod runs;

use crate::error::{Error, Result};
use crate::lm::learn::{self, Plain, Said, Tree};
use crate::lm::{Decoder, Dropout, Placement};
use crate::lora::Adapter;
use crate::nn;
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::{Params, load_tensors, save_tensors, write_whole};
use crate::picture::hex;
use crate::plot;
use crate::soft_prompt::SoftPrompt;
use candle_core::{D, DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

// ---------------------------------------------------------------------- log-probabilities

/// One sequence: a prompt with everything that may follow it.
pub struct Row<'a> {
    /// The prompt's tokens; at least one.
    pub prompt: &'a [u32],
    /// What may follow, each with at least one token.
    pub completions: Vec<&'a [u32]>,
}

/// What the policy thinks of completions; one entry each, row by row.
pub struct Scores {
    /// Sums of log-probabilities over a completion's tokens, (n), with gradient.
    pub logps: Tensor,
    /// Tokens of each.
    pub lengths: Vec<usize>,
    /// Entropy summed over a completion's tokens.
    pub entropy: Vec<f64>,
    /// Tokens that were the likeliest.
    pub correct: Vec<usize>,
    /// Mean logit over the vocabulary, summed over the tokens.
    pub logits: Vec<f64>,
    /// Tokens that went through the network.
    pub tokens: usize,
}

const HIDDEN: f32 = -1e30;

/// Scores all completions of all rows in one forward pass. `soft` is (rows, s, hidden).
/// `details` fills entropy, correct and logits. f32 on the CPU without dropout goes through
/// [`learn`], everything else through tensor operations.
pub fn score(
    model: &Decoder,
    adapter: Option<&Adapter>,
    dropout: Option<Dropout>,
    soft: Option<&Tensor>,
    rows: &[Row],
    details: bool,
) -> Result<Scores> {
    let s = match soft {
        Some(t) => t.dim(1)?,
        None => 0,
    };
    let layouts = rows
        .iter()
        .map(|r| Layout::of(r, s))
        .collect::<Result<Vec<_>>>()?;
    let lengths: Vec<usize> = layouts
        .iter()
        .flat_map(|l| l.targets.iter().map(Vec::len))
        .collect();
    let plain = match dropout {
        Some(_) => None,
        None => model.plain()?,
    };
    let (token_logps, said) = match plain {
        Some(plain) => branched(model, plain, adapter, soft, &layouts)?,
        None => padded(model, adapter, dropout, soft, &layouts, s, details)?,
    };
    let n = token_logps.dim(0)?;
    let mut owner = vec![0f32; lengths.len() * n];
    let mut owners = Vec::with_capacity(n);
    for (o, length) in lengths.iter().enumerate() {
        owners.extend(std::iter::repeat_n(o, *length));
    }
    for (i, o) in owners.iter().enumerate() {
        owner[o * n + i] = 1.0;
    }
    let owner = Tensor::from_vec(owner, (lengths.len(), n), model.device())?;
    let mut scores = Scores {
        logps: owner.matmul(&token_logps.unsqueeze(1)?)?.squeeze(1)?,
        entropy: vec![0.0; lengths.len()],
        correct: vec![0; lengths.len()],
        logits: vec![0.0; lengths.len()],
        lengths,
        tokens: layouts.iter().map(|l| l.ids.len() + s).sum(),
    };
    for (owner, said) in owners.into_iter().zip(said) {
        scores.entropy[owner] += f64::from(said.entropy);
        scores.logits[owner] += f64::from(said.mean);
        scores.correct[owner] += usize::from(said.best);
    }
    Ok(scores)
}

/// Log-probabilities of all completions' tokens (n), by [`learn`].
fn branched(
    model: &Decoder,
    plain: &Arc<Plain>,
    adapter: Option<&Adapter>,
    soft: Option<&Tensor>,
    layouts: &[Layout],
) -> Result<(Tensor, Vec<Said>)> {
    let ids: Vec<u32> = layouts.iter().flat_map(|l| l.ids.iter().copied()).collect();
    let words = model.embed(&[&ids])?.squeeze(0)?; // (tokens, hidden)
    let (mut parts, mut trees, mut first) = (Vec::new(), Vec::new(), 0);
    let (mut positions, mut targets, mut begin) = (Vec::new(), Vec::new(), 0);
    let mut counts = Vec::with_capacity(layouts.len());
    for (b, layout) in layouts.iter().enumerate() {
        counts.push(layout.targets.iter().map(Vec::len).sum());
        let mut trunk = layout.prompt;
        if let Some(soft) = soft {
            parts.push(soft.get(b)?);
            trunk += soft.dim(1)?;
        }
        parts.push(words.narrow(0, first, layout.ids.len())?);
        first += layout.ids.len();
        for (at, target) in layout.targets.iter().flatten() {
            positions.push((begin + at) as u32);
            targets.push(*target);
        }
        let branches = layout.spans.iter().map(|s| s.1).collect();
        trees.push(Tree { trunk, branches });
        begin += trees.last().map_or(0, Tree::tokens);
    }
    let x = Tensor::cat(&parts, 0)?;
    let hidden = learn::hidden(plain, &x, &trees, adapter)?;
    let positions = Tensor::new(positions, model.device())?;
    let picked = hidden.index_select(&positions, 0)?;
    learn::log_probabilities(plain, &picked, &targets, &counts)
}

/// The same by tensor operations, rows padded to one length.
fn padded(
    model: &Decoder,
    adapter: Option<&Adapter>,
    dropout: Option<Dropout>,
    soft: Option<&Tensor>,
    layouts: &[Layout],
    s: usize,
    details: bool,
) -> Result<(Tensor, Vec<Said>)> {
    let longest = layouts.iter().map(|l| l.ids.len()).max().unwrap_or(0);
    let padded: Vec<Vec<u32>> = layouts
        .iter()
        .map(|l| {
            let mut ids = l.ids.clone();
            ids.resize(longest, 0);
            ids
        })
        .collect();
    let refs: Vec<&[u32]> = padded.iter().map(Vec::as_slice).collect();
    let mut x = model.embed(&refs)?; // (b, t, hidden)
    if let Some(soft) = soft {
        x = Tensor::cat(&[&soft.to_dtype(x.dtype())?, &x], 1)?;
    }
    let t = s + longest;
    let placement = match layouts.iter().all(|l| l.branches == 1) {
        true => Placement::Causal,
        false => branching(layouts, s, t, model.device())?,
    };
    let hidden = model.hidden(&x, &placement, adapter, dropout, None)?;
    let (mut positions, mut targets) = (Vec::new(), Vec::new());
    for (b, layout) in layouts.iter().enumerate() {
        for (at, target) in layout.targets.iter().flatten() {
            positions.push((b * t + at) as u32);
            targets.push(*target);
        }
    }
    let n = targets.len();
    let positions = Tensor::from_vec(positions, n, model.device())?;
    let width = hidden.dim(2)?;
    let picked = hidden
        .reshape((layouts.len() * t, width))?
        .index_select(&positions, 0)?;
    let logits = model.logits(&picked)?; // (n, vocab)
    let all = nn::log_softmax(&logits)?;
    let index = Tensor::from_vec(targets.clone(), (n, 1), model.device())?;
    let token_logps = all.gather(&index, 1)?.squeeze(1)?;
    if !details {
        return Ok((token_logps, Vec::new()));
    }
    let all = all.detach();
    let entropy = (all.exp()? * &all)?.sum(1)?.neg()?.to_vec1::<f32>()?;
    let means = logits.detach().mean(1)?.to_vec1::<f32>()?;
    let best = all.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let said = entropy.into_iter().zip(means).zip(best).zip(targets);
    let said = said.map(|(((entropy, mean), best), target)| Said {
        entropy,
        mean,
        best: best == target,
    });
    Ok((token_logps, said.collect()))
}

/// Where the tokens of a row lie, without the soft prompt.
struct Layout {
    ids: Vec<u32>,
    prompt: usize,
    branches: usize,
    /// Begin and length of each completion's tokens in `ids`.
    spans: Vec<(usize, usize)>,
    /// For each completion: where each of its tokens is predicted (soft prompt included), and
    /// which token it is.
    targets: Vec<Vec<(usize, u32)>>,
}

impl Layout {
    fn of(row: &Row, s: usize) -> Result<Self> {
        if row.prompt.is_empty() || row.completions.iter().any(|c| c.is_empty()) {
            let text = "a prompt and each completion need at least one token";
            return Err(Error::BadRequest(text.into()));
        }
        let mut ids = row.prompt.to_vec();
        let (mut spans, mut targets) = (Vec::new(), Vec::new());
        for completion in &row.completions {
            let begin = ids.len();
            // The last token is predicted, never seen.
            ids.extend(&completion[..completion.len() - 1]);
            let at = |i: usize| {
                s + if i == 0 {
                    row.prompt.len() - 1
                } else {
                    begin + i - 1
                }
            };
            targets.push(
                completion
                    .iter()
                    .enumerate()
                    .map(|(i, id)| (at(i), *id))
                    .collect(),
            );
            spans.push((begin, completion.len() - 1));
        }
        Ok(Self {
            ids,
            prompt: row.prompt.len(),
            branches: row.completions.len(),
            spans,
            targets,
        })
    }
}

/// Positions and mask: completions see the soft prompt, the prompt and themselves.
fn branching(layouts: &[Layout], s: usize, t: usize, device: &Device) -> Result<Placement> {
    let mut positions = Vec::with_capacity(layouts.len());
    let mut mask = vec![HIDDEN; layouts.len() * t * t];
    for (b, layout) in layouts.iter().enumerate() {
        let trunk = s + layout.prompt;
        let mut place: Vec<u32> = (0..t as u32).collect();
        let mut see = |q: usize, from: usize, to: usize| {
            let start = (b * t + q) * t;
            mask[start + from..start + to].fill(0.0);
        };
        (0..trunk).for_each(|q| see(q, 0, q + 1));
        for (begin, length) in &layout.spans {
            for i in 0..*length {
                let q = s + begin + i;
                place[q] = (trunk + i) as u32;
                see(q, 0, trunk);
                see(q, s + begin, q + 1);
            }
        }
        for q in s + layout.ids.len()..t {
            place[q] = 0;
            see(q, q, q + 1); // padding sees itself, so that no row of scores is empty
        }
        positions.push(place);
    }
    Ok(Placement::Custom {
        positions,
        mask: Tensor::from_vec(mask, (layouts.len(), 1, t, t), device)?,
    })
}

// -------------------------------------------------------------------------------- losses

/// The losses we have, with TRL's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// −log σ(β·Δ): Eq. 1.
    Sigmoid,
    /// (Δ per token − 1/2β)².
    Ipo,
    /// Sigmoid, unbiased where a known share of the pairs is the wrong way round.
    Robust,
    /// Sigmoid of log-ratios per token.
    SigmoidNorm,
}

/// β and what else a loss needs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossOptions {
    /// Which.
    pub loss: Loss,
    /// The temperature of Eq. 1.
    pub beta: f64,
    /// The share of wrong pairs that `Robust` reckons with; below 0.5.
    pub label_smoothing: f64,
}

/// The loss of each pair, (n), from log-ratios policy/reference (n) of both sides.
pub fn pair_losses(
    options: &LossOptions,
    chosen: &Tensor,
    rejected: &Tensor,
    lengths: (&[usize], &[usize]),
) -> Result<Tensor> {
    let per_token = |ratios: &Tensor, lengths: &[usize]| -> Result<Tensor> {
        let lengths: Vec<f32> = lengths.iter().map(|n| *n as f32).collect();
        Ok((ratios / Tensor::from_vec(lengths, ratios.dims(), ratios.device())?)?)
    };
    let (beta, e) = (options.beta, options.label_smoothing);
    Ok(match options.loss {
        Loss::Sigmoid => nn::log_sigmoid(&((chosen - rejected)? * beta)?)?.neg()?,
        Loss::Robust => {
            let z = ((chosen - rejected)? * beta)?;
            let right = (nn::log_sigmoid(&z)? * -(1.0 - e))?;
            let wrong = (nn::log_sigmoid(&z.neg()?)? * e)?;
            ((right + wrong)? / (1.0 - 2.0 * e))?
        }
        Loss::Ipo => {
            let gap = (per_token(chosen, lengths.0)? - per_token(rejected, lengths.1)?)?;
            (gap - 1.0 / (2.0 * beta))?.sqr()?
        }
        Loss::SigmoidNorm => {
            let gap = (per_token(chosen, lengths.0)? - per_token(rejected, lengths.1)?)?;
            nn::log_sigmoid(&(gap * beta)?)?.neg()?
        }
    })
}

// ---------------------------------------------------------------------------------- data

/// A preference pair in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPair {
    /// The preferred completion, end mark included.
    pub chosen: Vec<u32>,
    /// The other.
    pub rejected: Vec<u32>,
}

/// The pairs of one user that share a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairGroup {
    /// Whose.
    pub user: String,
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The pairs.
    pub pairs: Vec<TokenPair>,
}

impl PairGroup {
    fn row(&self) -> Row<'_> {
        Row {
            prompt: &self.prompt,
            completions: self
                .pairs
                .iter()
                .flat_map(|p| [p.chosen.as_slice(), p.rejected.as_slice()])
                .collect(),
        }
    }
}

/// A prompt and good completions of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftGroup {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// What may follow.
    pub completions: Vec<Vec<u32>>,
}

/// A soft prompt to be read while an adapter is fine-tuned; it stays as it is itself.
pub struct Reading<'a> {
    /// The soft prompt.
    pub soft: &'a SoftPrompt,
    /// Users' embeddings (users, d).
    pub embeddings: &'a Tensor,
    /// For each group the row of its user.
    pub users: Vec<u32>,
}

impl Reading<'_> {
    /// The soft tokens before some groups, without a gradient.
    fn tokens(&self, groups: &[usize]) -> Result<Tensor> {
        let users: Vec<u32> = groups.iter().map(|i| self.users[*i]).collect();
        let users = Tensor::new(users, self.embeddings.device())?;
        let embeddings = self.embeddings.index_select(&users, 0)?;
        Ok(self.soft.forward(&embeddings)?.detach())
    }
}

/// Where users' embeddings come from in training.
pub struct Conditioning<'a> {
    /// Row numbers of users.
    pub index: BTreeMap<String, usize>,
    /// The embeddings now, (users, d): a constant, a table that trains, or an encoder's
    /// output with its gradient.
    pub embeddings: Box<dyn Fn() -> Result<Tensor> + 'a>,
    /// What trains in it.
    pub vars: Vec<(String, Var)>,
    /// Each user's neighbours and their weights w_uv, by row number; empty where no
    /// neighbour counts.
    pub neighbors: Vec<Vec<(usize, f64)>>,
}

/// What the neighbours' term of Eq. 7 scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NeighborMode {
    /// The target's pairs, with the policy conditioned on the neighbour: Eq. 7 to the letter.
    TargetPairs,
    /// The neighbour's pairs, with the policy conditioned on the target.
    NeighborPairsTarget,
    /// The neighbour's pairs, with the policy conditioned on the neighbour.
    NeighborPairsNeighbor,
}

/// Which form of DPO.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// No user information beside the text.
    Vanilla,
    /// A learned vector for each user, no graph.
    User,
    /// The user's graph embedding, and the neighbours' term.
    Collaborative {
        /// How many neighbours.
        k: usize,
        /// The weight of their term.
        lambda: f64,
        /// What it scores.
        mode: NeighborMode,
    },
}

// ------------------------------------------------------------------------------- settings

/// The settings of a DPO run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DpoOptions {
    /// Vanilla, user or collaborative.
    pub form: Form,
    /// The loss.
    pub loss: LossOptions,
    /// Weight of the preferred answers' negative log-probability per token; 0: none.
    pub sft_weight: f64,
    /// Weight of reading beside the preferences, per token; 0: none. As many prompts of it as
    /// there are of preferences keep the policy from unlearning what its soft prompt says.
    pub reading_weight: f64,
    /// Peak learning rate of the adapter.
    pub lr_adapter: f64,
    /// Of the soft prompt's maps.
    pub lr_soft: f64,
    /// Of the users' vectors or the graph encoder.
    pub lr_users: f64,
    /// Optimiser steps.
    pub steps: usize,
    /// Prompts (with all their pairs) in a step.
    pub groups: usize,
    /// Steps of warm-up.
    pub warmup: usize,
    /// Rows in one forward pass: memory against speed.
    pub rows_per_pass: usize,
    /// LoRA dropout.
    pub dropout: f32,
    /// The optimiser.
    pub adam: AdamWOptions,
    /// Weight decay.
    pub weight_decay: f64,
    /// The order of the data.
    pub seed: u64,
    /// A checkpoint every so many steps; 0: none.
    pub checkpoint_steps: usize,
}

impl DpoOptions {
    /// Table 12 of the paper; β, which it does not give, is TRL's 0.1.
    pub fn paper(form: Form) -> Self {
        Self {
            form,
            loss: LossOptions {
                loss: Loss::Sigmoid,
                beta: 0.1,
                label_smoothing: 0.0,
            },
            sft_weight: 0.0,
            reading_weight: 0.0,
            lr_adapter: 2e-7,
            lr_soft: 2e-7,
            lr_users: 2e-8,
            steps: 3000,
            groups: 12,
            warmup: 0,
            rows_per_pass: 8,
            dropout: 0.05,
            adam: AdamWOptions::default(),
            weight_decay: 0.01,
            seed: 0,
            checkpoint_steps: 100,
        }
    }

    /// Rates that move the weights, and a little of the preferred answers' likelihood so that
    /// both answers do not become unlikely together.
    pub fn default_for(form: Form) -> Self {
        Self {
            lr_adapter: 1e-4,
            lr_soft: 1e-3,
            lr_users: 1e-4,
            steps: 400,
            groups: 2,
            warmup: 10,
            sft_weight: 0.1,
            dropout: 0.0,
            weight_decay: 0.0,
            checkpoint_steps: 25,
            ..Self::paper(form)
        }
    }

    /// λ 0.15, K 3, the target's own pairs.
    pub fn collaborative() -> Form {
        Form::Collaborative {
            k: 3,
            lambda: 0.15,
            mode: NeighborMode::TargetPairs,
        }
    }
}

/// The settings of supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftOptions {
    /// Peak learning rate.
    pub lr: f64,
    /// Optimiser steps.
    pub steps: usize,
    /// Prompts in a step.
    pub groups: usize,
    /// Steps of warm-up.
    pub warmup: usize,
    /// LoRA dropout.
    pub dropout: f32,
    /// The optimiser.
    pub adam: AdamWOptions,
    /// Weight decay.
    pub weight_decay: f64,
    /// The order of the data.
    pub seed: u64,
    /// A checkpoint every so many steps; 0: none.
    pub checkpoint_steps: usize,
}

impl SftOptions {
    /// The paper's: lr 2e-6, batches of 16.
    pub fn paper() -> Self {
        Self {
            lr: 2e-6,
            steps: 9375, // one epoch over 150,000 pairs
            groups: 16,
            warmup: 0,
            dropout: 0.05,
            adam: AdamWOptions::default(),
            weight_decay: 0.01,
            seed: 0,
            checkpoint_steps: 100,
        }
    }
}

impl Default for SftOptions {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            steps: 300,
            groups: 4,
            warmup: 10,
            dropout: 0.0,
            weight_decay: 0.0,
            checkpoint_steps: 25,
            ..Self::paper()
        }
    }
}

// ------------------------------------------------------------------------ a run's records

/// One line of the metrics file; names as TRL has them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Metrics {
    pub step: usize,
    pub loss: f64,
    pub grad_norm: f64,
    pub learning_rate: f64,
    pub entropy: f64,
    pub num_tokens: u64,
    #[serde(rename = "logits/chosen")]
    pub logits_chosen: f64,
    #[serde(rename = "logits/rejected")]
    pub logits_rejected: f64,
    pub mean_token_accuracy: f64,
    #[serde(rename = "rewards/chosen")]
    pub rewards_chosen: f64,
    #[serde(rename = "rewards/rejected")]
    pub rewards_rejected: f64,
    #[serde(rename = "rewards/accuracies")]
    pub rewards_accuracies: f64,
    #[serde(rename = "rewards/margins")]
    pub rewards_margins: f64,
    #[serde(rename = "logps/chosen")]
    pub logps_chosen: f64,
    #[serde(rename = "logps/rejected")]
    pub logps_rejected: f64,
    /// The neighbours' term before λ.
    pub collaborative_loss: f64,
    /// Tokens through the network a second.
    pub tokens_per_second: f64,
    /// Of a plain matrix product's speed on this device, measured at the start, counting the
    /// layers' constant weights alone (once forwards and once backwards).
    pub mfu: f64,
}

/// Sums over pairs that become [`Metrics`].
#[derive(Default)]
struct Tally {
    pairs: f64,
    chosen_tokens: f64,
    rejected_tokens: f64,
    loss: f64,
    collaborative: f64,
    tokens: u64,
    entropy: f64,
    logits: [f64; 2],
    correct: f64,
    rewards: [f64; 2],
    logps: [f64; 2],
    wins: f64,
}

impl Tally {
    /// Adds the pairs of a row of the target's own conditioning: completions alternate between
    /// chosen and rejected.
    fn add(&mut self, scores: &Scores, logps: &[f32], reference: &[f32], beta: f64) {
        for pair in 0..scores.lengths.len() / 2 {
            let mut reward = [0.0; 2];
            for side in 0..2 {
                let i = 2 * pair + side;
                reward[side] = beta * f64::from(logps[i] - reference[i]);
                self.rewards[side] += reward[side];
                self.logps[side] += f64::from(logps[i]);
                self.logits[side] += scores.logits[i];
                self.entropy += scores.entropy[i];
            }
            self.correct += scores.correct[2 * pair] as f64;
            self.chosen_tokens += scores.lengths[2 * pair] as f64;
            self.rejected_tokens += scores.lengths[2 * pair + 1] as f64;
            self.wins += f64::from(u8::from(reward[0] > reward[1]));
            self.pairs += 1.0;
        }
    }

    fn metrics(&self) -> Metrics {
        let n = self.pairs.max(1.0);
        Metrics {
            loss: self.loss,
            collaborative_loss: self.collaborative,
            entropy: self.entropy / (self.chosen_tokens + self.rejected_tokens).max(1.0),
            num_tokens: self.tokens,
            logits_chosen: self.logits[0] / self.chosen_tokens.max(1.0),
            logits_rejected: self.logits[1] / self.rejected_tokens.max(1.0),
            mean_token_accuracy: self.correct / self.chosen_tokens.max(1.0),
            rewards_chosen: self.rewards[0] / n,
            rewards_rejected: self.rewards[1] / n,
            rewards_accuracies: self.wins / n,
            rewards_margins: (self.rewards[0] - self.rewards[1]) / n,
            logps_chosen: self.logps[0] / n,
            logps_rejected: self.logps[1] / n,
            ..Metrics::default()
        }
    }
}

/// Where a run keeps its things, and who hears of its progress.
pub struct Journal<'a> {
    /// Checkpoint, metrics and plot go here.
    pub folder: PathBuf,
    /// Whether to go on from the folder's checkpoint, if it has one.
    pub resume: bool,
    /// Told of what happens. When it breaks after a step, the run writes a checkpoint and ends
    /// with [`Error::Cancelled`].
    pub progress: Box<dyn FnMut(&Progress) -> ControlFlow<()> + 'a>,
}

/// What a run tells of itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    /// The reference's log-probabilities are computed: prompts done, and all. They are kept on
    /// disk when all are there, so a run cut off here starts with them anew.
    Reference(usize, usize),
    /// A step was made.
    Step {
        /// What it was like.
        metrics: Metrics,
        /// Steps in all.
        steps: usize,
        /// Seconds left at the pace so far.
        seconds_left: f64,
        /// What looks wrong, and what to do.
        warning: Option<&'static str>,
    },
}

#[derive(Serialize, Deserialize)]
struct State {
    step: usize,
    tokens: u64,
    settings: String,
}

/// Everything that trains in a run, in one list.
struct Trained {
    vars: Vec<(String, Var)>,
    optimizer: AdamW,
    schedule: Schedule,
    settings: String,
}

impl Trained {
    fn save(&self, folder: &Path, step: usize, tokens: u64) -> Result<()> {
        let folder = folder.join("checkpoint");
        let weights: Vec<(String, Tensor)> = self
            .vars
            .iter()
            .map(|(n, v)| (n.clone(), v.as_tensor().clone()))
            .collect();
        // Two sets, written in turn: a kill while one is written leaves the other whole.
        let slot = folder.join(if (step / 2).is_multiple_of(2) {
            "a"
        } else {
            "b"
        });
        save_tensors(&slot.join("weights.safetensors"), &weights, &[])?;
        self.optimizer.save(&slot.join("optimizer.safetensors"))?;
        let state = State {
            step,
            tokens,
            settings: self.settings.clone(),
        };
        let named = (
            slot.file_name().map(|n| n.to_string_lossy().into_owned()),
            state,
        );
        let json = serde_json::to_vec(&named)
            .map_err(|e| Error::BadRequest(format!("checkpoint state: {e}")))?;
        write_whole(&folder.join("state.json"), &json)
    }

    /// Goes back to the checkpoint; `None` where there is none.
    fn restore(&mut self, folder: &Path) -> Result<Option<State>> {
        let folder = folder.join("checkpoint");
        let path = folder.join("state.json");
        let Ok(bytes) = std::fs::read(&path) else {
            return Ok(None);
        };
        let file = path.display().to_string();
        let (slot, state): (Option<String>, State) = serde_json::from_slice(&bytes)
            .map_err(|e| Error::bad_model(&file, format!("JSON: {e}")))?;
        if state.settings != self.settings {
            return Err(Error::bad_model(
                file,
                "the checkpoint belongs to a run with other settings or data; choose another \
                 folder, or leave out --resume",
            ));
        }
        let slot = folder.join(slot.unwrap_or_default());
        let device = self
            .vars
            .first()
            .map_or(Device::Cpu, |v| v.1.device().clone());
        let weights = load_tensors(&slot.join("weights.safetensors"), &device)?;
        for (name, var) in &self.vars {
            match weights.get(name) {
                Some(t) if t.dims() == var.dims() => var.set(t)?,
                _ => {
                    return Err(Error::bad_model(
                        &file,
                        format!("the checkpoint lacks {name}"),
                    ));
                }
            }
        }
        self.optimizer.load(&slot.join("optimizer.safetensors"))?;
        Ok(Some(state))
    }
}

/// Appends metrics, watches the rewards, draws the plot.
struct Recorder<'a> {
    journal: Journal<'a>,
    lines: Vec<Metrics>,
    start: Instant,
    first_step: usize,
    total: usize,
    flops_per_token: f64,
    peak_flops: f64,
}

impl<'a> Recorder<'a> {
    fn new(journal: Journal<'a>, model: &Decoder, first_step: usize, total: usize) -> Result<Self> {
        std::fs::create_dir_all(&journal.folder).map_err(Error::io(&journal.folder))?;
        let path = journal.folder.join("metrics.jsonl");
        let mut lines: Vec<Metrics> = match first_step {
            0 => Vec::new(),
            _ => crate::table::read_rows(&path).unwrap_or_default(),
        };
        lines.retain(|m| m.step <= first_step);
        let recorder = Self {
            journal,
            lines,
            start: Instant::now(),
            first_step,
            total,
            flops_per_token: 4.0 * parameters(model),
            peak_flops: matmul_flops(model)?,
        };
        recorder.rewrite()?;
        Ok(recorder)
    }

    fn rewrite(&self) -> Result<()> {
        let mut text = Vec::new();
        for line in &self.lines {
            text.extend(serde_json::to_vec(line).unwrap_or_default());
            text.push(b'\n');
        }
        write_whole(&self.journal.folder.join("metrics.jsonl"), &text)
    }

    fn record(
        &mut self,
        mut metrics: Metrics,
        tokens: u64,
        seconds: f64,
    ) -> Result<ControlFlow<()>> {
        metrics.tokens_per_second = tokens as f64 / seconds.max(1e-9);
        metrics.mfu = metrics.tokens_per_second * self.flops_per_token / self.peak_flops;
        let path = self.journal.folder.join("metrics.jsonl");
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        let mut line = serde_json::to_vec(&metrics).unwrap_or_default();
        line.push(b'\n');
        file.write_all(&line).map_err(Error::io(&path))?;
        let done = (metrics.step - self.first_step).max(1) as f64;
        let left = self.start.elapsed().as_secs_f64() / done * (self.total - metrics.step) as f64;
        self.lines.push(metrics.clone());
        let warning = self.warning();
        Ok((self.journal.progress)(&Progress::Step {
            metrics,
            steps: self.total,
            seconds_left: left,
            warning,
        }))
    }

    /// Chosen answers that keep becoming unlikelier are the usual way DPO goes wrong.
    fn warning(&self) -> Option<&'static str> {
        let n = self.lines.len();
        if n < 20 {
            return None;
        }
        let mean = |lines: &[Metrics]| lines.iter().map(|m| m.rewards_chosen).sum::<f64>() / 10.0;
        let (before, now) = (
            mean(&self.lines[n - 20..n - 10]),
            mean(&self.lines[n - 10..]),
        );
        (now < -0.1 && now < before - 0.02).then_some(
            "rewards of chosen answers are falling: lower the rates, raise beta or the SFT weight",
        )
    }

    fn plot(&self, names: &[(&str, fn(&Metrics) -> f64)], title: &str) -> Result<()> {
        let series = names
            .iter()
            .map(|(name, value)| {
                plot::Series::new(name, self.lines.iter().map(|m| (m.step as f64, value(m))))
            })
            .collect();
        let lines = plot::Lines {
            title: title.into(),
            x: plot::Axis::linear("step"),
            y: plot::Axis::linear("value"),
            series,
        };
        write_whole(
            &self.journal.folder.join("metrics.svg"),
            lines.to_svg().as_bytes(),
        )
    }
}

/// Weights that a token meets: all but the embedding table, the head included.
fn parameters(model: &Decoder) -> f64 {
    let c = &model.config;
    let layer: usize = (0..7)
        .map(|m| {
            let (out, inputs) = Decoder::module_shape(c, m);
            out * inputs
        })
        .sum();
    (c.layers * layer) as f64
}

/// What MFU is a share of: a plain product of 512 × 576 × 1,536 on all cores used.
fn matmul_flops(model: &Decoder) -> Result<f64> {
    if model.plain()?.is_some() {
        return Ok(learn::peak(model.products()) * rayon::current_num_threads() as f64);
    }
    let device = model.device();
    let a = Tensor::ones((512, 576), DType::F32, device)?;
    let b = Tensor::ones((576, 1536), DType::F32, device)?;
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let start = Instant::now();
        a.matmul(&b)?
            .narrow(0, 0, 1)?
            .narrow(1, 0, 1)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * 512.0 * 576.0 * 1536.0 / best)
}

/// Which groups step number `step` takes: whole shuffled passes one after the other, a
/// function of the seed alone.
fn batch(seed: u64, groups: usize, per_step: usize, step: usize) -> Vec<usize> {
    let mut picked = Vec::with_capacity(per_step);
    let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
    for i in step * per_step..(step + 1) * per_step {
        let pass = i / groups;
        if order.0 != pass {
            let mut shuffled: Vec<usize> = (0..groups).collect();
            Philox::new(seed, 0x6f72_6465_7200 + pass as u64).shuffle(&mut shuffled);
            order = (pass, shuffled);
        }
        picked.push(order.1[i % groups]);
    }
    picked
}

fn digest_of(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

fn ids_bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|i| i.to_le_bytes()).collect()
}

// ------------------------------------------------------------------------- a run's course

/// A run under way: what trains, what is written down, and how far it is.
struct Course<'a> {
    trained: Trained,
    recorder: Recorder<'a>,
    tokens: u64,
    first: usize,
    steps: usize,
    checkpoint_steps: usize,
}

/// What a course is begun with.
struct Plan<'p> {
    /// Which training; part of what a checkpoint must agree with.
    kind: &'static str,
    /// All settings as text, for the same reason.
    settings: String,
    prompts: &'p mut dyn Iterator<Item = &'p [u32]>,
    sets: Vec<Group>,
    adam: &'p AdamWOptions,
    warmup: usize,
    steps: usize,
    checkpoint_steps: usize,
}

impl<'a> Course<'a> {
    /// From the start, or from the folder's checkpoint where the journal says so.
    fn begin(model: &Decoder, plan: Plan, mut journal: Journal<'a>) -> Result<Self> {
        let vars: Vec<(String, Var)> = plan.sets.iter().flat_map(|s| s.vars.clone()).collect();
        let mut hash = Vec::new();
        let mut groups = 0;
        for prompt in plan.prompts {
            hash.extend(ids_bytes(prompt));
            groups += 1;
        }
        check_ready(groups, &vars)?;
        let mut trained = Trained {
            optimizer: AdamW::new(plan.sets, plan.adam.clone())?,
            vars,
            schedule: Schedule::Cosine {
                warmup: plan.warmup,
                total: plan.steps,
                floor: 0.05,
            },
            settings: digest_of(&[plan.kind.as_bytes(), plan.settings.as_bytes(), &hash]),
        };
        let state = match journal.resume {
            true => trained.restore(&journal.folder)?,
            false => None,
        };
        let (first, tokens) = state.map_or((0, 0), |s| (s.step, s.tokens));
        journal.resume = first > 0;
        Ok(Self {
            trained,
            recorder: Recorder::new(journal, model, first, plan.steps)?,
            tokens,
            first,
            steps: plan.steps,
            checkpoint_steps: plan.checkpoint_steps,
        })
    }

    /// Moves the weights by the gradients that were added up, writes the step down, and a
    /// checkpoint (with the result's files, by `write`) when it is time or the run is cancelled.
    fn end_step(
        &mut self,
        step: usize,
        (metrics, used): (Metrics, u64),
        (lr, started): (f64, Instant),
        write: impl Fn(&Path) -> Result<()>,
    ) -> Result<()> {
        let factor = self.trained.schedule.factor(step);
        self.tokens += used;
        let metrics = Metrics {
            step: step + 1,
            grad_norm: self.trained.optimizer.step(factor)?,
            learning_rate: lr * factor,
            num_tokens: self.tokens,
            ..metrics
        };
        let seconds = started.elapsed().as_secs_f64();
        let cancelled = self.recorder.record(metrics, used, seconds)?.is_break();
        let due = self.checkpoint_steps > 0 && (step + 1).is_multiple_of(self.checkpoint_steps);
        let done = step + 1 == self.steps;
        if due || cancelled || done {
            let folder = &self.recorder.journal.folder;
            self.trained.save(folder, step + 1, self.tokens)?;
            write(folder)?;
        }
        match cancelled && !done {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }

    /// Draws the plot and gives the last step's metrics.
    fn end(&self, curves: &[(&str, fn(&Metrics) -> f64)], title: &str) -> Result<Metrics> {
        self.recorder.plot(curves, title)?;
        Ok(self.recorder.lines.last().cloned().unwrap_or_default())
    }
}

// ------------------------------------------------------------------------------------ SFT

/// Prompts in one forward pass.
const SFT_ROWS: usize = 8;

/// Trains the adapter on prompts with good completions, behind their users' soft prompts where
/// there is something to be read; returns the last metrics. The loss is the mean over completion
/// tokens.
pub fn train_sft(
    model: &Decoder,
    adapter: &Adapter,
    reading: Option<&Reading>,
    groups: &[SftGroup],
    options: &SftOptions,
    journal: Journal,
) -> Result<Metrics> {
    let vars = adapter
        .vars()
        .iter()
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect();
    let plan = Plan {
        kind: "sft",
        settings: format!("{options:?} {:?}", model.products()),
        prompts: &mut groups.iter().map(|g| g.prompt.as_slice()),
        sets: vec![Group {
            vars,
            lr: options.lr,
            weight_decay: options.weight_decay,
        }],
        adam: &options.adam,
        warmup: options.warmup,
        steps: options.steps,
        checkpoint_steps: options.checkpoint_steps,
    };
    let mut course = Course::begin(model, plan, journal)?;
    for step in course.first..options.steps {
        let start = Instant::now();
        let picked = batch(options.seed, groups.len(), options.groups, step);
        let optimizer = &mut course.trained.optimizer;
        let dropout = |n| dropout(options.dropout, options.seed, step * 1024 + n);
        let batch = sft_batch(
            (model, adapter),
            (groups, reading),
            &picked,
            (1.0, &dropout),
            optimizer,
        )?;
        let metrics = Metrics {
            loss: batch.loss,
            mean_token_accuracy: batch.accuracy,
            ..Metrics::default()
        };
        course.end_step(
            step,
            (metrics, batch.tokens),
            (options.lr, start),
            |folder| adapter.save(&folder.join("adapter"), Some(DType::F16)),
        )?;
    }
    course.end(
        &[
            ("loss", |m| m.loss),
            ("token accuracy", |m| m.mean_token_accuracy),
        ],
        "Supervised fine-tuning",
    )
}

/// What a batch of fine-tuning came to.
struct SftBatch {
    /// The mean over completion tokens, weighted.
    loss: f64,
    /// The share of completion tokens that were likeliest.
    accuracy: f64,
    /// Tokens through the network.
    tokens: u64,
}

/// Adds the gradients of some groups' completions to the optimiser, times `weight`; `dropout`
/// gives that of a forward pass by its number.
fn sft_batch(
    (model, adapter): (&Decoder, &Adapter),
    (groups, reading): (&[SftGroup], Option<&Reading>),
    picked: &[usize],
    (weight, dropout): (f64, &dyn Fn(usize) -> Option<Dropout>),
    optimizer: &mut AdamW,
) -> Result<SftBatch> {
    let completions = picked.iter().flat_map(|i| &groups[*i].completions);
    let count: usize = completions.map(Vec::len).sum();
    let (mut loss_sum, mut correct, mut tokens) = (0.0, 0, 0);
    for (n, some) in picked.chunks(SFT_ROWS).enumerate() {
        let row = |i: &usize| Row {
            prompt: &groups[*i].prompt,
            completions: groups[*i].completions.iter().map(Vec::as_slice).collect(),
        };
        let rows: Vec<Row> = some.iter().map(row).collect();
        let soft = reading.map(|r| r.tokens(some)).transpose()?;
        let scores = score(model, Some(adapter), dropout(n), soft.as_ref(), &rows, true)?;
        let loss = (scores.logps.sum_all()? * (-weight / count as f64))?;
        loss_sum += f64::from(loss.to_scalar::<f32>()?);
        optimizer.accumulate(&loss.backward()?, 1.0)?;
        correct += scores.correct.iter().sum::<usize>();
        tokens += scores.tokens as u64;
    }
    Ok(SftBatch {
        loss: loss_sum,
        accuracy: correct as f64 / count as f64,
        tokens,
    })
}

fn check_ready(groups: usize, vars: &[(String, Var)]) -> Result<()> {
    if groups == 0 {
        return Err(Error::BadRequest(
            "there is nothing to learn from: no pairs were given".into(),
        ));
    }
    if vars.is_empty() {
        return Err(Error::BadRequest(
            "the adapter is constant; make it trainable first".into(),
        ));
    }
    Ok(())
}

fn dropout(p: f32, seed: u64, pass: usize) -> Option<Dropout> {
    (p > 0.0).then_some(Dropout {
        p,
        seed,
        step: pass as u64,
    })
}

// ------------------------------------------------------------------------------------ DPO

/// The policy as it trains.
pub struct Policy<'a> {
    /// The adapter, trainable.
    pub adapter: &'a Adapter,
    /// The soft prompt and its parameters; `None` for the vanilla form.
    pub soft: Option<(&'a SoftPrompt, &'a Params)>,
    /// Where embeddings come from; `None` for the vanilla form.
    pub users: Option<&'a Conditioning<'a>>,
}

/// Reference log-probabilities of all completions of the groups, chosen and rejected in turn.
/// Kept in `cache` under the digest of the tokens and of the reference adapter. `progress` is
/// told of groups done and all; [`Error::Cancelled`] when it breaks.
pub fn reference_logps(
    model: &Decoder,
    reference: Option<&Adapter>,
    groups: &[PairGroup],
    cache: Option<&Path>,
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Vec<Vec<f32>>> {
    let mut hash = Sha256::new();
    if let Some(adapter) = reference {
        for (name, t) in adapter.tensors() {
            hash.update(name.as_bytes());
            let values = t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            values.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
    }
    hash.update(format!("{:?}", model.config));
    for g in groups {
        hash.update(digest_of(&[&ids_bytes(&g.prompt)]));
        for p in &g.pairs {
            hash.update(digest_of(&[&ids_bytes(&p.chosen), &ids_bytes(&p.rejected)]));
        }
    }
    let key = hex(&hash.finalize()[..12]);
    let path = cache.map(|c| c.join(format!("reference-{key}.safetensors")));
    let counts: Vec<usize> = groups.iter().map(|g| 2 * g.pairs.len()).collect();
    if let Some(path) = path.as_ref().filter(|p| p.is_file()) {
        let found = load_tensors(path, &Device::Cpu)?;
        if let Some(t) = found
            .get("logps")
            .filter(|t| t.elem_count() == counts.iter().sum::<usize>())
        {
            let mut flat = t.to_vec1::<f32>()?.into_iter();
            return Ok(counts
                .iter()
                .map(|n| flat.by_ref().take(*n).collect())
                .collect());
        }
    }
    let mut logps = Vec::with_capacity(groups.len());
    for (n, group) in groups.iter().enumerate() {
        let scores = score(model, reference, None, None, &[group.row()], false)?;
        logps.push(scores.logps.detach().to_vec1::<f32>()?);
        if progress(n + 1, groups.len()).is_break() {
            return Err(Error::Cancelled);
        }
    }
    if let Some(path) = path {
        let flat = Tensor::new(logps.concat(), &Device::Cpu)?;
        save_tensors(&path, &[("logps".into(), flat)], &[])?;
    }
    Ok(logps)
}

/// One forward and backward part of a group: whose conditioning, whose pairs, which weight.
struct Part {
    condition: Option<usize>,
    group: usize,
    weight: f64,
    own: bool,
}

/// Gradients and metrics of one batch, before the optimiser moves.
pub struct BatchResult {
    /// The mean loss.
    pub loss: f64,
    tally: Tally,
}

/// Adds the gradients of Eq. 7 (or of its simpler forms) over a batch of groups to the
/// optimiser. The loss is the mean over the batch's pairs.
#[allow(clippy::too_many_arguments)]
pub fn dpo_batch(
    model: &Decoder,
    policy: &Policy,
    groups: &[PairGroup],
    reference: &[Vec<f32>],
    picked: &[usize],
    options: &DpoOptions,
    step: usize,
    optimizer: &mut AdamW,
) -> Result<BatchResult> {
    let pairs: usize = picked.iter().map(|i| groups[*i].pairs.len()).sum();
    let mut tally = Tally::default();
    let mut parts = Vec::new();
    for i in picked {
        parts.extend(parts_of(*i, policy, groups, options, step)?);
    }
    for (n, chunk) in parts.chunks(options.rows_per_pass.max(1)).enumerate() {
        let soft = soft_rows(policy, chunk)?;
        let rows: Vec<Row> = chunk.iter().map(|p| groups[p.group].row()).collect();
        let dropout = dropout(options.dropout, options.seed, step * 1024 + n);
        let own = chunk.iter().any(|p| p.own);
        let scores = score(
            model,
            Some(policy.adapter),
            dropout,
            soft.as_ref(),
            &rows,
            own,
        )?;
        let loss = chunk_loss(
            chunk, &scores, groups, reference, pairs, options, &mut tally,
        )?;
        optimizer.accumulate(&loss.backward()?, 1.0)?;
    }
    Ok(BatchResult {
        loss: tally.loss,
        tally,
    })
}

fn chunk_loss(
    chunk: &[Part],
    scores: &Scores,
    groups: &[PairGroup],
    reference: &[Vec<f32>],
    pairs: usize,
    options: &DpoOptions,
    tally: &mut Tally,
) -> Result<Tensor> {
    let device = scores.logps.device();
    let total = scores.lengths.len();
    let reference: Vec<f32> = chunk
        .iter()
        .flat_map(|p| reference[p.group].clone())
        .collect();
    let refs = Tensor::from_vec(reference.clone(), total, device)?;
    let ratios = (&scores.logps - refs)?.reshape((total / 2, 2))?;
    let chosen = ratios.narrow(1, 0, 1)?.squeeze(1)?;
    let rejected = ratios.narrow(1, 1, 1)?.squeeze(1)?;
    let lengths: (Vec<usize>, Vec<usize>) =
        scores.lengths.chunks_exact(2).map(|c| (c[0], c[1])).unzip();
    let losses = pair_losses(&options.loss, &chosen, &rejected, (&lengths.0, &lengths.1))?;
    let mut weights = Vec::with_capacity(total / 2);
    let mut nll = vec![0f32; total];
    for part in chunk {
        for _ in 0..groups[part.group].pairs.len() {
            if part.own {
                let i = 2 * weights.len();
                nll[i] = (-options.sft_weight / scores.lengths[i] as f64 / pairs as f64) as f32;
            }
            weights.push((part.weight / pairs as f64) as f32);
        }
    }
    let values = losses.detach().to_vec1::<f32>()?;
    let logps = scores.logps.detach().to_vec1::<f32>()?;
    let mut at = 0;
    for part in chunk {
        let n = groups[part.group].pairs.len();
        let sum: f64 = (at..at + n)
            .map(|i| f64::from(values[i]) * f64::from(weights[i]))
            .sum();
        tally.loss += sum;
        if !part.own {
            tally.collaborative += sum;
        }
        at += n;
    }
    tally_own_rows(
        chunk,
        scores,
        &logps,
        &reference,
        groups,
        options.loss.beta,
        tally,
    );
    tally.tokens += scores.tokens as u64;
    let weights = Tensor::from_vec(weights, total / 2, device)?;
    let mut loss = (losses * weights)?.sum_all()?;
    if options.sft_weight > 0.0 && chunk.iter().any(|p| p.own) {
        let term = (&scores.logps * Tensor::from_vec(nll, total, device)?)?.sum_all()?;
        tally.loss += f64::from(term.to_scalar::<f32>()?);
        loss = (loss + term)?;
    }
    Ok(loss)
}

fn tally_own_rows(
    chunk: &[Part],
    scores: &Scores,
    logps: &[f32],
    reference: &[f32],
    groups: &[PairGroup],
    beta: f64,
    tally: &mut Tally,
) {
    let mut at = 0;
    for part in chunk {
        let n = 2 * groups[part.group].pairs.len();
        if part.own {
            let part_scores = Scores {
                logps: scores.logps.detach(),
                lengths: scores.lengths[at..at + n].to_vec(),
                entropy: scores.entropy[at..at + n].to_vec(),
                correct: scores.correct[at..at + n].to_vec(),
                logits: scores.logits[at..at + n].to_vec(),
                tokens: 0,
            };
            tally.add(
                &part_scores,
                &logps[at..at + n],
                &reference[at..at + n],
                beta,
            );
        }
        at += n;
    }
}

fn parts_of(
    group: usize,
    policy: &Policy,
    groups: &[PairGroup],
    options: &DpoOptions,
    step: usize,
) -> Result<Vec<Part>> {
    let Some(users) = policy.users.filter(|_| options.form != Form::Vanilla) else {
        return Ok(vec![Part {
            condition: None,
            group,
            weight: 1.0,
            own: true,
        }]);
    };
    let user = &groups[group].user;
    let Some(u) = users.index.get(user).copied() else {
        return Err(Error::BadRequest(format!(
            "user {user:?} has pairs but no embedding"
        )));
    };
    let mut parts = vec![Part {
        condition: Some(u),
        group,
        weight: 1.0,
        own: true,
    }];
    let Form::Collaborative { k, lambda, mode } = options.form else {
        return Ok(parts);
    };
    let near = users
        .neighbors
        .get(u)
        .map_or(&[][..], |n| &n[..n.len().min(k)]);
    let total: f64 = near.iter().map(|n| n.1).sum();
    if total <= 0.0 {
        return Ok(parts); // nobody near: the term is dropped
    }
    for (v, w) in near {
        let weight = lambda * w / total;
        if mode == NeighborMode::TargetPairs {
            parts.push(Part {
                condition: Some(*v),
                group,
                weight,
                own: false,
            });
            continue;
        }
        let name = users.index.iter().find(|(_, i)| *i == v).map(|(n, _)| n);
        let theirs: Vec<usize> = (0..groups.len())
            .filter(|g| Some(&groups[*g].user) == name)
            .collect();
        let mut random = Philox::new(options.seed, (step as u64) << 20 | *v as u64);
        if let Some(g) = random.choose(&theirs) {
            let scale = groups[group].pairs.len() as f64 / groups[*g].pairs.len() as f64;
            parts.push(Part {
                condition: Some(if mode == NeighborMode::NeighborPairsTarget {
                    u
                } else {
                    *v
                }),
                group: *g,
                weight: weight * scale,
                own: false,
            });
        }
    }
    Ok(parts)
}

fn soft_rows(policy: &Policy, parts: &[Part]) -> Result<Option<Tensor>> {
    let (Some((soft, _)), Some(users)) = (policy.soft, policy.users) else {
        return Ok(None);
    };
    let rows: Vec<u32> = parts
        .iter()
        .filter_map(|p| p.condition)
        .map(|i| i as u32)
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let embeddings = (users.embeddings)()?;
    let rows = Tensor::new(rows, embeddings.device())?;
    Ok(Some(soft.forward(&embeddings.index_select(&rows, 0)?)?))
}

/// Everything that trains in a policy, in its groups.
pub fn dpo_optimizer(policy: &Policy, options: &DpoOptions) -> Result<AdamW> {
    let (groups, _) = dpo_groups(policy, options);
    AdamW::new(groups, options.adam.clone())
}

fn dpo_groups(policy: &Policy, options: &DpoOptions) -> (Vec<Group>, Vec<(String, Var)>) {
    let adapter = policy
        .adapter
        .vars()
        .iter()
        .map(|(n, v)| (n.clone(), v.clone()))
        .collect();
    let mut sets: Vec<(Vec<(String, Var)>, f64)> = vec![(adapter, options.lr_adapter)];
    if let Some((_, params)) = policy.soft.filter(|_| options.form != Form::Vanilla) {
        sets.push((params.vars(), options.lr_soft));
    }
    if let Some(users) = policy.users.filter(|_| options.form != Form::Vanilla) {
        sets.push((users.vars.clone(), options.lr_users));
    }
    let all = sets.iter().flat_map(|s| s.0.clone()).collect();
    let groups = sets.into_iter().map(|(vars, lr)| Group {
        vars,
        lr,
        weight_decay: options.weight_decay,
    });
    (groups.collect(), all)
}

/// Trains adapter, soft prompt and users' vectors on preference pairs; returns the last
/// metrics. `reference` is the adapter of the frozen policy that is compared with; `reading` is
/// gone on with beside the preferences ([`DpoOptions::reading_weight`]).
pub fn train_dpo(
    model: &Decoder,
    policy: &Policy,
    reference: Option<&Adapter>,
    (groups, reading): (&[PairGroup], Option<(&[SftGroup], &Reading)>),
    options: &DpoOptions,
    mut journal: Journal,
) -> Result<Metrics> {
    check_ready(groups.len(), &dpo_groups(policy, options).1)?;
    // Only what the run will meet is worth a reference pass.
    let met: std::collections::BTreeSet<usize> = (0..options.steps)
        .flat_map(|s| batch(options.seed, groups.len(), options.groups, s))
        .collect();
    let whole = match options.form {
        Form::Collaborative { mode, .. } => mode != NeighborMode::TargetPairs,
        _ => false,
    };
    let used: Vec<usize> = (0..groups.len())
        .filter(|i| whole || met.contains(i))
        .collect();
    let used_groups: Vec<PairGroup> = used.iter().map(|i| groups[*i].clone()).collect();
    let cached = reference_logps(
        model,
        reference,
        &used_groups,
        Some(&journal.folder),
        |done, all| (journal.progress)(&Progress::Reference(done, all)),
    )?;
    let mut logps = vec![Vec::new(); groups.len()];
    used.iter().zip(cached).for_each(|(i, l)| logps[*i] = l);
    let plan = Plan {
        kind: "dpo",
        settings: format!("{options:?} {:?}", model.products()),
        prompts: &mut groups.iter().map(|g| g.prompt.as_slice()),
        sets: dpo_groups(policy, options).0,
        adam: &options.adam,
        warmup: options.warmup,
        steps: options.steps,
        checkpoint_steps: options.checkpoint_steps,
    };
    let mut course = Course::begin(model, plan, journal)?;
    for step in course.first..options.steps {
        let start = Instant::now();
        let picked = batch(options.seed, groups.len(), options.groups, step);
        let optimizer = &mut course.trained.optimizer;
        let mut result = dpo_batch(
            model, policy, groups, &logps, &picked, options, step, optimizer,
        )?;
        if let Some((groups, reading)) = reading.filter(|_| options.reading_weight > 0.0) {
            // An order of its own, and forward passes of their own numbers.
            let seed = options.seed ^ 0x7265_6164_696e_6700;
            let picked = batch(seed, groups.len(), options.groups, step);
            let dropout = |n| dropout(options.dropout, seed, step * 1024 + n);
            let read = sft_batch(
                (model, policy.adapter),
                (groups, Some(reading)),
                &picked,
                (options.reading_weight, &dropout),
                optimizer,
            )?;
            result.tally.loss += read.loss;
            result.tally.tokens += read.tokens;
        }
        if step == course.first {
            let missing = course.trained.optimizer.without_gradient();
            if !missing.is_empty() {
                return Err(Error::BadRequest(format!(
                    "no gradient reaches {missing:?}"
                )));
            }
        }
        let tally = (result.tally.metrics(), result.tally.tokens);
        course.end_step(step, tally, (options.lr_adapter, start), |folder| {
            save_policy(policy, folder)
        })?;
    }
    course.end(
        &[
            ("rewards/chosen", |m| m.rewards_chosen),
            ("rewards/rejected", |m| m.rewards_rejected),
            ("rewards/accuracies", |m| m.rewards_accuracies),
            ("loss", |m| m.loss),
        ],
        "Direct preference optimisation",
    )
}

/// The parameter that holds a vector for each user, where there is no graph.
pub const USERS_TABLE: &str = "users";

/// The files of a trained policy: what a bundle holds of it.
fn save_policy(policy: &Policy, folder: &Path) -> Result<()> {
    policy
        .adapter
        .save(&folder.join("adapter"), Some(DType::F16))?;
    if let Some((soft, params)) = policy.soft {
        // Vectors of users' own have no place for anybody else: their mean stands for all.
        let table = policy
            .users
            .and_then(|u| u.vars.iter().find(|(name, _)| name == USERS_TABLE));
        let mut config = soft.config.clone();
        if let Some((_, table)) = table {
            config.everyone = Some(table.as_detached_tensor().mean(0)?.to_vec1()?);
        }
        SoftPrompt::save(
            &config,
            params,
            &folder.join("soft_prompt.safetensors"),
            DType::F16,
        )?;
    }
    Ok(())
}

/// Numbers for tests and reports: what one batch's metrics are.
impl BatchResult {
    /// As a metrics line without step, rates and norm.
    pub fn metrics(&self) -> Metrics {
        self.tally.metrics()
    }
}

#[cfg(test)]
mod tests;
