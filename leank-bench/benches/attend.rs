//! Criterion benches of single operations on one layer: attention, append, the pack at commit.
//!
//! `cargo bench -p leank-bench --bench attend -- attend/A/16384/f16` runs some of them; caches are
//! built only for benches that the filter lets through. `leank-bench cpu` compares dense and lean
//! within one round and with the read bandwidth; these are for finding what changed.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use leank_bench::{
    setting::{HeadShape, fill, mixed_mask},
    workload::{Variant, Workload, WorkloadOptions},
};
use leank_core::{
    Backend, Cache, CacheConfig, Dtype, HeadPrecision, HostView, Layer, SequenceId, StepEntry,
    ViewShape,
};
use leank_cpu::{Cpu, CpuCache};
use leank_train::rng::Rng;

/// Bytes that the layers of a cache exceed together: several times a last-level cache.
const FOOTPRINT: u64 = 192 << 20;
const CHUNK: usize = 1024;
/// Tokens after which packing begins anew.
const LONGEST: usize = 8192;
const BLOCK: usize = leank_core::DEFAULT_BLOCK;
const SHAPES: [HeadShape; 3] = [HeadShape::A, HeadShape::B, HeadShape::SMOLLM2];

fn attend(c: &mut Criterion) {
    for shape in SHAPES {
        for context in [2048, 16384] {
            let mut group = c.benchmark_group(format!("attend/{shape}/{context}"));
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_millis(1500));
            for dtype in Dtype::ALL {
                for (name, variant) in [("dense", Variant::Dense), ("lean", Variant::Lean)] {
                    let footprint = FOOTPRINT;
                    let formats = HeadPrecision::default();
                    let sequences = 1;
                    let options = WorkloadOptions {
                        shape,
                        context,
                        sequences,
                        dtype,
                        variant,
                        formats,
                        footprint,
                    };
                    let mut workload = None;
                    group.bench_function(BenchmarkId::new(dtype.to_string(), name), |b| {
                        let workload = workload.get_or_insert_with(|| {
                            Workload::new(&Cpu::new(), &options).expect("a valid setting")
                        });
                        b.iter_custom(|calls| sweeps(workload, calls));
                    });
                }
            }
        }
    }
}

/// The time of `calls` calls. Layers differ in bytes, so only whole sweeps are timed.
fn sweeps(workload: &mut Workload<CpuCache>, calls: u64) -> Duration {
    let layers = workload.layers() as u64;
    let sweeps = calls.div_ceil(layers);
    let start = Instant::now();
    for _ in 0..sweeps {
        workload.sweep().expect("the step is under way");
        black_box(workload.output());
    }
    start.elapsed().mul_f64(calls as f64 / (sweeps * layers) as f64)
}

/// Rows of K and V, `[tokens, KV heads, head_dim]`.
struct Rows {
    shape: ViewShape,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Rows {
    fn new(shape: HeadShape, tokens: usize) -> Self {
        let mut random = Rng::new(1);
        let mut data = || {
            let mut data = vec![0.0; tokens * shape.kv_heads * shape.head_dim];
            fill(&mut random, &mut data);
            data
        };
        let (k, v) = (data(), data());
        Self { shape: ViewShape::contiguous(tokens, shape.kv_heads, shape.head_dim), k, v }
    }

    fn append(&self, cache: &mut CpuCache, layer: Layer) {
        let view = |data| HostView::new(data, self.shape).expect("rows fit their shape");
        cache.append(layer, view(&self.k[..]), view(&self.v[..])).expect("a planned step");
    }

    fn append_all(&self, cache: &mut CpuCache) {
        cache.config().shape.layer_indices().for_each(|layer| self.append(cache, layer));
    }
}

/// A lean cache of a few layers.
fn cache(shape: HeadShape, dtype: Dtype, layers: usize) -> CpuCache {
    let shape = shape.model(layers).expect("a valid shape");
    let mask = mixed_mask(&shape).expect("a valid mask");
    let config = CacheConfig { dtype, ..CacheConfig::new(shape, mask).expect("they fit") };
    Cpu::new().create(config).expect("a valid configuration")
}

/// One token to its block, and a prompt whose middle goes straight to lean blocks. The bytes are
/// those of the f32 rows that come in.
fn append(c: &mut Criterion) {
    for shape in SHAPES {
        let mut group = c.benchmark_group(format!("append/{shape}"));
        group.sample_size(10).measurement_time(Duration::from_millis(500));
        for dtype in Dtype::ALL {
            for (kind, tokens) in [("token", 1), ("prompt-1024", CHUNK)] {
                let bytes = 2 * tokens * shape.kv_heads * shape.head_dim * size_of::<f32>();
                group.throughput(Throughput::Bytes(bytes as u64));
                group.bench_function(BenchmarkId::new(dtype.to_string(), kind), |b| {
                    let mut cache = cache(shape, dtype, 1);
                    let sequence = cache.add_sequence();
                    let rows = Rows::new(shape, tokens);
                    cache.plan(&[StepEntry::store(sequence, tokens)]).expect("no limit");
                    b.iter(|| rows.append(&mut cache, Layer(0)));
                });
            }
        }
    }
}

/// The commit at which one block becomes lean. The bytes are those written to the lean block; the
/// full block was written two blocks of tokens earlier and is still in a cache of some level.
fn pack(c: &mut Criterion) {
    for shape in SHAPES {
        let mut group = c.benchmark_group(format!("pack/{shape}"));
        // Most of the time goes into the untimed appends between commits.
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(2))
            .measurement_time(Duration::from_millis(10));
        for dtype in Dtype::ALL {
            let mut cache = cache(shape, dtype, 4);
            group.throughput(Throughput::Bytes(cache.layout().lean_bytes_all_layers()));
            let rows = Rows::new(shape, BLOCK);
            // Once through, so that the system gives its pages now.
            let mut sequence = cache.add_sequence();
            while cache.sequence_len(sequence).expect("it is there") < LONGEST {
                commit_one_pack(&mut cache, &mut sequence, &rows);
            }
            group.bench_function(BenchmarkId::new(dtype.to_string(), "4 layers"), |b| {
                b.iter_custom(|commits| {
                    (0..commits).map(|_| commit_one_pack(&mut cache, &mut sequence, &rows)).sum()
                });
            });
        }
    }
}

/// The time of a commit that packs exactly one block.
fn commit_one_pack(cache: &mut CpuCache, sequence: &mut SequenceId, rows: &Rows) -> Duration {
    let length = |cache: &CpuCache, id| cache.sequence_len(id).expect("it is there");
    if length(cache, *sequence) >= LONGEST {
        cache.release(*sequence).expect("it is there");
        *sequence = cache.add_sequence();
    }
    loop {
        let lean = cache.memory().blocks.lean;
        cache.plan(&[StepEntry::decode(*sequence, BLOCK)]).expect("no limit");
        rows.append_all(cache);
        let start = Instant::now();
        cache.commit().expect("every layer was appended to");
        let time = start.elapsed();
        // The first blocks of a sequence are its sink and its recent window.
        if cache.memory().blocks.lean == lean + 1 {
            return time;
        }
    }
}

criterion_group!(benches, attend, append, pack);
criterion_main!(benches);
