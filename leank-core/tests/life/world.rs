//! A ledger, storage that follows its steps, and the model beside them.

use std::{collections::HashMap, rc::Rc};

use leank_core::{
    Block, CacheConfig, CacheLayout, Error, LayoutRules, Ledger, SequenceId, Step, StepEntry,
};
use leank_testkit::blocks::{self as model, Books, Plan, Sequence};

/// Most tokens of all sequences together.
const MAX_TOKENS: usize = 600;
/// What storage holds before anything is written to it.
const GARBAGE: u32 = u32::MAX;

pub(crate) struct World {
    config: CacheConfig,
    layout: CacheLayout,
    books: Books,
    ledger: Ledger,
    sequences: Vec<(SequenceId, Sequence)>,
    /// Token numbers per block.
    storage: HashMap<Block, Vec<u32>>,
    next_token: u32,
}

impl World {
    pub(crate) fn new(config: &CacheConfig, rules: LayoutRules) -> Self {
        let layout = CacheLayout::new(config, rules).unwrap();
        Self {
            ledger: Ledger::new(&layout, config.windows, config.limit),
            books: Books::new(config, rules).unwrap(),
            config: config.clone(),
            layout,
            sequences: Vec::new(),
            storage: HashMap::new(),
            next_token: 0,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub(crate) fn add(&mut self) {
        self.sequences.push((self.ledger.add_sequence(), Sequence::default()));
    }

    pub(crate) fn fork(&mut self, at: usize) {
        let Some((id, sequence)) = self.sequences.get(at).cloned() else { return };
        let fork = self.ledger.fork(id).unwrap();
        assert!(self.sequences.iter().all(|(id, _)| *id != fork));
        self.sequences.push((fork, sequence));
    }

    pub(crate) fn release(&mut self, at: usize) {
        if at < self.sequences.len() {
            let (id, _) = self.sequences.remove(at);
            self.ledger.release(id).unwrap();
            assert!(matches!(self.ledger.release(id), Err(Error::UnknownSequence(_))));
        }
    }

    /// Takes up to `back` tokens of a sequence back.
    pub(crate) fn truncate(&mut self, at: usize, back: usize) {
        let Some((id, sequence)) = self.sequences.get_mut(at) else { return };
        let len = sequence.tokens.len();
        let tokens = len - back % (len + 1);
        let rules = self.books.rules;
        let (below, above) = rules.nearest_lengths(sequence, tokens);
        assert_eq!(self.ledger.nearest_lengths(*id, tokens).unwrap(), (below, above));
        assert!(self.ledger.nearest_lengths(*id, len + 1).is_err());
        let result = self.ledger.truncate(*id, tokens);
        if below < tokens {
            assert!(matches!(result, Err(Error::Invalid { .. })), "{result:?}");
            return;
        }
        result.unwrap();
        rules.truncate(sequence, tokens);
    }

    pub(crate) fn step(&mut self, picks: &[(usize, usize, bool)], cancel: bool) {
        let mut chosen: Vec<usize> = Vec::new();
        let mut entries: Vec<StepEntry> = Vec::new();
        for &(at, tokens, attend) in picks {
            if let Some(&(sequence, _)) = self.sequences.get(at)
                && !chosen.contains(&at)
            {
                chosen.push(at);
                entries.push(StepEntry { sequence, tokens, attend });
            }
        }
        let held: usize = self.sequences.iter().map(|(_, sequence)| sequence.tokens.len()).sum();
        let new: usize = entries.iter().map(|entry| entry.tokens).sum();
        if entries.is_empty() || held + new > MAX_TOKENS {
            return;
        }
        let named: Vec<_> =
            chosen.iter().map(|&at| &self.sequences[at].1).zip(entries.iter().copied()).collect();
        let rules = self.books.rules;
        let plans = rules.plan(&named);
        let used = self.books.used(self.models());
        let needed = self.books.reserved(self.models(), &plans);
        let fits = self.books.missing(needed) == 0;
        let before = (self.ledger.memory(), self.tables());
        let step = match self.ledger.plan(&entries) {
            Ok(step) => step.clone(),
            Err(Error::OutOfMemory { needed: bytes, available, missing, .. }) => {
                assert!(!fits, "refused although it fits");
                assert_eq!(missing, bytes - available);
                let used = before.0.used_bytes();
                assert_eq!(bytes, needed.bytes(&self.layout) - used, "not what is needed");
                assert_eq!((self.ledger.memory(), self.tables()), before);
                return;
            }
            Err(other) => panic!("{other}"),
        };
        assert!(fits, "accepted although it does not fit");
        self.books.reserve(used, needed);
        assert_eq!(self.ledger.memory().blocks, needed);
        for (&at, plan) in chosen.iter().zip(&plans) {
            rules.place(&self.sequences[at].1, plan);
            let (id, sequence) = &self.sequences[at];
            self.check_copy(&step, *id, sequence, plan);
        }
        assert_eq!(step.copies.len(), plans.iter().filter(|plan| plan.copied).count());
        self.follow(&step);
        let written = self.append(&step);
        if cancel {
            assert!(self.ledger.cancel());
            assert_eq!((self.ledger.memory().blocks, self.tables()), (before.0.blocks, before.1));
            return;
        }
        self.pack(&step);
        self.ledger.commit().unwrap();
        for ((&at, plan), tokens) in chosen.iter().zip(plans).zip(written) {
            plan.link();
            let (_, sequence) = &mut self.sequences[at];
            sequence.tokens.extend(tokens);
            sequence.blocks = plan.after;
        }
    }

    fn models(&self) -> impl Iterator<Item = &Sequence> + Clone {
        self.sequences.iter().map(|(_, sequence)| sequence)
    }

    fn check_copy(&self, step: &Step, id: SequenceId, sequence: &Sequence, plan: &Plan) {
        let copy = step.copies.iter().find(|copy| copy.sequence == id);
        assert_eq!(copy.is_some(), plan.copied, "copied exactly when shared");
        if let Some(copy) = copy {
            let len = sequence.tokens.len();
            assert_eq!(
                (copy.index, copy.tokens),
                (len / self.books.rules.block, len % self.books.rules.block)
            );
            assert_eq!(self.ledger.table(id).unwrap()[copy.index], Block::Full(copy.to));
        }
    }

    fn tables(&self) -> Vec<Vec<Block>> {
        self.sequences.iter().map(|(id, _)| self.ledger.table(*id).unwrap().to_vec()).collect()
    }

    /// What a backend does after a plan.
    fn follow(&mut self, step: &Step) {
        for block in &step.reclaim {
            self.storage.remove(block).expect("reclaimed without storage");
        }
        for &block in &step.allocate {
            let fresh = self.storage.insert(block, vec![GARBAGE; self.books.rules.block]);
            assert!(fresh.is_none(), "{block:?} allocated twice");
        }
        for copy in &step.copies {
            let from = self.storage[&Block::Full(copy.from)][..copy.tokens].to_vec();
            let to = self.storage.get_mut(&Block::Full(copy.to)).expect("no storage");
            to.fill(GARBAGE);
            to[..copy.tokens].copy_from_slice(&from);
        }
    }

    /// Writes new tokens where the block tables say; returns them per sequence of the step.
    fn append(&mut self, step: &Step) -> Vec<Vec<u32>> {
        let mut written = Vec::new();
        for planned in &step.sequences {
            let tokens: Vec<u32> = (self.next_token..).take(planned.tokens).collect();
            self.next_token += planned.tokens as u32;
            let table = self.ledger.table(planned.id).unwrap();
            for (position, &token) in (planned.start..).zip(&tokens) {
                let block = table[position / self.books.rules.block];
                let rows = self.storage.get_mut(&block).expect("written without storage");
                rows[position % self.books.rules.block] = token;
            }
            written.push(tokens);
        }
        written
    }

    fn pack(&mut self, step: &Step) {
        for pack in &step.packs {
            let full = self.storage[&Block::Full(pack.full)].clone();
            assert!(!full.contains(&GARBAGE), "packed before it is filled");
            *self.storage.get_mut(&Block::Lean(pack.lean)).expect("no storage") = full;
        }
    }

    /// Everything that must hold between steps.
    pub(crate) fn check(&self) {
        // Blocks of the ledger are those of the model, one for one.
        let mut in_ledger: HashMap<*const model::Block, Block> = HashMap::new();
        let mut in_model: HashMap<Block, *const model::Block> = HashMap::new();
        for (id, sequence) in &self.sequences {
            let table = self.ledger.table(*id).unwrap();
            assert_eq!(self.ledger.len(*id).unwrap(), sequence.tokens.len());
            assert_eq!(table.len(), sequence.blocks.len());
            let lean = self.ledger.lean_blocks(*id).unwrap();
            for (index, (&block, model)) in table.iter().zip(&sequence.blocks).enumerate() {
                assert_eq!(matches!(block, Block::Lean(_)), model.lean);
                assert_eq!(lean.contains(&index), model.lean);
                let address = Rc::as_ptr(model);
                assert_eq!(*in_ledger.entry(address).or_insert(block), block);
                assert_eq!(*in_model.entry(block).or_insert(address), address);
                // And they hold this sequence's tokens.
                let tokens = sequence.tokens.chunks(self.books.rules.block).nth(index).unwrap();
                assert_eq!(self.storage[&block][..tokens.len()], *tokens);
            }
        }
        let memory = self.ledger.memory();
        assert_eq!(memory, self.books.memory(self.models()));
        assert!(memory.allocated_bytes >= memory.used_bytes());
        assert!(memory.allocated_bytes <= self.config.limit.unwrap_or(u64::MAX));
    }
}
