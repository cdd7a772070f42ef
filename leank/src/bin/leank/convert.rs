//! `leank convert`

use std::path::PathBuf;

use leank::{
    MaskInfo, ModelShape,
    files::{Format, ReadOptions, ScalingFactors, read_mask, write_mask},
};

use crate::{output, parse};

/// Convert a mask between .safetensors, .pth, .npy, and from .tsv.
///
/// Only .safetensors keeps what a mask knows about its model; the others are bare numbers. A .tsv
/// of scaling factors becomes a mask by LeanK's rule (one quantile over the model, counts rounded
/// per head), for which --shape, --ratio and --align are needed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask to read.
    from: PathBuf,
    /// The mask to write; the extension tells the format.
    to: PathBuf,
    /// Shape of the model, for a .tsv.
    #[arg(long, value_name = "LAYERS,KV_HEADS,HEAD_DIM", value_parser = parse::mask_shape)]
    shape: Option<ModelShape>,
    /// Share of K to prune, for a .tsv.
    #[arg(long, default_value_t = 0.7, value_parser = parse::share)]
    ratio: f64,
    /// Kept counts are multiples of this, for a .tsv.
    #[arg(long, default_value_t = 32)]
    align: usize,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    output::check_mask_path(&args.to)?;
    let scaling =
        args.shape.map(|shape| ScalingFactors { shape, ratio: args.ratio, alignment: args.align });
    if scaling.is_none() && Format::from_path(&args.from)? == Format::Tsv {
        anyhow::bail!(
            "{} holds scaling factors: give the model's --shape LAYERS,KV_HEADS,HEAD_DIM",
            args.from.display()
        );
    }
    let mask = read_mask(&args.from, &ReadOptions { scaling })?;
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
        eprintln!("note: {} cannot say which model the mask is for", args.to.display());
    }
    Ok(())
}
