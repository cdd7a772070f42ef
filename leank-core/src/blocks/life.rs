//! The life of a sequence beside its steps: fork, truncate, release.

use super::{Ledger, SequenceId, ledger::Sequence};
use crate::{Error, Result};

impl Ledger {
    /// A new, empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        let lean_end = self.sink_blocks();
        self.insert(Sequence { len: 0, lean_end, table: Vec::new() })
    }

    /// A new sequence that holds the same tokens as `id`, in the same blocks: it takes no bytes of
    /// its own before one of the two goes on.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Order`] while a step is under way.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        self.outside_a_step("fork")?;
        let twin = self.sequence(id)?.clone();
        for &block in &twin.table {
            self.pools.share(block);
        }
        Ok(self.insert(twin))
    }

    /// Takes the last tokens of a sequence back, so that `tokens` remain. Lean blocks that remain
    /// stay lean.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Order`] while a step is under way; [`Error::Invalid`]
    /// for more tokens than there are, and for an end inside a lean block: the message names the
    /// [nearest lengths](Ledger::nearest_lengths). Then nothing has changed.
    pub fn truncate(&mut self, id: SequenceId, tokens: usize) -> Result<()> {
        self.outside_a_step("truncate")?;
        let (below, above) = self.nearest_lengths(id, tokens)?;
        if below < tokens {
            let why = format!(
                "sequence {} cannot end after {tokens} tokens, inside a block that is lean and \
                 cannot take new ones; the nearest lengths it can be cut to are {below} and {above}",
                id.0
            );
            return Err(Error::invalid("truncation", why));
        }
        let (block, first) = (self.block, self.sink_blocks());
        let sequence = self.sequences.get_mut(&id).ok_or(Error::UnknownSequence(id.0))?;
        sequence.len = tokens;
        sequence.lean_end = sequence.lean_end.min(tokens / block).max(first);
        for dropped in sequence.table.split_off(tokens.div_ceil(block)) {
            self.pools.give(dropped);
        }
        Ok(())
    }

    /// The longest length up to `tokens` and the shortest from `tokens` on that [`truncate`] can cut
    /// a sequence to: both are `tokens`, or the two ends of the lean block that they end in.
    ///
    /// [`truncate`]: Ledger::truncate
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Invalid`] for more tokens than there are.
    pub fn nearest_lengths(&self, id: SequenceId, tokens: usize) -> Result<(usize, usize)> {
        let sequence = self.sequence(id)?;
        if tokens > sequence.len {
            let why = format!("sequence {} has {} tokens, fewer than {tokens}", id.0, sequence.len);
            return Err(Error::invalid("truncation", why));
        }
        let index = tokens / self.block;
        let lean = self.sink_blocks() <= index && index < sequence.lean_end;
        if !lean || tokens.is_multiple_of(self.block) {
            return Ok((tokens, tokens));
        }
        Ok((index * self.block, (index + 1) * self.block))
    }

    /// Forgets a sequence; blocks that no other holds return to the pools.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Order`] while a step is under way.
    pub fn release(&mut self, id: SequenceId) -> Result<()> {
        self.outside_a_step("release")?;
        let sequence = self.sequences.remove(&id).ok_or(Error::UnknownSequence(id.0))?;
        for block in sequence.table {
            self.pools.give(block);
        }
        Ok(())
    }
}
