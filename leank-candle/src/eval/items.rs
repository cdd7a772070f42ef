//! What is measured: sequences of text and retrieval tasks, laid out in tokens.

use leank_train::rng::Rng;

use super::EvalOptions;
use crate::tasks::{Task, lay_out};
use crate::{Error, Model, Result};

/// One sequence. Positions `prefix..tokens.len() - 1` are decoded; each predicts the token after
/// it, and predictions of tokens from `scored` on count.
pub(super) struct Item {
    pub(super) tokens: Vec<u32>,
    pub(super) prefix: usize,
    pub(super) scored: usize,
}

/// Items that are summed up together.
pub(super) struct Group {
    /// `None`: plain text.
    pub(super) task: Option<Task>,
    pub(super) items: Vec<Item>,
}

pub(super) fn groups(
    model: &Model,
    texts: &[(String, String)],
    options: &EvalOptions,
) -> Result<Vec<Group>> {
    let length = options.context + 1;
    let texts = tokenize(model, texts, length, options)?;
    let mut groups = Vec::new();
    if options.sequences > 0 {
        let mut rng = Rng::fork(options.seed, 0);
        let cut = |start: &[u32]| {
            let prefix = options.context - options.positions;
            Item { tokens: start[..length].to_vec(), prefix, scored: prefix + 1 }
        };
        let starts = starts(&texts, length, options.sequences, &mut rng);
        groups.push(Group { task: None, items: starts.into_iter().map(cut).collect() });
    }
    for (part, &task) in options.tasks.iter().enumerate() {
        let mut rng = Rng::fork(options.seed, 1 + part as u64);
        let mut items = Vec::new();
        for start in starts(&texts, length, options.items, &mut rng) {
            let item = lay_out(task, model.tokenizer(), start, length, &mut rng)?;
            items.push(Item { tokens: item.tokens, prefix: item.question, scored: item.answer });
        }
        groups.push(Group { task: Some(task), items });
    }
    Ok(groups)
}

fn tokenize(
    model: &Model,
    texts: &[(String, String)],
    length: usize,
    options: &EvalOptions,
) -> Result<Vec<Vec<u32>>> {
    let mut all = Vec::new();
    for (name, text) in texts {
        if text.trim().is_empty() {
            return Err(Error::EmptyText(name.clone()));
        }
        let tokens = model.tokenizer().encode_piece(text)?;
        if tokens.len() < length {
            return Err(Error::ShortText {
                name: name.clone(),
                found: tokens.len(),
                needed: length,
                prefix: length - options.positions,
                positions: options.positions,
            });
        }
        all.push(tokens);
    }
    if all.is_empty() {
        return Err(Error::option("texts", "none was given"));
    }
    Ok(all)
}

/// `count` places with at least `length` tokens behind them, in turn from every text, evenly spread
/// over it with a random shift.
fn starts<'a>(texts: &'a [Vec<u32>], length: usize, count: usize, rng: &mut Rng) -> Vec<&'a [u32]> {
    let per_text = count.div_ceil(texts.len());
    let mut starts = Vec::with_capacity(count);
    for round in 0..per_text {
        for text in texts {
            let room = text.len() - length + 1;
            let from = room * round / per_text;
            let to = room * (round + 1) / per_text;
            starts.push(&text[from + rng.below((to - from).max(1))..]);
        }
    }
    starts.truncate(count);
    starts
}
