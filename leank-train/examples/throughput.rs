//! How fast the statistics are on this machine, where their time goes, and the share of the
//! machine's peak that they reach: all threads, one KV head each.
//!
//! `cargo run --release -p leank-train --example throughput [PREFIX] [SEQUENCES]`

use std::{
    hint::black_box,
    sync::{Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use leank_core::{Dtype, KvHead, Layer, ModelShape, Windows};
use leank_train::{
    Result,
    dump::HeadData,
    order,
    stats::{HeadEvaluator, HeadMask, Want},
    synthetic::Synthetic,
};
use pulp::{Arch, Simd, WithSimd};

/// Runs of each measurement, between which the peak is measured.
const ROUNDS: u32 = 5;
const WINDOWS: Windows = Windows { sink: 32, recent: 128 };

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let prefix = numbers.next().transpose()?.unwrap_or(2300);
    let sequences = numbers.next().transpose()?.unwrap_or(8);
    let dir = tempfile::tempdir()?;
    let threads = thread::available_parallelism()?.get();
    let (d, group, positions, draws) = (64, 3, 128, 2);
    let dump = Synthetic {
        shape: ModelShape::new(1, threads * group, threads, d)?,
        prefixes: vec![prefix; sequences],
        positions,
        draws,
        dtype: Dtype::F16,
        seed: 0,
    }
    .write(&dir.path().join("dump"))?;
    let layer = dump.layer(Layer(0))?;
    let logits = (threads * sequences * group * positions * prefix) as f64;

    // All through, so that both meet the same clock and the same neighbours.
    let peak = || {
        on_all(threads, |_| {
            black_box(Arch::new().dispatch(Peak));
            Ok(())
        })
    };
    let flops = threads as f64 * Arch::new().dispatch(Peak);
    let (mut peak_time, mut peaks) = (Duration::ZERO, 0);
    let mut measure = |run: &(dyn Fn(KvHead) -> Result<()> + Sync)| -> Result<Duration> {
        let mut time = Duration::ZERO;
        for _ in 0..ROUNDS {
            time += on_all(threads, |thread| run(KvHead(thread)))?;
            peak_time += peak()?;
            peaks += 1;
        }
        Ok(time / ROUNDS)
    };

    println!("{threads} threads, {sequences} sequences of {prefix} + {positions} tokens");
    let read = measure(&|head| {
        let mut data = HeadData::default();
        (0..sequences).try_for_each(|sequence| layer.read(head, sequence, &mut data))
    })?;
    let evaluators: Vec<_> = (0..threads)
        .map(|head| Mutex::new(HeadEvaluator::new(&layer, KvHead(head), WINDOWS)))
        .collect();
    let evaluate = |head: KvHead, losses: &[HeadMask], last: Option<&HeadMask>| {
        let mut evaluator = evaluators[head.0].lock().expect("no thread panics");
        evaluator.evaluate(losses, last.map(|mask| (mask, Want::Quadratic))).map(drop)
    };
    // From here on the outputs of the unmasked heads are known.
    on_all(threads, |thread| evaluate(KvHead(thread), &[HeadMask::Dead], None))?;
    let mut rates = Vec::new();
    for kept in [64u16, 32, 8] {
        let mask = HeadMask::Kept((0..kept).collect());
        let dead = measure(&|head| evaluate(head, &[HeadMask::Dead], None))?;
        let loss = measure(&|head| evaluate(head, std::slice::from_ref(&mask), None))?;
        let all = measure(&|head| evaluate(head, &[], Some(&mask)))?;
        let parts = [
            ("reading", read),
            ("g·V", dead.saturating_sub(read)),
            ("logits and softmax", loss.saturating_sub(dead)),
            ("contraction, A", all.saturating_sub(loss)),
        ];
        let parts = parts.map(|(name, time)| {
            format!("{name} {:.0} %", 100.0 * time.as_secs_f64() / all.as_secs_f64())
        });
        let flops = logits * f64::from(operations(kept.into(), d, draws));
        rates.push((format!("{kept} channels kept"), flops, all, parts.join(", ")));
    }
    type Order = fn(&mut HeadEvaluator<'_>, usize) -> Result<order::HeadCurve>;
    for (name, run) in [("E2", order::eliminate as Order), ("E1", order::eliminate_once)] {
        let time = measure(&|head| {
            run(&mut HeadEvaluator::new(&layer, head, WINDOWS), 8)
                .map(|curve| drop(black_box(curve)))
        })?;
        // E1: one evaluation of all, then g·V once more and the logits of all masks.
        let all = match name {
            "E2" => (8..=d).step_by(8).map(|kept| operations(kept, d, draws)).sum(),
            _ => operations(d, d, draws) + 2 * (d * draws + d) as u32,
        };
        rates.push((name.into(), logits * f64::from(all), time, String::new()));
    }
    let peak = flops * f64::from(peaks) / peak_time.as_secs_f64();
    println!("peak of f32 multiply-add: {:.1} GFLOP/s", peak / 1e9);
    for (name, flops, time, parts) in rates {
        let seconds = time.as_secs_f64();
        let (rate, per_logit) = (flops / seconds, seconds * threads as f64 / logits);
        println!(
            "{name}: {:.2} ns per logit and thread, {:.1} GFLOP/s, {:.0} % of the peak; {parts}",
            per_logit * 1e9,
            rate / 1e9,
            100.0 * rate / peak
        );
    }
    Ok(())
}

/// Operations of one evaluation per logit: see the module's documentation.
fn operations(kept: usize, d: usize, draws: usize) -> u32 {
    2 * (kept * (1 + draws) + d * draws) as u32
}

/// Seconds until the last of all threads is done.
fn on_all(threads: usize, run: impl Fn(usize) -> Result<()> + Sync) -> Result<Duration> {
    let start = Barrier::new(threads);
    thread::scope(|scope| {
        let spawn = |thread| {
            let (run, start) = (&run, &start);
            scope.spawn(move || {
                start.wait();
                let start = Instant::now();
                run(thread).map(|()| start.elapsed())
            })
        };
        let threads: Vec<_> = (0..threads).map(spawn).collect();
        let times = threads.into_iter().map(|thread| thread.join().expect("no thread panics"));
        times.collect::<Result<Vec<_>>>().map(|times| times.into_iter().max().unwrap_or_default())
    })
}

/// Multiply-adds that wait for nothing but each other's unit; their operations.
struct Peak;

impl WithSimd for Peak {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        const SUMS: usize = 12;
        const TIMES: u32 = 1 << 25;
        let factor = simd.splat_f32s(black_box(0.5));
        let mut sums = [factor; SUMS];
        for _ in 0..TIMES {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, factor, factor);
            }
        }
        black_box(sums);
        f64::from(TIMES) * (2 * SUMS * S::F32_LANES) as f64
    }
}
