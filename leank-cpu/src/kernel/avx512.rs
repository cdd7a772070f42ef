//! AVX-512: thirty-two vectors of sixteen lanes. With BF16, products of bf16 pairs are one
//! instruction.
//!
//! `vdpbf16ps` multiplies bf16 by bf16 and sums in f32, so queries and softmax weights are rounded
//! to bf16 first (relative error 2⁻⁹), as attention kernels on tensor cores do. What has it also has
//! VNNI, whose `vpdpbusd` multiplies codes by integers of 8 bits: queries and weights become two such
//! integers each, 16 bits of a bound on the largest one of their row: the largest query or weight times
//! the largest step.

use std::arch::x86_64::*;

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use leank_core::quant::Scale;

use super::{
    coded::{CodeLanes, U4s, U8s},
    entries,
    product::{Bf16Pairs, Lanes, f32_sums, plain_single},
    simd::Simd,
};
use crate::{codes::Word, running::Linear};

/// AVX-512 F, BW, DQ and VL; BF16 and VNNI too where the parameter says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16
                || is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni"));
        has.then_some(Self(()))
    }
}

entries!(Avx512<false>, [Bf16Pairs, U8s, U4s], Self, "avx512f,avx512bw,avx512dq,avx512vl");
entries!(
    Avx512<true>,
    [Bf16Dot, CodeDot<1>, CodeDot<2>],
    Avx512<false>,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni"
);

impl From<Avx512<true>> for Avx512<false> {
    fn from(_: Avx512<true>) -> Self {
        Self(())
    }
}

/// One operation of the token's instruction set.
macro_rules! op {
    ($op:expr) => {
        // SAFETY: a token exists only where the CPU has the instruction set.
        unsafe { $op }
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    const LANES: usize = 16;
    const ACCUMULATORS: usize = 24;
    const ZERO_EXPONENT: f32 = -160.0; // below all subnormal numbers
    type F32 = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }

    #[inline(always)]
    fn times_power_of_two(self, x: __m512, n: __m512) -> __m512 {
        op!(_mm512_scalef_ps(x, n))
    }

    #[inline(always)]
    fn any_greater(self, a: __m512, b: __m512) -> bool {
        op!(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b)) != 0
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: the token, and the caller's promise.
        let stored = unsafe { _mm256_loadu_si256(from.cast()) };
        op!(_mm512_cvtph_ps(stored))
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> [__m512; 2] {
        // SAFETY: the token, and the caller's promise.
        let pairs = unsafe { _mm512_loadu_si512(from.cast()) };
        let upper = op!(_mm512_set1_epi32(0xffff_0000_u32 as i32));
        op!([
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, upper)),
        ])
    }

    #[inline(always)]
    unsafe fn load_scales(self, from: *const Scale) -> [__m512; 2] {
        // SAFETY: the token, and the caller's promise.
        steps_and_zeros(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn load_u8_words(self, from: *const Word) -> [__m512; 4] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { _mm512_loadu_si512(from.cast()) };
        let low = op!(_mm512_set1_epi32(0xff));
        op!([
            _mm512_cvtepi32_ps(_mm512_and_si512(words, low)),
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(words), low)),
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(words), low)),
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<24>(words)),
        ])
    }

    #[inline(always)]
    unsafe fn load_u4_words(self, from: *const Word) -> [__m512; 8] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { _mm512_loadu_si512(from.cast()) };
        // `vpermps` looks at the lower four bits only.
        let table = op!(_mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0
        ));
        op!([
            _mm512_permutexvar_ps(words, table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<8>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<16>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<24>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<12>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<20>(words), table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<28>(words), table),
        ])
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m512) {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, x: __m512) {
        assert!(BF16, "only products of bf16 pairs narrow their left side");
        let narrow = op!(_mm512_cvtneps_pbh(x));
        // SAFETY: the caller's promise; both are sixteen 16-bit elements.
        unsafe { to.cast::<__m256bh>().write_unaligned(narrow) };
    }

    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        op!(_mm512_reduce_add_ps(x))
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn interleave(self, a: __m512, b: __m512) -> [__m512; 2] {
        let first = op!(_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        let second = op!(_mm512_add_epi32(first, _mm512_set1_epi32(8)));
        op!([_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b)])
    }
}

/// Pairs of bf16 times pairs of bf16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16Dot;

impl Lanes<Avx512<true>> for Bf16Dot {
    f32_sums!(Avx512<true>);
    type Group = [bf16; 2];
    type Left = bf16;
    type Wide = __m512i;
    type Splat = __m512i;
    const STEP: usize = 2;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(_: Avx512<true>, from: *const [bf16; 2]) -> __m512i {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(_: Avx512<true>, from: *const bf16) -> __m512i {
        // SAFETY: the caller's promise.
        let pair = unsafe { from.cast::<i32>().read_unaligned() };
        op!(_mm512_set1_epi32(pair))
    }

    #[inline(always)]
    fn mul_add(_: Avx512<true>, factor: __m512i, wide: __m512i, sum: __m512) -> __m512 {
        // SAFETY: all three are 512 bits without invalid values.
        let (factor, wide): (__m512bh, __m512bh) = unsafe { std::mem::transmute((factor, wide)) };
        op!(_mm512_dpbf16_ps(sum, factor, wide))
    }

    #[inline(always)]
    fn single(factors: &[bf16], group: [bf16; 2], sum: f32) -> f32 {
        plain_single::<_, bf16>(factors, group, sum)
    }
}

/// An integer of 16 bits as an upper and a lower digit, both with a sign. Four of them lie as four upper
/// digits and four lower ones.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Digits([i8; 2]);

impl Digits {
    /// The largest integer: 127 · 256 + 127.
    const LARGEST: f32 = 32_639.0;

    /// The sum of four integers times codes.
    #[inline(always)]
    fn product(four: &[Self; 4], codes: Word) -> f32 {
        let [upper, lower]: [[i8; 4]; 2] = bytemuck::cast(*four);
        let integer = |i: usize| 256 * i32::from(upper[i]) + i32::from(lower[i]);
        (0..4).map(|i| (integer(i) * i32::from(codes[i])) as f32).sum()
    }
}

/// Codes times integers of 16 bits, which are two digits of 8: words of `WORDS` times four codes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodeDot<const WORDS: usize>;

impl<const WORDS: usize> Lanes<Avx512<true>> for CodeDot<WORDS> {
    type Group = Word;
    type Left = Digits;
    /// Sums of products with the upper digits and with the lower ones.
    type Sum = [__m512i; 2];
    type Wide = [__m512i; WORDS];
    type Splat = [[__m512i; 2]; WORDS];
    const STEP: usize = 4 * WORDS;
    const VECTORS: usize = WORDS;
    const SUMS: usize = 2;

    #[inline(always)]
    fn zero(_: Avx512<true>) -> [__m512i; 2] {
        [op!(_mm512_setzero_si512()); 2]
    }

    #[inline(always)]
    unsafe fn load(_: Avx512<true>, from: *const Word) -> [__m512i; WORDS] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { _mm512_loadu_si512(from.cast()) };
        if WORDS == 1 {
            return [words; WORDS];
        }
        let halves = op!(_mm512_set1_epi8(15));
        std::array::from_fn(|word| match word {
            0 => op!(_mm512_and_si512(words, halves)),
            _ => op!(_mm512_and_si512(_mm512_srli_epi32::<4>(words), halves)),
        })
    }

    #[inline(always)]
    unsafe fn splat(_: Avx512<true>, from: *const Digits) -> [[__m512i; 2]; WORDS] {
        std::array::from_fn(|word| {
            [0, 1].map(|digit| {
                let from = from.cast::<i32>().wrapping_add(2 * word + digit);
                // SAFETY: the caller's promise: four factors are two words.
                let digits = unsafe { from.read_unaligned() };
                op!(_mm512_set1_epi32(digits))
            })
        })
    }

    #[inline(always)]
    fn mul_add(
        _: Avx512<true>,
        factor: [[__m512i; 2]; WORDS],
        wide: [__m512i; WORDS],
        [mut upper, mut lower]: [__m512i; 2],
    ) -> [__m512i; 2] {
        for ([upper_factor, lower_factor], wide) in factor.into_iter().zip(wide) {
            upper = op!(_mm512_dpbusd_epi32(upper, wide, upper_factor));
            lower = op!(_mm512_dpbusd_epi32(lower, wide, lower_factor));
        }
        [upper, lower]
    }

    #[inline(always)]
    fn finish(_: Avx512<true>, [upper, lower]: [__m512i; 2]) -> __m512 {
        let base = op!(_mm512_set1_ps(256.0));
        op!(_mm512_fmadd_ps(_mm512_cvtepi32_ps(upper), base, _mm512_cvtepi32_ps(lower)))
    }

    #[inline(always)]
    fn single(factors: &[Digits], word: Word, sum: f32) -> f32 {
        let codes =
            |shift: usize| word.map(|pair| if WORDS == 1 { pair } else { pair >> shift & 15 });
        let words = factors.as_chunks::<4>().0.iter().enumerate();
        words.fold(sum, |sum, (i, factors)| sum + Digits::product(factors, codes(4 * i)))
    }
}

impl<const WORDS: usize> CodeLanes<Avx512<true>> for CodeDot<WORDS> {
    #[inline(always)]
    fn largest(simd: Avx512<true>, row: &[f32]) -> f32 {
        let (whole, rest) = row.as_chunks::<16>();
        let mut most = simd.splat(0.0);
        for x in whole {
            // SAFETY: sixteen numbers.
            let x = unsafe { simd.load(x.as_ptr()) };
            // The second one where the first one is NaN.
            most = simd.max(op!(_mm512_abs_ps(x)), most);
        }
        rest.iter().fold(op!(_mm512_reduce_max_ps(most)), |most, x| most.max(x.abs()))
    }

    #[inline(always)]
    fn largest_step(simd: Avx512<true>, scales: &[Scale]) -> f32 {
        let (whole, rest) = scales.as_chunks::<16>();
        let mut most = simd.splat(0.0);
        for scales in whole {
            // SAFETY: sixteen scales.
            let [step, _] = unsafe { simd.load_scales(scales.as_ptr()) };
            most = simd.max(step, most);
        }
        rest.iter().fold(op!(_mm512_reduce_max_ps(most)), |most, scale| most.max(scale.step()))
    }

    #[inline(always)]
    fn fold(
        simd: Avx512<true>,
        row: &[f32],
        scales: &[Scale],
        bound: f32,
        to: &mut [f32],
    ) -> Linear {
        assert!(row.len() == scales.len() && to.len() == scales.len(), "a scale for each factor");
        assert!(scales.len().is_multiple_of(8), "whole steps");
        let to: &mut [u8] = bytemuck::cast_slice_mut(to);
        // Large enough for a finite inverse.
        let bound = bound.max(1e-30);
        let inverse = simd.splat(Digits::LARGEST / bound);
        let mut offset = simd.splat(0.0);
        for i in (0..scales.len()).step_by(16) {
            let mask = if scales.len() - i < 16 { 0xff } else { 0xffff };
            // SAFETY: there are as many more scales as the mask has bits.
            let stored = unsafe { _mm512_maskz_loadu_epi32(mask, scales[i..].as_ptr().cast()) };
            // SAFETY: the row is as long.
            let x = unsafe { _mm512_maskz_loadu_ps(mask, row[i..].as_ptr()) };
            let [step, zero] = steps_and_zeros(stored);
            let x = op!(_mm512_mul_ps(x, step));
            // NaN has no digits, but reaches the results by the offset.
            offset = simd.mul_add(x, zero, offset);
            let integers = op!(_mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)));
            let lower = op!(_mm512_cvtepi32_epi8(integers));
            let rounded = op!(_mm512_add_epi32(integers, _mm512_set1_epi32(128)));
            let upper = op!(_mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(rounded)));
            let digits = op!([_mm_unpacklo_epi32(upper, lower), _mm_unpackhi_epi32(upper, lower)]);
            for (digits, to) in digits.into_iter().zip(to[2 * i..].as_chunks_mut::<16>().0) {
                // SAFETY: sixteen bytes.
                unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), digits) };
            }
        }
        // Nor has what is infinite: beside it all digits are zero, and an infinite factor makes them NaN.
        Linear { factor: bound / Digits::LARGEST, offset: simd.sum(offset) }
    }
}

/// Steps and zero points of scales.
#[inline(always)]
fn steps_and_zeros(scales: __m512i) -> [__m512; 2] {
    op!([
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(scales)),
        _mm512_cvtepi32_ps(_mm512_srai_epi32::<16>(scales)),
    ])
}
