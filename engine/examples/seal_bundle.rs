//! Writes sizes and digests of a bundle's files into its manifest, after (re)training:
//! `cargo run --release -p simpatico-engine --example seal_bundle -- engine/bundles/default`

fn main() -> simpatico_engine::Result<()> {
    let folder = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "engine/bundles/default".into());
    let manifest = simpatico_engine::bundle::seal(folder.as_ref())?;
    let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
    println!(
        "{}: {} files, {bytes} bytes",
        manifest.name,
        manifest.files.len()
    );
    Ok(())
}
