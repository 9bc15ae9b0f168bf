//! Materials and patterns: the colour of a point on the object, lit.
//!
//! Textures lie in the picture, not on the object, and repeat with every one of its
//! [`TILES`] × [`TILES`] tiles; nothing in them is drawn by lot. The small Flux sees a tile as one
//! token: so "make it of marble" has one right answer wherever the object stands, the same in
//! every token, and the network need not guess the phase of a stripe or the place of a vein.
//! (Textures that turned with the object and were drawn from the scene's seed came out as their
//! own mean.) What colours lie in bands, and how a surface takes light, is the object's.

use super::shapes::Tint;
use super::{Color, Rgb, Scene, unpack};
use crate::vocabulary::{Look, MaterialKind, PatternKind};

/// A hash of two lattice coordinates and a seed, uniform in 0..1.
pub fn hash(x: i32, y: i32, seed: u64) -> f32 {
    let mut h = (x as u32).wrapping_mul(0x8da6_b343)
        ^ (y as u32).wrapping_mul(0xd816_3841)
        ^ (seed as u32).wrapping_mul(0xcb1a_b31f)
        ^ (seed >> 32) as u32;
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    (h ^ (h >> 15)) as f32 / u32::MAX as f32
}

/// Smooth noise in 0..1, one bump per lattice cell.
pub fn noise(x: f32, y: f32, seed: u64) -> f32 {
    between(x, y, |i, j| hash(i, j, seed))
}

/// The values `at` the four lattice points around, blended smoothly.
fn between(x: f32, y: f32, at: impl Fn(i32, i32) -> f32) -> f32 {
    let (x0, y0) = (x.floor(), y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (smooth(x - x0), smooth(y - y0));
    let (i, j) = (x0 as i32, y0 as i32);
    let row = |j| at(i, j) * (1.0 - u) + at(i + 1, j) * u;
    row(j) * (1.0 - v) + row(j + 1) * v
}

/// Three octaves of noise, in 0..1.
pub fn clouds(x: f32, y: f32, seed: u64) -> f32 {
    (noise(x, y, seed) * 4.0
        + noise(2.0 * x, 2.0 * y, seed ^ 1) * 2.0
        + noise(4.0 * x, 4.0 * y, seed ^ 2))
        / 7.0
}

/// `a` where `t` is 0, `b` where it is 1.
pub fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    let t = t.clamp(0.0, 1.0);
    std::array::from_fn(|c| a[c] * (1.0 - t) + b[c] * t)
}

/// Lighter for positive `by`, darker for negative.
pub fn shade(rgb: Rgb, by: f32) -> Rgb {
    mix(rgb, if by > 0.0 { [1.0; 3] } else { [0.0; 3] }, by.abs())
}

/// Brightness as the eye weighs it.
pub fn gray(rgb: Rgb) -> f32 {
    0.30 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]
}

/// Tiles along a side of the picture; what a texture measures in. 16 pixels of 128.
pub const TILES: f32 = 8.0;

/// Smooth noise in 0..1 that repeats with every tile, of `nx` by `ny` bumps each.
fn tiled(q: [f32; 2], nx: i32, ny: i32, seed: u64) -> f32 {
    let at = |i: i32, j: i32| hash(i.rem_euclid(nx), j.rem_euclid(ny), seed);
    between(q[0] * nx as f32, q[1] * ny as f32, at)
}

/// Three octaves of [`tiled`], in 0..1.
fn tiled_clouds(q: [f32; 2], n: i32, seed: u64) -> f32 {
    (tiled(q, n, n, seed) * 4.0
        + tiled(q, 2 * n, 2 * n, seed ^ 1) * 2.0
        + tiled(q, 4 * n, 4 * n, seed ^ 2))
        / 7.0
}

/// Which of five slanted squares of a tile a point lies in, 0..5.
fn facet([x, y]: [f32; 2]) -> i32 {
    let (i, j) = ((2.0 * x + y).floor() as i32, (2.0 * y - x).floor() as i32);
    (i + 2 * j).rem_euclid(5)
}

/// How a material answers to light.
struct Finish {
    /// Colour before any light.
    base: Rgb,
    /// Strength of the highlight.
    gloss: f32,
    /// Its sharpness.
    shininess: f32,
    /// How much shows whatever the light, 0..1.
    glow: f32,
    /// 1 is solid.
    alpha: f32,
}

/// The look of one object, ready to be asked point by point.
pub struct Surface {
    colors: Vec<Rgb>,
    material: Option<MaterialKind>,
    pattern: Option<(PatternKind, [Rgb; 2])>,
}

impl Surface {
    /// The surface of the scene's object: of colour, material and pattern the latest one
    /// decides the colours.
    pub fn new(scene: &Scene) -> Self {
        let mut surface = Self {
            colors: vec![scene.color.unwrap_or(Color::Gray).rgb()],
            material: None,
            pattern: None,
        };
        for look in scene.looks() {
            match *look {
                Look::Colors(colors) => {
                    surface.colors = colors.iter().map(|c| unpack(*c)).collect()
                }
                Look::Material(kind, rgb) => {
                    surface.colors = vec![unpack(rgb)];
                    surface.material = Some(kind);
                }
                Look::Pattern(kind, colors) => {
                    surface.pattern = Some((kind, colors.map(unpack)));
                    surface.colors = vec![unpack(colors[0])];
                }
                _ => {}
            }
        }
        surface
    }

    /// How far the outline is pushed in or out here: fur sticks out, others do not. `q` is the
    /// place in the picture, in tiles.
    pub fn ragged(&self, q: [f32; 2]) -> f32 {
        match self.material {
            Some(MaterialKind::Fur) => 0.10 * (tiled(q, 6, 6, 1) - 0.62),
            Some(MaterialKind::Moss) => 0.05 * (tiled(q, 5, 5, 2) - 0.6),
            _ => 0.0,
        }
    }

    /// Colour and opacity of a point, lit from `light` where the surface faces `normal`: `p` is
    /// where it is on the object, `q` in the picture, in tiles.
    pub fn paint(
        &self,
        tint: Tint,
        (p, q): ([f32; 2], [f32; 2]),
        normal: Rgb,
        light: Rgb,
    ) -> (Rgb, f32) {
        let finish = match tint {
            Tint::Fixed(rgb) => Finish::of(rgb, 0.15, 20.0),
            Tint::Body => self.finish(self.body(p, q), q, normal),
            Tint::Second => {
                let rgb = match &self.pattern {
                    Some((_, [ground, figure])) => mix(*ground, *figure, 0.75),
                    None => *self.colors.get(1).unwrap_or(&shade(self.colors[0], -0.25)),
                };
                self.finish(rgb, q, normal)
            }
        };
        let diffuse = dot(normal, light).max(0.0);
        let half = super::normalize([light[0], light[1], light[2] + 1.0]);
        let highlight = finish.gloss * dot(normal, half).max(0.0).powf(finish.shininess);
        let lit = (0.42 + 0.72 * diffuse) * (1.0 - finish.glow) + finish.glow;
        (finish.base.map(|c| c * lit + highlight), finish.alpha)
    }

    /// The paint at a point of the main parts.
    fn body(&self, p: [f32; 2], q: [f32; 2]) -> Rgb {
        if let Some((kind, [ground, figure])) = self.pattern {
            return mix(ground, figure, pattern_at(kind, q));
        }
        // Several colours lie in broad bands.
        let band = (p[1] * 0.5 + 0.5).clamp(0.0, 0.999) * self.colors.len() as f32;
        self.colors[(band as usize).min(self.colors.len() - 1)]
    }

    fn finish(&self, rgb: Rgb, q: [f32; 2], normal: Rgb) -> Finish {
        use std::f32::consts::{PI, TAU};
        let [x, y] = q;
        let n = |bumps: i32| tiled(q, bumps, bumps, 3);
        let matte = |base| Finish::of(base, 0.0, 1.0);
        let Some(material) = self.material else {
            return Finish::of(rgb, 0.35, 24.0);
        };
        match material {
            MaterialKind::Wood => {
                let ring = TAU * x + 4.0 * tiled(q, 2, 1, 4);
                let grain = 0.7 * (0.5 + 0.5 * ring.sin()) + 0.3 * tiled(q, 8, 1, 5);
                Finish::of(mix(shade(rgb, -0.42), shade(rgb, 0.16), grain), 0.10, 10.0)
            }
            MaterialKind::Metal => {
                let band = 0.5 + 0.5 * (normal[1] * 5.0 + normal[0] * 2.2 - 0.6).sin();
                let base = mix(shade(rgb, 0.30), shade(rgb, -0.62), band.powf(1.4));
                let mut metal = Finish::of(base, 0.85, 26.0);
                metal.glow = 0.45;
                metal
            }
            MaterialKind::Stone => {
                let base = mix(shade(rgb, -0.45), shade(rgb, 0.15), 0.5 * n(2) + 0.5 * n(6));
                Finish::of(base, 0.03, 6.0)
            }
            MaterialKind::Marble => {
                let warp = 3.5 * tiled_clouds(q, 2, 6);
                let vein = (PI * (x + y) + warp).sin().abs().powf(0.35);
                Finish::of(mix(shade(rgb, -0.55), rgb, vein), 0.40, 40.0)
            }
            MaterialKind::Glass => {
                let mut glass = Finish::of(shade(rgb, 0.2), 0.95, 50.0);
                glass.alpha = 0.45 + 0.5 * (1.0 - normal[2]).clamp(0.0, 1.0);
                glass
            }
            MaterialKind::Fabric => {
                let weave = 0.5 + 0.25 * ((3.0 * TAU * x).sin() + (3.0 * TAU * y).sin());
                let fold = 0.5 + 0.5 * (TAU * x + 3.0 * tiled(q, 2, 2, 7)).sin();
                matte(shade(rgb, 0.24 * fold + 0.14 * weave - 0.24))
            }
            MaterialKind::Leather => Finish::of(rgb.map(|c| c * (0.66 + 0.5 * n(5))), 0.24, 14.0),
            MaterialKind::Knit => {
                let stitch = 0.5 + 0.5 * ((y * 2.0 + fold(x * 2.0) * 1.4) * TAU).sin();
                matte(mix(shade(rgb, -0.5), shade(rgb, 0.12), stitch.powf(0.7)))
            }
            MaterialKind::Paper => {
                let tilt = hash(facet(q), 0, 8);
                matte(shade(rgb, 0.34 * tilt - 0.24))
            }
            MaterialKind::Ceramic => Finish::of(rgb, 0.80, 50.0),
            MaterialKind::Fur => {
                let hair = tiled(q, 7, 3, 9);
                matte(mix(shade(rgb, -0.42), shade(rgb, 0.22), hair))
            }
            MaterialKind::Ice => {
                let crack = (tiled_clouds(q, 2, 10) - 0.5).abs();
                let base = mix([0.97, 1.0, 1.0], shade(rgb, -0.12), (crack * 14.0).min(1.0));
                let mut ice = Finish::of(base, 0.75, 30.0);
                (ice.alpha, ice.glow) = (0.86, 0.35);
                ice
            }
            MaterialKind::Wicker => {
                let (i, j) = ((x * 2.0).floor() as i32, (y * 4.0).floor() as i32);
                let across = if (i + j) & 1 == 0 { x * 2.0 } else { y * 4.0 };
                let strand = (PI * (across - across.floor())).sin();
                matte(mix(shade(rgb, -0.55), shade(rgb, 0.12), strand))
            }
            MaterialKind::Plastic => {
                let hue = [normal[0], normal[1], -normal[0]].map(|c| 0.5 + 0.5 * (c * 4.0).sin());
                Finish::of(mix(rgb, hue, 0.18), 0.75, 18.0)
            }
            MaterialKind::Rust => {
                let t = tiled_clouds(q, 2, 11) * 2.0 - 0.5;
                Finish::of(mix(shade(rgb, -0.55), shade(rgb, 0.25), t), 0.05, 8.0)
            }
            MaterialKind::Clay => matte(shade(rgb, 0.16 * n(3) - 0.10)),
            MaterialKind::Crystal => {
                let tilt = hash(facet(q), 0, 12);
                let mut crystal = Finish::of(shade(rgb, 0.9 * tilt - 0.45), 0.6, 20.0);
                (crystal.alpha, crystal.glow) = (0.93, 0.25);
                crystal
            }
            MaterialKind::Moss => {
                let t = 0.5 * n(4) + 0.5 * n(8);
                matte(mix(shade(rgb, -0.55), shade(rgb, 0.2), t))
            }
        }
    }
}

impl Finish {
    fn of(base: Rgb, gloss: f32, shininess: f32) -> Self {
        Self {
            base,
            gloss,
            shininess,
            glow: 0.0,
            alpha: 1.0,
        }
    }
}

fn dot(a: Rgb, b: Rgb) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// How far a coordinate is from the middle of its cell, 0..0.5.
fn fold(v: f32) -> f32 {
    (v - v.floor() - 0.5).abs()
}

/// 1 where the figure covers, 0 where the ground shows, soft between. `q` is in tiles, and the
/// pattern the same in every tile.
fn pattern_at(pattern: PatternKind, q: [f32; 2]) -> f32 {
    use std::f32::consts::TAU;
    let edge = |distance: f32| (0.5 - distance * 5.0).clamp(0.0, 1.0);
    let [x, y] = q;
    // The place within the tile, from its middle.
    let middle = |[x, y]: [f32; 2]| [x - x.floor() - 0.5, y - y.floor() - 0.5];
    // Rows of half a tile's height, every other one moved by half a tile: the place from the
    // middle of the cell.
    let staggered = || {
        let row = (2.0 * y).floor();
        let x = x + 0.5 * (row as i32 & 1) as f32;
        [x - x.floor() - 0.5, y - 0.5 * row - 0.25]
    };
    let round = |[x, y]: [f32; 2]| ((x * x + y * y).sqrt(), y.atan2(x));
    // Half and quarter tiles by number, the same in every tile.
    let cells = |n: i32| {
        let number = |v: f32| ((v * n as f32).floor() as i32).rem_euclid(n);
        (number(x), number(y))
    };
    match pattern {
        PatternKind::Stripes => edge(fold(x) - 0.25),
        PatternKind::Dots => edge(round(staggered()).0 - 0.21),
        PatternKind::Check => {
            let (i, j) = cells(2);
            ((i + j) & 1) as f32
        }
        PatternKind::Plaid => {
            let band = |v: f32| edge(fold(v) - 0.2);
            0.5 * band(x) + 0.5 * band(y)
        }
        PatternKind::Grid => {
            let line = |v: f32| edge(0.5 * (0.42 - fold(v * 2.0)));
            line(x).max(line(y))
        }
        PatternKind::Stars => {
            let (radius, angle) = round(middle(q));
            let sector = TAU / 5.0;
            let a = (angle + 0.25 * sector + 10.0 * sector) % sector - 0.5 * sector;
            edge(radius - 0.19 - 0.26 * (a.abs() / (0.5 * sector)))
        }
        PatternKind::Hearts => {
            let [x, y] = middle(q);
            let (x, y) = (x.abs() * 2.5, (0.12 - y) * 2.5);
            let k = y - (x * 0.8).sqrt() * 0.62;
            edge(((x * x + k * k).sqrt() - 0.80) * 0.4)
        }
        PatternKind::Zigzag => edge(fold(y + 1.1 * fold(x)) - 0.25),
        PatternKind::Flowers => {
            let (radius, angle) = round(middle(q));
            let petal = 0.29 + 0.14 * (angle * 5.0).cos();
            edge(radius - petal) * (1.0 - edge(radius - 0.09))
        }
        PatternKind::Leaves => {
            let [x, y] = middle(q);
            let (sin, cos) = 0.7f32.sin_cos();
            let (u, v) = (cos * x + sin * y, cos * y - sin * x);
            edge(u.abs() - 0.30 * (1.0 - (v / 0.52).powi(2))) * (1.0 - edge(u.abs() - 0.02))
        }
        PatternKind::Waves => {
            let [x, y] = staggered();
            let radius = (x * x + (y + 0.25) * (y + 0.25)).sqrt();
            edge((fold(radius * 3.0) - 0.22) * 0.4)
        }
        PatternKind::Scales => {
            let [x, y] = staggered();
            let radius = (x * x + (y + 0.25) * (y + 0.25)).sqrt();
            edge((radius - 0.46).abs() - 0.09)
        }
        PatternKind::Spots => {
            let [x, y] = middle(q);
            let (radius, angle) = round([x + 0.06, y - 0.04]);
            edge(((radius - 0.28).abs() - 0.10 * (1.0 + (angle * 3.0).sin())) * 0.9)
        }
        PatternKind::Tiger => {
            let warp = 0.5 * (tiled(q, 2, 2, 13) - 0.5);
            edge(fold(y + warp) - 0.10 - 0.14 * tiled(q, 2, 3, 14))
        }
        PatternKind::Camouflage => edge((tiled_clouds(q, 2, 15) - 0.5) * 1.2),
        PatternKind::Triangles => f32::from((x - x.floor()) + (y - y.floor()) < 1.0),
        PatternKind::Hexagons => {
            let [x, y] = staggered();
            let (radius, angle) = round([x, y * 3.0f32.sqrt()]);
            let third = std::f32::consts::PI / 3.0;
            let a = (angle + 12.0 * third) % third - 0.5 * third;
            edge(0.40 - radius * a.cos())
        }
        PatternKind::Swirls => {
            let (radius, angle) = round(middle(q));
            edge((fold(radius * 3.0 + angle / TAU) - 0.18) * 0.5 + (radius - 0.46).max(0.0))
        }
        PatternKind::Circuit => {
            let (i, j) = cells(2);
            let [u, v] = middle([x * 2.0, y * 2.0]);
            let line = if (i + j) & 1 == 0 { u } else { v };
            edge((line.abs() - 0.11).min(round([u, v]).0 - 0.22) * 0.5)
        }
        PatternKind::Speckles => {
            let (i, j) = cells(2);
            let [u, v] = middle([x * 2.0, y * 2.0]);
            let at = [
                u + 0.5 * (hash(i, j, 3) - 0.5),
                v + 0.5 * (hash(i, j, 4) - 0.5),
            ];
            edge((round(at).0 - 0.14 - 0.24 * hash(i, j, 5)) * 0.5)
        }
        PatternKind::Diamonds => edge(fold(x) + fold(y) - 0.46),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Object, Scene};
    use crate::vocabulary;

    #[test]
    fn a_texture_is_the_same_in_every_tile() {
        let plain = Scene::plain(Object::Mug, Color::Blue, 1);
        let textured = |a: &&vocabulary::Attribute| {
            matches!(a.look, Some(Look::Material(..) | Look::Pattern(..)))
        };
        for attribute in vocabulary::all().iter().filter(textured) {
            let surface = Surface::new(&plain.clone().with(&[attribute]));
            for i in 0..64 {
                // Not on a lattice line, where rounding may fall to either side.
                let q = [(i % 8) as f32 / 8.0 + 0.0371, (i / 8) as f32 / 8.0 + 0.0443];
                let at = |dx: f32, dy: f32| {
                    let there = [q[0] + dx, q[1] + dy];
                    let (p, light) = ([0.1, 0.2], [-0.4, -0.6, 0.7]);
                    surface.paint(Tint::Body, (p, there), [0.0, 0.0, 1.0], light)
                };
                let (here, right, below) = (at(0.0, 0.0), at(3.0, 0.0), at(0.0, 5.0));
                for c in 0..3 {
                    let off = (here.0[c] - right.0[c])
                        .abs()
                        .max((here.0[c] - below.0[c]).abs());
                    assert!(off < 2e-3, "{}: {off}", attribute.name);
                }
            }
        }
    }
}
