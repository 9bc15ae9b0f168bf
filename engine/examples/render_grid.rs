//! Paints a grid of the renderer's pictures into a PNG: `render_grid OUT.png [objects|attributes|pairs]`.

use simpatico_engine::render::{Color, Object, Scene};
use simpatico_engine::vocabulary;
use simpatico_schema::random::Philox;

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
        Some("pairs") => (0..40)
            .flat_map(|i| {
                let scene = Scene::random(Object::ALL[i % Object::ALL.len()], i as u64);
                let mut random = Philox::new(i as u64, 1);
                let edit = scene.random_edit(2, &mut random);
                println!(
                    "{} | {}",
                    scene.caption(),
                    scene.instruction(&edit, &mut random)
                );
                [scene.clone(), scene.with(&edit)]
            })
            .collect(),
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
