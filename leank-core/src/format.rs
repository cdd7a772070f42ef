//! Storage formats: what an element of K or V is while it lies in the cache.

use std::fmt;

use crate::{
    Error, Result,
    quant::{INT4_GROUP, Scale},
};

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

/// K or V.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tensor {
    /// Keys.
    K,
    /// Values.
    V,
}

impl Tensor {
    /// A token and a channel, or how many there are, as a row and a place in it, where rows hold what
    /// shares scales: channels of K, tokens of V. And the other way round.
    #[must_use]
    pub fn by_row(self, token: usize, channel: usize) -> (usize, usize) {
        match self {
            Self::K => (channel, token),
            Self::V => (token, channel),
        }
    }
}

/// How K or V of one head is stored in a lean block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LeanFormat {
    /// Plain elements.
    Plain(Dtype),
    /// Codes of 8 bits and their scales: see [`quant`](crate::quant).
    Int8,
    /// Codes of 4 bits and their scales: see [`quant`](crate::quant).
    Int4,
    /// Numbers of 8 bits (e4m3) and their scales: see [`quant`](crate::quant). Masks ask for [`Self::Int8`],
    /// which is closer in the same bytes.
    Fp8,
}

impl LeanFormat {
    /// Every format.
    pub const ALL: [Self; 6] = [
        Self::Plain(Dtype::F32),
        Self::Plain(Dtype::F16),
        Self::Plain(Dtype::Bf16),
        Self::Int8,
        Self::Int4,
        Self::Fp8,
    ];

    /// Bits of an element, without its share of a scale.
    #[must_use]
    pub fn bits(self) -> usize {
        match self {
            Self::Plain(dtype) => 8 * dtype.bytes(),
            Self::Int8 | Self::Fp8 => 8,
            Self::Int4 => 4,
        }
    }

    /// The largest code; `None` where codes are no whole numbers, or elements plain.
    #[must_use]
    pub fn largest_code(self) -> Option<u8> {
        match self {
            Self::Plain(_) | Self::Fp8 => None,
            Self::Int8 => Some(255),
            Self::Int4 => Some(15),
        }
    }

    /// Most elements that share a scale: tokens of one channel of K, channels of one token of V.
    #[must_use]
    pub fn group(self, tensor: Tensor) -> usize {
        match (self, tensor) {
            (Self::Int4, Tensor::V) => INT4_GROUP,
            _ => usize::MAX,
        }
    }

    /// Bytes of `channels` channels of `tokens` tokens, scales included.
    #[must_use]
    pub fn bytes(self, tensor: Tensor, tokens: usize, channels: usize) -> usize {
        let elements = (tokens * channels * self.bits()).div_ceil(8);
        elements + self.scale_bytes(tensor, tokens, channels)
    }

    /// Bytes of the scales among them: none of plain elements.
    #[must_use]
    pub fn scale_bytes(self, tensor: Tensor, tokens: usize, channels: usize) -> usize {
        let (rows, width) = tensor.by_row(tokens, channels);
        match self {
            Self::Plain(_) => 0,
            _ => rows * width.div_ceil(self.group(tensor)) * Scale::BYTES,
        }
    }
}

impl fmt::Display for LeanFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Int8 => f.write_str("int8"),
            Self::Int4 => f.write_str("int4"),
            Self::Fp8 => f.write_str("fp8"),
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

    /// The format of K or V.
    #[must_use]
    pub fn of(self, tensor: Tensor) -> LeanFormat {
        match tensor {
            Tensor::K => self.k,
            Tensor::V => self.v,
        }
    }
}

/// How much of an element lean blocks keep, as a mask asks for it: it does not know the type of a
/// cache's full blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Precision {
    /// 4 bits.
    Four,
    /// 8 bits.
    Eight,
    /// Elements as full blocks have them; called 16 bits, which they mostly are.
    #[default]
    Sixteen,
}

impl Precision {
    /// Every one, the least bits first.
    pub const ALL: [Self; 3] = [Self::Four, Self::Eight, Self::Sixteen];

    /// Its name in numbers: 4, 8 or 16.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }

    /// The one of this name; `None` for other numbers.
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|precision| precision.bits() == bits)
    }

    /// The format beside full blocks of this type.
    #[must_use]
    pub fn format(self, full: Dtype) -> LeanFormat {
        match self {
            Self::Four => LeanFormat::Int4,
            Self::Eight => LeanFormat::Int8,
            Self::Sixteen => LeanFormat::Plain(full),
        }
    }
}

/// Precisions of one KV head in lean blocks: K and V are independent. Written `k8v4`.
///
/// ```
/// use leank_core::{HeadPrecision, Precision};
///
/// let precision: HeadPrecision = "k8v4".parse()?;
/// assert_eq!(precision, HeadPrecision { k: Precision::Eight, v: Precision::Four });
/// assert_eq!(HeadPrecision::default().to_string(), "k16v16");
/// # Ok::<(), leank_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HeadPrecision {
    /// Of the kept channels of K.
    pub k: Precision,
    /// Of V.
    pub v: Precision,
}

impl HeadPrecision {
    /// The formats beside full blocks of this type.
    #[must_use]
    pub fn format(self, full: Dtype) -> HeadFormat {
        HeadFormat { k: self.k.format(full), v: self.v.format(full) }
    }
}

impl fmt::Display for HeadPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "k{}v{}", self.k.bits(), self.v.bits())
    }
}

impl std::str::FromStr for HeadPrecision {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let parse = || {
            let (k, v) = name.strip_prefix('k')?.split_once('v')?;
            let precision = |bits: &str| Precision::from_bits(bits.parse().ok()?);
            Some(Self { k: precision(k)?, v: precision(v)? })
        };
        parse().ok_or_else(|| {
            let why = format!("{name:?} is not k and v with 16, 8 or 4 each, as in k8v4");
            Error::invalid("formats of lean blocks", why)
        })
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

    #[test]
    fn bytes_count_scales() {
        use LeanFormat::{Fp8, Int4, Int8, Plain};
        let bytes = |format: LeanFormat, tensor| format.bytes(tensor, 64, 33);
        assert_eq!(bytes(Plain(Dtype::F16), Tensor::K), 64 * 33 * 2);
        assert_eq!(bytes(Int8, Tensor::K), 64 * 33 + 33 * 4);
        assert_eq!(bytes(Int8, Tensor::V), 64 * 33 + 64 * 4);
        assert_eq!(bytes(Fp8, Tensor::V), 64 * 33 + 64 * 4);
        assert_eq!(bytes(Int4, Tensor::K), 32 * 33 + 33 * 4);
        assert_eq!(bytes(Int4, Tensor::V), 32 * 33 + 64 * 2 * 4);
        assert_eq!(Int4.bytes(Tensor::K, 3, 3), 5 + 12);
        for format in LeanFormat::ALL {
            assert_eq!(format.bytes(Tensor::K, 64, 0), 0);
            assert_eq!(format.bytes(Tensor::V, 0, 64), 0);
        }
    }

    #[test]
    fn precisions_are_named_and_others_refused() {
        for k in Precision::ALL {
            for v in Precision::ALL {
                let both = HeadPrecision { k, v };
                assert_eq!(both.to_string().parse::<HeadPrecision>().unwrap(), both);
            }
        }
        for name in ["", "k8", "v8", "k8v3", "k8v8v8", "K8V8", "k08v", "k256v8"] {
            let error = name.parse::<HeadPrecision>().unwrap_err();
            assert!(error.to_string().contains("k8v4"), "{error}");
        }
    }

    #[test]
    fn codes_use_all_their_bits() {
        for format in LeanFormat::ALL {
            if let Some(most) = format.largest_code() {
                assert_eq!(u32::from(most), (1 << format.bits()) - 1, "{format}");
            }
        }
        let coded = LeanFormat::ALL.map(|format| format.largest_code().is_some());
        assert_eq!(coded, [false, false, false, true, true, false]);
        for dtype in Dtype::ALL {
            assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
            assert_eq!(LeanFormat::Plain(dtype).bits(), 8 * dtype.bytes());
        }
        assert!("f64".parse::<Dtype>().unwrap_err().to_string().contains("f64"));
    }
}
