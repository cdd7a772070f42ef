//! Spends a budget over all KV heads: how many channels each one keeps.

use std::fmt;

use leank_core::{Layer, ModelShape};

use crate::{Error, Result, order::HeadCurve};

/// What may be kept of the middle, over all layers (exempt ones included).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// Prune at least this share of K's channels, in `0..=1`: the budget of the LeanK paper.
    KRatio(f64),
    /// Keep at most this share of the dense middle's bytes, in `0..=1`. A head that keeps `n`
    /// channels costs `n` elements per token for K, and `head_dim` for V unless it is dead.
    Bytes(f64),
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KRatio(ratio) => write!(f, "k-ratio {ratio}"),
            Self::Bytes(share) => write!(f, "bytes {share}"),
        }
    }
}

impl Budget {
    /// Elements per token that a head with `n` of `d` channels counts for.
    #[must_use]
    pub fn cost(self, n: usize, d: usize) -> usize {
        match self {
            Self::KRatio(_) => n,
            Self::Bytes(_) => n + if n > 0 { d } else { 0 },
        }
    }

    /// Elements per token that all `heads` together may count for.
    ///
    /// # Errors
    /// [`Error::Options`] when the number is not in `0..=1`.
    pub fn limit(self, heads: usize, d: usize) -> Result<usize> {
        let (option, value) = match self {
            Self::KRatio(ratio) => ("k-ratio", ratio),
            Self::Bytes(share) => ("bytes", share),
        };
        if !(0.0..=1.0).contains(&value) {
            return Err(Error::options(option, format!("{value} is not in 0..=1")));
        }
        let dense = (heads * self.cost(d, d)) as f64;
        let share = match self {
            Self::KRatio(ratio) => 1.0 - ratio,
            Self::Bytes(share) => share,
        };
        // 0.3 of 640 is 192, whatever 1 - 0.7 rounds to.
        Ok((dense * share + 1e-6) as usize)
    }
}

/// How an allocation is made.
#[derive(Clone, Debug, PartialEq)]
pub struct AllocateOptions {
    /// The budget.
    pub budget: Budget,
    /// Kept counts are multiples of this; it divides `head_dim`.
    pub alignment: usize,
    /// Layers that keep everything, e.g. sliding-window ones. Their cost counts.
    pub exempt: Vec<Layer>,
}

/// How many channels each head keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Kept counts, layer-major.
    pub counts: Vec<usize>,
    /// Summed loss `ΣC` of all heads. With the Fisher probe, half of it predicts the KL
    /// divergence in nats, within a factor of about two.
    pub loss: f64,
}

impl Allocation {
    /// `½ΣC`: the KL divergence in nats that the Fisher probe predicts.
    #[must_use]
    pub fn predicted_kl(&self) -> f64 {
        self.loss / 2.0
    }
}

/// Largest table of the dynamic program, in entries.
const MAX_TABLE: usize = 1 << 28;

impl AllocateOptions {
    /// Checks alignment and exempt layers against a shape, and against the counts that were
    /// measured (multiples of `step`).
    ///
    /// # Errors
    /// [`Error::Options`] that says which alignments would do.
    pub fn check(&self, shape: &ModelShape, step: usize) -> Result<()> {
        let (d, a) = (shape.head_dim, self.alignment);
        let refuse = |what: String, fits: &dyn Fn(usize) -> bool, mend: String| {
            let divisors = (1..=d).filter(|&n| d.is_multiple_of(n) && fits(n));
            let will_do = divisors.map(|n| n.to_string()).collect::<Vec<_>>().join(", ");
            Err(Error::options("alignment", format!("{a} {what}; {will_do} would do{mend}")))
        };
        if a == 0 || !d.is_multiple_of(a) {
            return refuse(format!("does not divide head_dim {d}"), &|_| true, String::new());
        }
        let is_measured = |n: usize| n == d || n.is_multiple_of(step);
        if !is_measured(a) {
            return refuse(
                format!("is not a multiple of the {step} channels between measurements"),
                &is_measured,
                format!(", or a step that divides {a}"),
            );
        }
        match self.exempt.iter().find(|layer| layer.0 >= shape.layers) {
            Some(layer) => {
                let why = format!("there is no layer {layer}: the model has {}", shape.layers);
                Err(Error::options("exempt", why))
            }
            None => Ok(()),
        }
    }

    fn is_exempt(&self, head: usize, shape: &ModelShape) -> bool {
        self.exempt.contains(&Layer(head / shape.kv_heads))
    }
}

/// The allocation with the least summed loss within the budget: exact, since curves are neither
/// convex nor monotone (dropping a head can beat keeping 8 of its channels).
///
/// `curves` are layer-major. Ties go to fewer channels.
///
/// # Errors
/// [`Error::Options`] as [`AllocateOptions::check`] and [`Budget::limit`]; [`Error::Budget`] when
/// exempt layers alone exceed it.
pub fn allocate(
    curves: &[HeadCurve],
    shape: &ModelShape,
    options: &AllocateOptions,
) -> Result<Allocation> {
    let step = curves.first().map_or(1, |curve| curve.counts[1]);
    options.check(shape, step)?;
    let choices: Vec<Vec<Choice>> = (curves.iter().enumerate())
        .map(|(head, curve)| choices(curve, options, options.is_exempt(head, shape)))
        .collect();
    let limit = options.budget.limit(curves.len(), shape.head_dim)?;
    let least: usize = choices.iter().map(|choices| choices[0].cost).sum();
    if least > limit {
        return Err(over_budget(options, least, limit, curves.len() * shape.head_dim));
    }
    let unit = choices.iter().flatten().map(|choice| choice.cost).fold(0, gcd).max(1);
    solve(&choices, limit / unit, unit)
}

pub(crate) fn over_budget(
    options: &AllocateOptions,
    least: usize,
    limit: usize,
    channels: usize,
) -> Error {
    let dense = options.budget.cost(channels, channels);
    let share = least as f64 / dense as f64;
    let (nearest, beyond) = match options.budget {
        Budget::KRatio(_) => (Budget::KRatio(1.0 - share), "less"),
        Budget::Bytes(_) => (Budget::Bytes(share), "more"),
    };
    Error::Budget {
        budget: options.budget.to_string(),
        why: format!(
            "the exempt layers alone take {least} elements per token where it leaves {limit}; \
             exempt fewer layers, or ask for {nearest} or {beyond}"
        ),
    }
}

/// A count that a head may keep.
#[derive(Clone, Copy, Debug)]
struct Choice {
    count: usize,
    cost: usize,
    loss: f64,
}

/// What a head may keep, ascending in cost.
fn choices(curve: &HeadCurve, options: &AllocateOptions, exempt: bool) -> Vec<Choice> {
    let d = curve.order.len();
    let allowed = |&(&count, _): &(&usize, &f64)| {
        count == d || (!exempt && count.is_multiple_of(options.alignment))
    };
    let choice = |(&count, &loss)| Choice { count, cost: options.budget.cost(count, d), loss };
    curve.counts.iter().zip(&curve.losses).filter(allowed).map(choice).collect()
}

/// The exact dynamic program over heads and units of cost.
fn solve(choices: &[Vec<Choice>], limit: usize, unit: usize) -> Result<Allocation> {
    let width = limit + 1;
    if width.saturating_mul(choices.len()) > MAX_TABLE {
        let why = format!("{} heads × {limit} units are too many; use a larger one", choices.len());
        return Err(Error::options("alignment", why));
    }
    // best[w]: least loss of the heads so far within a cost of w.
    let mut best = vec![0.0f64; width];
    let mut taken = vec![0u16; width * choices.len()];
    for (own, taken) in choices.iter().zip(taken.chunks_exact_mut(width)) {
        let mut next = vec![f64::INFINITY; width];
        for (at, choice) in own.iter().enumerate() {
            let cost = choice.cost / unit;
            for w in cost..width {
                let loss = best[w - cost] + choice.loss;
                if loss < next[w] {
                    (next[w], taken[w]) = (loss, at as u16);
                }
            }
        }
        best = next;
    }
    let mut left = limit;
    let mut counts = vec![0; choices.len()];
    let mut loss = 0.0;
    for (head, own) in choices.iter().enumerate().rev() {
        let choice = own[usize::from(taken[head * width + left])];
        counts[head] = choice.count;
        loss += choice.loss;
        left -= choice.cost / unit;
    }
    Ok(Allocation { counts, loss })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn curve(d: usize, step: usize, losses: &[f64]) -> HeadCurve {
        let counts = crate::order::measured_counts(d, step).unwrap();
        let losses = losses[..counts.len()].to_vec();
        HeadCurve { order: (0..d as u16).collect(), counts, losses, scores: Vec::new() }
    }

    /// The least loss by trying everything.
    fn brute(curves: &[HeadCurve], options: &AllocateOptions, shape: &ModelShape) -> Option<f64> {
        fn best(
            head: usize,
            left: usize,
            rest: &[HeadCurve],
            options: &AllocateOptions,
            shape: &ModelShape,
        ) -> Option<f64> {
            let Some((first, rest)) = rest.split_first() else { return Some(0.0) };
            let d = shape.head_dim;
            let exempt = options.exempt.contains(&Layer(head / shape.kv_heads));
            (0..=d / options.alignment)
                .map(|n| n * options.alignment)
                .filter(|&n| !exempt || n == d)
                .filter_map(|n| {
                    let left = left.checked_sub(options.budget.cost(n, d))?;
                    let own = first.loss(n).unwrap();
                    best(head + 1, left, rest, options, shape).map(|loss| loss + own)
                })
                .min_by(f64::total_cmp)
        }
        let limit = options.budget.limit(curves.len(), shape.head_dim).unwrap();
        best(0, limit, curves, options, shape)
    }

    proptest! {
        #[test]
        fn is_exact(
            losses in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 5), 6),
            kv_heads in 1usize..4,
            alignment in prop::sample::select(vec![2usize, 4, 8]),
            share in 0.0..=1.0f64,
            by_bytes in any::<bool>(),
            exempt in prop::option::of(0usize..2),
        ) {
            let layers = 6 / kv_heads;
            let shape = ModelShape::new(layers, kv_heads, kv_heads, 8).unwrap();
            let curves: Vec<_> =
                losses[..layers * kv_heads].iter().map(|own| curve(8, 2, own)).collect();
            let budget = if by_bytes { Budget::Bytes(share) } else { Budget::KRatio(share) };
            let exempt = exempt.map(Layer).into_iter().collect();
            let options = AllocateOptions { budget, alignment, exempt };
            let limit = budget.limit(curves.len(), 8).unwrap();
            match (allocate(&curves, &shape, &options), brute(&curves, &options, &shape)) {
                (Ok(found), Some(expected)) => {
                    prop_assert!((found.loss - expected).abs() < 1e-12);
                    let cost: usize = found.counts.iter().map(|&n| budget.cost(n, 8)).sum();
                    prop_assert!(cost <= limit);
                    let sum: f64 =
                        curves.iter().zip(&found.counts).map(|(c, &n)| c.loss(n).unwrap()).sum();
                    prop_assert!((sum - found.loss).abs() < 1e-12);
                }
                (Err(Error::Budget { .. }), None) => {}
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn a_dead_head_pays_for_another() {
        // By bytes the first head's V is worth two channel counts of the second.
        let curves = [curve(4, 2, &[0.1, 0.05, 0.0]), curve(4, 2, &[9.0, 1.0, 0.0])];
        let shape = ModelShape::new(1, 2, 2, 4).unwrap();
        let options = |budget| AllocateOptions { budget, alignment: 2, exempt: Vec::new() };
        let bytes = allocate(&curves, &shape, &options(Budget::Bytes(0.5))).unwrap();
        assert_eq!((bytes.counts, bytes.loss), (vec![0, 4], 0.1));
        let all = allocate(&curves, &shape, &options(Budget::KRatio(0.0))).unwrap();
        assert_eq!((all.counts, all.loss), (vec![4, 4], 0.0));
        let none = allocate(&curves, &shape, &options(Budget::KRatio(1.0))).unwrap();
        assert_eq!(none.counts, [0, 0]);
    }

    #[test]
    fn wrong_options_are_named_with_the_mend() {
        let curves = vec![curve(24, 8, &[3.0, 2.0, 1.0, 0.0]); 2];
        let shape = ModelShape::new(2, 1, 1, 24).unwrap();
        let with = |budget, alignment, exempt: &[usize]| {
            let exempt = exempt.iter().copied().map(Layer).collect();
            let options = AllocateOptions { budget, alignment, exempt };
            allocate(&curves, &shape, &options).unwrap_err().to_string()
        };
        for alignment in [0, 16, 48, usize::MAX] {
            let message = with(Budget::KRatio(0.5), alignment, &[]);
            assert!(message.contains("does not divide head_dim 24"), "{message}");
            // The step may not have been asked for: what it rules out is said when it matters.
            assert!(message.contains("; 1, 2, 3, 4, 6, 8, 12, 24 would do"), "{message}");
        }
        for alignment in [4, 12] {
            let message = with(Budget::KRatio(0.5), alignment, &[]);
            assert!(message.contains("; 8, 24 would do, or a step that divides"), "{message}");
        }
        let message = with(Budget::KRatio(0.7), 8, &[0]);
        assert!(message.contains("k-ratio 0.7") && message.contains("k-ratio 0.5"), "{message}");
        for value in [-0.1, 1.5, f64::NAN] {
            assert!(with(Budget::Bytes(value), 8, &[]).contains("not in 0..=1"));
        }
        assert!(with(Budget::Bytes(0.5), 8, &[2]).contains("layer 2"));
    }
}
