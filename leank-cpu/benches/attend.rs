//! Criterion benches of single operations on one layer: attention, append, the pack at commit.
//!
//! `cargo bench -p leank-cpu --bench attend -- attend/A/16384/f16` runs some of them; caches are
//! built only for benches that the filter lets through. `leank-bench cpu` compares dense and lean
//! within one round and with the read bandwidth; these are for finding what changed.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use leank_core::{
    Backend, Cache, CacheConfig, ChannelMask, Dtype, HostView, HostViewMut, Layer, ModelMask,
    ModelShape, Planner, SequenceId, StepEntry, ViewShape,
};
use leank_cpu::{Cpu, CpuCache};

/// Bytes that the layers of a cache exceed together: several times a last-level cache.
const FOOTPRINT: u64 = 192 << 20;
const CHUNK: usize = 1024;
const BLOCK: usize = leank_core::DEFAULT_BLOCK;

/// Query heads, KV heads, head_dim: Llama 3 8B, Qwen2.5 0.5B, SmolLM2 135M.
const SHAPES: [(&str, [usize; 3]); 3] =
    [("A", [32, 8, 128]), ("B", [14, 2, 64]), ("smollm2", [9, 3, 64])];

#[derive(Clone, Copy)]
struct Setting {
    heads: [usize; 3],
    context: usize,
    dtype: Dtype,
    lean: bool,
}

impl Setting {
    /// Dense, or heads that keep 0/16/32/64 of 64 or 0/32/64/96 of 128 channels in turn.
    fn config(self, layers: usize) -> CacheConfig {
        let [query_heads, kv_heads, head_dim] = self.heads;
        let shape = ModelShape::new(layers, query_heads, kv_heads, head_dim).unwrap();
        let most = if head_dim <= 64 { head_dim } else { head_dim * 3 / 4 };
        let counts = [0, head_dim / 4, head_dim / 2, most];
        let head = |index: usize| {
            let kept = counts[index % counts.len()];
            ChannelMask::new(head_dim, (0..kept).map(|i| (i * head_dim / kept) as u16).collect())
        };
        let config = if self.lean {
            let masks = (0..layers * kv_heads).map(|index| head(index).unwrap()).collect();
            let mask = ModelMask::new(layers, kv_heads, head_dim, masks).unwrap();
            CacheConfig::new(shape, mask).unwrap()
        } else {
            CacheConfig::dense(shape).unwrap()
        };
        CacheConfig { dtype: self.dtype, ..config }
    }

    /// Bytes that `layers` layers hold one token before the context is full: with a context of
    /// whole blocks, what attention of the next token reads.
    fn planned_bytes(self, layers: usize) -> u64 {
        let planner = Planner::new(&self.config(layers), Cpu::new().layout_rules()).unwrap();
        planner.footprint(self.context - 1).unwrap().bytes
    }

    /// Layers beyond the footprint, a multiple of the 4 after which any mask repeats.
    fn layers(self) -> usize {
        4 * FOOTPRINT.div_ceil(self.planned_bytes(4)) as usize
    }
}

/// Random rows of mean 0 and variance 1, never 0 (splitmix64).
fn random_rows(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((x ^ (x >> 31)) >> 41) as f32 + 0.5) / (1u32 << 23) as f32
    };
    (0..len).map(|_| (next() - 0.5) * 12f32.sqrt()).collect()
}

/// Rows of K and V, `[tokens, KV heads, head_dim]`.
struct Rows {
    shape: ViewShape,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Rows {
    fn new(heads: [usize; 3], tokens: usize, seed: u64) -> Self {
        let shape = ViewShape::contiguous(tokens, heads[1], heads[2]);
        let len = tokens * heads[1] * heads[2];
        Self { shape, k: random_rows(2 * seed, len), v: random_rows(2 * seed + 1, len) }
    }

    fn append(&self, cache: &mut CpuCache, layer: Layer) {
        let k = HostView::new(&self.k[..], self.shape).unwrap();
        let v = HostView::new(&self.v[..], self.shape).unwrap();
        cache.append(layer, k, v).unwrap();
    }

    fn append_all(&self, cache: &mut CpuCache) {
        for layer in cache.config().shape.layer_indices() {
            self.append(cache, layer);
        }
    }
}

/// A new sequence of `tokens` stored tokens.
fn fill(cache: &mut CpuCache, heads: [usize; 3], tokens: usize) -> SequenceId {
    let sequence = cache.add_sequence();
    for start in (0..tokens).step_by(CHUNK) {
        let tokens = (tokens - start).min(CHUNK);
        cache.plan(&[StepEntry::store(sequence, tokens)]).unwrap();
        Rows::new(heads, tokens, start as u64).append_all(cache);
        cache.commit().unwrap();
    }
    sequence
}

/// A full cache in the middle of a decode step.
struct Decode {
    cache: CpuCache,
    q: Vec<f32>,
    out: Vec<f32>,
    rows: ViewShape,
}

impl Decode {
    fn new(setting: Setting, layers: usize, bytes: u64) -> Self {
        let mut cache = Cpu::new().create(setting.config(layers)).unwrap();
        let sequence = fill(&mut cache, setting.heads, setting.context - 1);
        assert_eq!(cache.memory().used_bytes(), bytes, "the throughput rests on these bytes");
        cache.plan(&[StepEntry::decode(sequence, 1)]).unwrap();
        Rows::new(setting.heads, 1, u64::MAX / 4).append_all(&mut cache);
        let [query_heads, _, head_dim] = setting.heads;
        let q = random_rows(u64::MAX / 2, query_heads * head_dim);
        let out = vec![0.0; q.len()];
        Self { cache, q, out, rows: ViewShape::contiguous(1, query_heads, head_dim) }
    }

    fn sweep(&mut self) {
        for layer in self.cache.config().shape.layer_indices() {
            let q = HostView::new(&self.q[..], self.rows).unwrap();
            let out = HostViewMut::new(&mut self.out[..], self.rows).unwrap();
            self.cache.attend(layer, q, out).unwrap();
        }
        black_box(&self.out);
    }

    /// The time of `calls` calls. Layers differ in bytes, so only whole sweeps are timed.
    fn time(&mut self, calls: u64) -> Duration {
        let layers = self.cache.config().shape.layers as u64;
        let sweeps = calls.div_ceil(layers);
        let start = Instant::now();
        (0..sweeps).for_each(|_| self.sweep());
        start.elapsed().mul_f64(calls as f64 / (sweeps * layers) as f64)
    }
}

fn attend(c: &mut Criterion) {
    for (name, heads) in SHAPES {
        for context in [2048, 16384] {
            let mut group = c.benchmark_group(format!("attend/{name}/{context}"));
            group
                .sample_size(10)
                .warm_up_time(Duration::from_millis(300))
                .measurement_time(Duration::from_millis(1500));
            for dtype in Dtype::ALL {
                for lean in [false, true] {
                    let setting = Setting { heads, context, dtype, lean };
                    let layers = setting.layers();
                    let bytes = setting.planned_bytes(layers);
                    let cache = if lean { "lean" } else { "dense" };
                    group.throughput(Throughput::Bytes(bytes / layers as u64));
                    let mut decode = None;
                    group.bench_function(BenchmarkId::new(dtype.to_string(), cache), |b| {
                        let decode =
                            decode.get_or_insert_with(|| Decode::new(setting, layers, bytes));
                        b.iter_custom(|calls| decode.time(calls));
                    });
                }
            }
        }
    }
}

/// One token to its block, and a prompt whose middle goes straight to lean blocks. The bytes are
/// those of the f32 rows that come in.
fn append(c: &mut Criterion) {
    for (name, heads) in SHAPES {
        let mut group = c.benchmark_group(format!("append/{name}"));
        group.sample_size(10).measurement_time(Duration::from_millis(500));
        for dtype in Dtype::ALL {
            for (kind, tokens) in [("token", 1), ("prompt-1024", 1024)] {
                group.throughput(Throughput::Bytes((2 * tokens * heads[1] * heads[2] * 4) as u64));
                group.bench_function(BenchmarkId::new(dtype.to_string(), kind), |b| {
                    let setting = Setting { heads, context: CHUNK, dtype, lean: true };
                    let mut cache = Cpu::new().create(setting.config(1)).unwrap();
                    let sequence = cache.add_sequence();
                    let rows = Rows::new(heads, tokens, 1);
                    cache.plan(&[StepEntry::store(sequence, tokens)]).unwrap();
                    b.iter(|| rows.append(&mut cache, Layer(0)));
                });
            }
        }
    }
}

/// The commit at which one block becomes lean. The bytes are those written to the lean block; the
/// full block was written two blocks of tokens earlier and is still in a cache of some level.
fn pack(c: &mut Criterion) {
    for (name, heads) in SHAPES {
        let mut group = c.benchmark_group(format!("pack/{name}"));
        // Most of the time goes into the untimed appends between commits.
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(2))
            .measurement_time(Duration::from_millis(10));
        for dtype in Dtype::ALL {
            let setting = Setting { heads, context: 4096, dtype, lean: true };
            let mut cache = Cpu::new().create(setting.config(4)).unwrap();
            let bytes = cache.layout().lean_bytes_all_layers();
            group.throughput(Throughput::Bytes(bytes));
            let rows = Rows::new(heads, BLOCK, 1);
            let mut sequence = cache.add_sequence();
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
    let length = cache.sequence_len(*sequence).unwrap();
    if !(512..8192).contains(&length) {
        cache.release(*sequence).unwrap();
        *sequence = fill(cache, [0, rows.shape.heads, rows.shape.head_dim], 512);
    }
    let lean = cache.memory().blocks.lean;
    cache.plan(&[StepEntry::decode(*sequence, BLOCK)]).unwrap();
    rows.append_all(cache);
    let start = Instant::now();
    cache.commit().unwrap();
    let time = start.elapsed();
    assert_eq!(cache.memory().blocks.lean, lean + 1);
    time
}

criterion_group!(benches, attend, append, pack);
criterion_main!(benches);
