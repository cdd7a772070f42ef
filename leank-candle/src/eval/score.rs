//! From predictions to figures.

use serde::Serialize;

use crate::tasks::Task;

/// How the dense and the lean prediction of one token compare.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prediction {
    /// KL(dense ‖ lean) in nats.
    kl: f64,
    /// −log p of the true token.
    dense_loss: f64,
    lean_loss: f64,
    /// Whether the most likely tokens are the same.
    same_top: bool,
    /// Whether the most likely token is the true one.
    dense_right: bool,
    lean_right: bool,
}

/// Compares two rows of logits over the vocabulary.
pub(super) fn compare(dense: &[f32], lean: &[f32], target: usize) -> Prediction {
    let (dense_log_sum, dense_top) = log_sum_and_top(dense);
    let (lean_log_sum, lean_top) = log_sum_and_top(lean);
    let kl = dense.iter().zip(lean).map(|(&d, &l)| {
        let log_p = f64::from(d) - dense_log_sum;
        log_p.exp() * (log_p - (f64::from(l) - lean_log_sum))
    });
    Prediction {
        kl: kl.sum(),
        dense_loss: dense_log_sum - f64::from(dense[target]),
        lean_loss: lean_log_sum - f64::from(lean[target]),
        same_top: dense_top == lean_top,
        dense_right: dense_top == target,
        lean_right: lean_top == target,
    }
}

/// log Σ exp, and where the largest is.
fn log_sum_and_top(logits: &[f32]) -> (f64, usize) {
    let (mut top, mut max) = (0, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > max {
            (top, max) = (i, logit);
        }
    }
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    (f64::from(max) + sum.ln(), top)
}

/// How far the lean predictions are from the dense ones. Standard errors are from the spread between
/// sequences, since positions of one sequence are not independent; `None` for a single sequence.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Divergence {
    /// Mean KL(dense ‖ lean) in nats per token, of the sequences' means.
    pub kl: f64,
    /// Standard error of `kl`.
    pub kl_standard_error: Option<f64>,
    /// `kl` less that of the first mask.
    pub kl_over_first: f64,
    /// Standard error of `kl_over_first`: all masks see the same positions, so it is far below those of
    /// the two KLs.
    pub kl_over_first_standard_error: Option<f64>,
}

impl Divergence {
    /// `first`: the predictions of the first mask, on the same items.
    fn new(items: &[Vec<Prediction>], first: &[Vec<Prediction>]) -> Self {
        let mean_kl =
            |item: &Vec<Prediction>| item.iter().map(|p| p.kl).sum::<f64>() / item.len() as f64;
        let kls: Vec<f64> = items.iter().map(mean_kl).collect();
        let over_first: Vec<f64> =
            kls.iter().zip(first.iter().map(mean_kl)).map(|(kl, first)| kl - first).collect();
        let (kl, kl_standard_error) = mean_and_error(&kls);
        let (kl_over_first, kl_over_first_standard_error) = mean_and_error(&over_first);
        Self { kl, kl_standard_error, kl_over_first, kl_over_first_standard_error }
    }
}

/// Quality on plain text, dense against lean.
#[derive(Clone, Debug, Serialize)]
pub struct TextScore {
    /// Sequences.
    pub sequences: usize,
    /// Predictions over all sequences.
    pub positions: usize,
    /// Perplexity of the dense model.
    pub dense_perplexity: f64,
    /// Perplexity of the lean one.
    pub lean_perplexity: f64,
    /// Divergence of the predictions.
    #[serde(flatten)]
    pub divergence: Divergence,
    /// Share of positions where both have the same most likely token.
    pub top1_agreement: f64,
}

impl TextScore {
    /// `first`: the predictions of the first mask, on the same items.
    pub(super) fn new(items: &[Vec<Prediction>], first: &[Vec<Prediction>]) -> Self {
        let all = || items.iter().flatten();
        let positions = all().count();
        let mean = |sum: f64| sum / positions as f64;
        Self {
            sequences: items.len(),
            positions,
            dense_perplexity: mean(all().map(|p| p.dense_loss).sum()).exp(),
            lean_perplexity: mean(all().map(|p| p.lean_loss).sum()).exp(),
            divergence: Divergence::new(items, first),
            top1_agreement: mean(all().filter(|p| p.same_top).count() as f64),
        }
    }

    /// Relative change of perplexity: 0.01 is one percent worse.
    #[must_use]
    pub fn perplexity_change(&self) -> f64 {
        self.lean_perplexity / self.dense_perplexity - 1.0
    }
}

fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()))
}

/// Accuracy on one retrieval task.
#[derive(Clone, Debug, Serialize)]
pub struct TaskScore {
    /// Name of the task.
    pub task: String,
    /// Items.
    pub items: usize,
    /// Items that the dense model answers.
    pub dense_right: usize,
    /// Items that decoding through the lean cache answers.
    pub lean_right: usize,
    /// Items that both answer.
    pub both_right: usize,
    /// Divergence of the predictions of the answer.
    #[serde(flatten)]
    pub divergence: Divergence,
}

impl TaskScore {
    pub(super) fn new(task: Task, items: &[Vec<Prediction>], first: &[Vec<Prediction>]) -> Self {
        let count = |right: fn(&Prediction) -> bool| {
            items.iter().filter(|item| item.iter().all(right)).count()
        };
        Self {
            task: task.to_string(),
            items: items.len(),
            dense_right: count(|p| p.dense_right),
            lean_right: count(|p| p.lean_right),
            both_right: count(|p| p.dense_right && p.lean_right),
            divergence: Divergence::new(items, first),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_and_losses_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ½ ln 2 + ½ ln(2/3).
        let p = compare(&[0.0, 0.0], &[0.0, 3.0f32.ln()], 1);
        assert!((p.kl - 0.5 * (2.0f64.ln() + (2.0f64 / 3.0).ln())).abs() < 1e-7);
        assert!((p.dense_loss - 2.0f64.ln()).abs() < 1e-7);
        assert!((p.lean_loss - (4.0f64 / 3.0).ln()).abs() < 1e-7);
        assert!(!p.same_top && !p.dense_right && p.lean_right);
    }

    #[test]
    fn masks_are_compared_sequence_by_sequence() {
        let sequence = |odds: f32| vec![compare(&[0.0, 0.0], &[0.0, odds.ln()], 0)];
        let first = [sequence(2.0), sequence(8.0)];
        let other = [sequence(3.0), sequence(9.0)];
        let kl = |score: &[Vec<Prediction>], i: usize| score[i][0].kl;
        let (d0, d1) = (kl(&other, 0) - kl(&first, 0), kl(&other, 1) - kl(&first, 1));
        let found = Divergence::new(&other, &first);
        assert!((found.kl_over_first - (d0 + d1) / 2.0).abs() < 1e-12);
        // Of two values half their distance.
        let error = found.kl_over_first_standard_error.unwrap();
        assert!((error - (d0 - d1).abs() / 2.0).abs() < 1e-12);
        assert!(error < found.kl_standard_error.unwrap() / 5.0);
        let found = Divergence::new(&first, &first);
        assert_eq!((found.kl_over_first, found.kl_over_first_standard_error), (0.0, Some(0.0)));
        assert_eq!(Divergence::new(&other[..1], &first[..1]).kl_over_first_standard_error, None);
    }

    #[test]
    fn an_item_counts_only_when_all_of_its_answer_is_right() {
        let (right, wrong) =
            (compare(&[0.0, 1.0], &[0.0, 1.0], 1), compare(&[0.0, 1.0], &[1.0, 0.0], 1));
        let items = [vec![right, right], vec![right, wrong]];
        let score = TaskScore::new(Task::Passkey, &items, &items);
        assert_eq!((score.dense_right, score.lean_right, score.both_right), (2, 1, 1));
    }
}
