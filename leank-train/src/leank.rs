//! LeanK's two stages of training on a dump, for comparison.
//!
//! The paper trains one scale per channel end to end; here every head is trained alone on the
//! same Fisher loss as the other methods, so that only the method differs.
//!
//! - **Stage 1.** Scales `α` in `[0, 1]`, 1 at the start, by Adam on one sequence per step. The
//!   objective is `E[s²] + λ Σα`, the gradient of the first term `2 E[s z]` at the weights `α`.
//! - **Stage 2.** Counts are fixed by the global quantile of stage 1's scales, rounded per head;
//!   then `α` is trained on with the forward pass through the top channels only and the gradient
//!   passed straight through to all of them.
//!
//! **λ.** A channel that acts alone costs `A_cc (1 − α)²`, so its scale reaches 0 when
//! `2 A_cc < λ`. λ is the ratio's quantile of `2 A_cc` at the full mask over all channels of all
//! heads (on at most [`SAMPLE`] sequences): with independent channels exactly the ratio's share of
//! scales would vanish. Interactions blur that; the quantile settles the counts. A bytes budget of
//! `f` is taken for the K ratio `1 − f` here.
//!
//! **Cost.** [`EPOCHS`] gradient evaluations of the dump in stage 1 and [`EPOCHS_2`] in stage 2:
//! about what E2's eight refreshes cost.

use leank_core::{KvHead, Layer, Windows};
use serde::{Deserialize, Serialize};

use crate::{
    Result,
    allocate::Budget,
    baseline::order_by_score,
    dump::LayerDump,
    records::HeadResult,
    rng::Rng,
    stats::{HeadEvaluator, HeadMask, Want},
};

/// Sequences that λ is estimated on.
pub const SAMPLE: usize = 6;
/// Passes over the dump in stage 1.
pub const EPOCHS: usize = 5;
/// Passes over the dump in stage 2.
pub const EPOCHS_2: usize = 1;
/// Adam's step; falls linearly to a tenth of it.
const RATE: f64 = 0.02;
/// Fewest steps of stage 1, for dumps of few sequences.
const MIN_STEPS: usize = 100;

/// The diagonal of `A` at the full mask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Diagonal(Vec<f64>);

/// Scales of stage 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Scales(pub(crate) Vec<f32>);

/// What stage 2 keeps of a head, and what that costs exactly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Trained {
    /// Scales after stage 2.
    pub(crate) scales: Vec<f32>,
    /// Kept channels, ascending.
    pub(crate) kept: Vec<u16>,
    /// Exact loss `C` of keeping them.
    pub(crate) loss: f64,
}

impl HeadResult for Diagonal {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        check_len(self.0.len(), head_dim)
    }
}

impl HeadResult for Scales {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        check_len(self.0.len(), head_dim)
    }
}

impl HeadResult for Trained {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        check_len(self.scales.len(), head_dim)?;
        let ascends = self.kept.windows(2).all(|pair| pair[0] < pair[1]);
        if ascends && self.kept.last().is_none_or(|&c| usize::from(c) < head_dim) {
            return Ok(());
        }
        Err(format!("its kept channels do not ascend below {head_dim}"))
    }
}

fn check_len(found: usize, head_dim: usize) -> Result<(), String> {
    if found == head_dim {
        return Ok(());
    }
    Err(format!("it has {found} values for {head_dim} channels"))
}

/// The K ratio that stage 1 aims at.
pub(crate) fn ratio(budget: Budget) -> f64 {
    match budget {
        Budget::KRatio(ratio) => ratio,
        Budget::Bytes(share) => 1.0 - share,
    }
}

/// The diagonal of `A` of a head on a few sequences.
pub(crate) fn diagonal(layer: &LayerDump<'_>, head: KvHead, windows: Windows) -> Result<Diagonal> {
    let manifest = layer.manifest();
    let (d, count) = (manifest.shape.head_dim, manifest.sequences.len());
    let sample = SAMPLE.min(count);
    let sequences: Vec<usize> = (0..sample).map(|i| i * count / sample).collect();
    let mut evaluator = HeadEvaluator::new(layer, head, windows);
    let all = HeadMask::Kept((0..d as u16).collect());
    let found = evaluator.evaluate_on(&sequences, &[], Some((&all, Want::Quadratic)))?;
    let a = found.stats.map_or_else(Vec::new, |stats| stats.a);
    Ok(Diagonal(a.iter().step_by(d + 1).copied().collect()))
}

/// λ for a ratio, from the diagonals of all heads.
pub(crate) fn lambda(diagonals: &[Vec<Diagonal>], ratio: f64) -> f64 {
    let mut all: Vec<f64> = diagonals.iter().flatten().flat_map(|own| own.0.clone()).collect();
    all.sort_by(f64::total_cmp);
    let at = (ratio * all.len() as f64) as usize;
    all.get(at.min(all.len().saturating_sub(1))).map_or(0.0, |a| 2.0 * a)
}

/// Trains the scales of one head.
pub(crate) struct Trainer<'a> {
    evaluator: HeadEvaluator<'a>,
    sequences: Vec<usize>,
    rng: Rng,
    adam: Adam,
}

impl<'a> Trainer<'a> {
    pub(crate) fn new(layer: &'a LayerDump<'a>, head: KvHead, windows: Windows, seed: u64) -> Self {
        let manifest = layer.manifest();
        let has_valid = |&i: &usize| !manifest.sequences[i].valid.is_empty();
        let Layer(index) = layer.layer();
        let stream = (index * manifest.shape.kv_heads + head.0) as u64 + 1;
        Self {
            evaluator: HeadEvaluator::new(layer, head, windows),
            sequences: (0..manifest.sequences.len()).filter(has_valid).collect(),
            rng: Rng::fork(seed, stream),
            adam: Adam::new(manifest.shape.head_dim),
        }
    }

    /// Stage 1: scales under an L1 penalty.
    pub(crate) fn learn_scales(&mut self, lambda: f64) -> Result<Scales> {
        let mut scales = vec![1.0f32; self.evaluator.head_dim()];
        let steps = (EPOCHS * self.sequences.len()).max(MIN_STEPS);
        self.descend(&mut scales, steps, lambda, |scales| scales.to_vec())?;
        Ok(Scales(scales))
    }

    /// Stage 2: the best `count` channels, straight through.
    pub(crate) fn refine(&mut self, start: &[f32], count: usize) -> Result<Trained> {
        let mut scales = start.to_vec();
        let d = scales.len();
        if count > 0 && count < d {
            let steps = (EPOCHS_2 * self.sequences.len()).max(MIN_STEPS / EPOCHS);
            self.descend(&mut scales, steps, 0.0, |scales| {
                let mut weights = vec![0.0; d];
                for &c in top(scales, count).iter() {
                    weights[usize::from(c)] = 1.0;
                }
                weights
            })?;
        }
        let kept = top(&scales, count);
        let mask = if count == 0 { HeadMask::Dead } else { HeadMask::Kept(kept.clone()) };
        let loss = self.evaluator.evaluate(&[mask], None)?.losses[0];
        Ok(Trained { scales, kept, loss })
    }

    /// Adam on the scales, with the forward pass at `forward(scales)`.
    fn descend(
        &mut self,
        scales: &mut [f32],
        steps: usize,
        lambda: f64,
        forward: impl Fn(&[f32]) -> Vec<f32>,
    ) -> Result<()> {
        let mut at = self.sequences.len();
        for step in 0..steps {
            if at == self.sequences.len() {
                self.rng.shuffle(&mut self.sequences);
                at = 0;
            }
            let mask = HeadMask::Scaled(forward(scales));
            let batch = [self.sequences[at]];
            at += 1;
            let found = self.evaluator.evaluate_on(&batch, &[], Some((&mask, Want::Gradient)))?;
            let b = found.stats.map_or_else(Vec::new, |stats| stats.b);
            let rate = RATE * (1.0 - 0.9 * step as f64 / steps as f64);
            self.adam.step(scales, rate, b.iter().map(|b| 2.0 * b + lambda));
        }
        Ok(())
    }
}

/// The `count` channels of the largest scales, ascending.
fn top(scales: &[f32], count: usize) -> Vec<u16> {
    let order = order_by_score(scales);
    let mut kept = order[order.len() - count..].to_vec();
    kept.sort_unstable();
    kept
}

/// Adam with its usual constants, clamped to `[0, 1]`.
struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Adam {
    fn new(d: usize) -> Self {
        Self { first: vec![0.0; d], second: vec![0.0; d], steps: 0 }
    }

    fn step(&mut self, scales: &mut [f32], rate: f64, gradient: impl Iterator<Item = f64>) {
        const BETA: (f64, f64) = (0.9, 0.999);
        self.steps += 1;
        let correct = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((scale, (first, second)), gradient) in scales.iter_mut().zip(moments).zip(gradient) {
            *first += (1.0 - BETA.0) * (gradient - *first);
            *second += (1.0 - BETA.1) * (gradient * gradient - *second);
            let move_by = rate * (*first / correct.0) / ((*second / correct.1).sqrt() + 1e-12);
            *scale = (*scale - move_by as f32).clamp(0.0, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lambda_is_the_ratios_quantile() {
        let own = vec![vec![Diagonal(vec![4.0, 1.0])], vec![Diagonal(vec![3.0, 2.0])]];
        assert_eq!(lambda(&own, 0.0), 2.0);
        assert_eq!(lambda(&own, 0.5), 6.0);
        assert_eq!(lambda(&own, 1.0), 8.0);
    }

    #[test]
    fn adam_finds_the_clamped_minimum() {
        // (x - 0.3)² + (y + 1)² + (z - 2)² from 1, 1, 1.
        let mut x = vec![1.0f32; 3];
        let mut adam = Adam::new(3);
        for step in 0..400 {
            let gradient: Vec<f64> =
                [0.3, -1.0, 2.0].iter().zip(&x).map(|(t, &x)| 2.0 * (f64::from(x) - t)).collect();
            adam.step(&mut x, 0.02 * (1.0 - f64::from(step) / 400.0), gradient.into_iter());
        }
        assert!((x[0] - 0.3).abs() < 1e-3 && x[1] == 0.0 && x[2] == 1.0, "{x:?}");
    }
}
