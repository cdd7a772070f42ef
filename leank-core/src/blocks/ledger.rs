//! The [`Ledger`] itself: sequences and their block tables.

use std::{collections::HashMap, ops::Range};

use super::{Block, Memory, SequenceId, Step, pool::Pools};
use crate::{CacheLayout, Error, Result, Windows};

/// A sequence between steps: the blocks after the sink and before `lean_end` are lean, all others
/// are full; only the last block of the table may be partly filled, and it is full.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) len: usize,
    /// At least the number of sink blocks, also where the table is shorter.
    pub(super) lean_end: usize,
    pub(super) table: Vec<Block>,
}

/// The bookkeeping of one cache: sequences, block tables and pools. See the [module](super).
#[derive(Clone, Debug)]
pub struct Ledger {
    pub(super) block: usize,
    pub(super) windows: Windows,
    token_bytes: u64,
    pub(super) pools: Pools,
    pub(super) sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
    pub(super) step: Option<Step>,
}

impl Ledger {
    /// Empty books for a cache of this layout.
    #[must_use]
    pub fn new(layout: &CacheLayout, windows: Windows, limit: Option<u64>) -> Self {
        Self {
            block: layout.block,
            windows,
            token_bytes: layout.dense_token_bytes as u64,
            pools: Pools::new(layout, limit),
            sequences: HashMap::new(),
            next_id: 0,
            step: None,
        }
    }

    pub(super) fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// Tokens of a sequence, without those of a step that is under way.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequence(id)?.len)
    }

    /// Whether there is no sequence.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Block table of a sequence, blocks of a step under way included.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn table(&self, id: SequenceId) -> Result<&[Block]> {
        Ok(&self.sequence(id)?.table)
    }

    /// The lean blocks of a sequence: a range of indices in its block table. Blocks that a step
    /// under way writes as lean ones at once are not counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn lean_blocks(&self, id: SequenceId) -> Result<Range<usize>> {
        Ok(self.sink_blocks()..self.sequence(id)?.lean_end)
    }

    /// The step under way.
    #[must_use]
    pub fn step(&self) -> Option<&Step> {
        self.step.as_ref()
    }

    /// Tells that storage for `blocks` could not be had: after [`Ledger::cancel`] they are free
    /// blocks without storage.
    pub fn lost_storage(&mut self, blocks: &[Block]) {
        for &block in blocks {
            self.pools.lost_storage(block);
        }
    }

    /// Bytes held, blocks of a step under way included. Blocks that sequences share count once.
    ///
    /// Where blocks are shared this looks at every block table, otherwise at every sequence.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let blocks = self.pools.used();
        let (full_bytes, lean_bytes) = self.pools.bytes(blocks);
        let (full_held, lean_held) = self.pools.bytes(self.pools.with_storage());
        let tokens = self.sequences.values().map(|sequence| sequence.len as u64).sum();
        let stored = if self.pools.any_shared() { self.stored_tokens() } else { tokens };
        Memory {
            tokens,
            blocks,
            full_bytes,
            lean_bytes,
            allocated_bytes: full_held + lean_held,
            dense_bytes: stored * self.token_bytes,
        }
    }

    /// Tokens of all sequences; those that several share count once.
    fn stored_tokens(&self) -> u64 {
        let mut filled = HashMap::new();
        for sequence in self.sequences.values() {
            for (index, &block) in sequence.table.iter().enumerate() {
                let tokens = sequence.len.saturating_sub(index * self.block).min(self.block);
                // A lean block and its full form hold the same tokens: one entry for both.
                let same = match block {
                    Block::Full(full) => self.pools.lean_twin(full).map_or(block, Block::Lean),
                    Block::Lean(_) => block,
                };
                let most = filled.entry(same).or_insert(0);
                *most = tokens.max(*most);
            }
        }
        filled.values().map(|&tokens| tokens as u64).sum()
    }

    pub(super) fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence(id.0))
    }

    /// Blocks that the sink keeps full.
    pub(super) fn sink_blocks(&self) -> usize {
        self.windows.sink.div_ceil(self.block)
    }

    /// The end of the lean blocks in a step whose first query stands at `start`: the blocks from
    /// [`Ledger::sink_blocks`] to here are those that [`super::is_lean`] names.
    pub(super) fn lean_end(&self, start: usize) -> usize {
        let past = (start + 1).saturating_sub(self.windows.recent.max(1)) / self.block;
        past.max(self.sink_blocks())
    }

    /// Fails while a step is under way; `call` is what was tried.
    pub(crate) fn outside_a_step(&self, call: &'static str) -> Result<()> {
        if self.step.is_some() {
            let when = "while a step is under way; commit or cancel it first".to_owned();
            return Err(Error::Order { call, when });
        }
        Ok(())
    }
}
