//! `leank completions` and `leank man`: what a package of the command brings beside it.

use std::{io::Write as _, path::PathBuf};

use anyhow::Context as _;
use clap_complete::Shell;
use leank::files::write_atomic;

use crate::{output, target};

/// Print completions for a shell.
///
/// For bash: leank completions bash > ~/.local/share/bash-completion/completions/leank
#[derive(clap::Args)]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Write manual pages, one per command.
///
/// For this user: leank man ~/.local/share/man/man1
#[derive(clap::Args)]
pub(crate) struct Man {
    /// The folder to write them to, made where it is missing.
    folder: PathBuf,
}

pub(crate) fn completions(args: &Completions, mut command: clap::Command) -> anyhow::Result<()> {
    // clap writes to something that cannot fail.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "leank", &mut script);
    std::io::stdout().lock().write_all(&script).context(output::STDOUT)
}

pub(crate) fn man(args: &Man, mut command: clap::Command) -> anyhow::Result<()> {
    target::make_folder("man", &args.folder)?;
    command = command.disable_help_subcommand(true);
    command.build();
    let commands = command.get_subcommands();
    for own in std::iter::once(&command).chain(commands) {
        let name = own.get_display_name().unwrap_or_else(|| own.get_name()).to_owned();
        let mut page = Vec::new();
        clap_mangen::Man::new(own.clone()).render(&mut page)?;
        let path = args.folder.join(format!("{name}.1"));
        write_atomic(&path, &page)?;
        output::line(path.display())?;
    }
    Ok(())
}
