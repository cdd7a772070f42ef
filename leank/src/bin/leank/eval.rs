//! `leank eval`

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use leank::{
    CacheConfig, InputRecord, MaskSummary,
    candle::{
        Task,
        eval::{Divergence, EvalOptions, MaskReport, evaluate, sequences},
    },
};
use serde::Serialize;

use crate::{masks, model, output, plan::CacheArgs, progress::Progress, record, target, texts};

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
    /// Text files, UTF-8, each longer than --context tokens.
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
    #[arg(long, value_delimiter = ',')]
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
    /// Write the sequences of text as tokens too, for `tools/eval_hf.py --tokens`: JSON.
    #[arg(long, value_name = "FILE")]
    save_tokens: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Entry<'a> {
    mask: String,
    /// What it was measured on.
    texts: &'a [InputRecord],
    kept_k: f64,
    kept_v: f64,
    dead_heads: usize,
    heads: usize,
    /// Live heads by format in lean blocks.
    heads_by_format: BTreeMap<String, usize>,
    /// Bytes of a lean block against a dense one: scales and padding included.
    middle_bytes: f64,
    /// What learning predicts for the mask as it is in its file; `None` where `--formats` changes it.
    predicted_kl: Option<f64>,
    perplexity_change: Option<f64>,
    whole_kv_ratio: Option<f64>,
    #[serde(flatten)]
    report: MaskReport,
}

impl<'a> Entry<'a> {
    fn new(
        args: &Args,
        texts: &'a [InputRecord],
        (path, config): (&Path, &CacheConfig),
        report: MaskReport,
    ) -> anyhow::Result<Self> {
        let mask = &config.mask;
        let MaskSummary { kept_k, kept_v, dead_heads, heads, .. } = mask.summary();
        Ok(Self {
            mask: path.display().to_string(),
            texts,
            kept_k,
            kept_v,
            dead_heads,
            heads,
            heads_by_format: masks::heads_by_format(mask),
            middle_bytes: masks::middle_bytes(config, masks::Padding::Cpu)?,
            predicted_kl: args.cache.predicted_kl(mask),
            perplexity_change: report.text.as_ref().map(|text| text.perplexity_change()),
            whole_kv_ratio: report.cache.whole_kv_ratio(),
            report,
        })
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(path) = &args.save_tokens {
        let inputs = args.text.iter().chain(&args.mask).map(PathBuf::as_path);
        target::check_file("--save-tokens", path, inputs.chain([args.model.path()]))?;
    }
    let texts = texts::read(&args.text)?;
    let read = record::texts(&texts);
    let masks = args.mask.iter().map(|path| masks::read(path));
    let masks = masks.collect::<anyhow::Result<Vec<_>>>()?;
    let model = args.model.load()?;
    let config = |(path, mask): (&PathBuf, _)| args.cache.lean_config(&model, path, mask);
    let configs = args.mask.iter().zip(masks).map(config);
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
    if let Some(path) = &args.save_tokens {
        texts::write_tokens(path, sequences(&model, &texts, &options)?)?;
    }
    let progress = Progress::new("evaluating sequences");
    let reports = evaluate(&model, &configs, &texts, &options, &mut |done, total| {
        progress.at(done, total);
    })?;
    progress.finish();
    for (path, config) in args.mask.iter().zip(&configs) {
        if let Some(names) = record::learned_from(&config.mask, &read) {
            let path = path.display();
            output::note(format_args!(
                "warning: {path} was learned from {names}: on other text it will cost more"
            ));
        }
    }
    for (path, report) in args.mask.iter().zip(&reports) {
        if !report.is_finite() {
            output::note(format_args!(
                "warning: {}: what it gives is not finite: the model's values may be too large for the cache \
                 ({}); try --dtype bf16 or f32",
                path.display(),
                args.cache.dtype(),
            ));
        }
    }
    let entries = args
        .mask
        .iter()
        .zip(&configs)
        .zip(reports)
        .map(|((path, config), report)| Entry::new(args, &read, (path, config), report))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if args.json { output::json(&entries) } else { print(args, &entries) }
}

/// A row per mask; what all rows share stands below.
fn print(args: &Args, entries: &[Entry]) -> anyhow::Result<()> {
    let several = entries.len() > 1;
    let rows = entries.iter().zip(names(&args.mask));
    let rows: Vec<_> = rows.map(|(entry, name)| row(entry, name, several)).collect();
    let Some(first) = rows.first() else { return Ok(()) };
    let mut table = output::table(first.iter().map(|(column, _)| column.as_str()));
    if let Some(masks) = table.column_mut(0) {
        masks.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    for row in &rows {
        table.add_row(row.iter().map(|(_, cell)| cell));
    }
    output::line(table)?;
    if let Some(text) = &entries[0].report.text {
        let over_the_first = match several {
            true => "over the first: less that of the first mask, on the same positions;\n",
            false => "",
        };
        output::line(format!(
            "\n{} sequences × {} positions at a context of {}; perplexity of the dense model {:.3}.\n\
             KL in nats per token against the dense model, ± its standard error;\n\
             {over_the_first}middle: bytes of lean blocks against dense ones; whole-KV ratio as measured on the\n\
             caches, windows included. Scales and padding count in both.",
            text.sequences,
            text.positions / text.sequences.max(1),
            args.context,
            text.dense_perplexity,
        ))?;
    }
    Ok(())
}

/// Names that tell the masks apart: file stems, and whole paths where a stem comes twice.
fn names(masks: &[PathBuf]) -> Vec<String> {
    let stem = |path: &PathBuf| path.file_stem().map(ToOwned::to_owned);
    let name = |path: &PathBuf| {
        let alike = masks.iter().filter(|other| stem(other) == stem(path)).count();
        let name = stem(path).filter(|_| alike == 1).unwrap_or_else(|| path.into());
        name.to_string_lossy().into_owned()
    };
    masks.iter().map(name).collect()
}

fn row(entry: &Entry, name: String, several: bool) -> Vec<(String, String)> {
    let mut row: Vec<(String, String)> = Vec::new();
    let mut cell = |column: &str, cell: String| row.push((column.to_owned(), cell));
    cell("mask", name);
    cell("kept K", output::percent(entry.kept_k));
    cell("kept V", output::percent(entry.kept_v));
    cell("dead heads", format!("{}/{}", entry.dead_heads, entry.heads));
    let mixed = entry.heads_by_format.len() > 1;
    let formats = if mixed { "mixed".into() } else { masks::format_words(&entry.heads_by_format) };
    cell("formats", formats);
    cell("middle", format!("{:.3}", entry.middle_bytes));
    if let Some(text) = &entry.report.text {
        for (column, kl) in divergence(&text.divergence, several) {
            cell(column, kl);
        }
        cell("predicted", entry.predicted_kl.map_or("–".into(), |kl| format!("{kl:.4}")));
        let change = text.perplexity_change() * 100.0;
        cell("perplexity", format!("{:.3} ({change:+.2} %)", text.lean_perplexity));
        cell("same top-1", output::percent(text.top1_agreement));
    }
    for task in &entry.report.tasks {
        let column = format!("{} (dense) of {}", task.task, task.items);
        cell(&column, format!("{} ({})", task.lean_right, task.dense_right));
        for (column, kl) in divergence(&task.divergence, several) {
            cell(&format!("{}: {column}", task.task), kl);
        }
    }
    if let Some(ratio) = entry.whole_kv_ratio {
        cell("whole-KV ratio", format!("{ratio:.3}"));
    }
    row
}

/// Columns of a divergence; with several masks, its distance to the first one's too.
fn divergence(found: &Divergence, several: bool) -> Vec<(&'static str, String)> {
    let error = |error: Option<f64>| error.map_or(String::new(), |error| format!(" ± {error:.4}"));
    let mut columns = vec![("KL", format!("{:.4}{}", found.kl, error(found.kl_standard_error)))];
    if several {
        let paired = error(found.kl_over_first_standard_error);
        columns.push(("over the first", format!("{:+.4}{paired}", found.kl_over_first)));
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_masks_apart() {
        let names = |masks: &[&str]| names(&masks.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(names(&["a/e1.safetensors", "e2.npy"]), ["e1", "e2"]);
        assert_eq!(names(&["a/m.pth", "x.npy", "b/m.pth"]), ["a/m.pth", "x", "b/m.pth"]);
    }
}
