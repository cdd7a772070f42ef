//! What the kernel asks of an instruction set: one vector of f32 and a dozen operations.

use half::{bf16, f16};
use leank_core::quant::Scale;

use crate::codes::Word;

/// Largest number of lanes of any instruction set.
pub(crate) const MAX_LANES: usize = 16;

/// An instruction set, as a token: a value exists only where the CPU has it, which is what makes
/// its operations safe to call.
pub(crate) trait Simd: Copy {
    /// Elements of a vector.
    const LANES: usize;

    /// Vectors that the accumulators of a product may take.
    const ACCUMULATORS: usize;

    /// The integer `n` at which [`Simd::times_power_of_two`] gives 0.
    const ZERO_EXPONENT: f32 = -127.0;

    /// `LANES` single-precision numbers.
    type F32: Copy;

    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::F32;

    /// `a + b`
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `a − b`
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `a · b + c`
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    /// The larger one, `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The nearest integer, NaN of NaN.
    fn round(self, x: Self::F32) -> Self::F32;

    /// `x · 2^n` for integers `ZERO_EXPONENT ≤ n ≤ 8` and `x` in 0.5..2, 0 at `ZERO_EXPONENT`; NaN
    /// where `x` is NaN.
    fn times_power_of_two(self, x: Self::F32, n: Self::F32) -> Self::F32;

    /// Whether any lane of `a` is greater than that of `b`; NaN is not.
    fn any_greater(self, a: Self::F32, b: Self::F32) -> bool;

    /// `LANES` elements.
    ///
    /// # Safety
    /// `from` is readable for that many.
    unsafe fn load(self, from: *const f32) -> Self::F32;

    /// `LANES` elements, widened.
    ///
    /// # Safety
    /// `from` is readable for that many.
    unsafe fn load_f16(self, from: *const f16) -> Self::F32;

    /// `LANES` pairs of elements, widened: first the elements with even index, then the others.
    ///
    /// # Safety
    /// `from` is readable for `2 · LANES` elements.
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> [Self::F32; 2];

    /// Steps and zero points of `LANES` scales.
    ///
    /// # Safety
    /// `from` is readable for that many.
    unsafe fn load_scales(self, from: *const Scale) -> [Self::F32; 2];

    /// Codes of 8 bits in `LANES` words as numbers, those of the first row first.
    ///
    /// # Safety
    /// `from` is readable for that many.
    unsafe fn load_u8_words(self, from: *const Word) -> [Self::F32; 4];

    /// Codes of 4 bits in `LANES` words as numbers, those of the first row first.
    ///
    /// # Safety
    /// `from` is readable for that many.
    unsafe fn load_u4_words(self, from: *const Word) -> [Self::F32; 8];

    /// Writes `LANES` elements.
    ///
    /// # Safety
    /// `to` is writable for that many.
    unsafe fn store(self, to: *mut f32, x: Self::F32);

    /// Writes `LANES` elements, rounded to bf16.
    ///
    /// # Safety
    /// `to` is writable for that many.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, x: Self::F32) {
        let mut wide = [0.0; MAX_LANES];
        // SAFETY: the slice has `LANES` elements.
        unsafe { self.store(wide[..Self::LANES].as_mut_ptr(), x) };
        for (lane, x) in wide[..Self::LANES].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *to.wrapping_add(lane) = bf16::from_f32(*x) };
        }
    }

    /// The sum of all lanes.
    #[inline(always)]
    fn sum(self, x: Self::F32) -> f32 {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: the slice has `LANES` elements.
        unsafe { self.store(lanes[..Self::LANES].as_mut_ptr(), x) };
        lanes[..Self::LANES].iter().sum()
    }

    /// Asks for the cache line at `address`, which need not be valid.
    fn prefetch(self, address: *const u8);

    /// The lanes of `a` and `b` in turns: `a0 b0 a1 b1 …`, `2 · LANES` in all. No bit changes.
    fn interleave(self, a: Self::F32, b: Self::F32) -> [Self::F32; 2];
}
