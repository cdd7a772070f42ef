//! Attention of one layer over a planned step.

use std::sync::{Mutex, PoisonError};

use leank_core::{
    Block, CacheConfig, CacheLayout, HostView, HostViewMut, KvHead, Layer, Ledger, Result,
};

use crate::{
    element::{Element, Left, Target, plain, with_element},
    executor::Executor,
    kernel::{Kernel, MAX_LANES, RowState, Softmax},
    panels::{DEPTH_MULTIPLE, HeadPlace},
    store::Store,
    work::{Job, Piece, Work},
};

/// Bytes of a section that are asked for while the one before it is worked on; the hardware's
/// prefetchers go on from there.
const AHEAD: usize = 2048;

/// Everything that the pieces of one layer read.
#[derive(Clone, Copy)]
pub(crate) struct LayerView<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) store: &'a Store,
    pub(crate) kernel: Kernel,
    pub(crate) layer: Layer,
}

/// What a piece works in, kept between steps.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Queries for full blocks, `[rows, full_channels]`.
    full: Left,
    /// Queries for lean blocks, `[rows, stored]`.
    lean: Left,
    /// Logits, then weights of one block, `[rows, block]` padded to [`MAX_LANES`].
    weights: Left,
    /// Weighted sums of V, `[rows, head_dim]`.
    sum: Vec<f32>,
    rows: Vec<RowState>,
}

/// K and V of one head in one block.
#[derive(Clone, Copy)]
struct Sections<'a> {
    place: HeadPlace,
    /// Of the head in the block.
    bytes: &'a [u8],
}

impl<'a> Sections<'a> {
    fn k(&self) -> &'a [u8] {
        self.place.k.bytes(self.bytes)
    }

    fn v(&self) -> &'a [u8] {
        self.place.v.bytes(self.bytes)
    }
}

impl<'a> LayerView<'a> {
    pub(crate) fn attend(
        self,
        ledger: &Ledger,
        executor: &dyn Executor,
        scratch: &mut Vec<Mutex<Scratch>>,
        q: HostView<'_>,
        mut out: HostViewMut<'_>,
    ) -> Result<()> {
        let shape = self.config.shape;
        let (heads, group) = (shape.kv_heads, shape.group());
        let work = Work::cut(ledger, self.layout, self.layer, heads, group)?;
        if scratch.len() < work.pieces.len() {
            scratch.resize_with(work.pieces.len(), Mutex::default);
        }
        let run = |i: usize| {
            let piece = &work.pieces[i];
            let mut scratch = scratch[i].lock().unwrap_or_else(PoisonError::into_inner);
            self.run(&work.jobs[piece.job], piece, q, &mut scratch);
        };
        if work.is_parallel() {
            executor.run(work.pieces.len(), &run);
        } else {
            (0..work.pieces.len()).for_each(run);
        }

        let mut done = scratch.iter_mut().map(|scratch| {
            let scratch = scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
            &mut *scratch
        });
        for pieces in work.pieces.chunk_by(|a, b| a.job == b.job) {
            let Some(total) = done.next() else { break };
            for part in done.by_ref().take(pieces.len() - 1) {
                total.merge(part, shape.head_dim);
            }
            let job = &work.jobs[pieces[0].job];
            for (row, values) in total.finish(shape.head_dim).enumerate() {
                out.write_row(job.row + row / group, job.head.0 * group + row % group, values);
            }
        }
        Ok(())
    }

    fn run(&self, job: &Job<'_>, piece: &Piece, q: HostView<'_>, scratch: &mut Scratch) {
        let shape = self.config.shape;
        let (group, head_dim, block) = (shape.group(), shape.head_dim, self.layout.block);
        let rows = job.tokens * group;
        self.prepare(job, q, scratch);
        let Scratch { full, lean, weights, sum, rows: states } = scratch;

        let stride = block.next_multiple_of(MAX_LANES);
        let end = job.position + job.tokens;
        let coming = |index: usize| {
            let id = *job.table[..piece.blocks.end].get(index)?;
            self.sections(job.head, id)
        };
        let mut next = coming(piece.blocks.start);
        for index in piece.blocks.clone() {
            let Some(sections) = std::mem::replace(&mut next, coming(index + 1)) else { continue };
            let start = index * block;
            let tokens = (end - start).min(block);
            let HeadPlace { k, v, lean: is_lean } = sections.place;
            let queries = if is_lean { &*lean } else { &*full };
            with_element!(k.dtype, T => {
                let right = k.panels::<T>(sections.bytes);
                let target = Target {
                    rows,
                    left_stride: k.depth,
                    depth: k.depth,
                    lanes: tokens,
                    out: &mut weights.wide,
                    out_stride: stride,
                    accumulate: false,
                };
                T::product(self.kernel, queries, right, target);
            });

            let scale = self.cap(&mut weights.wide, stride, tokens) * std::f32::consts::LOG2_E;
            let softmax = Softmax {
                logits: &mut weights.wide,
                stride,
                seen: (job.position + 1) as isize - start as isize,
                group,
                most: tokens,
                scale,
                states,
                sums: sum,
                head_dim,
                next: first(sections.v()),
            };
            self.kernel.softmax(softmax, v.dtype, &mut weights.narrow);
            if let Some(next) = &next
                && next.k().as_ptr() != sections.v().as_ptr_range().end
            {
                self.kernel.prefetch(first(next.k()));
            }

            with_element!(v.dtype, T => {
                let right = v.panels::<T>(sections.bytes);
                let target = Target {
                    rows,
                    left_stride: stride,
                    depth: tokens,
                    lanes: head_dim,
                    out: sum,
                    out_stride: head_dim,
                    accumulate: true,
                };
                T::product(self.kernel, weights, right, target);
            });
        }
    }

    /// Lays out the scratch of a piece, with its queries in it.
    fn prepare(&self, job: &Job<'_>, q: HostView<'_>, scratch: &mut Scratch) {
        let shape = self.config.shape;
        let (group, head_dim) = (shape.group(), shape.head_dim);
        let rows = job.tokens * group;
        let stride = self.layout.block.next_multiple_of(MAX_LANES);
        scratch.rows.clear();
        scratch.rows.resize(rows, RowState::EMPTY);
        scratch.sum.clear();
        scratch.sum.resize(rows * head_dim, 0.0);
        scratch.weights.reset(rows * stride);

        let channels = self.layout.full_channels;
        scratch.full.reset(rows * channels);
        for (row, values) in scratch.full.wide.chunks_exact_mut(channels).enumerate() {
            let head = job.head.0 * group + row % group;
            q.read_row(job.row + row / group, head, &mut values[..head_dim]);
        }
        let kept = self.config.mask.head(self.layer, job.head).kept();
        let lean = self.layout.layer(self.layer).lean[job.head.0];
        scratch.lean.reset(rows * lean.stored);
        if lean.stored > 0 {
            let whole = scratch.full.wide.chunks_exact(channels);
            for (whole, values) in whole.zip(scratch.lean.wide.chunks_exact_mut(lean.stored)) {
                for (value, &channel) in values.iter_mut().zip(kept) {
                    *value = whole[usize::from(channel)];
                }
            }
        }
        for (left, dtype) in
            [(&mut scratch.full, self.config.dtype), (&mut scratch.lean, plain(lean.format.k))]
        {
            if self.kernel.narrows(dtype) {
                self.kernel.narrow(&left.wide, &mut left.narrow);
            }
        }
    }

    /// K and V of a head in a block; `None` where none are stored.
    fn sections(&self, head: KvHead, id: Block) -> Option<Sections<'a>> {
        let place = HeadPlace::of(self.config, self.layout, (self.layer, head), id)?;
        Some(Sections { place, bytes: self.store.head(self.layer, id, head) })
    }

    /// Applies the soft-cap, if there is one; returns the factor that is left for the softmax.
    fn cap(&self, logits: &mut [f32], stride: usize, tokens: usize) -> f32 {
        let scale = self.config.scale();
        let Some(cap) = self.config.soft_cap else { return scale };
        for row in logits.chunks_exact_mut(stride) {
            for logit in &mut row[..tokens] {
                *logit = cap * (scale * *logit / cap).tanh();
            }
        }
        1.0
    }
}

/// What is asked for of a section before its turn.
fn first(section: &[u8]) -> &[u8] {
    &section[..AHEAD.min(section.len())]
}

impl Left {
    /// `len` zeros.
    fn reset(&mut self, len: usize) {
        self.wide.clear();
        self.wide.resize(len, 0.0);
        self.narrow.clear();
        self.narrow.resize(len, half::bf16::ZERO);
    }
}

impl Scratch {
    /// Takes in another part of the same rows.
    fn merge(&mut self, part: &Self, head_dim: usize) {
        let sums = self.sum.chunks_exact_mut(head_dim).zip(part.sum.chunks_exact(head_dim));
        for ((own, other), (sum, more)) in self.rows.iter_mut().zip(&part.rows).zip(sums) {
            let mut other = *other;
            let base = own.base.max(other.base);
            let (keep, add) = (own.rebase(base), other.rebase(base));
            for (sum, more) in sum.iter_mut().zip(more) {
                *sum = *sum * keep + more * add;
            }
            own.add(&other);
        }
    }

    /// The output rows.
    fn finish(&mut self, head_dim: usize) -> impl Iterator<Item = &[f32]> {
        for (row, state) in self.sum.chunks_exact_mut(head_dim).zip(&self.rows) {
            let inverse = 1.0 / state.weight();
            row.iter_mut().for_each(|x| *x *= inverse);
        }
        self.sum.chunks_exact(head_dim)
    }
}

const _: () = assert!(MAX_LANES.is_multiple_of(DEPTH_MULTIPLE), "weights pad the last pair");
