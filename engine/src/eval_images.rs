//! How good edited pictures are: how much of the source is left, and how far apart the
//! pictures of different users are. Tables by method in the form of the paper's Tables 3, 4
//! and 9: one row a method (or a backend), means over its pictures.
//!
//! What each column says: `edges`, the F-measure of the Canny edges of source and edit within
//! two pixels; `dino`, the cosine of their DINOv2 vectors; `lpips`, their perceptual distance;
//! `psnr_outside`, in dB over the pixels a mask kept. Columns whose model is absent stay
//! empty. Not here: making the pictures; CLIP and HPSv2 scores, whose text towers no package
//! carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::canny::{canny, edge_agreement};
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
    /// The picture before.
    pub source: &'a Picture,
    /// The picture after, of the same size.
    pub edited: &'a Picture,
    /// Where it might change.
    pub mask: Option<&'a Mask>,
}

/// The models that judge; what is `None` leaves its column empty.
#[derive(Clone, Copy, Default)]
pub struct Judges<'a> {
    /// DINOv2.
    pub dino: Option<&'a Dino>,
    /// LPIPS.
    pub lpips: Option<&'a Lpips>,
}

/// The means of one method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// Pictures judged.
    pub pictures: usize,
    /// Edge agreement with the source, 0 to 1.
    pub edges: Option<f64>,
    /// DINOv2 similarity to the source, -1 to 1.
    pub dino: Option<f64>,
    /// LPIPS distance to the source, from 0.
    pub lpips: Option<f64>,
    /// PSNR outside the masks, in dB; 100 = bit-equal.
    pub psnr_outside: Option<f64>,
}

/// A table of methods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
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

/// Judges every picture and takes the means by method.
///
/// # Errors
/// [`Error::BadRequest`] where an edit has another size than its source.
pub fn table(title: &str, samples: &[Sample], judges: Judges) -> Result<Table> {
    let mut by_method: BTreeMap<&str, Vec<[Option<f64>; 4]>> = BTreeMap::new();
    for sample in samples {
        by_method
            .entry(sample.method)
            .or_default()
            .push(judge(sample, judges)?);
    }
    let row = |(method, all): (&str, Vec<[Option<f64>; 4]>)| {
        let mean = |column: usize| {
            let values: Vec<f64> = all.iter().filter_map(|m| m[column]).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        Row {
            method: method.into(),
            pictures: all.len(),
            edges: mean(0),
            dino: mean(1),
            lpips: mean(2),
            psnr_outside: mean(3),
        }
    };
    Ok(Table {
        title: title.into(),
        rows: by_method.into_iter().map(row).collect(),
    })
}

fn judge(sample: &Sample, judges: Judges) -> Result<[Option<f64>; 4]> {
    let (source, edited) = (sample.source.on([255; 3]), sample.edited.on([255; 3]));
    same_size(&source, &edited)?;
    let edges = |p: &Picture| canny(p, 100, 200);
    let dino = |dino: &Dino| -> Result<f64> {
        let v = dino.embed(&[source.clone(), edited.clone()])?;
        Ok(cosine(&v[0], &v[1]))
    };
    let big_enough = source.width.min(source.height) >= 64;
    let lpips = judges.lpips.filter(|_| big_enough);
    let outside = sample.mask.map(|m| psnr_outside(&source, &edited, m));
    Ok([
        Some(edge_agreement(
            &edges(&source),
            &edges(&edited),
            EDGE_TOLERANCE,
        )),
        judges.dino.map(dino).transpose()?,
        lpips.map(|l| l.distance(&source, &edited)).transpose()?,
        outside.transpose()?.flatten(),
    ])
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
    /// Column names and a row of texts a method; "–" where nothing was measured.
    fn cells(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let number = |v: Option<f64>| v.map_or("–".to_string(), |v| format!("{v:.3}"));
        let cells = |r: &Row| {
            let values = [r.edges, r.dino, r.lpips, r.psnr_outside].map(number);
            let mut row = vec![r.method.clone(), r.pictures.to_string()];
            row.extend(values);
            row
        };
        let names = vec![
            "method",
            "pictures",
            "edges ↑",
            "dino ↑",
            "lpips ↓",
            "psnr outside ↑",
        ];
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

    #[test]
    fn tables_take_means_by_method_and_leave_absent_columns_empty() {
        let (source, flat) = (stripes(64, 0), Picture::filled(64, 32, [128; 3]));
        let sample = |method, edited| Sample {
            method,
            source: &source,
            edited,
            mask: None,
        };
        let samples = [
            sample("a<b", &source),
            sample("a<b", &flat),
            sample("c", &flat),
        ];
        let table = table("Table 3", &samples, Judges::default()).unwrap();
        assert_eq!(table.rows[0].edges, Some(0.5));
        assert_eq!(table.rows[1].edges, Some(0.0));
        assert_eq!(table.rows[0].dino, None);
        assert!(table.to_text().contains("–"));
        assert!(
            table
                .to_html()
                .contains("<td>a&lt;b</td><td>2</td><td>0.500</td>")
        );
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
