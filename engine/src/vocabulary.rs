//! The attribute vocabulary: what tastes are made of.
//!
//! About 300 attributes ("rustic wood", "falling snow"), each with the edit it asks for, the
//! taste clusters it belongs to (overlapping), how common it is (a long tail), several ways to
//! say it, and, where a drawing program can carry it out exactly, its [`Look`]. One table serves
//! three readers: `synth` draws users and instructions from it, the policy recognises attributes
//! in the text it wrote, and the renderer paints before/after pairs from the looks, so that what
//! the policy says means something to the small picture model.
//!
//! The cluster structure carries associations that no single name gives away: nobody would
//! guess from "leather sofa" that its lovers also like "exposed beams" and "a stone fireplace";
//! their neighbours show it.
//!
//! What is not here: users, events, randomness.
//!
//! ```
//! use simpatico_engine::vocabulary::{self, EditType};
//! let wood = vocabulary::find("rustic wood").unwrap();
//! assert_eq!(wood.edit_type(), EditType::Texture);
//! assert!(wood.wordings().count() >= 2);
//! assert!(wood.look.is_some());
//! ```

use Category::*;
use Cluster::*;
use std::collections::HashMap;
use std::sync::OnceLock;

/// A colour as 0xRRGGBB.
pub type Rgb = u32;

/// What an attribute changes in a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Category {
    /// The object's colours.
    Color,
    /// The picture's tone: saturation, contrast, tint.
    Tone,
    /// The manner it is drawn in.
    Style,
    /// A thing put beside or onto the object.
    Object,
    /// What lies behind the object.
    Background,
    /// What the object is made of.
    Material,
    /// What is printed on the object.
    Pattern,
    /// What lies over the whole picture.
    Overlay,
    /// Where the light comes from.
    Light,
}

impl Category {
    /// All categories, in the table's order.
    pub const ALL: [Self; 9] = [
        Color, Tone, Style, Object, Background, Material, Pattern, Overlay, Light,
    ];

    /// The word for it in files and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Color => "color",
            Tone => "tone",
            Style => "style",
            Object => "object",
            Background => "background",
            Material => "material",
            Pattern => "pattern",
            Overlay => "overlay",
            Light => "light",
        }
    }
}

/// The six kinds of edit a user has opinions on. The paper counts six without naming them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EditType {
    /// Colours and tone.
    Color,
    /// The manner it is drawn in.
    Style,
    /// Something is added.
    ObjectAddition,
    /// What lies behind.
    Background,
    /// Materials and patterns.
    Texture,
    /// Overlays and light.
    Overlay,
}

impl EditType {
    /// All six.
    pub const ALL: [Self; 6] = [
        Self::Color,
        Self::Style,
        Self::ObjectAddition,
        Self::Background,
        Self::Texture,
        Self::Overlay,
    ];

    /// The word for it in files and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Color => "color",
            Self::Style => "style",
            Self::ObjectAddition => "object_addition",
            Self::Background => "background",
            Self::Texture => "texture",
            Self::Overlay => "overlay",
        }
    }
}

/// A taste that several attributes share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Cluster {
    Cabin,
    Coastal,
    Cyber,
    Botanic,
    Minimal,
    Retro,
    Gothic,
    Kawaii,
    Steam,
    Cosmic,
    Fantasy,
    Boho,
    Luxury,
    Urban,
    Zen,
    Festive,
    Harvest,
    Tropical,
    Pop,
    Noir,
    Western,
    Painterly,
    Abyss,
    Party,
}

impl Cluster {
    /// All clusters.
    pub const ALL: [Self; 24] = [
        Cabin, Coastal, Cyber, Botanic, Minimal, Retro, Gothic, Kawaii, Steam, Cosmic, Fantasy,
        Boho, Luxury, Urban, Zen, Festive, Harvest, Tropical, Pop, Noir, Western, Painterly, Abyss,
        Party,
    ];

    /// The cluster as a theme a user might name.
    pub fn theme(self) -> &'static str {
        match self {
            Cabin => "mountain cabin",
            Coastal => "seaside",
            Cyber => "cyberpunk",
            Botanic => "botanical",
            Minimal => "Nordic minimalism",
            Retro => "mid-century retro",
            Gothic => "gothic",
            Kawaii => "kawaii",
            Steam => "steampunk",
            Cosmic => "outer space",
            Fantasy => "fairy tale",
            Boho => "bohemian",
            Luxury => "grand luxury",
            Urban => "street art",
            Zen => "Japanese garden",
            Festive => "winter holidays",
            Harvest => "autumn harvest",
            Tropical => "tropical island",
            Pop => "pop art",
            Noir => "film noir",
            Western => "wild west",
            Painterly => "artist's studio",
            Abyss => "deep sea",
            Party => "carnival",
        }
    }

    /// Clusters whose taste rubs this one the wrong way: where dislikes come from.
    pub fn opposites(self) -> &'static [Self] {
        match self {
            Cabin => &[Cyber, Pop, Minimal],
            Coastal => &[Gothic, Steam, Urban],
            Cyber => &[Cabin, Harvest, Painterly],
            Botanic => &[Steam, Urban, Cyber],
            Minimal => &[Party, Boho, Fantasy],
            Retro => &[Cyber, Abyss, Zen],
            Gothic => &[Kawaii, Tropical, Coastal],
            Kawaii => &[Gothic, Noir, Steam],
            Steam => &[Kawaii, Coastal, Botanic],
            Cosmic => &[Western, Harvest, Cabin],
            Fantasy => &[Noir, Minimal, Urban],
            Boho => &[Luxury, Cyber, Minimal],
            Luxury => &[Urban, Western, Boho],
            Urban => &[Zen, Luxury, Botanic],
            Zen => &[Party, Urban, Pop],
            Festive => &[Tropical, Noir, Abyss],
            Harvest => &[Cosmic, Cyber, Tropical],
            Tropical => &[Festive, Gothic, Noir],
            Pop => &[Cabin, Noir, Zen],
            Noir => &[Kawaii, Tropical, Party],
            Western => &[Luxury, Cosmic, Kawaii],
            Painterly => &[Cyber, Pop, Steam],
            Abyss => &[Western, Festive, Retro],
            Party => &[Minimal, Zen, Noir],
        }
    }
}

/// What a drawing program does to carry an attribute out. Colours are the ones to use, exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Look {
    /// The object takes these colours: the first for its main parts, the others in turn.
    Colors(&'static [Rgb]),
    /// The whole picture is graded.
    Tone {
        /// 0 grey, 1 unchanged, 2 twice as colourful.
        saturation: f32,
        /// 1 unchanged; around middle grey.
        contrast: f32,
        /// Added, of 1.
        brightness: f32,
        /// A colour to mix in.
        tint: Rgb,
        /// How much of it, 0 to 1.
        strength: f32,
    },
    /// The picture is redrawn in a manner.
    Style(StyleKind),
    /// A thing is put on or beside the object.
    Prop(PropKind, Rgb),
    /// The background is replaced.
    Background(BackgroundKind, [Rgb; 2]),
    /// The object's surface is replaced.
    Material(MaterialKind, Rgb),
    /// The object's surface is printed on: ground and figure.
    Pattern(PatternKind, [Rgb; 2]),
    /// Something lies over the picture.
    Overlay(OverlayKind, Rgb),
    /// The light changes.
    Light(LightKind, Rgb),
}

/// Manners a program can draw in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum StyleKind {
    Pixels,
    Posterized,
    LineArt,
    Halftone,
    PencilSketch,
    Watercolor,
    Mosaic,
    CelShaded,
    Blueprint,
    Woodcut,
    StainedGlass,
    Pointillist,
    LowPoly,
}

/// Things a program can add.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum PropKind {
    Bow,
    Crown,
    Flower,
    Star,
    Heart,
    Balloon,
    Candle,
    Scarf,
    Ribbon,
    Leaf,
    Moon,
    Sun,
    PartyHat,
    TopHat,
    Glasses,
    Gift,
    Shell,
    Mushroom,
    Cactus,
    Gear,
    Lantern,
    Butterfly,
    Umbrella,
    Planet,
}

/// Backgrounds a program can paint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum BackgroundKind {
    Plain,
    Gradient,
    Planks,
    Bricks,
    Tiles,
    Mountains,
    Sea,
    Forest,
    City,
    Space,
    Dunes,
    Meadow,
    Sunset,
    Clouds,
    Underwater,
    Curtain,
    Sunburst,
    Aurora,
    Bamboo,
    Grid,
}

/// Materials a program can paint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum MaterialKind {
    Wood,
    Metal,
    Stone,
    Marble,
    Glass,
    Fabric,
    Leather,
    Knit,
    Paper,
    Ceramic,
    Fur,
    Ice,
    Wicker,
    Plastic,
    Rust,
    Clay,
    Crystal,
    Moss,
}

/// Patterns a program can print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum PatternKind {
    Stripes,
    Dots,
    Check,
    Plaid,
    Zigzag,
    Stars,
    Hearts,
    Flowers,
    Leaves,
    Waves,
    Spots,
    Tiger,
    Camouflage,
    Triangles,
    Hexagons,
    Scales,
    Swirls,
    Grid,
    Circuit,
    Speckles,
    Diamonds,
}

/// Overlays a program can paint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum OverlayKind {
    Snow,
    Rain,
    Bubbles,
    Confetti,
    Petals,
    Leaves,
    Sparkles,
    Stars,
    Fog,
    Grain,
    Scratches,
    Smoke,
    Fireflies,
    LightLeak,
    Scanlines,
    Vignette,
    Frame,
    Hearts,
    Splatter,
    Embers,
}

/// Lights a program can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum LightKind {
    /// From everywhere, tinted.
    Ambient,
    /// A cone from above, the rest dim.
    Spot,
    /// A bright outline.
    Rim,
    /// From the left, long shadow to the right.
    Side,
    /// A glow around the object.
    Glow,
    /// Dim all over.
    Dim,
    /// Rays from the upper left.
    Rays,
    /// Two colours from left and right: this one and its complement.
    TwoTone,
}

/// One attribute of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Attribute {
    /// Its name, as events carry it. Also the first wording.
    pub name: &'static str,
    /// What it changes.
    pub category: Category,
    /// The tastes it belongs to.
    pub clusters: &'static [Cluster],
    /// 0 common … 4 rare; see [`Attribute::weight`].
    pub rarity: u8,
    more_wordings: &'static str,
    /// How to draw it exactly, where that can be done.
    pub look: Option<Look>,
}

impl Attribute {
    /// How often it comes up, relative to others of its cluster: 0.4 to the power of the rarity.
    pub fn weight(&self) -> f32 {
        0.4f32.powi(i32::from(self.rarity))
    }

    /// Noun phrases that say it, the name first.
    pub fn wordings(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.more_wordings.split('|'))
    }

    /// The kind of edit it asks for.
    pub fn edit_type(&self) -> EditType {
        match self.category {
            Color | Tone => EditType::Color,
            Style => EditType::Style,
            Object => EditType::ObjectAddition,
            Background => EditType::Background,
            Material | Pattern => EditType::Texture,
            Overlay | Light => EditType::Overlay,
        }
    }
}

/// The whole vocabulary, in a fixed order.
pub fn all() -> &'static [Attribute] {
    TABLE
}

/// The attribute of that name.
pub fn find(name: &str) -> Option<&'static Attribute> {
    index_of(name).map(|i| &TABLE[i])
}

/// The position in [`all`] of the attribute of that name.
pub fn index_of(name: &str) -> Option<usize> {
    static INDEX: OnceLock<HashMap<&'static str, usize>> = OnceLock::new();
    INDEX
        .get_or_init(|| TABLE.iter().enumerate().map(|(i, a)| (a.name, i)).collect())
        .get(name)
        .copied()
}

/// The attributes a text names, by any of their wordings, in the order of [`all`]. A wording
/// counts where it stands between word boundaries, whatever its case and in British or American
/// spelling; a leading article is not asked for. Wordings that lie inside a longer one found at
/// the same place do not count.
pub fn mentioned(text: &str) -> Vec<&'static Attribute> {
    let text = spelt(text);
    let mut found: Vec<(usize, usize, usize)> = Vec::new(); // (start, end, attribute)
    for (wording, i) in spelt_wordings() {
        found.extend(word_matches(&text, wording).map(|s| (s, s + wording.len(), *i)));
    }
    let mut kept: Vec<usize> = found
        .iter()
        .filter(|(s, e, _)| {
            !found
                .iter()
                .any(|(s2, e2, _)| s2 <= s && e <= e2 && e2 - s2 > e - s)
        })
        .map(|f| f.2)
        .collect();
    kept.sort_unstable();
    kept.dedup();
    kept.into_iter().map(|i| &TABLE[i]).collect()
}

/// Every wording as texts are compared, without its article, and the number of its attribute. Made
/// once: a sentence is looked through for each try of an instruction, and for each list of likes.
fn spelt_wordings() -> &'static [(String, usize)] {
    static WORDINGS: OnceLock<Vec<(String, usize)>> = OnceLock::new();
    WORDINGS.get_or_init(|| {
        let all = TABLE.iter().enumerate();
        all.flat_map(|(i, a)| a.wordings().map(move |w| (spelt(strip_article(w)), i)))
            .collect()
    })
}

/// A text as texts are compared: in small letters, "colour", "grey" and "cosy" as "color", "gray"
/// and "cozy".
pub fn spelt(text: &str) -> String {
    let american = [("colour", "color"), ("grey", "gray"), ("cosy", "cozy")];
    let text = text.to_lowercase();
    american
        .iter()
        .fold(text, |text, (a, b)| text.replace(a, b))
}

/// The wording without "a", "an" or "the" in front.
pub fn strip_article(wording: &str) -> &str {
    ["a ", "an ", "the "]
        .iter()
        .find_map(|article| wording.strip_prefix(article))
        .unwrap_or(wording)
}

fn word_matches<'a>(text: &'a str, words: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_word = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    text.match_indices(words)
        .map(|(at, _)| at)
        .filter(move |at| {
            let before = at.checked_sub(1).and_then(|i| text.as_bytes().get(i));
            !is_word(before) && !is_word(text.as_bytes().get(at + words.len()))
        })
}

const fn attribute(
    name: &'static str,
    category: Category,
    clusters: &'static [Cluster],
    rarity: u8,
    more_wordings: &'static str,
    look: Option<Look>,
) -> Attribute {
    Attribute {
        name,
        category,
        clusters,
        rarity,
        more_wordings,
        look,
    }
}

const fn color(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    colors: &'static [Rgb],
) -> Attribute {
    attribute(
        name,
        Color,
        clusters,
        rarity,
        wordings,
        Some(Look::Colors(colors)),
    )
}

const fn tone(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    (saturation, contrast, brightness): (f32, f32, f32),
    (tint, strength): (Rgb, f32),
) -> Attribute {
    let look = Look::Tone {
        saturation,
        contrast,
        brightness,
        tint,
        strength,
    };
    attribute(name, Tone, clusters, rarity, wordings, Some(look))
}

const fn style(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: Option<StyleKind>,
) -> Attribute {
    let look = match kind {
        Some(kind) => Some(Look::Style(kind)),
        None => None,
    };
    attribute(name, Style, clusters, rarity, wordings, look)
}

const fn object(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
) -> Attribute {
    attribute(name, Object, clusters, rarity, wordings, None)
}

const fn prop(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: PropKind,
    color: Rgb,
) -> Attribute {
    attribute(
        name,
        Object,
        clusters,
        rarity,
        wordings,
        Some(Look::Prop(kind, color)),
    )
}

const fn scene(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
) -> Attribute {
    attribute(name, Background, clusters, rarity, wordings, None)
}

const fn backdrop(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: BackgroundKind,
    colors: [Rgb; 2],
) -> Attribute {
    attribute(
        name,
        Background,
        clusters,
        rarity,
        wordings,
        Some(Look::Background(kind, colors)),
    )
}

const fn material(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: MaterialKind,
    color: Rgb,
) -> Attribute {
    attribute(
        name,
        Material,
        clusters,
        rarity,
        wordings,
        Some(Look::Material(kind, color)),
    )
}

const fn pattern(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: PatternKind,
    colors: [Rgb; 2],
) -> Attribute {
    attribute(
        name,
        Pattern,
        clusters,
        rarity,
        wordings,
        Some(Look::Pattern(kind, colors)),
    )
}

const fn overlay(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: OverlayKind,
    color: Rgb,
) -> Attribute {
    attribute(
        name,
        Overlay,
        clusters,
        rarity,
        wordings,
        Some(Look::Overlay(kind, color)),
    )
}

const fn light(
    name: &'static str,
    clusters: &'static [Cluster],
    rarity: u8,
    wordings: &'static str,
    kind: LightKind,
    color: Rgb,
) -> Attribute {
    attribute(
        name,
        Light,
        clusters,
        rarity,
        wordings,
        Some(Look::Light(kind, color)),
    )
}

#[rustfmt::skip]
const TABLE: &[Attribute] = &[
    // Colours of the object.
    color("neon colors", &[Cyber, Pop, Party], 0, "bright neon tones|fluorescent neon hues", &[0xff00c8, 0x00f0ff]),
    color("earth tones", &[Cabin, Boho, Western], 0, "warm earthy browns|an earthy palette", &[0x8b5a2b, 0xb08850]),
    color("pastel colors", &[Kawaii, Painterly], 0, "soft pastels|gentle pastel shades", &[0xffc8dd, 0xbde0fe]),
    color("navy and white", &[Coastal], 0, "nautical navy blue and white|crisp navy with white", &[0x14285a, 0xf5f5f0]),
    color("jet black", &[Gothic, Noir], 0, "deep black|pitch black", &[0x101014]),
    color("forest green", &[Cabin, Botanic], 0, "deep woodland green|dark pine green", &[0x1f5c2e]),
    color("sage green", &[Botanic, Minimal, Zen], 1, "a muted sage|soft gray-green", &[0x9caf88]),
    color("pure white", &[Minimal, Luxury], 0, "clean white|bright snowy white", &[0xf8f8f8]),
    color("crimson red", &[Gothic, Festive, Zen], 1, "deep crimson|rich blood red", &[0xa5122a]),
    color("bubblegum pink", &[Kawaii, Pop], 0, "candy pink|sweet bubblegum tones", &[0xff77bc]),
    color("mustard yellow", &[Retro, Harvest], 0, "warm mustard|retro mustard tones", &[0xd4a017]),
    color("burnt orange", &[Harvest, Retro, Western], 0, "deep rusty orange|a burnt pumpkin orange", &[0xcc5500]),
    color("turquoise", &[Tropical, Coastal, Western], 0, "bright turquoise blue|a lagoon turquoise", &[0x30d5c8]),
    color("royal purple", &[Fantasy, Luxury], 1, "regal purple|majestic violet", &[0x6a1fb0]),
    color("rose gold", &[Luxury, Kawaii], 1, "blush rose gold|pinkish gold", &[0xd9a08b]),
    color("midnight blue", &[Cosmic, Noir, Abyss], 0, "deep night blue|dark midnight tones", &[0x141a52]),
    color("teal", &[Abyss, Retro], 1, "a deep teal|blue-green teal tones", &[0x008080]),
    color("coral", &[Tropical, Coastal, Abyss], 1, "warm coral pink|a coral reef pink", &[0xff6f52]),
    color("emerald green", &[Luxury, Fantasy], 1, "jewel-like emerald|brilliant emerald tones", &[0x0a9a55]),
    color("primary colors", &[Pop, Urban], 1, "bold red, yellow and blue|flat primary hues", &[0xe4002b, 0xffd100, 0x0057b8]),
    color("rainbow colors", &[Party, Kawaii], 0, "every color of the rainbow|a full rainbow spectrum", &[0xff3030, 0xffc000, 0x30c040, 0x3070ff, 0x9030e0]),
    color("copper tones", &[Steam, Cabin], 1, "warm copper browns|a coppery sheen of color", &[0xb87333]),
    color("lavender", &[Fantasy, Painterly, Botanic], 1, "a pale lavender|soft lilac tones", &[0xb9a4e0]),
    color("silver gray", &[Noir, Cyber, Minimal], 1, "cool silver|sleek silvery gray", &[0xb4b8c0]),
    color("lime green", &[Tropical, Cyber], 2, "zesty lime|acid lime tones", &[0x9be021]),
    color("terracotta", &[Boho, Western], 1, "a sun-baked terracotta|earthy clay red", &[0xc8643c]),
    color("candy cane red and white", &[Festive], 2, "peppermint red and white|holiday red with white", &[0xd0142c, 0xfafafa]),
    color("black and gold", &[Luxury, Gothic], 1, "black with golden accents|dramatic black and gold", &[0x15130f, 0xd4af37]),
    color("indigo dye", &[Zen, Boho], 2, "a Japanese indigo|deep indigo blue", &[0x2b3a8c]),
    color("cherry blossom pink", &[Zen, Kawaii], 1, "pale sakura pink|delicate blossom pink", &[0xf7c3d2]),
    color("avocado green", &[Retro], 3, "seventies avocado|an olive avocado tone", &[0x6b7a2a]),
    color("sky blue", &[Coastal, Kawaii, Minimal], 0, "a clear sky blue|light summery blue", &[0x7cc4f5]),
    color("wine red", &[Harvest, Gothic, Luxury], 2, "deep burgundy|a dark wine shade", &[0x6a1630]),
    color("electric blue", &[Cyber, Urban, Cosmic], 1, "a vivid electric blue|bright cobalt electric tones", &[0x1550ff]),
    color("butter cream", &[Minimal, Painterly], 3, "a creamy ivory|soft buttery cream", &[0xfbeec1]),
    color("seafoam green", &[Coastal, Abyss], 2, "pale seafoam|a minty seafoam tone", &[0x9fe2bf]),
    // Tones of the whole picture.
    tone("sepia tone", &[Retro, Western], 0, "an old sepia wash|a nostalgic sepia tint", (0.2, 0.95, 0.02), (0xb08850, 0.45)),
    tone("black and white", &[Noir, Minimal], 0, "classic monochrome|a black-and-white conversion", (0.0, 1.1, 0.0), (0x808080, 0.0)),
    tone("high contrast", &[Noir, Pop, Urban], 0, "strong contrast|stark contrasts", (1.05, 1.6, 0.0), (0x808080, 0.0)),
    tone("faded film colors", &[Retro, Boho], 0, "washed-out film tones|a faded analog look", (0.6, 0.75, 0.08), (0xd8c8a8, 0.12)),
    tone("vivid saturation", &[Pop, Tropical, Party], 0, "punchy saturated color|intensely vivid tones", (1.9, 1.1, 0.0), (0x808080, 0.0)),
    tone("muted tones", &[Minimal, Zen], 0, "calm desaturated tones|quiet muted color", (0.5, 0.9, 0.02), (0x9a9a90, 0.08)),
    tone("warm tones", &[Cabin, Harvest], 0, "a warm amber grade|cozy warm coloring", (1.1, 1.0, 0.02), (0xff9a3c, 0.18)),
    tone("cool blue tones", &[Abyss, Cyber, Noir], 1, "an icy blue grade|cold bluish coloring", (0.95, 1.0, 0.0), (0x3c78ff, 0.2)),
    tone("moody dark tones", &[Gothic, Noir], 0, "a dark moody grade|brooding shadowy tones", (0.7, 1.25, -0.15), (0x202030, 0.2)),
    tone("dreamy soft tones", &[Fantasy, Kawaii], 1, "a dreamy haze of color|soft ethereal tones", (0.9, 0.8, 0.1), (0xffd8f0, 0.2)),
    tone("teal and orange grade", &[Urban], 2, "a cinematic teal-and-orange look|blockbuster coloring", (1.3, 1.2, 0.0), (0x30808a, 0.15)),
    tone("golden tint", &[Luxury, Harvest], 1, "a golden wash|a rich gilded tint", (1.0, 1.05, 0.02), (0xffc83c, 0.28)),
    tone("green matrix tint", &[Cyber], 3, "a digital green cast|an eerie green tint", (0.4, 1.15, -0.03), (0x20ff60, 0.28)),
    tone("sun-bleached tones", &[Coastal, Western], 1, "bleached sunny tones|a sun-faded palette", (0.65, 0.85, 0.14), (0xfff0d0, 0.15)),
    tone("violet haze", &[Cosmic, Fantasy], 2, "a hazy purple cast|violet-tinted tones", (1.0, 0.95, 0.0), (0x9040ff, 0.25)),
    tone("rosy tint", &[Kawaii], 2, "a blush pink cast|rose-tinted tones", (1.0, 0.95, 0.05), (0xff80a8, 0.22)),
    tone("cross-processed colors", &[Retro, Urban], 3, "lomo style shifted colors|quirky cross-processing", (1.4, 1.3, 0.0), (0xb8ff60, 0.12)),
    tone("inky blue night grade", &[Abyss, Cosmic], 3, "a night-time blue grade|day-for-night coloring", (0.6, 1.1, -0.2), (0x102060, 0.35)),
    // Manners of drawing.
    style("watercolor painting", &[Painterly, Botanic], 0, "a loose watercolor|soft watercolor washes", Some(StyleKind::Watercolor)),
    style("oil painting", &[Painterly, Luxury], 0, "a classical oil painting|thick oil brushwork", None),
    style("pencil sketch", &[Painterly, Noir], 0, "a hand-drawn pencil sketch|graphite drawing", Some(StyleKind::PencilSketch)),
    style("pixel art", &[Cyber, Pop, Retro], 0, "8-bit pixel graphics|a retro pixel-art sprite", Some(StyleKind::Pixels)),
    style("comic book style", &[Pop, Urban], 0, "bold comic-book inks|a comic panel look", Some(StyleKind::CelShaded)),
    style("halftone print", &[Pop], 1, "Ben-Day dot printing|a dotted halftone look", Some(StyleKind::Halftone)),
    style("anime style", &[Kawaii, Zen], 0, "a Japanese anime look|hand-drawn anime", None),
    style("ukiyo-e print", &[Zen], 1, "a Japanese woodblock print|Edo-period print style", None),
    style("art deco poster", &[Luxury, Retro], 1, "a 1920s art deco design|geometric art deco", None),
    style("film noir still", &[Noir], 0, "a 1940s detective film still|a hard-boiled noir look", None),
    style("pop art screenprint", &[Pop], 0, "a bold silkscreen print|gallery pop art", Some(StyleKind::Posterized)),
    style("stained glass", &[Gothic, Fantasy], 1, "a cathedral window design|leaded stained-glass panes", Some(StyleKind::StainedGlass)),
    style("storybook illustration", &[Fantasy, Kawaii], 0, "a children's book illustration|whimsical storybook art", None),
    style("graffiti mural", &[Urban], 0, "spray-painted street art|a graffiti wall piece", None),
    style("blueprint drawing", &[Steam, Cyber], 2, "a technical blueprint|white lines on blueprint paper", Some(StyleKind::Blueprint)),
    style("impressionist brushwork", &[Painterly, Coastal], 1, "dabs of impressionist paint|a plein-air impressionist look", None),
    style("pointillism", &[Painterly], 3, "tiny painted dots|a pointillist canvas", Some(StyleKind::Pointillist)),
    style("line art", &[Minimal, Zen], 0, "a single-line drawing|clean line work", Some(StyleKind::LineArt)),
    style("low-poly render", &[Cyber, Minimal], 2, "faceted low-poly shapes|a low-polygon 3D look", Some(StyleKind::LowPoly)),
    style("vintage travel poster", &[Retro, Tropical, Western], 1, "a 1950s travel poster|an old railway poster", None),
    style("botanical engraving", &[Botanic], 2, "an antique botanical plate|a herbarium illustration", None),
    style("woodcut print", &[Gothic, Harvest, Cabin], 2, "a carved woodcut|rough block-print lines", Some(StyleKind::Woodcut)),
    style("mosaic tiles", &[Boho, Coastal], 2, "a tile mosaic|little mosaic stones", Some(StyleKind::Mosaic)),
    style("synthwave design", &[Cyber, Retro], 1, "an eighties synthwave look|retrowave graphics", None),
    style("claymation", &[Kawaii, Party], 2, "a stop-motion clay look|molded clay animation", None),
    style("paper cutout collage", &[Pop, Boho, Party], 2, "a cut-paper collage|layered paper shapes", None),
    style("gothic etching", &[Gothic], 2, "a dark copperplate etching|a macabre engraving", None),
    style("chalk drawing", &[Urban, Cabin], 2, "a chalkboard drawing|dusty chalk strokes", None),
    style("sci-fi concept art", &[Cosmic, Cyber], 1, "futuristic concept art|a science-fiction painting", None),
    style("renaissance portrait", &[Luxury, Painterly], 2, "an old-master painting|a renaissance canvas", None),
    style("ink wash painting", &[Zen, Painterly], 1, "sumi-e brush painting|a flowing ink wash", None),
    style("wanted poster", &[Western], 2, "an old wanted poster|a frontier handbill", None),
    style("victorian illustration", &[Steam, Gothic], 1, "a Victorian engraving|a Jules Verne illustration", None),
    style("psychedelic poster", &[Retro, Boho], 3, "a sixties psychedelic print|swirling poster art", None),
    style("vintage christmas card", &[Festive, Retro], 1, "an old holiday postcard|a nostalgic greeting card", None),
    style("cut snowflake paper art", &[Festive, Minimal], 2, "folded paper-snowflake art|a winter papercut", None),
    style("sea chart engraving", &[Abyss, Coastal], 1, "an antique ocean map drawing|an old mariner's chart", None),
    style("bioluminescent painting", &[Abyss, Cosmic], 2, "glow-in-the-dark sea art|a luminous deep-water painting", None),
    style("scrapbook page", &[Boho, Kawaii], 3, "a scrapbook layout|a taped-in journal page", None),
    // Things to add.
    object("a stone fireplace", &[Cabin, Harvest], 0, "a crackling fireplace|a hearth with a log fire"),
    object("exposed beams", &[Cabin], 1, "heavy ceiling beams|timber beams overhead"),
    object("a leather sofa", &[Cabin, Western, Retro], 1, "a worn leather couch|an old leather sofa"),
    object("antlers on the wall", &[Cabin], 3, "mounted antlers|a pair of antlers"),
    prop("a knitted scarf", &[Cabin, Festive], 0, "a woolly scarf|a hand-knit scarf", PropKind::Scarf, 0xb03030),
    object("fairy lights", &[Festive, Boho, Kawaii], 0, "a string of tiny lights|twinkling string lights"),
    object("a christmas tree", &[Festive], 0, "a decorated fir tree|a trimmed holiday tree"),
    prop("a wrapped gift", &[Festive, Party], 1, "a present with a bow|a gift box", PropKind::Gift, 0xd02040),
    object("gingerbread cookies", &[Festive], 2, "iced gingerbread men|fresh gingerbread"),
    prop("a pumpkin lantern", &[Harvest, Gothic], 0, "a carved jack-o'-lantern|a glowing pumpkin", PropKind::Lantern, 0xf08010),
    object("a basket of apples", &[Harvest], 1, "a bushel of red apples|freshly picked apples"),
    object("sheaves of wheat", &[Harvest, Western], 2, "bundled wheat stalks|golden wheat sheaves"),
    prop("seashells", &[Coastal, Abyss], 0, "scattered sea shells|a few pretty shells", PropKind::Shell, 0xf2d0b0),
    object("a sailboat", &[Coastal], 1, "a little sailing boat|a boat with white sails"),
    object("a lighthouse", &[Coastal], 1, "a striped lighthouse|a seaside lighthouse"),
    object("palm trees", &[Tropical], 0, "swaying palms|a row of coconut palms"),
    object("a parrot", &[Tropical], 1, "a colorful macaw|a bright tropical parrot"),
    object("a pineapple", &[Tropical, Pop], 2, "a ripe pineapple|a golden pineapple"),
    object("a tiki torch", &[Tropical], 3, "burning tiki torches|a bamboo torch"),
    object("potted ferns", &[Botanic, Boho], 0, "leafy green ferns|a cluster of ferns"),
    object("climbing ivy", &[Botanic, Gothic], 1, "trailing ivy|ivy vines"),
    prop("wildflowers", &[Botanic, Boho, Painterly], 0, "a bunch of wildflowers|meadow flowers", PropKind::Flower, 0xd060d0),
    prop("a butterfly", &[Botanic, Fantasy], 1, "fluttering butterflies|a delicate butterfly", PropKind::Butterfly, 0x4090f0),
    prop("red mushrooms", &[Fantasy, Botanic], 2, "spotted toadstools|little red-capped mushrooms", PropKind::Mushroom, 0xd02828),
    object("a baby dragon", &[Fantasy], 1, "a tiny dragon|a friendly small dragon"),
    object("a distant castle", &[Fantasy], 0, "a fairy-tale castle|a castle with towers"),
    prop("a golden crown", &[Luxury, Fantasy], 0, "a jeweled crown|a royal crown", PropKind::Crown, 0xf0c020),
    object("a crystal chandelier", &[Luxury], 0, "a glittering chandelier|a grand chandelier"),
    object("a string of pearls", &[Luxury, Noir], 2, "pearl strands|a pearl necklace"),
    prop("a pink bow", &[Kawaii], 0, "a cute satin bow|a big pink ribbon bow", PropKind::Bow, 0xff80b0),
    prop("little hearts", &[Kawaii], 1, "tiny pink hearts|floating hearts", PropKind::Heart, 0xff5080),
    object("a plush bunny", &[Kawaii], 1, "a stuffed rabbit|a fluffy toy bunny"),
    prop("a top hat", &[Steam, Noir, Party], 1, "a tall black hat|a gentleman's top hat", PropKind::TopHat, 0x181818),
    prop("brass gears", &[Steam], 0, "turning cogwheels|clockwork gears", PropKind::Gear, 0xb08030),
    object("an airship", &[Steam, Fantasy], 1, "a steam-powered zeppelin|a drifting airship"),
    object("brass goggles", &[Steam], 2, "aviator goggles|riveted brass goggles"),
    prop("a ringed planet", &[Cosmic], 0, "a Saturn-like planet|a giant planet with rings", PropKind::Planet, 0xd0a060),
    object("an astronaut", &[Cosmic], 1, "a floating astronaut|a space explorer in a suit"),
    object("a rocket ship", &[Cosmic, Retro], 1, "a chrome rocket|a launching rocket"),
    object("a neon sign", &[Cyber, Urban], 0, "a glowing neon sign|a flickering shop sign in neon"),
    object("a robot companion", &[Cyber], 1, "a small service robot|a friendly android"),
    object("a drone", &[Cyber, Urban], 3, "a hovering quadcopter|a buzzing drone"),
    object("a skateboard", &[Urban], 1, "a scuffed skateboard|a street skateboard"),
    object("a boombox", &[Urban, Retro], 2, "an old ghetto blaster|a big portable stereo"),
    object("a stone lantern", &[Zen], 1, "a Japanese garden lantern|a mossy stone lantern"),
    object("koi fish", &[Zen, Abyss], 1, "swimming koi|orange and white koi"),
    object("a bonsai tree", &[Zen, Minimal], 0, "a miniature pine|a little bonsai"),
    prop("a cactus", &[Western, Boho], 0, "a saguaro cactus|a prickly cactus", PropKind::Cactus, 0x3c8c3c),
    object("a cowboy hat", &[Western], 0, "a wide-brimmed Stetson|a felt cowboy hat"),
    object("a wagon wheel", &[Western, Cabin], 2, "an old wooden wheel|a weathered wagon wheel"),
    object("a raven", &[Gothic], 0, "a black raven|a watching crow"),
    prop("dripping candles", &[Gothic, Cabin], 1, "a row of wax candles|old candlesticks with candles", PropKind::Candle, 0xf0e8d0),
    object("a skull", &[Gothic, Urban], 2, "a bleached skull|an ornate skull"),
    prop("party balloons", &[Party], 0, "colorful balloons|a bunch of balloons", PropKind::Balloon, 0xf04060),
    prop("a party hat", &[Party, Kawaii], 1, "a pointed paper hat|a striped birthday hat", PropKind::PartyHat, 0x40c0f0),
    object("a carousel horse", &[Party, Fantasy], 2, "a merry-go-round horse|a painted carousel pony"),
    object("a vinyl record player", &[Retro], 0, "an old turntable|a spinning record player"),
    object("a rotary telephone", &[Retro, Noir], 2, "an old dial phone|a vintage telephone"),
    object("a jellyfish", &[Abyss], 0, "drifting jellyfish|a glowing medusa"),
    object("a sunken treasure chest", &[Abyss, Fantasy], 1, "a pirate's treasure chest|a chest of sunken gold"),
    object("an octopus", &[Abyss], 2, "a curling octopus|a red octopus"),
    object("an easel with a canvas", &[Painterly], 1, "a painter's easel|a half-finished canvas"),
    object("paint brushes in a jar", &[Painterly], 2, "a jar of brushes|used paintbrushes"),
    object("a dreamcatcher", &[Boho], 1, "a feathered dreamcatcher|a woven dreamcatcher"),
    object("a wool blanket", &[Cabin, Minimal], 1, "a chunky blanket|a folded wool throw"),
    prop("round sunglasses", &[Pop, Tropical, Urban], 1, "a pair of round shades|retro sunglasses", PropKind::Glasses, 0x202028),
    prop("a golden star", &[Festive, Party, Cosmic], 2, "a shiny gold star|a star ornament", PropKind::Star, 0xf8d020),
    prop("a crescent moon", &[Cosmic, Fantasy, Gothic], 1, "a thin silver moon|a hanging crescent", PropKind::Moon, 0xf0e8b0),
    prop("a paper umbrella", &[Zen, Tropical], 3, "a wagasa parasol|a painted paper parasol", PropKind::Umbrella, 0xe05050),
    // What lies behind.
    backdrop("snowy mountains", &[Cabin, Festive], 0, "a snow-capped mountain range|alpine peaks", BackgroundKind::Mountains, [0x9cc4e8, 0xeef4fa]),
    backdrop("a log cabin wall", &[Cabin, Western], 1, "rough log walls|the inside of a wooden cabin", BackgroundKind::Planks, [0x7a4a24, 0x5c3618]),
    backdrop("a pine forest", &[Cabin, Botanic], 0, "dark evergreen woods|a forest of tall pines", BackgroundKind::Forest, [0xa8c8b0, 0x1f4a2c]),
    backdrop("a sandy beach", &[Coastal, Tropical], 0, "a sunny beach|a wide sandy shore", BackgroundKind::Sea, [0x66c8f0, 0xf0d8a0]),
    backdrop("ocean waves", &[Coastal, Abyss], 0, "a rolling sea|breaking waves", BackgroundKind::Sea, [0x3a80c8, 0x1a4c90]),
    scene("a harbor with boats", &[Coastal], 2, "a fishing harbor|a quiet marina"),
    backdrop("a neon city at night", &[Cyber, Urban], 0, "a neon-lit skyline|a futuristic city at night", BackgroundKind::City, [0x1a0a3a, 0xff30c0]),
    backdrop("a digital grid", &[Cyber], 1, "a glowing wireframe grid|an endless neon grid", BackgroundKind::Grid, [0x0a0620, 0xf040f0]),
    scene("a server room", &[Cyber], 3, "racks of blinking servers|a humming data center"),
    backdrop("a flower meadow", &[Botanic, Painterly, Boho], 0, "a field of flowers|a blooming meadow", BackgroundKind::Meadow, [0x88c8f0, 0x58a848]),
    scene("a greenhouse", &[Botanic], 1, "a glasshouse full of plants|a Victorian conservatory"),
    scene("a misty rainforest", &[Botanic, Tropical], 1, "a foggy jungle|dense tropical forest"),
    backdrop("a plain white backdrop", &[Minimal], 0, "an empty white studio|seamless white paper", BackgroundKind::Plain, [0xfafafa, 0xfafafa]),
    backdrop("a soft gray gradient", &[Minimal, Noir], 1, "a smooth gray backdrop|a gentle gray fade", BackgroundKind::Gradient, [0xe0e0e4, 0x8c8c94]),
    scene("a Nordic living room", &[Minimal], 1, "a bright Scandinavian room|an airy white interior"),
    backdrop("retro wallpaper", &[Retro], 1, "seventies wallpaper|orange and brown wallpaper", BackgroundKind::Tiles, [0xd88828, 0x7a3c14]),
    scene("a fifties diner", &[Retro, Pop], 0, "an old American diner|a chrome diner counter"),
    scene("a drive-in cinema", &[Retro], 3, "an outdoor movie lot|a drive-in at dusk"),
    scene("a ruined cathedral", &[Gothic], 0, "a crumbling abbey|gothic arches"),
    scene("a foggy graveyard", &[Gothic], 1, "a misty cemetery|old tombstones in fog"),
    backdrop("a red velvet curtain", &[Gothic, Luxury, Party], 1, "heavy red drapes|a theater curtain", BackgroundKind::Curtain, [0x8c1020, 0x500810]),
    backdrop("fluffy pink clouds", &[Kawaii, Fantasy], 0, "cotton-candy clouds|a pastel cloudy sky", BackgroundKind::Clouds, [0xffc0e0, 0xfff0f8]),
    backdrop("a candy-colored gradient", &[Kawaii, Pop], 2, "a sweet pink-to-blue fade|a sherbet gradient", BackgroundKind::Gradient, [0xff90c8, 0x90d0ff]),
    scene("a clockwork workshop", &[Steam], 0, "an inventor's workshop|a room of pipes and dials"),
    scene("a Victorian street", &[Steam, Gothic, Noir], 1, "gaslit cobblestones|foggy old London"),
    backdrop("a starry galaxy", &[Cosmic], 0, "a swirling galaxy|deep space full of stars", BackgroundKind::Space, [0x08061c, 0x6030a0]),
    backdrop("the northern lights", &[Cosmic, Festive, Zen], 1, "a green aurora|dancing polar lights", BackgroundKind::Aurora, [0x0a1430, 0x40f0a0]),
    scene("the surface of the moon", &[Cosmic], 1, "a cratered moonscape|a lunar landscape"),
    scene("an enchanted forest", &[Fantasy], 0, "a magical wood|a glowing fairy forest"),
    scene("floating islands", &[Fantasy, Cosmic], 2, "islands in the sky|drifting rock islands"),
    scene("a desert oasis tent", &[Boho], 1, "a carpeted nomad tent|a Moroccan tent"),
    backdrop("a marble hall", &[Luxury], 0, "a palace hall|polished marble walls", BackgroundKind::Tiles, [0xf0ece4, 0xc8c0b4]),
    scene("a rooftop infinity pool", &[Luxury, Tropical], 2, "a penthouse terrace with a pool|an infinity pool"),
    backdrop("a brick wall", &[Urban, Steam], 0, "weathered red bricks|an old brick facade", BackgroundKind::Bricks, [0xa0482c, 0xc8b8a8]),
    scene("a subway station", &[Urban], 1, "an underground platform|a tiled metro stop"),
    backdrop("a city skyline", &[Urban, Noir], 0, "tall downtown buildings|a skyline of towers", BackgroundKind::City, [0xa8c0d8, 0x606878]),
    scene("a raked sand garden", &[Zen], 0, "a Zen rock garden|raked gravel and stones"),
    backdrop("a bamboo grove", &[Zen, Tropical], 0, "tall green bamboo|a bamboo thicket", BackgroundKind::Bamboo, [0xc8e0a8, 0x4c8c3c]),
    scene("Mount Fuji at dawn", &[Zen], 2, "a view of Mount Fuji|Fuji above the lake"),
    scene("a snowy village", &[Festive], 0, "a little town in snow|a Christmas village"),
    backdrop("an autumn forest", &[Harvest, Painterly], 0, "golden fall woods|trees in autumn color", BackgroundKind::Forest, [0xf0d8a8, 0xc8601c]),
    scene("a pumpkin patch", &[Harvest], 1, "a field of pumpkins|a farm full of pumpkins"),
    backdrop("a tropical sunset", &[Tropical, Coastal], 0, "an orange island sunset|a glowing sunset sky", BackgroundKind::Sunset, [0xff7030, 0xffd070]),
    backdrop("a comic sunburst", &[Pop, Party], 0, "bold radiating rays|a red-and-yellow sunburst", BackgroundKind::Sunburst, [0xf8d020, 0xe83028]),
    scene("a rainy alley", &[Noir, Cyber], 0, "a wet back street|a dark alley in the rain"),
    backdrop("desert dunes", &[Western, Boho], 0, "rolling sand dunes|a wide desert", BackgroundKind::Dunes, [0xf0c890, 0xd09048]),
    scene("a frontier saloon", &[Western], 1, "an old western bar|a saloon with swing doors"),
    scene("red rock canyons", &[Western], 1, "a sandstone canyon|the buttes of Monument Valley"),
    scene("a sunlit atelier", &[Painterly], 1, "a painter's loft|an artist's studio"),
    backdrop("a coral reef", &[Abyss, Tropical], 0, "an underwater reef|a reef full of life", BackgroundKind::Underwater, [0x2090c0, 0xf07860]),
    backdrop("the deep sea", &[Abyss], 1, "dark ocean depths|the blue deep", BackgroundKind::Underwater, [0x06305c, 0x1870a0]),
    scene("a carnival at night", &[Party], 0, "a fairground with lights|a funfair"),
    // What it is made of.
    material("rustic wood", &[Cabin, Western], 0, "rough weathered wood|old barn wood", MaterialKind::Wood, 0x8a5a33),
    material("dark walnut", &[Luxury, Retro], 2, "polished walnut|fine dark wood", MaterialKind::Wood, 0x4a2c1a),
    material("light birch wood", &[Minimal], 0, "pale birch|blond Nordic wood", MaterialKind::Wood, 0xe0c8a0),
    material("driftwood", &[Coastal], 2, "sea-worn wood|bleached driftwood", MaterialKind::Wood, 0xb8a890),
    material("bamboo weave", &[Zen, Tropical], 2, "woven bamboo|a bamboo lattice", MaterialKind::Wicker, 0xc8b060),
    material("wicker", &[Boho, Coastal], 1, "woven rattan|a basket weave", MaterialKind::Wicker, 0xb88850),
    material("polished gold", &[Luxury], 0, "gleaming gold|solid gold", MaterialKind::Metal, 0xe8b830),
    material("brushed steel", &[Minimal, Cyber], 1, "matte stainless steel|cool brushed metal", MaterialKind::Metal, 0xa8b0b8),
    material("chrome", &[Cyber, Retro, Pop], 1, "mirror-like chrome|liquid chrome", MaterialKind::Metal, 0xd0d8e4),
    material("hammered copper", &[Steam, Boho], 0, "beaten copper|dented copper plate", MaterialKind::Metal, 0xb86c38),
    material("antique brass", &[Steam], 0, "tarnished brass|riveted brass", MaterialKind::Metal, 0xa8843c),
    material("rusty iron", &[Steam, Urban, Western], 1, "corroded iron|flaking rusted metal", MaterialKind::Rust, 0x8c4420),
    material("wrought iron", &[Gothic], 1, "black forged iron|twisted ironwork", MaterialKind::Metal, 0x38383c),
    material("white marble", &[Luxury, Minimal], 0, "veined marble|carved white marble", MaterialKind::Marble, 0xf0eeea),
    material("black obsidian", &[Gothic, Fantasy], 2, "volcanic glass|glossy obsidian", MaterialKind::Crystal, 0x18161c),
    material("raw concrete", &[Urban, Minimal], 1, "bare concrete|rough cast concrete", MaterialKind::Stone, 0x98989a),
    material("mossy stone", &[Botanic, Zen], 1, "stone covered in moss|moss-grown rock", MaterialKind::Moss, 0x6a8a48),
    material("soft velvet", &[Luxury, Gothic], 1, "plush velvet|crushed velvet", MaterialKind::Fabric, 0x701c50),
    material("chunky knit wool", &[Cabin, Minimal, Festive], 0, "thick knitted wool|cable-knit yarn", MaterialKind::Knit, 0xd8ccb8),
    material("worn leather", &[Western, Cabin], 0, "cracked brown leather|aged saddle leather", MaterialKind::Leather, 0x7c4a28),
    material("linen cloth", &[Boho, Minimal, Coastal], 1, "natural linen|crumpled linen", MaterialKind::Fabric, 0xdcd0b8),
    material("denim", &[Urban, Western], 1, "faded blue jeans cloth|stitched denim", MaterialKind::Fabric, 0x3c5c90),
    material("fluffy fur", &[Kawaii], 1, "soft plush fur|a fuzzy coat", MaterialKind::Fur, 0xf0d8e0),
    material("origami paper", &[Zen, Pop], 1, "folded paper|crisp paper folds", MaterialKind::Paper, 0xf4f0e4),
    material("old parchment", &[Fantasy, Steam], 2, "yellowed parchment|ancient paper", MaterialKind::Paper, 0xdcc48c),
    material("clear ice", &[Festive, Abyss], 1, "carved ice|frozen crystal ice", MaterialKind::Ice, 0xc0e4f8),
    material("frosted glass", &[Minimal], 2, "translucent milky glass|etched glass", MaterialKind::Glass, 0xd8e8ec),
    material("sea glass", &[Coastal, Abyss], 2, "tumbled beach glass|smooth green glass", MaterialKind::Glass, 0x8cd0b8),
    material("amethyst crystal", &[Fantasy, Cosmic], 1, "purple crystal|a faceted amethyst", MaterialKind::Crystal, 0x9050d0),
    material("glazed porcelain", &[Zen, Luxury], 1, "fine china|glossy porcelain", MaterialKind::Ceramic, 0xf0f4f8),
    material("terracotta clay", &[Boho, Harvest], 1, "unglazed clay|fired earthenware", MaterialKind::Clay, 0xc06840),
    material("shiny plastic", &[Pop, Kawaii], 1, "glossy toy plastic|molded bright plastic", MaterialKind::Plastic, 0xf04050),
    material("holographic foil", &[Cyber, Party, Cosmic], 1, "iridescent foil|a rainbow foil finish", MaterialKind::Plastic, 0xb8c8ff),
    material("carbon fiber", &[Cyber, Urban], 3, "woven carbon|a carbon-fiber shell", MaterialKind::Metal, 0x303034),
    material("cracked lava rock", &[Fantasy], 3, "glowing lava stone|molten cracked rock", MaterialKind::Stone, 0x602018),
    material("meteorite rock", &[Cosmic], 3, "pitted space rock|a meteorite surface", MaterialKind::Stone, 0x54505c),
    material("canvas cloth", &[Painterly], 2, "raw painter's canvas|primed canvas", MaterialKind::Fabric, 0xe8e0cc),
    material("hay and straw", &[Harvest, Western], 2, "bundled straw|golden hay", MaterialKind::Wicker, 0xd8b850),
    // What is printed on it.
    pattern("red plaid", &[Cabin, Festive], 0, "a lumberjack check|a tartan of red and black", PatternKind::Plaid, [0xb01c20, 0x181414]),
    pattern("nautical stripes", &[Coastal], 0, "sailor stripes|navy and white stripes", PatternKind::Stripes, [0xf8f8f4, 0x182c60]),
    pattern("polka dots", &[Retro, Kawaii, Pop], 0, "big round dots|a dotted print", PatternKind::Dots, [0xf8f0e0, 0xe02838]),
    pattern("a floral print", &[Botanic, Boho, Painterly], 0, "printed flowers|a flowery pattern", PatternKind::Flowers, [0xf8f0e8, 0xd85888]),
    pattern("tropical leaves", &[Tropical, Botanic], 0, "a palm-leaf print|a monstera pattern", PatternKind::Leaves, [0xf0f4dc, 0x208848]),
    pattern("leopard print", &[Urban, Luxury], 1, "leopard spots|a leopard pattern", PatternKind::Spots, [0xd8a858, 0x3c2410]),
    pattern("tiger stripes", &[Tropical], 2, "a tiger print|bold tiger markings", PatternKind::Tiger, [0xe88020, 0x181008]),
    pattern("checkerboard squares", &[Retro, Urban, Pop], 1, "a black-and-white checkerboard|racing checks", PatternKind::Check, [0xf4f4f4, 0x141414]),
    pattern("zigzag chevrons", &[Retro, Boho], 1, "a chevron pattern|bold zigzags", PatternKind::Zigzag, [0xf0e0c0, 0xc05820]),
    pattern("stars and moons", &[Cosmic, Fantasy], 1, "a celestial print|printed little stars", PatternKind::Stars, [0x181c50, 0xf8e070]),
    pattern("a heart print", &[Kawaii, Party], 1, "a pattern of hearts|printed love hearts", PatternKind::Hearts, [0xffe4ee, 0xf03c70]),
    pattern("camouflage", &[Urban], 2, "an army camo print|woodland camo", PatternKind::Camouflage, [0x707848, 0x3c4428]),
    pattern("circuit board lines", &[Cyber], 1, "printed circuits|glowing circuit traces", PatternKind::Circuit, [0x0c2018, 0x30f090]),
    pattern("geometric triangles", &[Minimal, Pop], 1, "a triangle pattern|faceted triangles", PatternKind::Triangles, [0xf0f0ec, 0x50808c]),
    pattern("hexagon honeycomb", &[Cyber, Harvest], 2, "a honeycomb print|golden hexagons", PatternKind::Hexagons, [0xf0b828, 0x80500c]),
    pattern("fish scales", &[Abyss, Fantasy], 1, "mermaid scales|shimmering scales", PatternKind::Scales, [0x20a0a0, 0x0c5868]),
    pattern("paisley swirls", &[Boho, Retro], 1, "a paisley print|curling paisley", PatternKind::Swirls, [0x8c2c3c, 0xf0c060]),
    pattern("seigaiha waves", &[Zen, Coastal], 1, "a Japanese wave pattern|layered wave arcs", PatternKind::Waves, [0xf0f4f8, 0x28488c]),
    pattern("baroque damask", &[Luxury, Gothic], 1, "an ornate damask|baroque scrollwork", PatternKind::Swirls, [0x281820, 0xc8a040]),
    pattern("candy stripes", &[Festive, Party, Kawaii], 1, "peppermint stripes|red and white candy stripes", PatternKind::Stripes, [0xfcfcfc, 0xe02040]),
    pattern("harlequin diamonds", &[Party], 2, "jester diamonds|a harlequin pattern", PatternKind::Diamonds, [0xf0c830, 0x7c28a0]),
    pattern("pinstripes", &[Noir, Luxury], 1, "thin tailored stripes|a gangster pinstripe", PatternKind::Stripes, [0x24242c, 0xc8c8cc]),
    pattern("paint speckles", &[Painterly, Minimal], 2, "a terrazzo speckle|flecks of paint", PatternKind::Speckles, [0xf4f0e8, 0x5878a8]),
    pattern("an ikat weave", &[Western, Boho], 2, "a southwestern diamond weave|a Navajo-style weave", PatternKind::Diamonds, [0xc05030, 0x28889c]),
    pattern("graph-paper grid", &[Steam, Minimal], 3, "drafting-paper lines|a fine blue grid", PatternKind::Grid, [0xf4f8fc, 0x6090c8]),
    pattern("falling maple leaves print", &[Harvest, Zen], 3, "a momiji print|an autumn-leaf pattern", PatternKind::Leaves, [0xf4e4c8, 0xc84020]),
    // What lies over the picture.
    overlay("falling snow", &[Festive, Cabin], 0, "a gentle snowfall|drifting snowflakes", OverlayKind::Snow, 0xffffff),
    overlay("heavy rain", &[Noir, Cyber, Gothic], 0, "pouring rain|streaks of rain", OverlayKind::Rain, 0xb8c8d8),
    overlay("soap bubbles", &[Kawaii, Party], 1, "floating bubbles|shiny soap bubbles", OverlayKind::Bubbles, 0xd8f0ff),
    overlay("rising air bubbles", &[Abyss], 1, "underwater bubbles|streams of bubbles", OverlayKind::Bubbles, 0xa0e0f8),
    overlay("colorful confetti", &[Party], 0, "a shower of confetti|paper confetti", OverlayKind::Confetti, 0xf04080),
    overlay("drifting petals", &[Zen, Botanic, Fantasy], 0, "falling cherry petals|petals on the wind", OverlayKind::Petals, 0xf8b8cc),
    overlay("falling autumn leaves", &[Harvest], 0, "tumbling golden leaves|leaves in the wind", OverlayKind::Leaves, 0xd06820),
    overlay("magic sparkles", &[Fantasy, Kawaii], 0, "glittering fairy dust|twinkling sparkles", OverlayKind::Sparkles, 0xfff0a0),
    overlay("a starfield overlay", &[Cosmic], 1, "scattered stars|specks of starlight", OverlayKind::Stars, 0xe8e8ff),
    overlay("morning mist", &[Zen, Botanic, Gothic], 0, "a low fog|a veil of mist", OverlayKind::Fog, 0xe0e4e8),
    overlay("film grain", &[Noir, Retro], 0, "grainy film texture|analog grain", OverlayKind::Grain, 0x808080),
    overlay("dust and scratches", &[Retro, Western], 1, "an old scratched film|worn print scratches", OverlayKind::Scratches, 0xf0e8d8),
    overlay("curling smoke", &[Noir, Steam], 1, "wisps of smoke|cigarette smoke", OverlayKind::Smoke, 0xb8b8bc),
    overlay("billowing steam", &[Steam], 1, "puffs of white steam|hissing steam", OverlayKind::Smoke, 0xf0f0f0),
    overlay("fireflies", &[Botanic, Fantasy, Cabin], 1, "glowing fireflies|tiny lights of fireflies", OverlayKind::Fireflies, 0xe8f060),
    overlay("light leaks", &[Boho, Retro], 1, "orange light leaks|sunny film flares", OverlayKind::LightLeak, 0xff8030),
    overlay("glitch scanlines", &[Cyber], 0, "digital glitches|flickering scanlines", OverlayKind::Scanlines, 0x30f0e0),
    overlay("a dark vignette", &[Noir, Gothic], 1, "darkened corners|a heavy vignette", OverlayKind::Vignette, 0x000000),
    overlay("a polaroid frame", &[Retro, Boho], 1, "an instant-photo border|a white polaroid border", OverlayKind::Frame, 0xf8f8f4),
    overlay("a gilded frame", &[Luxury, Painterly], 1, "an ornate gold frame|a museum frame", OverlayKind::Frame, 0xc89830),
    overlay("floating hearts overlay", &[Kawaii], 2, "a drift of hearts|heart confetti", OverlayKind::Hearts, 0xff6090),
    overlay("paint splatters", &[Urban, Painterly, Pop], 0, "splashes of paint|flung paint drops", OverlayKind::Splatter, 0xe03880),
    overlay("glowing embers", &[Western, Cabin, Gothic], 1, "sparks from a fire|floating embers", OverlayKind::Embers, 0xff7820),
    overlay("blowing sand", &[Western], 2, "a dusty haze|swirling desert dust", OverlayKind::Fog, 0xe0c090),
    overlay("gold glitter", &[Luxury, Party], 1, "a dusting of gold glitter|golden shimmer", OverlayKind::Sparkles, 0xf8d048),
    overlay("sea spray", &[Coastal], 2, "salty spray|droplets of sea water", OverlayKind::Splatter, 0xe8f4fc),
    overlay("a comic speech burst", &[Pop], 3, "a starburst frame|a bold comic border", OverlayKind::Frame, 0xf8d820),
    overlay("floating pollen", &[Botanic, Harvest], 3, "golden motes|specks of drifting pollen", OverlayKind::Fireflies, 0xf8e8a0),
    // Light.
    light("golden hour light", &[Coastal, Harvest, Boho], 0, "low golden sunlight|a late-afternoon glow", LightKind::Side, 0xffb050),
    light("warm candlelight", &[Cabin, Gothic], 0, "flickering candle glow|soft candlelight", LightKind::Glow, 0xffa040),
    light("firelight", &[Cabin, Western], 1, "the glow of a fire|orange firelight", LightKind::Side, 0xff7828),
    light("pink and blue neon light", &[Cyber], 0, "a neon glow from both sides|pink and cyan lighting", LightKind::TwoTone, 0xff30c0),
    light("cold moonlight", &[Gothic, Abyss], 0, "pale moonlight|silvery night light", LightKind::Dim, 0x7890d0),
    light("a single spotlight", &[Noir, Party], 0, "one hard spotlight|a stage spotlight", LightKind::Spot, 0xfff4e0),
    light("hard side light", &[Noir], 1, "dramatic side lighting|half-lit shadows", LightKind::Side, 0xf8f8ff),
    light("window-blind shadows", &[Noir], 2, "slatted shadows|stripes of light through blinds", LightKind::Side, 0xf0e8d0),
    light("soft daylight", &[Minimal, Painterly], 0, "even window light|bright diffuse daylight", LightKind::Ambient, 0xfcfcff),
    light("rim lighting", &[Cosmic, Cyber], 1, "a glowing outline|a bright edge light", LightKind::Rim, 0x90c8ff),
    light("sunbeams", &[Botanic, Fantasy], 0, "rays of sun|shafts of sunlight", LightKind::Rays, 0xfff0b0),
    light("dappled shade", &[Botanic, Zen], 2, "sun through leaves|leafy patches of light", LightKind::Rays, 0xe0f0b0),
    light("a magical glow", &[Fantasy], 0, "an enchanted shimmer of light|a soft magic glow", LightKind::Glow, 0xc080ff),
    light("chandelier light", &[Luxury], 1, "glittering warm light|ballroom lighting", LightKind::Glow, 0xffe0a0),
    light("tropical sunshine", &[Tropical], 0, "bright island sun|strong midday sun", LightKind::Ambient, 0xfff0a8),
    light("blue underwater light", &[Abyss], 0, "rippling blue light|light from the surface", LightKind::Rays, 0x50b8f0),
    light("lantern light", &[Zen, Festive], 1, "paper-lantern glow|the light of lanterns", LightKind::Glow, 0xff9848),
    light("disco lights", &[Party, Retro], 1, "a mirror-ball sparkle|dance-floor lights", LightKind::TwoTone, 0xff40f0),
    light("gaslight", &[Steam], 1, "a gas-lamp glow|yellow gaslight", LightKind::Side, 0xf0d060),
    light("street-lamp light", &[Urban, Noir], 1, "sodium street light|an orange lamp-post glow", LightKind::Spot, 0xffb858),
    light("nebula glow", &[Cosmic], 1, "purple starlight|a cosmic glow", LightKind::Glow, 0x8048f0),
    light("comic flat lighting", &[Pop], 3, "flat bright light|shadowless lighting", LightKind::Ambient, 0xffffff),
    light("twilight dusk", &[Painterly, Coastal], 1, "violet evening light|a dusky blue hour", LightKind::Dim, 0x9878c8),
    light("desert noon sun", &[Western], 2, "harsh noon sun|blazing desert light", LightKind::Ambient, 0xfff4d0),
    light("a pastel glow", &[Kawaii], 1, "soft pinkish light|a sugary glow", LightKind::Glow, 0xffb8e0),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_vocabulary_has_the_size_and_spread_it_promises() {
        let names: BTreeSet<_> = all().iter().map(|a| a.name).collect();
        assert_eq!(names.len(), all().len(), "a name stands twice");
        assert!(all().len() >= 290, "{} attributes", all().len());
        assert!(all().iter().filter(|a| a.look.is_some()).count() >= 180);
        for cluster in Cluster::ALL {
            let own: Vec<_> = all()
                .iter()
                .filter(|a| a.clusters.contains(&cluster))
                .collect();
            assert!(own.len() >= 14, "{cluster:?} has {}", own.len());
            let types: BTreeSet<_> = own.iter().map(|a| a.edit_type()).collect();
            assert_eq!(types.len(), 6, "{cluster:?} knows {types:?}");
        }
        assert!(all().iter().filter(|a| a.clusters.len() > 1).count() * 2 > all().len());
    }

    #[test]
    fn no_two_attributes_are_said_alike() {
        let mut seen = HashMap::new();
        for a in all() {
            for wording in a.wordings() {
                assert!(!wording.trim().is_empty(), "{}: empty wording", a.name);
                if let Some(other) = seen.insert(spelt(strip_article(wording)), a.name) {
                    assert_eq!(other, a.name, "{wording:?} says both");
                }
            }
        }
    }

    #[test]
    fn attributes_are_recognised_in_text_by_any_wording() {
        let names = |text: &str| mentioned(text).iter().map(|a| a.name).collect::<Vec<_>>();
        assert_eq!(
            names("Give the cup a Rough weathered wood finish."),
            ["rustic wood"]
        );
        assert_eq!(
            names("Add crackling fireplace and Exposed Beams"),
            ["a stone fireplace", "exposed beams"]
        );
        assert_eq!(names("A tealight in a chromed box"), [""; 0]);
        // "terracotta" lies inside "terracotta clay": only the longer one is meant.
        assert_eq!(names("a pot of terracotta clay"), ["terracotta clay"]);
    }
}
