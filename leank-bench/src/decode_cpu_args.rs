//! Arguments of `leank-bench decode-cpu`.

use std::{error::Error, num::NonZeroUsize, path::PathBuf};

use clap::Args;
use leank_bench::{
    decode_cpu::{self, DecodeCpuOptions},
    decode_gpu::MaskChoice,
    setting::DeviceFormats,
};
use leank_candle::Precision;
use leank_core::{Dtype, HeadPrecision};

use crate::print;

/// Whole decode steps of a model on the CPU: our cache lean and dense, candle's caches, llama.cpp.
///
/// One token of one sequence through the whole model, logits included, on caches filled with random K and
/// V. Each round measures the read bandwidth and every variant, one after the other; ratios and shares are
/// formed within a round, and what is printed are medians over rounds. Beside candle's caches runs our
/// forward pass with the same weights; llama.cpp runs the same file for itself. All have as many threads as
/// there are physical cores. Contexts beyond what the model knows are allowed: their speed is measured.
#[derive(Debug, Args)]
pub(crate) struct DecodeCpuArgs {
    /// A GGUF file (or, without llama.cpp, a folder with config.json, tokenizer.json and safetensors).
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Mask of the lean cache: a file, or LeanK's published kept counts (llama, qwen).
    #[arg(long, value_name = "llama|qwen|FILE")]
    mask: MaskChoice,
    /// Formats of lean blocks other than the mask's, bits of an element of K and V: 16 is the storage type.
    #[arg(long, value_name = "kNvN")]
    formats: Option<HeadPrecision>,
    /// Tokens that the last step sees.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "4096,16384,32768")]
    ctx: Vec<NonZeroUsize>,
    /// Storage type of K and V in our caches: f32, f16 or bf16.
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    dtype: Dtype,
    /// Widen the weights to f32; by default they are read as the file holds them.
    #[arg(long)]
    f32: bool,
    /// Steps of a round.
    #[arg(long, value_name = "N", default_value = "8")]
    tokens: NonZeroUsize,
    /// Rounds behind each median.
    #[arg(long, value_name = "N", default_value = "7")]
    rounds: NonZeroUsize,
    /// A Python that has the PyPI package llama-cpp-python; without one llama.cpp is left out.
    #[arg(long, value_name = "PYTHON")]
    llama_cpp: Option<PathBuf>,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,
}

impl DecodeCpuArgs {
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        eprintln!("{}", decode_cpu::HEADER);
        let report = decode_cpu::measure(&self.options(), |context| eprintln!("{context}"))?;
        print(self.json, &report, report.to_string())
    }

    fn options(&self) -> DecodeCpuOptions {
        DecodeCpuOptions {
            model: self.model.clone(),
            precision: if self.f32 { Precision::F32 } else { Precision::AsStored },
            mask: self.mask.clone(),
            formats: self.formats.map(DeviceFormats::Masks),
            dtype: self.dtype,
            contexts: self.ctx.iter().map(|context| context.get()).collect(),
            tokens: self.tokens.get(),
            rounds: self.rounds.get(),
            probe: 512 << 20,
            llama_cpp: self.llama_cpp.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: DecodeCpuArgs,
    }

    fn parse(text: &str) -> Result<DecodeCpuOptions, clap::Error> {
        let words = ["decode-cpu"].into_iter().chain(text.split_whitespace());
        Ok(Cli::try_parse_from(words)?.args.options())
    }

    #[test]
    fn options_are_those_of_the_arguments() {
        let options = parse("--model m.gguf --mask a.safetensors").unwrap();
        assert_eq!(options.contexts, [4096, 16384, 32768]);
        assert_eq!((options.dtype, options.precision), (Dtype::Bf16, Precision::AsStored));
        assert!(options.llama_cpp.is_none() && options.formats.is_none());
        let options = parse(
            "--model m.gguf --mask llama --ctx 1000,8192 --dtype f16 --f32 --tokens 3 --rounds 2 \
             --formats k8v8 --llama-cpp venv/bin/python",
        )
        .unwrap();
        assert_eq!(options.contexts, [1000, 8192]);
        assert_eq!((options.dtype, options.precision), (Dtype::F16, Precision::F32));
        assert_eq!((options.tokens, options.rounds), (3, 2));
        assert_eq!(options.llama_cpp, Some("venv/bin/python".into()));
        assert_eq!(options.formats.unwrap().to_string(), "k8v8");
    }

    #[test]
    fn wrong_arguments_are_told() {
        for (args, mend) in [
            ("--mask llama", "--model"),
            ("--model m", "--mask"),
            ("--model m --mask llama --ctx 0", "zero"),
            ("--model m --mask llama --tokens 0", "zero"),
            ("--model m --mask llama --formats fp8", "k8v4"),
            ("--model m --mask llama --dtype f64", "f32, f16 and bf16"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(mend), "{args}: {error}");
        }
    }
}
