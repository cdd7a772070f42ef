//! Arguments of `leank-bench decode-gpu`.

use std::{error::Error, fs, num::NonZeroUsize, path::PathBuf};

use clap::Args;
use leank_bench::{
    decode_gpu::{
        MaskChoice, MemorySize,
        speed::{self, SpeedOptions},
        tokens::{self, TokensOptions},
    },
    setting::DeviceFormats,
};
use leank_core::{Dtype, Windows};
use leank_cuda::Cuda;

use crate::print;

/// Windows that leave something between them in a text of a few hundred tokens.
const SHORT_WINDOWS: Windows = Windows { sink: 32, recent: 32 };

/// Whole decode steps on a CUDA device, on a dense cache and on a lean one.
///
/// Without --model: a decoder of Llama-3.1-8B's shape with random bf16 weights on a cache filled with
/// random K and V. Both caches are timed at one batch, which shrinks to what the device holds densely,
/// and with --memory each at the largest batch that so many bytes hold, weights included. Everything a
/// step does is in its time: plan, attention, packing, sampling.
///
/// With --model: f32 weights; the greedy tokens of the device are compared with those of the CPU,
/// which both sides are fed. Fails where rounding does not explain a difference.
///
/// Needs cuBLAS beside the driver and NVRTC.
#[derive(Debug, Args)]
pub(crate) struct DecodeGpuArgs {
    /// Number of the device.
    #[arg(long, value_name = "N", default_value = "0")]
    device: usize,
    /// Mask of the lean cache: LeanK's published kept counts (llama, qwen), or a file.
    #[arg(long, value_name = "llama|qwen|FILE", default_value = "llama")]
    mask: MaskChoice,
    /// First tokens that are kept whole. By default the windows are the mask file's; those of published
    /// masks are 128 and 768, with --model 32 and 32.
    #[arg(long, value_name = "TOKENS", requires = "recent")]
    sink: Option<usize>,
    /// Last tokens that are kept whole.
    #[arg(long, value_name = "TOKENS", requires = "sink")]
    recent: Option<usize>,
    /// Formats of lean blocks other than the mask's, bits of an element of K and V: 16 is the storage type;
    /// or fp8 for both.
    #[arg(long, value_name = "kNvN|fp8")]
    formats: Option<DeviceFormats>,
    /// Storage type of K and V: f16 or bf16; bf16 by default, with --model f16.
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Dtype>,
    /// Print the report as JSON; the table otherwise.
    #[arg(long)]
    json: bool,

    /// Sequences.
    #[arg(long, value_name = "N", default_value = "16", conflicts_with = "model")]
    batch: NonZeroUsize,
    /// Tokens of each sequence after the last step.
    #[arg(long, value_name = "N", default_value = "32768", conflicts_with = "model")]
    context: NonZeroUsize,
    /// Layers, of 32.
    #[arg(long, value_name = "N", default_value = "32", conflicts_with = "model",
          value_parser = clap::value_parser!(u64).range(1..=32))]
    layers: u64,
    /// Also compare tokens per second in so much memory, e.g. 72GiB, for weights, activations and cache.
    #[arg(long, value_name = "SIZE", conflicts_with = "model")]
    memory: Option<MemorySize>,
    /// Steps of a round; 64 are those of a block, so that each round packs once.
    #[arg(long, value_name = "N", default_value = "64", conflicts_with = "model")]
    steps: NonZeroUsize,
    /// Rounds behind each median.
    #[arg(long, value_name = "N", default_value = "5", conflicts_with = "model")]
    rounds: NonZeroUsize,
    /// Give a step's work to the stream as it is, not as a CUDA graph.
    #[arg(long, conflicts_with = "model")]
    no_graphs: bool,

    /// A GGUF file, or a folder with config.json, tokenizer.json and safetensors.
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// A text to continue; may be given several times.
    #[arg(long, value_name = "TEXT", requires = "model")]
    prompt: Vec<String>,
    /// A file with a text to continue on each line.
    #[arg(long, value_name = "FILE", requires = "model")]
    prompts: Option<PathBuf>,
    /// Tokens to generate behind each prompt.
    #[arg(long, value_name = "N", default_value = "256", requires = "model")]
    tokens: NonZeroUsize,
}

impl DecodeGpuArgs {
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        let cuda = Cuda::new(self.device)?;
        match &self.model {
            None => {
                let report = speed::measure(&cuda, &self.speed(), |done| eprintln!("{done}"))?;
                print(self.json, &report, report.to_string())
            }
            Some(model) => {
                let options = self.tokens(model.clone())?;
                let report = tokens::compare(&cuda, &options, |done| eprintln!("{done}"))?;
                print(self.json, &report, report.to_string())?;
                if !report.is_explained() {
                    return Err(
                        "rounding does not explain how the device differs from the CPU".into()
                    );
                }
                Ok(())
            }
        }
    }

    fn windows(&self) -> Option<Windows> {
        self.sink.zip(self.recent).map(|(sink, recent)| Windows { sink, recent })
    }

    fn speed(&self) -> SpeedOptions {
        SpeedOptions {
            batch: self.batch.get(),
            context: self.context.get(),
            layers: self.layers as usize,
            mask: self.mask.clone(),
            windows: self.windows(),
            formats: self.formats,
            dtype: self.dtype.unwrap_or(Dtype::Bf16),
            memory: self.memory,
            steps: self.steps.get(),
            rounds: self.rounds.get(),
            graphs: !self.no_graphs,
        }
    }

    fn tokens(&self, model: PathBuf) -> Result<TokensOptions, Box<dyn Error>> {
        let mut prompts = self.prompt.clone();
        if let Some(path) = &self.prompts {
            let text = fs::read_to_string(path)
                .map_err(|error| format!("{}: reading prompts failed: {error}", path.display()))?;
            prompts.extend(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
        }
        // A published mask's own windows are longer than these sequences: nothing would become lean.
        let published = matches!(self.mask, MaskChoice::Published(_)).then_some(SHORT_WINDOWS);
        Ok(TokensOptions {
            model,
            prompts,
            tokens: self.tokens.get(),
            dtype: self.dtype.unwrap_or(Dtype::F16),
            mask: self.mask.clone(),
            windows: self.windows().or(published),
            formats: self.formats,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: DecodeGpuArgs,
    }

    fn parse(text: &str) -> Result<DecodeGpuArgs, clap::Error> {
        let words = ["decode-gpu"].into_iter().chain(text.split_whitespace());
        Ok(Cli::try_parse_from(words)?.args)
    }

    #[test]
    fn speed_is_measured_without_a_model() {
        let args =
            parse("--batch 4 --memory 72GiB --sink 64 --recent 256 --formats k8v4 --no-graphs")
                .unwrap();
        let options = args.speed();
        assert_eq!((options.batch, options.context, options.layers), (4, 32768, 32));
        assert_eq!(options.memory, Some(MemorySize(72 << 30)));
        assert_eq!(options.windows, Some(Windows { sink: 64, recent: 256 }));
        assert_eq!((options.dtype, options.graphs), (Dtype::Bf16, false));
        assert_eq!(options.formats.unwrap().to_string(), "k8v4");
    }

    #[test]
    fn prompts_come_from_arguments_and_files() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "second\n\n third\n").unwrap();
        let path = file.path().display();
        let args = parse(&format!("--model m.gguf --prompt first --prompts {path}")).unwrap();
        let options = args.tokens("m.gguf".into()).unwrap();
        assert_eq!(options.prompts, ["first", "second", " third"]);
        assert_eq!((options.tokens, options.dtype), (256, Dtype::F16));
        assert_eq!(options.windows, Some(SHORT_WINDOWS));
        let args = parse("--model m.gguf --mask a.safetensors --prompt a").unwrap();
        assert_eq!(args.tokens("m.gguf".into()).unwrap().windows, None, "those of the file");
        let args = parse("--model m.gguf --prompts no/such/file").unwrap();
        assert!(args.tokens("m.gguf".into()).unwrap_err().to_string().contains("no/such/file"));
    }

    #[test]
    fn wrong_arguments_are_told() {
        for (args, mend) in [
            ("--memory 72GB", "72GiB"),
            ("--layers 33", "1..=32"),
            ("--sink 4", "--recent"),
            ("--prompt a", "--model"),
            ("--model m --batch 4", "cannot be used with"),
            ("--steps 0", "zero"),
            ("--formats k8", "k8v4"),
            ("--batch 0", "zero"),
            ("--context 0", "zero"),
        ] {
            let error = parse(args).unwrap_err().to_string();
            assert!(error.contains(mend), "{args}: {error}");
        }
    }
}
