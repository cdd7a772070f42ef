//! A soak of continuous batching: simulated users for minutes or hours, and after everything that
//! happens a look whether it was right.
//!
//! Several caches of different types, formats, masks and windows take turns, each with a scheduler and
//! users of its own, in simulated time: requests come in bursts, with prompts and answers of heavy
//! tails, some behind a prefix that others share; some want several answers, some are drafted and partly
//! taken back, some users want another answer or give up. Where the limit on bytes refuses a step,
//! somebody makes room: saved and restored, or released and computed again.
//!
//! What is looked at, after every event: the cache's [`leank_core::Memory`] is to the byte that of
//! [`leank_testkit::blocks::Books`], which knows nothing of the cache's own books; every sequence has the
//! tokens and, where nothing was taken back, the blocks that [`leank_core::Planner`] says; the limit
//! refuses exactly what does not fit, naming what is missing. Of some steps every output of a sequence is
//! compared with the oracle of `leank-core`: K, V and q are functions of who wrote a token and where it
//! stands, so that none are kept for it. Memory of the process and of the device must not grow.
//!
//! A seed decides everything but the measured memory, so that a failure comes again.

mod counts;
mod growth;
mod server;
mod subject;
mod traffic;

use std::{
    fmt,
    num::NonZeroUsize,
    sync::Arc,
    time::{Duration, Instant},
};

use leank_core::{Backend, CacheConfig, Dtype, HeadPrecision, ModelShape, Planner, Windows};
use leank_cpu::{Cpu, DEFAULT_SPIN, Executor, Pool, Serial};
use leank_cuda::Cuda;
use leank_testkit::Subject;
use leank_train::rng::Rng;
use serde::Serialize;

use crate::{Error, Result, setting::mixed_mask};

pub use counts::Counts;
pub use growth::Growth;
use growth::Samples;
use server::{Checked, Server, Setting};
use subject::{OnCpu, OnCuda};

/// Time between two looks at the memory, and between two lines of progress.
const LOOK: Duration = Duration::from_secs(1);
const TELL: Duration = Duration::from_secs(15);

/// What is run, and for how long.
#[derive(Clone, Debug)]
pub struct SoakOptions {
    /// Decides everything that happens.
    pub seed: u64,
    /// Most time.
    pub time: Duration,
    /// Most steps, all caches together.
    pub steps: u64,
    /// Times as many users and as much memory; 1 keeps two dozen sequences of a cache running.
    pub scale: NonZeroUsize,
    /// Most tokens of a request, at least 64.
    pub longest: usize,
    /// One step of so many is compared with the oracle.
    pub sample: NonZeroUsize,
    /// Most bytes that the memory of the process, and of the device, may grow after the first quarter
    /// of the run.
    pub growth: u64,
}

impl Default for SoakOptions {
    /// 20 minutes of users for one CPU.
    fn default() -> Self {
        Self {
            seed: 1,
            time: Duration::from_secs(20 * 60),
            steps: u64::MAX,
            scale: NonZeroUsize::MIN,
            longest: 2048,
            sample: NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN),
            growth: 8 << 20,
        }
    }
}

/// What one cache of a soak has of its own.
struct Own<'a> {
    name: &'static str,
    /// Layers, query heads, KV heads, head_dim.
    shape: [usize; 4],
    dtype: Dtype,
    /// Formats that heads take in turn.
    formats: &'a [&'a str],
    block: usize,
    /// Sink and recent.
    windows: [usize; 2],
    soft_cap: Option<f32>,
}

/// The caches of a soak: together they have every type, format and kind of head.
const OWN: [Own<'static>; 3] = [
    Own {
        name: "f16, heads in 16, 8 and 4 bits",
        shape: [3, 6, 2, 64],
        dtype: Dtype::F16,
        formats: &["k16v16", "k8v8", "k4v4", "k8v4", "k16v8", "k4v16"],
        block: 16,
        windows: [16, 48],
        soft_cap: None,
    },
    Own {
        name: "bf16, plain",
        shape: [2, 6, 2, 128],
        dtype: Dtype::Bf16,
        formats: &["k16v16"],
        block: 32,
        windows: [40, 100],
        soft_cap: None,
    },
    Own {
        name: "bf16, heads in 8 and 4 bits, soft-cap",
        shape: [4, 4, 1, 64],
        dtype: Dtype::Bf16,
        formats: &["k8v8", "k4v4", "k8v4"],
        block: 64,
        windows: [32, 128],
        soft_cap: Some(30.0),
    },
];

impl Own<'_> {
    fn setting(&self, options: &SoakOptions, backend: &impl Backend, seed: u64) -> Result<Setting> {
        let [layers, query_heads, kv_heads, head_dim] = self.shape;
        let shape = ModelShape::new(layers, query_heads, kv_heads, head_dim)?;
        let names = self.formats.iter().map(|name| name.parse());
        let formats: Vec<HeadPrecision> = names.collect::<leank_core::Result<_>>()?;
        let heads = (0..layers * kv_heads).map(|head| {
            // One further in each layer, so that not the same kept counts meet the same formats.
            formats[(head + head / kv_heads) % formats.len()].format(self.dtype)
        });
        let [sink, recent] = self.windows;
        let config = CacheConfig {
            dtype: self.dtype,
            block: self.block,
            windows: Windows { sink, recent },
            soft_cap: self.soft_cap,
            formats: Some(heads.collect()),
            ..CacheConfig::new(shape, mixed_mask(&shape)?)?
        };
        // Room for a few of the longest requests, or for two dozen usual ones.
        let longest = Planner::new(&config, backend.layout_rules())?.footprint(options.longest)?;
        let scale = options.scale.get();
        let limit = Some(4 * longest.peak_bytes * scale as u64);
        Ok(Setting {
            name: self.name,
            config: CacheConfig { limit, ..config },
            longest: options.longest,
            scale,
            seed,
            sample: options.sample.get(),
        })
    }
}

impl SoakOptions {
    fn settings(&self, backend: &impl Backend) -> Result<Vec<Setting>> {
        if self.longest < 64 {
            return Err(Error::option("longest request", "at least 64 tokens", self.longest));
        }
        let mut seeds = Rng::new(self.seed);
        OWN.iter().map(|own| own.setting(self, backend, seeds.next_u64())).collect()
    }

    /// Says what was wrong in a step, where something was, and how to come there again.
    fn broken(&self, step: u64, name: &str, done: Checked) -> Option<String> {
        let why = done.err()?;
        let Self { seed, scale, longest, sample, .. } = self;
        Some(format!(
            "seed {seed}, step {step}, cache \"{name}\": {why}; --seed {seed} --steps {step} \
             --scale {scale} --longest {longest} --sample {sample} come there again"
        ))
    }
}

/// What happened, and whether it was right.
#[derive(Clone, Debug, Serialize)]
pub struct SoakReport {
    /// The backend, as it names itself.
    pub backend: String,
    /// The seed.
    pub seed: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// What happened to each cache, with what is special about it.
    pub caches: Vec<(&'static str, Counts)>,
    /// What happened to all of them.
    pub total: Counts,
    /// How memory changed: empty where the system does not say, or the run was too short to tell.
    pub memory: Vec<Growth>,
    /// Most bytes that it may have grown.
    pub allowed: u64,
    /// What was wrong first, where something was.
    pub broken: Option<String>,
}

/// A soak on the CPU, on so many threads.
///
/// # Errors
/// [`Error::Cache`] where the threads cannot be started; as [`on_cuda`].
pub fn on_cpu(
    threads: NonZeroUsize,
    options: &SoakOptions,
    progress: impl FnMut(&str),
) -> Result<SoakReport> {
    let executor: Arc<dyn Executor> = match threads.get() {
        1 => Arc::new(Serial),
        _ => Arc::new(Pool::with_spin(threads, DEFAULT_SPIN)?),
    };
    let resident = || growth::resident();
    soak(&OnCpu(Cpu::with_executor(executor)), options, &[("process", &resident)], progress)
}

/// A soak on a CUDA device.
///
/// # Errors
/// [`Error::Option`] for requests that are too short, [`Error::Cache`] where a cache cannot be made. What
/// breaks later is in the report.
pub fn on_cuda(
    cuda: &Cuda,
    options: &SoakOptions,
    progress: impl FnMut(&str),
) -> Result<SoakReport> {
    let resident = || growth::resident();
    let device = || {
        let (free, total) = cuda.stream().context().mem_get_info().ok()?;
        Some((total - free) as u64)
    };
    let memory: [Memory<'_>; 2] = [("process", &resident), ("device", &device)];
    soak(&OnCuda(cuda), options, &memory, progress)
}

/// Some memory, and its bytes in use where they are known.
type Memory<'a> = (&'static str, &'a dyn Fn() -> Option<u64>);

fn soak<S: Subject>(
    subject: &S,
    options: &SoakOptions,
    memory: &[Memory<'_>],
    mut progress: impl FnMut(&str),
) -> Result<SoakReport> {
    let settings = options.settings(subject.backend())?;
    let servers = settings.into_iter().map(|setting| Server::new(subject, setting));
    let mut servers = servers.collect::<leank_core::Result<Vec<_>>>()?;
    let mut samples: Vec<_> = memory.iter().map(|(name, _)| Samples::new(name)).collect();
    let (start, mut looked, mut told) = (Instant::now(), Duration::ZERO, Duration::ZERO);
    let (mut steps, mut broken) = (0, None);
    while broken.is_none() && steps < options.steps && start.elapsed() < options.time {
        let at = (steps % servers.len() as u64) as usize;
        steps += 1;
        let done = servers[at].step();
        broken = options.broken(steps, servers[at].name(), done);
        let now = start.elapsed();
        if now >= looked + LOOK {
            looked = now;
            for (samples, (_, bytes)) in samples.iter_mut().zip(memory) {
                bytes().into_iter().for_each(|bytes| samples.push(now.as_secs_f64(), bytes));
            }
        }
        if now >= told + TELL {
            told = now;
            progress(&line(now, &total(&servers), memory));
        }
    }
    for server in &mut servers {
        if broken.is_none() {
            let done = server.close();
            broken = options.broken(steps, server.name(), done);
        }
    }
    let memory: Vec<Growth> = samples.iter().filter_map(Samples::growth).collect();
    let grown = memory.iter().find(|growth| growth.grown > options.growth as f64);
    if let Some(Growth { memory, grown, .. }) = grown {
        let why = || format!("the memory of the {memory} grew by {:.1} MiB", mib(*grown));
        broken.get_or_insert_with(why);
    }
    Ok(SoakReport {
        backend: subject.backend().name(),
        seed: options.seed,
        seconds: start.elapsed().as_secs_f64(),
        total: total(&servers),
        caches: servers.into_iter().map(|server| (server.name(), server.counts)).collect(),
        memory,
        allowed: options.growth,
        broken,
    })
}

fn total<S: Subject>(servers: &[Server<'_, S>]) -> Counts {
    let mut total = Counts::default();
    servers.iter().for_each(|server| total.add(&server.counts));
    total
}

/// A line of progress.
fn line(after: Duration, counts: &Counts, memory: &[Memory<'_>]) -> String {
    let Counts { steps, tokens, saved, released, sampled, largest_share, .. } = counts;
    let mut line = format!(
        "{:>6.0} s {:>6.2} h simulated, {steps} steps, {tokens} tokens, {saved} saved, {released} \
         released, {sampled} sampled, at most {:.1} % of the bound",
        after.as_secs_f64(),
        counts.simulated_seconds / 3600.0,
        largest_share * 100.0
    );
    for (name, bytes) in memory {
        if let Some(bytes) = bytes() {
            line += &format!(", {name} {:.1} MiB", mib(bytes as f64));
        }
    }
    line
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

impl fmt::Display for SoakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, seed, seconds, caches, total, memory, allowed, broken } = self;
        writeln!(f, "{backend}; seed {seed}; {seconds:.0} s; {} caches:", caches.len())?;
        caches.iter().try_for_each(|(name, _)| writeln!(f, "  {name}"))?;
        writeln!(f)?;
        let all = || caches.iter().map(|(_, counts)| counts).chain([total]);
        let mut row = |name: &str, value: &dyn Fn(&Counts) -> String| {
            write!(f, "{name:<28}")?;
            all().try_for_each(|counts| write!(f, " {:>12}", value(counts)))?;
            writeln!(f)
        };
        row("hours simulated", &|counts| format!("{:.2}", counts.simulated_seconds / 3600.0))?;
        row("hours busy", &|counts| format!("{:.2}", counts.busy_seconds / 3600.0))?;
        for (i, (name, _)) in total.whole().into_iter().enumerate() {
            row(name, &|counts| counts.whole()[i].1.to_string())?;
        }
        row("largest error, % of bound", &|counts| format!("{:.1}", counts.largest_share * 100.0))?;
        writeln!(f)?;
        for Growth { memory, first, last, most, slope, grown } in memory {
            let [first, last, most] = [first, last, most].map(|bytes| mib(*bytes as f64));
            writeln!(
                f,
                "memory of the {memory}: {first:.1} MiB after the warm-up, {last:.1} at the end, at most \
                 {most:.1}; {:+.3} MiB a minute, which makes {:+.2} MiB of {:.0} allowed",
                mib(*slope),
                mib(*grown),
                mib(*allowed as f64)
            )?;
        }
        match broken {
            None => writeln!(f, "nothing broke"),
            Some(why) => writeln!(f, "BROKEN: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use leank_core::{Layer, LayoutRules, LeanFormat};
    use leank_cpu::CpuCache;
    use leank_testkit::Rows;

    use super::*;

    fn options() -> SoakOptions {
        SoakOptions {
            time: Duration::MAX,
            steps: 1500,
            longest: 256,
            sample: NonZeroUsize::new(8).unwrap(),
            growth: u64::MAX,
            ..SoakOptions::default()
        }
    }

    fn run(options: &SoakOptions) -> SoakReport {
        on_cpu(NonZeroUsize::MIN, options, |_| ()).unwrap()
    }

    #[test]
    fn a_short_soak_breaks_nothing() {
        let report = run(&options());
        assert!(report.broken.is_none(), "{report}");
        // What takes longer to happen is left to longer ones.
        let rare = ["turned away", "ended before a lean block", "times emptied"];
        for (name, count) in report.total.whole() {
            assert!(count > 0 || rare.contains(&name), "{name}: {report}");
        }
        assert!(report.total.largest_share > 0.0 && report.total.largest_share <= 1.0);
    }

    #[test]
    fn a_seed_decides_what_happens() {
        let options = SoakOptions { steps: 150, ..options() };
        let first = run(&options);
        assert_eq!(run(&options).caches, first.caches);
        assert_ne!(run(&SoakOptions { seed: 2, ..options }).caches, first.caches);
    }

    /// A backend with a fault.
    struct Faulty {
        cpu: OnCpu,
        /// Bytes at which it says that sections begin.
        section_align: usize,
        /// Factor on outputs.
        gain: f32,
    }

    impl Backend for Faulty {
        type Cache = CpuCache;

        fn name(&self) -> String {
            self.cpu.0.name()
        }

        fn layout_rules(&self) -> LayoutRules {
            LayoutRules { section_align: self.section_align, ..self.cpu.0.layout_rules() }
        }

        fn lean_formats(&self, full: Dtype) -> Vec<LeanFormat> {
            self.cpu.0.lean_formats(full)
        }

        fn create(&self, config: CacheConfig) -> leank_core::Result<CpuCache> {
            self.cpu.0.create(config)
        }
    }

    impl Subject for Faulty {
        type Backend = Self;

        fn backend(&self) -> &Self {
            self
        }

        fn append(
            &self,
            cache: &mut CpuCache,
            layer: Layer,
            k: &Rows,
            v: &Rows,
        ) -> leank_core::Result<()> {
            self.cpu.append(cache, layer, k, v)
        }

        fn attend(&self, cache: &mut CpuCache, layer: Layer, q: &Rows) -> leank_core::Result<Rows> {
            let mut out = self.cpu.attend(cache, layer, q)?;
            out.data.iter_mut().for_each(|x| *x *= self.gain);
            Ok(out)
        }

        fn arithmetic_error(&self, dtype: Dtype) -> f64 {
            self.cpu.arithmetic_error(dtype)
        }

        fn coded_arithmetic_error(&self) -> f64 {
            self.cpu.coded_arithmetic_error()
        }
    }

    #[test]
    fn what_is_wrong_is_found_and_named() {
        let run = |section_align, gain| {
            let cpu = OnCpu(Cpu::with_executor(Arc::new(Serial)));
            let faulty = Faulty { cpu, section_align, gain };
            soak(&faulty, &SoakOptions { steps: 300, ..options() }, &[], |_| ()).unwrap().broken
        };
        assert_eq!(run(64, 1.0), None);
        let drift = run(64, 1.001).unwrap();
        assert!(drift.contains("the oracle on stored values says"), "{drift}");
        assert!(drift.contains("--seed 1 --steps ") && drift.contains("cache \""), "{drift}");
        let bytes = run(4096, 1.0).unwrap();
        assert!(bytes.contains("memory after") && bytes.contains("expected"), "{bytes}");
    }

    #[test]
    fn what_grows_fails() {
        // A second goes by before memory is looked at.
        let options = SoakOptions {
            time: Duration::from_secs(5),
            steps: u64::MAX,
            growth: 1 << 20,
            ..options()
        };
        let start = Instant::now();
        let leak = || Some((start.elapsed().as_secs_f64() * f64::from(1 << 20)) as u64);
        let cpu = OnCpu(Cpu::with_executor(Arc::new(Serial)));
        let report = soak(&cpu, &options, &[("test", &leak)], |_| ()).unwrap();
        let broken = report.broken.unwrap();
        assert!(broken.contains("the memory of the test grew by"), "{broken}");
    }
}
