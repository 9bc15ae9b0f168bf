//! Makes the file that a bundle's role `wishes` names, of the text encoder's folder, after the
//! vocabulary or the encoder changed (seal the bundle afterwards):
//! `cargo run --release -p simpatico-engine --example wish_vectors --
//! ~/.cache/simpatico/models/all-minilm-l6-v2 engine/bundles/default/policy/wishes.safetensors`

use simpatico_engine::text_vectors::TextEncoder;
use simpatico_engine::{Device, Result, wishes};

fn main() -> Result<()> {
    let mut given = std::env::args().skip(1);
    let (Some(encoder), Some(out)) = (given.next(), given.next()) else {
        eprintln!("usage: wish_vectors ENCODER_FOLDER FILE");
        std::process::exit(2);
    };
    let encoder = TextEncoder::open(encoder.as_ref(), &Device::Cpu)?;
    wishes::save_vectors(&encoder, out.as_ref())
}
