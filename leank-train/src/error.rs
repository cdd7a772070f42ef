//! The one error type of this crate.

use std::{
    io,
    path::{Path, PathBuf},
};

use leank_core::{KvHead, Layer, Windows};

/// What can go wrong with dumps and with learning from them.
///
/// Messages name the thing, what was expected, what was found, and the mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape or mask that `leank-core` refuses.
    #[error(transparent)]
    Core(#[from] leank_core::Error),
    /// Reading or writing a file failed.
    #[error("{}: {action} failed: {source}{}", path.display(), leank_core::mend(source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// No space was left while writing. The unfinished directory was removed.
    #[error(
        "{}: no space left on the device; the whole dump takes {needed} bytes: free that much, \
         choose another directory, or dump fewer sequences or f16 instead of f32",
        path.display()
    )]
    DiskFull {
        /// The file being written.
        path: PathBuf,
        /// Bytes of the whole dump.
        needed: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// A file of the dump is larger than the system lets this process write.
    #[error(
        "{}: the file is too large for its file system or for the limit of this process; a layer \
         of the dump takes {needed} bytes: raise the limit (ulimit -f), choose a directory on \
         another file system, or dump fewer sequences or f16 instead of f32",
        path.display()
    )]
    FileTooLarge {
        /// The file being written.
        path: PathBuf,
        /// Bytes of the activations of one layer.
        needed: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// Replacing a dump failed half-way, and the old one could not be put back.
    #[error(
        "{}: the finished dump could not be moved there, and neither could the old one that was \
         moved aside: move {} back to keep it",
        target.display(), aside.display()
    )]
    Aside {
        /// Where the dump should be.
        target: PathBuf,
        /// Where the old dump is.
        aside: PathBuf,
        /// The system's reason for not letting it back.
        source: io::Error,
    },
    /// The place where a dump should go is taken.
    #[error("{}: {why}", path.display())]
    Occupied {
        /// The target directory.
        path: PathBuf,
        /// What is there, and the mend.
        why: &'static str,
    },
    /// A dump whose manifest is not valid.
    #[error("{}: not a valid dump manifest: {why}", path.display())]
    Manifest {
        /// The manifest file, or the directory it is meant for.
        path: PathBuf,
        /// What is wrong with it, and the mend.
        why: String,
    },
    /// A dump written in a version of the format that this build does not read.
    #[error(
        "{}: dump format version {found}, but this build reads version {supported}; dump again, \
         or use the leank that wrote it",
        path.display()
    )]
    Version {
        /// The manifest file.
        path: PathBuf,
        /// Version in the file.
        found: u64,
        /// Version that is read.
        supported: u32,
    },
    /// A layer file whose size or header is not what the manifest says.
    #[error("{}: not a valid layer file of this dump: {why}; dump again", path.display())]
    LayerFile {
        /// The layer file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A layer file that belongs to another dump, or to another layer of this one.
    #[error(
        "{}: the file belongs elsewhere: {what} is {found} in the file and {expected} in this \
         dump; put the right file back, or dump again",
        path.display()
    )]
    OtherDump {
        /// The layer file.
        path: PathBuf,
        /// The field that differs.
        what: &'static str,
        /// This dump's value.
        expected: String,
        /// The file's value.
        found: String,
    },
    /// Activations that are not those that were written.
    #[error(
        "{}: damaged at bytes {}..{} ({what}): their checksum is {found:08x} where {expected:08x} is \
         expected; copy the file again, or dump again",
        path.display(), bytes.start, bytes.end
    )]
    Damaged {
        /// The layer file.
        path: PathBuf,
        /// The bytes of the file, of which one or more changed.
        bytes: std::ops::Range<u64>,
        /// What they are.
        what: String,
        /// Checksum that was written.
        expected: u32,
        /// Checksum of what is there.
        found: u32,
    },
    /// NaN or infinity among the activations, read from a dump or about to be written.
    #[error("{at} is {value}: {mend}")]
    NonFinite {
        /// Where it stands.
        at: Box<ElementPosition>,
        /// The value.
        value: f32,
        /// How to mend it.
        mend: &'static str,
    },
    /// A slice handed to the writer has the wrong length.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// The tensor and sequence.
        what: String,
        /// Length that the manifest asks for.
        expected: usize,
        /// Length that was given.
        found: usize,
    },
    /// A layer, sequence or KV head index that the dump does not have.
    #[error("{what} {index} is not in the dump: it has {count}")]
    OutOfRange {
        /// Kind of index.
        what: &'static str,
        /// The index.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A part of the dump was written twice, or not at all.
    #[error("layer {layer}, sequence {sequence} {what}")]
    WriteOrder {
        /// Layer of the part.
        layer: Layer,
        /// Sequence of the part.
        sequence: usize,
        /// What was wrong.
        what: &'static str,
    },
    /// An option that is wrong, alone or for this dump.
    #[error("{option}: {why}")]
    Options {
        /// The option, by a name that stays, so that a program can put its own in its place:
        /// `alignment`, `bytes`, `exempt`, `k-ratio`, `method`, `probe` or `step`.
        option: &'static str,
        /// Why it is wrong, and the mend.
        why: String,
    },
    /// Windows that cover all that any position of the dump sees: there is nothing to learn from.
    #[error(
        "windows (sink {}, recent {}) leave no middle in a dump of at most {tokens} tokens: dump \
         longer prefixes, or learn for a smaller sink or recent window",
        windows.sink, windows.recent
    )]
    NoMiddle {
        /// The windows.
        windows: Windows,
        /// Tokens that the last valid position of the longest sequence sees.
        tokens: usize,
    },
    /// A budget that no allocation meets.
    #[error("the budget {budget} cannot be met: {why}")]
    Budget {
        /// The budget, in words.
        budget: String,
        /// The nearest that can be met, and the mend.
        why: String,
    },
    /// A record of an earlier learning run that cannot be used.
    #[error("{}: not a usable learning record: {why}; delete the file and learn again", path.display())]
    Record {
        /// The record file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The statistics of a head overflowed, although every activation is finite.
    #[error(
        "layer {layer}, KV head {kv_head}: the statistics are not finite although the activations \
         are; some are too large to multiply in f32: check the model and the dump"
    )]
    Overflow {
        /// Layer of the head.
        layer: Layer,
        /// The KV head.
        kv_head: KvHead,
    },
    /// The thread pool could not be started.
    #[error("starting {threads} threads failed: {why}; ask for fewer")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The system's reason.
        why: String,
    },
}

/// Where one activation stands in a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementPosition {
    /// The file, where it was read from one.
    pub path: Option<PathBuf>,
    /// Layer.
    pub layer: Layer,
    /// Sequence.
    pub sequence: usize,
    /// Tensor: `q`, `g`, `k` or `v`.
    pub tensor: &'static str,
    /// Draw of the probe, for `g`.
    pub draw: Option<usize>,
    /// Query head for `q` and `g`, KV head for `k` and `v`.
    pub head: usize,
    /// Decode position for `q` and `g`, token for `k` and `v`.
    pub row: usize,
    /// Channel.
    pub channel: usize,
}

impl std::fmt::Display for ElementPosition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        write!(f, "layer {}, sequence {}, tensor {}", self.layer, self.sequence, self.tensor)?;
        if let Some(draw) = self.draw {
            write!(f, ", draw {draw}")?;
        }
        let (head, row) = match self.tensor {
            "q" | "g" => ("query head", "position"),
            _ => ("KV head", "token"),
        };
        write!(f, ", {head} {}, {row} {}, channel {}", self.head, self.row, self.channel)
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A function for `map_err` that names the file and what was being done.
    pub(crate) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// An [`Error::Options`].
    pub(crate) fn options(option: &'static str, why: impl Into<String>) -> Self {
        Self::Options { option, why: why.into() }
    }
}
