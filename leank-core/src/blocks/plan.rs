//! `plan`, `commit`, `cancel`: what a step takes is decided first, as drafts that change nothing,
//! then reserved as a whole, then placed.

use std::ops::Range;

use super::{
    Block, BlockCopy, BlockCount, Ledger, MAX_TOKENS, Pack, Step, StepEntry, StepSequence,
    step::Swap,
};
use crate::{Error, Result};

/// What one entry of a step takes.
struct Draft {
    entry: StepEntry,
    start: usize,
    /// The last block is partly filled, and others hold it too.
    copies: bool,
    /// Indices in the block table that it adds.
    fresh: Range<usize>,
    /// Those among them that are written as lean blocks at once.
    born_lean: Range<usize>,
    /// Blocks that become lean at commit.
    packs: Vec<(usize, PackTo)>,
}

/// Where the lean form of a block comes from.
enum PackTo {
    /// It is made.
    New,
    /// It is there: another sequence left the block behind in an earlier step.
    Twin(u32),
    /// It is made for another sequence of this step: number in [`Step::packs`].
    Made(usize),
}

/// What a whole step takes.
#[derive(Default)]
struct Drafts {
    entries: Vec<Draft>,
    need: BlockCount,
    /// Blocks that become lean: the length of [`Step::packs`].
    packs: usize,
    /// Shared full blocks among them, with their numbers in [`Step::packs`].
    shared_packs: Vec<(u32, usize)>,
}

impl Ledger {
    /// Plans a step: reserves every block that its tokens and its commit will need.
    ///
    /// # Errors
    /// [`Error::Order`] when a step is under way, [`Error::Invalid`] for an empty entry or a
    /// sequence named twice, [`Error::UnknownSequence`], [`Error::OutOfMemory`]. Then nothing has
    /// changed.
    pub fn plan(&mut self, entries: &[StepEntry]) -> Result<&Step> {
        self.outside_a_step("plan")?;
        self.check_entries(entries)?;
        let mut drafts = Drafts::default();
        for &entry in entries {
            self.draft(entry, &mut drafts)?;
        }
        let mut step = Step { reclaim: self.pools.reserve(drafts.need)?, ..Step::default() };
        for draft in drafts.entries {
            self.place(draft, &mut step);
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

    fn draft(&self, entry: StepEntry, drafts: &mut Drafts) -> Result<()> {
        let sequence = self.sequence(entry.sequence)?;
        let (start, end) = (sequence.len, sequence.len + entry.tokens);
        let fresh = sequence.table.len()..end.div_ceil(self.block);
        // Blocks that the windows leave behind in this step.
        let left = sequence.lean_end..self.lean_end(end).max(sequence.lean_end);
        let born_lean = if entry.attend {
            fresh.start..fresh.start
        } else {
            left.start.max(fresh.start)..left.end.max(fresh.start)
        };
        // The block that the first new token goes to, where it is there already.
        let written = sequence.table.get(start / self.block).copied();
        let copies = written.is_some_and(|block| self.pools.is_shared(block));
        let mut packs = Vec::new();
        for index in left.filter(|index| !born_lean.contains(index)) {
            let kept = index < start / self.block;
            let unwritten = sequence.table.get(index).filter(|_| kept);
            packs.push((index, self.pack_to(unwritten, drafts)));
        }
        drafts.need.full += usize::from(copies) + fresh.len() - born_lean.len();
        drafts.need.lean += born_lean.len();
        drafts.entries.push(Draft { entry, start, copies, fresh, born_lean, packs });
        Ok(())
    }

    /// Where the lean form of a block comes from; `unwritten` is the block where this step does not
    /// write to it.
    fn pack_to(&self, unwritten: Option<&Block>, drafts: &mut Drafts) -> PackTo {
        if let Some(&Block::Full(full)) = unwritten {
            if let Some(lean) = self.pools.lean_twin(full) {
                return PackTo::Twin(lean);
            }
            let of_this = |(shared, _): &&(u32, usize)| *shared == full;
            if let Some(&(_, number)) = drafts.shared_packs.iter().find(of_this) {
                return PackTo::Made(number);
            }
            if self.pools.is_shared(Block::Full(full)) {
                drafts.shared_packs.push((full, drafts.packs));
            }
        }
        drafts.packs += 1;
        drafts.need.lean += 1;
        PackTo::New
    }

    fn place(&mut self, draft: Draft, step: &mut Step) {
        let id = draft.entry.sequence;
        // Found by `draft` a moment ago.
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Some(Block::Full(last)) = sequence.table.get_mut(draft.start / self.block) {
            if draft.copies {
                let to = self.pools.take_full(&mut step.allocate);
                step.copies.push(BlockCopy {
                    sequence: id,
                    index: draft.start / self.block,
                    from: std::mem::replace(last, to),
                    to,
                    tokens: draft.start % self.block,
                });
            } else {
                self.pools.will_change(*last);
            }
        }
        for index in draft.fresh {
            sequence.table.push(if draft.born_lean.contains(&index) {
                Block::Lean(self.pools.take_lean(&mut step.allocate))
            } else {
                Block::Full(self.pools.take_full(&mut step.allocate))
            });
        }
        for (index, to) in draft.packs {
            let Block::Full(full) = sequence.table[index] else { continue };
            let lean = match to {
                PackTo::New => {
                    let lean = self.pools.take_lean(&mut step.allocate);
                    step.packs.push(Pack { full, lean });
                    lean
                }
                PackTo::Twin(lean) => lean,
                PackTo::Made(number) => step.packs[number].lean,
            };
            step.swaps.push(Swap { sequence: id, index, lean });
        }
        let StepEntry { tokens, attend, .. } = draft.entry;
        step.sequences.push(StepSequence {
            id,
            start: draft.start,
            tokens,
            attend,
            row: step.tokens,
        });
        step.tokens += tokens;
    }

    /// Ends the step: its tokens count, and lean blocks replace full ones. The backend has executed
    /// [`Step::copies`] and [`Step::packs`] before.
    ///
    /// # Errors
    /// [`Error::Order`] when no step is under way.
    pub fn commit(&mut self) -> Result<()> {
        let when = || "without a plan".to_owned();
        let step = self.step.take().ok_or_else(|| Error::Order { call: "commit", when: when() })?;
        for planned in &step.sequences {
            let end = planned.start + planned.tokens;
            let lean_end = self.lean_end(end);
            if let Some(sequence) = self.sequences.get_mut(&planned.id) {
                sequence.len = end;
                sequence.lean_end = sequence.lean_end.max(lean_end);
            }
        }
        for swap in &step.swaps {
            if let Some(sequence) = self.sequences.get_mut(&swap.sequence) {
                let lean = Block::Lean(swap.lean);
                self.pools.share(lean);
                let full = std::mem::replace(&mut sequence.table[swap.index], lean);
                self.pools.give(full);
            }
        }
        for pack in &step.packs {
            self.pools.join(pack.full, pack.lean);
            // The step's own reference.
            self.pools.give(Block::Lean(pack.lean));
        }
        for copy in &step.copies {
            self.pools.give(Block::Full(copy.from));
        }
        Ok(())
    }

    /// Takes the planned step back. Storage that was given or taken stays so. Returns whether a
    /// step was under way.
    pub fn cancel(&mut self) -> bool {
        let Some(step) = self.step.take() else { return false };
        for pack in &step.packs {
            self.pools.give(Block::Lean(pack.lean));
        }
        for planned in &step.sequences {
            let keep = planned.start.div_ceil(self.block);
            let Some(sequence) = self.sequences.get_mut(&planned.id) else { continue };
            for block in sequence.table.split_off(keep) {
                self.pools.give(block);
            }
        }
        for copy in &step.copies {
            if let Some(sequence) = self.sequences.get_mut(&copy.sequence) {
                sequence.table[copy.index] = Block::Full(copy.from);
            }
            self.pools.give(Block::Full(copy.to));
        }
        true
    }
}
