//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What can go wrong in loading and running a model, in the probe and in dumping.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading a file failed.
    #[error("{}: {action} failed: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file does not begin as a GGUF file does.
    #[error(
        "{}: not a GGUF file: it begins with {found}, expected the bytes \"GGUF\"; give a .gguf file, or a folder with config.json, tokenizer.json and .safetensors files",
        path.display()
    )]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: String,
    },
    /// A file whose content is not what its format says (cut short, damaged, or hostile).
    #[error("{}: damaged {format} file: {why}; fetch it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The format that was expected.
        format: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A tensor that the architecture needs is not in the model.
    #[error("{}: tensor {name} is missing: the file holds another or an incomplete model", path.display())]
    MissingTensor {
        /// The model.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor {name} has the shape {found:?}, the configuration says {expected:?}", path.display())]
    TensorShape {
        /// The model.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// An entry of the configuration or metadata that is missing or cannot be right.
    #[error("{}: {key}: expected {expected}, found {found}", path.display())]
    Config {
        /// The model.
        path: PathBuf,
        /// Metadata key, or field of `config.json`.
        key: String,
        /// What would be right.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A model, a feature of a model or a format that this crate does not run.
    #[error("{}: {what} {found} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The model.
        path: PathBuf,
        /// The kind of thing.
        what: &'static str,
        /// The thing.
        found: String,
        /// What there is instead.
        supported: &'static str,
    },
    /// The tokenizer could not be built, or failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A token that the model does not have.
    #[error("token {token} is not in the vocabulary of {vocab} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// More tokens than the model's context holds.
    #[error("{what} needs a context of {needed} tokens, the model has {limit}; take fewer tokens")]
    Context {
        /// What needs it.
        what: &'static str,
        /// Tokens needed.
        needed: usize,
        /// The model's context length.
        limit: usize,
    },
    /// A text that is too short for what is to be cut from it.
    #[error(
        "text {name} has {found} tokens, {needed} are needed ({why}); give a longer text, or ask for less context"
    )]
    ShortText {
        /// The text.
        name: String,
        /// Tokens it has.
        found: usize,
        /// Tokens needed.
        needed: usize,
        /// What needs them.
        why: String,
    },
    /// A text without any content.
    #[error("text {0} is empty: give one with something in it")]
    EmptyText(String),
    /// Two things that must fit each other and do not.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// The thing that does not fit.
        what: &'static str,
        /// What would have fitted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// An option that cannot be right.
    #[error("{option}: {why}")]
    Option {
        /// The option.
        option: &'static str,
        /// Why, and the mend.
        why: String,
    },
    /// A model cannot be loaded, for a reason that does not name its file.
    #[error("{}: {source}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: Box<Error>,
    },
    /// candle failed.
    #[error("tensor operation failed: {0}")]
    Candle(#[from] candle_core::Error),
    /// A shape, mask or cache failed.
    #[error(transparent)]
    Core(#[from] leank_core::Error),
    /// Writing a dump failed.
    #[error(transparent)]
    Train(#[from] leank_train::Error),
}

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// With the file or folder of a model that could not be loaded, where nothing says it yet.
    pub(crate) fn in_model(self, path: &Path) -> Self {
        match self {
            Self::Tokenizer(_) | Self::Mismatch { .. } | Self::Candle(_) | Self::Core(_) => {
                Self::Model { path: path.to_owned(), source: Box::new(self) }
            }
            named => named,
        }
    }

    pub(crate) fn mismatch(
        what: &'static str,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Self::Mismatch { what, expected: expected.to_string(), found: found.to_string() }
    }

    pub(crate) fn option(option: &'static str, why: impl Into<String>) -> Self {
        Self::Option { option, why: why.into() }
    }
}
