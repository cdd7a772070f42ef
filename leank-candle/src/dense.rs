//! Dense attention with its own keys and values: the reference, the prefill, and the ground of the
//! probe.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use leank_core::ModelShape;

use crate::attention::Causal;
use crate::config::ModelConfig;
use crate::model::{Attention, Model};
use crate::ops::with_slice;
use crate::{Error, Result};

/// Tokens per forward pass in [`DenseAttention::prefill`]: enough for matrix products to run at full
/// speed, few enough for activations to stay small.
const PREFILL_CHUNK: usize = 512;

/// Keys and values of one layer, `[kv_heads, capacity, head_dim]` each.
#[derive(Clone, Debug)]
pub(crate) struct LayerKv {
    keys: Vec<f32>,
    values: Vec<f32>,
    capacity: usize,
}

impl LayerKv {
    pub(crate) fn new(shape: &ModelShape, capacity: usize) -> Self {
        let n = shape.kv_heads * capacity * shape.head_dim;
        Self { keys: vec![0.0; n], values: vec![0.0; n], capacity }
    }

    /// Tokens that there is room for.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Some of the tokens, with room for `capacity`.
    pub(crate) fn moved(&self, shape: &ModelShape, tokens: Range<usize>, capacity: usize) -> Self {
        let mut moved = Self::new(shape, capacity);
        let (from, to) = (self.capacity * shape.head_dim, capacity * shape.head_dim);
        let (first, used) = (tokens.start * shape.head_dim, tokens.len() * shape.head_dim);
        for head in 0..shape.kv_heads {
            let (from, to) = (head * from + first, head * to);
            moved.keys[to..][..used].copy_from_slice(&self.keys[from..][..used]);
            moved.values[to..][..used].copy_from_slice(&self.values[from..][..used]);
        }
        moved
    }

    /// Stores `[tokens, kv_heads, head_dim]` behind the first `at` tokens.
    pub(crate) fn store(&mut self, shape: &ModelShape, at: usize, keys: &[f32], values: &[f32]) {
        let dim = shape.head_dim;
        for (to, from) in [(&mut self.keys, keys), (&mut self.values, values)] {
            for (row, from) in from.chunks_exact(dim).enumerate() {
                let (token, head) = (at + row / shape.kv_heads, row % shape.kv_heads);
                to[(head * self.capacity + token) * dim..][..dim].copy_from_slice(from);
            }
        }
    }

    /// The view for queries behind `past` tokens that see `window` tokens, or all.
    pub(crate) fn causal(
        &self,
        shape: ModelShape,
        past: usize,
        window: Option<usize>,
    ) -> Causal<'_> {
        let (keys, values) = (&self.keys, &self.values);
        Causal { shape, keys, values, capacity: self.capacity, past, window }
    }
}

/// Causal attention of one sequence over everything it has seen, whole, in f32. Sliding layers keep
/// all their tokens too, so that any of them can be forgotten again, and see the last ones.
///
/// [`DenseAttention::fork`] is cheap (storage is shared until one side appends), so a prefix is
/// computed once and continued many times.
#[derive(Clone, Debug)]
pub struct DenseAttention {
    shape: ModelShape,
    windows: Arc<[Option<usize>]>,
    layers: Vec<Arc<LayerKv>>,
    /// Tokens stored, per layer: within a forward pass, earlier layers are ahead.
    tokens: Vec<usize>,
}

impl DenseAttention {
    /// An empty sequence of a model with room for `capacity` tokens; it grows when more come.
    #[must_use]
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        Self::with_windows(config.shape, config.windows(), capacity)
    }

    /// An empty sequence whose layers see this many tokens each, or all of them.
    pub(crate) fn with_windows(
        shape: ModelShape,
        windows: Vec<Option<usize>>,
        capacity: usize,
    ) -> Self {
        let layers = (0..shape.layers).map(|_| Arc::new(LayerKv::new(&shape, capacity))).collect();
        Self { shape, windows: windows.into(), layers, tokens: vec![0; shape.layers] }
    }

    /// How many tokens each layer sees; `None`: all.
    pub(crate) fn windows(&self) -> &[Option<usize>] {
        &self.windows
    }

    /// The global layers, as [`ModelConfig::global_layers`].
    pub(crate) fn global_layers(&self) -> impl Iterator<Item = usize> {
        self.windows.iter().enumerate().filter(|(_, window)| window.is_none()).map(|(l, _)| l)
    }

    /// Tokens that a layer holds.
    pub(crate) fn layer_len(&self, layer: usize) -> usize {
        self.tokens[layer]
    }

    /// Keys and values of some tokens of a layer as `[tokens, kv_heads, head_dim]`.
    pub(crate) fn token_rows(
        &self,
        layer: usize,
        tokens: Range<usize>,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let rows = |tensor: Tensor| -> Result<Vec<f32>> {
            let some = tensor.narrow(1, tokens.start, tokens.len())?;
            Ok(some.transpose(0, 1)?.contiguous()?.flatten_all()?.to_vec1()?)
        };
        Ok((rows(self.keys(layer)?)?, rows(self.values(layer)?)?))
    }

    /// The attention shape of all layers.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Tokens that every layer holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.iter().copied().min().unwrap_or(0)
    }

    /// Whether no token is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A continuation of its own of the same tokens; storage is copied only when one side appends.
    #[must_use]
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Forgets all tokens from `tokens` on; more tokens than are held are no change.
    pub fn truncate(&mut self, tokens: usize) {
        for held in &mut self.tokens {
            *held = tokens.min(*held);
        }
    }

    /// Bytes of keys and values of the tokens held.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let per_token = 2 * self.shape.kv_heads * self.shape.head_dim * size_of::<f32>();
        self.tokens.iter().map(|&n| n as u64 * per_token as u64).sum()
    }

    /// Keys (after RoPE) of a layer, `[kv_heads, tokens, head_dim]` f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there is no such layer.
    pub fn keys(&self, layer: usize) -> Result<Tensor> {
        self.tensor(layer, |kv| &kv.keys)
    }

    /// Values of a layer, `[kv_heads, tokens, head_dim]` f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when there is no such layer.
    pub fn values(&self, layer: usize) -> Result<Tensor> {
        self.tensor(layer, |kv| &kv.values)
    }

    fn tensor(&self, layer: usize, rows: fn(&LayerKv) -> &Vec<f32>) -> Result<Tensor> {
        let packed = self.packed(layer, rows)?;
        let dims = (self.shape.kv_heads, self.tokens[layer], self.shape.head_dim);
        Ok(Tensor::from_vec(packed, dims, &Device::Cpu)?)
    }

    /// Keys and values of a layer as `[kv_heads, tokens, head_dim]` without gaps.
    pub(crate) fn packed_kv(&self, layer: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        Ok((self.packed(layer, |kv| &kv.keys)?, self.packed(layer, |kv| &kv.values)?))
    }

    fn packed(&self, layer: usize, rows: fn(&LayerKv) -> &Vec<f32>) -> Result<Vec<f32>> {
        let kv = self.layers.get(layer).ok_or_else(|| self.no_layer(layer))?;
        let (used, stride) =
            (self.tokens[layer] * self.shape.head_dim, kv.capacity * self.shape.head_dim);
        let heads = (0..self.shape.kv_heads).map(|head| &rows(kv)[head * stride..][..used]);
        Ok(heads.flatten().copied().collect())
    }

    fn no_layer(&self, layer: usize) -> Error {
        Error::mismatch("layer", format!("0..{}", self.shape.layers), layer)
    }

    /// Appends keys and values `[tokens, kv_heads, head_dim]` to a layer and returns what the
    /// queries of these tokens read, and how many tokens came before.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<(Arc<LayerKv>, usize)> {
        if layer >= self.shape.layers {
            return Err(self.no_layer(layer));
        }
        let (new, heads, dim) = keys.dims3()?;
        let shape = self.shape;
        if (heads, dim) != (shape.kv_heads, shape.head_dim) || keys.dims() != values.dims() {
            let expected =
                format!("keys and values [tokens, {}, {}]", shape.kv_heads, shape.head_dim);
            let found = format!("{:?} and {:?}", keys.dims(), values.dims());
            return Err(Error::mismatch("attention input", expected, found));
        }
        let past = self.tokens[layer];
        let needed = past + new;
        if needed > self.layers[layer].capacity {
            let capacity = needed.max(self.layers[layer].capacity * 2).next_multiple_of(64);
            self.layers[layer] = Arc::new(self.layers[layer].moved(&shape, 0..past, capacity));
        }
        let kv = Arc::make_mut(&mut self.layers[layer]);
        with_slice(keys, |keys| {
            with_slice(values, |values| {
                kv.store(&shape, past, keys, values);
                Ok(())
            })
        })?;
        self.tokens[layer] = needed;
        Ok((self.layers[layer].clone(), past))
    }

    /// Runs `tokens` through the model behind what is held, in chunks, and returns the final hidden
    /// state `[1, hidden]` of the last one. Tokens of a failed call are forgotten.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for no tokens; what [`Model::hidden`] returns.
    pub fn prefill(&mut self, model: &Model, tokens: &[u32]) -> Result<Tensor> {
        let start = self.len();
        let result = self.prefill_chunks(model, tokens);
        if result.is_err() {
            self.truncate(start);
        }
        result
    }

    fn prefill_chunks(&mut self, model: &Model, tokens: &[u32]) -> Result<Tensor> {
        let mut last = None;
        for chunk in tokens.chunks(PREFILL_CHUNK) {
            let start = self.len();
            let positions: Vec<usize> = (start..start + chunk.len()).collect();
            last = Some(model.hidden(chunk, &positions, self)?);
        }
        let last = last.ok_or_else(|| Error::mismatch("prompt", "at least one token", "none"))?;
        Ok(last.narrow(0, last.dim(0)? - 1, 1)?.contiguous()?)
    }
}

impl Attention for DenseAttention {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (kv, past) = self.append(layer, k, v)?;
        let tokens = check_queries(&self.shape, q, k)?;
        let causal = kv.causal(self.shape, past, self.windows[layer]);
        let out = with_slice(q, |q| Ok(causal.forward(q, tokens)))?;
        Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
    }
}

/// Checks that `q` is `[tokens, query_heads, head_dim]` with the tokens of `k`; returns the tokens.
pub(crate) fn check_queries(shape: &ModelShape, q: &Tensor, k: &Tensor) -> Result<usize> {
    let tokens = k.dim(0)?;
    let expected = [tokens, shape.query_heads, shape.head_dim];
    if q.dims() == expected {
        Ok(tokens)
    } else {
        let (expected, found) = (format!("{expected:?}"), format!("{:?}", q.dims()));
        Err(Error::mismatch("queries of an attention", expected, found))
    }
}

#[cfg(test)]
mod tests {
    use leank_train::rng::Rng;

    use super::*;
    use crate::testing::random;

    #[test]
    fn forks_and_truncation_share_nothing_visible() {
        let shape = ModelShape::new(1, 4, 2, 8).unwrap();
        let mut rng = Rng::new(5);
        // A capacity of 1 makes it grow on the way.
        let mut first = DenseAttention::with_windows(shape, vec![None], 1);
        let mut step = |attention: &mut DenseAttention, tokens| {
            let q = random(&mut rng, (tokens, 4, 8));
            let (k, v) = (random(&mut rng, (tokens, 2, 8)), random(&mut rng, (tokens, 2, 8)));
            attention.attend(0, &q, &k, &v).unwrap();
            k
        };
        let k0 = step(&mut first, 5);
        let mut second = first.fork();
        let k1 = step(&mut second, 3);
        assert_eq!((first.len(), second.len()), (5, 8));
        step(&mut first, 3);
        let held = second.keys(0).unwrap().transpose(0, 1).unwrap();
        let want = Tensor::cat(&[&k0, &k1], 0).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&held), flat(&want));
        second.truncate(5);
        assert_eq!(flat(&second.keys(0).unwrap().transpose(0, 1).unwrap()), flat(&k0));
        assert_eq!(second.bytes(), 2 * 5 * 2 * 8 * 4);
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let shape = ModelShape::new(1, 4, 2, 8).unwrap();
        let mut attention = DenseAttention::with_windows(shape, vec![None], 4);
        let mut rng = Rng::new(6);
        let mut t = |heads| random(&mut rng, (2, heads, 8));
        assert!(attention.attend(0, &t(4), &t(3), &t(3)).is_err());
        assert!(attention.attend(0, &t(3), &t(2), &t(2)).is_err());
        assert!(attention.attend(1, &t(4), &t(2), &t(2)).is_err());
        assert!(attention.keys(1).is_err());
    }
}
