//! What a backend is: [`Backend`] makes caches, [`Cache`] holds K and V and attends to them.

use std::io::{Read, Write};

use crate::{
    CacheConfig, CacheLayout, Dtype, Layer, LayoutRules, LeanFormat, Memory, Result, SequenceId,
    StepEntry,
};

/// A place where caches live and attention runs: the CPU, a CUDA device.
pub trait Backend {
    /// The caches of this backend.
    type Cache: Cache;

    /// Name for logs: device and instruction set.
    fn name(&self) -> String;

    /// What this backend asks of block layouts; with it [`crate::Planner`] predicts its bytes.
    fn layout_rules(&self) -> LayoutRules;

    /// Formats that it has for lean blocks beside full ones of this type; for
    /// [`CacheConfig::check_formats`].
    fn lean_formats(&self, full: Dtype) -> Vec<LeanFormat>;

    /// An empty cache.
    ///
    /// # Errors
    /// [`crate::Error::Mismatch`] or [`crate::Error::Invalid`] for a configuration that does not
    /// fit together, [`crate::Error::Unavailable`] for one that this backend cannot run.
    fn create(&self, config: CacheConfig) -> Result<Self::Cache>;
}

/// A lean KV cache of many sequences, and the decode attention over it.
///
/// A step is [`plan`](Cache::plan), then per layer [`append`](Cache::append) and, where the new
/// tokens attend, [`attend`](Cache::attend), then [`commit`](Cache::commit). The rows of all views
/// are the new tokens of the step's sequences, one sequence after the other in the order of the
/// plan. What attention means is defined by [`crate::oracle`].
pub trait Cache {
    /// Borrowed activations `[tokens, heads, head_dim]`.
    type View<'a>;
    /// Mutably borrowed activations `[tokens, query heads, head_dim]`.
    type ViewMut<'a>;

    /// What the cache was made for.
    fn config(&self) -> &CacheConfig;

    /// Where things lie inside its blocks.
    fn layout(&self) -> &CacheLayout;

    /// A new, empty sequence.
    fn add_sequence(&mut self) -> SequenceId;

    /// Tokens of a sequence, without those of a step under way.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`].
    fn sequence_len(&self, sequence: SequenceId) -> Result<usize>;

    /// Plans a step and reserves every block that it needs, in all layers.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] and the other errors of [`crate::Ledger::plan`],
    /// [`crate::Error::SystemMemory`]; then nothing has changed.
    fn plan(&mut self, entries: &[StepEntry]) -> Result<()>;

    /// Stores K (after RoPE) and V of the step's tokens, `[tokens, KV heads, head_dim]`.
    ///
    /// # Errors
    /// [`crate::Error::Order`] outside a step, [`crate::Error::Mismatch`] for another shape. The step
    /// stays under way: append again, or cancel it. Values are stored as they are, rounded; what is
    /// not finite reaches the queries that see it, and no other head or sequence.
    fn append(&mut self, layer: Layer, k: Self::View<'_>, v: Self::View<'_>) -> Result<()>;

    /// Attends: q and `out` are `[tokens, query heads, head_dim]`, q after RoPE. Rows of sequences
    /// that only store are neither read nor written.
    ///
    /// # Errors
    /// As [`Cache::append`]; [`crate::Error::Order`] before the layer's `append`.
    fn attend(&mut self, layer: Layer, q: Self::View<'_>, out: Self::ViewMut<'_>) -> Result<()>;

    /// Ends the step: its tokens are part of their sequences, and blocks that left the recent
    /// window are lean.
    ///
    /// # Errors
    /// [`crate::Error::Order`] without a plan, or when a layer was not appended to.
    fn commit(&mut self) -> Result<()>;

    /// Takes the step under way back, as if it had not been planned. Without one it does nothing.
    fn cancel(&mut self);

    /// A new sequence with the same tokens, in the same blocks: it takes no bytes before one of the
    /// two goes on. See [`crate::blocks`] for what becomes of shared blocks.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`], [`crate::Error::Order`] while a step is under way.
    fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId>;

    /// Takes the last tokens of a sequence back, so that `tokens` remain; lean blocks that remain
    /// stay lean.
    ///
    /// # Errors
    /// As [`crate::Ledger::truncate`]; then nothing has changed.
    fn truncate(&mut self, sequence: SequenceId, tokens: usize) -> Result<()>;

    /// Writes a sequence to `out`, for any backend to [`restore`](Cache::restore).
    ///
    /// # Errors
    /// As [`crate::saved::save`].
    fn save(&self, sequence: SequenceId, out: &mut dyn Write) -> Result<()>;

    /// A new sequence from what [`save`](Cache::save) wrote. Reads no byte beyond it.
    ///
    /// # Errors
    /// As [`crate::saved::restore`]; then nothing has changed.
    fn restore(&mut self, input: &mut dyn Read) -> Result<SequenceId>;

    /// Forgets a sequence; blocks that no other holds are free.
    ///
    /// # Errors
    /// [`crate::Error::UnknownSequence`], [`crate::Error::Order`] while a step is under way.
    fn release(&mut self, sequence: SequenceId) -> Result<()>;

    /// Bytes held.
    fn memory(&self) -> Memory;
}
