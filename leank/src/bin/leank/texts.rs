//! Text files as they are given to `dump` and `eval`.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use leank::{
    candle::{Sequence, Text},
    files::write_atomic,
};
use serde::Serialize;

/// Largest text that is read: what the tokenizer takes at once.
const MAX_BYTES: u64 = 4 << 20;

/// Reads the files, each under its own name.
pub(crate) fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<Text>> {
    paths.iter().map(|path| Ok(Text { name: name(path), text: read_one(path)? })).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

pub(crate) fn read_one(path: &Path) -> anyhow::Result<String> {
    let what = || format!("{}: reading failed", path.display());
    let mut bytes = Vec::new();
    // It may be a pipe, and a device may never end.
    let file = std::fs::File::open(path).with_context(what)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).with_context(what)?;
    anyhow::ensure!(
        bytes.len() as u64 <= MAX_BYTES,
        "{}: larger than {MAX_BYTES} bytes; cut it, a few sequences of it are read",
        path.display()
    );
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: not UTF-8 text from byte {at} on; convert it first", path.display())
    })?;
    anyhow::ensure!(
        !text.trim().is_empty(),
        "{}: the text is empty; give one with something in it",
        path.display()
    );
    Ok(text)
}

/// What `--save-tokens` writes: what `tools/dump_hf.py` and `tools/eval_hf.py` read.
#[derive(Serialize)]
struct Sequences {
    sequences: Vec<Sequence>,
}

/// Writes sequences as tokens.
pub(crate) fn write_tokens(path: &Path, sequences: Vec<Sequence>) -> anyhow::Result<()> {
    Ok(write_atomic(path, &serde_json::to_vec(&Sequences { sequences })?)?)
}
