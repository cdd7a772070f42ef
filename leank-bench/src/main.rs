//! The `leank-bench` command.
#![forbid(unsafe_code)]

mod decode_cpu_args;
mod decode_gpu_args;
mod soak_args;

use std::{
    any::Any,
    io::{self, Write as _},
    num::NonZeroUsize,
    path::PathBuf,
    process::{self, Child, ExitCode},
    sync::Arc,
    thread::{self, available_parallelism},
};

use clap::{Args, Parser, Subcommand};
use leank_bench::{
    accuracy::{self, AccuracyOptions},
    cpu::{self, CpuOptions},
    cuda::{self, Batch, CudaOptions},
    figure,
    setting::{DeviceFormats, HeadShape, Published},
    steps::{self, Busy, StepsOptions},
    table::{self, Table},
    worker::Worker,
    workload::Variant,
};
use leank_core::{DEFAULT_BLOCK, Dtype, HeadPrecision};
use leank_cpu::{Cpu, DEFAULT_SPIN, Isa, Pool};

use decode_cpu_args::DecodeCpuArgs;
use decode_gpu_args::DecodeGpuArgs;
use soak_args::SoakArgs;

/// Measure what a lean cache is worth on this machine.
///
/// Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 wrong arguments.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Cpu(CpuArgs),
    Cuda(CudaArgs),
    DecodeCpu(DecodeCpuArgs),
    DecodeGpu(DecodeGpuArgs),
    Soak(SoakArgs),
    Steps(StepsArgs),
    Error(ErrorArgs),
    #[command(hide = true)]
    Spin,
    AttentionWorker(WorkerArgs),
}

/// Answer timing commands on standard input, beside workers of other libraries.
///
/// Commands: `setup DTYPE QUERY_HEADS KV_HEADS HEAD_DIM CONTEXT -` fills a cache and answers
/// `ok BYTES_PER_CALL CALLS_PER_PASS`; `run MILLIS` runs whole passes for at least so long and
/// answers `t MEDIAN MIN PASSES` in seconds per call; `err` answers `e RELATIVE_L2 MAX_ABS` against
/// f64; `quit`. What cannot be done is answered with `unsupported REASON`.
#[derive(Debug, Args)]
struct WorkerArgs {
    /// Which cache: dense, lean (a mix of kept counts), or the kept counts of LeanK's published
    /// masks (llama, qwen; sink 128, recent 768).
    #[arg(long, value_enum, default_value_t = Variant::Dense)]
    variant: Variant,
    /// Formats of its lean blocks, bits of an element of K and V: 16 is the storage type. With codes,
    /// DTYPE q8_0 means bf16 beside them.
    #[arg(long, value_name = "kNvN", default_value = "k16v16")]
    formats: HeadPrecision,
    /// Threads, pinned to the first cores; the environment's NT, or 1, by default.
    #[arg(long, value_name = "N", env = "NT", default_value = "1")]
    threads: NonZeroUsize,
    /// Least MiB of the cache; the environment's FOOT_MIB, or 512, by default.
    #[arg(long, value_name = "MIB", env = "FOOT_MIB", default_value = "512",
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    footprint_mib: u64,
    /// Instruction set of the kernel: portable, avx2, avx512, avx512-bf16, neon; the best of this
    /// CPU by default.
    #[arg(long, value_name = "ISA")]
    isa: Option<Isa>,
}

impl WorkerArgs {
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        // One thread per core, so that two never wait for each other on one. Threads inherit what
        // the first is pinned to, so it asks for the cores before and is pinned after.
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let pin = move |thread: usize| {
            if let Some(core) = cores.get(thread) {
                core_affinity::set_for_current(*core);
            }
        };
        let pool = Pool::with_start(self.threads, DEFAULT_SPIN, pin.clone())?;
        pin(0);
        let mut cpu = Cpu::with_executor(Arc::new(pool));
        if let Some(isa) = self.isa {
            cpu = cpu.with_isa(isa)?;
        }
        let worker = Worker::new(cpu, self.variant, self.formats, self.footprint_mib << 20);
        Ok(worker.serve(io::stdin().lock(), io::stdout().lock())?)
    }
}

/// Decode attention of one layer on the CPU, dense and lean, beside the read bandwidth.
///
/// One token of one sequence, random data, cold memory. Each round measures the bandwidth, dense
/// and lean attention one after the other; shares and ratios are formed within a round, and what
/// is printed are medians over rounds. The heads of the lean cache keep 0, 1/4, 1/2 and all (3/4
/// where head_dim is above 64) of their channels in turn, with a sink of 32 and 128 recent tokens.
#[derive(Debug, Args)]
struct CpuArgs {
    /// Heads of a layer: A (32/8x128), B (14/2x64), smollm2 (9/3x64), or QUERY/KVxHEAD_DIM.
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', default_value = "A,B,smollm2")]
    shapes: Vec<HeadShape>,
    /// Tokens that the query sees; multiples of 64.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "2048,16384",
          value_parser = context)]
    ctx: Vec<usize>,
    /// Storage types of K and V: f32, f16, bf16.
    #[arg(long, value_name = "TYPE,...", value_delimiter = ',', default_value = "f32,f16,bf16")]
    dtypes: Vec<Dtype>,
    /// Threads; as many as the machine runs at once by default.
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    threads: Vec<NonZeroUsize>,
    /// The lean cache: a mix of kept counts, or LeanK's published ones (llama, qwen; sink 128,
    /// recent 768).
    #[arg(long, value_enum, default_value_t = Variant::Lean)]
    lean: Variant,
    /// Formats of its lean blocks, bits of an element of K and V: 16 is the storage type.
    #[arg(long, value_name = "kNvN,...", value_delimiter = ',', default_value = "k16v16")]
    formats: Vec<HeadPrecision>,
    /// Rounds behind each median.
    #[arg(long, value_name = "N", default_value = "5")]
    rounds: NonZeroUsize,
    /// Least milliseconds per measurement and round.
    #[arg(long, value_name = "MS", default_value = "80")]
    ms: u64,
    /// Least MiB of each cache and of the bandwidth probe; many times the last-level cache.
    #[arg(long, value_name = "MIB", default_value = "256",
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    footprint_mib: u64,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
    /// Also draw time against context, as SVG.
    #[arg(long, value_name = "FILE")]
    figure: Option<PathBuf>,
}

/// Decode attention of one layer on a CUDA device, dense and lean, beside the read bandwidth.
///
/// One token per sequence, random data, cold memory, blocks in no order, CUDA graphs; everything is
/// included. The lean cache has LeanK's published masks (sink 128, recent 768), and its time is the
/// mean over the model's layers.
#[derive(Debug, Args)]
struct CudaArgs {
    /// Number of the device.
    #[arg(long, value_name = "N", default_value = "0")]
    device: usize,
    /// Models whose heads and masks are taken.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "llama,qwen")]
    models: Vec<Published>,
    /// Sequences and tokens that each query sees.
    #[arg(
        long,
        value_name = "SEQUENCESxCONTEXT,...",
        value_delimiter = ',',
        default_value = "1x32768,1x131072,8x32768,64x8192,64x32768"
    )]
    batches: Vec<Batch>,
    /// Storage type of K and V: f16, bf16.
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    dtype: Dtype,
    /// Leave the lean cache out.
    #[arg(long, conflicts_with = "formats")]
    dense: bool,
    /// Formats of lean blocks, bits of an element of K and V: 16 is the storage type; or fp8 for both.
    #[arg(long, value_name = "kNvN|fp8,...", value_delimiter = ',', default_value = "k16v16")]
    formats: Vec<DeviceFormats>,
    /// Also compare so many sequences of lengths between 1024 and 65536 with as many of one length.
    #[arg(long, value_name = "SEQUENCES")]
    mixed: Option<NonZeroUsize>,
    /// Most different layers of each mask; all by default.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Rounds behind each median.
    #[arg(long, value_name = "N", default_value = "5")]
    rounds: NonZeroUsize,
    /// Milliseconds per round.
    #[arg(long, value_name = "MS", default_value = "10")]
    ms: u64,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
}

impl CudaArgs {
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        let (cuda, start) = cuda::start(self.device)?;
        if let Some(problem) = cuda.kernel_cache_problem() {
            eprintln!("leank-bench: compiled kernels cannot be kept: {problem}");
        }
        let options = CudaOptions {
            models: self.models.clone(),
            batches: self.batches.clone(),
            dtype: self.dtype,
            formats: if self.dense { Vec::new() } else { self.formats.clone() },
            layers: self.layers,
            mixed: self.mixed.map(NonZeroUsize::get),
            rounds: self.rounds.get(),
            millis: self.ms as f64,
        };
        eprintln!("{}", cuda::HEADER);
        let report =
            cuda::measure(&cuda, start, &options, |row, read| eprint!("{}", row.lines(read)))?;
        print(self.json, &report, report.to_string())
    }
}

/// Many short sequences in a step against one long one, and the long one beside a process that
/// keeps a core busy.
///
/// One token per sequence, random data, cold memory. Each round measures all three one after the
/// other; ratios are formed within a round, and what is printed are medians over rounds.
#[derive(Debug, Args)]
struct StepsArgs {
    /// Heads of a layer: A (32/8x128), B (14/2x64), smollm2 (9/3x64), or QUERY/KVxHEAD_DIM.
    #[arg(long, value_name = "SHAPE", default_value = "A")]
    shape: HeadShape,
    /// Storage type of K and V: f32, f16, bf16.
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    dtype: Dtype,
    /// Which cache.
    #[arg(long, value_enum, default_value_t = Variant::Dense)]
    variant: Variant,
    /// Short sequences.
    #[arg(long, value_name = "N", default_value = "64")]
    sequences: NonZeroUsize,
    /// Tokens of each of them, a multiple of 64; the long one has those of all.
    #[arg(long, value_name = "N", default_value = "512", value_parser = context)]
    context: usize,
    /// Threads of our pool; as many as the machine runs at once by default.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Rounds behind each median.
    #[arg(long, value_name = "N", default_value = "7")]
    rounds: NonZeroUsize,
    /// Least milliseconds per measurement and round.
    #[arg(long, value_name = "MS", default_value = "100")]
    ms: u64,
    /// Least MiB of each cache.
    #[arg(long, value_name = "MIB", default_value = "256",
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    footprint_mib: u64,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
}

/// This program once more, as [`spin`], on one core.
struct SpinProcess;

/// Ends the process when it goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Busy for SpinProcess {
    fn start(&self) -> io::Result<Box<dyn Any>> {
        let mut command = process::Command::new(std::env::current_exe()?);
        // Its end of a pipe closes with us, which ends it too should we die.
        let child = command.arg("spin").stdin(process::Stdio::piped()).spawn()?;
        Ok(Box::new(Running(child)))
    }
}

/// Keeps the last core busy until standard input ends.
fn spin() {
    if let Some(core) = core_affinity::get_core_ids().and_then(|cores| cores.last().copied()) {
        thread::spawn(move || {
            core_affinity::set_for_current(core);
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}

impl StepsArgs {
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        let all = available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let options = StepsOptions {
            shape: self.shape,
            dtype: self.dtype,
            variant: self.variant,
            sequences: self.sequences.get(),
            context: self.context,
            threads: self.threads.unwrap_or(all).get(),
            rounds: self.rounds.get(),
            millis: self.ms,
            footprint: self.footprint_mib << 20,
        };
        let report = steps::measure(&options, &SpinProcess)?;
        print(self.json, &report, report.to_string())
    }
}

/// The error of dense attention against f64, on N(0, 1) or on a model's activations.
///
/// Relative L2 of the output over all KV heads. `arithmetic` is against f64 on K and V as they are
/// stored, `worst head` the largest of a KV head's, `whole` against f64 on K and V as they were
/// given.
#[derive(Debug, Args)]
struct ErrorArgs {
    /// A dump (`leank dump`): every KV head of every layer; longer contexts take K and V of several
    /// sequences one after the other.
    #[arg(long, value_name = "DIR", conflicts_with = "shape")]
    dump: Option<PathBuf>,
    /// Heads of random data: A (32/8x128), B (14/2x64), smollm2 (9/3x64), or QUERY/KVxHEAD_DIM.
    #[arg(long, value_name = "SHAPE", default_value = "A")]
    shape: HeadShape,
    /// Tokens that the query sees.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1024,16384")]
    ctx: Vec<NonZeroUsize>,
    /// Storage types of K and V: f32, f16, bf16.
    #[arg(long, value_name = "TYPE,...", value_delimiter = ',', default_value = "f32,f16,bf16")]
    dtypes: Vec<Dtype>,
    /// Instruction sets of the kernel; all that this CPU has by default.
    #[arg(long, value_name = "ISA,...", value_delimiter = ',')]
    isa: Vec<Isa>,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
}

impl ErrorArgs {
    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        let available = || Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
        let options = AccuracyOptions {
            shape: self.shape,
            dump: self.dump.as_deref(),
            contexts: self.ctx.iter().map(|tokens| tokens.get()).collect(),
            dtypes: self.dtypes.clone(),
            isas: if self.isa.is_empty() { available() } else { self.isa.clone() },
        };
        eprintln!("{}", accuracy::HEADER);
        let report = accuracy::measure(&options, |row| eprintln!("{row}"))?;
        print(self.json, &report, report.to_string())
    }
}

/// Prints a report, as JSON or as the text.
fn print(
    json: bool,
    report: &impl serde::Serialize,
    text: String,
) -> Result<(), Box<dyn std::error::Error>> {
    let text = if json { serde_json::to_string_pretty(report)? } else { text };
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

fn context(text: &str) -> Result<usize, String> {
    let tokens: usize = text.parse().map_err(|_| format!("`{text}` is not a number of tokens"))?;
    if tokens > 0 && tokens.is_multiple_of(DEFAULT_BLOCK) {
        return Ok(tokens);
    }
    let nearest = (tokens / DEFAULT_BLOCK).max(1) * DEFAULT_BLOCK;
    Err(format!("{tokens} is not a multiple of {DEFAULT_BLOCK} tokens; try {nearest}"))
}

impl CpuArgs {
    fn options(&self) -> CpuOptions {
        let all = available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = if self.threads.is_empty() { &[all][..] } else { &self.threads };
        CpuOptions {
            shapes: self.shapes.clone(),
            contexts: self.ctx.clone(),
            dtypes: self.dtypes.clone(),
            threads: threads.iter().map(|threads| threads.get()).collect(),
            lean: self.lean,
            formats: self.formats.clone(),
            rounds: self.rounds.get(),
            millis: self.ms,
            footprint: self.footprint_mib << 20,
        }
    }

    fn run(&self) -> Result<(), Box<dyn std::error::Error>> {
        // Rows as they come go to standard error; standard output gets the report whole.
        eprintln!("{}", table::HEADER);
        let report = cpu::measure(&self.options(), |row| eprint!("{}", table::rows(row)))?;
        if let Some(path) = &self.figure {
            figure::write(&report, path)?;
        }
        print(self.json, &report, Table(&report).to_string())
    }
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Cpu(args) => args.run(),
        Command::Cuda(args) => args.run(),
        Command::DecodeCpu(args) => args.run(),
        Command::DecodeGpu(args) => args.run(),
        Command::Soak(args) => args.run(),
        Command::Steps(args) => args.run(),
        Command::Error(args) => args.run(),
        Command::Spin => {
            spin();
            Ok(())
        }
        Command::AttentionWorker(args) => args.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("leank-bench: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &str) -> Result<CpuOptions, clap::Error> {
        let words = ["leank-bench", "cpu"].into_iter().chain(args.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Command::Cpu(args) => Ok(args.options()),
            _ => unreachable!("the words say cpu"),
        }
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_cover_the_shapes_of_interest() {
        let options = parse("").unwrap();
        assert_eq!(options.shapes, [HeadShape::A, HeadShape::B, HeadShape::SMOLLM2]);
        assert_eq!(options.contexts, [2048, 16384]);
        assert_eq!(options.dtypes, Dtype::ALL);
        assert_eq!(options.threads.len(), 1);
        assert!(options.rounds > 1);
    }

    #[test]
    fn lists_and_numbers_are_read() {
        let options = parse(
            "--shapes b,6/2x96 --ctx 64,4096 --dtypes bf16 --threads 1,2 --rounds 3 --ms 7 \
             --footprint-mib 2",
        )
        .unwrap();
        let own = HeadShape { query_heads: 6, kv_heads: 2, head_dim: 96 };
        assert_eq!(options.shapes, [HeadShape::B, own]);
        assert_eq!(options.contexts, [64, 4096]);
        assert_eq!(options.dtypes, [Dtype::Bf16]);
        assert_eq!(options.threads, [1, 2]);
        assert_eq!((options.rounds, options.millis, options.footprint), (3, 7, 2 << 20));
    }

    #[test]
    fn wrong_arguments_are_told_with_their_mend() {
        for (args, mend) in [
            ("--ctx 1000", "try 960"),
            ("--ctx 0", "try 64"),
            ("--ctx many", "not a number"),
            ("--dtypes f64", "f32, f16 and bf16"),
            ("--shapes C", "32/8x128"),
            ("--shapes 9/2x64", "multiple"),
            ("--threads 0", "zero"),
            ("--rounds 0", "zero"),
            ("--footprint-mib 0", "not in"),
            ("--ms -1", "unexpected argument"),
        ] {
            let error = parse(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args}");
            assert!(error.to_string().contains(mend), "{args}: {error}");
        }
    }
}
