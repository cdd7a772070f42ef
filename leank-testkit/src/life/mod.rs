//! Properties of what happens to sequences beside their steps.

mod world;

use leank_core::{Backend, Cache, CacheConfig, Error, StepEntry};
use proptest::prelude::*;

use crate::{
    Case, Load, Subject,
    case::or_small,
    properties::{for_cases_and, same},
    world::World,
};

/// Most tokens of all sequences together: the oracle is slow.
const MAX_TOKENS: usize = 1200;

#[derive(Clone, Debug)]
enum Event {
    /// A step of some sequences: index, tokens, whether they attend.
    Step(Vec<(usize, usize, bool)>),
    Fork(usize),
    /// Takes tokens back.
    Truncate(usize, usize),
    /// Saves, releases and restores.
    Reload(usize),
    Release(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let sequence = 0usize..4;
    let tokens = || prop_oneof![3 => Just(1usize), 2 => 2usize..10, 2 => 1..or_small(150, 20)];
    let load = (sequence.clone(), tokens(), prop::bool::weighted(0.7));
    let event = prop_oneof![
        6 => prop::collection::vec(load, 1..4).prop_map(Event::Step),
        2 => sequence.clone().prop_map(Event::Fork),
        2 => (sequence.clone(), tokens()).prop_map(|(at, back)| Event::Truncate(at, back)),
        1 => sequence.clone().prop_map(Event::Reload),
        1 => sequence.prop_map(Event::Release),
    ];
    prop::collection::vec(event, 1..or_small(14, 6))
}

/// Loads of distinct sequences among those that are there.
fn loads(picks: &[(usize, usize, bool)], sequences: usize) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    for &(at, tokens, attend) in picks {
        let sequence = at % sequences;
        if loads.iter().all(|load| load.sequence != sequence) {
            loads.push(Load { sequence, tokens, attend });
        }
    }
    loads
}

/// Whatever is forked, cut, saved, restored and released in whatever order: every step gives what
/// the oracle says.
///
/// # Panics
/// When the property does not hold.
pub fn sequences_live_by_the_oracle<S: Subject>(subject: &S) {
    for_cases_and(subject, lives(), |case, life| {
        live(subject, case, &life);
    });
}

/// The same where the system refuses memory: the call says so and changes nothing, and made again it
/// succeeds. Every allocation is refused in turn, one in each life.
///
/// `refuse(n)` makes the allocation of block storage after the next `n` fail, once; `usize::MAX`: none.
///
/// # Panics
/// When the property does not hold.
pub fn refused_memory_changes_nothing<S: Subject>(subject: &S, refuse: impl Fn(usize)) {
    for_cases_and(subject, lives(), |case, life| {
        for after in 0.. {
            refuse(after);
            let refused = live(subject, case, &life);
            refuse(usize::MAX);
            assert!(refused > 0 || after > 0, "no memory was asked for");
            if refused == 0 {
                break;
            }
        }
    });
}

/// A prompt, and what happens afterwards.
type Life = (usize, Vec<Event>);

fn lives() -> impl Strategy<Value = Life> {
    // Longer than most windows, so that there is something lean.
    (1..or_small(400, 40), events())
}

/// Every step gives what the oracle says, and in the end no bytes are used; how often memory was refused.
fn live<S: Subject>(subject: &S, case: &Case, (prompt, events): &Life) -> usize {
    let mut world = World::new(subject, &Case { sequences: 1, ..case.clone() });
    world.step(&[Load { sequence: 0, tokens: *prompt, attend: false }]).expect("valid");
    for (name, event) in (1..).zip(events) {
        if world.sequences.is_empty() {
            world.add(1000 + name);
        }
        let pick = |at: usize| at % world.sequences.len();
        match event {
            Event::Step(picks) => {
                let loads = loads(picks, world.sequences.len());
                let held: usize = (0..world.sequences.len()).map(|i| world.len(i)).sum();
                let new: usize = loads.iter().map(|load| load.tokens).sum();
                if held + new <= MAX_TOKENS {
                    world.checked_step(&loads);
                }
            }
            &Event::Fork(at) => world.fork(pick(at), name),
            &Event::Truncate(at, back) => {
                let at = pick(at);
                let tokens = world.len(at).saturating_sub(back);
                world.truncate(at, tokens, name);
            }
            &Event::Reload(at) => {
                let at = pick(at);
                let (bytes, name) = (world.save(at), world.sequences[at].1);
                world.release(at);
                world.restore(&bytes, name);
            }
            &Event::Release(at) => {
                let at = pick(at);
                world.release(at);
            }
        }
    }
    while !world.sequences.is_empty() {
        world.release(0);
    }
    assert_eq!(world.cache.memory().used_bytes(), 0);
    world.refused
}

/// Forks give exactly what sequences give that hold the same tokens in blocks of their own, also
/// after the one they were forked from is gone, and never take more bytes.
///
/// # Panics
/// When the property does not hold.
pub fn forks_go_on_as_twins<S: Subject>(subject: &S) {
    let more = (1..or_small(200, 20), 1usize..4, any::<usize>());
    for_cases_and(subject, more, |case, (prompt, forks, release)| {
        let mut shared = World::new(subject, &Case { sequences: 1, ..case.clone() });
        let mut apart = World::new(subject, &Case { sequences: forks + 1, ..case.clone() });
        let store = |sequence| Load { sequence, tokens: prompt, attend: false };
        shared.step(&[store(0)]).expect("valid");
        let bytes = shared.cache.memory().used_bytes();
        (1..=forks).for_each(|name| shared.fork(0, name));
        assert_eq!(shared.cache.memory().used_bytes(), bytes, "a fork takes bytes");
        apart.histories.clone_from(&shared.histories);
        let all: Vec<Load> = (0..=forks).map(store).collect();
        apart.step(&all).expect("valid");

        let release = release % (case.steps.len() + 1);
        for (i, step) in case.steps.iter().enumerate() {
            if i == release {
                shared.release(0);
                apart.release(0);
            }
            let picks: Vec<_> =
                step.iter().map(|load| (load.sequence, load.tokens, load.attend)).collect();
            let loads = loads(&picks, shared.sequences.len());
            same(&apart.step(&loads).expect("valid"), &shared.step(&loads).expect("valid"));
            let used = |world: &World<'_, S>| world.cache.memory().used_bytes();
            assert!(used(&shared) <= used(&apart));
        }
    });
}

/// Tokens that are taken back leave no trace, whatever they were: the sequence gives exactly what
/// one gives that never had them, or, where blocks became lean meanwhile, what the oracle says.
///
/// # Panics
/// When the property does not hold.
pub fn tokens_taken_back_leave_no_trace<S: Subject>(subject: &S) {
    let value = prop::sample::select(vec![1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let drafts = prop::collection::vec((prop_oneof![1usize..9, 1..or_small(90, 12)], value), 8);
    for_cases_and(subject, drafts, |case, drafts| {
        let case = Case { sequences: 1, ..case.clone() };
        let mut plain = World::new(subject, &case);
        let mut shaken = World::new(subject, &case);
        for (name, (step, (tokens, value))) in (1..).zip(case.steps.iter().zip(drafts)) {
            let len = shaken.len(0);
            shaken.draft(0, tokens, value);
            let kept = shaken.truncate(0, len, name);
            // Its tokens from here on are again those of the sequence that was never cut.
            let history = shaken.histories.get_mut(&name).expect("of the cut");
            (history.from, history.tokens) = (0, usize::MAX);
            if kept < len {
                let again = Load { sequence: 0, tokens: len - kept, attend: false };
                shaken.step(&[again]).expect("valid");
            }
            let load = [Load { sequence: 0, ..step[0] }];
            let expected = plain.step(&load).expect("valid");
            if shaken.is_as_never_cut(0) {
                let rename = |outputs: crate::world::Outputs| -> crate::world::Outputs {
                    outputs.into_iter().map(|(layer, _, at, row)| (layer, 0, at, row)).collect()
                };
                same(&expected, &rename(shaken.step(&load).expect("valid")));
            } else {
                shaken.checked_step(&load);
            }
            if shaken.is_as_never_cut(0) {
                let used = |world: &World<'_, S>| world.cache.memory().used_bytes();
                assert_eq!(used(&plain), used(&shaken));
            }
        }
    });
}

/// A saved sequence comes back in its own cache and in another one, gives exactly what it gave, and
/// is saved as the same bytes again. Bytes that are cut short or damaged change nothing, nor does
/// too little memory.
///
/// # Panics
/// When the property does not hold.
pub fn saved_sequences_come_back<S: Subject>(subject: &S) {
    let more = (0..or_small(200, 20), any::<prop::sample::Index>(), 1u8..=255);
    for_cases_and(subject, more, |case, (back, damage, flip)| {
        let mut world = World::new(subject, &Case { sequences: 1, ..case.clone() });
        let (last, steps) = case.steps.split_last().expect("there are steps");
        for step in steps {
            world.step(&[Load { sequence: 0, ..step[0] }]).expect("valid");
        }
        let tokens = world.len(0).saturating_sub(back);
        world.truncate(0, tokens, 1);
        let bytes = world.save(0);

        // Beside others, and in blocks that were used before.
        let mut other = World::new(subject, &Case { sequences: 2, ..case.clone() });
        other.histories.clone_from(&world.histories);
        let guests = [0, 1].map(|sequence| Load { sequence, tokens: 130, attend: false });
        other.step(&guests).expect("valid");
        other.release(0);
        let before = other.cache.memory();
        let mut damaged = bytes.clone();
        damaged[damage.index(bytes.len())] ^= flip;
        for bad in [&damaged[..], &bytes[..damage.index(bytes.len())]] {
            let result = other.cache.restore(&mut &bad[..]);
            assert!(matches!(result, Err(Error::Format { .. })), "{result:?}");
            let after = other.cache.memory();
            assert_eq!((after.blocks, after.tokens), (before.blocks, before.tokens));
        }
        other.restore(&bytes, 1);
        assert_eq!(other.save(1), bytes);
        world.restore(&bytes, 1);

        let load = |sequence| [Load { sequence, tokens: last[0].tokens, attend: true }];
        let expected = world.step(&load(0)).expect("valid");
        same(&expected, &world.step(&load(1)).expect("valid"));
        same(&expected, &other.step(&load(1)).expect("valid"));

        let limit = other.cache.memory().used_bytes() / 2;
        let config = CacheConfig { limit: Some(limit), ..case.config() };
        let mut bound = World::with_config(subject, &Case { sequences: 0, ..case.clone() }, config);
        let saved = other.save(1);
        match bound.cache.restore(&mut &saved[..]) {
            Ok(_) => assert!(bound.cache.memory().allocated_bytes <= limit),
            Err(Error::OutOfMemory { missing, .. }) => {
                assert!(missing > 0);
                assert_eq!(bound.cache.memory().used_bytes(), 0);
            }
            Err(error) => panic!("{error}"),
        }
    });
}

/// Sequences are forked, cut, saved and restored between steps only, and only those that are there.
///
/// # Panics
/// When the property does not hold.
pub fn sequences_change_between_steps_only<S: Subject>(subject: &S) {
    for_cases_and(subject, 1..or_small(100, 20), |case, tokens| {
        let mut world = World::new(subject, &Case { sequences: 1, ..case.clone() });
        world.step(&[Load { sequence: 0, tokens, attend: false }]).expect("valid");
        let bytes = world.save(0);
        let (id, _) = world.sequences[0];
        let cache = &mut world.cache;
        let gone = cache.fork(id).expect("it is there");
        cache.release(gone).expect("it is there");
        let unknown = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::UnknownSequence(_))), "{result:?}");
        };
        unknown(cache.fork(gone).map(drop));
        unknown(cache.truncate(gone, 0));
        unknown(cache.save(gone, &mut Vec::new()));
        assert!(matches!(cache.truncate(id, tokens + 1), Err(Error::Invalid { .. })));

        cache.plan(&[StepEntry::decode(id, 1)]).expect("valid");
        let order = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::Order { .. })), "{result:?}");
        };
        order(cache.fork(id).map(drop));
        order(cache.truncate(id, 0));
        order(cache.save(id, &mut Vec::new()));
        order(cache.restore(&mut &bytes[..]).map(drop));
        cache.cancel();
        assert_eq!(world.save(0), bytes);
        world.truncate(0, 0, 1);
        assert_eq!(world.cache.memory().used_bytes(), 0);
        world.checked_step(&[Load { sequence: 0, tokens: 3, attend: true }]);
        // Caches of another configuration refuse it, naming what differs.
        let config = CacheConfig { block: case.block + 1, ..case.config() };
        let mut other = subject.backend().create(config).expect("valid");
        let result = other.restore(&mut &bytes[..]);
        assert!(matches!(result, Err(Error::Mismatch { .. })), "{result:?}");
    });
}
