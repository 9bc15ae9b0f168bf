//! One file out of a zip or a gzipped tar, and nothing else.
//!
//! Nothing is unpacked by the archive's own names: the caller names the member and gives the
//! place to write to, so no entry can land anywhere else. Not here: zip64, encryption, any
//! compression besides deflate.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use flate2::read::{DeflateDecoder, GzDecoder};

/// The most entries a zip may have.
const MAX_ENTRIES: usize = 100_000;

/// Where a member lies within a zip.
#[derive(Clone, Debug)]
pub struct ZipEntry {
    /// Path within the archive.
    pub name: String,
    /// 0 stored, 8 deflated.
    method: u16,
    packed: u64,
    /// Bytes once unpacked, as the archive says.
    pub bytes: u64,
    header_at: u64,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("damaged archive: {what}"),
    )
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    let pair = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
    pair.map(u16::from_le_bytes)
        .ok_or_else(|| broken("it ends early"))
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    four.map(u32::from_le_bytes)
        .ok_or_else(|| broken("it ends early"))
}

/// The entries of a zip, from its central directory.
pub fn zip_entries(file: &mut File) -> io::Result<Vec<ZipEntry>> {
    let length = file.seek(SeekFrom::End(0))?;
    let tail_at = length.saturating_sub(65_557);
    let tail = read_at(file, tail_at, (length - tail_at) as usize)?;
    let end = tail
        .windows(4)
        .rposition(|w| w == b"PK\x05\x06")
        .ok_or_else(|| broken("no directory at its end"))?;
    let count = u16_at(&tail, end + 10)? as usize;
    let size = u64::from(u32_at(&tail, end + 12)?);
    let at = u64::from(u32_at(&tail, end + 16)?);
    if count > MAX_ENTRIES || at.checked_add(size).is_none_or(|to| to > length) {
        return Err(broken("its directory lies outside"));
    }
    let directory = read_at(file, at, size as usize)?;
    let mut entries = Vec::with_capacity(count);
    let mut at = 0;
    for _ in 0..count {
        if directory.get(at..at + 4) != Some(b"PK\x01\x02") {
            return Err(broken("its directory makes no sense"));
        }
        let name = u16_at(&directory, at + 28)? as usize;
        let extra = u16_at(&directory, at + 30)? as usize + u16_at(&directory, at + 32)? as usize;
        let bytes = directory.get(at + 46..at + 46 + name);
        let bytes = bytes.ok_or_else(|| broken("a name is cut"))?;
        entries.push(ZipEntry {
            name: String::from_utf8_lossy(bytes).into_owned(),
            method: u16_at(&directory, at + 10)?,
            packed: u64::from(u32_at(&directory, at + 20)?),
            bytes: u64::from(u32_at(&directory, at + 24)?),
            header_at: u64::from(u32_at(&directory, at + 42)?),
        });
        at += 46 + name + extra;
    }
    Ok(entries)
}

fn read_at(file: &mut File, at: u64, length: usize) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(at))?;
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Writes one entry's bytes to `out`, at most `most` of them.
pub fn unzip(file: &mut File, entry: &ZipEntry, most: u64, out: &mut dyn Write) -> io::Result<u64> {
    let header = read_at(file, entry.header_at, 30)?;
    if header.get(..4) != Some(b"PK\x03\x04") {
        return Err(broken("an entry has no header"));
    }
    let skip = u64::from(u16_at(&header, 26)?) + u64::from(u16_at(&header, 28)?);
    file.seek(SeekFrom::Start(entry.header_at + 30 + skip))?;
    let packed = BufReader::with_capacity(1 << 18, file).take(entry.packed);
    match entry.method {
        0 => copy_at_most(packed, most, out),
        8 => copy_at_most(DeflateDecoder::new(packed), most, out),
        other => Err(broken(&format!("compression method {other}"))),
    }
}

fn copy_at_most(from: impl Read, most: u64, out: &mut dyn Write) -> io::Result<u64> {
    let copied = io::copy(&mut from.take(most.saturating_add(1)), out)?;
    if copied > most {
        return Err(broken("a file is larger than expected"));
    }
    Ok(copied)
}

fn is_named(name: &str, member: &str) -> bool {
    name == member
        || name
            .strip_suffix(member)
            .is_some_and(|front| front.ends_with('/'))
}

/// Writes the member whose path is, or ends with, `member` to `out`: from a zip or wheel, or a
/// gzipped tar, told apart by their first bytes. At most `most` bytes.
pub fn extract(archive: &Path, member: &str, most: u64, out: &mut dyn Write) -> io::Result<u64> {
    let mut file = File::open(archive)?;
    let mut magic = [0; 2];
    file.read_exact(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("no {member} in the archive"),
        )
    };
    match &magic {
        b"PK" => {
            let entries = zip_entries(&mut file)?;
            let entry = entries.iter().find(|e| is_named(&e.name, member));
            unzip(&mut file, entry.ok_or_else(missing)?, most, out)
        }
        [0x1f, 0x8b] => {
            untar(GzDecoder::new(BufReader::new(file)), member, most, out)?.ok_or_else(missing)
        }
        _ => Err(broken("expected a zip or a gzipped tar")),
    }
}

/// Walks a tar: 512-byte headers, each followed by its file, padded to 512.
fn untar(
    mut tar: impl Read,
    member: &str,
    most: u64,
    out: &mut dyn Write,
) -> io::Result<Option<u64>> {
    let mut header = [0; 512];
    for _ in 0..MAX_ENTRIES {
        if tar.read_exact(&mut header).is_err() || header[0] == 0 {
            return Ok(None);
        }
        let text = |from: usize, to: usize| {
            let field = &header[from..to];
            let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            String::from_utf8_lossy(&field[..end]).into_owned()
        };
        let size = u64::from_str_radix(text(124, 136).trim(), 8)
            .map_err(|_| broken("a size is not a number"))?;
        let name = match text(345, 500) {
            prefix if prefix.is_empty() || &header[257..262] != b"ustar" => text(0, 100),
            prefix => format!("{prefix}/{}", text(0, 100)),
        };
        if matches!(header[156], 0 | b'0') && is_named(&name, member) {
            return copy_at_most(tar.take(size), most, out).map(Some);
        }
        io::copy(
            &mut (&mut tar).take(size.div_ceil(512) * 512),
            &mut io::sink(),
        )?;
    }
    Err(broken("too many entries"))
}
