//! Text inside PNG files: `iTXt` chunks in, `iTXt` and `tEXt` chunks out.
//!
//! Not here: `zTXt` and compressed `iTXt`; nothing of ours writes them, and what cannot be
//! inflated cannot be a bomb.

/// The keyword XMP packets go by (Adobe XMP specification part 3, PNG).
pub const XMP: &str = "XML:com.adobe.xmp";

const SIGNATURE: usize = 8;
const MAX_TEXT_BYTES: usize = 4 << 20;

/// The same PNG with each (keyword, text) as an uncompressed `iTXt` chunk behind the header.
/// `png` must be a PNG that an encoder made.
pub fn with_text(png: &[u8], text: &[(&str, &str)]) -> Vec<u8> {
    let behind_header = SIGNATURE + 12 + 13;
    let mut out = png[..behind_header].to_vec();
    for (keyword, text) in text {
        let mut data = keyword.as_bytes().to_vec();
        // end of keyword, not compressed, method 0, no language, no translated keyword
        data.extend([0, 0, 0, 0, 0]);
        data.extend(text.as_bytes());
        push_chunk(&mut out, b"iTXt", &data);
    }
    out.extend(&png[behind_header..]);
    out
}

fn push_chunk(out: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(data);
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(kind);
    out.extend(data);
    out.extend(crc.sum().to_be_bytes());
}

/// The text under a keyword, of the first chunk that has it whole; `None` where there is none
/// or the file is not a PNG. Reads until the file makes no sense and never beyond 4 MiB a text.
pub fn text_of(png: &[u8], keyword: &str) -> Option<String> {
    if super::Format::of(png) != Some(super::Format::Png) {
        return None;
    }
    let mut rest = &png[SIGNATURE..];
    while rest.len() >= 12 {
        let (length, body) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let (kind, body) = body.split_first_chunk::<4>()?;
        let data = body.get(..length)?;
        let (crc, after) = body[length..].split_first_chunk::<4>()?;
        if let Some(text) = text_in(kind, data, keyword) {
            let mut sum = flate2::Crc::new();
            sum.update(kind);
            sum.update(data);
            if sum.sum() == u32::from_be_bytes(*crc) {
                return Some(text);
            }
        }
        rest = after;
    }
    None
}

fn text_in(kind: &[u8; 4], data: &[u8], keyword: &str) -> Option<String> {
    let data = data.strip_prefix(keyword.as_bytes())?.strip_prefix(&[0])?;
    if data.len() > MAX_TEXT_BYTES {
        return None;
    }
    match kind {
        b"tEXt" => Some(data.iter().map(|b| char::from(*b)).collect()),
        b"iTXt" => {
            let data = data.strip_prefix(&[0, 0])?;
            let language_ends = data.iter().position(|b| *b == 0)?;
            let data = &data[language_ends + 1..];
            let translation_ends = data.iter().position(|b| *b == 0)?;
            String::from_utf8(data[translation_ends + 1..].to_vec()).ok()
        }
        _ => None,
    }
}
