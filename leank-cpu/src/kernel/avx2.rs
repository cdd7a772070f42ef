//! AVX2 with FMA and F16C: sixteen vectors of eight lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};
use leank_core::quant::Scale;

use super::{
    coded::{U4s, U8s},
    entries,
    product::Bf16Pairs,
    simd::Simd,
};
use crate::codes::Word;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

entries!(Avx2, [Bf16Pairs, U8s, U4s], Self, "avx2,fma,f16c");

/// One operation of the token's instruction set.
macro_rules! op {
    ($op:expr) => {
        // SAFETY: a token exists only where the CPU has the instruction set.
        unsafe { $op }
    };
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const ACCUMULATORS: usize = 12;
    type F32 = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        op!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }

    #[inline(always)]
    fn round(self, x: __m256) -> __m256 {
        op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }

    #[inline(always)]
    fn times_power_of_two(self, x: __m256, n: __m256) -> __m256 {
        let exponent = op!(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)));
        op!(_mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))))
    }

    #[inline(always)]
    fn any_greater(self, a: __m256, b: __m256) -> bool {
        op!(_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b))) != 0
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: the token, and the caller's promise.
        let stored = unsafe { _mm_loadu_si128(from.cast()) };
        op!(_mm256_cvtph_ps(stored))
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> [__m256; 2] {
        // SAFETY: the token, and the caller's promise.
        let pairs = unsafe { _mm256_loadu_si256(from.cast()) };
        let upper = op!(_mm256_set1_epi32(0xffff_0000_u32 as i32));
        op!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)),
        ])
    }

    #[inline(always)]
    unsafe fn load_scales(self, from: *const Scale) -> [__m256; 2] {
        // SAFETY: the token, and the caller's promise.
        let scales = unsafe { _mm256_loadu_si256(from.cast()) };
        op!([
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(scales)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<16>(scales)),
        ])
    }

    #[inline(always)]
    unsafe fn load_u8_words(self, from: *const Word) -> [__m256; 4] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { _mm256_loadu_si256(from.cast()) };
        let low = op!(_mm256_set1_epi32(0xff));
        op!([
            _mm256_cvtepi32_ps(_mm256_and_si256(words, low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<16>(words), low)),
            _mm256_cvtepi32_ps(_mm256_srli_epi32::<24>(words)),
        ])
    }

    #[inline(always)]
    unsafe fn load_u4_words(self, from: *const Word) -> [__m256; 8] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { _mm256_loadu_si256(from.cast()) };
        let low = op!(_mm256_set1_epi32(15));
        op!([
            _mm256_cvtepi32_ps(_mm256_and_si256(words, low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<16>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<24>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<4>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<12>(words), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<20>(words), low)),
            _mm256_cvtepi32_ps(_mm256_srli_epi32::<28>(words)),
        ])
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: __m256) {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm256_storeu_ps(to, x) }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn interleave(self, a: __m256, b: __m256) -> [__m256; 2] {
        // Of each half.
        let [lower, upper] = op!([_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)]);
        op!([
            _mm256_permute2f128_ps::<0x20>(lower, upper),
            _mm256_permute2f128_ps::<0x31>(lower, upper),
        ])
    }
}
