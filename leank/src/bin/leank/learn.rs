//! `leank learn`

use std::path::PathBuf;

use leank::{
    Layer, Windows,
    files::write_mask,
    train::{
        Progress,
        allocate::{AllocateOptions, Budget},
        dump::Dump,
        learn::{LearnOptions, Learned, Method, learn_mask},
    },
};
use serde::Serialize;

use crate::{masks, output, parse};

/// Learn from a dump which channels of K matter, and spend a budget on them.
///
/// Measuring is what takes time: its results are kept in the dump, so that a killed run goes on
/// where it was. Another budget takes a moment then, but for the method leank; so does another
/// --align that 8 divides, with e2 and static.
#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("budget").required(true).args(["k_ratio", "bytes"])))]
pub(crate) struct Args {
    /// The dump.
    dump: PathBuf,
    /// The mask to write: .safetensors (or .pth, .npy, which forget the model).
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Budget: share of K's channels to prune, the measure of the LeanK paper.
    #[arg(long, value_name = "SHARE", value_parser = parse::share)]
    k_ratio: Option<f64>,
    /// Budget: share of the middle's bytes to keep, K and V. Saves more at equal loss.
    #[arg(long, value_name = "SHARE", value_parser = parse::share, conflicts_with = "k_ratio")]
    bytes: Option<f64>,
    /// Kept counts are multiples of this.
    #[arg(long, default_value_t = 16)]
    align: usize,
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
    predicted_kl: Option<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let budget = match (args.k_ratio, args.bytes) {
        (Some(ratio), _) => Budget::KRatio(ratio),
        (None, Some(share)) => Budget::Bytes(share),
        (None, None) => unreachable!("clap requires one of them"),
    };
    masks::check_target(&args.out)?;
    anyhow::ensure!(
        args.dump.is_dir(),
        "{}: no such folder; a dump is the folder that `leank dump --out` writes",
        args.dump.display()
    );
    let dump = Dump::open(&args.dump)?;
    let options = LearnOptions {
        method: args.method,
        windows: Windows { sink: args.sink, recent: args.recent },
        step: step(args),
        seed: args.seed,
        threads: rayon::current_num_threads(),
        records: None,
    };
    let exempt = args.exempt.iter().copied().map(Layer).collect();
    let spending = AllocateOptions { budget, alignment: args.align, exempt };
    let bar = output::bar(0, "learning");
    let Learned { mask, without_middle, .. } =
        learn_mask(&dump, &options, &spending, &|progress: Progress<'_>| {
            bar.set_message(progress.phase.to_owned());
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        })?;
    bar.finish_and_clear();
    if without_middle > 0 {
        let positions = dump.manifest().valid_positions();
        eprintln!(
            "warning: at {without_middle} of {positions} positions nothing lies between --sink and \
             --recent: they lose nothing, so the predicted KL is too low; dump longer prefixes"
        );
    }
    write_mask(&args.out, &mask)?;
    let summary = mask.summary();
    let report = Report {
        mask: args.out.display().to_string(),
        kept_k: summary.kept_k,
        kept_v: summary.kept_v,
        middle_bytes: summary.middle_bytes,
        dead_heads: summary.dead_heads,
        heads: summary.heads,
        predicted_kl: mask.info().predicted_kl,
    };
    if args.json { output::json(&report) } else { print(&report) }
}

fn step(args: &Args) -> usize {
    let usual = LearnOptions::default().step;
    let serves = args.method != Method::E1 && args.align.is_multiple_of(usual);
    args.step.unwrap_or(if serves { usual } else { args.align })
}

fn print(report: &Report) -> anyhow::Result<()> {
    let predicted = report.predicted_kl.map_or(String::new(), |kl| {
        format!("; predicted KL {kl:.4}, right within a factor of about two")
    });
    output::line(format!(
        "{}: kept K {}, V {}, bytes of the middle {}; dead heads {} of {}{predicted}",
        report.mask,
        output::percent(report.kept_k),
        output::percent(report.kept_v),
        output::percent(report.middle_bytes),
        report.dead_heads,
        report.heads,
    ))
}
