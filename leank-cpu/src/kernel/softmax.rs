//! The online softmax (Milakov & Gimelshein 2018), in powers of two: with `scale · log₂ e` folded
//! into the logits, `e^x` is `2^x` and costs one multiplication less.
//!
//! Weights are relative to a base that need not be the largest logit so far, only within [`SLACK`]
//! of it: so the largest of a row is looked for across lanes, and earlier sums are rescaled, in few
//! blocks (as FlashAttention 4 does). Bases are whole numbers, so that rescaling is exact.

use super::{
    Loops,
    left::Factor,
    product::Finish,
    simd::{MAX_LANES, Simd},
};
use crate::running::Line;

/// How far a logit may exceed the base, in powers of two.
const SLACK: f32 = 8.0;

/// The base before the first token: no logit is below it.
pub(crate) const LOWEST: f32 = f32::MIN;

/// The factor for weights that were relative to one base and are to be relative to another.
pub(crate) fn rebase(from: f32, to: f32) -> f32 {
    if from == to {
        1.0
    } else if from == LOWEST {
        0.0 // as the general way says, slowly
    } else {
        (from - to).exp2()
    }
}

/// Takes logits of one block into the softmax of their rows.
pub(crate) struct Softmax<'a, W> {
    /// Factor on logits, in powers of two.
    pub(crate) scale: f32,
    /// What weights are relative to, in powers of two, per row.
    pub(crate) bases: &'a mut [f32],
    /// Sums of the weights, per row and lane.
    pub(crate) totals: &'a mut [Line],
    /// Sums of V that have to follow the base, `[rows, head_dim]`.
    pub(crate) sums: &'a mut [f32],
    pub(crate) head_dim: usize,
    /// Where weights `2^(scale · logit − base)` go, `[rows, stride]`.
    pub(crate) weights: &'a mut [W],
    pub(crate) stride: usize,
}

/// Logits that lie in memory, `[rows, stride]`; rows are whole vectors of any instruction set.
pub(crate) struct Take<'a, W> {
    pub(crate) logits: &'a [f32],
    pub(crate) softmax: Softmax<'a, W>,
}

impl<W: Factor> Loops for Take<'_, W> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { logits, mut softmax } = self;
        assert!(softmax.stride.is_multiple_of(MAX_LANES), "rows of whole vectors");
        for (row, logits) in logits.chunks_exact(softmax.stride).enumerate() {
            for (v, logits) in logits.chunks_exact(S::LANES).enumerate() {
                // SAFETY: the chunk has `LANES` elements.
                let logits = unsafe { simd.load(logits.as_ptr()) };
                softmax.vectors(simd, row, v * S::LANES, [[logits]]);
            }
        }
    }
}

impl<W: Factor> Softmax<'_, W> {
    /// Raises the base of a row whose largest logit, here per lane and also relative to the base,
    /// exceeds it too far. Weights of the block are written up to `lane`.
    #[cold]
    fn rebase(&mut self, row: usize, lane: usize, [largest, relative]: [&[f32]; 2]) {
        if !relative.iter().any(|&x| x > SLACK) {
            return;
        }
        let largest = largest.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let base = (largest * self.scale).ceil();
        let factor = rebase(self.bases[row], base);
        self.bases[row] = base;
        self.totals[row].0.iter_mut().for_each(|x| *x *= factor);
        let sums = &mut self.sums[row * self.head_dim..][..self.head_dim];
        sums.iter_mut().for_each(|x| *x *= factor);
        for weight in &mut self.weights[row * self.stride..][..lane] {
            *weight = W::narrow(weight.widen() * factor);
        }
    }
}

impl<S: Simd, W: Factor> Finish<S> for Softmax<'_, W> {
    #[inline(always)]
    fn begin<const R: usize, const V: usize>(&mut self, simd: S, row: usize, _: usize) {
        super::prefetch(simd, bytemuck::cast_slice(&self.totals[row..row + R]));
    }

    #[inline(always)]
    fn vectors<const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        lane: usize,
        logits: [[S::F32; V]; R],
    ) {
        let scale = simd.splat(self.scale);
        // Maxima drop NaN: that of one row must not hide what another one needs.
        let most = |a: S::F32, b: S::F32| simd.max(b, a);
        let lowest = simd.splat(f32::NEG_INFINITY);
        let mut largest = lowest;
        for (base, logits) in self.bases[row..row + R].iter().zip(logits) {
            let base = simd.splat(-base);
            for x in logits {
                largest = most(largest, simd.mul_add(x, scale, base));
            }
        }
        if simd.any_greater(largest, simd.splat(SLACK)) {
            // Each row by itself: what a row becomes must not depend on its neighbours.
            for (r, logits) in logits.into_iter().enumerate() {
                let largest = logits.into_iter().fold(lowest, most);
                let relative = simd.mul_add(largest, scale, simd.splat(-self.bases[row + r]));
                let mut lanes = [[0.0; MAX_LANES]; 2];
                for (to, x) in lanes.iter_mut().zip([largest, relative]) {
                    // SAFETY: the slice has `LANES` elements.
                    unsafe { simd.store(to[..S::LANES].as_mut_ptr(), x) };
                }
                self.rebase(row + r, lane, lanes.each_ref().map(|x| &x[..S::LANES]));
            }
        }

        let weights = &mut self.weights[row * self.stride + lane..];
        let weights = &mut weights[..(R - 1) * self.stride + V * S::LANES];
        let rows = (&self.bases[row..row + R], &mut self.totals[row..row + R]);
        // Written out: the compiler keeps the loop and so puts the logits into memory.
        macro_rules! each_row {
            ($($r:literal)*) => {
                $(if $r < R {
                    let to = &mut weights[$r * self.stride..][..V * S::LANES];
                    let base = simd.splat(-rows.0[$r]);
                    soften(simd, logits[$r], (scale, base), &mut rows.1[$r], to);
                })*
            };
        }
        each_row!(0 1 2 3 4 5 6 7);
    }

    fn single(&mut self, _: usize, _: usize, _: f32) {
        unreachable!("callers see to it that rows are whole vectors")
    }
}

/// Turns logits of one row into weights: adds them to the row's total, per lane, and writes them.
#[inline(always)]
fn soften<S: Simd, W: Factor, const V: usize>(
    simd: S,
    logits: [S::F32; V],
    (scale, base): (S::F32, S::F32),
    total: &mut Line,
    to: &mut [W],
) {
    assert!(to.len() == V * S::LANES, "a weight per logit");
    let total = &mut total.0[..S::LANES];
    // SAFETY: the slice has `LANES` elements.
    let mut sum = unsafe { simd.load(total.as_ptr()) };
    for (v, x) in logits.into_iter().enumerate() {
        let weight = exp2::<S, W>(simd, simd.mul_add(x, scale, base));
        sum = simd.add(sum, weight);
        // SAFETY: `to` holds `V` vectors.
        unsafe { W::store(simd, to.as_mut_ptr().wrapping_add(v * S::LANES), weight) };
    }
    // SAFETY: as above.
    unsafe { simd.store(total.as_mut_ptr(), sum) };
}

/// `2^x` for `x ≤ SLACK`, as exact as a weight of type `W` needs; 0 somewhere below `2^−126`, NaN
/// of NaN.
///
/// `2^n · 2^r` with `n = round(x)`.
#[inline(always)]
fn exp2<S: Simd, W: Factor>(simd: S, x: S::F32) -> S::F32 {
    let x = simd.max(simd.splat(S::ZERO_EXPONENT), x);
    let n = simd.round(x);
    let r = simd.sub(x, n);
    let mut p = simd.splat(W::EXP2[0]);
    for c in &W::EXP2[1..] {
        p = simd.mul_add(p, r, simd.splat(*c));
    }
    simd.times_power_of_two(p, n)
}
