//! Where a picture comes from: digests, the pseudonym of its user, and the record that lets
//! the same picture be made again, inside the PNG and as JSON beside it.
//!
//! Not here: signatures (C2PA). The record says what was done; it does not prove it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use std::time::SystemTime;

use sha2::{Digest, Sha256};
use simpatico_schema::edit::Provenance;

use crate::picture::{Format, MAX_BYTES, Picture, chunks, hex, write_whole};
use crate::{Error, Result};

/// The version of the record this program writes and the newest it reads. Since 2 it names
/// several instructions, and LoRAs; since 3 a mask's soft edge is as wide as it says; since 4 true
/// guidance may end before the last step. A record of an older version means what it always did.
pub const VERSION: u32 = 4;
/// The keyword of the PNG text the record is under.
pub const KEYWORD: &str = "simpatico";
/// Made by a model alone (IPTC digital source type).
pub const TRAINED: &str = "trainedAlgorithmicMedia";
/// A picture with parts made by a model (IPTC digital source type).
pub const COMPOSITE: &str = "compositeWithTrainedAlgorithmicMedia";

const MAX_RECORD_BYTES: usize = 4 << 20;
const IPTC: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/";

type FileState = (PathBuf, u64, Option<SystemTime>);
static DIGESTS: LazyLock<Mutex<BTreeMap<FileState, String>>> = LazyLock::new(Mutex::default);

/// The SHA-256 of a file in lower-case hex. Within one run a file whose size and time of
/// change stayed the same is read once.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let meta = file.metadata().map_err(Error::io(path))?;
    let state = (path.to_path_buf(), meta.len(), meta.modified().ok());
    if let Some(known) = digests().get(&state) {
        return Ok(known.clone());
    }
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io(path))? {
            0 => break,
            n => sum.update(&buffer[..n]),
        }
    }
    let digest = hex(&sum.finalize());
    digests().insert(state, digest.clone());
    Ok(digest)
}

fn digests() -> std::sync::MutexGuard<'static, BTreeMap<FileState, String>> {
    // A map that a panicking thread held is still a map.
    DIGESTS.lock().unwrap_or_else(|e| e.into_inner())
}

/// The SHA-256 of bytes in lower-case hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// A user's name under a key: the first 16 bytes of HMAC-SHA-256 (RFC 2104) in hex. Who has
/// the key and a list of names can resolve it; nobody else can tell or compare.
pub fn pseudonym(key: &[u8; 32], user: &str) -> String {
    let pad = |with: u8| -> Vec<u8> {
        let key = key.iter().copied().chain(std::iter::repeat(0)).take(64);
        key.map(|b| b ^ with).collect()
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(user);
    let outer = Sha256::new().chain_update(pad(0x5c));
    hex(&outer.chain_update(inner.finalize()).finalize()[..16])
}

/// The pseudonym key kept in a file; made from the system's randomness where there is none.
/// Whoever has it can resolve pseudonyms, so it stays beside the store and is never shared.
pub fn key_at(path: &Path) -> Result<[u8; 32]> {
    match std::fs::read(path) {
        Ok(bytes) => {
            return bytes.try_into().map_err(|bytes: Vec<u8>| {
                let reason = format!("expected a key of 32 bytes, got {}", bytes.len());
                Error::BadRequest(format!("{}: {reason}", path.display()))
            });
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(path)(e)),
    }
    // Two hashers of the standard library are keyed by the system's randomness.
    use std::hash::{BuildHasher, RandomState};
    let mut sum = Sha256::new();
    for i in 0..8u64 {
        sum.update(RandomState::new().hash_one(i).to_le_bytes());
    }
    if let Ok(mut random) = File::open("/dev/urandom") {
        let mut bytes = [0; 32];
        random.read_exact(&mut bytes).map_err(Error::io(path))?;
        sum.update(bytes);
    }
    let key: [u8; 32] = sum.finalize().into();
    write_whole(path, &key)?;
    Ok(key)
}

/// Gives a record its id: 16 hex digits that follow from everything else in it, so the same
/// request on the same state has the same id and any difference another.
pub fn with_id(mut record: Provenance) -> Provenance {
    record.edit_id.clear();
    let json = serde_json::to_vec(&record).unwrap_or_default();
    record.edit_id = sha256(&json)[..16].to_string();
    record
}

/// The PNG file of a picture with its record and the AI-made mark in it.
pub fn to_png(picture: &Picture, record: &Provenance) -> Result<Vec<u8>> {
    let json = to_json(record)?;
    let xmp = xmp_packet(&record.digital_source_type);
    picture.to_png(&[(KEYWORD, &json), (chunks::XMP, &xmp)])
}

/// Writes the PNG, and the record as JSON beside it under the same name with `.json`; both
/// whole or not at all, the JSON first so that no picture is without. Returns the JSON's path.
pub fn write(path: &Path, picture: &Picture, record: &Provenance) -> Result<PathBuf> {
    let png = to_png(picture, record)?;
    let beside = path.with_extension("json");
    write_whole(&beside, to_json(record)?.as_bytes())?;
    write_whole(path, &png)?;
    Ok(beside)
}

fn to_json(record: &Provenance) -> Result<String> {
    serde_json::to_string_pretty(record)
        .map_err(|e| Error::BadRequest(format!("provenance cannot be written: {e}")))
}

fn xmp_packet(source_type: &str) -> String {
    format!(
        concat!(
            "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n",
            "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\">",
            "<rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">",
            "<rdf:Description rdf:about=\"\"",
            " xmlns:Iptc4xmpExt=\"http://iptc.org/std/Iptc4xmpExt/2008-02-29/\"",
            " xmlns:xmp=\"http://ns.adobe.com/xap/1.0/\"",
            " xmp:CreatorTool=\"simpatico {}\"",
            " Iptc4xmpExt:DigitalSourceType=\"{}{}\"/>",
            "</rdf:RDF></x:xmpmeta>\n<?xpacket end=\"w\"?>"
        ),
        env!("CARGO_PKG_VERSION"),
        IPTC,
        source_type
    )
}

/// Reads a record back from a PNG we wrote or from a JSON file, and checks it.
///
/// # Errors
/// [`Error::Io`]; [`Error::BadRequest`] where there is no record or one that makes no sense.
pub fn read(path: &Path) -> Result<Provenance> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(Error::io(path))?;
    from_bytes(&path.display().to_string(), &bytes)
}

/// [`read`] of a file's bytes; `name` is what errors call it.
///
/// # Errors
/// [`Error::BadRequest`] where there is no record or one that makes no sense.
pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Provenance> {
    let json = match Format::of(bytes) {
        Some(Format::Png) => chunks::text_of(bytes, KEYWORD).ok_or_else(|| {
            Error::BadRequest(format!(
                "{name}: no provenance in this PNG; give the JSON that was written beside it"
            ))
        })?,
        Some(_) => {
            let message = format!("{name}: expected a PNG or JSON with provenance");
            return Err(Error::BadRequest(message));
        }
        None => std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| Error::BadRequest(format!("{name}: expected a PNG or JSON text")))?,
    };
    parse(&json).map_err(|reason| Error::BadRequest(format!("{name}: {reason}")))
}

fn parse(json: &str) -> std::result::Result<Provenance, String> {
    if json.len() > MAX_RECORD_BYTES {
        return Err(format!(
            "expected at most {MAX_RECORD_BYTES} bytes of provenance"
        ));
    }
    let record: Provenance =
        serde_json::from_str(json).map_err(|e| format!("not a provenance record: {e}"))?;
    check(&record)?;
    Ok(record)
}

/// Whether a record can be carried out again by this program.
pub fn check(record: &Provenance) -> std::result::Result<(), String> {
    if record.version == 0 || record.version > VERSION {
        return Err(format!(
            "expected provenance of version 1 to {VERSION}, got {}; use a newer program",
            record.version
        ));
    }
    let settings = &record.settings;
    if !(1..=1_000).contains(&settings.steps.unwrap_or(0)) {
        return Err("provenance: expected settings.steps from 1 to 1000".into());
    }
    let numbers = [
        ("guidance", settings.guidance, 0.0..=1_000.0),
        ("true_cfg", settings.true_cfg, 0.0..=100.0),
        ("true_cfg_end", settings.true_cfg_end, 0.0..=1.0),
        ("control_scale", settings.control_scale, 0.0..=2.0),
        ("control_end", settings.control_end, 0.0..=1.0),
        ("strength", settings.strength, 0.0..=1.0),
        ("noise_level", settings.noise_level, 0.0..=1.0),
        ("fine_detail", settings.fine_detail, 0.0..=1.0),
    ];
    for (name, value, range) in numbers {
        if let Some(value) = value.filter(|v| !range.contains(v)) {
            return Err(format!(
                "provenance: expected settings.{name} from {} to {}, got {value}",
                range.start(),
                range.end()
            ));
        }
    }
    let is_digest = |d: &String| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit());
    let digests = record.models.iter().map(|m| &m.sha256);
    let digests = digests.chain(record.loras.iter().map(|l| &l.sha256));
    if !digests
        .chain(&record.source_sha256)
        .chain(&record.mask_sha256)
        .all(is_digest)
    {
        return Err("provenance: a digest is not 64 hex digits".into());
    }
    if ![TRAINED, COMPOSITE].contains(&record.digital_source_type.as_str()) {
        return Err(format!(
            "provenance: expected digital_source_type {TRAINED} or {COMPOSITE}"
        ));
    }
    if record.instruction.len() > 16_384 {
        return Err("provenance: the instruction is longer than 16 KiB".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::edit::EditSettings;

    fn record() -> Provenance {
        with_id(Provenance {
            version: VERSION,
            instruction: "make the mug \"golden\" \\ café".into(),
            user_pseudonym: Some(pseudonym(&[7; 32], "ada")),
            settings: EditSettings {
                steps: Some(20),
                guidance: Some(3.5),
                ..Default::default()
            },
            source_sha256: Some(sha256(b"source")),
            digital_source_type: TRAINED.into(),
            ..Default::default()
        })
    }

    #[test]
    fn a_record_comes_back_from_the_png_and_from_the_json() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.png");
        let beside = write(&path, &Picture::filled(4, 4, [1, 2, 3]), &record()).unwrap();
        assert_eq!(read(&path).unwrap(), record());
        assert_eq!(read(&beside).unwrap(), record());
        let xmp = chunks::text_of(&std::fs::read(&path).unwrap(), chunks::XMP).unwrap();
        assert!(xmp.contains("digitalsourcetype/trainedAlgorithmicMedia\""));
    }

    #[test]
    fn pseudonyms_are_hmac_sha256() {
        // RFC 4231, test case 2 has a short key: "Jefe" padded with zeros is the same key.
        let mut key = [0; 32];
        key[..4].copy_from_slice(b"Jefe");
        let is = pseudonym(&key, "what do ya want for nothing?");
        assert_eq!(is, "5bdcc146bf60754e6a042426089575c7");
        assert_ne!(pseudonym(&[1; 32], "ada"), pseudonym(&[2; 32], "ada"));
    }

    #[test]
    fn the_id_follows_from_the_record() {
        let a = record();
        assert_eq!(with_id(a.clone()), a);
        let b = with_id(Provenance {
            index: 1,
            ..a.clone()
        });
        assert_ne!(a.edit_id, b.edit_id);
    }

    #[test]
    fn records_that_make_no_sense_are_refused_with_the_field() {
        let spoil: [(&str, fn(&mut Provenance)); 6] = [
            ("version", |p| p.version = 99),
            ("steps", |p| p.settings.steps = Some(1_000_000)),
            ("control_scale", |p| p.settings.control_scale = Some(9.0)),
            ("guidance", |p| p.settings.guidance = Some(-1.0)),
            ("digest", |p| p.source_sha256 = Some("../../etc".into())),
            ("digital_source_type", |p| {
                p.digital_source_type = "human".into()
            }),
        ];
        for (word, spoil) in spoil {
            let mut bad = record();
            spoil(&mut bad);
            assert!(check(&bad).unwrap_err().contains(word), "{word}");
        }
        assert!(parse("{\"version\": \"one\"}").is_err());
    }

    #[test]
    fn a_changed_file_is_digested_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, "one").unwrap();
        assert_eq!(sha256_file(&path).unwrap(), sha256(b"one"));
        std::fs::write(&path, "three").unwrap();
        assert_eq!(sha256_file(&path).unwrap(), sha256(b"three"));
    }
}
