//! `leank learn`

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    ops::Range,
    path::{Path, PathBuf},
};

use leank::{
    HeadPrecision, Layer, ModelShape, Precision, Windows,
    files::{write_atomic, write_mask},
    train::{
        self,
        allocate::{AllocateOptions, Budget, FrontPoint, Offer, front},
        dump::{Dump, Probe, layer_file_name},
        learn::{LearnOptions, Learned, Method, learn, learn_mask, measure_layers},
    },
};
use serde::Serialize;

use crate::{
    figure::front::{self as drawn, Line},
    masks, output,
    parse::{self, Align},
    progress::Progress,
    record, target,
};

/// Points of a front: one per thousandth of the dense middle's bytes.
const FRONT_STEPS: usize = 1000;

/// Learn from a dump which channels of K matter, and spend a budget on them.
///
/// Measuring is what takes time: its results are kept in the dump, so that a killed run goes on
/// where it was. Another budget takes a moment then, but for the method leank; so do other --formats
/// than k16,v16 once some were measured, and another --align that 8 divides, with e2 and static.
///
/// Machines can share the measuring: each does some --layers, all into the same --records or each into
/// its own, which `leank merge` joins; then one of them learns the mask as always.
#[derive(clap::Args)]
#[command(
    group(clap::ArgGroup::new("result").required(true).multiple(true).args(["k_ratio", "bytes", "pareto", "layers"])),
    group(clap::ArgGroup::new("budget").args(["k_ratio", "bytes"]).requires("out")),
)]
pub(crate) struct Args {
    /// The dump.
    dump: PathBuf,
    /// The mask to write: .safetensors (or .pth, .npy, which forget the model and formats).
    #[arg(long, value_name = "FILE", requires = "budget")]
    out: Option<PathBuf>,
    /// Budget: share of K's channels to prune, the measure of the LeanK paper.
    #[arg(long, value_name = "SHARE", value_parser = parse::share)]
    k_ratio: Option<f64>,
    /// Budget: share of the middle's bytes to keep, K and V, scales included. Saves more at equal
    /// loss.
    #[arg(long, value_name = "SHARE", value_parser = parse::share, conflicts_with = "k_ratio")]
    bytes: Option<f64>,
    /// Formats that K and V of each head may have in lean blocks, 16, 8 or 4 bits an element:
    /// k16,k8,k4,v16,v8,v4 are all. Others than k16,v16 need --bytes (or --pareto), and e2 or e1.
    #[arg(long, value_name = "FORMATS", default_value_t = Offer::default())]
    formats: Offer,
    /// Write the front of bytes against predicted loss, every thousandth of the middle's bytes: NAME.tsv
    /// and a figure, NAME.svg.
    #[arg(long, value_name = "NAME")]
    pareto: Option<PathBuf>,
    /// Only measure these layers, FROM..TO without TO, and keep the records.
    #[arg(long, value_name = "LAYERS", value_parser = parse::layers, conflicts_with_all = ["budget", "pareto", "out"])]
    layers: Option<Range<usize>>,
    /// Where the records of measuring are kept; in the dump by default.
    #[arg(long, value_name = "DIR")]
    records: Option<PathBuf>,
    /// Kept counts are multiples of this. auto: of --step (8), where a budget of bytes chooses, with the
    /// padding that the backend adds to a count counted.
    #[arg(long, default_value = "16", value_parser = parse::alignment)]
    align: Align,
    /// The backend whose padding a budget of bytes counts.
    #[arg(long, value_enum, default_value_t)]
    backend: masks::Padding,
    /// First tokens that stay whole.
    #[arg(long, default_value_t = Windows::default().sink)]
    sink: usize,
    /// Most recent tokens that stay whole.
    #[arg(long, default_value_t = Windows::default().recent)]
    recent: usize,
    /// e2: backward elimination, the best. e1: one quadratic model, faster. static: norms of q and
    /// k. leank: the paper's two stages of training. The last two are there to compare with.
    #[arg(long, default_value = "e2")]
    method: Method,
    /// Channels removed between two measurements; it divides the alignment. By default 8, with
    /// which one measurement serves every alignment that 8 divides, and the alignment for e1.
    #[arg(long, value_name = "CHANNELS")]
    step: Option<usize>,
    /// Layers that are never pruned, e.g. sliding-window ones.
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    exempt: Vec<usize>,
    /// Seed of what is random (leank only).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    mask: String,
    kept_k: f64,
    kept_v: f64,
    middle_bytes: f64,
    dead_heads: usize,
    heads: usize,
    /// Live heads by format in lean blocks.
    heads_by_format: BTreeMap<String, usize>,
    predicted_kl: Option<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let budget = match (args.k_ratio, args.bytes) {
        (Some(ratio), _) => Some(Budget::KRatio(ratio)),
        (None, share) => share.map(Budget::Bytes),
    };
    if let Some(out) = &args.out {
        // Layers of the dump have the extension of masks.
        let layers = (0..).map(|layer| args.dump.join(layer_file_name(Layer(layer))));
        let layers: Vec<_> = layers.take_while(|path| path.exists()).collect();
        target::check_mask("--out", out, layers.iter().map(PathBuf::as_path))?;
        if args.formats.is_coded() {
            target::check_says_formats("--out", out)?;
        }
    }
    if let Some(name) = &args.pareto {
        check_front(args, name)?;
    }
    let what = if args.dump.exists() { "is a file" } else { "no such folder" };
    anyhow::ensure!(
        args.dump.is_dir(),
        "{}: {what}; a dump is the folder that `leank dump --out` writes",
        args.dump.display()
    );
    let dump = Dump::open(&args.dump)?;
    let options = LearnOptions {
        method: args.method,
        windows: Windows { sink: args.sink, recent: args.recent },
        step: step(args),
        seed: args.seed,
        threads: rayon::current_num_threads(),
        records: args.records.clone(),
        precisions: args.formats.is_coded(),
        run: Some(record::this_run(args.seed, Vec::new())),
    };
    if let Some(layers) = &args.layers {
        return measure(args, &dump, &options, layers.clone());
    }
    // A front is of all budgets of bytes.
    let spending = AllocateOptions {
        budget: budget.unwrap_or(Budget::Bytes(1.0)),
        alignment: match args.align {
            Align::Auto => options.step,
            Align::Of(alignment) => alignment,
        },
        exempt: args.exempt.iter().copied().map(Layer).collect(),
        offer: args.formats.clone(),
        rules: args.backend.rules(),
    };
    if let (Some(out), Some(_)) = (&args.out, budget) {
        write(args, out, &dump, &options, &spending)?;
    }
    match &args.pareto {
        Some(name) => write_front(name, &dump, options, spending),
        None => Ok(()),
    }
}

/// Refuses a front that cannot be made or written, before work is done for it.
fn check_front(args: &Args, name: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        matches!(args.method, Method::E2 | Method::E1),
        "--pareto: {} allocates by quantile and has no front; use e2 or e1",
        args.method
    );
    anyhow::ensure!(
        name.file_name().is_some() && target::has_folder(name),
        "--pareto: {} is not a name in a folder that is there; NAME.tsv and NAME.svg are written",
        name.display()
    );
    Ok(())
}

/// Measures some layers: one machine's share.
fn measure(
    args: &Args,
    dump: &Dump,
    options: &LearnOptions,
    layers: Range<usize>,
) -> anyhow::Result<()> {
    let progress = Progress::new("learning");
    measure_layers(dump, options, layers.clone(), &|now| show(&progress, now))?;
    progress.finish();
    let records = args.records.clone().unwrap_or_else(|| args.dump.join("learn"));
    output::line(format!(
        "layers {}..{} of {} are measured: {}",
        layers.start,
        layers.end,
        dump.manifest().shape.layers,
        records.display()
    ))
}

/// Learns a mask and writes it.
fn write(
    args: &Args,
    out: &Path,
    dump: &Dump,
    options: &LearnOptions,
    spending: &AllocateOptions,
) -> anyhow::Result<()> {
    let progress = Progress::new("learning");
    let Learned { mask, without_middle, .. } =
        learn_mask(dump, options, spending, &|now| show(&progress, now))?;
    progress.finish();
    if without_middle > 0 {
        let positions = dump.manifest().valid_positions();
        output::note(format_args!(
            "warning: at {without_middle} of {positions} positions nothing lies between --sink and \
             --recent: they lose nothing, so the predicted KL is too low; dump longer prefixes"
        ));
    }
    write_mask(out, &mask)?;
    let summary = mask.summary();
    let report = Report {
        mask: out.display().to_string(),
        kept_k: summary.kept_k,
        kept_v: summary.kept_v,
        middle_bytes: summary.middle_bytes,
        dead_heads: summary.dead_heads,
        heads: summary.heads,
        heads_by_format: masks::heads_by_format(&mask),
        predicted_kl: mask.info().predicted_kl,
    };
    if args.json { output::json(&report) } else { print(args.method, &report) }
}

fn show(progress: &Progress, now: train::Progress<'_>) {
    progress.in_phase(now.phase, (now.done, now.reused), now.total);
}

/// Writes the front as a table and, beside that of 16 bits, as a figure.
fn write_front(
    name: &Path,
    dump: &Dump,
    options: LearnOptions,
    spending: AllocateOptions,
) -> anyhow::Result<()> {
    let shape = dump.manifest().shape;
    let spending = AllocateOptions { budget: Budget::Bytes(1.0), ..spending };
    let progress = Progress::new("learning");
    let curves = learn(dump, &options, &|now| show(&progress, now))?;
    progress.finish();
    let own = front(&curves, &shape, &spending, FRONT_STEPS)?;
    // Only the Fisher probe measures in nats.
    let (column, axis) = match dump.manifest().probe {
        Probe::Fisher => ("predicted_kl", "predicted KL (nats)"),
        _ => ("half_loss", "half the summed loss"),
    };
    let with_extension = |extension: &str| {
        let mut path = name.as_os_str().to_owned();
        path.push(extension);
        PathBuf::from(path)
    };
    let mut lines = vec![line(&spending.offer, &own)];
    if spending.offer.is_coded() {
        let plain = AllocateOptions { offer: Offer::default(), ..spending };
        lines.push(line(&plain.offer, &front(&curves, &shape, &plain, FRONT_STEPS)?));
    }
    let svg = drawn::front(&lines, axis).standalone();
    let (table, picture) = (with_extension(".tsv"), with_extension(".svg"));
    write_atomic(&table, front_table(&own, column, &shape).as_bytes())?;
    write_atomic(&picture, svg.as_bytes())?;
    output::note(format_args!("{} points: {}, {}", own.len(), table.display(), picture.display()));
    Ok(())
}

fn line(offer: &Offer, front: &[FrontPoint]) -> Line {
    let point = |point: &FrontPoint| (point.bytes, point.allocation.predicted_kl());
    Line { name: offer_words(offer), points: front.iter().map(point).collect() }
}

/// What is offered, for a legend.
fn offer_words(offer: &Offer) -> String {
    if !offer.is_coded() {
        return "pruned only".into();
    }
    let words = |of: fn(HeadPrecision) -> Precision| {
        let mut bits: Vec<String> = Vec::new();
        for precision in offer.precisions().map(of) {
            let own = precision.bits().to_string();
            if !bits.contains(&own) {
                bits.push(own);
            }
        }
        match &bits[..] {
            [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
            _ => bits.concat(),
        }
    };
    match (words(|head| head.k), words(|head| head.v)) {
        (k, v) if k == v => format!("{k} bits"),
        (k, v) => format!("K in {k} bits, V in {v}"),
    }
}

/// Tab-separated, a point a line; bits are means over what is kept.
fn front_table(front: &[FrontPoint], loss: &str, shape: &ModelShape) -> String {
    let heads = shape.layers * shape.kv_heads;
    let mut table = format!("bytes\t{loss}\tkept_k\tkept_v\tbits_k\tbits_v\n");
    for FrontPoint { bytes, allocation } in front {
        let own = || allocation.counts.iter().zip(&allocation.precisions).filter(|(n, _)| **n > 0);
        let kept: usize = own().map(|(n, _)| n).sum();
        let live = own().count();
        let bits = |precision: Precision| usize::from(precision.bits());
        let bits_k: usize = own().map(|(n, head)| n * bits(head.k)).sum();
        let bits_v: usize = own().map(|(_, head)| bits(head.v)).sum();
        // No live head has no bits: an empty cell.
        let mean = |bits: usize, of: usize| match of {
            0 => String::new(),
            of => format!("{:.2}", bits as f64 / of as f64),
        };
        let kept_k = kept as f64 / (heads * shape.head_dim) as f64;
        let kept_v = live as f64 / heads as f64;
        let kl = allocation.predicted_kl();
        let (bits_k, bits_v) = (mean(bits_k, kept), mean(bits_v, live));
        let _ =
            writeln!(table, "{bytes:.4}\t{kl:.4e}\t{kept_k:.4}\t{kept_v:.4}\t{bits_k}\t{bits_v}");
    }
    table
}

fn step(args: &Args) -> usize {
    let usual = LearnOptions::default().step;
    let own = match args.align {
        Align::Of(align) if args.method == Method::E1 || !align.is_multiple_of(usual) => align,
        _ => usual,
    };
    args.step.unwrap_or(own)
}

fn print(method: Method, report: &Report) -> anyhow::Result<()> {
    let predicted = report.predicted_kl.map_or(String::new(), |kl| match method {
        // Its losses are large, beyond what the prediction is made for.
        Method::Static => format!("; predicted KL {kl:.4}, too low where it is large"),
        _ => format!("; predicted KL {kl:.4}, right within a factor of about two"),
    });
    output::line(format!(
        "{}: kept K {}, V {}, bytes of the middle {}; formats {}; dead heads {} of {}{predicted}",
        report.mask,
        output::percent(report.kept_k),
        output::percent(report.kept_v),
        output::percent(report.middle_bytes),
        masks::format_words(&report.heads_by_format),
        report.dead_heads,
        report.heads,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_legend_says_what_is_offered() {
        for (formats, words) in [
            ("k16,v16", "pruned only"),
            ("k16,k8,k4,v16,v8,v4", "16, 8 and 4 bits"),
            ("k8,k4,v8,v4", "8 and 4 bits"),
            ("k8,v8", "8 bits"),
            ("k8,k4,v4", "K in 8 and 4 bits, V in 4"),
        ] {
            assert_eq!(offer_words(&formats.parse().unwrap()), words);
        }
    }
}
