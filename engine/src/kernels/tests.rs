//! The CUDA kernels of Flux's blocks, of a decoder's step and of a layer that learns, compiled as C
//! for this processor (`on_host.h` plays a device's threads), against the tensor operations that
//! they stand for. What a device adds, its
//! memory's speed and its own rounding, is for tests/gpu/run to see.

use crate::nn::{self, RopeLayout};
use candle_core::{D, DType, Device, Tensor};
use half::bf16;
use simpatico_schema::random::Philox;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

/// The kernels as a program; the C compiler is the one that links Rust's programs.
static HARNESS: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/harness.c");
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("harness");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let made = Command::new(&compiler)
        .args(["-O1", "-std=gnu11", "-x", "c"])
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .args(["-lm", "-lpthread"])
        .output()
        .expect("a C compiler, which Rust needs too");
    let said = String::from_utf8_lossy(&made.stderr);
    assert!(made.status.success(), "{compiler}: {said}");
    (folder, program)
});

fn random(shape: &[usize], seed: u64, dtype: DType) -> Tensor {
    let values = Philox::new(seed, 0).normals(shape.iter().product());
    let x = Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor");
    x.to_dtype(dtype).expect("numbers of that type")
}

fn bytes(x: &Tensor) -> Vec<u8> {
    let x = x.flatten_all().expect("its numbers");
    match x.dtype() {
        DType::BF16 => {
            let all = x.to_vec1::<bf16>().expect("its numbers");
            all.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        DType::U8 => x.to_vec1::<u8>().expect("its numbers"),
        DType::U32 => {
            let all = x.to_vec1::<u32>().expect("its numbers");
            all.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        _ => {
            let all = x.to_vec1::<f32>().expect("its numbers");
            all.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
    }
}

/// What a kernel writes, as f32.
fn run(kernel: &str, dtype: DType, numbers: &[usize], tensors: &[&Tensor]) -> Vec<f32> {
    let name = if dtype == DType::BF16 { "bf16" } else { "f32" };
    let tensors: Vec<Vec<u8>> = tensors.iter().map(|t| bytes(t)).collect();
    let mut line = format!("{kernel} {name} {} {}", numbers.len(), tensors.len());
    let sizes = tensors.iter().map(Vec::len);
    for number in numbers.iter().copied().chain(sizes) {
        line += &format!(" {number}");
    }
    let mut harness = Command::new(&HARNESS.1)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the harness");
    let mut to = harness.stdin.take().expect("its input");
    writeln!(to, "{line}").expect("written");
    tensors
        .iter()
        .for_each(|t| to.write_all(t).expect("written"));
    drop(to);
    let out = harness.wait_with_output().expect("its output");
    assert!(out.status.success(), "{kernel}: {}", out.status);
    let wide = |two: &[u8]| bf16::from_le_bytes([two[0], two[1]]).to_f32();
    match dtype {
        DType::BF16 => out.stdout.chunks_exact(2).map(wide).collect(),
        _ => {
            let number = |n: &[u8]| f32::from_le_bytes([n[0], n[1], n[2], n[3]]);
            out.stdout.chunks_exact(4).map(number).collect()
        }
    }
}

/// The kernel's numbers are those of the operations in f32, but for the last rounding.
fn same(name: &str, dtype: DType, kernel: &[f32], operations: &Tensor) {
    let truth = operations.flatten_all().expect("its numbers");
    let truth = truth.to_vec1::<f32>().expect("its numbers");
    assert_eq!(kernel.len(), truth.len(), "{name}");
    let (share, least) = match dtype {
        DType::BF16 => (1.0 / 250.0, 1e-3),
        _ => (1e-5, 1e-5),
    };
    for (i, (a, b)) in kernel.iter().zip(&truth).enumerate() {
        let near = (a - b).abs() <= least + share * b.abs();
        assert!(
            near,
            "{name} {dtype:?} at {i}: {a} by the kernel, {b} by operations"
        );
    }
}

fn f32_of(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F32).expect("f32")
}

/// Part `i` of a modulation, to spread over tokens.
fn part(modulation: &Tensor, i: usize, d: usize) -> Tensor {
    let part = modulation.narrow(D::Minus1, i * d, d).expect("a part");
    f32_of(&part).unsqueeze(1).expect("a part")
}

const TYPES: [DType; 2] = [DType::F32, DType::BF16];

#[test]
fn norm_and_modulation_are_what_operations_say() {
    // Fewer and more eights than a block has threads; one modulation for all, or each its own.
    for (d, pictures, dtype) in [(48, 2, TYPES[0]), (1040, 1, TYPES[0]), (48, 2, TYPES[1])] {
        let tokens = 3;
        let x = (random(&[2, tokens, d], 1, DType::F32) + 0.5).expect("off centre");
        let x = x.to_dtype(dtype).expect("that type");
        let modulation = random(&[pictures, 3 * d], 2, dtype);
        let stride = if pictures == 1 { 0 } else { 3 * d };
        let kernel = run(
            "norm",
            dtype,
            &[2 * tokens, tokens, d, stride, 1],
            &[&x, &modulation],
        );
        let unit = nn::layer_norm(&f32_of(&x), None, None, 1e-6).expect("a norm");
        let scale = (part(&modulation, 2, d) + 1.0).expect("a scale");
        let truth = unit.broadcast_mul(&scale).expect("scaled");
        let truth = truth
            .broadcast_add(&part(&modulation, 1, d))
            .expect("shifted");
        same("norm", dtype, &kernel, &truth);
    }
}

#[test]
fn bias_and_gate_are_what_operations_say() {
    for (dtype, pictures) in [(TYPES[0], 2), (TYPES[1], 1)] {
        let (tokens, d) = (5, 136);
        let (x, y) = (
            random(&[2, tokens, d], 1, dtype),
            random(&[2, tokens, d], 2, dtype),
        );
        let (modulation, bias) = (random(&[pictures, 6 * d], 3, dtype), random(&[d], 4, dtype));
        let stride = if pictures == 1 { 0 } else { 6 * d };
        let numbers = [2 * tokens, tokens, d, stride, 5];
        let kernel = run("gate", dtype, &numbers, &[&x, &modulation, &y, &bias]);
        let y = f32_of(&y).broadcast_add(&f32_of(&bias)).expect("a sum");
        let y = y.broadcast_mul(&part(&modulation, 5, d)).expect("gated");
        same("gate", dtype, &kernel, &(f32_of(&x) + y).expect("a sum"));
    }
}

#[test]
fn heads_are_split_normalised_and_rotated_as_operations_do() {
    // A head of half a warp's pairs, of a warp's, of more; a product with more columns behind.
    for (head, more, dtype) in [
        (16, 0, TYPES[0]),
        (64, 64, TYPES[0]),
        (200, 8, TYPES[0]),
        (128, 0, TYPES[1]),
    ] {
        let (b, t, heads, total, first) = (2, 3, 2, 5, 2);
        let width = 3 * heads * head + more;
        let (h, bias) = (random(&[b, t, width], 1, dtype), random(&[width], 2, dtype));
        let (q, k) = (random(&[head], 3, dtype), random(&[head], 4, dtype));
        let angles: Vec<f64> = (0..head / 2).map(|i| 0.3 / (i + 1) as f64).collect();
        let places: Vec<f64> = (0..total).map(|p| p as f64).collect();
        let (cos, sin) = nn::rope_tables(&places, &angles, &Device::Cpu).expect("tables");
        let numbers = [b, t, width, heads, head, total, first];
        let kernel = run("heads", dtype, &numbers, &[&h, &bias, &q, &k, &cos, &sin]);
        let h = f32_of(&h).broadcast_add(&f32_of(&bias)).expect("a sum");
        let h = h.narrow(2, 0, 3 * heads * head).expect("three");
        let h = h.reshape((b, t, 3, heads, head)).expect("heads");
        let here = |table: &Tensor| table.narrow(0, first, t).expect("places");
        for (which, weight) in [Some(&q), Some(&k), None].into_iter().enumerate() {
            let x = h
                .narrow(2, which, 1)
                .and_then(|x| x.squeeze(2))
                .expect("one");
            let x = x
                .transpose(1, 2)
                .and_then(|x| x.contiguous())
                .expect("turned");
            let x = match weight {
                Some(weight) => {
                    let x = nn::rms_norm(&x, &f32_of(weight), 1e-6).expect("a norm");
                    nn::rope(&x, &here(&cos), &here(&sin), RopeLayout::Pairs).expect("rotated")
                }
                None => x,
            };
            let truth = x
                .transpose(1, 2)
                .and_then(|x| x.contiguous())
                .expect("turned");
            // Of (3, pictures, total, heads, head) what stands at the stream's places.
            let row = heads * head;
            let written: Vec<f32> = (0..b)
                .flat_map(|i| {
                    let at = ((which * b + i) * total + first) * row;
                    kernel[at..at + t * row].to_vec()
                })
                .collect();
            same("heads", dtype, &written, &truth);
        }
        // What belongs to the other stream is left alone: the harness filled it with NaN.
        assert!(kernel[..first * heads * head].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn gelu_stands_beside_what_attention_gave() {
    for (joined, dtype) in [(0, TYPES[0]), (24, TYPES[0]), (24, TYPES[1])] {
        let (rows, inner, width) = (7, 48, 72);
        let beside = random(&[rows, joined.max(8)], 1, dtype);
        let beside = beside
            .narrow(1, 0, joined)
            .and_then(|x| x.contiguous())
            .expect("a part");
        let h = (random(&[rows, width], 2, DType::F32) * 3.0).expect("wide");
        let (h, bias) = (
            h.to_dtype(dtype).expect("that type"),
            random(&[width], 3, dtype),
        );
        let numbers = [rows, joined, inner, width, width - inner];
        let kernel = run("gelu", dtype, &numbers, &[&beside, &h, &bias]);
        let sum = f32_of(&h).broadcast_add(&f32_of(&bias)).expect("a sum");
        let sum = sum
            .narrow(1, width - inner, inner)
            .and_then(|x| x.contiguous());
        let inside = nn::gelu_tanh(&sum.expect("a part")).expect("gelu");
        let truth = match joined {
            0 => inside,
            _ => Tensor::cat(&[&f32_of(&beside), &inside], 1).expect("side by side"),
        };
        same("gelu", dtype, &kernel, &truth);
    }
}

#[test]
fn a_sum_and_its_norm_are_what_operations_say() {
    for (dtype, d, adds) in [(TYPES[0], 1040, 1), (TYPES[0], 48, 0), (TYPES[1], 136, 1)] {
        let (rows, eps) = (3, 1e-6);
        let (x, more) = (random(&[rows, d], 1, dtype), random(&[rows, d], 2, dtype));
        let weight = random(&[d], 3, dtype);
        let kernel = run("sum_norm", dtype, &[rows, d, adds], &[&x, &more, &weight]);
        let sum = match adds {
            1 => (&x + &more).expect("a sum"),
            _ => x.clone(),
        };
        let normed = nn::rms_norm(&f32_of(&sum), &f32_of(&weight), eps).expect("a norm");
        same("sum", dtype, &kernel[..rows * d], &f32_of(&sum));
        same("norm", dtype, &kernel[rows * d..], &normed);
    }
}

#[test]
fn a_token_is_placed_as_operations_do() {
    for (dtype, rows, head, angles, biased) in [
        (TYPES[0], 2, 64, 2, 1),
        (TYPES[0], 1, 128, 1, 0),
        (TYPES[1], 3, 128, 1, 1),
    ] {
        let (heads, kv, room, at) = (4, 2, 5, 3);
        let slots = heads + 2 * kv;
        let product = random(&[rows, slots * head], 1, dtype);
        let bias = random(&[slots * head], 2, dtype);
        let frequencies = nn::rope_frequencies(head, 1e4);
        // One position for all rows, or one for each.
        let places: Vec<f64> = (0..angles).map(|i| (3 + 4 * i) as f64).collect();
        let (cos, sin) = nn::rope_tables(&places, &frequencies, &Device::Cpu).expect("tables");
        let turn = if angles == 1 { 0 } else { head / 2 };
        let numbers = [rows, heads, kv, head, room, at, turn, biased];
        let kernel = run("place", dtype, &numbers, &[&product, &bias, &cos, &sin]);
        let mut all = f32_of(&product);
        if biased == 1 {
            all = all.broadcast_add(&f32_of(&bias)).expect("a sum");
        }
        let all = all.reshape((rows, slots, 1, head)).expect("heads");
        let of = |first, count| {
            let part = all.narrow(1, first, count).expect("some heads");
            part.contiguous().expect("in a row")
        };
        let table = |t: &Tensor| match angles {
            1 => t.clone(),
            _ => t.reshape((rows, 1, head / 2)).expect("a row each"),
        };
        let turned = |x: Tensor| {
            let (cos, sin) = (table(&cos), table(&sin));
            nn::rope(&x, &cos, &sin, RopeLayout::Halves).expect("rotated")
        };
        let query = rows * heads * head;
        same("query", dtype, &kernel[..query], &turned(of(0, heads)));
        let cached = rows * kv * room * head;
        for (which, truth) in [turned(of(heads, kv)), of(heads + kv, kv)]
            .iter()
            .enumerate()
        {
            let cache = &kernel[query + which * cached..][..cached];
            let tokens = cache.chunks_exact(head).enumerate();
            // What belongs to other tokens is left alone: the harness filled it with NaN.
            let (here, others): (Vec<_>, Vec<_>) = tokens.partition(|(i, _)| i % room == at);
            let here: Vec<f32> = here.iter().flat_map(|(_, t)| t.to_vec()).collect();
            same("cache", dtype, &here, truth);
            assert!(others.iter().all(|(_, t)| t.iter().all(|x| x.is_nan())));
        }
    }
}

#[test]
fn a_token_attends_as_operations_do() {
    // Fewer keys than lanes, a few rounds of them, exactly a round; all heads' sizes.
    for (dtype, head, seen, pads) in [
        (TYPES[0], 64, 1, None),
        (TYPES[0], 128, 37, Some([0u32, 11])),
        (TYPES[0], 192, 16, None),
        (TYPES[0], 256, 40, Some([39, 3])),
        (TYPES[1], 128, 50, None),
    ] {
        let (rows, heads, kv, room) = (2, 4, 2, seen + 3);
        let query = (random(&[rows, heads, 1, head], 1, DType::F32) * 2.0).expect("sharp");
        let query = query.to_dtype(dtype).expect("that type");
        // Beyond what was seen the caches hold nothing that could be read.
        let cache = |seed| {
            let seen = random(&[rows, kv, seen, head], seed, DType::F32);
            let rest = Tensor::full(
                f32::NAN,
                (rows, kv, room - seen.dims()[2], head),
                &Device::Cpu,
            );
            let all = Tensor::cat(&[&seen, &rest.expect("rest")], 2).expect("a cache");
            all.to_dtype(dtype).expect("that type")
        };
        let (keys, values) = (cache(2), cache(3));
        let first = Tensor::new(&pads.unwrap_or_default(), &Device::Cpu).expect("pads");
        let padded = usize::from(pads.is_some());
        let numbers = [rows, heads, kv, head, room, seen, padded];
        let kernel = run("attend", dtype, &numbers, &[&query, &keys, &values, &first]);
        let mut mask = vec![0f32; rows * seen];
        for (row, mask) in mask.chunks_exact_mut(seen).enumerate() {
            let pad = pads.unwrap_or_default()[row] as usize;
            mask[..pad].fill(-1e30);
        }
        let mask = Tensor::from_vec(mask, (rows, 1, 1, seen), &Device::Cpu).expect("a mask");
        let part = |x: &Tensor| f32_of(&x.narrow(2, 0, seen).expect("what was seen"));
        let truth = nn::attention(
            &f32_of(&query),
            &part(&keys),
            &part(&values),
            1.0 / (head as f64).sqrt(),
            &nn::Mask::Additive(mask),
        );
        same("attend", dtype, &kernel, &truth.expect("attention"));
    }
}

#[test]
fn gate_and_up_are_what_operations_say() {
    for dtype in TYPES {
        let (rows, inner) = (3, 136);
        let product = (random(&[rows, 2 * inner], 1, DType::F32) * 4.0).expect("wide");
        let product = product.to_dtype(dtype).expect("that type");
        let kernel = run("swiglu", dtype, &[rows, inner], &[&product]);
        let part = |i| f32_of(&product.narrow(1, i * inner, inner).expect("a half"));
        let truth = nn::swiglu(&part(0), &part(1)).expect("gated");
        same("swiglu", dtype, &kernel, &truth);
    }
}

#[test]
fn eight_bit_codes_become_their_values() {
    let codes: Vec<u8> = (0..=255)
        .filter(|c| c & 0x7f != 0x7f)
        .chain([0, 0])
        .collect();
    let codes = Tensor::from_vec(codes, 256, &Device::Cpu).expect("codes");
    for dtype in TYPES {
        let kernel = run("widen", dtype, &[256, 64 - 5], &[&codes]);
        let all = codes.to_vec1::<u8>().expect("codes");
        for (value, code) in kernel.iter().zip(all) {
            // Exact in either type.
            assert_eq!(*value, crate::weights::f8e4m3(code) / 32.0, "{code:#x}");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let x = Tensor::full(f32::NAN, (1, 1, 8), &Device::Cpu).expect("a tensor");
    let (zeros, bias) = (
        Tensor::zeros((1, 48), DType::F32, &Device::Cpu).expect("zeros"),
        Tensor::zeros(8, DType::F32, &Device::Cpu).expect("zeros"),
    );
    let out = run(
        "gate",
        DType::F32,
        &[1, 1, 8, 0, 2],
        &[&x, &zeros, &x, &bias],
    );
    assert!(out.iter().all(|x| x.is_nan()));
}

#[test]
fn dropout_drops_what_the_host_would_and_scales_the_rest() {
    for dtype in TYPES {
        // Seed and stream of more than 32 bits; a quarter is dropped.
        let (seed, stream) = (0x1234_5678_9abc_def0u64, 0x0fed_cba9_8765_4321u64);
        let halves = |n: u64| [(n & 0xffff_ffff) as usize, (n >> 32) as usize];
        let (key, place) = (halves(seed), halves(stream));
        let x = random(&[40, 56], 1, dtype);
        let numbers = [x.elem_count(), key[0], key[1], place[0], place[1], 16];
        let kernel = run("drop", dtype, &numbers, &[&x]);
        let truth = nn::dropout(&f32_of(&x), 0.25, seed, stream).expect("dropout");
        same("drop", dtype, &kernel, &truth);
        let dropped = kernel.iter().filter(|v| **v == 0.0).count();
        assert!(
            (450..670).contains(&dropped),
            "{dropped} of {}",
            kernel.len()
        );
    }
}

#[test]
fn gates_and_the_slopes_of_gates_and_norms_are_what_operations_say() {
    for (d, dtype) in [(48, TYPES[0]), (1040, TYPES[0]), (48, TYPES[1])] {
        let [x, g, more] = [1, 2, 3].map(|seed| random(&[5, d], seed, dtype));
        let weight = random(&[d], 4, dtype);
        let kernel = run("norm_back", dtype, &[5, d], &[&x, &weight, &g, &more]);
        let [x, weight, g, more] = [&x, &weight, &g, &more].map(f32_of);
        let truth = nn::rms_norm_back_onto(&x, &weight, 1e-6, &g, &more).expect("a slope");
        same("norm_back", dtype, &kernel, &truth);
    }
    for dtype in TYPES {
        let [gate, up, g] = [1, 2, 3].map(|seed| random(&[7, 40], seed, dtype));
        let truth = nn::swiglu(&f32_of(&gate), &f32_of(&up)).expect("gated");
        let kernel = run("gated", dtype, &[gate.elem_count()], &[&gate, &up]);
        same("gated", dtype, &kernel, &truth);
        let kernel = run("gate_back", dtype, &[gate.elem_count()], &[&gate, &up, &g]);
        let (gate, up) =
            nn::swiglu_back(&f32_of(&gate), &f32_of(&up), &f32_of(&g)).expect("slopes");
        let truth = Tensor::cat(&[gate, up], 0).expect("both");
        same("gate_back", dtype, &kernel, &truth);
    }
}

#[test]
fn the_first_of_the_greatest_is_found_and_what_is_no_number() {
    for n in [1, 100, 128, 1003] {
        let values = random(&[6, n], 7, DType::F32).to_vec2::<f32>();
        let mut rows = values.expect("rows");
        // The greatest twice, far apart and side by side; all alike; negative; one that is none.
        let (first, last) = (n / 3, n - 1);
        (rows[0][first], rows[0][last]) = (9.0, 9.0);
        (rows[1][first], rows[1][(first + 1).min(last)]) = (9.0, 9.0);
        rows[2].fill(-3.0);
        rows[3].fill(f32::NEG_INFINITY);
        rows[4][last] = f32::NAN;
        let x = Tensor::new(rows.clone(), &Device::Cpu).expect("a tensor");
        let kernel = run("first_of_most", DType::F32, &[6, n], &[&x]);
        for (i, row) in rows.iter().enumerate() {
            if i == 4 {
                assert!(kernel[i].is_nan(), "of {n}");
                continue;
            }
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let place = row.iter().position(|v| *v == most).expect("the greatest");
            assert_eq!(kernel[i], place as f32, "row {i} of {n}");
        }
    }
}

#[test]
fn a_step_of_adamw_is_what_operations_say() {
    let [weight, first, slope] = [1, 2, 4].map(|seed| random(&[301], seed, DType::F32));
    let second = random(&[301], 3, DType::F32).abs().expect("squares");
    let kernel = run(
        "adamw",
        DType::F32,
        &[301],
        &[&weight, &first, &second, &slope],
    );
    // The harness's numbers, in the order of `Step::by_tensors`.
    let operations = || -> candle_core::Result<Tensor> {
        let g = slope.affine(0.5, 0.0)?;
        let first = (first.affine(0.9, 0.0)? + g.affine(0.1, 0.0)?)?;
        let second = (second.affine(0.99, 0.0)? + g.sqr()?.affine(0.01, 0.0)?)?;
        let below = second.affine(4.0, 0.0)?.sqrt()?.affine(1.0, 1e-6)?;
        let update = first.affine(0.02, 0.0)?.div(&below)?;
        let weight = (weight.affine(0.999, 0.0)? - update)?;
        Tensor::cat(&[weight, first, second], 0)
    };
    same("adamw", DType::F32, &kernel, &operations().expect("a step"));
}
