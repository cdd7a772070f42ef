//! Arguments of `leank-bench soak`.

use std::{error::Error, num::NonZeroUsize, time::Duration};

use clap::{Args, ValueEnum};
use leank_bench::soak::{self, SoakOptions};
use leank_cuda::Cuda;

use crate::print;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Place {
    Cpu,
    Cuda,
}

/// Serve simulated users from lean caches, and check everything all the while.
///
/// Three caches of different types, formats and masks take turns: requests come in bursts, with shared
/// prefixes, several answers, drafts that are taken back, users who give up or want another answer; where
/// the limit on bytes refuses a step, sequences are saved and restored or computed again. After every event
/// the bytes that a cache says it holds are compared with books of our own; of some steps the outputs with
/// the oracle in f64; and the memory of the process (and the device) must not grow. Fails at the first
/// thing that is wrong, and says how to come there again.
#[derive(Debug, Args)]
pub(crate) struct SoakArgs {
    /// Where caches are.
    #[arg(long, value_enum, default_value_t = Place::Cpu)]
    backend: Place,
    /// Number of the CUDA device.
    #[arg(long, value_name = "N", default_value = "0")]
    device: usize,
    /// Threads of the CPU backend.
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZeroUsize,
    /// Minutes that it takes.
    #[arg(long, value_name = "N", default_value = "20", value_parser = minutes)]
    minutes: Duration,
    /// Most steps, all caches together; as many as the minutes allow by default.
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Decides everything that happens.
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// Times as many users, and as much memory, as two dozen sequences at a time.
    #[arg(long, value_name = "N", default_value = "1")]
    scale: NonZeroUsize,
    /// Most tokens of a request.
    #[arg(long, value_name = "N", default_value = "2048",
          value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    longest: u32,
    /// Compare one step of so many with the oracle.
    #[arg(long, value_name = "N", default_value = "64")]
    sample: NonZeroUsize,
    /// Most MiB that memory may grow after the first quarter of the time.
    #[arg(long, value_name = "MIB", default_value = "8",
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    growth_mib: u64,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
}

impl SoakArgs {
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        let options = self.options();
        let progress = |line: &str| eprintln!("{line}");
        let report = match self.backend {
            Place::Cpu => soak::on_cpu(self.threads, &options, progress)?,
            Place::Cuda => soak::on_cuda(&Cuda::new(self.device)?, &options, progress)?,
        };
        print(self.json, &report, report.to_string())?;
        report.broken.map_or(Ok(()), |why| Err(why.into()))
    }

    fn options(&self) -> SoakOptions {
        SoakOptions {
            seed: self.seed,
            time: self.minutes,
            steps: self.steps.unwrap_or(u64::MAX),
            scale: self.scale,
            longest: self.longest as usize,
            sample: self.sample,
            growth: self.growth_mib << 20,
        }
    }
}

fn minutes(text: &str) -> Result<Duration, String> {
    let minutes = text.parse::<f64>().ok().filter(|minutes| *minutes > 0.0);
    minutes
        .and_then(|minutes| Duration::try_from_secs_f64(minutes * 60.0).ok())
        .ok_or_else(|| format!("`{text}` is not a number of minutes, as 20 or 0.5"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: SoakArgs,
    }

    fn parse(text: &str) -> Result<SoakArgs, clap::Error> {
        let words = ["soak"].into_iter().chain(text.split_whitespace());
        Ok(Cli::try_parse_from(words)?.args)
    }

    #[test]
    fn options_are_those_of_the_arguments() {
        let args =
            parse("--backend cuda --minutes 0.5 --seed 7 --steps 9 --scale 4 --growth-mib 3");
        let args = args.unwrap();
        assert_eq!(args.backend, Place::Cuda);
        let options = args.options();
        assert_eq!((options.time, options.seed), (Duration::from_secs(30), 7));
        assert_eq!((options.steps, options.scale.get(), options.growth), (9, 4, 3 << 20));
        let (options, own) = (parse("").unwrap().options(), SoakOptions::default());
        assert_eq!((options.time, options.longest), (own.time, own.longest));
        assert_eq!((options.sample, options.growth), (own.sample, own.growth));
    }

    #[test]
    fn wrong_arguments_are_told() {
        for (args, mend) in [
            ("--backend gpu", "cuda"),
            ("--minutes 0", "0.5"),
            ("--minutes inf", "0.5"),
            ("--longest 63", "64"),
            ("--scale 0", "zero"),
            ("--sample 0", "zero"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(mend), "{args}: {error}");
        }
    }
}
