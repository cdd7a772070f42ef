//! Learns masks from a made-up dump with every method, and says how long it took.
//!
//! `cargo run --release -p leank-train --example learn [LAYERS] [SEQUENCES] [METHODS...]`

use std::{error::Error, time::Instant};

use leank_core::{Dtype, ModelShape, Windows};
use leank_train::{
    allocate::{AllocateOptions, Budget},
    learn::{LearnOptions, Method, learn_mask},
    synthetic::Synthetic,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let layers: usize = args.next().map_or(Ok(1), |arg| arg.parse())?;
    let sequences: usize = args.next().map_or(Ok(4), |arg| arg.parse())?;
    let mut methods: Vec<Method> = args.map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    if methods.is_empty() {
        methods = vec![Method::E2, Method::E1, Method::Static, Method::LeanK];
    }
    let dir = tempfile::tempdir()?;
    // The attention of SmolLM2-135M, which has 30 layers.
    let dump = Synthetic {
        shape: ModelShape::new(layers, 9, 3, 64)?,
        prefixes: (0..sequences).map(|i| 1024 + 2560 * i / sequences).collect(),
        positions: 128,
        draws: 2,
        dtype: Dtype::F16,
        seed: 0,
    }
    .write(&dir.path().join("dump"))?;
    for method in methods {
        let options = LearnOptions {
            method,
            windows: Windows { sink: 32, recent: 128 },
            ..Default::default()
        };
        let budget = AllocateOptions::new(Budget::KRatio(0.7));
        let start = Instant::now();
        let learned = learn_mask(&dump, &options, &budget, &|_| {})?;
        let summary = learned.mask.summary();
        println!(
            "{method}: {:.2} s, kept K {:.3}, dead heads {}, loss {:.6}",
            start.elapsed().as_secs_f64(),
            summary.kept_k,
            summary.dead_heads,
            learned.allocation.loss
        );
    }
    Ok(())
}
