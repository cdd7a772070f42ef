//! What a growing dump has on the disk already, so that a killed run goes on where it was.
//!
//! One line per layer and sequence, appended when its activations are written: layer, sequence and
//! checksums, separated by spaces. The next run of the same dump believes a line only where the bytes
//! have its checksums: lines and activations reach the disk in any order.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
};

use leank_core::Layer;

use super::{again::open_again, sums};

/// Name of the journal within a dump's directory; gone from a finished dump.
pub(super) const JOURNAL_FILE: &str = "written.txt";

/// Bytes of a journal that are believed: ten times those of a large dump's.
const MAX_JOURNAL: u64 = 1 << 28;

/// A line of a journal.
#[derive(Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) layer: Layer,
    pub(super) sequence: usize,
    /// Of every part of the sequence, in order.
    pub(super) sums: Vec<u32>,
}

impl Entry {
    fn line(&self) -> String {
        let sums = sums::to_text(self.sums.iter().copied());
        format!("{} {} {sums}\n", self.layer, self.sequence)
    }

    fn from_line(line: &str, parts: usize) -> Option<Self> {
        let mut words = line.strip_suffix('\n')?.split(' ');
        let layer = Layer(words.next()?.parse().ok()?);
        let sequence = words.next()?.parse().ok()?;
        let sums = sums::from_text(words.next()?, parts)?;
        words.next().is_none().then_some(Self { layer, sequence, sums })
    }
}

/// A journal, open at its end.
#[derive(Debug)]
pub(super) struct Journal(File);

impl Journal {
    /// Opens or begins the journal at `path`; what it says so far, with `parts` checksums a line. Lines
    /// that were cut off are none.
    pub(super) fn open(path: &Path, parts: usize) -> io::Result<(Self, Vec<Entry>)> {
        let mut options = File::options();
        options.read(true).append(true);
        let mut file = match open_again(path, &options) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                options.create_new(true).open(path)?
            }
            opened => opened?,
        };
        let mut text = Vec::new();
        (&file).take(MAX_JOURNAL).read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        let entries = text.split_inclusive('\n').filter_map(|line| Entry::from_line(line, parts));
        let entries = entries.collect();
        if !text.is_empty() && !text.ends_with('\n') {
            // A word more than a line has.
            file.write_all(b" cut\n")?;
        }
        Ok((Self(file), entries))
    }

    pub(super) fn add(&mut self, entry: &Entry) -> io::Result<()> {
        // One write: another process sees the line or not.
        self.0.write_all(entry.line().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(JOURNAL_FILE);
        let entry = |n: usize| Entry { layer: Layer(n), sequence: 7, sums: vec![n as u32, 9] };
        let (mut journal, found) = Journal::open(&path, 2).unwrap();
        assert_eq!(found, []);
        journal.add(&entry(1)).unwrap();
        journal.add(&entry(2)).unwrap();
        drop(journal);
        let (_, found) = Journal::open(&path, 2).unwrap();
        assert_eq!(found, [entry(1), entry(2)]);
        // Cut off within the second line, then gone on.
        let whole = std::fs::read(&path).unwrap();
        for cut in entry(1).line().len()..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, found) = Journal::open(&path, 2).unwrap();
            assert_eq!(found, [entry(1)]);
            journal.add(&entry(3)).unwrap();
            drop(journal);
            let (_, found) = Journal::open(&path, 2).unwrap();
            assert_eq!(found, [entry(1), entry(3)], "{cut}");
        }
        // Checksums of another dump's number.
        assert_eq!(Journal::open(&path, 3).unwrap().1, []);
    }
}
