//! The attention kernel: online softmax over the blocks of one KV head, for a tile of query rows.
//!
//! A tile is some rows of queries (query tokens × the query heads of the group) that read the same
//! K and V, so every element is loaded and widened once for all of them. Per block: logits
//! ([`math::logits`]), softmax over what each row sees, weighted sum of V
//! ([`math::weighted_sum`]). The running maximum and sum per row make the blocks exact in any
//! number (Milakov & Gimelshein 2018).

pub(crate) mod math;

use crate::element::Element;

/// Most query rows of a tile: their accumulators stay in the first-level cache.
pub(crate) const MAX_ROWS: usize = 16;

/// The state of a tile while blocks pass by.
pub(crate) struct Tile {
    rows: usize,
    head_dim: usize,
    soft_cap: Option<f32>,
    /// `[rows, tokens of a block]`: logits, then weights.
    logits: Vec<f32>,
    /// `[rows, head_dim]`
    sum: Vec<f32>,
    max: Vec<f32>,
    weight: Vec<f32>,
}

/// K of one head in one block as the kernel reads it: `[channels, block]`.
pub(crate) struct Keys<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) block: usize,
}

impl Tile {
    pub(crate) fn new(rows: usize, head_dim: usize, block: usize, soft_cap: Option<f32>) -> Self {
        Self {
            rows,
            head_dim,
            soft_cap,
            logits: vec![0.0; rows * block],
            sum: vec![0.0; rows * head_dim],
            max: vec![f32::NEG_INFINITY; rows],
            weight: vec![0.0; rows],
        }
    }

    /// Logits of the first `tokens` tokens of a block for every row.
    ///
    /// `queries` is `[rows, channels]`, already scaled, in the order of the stored channels.
    pub(crate) fn score<K: Element>(&mut self, queries: &[f32], keys: Keys<'_, K>, tokens: usize) {
        let block = keys.block;
        math::logits(queries, keys, tokens, &mut self.logits);
        if let Some(cap) = self.soft_cap {
            for row in self.logits.chunks_exact_mut(block).take(self.rows) {
                for logit in &mut row[..tokens] {
                    *logit = cap * (*logit / cap).tanh();
                }
            }
        }
    }

    /// Takes the block's V in. Row `r` sees its first `seen(r)` tokens; `values` is
    /// `[block, head_dim]`.
    pub(crate) fn accumulate<V: Element>(
        &mut self,
        values: &[V],
        block: usize,
        seen: impl Fn(usize) -> usize,
    ) {
        let mut most = 0;
        for row in 0..self.rows {
            let seen = seen(row);
            most = most.max(seen);
            let logits = &mut self.logits[row * block..][..block];
            if seen == 0 {
                logits.fill(0.0);
                continue;
            }
            let max = math::max(&logits[..seen]).max(self.max[row]);
            let correction = math::exp(self.max[row] - max);
            let weight = math::exp_in_place(&mut logits[..seen], max);
            logits[seen..].fill(0.0);
            self.max[row] = max;
            self.weight[row] = self.weight[row] * correction + weight;
            if correction != 1.0 {
                for x in &mut self.sum[row * self.head_dim..][..self.head_dim] {
                    *x *= correction;
                }
            }
        }
        let weights = math::Weights { data: &self.logits, block, tokens: most };
        math::weighted_sum(weights, values, self.head_dim, &mut self.sum);
    }

    /// The output of each row, `[rows, head_dim]`.
    pub(crate) fn finish(mut self) -> Vec<f32> {
        for (row, weight) in self.sum.chunks_exact_mut(self.head_dim).zip(&self.weight) {
            let inverse = 1.0 / weight;
            row.iter_mut().for_each(|x| *x *= inverse);
        }
        self.sum
    }
}
