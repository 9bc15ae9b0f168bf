//! Trains the GraphSAGE encoder on link sign: given the rest of the graph, would this user
//! like or dislike that attribute?
//!
//! Not here: running the encoder on a living graph (`simpatico_storage::sage`, which loads
//! the file written here) and judging it (`eval_links`).
//!
//! # One epoch
//!
//! 1. The training edges are split in two: *message* edges make the graph, *supervised* edges
//!    are to be told. In the default preset the two are disjoint, and each user keeps a share
//!    of edges as messages that is drawn anew, so that the encoder meets users with many, few
//!    and no known edges: those who arrive later look like them. In the paper's preset
//!    every training edge is both, so that an edge helps to tell itself.
//! 2. The batch forward pass embeds all users and attributes (the same numbers as PyG's
//!    `to_hetero(SAGE, aggr="sum")`), a decoder turns pairs into logits.
//! 3. Binary cross-entropy, one AdamW step.
//!
//! Every few epochs the validation edges are told from all training edges; the weights with
//! the best AUC are kept.
//!
//! Random numbers are a function of (seed, epoch), so a run that was cut off and resumed
//! ends with the same weights, bit for bit, as one that was not.
//!
//! # The weights that ship
//!
//! `engine/bundles/default/sage.safetensors` (384 → 256 → 256, f16, 1.8 MB) is made by
//! `cargo run --release -p simpatico-engine --example train_sage -- --model MINILM
//! --epochs 120 --out engine/bundles/default/sage.safetensors`, where MINILM is the folder of
//! all-MiniLM-L6-v2: 120 epochs on the synthetic community of seed 0, minutes on two cores.
//!
//! # Why whitening
//!
//! On that community (2,700 users, 331 attributes, 55,074 edges, seed 0; 10% of the users and
//! 10% of the edges held out) AUC on held-out edges is 0.767 without and 0.875 with whitened
//! text vectors, after 150 and 100 epochs; logistic matrix factorisation has 0.860.

use crate::error::{Error, Result};
use crate::optim::{AdamW, AdamWOptions, Group, Schedule};
use crate::params::{Params, write_whole};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use simpatico_schema::Sign;
use simpatico_schema::random::Philox;
use simpatico_storage::Snapshot;
pub use simpatico_storage::sage::{ENCODER_VERSION, EncoderConfig, Relations};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

// --------------------------------------------------------------------------- the data

/// An edge as numbers into [`LinkData::users`] and [`LinkData::attributes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Index of the user.
    pub user: u32,
    /// Index of the attribute.
    pub attribute: u32,
    /// Like or dislike.
    pub sign: Sign,
}

/// A graph with features, as plain lists.
#[derive(Clone, Debug, Default)]
pub struct LinkData {
    /// Names, sorted.
    pub users: Vec<String>,
    /// Names, sorted.
    pub attributes: Vec<String>,
    /// One text vector per attribute, all of one length.
    pub features: Vec<Vec<f32>>,
    /// All edges, sorted.
    pub links: Vec<Link>,
}

impl LinkData {
    /// Collects edges given by names. Fails where an attribute has no feature or features
    /// differ in length.
    pub fn new(
        edges: impl IntoIterator<Item = (String, String, Sign)>,
        feature: impl Fn(&str) -> Option<Vec<f32>>,
    ) -> Result<Self> {
        let edges: Vec<_> = edges.into_iter().collect();
        let sorted = |names: Vec<&String>| {
            let mut names: Vec<String> = names.into_iter().cloned().collect();
            names.sort_unstable();
            names.dedup();
            names
        };
        let users = sorted(edges.iter().map(|e| &e.0).collect());
        let attributes = sorted(edges.iter().map(|e| &e.1).collect());
        let mut features = Vec::with_capacity(attributes.len());
        for name in &attributes {
            let vector = feature(name).ok_or_else(|| {
                Error::BadRequest(format!(
                    "attribute {name:?} has no text vector; run `simpatico featurize` first"
                ))
            })?;
            let expected = features.first().map_or(vector.len(), Vec::len);
            if vector.len() != expected || vector.is_empty() {
                return Err(Error::BadRequest(format!(
                    "the text vector of {name:?} has {} numbers, those before it {expected}; \
                     make all with one text model",
                    vector.len()
                )));
            }
            features.push(vector);
        }
        let number =
            |names: &[String]| -> HashMap<String, u32> { names.iter().cloned().zip(0..).collect() };
        let (of_user, of_attribute) = (number(&users), number(&attributes));
        let mut links: Vec<_> = edges
            .iter()
            .map(|(user, attribute, sign)| Link {
                user: of_user[user],
                attribute: of_attribute[attribute],
                sign: *sign,
            })
            .collect();
        links.sort_unstable();
        links.dedup_by_key(|link| (link.user, link.attribute));
        Ok(Self {
            users,
            attributes,
            features,
            links,
        })
    }

    /// All edges of a snapshot, with the text vectors the store holds.
    pub fn from_snapshot(snapshot: &Snapshot) -> Result<Self> {
        let mut edges = Vec::new();
        for user in snapshot.users() {
            let own = snapshot
                .edges(user)
                .map_err(|e| Error::BadRequest(e.to_string()))?;
            edges.extend(own.into_iter().map(|(a, sign)| (user.to_string(), a, sign)));
        }
        Self::new(edges, |attribute| snapshot.feature(attribute))
    }

    /// Length of a text vector; 0 without attributes.
    pub fn feature_dim(&self) -> usize {
        self.features.first().map_or(0, Vec::len)
    }

    fn features_tensor(&self, device: &Device) -> Result<Tensor> {
        let shape = (self.attributes.len(), self.feature_dim());
        Ok(Tensor::from_vec(self.features.concat(), shape, device)?)
    }

    /// Learned vectors of the users, (users, dim): zero where there is none.
    fn user_features_tensor(
        &self,
        dim: usize,
        feature: impl Fn(&str) -> Option<Vec<f32>>,
        device: &Device,
    ) -> Result<Tensor> {
        let row = |name: &String| feature(name).unwrap_or_else(|| vec![0.0; dim]);
        let rows: Vec<f32> = self.users.iter().flat_map(row).collect();
        Ok(Tensor::from_vec(rows, (self.users.len(), dim), device)?)
    }
}

/// Which edges are for what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkSplit {
    /// To learn from; also the messages when the other two are told.
    pub train: Vec<Link>,
    /// To choose the best epoch by.
    pub valid: Vec<Link>,
    /// To report.
    pub test: Vec<Link>,
}

impl LinkSplit {
    /// A random split with these shares for training and validation; the rest is for test.
    pub fn random(links: &[Link], train: f64, valid: f64, seed: u64) -> Self {
        let mut links = links.to_vec();
        Philox::new(seed, SPLIT_STREAM).shuffle(&mut links);
        let count = |share: f64| ((links.len() as f64 * share).round() as usize).min(links.len());
        let (first, second) = (count(train), count(train + valid));
        let test = links.split_off(second.max(first));
        let valid = links.split_off(first);
        Self {
            train: links,
            valid,
            test,
        }
    }
}

/// Streams of the seed: epochs take the numbers from 0.
const SPLIT_STREAM: u64 = u64::MAX;

// ------------------------------------------------------------------------ the settings

/// How a pair of embeddings becomes a logit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decoder {
    /// h_u · h_a / √out, plus a linear bias of each and a constant: a sigmoid over affinity.
    DotAndBias,
    /// Two linear layers with a ReLU between them on [h_u, h_a] (the paper's).
    TwoLinear,
}

/// How to train. See [`Self::paper`] and [`Default`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SageTrainOptions {
    /// Whether likes and dislikes are told apart in the graph.
    pub relations: Relations,
    /// Length of the hidden layer.
    pub hidden: usize,
    /// Length of an embedding.
    pub out: usize,
    /// Length of the learned vector of each user. 0: users have none, so new users and old
    /// are treated alike.
    pub in_dim_user: usize,
    /// Share of users whose learned vector is dropped in an epoch.
    pub user_dropout: f64,
    /// How pairs are told.
    pub decoder: Decoder,
    /// Whether an edge that is told is kept out of the messages.
    pub disjoint: bool,
    /// Whether likes and dislikes weigh the same in the loss however many there are.
    pub class_weighted: bool,
    /// Peak learning rate of AdamW.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Whether the rate falls along a cosine after a short warm-up.
    pub cosine: bool,
    /// Whether training sees the text vectors whitened (see `whitening`). The map is folded
    /// into the weights at the end, so the encoder always takes raw vectors.
    pub whiten: bool,
    /// Most epochs; each is one full-batch step.
    pub epochs: usize,
    /// Epochs between looks at the validation edges.
    pub look_every: usize,
    /// Stop after so many epochs without a better validation AUC. `None`: never.
    pub patience: Option<usize>,
    /// Share of edges for training.
    pub train_share: f64,
    /// Share of edges for validation.
    pub valid_share: f64,
    /// Decides every random number.
    pub seed: u64,
}

impl Default for SageTrainOptions {
    /// What we recommend: separated relations, no user vectors, disjoint messages, rates that
    /// learn. Minutes on two cores for 3,000 users.
    fn default() -> Self {
        Self {
            relations: Relations::Separated,
            hidden: 256,
            out: 256,
            in_dim_user: 0,
            user_dropout: 0.0,
            decoder: Decoder::DotAndBias,
            disjoint: true,
            class_weighted: true,
            lr: 3e-3,
            weight_decay: 1e-2,
            cosine: true,
            whiten: true,
            epochs: 300,
            look_every: 5,
            patience: Some(60),
            train_share: 0.8,
            valid_share: 0.1,
            seed: 0,
        }
    }
}

impl SageTrainOptions {
    /// The paper's settings (arXiv 2511.05616, appendix): 60/20/20, Adam 3e-5, 150 epochs,
    /// 4096 → 1024 → 1024, learned user vectors, a decoder of two linear layers. What it does
    /// not say is read at its simplest: one relation, every training edge also a message.
    pub fn paper() -> Self {
        Self {
            relations: Relations::Blind,
            hidden: 1024,
            out: 1024,
            in_dim_user: 4096,
            user_dropout: 0.0,
            decoder: Decoder::TwoLinear,
            disjoint: false,
            class_weighted: false,
            lr: 3e-5,
            weight_decay: 0.0,
            cosine: false,
            whiten: false,
            epochs: 150,
            look_every: 5,
            patience: None,
            train_share: 0.6,
            valid_share: 0.2,
            seed: 0,
        }
    }

    fn check(&self) -> Result<()> {
        let share = |name: &str, value: f64| match (0.0..=1.0).contains(&value) {
            true => Ok(()),
            false => Err(Error::BadRequest(format!(
                "{name} is {value}, expected 0 to 1"
            ))),
        };
        share("train_share", self.train_share)?;
        share("valid_share", self.valid_share)?;
        share(
            "train_share + valid_share",
            self.train_share + self.valid_share,
        )?;
        share("user_dropout", self.user_dropout)?;
        for (name, value) in [
            ("hidden", self.hidden),
            ("out", self.out),
            ("epochs", self.epochs),
            ("look_every", self.look_every),
        ] {
            if value == 0 {
                return Err(Error::BadRequest(format!("{name} must be at least 1")));
            }
        }
        Ok(())
    }

    fn config(&self, in_dim_attribute: usize) -> EncoderConfig {
        EncoderConfig {
            version: ENCODER_VERSION,
            in_dim_attribute,
            in_dim_user: self.in_dim_user,
            hidden: self.hidden,
            out: self.out,
            relations: self.relations,
        }
    }
}

// ------------------------------------------------------------------- means over neighbors

/// For each row, which columns it takes the mean of.
struct Neighbors {
    columns: usize,
    /// Row i has `of[starts[i]..starts[i + 1]]`.
    starts: Vec<u32>,
    of: Vec<u32>,
}

impl Neighbors {
    fn new(rows: usize, columns: usize, pairs: impl Iterator<Item = (u32, u32)> + Clone) -> Self {
        let mut starts = vec![0u32; rows + 1];
        for (row, _) in pairs.clone() {
            starts[row as usize + 1] += 1;
        }
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let (mut next, mut of) = (starts.clone(), vec![0; starts[rows] as usize]);
        for (row, column) in pairs {
            let place = &mut next[row as usize];
            of[*place as usize] = column;
            *place += 1;
        }
        Self {
            columns,
            starts,
            of,
        }
    }

    fn rows(&self) -> usize {
        self.starts.len() - 1
    }

    fn row(&self, row: usize) -> &[u32] {
        &self.of[self.starts[row] as usize..self.starts[row + 1] as usize]
    }

    /// Row i of the answer: `scale_of_row(i)` × the sum over j of `scale_of(j)` × x row j.
    /// Rows run in parallel, each in its own order, so the answer never depends on threads.
    fn weighted(
        &self,
        x: &[f32],
        width: usize,
        scale_of_row: impl Fn(usize) -> f32 + Sync,
        scale_of: impl Fn(usize) -> f32 + Sync,
    ) -> Vec<f32> {
        let mut out = vec![0.0; self.rows() * width];
        out.par_chunks_exact_mut(width)
            .enumerate()
            .for_each(|(row, sum)| {
                for &j in self.row(row) {
                    let scale = scale_of(j as usize);
                    let values = &x[j as usize * width..][..width];
                    sum.iter_mut()
                        .zip(values)
                        .for_each(|(s, v)| *s += scale * v);
                }
                let scale = scale_of_row(row);
                sum.iter_mut().for_each(|s| *s *= scale);
            });
        out
    }

    fn share(&self, row: usize) -> f32 {
        1.0 / self.row(row).len().max(1) as f32
    }
}

/// Both directions of one relation.
#[derive(Clone)]
struct Relation {
    /// Rows users, columns attributes.
    of_users: Arc<Neighbors>,
    /// Rows attributes, columns users.
    of_attributes: Arc<Neighbors>,
}

/// The mean over neighbors, (rows, width) from (columns, width), with its gradient.
/// `back` is the same relation the other way.
fn mean(x: &Tensor, to: &Arc<Neighbors>, back: &Arc<Neighbors>) -> Result<Tensor> {
    let (columns, width) = x.dims2()?;
    debug_assert_eq!(columns, to.columns);
    let device = x.device().clone();
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    let value = to.weighted(&values, width, |row| to.share(row), |_| 1.0);
    let value = Tensor::from_vec(value, (to.rows(), width), &device)?;
    let (to, back) = (to.clone(), back.clone());
    let backward = move |_: &Tensor, _: &Tensor, gradient: &Tensor| {
        let g = gradient.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        let g = back.weighted(&g, width, |_| 1.0, |row| to.share(row));
        let g = Tensor::from_vec(g, (back.rows(), width), gradient.device())?;
        Ok(Some(g))
    };
    Ok(crate::nn::attach1(x, &value, backward)?)
}

/// The message graph of one forward pass.
pub struct MessageGraph {
    relations: Vec<Relation>,
}

impl MessageGraph {
    /// The graph these edges make.
    pub fn new(users: usize, attributes: usize, links: &[Link], kind: Relations) -> Self {
        let relations = (0..kind.names().len()).map(|number| {
            let own = links
                .iter()
                .filter(move |link| kind.of(link.sign) == number);
            let there = own.clone().map(|link| (link.user, link.attribute));
            let back = own.map(|link| (link.attribute, link.user));
            Relation {
                of_users: Arc::new(Neighbors::new(users, attributes, there)),
                of_attributes: Arc::new(Neighbors::new(attributes, users, back)),
            }
        });
        Self {
            relations: relations.collect(),
        }
    }
}

// --------------------------------------------------------------------------- the network

/// The encoder as a differentiable network: PyG's names, PyG's numbers.
pub struct SageNetwork {
    config: EncoderConfig,
    vb: VarBuilder<'static>,
}

impl SageNetwork {
    /// Takes (or makes) the weights under PyG's `to_hetero` names. Linear layers start as
    /// PyG's do: uniform within 1/√inputs.
    pub fn new(config: EncoderConfig, vb: VarBuilder<'static>) -> Self {
        Self { config, vb }
    }

    /// Embeddings of all users (U, out) and all attributes (A, out). `x_users` is
    /// (U, in_dim_user), absent where that is 0; `x_attributes` is (A, in_dim_attribute).
    pub fn forward(
        &self,
        x_users: Option<&Tensor>,
        x_attributes: &Tensor,
        graph: &MessageGraph,
    ) -> Result<(Tensor, Tensor)> {
        let (users, attributes) = self.layer("c1", x_users, Some(x_attributes), graph)?;
        let (users, attributes) = (users.relu()?, attributes.relu()?);
        self.layer("c2", Some(&users), Some(&attributes), graph)
    }

    /// One hetero layer: per relation lin_l(mean of neighbors) + lin_r(own), summed. The
    /// linear map is applied on the side with fewer rows; mean and map commute.
    fn layer(
        &self,
        layer: &str,
        x_users: Option<&Tensor>,
        x_attributes: Option<&Tensor>,
        graph: &MessageGraph,
    ) -> Result<(Tensor, Tensor)> {
        let names = self.config.relations.names();
        let (mut to_users, mut to_attributes) = (None, None);
        for (name, relation) in names.iter().zip(&graph.relations) {
            let Relation {
                of_users,
                of_attributes,
            } = relation;
            let there = format!("{layer}.user__{name}__attr");
            let back = format!("{layer}.attr__rev_{name}__user");
            let term = self.conv(&there, x_users, x_attributes, of_attributes, of_users)?;
            to_attributes = Some(sum(to_attributes, term)?);
            let term = self.conv(&back, x_attributes, x_users, of_users, of_attributes)?;
            to_users = Some(sum(to_users, term)?);
        }
        let none = || Error::BadRequest("an encoder needs at least one relation".into());
        Ok((to_users.ok_or_else(none)?, to_attributes.ok_or_else(none)?))
    }

    /// SAGEConv (PyG `sage_conv.py`): lin_l(mean of source) + lin_r(target).
    fn conv(
        &self,
        name: &str,
        source: Option<&Tensor>,
        target: Option<&Tensor>,
        to: &Arc<Neighbors>,
        back: &Arc<Neighbors>,
    ) -> Result<Tensor> {
        let rows = match name.starts_with("c1") {
            true => self.config.hidden,
            false => self.config.out,
        };
        let fan_in = source.map_or(1, |x| x.dims()[1]);
        let bias = self.weight(&format!("{name}.lin_l.bias"), &[rows], fan_in)?;
        let mut out = bias.broadcast_as((to.rows(), rows))?;
        if let Some(x) = source {
            let w = self.weight(&format!("{name}.lin_l.weight"), &[rows, fan_in], fan_in)?;
            let messages = if to.columns <= to.rows() || rows < fan_in {
                mean(&x.matmul(&w.t()?)?, to, back)?
            } else {
                mean(x, to, back)?.matmul(&w.t()?)?
            };
            out = (out + messages)?;
        }
        if let Some(x) = target {
            let fan_in = x.dims()[1];
            let w = self.weight(&format!("{name}.lin_r.weight"), &[rows, fan_in], fan_in)?;
            out = (out + x.matmul(&w.t()?)?)?;
        }
        Ok(out)
    }

    fn weight(&self, name: &str, shape: &[usize], fan_in: usize) -> Result<Tensor> {
        uniform(&self.vb, name, shape, fan_in)
    }
}

fn uniform(vb: &VarBuilder<'_>, name: &str, shape: &[usize], fan_in: usize) -> Result<Tensor> {
    let bound = 1.0 / (fan_in as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    Ok(vb.get_with_hints(shape, name, init)?)
}

fn sum(so_far: Option<Tensor>, term: Tensor) -> Result<Tensor> {
    Ok(match so_far {
        Some(so_far) => (so_far + term)?,
        None => term,
    })
}

/// The logits of these pairs (n), from all embeddings.
fn decode(
    kind: Decoder,
    vb: &VarBuilder<'_>,
    (users, attributes): &(Tensor, Tensor),
    links: &[Link],
) -> Result<Tensor> {
    let device = users.device();
    let index = |of: fn(&Link) -> u32| {
        let numbers: Vec<u32> = links.iter().map(of).collect();
        Tensor::from_vec(numbers, links.len(), device)
    };
    let (u, a) = (index(|l| l.user)?, index(|l| l.attribute)?);
    let out = users.dims()[1];
    match kind {
        Decoder::DotAndBias => {
            let column = |name: &str| uniform(vb, name, &[out, 1], out);
            let dots = (users.index_select(&u, 0)? * attributes.index_select(&a, 0)?)?;
            let dots = (dots.sum(1)? / (out as f64).sqrt())?;
            let of_user = users.matmul(&column("decoder.user")?)?.squeeze(1)?;
            let of_attribute = attributes
                .matmul(&column("decoder.attribute")?)?
                .squeeze(1)?;
            let constant = vb.get_with_hints(1, "decoder.bias", Init::Const(0.0))?;
            let biases = (of_user.index_select(&u, 0)? + of_attribute.index_select(&a, 0)?)?;
            Ok((dots + biases)?.broadcast_add(&constant)?)
        }
        Decoder::TwoLinear => {
            // The first layer of a concatenation is a sum of two products.
            let half = |name: &str| uniform(vb, name, &[out, out], 2 * out);
            let of_user = users.matmul(&half("decoder.first.user")?.t()?)?;
            let of_attribute = attributes.matmul(&half("decoder.first.attribute")?.t()?)?;
            let bias = uniform(vb, "decoder.first.bias", &[out], 2 * out)?;
            let first = (of_user.index_select(&u, 0)? + of_attribute.index_select(&a, 0)?)?;
            let first = first.broadcast_add(&bias)?.relu()?;
            let last = uniform(vb, "decoder.last.weight", &[1, out], out)?;
            let bias = uniform(vb, "decoder.last.bias", &[1], out)?;
            Ok(first.matmul(&last.t()?)?.squeeze(1)?.broadcast_add(&bias)?)
        }
    }
}

// --------------------------------------------------------------------------- the training

/// What a run tells of itself after each epoch. Single precision, so that it survives JSON
/// to the bit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SageEpoch {
    /// Counted from 0.
    pub epoch: usize,
    /// How many there may be.
    pub epochs: usize,
    /// Mean cross-entropy of the supervised edges.
    pub loss: f32,
    /// Norm of the gradient before clipping.
    pub gradient_norm: f32,
    /// AUC of the validation edges, where this epoch looked at them.
    pub valid_auc: Option<f32>,
}

/// A trained encoder with its decoder.
pub struct TrainedSage {
    /// Its settings.
    pub options: SageTrainOptions,
    /// Its shape.
    pub config: EncoderConfig,
    /// Best AUC of the validation edges; `None` if there were no such edges of both signs.
    pub valid_auc: Option<f32>,
    /// What happened in each epoch.
    pub history: Vec<SageEpoch>,
    params: Params,
    /// Per row of the user table the user's name; `None` for one without training edges,
    /// whose row was never trained.
    users: Vec<Option<String>>,
}

/// The learned user table's name among the parameters.
const USER_TABLE: &str = "user_table";

/// Where a run keeps itself, to be resumed.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// A folder of its own.
    pub folder: PathBuf,
    /// Epochs between two savings.
    pub every: usize,
}

/// What a checkpoint knows besides tensors. Written last, so that what it names is whole.
#[derive(Serialize, Deserialize)]
struct Saved {
    options: SageTrainOptions,
    next_epoch: usize,
    best: Option<(usize, f32)>,
    history: Vec<SageEpoch>,
}

/// Trains on the training edges of the split, chooses by the validation edges.
///
/// With a `checkpoint` whose folder holds an earlier, unfinished run of the same options, goes
/// on from there. `progress` is told of every epoch; on `Break` the run saves itself (if it
/// has a checkpoint) and ends with [`Error::Cancelled`].
pub fn train(
    data: &LinkData,
    split: &LinkSplit,
    options: &SageTrainOptions,
    device: &Device,
    checkpoint: Option<&Checkpoint>,
    mut progress: impl FnMut(&SageEpoch) -> ControlFlow<()>,
) -> Result<TrainedSage> {
    options.check()?;
    if split.train.is_empty() {
        return Err(Error::BadRequest(
            "there are no edges to train on; ingest events first".into(),
        ));
    }
    let mut run = Run::new(data, split, options, device)?;
    if let Some(checkpoint) = checkpoint {
        run.resume(checkpoint)?;
    }
    while run.next_epoch < options.epochs && !run.out_of_patience() {
        let epoch = run.epoch()?;
        let stop = progress(&epoch).is_break();
        run.history.push(epoch);
        run.next_epoch += 1;
        if let Some(checkpoint) = checkpoint
            && (stop || run.next_epoch.is_multiple_of(checkpoint.every.max(1)))
        {
            run.save(checkpoint)?;
        }
        if stop {
            return Err(Error::Cancelled);
        }
    }
    run.finish()
}

struct Run<'a> {
    data: &'a LinkData,
    split: &'a LinkSplit,
    options: &'a SageTrainOptions,
    device: &'a Device,
    params: Params,
    network: SageNetwork,
    optimizer: AdamW,
    /// (A, in_dim_attribute), whitened if the options say so.
    x_attributes: Tensor,
    /// The whitening map (in_dim_attribute, in_dim_attribute).
    whitening: Option<Tensor>,
    next_epoch: usize,
    /// Epoch and AUC of the best look, and the weights it had.
    best: Option<(usize, f32)>,
    best_weights: BTreeMap<String, Tensor>,
    history: Vec<SageEpoch>,
}

impl<'a> Run<'a> {
    fn new(
        data: &'a LinkData,
        split: &'a LinkSplit,
        options: &'a SageTrainOptions,
        device: &'a Device,
    ) -> Result<Self> {
        let params = Params::new(options.seed, device.clone());
        let config = options.config(data.feature_dim());
        let network = SageNetwork::new(config, params.builder(DType::F32));
        let mut x_attributes = data.features_tensor(device)?;
        let whitening = match options.whiten {
            true => Some(whitening(&x_attributes)?),
            false => None,
        };
        if let Some(map) = &whitening {
            x_attributes = x_attributes.matmul(map)?;
        }
        let mut run = Self {
            data,
            split,
            options,
            device,
            params,
            network,
            optimizer: AdamW::new(Vec::new(), AdamWOptions::default())?,
            x_attributes,
            whitening,
            next_epoch: 0,
            best: None,
            best_weights: BTreeMap::new(),
            history: Vec::new(),
        };
        // One pass makes all parameters, so that the optimizer can be given them.
        let graph = run.graph(&[]);
        run.logits(&graph, &split.train[..1], None)?;
        let group = Group {
            vars: run.params.vars(),
            lr: options.lr,
            weight_decay: options.weight_decay,
        };
        run.optimizer = AdamW::new(vec![group], AdamWOptions::default())?;
        Ok(run)
    }

    fn graph(&self, links: &[Link]) -> MessageGraph {
        let (users, attributes) = (self.data.users.len(), self.data.attributes.len());
        MessageGraph::new(users, attributes, links, self.options.relations)
    }

    fn logits(
        &self,
        graph: &MessageGraph,
        links: &[Link],
        drop: Option<&mut Philox>,
    ) -> Result<Tensor> {
        let x_users = self.user_features(drop)?;
        let both = self
            .network
            .forward(x_users.as_ref(), &self.x_attributes, graph)?;
        let vb = self.params.builder(DType::F32);
        decode(self.options.decoder, &vb, &both, links)
    }

    /// The learned table (U, in_dim_user), some rows dropped to zero while training.
    fn user_features(&self, drop: Option<&mut Philox>) -> Result<Option<Tensor>> {
        let width = self.options.in_dim_user;
        if width == 0 {
            return Ok(None);
        }
        let users = self.data.users.len();
        let init = Init::Randn {
            mean: 0.0,
            stdev: 1.0 / (width as f64).sqrt(),
        };
        let vb = self.params.builder(DType::F32);
        let table = vb.get_with_hints((users, width), USER_TABLE, init)?;
        let share = self.options.user_dropout;
        let Some(random) = drop.filter(|_| share > 0.0) else {
            return Ok(Some(table));
        };
        let keep: Vec<f32> = (0..users)
            .map(|_| f32::from(random.uniform_f64() >= share))
            .collect();
        let keep = Tensor::from_vec(keep, (users, 1), self.device)?;
        Ok(Some(table.broadcast_mul(&keep)?))
    }

    /// One step, and perhaps a look at the validation edges.
    fn epoch(&mut self) -> Result<SageEpoch> {
        let epoch = self.next_epoch;
        let mut random = Philox::new(self.options.seed, epoch as u64);
        let (messages, told) = match self.options.disjoint {
            true => disjoint(&self.split.train, self.data.users.len(), &mut random),
            false => (self.split.train.clone(), self.split.train.clone()),
        };
        let graph = self.graph(&messages);
        let logits = self.logits(&graph, &told, Some(&mut random))?;
        let loss = cross_entropy(&logits, &told, self.options.class_weighted)?;
        self.optimizer.accumulate(&loss.backward()?, 1.0)?;
        let gradient_norm = self.optimizer.step(self.rate(epoch))?;
        let look = (epoch + 1).is_multiple_of(self.options.look_every);
        let last = epoch + 1 == self.options.epochs;
        let valid_auc = if look || last {
            self.look(epoch)?
        } else {
            None
        };
        Ok(SageEpoch {
            epoch,
            epochs: self.options.epochs,
            loss: loss.to_scalar()?,
            gradient_norm: gradient_norm as f32,
            valid_auc,
        })
    }

    fn rate(&self, epoch: usize) -> f64 {
        let schedule = match self.options.cosine {
            true => Schedule::Cosine {
                warmup: (self.options.epochs / 20).max(1),
                total: self.options.epochs,
                floor: 0.02,
            },
            false => Schedule::Constant,
        };
        schedule.factor(epoch)
    }

    fn look(&mut self, epoch: usize) -> Result<Option<f32>> {
        if self.split.valid.is_empty() {
            return Ok(None);
        }
        let graph = self.graph(&self.split.train);
        let logits = self.logits(&graph, &self.split.valid, None)?;
        let scores = logits.to_vec1::<f32>()?;
        let auc = crate::eval_links::auc(&scores, &signs(&self.split.valid)).map(|auc| auc as f32);
        if let Some(auc) = auc
            && self.best.is_none_or(|(_, best)| auc > best)
        {
            self.best = Some((epoch, auc));
            self.best_weights = self.copies()?;
        }
        Ok(auc)
    }

    fn copies(&self) -> Result<BTreeMap<String, Tensor>> {
        let vars = self.params.vars().into_iter();
        vars.map(|(name, var)| Ok((name, var.as_tensor().copy()?.detach())))
            .collect()
    }

    fn out_of_patience(&self) -> bool {
        match (self.options.patience, self.best) {
            (Some(patience), Some((epoch, _))) => self.next_epoch > epoch + patience,
            _ => false,
        }
    }

    fn finish(self) -> Result<TrainedSage> {
        for (name, var) in self.params.vars() {
            if let Some(best) = self.best_weights.get(&name) {
                var.set(best)?;
            }
            if let Some(map) = &self.whitening
                && takes_attribute_features(&name)
            {
                // W (T x) = (W T) x, and T is symmetric.
                var.set(&var.as_tensor().matmul(map)?)?;
            }
        }
        Ok(TrainedSage {
            options: self.options.clone(),
            config: self.options.config(self.data.feature_dim()),
            valid_auc: self.best.map(|(_, auc)| auc),
            users: self.trained_users(),
            history: self.history,
            params: self.params,
        })
    }

    fn trained_users(&self) -> Vec<Option<String>> {
        let mut users = vec![None; self.data.users.len()];
        for link in &self.split.train {
            let user = link.user as usize;
            users[user] = Some(self.data.users[user].clone());
        }
        users
    }

    fn save(&self, checkpoint: &Checkpoint) -> Result<()> {
        let folder = &checkpoint.folder;
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let file = |kind: &str, epoch| folder.join(format!("{kind}-{epoch}.safetensors"));
        self.params
            .save(&file("weights", self.next_epoch), DType::F32, &[])?;
        self.optimizer.save(&file("optimizer", self.next_epoch))?;
        let best: Vec<_> = self.best_weights.clone().into_iter().collect();
        crate::params::save_tensors(&file("best", self.next_epoch), &best, &[])?;
        let saved = Saved {
            options: self.options.clone(),
            next_epoch: self.next_epoch,
            best: self.best,
            history: self.history.clone(),
        };
        let text = serde_json::to_vec_pretty(&saved)
            .map_err(|e| Error::BadRequest(format!("the checkpoint cannot be written: {e}")))?;
        write_whole(&folder.join("run.json"), &text)?;
        remove_other_epochs(folder, self.next_epoch);
        Ok(())
    }

    fn resume(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let folder = &checkpoint.folder;
        let path = folder.join("run.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let name = path.display().to_string();
        let saved: Saved =
            serde_json::from_slice(&text).map_err(|e| Error::bad_model(&name, e.to_string()))?;
        if saved.options != *self.options {
            return Err(Error::BadRequest(format!(
                "{name} is of a run with other settings; take another folder, or its settings"
            )));
        }
        let file = |kind: &str| folder.join(format!("{kind}-{}.safetensors", saved.next_epoch));
        self.params.load(&file("weights"))?;
        self.optimizer.load(&file("optimizer"))?;
        self.best_weights = crate::params::load_tensors(&file("best"), self.device)?;
        self.next_epoch = saved.next_epoch;
        self.best = saved.best;
        self.history = saved.history;
        Ok(())
    }
}

/// Whether this weight is multiplied with attributes' features.
fn takes_attribute_features(name: &str) -> bool {
    let parts = (name.starts_with("c1.user__"), name.starts_with("c1.attr__"));
    match parts {
        (true, _) => name.ends_with("lin_r.weight"),
        (_, true) => name.ends_with("lin_l.weight"),
        _ => false,
    }
}

/// T = (M + εI)^(-1/2), where M is the second moment of the rows of `x` and ε a hundredth of
/// its mean eigenvalue: rows of x T differ about equally in all directions.
///
/// Text vectors of short phrases share most of their length and differ in directions of small
/// variance; gradient descent finds those late. Whitened, it finds them at once, and since the
/// map is linear it disappears into the first layer's weights. By the Newton-Schulz iteration
/// (Higham, "Functions of Matrices", eq. 6.35), which takes only products.
fn whitening(x: &Tensor) -> Result<Tensor> {
    const STEPS: usize = 24;
    let (rows, dim) = x.dims2()?;
    let moment = (x.t()?.matmul(x)? / rows.max(1) as f64)?;
    let trace = f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?) / rows.max(1) as f64;
    if trace <= 0.0 {
        return Ok(Tensor::eye(dim, DType::F32, x.device())?);
    }
    let identity = Tensor::eye(dim, DType::F32, x.device())?;
    let ridged = (moment + (&identity * (0.01 * trace / dim as f64))?)?;
    // The norm bounds the greatest eigenvalue, so those of `root` start within (0, 1].
    let norm = f64::from(ridged.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    let (mut root, mut inverse) = ((ridged / norm)?, identity.clone());
    for _ in 0..STEPS {
        let correction = ((&identity * 3.0)? - inverse.matmul(&root)?)?.affine(0.5, 0.0)?;
        root = root.matmul(&correction)?;
        inverse = correction.matmul(&inverse)?;
    }
    let map = (inverse / norm.sqrt())?;
    // Symmetric but for rounding; make it so.
    Ok(((&map + map.t()?)? / 2.0)?)
}

fn remove_other_epochs(folder: &Path, epoch: usize) {
    let current = format!("-{epoch}.safetensors");
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default();
        let ours = ["weights-", "optimizer-", "best-"]
            .iter()
            .any(|k| name.starts_with(k));
        if ours && name.ends_with(".safetensors") && !name.ends_with(&current) {
            // A leftover only takes space; the next saving tries again.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Splits the edges in messages and told ones. Each user keeps a share of its edges that is
/// drawn uniformly, so users of every degree are met.
fn disjoint(links: &[Link], users: usize, random: &mut Philox) -> (Vec<Link>, Vec<Link>) {
    let shares: Vec<f32> = (0..users).map(|_| random.uniform()).collect();
    links
        .iter()
        .partition(|link| random.uniform() < shares[link.user as usize])
}

fn signs(links: &[Link]) -> Vec<bool> {
    links.iter().map(|link| link.sign == Sign::Like).collect()
}

/// Mean binary cross-entropy; class-weighted, both signs weigh half in all.
fn cross_entropy(logits: &Tensor, links: &[Link], class_weighted: bool) -> Result<Tensor> {
    let likes = links.iter().filter(|l| l.sign == Sign::Like).count();
    let count = |sign: Sign| match sign {
        Sign::Like => likes,
        Sign::Dislike => links.len() - likes,
    };
    let both = likes > 0 && likes < links.len();
    let weight = |link: &Link| match class_weighted && both {
        true => 0.5 / count(link.sign) as f32,
        false => 1.0 / links.len() as f32,
    };
    let weights: Vec<f32> = links.iter().map(weight).collect();
    // log σ(z) of a like, log σ(-z) of a dislike.
    let direction = |link: &Link| {
        if link.sign == Sign::Like {
            1.0f32
        } else {
            -1.0
        }
    };
    let directions: Vec<f32> = links.iter().map(direction).collect();
    let tensor = |v: Vec<f32>| Tensor::from_vec(v, links.len(), logits.device());
    let told = crate::nn::log_sigmoid(&(logits * tensor(directions)?)?)?;
    Ok((told * tensor(weights)?)?.sum_all()?.neg()?)
}

// ---------------------------------------------------------------------------- the result

impl TrainedSage {
    /// The logits of pairs, told from these message edges. Users are numbered as in `data`;
    /// those without a learned vector (all, where `in_dim_user` is 0; else users the
    /// training did not know) count as new.
    pub fn scores(&self, data: &LinkData, messages: &[Link], told: &[Link]) -> Result<Vec<f32>> {
        if told.is_empty() {
            return Ok(Vec::new());
        }
        let graph = MessageGraph::new(
            data.users.len(),
            data.attributes.len(),
            messages,
            self.config.relations,
        );
        let both = self.embed(data, &graph)?;
        let vb = self.params.builder(DType::F32);
        let logits = decode(self.options.decoder, &vb, &both, told)?;
        Ok(logits.to_vec1::<f32>()?)
    }

    /// Embeddings of all users (U, out) and attributes (A, out) of `data`, by the batch
    /// forward pass, without a gradient.
    pub fn embed(&self, data: &LinkData, graph: &MessageGraph) -> Result<(Tensor, Tensor)> {
        let vb = self.detached()?;
        let device = vb.device().clone();
        let network = SageNetwork::new(self.config.clone(), vb);
        let x_users = match self.user_features() {
            None => None,
            Some(learned) => {
                let learned: HashMap<_, _> = learned.into_iter().collect();
                let own = |name: &str| learned.get(name).cloned();
                Some(data.user_features_tensor(self.config.in_dim_user, own, &device)?)
            }
        };
        let x_attributes = data.features_tensor(&device)?;
        network.forward(x_users.as_ref(), &x_attributes, graph)
    }

    /// The weights as constants.
    fn detached(&self) -> Result<VarBuilder<'static>> {
        let vars = self.params.vars();
        let device = vars
            .first()
            .map_or(Device::Cpu, |(_, v)| v.device().clone());
        let tensors = vars
            .into_iter()
            .map(|(n, v): (String, Var)| (n, v.as_detached_tensor()));
        Ok(VarBuilder::from_tensors(
            tensors.collect(),
            DType::F32,
            &device,
        ))
    }

    /// The learned vector of each user that had training edges, by name, for `store.set_user_features`; `None` where
    /// users have none.
    pub fn user_features(&self) -> Option<Vec<(String, Vec<f32>)>> {
        let table = self.params.get(USER_TABLE)?;
        let rows = table.as_tensor().to_vec2::<f32>().ok()?;
        let named = self.users.iter().zip(rows);
        Some(
            named
                .filter_map(|(name, row)| Some((name.clone()?, row)))
                .collect(),
        )
    }

    /// Writes the file that `store.set_encoder` loads, numbers as `dtype` (f16 halves it),
    /// with the decoder beside the encoder and the training's settings in its metadata.
    pub fn save(&self, path: &Path, dtype: DType) -> Result<()> {
        let vars = self.params.vars().into_iter();
        let tensors = vars
            .filter(|(name, _)| name != USER_TABLE)
            .map(|(name, var)| (name, var.as_tensor().clone()));
        let training = Some(json(&self.options)?);
        save_encoder(path, &self.config, training, tensors, dtype)
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value)
        .map_err(|e| Error::BadRequest(format!("the encoder cannot be written: {e}")))
}

/// Writes the file that `store.set_encoder` loads.
fn save_encoder(
    path: &Path,
    config: &EncoderConfig,
    training: Option<String>,
    tensors: impl Iterator<Item = (String, Tensor)>,
    dtype: DType,
) -> Result<()> {
    let mut metadata = vec![("simpatico", json(config)?)];
    metadata.extend(training.map(|t| ("training", t)));
    let tensors = tensors
        .map(|(name, tensor)| Ok((name, tensor.to_dtype(dtype)?)))
        .collect::<Result<Vec<_>>>()?;
    crate::params::save_tensors(path, &tensors, &metadata)
}

// ------------------------------------------------------- training it through something else

/// An encoder over the graphs of stores, whose weights another training moves: Collaborative
/// DPO trains graph encoder, soft prompt and adapter together (`train_policy::runs`).
pub struct TunableEncoder {
    network: SageNetwork,
    params: Params,
    /// What is in the file beside what trains: the decoder, and the last layer towards
    /// attributes, which no user's embedding depends on.
    kept: Vec<(String, Tensor)>,
    training: Option<String>,
    graphs: Vec<LiveGraph>,
    /// Where the users are, in the graphs' tables of users one after another.
    rows: Tensor,
}

/// One store's graph. The last row of users stands for everyone without an edge.
struct LiveGraph {
    graph: MessageGraph,
    x_users: Option<Tensor>,
    x_attributes: Tensor,
}

impl TunableEncoder {
    /// Reads the weights that `store.set_encoder` takes, and the graphs of these snapshots, for
    /// these users, each by the snapshot's number and the name. Fails where the file is damaged
    /// or an attribute has no text vector of its length.
    pub fn open(
        weights: &Path,
        snapshots: &[Snapshot],
        users: &[(usize, &str)],
        device: &Device,
    ) -> Result<Self> {
        let file = weights.display().to_string();
        let encoder = simpatico_storage::sage::Encoder::load(weights)
            .map_err(|e| Error::bad_model(&file, e.to_string()))?;
        let config = encoder.config().clone();
        let training = encoder_metadata(weights)?.remove("training");
        let params = Params::new(0, device.clone());
        let mut kept = Vec::new();
        for (name, tensor) in crate::params::load_tensors(weights, device)? {
            let tensor = tensor.to_dtype(DType::F32)?;
            match name.starts_with("c1.") || name.starts_with("c2.attr__") {
                true => drop(params.insert(name, &tensor)?),
                false => kept.push((name, tensor)),
            }
        }
        let weights = params
            .vars()
            .into_iter()
            .map(|(n, v)| (n, v.as_tensor().clone()));
        let weights = weights.chain(kept.iter().cloned()).collect();
        let vb = VarBuilder::from_tensors(weights, DType::F32, device);
        let (mut graphs, mut places, mut end) = (Vec::new(), Vec::new(), 0);
        for snapshot in snapshots {
            let mut data = LinkData::from_snapshot(snapshot)?;
            let edgeless = end + data.users.len() as u32;
            let of_name: HashMap<String, u32> = data.users.iter().cloned().zip(end..).collect();
            places.push((of_name, edgeless));
            end = edgeless + 1;
            // No user has this name, so no edge and no vector of its own.
            data.users.push(String::new());
            graphs.push(LiveGraph::new(&data, snapshot, &config, device)?);
        }
        let row = |(number, name): &(usize, &str)| {
            let (of_name, edgeless) = &places[*number];
            of_name.get(*name).copied().unwrap_or(*edgeless)
        };
        let rows: Vec<u32> = users.iter().map(row).collect();
        Ok(Self {
            network: SageNetwork::new(config.clone(), vb),
            params,
            kept,
            training,
            graphs,
            rows: Tensor::new(rows, device)?,
        })
    }

    /// What trains.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.params.vars()
    }

    /// The users' embeddings as they are now, (users, out), with the gradient. Costs a batch
    /// forward pass of each graph.
    pub fn embeddings(&self) -> Result<Tensor> {
        let table = |live: &LiveGraph| {
            let (users, _) =
                self.network
                    .forward(live.x_users.as_ref(), &live.x_attributes, &live.graph)?;
            Ok(users)
        };
        let tables: Vec<Tensor> = self.graphs.iter().map(table).collect::<Result<_>>()?;
        Ok(Tensor::cat(&tables, 0)?.index_select(&self.rows, 0)?)
    }

    /// Writes the file that `store.set_encoder` loads.
    pub fn save(&self, path: &Path, dtype: DType) -> Result<()> {
        let vars = self.params.vars().into_iter();
        let tensors = vars
            .map(|(name, var)| (name, var.as_tensor().clone()))
            .chain(self.kept.iter().cloned());
        let config = &self.network.config;
        save_encoder(path, config, self.training.clone(), tensors, dtype)
    }
}

impl LiveGraph {
    fn new(
        data: &LinkData,
        snapshot: &Snapshot,
        config: &EncoderConfig,
        device: &Device,
    ) -> Result<Self> {
        let (dim, expected) = (data.feature_dim(), config.in_dim_attribute);
        if dim != expected && !data.attributes.is_empty() {
            return Err(Error::BadRequest(format!(
                "the encoder takes text vectors of {expected} numbers, the store's have {dim}; \
                 run `simpatico featurize` with the encoder's text model"
            )));
        }
        let x_users = match config.in_dim_user {
            0 => None,
            dim => {
                let own = |name: &str| snapshot.user_feature(name).filter(|f| f.len() == dim);
                Some(data.user_features_tensor(dim, own, device)?)
            }
        };
        let (users, attributes) = (data.users.len(), data.attributes.len());
        let shape = (attributes, expected);
        Ok(Self {
            graph: MessageGraph::new(users, attributes, &data.links, config.relations),
            x_users,
            // Also right where there is no attribute to tell the length from.
            x_attributes: Tensor::from_vec(data.features.concat(), shape, device)?,
        })
    }
}

/// The metadata of a safetensors file.
fn encoder_metadata(path: &Path) -> Result<HashMap<String, String>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)
        .map_err(|e| Error::bad_model(path.display().to_string(), e.to_string()))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use simpatico_storage::sage::{AttributeId, Encoder, Sage, UserId};

    /// Two tastes: users of one like even attributes and dislike odd ones, the others the
    /// other way round, a tenth of it noise. Which attribute is which stands in no single
    /// number of its random feature.
    pub(crate) fn planted(users: u32, attributes: u32, seed: u64) -> LinkData {
        let mut random = Philox::new(seed, 77);
        let features: BTreeMap<String, Vec<f32>> = (0..attributes)
            .map(|a| (format!("attribute {a:03}"), random.normals(12)))
            .collect();
        let mut edges = Vec::new();
        for user in 0..users {
            for attribute in 0..attributes {
                if random.below(3) == 0 {
                    let noise = random.below(10) == 0;
                    let liked = ((user + attribute) % 2 == 0) != noise;
                    let sign = if liked { Sign::Like } else { Sign::Dislike };
                    edges.push((
                        format!("user {user:03}"),
                        format!("attribute {attribute:03}"),
                        sign,
                    ));
                }
            }
        }
        LinkData::new(edges, |name| features.get(name).cloned()).unwrap()
    }

    fn small(relations: Relations, in_dim_user: usize) -> SageTrainOptions {
        SageTrainOptions {
            relations,
            in_dim_user,
            hidden: 10,
            out: 8,
            epochs: 6,
            look_every: 2,
            user_dropout: if in_dim_user > 0 { 0.3 } else { 0.0 },
            ..SageTrainOptions::default()
        }
    }

    fn go_on(_: &SageEpoch) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn the_network_gives_pygs_numbers() {
        for name in ["separated", "blind"] {
            let path = format!(
                "{}/../tests/golden/sage/{name}.safetensors",
                env!("CARGO_MANIFEST_DIR")
            );
            let tensors = crate::params::load_tensors(Path::new(&path), &Device::Cpu).unwrap();
            let relations = match name {
                "blind" => Relations::Blind,
                _ => Relations::Separated,
            };
            let config = EncoderConfig {
                version: 1,
                in_dim_attribute: 9,
                in_dim_user: 5,
                hidden: 20,
                out: 12,
                relations,
            };
            let mut links = Vec::new();
            let rows = tensors["sign"].to_vec2::<i64>().unwrap();
            for (user, row) in (0..).zip(rows) {
                for (attribute, sign) in (0..).zip(row) {
                    let sign = match sign {
                        1 => Sign::Like,
                        -1 => Sign::Dislike,
                        _ => continue,
                    };
                    links.push(Link {
                        user,
                        attribute,
                        sign,
                    });
                }
            }
            let graph = MessageGraph::new(40, 30, &links, relations);
            let (x_user, x_attribute) = (&tensors["x_user"], &tensors["x_attribute"]);
            let weights = tensors.clone().into_iter().collect();
            let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
            let network = SageNetwork::new(config, vb);
            let (users, _) = network.forward(Some(x_user), x_attribute, &graph).unwrap();
            let worst = (users - &tensors["embedding"]).unwrap().abs().unwrap();
            let worst = worst.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(worst < 1e-5, "{name}: {worst}");
        }
    }

    #[test]
    fn the_store_computes_what_was_trained() {
        let data = planted(30, 20, 1);
        let folder = std::env::temp_dir().join(format!("simpatico-sage-{}", std::process::id()));
        for (relations, in_dim_user) in [
            (Relations::Separated, 0),
            (Relations::Separated, 4),
            (Relations::Blind, 4),
        ] {
            let options = small(relations, in_dim_user);
            let split = LinkSplit::random(&data.links, 0.8, 0.1, 0);
            let trained = train(&data, &split, &options, &Device::Cpu, None, go_on).unwrap();
            let path = folder.join("sage.safetensors");
            trained.save(&path, DType::F32).unwrap();
            let mut sage = Sage::new(Arc::new(Encoder::load(&path).unwrap()));
            for (id, feature) in (0..).zip(&data.features) {
                sage.set_attribute_feature(AttributeId(id), Some(feature))
                    .unwrap();
            }
            for (name, feature) in trained.user_features().unwrap_or_default() {
                let id = data.users.iter().position(|user| *user == name).unwrap();
                sage.set_user_feature(UserId(id as u32), Some(&feature), &[])
                    .unwrap();
            }
            for link in &data.links {
                let (user, attribute) = (UserId(link.user), AttributeId(link.attribute));
                sage.on_edge(user, attribute, None, Some(link.sign));
            }
            let graph = MessageGraph::new(30, 20, &data.links, relations);
            let (batch, _) = trained.embed(&data, &graph).unwrap();
            for (user, batch) in (0..).zip(batch.to_vec2::<f32>().unwrap()) {
                let own = data.links.iter().filter(|link| link.user == user);
                let own: Vec<_> = own.map(|l| (AttributeId(l.attribute), l.sign)).collect();
                let stored = sage.embedding(UserId(user), &own);
                for (a, b) in stored.iter().zip(&batch) {
                    assert!((a - b).abs() < 1e-5, "{a} in the store, {b} in training");
                }
            }
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn every_trainable_tensor_gets_a_gradient() {
        let data = planted(20, 10, 2);
        let split = LinkSplit::random(&data.links, 0.8, 0.1, 0);
        for decoder in [Decoder::DotAndBias, Decoder::TwoLinear] {
            for (relations, in_dim_user) in [(Relations::Separated, 3), (Relations::Blind, 0)] {
                let options = SageTrainOptions {
                    decoder,
                    ..small(relations, in_dim_user)
                };
                let mut run = Run::new(&data, &split, &options, &Device::Cpu).unwrap();
                let graph = run.graph(&split.train);
                let logits = run.logits(&graph, &split.train, None).unwrap();
                let loss = cross_entropy(&logits, &split.train, true).unwrap();
                run.optimizer
                    .accumulate(&loss.backward().unwrap(), 1.0)
                    .unwrap();
                assert_eq!(run.optimizer.without_gradient(), Vec::<&str>::new());
                assert!(run.params.names().len() > 10);
                // And it is the right one: against central differences, through both layers.
                for name in ["c1.attr__rev_", "c1.user__", "c2.attr__rev_", "c2.user__"] {
                    let names = run.params.names();
                    let name = names
                        .iter()
                        .find(|n| n.starts_with(name) && n.ends_with("lin_l.weight"));
                    let Some(name) = name else { continue };
                    let var = run.params.get(name).unwrap();
                    let gradient = run.optimizer.gradient(name).unwrap();
                    let direction = gradient.sqr().unwrap().sum_all().unwrap().sqrt().unwrap();
                    let length = direction.to_scalar::<f32>().unwrap();
                    let unit = (gradient / f64::from(length)).unwrap();
                    let before = var.as_tensor().copy().unwrap();
                    let at = |step: f64| {
                        var.set(&(&before + (&unit * step).unwrap()).unwrap())
                            .unwrap();
                        let logits = run.logits(&graph, &split.train, None).unwrap();
                        let loss = cross_entropy(&logits, &split.train, true).unwrap();
                        f64::from(loss.to_scalar::<f32>().unwrap())
                    };
                    let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                    var.set(&before).unwrap();
                    let error = (slope - f64::from(length)).abs() / f64::from(length);
                    assert!(error < 0.03, "{name}: slope {slope}, gradient {length}");
                }
            }
        }
    }

    #[test]
    fn a_tunable_encoder_is_the_stores_and_gradients_reach_all_of_it() {
        use simpatico_schema::{Event, Polarity};
        use simpatico_storage::{Options, Store};
        let folder = tempfile::tempdir().unwrap();
        let data = planted(12, 9, 6);
        for (relations, in_dim_user) in [(Relations::Separated, 0), (Relations::Blind, 3)] {
            let options = small(relations, in_dim_user);
            let split = LinkSplit::random(&data.links, 0.8, 0.1, 0);
            let trained = train(&data, &split, &options, &Device::Cpu, None, go_on).unwrap();
            let path = folder.path().join(format!("{in_dim_user}.safetensors"));
            trained.save(&path, DType::F32).unwrap();
            let mut snapshots = Vec::new();
            let mut stores = Vec::new();
            // Two stores, so that a row is looked for in the right one.
            for part in 0..2 {
                let at = folder.path().join(format!("{in_dim_user}-{part}"));
                let store = Store::open(&at, Options::default()).unwrap();
                let own = data.links.iter().filter(|l| l.user as usize % 2 == part);
                let mut events: Vec<Event> = own
                    .map(|l| {
                        let (user, attribute) = (
                            &data.users[l.user as usize],
                            &data.attributes[l.attribute as usize],
                        );
                        let polarity = match l.sign {
                            Sign::Like => Polarity::Like,
                            Sign::Dislike => Polarity::Dislike,
                        };
                        Event::new(user, attribute, polarity).at(1)
                    })
                    .collect();
                events.push(Event::new("silent", &data.attributes[0], Polarity::Pass).at(1));
                store.append(&events).unwrap();
                let named = data.attributes.iter().cloned();
                let features: Vec<_> = named.zip(data.features.iter().cloned()).collect();
                store.set_features(&features).unwrap();
                store.set_encoder(&path).unwrap();
                let learned = trained.user_features().unwrap_or_default();
                let learned: Vec<_> = learned
                    .into_iter()
                    .filter(|(name, _)| store.snapshot().has_user(name))
                    .collect();
                store.set_user_features(&learned).unwrap();
                snapshots.push(store.snapshot());
                stores.push(store);
            }
            let mut asked: Vec<(usize, &str)> = Vec::new();
            for (number, snapshot) in snapshots.iter().enumerate() {
                asked.extend(snapshot.users().map(|name| (number, name)));
            }
            assert_eq!(asked.len(), data.users.len() + 2);
            let tunable = TunableEncoder::open(&path, &snapshots, &asked, &Device::Cpu).unwrap();
            let live = tunable.embeddings().unwrap();
            for ((number, name), live) in asked.iter().zip(live.to_vec2::<f32>().unwrap()) {
                let stored = snapshots[*number].embedding(name).unwrap().vector;
                for (a, b) in stored.iter().zip(&live) {
                    assert!((a - b).abs() < 1e-5, "{name}: {a} in the store, {b} here");
                }
            }
            let gradients = live.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            for (name, var) in tunable.vars() {
                let gradient = gradients
                    .get(&var)
                    .unwrap_or_else(|| panic!("none for {name}"));
                let size = gradient.abs().unwrap().max_all().unwrap();
                assert!(size.to_scalar::<f32>().unwrap() > 0.0, "{name}");
            }
            let again = folder.path().join("again.safetensors");
            tunable.save(&again, DType::F32).unwrap();
            let (old, new) = (
                std::fs::read(&path).unwrap(),
                std::fs::read(&again).unwrap(),
            );
            assert_eq!(old.len(), new.len());
            let reloaded = TunableEncoder::open(&again, &snapshots, &asked, &Device::Cpu).unwrap();
            let same = (reloaded.embeddings().unwrap() - live).unwrap();
            assert_eq!(
                same.abs()
                    .unwrap()
                    .max_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap(),
                0.0
            );
        }
    }

    #[test]
    fn a_run_cut_off_and_resumed_ends_as_one_that_was_not() {
        let data = planted(25, 15, 3);
        let split = LinkSplit::random(&data.links, 0.8, 0.1, 0);
        let options = SageTrainOptions {
            epochs: 9,
            ..small(Relations::Separated, 3)
        };
        let bits = |trained: &TrainedSage| -> Vec<(String, Vec<u32>)> {
            let vars = trained.params.vars().into_iter();
            let bits = |v: Var| v.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            vars.map(|(n, v)| (n, bits(v).into_iter().map(f32::to_bits).collect()))
                .collect()
        };
        let whole = train(&data, &split, &options, &Device::Cpu, None, go_on).unwrap();
        let folder = std::env::temp_dir().join(format!("simpatico-resume-{}", std::process::id()));
        let checkpoint = Checkpoint {
            folder: folder.clone(),
            every: 2,
        };
        for stop_at in [2, 3, 6] {
            let stop = |epoch: &SageEpoch| match epoch.epoch == stop_at {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            };
            let run = train(
                &data,
                &split,
                &options,
                &Device::Cpu,
                Some(&checkpoint),
                stop,
            );
            assert!(matches!(run, Err(Error::Cancelled)));
        }
        let resumed = train(
            &data,
            &split,
            &options,
            &Device::Cpu,
            Some(&checkpoint),
            go_on,
        );
        let resumed = resumed.unwrap();
        assert_eq!(resumed.history, whole.history);
        assert_eq!(bits(&resumed), bits(&whole));
        let other = SageTrainOptions {
            lr: 1.0,
            ..options.clone()
        };
        let other = train(
            &data,
            &split,
            &other,
            &Device::Cpu,
            Some(&checkpoint),
            go_on,
        );
        assert!(other.is_err_and(|e| e.to_string().contains("other settings")));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn whitened_rows_differ_equally_in_all_directions() {
        let mut random = Philox::new(4, 0);
        let (rows, dim) = (400, 10);
        // Directions of very different size, and one shared by all.
        let x: Vec<f32> = (0..rows * dim)
            .map(|i| random.normal() * 0.5f32.powi((i % dim) as i32 / 2) + 2.0)
            .collect();
        let x = Tensor::from_vec(x, (rows, dim), &Device::Cpu).unwrap();
        let white = x.matmul(&whitening(&x).unwrap()).unwrap();
        let moment = (white.t().unwrap().matmul(&white).unwrap() / rows as f64).unwrap();
        for (i, row) in moment.to_vec2::<f32>().unwrap().into_iter().enumerate() {
            for (j, value) in row.into_iter().enumerate() {
                if i == j {
                    assert!((0.1..1.01).contains(&value), "{i}: {value}");
                } else {
                    assert!(value.abs() < 0.4, "{i} {j}: {value}");
                }
            }
        }
        let zero = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
        assert!(whitening(&zero).is_ok());
    }

    #[test]
    fn nothing_to_train_on_and_odd_settings_are_named() {
        let data = planted(5, 5, 5);
        let fails = |split: &LinkSplit, options: &SageTrainOptions| {
            let run = train(&data, split, options, &Device::Cpu, None, go_on);
            run.err().map(|e| e.to_string()).unwrap_or_default()
        };
        let options = small(Relations::Blind, 0);
        assert!(fails(&LinkSplit::default(), &options).contains("ingest"));
        let split = LinkSplit::random(&data.links, 0.8, 0.1, 0);
        let odd = SageTrainOptions {
            train_share: 1.5,
            ..options
        };
        assert!(fails(&split, &odd).contains("train_share"));
        let bare = LinkData::new([("u".into(), "a".into(), Sign::Like)], |_| None);
        assert!(bare.is_err_and(|e| e.to_string().contains("featurize")));
    }
}
