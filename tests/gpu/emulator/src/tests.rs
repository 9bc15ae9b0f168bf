//! Kernels written out by hand, run and compared with what they say.

use crate::memory::Memory;
use crate::ptx::{Kernel, Module};
use crate::run::{Fault, FaultKind, Launch, run};
use std::collections::HashMap;

fn kernel(body: &str) -> Kernel {
    let text = format!(
        ".version 9.0\n.target sm_90\n.address_size 64\n\
         .visible .entry k(\n.param .u64 k_param_0,\n.param .u64 k_param_1,\n.param .u32 k_param_2\n)\n{{\n\
         .reg .pred %p<8>;\n.reg .b16 %rs<8>;\n.reg .f32 %f<8>;\n.reg .b32 %r<16>;\n.reg .b64 %rd<16>;\n\
         ld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_1];\nld.param.u32 %r1, [k_param_2];\n\
         mov.u32 %r2, %tid.x;\nmov.u32 %r3, %ctaid.x;\nmov.u32 %r4, %ntid.x;\nmad.lo.s32 %r5, %r3, %r4, %r2;\n\
         mul.wide.u32 %rd3, %r5, 4;\nadd.s64 %rd4, %rd1, %rd3;\nadd.s64 %rd5, %rd2, %rd3;\n{body}\nret;\n}}\n"
    );
    let module = Module::read(&text).unwrap();
    module.kernel("k", &HashMap::new()).unwrap().unwrap()
}

/// Runs it on these numbers; what then stands in a second array as long.
fn on(
    kernel: &Kernel,
    blocks: u32,
    threads: u32,
    given: &[u32],
    last: u32,
) -> Result<Vec<u32>, Fault> {
    let mut orders = Vec::new();
    for reversed in [false, true] {
        let mut memory = Memory::new(1 << 24);
        let [from, to] = [0, 1].map(|_| memory.allocate(4 * given.len()).unwrap());
        let slice = |at: u64| {
            // SAFETY: allocated with that length just now, and nobody else has it.
            unsafe { std::slice::from_raw_parts_mut(at as *mut u32, given.len()) }
        };
        slice(from).copy_from_slice(given);
        let parameters = [
            &from.to_le_bytes()[..],
            &to.to_le_bytes(),
            &last.to_le_bytes(),
        ]
        .concat();
        let launch = Launch {
            kernel,
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
            parameters: &parameters,
            reversed,
        };
        let done = run(&launch, &memory.blocks).map(|()| slice(to).to_vec());
        memory.free(from);
        memory.free(to);
        orders.push(done?);
    }
    assert_eq!(orders[0], orders[1], "the order of warps decides");
    Ok(orders.remove(0))
}

fn floats(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_thread_of_every_block_has_its_own_number() {
    let doubled = kernel(
        "setp.ge.u32 %p1, %r5, %r1;\n@%p1 bra $END;\nld.global.f32 %f1, [%rd4];\n\
         fma.rn.f32 %f2, %f1, 0f40000000, 0f3F800000;\nst.global.f32 [%rd5], %f2;\n$END:",
    );
    let given: Vec<f32> = (0..1000).map(|i| i as f32 - 500.0).collect();
    let found = on(&doubled, 8, 128, &floats(&given), 1000).unwrap();
    let wanted: Vec<f32> = given.iter().map(|v| 2.0 * v + 1.0).collect();
    assert_eq!(found, floats(&wanted));
}

#[test]
fn lanes_that_part_meet_again() {
    // Each lane goes round as often as its number says, then all exchange.
    let parting = kernel(
        "ld.global.u32 %r6, [%rd4];\nmov.u32 %r7, 0;\n$MORE:\nsetp.eq.s32 %p1, %r6, 0;\n@%p1 bra $DONE;\n\
         add.s32 %r7, %r7, 3;\nsub.s32 %r6, %r6, 1;\nbra.uni $MORE;\n$DONE:\n\
         shfl.sync.bfly.b32 %r8|%p2, %r7, 1, 31, -1;\nst.global.u32 [%rd5], %r8;",
    );
    let given: Vec<u32> = (0..64).map(|i| i * 7 % 13).collect();
    let found = on(&parting, 1, 64, &given, 0).unwrap();
    let wanted: Vec<u32> = (0..64).map(|i| 3 * given[i ^ 1]).collect();
    assert_eq!(found, wanted);
}

#[test]
fn who_comes_early_to_an_exchange_waits() {
    // The loop stands behind the exchange, as compilers at times put it.
    let early = kernel(
        "ld.global.u32 %r6, [%rd4];\nsetp.ne.s32 %p1, %r6, 0;\n@%p1 bra $LONG;\n$MEET:\n\
         shfl.sync.down.b32 %r8|%p2, %r6, 16, 31, -1;\nst.global.u32 [%rd5], %r8;\nret;\n\
         $LONG:\nsub.s32 %r6, %r6, 1;\nsetp.gt.s32 %p1, %r6, 100;\n@%p1 bra $LONG;\nbra.uni $MEET;",
    );
    let given: Vec<u32> = (0..32).map(|i| if i < 16 { 0 } else { 200 + i }).collect();
    let found = on(&early, 1, 32, &given, 0).unwrap();
    assert!(found[..16].iter().all(|v| *v == 100), "{found:?}");
    assert_eq!(found[16..], [100; 16]);
}

#[test]
fn an_exchange_with_who_never_comes_is_a_fault() {
    let alone = kernel(
        "setp.gt.u32 %p1, %r2, 7;\n@%p1 bra $LOOP;\nshfl.sync.bfly.b32 %r8|%p2, %r2, 1, 31, -1;\n\
         st.global.u32 [%rd5], %r8;\nret;\n$LOOP:\nbar.sync 0;\nst.global.u32 [%rd5], %r2;",
    );
    let fault = on(&alone, 1, 32, &[0; 32], 0).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Launch);
    assert!(fault.text.contains("do not come"), "{}", fault.text);
}

#[test]
fn barriers_keep_warps_apart() {
    let turned = |barrier: &str| {
        kernel(&format!(
            ".shared .align 4 .b8 row[1024];\nmov.u32 %r6, row;\nshl.b32 %r7, %r2, 2;\nadd.s32 %r8, %r6, %r7;\n\
             ld.global.u32 %r9, [%rd4];\nst.shared.u32 [%r8], %r9;\n{barrier}\nsub.s32 %r10, 1020, %r7;\n\
             add.s32 %r11, %r6, %r10;\nld.shared.u32 %r12, [%r11];\nst.global.u32 [%rd5], %r12;"
        ))
    };
    let given: Vec<u32> = (0..256).collect();
    let wanted: Vec<u32> = given.iter().rev().copied().collect();
    assert_eq!(
        on(&turned("bar.sync 0;"), 1, 256, &given, 0).unwrap(),
        wanted
    );
    // Without it each order reads what has not been written.
    let without = std::panic::catch_unwind(|| on(&turned(""), 1, 256, &given, 0));
    assert!(without.is_err());
}

#[test]
fn an_access_past_the_end_or_across_is_named() {
    let past = kernel("ld.global.u32 %r6, [%rd4+4];\nst.global.u32 [%rd5], %r6;");
    let fault = on(&past, 1, 64, &[1; 64], 0).unwrap_err();
    assert_eq!(fault.kind, FaultKind::IllegalAddress);
    assert!(
        fault.text.contains("lane 31 reads 4 bytes"),
        "{}",
        fault.text
    );
    assert!(fault.text.contains("PTX line"), "{}", fault.text);
    let across = kernel("ld.global.u64 %rd6, [%rd4];");
    let fault = on(&across, 1, 32, &[1; 64], 0).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Misaligned);
}

#[test]
fn sums_of_all_threads_lose_none() {
    let sum = kernel("ld.global.f32 %f1, [%rd4];\nred.global.add.f32 [%rd2], %f1;");
    let given = vec![1f32; 4096];
    let mut begun = on(&sum, 16, 256, &floats(&given), 0).unwrap();
    // What was allocated is no number, and so is its sum with any.
    assert!(f32::from_bits(begun.remove(0)).is_nan());
    let count = kernel(
        "mov.u32 %r6, 0;\nsetp.ne.s32 %p1, %r5, 0;\n@!%p1 st.global.u32 [%rd2], %r6;\nbar.sync 0;\n\
         @%p1 atom.global.add.u32 %r7, [%rd2], 1;",
    );
    assert_eq!(on(&count, 1, 256, &[0; 256], 0).unwrap()[0], 255);
}

#[test]
fn numbers_are_packed_rounded_and_carried() {
    let parts = kernel(
        "ld.global.u32 %r6, [%rd4];\nmov.b32 {%rs1, %rs2}, %r6;\nmov.b32 %r7, {%rs2, %rs1};\n\
         { .reg .b16 low; cvt.u16.u32 low, %r7; cvt.u32.u16 %r8, low; }\nadd.cc.u32 %r9, %r6, 0xFFFFFFFF;\n\
         addc.u32 %r10, 0, 0;\nprmt.b32 %r11, %r6, 0, 0xba98;\nxor.b32 %r12, %r8, %r11;\nadd.s32 %r12, %r12, %r10;\n\
         st.global.u32 [%rd5], %r12;",
    );
    let given = [0x8001_7fffu32, 0, 1, 0xffff_0000];
    let found = on(&parts, 1, 4, &given, 0).unwrap();
    let wanted = given.map(|v| {
        let signs = v
            .to_le_bytes()
            .map(|b| if b & 0x80 == 0 { 0 } else { 0xff });
        (v >> 16 ^ u32::from_le_bytes(signs)).wrapping_add(u32::from(v != 0))
    });
    assert_eq!(found, wanted);
    // Down where the nearest is above.
    let down = kernel(
        "ld.global.f32 %f1, [%rd4];\nfma.rm.f32 %f2, %f1, 0f3F800000, 0f4B400001;\nst.global.f32 [%rd5], %f2;",
    );
    let found = on(&down, 1, 2, &floats(&[0.75, -0.25]), 0).unwrap();
    assert_eq!(found, floats(&[12_582_913.0, 12_582_912.0]));
}

/// A product of 16 by 16 and 16 by 8 halves, both copied to shared memory first; the second as
/// columns, or as rows that are turned.
fn multiplying(turned: bool, wait: &str) -> Kernel {
    let (row, trans) = match turned {
        false => (
            "and.b32 u, %r2, 7;\nshl.b32 u, u, 5;\nshr.u32 v, %r2, 3;\nand.b32 v, v, 1;",
            "",
        ),
        true => ("mov.u32 u, 0;\nand.b32 v, %r2, 15;", ".trans"),
    };
    kernel(&format!(
        ".shared .align 16 .b8 both[768];\n{{\n.reg .b32 s, t, u, v, a<4>, b<4>;\n.reg .f32 d<4>;\n\
         .reg .pred q;\n.reg .b64 g;\nmov.u32 s, both;\nshl.b32 t, %r2, 4;\ncvt.u64.u32 g, t;\n\
         add.s64 g, %rd1, g;\nadd.s32 t, s, t;\ncp.async.cg.shared.global.L2::128B [t], [g], 16;\n\
         setp.lt.u32 q, %r2, 16;\n@q cp.async.cg.shared.global [t+512], [g+512], 16;\n\
         cp.async.commit_group;\ncp.async.commit_group;\n{wait}\nbar.sync 0;\n\
         and.b32 u, %r2, 15;\nshl.b32 u, u, 5;\nshr.u32 v, %r2, 4;\nshl.b32 v, v, 4;\n\
         add.s32 u, u, v;\nadd.s32 u, u, s;\n\
         ldmatrix.sync.aligned.x4.m8n8.shared.b16 {{a0, a1, a2, a3}}, [u];\n\
         {row}\nshl.b32 v, v, 4;\nadd.s32 u, u, v;\nadd.s32 u, u, s;\n\
         ldmatrix.sync.aligned.x4{trans}.m8n8.shared.b16 {{b0, b1, b2, b3}}, [u+512];\n\
         mov.f32 d0, 0f3F800000;\nmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{d0, d1, d2, d3}},\n\
         {{a0, a1, a2, a3}}, {{b0, b1}}, {{d0, d0, d0, d0}};\nshr.u32 u, %r2, 2;\nshl.b32 u, u, 5;\n\
         and.b32 v, %r2, 3;\nshl.b32 v, v, 3;\nadd.s32 u, u, v;\ncvt.u64.u32 g, u;\n\
         add.s64 g, %rd2, g;\nst.global.v2.f32 [g], {{d0, d1}};\nst.global.v2.f32 [g+256], {{d2, d3}};\n}}\n"
    ))
}

#[test]
fn matrices_are_spread_over_the_lanes_and_multiplied() {
    let left: Vec<f32> = (0..256).map(|i| (i * 37 % 19) as f32 - 9.0).collect();
    let right: Vec<f32> = (0..128).map(|i| (i * 29 % 23) as f32 - 11.0).collect();
    let wanted: Vec<f32> = (0..16 * 8)
        .map(|at| {
            let (row, column) = (at / 8, at % 8);
            // One is what each sum begins with.
            (0..16).fold(1.0, |sum, i| {
                sum + left[16 * row + i] * right[8 * i + column]
            })
        })
        .collect();
    let columns: Vec<f32> = (0..128).map(|at| right[8 * (at % 16) + at / 16]).collect();
    for (right, turned) in [(&columns, false), (&right, true)] {
        let halves: Vec<u32> = left
            .iter()
            .chain(right)
            .map(|v| v.to_bits() >> 16)
            .collect();
        let given: Vec<u32> = halves.chunks(2).map(|two| two[0] | two[1] << 16).collect();
        // The copies are one group, and an empty one comes after it.
        let whole = multiplying(turned, "cp.async.wait_group 0;");
        assert_eq!(
            on(&whole, 1, 32, &given, 0).unwrap()[..128],
            floats(&wanted)
        );
        let early = multiplying(turned, "cp.async.wait_group 1;");
        assert_eq!(
            on(&early, 1, 32, &given, 0).unwrap()[..128],
            floats(&wanted)
        );
        // What nobody waited for is not there.
        let early = multiplying(turned, "cp.async.wait_group 2;");
        let found = on(&early, 1, 32, &given, 0).unwrap();
        assert!(found[..128].iter().all(|v| f32::from_bits(*v).is_nan()));
    }
}

#[test]
fn what_a_launch_asks_for_lies_behind_what_a_kernel_has() {
    let text = ".extern .shared .align 16 .b8 asked[];\n.visible .entry k(\n.param .u64 k_param_0\n)\n{\n\
                .shared .align 4 .b8 own[20];\n.reg .b32 %r<4>;\n.reg .b64 %rd<2>;\n\
                ld.param.u64 %rd1, [k_param_0];\nmov.u32 %r1, own;\nmov.u32 %r2, asked;\n\
                sub.s32 %r3, %r2, %r1;\nst.shared.u32 [asked+12], %r3;\n\
                ld.shared.u32 %r3, [%r2+12];\nst.global.u32 [%rd1], %r3;\nret;\n}\n";
    let module = Module::read(text).unwrap();
    let kernel = module.kernel("k", &HashMap::new()).unwrap().unwrap();
    let mut memory = Memory::new(4096);
    let at = memory.allocate(4).unwrap();
    let mut launch = Launch {
        kernel: &kernel,
        grid: [1; 3],
        block: [1; 3],
        shared: 16,
        parameters: &at.to_le_bytes(),
        reversed: false,
    };
    run(&launch, &memory.blocks).unwrap();
    // SAFETY: allocated above.
    assert_eq!(unsafe { (at as *const u32).read() }, 32);
    launch.shared = 12;
    let fault = run(&launch, &memory.blocks).unwrap_err();
    assert_eq!(fault.kind, FaultKind::IllegalAddress);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let text = ".visible .entry k()\n{\n.reg .b32 %r<2>;\nwarp.drive.b32 %r1, %r1;\nret;\n}\n\
                .visible .entry fine()\n{\nret;\n}\n";
    let module = Module::read(text).unwrap();
    let refused = module.kernel("k", &HashMap::new()).unwrap_err();
    assert!(
        refused.contains("kernel k") && refused.contains("warp.drive.b32"),
        "{refused}"
    );
    assert!(module.kernel("fine", &HashMap::new()).unwrap().is_some());
    assert!(module.kernel("other", &HashMap::new()).unwrap().is_none());
}
