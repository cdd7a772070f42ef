//! Sequences that are extended, forked, truncated and released in any order, against a naive model:
//! every sequence owns a list of reference-counted blocks, and blocks hold token numbers.

mod world;

use leank_core::{
    CacheConfig, CacheLayout, ChannelMask, Error, LayoutRules, Ledger, ModelMask, ModelShape,
    SequenceId, StepEntry, Windows,
};
use proptest::prelude::*;
use world::World;

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

fn ledger(config: &CacheConfig) -> Ledger {
    let layout = CacheLayout::new(config, RULES).unwrap();
    Ledger::new(&layout, config.windows, config.limit)
}

#[derive(Clone, Debug)]
enum Op {
    Add,
    Step { picks: Vec<(usize, usize, bool)>, cancel: bool },
    Fork(usize),
    Truncate(usize, usize),
    Release(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let sequence = 0usize..6;
    let tokens = prop_oneof![3 => Just(1usize), 1 => 1usize..30];
    let pick = (sequence.clone(), tokens, any::<bool>());
    let back = prop_oneof![1usize..6, 0usize..60];
    let op = prop_oneof![
        1 => Just(Op::Add),
        8 => (prop::collection::vec(pick, 1..6), prop::bool::weighted(0.15))
            .prop_map(|(picks, cancel)| Op::Step { picks, cancel }),
        3 => sequence.clone().prop_map(Op::Fork),
        2 => (sequence.clone(), back).prop_map(|(at, back)| Op::Truncate(at, back)),
        1 => sequence.prop_map(Op::Release),
    ];
    prop::collection::vec(op, 1..80)
}

fn windows() -> impl Strategy<Value = Windows> {
    (0usize..20, prop_oneof![8 => 0usize..30, 1 => Just(usize::MAX)])
        .prop_map(|(sink, recent)| Windows { sink, recent })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 1500 }))]

    #[test]
    fn sequences_live_as_in_the_model(
        block in 1usize..10,
        windows in windows(),
        kept in prop::array::uniform4(0u16..=16),
        limit in prop::option::of(0u64..60_000),
        ops in ops(),
    ) {
        let config = CacheConfig { limit, ..config(block, windows, kept) };
        let mut world = World::new(&config, RULES);
        world.add();
        for op in ops {
            match op {
                Op::Add => world.add(),
                Op::Step { picks, cancel } => world.step(&picks, cancel),
                Op::Fork(at) => world.fork(at),
                Op::Truncate(at, back) => world.truncate(at, back),
                Op::Release(at) => world.release(at),
            }
            world.check();
        }
        while !world.is_empty() {
            world.release(0);
            world.check();
        }
    }
}

/// A sequence of `tokens` tokens that were stored at once.
fn stored(ledger: &mut Ledger, tokens: usize) -> SequenceId {
    let sequence = ledger.add_sequence();
    ledger.plan(&[StepEntry::store(sequence, tokens)]).unwrap();
    ledger.commit().unwrap();
    sequence
}

#[test]
fn a_limit_can_be_filled_to_the_byte() {
    let config = config(8, Windows { sink: 8, recent: 16 }, [4; 4]);
    let mut free = ledger(&config);
    stored(&mut free, 40);
    let bytes = free.memory().used_bytes();
    for (limit, fits) in [(bytes, true), (bytes - 1, false)] {
        let mut ledger = ledger(&CacheConfig { limit: Some(limit), ..config.clone() });
        let sequence = ledger.add_sequence();
        assert_eq!(ledger.plan(&[StepEntry::store(sequence, 40)]).is_ok(), fits, "{limit}");
    }
}

#[test]
fn a_fork_takes_nothing_until_it_goes_on() {
    let config = config(8, Windows { sink: 8, recent: 16 }, [4; 4]);
    let mut ledger = ledger(&config);
    let sequence = stored(&mut ledger, 100);
    let before = ledger.memory();
    let fork = ledger.fork(sequence).unwrap();
    let memory = ledger.memory();
    assert_eq!((memory.blocks, memory.dense_bytes), (before.blocks, before.dense_bytes));
    assert_eq!(memory.tokens, 200);
    // The last block holds 4 of 8 tokens.
    let step = ledger.plan(&[StepEntry::decode(fork, 1)]).unwrap();
    assert_eq!(step.copies.len(), 1);
    assert_eq!((step.copies[0].index, step.copies[0].tokens), (12, 4));
    ledger.commit().unwrap();
    assert_eq!(ledger.memory().blocks.full, before.blocks.full + 1);
    // Both own their last block now.
    let step = ledger.plan(&[StepEntry::decode(sequence, 1), StepEntry::decode(fork, 1)]).unwrap();
    assert!(step.copies.is_empty());
}

#[test]
fn a_fork_at_a_block_boundary_copies_nothing() {
    let config = config(8, Windows { sink: 8, recent: 16 }, [4; 4]);
    let mut ledger = ledger(&config);
    let sequence = stored(&mut ledger, 96);
    let fork = ledger.fork(sequence).unwrap();
    let step = ledger.plan(&[StepEntry::decode(fork, 1)]).unwrap();
    assert!(step.copies.is_empty());
}

#[test]
fn a_shared_block_is_packed_once() {
    let config = config(8, Windows { sink: 0, recent: 16 }, [4; 4]);
    for together in [true, false] {
        let mut ledger = ledger(&config);
        let sequence = stored(&mut ledger, 96);
        let fork = ledger.fork(sequence).unwrap();
        let lean = ledger.memory().blocks.lean;
        let entries = [StepEntry::decode(sequence, 8), StepEntry::decode(fork, 8)];
        let steps = if together { vec![&entries[..]] } else { entries.chunks(1).collect() };
        let mut packs = 0;
        for step in steps {
            packs += ledger.plan(step).unwrap().packs.len();
            ledger.commit().unwrap();
        }
        assert_eq!(packs, 1);
        assert_eq!(ledger.memory().blocks.lean, lean + 1);
        let [a, b] = [sequence, fork].map(|id| ledger.table(id).unwrap()[10]);
        assert_eq!(a, b);
    }
}

#[test]
fn truncation_ends_at_full_blocks_or_between_blocks() {
    let config = config(8, Windows { sink: 8, recent: 16 }, [4; 4]);
    let mut ledger = ledger(&config);
    let sequence = stored(&mut ledger, 100);
    // 100 + 1 - 16 tokens are old: blocks 1..10 are lean.
    assert_eq!(ledger.lean_blocks(sequence).unwrap(), 1..10);
    assert!(matches!(ledger.truncate(sequence, 101), Err(Error::Invalid { .. })));
    assert_eq!(ledger.nearest_lengths(sequence, 85).unwrap(), (85, 85));
    assert_eq!(ledger.nearest_lengths(sequence, 75).unwrap(), (72, 80));
    let error = ledger.truncate(sequence, 75).unwrap_err().to_string();
    assert!(error.contains("72 and 80"), "{error}");
    assert_eq!(ledger.len(sequence).unwrap(), 100);
    ledger.truncate(sequence, 72).unwrap();
    // They stay lean, although the windows would keep blocks 7 and 8 whole.
    assert_eq!(ledger.lean_blocks(sequence).unwrap(), 1..9);
    let step = ledger.plan(&[StepEntry::decode(sequence, 3)]).unwrap();
    assert!(step.packs.is_empty());
    ledger.commit().unwrap();
    ledger.truncate(sequence, 5).unwrap();
    assert_eq!(ledger.memory().blocks.lean, 0);
    ledger.truncate(sequence, 0).unwrap();
    assert_eq!(ledger.memory().used_bytes(), 0);
}

#[test]
fn only_between_steps() {
    let config = config(8, Windows::default(), [4; 4]);
    let mut ledger = ledger(&config);
    let sequence = stored(&mut ledger, 10);
    ledger.plan(&[StepEntry::decode(sequence, 1)]).unwrap();
    assert!(matches!(ledger.fork(sequence), Err(Error::Order { .. })));
    assert!(matches!(ledger.truncate(sequence, 3), Err(Error::Order { .. })));
    ledger.cancel();
    let gone = ledger.fork(sequence).unwrap();
    ledger.release(gone).unwrap();
    assert!(matches!(ledger.fork(gone), Err(Error::UnknownSequence(_))));
    assert!(matches!(ledger.truncate(gone, 0), Err(Error::UnknownSequence(_))));
}
