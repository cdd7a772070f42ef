//! Codes: a few bits that stand for elements of K and V in lean blocks of the formats
//! [`LeanFormat::Int8`], [`LeanFormat::Int4`] and [`LeanFormat::Fp8`].
//!
//! Elements that are alike share a [`Scale`], a step and a zero point: a *group*. Their values are
//!
//! ```text
//! value = step · (code + zero)   step: a positive bf16   zero: -32767..=32767   code: 0..=255 or 0..=15
//! ```
//!
//! | | a group is |
//! |---|---|
//! | K, all formats | one channel, all tokens of the block: K's large channels are large in every token |
//! | V in 8 bits | one token, all channels |
//! | V, [`LeanFormat::Int4`] | one token, [`INT4_GROUP`] channels (the last group of a row may be shorter) |
//!
//! So scales never stand inside a sum: `q·k = Σ_c (q_c step_c)·code_c + Σ_c (q_c step_c)·zero_c`, where
//! the factors in brackets serve a whole block, and V's step goes into the softmax weight of its token.
//! A value is a product of 8 and 16 significant bits, an exact f32: every backend that follows
//! [`quantise`] stores the same codes and means the same numbers by them. The zero point is a whole
//! number of steps, so a channel of K far from zero costs no more than one around it.
//!
//! In [`LeanFormat::Fp8`] codes are floating-point numbers of 8 bits (e4m3 of the Open Compute Project: up to
//! 448, without infinity), `value = step · number(code)`, and zero points are 0.
//!
//! # Errors
//! Values of fp8 are 1/16 of themselves off, or 2⁻¹⁰ steps where that is more, and steps are at most
//! 1.008 / 448 of the largest magnitude. Others are at most 0.51 steps off, and a step is at most 1.008 · (largest − least) / 255 (or 15), or
//! 3.1e-5 of the largest magnitude where that is more (a channel that hardly changes).
//!
//! # Extremes
//! - A constant group is at most 1.6e-5 of itself off; of zeros it is exact.
//! - A huge outlier takes the resolution of its own group, and of no other.
//! - The least step is 2⁻¹²⁶: what is smaller than half of it, subnormal numbers mostly, becomes 0.
//! - Magnitudes above 2¹²⁶ saturate there (half a step and 2 % off at most), so that no value
//!   overflows.
//! - **A group with an infinity or NaN becomes NaN as a whole**: its scale is [`Scale::NAN`]. Codes have
//!   no room for either, and the queries that see the one element would have given NaN for nearly
//!   every one of them. It reaches the queries that see the block (of V: the channels of the group, on CUDA
//!   those of its neighbour too), and no other head, block or sequence.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::{LeanFormat, Tensor};

/// Channels of V that share a scale in [`LeanFormat::Int4`].
pub const INT4_GROUP: usize = 32;

/// Least step: its inverse is finite, and no product with it is subnormal.
const LEAST_STEP: f32 = f32::MIN_POSITIVE;
/// Largest magnitude, 2¹²⁶: neither a range nor a value overflows.
const LARGEST: f32 = f32::from_bits((127 + 126) << 23);
/// Largest magnitude of a zero point.
const LARGEST_ZERO: f32 = 32_767.0;

/// The step and the zero point of a group: 4 bytes, the bf16 step in the lower two, the zero point in
/// the upper two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(transparent)]
pub struct Scale(u32);

impl Scale {
    /// Bytes of a scale.
    pub const BYTES: usize = 4;

    /// Of a group that held an infinity or NaN: every value is NaN.
    pub const NAN: Self = Self(0x7fc0);

    /// Of these bits, whatever they are.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits: in files they are little-endian.
    #[must_use]
    pub fn to_bits(self) -> u32 {
        self.0
    }

    /// The step.
    #[inline(always)]
    #[must_use]
    pub fn step(self) -> f32 {
        f32::from_bits(self.0 << 16)
    }

    /// The zero point, a whole number.
    #[inline(always)]
    #[must_use]
    pub fn zero(self) -> f32 {
        (self.0.cast_signed() >> 16) as f32
    }

    /// The value that a code stands for; exact.
    #[inline(always)]
    #[must_use]
    pub fn value(self, code: u8) -> f32 {
        self.step() * (f32::from(code) + self.zero())
    }

    /// Whether [`quantise`] can give it: a finite positive step that is not subnormal and a zero point
    /// other than -32768, or [`Scale::NAN`].
    #[must_use]
    pub fn is_valid(self) -> bool {
        let step = bf16::from_bits(self.0 as u16);
        let finite = step.is_normal() && step.is_sign_positive() && self.0 >> 16 != 0x8000;
        self == Self::NAN || finite
    }
}

/// Quantises a group: writes the code of every value, `0..=most`, and returns the scale.
///
/// With `lo` and `hi` the least and the largest value (saturated at ±2¹²⁶), in f32 arithmetic as IEEE
/// 754 has it, every operation rounded by itself:
///
/// ```text
/// step = max((hi − lo) / most, max(|lo|, |hi|) / 32767, 2⁻¹²⁶), rounded up to bf16
/// zero = round(lo · (1 / step))                                   round: to the nearest even
/// code = clamp(round(value · (1 / step)) − zero, 0, most)
/// ```
///
/// A value that is not finite makes [`Scale::NAN`] and codes of 0.
///
/// # Panics
/// When there are no values, or not as many codes.
// Loops over arrays, which become vector instructions for whatever the caller is compiled for.
#[inline(always)]
pub fn quantise(values: &[f32], most: u8, codes: &mut [u8]) -> Scale {
    assert!(!values.is_empty() && values.len() == codes.len(), "a code for each of some values");
    let (lo, hi) = match range(values) {
        Some((lo, hi)) => (lo.clamp(-LARGEST, LARGEST), hi.clamp(-LARGEST, LARGEST)),
        None => {
            codes.fill(0);
            return Scale::NAN;
        }
    };
    let most = f32::from(most);
    let step = ((hi - lo) / most).max(lo.abs().max(hi.abs()) / LARGEST_ZERO).max(LEAST_STEP);
    // Rounded up: the bits of positive numbers ascend with them.
    let step = (step.to_bits() + 0xffff) >> 16;
    let inverse = 1.0 / f32::from_bits(step << 16);
    let zero = round(lo * inverse);
    for (code, &x) in codes.iter_mut().zip(values) {
        let whole = (round(x * inverse) - zero).max(0.0).min(most);
        // The integer stands in the low bits of the mantissa.
        *code = (whole + 8_388_608.0).to_bits() as u8;
    }
    Scale(step | (zero as i32 as u32) << 16)
}

/// Quantises a group for [`LeanFormat::Fp8`], as [`quantise`] does for whole numbers: with `most` the
/// largest magnitude (saturated at 2¹²⁶),
///
/// ```text
/// step = max(most / 448, 2⁻¹²⁶), rounded up to bf16
/// code = value · (1 / step), to the nearest e4m3, ties to the even one, at most 448
/// ```
///
/// # Panics
/// When there are no values, or not as many codes.
#[inline(always)]
pub fn quantise_fp8(values: &[f32], codes: &mut [u8]) -> Scale {
    assert!(!values.is_empty() && values.len() == codes.len(), "a code for each of some values");
    let Some((lo, hi)) = range(values) else {
        codes.fill(0);
        return Scale::NAN;
    };
    let step = (lo.abs().max(hi.abs()).min(LARGEST) / 448.0).max(LEAST_STEP);
    let step = (step.to_bits() + 0xffff) >> 16;
    let inverse = 1.0 / f32::from_bits(step << 16);
    for (code, &x) in codes.iter_mut().zip(values) {
        *code = to_e4m3(x * inverse);
    }
    Scale(step)
}

/// The nearest e4m3, ties to the even one, at most 448.
#[inline(always)]
fn to_e4m3(x: f32) -> u8 {
    let bits = x.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    // Three bits of the mantissa stay; exponents begin at 2⁻⁶.
    let rounded = (magnitude + 0x7_ffff + (magnitude >> 20 & 1)) >> 20;
    let normal = rounded.wrapping_sub(120 << 3);
    let subnormal = round(f32::from_bits(magnitude) * 512.0) as u32;
    let code = if magnitude < (121 << 23) { subnormal } else { normal.min(0x7e) };
    sign | code as u8
}

/// The number that a code stands for in [`LeanFormat::Fp8`]; exact. What would be NaN, which
/// [`quantise_fp8`] never gives, is ±480.
#[inline(always)]
#[must_use]
pub fn from_e4m3(code: u8) -> f32 {
    // As the exponent and mantissa of an f32 it is 2¹²⁰ times too small, subnormal or not.
    let bits = u32::from(code & 0x80) << 24 | u32::from(code & 0x7f) << 20;
    f32::from_bits(bits) * f32::from_bits((127 + 120) << 23)
}

/// Quantises a group in any format that has codes.
///
/// # Panics
/// When there are no values or not as many codes, or the format has none.
pub fn encode(format: LeanFormat, values: &[f32], codes: &mut [u8]) -> Scale {
    match format.largest_code() {
        Some(most) => quantise(values, most, codes),
        None => {
            assert_eq!(format, LeanFormat::Fp8, "a format with codes");
            quantise_fp8(values, codes)
        }
    }
}

/// The value that a code stands for; exact.
#[must_use]
pub fn value(format: LeanFormat, scale: Scale, code: u8) -> f32 {
    match format {
        LeanFormat::Fp8 => scale.step() * from_e4m3(code),
        _ => scale.value(code),
    }
}

/// To the nearest even integer, for magnitudes below 2²²: adding 1.5·2²³ rounds.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + 12_582_912.0) - 12_582_912.0
}

/// The least and the largest value; `None` where one is not finite.
#[inline(always)]
fn range(values: &[f32]) -> Option<(f32, f32)> {
    const LANES: usize = 16;
    let mut lo = [f32::INFINITY; LANES];
    let mut hi = [f32::NEG_INFINITY; LANES];
    let mut magnitude = [0u32; LANES];
    let mut take = |i: usize, x: f32| {
        lo[i] = if x < lo[i] { x } else { lo[i] };
        hi[i] = if x > hi[i] { x } else { hi[i] };
        magnitude[i] = magnitude[i].max(x.to_bits() & 0x7fff_ffff);
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        (0..LANES).for_each(|i| take(i, chunk[i]));
    }
    rest.iter().enumerate().for_each(|(i, &x)| take(i, x));
    let finite = magnitude.into_iter().fold(0, u32::max) < f32::INFINITY.to_bits();
    let (lo, hi) = (lo.into_iter().fold(lo[0], f32::min), hi.into_iter().fold(hi[0], f32::max));
    finite.then_some((lo, hi))
}

/// Replaces K or V of one head in one block, `[tokens, channels]` as full blocks hold it, by what a
/// lean block of this format stands for. Plain formats round.
///
/// # Panics
/// When there are no whole rows.
pub fn round_trip(format: LeanFormat, tensor: Tensor, channels: usize, values: &mut [f32]) {
    if let LeanFormat::Plain(dtype) = format {
        values.iter_mut().for_each(|x| *x = dtype.round(*x));
        return;
    }
    assert!(values.len().is_multiple_of(channels), "whole rows of {channels} channels");
    let tokens = values.len() / channels;
    let (rows, width) = tensor.by_row(tokens, channels);
    let at = |row: usize, i: usize| match tensor {
        Tensor::K => i * channels + row,
        Tensor::V => row * channels + i,
    };
    for row in 0..rows {
        for first in (0..width).step_by(format.group(tensor)) {
            let members = first..width.min(first.saturating_add(format.group(tensor)));
            let group: Vec<f32> = members.clone().map(|i| values[at(row, i)]).collect();
            let mut codes = vec![0; group.len()];
            let scale = encode(format, &group, &mut codes);
            for (i, code) in members.zip(codes) {
                values[at(row, i)] = value(format, scale, code);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Dtype;

    const MOST: [u8; 2] = [255, 15];

    /// The values that the codes of a group stand for, and its scale.
    fn coded(values: &[f32], most: u8) -> (Vec<f32>, Scale) {
        let mut codes = vec![0xff; values.len()];
        let scale = quantise(values, most, &mut codes);
        assert!(scale.is_valid(), "{scale:?}");
        assert!(codes.iter().all(|&code| code <= most));
        (codes.into_iter().map(|code| scale.value(code)).collect(), scale)
    }

    /// The definition in f64, as plain as possible.
    fn bound(values: &[f32], most: u8) -> f64 {
        let wide = |x: &f32| f64::from(*x);
        let (lo, hi) = values
            .iter()
            .map(wide)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |m, x| (m.0.min(x), m.1.max(x)));
        let step = ((hi - lo) / f64::from(most)).max(lo.abs().max(hi.abs()) / 32_767.0);
        0.51 * 1.008 * step.max(f64::from(f32::MIN_POSITIVE))
    }

    fn close(values: &[f32], most: u8) {
        let (found, scale) = coded(values, most);
        let step = f64::from(scale.step());
        for (&x, &y) in values.iter().zip(&found) {
            let error = (f64::from(x) - f64::from(y)).abs();
            let stated = bound(values, most);
            assert!(error <= stated && error <= 0.51 * step, "{x} became {y}, {scale:?}");
        }
    }

    fn number() -> impl Strategy<Value = f32> {
        let scale = -140i32..125;
        (-1.0f32..1.0, scale).prop_map(|(x, scale)| x * 2f32.powi(scale))
    }

    proptest! {
        #[test]
        fn values_are_half_a_step_off(
            center in number(),
            values in prop::collection::vec(-1.0f32..1.0, 1..100),
            spread in -30i32..30,
        ) {
            let spread = center.abs().max(1e-35) * 2f32.powi(spread);
            let values: Vec<f32> = values.iter().map(|x| center + spread * x)
                .map(|x| x.clamp(-LARGEST, LARGEST)).collect();
            MOST.into_iter().for_each(|most| close(&values, most));
        }

        #[test]
        fn values_of_any_size_are_half_a_step_off(
            values in prop::collection::vec(number(), 1..70),
        ) {
            MOST.into_iter().for_each(|most| close(&values, most));
        }

        /// What a code stands for is not rounded anywhere: other backends may compute it in parts.
        #[test]
        fn values_are_exact(step in 0x80u32..0x7e80, zero in i16::MIN..=i16::MAX, code: u8) {
            let scale = Scale::from_bits(step | (u32::from(zero.cast_unsigned()) << 16));
            let exact = f64::from(scale.step()) * (f64::from(code) + f64::from(zero));
            prop_assume!(exact.abs() < f64::from(f32::MAX));
            prop_assert_eq!(f64::from(scale.value(code)), exact);
        }

        /// The lanes of the range do not show.
        #[test]
        fn order_does_not_matter(values in prop::collection::vec(number(), 1..70), by in 0usize..70) {
            let mut turned = values.clone();
            turned.rotate_left(by % values.len());
            let (mut found, scale) = coded(&values, 255);
            let (other, same) = coded(&turned, 255);
            found.rotate_left(by % values.len());
            prop_assert_eq!((found, scale), (other, same));
        }
    }

    #[test]
    fn codes_are_what_the_documentation_says() {
        let mut codes = [0; 4];
        let scale = quantise(&[-1.0, 0.0, 0.5, 2.0], 15, &mut codes);
        // 3/15 = 0.2 rounds up to 0.2001953125; −1/0.2002 = −4.995.
        assert_eq!((scale.step(), scale.zero()), (0.200_195_31, -5.0));
        assert_eq!(codes, [0, 5, 7, 15]);
        assert_eq!(scale.value(5), 0.0);
        assert_eq!(scale.to_bits(), 0xfffb_3e4d);
    }

    #[test]
    fn extremes_are_what_the_documentation_says() {
        for most in MOST {
            for x in [0.0, -0.0] {
                let (values, _) = coded(&[x; 20], most);
                assert_eq!(values, [0.0; 20]);
            }
            for x in [1.0f32, -300.7, 1e-30, 6e37, 65_504.0] {
                let (values, _) = coded(&[x; 20], most);
                assert!(values.iter().all(|y| ((x - y) / x).abs() <= 1.6e-5), "{x}: {values:?}");
            }
            // Subnormal numbers, f32's and f16's.
            let (values, scale) = coded(&[1e-45, -1e-40, 3e-39], most);
            assert_eq!((values, scale.step()), (vec![0.0; 3], f32::MIN_POSITIVE));
            close(&[6e-8, -6e-8, 3e-5], most);
            // An outlier: the others share what resolution is left, and it is itself all but exact.
            let mut values = vec![0.01; 63];
            values.push(1e4);
            close(&values, most);
            // Beyond what can be held, on both sides of zero or on one.
            let (max, over) = (f32::MAX, 1.01 * LARGEST);
            for group in
                [[max, -max, 1.0], [max; 3], [-max; 3], [over, max, over], [max, 1.0, over]]
            {
                let (found, scale) = coded(&group, most);
                let off = 0.51 * scale.step() + 0.02 * LARGEST;
                for (x, y) in group.into_iter().zip(found) {
                    let error = (x.clamp(-LARGEST, LARGEST) - y).abs();
                    assert!(error <= off, "{x} became {y}");
                }
            }
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, 17, 32] {
                    let mut values = [1.0; 33];
                    values[at] = bad;
                    let (values, scale) = coded(&values, most);
                    assert!(values.iter().all(|x| x.is_nan()) && scale == Scale::NAN);
                }
            }
        }
    }

    /// The definition of e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa; the last of each sign
    /// is NaN.
    fn e4m3(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-6),
            _ => (1.0 + mantissa) * 2f64.powi(exponent - 7),
        };
        if code >> 7 == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_fp8_is_its_own_nearest() {
        let finite = (0..=u8::MAX).filter(|code| code & 0x7f != 0x7f);
        for code in finite.clone() {
            assert_eq!(f64::from(from_e4m3(code)), e4m3(code), "{code:#x}");
            assert_eq!(to_e4m3(from_e4m3(code)), code);
        }
        // Between two neighbours, and beside the middle.
        for code in (0..0x7e).chain(0x80..0xfe) {
            let middle = ((e4m3(code) + e4m3(code + 1)) / 2.0) as f32;
            assert_eq!(to_e4m3(middle), code + code % 2, "{code:#x}");
            assert_eq!(to_e4m3(middle * (1.0 - f32::EPSILON)), code);
            assert_eq!(to_e4m3(middle * (1.0 + f32::EPSILON)), code + 1);
        }
        assert_eq!((to_e4m3(1e9), to_e4m3(-465.0), to_e4m3(1e-40)), (0x7e, 0xfe, 0));
    }

    proptest! {
        #[test]
        fn fp8_is_a_sixteenth_off(values in prop::collection::vec(number(), 1..70)) {
            let mut codes = vec![0; values.len()];
            let scale = quantise_fp8(&values, &mut codes);
            prop_assert!(scale.is_valid() && scale.zero() == 0.0);
            let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
            prop_assert!(scale.step() <= (1.008 * largest / 448.0).max(LEAST_STEP));
            prop_assert!(scale.step() >= 0.999_999 * largest / 448.0, "the largest saturates");
            for (&x, code) in values.iter().zip(codes) {
                let error = (value(LeanFormat::Fp8, scale, code) - x).abs();
                let stated = (x.abs() / 16.0).max(scale.step() / 1024.0);
                prop_assert!(error <= 1.0001 * stated, "{} is {} off", x, error);
            }
        }
    }

    #[test]
    fn scales_that_are_never_made_are_told_apart() {
        let valid = |step: f32, zero: u32| {
            Scale::from_bits(u32::from(bf16::from_f32(step).to_bits()) | zero << 16).is_valid()
        };
        assert!(valid(1.0, 0xffff) && valid(f32::MIN_POSITIVE, 0) && Scale::NAN.is_valid());
        for step in [0.0, -0.0, -1.0, 1e-40, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!valid(step, 0), "{step}");
        }
        assert!(!valid(f32::NAN, 1) && !Scale::from_bits(0x7f81).is_valid());
        assert!(valid(1.0, 0x8001) && !valid(1.0, 0x8000));
    }

    #[test]
    fn groups_are_those_of_the_format() {
        let (tokens, channels) = (8, 70);
        let values: Vec<f32> = (0..tokens * channels).map(|i| (i as f32 * 0.7).sin()).collect();
        let bad = 3 * channels + 40;
        let spoiled = |format, tensor| {
            let mut values = values.clone();
            values[bad] = f32::INFINITY;
            round_trip(format, tensor, channels, &mut values);
            let nan = |(i, x): (usize, &f32)| x.is_nan().then_some((i / channels, i % channels));
            values.iter().enumerate().filter_map(nan).collect::<Vec<_>>()
        };
        let channel: Vec<_> = (0..tokens).map(|token| (token, 40)).collect();
        let token = |channels: std::ops::Range<usize>| channels.map(|c| (3, c)).collect::<Vec<_>>();
        for format in [LeanFormat::Int8, LeanFormat::Int4, LeanFormat::Fp8] {
            assert_eq!(spoiled(format, Tensor::K), channel);
        }
        assert_eq!(spoiled(LeanFormat::Int8, Tensor::V), token(0..70));
        assert_eq!(spoiled(LeanFormat::Fp8, Tensor::V), token(0..70));
        assert_eq!(spoiled(LeanFormat::Int4, Tensor::V), token(32..64));
        let mut plain = values.clone();
        round_trip(LeanFormat::Plain(Dtype::Bf16), Tensor::V, channels, &mut plain);
        assert!(plain.iter().zip(&values).all(|(x, y)| *x == Dtype::Bf16.round(*y)));
    }
}
