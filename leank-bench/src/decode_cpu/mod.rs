//! Whole decode steps of a model on the CPU: our cache dense and lean, candle's caches and llama.cpp,
//! in one run.
//!
//! A step is one token of one sequence through the whole model: embedding, all layers, logits. Caches
//! are filled with random K and V (llama.cpp's with copies of a computed piece), since a prompt of 32k
//! tokens is minutes of other work. Rounds go from one variant to the next, so that ratios are formed of
//! times under the same conditions.
//!
//! Weights, products and all else of a step are the same for our caches and candle's: only cache and
//! attention differ. llama.cpp runs the same file with its own everything.

mod candle;
mod llama_cpp;
mod report;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, time::Instant};

use leank_candle::{Attention, LeanAttention, LoadOptions, Model, Precision};
use leank_core::{Backend as _, Cache as _, CacheConfig, Dtype, ModelShape, SequenceId, StepEntry};
use leank_cpu::{Cpu, CpuCache};
use leank_train::rng::Rng;
pub use report::{ContextReport, DecodeCpuReport, HEADER, Measured};

use self::{
    candle::{CandleCache, Concat, Interleaved},
    llama_cpp::LlamaCpp,
};
use crate::{
    Error, Result,
    bandwidth::ReadProbe,
    cpu::{machine, pool},
    decode_gpu::MaskChoice,
    setting::{DeviceFormats, HeadShape},
    workload::{append, chunks, rows_of},
};

/// Steps before the first that counts.
const WARM: usize = 2;

/// What is measured.
#[derive(Clone, Debug)]
pub struct DecodeCpuOptions {
    /// A GGUF file, or a folder that [`Model::load`] reads.
    pub model: PathBuf,
    /// How our weights, and those beside candle's caches, are held.
    pub precision: Precision,
    /// Mask of the lean cache.
    pub mask: MaskChoice,
    /// Formats of lean blocks other than the mask's.
    pub formats: Option<DeviceFormats>,
    /// Storage type of K and V in our caches; candle's are f32.
    pub dtype: Dtype,
    /// Tokens that the last step sees.
    pub contexts: Vec<usize>,
    /// Steps of a round.
    pub tokens: usize,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Bytes of the bandwidth probe; many times the last-level cache.
    pub probe: usize,
    /// A Python with llama-cpp-python; without one llama.cpp is left out.
    pub llama_cpp: Option<PathBuf>,
}

impl DecodeCpuOptions {
    fn steps(&self) -> usize {
        WARM + self.rounds * self.tokens
    }

    fn check(&self) -> Result<()> {
        for (what, count) in
            [("contexts", self.contexts.len()), ("tokens", self.tokens), ("rounds", self.rounds)]
        {
            if count == 0 {
                return Err(Error::option(what, "at least one", "none"));
            }
        }
        match self.contexts.iter().find(|&&context| context <= self.steps()) {
            None => Ok(()),
            Some(context) => {
                let expected = format!("more than the {} tokens that are decoded", self.steps());
                Err(Error::option("context", expected, context))
            }
        }
    }
}

/// What decodes: a cache that is filled, and whatever runs a step on it.
trait Variant {
    /// Seconds per step, of so many.
    fn steps(&mut self, steps: usize) -> Result<f64>;

    /// Bytes of K and V, which every step reads.
    fn bytes(&self) -> u64;
}

/// Runs one token; the logits.
fn forward(
    model: &Model,
    token: u32,
    position: usize,
    attention: &mut dyn Attention,
) -> Result<Vec<f32>> {
    // Beyond what the model knows, tokens share its last position: what they cost is the same.
    let position = position.min(model.config().context_length - 1);
    let hidden = model.hidden(&[token], &[position], attention)?;
    let logits = model.logits(&hidden)?;
    let logits = logits.flatten_all().and_then(|logits| logits.to_vec1());
    Ok(logits.map_err(leank_candle::Error::from)?)
}

/// What runs the model in this process, on a cache of its own.
trait Stepper {
    /// Its model, and what draws its tokens.
    fn parts(&mut self) -> (&Model, &mut Rng);

    /// Runs a token; the logits.
    fn step(&mut self, token: u32) -> Result<Vec<f32>>;

    /// As [`Variant::bytes`].
    fn kv_bytes(&self) -> u64;
}

impl<S: Stepper> Variant for S {
    fn steps(&mut self, steps: usize) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..steps {
            let (model, random) = self.parts();
            let token = random.below(model.config().vocab) as u32;
            std::hint::black_box(self.step(token)?);
        }
        Ok(start.elapsed().as_secs_f64() / steps as f64)
    }

    fn bytes(&self) -> u64 {
        self.kv_bytes()
    }
}

/// Our cache, dense or lean.
struct Ours<'a> {
    model: &'a Model,
    cache: CpuCache,
    sequence: SequenceId,
    random: Rng,
}

impl<'a> Ours<'a> {
    fn new(model: &'a Model, config: CacheConfig, tokens: usize) -> Result<Self> {
        let mut cache = Cpu::with_executor(model.executor()).create(config)?;
        let sequence = cache.add_sequence();
        let mut random = Rng::new(tokens as u64);
        let ModelShape { query_heads, kv_heads, head_dim, .. } = cache.config().shape;
        let shape = HeadShape { query_heads, kv_heads, head_dim };
        for tokens in chunks(tokens) {
            cache.plan(&[StepEntry::store(sequence, tokens)])?;
            append(&mut cache, shape, tokens, &mut random)?;
            cache.commit()?;
        }
        Ok(Self { model, cache, sequence, random })
    }
}

impl Stepper for Ours<'_> {
    fn parts(&mut self) -> (&Model, &mut Rng) {
        (self.model, &mut self.random)
    }

    fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        let position = self.cache.sequence_len(self.sequence)?;
        self.cache.plan(&[StepEntry::decode(self.sequence, 1)])?;
        let logits =
            forward(self.model, token, position, &mut LeanAttention::new(&mut self.cache))?;
        self.cache.commit()?;
        Ok(logits)
    }

    fn kv_bytes(&self) -> u64 {
        self.cache.memory().used_bytes()
    }
}

/// One of candle's caches.
struct Candle<'a, C> {
    model: &'a Model,
    cache: C,
    random: Rng,
}

impl<'a, C: CandleCache> Candle<'a, C> {
    fn new(model: &'a Model, tokens: usize, room: usize) -> Result<Self> {
        let shape = model.config().shape;
        let mut cache = C::new(shape, room);
        let mut random = Rng::new(tokens as u64);
        if tokens > 0 {
            let (k, v) = rows_of(tokens * shape.kv_heads * shape.head_dim, &mut random);
            for layer in 0..shape.layers {
                cache.store(layer, &k, &v)?;
            }
        }
        Ok(Self { model, cache, random })
    }
}

impl<C: CandleCache> Stepper for Candle<'_, C> {
    fn parts(&mut self) -> (&Model, &mut Rng) {
        (self.model, &mut self.random)
    }

    fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        forward(self.model, token, self.cache.len(), &mut self.cache)
    }

    fn kv_bytes(&self) -> u64 {
        let ModelShape { layers, kv_heads, head_dim, .. } = self.model.config().shape;
        (self.cache.len() * layers * kv_heads * head_dim * 2 * size_of::<f32>()) as u64
    }
}

impl Variant for LlamaCpp {
    fn steps(&mut self, steps: usize) -> Result<f64> {
        LlamaCpp::steps(self, steps)
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// llama.cpp's workers, by the type of their caches; why there are none, where there are none.
struct Peers {
    workers: Vec<(&'static str, LlamaCpp)>,
    version: std::result::Result<String, String>,
}

impl Peers {
    fn start(options: &DecodeCpuOptions, threads: usize) -> Self {
        let mut peers = Self { workers: Vec::new(), version: Err("no --llama-cpp".into()) };
        let Some(python) = &options.llama_cpp else { return peers };
        for (name, cache) in [("llama.cpp f16", "f16"), ("llama.cpp q8_0", "q8_0")] {
            match LlamaCpp::start(python, &options.model, cache, threads) {
                Ok((worker, version)) => {
                    peers.workers.push((name, worker));
                    peers.version = Ok(version);
                }
                Err(error) => peers.version = Err(error.to_string()),
            }
        }
        peers
    }
}

/// The caches of both kinds for a model, dense and lean.
fn configs(model: &Model, options: &DecodeCpuOptions) -> Result<[CacheConfig; 2]> {
    if model.config().global_layers().len() != model.config().shape.layers {
        let found = format!("{}, some of whose layers slide", model.config().family.name());
        return Err(Error::option("model", "one whose layers are all global", found));
    }
    let shape = model.config().shape;
    let lean = options.mask.config(shape, None, options.formats, options.dtype)?;
    if let MaskChoice::File(_) = options.mask {
        lean.mask.check_model(model.fingerprint())?;
    }
    Ok([CacheConfig { dtype: options.dtype, ..CacheConfig::dense(shape)? }, lean])
}

/// Runs the measurement; `progress` gets each context as it is done.
///
/// # Errors
/// [`Error::Option`] for what cannot be measured; those of the model, the mask and the caches;
/// [`Error::LlamaCpp`] when a worker that started fails later.
pub fn measure(
    options: &DecodeCpuOptions,
    mut progress: impl FnMut(&ContextReport),
) -> Result<DecodeCpuReport> {
    options.check()?;
    let model = Model::load(&options.model, LoadOptions::with_precision(options.precision))?;
    let configs = configs(&model, options)?;
    let threads = model.executor().threads();
    let pool = pool(threads)?;
    let probe = ReadProbe::new(options.probe)?;
    let mut peers = Peers::start(options, threads);

    let mut contexts = Vec::new();
    for &context in &options.contexts {
        let stored = context - options.steps();
        let [dense, lean] = configs.clone();
        let mut dense = Ours::new(&model, dense, stored)?;
        let mut lean = Ours::new(&model, lean, stored)?;
        let mut concat = Candle::<Concat>::new(&model, stored, context)?;
        let mut interleaved = Candle::<Interleaved>::new(&model, stored, context)?;
        let mut variants: Vec<(&str, &mut dyn Variant)> = vec![
            ("lean", &mut lean),
            ("dense", &mut dense),
            ("candle, concatenated", &mut concat),
            ("candle, interleaved", &mut interleaved),
        ];
        for (name, worker) in &mut peers.workers {
            worker.fill(stored)?;
            variants.push((name, worker));
        }
        for (_, variant) in &mut variants {
            variant.steps(WARM)?;
        }
        let (mut bandwidths, mut times) = (Vec::new(), vec![Vec::new(); variants.len()]);
        for _ in 0..options.rounds {
            let start = Instant::now();
            pool.install(|| probe.pass());
            bandwidths.push(probe.bytes() as f64 / start.elapsed().as_secs_f64());
            for ((_, variant), times) in variants.iter_mut().zip(&mut times) {
                times.push(variant.steps(options.tokens)?);
            }
        }
        let names_and_bytes = variants.iter().map(|(name, variant)| (*name, variant.bytes()));
        let report = ContextReport::new(
            context,
            model.step_bytes(),
            &bandwidths,
            names_and_bytes.zip(&times),
        );
        progress(&report);
        contexts.push(report);
    }
    Ok(DecodeCpuReport {
        machine: machine(),
        backend: Cpu::with_executor(model.executor()).name(),
        threads,
        model: model.config().name.clone(),
        trained_context: model.config().context_length,
        as_stored: options.precision == Precision::AsStored,
        dtype: options.dtype,
        mask: options.mask.to_string(),
        llama_cpp: peers.version,
        tokens: options.tokens,
        rounds: options.rounds,
        weight_bytes: model.step_bytes(),
        contexts,
    })
}
