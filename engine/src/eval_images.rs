//! How good edited pictures are: how much of the source is left, how well they do what was
//! asked, and how much they belong to their user. Tables by method in the form of the paper's
//! (arXiv 2511.05616) Tables 3, 4 and 9: a row a method or backend, mean ± standard deviation
//! over its pictures.
//!
//! [`judge`] gives every picture its scores, [`Table::of`] takes the means of some of the
//! columns, [`tables`] lays them out as the paper does. What each column says is with
//! [`Column`]. Columns whose model is absent stay empty. Not here: making the pictures.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::canny::{canny, edge_agreement};
use crate::clip::Clip;
use crate::dino::{Dino, cosine};
use crate::lpips::Lpips;
use crate::picture::{Mask, Picture};
use crate::{Error, Result};

/// Edges count as found within so many pixels.
const EDGE_TOLERANCE: usize = 2;
/// Above this PSNR pictures are equal for all purposes; equal ones count as it.
const PSNR_MAX: f64 = 100.0;

/// One edited picture to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The row it belongs to.
    pub method: &'a str,
    /// For whom it was made.
    pub user: Option<&'a str>,
    /// What was asked for.
    pub instruction: Option<&'a str>,
    /// The picture before.
    pub source: &'a Picture,
    /// The picture after, of the same size.
    pub edited: &'a Picture,
    /// Where it might change.
    pub mask: Option<&'a Mask>,
}

/// The models that judge; what is `None` leaves its columns empty.
#[derive(Clone, Copy, Default)]
pub struct Judges<'a> {
    /// DINOv2.
    pub dino: Option<&'a Dino>,
    /// LPIPS.
    pub lpips: Option<&'a Lpips>,
    /// CLIP.
    pub clip: Option<&'a Clip>,
    /// HPSv2: a CLIP with weights trained on people's choices.
    pub hps: Option<&'a Clip>,
}

/// What is measured of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Column {
    /// Cosine of the DINOv2 vectors of source and edit, -1 to 1.
    DinoRef,
    /// Cosine of their CLIP vectors (CLIP-I), -1 to 1.
    ClipRef,
    /// HPSv2: cosine of edit and instruction under its weights; 0.2 to 0.3 is usual.
    Hps,
    /// Cosine of the CLIP vectors of edit and instruction, -1 to 1.
    ClipT,
    /// F-measure of the Canny edges of source and edit within two pixels, 0 to 1.
    Edges,
    /// Perceptual distance of source and edit, from 0.
    Lpips,
    /// PSNR over the pixels that the mask kept, in dB; 100 = bit-equal.
    PsnrOutside,
    /// How much nearer (by DINOv2) the edit is to its user's other edits than to those that
    /// the same method made for other users, sources alike in both. The paper gives no
    /// formula for its column of this name; this is our reading.
    DinoPref,
}

impl Column {
    /// Its heading, with an arrow to where it is better.
    pub fn heading(self) -> &'static str {
        match self {
            Self::DinoRef => "DINO-Ref ↑",
            Self::ClipRef => "CLIP-Ref ↑",
            Self::Hps => "HPS ↑",
            Self::ClipT => "CLIP-T ↑",
            Self::Edges => "edges ↑",
            Self::Lpips => "LPIPS ↓",
            Self::PsnrOutside => "PSNR outside ↑",
            Self::DinoPref => "DINO-Pref ↑",
        }
    }
}

/// The scores of one picture.
pub type Scores = BTreeMap<Column, f64>;

/// A column's mean and standard deviation over a method's pictures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// The standard deviation over pictures; 0 for one.
    pub deviation: f64,
    /// Pictures that have this score.
    pub pictures: usize,
}

/// The means of one method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// Pictures judged.
    pub pictures: usize,
    /// What was measured.
    pub scores: BTreeMap<Column, Mean>,
}

/// A table of methods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// What is measured, from left to right.
    pub columns: Vec<Column>,
    /// One row a method, in order of the method's name.
    pub rows: Vec<Row>,
}

/// PSNR in dB over the pixels that a mask keeps (where it is 0); `None` where it keeps none.
/// Bit-equal pixels give 100.
///
/// # Errors
/// [`Error::BadRequest`] where the sizes differ.
pub fn psnr_outside(source: &Picture, edited: &Picture, mask: &Mask) -> Result<Option<f64>> {
    same_size(source, edited)?;
    mask.check(source.width, source.height)
        .map_err(|p| p.named("mask"))?;
    let pixels = source.rgb.chunks_exact(3).zip(edited.rgb.chunks_exact(3));
    let kept = pixels.zip(&mask.values).filter(|(_, share)| **share == 0);
    let (mut squares, mut count) = (0u64, 0u64);
    for ((a, b), _) in kept {
        squares += a
            .iter()
            .zip(b)
            .map(|(x, y)| u64::from(x.abs_diff(*y)).pow(2))
            .sum::<u64>();
        count += 3;
    }
    Ok(match (count, squares) {
        (0, _) => None,
        (_, 0) => Some(PSNR_MAX),
        _ => {
            let mean = squares as f64 / count as f64;
            Some((10.0 * (255.0f64.powi(2) / mean).log10()).min(PSNR_MAX))
        }
    })
}

fn same_size(a: &Picture, b: &Picture) -> Result<()> {
    if (a.width, a.height) == (b.width, b.height) {
        return Ok(());
    }
    Err(Error::BadRequest(format!(
        "expected two pictures of one size, got {} x {} and {} x {}",
        a.width, a.height, b.width, b.height
    )))
}

/// The scores of every picture, in order.
///
/// # Errors
/// [`Error::BadRequest`] where an edit has another size than its source.
pub fn judge(samples: &[Sample], judges: Judges) -> Result<Vec<Scores>> {
    let mut all = Vec::with_capacity(samples.len());
    let mut vectors = Vec::with_capacity(samples.len());
    for sample in samples {
        let (source, edited) = (sample.source.on([255; 3]), sample.edited.on([255; 3]));
        same_size(&source, &edited)?;
        let mut scores = Scores::new();
        let edges = |p: &Picture| canny(p, 100, 200);
        let kept = edge_agreement(&edges(&source), &edges(&edited), EDGE_TOLERANCE);
        scores.insert(Column::Edges, kept);
        let both = [source.clone(), edited.clone()];
        if let Some(dino) = judges.dino {
            let mut v = dino.embed(&both)?;
            scores.insert(Column::DinoRef, cosine(&v[0], &v[1]));
            vectors.push(v.swap_remove(1));
        }
        if let Some(clip) = judges.clip {
            let v = clip.embed_pictures(&both)?;
            scores.insert(Column::ClipRef, cosine(&v[0], &v[1]));
            if let Some(words) = sample.instruction {
                let words = clip.embed_texts(&[words])?;
                scores.insert(Column::ClipT, cosine(&words[0], &v[1]));
            }
        }
        if let Some((hps, words)) = judges.hps.zip(sample.instruction) {
            let picture = hps.embed_pictures(std::slice::from_ref(&edited))?;
            let words = hps.embed_texts(&[words])?;
            scores.insert(Column::Hps, cosine(&picture[0], &words[0]));
        }
        let big_enough = source.width.min(source.height) >= 64;
        if let Some(lpips) = judges.lpips.filter(|_| big_enough) {
            scores.insert(Column::Lpips, lpips.distance(&source, &edited)?);
        }
        if let Some(mask) = sample.mask
            && let Some(psnr) = psnr_outside(&source, &edited, mask)?
        {
            scores.insert(Column::PsnrOutside, psnr);
        }
        all.push(scores);
    }
    for (i, scores) in all.iter_mut().enumerate() {
        if let Some(preferred) = preference(samples, &vectors, i) {
            scores.insert(Column::DinoPref, preferred);
        }
    }
    Ok(all)
}

/// [`Column::DinoPref`] of picture `i`: over the other pictures of its method, the mean cosine
/// to those of its user minus that to those of others. Per source first, so that a source that
/// one user happened to edit more often weighs the same.
fn preference(samples: &[Sample], vectors: &[Vec<f32>], i: usize) -> Option<f64> {
    let (own, vector) = (samples[i].user?, vectors.get(i)?);
    let mut by_source: Vec<(&Picture, [Vec<f64>; 2])> = Vec::new();
    for (j, other) in samples.iter().enumerate() {
        let Some(user) = other
            .user
            .filter(|_| j != i && other.method == samples[i].method)
        else {
            continue;
        };
        let at = by_source
            .iter()
            .position(|(s, _)| std::ptr::eq(*s, other.source) || *s == other.source);
        let at = at.unwrap_or_else(|| {
            by_source.push((other.source, Default::default()));
            by_source.len() - 1
        });
        let whose = usize::from(user != own);
        by_source[at].1[whose].push(cosine(vector, &vectors[j]));
    }
    let differences = by_source
        .iter()
        .filter_map(|(_, [own, others])| Some(mean(own)?.mean - mean(others)?.mean));
    let differences: Vec<f64> = differences.collect();
    Some(mean(&differences)?.mean)
}

fn mean(values: &[f64]) -> Option<Mean> {
    let n = values.len() as f64;
    let mean = (!values.is_empty()).then(|| values.iter().sum::<f64>() / n)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some(Mean {
        mean,
        deviation: (squares / (n - 1.0).max(1.0)).sqrt(),
        pictures: values.len(),
    })
}

/// The tables of a report, as the paper lays them out: faithfulness and quality by method
/// (Table 3), what the way of editing keeps (Table 4), and how much edits belong to their
/// users (Table 9). Columns that nobody judged are left out, and tables without any.
pub fn tables(samples: &[Sample], scores: &[Scores]) -> Vec<Table> {
    use Column::{ClipRef, ClipT, DinoPref, DinoRef, Edges, Hps, Lpips, PsnrOutside};
    let measured = |c: &Column| scores.iter().any(|s| s.contains_key(c));
    [
        (
            "Faithful to source and instruction (as Table 3)",
            &[DinoRef, ClipRef, Hps, ClipT][..],
        ),
        (
            "What is kept of the source (as Table 4)",
            &[Edges, Lpips, DinoRef, PsnrOutside],
        ),
        (
            "Preference and faithfulness (as Table 9)",
            &[DinoPref, DinoRef, ClipRef, Hps, ClipT],
        ),
    ]
    .into_iter()
    .map(|(title, columns)| {
        let columns: Vec<Column> = columns.iter().copied().filter(measured).collect();
        Table::of(title, &columns, samples, scores)
    })
    .filter(|table| !table.columns.is_empty())
    .collect()
}

/// The mean distance of pictures in different groups over that within a group: with a group
/// for each user (its pictures from different seeds), how much more users differ than seeds
/// do. Distance is the mean absolute difference of pixels. `None` where there is nothing to
/// compare or seeds make no difference.
///
/// # Errors
/// [`Error::BadRequest`] where sizes differ.
pub fn spread_between_users(groups: &[Vec<Picture>]) -> Result<Option<f64>> {
    let (mut within, mut between) = (Vec::new(), Vec::new());
    let all: Vec<(usize, &Picture)> = groups
        .iter()
        .enumerate()
        .flat_map(|(user, pictures)| pictures.iter().map(move |p| (user, p)))
        .collect();
    for (i, (user, a)) in all.iter().enumerate() {
        for (other, b) in &all[i + 1..] {
            same_size(a, b)?;
            let sum: u64 = a
                .rgb
                .iter()
                .zip(&b.rgb)
                .map(|(x, y)| u64::from(x.abs_diff(*y)))
                .sum();
            let distance = sum as f64 / a.rgb.len() as f64;
            if user == other {
                &mut within
            } else {
                &mut between
            }
            .push(distance);
        }
    }
    let mean = |v: &[f64]| (!v.is_empty()).then(|| v.iter().sum::<f64>() / v.len() as f64);
    let (within, between) = (mean(&within), mean(&between));
    Ok(within
        .zip(between)
        .filter(|(w, _)| *w > 0.0)
        .map(|(w, b)| b / w))
}

impl Table {
    /// The means of some columns by method.
    pub fn of(title: &str, columns: &[Column], samples: &[Sample], scores: &[Scores]) -> Self {
        let mut by_method: BTreeMap<&str, Vec<&Scores>> = BTreeMap::new();
        for (sample, scores) in samples.iter().zip(scores) {
            by_method.entry(sample.method).or_default().push(scores);
        }
        let row = |(method, all): (&str, Vec<&Scores>)| {
            let of = |c: &Column| {
                let values: Vec<f64> = all.iter().filter_map(|s| s.get(c).copied()).collect();
                Some((*c, mean(&values)?))
            };
            Row {
                method: method.into(),
                pictures: all.len(),
                scores: columns.iter().filter_map(of).collect(),
            }
        };
        Self {
            title: title.into(),
            columns: columns.to_vec(),
            rows: by_method.into_iter().map(row).collect(),
        }
    }

    /// Column names and a row of texts a method; "–" where nothing was measured.
    fn cells(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let number = |m: Option<&Mean>| match m {
            Some(m) => format!("{:.3} ± {:.3}", m.mean, m.deviation),
            None => "–".to_string(),
        };
        let cells = |r: &Row| {
            let mut row = vec![r.method.clone(), r.pictures.to_string()];
            row.extend(self.columns.iter().map(|c| number(r.scores.get(c))));
            row
        };
        let mut names = vec!["method", "pictures"];
        names.extend(self.columns.iter().map(|c| c.heading()));
        (names, self.rows.iter().map(cells).collect())
    }

    /// The table as aligned text.
    pub fn to_text(&self) -> String {
        let (names, rows) = self.cells();
        let width = |i: usize| {
            let cells = rows.iter().map(|r| r[i].chars().count());
            cells.chain([names[i].chars().count()]).max().unwrap_or(0)
        };
        let line = |cells: Vec<&str>| {
            let cells = cells.iter().enumerate();
            let padded: Vec<_> = cells
                .map(|(i, c)| format!("{c:<w$}", w = width(i)))
                .collect();
            padded.join("  ").trim_end().to_string()
        };
        let mut lines = vec![self.title.clone(), line(names.clone())];
        lines.extend(
            rows.iter()
                .map(|r| line(r.iter().map(String::as_str).collect())),
        );
        lines.join("\n")
    }

    /// The table as a part of an HTML page.
    pub fn to_html(&self) -> String {
        let escape = |t: &str| {
            t.replace('&', "&amp;")
                .replace('<', "&lt;")
                .replace('>', "&gt;")
        };
        let (names, rows) = self.cells();
        let cells = |tag: &str, texts: &[String]| {
            let cell = |t: &String| format!("<{tag}>{}</{tag}>", escape(t));
            format!("<tr>{}</tr>", texts.iter().map(cell).collect::<String>())
        };
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        let body: String = rows.iter().map(|r| cells("td", r)).collect();
        let (title, head) = (escape(&self.title), cells("th", &names));
        format!("<table><caption>{title}</caption>{head}{body}</table>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stripes(width: u32, shift: u32) -> Picture {
        let pixel = |i: u32| {
            [if ((i % width + shift) / 8).is_multiple_of(2) {
                240
            } else {
                10
            }; 3]
        };
        Picture::from_rgb(width, 32, (0..width * 32).flat_map(pixel).collect())
    }

    fn sample<'a>(method: &'a str, source: &'a Picture, edited: &'a Picture) -> Sample<'a> {
        Sample {
            method,
            user: None,
            instruction: None,
            source,
            edited,
            mask: None,
        }
    }

    #[test]
    fn tables_take_means_by_method_and_leave_out_what_nobody_judged() {
        let (source, flat) = (stripes(64, 0), Picture::filled(64, 32, [128; 3]));
        let samples = [
            sample("a<b", &source, &source),
            sample("a<b", &source, &flat),
            sample("c", &source, &flat),
        ];
        let scores = judge(&samples, Judges::default()).unwrap();
        let tables = tables(&samples, &scores);
        assert_eq!(tables.len(), 1, "no model, so only what needs none");
        let table = &tables[0];
        assert_eq!(table.columns, [Column::Edges]);
        let edges = table.rows[0].scores[&Column::Edges];
        assert_eq!((edges.mean, edges.pictures), (0.5, 2));
        assert!((edges.deviation - 0.5f64.sqrt()).abs() < 1e-9);
        assert_eq!(table.rows[1].scores[&Column::Edges].mean, 0.0);
        let html = table.to_html();
        assert!(
            html.contains("<td>a&lt;b</td><td>2</td><td>0.500 ± 0.707</td>"),
            "{html}"
        );
        let empty = Table::of("t", &[Column::Hps], &samples, &scores);
        assert!(empty.to_text().contains("–"));
    }

    #[test]
    fn pictures_near_their_own_users_and_far_from_others_are_preferred() {
        let pictures: Vec<Picture> = (0..2).map(|i| Picture::filled(8, 8, [i; 3])).collect();
        // Two users, two sources: everybody's edits point one way, whatever the source.
        let (mut samples, mut vectors) = (Vec::new(), Vec::new());
        for (user, vector) in [("ada", [1f32, 0.0]), ("bob", [0.6, 0.8])] {
            for source in &pictures {
                samples.push(Sample {
                    user: Some(user),
                    ..sample("m", source, source)
                });
                vectors.push(vector.to_vec());
            }
        }
        for i in 0..4 {
            // To the user's edit of the other source 1, to others' edit of it 0.6.
            let preferred = preference(&samples, &vectors, i).unwrap();
            assert!((preferred - 0.4).abs() < 1e-6, "{preferred}");
        }
        assert_eq!(preference(&samples[..2], &vectors, 0), None, "nobody else");
    }

    #[test]
    fn psnr_counts_only_what_the_mask_keeps() {
        let (a, b) = (
            Picture::filled(4, 1, [10; 3]),
            Picture::filled(4, 1, [20; 3]),
        );
        let mask = |values: [u8; 4]| Mask {
            width: 4,
            height: 1,
            values: values.to_vec(),
        };
        let psnr = psnr_outside(&a, &b, &mask([0, 255, 255, 255]))
            .unwrap()
            .unwrap();
        assert!((psnr - 28.13).abs() < 0.01, "{psnr}");
        assert_eq!(psnr_outside(&a, &a, &mask([0; 4])).unwrap(), Some(100.0));
        assert_eq!(psnr_outside(&a, &b, &mask([255; 4])).unwrap(), None);
    }

    #[test]
    fn users_that_differ_more_than_seeds_have_a_spread_above_one() {
        let flat = |v| Picture::filled(2, 2, [v; 3]);
        let groups = [vec![flat(10), flat(14)], vec![flat(100), flat(104)]];
        let spread = spread_between_users(&groups).unwrap().unwrap();
        assert!((spread - 90.0 / 4.0).abs() < 1e-9, "{spread}");
        assert_eq!(spread_between_users(&[vec![flat(1)]]).unwrap(), None);
    }
}
