//! Tables of rows in files: JSON lines (plain or gzip) and Parquet, by the file's ending.
//!
//! A row is anything that serde knows as an object. In Parquet a field becomes a column of
//! strings, booleans, whole numbers, numbers or lists of strings, whichever all its values are;
//! what is more nested is a column of JSON text (marked as such), so that reading gives back what
//! was written. Files of others are read with their own nesting. Compressed by Snappy when
//! written; Snappy, gzip and none are read.
//!
//! Not here: Arrow, streaming (a table is held in memory), what the rows mean.

use crate::error::{Error, Result};
use crate::params::write_whole;
use flate2::{Compression, write::GzEncoder};
use parquet::basic::{Compression as Codec, ConvertedType};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::Type;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use simpatico_schema::formats::{Line, Lines};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

type Object = Map<String, Value>;

/// Whether a file's name says Parquet.
pub fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "parquet")
}

/// Writes rows, as the file's name says: `.parquet`, `.gz` for gzip JSON lines, else plain ones.
pub fn write_rows<T: Serialize>(path: &Path, rows: &[T]) -> Result<()> {
    if is_parquet(path) {
        let objects = rows.iter().map(|row| object(path, row));
        let bytes = to_parquet(&objects.collect::<Result<Vec<_>>>()?);
        return write_whole(path, &bytes.map_err(|e| bad(path, e.to_string()))?);
    }
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row).map_err(|e| bad(path, format!("JSON: {e}")))?;
        text.push(b'\n');
    }
    if path.extension().is_some_and(|e| e == "gz") {
        let mut gz = GzEncoder::new(Vec::new(), Compression::new(6));
        gz.write_all(&text).map_err(Error::io(path))?;
        text = gz.finish().map_err(Error::io(path))?;
    }
    write_whole(path, &text)
}

/// Reads rows: Parquet where the file's name says so, else JSON lines, plain or gzip. A bad line
/// or row is an error that names it.
pub fn read_rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    read_columns(path, &[])
}

/// The same, of a Parquet file only these columns (those of them that it has; none named: all).
/// Pictures in a column beside are not even decompressed.
pub fn read_columns<T: DeserializeOwned>(path: &Path, columns: &[&str]) -> Result<Vec<T>> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    if is_parquet(path) {
        // The library checks what it reads, but not everywhere: a damaged file must be an error.
        let read = || from_parquet(file, columns);
        let rows = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
            .map_err(|_| bad(path, "not a Parquet file, or a damaged one".into()))?
            .map_err(|e| bad(path, format!("Parquet: {e}")))?;
        let row = |(i, value)| {
            let row = serde_json::from_value(value);
            row.map_err(|e| bad(path, format!("row {}: {e}", i + 1)))
        };
        return rows.into_iter().enumerate().map(row).collect();
    }
    let mut lines = Lines::new(file).map_err(Error::io(path))?;
    let mut rows = Vec::new();
    while let Some((number, line)) = lines.next_line().map_err(Error::io(path))? {
        let bad = |reason: String| Error::bad_model(format!("{}:{number}", path.display()), reason);
        match line {
            Line::Text(text) => {
                rows.push(serde_json::from_slice(text).map_err(|e| bad(format!("JSON: {e}")))?)
            }
            Line::TooLong(_) => return Err(bad("the line is too long".into())),
        }
    }
    Ok(rows)
}

fn bad(path: &Path, reason: String) -> Error {
    Error::bad_model(path.display().to_string(), reason)
}

fn object<T: Serialize>(path: &Path, row: &T) -> Result<Object> {
    match serde_json::to_value(row) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(bad(path, "a row of a table is an object".into())),
        Err(e) => Err(bad(path, format!("JSON: {e}"))),
    }
}

// ------------------------------------------------------------------------------- writing

/// What all values of a column are, null aside.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    Whole,
    Number,
    Truth,
    Texts,
    Json,
}

impl Kind {
    fn of(value: &Value) -> Option<Self> {
        Some(match value {
            Value::Null => return None,
            Value::String(_) => Self::Text,
            Value::Bool(_) => Self::Truth,
            Value::Number(n) if n.is_i64() => Self::Whole,
            Value::Number(n) if n.is_f64() => Self::Number,
            Value::Array(all) if all.iter().all(Value::is_string) => Self::Texts,
            _ => Self::Json,
        })
    }

    fn with(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::Whole, Self::Number) | (Self::Number, Self::Whole) => Self::Number,
            _ => Self::Json,
        }
    }

    fn declared(self, name: &str) -> String {
        match self {
            Self::Text => format!("optional binary {name} (UTF8);"),
            Self::Whole => format!("optional int64 {name};"),
            Self::Number => format!("optional double {name};"),
            Self::Truth => format!("optional boolean {name};"),
            Self::Texts => format!(
                "optional group {name} (LIST) {{ repeated group list {{ required binary element (UTF8); }} }}"
            ),
            Self::Json => format!("optional binary {name} (JSON);"),
        }
    }
}

/// Rows in a group: what a reader holds decompressed at a time.
const GROUP: usize = 65_536;

fn to_parquet(rows: &[Object]) -> parquet::errors::Result<Vec<u8>> {
    let mut columns: Vec<(String, Option<Kind>)> = Vec::new();
    for (name, value) in rows.iter().flatten() {
        let kind = Kind::of(value);
        match columns.iter_mut().find(|c| c.0 == *name) {
            Some(column) => {
                column.1 = match (column.1, kind) {
                    (Some(a), Some(b)) => Some(a.with(b)),
                    (a, b) => a.or(b),
                }
            }
            None => columns.push((name.clone(), kind)),
        }
    }
    let columns: Vec<(String, Kind)> = columns
        .into_iter()
        .map(|(name, kind)| (name, kind.unwrap_or(Kind::Json)))
        .collect();
    let fields: Vec<String> = columns.iter().map(|(n, k)| k.declared(n)).collect();
    let schema = parse_message_type(&format!("message rows {{ {} }}", fields.join(" ")))?;
    let properties = WriterProperties::builder()
        .set_compression(Codec::SNAPPY)
        .build();
    let mut out = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut out, Arc::new(schema), Arc::new(properties))?;
    for rows in rows.chunks(GROUP) {
        let mut group = writer.next_row_group()?;
        for (name, kind) in &columns {
            let values: Vec<&Value> = rows
                .iter()
                .map(|r| r.get(name).unwrap_or(&Value::Null))
                .collect();
            write_column(&mut group, *kind, &values)?;
        }
        group.close()?;
    }
    writer.close()?;
    Ok(out)
}

fn write_column<W: Write + Send>(
    group: &mut SerializedRowGroupWriter<'_, W>,
    kind: Kind,
    values: &[&Value],
) -> parquet::errors::Result<()> {
    let Some(mut column) = group.next_column()? else {
        return Ok(());
    };
    // 1: there; 0: null.
    let there: Vec<i16> = values.iter().map(|v| i16::from(!v.is_null())).collect();
    let some = || values.iter().filter(|v| !v.is_null());
    match column.untyped() {
        ColumnWriter::BoolColumnWriter(to) => {
            let all: Vec<bool> = some().filter_map(|v| v.as_bool()).collect();
            to.write_batch(&all, Some(&there), None)?;
        }
        ColumnWriter::Int64ColumnWriter(to) => {
            let all: Vec<i64> = some().filter_map(|v| v.as_i64()).collect();
            to.write_batch(&all, Some(&there), None)?;
        }
        ColumnWriter::DoubleColumnWriter(to) => {
            let all: Vec<f64> = some().filter_map(|v| v.as_f64()).collect();
            to.write_batch(&all, Some(&there), None)?;
        }
        ColumnWriter::ByteArrayColumnWriter(to) if kind == Kind::Texts => {
            // Defined: 2 an element, 1 an empty list, 0 none; repeated: 0 the first, 1 another.
            let (mut all, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
            for value in values {
                let list = value.as_array();
                for (i, text) in list.into_iter().flatten().enumerate() {
                    all.push(ByteArray::from(text.as_str().unwrap_or_default()));
                    defined.push(2);
                    repeated.push(i16::from(i > 0));
                }
                if list.is_none_or(Vec::is_empty) {
                    defined.push(i16::from(list.is_some()));
                    repeated.push(0);
                }
            }
            to.write_batch(&all, Some(&defined), Some(&repeated))?;
        }
        ColumnWriter::ByteArrayColumnWriter(to) => {
            let text = |v: &&&Value| match v.as_str() {
                Some(text) if kind == Kind::Text => ByteArray::from(text),
                _ => ByteArray::from(v.to_string().as_str()),
            };
            let all: Vec<ByteArray> = some().map(|v| text(&v)).collect();
            to.write_batch(&all, Some(&there), None)?;
        }
        _ => unreachable!("`declared` makes columns of no other type"),
    }
    column.close()
}

// ------------------------------------------------------------------------------- reading

fn from_parquet(file: std::fs::File, columns: &[&str]) -> parquet::errors::Result<Vec<Value>> {
    let reader = SerializedFileReader::new(file)?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted: Vec<Arc<Type>> = schema
        .get_fields()
        .iter()
        .filter(|f| columns.is_empty() || columns.contains(&f.name()))
        .cloned()
        .collect();
    let json: Vec<String> = wanted
        .iter()
        .filter(|f| f.get_basic_info().converted_type() == ConvertedType::JSON)
        .map(|f| f.name().to_string())
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let projection = Type::group_type_builder(schema.name())
        .with_fields(wanted)
        .build()?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(Some(projection))? {
        let mut value = row?.to_json_value();
        for name in &json {
            if let Some(field) = value.get_mut(name)
                && let Some(text) = field.as_str()
                && let Ok(parsed) = serde_json::from_str(text)
            {
                *field = parsed;
            }
        }
        rows.push(value);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Row {
        name: String,
        likes: Vec<String>,
        at: Option<i64>,
        share: f32,
        sure: bool,
        shares: Vec<(String, f32)>,
    }

    fn rows() -> Vec<Row> {
        let row = |i: usize| Row {
            name: format!("ü{i}\n\"quoted\""),
            likes: (0..i % 3).map(|j| format!("like {j}")).collect(),
            at: i.is_multiple_of(2).then_some(i as i64 - 3),
            share: i as f32 / 7.0,
            sure: i.is_multiple_of(5),
            shares: vec![("gothic".into(), 0.1 * i as f32)],
        };
        (0..50).map(row).collect()
    }

    #[test]
    fn tables_read_back_as_written_in_every_format() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["t.jsonl", "t.jsonl.gz", "t.parquet"] {
            let path = folder.path().join(name);
            write_rows(&path, &rows()).unwrap();
            assert_eq!(read_rows::<Row>(&path).unwrap(), rows(), "{name}");
            write_rows::<Row>(&path, &[]).unwrap();
            assert_eq!(read_rows::<Row>(&path).unwrap(), [], "{name}");
        }
    }

    #[test]
    fn a_column_is_read_without_the_others() {
        #[derive(Deserialize)]
        struct Name {
            name: String,
            share: Option<f32>,
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        write_rows(&path, &rows()).unwrap();
        let names: Vec<Name> = read_columns(&path, &["name", "nowhere"]).unwrap();
        assert_eq!(names.len(), 50);
        assert!(names[3].name.starts_with("ü3") && names[3].share.is_none());
    }

    #[test]
    fn damaged_files_are_named_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        write_rows(&path, &rows()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 3, 8, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let said = read_rows::<Row>(&path).unwrap_err().to_string();
            assert!(said.contains("t.parquet"), "{said}");
        }
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            // Whatever comes of it, it comes as a value or an error.
            let _ = read_rows::<Row>(&path);
        }
    }
}
