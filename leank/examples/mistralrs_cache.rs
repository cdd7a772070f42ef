//! A lean cache behind `mistralrs-kv-cache`, the trait that mistral.rs-like engines take compressed KV caches
//! through: one sequence, on the CPU.
//!
//!     cargo run --release -p leank --features candle --example mistralrs_cache
//!
//! The trait is called layer by layer and knows no steps, so a step begins with the first layer and is committed with
//! the last. Prompts come back as they were given, for the engine's own attention, and are stored lean at once; decoding
//! is fused: the engine gets attention's output. What the trait cannot say: forks, rollback, several sequences.

use std::{
    error::Error,
    sync::{Mutex, MutexGuard, PoisonError},
};

use leank::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, HostView, HostViewMut, Layer, ModelMask,
    ModelShape, SequenceId, StepEntry, ViewShape,
    cpu::{Cpu, CpuCache},
};
use mistralrs_kv_cache::{
    AttendConfig, CompressedKVCache, DecodeOutput, DequantResult, Device, Result, Tensor,
};

/// A lean cache of one sequence.
struct LeanKvCache(Mutex<State>);

struct State {
    cache: CpuCache,
    sequence: SequenceId,
    /// The layer whose turn it is in the step.
    next: usize,
    /// K and V of the prompt so far, by layer: a later chunk attends to them. Empty once decoding begins.
    prompt: Vec<(Tensor, Tensor)>,
}

impl LeanKvCache {
    fn new(config: CacheConfig) -> leank::Result<Self> {
        let mut cache = Cpu::new().create(config)?;
        let sequence = cache.add_sequence();
        Ok(Self(Mutex::new(State { cache, sequence, next: 0, prompt: Vec::new() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Stores the new tokens of a layer, does `work` with them, and commits behind the last layer.
    fn layer<T>(
        &mut self,
        layer: usize,
        entry: StepEntry,
        (k, v): (&Tensor, &Tensor),
        work: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        if layer != self.next {
            let next = self.next;
            return Err(wrap(format!("layer {layer} where {next} is next: layers come in order")));
        }
        let done = self.append(layer, entry, k, v).and_then(|()| work(self));
        let layers = self.cache.config().shape.layers;
        self.next = (layer + 1) % layers;
        match done {
            Ok(_) if self.next == 0 => self.cache.commit().map_err(wrap)?,
            Ok(_) => {}
            Err(_) => {
                self.cache.cancel();
                self.next = 0;
            }
        }
        done
    }

    fn append(&mut self, layer: usize, entry: StepEntry, k: &Tensor, v: &Tensor) -> Result<()> {
        if layer == 0 {
            self.cache.plan(&[entry]).map_err(wrap)?;
        }
        let view = view(k)?;
        let (k, v) = (values(k)?, values(v)?);
        let (k, v) = (HostView::new(&k[..], view), HostView::new(&v[..], view));
        self.cache.append(Layer(layer), k.map_err(wrap)?, v.map_err(wrap)?).map_err(wrap)
    }

    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (view, own) = (view(q)?, values(q)?);
        let mut out = vec![0.0; own.len()];
        let (from, to) = (HostView::new(&own[..], view), HostViewMut::new(&mut out[..], view));
        let (from, to) = (from.map_err(wrap)?, to.map_err(wrap)?);
        self.cache.attend(Layer(layer), from, to).map_err(wrap)?;
        Tensor::from_vec(out, q.shape(), q.device())
    }

    fn tokens(&self) -> usize {
        self.cache.sequence_len(self.sequence).unwrap_or(0)
    }
}

impl CompressedKVCache for LeanKvCache {
    fn prefill(&self, layer: usize, k: &Tensor, v: &Tensor, _q: &Tensor) -> Result<DequantResult> {
        let mut state = self.state();
        if state.prompt.is_empty() && state.tokens() > 0 {
            return Err(wrap("a prompt behind decoded tokens: they are lean; reset first"));
        }
        let entry = StepEntry::store(state.sequence, k.dim(2)?);
        state.layer(layer, entry, (k, v), |state| {
            let (k, v) = match state.prompt.get(layer) {
                Some((old_k, old_v)) => {
                    (Tensor::cat(&[old_k, k], 2)?, Tensor::cat(&[old_v, v], 2)?)
                }
                None => (k.clone(), v.clone()),
            };
            let own = (k.clone(), v.clone());
            match state.prompt.get_mut(layer) {
                Some(old) => *old = own,
                None => state.prompt.push(own),
            }
            Ok(DequantResult { k, v, logit_bias: None })
        })
    }

    fn decode(
        &self,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
        q: &Tensor,
        config: &AttendConfig,
    ) -> Result<DecodeOutput> {
        let mut state = self.state();
        let own = state.cache.config();
        if config.n_kv_groups != own.shape.group()
            || (config.softmax_scale / own.scale() - 1.0).abs() > 1e-5
        {
            return Err(wrap("another group or scale of the logits than the cache was made for"));
        }
        state.prompt.clear();
        let entry = StepEntry::decode(state.sequence, 1);
        state.layer(layer, entry, (k, v), |state| state.attend(layer, q)).map(DecodeOutput::Fused)
    }

    fn seq_len(&self, layer: usize) -> usize {
        let state = self.state();
        // In the midst of a step its first layers are ahead, which the engine counts by itself.
        if layer < state.cache.config().shape.layers { state.tokens() } else { 0 }
    }

    fn reset(&self) -> Result<()> {
        let state = &mut *self.state();
        state.cache.cancel();
        state.cache.release(state.sequence).map_err(wrap)?;
        state.sequence = state.cache.add_sequence();
        state.next = 0;
        state.prompt.clear();
        Ok(())
    }

    fn memory_usage(&self) -> usize {
        self.state().cache.memory().used_bytes() as usize
    }
}

/// The trait's error is candle's.
fn wrap(error: impl ToString) -> candle_core::Error {
    candle_core::Error::Msg(error.to_string())
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// A tensor `[1, heads, tokens, head_dim]` as the cache sees it.
fn view(x: &Tensor) -> Result<ViewShape> {
    match x.dims4()? {
        (1, heads, tokens, head_dim) => Ok(ViewShape::head_major(tokens, heads, head_dim)),
        (batch, ..) => Err(wrap(format!("a batch of {batch}: this cache is of one sequence"))),
    }
}

const SHAPE: ModelShape = ModelShape { layers: 3, query_heads: 4, kv_heads: 2, head_dim: 32 };

/// An engine in small: a prompt in two chunks, then tokens, on random activations. What the cache with a mask that
/// keeps everything gives is compared with attention over everything.
pub(crate) fn main() -> std::result::Result<(), Box<dyn Error>> {
    let every_second = (0..SHAPE.head_dim as u16).step_by(2).collect();
    let half = ChannelMask::new(SHAPE.head_dim, every_second)?;
    let heads = vec![half; SHAPE.layers * SHAPE.kv_heads];
    let half = ModelMask::new(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, heads)?;

    let dense = LeanKvCache::new(CacheConfig::dense(SHAPE)?)?;
    let lean = LeanKvCache::new(CacheConfig::new(SHAPE, half)?)?;
    let apart = drive(&dense)?;
    drive(&lean)?;
    let (bytes, dense_bytes) = (lean.memory_usage(), dense.memory_usage());
    println!("everything kept: outputs differ by {apart:.1e} from attention over all tokens");
    println!("half of K's channels: {bytes} bytes in place of {dense_bytes}");
    if apart > 2e-3 || bytes * 10 > dense_bytes * 9 {
        return Err("that is not what the cache should do".into());
    }
    dense.reset()?;
    if (dense.seq_len(0), dense.memory_usage()) != (0, 0) {
        return Err("a reset left something".into());
    }
    Ok(())
}

/// Runs a sequence through a cache; the largest difference of its outputs from exact attention.
fn drive(cache: &dyn CompressedKVCache) -> Result<f32> {
    let random =
        |heads, tokens| Tensor::randn(0f32, 1.0, (1, heads, tokens, SHAPE.head_dim), &Device::Cpu);
    let config = AttendConfig {
        softmax_scale: (SHAPE.head_dim as f32).sqrt().recip(),
        n_kv_groups: SHAPE.group(),
    };
    let mut all: Vec<Option<(Tensor, Tensor)>> = vec![None; SHAPE.layers];
    let mut apart = 0.0f32;
    for tokens in [700, 324].into_iter().chain([1; 40]) {
        for (layer, all) in all.iter_mut().enumerate() {
            let (k, v) = (random(SHAPE.kv_heads, tokens)?, random(SHAPE.kv_heads, tokens)?);
            let q = random(SHAPE.query_heads, tokens)?;
            let (all_k, all_v) = match all.take() {
                Some((old_k, old_v)) => {
                    (Tensor::cat(&[&old_k, &k], 2)?, Tensor::cat(&[&old_v, &v], 2)?)
                }
                None => (k.clone(), v.clone()),
            };
            if tokens > 1 {
                let found = cache.prefill(layer, &k, &v, &q)?;
                if found.k.dims() != all_k.dims() {
                    return Err(wrap("a prompt's chunk does not see the chunks before it"));
                }
            } else if let DecodeOutput::Fused(out) = cache.decode(layer, &k, &v, &q, &config)? {
                let expected = exact(&q, &all_k, &all_v, &config)?;
                let difference =
                    (out - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                apart = apart.max(difference);
            } else {
                return Err(wrap("decoding should be fused"));
            }
            *all = Some((all_k, all_v));
        }
    }
    Ok(apart)
}

/// Attention of one token over all, in f32.
fn exact(q: &Tensor, k: &Tensor, v: &Tensor, config: &AttendConfig) -> Result<Tensor> {
    let repeat = |x: &Tensor| -> Result<Tensor> {
        let (batch, heads, tokens, head_dim) = x.dims4()?;
        let grouped = (batch, heads, config.n_kv_groups, tokens, head_dim);
        let x = x.unsqueeze(2)?.expand(grouped)?;
        x.reshape((batch, heads * config.n_kv_groups, tokens, head_dim))
    };
    let logits = (q.matmul(&repeat(k)?.t()?)? * f64::from(config.softmax_scale))?;
    candle_nn::ops::softmax_last_dim(&logits)?.matmul(&repeat(v)?)
}
