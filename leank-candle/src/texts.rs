//! Texts that sequences are cut from.

use serde::Serialize;

use crate::{Error, Model, Result};

/// A text with a name, to dump or to evaluate on.
#[derive(Clone, Debug)]
pub struct Text {
    /// Its name, e.g. the file's.
    pub name: String,
    /// The text.
    pub text: String,
}

/// A sequence that a dump or an evaluation runs a model over, as tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sequence {
    /// Tokens that the model reads before the first decode position.
    pub prefix: usize,
    /// Where it comes from, for people.
    pub source: String,
    /// All tokens.
    pub tokens: Vec<u32>,
}

/// The tokens of each text, at least `needed` of every one. `why` says in an error what needs them.
pub(crate) fn tokenize(
    model: &Model,
    texts: &[Text],
    needed: usize,
    why: &str,
) -> Result<Vec<Vec<u32>>> {
    if texts.is_empty() {
        return Err(Error::option("texts", "none was given; give at least one"));
    }
    let tokens = |Text { name, text }: &Text| {
        if text.trim().is_empty() {
            return Err(Error::EmptyText(name.clone()));
        }
        let tokens = model.tokenizer().encode_piece(text).map_err(|error| match error {
            Error::Tokenizer(why) => Error::Tokenizer(format!("text {name}: {why}")),
            other => other,
        })?;
        if tokens.len() < needed {
            let (name, found, why) = (name.clone(), tokens.len(), why.to_owned());
            return Err(Error::ShortText { name, found, needed, why });
        }
        Ok(tokens)
    };
    texts.iter().map(tokens).collect()
}

/// A sequence cut from a text: BOS takes the place of the first token where the model wants one in
/// front, as it has seen in training.
pub(crate) fn piece(model: &Model, cut: &[u32]) -> Vec<u32> {
    let mut piece = cut.to_vec();
    if let (Some(first), Some(bos)) = (piece.first_mut(), model.tokenizer().text_start()) {
        *first = bos;
    }
    piece
}
