//! Storage formats: what an element of K or V is while it lies in the cache.

use std::fmt;

use crate::{Error, Result};

/// Element type of activations and of full blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "files", serde(rename_all = "lowercase"))]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an `f32`.
    Bf16,
}

impl Dtype {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `x` rounded to this type and back, to the nearest even.
    #[must_use]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::Bf16 => half::bf16::from_f32(x).to_f32(),
        }
    }
}

impl std::str::FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.to_string() == name).ok_or_else(|| {
            Error::invalid("element type", format!("{name:?} is none of f32, f16 and bf16"))
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// `x` as f32, exactly; infinities and NaN stay so.
///
/// Without branches, so that loops over it become vector instructions on any target, which those
/// over `f16::to_f32` do not; and without subnormal arithmetic, which is slow: small gradients are
/// full of subnormals.
#[inline(always)]
#[must_use]
pub fn widen_f16(x: half::f16) -> f32 {
    let half = x.to_bits();
    let sign = u32::from(half & 0x8000) << 16;
    let shifted = u32::from(half & 0x7fff) << 13;
    let exponent = shifted & 0x0f80_0000;
    let normal = shifted + (112 << 23);
    // Infinity and NaN: the exponent becomes 255.
    let special = shifted + (224 << 23);
    // Subnormal: the mantissa below 2^-14, by an exact subtraction of two normal numbers.
    let base = 113 << 23;
    let subnormal = (f32::from_bits(shifted + base) - f32::from_bits(base)).to_bits();
    let bits = if exponent == 0 { subnormal } else { normal };
    let bits = if exponent == 0x0f80_0000 { special } else { bits };
    f32::from_bits(bits | sign)
}

/// How K or V of one head is stored in a lean block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LeanFormat {
    /// Plain elements.
    Plain(Dtype),
}

impl LeanFormat {
    /// Bytes of `channels` channels of `tokens` tokens.
    #[must_use]
    pub fn bytes(self, tokens: usize, channels: usize) -> usize {
        match self {
            Self::Plain(dtype) => tokens * channels * dtype.bytes(),
        }
    }
}

impl fmt::Display for LeanFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
        }
    }
}

/// Formats of one KV head in lean blocks: K and V are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadFormat {
    /// Format of the kept channels of K.
    pub k: LeanFormat,
    /// Format of V.
    pub v: LeanFormat,
}

impl HeadFormat {
    /// K and V as plain elements of one type.
    #[must_use]
    pub fn plain(dtype: Dtype) -> Self {
        Self { k: LeanFormat::Plain(dtype), v: LeanFormat::Plain(dtype) }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_half_widens_exactly() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (found, expected) = (widen_f16(x), x.to_f32());
            let same = found.to_bits() == expected.to_bits();
            assert!(same || found.is_nan() && expected.is_nan(), "{bits:#x}: {found}");
        }
    }
}
