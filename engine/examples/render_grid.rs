//! Paints a grid of the renderer's pictures into a PNG:
//! `render_grid OUT.png [objects|attributes|pairs|emoji ASSETS|cut ASSETS|photos FOLDER]`.

use simpatico_engine::render::{Color, Object, Scene, Subject, artwork};
use simpatico_engine::train_flux::pairs::pair;
use simpatico_engine::vocabulary;

/// Forty pairs, before and after in turn, as training sees them.
fn pairs<S: Clone + Into<Subject>>(subjects: &[S]) -> Vec<Scene> {
    let made = (0..40).map(|i| pair(subjects, 2, 5, i));
    made.flat_map(|p| {
        println!("{} | {}", p.source.caption(), p.text);
        [p.source, p.target]
    })
    .collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let out = arguments
        .next()
        .ok_or("render_grid OUT.png [objects|attributes|pairs]")?;
    let scenes: Vec<Scene> = match arguments.next().as_deref() {
        Some("attributes") => vocabulary::all()
            .iter()
            .filter(|a| a.look.is_some())
            .enumerate()
            .map(|(i, a)| {
                Scene::plain(
                    Object::ALL[i % Object::ALL.len()],
                    Color::Blue,
                    5 + i as u64,
                )
                .with(&[a])
            })
            .collect(),
        Some("pairs") => pairs(Object::ALL),
        Some("emoji") => {
            let folder = arguments.next().ok_or("emoji ASSETS")?;
            pairs(&artwork::emoji(folder.as_ref())?)
        }
        Some("photos") => {
            let folder = arguments.next().ok_or("photos FOLDER")?;
            pairs(&artwork::photographs(folder.as_ref())?)
        }
        // Every emoji, as it is and in one paint.
        Some("cut") => {
            let folder = arguments.next().ok_or("cut ASSETS")?;
            let all = artwork::emoji(folder.as_ref())?;
            let plain = |art, color| Scene::plain(Subject::Artwork(art), color, 3);
            all.into_iter()
                .flat_map(|a| [plain(a.clone(), None), plain(a, Some(Color::Teal))])
                .collect()
        }
        _ => Object::ALL
            .iter()
            .flat_map(|o| {
                (0..2).map(|k| {
                    Scene::plain(
                        *o,
                        Color::ALL[(*o as usize * 5 + k) % 12],
                        k as u64 + 10 * *o as u64,
                    )
                })
            })
            .collect(),
    };
    let (size, across) = (128usize, 16usize);
    let down = scenes.len().div_ceil(across);
    let mut sheet = image::RgbImage::new((across * size) as u32, (down * size) as u32);
    let start = std::time::Instant::now();
    for (k, scene) in scenes.iter().enumerate() {
        let bytes = scene.render(size);
        let picture = image::RgbImage::from_raw(size as u32, size as u32, bytes).ok_or("size")?;
        image::imageops::replace(
            &mut sheet,
            &picture,
            ((k % across) * size) as i64,
            ((k / across) * size) as i64,
        );
    }
    println!(
        "{:.1} ms a picture",
        start.elapsed().as_secs_f64() * 1000.0 / scenes.len() as f64
    );
    sheet.save(out)?;
    Ok(())
}
