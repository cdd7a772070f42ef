//! `leank shard`

use std::path::{Path, PathBuf};

use leank::{
    Balance, HeadPartition, Layer, ModelMask,
    files::{Format, Staged, to_bytes},
};
use serde::Serialize;

use crate::{masks, output, target};

/// Split a mask over the ranks of a tensor-parallel group.
///
/// Every rank gets the same number of KV heads in every layer. balanced chooses which, so that ranks hold
/// about the same bytes: an engine then loads the rows of Q, K, V and the columns of O in the order that
/// partition.json gives. contiguous takes the heads as they come, as engines do without being told.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask.
    mask: PathBuf,
    /// Ranks: a number that divides the KV heads.
    #[arg(long, value_name = "RANKS")]
    world: usize,
    /// Which heads a rank has.
    #[arg(long, value_enum, default_value_t)]
    split: Split,
    /// Write rank-0.safetensors and so on to this folder, then partition.json: per layer, the KV heads
    /// of rank 0, those of rank 1, ...
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Split {
    /// Even bytes in every layer, and over all of them.
    #[default]
    Balanced,
    /// Heads as they come.
    Contiguous,
}

/// What `partition.json` holds, and `--json` prints.
#[derive(Serialize)]
struct Report {
    world: usize,
    split: Split,
    balanced: Balance,
    contiguous: Balance,
    /// Per layer, the KV heads of rank 0, those of rank 1, ...
    order: Vec<Vec<usize>>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mask = masks::read(&args.mask)?;
    let contiguous = HeadPartition::contiguous(&mask, args.world)?;
    let balanced = HeadPartition::balanced(&mask, args.world)?;
    let chosen = match args.split {
        Split::Balanced => &balanced,
        Split::Contiguous => &contiguous,
    };
    let order = |layer| chosen.order(Layer(layer)).iter().map(|head| head.0).collect();
    let report = Report {
        world: args.world,
        split: args.split,
        balanced: balanced.balance(&mask)?,
        contiguous: contiguous.balance(&mask)?,
        order: (0..mask.layers()).map(order).collect(),
    };
    if let Some(folder) = &args.out {
        write(folder, &mask, chosen, &report)?;
    }
    if args.json { output::json(&report) } else { print(args, &report) }
}

/// Where `partition.json` is, everything is: that of an earlier split goes before the first rank is
/// replaced, and the new one comes last. A disk that fills up leaves the earlier split as it was.
fn write(
    folder: &Path,
    mask: &ModelMask,
    partition: &HeadPartition,
    report: &Report,
) -> anyhow::Result<()> {
    target::make_folder("--out", folder)?;
    let ranks: Vec<Staged> = (0..partition.world())
        .map(|rank| {
            let bytes = to_bytes(&mask.shard(partition, rank)?, Format::Native)?;
            Staged::write(&rank_path(folder, rank), &bytes)
        })
        .collect::<Result<_, _>>()?;
    let path = folder.join("partition.json");
    let listing = Staged::write(&path, &serde_json::to_vec_pretty(report)?)?;
    remove(&path)?;
    ranks.into_iter().try_for_each(Staged::put)?;
    // An earlier split over more ranks must not look like a part of this one. The last ones first, so that
    // the next run finds what a killed one left.
    let further = (partition.world()..).take_while(|&rank| rank_path(folder, rank).exists());
    for rank in further.collect::<Vec<_>>().into_iter().rev() {
        remove(&rank_path(folder, rank))?;
    }
    Ok(listing.put()?)
}

fn rank_path(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank-{rank}.safetensors"))
}

/// Removes a file of an earlier split, where there is one.
fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => anyhow::bail!("{}: of an earlier split: {error}", path.display()),
    }
}

fn print(args: &Args, report: &Report) -> anyhow::Result<()> {
    let mut table = output::table(["split", "fullest rank", "emptiest rank", "a step takes"]);
    for (name, own) in [("contiguous", &report.contiguous), ("balanced", &report.balanced)] {
        let most = own.ranks.iter().copied().fold(f64::MIN, f64::max);
        let least = own.ranks.iter().copied().fold(f64::MAX, f64::min);
        let cells = [most, least, own.slowest].map(|x| format!("{x:.3}"));
        table.add_row(std::iter::once(name.to_owned()).chain(cells));
    }
    output::line(table)?;
    output::line(
        "\nBytes of the middle against the mean of the ranks; a step: the layers one after the other, each \
         as\nlong as its fullest rank takes, against even ranks. Sinks and recent windows are even by \
         themselves.",
    )?;
    if let Some(folder) = &args.out {
        output::line(format!("{}: {} masks and partition.json", folder.display(), args.world))?;
    }
    Ok(())
}
