//! A step: what the caller asks for, and what the backend has to do.

use super::{Block, SequenceId};

/// What one sequence does in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepEntry {
    /// The sequence.
    pub sequence: SequenceId,
    /// New tokens, at least one.
    pub tokens: usize,
    /// Whether the new tokens will attend. Where not (a prompt whose attention the engine computed
    /// itself), blocks that the windows leave behind go straight to lean ones.
    pub attend: bool,
}

impl StepEntry {
    /// `tokens` new tokens that attend.
    #[must_use]
    pub fn decode(sequence: SequenceId, tokens: usize) -> Self {
        Self { sequence, tokens, attend: true }
    }

    /// `tokens` new tokens that are only stored.
    #[must_use]
    pub fn store(sequence: SequenceId, tokens: usize) -> Self {
        Self { sequence, tokens, attend: false }
    }
}

/// One sequence of a planned step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSequence {
    /// The sequence.
    pub id: SequenceId,
    /// Position of its first new token: its length before the step.
    pub start: usize,
    /// New tokens.
    pub tokens: usize,
    /// Whether they attend.
    pub attend: bool,
    /// Row of its first new token among the tokens of the step.
    pub row: usize,
}

/// A full block that a sequence is about to write to while others hold it: the sequence gets a copy
/// of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// The sequence.
    pub sequence: SequenceId,
    /// Index in its block table.
    pub index: usize,
    /// The shared full block.
    pub from: u32,
    /// The full block that takes its place in the sequence's table.
    pub to: u32,
    /// Tokens of the sequence that lie in it; what is behind them need not be copied.
    pub tokens: usize,
}

/// A full block whose content becomes that of a lean block at commit. Sequences that share the
/// full block share the lean one: each pair is packed once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// The full block, completely filled.
    pub full: u32,
    /// The lean block.
    pub lean: u32,
}

/// A planned step.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Sequences in the order of the plan; their new tokens follow one another as rows.
    pub sequences: Vec<StepSequence>,
    /// Tokens of the step, all sequences together.
    pub tokens: usize,
    /// Blocks that need storage before anything is written.
    pub allocate: Vec<Block>,
    /// Free blocks whose storage must be given back first, to stay under the limit.
    pub reclaim: Vec<Block>,
    /// Blocks to copy, in all layers, before anything is written.
    pub copies: Vec<BlockCopy>,
    /// Blocks that become lean at commit.
    pub packs: Vec<Pack>,
    /// Entries of block tables that change at commit.
    pub(super) swaps: Vec<Swap>,
}

/// A full block gives way to its lean form in a block table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Swap {
    pub(super) sequence: SequenceId,
    pub(super) index: usize,
    pub(super) lean: u32,
}
