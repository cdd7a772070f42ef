//! The exact dynamic program over heads and units of cost.

use leank_core::HeadPrecision;

use super::Allocation;
use crate::{Error, Result};

/// Largest table of the dynamic program, in entries.
const MAX_TABLE: usize = 1 << 28;
/// Most sums that are tried: the largest table with 128 choices a head.
const MAX_SUMS: usize = 1 << 35;

/// What a head may keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) count: usize,
    pub(super) precision: HeadPrecision,
    pub(super) cost: usize,
    pub(super) loss: f64,
}

/// The choices that no cheaper or equally cheap one beats, ascending in cost. Of those that are alike
/// the first stays.
pub(super) fn undominated(mut choices: Vec<Choice>) -> Vec<Choice> {
    choices.sort_by_key(|choice| choice.cost);
    let mut best: Vec<Choice> = Vec::new();
    for choice in choices {
        match best.last_mut() {
            Some(last) if choice.loss >= last.loss => {}
            Some(last) if choice.cost == last.cost => *last = choice,
            _ => best.push(choice),
        }
    }
    best
}

/// The least losses within every cost up to a limit, and how they are reached.
pub(super) struct Program<'a> {
    choices: &'a [Vec<Choice>],
    /// Costs are counted in multiples of this.
    unit: usize,
    width: usize,
    /// `[heads, width]`: which choice of a head leads to the least loss of the heads up to it.
    taken: Vec<u16>,
}

impl<'a> Program<'a> {
    /// Solves it. `choices` are per head, ascending in cost, and their least costs are within the limit
    /// together.
    pub(super) fn solve(choices: &'a [Vec<Choice>], limit: usize) -> Result<Self> {
        let unit = choices.iter().flatten().map(|choice| choice.cost).fold(0, gcd).max(1);
        let limit = limit / unit;
        let width = limit + 1;
        if width.saturating_mul(choices.len()) > MAX_TABLE {
            let heads = choices.len();
            let why = format!("{heads} heads × {limit} units are too many; use a larger one");
            return Err(Error::options("alignment", why));
        }
        let all: usize = choices.iter().map(Vec::len).sum();
        if width.saturating_mul(all) > MAX_SUMS {
            let why = format!(
                "{all} choices of all heads × {limit} units are too many; use a larger one, or offer \
                 fewer formats"
            );
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
        Ok(Self { choices, unit, width, taken })
    }

    /// The allocation of least loss within a cost that is at most the limit and at least the heads' least
    /// costs together, and its cost.
    pub(super) fn within(&self, cost: usize) -> (Allocation, usize) {
        let heads = self.choices.len();
        let mut left = (cost / self.unit).min(self.width - 1);
        let mut counts = vec![0; heads];
        let mut precisions = vec![HeadPrecision::default(); heads];
        let (mut loss, mut cost) = (0.0, 0);
        for (head, own) in self.choices.iter().enumerate().rev() {
            let choice = own[usize::from(self.taken[head * self.width + left])];
            (counts[head], precisions[head]) = (choice.count, choice.precision);
            loss += choice.loss;
            cost += choice.cost;
            left -= choice.cost / self.unit;
        }
        (Allocation { counts, precisions, loss }, cost)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
