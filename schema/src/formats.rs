//! Readers of the outer event formats: JSON lines and delimited text, plain or gzip.
//!
//! A reader works a line at a time: a line is read whole or named bad, and the next one
//! goes on. Lines longer than [`MAX_LINE_BYTES`] are bad without being held in memory.

use crate::event::{Event, EventError, Polarity, clip};
use std::io::{self, BufRead, BufReader, Read};

/// The longest line that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// Which format a file of events has.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// One JSON object a line.
    Jsonl,
    /// Delimited columns.
    Delimited(Delimited),
}

/// How to read delimited columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Delimited {
    /// What stands between columns: ",", "\t", "::" … One-byte delimiters honour quotes.
    pub delimiter: String,
    /// What each column holds.
    pub columns: Vec<Column>,
    /// Values at or above this are likes. `None`: the value must be a word, or 1, 0 or -1.
    pub like_at: Option<f64>,
    /// Values at or below this are dislikes; between the two thresholds lies `pass`.
    pub dislike_at: Option<f64>,
    /// The unit of the time column.
    pub time_unit: TimeUnit,
}

impl Default for Delimited {
    fn default() -> Self {
        Self {
            delimiter: ",".into(),
            columns: vec![Column::User, Column::Attribute, Column::Value, Column::At],
            like_at: None,
            dislike_at: None,
            time_unit: TimeUnit::Milliseconds,
        }
    }
}

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    /// The user's name.
    User,
    /// The attribute's name.
    Attribute,
    /// A polarity word or a number.
    Value,
    /// The time, in [`TimeUnit`]s since 1970.
    At,
    /// The event id.
    Id,
    /// Nothing of interest.
    Skip,
}

impl std::str::FromStr for Column {
    type Err = EventError;
    fn from_str(word: &str) -> Result<Self, EventError> {
        Ok(match word.trim() {
            "user" => Self::User,
            "attribute" => Self::Attribute,
            "value" | "polarity" => Self::Value,
            "at" => Self::At,
            "id" => Self::Id,
            "-" | "_" | "skip" => Self::Skip,
            other => {
                return Err(syntax(format!(
                    "column: expected user, attribute, value, at, id or skip, got {:?}",
                    clip(other)
                )));
            }
        })
    }
}

/// The unit of a time column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeUnit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    #[default]
    Milliseconds,
}

fn syntax(reason: String) -> EventError {
    EventError::Syntax { reason }
}

/// Reads one line of JSON. Unknown fields are errors, and so are names the store refuses.
pub fn read_jsonl_event(line: &[u8]) -> Result<Event, EventError> {
    let event: Event = serde_json::from_slice(line).map_err(|e| syntax(format!("JSON: {e}")))?;
    event.check_names()?;
    Ok(event)
}

/// Reads one line of delimited columns.
pub fn read_delimited_event(line: &[u8], format: &Delimited) -> Result<Event, EventError> {
    let line = std::str::from_utf8(line).map_err(|e| {
        syntax(format!(
            "expected UTF-8, got other bytes at {}",
            e.valid_up_to()
        ))
    })?;
    let quoted;
    let fields: Vec<&str> = if line.contains('"') && format.delimiter.len() == 1 {
        quoted = split_quoted(line, format.delimiter.as_bytes()[0])?;
        quoted.iter().map(String::as_str).collect()
    } else {
        line.split(format.delimiter.as_str()).collect()
    };
    let required = format
        .columns
        .iter()
        .rposition(|c| *c != Column::At && *c != Column::Id);
    if fields.len() > format.columns.len() || fields.len() <= required.unwrap_or(0) {
        return Err(syntax(format!(
            "expected {} columns, got {}",
            format.columns.len(),
            fields.len()
        )));
    }
    let mut event = Event::new("", "", Polarity::Pass);
    for (column, field) in format.columns.iter().zip(fields) {
        match column {
            Column::User => event.user = field.to_string(),
            Column::Attribute => event.attribute = field.to_string(),
            Column::Value => event.polarity = read_value(field, format)?,
            Column::At if field.trim().is_empty() => {}
            Column::At => event.at = Some(read_time(field, format.time_unit)?),
            Column::Id => event.id = Some(field.to_string()),
            Column::Skip => {}
        }
    }
    event.check_names()?;
    Ok(event)
}

fn split_quoted(line: &str, delimiter: u8) -> Result<Vec<String>, EventError> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        .from_reader(line.as_bytes());
    match reader.records().next() {
        Some(Ok(record)) => Ok(record.iter().map(str::to_string).collect()),
        Some(Err(e)) => Err(syntax(format!("CSV: {e}"))),
        None => Err(syntax("expected columns, got an empty line".into())),
    }
}

fn read_value(field: &str, format: &Delimited) -> Result<Polarity, EventError> {
    let word = field.trim();
    if let Ok(polarity) = word.parse() {
        return Ok(polarity);
    }
    let number: f64 = word
        .parse()
        .ok()
        .filter(|x: &f64| x.is_finite())
        .ok_or_else(|| {
            syntax(format!(
                "value: expected a polarity or a number, got {:?}",
                clip(word)
            ))
        })?;
    let (like_at, dislike_at) = match (format.like_at, format.dislike_at) {
        (None, None) if [1.0, 0.0, -1.0].contains(&number) => (1.0, -1.0),
        (None, None) => {
            return Err(syntax(format!(
                "value: expected like, dislike, pass, clear, 1, 0 or -1, got {:?}; give --like-at and \
                 --dislike-at to read ratings",
                clip(word)
            )));
        }
        (like, dislike) => (
            like.unwrap_or(f64::INFINITY),
            dislike.unwrap_or(f64::NEG_INFINITY),
        ),
    };
    Ok(if number >= like_at {
        Polarity::Like
    } else if number <= dislike_at {
        Polarity::Dislike
    } else {
        Polarity::Pass
    })
}

fn read_time(field: &str, unit: TimeUnit) -> Result<i64, EventError> {
    let bad = || {
        syntax(format!(
            "at: expected a whole number since 1970, got {:?}",
            clip(field)
        ))
    };
    let number: i64 = field.trim().parse().map_err(|_| bad())?;
    match unit {
        TimeUnit::Milliseconds => Ok(number),
        TimeUnit::Seconds => number.checked_mul(1000).ok_or_else(bad),
    }
}

/// The lines of a file, plain or gzip (told by the first two bytes), with their numbers.
pub struct Lines<R: Read> {
    input: BufReader<MaybeGzip<R>>,
    number: u64,
    line: Vec<u8>,
}

enum MaybeGzip<R: Read> {
    Plain(BufReader<R>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<R>>>),
}

impl<R: Read> Read for MaybeGzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(r) => r.read(buffer),
            Self::Gzip(r) => r.read(buffer),
        }
    }
}

/// One line, or what kept it from being read.
pub enum Line<'a> {
    /// The bytes without the newline.
    Text(&'a [u8]),
    /// A line of more than [`MAX_LINE_BYTES`]; its beginning.
    TooLong(&'a [u8]),
}

impl<R: Read> Lines<R> {
    /// Looks at the first bytes and starts reading.
    pub fn new(input: R) -> io::Result<Self> {
        let mut input = BufReader::with_capacity(1 << 18, input);
        let gzip = input.fill_buf()?.starts_with(&[0x1f, 0x8b]);
        let input = if gzip {
            MaybeGzip::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(input)))
        } else {
            MaybeGzip::Plain(input)
        };
        Ok(Self {
            input: BufReader::with_capacity(1 << 18, input),
            number: 0,
            line: Vec::new(),
        })
    }

    /// The next line that is not blank, with its number from 1; `None` at the end.
    pub fn next_line(&mut self) -> io::Result<Option<(u64, Line<'_>)>> {
        loop {
            let too_long = match self.read_line()? {
                None => return Ok(None),
                Some(too_long) => too_long,
            };
            self.number += 1;
            if too_long {
                return Ok(Some((self.number, Line::TooLong(&self.line[..256]))));
            }
            if self.number == 1 && self.line.starts_with(b"\xef\xbb\xbf") {
                self.line.drain(..3);
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some((self.number, Line::Text(self.line.trim_ascii_end()))));
            }
        }
    }

    /// Fills `self.line`; tells whether it was too long, or `None` at the end of the input.
    fn read_line(&mut self) -> io::Result<Option<bool>> {
        self.line.clear();
        let mut total = 0;
        loop {
            let available = match self.input.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if available.is_empty() {
                return Ok((total > 0).then_some(total > MAX_LINE_BYTES));
            }
            let end = memchr::memchr(b'\n', available);
            let taken = end.map_or(available.len(), |at| at + 1);
            let text = end.unwrap_or(available.len());
            let room = MAX_LINE_BYTES.saturating_sub(self.line.len());
            self.line.extend_from_slice(&available[..text.min(room)]);
            total += text;
            self.input.consume(taken);
            if end.is_some() {
                return Ok(Some(total > MAX_LINE_BYTES));
            }
        }
    }
}

/// Reads one line in the given format. `None` where the line is a header that names the
/// columns (only the first line of a delimited file can be one).
pub fn read_event(line: &[u8], number: u64, format: &Format) -> Result<Option<Event>, EventError> {
    match format {
        Format::Jsonl => read_jsonl_event(line).map(Some),
        Format::Delimited(delimited) if number == 1 && is_header(line, delimited) => Ok(None),
        Format::Delimited(delimited) => read_delimited_event(line, delimited).map(Some),
    }
}

/// Whether a line names the columns instead of filling them.
fn is_header(line: &[u8], format: &Delimited) -> bool {
    let Ok(line) = std::str::from_utf8(line) else {
        return false;
    };
    let names: Vec<Option<Column>> = line
        .split(format.delimiter.as_str())
        .map(|w| w.trim_matches('"').parse().ok())
        .collect();
    names
        .iter()
        .zip(&format.columns)
        .filter(|(a, b)| a.as_ref() == Some(*b))
        .count()
        == format.columns.len().min(names.len())
        && names.len() > 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ratings() -> Delimited {
        Delimited {
            delimiter: "::".into(),
            like_at: Some(7.0),
            dislike_at: Some(4.0),
            time_unit: TimeUnit::Seconds,
            ..Delimited::default()
        }
    }

    #[test]
    fn ratings_become_polarities_by_the_thresholds() {
        let polarity = |value: &str| {
            let line = format!("1::1074638::{value}::1365029107");
            read_delimited_event(line.as_bytes(), &ratings()).map(|e| e.polarity)
        };
        assert_eq!(polarity("7"), Ok(Polarity::Like));
        assert_eq!(polarity("6.5"), Ok(Polarity::Pass));
        assert_eq!(polarity("4"), Ok(Polarity::Dislike));
        assert!(polarity("NaN").is_err());
        let event = read_delimited_event(b"1::2::9::1365029107", &ratings()).unwrap();
        assert_eq!(event.at, Some(1_365_029_107_000));
        assert!(read_delimited_event(b"1::2", &ratings()).is_err());
        // Quotes are plain bytes where the delimiter is more than one.
        let quoted = read_delimited_event(b"1::the \"best\"::9", &ratings()).unwrap();
        assert_eq!(quoted.attribute, "the \"best\"");
        assert_eq!(
            read_delimited_event(b"1::2::9", &ratings()).unwrap().at,
            None
        );
    }

    #[test]
    fn one_threshold_leaves_the_other_side_open_and_none_wants_words() {
        let polarity = |value: &str, like_at, dislike_at| {
            let format = Delimited {
                like_at,
                dislike_at,
                ..Delimited::default()
            };
            let line = format!("u,a,{value}");
            read_delimited_event(line.as_bytes(), &format).map(|e| e.polarity)
        };
        assert_eq!(polarity("-9", Some(3.0), None), Ok(Polarity::Pass));
        assert_eq!(polarity("3", Some(3.0), None), Ok(Polarity::Like));
        assert_eq!(polarity("9", None, Some(2.0)), Ok(Polarity::Pass));
        assert_eq!(polarity("2", None, Some(2.0)), Ok(Polarity::Dislike));
        assert_eq!(polarity("1", None, None), Ok(Polarity::Like));
        assert_eq!(polarity("0", None, None), Ok(Polarity::Pass));
        assert_eq!(polarity("-1.0", None, None), Ok(Polarity::Dislike));
        assert_eq!(polarity(" clear ", None, None), Ok(Polarity::Clear));
        for bad in ["2", "inf", "", "x"] {
            assert!(polarity(bad, None, None).is_err(), "{bad:?}");
        }
        assert!(polarity("inf", Some(3.0), Some(2.0)).is_err());
    }

    #[test]
    fn times_are_whole_and_seconds_become_milliseconds() {
        assert_eq!(read_time(" -5 ", TimeUnit::Milliseconds), Ok(-5));
        assert_eq!(read_time("5", TimeUnit::Seconds), Ok(5_000));
        assert!(read_time("9223372036854775807", TimeUnit::Milliseconds).is_ok());
        assert!(read_time("9223372036854775807", TimeUnit::Seconds).is_err());
        assert!(read_time("1.5", TimeUnit::Seconds).is_err());
        let event = read_delimited_event(b"u,a,like,  ", &Delimited::default());
        assert_eq!(event.unwrap().at, None);
    }

    #[test]
    fn columns_are_named_counted_and_may_be_skipped() {
        let words = ["user", "attribute", "value", "polarity", " at ", "id"];
        let columns = words.map(|w| w.parse::<Column>());
        use Column::{At, Attribute, Id, Skip, User, Value};
        let expected = [User, Attribute, Value, Value, At, Id].map(Ok);
        assert_eq!(columns, expected);
        for word in ["-", "_", "skip"] {
            assert_eq!(word.parse(), Ok(Skip));
        }
        assert!("User".parse::<Column>().is_err());
        let format = Delimited {
            columns: vec![Skip, User, Value, Attribute, Id, At],
            ..Delimited::default()
        };
        let read = |line: &str| read_delimited_event(line.as_bytes(), &format);
        // Times and ids may be left out at the end, the rest may not.
        let event = read("7,ada,like,wood").unwrap();
        assert_eq!(
            (event.user.as_str(), event.attribute.as_str()),
            ("ada", "wood")
        );
        assert_eq!((event.id, event.at), (None, None));
        let event = read("7,ada,like,wood,x,5").unwrap();
        assert_eq!((event.id.as_deref(), event.at), (Some("x"), Some(5)));
        assert!(read("7,ada,like").is_err());
        assert!(read("7,ada,like,wood,x,5,").is_err());
        assert!(read("7,ada,like,\"wood").is_ok_and(|e| e.attribute == "wood"));
        assert!(read_delimited_event(b"\xff,a,like", &Delimited::default()).is_err());
    }

    #[test]
    fn only_a_first_line_that_names_the_columns_is_a_header() {
        let csv = Format::Delimited(Delimited::default());
        let skipped = |line: &str, number| read_event(line.as_bytes(), number, &csv) == Ok(None);
        assert!(skipped("user,attribute,value,at", 1));
        assert!(skipped("\"user\",\"attribute\",polarity", 1));
        assert!(!skipped("user,attribute,value,at", 2));
        assert!(!skipped("user,attribute,like", 1));
        assert!(!skipped("attribute,user,value", 1));
        assert!(!skipped("user", 1));
        assert!(read_event(b"\xff,a,like", 1, &csv).is_err());
        let json = read_event(
            br#"{"user":"u","attribute":"a","polarity":"like"}"#,
            1,
            &Format::Jsonl,
        );
        assert_eq!(json.unwrap().unwrap().user, "u");
    }

    #[test]
    fn the_longest_line_is_read_and_marks_and_blanks_are_passed_over() {
        let mut text = b"\xef\xbb\xbfone  \r\n  \n".to_vec();
        text.extend(vec![b'x'; MAX_LINE_BYTES]);
        text.extend(b"\n\xef\xbb\xbf\n");
        text.extend(vec![b'y'; 3 * MAX_LINE_BYTES]);
        let mut lines = Lines::new(&text[..]).unwrap();
        let mut next = || {
            let line = lines.next_line().unwrap()?;
            Some(match line {
                (number, Line::Text(text)) => (number, text.len(), text[0]),
                (number, Line::TooLong(text)) => (number + 100, text.len(), text[0]),
            })
        };
        assert_eq!(next(), Some((1, 3, b'o')));
        assert_eq!(next(), Some((3, MAX_LINE_BYTES, b'x')));
        // A byte order mark is one at the very beginning only.
        assert_eq!(next(), Some((4, 3, 0xef)));
        assert_eq!(next(), Some((105, 256, b'y')));
        assert_eq!(next(), None);
        let mut empty = Lines::new(&b""[..]).unwrap();
        assert!(empty.next_line().unwrap().is_none());
        let longest = vec![b'z'; MAX_LINE_BYTES];
        let mut without_end = Lines::new(&longest[..]).unwrap();
        let line = without_end.next_line().unwrap();
        assert!(matches!(line, Some((1, Line::Text(text))) if text == longest));
    }

    #[test]
    fn an_interrupted_read_goes_on_and_a_failed_one_is_told() {
        struct Parts(std::vec::IntoIter<io::Result<&'static str>>);
        impl Read for Parts {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let text = self.0.next().unwrap_or(Ok(""))?;
                buffer[..text.len()].copy_from_slice(text.as_bytes());
                Ok(text.len())
            }
        }
        let error = |kind: io::ErrorKind| Err(kind.into());
        let parts = vec![
            Ok("one\nt"),
            error(io::ErrorKind::Interrupted),
            Ok("wo\n"),
            error(io::ErrorKind::BrokenPipe),
        ];
        let mut lines = Lines::new(Parts(parts.into_iter())).unwrap();
        for (expected, text) in [(1, b"one"), (2, b"two")] {
            let line = lines.next_line().unwrap();
            assert!(
                matches!(line, Some((number, Line::Text(t))) if number == expected && t == text)
            );
        }
        let failed = lines.next_line().err().unwrap();
        assert_eq!(failed.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn quotes_hold_delimiters_and_headers_are_skipped() {
        let csv = Format::Delimited(Delimited::default());
        assert_eq!(read_event(b"user,attribute,value,at", 1, &csv), Ok(None));
        let event = read_event(b"ada,\"wood, rustic\",like,5", 2, &csv)
            .unwrap()
            .unwrap();
        assert_eq!(event.attribute, "wood, rustic");
        assert_eq!((event.polarity, event.at), (Polarity::Like, Some(5)));
    }

    #[test]
    fn gzip_and_plain_read_alike_and_long_lines_do_not_stop_the_rest() {
        let mut text = b"one\n\n".to_vec();
        text.extend(vec![b'x'; MAX_LINE_BYTES + 1]);
        text.extend(b"\ntwo");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&text).unwrap();
        for input in [text.clone(), gz.finish().unwrap()] {
            let mut lines = Lines::new(&input[..]).unwrap();
            assert!(matches!(
                lines.next_line().unwrap(),
                Some((1, Line::Text(b"one")))
            ));
            assert!(matches!(
                lines.next_line().unwrap(),
                Some((3, Line::TooLong(_)))
            ));
            assert!(matches!(
                lines.next_line().unwrap(),
                Some((4, Line::Text(b"two")))
            ));
            assert!(lines.next_line().unwrap().is_none());
        }
    }

    #[test]
    fn unknown_json_fields_and_bad_polarities_are_named() {
        let error = |line: &str| read_jsonl_event(line.as_bytes()).unwrap_err().to_string();
        assert!(error(r#"{"user":"a","attribute":"b","polarity":"love"}"#).contains("love"));
        assert!(error(r#"{"user":"a","attribute":"b"}"#).contains("polarity"));
        assert!(error(r#"{"user":"","attribute":"b","polarity":"like"}"#).contains("1 to 256"));
        assert!(
            error(r#"{"user":"a\u0000","attribute":"b","polarity":"like"}"#).contains("U+0000")
        );
    }
}
