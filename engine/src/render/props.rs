//! Things that an edit adds: on top of the object, or beside it.

use super::shapes::Shape;
use super::{Frame, Rgb};
use crate::vocabulary::PropKind;

/// A prop's layers, in its own -1..1 square, back to front.
fn layers(kind: PropKind, rgb: Rgb) -> Vec<(Shape, Rgb)> {
    let dark = rgb.map(|c| c * 0.6);
    let light = rgb.map(|c| 0.5 + 0.5 * c);
    let ball = |x: f32, y: f32, rx: f32, ry: f32| Shape::Ellipse([x, y], [rx, ry]);
    let block = |x: f32, y: f32, hx: f32, hy: f32| Shape::Box([x, y], [hx, hy], 0.06, 0.0);
    let poly = |corners: &[[f32; 2]]| Shape::Polygon(corners.to_vec(), 0.04);
    let rod = |a: [f32; 2], b: [f32; 2], r: f32| Shape::Capsule(a, b, r, r);
    let green = [0.28, 0.55, 0.25];
    match kind {
        PropKind::Bow | PropKind::Ribbon => vec![
            (poly(&[[0.0, 0.0], [-0.9, -0.55], [-0.9, 0.55]]), rgb),
            (poly(&[[0.0, 0.0], [0.9, -0.55], [0.9, 0.55]]), rgb),
            (ball(0.0, 0.0, 0.24, 0.28), dark),
        ],
        PropKind::Crown => vec![
            (
                poly(&[
                    [-0.85, 0.6],
                    [-0.95, -0.5],
                    [-0.45, 0.05],
                    [0.0, -0.75],
                    [0.45, 0.05],
                    [0.95, -0.5],
                    [0.85, 0.6],
                ]),
                rgb,
            ),
            (ball(0.0, 0.32, 0.14, 0.14), [0.85, 0.15, 0.25]),
            (ball(-0.5, 0.35, 0.1, 0.1), [0.2, 0.4, 0.9]),
            (ball(0.5, 0.35, 0.1, 0.1), [0.2, 0.4, 0.9]),
        ],
        PropKind::Flower => {
            let mut all = vec![(rod([0.0, 0.1], [0.0, 0.95], 0.06), green)];
            for k in 0..5 {
                let (sin, cos) = (k as f32 * std::f32::consts::TAU / 5.0).sin_cos();
                all.push((ball(0.42 * sin, -0.25 - 0.42 * cos, 0.3, 0.3), rgb));
            }
            all.push((ball(0.0, -0.25, 0.22, 0.22), [0.98, 0.82, 0.25]));
            all
        }
        PropKind::Star => vec![(star(), rgb)],
        PropKind::Heart => vec![
            (ball(-0.38, -0.25, 0.45, 0.42), rgb),
            (ball(0.38, -0.25, 0.45, 0.42), rgb),
            (poly(&[[-0.74, 0.0], [0.74, 0.0], [0.0, 0.85]]), rgb),
        ],
        PropKind::Balloon => vec![
            (rod([0.0, 0.4], [0.1, 1.0], 0.03), [0.3; 3]),
            (ball(0.0, -0.2, 0.58, 0.7), rgb),
            (ball(-0.2, -0.45, 0.12, 0.18), light),
        ],
        PropKind::Candle => vec![
            (block(0.0, 0.35, 0.22, 0.6), rgb),
            (ball(0.0, -0.5, 0.14, 0.3), [1.0, 0.75, 0.2]),
            (ball(0.0, -0.42, 0.07, 0.16), [1.0, 0.95, 0.7]),
        ],
        PropKind::Scarf => vec![
            (block(0.35, 0.45, 0.18, 0.5), dark),
            (Shape::Box([0.0, -0.1], [0.95, 0.26], 0.2, 0.0), rgb),
            (block(-0.4, -0.1, 0.07, 0.24), light),
            (block(0.5, -0.1, 0.07, 0.24), light),
        ],
        PropKind::Leaf => vec![
            (ball(0.0, -0.1, 0.45, 0.75), rgb),
            (rod([0.0, -0.6], [0.0, 0.95], 0.05), dark),
        ],
        PropKind::Moon => vec![(
            poly(&[
                [0.25, -0.9],
                [-0.4, -0.6],
                [-0.65, 0.0],
                [-0.4, 0.6],
                [0.25, 0.9],
                [-0.1, 0.45],
                [-0.2, 0.0],
                [-0.1, -0.45],
            ]),
            rgb,
        )],
        PropKind::Sun => vec![(star(), light), (ball(0.0, 0.0, 0.5, 0.5), rgb)],
        PropKind::PartyHat => vec![
            (poly(&[[0.0, -0.85], [0.6, 0.8], [-0.6, 0.8]]), rgb),
            (rod([-0.3, 0.1], [0.42, 0.45], 0.08), light),
            (ball(0.0, -0.85, 0.2, 0.2), [0.98, 0.85, 0.3]),
        ],
        PropKind::TopHat => vec![
            (block(0.0, -0.1, 0.55, 0.65), rgb),
            (
                Shape::Box([0.0, 0.3], [0.56, 0.12], 0.02, 0.0),
                [0.6, 0.12, 0.15],
            ),
            (ball(0.0, 0.6, 0.95, 0.2), rgb),
        ],
        PropKind::Glasses => vec![
            (rod([-0.3, 0.0], [0.3, 0.0], 0.08), rgb),
            (ball(-0.5, 0.0, 0.42, 0.4), rgb),
            (ball(0.5, 0.0, 0.42, 0.4), rgb),
            (ball(-0.6, -0.12, 0.12, 0.1), [0.6, 0.65, 0.75]),
            (ball(0.4, -0.12, 0.12, 0.1), [0.6, 0.65, 0.75]),
        ],
        PropKind::Gift => vec![
            (block(0.0, 0.25, 0.7, 0.6), rgb),
            (block(0.0, 0.25, 0.12, 0.6), [0.98, 0.9, 0.6]),
            (block(0.0, 0.1, 0.7, 0.1), [0.98, 0.9, 0.6]),
            (ball(-0.25, -0.5, 0.25, 0.16), [0.98, 0.9, 0.6]),
            (ball(0.25, -0.5, 0.25, 0.16), [0.98, 0.9, 0.6]),
        ],
        PropKind::Shell => vec![
            (
                poly(&[
                    [-0.85, -0.2],
                    [0.0, -0.75],
                    [0.85, -0.2],
                    [0.2, 0.75],
                    [-0.2, 0.75],
                ]),
                rgb,
            ),
            (rod([-0.45, -0.3], [-0.1, 0.7], 0.04), dark),
            (rod([0.0, -0.5], [0.0, 0.7], 0.04), dark),
            (rod([0.45, -0.3], [0.1, 0.7], 0.04), dark),
        ],
        PropKind::Mushroom => vec![
            (block(0.0, 0.45, 0.22, 0.45), [0.93, 0.9, 0.82]),
            (
                poly(&[
                    [-0.85, 0.1],
                    [-0.5, -0.55],
                    [0.0, -0.75],
                    [0.5, -0.55],
                    [0.85, 0.1],
                ]),
                rgb,
            ),
            (ball(-0.3, -0.25, 0.14, 0.13), [0.97; 3]),
            (ball(0.3, -0.3, 0.16, 0.14), [0.97; 3]),
        ],
        PropKind::Cactus => vec![
            (Shape::Box([0.0, 0.1], [0.24, 0.8], 0.22, 0.0), rgb),
            (rod([-0.55, -0.1], [-0.55, 0.25], 0.14), rgb),
            (rod([-0.55, 0.25], [0.0, 0.35], 0.12), rgb),
            (rod([0.55, -0.35], [0.55, 0.1], 0.14), rgb),
            (rod([0.55, 0.1], [0.0, 0.15], 0.12), rgb),
        ],
        PropKind::Gear => {
            let mut all = Vec::new();
            for k in 0..8 {
                let angle = k as f32 * std::f32::consts::TAU / 8.0;
                let (sin, cos) = angle.sin_cos();
                all.push((
                    Shape::Box([0.72 * cos, 0.72 * sin], [0.2, 0.15], 0.03, angle),
                    rgb,
                ));
            }
            all.push((ball(0.0, 0.0, 0.68, 0.68), rgb));
            all.push((ball(0.0, 0.0, 0.26, 0.26), dark));
            all
        }
        PropKind::Lantern => vec![
            (ball(-0.3, 0.1, 0.5, 0.62), rgb),
            (ball(0.3, 0.1, 0.5, 0.62), rgb),
            (ball(0.0, 0.1, 0.4, 0.66), rgb),
            (block(0.0, -0.7, 0.1, 0.2), green),
            (
                poly(&[[-0.45, 0.0], [-0.15, 0.0], [-0.3, -0.28]]),
                [1.0, 0.95, 0.5],
            ),
            (
                poly(&[[0.45, 0.0], [0.15, 0.0], [0.3, -0.28]]),
                [1.0, 0.95, 0.5],
            ),
            (
                poly(&[[-0.5, 0.25], [0.5, 0.25], [0.25, 0.5], [-0.25, 0.5]]),
                [1.0, 0.95, 0.5],
            ),
        ],
        PropKind::Butterfly => vec![
            (ball(-0.45, -0.3, 0.45, 0.48), rgb),
            (ball(0.45, -0.3, 0.45, 0.48), rgb),
            (ball(-0.35, 0.4, 0.32, 0.36), light),
            (ball(0.35, 0.4, 0.32, 0.36), light),
            (ball(0.0, 0.0, 0.09, 0.7), [0.15; 3]),
        ],
        PropKind::Umbrella => vec![
            (rod([0.0, 0.0], [0.0, 0.95], 0.05), [0.45, 0.3, 0.18]),
            (
                poly(&[
                    [-0.95, 0.1],
                    [-0.5, -0.5],
                    [0.0, -0.75],
                    [0.5, -0.5],
                    [0.95, 0.1],
                ]),
                rgb,
            ),
            (poly(&[[-0.3, 0.1], [0.0, -0.7], [0.3, 0.1]]), light),
        ],
        PropKind::Planet => vec![
            (ball(0.0, 0.0, 0.6, 0.6), rgb),
            (Shape::Box([0.0, 0.0], [1.0, 0.09], 0.08, -0.35), light),
        ],
    }
}

fn star() -> Shape {
    let corner = |k: usize| {
        let radius = if k.is_multiple_of(2) { 0.95 } else { 0.42 };
        let (sin, cos) = (k as f32 * std::f32::consts::TAU / 10.0).sin_cos();
        [radius * sin, -radius * cos]
    };
    Shape::Polygon((0..10).map(corner).collect(), 0.03)
}

/// Where a prop goes: centre in the object's coordinates and its half size.
fn place(kind: PropKind) -> ([f32; 2], f32) {
    match kind {
        PropKind::Crown | PropKind::TopHat | PropKind::PartyHat => ([0.0, -0.98], 0.36),
        PropKind::Bow | PropKind::Ribbon => ([0.30, -0.62], 0.34),
        PropKind::Scarf => ([0.0, 0.22], 0.66),
        PropKind::Glasses => ([0.0, -0.18], 0.52),
        PropKind::Moon | PropKind::Sun | PropKind::Planet => ([0.95, -0.95], 0.36),
        PropKind::Butterfly | PropKind::Balloon | PropKind::Star | PropKind::Heart => {
            ([-0.90, -0.80], 0.36)
        }
        _ => ([0.92, 0.62], 0.40),
    }
}

/// Paints the prop over the picture.
pub(super) fn add(picture: &mut [Rgb], size: usize, kind: PropKind, rgb: Rgb, frame: &Frame) {
    let (center, half) = place(kind);
    let layers = layers(kind, rgb);
    for (index, pixel) in picture.iter_mut().enumerate() {
        let (x, y) = frame.pixel(index, size);
        let p = frame.to_object_upright(x, y);
        let q = [(p[0] - center[0]) / half, (p[1] - center[1]) / half];
        if q[0].abs() > 1.25 || q[1].abs() > 1.25 {
            continue;
        }
        for (shape, rgb) in &layers {
            let distance = shape.distance(q);
            let coverage = (0.5 - distance * half / frame.pixel).clamp(0.0, 1.0);
            let rim = 1.0 - 0.4 * (1.0 + distance / 0.12).clamp(0.0, 1.0);
            let lit = (1.1 - 0.25 * (q[0] + q[1])) * rim;
            for c in 0..3 {
                pixel[c] += (rgb[c] * lit - pixel[c]) * coverage;
            }
        }
    }
}
