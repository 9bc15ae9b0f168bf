//! What goes to stdout (answers) and to stderr (progress, notes, warnings).

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt;
use std::io::{self, IsTerminal, Write};

/// Where answers and notes go.
pub struct Output {
    json: bool,
    quiet: bool,
    answers: bool,
}

/// A request that makes no sense as it stands: exit status 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

impl Output {
    /// Answers are JSON where `--json` says so and wherever stdout is no terminal, so that a
    /// pipe gets the documented shapes with or without the flag.
    pub fn new(json: bool, quiet: bool) -> Self {
        Self {
            json: json || !io::stdout().is_terminal(),
            quiet,
            answers: true,
        }
    }

    /// Prints an answer: one JSON object on a line, or words for a person.
    pub fn answer<T: Serialize>(
        &self,
        value: &T,
        words: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        if !self.answers {
            return Ok(());
        }
        let mut text = if self.json {
            serde_json::to_string(value)?
        } else {
            words()
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// The same without answers: for a step that serves another command.
    pub fn without_answers(&self) -> Self {
        Self {
            json: self.json,
            quiet: self.quiet,
            answers: false,
        }
    }

    /// Says something on stderr unless told to be quiet.
    pub fn note(&self, text: impl fmt::Display) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// A bar on a terminal, nothing elsewhere. `unit` is "bytes", or what is counted.
    pub fn bar(&self, total: u64, unit: &str) -> ProgressBar {
        if self.quiet || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(total);
        let template = if unit == "bytes" {
            "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left {msg}".to_string()
        } else {
            format!("{{wide_bar}} {{human_pos}}/{{human_len}} {unit} {{eta}} left {{msg}}")
        };
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        bar
    }
}

/// An error and its causes, each said once: many an error says its cause itself.
pub fn in_words(error: &anyhow::Error) -> String {
    let mut words = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if words.is_empty() {
            words = cause;
        } else if !words.ends_with(&cause) {
            words += ": ";
            words += &cause;
        }
    }
    words
}

/// Whether the reader of our output went away (`| head`): no failure of ours.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
