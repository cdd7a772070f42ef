//! The one error type of this crate.

use std::{io, path::PathBuf};

/// What can go wrong in masks, caches and backends.
///
/// Messages name the thing, what was expected, what was found, and the mend. Only
/// [`Error::Unavailable`] may lead a caller to fall back to another backend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size, count or index does not fit the thing it is used with.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// The thing that does not fit.
        what: &'static str,
        /// What would have fitted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A value that is wrong whatever it is used with.
    #[error("invalid {what}: {why}")]
    Invalid {
        /// The value's name.
        what: &'static str,
        /// Why it is wrong, and the mend.
        why: String,
    },
    /// A mask was learned for another model.
    #[error(
        "the mask was learned for another model: {field} is {found} in the mask and {expected} in the model; learn a mask for this model, or use the model the mask names ({model})"
    )]
    OtherModel {
        /// The first field of the fingerprint that differs.
        field: &'static str,
        /// The model's value.
        expected: String,
        /// The mask's value.
        found: String,
        /// The model id that the mask carries.
        model: String,
    },
    /// The pools cannot hold what a step needs. Nothing was changed.
    #[error(
        "the step needs {needed} bytes of cache and {available} are free under the limit of {limit}: {missing} bytes are missing; release sequences, plan a smaller step or raise the limit"
    )]
    OutOfMemory {
        /// Bytes of the blocks that the step would take.
        needed: u64,
        /// Bytes left under the limit.
        available: u64,
        /// Bytes short: `needed - available`.
        missing: u64,
        /// The limit of the cache.
        limit: u64,
    },
    /// The system refused memory, although no limit of the cache stood against it. Nothing was
    /// changed. Another backend is no mend, so this is not [`Error::Unavailable`].
    #[error(
        "the system refused {bytes} bytes of memory for {what}: release sequences or plan a smaller step, give the machine more free memory, or set a limit below what it has"
    )]
    SystemMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes of the allocation that failed.
        bytes: u64,
    },
    /// A device failed at something. A cache that it was working for is poisoned.
    #[error("{device}: {action} failed: {why}")]
    Device {
        /// The device.
        device: String,
        /// What was being done.
        action: &'static str,
        /// The driver's reason.
        why: String,
    },
    /// A cache whose device failed at an earlier call: what it holds may be wrong.
    #[error(
        "the cache is poisoned, since its device failed earlier ({why}): drop it, and make another one on a device that works"
    )]
    Poisoned {
        /// The earlier failure.
        why: String,
    },
    /// A sequence id that this cache does not hold (any more).
    #[error("sequence {0} is not in this cache: it was released or belongs to another cache")]
    UnknownSequence(u64),
    /// A call that only makes sense between `plan` and `commit`, or only outside.
    #[error("{call} called {when}: a step is plan, then append and attend per layer, then commit")]
    Order {
        /// The call.
        call: &'static str,
        /// What was wrong about its time.
        when: String,
    },
    /// A backend, device or instruction set that is not there. A caller may fall back to another.
    #[error("{what} is not available: {why}")]
    Unavailable {
        /// The backend, device or instruction set.
        what: &'static str,
        /// The reason.
        why: String,
    },
    /// A file whose content is not what its format says.
    #[error("{}: not a valid {format} file: {why}", path.display())]
    Format {
        /// The file, or a name for the bytes.
        path: PathBuf,
        /// The format that was expected.
        format: &'static str,
        /// What is wrong with it, and the mend.
        why: String,
    },
    /// Reading or writing a file failed.
    #[error("{}: {action} failed: {source}{}", path.display(), mend(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// The mend for the system's reasons that have one, to stand behind the reason in a message.
#[must_use]
pub fn mend(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space, or choose another place"
        }
        io::ErrorKind::FileTooLarge => {
            "; raise the limit of the process (ulimit -f), or choose another file system"
        }
        _ => "",
    }
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A [`Error::Mismatch`] from anything that prints.
    pub fn mismatch(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Mismatch { what, expected: expected.to_string(), found: found.to_string() }
    }

    /// A [`Error::Invalid`] from anything that prints.
    pub fn invalid(what: &'static str, why: impl ToString) -> Self {
        Self::Invalid { what, why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_mended_is_told() {
        let message = |kind: io::ErrorKind| {
            Error::Io { path: "m.npy".into(), action: "writing", source: kind.into() }.to_string()
        };
        assert!(message(io::ErrorKind::StorageFull).contains("free some space"));
        assert!(message(io::ErrorKind::FileTooLarge).contains("ulimit -f"));
        let other = message(io::ErrorKind::NotFound);
        assert!(other.starts_with("m.npy: writing failed: ") && !other.contains(';'), "{other}");
    }
}
