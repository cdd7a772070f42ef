//! Writes a made-up dump of any size, to see how learning does at scale.
//!
//!     cargo run --release -p leank-train --example synthetic_dump -- DIR GIB
//!
//! 8 layers of 8 query heads and 4 KV heads × 128, in f16; sequences of 65 536 tokens, with 4 decode
//! positions each, as many as GIB takes.

use std::{error::Error, path::PathBuf};

use leank_core::{Dtype, ModelShape};
use leank_train::synthetic::Synthetic;

const PREFIX: usize = 65_536;

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args_os().skip(1);
    let usage = "usage: synthetic_dump DIR GIB";
    let dir = PathBuf::from(words.next().ok_or(usage)?);
    let gib: usize = words.next().and_then(|word| word.to_str()?.parse().ok()).ok_or(usage)?;
    let shape = ModelShape::new(8, 8, 4, 128)?;
    // K and V.
    let sequence = 2 * shape.layers * shape.kv_heads * shape.head_dim * PREFIX * size_of::<u16>();
    let sequences = (gib << 30).div_ceil(sequence);
    let synthetic = Synthetic {
        shape,
        prefixes: vec![PREFIX; sequences],
        positions: 4,
        draws: 2,
        dtype: Dtype::F16,
        seed: 0,
    };
    synthetic.write(&dir)?;
    println!("{}: {sequences} sequences of {PREFIX} tokens, {shape}", dir.display());
    Ok(())
}
