//! `leank report`

mod compare;
mod counts;
mod curves;
mod evaluations;
mod facts;
mod grid;
mod importance;
mod input;
mod kl;
mod page;
mod ratio;
mod section;
mod spectrum;

use std::path::{Path, PathBuf};

use leank::files::write_atomic;

use self::{input::Input, section::Section};
use crate::{
    figure::{Figure, png},
    output, target,
};

/// Show on one page whether to trust a mask: what it keeps, what that costs, what it saves.
///
/// The page is one HTML file that needs nothing else: it opens without a network, in light and dark, on
/// a phone and on paper. What --dump, --eval and --compare give is shown too. A dump is not computed
/// on: its records must be there, as `leank learn` leaves them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The mask: .safetensors, .pth or .npy.
    #[arg(long, value_name = "FILE")]
    mask: PathBuf,
    /// The dump that it was learned from: shows loss curves.
    #[arg(long, value_name = "FOLDER")]
    dump: Option<PathBuf>,
    /// What `leank eval --json` printed, of this mask and of others: shows predicted and measured KL.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    eval: Vec<PathBuf>,
    /// Another mask of the same shape: shows where they differ.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// The page to write.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Write every figure to this folder too, as a file that stands alone.
    #[arg(long, value_name = "FOLDER")]
    figures: Option<PathBuf>,
    /// What those files are.
    #[arg(long, value_name = "FORMAT", requires = "figures", default_value = "svg")]
    format: Format,
}

/// Formats of figures.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    Svg,
    Png,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let inputs = [&args.mask].into_iter().chain(&args.dump).chain(&args.eval).chain(&args.compare);
    target::check_file("--out", &args.out, inputs.map(PathBuf::as_path))?;
    let input = Input::read(args)?;
    let sections = sections(&input);
    let html = page::page(&input, &sections).into_string();
    write_atomic(&args.out, html.as_bytes())?;
    let figures: Vec<&Figure> = sections.iter().flat_map(Section::figures).collect();
    output::line(format!(
        "{}: {} figures, {}",
        args.out.display(),
        figures.len(),
        output::bytes(html.len() as u64)
    ))?;
    match &args.figures {
        Some(folder) => write_figures(folder, args.format, &figures),
        None => Ok(()),
    }
}

fn sections(input: &Input) -> Vec<Section> {
    let optional = [curves::section(input), kl::section(input)].into_iter().flatten();
    [importance::section(input), counts::section(input)]
        .into_iter()
        .chain(optional)
        .chain([ratio::section(input)])
        .chain(compare::section(input))
        .chain([spectrum::section(input)])
        .collect()
}

fn write_figures(folder: &Path, format: Format, figures: &[&Figure]) -> anyhow::Result<()> {
    target::make_folder("--figures", folder)?;
    for figure in figures {
        let (extension, bytes) = match format {
            Format::Svg => ("svg", figure.standalone().into_bytes()),
            Format::Png => ("png", png::render(figure)?),
        };
        let path = folder.join(format!("{}.{extension}", figure.id));
        write_atomic(&path, &bytes)?;
        output::line(path.display())?;
    }
    Ok(())
}
