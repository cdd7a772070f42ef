//! What `leank --version` says: what was compiled in and what is found here.

use leank::{Backend as _, cpu::Cpu, cuda};

/// More devices than any machine has.
const MAX_DEVICES: usize = 64;

/// The version, the cargo features, the CPU's kernel and the CUDA devices. Looking for devices takes a
/// moment: for `--version` alone.
pub(crate) fn long() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let rust = env!("CARGO_PKG_RUST_VERSION");
    format!(
        "{version}\nfeatures: cli, with cpu, cuda, train, candle and interop; Rust {rust} or later\n{}\n{}",
        Cpu::new().name(),
        devices()
    )
}

fn devices() -> String {
    match cuda::probe(0) {
        Err(error) => error.to_string(),
        Ok(first) => {
            let others = (1..MAX_DEVICES).map_while(|ordinal| cuda::probe(ordinal).ok());
            let all = std::iter::once(first).chain(others);
            all.map(|device| device.to_string()).collect::<Vec<_>>().join("\n")
        }
    }
}
