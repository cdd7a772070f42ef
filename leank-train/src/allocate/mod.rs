//! Spends a budget over all KV heads: how many channels each one keeps, and in how many bits its K and
//! V lie in lean blocks.

mod offer;
mod program;

use std::fmt;

use leank_core::{DEFAULT_BLOCK, Dtype, HeadPrecision, Layer, LayoutRules, ModelShape};

pub use self::offer::Offer;
use self::program::{Choice, Program, undominated};
use crate::{Error, Result, learn::Curves};

/// What may be kept of the middle, over all layers (exempt ones included).
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// Prune at least this share of K's channels, in `0..=1`: the budget of the LeanK paper.
    KRatio(f64),
    /// Keep at most this share of the dense middle's bytes, in `0..=1`: those of lean blocks of
    /// [`DEFAULT_BLOCK`] tokens (codes, scales and [padding](AllocateOptions::rules)) against
    /// elements of 16 bits. In 16 bits a head that keeps `n` channels costs `n` elements per token for
    /// K, and `head_dim` for V unless it is dead.
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
    /// Elements per token that a head with `n` of `d` channels counts for in 16 bits.
    #[must_use]
    pub fn cost(self, n: usize, d: usize) -> usize {
        match self {
            Self::KRatio(_) => n,
            Self::Bytes(_) => n + if n > 0 { d } else { 0 },
        }
    }

    /// Elements of 16 bits per token that all `heads` together may count for.
    ///
    /// # Errors
    /// [`Error::Options`] when the number is not in `0..=1`.
    pub fn limit(self, heads: usize, d: usize) -> Result<usize> {
        self.share_of(heads * self.cost(d, d))
    }

    /// What may be spent where everything costs `dense`.
    fn share_of(self, dense: usize) -> Result<usize> {
        let (option, value) = match self {
            Self::KRatio(ratio) => ("k-ratio", ratio),
            Self::Bytes(share) => ("bytes", share),
        };
        if !(0.0..=1.0).contains(&value) {
            return Err(Error::options(option, format!("{value} is not in 0..=1")));
        }
        let share = match self {
            Self::KRatio(ratio) => 1.0 - ratio,
            Self::Bytes(share) => share,
        };
        // 0.3 of 640 is 192, whatever 1 - 0.7 rounds to.
        Ok((dense as f64 * share + 1e-6) as usize)
    }
}

/// How an allocation is made.
#[derive(Clone, Debug, PartialEq)]
pub struct AllocateOptions {
    /// The budget.
    pub budget: Budget,
    /// Kept counts are multiples of this; it divides `head_dim`.
    pub alignment: usize,
    /// Layers that keep everything in 16 bits, e.g. sliding-window ones. Their cost counts.
    pub exempt: Vec<Layer>,
    /// Precisions that a head's K and V may have in lean blocks. Other than 16 bits need
    /// [`Budget::Bytes`].
    pub offer: Offer,
    /// Padding that a budget of bytes counts: that of the backend to come. (Where only whole panels of
    /// channels are kept there is none.)
    pub rules: LayoutRules,
}

/// How many channels each head keeps, and in how many bits.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    /// Kept counts, layer-major.
    pub counts: Vec<usize>,
    /// Precisions, layer-major; 16 bits for dead heads.
    pub precisions: Vec<HeadPrecision>,
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

/// An allocation on the front of bytes against loss.
#[derive(Clone, Debug, PartialEq)]
pub struct FrontPoint {
    /// Share of the dense middle's bytes that it takes.
    pub bytes: f64,
    /// The allocation of least loss within so many bytes.
    pub allocation: Allocation,
}

impl AllocateOptions {
    /// Kept counts that are multiples of 16, no layer exempt, 16 bits, no padding.
    #[must_use]
    pub fn new(budget: Budget) -> Self {
        Self {
            budget,
            alignment: 16,
            exempt: Vec::new(),
            offer: Offer::default(),
            rules: LayoutRules::PACKED,
        }
    }

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
        if let Some(layer) = self.exempt.iter().find(|layer| layer.0 >= shape.layers) {
            let why = format!("there is no layer {layer}: the model has {}", shape.layers);
            return Err(Error::options("exempt", why));
        }
        if self.offer.is_coded() && matches!(self.budget, Budget::KRatio(_)) {
            let why = format!(
                "{} of K's channels says nothing of bits, which {} are a choice of; give a budget of \
                 bytes",
                self.budget, self.offer
            );
            return Err(Error::options("formats", why));
        }
        Ok(())
    }

    /// What a head costs: channels, or bytes of a lean block.
    fn cost(&self, count: usize, precision: HeadPrecision, d: usize) -> usize {
        match self.budget {
            Budget::KRatio(_) => count,
            Budget::Bytes(_) => {
                let format = precision.format(Dtype::F16);
                self.rules.lean_head_bytes(DEFAULT_BLOCK, d, count, format)
            }
        }
    }

    /// What a head costs that keeps everything, without padding.
    fn dense_cost(&self, d: usize) -> usize {
        Self::new(self.budget).cost(d, HeadPrecision::default(), d)
    }

    fn is_exempt(&self, head: usize, shape: &ModelShape) -> bool {
        self.exempt.contains(&Layer(head / shape.kv_heads))
    }
}

/// The allocation with the least summed loss within the budget: exact, since curves are neither
/// convex nor monotone (dropping a head can beat keeping 8 of its channels), and bits and channels
/// compete for the same bytes.
///
/// Ties go to fewer channels, then to more bits.
///
/// # Errors
/// [`Error::Options`] as [`AllocateOptions::check`] and [`Budget::limit`], and where other precisions
/// than 16 bits are offered but `curves` hold none; [`Error::Budget`] when exempt layers alone exceed
/// the budget.
pub fn allocate(
    curves: &Curves,
    shape: &ModelShape,
    options: &AllocateOptions,
) -> Result<Allocation> {
    let choices = all_choices(curves, shape, options)?;
    let dense = choices.len() * options.dense_cost(shape.head_dim);
    let limit = options.budget.share_of(dense)?;
    least_within(&choices, options, limit, dense)?;
    Ok(Program::solve(&choices, limit)?.within(limit).0)
}

/// The front of bytes against loss: for every `1/steps` of the dense middle's bytes the allocation of
/// least loss within them, where it is better than those before. [`AllocateOptions::budget`] says no
/// more than that bytes are what is counted.
///
/// # Errors
/// As [`allocate`]; [`Error::Options`] where the budget is not of bytes.
pub fn front(
    curves: &Curves,
    shape: &ModelShape,
    options: &AllocateOptions,
    steps: usize,
) -> Result<Vec<FrontPoint>> {
    if !matches!(options.budget, Budget::Bytes(_)) {
        return Err(Error::options("bytes", "a front is of bytes; give a budget of bytes"));
    }
    let choices = all_choices(curves, shape, options)?;
    let dense = choices.len() * options.dense_cost(shape.head_dim);
    let least = least_within(&choices, options, dense, dense)?;
    let program = Program::solve(&choices, dense)?;
    let mut points: Vec<FrontPoint> = Vec::new();
    let limits =
        (0..=steps).map(|step| (dense as f64 * step as f64 / steps as f64 + 1e-6) as usize);
    for limit in limits.filter(|&limit| limit >= least) {
        let (allocation, cost) = program.within(limit);
        if points.last().is_none_or(|last| allocation.loss < last.allocation.loss) {
            points.push(FrontPoint { bytes: cost as f64 / dense as f64, allocation });
        }
    }
    Ok(points)
}

/// The least that all heads together cost, where that is within the limit.
fn least_within(
    choices: &[Vec<Choice>],
    options: &AllocateOptions,
    limit: usize,
    dense: usize,
) -> Result<usize> {
    let least = choices.iter().map(|choices| choices[0].cost).sum();
    if least > limit {
        return Err(over_budget(options, least as f64 / dense as f64));
    }
    Ok(least)
}

/// `least`: the share of the dense middle that the exempt layers take.
pub(crate) fn over_budget(options: &AllocateOptions, least: f64) -> Error {
    let (nearest, beyond) = match options.budget {
        Budget::KRatio(_) => (Budget::KRatio(1.0 - least), "less"),
        Budget::Bytes(_) => (Budget::Bytes(least), "more"),
    };
    Error::Budget {
        budget: options.budget.to_string(),
        why: format!(
            "the exempt layers alone take {least:.4} of what a dense middle takes; exempt fewer \
             layers, or ask for {nearest} or {beyond}"
        ),
    }
}

/// Choices of every head.
fn all_choices(
    curves: &Curves,
    shape: &ModelShape,
    options: &AllocateOptions,
) -> Result<Vec<Vec<Choice>>> {
    let step = curves.heads.first().map_or(1, |curve| curve.counts[1]);
    options.check(shape, step)?;
    if options.offer.is_coded() && curves.precisions.len() != curves.heads.len() {
        let why = "the losses of 8 and 4 bits were not measured; ask for them when learning";
        return Err(Error::options("formats", why));
    }
    let heads = 0..curves.heads.len();
    Ok(heads.map(|head| choices(curves, head, options, options.is_exempt(head, shape))).collect())
}

/// What a head may keep, ascending in cost.
fn choices(curves: &Curves, head: usize, options: &AllocateOptions, exempt: bool) -> Vec<Choice> {
    let curve = &curves.heads[head];
    let d = curve.order.len();
    let plain = HeadPrecision::default();
    let loss = |count: usize, precision: HeadPrecision| match precision {
        own if own == plain => curve.loss(count),
        own => curves.precisions[head].loss(count, own),
    };
    let allowed =
        |&count: &usize| count == d || (!exempt && count.is_multiple_of(options.alignment));
    let choice = |count: usize, precision| {
        let cost = options.cost(count, precision, d);
        Some(Choice { count, precision, cost, loss: loss(count, precision)? })
    };
    let of_count = |count: usize| {
        let all: Vec<_> = match count {
            0 => vec![plain],
            _ if exempt => vec![plain],
            _ => options.offer.precisions().collect(),
        };
        all.into_iter().filter_map(move |precision| choice(count, precision))
    };
    undominated(curve.counts.iter().copied().filter(|n| allowed(n)).flat_map(of_count).collect())
}

#[cfg(test)]
mod tests;
