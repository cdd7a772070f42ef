//! The kernel's operations in plain Rust, for any CPU: arrays of eight lanes, which the compiler
//! maps to whatever vectors the target has.

use half::{bf16, f16};
use leank_core::{quant::Scale, widen_f16};

use super::simd::Simd;
use crate::codes::Word;

/// Plain Rust.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

const LANES: usize = 8;
type Lanes = [f32; LANES];

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|lane| f(a[lane], b[lane]))
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const ACCUMULATORS: usize = 4;
    type F32 = Lanes;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }

    /// Rounds twice: a fused multiplication is a library call where the target has none.
    #[inline(always)]
    fn mul_add(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|lane| a[lane] * b[lane] + c[lane])
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    /// Adding and subtracting 1.5·2^23 rounds to the nearest integer.
    #[inline(always)]
    fn round(self, x: Lanes) -> Lanes {
        x.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }

    #[inline(always)]
    fn times_power_of_two(self, x: Lanes, n: Lanes) -> Lanes {
        zip(x, n, |x, n| x * f32::from_bits(((n as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn any_greater(self, a: Lanes, b: Lanes) -> bool {
        (0..LANES).fold(false, |any, lane| any | (a[lane] > b[lane]))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Lanes {
        // SAFETY: the caller's promise; arrays need no more alignment than their elements.
        unsafe { *from.cast::<Lanes>() }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Lanes {
        // SAFETY: as above.
        let stored = unsafe { *from.cast::<[f16; LANES]>() };
        stored.map(widen_f16)
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(self, from: *const bf16) -> [Lanes; 2] {
        // SAFETY: as above.
        let stored = unsafe { *from.cast::<[[bf16; 2]; LANES]>() };
        let wide = |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16);
        [stored.map(|pair| wide(pair[0])), stored.map(|pair| wide(pair[1]))]
    }

    #[inline(always)]
    unsafe fn load_scales(self, from: *const Scale) -> [Lanes; 2] {
        // SAFETY: as above.
        let scales = unsafe { *from.cast::<[Scale; LANES]>() };
        [scales.map(Scale::step), scales.map(Scale::zero)]
    }

    #[inline(always)]
    unsafe fn load_u8_words(self, from: *const Word) -> [Lanes; 4] {
        // SAFETY: as above.
        let words = unsafe { *from.cast::<[Word; LANES]>() };
        std::array::from_fn(|i| words.map(|word| f32::from(word[i])))
    }

    #[inline(always)]
    unsafe fn load_u4_words(self, from: *const Word) -> [Lanes; 8] {
        // SAFETY: as above.
        let words = unsafe { *from.cast::<[Word; LANES]>() };
        std::array::from_fn(|i| words.map(|word| f32::from(word[i % 4] >> (i / 4 * 4) & 15)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Lanes) {
        // SAFETY: as above.
        unsafe { *to.cast::<Lanes>() = x };
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}

    #[inline(always)]
    fn interleave(self, a: Lanes, b: Lanes) -> [Lanes; 2] {
        [0, LANES / 2].map(|first| {
            std::array::from_fn(|lane| if lane % 2 == 0 { a } else { b }[first + lane / 2])
        })
    }
}
