//! AVX-512: thirty-two vectors of sixteen lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{entries, simd::Simd};

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Self(()))
    }
}

entries!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl");

/// One operation of the token's instruction set.
macro_rules! op {
    ($op:expr) => {
        // SAFETY: a token exists only where the CPU has the instruction set.
        unsafe { $op }
    };
}

impl Simd for Avx512 {
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
    fn largest(self, x: __m512) -> f32 {
        op!(_mm512_reduce_max_ps(x))
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
    unsafe fn store(self, to: *mut f32, x: __m512) {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm512_storeu_ps(to, x) }
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
