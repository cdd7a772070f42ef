//! What the command prints on standard output: tables and JSON.

use std::{
    io::{self, Write as _},
    path::Path,
};

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::flags;

/// What failed when standard output cannot be written.
pub(crate) const STDOUT: &str = "writing to standard output";

/// Letters of a text that may come from anywhere.
const MOST_LETTERS: usize = 4096;

/// Prints a line; a reader that went away is not an error worth a message.
pub(crate) fn line(text: impl std::fmt::Display) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{text}").context(STDOUT)
}

/// Says something on standard error. That nobody reads it, or no disk takes it, is no reason to stop.
pub(crate) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Names a file in an error that does not name it itself.
pub(crate) fn about(path: &Path, error: impl Into<anyhow::Error>) -> anyhow::Error {
    let (error, path) = (error.into(), path.display().to_string());
    if error.to_string().starts_with(&path) { error } else { error.context(path) }
}

/// Prints a value as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(steerless(&serde_json::to_string_pretty(value)?))
}

/// JSON that says the same without what steers a terminal: of that, its writer leaves control characters beyond ASCII.
fn steerless(json: &str) -> String {
    let code = |c: char| format!("\\u{:04x}", u32::from(c));
    json.chars().map(|c| if c != '\n' && steers(c) { code(c) } else { c.into() }).collect()
}

/// An empty table of numbers with a header.
pub(crate) fn table<'a>(header: impl IntoIterator<Item = &'a str>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for (place, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(CellAlignment::Right);
        column.set_padding((if place == 0 { 0 } else { 2 }, 0));
    }
    table
}

/// `x` as a percentage with one decimal.
pub(crate) fn percent(x: f64) -> String {
    format!("{:.1} %", x * 100.0)
}

/// Bytes in the largest binary unit that leaves a number above one.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if n < 1024 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// Whether an error is that standard output was closed, as `| head` does.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// An error and its causes in one line. Causes that a message quotes already are not repeated.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut causes = error.chain().map(flags::message);
    let mut message = causes.next().unwrap_or_default();
    for cause in causes {
        if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    escaped(&message)
}

/// A text that may come from anywhere: what breaks lines or steers a terminal is shown, not done, and it ends
/// where it takes pages.
pub(crate) fn escaped(text: &str) -> String {
    let mut escaped: String =
        text.chars().take(MOST_LETTERS).map(|c| shown(c, steers(c))).collect();
    if text.chars().nth(MOST_LETTERS).is_some() {
        escaped.push('…');
    }
    escaped
}

/// What a model writes, for a terminal: its lines, and nothing that steers.
pub(crate) fn written(text: &str) -> String {
    text.chars().map(|c| shown(c, c.is_control() && c != '\n' && c != '\t')).collect()
}

/// Control characters; separators of lines; and marks that turn the direction of writing, which make letters stand
/// elsewhere than they are.
fn steers(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn shown(c: char, escaped: bool) -> String {
    if escaped { c.escape_default().to_string() } else { c.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_whatever_they_quote() {
        let error = anyhow::anyhow!("\u{1b}[2Jé\n").context("a: \"\u{7f}\"");
        assert_eq!(message(&error), "a: \"\\u{7f}\": \\u{1b}[2Jé\\n");
        let long = message(&anyhow::anyhow!("é".repeat(MOST_LETTERS + 1)));
        assert_eq!(long, "é".repeat(MOST_LETTERS) + "…");
        let longest = "\u{1b}".repeat(MOST_LETTERS);
        assert_eq!(escaped(&longest), "\\u{1b}".repeat(MOST_LETTERS));
        assert_eq!(escaped("a\u{202e}b\u{2028}\u{61c}"), "a\\u{202e}b\\u{2028}\\u{61c}");
    }

    #[test]
    fn json_says_the_same_without_what_steers() {
        let value = serde_json::json!({"name\u{9b}": ["a\u{7f}\u{202e}é\n", 1]});
        let text = steerless(&serde_json::to_string_pretty(&value).unwrap());
        assert!(text.chars().all(|c| c == '\n' || !steers(c)), "{text:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn a_model_writes_lines_and_does_not_steer() {
        assert_eq!(written("a\tb\né\r\u{1b}]0;x\u{7}"), "a\tb\né\\r\\u{1b}]0;x\\u{7}");
    }
}
