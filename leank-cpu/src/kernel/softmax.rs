//! The online softmax of one block (Milakov & Gimelshein 2018), in powers of two: with
//! `scale · log₂ e` folded into the logits, `e^x` is `2^x` and costs one multiplication less.
//!
//! Weights are relative to a base that need not be the largest logit so far, only within
//! [`SLACK`] of it: so the largest of a block is looked for across lanes, and earlier sums are
//! rescaled, in few blocks (as FlashAttention 4 does).

use half::bf16;

use super::simd::Simd;

/// How far a logit may exceed the base, in powers of two.
const SLACK: f32 = 8.0;

/// `2^r` on ±½, highest power first: the polynomial of degree 5 with the least relative error, 9e-8,
/// among those that are exact at 0.
#[expect(
    clippy::approx_constant,
    reason = "what minimises the error is near ln 2, not equal to it"
)]
const POLYNOMIAL: [f32; 6] =
    [1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];

/// Largest number of lanes of any instruction set.
pub(crate) const MAX_LANES: usize = 16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The softmax of one row so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// What weights are relative to, in powers of two; negative infinity before the first token.
    pub(crate) base: f32,
    /// Sums of the weights, per lane.
    weights: [f32; MAX_LANES],
}

impl RowState {
    /// Before any token.
    pub(crate) const EMPTY: Self = Self { base: f32::NEG_INFINITY, weights: [0.0; MAX_LANES] };

    /// Sum of the weights.
    pub(crate) fn weight(&self) -> f32 {
        self.weights.iter().sum()
    }

    /// Makes weights relative to `base`; returns the factor for earlier sums.
    pub(crate) fn rebase(&mut self, base: f32) -> f32 {
        let factor = if base == self.base { 1.0 } else { (self.base - base).exp2() };
        self.base = base;
        self.weights.iter_mut().for_each(|x| *x *= factor);
        factor
    }

    /// Adds the weights of another part, which are relative to the same base.
    pub(crate) fn add(&mut self, other: &Self) {
        for (own, more) in self.weights.iter_mut().zip(other.weights) {
            *own += more;
        }
    }
}

/// The rows of one block.
pub(crate) struct Softmax<'a> {
    /// Products `q·k`, then weights `2^(scale · q·k − base)`, `[rows, stride]`. What lies beyond
    /// the tokens that a row sees becomes 0.
    pub(crate) logits: &'a mut [f32],
    /// Elements of a row, a multiple of [`MAX_LANES`].
    pub(crate) stride: usize,
    /// Tokens that the first row sees; every `group` rows see one more, at most `most`.
    pub(crate) seen: isize,
    pub(crate) group: usize,
    pub(crate) most: usize,
    /// Factor on logits, in powers of two.
    pub(crate) scale: f32,
    pub(crate) states: &'a mut [RowState],
    /// Sums of V that have to follow the base, `[rows, head_dim]`.
    pub(crate) sums: &'a mut [f32],
    pub(crate) head_dim: usize,
    /// What is read next: asked for meanwhile, row by row.
    pub(crate) next: &'a [u8],
}

/// Where weights go besides the logits' place.
pub(crate) trait Narrow<S: Simd> {
    /// Takes `S::LANES` weights, the `index`-th of all rows on.
    fn put(&mut self, simd: S, index: usize, weights: S::F32);
}

/// Nowhere.
pub(crate) struct Wide;

impl<S: Simd> Narrow<S> for Wide {
    #[inline(always)]
    fn put(&mut self, _: S, _: usize, _: S::F32) {}
}

/// To bf16 elements.
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "AVX-512 BF16 only"))]
pub(crate) type Bf16s<'a> = &'a mut [bf16];

/// Takes one block into the softmax of every row.
///
/// # Panics
/// When the slices do not fit together.
#[inline(always)]
pub(crate) fn softmax<S: Simd, N: Narrow<S>>(simd: S, args: Softmax<'_>, mut narrow: N) {
    let Softmax { logits, stride, seen, group, most, scale, states, sums, head_dim, next } = args;
    assert!(stride.is_multiple_of(MAX_LANES) && most <= stride, "rows of whole vectors");
    let lines = (next.len() / LINE).div_ceil(states.len());
    let mut ahead = next.chunks(LINE);
    let rows = logits.chunks_exact_mut(stride).zip(states).zip(sums.chunks_exact_mut(head_dim));
    for (r, ((row, state), sum)) in rows.enumerate() {
        for line in ahead.by_ref().take(lines) {
            simd.prefetch(line.as_ptr());
        }
        let seen = (seen + (r / group) as isize).clamp(0, most as isize) as usize;
        row[seen..].fill(f32::NEG_INFINITY);
        let vectors = stride / S::LANES;
        let at = row.as_mut_ptr();
        // SAFETY: `v` is below the number of vectors in the row.
        let load = |v: usize| unsafe { simd.load(at.wrapping_add(v * S::LANES)) };

        let mut largest = simd.splat(f32::NEG_INFINITY);
        for v in 0..vectors {
            largest = simd.max(largest, load(v));
        }
        if simd.any_greater(largest, simd.splat((state.base + SLACK) / scale)) {
            let factor = state.rebase(state.base.max(simd.largest(largest) * scale));
            sum.iter_mut().for_each(|x| *x *= factor);
        }
        // Nothing but negative infinity so far: any finite base makes all weights zero.
        let base = if state.base == f32::NEG_INFINITY { 0.0 } else { state.base };

        let (scale, base) = (simd.splat(scale), simd.splat(-base));
        // SAFETY: every row state holds `MAX_LANES` weights.
        let mut weight = unsafe { simd.load(state.weights.as_ptr()) };
        for v in 0..vectors {
            let x = exp2(simd, simd.mul_add(load(v), scale, base));
            weight = simd.add(weight, x);
            // SAFETY: `v` is below the number of vectors in the row.
            unsafe { simd.store(at.wrapping_add(v * S::LANES), x) };
            narrow.put(simd, r * stride + v * S::LANES, x);
        }
        // SAFETY: every row state holds `MAX_LANES` weights.
        unsafe { simd.store(state.weights.as_mut_ptr(), weight) };
    }
}

/// `2^x` for `x ≤ SLACK`, to about one unit in the last place; 0 somewhere below `2^−126`, NaN of
/// NaN.
///
/// `2^n · 2^r` with `n = round(x)`.
#[inline(always)]
fn exp2<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let x = simd.max(simd.splat(S::ZERO_EXPONENT), x);
    let n = simd.round(x);
    let r = simd.sub(x, n);
    let mut p = simd.splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = simd.mul_add(p, r, simd.splat(*c));
    }
    simd.times_power_of_two(p, n)
}
