//! Products with quantized rows where the CPU has AVX2: activations in 16 bits, integer products.
//!
//! 32 activations share a scale, so each is off by at most 2^-16 of the largest: a thousandth of what
//! the weights' own rounding costs, where 8 bits, as llama.cpp and candle take them, are off by 2^-8.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use bytemuck::cast;
use candle_core::quantized::GgmlDType;

use super::{BLOCK, f16, factor_and_offset};

static AVX2: LazyLock<bool> =
    LazyLock::new(|| is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));

/// What a number below 2^22 is added to, so that its whole part stands in the lowest bits: 1.5 · 2^23.
const ROUND: f32 = 12_582_912.0;

/// A part of 32 activations, `scale * values`.
pub(super) struct Activations {
    values: [[i16; BLOCK / 2]; 2],
    scale: f32,
    /// Sum of what `values` stand for.
    total: f32,
}

impl Activations {
    /// A value that is NaN or infinite makes every product with its part NaN.
    fn round(x: &[f32; BLOCK]) -> Self {
        let largest = x.iter().fold(0f32, |largest, &x| {
            let x = x.abs();
            if x > largest || x.is_nan() { x } else { largest } // NaN stays
        });
        let scale = largest / f32::from(i16::MAX);
        // All zero, or so small that its scale is.
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let whole = x.map(|x| (x * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32);
        let total = whole.iter().fold(0i32, |sum, value| sum.wrapping_add(*value)) as f32 * scale;
        let (halves, _) = whole.as_chunks::<{ BLOCK / 2 }>();
        let narrow = |half: &[i32; BLOCK / 2]| half.map(|value| value as i16);
        Self { values: [narrow(&halves[0]), narrow(&halves[1])], scale, total }
    }
}

/// The activations of one token, or `None` where this CPU has no AVX2.
pub(super) fn activations(x: &[f32]) -> Option<Vec<Activations>> {
    AVX2.then(|| {
        let parts = x.as_chunks::<BLOCK>().0;
        super::ARCH.dispatch(
            #[inline(always)]
            || parts.iter().map(Activations::round).collect(),
        )
    })
}

/// `out[row] = row · x` for rows of a type that [`is_ours`](super::is_ours).
pub(super) fn dots(kind: GgmlDType, bytes: &[u8], x: &[Activations], out: &mut [f32]) {
    assert!(*AVX2, "activations of 16 bits are for AVX2");
    // SAFETY: the CPU has AVX2 and FMA, as was just asserted.
    #[allow(unsafe_code)]
    unsafe {
        with_avx2(kind, bytes, x, out);
    }
}

#[target_feature(enable = "avx2,fma")]
fn with_avx2(kind: GgmlDType, bytes: &[u8], x: &[Activations], out: &mut [f32]) {
    // Closures, since a function with features of its own is no `Fn`.
    match kind {
        GgmlDType::Q4_0 => rows(bytes, x, out, |block, x, sum| q4_0(block, x, sum)),
        GgmlDType::Q4_1 => rows(bytes, x, out, |block, x, sum| q4_1(block, x, sum)),
        GgmlDType::Q5_0 => rows(bytes, x, out, |block, x, sum| q5_0(block, x, sum)),
        GgmlDType::Q5_1 => rows(bytes, x, out, |block, x, sum| q5_1(block, x, sum)),
        GgmlDType::Q8_0 => rows(bytes, x, out, |block, x, sum| q8_0(block, x, sum)),
        GgmlDType::Q4K => rows(bytes, x, out, |block, x, sum| q4_k(block, x, sum)),
        GgmlDType::Q5K => rows(bytes, x, out, |block, x, sum| q5_k(block, x, sum)),
        GgmlDType::Q6K => rows(bytes, x, out, |block, x, sum| q6_k(block, x, sum)),
        other => unreachable!("{other:?} is candle's"),
    }
}

/// One row after the other, as memory is read ahead best; blocks go to two sums in turns, since one
/// addition would wait for the other.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn rows<const BYTES: usize, const PARTS: usize>(
    bytes: &[u8],
    x: &[Activations],
    out: &mut [f32],
    add: impl Fn(&[u8; BYTES], &[Activations; PARTS], &mut Sum),
) {
    let x = x.as_chunks::<PARTS>().0;
    let (x_pairs, x_last) = x.as_chunks::<2>();
    let rows = bytes.as_chunks::<BYTES>().0.chunks_exact(x.len());
    for (row, out) in rows.zip(out) {
        let (pairs, last) = row.as_chunks::<2>();
        let (mut even, mut odd) = (Sum::new(), Sum::new());
        for ([first, second], [x_first, x_second]) in pairs.iter().zip(x_pairs) {
            add(first, x_first, &mut even);
            add(second, x_second, &mut odd);
        }
        for (block, x) in last.iter().zip(x_last) {
            add(block, x, &mut even);
        }
        *out = even.whole() + odd.whole();
    }
}

/// What has been added up of a row.
struct Sum {
    lanes: __m256,
    offsets: f32,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn new() -> Self {
        Self { lanes: _mm256_setzero_ps(), offsets: 0.0 }
    }

    /// Adds `factor * weights · x`. No lane overflows: four products, each below 2^7 · 2^15.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn add(&mut self, weights: __m256i, x: &Activations, factor: f32) {
        let [low, high] = products(weights, x);
        self.scaled(_mm256_add_epi32(low, high), factor * x.scale);
    }

    /// The same with a factor for each half of the weights.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn add_halves(&mut self, weights: __m256i, x: &Activations, factors: [f32; 2]) {
        let [low, high] = products(weights, x);
        self.scaled(low, factors[0] * x.scale);
        self.scaled(high, factors[1] * x.scale);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn scaled(&mut self, products: __m256i, factor: f32) {
        self.lanes =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), _mm256_set1_ps(factor), self.lanes);
    }

    /// Adds `offset * Σ x`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn add_offset(&mut self, offset: f32, x: &Activations) {
        self.offsets = offset.mul_add(x.total, self.offsets);
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn whole(self) -> f32 {
        let lanes: [f32; 8] = cast(self.lanes);
        lanes.iter().sum::<f32>() + self.offsets
    }
}

/// 32 weights of 8 bits times activations, added up in pairs, for each half.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn products(weights: __m256i, x: &Activations) -> [__m256i; 2] {
    let [low, high] = x.values.map(cast);
    [
        _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(weights)), low),
        _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(weights)), high),
    ]
}

/// 32 numbers of 4 bits, the second half in the high bits of each byte.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn nibbles(bytes: &[u8]) -> __m256i {
    let low: __m128i = bytemuck::pod_read_unaligned(bytes);
    low_bits(_mm256_set_m128i(_mm_srli_epi16::<4>(low), low))
}

/// The lower 4 bits of each byte.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn low_bits(bytes: __m256i) -> __m256i {
    _mm256_and_si256(bytes, _mm256_set1_epi8(15))
}

/// The upper 4 bits of each byte.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn high_bits(bytes: __m256i) -> __m256i {
    low_bits(_mm256_srli_epi16::<4>(bytes))
}

/// All bits of byte `j` set where bit `j` of `bits` is.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn spread(bits: &[u8]) -> __m256i {
    let bits = _mm256_set1_epi32(i32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]));
    let byte =
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(bits, byte), bit), bit)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q4_0(block: &[u8; 18], [x]: &[Activations; 1], sum: &mut Sum) {
    let weights = _mm256_sub_epi8(nibbles(&block[2..]), _mm256_set1_epi8(8));
    sum.add(weights, x, f16(block[0], block[1]));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q4_1(block: &[u8; 20], [x]: &[Activations; 1], sum: &mut Sum) {
    sum.add(nibbles(&block[4..]), x, f16(block[0], block[1]));
    sum.add_offset(f16(block[2], block[3]), x);
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q5_0(block: &[u8; 22], [x]: &[Activations; 1], sum: &mut Sum) {
    // Without its highest bit a weight is 16 less: as a signed byte, the upper bits of -16.
    let less = _mm256_andnot_si256(spread(&block[2..6]), _mm256_set1_epi8(-16));
    let weights = _mm256_or_si256(nibbles(&block[6..]), less);
    sum.add(weights, x, f16(block[0], block[1]));
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q5_1(block: &[u8; 24], [x]: &[Activations; 1], sum: &mut Sum) {
    let top = _mm256_and_si256(spread(&block[4..8]), _mm256_set1_epi8(16));
    let weights = _mm256_or_si256(nibbles(&block[8..]), top);
    sum.add(weights, x, f16(block[0], block[1]));
    sum.add_offset(f16(block[2], block[3]), x);
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q8_0(block: &[u8; 34], [x]: &[Activations; 1], sum: &mut Sum) {
    sum.add(bytemuck::pod_read_unaligned(&block[2..]), x, f16(block[0], block[1]));
}

/// Factors of the parts of a block whose first 16 bytes hold them; adds what their offsets give.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn factors(head: &[u8], x: &[Activations; 8], sum: &mut Sum) -> [f32; 8] {
    let mut factors = [0.0; 8];
    for (part, (factor, x)) in factors.iter_mut().zip(x).enumerate() {
        let offset;
        (*factor, offset) = factor_and_offset(head, part);
        sum.add_offset(offset, x);
    }
    factors
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q4_k(block: &[u8; 144], x: &[Activations; 8], sum: &mut Sum) {
    let factors = factors(block, x, sum);
    for pair in 0..4 {
        let q = bytemuck::pod_read_unaligned(&block[16 + 32 * pair..][..32]);
        sum.add(low_bits(q), &x[2 * pair], factors[2 * pair]);
        sum.add(high_bits(q), &x[2 * pair + 1], factors[2 * pair + 1]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q5_k(block: &[u8; 176], x: &[Activations; 8], sum: &mut Sum) {
    let factors = factors(block, x, sum);
    // The bits of the part at hand are the lowest.
    let mut top: __m256i = bytemuck::pod_read_unaligned(&block[16..48]);
    for pair in 0..4 {
        let q = bytemuck::pod_read_unaligned(&block[48 + 32 * pair..][..32]);
        for (part, q) in [low_bits(q), high_bits(q)].into_iter().enumerate() {
            let bit = _mm256_and_si256(_mm256_slli_epi16::<4>(top), _mm256_set1_epi8(16));
            sum.add(_mm256_or_si256(q, bit), &x[2 * pair + part], factors[2 * pair + part]);
            top = _mm256_srli_epi16::<1>(top);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn q6_k(block: &[u8; 210], x: &[Activations; 8], sum: &mut Sum) {
    let factor = f16(block[208], block[209]);
    for half in 0..2 {
        let read = |at: usize| bytemuck::pod_read_unaligned::<__m256i>(&block[at..][..32]);
        let (first, second) = (read(64 * half), read(64 * half + 32));
        let mut top = read(128 + 32 * half);
        let quarters = [low_bits(first), low_bits(second), high_bits(first), high_bits(second)];
        for (quarter, q) in quarters.into_iter().enumerate() {
            let bits = _mm256_and_si256(_mm256_slli_epi16::<4>(top), _mm256_set1_epi8(48));
            let weights = _mm256_sub_epi8(_mm256_or_si256(q, bits), _mm256_set1_epi8(32));
            let part = 4 * half + quarter;
            let scale = |i: usize| factor * f32::from(block[192 + 2 * part + i] as i8);
            sum.add_halves(weights, &x[part], [scale(0), scale(1)]);
            top = _mm256_srli_epi16::<2>(top);
        }
    }
}
