//! Fork, rollback and sequences on disk, on real K and V: small scenes; the state machine itself is
//! tested in `leank-core`.

use std::{num::NonZeroUsize, sync::Arc};

use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, Error, HeadFormat, HostView,
    HostViewMut, Layer, LeanFormat, ModelMask, ModelShape, SequenceId, StepEntry, ViewShape,
    Windows,
};
#[cfg(feature = "rayon")]
use leank_cpu::Executor as _;
use leank_cpu::{Cpu, CpuCache, Isa, Pool, Prefetch, Serial};

const LAYERS: usize = 2;
/// Query heads, KV heads, and channels: more than one scale of V in codes is for.
const SHAPE: (usize, usize, usize) = (6, 3, 40);

/// A head that keeps an odd number of channels, a dead one and a whole one.
fn config(dtype: Dtype, lean: Dtype) -> CacheConfig {
    let (query_heads, kv_heads, head_dim) = SHAPE;
    let shape = ModelShape::new(LAYERS, query_heads, kv_heads, head_dim).unwrap();
    let heads = [vec![1, 4, 7, 8, 39], vec![], (0..40).collect()];
    let masks = (0..LAYERS).flat_map(|_| heads.clone());
    let masks = masks.map(|kept| ChannelMask::new(head_dim, kept).unwrap()).collect();
    let mask = ModelMask::new(LAYERS, kv_heads, head_dim, masks).unwrap();
    let format = HeadFormat { k: LeanFormat::Plain(lean), v: LeanFormat::Plain(lean) };
    CacheConfig {
        windows: Windows { sink: 5, recent: 20 },
        block: 8,
        dtype,
        formats: Some(vec![format; LAYERS * kv_heads]),
        ..CacheConfig::new(shape, mask).unwrap()
    }
}

/// Numbers in ±1 that depend on who they belong to.
fn rows(
    kind: u64,
    story: u64,
    layer: usize,
    start: usize,
    tokens: usize,
    heads: usize,
) -> Vec<f32> {
    let width = heads * SHAPE.2;
    let number = |i: usize| {
        let place = (start * width + i) as u64;
        let mut x = (kind << 56) ^ (story << 40) ^ ((layer as u64) << 32) ^ place;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    };
    (0..tokens * width).map(number).collect()
}

/// Appends `tokens` tokens of a story to a sequence; what attention gives, layer after layer.
fn step(cache: &mut CpuCache, id: SequenceId, story: u64, tokens: usize) -> Vec<f32> {
    let (query_heads, kv_heads, head_dim) = SHAPE;
    let start = cache.sequence_len(id).unwrap();
    cache.plan(&[StepEntry::decode(id, tokens)]).unwrap();
    let mut outputs = Vec::new();
    for layer in 0..LAYERS {
        let own = |kind, heads| rows(kind, story, layer, start, tokens, heads);
        let (k, v, q) = (own(1, kv_heads), own(2, kv_heads), own(3, query_heads));
        let mut out = vec![f32::NAN; q.len()];
        let kv_shape = ViewShape::contiguous(tokens, kv_heads, head_dim);
        let q_shape = ViewShape::contiguous(tokens, query_heads, head_dim);
        let view = |data, shape| HostView::new(data, shape).unwrap();
        cache.append(Layer(layer), view(&k[..], kv_shape), view(&v[..], kv_shape)).unwrap();
        let out_view = HostViewMut::new(&mut out[..], q_shape).unwrap();
        cache.attend(Layer(layer), view(&q[..], q_shape), out_view).unwrap();
        outputs.extend(out);
    }
    cache.commit().unwrap();
    assert!(outputs.iter().all(|x| x.is_finite()));
    outputs
}

/// Every kernel and every pair of types.
fn everywhere(scene: impl Fn(&Cpu, &CacheConfig)) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let cpu = Cpu::with_executor(Arc::new(Serial)).with_isa(isa).unwrap();
        for dtype in Dtype::ALL {
            for lean in Dtype::ALL {
                scene(&cpu, &config(dtype, lean));
            }
        }
    }
}

#[test]
fn forks_go_their_own_ways() {
    everywhere(|cpu, config| {
        let mut cache = cpu.create(config.clone()).unwrap();
        let mut alone = cpu.create(config.clone()).unwrap();
        let (trunk, twin) = (cache.add_sequence(), alone.add_sequence());
        step(&mut cache, trunk, 1, 43);
        step(&mut alone, twin, 1, 43);
        let before = cache.memory();
        let branch = cache.fork(trunk).unwrap();
        assert_eq!(cache.memory().used_bytes(), before.used_bytes(), "a fork takes nothing");
        for _ in 0..30 {
            // The branch tells another story, in turn with the trunk.
            step(&mut cache, branch, 2, 1);
            assert_eq!(step(&mut cache, trunk, 1, 1), step(&mut alone, twin, 1, 1));
        }
        cache.release(trunk).unwrap();

        let mut other = cpu.create(config.clone()).unwrap();
        let own = other.add_sequence();
        step(&mut other, own, 1, 43);
        (0..30).for_each(|_| drop(step(&mut other, own, 2, 1)));
        assert_eq!(step(&mut cache, branch, 2, 3), step(&mut other, own, 2, 3));
        assert_eq!(cache.memory().used_bytes(), other.memory().used_bytes());
    });
}

#[test]
fn a_rollback_leaves_no_trace() {
    everywhere(|cpu, config| {
        let mut cache = cpu.create(config.clone()).unwrap();
        let mut never = cpu.create(config.clone()).unwrap();
        let (id, twin) = (cache.add_sequence(), never.add_sequence());
        step(&mut cache, id, 1, 44);
        step(&mut never, twin, 1, 44);
        for draft in 1..=6 {
            // A draft of another story; no block leaves the recent window meanwhile.
            step(&mut cache, id, 2, draft);
            cache.truncate(id, 44).unwrap();
            assert_eq!(cache.memory().used_bytes(), never.memory().used_bytes());
        }
        for tokens in [1, 2, 5] {
            assert_eq!(step(&mut cache, id, 1, tokens), step(&mut never, twin, 1, tokens));
        }
        // Into the lean blocks: only to where one ends.
        let error = cache.truncate(id, 11).unwrap_err();
        assert!(error.to_string().contains("8 and 16"), "{error}");
        assert_eq!(cache.nearest_lengths(id, 11).unwrap(), (8, 16));
        assert_eq!(cache.nearest_lengths(id, 16).unwrap(), (16, 16));
        cache.truncate(id, 16).unwrap();
        step(&mut cache, id, 3, 9);
        assert_eq!(cache.sequence_len(id).unwrap(), 25);
    });
}

#[test]
fn a_saved_sequence_goes_on_elsewhere() {
    everywhere(|cpu, config| {
        let mut cache = cpu.create(config.clone()).unwrap();
        let id = cache.add_sequence();
        step(&mut cache, id, 1, 53);
        let mut saved = Vec::new();
        cache.save(id, &mut saved).unwrap();

        // Into a cache whose blocks others used before, on whatever kernel is best.
        let mut elsewhere = cpu.create(config.clone()).unwrap();
        let guest = elsewhere.add_sequence();
        step(&mut elsewhere, guest, 2, 70);
        elsewhere.release(guest).unwrap();
        let back = elsewhere.restore(&mut &saved[..]).unwrap();
        for tokens in [1, 4, 20, 1] {
            assert_eq!(step(&mut cache, id, 1, tokens), step(&mut elsewhere, back, 1, tokens));
        }

        let before = elsewhere.memory();
        for cut in [0, 7, 40, saved.len() / 2, saved.len() - 1] {
            let error = elsewhere.restore(&mut &saved[..cut]).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{cut}: {error}");
            assert_eq!(elsewhere.memory().used_bytes(), before.used_bytes());
        }
        let dtype = if config.dtype == Dtype::F32 { Dtype::F16 } else { Dtype::F32 };
        let mut foreign = cpu.create(CacheConfig { dtype, ..config.clone() }).unwrap();
        let error = foreign.restore(&mut &saved[..]).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    });
}

/// The stream says nothing of how a kernel lays out its blocks, whatever lies in them; nor does attention.
#[test]
fn every_pair_of_formats_goes_on_under_any_instruction_set() {
    let on = |isa| Cpu::with_executor(Arc::new(Serial)).with_isa(isa).ok();
    let [f32, f16, bf16] = [Dtype::F32, Dtype::F16, Dtype::Bf16].map(LeanFormat::Plain);
    let all = [f32, f16, bf16, LeanFormat::Int8, LeanFormat::Int4];
    for (dtype, k, v) in Dtype::ALL.into_iter().flat_map(|dtype| {
        all.into_iter().flat_map(move |k| all.into_iter().map(move |v| (dtype, k, v)))
    }) {
        // Blocks of whole vectors, which are taken another way.
        let formats = Some(vec![HeadFormat { k, v }; LAYERS * SHAPE.1]);
        let config = CacheConfig { block: 16, formats, ..config(dtype, dtype) };
        let mut cache = on(Isa::Portable).unwrap().create(config.clone()).unwrap();
        let id = cache.add_sequence();
        step(&mut cache, id, 1, 77);
        let mut saved = Vec::new();
        cache.save(id, &mut saved).unwrap();
        let portable = step(&mut cache, id, 1, 3);

        for cpu in Isa::ALL.into_iter().filter_map(on) {
            let what = format!("{:?}, {dtype}, {k}, {v}", cpu.isa());
            let mut restored = cpu.create(config.clone()).unwrap();
            let back = restored.restore(&mut &saved[..]).unwrap();
            let mut again = Vec::new();
            restored.save(back, &mut again).unwrap();
            assert!(again == saved, "{what}");

            let mut native = cpu.create(config.clone()).unwrap();
            let own = native.add_sequence();
            step(&mut native, own, 1, 77);
            let outputs = step(&mut restored, back, 1, 3);
            assert_eq!(outputs, step(&mut native, own, 1, 3), "{what}");
            let largest = portable.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            let close = outputs.iter().zip(&portable).all(|(a, b)| (a - b).abs() < 0.05 * largest);
            assert!(close, "{what}");
        }
    }
}

/// Appends tokens of a story without attention; values with all kinds of bits.
fn store(cache: &mut CpuCache, id: SequenceId, entry: StepEntry) {
    let (_, kv_heads, head_dim) = SHAPE;
    let start = cache.sequence_len(id).unwrap();
    cache.plan(&[entry]).unwrap();
    for layer in 0..LAYERS {
        let own = |kind| {
            let mut rows = rows(kind, 1, layer, start, entry.tokens, kv_heads);
            // Small ones are subnormal in half precision, large ones infinite.
            rows.iter_mut().for_each(|x| *x = x.powi(9) * 1e6);
            rows
        };
        let (k, v) = (own(1), own(2));
        let shape = ViewShape::contiguous(entry.tokens, kv_heads, head_dim);
        let view = |data| HostView::new(data, shape).unwrap();
        cache.append(Layer(layer), view(&k[..]), view(&v[..])).unwrap();
    }
    cache.commit().unwrap();
}

/// Long enough that threads share the work.
#[test]
fn the_road_of_a_token_does_not_show() {
    const TOKENS: usize = 2400;
    everywhere(|cpu, config| {
        let bytes = |cpu: &Cpu, fill: &dyn Fn(&mut CpuCache, SequenceId)| {
            let mut cache = cpu.create(config.clone()).unwrap();
            let id = cache.add_sequence();
            fill(&mut cache, id);
            assert_eq!(cache.sequence_len(id).unwrap(), TOKENS);
            let mut saved = Vec::new();
            cache.save(id, &mut saved).unwrap();
            saved
        };
        let one_by_one = bytes(cpu, &|cache, id| {
            (0..TOKENS).for_each(|_| store(cache, id, StepEntry::decode(id, 1)));
        });
        let pool = Pool::new(NonZeroUsize::new(3).unwrap()).unwrap();
        let threads = Cpu::with_executor(Arc::new(pool)).with_isa(cpu.isa()).unwrap();
        // Through full blocks that are packed together at commit, and straight to lean ones.
        let whole = bytes(&threads, &|cache, id| store(cache, id, StepEntry::decode(id, TOKENS)));
        assert!(one_by_one == whole, "packed");
        let prompt = bytes(&threads, &|cache, id| store(cache, id, StepEntry::store(id, TOKENS)));
        assert!(one_by_one == prompt, "born lean");
    });
}

#[test]
fn sequences_that_are_not_there_are_named() {
    let mut cache = Cpu::new().create(config(Dtype::F16, Dtype::F16)).unwrap();
    let id = cache.add_sequence();
    cache.release(id).unwrap();
    let mut out = Vec::new();
    for error in [
        cache.fork(id).unwrap_err(),
        cache.truncate(id, 0).unwrap_err(),
        cache.save(id, &mut out).unwrap_err(),
        cache.plan(&[StepEntry::decode(id, 1)]).unwrap_err(),
    ] {
        assert!(matches!(error, Error::UnknownSequence(_)), "{error}");
    }
    assert!(out.is_empty());
}

/// Under a limit, storage that free blocks of one kind keep is given back where the other kind needs it.
#[test]
fn free_full_blocks_make_room_for_lean_ones() {
    let cpu = Cpu::with_executor(Arc::new(Serial));
    let config = config(Dtype::F16, Dtype::F16);
    let mut unlimited = cpu.create(config.clone()).unwrap();
    let long = unlimited.add_sequence();
    let want: Vec<_> = (0..40).map(|_| step(&mut unlimited, long, 1, 10)).collect();
    // What the sequence takes in the end, and a little for the steps between.
    let limit = unlimited.memory().used_bytes() + 8 * unlimited.layout().full_bytes as u64;
    let then = step(&mut unlimited, long, 1, 10);

    let mut cache = cpu.create(CacheConfig { limit: Some(limit), ..config }).unwrap();
    let fill_with_full_blocks = |cache: &mut CpuCache| {
        let mut short = vec![cache.add_sequence()];
        while cache.plan(&[StepEntry::decode(short[short.len() - 1], 20)]).is_ok() {
            cache.cancel();
            step(cache, short[short.len() - 1], 2, 20);
            short.push(cache.add_sequence());
        }
        assert!(short.len() > 10, "{}", short.len());
        short.into_iter().for_each(|id| cache.release(id).unwrap());
    };
    fill_with_full_blocks(&mut cache);
    let id = cache.add_sequence();
    for want in want {
        assert_eq!(step(&mut cache, id, 1, 10), want);
        assert!(cache.memory().allocated_bytes <= limit);
    }
    let mut saved = Vec::new();
    cache.save(id, &mut saved).unwrap();
    cache.release(id).unwrap();
    fill_with_full_blocks(&mut cache);
    let back = cache.restore(&mut &saved[..]).unwrap();
    assert!(cache.memory().allocated_bytes <= limit);
    assert_eq!(step(&mut cache, back, 1, 10), then);
}

/// How backends and caches call themselves in reports and messages.
#[test]
fn names_say_what_runs() {
    let pool = Pool::new(NonZeroUsize::new(3).unwrap()).unwrap();
    assert_eq!(format!("{pool:?}"), "Pool { threads: 3, .. }");
    let cpu = Cpu::with_executor(Arc::new(pool)).with_isa(Isa::Portable).unwrap();
    assert_eq!(cpu.name(), "cpu (portable kernel, 3 threads)");
    assert_eq!(cpu.isa(), Isa::Portable);
    for prefetch in [Prefetch::Jumps, Prefetch::Everything] {
        let other = cpu.clone().with_prefetch(prefetch);
        assert_eq!(other.name(), cpu.name(), "the rest stays");
    }
    let serial = Cpu::with_executor(Arc::new(Serial)).with_isa(Isa::Portable).unwrap();
    assert_eq!(serial.name(), "cpu (portable kernel, 1 thread)");
    let mut cache = serial.create(config(Dtype::F16, Dtype::F16)).unwrap();
    let id = cache.add_sequence();
    step(&mut cache, id, 1, 3);
    let shown = format!("{cache:?}");
    assert!(shown.contains("head_dim: 40") && shown.contains("Memory {"), "{shown}");
}

/// An instruction set that was overlooked would leave out its tests, and say nothing.
#[test]
fn instruction_sets_are_those_of_the_cpu() {
    let mut there = vec![Isa::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! has {
            ($($feature:tt)*) => { true $(&& is_x86_feature_detected!($feature))* };
        }
        let avx512 = cfg!(feature = "avx512") && has!("avx512f" "avx512bw" "avx512dq" "avx512vl");
        there.extend(has!("avx2" "fma" "f16c").then_some(Isa::Avx2));
        there.extend(avx512.then_some(Isa::Avx512));
        there.extend((avx512 && has!("avx512bf16" "avx512vnni")).then_some(Isa::Avx512Bf16));
    }
    #[cfg(target_arch = "aarch64")]
    there.push(Isa::Neon);
    let found: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
    assert_eq!(found, there);
    assert_eq!(Some(&Isa::best()), there.last());
    assert_eq!(Cpu::with_executor(Arc::new(Serial)).isa(), Isa::best());
    for isa in Isa::ALL {
        assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
    }
    assert!("avx".parse::<Isa>().unwrap_err().to_string().contains("portable, avx2"));
}

#[cfg(feature = "rayon")]
#[test]
fn rayon_has_the_threads_of_the_callers_pool() {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    assert_eq!(threads.install(|| leank_cpu::Rayon.threads()), 3);
}
