//! What outputs must be: the oracle on one sequence, and how far a backend may be off.

use std::{cell::OnceCell, ops::Range};

use leank_core::{
    CacheConfig, Dtype, HeadFormat, KvHead, Layer, LeanFormat, Tensor, blocks::is_lean,
    oracle::Attention, quant::round_trip,
};

use crate::{Kind, Subject, rounding_error};

/// Up to here `scale · Σ_c |q_c k_c|` goes with the activations that bounds are for.
const USUAL_TERMS: f64 = 100.0;

/// Writes the activations of a sequence at a layer and a position, `[heads, head_dim]`.
pub type WriteRow<'a> = dyn Fn(Kind, Layer, usize, &mut [f32]) + 'a;

/// One sequence as the oracle sees it. Its activations are a function, so that none are held.
#[derive(Clone, Copy)]
pub struct Reference<'a> {
    /// What the cache was made for.
    pub config: &'a CacheConfig,
    /// Writes them.
    pub row: &'a WriteRow<'a>,
    /// Blocks before this index, those of the sink excepted, are lean whatever the windows say: what
    /// a truncation left behind.
    pub packed: usize,
}

impl Reference<'_> {
    /// Compares the outputs `[tokens, query heads, head_dim]` of the first new tokens of a step, which
    /// stood at `positions`, with the oracle on stored values and, where all activations are `finite`,
    /// with the oracle on exact ones. Bounds are those of the subject and of [`rounding_error`], in
    /// proportion to what a logit adds up where that is much, and never below what subnormal numbers
    /// are worth. Returns the largest error as a share of its bound.
    ///
    /// # Errors
    /// Says which element is further off than its bound, and from what.
    ///
    /// # Panics
    /// When `got` is not as long as the positions say.
    pub fn check<S: Subject>(
        &self,
        subject: &S,
        layer: Layer,
        positions: Range<usize>,
        got: &[f32],
        finite: bool,
    ) -> Result<f64, String> {
        // A head's outputs depend on its own formats only.
        let heads = self.config.shape.kv_head_indices();
        let bounds: Vec<_> = heads.map(|head| self.bounds(subject, layer, head)).collect();
        let stored = self.oracle(layer, positions.clone(), Some(subject.spoiled_channels()));
        let arithmetic = |head: usize| bounds[head].arithmetic;
        let share =
            self.compare(got, &stored, arithmetic, finite, "the oracle on stored values")?;
        if !finite {
            return Ok(share);
        }
        let exact = self.oracle(layer, positions, None);
        let storage = |head: usize| bounds[head].storage;
        let other = self.compare(got, &exact, storage, finite, "the oracle on exact values")?;
        Ok(share.max(other))
    }

    /// How far outputs of a KV head's group may be off.
    fn bounds<S: Subject>(&self, subject: &S, layer: Layer, head: KvHead) -> Bounds {
        let HeadFormat { k, v } = self.config.format(layer, head);
        let formats = [k, v, LeanFormat::Plain(self.config.dtype)];
        let largest = |bounds: [f64; 3]| bounds.into_iter().fold(0.0, f64::max);
        // Errors of a logit add up over the channels.
        let channels = (self.config.shape.head_dim as f64 / 128.0).max(1.0);
        let errors = formats.map(|format| match format {
            LeanFormat::Plain(dtype) => subject.arithmetic_error(dtype),
            _ => subject.coded_arithmetic_error(),
        });
        let arithmetic = channels * largest(errors);
        Bounds { arithmetic, storage: arithmetic.max(largest(formats.map(rounding_error))) }
    }

    /// Compares rows `[query heads, head_dim]`; `bound` is that of a KV head.
    fn compare(
        &self,
        got: &[f32],
        expected: &Expected,
        bound: impl Fn(usize) -> f64,
        finite: bool,
        against: &str,
    ) -> Result<f64, String> {
        let shape = self.config.shape;
        assert_eq!(got.len(), expected.output.len());
        let mut share: f64 = 0.0;
        for (i, (&got, &want)) in got.iter().zip(&expected.output).enumerate() {
            if !finite && !want.is_finite() {
                if !(got.is_nan() && want.is_nan() || f64::from(got) == want) {
                    return Err(format!("element {i}: {got}, {against} says {want}"));
                }
                continue;
            }
            let head = i / shape.head_dim % shape.query_heads / shape.group();
            let error = (f64::from(got) - want).abs();
            let mut most = expected.largest * bound(head) + expected.finest;
            // Not `error > most`: NaN must fail.
            let within = |most: f64| error <= most;
            // Errors of a logit are shares of what it adds up.
            if !within(most) {
                let terms = expected.terms.get_or_init(|| self.terms(expected))[head];
                most *= (terms / USUAL_TERMS).max(1.0);
            }
            if !within(most) {
                return Err(format!(
                    "element {i}: {got}, {against} says {want} (error {error:.2e} > {most:.1e})"
                ));
            }
            share = share.max(error / most);
        }
        Ok(share)
    }

    /// What the oracle says; on values as they are stored where [`Subject::spoiled_channels`] is there, or else
    /// as they were given.
    fn oracle(&self, layer: Layer, positions: Range<usize>, stored: Option<usize>) -> Expected {
        let CacheConfig { shape, windows, block, .. } = *self.config;
        let rows = |kind: Kind, positions: Range<usize>| -> Vec<f32> {
            let width = kind.heads(&shape) * shape.head_dim;
            let mut values = vec![0.0; positions.len() * width];
            for (position, row) in positions.zip(values.chunks_exact_mut(width)) {
                (self.row)(kind, layer, position, row);
            }
            values
        };
        let tokens = |kind: Kind, tensor: Tensor| -> Vec<f64> {
            let mut values = rows(kind, 0..positions.end);
            if let Some(spoiled) = stored {
                self.store(layer, tensor, positions.start, spoiled, &mut values);
            }
            values.into_iter().map(f64::from).collect()
        };
        let queries = rows(Kind::Query, positions.clone()).into_iter().map(f64::from);
        let queries: Vec<f64> = queries.collect();
        let (keys, values) = (tokens(Kind::Key, Tensor::K), tokens(Kind::Value, Tensor::V));
        let attention = Attention {
            masks: self.config.mask.layer(layer),
            query_heads: shape.query_heads,
            windows,
            block,
            scale: f64::from(self.config.scale()),
            soft_cap: self.config.soft_cap.map(f64::from),
            start: positions.start,
            keys: &keys,
            values: &values,
            queries: &queries,
        };
        let largest = values.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        // The least subnormal number that values may be rounded to; arithmetic may take such for 0.
        let half =
            if stored.is_some() || self.config.dtype != Dtype::F16 { 0.0 } else { 2f64.powi(-25) };
        let finest = f64::from(f32::MIN_POSITIVE).max(half);
        let output = attention.output_packed(self.packed);
        Expected { output, largest, finest, keys, queries, terms: OnceCell::new() }
    }

    /// Of each KV head the largest `scale · Σ_c |q_c k_c|`.
    fn terms(&self, Expected { keys, queries, .. }: &Expected) -> Vec<f64> {
        let shape = self.config.shape;
        let rows =
            |data, heads, own| <[f64]>::chunks_exact(data, shape.head_dim).skip(own).step_by(heads);
        let of_head = |head: KvHead| {
            let mut most = 0.0;
            for own in head.0 * shape.group()..(head.0 + 1) * shape.group() {
                for q in rows(queries, shape.query_heads, own) {
                    for k in rows(keys, shape.kv_heads, head.0) {
                        most = f64::max(most, q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum());
                    }
                }
            }
            f64::from(self.config.scale()).abs() * most
        };
        shape.kv_head_indices().map(of_head).collect()
    }

    /// Makes of K or V of the sequence, `[tokens, KV heads, head_dim]`, what the cache holds in a step
    /// whose first query stands at `start`.
    fn store(
        &self,
        layer: Layer,
        tensor: Tensor,
        start: usize,
        spoiled: usize,
        values: &mut [f32],
    ) {
        let CacheConfig { shape, block, windows, dtype, .. } = *self.config;
        values.iter_mut().for_each(|x| *x = dtype.round(*x));
        let width = shape.kv_heads * shape.head_dim;
        let stays_lean = windows.sink.div_ceil(block)..self.packed;
        for (index, rows) in values.chunks_mut(block * width).enumerate() {
            if !(stays_lean.contains(&index) || is_lean(index, block, windows, start)) {
                continue;
            }
            for head in shape.kv_head_indices() {
                let part = head.0 * shape.head_dim..(head.0 + 1) * shape.head_dim;
                let mut own: Vec<f32> =
                    rows.chunks(width).flat_map(|row| &row[part.clone()]).copied().collect();
                let format = self.config.format(layer, head).of(tensor);
                round_trip(format, tensor, shape.head_dim, &mut own);
                if (tensor, format) == (Tensor::V, LeanFormat::Int4) {
                    let tokens = own.chunks_mut(shape.head_dim);
                    for together in tokens.flat_map(|token| token.chunks_mut(spoiled)) {
                        if together.iter().any(|x| x.is_nan()) {
                            together.fill(f32::NAN);
                        }
                    }
                }
                let own = own.chunks(shape.head_dim);
                rows.chunks_mut(width).zip(own).for_each(|(row, own)| {
                    row[part.clone()].copy_from_slice(own);
                });
            }
        }
    }
}

/// Largest errors of a KV head's outputs, as shares of the largest |v|.
struct Bounds {
    /// Against the oracle on stored values.
    arithmetic: f64,
    /// Against the oracle on exact ones.
    storage: f64,
}

struct Expected {
    output: Vec<f64>,
    /// Largest |v|.
    largest: f64,
    /// How far outputs may be off whatever their size.
    finest: f64,
    /// `[tokens, KV heads, head_dim]`.
    keys: Vec<f64>,
    /// `[queries, query heads, head_dim]`.
    queries: Vec<f64>,
    /// [`Reference::terms`], where they were needed.
    terms: OnceCell<Vec<f64>>,
}
