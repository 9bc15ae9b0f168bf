//! Materials and patterns: the colour of a point on the object, lit.

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
    let (x0, y0) = (x.floor(), y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (smooth(x - x0), smooth(y - y0));
    let (i, j) = (x0 as i32, y0 as i32);
    let row = |j| hash(i, j, seed) * (1.0 - u) + hash(i + 1, j, seed) * u;
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
    seed: u64,
}

impl Surface {
    /// The surface of the scene's object: of colour, material and pattern the latest one
    /// decides the colours.
    pub fn new(scene: &Scene) -> Self {
        let mut surface = Self {
            colors: vec![scene.color.unwrap_or(Color::Gray).rgb()],
            material: None,
            pattern: None,
            seed: scene.seed,
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

    /// How far the outline is pushed in or out here: fur sticks out, others do not.
    pub fn ragged(&self, p: [f32; 2]) -> f32 {
        match self.material {
            Some(MaterialKind::Fur) => 0.10 * (noise(p[0] * 22.0, p[1] * 22.0, self.seed) - 0.62),
            Some(MaterialKind::Moss) => 0.05 * (noise(p[0] * 14.0, p[1] * 14.0, self.seed) - 0.6),
            _ => 0.0,
        }
    }

    /// Colour and opacity of a point, lit from `light` where the surface faces `normal`.
    pub fn paint(&self, tint: Tint, p: [f32; 2], normal: Rgb, light: Rgb) -> (Rgb, f32) {
        let finish = match tint {
            Tint::Fixed(rgb) => Finish::of(rgb, 0.15, 20.0),
            Tint::Body => self.finish(self.body(p), p, normal),
            Tint::Second => {
                let rgb = match &self.pattern {
                    Some((_, [ground, figure])) => mix(*ground, *figure, 0.75),
                    None => *self.colors.get(1).unwrap_or(&shade(self.colors[0], -0.25)),
                };
                self.finish(rgb, p, normal)
            }
        };
        let diffuse = dot(normal, light).max(0.0);
        let half = super::normalize([light[0], light[1], light[2] + 1.0]);
        let highlight = finish.gloss * dot(normal, half).max(0.0).powf(finish.shininess);
        let lit = (0.42 + 0.72 * diffuse) * (1.0 - finish.glow) + finish.glow;
        (finish.base.map(|c| c * lit + highlight), finish.alpha)
    }

    /// The paint at a point of the main parts.
    fn body(&self, p: [f32; 2]) -> Rgb {
        if let Some((kind, [ground, figure])) = self.pattern {
            return mix(ground, figure, pattern_at(kind, p, self.seed));
        }
        // Several colours lie in broad bands.
        let band = (p[1] * 0.5 + 0.5).clamp(0.0, 0.999) * self.colors.len() as f32;
        self.colors[(band as usize).min(self.colors.len() - 1)]
    }

    fn finish(&self, rgb: Rgb, p: [f32; 2], normal: Rgb) -> Finish {
        let (x, y, seed) = (p[0], p[1], self.seed);
        let n = |scale: f32| noise(x * scale, y * scale, seed);
        let matte = |base| Finish::of(base, 0.0, 1.0);
        let Some(material) = self.material else {
            return Finish::of(rgb, 0.35, 24.0);
        };
        match material {
            MaterialKind::Wood => {
                let ring = (x * 9.0 + 2.5 * clouds(x * 1.5, y * 0.6, seed)) * 2.2;
                let grain = 0.7 * (0.5 + 0.5 * ring.sin()) + 0.3 * noise(x * 40.0, y * 4.0, seed);
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
                let base = mix(
                    shade(rgb, -0.45),
                    shade(rgb, 0.15),
                    0.5 * n(7.0) + 0.5 * n(19.0),
                );
                Finish::of(base, 0.03, 6.0)
            }
            MaterialKind::Marble => {
                let warp = 3.0 * clouds(x * 2.0, y * 2.0, seed);
                let vein = ((x + 0.6 * y) * 3.5 + warp * 2.2).sin().abs().powf(0.35);
                Finish::of(mix(shade(rgb, -0.55), rgb, vein), 0.40, 40.0)
            }
            MaterialKind::Glass => {
                let mut glass = Finish::of(shade(rgb, 0.2), 0.95, 50.0);
                glass.alpha = 0.45 + 0.5 * (1.0 - normal[2]).clamp(0.0, 1.0);
                glass
            }
            MaterialKind::Fabric => {
                let weave = 0.5 + 0.25 * ((x * 60.0).sin() + (y * 60.0).sin());
                let fold = 0.5 + 0.5 * (x * 5.0 + 3.0 * clouds(x, y * 2.0, seed)).sin();
                matte(shade(rgb, 0.24 * fold + 0.14 * weave - 0.24))
            }
            MaterialKind::Leather => {
                Finish::of(rgb.map(|c| c * (0.66 + 0.5 * n(24.0))), 0.24, 14.0)
            }
            MaterialKind::Knit => {
                let column = x * 9.0;
                let lean = (column - column.floor() - 0.5).abs();
                let stitch = 0.5 + 0.5 * ((y * 9.0 + lean * 1.4) * std::f32::consts::TAU).sin();
                matte(mix(shade(rgb, -0.5), shade(rgb, 0.12), stitch.powf(0.7)))
            }
            MaterialKind::Paper => {
                let facet = hash(
                    (x * 3.0 + y).floor() as i32,
                    (y * 3.0 - x).floor() as i32,
                    seed,
                );
                matte(shade(rgb, 0.34 * facet - 0.24))
            }
            MaterialKind::Ceramic => Finish::of(rgb, 0.80, 50.0),
            MaterialKind::Fur => {
                let hair = noise(x * 30.0 + 4.0 * y, y * 9.0, seed);
                matte(mix(shade(rgb, -0.42), shade(rgb, 0.22), hair))
            }
            MaterialKind::Ice => {
                let crack = (clouds(x * 3.0, y * 3.0, seed) - 0.5).abs();
                let base = mix([0.97, 1.0, 1.0], shade(rgb, -0.12), (crack * 14.0).min(1.0));
                let mut ice = Finish::of(base, 0.75, 30.0);
                (ice.alpha, ice.glow) = (0.86, 0.35);
                ice
            }
            MaterialKind::Wicker => {
                let (i, j) = ((x * 8.0).floor() as i32, (y * 12.0).floor() as i32);
                let across = if (i + j) & 1 == 0 { x * 8.0 } else { y * 12.0 };
                let strand = (std::f32::consts::PI * (across - across.floor())).sin();
                matte(mix(shade(rgb, -0.55), shade(rgb, 0.12), strand))
            }
            MaterialKind::Plastic => {
                let hue = [normal[0], normal[1], -normal[0]].map(|c| 0.5 + 0.5 * (c * 4.0).sin());
                Finish::of(mix(rgb, hue, 0.18), 0.75, 18.0)
            }
            MaterialKind::Rust => {
                let t = clouds(x * 4.0, y * 4.0, seed) * 2.0 - 0.5;
                Finish::of(mix(shade(rgb, -0.55), shade(rgb, 0.25), t), 0.05, 8.0)
            }
            MaterialKind::Clay => matte(shade(rgb, 0.16 * n(9.0) - 0.10)),
            MaterialKind::Crystal => {
                let (i, j) = ((x * 2.6 + 0.8 * y).floor(), (y * 2.6 - 1.1 * x).floor());
                let facet = hash(i as i32, j as i32, seed);
                let mut crystal = Finish::of(shade(rgb, 0.9 * facet - 0.45), 0.6, 20.0);
                (crystal.alpha, crystal.glow) = (0.93, 0.25);
                crystal
            }
            MaterialKind::Moss => {
                let t = 0.5 * n(12.0) + 0.5 * n(30.0);
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

/// 1 where the figure covers, 0 where the ground shows, soft between.
fn pattern_at(pattern: PatternKind, p: [f32; 2], seed: u64) -> f32 {
    let edge = |distance: f32| (0.5 - distance * 14.0).clamp(0.0, 1.0);
    let [px, py] = p;
    // The cell of a staggered grid: the place within it (-0.5..0.5) and its numbers.
    let cell = |size: f32| {
        let row = (py / size).floor();
        let x = px / size + 0.5 * (row as i32 & 1) as f32;
        (
            [x - x.floor() - 0.5, py / size - row - 0.5],
            [x.floor() as i32, row as i32],
        )
    };
    let round = |[x, y]: [f32; 2]| ((x * x + y * y).sqrt(), y.atan2(x));
    match pattern {
        PatternKind::Stripes => edge((fold((px + 0.2 * py) * 2.6) - 0.25) * 0.38),
        PatternKind::Dots => edge((round(cell(0.36).0).0 - 0.29) * 0.36),
        PatternKind::Check => {
            ((((px + 4.0) * 3.4).floor() + ((py + 4.0) * 3.4).floor()) as i32 & 1) as f32
        }
        PatternKind::Plaid => {
            let band = |v: f32| edge((fold(v * 2.2) - 0.2) * 0.45);
            0.5 * band(px) + 0.5 * band(py)
        }
        PatternKind::Grid => {
            let line = |v: f32| edge((0.42 - fold(v * 5.0)) * 0.2);
            line(px).max(line(py))
        }
        PatternKind::Stars => {
            let (radius, angle) = round(cell(0.46).0);
            let sector = std::f32::consts::TAU / 5.0;
            let a = (angle + 0.25 * sector + 10.0 * sector) % sector - 0.5 * sector;
            edge((radius - 0.17 - 0.25 * (a.abs() / (0.5 * sector))) * 0.40)
        }
        PatternKind::Hearts => {
            let [x, y] = cell(0.46).0;
            let (x, y) = (x.abs() * 2.7, (0.12 - y) * 2.7);
            let k = y - (x * 0.8).sqrt() * 0.62;
            edge(((x * x + k * k).sqrt() - 0.80) * 0.17)
        }
        PatternKind::Zigzag => edge((fold((py + fold(px * 3.2) * 0.34) * 3.2) - 0.25) * 0.31),
        PatternKind::Flowers => {
            let (radius, angle) = round(cell(0.48).0);
            let petal = 0.26 + 0.13 * (angle * 5.0).cos();
            edge((radius - petal) * 0.48) * (1.0 - edge((radius - 0.09) * 0.48))
        }
        PatternKind::Leaves => {
            let ([x, y], [i, j]) = cell(0.5);
            let (sin, cos) = (hash(i, j, 77) * 6.3).sin_cos();
            let (u, v) = (cos * x + sin * y, cos * y - sin * x);
            edge((u.abs() - 0.26 * (1.0 - (v / 0.46).powi(2))) * 0.5)
                * (1.0 - edge((u.abs() - 0.03) * 0.5))
        }
        PatternKind::Waves | PatternKind::Scales => {
            let [x, y] = cell(if pattern == PatternKind::Waves {
                0.42
            } else {
                0.30
            })
            .0;
            let radius = (x * x + (y + 0.5) * (y + 0.5)).sqrt();
            let rings = if pattern == PatternKind::Waves {
                fold(radius * 3.2) - 0.22
            } else {
                (radius - 0.62).abs() - 0.13
            };
            edge(rings * 0.30)
        }
        PatternKind::Spots => {
            let ([x, y], [i, j]) = cell(0.34);
            let at = [
                x + 0.3 * (hash(i, j, 3) - 0.5),
                y + 0.3 * (hash(i, j, 4) - 0.5),
            ];
            let (radius, angle) = round(at);
            edge(((radius - 0.26).abs() - 0.09 * (1.0 + (angle * 3.0 + i as f32).sin())) * 0.34)
        }
        PatternKind::Tiger => {
            let warp = 0.22 * (noise(px * 3.0, py * 3.0, seed) - 0.5);
            edge(
                (fold((py + warp) * 3.0) - 0.10 - 0.14 * noise(px * 2.5, py * 6.0, seed ^ 5))
                    * 0.33,
            )
        }
        PatternKind::Camouflage => edge((clouds(px * 3.0, py * 3.0, seed) - 0.5) * 0.6),
        PatternKind::Triangles => {
            let (x, y) = (px * 3.2, py * 3.2);
            let up = (x - x.floor()) + (y - y.floor()) < 1.0;
            f32::from(up)
        }
        PatternKind::Hexagons => {
            let (radius, angle) = round(cell(0.34).0);
            let third = std::f32::consts::PI / 3.0;
            let a = (angle + 12.0 * third) % third - 0.5 * third;
            edge((0.40 - radius * a.cos()) * 0.34)
        }
        PatternKind::Swirls => {
            let (radius, angle) = round(cell(0.52).0);
            edge(
                (fold(radius * 3.0 + angle / std::f32::consts::TAU) - 0.18) * 0.17
                    + (radius - 0.46).max(0.0),
            )
        }
        PatternKind::Circuit => {
            let (i, j) = ((px * 4.5).floor(), (py * 4.5).floor());
            let (x, y) = (px * 4.5 - i - 0.5, py * 4.5 - j - 0.5);
            let line = if hash(i as i32, j as i32, 9) < 0.5 {
                x
            } else {
                y
            };
            let pad = round([x, y]).0 - 0.2;
            edge((line.abs() - 0.09).min(pad) * 0.22)
        }
        PatternKind::Speckles => {
            let ([x, y], [i, j]) = cell(0.20);
            let at = [
                x + 0.5 * (hash(i, j, 3) - 0.5),
                y + 0.5 * (hash(i, j, 4) - 0.5),
            ];
            edge((round(at).0 - 0.12 - 0.2 * hash(i, j, 5)) * 0.2)
        }
        PatternKind::Diamonds => {
            let [x, y] = [fold(px * 2.4), fold(py * 1.8)];
            edge((x + y - 0.42) * 0.45)
        }
    }
}
