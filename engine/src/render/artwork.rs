//! Pictures as objects: artwork cut out by its alpha, and photographs that fill the scene.
//!
//! An [`Artwork`] stands where a drawn object would. As it is, it keeps its own colours; once
//! an attribute gives it a colour, material or pattern, that paint takes the place of the
//! colours, and what is kept of the picture is its light and dark: eyes, windows, folds. The
//! outline comes from the alpha, rounded relief from the distance to it, so that metal and
//! glass find something to reflect. A photograph has no outline; only what lies over the
//! whole picture can change it exactly.
//!
//! Not here: fetching pictures. [`emoji`] reads the unpacked npm package
//! `@lobehub/fluent-emoji-3d` 1.1.0 (MIT licence, 256 px WebP with alpha).

use super::surfaces::{Surface, gray};
use super::{Frame, Rgb, normalize, shapes::Tint};
use crate::picture::{self, Picture};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which emoji are things, and their nouns; a `*` marks the held-out tenth.
const NOUNS: &str = include_str!("artwork_nouns.txt");

/// Side of the square of texels, over -1..1 of the object.
const SIDE: usize = 128;

/// A picture that can stand in a scene.
#[derive(Clone)]
pub struct Artwork {
    /// The plain noun that captions use.
    pub noun: String,
    /// Never trained on.
    pub held_out: bool,
    /// A photograph that fills the whole picture, without an outline.
    pub whole: bool,
    side: usize,
    texels: Vec<Texel>,
}

impl std::fmt::Debug for Artwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Artwork({})", self.noun)
    }
}

/// What is known of one point of an artwork.
#[derive(Clone, Copy, Default)]
struct Texel {
    rgb: Rgb,
    alpha: f32,
    /// Light or dark among the artwork's own tones, 0..1.
    level: f32,
    /// From the outline in object units, negative inside.
    distance: f32,
    /// Where the surface leans to, right and down.
    lean: [f32; 2],
}

impl Artwork {
    /// An object cut out by the picture's alpha: it stands on y = 0.9 as drawn objects do.
    ///
    /// # Errors
    /// If hardly a pixel is opaque.
    pub fn cut_out(noun: &str, held_out: bool, picture: &Picture) -> Result<Self> {
        let (w, h) = (picture.width as usize, picture.height as usize);
        let alpha = |x: usize, y: usize| picture.alpha.as_ref().map_or(255, |a| a[y * w + x]);
        let solid: Vec<(usize, usize)> = (0..w * h)
            .map(|i| (i % w, i / w))
            .filter(|&(x, y)| alpha(x, y) > 127)
            .collect();
        let range = |of: &dyn Fn(&(usize, usize)) -> usize| {
            let low = solid.iter().map(of).min().unwrap_or(0) as f32;
            (low, solid.iter().map(of).max().unwrap_or(0) as f32 + 1.0)
        };
        let ((left, right), (top, bottom)) = (range(&|p| p.0), range(&|p| p.1));
        if solid.len() < 64 {
            return Err(Error::BadImage {
                what: noun.into(),
                reason: "it is transparent nearly everywhere: expected artwork with alpha".into(),
            });
        }
        // Pixels of the file to one object unit, and where the object's (0, 0) lies.
        let unit = (right - left).max(bottom - top) / 1.84;
        let origin = [0.5 * (left + right), bottom - 0.92 * unit];
        let at = |x: f32, y: f32| -> ([f32; 3], f32) {
            let (x, y) = (x.floor(), y.floor());
            if x < 0.0 || y < 0.0 || x >= w as f32 || y >= h as f32 {
                return ([0.0; 3], 0.0);
            }
            let rgb = picture.at(x as u32, y as u32).map(|v| f32::from(v) / 255.0);
            (rgb, f32::from(alpha(x as usize, y as usize)) / 255.0)
        };
        let mut texels = vec![Texel::default(); SIDE * SIDE];
        const TAPS: usize = 4;
        for (i, texel) in texels.iter_mut().enumerate() {
            let mut sum = [0.0; 3];
            for tap in 0..TAPS * TAPS {
                let part = |at: usize, tap: usize| {
                    (at as f32 + (tap as f32 + 0.5) / TAPS as f32) * 2.0 / SIDE as f32 - 1.0
                };
                let (u, v) = (part(i % SIDE, tap % TAPS), part(i / SIDE, tap / TAPS));
                let (rgb, a) = at(origin[0] + u * unit, origin[1] + v * unit);
                for c in 0..3 {
                    sum[c] += rgb[c] * a;
                }
                texel.alpha += a;
            }
            texel.rgb = sum.map(|c| c / texel.alpha.max(1e-3));
            texel.alpha /= (TAPS * TAPS) as f32;
        }
        let mut art = Self {
            noun: noun.into(),
            held_out,
            whole: false,
            side: SIDE,
            texels,
        };
        art.measure();
        Ok(art)
    }

    /// A photograph: its middle square.
    pub fn photograph(noun: &str, held_out: bool, picture: &Picture) -> Self {
        let side = picture.width.min(picture.height);
        let (x, y) = ((picture.width - side) / 2, (picture.height - side) / 2);
        let small = picture.cropped(x, y, side, side).resized(192, 192);
        let texel = |rgb: &[u8]| Texel {
            rgb: [rgb[0], rgb[1], rgb[2]].map(|v| f32::from(v) / 255.0),
            alpha: 1.0,
            ..Texel::default()
        };
        Self {
            noun: noun.into(),
            held_out,
            whole: true,
            side: 192,
            texels: small.rgb.chunks_exact(3).map(texel).collect(),
        }
    }

    /// Distances, tones and relief from colours and alpha.
    fn measure(&mut self) {
        let side = self.side;
        let inside: Vec<bool> = self.texels.iter().map(|t| t.alpha > 0.5).collect();
        let (to_out, _) = nearest(&inside, side, false);
        let (to_in, seed) = nearest(&inside, side, true);
        let mut tones: Vec<f32> = (0..side * side)
            .filter(|&i| inside[i])
            .map(|i| gray(self.texels[i].rgb))
            .collect();
        tones.sort_by(f32::total_cmp);
        let share = |s: f32| tones[((tones.len() - 1) as f32 * s) as usize];
        let (low, high) = (share(0.04), share(0.96));
        let spread = (high - low).max(0.35);
        let low = 0.5 * (low + high - spread);
        let colors: Vec<Rgb> = self.texels.iter().map(|t| t.rgb).collect();
        for (i, texel) in self.texels.iter_mut().enumerate() {
            // Beyond the outline the nearest colour inside goes on: fur sticks out.
            if !inside[i] {
                texel.rgb = colors[seed[i]];
            }
            texel.level = ((gray(texel.rgb) - low) / spread).clamp(0.0, 1.0);
            texel.distance = (to_in[i] - to_out[i]) * 2.0 / side as f32;
        }
        let height: Vec<f32> = self
            .texels
            .iter()
            .map(|t| {
                let rim = (1.0 + t.distance.min(0.0) / 0.30).clamp(0.0, 1.0);
                -0.16 * rim * rim + 0.05 * t.level
            })
            .collect();
        let smooth = blurred(&blurred(&height, side), side);
        for i in 0..side * side {
            let (x, y) = (i % side, i / side);
            let at = |x: usize, y: usize| smooth[y.min(side - 1) * side + x.min(side - 1)];
            let slope = 0.5 * side as f32 * 0.5;
            let dx = (at(x.saturating_sub(1), y) - at(x + 1, y)) * slope;
            let dy = (at(x, y.saturating_sub(1)) - at(x, y + 1)) * slope;
            self.texels[i].lean = [dx.clamp(-1.5, 1.5), dy.clamp(-1.5, 1.5)];
        }
    }

    /// Between the texels around a point of the object.
    fn at(&self, p: [f32; 2]) -> Texel {
        let last = (self.side - 1) as f32;
        let place = |v: f32| ((v + 1.0) * 0.5 * self.side as f32 - 0.5).clamp(0.0, last);
        let (x, y) = (place(p[0]), place(p[1]));
        let (i, j) = (x as usize, y as usize);
        let (fx, fy) = (x - i as f32, y - j as f32);
        let mut out = Texel::default();
        for (di, dj) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let weight = if di == 1 { fx } else { 1.0 - fx } * if dj == 1 { fy } else { 1.0 - fy };
            let (i, j) = ((i + di).min(self.side - 1), (j + dj).min(self.side - 1));
            let texel = &self.texels[j * self.side + i];
            for c in 0..3 {
                out.rgb[c] += weight * texel.rgb[c];
            }
            out.alpha += weight * texel.alpha;
            out.level += weight * texel.level;
            out.distance += weight * texel.distance;
            out.lean[0] += weight * texel.lean[0];
            out.lean[1] += weight * texel.lean[1];
        }
        out
    }

    /// Lays the artwork over the colour so far; without a `surface`, in its own colours.
    pub(super) fn paint(
        &self,
        color: &mut Rgb,
        (p, q): ([f32; 2], [f32; 2]),
        frame: &Frame,
        surface: Option<&Surface>,
    ) {
        if !self.whole && (p[0].abs() > 1.0 || p[1].abs() > 1.0) {
            return;
        }
        let texel = self.at(p);
        let (painted, alpha) = match surface {
            None => (texel.rgb, texel.alpha),
            Some(surface) => self.repaint(&texel, (p, q), frame, surface),
        };
        for c in 0..3 {
            color[c] = color[c] * (1.0 - alpha) + painted[c] * alpha;
        }
    }

    /// The point in another paint: the artwork's light and dark stay.
    fn repaint(
        &self,
        texel: &Texel,
        (p, q): ([f32; 2], [f32; 2]),
        frame: &Frame,
        surface: &Surface,
    ) -> (Rgb, f32) {
        let ragged = surface.ragged(q);
        let covered = match ragged == 0.0 {
            true => texel.alpha,
            false => (0.5 - (texel.distance + ragged) / frame.pixel).clamp(0.0, 1.0),
        };
        let side = if frame.pose.mirrored { -1.0 } else { 1.0 };
        let normal = normalize([side * texel.lean[0], texel.lean[1], 0.8]);
        let (paint, alpha) = surface.paint(Tint::Body, (p, q), normal, frame.pose.light);
        let shade = 0.50 + 0.85 * texel.level;
        let rim = 1.0 - 0.30 * (1.0 + texel.distance / 0.05).clamp(0.0, 1.0);
        let bright = 0.10 * (texel.level - 0.8).max(0.0) * 5.0;
        (paint.map(|c| c * shade * rim + bright), covered * alpha)
    }
}

/// For every cell how far the nearest one with this value is, in cells, and which it is: two
/// sweeps that pass on the nearest known so far.
fn nearest(cells: &[bool], side: usize, value: bool) -> (Vec<f32>, Vec<usize>) {
    let far = usize::MAX;
    let mut seed: Vec<usize> = (0..cells.len())
        .map(|i| if cells[i] == value { i } else { far })
        .collect();
    let off = |i: usize, s: usize| {
        if s == far {
            return f32::INFINITY;
        }
        let d = |f: &dyn Fn(usize) -> usize| f(i) as f32 - f(s) as f32;
        d(&|k| k % side).hypot(d(&|k| k / side))
    };
    let before = [(-1, 0), (-1, -1), (0, -1), (1, -1)];
    let after = [(1, 0), (1, 1), (0, 1), (-1, 1)];
    let back = (0..cells.len()).rev();
    let sweeps: [(Vec<usize>, _); 2] = [
        ((0..cells.len()).collect(), before),
        (back.collect(), after),
    ];
    for (order, neighbours) in sweeps.iter().chain(sweeps.iter()) {
        for &i in order {
            for (dx, dy) in neighbours {
                let (x, y) = ((i % side) as i32 + dx, (i / side) as i32 + dy);
                if x < 0 || y < 0 || x >= side as i32 || y >= side as i32 {
                    continue;
                }
                let other = seed[y as usize * side + x as usize];
                if off(i, other) < off(i, seed[i]) {
                    seed[i] = other;
                }
            }
        }
    }
    let distance = (0..cells.len()).map(|i| off(i, seed[i]).min(side as f32));
    let known = seed
        .iter()
        .enumerate()
        .map(|(i, &s)| if s == far { i } else { s });
    (distance.collect(), known.collect())
}

/// Each value the mean of its 3 by 3 neighbours.
fn blurred(values: &[f32], side: usize) -> Vec<f32> {
    let mean = |i: usize| {
        let (x, y) = (i % side, i / side);
        let near = |v: usize| v.saturating_sub(1)..(v + 2).min(side);
        let all = near(y).flat_map(|y| near(x).map(move |x| y * side + x));
        let (sum, n) = all.fold((0.0, 0.0), |(s, n), k| (s + values[k], n + 1.0));
        sum / n
    };
    (0..values.len()).map(mean).collect()
}

/// One line of the table of nouns.
struct Noun {
    code: &'static str,
    word: &'static str,
    held_out: bool,
}

fn nouns() -> impl Iterator<Item = Noun> {
    NOUNS.lines().filter_map(|line| {
        let (code, word) = line.split_once(' ')?;
        (code != "#").then(|| Noun {
            code,
            word: word.trim_start_matches('*'),
            held_out: word.starts_with('*'),
        })
    })
}

/// The emoji that are things, from the package's folder of pictures, in the table's order.
///
/// # Errors
/// If the folder does not hold the package's pictures, or one is damaged.
pub fn emoji(folder: &Path) -> Result<Vec<Arc<Artwork>>> {
    let mut all = Vec::new();
    for noun in nouns() {
        let named = |suffix: &str| folder.join(format!("{}{suffix}.webp", noun.code));
        let file = [named(""), named("-fe0f")].into_iter().find(|f| f.exists());
        let Some(file) = file else {
            return Err(Error::MissingModel {
                path: named(""),
                help: "expected the pictures of the npm package @lobehub/fluent-emoji-3d 1.1.0: \
                       `npm pack @lobehub/fluent-emoji-3d@1.1.0`, unpack it and name its folder \
                       package/assets"
                    .into(),
            });
        };
        let (picture, _) = picture::open(&file)?;
        let art = Artwork::cut_out(noun.word, noun.held_out, &picture)?;
        all.push(Arc::new(art));
    }
    Ok(all)
}

/// The cut-outs of a folder, by name: PNG files with alpha, each named after its noun. All of
/// them count as held out.
///
/// # Errors
/// If the folder cannot be read, or a picture is damaged or without anything opaque.
pub fn cut_outs(folder: &Path) -> Result<Vec<Arc<Artwork>>> {
    let one = |file: PathBuf| {
        let (picture, _) = picture::open(&file)?;
        Ok(Arc::new(Artwork::cut_out(&noun_of(&file), true, &picture)?))
    };
    files_of(folder, &["png"])?.into_iter().map(one).collect()
}

/// The files of a folder with one of these endings, by name.
fn files_of(folder: &Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|f| {
        endings
            .iter()
            .any(|e| f.extension().is_some_and(|x| x == *e))
    });
    files.sort();
    Ok(files)
}

fn noun_of(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    stem.replace('_', " ")
}

/// The photographs of a folder, by name; a file's name is its noun ("toy car.jpg"). Every
/// tenth, from the fifth on, is held out.
///
/// # Errors
/// If the folder cannot be read, or a picture is damaged.
pub fn photographs(folder: &Path) -> Result<Vec<Arc<Artwork>>> {
    let files = files_of(folder, &["jpg", "png"])?;
    let one = |(i, file): (usize, &PathBuf)| {
        let (picture, _) = picture::open(file)?;
        let art = Artwork::photograph(&noun_of(file), i % 10 == 4, &picture);
        Ok(Arc::new(art))
    };
    files.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::{Scene, Subject};
    use crate::vocabulary::{self, Category};
    use std::collections::BTreeMap;

    fn shipped() -> Vec<Arc<Artwork>> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/bundles/default/artwork");
        cut_outs(folder.as_ref()).expect("the shipped artwork")
    }

    #[test]
    fn a_tenth_of_the_nouns_is_held_out_and_none_of_them_only_in_part() {
        let mut held: BTreeMap<&str, bool> = BTreeMap::new();
        let mut pictures = (0, 0);
        for noun in nouns() {
            let before = held.insert(noun.word, noun.held_out);
            assert!(before.is_none_or(|b| b == noun.held_out), "{}", noun.word);
            pictures.0 += usize::from(noun.held_out);
            pictures.1 += 1;
        }
        let share = pictures.0 as f64 / pictures.1 as f64;
        assert!((0.06..0.12).contains(&share), "{share}");
        for art in shipped() {
            assert_eq!(held.get(art.noun.as_str()), Some(&true), "{}", art.noun);
        }
    }

    /// Where two pictures differ, as shares of the pixels inside and outside the outline.
    fn changed(art: &Arc<Artwork>, name: &str) -> (f32, f32) {
        let scene = Scene::plain(art.clone(), None, 4);
        let edit = vocabulary::find(name).expect("in the vocabulary");
        let (before, after) = (scene.render(96), scene.clone().with(&[edit]).render(96));
        let frame = Frame::new(&scene.pose, 96);
        let mut counts = [[0.0f32; 2]; 2];
        for i in 0..96 * 96 {
            let (x, y) = frame.pixel(i, 96);
            // The middle and a pixel around it, for the renderer smooths edges.
            let covered = |dx: i32, dy: i32| {
                let p = frame.to_object(x + dx as f32 / 96.0, y + dy as f32 / 96.0);
                let inside = p.iter().all(|v| v.abs() < 1.0);
                if inside { art.at(p).alpha } else { 0.0 }
            };
            let around = (-1..=1).flat_map(|dy| (-1..=1).map(move |dx| (dx, dy)));
            let (mut least, mut most) = (1.0f32, 0.0f32);
            for (dx, dy) in around {
                least = least.min(covered(dx, dy));
                most = most.max(covered(dx, dy));
            }
            // Partly covered pixels belong to both, however little: a cut-out's soft rim has them.
            if most > 0.0 && least < 1.0 {
                continue;
            }
            let alpha = least;
            let differs = before[3 * i..3 * i + 3] != after[3 * i..3 * i + 3];
            let count = &mut counts[usize::from(alpha < 0.5)];
            count[0] += f32::from(differs);
            count[1] += 1.0;
        }
        let share = |c: [f32; 2]| c[0] / c[1].max(1.0);
        (share(counts[0]), share(counts[1]))
    }

    #[test]
    fn an_edit_changes_what_it_names_and_nothing_else() {
        for art in shipped() {
            let (inside, outside) = changed(&art, "polished gold");
            assert!(inside > 0.9 && outside == 0.0, "{art:?} {inside} {outside}");
            let (inside, outside) = changed(&art, "a pine forest");
            assert!(inside == 0.0 && outside > 0.9, "{art:?} {inside} {outside}");
            let (inside, outside) = changed(&art, "black and white");
            assert!(inside > 0.2 && outside > 0.9, "{art:?} {inside} {outside}");
        }
    }

    #[test]
    fn a_photograph_is_only_edited_as_a_whole() {
        let picture = Picture::filled(60, 40, [90, 140, 200]);
        let art = Arc::new(Artwork::photograph("wall", false, &picture));
        let mut random = simpatico_schema::random::Philox::new(1, 1);
        for seed in 0..40 {
            let scene = Scene::random(Subject::from(art.clone()), seed);
            let edit = scene.random_edit(2, &mut random);
            let fits = |c| {
                use Category::{Light, Overlay, Style, Tone};
                matches!(c, Overlay | Tone | Light | Style)
            };
            let both = edit.iter().chain(&scene.attributes);
            assert!(both.into_iter().all(|a| fits(a.category)));
        }
        let plain = Scene::plain(art, None, 1).render(32);
        assert!(plain.chunks(3).all(|p| p == [90, 140, 200]));
    }

    #[test]
    fn transparent_pictures_are_refused() {
        let mut picture = Picture::filled(20, 20, [0; 3]);
        picture.alpha = Some(vec![0; 400]);
        assert!(Artwork::cut_out("nothing", false, &picture).is_err());
    }
}
