//! The same Llama with a lean cache: what decodes reads what the mask keeps.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{
    Embedding, Linear, Module, RmsNorm, VarBuilder, embedding, linear, linear_no_bias,
    ops::softmax_last_dim, rms_norm, rotary_emb::rope,
};
use leank::{
    Backend as _, Cache as _, CacheConfig, HostView, HostViewMut, Layer, ModelMask, ModelShape,
    SequenceId, StepEntry, ViewShape,
    cpu::{Cpu, CpuCache},
};

#[derive(Clone, serde::Deserialize)]
pub(crate) struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    max_position_embeddings: usize,
    rope_theta: f64,
    rms_norm_eps: f64,
}

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    layer: Layer,
    config: Config,
}

impl Attention {
    fn new(layer: Layer, config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (hidden, width) = (config.hidden_size, config.num_attention_heads * config.head_dim);
        let kv_width = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            q: linear(hidden, width, vb.pp("q_proj"))?,
            k: linear(hidden, kv_width, vb.pp("k_proj"))?,
            v: linear(hidden, kv_width, vb.pp("v_proj"))?,
            o: linear_no_bias(width, hidden, vb.pp("o_proj"))?,
            layer,
            config: config.clone(),
        })
    }

    /// `x` is `[1, tokens, hidden]`.
    fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, kv: &mut Kv) -> Result<Tensor> {
        let (_, tokens, _) = x.dims3()?;
        let heads = |x: Tensor, heads| {
            x.reshape((1, tokens, heads, self.config.head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = rope(&heads(self.q.forward(x)?, self.config.num_attention_heads)?, cos, sin)?;
        let k = rope(&heads(self.k.forward(x)?, self.config.num_key_value_heads)?, cos, sin)?;
        let v = heads(self.v.forward(x)?, self.config.num_key_value_heads)?;
        kv.append(self.layer, &k, &v)?;
        // A prompt attends to itself, densely; what comes after it reads the cache.
        let out = if kv.is_prompt { self.attend(&q, &k, &v)? } else { kv.attend(self.layer, &q)? };
        self.o.forward(&out.transpose(1, 2)?.flatten_from(2)?)
    }

    /// Causal attention; the queries, `[1, heads, tokens, head_dim]`, are those of the last tokens.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let repeat = |x: &Tensor| {
            let (batch, heads, tokens, head_dim) = x.dims4()?;
            let grouped = x.unsqueeze(2)?.expand((batch, heads, group, tokens, head_dim))?;
            grouped.reshape((batch, heads * group, tokens, head_dim))
        };
        let (k, v) = (repeat(k)?, repeat(v)?);
        let logits = (q.matmul(&k.t()?)? / (self.config.head_dim as f64).sqrt())?;
        let (new, all) = (q.dim(2)?, k.dim(2)?);
        let hidden = |i: usize, j: usize| if j > all - new + i { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..new * all).map(|at| hidden(at / all, at % all)).collect();
        let mask = Tensor::from_vec(mask, (new, all), q.device())?;
        softmax_last_dim(&logits.broadcast_add(&mask)?)?.matmul(&v.contiguous()?)
    }
}

/// The cache, and what of it is in use.
struct Kv {
    cache: CpuCache,
    sequence: SequenceId,
    is_prompt: bool,
}

impl Kv {
    fn append(&mut self, layer: Layer, k: &Tensor, v: &Tensor) -> Result<()> {
        let view = view(k)?;
        let (k, v) = (values(k)?, values(v)?);
        let (k, v) = (HostView::new(&k[..], view), HostView::new(&v[..], view));
        self.cache.append(layer, k.map_err(wrap)?, v.map_err(wrap)?).map_err(wrap)
    }

    fn attend(&mut self, layer: Layer, q: &Tensor) -> Result<Tensor> {
        let (view, own) = (view(q)?, values(q)?);
        let mut out = vec![0.0; own.len()];
        let (q_view, to) = (HostView::new(&own[..], view), HostViewMut::new(&mut out[..], view));
        self.cache.attend(layer, q_view.map_err(wrap)?, to.map_err(wrap)?).map_err(wrap)?;
        Tensor::from_vec(out, q.shape(), q.device())
    }
}

fn values(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1()
}

/// A tensor `[1, heads, tokens, head_dim]` as the cache sees it.
fn view(x: &Tensor) -> Result<ViewShape> {
    let (_, heads, tokens, head_dim) = x.dims4()?;
    Ok(ViewShape::head_major(tokens, heads, head_dim))
}

fn wrap(error: leank::Error) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(layer: Layer, config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (hidden, inner, eps) =
            (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        Ok(Self {
            attention_norm: rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
            attention: Attention::new(layer, config, &vb.pp("self_attn"))?,
            mlp_norm: rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            gate: linear_no_bias(hidden, inner, vb.pp("mlp.gate_proj"))?,
            up: linear_no_bias(hidden, inner, vb.pp("mlp.up_proj"))?,
            down: linear_no_bias(inner, hidden, vb.pp("mlp.down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, kv: &mut Kv) -> Result<Tensor> {
        let x = (x + self.attention.forward(&self.attention_norm.forward(x)?, cos, sin, kv)?)?;
        let y = self.mlp_norm.forward(&x)?;
        x + self.down.forward(&(self.gate.forward(&y)?.silu()? * self.up.forward(&y)?)?)?
    }
}

pub(crate) struct Llama {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    cos: Tensor,
    sin: Tensor,
    kv: Kv,
    tokens: usize,
}

impl Llama {
    /// From a folder with `config.json` and `model.safetensors`.
    pub(crate) fn load(folder: &Path, mask: ModelMask) -> Result<Self> {
        let config = std::fs::read(folder.join("config.json"))?;
        let config: Config = serde_json::from_slice(&config).map_err(candle_core::Error::wrap)?;
        let weights = std::fs::read(folder.join("model.safetensors"))?;
        let vb =
            VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?.pp("model");
        let half = config.head_dim / 2;
        let speed = |i: usize| config.rope_theta.powf(-(i as f64) / half as f64);
        let angle = |at: usize| (at / half) as f64 * speed(at % half);
        let angles: Vec<f32> =
            (0..config.max_position_embeddings * half).map(|at| angle(at) as f32).collect();
        let angles =
            Tensor::from_vec(angles, (config.max_position_embeddings, half), &Device::Cpu)?;
        let (layers, queries) = (config.num_hidden_layers, config.num_attention_heads);
        let shape = ModelShape::new(layers, queries, config.num_key_value_heads, config.head_dim);
        let cache = CacheConfig::new(shape.map_err(wrap)?, mask).map_err(wrap)?;
        let mut cache = Cpu::new().create(cache).map_err(wrap)?;
        let sequence = cache.add_sequence();
        let block = |i| Block::new(Layer(i), &config, &vb.pp(format!("layers.{i}")));
        Ok(Self {
            embedding: embedding(config.vocab_size, config.hidden_size, vb.pp("embed_tokens"))?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("norm"))?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            kv: Kv { cache, sequence, is_prompt: true },
            tokens: 0,
        })
    }

    /// Takes in the next tokens and gives the logits behind the last one.
    pub(crate) fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let turned = |table: &Tensor| table.narrow(0, self.tokens, tokens.len());
        let (cos, sin) = (turned(&self.cos)?, turned(&self.sin)?);
        let mut x = self.embedding.forward(&Tensor::new(tokens, &Device::Cpu)?)?.unsqueeze(0)?;
        let kv = &mut self.kv;
        kv.is_prompt = self.tokens == 0;
        let step = if kv.is_prompt { StepEntry::store } else { StepEntry::decode };
        kv.cache.plan(&[step(kv.sequence, tokens.len())]).map_err(wrap)?;
        for block in &self.blocks {
            x = block.forward(&x, &cos, &sin, kv)?;
        }
        kv.cache.commit().map_err(wrap)?;
        self.tokens += tokens.len();
        let last = self.norm.forward(&x.narrow(1, tokens.len() - 1, 1)?)?.squeeze(0)?;
        last.matmul(&self.embedding.embeddings().t()?)?.flatten_all()?.to_vec1()
    }

    /// Bytes of the cache, and of one that keeps everything.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let memory = self.kv.cache.memory();
        (memory.used_bytes(), memory.dense_bytes)
    }
}
