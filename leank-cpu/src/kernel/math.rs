//! The inner loops, in portable Rust that the compiler vectorises: fixed-size chunks of lanes,
//! accumulators in arrays, no branches inside.

use super::Keys;
use crate::element::Element;

/// Lanes that one accumulator array holds.
const LANES: usize = 16;

/// Calls `$body` with `R` bound to the number of rows in `1..=4`.
macro_rules! for_rows {
    ($rows:expr, $R:ident => $body:expr) => {
        match $rows {
            1 => {
                const $R: usize = 1;
                $body
            }
            2 => {
                const $R: usize = 2;
                $body
            }
            3 => {
                const $R: usize = 3;
                $body
            }
            _ => {
                const $R: usize = 4;
                $body
            }
        }
    };
}

/// `logits[r, t] = Σ_c queries[r, c] · keys[c, t]` for the first `tokens` tokens.
///
/// `logits` is `[rows, block]`. Lanes past `tokens` up to a multiple of [`LANES`] may be written
/// with whatever lies there.
pub(crate) fn logits<K: Element>(
    queries: &[f32],
    keys: Keys<'_, K>,
    tokens: usize,
    logits: &mut [f32],
) {
    let block = keys.block;
    let channels = keys.data.len() / block;
    let rows = logits.len() / block;
    let mut row = 0;
    while row < rows {
        let some = (rows - row).min(4);
        let queries = &queries[row * channels..][..some * channels];
        let logits = &mut logits[row * block..][..some * block];
        let mut token = 0;
        while token + LANES <= block && token < tokens {
            for_rows!(some, R => logits_chunk::<K, R>(queries, &keys, token, logits));
            token += LANES;
        }
        for token in token..tokens.max(token) {
            logits_single(queries, &keys, token, logits);
        }
        row += some;
    }
}

fn logits_chunk<K: Element, const R: usize>(
    queries: &[f32],
    keys: &Keys<'_, K>,
    token: usize,
    logits: &mut [f32],
) {
    let channels = queries.len() / R;
    let rows: [&[f32]; R] = std::array::from_fn(|r| &queries[r * channels..][..channels]);
    let mut acc = [[0.0f32; LANES]; R];
    for (c, column) in keys.data.chunks_exact(keys.block).enumerate() {
        let stored: &[K; LANES] = column[token..].first_chunk().expect("caller checks the bound");
        let k = stored.map(K::widen);
        for r in 0..R {
            let q = rows[r][c];
            for lane in 0..LANES {
                acc[r][lane] += q * k[lane];
            }
        }
    }
    for r in 0..R {
        logits[r * keys.block + token..][..LANES].copy_from_slice(&acc[r]);
    }
}

/// The tail of a block whose size is no multiple of [`LANES`].
fn logits_single<K: Element>(
    queries: &[f32],
    keys: &Keys<'_, K>,
    token: usize,
    logits: &mut [f32],
) {
    let channels = keys.data.len() / keys.block;
    for (r, row) in logits.chunks_exact_mut(keys.block).enumerate() {
        let q = &queries[r * channels..][..channels];
        let column = keys.data.iter().skip(token).step_by(keys.block);
        row[token] = q.iter().zip(column).map(|(q, k)| q * k.widen()).sum();
    }
}

/// Weights `[rows, block]`, of which the first `tokens` per row count.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) block: usize,
    pub(crate) tokens: usize,
}

/// `sum[r, d] += Σ_t weights[r, t] · values[t, d]`; `sum` is `[rows, head_dim]`.
pub(crate) fn weighted_sum<V: Element>(
    weights: Weights<'_>,
    values: &[V],
    head_dim: usize,
    sum: &mut [f32],
) {
    let rows = sum.len() / head_dim;
    let values = &values[..weights.tokens * head_dim];
    let mut row = 0;
    while row < rows {
        let some = (rows - row).min(4);
        let weights = Weights { data: &weights.data[row * weights.block..], ..weights };
        let sum = &mut sum[row * head_dim..][..some * head_dim];
        let mut d = 0;
        while d + LANES <= head_dim {
            for_rows!(some, R => weighted_chunk::<V, R>(weights, values, d, sum));
            d += LANES;
        }
        for d in d..head_dim {
            for r in 0..some {
                let column = values.iter().skip(d).step_by(head_dim);
                let weights = &weights.data[r * weights.block..][..weights.tokens];
                let dot: f32 = weights.iter().zip(column).map(|(p, v)| p * v.widen()).sum();
                sum[r * head_dim + d] += dot;
            }
        }
        row += some;
    }
}

fn weighted_chunk<V: Element, const R: usize>(
    weights: Weights<'_>,
    values: &[V],
    d: usize,
    sum: &mut [f32],
) {
    let head_dim = sum.len() / R;
    let rows: [&[f32]; R] =
        std::array::from_fn(|r| &weights.data[r * weights.block..][..weights.tokens]);
    let mut acc = [[0.0f32; LANES]; R];
    for (t, stored) in values.chunks_exact(head_dim).enumerate() {
        let stored: &[V; LANES] = stored[d..].first_chunk().expect("caller checks the bound");
        let v = stored.map(V::widen);
        for r in 0..R {
            let p = rows[r][t];
            for lane in 0..LANES {
                acc[r][lane] += p * v[lane];
            }
        }
    }
    for r in 0..R {
        for (sum, acc) in sum[r * head_dim + d..].iter_mut().zip(acc[r]) {
            *sum += acc;
        }
    }
}

/// The largest element; negative infinity for none.
pub(crate) fn max(xs: &[f32]) -> f32 {
    let chunks = xs.chunks_exact(LANES);
    let rest = chunks.remainder();
    let mut acc = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            acc[lane] = if chunk[lane] > acc[lane] { chunk[lane] } else { acc[lane] };
        }
    }
    acc.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b))
}

/// `x ← exp(x − max)` for every element; returns their sum.
pub(crate) fn exp_in_place(xs: &mut [f32], max: f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let mut chunks = xs.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - max);
            acc[lane] += chunk[lane];
        }
    }
    let mut sum: f32 = acc.iter().sum();
    for x in chunks.into_remainder() {
        *x = exp(*x - max);
        sum += *x;
    }
    sum
}

/// `e^x` for `x ≤ 0`, to 2 units in the last place; 0 where the result would be subnormal.
///
/// `2^n · e^r` with `n = round(x·log2 e)`, `r` reduced in two parts (Cody & Waite), `e^r` as a
/// polynomial of degree 6. No branches, so loops over it vectorise.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let n = (clamped * LOG2_E + ROUND) - ROUND;
    let r = (clamped - n * LN2_HI) - n * LN2_LO;
    let p = 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = (p * r) * r + r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x > -87.0 { p * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere_it_matters() {
        let mut x = 0.0f32;
        while x > -86.9 {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= want * 2.5e-7, "exp({x}) = {got}, not {want}");
            x -= 0.001_3;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
    }
}
