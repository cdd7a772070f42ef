//! `leank plan`

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use leank::{
    CacheConfig, DEFAULT_BLOCK, Dtype, Footprint, HeadFormat, HeadPrecision, LeanFormat, ModelMask,
    ModelShape, Planner, Sliding, Tensor, Windows, candle::Model,
};
use serde::Serialize;

use crate::{
    masks::{self, Padding},
    model, output, parse,
};

/// What a cache with this mask will take, before anything runs.
///
/// Bytes are those of the backend's blocks, to the byte: windows, scales, padding and the last,
/// partly filled block included. The ratio is against a dense cache without padding. Layers that slide
/// and are not in the mask count on both sides with the tokens of their window.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask.
    #[arg(long, value_name = "FILE")]
    mask: PathBuf,
    /// Context lengths to plan for.
    #[arg(long, value_name = "TOKENS", num_args = 1.., value_delimiter = ',',
        value_parser = parse::context, default_values_t = [2_048, 8_192, 32_768, 131_072])]
    context: Vec<usize>,
    /// How many tokens of context fit into this, e.g. 16GiB.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    memory: Option<u64>,
    #[command(flatten)]
    cache: CacheArgs,
    /// The backend whose blocks are planned.
    #[arg(long, value_enum, default_value_t)]
    backend: Padding,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments that decide what a cache stores.
#[derive(clap::Args)]
pub(crate) struct CacheArgs {
    /// First tokens that are kept whole; the mask's own by default.
    #[arg(long, value_name = "TOKENS")]
    sink: Option<usize>,
    /// Most recent tokens that are kept whole; the mask's own by default.
    #[arg(long, value_name = "TOKENS")]
    recent: Option<usize>,
    /// Tokens per block.
    #[arg(long, default_value_t = DEFAULT_BLOCK)]
    block: usize,
    /// Type of the stored elements: f32, f16 or bf16.
    #[arg(long, default_value = "f16")]
    dtype: Dtype,
    /// Formats of all heads in lean blocks in place of the mask's own: k and v with 16, 8 or 4 bits
    /// each, as in k8v4. Layers that are exempt keep 16.
    #[arg(long, value_name = "FORMATS")]
    formats: Option<HeadPrecision>,
}

impl CacheArgs {
    /// What learning predicts for a mask as it is in its file; `None` where `--formats` changes it.
    pub(crate) fn predicted_kl(&self, mask: &ModelMask) -> Option<f64> {
        mask.info().predicted_kl.filter(|_| self.formats.is_none())
    }

    /// Type of the stored elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// A lean cache for the model, with a mask that must be for it; `path` is the mask's file.
    pub(crate) fn lean_config(
        &self,
        model: &Model,
        path: &Path,
        mask: ModelMask,
    ) -> anyhow::Result<CacheConfig> {
        let mut config = model::lean_config(model, path, mask)?;
        self.apply(&mut config);
        config.validate()?;
        Ok(config)
    }

    /// Applies the arguments to a configuration.
    pub(crate) fn apply(&self, config: &mut CacheConfig) {
        config.windows = Windows {
            sink: self.sink.unwrap_or(config.windows.sink),
            recent: self.recent.unwrap_or(config.windows.recent),
        };
        config.block = self.block;
        config.dtype = self.dtype;
        if let Some(precision) = self.formats {
            config.mask = config.mask.clone().with_precision(precision);
        }
    }
}

#[derive(Serialize)]
struct Row {
    context: usize,
    bytes: u64,
    peak_bytes: u64,
    dense_bytes: u64,
    whole_kv_ratio: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    sink: usize,
    recent: usize,
    block: usize,
    dtype: String,
    /// Live heads by format in lean blocks.
    heads_by_format: BTreeMap<String, usize>,
    /// Bytes of a lean block, all layers.
    lean_block_bytes: u64,
    /// Those of them that are scales.
    scale_bytes: u64,
    /// Bytes of a lean block against a dense one.
    middle_bytes: f64,
    contexts: Vec<Row>,
    memory: Option<Fit>,
}

#[derive(Serialize)]
struct Fit {
    bytes: u64,
    /// `None`: 2^32 or more.
    tokens: Option<usize>,
    dense_tokens: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mask = masks::read(&args.mask)?;
    let mut config = CacheConfig::new(shape(&mask)?, mask)?;
    args.cache.apply(&mut config);
    let plan = Plan::new(&config, args.backend)?;
    let planner = plan.planner();
    let token_bytes = planner.layout().dense_token_bytes as u64;
    let contexts = args.context.iter().map(|&context| {
        let footprint = plan.footprint(context)?;
        Ok(Row {
            context,
            bytes: footprint.bytes,
            peak_bytes: footprint.peak_bytes,
            dense_bytes: footprint.dense_bytes,
            whole_kv_ratio: footprint.whole_kv_ratio(),
        })
    });
    let report = Report {
        sink: config.windows.sink,
        recent: config.windows.recent,
        block: config.block,
        dtype: config.dtype.to_string(),
        heads_by_format: masks::heads_by_format(&config.mask),
        lean_block_bytes: planner.layout().lean_bytes_all_layers(),
        scale_bytes: scale_bytes(&config),
        middle_bytes: masks::middle_bytes(&config, args.backend)?,
        contexts: contexts.collect::<leank::Result<_>>()?,
        memory: args.memory.map(|bytes| Fit {
            bytes,
            tokens: planner.tokens_within(bytes.saturating_sub(plan.beside(usize::MAX))),
            dense_tokens: bytes.saturating_sub(plan.beside(usize::MAX)) / token_bytes,
        }),
    };
    if args.json { output::json(&report) } else { print(&report) }
}

/// Tokens of both windows and one block: a shorter context has no lean block.
pub(crate) fn least_context(config: &CacheConfig) -> usize {
    let Windows { sink, recent } = config.windows;
    sink.saturating_add(recent).saturating_add(config.block)
}

/// A shape for bytes alone: query heads do not matter to them.
pub(crate) fn shape(mask: &ModelMask) -> leank::Result<ModelShape> {
    ModelShape::new(mask.layers(), mask.kv_heads(), mask.kv_heads(), mask.head_dim())
}

/// What caches of a backend take, the model's sliding layers beside them included.
pub(crate) struct Plan {
    planner: Planner,
    /// Layers that no mask covers.
    sliding: Option<Sliding>,
    /// Bytes of a token in one of them.
    token_bytes: u64,
}

impl Plan {
    pub(crate) fn new(config: &CacheConfig, backend: Padding) -> anyhow::Result<Self> {
        let token_bytes = 2 * config.shape.kv_heads * config.shape.head_dim * config.dtype.bytes();
        Ok(Self {
            planner: Planner::new(config, backend.rules()).context("this cache")?,
            sliding: config.mask.info().fingerprint.as_ref().and_then(|own| own.sliding),
            token_bytes: token_bytes as u64,
        })
    }

    /// Of the cache alone.
    pub(crate) fn planner(&self) -> &Planner {
        &self.planner
    }

    /// Bytes of the sliding layers.
    fn beside(&self, context: usize) -> u64 {
        self.sliding.map_or(0, |Sliding { layers, window }| {
            let tokens = context.min(window) as u64;
            tokens.saturating_mul(layers as u64).saturating_mul(self.token_bytes)
        })
    }

    /// One sequence of `context` tokens.
    pub(crate) fn footprint(&self, context: usize) -> leank::Result<Footprint> {
        let mut footprint = self.planner.footprint(context)?;
        let beside = self.beside(context);
        for bytes in [&mut footprint.bytes, &mut footprint.peak_bytes, &mut footprint.dense_bytes] {
            *bytes = bytes.saturating_add(beside);
        }
        Ok(footprint)
    }
}

/// Bytes of the scales in a lean block, all layers.
fn scale_bytes(config: &CacheConfig) -> u64 {
    let of = |format: LeanFormat, tensor, channels: usize| {
        format.scale_bytes(tensor, config.block, channels) as u64
    };
    let head = |(layer, head)| {
        let kept = config.mask.head(layer, head).kept_count();
        let HeadFormat { k, v } = config.format(layer, head);
        let v_channels = if kept == 0 { 0 } else { config.shape.head_dim };
        of(k, Tensor::K, kept) + of(v, Tensor::V, v_channels)
    };
    config.shape.all_kv_heads().map(head).sum()
}

fn print(report: &Report) -> anyhow::Result<()> {
    let Report { sink, recent, block, dtype, .. } = report;
    output::line(format!("sink {sink}, recent {recent}, blocks of {block} tokens, {dtype}"))?;
    output::line(format!(
        "lean blocks of {}: {} ({} of them scales), {} of dense ones",
        masks::format_words(&report.heads_by_format),
        output::bytes(report.lean_block_bytes),
        output::bytes(report.scale_bytes),
        output::percent(report.middle_bytes),
    ))?;
    let mut table = output::table(["context", "lean", "peak", "dense", "whole-KV ratio"]);
    for row in &report.contexts {
        let ratio = row.whole_kv_ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.3}"));
        table.add_row([
            row.context.to_string(),
            output::bytes(row.bytes),
            output::bytes(row.peak_bytes),
            output::bytes(row.dense_bytes),
            ratio,
        ]);
    }
    output::line(table)?;
    if let Some(fit) = &report.memory {
        let tokens = fit.tokens.map_or("2^32 or more".to_owned(), |tokens| tokens.to_string());
        output::line(format!(
            "{} hold {tokens} tokens of one sequence, decoded one by one ({} in a dense cache)",
            output::bytes(fit.bytes),
            fit.dense_tokens
        ))?;
    }
    Ok(())
}
