//! `leank generate`

use std::{
    io::{IsTerminal as _, Write as _},
    path::PathBuf,
    time::Instant,
};

use anyhow::Context as _;
use leank::{
    Backend as _, Cache as _, CacheConfig, SequenceId, StepEntry,
    candle::{
        DenseAttention, LeanAttention, Model, Precision, SlidingKv, SlidingRows, store_prefix,
    },
    cpu::{Cpu, CpuCache},
};
use serde::Serialize;

use crate::{
    masks, model, output,
    plan::{CacheArgs, least_context},
};

/// Continue a prompt, token by token, and report speed and cache bytes.
///
/// With --mask the cache is lean; without, the same cache keeps everything. The most likely token
/// is taken each time, so the result is the same every time.
#[derive(clap::Args)]
#[command(
    mut_arg("sink", |arg| arg.requires("mask")),
    mut_arg("recent", |arg| arg.requires("mask")),
    mut_arg("formats", |arg| arg.requires("mask"))
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::Args,
    /// The mask; without one nothing is pruned.
    #[arg(long, value_name = "FILE")]
    mask: Option<PathBuf>,
    /// The prompt.
    #[arg(long, conflicts_with = "prompt_file", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// A file with the prompt, UTF-8.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Compute with the weights as they are stored: less memory, slow prompts. By default they are
    /// expanded to f32, as in `eval`.
    #[arg(long)]
    as_stored: bool,
    #[command(flatten)]
    cache: CacheArgs,
    /// Print JSON, once all is generated.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    text: String,
    prompt_tokens: usize,
    prompt_seconds: f64,
    /// Tokens after the first, which the prompt itself gives.
    decoded: usize,
    tokens_per_second: f64,
    cache_bytes: u64,
    /// Against the tokens of a dense cache: above 1 while the first blocks are not full.
    whole_kv_ratio: f64,
    /// Whether tokens lie between the windows, where the cache is lean.
    #[serde(skip)]
    has_middle: bool,
    /// Formats of lean blocks, in words.
    formats: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let precision = if args.as_stored { Precision::AsStored } else { Precision::F32 };
    let mask = args.mask.as_deref().map(|path| Ok::<_, anyhow::Error>((path, masks::read(path)?)));
    let mask = mask.transpose()?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(path)) => crate::texts::read_one(path)?,
        (None, None) => unreachable!("clap requires one of them"),
    };
    let model = args.model.load_as(precision)?;
    let tokens = model.tokenizer().encode(&prompt)?;
    anyhow::ensure!(!tokens.is_empty(), "the prompt is empty: there is nothing to continue");
    let limit = model.config().context_length;
    anyhow::ensure!(
        tokens.len().saturating_add(args.tokens) <= limit,
        "the prompt has {} tokens and {} are to follow; the model's context is {limit}",
        tokens.len(),
        args.tokens
    );
    let mut config = match mask {
        Some((path, mask)) => model::lean_config(&model, path, mask)?,
        None => CacheConfig::dense(model.config().global_shape()?)?,
    };
    args.cache.apply(&mut config);
    Generation::new(&model, config, &tokens)?.run(args.tokens, args.json)
}

struct Generation<'a> {
    model: &'a Model,
    cache: CpuCache,
    sequence: SequenceId,
    sliding: SlidingKv,
    next: u32,
    prompt_seconds: f64,
    prompt_tokens: usize,
    /// Formats of lean blocks, in words.
    formats: String,
}

impl<'a> Generation<'a> {
    fn new(model: &'a Model, config: CacheConfig, prompt: &[u32]) -> anyhow::Result<Self> {
        let start = Instant::now();
        let formats = masks::format_words(&masks::heads_by_format(&config.mask));
        let mut cache = Cpu::with_executor(model.executor()).create(config)?;
        let sequence = cache.add_sequence();
        let mut dense = DenseAttention::new(model.config(), prompt.len());
        let hidden = dense.prefill(model, prompt)?;
        store_prefix(&mut cache, sequence, &dense)?;
        let sliding = SlidingKv::of(&dense)?;
        let next = most_likely(&model.logits(&hidden)?.to_vec2()?[0]);
        let prompt_seconds = start.elapsed().as_secs_f64();
        let prompt_tokens = prompt.len();
        Ok(Self { model, cache, sequence, sliding, next, prompt_seconds, prompt_tokens, formats })
    }

    fn run(mut self, most: usize, json: bool) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        let terminal = out.is_terminal();
        let mut stream = self.model.tokenizer().stream();
        let mut text = String::new();
        let mut tell = |piece: &str| {
            text.push_str(piece);
            if json {
                return Ok(());
            }
            let shown = if terminal { output::written(piece) } else { piece.to_owned() };
            write!(out, "{shown}").and_then(|()| out.flush()).context(output::STDOUT)
        };
        let start = Instant::now();
        let mut decoded = 0;
        for generated in 0..most {
            if self.model.tokenizer().eos().contains(&self.next) {
                break;
            }
            tell(&stream.push(self.next)?)?;
            if generated + 1 < most {
                self.step()?;
                decoded += 1;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        tell(&stream.finish()?)?;
        drop(out);
        let report = self.report(text, decoded, seconds);
        if json {
            return output::json(&report);
        }
        output::line("")?;
        report.print();
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<()> {
        let position = self.cache.sequence_len(self.sequence)?;
        self.cache.plan(&[StepEntry::decode(self.sequence, 1)])?;
        let sliding = vec![SlidingRows { kv: &mut self.sliding, rows: 1 }];
        let mut attention = LeanAttention::with_sliding(&mut self.cache, sliding);
        let hidden = self.model.hidden(&[self.next], &[position], &mut attention)?;
        self.cache.commit()?;
        self.next = most_likely(&self.model.logits(&hidden)?.to_vec2()?[0]);
        Ok(())
    }

    fn report(self, text: String, decoded: usize, seconds: f64) -> Report {
        let memory = self.cache.memory();
        let has_middle = self.prompt_tokens + decoded > least_context(self.cache.config());
        // Sliding layers take the same either way.
        let beside = self.sliding.bytes(self.cache.config().dtype);
        let (bytes, dense) = (memory.used_bytes() + beside, memory.dense_bytes + beside);
        Report {
            text,
            prompt_tokens: self.prompt_tokens,
            prompt_seconds: self.prompt_seconds,
            decoded,
            tokens_per_second: decoded as f64 / seconds.max(f64::MIN_POSITIVE),
            cache_bytes: bytes,
            whole_kv_ratio: bytes as f64 / (dense as f64).max(1.0),
            has_middle,
            formats: self.formats,
        }
    }
}

impl Report {
    fn print(&self) {
        let lean = if self.has_middle {
            format!("whole-KV ratio {:.3}, lean blocks of {}", self.whole_kv_ratio, self.formats)
        } else {
            "nothing between the windows yet".to_owned()
        };
        output::note(format_args!(
            "prompt {} tokens in {:.2} s; {} tokens decoded at {:.1} tokens/s; cache {}, {lean}",
            self.prompt_tokens,
            self.prompt_seconds,
            self.decoded,
            self.tokens_per_second,
            output::bytes(self.cache_bytes),
        ));
    }
}

fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}
