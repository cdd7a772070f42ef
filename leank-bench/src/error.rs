//! The one error type of this crate.

/// What can go wrong in a measurement.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The cache refused a configuration or a step.
    #[error(transparent)]
    Cache(#[from] leank_core::Error),
    /// An option that cannot be measured.
    #[error("{what}: expected {expected}, found {found}")]
    Option {
        /// The option.
        what: &'static str,
        /// What can be measured.
        expected: String,
        /// What was given.
        found: String,
    },
    /// No memory for the buffer of the bandwidth probe.
    #[error(
        "the bandwidth probe: the system refused {bytes} bytes; measure with a smaller footprint"
    )]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The system started no pool of so many threads.
    #[error("a pool of {threads} threads could not be started; measure with fewer")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The pool's reason.
        source: rayon::ThreadPoolBuildError,
    },
    /// A dump of activations cannot be read.
    #[error(transparent)]
    Dump(#[from] leank_train::Error),
    /// A model cannot be loaded or run.
    #[error(transparent)]
    Model(#[from] leank_candle::Error),
    /// The process that keeps a core busy did not start.
    #[error("a process that keeps a core busy could not be started")]
    Busy {
        /// The system's reason.
        source: std::io::Error,
    },
    /// llama.cpp's worker did not start, or answered something else than was asked.
    #[error("llama.cpp's worker: {0}")]
    LlamaCpp(String),
    /// The CUDA device or its compiler failed.
    #[error("the CUDA device: {0}")]
    Device(String),
    /// A figure cannot be drawn.
    #[error("the figure could not be drawn: {why}")]
    Figure {
        /// The reason.
        why: String,
    },
}

/// Result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn option(
        what: &'static str,
        expected: impl Into<String>,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Option { what, expected: expected.into(), found: found.to_string() }
    }
}
