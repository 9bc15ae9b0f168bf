//! One libFuzzer program for each target: the target of the program's own name.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use simpatico_fuzz::Target;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

fn this() -> &'static Target {
    simpatico_fuzz::target(env!("CARGO_BIN_NAME")).expect("a target of this program's name")
}

fuzz_target!(|bytes: &[u8]| {
    // libFuzzer's hook aborts at every panic, also at those of decoders that our code catches.
    static HOOK: Once = Once::new();
    HOOK.call_once(|| drop(std::panic::take_hook()));
    if catch_unwind(AssertUnwindSafe(|| (this().run)(bytes))).is_err() {
        std::process::abort();
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, _seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    let mut bytes = data[..size].to_vec();
    (this().mend)(&mut bytes);
    let size = bytes.len().min(max_size);
    data[..size].copy_from_slice(&bytes[..size]);
    size
});
