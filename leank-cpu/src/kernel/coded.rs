//! Products with K and V in codes ([`leank_core::quant`]).
//!
//! A code stands for `step · (code + zero)`, with a scale for each element along the depth. So
//! `Σ_d left[r, d] · value[d, lane]` is `Σ_d folded[r, d] · code[d, lane] + offset[r]` with
//! `folded[r, d] = left[r, d] · step[d]` and `offset[r] = Σ_d folded[r, d] · zero[d]`: scales are folded into
//! the left side once for all lanes that share them, and codes go from memory into the product as they
//! are. All of it in single precision.

use leank_core::quant::Scale;

use super::{
    Engine, Loops,
    product::{Ahead, ByRow, Finish, Lanes, Product, Right},
    simd::{MAX_LANES, Simd},
};
use crate::{
    codes::Codes,
    running::{Folded, Line},
};

/// Codes of 8 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct U8s;

/// Pairs of codes of 4 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct U4Pairs;

impl<S: Simd> Lanes<S> for U8s {
    type Group = u8;
    type Left = f32;
    type Wide = S::F32;
    type Splat = S::F32;
    const STEP: usize = 1;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(simd: S, from: *const u8) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe { simd.load_u8(from) }
    }

    #[inline(always)]
    unsafe fn splat(simd: S, from: *const f32) -> S::F32 {
        // SAFETY: the caller's promise.
        simd.splat(unsafe { *from })
    }

    #[inline(always)]
    fn mul_add(simd: S, factor: S::F32, wide: S::F32, sum: S::F32) -> S::F32 {
        simd.mul_add(factor, wide, sum)
    }

    #[inline(always)]
    fn single(factors: &[f32], code: u8, sum: f32) -> f32 {
        sum + factors[0] * f32::from(code)
    }
}

impl<S: Simd> Lanes<S> for U4Pairs {
    type Group = u8;
    type Left = f32;
    type Wide = [S::F32; 2];
    type Splat = [S::F32; 2];
    const STEP: usize = 2;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn load(simd: S, from: *const u8) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        unsafe { simd.load_u4_pairs(from) }
    }

    #[inline(always)]
    unsafe fn splat(simd: S, from: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        let [even, odd] = unsafe { *from.cast::<[f32; 2]>() };
        [simd.splat(even), simd.splat(odd)]
    }

    #[inline(always)]
    fn mul_add(simd: S, factor: [S::F32; 2], wide: [S::F32; 2], sum: S::F32) -> S::F32 {
        simd.mul_add(factor[1], wide[1], simd.mul_add(factor[0], wide[0], sum))
    }

    #[inline(always)]
    fn single(factors: &[f32], pair: u8, sum: f32) -> f32 {
        let codes = [pair & 15, pair >> 4];
        factors.iter().zip(codes).fold(sum, |sum, (factor, code)| sum + factor * f32::from(code))
    }
}

/// The two sides of a product with codes.
pub(crate) struct CodedProduct<'a> {
    /// `[rows, stride]`; zero from the depth that counts to a whole step.
    pub(crate) left: &'a [f32],
    pub(crate) stride: usize,
    /// Depth to run over, from the start.
    pub(crate) depth: usize,
    pub(crate) codes: Codes<'a>,
    /// Lanes that are wanted, from the start.
    pub(crate) lanes: usize,
    pub(crate) ahead: Ahead,
    pub(crate) folded: Folded<'a>,
}

/// The product.
pub(super) fn product<S: Engine, L: Lanes<S, Group = u8, Left = f32>>(
    simd: S,
    args: CodedProduct<'_>,
    mut finish: impl Finish<S>,
) {
    let CodedProduct { left, stride, depth, codes, lanes, ahead, folded } = args;
    let Folded { left: folded, offsets } = folded;
    let folded = &mut folded[..left.len()];
    let steps = codes.shape.depth / L::STEP;
    for group in codes.groups().take_while(|group| group.first < lanes) {
        let scales = group.scales;
        let fold = Fold { left, stride, scales, folded, offsets, ahead };
        Engine::run(simd, fold);
        let product = Product {
            left: folded,
            order: ByRow(stride),
            rows: offsets.len(),
            depth,
            right: Right { data: group.codes, steps, lanes: group.lanes },
            lanes: group.lanes.min(lanes - group.first),
            ahead,
        };
        let offset = Offset { offsets, first: group.first, finish: &mut finish };
        simd.product::<L, _>(product, offset);
    }
}

/// Folds scales into a left side.
struct Fold<'a> {
    left: &'a [f32],
    stride: usize,
    scales: &'a [Scale],
    folded: &'a mut [f32],
    offsets: &'a mut [f32],
    ahead: Ahead,
}

impl Loops for Fold<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { left, stride, scales, folded, offsets, ahead } = self;
        for line in scales.chunks(size_of::<Line>() / size_of::<Scale>()) {
            if let Some(to) = ahead.ask_for(line.as_ptr().cast()) {
                simd.prefetch(to);
            }
        }
        let rows = left.chunks_exact(stride).zip(folded.chunks_exact_mut(stride));
        let (scales, last) = scales.as_chunks::<MAX_LANES>();
        for ((left, folded), offset) in rows.zip(offsets) {
            let (left, left_last) = left.split_at(scales.len() * MAX_LANES);
            let (folded, folded_last) = folded.split_at_mut(scales.len() * MAX_LANES);
            let chunks = left.as_chunks::<MAX_LANES>().0.iter().zip(scales);
            let mut sums = [0.0; MAX_LANES];
            for ((left, scales), folded) in chunks.zip(folded.as_chunks_mut::<MAX_LANES>().0) {
                for i in 0..MAX_LANES {
                    folded[i] = left[i] * scales[i].step();
                    sums[i] += folded[i] * scales[i].zero();
                }
            }
            for (i, scale) in last.iter().enumerate() {
                folded_last[i] = left_last[i] * scale.step();
                sums[i] += folded_last[i] * scale.zero();
            }
            *offset = sums.iter().sum();
        }
    }
}

/// Adds the offsets on the way.
struct Offset<'a, F> {
    offsets: &'a [f32],
    /// The lane that the product calls its first.
    first: usize,
    finish: &'a mut F,
}

impl<S: Simd, F: Finish<S>> Finish<S> for Offset<'_, F> {
    #[inline(always)]
    fn begin<const R: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize) {
        self.finish.begin::<R, V>(simd, row, self.first + lane);
    }

    #[inline(always)]
    fn vectors<const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        lane: usize,
        mut sums: [[S::F32; V]; R],
    ) {
        for (sums, &offset) in sums.iter_mut().zip(&self.offsets[row..row + R]) {
            let offset = simd.splat(offset);
            for sum in sums {
                *sum = simd.add(*sum, offset);
            }
        }
        self.finish.vectors(simd, row, self.first + lane, sums);
    }

    #[inline(always)]
    fn single(&mut self, row: usize, lane: usize, sum: f32) {
        self.finish.single(row, self.first + lane, sum + self.offsets[row]);
    }
}
