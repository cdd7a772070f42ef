//! The decoder on a CUDA device against the same model in f64 on the host.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::bf16;
use leank_bench::{
    Error,
    decoder::{Activations, Decoder, DecoderConfig, MOST_ROWS, Number},
};
use leank_candle::{Part, RopeScaling, RopeTable};
use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, Error as CoreError, Layer,
    ModelMask, ModelShape, SequenceId, StepEntry, Windows, oracle,
};
use leank_cuda::{Cuda, CudaCache};
use leank_train::rng::Rng;

/// The device; `None`, loudly, where there is none.
fn cuda() -> Option<Cuda> {
    match Cuda::new(0) {
        Ok(cuda) => Some(cuda.with_poisoned_blocks()),
        Err(error @ CoreError::Unavailable { .. }) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// A decoder; `None`, loudly, where cuBLAS is missing.
fn decoder<T: Number>(cuda: &Cuda, config: &DecoderConfig) -> Option<Decoder<T>> {
    let mut source = |part| Ok(weight(config, part));
    match Decoder::load(cuda, config.clone(), &mut source) {
        Ok(decoder) => Some(decoder),
        Err(Error::Cache(error @ CoreError::Unavailable { .. })) => {
            eprintln!("SKIPPED: {error}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

fn tiny(qkv_bias: bool, rope_scaling: RopeScaling) -> DecoderConfig {
    DecoderConfig {
        shape: ModelShape::new(3, 4, 2, 64).unwrap(),
        hidden: 64,
        intermediate: 96,
        vocab: 203,
        epsilon: 1e-5,
        rope_base: 10_000.0,
        rope_scaling,
        positions: 300,
        qkv_bias,
    }
}

/// A part of the model: random, with rows of norm 1.
fn weight(config: &DecoderConfig, part: Part) -> Option<Vec<f32>> {
    let DecoderConfig { hidden, intermediate, vocab, .. } = *config;
    let head_dim = config.shape.head_dim;
    let (query, kv) = (config.shape.query_heads * head_dim, config.shape.kv_heads * head_dim);
    let (rows, columns) = match part {
        Part::Embedding => (vocab, hidden),
        // The embedding, where there are biases: as models with tied embeddings have it.
        Part::Output if config.qkv_bias => return None,
        Part::Output => (vocab, hidden),
        Part::OutputNorm | Part::AttentionNorm(_) | Part::MlpNorm(_) => (hidden, 1),
        Part::Query(_) => (query, hidden),
        Part::QueryBias(_) => (query, 1),
        Part::Key(_) | Part::Value(_) => (kv, hidden),
        Part::KeyBias(_) | Part::ValueBias(_) => (kv, 1),
        Part::AttentionOutput(_) => (hidden, query),
        Part::Gate(_) | Part::Up(_) => (intermediate, hidden),
        Part::Down(_) => (hidden, intermediate),
        _ => return None,
    };
    let mut hasher = DefaultHasher::new();
    format!("{part:?}").hash(&mut hasher);
    let mut random = Rng::new(hasher.finish());
    let scale = 1.0 / (columns as f64).sqrt();
    Some((0..rows * columns).map(|_| (random.normal() * scale) as f32).collect())
}

/// The model in f64, weights and cache rounded as the device holds them.
struct Reference<'a> {
    config: &'a DecoderConfig,
    cache: &'a CacheConfig,
    round: fn(f32) -> f32,
    rope: RopeTable,
    /// K and V of each layer.
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl<'a> Reference<'a> {
    fn new(config: &'a DecoderConfig, cache: &'a CacheConfig, round: fn(f32) -> f32) -> Self {
        let (base, scaling) = (config.rope_base, &config.rope_scaling);
        let rope = RopeTable::new(config.shape.head_dim, base, scaling, config.positions);
        let empty = vec![Vec::new(); config.shape.layers];
        Self { config, cache, round, rope, keys: empty.clone(), values: empty }
    }

    fn vector(&self, part: Part) -> Vec<f64> {
        weight(self.config, part).unwrap().into_iter().map(f64::from).collect()
    }

    /// `x Wᵀ`
    fn product(&self, part: Part, x: &[f64]) -> Vec<f64> {
        let weight = weight(self.config, part).unwrap();
        let round = |w: &f32| f64::from((self.round)(*w));
        let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| round(w) * x).sum();
        weight.chunks(x.len()).map(dot).collect()
    }

    fn norm(&self, part: Part, x: &[f64]) -> Vec<f64> {
        let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (square + f64::from(self.config.epsilon)).sqrt();
        self.vector(part).iter().zip(x).map(|(w, x)| w * x * scale).collect()
    }

    fn projection(
        &self,
        (part, bias): (Part, Part),
        x: &[f64],
        position: Option<usize>,
    ) -> Vec<f64> {
        let mut y = self.product(part, x);
        if self.config.qkv_bias {
            y.iter_mut().zip(self.vector(bias)).for_each(|(y, bias)| *y += bias);
        }
        let Some(position) = position else { return y };
        let half = self.config.shape.head_dim / 2;
        for head in y.chunks_mut(2 * half) {
            for c in 0..half {
                let at = position * half + c;
                let cosine = f64::from(self.rope.cosines()[at]);
                let sine = f64::from(self.rope.sines()[at]);
                let (low, high) = (head[c], head[c + half]);
                head[c] = low * cosine - high * sine;
                head[c + half] = high * cosine + low * sine;
            }
        }
        y
    }

    /// Logits of a step of one sequence, per token.
    fn step(&mut self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let DecoderConfig { shape, hidden, .. } = *self.config;
        let start = self.keys[0].len() / (shape.kv_heads * shape.head_dim);
        let embedding = weight(self.config, Part::Embedding).unwrap();
        let row = |&token: &u32| -> Vec<f64> {
            let row = &embedding[token as usize * hidden..][..hidden];
            row.iter().map(|&x| f64::from((self.round)(x))).collect()
        };
        let mut x: Vec<Vec<f64>> = tokens.iter().map(row).collect();
        for layer in 0..shape.layers {
            let mut queries = Vec::new();
            for (row, x) in x.iter().enumerate() {
                let position = Some(start + row);
                let normed = self.norm(Part::AttentionNorm(layer), x);
                let stored = |x: f64| f64::from(self.cache.dtype.round(x as f32));
                let parts = (Part::Query(layer), Part::QueryBias(layer));
                queries.extend(self.projection(parts, &normed, position));
                let parts = (Part::Key(layer), Part::KeyBias(layer));
                let keys = self.projection(parts, &normed, position);
                let parts = (Part::Value(layer), Part::ValueBias(layer));
                let values = self.projection(parts, &normed, None);
                self.keys[layer].extend(keys.into_iter().map(stored));
                self.values[layer].extend(values.into_iter().map(stored));
            }
            let attention = oracle::Attention {
                masks: self.cache.mask.layer(Layer(layer)),
                query_heads: shape.query_heads,
                windows: self.cache.windows,
                block: self.cache.block,
                scale: f64::from(self.cache.scale()),
                soft_cap: None,
                start,
                keys: &self.keys[layer],
                values: &self.values[layer],
                queries: &queries,
            };
            let attended = attention.output();
            for (x, attended) in
                x.iter_mut().zip(attended.chunks(shape.query_heads * shape.head_dim))
            {
                let out = self.product(Part::AttentionOutput(layer), attended);
                x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
                let normed = self.norm(Part::MlpNorm(layer), x);
                let gate = self.product(Part::Gate(layer), &normed);
                let up = self.product(Part::Up(layer), &normed);
                let silu = |x: f64| x / (1.0 + (-x).exp());
                let inner: Vec<f64> = gate.iter().zip(up).map(|(&g, up)| silu(g) * up).collect();
                let out = self.product(Part::Down(layer), &inner);
                x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            }
        }
        let head = if self.config.qkv_bias { Part::Embedding } else { Part::Output };
        x.iter().map(|x| self.product(head, &self.norm(Part::OutputNorm, x))).collect()
    }
}

fn lean(shape: ModelShape, dtype: Dtype) -> CacheConfig {
    let some = ChannelMask::new(shape.head_dim, (0..64).step_by(3).collect()).unwrap();
    let dead = ChannelMask::none(shape.head_dim);
    let heads = (0..shape.layers).flat_map(|_| [some.clone(), dead.clone()]).collect();
    let mask = ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads).unwrap();
    let windows = Windows { sink: 16, recent: 40 };
    CacheConfig { windows, block: 16, dtype, ..CacheConfig::new(shape, mask).unwrap() }
}

/// A device's side: several sequences.
struct Running<'a, T> {
    decoder: &'a Decoder<T>,
    activations: Activations<T>,
    cache: CudaCache,
    ids: Vec<SequenceId>,
}

impl<'a, T: Number> Running<'a, T> {
    fn new(cuda: &Cuda, decoder: &'a Decoder<T>, config: CacheConfig, sequences: usize) -> Self {
        let mut cache = cuda.create(config).unwrap();
        let ids = (0..sequences).map(|_| cache.add_sequence()).collect();
        Self { decoder, activations: decoder.activations(100).unwrap(), cache, ids }
    }

    fn entries(&self, pieces: &[&[u32]]) -> Vec<StepEntry> {
        self.ids.iter().zip(pieces).map(|(&id, piece)| StepEntry::decode(id, piece.len())).collect()
    }

    /// A step of these tokens of each sequence.
    fn step(&mut self, pieces: &[&[u32]]) -> (Vec<f32>, Vec<u32>) {
        let tokens = pieces.concat();
        let starts = self.ids.iter().map(|&id| self.cache.sequence_len(id).unwrap());
        let positions: Vec<u32> = starts
            .zip(pieces)
            .flat_map(|(start, piece)| (start..start + piece.len()).map(|position| position as u32))
            .collect();
        self.decoder.set_rows(&mut self.activations, &tokens, &positions).unwrap();
        self.cache.plan(&self.entries(pieces)).unwrap();
        self.forward();
        self.cache.commit().unwrap();
        self.decoder.results(&self.activations).unwrap()
    }

    fn forward(&mut self) {
        self.decoder.forward(&mut self.activations, &mut self.cache, true).unwrap();
    }
}

/// Two sequences of different lengths, in pieces and token by token; logits relative to the largest.
fn largest_error<T: Number>(
    config: &DecoderConfig,
    cache: &CacheConfig,
    round: fn(f32) -> f32,
) -> Option<f64> {
    let cuda = cuda()?;
    let decoder = decoder::<T>(&cuda, config)?;
    let mut running = Running::new(&cuda, &decoder, cache.clone(), 2);
    let mut references =
        [Reference::new(config, cache, round), Reference::new(config, cache, round)];
    let mut random = Rng::new(9);
    let (mut error, mut largest) = (0.0f64, 0.0f64);
    for lengths in [[70, 9], [21, 33], [1, 1], [30, 30], [1, 1], [1, 1], [1, 1]] {
        let tokens = lengths.map(|length: usize| -> Vec<u32> {
            (0..length).map(|_| random.below(config.vocab) as u32).collect()
        });
        let (logits, sampled) = running.step(&[&tokens[0], &tokens[1]]);
        let mut expected = references[0].step(&tokens[0]);
        expected.extend(references[1].step(&tokens[1]));
        assert_eq!(logits.len(), expected.len() * config.vocab);
        for ((logits, expected), sampled) in logits.chunks(config.vocab).zip(&expected).zip(sampled)
        {
            for (logit, expected) in logits.iter().zip(expected) {
                let off = (f64::from(*logit) - expected).abs();
                error = if off.is_nan() { f64::INFINITY } else { error.max(off) };
                largest = largest.max(expected.abs());
            }
            let first = logits.iter().position(|&it| it == logits[sampled as usize]);
            assert!(logits.iter().all(|&it| it <= logits[sampled as usize]));
            assert_eq!(first, Some(sampled as usize), "the first of the largest");
        }
    }
    eprintln!("logits up to {largest:.3} are off by up to {error:.2e}");
    Some(error / largest)
}

#[test]
fn logits_are_those_of_the_model() {
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 128.0 };
    for (bias, scaling) in [(false, llama3), (true, RopeScaling::None)] {
        let config = tiny(bias, scaling);
        let dense = CacheConfig { block: 16, ..CacheConfig::dense(config.shape).unwrap() };
        for cache in [dense, lean(config.shape, Dtype::F16)] {
            // Queries and weights of the softmax are rounded to f16 (2^-11).
            let Some(error) = largest_error::<f32>(&config, &cache, |w| w) else { return };
            assert!(error < 2e-3, "f32, bias {bias}: {error}");
        }
        // Everything that goes into products is rounded to bf16 (2^-8).
        let cache = lean(config.shape, Dtype::Bf16);
        let round = |w| bf16::from_f32(w).to_f32();
        let Some(error) = largest_error::<bf16>(&config, &cache, round) else { return };
        assert!(error < 3e-2, "bf16, bias {bias}: {error}");
    }
}

/// Steps whose tokens never leave the device, as one graph, are the steps that the host feeds.
#[test]
fn sampled_tokens_are_the_next_steps_input_also_in_graphs() {
    let Some(cuda) = cuda() else { return };
    let config = tiny(false, RopeScaling::None);
    let Some(decoder) = decoder::<bf16>(&cuda, &config) else { return };
    let cache = lean(config.shape, Dtype::Bf16);
    let mut fed = Running::new(&cuda, &decoder, cache.clone(), 2);
    let mut graphs = Running::new(&cuda, &decoder, cache, 2);
    let prompts: [Vec<u32>; 2] = [(0..90).collect(), (100..103).collect()];
    // One row of each sequence is left, so that the next step's rows follow.
    for (prompt, i) in [(&prompts[0][..89], 0), (&prompts[1][..2], 1)] {
        for side in [&mut fed, &mut graphs] {
            let ids = side.ids.clone();
            side.ids = vec![ids[i]];
            side.step(&[prompt]);
            side.ids = ids;
        }
    }
    let last = [&prompts[0][89..], &prompts[1][2..]];
    let (_, mut next) = fed.step(&last);
    assert_eq!(graphs.step(&last).1, next);
    let mut captured = None;
    for _ in 0..40 {
        let (logits, sampled) = fed.step(&[&next[..1], &next[1..]]);
        next = sampled;
        graphs.cache.plan(&graphs.entries(&[&[0], &[0]])).unwrap();
        let key = graphs.cache.capture_key();
        let kept = captured.take().filter(|(captured, _)| *captured == key);
        let (key, graph) = kept.unwrap_or_else(|| {
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            cuda.stream().begin_capture(mode).unwrap();
            graphs.forward();
            let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            (key, cuda.stream().end_capture(flags).unwrap().unwrap())
        });
        graph.launch().unwrap();
        graphs.cache.mark_appended().unwrap();
        graphs.cache.commit().unwrap();
        let (own_logits, own) = decoder.results(&graphs.activations).unwrap();
        captured = Some((key, graph));
        assert_eq!(own, next);
        assert_eq!(own_logits, logits);
    }
}

/// What steps are refused, before anything is given to the device.
#[test]
fn what_would_not_fit_the_decoder_is_refused() {
    let Some(cuda) = cuda() else { return };
    let config = tiny(false, RopeScaling::None);
    let Some(decoder) = decoder::<f32>(&cuda, &config) else { return };
    for rows in [0, MOST_ROWS + 1] {
        assert!(matches!(decoder.activations(rows), Err(Error::Option { .. })), "{rows} rows");
    }
    let dense = CacheConfig::dense(config.shape).unwrap();
    let mut cache = cuda.create(dense.clone()).unwrap();
    let mut activations = decoder.activations(2).unwrap();
    let error = decoder.forward(&mut activations, &mut cache, true).unwrap_err().to_string();
    assert!(error.contains("set_rows"), "{error}");

    decoder.set_rows(&mut activations, &[0], &[0]).unwrap();
    let elsewhere = cuda.clone().on_stream(cuda.stream().context().new_stream().unwrap()).unwrap();
    let mut other = elsewhere.create(dense).unwrap();
    let error = decoder.forward(&mut activations, &mut other, true).unwrap_err();
    assert!(matches!(error, Error::Cache(CoreError::Mismatch { .. })), "{error}");

    let Some(other) = self::decoder::<f32>(&cuda, &config) else { return };
    let error = other.forward(&mut activations, &mut cache, true).unwrap_err().to_string();
    assert!(error.contains("another decoder's"), "{error}");
    assert!(other.set_rows(&mut activations, &[0], &[0]).is_err());
    assert!(other.results(&activations).is_err() && other.tune(&activations).is_err());
}

/// Behind the last position that RoPE is there for, that one is used again.
#[test]
fn positions_stay_in_the_table() {
    let Some(cuda) = cuda() else { return };
    let config = tiny(false, RopeScaling::None);
    let Some(decoder) = decoder::<f32>(&cuda, &config) else { return };
    let mut sides =
        [0, 1].map(|_| Running::new(&cuda, &decoder, CacheConfig::dense(config.shape).unwrap(), 1));
    let mut logits = Vec::new();
    for (side, fed) in sides.iter_mut().zip([false, true]) {
        let mut sampled = vec![7];
        for step in 0..4 {
            if fed || step == 0 {
                decoder.set_rows(&mut side.activations, &sampled, &[299]).unwrap();
            }
            side.cache.plan(&side.entries(&[&[0]])).unwrap();
            side.forward();
            side.cache.commit().unwrap();
            let (found, next) = decoder.results(&side.activations).unwrap();
            logits.push(found);
            sampled = next;
        }
    }
    assert_eq!(logits[..4], logits[4..]);
}

/// What rows are refused, before anything is given to the device.
#[test]
fn rows_that_kernels_could_not_take_are_refused() {
    let Some(cuda) = cuda() else { return };
    let config = tiny(false, RopeScaling::None);
    let Some(decoder) = decoder::<f32>(&cuda, &config) else { return };
    let mut activations = decoder.activations(2).unwrap();
    let mut refused = |tokens: &[u32], positions: &[u32]| {
        let error = decoder.set_rows(&mut activations, tokens, positions).unwrap_err();
        assert!(matches!(error, Error::Option { .. }), "{error}");
        error.to_string()
    };
    assert!(refused(&[203], &[0]).contains("below 203"));
    assert!(refused(&[0], &[300]).contains("below 300"));
    refused(&[0, 0, 0], &[0, 1, 2]);
    refused(&[0], &[0, 1]);
    refused(&[], &[]);
    assert!(decoder.set_rows(&mut activations, &[202, 0], &[299, 0]).is_ok());
}
