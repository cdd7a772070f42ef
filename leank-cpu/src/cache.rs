//! The cache itself: the ledger's operations carried out on host memory.

use std::{
    fmt,
    io::{Read, Write},
    sync::Arc,
};

use leank_core::{
    Cache, CacheConfig, CacheLayout, HostView, HostViewMut, Layer, LayoutRules, Ledger, Memory,
    Progress, Result, SequenceId, StepEntry, saved,
};

use crate::{
    attend::{LayerView, Workspace},
    executor::Executor,
    kernel::Kernel,
    prefetch::Prefetch,
    rows::{Restoring, read_rows},
    store::Store,
    write::Writer,
};

/// A lean KV cache in host memory. Made by [`crate::Cpu`].
pub struct CpuCache {
    config: CacheConfig,
    layout: CacheLayout,
    ledger: Ledger,
    store: Store,
    kernel: Kernel,
    prefetch: Prefetch,
    executor: Arc<dyn Executor>,
    /// What the pieces of a step work in.
    workspace: Workspace,
    /// Layers appended to in the step under way.
    progress: Progress,
}

impl fmt::Debug for CpuCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuCache")
            .field("shape", &self.config.shape)
            .field("memory", &self.memory())
            .finish_non_exhaustive()
    }
}

impl CpuCache {
    pub(crate) fn new(
        config: CacheConfig,
        rules: LayoutRules,
        (kernel, prefetch): (Kernel, Prefetch),
        executor: Arc<dyn Executor>,
    ) -> Result<Self> {
        let layout = CacheLayout::new(&config, rules)?;
        let ledger = Ledger::new(&layout, config.windows, config.limit);
        let store = Store::new(&layout, config.shape);
        let progress = Progress::new(config.shape);
        let workspace = Workspace::default();
        Ok(Self { config, layout, ledger, store, kernel, prefetch, executor, workspace, progress })
    }

    /// The longest length up to `tokens` and the shortest from `tokens` on that a sequence can be
    /// [truncated](Cache::truncate) to.
    ///
    /// # Errors
    /// As [`Ledger::nearest_lengths`].
    pub fn nearest_lengths(&self, sequence: SequenceId, tokens: usize) -> Result<(usize, usize)> {
        self.ledger.nearest_lengths(sequence, tokens)
    }

    fn follow_plan(&mut self) -> Result<()> {
        let Some(step) = self.ledger.step() else { return Ok(()) };
        for &block in &step.reclaim {
            self.store.free(block);
        }
        let allocate = step.allocate.clone();
        for (done, &block) in allocate.iter().enumerate() {
            if let Err(error) = self.store.allocate(block) {
                self.ledger.cancel();
                self.ledger.lost_storage(&allocate[done..]);
                return Err(error);
            }
            #[cfg(any(test, debug_assertions))]
            self.store.poison(block);
        }
        for copy in self.ledger.step().map_or(&[][..], |step| &step.copies) {
            self.store.copy(copy.from, copy.to);
        }
        Ok(())
    }
}

impl Cache for CpuCache {
    type View<'a> = HostView<'a>;
    type ViewMut<'a> = HostViewMut<'a>;

    fn config(&self) -> &CacheConfig {
        &self.config
    }

    fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    fn add_sequence(&mut self) -> SequenceId {
        self.ledger.add_sequence()
    }

    fn sequence_len(&self, sequence: SequenceId) -> Result<usize> {
        self.ledger.len(sequence)
    }

    fn plan(&mut self, entries: &[StepEntry]) -> Result<()> {
        self.ledger.plan(entries)?;
        self.progress.begin();
        self.follow_plan()
    }

    fn append(&mut self, layer: Layer, k: HostView<'_>, v: HostView<'_>) -> Result<()> {
        self.progress.check_layer(&self.ledger, "append", layer)?;
        self.progress.check_view(
            &self.ledger,
            "K of a step",
            k.shape(),
            self.config.shape.kv_heads,
        )?;
        self.progress.check_view(
            &self.ledger,
            "V of a step",
            v.shape(),
            self.config.shape.kv_heads,
        )?;
        let Self { config, layout, ledger, store, kernel, executor, .. } = self;
        let writer = Writer { config, layout, kernel: *kernel, executor: &**executor };
        writer.append(ledger, store, layer, [k, v])?;
        self.progress.mark(layer);
        Ok(())
    }

    fn attend(&mut self, layer: Layer, q: HostView<'_>, out: HostViewMut<'_>) -> Result<()> {
        self.progress.check_attend(&self.ledger, layer)?;
        let query_heads = self.config.shape.query_heads;
        self.progress.check_view(&self.ledger, "q of a step", q.shape(), query_heads)?;
        self.progress.check_view(&self.ledger, "output of a step", out.shape(), query_heads)?;
        let view = LayerView {
            config: &self.config,
            layout: &self.layout,
            store: &self.store,
            kernel: self.kernel,
            prefetch: self.prefetch,
            layer,
        };
        view.attend(&self.ledger, &*self.executor, &mut self.workspace, q, out)
    }

    fn commit(&mut self) -> Result<()> {
        let step = self.progress.check_commit(&self.ledger)?;
        let Self { config, layout, store, kernel, executor, .. } = self;
        let writer = Writer { config, layout, kernel: *kernel, executor: &**executor };
        writer.pack(&step.packs, store);
        self.ledger.commit()
    }

    fn cancel(&mut self) {
        self.ledger.cancel();
    }

    fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.ledger.fork(sequence)
    }

    fn truncate(&mut self, sequence: SequenceId, tokens: usize) -> Result<()> {
        self.ledger.truncate(sequence, tokens)
    }

    fn save(&self, sequence: SequenceId, out: &mut dyn Write) -> Result<()> {
        let read = |rows: &saved::Rows, bytes: &mut [u8]| {
            read_rows(&self.store, &self.config, &self.layout, rows, bytes);
            Ok(())
        };
        saved::save(&self.ledger, &self.config, sequence, read, out)
    }

    fn restore(&mut self, input: &mut dyn Read) -> Result<SequenceId> {
        let Self { config, layout, ledger, store, .. } = self;
        saved::restore(ledger, config, &mut Restoring { store, config, layout }, input)
    }

    fn release(&mut self, sequence: SequenceId) -> Result<()> {
        self.ledger.release(sequence)
    }

    fn memory(&self) -> Memory {
        self.ledger.memory()
    }
}
