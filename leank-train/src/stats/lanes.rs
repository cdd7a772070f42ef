//! The element-wise passes over logits, compiled for the vector instructions at hand.
//!
//! Logits lie key-major, `[keys, rows]`: a row is one query of one query head, and a [`Lane`]
//! holds the same key's logits for 16 of them. Sums over keys are then element-wise sums of lanes,
//! which compilers vectorise without reordering any addition.

use pulp::{Arch, Simd, WithSimd};

/// Rows that are worked on at once; the number of rows is padded to a multiple of it.
pub(super) const LANES: usize = 16;
/// One key's values for 16 rows.
pub(super) type Lane = [f32; LANES];

/// Keys whose lanes are summed before the sums go back to memory.
const UNROLL: usize = 8;
/// `exp` below this is taken for 0: far below anything a sum of f32 weights notices.
const LEAST: f32 = -80.0;

/// `values` as lanes.
///
/// # Panics
/// When their number is not a multiple of [`LANES`].
pub(super) fn lanes(values: &[f32]) -> &[Lane] {
    let (lanes, rest) = values.as_chunks();
    assert!(rest.is_empty(), "rows are padded to whole lanes");
    lanes
}

/// As [`lanes`].
pub(super) fn lanes_mut(values: &mut [f32]) -> &mut [Lane] {
    let (lanes, rest) = values.as_chunks_mut();
    assert!(rest.is_empty(), "rows are padded to whole lanes");
    lanes
}

/// Raises `max[row]` to the largest of the row's logits.
pub(super) fn raise_to_max(logits: &[f32], max: &mut [f32]) {
    struct Pass<'a>(&'a [Lane], &'a mut [Lane]);
    impl WithSimd for Pass<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Self(logits, max) = self;
            let width = max.len();
            for keys in logits.chunks(UNROLL * width) {
                for (r, max) in max.iter_mut().enumerate() {
                    let mut own = *max;
                    for lane in keys.chunks_exact(width).map(|key| &key[r]) {
                        for (own, &logit) in own.iter_mut().zip(lane) {
                            *own = if logit > *own { logit } else { *own };
                        }
                    }
                    *max = own;
                }
            }
        }
    }
    Arch::new().dispatch(Pass(lanes(logits), lanes_mut(max)));
}

/// Most channels that [`add_channels`] takes at once.
pub(super) const FEW: usize = 8;

/// Adds to `logits [keys, rows]` the products of few channels: `k [keys, channels]` and
/// `q [channels, rows]`. A matrix product of so little depth spends its time on packing.
///
/// # Panics
/// When there are more channels than [`FEW`].
pub(super) fn add_channels(logits: &mut [f32], k: &[f32], q: &[f32], rows: usize) {
    const HALF: usize = LANES / 2;
    struct Pass<'a> {
        logits: &'a mut [f32],
        k: &'a [[f32; FEW]],
        q: &'a [f32],
        rows: usize,
    }
    impl WithSimd for Pass<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Self { logits, k, q, rows } = self;
            let width = rows / HALF;
            let (logits, _) = logits.as_chunks_mut::<HALF>();
            let (q, _) = q.as_chunks::<HALF>();
            for (logits, k) in logits.chunks_mut(2 * UNROLL * width).zip(k.chunks(2 * UNROLL)) {
                for r in 0..width {
                    let mut own = [[0.0; HALF]; FEW];
                    for (own, q) in own.iter_mut().zip(q.iter().skip(r).step_by(width)) {
                        *own = *q;
                    }
                    for (key, k) in logits.chunks_exact_mut(width).zip(k) {
                        let mut sum = key[r];
                        for c in 0..FEW {
                            for i in 0..HALF {
                                sum[i] = fma::<S>(own[c][i], k[c], sum[i]);
                            }
                        }
                        key[r] = sum;
                    }
                }
            }
        }
    }
    let channels = q.len() / rows;
    assert!((1..=FEW).contains(&channels), "{channels} channels at once");
    let mut padded = Vec::new();
    let k = if channels == FEW {
        k.as_chunks().0
    } else {
        padded.extend(k.chunks_exact(channels).map(|k| {
            let mut own = [0.0; FEW];
            own[..channels].copy_from_slice(k);
            own
        }));
        &padded
    };
    Arch::new().dispatch(Pass { logits, k, q, rows });
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
        let weights = None;
        let pass = AddPass { logits: lanes(logits), gv: lanes(gv), weights, sums: self };
        Arch::new().dispatch(pass);
    }

    /// As [`Sums::add`], and turns the logits into `exp(logit - max)`.
    pub(super) fn add_in_place(&mut self, logits: &mut [f32], gv: &[f32]) {
        let weights = Some(lanes_mut(logits));
        Arch::new().dispatch(AddPass { logits: &[], gv: lanes(gv), weights, sums: self });
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
    logits: &'a [Lane],
    gv: &'a [Lane],
    weights: Option<&'a mut [Lane]>,
    sums: &'a mut Sums,
}

impl WithSimd for AddPass<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Sums { max, weight, value } = self.sums;
        let mut sums =
            SumLanes { max: lanes(max), weight: lanes_mut(weight), value: lanes_mut(value) };
        let width = sums.max.len();
        let at_once = UNROLL * width;
        let gv = self.gv.chunks(UNROLL * sums.value.len());
        match self.weights {
            None => {
                for (logits, gv) in self.logits.chunks(at_once).zip(gv) {
                    for r in 0..width {
                        let load = |key: usize| logits[key * width + r];
                        sums.add::<S>(r, logits.len() / width, gv, load);
                    }
                }
            }
            Some(weights) => {
                for (logits, gv) in weights.chunks_mut(at_once).zip(gv) {
                    for r in 0..width {
                        let keys = logits.len() / width;
                        let load = |key: usize| logits[key * width + r];
                        let exps = sums.add::<S>(r, keys, gv, load);
                        for (key, exp) in exps[..keys].iter().enumerate() {
                            logits[key * width + r] = *exp;
                        }
                    }
                }
            }
        }
    }
}

struct SumLanes<'a> {
    max: &'a [Lane],
    weight: &'a mut [Lane],
    value: &'a mut [Lane],
}

impl SumLanes<'_> {
    /// Adds up to [`UNROLL`] keys to lane `r`; their exponentials.
    #[inline(always)]
    fn add<S: Simd>(
        &mut self,
        r: usize,
        keys: usize,
        gv: &[Lane],
        load: impl Fn(usize) -> Lane,
    ) -> [Lane; UNROLL] {
        let width = self.max.len();
        let max = self.max[r];
        let mut exps = [[0.0; LANES]; UNROLL];
        // Sums of few keys first: rounding errors of long contexts stay smaller.
        let mut sum = [0.0; LANES];
        for (key, exp_lane) in exps[..keys].iter_mut().enumerate() {
            let lane = load(key);
            for i in 0..LANES {
                exp_lane[i] = exp::<S>(lane[i] - max[i]);
            }
            for i in 0..LANES {
                sum[i] += exp_lane[i];
            }
        }
        for (total, sum) in self.weight[r].iter_mut().zip(&sum) {
            *total += sum;
        }
        let stride = self.value.len();
        for (draw, value) in self.value.chunks_exact_mut(width).enumerate() {
            let mut sum = [0.0; LANES];
            for (key, exp_lane) in exps[..keys].iter().enumerate() {
                let gv = &gv[key * stride + draw * width + r];
                for i in 0..LANES {
                    sum[i] = fma::<S>(exp_lane[i], gv[i], sum[i]);
                }
            }
            for (total, sum) in value[r].iter_mut().zip(&sum) {
                *total += sum;
            }
        }
        exps
    }
}

/// Turns `gv [keys, draws, rows]` into `weight * (gv - mean)`, with `weight [keys, rows]` and
/// `mean [draws, rows]`.
pub(super) fn center(gv: &mut [f32], weight: &[f32], mean: &[f32], rows: usize) {
    struct Pass<'a>(&'a mut [Lane], &'a [Lane], &'a [Lane], usize);
    impl WithSimd for Pass<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            let Self(gv, weight, mean, width) = self;
            for (gv, weight) in gv.chunks_exact_mut(mean.len()).zip(weight.chunks_exact(width)) {
                for (gv, mean) in gv.chunks_exact_mut(width).zip(mean.chunks_exact(width)) {
                    for ((gv, mean), weight) in gv.iter_mut().zip(mean).zip(weight) {
                        for ((gv, mean), weight) in gv.iter_mut().zip(mean).zip(weight) {
                            *gv = (*gv - mean) * weight;
                        }
                    }
                }
            }
        }
    }
    Arch::new().dispatch(Pass(lanes_mut(gv), lanes(weight), lanes(mean), rows / LANES));
}

/// `a * b + c`, fused where that is one instruction (elsewhere `mul_add` is a function call).
#[inline(always)]
fn fma<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::IS_SCALAR { a * b + c } else { a.mul_add(b, c) }
}

/// `exp(x)` for `x <= 0`, within 2 units in the last place; 0 below [`LEAST`]; NaN stays NaN, so
/// that overflow is not taken for an answer.
#[inline(always)]
fn exp<S: Simd>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < LEAST { LEAST } else { x };
    let rounded = fma::<S>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = fma::<S>(n, -LN2_HIGH, clamped);
    let r = fma::<S>(n, -LN2_LOW, r);
    // Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2] (Cephes).
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = fma::<S>(p, r, c);
    }
    let p = fma::<S>(p, r * r, r + 1.0);
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()) << 23;
    let y = f32::from_bits(p.to_bits().wrapping_add(exponent));
    if x < LEAST { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without vector instructions, which no machine of ours lacks.
    #[test]
    fn scalar_exp_is_accurate() {
        let scalar = exp::<pulp::Scalar>;
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
