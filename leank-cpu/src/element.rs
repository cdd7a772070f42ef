//! Element types as the kernel sees them: stored narrow, computed in f32.

use half::{bf16, f16};
use leank_core::{Dtype, LeanFormat};

/// An element of K or V in storage.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// Exact value. Only finite values are ever stored, which is what makes the branch-free
    /// conversion of f16 right.
    fn widen(self) -> f32;

    /// Rounded to the nearest even.
    fn narrow(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn narrow(x: f32) -> Self {
        x
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Element for f16 {
    /// Moves exponent and mantissa into place and corrects the exponent's bias by a multiplication,
    /// which is exact for subnormals too. Unlike `f16::to_f32` it vectorises on any target.
    #[inline(always)]
    fn widen(self) -> f32 {
        const BIAS: f32 = f32::from_bits((127 + 112) << 23); // 2^(127 - 15)
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }

    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Calls a generic function with the element type that a [`Dtype`] names.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            leank_core::Dtype::F32 => {
                type $T = f32;
                $body
            }
            leank_core::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            leank_core::Dtype::Bf16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

/// The element type of a format that this backend stores.
pub(crate) fn plain(format: LeanFormat) -> Dtype {
    match format {
        LeanFormat::Plain(dtype) => dtype,
        _ => unreachable!("CpuCache::new refuses formats without a kernel"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_finite_half() {
        for bits in 0..=u16::MAX {
            let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
            if x.is_finite() {
                assert_eq!(x.widen().to_bits(), x.to_f32().to_bits(), "f16 {bits:#x}");
            }
            if y.is_finite() {
                assert_eq!(y.widen().to_bits(), y.to_f32().to_bits(), "bf16 {bits:#x}");
            }
        }
    }
}
