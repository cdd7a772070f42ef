//! Dense causal attention over keys and values in f32, forwards and backwards.
//!
//! All query heads of a group read their KV head together: for a tile of queries, one product makes
//! the logits and one the output, on contiguous rows and inside the cache of a core; tiles and KV
//! heads run in parallel. A tile reads no keys beyond its own last token.

use std::ops::Range;

use leank_core::ModelShape;
use rayon::prelude::*;

use crate::gemm::{MatRef, Threads, matmul};
use crate::rows;

/// Query rows (tokens times group) per tile: 128 rows of logits over 2k keys are 1 MB, about what
/// a core's second-level cache holds.
const ROWS_PER_TILE: usize = 128;

/// Keys and values of one layer of one sequence and where the queries stand.
#[derive(Clone, Copy)]
pub(crate) struct Causal<'a> {
    pub(crate) shape: ModelShape,
    /// `[kv_heads, capacity, head_dim]`.
    pub(crate) keys: &'a [f32],
    /// As `keys`.
    pub(crate) values: &'a [f32],
    /// Rows per KV head in `keys` and `values`.
    pub(crate) capacity: usize,
    /// Tokens before the first query; query `t` sees tokens up to `past + t`.
    pub(crate) past: usize,
    /// How many tokens a query sees, itself included; `None`: all up to its own.
    pub(crate) window: Option<usize>,
}

/// Queries of one KV head that are computed together.
struct Tile {
    kv_head: usize,
    start: usize,
    len: usize,
    /// Tokens that some query of the tile sees.
    seen: Range<usize>,
}

/// Buffers of one tile, reused by a thread.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    logits: Vec<f32>,
    grads: Vec<f32>,
    d_logits: Vec<f32>,
}

/// Gradients of [`Causal::backward`].
pub(crate) struct AttentionGrads {
    /// `[tokens, query_heads, head_dim]`.
    pub(crate) queries: Vec<f32>,
    /// `[tokens, kv_heads, head_dim]`, of the keys of the queries' own tokens.
    pub(crate) keys: Vec<f32>,
    /// As `keys`.
    pub(crate) values: Vec<f32>,
}

impl Causal<'_> {
    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    fn tiles(&self, tokens: usize) -> Vec<Tile> {
        let step = (ROWS_PER_TILE / self.shape.group()).max(1);
        let starts = (0..tokens).step_by(step);
        (0..self.shape.kv_heads)
            .flat_map(|kv_head| {
                starts.clone().map(move |start| {
                    let len = step.min(tokens - start);
                    let seen = self.seen(start).start..self.seen(start + len - 1).end;
                    Tile { kv_head, start, len, seen }
                })
            })
            .collect()
    }

    /// Tokens that query `t` sees.
    fn seen(&self, t: usize) -> Range<usize> {
        let end = self.past + t + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Rows of a tile's KV head that the tile sees.
    fn head<'b>(&self, rows: &'b [f32], tile: &Tile) -> MatRef<'b> {
        let dim = self.shape.head_dim;
        let first = (tile.kv_head * self.capacity + tile.seen.start) * dim;
        MatRef::new(&rows[first..][..tile.seen.len() * dim], tile.seen.len(), dim)
    }

    /// Copies a tile of `[tokens, query_heads, head_dim]` to `[group, len, head_dim]`, scaled.
    fn gather(&self, from: &[f32], tile: &Tile, scale: f32, to: &mut Vec<f32>) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        to.clear();
        for g in 0..group {
            for t in tile.start..tile.start + tile.len {
                let head = t * self.shape.query_heads + tile.kv_head * group + g;
                to.extend(from[head * dim..][..dim].iter().map(|x| x * scale));
            }
        }
    }

    /// The reverse of [`Causal::gather`], unscaled.
    fn scatter(&self, from: &[f32], tile: &Tile, to: &mut [f32]) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        for (row, from) in from.chunks_exact(dim).enumerate() {
            let (g, t) = (row / tile.len, tile.start + row % tile.len);
            let head = t * self.shape.query_heads + tile.kv_head * group + g;
            to[head * dim..][..dim].copy_from_slice(from);
        }
    }

    /// Softmax numerators of a tile in `scratch.logits` (rows as long as the tile sees tokens, zero
    /// where the query does not see), and the factor each row still needs.
    fn weights(&self, queries: &[f32], tile: &Tile, scratch: &mut Scratch) -> Vec<f32> {
        let keys = tile.seen.len();
        let count = tile.len * self.shape.group();
        self.gather(queries, tile, self.scale(), &mut scratch.queries);
        // Only the length matters: the product overwrites every element.
        scratch.logits.resize(count * keys, 0.0);
        matmul(
            MatRef::new(&scratch.queries, count, self.shape.head_dim),
            self.head(self.keys, tile).t(),
            &mut scratch.logits,
            Threads::One,
        );
        let softmax = |(row, logits): (usize, &mut [f32])| {
            let seen = self.seen(tile.start + row % tile.len);
            let (first, end) = (seen.start - tile.seen.start, seen.end - tile.seen.start);
            logits[..first].fill(0.0);
            logits[end..].fill(0.0);
            1.0 / rows::exp_row(&mut logits[first..end])
        };
        scratch.logits.chunks_exact_mut(keys).enumerate().map(softmax).collect()
    }

    /// Attention output `[tokens, query_heads, head_dim]` of `queries` of the same shape.
    pub(crate) fn forward(&self, queries: &[f32], tokens: usize) -> Vec<f32> {
        let dim = self.shape.head_dim;
        let tiles = self.tiles(tokens);
        let outputs: Vec<Vec<f32>> = tiles
            .par_iter()
            .map_init(Scratch::default, |scratch, tile| {
                let factors = self.weights(queries, tile, scratch);
                let mut out = vec![0.0; factors.len() * dim];
                matmul(
                    MatRef::new(&scratch.logits, factors.len(), tile.seen.len()),
                    self.head(self.values, tile),
                    &mut out,
                    Threads::One,
                );
                for (row, factor) in out.chunks_exact_mut(dim).zip(factors) {
                    rows::scale_row(row, factor);
                }
                out
            })
            .collect();
        let mut out = vec![0.0; queries.len()];
        for (tile, rows) in tiles.iter().zip(&outputs) {
            self.scatter(rows, tile, &mut out);
        }
        out
    }

    /// Gradients with respect to the queries and to the keys and values of the queries' own
    /// tokens, given the gradient of the output. Earlier tokens are constants.
    pub(crate) fn backward(&self, queries: &[f32], grad: &[f32], tokens: usize) -> AttentionGrads {
        let tiles = self.tiles(tokens);
        let parts: Vec<AttentionGrads> = tiles
            .par_iter()
            .map_init(Scratch::default, |scratch, tile| {
                self.tile_backward(queries, grad, tile, scratch)
            })
            .collect();
        let (dim, kv_heads) = (self.shape.head_dim, self.shape.kv_heads);
        let mut sum = AttentionGrads {
            queries: vec![0.0; queries.len()],
            keys: vec![0.0; tokens * kv_heads * dim],
            values: vec![0.0; tokens * kv_heads * dim],
        };
        // In the order of the tiles, so that sums do not depend on the threads.
        for (tile, part) in tiles.iter().zip(&parts) {
            self.scatter(&part.queries, tile, &mut sum.queries);
            for (to, from) in [(&mut sum.keys, &part.keys), (&mut sum.values, &part.values)] {
                for (token, from) in from.chunks_exact(dim).enumerate() {
                    let to = &mut to[(token * kv_heads + tile.kv_head) * dim..][..dim];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                }
            }
        }
        sum
    }

    /// One tile of [`Causal::backward`]: `queries` as `[group, len, head_dim]`, `keys` and `values`
    /// as `[start + len, head_dim]` of the tile's KV head; zero where no query of it sees.
    fn tile_backward(
        &self,
        queries: &[f32],
        grad: &[f32],
        tile: &Tile,
        scratch: &mut Scratch,
    ) -> AttentionGrads {
        let dim = self.shape.head_dim;
        let (keys, own) = (tile.seen.len(), tile.start + tile.len);
        // The tile's own tokens that it sees: their first one, and its column among the seen.
        let first_own = tile.seen.start.saturating_sub(self.past);
        let column = (self.past + first_own) - tile.seen.start;
        let own_rows = first_own * dim..own * dim;
        let factors = self.weights(queries, tile, scratch);
        let count = factors.len();
        let Scratch { queries, logits: p, grads, d_logits } = scratch;
        self.gather(grad, tile, 1.0, grads);
        d_logits.resize(count * keys, 0.0);
        let grads = MatRef::new(grads, count, dim);
        let values = self.head(self.values, tile);
        matmul(grads, values.t(), d_logits, Threads::One);
        for (p, factor) in p.chunks_exact_mut(keys).zip(factors) {
            rows::scale_row(p, factor);
        }
        let mut d_values = vec![0.0; own * dim];
        let own_columns = MatRef::strided(&p[column..], count, own - first_own, keys);
        let d_own = &mut d_values[own_rows.clone()];
        matmul(own_columns.t(), grads, d_own, Threads::One);
        for (p, dp) in p.chunks_exact_mut(keys).zip(d_logits.chunks_exact(keys)) {
            let mean = rows::dot(p, dp);
            rows::softmax_grad(p, dp, mean, 1.0);
        }
        let own_columns = MatRef::strided(&p[column..], count, own - first_own, keys);
        let mut d_keys = vec![0.0; own * dim];
        // The gathered queries carry the scale already.
        let d_own = &mut d_keys[own_rows];
        matmul(own_columns.t(), MatRef::new(queries, count, dim), d_own, Threads::One);
        let mut d_queries = vec![0.0; count * dim];
        let tile_keys = self.head(self.keys, tile);
        matmul(MatRef::new(p, count, keys), tile_keys, &mut d_queries, Threads::One);
        rows::scale_row(&mut d_queries, self.scale());
        AttentionGrads { queries: d_queries, keys: d_keys, values: d_values }
    }
}

#[cfg(test)]
mod tests {
    use leank_train::rng::Rng;

    use super::*;

    struct Case {
        shape: ModelShape,
        capacity: usize,
        past: usize,
        tokens: usize,
        window: Option<usize>,
        keys: Vec<f32>,
        values: Vec<f32>,
        queries: Vec<f32>,
    }

    impl Case {
        fn new(
            heads: (usize, usize, usize),
            (past, tokens): (usize, usize),
            window: Option<usize>,
        ) -> Self {
            let shape = ModelShape::new(1, heads.0, heads.1, heads.2).unwrap();
            let mut rng = Rng::new(past as u64 * 31 + tokens as u64);
            let capacity = past + tokens + 3;
            let mut random = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let rows = heads.1 * capacity * heads.2;
            let (keys, values) = (random(rows), random(rows));
            let queries = random(tokens * heads.0 * heads.2);
            Self { shape, capacity, past, tokens, window, keys, values, queries }
        }

        fn causal(&self) -> Causal<'_> {
            Causal {
                shape: self.shape,
                keys: &self.keys,
                values: &self.values,
                capacity: self.capacity,
                past: self.past,
                window: self.window,
            }
        }

        /// Attention as it is defined, in f64.
        fn naive(&self) -> Vec<f64> {
            let ModelShape { query_heads, head_dim: dim, .. } = self.shape;
            let mut out = vec![0.0; self.queries.len()];
            for (row, out) in out.chunks_exact_mut(dim).enumerate() {
                let (t, h) = (row / query_heads, row % query_heads);
                let base = h / self.shape.group() * self.capacity * dim;
                let at = |rows: &[f32], j: usize, c: usize| f64::from(rows[base + j * dim + c]);
                let own = self.past + t;
                let seen = (0..=own).filter(|j| self.window.is_none_or(|window| own - j < window));
                let seen: Vec<usize> = seen.collect();
                let logits: Vec<f64> = seen
                    .iter()
                    .map(|&j| {
                        let q = &self.queries[row * dim..];
                        let dot: f64 =
                            (0..dim).map(|c| f64::from(q[c]) * at(&self.keys, j, c)).sum();
                        (dot / (dim as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = logits.iter().sum();
                for (c, out) in out.iter_mut().enumerate() {
                    let rows = seen.iter().zip(&logits);
                    *out = rows.map(|(&j, p)| p / sum * at(&self.values, j, c)).sum();
                }
            }
            out
        }
    }

    #[test]
    fn agrees_with_attention_as_defined() {
        for (heads, past, tokens) in [
            ((1, 1, 2), 0, 1),
            ((9, 3, 16), 0, 70),
            ((14, 2, 8), 130, 37),
            ((4, 4, 32), 5, 1),
            ((7, 1, 4), 300, 200),
        ] {
            for window in [None, Some(1), Some(10), Some(150), Some(1000)] {
                let case = Case::new(heads, (past, tokens), window);
                let got = case.causal().forward(&case.queries, tokens);
                for (got, want) in got.iter().zip(case.naive()) {
                    let near = (f64::from(*got) - want).abs() < 2e-5;
                    assert!(near, "{heads:?}, {window:?}: {got} and {want}");
                }
            }
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        // 45: one tile sees tokens that another does not; 3: and tiles that see only their own.
        for window in [None, Some(45), Some(3)] {
            check_gradients(Case::new((6, 2, 4), (5, 50), window));
        }
    }

    fn check_gradients(mut case: Case) {
        let mut rng = Rng::new(3);
        let grad: Vec<f32> = (0..case.queries.len()).map(|_| rng.normal() as f32).collect();
        let grads = case.causal().backward(&case.queries, &grad, case.tokens);
        let loss = |case: &Case| -> f64 {
            case.naive().iter().zip(&grad).map(|(o, g)| o * f64::from(*g)).sum()
        };
        let step = 1e-3f32;
        let dim = case.shape.head_dim;
        let mut check = |pick: fn(&mut Case) -> &mut Vec<f32>, i: usize, got: f32, what: &str| {
            let before = pick(&mut case)[i];
            pick(&mut case)[i] = before + step;
            let above = loss(&case);
            pick(&mut case)[i] = before - step;
            let numeric = (above - loss(&case)) / (2.0 * f64::from(step));
            pick(&mut case)[i] = before;
            let found = f64::from(got);
            assert!(
                (numeric - found).abs() < 2e-3 * (1.0 + numeric.abs()),
                "{what} {i}: {numeric} {found}"
            );
        };
        for i in (0..grads.queries.len()).step_by(37) {
            check(|case| &mut case.queries, i, grads.queries[i], "query");
        }
        for i in (0..grads.keys.len()).step_by(23) {
            let (token, head, c) = (i / dim / 2, i / dim % 2, i % dim);
            let stored = (head * 58 + 5 + token) * dim + c;
            check(|case| &mut case.keys, stored, grads.keys[i], "key");
            check(|case| &mut case.values, stored, grads.values[i], "value");
        }
    }
}
