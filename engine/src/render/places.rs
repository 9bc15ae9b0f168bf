//! What lies behind the object, what falls in front of it, and the light and manner over all.

use super::surfaces::{TILES, clouds, gray, hash, mix, noise, shade};
use super::{Pose, Rgb, Scene, unpack};
use crate::vocabulary::{BackgroundKind, LightKind, Look, OverlayKind, StyleKind};
use simpatico_schema::random::Philox;

/// A background, ready to be asked point by point.
pub struct Place {
    kind: Option<BackgroundKind>,
    colors: [Rgb; 2],
    seed: u64,
}

impl Place {
    /// The background of a scene.
    pub fn new(scene: &Scene) -> Self {
        let mut place = Self {
            kind: None,
            colors: [scene.backdrop; 2],
            seed: scene.seed ^ 0xb4c6,
        };
        for look in scene.looks() {
            if let Look::Background(kind, colors) = *look {
                place.kind = Some(kind);
                place.colors = colors.map(unpack);
            }
        }
        place
    }

    /// The colour at a point, both coordinates in 0..1, y down.
    pub fn at(&self, x: f32, y: f32) -> Rgb {
        let (s, [a, b]) = (self.seed, self.colors);
        let sky = |to: f32| mix(a, shade(a, 0.6), y / to);
        let Some(kind) = self.kind else {
            let floor = ((y - 0.76) * 30.0).clamp(0.0, 1.0);
            return mix(a.map(|c| c * (1.04 - 0.18 * y)), a.map(|c| c * 0.82), floor);
        };
        match kind {
            BackgroundKind::Plain => mix(a, b, y).map(|c| c * (1.0 - 0.06 * y)),
            BackgroundKind::Gradient => mix(a, b, y),
            BackgroundKind::Planks => {
                let (line, along) = (y * 6.0, x * 1.3 + 0.37 * (y * 6.0).floor());
                let grain = noise(x * 7.0, y * 70.0, s);
                let seam = line - line.floor() < 0.09 || along - along.floor() < 0.015;
                if seam {
                    shade(b, -0.5)
                } else {
                    mix(a, b, 0.8 * grain)
                }
            }
            BackgroundKind::Bricks => {
                let line = (y * 11.0).floor();
                let along = x * 5.5 + 0.5 * (line as i32 & 1) as f32;
                if along - along.floor() < 0.06 || y * 11.0 - line < 0.12 {
                    b
                } else {
                    shade(a, 0.35 * hash(along.floor() as i32, line as i32, s) - 0.22)
                }
            }
            BackgroundKind::Tiles => {
                let (i, j) = ((x * 7.0).floor(), (y * 7.0).floor());
                let (u, v) = (x * 7.0 - i - 0.5, y * 7.0 - j - 0.5);
                if u.abs().max(v.abs()) > 0.46 {
                    shade(b, -0.15)
                } else if (u * u + v * v).sqrt() < 0.28 {
                    b
                } else {
                    a
                }
            }
            BackgroundKind::Mountains => {
                let ridge = |scale: f32, low: f32, high: f32, k: u64| {
                    let rough = noise(x * scale, 3.0, s ^ k) * 0.7;
                    low - high * (rough + noise(x * scale * 3.0, 5.0, s ^ k) * 0.3)
                };
                let (far, near) = (ridge(3.0, 0.66, 0.52, 1), ridge(4.0, 0.86, 0.30, 2));
                if y > near {
                    mix([0.20, 0.33, 0.27], [0.30, 0.46, 0.32], (y - near) * 4.0)
                } else if y > far {
                    let snow = (far + 0.14 + 0.05 * noise(x * 20.0, 0.0, s) - y) * 25.0;
                    mix([0.42, 0.47, 0.58], b, snow)
                } else {
                    sky(0.6)
                }
            }
            BackgroundKind::Sea => {
                let shore = 0.70 + 0.02 * (x * 11.0 + (s % 7) as f32).sin();
                let sandy = b[0] > b[2];
                let water = if sandy { shade(a, -0.15) } else { a };
                let swell = (y * 60.0 + 3.0 * (x * 9.0 + (s % 11) as f32).sin()).sin();
                if y < 0.42 {
                    mix([0.55, 0.80, 0.97], [0.92, 0.97, 1.0], y * 2.3)
                } else if sandy && y > shore {
                    let foam = (1.0 - (y - shore) * 40.0).clamp(0.0, 1.0);
                    let grain = hash((x * 128.0) as i32, (y * 128.0) as i32, s);
                    mix(shade(b, 0.12 * grain - 0.06), [1.0; 3], foam)
                } else {
                    let deep = if sandy { shade(water, 0.2) } else { b };
                    let base = mix(water, deep, (y - 0.42) * 2.0);
                    mix(base, [0.85, 0.95, 1.0], 0.45 * (swell - 0.3).max(0.0))
                }
            }
            BackgroundKind::Forest => {
                let trunk = |scale: f32, wide: f32, k: u64| {
                    let at = x * scale;
                    let middle = at.floor() + 0.3 + 0.4 * hash(at.floor() as i32, 7, s ^ k);
                    (at - middle).abs() < wide
                };
                let leaves = clouds(x * 9.0, y * 9.0, s);
                let crown = mix(shade(b, -0.45), shade(b, 0.30), leaves * 1.4 - 0.2);
                if y > 0.82 {
                    shade(b, 0.25 * noise(x * 30.0, y * 30.0, s) - 0.35)
                } else if trunk(5.0, 0.13, 1) {
                    [0.25, 0.17, 0.11]
                } else if leaves > 0.62 && y < 0.5 {
                    mix(crown, a, 0.8)
                } else if trunk(9.0, 0.10, 2) {
                    mix(crown, [0.20, 0.16, 0.10], 0.6)
                } else {
                    crown
                }
            }
            BackgroundKind::City => {
                let column = (x * 8.0).floor();
                let top = 0.15 + 0.42 * hash(column as i32, 1, s);
                let night = gray(a) < 0.4;
                if y > 0.84 {
                    return if night {
                        shade(a, -0.2)
                    } else {
                        shade(b, -0.3)
                    };
                }
                if y < top {
                    return if night { mix(a, b, 0.45 * y) } else { sky(0.7) };
                }
                let (wx, wy) = ((x * 32.0).floor(), (y * 36.0).floor());
                let pane = x * 32.0 - wx > 0.35 && y * 36.0 - wy > 0.35;
                let lit = hash(wx as i32, wy as i32, s ^ 3);
                let wall = if night { shade(a, 0.06) } else { b };
                if pane && lit > 0.5 {
                    if night {
                        mix(b, [0.4, 0.9, 1.0], (lit - 0.5) * 2.0)
                    } else {
                        shade(b, 0.4)
                    }
                } else {
                    shade(wall, 0.2 * hash(column as i32, 2, s) - 0.1)
                }
            }
            BackgroundKind::Space => {
                let haze = clouds(x * 4.0 + y, y * 4.0 - x, s);
                let sky = mix(a, b, haze * 1.6 - 0.45);
                mix(sky, [1.0, 1.0, 0.92], star_at(x, y, 22.0, s))
            }
            BackgroundKind::Dunes => {
                let dune = |low: f32, scale: f32, k: f32| low + 0.06 * (x * scale + k).sin();
                if y < dune(0.52, 5.0, (s % 5) as f32) {
                    mix([0.42, 0.70, 0.93], [0.98, 0.93, 0.82], y * 2.0)
                } else if y < dune(0.70, 4.0, (s % 3) as f32 + 2.0) {
                    a
                } else {
                    let ripple = 0.5 + 0.5 * ((y + 0.03 * (x * 14.0).sin()) * 90.0).sin();
                    mix(b, shade(b, 0.18), ripple)
                }
            }
            BackgroundKind::Meadow => {
                let hill = 0.52 + 0.05 * (x * 5.0 + (s % 7) as f32).sin();
                if y < hill {
                    return sky(0.6);
                }
                let (i, j) = ((x * 14.0).floor() as i32, (y * 20.0).floor() as i32);
                let (u, v) = (x * 14.0 - i as f32 - 0.5, y * 20.0 - j as f32 - 0.5);
                let pick = hash(i, j, s ^ 9);
                if pick > 0.55 && u * u + v * v < 0.08 {
                    let hues = [[0.95, 0.35, 0.50], [0.98, 0.85, 0.30], [0.97, 0.96, 0.97]];
                    return hues[((pick - 0.55) * 6.6) as usize % 3];
                }
                mix(
                    shade(b, -0.35),
                    shade(b, 0.25),
                    noise(x * 50.0, y * 16.0, s),
                )
            }
            BackgroundKind::Sunset => {
                let (dx, dy) = (x - 0.68, y - 0.48);
                let disc = (dx * dx + dy * dy).sqrt();
                if y > 0.60 {
                    let path = (1.0 - (dx * 3.0).abs()).max(0.0);
                    let glitter = noise(x * 12.0, y * 60.0, s) * path;
                    mix(shade(a, -0.6), b, glitter * 1.3)
                } else if disc < 0.11 {
                    shade(b, 0.6)
                } else {
                    mix(mix(shade(a, -0.45), a, y * 2.0), b, (-disc * 6.0).exp())
                }
            }
            BackgroundKind::Clouds => {
                let puff = clouds(x * 4.0, y * 5.0, s);
                mix(a, b, (puff - 0.42) * 5.0)
            }
            BackgroundKind::Underwater => {
                let ray = 0.5 + 0.5 * ((x + 0.35 * y) * 26.0 + (s % 9) as f32).sin();
                let water = mix(shade(a, 0.35), shade(a, -0.35), y);
                let bed = 0.84 - 0.16 * noise(x * 9.0, 2.0, s) * noise(x * 23.0, 4.0, s);
                if y > bed {
                    mix(b, shade(b, -0.4), noise(x * 30.0, y * 30.0, s))
                } else {
                    shade(water, 0.18 * ray * (1.0 - y))
                }
            }
            BackgroundKind::Curtain => {
                let fold = 0.5 + 0.5 * (x * 46.0 + 1.2 * (y * 3.0).sin()).sin();
                mix(b, shade(a, 0.06), fold)
            }
            BackgroundKind::Sunburst => {
                let angle = (y - 0.55).atan2(x - 0.5);
                let ray = (angle * 12.0 / std::f32::consts::TAU * 2.0).rem_euclid(2.0);
                if ray < 1.0 { a } else { b }
            }
            BackgroundKind::Aurora => {
                let curtain = 0.30 + 0.12 * (x * 6.0 + (s % 5) as f32).sin();
                let veil = (-((y - curtain) * 5.0).powi(2)).exp()
                    * (0.5 + 0.5 * noise(x * 22.0, y * 3.0, s));
                if y > 0.78 - 0.1 * noise(x * 5.0, 1.0, s) {
                    return shade(a, -0.6);
                }
                let night = mix(a, [1.0; 3], 0.8 * star_at(x, y, 26.0, s));
                mix(night, b, veil)
            }
            BackgroundKind::Bamboo => {
                let at = x * 9.0;
                let off = (at - at.floor() - 0.5).abs();
                let joint = (y * 6.0 + 3.0 * hash(at.floor() as i32, 1, s)).fract() < 0.06;
                if off < 0.24 {
                    shade(if joint { shade(b, -0.3) } else { b }, 0.4 * (0.15 - off))
                } else {
                    mix(a, b, 0.5 * noise(x * 20.0, y * 20.0, s))
                }
            }
            BackgroundKind::Grid => {
                let horizon = 0.5;
                if y < horizon {
                    return mix(a, b, 0.5 * (y / horizon).powi(3));
                }
                let depth = 0.14 / (y - horizon + 0.02);
                let near = |v: f32| (v - v.floor() - 0.5).abs() > 0.44;
                let line = near(depth * 2.5) || near((x - 0.5) * depth * 6.0);
                mix(a, b, if line { 0.95 } else { 0.12 })
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
#[derive(Clone, Copy)]
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
    Heart,
}

/// Lays the overlay over a finished picture of `size` by `size` pixels.
///
/// As with a material's texture, nothing is drawn by lot: an edit has one right result, and
/// flecks and specks repeat with the picture's [`TILES`] by [`TILES`] tiles.
pub fn overlay(picture: &mut [Rgb], size: usize, kind: OverlayKind, rgb: Rgb) {
    // One layout, for good.
    let seed = 5;
    let mut random = Philox::new(seed, 0x0e71a);
    match kind {
        OverlayKind::Grain => {
            each(picture, size, |x, y, pixel| {
                // Specks of a 128th of the picture.
                let [column, row] = [x, y].map(|v| (in_tile(v) * 16.0) as i32);
                let [a, b] = [0, 1].map(|k| hash(column, row, seed ^ k));
                let speck = (a + b - 1.0) * 0.36;
                *pixel = pixel.map(|c| c * 0.96 + 0.02 + speck);
            });
        }
        OverlayKind::LightLeak => {
            let tilt = random.uniform();
            each(picture, size, |x, y, pixel| {
                let a = (-((x - 0.02 - 0.2 * y * tilt) * 3.6).powi(2)).exp();
                let b = (-((1.02 - x) * 3.0 + (1.0 - y) * 2.4).powi(2)).exp();
                for c in 0..3 {
                    pixel[c] += 0.85 * a * rgb[c] + 0.7 * b * [0.95, 0.25, 0.42][c];
                }
            });
        }
        OverlayKind::Fog | OverlayKind::Smoke => {
            let smoke = kind == OverlayKind::Smoke;
            each(picture, size, |x, y, pixel| {
                let t = if smoke {
                    let bend = x + 0.10 * (y * 9.0 + (seed % 5) as f32).sin();
                    1.8 * (clouds(bend * 6.0, y * 3.0, seed ^ 31) - 0.40)
                } else {
                    0.25 + 0.45 * clouds(x * 3.0, y * 5.0, seed ^ 31) + 0.25 * (y - 0.4)
                };
                *pixel = mix(*pixel, rgb, t.clamp(0.0, 0.85));
            });
        }
        OverlayKind::Scratches => {
            let at: Vec<[f32; 3]> = (0..9)
                .map(|_| std::array::from_fn(|_| random.uniform()))
                .collect();
            each(picture, size, |x, y, pixel| {
                let on = |[sx, sy, long]: &[f32; 3]| {
                    (x - sx - 0.01 * (y * 9.0).sin()).abs() < 0.005
                        && (y - sy).abs() < 0.2 + 0.4 * long
                };
                let [u, v] = [x, y].map(|v| in_tile(v) * 7.5);
                let dust = noise(u, v, seed) > 0.93;
                if dust || at.iter().any(on) {
                    *pixel = mix(*pixel, rgb, 0.8);
                }
            });
        }
        OverlayKind::Scanlines => {
            let shift = (size / 16).max(1);
            let before = picture.to_vec();
            each(picture, size, |x, y, pixel| {
                let row = (y * size as f32) as usize;
                let band = hash((y * 14.0) as i32, 3, seed);
                let by = if band > 0.65 { shift } else { 0 };
                let column = ((x * size as f32) as usize + by).min(size - 1);
                let moved = before[row * size + column];
                let line = (y * 32.0).fract() < 0.4;
                let glow = if band > 0.65 { 0.35 } else { 0.08 };
                *pixel = mix(moved.map(|c| c * if line { 0.55 } else { 1.0 }), rgb, glow);
            });
        }
        OverlayKind::Vignette => each(picture, size, |x, y, pixel| {
            let out = ((x - 0.5).powi(2) + (y - 0.5).powi(2)) * 2.6 - 0.12;
            *pixel = mix(*pixel, rgb, out.clamp(0.0, 0.92));
        }),
        OverlayKind::Frame => each(picture, size, |x, y, pixel| {
            let plain = gray(rgb) > 0.9;
            let low = if plain { 0.86 } else { 0.93 };
            let out = x.min(1.0 - x).min(y) < 0.07 || y > low;
            if out {
                let ridge = (x.min(1.0 - x).min(y).min(1.0 - y) * 180.0).sin();
                *pixel = shade(rgb, if plain { 0.0 } else { 0.25 * ridge });
            }
        }),
        _ => {
            for _ in 0..flecks_of(kind) {
                let one = fleck(kind, rgb, &mut random);
                // One that reaches over the rim of its tile comes in from beyond the picture too.
                let tiles = -1..=TILES as i32;
                for (row, column) in tiles
                    .clone()
                    .flat_map(|r| tiles.clone().map(move |c| (r, c)))
                {
                    let tile = [column as f32, row as f32];
                    let at = std::array::from_fn(|i| (one.at[i] + tile[i]) / TILES);
                    stamp(picture, size, &Fleck { at, ..one });
                }
            }
        }
    }
}

/// Where in its tile a place of the picture is, 0..1.
fn in_tile(x: f32) -> f32 {
    (x * TILES).fract()
}

/// How many flecks a tile has.
fn flecks_of(kind: OverlayKind) -> usize {
    match kind {
        OverlayKind::Snow | OverlayKind::Stars | OverlayKind::Confetti => 3,
        OverlayKind::Rain | OverlayKind::Embers | OverlayKind::Petals | OverlayKind::Splatter => 2,
        _ => 1,
    }
}

fn fleck(kind: OverlayKind, rgb: Rgb, random: &mut Philox) -> Fleck {
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
    let bright = [
        rgb,
        [0.20, 0.65, 0.95],
        [0.98, 0.82, 0.20],
        [0.35, 0.80, 0.40],
        [0.85, 0.40, 0.90],
    ];
    match kind {
        OverlayKind::Rain => of(Kind::Disc, [0.0035, 0.04 + 0.03 * size], 0.22, rgb, 0.65),
        OverlayKind::Sparkles => of(Kind::Cross, round(0.03 + 0.06 * size), 0.0, rgb, 1.0),
        OverlayKind::Leaves => {
            let rgb = shade(rgb, 0.7 * hue - 0.35);
            of(
                Kind::Leaf,
                [0.020 + 0.012 * size, 0.038 + 0.02 * size],
                turn,
                rgb,
                1.0,
            )
        }
        OverlayKind::Bubbles => of(Kind::Ring, round(0.025 + 0.05 * size), 0.0, rgb, 0.85),
        OverlayKind::Petals => of(
            Kind::Leaf,
            [0.014 + 0.008 * size, 0.024 + 0.012 * size],
            turn,
            rgb,
            1.0,
        ),
        OverlayKind::Confetti => of(
            Kind::Disc,
            [0.011, 0.02],
            turn,
            bright[(hue * 4.99) as usize],
            1.0,
        ),
        OverlayKind::Fireflies => of(Kind::Glow, round(0.03 + 0.03 * size), 0.0, rgb, 1.0),
        OverlayKind::Embers => of(Kind::Glow, round(0.012 + 0.016 * size), 0.0, rgb, 1.0),
        OverlayKind::Hearts => of(
            Kind::Heart,
            round(0.03 + 0.03 * size),
            0.4 * (hue - 0.5),
            rgb,
            0.95,
        ),
        OverlayKind::Splatter => {
            let r = 0.008 + 0.045 * size * size;
            of(
                Kind::Disc,
                [r, r * (0.7 + 0.6 * hue)],
                turn,
                bright[(hue * 4.99) as usize],
                0.95,
            )
        }
        OverlayKind::Stars => of(Kind::Disc, round(0.004 + 0.006 * size), 0.0, rgb, 1.0),
        _ => of(Kind::Disc, round(0.006 + 0.012 * size), 0.0, rgb, 0.95),
    }
}

/// Paints one fleck.
fn stamp(picture: &mut [Rgb], size: usize, fleck: &Fleck) {
    let longest = fleck.axes[0].max(fleck.axes[1]);
    let reach = longest * if fleck.kind == Kind::Glow { 2.0 } else { 1.15 };
    let scale = size as f32;
    let range = |middle: f32| {
        let low = ((middle - reach) * scale - 1.0).max(0.0) as usize;
        let high = ((middle + reach) * scale + 2.0).clamp(0.0, scale) as usize;
        low..high
    };
    let (sin, cos) = fleck.angle.sin_cos();
    // From a distance in units of the small axis to coverage.
    let small = fleck.axes[0].min(fleck.axes[1]);
    let inside = |d: f32| (0.5 - d * small * scale / 1.4).clamp(0.0, 1.0);
    for row in range(fleck.at[1]) {
        for column in range(fleck.at[0]) {
            let dx = (column as f32 + 0.5) / scale - fleck.at[0];
            let dy = (row as f32 + 0.5) / scale - fleck.at[1];
            let a = (cos * dx + sin * dy) / fleck.axes[0];
            let b = (cos * dy - sin * dx) / fleck.axes[1];
            let radius = (a * a + b * b).sqrt();
            let cover = match fleck.kind {
                Kind::Disc => inside(radius - 1.0),
                Kind::Leaf => inside(a.abs() - (1.0 - b * b).max(0.0)) * f32::from(b.abs() < 1.0),
                Kind::Heart => {
                    let k = -b * 1.1 - (a.abs() * 0.8).sqrt() * 0.7 + 0.15;
                    inside((a * a + k * k).sqrt() - 0.8)
                }
                Kind::Ring => {
                    let glint = f32::from((a + 0.35).powi(2) + (b + 0.35).powi(2) < 0.045);
                    let rim = inside((radius - 0.9).abs() - 0.1);
                    rim.max(glint).max(0.16 * inside(radius - 1.0))
                }
                Kind::Glow => (-(radius * 2.2).powi(2) * 0.35).exp(),
                Kind::Cross => {
                    let spike =
                        |long: f32, thin: f32| (1.0 - long.abs() - 7.0 * thin.abs()).max(0.0);
                    (spike(a, b).max(spike(b, a)) * 2.0).min(1.0) + (1.0 - radius * 4.0).max(0.0)
                }
            };
            let pixel = &mut picture[row * size + column];
            *pixel = mix(*pixel, fleck.rgb, cover * fleck.opacity);
        }
    }
}

/// Lights the whole picture.
pub fn light(picture: &mut [Rgb], size: usize, kind: LightKind, rgb: Rgb, pose: &Pose) {
    let other = [1.0 - 0.8 * rgb[0], 1.0 - 0.8 * rgb[1], 1.0 - 0.8 * rgb[2]];
    each(picture, size, |x, y, pixel| {
        let (dx, dy) = (x - 0.5 - pose.center[0], y - 0.5 - pose.center[1]);
        let near = (-(dx * dx + dy * dy) * 5.0).exp();
        // The pixel lit by a lamp of this colour, its strength given.
        let lit = |tint: Rgb, dim: f32, strength: f32| -> Rgb {
            std::array::from_fn(|c| pixel[c] * (dim + strength * tint[c]))
        };
        *pixel = match kind {
            LightKind::Ambient => lit(rgb, 0.30, 0.85),
            LightKind::Spot => {
                let cone = (-((dx / (0.16 + 0.30 * y)).powi(2))).exp() * (1.2 - 0.3 * y);
                lit(rgb, 0.22, 0.95 * cone)
            }
            LightKind::Rim => {
                let rim = (-(((dx * dx + dy * dy).sqrt() - pose.scale) * 9.0).powi(2)).exp();
                std::array::from_fn(|c| pixel[c] * 0.62 + 0.6 * rim * rgb[c])
            }
            LightKind::Side => lit(rgb, 0.25, 1.25 * (1.0 - x)),
            LightKind::Glow => std::array::from_fn(|c| pixel[c] * 0.72 + 0.50 * near * rgb[c]),
            LightKind::Dim => lit(rgb, 0.12, 0.55),
            LightKind::Rays => {
                let angle = (y + 0.1).atan2(x + 0.1);
                let ray = (0.5 + 0.5 * (angle * 34.0).sin()) * (1.1 - 0.7 * (x * x + y * y).sqrt());
                std::array::from_fn(|c| pixel[c] * 0.82 + 0.5 * ray.max(0.0) * rgb[c])
            }
            LightKind::TwoTone => {
                let tube = mix(rgb, other, x);
                let bright = gray(*pixel);
                std::array::from_fn(|c| 0.42 * pixel[c] + (0.16 + 0.60 * bright) * tube[c])
            }
        };
    });
}

/// Grades the whole picture. Looks other than a tone leave it as it is.
pub fn tone(picture: &mut [Rgb], look: &Look) {
    let Look::Tone {
        saturation,
        contrast,
        brightness,
        tint,
        strength,
    } = *look
    else {
        return;
    };
    let tint = unpack(tint);
    for pixel in picture.iter_mut() {
        let level = gray(*pixel);
        let graded = pixel.map(|c| {
            let c = level + (c - level) * saturation;
            (c - 0.5) * contrast + 0.5 + brightness
        });
        // A wash keeps light and dark apart: it colours by the brightness.
        let wash = tint.map(|c| (c + 0.25) * (0.25 + 0.9 * level));
        *pixel = mix(graded, wash, strength * 1.4);
    }
}

/// Redraws the picture in a manner.
pub fn style(picture: &mut [Rgb], size: usize, kind: StyleKind, seed: u64) {
    let before = picture.to_vec();
    let at = |x: f32, y: f32| -> Rgb {
        let clip = |v: f32| ((v * size as f32) as usize).min(size - 1);
        before[clip(y.max(0.0)) * size + clip(x.max(0.0))]
    };
    // How steep the brightness is: 0 flat, 1 a clear edge.
    let d = 1.0 / size as f32;
    let edge = |x: f32, y: f32| {
        let gx = gray(at(x + d, y)) - gray(at(x - d, y));
        let gy = gray(at(x, y + d)) - gray(at(x, y - d));
        ((gx * gx + gy * gy).sqrt() * 4.0).min(1.0)
    };
    let steps = |rgb: Rgb, n: f32| rgb.map(|c| (c.clamp(0.0, 1.0) * n).round() / n);
    let center = |v: f32, n: f32| ((v * n).floor() + 0.5) / n;
    each(picture, size, |x, y, pixel| {
        let level = gray(*pixel);
        *pixel = match kind {
            StyleKind::Pixels => steps(at(center(x, 24.0), center(y, 24.0)), 6.0),
            StyleKind::Posterized => steps(pixel.map(|c| (c - 0.5) * 1.5 + 0.5), 2.0),
            StyleKind::LineArt => [1.0 - edge(x, y).powf(0.7); 3],
            StyleKind::Halftone => {
                let (u, v) = ((x + y) * 24.0, (x - y) * 24.0);
                let dot = ((u - u.floor() - 0.5).powi(2) + (v - v.floor() - 0.5).powi(2)).sqrt();
                let ink = dot < 0.72 * (1.0 - level).sqrt();
                if ink {
                    steps(pixel.map(|c| c * 0.8), 3.0)
                } else {
                    [0.98, 0.96, 0.90]
                }
            }
            StyleKind::PencilSketch => {
                let hatch = 0.5 + 0.5 * ((x + y) * 150.0).sin();
                let tone = 1.0 - 0.75 * edge(x, y) - 0.35 * (1.0 - level) * hatch;
                [tone * 0.97; 3]
            }
            StyleKind::Watercolor => {
                let warp = 0.03 * (noise(x * 12.0, y * 12.0, seed) - 0.5);
                let wet = steps(at(x + warp, y - warp), 5.0);
                let paper = 0.30 * noise(x * 18.0, y * 18.0, seed ^ 2);
                mix(wet, [1.0; 3], 0.22 + paper)
            }
            StyleKind::Mosaic => {
                let (u, v) = (x * 20.0, y * 20.0);
                let gap = (u - u.floor()).min(v - v.floor()) < 0.14;
                let stone = at(center(x, 20.0), center(y, 20.0));
                let vary = 0.3 * hash(u as i32, v as i32, seed) - 0.15;
                if gap {
                    [0.82, 0.80, 0.76]
                } else {
                    shade(stone, vary)
                }
            }
            StyleKind::CelShaded => mix(steps(*pixel, 3.0), [0.05; 3], edge(x, y) * 1.4 - 0.3),
            StyleKind::Blueprint => {
                let grid = (x * 16.0).fract() < 0.06 || (y * 16.0).fract() < 0.06;
                let line = edge(x, y).max(if grid { 0.22 } else { 0.0 });
                mix([0.08, 0.22, 0.52], [0.92, 0.96, 1.0], line)
            }
            StyleKind::Woodcut => {
                let groove = 0.5 + 0.5 * ((y + 0.03 * (x * 12.0).sin()) * 170.0).sin();
                let ink = level + 0.35 * groove < 0.72 || edge(x, y) > 0.6;
                if ink {
                    [0.13, 0.10, 0.08]
                } else {
                    [0.93, 0.88, 0.76]
                }
            }
            StyleKind::StainedGlass | StyleKind::LowPoly => {
                let (site, gap) = nearest_site(x, y, 9.0, seed);
                let pane = at(site[0], site[1]);
                if kind == StyleKind::StainedGlass {
                    let glass = pane.map(|c| (c - 0.4) * 1.5 + 0.5);
                    if gap < 0.016 { [0.06; 3] } else { glass }
                } else {
                    shade(pane, 0.24 * hash((site[0] * 997.0) as i32, 1, seed) - 0.12)
                }
            }
            StyleKind::Pointillist => {
                let (site, _) = nearest_site(x, y, 30.0, seed);
                let off = (x - site[0]).hypot(y - site[1]);
                let dot = at(site[0], site[1]).map(|c| (c - 0.5) * 1.35 + 0.52);
                if off < 0.018 { dot } else { [0.96, 0.94, 0.88] }
            }
        };
    });
}

/// The nearest of a jittered lattice's points, and how far the border to the next one is.
fn nearest_site(x: f32, y: f32, scale: f32, seed: u64) -> ([f32; 2], f32) {
    let (i, j) = ((x * scale).floor() as i32, (y * scale).floor() as i32);
    let mut best = ([0.0; 2], f32::INFINITY);
    let mut second = f32::INFINITY;
    for (di, dj) in (-1..=1).flat_map(|a| (-1..=1).map(move |b| (a, b))) {
        let (u, v) = (i + di, j + dj);
        let site = [
            (u as f32 + 0.15 + 0.7 * hash(u, v, seed ^ 41)) / scale,
            (v as f32 + 0.15 + 0.7 * hash(u, v, seed ^ 42)) / scale,
        ];
        let off = (x - site[0]).hypot(y - site[1]);
        if off < best.1 {
            second = best.1;
            best = (site, off);
        } else if off < second {
            second = off;
        }
    }
    (best.0, 0.5 * (second - best.1))
}

/// Calls `f` with both coordinates in 0..1 and the pixel.
fn each(picture: &mut [Rgb], size: usize, f: impl Fn(f32, f32, &mut Rgb)) {
    for (index, pixel) in picture.iter_mut().enumerate() {
        let at = |i: usize| (i as f32 + 0.5) / size as f32;
        f(at(index % size), at(index / size), pixel);
    }
}
