//! Decode steps of a decoder of Llama-3.1-8B's shape with random weights, on a dense cache and on a
//! lean one.

mod report;

use cudarc::driver::CudaGraph;
use half::bf16;
use leank_core::{
    Backend as _, Cache as _, CacheConfig, DEFAULT_BLOCK, Dtype, Error as CoreError, Planner,
    StepEntry, ViewShape, Windows,
};
use leank_cuda::{CaptureKey, Cuda, CudaCache, DeviceView};
use leank_train::rng::Rng;
pub use report::{HEADER, InMemory, Measured, SpeedReport, TARGETS};

use super::{MaskChoice, MemorySize, check_dtype, dense, fit::largest};
use crate::{
    Error, Result,
    cuda::{Device, capture, driver, seconds},
    decoder::{Activations, Decoder, DecoderConfig, MOST_ROWS, Products},
    setting::DeviceFormats,
    stats::median,
};

/// Bytes of a weight.
const ELEMENT: usize = size_of::<bf16>();

/// Most blocks that a sequence is fed at once while a cache is filled.
const PIECE: usize = 32;

/// Steps before the first that counts: one whose work is given to the stream as it is, which loads
/// kernels, and two of a graph.
const WARM: usize = 3;

/// Bytes beside a cache's blocks in use that must be free: blocks come in slabs of up to 256 MiB,
/// lean and full; captured graphs; what a cache is filled from.
const RESERVE: u64 = 768 << 20;

/// What is measured.
#[derive(Clone, Debug)]
pub struct SpeedOptions {
    /// Sequences; fewer where the device does not hold so many in a dense cache.
    pub batch: usize,
    /// Tokens of each sequence after the last step.
    pub context: usize,
    /// Layers, of 32.
    pub layers: usize,
    /// Mask of the lean cache.
    pub mask: MaskChoice,
    /// Windows other than the mask's.
    pub windows: Option<Windows>,
    /// Formats of lean blocks other than the mask's, for all heads.
    pub formats: Option<DeviceFormats>,
    /// Storage type of K and V: f16 or bf16.
    pub dtype: Dtype,
    /// Memory for weights, activations and cache, in which both caches hold what they can.
    pub memory: Option<MemorySize>,
    /// Steps of a round.
    pub steps: usize,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Whether what is between plan and commit is one launch of a CUDA graph.
    pub graphs: bool,
}

/// One of the two caches: its name, configuration, and what it will take.
struct Variant {
    name: &'static str,
    config: CacheConfig,
    planner: Planner,
}

impl Variant {
    fn new(cuda: &Cuda, name: &'static str, config: CacheConfig) -> Result<Self> {
        let planner = Planner::new(&config, cuda.layout_rules())?;
        Ok(Self { name, config, planner })
    }

    /// Most bytes of a cache of so many sequences up to `context` tokens.
    fn peak_bytes(&self, batch: usize, context: usize) -> Result<u64> {
        Ok(self.planner.footprint(context)?.peak_bytes.saturating_mul(batch as u64))
    }
}

/// What all measurements share.
struct Bench<'a> {
    cuda: &'a Cuda,
    options: &'a SpeedOptions,
    device: Device,
    decoder: Decoder<bf16>,
    /// Free bytes of the device before there was a decoder.
    free: u64,
}

/// Free bytes of the device, when all work is done and what was dropped is given back.
fn free_bytes(cuda: &Cuda) -> Result<u64> {
    cuda.stream().synchronize().map_err(driver)?;
    Ok(cuda.stream().context().mem_get_info().map_err(driver)?.0 as u64)
}

impl Bench<'_> {
    /// Bytes that a cache and the activations of its steps take.
    fn bytes(&self, variant: &Variant, batch: usize) -> Result<u64> {
        let activations = self.decoder.config().activation_bytes(batch, ELEMENT);
        Ok(variant.peak_bytes(batch, self.options.context)?.saturating_add(activations))
    }

    /// The largest batch that these bytes hold.
    fn largest(&self, variant: &Variant, most: usize, bytes: u64) -> Result<usize> {
        let fits = |batch| self.bytes(variant, batch).is_ok_and(|needed| needed <= bytes);
        largest(most, fits).ok_or_else(|| {
            let needed = self.bytes(variant, 1).unwrap_or(u64::MAX);
            let expected = format!("{} for one sequence beside the weights", MemorySize(needed));
            Error::option("memory", expected, MemorySize(bytes))
        })
    }

    /// Bytes of the device that were taken since, by the decoder and what cuBLAS loaded, while there is
    /// no cache.
    fn taken(&self) -> Result<u64> {
        Ok(self.free.saturating_sub(free_bytes(self.cuda)?))
    }

    /// The times of a cache that has the device for itself.
    fn alone(&self, variant: &Variant, batch: usize) -> Result<Measured> {
        let mut running = Running::new(self, variant, batch, self.taken()?)?;
        let rounds = 0..self.options.rounds;
        let times = rounds.map(|_| running.time(true)).collect::<Result<Vec<_>>>()?;
        running.finish(&times)
    }

    /// Both caches at one batch, in rounds that alternate where there is room for both.
    fn both(&self, variants: &[Variant; 2], asked: usize) -> Result<(bool, [Measured; 2], f64)> {
        let [dense, lean] = variants;
        let free = free_bytes(self.cuda)?.saturating_sub(RESERVE);
        let batch = self.largest(dense, asked, free)?;
        let needed = self.bytes(dense, batch)? + self.bytes(lean, batch)?;
        let together = needed.saturating_add(RESERVE) <= free;
        if !together {
            let (dense, lean) = (self.alone(dense, batch)?, self.alone(lean, batch)?);
            let ratio = dense.ms / lean.ms;
            return Ok((false, [dense, lean], ratio));
        }
        let taken = self.taken()?;
        let mut dense = Running::new(self, dense, batch, taken)?;
        let mut lean = Running::new(self, lean, batch, taken)?;
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..self.options.rounds {
            times[0].push(dense.time(true)?);
            times[1].push(lean.time(true)?);
        }
        let ratios = times[0].iter().zip(&times[1]).map(|(dense, lean)| dense / lean);
        let ratio = median(ratios).unwrap_or(f64::NAN);
        Ok((true, [dense.finish(&times[0])?, lean.finish(&times[1])?], ratio))
    }
}

/// A filled cache whose sequences decode.
struct Running<'a> {
    /// Of steps without and with attention. They hold addresses of what is below.
    graphs: [Option<(CaptureKey, CudaGraph)>; 2],
    activations: Activations<bf16>,
    cache: CudaCache,
    entries: Vec<StepEntry>,
    bench: &'a Bench<'a>,
    variant: &'a Variant,
    products: Products,
    taken: Taken,
}

/// Bytes of the device that a cache and everything it needs take, by how free ones change.
#[derive(Clone, Copy, Debug)]
struct Taken {
    now: i64,
    most: i64,
}

impl Taken {
    fn new(bytes: u64) -> Self {
        Self { now: bytes as i64, most: bytes as i64 }
    }

    /// Counts what became of the free bytes.
    fn count(&mut self, before: u64, after: u64) {
        self.now += before as i64 - after as i64;
        self.most = self.most.max(self.now);
    }
}

impl<'a> Running<'a> {
    /// Fills a cache so far that the steps to come end at the context length; `taken` bytes of the
    /// device are taken by what all caches share.
    fn new(bench: &'a Bench<'a>, variant: &'a Variant, batch: usize, taken: u64) -> Result<Self> {
        let SpeedOptions { context, .. } = *bench.options;
        let stored = context - steps_in_all(bench.options);
        let free = free_bytes(bench.cuda)?;
        let mut random = Rng::new(context as u64);
        let mut cache = bench.cuda.create(variant.config.clone())?;
        let entries: Vec<StepEntry> =
            (0..batch).map(|_| StepEntry::decode(cache.add_sequence(), 1)).collect();
        fill(bench, &mut cache, &entries, stored, &mut random)?;

        let mut activations = bench.decoder.activations(batch)?;
        let products = bench.decoder.tune(&activations)?;
        let vocab = bench.decoder.config().vocab;
        let tokens: Vec<u32> = (0..batch).map(|_| random.below(vocab) as u32).collect();
        let positions = vec![stored as u32; batch];
        bench.decoder.set_rows(&mut activations, &tokens, &positions)?;
        let (graphs, taken) = ([None, None], Taken::new(taken));
        let mut running =
            Self { graphs, activations, cache, entries, bench, variant, products, taken };
        // The first step loads kernels, which cannot be captured.
        running.plan()?;
        bench.decoder.forward(&mut running.activations, &mut running.cache, true)?;
        running.cache.commit()?;
        (1..WARM).try_for_each(|_| running.step(true))?;
        running.taken.count(free, free_bytes(bench.cuda)?);
        Ok(running)
    }

    fn plan(&mut self) -> Result<()> {
        Ok(self.cache.plan(&self.entries)?)
    }

    /// One step; only gives work to the stream.
    fn step(&mut self, attend: bool) -> Result<()> {
        self.plan()?;
        if self.bench.options.graphs {
            let key = self.cache.capture_key();
            let graph = match self.graphs[usize::from(attend)].take() {
                Some((captured, graph)) if captured == key => graph,
                _ => self.capture(attend)?,
            };
            graph.launch().map_err(driver)?;
            self.graphs[usize::from(attend)] = Some((key, graph));
            self.cache.mark_appended()?;
        } else {
            self.bench.decoder.forward(&mut self.activations, &mut self.cache, attend)?;
        }
        Ok(self.cache.commit()?)
    }

    /// The work of the step that is planned, as a graph.
    fn capture(&mut self, attend: bool) -> Result<CudaGraph> {
        let Self { bench, activations, cache, .. } = self;
        capture(bench.cuda.stream(), || bench.decoder.forward(activations, cache, attend))
    }

    /// Seconds per step of a round.
    fn time(&mut self, attend: bool) -> Result<f64> {
        let Bench { cuda, options, .. } = self.bench;
        let free = free_bytes(cuda)?;
        let steps = || (0..options.steps).try_for_each(|_| self.step(attend));
        let seconds = seconds(cuda.stream(), steps)?;
        self.taken.count(free, free_bytes(cuda)?);
        Ok(seconds / options.steps as f64)
    }

    /// The report of these rounds, after one without attention.
    fn finish(mut self, times: &[f64]) -> Result<Measured> {
        let (logits, _) = self.bench.decoder.results(&self.activations)?;
        if let Some(wrong) = logits.iter().find(|logit| !logit.is_finite()) {
            return Err(Error::Device(format!("a logit is {wrong}")));
        }
        self.time(false)?;
        let without = self.time(false)?;
        let Bench { options, decoder, .. } = self.bench;
        let batch = self.entries.len();
        let seconds = median(times.iter().copied()).unwrap_or(f64::NAN);
        let footprint = self.variant.planner.footprint(options.context)?;
        let decoder_bytes = decoder.config().decoder_bytes(ELEMENT);
        let rounds_ms: Vec<f64> = times.iter().map(|seconds| seconds * 1e3).collect();
        Ok(Measured {
            cache: self.variant.name,
            batch,
            context: options.context,
            cache_bytes: footprint.bytes * batch as u64,
            ms: seconds * 1e3,
            ms_min: rounds_ms.iter().copied().fold(f64::INFINITY, f64::min),
            ms_max: rounds_ms.iter().copied().fold(0.0, f64::max),
            tokens_per_s: batch as f64 / seconds,
            attention_share: 1.0 - without / seconds,
            products: self.products,
            planned_bytes: decoder_bytes + self.bench.bytes(self.variant, batch)?,
            device_bytes: self.taken.most.max(0) as u64,
            rounds_ms,
        })
    }
}

/// Steps of a cache from the first to the last: those before the rounds, the rounds, and two rounds
/// without attention.
fn steps_in_all(options: &SpeedOptions) -> usize {
    options.rounds.saturating_add(2).saturating_mul(options.steps).saturating_add(WARM)
}

/// Stores random K and V, piece by piece in random order, so that the blocks of a sequence lie in no
/// order.
fn fill(
    bench: &Bench<'_>,
    cache: &mut CudaCache,
    entries: &[StepEntry],
    tokens: usize,
    random: &mut Rng,
) -> Result<()> {
    let shape = cache.config().shape;
    let width = shape.kv_heads * shape.head_dim;
    let rows = PIECE * DEFAULT_BLOCK;
    let mut noise = || bench.device.random(Dtype::Bf16, rows * width, random.next_u64(), 1.0);
    let (k, v) = (noise()?, noise()?);
    let mut left = vec![tokens; entries.len()];
    loop {
        let open: Vec<usize> = (0..left.len()).filter(|&i| left[i] > 0).collect();
        if open.is_empty() {
            return Ok(());
        }
        let i = open[random.below(open.len())];
        let piece = (DEFAULT_BLOCK * (1 + random.below(PIECE))).min(left[i]);
        left[i] -= piece;
        let rows = ViewShape::contiguous(piece, shape.kv_heads, shape.head_dim);
        cache.plan(&[StepEntry::store(entries[i].sequence, piece)])?;
        for layer in shape.layer_indices() {
            cache.append(layer, DeviceView::new(&k, rows)?, DeviceView::new(&v, rows)?)?;
        }
        cache.commit()?;
    }
}

/// The decoder's numbers; fails for what cannot be measured, whatever the device.
fn check(options: &SpeedOptions) -> Result<DecoderConfig> {
    check_dtype(options.dtype)?;
    if !(1..=MOST_ROWS).contains(&options.batch) {
        return Err(Error::option("batch", format!("1..={MOST_ROWS} sequences"), options.batch));
    }
    if options.steps == 0 || options.rounds == 0 {
        let found = format!("{} rounds of {} steps", options.rounds, options.steps);
        return Err(Error::option("rounds", "at least one of one step", found));
    }
    let decoded = steps_in_all(options);
    if options.context <= decoded {
        let expected = format!(
            "more than the {decoded} tokens that warm-up and {} rounds of {} steps decode",
            options.rounds.saturating_add(2),
            options.steps
        );
        return Err(Error::option("context", expected, options.context));
    }
    let config = DecoderConfig::llama_8b(options.layers, options.context)?;
    config.validate()?;
    Ok(config)
}

/// Measures; `progress` is told what was done.
///
/// # Errors
/// [`Error::Option`] for nothing to measure, a context shorter than the steps, a batch that kernels
/// do not take, more memory than is free, or memory for not even one sequence;
/// [`CoreError::Unavailable`] without cuBLAS; those of the mask, the cache and the device.
pub fn measure(
    cuda: &Cuda,
    options: &SpeedOptions,
    mut progress: impl FnMut(&str),
) -> Result<SpeedReport> {
    let config = check(options)?;
    let lean =
        options.mask.config(config.shape, options.windows, options.formats, options.dtype)?;
    let windows = lean.windows;
    let variants = [
        Variant::new(cuda, "dense", dense(config.shape, options.dtype)?)?,
        Variant::new(cuda, "lean", lean)?,
    ];
    let decoder_bytes = config.decoder_bytes(ELEMENT);
    let free = free_bytes(cuda)?;
    if decoder_bytes.saturating_add(RESERVE) > free {
        let what = "the weights";
        return Err(CoreError::SystemMemory { what, bytes: decoder_bytes }.into());
    }
    if let Some(memory) = options.memory
        && !(decoder_bytes..=free).contains(&memory.0)
    {
        let expected = format!(
            "more than the weights' {}, and at most the {} that are free",
            MemorySize(decoder_bytes),
            MemorySize(free)
        );
        return Err(Error::option("memory", expected, memory));
    }
    let decoder = Decoder::random(cuda, config, 1)?;
    let device = Device::new(cuda.stream())?;
    let bench = Bench { cuda, options, device, decoder, free };
    progress(&format!("weights: {} of {} free", MemorySize(decoder_bytes), MemorySize(free)));
    let (together, [dense, lean], ratio) = bench.both(&variants, options.batch)?;
    progress(&format!("{HEADER}\n{dense}\n{lean}"));
    let in_memory = match options.memory {
        None => None,
        Some(memory) => Some(in_memory(&bench, &variants, memory, &mut progress)?),
    };
    Ok(SpeedReport {
        device: cuda.device().to_string(),
        layers: options.layers,
        decoder_bytes,
        mask: options.mask.to_string(),
        formats: options.formats.map(|formats| formats.to_string()),
        windows,
        dtype: options.dtype,
        graphs: options.graphs,
        steps: options.steps,
        rounds: options.rounds,
        asked_batch: options.batch,
        together,
        dense,
        lean,
        ratio,
        in_memory,
    })
}

/// Each cache at the largest batch that the memory holds.
fn in_memory(
    bench: &Bench<'_>,
    variants: &[Variant; 2],
    memory: MemorySize,
    progress: &mut impl FnMut(&str),
) -> Result<InMemory> {
    let decoder_bytes = bench.decoder.config().decoder_bytes(ELEMENT);
    let bytes = memory.0.saturating_sub(decoder_bytes);
    let mut measure = |variant: &Variant| {
        let mut batch = bench.largest(variant, MOST_ROWS, bytes)?;
        loop {
            let measured = bench.alone(variant, batch)?;
            progress(&measured.to_string());
            // The plan does not know of slabs that are not full, of graphs, and of cuBLAS's code.
            if measured.device_bytes <= memory.0 || batch == 1 {
                return Ok::<_, Error>(measured);
            }
            batch -= 1;
        }
    };
    let (dense, lean) = (measure(&variants[0])?, measure(&variants[1])?);
    let ratio = lean.tokens_per_s / dense.tokens_per_s;
    Ok(InMemory { bytes: memory.0, dense, lean, ratio })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::setting::Published;

    #[test]
    fn what_cannot_be_measured_is_refused() {
        let good = SpeedOptions {
            batch: 4,
            context: 3 + 5 * 64 + 1,
            layers: 32,
            mask: MaskChoice::Published(Published::Llama),
            windows: None,
            formats: None,
            dtype: Dtype::Bf16,
            memory: None,
            steps: 64,
            rounds: 3,
            graphs: true,
        };
        check(&good).unwrap();
        for (bad, what) in [
            (SpeedOptions { batch: 0, ..good.clone() }, "batch"),
            (SpeedOptions { batch: usize::MAX, ..good.clone() }, "batch"),
            (SpeedOptions { steps: 0, ..good.clone() }, "rounds"),
            (SpeedOptions { rounds: 0, ..good.clone() }, "rounds"),
            (SpeedOptions { context: good.context - 1, ..good.clone() }, "323 tokens"),
            (SpeedOptions { context: usize::MAX, ..good.clone() }, "positions"),
            (SpeedOptions { steps: 1 << 62, rounds: 2, ..good.clone() }, "context"),
            (SpeedOptions { dtype: Dtype::F32, ..good.clone() }, "storage type"),
        ] {
            let error = check(&bad).unwrap_err();
            assert!(matches!(error, Error::Option { .. }), "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
    }

    #[test]
    fn memory_taken_is_that_of_the_fullest_moment() {
        let mut taken = Taken::new(10);
        taken.count(100, 60);
        // A slab goes and comes back.
        taken.count(60, 75);
        taken.count(75, 60);
        assert_eq!((taken.now, taken.most), (50, 50));
    }
}
