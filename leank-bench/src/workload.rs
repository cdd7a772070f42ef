//! A filled cache that decodes one token, layer after layer.

use leank_core::{
    Backend, Cache, CacheConfig, DEFAULT_BLOCK, Dtype, HeadPrecision, HostView, HostViewMut, Layer,
    ModelShape, Planner, StepEntry, ViewShape, oracle::Attention,
};
use leank_train::rng::Rng;
use serde::Serialize;

use crate::{
    Error, Result,
    setting::{HeadShape, Published, fill, mask_period, mixed_mask, with_format},
};

/// Tokens per step while the cache is filled.
const CHUNK: usize = 1024;
const SEED: u64 = 1;
/// Largest cache that is filled only to take every head of a mask once.
const MOST_BYTES: u64 = 5 << 30;
/// More layers than any cache needs to be cold; a setting beyond has too short a context.
const MOST_LAYERS: usize = 1 << 14;

/// Which cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Nothing pruned, nothing packed.
    Dense,
    /// The heads of [`mixed_mask`], default windows.
    Lean,
    /// Kept counts of [`Published::Llama`], a sink of 128 and 768 recent tokens.
    Llama,
    /// Kept counts of [`Published::Qwen`], a sink of 128 and 768 recent tokens.
    Qwen,
}

impl Variant {
    fn config(self, shape: ModelShape) -> Result<CacheConfig> {
        Ok(match self {
            Self::Dense => CacheConfig::dense(shape)?,
            Self::Lean => CacheConfig::new(shape, mixed_mask(&shape)?)?,
            Self::Llama => Published::Llama.config(shape)?,
            Self::Qwen => Published::Qwen.config(shape)?,
        })
    }

    /// Layers after which the masks repeat, so that the mean over layers is exact.
    fn period(self, kv_heads: usize) -> usize {
        match self {
            Self::Dense => 1,
            Self::Lean => mask_period(kv_heads),
            Self::Llama => Published::Llama.layers(kv_heads),
            Self::Qwen => Published::Qwen.layers(kv_heads),
        }
    }
}

/// What a workload is made of.
#[derive(Clone, Copy, Debug)]
pub struct WorkloadOptions {
    /// Heads of a layer.
    pub shape: HeadShape,
    /// Tokens that the query sees, itself included; a multiple of [`DEFAULT_BLOCK`], so that
    /// every byte of every block is read.
    pub context: usize,
    /// Sequences of so many tokens that one step decodes, at least one.
    pub sequences: usize,
    /// Storage type of K and V.
    pub dtype: Dtype,
    /// Dense or lean.
    pub variant: Variant,
    /// Formats of lean blocks.
    pub formats: HeadPrecision,
    /// Least bytes of the whole cache: as many layers as that takes.
    pub footprint: u64,
}

impl WorkloadOptions {
    fn config(&self, layers: usize) -> Result<CacheConfig> {
        let config = self.variant.config(self.shape.model(layers)?)?;
        let config = with_format(config, self.formats.format(self.dtype));
        Ok(CacheConfig { dtype: self.dtype, ..config })
    }

    fn bytes(&self, layers: usize, backend: &impl Backend) -> Result<u64> {
        let planner = Planner::new(&self.config(layers)?, backend.layout_rules())?;
        Ok(planner.footprint(self.context - 1)?.bytes.saturating_mul(self.sequences as u64).max(1))
    }

    /// Whole periods of the mask where one is no larger than [`MOST_BYTES`], some of its layers
    /// otherwise.
    fn layers(&self, backend: &impl Backend) -> Result<usize> {
        let period = self.variant.period(self.shape.kv_heads);
        let bytes = self.bytes(period, backend)?;
        if bytes > MOST_BYTES.max(self.footprint) {
            let layer = bytes.div_ceil(period as u64);
            return Ok((MOST_BYTES.max(self.footprint) / layer).clamp(1, period as u64) as usize);
        }
        let periods = usize::try_from(self.footprint.div_ceil(bytes)).unwrap_or(usize::MAX);
        match periods.max(1).checked_mul(period) {
            Some(layers) if layers <= MOST_LAYERS => Ok(layers),
            _ => {
                let expected = format!("a footprint of at most {MOST_LAYERS} layers");
                let found = format!(
                    "{} bytes of layers of {} bytes; measure a longer context or a smaller footprint",
                    self.footprint,
                    bytes / period as u64
                );
                Err(Error::option("footprint", expected, found))
            }
        }
    }
}

/// A cache in the middle of a decode step of one token per sequence. Every layer holds random data, and all
/// layers together are larger than the footprint asked for: attention over one after the other
/// reads memory, not cache.
#[derive(Debug)]
pub struct Workload<C> {
    cache: C,
    context: usize,
    sequences: usize,
    bytes: u64,
    q: Vec<f32>,
    out: Vec<f32>,
}

impl<C> Workload<C>
where
    C: for<'a> Cache<View<'a> = HostView<'a>, ViewMut<'a> = HostViewMut<'a>>,
{
    /// Fills a cache of `backend` and begins a step of one token per sequence.
    ///
    /// # Errors
    /// [`Error::Option`] for no sequence, a context that is no multiple of the block or a footprint of
    /// too many layers, [`Error::Cache`] for what the backend refuses.
    pub fn new(backend: &impl Backend<Cache = C>, options: &WorkloadOptions) -> Result<Self> {
        if options.context == 0 || !options.context.is_multiple_of(DEFAULT_BLOCK) {
            let expected = format!("a multiple of {DEFAULT_BLOCK} tokens");
            return Err(Error::option("context", expected, options.context));
        }
        if options.sequences == 0 {
            return Err(Error::option("sequences", "at least one", 0));
        }
        let layers = options.layers(backend)?;
        let mut cache = backend.create(options.config(layers)?)?;
        let mut random = Rng::new(SEED);
        let mut step = Vec::new();
        for _ in 0..options.sequences {
            let sequence = cache.add_sequence();
            for tokens in chunks(options.context - 1) {
                cache.plan(&[StepEntry::store(sequence, tokens)])?;
                append(&mut cache, options.shape, tokens, &mut random)?;
                cache.commit()?;
            }
            step.push(StepEntry::decode(sequence, 1));
        }
        // The last blocks have room for one token: the step takes no block, and what the cache
        // holds now is exactly what attention reads.
        let bytes = cache.memory().used_bytes();
        cache.plan(&step)?;
        append(&mut cache, options.shape, options.sequences, &mut random)?;

        let row = options.shape.query_heads * options.shape.head_dim;
        let mut q = vec![0.0; options.sequences * row];
        fill(&mut random, &mut q);
        let out = vec![f32::NAN; q.len()];
        let WorkloadOptions { context, sequences, .. } = *options;
        Ok(Self { cache, context, sequences, bytes, q, out })
    }

    /// Relative L2 and largest absolute error of the first layer's output for the first sequence
    /// against the f64 oracle on K and V rounded to the storage type: in 16 bits the accuracy of the
    /// arithmetic, otherwise what lean formats cost too.
    ///
    /// # Errors
    /// Those of the cache.
    pub fn error(&mut self) -> Result<(f64, f64)> {
        let shape = self.cache.config().shape;
        self.attend(Layer(0))?;
        let dtype = self.cache.config().dtype;
        let stored = |x| f64::from(dtype.round(x));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut random = Rng::new(SEED);
        let row = shape.kv_heads * shape.head_dim;
        let mut take = |tokens: usize, wanted: usize| {
            let (k, v) = rows_of(tokens * row, &mut random);
            keys.extend(k[..wanted * row].iter().copied().map(stored));
            values.extend(v[..wanted * row].iter().copied().map(stored));
        };
        for sequence in 0..self.sequences {
            for tokens in chunks(self.context - 1) {
                take(tokens, if sequence == 0 { tokens } else { 0 });
            }
        }
        take(self.sequences, 1);
        let queries = &self.q[..shape.query_heads * shape.head_dim];
        let queries: Vec<f64> = queries.iter().copied().map(f64::from).collect();
        let config = self.cache.config();
        let want = Attention {
            masks: config.mask.layer(Layer(0)),
            query_heads: shape.query_heads,
            windows: config.windows,
            block: config.block,
            scale: f64::from(config.scale()),
            soft_cap: None,
            start: self.context - 1,
            keys: &keys,
            values: &values,
            queries: &queries,
        }
        .output();
        let (mut error, mut norm, mut largest) = (0.0, 0.0, 0.0f64);
        for (&got, want) in self.out.iter().zip(&want) {
            let difference = f64::from(got) - want;
            error += difference * difference;
            norm += want * want;
            largest = largest.max(difference.abs());
        }
        Ok(((error / norm).sqrt(), largest))
    }

    fn attend(&mut self, layer: Layer) -> Result<()> {
        let shape = self.cache.config().shape;
        let rows = ViewShape::contiguous(self.sequences, shape.query_heads, shape.head_dim);
        let q = HostView::new(&self.q[..], rows)?;
        Ok(self.cache.attend(layer, q, HostViewMut::new(&mut self.out[..], rows)?)?)
    }

    /// Attends once in every layer.
    ///
    /// # Errors
    /// Those of the cache.
    pub fn sweep(&mut self) -> Result<()> {
        self.cache.config().shape.layer_indices().try_for_each(|layer| self.attend(layer))
    }

    /// Layers of the cache: calls of a sweep.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.cache.config().shape.layers
    }

    /// Bytes of K and V that a sweep reads, as the cache reports them.
    #[must_use]
    pub fn sweep_bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of K and V that one call reads, mean over the layers.
    #[must_use]
    pub fn call_bytes(&self) -> f64 {
        self.bytes as f64 / self.layers() as f64
    }

    /// The output of the last call, `[sequences, query heads, head_dim]`; NaN before the first.
    #[must_use]
    pub fn output(&self) -> &[f32] {
        &self.out
    }
}

/// Steps in which `tokens` tokens are stored.
pub(crate) fn chunks(tokens: usize) -> impl Iterator<Item = usize> {
    (0..tokens).step_by(CHUNK).map(move |start| CHUNK.min(tokens - start))
}

/// `len` elements of K, and of V.
pub(crate) fn rows_of(len: usize, random: &mut Rng) -> (Vec<f32>, Vec<f32>) {
    let mut k = vec![0.0; len];
    let mut v = k.clone();
    fill(random, &mut k);
    fill(random, &mut v);
    (k, v)
}

/// Appends random rows to every layer. Layers share their values, not their memory.
pub(crate) fn append<C>(
    cache: &mut C,
    shape: HeadShape,
    tokens: usize,
    random: &mut Rng,
) -> Result<()>
where
    C: for<'a> Cache<View<'a> = HostView<'a>>,
{
    let rows = ViewShape::contiguous(tokens, shape.kv_heads, shape.head_dim);
    let (k, v) = rows_of(tokens * shape.kv_heads * shape.head_dim, random);
    for layer in (0..cache.config().shape.layers).map(Layer) {
        cache.append(layer, HostView::new(&k[..], rows)?, HostView::new(&v[..], rows)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use leank_cpu::{Cpu, Serial};

    use super::*;

    fn options(variant: Variant) -> WorkloadOptions {
        let (shape, dtype) = (HeadShape::SMOLLM2, Dtype::F16);
        let formats = HeadPrecision::default();
        let (context, sequences, footprint) = (1024, 1, 5 << 20);
        WorkloadOptions { shape, context, sequences, dtype, variant, formats, footprint }
    }

    fn workload(options: &WorkloadOptions) -> Workload<leank_cpu::CpuCache> {
        Workload::new(&Cpu::with_executor(Arc::new(Serial)), options).unwrap()
    }

    #[test]
    fn bytes_are_those_of_k_and_v() {
        let dense = workload(&options(Variant::Dense));
        assert_eq!(dense.call_bytes(), 1024.0 * 3.0 * 64.0 * 2.0 * 2.0);
        assert!(dense.sweep_bytes() >= 5 << 20);

        let lean = workload(&options(Variant::Lean));
        // The query stands at 1023: blocks that end by 1024 - 128 = 896 are lean but for the sink's,
        // so 13 of 16. Over the period of the mask a quarter of the heads keeps each count, and
        // three quarters keep V.
        let full = 3.0 * 64.0 * 3.0 * 64.0 * 2.0;
        let middle = 13.0 * 64.0 * 3.0 * ((0.0 + 16.0 + 32.0 + 64.0) / 4.0 + 64.0 * 0.75);
        assert_eq!(lean.call_bytes(), (full + middle) * 2.0);
        assert!(lean.sweep_bytes() >= 5 << 20);
        assert_eq!(lean.layers() % 4, 0);
    }

    #[test]
    fn a_sweep_attends() {
        let outputs = [Variant::Dense, Variant::Lean].map(|variant| {
            let mut workload = workload(&options(variant));
            workload.sweep().unwrap();
            workload.output().to_vec()
        });
        for output in &outputs {
            assert!(output.iter().all(|x| x.is_finite() && *x != 0.0));
        }
        assert_ne!(outputs[0], outputs[1]);
    }

    #[test]
    fn settings_that_cannot_be_measured_are_refused() {
        let backend = Cpu::with_executor(Arc::new(Serial));
        for context in [0, 1, 1000] {
            let options = WorkloadOptions { context, ..options(Variant::Dense) };
            let error = Workload::new(&backend, &options).unwrap_err();
            assert!(error.to_string().contains("multiple of 64"), "{error}");
        }
        let options = WorkloadOptions { footprint: u64::MAX, ..options(Variant::Dense) };
        let error = Workload::new(&backend, &options).unwrap_err();
        assert!(error.to_string().contains("smaller footprint"), "{error}");
    }
}
