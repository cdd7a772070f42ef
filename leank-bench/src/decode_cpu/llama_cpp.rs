//! llama.cpp through its PyPI package, in a process of its own (`tools/llama_cpp_decode.py`).

use std::{
    ffi::OsStr,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::{Error, Result};

/// The worker's program: the binary may have been built elsewhere.
const SCRIPT: &str = include_str!("../../../tools/llama_cpp_decode.py");

/// A worker with a model and a type of K and V.
#[derive(Debug)]
pub(super) struct LlamaCpp {
    process: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Bytes of K and V of the last fill.
    pub(super) bytes: u64,
}

impl LlamaCpp {
    /// Starts a worker; the version of the package.
    ///
    /// # Errors
    /// [`Error::LlamaCpp`] when it does not start, e.g. for want of the package.
    pub(super) fn start(
        python: &Path,
        model: &Path,
        cache: &str,
        threads: usize,
    ) -> Result<(Self, String)> {
        let threads = threads.to_string();
        let arguments: [&OsStr; 8] = [
            "-c".as_ref(),
            SCRIPT.as_ref(),
            "--model".as_ref(),
            model.as_ref(),
            "--cache".as_ref(),
            cache.as_ref(),
            "--threads".as_ref(),
            threads.as_ref(),
        ];
        let mut process = Command::new(python)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Error::LlamaCpp(format!("{}: {error}", python.display())))?;
        let pipes = process.stdin.take().zip(process.stdout.take());
        let (commands, answers) =
            pipes.ok_or_else(|| Error::LlamaCpp("no pipes to the process".into()))?;
        let mut worker = Self { process, commands, answers: BufReader::new(answers), bytes: 0 };
        let version = worker.answer("ok")?;
        Ok((worker, version))
    }

    /// A cache of so many tokens.
    ///
    /// # Errors
    /// [`Error::LlamaCpp`] with what the worker says.
    pub(super) fn fill(&mut self, tokens: usize) -> Result<()> {
        self.command(&format!("fill {tokens}"))?;
        self.bytes = number(&self.answer("ok")?)?;
        Ok(())
    }

    /// Seconds per step, of so many.
    ///
    /// # Errors
    /// [`Error::LlamaCpp`] with what the worker says.
    pub(super) fn steps(&mut self, steps: usize) -> Result<f64> {
        self.command(&format!("run {steps}"))?;
        number(&self.answer("t")?)
    }

    fn command(&mut self, line: &str) -> Result<()> {
        let sent = writeln!(self.commands, "{line}").and_then(|()| self.commands.flush());
        sent.map_err(|error| Error::LlamaCpp(format!("it is gone: {error}")))
    }

    /// The rest of an answer that begins with a word.
    fn answer(&mut self, word: &str) -> Result<String> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line);
        read.map_err(|error| Error::LlamaCpp(format!("it is gone: {error}")))?;
        match line.trim_end().split_once(' ') {
            Some((first, rest)) if first == word => Ok(rest.to_owned()),
            _ if line.is_empty() => Err(Error::LlamaCpp("it ended without an answer".into())),
            _ => Err(Error::LlamaCpp(line.trim_end().to_owned())),
        }
    }
}

impl Drop for LlamaCpp {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::LlamaCpp(format!("`{text}` is no number")))
}
