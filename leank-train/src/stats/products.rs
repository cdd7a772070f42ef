//! The matrix products of the statistics.
//!
//! Both of them have K on one side, `[keys, channels]`, and vectors of rows on the other. One number
//! of K is broadcast at a time, so K is read as it lies; a panel of the other side, a few vectors
//! wide, stays in the first cache meanwhile. Libraries of matrix products pack both sides first,
//! which costs much where a product is only 8 to 128 deep, and cannot centre the weights on the way.
//!
//! Rows are whole [`LANES`](super::lanes::LANES), which the width of every vector divides.

use pulp::{Arch, Simd, WithSimd};

/// Keys whose centred weights stay in the first cache.
const KEYS_AT_ONCE: usize = 64;

/// `out [keys, rows] = k [keys, channels] · q [channels, rows]`.
#[derive(Debug)]
pub(super) struct Product<'a> {
    pub(super) k: &'a [f32],
    pub(super) q: &'a [f32],
    pub(super) rows: usize,
    /// Adds to `out` instead.
    pub(super) adds: bool,
    pub(super) out: &'a mut [f32],
}

impl Product<'_> {
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }

    /// In tiles of `KEYS` keys and `N` vectors of rows.
    #[inline(always)]
    fn tiles<S: Simd, const KEYS: usize, const N: usize>(mut self, simd: S) {
        let width = self.rows / S::F32_LANES;
        let whole = width - width % N;
        for r in (0..whole).step_by(N) {
            self.panel::<S, KEYS, N>(simd, r);
        }
        for r in whole..width {
            self.panel::<S, KEYS, 1>(simd, r);
        }
    }

    /// All keys against the `N` vectors of rows from `r` on.
    #[inline(always)]
    fn panel<S: Simd, const KEYS: usize, const N: usize>(&mut self, simd: S, r: usize) {
        let (width, channels) = (self.rows / S::F32_LANES, self.q.len() / self.rows);
        let mut q = Vec::with_capacity(channels);
        for row in S::as_simd_f32s(self.q).0.chunks_exact(width) {
            q.push(vectors::<S, N>(row, r));
        }
        let out = S::as_mut_simd_f32s(self.out).0;
        let tiles = self.k.chunks(KEYS * channels).zip(out.chunks_mut(KEYS * width));
        for (k, out) in tiles {
            if k.len() == KEYS * channels {
                let out = Out { values: &mut out[r..], stride: width };
                product_tile::<S, KEYS, N>(simd, k, &q, out, self.adds);
                continue;
            }
            for (k, out) in k.chunks_exact(channels).zip(out.chunks_exact_mut(width)) {
                let out = Out { values: &mut out[r..], stride: width };
                product_tile::<S, 1, N>(simd, k, &q, out, self.adds);
            }
        }
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        assert!(!self.q.is_empty(), "a product of no channels");
        if S::REGISTER_COUNT >= 32 {
            self.tiles::<S, 8, 3>(simd);
        } else {
            self.tiles::<S, 6, 2>(simd);
        }
    }
}

/// Where a tile's sums go: a row of vectors every `stride`.
struct Out<'a, V> {
    values: &'a mut [V],
    stride: usize,
}

/// `N` vectors from `at` on.
#[inline(always)]
fn vectors<S: Simd, const N: usize>(values: &[S::f32s], at: usize) -> [S::f32s; N] {
    *values[at..].first_chunk().expect("panels lie within the rows")
}

#[inline(always)]
fn product_tile<S: Simd, const KEYS: usize, const N: usize>(
    simd: S,
    k: &[f32],
    q: &[[S::f32s; N]],
    out: Out<'_, S::f32s>,
    adds: bool,
) {
    let channels = q.len();
    let k: [&[f32]; KEYS] = std::array::from_fn(|key| &k[key * channels..][..channels]);
    let mut sums = [[simd.splat_f32s(0.0); N]; KEYS];
    if adds {
        for (key, sums) in sums.iter_mut().enumerate() {
            *sums = vectors::<S, N>(out.values, key * out.stride);
        }
    }
    for (c, q) in q.iter().enumerate() {
        for (k, sums) in k.iter().zip(&mut sums) {
            let k = simd.splat_f32s(k[c]);
            for (sum, &q) in sums.iter_mut().zip(q) {
                *sum = simd.mul_add_e_f32s(k, q, *sum);
            }
        }
    }
    for (key, sums) in sums.iter().enumerate() {
        out.values[key * out.stride..][..N].copy_from_slice(sums);
    }
}

/// `out [channels, draws, rows] += kᵀ · w` with `k [keys, channels]` and the centred weights
/// `w [keys, draws, rows] = weight · (gv − mean)`.
#[derive(Debug)]
pub(super) struct Contraction<'a> {
    pub(super) k: &'a [f32],
    /// `[keys, draws, rows]`
    pub(super) gv: &'a [f32],
    /// `[keys, rows]`
    pub(super) weight: &'a [f32],
    /// `[draws, rows]`
    pub(super) mean: &'a [f32],
    pub(super) rows: usize,
    pub(super) out: &'a mut [f32],
}

impl Contraction<'_> {
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }

    /// In tiles of `CHANNELS` channels and `N` vectors of rows.
    #[inline(always)]
    fn tiles<S: Simd, const CHANNELS: usize, const N: usize>(mut self, simd: S) {
        let width = self.rows / S::F32_LANES;
        let whole = width - width % N;
        let keys = self.weight.len() / self.rows;
        for first in (0..keys).step_by(KEYS_AT_ONCE) {
            let keys = first..keys.min(first + KEYS_AT_ONCE);
            for draw in 0..self.mean.len() / self.rows {
                for r in (0..whole).step_by(N) {
                    self.panel::<S, CHANNELS, N>(simd, keys.clone(), draw * width, r);
                }
                for r in whole..width {
                    self.panel::<S, CHANNELS, 1>(simd, keys.clone(), draw * width, r);
                }
            }
        }
    }

    /// All channels of some keys against `N` vectors of rows from `r` on of the draw that begins at
    /// `draw`.
    #[inline(always)]
    fn panel<S: Simd, const CHANNELS: usize, const N: usize>(
        &mut self,
        simd: S,
        keys: std::ops::Range<usize>,
        draw: usize,
        r: usize,
    ) {
        let (width, wide) = (self.rows / S::F32_LANES, self.mean.len() / S::F32_LANES);
        let channels = self.out.len() / self.mean.len();
        let (gv, weight) = (S::as_simd_f32s(self.gv).0, S::as_simd_f32s(self.weight).0);
        let mean = vectors::<S, N>(S::as_simd_f32s(self.mean).0, draw + r);
        let mut centred = [[simd.splat_f32s(0.0); N]; KEYS_AT_ONCE];
        for (key, centred) in keys.clone().zip(&mut centred) {
            let gv = vectors::<S, N>(gv, key * wide + draw + r);
            let weight = vectors::<S, N>(weight, key * width + r);
            for i in 0..N {
                centred[i] = simd.mul_f32s(simd.sub_f32s(gv[i], mean[i]), weight[i]);
            }
        }
        let centred = &centred[..keys.len()];
        let k = &self.k[keys.start * channels..keys.end * channels];
        let out = &mut S::as_mut_simd_f32s(self.out).0[draw + r..];
        let whole = channels - channels % CHANNELS;
        for c in (0..whole).step_by(CHANNELS) {
            let k = k.chunks_exact(channels).map(|k| &k[c..]);
            let out = Out { values: &mut out[c * wide..], stride: wide };
            contraction_tile::<S, CHANNELS, N>(simd, k, centred, out);
        }
        for c in whole..channels {
            let k = k.chunks_exact(channels).map(|k| &k[c..]);
            let out = Out { values: &mut out[c * wide..], stride: wide };
            contraction_tile::<S, 1, N>(simd, k, centred, out);
        }
    }
}

impl WithSimd for Contraction<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.tiles::<S, 8, 3>(simd);
        } else {
            self.tiles::<S, 4, 3>(simd);
        }
    }
}

#[inline(always)]
fn contraction_tile<'a, S: Simd, const CHANNELS: usize, const N: usize>(
    simd: S,
    k: impl Iterator<Item = &'a [f32]>,
    centred: &[[S::f32s; N]],
    out: Out<'_, S::f32s>,
) {
    let mut sums = [[simd.splat_f32s(0.0); N]; CHANNELS];
    for (k, centred) in k.zip(centred) {
        let k: &[f32; CHANNELS] = k.first_chunk().expect("tiles lie within the channels");
        for (&k, sums) in k.iter().zip(&mut sums) {
            let k = simd.splat_f32s(k);
            for (sum, &centred) in sums.iter_mut().zip(centred) {
                *sum = simd.mul_add_e_f32s(k, centred, *sum);
            }
        }
    }
    // Sums of few keys first: rounding errors of long contexts stay smaller.
    for (channel, sums) in sums.iter().enumerate() {
        for (out, &sum) in out.values[channel * out.stride..].iter_mut().zip(sums) {
            *out = simd.add_f32s(*out, sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small whole numbers: sums are exact, whatever their order.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 31 + seed * 7) % 11) as f32 - 5.0).collect()
    }

    /// Runs `check` with all vector instructions that this machine has, and with none.
    fn with_every_simd(check: impl Fn(&dyn Fn(Product<'_>), &dyn Fn(Contraction<'_>))) {
        fn run<S: Simd>(simd: S, check: &impl Fn(&dyn Fn(Product<'_>), &dyn Fn(Contraction<'_>))) {
            check(&|product| simd.vectorize(product), &|contraction| simd.vectorize(contraction));
        }
        run(pulp::Scalar::new(), &check);
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = pulp::x86::V3::try_new() {
                run(simd, &check)
            }
            if let Some(simd) = pulp::x86::V4::try_new() {
                run(simd, &check)
            }
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(simd) = pulp::aarch64::Neon::try_new() {
            run(simd, &check)
        }
    }

    #[test]
    fn products_agree_with_their_definition() {
        with_every_simd(|product, _| {
            for (keys, channels, rows) in [(1, 1, 16), (17, 5, 32), (41, 3, 48), (24, 8, 112)] {
                let (k, q) = (numbers(keys * channels, 1), numbers(channels * rows, 2));
                for adds in [false, true] {
                    let before = numbers(keys * rows, 3);
                    let mut found = before.clone();
                    product(Product { k: &k, q: &q, rows, adds, out: &mut found });
                    for (at, found) in found.iter().enumerate() {
                        let (key, row) = (at / rows, at % rows);
                        let terms =
                            (0..channels).map(|c| k[key * channels + c] * q[c * rows + row]);
                        let sum = terms.sum::<f32>() + if adds { before[at] } else { 0.0 };
                        assert_eq!(*found, sum, "key {key}, row {row} of {keys}×{channels}×{rows}");
                    }
                }
            }
        });
    }

    #[test]
    fn contractions_agree_with_their_definition() {
        with_every_simd(|_, contraction| {
            let shapes = [(0, 3, 1, 16), (1, 1, 2, 16), (150, 11, 2, 64), (64, 8, 3, 48)];
            for (keys, channels, draws, rows) in shapes {
                let wide = draws * rows;
                let (k, gv) = (numbers(keys * channels, 1), numbers(keys * wide, 2));
                let (weight, mean) = (numbers(keys * rows, 3), numbers(wide, 4));
                let before = numbers(channels * wide, 5);
                let mut found = before.clone();
                let (gv, weight, mean) = (&gv[..], &weight[..], &mean[..]);
                contraction(Contraction { k: &k, gv, weight, mean, rows, out: &mut found });
                for (at, found) in found.iter().enumerate() {
                    let (c, row) = (at / wide, at % wide);
                    let term = |key: usize| {
                        let centred = gv[key * wide + row] - mean[row];
                        k[key * channels + c] * centred * weight[key * rows + row % rows]
                    };
                    let sum = before[at] + (0..keys).map(term).sum::<f32>();
                    assert_eq!(*found, sum, "channel {c}, row {row} of {keys}×{channels}×{wide}");
                }
            }
        });
    }
}
