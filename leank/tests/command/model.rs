//! A tiny random llama, as a folder in Hugging Face's layout and as a GGUF file, both written by
//! hand: what the command reads is the formats, not what our own code writes.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

/// The attention shape of a tiny model; the rest is fixed.
#[derive(Clone, Copy)]
pub(crate) struct Tiny {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope_base: f64,
}

impl Default for Tiny {
    fn default() -> Self {
        Self { layers: 2, kv_heads: 2, head_dim: 16, rope_base: 1000.0 }
    }
}

/// Tokens of context.
pub(crate) const CONTEXT: usize = 512;

const GROUP: usize = 2;
const HIDDEN: usize = 32;
const MLP: usize = 48;

struct Weight {
    hf: String,
    gguf: String,
    dims: Vec<usize>,
    values: Vec<f32>,
}

impl Weight {
    fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
}

/// Numbers in -1..1 that look random.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }
}

impl Tiny {
    fn weights(&self) -> Vec<Weight> {
        let mut noise = Noise(1);
        let mut weights = Vec::new();
        let mut add = |hf: String, gguf: String, dims: &[usize]| {
            // Norms about one, matrices so that sums over their columns are about one.
            let (middle, spread) = match dims {
                [_, cols] => (0.0, 2.0 / (*cols as f32).sqrt()),
                _ => (1.0, 0.1),
            };
            let len = dims.iter().product();
            let values = (0..len).map(|_| middle + spread * noise.next()).collect();
            weights.push(Weight { hf, gguf, dims: dims.to_vec(), values });
        };
        add("model.embed_tokens.weight".into(), "token_embd.weight".into(), &[256, HIDDEN]);
        add("model.norm.weight".into(), "output_norm.weight".into(), &[HIDDEN]);
        let (kv, q) = (self.kv_heads * self.head_dim, GROUP * self.kv_heads * self.head_dim);
        for layer in 0..self.layers {
            for (hf, gguf, dims) in [
                ("input_layernorm", "attn_norm", &[HIDDEN][..]),
                ("post_attention_layernorm", "ffn_norm", &[HIDDEN]),
                ("self_attn.q_proj", "attn_q", &[q, HIDDEN]),
                ("self_attn.k_proj", "attn_k", &[kv, HIDDEN]),
                ("self_attn.v_proj", "attn_v", &[kv, HIDDEN]),
                ("self_attn.o_proj", "attn_output", &[HIDDEN, q]),
                ("mlp.gate_proj", "ffn_gate", &[MLP, HIDDEN]),
                ("mlp.up_proj", "ffn_up", &[MLP, HIDDEN]),
                ("mlp.down_proj", "ffn_down", &[HIDDEN, MLP]),
            ] {
                let hf = format!("model.layers.{layer}.{hf}.weight");
                add(hf, format!("blk.{layer}.{gguf}.weight"), dims);
            }
        }
        weights
    }

    /// Writes config.json, tokenizer.json and model.safetensors.
    pub(crate) fn write_folder(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        let config = json!({
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": self.layers,
            "num_attention_heads": GROUP * self.kv_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": 256,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_base,
            "tie_word_embeddings": true,
            "hidden_act": "silu",
        });
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        let weights = self.weights();
        let bytes: Vec<Vec<u8>> = weights.iter().map(Weight::bytes).collect();
        let view = |(weight, bytes)| -> (&str, TensorView<'_>) {
            let Weight { hf, dims, .. }: &Weight = weight;
            (hf, TensorView::new(Dtype::F32, dims.clone(), bytes).unwrap())
        };
        let tensors = weights.iter().zip(bytes.iter().map(Vec::as_slice)).map(view);
        let file = safetensors::serialize(tensors, None).unwrap();
        fs::write(folder.join("model.safetensors"), file).unwrap();
    }

    /// Writes a GGUF file. Its query and key rows are in llama.cpp's order, so it is another model
    /// than the folder's.
    pub(crate) fn write_gguf(&self, path: &Path) {
        let weights = self.weights();
        let metadata = self.gguf_metadata();
        let mut file = Gguf(b"GGUF".to_vec());
        file.u32(3);
        file.u64(weights.len() as u64);
        file.u64(metadata.len() as u64);
        for (key, value) in &metadata {
            file.text(key);
            file.value(value);
        }
        let mut offset = 0u64;
        for weight in &weights {
            file.text(&weight.gguf);
            file.u32(weight.dims.len() as u32);
            weight.dims.iter().rev().for_each(|&n| file.u64(n as u64));
            file.u32(0); // f32
            file.u64(offset);
            offset += (4 * weight.values.len() as u64).next_multiple_of(32);
        }
        for weight in &weights {
            file.align();
            file.0.extend(weight.bytes());
        }
        file.align();
        fs::write(path, file.0).unwrap();
    }

    fn gguf_metadata(&self) -> Vec<(&'static str, Entry)> {
        let tokens = alphabet().into_iter().map(String::from).collect();
        vec![
            ("general.architecture", Entry::Text("llama")),
            ("llama.block_count", Entry::Count(self.layers)),
            ("llama.context_length", Entry::Count(CONTEXT)),
            ("llama.embedding_length", Entry::Count(HIDDEN)),
            ("llama.feed_forward_length", Entry::Count(MLP)),
            ("llama.attention.head_count", Entry::Count(GROUP * self.kv_heads)),
            ("llama.attention.head_count_kv", Entry::Count(self.kv_heads)),
            ("llama.attention.key_length", Entry::Count(self.head_dim)),
            ("llama.attention.value_length", Entry::Count(self.head_dim)),
            ("llama.attention.layer_norm_rms_epsilon", Entry::Number(1e-5)),
            ("llama.rope.freq_base", Entry::Number(self.rope_base as f32)),
            ("tokenizer.ggml.model", Entry::Text("gpt2")),
            ("tokenizer.ggml.pre", Entry::Text("smollm")),
            ("tokenizer.ggml.tokens", Entry::Texts(tokens)),
            ("tokenizer.ggml.merges", Entry::Texts(Vec::new())),
        ]
    }
}

/// GPT-2's printable character for every byte, in the order of bytes.
fn alphabet() -> Vec<char> {
    let mut extra = 256u32..;
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..);
    (0..256)
        .map(|byte| if printable(byte) { byte } else { extra.next().unwrap() })
        .map(|code| char::from_u32(code).unwrap())
        .collect()
}

/// One token per byte.
fn tokenizer() -> serde_json::Value {
    let vocab: BTreeMap<String, usize> =
        alphabet().into_iter().map(String::from).zip(0..).collect();
    let merges: [String; 0] = [];
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0",
        "pre_tokenizer": bytes,
        "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}

enum Entry {
    Text(&'static str),
    Texts(Vec<String>),
    Count(usize),
    Number(f32),
}

/// A GGUF file in the making.
struct Gguf(Vec<u8>);

impl Gguf {
    fn u32(&mut self, n: u32) {
        self.0.extend(n.to_le_bytes());
    }

    fn u64(&mut self, n: u64) {
        self.0.extend(n.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn value(&mut self, value: &Entry) {
        match value {
            Entry::Count(n) => {
                self.u32(4);
                self.u32(*n as u32);
            }
            Entry::Number(x) => {
                self.u32(6);
                self.0.extend(x.to_le_bytes());
            }
            Entry::Text(text) => {
                self.u32(8);
                self.text(text);
            }
            Entry::Texts(texts) => {
                self.u32(9);
                self.u32(8);
                self.u64(texts.len() as u64);
                texts.iter().for_each(|text| self.text(text));
            }
        }
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
    }
}
