//! Requests for instructions and edits, and what comes back, as plain values.

use serde::{Deserialize, Serialize};

/// Asks for one personal instruction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InstructRequest {
    /// For whom. A user unknown to the store gets the generic instruction.
    pub user: String,
    /// What the picture shows.
    pub caption: String,
    /// A wish that comes with the request.
    pub cue: Option<String>,
    /// 0 = only the user's own circle, 1 = mostly tastes beyond it.
    pub explore: f32,
    /// Chooses among equally good instructions; the same seed gives the same words.
    pub seed: u64,
    /// Sampling temperature; 0 takes the likeliest token each time, and with it often the same like
    /// for all of a user's pictures.
    pub temperature: f32,
    /// The most tokens the instruction may have. `None`: the bundle's setting.
    pub max_tokens: Option<usize>,
}

/// The temperature of an instruction unless the request has another; what policies are judged at.
pub const TEMPERATURE: f32 = 0.7;

impl Default for InstructRequest {
    fn default() -> Self {
        Self {
            user: String::new(),
            caption: String::new(),
            cue: None,
            explore: 0.0,
            seed: 0,
            temperature: TEMPERATURE,
            max_tokens: None,
        }
    }
}

/// An instruction, and where it came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instruction {
    /// The sentence that says how to edit the picture.
    pub instruction: String,
    /// What it was made from.
    pub why: Why,
    /// Set where the user was not known well enough to be followed.
    pub fallback: Option<Fallback>,
}

/// Why an answer is less personal than asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fallback {
    /// The user has no edges: the instruction is anyone's.
    Generic,
}

/// What an instruction was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Why {
    /// The user's own likes that bear on the instruction, nearest first.
    pub likes: Vec<String>,
    /// The user's dislikes that were kept out.
    pub dislikes: Vec<String>,
    /// The neighbours counted in, by pseudonym, with their weights.
    pub neighbors: Vec<WeightedNeighbor>,
    /// Attributes that only the neighbours hold and the instruction took up.
    pub from_neighbors: Vec<String>,
    /// What a cue was taken to ask for and the instruction took up. Empty without a cue, and where
    /// it named or meant nothing known by name, or was not followed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wish: Vec<String>,
    /// How much was mixed in from beyond the user's own circle, 0 to 1.
    pub explore: f32,
    /// The store's sequence number the answer was computed at.
    pub as_of: u64,
}

/// A neighbour and its share in an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightedNeighbor {
    /// The neighbour's name, or its pseudonym where the answer leaves the machine.
    pub user: String,
    /// Attributes in common.
    pub overlap: u32,
    /// Its weight among the neighbours; the weights add up to 1.
    pub weight: f64,
}

/// How an edit is carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// From pure noise under the source's Canny edges (the paper's way).
    #[default]
    Canny,
    /// From the noised source (SDEdit), with control where a scale is given.
    Img2img,
    /// RF-Inversion: the source is inverted by a controlled flow, then edited.
    RfInversion,
    /// FlowEdit: from source to target without inversion; needs a caption.
    Flowedit,
}

impl Backend {
    /// The word used on the command line and in provenance.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Canny => "canny",
            Self::Img2img => "img2img",
            Self::RfInversion => "rf-inversion",
            Self::Flowedit => "flowedit",
        }
    }
}

impl std::str::FromStr for Backend {
    type Err = String;
    fn from_str(word: &str) -> Result<Self, String> {
        [
            Self::Canny,
            Self::Img2img,
            Self::RfInversion,
            Self::Flowedit,
        ]
        .into_iter()
        .find(|b| b.as_str() == word)
        .ok_or_else(|| {
            format!("backend: expected canny, img2img, rf-inversion or flowedit, got {word:?}")
        })
    }
}

/// What a control picture shows of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlKind {
    /// Its edges.
    Canny,
    /// Itself.
    Tile,
    /// Itself, out of focus.
    Blur,
    /// Its brightness.
    Grey,
    /// Its colours, in squares.
    Palette,
}

impl ControlKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [
        Self::Canny,
        Self::Tile,
        Self::Blur,
        Self::Grey,
        Self::Palette,
    ];

    /// The word used on the command line and in provenance.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Canny => "canny",
            Self::Tile => "tile",
            Self::Blur => "blur",
            Self::Grey => "grey",
            Self::Palette => "palette",
        }
    }
}

impl std::str::FromStr for ControlKind {
    type Err = String;
    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.as_str() == word)
            .ok_or_else(|| {
                format!("control: expected canny, tile, blur, grey or palette, got {word:?}")
            })
    }
}

/// The settings of one edit. `None` everywhere means the bundle's own setting.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EditSettings {
    /// How the source enters.
    pub backend: Option<Backend>,
    /// Sampling steps, 1 to 1,000; kept whatever the strength.
    pub steps: Option<usize>,
    /// The guidance scalar given to the model.
    pub guidance: Option<f32>,
    /// True classifier-free guidance; 1 or `None` runs the model once a step.
    pub true_cfg: Option<f32>,
    /// The share of the steps after which true guidance ends, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub true_cfg_end: Option<f32>,
    /// What the control picture shows. The backend `canny` has edges unless this says otherwise.
    pub control: Option<ControlKind>,
    /// How strongly the control picture holds, 0 to 2.
    pub control_scale: Option<f32>,
    /// The share of the steps after which control ends, 0 to 1.
    pub control_end: Option<f32>,
    /// How far from the source: 0 returns it, 1 starts from pure noise.
    pub strength: Option<f32>,
    /// The start noise level sigma itself, in place of `strength`.
    pub noise_level: Option<f32>,
    /// Output width and height in pixels; `None` keeps the source's.
    pub size: Option<(u32, u32)>,
    /// First-block cache threshold; `None` computes every step exactly.
    pub cache_threshold: Option<f32>,
    /// How much of the source's fine detail comes back where the model, which works on fewer
    /// pixels, changed nothing; 0 to 1, `None`: all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fine_detail: Option<f32>,
    /// The seed of the first picture; picture i of a call uses (seed, i).
    pub seed: u64,
    /// How many pictures.
    pub count: usize,
}

/// All that is needed to make the same pictures again. Written as JSON beside the picture
/// and inside the PNG.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Provenance {
    /// Version of this record.
    pub version: u32,
    /// Names this edit, for `feedback`.
    pub edit_id: String,
    /// What made it.
    pub software: String,
    /// Not the user's name: a keyed digest of it that only the store can resolve.
    pub user_pseudonym: Option<String>,
    /// What was carried out, in one text.
    pub instruction: String,
    /// Each instruction, where the caller gave several; they were carried out together.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub instructions: Vec<String>,
    /// The caption given.
    pub caption: Option<String>,
    /// The cue given.
    pub cue: Option<String>,
    /// Where the instruction came from; neighbours by pseudonym.
    pub why: Option<Why>,
    /// Set where the instruction was anyone's.
    pub fallback: Option<Fallback>,
    /// The settings, with every default filled in.
    pub settings: EditSettings,
    /// Which of the call's pictures this is, from 0.
    pub index: usize,
    /// SHA-256 of the source file, if there was one.
    pub source_sha256: Option<String>,
    /// SHA-256 of the mask file, if there was one.
    pub mask_sha256: Option<String>,
    /// The width of the mask's soft edge in pixels. Records of version 1 do not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask_soften: Option<u32>,
    /// The bundle's name.
    pub bundle: String,
    /// Every model file that took part: path within the bundle and SHA-256.
    pub models: Vec<ModelDigest>,
    /// The LoRAs that were added to the picture model.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<LoraUse>,
    /// The device it ran on.
    pub device: String,
    /// Always `trainedAlgorithmicMedia` or `compositeWithTrainedAlgorithmicMedia` (IPTC).
    pub digital_source_type: String,
}

/// One model file's digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelDigest {
    /// Path within the bundle.
    pub file: String,
    /// Lower-case hex.
    pub sha256: String,
}

/// A LoRA that took part in making a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraUse {
    /// The file's name.
    pub file: String,
    /// Its digest in lower-case hex.
    pub sha256: String,
    /// How many times what the file says was added.
    pub strength: f32,
}

/// A preference pair: what a user would rather have heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreferencePair {
    /// Whose preference.
    pub user: String,
    /// The picture's caption.
    pub caption: String,
    /// The instruction preferred.
    pub chosen: String,
    /// The instruction rejected.
    pub rejected: String,
    /// Where the pair comes from: "synth", "feedback", "import".
    #[serde(default)]
    pub source: String,
}

/// One edit that was made, kept so that feedback on it means something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EditRecord {
    /// The edit's id.
    pub id: String,
    /// For whom it was made.
    pub user: String,
    /// The caption given.
    pub caption: String,
    /// The instruction carried out.
    pub instruction: String,
    /// Attributes the instruction took up: feedback turns into events on these.
    pub attributes: Vec<String>,
    /// When, in milliseconds since 1970.
    pub at: i64,
    /// `Some(true)` accepted, `Some(false)` rejected, `None` not answered yet.
    pub accepted: Option<bool>,
}
