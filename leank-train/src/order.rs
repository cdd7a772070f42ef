//! In which order a KV head gives up its channels, and what each count kept costs.

use leank_core::{HeadPrecision, Precision};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    stats::{HeadEvaluator, HeadMask, MEASURED, Stats, Want},
};

/// A head's order of removal and its exact losses along it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadCurve {
    /// All channels, first removed first.
    pub order: Vec<u16>,
    /// Counts kept at which the loss was measured, ascending: 0 (a dead head), the multiples of
    /// the step, and `head_dim`.
    pub counts: Vec<usize>,
    /// Exact loss `C` at each count: with the Fisher probe, twice the KL divergence in nats that
    /// the head adds, to second order.
    pub losses: Vec<f64>,
    /// Score of each channel where the order comes from one, `[head_dim]`; empty otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
}

impl HeadCurve {
    /// The kept channels when `count` are kept, ascending.
    ///
    /// # Panics
    /// When `count` is above `head_dim`.
    #[must_use]
    pub fn kept(&self, count: usize) -> Vec<u16> {
        let mut kept = self.order[self.order.len() - count..].to_vec();
        kept.sort_unstable();
        kept
    }

    /// The loss at a count, where it was measured.
    #[must_use]
    pub fn loss(&self, count: usize) -> Option<f64> {
        self.counts.binary_search(&count).ok().map(|at| self.losses[at])
    }

    /// Importance of each channel, `[head_dim]`, comparable between heads: the loss per channel
    /// of the stretch of the curve in which the channel is removed. It never falls along the order
    /// (a running maximum), and rises linearly within a stretch, so that it ranks channels as the
    /// order does.
    #[must_use]
    pub fn importance(&self) -> Vec<f32> {
        let d = self.order.len();
        let mut importance = vec![0.0; d];
        let mut before = 0.0f64;
        for at in (1..self.counts.len()).rev() {
            let (low, high) = (self.counts[at - 1], self.counts[at]);
            let length = (high - low) as f64;
            let marginal = ((self.losses[at - 1] - self.losses[at]) / length).max(before);
            for (i, &c) in self.order[d - high..d - low].iter().enumerate() {
                let share = (i + 1) as f64 / length;
                importance[usize::from(c)] = (before + share * (marginal - before)) as f32;
            }
            before = marginal;
        }
        importance
    }

    /// Whether this is a curve of a head with `d` channels: for records read from disk.
    pub(crate) fn check(&self, d: usize) -> Result<(), String> {
        let mut sorted = self.order.clone();
        sorted.sort_unstable();
        if !sorted.iter().map(|&c| usize::from(c)).eq(0..d) {
            return Err(format!("its order is not a permutation of {d} channels"));
        }
        let counts = &self.counts;
        let ascend = counts.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascend || counts.first() != Some(&0) || counts.last() != Some(&d) {
            return Err(format!("its counts do not ascend from 0 to {d}"));
        }
        if self.losses.len() != counts.len() || !all_losses(&self.losses) {
            return Err("its losses are not one finite number per count".into());
        }
        if !self.scores.is_empty() && self.scores.len() != d {
            return Err(format!("it has {} scores for {d} channels", self.scores.len()));
        }
        Ok(())
    }
}

/// Whether all are losses: finite, and so small that differences and sums of them are too.
fn all_losses(losses: &[f64]) -> bool {
    losses.iter().all(|loss| loss.abs() <= 1e30)
}

/// Exact losses along a head's order when lean blocks hold K and V in 16, 8 and 4 bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecisionCurve {
    /// The order that it was measured along.
    order: Vec<u16>,
    /// Counts kept, as in [`HeadCurve::counts`].
    counts: Vec<usize>,
    /// `[K, counts, V]`, K and V in the order of [`MEASURED`].
    losses: Vec<f64>,
}

impl PrecisionCurve {
    /// Of losses `[K, counts, V]`, in the order of [`MEASURED`], along a curve.
    pub(crate) fn new(curve: &HeadCurve, losses: Vec<f64>) -> Self {
        Self { order: curve.order.clone(), counts: curve.counts.clone(), losses }
    }

    /// The exact loss `C` of a count, where it was measured; a dead head's is the same in all
    /// precisions.
    #[must_use]
    pub fn loss(&self, count: usize, precision: HeadPrecision) -> Option<f64> {
        let place = |own: Precision| MEASURED.iter().position(|&other| other == own);
        let at = self.counts.binary_search(&count).ok()?;
        let row = place(precision.k)? * self.counts.len() + at;
        Some(self.losses[row * MEASURED.len() + place(precision.v)?])
    }

    /// Whether it was measured along this curve: for records read from disk.
    pub(crate) fn is_of(&self, curve: &HeadCurve) -> bool {
        self.order == curve.order && self.counts == curve.counts
    }

    /// Whether this is a curve of a head with `d` channels: for records read from disk.
    pub(crate) fn check(&self, d: usize) -> Result<(), String> {
        let expected = MEASURED.len() * MEASURED.len() * self.counts.len();
        if self.losses.len() != expected || !all_losses(&self.losses) {
            return Err("its losses are not one finite number per count and precisions".into());
        }
        let losses = vec![0.0; self.counts.len()];
        let (order, counts) = (self.order.clone(), self.counts.clone());
        HeadCurve { order, counts, losses, scores: Vec::new() }.check(d)
    }
}

/// Measures a head's losses in all [`MEASURED`] precisions along an order that is known.
///
/// # Errors
/// As [`HeadEvaluator::evaluate`].
pub fn measure_precisions(
    evaluator: &mut HeadEvaluator<'_>,
    curve: &HeadCurve,
) -> Result<PrecisionCurve> {
    let losses = evaluator.evaluate_precisions(&growing_masks(&curve.order, &curve.counts))?;
    Ok(PrecisionCurve::new(curve, losses))
}

/// The masks along an order, the last removed first, so that each continues the one before it.
fn growing_masks(order: &[u16], counts: &[usize]) -> Vec<HeadMask> {
    let growing: Vec<u16> = order.iter().rev().copied().collect();
    let mask = |&n: &usize| match n {
        0 => HeadMask::Dead,
        n => HeadMask::Kept(growing[..n].to_vec()),
    };
    counts.iter().map(mask).collect()
}

/// Counts at which a curve is measured, ascending: 0, the multiples of `step`, `d`.
///
/// # Errors
/// [`Error::Options`] when `step` is not in `1..=d`.
pub fn measured_counts(d: usize, step: usize) -> Result<Vec<usize>> {
    if step == 0 || step > d {
        return Err(Error::options("step", format!("{step} is not in 1..={d} (head_dim)")));
    }
    Ok((0..d).step_by(step).chain([d]).collect())
}

/// Backward elimination with re-linearisation (E2): a stretch of channels is removed by the
/// quadratic model at the present mask, then the model is computed anew.
///
/// # Errors
/// As [`HeadEvaluator::evaluate`] and [`measured_counts`].
pub fn eliminate(evaluator: &mut HeadEvaluator<'_>, step: usize) -> Result<HeadCurve> {
    let d = evaluator.head_dim();
    let counts = measured_counts(d, step)?;
    let mut losses = vec![0.0; counts.len()];
    let mut kept: Vec<u16> = (0..d as u16).collect();
    let mut order = Vec::with_capacity(d);
    for at in (1..counts.len()).rev() {
        let mask = HeadMask::Kept(kept.clone());
        // The dead head shares g·V with the first pass.
        let first = [HeadMask::Dead];
        let dead = if order.is_empty() { &first[..] } else { &[] };
        let found = evaluator.evaluate(dead, Some((&mask, Want::Quadratic)))?;
        let Some(stats) = found.stats else { continue };
        losses[at] = stats.loss;
        if let Some(&loss) = found.losses.first() {
            losses[0] = loss;
        }
        order.extend(remove(&stats, &mut kept, counts[at] - counts[at - 1]));
    }
    Ok(HeadCurve { order, counts, losses, scores: Vec::new() })
}

/// The fast mode (E1): the whole order from the quadratic model at the full mask, then the exact
/// losses along it.
///
/// # Errors
/// As [`eliminate`].
pub fn eliminate_once(evaluator: &mut HeadEvaluator<'_>, step: usize) -> Result<HeadCurve> {
    let d = evaluator.head_dim();
    measured_counts(d, step)?;
    let mut kept: Vec<u16> = (0..d as u16).collect();
    let mask = HeadMask::Kept(kept.clone());
    let found = evaluator.evaluate(&[], Some((&mask, Want::Quadratic)))?;
    let order = found.stats.map_or_else(Vec::new, |stats| remove(&stats, &mut kept, d));
    measure(evaluator, order, step)
}

/// The exact losses along a given order of removal.
///
/// # Errors
/// As [`eliminate`].
pub fn measure(
    evaluator: &mut HeadEvaluator<'_>,
    order: Vec<u16>,
    step: usize,
) -> Result<HeadCurve> {
    let d = evaluator.head_dim();
    let counts = measured_counts(d, step)?;
    let masks = growing_masks(&order, &counts[..counts.len() - 1]);
    let mut losses = evaluator.evaluate(&masks, None)?.losses;
    // Nothing is pruned: the loss is 0 by definition.
    losses.push(0.0);
    Ok(HeadCurve { order, counts, losses, scores: Vec::new() })
}

/// Removes from `kept`, one after the other, the `count` channels that the quadratic model says
/// cost least; returns them in order. Ties go to the lower channel.
fn remove(stats: &Stats, kept: &mut Vec<u16>, count: usize) -> Vec<u16> {
    let d = stats.b.len();
    let mut v: Vec<f64> = stats.b.iter().map(|b| -b).collect();
    let mut removed = Vec::with_capacity(count);
    for _ in 0..count {
        let cost = |&c: &u16| stats.a[usize::from(c) * (d + 1)] + 2.0 * v[usize::from(c)];
        let least = kept.iter().enumerate().min_by(|a, b| cost(a.1).total_cmp(&cost(b.1)));
        let Some((at, &c)) = least else { break };
        kept.remove(at);
        removed.push(c);
        let row = &stats.a[usize::from(c) * d..][..d];
        v.iter_mut().zip(row).for_each(|(v, a)| *v += a);
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_aligned_from_below() {
        assert_eq!(measured_counts(20, 8).unwrap(), [0, 8, 16, 20]);
        assert_eq!(measured_counts(16, 8).unwrap(), [0, 8, 16]);
        assert_eq!(measured_counts(3, 3).unwrap(), [0, 3]);
        assert!(measured_counts(8, 0).is_err() && measured_counts(8, 9).is_err());
    }

    /// Against the loss of every set, on a problem small enough to try them all in order.
    #[test]
    fn removal_follows_the_quadratic_model() {
        let z = [[1.0, 0.2, -0.9], [0.5, 0.1, 0.4], [2.0, -0.3, -1.9], [0.1, 0.9, 0.0]];
        let d = 3;
        let mut stats = Stats { loss: 0.0, b: vec![0.05, 0.0, -0.02], a: vec![0.0; 9] };
        for z in z {
            for i in 0..d {
                for j in 0..d {
                    stats.a[i * d + j] += z[i] * z[j];
                }
            }
        }
        let cost = |set: &[u16]| -> f64 {
            let set = || set.iter().map(|&c| usize::from(c));
            let linear: f64 = set().map(|i| stats.b[i]).sum();
            let square: f64 = set()
                .flat_map(|i| set().map(move |j| (i, j)))
                .map(|(i, j)| stats.a[i * d + j])
                .sum();
            square - 2.0 * linear
        };
        let mut kept = vec![0, 1, 2];
        let removed = remove(&stats, &mut kept, 3);
        assert!(kept.is_empty());
        for n in 1..=3 {
            let own = cost(&removed[..n]);
            for other in (0..3).filter(|c| !removed[..n].contains(c)) {
                let mut set = removed[..n - 1].to_vec();
                set.push(other);
                assert!(own <= cost(&set) + 1e-12, "{removed:?} at {n}");
            }
        }
        // 0 alone is dearer than 2, but not once 1 is gone.
        assert_eq!(removed, [1, 0, 2]);
    }

    #[test]
    fn importance_follows_the_order() {
        let curve = HeadCurve {
            order: vec![3, 1, 0, 2],
            counts: vec![0, 2, 4],
            losses: vec![4.0, 1.0, 0.0],
            scores: Vec::new(),
        };
        assert_eq!(curve.importance(), [1.0, 0.5, 1.5, 0.25]);
        assert_eq!((curve.kept(2), curve.loss(2), curve.loss(3)), (vec![0, 2], Some(1.0), None));
        // A curve that falls where a channel more is removed: importance still never falls.
        let curve = HeadCurve { losses: vec![0.5, 1.0, 0.0], ..curve };
        assert_eq!(curve.importance(), [0.5, 0.5, 0.5, 0.25]);
    }
}
