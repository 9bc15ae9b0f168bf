//! Measures one sampling step (ControlNet and transformer) of a small Flux with random weights
//! on the CPU. `flux_step.py` beside it measures diffusers on the same shape.
//!
//! Size: `Config::small()` (192 wide, 3 double and 6 single blocks) with a ControlNet of 1 and
//! 2 blocks, 24 text tokens. Each figure is the least of several runs, in milliseconds: `ms` by
//! the clock, `cpu_ms` the processor time of all threads, which is the one to compare (with one
//! thread) on a machine that does other work; `peak_mb` is the most memory so far.
//!
//! RAYON_NUM_THREADS=2 cargo run --release --example flux_step

use candle_core::{DType, Device, Tensor};
use simpatico_engine::Result;
use simpatico_engine::flux::{controlnet, init, names, transformer};
use simpatico_engine::sampler::{
    Conditions, ControlInput, Field, Prompt, Schedule, ScheduleConfig, Watch, generate,
    packed_noise,
};
use std::time::Instant;

/// Processor milliseconds of all threads so far, where the system tells (Linux).
fn cpu_ms() -> f64 {
    // The system brings a thread's time up to date when it stops running.
    std::thread::sleep(std::time::Duration::from_millis(2));
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e6
}

/// The most memory this process has held, in MB, where the system tells (Linux).
fn peak_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) / 1e3
}

/// A transformer and a ControlNet of these shapes with random weights.
fn networks(
    config: &transformer::Config,
    control: &controlnet::Config,
) -> Result<(transformer::FluxTransformer, controlnet::ControlNet)> {
    let cpu = Device::Cpu;
    let weights = |shapes: &[names::NameAndShape]| -> Result<_> {
        let map = init::random(shapes, 0, &cpu)?;
        // Nothing silent: zeros would be as fast, but not what is measured.
        let map = map.into_iter().map(|(k, v)| Ok((k, (v + 0.01)?)));
        let map = map.collect::<Result<_>>()?;
        Ok(init::builder(&map, DType::F32, &cpu))
    };
    let flux =
        transformer::FluxTransformer::new(config, weights(&names::transformer_shapes(config))?)?;
    let net = controlnet::ControlNet::new(control, weights(&names::controlnet_shapes(control))?)?;
    Ok((flux, net))
}

/// The least clock and processor milliseconds of `runs` runs after one to warm up.
fn least(runs: usize, mut f: impl FnMut(usize) -> Result<()>) -> Result<(f64, f64)> {
    let mut least = (f64::INFINITY, f64::INFINITY);
    for i in 0..=runs {
        let (cpu, start) = (cpu_ms(), Instant::now());
        f(i)?;
        let clock = start.elapsed().as_secs_f64() * 1e3;
        least = (least.0.min(clock), least.1.min(cpu_ms() - cpu));
    }
    Ok(least)
}

fn say(what: &str, tokens: usize, batch: usize, (ms, cpu_ms): (f64, f64)) {
    println!(
        "{{\"what\":\"{what}\",\"tokens\":{tokens},\"batch\":{batch},\"ms\":{ms:.1},\
         \"cpu_ms\":{cpu_ms:.1},\"peak_mb\":{:.0}}}",
        peak_mb()
    );
}

fn prompt(tokens: usize, value: f32) -> Result<Prompt> {
    Ok(Prompt {
        text: Tensor::full(value, (1, tokens, 384), &Device::Cpu)?,
        pooled: Tensor::full(value, (1, 384), &Device::Cpu)?,
    })
}

fn main() -> Result<()> {
    let cpu = Device::Cpu;
    let runs: usize = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let config = transformer::Config::small();
    let (flux, net) = networks(&config, &controlnet::Config::small(&config))?;
    let conditions = |side: usize, latents: &Tensor| -> Result<_> {
        Ok(Conditions {
            flux: &flux,
            prompt: prompt(24, 0.1)?,
            more: Vec::new(),
            negative: None,
            true_cfg: 1.0,
            true_cfg_end: 1.0,
            guidance: 3.5,
            controls: vec![ControlInput::new(
                &net,
                latents.narrow(0, 0, 1)?,
                Some(0),
                0.7,
            )],
            rows: side,
            columns: side,
            cache_threshold: 0.0,
            last_run: false,
        })
    };
    for side in [16, 32] {
        for batch in [1usize, 4, 16] {
            let pictures: Vec<u32> = (0..batch as u32).collect();
            let latents = packed_noise(0, &pictures, 0, (8, 2 * side, 2 * side), &cpu)?;
            let schedule = Schedule::full(&ScheduleConfig::dev(), 20, side * side)?;
            let mut field = Field::new(&conditions(side, &latents)?, &schedule, batch)?;
            let times = least(runs, |i| field.at(i % 20, &latents, None).map(|_| ()))?;
            say("step", side * side, batch, times);
        }
    }

    // A whole edit of the smallest size: 20 steps, each with the network once for the prompt
    // and once for the negative prompt.
    let config = transformer::Config {
        in_channels: 96,
        num_layers: 2,
        num_single_layers: 3,
        guidance_embeds: false,
        ..transformer::Config::tiny()
    };
    let mut control = controlnet::Config::small(&config);
    control.trunk.num_layers = 1;
    control.trunk.num_single_layers = 1;
    let (flux, net) = networks(&config, &control)?;
    for batch in [1usize, 16] {
        let pictures: Vec<u32> = (0..batch as u32).collect();
        let latents = packed_noise(0, &pictures, 0, (24, 16, 16), &cpu)?;
        let conditions = Conditions {
            flux: &flux,
            prompt: prompt(20, 0.1)?,
            more: Vec::new(),
            negative: Some(prompt(20, 0.0)?),
            true_cfg: 2.0,
            true_cfg_end: 1.0,
            guidance: 3.5,
            controls: vec![ControlInput::new(
                &net,
                latents.narrow(0, 0, 1)?,
                Some(0),
                0.7,
            )],
            rows: 8,
            columns: 8,
            cache_threshold: 0.0,
            last_run: false,
        };
        let schedule = Schedule::full(&ScheduleConfig::dev(), 20, 64)?;
        let times = least(runs, |_| {
            generate(
                &conditions,
                &schedule,
                &latents,
                None,
                &mut Watch::default(),
            )
            .map(|_| ())
        })?;
        say("edit of 20 steps", 64, batch, times);
    }
    Ok(())
}
