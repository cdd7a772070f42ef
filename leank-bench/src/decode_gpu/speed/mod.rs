//! Decode steps of a decoder of Llama-3.1-8B's shape with random weights, on a dense cache and on a
//! lean one.

mod report;

use cudarc::driver::{
    CudaGraph,
    sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
};
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
    cuda::driver,
    decoder::{Activations, Decoder, DecoderConfig, Products},
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
    /// Storage type of K and V: f16 or bf16.
    pub dtype: Dtype,
    /// Memory for weights, activations and cache, in which both caches hold what they can.
    pub memory: Option<MemorySize>,
    /// Steps of a round.
    pub steps: usize,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Whether a step is one launch of a CUDA graph.
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
    decoder: Decoder<bf16>,
    /// Bytes of the device that it took.
    decoder_taken: u64,
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
            let what = format!("{} for one sequence", MemorySize(needed));
            Error::option("memory", what, MemorySize(bytes))
        })
    }

    /// The times of a cache that has the device for itself.
    fn alone(&self, variant: &Variant, batch: usize) -> Result<Measured> {
        let mut running = Running::new(self, variant, batch)?;
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
        let mut dense = Running::new(self, dense, batch)?;
        let mut lean = Running::new(self, lean, batch)?;
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
    /// Bytes of the device that were taken, by the free ones before and after.
    taken: u64,
}

impl<'a> Running<'a> {
    /// Fills a cache so far that the steps to come end at the context length.
    fn new(bench: &'a Bench<'a>, variant: &'a Variant, batch: usize) -> Result<Self> {
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
        let graphs = [None, None];
        let mut running =
            Self { graphs, activations, cache, entries, bench, variant, products, taken: 0 };
        // The first step loads kernels, which cannot be captured.
        running.plan()?;
        bench.decoder.forward(&mut running.activations, &mut running.cache, true)?;
        running.cache.commit()?;
        (1..WARM).try_for_each(|_| running.step(true))?;
        running.taken = free.saturating_sub(free_bytes(bench.cuda)?);
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
        let stream = self.bench.cuda.stream();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(driver)?;
        let recorded = self.bench.decoder.forward(&mut self.activations, &mut self.cache, attend);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags).map_err(driver);
        recorded?;
        graph?.ok_or_else(|| Error::Device("nothing was captured".into()))
    }

    /// Seconds per step of a round.
    fn time(&mut self, attend: bool) -> Result<f64> {
        let stream = self.bench.cuda.stream();
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let event = || stream.context().new_event(flags).map_err(driver);
        let (start, end) = (event()?, event()?);
        let steps = self.bench.options.steps;
        let free = free_bytes(self.bench.cuda)?;
        start.record(stream).map_err(driver)?;
        (0..steps).try_for_each(|_| self.step(attend))?;
        end.record(stream).map_err(driver)?;
        let seconds = f64::from(start.elapsed_ms(&end).map_err(driver)?) / 1e3;
        self.taken += free.saturating_sub(free_bytes(self.bench.cuda)?);
        Ok(seconds / steps as f64)
    }

    /// The report of these rounds, after one without attention.
    fn finish(mut self, times: &[f64]) -> Result<Measured> {
        let (logits, _) = self.bench.decoder.results(&self.activations)?;
        if let Some(wrong) = logits.iter().find(|logit| !logit.is_finite()) {
            return Err(Error::Device(format!("a logit is {wrong}")));
        }
        self.time(false)?;
        let without = self.time(false)?;
        let Bench { options, decoder, decoder_taken, .. } = self.bench;
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
            device_bytes: decoder_taken + self.taken,
            rounds_ms,
        })
    }
}

/// Steps of a cache from the first to the last: those before the rounds, the rounds, and two rounds
/// without attention.
fn steps_in_all(options: &SpeedOptions) -> usize {
    WARM + (options.rounds + 2) * options.steps
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
    let (k, v) = (
        bench.decoder.noise(rows * width, random.next_u64())?,
        bench.decoder.noise(rows * width, random.next_u64())?,
    );
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

/// Measures; `progress` is told what was done.
///
/// # Errors
/// [`Error::Option`] for a context shorter than the steps, or memory for not even one sequence;
/// [`CoreError::Unavailable`] without cuBLAS; those of the cache and the device.
pub fn measure(
    cuda: &Cuda,
    options: &SpeedOptions,
    mut progress: impl FnMut(&str),
) -> Result<SpeedReport> {
    check_dtype(options.dtype)?;
    let steps = steps_in_all(options);
    if options.context <= steps || options.steps == 0 || options.batch == 0 {
        let expected =
            format!("more than the {steps} tokens that are decoded, at least one of each");
        let found = format!("{} tokens, {} sequences", options.context, options.batch);
        return Err(Error::option("context", expected, found));
    }
    let config = DecoderConfig::llama_8b(options.layers, options.context)?;
    let lean = options.mask.config(config.shape, options.windows, options.dtype)?;
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
    let decoder = Decoder::random(cuda, config, 1)?;
    let decoder_taken = free.saturating_sub(free_bytes(cuda)?);
    let bench = Bench { cuda, options, decoder, decoder_taken };
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
        let mut batch = bench.largest(variant, 1 << 16, bytes)?;
        loop {
            let measured = bench.alone(variant, batch)?;
            progress(&measured.to_string());
            // The plan does not know of slabs that are not full, and of cuBLAS's code.
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
