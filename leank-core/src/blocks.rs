//! Block bookkeeping: which block holds which tokens, as a pure state machine.
//!
//! The [`Ledger`] knows sequences, block tables and the two pools, and nothing about bytes of K
//! and V. A step goes through it as `plan` → (the backend moves data) → `commit`; `plan` reserves
//! every block that the step will need or changes nothing, `cancel` takes a planned step back.
//! What a backend has to do follows from the [`Step`]: give storage to [`Step::allocate`], take it
//! from [`Step::reclaim`], write new tokens where the block tables say, and, at commit, execute
//! [`Step::packs`] before it calls [`Ledger::commit`].
//!
//! Block numbers are the same in every layer, so one table per sequence serves them all.

use std::collections::HashMap;

use crate::{CacheLayout, Error, Result, Windows};

/// Most tokens of one sequence: no model's context comes near, and sizes in bytes stay far from
/// the end of `u64`.
pub const MAX_TOKENS: usize = 1 << 32;

/// Whether block `index` (tokens `index·block..(index+1)·block`) is lean in a step whose first
/// query stands at position `start`.
///
/// It is when it lies after the sink blocks and all of its tokens are older than the recent
/// window of the first query. The query's own token is always kept whole, so a `recent` of 0
/// means the same as 1.
#[must_use]
pub fn is_lean(index: usize, block: usize, windows: Windows, start: usize) -> bool {
    index >= windows.sink.div_ceil(block)
        && (index + 1) * block <= (start + 1).saturating_sub(windows.recent.max(1))
}

/// Blocks of a sequence of some length, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCount {
    /// Full blocks.
    pub full: usize,
    /// Lean blocks.
    pub lean: usize,
}

impl BlockCount {
    /// Blocks of a sequence of `len` tokens between steps.
    #[must_use]
    pub fn at(len: usize, block: usize, windows: Windows) -> Self {
        let all = len.div_ceil(block);
        let past = (len + 1).saturating_sub(windows.recent.max(1)) / block;
        let lean = past.min(all).saturating_sub(windows.sink.div_ceil(block));
        Self { full: all - lean, lean }
    }

    /// Bytes of these blocks, all layers.
    #[must_use]
    pub fn bytes(&self, layout: &CacheLayout) -> u64 {
        self.full as u64 * layout.full_bytes_all_layers()
            + self.lean as u64 * layout.lean_bytes_all_layers()
    }
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

/// A full block that becomes lean at commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// The sequence.
    pub sequence: SequenceId,
    /// Index in its block table.
    pub index: usize,
    /// The full block.
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
    /// Blocks that become lean at commit.
    pub packs: Vec<Pack>,
}

/// Bytes that a cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Tokens of all sequences.
    pub tokens: u64,
    /// Blocks in use.
    pub blocks: BlockCount,
    /// Bytes of full blocks in use.
    pub full_bytes: u64,
    /// Bytes of lean blocks in use.
    pub lean_bytes: u64,
    /// Bytes of block storage held, free blocks included.
    pub allocated_bytes: u64,
    /// Bytes that a dense cache without padding takes for the same tokens.
    pub dense_bytes: u64,
}

impl Memory {
    /// Bytes of the blocks in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.full_bytes + self.lean_bytes
    }

    /// Bytes in use over those of a dense cache: windows, padding and partly filled blocks
    /// included. `None` for an empty cache.
    #[must_use]
    pub fn whole_kv_ratio(&self) -> Option<f64> {
        (self.dense_bytes > 0).then(|| self.used_bytes() as f64 / self.dense_bytes as f64)
    }
}

#[derive(Clone, Debug, Default)]
struct Pool {
    /// Numbers handed out so far; free ones are below it.
    end: u32,
    /// Free blocks that have storage; the last one freed is taken first.
    free: Vec<u32>,
    /// Free blocks without storage.
    bare: Vec<u32>,
    used: usize,
}

impl Pool {
    /// A block, and whether it still needs storage.
    fn take(&mut self) -> (u32, bool) {
        self.used += 1;
        if let Some(id) = self.free.pop() {
            return (id, false);
        }
        let id = self.bare.pop().unwrap_or_else(|| {
            self.end += 1;
            self.end - 1
        });
        (id, true)
    }

    fn give(&mut self, id: u32) {
        self.used -= 1;
        self.free.push(id);
    }

    fn with_storage(&self) -> usize {
        self.used + self.free.len()
    }
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    len: usize,
    table: Vec<Block>,
}

/// The bookkeeping of one cache: sequences, block tables and pools. See the [module](self).
#[derive(Clone, Debug)]
pub struct Ledger {
    block: usize,
    windows: Windows,
    full_bytes: u64,
    lean_bytes: u64,
    token_bytes: u64,
    limit: Option<u64>,
    full: Pool,
    lean: Pool,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
    step: Option<Step>,
}

/// Blocks that a plan takes: fresh ones of either kind, and lean ones for packing.
#[derive(Clone, Copy, Default)]
struct Need {
    full: usize,
    lean: usize,
}

impl Ledger {
    /// Empty books for a cache of this layout.
    #[must_use]
    pub fn new(layout: &CacheLayout, windows: Windows, limit: Option<u64>) -> Self {
        Self {
            block: layout.block,
            windows,
            full_bytes: layout.full_bytes_all_layers(),
            lean_bytes: layout.lean_bytes_all_layers(),
            token_bytes: layout.dense_token_bytes as u64,
            limit,
            full: Pool::default(),
            lean: Pool::default(),
            sequences: HashMap::new(),
            next_id: 0,
            step: None,
        }
    }

    /// A new, empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence::default());
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

    /// The step under way.
    #[must_use]
    pub fn step(&self) -> Option<&Step> {
        self.step.as_ref()
    }

    /// Plans a step: reserves every block that its tokens and its commit will need.
    ///
    /// # Errors
    /// [`Error::Order`] when a step is under way, [`Error::Invalid`] for an empty entry or a
    /// sequence named twice, [`Error::UnknownSequence`], [`Error::OutOfMemory`]. Then nothing has
    /// changed.
    pub fn plan(&mut self, entries: &[StepEntry]) -> Result<&Step> {
        if self.step.is_some() {
            let when = "while a step is under way; commit or cancel it first".to_owned();
            return Err(Error::Order { call: "plan", when });
        }
        self.check_entries(entries)?;
        let mut need = Need::default();
        for entry in entries {
            let one = self.need(entry)?;
            need.full += one.full;
            need.lean += one.lean;
        }
        let mut step = Step { reclaim: self.reserve(need)?, ..Step::default() };
        for &entry in entries {
            self.place(entry, &mut step);
        }
        Ok(self.step.insert(step))
    }

    fn check_entries(&self, entries: &[StepEntry]) -> Result<()> {
        if entries.is_empty() {
            return Err(Error::invalid("step", "it names no sequence"));
        }
        let mut ids: Vec<_> = entries.iter().map(|entry| entry.sequence).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid("step", format!("sequence {} is named twice", pair[0].0)));
        }
        for entry in entries {
            let len = self.sequence(entry.sequence)?.len;
            let fits = len.checked_add(entry.tokens).is_some_and(|end| end <= MAX_TOKENS);
            if entry.tokens == 0 || !fits {
                let why = format!(
                    "{} new tokens for sequence {} of {len}; at least 1, and {MAX_TOKENS} in all",
                    entry.tokens, entry.sequence.0
                );
                return Err(Error::invalid("step", why));
            }
        }
        Ok(())
    }

    /// Whether a block that this step creates is written as a lean one at once.
    fn born_lean(&self, index: usize, start: usize, entry: &StepEntry) -> bool {
        !entry.attend
            && index * self.block >= start
            && is_lean(index, self.block, self.windows, start + entry.tokens)
    }

    fn need(&self, entry: &StepEntry) -> Result<Need> {
        let sequence = self.sequence(entry.sequence)?;
        let (start, end) = (sequence.len, sequence.len + entry.tokens);
        let after = BlockCount::at(end, self.block, self.windows);
        let lean_now =
            sequence.table.iter().filter(|block| matches!(block, Block::Lean(_))).count();
        let new = sequence.table.len()..end.div_ceil(self.block);
        let born_lean = new.clone().filter(|&b| self.born_lean(b, start, entry)).count();
        Ok(Need { full: new.len() - born_lean, lean: after.lean - lean_now })
    }

    /// Makes sure that `need` fits under the limit; returns the free blocks whose storage must go.
    fn reserve(&mut self, need: Need) -> Result<Vec<Block>> {
        let Some(limit) = self.limit else { return Ok(Vec::new()) };
        let cost = |full: usize, lean: usize| {
            full as u64 * self.full_bytes + lean as u64 * self.lean_bytes
        };
        let used = cost(self.full.used, self.lean.used);
        let needed = cost(need.full, need.lean);
        let available = limit.saturating_sub(used);
        if needed > available {
            let missing = needed - available;
            return Err(Error::OutOfMemory { needed, available, missing, limit });
        }
        // Storage that will be held: what is used, what the step takes, and free blocks beyond it.
        let mut spare_full = self.full.free.len().saturating_sub(need.full);
        let mut spare_lean = self.lean.free.len().saturating_sub(need.lean);
        let mut reclaim = Vec::new();
        while used + needed + cost(spare_full, spare_lean) > limit {
            // The oldest free block goes, of the kind that frees more.
            if spare_full > 0 {
                spare_full -= 1;
                let id = self.full.free.remove(0);
                self.full.bare.push(id);
                reclaim.push(Block::Full(id));
            } else {
                spare_lean -= 1;
                let id = self.lean.free.remove(0);
                self.lean.bare.push(id);
                reclaim.push(Block::Lean(id));
            }
        }
        Ok(reclaim)
    }

    fn place(&mut self, entry: StepEntry, step: &mut Step) {
        let id = entry.sequence;
        let mut sequence = self.sequences.remove(&id).expect("checked by check_entries");
        let start = sequence.len;
        let end = start + entry.tokens;
        for index in sequence.table.len()..end.div_ceil(self.block) {
            let lean = self.born_lean(index, start, &entry);
            let block = self.take(lean, step);
            sequence.table.push(block);
        }
        let first = self.windows.sink.div_ceil(self.block);
        for index in first..sequence.table.len() {
            if !is_lean(index, self.block, self.windows, end) {
                break;
            }
            if let Block::Full(full) = sequence.table[index] {
                let Block::Lean(lean) = self.take(true, step) else { continue };
                step.packs.push(Pack { sequence: id, index, full, lean });
            }
        }
        let (tokens, attend, row) = (entry.tokens, entry.attend, step.tokens);
        step.sequences.push(StepSequence { id, start, tokens, attend, row });
        step.tokens += tokens;
        self.sequences.insert(id, sequence);
    }

    fn take(&mut self, lean: bool, step: &mut Step) -> Block {
        let pool = if lean { &mut self.lean } else { &mut self.full };
        let (id, needs_storage) = pool.take();
        let block = if lean { Block::Lean(id) } else { Block::Full(id) };
        if needs_storage {
            step.allocate.push(block);
        }
        block
    }

    fn give(&mut self, block: Block) {
        match block {
            Block::Full(id) => self.full.give(id),
            Block::Lean(id) => self.lean.give(id),
        }
    }

    /// Ends the step: its tokens count, and packed blocks replace full ones. The backend has
    /// executed [`Step::packs`] before.
    ///
    /// # Errors
    /// [`Error::Order`] when no step is under way.
    pub fn commit(&mut self) -> Result<()> {
        let when = || "without a plan".to_owned();
        let step = self.step.take().ok_or_else(|| Error::Order { call: "commit", when: when() })?;
        for planned in &step.sequences {
            if let Some(sequence) = self.sequences.get_mut(&planned.id) {
                sequence.len = planned.start + planned.tokens;
            }
        }
        for pack in &step.packs {
            if let Some(sequence) = self.sequences.get_mut(&pack.sequence) {
                sequence.table[pack.index] = Block::Lean(pack.lean);
            }
            self.full.give(pack.full);
        }
        Ok(())
    }

    /// Takes the planned step back. Storage that was given or taken stays so. Returns whether a
    /// step was under way.
    pub fn cancel(&mut self) -> bool {
        let Some(step) = self.step.take() else { return false };
        for pack in &step.packs {
            self.lean.give(pack.lean);
        }
        for planned in &step.sequences {
            let keep = planned.start.div_ceil(self.block);
            let Some(sequence) = self.sequences.get_mut(&planned.id) else { continue };
            for block in sequence.table.split_off(keep) {
                self.give(block);
            }
        }
        true
    }

    /// Forgets a sequence; its blocks return to the pools.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Order`] while a step is under way.
    pub fn release(&mut self, id: SequenceId) -> Result<()> {
        if self.step.is_some() {
            let when = "while a step is under way; commit or cancel it first".to_owned();
            return Err(Error::Order { call: "release", when });
        }
        let sequence = self.sequences.remove(&id).ok_or(Error::UnknownSequence(id.0))?;
        for block in sequence.table {
            self.give(block);
        }
        Ok(())
    }

    /// Tells that storage for `blocks` could not be had: after [`Ledger::cancel`] they are free
    /// blocks without storage.
    pub fn lost_storage(&mut self, blocks: &[Block]) {
        for &block in blocks {
            let (pool, id) = match block {
                Block::Full(id) => (&mut self.full, id),
                Block::Lean(id) => (&mut self.lean, id),
            };
            pool.free.retain(|&free| free != id);
            pool.bare.push(id);
        }
    }

    /// Bytes held, blocks of a step under way included.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let blocks = BlockCount { full: self.full.used, lean: self.lean.used };
        let bytes = |full: usize, lean: usize| {
            (full as u64 * self.full_bytes, lean as u64 * self.lean_bytes)
        };
        let (full_bytes, lean_bytes) = bytes(blocks.full, blocks.lean);
        let (full_held, lean_held) = bytes(self.full.with_storage(), self.lean.with_storage());
        let tokens = self.sequences.values().map(|sequence| sequence.len as u64).sum();
        Memory {
            tokens,
            blocks,
            full_bytes,
            lean_bytes,
            allocated_bytes: full_held + lean_held,
            dense_bytes: tokens * self.token_bytes,
        }
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence(id.0))
    }
}
