//! What only a device shows: types of activations, graphs, streams, memory, other backends.

mod support;

use std::sync::{Mutex, PoisonError};

use cudarc::driver::{
    CudaContext, CudaSlice,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use half::{bf16, f16};
use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, Error, HeadFormat, HeadPrecision,
    HostView, HostViewMut, Layer, LeanFormat, ModelMask, ModelShape, SequenceId, StepEntry,
    ViewShape, Windows,
};
use leank_cuda::{Cuda, CudaCache, DeviceView, DeviceViewMut};

const SHAPE: (usize, usize, usize) = (14, 2, 64);

/// One test at a time: some of them want the device's memory for themselves.
fn on_device(test: impl FnOnce(&'static Cuda)) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cuda) = support::cuda() {
        test(cuda);
    }
}

fn config(dtype: Dtype) -> CacheConfig {
    let (query_heads, kv_heads, head_dim) = SHAPE;
    let shape = ModelShape::new(1, query_heads, kv_heads, head_dim).unwrap();
    let some = ChannelMask::new(head_dim, (0..head_dim as u16).step_by(3).collect()).unwrap();
    let mask = ModelMask::new(1, kv_heads, head_dim, vec![some, ChannelMask::none(head_dim)]);
    CacheConfig {
        windows: Windows { sink: 64, recent: 200 },
        dtype,
        ..CacheConfig::new(shape, mask.unwrap()).unwrap()
    }
}

/// Numbers in ±1 that depend on who they belong to; V rises with the position besides, so that a result
/// tells which tokens are in it.
fn numbers(kind: u64, start: usize, tokens: usize, heads: usize) -> Vec<f32> {
    let width = heads * SHAPE.2;
    let number = |i: usize| {
        let mut x = (kind << 48) ^ (start * width + i) as u64;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let rising = if kind == 2 { (start + i / width) % 100_000 } else { 0 };
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0 + rising as f32 / 1e5
    };
    (0..tokens * width).map(number).collect()
}

fn rows(tokens: usize, heads: usize) -> ViewShape {
    ViewShape::contiguous(tokens, heads, SHAPE.2)
}

/// Plans a step and appends its tokens; q of the step, on the device.
fn begin(cuda: &Cuda, cache: &mut CudaCache, entry: StepEntry) -> CudaSlice<f32> {
    let (query_heads, kv_heads, _) = SHAPE;
    let start = cache.sequence_len(entry.sequence).unwrap();
    let upload =
        |kind, heads| cuda.stream().clone_htod(&numbers(kind, start, entry.tokens, heads)).unwrap();
    let (k, v, q) = (upload(1, kv_heads), upload(2, kv_heads), upload(3, query_heads));
    let shape = rows(entry.tokens, kv_heads);
    cache.plan(&[entry]).unwrap();
    let (k, v) = (DeviceView::new(&k, shape).unwrap(), DeviceView::new(&v, shape).unwrap());
    cache.append(Layer(0), k, v).unwrap();
    q
}

fn attend(cuda: &Cuda, cache: &mut CudaCache, q: &CudaSlice<f32>, tokens: usize) -> Vec<f32> {
    let shape = rows(tokens, SHAPE.0);
    let mut out = cuda.stream().clone_htod(&vec![f32::NAN; q.len()]).unwrap();
    let out_view = DeviceViewMut::new(&mut out, shape).unwrap();
    cache.attend(Layer(0), DeviceView::new(q, shape).unwrap(), out_view).unwrap();
    cuda.stream().clone_dtoh(&out).unwrap()
}

fn store(cuda: &Cuda, cache: &mut CudaCache, tokens: usize) -> SequenceId {
    let id = cache.add_sequence();
    begin(cuda, cache, StepEntry::store(id, tokens));
    cache.commit().unwrap();
    id
}

fn step(cuda: &Cuda, cache: &mut CudaCache, id: SequenceId, tokens: usize) -> Vec<f32> {
    let q = begin(cuda, cache, StepEntry::decode(id, tokens));
    let out = attend(cuda, cache, &q, tokens);
    cache.commit().unwrap();
    out
}

#[test]
fn results_are_rounded_to_the_type_of_the_output() {
    on_device(|cuda| {
        let mut cache = cuda.create(config(Dtype::Bf16)).unwrap();
        let id = store(cuda, &mut cache, 1000);
        let q = begin(cuda, &mut cache, StepEntry::decode(id, 1));
        let exact = attend(cuda, &mut cache, &q, 1);
        assert!(exact.iter().all(|x| x.is_finite()));
        let stream = cuda.stream();
        let (shape, q_view) = (rows(1, SHAPE.0), DeviceView::new(&q, rows(1, SHAPE.0)).unwrap());
        let mut half = stream.alloc_zeros::<f16>(q.len()).unwrap();
        cache.attend(Layer(0), q_view, DeviceViewMut::new(&mut half, shape).unwrap()).unwrap();
        let expected: Vec<f16> = exact.iter().map(|&x| f16::from_f32(x)).collect();
        assert_eq!(stream.clone_dtoh(&half).unwrap(), expected);
        let mut brain = stream.alloc_zeros::<bf16>(q.len()).unwrap();
        cache.attend(Layer(0), q_view, DeviceViewMut::new(&mut brain, shape).unwrap()).unwrap();
        let expected: Vec<bf16> = exact.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(stream.clone_dtoh(&brain).unwrap(), expected);
    });
}

/// Work is shared by all multiprocessors, whose order is never the same.
#[test]
fn results_are_the_same_every_time() {
    on_device(|cuda| {
        let mut cache = cuda.create(config(Dtype::F16)).unwrap();
        let id = store(cuda, &mut cache, 40_000);
        for tokens in [1, 5] {
            let q = begin(cuda, &mut cache, StepEntry::decode(id, tokens));
            let first = attend(cuda, &mut cache, &q, tokens);
            assert!(first.iter().all(|x| x.is_finite()));
            for _ in 0..200 {
                assert!(attend(cuda, &mut cache, &q, tokens) == first);
            }
            cache.commit().unwrap();
        }
    });
}

/// Many thread blocks share each head, which merge in two steps; sequences of very different lengths:
/// beside the CPU backend, which has the same tokens.
#[test]
fn large_caches_are_shared_out() {
    on_device(|cuda| {
        let (query_heads, kv_heads, head_dim) = SHAPE;
        let shape = ModelShape::new(1, query_heads, kv_heads, head_dim).unwrap();
        let dense = CacheConfig { dtype: Dtype::F16, ..CacheConfig::dense(shape).unwrap() };
        for (config, lengths) in [
            (dense.clone(), vec![250_000]),
            (dense, vec![30_000, 64, 150_000, 20_000, 70_000]),
            (config(Dtype::F16), vec![900_000, 300_000, 100]),
        ] {
            let mut cache = cuda.create(config.clone()).unwrap();
            let mut host = leank_cpu::Cpu::new().create(config).unwrap();
            let (mut ids, mut on_host) = (Vec::new(), Vec::new());
            for length in lengths {
                let id = cache.add_sequence();
                while cache.sequence_len(id).unwrap() < length {
                    let piece = (length - cache.sequence_len(id).unwrap()).min(1 << 17);
                    begin(cuda, &mut cache, StepEntry::store(id, piece));
                    cache.commit().unwrap();
                }
                let mut saved = Vec::new();
                cache.save(id, &mut saved).unwrap();
                ids.push(id);
                on_host.push(host.restore(&mut &saved[..]).unwrap());
            }
            for _ in 0..3 {
                let entries = |ids: &[SequenceId]| {
                    let entry = |(i, &id)| StepEntry::decode(id, 1 + i % 2);
                    ids.iter().enumerate().map(entry).collect::<Vec<_>>()
                };
                let tokens: usize = entries(&ids).iter().map(|entry| entry.tokens).sum();
                let (k, v) = (numbers(1, 7, tokens, kv_heads), numbers(2, 7, tokens, kv_heads));
                let q = numbers(3, 7, tokens, query_heads);
                let mut out = vec![f32::NAN; q.len()];
                let view = |data, heads| HostView::new(data, rows(tokens, heads)).unwrap();
                host.plan(&entries(&on_host)).unwrap();
                host.append(Layer(0), view(&k[..], kv_heads), view(&v[..], kv_heads)).unwrap();
                let out_view = HostViewMut::new(&mut out[..], rows(tokens, query_heads)).unwrap();
                host.attend(Layer(0), view(&q[..], query_heads), out_view).unwrap();
                host.commit().unwrap();

                let upload = |data: &[f32]| cuda.stream().clone_htod(data).unwrap();
                let (k, v, q) = (upload(&k), upload(&v), upload(&q));
                let kv_shape = rows(tokens, kv_heads);
                cache.plan(&entries(&ids)).unwrap();
                let k = DeviceView::new(&k, kv_shape).unwrap();
                cache.append(Layer(0), k, DeviceView::new(&v, kv_shape).unwrap()).unwrap();
                let first = attend(cuda, &mut cache, &q, tokens);
                let worst =
                    out.iter().zip(&first).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
                assert!(first.iter().all(|x| x.is_finite()) && worst < 1e-4, "{worst}");
                for _ in 0..100 {
                    assert!(attend(cuda, &mut cache, &q, tokens) == first);
                }
                cache.commit().unwrap();
            }
        }
    });
}

#[test]
fn a_captured_graph_stands_for_the_calls() {
    on_device(|cuda| {
        let (query_heads, kv_heads, _) = SHAPE;
        // Its own stream, and no events of other slices in the graph.
        let stream = cuda.stream().context().new_stream().unwrap();
        let cuda = &cuda.clone().on_stream(stream.clone()).unwrap();
        let mut cache = cuda.create(config(Dtype::Bf16)).unwrap();
        let mut twin = cuda.create(config(Dtype::Bf16)).unwrap();
        let (id, other) = (store(cuda, &mut cache, 3000), store(cuda, &mut twin, 3000));
        let mut k = stream.alloc_zeros::<f32>(kv_heads * SHAPE.2).unwrap();
        let mut v = stream.alloc_zeros::<f32>(kv_heads * SHAPE.2).unwrap();
        let mut q = stream.alloc_zeros::<f32>(query_heads * SHAPE.2).unwrap();
        let mut out = stream.alloc_zeros::<f32>(query_heads * SHAPE.2).unwrap();
        let (kv_shape, q_shape) = (rows(1, kv_heads), rows(1, query_heads));
        let mut captured = None;
        for i in 0..200 {
            let start = cache.sequence_len(id).unwrap();
            stream.memcpy_htod(&numbers(1, start, 1, kv_heads), &mut k).unwrap();
            stream.memcpy_htod(&numbers(2, start, 1, kv_heads), &mut v).unwrap();
            stream.memcpy_htod(&numbers(3, start, 1, query_heads), &mut q).unwrap();
            cache.plan(&[StepEntry::decode(id, 1)]).unwrap();
            if let Some((graph, key)) = &captured {
                let graph: &cudarc::driver::CudaGraph = graph;
                assert_eq!(cache.capture_key(), *key, "step {i}");
                graph.launch().unwrap();
                cache.mark_appended().unwrap();
            } else {
                let views = (
                    DeviceView::new(&k, kv_shape).unwrap(),
                    DeviceView::new(&v, kv_shape).unwrap(),
                    DeviceView::new(&q, q_shape).unwrap(),
                    DeviceViewMut::new(&mut out, q_shape).unwrap(),
                );
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                stream.synchronize().unwrap();
                stream.begin_capture(mode).unwrap();
                cache.append(Layer(0), views.0, views.1).unwrap();
                cache.attend(Layer(0), views.2, views.3).unwrap();
                let flags =
                    CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
                let graph = stream.end_capture(flags).unwrap().unwrap();
                graph.launch().unwrap();
                captured = Some((graph, cache.capture_key()));
            }
            let replayed = stream.clone_dtoh(&out).unwrap();
            cache.commit().unwrap();
            assert_eq!(replayed, step(cuda, &mut twin, other, 1), "step {i}");
        }
    });
}

#[test]
fn a_saved_sequence_goes_on_on_the_cpu_and_back() {
    on_device(|cuda| {
        let config = config(Dtype::F16);
        let mut cache = cuda.create(config.clone()).unwrap();
        let id = store(cuda, &mut cache, 777);
        let mut saved = Vec::new();
        cache.save(id, &mut saved).unwrap();

        let mut host = leank_cpu::Cpu::new().create(config.clone()).unwrap();
        let on_host = host.restore(&mut &saved[..]).unwrap();
        let mut again = Vec::new();
        host.save(on_host, &mut again).unwrap();
        assert!(again == saved);
        let mut elsewhere = cuda.create(config).unwrap();
        let back = elsewhere.restore(&mut &again[..]).unwrap();

        let (query_heads, kv_heads, _) = SHAPE;
        let (k, v) = (numbers(1, 777, 1, kv_heads), numbers(2, 777, 1, kv_heads));
        let q = numbers(3, 777, 1, query_heads);
        let mut out = vec![f32::NAN; q.len()];
        let view = |data, heads| HostView::new(data, rows(1, heads)).unwrap();
        host.plan(&[StepEntry::decode(on_host, 1)]).unwrap();
        host.append(Layer(0), view(&k[..], kv_heads), view(&v[..], kv_heads)).unwrap();
        let out_view = HostViewMut::new(&mut out[..], rows(1, query_heads)).unwrap();
        host.attend(Layer(0), view(&q[..], query_heads), out_view).unwrap();

        let on_device = step(cuda, &mut cache, id, 1);
        for (host, device) in out.iter().zip(&on_device) {
            assert!((host - device).abs() < 2e-3, "{host} and {device}");
        }
        assert_eq!(step(cuda, &mut elsewhere, back, 1), on_device);
    });
}

/// Bit for bit, groups with every kind of number but NaN, which has many bits: blocks of a prompt, and blocks that become lean later.
#[test]
fn codes_are_those_of_the_cpu() {
    on_device(|cuda| {
        let (_, kv_heads, head_dim) = SHAPE;
        let extremes = [
            f32::INFINITY,
            f32::NEG_INFINITY,
            0.0,
            -0.0,
            1e-45,
            -3e-39,
            6e-8,
            1e-30,
            65_504.0,
            8e37,
            1.2e38,
            -3e38,
            300.7,
        ];
        for dtype in [Dtype::F16, Dtype::Bf16] {
            for (k, v) in [("k8", "v8"), ("k4", "v4"), ("k8", "v16"), ("k16", "v4")] {
                let formats: HeadPrecision = format!("{k}{v}").parse().unwrap();
                let formats = Some(vec![formats.format(dtype); kv_heads]);
                let config = CacheConfig { formats, ..config(dtype) };
                let mut cache = cuda.create(config.clone()).unwrap();
                let mut host = leank_cpu::Cpu::new().create(config).unwrap();
                let (id, on_host) = (cache.add_sequence(), host.add_sequence());
                // The last ones were whole blocks before.
                for tokens in [1500, 30, 130, 1, 300, 90] {
                    let start = cache.sequence_len(id).unwrap();
                    let numbers = |kind| {
                        let mut numbers = numbers(kind, start, tokens, kv_heads);
                        // Every other block has large and small numbers, some channels of it extreme ones.
                        for (i, x) in numbers.iter_mut().enumerate() {
                            let (token, channel) =
                                (start + i / (kv_heads * head_dim), i % head_dim);
                            if token / 64 % 2 == 1 {
                                *x *= 2f32.powi((channel % 32) as i32 - 20)
                                    * if token % 3 == 0 { 1e4 } else { 1.0 };
                                if (token * 31 + channel * 7) % 411 == 0 {
                                    *x = extremes[(token + channel) % extremes.len()];
                                }
                            }
                        }
                        numbers
                    };
                    let (k, v) = (numbers(1), numbers(2));
                    let shape = rows(tokens, kv_heads);
                    let upload = |data: &[f32]| cuda.stream().clone_htod(data).unwrap();
                    let (k_there, v_there) = (upload(&k), upload(&v));
                    let there = |data| DeviceView::new(data, shape).unwrap();
                    cache.plan(&[StepEntry::store(id, tokens)]).unwrap();
                    cache.append(Layer(0), there(&k_there), there(&v_there)).unwrap();
                    cache.commit().unwrap();
                    let here = |data| HostView::new(data, shape).unwrap();
                    host.plan(&[StepEntry::store(on_host, tokens)]).unwrap();
                    host.append(Layer(0), here(&k[..]), here(&v[..])).unwrap();
                    host.commit().unwrap();
                }
                let (mut saved, mut expected) = (Vec::new(), Vec::new());
                cache.save(id, &mut saved).unwrap();
                host.save(on_host, &mut expected).unwrap();
                assert_eq!(saved.len(), expected.len());
                let differ = saved.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert_eq!(differ, 0, "{k}{v} {dtype}: of {} bytes", saved.len());
                let back = cache.restore(&mut &expected[..]).unwrap();
                let mut again = Vec::new();
                cache.save(back, &mut again).unwrap();
                assert!(again == expected);
            }
        }
    });
}

#[test]
fn too_little_memory_leaves_the_cache_as_it_was() {
    on_device(|cuda| {
        let mut cache = cuda.create(config(Dtype::F16)).unwrap();
        let id = store(cuda, &mut cache, 500);
        let expected = step(cuda, &mut cache, id, 1);
        // All but little of the device's memory.
        let context = cuda.stream().context();
        let mut hog = Vec::new();
        loop {
            let (free, _) = context.mem_get_info().unwrap();
            let bytes = free.saturating_sub(256 << 20);
            if bytes < 64 << 20 {
                break;
            }
            match cuda.stream().alloc_zeros::<u8>(bytes) {
                Ok(slice) => hog.push(slice),
                Err(_) => break,
            }
            cuda.stream().synchronize().unwrap();
        }
        let before = cache.memory();
        let other = cache.add_sequence();
        let error = cache.plan(&[StepEntry::decode(other, 4 << 20)]).unwrap_err();
        assert!(matches!(error, Error::SystemMemory { bytes: 1.., .. }), "{error}");
        assert_eq!(cache.memory().used_bytes(), before.used_bytes());
        drop(hog);
        cuda.stream().synchronize().unwrap();
        let mut twin = cuda.create(config(Dtype::F16)).unwrap();
        let own = store(cuda, &mut twin, 500);
        assert_eq!(step(cuda, &mut twin, own, 1), expected);
        assert_eq!(step(cuda, &mut cache, id, 1), step(cuda, &mut twin, own, 1));
    });
}

#[test]
fn another_context_is_refused() {
    on_device(|cuda| {
        let foreign = CudaContext::new_non_primary(0, 0).unwrap().new_stream().unwrap();
        let mismatch = |error: Error| assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        mismatch(cuda.clone().on_stream(foreign.clone()).unwrap_err());
        let mut cache = cuda.create(config(Dtype::F16)).unwrap();
        mismatch(cache.set_stream(foreign.clone()).unwrap_err());
        let id = cache.add_sequence();
        cache.plan(&[StepEntry::decode(id, 1)]).unwrap();
        let there = foreign.alloc_zeros::<f16>(SHAPE.1 * SHAPE.2).unwrap();
        let view = DeviceView::new(&there, rows(1, SHAPE.1)).unwrap();
        mismatch(cache.append(Layer(0), view, view).unwrap_err());
        cache.cancel();
        cache.set_stream(cuda.stream().context().new_stream().unwrap()).unwrap();
    });
}

#[test]
fn what_there_is_no_kernel_for_is_unavailable() {
    on_device(|cuda| {
        let unavailable = |config: CacheConfig| {
            let error = cuda.create(config).unwrap_err();
            assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        };
        unavailable(config(Dtype::F32));
        let other = LeanFormat::Plain(Dtype::Bf16);
        let formats = Some(vec![HeadFormat { k: LeanFormat::Int8, v: other }; SHAPE.1]);
        let error = cuda.create(CacheConfig { formats, ..config(Dtype::F16) }).unwrap_err();
        let named = "bf16 (V of layer 0, KV head 0)";
        assert!(error.to_string().contains(named), "{error}");
        assert!(error.to_string().contains("f16, int8, int4, fp8 only"), "{error}");
        unavailable(CacheConfig::dense(ModelShape::new(1, 1, 1, 257).unwrap()).unwrap());
    });
}
