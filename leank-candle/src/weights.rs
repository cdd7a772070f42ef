//! The weights of a model, from whichever file format.

use std::collections::HashSet;

use crate::Result;
use crate::config::ModelConfig;
use crate::linear::{Linear, Matrix};
use crate::ops::RmsNorm;

/// How weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// Widened to f32: exact, fast for prompts, needed for gradients; four bytes per weight.
    #[default]
    F32,
    /// As the GGUF file holds them: small, and slower (the README has numbers). Products quantize
    /// activations to 8 bits on the fly, so logits differ from [`Precision::F32`]. Unquantized weights
    /// (and all of a safetensors folder), and rows of an odd number of Q4_1, Q5_0 or Q5_1 blocks,
    /// are widened to f32.
    AsStored,
}

/// A tensor by its place in the model; the number is that of the layer. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// `[vocab, hidden]`.
    Embedding,
    /// Weights of the last RMS norm, `[hidden]`.
    OutputNorm,
    /// `[vocab, hidden]`; the embedding where both are tied.
    Output,
    /// Weights of the RMS norm before the attention, `[hidden]`.
    AttentionNorm(usize),
    /// `[query heads * head_dim, hidden]`, channels in Hugging Face's order.
    Query(usize),
    /// `[query heads * head_dim]`.
    QueryBias(usize),
    /// `[KV heads * head_dim, hidden]`, channels in Hugging Face's order.
    Key(usize),
    /// `[KV heads * head_dim]`.
    KeyBias(usize),
    /// `[KV heads * head_dim, hidden]`.
    Value(usize),
    /// `[KV heads * head_dim]`.
    ValueBias(usize),
    /// `[hidden, query heads * head_dim]`.
    AttentionOutput(usize),
    /// Weights of the RMS norm before the MLP, `[hidden]`.
    MlpNorm(usize),
    /// `[intermediate, hidden]`.
    Gate(usize),
    /// `[intermediate, hidden]`.
    Up(usize),
    /// `[hidden, intermediate]`.
    Down(usize),
}

impl Part {
    /// The parts of layer `l`.
    fn of_layer(l: usize, qkv_bias: bool) -> impl Iterator<Item = Self> {
        let biases = [Self::QueryBias(l), Self::KeyBias(l), Self::ValueBias(l)];
        [
            Self::AttentionNorm(l),
            Self::Query(l),
            Self::Key(l),
            Self::Value(l),
            Self::AttentionOutput(l),
            Self::MlpNorm(l),
            Self::Gate(l),
            Self::Up(l),
            Self::Down(l),
        ]
        .into_iter()
        .chain(biases.into_iter().filter(move |_| qkv_bias))
    }

    /// Name in GGUF files.
    pub(crate) fn gguf_name(self) -> String {
        match self {
            Self::Embedding => "token_embd.weight".into(),
            Self::OutputNorm => "output_norm.weight".into(),
            Self::Output => "output.weight".into(),
            Self::AttentionNorm(l) => format!("blk.{l}.attn_norm.weight"),
            Self::Query(l) => format!("blk.{l}.attn_q.weight"),
            Self::QueryBias(l) => format!("blk.{l}.attn_q.bias"),
            Self::Key(l) => format!("blk.{l}.attn_k.weight"),
            Self::KeyBias(l) => format!("blk.{l}.attn_k.bias"),
            Self::Value(l) => format!("blk.{l}.attn_v.weight"),
            Self::ValueBias(l) => format!("blk.{l}.attn_v.bias"),
            Self::AttentionOutput(l) => format!("blk.{l}.attn_output.weight"),
            Self::MlpNorm(l) => format!("blk.{l}.ffn_norm.weight"),
            Self::Gate(l) => format!("blk.{l}.ffn_gate.weight"),
            Self::Up(l) => format!("blk.{l}.ffn_up.weight"),
            Self::Down(l) => format!("blk.{l}.ffn_down.weight"),
        }
    }

    /// Name in Hugging Face's safetensors files.
    pub(crate) fn hf_name(self) -> String {
        match self {
            Self::Embedding => "model.embed_tokens.weight".into(),
            Self::OutputNorm => "model.norm.weight".into(),
            Self::Output => "lm_head.weight".into(),
            Self::AttentionNorm(l) => format!("model.layers.{l}.input_layernorm.weight"),
            Self::Query(l) => format!("model.layers.{l}.self_attn.q_proj.weight"),
            Self::QueryBias(l) => format!("model.layers.{l}.self_attn.q_proj.bias"),
            Self::Key(l) => format!("model.layers.{l}.self_attn.k_proj.weight"),
            Self::KeyBias(l) => format!("model.layers.{l}.self_attn.k_proj.bias"),
            Self::Value(l) => format!("model.layers.{l}.self_attn.v_proj.weight"),
            Self::ValueBias(l) => format!("model.layers.{l}.self_attn.v_proj.bias"),
            Self::AttentionOutput(l) => format!("model.layers.{l}.self_attn.o_proj.weight"),
            Self::MlpNorm(l) => format!("model.layers.{l}.post_attention_layernorm.weight"),
            Self::Gate(l) => format!("model.layers.{l}.mlp.gate_proj.weight"),
            Self::Up(l) => format!("model.layers.{l}.mlp.up_proj.weight"),
            Self::Down(l) => format!("model.layers.{l}.mlp.down_proj.weight"),
        }
    }
}

/// What a layer may hold, for messages.
pub(crate) const SUPPORTED_TENSORS: &str =
    "per layer the two norms, q, k, v (with biases in qwen2), o, gate, up and down";

/// The first of a file's tensors that belongs to a layer, by its prefix, and is none of the model's
/// parts: what it would do to the forward pass is unknown here, so the model must not run without it.
pub(crate) fn foreign<'a>(
    names: impl Iterator<Item = &'a String>,
    prefix: &str,
    name_of: impl Fn(Part) -> String,
    config: &ModelConfig,
) -> Option<&'a String> {
    let parts = |layer| Part::of_layer(layer, config.qkv_bias);
    let known: HashSet<String> = (0..config.shape.layers).flat_map(parts).map(name_of).collect();
    names.filter(|name| name.starts_with(prefix) && !known.contains(*name)).min()
}

/// Where tensors come from; q and k in Hugging Face's order of channels.
pub(crate) trait Source {
    /// A vector of `len` f32.
    fn vector(&mut self, part: Part, len: usize) -> Result<Vec<f32>>;
    /// A matrix of `rows` x `cols`.
    fn matrix(&mut self, part: Part, rows: usize, cols: usize) -> Result<Matrix>;
}

/// One layer.
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: RmsNorm,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) mlp_norm: RmsNorm,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// All weights of a model.
pub(crate) struct Weights {
    pub(crate) embedding: Matrix,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) norm: RmsNorm,
    pub(crate) output: Linear,
}

impl Weights {
    /// Loads everything that `config` says there is.
    pub(crate) fn load(source: &mut dyn Source, config: &ModelConfig) -> Result<Self> {
        let embedding = source.matrix(Part::Embedding, config.vocab, config.hidden)?;
        let output = if config.tied_embeddings {
            embedding.clone()
        } else {
            source.matrix(Part::Output, config.vocab, config.hidden)?
        };
        let layers = (0..config.shape.layers)
            .map(|layer| LayerWeights::load(source, config, layer))
            .collect::<Result<_>>()?;
        let norm = norm(source, config, Part::OutputNorm)?;
        Ok(Self { embedding, layers, norm, output: Linear::new(output, None)? })
    }

    /// A part, row after row, widened to f32; `None` where the model has no such part.
    pub(crate) fn values(&self, part: Part) -> Result<Option<Vec<f32>>> {
        let layer = |l: usize| self.layers.get(l);
        let matrix = |linear: Option<&Linear>| linear.map(Linear::weight).transpose();
        let bias = |linear: Option<&Linear>| match linear {
            Some(linear) => linear.bias(),
            None => Ok(None),
        };
        let norm = |norm: Option<&RmsNorm>| Ok(norm.map(|norm| norm.weight.to_vec()));
        match part {
            Part::Embedding => self.embedding.values().map(Some),
            Part::OutputNorm => norm(Some(&self.norm)),
            Part::Output => matrix(Some(&self.output)),
            Part::AttentionNorm(l) => norm(layer(l).map(|layer| &layer.attention_norm)),
            Part::Query(l) => matrix(layer(l).map(|layer| &layer.query)),
            Part::QueryBias(l) => bias(layer(l).map(|layer| &layer.query)),
            Part::Key(l) => matrix(layer(l).map(|layer| &layer.key)),
            Part::KeyBias(l) => bias(layer(l).map(|layer| &layer.key)),
            Part::Value(l) => matrix(layer(l).map(|layer| &layer.value)),
            Part::ValueBias(l) => bias(layer(l).map(|layer| &layer.value)),
            Part::AttentionOutput(l) => matrix(layer(l).map(|layer| &layer.output)),
            Part::MlpNorm(l) => norm(layer(l).map(|layer| &layer.mlp_norm)),
            Part::Gate(l) => matrix(layer(l).map(|layer| &layer.gate)),
            Part::Up(l) => matrix(layer(l).map(|layer| &layer.up)),
            Part::Down(l) => matrix(layer(l).map(|layer| &layer.down)),
        }
    }

    /// Weights of all norms, layer after layer and the last norm at the end.
    pub(crate) fn norms(&self) -> impl Iterator<Item = &[f32]> {
        self.layers
            .iter()
            .flat_map(|layer| [&layer.attention_norm, &layer.mlp_norm])
            .chain([&self.norm])
            .map(|norm| &*norm.weight)
    }
}

impl LayerWeights {
    fn load(source: &mut dyn Source, config: &ModelConfig, layer: usize) -> Result<Self> {
        let (hidden, mlp) = (config.hidden, config.intermediate);
        let (q, kv) = (config.query_width(), config.kv_width());
        let mut projection = |part: Part, bias: Part, rows: usize| {
            let weight = source.matrix(part, rows, hidden)?;
            let bias = config.qkv_bias.then(|| source.vector(bias, rows)).transpose()?;
            Linear::new(weight, bias)
        };
        let query = projection(Part::Query(layer), Part::QueryBias(layer), q)?;
        let key = projection(Part::Key(layer), Part::KeyBias(layer), kv)?;
        let value = projection(Part::Value(layer), Part::ValueBias(layer), kv)?;
        let mut plain = |part: Part, rows: usize, cols: usize| {
            Linear::new(source.matrix(part, rows, cols)?, None)
        };
        Ok(Self {
            query,
            key,
            value,
            output: plain(Part::AttentionOutput(layer), hidden, q)?,
            gate: plain(Part::Gate(layer), mlp, hidden)?,
            up: plain(Part::Up(layer), mlp, hidden)?,
            down: plain(Part::Down(layer), hidden, mlp)?,
            attention_norm: norm(source, config, Part::AttentionNorm(layer))?,
            mlp_norm: norm(source, config, Part::MlpNorm(layer))?,
        })
    }
}

fn norm(source: &mut dyn Source, config: &ModelConfig, part: Part) -> Result<RmsNorm> {
    let weight = source.vector(part, config.hidden)?.into();
    Ok(RmsNorm { weight, eps: config.rms_eps as f32 })
}
