//! Attention of one layer over a planned step.

use std::{
    f32::consts::LOG2_E,
    sync::{Mutex, MutexGuard, PoisonError},
};

use leank_core::{
    Block, CacheConfig, CacheLayout, HeadFormat, HostView, HostViewMut, KvHead, Layer, LeanFormat,
    Ledger, Result, Tensor,
};

use crate::{
    executor::Executor,
    kernel::{Ahead, Kernel, MAX_LANES, query_stride},
    panels::{DEPTH_MULTIPLE, HeadPlace},
    prefetch::Prefetch,
    running::{Arena, Extent, Merging, Queries, Running},
    store::{HeadStore, Store},
    work::{Job, Piece, Work},
};

/// Everything that the pieces of one layer read.
#[derive(Clone, Copy)]
pub(crate) struct LayerView<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) store: &'a Store,
    pub(crate) kernel: Kernel,
    pub(crate) prefetch: Prefetch,
    pub(crate) layer: Layer,
}

/// What the pieces of a step work in, kept between steps.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// As many as pieces ran at the same time; the last used is the next one: it is still in the
    /// core's cache.
    idle: Mutex<Vec<Scratch>>,
    jobs: Vec<Mutex<Merging>>,
}

/// What a piece works in.
#[derive(Debug, Default)]
struct Scratch {
    /// Job whose queries lie in the arena.
    job: Option<usize>,
    arena: Arena,
    /// Queries in single precision, and their kept channels.
    wide: [Vec<f32>; 2],
}

/// The blocks of one head.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    full: Option<HeadPlace>,
    /// `None` for a dead head.
    lean: Option<HeadPlace>,
    store: HeadStore<'a>,
}

impl<'a> Blocks<'a> {
    /// K and V in a block, and how they lie there; `None` where none are stored.
    #[inline(always)]
    fn get(&self, block: Block) -> Option<(&HeadPlace, &'a [u8])> {
        let place = match block {
            Block::Full(_) => self.full.as_ref(),
            Block::Lean(_) => self.lean.as_ref(),
        };
        Some((place?, self.store.get(block)))
    }
}

impl<'a> LayerView<'a> {
    pub(crate) fn attend(
        self,
        ledger: &Ledger,
        executor: &dyn Executor,
        workspace: &mut Workspace,
        q: HostView<'_>,
        out: HostViewMut<'_>,
    ) -> Result<()> {
        let shape = self.config.shape;
        let (heads, group) = (shape.kv_heads, shape.group());
        let work = Work::cut(ledger, self.layout, self.layer, heads, group)?;
        workspace.prepare(work.jobs.len());
        let Workspace { idle, jobs } = workspace;
        let out = Mutex::new(out);
        let run = |i: usize| {
            let piece = &work.pieces[i];
            let mut scratch = lock(idle).pop().unwrap_or_default();
            let job = &work.jobs[piece.job];
            let mut running = self.run(job, piece, q, &mut scratch);
            let mut merging = lock(&jobs[piece.job]);
            if let Some(rows) = merging.take((piece.number, job.pieces), &mut running) {
                let mut out = lock(&out);
                for (row, values) in rows.chunks_exact(shape.head_dim).enumerate() {
                    out.write_row(job.row + row / group, job.head.0 * group + row % group, values);
                }
            }
            drop(merging);
            lock(idle).push(scratch);
        };
        if work.is_parallel() {
            executor.run(work.pieces.len(), &run);
        } else {
            (0..work.pieces.len()).for_each(run);
        }
        Ok(())
    }

    fn run<'b>(
        &self,
        job: &Job<'_>,
        piece: &Piece,
        q: HostView<'_>,
        scratch: &'b mut Scratch,
    ) -> Running<'b> {
        let block = self.layout.block;
        let (mut queries, mut running) = scratch.arena.split(self.extent(job));
        if scratch.job != Some(piece.job) {
            scratch.job = Some(piece.job);
            self.put_queries(job, q, &mut scratch.wide, &mut queries);
        }
        running.reset();
        let [full, lean] = queries;
        let scale = self.config.scale() * LOG2_E;
        // Blocks that are whole for the first query token, and so for all.
        let whole = match self.config.soft_cap {
            None if block.is_multiple_of(MAX_LANES) => (job.position + 1) / block,
            _ => 0,
        };

        let blocks = self.blocks(job.head);
        let mut next = None;
        for index in piece.blocks.clone() {
            let current = next.take().or_else(|| blocks.get(job.table[index]));
            if index + 1 < piece.blocks.end {
                next = blocks.get(job.table[index + 1]);
            }
            let Some((place, bytes)) = current else { continue };
            let ahead = Ahead::of(self.prefetch, bytes, next.map(|(_, next)| next));
            let (k, v) = (place.k.of(bytes), place.v.of(bytes));
            let queries = if place.lean { &*lean } else { &*full };
            let start = index * block;
            let tokens = (job.position + job.tokens - start).min(block);
            if index < whole {
                self.kernel.weigh(&mut running, queries, (k, ahead), scale, v.format());
            } else {
                self.kernel.logits(&mut running, queries, (k, ahead), tokens);
                let scale = self.cap(running.logits) * LOG2_E;
                self.hide(job, start, &mut running);
                self.kernel.soften(&mut running, scale, v.format());
            }
            self.kernel.sum(&mut running, (v, ahead), tokens);
        }
        running
    }

    /// What a job takes.
    fn extent(&self, job: &Job<'_>) -> Extent {
        let shape = self.config.shape;
        let lean = self.layout.layer(self.layer).lean[job.head.0];
        let full = LeanFormat::Plain(self.config.dtype);
        let HeadFormat { k, v } = lean.format;
        let coded = |format: LeanFormat| format.largest_code().is_some();
        let queries = |format, depth| query_stride(format, depth) * self.kernel.left_bytes(format);
        // Rows of queries for K in codes, and of weights for V, for each group that shares scales.
        let k_row = if coded(k) { [query_stride(k, lean.stored), 1] } else { [0; 2] };
        let v_groups = shape.head_dim.div_ceil(v.group(Tensor::V));
        let weights = self.layout.block.next_multiple_of(MAX_LANES);
        let v_row = if coded(v) { [v_groups * weights, v_groups] } else { [0; 2] };
        Extent {
            rows: job.tokens * shape.group(),
            head_dim: shape.head_dim,
            block: self.layout.block,
            weight_bytes: self.kernel.left_bytes(full).max(self.kernel.left_bytes(v)),
            query_bytes: [queries(full, self.layout.full_channels), queries(k, lean.stored)],
            folded: [0, 1].map(|i: usize| k_row[i].max(v_row[i])),
        }
    }

    /// Puts the queries of a job where the kernel wants them.
    fn put_queries(
        &self,
        job: &Job<'_>,
        q: HostView<'_>,
        [wide, rows]: &mut [Vec<f32>; 2],
        [full, lean]: &mut Queries<'_>,
    ) {
        let shape = self.config.shape;
        let (group, channels) = (shape.group(), self.layout.full_channels);
        wide.clear();
        wide.resize(job.tokens * group * channels, 0.0);
        for (row, values) in wide.chunks_exact_mut(channels).enumerate() {
            let head = job.head.0 * group + row % group;
            q.read_row(job.row + row / group, head, &mut values[..shape.head_dim]);
        }
        let format = LeanFormat::Plain(self.config.dtype);
        self.kernel.put_queries(format, wide, channels, full);

        let kept = self.config.mask.head(self.layer, job.head).kept();
        let packed = self.layout.layer(self.layer).lean[job.head.0];
        if packed.stored == 0 || !job.table.iter().any(|block| matches!(block, Block::Lean(_))) {
            return;
        }
        rows.clear();
        rows.resize(job.tokens * group * packed.stored, 0.0);
        for (to, from) in rows.chunks_exact_mut(packed.stored).zip(wide.chunks_exact(channels)) {
            let kept = kept.iter().map(|&channel| from[usize::from(channel)]);
            to.iter_mut().zip(kept).for_each(|(to, x)| *to = x);
        }
        self.kernel.put_queries(packed.format.k, rows, packed.stored, lean);
    }

    /// Where the blocks of a head lie.
    fn blocks(&self, head: KvHead) -> Blocks<'a> {
        let place = |block| HeadPlace::of(self.config, self.layout, (self.layer, head), block);
        Blocks {
            full: place(Block::Full(0)),
            lean: place(Block::Lean(0)),
            store: self.store.of_head(self.layer, head),
        }
    }

    /// Applies the soft-cap, if there is one; returns the factor that is left for the softmax.
    fn cap(&self, logits: &mut [f32]) -> f32 {
        let scale = self.config.scale();
        let Some(cap) = self.config.soft_cap else { return scale };
        for logit in logits {
            *logit = cap * (scale * *logit / cap).tanh();
        }
        1.0
    }

    /// Makes negative infinity of the logits of tokens that a row does not see, in the block whose
    /// first token is `start`.
    fn hide(&self, job: &Job<'_>, start: usize, running: &mut Running<'_>) {
        let group = self.config.shape.group();
        for (row, logits) in running.logits.chunks_exact_mut(running.stride).enumerate() {
            let seen = (job.position + 1 + row / group).saturating_sub(start);
            logits[seen.min(self.layout.block)..].fill(f32::NEG_INFINITY);
        }
    }
}

impl Workspace {
    /// Makes room for a layer's jobs.
    fn prepare(&mut self, jobs: usize) {
        let idle = self.idle.get_mut().unwrap_or_else(PoisonError::into_inner);
        idle.iter_mut().for_each(|scratch| scratch.job = None);
        if self.jobs.len() < jobs {
            self.jobs.resize_with(jobs, Mutex::default);
        }
        for job in &mut self.jobs[..jobs] {
            job.get_mut().unwrap_or_else(PoisonError::into_inner).reset();
        }
    }
}

/// Whoever panicked under the lock left nothing that the next one relies on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const _: () = assert!(MAX_LANES.is_multiple_of(DEPTH_MULTIPLE), "weights pad the last pair");
