//! NEON, which every 64-bit ARM has: thirty-two vectors of four lanes.

use std::arch::aarch64::*;

use half::{bf16, f16};
use leank_core::quant::Scale;

use super::{
    coded::{U4s, U8s},
    entries,
    product::Bf16Pairs,
    simd::Simd,
};
use crate::codes::Word;

/// NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

entries!(Neon, [Bf16Pairs, U8s, U4s], Self, "neon");

/// One operation of the token's instruction set.
macro_rules! op {
    ($op:expr) => {
        // SAFETY: a token exists only where the CPU has the instruction set.
        unsafe { $op }
    };
}

impl Simd for Neon {
    const LANES: usize = 4;
    const ACCUMULATORS: usize = 24;
    type F32 = float32x4_t;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        op!(vdupq_n_f32(x))
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        op!(vaddq_f32(a, b))
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        op!(vsubq_f32(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        op!(vfmaq_f32(c, a, b))
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        op!(vbslq_f32(vcgtq_f32(a, b), a, b))
    }

    #[inline(always)]
    fn round(self, x: float32x4_t) -> float32x4_t {
        op!(vrndnq_f32(x))
    }

    #[inline(always)]
    fn times_power_of_two(self, x: float32x4_t, n: float32x4_t) -> float32x4_t {
        let exponent = op!(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
        op!(vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32::<23>(exponent))))
    }

    #[inline(always)]
    fn any_greater(self, a: float32x4_t, b: float32x4_t) -> bool {
        op!(vmaxvq_u32(vcgtq_f32(a, b))) != 0
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        // SAFETY: the token, and the caller's promise.
        unsafe { vld1q_f32(from) }
    }

    /// `fcvtl` by hand: Rust has no stable type for four halves in a register.
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> float32x4_t {
        // SAFETY: the token, and the caller's promise.
        let stored = unsafe { vld1_u16(from.cast()) };
        let wide: float32x4_t;
        // SAFETY: the instruction is part of NEON, reads one register and writes the other.
        unsafe {
            std::arch::asm!(
                "fcvtl {wide:v}.4s, {stored:v}.4h",
                wide = out(vreg) wide,
                stored = in(vreg) stored,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        wide
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> [float32x4_t; 2] {
        // SAFETY: the token, and the caller's promise.
        let pairs = unsafe { vld1q_u32(from.cast()) };
        op!([
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)),
            vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000))),
        ])
    }

    #[inline(always)]
    unsafe fn load_scales(self, from: *const Scale) -> [float32x4_t; 2] {
        // SAFETY: the token, and the caller's promise.
        let scales = unsafe { vld1q_u32(from.cast()) };
        op!([
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(scales)),
            vcvtq_f32_s32(vshrq_n_s32::<16>(vreinterpretq_s32_u32(scales))),
        ])
    }

    #[inline(always)]
    unsafe fn load_u8_words(self, from: *const Word) -> [float32x4_t; 4] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { vld1q_u32(from.cast()) };
        let low = op!(vdupq_n_u32(0xff));
        op!([
            vcvtq_f32_u32(vandq_u32(words, low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<16>(words), low)),
            vcvtq_f32_u32(vshrq_n_u32::<24>(words)),
        ])
    }

    #[inline(always)]
    unsafe fn load_u4_words(self, from: *const Word) -> [float32x4_t; 8] {
        // SAFETY: the token, and the caller's promise.
        let words = unsafe { vld1q_u32(from.cast()) };
        let low = op!(vdupq_n_u32(15));
        op!([
            vcvtq_f32_u32(vandq_u32(words, low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<8>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<16>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<24>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<4>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<12>(words), low)),
            vcvtq_f32_u32(vandq_u32(vshrq_n_u32::<20>(words), low)),
            vcvtq_f32_u32(vshrq_n_u32::<28>(words)),
        ])
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: float32x4_t) {
        // SAFETY: the token, and the caller's promise.
        unsafe { vst1q_f32(to, x) }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: the instruction is a hint and touches no register or flag.
        unsafe {
            std::arch::asm!(
                "prfm pldl1keep, [{address}]",
                address = in(reg) address,
                options(nostack, preserves_flags, readonly)
            );
        }
    }

    #[inline(always)]
    fn interleave(self, a: float32x4_t, b: float32x4_t) -> [float32x4_t; 2] {
        op!([vzip1q_f32(a, b), vzip2q_f32(a, b)])
    }
}
