//! The naive model of block bookkeeping, beside which caches are held: sequences own lists of blocks,
//! and `Rc` counts who shares them.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    rc::{Rc, Weak},
};

use leank_core::{
    BlockCount, CacheConfig, CacheLayout, LayoutRules, Memory, Result, StepEntry, Windows,
    blocks::is_lean,
};

/// A block; its identity is its address.
#[derive(Debug)]
pub struct Block {
    /// Its kind.
    pub lean: bool,
    /// A lean form of this full block, which other sequences hold.
    twin: RefCell<Weak<Block>>,
}

fn new(lean: bool) -> Rc<Block> {
    Rc::new(Block { lean, twin: RefCell::default() })
}

/// A sequence: its tokens, and the blocks they lie in.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// What its tokens are, as the user of the model names them.
    pub tokens: Vec<u32>,
    /// Its blocks, in order.
    pub blocks: Vec<Rc<Block>>,
}

impl Sequence {
    /// The same tokens in blocks that no other sequence shares.
    #[must_use]
    pub fn apart(&self) -> Self {
        let blocks = self.blocks.iter().map(|block| new(block.lean)).collect();
        Self { tokens: self.tokens.clone(), blocks }
    }

    /// The index after the last lean block; 0 where there is none.
    #[must_use]
    pub fn packed(&self) -> usize {
        self.blocks.iter().rposition(|block| block.lean).map_or(0, |last| last + 1)
    }
}

/// Where blocks begin and when they become lean.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Tokens per block.
    pub block: usize,
    /// Windows.
    pub windows: Windows,
}

/// What a step does to one sequence.
#[derive(Debug)]
pub struct Plan {
    /// Blocks while the step is under way.
    pub during: Vec<Rc<Block>>,
    /// Blocks after it.
    pub after: Vec<Rc<Block>>,
    /// The last block is another one than before.
    pub copied: bool,
    /// Full blocks and the lean ones that they become.
    packs: Vec<(Rc<Block>, Rc<Block>)>,
}

impl Rules {
    /// The longest length up to `tokens` and the shortest from `tokens` on that a sequence can be cut
    /// to: not inside a lean block.
    ///
    /// # Panics
    /// When the sequence has fewer tokens.
    #[must_use]
    pub fn nearest_lengths(&self, sequence: &Sequence, tokens: usize) -> (usize, usize) {
        let allowed = |tokens: &usize| {
            tokens.is_multiple_of(self.block)
                || sequence.blocks.get(tokens / self.block).is_none_or(|block| !block.lean)
        };
        let below = (0..=tokens).rev().find(allowed).expect("0 is allowed");
        let above = (tokens..=sequence.tokens.len()).find(allowed).expect("its length is allowed");
        (below, above)
    }

    /// Cuts a sequence to a length that is allowed.
    pub fn truncate(&self, sequence: &mut Sequence, tokens: usize) {
        sequence.tokens.truncate(tokens);
        sequence.blocks.truncate(tokens.div_ceil(self.block));
    }

    /// Plans for all entries; nothing is changed.
    #[must_use]
    pub fn plan(&self, entries: &[(&Sequence, StepEntry)]) -> Vec<Plan> {
        let mut plans: Vec<Plan> = Vec::new();
        // Blocks are shared as they are before the step.
        let shared: Vec<bool> = entries
            .iter()
            .map(|(sequence, _)| {
                let last = sequence.blocks.get(sequence.tokens.len() / self.block);
                last.is_some_and(|last| Rc::strong_count(last) > 1)
            })
            .collect();
        for ((sequence, entry), copied) in entries.iter().zip(shared) {
            let plan = self.plan_one(sequence, entry, copied, &plans);
            plans.push(plan);
        }
        plans
    }

    fn plan_one(
        &self,
        sequence: &Sequence,
        entry: &StepEntry,
        copied: bool,
        before: &[Plan],
    ) -> Plan {
        let start = sequence.tokens.len();
        let end = start + entry.tokens;
        let leaves = |index: usize| is_lean(index, self.block, self.windows, end);
        let mut during = sequence.blocks.clone();
        if copied {
            during[start / self.block] = new(false);
        }
        for index in during.len()..end.div_ceil(self.block) {
            during.push(new(!entry.attend && leaves(index)));
        }
        let mut after = during.clone();
        let mut packs: Vec<(Rc<Block>, Rc<Block>)> = Vec::new();
        for (index, held) in after.iter_mut().enumerate() {
            if held.lean || !leaves(index) {
                continue;
            }
            let full = held.clone();
            let untouched = index < start / self.block;
            let twin = full.twin.borrow().upgrade().filter(|_| untouched);
            let made = || {
                let mut packs = before.iter().flat_map(|plan| &plan.packs);
                packs.find(|(other, _)| Rc::ptr_eq(other, &full)).map(|(_, lean)| lean.clone())
            };
            let lean = twin.or_else(made).unwrap_or_else(|| new(true));
            packs.push((full, lean.clone()));
            *held = lean;
        }
        Plan { during, after, copied, packs }
    }

    /// A planned step writes to its sequence's last block in place: it no longer holds what its
    /// lean form holds.
    pub fn place(&self, sequence: &Sequence, plan: &Plan) {
        let last = sequence.blocks.get(sequence.tokens.len() / self.block);
        if let Some(last) = last.filter(|_| !plan.copied) {
            *last.twin.borrow_mut() = Weak::new();
        }
    }
}

impl Plan {
    /// Links the forms of packed blocks; those that nobody holds any more die with the plan.
    pub fn link(&self) {
        for (full, lean) in &self.packs {
            *full.twin.borrow_mut() = Rc::downgrade(lean);
        }
    }

    /// Full blocks to be packed here, without those for which a lean form is there.
    pub fn lean_forms(&self) -> impl Iterator<Item = &Rc<Block>> {
        self.packs.iter().map(|(_, lean)| lean)
    }
}

/// Distinct blocks.
fn count<'a>(blocks: impl Iterator<Item = &'a Rc<Block>>) -> BlockCount {
    let mut count = BlockCount::default();
    let mut seen = HashSet::new();
    for block in blocks.filter(|block| seen.insert(Rc::as_ptr(block))) {
        *if block.lean { &mut count.lean } else { &mut count.full } += 1;
    }
    count
}

/// What a cache must say that it holds, to the byte, from its sequences alone.
#[derive(Clone, Debug)]
pub struct Books {
    /// When blocks become lean.
    pub rules: Rules,
    layout: CacheLayout,
    limit: Option<u64>,
    /// Blocks that have storage, free ones included.
    stored: BlockCount,
}

impl Books {
    /// Those of an empty cache on a backend with these rules.
    ///
    /// # Errors
    /// As [`CacheLayout::new`].
    pub fn new(config: &CacheConfig, rules: LayoutRules) -> Result<Self> {
        let layout = CacheLayout::new(config, rules)?;
        let rules = Rules { block: config.block, windows: config.windows };
        Ok(Self { rules, layout, limit: config.limit, stored: BlockCount::default() })
    }

    /// What a cache of these sequences holds between steps.
    #[must_use]
    pub fn memory<'a>(&self, sequences: impl Iterator<Item = &'a Sequence> + Clone) -> Memory {
        let blocks = self.used(sequences.clone());
        let tokens = sequences.clone().map(|sequence| sequence.tokens.len() as u64).sum();
        let dense = self.distinct_tokens(sequences) * self.layout.dense_token_bytes as u64;
        Memory {
            tokens,
            blocks,
            full_bytes: BlockCount { lean: 0, ..blocks }.bytes(&self.layout),
            lean_bytes: BlockCount { full: 0, ..blocks }.bytes(&self.layout),
            allocated_bytes: self.stored.bytes(&self.layout),
            dense_bytes: dense,
        }
    }

    /// Blocks in use between steps.
    #[must_use]
    pub fn used<'a>(&self, sequences: impl Iterator<Item = &'a Sequence>) -> BlockCount {
        count(sequences.flat_map(|sequence| &sequence.blocks))
    }

    /// Blocks in use while these plans are under way.
    #[must_use]
    pub fn reserved<'a>(
        &self,
        sequences: impl Iterator<Item = &'a Sequence>,
        plans: &[Plan],
    ) -> BlockCount {
        let held = sequences.flat_map(|sequence| &sequence.blocks);
        let planned = plans.iter().flat_map(|plan| plan.during.iter().chain(plan.lean_forms()));
        count(held.chain(planned))
    }

    /// Bytes of these blocks that the limit does not allow; 0 where they fit.
    #[must_use]
    pub fn missing(&self, blocks: BlockCount) -> u64 {
        self.limit.map_or(0, |limit| blocks.bytes(&self.layout).saturating_sub(limit))
    }

    /// Storage comes for the blocks that a step takes, which fit: from `used` to `reserved`. Free
    /// blocks of which there are too many for the limit lose theirs, full ones first.
    pub fn reserve(&mut self, used: BlockCount, reserved: BlockCount) {
        let spare = |stored: usize, used: usize, reserved: usize| {
            let free = stored - used;
            reserved + free.saturating_sub(reserved - used)
        };
        let mut stored = BlockCount {
            full: spare(self.stored.full, used.full, reserved.full),
            lean: spare(self.stored.lean, used.lean, reserved.lean),
        };
        while self.missing(stored) > 0 {
            let full = stored.full > reserved.full;
            *if full { &mut stored.full } else { &mut stored.lean } -= 1;
        }
        self.stored = stored;
    }

    /// Storage comes for a sequence that is restored beside `used` blocks, block by block.
    pub fn restore(&mut self, mut used: BlockCount, sequence: &Sequence) {
        for block in &sequence.blocks {
            let before = used;
            *if block.lean { &mut used.lean } else { &mut used.full } += 1;
            self.reserve(before, used);
        }
    }

    /// Tokens of all sequences; those that several share count once, also where some of them hold the
    /// lean form of the others' block.
    fn distinct_tokens<'a>(&self, sequences: impl Iterator<Item = &'a Sequence>) -> u64 {
        let mut filled: HashMap<*const Block, usize> = HashMap::new();
        for sequence in sequences {
            let tokens = sequence.tokens.chunks(self.rules.block).map(<[u32]>::len);
            for (block, tokens) in sequence.blocks.iter().zip(tokens) {
                let form = block.twin.borrow().upgrade().unwrap_or_else(|| Rc::clone(block));
                let most = filled.entry(Rc::as_ptr(&form)).or_insert(0);
                *most = tokens.max(*most);
            }
        }
        filled.values().map(|&tokens| tokens as u64).sum()
    }
}
