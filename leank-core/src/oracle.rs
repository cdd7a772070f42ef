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
