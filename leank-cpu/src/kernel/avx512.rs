//! AVX-512: thirty-two vectors of sixteen lanes. With BF16, products of bf16 pairs are one
//! instruction.
//!
//! `vdpbf16ps` multiplies bf16 by bf16 and sums in f32, so queries and softmax weights are rounded
//! to bf16 first (relative error 2⁻⁹), as attention kernels on tensor cores do.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{
    entries,
    product::{Bf16Pairs, Lanes, plain_single},
    simd::Simd,
};

/// AVX-512 F, BW, DQ and VL; BF16 too where the parameter says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && (!BF16 || is_x86_feature_detected!("avx512bf16"));
        has.then_some(Self(()))
    }
}

entries!(Avx512<false>, Bf16Pairs, "avx512f,avx512bw,avx512dq,avx512vl");
entries!(Avx512<true>, Bf16Dot, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16");

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
    unsafe fn load_u8(self, from: *const u8) -> __m512 {
        // SAFETY: the token, and the caller's promise.
        let codes = unsafe { _mm_loadu_si128(from.cast()) };
        op!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)))
    }

    #[inline(always)]
    unsafe fn load_u4_pairs(self, from: *const u8) -> [__m512; 2] {
        // SAFETY: the token, and the caller's promise.
        let codes = unsafe { _mm_loadu_si128(from.cast()) };
        let pairs = op!(_mm512_cvtepu8_epi32(codes));
        // `vpermps` looks at the lower four bits only.
        let table = op!(_mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0
        ));
        op!([
            _mm512_permutexvar_ps(pairs, table),
            _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(pairs), table),
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
