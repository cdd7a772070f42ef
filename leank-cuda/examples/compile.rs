//! Compiles every kernel for some compute capabilities, which takes NVRTC and no GPU, and prints
//! registers and spills:
//!
//!     cargo run -p leank-cuda --example compile -- 8.0 9.0 10.0

use std::{error::Error, process::ExitCode};

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(spilling) => {
            eprintln!("{spilling} kernels spill registers");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("compile: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The number of kernels that spill.
fn run() -> Result<usize, Box<dyn Error>> {
    let mut spilling = 0;
    for argument in std::env::args().skip(1) {
        let usage = || format!("`{argument}` is not a compute capability such as 9.0");
        let (major, minor) = argument.split_once('.').ok_or_else(usage)?;
        let capability = (major.parse()?, minor.parse()?);
        for report in leank_cuda::compile_all(capability)? {
            let (stores, loads) = report.spills;
            let spills = match stores + loads {
                0 => String::new(),
                _ => format!("  SPILLS {stores} bytes stored, {loads} loaded"),
            };
            spilling += usize::from(stores + loads > 0);
            println!(
                "sm_{major}{minor} {:>3} registers  {}{spills}",
                report.registers, report.name
            );
        }
    }
    Ok(spilling)
}
