//! Products with quantized rows as GGUF files hold them.
//!
//! Activations stay f32, or for a few tokens on CPUs with AVX2 take [16 bits](avx2), so these products are
//! those of the widened weights; candle's quantize activations to 8 bits, and go through most types byte
//! by byte on such CPUs. A part of 32 weights is `factor * q + offset` each, and
//! `Σ (factor q + offset) x = factor Σ q x + offset Σ x`, where `Σ x` is the same for every row.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // one call, behind a check of the CPU's features
mod avx2;

use std::borrow::Cow;
use std::sync::{LazyLock, Mutex, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, CustomOp1, Layout, Result as CandleResult, Shape};
use leank_cpu::Executor as _;
use pulp::Arch;
use rayon::prelude::*;

use crate::executor::Threads;
use crate::gemm::{self, MatRef, matmul};
use crate::ops::contiguous;

static ARCH: LazyLock<Arch> = LazyLock::new(Arch::new);

/// Weights of a part.
const BLOCK: usize = 32;

/// Fewest weights of a parallel task: a microsecond and more.
const TASK: usize = 1 << 15;
/// Tasks for each thread, where there are weights enough: a thread that is late holds up none.
const TASKS: usize = 8;

/// Rows that are widened at once for a prompt, and from how many tokens on: below, reading the rows
/// as they are for each token is less work.
const WIDE_ROWS: usize = 64;
const PROMPT: usize = 4;

/// A part of weights `factor * q + offset`; `q` of its first half and of its second.
struct Block {
    factor: f32,
    offset: f32,
    low: [f32; BLOCK / 2],
    high: [f32; BLOCK / 2],
}

/// A finite f16: inline and without branches, where `half` asks for the CPU's features each time.
#[inline(always)]
fn f16(low: u8, high: u8) -> f32 {
    let bits = i32::from(i16::from_le_bytes([low, high])) << 13;
    // Sign, exponent, mantissa; the biases of the exponents differ by 112.
    f32::from_bits(bits as u32 & 0x8fff_e000) * f32::from_bits(0x7780_0000)
}

/// Weights of 4 bits, the second half in the high bits of each byte.
#[inline(always)]
fn nibbles(bytes: &[u8; 16]) -> ([f32; 16], [f32; 16]) {
    let halves = |shift: u32| bytes.map(|byte| i32::from(byte >> shift & 15) as f32);
    (halves(0), halves(4))
}

/// Weights of 5 bits, whose highest ones are the bits of `top`.
#[inline(always)]
fn five_bits(bytes: &[u8; 16], top: [u8; 4]) -> ([f32; 16], [f32; 16]) {
    let top = u32::from_le_bytes(top);
    let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
    for j in 0..16 {
        let byte = u32::from(bytes[j]);
        low[j] = (byte & 15 | (top >> j & 1) << 4) as i32 as f32;
        high[j] = (byte >> 4 | (top >> (j + 16) & 1) << 4) as i32 as f32;
    }
    (low, high)
}

#[inline(always)]
fn q4_0(block: &[u8; 18], _: usize) -> Block {
    let [d0, d1, q @ ..] = block;
    let (low, high) = nibbles(q);
    let factor = f16(*d0, *d1);
    Block { factor, offset: -8.0 * factor, low, high }
}

#[inline(always)]
fn q4_1(block: &[u8; 20], _: usize) -> Block {
    let [d0, d1, m0, m1, q @ ..] = block;
    let (low, high) = nibbles(q);
    Block { factor: f16(*d0, *d1), offset: f16(*m0, *m1), low, high }
}

#[inline(always)]
fn q5_0(block: &[u8; 22], _: usize) -> Block {
    let [d0, d1, t0, t1, t2, t3, q @ ..] = block;
    let (low, high) = five_bits(q, [*t0, *t1, *t2, *t3]);
    let factor = f16(*d0, *d1);
    Block { factor, offset: -16.0 * factor, low, high }
}

#[inline(always)]
fn q5_1(block: &[u8; 24], _: usize) -> Block {
    let [d0, d1, m0, m1, t0, t1, t2, t3, q @ ..] = block;
    let (low, high) = five_bits(q, [*t0, *t1, *t2, *t3]);
    Block { factor: f16(*d0, *d1), offset: f16(*m0, *m1), low, high }
}

#[inline(always)]
fn q8_0(block: &[u8; 34], _: usize) -> Block {
    let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
    for j in 0..16 {
        low[j] = f32::from(block[2 + j] as i8);
        high[j] = f32::from(block[18 + j] as i8);
    }
    Block { factor: f16(block[0], block[1]), offset: 0.0, low, high }
}

/// Factor and offset of a part, of 6 bits each, in units of the whole's, which the block begins with.
#[inline(always)]
fn factor_and_offset(head: &[u8], part: usize) -> (f32, f32) {
    let scales = &head[4..16];
    let (factor, offset) = if part < 4 {
        (scales[part] & 63, scales[part + 4] & 63)
    } else {
        let both = scales[part + 4];
        (both & 15 | scales[part - 4] >> 6 << 4, both >> 4 | scales[part] >> 6 << 4)
    };
    (f16(head[0], head[1]) * f32::from(factor), -f16(head[2], head[3]) * f32::from(offset))
}

#[inline(always)]
fn q4_k(block: &[u8; 144], part: usize) -> Block {
    let (factor, offset) = factor_and_offset(block, part);
    let q = &block[16 + part / 2 * 32..][..32];
    let shift = part % 2 * 4;
    let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
    for j in 0..16 {
        low[j] = i32::from(q[j] >> shift & 15) as f32;
        high[j] = i32::from(q[j + 16] >> shift & 15) as f32;
    }
    Block { factor, offset, low, high }
}

#[inline(always)]
fn q5_k(block: &[u8; 176], part: usize) -> Block {
    let (factor, offset) = factor_and_offset(block, part);
    let (top, q) = (&block[16..48], &block[48 + part / 2 * 32..][..32]);
    let shift = part % 2 * 4;
    let weight = |j: usize| i32::from(q[j] >> shift & 15 | (top[j] >> part & 1) << 4) as f32;
    let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
    for j in 0..16 {
        low[j] = weight(j);
        high[j] = weight(j + 16);
    }
    Block { factor, offset, low, high }
}

/// Each half of a part has a scale of its own.
#[inline(always)]
fn q6_k(block: &[u8; 210], part: usize) -> Block {
    let (half, quarter) = (part / 4, part % 4);
    let q = &block[64 * half + quarter % 2 * 32..][..32];
    let top = &block[128 + 32 * half..][..32];
    let scale = |i: usize| f32::from(block[192 + 2 * part + i] as i8);
    let (shift, top_shift) = (quarter / 2 * 4, quarter * 2);
    let weight =
        |j: usize| (i32::from(q[j] >> shift & 15 | (top[j] >> top_shift & 3) << 4) - 32) as f32;
    let (mut low, mut high) = ([0.0; 16], [0.0; 16]);
    for j in 0..16 {
        low[j] = weight(j) * scale(0);
        high[j] = weight(j + 16) * scale(1);
    }
    Block { factor: f16(block[208], block[209]), offset: 0.0, low, high }
}

/// One row of blocks of so many parts times `x`, whose sums over parts are `sums`.
#[inline(always)]
fn dot<const BYTES: usize, const PARTS: usize>(
    row: &[u8],
    (x, sums): (&[f32], &[f32]),
    unpack: impl Fn(&[u8; BYTES], usize) -> Block,
) -> f32 {
    let (mut lanes, mut offsets) = ([0f32; 16], 0f32);
    let x = x.as_chunks::<BLOCK>().0.as_chunks::<PARTS>().0;
    let sums = sums.as_chunks::<PARTS>().0;
    for ((block, x), sums) in row.as_chunks::<BYTES>().0.iter().zip(x).zip(sums) {
        for part in 0..PARTS {
            let Block { factor, offset, low, high } = unpack(block, part);
            let x = &x[part];
            for j in 0..16 {
                let both = low[j].mul_add(x[j], high[j] * x[j + 16]);
                lanes[j] = both.mul_add(factor, lanes[j]);
            }
            offsets = offset.mul_add(sums[part], offsets);
        }
    }
    offsets + lanes.iter().sum::<f32>()
}

/// What is done with rows.
enum Work<'a> {
    /// Times `x` with its sums over parts; one result per row.
    Dots { x: (&'a [f32], &'a [f32]), out: &'a mut [f32] },
    /// Widened to f32.
    Widen(&'a mut [f32]),
}

#[inline(always)]
fn run<const BYTES: usize, const PARTS: usize>(
    bytes: &[u8],
    work: Work<'_>,
    unpack: impl Fn(&[u8; BYTES], usize) -> Block,
) {
    match work {
        Work::Dots { x, out } => {
            let row = x.1.len() / PARTS * BYTES;
            for (out, row) in out.iter_mut().zip(bytes.chunks_exact(row)) {
                *out = dot::<BYTES, PARTS>(row, x, &unpack);
            }
        }
        Work::Widen(out) => {
            let out = out.as_chunks_mut::<BLOCK>().0.as_chunks_mut::<PARTS>().0;
            for (block, out) in bytes.as_chunks::<BYTES>().0.iter().zip(out) {
                for (part, out) in out.iter_mut().enumerate() {
                    let Block { factor, offset, low, high } = unpack(block, part);
                    for j in 0..16 {
                        out[j] = low[j].mul_add(factor, offset);
                        out[j + 16] = high[j].mul_add(factor, offset);
                    }
                }
            }
        }
    }
}

/// Whether rows of this type are multiplied here; candle multiplies the others.
pub(crate) fn is_ours(kind: GgmlDType) -> bool {
    use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    matches!(kind, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4K | Q5K | Q6K)
}

/// Does `work` with rows of a type that [`is_ours`].
fn dispatch(kind: GgmlDType, bytes: &[u8], work: Work<'_>) {
    ARCH.dispatch(
        #[inline(always)]
        || match kind {
            GgmlDType::Q4_0 => run::<18, 1>(bytes, work, q4_0),
            GgmlDType::Q4_1 => run::<20, 1>(bytes, work, q4_1),
            GgmlDType::Q5_0 => run::<22, 1>(bytes, work, q5_0),
            GgmlDType::Q5_1 => run::<24, 1>(bytes, work, q5_1),
            GgmlDType::Q8_0 => run::<34, 1>(bytes, work, q8_0),
            GgmlDType::Q4K => run::<144, 8>(bytes, work, q4_k),
            GgmlDType::Q5K => run::<176, 8>(bytes, work, q5_k),
            GgmlDType::Q6K => run::<210, 8>(bytes, work, q6_k),
            other => unreachable!("{other:?} is candle's"),
        },
    );
}

/// One token's activations, as the rows of this CPU's products want them.
enum Token<'a> {
    #[cfg(target_arch = "x86_64")]
    Rounded(Vec<avx2::Activations>),
    /// As they are, and their sums over parts.
    Whole(&'a [f32], Vec<f32>),
}

impl<'a> Token<'a> {
    fn new(x: &'a [f32]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(x) = avx2::activations(x) {
            return Self::Rounded(x);
        }
        Self::whole(x)
    }

    fn whole(x: &'a [f32]) -> Self {
        Self::Whole(x, x.chunks_exact(BLOCK).map(|part| part.iter().sum()).collect())
    }

    /// `out[row] = row · x`.
    fn dots(&self, kind: GgmlDType, bytes: &[u8], out: &mut [f32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Rounded(x) => avx2::dots(kind, bytes, x, out),
            Self::Whole(x, sums) => dispatch(kind, bytes, Work::Dots { x: (x, sums), out }),
        }
    }
}

/// `y = x Wᵀ` with W `[out, in]` as the file holds it; x `[tokens, in]` f32.
pub(crate) struct Product<'a>(pub(crate) &'a QTensor);

impl Product<'_> {
    /// For a few tokens: each row is read as it is.
    fn rows(&self, bytes: &[u8], x: &[f32], (rows, cols): (usize, usize)) -> Vec<f32> {
        let mut out = vec![0f32; x.len() / cols * rows];
        let task = (TASK / cols).max(rows / (TASKS * Threads.threads())).max(1);
        let row_bytes = bytes.len() / rows;
        for (out, x) in out.chunks_exact_mut(rows).zip(x.chunks_exact(cols)) {
            let token = Token::new(x);
            // Each is locked once, by whoever claims it: what hands out parts knows their numbers only.
            let parts: Vec<_> = out.chunks_mut(task).map(Mutex::new).collect();
            Threads.run(parts.len(), &|i| {
                let mut out = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
                let bytes = &bytes[i * task * row_bytes..][..out.len() * row_bytes];
                token.dots(self.0.dtype(), bytes, &mut out);
            });
        }
        out
    }

    /// For a prompt: some rows are widened, then multiplied with all tokens.
    fn widened(&self, bytes: &[u8], x: &[f32], (rows, cols): (usize, usize)) -> Vec<f32> {
        let tokens = x.len() / cols;
        let row_bytes = bytes.len() / rows;
        let tiles: Vec<Vec<f32>> = bytes
            .par_chunks(WIDE_ROWS * row_bytes)
            .map(|bytes| {
                let rows = bytes.len() / row_bytes;
                let mut wide = vec![0f32; rows * cols];
                dispatch(self.0.dtype(), bytes, Work::Widen(&mut wide));
                let mut out = vec![0f32; tokens * rows];
                let wide = MatRef::new(&wide, rows, cols).t();
                matmul(MatRef::new(x, tokens, cols), wide, &mut out, gemm::Threads::One);
                out
            })
            .collect();
        let mut out = vec![0f32; tokens * rows];
        for (token, out) in out.chunks_exact_mut(rows).enumerate() {
            for (tile, out) in tiles.iter().zip(out.chunks_mut(WIDE_ROWS)) {
                out.copy_from_slice(&tile[token * out.len()..][..out.len()]);
            }
        }
        out
    }
}

impl CustomOp1 for Product<'_> {
    fn name(&self) -> &'static str {
        "quantized-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (rows, cols) = self.0.shape().dims2()?;
        let (tokens, width) = layout.shape().dims2()?;
        if width != cols || rows == 0 || cols == 0 {
            candle_core::bail!("quantized linear layer of {rows} x {cols}: found rows of {width}")
        }
        let x = contiguous(x, layout)?;
        let bytes: Cow<'_, [u8]> = self.0.data()?;
        let product = if tokens < PROMPT { Self::rows } else { Self::widened };
        let out = product(self, &bytes, x, (rows, cols));
        Ok((CpuStorage::F32(out), Shape::from((tokens, rows))))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use leank_train::rng::Rng;

    use super::*;

    use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    const KINDS: [GgmlDType; 8] = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K];

    #[test]
    fn products_are_those_of_the_widened_weights() {
        let mut rng = Rng::new(1);
        let mut random = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|_| rng.normal() as f32).collect();
            Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
        };
        for kind in KINDS {
            assert!(is_ours(kind));
            // Several tasks and tiles, none of them full at the end; an odd number of blocks.
            for (rows, blocks) in [(1, 1), (167, 3), (1500, 2)] {
                let cols = blocks * kind.block_size();
                let weight = QTensor::quantize(&random(rows, cols), kind).unwrap();
                let wide = weight.dequantize(&Device::Cpu).unwrap();
                for tokens in [1, PROMPT - 1, PROMPT, 33] {
                    let x = random(tokens, cols);
                    let got = x.apply_op1_no_bwd(&Product(&weight)).unwrap();
                    let got = got.to_vec2::<f32>().unwrap();
                    let want = x.matmul(&wide.t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
                    for (got, want) in got.concat().into_iter().zip(want.concat()) {
                        // Activations in 16 bits are off by 5e-5, hundreds of times.
                        let bound = if tokens < PROMPT { 2e-3 } else { 1e-4 };
                        let near = (got - want).abs() < bound * (1.0 + want.abs());
                        assert!(near, "{kind:?}, {rows} x {cols}, {tokens}: {got} and {want}");
                    }
                }
            }
        }
    }

    /// Every code that a file can hold, with and without what this CPU has, against f64.
    #[test]
    fn rows_of_any_bytes_are_multiplied_in_every_way() {
        let mut rng = Rng::new(2);
        for kind in KINDS {
            // The places of a block's f16 numbers, of which infinities and NaN are taken out.
            let halves: &[usize] = match kind {
                Q4_0 | Q5_0 | Q8_0 => &[0],
                Q6K => &[208],
                _ => &[0, 2],
            };
            for (rows, blocks) in [(1, 1), (6, 2), (7, 5)] {
                let cols = blocks * kind.block_size();
                let mut bytes: Vec<u8> =
                    (0..rows * blocks * kind.type_size()).map(|_| rng.below(256) as u8).collect();
                for block in bytes.chunks_exact_mut(kind.type_size()) {
                    for at in halves {
                        block[at + 1] &= 0xbf;
                    }
                }
                let mut wide = vec![0f32; rows * cols];
                dispatch(kind, &bytes, Work::Widen(&mut wide));
                let mut x: Vec<f32> = (0..cols).map(|_| rng.normal() as f32).collect();
                // A large activation, as real models have, and a part without any.
                x[cols - 1] = 1e4;
                x[..BLOCK].fill(0.0);
                for token in [Token::new(&x), Token::whole(&x)] {
                    let mut out = vec![f32::NAN; rows];
                    token.dots(kind, &bytes, &mut out);
                    for (row, got) in wide.chunks_exact(cols).zip(out) {
                        let terms = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                        // Half a step of 16 bits, 32 times, in the worst case.
                        let bound: f64 = (row.chunks(BLOCK).zip(x.chunks(BLOCK)))
                            .map(|(w, x)| f64::from(largest(w)) * f64::from(largest(x)))
                            .sum();
                        let error = (terms.sum::<f64>() - f64::from(got)).abs();
                        assert!(
                            error <= 6e-4 * bound,
                            "{kind:?}, {rows} x {cols}: {error}, {bound}"
                        );
                    }
                }
            }
        }
    }

    fn largest(values: &[f32]) -> f32 {
        values.iter().fold(0.0, |largest, value| value.abs().max(largest))
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 256];
            x[77] = bad;
            for kind in KINDS {
                let bytes = vec![1; 256 / kind.block_size() * kind.type_size()];
                for token in [Token::new(&x), Token::whole(&x)] {
                    let mut out = [0.0];
                    token.dots(kind, &bytes, &mut out);
                    assert!(!out[0].is_finite(), "{kind:?}, {bad}: {out:?}");
                }
            }
        }
    }

    #[test]
    fn factors_are_read_as_half_reads_them() {
        for bits in (0..=u16::MAX).filter(|bits| bits & 0x7c00 != 0x7c00) {
            let [low, high] = bits.to_le_bytes();
            assert_eq!(f16(low, high).to_bits(), half::f16::from_bits(bits).to_f32().to_bits());
        }
    }
}
