//! The reference: decode attention over a lean cache in f64, scalar and obvious.
//!
//! For a step whose first query stands at position `start`, a token is *lean* where its block is
//! ([`crate::blocks::is_lean`]), *full* otherwise. The query at position `p` sees tokens `0..=p`:
//!
//! - a full token with logit `scale · Σ_c q_c k_c`,
//! - a lean token of a head that keeps the channels C ≠ ∅ with `scale · Σ_{c∈C} q_c k_c`,
//! - a lean token of a dead head not at all: its V is not stored either.
//!
//! After a truncation blocks may be lean that the windows would keep whole:
//! [`Attention::output_packed`].
//!
//! Then softmax over what is seen, and `Σ_j p_j v_j`. A soft-cap turns a logit into
//! `cap · tanh(logit / cap)` before the softmax. Every backend is tested against this.

use crate::{ChannelMask, Windows, blocks::is_lean};

/// One layer of one sequence, and the queries of one step.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Kept channels per KV head.
    pub masks: &'a [ChannelMask],
    /// Query heads; a multiple of the number of masks.
    pub query_heads: usize,
    /// Tokens kept whole.
    pub windows: Windows,
    /// Tokens per block.
    pub block: usize,
    /// Factor on q·k.
    pub scale: f64,
    /// Logit soft-cap.
    pub soft_cap: Option<f64>,
    /// Position of the first query; the others follow it.
    pub start: usize,
    /// `[tokens, KV heads, head_dim]`; holds at least the tokens that the last query sees.
    pub keys: &'a [f64],
    /// Like `keys`.
    pub values: &'a [f64],
    /// `[queries, query heads, head_dim]`.
    pub queries: &'a [f64],
}

impl Attention<'_> {
    /// The output `[queries, query heads, head_dim]`.
    ///
    /// # Panics
    /// When the lengths of the slices do not fit together.
    #[must_use]
    pub fn output(&self) -> Vec<f64> {
        self.output_packed(0)
    }

    /// The output where blocks before index `packed` were lean already when the step began, those
    /// of the sink excepted: what a truncation leaves behind
    /// ([`Ledger::lean_blocks`](crate::Ledger::lean_blocks) ends there).
    ///
    /// # Panics
    /// When the lengths of the slices do not fit together.
    #[must_use]
    pub fn output_packed(&self, packed: usize) -> Vec<f64> {
        let head_dim = self.masks[0].head_dim();
        let rows = self.queries.len() / head_dim;
        let mut out = Vec::with_capacity(self.queries.len());
        for row in 0..rows {
            let (query, head) = (row / self.query_heads, row % self.query_heads);
            out.extend(self.output_row(query, head, packed));
        }
        out
    }

    fn output_row(&self, query: usize, query_head: usize, packed: usize) -> Vec<f64> {
        let kv_heads = self.masks.len();
        let kv_head = query_head / (self.query_heads / kv_heads);
        let mask = &self.masks[kv_head];
        let head_dim = mask.head_dim();
        let stays_lean = self.windows.sink.div_ceil(self.block)..packed;
        let q = &self.queries[(query * self.query_heads + query_head) * head_dim..][..head_dim];
        let row = |data: &[f64], token: usize| -> Vec<f64> {
            data[(token * kv_heads + kv_head) * head_dim..][..head_dim].to_vec()
        };

        let mut seen = Vec::new();
        for token in 0..=self.start + query {
            let index = token / self.block;
            let lean =
                stays_lean.contains(&index) || is_lean(index, self.block, self.windows, self.start);
            if lean && mask.is_dead() {
                continue;
            }
            let k = row(self.keys, token);
            let dot: f64 = if lean {
                mask.kept().iter().map(|&c| q[usize::from(c)] * k[usize::from(c)]).sum()
            } else {
                q.iter().zip(&k).map(|(q, k)| q * k).sum()
            };
            let logit = self.scale * dot;
            let logit = self.soft_cap.map_or(logit, |cap| cap * (logit / cap).tanh());
            seen.push((logit, row(self.values, token)));
        }

        let max = seen.iter().fold(f64::NEG_INFINITY, |max, (logit, _)| max.max(*logit));
        let mut out = vec![0.0; head_dim];
        let mut sum = 0.0;
        for (logit, v) in &seen {
            let weight = (logit - max).exp();
            sum += weight;
            for (out, v) in out.iter_mut().zip(v) {
                *out += weight * v;
            }
        }
        out.iter_mut().for_each(|x| *x /= sum);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two query heads for each of two KV heads of two channels: one keeps the first channel, the other is
    /// dead. Of the five tokens block 1 is lean. A factor of ln 2 makes weights powers of two.
    struct Setting {
        masks: [ChannelMask; 2],
        keys: Vec<f64>,
        values: Vec<f64>,
    }

    impl Setting {
        fn new() -> Self {
            let masks = [ChannelMask::new(2, vec![0]).unwrap(), ChannelMask::none(2)];
            let keys = [[1, 1], [1, 9], [0, 2], [2, 1], [0, 0]];
            let keys = keys.iter().flat_map(|&[a, b]| [a, b, 5 * a, -b]).map(f64::from).collect();
            let values = (0..5).flat_map(|t| [t, t * t, -t, 1]).map(f64::from).collect();
            Self { masks, keys, values }
        }

        fn attention<'a>(&'a self, queries: &'a [f64]) -> Attention<'a> {
            Attention {
                masks: &self.masks,
                query_heads: 4,
                windows: Windows { sink: 1, recent: 2 },
                block: 1,
                scale: 2f64.ln(),
                soft_cap: None,
                start: 3,
                keys: &self.keys,
                values: &self.values,
                queries,
            }
        }
    }

    /// The mean of values `[[a, b]; tokens]` under these weights, one per token.
    fn mean(weights: &[f64], value: impl Fn(f64) -> [f64; 2]) -> [f64; 2] {
        let sum: f64 = weights.iter().sum();
        [0, 1].map(|c| {
            let terms = weights.iter().enumerate().map(|(t, weight)| weight * value(t as f64)[c]);
            terms.sum::<f64>() / sum
        })
    }

    fn close(found: &[f64], expected: &[[f64; 2]]) {
        assert_eq!(found.len(), 2 * expected.len());
        for (found, expected) in found.iter().zip(expected.as_flattened()) {
            assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
        }
    }

    #[test]
    fn attention_is_what_the_definition_says() {
        let setting = Setting::new();
        let queries = [[1, 1], [0, 1], [0, 0], [1, 0], [0, 1], [2, 0], [0, 1], [0, 0]];
        let queries: Vec<f64> = queries.as_flattened().iter().map(|&q| f64::from(q)).collect();
        let live = |weights: &[f64]| mean(weights, |t| [t, t * t]);
        let dead = |weights: &[f64]| mean(weights, |t| [-t, 1.0]);
        // Exponents are q·k, of token 1 over the first channel alone; a weight of 0 is not seen.
        let expected = [
            live(&[4.0, 2.0, 4.0, 8.0]),
            live(&[2.0, 1.0, 4.0, 2.0]),
            dead(&[1.0, 0.0, 1.0, 1.0]),
            dead(&[32.0, 0.0, 1.0, 1024.0]),
            live(&[2.0, 1.0, 4.0, 2.0, 1.0]),
            live(&[4.0, 4.0, 1.0, 16.0, 1.0]),
            dead(&[0.5, 0.0, 0.25, 0.5, 1.0]),
            dead(&[1.0, 0.0, 1.0, 1.0, 1.0]),
        ];
        close(&setting.attention(&queries).output(), &expected);
        // After a truncation block 2 is lean too; the sink never is.
        let packed = setting.attention(&queries[..4]).output_packed(3);
        let attention = Attention { query_heads: 2, ..setting.attention(&queries[..4]) };
        let packed_alike = attention.output_packed(3);
        close(&packed[..2], &[live(&[4.0, 2.0, 1.0, 8.0])]);
        assert_eq!(packed[..2], packed_alike[..2]);
        close(&packed_alike[2..], &[dead(&[0.5, 0.0, 0.0, 0.5])]);
        // Every token twice, in blocks of two: the same means.
        let twice = |rows: &[f64]| -> Vec<f64> {
            rows.chunks(4).flat_map(|row| row.iter().chain(row)).copied().collect()
        };
        let (keys, values) = (twice(&setting.keys), twice(&setting.values));
        let windows = Windows { sink: 2, recent: 4 };
        let (keys, values) = (&keys[..], &values[..]);
        let one = setting.attention(&queries[..8]);
        let doubled = Attention { keys, values, windows, block: 2, start: 7, ..one };
        close(&doubled.output(), &expected[..4]);
    }

    #[test]
    fn logits_may_be_large_and_capped() {
        let setting = Setting::new();
        let live = |weights: &[f64]| mean(weights, |t| [t, t * t]);
        // 2^2000 is beyond f64; the ratios of weights are not.
        let queries = [1000.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let found = setting.attention(&queries).output();
        close(&found[..2], &[live(&[0.0, 0.0, 0.0, 1.0])]);
        let keys: Vec<f64> =
            [1023.0, 1023.0, 1022.0, 1024.0].iter().flat_map(|&k| [k, 0.0, 0.0, 0.0]).collect();
        let queries = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let attention = Attention { keys: &keys, ..setting.attention(&queries) };
        close(&attention.output()[..2], &[live(&[2.0, 2.0, 1.0, 4.0])]);
        let capped = Attention { soft_cap: Some(2.0), scale: 1.5, ..setting.attention(&queries) };
        let weight = |dot: f64| (2.0 * (1.5 * dot / 2.0).tanh()).exp();
        close(&capped.output()[..2], &[live(&[1.0, 1.0, 0.0, 2.0].map(weight))]);
    }
}
