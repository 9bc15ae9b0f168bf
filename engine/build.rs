//! With the feature `cuda`, compiles our kernels to PTX, which the driver compiles for its device.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/kernels");
    #[cfg(feature = "cuda")]
    compile();
}

#[cfg(feature = "cuda")]
fn compile() {
    let folder = std::env::var_os("OUT_DIR").expect("cargo names a folder for what is built");
    // Each file by itself: a folder does not change with what its files say.
    let files: Vec<_> = std::fs::read_dir("src/kernels")
        .expect("the kernels' sources")
        .map(|entry| entry.expect("one of the kernels' sources").path())
        .collect();
    let built = cudaforge::KernelBuilder::new()
        .source_files(["src/kernels/kernels.cu"])
        .watch(files)
        .arg("-O3")
        .build_ptx()
        .and_then(|kernels| kernels.write(std::path::Path::new(&folder).join("kernels.rs")));
    if let Err(error) = built {
        panic!("the CUDA kernels do not compile: {error}");
    }
}
