//! Dense and lean attention of the CPU backend beside the read bandwidth.

use std::{
    num::NonZeroUsize,
    sync::Arc,
    thread::available_parallelism,
    time::{Duration, Instant},
};

use leank_core::{Backend as _, Dtype, HeadPrecision};
use leank_cpu::{Cpu, CpuCache, Rayon};
use rayon::ThreadPool;
use serde::Serialize;

use crate::{
    Error, Result,
    bandwidth::ReadProbe,
    setting::HeadShape,
    stats::{Round, Summary, median, summarize, time_ratio},
    workload::{Variant, Workload, WorkloadOptions},
};

/// What is measured: every shape at every context in every type on every number of threads.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Heads of a layer.
    pub shapes: Vec<HeadShape>,
    /// Tokens that the query sees; multiples of 64.
    pub contexts: Vec<usize>,
    /// Storage types.
    pub dtypes: Vec<Dtype>,
    /// Threads.
    pub threads: Vec<usize>,
    /// The lean cache.
    pub lean: Variant,
    /// Formats of its lean blocks, each in a cache of its own.
    pub formats: Vec<HeadPrecision>,
    /// Rounds, at least one.
    pub rounds: usize,
    /// Least milliseconds per measurement and round.
    pub millis: u64,
    /// Least bytes of each cache and of the bandwidth probe; many times the last-level cache.
    pub footprint: u64,
}

/// What was measured, and where.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The processor, as the system names it.
    pub machine: String,
    /// Threads that the system runs at once.
    pub cores: usize,
    /// Our backend and kernel.
    pub backend: String,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Least bytes of each cache.
    pub footprint: u64,
    /// In the order of the options: shapes, contexts, types, threads, formats.
    pub rows: Vec<Row>,
}

/// One setting.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name of the shape.
    pub shape: String,
    /// Its heads.
    pub heads: HeadShape,
    /// Tokens that the query sees.
    pub context: usize,
    /// Storage type.
    pub dtype: Dtype,
    /// Formats of the lean cache, as in `k8v8`.
    pub formats: String,
    /// Threads.
    pub threads: usize,
    /// Read bandwidth, 10⁹ bytes per second, median.
    pub bandwidth_gb_per_s: f64,
    /// The dense cache.
    pub dense: Summary,
    /// The lean cache.
    pub lean: Summary,
    /// Time of lean over dense, median of the rounds' ratios.
    pub time_ratio: f64,
    /// Bytes of lean over dense: where time would be if reading were all.
    pub bytes_ratio: f64,
}

/// Runs the measurement. `progress` is called with each row as it is done.
///
/// # Errors
/// [`Error::Option`] for an empty list or an option that cannot be measured; [`Error::Memory`] and
/// [`Error::Threads`] when the system refuses; [`Error::Cache`] for what the backend refuses.
pub fn measure(options: &CpuOptions, mut progress: impl FnMut(&Row)) -> Result<Report> {
    check(options)?;
    let pools = options.threads.iter().map(|&threads| pool(threads)).collect::<Result<Vec<_>>>()?;
    let probe = ReadProbe::new(usize::try_from(options.footprint).unwrap_or(usize::MAX))?;
    let backend = Cpu::with_executor(Arc::new(Rayon));
    let mut rows = Vec::new();
    for (shape, context, dtype) in settings(options) {
        let make = |variant, formats| {
            let footprint = options.footprint;
            let sequences = 1;
            let options =
                WorkloadOptions { shape, context, sequences, dtype, variant, formats, footprint };
            Workload::new(&backend, &options)
        };
        // The caches of one setting at a time bound the memory; the thread counts share them.
        let dense = make(Variant::Dense, HeadPrecision::default())?;
        let lean = options.formats.iter().map(|&formats| make(options.lean, formats));
        let mut caches = Caches { dense, lean: lean.collect::<Result<_>>()? };
        let mut rounds = vec![Vec::new(); pools.len()];
        for _ in 0..options.rounds {
            for (pool, rounds) in pools.iter().zip(&mut rounds) {
                let least = Duration::from_millis(options.millis);
                rounds.push(pool.install(|| caches.round(&probe, least))?);
            }
        }
        for (&threads, rounds) in options.threads.iter().zip(&rounds) {
            for (i, &formats) in options.formats.iter().enumerate() {
                let rounds: Vec<Round> = rounds.iter().map(|of_formats| of_formats[i]).collect();
                let bytes = (caches.dense.call_bytes(), caches.lean[i].call_bytes());
                let row = row((shape, context, dtype), (threads, formats), bytes, &rounds)?;
                progress(&row);
                rows.push(row);
            }
        }
    }
    Ok(Report {
        machine: machine(),
        cores: available_parallelism().map_or(1, NonZeroUsize::get),
        backend: backend.name(),
        rounds: options.rounds,
        footprint: options.footprint,
        rows,
    })
}

type Setting = (HeadShape, usize, Dtype);

fn settings(options: &CpuOptions) -> impl Iterator<Item = Setting> {
    options.shapes.iter().flat_map(move |&shape| {
        options.contexts.iter().flat_map(move |&context| {
            options.dtypes.iter().map(move |&dtype| (shape, context, dtype))
        })
    })
}

fn check(options: &CpuOptions) -> Result<()> {
    for (what, count) in [
        ("shapes", options.shapes.len()),
        ("contexts", options.contexts.len()),
        ("storage types", options.dtypes.len()),
        ("thread counts", options.threads.len()),
        ("formats", options.formats.len()),
        ("rounds", options.rounds),
    ] {
        if count == 0 {
            return Err(Error::option(what, "at least one", "none"));
        }
    }
    if options.threads.contains(&0) {
        return Err(Error::option("threads", "at least 1", 0));
    }
    if options.footprint < size_of::<u64>() as u64 {
        return Err(Error::option("footprint", "at least 8 bytes", options.footprint));
    }
    Ok(())
}

pub(crate) fn pool(threads: usize) -> Result<ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|source| Error::Threads { threads, source })
}

struct Caches {
    dense: Workload<CpuCache>,
    /// One for each of the formats.
    lean: Vec<Workload<CpuCache>>,
}

impl Caches {
    /// One round on the current pool: the bandwidth, dense, lean in every format.
    fn round(&mut self, probe: &ReadProbe, least: Duration) -> Result<Vec<Round>> {
        let pass = seconds(least, || {
            probe.pass();
            Ok(())
        })?;
        let dense = seconds(least, || self.dense.sweep())? / self.dense.layers() as f64;
        let round = |lean: &mut Workload<CpuCache>| {
            let lean = seconds(least, || lean.sweep())? / lean.layers() as f64;
            Ok(Round { bandwidth: probe.bytes() as f64 / pass, dense, lean })
        };
        self.lean.iter_mut().map(round).collect()
    }
}

/// Seconds of one run of `work`, the median over at least `least` time and one run.
pub(crate) fn seconds(least: Duration, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    let mut times = Vec::new();
    loop {
        let start = Instant::now();
        work()?;
        times.push(start.elapsed().as_secs_f64());
        if begin.elapsed() >= least {
            break;
        }
    }
    // Clocks may be coarse; ratios of nothing are not numbers.
    Ok(median(times).unwrap_or_default().max(1e-9))
}

fn row(
    (heads, context, dtype): Setting,
    (threads, formats): (usize, HeadPrecision),
    (dense, lean): (f64, f64),
    rounds: &[Round],
) -> Result<Row> {
    let none = || Error::option("rounds", "at least one", "none");
    Ok(Row {
        shape: heads.to_string(),
        heads,
        context,
        dtype,
        formats: formats.to_string(),
        threads,
        bandwidth_gb_per_s: median(rounds.iter().map(|round| round.bandwidth / 1e9))
            .ok_or_else(none)?,
        dense: summarize(rounds, dense, |round| round.dense).ok_or_else(none)?,
        lean: summarize(rounds, lean, |round| round.lean).ok_or_else(none)?,
        time_ratio: time_ratio(rounds).ok_or_else(none)?,
        bytes_ratio: lean / dense,
    })
}

/// The processor's name where the system tells (Linux), the architecture otherwise.
pub(crate) fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> CpuOptions {
        CpuOptions {
            shapes: vec![HeadShape::B, HeadShape::SMOLLM2],
            contexts: vec![512],
            dtypes: vec![Dtype::F16, Dtype::F32],
            threads: vec![1, 2],
            lean: Variant::Lean,
            formats: vec![HeadPrecision::default(), "k8v4".parse().unwrap()],
            rounds: 2,
            millis: 1,
            footprint: 1 << 20,
        }
    }

    #[test]
    fn every_setting_is_measured_in_order() {
        let mut seen = 0;
        let report = measure(&options(), |_| seen += 1).unwrap();
        let settings = report
            .rows
            .iter()
            .map(|row| (&row.shape[..], row.dtype, row.threads, &row.formats[..]));
        let settings: Vec<_> = settings.collect();
        let mut expected = Vec::new();
        for shape in ["B", "smollm2"] {
            for dtype in [Dtype::F16, Dtype::F32] {
                for threads in [1, 2] {
                    expected.extend(["k16v16", "k8v4"].map(|name| (shape, dtype, threads, name)));
                }
            }
        }
        assert_eq!(settings, expected);
        assert_eq!(seen, expected.len());
        for row in &report.rows {
            // Both are numbers of bytes, not times: exact.
            assert!(row.lean.bytes < row.dense.bytes);
            assert_eq!(row.bytes_ratio, row.lean.bytes / row.dense.bytes);
            assert!(row.time_ratio.is_finite() && row.bandwidth_gb_per_s.is_finite());
            assert!(row.dense.ms_min <= row.dense.ms && row.dense.ms <= row.dense.ms_max);
        }
    }

    #[test]
    fn nothing_to_measure_is_an_error() {
        for bad in [
            CpuOptions { shapes: vec![], ..options() },
            CpuOptions { contexts: vec![], ..options() },
            CpuOptions { dtypes: vec![], ..options() },
            CpuOptions { threads: vec![], ..options() },
            CpuOptions { threads: vec![0], ..options() },
            CpuOptions { formats: vec![], ..options() },
            CpuOptions { rounds: 0, ..options() },
            CpuOptions { footprint: 0, ..options() },
            CpuOptions { contexts: vec![100], ..options() },
        ] {
            let error = measure(&bad, |_| ()).unwrap_err();
            assert!(matches!(error, Error::Option { .. }), "{error}");
        }
    }
}
