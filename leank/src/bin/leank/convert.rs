//! `leank convert`

use std::path::PathBuf;

use leank::{
    MaskInfo, ModelShape,
    files::{Format, ReadOptions, ScalingFactors, read_mask, write_mask},
};

use crate::{output, parse, target};

/// Convert a mask between .safetensors, .pth, .npy, and from .tsv.
///
/// Only .safetensors keeps what a mask knows about its model; the others are bare numbers. A .tsv
/// of scaling factors becomes a mask by LeanK's rule (one quantile over the model, counts rounded
/// per head), for which --shape is needed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask to read.
    from: PathBuf,
    /// The mask to write; the extension tells the format.
    to: PathBuf,
    /// Shape of the model, for a .tsv and nothing else.
    #[arg(long, value_name = "LAYERS,KV_HEADS,HEAD_DIM", value_parser = parse::mask_shape)]
    shape: Option<ModelShape>,
    /// Share of K to prune, for a .tsv; 0.7 by default.
    #[arg(long, value_parser = parse::share)]
    ratio: Option<f64>,
    /// Kept counts are multiples of this, for a .tsv; 32 by default.
    #[arg(long)]
    align: Option<usize>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    target::check_mask("TO", &args.to, [])?;
    let mask = read_mask(&args.from, &ReadOptions { scaling: scaling(args)? })?;
    if mask.precisions().is_some() {
        target::check_says_formats("TO", &args.to)?;
    }
    write_mask(&args.to, &mask)?;
    let summary = mask.summary();
    output::line(format!(
        "{}: {mask}, {} of K kept, {} dead heads of {}",
        args.to.display(),
        output::percent(summary.kept_k),
        summary.dead_heads,
        summary.heads,
    ))?;
    if Format::from_path(&args.to)? != Format::Native && *mask.info() != MaskInfo::default() {
        output::note(format_args!(
            "note: {} cannot say which model the mask is for",
            args.to.display()
        ));
    }
    Ok(())
}

/// LeanK's own ratio and alignment where none is given.
fn scaling(args: &Args) -> anyhow::Result<Option<ScalingFactors>> {
    let is_tsv = Format::from_path(&args.from)? == Format::Tsv;
    match args.shape {
        None if is_tsv => anyhow::bail!(
            "{} holds scaling factors: give the model's --shape LAYERS,KV_HEADS,HEAD_DIM",
            args.from.display()
        ),
        _ if !is_tsv && (args.shape.is_some() || args.ratio.is_some() || args.align.is_some()) => {
            anyhow::bail!(
                "{} is a mask already: --shape, --ratio and --align are for the scaling factors of a .tsv",
                args.from.display()
            )
        }
        shape => Ok(shape.map(|shape| ScalingFactors {
            shape,
            ratio: args.ratio.unwrap_or(0.7),
            alignment: args.align.unwrap_or(32),
        })),
    }
}
