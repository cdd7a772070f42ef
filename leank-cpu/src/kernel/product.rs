//! The product that both halves of attention are: `Σ_d left[r, d] · right[d, lane]`.
//!
//! For logits, `left` is the queries, the depth runs over the stored channels of K and the lanes
//! are the tokens of a block; for the weighted sum of V, `left` is the weights, the depth runs over
//! tokens and the lanes are channels. Either way the lanes lie side by side in memory, so there are
//! no sums across a vector, and each element of K and V is loaded and widened once for all rows of
//! the group.

use half::{bf16, f16};

use super::{
    Engine, Loops,
    left::Factor,
    simd::{MAX_LANES, Simd},
};
use crate::{element::Element, panels::PANEL, prefetch::Prefetch, running::Line};

/// Most rows that one pass over a panel takes.
const MAX_ROWS: usize = 8;

/// How vectors of one stored type are multiplied.
pub(crate) trait Lanes<S: Simd>: Copy {
    /// What a lane has of a step in storage.
    type Group: bytemuck::Pod;
    /// Element of the left side.
    type Left: bytemuck::Pod;
    /// A vector of sums.
    type Sum: Copy;
    /// A loaded vector of stored elements.
    type Wide: Copy;
    /// A broadcast element (or pair) of the left side.
    type Splat: Copy;
    /// Elements along the depth in a step: 2 where lanes hold pairs.
    const STEP: usize;
    /// Registers that a loaded vector takes.
    const VECTORS: usize;
    /// Registers that a vector of sums takes.
    const SUMS: usize = 1;

    /// Loads `S::LANES` lanes.
    ///
    /// # Safety
    /// `from` is readable for `S::LANES` groups.
    unsafe fn load(simd: S, from: *const Self::Group) -> Self::Wide;

    /// Broadcasts the left side of one step.
    ///
    /// # Safety
    /// `from` is readable for `STEP` elements.
    unsafe fn splat(simd: S, from: *const Self::Left) -> Self::Splat;

    /// Sums of nothing.
    fn zero(simd: S) -> Self::Sum;

    /// `sum + factor · wide`, summed over the step.
    fn mul_add(simd: S, factor: Self::Splat, wide: Self::Wide, sum: Self::Sum) -> Self::Sum;

    /// Sums in single precision.
    fn finish(simd: S, sum: Self::Sum) -> S::F32;

    /// [`Lanes::mul_add`] for a single lane; there is a factor for each element of the step.
    fn single(factors: &[Self::Left], group: Self::Group, sum: f32) -> f32;
}

/// [`Lanes`] whose sums are in single precision all along.
macro_rules! f32_sums {
    ($S:ty) => {
        type Sum = <$S as Simd>::F32;

        #[inline(always)]
        fn zero(simd: $S) -> Self::Sum {
            simd.splat(0.0)
        }

        #[inline(always)]
        fn finish(_: $S, sum: Self::Sum) -> Self::Sum {
            sum
        }
    };
}
pub(super) use f32_sums;

/// [`Lanes::single`] for plain elements.
#[inline(always)]
pub(super) fn plain_single<L: Factor, T: Element>(factors: &[L], group: T::Group, sum: f32) -> f32 {
    let elements = factors.iter().zip(group.as_ref());
    elements.fold(sum, |sum, (factor, x)| sum + factor.widen() * x.widen())
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
            type Group = [$stored; 1];
            type Left = f32;
            type Wide = S::F32;
            type Splat = S::F32;
            const STEP: usize = 1;
            const VECTORS: usize = 1;
            f32_sums!(S);

            #[inline(always)]
            unsafe fn load(simd: S, from: *const [$stored; 1]) -> S::F32 {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from.cast()) }
            }

            #[inline(always)]
            unsafe fn splat(simd: S, from: *const f32) -> S::F32 {
                // SAFETY: the caller's promise.
                simd.splat(unsafe { *from })
            }

            #[inline(always)]
            fn mul_add(simd: S, factor: S::F32, wide: S::F32, sum: S::F32) -> S::F32 {
                simd.mul_add(factor, wide, sum)
            }

            #[inline(always)]
            fn single(factors: &[f32], group: [$stored; 1], sum: f32) -> f32 {
                plain_single::<_, $stored>(factors, group, sum)
            }
        }
    };
}
plain_lanes!(F32s, f32, load);
plain_lanes!(F16s, f16, load_f16);

impl<S: Simd> Lanes<S> for Bf16Pairs {
    type Group = [bf16; 2];
    type Left = f32;
    type Wide = [S::F32; 2];
    type Splat = [S::F32; 2];
    const STEP: usize = 2;
    const VECTORS: usize = 2;
    f32_sums!(S);

    #[inline(always)]
    unsafe fn load(simd: S, from: *const [bf16; 2]) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16_pairs(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat(simd: S, from: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller's promise.
        let [even, odd] = unsafe { *from.cast::<[f32; 2]>() };
        [simd.splat(even), simd.splat(odd)]
    }

    #[inline(always)]
    fn mul_add(simd: S, factor: [S::F32; 2], wide: [S::F32; 2], sum: S::F32) -> S::F32 {
        simd.mul_add(factor[1], wide[1], simd.mul_add(factor[0], wide[0], sum))
    }

    #[inline(always)]
    fn single(factors: &[f32], group: [bf16; 2], sum: f32) -> f32 {
        plain_single::<_, bf16>(factors, group, sum)
    }
}

/// How the left side lies in memory.
pub(crate) trait Order: Copy {
    /// Elements before those of `row`, the first of a pass.
    fn start(self, row: usize, depth: usize) -> usize;

    /// Elements from there to those of row `row.0` of the pass's `row.1`, at a step of `step_len`
    /// elements.
    fn offset(self, row: (usize, usize), step: usize, step_len: usize) -> usize;
}

/// Row after row, this many elements apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByRow(pub(crate) usize);

impl Order for ByRow {
    #[inline(always)]
    fn start(self, row: usize, _: usize) -> usize {
        row * self.0
    }

    #[inline(always)]
    fn offset(self, (r, _): (usize, usize), step: usize, step_len: usize) -> usize {
        r * self.0 + step * step_len
    }
}

/// In groups of [`MAX_ROWS`] rows, step after step: the factors of a step lie side by side, at
/// addresses that take no computing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByStep;

impl Order for ByStep {
    #[inline(always)]
    fn start(self, row: usize, depth: usize) -> usize {
        row * depth
    }

    #[inline(always)]
    fn offset(self, (r, rows): (usize, usize), step: usize, step_len: usize) -> usize {
        (step * rows + r) * step_len
    }
}

/// Puts a left side in the order [`ByStep`], rounded to its type.
pub(crate) struct ToSteps<'a, W, const STEP: usize> {
    /// `[rows, depth]`, with rows of whole steps.
    pub(crate) from: &'a [f32],
    pub(crate) depth: usize,
    /// At least as long.
    pub(crate) to: &'a mut [W],
}

impl<W: Factor, const STEP: usize> Loops for ToSteps<'_, W, STEP> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { from, depth, to } = self;
        let group = MAX_ROWS * depth;
        for (from, to) in from.chunks(group).zip(to[..from.len()].chunks_mut(group)) {
            let (to, _) = to.as_chunks_mut::<STEP>();
            let rows = from.len() / depth;
            for (r, row) in from.chunks_exact(depth).enumerate() {
                let mut to = to[r..].iter_mut().step_by(rows);
                for values in row.chunks(MAX_LANES) {
                    let rounded = W::round(simd, values);
                    let (steps, _) = rounded[..values.len()].as_chunks::<STEP>();
                    for (step, to) in steps.iter().zip(to.by_ref()) {
                        *to = *step;
                    }
                }
            }
        }
    }
}

/// What will be read after the right side of a product, for it to ask for in time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    prefetch: Prefetch,
    /// Bytes from what is read to what is asked for.
    distance: usize,
    /// Where what is read after the right side ends.
    end: *const u8,
    /// Where reading goes on then.
    next: *const u8,
}

impl Ahead {
    /// While `bytes` are read, in order, and `next` after them.
    pub(crate) fn of(prefetch: Prefetch, bytes: &[u8], next: Option<&[u8]>) -> Self {
        let end = bytes.as_ptr_range().end;
        let next = next.map_or(end, <[u8]>::as_ptr);
        // Hardware prefetchers go on from 2 KiB. Where they are not relied on, from 6 to 12 KiB make no
        // difference (Zen 5); more would push what is used again and again out of the first-level
        // cache.
        let distance = match prefetch {
            Prefetch::Jumps if next == end => 0,
            Prefetch::Jumps => 2 << 10,
            Prefetch::Everything => 8 << 10,
        };
        // Of blocks that are shorter than that, no more than the next one is asked for.
        Self { prefetch, distance: distance.min(bytes.len()), end, next }
    }

    /// What steps that read `bytes` bytes each, the first from `from`, ask for.
    #[inline(always)]
    pub(super) fn of_steps(self, from: *const u8, bytes: usize) -> Asked {
        let here = from.wrapping_add(self.distance);
        let turn = (self.end as usize).saturating_sub(here as usize).div_ceil(bytes);
        let beyond = (here as usize).wrapping_sub(self.end as usize);
        let begin = if self.prefetch == Prefetch::Everything { 0 } else { turn };
        Asked { begin, turn, bytes, here, next: self.next.wrapping_add(beyond) }
    }
}

/// What steps ask for: found out before them, so that they do little else than multiply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// The first step that asks.
    begin: usize,
    /// The first step that asks for what comes next.
    turn: usize,
    /// Bytes from step to step.
    bytes: usize,
    /// What step 0 would ask for before the turn, and after it.
    here: *const u8,
    next: *const u8,
}

impl Asked {
    const NOTHING: Self = Self {
        begin: usize::MAX,
        turn: usize::MAX,
        bytes: 0,
        here: std::ptr::null(),
        next: std::ptr::null(),
    };

    /// What a step asks for.
    #[inline(always)]
    pub(super) fn by(&self, step: usize) -> Option<*const u8> {
        let from = if step < self.turn { self.here } else { self.next };
        (step >= self.begin).then(|| from.wrapping_add(step * self.bytes))
    }
}

/// The right side of a product: panels of groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right<'a, G> {
    pub(crate) data: &'a [G],
    /// Groups of a lane.
    pub(crate) steps: usize,
    /// Lanes of all panels.
    pub(crate) lanes: usize,
}

impl<'a, G> Right<'a, G> {
    /// The panel that begins with lane `first`, a multiple of [`PANEL`].
    fn panel(&self, first: usize) -> &'a [G] {
        let width = PANEL.min(self.lanes - first);
        &self.data[first * self.steps..][..width * self.steps]
    }
}

/// The two sides of a product.
pub(crate) struct Product<'a, L, G, O> {
    pub(crate) left: &'a [L],
    pub(crate) order: O,
    /// Rows.
    pub(crate) rows: usize,
    /// Depth to run over, from the start; the left side holds zeros up to a whole step.
    pub(crate) depth: usize,
    /// The right side.
    pub(crate) right: Right<'a, G>,
    /// Lanes that are wanted, from the start. Others may be computed too, of anything.
    pub(crate) lanes: usize,
    /// What comes after the right side.
    pub(crate) ahead: Ahead,
}

/// Takes the results of a product while they are in registers.
pub(crate) trait Finish<S: Simd> {
    /// Comes before the pass over `V` vectors of `R` rows; the first is that of `row`, `lane`.
    fn begin<const R: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize);

    /// Takes `V` vectors of `R` rows; the first is that of `row`, `lane`.
    fn vectors<const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        lane: usize,
        sums: [[S::F32; V]; R],
    );

    /// Takes a single result.
    fn single(&mut self, row: usize, lane: usize, sum: f32);
}

/// Results go to memory.
pub(crate) struct Sums<'a> {
    /// `[rows, stride]`
    pub(crate) out: &'a mut [f32],
    /// Elements from one row of `out` to the next.
    pub(crate) stride: usize,
    /// Whether the product is added to `out`, or replaces it.
    pub(crate) accumulate: bool,
}

impl<S: Simd> Finish<S> for Sums<'_> {
    /// What streamed by since the last block may have pushed the sums out of the first-level cache.
    #[inline(always)]
    fn begin<const R: usize, const V: usize>(&mut self, simd: S, row: usize, lane: usize) {
        for r in row..row + R {
            let out = &self.out[r * self.stride + lane..][..V * S::LANES];
            super::prefetch(simd, bytemuck::cast_slice(out));
        }
    }

    #[inline(always)]
    fn vectors<const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        lane: usize,
        sums: [[S::F32; V]; R],
    ) {
        for (r, sums) in sums.into_iter().enumerate() {
            let out = &mut self.out[(row + r) * self.stride + lane..][..V * S::LANES];
            for (v, mut sum) in sums.into_iter().enumerate() {
                let out = out[v * S::LANES..].as_mut_ptr();
                if self.accumulate {
                    // SAFETY: `out` holds `V` vectors.
                    sum = simd.add(sum, unsafe { simd.load(out) });
                }
                // SAFETY: as above.
                unsafe { simd.store(out, sum) };
            }
        }
    }

    fn single(&mut self, row: usize, lane: usize, sum: f32) {
        let out = &mut self.out[row * self.stride + lane];
        *out = if self.accumulate { *out + sum } else { sum };
    }
}

/// Where one pass reads.
pub(super) struct Pass<L, G, O> {
    left: *const L,
    order: O,
    right: *const G,
    /// Groups from one step to the next.
    right_stride: usize,
    steps: usize,
    /// What its first result is.
    row: usize,
    lane: usize,
    /// Where it is the first pass over a panel: later ones find what it asked for.
    ahead: Option<Ahead>,
}

/// The product.
///
/// # Panics
/// When a slice is shorter than its shape says.
pub(crate) fn product<S: Engine, L: Lanes<S>, O: Order>(
    simd: S,
    args: Product<'_, L::Left, L::Group, O>,
    mut finish: impl Finish<S>,
) {
    let Product { left, order, rows, depth, right, lanes, ahead } = args;
    let steps = depth.div_ceil(L::STEP);
    assert!(steps <= right.steps && lanes <= right.lanes, "right side is too small");
    assert!(right.data.len() >= right.steps * right.lanes, "right side is too short");
    let left_at = |row: usize, step: usize| {
        let first = row / MAX_ROWS * MAX_ROWS;
        let in_pass = (row - first, (rows - first).min(MAX_ROWS));
        order.start(first, steps * L::STEP) + order.offset(in_pass, step, L::STEP)
    };
    assert!(left.len() >= left_at(rows - 1, steps - 1) + L::STEP, "left side is too short");

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
                    left: left[left_at(row, 0)..].as_ptr(),
                    order,
                    right: panel[lane..].as_ptr(),
                    right_stride: width,
                    steps,
                    row,
                    lane: first + lane,
                    ahead: (row == 0 && lane == 0).then_some(ahead),
                };
                // SAFETY: the assertions above and the loop's conditions keep every row, step and
                // vector inside the slices.
                let taken =
                    unsafe { pass_rows::<S, L, O>(simd, pass, (some, vectors), &mut finish) };
                lane += taken * S::LANES;
            }
            // What is left of a width that is no multiple of a vector.
            for lane in lane..width.min(lanes - first) {
                for row in row..row + some {
                    let sum = (0..steps).fold(0.0, |sum, step| {
                        let factors = &left[left_at(row, step)..][..L::STEP];
                        L::single(factors, panel[step * width + lane], sum)
                    });
                    finish.single(row, first + lane, sum);
                }
            }
            row += some;
        }
    }
}

/// Runs one pass for `rows` rows and up to `vectors` vectors of lanes; returns how many it took.
///
/// # Safety
/// As [`pass`], for every number of vectors from 1 to `vectors`.
#[inline(always)]
unsafe fn pass_rows<S: Engine, L: Lanes<S>, O: Order>(
    simd: S,
    args: Pass<L::Left, L::Group, O>,
    (rows, vectors): (usize, usize),
    finish: &mut impl Finish<S>,
) -> usize {
    macro_rules! with_rows {
        ($($rows:literal)*) => {
            match rows {
                // SAFETY: the caller's promise.
                $($rows => unsafe { simd.pass::<L, O, $rows>(args, vectors, finish) },)*
                _ => unreachable!("at most {MAX_ROWS} rows in a pass"),
            }
        };
    }
    with_rows!(1 2 3 4 5 6 7 8)
}

/// Runs one pass for `R` rows and up to `vectors` vectors of lanes; returns how many it took.
///
/// # Safety
/// As [`pass`], for every number of vectors from 1 to `vectors`.
#[inline(always)]
pub(super) unsafe fn pass_vectors<S: Simd, L: Lanes<S>, O: Order, const R: usize>(
    simd: S,
    args: Pass<L::Left, L::Group, O>,
    vectors: usize,
    finish: &mut impl Finish<S>,
) -> usize {
    // Registers, and lanes of a panel: known when this is compiled.
    let fits = |vectors: usize| {
        (R * L::SUMS + L::VECTORS - 1) * vectors <= S::ACCUMULATORS && vectors * S::LANES <= PANEL
    };
    let (row, lane) = (args.row, args.lane);
    if vectors >= 4 && fits(4) {
        finish.begin::<R, 4>(simd, row, lane);
        // SAFETY: the caller's promise.
        let sums = unsafe { pass::<S, L, O, R, 4>(simd, args) };
        finish.vectors(simd, row, lane, sums);
        4
    } else if vectors >= 2 && fits(2) {
        finish.begin::<R, 2>(simd, row, lane);
        // SAFETY: the caller's promise.
        let sums = unsafe { pass::<S, L, O, R, 2>(simd, args) };
        finish.vectors(simd, row, lane, sums);
        2
    } else {
        finish.begin::<R, 1>(simd, row, lane);
        // SAFETY: the caller's promise.
        let sums = unsafe { pass::<S, L, O, R, 1>(simd, args) };
        finish.vectors(simd, row, lane, sums);
        1
    }
}

/// The inner loop: `R` rows times `V` vectors of accumulators in registers.
///
/// # Safety
/// For every row `r < R` and step `s`, `left` is readable where `order` says for `STEP` elements, and
/// `right` at `s · right_stride` for `V · LANES` groups.
#[expect(clippy::needless_range_loop, reason = "rows and vectors index more than the sums")]
#[inline(always)]
unsafe fn pass<S: Simd, L: Lanes<S>, O: Order, const R: usize, const V: usize>(
    simd: S,
    args: Pass<L::Left, L::Group, O>,
) -> [[S::F32; V]; R] {
    let mut sums = [[L::zero(simd); V]; R];
    let asked = args.ahead.map_or(Asked::NOTHING, |ahead| {
        ahead.of_steps(args.right.cast(), args.right_stride * size_of::<L::Group>())
    });
    for step in 0..args.steps {
        // SAFETY: the caller's promise, for this step and each vector.
        let wide: [L::Wide; V] = std::array::from_fn(|v| unsafe {
            L::load(simd, args.right.wrapping_add(step * args.right_stride + v * S::LANES))
        });
        for r in 0..R {
            // SAFETY: the caller's promise, for this row and step.
            let factor = unsafe {
                L::splat(simd, args.left.wrapping_add(args.order.offset((r, R), step, L::STEP)))
            };
            for v in 0..V {
                sums[r][v] = L::mul_add(simd, factor, wide[v], sums[r][v]);
            }
        }
        // After the step's own loads, which would wait behind these.
        if let Some(to) = asked.by(step) {
            for offset in (0..PANEL * size_of::<L::Group>()).step_by(size_of::<Line>()) {
                simd.prefetch(to.wrapping_add(offset));
            }
        }
    }
    let mut finished = [[simd.splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            finished[r][v] = L::finish(simd, sums[r][v]);
        }
    }
    finished
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every step of a right side asks for what lies `distance` on, or as much of what comes next.
    fn asked(prefetch: Prefetch, len: usize, follows: bool, distance: usize) -> Vec<bool> {
        const STEP: usize = 512;
        let (bytes, next) = (vec![0u8; len], [0u8]);
        let ahead = Ahead::of(prefetch, &bytes, follows.then_some(&next));
        let asked = ahead.of_steps(bytes.as_ptr(), STEP);
        let steps = (0..len / STEP).map(|step| {
            let at = step * STEP + distance;
            let beyond = if follows { next.as_ptr() } else { bytes.as_ptr_range().end };
            let want = if at < len {
                bytes.as_ptr().wrapping_add(at)
            } else {
                beyond.wrapping_add(at - len)
            };
            asked.by(step).inspect(|&found| assert_eq!(found, want, "step {step}")).is_some()
        });
        steps.collect()
    }

    #[test]
    fn what_comes_next_is_asked_for() {
        let jumps = |steps: usize, from: usize| (0..steps).map(|i| i >= from).collect::<Vec<_>>();
        assert_eq!(asked(Prefetch::Everything, 20 << 10, true, 8 << 10), vec![true; 40]);
        assert_eq!(asked(Prefetch::Everything, 20 << 10, false, 8 << 10), vec![true; 40]);
        assert_eq!(asked(Prefetch::Everything, 3 << 10, true, 3 << 10), vec![true; 6]);
        assert_eq!(asked(Prefetch::Jumps, 20 << 10, true, 2 << 10), jumps(40, 36));
        assert_eq!(asked(Prefetch::Jumps, 1 << 10, true, 1 << 10), jumps(2, 0));
        assert_eq!(asked(Prefetch::Jumps, 20 << 10, false, 0), jumps(40, 40));
        assert!(Asked::NOTHING.by(usize::MAX - 1).is_none());
    }
}
