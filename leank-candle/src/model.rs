//! The forward pass of all families, with the attention left to the caller.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use leank_core::Fingerprint;
use leank_cpu::{Executor, Rayon};

use crate::config::{Family, ModelConfig, RopeScaling};
use crate::executor::Threads;
use crate::linear::Linear;
use crate::ops::{GatedLinearUnit, RmsNorm, Rope};
use crate::rope::RopeTable;
use crate::tokenizer::Tokenizer;
use crate::weights::{LayerWeights, Part, Precision, Weights};
use crate::{Error, Result, gguf, safetensors};

/// What a model's layers call for attention: dense, lean, or a probe.
///
/// A forward pass calls it once per layer, in the order of the layers.
pub trait Attention {
    /// Takes in the new tokens' keys and values and attends with their queries.
    ///
    /// `q` is `[tokens, query_heads, head_dim]`, `k` and `v` are `[tokens, kv_heads, head_dim]`, all
    /// f32, contiguous, on the CPU; q and k after RoPE, channels in Hugging Face's order. The scale is
    /// 1/√head_dim in every model: where the model has another, q carries the rest. The result is
    /// the attention output before the output projection, shaped as `q`.
    ///
    /// A layer with a window ([`ModelConfig::window`]) attends to that many tokens only.
    ///
    /// # Errors
    /// Whatever keeps the implementation from attending; the forward pass ends with it.
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor>;
}

/// How to load a model.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// How weights are held; f32 unless said otherwise.
    pub precision: Precision,
}

impl LoadOptions {
    /// Options with this precision.
    #[must_use]
    pub fn with_precision(precision: Precision) -> Self {
        Self { precision }
    }
}

/// A model on the CPU.
pub struct Model {
    config: ModelConfig,
    tokenizer: Tokenizer,
    weights: Weights,
    fingerprint: Fingerprint,
    precision: Precision,
    /// Grow to the farthest position asked for.
    rope: Mutex<RopeTables>,
}

/// Tables of the global layers, and of the sliding ones where they have a base of their own.
#[derive(Clone)]
struct RopeTables {
    global: Arc<RopeTable>,
    local: Arc<RopeTable>,
}

impl RopeTables {
    fn new(config: &ModelConfig, positions: usize) -> Self {
        let (dim, scaling) = (config.shape.head_dim, &config.rope_scaling);
        let global = Arc::new(RopeTable::new(dim, config.rope_base, scaling, positions));
        let local = match config.sliding.as_ref().and_then(|sliding| sliding.rope_base) {
            Some(base) => Arc::new(RopeTable::new(dim, base, &RopeScaling::None, positions)),
            None => global.clone(),
        };
        Self { global, local }
    }
}

/// The rotations of a batch in global and in sliding layers.
struct Rotations {
    global: Rope,
    local: Rope,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("config", &self.config)
            .field("precision", &self.precision)
            .finish_non_exhaustive()
    }
}

/// What a file format yields.
pub(crate) struct Loaded {
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) weights: Weights,
}

impl Model {
    /// Loads a GGUF file, or a folder with `config.json`, `tokenizer.json` and safetensors.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotGguf`], [`Error::Damaged`], [`Error::MissingTensor`],
    /// [`Error::TensorShape`], [`Error::Config`], [`Error::Unsupported`] or [`Error::Model`],
    /// each naming the file and what is wrong with it. Nothing is allocated by the word of a header
    /// that the file's length does not bear out.
    pub fn load(path: &Path, options: LoadOptions) -> Result<Self> {
        let loaded = if path.is_dir() {
            safetensors::load(path)
        } else {
            gguf::load(path, options.precision)
        };
        let Loaded { config, tokenizer, weights } = loaded.map_err(|error| error.in_model(path))?;
        let fingerprint = crate::fingerprint::of(&config, &weights);
        let rope = Mutex::new(RopeTables::new(&config, 0));
        Ok(Self { config, tokenizer, weights, fingerprint, precision: options.precision, rope })
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// What tells this model from others; the same for a model in GGUF and in safetensors, and for
    /// all quantizations of it.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// How the weights are held.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where attention runs best between this model's products: on the threads that these run on.
    /// Others would compete with them for the cores, in every layer of every step.
    #[must_use]
    pub fn executor(&self) -> Arc<dyn Executor> {
        match self.precision {
            Precision::F32 => Arc::new(Rayon),
            Precision::AsStored => Arc::new(Threads),
        }
    }

    /// Runs tokens through all layers and the final norm: `[tokens, hidden]` f32.
    ///
    /// `tokens` and their absolute `positions` are those of all sequences of a batch, one after the
    /// other; only `attention` needs to know where one ends.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the lengths differ or no token is given, [`Error::Token`],
    /// [`Error::Context`], or what `attention` returns.
    pub fn hidden(
        &self,
        tokens: &[u32],
        positions: &[usize],
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let rope = self.rope_for(tokens, positions)?;
        let mut x = self.weights.embedding.rows(tokens)?;
        if self.config.family == Family::Gemma3 {
            x = (x * (self.config.hidden as f64).sqrt())?;
        }
        for (index, layer) in self.weights.layers.iter().enumerate() {
            x = self.attention_block(&x, (index, layer), &rope, attention)?;
            x = self.mlp_block(&x, layer)?;
        }
        Ok(x.apply_op1(self.weights.norm.clone())?)
    }

    /// Logits `[n, vocab]` f32 of final hidden states `[n, hidden]`.
    ///
    /// # Errors
    /// [`Error::Candle`] when the width is not the model's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.weights.output.forward(&hidden.contiguous()?)
    }

    /// Bytes of weights that a step of one token reads, logits included: every matrix once, and of the
    /// embedding nothing worth counting.
    #[must_use]
    pub fn step_bytes(&self) -> u64 {
        self.weights.product_bytes()
    }

    /// A part of the weights, row after row, widened to f32, for a forward pass of your own; `None`
    /// where the model has no such part.
    ///
    /// # Errors
    /// [`Error::Candle`] when a quantized matrix cannot be widened.
    pub fn weight(&self, part: Part) -> Result<Option<Vec<f32>>> {
        self.weights.values(part)
    }

    /// The output layer, for gradients of logits.
    pub(crate) fn output(&self) -> &Linear {
        &self.weights.output
    }

    fn attention_block(
        &self,
        x: &Tensor,
        (index, layer): (usize, &LayerWeights),
        rope: &Rotations,
        attention: &mut dyn Attention,
    ) -> Result<Tensor> {
        let shape = self.config.shape;
        let tokens = x.dim(0)?;
        let normed = x.apply_op1(layer.attention_norm.clone())?;
        let rope = if self.config.window(index).is_some() { &rope.local } else { &rope.global };
        let rotated = |x: Tensor, norm: Option<&RmsNorm>| -> Result<Tensor> {
            Ok(normed_heads(x, norm)?.apply_op1(rope.clone())?)
        };
        let q = rotated(layer.query.forward(&normed)?, layer.query_norm.as_ref())?;
        let k = rotated(layer.key.forward(&normed)?, layer.key_norm.as_ref())?;
        let v = layer.value.forward(&normed)?;
        let v = v.reshape((tokens, shape.kv_heads, shape.head_dim))?;
        let out = attention.attend(index, &q, &k, &v)?;
        if out.dims() != q.dims() {
            let (expected, found) = (format!("{:?}", q.dims()), format!("{:?}", out.dims()));
            return Err(Error::mismatch("output of the attention", expected, found));
        }
        let out = out.reshape((tokens, self.config.query_width()))?;
        add(x, layer.output.forward(&out)?, layer.post_attention_norm.as_ref())
    }

    fn mlp_block(&self, x: &Tensor, layer: &LayerWeights) -> Result<Tensor> {
        let normed = x.apply_op1(layer.mlp_norm.clone())?;
        let gate = layer.gate.forward(&normed)?;
        let up = layer.up.forward(&normed)?;
        let unit = match self.config.family {
            Family::Gemma3 => GatedLinearUnit::Gelu,
            _ => GatedLinearUnit::Silu,
        };
        let inner = gate.apply_op2(&up, unit)?;
        add(x, layer.down.forward(&inner)?, layer.post_mlp_norm.as_ref())
    }

    /// Checks a batch and makes its rotation.
    fn rope_for(&self, tokens: &[u32], positions: &[usize]) -> Result<Rotations> {
        if tokens.is_empty() || tokens.len() != positions.len() {
            let expected = "at least one token, and as many positions";
            let found = format!("{} tokens, {} positions", tokens.len(), positions.len());
            return Err(Error::mismatch("forward pass", expected, found));
        }
        let vocab = self.config.vocab;
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        let needed = positions.iter().max().map_or(0, |&last| last.saturating_add(1));
        let limit = self.config.context_length;
        if needed > limit {
            return Err(Error::Context { what: "the last position", needed, limit });
        }
        let mut tables = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.global.positions() < needed {
            // Doubling, so that decoding token by token rebuilds the table a few times only.
            let room = needed.next_power_of_two().max(1024).min(limit);
            *tables = RopeTables::new(&self.config, room);
        }
        let RopeTables { global, local } = tables.clone();
        let positions: Arc<[usize]> = positions.into();
        let local = Rope { table: local, positions: positions.clone() };
        Ok(Rotations { global: Rope { table: global, positions }, local })
    }
}

/// Every head of `[tokens, heads * head_dim]` through its norm, where there is one.
fn normed_heads(x: Tensor, norm: Option<&RmsNorm>) -> Result<Tensor> {
    let Some(norm) = norm else { return Ok(x) };
    let (tokens, width) = x.dims2()?;
    let heads = x.reshape(((), norm.weight.len()))?.apply_op1(norm.clone())?;
    Ok(heads.reshape((tokens, width))?)
}

/// The residual stream with a block's output, which passes a norm first where there is one.
fn add(x: &Tensor, out: Tensor, norm: Option<&RmsNorm>) -> Result<Tensor> {
    let out = match norm {
        Some(norm) => out.apply_op1(norm.clone())?,
        None => out,
    };
    Ok((x + out)?)
}
