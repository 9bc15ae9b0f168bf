//! Whole training runs, from a data set and a store's snapshot to the files of a bundle.

use super::*;
use crate::grammar;
use crate::lm::LanguageModel;
use crate::lora::LoraConfig;
use crate::policy::{
    PROFILES, PromptText, answer_ids, pair_groups, prompt_ids, sft_groups, training_text,
};
use crate::sage_train::TunableEncoder;
use crate::soft_prompt::SoftPromptConfig;
use crate::synth::{Split, Synth};
use crate::vocabulary::{self, Attribute, EditType};
use crate::wishes::lesson;
use simpatico_schema::edit::PreferencePair;
use simpatico_schema::{OverlapMode, Polarity};
use simpatico_storage::Snapshot;
use std::collections::BTreeSet;

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

/// What differs from a preset; `None` keeps the preset's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tweaks {
    /// Optimiser steps.
    pub steps: Option<usize>,
    /// Prompts (with all their pairs) in a step.
    pub groups: Option<usize>,
    /// Peak learning rate of the adapter.
    pub lr: Option<f64>,
    /// Steps between checkpoints.
    pub checkpoint_steps: Option<usize>,
    /// DPO: the loss.
    pub loss: Option<Loss>,
    /// DPO: the temperature.
    pub beta: Option<f64>,
    /// DPO: the share of wrong pairs that the robust loss reckons with.
    pub label_smoothing: Option<f64>,
    /// DPO: weight of the preferred answers' own likelihood.
    pub sft_weight: Option<f64>,
    /// Collaborative: weight of reading beside the preferences.
    pub reading_weight: Option<f64>,
    /// DPO: peak learning rate of the soft prompt's maps.
    pub lr_soft: Option<f64>,
    /// DPO: peak learning rate of the users' vectors, or of the graph encoder where it trains.
    pub lr_users: Option<f64>,
    /// The share of the data set's prompts that show the profile in words; unless told
    /// otherwise, [`PROFILES`] for DPO and all that have one for SFT.
    pub profiles: Option<f64>,
    /// Collaborative: how many neighbours.
    pub k: Option<usize>,
    /// Collaborative: the weight of their term.
    pub lambda: Option<f64>,
    /// Collaborative: what their term scores.
    pub neighbor_mode: Option<NeighborMode>,
}

/// What to train and where to put it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunOptions {
    /// Which training.
    pub method: Method,
    /// Where the settings come from.
    pub preset: Preset,
    /// What differs from it.
    pub tweaks: Tweaks,
    /// Decides order, dropout and first values.
    pub seed: u64,
    /// Metrics, plot, checkpoint and the result's files go here.
    pub folder: PathBuf,
    /// The adapter to start from: for DPO also the reference. `None`: a fresh one, and the
    /// base model as the reference.
    pub start: Option<PathBuf>,
    /// The soft prompt to start from. `None`: a fresh one, where the method has one.
    pub start_soft: Option<PathBuf>,
    /// Collaborative: the graph encoder's weights, to train along with adapter and soft prompt;
    /// what comes of them is written as `sage.safetensors`. `None`: it stays as it is in the
    /// stores.
    pub encoder: Option<PathBuf>,
    /// Collaborative: learn to say what the soft prompt names, in place of what people prefer, by
    /// fine-tuning; soft prompt and graph encoder stay as they are.
    pub reading: bool,
    /// DPO: pairs that people's answers gave. Where there are any, the run learns from these,
    /// each prompt beside `replay` prompts of the data set.
    pub recorded: Vec<PreferencePair>,
    /// Prompts of the data set for each recorded one, against forgetting.
    pub replay: usize,
    /// SFT: edit instructions of others ([`edits::read`]), which then give half of the prompts.
    pub edits: Option<PathBuf>,
    /// Goes on from the folder's checkpoint, if there is one.
    pub resume: bool,
}

impl RunOptions {
    /// The default preset of a training, with its results in a folder.
    pub fn new(method: Method, folder: impl Into<PathBuf>) -> Self {
        Self {
            method,
            preset: Preset::Default,
            tweaks: Tweaks::default(),
            seed: 0,
            folder: folder.into(),
            start: None,
            start_soft: None,
            encoder: None,
            reading: false,
            recorded: Vec::new(),
            replay: 3,
            edits: None,
            resume: false,
        }
    }
}

/// Trains. When `progress` breaks after a step, the run writes a checkpoint and ends with
/// [`Error::Cancelled`]. The snapshots give embeddings and neighbours to the collaborative
/// form: for each user the first of them that knows the user.
pub fn run(
    model: &LanguageModel,
    synth: &Synth,
    snapshots: &[Snapshot],
    options: &RunOptions,
    progress: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
) -> Result<Metrics> {
    let journal = Journal {
        folder: options.folder.clone(),
        resume: options.resume,
        progress: Box::new(progress),
    };
    let start = match &options.start {
        Some(folder) => Some(model.load_adapter(folder)?),
        None => None,
    };
    let metrics = match options.method {
        Method::Sft => sft(model, synth, options, start, journal),
        method => dpo(model, synth, snapshots, options, (method, start), journal),
    };
    metrics.map_err(|e| e.during("training the policy", "train with a smaller --batch"))
}

/// The settings of a fine-tuning run.
fn sft_settings(options: &RunOptions) -> SftOptions {
    let mut settings = match options.preset {
        Preset::Default => SftOptions::default(),
        Preset::Paper => SftOptions::paper(),
    };
    let tweaks = &options.tweaks;
    settings.steps = tweaks.steps.unwrap_or(settings.steps);
    settings.groups = tweaks.groups.unwrap_or(settings.groups).max(1);
    settings.lr = tweaks.lr.unwrap_or(settings.lr);
    settings.checkpoint_steps = tweaks.checkpoint_steps.unwrap_or(settings.checkpoint_steps);
    settings.seed = options.seed;
    settings
}

fn sft(
    model: &LanguageModel,
    synth: &Synth,
    options: &RunOptions,
    start: Option<Adapter>,
    journal: Journal,
) -> Result<Metrics> {
    let settings = sft_settings(options);
    let tweaks = &options.tweaks;
    let n = (settings.steps * settings.groups).min(150_000 / 6);
    let (tokenizer, template) = (&model.tokenizer, template(model)?);
    let profiles = tweaks.profiles.unwrap_or(1.0);
    let groups = match &options.edits {
        None => sft_groups(synth, tokenizer, template, n, profiles, options.seed)?,
        Some(path) => {
            let edits = edits::read(path)?;
            let half = n.div_ceil(2);
            let mut groups = edits::groups(&edits, tokenizer, template, half, options.seed)?;
            groups.extend(sft_groups(
                synth,
                tokenizer,
                template,
                half,
                profiles,
                options.seed,
            )?);
            groups
        }
    };
    let adapter = match start {
        Some(adapter) => adapter.trainable()?,
        None => model.trainable(lora(options.preset), options.seed)?,
    };
    train_sft(&model.decoder, &adapter, None, &groups, &settings, journal)
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

/// The settings of a DPO run.
fn dpo_settings(method: Method, options: &RunOptions) -> DpoOptions {
    let tweaks = &options.tweaks;
    let form = match (method, DpoOptions::collaborative()) {
        (Method::Vanilla | Method::Sft, _) => Form::Vanilla,
        (Method::Collaborative, Form::Collaborative { k, lambda, mode }) => Form::Collaborative {
            k: tweaks.k.unwrap_or(k),
            lambda: tweaks.lambda.unwrap_or(lambda),
            mode: tweaks.neighbor_mode.unwrap_or(mode),
        },
        (Method::User | Method::Collaborative, _) => Form::User,
    };
    let preset = match options.preset {
        Preset::Default => DpoOptions::default_for(form),
        Preset::Paper => DpoOptions::paper(form),
    };
    let loss = LossOptions {
        loss: tweaks.loss.unwrap_or(preset.loss.loss),
        beta: tweaks.beta.unwrap_or(preset.loss.beta),
        label_smoothing: tweaks
            .label_smoothing
            .unwrap_or(preset.loss.label_smoothing),
    };
    DpoOptions {
        loss,
        steps: tweaks.steps.unwrap_or(preset.steps),
        groups: tweaks.groups.unwrap_or(preset.groups).max(1),
        lr_adapter: tweaks.lr.unwrap_or(preset.lr_adapter),
        lr_soft: tweaks.lr_soft.unwrap_or(preset.lr_soft),
        lr_users: tweaks.lr_users.unwrap_or(preset.lr_users),
        sft_weight: tweaks.sft_weight.unwrap_or(preset.sft_weight),
        reading_weight: tweaks.reading_weight.unwrap_or(preset.reading_weight),
        checkpoint_steps: tweaks.checkpoint_steps.unwrap_or(preset.checkpoint_steps),
        seed: options.seed,
        ..preset
    }
}

fn dpo(
    model: &LanguageModel,
    synth: &Synth,
    snapshots: &[Snapshot],
    options: &RunOptions,
    (method, start): (Method, Option<Adapter>),
    journal: Journal,
) -> Result<Metrics> {
    let mut settings = dpo_settings(method, options);
    let form = settings.form;
    let mut groups = pair_groups(
        synth,
        &model.tokenizer,
        template(model)?,
        Split::Train,
        usize::MAX,
        options.tweaks.profiles.unwrap_or(PROFILES).clamp(0.0, 1.0),
        options.seed,
    )?;
    if !options.recorded.is_empty() {
        let recorded = recorded_groups(model, snapshots, &options.recorded)?;
        // Three passes over what people said, unless told otherwise.
        let passes = 3 * recorded.len() * (1 + options.replay) / settings.groups;
        settings.steps = options.tweaks.steps.unwrap_or(passes.max(1));
        settings.warmup = settings.warmup.min(settings.steps / 10);
        Philox::new(options.seed, 0x7265_706c_6179).shuffle(&mut groups);
        groups.truncate(recorded.len() * options.replay);
        groups.extend(recorded);
    }
    let device = model.decoder.device();
    let (index, vectors, neighbors) = match form {
        Form::Collaborative { k, .. } => {
            let k = if options.reading { 0 } else { k };
            surroundings(snapshots, synth, &groups, k)?
        }
        _ => {
            let users = synth.splits.train_users.iter().enumerate();
            let index = users.map(|(i, u)| (u.clone(), i)).collect();
            let none = Tensor::zeros((1, 64), DType::F32, device)?;
            (index, none, Vec::new())
        }
    };
    let vectors = vectors.to_device(device)?;
    let (soft, params) = match &options.start_soft {
        Some(file) if form != Form::User => SoftPrompt::load(file, device)?,
        _ => {
            // A detector of each attribute in each round, or twice a user's own vector.
            let of_graph = matches!(form, Form::Collaborative { .. });
            let config = SoftPromptConfig {
                embedding: vectors.dim(1)?,
                inner: match of_graph {
                    true => ROUNDS * vocabulary::all().len(),
                    false => 2 * vectors.dim(1)?,
                },
                tokens: 8,
                hidden: model.decoder.config.hidden,
                scale: embedding_size(model)?,
                normalize: true,
                bounded: of_graph,
                everyone: None,
            };
            let (soft, params) = SoftPrompt::fresh(config, options.seed, device)?;
            if of_graph {
                start_from_words(model, synth, &index, &vectors, (&soft, &params))?;
            }
            (soft, params)
        }
    };
    let trained = match &start {
        Some(adapter) => adapter.trainable()?,
        None => model.trainable(lora(options.preset), options.seed)?,
    };
    let reading = match options.reading || settings.reading_weight > 0.0 {
        false => None,
        true if !matches!(form, Form::Collaborative { .. }) => {
            return Err(Error::BadRequest(
                "only a soft prompt that comes of the graph can be read: train reading with the \
                 collaborative form"
                    .into(),
            ));
        }
        true => Some(reading_groups(
            model,
            synth,
            (&index, &vectors),
            &soft,
            options,
        )?),
    };
    // A tensor is a handle: the embeddings go on to the conditioning too.
    let embeddings = vectors.clone();
    let reading = reading.map(|(groups, users)| {
        let reading = Reading {
            soft: &soft,
            embeddings: &embeddings,
            users,
        };
        (groups, reading)
    });
    if let (true, Some((groups, reading))) = (options.reading, &reading) {
        let settings = sft_settings(options);
        let metrics = train_sft(
            &model.decoder,
            &trained,
            Some(reading),
            groups,
            &settings,
            journal,
        )?;
        let file = options.folder.join("soft_prompt.safetensors");
        SoftPrompt::save(&soft.config, &params, &file, DType::F16)?;
        return Ok(metrics);
    }
    let encoder = match (&options.encoder, form) {
        (Some(file), Form::Collaborative { .. }) => {
            // In the order of the rows, which is the names'.
            let users: Vec<(usize, &str)> = index
                .keys()
                .filter_map(|name| Some((home(snapshots, name)?, name.as_str())))
                .collect();
            Some(TunableEncoder::open(file, snapshots, &users, device)?)
        }
        _ => None,
    };
    let table = Params::new(options.seed.wrapping_add(7), device.clone());
    if form == Form::User {
        let init = candle_nn::Init::Randn {
            mean: 0.0,
            stdev: 1.0,
        };
        let shape = (index.len(), vectors.dim(1)?);
        table
            .builder(DType::F32)
            .get_with_hints(shape, USERS_TABLE, init)?;
    }
    let users = Conditioning {
        index,
        embeddings: match (&encoder, table.get(USERS_TABLE)) {
            (Some(encoder), _) => Box::new(|| encoder.embeddings()),
            (None, Some(var)) => Box::new(move || Ok(var.as_tensor().clone())),
            (None, None) => Box::new(|| Ok(vectors.clone())),
        },
        vars: match &encoder {
            Some(encoder) => encoder.vars(),
            None => table.vars(),
        },
        neighbors,
    };
    let conditioned = form != Form::Vanilla;
    let policy = Policy {
        adapter: &trained,
        soft: conditioned.then_some((&soft, &params)),
        users: conditioned.then_some(&users),
    };
    let metrics = train_dpo(
        &model.decoder,
        &policy,
        start.as_ref(),
        (
            &groups,
            reading.as_ref().map(|(groups, r)| (groups.as_slice(), r)),
        ),
        &settings,
        journal,
    )?;
    if let Some(encoder) = &encoder {
        encoder.save(&options.folder.join("sage.safetensors"), DType::F16)?;
    }
    Ok(metrics)
}

/// The number of the snapshot that a user's embedding and neighbours come from.
fn home(snapshots: &[Snapshot], user: &str) -> Option<usize> {
    snapshots.iter().position(|s| s.has_user(user))
}

/// How much [`start_from_words`] smooths, for each user: what one user says of a coordinate of
/// unit size counts as much as so much doubt.
const WORDS_RIDGE: f64 = 0.1;

/// How steeply a detector of [`start_from_words`] rises above its threshold, by the likelihood.
const STEEPNESS: f64 = 160.0;

/// What a stated like counts where likes are guessed, and any attribute for a newcomer: there
/// what is to be said is not to be guessed.
const NOT_GUESSED: (f32, f32) = (-0.25, -0.1);

/// The rounds of detectors in a soft prompt that starts from words.
const ROUNDS: usize = 3;

/// One round of detectors: of whom it learns what.
struct Round {
    /// For each user, a target for each attribute.
    targets: Vec<Vec<f32>>,
    /// The users whom it speaks to; the others' targets tell them apart.
    speaks_to: Vec<bool>,
    /// Of how many attributes each of its tokens speaks, for the mean of these users.
    spoken: f64,
    /// Whether its tokens are one for each kind of edit, or the ones left over.
    by_kind: bool,
}

/// Brings a fresh soft prompt to where the language model can read it at once: its tokens are the
/// model's own token embeddings of a few attributes, those likeliest for the user.
///
/// How likely an attribute is follows linearly from the user's embedding (ridge regression in
/// closed form, a second, no language model). Each attribute has a unit of the inner layer that
/// detects it, GELU(STEEPNESS · (likelihood - threshold)), and the second layer adds up what the
/// detected ones are called. One token for each kind of edit speaks of what is worth saying, the
/// tokens left over of what the user said, in three rounds of detectors:
///
/// - what is to be *guessed*: the hidden likes, where the data hides any, and else the stated;
/// - what *newcomers* said, of whom too little is known to guess: the users of such data who have
///   nothing hidden. Their embeddings tell them from the others (nearly all, by a linear map);
/// - what was *stated*, by anyone.
///
/// The thresholds let so few attributes through ([`Round::spoken`]) that a token names rather than
/// averages: the mean of all of a user's likes holds them too, but no language model finds them in
/// it (it named one in 8 of 100 instructions, where the likeliest attribute by this regression
/// was a stated like of 95 of 100 held-out users).
///
/// Users without known likes count for nothing; likes that are held out are not looked at.
fn start_from_words(
    model: &LanguageModel,
    synth: &Synth,
    index: &BTreeMap<String, usize>,
    vectors: &Tensor,
    (soft, params): (&SoftPrompt, &Params),
) -> Result<()> {
    let words = vocabulary::all();
    let marked = |names: &mut dyn Iterator<Item = &String>| -> Vec<f32> {
        let mut marks = vec![0f32; words.len()];
        for i in names.filter_map(|name| vocabulary::index_of(name)) {
            marks[i] = 1.0;
        }
        marks
    };
    let mut rows: Vec<u32> = Vec::new();
    let (mut stated, mut hidden): (Vec<Vec<f32>>, Vec<Vec<f32>>) = Default::default();
    for user in &synth.users {
        let Some(row) = index.get(&user.user) else {
            continue;
        };
        let known = marked(&mut user.stated_likes());
        if known.iter().any(|x| *x > 0.0) {
            rows.push(*row as u32);
            stated.push(known);
            hidden.push(marked(&mut user.hidden_likes.iter()));
        }
    }
    if rows.is_empty() {
        return Ok(());
    }
    let names = spoken_names(model)?;
    let kinds: Vec<usize> = words.iter().map(|a| a.edit_type() as usize).collect();
    let inputs = vectors.index_select(&Tensor::new(&rows[..], vectors.device())?, 0)?;
    let users: Vec<Vec<f64>> = soft.unit(&inputs)?.to_dtype(DType::F64)?.to_vec2()?;
    let silence = spoken_name(model, "nothing")?;
    let rounds = rounds(stated, hidden);
    speak(
        params,
        &soft.config,
        (&users, &rounds),
        &kinds,
        (&names, &silence),
    )
}

/// What the rounds of [`start_from_words`] learn, from who stated what and who hides what.
fn rounds(stated: Vec<Vec<f32>>, hidden: Vec<Vec<f32>>) -> [Round; ROUNDS] {
    let hides = |marks: &Vec<f32>| marks.iter().any(|x| *x > 0.0);
    let all = vec![true; stated.len()];
    let (guessed, known) = match hidden.iter().any(hides) {
        true => {
            let of_user = |(hidden, stated): (&Vec<f32>, &Vec<f32>)| -> Vec<f32> {
                let targets = hidden.iter().zip(stated);
                match hides(hidden) {
                    true => targets.map(|(h, s)| h + NOT_GUESSED.0 * s).collect(),
                    false => targets.map(|_| NOT_GUESSED.1).collect(),
                }
            };
            let guessed = hidden.iter().zip(&stated).map(of_user).collect();
            (guessed, hidden.iter().map(hides).collect())
        }
        false => (stated.clone(), all.clone()),
    };
    let newcomers: Vec<bool> = known.iter().map(|known| !known).collect();
    let said = stated.iter().zip(&newcomers).map(|(s, new)| match new {
        true => s.clone(),
        false => vec![0.0; s.len()],
    });
    [
        Round {
            targets: guessed,
            speaks_to: known,
            spoken: 0.9,
            by_kind: true,
        },
        Round {
            targets: said.collect(),
            speaks_to: newcomers,
            spoken: 0.25,
            by_kind: true,
        },
        Round {
            targets: stated,
            speaks_to: all,
            spoken: 1.0,
            by_kind: false,
        },
    ]
}

/// A text as one token: the mean of the model's embeddings of its tokens, in the soft prompt's
/// own unit, the size of a token.
fn spoken_name(model: &LanguageModel, text: &str) -> Result<Vec<f32>> {
    let ids = model.tokenizer.encode(&format!(" {text}"))?;
    let name = model.embed_tokens(&ids)?.to_dtype(DType::F32)?.mean(1)?;
    let mut name = name.flatten_all()?.to_vec1::<f32>()?;
    let size = (name.iter().map(|x| x * x).sum::<f32>() / name.len() as f32).sqrt();
    name.iter_mut().for_each(|x| *x /= size.max(1e-12));
    Ok(name)
}

/// What each attribute of the vocabulary is called, as one token.
fn spoken_names(model: &LanguageModel) -> Result<Vec<Vec<f32>>> {
    let all = vocabulary::all().iter();
    all.map(|a| spoken_name(model, a.name)).collect()
}

/// The size of a token that says nothing. Not 0: a token of zeros at the front of a sequence stays
/// 0 through all layers, and each layer's norm multiplies its gradient by hundreds.
const SILENT: f32 = 0.5;

/// How like its name a soft token must be, as a cosine, to be taken for it, and how large, as a
/// share of the soft prompt's scale.
const TAKEN_FOR: (f32, f32) = (0.5, 0.7);

/// The attributes whose names a user's soft tokens are, in the order of the tokens; numbers of
/// `names`.
fn spoken(tokens: &[Vec<f32>], names: &[Vec<f32>], scale: f64) -> Vec<usize> {
    let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut found = Vec::new();
    for token in tokens {
        let length = dot(token, token).sqrt();
        let size = length / (token.len() as f32).sqrt() / scale as f32;
        let close =
            |name: &Vec<f32>| dot(token, name) / (length * dot(name, name).sqrt()).max(1e-12);
        let nearest =
            (0..names.len()).max_by(|a, b| close(&names[*a]).total_cmp(&close(&names[*b])));
        if let Some(a) = nearest
            && size > TAKEN_FOR.1
            && close(&names[a]) > TAKEN_FOR.0
            && !found.contains(&a)
        {
            found.push(a);
        }
    }
    found
}

/// How often a completion to learn reading by takes up, second, something that the user said.
const TAKES_UP_TWO: f32 = 0.75;

/// How many of the prompts to learn reading by hold a wish: what the user says now goes before
/// what is known or guessed, or a policy that reads its soft prompt hears nothing else.
const WISHES: f32 = 0.33;

/// What a completion to learn reading by takes up: `first`, and most often ([`TAKES_UP_TWO`])
/// something of what was `stated`. One of the two adds an object: a second change to the whole
/// picture, say of its colours after its style, hides the first, or what the picture shows.
/// Numbers of the vocabulary.
fn taken_up(first: usize, stated: &[usize], random: &mut Philox) -> Vec<&'static Attribute> {
    let all = vocabulary::all();
    let adds = |a: &Attribute| a.edit_type() == EditType::ObjectAddition;
    let mut found = vec![&all[first]];
    let others = stated.iter().map(|other| &all[*other]);
    let others: Vec<&Attribute> = others.filter(|o| adds(o) != adds(&all[first])).collect();
    if random.uniform() < TAKES_UP_TWO {
        found.extend(random.choose(&others));
    }
    found
}

/// Prompts to learn reading by, and the row of each one's user: the completions take up what the
/// user's own soft prompt names and the user has not said (or, where nothing is hidden, has said),
/// and beside it, most often, something that the user did say, by the soft prompt or in words:
/// most guesses are wrong, and what was said is not. A share of them ([`WISHES`]) holds a wish,
/// which the completion follows.
///
/// They say nothing of what people prefer, and so teach in some hundred prompts what preferences,
/// of which one in ten agrees with the soft prompt, do not in a thousand. The profile is in words
/// beside it in the usual share of them; newcomers are told what they said, whether the soft
/// prompt says it or the words do, as is anybody of whom nothing is guessed.
fn reading_groups(
    model: &LanguageModel,
    synth: &Synth,
    (index, vectors): (&BTreeMap<String, usize>, &Tensor),
    soft: &SoftPrompt,
    options: &RunOptions,
) -> Result<(Vec<SftGroup>, Vec<u32>)> {
    let (names, template) = (spoken_names(model)?, template(model)?);
    let profiles = options.tweaks.profiles.unwrap_or(PROFILES);
    let mut said: Vec<Vec<usize>> = Vec::with_capacity(index.len());
    for first in (0..index.len()).step_by(256) {
        let count = 256.min(index.len() - first);
        let tokens = soft.forward(&vectors.narrow(0, first, count)?)?;
        let tokens: Vec<Vec<Vec<f32>>> = tokens.to_dtype(DType::F32)?.to_vec3()?;
        said.extend(tokens.iter().map(|t| spoken(t, &names, soft.config.scale)));
    }
    let objects = synth.captions.iter();
    let objects = objects.map(|c| (c.caption.as_str(), c.object.as_str()));
    let objects: BTreeMap<&str, &str> = objects.collect();
    let hides = synth.users.iter().any(|u| !u.hidden_likes.is_empty());
    let (mut groups, mut users) = (Vec::new(), Vec::new());
    for user in &synth.users {
        let Some(row) = index.get(&user.user) else {
            continue;
        };
        let newcomer = hides && user.hidden_likes.is_empty();
        let of = |stated: bool| -> Vec<usize> {
            let own = said[*row].iter().copied().filter(|a| {
                let name = vocabulary::all()[*a].name;
                let likes = user.stated_likes().any(|l| l == name);
                likes == stated && !user.dislikes.iter().any(|l| l == name)
            });
            own.collect()
        };
        // A guess is worth more than what one has said oneself, where there is one.
        let mut own = of(newcomer || !hides);
        if own.is_empty() {
            own = of(true);
        }
        // The last caption is about what is held out.
        for caption in &user.captions[..user.captions.len().saturating_sub(1)] {
            let stream = 0x7265_6164_0000_0000 | groups.len() as u64;
            let mut random = Philox::new(options.seed, stream);
            let text = training_text(user, caption, profiles, &mut random);
            let mut own = own.clone();
            let in_words = text.likes.iter().filter_map(|l| vocabulary::index_of(l));
            let in_words: BTreeSet<usize> = in_words.collect();
            // Newcomers are told what they said, by whichever of the two says it.
            if newcomer || own.is_empty() {
                own.extend(&in_words);
                own.sort_unstable();
                own.dedup();
            }
            if own.is_empty() {
                continue;
            }
            let stated: Vec<usize> = in_words.into_iter().chain(of(true)).collect();
            let object = objects.get(caption.as_str()).copied().unwrap_or("subject");
            let object = format!("the {object}");
            let liked = own.iter().chain(&stated).map(|a| &vocabulary::all()[*a]);
            let liked: Vec<&Attribute> = liked.collect();
            let wishes = random.uniform() < WISHES;
            let wish = wishes.then(|| lesson(&liked, &mut random)).flatten();
            let wished = wish.as_ref().map(|wish| wish.attribute.name);
            let tone = wish.as_ref().and_then(|wish| wish.tone);
            let text = PromptText {
                cue: wish.as_ref().map(|wish| wish.cue.as_str()),
                ..text
            };
            // A wish is followed once; without one, all that is the user's own has its turn.
            let main = wished.and_then(vocabulary::index_of);
            let mains: Vec<usize> = main.map_or(own, |wished| vec![wished]);
            let answer = |a: &usize| {
                let attributes = taken_up(*a, &stated, &mut random);
                let words = grammar::instruction(&mut random, &object, &attributes, tone);
                answer_ids(&model.tokenizer, &words)
            };
            groups.push(SftGroup {
                completions: mains.iter().map(answer).collect::<Result<_>>()?,
                prompt: prompt_ids(&model.tokenizer, template, &text)?,
            });
            users.push(*row as u32);
        }
    }
    match groups.is_empty() {
        true => Err(Error::BadRequest(
            "the soft prompt names no attribute of the vocabulary: there is nothing to read".into(),
        )),
        false => Ok((groups, users)),
    }
}

/// Sets a soft prompt to the detectors of some rounds, which say the attributes' `names`, or
/// `silence` where none is likely. `users` are embeddings as the first map takes them; `kinds`
/// has the number of each attribute's kind of edit.
fn speak(
    params: &Params,
    config: &SoftPromptConfig,
    (users, rounds): (&[Vec<f64>], &[Round; ROUNDS]),
    kinds: &[usize],
    (names, silence): (&[Vec<f32>], &[f32]),
) -> Result<()> {
    let (n, d, tokens, hidden) = (names.len(), config.embedding, config.tokens, config.hidden);
    // The token that speaks of an attribute.
    let first_tokens = EditType::ALL.len().min(tokens - 1);
    let token_of = |attribute: usize, by_kind: bool| match by_kind {
        true => kinds[attribute] % first_tokens,
        false => first_tokens + kinds[attribute] * (tokens - first_tokens) / EditType::ALL.len(),
    };
    let units = ROUNDS * n;
    let users: Vec<&[f64]> = users.iter().map(Vec::as_slice).collect();
    let mut first = Vec::with_capacity(units * d);
    let mut biases = vec![0f32; units];
    let mut second = vec![0f32; tokens * hidden * units];
    for (r, round) in rounds.iter().enumerate() {
        if !round.speaks_to.contains(&true) {
            first.extend(std::iter::repeat_n(0f32, n * d));
            continue;
        }
        let targets: Vec<&[f32]> = round.targets.iter().map(Vec::as_slice).collect();
        let (map, bias) = ridge(&users, &targets, WORDS_RIDGE * users.len() as f64);
        let likely = |user: &[f64], a: usize| -> f64 {
            let weights = map[a * d..][..d].iter().zip(user);
            let dot: f64 = weights.map(|(w, x)| f64::from(*w) * x).sum();
            dot + f64::from(bias[a])
        };
        let spoken_to: Vec<&[f64]> = (users.iter().zip(&round.speaks_to))
            .filter_map(|(user, speaks)| speaks.then_some(*user))
            .collect();
        for token in 0..tokens {
            let spoken: Vec<usize> = (0..n)
                .filter(|a| token_of(*a, round.by_kind) == token)
                .collect();
            let of_user = |user: &&[f64]| -> Vec<f64> {
                let user = *user;
                spoken.iter().map(|a| likely(user, *a)).collect()
            };
            let mut all: Vec<f64> = spoken_to.iter().flat_map(of_user).collect();
            all.sort_by(|a, b| b.total_cmp(a));
            let passed = (round.spoken * spoken_to.len() as f64) as usize;
            let threshold = all.get(passed).copied().unwrap_or(f64::INFINITY);
            for a in spoken {
                let above = f64::from(bias[a]) - threshold;
                let unit = r * n + a;
                biases[unit] = (STEEPNESS * above).max(-1e4) as f32;
                for (i, x) in names[a].iter().enumerate() {
                    second[(token * hidden + i) * units + unit] = *x;
                }
            }
        }
        first.extend(map.iter().map(|w| (f64::from(*w) * STEEPNESS) as f32));
    }
    let (width, device) = (tokens * hidden, &Device::Cpu);
    let silent: Vec<f32> = silence.iter().map(|x| x * SILENT).collect();
    let silent = silent.repeat(tokens);
    let values = [
        ("mlp.0.weight", Tensor::from_vec(first, (units, d), device)?),
        ("mlp.0.bias", Tensor::from_vec(biases, units, device)?),
        (
            "mlp.2.weight",
            Tensor::from_vec(second, (width, units), device)?,
        ),
        ("mlp.2.bias", Tensor::from_vec(silent, width, device)?),
    ];
    for (name, value) in values {
        let missing = || Error::bad_model("soft prompt", format!("has no {name}"));
        let var = params.get(name).ok_or_else(missing)?;
        var.set(&value.to_device(var.as_tensor().device())?)?;
    }
    Ok(())
}

/// The linear map from rows x (d numbers each) to rows y (m numbers each) with the least squared
/// error plus `penalty` times the squares of the map: its matrix (m, d) and its bias (m), which
/// is not penalised. Without rows both are empty.
fn ridge(x: &[&[f64]], y: &[&[f32]], penalty: f64) -> (Vec<f32>, Vec<f32>) {
    let (Some(d), Some(m)) = (x.first().map(|x| x.len()), y.first().map(|y| y.len())) else {
        return (Vec::new(), Vec::new());
    };
    let n = x.len() as f64;
    let mean_x: Vec<f64> = (0..d)
        .map(|i| x.iter().map(|x| x[i]).sum::<f64>() / n)
        .collect();
    let mean_y: Vec<f64> = (0..m)
        .map(|j| y.iter().map(|y| f64::from(y[j])).sum::<f64>() / n)
        .collect();
    // Normal equations: (XᵀX + penalty) W = XᵀY, both about their means.
    let (mut square, mut right) = (vec![0f64; d * d], vec![0f64; d * m]);
    for (x, y) in x.iter().zip(y) {
        for i in 0..d {
            let centred = x[i] - mean_x[i];
            let row = &mut square[i * d..][..=i];
            for (sum, (x, mean)) in row.iter_mut().zip(x.iter().zip(&mean_x)) {
                *sum += centred * (x - mean);
            }
            let row = &mut right[i * m..][..m];
            for (sum, (y, mean)) in row.iter_mut().zip(y.iter().zip(&mean_y)) {
                *sum += centred * (f64::from(*y) - mean);
            }
        }
    }
    // Cholesky's factor in the lower triangle, then both triangular systems in place.
    for i in 0..d {
        square[i * d + i] += penalty.max(1e-9);
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| square[i * d + k] * square[j * d + k]).sum();
            let left = square[i * d + j] - dot;
            square[i * d + j] = match i == j {
                true => left.sqrt(),
                false => left / square[j * d + j],
            };
        }
    }
    let mut solve = |i: usize, others: &mut dyn Iterator<Item = (usize, f64)>| {
        for (k, factor) in others {
            for j in 0..m {
                right[i * m + j] -= factor * right[k * m + j];
            }
        }
        let diagonal = square[i * d + i];
        right[i * m..][..m].iter_mut().for_each(|v| *v /= diagonal);
    };
    for i in 0..d {
        solve(i, &mut (0..i).map(|k| (k, square[i * d + k])));
    }
    for i in (0..d).rev() {
        solve(i, &mut (i + 1..d).map(|k| (k, square[k * d + i])));
    }
    let mut map = vec![0f32; m * d];
    let mut bias = mean_y;
    for (i, mean) in mean_x.iter().enumerate() {
        for j in 0..m {
            map[j * d + i] = right[i * m + j] as f32;
            bias[j] -= mean * right[i * m + j];
        }
    }
    (map, bias.into_iter().map(|b| b as f32).collect())
}

/// Row numbers, embeddings (rows, d) and neighbours with their overlaps.
type Surroundings = (BTreeMap<String, usize>, Tensor, Vec<Vec<(usize, f64)>>);

/// Everyone who has pairs, and their neighbours. Held-out users are nobody's neighbours.
fn surroundings(
    snapshots: &[Snapshot],
    synth: &Synth,
    groups: &[PairGroup],
    k: usize,
) -> Result<Surroundings> {
    let failed = |e: simpatico_storage::StoreError| Error::BadRequest(e.to_string());
    let held: BTreeSet<&String> = synth.splits.held_out_users.iter().collect();
    let home = |user: &str| home(snapshots, user).map(|n| &snapshots[n]);
    let asked: BTreeSet<&str> = groups.iter().map(|g| g.user.as_str()).collect();
    let mut near: BTreeMap<&str, Vec<(&str, u32)>> = BTreeMap::new();
    for user in asked {
        let Some(snapshot) = home(user) else {
            return Err(Error::BadRequest(format!(
                "{user:?} has pairs but is in no store: the collaborative form needs the likes and dislikes of everyone it learns from; ingest them first"
            )));
        };
        let mut overlaps = snapshot
            .overlaps(user, k, OverlapMode::Shared)
            .map_err(failed)?;
        // A neighbour's embedding is read where the neighbour is first found.
        overlaps.retain(|(v, _)| {
            !held.contains(&v.to_string()) && home(v).is_some_and(|s| std::ptr::eq(s, snapshot))
        });
        near.insert(user, overlaps);
    }
    let mut names: BTreeSet<&str> = near.keys().copied().collect();
    names.extend(near.values().flatten().map(|(v, _)| *v));
    let index: BTreeMap<String, usize> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.to_string(), i))
        .collect();
    let mut rows = Vec::with_capacity(names.len());
    for name in &names {
        let Some(snapshot) = home(name) else { continue };
        let embedding = snapshot.embedding(name).map_err(|e| {
            Error::BadRequest(format!(
                "the embedding of {name}: {e}; run `simpatico featurize`"
            ))
        })?;
        rows.push(embedding.vector);
    }
    let mut neighbors = vec![Vec::new(); index.len()];
    for (user, overlaps) in near {
        neighbors[index[user]] = overlaps
            .into_iter()
            .map(|(v, overlap)| (index[v], f64::from(overlap)))
            .collect();
    }
    Ok((index, Tensor::new(rows, &Device::Cpu)?, neighbors))
}

/// Pairs that answers gave, in tokens: each once with the profile in words as it is now, once
/// with the caption alone.
fn recorded_groups(
    model: &LanguageModel,
    snapshots: &[Snapshot],
    pairs: &[PreferencePair],
) -> Result<Vec<PairGroup>> {
    let template = template(model)?;
    let mut sets: BTreeMap<(&str, &str), Vec<TokenPair>> = BTreeMap::new();
    for pair in pairs {
        let tokens = TokenPair {
            chosen: answer_ids(&model.tokenizer, &pair.chosen)?,
            rejected: answer_ids(&model.tokenizer, &pair.rejected)?,
        };
        sets.entry((&pair.user, &pair.caption))
            .or_default()
            .push(tokens);
    }
    let mut groups = Vec::new();
    for ((user, caption), pairs) in sets {
        let mut events = match snapshots.iter().find(|s| s.has_user(user)) {
            Some(snapshot) => snapshot
                .registers(user)
                .map_err(|e| Error::BadRequest(e.to_string()))?,
            None => Vec::new(),
        };
        events.sort_by(|a, b| (b.at, &b.id, &b.attribute).cmp(&(a.at, &a.id, &a.attribute)));
        let of = |polarity: Polarity, most: usize| -> Vec<&str> {
            let those = events.iter().filter(|e| e.polarity == polarity);
            those.map(|e| e.attribute.as_str()).take(most).collect()
        };
        let profile = PromptText {
            likes: of(Polarity::Like, 8),
            dislikes: of(Polarity::Dislike, 4),
            caption,
            cue: None,
        };
        let alone = PromptText {
            caption,
            ..PromptText::default()
        };
        for text in [profile, alone] {
            groups.push(PairGroup {
                user: user.to_string(),
                prompt: prompt_ids(&model.tokenizer, template, &text)?,
                pairs: pairs.clone(),
            });
        }
    }
    Ok(groups)
}

/// The root mean square of the model's token embeddings: the size of a soft token.
fn embedding_size(model: &LanguageModel) -> Result<f64> {
    let n = model.decoder.config.vocab.min(2000) as u32;
    let rows = model.embed_tokens(&(n / 2..n).collect::<Vec<u32>>())?;
    let mean = rows.to_dtype(DType::F32)?.sqr()?.mean_all()?;
    Ok(f64::from(mean.to_scalar::<f32>()?).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forty attributes of six kinds; users who like three of them, whose embedding is the
    /// likes' mean vector, and who would also like the attribute after the first. Every third is a
    /// newcomer, of whom nothing else is known, and looks it.
    #[test]
    fn a_soft_prompt_that_starts_from_words_names_what_goes_with_likes_and_newcomers_own() {
        let (n, d, hidden) = (40, 24, 16);
        let mut random = Philox::new(9, 0);
        let vectors = |n: usize, d: usize, random: &mut Philox| -> Vec<Vec<f32>> {
            let one = |_| -> Vec<f32> { (0..d).map(|_| random.normal()).collect() };
            (0..n).map(one).collect()
        };
        let (looks, names) = (
            vectors(n, d, &mut random),
            vectors(n + 1, hidden, &mut random),
        );
        let kinds: Vec<usize> = (0..n).map(|a| a % 6).collect();
        let config = SoftPromptConfig {
            embedding: d + 1,
            inner: ROUNDS * n,
            tokens: 8,
            hidden,
            scale: 0.5,
            normalize: true,
            bounded: true,
            everyone: None,
        };
        let (soft, params) = SoftPrompt::fresh(config.clone(), 1, &Device::Cpu).unwrap();
        let (mut tastes, mut users) = (Vec::new(), Vec::new());
        for user in 0..1500 {
            let likes: Vec<usize> = (0..3).map(|_| random.below(n as u32) as usize).collect();
            let mean = |i: usize| likes.iter().map(|a| looks[*a][i]).sum::<f32>() / 3.0;
            let mut looks: Vec<f32> = (0..d).map(mean).collect();
            looks.push(if user % 3 == 0 { 2.0 } else { 0.0 });
            users.push(looks);
            tastes.push(likes);
        }
        let inputs = soft
            .unit(&Tensor::new(users, &Device::Cpu).unwrap())
            .unwrap();
        let inputs: Vec<Vec<f64>> = inputs.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
        let marks = |of: &[usize]| -> Vec<f32> {
            (0..n)
                .map(|a| f32::from(u8::from(of.contains(&a))))
                .collect()
        };
        let hidden_likes = |(user, likes): (usize, &Vec<usize>)| match user % 3 {
            0 => marks(&[]),
            _ => marks(&[(likes[0] + 1) % n]),
        };
        let learnt = 1200;
        let rounds = rounds(
            tastes[..learnt].iter().map(|t| marks(t)).collect(),
            tastes[..learnt]
                .iter()
                .enumerate()
                .map(hidden_likes)
                .collect(),
        );
        speak(
            &params,
            &config,
            (&inputs[..learnt], &rounds),
            &kinds,
            (&names[..n], &names[n]),
        )
        .unwrap();
        // What the tokens of users it has not seen say, by the name that is nearest: guesses for
        // those who are known, then newcomers' own likes, then anybody's stated ones.
        let (mut told, mut right) = ([0; 3], [0; 3]);
        for (i, likes) in tastes.iter().enumerate().skip(learnt) {
            let x = Tensor::new(vec![inputs[i].clone()], &Device::Cpu).unwrap();
            let tokens = soft.forward(&x.to_dtype(DType::F32).unwrap()).unwrap();
            let tokens: Vec<Vec<f32>> = tokens.squeeze(0).unwrap().to_vec2().unwrap();
            for (t, token) in tokens.iter().enumerate() {
                let size = (token.iter().map(|x| x * x).sum::<f32>() / hidden as f32).sqrt();
                assert!(size <= 0.5, "bounded by the scale: {size}");
                assert!(size > 0.1, "never of zeros: {size}");
                let close = |name: &Vec<f32>| -> f32 {
                    let dot: f32 = name.iter().zip(token).map(|(a, b)| a * b).sum();
                    dot / name.iter().map(|x| x * x).sum::<f32>().sqrt()
                };
                let said = (0..=n).max_by(|a, b| close(&names[*a]).total_cmp(&close(&names[*b])));
                let Some(said) = said.filter(|said| *said < n) else {
                    continue;
                };
                let round = match (t >= 6, i % 3 == 0) {
                    (true, _) => 2,
                    (false, newcomer) => usize::from(newcomer),
                };
                let goes = likes.iter().any(|l| (l + 1) % n == said);
                told[round] += 1;
                right[round] += usize::from(match round {
                    0 => goes,
                    _ => likes.contains(&said),
                });
            }
        }
        // Chance is 3 in 40.
        assert!(told.iter().all(|t| *t > 60), "{told:?}");
        assert!(
            2 * right[0] > told[0] && 3 * right[1] > 2 * told[1] && 3 * right[2] > 2 * told[2],
            "{right:?} of {told:?}"
        );
    }

    #[test]
    fn a_second_thing_was_said_and_one_of_the_two_is_added() {
        let all = vocabulary::all();
        let adds = |a: usize| all[a].edit_type() == EditType::ObjectAddition;
        let stated: Vec<usize> = (0..all.len()).step_by(7).collect();
        let mut random = Philox::new(3, 0);
        let number = |a: &Attribute| vocabulary::index_of(a.name).unwrap();
        for first in [true, false].map(|kind| (0..all.len()).find(|a| adds(*a) == kind).unwrap()) {
            let mut two = 0;
            for _ in 0..1000 {
                let found = taken_up(first, &stated, &mut random);
                assert_eq!(number(found[0]), first);
                if let [_, second] = found[..] {
                    let second = number(second);
                    assert!(stated.contains(&second) && adds(second) != adds(first));
                    two += 1;
                }
            }
            assert!((700..800).contains(&two), "{two}");
            // Nothing said, or nothing that goes with the first: one alone.
            let alike: Vec<usize> = (0..all.len()).filter(|a| adds(*a) == adds(first)).collect();
            for alone in [&[][..], &alike] {
                assert_eq!(taken_up(first, alone, &mut random).len(), 1);
            }
        }
    }

    #[test]
    fn ridge_finds_a_linear_map_and_gives_way_to_its_penalty() {
        let mut random = Philox::new(5, 0);
        let rows: Vec<Vec<f64>> = (0..60)
            .map(|_| (0..3).map(|_| f64::from(random.normal()) + 2.0).collect())
            .collect();
        let map = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]];
        let says = |x: &Vec<f64>| -> Vec<f32> {
            let row = |(i, m): (usize, &[f64; 3])| {
                let dot: f64 = m.iter().zip(x).map(|(m, x)| m * x).sum();
                (dot + i as f64) as f32
            };
            map.iter().enumerate().map(row).collect()
        };
        let targets: Vec<Vec<f32>> = rows.iter().map(says).collect();
        let x: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        let y: Vec<&[f32]> = targets.iter().map(Vec::as_slice).collect();
        let (found, bias) = ridge(&x, &y, 0.0);
        let apart = found.iter().zip(map.iter().flatten());
        assert!(
            apart
                .map(|(a, b)| (f64::from(*a) - b).abs())
                .all(|d| d < 1e-4)
        );
        assert!((bias[0] - 0.0).abs() < 1e-4 && (bias[1] - 1.0).abs() < 1e-4);
        // An endless penalty leaves the mean.
        let (none, bias) = ridge(&x, &y, 1e12);
        let mean = targets.iter().map(|t| t[0]).sum::<f32>() / 60.0;
        assert!(none.iter().all(|v| v.abs() < 1e-4) && (bias[0] - mean).abs() < 1e-3);
        assert_eq!(ridge(&[], &[], 1.0), (Vec::new(), Vec::new()));
    }
}
