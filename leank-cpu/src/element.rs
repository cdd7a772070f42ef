//! Element types as the kernel sees them: stored narrow, summed in f32.

use std::any::TypeId;

use half::{bf16, f16};
use leank_core::widen_f16;

/// An element of K or V in storage.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// Rows that lie side by side (see [`crate::panels`]).
    const STEP: usize;

    /// The elements of a lane that lie side by side: an array of `STEP`.
    type Group: bytemuck::Pod + AsRef<[Self]> + AsMut<[Self]>;

    /// Exact value.
    fn widen(self) -> f32;

    /// Rounded to the nearest even.
    fn narrow(x: f32) -> Self;

    /// Reads an element that is stored little-endian; `from` has as many bytes.
    fn from_le(from: &[u8]) -> Self {
        let mut own = Self::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut own);
        bytes.copy_from_slice(from);
        if cfg!(target_endian = "big") {
            bytes.reverse();
        }
        own
    }

    /// Writes an element little-endian; `to` has as many bytes.
    fn put_le(self, to: &mut [u8]) {
        to.copy_from_slice(bytemuck::bytes_of(&self));
        if cfg!(target_endian = "big") {
            to.reverse();
        }
    }
}

impl Element for f32 {
    const STEP: usize = 1;
    type Group = [Self; 1];

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Element for f16 {
    const STEP: usize = 1;
    type Group = [Self; 1];

    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        narrow_f16(x)
    }
}

impl Element for bf16 {
    const STEP: usize = 2;
    type Group = [Self; 2];

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let nan = bits >> 16 | 0x40; // a quiet one, not infinity
        let narrow = if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded };
        Self::from_bits(narrow as u16)
    }
}

/// The same number in another type, rounded.
#[inline(always)]
pub(crate) fn convert<S: Element, T: Element>(x: S) -> T {
    if TypeId::of::<S>() == TypeId::of::<T>() { bytemuck::cast(x) } else { T::narrow(x.widen()) }
}

/// `x` rounded to the nearest even, like `f16::from_f32`: without branches, so that loops over it
/// become vector instructions on any target.
#[inline(always)]
fn narrow_f16(x: f32) -> f16 {
    let bits = x.to_bits();
    let sign = bits >> 16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    // What rounds up from the largest mantissa becomes infinity by itself.
    let odd = magnitude >> 13 & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    // Below 2^-14: elements of 0.5..1 are as far apart as subnormal ones here, 2^-24.
    let half = 0.5f32;
    let subnormal = (f32::from_bits(magnitude) + half).to_bits().wrapping_sub(half.to_bits());
    let nan = 0x7e00 | magnitude >> 13 & 0x3ff;
    let special = if magnitude > 0x7f80_0000 { nan } else { 0x7c00 };
    let narrow = if magnitude < 113 << 23 { subnormal } else { normal };
    let narrow = if magnitude >= 143 << 23 { special } else { narrow };
    f16::from_bits((sign | narrow) as u16)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn narrows_as_half_does(bits: u32) {
        let x = f32::from_bits(bits);
        assert_eq!(f16::narrow(x).to_bits(), f16::from_f32(x).to_bits(), "f16 of {bits:#x}");
        assert_eq!(bf16::narrow(x).to_bits(), bf16::from_f32(x).to_bits(), "bf16 of {bits:#x}");
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_even() {
        for bits in (0..=u32::MAX).step_by(997) {
            narrows_as_half_does(bits);
        }
        // Every number of either type, the middle to the next one, and what lies beside both.
        for narrow in 0..=u16::MAX {
            for exact in [
                f16::from_bits(narrow).to_f32().to_bits(),
                bf16::from_bits(narrow).to_f32().to_bits(),
            ] {
                for middle in [0, 1 << 12, 1 << 15] {
                    let bits = exact.wrapping_add(middle);
                    (0..3).for_each(|i| narrows_as_half_does(bits.wrapping_add(i).wrapping_sub(1)));
                }
            }
        }
    }
}
