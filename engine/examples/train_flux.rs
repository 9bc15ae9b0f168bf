//! Trains the small Flux: `train_flux vae FOLDER [STEPS]`, and so on.

use simpatico_engine::train_flux::{Progress, Rhythm, autoencoder};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [stage, folder, rest @ ..] = arguments.as_slice() else {
        return Err("train_flux STAGE FOLDER [STEPS]".into());
    };
    let rhythm = Rhythm::usual(folder);
    std::fs::create_dir_all(folder)?;
    let number = |i: usize| rest.get(i).and_then(|s| s.parse::<usize>().ok());
    let mut tell = |p: &Progress| {
        println!(
            "{} {}/{} loss {:.4} grad {:.2} {:.0} s, {:.0} s left",
            p.stage, p.step, p.steps, p.loss, p.gradient, p.seconds, p.seconds_left
        );
        true
    };
    match stage.as_str() {
        "vae" => {
            let mut options = autoencoder::Options::shipped();
            options.steps = number(0).unwrap_or(options.steps);
            autoencoder::run(&options, &rhythm, &mut tell)?;
        }
        other => return Err(format!("no stage {other}").into()),
    }
    Ok(())
}
