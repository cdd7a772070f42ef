//! The online softmax of one block (Milakov & Gimelshein 2018), in powers of two: with
//! `scale · log₂ e` folded into the logits, `e^x` is `2^x` and costs one multiplication less.

use super::simd::Simd;

/// The softmax of one row so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// Largest logit, in powers of two; negative infinity before the first.
    pub(crate) max: f32,
    /// Sum of the weights, relative to `max`.
    pub(crate) weight: f32,
}

impl RowState {
    /// Before any token.
    pub(crate) const EMPTY: Self = Self { max: f32::NEG_INFINITY, weight: 0.0 };
}

/// Turns the first `seen` products `q·k` of a row into weights `2^(scale · q·k − max)`, the rest of
/// the row into zeros, and takes them into `state`. Returns by what earlier sums have to be
/// multiplied.
///
/// # Panics
/// When `row` is no multiple of the vector's lanes, or shorter than `seen`.
#[inline(always)]
pub(crate) fn softmax<S: Simd>(
    simd: S,
    row: &mut [f32],
    seen: usize,
    scale: f32,
    state: &mut RowState,
) -> f32 {
    assert!(row.len().is_multiple_of(S::LANES), "a row of whole vectors");
    row[seen..].fill(f32::NEG_INFINITY);
    let vectors = row.len() / S::LANES;
    // SAFETY (of every load and store here): `v` stays below the row's number of vectors.
    let at = row.as_mut_ptr();

    let mut largest = simd.splat(f32::NEG_INFINITY);
    for v in 0..vectors {
        // SAFETY: see above.
        largest = simd.max(largest, unsafe { simd.load(at.add(v * S::LANES)) });
    }
    let before = state.max;
    let max = before.max(simd.largest(largest) * scale);
    // Nothing but negative infinity so far: any finite maximum makes all weights zero.
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };

    let (scale, base) = (simd.splat(scale), simd.splat(-base));
    let mut sum = simd.splat(0.0);
    for v in 0..vectors {
        // SAFETY: see above.
        let x = unsafe { simd.load(at.add(v * S::LANES)) };
        let weight = exp2(simd, simd.mul_add(x, scale, base));
        sum = simd.add(sum, weight);
        // SAFETY: see above.
        unsafe { simd.store(at.add(v * S::LANES), weight) };
    }
    let correction = if max == before { 1.0 } else { (before - max).exp2() };
    *state = RowState { max, weight: state.weight * correction + simd.sum(sum) };
    correction
}

/// `2^x` for `x ≤ 0`, to about one unit in the last place; 0 somewhere below `2^−126`, NaN of NaN.
///
/// `2^n · 2^r` with `n = round(x)` and a polynomial of degree 5, which minimises the relative error
/// on ±½ (9e-8) among those that are exact at 0.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let x = simd.max(simd.splat(S::ZERO_EXPONENT), x);
    let n = simd.round(x);
    let r = simd.sub(x, n);
    let mut p = simd.splat(1.326_472_7e-3);
    for c in [9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0] {
        p = simd.mul_add(p, r, simd.splat(c));
    }
    simd.times_power_of_two(p, n)
}
