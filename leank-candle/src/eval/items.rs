//! What is measured: sequences of text and retrieval tasks, laid out in tokens.

use leank_train::rng::Rng;

use super::EvalOptions;
use crate::tasks::{Task, lay_out};
use crate::texts::{Text, piece, tokenize};
use crate::{Model, Result};

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

pub(super) fn groups(model: &Model, texts: &[Text], options: &EvalOptions) -> Result<Vec<Group>> {
    // The last position predicts the token after the context.
    let length = options.context + 1;
    let why = format!("a context of {} and the token after it", options.context);
    let texts = tokenize(model, texts, length, &why)?;
    let mut groups = Vec::new();
    if options.sequences > 0 {
        let mut rng = Rng::fork(options.seed, 0);
        let cut = |start: &[u32]| {
            let prefix = options.context - options.positions;
            Item { tokens: piece(model, &start[..length]), prefix, scored: prefix + 1 }
        };
        let starts = starts(&texts, length, options.sequences, &mut rng);
        groups.push(Group { task: None, items: starts.into_iter().map(cut).collect() });
    }
    for (part, &task) in options.tasks.iter().enumerate() {
        let mut rng = Rng::fork(options.seed, 1 + part as u64);
        let mut items = Vec::new();
        for start in starts(&texts, length, options.items, &mut rng) {
            let start = piece(model, &start[..length]);
            let item = lay_out(task, model.tokenizer(), &start, length, &mut rng)?;
            items.push(Item { tokens: item.tokens, prefix: item.question, scored: item.answer });
        }
        groups.push(Group { task: Some(task), items });
    }
    Ok(groups)
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

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::quantized::gguf_file::Value;

    use super::*;
    use crate::testing::{TinyModel, load};
    use crate::{Error, Precision};

    fn options() -> EvalOptions {
        let tasks = vec![Task::Passkey, Task::MultiKey];
        EvalOptions {
            context: 400,
            positions: 8,
            sequences: 3,
            items: 2,
            tasks,
            ..Default::default()
        }
    }

    fn texts(n: usize) -> Vec<Text> {
        vec![Text { name: "letters".into(), text: "q".repeat(n) }]
    }

    fn items(model: &Model) -> Vec<Item> {
        let groups = groups(model, &texts(1000), &options()).unwrap();
        groups.into_iter().flat_map(|group| group.items).collect()
    }

    #[test]
    fn bos_comes_first_where_the_model_wants_it() {
        let tiny = TinyModel::llama();
        let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
            metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
            metadata.push(("tokenizer.ggml.add_bos_token".into(), Value::Bool(true)));
        });
        let with = items(&load(&path, Precision::F32).unwrap());
        let without = items(&tiny.load());
        assert_eq!(with.len(), 3 + 2 * 2);
        for (with, without) in with.iter().zip(&without) {
            assert_eq!((with.tokens.len(), with.tokens[0]), (401, 258));
            assert_eq!(with.tokens[1..], without.tokens[1..]);
            assert_ne!(without.tokens[0], 258);
        }
    }

    #[test]
    fn a_text_holds_the_context_and_the_token_after_it() {
        let model = TinyModel::llama().load();
        assert!(groups(&model, &texts(401), &options()).is_ok());
        let Err(error) = groups(&model, &texts(400), &options()) else {
            panic!("a text without the last position's target was taken")
        };
        assert!(matches!(error, Error::ShortText { found: 400, needed: 401, .. }));
        assert!(error.to_string().contains("a context of 400 and the token after it"), "{error}");
    }
}
