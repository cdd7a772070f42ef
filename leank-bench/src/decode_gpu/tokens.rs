//! A real model's greedy tokens on a CUDA device beside those on the CPU, with the same cache
//! configuration on both: dense, then lean.
//!
//! Both sides get the CPU's tokens, so every step is compared, whatever happened before. What may
//! differ is rounding: the CPU multiplies f32 queries and weights of the softmax with K and V as they
//! are stored; tensor cores want those rounded to the storage type too. How much such a rounding does
//! to logits is measured on the CPU, which runs once more with K and V in f32: the largest difference
//! that this makes is [`Comparison::rounding`]. Logits of the device may be [`FACTOR`] times as far
//! from the CPU's, and a token may differ where the two best logits are nearer than twice that.

use std::{fmt, path::PathBuf};

use leank_candle::{LeanAttention, LoadOptions, Model, Part};
use leank_core::{
    Backend as _, BlockCount, Cache as _, CacheConfig, Dtype, SequenceId, StepEntry, Windows,
};
use leank_cpu::{Cpu, CpuCache};
use leank_cuda::{Cuda, CudaCache};
use serde::Serialize;

use super::{MaskChoice, check_dtype, dense};
use crate::{
    Error, Result,
    decoder::{Activations, Decoder, DecoderConfig},
};

/// Tokens of a prompt per step.
const CHUNK: usize = 64;

/// How many times the difference that rounding K and V makes on the CPU the device's logits may be
/// off: it rounds four things where the CPU rounds two.
pub const FACTOR: f32 = 4.0;

/// What is compared.
#[derive(Clone, Debug)]
pub struct TokensOptions {
    /// A model that [`Model::load`] reads.
    pub model: PathBuf,
    /// Texts that are continued, all in one batch.
    pub prompts: Vec<String>,
    /// Tokens generated per prompt.
    pub tokens: usize,
    /// Storage type of K and V: f16 or bf16.
    pub dtype: Dtype,
    /// Mask of the lean cache.
    pub mask: MaskChoice,
    /// Windows other than the mask's.
    pub windows: Option<Windows>,
}

/// A row whose best token is another on the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Number of the prompt.
    pub prompt: usize,
    /// Position of the token behind which the best ones differ.
    pub position: usize,
    /// The CPU's token and the device's.
    pub tokens: [u32; 2],
    /// How far the CPU's logit of its token is above that of the device's token.
    pub cpu_gap: f32,
    /// How far the device's logit of its token is above that of the CPU's token.
    pub cuda_gap: f32,
}

/// One cache configuration on both sides.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// `dense` or `lean`.
    pub cache: &'static str,
    /// Rows whose logits and best tokens were compared, prompts included.
    pub rows: usize,
    /// Of these, rows of generated tokens.
    pub generated: usize,
    /// Full blocks of the cache at the end.
    pub full_blocks: usize,
    /// Lean blocks of the cache at the end.
    pub lean_blocks: usize,
    /// Whole-KV ratio of the cache at the end: above 1 for a dense one, whose last blocks are not full.
    pub whole_kv_ratio: Option<f64>,
    /// The largest difference of a logit between CPU and device.
    pub largest_difference: f32,
    /// The largest difference of a logit that storing K and V in the storage type rather than in f32
    /// makes on the CPU.
    pub rounding: f32,
    /// The largest logit's size, to compare with.
    pub largest_logit: f32,
    /// Rows with another best token.
    pub differences: Vec<Difference>,
    /// What was generated behind each prompt.
    pub texts: Vec<String>,
}

impl Comparison {
    /// How far logits may be off.
    #[must_use]
    pub fn bound(&self) -> f32 {
        FACTOR * self.rounding
    }

    /// Whether rounding explains everything: every logit within the bound, and the two best logits
    /// within twice the bound wherever tokens differ.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        let bound = self.bound();
        let near = |it: &Difference| it.cpu_gap <= 2.0 * bound && it.cuda_gap <= 2.0 * bound;
        self.largest_difference <= bound && self.differences.iter().all(near)
    }

    /// Compares a row's logits: on the CPU, on the CPU with K and V in f32, and on the device with the
    /// token that it sampled.
    fn compare(&mut self, (prompt, position): (usize, usize), row: &Row<'_>) {
        let Row { cpu, exact, cuda, sampled } = *row;
        self.rows += 1;
        self.largest_difference = self.largest_difference.max(distance(cpu, cuda));
        self.rounding = self.rounding.max(distance(cpu, exact));
        let (best, sampled) = (argmax(cpu), sampled as usize);
        self.largest_logit = self.largest_logit.max(cpu[best].abs());
        if best != sampled {
            self.differences.push(Difference {
                prompt,
                position,
                tokens: [best as u32, sampled as u32],
                cpu_gap: cpu[best] - cpu[sampled],
                cuda_gap: cuda[sampled] - cuda[best],
            });
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, rows, generated, largest_difference, rounding, differences, .. } = self;
        let (equal, bound) = (rows - differences.len(), self.bound());
        write!(
            f,
            "{cache:<5} {equal} of {rows} tokens equal ({generated} generated); logits up to {:.2} differ by \
             {largest_difference:.2e}, bound {bound:.2e} ({FACTOR} x {rounding:.2e})",
            self.largest_logit,
        )?;
        write!(f, "; {} of {} blocks lean", self.lean_blocks, self.full_blocks + self.lean_blocks)?;
        if let Some(ratio) = self.whole_kv_ratio {
            write!(f, ", whole-KV ratio {ratio:.3}")?;
        }
        for it in differences {
            let [cpu, cuda] = it.tokens;
            write!(
                f,
                "\n      prompt {} position {}: {cpu} on the CPU, above {cuda} by {:.2e}; {cuda} on the \
                 device, above by {:.2e}",
                it.prompt, it.position, it.cpu_gap, it.cuda_gap
            )?;
        }
        if !self.is_explained() {
            write!(f, "\n      NOT EXPLAINED by rounding")?;
        }
        Ok(())
    }
}

/// What was compared.
#[derive(Clone, Debug, Serialize)]
pub struct TokensReport {
    /// The device.
    pub device: String,
    /// The model.
    pub model: String,
    /// Storage type of K and V.
    pub dtype: Dtype,
    /// The lean cache's mask.
    pub mask: String,
    /// The lean cache's windows.
    pub windows: Windows,
    /// Dense, then lean.
    pub caches: Vec<Comparison>,
}

impl TokensReport {
    /// Whether rounding explains every difference.
    #[must_use]
    pub fn is_explained(&self) -> bool {
        self.caches.iter().all(Comparison::is_explained)
    }
}

impl fmt::Display for TokensReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Windows { sink, recent } = self.windows;
        writeln!(f, "{}", self.device)?;
        writeln!(
            f,
            "{}, f32 weights; K and V {}, mask {}, sink {sink}, recent {recent}",
            self.model, self.dtype, self.mask
        )?;
        self.caches.iter().try_for_each(|cache| writeln!(f, "{cache}"))
    }
}

/// Logits of one row.
struct Row<'a> {
    cpu: &'a [f32],
    /// With K and V in f32.
    exact: &'a [f32],
    cuda: &'a [f32],
    sampled: u32,
}

/// The largest difference; infinite where one is not a number.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |largest, (a, b)| {
        let difference = (a - b).abs();
        if difference.is_nan() { f32::INFINITY } else { f32::max(largest, difference) }
    })
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = i;
        }
    }
    best
}

/// New tokens of one sequence in a step.
struct Piece<'a> {
    sequence: usize,
    tokens: &'a [u32],
}

/// The rows of a step: entries of a cache's sequences, tokens, positions.
fn rows<C: leank_core::Cache>(
    pieces: &[Piece<'_>],
    cache: &C,
    ids: &[SequenceId],
) -> Result<(Vec<StepEntry>, Vec<u32>, Vec<usize>)> {
    let (mut entries, mut tokens, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for piece in pieces {
        let id = ids[piece.sequence];
        let start = cache.sequence_len(id)?;
        entries.push(StepEntry::decode(id, piece.tokens.len()));
        tokens.extend(piece.tokens);
        positions.extend(start..start + piece.tokens.len());
    }
    Ok((entries, tokens, positions))
}

/// A model on the CPU with a cache.
struct OnCpu<'a> {
    model: &'a Model,
    cache: CpuCache,
    ids: Vec<SequenceId>,
}

impl<'a> OnCpu<'a> {
    fn new(model: &'a Model, config: CacheConfig, sequences: usize) -> Result<Self> {
        let mut cache = Cpu::new().create(config)?;
        let ids = (0..sequences).map(|_| cache.add_sequence()).collect();
        Ok(Self { model, cache, ids })
    }

    /// Logits of a step, row after row.
    fn step(&mut self, pieces: &[Piece<'_>]) -> Result<Vec<f32>> {
        let (entries, tokens, positions) = rows(pieces, &self.cache, &self.ids)?;
        self.cache.plan(&entries)?;
        let mut attention = LeanAttention::new(&mut self.cache);
        let hidden = self.model.hidden(&tokens, &positions, &mut attention)?;
        self.cache.commit()?;
        let logits = self.model.logits(&hidden)?;
        Ok(logits
            .flatten_all()
            .and_then(|logits| logits.to_vec1())
            .map_err(leank_candle::Error::from)?)
    }
}

/// The model on the device with a cache.
struct OnDevice<'a> {
    decoder: &'a Decoder<f32>,
    activations: Activations<f32>,
    cache: CudaCache,
    ids: Vec<SequenceId>,
}

impl<'a> OnDevice<'a> {
    fn new(
        cuda: &Cuda,
        decoder: &'a Decoder<f32>,
        config: CacheConfig,
        sequences: usize,
    ) -> Result<Self> {
        let mut cache = cuda.create(config)?;
        let ids = (0..sequences).map(|_| cache.add_sequence()).collect();
        let activations = decoder.activations(CHUNK.max(sequences))?;
        Ok(Self { decoder, activations, cache, ids })
    }

    /// Logits of a step, row after row, and the tokens that were sampled.
    fn step(&mut self, pieces: &[Piece<'_>]) -> Result<(Vec<f32>, Vec<u32>)> {
        let (entries, tokens, positions) = rows(pieces, &self.cache, &self.ids)?;
        let positions: Vec<u32> = positions.into_iter().map(|position| position as u32).collect();
        self.decoder.set_rows(&mut self.activations, &tokens, &positions)?;
        self.cache.plan(&entries)?;
        self.decoder.forward(&mut self.activations, &mut self.cache, true)?;
        self.cache.commit()?;
        self.decoder.results(&self.activations)
    }
}

/// Both sides of a comparison.
struct Sides<'a> {
    cpu: OnCpu<'a>,
    exact: OnCpu<'a>,
    device: OnDevice<'a>,
    comparison: Comparison,
}

impl Sides<'_> {
    /// A step on all sides; the CPU's best token of each row.
    fn step(&mut self, pieces: &[Piece<'_>]) -> Result<Vec<u32>> {
        let (_, _, positions) = rows(pieces, &self.cpu.cache, &self.cpu.ids)?;
        let cpu = self.cpu.step(pieces)?;
        let exact = self.exact.step(pieces)?;
        let (cuda, sampled) = self.device.step(pieces)?;
        let vocab = self.cpu.model.config().vocab;
        let prompts = pieces.iter().flat_map(|piece| piece.tokens.iter().map(|_| piece.sequence));
        let places = prompts.zip(positions);
        let chunks = cpu.chunks(vocab).zip(exact.chunks(vocab)).zip(cuda.chunks(vocab));
        let mut best = Vec::new();
        for ((place, ((cpu, exact), cuda)), sampled) in places.zip(chunks).zip(sampled) {
            let own = argmax(cuda);
            if cuda[own] != cuda[sampled as usize] {
                let why =
                    format!("the device sampled token {sampled}, its largest logit is {own}'s");
                return Err(Error::Device(why));
            }
            self.comparison.compare(place, &Row { cpu, exact, cuda, sampled });
            best.push(argmax(cpu) as u32);
        }
        Ok(best)
    }
}

/// Fails where a lean cache of sequences of up to `longest` tokens has no lean block in the last step:
/// then it is a dense one, and comparing it says nothing about pruning.
fn check_lean(config: &CacheConfig, longest: usize) -> Result<()> {
    let before = longest.saturating_sub(1);
    if BlockCount::at(before, config.block, config.windows).lean > 0 {
        return Ok(());
    }
    let Windows { sink, recent } = config.windows;
    let expected = format!(
        "one so long that a block of {} tokens between sink {sink} and recent {recent} becomes lean; \
         generate more tokens, or take smaller windows",
        config.block
    );
    Err(Error::option("longest sequence", expected, format!("{longest} tokens")))
}

/// The tokens of the prompts, and those of the longest sequence when all is generated.
fn encode(model: &Model, options: &TokensOptions) -> Result<(Vec<Vec<u32>>, usize)> {
    let encode = |text: &String| match model.tokenizer().encode(text) {
        Ok(tokens) if tokens.is_empty() => {
            Err(Error::option("prompt", "at least one token", format!("{text:?}")))
        }
        encoded => Ok(encoded?),
    };
    let prompts = options.prompts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let most = model.config().context_length;
    if options.tokens > most.saturating_sub(longest) {
        let expected = format!("at most {most} with the longest prompt's {longest}");
        return Err(Error::option("tokens to generate", expected, options.tokens));
    }
    Ok((prompts, longest + options.tokens))
}

/// Runs the model on both sides; `progress` gets each cache's comparison as it is done.
///
/// # Errors
/// [`Error::Option`] without a prompt, for one without tokens, for more tokens than the model has
/// positions for, and for so few that no block of the lean cache becomes lean; those of the model, the
/// mask, the caches and the device.
pub fn compare(
    cuda: &Cuda,
    options: &TokensOptions,
    mut progress: impl FnMut(&Comparison),
) -> Result<TokensReport> {
    check_dtype(options.dtype)?;
    if options.prompts.is_empty() {
        return Err(Error::option("prompts", "at least one", "none"));
    }
    let model = Model::load(&options.model, LoadOptions::default())?;
    let (prompts, longest) = encode(&model, options)?;
    let shape = model.config().shape;
    let lean = options.mask.config(shape, options.windows, options.dtype)?;
    if let MaskChoice::File(_) = options.mask {
        lean.mask.check_model(model.fingerprint())?;
    }
    check_lean(&lean, longest)?;

    let config = DecoderConfig::of_model(model.config(), longest);
    let tied = model.config().tied_embeddings;
    let mut source = |part| match part {
        Part::Output if tied => Ok(None),
        part => Ok(model.weight(part)?),
    };
    let decoder = Decoder::load(cuda, config, &mut source)?;

    let windows = lean.windows;
    let mut caches = Vec::new();
    for (name, config) in [("dense", dense(shape, options.dtype)?), ("lean", lean)] {
        let exact = CacheConfig { dtype: Dtype::F32, ..config.clone() };
        let comparison = Comparison {
            cache: name,
            rows: 0,
            generated: 0,
            full_blocks: 0,
            lean_blocks: 0,
            whole_kv_ratio: None,
            largest_difference: 0.0,
            rounding: 0.0,
            largest_logit: 0.0,
            differences: Vec::new(),
            texts: Vec::new(),
        };
        let mut sides = Sides {
            cpu: OnCpu::new(&model, config.clone(), prompts.len())?,
            exact: OnCpu::new(&model, exact, prompts.len())?,
            device: OnDevice::new(cuda, &decoder, config, prompts.len())?,
            comparison,
        };
        let generated = generate(&mut sides, &prompts, options.tokens)?;
        let mut comparison = sides.comparison;
        comparison.generated = generated.iter().map(Vec::len).sum();
        let memory = sides.device.cache.memory();
        BlockCount { full: comparison.full_blocks, lean: comparison.lean_blocks } = memory.blocks;
        comparison.whole_kv_ratio = memory.whole_kv_ratio();
        let decode = |tokens: &Vec<u32>| model.tokenizer().decode(tokens);
        comparison.texts = generated.iter().map(decode).collect::<Result<_, _>>()?;
        progress(&comparison);
        caches.push(comparison);
    }
    Ok(TokensReport {
        device: cuda.device().to_string(),
        model: model.config().name.clone(),
        dtype: options.dtype,
        mask: options.mask.to_string(),
        windows,
        caches,
    })
}

/// Feeds the prompts one after the other and continues all of them in one batch with the CPU's
/// tokens, which are returned; they were fed, too.
fn generate(sides: &mut Sides<'_>, prompts: &[Vec<u32>], tokens: usize) -> Result<Vec<Vec<u32>>> {
    let mut next = Vec::new();
    for (sequence, prompt) in prompts.iter().enumerate() {
        let mut best = None;
        for tokens in prompt.chunks(CHUNK) {
            best = sides.step(&[Piece { sequence, tokens }])?.pop();
        }
        next.extend(best);
    }
    let mut generated = vec![Vec::new(); prompts.len()];
    for _ in 0..tokens {
        for (generated, token) in generated.iter_mut().zip(&next) {
            generated.push(*token);
        }
        let pieces: Vec<Piece<'_>> = next
            .iter()
            .enumerate()
            .map(|(sequence, token)| Piece { sequence, tokens: std::slice::from_ref(token) })
            .collect();
        next = sides.step(&pieces)?;
    }
    Ok(generated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison() -> Comparison {
        Comparison {
            cache: "dense",
            rows: 0,
            generated: 0,
            full_blocks: 2,
            lean_blocks: 0,
            whole_kv_ratio: Some(1.0),
            largest_difference: 0.0,
            rounding: 0.0,
            largest_logit: 0.0,
            differences: Vec::new(),
            texts: Vec::new(),
        }
    }

    #[test]
    fn equal_tokens_within_rounding_are_explained() {
        let mut it = comparison();
        let cpu = [1.0, 3.0, -2.0];
        let row =
            Row { cpu: &cpu, exact: &[1.01, 3.0, -2.0], cuda: &[1.0, 3.03, -2.0], sampled: 1 };
        it.compare((0, 5), &row);
        assert!((it.rounding - 0.01).abs() < 1e-6 && (it.largest_difference - 0.03).abs() < 1e-6);
        assert_eq!((it.rows, it.largest_logit), (1, 3.0));
        assert!(it.differences.is_empty() && it.is_explained(), "{it}");
    }

    #[test]
    fn a_token_that_differs_by_rounding_is_shown() {
        let mut it = comparison();
        let cpu = [2.0, 2.01, 0.0];
        let row =
            Row { cpu: &cpu, exact: &[2.01, 2.01, 0.0], cuda: &[2.015, 2.01, 0.0], sampled: 0 };
        it.compare((2, 7), &row);
        assert_eq!((it.differences[0].prompt, it.differences[0].position), (2, 7));
        assert_eq!(it.differences[0].tokens, [1, 0]);
        assert!(it.is_explained());
        let text = it.to_string();
        assert!(text.contains("prompt 2 position 7: 1 on the CPU, above 0 by 1.00e-2"), "{text}");
        assert!(!text.contains("NOT"), "{text}");
    }

    #[test]
    fn what_rounding_does_not_explain_is_told() {
        // Logits are off although tokens agree; NaN; another token by far.
        for (cuda, sampled) in
            [([2.0, 3.05, 0.0], 1), ([f32::NAN, 3.0, 0.0], 1), ([3.5, 3.0, 0.0], 0)]
        {
            let mut it = comparison();
            let row = Row { cpu: &[2.0, 3.0, 0.0], exact: &[2.01, 3.0, 0.0], cuda: &cuda, sampled };
            it.compare((0, 0), &row);
            assert!(!it.is_explained(), "{cuda:?}");
            assert!(it.to_string().contains("NOT EXPLAINED"), "{it}");
        }
    }

    #[test]
    fn a_lean_cache_without_lean_blocks_is_refused() {
        let shape = leank_core::ModelShape::new(1, 2, 1, 64).unwrap();
        let windows = Windows { sink: 32, recent: 32 };
        let config = CacheConfig { windows, block: 64, ..dense(shape, Dtype::F16).unwrap() };
        // Two blocks before the recent window, of which the first holds the sinks; then one step.
        assert!(check_lean(&config, 2 * 64 + 32).is_ok());
        let error = check_lean(&config, 2 * 64 + 31).unwrap_err().to_string();
        assert!(error.contains("sink 32 and recent 32") && error.contains("159"), "{error}");
        assert!(check_lean(&dense(shape, Dtype::F16).unwrap(), 1 << 20).is_err());
    }

    #[test]
    fn the_best_is_the_first_of_the_largest() {
        assert_eq!(argmax(&[1.0, 5.0, 5.0]), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -3.0]), 1);
    }
}
