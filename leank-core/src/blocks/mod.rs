//! Block bookkeeping: which block holds which tokens, as a pure state machine.
//!
//! The [`Ledger`] knows sequences, block tables and the two pools, and nothing about bytes of K
//! and V. Block numbers are the same in every layer, so one table per sequence serves them all.
//!
//! # A step
//! `plan` → (the backend moves data) → `commit`; `plan` reserves every block that the step will
//! need, copies included, or changes nothing; `cancel` takes a planned step back. What a backend
//! has to do follows from the [`Step`], in this order:
//!
//! 1. take storage from [`Step::reclaim`], give it to [`Step::allocate`];
//! 2. carry out [`Step::copies`] in every layer;
//! 3. write new tokens where the block tables say;
//! 4. at commit, execute [`Step::packs`] in every layer, then call [`Ledger::commit`].
//!
//! # Shared blocks
//! [`Ledger::fork`] makes a sequence that holds the blocks of another one. Blocks count their
//! references, and bytes of a shared block count once. Two things can happen to it:
//!
//! - **It is written to.** Only the last block of a sequence is, where it is partly filled. Whoever
//!   shares it at the time of the plan gets a copy of its own first. (Where *all* sharers go on in
//!   one step the last of them could write in place, but then a cancelled step would not leave the
//!   others' tokens as they were.)
//! - **It leaves the recent window** of one of its sequences, which swaps it for its lean form. The
//!   others keep the full block until it leaves theirs; then they take the lean one that is there.
//!   So each shared block is packed once, whether its sharers leave it behind in one step or in
//!   several. While both forms are in use, both cost bytes.
//!
//! # Rollback
//! [`Ledger::truncate`] takes the last tokens of a sequence back; blocks that only they needed
//! return to the pool. A lean block has lost channels for good. So
//!
//! - the new end may lie anywhere in a full block and at every block boundary, but not inside a lean
//!   block, which would have to take new tokens ([`Ledger::nearest_lengths`] tells where);
//! - lean blocks that remain **stay lean**, also those that the windows would keep whole at the new
//!   length. They are still the blocks from the sink's end up to some index, *packed*, which only
//!   grows by steps and shrinks by truncation. [`Attention::output_packed`] takes it, so that the
//!   results of later steps are defined.
//!
//! Taking `n` tokens back therefore makes blocks lean at most `n` tokens too early, and nothing
//! happens at all where no block boundary crossed the recent window meanwhile. To be sure of that
//! in speculative decoding, learn and run with a `recent` that is longer by the draft.
//!
//! [`Attention::output_packed`]: crate::oracle::Attention::output_packed

mod ledger;
mod life;
mod memory;
mod plan;
mod pool;
mod restore;
mod step;

pub use ledger::Ledger;
pub use memory::{BlockCount, Memory};
pub(crate) use restore::Granted;
pub use step::{BlockCopy, Pack, Step, StepEntry, StepSequence};

use crate::Windows;

/// Most tokens of one sequence: no model's context comes near, and sizes in bytes stay far from
/// the end of `u64`.
pub const MAX_TOKENS: usize = 1 << 32;

/// Whether block `index` (tokens `index·block..(index+1)·block`) is lean in a step whose first
/// query stands at position `start`.
///
/// It is when it lies after the sink blocks and all of its tokens are older than the recent
/// window of the first query. The query's own token is always kept whole, so a `recent` of 0
/// means the same as 1. (After a truncation more blocks may be lean: see the [module](self).)
#[must_use]
pub fn is_lean(index: usize, block: usize, windows: Windows, start: usize) -> bool {
    index >= windows.sink.div_ceil(block)
        && (index + 1) * block <= (start + 1).saturating_sub(windows.recent.max(1))
}

/// Names a sequence of one cache; never used again after its release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A block of a sequence: its kind and its number in the pool of that kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// K and V of every head, whole.
    Full(u32),
    /// Kept channels of K, V of live heads.
    Lean(u32),
}
