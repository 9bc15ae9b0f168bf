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
use simpatico_engine::flux::{controlnet, init, names, transformer};
use simpatico_engine::sampler::{
    Conditions, ControlInput, Field, Prompt, Schedule, ScheduleConfig, packed_noise,
};
use std::time::Instant;

/// Processor milliseconds of all threads so far, where the system tells (Linux).
fn cpu_ms() -> f64 {
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

fn main() -> simpatico_engine::Result<()> {
    let cpu = Device::Cpu;
    let config = transformer::Config::small();
    let control = controlnet::Config::small(&config);
    let weights = |shapes: &[names::NameAndShape]| -> simpatico_engine::Result<_> {
        let map = init::random(shapes, 0, &cpu)?;
        // Nothing silent: zeros would be as fast, but not what is measured.
        let map = map.into_iter().map(|(k, v)| Ok((k, (v + 0.01)?)));
        let map = map.collect::<simpatico_engine::Result<_>>()?;
        Ok(init::builder(&map, DType::F32, &cpu))
    };
    let flux =
        transformer::FluxTransformer::new(&config, weights(&names::transformer_shapes(&config))?)?;
    let net = controlnet::ControlNet::new(&control, weights(&names::controlnet_shapes(&control))?)?;
    let runs: usize = std::env::args()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    for (rows, columns) in [(16, 16), (32, 32)] {
        for batch in [1usize, 4, 16] {
            let pictures: Vec<u32> = (0..batch as u32).collect();
            let latents = packed_noise(0, &pictures, 0, (8, 2 * rows, 2 * columns), &cpu)?;
            let conditions = Conditions {
                flux: &flux,
                prompt: Prompt {
                    text: Tensor::full(0.1f32, (1, 24, 384), &cpu)?,
                    pooled: Tensor::full(0.1f32, (1, 384), &cpu)?,
                },
                negative: None,
                true_cfg: 1.0,
                guidance: 3.5,
                controls: vec![ControlInput::new(
                    &net,
                    latents.narrow(0, 0, 1)?,
                    Some(0),
                    0.7,
                )],
                rows,
                columns,
                cache_threshold: 0.0,
            };
            let schedule = Schedule::full(&ScheduleConfig::dev(), 20, rows * columns)?;
            let mut field = Field::new(&conditions, &schedule, batch)?;
            let (mut least, mut least_cpu) = (f64::INFINITY, f64::INFINITY);
            for i in 0..runs + 1 {
                let (start, cpu) = (Instant::now(), cpu_ms());
                field.at(i % 20, &latents, None)?;
                least = least.min(start.elapsed().as_secs_f64() * 1e3);
                least_cpu = least_cpu.min(cpu_ms() - cpu);
            }
            println!(
                "{{\"tokens\":{},\"batch\":{batch},\"ms\":{least:.1},\"cpu_ms\":{least_cpu:.1},\
                 \"peak_mb\":{:.0}}}",
                rows * columns,
                peak_mb()
            );
        }
    }
    Ok(())
}
