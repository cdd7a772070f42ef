//! What is reported of tokens on both sides.

use std::fmt;

use leank_core::{Dtype, Windows};
use serde::Serialize;

/// How many times the difference that rounding K and V makes on the CPU the device's logits may be
/// off: it rounds four things where the CPU rounds two.
pub const FACTOR: f32 = 4.0;

/// A row whose best token is another on the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Number of the prompt.
    pub prompt: usize,
    /// Position of the token behind which the best ones differ.
    pub position: usize,
    /// The CPU's token and the device's.
    pub tokens: [u32; 2],
    /// How far the CPU's logit of its token is above that of the device's token.
    pub cpu_gap: f32,
    /// How far the device's logit of its token is above that of the CPU's token.
    pub cuda_gap: f32,
}

/// One cache configuration on both sides.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// `dense` or `lean`.
    pub cache: &'static str,
    /// Rows whose logits and best tokens were compared, prompts included.
    pub rows: usize,
    /// Of these, rows of generated tokens.
    pub generated: usize,
    /// Full blocks of the cache at the end.
    pub full_blocks: usize,
    /// Lean blocks of the cache at the end.
    pub lean_blocks: usize,
    /// Whole-KV ratio of the cache at the end: above 1 for a dense one, whose last blocks are not full.
    pub whole_kv_ratio: Option<f64>,
    /// The largest difference of a logit between CPU and device.
    pub largest_difference: f32,
    /// The largest difference of a logit that storing K and V in the storage type rather than in f32
    /// makes on the CPU.
    pub rounding: f32,
    /// The largest logit's size, to compare with.
    pub largest_logit: f32,
    /// Rows with another best token.
    pub differences: Vec<Difference>,
    /// What was generated behind each prompt.
    pub texts: Vec<String>,
}

impl Comparison {
    /// Of no rows yet.
    pub(super) fn new(cache: &'static str) -> Self {
        Self {
            cache,
            rows: 0,
            generated: 0,
            full_blocks: 0,
            lean_blocks: 0,
            whole_kv_ratio: None,
            largest_difference: 0.0,
            rounding: 0.0,
            largest_logit: 0.0,
            differences: Vec::new(),
            texts: Vec::new(),
        }
    }

    /// How far logits may be off.
    #[must_use]
    pub fn bound(&self) -> f32 {
        FACTOR * self.rounding
    }

    /// Whether rounding explains everything: every logit within the bound, and the two best logits
    /// within twice the bound wherever tokens differ.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        let bound = self.bound();
        let near = |it: &Difference| it.cpu_gap <= 2.0 * bound && it.cuda_gap <= 2.0 * bound;
        self.largest_difference <= bound && self.differences.iter().all(near)
    }

    /// Compares a row's logits: on the CPU, on the CPU with K and V in f32, and on the device with the
    /// token that it sampled.
    pub(super) fn compare(&mut self, (prompt, position): (usize, usize), row: &Row<'_>) {
        let Row { cpu, exact, cuda, sampled } = *row;
        self.rows += 1;
        self.largest_difference = self.largest_difference.max(distance(cpu, cuda));
        self.rounding = self.rounding.max(distance(cpu, exact));
        let (best, sampled) = (argmax(cpu), sampled as usize);
        self.largest_logit = self.largest_logit.max(cpu[best].abs());
        if best != sampled {
            self.differences.push(Difference {
                prompt,
                position,
                tokens: [best as u32, sampled as u32],
                cpu_gap: cpu[best] - cpu[sampled],
                cuda_gap: cuda[sampled] - cuda[best],
            });
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, rows, generated, largest_difference, rounding, differences, .. } = self;
        let (equal, bound) = (rows - differences.len(), self.bound());
        write!(
            f,
            "{cache:<5} {equal} of {rows} tokens equal ({generated} generated); logits up to {:.2} differ by \
             {largest_difference:.2e}, bound {bound:.2e} ({FACTOR} x {rounding:.2e})",
            self.largest_logit,
        )?;
        write!(f, "; {} of {} blocks lean", self.lean_blocks, self.full_blocks + self.lean_blocks)?;
        if let Some(ratio) = self.whole_kv_ratio {
            write!(f, ", whole-KV ratio {ratio:.3}")?;
        }
        for it in differences {
            let [cpu, cuda] = it.tokens;
            write!(
                f,
                "\n      prompt {} position {}: {cpu} on the CPU, above {cuda} by {:.2e}; {cuda} on the \
                 device, above by {:.2e}",
                it.prompt, it.position, it.cpu_gap, it.cuda_gap
            )?;
        }
        if !self.is_explained() {
            write!(f, "\n      NOT EXPLAINED by rounding")?;
        }
        Ok(())
    }
}

/// What was compared.
#[derive(Clone, Debug, Serialize)]
pub struct TokensReport {
    /// The device.
    pub device: String,
    /// The model.
    pub model: String,
    /// Storage type of K and V.
    pub dtype: Dtype,
    /// The lean cache's mask.
    pub mask: String,
    /// The lean cache's windows.
    pub windows: Windows,
    /// Dense, then lean.
    pub caches: Vec<Comparison>,
}

impl TokensReport {
    /// Whether rounding explains every difference.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        self.caches.iter().all(Comparison::is_explained)
    }
}

impl fmt::Display for TokensReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Windows { sink, recent } = self.windows;
        writeln!(f, "{}", self.device)?;
        writeln!(
            f,
            "{}, f32 weights; K and V {}, mask {}, sink {sink}, recent {recent}",
            self.model, self.dtype, self.mask
        )?;
        self.caches.iter().try_for_each(|cache| writeln!(f, "{cache}"))
    }
}

/// Logits of one row.
pub(super) struct Row<'a> {
    pub(super) cpu: &'a [f32],
    /// With K and V in f32.
    pub(super) exact: &'a [f32],
    pub(super) cuda: &'a [f32],
    pub(super) sampled: u32,
}

/// The largest difference; infinite where one is not a number.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| {
        let difference = (a - b).abs();
        if difference.is_nan() { f32::INFINITY } else { f32::max(largest, difference) }
    })
}

/// The first of the largest.
pub(super) fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_tokens_within_rounding_are_explained() {
        let mut it = Comparison::new("dense");
        let cpu = [1.0, 3.0, -2.0];
        let row =
            Row { cpu: &cpu, exact: &[1.01, 3.0, -2.0], cuda: &[1.0, 3.03, -2.0], sampled: 1 };
        it.compare((0, 5), &row);
        assert!((it.rounding - 0.01).abs() < 1e-6 && (it.largest_difference - 0.03).abs() < 1e-6);
        assert_eq!((it.rows, it.largest_logit), (1, 3.0));
        assert!(it.differences.is_empty() && it.is_explained(), "{it}");
        it.full_blocks = 3;
        it.lean_blocks = 2;
        it.whole_kv_ratio = Some(0.75);
        assert!(it.to_string().ends_with("; 2 of 5 blocks lean, whole-KV ratio 0.750"), "{it}");
    }

    #[test]
    fn a_token_that_differs_by_rounding_is_shown() {
        let mut it = Comparison::new("dense");
        let cpu = [2.0, 2.01, 0.0];
        let row =
            Row { cpu: &cpu, exact: &[2.01, 2.01, 0.0], cuda: &[2.015, 2.01, 0.0], sampled: 0 };
        it.compare((2, 7), &row);
        assert_eq!((it.differences[0].prompt, it.differences[0].position), (2, 7));
        assert_eq!(it.differences[0].tokens, [1, 0]);
        assert!(it.is_explained());
        let text = it.to_string();
        assert!(text.contains("prompt 2 position 7: 1 on the CPU, above 0 by 1.00e-2"), "{text}");
        assert!(!text.contains("NOT"), "{text}");
    }

    #[test]
    fn what_rounding_does_not_explain_is_told() {
        // Logits are off although tokens agree; NaN; another token by far.
        for (cuda, sampled) in
            [([2.0, 3.05, 0.0], 1), ([f32::NAN, 3.0, 0.0], 1), ([3.5, 3.0, 0.0], 0)]
        {
            let mut it = Comparison::new("dense");
            let row = Row { cpu: &[2.0, 3.0, 0.0], exact: &[2.01, 3.0, 0.0], cuda: &cuda, sampled };
            it.compare((0, 0), &row);
            assert!(!it.is_explained(), "{cuda:?}");
            assert!(it.to_string().contains("NOT EXPLAINED"), "{it}");
        }
    }

    #[test]
    fn the_best_is_the_first_of_the_largest() {
        assert_eq!(argmax(&[1.0, 5.0, 5.0]), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -3.0]), 1);
    }
}
