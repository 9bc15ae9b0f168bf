//! The objects, as stacks of flat shapes with signed distances.
//!
//! Coordinates run from -1 to 1, x to the right, y down; the object stands on y = 0.9.
//! The distance formulas are the usual ones (Quilez, "2D distance functions"); that of the
//! ellipse is a first-order approximation, good near the rim, which is where it is looked at.

use super::{Object, Rgb};

/// A flat shape.
#[derive(Clone, Debug)]
pub enum Shape {
    /// Centre and two half axes.
    Ellipse([f32; 2], [f32; 2]),
    /// Centre, half sides, corner radius, angle in radians.
    Box([f32; 2], [f32; 2], f32, f32),
    /// Two ends with a radius each.
    Capsule([f32; 2], [f32; 2], f32, f32),
    /// Corners, and by how much they are rounded.
    Polygon(Vec<[f32; 2]>, f32),
    /// Centre, radius, half the thickness.
    Ring([f32; 2], f32, f32),
}

/// Where a part takes its colour from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tint {
    /// Material, colour and pattern of the object.
    Body,
    /// The same material, somewhat darker, without the pattern.
    Second,
    /// Always this colour: wheels, eyes, windows.
    Fixed(Rgb),
}

/// One layer of an object.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its outline.
    pub shape: Shape,
    /// Its colour.
    pub tint: Tint,
    /// How far from the rim the surface still curves.
    pub bevel: f32,
}

impl Shape {
    /// The signed distance from the outline: negative inside.
    pub fn distance(&self, p: [f32; 2]) -> f32 {
        match self {
            Self::Ellipse(center, axes) => {
                let q = sub(p, *center);
                let (a, b) = (q[0] / axes[0], q[1] / axes[1]);
                let k0 = (a * a + b * b).sqrt();
                let (a, b) = (a / axes[0], b / axes[1]);
                let k1 = (a * a + b * b).sqrt().max(1e-4);
                k0 * (k0 - 1.0) / k1
            }
            Self::Box(center, half, round, angle) => {
                let q = sub(p, *center);
                let (sin, cos) = angle.sin_cos();
                let q = [cos * q[0] + sin * q[1], cos * q[1] - sin * q[0]];
                let dx = q[0].abs() - half[0] + round;
                let dy = q[1].abs() - half[1] + round;
                length([dx.max(0.0), dy.max(0.0)]) + dx.max(dy).min(0.0) - round
            }
            Self::Capsule(a, b, ra, rb) => {
                let (pa, ba) = (sub(p, *a), sub(*b, *a));
                let t = (dot(pa, ba) / dot(ba, ba).max(1e-6)).clamp(0.0, 1.0);
                length([pa[0] - t * ba[0], pa[1] - t * ba[1]]) - (ra + t * (rb - ra))
            }
            Self::Polygon(corners, round) => polygon(corners, p) - round,
            Self::Ring(center, radius, half) => (length(sub(p, *center)) - radius).abs() - half,
        }
    }
}

fn sub(a: [f32; 2], b: [f32; 2]) -> [f32; 2] {
    [a[0] - b[0], a[1] - b[1]]
}

fn dot(a: [f32; 2], b: [f32; 2]) -> f32 {
    a[0] * b[0] + a[1] * b[1]
}

fn length(a: [f32; 2]) -> f32 {
    dot(a, a).sqrt()
}

/// The distance to the nearest side, negative where the winding number is odd.
fn polygon(corners: &[[f32; 2]], p: [f32; 2]) -> f32 {
    let mut nearest = f32::INFINITY;
    let mut inside = false;
    for (i, &a) in corners.iter().enumerate() {
        let b = corners[(i + 1) % corners.len()];
        let (e, w) = (sub(b, a), sub(p, a));
        let t = (dot(w, e) / dot(e, e).max(1e-6)).clamp(0.0, 1.0);
        let off = [w[0] - t * e[0], w[1] - t * e[1]];
        nearest = nearest.min(dot(off, off));
        if (a[1] > p[1]) != (b[1] > p[1]) && w[0] < e[0] * w[1] / e[1] {
            inside = !inside;
        }
    }
    nearest.sqrt() * if inside { -1.0 } else { 1.0 }
}

const DARK: Rgb = [0.13, 0.13, 0.15];
const PALE: Rgb = [0.93, 0.92, 0.88];
const PANE: Rgb = [0.62, 0.80, 0.90];
const BARK: Rgb = [0.40, 0.27, 0.17];
const GLOW: Rgb = [1.0, 0.92, 0.65];

fn body(shape: Shape) -> Part {
    layer(shape, Tint::Body)
}

fn second(shape: Shape) -> Part {
    layer(shape, Tint::Second)
}

fn fixed(shape: Shape, rgb: Rgb) -> Part {
    layer(shape, Tint::Fixed(rgb))
}

/// The bevel follows from how wide the shape is.
fn layer(shape: Shape, tint: Tint) -> Part {
    let bevel = match &shape {
        Shape::Ellipse(_, axes) => 0.9 * axes[0].min(axes[1]),
        Shape::Box(_, half, _, _) => 0.8 * half[0].min(half[1]),
        Shape::Capsule(_, _, ra, rb) => 0.9 * ra.max(*rb),
        Shape::Polygon(_, round) => 0.2 + round,
        Shape::Ring(_, _, half) => 0.9 * half,
    };
    Part {
        shape,
        tint,
        bevel: bevel.clamp(0.02, 0.5),
    }
}

fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> Shape {
    Shape::Ellipse([x, y], [rx, ry])
}

fn block(x: f32, y: f32, hx: f32, hy: f32, round: f32) -> Shape {
    Shape::Box([x, y], [hx, hy], round, 0.0)
}

fn rod(a: [f32; 2], b: [f32; 2], r: f32) -> Shape {
    Shape::Capsule(a, b, r, r)
}

fn poly(corners: &[[f32; 2]], round: f32) -> Shape {
    Shape::Polygon(corners.to_vec(), round)
}

/// The layers of an object, back to front.
pub fn parts(object: Object) -> Vec<Part> {
    match object {
        Object::Mug => vec![
            second(Shape::Ring([0.52, 0.05], 0.33, 0.085)),
            body(block(-0.08, 0.1, 0.58, 0.78, 0.16)),
            second(ellipse(-0.08, -0.62, 0.57, 0.14)),
            fixed(ellipse(-0.08, -0.60, 0.49, 0.09), [0.28, 0.16, 0.09]),
        ],
        Object::Chair => vec![
            second(block(-0.42, 0.60, 0.065, 0.32, 0.03)),
            second(block(0.42, 0.60, 0.065, 0.32, 0.03)),
            second(block(-0.25, 0.50, 0.05, 0.26, 0.03)),
            second(block(0.25, 0.50, 0.05, 0.26, 0.03)),
            body(block(0.0, -0.38, 0.46, 0.52, 0.15)),
            body(block(0.0, 0.24, 0.58, 0.14, 0.09)),
        ],
        Object::Lamp => vec![
            second(block(0.0, 0.20, 0.055, 0.62, 0.03)),
            second(ellipse(0.0, 0.82, 0.42, 0.11)),
            fixed(ellipse(0.0, -0.12, 0.16, 0.14), GLOW),
            body(poly(
                &[[-0.30, -0.80], [0.30, -0.80], [0.62, -0.12], [-0.62, -0.12]],
                0.04,
            )),
        ],
        Object::Guitar => vec![
            fixed(block(0.0, -0.45, 0.075, 0.45, 0.02), BARK),
            second(block(0.0, -0.88, 0.13, 0.11, 0.04)),
            body(ellipse(0.0, 0.08, 0.38, 0.30)),
            body(ellipse(0.0, 0.50, 0.54, 0.40)),
            fixed(ellipse(0.0, 0.28, 0.16, 0.16), DARK),
            fixed(block(0.0, 0.66, 0.20, 0.04, 0.02), DARK),
            fixed(block(0.0, -0.10, 0.012, 0.76, 0.0), PALE),
        ],
        Object::Helmet => vec![
            body(ellipse(0.0, 0.02, 0.82, 0.80)),
            second(block(0.0, 0.62, 0.62, 0.22, 0.16)),
            fixed(block(0.14, 0.10, 0.56, 0.26, 0.22), [0.16, 0.20, 0.27]),
            fixed(block(0.22, 0.02, 0.30, 0.05, 0.05), [0.55, 0.66, 0.75]),
        ],
        Object::Tower => vec![
            body(block(0.0, 0.25, 0.36, 0.65, 0.02)),
            body(block(0.0, -0.38, 0.48, 0.15, 0.03)),
            second(poly(&[[0.0, -0.98], [0.50, -0.52], [-0.50, -0.52]], 0.02)),
            fixed(block(0.0, 0.02, 0.09, 0.14, 0.09), DARK),
            fixed(block(0.0, 0.72, 0.15, 0.20, 0.12), BARK),
        ],
        Object::Car => vec![
            body(poly(
                &[[-0.50, 0.10], [-0.34, -0.32], [0.28, -0.32], [0.54, 0.10]],
                0.08,
            )),
            fixed(
                poly(
                    &[[-0.38, 0.06], [-0.27, -0.22], [-0.04, -0.22], [-0.04, 0.06]],
                    0.03,
                ),
                PANE,
            ),
            fixed(
                poly(
                    &[[0.06, 0.06], [0.06, -0.22], [0.24, -0.22], [0.40, 0.06]],
                    0.03,
                ),
                PANE,
            ),
            body(block(0.0, 0.32, 0.92, 0.26, 0.17)),
            fixed(ellipse(-0.50, 0.58, 0.24, 0.24), DARK),
            fixed(ellipse(0.50, 0.58, 0.24, 0.24), DARK),
            fixed(ellipse(-0.50, 0.58, 0.11, 0.11), PALE),
            fixed(ellipse(0.50, 0.58, 0.11, 0.11), PALE),
            fixed(ellipse(0.84, 0.26, 0.07, 0.08), GLOW),
        ],
        Object::Fish => vec![
            second(poly(
                &[[-0.45, 0.0], [-0.92, -0.42], [-0.80, 0.0], [-0.92, 0.42]],
                0.05,
            )),
            second(poly(&[[-0.20, -0.35], [0.20, -0.70], [0.25, -0.30]], 0.06)),
            body(ellipse(0.12, 0.0, 0.72, 0.46)),
            second(poly(&[[0.05, 0.12], [-0.22, 0.32], [-0.02, -0.02]], 0.05)),
            fixed(ellipse(0.52, -0.10, 0.11, 0.11), PALE),
            fixed(ellipse(0.54, -0.10, 0.055, 0.055), DARK),
            fixed(rod([0.66, 0.16], [0.78, 0.12], 0.02), DARK),
        ],
        Object::Boot => vec![
            fixed(block(0.06, 0.84, 0.70, 0.08, 0.05), DARK),
            body(poly(
                &[
                    [-0.52, -0.78],
                    [0.10, -0.78],
                    [0.12, 0.18],
                    [0.58, 0.38],
                    [0.68, 0.70],
                    [-0.56, 0.70],
                ],
                0.08,
            )),
            second(block(-0.21, -0.76, 0.42, 0.12, 0.09)),
            fixed(rod([-0.12, -0.35], [0.14, -0.40], 0.025), PALE),
            fixed(rod([-0.12, -0.12], [0.14, -0.17], 0.025), PALE),
            fixed(rod([-0.10, 0.11], [0.18, 0.06], 0.025), PALE),
        ],
        Object::House => vec![
            body(block(0.0, 0.36, 0.66, 0.54, 0.02)),
            second(block(0.42, -0.45, 0.10, 0.24, 0.02)),
            second(poly(&[[0.0, -0.82], [0.82, -0.12], [-0.82, -0.12]], 0.05)),
            fixed(block(0.0, 0.60, 0.15, 0.30, 0.03), BARK),
            fixed(block(-0.40, 0.30, 0.14, 0.14, 0.02), PANE),
            fixed(block(0.40, 0.30, 0.14, 0.14, 0.02), PANE),
        ],
        Object::Tree => vec![
            fixed(block(0.0, 0.55, 0.11, 0.36, 0.03), BARK),
            body(ellipse(-0.36, 0.05, 0.42, 0.36)),
            body(ellipse(0.36, 0.05, 0.42, 0.36)),
            body(ellipse(0.0, -0.32, 0.56, 0.50)),
        ],
        Object::Teapot => vec![
            second(Shape::Ring([-0.62, 0.12], 0.28, 0.075)),
            second(Shape::Capsule([0.45, 0.32], [0.92, -0.28], 0.16, 0.07)),
            body(ellipse(0.0, 0.25, 0.64, 0.58)),
            second(ellipse(0.0, -0.28, 0.34, 0.12)),
            second(ellipse(0.0, -0.44, 0.11, 0.10)),
            second(block(0.0, 0.82, 0.34, 0.06, 0.05)),
        ],
        Object::Clock => vec![
            body(ellipse(0.0, 0.02, 0.82, 0.82)),
            fixed(ellipse(0.0, 0.02, 0.62, 0.62), PALE),
            fixed(rod([0.0, 0.02], [0.0, -0.44], 0.04), DARK),
            fixed(rod([0.0, 0.02], [0.30, 0.18], 0.05), DARK),
            fixed(ellipse(0.0, -0.52, 0.04, 0.05), DARK),
            fixed(ellipse(0.0, 0.56, 0.04, 0.05), DARK),
            fixed(ellipse(-0.54, 0.02, 0.05, 0.04), DARK),
            fixed(ellipse(0.54, 0.02, 0.05, 0.04), DARK),
            second(ellipse(0.0, 0.02, 0.08, 0.08)),
        ],
        Object::Cat => vec![
            second(Shape::Capsule([0.45, 0.72], [0.82, 0.10], 0.11, 0.07)),
            body(ellipse(0.05, 0.48, 0.48, 0.44)),
            body(poly(
                &[[-0.46, -0.30], [-0.42, -0.90], [-0.06, -0.55]],
                0.05,
            )),
            body(poly(&[[0.46, -0.30], [0.42, -0.90], [0.06, -0.55]], 0.05)),
            body(ellipse(0.0, -0.25, 0.52, 0.44)),
            fixed(ellipse(-0.20, -0.30, 0.10, 0.11), [0.75, 0.85, 0.35]),
            fixed(ellipse(0.20, -0.30, 0.10, 0.11), [0.75, 0.85, 0.35]),
            fixed(ellipse(-0.20, -0.30, 0.04, 0.09), DARK),
            fixed(ellipse(0.20, -0.30, 0.04, 0.09), DARK),
            fixed(ellipse(0.0, -0.12, 0.06, 0.045), [0.85, 0.45, 0.50]),
            second(ellipse(-0.20, 0.82, 0.17, 0.10)),
            second(ellipse(0.22, 0.82, 0.17, 0.10)),
        ],
        Object::Rocket => vec![
            fixed(
                poly(&[[-0.16, 0.62], [0.16, 0.62], [0.0, 0.92]], 0.04),
                [0.98, 0.62, 0.15],
            ),
            second(poly(&[[-0.28, 0.15], [-0.62, 0.62], [-0.25, 0.55]], 0.04)),
            second(poly(&[[0.28, 0.15], [0.62, 0.62], [0.25, 0.55]], 0.04)),
            body(ellipse(0.0, -0.10, 0.35, 0.82)),
            second(poly(&[[0.0, -0.93], [0.20, -0.62], [-0.20, -0.62]], 0.02)),
            fixed(ellipse(0.0, -0.22, 0.18, 0.18), PALE),
            fixed(ellipse(0.0, -0.22, 0.12, 0.12), PANE),
        ],
        Object::Umbrella => vec![
            fixed(rod([0.0, -0.30], [0.0, 0.72], 0.045), BARK),
            fixed(rod([0.0, 0.74], [0.22, 0.80], 0.06), BARK),
            body(poly(
                &[
                    [-0.90, 0.05],
                    [-0.76, -0.40],
                    [-0.42, -0.74],
                    [0.0, -0.85],
                    [0.42, -0.74],
                    [0.76, -0.40],
                    [0.90, 0.05],
                    [0.60, -0.08],
                    [0.30, 0.05],
                    [0.0, -0.08],
                    [-0.30, 0.05],
                    [-0.60, -0.08],
                ],
                0.03,
            )),
            second(rod([0.0, -0.84], [0.0, -0.12], 0.015)),
            second(ellipse(0.0, -0.90, 0.05, 0.08)),
        ],
        Object::Sofa => vec![
            fixed(block(-0.60, 0.78, 0.06, 0.12, 0.03), BARK),
            fixed(block(0.60, 0.78, 0.06, 0.12, 0.03), BARK),
            body(block(0.0, -0.05, 0.78, 0.46, 0.20)),
            second(block(-0.34, 0.34, 0.40, 0.18, 0.10)),
            second(block(0.34, 0.34, 0.40, 0.18, 0.10)),
            body(block(0.0, 0.58, 0.86, 0.16, 0.08)),
            body(block(-0.80, 0.34, 0.16, 0.40, 0.15)),
            body(block(0.80, 0.34, 0.16, 0.40, 0.15)),
        ],
        Object::Bottle => vec![
            body(block(0.0, -0.45, 0.14, 0.40, 0.05)),
            body(block(0.0, 0.32, 0.36, 0.58, 0.20)),
            fixed(block(0.0, -0.85, 0.15, 0.09, 0.04), BARK),
            fixed(block(0.0, 0.36, 0.34, 0.20, 0.02), PALE),
            second(block(0.0, 0.36, 0.20, 0.05, 0.02)),
        ],
        Object::Book => vec![
            fixed(block(0.06, 0.06, 0.62, 0.80, 0.03), PALE),
            body(block(0.0, 0.0, 0.62, 0.80, 0.05)),
            second(block(-0.54, 0.0, 0.09, 0.80, 0.04)),
            fixed(block(0.10, -0.38, 0.34, 0.10, 0.03), PALE),
            fixed(block(0.10, 0.48, 0.22, 0.04, 0.02), PALE),
        ],
        Object::Mushroom => vec![
            fixed(Shape::Capsule([0.0, -0.05], [0.0, 0.70], 0.20, 0.26), PALE),
            body(poly(
                &[
                    [-0.86, 0.02],
                    [-0.70, -0.42],
                    [-0.36, -0.72],
                    [0.0, -0.80],
                    [0.36, -0.72],
                    [0.70, -0.42],
                    [0.86, 0.02],
                ],
                0.06,
            )),
            fixed(ellipse(-0.40, -0.28, 0.13, 0.12), PALE),
            fixed(ellipse(0.14, -0.48, 0.14, 0.12), PALE),
            fixed(ellipse(0.50, -0.18, 0.11, 0.10), PALE),
        ],
        Object::Vase => vec![
            fixed(rod([0.0, -0.40], [-0.28, -0.72], 0.025), [0.25, 0.50, 0.25]),
            fixed(rod([0.0, -0.40], [0.26, -0.76], 0.025), [0.25, 0.50, 0.25]),
            fixed(ellipse(-0.30, -0.76, 0.17, 0.16), [0.95, 0.60, 0.70]),
            fixed(ellipse(0.28, -0.80, 0.17, 0.16), [0.98, 0.82, 0.35]),
            body(block(0.0, -0.28, 0.22, 0.26, 0.05)),
            body(ellipse(0.0, 0.30, 0.52, 0.50)),
            second(block(0.0, 0.80, 0.32, 0.09, 0.05)),
            second(block(0.0, -0.50, 0.30, 0.06, 0.05)),
        ],
        Object::Backpack => vec![
            second(Shape::Ring([0.0, -0.70], 0.20, 0.06)),
            second(block(-0.62, 0.42, 0.14, 0.32, 0.10)),
            second(block(0.62, 0.42, 0.14, 0.32, 0.10)),
            body(block(0.0, 0.12, 0.60, 0.78, 0.28)),
            second(block(0.0, 0.48, 0.42, 0.28, 0.10)),
            fixed(block(0.0, 0.30, 0.36, 0.025, 0.02), DARK),
            fixed(block(0.0, -0.12, 0.46, 0.03, 0.02), DARK),
        ],
        Object::Boat => vec![
            fixed(rod([0.0, 0.40], [0.0, -0.85], 0.04), BARK),
            fixed(
                poly(&[[0.08, -0.78], [0.62, 0.26], [0.08, 0.26]], 0.02),
                PALE,
            ),
            second(poly(&[[-0.08, -0.62], [-0.46, 0.26], [-0.08, 0.26]], 0.02)),
            body(poly(
                &[[-0.88, 0.38], [0.88, 0.38], [0.58, 0.80], [-0.58, 0.80]],
                0.05,
            )),
            second(block(0.0, 0.40, 0.90, 0.06, 0.03)),
        ],
        Object::Cake => vec![
            second(block(0.0, 0.80, 0.88, 0.08, 0.06)),
            body(block(0.0, 0.46, 0.72, 0.30, 0.06)),
            body(block(0.0, -0.06, 0.50, 0.26, 0.06)),
            fixed(block(0.0, 0.20, 0.74, 0.06, 0.05), PALE),
            fixed(block(0.0, -0.30, 0.52, 0.06, 0.05), PALE),
            fixed(block(0.0, -0.54, 0.05, 0.18, 0.02), [0.90, 0.35, 0.45]),
            fixed(ellipse(0.0, -0.80, 0.06, 0.11), GLOW),
        ],
        Object::Bird => vec![
            second(poly(&[[-0.45, 0.25], [-0.95, 0.02], [-0.92, 0.34]], 0.05)),
            fixed(
                poly(&[[0.70, -0.42], [0.98, -0.32], [0.70, -0.22]], 0.03),
                [0.95, 0.65, 0.15],
            ),
            fixed(rod([-0.05, 0.60], [-0.08, 0.86], 0.03), [0.90, 0.60, 0.15]),
            fixed(rod([0.18, 0.60], [0.18, 0.86], 0.03), [0.90, 0.60, 0.15]),
            body(ellipse(0.0, 0.22, 0.60, 0.46)),
            body(ellipse(0.46, -0.34, 0.36, 0.34)),
            second(poly(&[[0.10, 0.02], [-0.62, 0.18], [-0.10, 0.50]], 0.07)),
            fixed(ellipse(0.56, -0.40, 0.08, 0.08), PALE),
            fixed(ellipse(0.58, -0.40, 0.045, 0.045), DARK),
        ],
        Object::Balloon => vec![
            fixed(rod([-0.22, 0.20], [-0.14, 0.62], 0.015), DARK),
            fixed(rod([0.22, 0.20], [0.14, 0.62], 0.015), DARK),
            body(ellipse(0.0, -0.30, 0.64, 0.62)),
            second(poly(
                &[[-0.34, 0.18], [0.34, 0.18], [0.18, 0.36], [-0.18, 0.36]],
                0.03,
            )),
            fixed(block(0.0, 0.74, 0.20, 0.14, 0.04), BARK),
        ],
        Object::Hat => vec![
            second(ellipse(0.0, 0.52, 0.94, 0.24)),
            body(poly(
                &[[-0.52, 0.50], [-0.44, -0.58], [0.44, -0.58], [0.52, 0.50]],
                0.07,
            )),
            fixed(block(0.0, 0.32, 0.56, 0.11, 0.03), DARK),
            second(ellipse(0.0, -0.60, 0.46, 0.12)),
        ],
        Object::Apple => vec![
            fixed(rod([0.0, -0.45], [0.10, -0.85], 0.045), BARK),
            fixed(ellipse(0.34, -0.72, 0.24, 0.12), [0.30, 0.60, 0.25]),
            body(ellipse(-0.24, 0.16, 0.54, 0.66)),
            body(ellipse(0.24, 0.16, 0.54, 0.66)),
        ],
        Object::Robot => vec![
            fixed(rod([0.0, -0.70], [0.0, -0.90], 0.03), DARK),
            fixed(ellipse(0.0, -0.92, 0.08, 0.08), [0.95, 0.30, 0.25]),
            second(block(-0.64, 0.22, 0.12, 0.34, 0.10)),
            second(block(0.64, 0.22, 0.12, 0.34, 0.10)),
            second(block(-0.24, 0.76, 0.14, 0.16, 0.05)),
            second(block(0.24, 0.76, 0.14, 0.16, 0.05)),
            body(block(0.0, 0.25, 0.48, 0.42, 0.10)),
            body(block(0.0, -0.44, 0.40, 0.28, 0.12)),
            fixed(ellipse(-0.16, -0.46, 0.10, 0.10), GLOW),
            fixed(ellipse(0.16, -0.46, 0.10, 0.10), GLOW),
            fixed(block(0.0, 0.20, 0.26, 0.14, 0.04), [0.25, 0.30, 0.35]),
        ],
        Object::Bed => vec![
            second(block(-0.80, 0.05, 0.09, 0.72, 0.06)),
            second(block(0.82, 0.40, 0.08, 0.42, 0.06)),
            fixed(block(0.0, 0.48, 0.80, 0.20, 0.08), PALE),
            fixed(block(-0.46, 0.18, 0.26, 0.14, 0.12), PALE),
            body(block(0.24, 0.36, 0.58, 0.24, 0.12)),
            second(block(0.0, 0.68, 0.84, 0.10, 0.04)),
        ],
    }
}
