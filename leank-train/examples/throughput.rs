//! How fast the statistics of one head are on this machine, against the plain matrix product.
//!
//! `cargo run --release -p leank-train --example throughput [PREFIX] [SEQUENCES]`

use std::{error::Error, hint::black_box, time::Instant};

use leank_core::{Dtype, KvHead, Layer, ModelShape, Windows};
use leank_train::{
    order,
    stats::{HeadEvaluator, HeadMask, Want},
    synthetic::Synthetic,
};
use ndarray::{Array2, linalg::general_mat_mul};

fn main() -> Result<(), Box<dyn Error>> {
    let mut numbers = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let prefix = numbers.next().transpose()?.unwrap_or(2300);
    let sequences = numbers.next().transpose()?.unwrap_or(8);
    let dir = tempfile::tempdir()?;
    let (d, group, positions, draws) = (64, 3, 128, 2);
    let dump = Synthetic {
        shape: ModelShape::new(1, group, 1, d)?,
        prefixes: vec![prefix; sequences],
        positions,
        draws,
        dtype: Dtype::F16,
        seed: 0,
    }
    .write(&dir.path().join("dump"))?;

    let n = 1024;
    let (a, b) = (Array2::from_elem((n, n), 1f32), Array2::from_elem((n, n), 0.5f32));
    let mut c = Array2::zeros((n, n));
    let peak = 2.0 * (n as f64).powi(3) / best(|| general_mat_mul(1.0, &a, &b, 0.0, &mut c));
    black_box(&c);
    println!("sgemm {n}×{n}×{n}: {:.1} GFLOP/s", peak / 1e9);

    let layer = dump.layer(Layer(0))?;
    let windows = Windows { sink: 32, recent: 128 };
    let mut evaluator = HeadEvaluator::new(&layer, KvHead(0), windows);
    let scores = (sequences * group * positions * prefix) as f64;
    for kept in [64u16, 32, 8] {
        let mask = HeadMask::Kept((0..kept).collect());
        let flops = 2.0 * scores * (f64::from(kept) * (1 + draws) as f64 + (d * draws) as f64);
        evaluator.evaluate(&[], Some((&mask, Want::Quadratic)))?;
        let mut failed = None;
        let seconds = best(|| {
            failed =
                evaluator.evaluate(&[], Some((&mask, Want::Quadratic))).err().or(failed.take());
        });
        failed.map_or(Ok(()), Err)?;
        println!(
            "statistics with {kept} channels kept: {:.1} ms, {:.2} ns per logit, {:.1} GFLOP/s \
             ({:.0} % of sgemm)",
            seconds * 1e3,
            seconds / scores * 1e9,
            flops / seconds / 1e9,
            100.0 * flops / seconds / peak
        );
    }
    type Order = fn(&mut HeadEvaluator<'_>, usize) -> leank_train::Result<order::HeadCurve>;
    for (name, run) in [("E2", order::eliminate as Order), ("E1", order::eliminate_once)] {
        let mut evaluator = HeadEvaluator::new(&layer, KvHead(0), windows);
        let start = Instant::now();
        black_box(run(&mut evaluator, 8)?);
        let seconds = start.elapsed().as_secs_f64();
        println!("{name}: {:.1} ms, {:.2} ns per logit", seconds * 1e3, seconds / scores * 1e9);
    }
    Ok(())
}

/// Seconds of the best of three runs.
fn best(mut run: impl FnMut()) -> f64 {
    let time = |()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    [(); 3].map(time).into_iter().fold(f64::INFINITY, f64::min)
}
