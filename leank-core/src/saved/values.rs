//! Which stored values a cache takes.

use half::{bf16, f16};

use crate::{Dtype, LeanFormat};

/// Whether all elements are finite as they are, and after they are rounded to `later`.
pub(super) fn finite(bytes: &[u8], stored: LeanFormat, later: LeanFormat) -> bool {
    let (LeanFormat::Plain(dtype), LeanFormat::Plain(later)) = (stored, later);
    let later = (later != dtype).then_some(later);
    match dtype {
        Dtype::F32 => all(bytes, later, f32::from_le_bytes),
        Dtype::F16 => all(bytes, later, |bits| f16::from_le_bytes(bits).to_f32()),
        Dtype::Bf16 => all(bytes, later, |bits| bf16::from_le_bytes(bits).to_f32()),
    }
}

fn all<const N: usize>(bytes: &[u8], later: Option<Dtype>, value: impl Fn([u8; N]) -> f32) -> bool {
    let (elements, _) = bytes.as_chunks::<N>();
    elements.iter().all(|&bits| {
        let x = value(bits);
        x.is_finite() && later.is_none_or(|later| later.round(x).is_finite())
    })
}
