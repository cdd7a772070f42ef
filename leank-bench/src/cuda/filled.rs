//! A filled cache on the device in the middle of a decode step.

use leank_core::{
    Backend as _, Cache as _, CacheConfig, DEFAULT_BLOCK, Dtype, Layer, SequenceId, StepEntry,
    ViewShape,
};
use leank_cuda::{Cuda, CudaCache, DeviceView, DeviceViewMut};
use leank_train::rng::Rng;

use super::device::{Device, Elements};
use crate::Result;

/// Tokens per step while a cache is filled.
const CHUNK: usize = 16384;

/// Sequences that are filled and released first, so that the blocks of those that stay lie in no
/// order.
const GUESTS: usize = 32;

/// A cache of one layer whose sequences each have one new token that has not attended yet.
pub(super) struct Filled {
    pub(super) cache: CudaCache,
    pub(super) sequences: Vec<SequenceId>,
    pub(super) q: Elements,
    pub(super) out: Elements,
    q_shape: ViewShape,
    /// K and V of the new tokens.
    token: [Elements; 2],
    kv_shape: ViewShape,
}

/// Fills caches.
pub(super) struct Filler<'a> {
    pub(super) cuda: &'a Cuda,
    pub(super) device: &'a Device,
    pub(super) random: Rng,
}

impl Filler<'_> {
    /// A cache of sequences of these lengths, new token included, with blocks in no order.
    pub(super) fn fill(&mut self, config: CacheConfig, lengths: &[usize]) -> Result<Filled> {
        let shape = config.shape;
        let dtype = config.dtype;
        let mut cache = self.cuda.create(config)?;
        let width = shape.kv_heads * shape.head_dim;
        let mut rows = || self.device.random(dtype, CHUNK * width, self.random.next_u64(), 1.0);
        let (mut k, mut v) = (rows()?, rows()?);

        let total: usize = lengths.iter().sum();
        let guest = (total / GUESTS).next_multiple_of(DEFAULT_BLOCK);
        let mut guests = self.add(&mut cache, &[guest; GUESTS], dtype, &mut k, &mut v)?;
        self.random.shuffle(&mut guests);
        for id in guests {
            cache.release(id)?;
        }
        let stored: Vec<usize> = lengths.iter().map(|length| length - 1).collect();
        let sequences = self.add(&mut cache, &stored, dtype, &mut k, &mut v)?;

        let tokens = sequences.len();
        let kv_shape = ViewShape::contiguous(tokens, shape.kv_heads, shape.head_dim);
        let q_shape = ViewShape::contiguous(tokens, shape.query_heads, shape.head_dim);
        let mut random = |heads: usize| {
            let seed = self.random.next_u64();
            self.device.random(dtype, tokens * heads * shape.head_dim, seed, 1.0)
        };
        let token = [random(shape.kv_heads)?, random(shape.kv_heads)?];
        let (q, out) = (random(shape.query_heads)?, random(shape.query_heads)?);
        let mut filled = Filled { cache, sequences, q, out, q_shape, token, kv_shape };
        filled.plan()?;
        filled.append()?;
        Ok(filled)
    }

    /// New sequences of these lengths, fed in pieces in random order.
    fn add(
        &mut self,
        cache: &mut CudaCache,
        lengths: &[usize],
        dtype: Dtype,
        k: &mut Elements,
        v: &mut Elements,
    ) -> Result<Vec<SequenceId>> {
        let shape = cache.config().shape;
        let ids: Vec<SequenceId> = lengths.iter().map(|_| cache.add_sequence()).collect();
        let mut left = lengths.to_vec();
        loop {
            let mut order: Vec<usize> = (0..ids.len()).filter(|&i| left[i] > 0).collect();
            if order.is_empty() {
                return Ok(ids);
            }
            self.random.shuffle(&mut order);
            let (mut entries, mut tokens) = (Vec::new(), 0);
            for i in order {
                let piece = DEFAULT_BLOCK * (1 + self.random.below(16));
                let piece = piece.min(left[i]).min(CHUNK - tokens);
                if piece > 0 {
                    entries.push(StepEntry::store(ids[i], piece));
                    left[i] -= piece;
                    tokens += piece;
                }
            }
            let seed = self.random.next_u64();
            self.device.fill(dtype, k, seed, 1.0)?;
            self.device.fill(dtype, v, seed.wrapping_add(1), 1.0)?;
            let rows = ViewShape::contiguous(tokens, shape.kv_heads, shape.head_dim);
            cache.plan(&entries)?;
            for layer in shape.layer_indices() {
                cache.append(layer, view(k, dtype, rows)?, view(v, dtype, rows)?)?;
            }
            cache.commit()?;
        }
    }
}

/// A view of elements of either 16-bit type.
fn view(data: &Elements, dtype: Dtype, shape: ViewShape) -> Result<DeviceView<'_>> {
    let view = DeviceView::new(data, shape)?;
    Ok(view.with_dtype(dtype)?)
}

impl Filled {
    /// Plans the step of one token per sequence.
    pub(super) fn plan(&mut self) -> Result<()> {
        let entries = self.sequences.iter().map(|&id| StepEntry::decode(id, 1));
        Ok(self.cache.plan(&entries.collect::<Vec<_>>())?)
    }

    /// Appends the new tokens.
    pub(super) fn append(&mut self) -> Result<()> {
        let dtype = self.cache.config().dtype;
        let [k, v] = &self.token;
        let (k, v) = (view(k, dtype, self.kv_shape)?, view(v, dtype, self.kv_shape)?);
        Ok(self.cache.append(Layer(0), k, v)?)
    }

    /// Attention of the new tokens.
    pub(super) fn attend(&mut self) -> Result<()> {
        let dtype = self.cache.config().dtype;
        let q = view(&self.q, dtype, self.q_shape)?;
        let out = DeviceViewMut::new(&mut self.out, self.q_shape)?.with_dtype(dtype)?;
        Ok(self.cache.attend(Layer(0), q, out)?)
    }
}
