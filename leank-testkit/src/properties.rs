//! The properties themselves.

use std::env;

use leank_core::{
    Backend, Cache, CacheConfig, Dtype, Error, Layer, LeanFormat, ModelShape, Planner, StepEntry,
    Windows, oracle::Attention,
};
use proptest::{
    prelude::*,
    strategy::ValueTree as _,
    test_runner::{Config, TestRunner},
};

use crate::{
    Case, HeadKind, Kind, Load, Rows, Subject,
    case::{cases, or_small},
    data::Nature,
    world::{Outputs, Stain, World},
};

fn for_cases<S: Subject>(subject: &S, property: impl Fn(&Case)) {
    for_cases_and(subject, Just(()), |case, ()| property(case));
}

/// Runs `property` on random cases together with something else that is random.
pub(crate) fn for_cases_and<S: Subject, T: std::fmt::Debug>(
    subject: &S,
    more: impl Strategy<Value = T>,
    property: impl Fn(&Case, T),
) {
    let config = Config {
        cases: match env::var_os("PROPTEST_CASES") {
            Some(_) => Config::default().cases,
            None => subject.cases(),
        },
        failure_persistence: None,
        ..Config::default()
    };
    let strategy = (cases(types(subject, subject.dtypes())), more);
    let result = TestRunner::new(config).run(&strategy, |(case, more)| {
        property(&case, more);
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

/// Types of full blocks with what lean ones beside them may be.
fn types<S: Subject>(subject: &S, dtypes: &[Dtype]) -> Vec<(Dtype, Vec<LeanFormat>)> {
    dtypes.iter().map(|&dtype| (dtype, subject.backend().lean_formats(dtype))).collect()
}

fn split_seed() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![Just(1usize), 1..or_small(50, 12)], 1..6)
}

/// Every output of every step is what the oracle says, on the values as they are stored to the
/// accuracy of the arithmetic, and on exact ones to the accuracy of the storage type.
///
/// # Panics
/// When the property does not hold.
pub fn oracle_agrees<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut world = World::new(subject, case);
        for step in &case.steps {
            world.checked_step(step);
        }
    });
}

/// The same for activations at the edges: logits of ±10⁴, equal logits, one token with all the weight,
/// subnormal K, V and queries. Bounds grow with what a logit adds up.
///
/// # Panics
/// When the property does not hold.
pub fn extremes_agree<S: Subject>(subject: &S) {
    let kind = prop::sample::select(vec![Kind::Key, Kind::Value, Kind::Query]);
    let faint = (kind, prop::sample::select(vec![1e-6, 1e-40]));
    let nature = prop_oneof![
        Just(Nature::Loud),
        Just(Nature::Equal),
        Just(Nature::Dominant),
        faint.prop_map(|(kind, factor)| Nature::Faint(kind, factor)),
    ];
    for_cases_and(subject, nature, |case, nature| {
        let mut world = World::new(subject, case);
        world.nature = nature;
        for step in &case.steps {
            world.checked_step(step);
        }
    });
}

/// The same for thousands of tokens, which random cases seldom reach.
///
/// # Panics
/// When the property does not hold.
pub fn long_contexts_agree<S: Subject>(subject: &S) {
    let mut runner = TestRunner::deterministic();
    for tokens in [2047, 2048, 4500] {
        for &dtype in subject.dtypes() {
            let cases = cases(types(subject, &[dtype]));
            let mut case = cases.new_tree(&mut runner).expect("a case").current();
            case.sequences = 1;
            let mut world = World::new(subject, &case);
            let prompt = Load { sequence: 0, tokens, attend: false };
            world.step(&[prompt]).expect("the prompt is valid");
            world.checked_step(&[Load { sequence: 0, tokens: 1, attend: true }]);
            world.checked_step(&[Load { sequence: 0, tokens: 3, attend: true }]);
        }
    }
}

/// A context of 2²⁰ tokens: sums of as many weights are as exact.
///
/// # Panics
/// When the property does not hold.
pub fn a_million_tokens_agree<S: Subject>(subject: &S) {
    let case = Case {
        shape: ModelShape::new(1, 2, 1, 16).expect("in range"),
        heads: vec![HeadKind::Some { seed: 1, alignment: 8 }],
        windows: Windows::default(),
        block: 64,
        // The most exact one.
        dtype: subject.dtypes()[0],
        formats: None,
        scale: None,
        soft_cap: None,
        sequences: 1,
        steps: Vec::new(),
        seed: 3,
    };
    let mut world = World::new(subject, &case);
    world.step(&[Load { sequence: 0, tokens: 1 << 20, attend: false }]).expect("valid");
    world.checked_step(&[Load { sequence: 0, tokens: 1, attend: true }]);
}

/// Another subject, an executor of the same backend say, gives the same bits.
///
/// # Panics
/// When the property does not hold.
pub fn twins_agree<S: Subject, T: Subject>(subject: &S, twin: &T) {
    for_cases(subject, |case| {
        let (mut one, mut other) = (World::new(subject, case), World::new(twin, case));
        for step in &case.steps {
            same(&one.step(step).expect("valid"), &other.step(step).expect("valid"));
        }
    });
}

/// What a step gives does not depend on how the tokens before it came: as one prompt that is only
/// stored, or in pieces that attend.
///
/// # Panics
/// When the property does not hold.
pub fn chunks_do_not_matter<S: Subject>(subject: &S) {
    for_cases_and(subject, split_seed(), |case, pieces| {
        let case = Case { sequences: 1, ..case.clone() };
        let last = Load { sequence: 0, tokens: 2, attend: true };
        let mut whole = World::new(subject, &case);
        let total = pieces.iter().sum();
        whole.step(&[Load { sequence: 0, tokens: total, attend: false }]).expect("valid");
        let mut chunked = World::new(subject, &case);
        for (i, &tokens) in pieces.iter().enumerate() {
            chunked.step(&[Load { sequence: 0, tokens, attend: i % 2 == 0 }]).expect("valid");
        }
        same(&whole.step(&[last]).expect("valid"), &chunked.step(&[last]).expect("valid"));
        assert_eq!(whole.cache.memory().used_bytes(), chunked.cache.memory().used_bytes());
    });
}

/// A sequence gives the same alone as beside others of other lengths
/// ([`Subject::rounds_alike_in_any_batch`]).
///
/// # Panics
/// When the property does not hold.
pub fn neighbours_do_not_matter<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut together = World::new(subject, case);
        let mut alone: Vec<_> = (0..case.sequences)
            .map(|name| {
                let mut world = World::new(subject, &Case { sequences: 0, ..case.clone() });
                world.add(name);
                world
            })
            .collect();
        for step in &case.steps {
            let all = together.step(step).expect("valid");
            for load in step {
                let own = alone[load.sequence].step(&[Load { sequence: 0, ..*load }]);
                let of_this = |output: &&(_, usize, _, _)| output.1 == load.sequence;
                let same_name: Outputs = all.iter().filter(of_this).cloned().collect();
                let own = own.expect("valid");
                if subject.rounds_alike_in_any_batch() {
                    same(&own, &same_name);
                } else {
                    alike(&own, &same_name, 5.0 * subject.arithmetic_error(case.dtype));
                }
            }
        }
    });
}

/// Where blocks lie in the pools does not matter: a cache that others used before gives the same.
///
/// # Panics
/// When the property does not hold.
pub fn pool_order_does_not_matter<S: Subject>(subject: &S) {
    for_cases_and(subject, split_seed(), |case, others| {
        let mut fresh = World::new(subject, case);
        let mut used = World::new(subject, &Case { sequences: 0, ..case.clone() });
        for (i, &tokens) in others.iter().enumerate() {
            used.add(1000 + i);
            used.step(&[Load { sequence: i, tokens: tokens * 5, attend: false }]).expect("valid");
        }
        let guests: Vec<_> = used.sequences.drain(..).collect();
        for (i, (id, _)) in guests.iter().enumerate() {
            if i % 2 == 0 {
                used.cache.release(*id).expect("it is there");
            }
        }
        (0..case.sequences).for_each(|name| used.add(name));
        for step in &case.steps {
            same(&fresh.step(step).expect("valid"), &used.step(step).expect("valid"));
        }
    });
}

/// A step that was cancelled at any point leaves results and bytes as if it had never been.
///
/// # Panics
/// When the property does not hold.
pub fn cancelled_steps_leave_no_trace<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut plain = World::new(subject, case);
        let mut shaken = World::new(subject, case);
        for step in &case.steps {
            let other: Vec<Load> =
                step.iter().map(|load| Load { tokens: load.tokens * 2 + 1, ..*load }).collect();
            shaken.begin(&other).expect("valid");
            shaken.cache.cancel();
            same(&plain.step(step).expect("valid"), &shaken.step(step).expect("valid"));
            let bytes = |world: &World<'_, S>| world.cache.memory().used_bytes();
            assert_eq!(bytes(&plain), bytes(&shaken));
        }
    });
}

/// Under a limit a step either runs, with the same result as without, or changes nothing; never is
/// more held than the limit.
///
/// # Panics
/// When the property does not hold.
pub fn out_of_memory_changes_nothing<S: Subject>(subject: &S) {
    for_cases_and(subject, 0.0f64..1.2, |case, share| {
        let mut free = World::new(subject, case);
        for step in &case.steps {
            free.step(step).expect("valid");
        }
        let limit = (free.cache.memory().allocated_bytes as f64 * share) as u64;
        let config = CacheConfig { limit: Some(limit), ..case.config() };
        let mut bound = World::with_config(subject, case, config);
        let mut free = World::new(subject, case);
        for step in &case.steps {
            let before = bound.cache.memory();
            match bound.step(step) {
                Ok(outputs) => same(&outputs, &free.step(step).expect("valid")),
                Err(Error::OutOfMemory { missing, .. }) => {
                    assert!(missing > 0);
                    assert_eq!(bound.cache.memory(), before);
                    return;
                }
                Err(other) => panic!("{other}"),
            }
            assert!(bound.cache.memory().allocated_bytes <= limit);
        }
    });
}

/// The planner predicts the cache's bytes to the byte.
///
/// # Panics
/// When the property does not hold.
pub fn planner_agrees<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut world = World::new(subject, case);
        let rules = subject.backend().layout_rules();
        let planner = Planner::new(&world.config, rules).expect("the case is valid");
        for step in &case.steps {
            world.step(step).expect("valid");
            let planned = |i| planner.footprint(world.len(i)).expect("not that long").bytes;
            let planned: u64 = (0..case.sequences).map(planned).sum();
            assert_eq!(world.cache.memory().used_bytes(), planned);
        }
    });
}

/// Views, layers and sequences that do not fit are typed errors, and the step can still be ended.
///
/// # Panics
/// When the property does not hold.
pub fn wrong_shapes_are_refused<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut world = World::new(subject, &Case { sequences: 1, ..case.clone() });
        let load = [Load { sequence: 0, tokens: 2, attend: true }];
        let id = world.sequences[0].0;
        world.cache.plan(&[StepEntry::decode(id, 2)]).expect("valid");
        let k = world.rows(Kind::Key, Layer(0), &load);
        let q = world.rows(Kind::Query, Layer(0), &load);
        let longer = |rows: &Rows, heads: usize, head_dim: usize| Rows {
            data: vec![0.5; 2 * heads * head_dim],
            heads,
            head_dim,
            ..rows.clone()
        };
        let layers = case.shape.layers;
        let mismatch = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::Mismatch { .. })), "{result:?}");
        };
        let cache = &mut world.cache;
        let wide = longer(&k, k.heads + 1, k.head_dim);
        mismatch(subject.append(cache, Layer(0), &wide, &k));
        mismatch(subject.append(cache, Layer(0), &k, &longer(&k, k.heads, k.head_dim + 1)));
        mismatch(subject.append(cache, Layer(layers), &k, &k));
        for layer in 0..layers {
            subject.append(cache, Layer(layer), &k, &k).expect("valid");
        }
        let short = Rows { data: q.data[..q.data.len() / 2].to_vec(), tokens: 1, ..q.clone() };
        mismatch(subject.attend(cache, Layer(0), &short).map(drop));
        mismatch(subject.attend(cache, Layer(layers), &q).map(drop));
        subject.attend(cache, Layer(0), &q).expect("valid");
        cache.commit().expect("valid");
        assert_eq!(world.len(0), 2);
    });
}

/// Infinities and NaN in K do to the queries that see them what the oracle says, and nothing to
/// other heads and sequences.
///
/// # Panics
/// When the property does not hold.
pub fn non_finite_values_stay_where_they_are<S: Subject>(subject: &S) {
    let bad = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    for_cases_and(subject, (bad, any::<usize>(), 1usize..6), |case, (bad, at, tokens)| {
        let case = Case { sequences: 2, formats: None, ..case.clone() };
        // In a step that begins at 0 every block is full.
        let loads = [0, 1].map(|sequence| Load { sequence, tokens, attend: true });
        let mut clean = World::new(subject, &case);
        let mut stained = World::new(subject, &case);
        let expected = clean.begin(&loads).expect("valid");
        let start = |world: &mut World<'_, S>| {
            let entries = [0, 1].map(|i| StepEntry::decode(world.sequences[i].0, tokens));
            world.cache.plan(&entries).expect("valid");
        };
        start(&mut stained);
        let layer = Layer(0);
        let mut k = stained.rows(Kind::Key, layer, &loads);
        let v = stained.rows(Kind::Value, layer, &loads);
        let q = stained.rows(Kind::Query, layer, &loads);
        let at = at % (k.data.len() / 2); // of the first sequence
        k.data[at] = bad;
        subject.append(&mut stained.cache, layer, &k, &v).expect("valid");
        let got = subject.attend(&mut stained.cache, layer, &q).expect("valid");

        let stored = |rows: &Rows| -> Vec<f64> {
            let own = &rows.data[..rows.data.len() / 2];
            own.iter().map(|&x| f64::from(case.dtype.round(x))).collect()
        };
        let (keys, values) = (stored(&k), stored(&v));
        let exact: Vec<f64> = q.data[..q.data.len() / 2].iter().map(|&x| f64::from(x)).collect();
        let oracle = Attention {
            masks: stained.config.mask.layer(layer),
            query_heads: case.shape.query_heads,
            windows: case.windows,
            block: case.block,
            scale: f64::from(stained.config.scale()),
            soft_cap: case.soft_cap.map(f64::from),
            start: 0,
            keys: &keys,
            values: &values,
            queries: &exact,
        };
        let bound = 5.0 * subject.arithmetic_error(case.dtype).max(1e-4);
        for (i, (got, want)) in got.data.iter().zip(oracle.output()).enumerate() {
            let (got, want) = (f64::from(*got), want);
            let same = (got - want).abs() <= bound || (got.is_nan() && want.is_nan());
            assert!(same, "element {i}: {got}, the oracle says {want}");
        }
        let (group, head_dim) = (case.shape.group(), case.shape.head_dim);
        let spoiled = at / head_dim % case.shape.kv_heads;
        let width = q.heads * head_dim;
        let clean_rows = expected.iter().filter(|output| output.0 == layer);
        for (output, row) in clean_rows.zip(got.data.chunks_exact(width)) {
            for head in 0..q.heads {
                if output.1 == 1 || head / group != spoiled {
                    let part = head * head_dim..(head + 1) * head_dim;
                    assert_eq!(output.3[part.clone()], row[part], "another head or sequence");
                }
            }
        }
    });
}

/// One infinity or NaN in a prompt, which may come to lie in a lean block: K and V of its head become
/// what [`leank_core::quant`] and [`Subject::spoiled_channels`] say, and other heads and sequences do not
/// notice.
///
/// # Panics
/// When the property does not hold.
pub fn non_finite_values_are_packed_as_defined<S: Subject>(subject: &S) {
    let bad = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
    let more = (bad, any::<bool>(), any::<prop::sample::Index>(), 1..or_small(300, 20));
    for_cases_and(subject, more, |case, (value, key, at, tokens)| {
        let case = Case { sequences: 2, ..case.clone() };
        let (shape, width) = (case.shape, case.shape.kv_heads * case.shape.head_dim);
        let at = at.index(shape.layers * tokens * width);
        let at = [at / width / tokens, at / width % tokens, at % width];
        // A weight may round to 0, and 0 · ∞ is NaN: of V only NaN means the same everywhere.
        let (kind, value) = if key { (Kind::Key, value) } else { (Kind::Value, f32::NAN) };
        let mut clean = World::new(subject, &case);
        let mut stained = World::new(subject, &case);
        stained.stain = Some(Stain { kind, name: 0, at, value });
        let loads = |tokens, attend| [0, 1].map(|sequence| Load { sequence, tokens, attend });
        for world in [&mut clean, &mut stained] {
            world.step(&loads(tokens, false)).expect("valid");
        }
        let expected = clean.step(&loads(2, true)).expect("valid");
        let got = stained.checked_step(&loads(2, true));
        let (group, head_dim) = (shape.group(), shape.head_dim);
        for (clean, got) in expected.iter().zip(&got) {
            for head in 0..shape.query_heads {
                let spoiled = (clean.0.0, clean.1, head / group) == (at[0], 0, at[2] / head_dim);
                let part = head * head_dim..(head + 1) * head_dim;
                if !spoiled {
                    assert_eq!(clean.3[part.clone()], got.3[part], "another head or sequence");
                }
            }
        }
    });
}

/// A step is plan, append, attend, commit; anything else is a typed error.
///
/// # Panics
/// When the property does not hold.
pub fn calls_out_of_order_are_refused<S: Subject>(subject: &S) {
    for_cases(subject, |case| {
        let mut world = World::new(subject, &Case { sequences: 1, ..case.clone() });
        let load = [Load { sequence: 0, tokens: 1, attend: true }];
        let id = world.sequences[0].0;
        let k = world.rows(Kind::Key, Layer(0), &load);
        let q = world.rows(Kind::Query, Layer(0), &load);
        let order = |result: Result<(), Error>| {
            assert!(matches!(result, Err(Error::Order { .. })), "{result:?}");
        };
        let cache = &mut world.cache;
        order(subject.append(cache, Layer(0), &k, &k));
        order(subject.attend(cache, Layer(0), &q).map(drop));
        order(cache.commit());
        cache.plan(&[StepEntry::decode(id, 1)]).expect("valid");
        order(cache.plan(&[StepEntry::decode(id, 1)]));
        order(subject.attend(cache, Layer(0), &q).map(drop));
        order(cache.commit());
        order(cache.release(id));
        cache.cancel();
        cache.release(id).expect("it is there");
        assert!(matches!(cache.release(id), Err(Error::UnknownSequence(_))));
        assert_eq!(cache.memory().used_bytes(), 0);
    });
}

/// Checks that outputs are equal, bit for bit.
pub(crate) fn same(a: &Outputs, b: &Outputs) {
    let key = |output: &(Layer, usize, usize, Vec<f32>)| (output.0, output.1, output.2);
    let sorted = |outputs: &Outputs| {
        let mut outputs = outputs.clone();
        outputs.sort_by_key(key);
        outputs
    };
    for (a, b) in sorted(a).iter().zip(&sorted(b)) {
        assert_eq!(key(a), key(b));
        assert_eq!(a.3, b.3, "layer {}, sequence {}, position {}", a.0, a.1, a.2);
    }
    assert_eq!(a.len(), b.len());
}

/// Checks that outputs are equal but for `bound`, or both not numbers.
fn alike(a: &Outputs, b: &Outputs, bound: f64) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!((a.0, a.1, a.2), (b.0, b.1, b.2));
        for (x, y) in a.3.iter().zip(&b.3) {
            let close = f64::from((x - y).abs()) <= bound || (x.is_nan() && y.is_nan());
            assert!(close, "{x} and {y} of {:?}", (a.0, a.1, a.2));
        }
    }
}
