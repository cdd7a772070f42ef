//! Compiles the decoder's kernels for some compute capabilities, which takes NVRTC and no GPU:
//!
//!     cargo run -p leank-bench --example compile_decoder -- 8.0 9.0 10.0

use std::{error::Error, process::ExitCode};

use half::bf16;
use leank_bench::decoder;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compile_decoder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    for argument in std::env::args().skip(1) {
        let usage = || format!("`{argument}` is not a compute capability such as 9.0");
        let (major, minor) = argument.split_once('.').ok_or_else(usage)?;
        // Machine code, so that the assembler has its say.
        let architecture = format!("sm_{major}{minor}");
        decoder::compile::<f32>(&architecture)?;
        decoder::compile::<bf16>(&architecture)?;
        println!("{architecture} the decoder's kernels, f32 and bf16");
    }
    Ok(())
}
