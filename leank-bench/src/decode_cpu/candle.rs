//! candle's own caches as a model's attention, with random tokens to begin with.
//!
//! candle-transformers fills its caches through whole forward passes only, which takes a quarter of
//! an hour per 32k tokens, and its llama has no more than 4096 positions. So what is measured is our
//! forward pass with the caches of candle-nn, used as candle-transformers 0.11.1 uses them on the CPU.

use candle_core::{Device, Tensor};
use candle_nn::{
    attention::cpu_flash::causal::causal_decode_f32_interleaved,
    kv_cache::{ConcatKvCache, RawInterleavedKvCache},
    ops::softmax_last_dim,
};
use leank_candle::{Attention, Result};
use leank_core::ModelShape;

/// As `quantized_llama` and `quantized_qwen2` attend: K and V are concatenated with the new ones,
/// repeated for every query head of their group, and multiplied.
pub(super) struct Concat {
    shape: ModelShape,
    layers: Vec<ConcatKvCache>,
}

/// As `quantized_qwen3` attends: K and V side by side in one buffer, and a kernel with online softmax.
pub(super) struct Interleaved {
    shape: ModelShape,
    layers: Vec<RawInterleavedKvCache>,
}

/// A cache of candle's.
pub(super) trait CandleCache: Attention {
    /// An empty one with room for so many tokens.
    fn new(shape: ModelShape, room: usize) -> Self;

    /// Appends `[tokens, KV heads, head_dim]` to a layer.
    ///
    /// # Errors
    /// candle's.
    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()>;

    /// Tokens held.
    fn len(&self) -> usize;
}

/// `[tokens, heads, head_dim]` as `[1, heads, tokens, head_dim]`.
fn by_head(x: &Tensor) -> candle_core::Result<Tensor> {
    x.transpose(0, 1)?.contiguous()?.unsqueeze(0)
}

/// Each KV head so many times.
fn repeat(x: &Tensor, times: usize) -> candle_core::Result<Tensor> {
    let (batch, heads, tokens, head_dim) = x.dims4()?;
    Tensor::cat(&vec![x; times], 2)?.reshape((batch, heads * times, tokens, head_dim))
}

impl CandleCache for Concat {
    fn new(shape: ModelShape, _room: usize) -> Self {
        Self { shape, layers: vec![ConcatKvCache::new(2); shape.layers] }
    }

    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let ModelShape { kv_heads, head_dim, .. } = self.shape;
        let tensor = |rows: &[f32]| {
            let tokens = rows.len() / (kv_heads * head_dim);
            by_head(&Tensor::from_slice(rows, (tokens, kv_heads, head_dim), &Device::Cpu)?)
        };
        self.layers[layer].append(&tensor(k)?, &tensor(v)?)?;
        Ok(())
    }

    fn len(&self) -> usize {
        self.layers.last().map_or(0, ConcatKvCache::current_seq_len)
    }
}

impl Attention for Concat {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (k, v) = self.layers[layer].append(&by_head(k)?, &by_head(v)?)?;
        let group = self.shape.group();
        let (k, v) = (repeat(&k, group)?, repeat(&v, group)?);
        let logits = (by_head(q)?.matmul(&k.t()?)? / (self.shape.head_dim as f64).sqrt())?;
        let out = softmax_last_dim(&logits)?.matmul(&v.contiguous()?)?;
        Ok(out.squeeze(0)?.transpose(0, 1)?.contiguous()?)
    }
}

impl CandleCache for Interleaved {
    fn new(shape: ModelShape, room: usize) -> Self {
        let layer = || RawInterleavedKvCache::new(shape.kv_heads, shape.head_dim, room);
        Self { shape, layers: (0..shape.layers).map(|_| layer()).collect() }
    }

    fn store(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let tokens = k.len() / (self.shape.kv_heads * self.shape.head_dim);
        self.layers[layer].write_kv_batch(k, v, tokens);
        Ok(())
    }

    fn len(&self) -> usize {
        self.layers.last().map_or(0, RawInterleavedKvCache::len)
    }
}

impl Attention for Interleaved {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let ModelShape { query_heads, kv_heads, head_dim, .. } = self.shape;
        let row = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        self.layers[layer].write_kv(&row(k)?, &row(v)?);
        let cache = &self.layers[layer];
        let out = causal_decode_f32_interleaved(
            &row(q)?,
            cache.data(),
            query_heads,
            kv_heads,
            head_dim,
            cache.len(),
            1.0 / (head_dim as f32).sqrt(),
        )?;
        Ok(out.reshape(q.shape())?)
    }
}
