//! A real model's greedy tokens on a CUDA device beside those on the CPU, with the same cache
//! configuration on both: dense, then lean.
//!
//! Both sides get the CPU's tokens, so every step is compared, whatever happened before. What may
//! differ is rounding: the CPU multiplies f32 queries and weights of the softmax with K and V as they
//! are stored; tensor cores want those rounded to the storage type too. How much such a rounding does
//! to logits is measured on the CPU, which runs once more with K and V in f32: the largest difference
//! that this makes is [`Comparison::rounding`]. Logits of the device may be [`FACTOR`] times as far
//! from the CPU's, and a token may differ where the two best logits are nearer than twice that.

mod report;

use std::path::PathBuf;

use leank_candle::{Family, LeanAttention, LoadOptions, Model, Part};
use leank_core::{
    Backend as _, BlockCount, Cache as _, CacheConfig, Dtype, SequenceId, StepEntry, Windows,
};
use leank_cpu::{Cpu, CpuCache};
use leank_cuda::{Cuda, CudaCache};
pub use report::{Comparison, Difference, FACTOR, TokensReport};
use report::{Row, argmax};

use super::{MaskChoice, check_dtype, dense};
use crate::{
    Error, Result,
    decoder::{Activations, Decoder, DecoderConfig},
    setting::DeviceFormats,
};

/// Tokens of a prompt per step.
const CHUNK: usize = 64;

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
    /// Formats of lean blocks other than the mask's, for all heads.
    pub formats: Option<DeviceFormats>,
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
    let family = model.config().family;
    if !matches!(family, Family::Llama | Family::Qwen2) {
        return Err(Error::option("model", "one of the families llama and qwen2", family.name()));
    }
    let (prompts, longest) = encode(&model, options)?;
    let shape = model.config().shape;
    let lean = options.mask.config(shape, options.windows, options.formats, options.dtype)?;
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
        let mut sides = Sides {
            cpu: OnCpu::new(&model, config.clone(), prompts.len())?,
            exact: OnCpu::new(&model, exact, prompts.len())?,
            device: OnDevice::new(cuda, &decoder, config, prompts.len())?,
            comparison: Comparison::new(name),
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
    use leank_core::ModelShape;

    use super::*;

    #[test]
    fn a_lean_cache_without_lean_blocks_is_refused() {
        let shape = ModelShape::new(1, 2, 1, 64).unwrap();
        let windows = Windows { sink: 32, recent: 32 };
        let config = CacheConfig { windows, block: 64, ..dense(shape, Dtype::F16).unwrap() };
        // Two blocks before the recent window, of which the first holds the sinks; then one step.
        assert!(check_lean(&config, 2 * 64 + 32).is_ok());
        let error = check_lean(&config, 2 * 64 + 31).unwrap_err().to_string();
        assert!(error.contains("sink 32 and recent 32") && error.contains("159"), "{error}");
        assert!(check_lean(&dense(shape, Dtype::F16).unwrap(), 1 << 20).is_err());
    }
}
