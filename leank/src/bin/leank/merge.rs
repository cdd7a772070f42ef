//! `leank merge`

use std::path::PathBuf;

use leank::train::merge::{Merged, merge};

use crate::output;

/// Join the records of machines that measured different layers of one dump.
///
/// `leank learn DUMP --records DIR` then learns from them. A layer that two machines measured must be
/// the same in both; machines that share a folder need no merge.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folders of records, as `leank learn --layers --records` fills them.
    #[arg(required = true, value_name = "RECORDS")]
    from: Vec<PathBuf>,
    /// The folder that all of them go to; it may hold some already.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let Merged { new, same } = merge(&args.out, &args.from)?;
    output::line(format!("{}: {new} records are new, {same} were there", args.out.display()))
}
