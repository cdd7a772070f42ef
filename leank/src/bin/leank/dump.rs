//! `leank dump`

use std::{ops::RangeInclusive, path::PathBuf};

use leank::{
    Dtype,
    candle::{DumpOptions, dump, sequences},
    train::dump::{DumpWriter, Existing, Probe},
};

use crate::{model, output, parse, progress::Progress, record, target, texts};

/// Record what a model's attention sees on your text, for `leank learn`.
///
/// Per layer: queries, keys and values after RoPE at the last positions of each sequence, and how
/// the model's own predictions react to each head's output there (the Fisher probe). Use text like
/// what the model will see; 40 sequences and more. One dump serves every method and budget. A dump
/// that was killed goes on where it was when the same command is given again.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: model::Args,
    /// Text files, UTF-8.
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// The folder to write; it appears when the dump is whole.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Sequences.
    #[arg(long, default_value_t = 48)]
    sequences: usize,
    /// Decode positions per sequence.
    #[arg(long, default_value_t = 128)]
    positions: usize,
    /// Tokens before them, spread evenly over this range: the context lengths of deployment.
    #[arg(long, default_value = "1024..3584", value_name = "FROM..TO", value_parser = parse::lengths)]
    prefix: RangeInclusive<usize>,
    /// Draws of the probe.
    #[arg(long, default_value_t = 2, value_name = "DRAWS")]
    probes: usize,
    /// fisher: from gradients of the model's own predictions. random: without gradients, rougher.
    #[arg(long, default_value = "fisher")]
    probe: Probe,
    /// Share of the sequences that hide facts in the text and ask for them.
    #[arg(long, default_value_t = 0.3, value_parser = parse::share)]
    retrieval: f64,
    /// Element type on disk: f32, f16 or bf16.
    #[arg(long, default_value = "f16")]
    dtype: Dtype,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write the sequences as tokens too, for `tools/dump_hf.py --tokens`: JSON.
    #[arg(long, value_name = "FILE")]
    save_tokens: Option<PathBuf>,
    /// Replace a dump that is there.
    #[arg(long)]
    overwrite: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let existing = if args.overwrite { Existing::Replace } else { Existing::default() };
    DumpWriter::check_target(&args.out, existing)?;
    if let Some(path) = &args.save_tokens {
        let inputs = args.text.iter().map(PathBuf::as_path).chain([args.model.path()]);
        target::check_file("--save-tokens", path, inputs)?;
    }
    let texts = texts::read(&args.text)?;
    let model = args.model.load()?;
    let mut inputs = record::inputs("model", &[args.model.path().to_owned()])?;
    inputs.extend(record::texts(&texts));
    let options = DumpOptions {
        sequences: args.sequences,
        positions: args.positions,
        prefix: args.prefix.clone(),
        probe: args.probe,
        draws: args.probes,
        dtype: args.dtype,
        seed: args.seed,
        retrieval: args.retrieval,
        existing,
        run: Some(record::this_run(args.seed, inputs)),
    };
    if let Some(path) = &args.save_tokens {
        texts::write_tokens(path, sequences(&model, &texts, &options)?)?;
    }
    let shown = Progress::new("dumping sequences");
    let mut bytes = 0;
    let manifest = dump(&model, &texts, &args.out, &options, &mut |progress| {
        bytes = progress.bytes;
        let done = (progress.done, progress.resumed);
        shown.in_phase("dumping sequences", done, progress.sequences);
    })?;
    shown.finish();
    output::line(format!(
        "{}: {} of {}, {} sequences × {} positions, {}",
        args.out.display(),
        output::escaped(&manifest.model_id),
        manifest.shape,
        manifest.sequences.len(),
        manifest.positions,
        output::bytes(bytes),
    ))
}
