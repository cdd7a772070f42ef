//! The naive model: sequences own lists of blocks, and `Rc` counts who shares them.

use std::{
    cell::RefCell,
    collections::HashSet,
    rc::{Rc, Weak},
};

use leank_core::{StepEntry, Windows, blocks::is_lean};

/// A block; its identity is its address.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) lean: bool,
    /// A lean form of this full block, which other sequences hold.
    twin: RefCell<Weak<Block>>,
}

fn new(lean: bool) -> Rc<Block> {
    Rc::new(Block { lean, twin: RefCell::default() })
}

/// A sequence: its tokens, and the blocks they lie in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) blocks: Vec<Rc<Block>>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) block: usize,
    pub(crate) windows: Windows,
}

/// What a step does to one sequence.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Blocks while the step is under way.
    pub(crate) during: Vec<Rc<Block>>,
    /// Blocks after it.
    pub(crate) after: Vec<Rc<Block>>,
    /// The last block is another one than before.
    pub(crate) copied: bool,
    /// Full blocks and the lean ones that they become.
    packs: Vec<(Rc<Block>, Rc<Block>)>,
}

impl Rules {
    /// Plans for all entries; nothing is changed.
    pub(crate) fn plan(&self, entries: &[(&Sequence, StepEntry)]) -> Vec<Plan> {
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
    pub(crate) fn place(&self, sequence: &Sequence, plan: &Plan) {
        let last = sequence.blocks.get(sequence.tokens.len() / self.block);
        if let Some(last) = last.filter(|_| !plan.copied) {
            *last.twin.borrow_mut() = Weak::new();
        }
    }
}

impl Plan {
    /// Links the forms of packed blocks; those that nobody holds any more die with the plan.
    pub(crate) fn link(&self) {
        for (full, lean) in &self.packs {
            *full.twin.borrow_mut() = Rc::downgrade(lean);
        }
    }

    /// Full blocks to be packed here, without those for which a lean form is there.
    pub(crate) fn lean_forms(&self) -> impl Iterator<Item = &Rc<Block>> {
        self.packs.iter().map(|(_, lean)| lean)
    }
}

/// Distinct blocks of a kind.
pub(crate) fn count<'a>(blocks: impl Iterator<Item = &'a Rc<Block>>, lean: bool) -> usize {
    let of_kind = blocks.filter(|block| block.lean == lean);
    of_kind.map(Rc::as_ptr).collect::<HashSet<_>>().len()
}
