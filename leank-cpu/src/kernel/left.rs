//! The left side of products: queries for K, weights for V.

use half::bf16;

use super::simd::{MAX_LANES, Simd};
use crate::element::Element;

/// An element of the left side of a product.
pub(crate) trait Factor: Element {
    /// `2^r` on ±½, highest power first: the polynomials with the least relative error among those
    /// that are exact at 0.
    const EXP2: &'static [f32];

    /// Writes `S::LANES` elements, rounded.
    ///
    /// # Safety
    /// `to` is writable for that many.
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, x: S::F32);

    /// Rounds up to [`MAX_LANES`] elements.
    ///
    /// # Panics
    /// When there are more.
    #[inline(always)]
    fn round<S: Simd>(simd: S, from: &[f32]) -> [Self; MAX_LANES] {
        let mut wide = [0.0; MAX_LANES];
        wide[..from.len()].copy_from_slice(from);
        let mut rounded = [Self::narrow(0.0); MAX_LANES];
        for (from, to) in wide.chunks_exact(S::LANES).zip(rounded.chunks_exact_mut(S::LANES)) {
            // SAFETY: both chunks have `LANES` elements.
            let x = unsafe { simd.load(from.as_ptr()) };
            // SAFETY: as above.
            unsafe { Self::store(simd, to.as_mut_ptr(), x) };
        }
        rounded
    }
}

impl Factor for f32 {
    /// Error 9e-8.
    #[expect(
        clippy::approx_constant,
        reason = "what minimises the error is near ln 2, not equal to it"
    )]
    const EXP2: &'static [f32] =
        &[1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut f32, x: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store(to, x) }
    }
}

impl Factor for bf16 {
    /// Error 1e-4, a twentieth of what rounding adds.
    const EXP2: &'static [f32] = &[5.500_893_3e-2, 0.242_210_97, 0.693_282_9, 1.0];

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut bf16, x: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_bf16(to, x) }
    }
}
