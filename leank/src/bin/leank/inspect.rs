//! `leank inspect`

use std::{collections::BTreeMap, path::PathBuf};

use leank::{Layer, MaskInfo, MaskSummary, ModelMask};
use serde::Serialize;

use crate::{masks, output};

/// Show what a mask keeps: per layer, in which formats, by kept count, and where in the RoPE spectrum.
///
/// RoPE turns the pair of channels (c, c + head_dim/2) by base^(-2c/head_dim) per token, so low c
/// turn fast and high c slowly. The spectrum shows the share of heads that keep a channel of each
/// sixteenth of the pairs.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask: .safetensors, .pth or .npy.
    mask: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    kept_k: f64,
    kept_v: f64,
    middle_bytes: f64,
    dead_heads: usize,
    heads: usize,
    heads_by_kept_count: BTreeMap<usize, usize>,
    /// Kept channels per layer and KV head.
    kept_counts: Vec<Vec<usize>>,
    /// Formats per layer and KV head in lean blocks; null for dead heads.
    formats: Vec<Vec<Option<String>>>,
    /// Live heads by format.
    heads_by_format: BTreeMap<String, usize>,
    /// Share of heads that keep the channels of each slice of RoPE pairs, fastest first.
    rope_spectrum: Vec<f64>,
    info: &'a MaskInfo,
}

/// Slices of the RoPE spectrum.
const SLICES: usize = 16;

impl<'a> Report<'a> {
    fn new(mask: &'a ModelMask) -> Self {
        let MaskSummary { kept_k, kept_v, middle_bytes, dead_heads, heads } = mask.summary();
        let mut by_count = BTreeMap::new();
        for head in mask.heads() {
            *by_count.entry(head.kept_count()).or_insert(0) += 1;
        }
        let counts =
            |layer| mask.layer(Layer(layer)).iter().map(|head| head.kept_count()).collect();
        Self {
            layers: mask.layers(),
            kv_heads: mask.kv_heads(),
            head_dim: mask.head_dim(),
            kept_k,
            kept_v,
            middle_bytes,
            dead_heads,
            heads,
            heads_by_kept_count: by_count,
            kept_counts: (0..mask.layers()).map(counts).collect(),
            formats: (0..mask.layers()).map(|layer| masks::formats(mask, Layer(layer))).collect(),
            heads_by_format: masks::heads_by_format(mask),
            rope_spectrum: spectrum(mask),
            info: mask.info(),
        }
    }
}

/// Share of the heads that keep the channels of each slice of RoPE pairs, fastest first.
pub(crate) fn spectrum(mask: &ModelMask) -> Vec<f64> {
    let pairs = (mask.head_dim() / 2).max(1);
    let slices = SLICES.min(pairs);
    let mut kept = vec![0.0; slices];
    let mut all = vec![0.0; slices];
    for head in mask.heads() {
        for (c, keep) in head.flags().into_iter().enumerate() {
            let slice = (c % pairs) * slices / pairs;
            all[slice] += 1.0;
            kept[slice] += f64::from(u8::from(keep));
        }
    }
    kept.iter().zip(&all).map(|(kept, all)| kept / all).collect()
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mask = masks::read(&args.mask)?;
    let report = Report::new(&mask);
    if args.json { output::json(&report) } else { print(&mask, &report) }
}

fn print(mask: &ModelMask, report: &Report<'_>) -> anyhow::Result<()> {
    output::line(mask)?;
    for (name, value) in facts(mask.info()) {
        output::line(format!("  {name:<12} {value}"))?;
    }
    output::line(format!(
        "kept: K {}, V {}, bytes of the middle {}; dead heads {} of {}\n",
        output::percent(report.kept_k),
        output::percent(report.kept_v),
        output::percent(report.middle_bytes),
        report.dead_heads,
        report.heads
    ))?;

    let mut table = output::table([
        "layer",
        "kept channels per KV head",
        "formats in lean blocks",
        "K kept",
        "V kept",
    ]);
    for (layer, counts) in report.kept_counts.iter().enumerate() {
        let kept: usize = counts.iter().sum();
        let live = counts.iter().filter(|count| **count > 0).count();
        let counts_text: Vec<_> = counts.iter().map(|count| format!("{count:>3}")).collect();
        table.add_row([
            layer.to_string(),
            counts_text.join(" "),
            formats(&report.formats[layer]),
            output::percent(kept as f64 / (counts.len() * report.head_dim) as f64),
            output::percent(live as f64 / counts.len() as f64),
        ]);
    }
    output::line(table)?;

    output::line("\nlive heads by format in lean blocks")?;
    for (format, heads) in &report.heads_by_format {
        let share = *heads as f64 / report.heads as f64;
        output::line(format!("{format:>7} {heads:>5}  {}", stripes(share)))?;
    }
    output::line("\nheads by kept channels")?;
    for (count, heads) in &report.heads_by_kept_count {
        let share = *heads as f64 / report.heads as f64;
        output::line(format!("{count:>5} {heads:>5}  {}", stripes(share)))?;
    }
    output::line("\nshare kept along the RoPE spectrum, fastest pairs first")?;
    let pairs = (report.head_dim / 2).max(1);
    for (slice, share) in report.rope_spectrum.iter().enumerate() {
        let slices = report.rope_spectrum.len();
        let (from, to) = (slice * pairs / slices, (slice + 1) * pairs / slices);
        output::line(format!(
            "{:>9} {:>6.1} %  {}",
            format!("{from}..{to}"),
            share * 100.0,
            stripes(*share)
        ))?;
    }
    Ok(())
}

/// The formats of a layer's heads: one where all live ones have the same.
fn formats(heads: &[Option<String>]) -> String {
    let mut live: Vec<_> = heads.iter().flatten().collect();
    live.dedup();
    match live[..] {
        [] => "–".into(),
        [one] => one.clone(),
        _ => {
            let all: Vec<_> = heads.iter().map(|head| head.as_deref().unwrap_or("–")).collect();
            all.join(" ")
        }
    }
}

fn facts(info: &MaskInfo) -> Vec<(&'static str, String)> {
    let fingerprint = info.fingerprint.as_ref();
    let facts = [
        ("model", info.model_id.clone()),
        ("architecture", fingerprint.map(|f| format!("{}, {}", f.architecture, f.shape))),
        ("method", info.method.clone()),
        ("budget", info.budget.clone()),
        ("alignment", info.alignment.map(|n| n.to_string())),
        ("windows", info.windows.map(|w| format!("sink {}, recent {}", w.sink, w.recent))),
        ("predicted", info.predicted_kl.map(|kl| format!("KL {kl:.4}"))),
    ];
    let runs = info.runs.iter().flat_map(|run| {
        let made = format!("{} (seed {}, {})", run.shell_line(), run.seed, run.created_by);
        let inputs = run.inputs.iter().map(|input| {
            let digest: String = input.sha256.chars().take(12).collect();
            ("", format!("{} {} {digest}", input.role, input.name))
        });
        [("made by", made)].into_iter().chain(inputs)
    });
    let facts = facts.into_iter().filter_map(|(name, value)| Some((name, value?))).chain(runs);
    facts.map(|(name, value)| (name, output::escaped(&value))).collect()
}

/// A bar of up to 40 characters.
fn stripes(share: f64) -> String {
    "█".repeat((share * 40.0).round() as usize)
}
