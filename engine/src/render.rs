//! A small renderer of our own: scenes in, pictures out, the same bytes for the same scene.
//!
//! It draws what the small Flux learns from. A [`Scene`] names an object, where it stands, what
//! it is made of, what lies behind it and what falls in front of it, in the attributes of the
//! [`vocabulary`]; every attribute with a [`Look`] can be drawn. Changing some of these and
//! keeping the geometry gives an exact before/after pair, which no collection of photographs
//! can. It is not a 3-D engine: every object is a stack of flat shapes with signed distances
//! ([`shapes`]), and the distance to the rim, read as a height, is what the light falls on.
//!
//! 1. The background paints every pixel, then the object's soft shadow.
//! 2. Each part of the object, back to front: coverage from the distance (so edges are smooth
//!    without supersampling), normal from its gradient, colour from material and pattern.
//! 3. The overlay (snow, leaves, ...) and then the light's colouring of the whole picture.
//!
//! ```
//! use simpatico_engine::render::{Color, Object, Scene};
//! use simpatico_engine::vocabulary;
//! let before = Scene::plain(Object::Mug, Color::Red, 7);
//! let gold = vocabulary::find("polished gold").unwrap();
//! let after = before.clone().with(&[gold]);
//! assert_eq!(after.render(64).len(), 64 * 64 * 3);
//! assert_eq!(after.caption(), "a mug made of polished gold");
//! ```

pub mod artwork;
pub mod places;
pub mod props;
pub mod shapes;
pub mod surfaces;
pub mod words;

use crate::vocabulary::{self, Attribute, Category, Look};
use artwork::Artwork;
use simpatico_schema::random::Philox;
use std::sync::Arc;

/// Red, green and blue, each 0..=1, gamma-encoded (what a PNG holds, divided by 255).
pub type Rgb = [f32; 3];

/// A closed list of things with a word for each.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($variant:ident $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum $name { $($variant,)* }
        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// The word or words that captions use.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }
    };
}

named! {
    /// What is in the picture.
    Object {
        Mug "mug", Chair "chair", Lamp "lamp", Guitar "guitar", Helmet "helmet", Tower "tower",
        Car "car", Fish "fish", Boot "boot", House "house", Tree "tree", Teapot "teapot",
        Clock "clock", Cat "cat", Rocket "rocket", Umbrella "umbrella", Sofa "sofa",
        Bottle "bottle", Book "book", Mushroom "mushroom", Vase "vase", Backpack "backpack",
        Boat "boat", Cake "cake", Bird "bird", Balloon "balloon", Hat "hat", Apple "apple",
        Robot "robot", Bed "bed",
    }
}

impl Object {
    /// The tenth of the objects that no training ever sees.
    pub const HELD_OUT: &'static [Self] = &[Self::Boot, Self::Teapot, Self::Bird];

    /// The objects that training sees.
    pub fn trained() -> Vec<Self> {
        let seen = |object: &Self| !Self::HELD_OUT.contains(object);
        Self::ALL.iter().copied().filter(seen).collect()
    }
}

/// What a scene is about: an object that we draw, or a picture of one.
#[derive(Clone, Debug)]
pub enum Subject {
    /// Drawn by [`shapes`].
    Drawn(Object),
    /// A picture, cut out or filling the scene.
    Artwork(Arc<Artwork>),
}

impl Subject {
    /// The word or words that captions use.
    pub fn word(&self) -> &str {
        match self {
            Self::Drawn(object) => object.word(),
            Self::Artwork(art) => &art.noun,
        }
    }

    /// Whether it is a photograph, of which only the whole can be changed.
    pub fn whole(&self) -> bool {
        matches!(self, Self::Artwork(art) if art.whole)
    }
}

impl From<Object> for Subject {
    fn from(object: Object) -> Self {
        Self::Drawn(object)
    }
}

impl From<Arc<Artwork>> for Subject {
    fn from(art: Arc<Artwork>) -> Self {
        Self::Artwork(art)
    }
}

named! {
    /// The object's colour, where its material leaves it one.
    Color {
        Red "red", Orange "orange", Yellow "yellow", Green "green", Teal "teal", Blue "blue",
        Purple "purple", Pink "pink", White "white", Black "black", Brown "brown", Gray "gray",
    }
}

impl Color {
    /// The paint itself.
    pub fn rgb(self) -> Rgb {
        match self {
            Self::Red => [0.82, 0.13, 0.14],
            Self::Orange => [0.93, 0.50, 0.12],
            Self::Yellow => [0.95, 0.80, 0.20],
            Self::Green => [0.22, 0.62, 0.25],
            Self::Teal => [0.10, 0.62, 0.62],
            Self::Blue => [0.15, 0.34, 0.80],
            Self::Purple => [0.50, 0.22, 0.70],
            Self::Pink => [0.95, 0.52, 0.68],
            Self::White => [0.93, 0.93, 0.91],
            Self::Black => [0.12, 0.12, 0.14],
            Self::Brown => [0.45, 0.28, 0.16],
            Self::Gray => [0.52, 0.53, 0.55],
        }
    }
}

/// Where the object stands: kept by every change, so that pairs agree pixel for pixel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pose {
    /// The centre, in picture widths from the middle; right and down are positive.
    pub center: [f32; 2],
    /// Half the object's height, in picture widths.
    pub scale: f32,
    /// Rotation, in radians, clockwise.
    pub angle: f32,
    /// Seen from the other side.
    pub mirrored: bool,
    /// Width over height, 1 being as designed.
    pub stretch: f32,
    /// Where the light comes from: the unit vector to it, x right, y down, z to the viewer.
    pub light: [f32; 3],
}

/// Everything that a picture shows.
#[derive(Clone, Debug)]
pub struct Scene {
    /// What it shows.
    pub subject: Subject,
    /// Where the object stands.
    pub pose: Pose,
    /// Its colour, until an attribute gives it another; artwork without one keeps its own
    /// colours.
    pub color: Option<Color>,
    /// The colour of the backdrop, until an attribute gives it another background.
    pub backdrop: Rgb,
    /// What else it has, at most one of each category, the latest last.
    pub attributes: Vec<&'static Attribute>,
    /// Chooses grain, stars, leaves: everything small and accidental.
    pub seed: u64,
}

impl Scene {
    /// An object of one colour before a pale backdrop; the seed chooses its pose.
    pub fn plain(subject: impl Into<Subject>, color: impl Into<Option<Color>>, seed: u64) -> Self {
        let mut random = Philox::new(seed, 0x5ce4e);
        let subject = subject.into();
        let pose = match subject.whole() {
            true => Pose::filling(&mut random),
            false => Pose::random(&mut random),
        };
        Self {
            subject,
            pose,
            color: color.into(),
            backdrop: pale(&mut random),
            attributes: Vec::new(),
            seed,
        }
    }

    /// A scene with everything chosen at random: mostly plain, at times not.
    ///
    /// Artwork mostly keeps its own colours; a photograph gets nothing that an outline
    /// would be needed for.
    pub fn random(subject: impl Into<Subject>, seed: u64) -> Self {
        let mut random = Philox::new(seed, 0x5ce4f);
        let subject = subject.into();
        let whole = subject.whole();
        let mut color = Some(pick(Color::ALL, &mut random));
        let mut surfaced = 1.0;
        if matches!(subject, Subject::Artwork(_)) && (whole || random.uniform() < 0.75) {
            // As it is: a material or pattern is the exception too.
            (color, surfaced) = (None, 0.4);
        }
        let scene = Self::plain(subject, color, seed);
        let mut chosen = Vec::new();
        for (category, chance) in [
            (Category::Background, 0.45),
            (Category::Material, 0.25),
            (Category::Pattern, 0.12),
            (Category::Overlay, 0.06),
            (Category::Light, 0.06),
            (Category::Tone, 0.06),
        ] {
            if whole && !over_all(category) {
                continue;
            }
            let chance = chance * if surface(category) { surfaced } else { 1.0 };
            if random.uniform() < chance {
                chosen.push(draw(category, &mut random));
            }
        }
        scene.with(&chosen)
    }

    /// The same scene with these attributes; the geometry stays. One that has no
    /// [`Look`] is taken over in words only.
    pub fn with(mut self, attributes: &[&'static Attribute]) -> Self {
        for &attribute in attributes {
            // A new material shows its own colour; a new colour covers a print.
            let hides = |old: &Attribute| match attribute.category {
                Category::Material => matches!(old.category, Category::Color | Category::Pattern),
                Category::Color => old.category == Category::Pattern,
                _ => false,
            };
            self.attributes
                .retain(|old| old.category != attribute.category && !hides(old));
            self.attributes.push(attribute);
        }
        self
    }

    /// One to `most` attributes, each of another category and none that the scene has:
    /// what an edit could ask for. At most one of them is about the object's surface.
    pub fn random_edit(&self, most: usize, random: &mut Philox) -> Vec<&'static Attribute> {
        let count = 1 + random.below(most.max(1) as u32) as usize;
        let mut edit: Vec<&'static Attribute> = Vec::with_capacity(count);
        while edit.len() < count {
            let whole = self.subject.whole();
            let weight = |&(category, weight): &(Category, f32)| match whole {
                true if !over_all(category) => 0.0,
                _ => weight,
            };
            let category = weighted(&EDITED, weight, random).0;
            let attribute = draw(category, random);
            let clash = |a: &&Attribute| {
                a.category == attribute.category
                    || surface(a.category) && surface(attribute.category)
            };
            let has = self.attributes.iter().any(|a| a.name == attribute.name);
            if !has && !edit.iter().any(clash) {
                edit.push(attribute);
            }
        }
        edit.sort_by_key(|a| a.category);
        edit
    }

    /// The picture, `size` by `size`, rows of RGB bytes. A few milliseconds at 128.
    pub fn render(&self, size: usize) -> Vec<u8> {
        let place = places::Place::new(self);
        let paint = surfaces::Surface::new(self);
        let parts = match self.subject {
            Subject::Drawn(object) => shapes::parts(object),
            Subject::Artwork(_) => Vec::new(),
        };
        let repainted = self.color.is_some() || self.attributes.iter().any(|a| surface(a.category));
        let frame = Frame::new(&self.pose, size);
        let mut picture = vec![[0.0f32; 3]; size * size];
        for (index, pixel) in picture.iter_mut().enumerate() {
            let (x, y) = frame.pixel(index, size);
            let mut color = place.at(x, y);
            let p = frame.to_object(x, y);
            let q = [x * surfaces::TILES, y * surfaces::TILES];
            if !self.subject.whole() {
                frame.shade(&mut color, x, y);
            }
            for part in &parts {
                paint_part(&mut color, part, (p, q), &frame, &paint);
            }
            if let Subject::Artwork(art) = &self.subject {
                art.paint(&mut color, (p, q), &frame, repainted.then_some(&paint));
            }
            *pixel = color;
        }
        let mut lit = self.pose;
        if self.subject.whole() {
            (lit.center, lit.scale) = ([0.0; 2], 0.37);
        }
        for look in self.looks() {
            match *look {
                Look::Prop(kind, rgb) => props::add(&mut picture, size, kind, unpack(rgb), &frame),
                Look::Light(kind, rgb) => {
                    places::light(&mut picture, size, kind, unpack(rgb), &lit);
                }
                Look::Overlay(kind, rgb) => {
                    places::overlay(&mut picture, size, kind, unpack(rgb));
                }
                _ => {}
            }
        }
        for look in self.looks() {
            match look {
                Look::Tone { .. } => places::tone(&mut picture, look),
                Look::Style(kind) => places::style(&mut picture, size, *kind, self.seed),
                _ => {}
            }
        }
        let byte = |v: f32| (v.clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
        picture.iter().flat_map(|rgb| rgb.map(byte)).collect()
    }

    /// The looks of its attributes, the latest last.
    fn looks(&self) -> impl Iterator<Item = &'static Look> {
        self.attributes.iter().filter_map(|a| a.look.as_ref())
    }
}

/// How often an edit touches a category: what the small model can show clearly comes often.
const EDITED: [(Category, f32); 9] = [
    (Category::Color, 0.25),
    (Category::Material, 0.27),
    (Category::Pattern, 0.13),
    (Category::Background, 0.10),
    (Category::Overlay, 0.11),
    (Category::Tone, 0.04),
    (Category::Light, 0.04),
    (Category::Style, 0.03),
    (Category::Object, 0.03),
];

/// Whether the category is about what the object's surface looks like.
fn surface(category: Category) -> bool {
    matches!(
        category,
        Category::Color | Category::Material | Category::Pattern
    )
}

/// Whether the category changes a picture without knowing where the object is.
fn over_all(category: Category) -> bool {
    matches!(
        category,
        Category::Overlay | Category::Tone | Category::Light | Category::Style
    )
}

/// One attribute of a category that has a look, the common ones oftener, but the rarest still a
/// third as often: who likes what is rare wants to see it too, and it is learnt no sooner.
fn draw(category: Category, random: &mut Philox) -> &'static Attribute {
    weighted(
        vocabulary::all(),
        |a| {
            if a.category == category && a.look.is_some() {
                a.weight().powf(0.3)
            } else {
                0.0
            }
        },
        random,
    )
}

/// One of the items, in proportion to its weight. Some weight must be positive.
fn weighted<'a, T>(items: &'a [T], weight: impl Fn(&T) -> f32, random: &mut Philox) -> &'a T {
    let total: f32 = items.iter().map(&weight).sum();
    let mut left = random.uniform() * total;
    let mut last = &items[0];
    for item in items.iter().filter(|item| weight(item) > 0.0) {
        last = item;
        left -= weight(item);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// 0xRRGGBB as three numbers of 0..=1.
pub fn unpack(rgb: vocabulary::Rgb) -> Rgb {
    [rgb >> 16, rgb >> 8, rgb].map(|c| (c & 255) as f32 / 255.0)
}

impl Pose {
    /// Near the middle, slightly turned.
    fn random(random: &mut Philox) -> Self {
        let mut spread = |width: f32| (random.uniform() - 0.5) * 2.0 * width;
        let center = [spread(0.06), 0.03 + spread(0.05)];
        let scale = 0.37 + spread(0.04);
        let angle = spread(0.12);
        let stretch = 1.0 + spread(0.10);
        let mirrored = spread(1.0) > 0.0;
        let light = normalize([-0.45 + spread(0.35), -0.65 + spread(0.2), 0.7]);
        Self {
            center,
            scale,
            angle,
            mirrored,
            stretch,
            light,
        }
    }
}

impl Pose {
    /// A part of a photograph, at least half of it, that fills the picture.
    fn filling(random: &mut Philox) -> Self {
        let scale = 0.5 + 0.35 * random.uniform();
        let mut spread = || (random.uniform() - 0.5) * 2.0 * (scale - 0.5);
        let center = [spread(), spread()];
        let mirrored = random.uniform() < 0.5;
        Self {
            center,
            scale,
            angle: 0.0,
            mirrored,
            stretch: 1.0,
            light: normalize([-0.45, -0.65, 0.7]),
        }
    }
}

/// The pose, made ready for one picture size.
struct Frame {
    pose: Pose,
    cos: f32,
    sin: f32,
    /// One pixel's width in object units.
    pixel: f32,
}

impl Frame {
    fn new(pose: &Pose, size: usize) -> Self {
        Self {
            pose: *pose,
            cos: pose.angle.cos(),
            sin: pose.angle.sin(),
            pixel: 1.0 / (size as f32 * pose.scale),
        }
    }

    /// The pixel's centre, each coordinate in 0..1.
    fn pixel(&self, index: usize, size: usize) -> (f32, f32) {
        let at = |i: usize| (i as f32 + 0.5) / size as f32;
        (at(index % size), at(index / size))
    }

    /// Object coordinates: the object fills about -1..1 in both.
    fn to_object(&self, x: f32, y: f32) -> [f32; 2] {
        let dx = (x - 0.5 - self.pose.center[0]) / self.pose.scale;
        let dy = (y - 0.5 - self.pose.center[1]) / self.pose.scale;
        let u = (self.cos * dx + self.sin * dy) / self.pose.stretch;
        let v = self.cos * dy - self.sin * dx;
        [if self.pose.mirrored { -u } else { u }, v]
    }

    /// Object coordinates, neither mirrored nor stretched: for things beside the object.
    fn to_object_upright(&self, x: f32, y: f32) -> [f32; 2] {
        let at = |v: f32, center: f32| (v - 0.5 - center) / self.pose.scale;
        [at(x, self.pose.center[0]), at(y, self.pose.center[1])]
    }

    /// The soft shadow on the ground below the object.
    fn shade(&self, color: &mut Rgb, x: f32, y: f32) {
        let dx = (x - 0.5 - self.pose.center[0] + 0.05 * self.pose.light[0]) / self.pose.scale;
        let dy = (y - 0.5 - self.pose.center[1]) / self.pose.scale - 0.92;
        let reach = (dx / 0.95).powi(2) + (dy / 0.16).powi(2);
        let shadow = 0.45 * (-reach * 1.6).exp();
        *color = color.map(|c| c * (1.0 - shadow));
    }
}

/// Lays one part over the colour so far.
fn paint_part(
    color: &mut Rgb,
    part: &shapes::Part,
    (p, q): ([f32; 2], [f32; 2]),
    frame: &Frame,
    surface: &surfaces::Surface,
) {
    let mut distance = part.shape.distance(p);
    if distance > 0.12 + frame.pixel {
        return;
    }
    if part.tint != shapes::Tint::Fixed([0.0; 3]) {
        distance += surface.ragged(q);
    }
    let coverage = (0.5 - distance / frame.pixel).clamp(0.0, 1.0);
    if coverage <= 0.0 {
        return;
    }
    let step = 0.01;
    let gx = part.shape.distance([p[0] + step, p[1]]) - part.shape.distance([p[0] - step, p[1]]);
    let gy = part.shape.distance([p[0], p[1] + step]) - part.shape.distance([p[0], p[1] - step]);
    let slope = (1.0 + distance / part.bevel).clamp(0.0, 1.0).powi(2) * 0.9;
    let length = (gx * gx + gy * gy).sqrt().max(1e-6);
    let side = if frame.pose.mirrored { -1.0 } else { 1.0 };
    let normal = normalize([
        side * slope * gx / length,
        slope * gy / length,
        1.0 - 0.6 * slope,
    ]);
    let (painted, alpha) = surface.paint(part.tint, (p, q), normal, frame.pose.light);
    // A thin darker rim sets the parts off from one another.
    let rim = 1.0 - 0.45 * (1.0 + distance / 0.045).clamp(0.0, 1.0);
    for c in 0..3 {
        let a = coverage * alpha;
        color[c] = color[c] * (1.0 - a) + painted[c] * rim * a;
    }
}

fn normalize(v: [f32; 3]) -> [f32; 3] {
    let length = (v[0] * v[0] + v[1] * v[1] + v[2] * v[2]).sqrt().max(1e-6);
    v.map(|c| c / length)
}

fn pick<T: Copy>(all: &[T], random: &mut Philox) -> T {
    all[random.below(all.len() as u32) as usize]
}

/// A pale backdrop, of any hue.
fn pale(random: &mut Philox) -> Rgb {
    let depth = 0.35 * random.uniform();
    std::array::from_fn(|_| 0.95 - depth * random.uniform() - 0.25 * depth)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_scene_gives_the_same_bytes() {
        let scene = Scene::random(Object::Fish, 3);
        assert_eq!(scene.render(48), scene.render(48));
        assert_ne!(scene.render(48), Scene::random(Object::Fish, 4).render(48));
    }

    #[test]
    fn every_attribute_with_a_look_is_seen_in_the_picture() {
        let plain = Scene::plain(Object::Mug, Color::Blue, 1);
        let before = plain.render(64);
        for attribute in vocabulary::all().iter().filter(|a| a.look.is_some()) {
            let after = plain.clone().with(&[attribute]).render(64);
            let difference: u64 = before
                .iter()
                .zip(&after)
                .map(|(a, b)| u64::from(a.abs_diff(*b)))
                .sum();
            assert!(
                difference > 5_000,
                "{} is hardly seen: {difference}",
                attribute.name
            );
        }
    }

    #[test]
    fn every_object_covers_a_fair_part_of_its_picture() {
        for object in Object::ALL {
            let parts = shapes::parts(*object);
            let inside = (0..4096)
                .filter(|i| {
                    let p = [(i % 64) as f32 / 32.0 - 1.0, (i / 64) as f32 / 32.0 - 1.0];
                    parts.iter().any(|part| part.shape.distance(p) < 0.0)
                })
                .count();
            let share = inside as f32 / 4096.0;
            assert!((0.1..0.8).contains(&share), "{object:?} covers {share}");
        }
    }
}
