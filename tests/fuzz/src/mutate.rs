//! Mutations of bytes.

use simpatico_schema::random::Philox;

/// Numbers that break length and offset arithmetic.
const EDGES: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 33,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX,
];

fn place(bytes: &[u8], random: &mut Philox) -> usize {
    random.below(bytes.len() as u32 + 1) as usize
}

/// Changes bytes in one to six ways. `other` is to splice from, `words` to put in.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], words: &[&str], random: &mut Philox) {
    for _ in 0..1 + random.below(6) {
        let at = place(bytes, random);
        let to = (at + 1 + random.below(16) as usize).min(bytes.len());
        match random.below(12) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 if at < bytes.len() => bytes[at] = random.next_u32() as u8,
            3 => {
                let width = 1usize << random.below(4);
                let edge = random.choose(&EDGES).copied().unwrap_or(0).to_le_bytes();
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&edge[..end - at]);
            }
            4 => drop(bytes.drain(at..to)),
            5 => {
                let again = bytes[at..to].to_vec();
                bytes.splice(at..at, again);
            }
            6 => {
                let fresh: Vec<u8> = (0..1 + random.below(8))
                    .map(|_| random.next_u32() as u8)
                    .collect();
                bytes.splice(at..at, fresh);
            }
            7 => bytes.truncate(at),
            8 => {
                let from = place(other, random);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            9 => change_number(bytes, at, random),
            10 => {
                let word = random.choose(words).copied().unwrap_or("\"");
                bytes.splice(at..at, word.bytes());
            }
            _ => {
                // A piece again and again: nesting, long names, many members.
                let piece = bytes[at..to].to_vec();
                let times = 1usize << random.below(12);
                let many = piece.repeat(times);
                bytes.splice(at..at, many);
            }
        }
        bytes.truncate(1 << 20);
    }
}

/// Puts another number in place of the first decimal one behind a place.
fn change_number(bytes: &mut Vec<u8>, at: usize, random: &mut Philox) {
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit) else {
        return;
    };
    let start = at + start;
    let length = bytes[start..]
        .iter()
        .take_while(|b| b.is_ascii_digit())
        .count();
    let edge = random.choose(&EDGES).copied().unwrap_or(0);
    let text = match random.below(4) {
        0 => format!("-{edge}"),
        1 => format!("{edge}.5e{}", random.below(400)),
        _ => edge.to_string(),
    };
    bytes.splice(start..start + length, text.bytes());
}
