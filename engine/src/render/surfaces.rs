//! Materials and patterns: the colour of a point on the object, lit.

use super::shapes::Tint;
use super::{Color, Material, Pattern, Rgb, Scene};

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
    (noise(x, y, seed) * 4.0 + noise(2.0 * x, 2.0 * y, seed ^ 1) * 2.0
        + noise(4.0 * x, 4.0 * y, seed ^ 2))
        / 7.0
}

/// `a` where `t` is 0, `b` where it is 1.
pub fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    let t = t.clamp(0.0, 1.0);
    std::array::from_fn(|c| a[c] * (1.0 - t) + b[c] * t)
}

/// Whether the object's colour shows in this material.
pub fn takes_color(material: Material) -> bool {
    matches!(
        material,
        Material::Plain | Material::Glass | Material::Fur | Material::Leather | Material::Knit
    )
}

/// How a material answers to light.
struct Finish {
    /// Colour before any light.
    base: Rgb,
    /// Strength of the highlight.
    gloss: f32,
    /// Its sharpness.
    shininess: f32,
    /// How much the material glows or mirrors by itself, 0..1.
    glow: f32,
    /// 1 is solid.
    alpha: f32,
}

/// The look of one object, ready to be asked point by point.
pub struct Surface {
    color: Rgb,
    material: Material,
    pattern: Pattern,
    pattern_color: Rgb,
    seed: u64,
}

impl Surface {
    /// The surface of the scene's object.
    pub fn new(scene: &Scene) -> Self {
        Self {
            color: scene.color.rgb(),
            material: scene.material,
            pattern: scene.pattern,
            pattern_color: scene.pattern_color.rgb(),
            seed: scene.seed,
        }
    }

    /// How far the outline is pushed in or out here: fur sticks out, others do not.
    pub fn ragged(&self, p: [f32; 2]) -> f32 {
        match self.material {
            Material::Fur => 0.10 * (noise(p[0] * 22.0, p[1] * 22.0, self.seed) - 0.62),
            Material::Moss => 0.05 * (noise(p[0] * 14.0, p[1] * 14.0, self.seed) - 0.6),
            _ => 0.0,
        }
    }

    /// Colour and opacity of a point, lit from `light` where the surface faces `normal`.
    pub fn paint(&self, tint: Tint, p: [f32; 2], normal: Rgb, light: Rgb) -> (Rgb, f32) {
        let mut finish = match tint {
            Tint::Fixed(rgb) => Finish::of(rgb, 0.15, 20.0),
            Tint::Body | Tint::Second => self.finish(p, normal),
        };
        match tint {
            Tint::Body => {
                let t = pattern_at(self.pattern, p);
                finish.base = mix(finish.base, self.pattern_color, t);
                finish.glow *= 1.0 - t;
            }
            Tint::Second => finish.base = finish.base.map(|c| c * 0.72),
            Tint::Fixed(_) => {}
        }
        let diffuse = dot(normal, light).max(0.0);
        let half = super::normalize([light[0], light[1], light[2] + 1.0]);
        let highlight = finish.gloss * dot(normal, half).max(0.0).powf(finish.shininess);
        let lit = (0.42 + 0.72 * diffuse) * (1.0 - finish.glow) + finish.glow;
        (finish.base.map(|c| c * lit + highlight), finish.alpha)
    }

    fn finish(&self, p: [f32; 2], normal: Rgb) -> Finish {
        let (x, y, seed) = (p[0], p[1], self.seed);
        let n = |scale: f32| noise(x * scale, y * scale, seed);
        match self.material {
            Material::Plain => Finish::of(self.color, 0.35, 24.0),
            Material::Wood => {
                let ring = (x * 9.0 + 2.5 * clouds(x * 1.5, y * 0.6, seed)) * 2.2;
                let grain = 0.5 + 0.5 * ring.sin();
                let fine = noise(x * 40.0, y * 4.0, seed);
                let base = mix([0.46, 0.27, 0.13], [0.76, 0.52, 0.29], 0.7 * grain + 0.3 * fine);
                Finish::of(base, 0.10, 10.0)
            }
            Material::Gold => metal([1.0, 0.76, 0.22], [0.50, 0.30, 0.04], normal),
            Material::Silver => metal([0.95, 0.96, 0.98], [0.34, 0.37, 0.42], normal),
            Material::Copper => metal([0.98, 0.62, 0.42], [0.42, 0.18, 0.09], normal),
            Material::Marble => {
                let warp = 3.0 * clouds(x * 2.0, y * 2.0, seed);
                let vein = ((x + 0.6 * y) * 3.5 + warp * 2.2).sin().abs();
                let base = mix([0.45, 0.46, 0.52], [0.95, 0.94, 0.93], vein.powf(0.35));
                Finish::of(base, 0.40, 40.0)
            }
            Material::Stone => {
                let base = mix([0.34, 0.34, 0.35], [0.66, 0.65, 0.62], 0.5 * n(7.0) + 0.5 * n(19.0));
                Finish::of(base, 0.03, 6.0)
            }
            Material::Brick => {
                let line = (y * 5.5).floor();
                let along = x * 3.0 + 0.5 * (line as i32 & 1) as f32;
                let (fx, fy) = (along - along.floor(), y * 5.5 - line);
                let mortar = fx < 0.10 || fy < 0.16;
                let shade = 0.8 + 0.4 * hash(along.floor() as i32, line as i32, seed);
                let base = [0.66 * shade, 0.27 * shade, 0.18 * shade];
                Finish::of(if mortar { [0.80, 0.77, 0.72] } else { base }, 0.03, 6.0)
            }
            Material::Ice => {
                let crack = (clouds(x * 3.0, y * 3.0, seed) - 0.5).abs();
                let base = mix([0.97, 1.0, 1.0], [0.52, 0.80, 0.94], (crack * 14.0).min(1.0));
                let mut ice = Finish::of(base, 0.75, 30.0);
                (ice.alpha, ice.glow) = (0.86, 0.35);
                ice
            }
            Material::Glass => {
                let mut glass = Finish::of(mix(self.color, [1.0; 3], 0.35), 0.95, 50.0);
                glass.alpha = 0.42 + 0.5 * (1.0 - normal[2]).clamp(0.0, 1.0);
                glass
            }
            Material::Fur => {
                let hair = noise(x * 30.0 + 4.0 * y, y * 9.0, seed);
                let base = mix(self.color.map(|c| c * 0.55), mix(self.color, [1.0; 3], 0.25), hair);
                Finish::of(base, 0.0, 1.0)
            }
            Material::Leather => {
                let grain = n(26.0);
                let base = mix(self.color, [0.42, 0.22, 0.11], 0.60);
                Finish::of(base.map(|c| c * (0.72 + 0.45 * grain)), 0.22, 14.0)
            }
            Material::Knit => {
                let column = x * 9.0;
                let lean = (column - column.floor() - 0.5).abs();
                let stitch = (0.5 + 0.5 * ((y * 9.0 + lean * 1.4) * 6.28).sin()).powf(0.7);
                let base = mix(self.color.map(|c| c * 0.5), mix(self.color, [1.0; 3], 0.15), stitch);
                Finish::of(base, 0.0, 1.0)
            }
            Material::Rust => {
                let t = clouds(x * 4.0, y * 4.0, seed);
                let base = mix([0.28, 0.13, 0.08], [0.80, 0.40, 0.16], (t - 0.25) * 2.0);
                Finish::of(base, 0.05, 8.0)
            }
            Material::Moss => {
                let base = mix([0.10, 0.24, 0.06], [0.48, 0.66, 0.20], 0.5 * n(12.0) + 0.5 * n(30.0));
                Finish::of(base, 0.0, 1.0)
            }
            Material::Lava => {
                let seam = (clouds(x * 3.5, y * 3.5, seed) - 0.48).abs() * 9.0;
                let mut lava = Finish::of(mix([1.0, 0.62, 0.12], [0.16, 0.07, 0.06], seam), 0.0, 1.0);
                lava.glow = (1.0 - seam).clamp(0.0, 0.9);
                lava
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

/// Polished metal: bright and dark bands by where the surface looks.
fn metal(bright: Rgb, dark: Rgb, normal: Rgb) -> Finish {
    let band = 0.5 + 0.5 * (normal[1] * 5.0 + normal[0] * 2.2 - 0.6).sin();
    let mut finish = Finish::of(mix(bright, dark, band.powf(1.4)), 0.85, 26.0);
    finish.glow = 0.45;
    finish
}

fn dot(a: Rgb, b: Rgb) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// 1 where the pattern covers, 0 where the material shows, soft between.
fn pattern_at(pattern: Pattern, p: [f32; 2]) -> f32 {
    let edge = |distance: f32| (0.5 - distance * 14.0).clamp(0.0, 1.0);
    // The cell of a staggered grid, and the place within it, -0.5..0.5.
    let cell = |size: f32| {
        let row = (p[1] / size).floor();
        let x = p[0] / size + 0.5 * (row as i32 & 1) as f32;
        [x - x.floor() - 0.5, p[1] / size - row - 0.5]
    };
    match pattern {
        Pattern::None => 0.0,
        Pattern::Stripes => edge((((p[0] + 0.35 * p[1]) * 2.6).fract().abs() - 0.5).abs() * 0.38 - 0.095),
        Pattern::Dots => {
            let [x, y] = cell(0.36);
            edge(((x * x + y * y).sqrt() - 0.29) * 0.36)
        }
        Pattern::Checks => {
            let odd = ((p[0] * 3.4).floor() + (p[1] * 3.4).floor()) as i32 & 1;
            odd as f32
        }
        Pattern::Stars => {
            let [x, y] = cell(0.46);
            let (radius, angle) = ((x * x + y * y).sqrt(), x.atan2(-y));
            let sector = std::f32::consts::TAU / 5.0;
            let a = (angle + 10.0 * sector) % sector - 0.5 * sector;
            // A star's rim: straight from tip to notch.
            let t = 1.0 - (a.abs() / (0.5 * sector));
            edge((radius - (0.42 - 0.25 * t.clamp(0.0, 1.0))) * 0.40)
        }
        Pattern::Hearts => {
            let [x, y] = cell(0.46);
            let (x, y) = (x.abs() * 2.7, (0.12 - y) * 2.7);
            let k = y - (x * 0.8).sqrt() * 0.62;
            edge(((x * x + k * k).sqrt() - 0.80) * 0.17)
        }
        Pattern::Zigzag => {
            let tooth = ((p[0] * 3.2).fract().abs() - 0.5).abs() * 0.34;
            let y = (p[1] + tooth) * 3.2;
            edge(((y - y.floor() - 0.5).abs() - 0.25) * 0.31)
        }
        Pattern::Flowers => {
            let [x, y] = cell(0.48);
            let (radius, angle) = ((x * x + y * y).sqrt(), y.atan2(x));
            let petal = 0.26 + 0.13 * (angle * 5.0).cos();
            edge((radius - petal) * 0.48) * (1.0 - edge((radius - 0.09) * 0.48))
        }
        Pattern::Scales => {
            let [x, y] = cell(0.30);
            let ring = ((x * x + (y + 0.5) * (y + 0.5)).sqrt() - 0.62).abs();
            edge((ring - 0.13) * 0.30)
        }
    }
}

/// The nearest named colour, for words.
pub fn nearest_color(rgb: Rgb) -> Color {
    let far = |color: &Color| -> f32 {
        let other = color.rgb();
        (0..3).map(|c| (rgb[c] - other[c]).powi(2)).sum()
    };
    let mut best = Color::Red;
    for color in Color::ALL {
        if far(color) < far(&best) {
            best = *color;
        }
    }
    best
}
