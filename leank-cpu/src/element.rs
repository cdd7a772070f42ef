//! Element types as the kernel sees them: stored narrow, summed in f32.

use half::{bf16, f16};
use leank_core::{Dtype, LeanFormat, widen_f16};

/// An element of K or V in storage.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// Rows that lie side by side (see [`crate::panels`]).
    const STEP: usize;

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

    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Element for bf16 {
    const STEP: usize = 2;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
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
