//! What several examples need: users of made-up taste, and a folder's pictures.

use simpatico_engine::vocabulary;
use simpatico_schema::{Event, Polarity};
use std::path::{Path, PathBuf};

/// The names of what the renderer can draw.
pub fn drawn() -> Vec<&'static str> {
    let all = vocabulary::all().iter().filter(|a| a.look.is_some());
    all.map(|a| a.name).collect()
}

/// Five likes each of the users "user 0", "user 1", …
pub fn likes(count: usize) -> Vec<Event> {
    let names = drawn();
    let like = |user: usize, i: usize| {
        let name = names[(user * 37 + i * 11) % names.len()];
        Event::new(&format!("user {user}"), name, Polarity::Like)
    };
    (0..count)
        .flat_map(|user| (0..5).map(move |i| (user, i)))
        .map(|(user, i)| like(user, i))
        .collect()
}

/// The PNG files of a folder, by name.
pub fn pngs(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "png"))
        .collect();
    files.sort();
    match files.is_empty() {
        true => Err(std::io::Error::other(format!(
            "no PNG in {}",
            folder.display()
        ))),
        false => Ok(files),
    }
}
