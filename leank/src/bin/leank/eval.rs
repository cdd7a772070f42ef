//! `leank eval`

use std::path::PathBuf;

use leank::{
    CacheConfig, MaskSummary, ModelMask,
    candle::{
        Model, Task,
        eval::{EvalOptions, MaskReport, evaluate},
    },
    files::read_mask,
};
use serde::Serialize;

use crate::{model, output, plan::CacheArgs, texts};

/// Measure what a mask costs and saves, by decoding through the lean cache.
///
/// The model reads each prefix densely and goes on from there both ways, with the same tokens:
/// densely, and token by token through the lean cache. Several masks are measured on the same
/// sequences. Use other text than the mask was learned on.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Masks to measure.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    mask: Vec<PathBuf>,
    /// Text files, UTF-8, each at least --context tokens long.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Tokens of context at the last decoded position.
    #[arg(long, default_value_t = 2048)]
    context: usize,
    /// Sequences of text.
    #[arg(long, default_value_t = 16)]
    sequences: usize,
    /// Decoded positions per sequence.
    #[arg(long, default_value_t = 128)]
    positions: usize,
    /// Retrieval tasks: passkey, needle, multikey.
    #[arg(long, value_delimiter = ',', value_parser = task)]
    tasks: Vec<Task>,
    /// Items per task.
    #[arg(long, default_value_t = 32)]
    items: usize,
    /// Sequences that decode together.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[command(flatten)]
    cache: CacheArgs,
    /// Seed of where sequences are cut and what is hidden.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn task(name: &str) -> Result<Task, String> {
    Task::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Task::ALL.iter().map(ToString::to_string).collect();
        format!("`{name}` is none of {}", names.join(", "))
    })
}

#[derive(Serialize)]
struct Entry {
    mask: String,
    kept_k: f64,
    kept_v: f64,
    dead_heads: usize,
    heads: usize,
    predicted_kl: Option<f64>,
    perplexity_change: Option<f64>,
    whole_kv_ratio: Option<f64>,
    #[serde(flatten)]
    report: MaskReport,
}

impl Entry {
    fn new(path: &std::path::Path, mask: &ModelMask, report: MaskReport) -> Self {
        let MaskSummary { kept_k, kept_v, dead_heads, heads, .. } = mask.summary();
        Self {
            mask: path.display().to_string(),
            kept_k,
            kept_v,
            dead_heads,
            heads,
            predicted_kl: mask.info().predicted_kl,
            perplexity_change: report.text.as_ref().map(|text| text.perplexity_change()),
            whole_kv_ratio: report.cache.whole_kv_ratio(),
            report,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let texts = texts::read(&args.text)?;
    let model = args.model.load()?;
    let configs = args.mask.iter().map(|path| config(args, &model, path));
    let configs = configs.collect::<anyhow::Result<Vec<_>>>()?;
    let options = EvalOptions {
        context: args.context,
        positions: args.positions,
        sequences: args.sequences,
        tasks: args.tasks.clone(),
        items: args.items,
        batch: args.batch,
        seed: args.seed,
    };
    let bar = output::bar(0, "evaluating sequences");
    let reports = evaluate(&model, &configs, &texts, &options, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let entries: Vec<Entry> = args
        .mask
        .iter()
        .zip(&configs)
        .zip(reports)
        .map(|((path, config), report)| Entry::new(path, &config.mask, report))
        .collect();
    if args.json { output::json(&entries) } else { print(args, &entries) }
}

fn config(args: &Args, model: &Model, path: &std::path::Path) -> anyhow::Result<CacheConfig> {
    let mask = read_mask(path, &Default::default())?;
    mask.check_model(model.fingerprint())
        .map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    let mut config = CacheConfig::new(model.config().shape(), mask)?;
    args.cache.apply(&mut config);
    Ok(config)
}

fn print(args: &Args, entries: &[Entry]) -> anyhow::Result<()> {
    for (i, entry) in entries.iter().enumerate() {
        if i > 0 {
            output::line("")?;
        }
        output::line(&entry.mask)?;
        for (name, value) in facts(args, entry) {
            output::line(format!("  {name:<16} {value}"))?;
        }
    }
    Ok(())
}

fn facts(args: &Args, entry: &Entry) -> Vec<(String, String)> {
    let mut facts = vec![(
        "kept".to_owned(),
        format!(
            "K {}, V {}; dead heads {} of {}",
            output::percent(entry.kept_k),
            output::percent(entry.kept_v),
            entry.dead_heads,
            entry.heads
        ),
    )];
    if let Some(text) = &entry.report.text {
        let error = text.kl_standard_error.map_or(String::new(), |error| format!(" ± {error:.4}"));
        let predicted =
            entry.predicted_kl.map_or(String::new(), |kl| format!(" (learning predicted {kl:.4})"));
        facts.push((
            "measured on".into(),
            format!(
                "{} sequences × {} positions, context {}",
                text.sequences,
                text.positions / text.sequences.max(1),
                args.context
            ),
        ));
        facts.push(("KL".into(), format!("{:.4}{error}{predicted}", text.kl)));
        facts.push((
            "perplexity".into(),
            format!(
                "{:.3} dense, {:.3} lean ({:+.2} %)",
                text.dense_perplexity,
                text.lean_perplexity,
                text.perplexity_change() * 100.0
            ),
        ));
        facts.push(("top-1 agreement".into(), output::percent(text.top1_agreement)));
    }
    for task in &entry.report.tasks {
        facts.push((
            task.task.clone(),
            format!("{} dense, {} lean of {}", task.dense_right, task.lean_right, task.items),
        ));
    }
    if let Some(ratio) = entry.whole_kv_ratio {
        let cache = entry.report.cache;
        facts.push((
            "whole-KV ratio".into(),
            format!(
                "{ratio:.3} ({} for {} tokens, dense {})",
                output::bytes(cache.bytes),
                cache.tokens,
                output::bytes(cache.dense_bytes)
            ),
        ));
    }
    facts
}
