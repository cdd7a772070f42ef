//! A language model for the examples: random weights, but in what a cache sees of it like any other. Its next
//! token depends on everything before, through several layers of attention with RoPE.
//!
//! `Toy::step` is what an engine does around leank: hidden states to q, k and v, the cache, and back.

use std::error::Error;

use leank::{
    Backend, Cache, CacheConfig, ChannelMask, Layer, ModelMask, ModelShape, SequenceId, StepEntry,
    ViewShape, Windows,
};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

pub(crate) const SHAPE: ModelShape =
    ModelShape { layers: 3, query_heads: 4, kv_heads: 2, head_dim: 32 };
pub(crate) const VOCABULARY: u32 = 512;
const HIDDEN: usize = 96;

/// A cache of a backend whose activations the examples hold in host memory.
pub(crate) trait HostCache: Cache {
    /// k and v of a layer, `[tokens, KV heads, head_dim]`.
    fn store(&mut self, layer: Layer, k: &[f32], v: &[f32]) -> Result<()>;
    /// q and `out` of a layer, `[tokens, query heads, head_dim]`.
    fn look_up(&mut self, layer: Layer, q: &[f32], out: &mut [f32]) -> Result<()>;
}

fn view(values: &[f32], heads: usize) -> ViewShape {
    ViewShape::contiguous(values.len() / (heads * SHAPE.head_dim), heads, SHAPE.head_dim)
}

impl HostCache for leank::cpu::CpuCache {
    fn store(&mut self, layer: Layer, k: &[f32], v: &[f32]) -> Result<()> {
        use leank::HostView;
        let shape = view(k, SHAPE.kv_heads);
        Ok(self.append(layer, HostView::new(k, shape)?, HostView::new(v, shape)?)?)
    }

    fn look_up(&mut self, layer: Layer, q: &[f32], out: &mut [f32]) -> Result<()> {
        use leank::{HostView, HostViewMut};
        let shape = view(q, SHAPE.query_heads);
        Ok(self.attend(layer, HostView::new(q, shape)?, HostViewMut::new(out, shape)?)?)
    }
}

/// An engine on a GPU has its activations there; these are copied.
#[cfg(feature = "cuda")]
impl HostCache for leank::cuda::CudaCache {
    fn store(&mut self, layer: Layer, k: &[f32], v: &[f32]) -> Result<()> {
        use leank::cuda::DeviceView;
        let (shape, stream) = (view(k, SHAPE.kv_heads), self.stream().clone());
        let (k, v) = (stream.clone_htod(k)?, stream.clone_htod(v)?);
        Ok(self.append(layer, DeviceView::new(&k, shape)?, DeviceView::new(&v, shape)?)?)
    }

    fn look_up(&mut self, layer: Layer, q: &[f32], out: &mut [f32]) -> Result<()> {
        use leank::cuda::{DeviceView, DeviceViewMut};
        let (shape, stream) = (view(q, SHAPE.query_heads), self.stream().clone());
        let (q, mut found) = (stream.clone_htod(q)?, stream.alloc_zeros::<f32>(out.len())?);
        self.attend(layer, DeviceView::new(&q, shape)?, DeviceViewMut::new(&mut found, shape)?)?;
        Ok(stream.memcpy_dtoh(&found, out)?)
    }
}

/// Something to do with a backend that is found at run time.
pub(crate) trait Job {
    fn run<B: Backend<Cache: HostCache>>(self, backend: &B) -> Result<()>;
}

/// Runs it on a GPU where the feature `cuda` is on and there is one, else on the CPU.
pub(crate) fn on_the_best_backend(job: impl Job) -> Result<()> {
    #[cfg(feature = "cuda")]
    match leank::cuda::Cuda::new(0) {
        Ok(cuda) => return job.run(&cuda),
        Err(error) => eprintln!("{error}"),
    }
    job.run(&leank::cpu::Cpu::new())
}

/// A cache that keeps a quarter or half of the channels of most heads and has a dead one, with at most `limit`
/// bytes. A real mask comes from `leank::files::read_mask`.
pub(crate) fn config(limit: Option<u64>) -> Result<CacheConfig> {
    let counts = [8, 16, 0, 8, 16, 8];
    let heads = counts.map(|kept| ChannelMask::new(SHAPE.head_dim, (0..kept).collect()));
    let heads = heads.into_iter().collect::<leank::Result<Vec<_>>>()?;
    let mask = ModelMask::new(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, heads)?;
    let windows = Windows { sink: 16, recent: 32 };
    Ok(CacheConfig { windows, block: 16, limit, ..CacheConfig::new(SHAPE, mask)? })
}

/// New tokens of a sequence.
pub(crate) struct Work<'a> {
    pub(crate) sequence: SequenceId,
    pub(crate) tokens: &'a [u32],
}

pub(crate) struct Toy {
    /// `[vocabulary, hidden]`
    embedding: Vec<f32>,
    layers: Vec<Weights>,
}

/// `[outputs, inputs]` each.
struct Weights {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    o: Vec<f32>,
}

impl Toy {
    pub(crate) fn new() -> Self {
        let mut random = Random(1);
        let (q, kv) = (SHAPE.query_heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim);
        let mut matrix = |outputs: usize, inputs: usize, scale: f32| -> Vec<f32> {
            let scale = scale / (inputs as f32).sqrt();
            (0..outputs * inputs).map(|_| scale * random.uniform()).collect()
        };
        Self {
            embedding: matrix(VOCABULARY as usize, HIDDEN, 1.0),
            // Large q and k: attention that picks some tokens out.
            layers: (0..SHAPE.layers)
                .map(|_| Weights {
                    q: matrix(q, HIDDEN, 4.0),
                    k: matrix(kv, HIDDEN, 4.0),
                    v: matrix(kv, HIDDEN, 2.0),
                    o: matrix(HIDDEN, q, 2.0),
                })
                .collect(),
        }
    }

    /// One step of a batch: new tokens in, for each of them the most likely token behind it out, sequence
    /// after sequence. After an error the cache is as it was.
    pub(crate) fn step<C: HostCache>(&self, cache: &mut C, work: &[Work<'_>]) -> Result<Vec<u32>> {
        let entry = |work: &Work<'_>| StepEntry::decode(work.sequence, work.tokens.len());
        let mut positions = Vec::new();
        for Work { sequence, tokens } in work {
            let start = cache.sequence_len(*sequence)?;
            positions.extend(start..start + tokens.len());
        }
        cache.plan(&work.iter().map(entry).collect::<Vec<_>>())?;
        let found = self.layers(cache, work, &positions);
        if found.is_ok() {
            cache.commit()?
        } else {
            cache.cancel()
        }
        found
    }

    fn layers<C: HostCache>(
        &self,
        cache: &mut C,
        work: &[Work<'_>],
        positions: &[usize],
    ) -> Result<Vec<u32>> {
        let embedding = |token: &u32| &self.embedding[*token as usize * HIDDEN..][..HIDDEN];
        let mut hidden: Vec<f32> =
            work.iter().flat_map(|work| work.tokens).flat_map(embedding).copied().collect();
        for (layer, weights) in self.layers.iter().enumerate() {
            hidden.chunks_exact_mut(HIDDEN).for_each(normalise);
            let mut q = product(&hidden, HIDDEN, &weights.q);
            let mut k = product(&hidden, HIDDEN, &weights.k);
            rotate(&mut q, positions);
            rotate(&mut k, positions);
            cache.store(Layer(layer), &k, &product(&hidden, HIDDEN, &weights.v))?;
            let mut out = vec![0.0; q.len()];
            cache.look_up(Layer(layer), &q, &mut out)?;
            let added = product(&out, SHAPE.query_heads * SHAPE.head_dim, &weights.o);
            hidden.iter_mut().zip(added).for_each(|(hidden, added)| *hidden += added);
        }
        let logits = product(&hidden, HIDDEN, &self.embedding);
        let best = |logits: &[f32]| {
            let best =
                (0..VOCABULARY).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
            best.unwrap_or(0)
        };
        Ok(logits.chunks_exact(VOCABULARY as usize).map(best).collect())
    }
}

/// `rows · weightsᵀ`
fn product(rows: &[f32], inputs: usize, weights: &[f32]) -> Vec<f32> {
    let dot = |row: &[f32], own: &[f32]| row.iter().zip(own).map(|(a, b)| a * b).sum::<f32>();
    rows.chunks_exact(inputs)
        .flat_map(|row| weights.chunks_exact(inputs).map(move |own| dot(row, own)))
        .collect()
}

fn normalise(row: &mut [f32]) {
    let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
    row.iter_mut().for_each(|x| *x /= (mean + 1e-6).sqrt());
}

/// RoPE on `[tokens, heads, head_dim]`.
fn rotate(values: &mut [f32], positions: &[usize]) {
    let half = SHAPE.head_dim / 2;
    for (token, &position) in values.chunks_exact_mut(values.len() / positions.len()).zip(positions)
    {
        for head in token.chunks_exact_mut(SHAPE.head_dim) {
            for c in 0..half {
                let angle = position as f32 * 1e4f32.powf(-(c as f32) / half as f32);
                let (a, b) = (head[c], head[c + half]);
                head[c] = a * angle.cos() - b * angle.sin();
                head[c + half] = b * angle.cos() + a * angle.sin();
            }
        }
    }
}

/// Numbers that are the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u32) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as u32) % n
    }

    /// In −1..1.
    fn uniform(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn tokens(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(VOCABULARY)).collect()
    }
}
