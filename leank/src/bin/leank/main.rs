//! The `leank` command: dump → learn → eval, and what helps around it.
#![forbid(unsafe_code)]

mod check;
mod convert;
mod demo;
mod dump;
mod eval;
mod figure;
mod flags;
mod generate;
mod inspect;
mod learn;
mod masks;
mod merge;
mod model;
mod output;
mod parse;
mod plan;
mod progress;
mod record;
mod report;
mod setup;
mod shard;
mod target;
mod texts;
mod version;

use std::{ffi::OsString, process::ExitCode};

use anyhow::Context as _;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum as _};

/// Learn which channels of a model's K cache matter, and decode from a cache without the others.
///
/// To see it work: leank demo. The whole way, for a model in GGUF and some text:
///
///   leank dump  --model m.gguf --text a.txt b.txt --out dump
///   leank learn dump --k-ratio 0.7 --out mask.safetensors
///   leank eval  --model m.gguf --mask mask.safetensors --text c.txt
///
/// Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 the command line cannot be
/// understood, 3 (`check` alone) the mask does not suit.
#[derive(Parser)]
#[command(version, verbatim_doc_comment, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to use; as many as the machine has by default.
    #[arg(long, global = true, value_name = "N", value_parser = parse::threads)]
    threads: Option<std::num::NonZeroUsize>,
    /// How progress is told on standard error. json: one object a line, with what is done and the
    /// seconds left; an error is an event too.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "HOW")]
    progress: progress::Mode,
    /// No progress: the same as --progress none.
    #[arg(long, short, global = true)]
    quiet: bool,
}

impl Cli {
    /// The flags of every command, for a command that starts others.
    fn globals(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        if let Some(threads) = self.threads {
            words.extend(["--threads".into(), threads.to_string().into()]);
        }
        if let Some(mode) = self.progress.to_possible_value() {
            words.extend(["--progress".into(), mode.get_name().into()]);
        }
        if self.quiet {
            words.push("--quiet".into());
        }
        words
    }
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Dump(dump::Args),
    Learn(learn::Args),
    Merge(merge::Args),
    Eval(eval::Args),
    Check(check::Args),
    Inspect(inspect::Args),
    Convert(convert::Args),
    Plan(plan::Args),
    Report(report::Args),
    Shard(shard::Args),
    Generate(generate::Args),
    Completions(setup::Completions),
    Man(setup::Man),
}

fn main() -> ExitCode {
    let cli = parse_arguments();
    progress::set_mode(if cli.quiet { progress::Mode::None } else { cli.progress });
    match run(cli) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            progress::failed(&output::message(&error));
            ExitCode::FAILURE
        }
    }
}

fn parse_arguments() -> Cli {
    let mut command = Cli::command();
    if std::env::args_os().any(|word| word == "--version") {
        command = command.long_version(version::long());
    }
    // A number below zero is told that it is out of range, not that there is no such option.
    let mut matches = command.mut_subcommands(with_negative_numbers).get_matches();
    Cli::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.exit())
}

fn with_negative_numbers(command: clap::Command) -> clap::Command {
    command.mut_args(|arg| {
        let takes_values = arg.get_action().takes_values();
        if takes_values { arg.allow_negative_numbers(true) } else { arg }
    })
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .with_context(|| format!("--threads {threads}: not so many can be started"))?;
    }
    let globals = cli.globals();
    match cli.command {
        Command::Demo(args) => demo::run(&args, globals),
        Command::Dump(args) => dump::run(&args),
        Command::Learn(args) => learn::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Check(args) => return check::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Shard(args) => shard::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Completions(args) => setup::completions(&args, Cli::command()),
        Command::Man(args) => setup::man(&args, Cli::command()),
    }?;
    Ok(ExitCode::SUCCESS)
}
