//! Steps that are not one long sequence on an idle machine: many short sequences, a busy core.

use std::{sync::Arc, time::Duration};

use leank_core::{Backend as _, Dtype, HeadPrecision};
use leank_cpu::{Cpu, CpuCache, DEFAULT_SPIN, Pool};
use serde::Serialize;

use crate::{
    Error, Result,
    cpu::{machine, seconds},
    setting::HeadShape,
    stats::median,
    workload::{Variant, Workload, WorkloadOptions},
};

/// What is measured.
#[derive(Clone, Debug)]
pub struct StepsOptions {
    /// Heads of a layer.
    pub shape: HeadShape,
    /// Storage type.
    pub dtype: Dtype,
    /// Which cache.
    pub variant: Variant,
    /// Short sequences of a step.
    pub sequences: usize,
    /// Tokens of each of them; the long one has those of all.
    pub context: usize,
    /// Threads of our pool.
    pub threads: usize,
    /// Rounds, at least one.
    pub rounds: usize,
    /// Least milliseconds per measurement and round.
    pub millis: u64,
    /// Least bytes of each cache.
    pub footprint: u64,
}

/// What was measured, and where. Ratios are formed within a round; medians over rounds.
#[derive(Clone, Debug, Serialize)]
pub struct StepsReport {
    /// The processor, as the system names it.
    pub machine: String,
    /// Our backend and kernel.
    pub backend: String,
    /// Bytes that a step of the short sequences reads, per layer.
    pub short_bytes: f64,
    /// Bytes that a step of the long one reads, per layer.
    pub long_bytes: f64,
    /// Milliseconds per layer of a step of the short sequences.
    pub short_ms: f64,
    /// Milliseconds per layer of a step of the long one.
    pub long_ms: f64,
    /// Time per byte of the short sequences over that of the long one.
    pub short_over_long: f64,
    /// Time of the long one beside a process that keeps one core busy, over that without.
    pub busy_over_idle: f64,
}

/// A neighbour that keeps one core busy from its start until it is dropped.
pub trait Busy {
    /// Starts it.
    ///
    /// # Errors
    /// When the system refuses.
    fn start(&self) -> std::io::Result<Box<dyn std::any::Any>>;
}

/// Runs the measurement.
///
/// # Errors
/// [`Error::Option`] for what cannot be measured, [`Error::Cache`] for what the backend refuses,
/// [`Error::Busy`] when the neighbour does not start.
pub fn measure(options: &StepsOptions, busy: &dyn Busy) -> Result<StepsReport> {
    let pool = Pool::with_spin(threads(options.threads)?, DEFAULT_SPIN)?;
    let backend = Cpu::with_executor(Arc::new(pool));
    let make = |context, sequences| -> Result<Workload<CpuCache>> {
        let StepsOptions { shape, dtype, variant, footprint, .. } = *options;
        let formats = HeadPrecision::default();
        let options =
            WorkloadOptions { shape, context, sequences, dtype, variant, formats, footprint };
        Workload::new(&backend, &options)
    };
    let long_context = options.context.saturating_mul(options.sequences);
    let mut short = make(options.context, options.sequences)?;
    let mut long = make(long_context, 1)?;

    let least = Duration::from_millis(options.millis);
    let mut rounds = Vec::new();
    for _ in 0..options.rounds {
        let time = |workload: &mut Workload<CpuCache>| -> Result<f64> {
            Ok(seconds(least, || workload.sweep())? / workload.layers() as f64)
        };
        let (few, one) = (time(&mut short)?, time(&mut long)?);
        let neighbour = busy.start().map_err(|source| Error::Busy { source })?;
        let beside = time(&mut long)?;
        drop(neighbour);
        rounds.push((few, one, beside));
    }
    let (short_bytes, long_bytes) = (short.call_bytes(), long.call_bytes());
    let over = |pick: &dyn Fn(&(f64, f64, f64)) -> f64| {
        let none = || Error::option("rounds", "at least one", "none");
        median(rounds.iter().map(pick)).ok_or_else(none)
    };
    Ok(StepsReport {
        machine: machine(),
        backend: backend.name(),
        short_bytes,
        long_bytes,
        short_ms: over(&|round| round.0 * 1e3)?,
        long_ms: over(&|round| round.1 * 1e3)?,
        short_over_long: over(&|round| round.0 / short_bytes / (round.1 / long_bytes))?,
        busy_over_idle: over(&|round| round.2 / round.1)?,
    })
}

fn threads(count: usize) -> Result<std::num::NonZeroUsize> {
    std::num::NonZeroUsize::new(count).ok_or_else(|| Error::option("threads", "at least 1", 0))
}

impl std::fmt::Display for StepsReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}; {}\n", self.machine, self.backend)?;
        let line = |ms: f64, bytes: f64| {
            format!(
                "{ms:>9.3} ms per layer, {:>7.2} MB, {:>6.2} GB/s",
                bytes / 1e6,
                bytes / ms / 1e6
            )
        };
        writeln!(f, "short sequences {}", line(self.short_ms, self.short_bytes))?;
        writeln!(f, "one long one    {}", line(self.long_ms, self.long_bytes))?;
        writeln!(f, "time per byte, short over long     {:.2}", self.short_over_long)?;
        writeln!(f, "time, one core busy over none busy {:.2}", self.busy_over_idle)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Counted(Cell<usize>);

    impl Busy for Counted {
        fn start(&self) -> std::io::Result<Box<dyn std::any::Any>> {
            self.0.set(self.0.get() + 1);
            Ok(Box::new(()))
        }
    }

    fn options() -> StepsOptions {
        StepsOptions {
            shape: HeadShape::B,
            dtype: Dtype::F16,
            variant: Variant::Dense,
            sequences: 4,
            context: 128,
            threads: 2,
            rounds: 2,
            millis: 1,
            footprint: 1 << 20,
        }
    }

    #[test]
    fn short_and_long_read_the_same_bytes() {
        let busy = Counted(Cell::new(0));
        let report = measure(&options(), &busy).unwrap();
        assert_eq!(busy.0.get(), 2, "a neighbour per round");
        assert_eq!(report.short_bytes, report.long_bytes);
        assert!(report.short_over_long > 0.0 && report.busy_over_idle > 0.0);
        assert!(report.to_string().contains("short over long"));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let busy = Counted(Cell::new(0));
        for bad in [
            StepsOptions { sequences: 0, ..options() },
            StepsOptions { context: 100, ..options() },
            StepsOptions { threads: 0, ..options() },
            StepsOptions { rounds: 0, ..options() },
        ] {
            let error = measure(&bad, &busy).unwrap_err();
            assert!(matches!(error, Error::Option { .. }), "{error}");
        }
    }
}
