//! Elements of a dump to and from f32.
//!
//! Reading converts every element of a dump once per refresh of the statistics, so the loops are
//! branch-free and compiled for the vector instructions at hand.

use half::{bf16, f16};
use pulp::{Arch, WithSimd};

use leank_core::{Dtype, widen_f16};

/// Converts little-endian `bytes` into `out`; true when every value is finite.
///
/// # Panics
/// When the lengths do not fit.
pub(super) fn read(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    assert_eq!(bytes.len(), out.len() * dtype.bytes(), "bytes of a range of a dump");
    Arch::new().dispatch(Read { dtype, bytes, out })
}

struct Read<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    out: &'a mut [f32],
}

impl WithSimd for Read<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> bool {
        match self.dtype {
            Dtype::F32 => convert(self.bytes, self.out, |b: [u8; 4]| f32::from_le_bytes(b)),
            Dtype::F16 => {
                convert(self.bytes, self.out, |b: [u8; 2]| widen_f16(f16::from_le_bytes(b)))
            }
            Dtype::Bf16 => convert(self.bytes, self.out, |b: [u8; 2]| {
                f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)
            }),
        }
    }
}

#[inline(always)]
fn convert<const B: usize>(bytes: &[u8], out: &mut [f32], to: impl Fn([u8; B]) -> f32) -> bool {
    let mut largest = 0u32;
    let (elements, _) = bytes.as_chunks::<B>();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = to(element);
        largest = largest.max(out.to_bits() & 0x7fff_ffff);
    }
    largest < 0x7f80_0000
}

/// Appends `values` to `out` as little-endian elements; the index of the first one that is not
/// finite after conversion, if any.
pub(super) fn write(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
    let mut bad = None;
    let mut note = |i: usize, finite: bool| {
        if !finite && bad.is_none() {
            bad = Some(i);
        }
    };
    for (i, &value) in values.iter().enumerate() {
        match dtype {
            Dtype::F32 => {
                note(i, value.is_finite());
                out.extend_from_slice(&value.to_le_bytes());
            }
            Dtype::F16 => {
                let half = f16::from_f32(value);
                note(i, half.is_finite());
                out.extend_from_slice(&half.to_le_bytes());
            }
            Dtype::Bf16 => {
                let half = bf16::from_f32(value);
                note(i, half.is_finite());
                out.extend_from_slice(&half.to_le_bytes());
            }
        }
    }
    bad.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every half converts as the `half` crate converts it.
    #[test]
    fn all_halves_convert() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = all.iter().flat_map(|h| h.to_le_bytes()).collect();
        let mut out = vec![0.0; all.len()];
        for (dtype, expected) in [
            (Dtype::F16, (|h| f16::from_bits(h).to_f32()) as fn(u16) -> f32),
            (Dtype::Bf16, |h| bf16::from_bits(h).to_f32()),
        ] {
            assert!(!read(dtype, &bytes, &mut out), "{dtype} has values that are not finite");
            for (&h, &found) in all.iter().zip(&out) {
                let expected = expected(h);
                let same = expected.to_bits() == found.to_bits();
                assert!(same || expected.is_nan() && found.is_nan(), "{dtype} {h:#x}: {found}");
            }
        }
    }

    #[test]
    fn finiteness_is_told() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                let mut bytes = Vec::new();
                assert_eq!(write(dtype, &[0.0, 1.5, bad, bad], &mut bytes), Err(2));
                let mut out = [0.0; 4];
                assert!(!read(dtype, &bytes, &mut out), "{bad} as {dtype}");
                assert!(read(dtype, &bytes[..2 * dtype.bytes()], &mut out[..2]));
                assert_eq!(out[..2], [0.0, 1.5]);
            }
        }
        // Overflow of f16, which bf16 holds.
        assert_eq!(write(Dtype::F16, &[7e4], &mut Vec::new()), Err(0));
        assert_eq!(write(Dtype::Bf16, &[7e4], &mut Vec::new()), Ok(()));
    }
}
