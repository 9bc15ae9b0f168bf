//! Making checksums right again, so that a mutation gets behind them. Written from FORMAT.md,
//! and so a second reader of that page.

use xxhash_rust::xxh3::xxh3_64_with_seed;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    let word = bytes[at..at + 4].try_into().unwrap_or_default();
    u32::from_le_bytes(word) as usize
}

fn put(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes[at..at + with.len()].copy_from_slice(with);
}

/// A log segment: the header's checksum, and each frame's sequence number, chain and checksum,
/// as far as its lengths lead.
pub fn log_segment(bytes: &mut [u8]) {
    if bytes.len() < 64 {
        return;
    }
    let word = |bytes: &[u8], at: usize| {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
    };
    put(bytes, 0, b"SIMPSLOG");
    put(bytes, 8, &1u32.to_le_bytes());
    put(bytes, 16, &1u64.to_le_bytes());
    put(bytes, 24, &1u64.to_le_bytes());
    let store = word(bytes, 32);
    let mut seq = word(bytes, 40).clamp(1, 1 << 60);
    put(bytes, 40, &seq.to_le_bytes());
    let mut digest = xxh3_64_with_seed(&1u64.to_le_bytes(), store);
    put(bytes, 48, &digest.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..60]);
    put(bytes, 60, &crc.to_le_bytes());
    let mut at = 64;
    while at + 28 <= bytes.len() {
        let left = bytes.len() - at - 24;
        let mut length = u32_at(bytes, at);
        if length < 4 || length > left {
            // The last frame takes what is left.
            length = left;
            put(bytes, at, &(length as u32).to_le_bytes());
        }
        let end = at + 24 + length;
        put(bytes, at + 8, &seq.to_le_bytes());
        put(bytes, at + 16, &digest.to_le_bytes());
        let count = u32_at(bytes, at + 24).min(1 << 20);
        put(bytes, at + 24, &(count as u32).to_le_bytes());
        let frame = &bytes[at..end];
        let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..4]), &frame[8..]);
        put(bytes, at + 4, &crc.to_le_bytes());
        digest = xxh3_64_with_seed(&bytes[at + 4..end], digest);
        seq += count as u64;
        at = end;
    }
}

/// A snapshot file: each chunk's checksum, and the BLAKE3 of the whole at the end.
pub fn snapshot_file(bytes: &mut Vec<u8>) {
    if bytes.len() < 32 + 9 + 32 {
        return;
    }
    put(bytes, 0, b"SIMPSNAP");
    put(bytes, 8, &1u32.to_le_bytes());
    let mut at = 32;
    while at + 9 <= bytes.len() {
        let left = bytes.len() - at - 9;
        let last = bytes[at] == 0 || left < 9 + 32;
        let mut length = u32_at(bytes, at + 1);
        if last || length > left {
            length = if last { 0 } else { left - 41 };
            bytes[at] = if last { 0 } else { bytes[at] };
            put(bytes, at + 1, &(length as u32).to_le_bytes());
        }
        let end = at + 9 + length;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[at..at + 5]), &bytes[at + 9..end]);
        put(bytes, at + 5, &crc.to_le_bytes());
        at = end;
        if last {
            break;
        }
    }
    bytes.truncate(at);
    let digest = *blake3::hash(bytes).as_bytes();
    bytes.extend(digest);
}

/// safetensors: the header's length.
pub fn safetensors(bytes: &mut [u8]) {
    let Some(end) = bytes.windows(3).position(|w| w == b"}}}") else {
        return;
    };
    if end > 8 && bytes.len() > end + 3 {
        let length = (end + 3 - 8) as u64;
        put(bytes, 0, &length.to_le_bytes());
    }
}

/// PNG: each chunk's CRC-32.
pub fn png(bytes: &mut [u8]) {
    let mut at = 8;
    while bytes.starts_with(&[0x89, b'P', b'N', b'G']) && at + 12 <= bytes.len() {
        let word: [u8; 4] = bytes[at..at + 4].try_into().unwrap_or_default();
        let length = u32::from_be_bytes(word) as usize;
        let Some(end) = (at + 8)
            .checked_add(length)
            .filter(|e| e + 4 <= bytes.len())
        else {
            return;
        };
        let crc = crc32(&bytes[at + 4..end]);
        put(bytes, end, &crc.to_be_bytes());
        at = end + 4;
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            if c & 1 == 1 {
                c >> 1 ^ 0xedb8_8320
            } else {
                c >> 1
            }
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

/// Nothing to mend.
pub fn nothing(_: &mut Vec<u8>) {}
