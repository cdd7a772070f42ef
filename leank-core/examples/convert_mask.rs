//! Converts a mask file: `convert_mask IN OUT`, formats by extension
//! (.safetensors, .pth, .npy).

use std::{env, path::PathBuf, process::ExitCode};

use leank_core::files::{ReadOptions, read_mask, write_mask};

fn main() -> ExitCode {
    let paths: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [from, to] = &paths[..] else {
        eprintln!("usage: convert_mask IN OUT");
        return ExitCode::from(2);
    };
    match read_mask(from, &ReadOptions::default()).and_then(|mask| write_mask(to, &mask)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
