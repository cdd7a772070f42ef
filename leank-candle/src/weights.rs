//! The weights of a model, from whichever file format.

use std::collections::HashSet;

use crate::Result;
use crate::config::{Family, ModelConfig};
use crate::linear::{Linear, Matrix};
use crate::ops::RmsNorm;

/// How weights are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// Widened to f32: exact, fast for prompts, needed for gradients; four bytes per weight.
    #[default]
    F32,
    /// As the GGUF file holds them: small, and faster token by token, which reads every weight once.
    /// Products are those of the widened weights, but for Q2_K and Q3_K, where candle's quantize
    /// activations to 8 bits and logits differ from [`Precision::F32`]. Unquantized weights (and all of a
    /// safetensors folder) are widened to f32.
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
    /// Weights of the RMS norm of every query head before RoPE, `[head_dim]`, times
    /// [`ModelConfig::query_scale`].
    QueryNorm(usize),
    /// Weights of the RMS norm of every key head before RoPE, `[head_dim]`.
    KeyNorm(usize),
    /// Weights of the RMS norm after the attention (Gemma 3), `[hidden]`.
    PostAttentionNorm(usize),
    /// Weights of the RMS norm before the MLP, `[hidden]`.
    MlpNorm(usize),
    /// Weights of the RMS norm after the MLP (Gemma 3), `[hidden]`.
    PostMlpNorm(usize),
    /// `[intermediate, hidden]`.
    Gate(usize),
    /// `[intermediate, hidden]`.
    Up(usize),
    /// `[hidden, intermediate]`.
    Down(usize),
}

impl Part {
    /// The parts of layer `l`.
    fn of_layer(l: usize, config: &ModelConfig) -> impl Iterator<Item = Self> {
        let (family, qkv_bias) = (config.family, config.qkv_bias);
        let biases = [Self::QueryBias(l), Self::KeyBias(l), Self::ValueBias(l)];
        let head_norms = [Self::QueryNorm(l), Self::KeyNorm(l)];
        let post_norms = [Self::PostAttentionNorm(l), Self::PostMlpNorm(l)];
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
        .chain(head_norms.into_iter().filter(move |_| family.has_head_norms()))
        .chain(post_norms.into_iter().filter(move |_| family.has_post_norms()))
    }

    /// Whether it is the weights of an RMS norm.
    pub(crate) fn is_norm(self) -> bool {
        matches!(
            self,
            Self::OutputNorm
                | Self::AttentionNorm(_)
                | Self::QueryNorm(_)
                | Self::KeyNorm(_)
                | Self::PostAttentionNorm(_)
                | Self::MlpNorm(_)
                | Self::PostMlpNorm(_)
        )
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
            Self::QueryNorm(l) => format!("blk.{l}.attn_q_norm.weight"),
            Self::KeyNorm(l) => format!("blk.{l}.attn_k_norm.weight"),
            Self::PostAttentionNorm(l) => format!("blk.{l}.post_attention_norm.weight"),
            Self::PostMlpNorm(l) => format!("blk.{l}.post_ffw_norm.weight"),
            Self::MlpNorm(l) => format!("blk.{l}.ffn_norm.weight"),
            Self::Gate(l) => format!("blk.{l}.ffn_gate.weight"),
            Self::Up(l) => format!("blk.{l}.ffn_up.weight"),
            Self::Down(l) => format!("blk.{l}.ffn_down.weight"),
        }
    }

    /// Name in Hugging Face's safetensors files. `post_attention_layernorm` is the norm before the MLP
    /// in most families and that after the attention in Gemma 3.
    pub(crate) fn hf_name(self, family: Family) -> String {
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
            Self::QueryNorm(l) => format!("model.layers.{l}.self_attn.q_norm.weight"),
            Self::KeyNorm(l) => format!("model.layers.{l}.self_attn.k_norm.weight"),
            Self::MlpNorm(l) if family.has_post_norms() => {
                format!("model.layers.{l}.pre_feedforward_layernorm.weight")
            }
            Self::MlpNorm(l) | Self::PostAttentionNorm(l) => {
                format!("model.layers.{l}.post_attention_layernorm.weight")
            }
            Self::PostMlpNorm(l) => format!("model.layers.{l}.post_feedforward_layernorm.weight"),
            Self::Gate(l) => format!("model.layers.{l}.mlp.gate_proj.weight"),
            Self::Up(l) => format!("model.layers.{l}.mlp.up_proj.weight"),
            Self::Down(l) => format!("model.layers.{l}.mlp.down_proj.weight"),
        }
    }
}

/// What a layer may hold, for messages.
pub(crate) const SUPPORTED_TENSORS: &str =
    "per layer the norms, q, k, v (with biases in qwen2), o, gate, up and down of its family";

/// The first of a file's tensors that belongs to a layer, by its prefix, and is none of the model's
/// parts: what it would do to the forward pass is unknown here, so the model must not run without it.
pub(crate) fn foreign<'a>(
    names: impl Iterator<Item = &'a String>,
    prefix: &str,
    name_of: impl Fn(Part) -> String,
    config: &ModelConfig,
) -> Option<&'a String> {
    let parts = |layer| Part::of_layer(layer, config);
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
    /// Norms of the heads of q and k, and after attention and MLP, where the family has them.
    pub(crate) query_norm: Option<RmsNorm>,
    pub(crate) key_norm: Option<RmsNorm>,
    pub(crate) post_attention_norm: Option<RmsNorm>,
    pub(crate) post_mlp_norm: Option<RmsNorm>,
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
        let norm = norm(source, config, Part::OutputNorm, config.hidden)?;
        Ok(Self { embedding, layers, norm, output: Linear::new(output, None)? })
    }

    /// Bytes of all matrices but the embedding.
    pub(crate) fn product_bytes(&self) -> u64 {
        let of_layer = |layer: &LayerWeights| -> u64 {
            let LayerWeights { query, key, value, output, gate, up, down, .. } = layer;
            [query, key, value, output, gate, up, down].into_iter().map(Linear::bytes).sum()
        };
        self.layers.iter().map(of_layer).sum::<u64>() + self.output.bytes()
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
            Part::QueryNorm(l) => norm(layer(l).and_then(|layer| layer.query_norm.as_ref())),
            Part::KeyNorm(l) => norm(layer(l).and_then(|layer| layer.key_norm.as_ref())),
            Part::PostAttentionNorm(l) => {
                norm(layer(l).and_then(|layer| layer.post_attention_norm.as_ref()))
            }
            Part::PostMlpNorm(l) => norm(layer(l).and_then(|layer| layer.post_mlp_norm.as_ref())),
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
            .flat_map(|layer| {
                let of_family = [
                    &layer.query_norm,
                    &layer.key_norm,
                    &layer.post_attention_norm,
                    &layer.post_mlp_norm,
                ];
                let of_all = [&layer.attention_norm, &layer.mlp_norm].into_iter();
                of_all.chain(of_family.into_iter().flatten())
            })
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
            query_norm: head_norm(source, config, Part::QueryNorm(layer), config.query_scale)?,
            key_norm: head_norm(source, config, Part::KeyNorm(layer), 1.0)?,
            post_attention_norm: post_norm(source, config, Part::PostAttentionNorm(layer))?,
            post_mlp_norm: post_norm(source, config, Part::PostMlpNorm(layer))?,
            attention_norm: norm(source, config, Part::AttentionNorm(layer), hidden)?,
            mlp_norm: norm(source, config, Part::MlpNorm(layer), hidden)?,
        })
    }
}

/// The norm of every head of q or k, its weights times `scale`, where the family has one.
fn head_norm(
    source: &mut dyn Source,
    config: &ModelConfig,
    part: Part,
    scale: f64,
) -> Result<Option<RmsNorm>> {
    if !config.family.has_head_norms() {
        return Ok(None);
    }
    let mut norm = norm(source, config, part, config.shape.head_dim)?;
    norm.weight = norm.weight.iter().map(|w| w * scale as f32).collect();
    Ok(Some(norm))
}

/// A norm after attention or MLP, where the family has one.
fn post_norm(source: &mut dyn Source, config: &ModelConfig, part: Part) -> Result<Option<RmsNorm>> {
    let there = config.family.has_post_norms();
    there.then(|| norm(source, config, part, config.hidden)).transpose()
}

fn norm(
    source: &mut dyn Source,
    config: &ModelConfig,
    part: Part,
    width: usize,
) -> Result<RmsNorm> {
    let weight = source.vector(part, width)?.into();
    Ok(RmsNorm { weight, eps: config.rms_eps as f32 })
}
