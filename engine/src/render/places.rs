//! What lies behind the object, what falls in front of it, and the light over all.

use super::surfaces::{clouds, hash, mix, noise};
use super::{Background, Light, Overlay, Rgb};
use simpatico_schema::random::Philox;

/// A background, ready to be asked point by point.
pub struct Place {
    background: Background,
    backdrop: Rgb,
    seed: u64,
}

impl Place {
    /// The background of a scene.
    pub fn new(background: Background, backdrop: Rgb, seed: u64) -> Self {
        Self {
            background,
            backdrop,
            seed: seed ^ 0xb4c6,
        }
    }

    /// The colour at a point, both coordinates in 0..1, y down.
    pub fn at(&self, x: f32, y: f32) -> Rgb {
        let s = self.seed;
        match self.background {
            Background::Plain => {
                let floor = ((y - 0.76) * 30.0).clamp(0.0, 1.0);
                let wall = self.backdrop.map(|c| c * (1.04 - 0.18 * y));
                mix(wall, self.backdrop.map(|c| c * 0.82), floor)
            }
            Background::Beach => {
                let sea = mix([0.20, 0.66, 0.78], [0.55, 0.86, 0.86], (y - 0.45) * 6.0);
                let wave = 0.62 + 0.012 * (x * 18.0).sin() + 0.02 * noise(x * 5.0, 0.0, s);
                let sky = mix([0.40, 0.70, 0.95], [0.82, 0.93, 0.98], y * 2.2);
                if y < 0.45 {
                    sky
                } else if y < wave {
                    sea
                } else {
                    let grain = hash((x * 128.0) as i32, (y * 128.0) as i32, s);
                    let foam = (1.0 - (y - wave) * 45.0).clamp(0.0, 1.0);
                    mix([0.93, 0.82, 0.60].map(|c| c * (0.94 + 0.1 * grain)), [1.0; 3], foam)
                }
            }
            Background::Forest => {
                let trunk = |scale: f32, wide: f32, k: u64| {
                    let at = x * scale;
                    let middle = at.floor() + 0.3 + 0.4 * hash(at.floor() as i32, 7, s ^ k);
                    (at - middle).abs() < wide && y < 0.84
                };
                let leaves = clouds(x * 9.0, y * 9.0, s);
                let green = mix([0.06, 0.20, 0.09], [0.30, 0.52, 0.20], leaves * 1.3 - 0.15);
                let ground = mix([0.16, 0.24, 0.10], [0.34, 0.40, 0.18], noise(x * 30.0, y * 30.0, s));
                if y > 0.80 {
                    ground
                } else if trunk(5.0, 0.13, 1) {
                    [0.24, 0.16, 0.10]
                } else if trunk(9.0, 0.10, 2) {
                    mix(green, [0.20, 0.18, 0.12], 0.6)
                } else {
                    green
                }
            }
            Background::NightCity => {
                let column = (x * 8.0).floor();
                let top = 0.18 + 0.42 * hash(column as i32, 1, s);
                if y < top || y > 0.82 {
                    let glow = mix([0.04, 0.05, 0.16], [0.30, 0.16, 0.38], y);
                    return if y > 0.82 { [0.09, 0.09, 0.14] } else { glow };
                }
                let (wx, wy) = ((x * 32.0).floor(), (y * 36.0).floor());
                let pane = (x * 32.0 - wx) > 0.35 && (y * 36.0 - wy) > 0.35;
                let lit = hash(wx as i32, wy as i32, s ^ 3);
                if pane && lit > 0.55 {
                    mix([1.0, 0.82, 0.40], [0.55, 0.80, 1.0], (lit - 0.55) * 1.6)
                } else {
                    [0.08, 0.09, 0.17].map(|c| c * (0.8 + 0.5 * hash(column as i32, 2, s)))
                }
            }
            Background::StarrySky => {
                let haze = clouds(x * 4.0 + y, y * 4.0 - x, s);
                let sky = mix([0.02, 0.03, 0.14], [0.24, 0.14, 0.42], haze * 1.4 - 0.35);
                mix(sky, [1.0, 1.0, 0.92], star_at(x, y, 22.0, s))
            }
            Background::Meadow => {
                let hill = 0.58 + 0.05 * (x * 5.0 + (s % 7) as f32).sin();
                if y < hill {
                    mix([0.45, 0.73, 0.96], [0.88, 0.95, 0.99], y * 1.7)
                } else {
                    let blade = noise(x * 50.0, y * 16.0, s);
                    mix([0.20, 0.50, 0.14], [0.55, 0.78, 0.28], 0.6 * blade + 0.4 * (1.3 - y))
                }
            }
            Background::Mountains => {
                let ridge = |scale: f32, low: f32, high: f32, k: u64| {
                    low - high * (noise(x * scale, 3.0, s ^ k) * 0.7 + noise(x * scale * 3.0, 5.0, s ^ k) * 0.3)
                };
                let (far, near) = (ridge(3.0, 0.66, 0.52, 1), ridge(4.0, 0.84, 0.30, 2));
                let sky = mix([0.50, 0.72, 0.92], [0.93, 0.93, 0.94], y * 1.5);
                if y > near {
                    mix([0.22, 0.34, 0.28], [0.30, 0.46, 0.30], (y - near) * 4.0)
                } else if y > far {
                    let snow = ((far + 0.12 + 0.05 * noise(x * 20.0, 0.0, s)) - y) * 25.0;
                    mix([0.42, 0.47, 0.58], [0.97, 0.98, 1.0], snow)
                } else {
                    sky
                }
            }
            Background::BrickWall => {
                let line = (y * 11.0).floor();
                let along = x * 5.5 + 0.5 * (line as i32 & 1) as f32;
                let mortar = along - along.floor() < 0.06 || y * 11.0 - line < 0.12;
                let shade = 0.8 + 0.35 * hash(along.floor() as i32, line as i32, s);
                if y > 0.82 {
                    [0.42, 0.40, 0.38]
                } else if mortar {
                    [0.74, 0.70, 0.65]
                } else {
                    [0.60 * shade, 0.27 * shade, 0.20 * shade]
                }
            }
            Background::Room => {
                let wall = [0.90, 0.78, 0.62].map(|c| c * (1.0 - 0.15 * y));
                let (fx, fy) = ((x - 0.78).abs(), (y - 0.28).abs());
                let plank = (y * 18.0).fract() < 0.08;
                if y > 0.76 {
                    [0.55, 0.36, 0.20].map(|c| c * if plank { 0.75 } else { 1.0 })
                } else if fx < 0.13 && fy < 0.17 {
                    let bar = fx < 0.012 || fy < 0.012 || fx > 0.11 || fy > 0.15;
                    if bar { [0.98, 0.96, 0.92] } else { [0.66, 0.85, 0.96] }
                } else if (x - 0.20).abs() < 0.10 && (y - 0.26).abs() < 0.08 {
                    mix([0.75, 0.35, 0.28], [0.30, 0.45, 0.55], (x - 0.10) * 5.0)
                } else {
                    wall
                }
            }
            Background::Sea => {
                let swell = (y * 60.0 + 3.0 * (x * 9.0 + (s % 11) as f32).sin()).sin();
                if y < 0.42 {
                    mix([0.48, 0.74, 0.94], [0.90, 0.96, 0.99], y * 2.3)
                } else {
                    let deep = mix([0.14, 0.46, 0.68], [0.04, 0.22, 0.44], (y - 0.42) * 1.8);
                    mix(deep, [0.70, 0.88, 0.95], 0.28 * (swell - 0.2).max(0.0))
                }
            }
            Background::Desert => {
                let dune = |low: f32, scale: f32, k: f32| low + 0.06 * (x * scale + k).sin();
                if y < dune(0.52, 5.0, (s % 5) as f32) {
                    mix([0.36, 0.66, 0.92], [0.98, 0.90, 0.74], y * 2.0)
                } else if y < dune(0.70, 4.0, (s % 3) as f32 + 2.0) {
                    [0.93, 0.70, 0.40]
                } else {
                    let ripple = 0.5 + 0.5 * ((y + 0.03 * (x * 14.0).sin()) * 90.0).sin();
                    mix([0.83, 0.58, 0.30], [0.92, 0.68, 0.38], ripple)
                }
            }
            Background::Clouds => {
                let puff = clouds(x * 4.0, y * 5.0, s);
                let sky = mix([0.34, 0.62, 0.93], [0.68, 0.86, 0.98], y);
                mix(sky, [1.0; 3], (puff - 0.45) * 5.0)
            }
            Background::Garden => {
                let hedge = mix([0.14, 0.38, 0.14], [0.34, 0.60, 0.24], noise(x * 24.0, y * 24.0, s));
                let (cx, cy) = ((x * 9.0).floor(), (y * 9.0).floor());
                let dx = x * 9.0 - cx - 0.3 - 0.4 * hash(cx as i32, cy as i32, s);
                let dy = y * 9.0 - cy - 0.3 - 0.4 * hash(cx as i32, cy as i32, s ^ 5);
                let radius = (dx * dx + dy * dy).sqrt();
                let hues = [[0.95, 0.35, 0.50], [0.98, 0.85, 0.30], [0.96, 0.95, 0.96], [0.70, 0.45, 0.85]];
                let hue = hues[(hash(cx as i32, cy as i32, s ^ 9) * 3.99) as usize];
                if radius < 0.08 {
                    [0.98, 0.75, 0.15]
                } else if radius < 0.24 {
                    hue
                } else {
                    hedge
                }
            }
            Background::Sunset => {
                let (dx, dy) = (x - 0.68, y - 0.50);
                let disc = (dx * dx + dy * dy).sqrt();
                let sky = mix([0.36, 0.18, 0.45], [0.99, 0.58, 0.25], y * 1.9);
                if y > 0.60 {
                    let glitter = noise(x * 12.0, y * 60.0, s) * (1.0 - (dx * 3.0).abs()).max(0.0);
                    mix([0.25, 0.13, 0.28], [1.0, 0.70, 0.35], glitter * 1.2)
                } else if disc < 0.11 {
                    [1.0, 0.90, 0.55]
                } else {
                    mix(sky, [1.0, 0.80, 0.45], (-disc * 7.0).exp())
                }
            }
        }
    }
}

/// How brightly a star shines at a point of a field with `scale` cells a side.
fn star_at(x: f32, y: f32, scale: f32, seed: u64) -> f32 {
    let (cx, cy) = ((x * scale).floor(), (y * scale).floor());
    let (i, j) = (cx as i32, cy as i32);
    if hash(i, j, seed ^ 21) < 0.55 {
        return 0.0;
    }
    let dx = x * scale - cx - 0.2 - 0.6 * hash(i, j, seed ^ 22);
    let dy = y * scale - cy - 0.2 - 0.6 * hash(i, j, seed ^ 23);
    let size = 0.10 + 0.14 * hash(i, j, seed ^ 24);
    (1.6 - (dx * dx + dy * dy).sqrt() / size * 1.2).clamp(0.0, 1.0)
}

/// A stamp on the picture: position and half axes in picture widths, angle, colour, opacity.
struct Fleck {
    at: [f32; 2],
    axes: [f32; 2],
    angle: f32,
    rgb: Rgb,
    opacity: f32,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Disc,
    Ring,
    Glow,
    Cross,
    Leaf,
}

/// Lays the overlay over a finished picture of `size` by `size` pixels.
pub fn overlay(picture: &mut [Rgb], size: usize, overlay: Overlay, seed: u64) {
    let mut random = Philox::new(seed, 0x0e71a);
    match overlay {
        Overlay::None => {}
        Overlay::Grain => {
            for pixel in picture.iter_mut() {
                let speck = (random.uniform() + random.uniform() - 1.0) * 0.34;
                *pixel = pixel.map(|c| c * 0.96 + 0.02 + speck);
            }
        }
        Overlay::LightLeaks => {
            let tilt = random.uniform();
            each(picture, size, |x, y, pixel| {
                let a = (-((x - 0.02 - 0.2 * y * tilt) * 3.6).powi(2)).exp();
                let b = (-((1.02 - x) * 3.0 + (1.0 - y) * 2.4).powi(2)).exp();
                for (c, (warm, rose)) in [(1.0, 0.95), (0.50, 0.25), (0.12, 0.42)].iter().enumerate() {
                    pixel[c] += 0.85 * a * warm + 0.75 * b * rose;
                }
            });
        }
        Overlay::Fog => {
            each(picture, size, |x, y, pixel| {
                let drift = clouds(x * 3.0, y * 5.0, seed ^ 31);
                *pixel = mix(*pixel, [0.87, 0.89, 0.92], 0.25 + 0.45 * drift + 0.25 * (y - 0.4));
            });
        }
        _ => {
            for _ in 0..flecks_of(overlay) {
                stamp(picture, size, &fleck(overlay, &mut random));
            }
        }
    }
}

fn flecks_of(overlay: Overlay) -> usize {
    match overlay {
        Overlay::Snow => 90,
        Overlay::Rain => 80,
        Overlay::Sparkles => 26,
        Overlay::Leaves => 26,
        Overlay::Bubbles => 22,
        Overlay::Petals => 36,
        Overlay::Confetti => 64,
        Overlay::Fireflies => 26,
        Overlay::None | Overlay::Grain | Overlay::LightLeaks | Overlay::Fog => 0,
    }
}

fn fleck(overlay: Overlay, random: &mut Philox) -> Fleck {
    let at = [random.uniform(), random.uniform()];
    let (size, turn, hue) = (random.uniform(), random.uniform() * 6.3, random.uniform());
    let of = |kind, axes: [f32; 2], angle, rgb, opacity| Fleck {
        at,
        axes,
        angle,
        rgb,
        opacity,
        kind,
    };
    let round = |r: f32| [r, r];
    match overlay {
        Overlay::Rain => of(Kind::Disc, [0.0035, 0.04 + 0.03 * size], 0.22, [0.80, 0.88, 0.97], 0.62),
        Overlay::Sparkles => of(Kind::Cross, round(0.03 + 0.05 * size), 0.0, [1.0, 0.97, 0.72], 1.0),
        Overlay::Leaves => {
            let rgb = mix([0.86, 0.30, 0.10], [0.94, 0.70, 0.16], hue);
            of(Kind::Leaf, [0.020 + 0.012 * size, 0.038 + 0.02 * size], turn, rgb, 1.0)
        }
        Overlay::Bubbles => of(Kind::Ring, round(0.025 + 0.05 * size), 0.0, [0.92, 0.97, 1.0], 0.85),
        Overlay::Petals => of(Kind::Leaf, [0.014 + 0.008 * size, 0.024 + 0.012 * size], turn, [1.0, 0.72, 0.82], 1.0),
        Overlay::Confetti => {
            let hues = [[0.95, 0.25, 0.30], [0.20, 0.65, 0.95], [0.98, 0.82, 0.20], [0.35, 0.80, 0.40], [0.85, 0.40, 0.90]];
            of(Kind::Disc, [0.011, 0.02], turn, hues[(hue * 4.99) as usize], 1.0)
        }
        Overlay::Fireflies => of(Kind::Glow, round(0.03 + 0.03 * size), 0.0, [0.98, 0.95, 0.40], 1.0),
        _ => of(Kind::Disc, round(0.006 + 0.012 * size), 0.0, [1.0; 3], 0.95),
    }
}

/// Paints one fleck.
fn stamp(picture: &mut [Rgb], size: usize, fleck: &Fleck) {
    let reach = fleck.axes[0].max(fleck.axes[1]) * if fleck.kind == Kind::Glow { 2.0 } else { 1.15 };
    let scale = size as f32;
    let range = |middle: f32| {
        let low = ((middle - reach) * scale - 1.0).max(0.0) as usize;
        let high = ((middle + reach) * scale + 2.0).clamp(0.0, scale) as usize;
        low..high
    };
    let (sin, cos) = fleck.angle.sin_cos();
    let soft = 0.7 / scale;
    for row in range(fleck.at[1]) {
        for column in range(fleck.at[0]) {
            let dx = (column as f32 + 0.5) / scale - fleck.at[0];
            let dy = (row as f32 + 0.5) / scale - fleck.at[1];
            let (u, v) = (cos * dx + sin * dy, cos * dy - sin * dx);
            let (a, b) = (u / fleck.axes[0], v / fleck.axes[1]);
            let radius = (a * a + b * b).sqrt();
            let small = fleck.axes[0].min(fleck.axes[1]);
            let inside = (0.5 - (radius - 1.0) * small / (2.0 * soft)).clamp(0.0, 1.0);
            let cover = match fleck.kind {
                Kind::Disc => inside,
                Kind::Leaf => {
                    let waist = (1.0 - b * b).max(0.0);
                    (0.5 - (a.abs() - waist) * small / (2.0 * soft)).clamp(0.0, 1.0) * f32::from(b.abs() < 1.0)
                }
                Kind::Ring => {
                    let rim = (0.5 - ((radius - 0.9).abs() - 0.1) * small / (2.0 * soft)).clamp(0.0, 1.0);
                    let glint = f32::from((a + 0.35).powi(2) + (b + 0.35).powi(2) < 0.045);
                    rim.max(glint).max(0.16 * inside)
                }
                Kind::Glow => (-(radius * 2.2).powi(2) * 0.35).exp(),
                Kind::Cross => {
                    let spike = |long: f32, thin: f32| (1.0 - long.abs() - 7.0 * thin.abs()).max(0.0);
                    (spike(a, b).max(spike(b, a)) * 2.0).min(1.0) + (1.0 - radius * 4.0).max(0.0)
                }
            };
            let pixel = &mut picture[row * size + column];
            *pixel = mix(*pixel, fleck.rgb, cover * fleck.opacity);
        }
    }
}

/// Colours the whole picture.
pub fn relight(picture: &mut [Rgb], size: usize, light: Light, seed: u64) {
    let side = if hash(3, 5, seed) < 0.5 { 1.0 } else { -1.0 };
    each(picture, size, |x, y, pixel| {
        let gray = 0.30 * pixel[0] + 0.59 * pixel[1] + 0.11 * pixel[2];
        let out = (((x - 0.5).powi(2) + (y - 0.5).powi(2)) * 2.0).min(1.0);
        let times = |rgb: Rgb, by: Rgb| -> Rgb { std::array::from_fn(|c| rgb[c] * by[c]) };
        *pixel = match light {
            Light::Day => *pixel,
            Light::GoldenHour => {
                let sun = (-((x - 0.5 - 0.5 * side).powi(2) + (y - 0.1).powi(2)) * 3.0).exp();
                let warm = times(*pixel, [1.12, 0.88, 0.58]);
                std::array::from_fn(|c| warm[c] + sun * [0.42, 0.24, 0.04][c])
            }
            Light::Moonlight => times(mix(*pixel, [gray; 3], 0.5), [0.36, 0.48, 0.86]),
            Light::Neon => {
                let t = 0.5 + 0.5 * side * (2.0 * x - 1.0);
                let tube = mix([1.0, 0.15, 0.75], [0.10, 0.75, 1.0], t);
                let dim = pixel.map(|c| 0.42 * c);
                std::array::from_fn(|c| dim[c] + (0.18 + 0.62 * gray) * tube[c])
            }
            Light::Noir => [((gray - 0.5) * 1.35 + 0.47) * (1.0 - 0.45 * out); 3],
            Light::Sepia => times([gray * 0.92 + 0.06; 3], [1.06, 0.86, 0.60]).map(|c| c * (1.0 - 0.25 * out)),
            Light::Pastel => mix(mix(*pixel, [gray; 3], 0.2), [1.0, 0.93, 0.96], 0.48),
            Light::Dramatic => {
                let beam = (-((x - 0.5) * 2.2).powi(2) - ((y - 0.45) * 2.2).powi(2)).exp();
                pixel.map(|c| c * (0.14 + 1.0 * beam))
            }
            Light::Vivid => std::array::from_fn(|c| ((pixel[c] - gray) * 1.8 + gray - 0.5) * 1.2 + 0.52),
        };
    });
}

/// Calls `f` with both coordinates in 0..1 and the pixel.
fn each(picture: &mut [Rgb], size: usize, f: impl Fn(f32, f32, &mut Rgb)) {
    for (index, pixel) in picture.iter_mut().enumerate() {
        let at = |i: usize| (i as f32 + 0.5) / size as f32;
        f(at(index % size), at(index / size), pixel);
    }
}
