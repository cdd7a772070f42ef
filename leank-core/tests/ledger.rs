//! The ledger and the planner against a naive model, over random steps.

use std::collections::{BTreeMap, HashSet};

use leank_core::{
    Block, CacheConfig, CacheLayout, ChannelMask, Error, Footprint, LayoutRules, Ledger, ModelMask,
    ModelShape, Planner, SequenceId, StepEntry, Windows, blocks::is_lean,
};
use proptest::prelude::*;

const RULES: LayoutRules = LayoutRules {
    k_channel_multiple: 4,
    v_token_multiple: 2,
    section_align: 32,
    ..LayoutRules::PACKED
};

fn config(block: usize, windows: Windows, kept: [u16; 4]) -> CacheConfig {
    let shape = ModelShape::new(2, 4, 2, 16).unwrap();
    let heads = kept.map(|n| ChannelMask::new(16, (0..n).collect()).unwrap());
    let mask = ModelMask::new(2, 2, 16, heads.to_vec()).unwrap();
    CacheConfig { windows, block, ..CacheConfig::new(shape, mask).unwrap() }
}

#[derive(Clone, Debug)]
enum Op {
    Add,
    Step { picks: Vec<(usize, usize, bool)>, cancel: bool },
    Release(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let pick = (0usize..4, prop_oneof![Just(1usize), 1usize..40], any::<bool>());
    let op = prop_oneof![
        1 => Just(Op::Add),
        6 => (prop::collection::vec(pick, 1..4), prop::bool::weighted(0.2))
            .prop_map(|(picks, cancel)| Op::Step { picks, cancel }),
        1 => (0usize..4).prop_map(Op::Release),
    ];
    prop::collection::vec(op, 1..60)
}

fn windows() -> impl Strategy<Value = Windows> {
    (0usize..20, prop_oneof![0usize..30, Just(usize::MAX)])
        .prop_map(|(sink, recent)| Windows { sink, recent })
}

/// Everything that must hold between steps.
fn check(ledger: &Ledger, config: &CacheConfig, lens: &BTreeMap<SequenceId, usize>) {
    let planner = Planner::new(config, RULES).unwrap();
    let mut seen = HashSet::new();
    let (mut bytes, mut tokens) = (0, 0);
    for (&id, &len) in lens {
        assert_eq!(ledger.len(id).unwrap(), len);
        let table = ledger.table(id).unwrap();
        assert_eq!(table.len(), len.div_ceil(config.block));
        for (index, &block) in table.iter().enumerate() {
            assert!(seen.insert(block), "{block:?} is in two places");
            let lean = is_lean(index, config.block, config.windows, len);
            assert_eq!(matches!(block, Block::Lean(_)), lean, "block {index} at length {len}");
        }
        bytes += planner.footprint(len).unwrap().bytes;
        tokens += len as u64;
    }
    let memory = ledger.memory();
    assert_eq!(memory.used_bytes(), bytes, "planner and ledger disagree");
    assert_eq!(memory.tokens, tokens);
    let dense = tokens * planner.layout().dense_token_bytes as u64;
    assert_eq!(memory.dense_bytes, dense);
    let ratio = (tokens > 0).then(|| bytes as f64 / dense as f64);
    assert_eq!(memory.whole_kv_ratio(), ratio);
    assert_eq!(ledger.is_empty(), lens.is_empty());
    assert!(memory.allocated_bytes >= memory.used_bytes());
    assert!(memory.allocated_bytes <= config.limit.unwrap_or(u64::MAX));
}

/// Storage as a backend would hold it: a block is never written without, nor given twice.
#[derive(Default)]
struct Storage(HashSet<Block>);

impl Storage {
    fn follow(&mut self, step: &leank_core::Step) {
        for block in &step.reclaim {
            assert!(self.0.remove(block), "{block:?} reclaimed without storage");
        }
        for block in &step.allocate {
            assert!(self.0.insert(*block), "{block:?} allocated twice");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 400 }))]

    #[test]
    fn books_follow_the_definition(
        block in 1usize..12,
        windows in windows(),
        kept in prop::array::uniform4(0u16..=16),
        limit in prop::option::of(0u64..60_000),
        ops in ops(),
    ) {
        let config = CacheConfig { limit, ..config(block, windows, kept) };
        let layout = CacheLayout::new(&config, RULES).unwrap();
        let mut ledger = Ledger::new(&layout, windows, limit);
        let mut storage = Storage::default();
        let mut lens: BTreeMap<SequenceId, usize> = BTreeMap::new();
        for op in ops {
            let ids: Vec<_> = lens.keys().copied().collect();
            match op {
                Op::Add => { lens.insert(ledger.add_sequence(), 0); }
                Op::Release(at) => if let Some(id) = ids.get(at) {
                    ledger.release(*id).unwrap();
                    lens.remove(id);
                    prop_assert!(ledger.release(*id).is_err());
                },
                Op::Step { picks, cancel } => {
                    let mut entries: Vec<StepEntry> = Vec::new();
                    for (at, tokens, attend) in picks {
                        if let Some(&sequence) = ids.get(at)
                            && entries.iter().all(|entry| entry.sequence != sequence)
                        {
                            entries.push(StepEntry { sequence, tokens, attend });
                        }
                    }
                    if entries.is_empty() { continue }
                    let before = ledger.memory();
                    match ledger.plan(&entries) {
                        Ok(step) => {
                            storage.follow(step);
                            prop_assert!(ledger.memory().used_bytes() <= limit.unwrap_or(u64::MAX));
                            prop_assert!(ledger.plan(&entries).is_err());
                            for &id in &ids {
                                for block in ledger.table(id).unwrap() {
                                    prop_assert!(storage.0.contains(block));
                                }
                            }
                            if cancel {
                                prop_assert!(ledger.cancel());
                                prop_assert_eq!(ledger.memory().used_bytes(), before.used_bytes());
                            } else {
                                ledger.commit().unwrap();
                                for entry in &entries {
                                    *lens.get_mut(&entry.sequence).unwrap() += entry.tokens;
                                }
                            }
                        }
                        Err(Error::OutOfMemory { needed, available, missing, limit }) => {
                            prop_assert_eq!(missing, needed - available);
                            prop_assert_eq!(available, limit.saturating_sub(before.used_bytes()));
                            prop_assert_eq!(ledger.memory(), before);
                        }
                        Err(other) => return Err(TestCaseError::fail(other.to_string())),
                    }
                }
            }
            check(&ledger, &config, &lens);
        }
    }

    #[test]
    fn planned_tokens_are_the_most_that_decode(
        block in 1usize..12,
        windows in windows(),
        kept in prop::array::uniform4(0u16..=16),
        limit in 0u64..60_000,
    ) {
        let config = CacheConfig { limit: Some(limit), ..config(block, windows, kept) };
        let layout = CacheLayout::new(&config, RULES).unwrap();
        let planned = Planner::new(&config, RULES).unwrap().tokens_within(limit);
        let mut ledger = Ledger::new(&layout, windows, Some(limit));
        let sequence = ledger.add_sequence();
        let mut decoded = 0;
        while decoded < 3000 && ledger.plan(&[StepEntry::decode(sequence, 1)]).is_ok() {
            ledger.commit().unwrap();
            decoded += 1;
        }
        prop_assert_eq!(planned.unwrap_or(usize::MAX).min(3000), decoded);
    }

    #[test]
    fn planned_peak_is_the_least_limit_that_decodes(
        block in 1usize..9, windows in windows(), kept in prop::array::uniform4(0u16..=16),
        tokens in 1usize..200,
    ) {
        let config = config(block, windows, kept);
        let layout = CacheLayout::new(&config, RULES).unwrap();
        let planner = Planner::new(&config, RULES).unwrap();
        let Footprint { peak_bytes, .. } = planner.footprint(tokens).unwrap();
        let reaches = |limit: u64| {
            let mut ledger = Ledger::new(&layout, windows, Some(limit));
            let sequence = ledger.add_sequence();
            (0..tokens).all(|_| {
                ledger.plan(&[StepEntry::decode(sequence, 1)]).is_ok() && ledger.commit().is_ok()
            })
        };
        prop_assert!(reaches(peak_bytes));
        prop_assert!(!reaches(peak_bytes - 1));
    }
}

#[test]
fn a_long_prompt_never_passes_through_full_blocks() {
    let config = config(8, Windows { sink: 8, recent: 16 }, [4; 4]);
    let layout = CacheLayout::new(&config, RULES).unwrap();
    let mut ledger = Ledger::new(&layout, config.windows, None);
    let sequence = ledger.add_sequence();
    let step = ledger.plan(&[StepEntry::store(sequence, 1000)]).unwrap();
    assert!(step.packs.is_empty());
    let full = step.allocate.iter().filter(|block| matches!(block, Block::Full(_))).count();
    assert_eq!(full, 1 + 2, "the sink block and two recent ones");
}

#[test]
fn calls_out_of_order_are_refused() {
    let config = config(8, Windows::default(), [4; 4]);
    let layout = CacheLayout::new(&config, RULES).unwrap();
    let mut ledger = Ledger::new(&layout, config.windows, None);
    let sequence = ledger.add_sequence();
    assert!(matches!(ledger.commit(), Err(Error::Order { .. })));
    assert!(matches!(ledger.plan(&[]), Err(Error::Invalid { .. })));
    assert!(ledger.plan(&[StepEntry::decode(sequence, 0)]).is_err());
    assert!(ledger.plan(&[StepEntry::decode(SequenceId(99), 1)]).is_err());
    let twice = [StepEntry::decode(sequence, 1); 2];
    assert!(ledger.plan(&twice).is_err());
    ledger.plan(&[StepEntry::decode(sequence, 1)]).unwrap();
    assert!(matches!(ledger.release(sequence), Err(Error::Order { .. })));
    ledger.commit().unwrap();
    ledger.release(sequence).unwrap();
    assert!(ledger.is_empty());
}

#[test]
fn storage_that_could_not_be_had_is_asked_for_again() {
    let config = config(8, Windows { sink: 0, recent: 8 }, [4; 4]);
    let layout = CacheLayout::new(&config, RULES).unwrap();
    let mut ledger = Ledger::new(&layout, config.windows, None);
    let sequence = ledger.add_sequence();
    let store = [StepEntry::store(sequence, 30)];
    let asked = ledger.plan(&store).unwrap().allocate.clone();
    assert!(asked.iter().any(|block| matches!(block, Block::Lean(_))));
    assert!(asked.iter().any(|block| matches!(block, Block::Full(_))));
    // Two of them were had.
    ledger.cancel();
    ledger.lost_storage(&asked[2..]);
    let held: HashSet<_> = asked[..2].iter().copied().collect();
    let again: HashSet<_> = ledger.plan(&store).unwrap().allocate.iter().copied().collect();
    assert_eq!(again.len(), asked.len() - 2);
    assert!(again.is_disjoint(&held));
    ledger.commit().unwrap();
    let memory = ledger.memory();
    assert_eq!(memory.allocated_bytes, memory.used_bytes());
}
