//! A sequence that comes back from a file takes its blocks one by one.

use super::{Block, BlockCount, Ledger, MAX_TOKENS, SequenceId, ledger::Sequence};
use crate::{Error, Result};

/// A sequence that is being restored. Dropped before [`Restoring::finish`], it gives its blocks
/// back.
pub(crate) struct Restoring<'a> {
    ledger: &'a mut Ledger,
    sequence: Sequence,
    unallocated: Option<Block>,
}

/// The next block of a sequence that is being restored.
pub(crate) struct Granted {
    /// Index in the block table.
    pub(crate) index: usize,
    pub(crate) block: Block,
    /// Tokens that lie in it.
    pub(crate) tokens: usize,
    /// It needs storage.
    pub(crate) allocate: bool,
    /// Free blocks whose storage must be given back first, to stay under the limit.
    pub(crate) reclaim: Vec<Block>,
}

impl Ledger {
    /// Begins to restore a sequence of `len` tokens whose lean blocks end at index `packed` of its
    /// block table.
    ///
    /// # Errors
    /// [`Error::Order`] while a step is under way; [`Error::Invalid`] for blocks that no sequence
    /// of this cache can have; [`Error::OutOfMemory`].
    pub(crate) fn restore(&mut self, len: usize, packed: usize) -> Result<Restoring<'_>> {
        self.outside_a_step("restore")?;
        let first = self.sink_blocks();
        let possible = |len: usize| self.lean_end(len)..=first.max(len / self.block);
        if len > MAX_TOKENS || !possible(len).contains(&packed) {
            let why = format!("{len} tokens cannot have lean blocks up to index {packed}");
            return Err(Error::invalid("restored sequence", why));
        }
        let all = len.div_ceil(self.block);
        let lean = packed.min(all).saturating_sub(first);
        self.pools.check(BlockCount { full: all - lean, lean })?;
        let sequence = Sequence { len, lean_end: packed, table: Vec::new() };
        Ok(Restoring { ledger: self, sequence, unallocated: None })
    }
}

impl Restoring<'_> {
    /// Takes the next block; `None` after the last one.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn next_block(&mut self) -> Result<Option<Granted>> {
        let Self { ledger, sequence, .. } = self;
        let index = sequence.table.len();
        let start = index * ledger.block;
        if start >= sequence.len {
            return Ok(None);
        }
        let lean = (ledger.sink_blocks()..sequence.lean_end).contains(&index);
        let need = BlockCount { full: usize::from(!lean), lean: usize::from(lean) };
        let reclaim = ledger.pools.reserve(need)?;
        let mut allocate = Vec::new();
        let block = if lean {
            Block::Lean(ledger.pools.take_lean(&mut allocate))
        } else {
            Block::Full(ledger.pools.take_full(&mut allocate))
        };
        sequence.table.push(block);
        let tokens = (sequence.len - start).min(ledger.block);
        Ok(Some(Granted { index, block, tokens, allocate: !allocate.is_empty(), reclaim }))
    }

    /// Storage for the last block could not be had.
    pub(crate) fn no_storage(mut self) {
        self.unallocated = self.sequence.table.last().copied();
    }

    /// The sequence is whole and belongs to the cache.
    pub(crate) fn finish(mut self) -> SequenceId {
        let table = std::mem::take(&mut self.sequence.table);
        let (len, lean_end) = (self.sequence.len, self.sequence.lean_end);
        self.ledger.insert(Sequence { len, lean_end, table })
    }
}

impl Drop for Restoring<'_> {
    fn drop(&mut self) {
        for &block in &self.sequence.table {
            self.ledger.pools.give(block);
        }
        if let Some(block) = self.unallocated {
            self.ledger.pools.lost_storage(block);
        }
    }
}
