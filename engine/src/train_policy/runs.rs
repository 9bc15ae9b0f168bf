//! Whole training runs, from a data set and a store's snapshot to the files of a bundle.

use super::*;
use crate::lm::LanguageModel;
use crate::lora::LoraConfig;
use crate::policy::{neighbor_rows, pair_groups, sft_groups};
use crate::soft_prompt::SoftPromptConfig;
use crate::synth::{Split, Synth};
use simpatico_schema::OverlapMode;
use simpatico_storage::Snapshot;
use std::ops::ControlFlow;

/// Which training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Supervised fine-tuning.
    Sft,
    /// DPO without user information.
    Vanilla,
    /// DPO with a learned vector for each user.
    User,
    /// Collaborative DPO.
    Collaborative,
}

/// Where the settings come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Rates that learn.
    #[default]
    Default,
    /// Table 12 of the paper.
    Paper,
}

/// What to train and where to put it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunOptions {
    /// Which training.
    pub method: Method,
    /// Where the settings come from.
    pub preset: Preset,
    /// In place of the preset's number of steps.
    pub steps: Option<usize>,
    /// Decides order, dropout and first values.
    pub seed: u64,
    /// Metrics, plot, checkpoint and the result's files go here.
    pub folder: PathBuf,
    /// The adapter to start from: for DPO also the reference. `None`: a fresh one, and the
    /// base model as the reference.
    pub start: Option<PathBuf>,
    /// Goes on from the folder's checkpoint, if there is one.
    pub resume: bool,
}

/// Trains. `progress` gets each step's metrics, the seconds left and a warning if there is
/// one; when it breaks, the run ends with [`Error::Cancelled`], to be resumed from its last
/// checkpoint. The snapshot gives embeddings and neighbours to the collaborative form.
pub fn run(
    model: &LanguageModel,
    synth: &Synth,
    snapshot: Option<&Snapshot>,
    options: &RunOptions,
    progress: &mut dyn FnMut(&Metrics, f64, Option<&str>) -> ControlFlow<()>,
) -> Result<Metrics> {
    let cancelled = std::cell::Cell::new(false);
    let journal = Journal {
        folder: options.folder.clone(),
        resume: options.resume,
        cancelled: Some(&cancelled),
        progress: Box::new(|m, left, warning| {
            cancelled.set(progress(m, left, warning).is_break());
        }),
    };
    let start = match &options.start {
        Some(folder) => Some(model.load_adapter(folder)?),
        None => None,
    };
    match options.method {
        Method::Sft => sft(model, synth, options, start, journal),
        method => dpo(model, synth, snapshot, options, (method, start), journal),
    }
}

fn sft(
    model: &LanguageModel,
    synth: &Synth,
    options: &RunOptions,
    start: Option<Adapter>,
    journal: Journal,
) -> Result<Metrics> {
    let mut settings = match options.preset {
        Preset::Default => SftOptions::default(),
        Preset::Paper => SftOptions::paper(),
    };
    settings.steps = options.steps.unwrap_or(settings.steps);
    settings.seed = options.seed;
    let n = (settings.steps * settings.groups).min(150_000 / 6);
    let groups = sft_groups(synth, &model.tokenizer, template(model)?, n, options.seed)?;
    let adapter = match start {
        Some(adapter) => adapter.trainable()?,
        None => model.trainable(lora(options.preset), options.seed)?,
    };
    train_sft(&model.decoder, &adapter, &groups, &settings, journal)
}

/// The adapter of a preset: the default's is small enough to ship.
fn lora(preset: Preset) -> LoraConfig {
    match preset {
        Preset::Default => LoraConfig::new(8, 16.0),
        Preset::Paper => LoraConfig::paper(),
    }
}

fn template(model: &LanguageModel) -> Result<&crate::chat::ChatTemplate> {
    let missing = || Error::bad_model("language model", "has no chat template");
    model.template.as_ref().ok_or_else(missing)
}

fn dpo(
    model: &LanguageModel,
    synth: &Synth,
    snapshot: Option<&Snapshot>,
    options: &RunOptions,
    (method, start): (Method, Option<Adapter>),
    journal: Journal,
) -> Result<Metrics> {
    let form = match method {
        Method::Vanilla | Method::Sft => Form::Vanilla,
        Method::User => Form::User,
        Method::Collaborative => DpoOptions::collaborative(),
    };
    let mut settings = match options.preset {
        Preset::Default => DpoOptions::default_for(form),
        Preset::Paper => DpoOptions::paper(form),
    };
    settings.steps = options.steps.unwrap_or(settings.steps);
    settings.seed = options.seed;
    let split = Split::Train;
    let groups = pair_groups(
        synth,
        &model.tokenizer,
        template(model)?,
        split,
        usize::MAX,
        options.seed,
    )?;
    let index: BTreeMap<String, usize> = synth
        .splits
        .train_users
        .iter()
        .enumerate()
        .map(|(i, u)| (u.clone(), i))
        .collect();
    let (vectors, neighbors) = match (form, snapshot) {
        (Form::Collaborative { k, .. }, Some(snapshot)) => (
            graph_vectors(snapshot, &index)?,
            neighbor_rows(snapshot, &index, k, OverlapMode::Shared)?,
        ),
        (Form::Collaborative { .. }, None) => {
            let text =
                "collaborative training reads embeddings and neighbours from a store: give --store";
            return Err(Error::BadRequest(text.into()));
        }
        _ => (
            Tensor::zeros((1, 64), DType::F32, &Device::Cpu)?,
            Vec::new(),
        ),
    };
    let width = vectors.dim(1)?;
    let table = Params::new(options.seed.wrapping_add(7), Device::Cpu);
    let init = candle_nn::Init::Randn {
        mean: 0.0,
        stdev: 1.0,
    };
    if form == Form::User {
        table
            .builder(DType::F32)
            .get_with_hints((index.len(), width), "users", init)?;
    }
    let users = Conditioning {
        index,
        embeddings: match table.get("users") {
            Some(var) => Box::new(move || Ok(var.as_tensor().clone())),
            None => Box::new(|| Ok(vectors.clone())),
        },
        vars: table.vars(),
        neighbors,
    };
    let config = SoftPromptConfig {
        embedding: width,
        inner: 128,
        tokens: 8,
        hidden: model.decoder.config.hidden,
        scale: embedding_size(model)?,
        normalize: true,
    };
    let (soft, params) = SoftPrompt::fresh(config.clone(), options.seed, model.decoder.device())?;
    let trained = match &start {
        Some(adapter) => adapter.trainable()?,
        None => model.trainable(lora(options.preset), options.seed)?,
    };
    let conditioned = form != Form::Vanilla;
    let policy = Policy {
        adapter: &trained,
        soft: conditioned.then_some((&soft, &params)),
        users: conditioned.then_some(&users),
    };
    train_dpo(
        &model.decoder,
        &policy,
        start.as_ref(),
        &groups,
        &settings,
        journal,
    )
}

/// The embeddings of the users, in the order of their row numbers.
fn graph_vectors(snapshot: &Snapshot, index: &BTreeMap<String, usize>) -> Result<Tensor> {
    let mut rows = vec![Vec::new(); index.len()];
    for (user, row) in index {
        rows[*row] = snapshot
            .embedding(user)
            .map_err(|e| Error::BadRequest(format!("embedding of {user}: {e}")))?
            .vector;
    }
    Ok(Tensor::new(rows, &Device::Cpu)?)
}

/// The root mean square of the model's token embeddings: the size of a soft token.
fn embedding_size(model: &LanguageModel) -> Result<f64> {
    let n = model.decoder.config.vocab.min(2000) as u32;
    let rows = model.embed_tokens(&(n / 2..n).collect::<Vec<u32>>())?;
    let mean = rows.to_dtype(DType::F32)?.sqr()?.mean_all()?;
    Ok(f64::from(mean.to_scalar::<f32>()?).sqrt())
}
