//! Attention of some query rows, block by block: the softmax so far and the sums of V.

use bytemuck::{Pod, Zeroable};

use crate::kernel::{LOWEST, MAX_LANES, rebase};

/// A cache line.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [f32; MAX_LANES]);

/// What some query rows take, in elements or bytes per row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) rows: usize,
    pub(crate) head_dim: usize,
    /// Tokens of a block.
    pub(crate) block: usize,
    /// Bytes of a weight for V, in full and in lean blocks at most.
    pub(crate) weight_bytes: usize,
    /// Bytes of a row of queries for full and for lean blocks.
    pub(crate) query_bytes: [usize; 2],
    /// Elements of a row of queries or weights for codes, of all groups that share scales, and the number
    /// of groups, at most; 0 without codes.
    pub(crate) folded: [usize; 2],
}

/// Memory for query rows, in one stretch. K and V stream through the first-level cache; what is used
/// again and again stays in it best when its lines fall on different sets.
#[derive(Debug, Default)]
pub(crate) struct Arena(Vec<Line>);

/// Queries for full and for lean blocks.
pub(crate) type Queries<'a> = [&'a mut [Line]; 2];

impl Arena {
    /// The parts; queries are as they were left, everything else is to be written before it is
    /// read.
    pub(crate) fn split(&mut self, extent: Extent) -> (Queries<'_>, Running<'_>) {
        let Extent { rows, head_dim, block, weight_bytes, query_bytes, folded } = extent;
        let stride = block.next_multiple_of(MAX_LANES);
        let lines = |bytes: usize| bytes.div_ceil(size_of::<Line>());
        let floats = |count: usize| lines(count * size_of::<f32>());
        let [folded, groups] = folded;
        let coded_rows = if groups == 0 { 0 } else { rows };
        let sizes = [
            lines(rows * query_bytes[0]),
            lines(rows * query_bytes[1]),
            lines(rows * stride * weight_bytes),
            floats(rows * head_dim),
            rows,
            floats(rows),
            floats(rows * stride),
            floats(rows * folded),
            lines(groups * rows * size_of::<Linear>()),
            floats(coded_rows),
        ];
        let total: usize = sizes.iter().sum();
        if self.0.len() < total {
            self.0.resize(total, Line::zeroed());
        }
        let mut rest = &mut self.0[..];
        let [full, lean, weights, sums, totals, bases, logits, left, linear, tops] =
            sizes.map(|size| {
                let (part, others) = std::mem::take(&mut rest).split_at_mut(size);
                rest = others;
                part
            });
        let floats =
            |lines, count: usize| &mut bytemuck::cast_slice_mut::<Line, f32>(lines)[..count];
        let running = Running {
            weights,
            stride,
            sums: floats(sums, rows * head_dim),
            head_dim,
            totals,
            bases: floats(bases, rows),
            logits: floats(logits, rows * stride),
            folded: Folded {
                left: floats(left, rows * folded),
                sums: &mut bytemuck::cast_slice_mut(linear)[..groups * rows],
                tops: floats(tops, coded_rows),
            },
        };
        ([full, lean], running)
    }
}

/// What a product with codes becomes of its sums: `factor · sum + offset`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Linear {
    pub(crate) factor: f32,
    /// What the zero points add.
    pub(crate) offset: f32,
}

/// A left side of a product with codes, times their scales: nothing without codes.
#[derive(Debug)]
pub(crate) struct Folded<'a> {
    /// Queries or weights times the steps, `[groups, rows, stride]`, as long as the longest.
    pub(crate) left: &'a mut [f32],
    /// `[groups, rows]`
    pub(crate) sums: &'a mut [Linear],
    /// The largest magnitude of each row before.
    pub(crate) tops: &'a mut [f32],
}

impl Folded<'_> {
    pub(crate) fn reborrow(&mut self) -> Folded<'_> {
        Folded { left: self.left, sums: self.sums, tops: self.tops }
    }
}

/// Rows over the blocks so far, and what the kernel needs for the next one.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    /// What weights are relative to, in powers of two, per row.
    pub(crate) bases: &'a mut [f32],
    /// Sums of the weights, per row and lane.
    pub(crate) totals: &'a mut [Line],
    /// Weighted sums of V, `[rows, head_dim]`.
    pub(crate) sums: &'a mut [f32],
    pub(crate) head_dim: usize,
    /// Weights of one block, `[rows, stride]` of whatever products with V want.
    pub(crate) weights: &'a mut [Line],
    /// Logits of one block where they are needed in memory, `[rows, stride]`.
    pub(crate) logits: &'a mut [f32],
    /// Tokens of a block, padded to [`MAX_LANES`].
    pub(crate) stride: usize,
    pub(crate) folded: Folded<'a>,
}

impl Running<'_> {
    /// Before the first block.
    pub(crate) fn reset(&mut self) {
        self.bases.fill(LOWEST);
        self.totals.fill(Line::zeroed());
        self.sums.fill(0.0);
    }
}

/// Rows over all blocks of one or more pieces.
#[derive(Debug, Default)]
struct Rows {
    bases: Vec<f32>,
    totals: Vec<Line>,
    sums: Vec<f32>,
}

impl Rows {
    fn copy(&mut self, bases: &[f32], totals: &[Line], sums: &[f32]) {
        self.bases.clear();
        self.bases.extend_from_slice(bases);
        self.totals.clear();
        self.totals.extend_from_slice(totals);
        self.sums.clear();
        self.sums.extend_from_slice(sums);
    }

    /// Takes in other blocks of the same rows.
    fn merge(&mut self, bases: &[f32], totals: &[Line], sums: &[f32]) {
        let head_dim = sums.len() / bases.len();
        let rows = self.bases.iter_mut().zip(&mut self.totals);
        let others = bases.iter().zip(totals);
        let sums = self.sums.chunks_exact_mut(head_dim).zip(sums.chunks_exact(head_dim));
        for (((base, total), (&other, more)), (sum, more_sum)) in rows.zip(others).zip(sums) {
            let highest = base.max(other);
            let (keep, add) = (rebase(*base, highest), rebase(other, highest));
            *base = highest;
            for (x, more) in total.0.iter_mut().zip(more.0) {
                *x = *x * keep + more * add;
            }
            for (x, more) in sum.iter_mut().zip(more_sum) {
                *x = *x * keep + more * add;
            }
        }
    }
}

/// Merges the pieces of a job in their order, whichever is done first: results do not depend on
/// who computed what.
#[derive(Debug, Default)]
pub(crate) struct Merging {
    all: Rows,
    /// Pieces in `all`.
    merged: usize,
    /// Pieces whose predecessors are not done.
    early: Vec<(usize, Rows)>,
}

impl Merging {
    /// Before the first piece.
    pub(crate) fn reset(&mut self) {
        self.merged = 0;
        self.early.clear();
    }

    /// Takes the piece with this number. The last one that comes brings the output rows,
    /// `[rows, head_dim]`.
    pub(crate) fn take<'a>(
        &'a mut self,
        (number, pieces): (usize, usize),
        piece: &'a mut Running<'_>,
    ) -> Option<&'a [f32]> {
        let Running { bases, totals, sums, .. } = piece;
        if pieces == 1 {
            return Some(finish(totals, sums));
        }
        if number > self.merged {
            let mut rows = Rows::default();
            rows.copy(bases, totals, sums);
            self.early.push((number, rows));
            return None;
        }
        match number {
            0 => self.all.copy(bases, totals, sums),
            _ => self.all.merge(bases, totals, sums),
        }
        self.merged += 1;
        while let Some(i) = self.early.iter().position(|(number, _)| *number == self.merged) {
            let Rows { bases, totals, sums } = self.early.swap_remove(i).1;
            self.all.merge(&bases, &totals, &sums);
            self.merged += 1;
        }
        (self.merged == pieces).then(|| finish(&self.all.totals, &mut self.all.sums))
    }
}

/// Divides sums of V by the weights' total.
fn finish<'a>(totals: &[Line], sums: &'a mut [f32]) -> &'a [f32] {
    let head_dim = sums.len() / totals.len();
    for (row, total) in sums.chunks_exact_mut(head_dim).zip(totals) {
        let inverse = 1.0 / total.0.iter().sum::<f32>();
        row.iter_mut().for_each(|x| *x *= inverse);
    }
    sums
}
