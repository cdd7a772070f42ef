//! What one sequence tells about the attention of every layer: queries, keys, values and how much
//! the model's predictions depend on each attention output.
//!
//! **Fisher probe.** `g = ∂/∂o Σ_t log p(y_t)`, where `o` is a layer's attention output before the
//! output projection and `y_t` is drawn from the model's own distribution at position `t`. The
//! gradient is total: it goes through all later layers, and through the keys and values that the
//! positions leave for each other. The expectation of `g gᵀ` over draws is then the Fisher
//! information: a small change δ of `o` moves the predictions by `½ E[(g·δ)²]` nats of KL.
//!
//! **Random probe.** `g ~ N(0, I) / √E‖o‖²` per layer, where the expectation runs over the positions
//! and query heads of the sequence and ‖o‖ is the norm of one head's output vector. It needs no
//! gradients and knows nothing of what matters to the model.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result as CandleResult, Shape, Tensor, Var,
};
use leank_core::ModelShape;
use leank_train::dump::Probe;
use leank_train::rng::Rng;
use rayon::prelude::*;

use crate::dense::{DenseAttention, LayerKv, check_queries};
use crate::model::{Attention, Model};
use crate::ops::{contiguous, with_slice};
use crate::rows;
use crate::{Error, Precision, Result};

/// How to probe a sequence.
#[derive(Clone, Copy, Debug)]
pub struct ProbeOptions {
    /// Tokens before the first decode position: at least one.
    pub prefix: usize,
    /// The kind of probe.
    pub probe: Probe,
    /// Draws, `R`: at least one.
    pub draws: usize,
    /// Seed of the draws; the same seed gives the same probe.
    pub seed: u64,
}

/// One layer of a probed sequence of T prefix tokens and N decode positions, f32, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerProbe {
    /// Queries after RoPE, `[query_heads, N, head_dim]`.
    pub q: Vec<f32>,
    /// Keys after RoPE, `[kv_heads, T + N, head_dim]`.
    pub k: Vec<f32>,
    /// Values, `[kv_heads, T + N, head_dim]`.
    pub v: Vec<f32>,
    /// Attention outputs before the output projection, `[query_heads, N, head_dim]`.
    pub o: Vec<f32>,
    /// The probe, `[R, query_heads, N, head_dim]`.
    pub g: Vec<f32>,
}

/// A probed sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceProbe {
    /// Global layers in order: the only ones that a mask covers.
    pub layers: Vec<LayerProbe>,
    /// The tokens drawn at every position, per draw; empty for the random probe.
    pub drawn: Vec<Vec<u32>>,
}

/// Probes the sequence `tokens`: its first `options.prefix` tokens as a prompt, the rest as decode
/// positions, all with full attention (in sliding layers: over their window).
///
/// # Errors
/// [`Error::Option`] for a prefix without rest, no draws, or a Fisher probe of a model that is not
/// [`Precision::F32`]; what [`Model::hidden`] returns.
pub fn probe(model: &Model, tokens: &[u32], options: &ProbeOptions) -> Result<SequenceProbe> {
    check(model, tokens, options)?;
    model.config().global_shape()?;
    let (prompt, rest) = tokens.split_at(options.prefix);
    let mut dense = DenseAttention::new(model.config(), tokens.len());
    dense.prefill(model, prompt)?;
    let fisher = options.probe == Probe::Fisher;
    let mut recorder = Recorder::new(dense, rest.len(), fisher)?;
    let positions: Vec<usize> = (prompt.len()..tokens.len()).collect();
    let hidden = model.hidden(rest, &positions, &mut recorder)?;
    let mut rng = Rng::new(options.seed);
    if fisher {
        let drawn = fisher_gradients(model, &hidden, &mut recorder, options.draws, &mut rng)?;
        recorder.finish(drawn)
    } else {
        recorder.random_gradients(options.draws, &mut rng);
        recorder.finish(Vec::new())
    }
}

fn check(model: &Model, tokens: &[u32], options: &ProbeOptions) -> Result<()> {
    if options.prefix == 0 || options.prefix >= tokens.len() {
        let why = format!(
            "a prefix of {} of {} tokens leaves no prompt or no decode positions",
            options.prefix,
            tokens.len()
        );
        return Err(Error::option("prefix", why));
    }
    if options.draws == 0 {
        return Err(Error::option("draws", "0 draws measure nothing; take at least 1"));
    }
    if options.probe == Probe::Fisher && model.precision() != Precision::F32 {
        return Err(Error::option(
            "probe",
            "the Fisher probe needs gradients and the model was loaded as stored; load it with Precision::F32 or use the random probe",
        ));
    }
    Ok(())
}

/// Dense attention that notes what passes and lets gradients be taken at its outputs.
struct Recorder {
    shape: ModelShape,
    dense: DenseAttention,
    positions: usize,
    /// The global layers, which are recorded.
    global: Vec<usize>,
    /// Zeros added to each of their outputs, whose gradient is the output's; none for no gradients.
    nudges: Vec<Var>,
    layers: Vec<LayerProbe>,
}

impl Recorder {
    fn new(dense: DenseAttention, positions: usize, gradients: bool) -> Result<Self> {
        let shape = dense.shape();
        let zeros = || {
            let dims = (positions, shape.query_heads, shape.head_dim);
            Var::zeros(dims, DType::F32, &Device::Cpu)
        };
        let global: Vec<usize> = dense.global_layers().collect();
        let count = if gradients { global.len() } else { 0 };
        let nudges = (0..count).map(|_| zeros()).collect::<CandleResult<_>>()?;
        Ok(Self { shape, dense, positions, global, nudges, layers: Vec::new() })
    }

    /// `[N, query_heads, head_dim]` to `[query_heads, N, head_dim]`.
    fn by_head(&self, rows: &[f32]) -> Vec<f32> {
        let ModelShape { query_heads, head_dim, .. } = self.shape;
        let row = |h: usize, t: usize| &rows[(t * query_heads + h) * head_dim..][..head_dim];
        let pairs = (0..query_heads).flat_map(|h| (0..self.positions).map(move |t| (h, t)));
        pairs.flat_map(|(h, t)| row(h, t)).copied().collect()
    }

    fn random_gradients(&mut self, draws: usize, rng: &mut Rng) {
        for layer in &mut self.layers {
            let heads = layer.o.len() / self.shape.head_dim;
            let square: f64 = layer.o.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            // A layer that says nothing stays with finite probes.
            let factor = 1.0 / (square / heads as f64).sqrt().max(f64::from(f32::MIN_POSITIVE));
            let n = draws * layer.o.len();
            layer.g = (0..n).map(|_| (rng.normal() * factor.min(1e6)) as f32).collect();
        }
    }

    /// Adds keys and values of all tokens, which are complete only now.
    fn finish(mut self, drawn: Vec<Vec<u32>>) -> Result<SequenceProbe> {
        for (layer, &index) in self.layers.iter_mut().zip(&self.global) {
            (layer.k, layer.v) = self.dense.packed_kv(index)?;
        }
        Ok(SequenceProbe { layers: self.layers, drawn })
    }
}

impl Attention for Recorder {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (kv, past) = self.dense.append(layer, k, v)?;
        check_queries(&self.shape, q, k)?;
        let window = self.dense.windows()[layer];
        let out = q.apply_op3(k, v, CausalOp { kv, shape: self.shape, past, window })?;
        if window.is_some() {
            return Ok(out);
        }
        let queries = with_slice(q, |q| Ok(self.by_head(q)))?;
        let o = with_slice(&out, |o| Ok(self.by_head(o)))?;
        self.layers.push(LayerProbe { q: queries, k: vec![], v: vec![], o, g: vec![] });
        match self.nudges.get(self.layers.len() - 1) {
            Some(nudge) => Ok((out + nudge.as_tensor())?),
            None => Ok(out),
        }
    }
}

/// Draws tokens, takes one backward pass per draw, and leaves the gradients in `recorder`.
fn fisher_gradients(
    model: &Model,
    hidden: &Tensor,
    recorder: &mut Recorder,
    draws: usize,
    rng: &mut Rng,
) -> Result<Vec<Vec<u32>>> {
    let vocab = model.config().vocab;
    let mut probabilities: Vec<f32> = model.logits(&hidden.detach())?.flatten_all()?.to_vec1()?;
    probabilities.par_chunks_mut(vocab).for_each(|row| {
        let sum = rows::exp_row(row);
        rows::scale_row(row, 1.0 / sum);
    });
    let mut drawn = Vec::new();
    for _ in 0..draws {
        let tokens: Vec<u32> =
            probabilities.chunks_exact(vocab).map(|row| draw(row, rng.uniform())).collect();
        // d log p(y) / d logits = onehot(y) - p; the rest of the way is one backward pass from
        // the hidden states, whose gradient this is after the output layer.
        let mut d_logits: Vec<f32> = probabilities.iter().map(|p| -p).collect();
        for (row, &token) in d_logits.chunks_exact_mut(vocab).zip(&tokens) {
            row[token as usize] += 1.0;
        }
        let d_logits = Tensor::from_vec(d_logits, (tokens.len(), vocab), &Device::Cpu)?;
        let d_hidden = model.output().backward(&d_logits)?;
        let grads = (hidden * d_hidden)?.sum_all()?.backward()?;
        for layer in 0..recorder.layers.len() {
            let grad = grads.get(&recorder.nudges[layer]).ok_or_else(|| {
                Error::mismatch("gradients", "one per layer", format!("none for layer {layer}"))
            })?;
            let g = with_slice(grad, |grad| Ok(recorder.by_head(grad)))?;
            recorder.layers[layer].g.extend(g);
        }
        drawn.push(tokens);
    }
    Ok(drawn)
}

/// The token at which the cumulated probability passes `u`, which is in [0, 1).
fn draw(probabilities: &[f32], u: f64) -> u32 {
    let mut cumulated = 0.0;
    let mut last = 0;
    for (token, &p) in (0u32..).zip(probabilities) {
        if p > 0.0 {
            cumulated += f64::from(p);
            last = token;
            if cumulated > u {
                break;
            }
        }
    }
    last
}

/// Dense attention with gradients for its queries and for the keys and values of their tokens.
struct CausalOp {
    /// Everything seen, the queries' own tokens included.
    kv: Arc<LayerKv>,
    shape: ModelShape,
    past: usize,
    window: Option<usize>,
}

impl CustomOp3 for CausalOp {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        _k: &CpuStorage,
        _k_layout: &Layout,
        _v: &CpuStorage,
        _v_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (tokens, _, _) = q_layout.shape().dims3()?;
        let causal = self.kv.causal(self.shape, self.past, self.window);
        let out = causal.forward(contiguous(q, q_layout)?, tokens);
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let tokens = q.dim(0)?;
        let causal = self.kv.causal(self.shape, self.past, self.window);
        let grads =
            with_slice(q, |q| with_slice(grad, |grad| Ok(causal.backward(q, grad, tokens))))?;
        let like = |values: Vec<f32>, tensor: &Tensor| {
            Tensor::from_vec(values, tensor.shape(), tensor.device()).map(Some)
        };
        Ok((like(grads.queries, q)?, like(grads.keys, k)?, like(grads.values, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;
    use crate::config::MAX_LAYERS;
    use crate::testing::TinyModel;

    const PREFIX: usize = 11;
    const POSITIONS: usize = 6;

    fn tokens() -> Vec<u32> {
        (0..PREFIX + POSITIONS).map(|i| (i * 13 % 60) as u32).collect()
    }

    fn options(probe: Probe) -> ProbeOptions {
        ProbeOptions { prefix: PREFIX, probe, draws: 2, seed: 9 }
    }

    /// Dense attention that adds `step * direction` to the output of one layer at the decode
    /// positions.
    struct Nudged {
        dense: DenseAttention,
        layer: usize,
        nudge: Tensor,
    }

    impl Attention for Nudged {
        fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
            let out = self.dense.attend(layer, q, k, v)?;
            if layer == self.layer { Ok((out + &self.nudge)?) } else { Ok(out) }
        }
    }

    /// Σ log p(drawn) in f64 after the nudge.
    fn log_likelihood(model: &Model, drawn: &[u32], layer: usize, nudge: Tensor) -> f64 {
        let tokens = tokens();
        let mut dense = DenseAttention::new(model.config(), 0);
        dense.prefill(model, &tokens[..PREFIX]).unwrap();
        let positions: Vec<usize> = (PREFIX..tokens.len()).collect();
        let mut nudged = Nudged { dense, layer, nudge };
        let hidden = model.hidden(&tokens[PREFIX..], &positions, &mut nudged).unwrap();
        let logits = model.logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
        let log_p = |(row, &token): (&Vec<f32>, &u32)| {
            let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            f64::from(row[token as usize]) - sum.ln()
        };
        logits.iter().zip(drawn).map(log_p).sum()
    }

    #[test]
    fn fisher_probe_is_the_gradient_of_the_log_likelihood() {
        for tiny in TinyModel::all() {
            let model = tiny.load();
            let shape = model.config().shape();
            let global = model.config().global_layers();
            let probed = probe(&model, &tokens(), &options(Probe::Fisher)).unwrap();
            let dims = (shape.query_heads, POSITIONS, shape.head_dim);
            let size = dims.0 * dims.1 * dims.2;
            let mut rng = Rng::new(77);
            assert_eq!(probed.layers.len(), global.len());
            for (index, &layer) in global.iter().enumerate() {
                for (draw, drawn) in probed.drawn.iter().enumerate() {
                    let direction: Vec<f32> = (0..size).map(|_| rng.normal() as f32).collect();
                    let g = &probed.layers[index].g[draw * size..][..size];
                    let expected: f64 =
                        g.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                    let direction = Tensor::from_vec(direction, dims, &Device::Cpu).unwrap();
                    let direction = direction.transpose(0, 1).unwrap();
                    let at = |step: f64| {
                        let nudge = (&direction * step).unwrap().contiguous().unwrap();
                        log_likelihood(&model, drawn, layer, nudge)
                    };
                    let step = 2e-3;
                    let numeric = (at(step) - at(-step)) / (2.0 * step);
                    assert!(
                        (numeric - expected).abs() < 2e-2 * (0.1 + expected.abs()),
                        "layer {layer}, draw {draw}: {numeric} by differences, {expected} by the probe"
                    );
                }
            }
        }
    }

    /// On the stack of a thread, which is a quarter of a process's.
    #[test]
    fn the_deepest_model_has_a_backward_pass() {
        let model = TinyModel::with_layers(MAX_LAYERS, Family::Llama, true, 6).load();
        let tokens = [3, 1, 2];
        let options = ProbeOptions { prefix: 2, probe: Probe::Fisher, draws: 1, seed: 9 };
        let probe = || probe(&model, &tokens, &options).unwrap().layers.len();
        let probed = std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().stack_size(2 << 20);
            builder.spawn_scoped(scope, probe).unwrap().join().unwrap()
        });
        assert_eq!(probed, MAX_LAYERS);
    }

    #[test]
    fn recorded_activations_explain_each_other() {
        let model = TinyModel::llama().load();
        let shape = model.config().shape();
        let probed = probe(&model, &tokens(), &options(Probe::Fisher)).unwrap();
        let (dim, all) = (shape.head_dim, PREFIX + POSITIONS);
        for layer in &probed.layers {
            for head in 0..shape.query_heads {
                for t in 0..POSITIONS {
                    let q = &layer.q[(head * POSITIONS + t) * dim..][..dim];
                    let base = head / shape.group() * all * dim;
                    let row =
                        |rows: &[f32], j: usize, c: usize| f64::from(rows[base + j * dim + c]);
                    let seen = PREFIX + t + 1;
                    let p: Vec<f64> = (0..seen)
                        .map(|j| {
                            let dot: f64 =
                                (0..dim).map(|c| f64::from(q[c]) * row(&layer.k, j, c)).sum();
                            (dot / (dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let sum: f64 = p.iter().sum();
                    for c in 0..dim {
                        let want: f64 = (0..seen).map(|j| p[j] / sum * row(&layer.v, j, c)).sum();
                        let got = layer.o[(head * POSITIONS + t) * dim + c];
                        assert!((f64::from(got) - want).abs() < 1e-4);
                    }
                }
            }
        }
    }

    #[test]
    fn a_seed_decides_everything_and_draws_differ() {
        let model = TinyModel::llama().load();
        for kind in [Probe::Fisher, Probe::Random] {
            let first = probe(&model, &tokens(), &options(kind)).unwrap();
            assert_eq!(first, probe(&model, &tokens(), &options(kind)).unwrap());
            let other = ProbeOptions { seed: 10, ..options(kind) };
            assert_ne!(first, probe(&model, &tokens(), &other).unwrap());
            let (a, b) = first.layers[0].g.split_at(first.layers[0].g.len() / 2);
            assert_ne!(a, b);
        }
    }

    #[test]
    fn random_probe_has_the_stated_scale() {
        let model = TinyModel::llama().load();
        let wide = ProbeOptions { draws: 64, ..options(Probe::Random) };
        let probed = probe(&model, &tokens(), &wide).unwrap();
        let dim = model.config().shape().head_dim;
        let mean_square =
            |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
        for layer in &probed.layers {
            let expected = 1.0 / (mean_square(&layer.o) * dim as f64);
            assert!((mean_square(&layer.g) / expected - 1.0).abs() < 0.1);
        }
    }

    #[test]
    fn drawing_follows_the_probabilities() {
        let p = [0.0, 0.25, 0.0, 0.75, 0.0];
        assert_eq!(draw(&p, 0.0), 1);
        assert_eq!(draw(&p, 0.2499), 1);
        assert_eq!(draw(&p, 0.25), 3);
        // Rounding may leave the sum below u: the last possible token then.
        assert_eq!(draw(&p, 0.999_999_999_999), 3);
    }

    #[test]
    fn impossible_options_are_errors() {
        let model = TinyModel::llama().load();
        for (prefix, draws) in [(0, 1), (17, 1), (18, 1), (5, 0)] {
            let options = ProbeOptions { prefix, draws, ..options(Probe::Fisher) };
            assert!(matches!(probe(&model, &tokens(), &options), Err(Error::Option { .. })));
        }
    }
}
