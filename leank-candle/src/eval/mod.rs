//! What a mask costs in quality and saves in bytes, measured by decoding through the lean cache.
//!
//! Every item is a prefix and a continuation. The model reads the prefix densely, as engines do,
//! and both ways go on from there with the same tokens: densely, and token by token through a
//! lean cache that holds the prefix. Nothing is simulated with masked tensors.

mod items;
mod runner;
mod score;

use leank_core::CacheConfig;
use serde::Serialize;

use crate::{Error, Model, Result, Sequence, Text, tasks::Task};
pub use score::{Divergence, TaskScore, TextScore};

/// Most sequences of text, and most items of a task: they are laid out before anything runs.
const MAX_ITEMS: usize = 1 << 16;

/// What to measure.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Tokens of context at the last decoded position.
    pub context: usize,
    /// Decoded positions per sequence of text.
    pub positions: usize,
    /// Sequences of text.
    pub sequences: usize,
    /// Retrieval tasks.
    pub tasks: Vec<Task>,
    /// Items per task.
    pub items: usize,
    /// Sequences that decode together.
    pub batch: usize,
    /// Seed of where sequences are cut and what is hidden.
    pub seed: u64,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            context: 2048,
            positions: 128,
            sequences: 16,
            tasks: Vec::new(),
            items: 32,
            batch: 8,
            seed: 1,
        }
    }
}

/// Bytes of the lean caches at the end of the text sequences, as they report them. Sliding layers
/// count on both sides with the tokens in sight, in the cache's element type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct CacheBytes {
    /// Tokens.
    pub tokens: u64,
    /// Bytes of the blocks in use.
    pub bytes: u64,
    /// Bytes of a dense cache of the same tokens.
    pub dense_bytes: u64,
}

impl CacheBytes {
    /// Whole-KV ratio; `None` when nothing was measured.
    #[must_use]
    pub fn whole_kv_ratio(&self) -> Option<f64> {
        (self.dense_bytes > 0).then(|| self.bytes as f64 / self.dense_bytes as f64)
    }
}

/// The measurements of one mask.
#[derive(Clone, Debug, Serialize)]
pub struct MaskReport {
    /// On plain text; absent when no sequences were asked for.
    pub text: Option<TextScore>,
    /// On retrieval tasks.
    pub tasks: Vec<TaskScore>,
    /// Measured on the caches.
    pub cache: CacheBytes,
}

impl MaskReport {
    /// Whether every divergence is a number: none is where values are too large for the cache's type.
    #[must_use]
    pub fn is_finite(&self) -> bool {
        let text = self.text.iter().map(|text| &text.divergence);
        let tasks = self.tasks.iter().map(|task| &task.divergence);
        text.chain(tasks).all(|divergence| divergence.kl.is_finite())
    }
}

/// Progress of an evaluation: items done and all of them. An item is one sequence read densely or
/// one sequence decoded through one mask.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// Measures every configuration on the same items; the dense side is computed once.
///
/// # Errors
/// [`Error::Option`] for options that cannot be right, [`Error::Context`] when the model's context
/// is shorter than asked for, [`Error::ShortText`] and [`Error::EmptyText`], and what the model or
/// a cache says.
pub fn evaluate(
    model: &Model,
    configs: &[CacheConfig],
    texts: &[Text],
    options: &EvalOptions,
    progress: Progress<'_>,
) -> Result<Vec<MaskReport>> {
    check(model, options)?;
    let groups = items::groups(model, texts, options)?;
    let all: usize = groups.iter().map(|group| group.items.len()).sum();
    let mut done = 0;
    let total = all * (1 + configs.len());
    let mut tick = || {
        done += 1;
        progress(done, total);
    };
    let mut reports: Vec<MaskReport> = configs
        .iter()
        .map(|_| MaskReport { text: None, tasks: Vec::new(), cache: CacheBytes::default() })
        .collect();
    for group in &groups {
        let measured = runner::run(model, configs, &group.items, options.batch, &mut tick)?;
        let Some(first) = measured.first() else { continue };
        for (report, own) in reports.iter_mut().zip(&measured) {
            match group.task {
                Some(task) => report.tasks.push(TaskScore::new(task, &own.items, &first.items)),
                None => {
                    report.text = Some(TextScore::new(&own.items, &first.items));
                    report.cache = own.cache;
                }
            }
        }
    }
    Ok(reports)
}

/// The sequences of plain text that [`evaluate`] would decode, with the token after the last position,
/// e.g. to measure another program's model on them.
///
/// # Errors
/// Those of [`evaluate`] that come before anything runs.
pub fn sequences(model: &Model, texts: &[Text], options: &EvalOptions) -> Result<Vec<Sequence>> {
    check(model, options)?;
    let text = EvalOptions { tasks: Vec::new(), ..options.clone() };
    let groups = items::groups(model, texts, &text)?;
    let items = groups.into_iter().flat_map(|group| group.items);
    let sequence = |item: items::Item| {
        let (prefix, tokens) = (item.prefix, item.tokens);
        Sequence { prefix, source: "text".into(), tokens }
    };
    Ok(items.map(sequence).collect())
}

fn check(model: &Model, options: &EvalOptions) -> Result<()> {
    let &EvalOptions { context, positions, sequences, items, batch, .. } = options;
    for (option, n) in [("positions", positions), ("batch", batch)] {
        if n == 0 {
            return Err(Error::option(option, "must be at least 1"));
        }
    }
    for (option, n) in [("sequences", sequences), ("items", items)] {
        if n > MAX_ITEMS {
            return Err(Error::option(option, format!("{n} are more than {MAX_ITEMS}")));
        }
    }
    if positions >= context {
        let why =
            format!("{positions} decoded positions leave no prefix in a context of {context}");
        return Err(Error::option("positions", why));
    }
    if sequences == 0 && (items == 0 || options.tasks.is_empty()) {
        return Err(Error::option("sequences", "0 and no task: there is nothing to measure"));
    }
    let limit = model.config().context_length;
    if context > limit {
        return Err(Error::Context { what: "the evaluation", needed: context, limit });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TinyModel;

    #[test]
    fn sliding_layers_count_on_both_sides() {
        let model = TinyModel::gemma3().load();
        let shape = model.config().global_shape().unwrap();
        let config =
            CacheConfig { dtype: leank_core::Dtype::F32, ..CacheConfig::dense(shape).unwrap() };
        let text = Text { name: "letters".into(), text: "q".repeat(1000) };
        let (context, positions, sequences) = (60, 8, 2);
        let options = EvalOptions { context, positions, sequences, ..Default::default() };
        let reports =
            evaluate(&model, std::slice::from_ref(&config), &[text], &options, &mut |_, _| {});
        let report = reports.unwrap().remove(0);
        assert!(report.text.unwrap().divergence.kl.abs() < 1e-6);
        // 60 tokens of the global layer and 12 of the sliding one, in each of two sequences.
        let token = 2 * shape.kv_heads * shape.head_dim * config.dtype.bytes();
        let seen = 60 + crate::testing::SLIDING_WINDOW;
        assert_eq!(report.cache.dense_bytes, (2 * seen * token) as u64);
        let padding = (2 * 4 * token) as u64;
        assert_eq!(report.cache.bytes, report.cache.dense_bytes + padding);
    }

    #[test]
    fn bad_options_are_named() {
        let model = TinyModel::llama().load();
        let run = |change: fn(&mut EvalOptions)| {
            let mut options = EvalOptions { context: 100, positions: 8, ..Default::default() };
            change(&mut options);
            check(&model, &options).map_err(|error| error.to_string())
        };
        assert_eq!(run(|_| {}), Ok(()));
        for (change, word) in [
            ((|o| o.sequences = usize::MAX) as fn(&mut EvalOptions), "sequences: "),
            (|o| o.items = usize::MAX, "items: "),
            (|o| o.positions = 0, "positions: "),
            (|o| o.positions = 100, "no prefix"),
            (|o| o.batch = 0, "batch: "),
            (|o| o.sequences = 0, "nothing to measure"),
            (|o| o.context = 5000, "the model has 512"),
        ] {
            let message = run(change).unwrap_err();
            assert!(message.contains(word), "{message}");
        }
    }
}
