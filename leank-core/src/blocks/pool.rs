//! The pools of full and lean blocks: which numbers are free, which have storage, who shares them.

use std::collections::HashMap;

use super::{Block, BlockCount};
use crate::{CacheLayout, Error, Result};

/// The blocks of one kind.
#[derive(Clone, Debug, Default)]
struct Pool {
    /// References per block handed out so far; 0 for a free one.
    references: Vec<u32>,
    /// Free blocks that have storage; the last one freed is taken first.
    free: Vec<u32>,
    /// Free blocks without storage.
    bare: Vec<u32>,
    /// Blocks with a reference.
    used: usize,
    /// Blocks with more than one.
    shared: usize,
}

impl Pool {
    /// A block with one reference, and whether it still needs storage.
    fn take(&mut self) -> (u32, bool) {
        self.used += 1;
        let (id, needs_storage) = match self.free.pop() {
            Some(id) => (id, false),
            None => (self.bare.pop().unwrap_or_else(|| self.grow()), true),
        };
        self.references[id as usize] = 1;
        (id, needs_storage)
    }

    fn grow(&mut self) -> u32 {
        self.references.push(0);
        (self.references.len() - 1) as u32
    }

    fn share(&mut self, id: u32) {
        let references = &mut self.references[id as usize];
        *references += 1;
        self.shared += usize::from(*references == 2);
    }

    /// Drops a reference; tells whether the block is free now.
    fn give(&mut self, id: u32) -> bool {
        let references = &mut self.references[id as usize];
        *references -= 1;
        self.shared -= usize::from(*references == 1);
        let free = *references == 0;
        if free {
            self.used -= 1;
            self.free.push(id);
        }
        free
    }

    fn with_storage(&self) -> usize {
        self.used + self.free.len()
    }
}

/// Full blocks in use of which a lean form is in use as well: some of the sequences that shared the
/// full block have left it behind, others still have it in their windows.
#[derive(Clone, Debug, Default)]
struct Twins {
    lean_of: HashMap<u32, u32>,
    full_of: HashMap<u32, u32>,
}

impl Twins {
    fn forget(&mut self, block: Block) {
        match block {
            Block::Full(full) => {
                if let Some(lean) = self.lean_of.remove(&full) {
                    self.full_of.remove(&lean);
                }
            }
            Block::Lean(lean) => {
                if let Some(full) = self.full_of.remove(&lean) {
                    self.lean_of.remove(&full);
                }
            }
        }
    }
}

/// Both pools, and what their blocks cost.
#[derive(Clone, Debug)]
pub(super) struct Pools {
    full: Pool,
    lean: Pool,
    twins: Twins,
    full_bytes: u64,
    lean_bytes: u64,
    limit: Option<u64>,
}

impl Pools {
    pub(super) fn new(layout: &CacheLayout, limit: Option<u64>) -> Self {
        Self {
            full: Pool::default(),
            lean: Pool::default(),
            twins: Twins::default(),
            full_bytes: layout.full_bytes_all_layers(),
            lean_bytes: layout.lean_bytes_all_layers(),
            limit,
        }
    }

    /// A full block with one reference; `allocate` gets it where it still needs storage.
    pub(super) fn take_full(&mut self, allocate: &mut Vec<Block>) -> u32 {
        let (id, needs_storage) = self.full.take();
        allocate.extend(needs_storage.then_some(Block::Full(id)));
        id
    }

    /// A lean block with one reference; `allocate` gets it where it still needs storage.
    pub(super) fn take_lean(&mut self, allocate: &mut Vec<Block>) -> u32 {
        let (id, needs_storage) = self.lean.take();
        allocate.extend(needs_storage.then_some(Block::Lean(id)));
        id
    }

    /// Adds a reference to a block in use.
    pub(super) fn share(&mut self, block: Block) {
        match block {
            Block::Full(id) => self.full.share(id),
            Block::Lean(id) => self.lean.share(id),
        }
    }

    /// Drops a reference; the last one frees the block.
    pub(super) fn give(&mut self, block: Block) {
        let free = match block {
            Block::Full(id) => self.full.give(id),
            Block::Lean(id) => self.lean.give(id),
        };
        if free {
            self.twins.forget(block);
        }
    }

    pub(super) fn is_shared(&self, block: Block) -> bool {
        match block {
            Block::Full(id) => self.full.references[id as usize] > 1,
            Block::Lean(id) => self.lean.references[id as usize] > 1,
        }
    }

    /// Whether there may be tokens that lie in one block for several sequences, or in two blocks.
    pub(super) fn any_shared(&self) -> bool {
        self.full.shared + self.lean.shared + self.twins.lean_of.len() > 0
    }

    /// The lean form of a full block, where it is in use.
    pub(super) fn lean_twin(&self, full: u32) -> Option<u32> {
        self.twins.lean_of.get(&full).copied()
    }

    /// `lean` holds what `full` holds, kept channels only. Does nothing where `full` is free.
    pub(super) fn join(&mut self, full: u32, lean: u32) {
        if self.full.references[full as usize] > 0 {
            self.twins.lean_of.insert(full, lean);
            self.twins.full_of.insert(lean, full);
        }
    }

    /// A full block is about to be written to: a lean form of it no longer holds the same.
    pub(super) fn will_change(&mut self, full: u32) {
        self.twins.forget(Block::Full(full));
    }

    /// Fails when `need` does not fit under the limit.
    pub(super) fn check(&self, need: BlockCount) -> Result<()> {
        let Some(limit) = self.limit else { return Ok(()) };
        let needed = self.cost(need);
        let available = limit.saturating_sub(self.cost(self.used()));
        if needed > available {
            let missing = needed - available;
            return Err(Error::OutOfMemory { needed, available, missing, limit });
        }
        Ok(())
    }

    /// Makes sure that `need` fits under the limit; returns the free blocks whose storage must go.
    pub(super) fn reserve(&mut self, need: BlockCount) -> Result<Vec<Block>> {
        self.check(need)?;
        let mut reclaim = Vec::new();
        let Some(limit) = self.limit else { return Ok(reclaim) };
        // Storage that will be held: what is used, what is needed, and free blocks beyond it.
        let kept = self.cost(self.used()) + self.cost(need);
        let mut spare = BlockCount {
            full: self.full.free.len().saturating_sub(need.full),
            lean: self.lean.free.len().saturating_sub(need.lean),
        };
        while kept + self.cost(spare) > limit {
            // The oldest free block goes, of the kind that frees more.
            if spare.full > 0 {
                spare.full -= 1;
                let id = self.full.free.remove(0);
                self.full.bare.push(id);
                reclaim.push(Block::Full(id));
            } else {
                spare.lean -= 1;
                let id = self.lean.free.remove(0);
                self.lean.bare.push(id);
                reclaim.push(Block::Lean(id));
            }
        }
        Ok(reclaim)
    }

    /// A free block turns out to have no storage.
    pub(super) fn lost_storage(&mut self, block: Block) {
        let (pool, id) = match block {
            Block::Full(id) => (&mut self.full, id),
            Block::Lean(id) => (&mut self.lean, id),
        };
        pool.free.retain(|&free| free != id);
        pool.bare.push(id);
    }

    /// Blocks in use.
    pub(super) fn used(&self) -> BlockCount {
        BlockCount { full: self.full.used, lean: self.lean.used }
    }

    /// Blocks that have storage.
    pub(super) fn with_storage(&self) -> BlockCount {
        BlockCount { full: self.full.with_storage(), lean: self.lean.with_storage() }
    }

    /// Bytes of full and of lean blocks, all layers.
    pub(super) fn bytes(&self, blocks: BlockCount) -> (u64, u64) {
        (blocks.full as u64 * self.full_bytes, blocks.lean as u64 * self.lean_bytes)
    }

    fn cost(&self, blocks: BlockCount) -> u64 {
        let (full, lean) = self.bytes(blocks);
        full + lean
    }
}
