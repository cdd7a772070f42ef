//! A decoder of the Llama family on a CUDA device, with a [`CudaCache`] for its attention.
//!
//! [`Decoder`] holds weights and kernels, [`Activations`] what a step writes, and
//! [`Decoder::forward`] is a step: it only gives work to the cache's stream, so it can be captured into
//! a CUDA graph, and the token that a row samples is the next step's input without passing through the
//! host. Products are cuBLAS's (`gemm`), what lies between them is in `kernels.cu`. The hidden state is
//! f32; the products that end in it add to it, so a residual takes no kernel.
//!
//! One decoder serves two purposes: bf16 weights to measure speed, f32 weights to be compared with a
//! CPU's.

mod gemm;
mod kernels;
mod weights;

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr as _};
use half::bf16;
use leank_candle::{ModelConfig, RopeScaling, RopeTable};
use leank_core::{Cache as _, Error as CoreError, Layer, ModelShape, ViewShape};
use leank_cuda::{Cuda, CudaCache, DeviceView, DeviceViewMut};

pub use kernels::{Number, compile};
pub use weights::Source;

use crate::{
    Error, Result,
    cuda::{driver, give_up_events},
};
use gemm::{Gemm, Product, Tuned};
use kernels::{Kernels, Rotation};
use weights::{LayerWeights, Weights};

/// Most rows of a step: what the second axis of a kernel's grid takes.
pub const MOST_ROWS: usize = (1 << 16) - 1;

/// Most of what kernels count within a row, or positions: sums of some of them stay within 32 bits.
const MOST: usize = 1 << 30;

/// The numbers of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Layers, heads and `head_dim`.
    pub shape: ModelShape,
    /// Width of the hidden state, a multiple of 4.
    pub hidden: usize,
    /// Width of the MLP, a multiple of 4.
    pub intermediate: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Added to the mean square in RMS norms.
    pub epsilon: f32,
    /// RoPE base.
    pub rope_base: f64,
    /// RoPE scaling.
    pub rope_scaling: RopeScaling,
    /// Positions that RoPE is there for.
    pub positions: usize,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
}

impl DecoderConfig {
    /// Llama-3.1-8B with so many of its 32 layers.
    ///
    /// # Errors
    /// As [`ModelShape::new`].
    pub fn llama_8b(layers: usize, positions: usize) -> Result<Self> {
        Ok(Self {
            shape: ModelShape::new(layers, 32, 8, 128)?,
            hidden: 4096,
            intermediate: 14336,
            vocab: 128_256,
            epsilon: 1e-5,
            rope_base: 500_000.0,
            rope_scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low: 1.0,
                high: 4.0,
                original: 8192.0,
            },
            positions,
            qkv_bias: false,
        })
    }

    /// That of a model on the CPU, for so many positions.
    #[must_use]
    pub fn of_model(model: &ModelConfig, positions: usize) -> Self {
        Self {
            shape: model.shape,
            hidden: model.hidden,
            intermediate: model.intermediate,
            vocab: model.vocab,
            epsilon: model.rms_eps as f32,
            rope_base: model.rope_base,
            rope_scaling: model.rope_scaling.clone(),
            positions,
            qkv_bias: model.qkv_bias,
        }
    }

    /// Channels of all query heads.
    fn query_width(&self) -> usize {
        self.shape.query_heads * self.shape.head_dim
    }

    /// Channels of all KV heads.
    fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Channels of q, k and v side by side.
    fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }

    /// Fails for numbers that kernels cannot count.
    pub(crate) fn validate(&self) -> Result<()> {
        self.shape.validate()?;
        for (what, size, unit) in [
            ("hidden size", self.hidden, 4),
            ("intermediate size", self.intermediate, 4),
            ("vocabulary", self.vocab, 1),
            ("positions", self.positions, 1),
            ("channels of q, k and v", self.qkv_width(), 1),
            ("head_dim", self.shape.head_dim, 2),
        ] {
            if size == 0 || size > MOST || !size.is_multiple_of(unit) {
                return Err(Error::option(what, format!("1..=2^30, a multiple of {unit}"), size));
            }
        }
        Ok(())
    }

    /// Bytes of device memory that the decoder takes with weights of `element` bytes and a head that is
    /// not its embedding: weights, the RoPE table, and what cuBLAS works in.
    #[must_use]
    pub fn decoder_bytes(&self, element: usize) -> u64 {
        let rope = 4 * self.positions * self.shape.head_dim;
        weights::bytes(self, element) + (rope + gemm::WORKSPACE) as u64
    }

    /// Bytes of device memory of the [`Activations`] of `rows` rows.
    #[must_use]
    pub fn activation_bytes(&self, rows: usize, element: usize) -> u64 {
        let Self { hidden, intermediate, vocab, .. } = *self;
        let numbers = hidden + self.qkv_width() + self.query_width() + 3 * intermediate;
        let words = hidden + vocab + 2;
        (rows * (numbers * element + words * 4)) as u64
    }
}

/// The device address of a slice. Nothing waits for anything: all work is on one stream.
fn address<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// What a step writes, for up to so many rows: the new tokens of its sequences.
pub struct Activations<T> {
    /// The very value of the decoder that they were made by.
    config: Arc<DecoderConfig>,
    rows: usize,
    capacity: usize,
    tokens: CudaSlice<u32>,
    positions: CudaSlice<u32>,
    /// The hidden state.
    x: CudaSlice<f32>,
    normed: CudaSlice<T>,
    /// `[rows, query heads, then KV heads of k, then of v, head_dim]`
    qkv: CudaSlice<T>,
    attended: CudaSlice<T>,
    gate_up: CudaSlice<T>,
    inner: CudaSlice<T>,
    logits: CudaSlice<f32>,
}

/// A decoder on a CUDA device with weights of type `T`: f32 or bf16.
pub struct Decoder<T> {
    config: Arc<DecoderConfig>,
    stream: Arc<CudaStream>,
    weights: Weights<T>,
    cosines: CudaSlice<f32>,
    sines: CudaSlice<f32>,
    kernels: Kernels,
    gemm: Gemm,
}

impl Decoder<bf16> {
    /// A decoder with random weights, scaled so that activations stay finite.
    ///
    /// # Errors
    /// [`Error::Option`] for numbers that kernels cannot count, [`CoreError::Unavailable`] without
    /// cuBLAS, [`Error::Device`].
    pub fn random(cuda: &Cuda, config: DecoderConfig, seed: u64) -> Result<Self> {
        Self::new(cuda, config, |stream, config| Weights::random(stream, config, seed))
    }
}

impl<T: Number> Decoder<T> {
    /// A decoder with the weights that `source` gives.
    ///
    /// # Errors
    /// [`Error::Option`] for numbers that kernels cannot count, [`CoreError::Unavailable`] without
    /// cuBLAS, [`Error::Device`]; what `source` returns, and [`Error::Option`] for a part of another
    /// size.
    pub fn load(cuda: &Cuda, config: DecoderConfig, source: Source<'_>) -> Result<Self> {
        Self::new(cuda, config, |stream, config| Weights::load(stream, config, source))
    }

    fn new(
        cuda: &Cuda,
        config: DecoderConfig,
        weights: impl FnOnce(&Arc<CudaStream>, &DecoderConfig) -> Result<Weights<T>>,
    ) -> Result<Self> {
        config.validate()?;
        let stream = Arc::clone(cuda.stream());
        give_up_events(&stream);
        let gemm = Gemm::new(&stream)?;
        let kernels = Kernels::new::<T>(&stream)?;
        let (base, scaling) = (config.rope_base, &config.rope_scaling);
        let table = RopeTable::new(config.shape.head_dim, base, scaling, config.positions);
        let cosines = stream.clone_htod(table.cosines()).map_err(driver)?;
        let sines = stream.clone_htod(table.sines()).map_err(driver)?;
        let weights = weights(&stream, &config)?;
        let config = Arc::new(config);
        Ok(Self { config, stream, weights, cosines, sines, kernels, gemm })
    }

    /// Its numbers.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Room for steps of up to `capacity` rows.
    ///
    /// # Errors
    /// [`Error::Option`] for none or more than [`MOST_ROWS`], [`Error::Device`].
    pub fn activations(&self, capacity: usize) -> Result<Activations<T>> {
        if !(1..=MOST_ROWS).contains(&capacity) {
            return Err(Error::option("rows of a step", format!("1..={MOST_ROWS}"), capacity));
        }
        let config = &self.config;
        let numbers = |width: usize| self.stream.alloc_zeros::<T>(capacity * width).map_err(driver);
        let floats = |width: usize| self.stream.alloc_zeros(capacity * width).map_err(driver);
        let words = || self.stream.alloc_zeros(capacity).map_err(driver);
        Ok(Activations {
            config: Arc::clone(config),
            rows: 0,
            capacity,
            tokens: words()?,
            positions: words()?,
            x: floats(config.hidden)?,
            normed: numbers(config.hidden)?,
            qkv: numbers(config.qkv_width())?,
            attended: numbers(config.query_width())?,
            gate_up: numbers(2 * config.intermediate)?,
            inner: numbers(config.intermediate)?,
            logits: floats(config.vocab)?,
        })
    }

    /// Fails for activations of another decoder, whose buffers and rows fit that one alone.
    fn check_own(&self, activations: &Activations<T>) -> Result<()> {
        if Arc::ptr_eq(&self.config, &activations.config) {
            return Ok(());
        }
        Err(Error::option("activations", "those that this decoder made", "another decoder's"))
    }

    /// Sets the rows of the next step: tokens and their positions. Without it, each row of the next
    /// step is the one that follows in the same sequence, with the token that was sampled; behind the
    /// last position that RoPE is there for, that one is used again.
    ///
    /// # Errors
    /// [`Error::Option`] for more rows than there is room for, a token that the model does not have, a
    /// position that RoPE is not there for, or activations of another decoder; [`Error::Device`].
    pub fn set_rows(
        &self,
        activations: &mut Activations<T>,
        tokens: &[u32],
        positions: &[u32],
    ) -> Result<()> {
        self.check_own(activations)?;
        let Activations { capacity, .. } = *activations;
        if tokens.is_empty() || tokens.len() > capacity || tokens.len() != positions.len() {
            let found = format!("{} tokens, {} positions", tokens.len(), positions.len());
            return Err(Error::option("rows of a step", format!("1..={capacity}"), found));
        }
        let within = |what, numbers: &[u32], end: usize| match numbers.iter().max() {
            Some(&most) if most as usize >= end => {
                Err(Error::option(what, format!("below {end}"), most))
            }
            _ => Ok(()),
        };
        within("token", tokens, self.config.vocab)?;
        within("position", positions, self.config.positions)?;
        activations.rows = tokens.len();
        self.stream.memcpy_htod(tokens, &mut activations.tokens).map_err(driver)?;
        self.stream.memcpy_htod(positions, &mut activations.positions).map_err(driver)
    }

    /// A step of the cache, which has planned it and commits it afterwards: logits of every row, and
    /// the next token. Only gives work to the stream. Where `attend` is false, everything but the
    /// attention is done, and what comes out is of no use but to be timed.
    ///
    /// # Errors
    /// [`Error::Option`] before [`Decoder::set_rows`] and for activations of another decoder;
    /// [`CoreError::Mismatch`] for a cache of another stream; those of [`leank_core::Cache::append`]
    /// and `attend`, [`Error::Device`].
    pub fn forward(
        &self,
        activations: &mut Activations<T>,
        cache: &mut CudaCache,
        attend: bool,
    ) -> Result<()> {
        self.check_own(activations)?;
        if activations.rows == 0 {
            return Err(Error::option("rows of a step", "those that `set_rows` sets", 0));
        }
        if cache.stream() != &self.stream {
            let (expected, found) = ("that of the decoder's backend", "another stream");
            return Err(CoreError::mismatch("stream of the cache", expected, found).into());
        }
        let DecoderConfig { hidden, intermediate, vocab, epsilon, .. } = *self.config;
        let Activations { rows, x, normed, gate_up, inner, .. } = activations;
        let rows = *rows;
        let product = |inputs, outputs| Product { rows, inputs, outputs };
        self.kernels.embed(&self.weights.embedding, &activations.tokens, x, (rows, hidden))?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.kernels.rms_norm(x, &layer.attention_norm, epsilon, normed, rows)?;
            let size = product(hidden, self.config.qkv_width());
            self.gemm.product(&layer.qkv, normed, &mut activations.qkv, size, false)?;
            let rotation = Rotation {
                bias: layer.bias.as_ref(),
                cosines: &self.cosines,
                sines: &self.sines,
                positions: &activations.positions,
                rotated: self.config.shape.query_heads + self.config.shape.kv_heads,
                heads: self.config.shape.query_heads + 2 * self.config.shape.kv_heads,
                head_dim: self.config.shape.head_dim,
            };
            self.kernels.rope(&mut activations.qkv, &rotation, rows)?;
            let views = self.views(&activations.qkv, &mut activations.attended, rows);
            cache.append(Layer(index), views.k, views.v)?;
            if attend {
                cache.attend(Layer(index), views.q, views.out)?;
            }
            let size = product(self.config.query_width(), hidden);
            self.gemm.product(&layer.output, &activations.attended, x, size, true)?;

            self.kernels.rms_norm(x, &layer.mlp_norm, epsilon, normed, rows)?;
            let size = product(hidden, 2 * intermediate);
            self.gemm.product(&layer.gate_up, normed, gate_up, size, false)?;
            self.kernels.swiglu(gate_up, inner, (rows, intermediate))?;
            self.gemm.product(&layer.down, inner, x, product(intermediate, hidden), true)?;
        }
        self.kernels.rms_norm(x, &self.weights.norm, epsilon, normed, rows)?;
        let Activations { tokens, positions, logits, .. } = activations;
        let head = self.weights.head.as_ref().unwrap_or(&self.weights.embedding);
        self.gemm.product(head, normed, logits, product(hidden, vocab), false)?;
        self.kernels.argmax(logits, tokens, positions, (rows, vocab, self.config.positions))
    }

    /// q, k and v of a step as they lie side by side, and where attention goes.
    fn views(
        &self,
        qkv: &CudaSlice<T>,
        attended: &mut CudaSlice<T>,
        rows: usize,
    ) -> Views<'static> {
        let ModelShape { query_heads, kv_heads, head_dim, .. } = self.config.shape;
        let stride = self.config.qkv_width();
        let part = |heads, channels_before: usize| {
            let shape =
                ViewShape { token_stride: stride, ..ViewShape::contiguous(rows, heads, head_dim) };
            let at = address(qkv) + (channels_before * size_of::<T>()) as u64;
            // SAFETY: `qkv` has `stride` elements of each of at least `rows` rows, and the heads lie in
            // them; all work on it is on one stream, which was checked to be the cache's.
            unsafe { DeviceView::from_address(at, T::DTYPE, shape) }
        };
        let out = ViewShape::contiguous(rows, query_heads, head_dim);
        let (query_width, kv_width) = (self.config.query_width(), self.config.kv_width());
        Views {
            q: part(query_heads, 0),
            k: part(kv_heads, query_width),
            v: part(kv_heads, query_width + kv_width),
            // SAFETY: as above, of `attended`.
            out: unsafe { DeviceViewMut::from_address(address(attended), T::DTYPE, out) },
        }
    }

    /// Logits of the last step, `[rows, vocab]`, and the tokens that the device sampled. Waits.
    ///
    /// # Errors
    /// [`Error::Option`] for activations of another decoder, [`Error::Device`].
    pub fn results(&self, activations: &Activations<T>) -> Result<(Vec<f32>, Vec<u32>)> {
        self.check_own(activations)?;
        let Activations { rows, logits, tokens, .. } = activations;
        let logits = logits.slice(..rows * self.config.vocab);
        let logits = self.stream.clone_dtoh(&logits).map_err(driver)?;
        let tokens = self.stream.clone_dtoh(&tokens.slice(..*rows)).map_err(driver)?;
        Ok((logits, tokens))
    }

    /// Has cuBLAS's algorithms timed for steps of as many rows as there is room for, and keeps the
    /// fastest.
    ///
    /// # Errors
    /// [`Error::Option`] for activations of another decoder, [`Error::Device`].
    pub fn tune(&self, activations: &Activations<T>) -> Result<Products> {
        self.check_own(activations)?;
        let DecoderConfig { hidden, intermediate, vocab, .. } = *self.config;
        let Activations { capacity: rows, normed, attended, inner, .. } = activations;
        let query = self.config.query_width();
        let product = |inputs, outputs| Product { rows: *rows, inputs, outputs };
        let layers = &self.weights.layers;
        let each = |matrix: fn(&LayerWeights<T>) -> &CudaSlice<T>| -> Vec<&CudaSlice<T>> {
            layers.iter().map(matrix).collect()
        };
        let (qkv, output) = (each(|layer| &layer.qkv), each(|layer| &layer.output));
        let (gate_up, down) = (each(|layer| &layer.gate_up), each(|layer| &layer.down));
        let head = [self.weights.head.as_ref().unwrap_or(&self.weights.embedding)];
        let size = product(hidden, self.config.qkv_width());
        let mut products = Products::default();
        products.add(layers.len(), self.gemm.tune::<T, T>(&qkv, normed, size, false)?);
        let size = product(query, hidden);
        products.add(layers.len(), self.gemm.tune::<T, f32>(&output, attended, size, true)?);
        let size = product(hidden, 2 * intermediate);
        products.add(layers.len(), self.gemm.tune::<T, T>(&gate_up, normed, size, false)?);
        let size = product(intermediate, hidden);
        products.add(layers.len(), self.gemm.tune::<T, f32>(&down, inner, size, true)?);
        let size = product(hidden, vocab);
        products.add(1, self.gemm.tune::<T, f32>(&head, normed, size, false)?);
        Ok(products)
    }
}

/// Milliseconds of all products of a step, one after the other with nothing between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Products {
    /// By cuBLAS's first choices.
    pub first_ms: f64,
    /// By the algorithms that [`Decoder::tune`] found to be the fastest.
    pub fastest_ms: f64,
}

impl Products {
    fn add(&mut self, count: usize, tuned: Tuned) {
        self.first_ms += 1e3 * tuned.first * count as f64;
        self.fastest_ms += 1e3 * tuned.fastest * count as f64;
    }
}

struct Views<'a> {
    q: DeviceView<'a>,
    k: DeviceView<'a>,
    v: DeviceView<'a>,
    out: DeviceViewMut<'a>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_8b_has_eight_billion_weights() {
        let config = DecoderConfig::llama_8b(32, 64).unwrap();
        config.validate().unwrap();
        // 8.03e9 in bf16, and 1 GiB of it each for embedding and head.
        let bytes = config.decoder_bytes(2) - (gemm::WORKSPACE + 64 * 128 * 4) as u64;
        let norms = 65 * 4096;
        assert_eq!(bytes, 2 * 8_030_261_248 + 2 * norms, "norms are f32");
    }

    #[test]
    fn sizes_that_kernels_cannot_take_are_refused() {
        let good = DecoderConfig::llama_8b(2, 64).unwrap();
        for bad in [
            DecoderConfig { hidden: 4098, ..good.clone() },
            DecoderConfig { intermediate: 0, ..good.clone() },
            DecoderConfig { vocab: 0, ..good.clone() },
            DecoderConfig { vocab: 1 << 31, ..good.clone() },
            DecoderConfig { positions: 0, ..good.clone() },
            DecoderConfig { positions: 1 << 40, ..good.clone() },
            DecoderConfig { shape: ModelShape::new(2, 4, 2, 63).unwrap(), ..good.clone() },
        ] {
            assert!(matches!(bad.validate(), Err(Error::Option { .. })), "{bad:?}");
        }
    }
}
