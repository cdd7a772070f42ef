//! The product that both halves of attention are: `out[r, lane] (+)= Σ_d left[r, d] · right[d, lane]`.
//!
//! For logits, `left` is the queries, the depth runs over the stored channels of K and the lanes
//! are the tokens of a block; for the weighted sum of V, `left` is the weights, the depth runs over
//! tokens and the lanes are channels. Either way the lanes lie side by side in memory, so there are
//! no sums across a vector, and each element of K and V is loaded and widened once for all rows of
//! the group.

use half::{bf16, f16};

use super::simd::Simd;
use crate::{
    element::Element,
    panels::{PANEL, Panels},
};

/// Most rows that one pass over a panel takes.
const MAX_ROWS: usize = 8;

/// How vectors of one stored type are multiplied.
pub(crate) trait Lanes<S: Simd>: Copy {
    /// Element in storage.
    type Stored: Element;
    /// Element of the left side.
    type Left: Copy + Into<f32>;
    /// A loaded vector of stored elements.
    type Wide: Copy;
    /// A broadcast element (or pair) of the left side.
    type Factor: Copy;
    /// Elements along the depth that lie side by side: 2 where lanes hold pairs.
    const STEP: usize;
    /// Registers that a loaded vector takes.
    const VECTORS: usize;

    /// Loads `S::LANES` lanes.
    ///
    /// # Safety
    /// `from` is readable for `S::LANES · STEP` elements.
    unsafe fn load(simd: S, from: *const Self::Stored) -> Self::Wide;

    /// Broadcasts the left side of one step.
    ///
    /// # Safety
    /// `from` is readable for `STEP` elements.
    unsafe fn factor(simd: S, from: *const Self::Left) -> Self::Factor;

    /// `sum + factor · wide`, summed over the step.
    fn mul_add(simd: S, factor: Self::Factor, wide: Self::Wide, sum: S::F32) -> S::F32;
}

/// Single precision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32s;

/// Half precision, widened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F16s;

/// Pairs of bf16, widened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bf16Pairs;

/// Elements that stand alone in their lane.
macro_rules! plain_lanes {
    ($lanes:ty, $stored:ty, $load:ident) => {
        impl<S: Simd> Lanes<S> for $lanes {
            type Stored = $stored;
            type Left = f32;
            type Wide = S::F32;
            type Factor = S::F32;
            const STEP: usize = 1;
            const VECTORS: usize = 1;

            #[inline(always)]
            unsafe fn load(simd: S, from: *const $stored) -> S::F32 {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from) }
            }

            #[inline(always)]
            unsafe fn factor(simd: S, from: *const f32) -> S::F32 {
                // SAFETY: the caller's promise.
                simd.splat(unsafe { *from })
            }

            #[inline(always)]
            fn mul_add(simd: S, factor: S::F32, wide: S::F32, sum: S::F32) -> S::F32 {
                simd.mul_add(factor, wide, sum)
            }
        }
    };
}
plain_lanes!(F32s, f32, load);
plain_lanes!(F16s, f16, load_f16);

impl<S: Simd> Lanes<S> for Bf16Pairs {
    type Stored = bf16;
    type Left = f32;
    type Wide = [S::F32; 2];
    type Factor = [S::F32; 2];
    const STEP: usize = 2;
    const VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn load(simd: S, from: *const bf16) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16_pairs(from) }
    }

    #[inline(always)]
    unsafe fn factor(simd: S, from: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        let [even, odd] = unsafe { *from.cast::<[f32; 2]>() };
        [simd.splat(even), simd.splat(odd)]
    }

    #[inline(always)]
    fn mul_add(simd: S, factor: [S::F32; 2], wide: [S::F32; 2], sum: S::F32) -> S::F32 {
        simd.mul_add(factor[1], wide[1], simd.mul_add(factor[0], wide[0], sum))
    }
}

/// The arguments of a product.
pub(crate) struct Product<'a, L, T> {
    /// `[rows, left_stride]`
    pub(crate) left: &'a [L],
    /// Elements from one row of `left` to the next.
    pub(crate) left_stride: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Depth to run over, from the start; the left side holds zeros up to a whole step.
    pub(crate) depth: usize,
    /// The right side.
    pub(crate) right: Panels<'a, T>,
    /// Lanes that are wanted, from the start. Others may be written with anything.
    pub(crate) lanes: usize,
    /// `[rows, out_stride]`
    pub(crate) out: &'a mut [f32],
    /// Elements from one row of `out` to the next.
    pub(crate) out_stride: usize,
    /// Whether the product is added to `out`, or replaces it.
    pub(crate) accumulate: bool,
}

/// Where one pass reads and writes.
struct Pass<L, T> {
    left: *const L,
    left_stride: usize,
    right: *const T,
    /// Stored elements from one step to the next.
    right_stride: usize,
    steps: usize,
    out: *mut f32,
    out_stride: usize,
    accumulate: bool,
}

/// The product.
///
/// # Panics
/// When a slice is shorter than its shape says.
#[inline(always)]
pub(crate) fn product<S: Simd, L: Lanes<S>>(simd: S, args: Product<'_, L::Left, L::Stored>) {
    let Product { left, left_stride, rows, depth, right, lanes, out, out_stride, accumulate } =
        args;
    let steps = depth.div_ceil(L::STEP);
    assert!(steps * L::STEP <= right.depth && lanes <= right.lanes, "right side is too small");
    assert!(right.data.len() >= right.depth * right.lanes, "right side is too short");
    assert!(left.len() >= (rows - 1) * left_stride + steps * L::STEP, "left side is too short");
    assert!(out.len() >= (rows - 1) * out_stride + right.lanes, "output is too short");

    for first in (0..lanes).step_by(PANEL) {
        let width = PANEL.min(right.lanes - first);
        let panel = right.panel(first);
        let mut row = 0;
        while row < rows {
            let some = (rows - row).min(MAX_ROWS);
            let mut lane = 0;
            while lane + S::LANES <= width && first + lane < lanes {
                let vectors = (width - lane) / S::LANES;
                let pass = Pass {
                    left: left[row * left_stride..].as_ptr(),
                    left_stride,
                    right: panel[lane * L::STEP..].as_ptr(),
                    right_stride: width * L::STEP,
                    steps,
                    out: out[row * out_stride + first + lane..].as_mut_ptr(),
                    out_stride,
                    accumulate,
                };
                // SAFETY: the assertions above and the loop's conditions keep every row, step and
                // vector inside the slices.
                lane += S::LANES * unsafe { pass_rows::<S, L>(simd, pass, some, vectors) };
            }
            // What is left of a width that is no multiple of a vector.
            for lane in lane..width.min(lanes - first) {
                for r in row..row + some {
                    let left = &left[r * left_stride..][..depth];
                    let element = |d: usize| {
                        panel[(d / L::STEP * width + lane) * L::STEP + d % L::STEP].widen()
                    };
                    let dot: f32 =
                        left.iter().enumerate().map(|(d, &x)| x.into() * element(d)).sum();
                    let out = &mut out[r * out_stride + first + lane];
                    *out = if accumulate { *out + dot } else { dot };
                }
            }
            row += some;
        }
    }
}

/// Runs one pass over up to `vectors` vectors of lanes for `rows` rows; returns how many it took.
///
/// # Safety
/// As [`pass`].
#[inline(always)]
unsafe fn pass_rows<S: Simd, L: Lanes<S>>(
    simd: S,
    args: Pass<L::Left, L::Stored>,
    rows: usize,
    vectors: usize,
) -> usize {
    macro_rules! with_rows {
        ($($rows:literal)*) => {
            match rows {
                // SAFETY: the caller's promise.
                $($rows => unsafe { pass_vectors::<S, L, $rows>(simd, args, vectors) },)*
                _ => unreachable!("at most {MAX_ROWS} rows in a pass"),
            }
        };
    }
    with_rows!(1 2 3 4 5 6 7 8)
}

/// # Safety
/// As [`pass`].
#[inline(always)]
unsafe fn pass_vectors<S: Simd, L: Lanes<S>, const R: usize>(
    simd: S,
    args: Pass<L::Left, L::Stored>,
    vectors: usize,
) -> usize {
    let fits = |vectors: usize| (R + L::VECTORS - 1) * vectors <= S::ACCUMULATORS;
    if vectors >= 4 && fits(4) {
        // SAFETY: the caller's promise.
        unsafe { pass::<S, L, R, 4>(simd, args) };
        4
    } else if vectors >= 2 && fits(2) {
        // SAFETY: the caller's promise.
        unsafe { pass::<S, L, R, 2>(simd, args) };
        2
    } else {
        // SAFETY: the caller's promise.
        unsafe { pass::<S, L, R, 1>(simd, args) };
        1
    }
}

/// The inner loop: `R` rows times `V` vectors of accumulators in registers.
///
/// # Safety
/// For every row `r < R` and step `s`, `left` is readable at `r · left_stride + s · STEP` for `STEP`
/// elements, `right` at `s · right_stride` for `V · LANES · STEP`, and `out` is writable at
/// `r · out_stride` for `V · LANES`.
#[expect(clippy::needless_range_loop, reason = "rows and vectors index more than the sums")]
#[inline(always)]
unsafe fn pass<S: Simd, L: Lanes<S>, const R: usize, const V: usize>(
    simd: S,
    args: Pass<L::Left, L::Stored>,
) {
    let mut sums = [[simd.splat(0.0); V]; R];
    for step in 0..args.steps {
        // SAFETY: the caller's promise, for this step and each vector.
        let wide: [L::Wide; V] = std::array::from_fn(|v| unsafe {
            L::load(
                simd,
                args.right.wrapping_add(step * args.right_stride + v * S::LANES * L::STEP),
            )
        });
        for r in 0..R {
            // SAFETY: the caller's promise, for this row and step.
            let factor = unsafe {
                L::factor(simd, args.left.wrapping_add(r * args.left_stride + step * L::STEP))
            };
            for v in 0..V {
                sums[r][v] = L::mul_add(simd, factor, wide[v], sums[r][v]);
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            let out = args.out.wrapping_add(r * args.out_stride + v * S::LANES);
            let mut sum = sums[r][v];
            if args.accumulate {
                // SAFETY: the caller's promise, for this row and vector.
                sum = simd.add(sum, unsafe { simd.load(out) });
            }
            // SAFETY: as above.
            unsafe { simd.store(out, sum) };
        }
    }
}
