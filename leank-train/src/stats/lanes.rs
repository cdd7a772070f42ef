//! The element-wise passes over logits, with the vector instructions at hand.
//!
//! Logits lie key-major, `[keys, rows]`: a row is one query of one query head, and a vector holds the
//! same key's logits for several of them. Sums over keys are then sums of vectors, in the same order
//! whatever the width of a vector.

use pulp::{Arch, Simd, WithSimd};

/// The number of rows is padded to a multiple of it: to whole vectors, whatever their width.
pub(super) const LANES: usize = 16;

/// Keys whose vectors are summed before the sums go back to memory.
const UNROLL: usize = 8;
/// `exp` below this is taken for 0: far below anything a sum of f32 weights notices.
const LEAST: f32 = -80.0;

/// Raises `max[row]` to the largest of the row's logits; NaN is passed over.
pub(super) fn raise_to_max(logits: &[f32], max: &mut [f32]) {
    struct Pass<'a>(&'a [f32], &'a mut [f32]);
    impl WithSimd for Pass<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (logits, max) = (S::as_simd_f32s(self.0).0, S::as_mut_simd_f32s(self.1).0);
            let width = max.len();
            for keys in logits.chunks(UNROLL * width) {
                for (r, max) in max.iter_mut().enumerate() {
                    for key in keys.chunks_exact(width) {
                        let is_larger = simd.greater_than_f32s(key[r], *max);
                        *max = simd.select_f32s(is_larger, key[r], *max);
                    }
                }
            }
        }
    }
    Arch::new().dispatch(Pass(logits, max));
}

/// Running sums of the softmax of every row.
#[derive(Debug, Default)]
pub(super) struct Sums {
    /// Largest logit, `[rows]`.
    pub(super) max: Vec<f32>,
    /// Sum of `exp(logit - max)`, `[rows]`.
    pub(super) weight: Vec<f32>,
    /// Sum of `exp(logit - max) * gv`, `[draws, rows]`; after [`Sums::finish`] its mean.
    pub(super) value: Vec<f32>,
}

impl Sums {
    pub(super) fn reset(&mut self, rows: usize, draws: usize) {
        assert_eq!(rows % LANES, 0, "rows are padded to whole vectors");
        // Finite, so that a row that sees nothing gets weights of 0 instead of NaN.
        self.max.clear();
        self.max.resize(rows, -1e30);
        self.weight.clear();
        self.weight.resize(rows, 0.0);
        self.value.clear();
        self.value.resize(draws * rows, 0.0);
    }

    /// Adds keys: `logits [keys, rows]`, `gv [keys, draws, rows]`.
    pub(super) fn add(&mut self, logits: &[f32], gv: &[f32]) {
        Arch::new().dispatch(AddPass { logits, gv, weights: None, sums: self });
    }

    /// As [`Sums::add`], and turns the logits into `exp(logit - max)`.
    pub(super) fn add_in_place(&mut self, logits: &mut [f32], gv: &[f32]) {
        Arch::new().dispatch(AddPass { logits: &[], gv, weights: Some(logits), sums: self });
    }

    /// Turns the sums of values into means, and the sums of weights into their inverses (0 where
    /// nothing was seen).
    pub(super) fn finish(&mut self) {
        for weight in &mut self.weight {
            *weight = if *weight == 0.0 { 0.0 } else { 1.0 / *weight };
        }
        for value in self.value.chunks_exact_mut(self.weight.len()) {
            value.iter_mut().zip(&self.weight).for_each(|(value, inverse)| *value *= inverse);
        }
    }
}

struct AddPass<'a> {
    /// Unless `weights` holds them.
    logits: &'a [f32],
    gv: &'a [f32],
    weights: Option<&'a mut [f32]>,
    sums: &'a mut Sums,
}

impl WithSimd for AddPass<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sums { max, weight, value } = self.sums;
        let mut sums = SumVectors::<S> {
            max: S::as_simd_f32s(max).0,
            weight: S::as_mut_simd_f32s(weight).0,
            value: S::as_mut_simd_f32s(value).0,
        };
        let width = sums.max.len();
        let at_once = UNROLL * width;
        let gv = S::as_simd_f32s(self.gv).0.chunks(UNROLL * sums.value.len());
        match self.weights {
            None => {
                let logits = S::as_simd_f32s(self.logits).0;
                for (logits, gv) in logits.chunks(at_once).zip(gv) {
                    for r in 0..width {
                        sums.add(simd, r, logits, gv);
                    }
                }
            }
            Some(weights) => {
                let weights = S::as_mut_simd_f32s(weights).0;
                for (logits, gv) in weights.chunks_mut(at_once).zip(gv) {
                    for r in 0..width {
                        let exps = sums.add(simd, r, logits, gv);
                        for (key, exp) in logits.chunks_exact_mut(width).zip(exps) {
                            key[r] = exp;
                        }
                    }
                }
            }
        }
    }
}

/// [`Sums`] as vectors.
struct SumVectors<'a, S: Simd> {
    max: &'a [S::f32s],
    weight: &'a mut [S::f32s],
    value: &'a mut [S::f32s],
}

impl<S: Simd> SumVectors<'_, S> {
    /// Adds up to [`UNROLL`] keys to vector `r`; their exponentials.
    #[inline(always)]
    fn add(&mut self, simd: S, r: usize, logits: &[S::f32s], gv: &[S::f32s]) -> [S::f32s; UNROLL] {
        let (width, zero) = (self.max.len(), simd.splat_f32s(0.0));
        let max = self.max[r];
        let mut exps = [zero; UNROLL];
        // Sums of few keys first: rounding errors of long contexts stay smaller.
        let mut sum = zero;
        for (key, own) in logits.chunks_exact(width).zip(&mut exps) {
            *own = exp(simd, simd.sub_f32s(key[r], max));
            sum = simd.add_f32s(sum, *own);
        }
        self.weight[r] = simd.add_f32s(self.weight[r], sum);
        for at in (r..self.value.len()).step_by(width) {
            let mut sum = zero;
            for (gv, &exp) in gv.chunks_exact(self.value.len()).zip(&exps) {
                sum = simd.mul_add_e_f32s(exp, gv[at], sum);
            }
            self.value[at] = simd.add_f32s(self.value[at], sum);
        }
        exps
    }
}

/// `exp(x)` for `x <= 0`, within 2 units in the last place; 0 below [`LEAST`]; NaN stays NaN, so
/// that overflow is not taken for an answer.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let all = |value: f32| simd.splat_f32s(value);
    let fma = |a, b, c| simd.mul_add_e_f32s(a, b, c);
    let too_small = simd.less_than_f32s(x, all(LEAST));
    let clamped = simd.select_f32s(too_small, all(LEAST), x);
    let rounded = fma(clamped, all(std::f32::consts::LOG2_E), all(ROUND));
    let n = simd.sub_f32s(rounded, all(ROUND));
    let r = fma(n, all(-LN2_HIGH), clamped);
    let r = fma(n, all(-LN2_LOW), r);
    // Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2] (Cephes).
    let mut p = all(1.987_569_1e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = fma(p, r, all(c));
    }
    let p = fma(p, simd.mul_f32s(r, r), simd.add_f32s(r, all(1.0)));
    let bits = |x| simd.transmute_u32s_f32s(x);
    // The bits of ROUND are shifted out.
    let exponent = simd.wrapping_dyn_shl_u32s(bits(rounded), simd.splat_u32s(23));
    let y = simd.transmute_f32s_u32s(simd.add_u32s(bits(p), exponent));
    simd.select_f32s(too_small, all(0.0), y)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without vector instructions, which no machine of ours lacks.
    #[test]
    fn scalar_exp_is_accurate() {
        let scalar = |x| exp(pulp::Scalar::new(), x);
        for i in 0..80_000 {
            let x = i as f32 * -1e-3;
            let exact = f64::from(x).exp();
            assert!((f64::from(scalar(x)) - exact).abs() < 2.5e-7 * exact, "{x}");
        }
        assert_eq!(scalar(f32::NEG_INFINITY), 0.0);
        assert!(scalar(f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_accurate_and_ends_at_zero() {
        let mut worst = 0.0f64;
        let xs: Vec<f32> = (0..160_000).map(|i| i as f32 * -5e-4).collect();
        for xs in xs.chunks_exact(LANES) {
            let mut sums = Sums::default();
            sums.reset(LANES, 1);
            sums.max.fill(0.0);
            let mut found = xs.to_vec();
            sums.add_in_place(&mut found, &[0.0; LANES]);
            for (&x, &found) in xs.iter().zip(&found) {
                let exact = f64::from(x).exp();
                worst = worst.max(((f64::from(found) - exact) / exact).abs());
            }
        }
        assert!(worst < 2.5e-7, "{worst:e}");
        let mut sums = Sums::default();
        sums.reset(LANES, 1);
        let mut seen_nothing = [f32::NEG_INFINITY; LANES];
        sums.add_in_place(&mut seen_nothing, &[1.0; LANES]);
        assert_eq!((seen_nothing, sums.weight[0]), ([0.0; LANES], 0.0));
    }
}
