//! Edit instructions of others, as data for supervised fine-tuning.
//!
//! Three forms of the InstructPix2Pix data set are read (arXiv 2211.09800): its prompt files
//! (JSON lines of `input`, `edit`, `output`), its picture folders (`prompt.json` in a folder for
//! each picture), and the tables it is passed around in (Parquet or JSON lines with
//! `original_prompt`, `edit_prompt`; picture columns are not read). Lists of instructions without
//! captions, such as I2EBench's (`instruction`), are read too.

use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::policy::{PromptText, answer_ids, prompt_ids};
use crate::table;
use crate::tokenizer::Tokenizer;
use crate::train_policy::SftGroup;
use serde::Deserialize;
use simpatico_schema::random::Philox;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An instruction, and what the picture shows where that is known.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Edit {
    /// What the picture shows.
    #[serde(alias = "input", alias = "original_prompt", default)]
    pub caption: Option<String>,
    /// What to do with it.
    #[serde(alias = "edit", alias = "edit_prompt")]
    pub instruction: String,
}

/// The columns that are read of a table.
const COLUMNS: [&str; 6] = [
    "caption",
    "input",
    "original_prompt",
    "instruction",
    "edit",
    "edit_prompt",
];

/// Reads a file, or a folder of files and of picture folders, in order of name.
pub fn read(path: &Path) -> Result<Vec<Edit>> {
    let mut edits = Vec::new();
    collect(path, &mut edits)?;
    match edits.is_empty() {
        true => Err(Error::bad_model(
            path.display().to_string(),
            "holds no edit instructions; expected .jsonl, .jsonl.gz or .parquet files, or \
             folders with a prompt.json",
        )),
        false => Ok(edits),
    }
}

fn collect(path: &Path, edits: &mut Vec<Edit>) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(Error::io(path))?;
        let mut inside: Vec<PathBuf> = entries
            .map(|e| e.map(|e| e.path()).map_err(Error::io(path)))
            .collect::<Result<_>>()?;
        inside.sort();
        let wanted = |p: &PathBuf| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            let table = [".jsonl", ".jsonl.gz", ".parquet"];
            // A link could lead round in circles.
            (p.is_dir() && !p.is_symlink())
                || name == "prompt.json"
                || table.iter().any(|end| name.ends_with(end))
        };
        return inside
            .iter()
            .filter(|p| wanted(p))
            .try_for_each(|p| collect(p, edits));
    }
    if name == "prompt.json" {
        let text = std::fs::read(path).map_err(Error::io(path))?;
        let bad = |e| Error::bad_model(path.display().to_string(), format!("JSON: {e}"));
        edits.push(serde_json::from_slice(&text).map_err(bad)?);
        return Ok(());
    }
    edits.extend(table::read_columns::<Edit>(path, &COLUMNS)?);
    Ok(())
}

/// Prompts with the instructions that go with their captions, at most six each; `n` of them,
/// drawn.
pub fn groups(
    edits: &[Edit],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    n: usize,
    seed: u64,
) -> Result<Vec<SftGroup>> {
    let mut by_caption: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for edit in edits {
        let instruction = edit.instruction.trim();
        let caption = edit.caption.as_deref().map_or("a picture", str::trim);
        if !instruction.is_empty() && !caption.is_empty() {
            by_caption.entry(caption).or_default().push(instruction);
        }
    }
    let mut sets: Vec<(&str, &[&str])> = by_caption
        .iter()
        .flat_map(|(caption, all)| all.chunks(6).map(|some| (*caption, some)))
        .collect();
    Philox::new(seed, 0x6564_6974).shuffle(&mut sets);
    sets.truncate(n);
    let group = |(caption, instructions): (&str, &[&str])| -> Result<SftGroup> {
        let text = PromptText {
            caption,
            ..PromptText::default()
        };
        let answers = instructions.iter().map(|i| answer_ids(tokenizer, i));
        Ok(SftGroup {
            prompt: prompt_ids(tokenizer, template, &text)?,
            completions: answers.collect::<Result<_>>()?,
        })
    };
    // A caption too long for a prompt is no reason to lose the rest.
    Ok(sets.into_iter().filter_map(|set| group(set).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_the_data_set_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put(
            "a.jsonl",
            "{\"input\": \"a cat\", \"edit\": \"make it a dog\", \"output\": \"a dog\"}\n",
        );
        put(
            "shard-00/0000001/prompt.json",
            r#"{"caption": "a hill", "edit": "add snow", "output": "a snowy hill", "url": ""}"#,
        );
        put("shard-00/0000001/seeds.json", "[1]");
        put(
            "z.jsonl",
            "{\"type\": \"BG\", \"instruction\": \"to snow\"}\n",
        );
        #[derive(serde::Serialize)]
        struct Row {
            original_prompt: &'static str,
            edit_prompt: &'static str,
            original_image: Vec<u8>,
        }
        let row = Row {
            original_prompt: "a boat",
            edit_prompt: "sink it",
            original_image: vec![1, 2, 3],
        };
        table::write_rows(&folder.path().join("b.parquet"), &[row]).unwrap();
        let found = read(folder.path()).unwrap();
        let edit = |caption: Option<&str>, instruction: &str| Edit {
            caption: caption.map(str::to_string),
            instruction: instruction.into(),
        };
        let want = [
            edit(Some("a cat"), "make it a dog"),
            edit(Some("a boat"), "sink it"),
            edit(Some("a hill"), "add snow"),
            edit(None, "to snow"),
        ];
        assert_eq!(found, want);
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        assert!(
            read(&empty)
                .unwrap_err()
                .to_string()
                .contains("prompt.json")
        );
        put("bad.jsonl", "{\"input\": 3}\n");
        assert!(
            read(folder.path())
                .unwrap_err()
                .to_string()
                .contains("bad.jsonl:1")
        );
    }
}
