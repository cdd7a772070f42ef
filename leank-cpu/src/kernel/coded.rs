//! Products with K and V in codes ([`leank_core::quant`]).
//!
//! A code stands for `step · (code + zero)`, with a scale for each element along the depth. So
//! `Σ_d left[r, d] · value[d, lane]` is `Σ_d folded[r, d] · code[d, lane] + offset[r]` with
//! `folded[r, d] = left[r, d] · step[d]` and `offset[r] = Σ_d folded[r, d] · zero[d]`: scales are folded into
//! the left side once for all lanes that share them, and codes go from memory into the product as they
//! are: in single precision, or as integers where the instruction set multiplies those faster.

use leank_core::quant::Scale;

use super::{
    Engine,
    product::{self, Ahead, ByRow, Finish, Lanes, Product, Right, f32_sums},
    simd::Simd,
};
use crate::{
    codes::{Codes, Word},
    running::{Folded, Line, Linear},
};

/// How codes are multiplied.
pub(crate) trait CodeLanes<S: Simd>: Lanes<S, Group = Word> {
    /// The largest magnitude of a row of the left side, NaN apart: half of what bounds factors in
    /// [`CodeLanes::fold`], where it asks for a bound.
    #[inline(always)]
    fn largest(_: S, _row: &[f32]) -> f32 {
        0.0
    }

    /// The largest step, NaN apart: the other half.
    #[inline(always)]
    fn largest_step(_: S, _scales: &[Scale]) -> f32 {
        0.0
    }

    /// Writes a row of the left side times the steps of as many scales, as the product reads it.
    /// `bound`: [`CodeLanes::largest`] times [`CodeLanes::largest_step`].
    fn fold(simd: S, row: &[f32], scales: &[Scale], bound: f32, to: &mut [f32]) -> Linear;
}

/// Codes of 8 bits, widened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct U8s;

/// Codes of 4 bits, widened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct U4s;

macro_rules! wide_codes {
    ($lanes:ty, $rows:literal, $load:ident, $code:expr) => {
        impl<S: Simd> Lanes<S> for $lanes {
            type Group = Word;
            type Left = f32;
            type Wide = [S::F32; $rows];
            type Splat = [S::F32; $rows];
            const STEP: usize = $rows;
            const VECTORS: usize = $rows;
            f32_sums!(S);

            #[inline(always)]
            unsafe fn load(simd: S, from: *const Word) -> Self::Wide {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from) }
            }

            #[inline(always)]
            unsafe fn splat(simd: S, from: *const f32) -> Self::Splat {
                // SAFETY: the caller's promise.
                let factors = unsafe { *from.cast::<[f32; $rows]>() };
                factors.map(|factor| simd.splat(factor))
            }

            #[inline(always)]
            fn mul_add(simd: S, factors: Self::Splat, wide: Self::Wide, sum: S::F32) -> S::F32 {
                let both = factors.into_iter().zip(wide);
                both.fold(sum, |sum, (factor, wide)| simd.mul_add(factor, wide, sum))
            }

            #[inline(always)]
            fn single(factors: &[f32], word: Word, sum: f32) -> f32 {
                let code = |i| f32::from($code(word, i));
                factors.iter().enumerate().fold(sum, |sum, (i, factor)| sum + factor * code(i))
            }
        }

        impl<S: Simd> CodeLanes<S> for $lanes {
            #[inline(always)]
            fn fold(simd: S, row: &[f32], scales: &[Scale], _: f32, to: &mut [f32]) -> Linear {
                fold(simd, row, scales, to)
            }
        }
    };
}
wide_codes!(U8s, 4, load_u8_words, |word: Word, i: usize| word[i]);
wide_codes!(U4s, 8, load_u4_words, |word: Word, i: usize| word[i % 4] >> (i / 4 * 4) & 15);

/// [`CodeLanes::fold`] in single precision.
#[inline(always)]
fn fold<S: Simd>(simd: S, row: &[f32], scales: &[Scale], to: &mut [f32]) -> Linear {
    assert!(row.len() == scales.len() && to.len() == scales.len(), "a scale for each factor");
    let whole = scales.len() / S::LANES * S::LANES;
    let mut offset = simd.splat(0.0);
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: there are `LANES` more scales.
        let [step, zero] = unsafe { simd.load_scales(scales[i..].as_ptr()) };
        // SAFETY: the row is as long.
        let x = unsafe { simd.load(row[i..].as_ptr()) };
        let x = simd.mul_add(x, step, simd.splat(0.0));
        offset = simd.mul_add(x, zero, offset);
        // SAFETY: so is what it becomes.
        unsafe { simd.store(to[i..].as_mut_ptr(), x) };
    }
    let mut offset = simd.sum(offset);
    for (i, scale) in scales.iter().enumerate().skip(whole) {
        to[i] = row[i] * scale.step();
        offset += to[i] * scale.zero();
    }
    Linear { factor: 1.0, offset }
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
pub(super) fn product<S: Engine, L: CodeLanes<S>>(
    simd: S,
    args: CodedProduct<'_>,
    mut finish: impl Finish<S>,
) {
    let CodedProduct { left, stride, depth, codes, lanes, ahead, mut folded } = args;
    simd.fold::<L>(Fold { left, stride, codes, folded: folded.reborrow(), ahead });
    let Folded { left: folded, sums: linear, tops } = folded;
    let steps = codes.shape.depth / L::STEP;
    let parts = folded.chunks(left.len()).zip(linear.chunks(tops.len()));
    let groups = codes.groups().take_while(|group| group.first < lanes);
    for (group, (folded, linear)) in groups.zip(parts) {
        let args = Product {
            left: bytemuck::cast_slice(folded),
            order: ByRow(stride * (size_of::<f32>() / size_of::<L::Left>())),
            rows: linear.len(),
            depth,
            right: Right { data: group.words, steps, lanes: group.lanes },
            lanes: group.lanes.min(lanes - group.first),
            ahead,
        };
        let add = AddOffsets { linear, first: group.first, finish: &mut finish };
        product::product::<S, L, _>(simd, args, add);
    }
}

/// Folding all scales of K or V into a left side.
pub(super) struct Fold<'a> {
    left: &'a [f32],
    stride: usize,
    codes: Codes<'a>,
    folded: Folded<'a>,
    ahead: Ahead,
}

impl Fold<'_> {
    /// Folds, for `L` to read.
    #[inline(always)]
    pub(super) fn run<S: Simd, L: CodeLanes<S>>(self, simd: S) {
        let Self { left, stride, codes, folded, ahead } = self;
        let Folded { left: to, sums: linear, tops } = folded;
        let (rows, depth) = (tops.len(), codes.shape.depth);
        for (row, top) in tops.iter_mut().enumerate() {
            *top = L::largest(simd, &left[row * stride..][..depth]);
        }
        for (at, group) in codes.groups().enumerate() {
            let scales = group.scales;
            let asked = ahead.of_steps(scales.as_ptr().cast(), size_of::<Line>());
            let lines = size_of_val(scales).div_ceil(size_of::<Line>());
            (0..lines).filter_map(|line| asked.by(line)).for_each(|to| simd.prefetch(to));
            let step = L::largest_step(simd, scales);
            for row in 0..rows {
                let from = &left[row * stride..][..depth];
                let to = &mut to[(at * rows + row) * stride..][..depth];
                linear[at * rows + row] = L::fold(simd, from, scales, tops[row] * step, to);
            }
        }
    }
}

/// Makes of sums what they are short of, on the way.
struct AddOffsets<'a, F> {
    linear: &'a [Linear],
    /// The lane that the product calls its first.
    first: usize,
    finish: &'a mut F,
}

impl<S: Simd, F: Finish<S>> Finish<S> for AddOffsets<'_, F> {
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
        for (sums, linear) in sums.iter_mut().zip(&self.linear[row..row + R]) {
            let (factor, offset) = (simd.splat(linear.factor), simd.splat(linear.offset));
            for sum in sums {
                *sum = simd.mul_add(*sum, factor, offset);
            }
        }
        self.finish.vectors(simd, row, self.first + lane, sums);
    }

    #[inline(always)]
    fn single(&mut self, row: usize, lane: usize, sum: f32) {
        let Linear { factor, offset } = self.linear[row];
        self.finish.single(row, self.first + lane, sum * factor + offset);
    }
}
