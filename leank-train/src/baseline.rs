//! Baselines: the static norm score, and LeanK's allocation by quantile and rounding.

use leank_core::{KvHead, Layer, ModelShape, aligned_counts, kept_at_ratio};

use crate::{
    Result,
    allocate::{AllocateOptions, Budget, over_budget},
    dump::{HeadData, LayerDump},
};

/// The static norm score of a KV head's channels, `[head_dim]`: the root mean square of `q_c`
/// over valid positions and the group's query heads, times the root mean square of `k_c` over all
/// tokens, both over all sequences.
///
/// # Errors
/// As [`LayerDump::read`].
pub fn static_scores(layer: &LayerDump<'_>, head: KvHead) -> Result<Vec<f32>> {
    let manifest = layer.manifest();
    let d = manifest.shape.head_dim;
    let (mut q, mut k) = (Moments::new(d), Moments::new(d));
    let mut data = HeadData::default();
    for (sequence, info) in manifest.sequences.iter().enumerate() {
        layer.read(head, sequence, &mut data)?;
        for own in data.q.chunks_exact(manifest.positions * d) {
            for &position in &info.valid {
                q.add(&own[position as usize * d..][..d]);
            }
        }
        data.k.chunks_exact(d).for_each(|row| k.add(row));
    }
    Ok(q.rms().zip(k.rms()).map(|(q, k)| (q * k) as f32).collect())
}

/// Mean squares per channel.
struct Moments {
    squares: Vec<f64>,
    count: usize,
}

impl Moments {
    fn new(d: usize) -> Self {
        Self { squares: vec![0.0; d], count: 0 }
    }

    fn add(&mut self, row: &[f32]) {
        self.count += 1;
        self.squares.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x).powi(2));
    }

    fn rms(&self) -> impl Iterator<Item = f64> {
        let count = self.count.max(1) as f64;
        self.squares.iter().map(move |sum| (sum / count).sqrt())
    }
}

/// Channels by ascending score: an order of removal. Ties go to the lower channel.
#[must_use]
pub fn order_by_score(scores: &[f32]) -> Vec<u16> {
    let mut order: Vec<u16> = (0..scores.len() as u16).collect();
    order.sort_by(|&a, &b| scores[usize::from(a)].total_cmp(&scores[usize::from(b)]));
    order
}

/// LeanK's allocation: a threshold at the global quantile of all scores, and per head the number
/// of channels above it, rounded to the nearest multiple of the alignment; the rule is that of
/// [`leank_core::quantile_and_round`].
///
/// With [`Budget::KRatio`] the quantile is the ratio, as in the paper, and rounding may miss it
/// either way. With [`Budget::Bytes`] it is the least quantile that stays within the bytes.
/// `scores` are `[layers, kv_heads, head_dim]`; exempt layers keep everything and their scores do
/// not count.
///
/// # Errors
/// As [`crate::allocate::allocate`].
pub fn quantile_counts(
    scores: &[Vec<f32>],
    shape: &ModelShape,
    options: &AllocateOptions,
) -> Result<Vec<usize>> {
    options.check(shape, 1)?;
    let d = shape.head_dim;
    let is_exempt = |head: usize| options.exempt.contains(&Layer(head / shape.kv_heads));
    let counted: Vec<f32> = (scores.iter().enumerate())
        .filter(|(head, _)| !is_exempt(*head))
        .flat_map(|(_, own)| own.iter().copied())
        .collect();
    let counts = |kept: usize| -> Vec<usize> {
        let mut counts = aligned_counts(&counted, d, kept, options.alignment).into_iter();
        let count = |head| if is_exempt(head) { d } else { counts.next().unwrap_or_default() };
        (0..scores.len()).map(count).collect()
    };
    let limit = options.budget.limit(scores.len(), d)?;
    if let Budget::KRatio(ratio) = options.budget {
        return Ok(counts(kept_at_ratio(counted.len(), ratio)));
    }
    let cost = |kept| counts(kept).iter().map(|&n| options.budget.cost(n, d)).sum::<usize>();
    let least = cost(0);
    if least > limit {
        let dense = options.budget.cost(scores.len() * d, scores.len() * d);
        return Err(over_budget(options, least as f64 / dense as f64));
    }
    // The cost rises with what is kept: the most that fits.
    let (mut fits, mut beyond) = (0, counted.len() + 1);
    while beyond - fits > 1 {
        let middle = usize::midpoint(fits, beyond);
        if cost(middle) <= limit { fits = middle } else { beyond = middle }
    }
    Ok(counts(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(budget: Budget, alignment: usize) -> AllocateOptions {
        AllocateOptions { alignment, ..AllocateOptions::new(budget) }
    }

    #[test]
    fn the_quantile_is_global_and_rounded_per_head() {
        let shape = ModelShape::new(1, 3, 3, 4).unwrap();
        let scores =
            vec![vec![9.0, 8.0, 7.0, 6.0], vec![5.0, 0.5, 0.4, 0.3], vec![0.2, 0.1, 4.0, 3.0]];
        let counts = |budget, alignment| {
            quantile_counts(&scores, &shape, &options(budget, alignment)).unwrap()
        };
        // 7 of 12 above the threshold: 4, 1 and 2; one rounds up to two.
        assert_eq!(counts(Budget::KRatio(5.0 / 12.0), 1), [4, 1, 2]);
        assert_eq!(counts(Budget::KRatio(5.0 / 12.0), 2), [4, 2, 2]);
        assert_eq!(counts(Budget::KRatio(0.0), 2), [4, 4, 4]);
        // The highest score is at the quantile, not below it.
        assert_eq!(counts(Budget::KRatio(1.0), 2), [2, 0, 0]);
        assert_eq!(counts(Budget::KRatio(1.0), 4), [0, 0, 0]);
        // As core's rule has it.
        let flat: Vec<f32> = scores.concat();
        for ratio in [0.0, 0.2, 0.45, 0.5, 0.81, 1.0] {
            let mask = leank_core::quantile_and_round(&flat, &shape, ratio, 2).unwrap();
            let expected: Vec<_> = mask.heads().iter().map(|head| head.kept_count()).collect();
            assert_eq!(counts(Budget::KRatio(ratio), 2), expected);
        }
        for share in [0.0, 0.3, 0.4, 0.7, 0.99, 1.0] {
            let budget = Budget::Bytes(share);
            let cost: usize = counts(budget, 2).iter().map(|&n| budget.cost(n, 4)).sum();
            assert!(cost as f64 <= share * 24.0 + 1e-6, "{share}: {cost}");
        }
        assert_eq!(counts(Budget::Bytes(1.0), 2), [4, 4, 4]);
        let exempt = AllocateOptions { exempt: vec![Layer(0)], ..options(Budget::Bytes(0.1), 2) };
        assert!(quantile_counts(&scores, &shape, &exempt).is_err());
    }

    #[test]
    fn order_is_by_score() {
        assert_eq!(order_by_score(&[2.0, 0.5, 1.0, 0.5]), [1, 3, 2, 0]);
    }
}
