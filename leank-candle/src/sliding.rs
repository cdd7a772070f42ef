//! Keys and values of sliding layers while a lean cache holds those of the global ones.
//!
//! A sliding layer sees a fixed number of tokens, so its memory does not grow with the context and
//! there is nothing in it worth pruning. A lean cache, which would hold all of its tokens, is the
//! wrong place for it.

use candle_core::{Device, Tensor};
use leank_core::{Dtype, ModelShape};

use crate::config::ModelConfig;
use crate::dense::{DenseAttention, LayerKv, check_queries};
use crate::ops::with_slice;
use crate::{Error, Result};

/// The last tokens of one sequence in all sliding layers, in f32; empty for a model without such.
#[derive(Clone, Debug)]
pub struct SlidingKv {
    shape: ModelShape,
    /// One per layer of the model; `None`: a global layer.
    layers: Vec<Option<Recent>>,
}

/// The last tokens of one layer.
#[derive(Clone, Debug)]
struct Recent {
    kv: LayerKv,
    /// Tokens in `kv`: those that the next query sees, and perhaps some before them.
    held: usize,
    /// Tokens taken in ever.
    tokens: usize,
    window: usize,
}

impl SlidingKv {
    /// An empty sequence of a model.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        Self::empty(config.shape, &config.windows())
    }

    fn empty(shape: ModelShape, windows: &[Option<usize>]) -> Self {
        let recent = |window| Recent { kv: LayerKv::new(&shape, 0), held: 0, tokens: 0, window };
        Self { shape, layers: windows.iter().map(|window| window.map(recent)).collect() }
    }

    /// The sliding layers of a sequence that was computed densely: how a prompt enters, beside
    /// [`store_prefix`](crate::store_prefix).
    ///
    /// # Errors
    /// [`Error::Candle`] when a copy fails.
    pub fn of(dense: &DenseAttention) -> Result<Self> {
        let mut sliding = Self::empty(dense.shape(), dense.windows());
        for (index, layer) in sliding.layers.iter_mut().enumerate() {
            let Some(recent) = layer else { continue };
            let tokens = dense.layer_len(index);
            let last = tokens.min(recent.window - 1);
            let (keys, values) = dense.token_rows(index, tokens - last..tokens)?;
            recent.store(&sliding.shape, &keys, &values, last);
            recent.tokens = tokens;
        }
        Ok(sliding)
    }

    /// Whether a layer slides.
    #[must_use]
    pub fn slides(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(Option::is_some)
    }

    /// How many of the model's layers slide.
    #[must_use]
    pub fn sliding_layers(&self) -> usize {
        self.layers.iter().flatten().count()
    }

    /// Bytes that the tokens in sight take in elements of `dtype`: what an engine must hold for these
    /// layers, whatever the context length. This type itself holds f32, and up to twice the window.
    #[must_use]
    pub fn bytes(&self, dtype: Dtype) -> u64 {
        let per_token = 2 * self.shape.kv_heads * self.shape.head_dim * dtype.bytes();
        let seen = self.layers.iter().flatten().map(|recent| recent.tokens.min(recent.window));
        seen.map(|tokens| tokens as u64 * per_token as u64).sum()
    }

    /// Takes in the new tokens of a sliding layer and attends with their queries, as
    /// [`Attention::attend`](crate::Attention::attend).
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a layer that does not slide, and for shapes that are not the model's.
    pub fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let shape = self.shape;
        let Some(recent) = self.layers.get_mut(layer).and_then(Option::as_mut) else {
            return Err(Error::mismatch("layer", "one that slides", layer));
        };
        if k.dims() != v.dims() || k.dims().get(1..) != Some(&[shape.kv_heads, shape.head_dim]) {
            let expected = format!("[tokens, {}, {}]", shape.kv_heads, shape.head_dim);
            let found = format!("{:?} and {:?}", k.dims(), v.dims());
            return Err(Error::mismatch("attention input", expected, found));
        }
        let new = check_queries(&shape, q, k)?;
        let mut past = 0;
        with_slice(k, |k| {
            with_slice(v, |v| {
                past = recent.store(&shape, k, v, new);
                Ok(())
            })
        })?;
        let causal = recent.kv.causal(shape, past, Some(recent.window));
        let out = with_slice(q, |q| Ok(causal.forward(q, new)))?;
        Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
    }
}

impl Recent {
    /// Stores new tokens behind those in sight; returns how many are held before them.
    fn store(&mut self, shape: &ModelShape, keys: &[f32], values: &[f32], new: usize) -> usize {
        if self.held + new > self.kv.capacity() {
            // Room for as many tokens again, up to a window, so that moving costs a row or two per token.
            let seen = self.held.min(self.window - 1);
            let more = self.window.min((seen + new).max(64));
            self.kv = self.kv.moved(shape, self.held - seen..self.held, seen + new + more);
            self.held = seen;
        }
        let past = self.held;
        self.kv.store(shape, past, keys, values);
        self.held += new;
        self.tokens += new;
        past
    }
}

#[cfg(test)]
mod tests {
    use leank_train::rng::Rng;

    use super::*;
    use crate::Attention;
    use crate::testing::random;

    #[test]
    fn the_last_tokens_are_enough() {
        let shape = ModelShape::new(2, 4, 2, 8).unwrap();
        for window in [1, 2, 7, 100, usize::MAX] {
            let mut rng = Rng::new(window as u64);
            let mut dense = DenseAttention::with_windows(shape, vec![None, Some(window)], 0);
            let mut sliding = None;
            for new in [5, 1, 1, 20, 1, 1, 1, 3, 1, 40, 1] {
                let q = random(&mut rng, (new, 4, 8));
                let (k, v) = (random(&mut rng, (new, 2, 8)), random(&mut rng, (new, 2, 8)));
                dense.attend(0, &q, &k, &v).unwrap();
                let want = dense.attend(1, &q, &k, &v).unwrap();
                let Some(sliding) = &mut sliding else {
                    sliding = Some(SlidingKv::of(&dense).unwrap());
                    continue;
                };
                let got = sliding.attend(1, &q, &k, &v).unwrap();
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                for (got, want) in flat(&got).iter().zip(flat(&want)) {
                    assert!((got - want).abs() < 1e-5, "window {window}: {got} and {want}");
                }
                let held = sliding.layers[1].as_ref().unwrap();
                assert!(held.held < window.saturating_mul(2).saturating_add(40), "{}", held.held);
                let seen = dense.len().min(window) as u64;
                assert_eq!(sliding.bytes(Dtype::F16), seen * 2 * 2 * 8 * 2);
            }
            let error = sliding
                .unwrap()
                .attend(
                    0,
                    &random(&mut rng, (1, 4, 8)),
                    &random(&mut rng, (1, 2, 8)),
                    &random(&mut rng, (1, 2, 8)),
                )
                .unwrap_err();
            assert!(error.to_string().contains("one that slides"), "{error}");
        }
    }
}
