//! Tiny random models on disk, for tests.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use leank_train::rng::Rng;

use crate::config::Family;
use crate::weights::Part;
use crate::{LoadOptions, Model, Precision};

pub(crate) const LAYERS: usize = 2;
pub(crate) const QUERY_HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 8;
pub(crate) const HIDDEN: usize = 32;
pub(crate) const MLP: usize = 64;
pub(crate) const CONTEXT: usize = 512;
pub(crate) const SLIDING_WINDOW: usize = 12;

/// Normal numbers.
pub(crate) fn random(rng: &mut Rng, dims: (usize, usize, usize)) -> Tensor {
    let values = (0..dims.0 * dims.1 * dims.2).map(|_| rng.normal() as f32).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

/// A random model, its weights in Hugging Face's order.
pub(crate) struct TinyModel {
    pub(crate) family: Family,
    pub(crate) tied: bool,
    layers: usize,
    pub(crate) weights: Vec<(Part, Tensor)>,
    pub(crate) folder: tempfile::TempDir,
}

/// The byte-level alphabet (256 tokens of one byte), two merges and two special tokens.
fn vocabulary() -> (Vec<String>, Vec<String>) {
    let mut tokens: Vec<String> = byte_alphabet().into_iter().map(String::from).collect();
    tokens.extend(["th", "the", "<|start|>", "<|end|>"].map(String::from));
    (tokens, vec!["t h".into(), "th e".into()])
}

/// GPT-2's printable character for every byte, in the order of bytes.
fn byte_alphabet() -> Vec<char> {
    let printable = |b: u32| (33..127).contains(&b) || (161..173).contains(&b) || b >= 174;
    let mut extra = 256u32..;
    (0..256u32)
        .map(|b| if printable(b) { b } else { extra.next().unwrap_or(b) })
        .map(|code| char::from_u32(code).unwrap_or('?'))
        .collect()
}

pub(crate) fn vocab() -> usize {
    vocabulary().0.len()
}

impl TinyModel {
    pub(crate) fn llama() -> Self {
        Self::new(Family::Llama, true, 1)
    }

    pub(crate) fn qwen2() -> Self {
        Self::new(Family::Qwen2, false, 2)
    }

    /// One of each family.
    pub(crate) fn all() -> Vec<Self> {
        let qwen3 = Self::new(Family::Qwen3, true, 3);
        let mistral = Self::new(Family::Mistral, false, 4);
        vec![Self::llama(), Self::qwen2(), qwen3, mistral, Self::gemma3()]
    }

    /// Its first layer slides, its second is global.
    pub(crate) fn gemma3() -> Self {
        Self::new(Family::Gemma3, true, 5)
    }

    pub(crate) fn new(family: Family, tied: bool, seed: u64) -> Self {
        Self::with_layers(LAYERS, family, tied, seed)
    }

    pub(crate) fn with_layers(layers: usize, family: Family, tied: bool, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let mut weights = Vec::new();
        let mut add = |part: Part, dims: &[usize], spread: f64, middle: f64| {
            let n = dims.iter().product();
            let values = (0..n).map(|_| (middle + spread * rng.normal()) as f32);
            // Gemma's files differ by 1 in the weights of norms: few bits, so that both say the same.
            let few_bits = |x: f32| if part.is_norm() { (x * 1024.0).round() / 1024.0 } else { x };
            let values: Vec<f32> = values.map(few_bits).collect();
            weights.push((part, Tensor::from_vec(values, dims, &Device::Cpu).unwrap()));
        };
        let (q, kv) = (QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        add(Part::Embedding, &[vocab(), HIDDEN], 0.5, 0.0);
        if !tied {
            add(Part::Output, &[vocab(), HIDDEN], 0.3, 0.0);
        }
        add(Part::OutputNorm, &[HIDDEN], 0.1, 1.0);
        for l in 0..layers {
            add(Part::AttentionNorm(l), &[HIDDEN], 0.1, 1.0);
            add(Part::MlpNorm(l), &[HIDDEN], 0.1, 1.0);
            for (part, rows, cols) in [
                (Part::Query(l), q, HIDDEN),
                (Part::Key(l), kv, HIDDEN),
                (Part::Value(l), kv, HIDDEN),
                (Part::AttentionOutput(l), HIDDEN, q),
                (Part::Gate(l), MLP, HIDDEN),
                (Part::Up(l), MLP, HIDDEN),
                (Part::Down(l), HIDDEN, MLP),
            ] {
                add(part, &[rows, cols], 1.2 / (cols as f64).sqrt(), 0.0);
            }
            if family.has_head_norms() {
                add(Part::QueryNorm(l), &[HEAD_DIM], 0.1, 1.3);
                add(Part::KeyNorm(l), &[HEAD_DIM], 0.1, 1.3);
            }
            if family.has_post_norms() {
                add(Part::PostAttentionNorm(l), &[HIDDEN], 0.1, 1.0);
                add(Part::PostMlpNorm(l), &[HIDDEN], 0.1, 1.0);
            }
            if family == Family::Qwen2 {
                add(Part::QueryBias(l), &[q], 0.3, 0.0);
                add(Part::KeyBias(l), &[kv], 0.3, 0.0);
                add(Part::ValueBias(l), &[kv], 0.3, 0.0);
            }
        }
        Self { family, tied, layers, weights, folder: tempfile::tempdir().unwrap() }
    }

    /// The model from a safetensors folder, in f32.
    pub(crate) fn load(&self) -> Model {
        Model::load(&self.write_folder(), LoadOptions::default()).unwrap()
    }

    pub(crate) fn write_folder(&self) -> PathBuf {
        let folder = self.folder.path().join("folder");
        std::fs::create_dir_all(&folder).unwrap();
        let gemma = self.family == Family::Gemma3;
        let stored = |(part, tensor): &(Part, Tensor)| {
            let less = if gemma && part.is_norm() { 1.0 } else { 0.0 };
            (part.hf_name(self.family), (tensor - less).unwrap())
        };
        let tensors: HashMap<String, Tensor> = self.weights.iter().map(stored).collect();
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        let mut config = serde_json::json!({
            "model_type": if gemma { "gemma3_text" } else { self.family.name() },
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": self.layers,
            "num_attention_heads": QUERY_HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": vocab(),
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000.0,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "eos_token_id": [259],
        });
        if gemma {
            config["sliding_window"] = SLIDING_WINDOW.into();
            config["sliding_window_pattern"] = 2.into();
            config["rope_local_base_freq"] = 100.0.into();
            config["query_pre_attn_scalar"] = HEAD_DIM.into();
            config["head_dim"] = HEAD_DIM.into();
            config["hidden_activation"] = "gelu_pytorch_tanh".into();
        }
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        std::fs::write(folder.join("tokenizer.json"), tokenizer_json()).unwrap();
        folder
    }

    /// The model as a GGUF file, matrices in `kind`, q and k of llama models interleaved.
    pub(crate) fn write_gguf(&self, kind: GgmlDType) -> PathBuf {
        self.write_gguf_with(kind, |_| {})
    }

    pub(crate) fn write_gguf_with(
        &self,
        kind: GgmlDType,
        change: impl FnOnce(&mut Vec<(String, Value)>),
    ) -> PathBuf {
        let path = self.folder.path().join("model.gguf");
        let tensors: Vec<(String, QTensor)> = self
            .weights
            .iter()
            .map(|(part, tensor)| {
                let heads = match part {
                    Part::Query(_) => Some(QUERY_HEADS),
                    Part::Key(_) => Some(KV_HEADS),
                    _ => None,
                };
                let tensor = match heads.filter(|_| self.family.architecture() == "llama") {
                    Some(heads) => interleave(tensor, heads),
                    None => tensor.clone(),
                };
                let kind = if tensor.rank() == 1 { GgmlDType::F32 } else { kind };
                (part.gguf_name(), QTensor::quantize(&tensor, kind).unwrap())
            })
            .collect();
        let mut metadata = self.metadata();
        change(&mut metadata);
        let metadata: Vec<(&str, &Value)> =
            metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut file = std::fs::File::create(&path).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        path
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let name = self.family.architecture();
        let (tokens, merges) = vocabulary();
        let texts =
            |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::String).collect());
        let types = (0..tokens.len()).map(|i| Value::I32(if i >= 258 { 3 } else { 1 })).collect();
        let number = |n: usize| Value::U32(n as u32);
        let own = [
            ("block_count", number(self.layers)),
            ("context_length", number(CONTEXT)),
            ("embedding_length", number(HIDDEN)),
            ("feed_forward_length", number(MLP)),
            ("attention.head_count", number(QUERY_HEADS)),
            ("attention.head_count_kv", number(KV_HEADS)),
            ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("rope.freq_base", Value::F32(1000.0)),
        ];
        let shared = [
            ("general.architecture", Value::String(name.into())),
            ("tokenizer.ggml.model", Value::String("gpt2".into())),
            ("tokenizer.ggml.pre", Value::String("smollm".into())),
            ("tokenizer.ggml.tokens", texts(tokens)),
            ("tokenizer.ggml.merges", texts(merges)),
            ("tokenizer.ggml.token_type", Value::Array(types)),
            ("tokenizer.ggml.bos_token_id", Value::U32(258)),
            ("tokenizer.ggml.eos_token_id", Value::U32(259)),
            ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ];
        let sliding = [
            ("attention.sliding_window", number(SLIDING_WINDOW)),
            ("attention.sliding_window_pattern", number(2)),
            ("rope.freq_base_swa", Value::F32(100.0)),
        ];
        let sliding = sliding.into_iter().filter(|_| self.family == Family::Gemma3);
        let own = own.into_iter().chain(sliding);
        let own = own.map(|(key, value)| (format!("{name}.{key}"), value));
        shared.map(|(key, value)| (key.to_owned(), value)).into_iter().chain(own).collect()
    }
}

/// Rows of a head as llama.cpp's converter stores them.
fn interleave(tensor: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = tensor.dims2().unwrap();
    tensor
        .reshape((heads, 2, rows / heads / 2, cols))
        .and_then(|t| t.transpose(1, 2))
        .and_then(|t| t.contiguous())
        .and_then(|t| t.reshape((rows, cols)))
        .unwrap()
}

fn tokenizer_json() -> String {
    let (tokens, merges) = vocabulary();
    let vocab: HashMap<&String, usize> = tokens.iter().zip(0..).collect();
    let added = [("<|start|>", 258), ("<|end|>", 259)].map(|(content, id)| {
        serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    });
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let digits = serde_json::json!({"type": "Digits", "individual_digits": true});
    serde_json::json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level.clone()]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
    .to_string()
}

/// Loads with a precision.
pub(crate) fn load(path: &Path, precision: Precision) -> crate::Result<Model> {
    Model::load(path, LoadOptions::with_precision(precision))
}
