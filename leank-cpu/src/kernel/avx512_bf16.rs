//! AVX-512 with BF16: products of bf16 pairs in one instruction.
//!
//! `vdpbf16ps` multiplies bf16 by bf16 and sums in f32, so queries and softmax weights are rounded
//! to bf16 first (relative error 2⁻⁹), as attention kernels on tensor cores do. Everything else is
//! that of [`Avx512`].

use std::arch::x86_64::*;

use half::bf16;

use super::{
    avx512::Avx512,
    product::{self, Lanes, Product},
    simd::Simd as _,
    softmax::{self, Bf16s, Narrow, Softmax},
};

/// AVX-512 F, BW, DQ, VL and BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    pub(crate) fn detect() -> Option<Self> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }

    /// The instruction set without BF16.
    pub(crate) fn base(self) -> Avx512 {
        self.0
    }

    /// The product of bf16 by bf16.
    pub(crate) fn product(self, args: Product<'_, bf16, bf16>) {
        // SAFETY: the token exists only where the CPU has the instruction set.
        unsafe { product_dot(self.0, args) }
    }

    /// The softmax with weights in bf16 too.
    pub(crate) fn softmax(self, args: Softmax<'_>, narrow: &mut [bf16]) {
        assert_eq!(args.logits.len(), narrow.len(), "one narrow weight per logit");
        // SAFETY: the token exists only where the CPU has the instruction set.
        unsafe { softmax_narrow(self.0, args, narrow) }
    }

    /// Rounds to bf16.
    pub(crate) fn narrow(self, from: &[f32], to: &mut [bf16]) {
        // SAFETY: the token exists only where the CPU has the instruction set.
        unsafe { narrow(self.0, from, to) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn product_dot(simd: Avx512, args: Product<'_, bf16, bf16>) {
    product::product::<Avx512, Bf16Dot>(simd, args);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn softmax_narrow(simd: Avx512, args: Softmax<'_>, narrow: &mut [bf16]) {
    softmax::softmax(simd, args, narrow);
}

impl Narrow<Avx512> for Bf16s<'_> {
    #[inline(always)]
    fn put(&mut self, _: Avx512, index: usize, weights: __m512) {
        let to: &mut [bf16; 16] = self[index..].first_chunk_mut().expect("as long as the logits");
        // SAFETY: only `softmax_narrow` uses this, which has the instruction.
        let narrow = unsafe { _mm512_cvtneps_pbh(weights) };
        // SAFETY: both are sixteen 16-bit elements; the store needs no alignment.
        unsafe { to.as_mut_ptr().cast::<__m256bh>().write_unaligned(narrow) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn narrow(simd: Avx512, from: &[f32], to: &mut [bf16]) {
    let (from_vectors, from_rest) = from.as_chunks::<16>();
    let (to_vectors, to_rest) = to.as_chunks_mut::<16>();
    for (from, to) in from_vectors.iter().zip(to_vectors) {
        // SAFETY: the chunk has sixteen elements.
        let wide = unsafe { simd.load(from.as_ptr()) };
        let narrow = _mm512_cvtneps_pbh(wide);
        // SAFETY: both are sixteen 16-bit elements; the store needs no alignment.
        unsafe { to.as_mut_ptr().cast::<__m256bh>().write_unaligned(narrow) };
    }
    for (from, to) in from_rest.iter().zip(to_rest) {
        *to = bf16::from_f32(*from);
    }
}

/// Pairs of bf16 times pairs of bf16.
#[derive(Clone, Copy, Debug)]
struct Bf16Dot;

impl Lanes<Avx512> for Bf16Dot {
    type Stored = bf16;
    type Left = bf16;
    type Wide = __m512i;
    type Factor = __m512i;
    const STEP: usize = 2;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(_: Avx512, from: *const bf16) -> __m512i {
        // SAFETY: the token, and the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn factor(_: Avx512, from: *const bf16) -> __m512i {
        // SAFETY: the caller's promise.
        let pair = unsafe { from.cast::<i32>().read_unaligned() };
        // SAFETY: a token exists only where the CPU has the instruction set.
        unsafe { _mm512_set1_epi32(pair) }
    }

    #[inline(always)]
    fn mul_add(_: Avx512, factor: __m512i, wide: __m512i, sum: __m512) -> __m512 {
        // SAFETY: all three are 512 bits without invalid values.
        let (factor, wide): (__m512bh, __m512bh) = unsafe { std::mem::transmute((factor, wide)) };
        // SAFETY: `Bf16Dot` is used by `product_dot` only, which has the instruction.
        unsafe { _mm512_dpbf16_ps(sum, factor, wide) }
    }
}
