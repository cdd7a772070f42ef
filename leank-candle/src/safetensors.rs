//! A model from a folder: `config.json`, `tokenizer.json` and safetensors, as Hugging Face's
//! transformers writes them.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use leank_core::{
    ModelShape,
    files::{name_twice, read_regular},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{FAMILIES, Family, ModelConfig, RopeScaling, SlidingLayers};
use crate::linear::Matrix;
use crate::model::Loaded;
use crate::tokenizer::Tokenizer;
use crate::weights::{self, Part, Source, Weights};
use crate::{Error, Result};

/// `config.json`, the fields that matter here.
#[derive(Deserialize)]
struct ConfigFile {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    /// transformers 5 puts base and scaling together.
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    sliding_window: Option<usize>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    // Gemma 3's.
    sliding_window_pattern: Option<usize>,
    rope_local_base_freq: Option<f64>,
    query_pre_attn_scalar: Option<f64>,
    hidden_activation: Option<String>,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    use_bidirectional_attention: Option<bool>,
    partial_rotary_factor: Option<f64>,
    hidden_act: Option<String>,
    eos_token_id: Option<Value>,
    bos_token_id: Option<u32>,
    #[serde(rename = "_name_or_path")]
    name: Option<String>,
}

/// Loads a folder.
pub(crate) fn load(folder: &Path) -> Result<Loaded> {
    let path = folder.join("config.json");
    let damaged = |e: serde_json::Error| Error::Damaged {
        path: path.clone(),
        format: "config.json",
        why: e.to_string(),
    };
    let whole: Value = serde_json::from_str(&read_text(&path)?).map_err(damaged)?;
    let file: ConfigFile = serde_json::from_value(text_model(whole)).map_err(damaged)?;
    let config = read_config(&path, folder, &file)?;
    config.validate(&path)?;
    let eos = match &file.eos_token_id {
        Some(Value::Array(ids)) => ids.iter().filter_map(token_id).collect(),
        Some(id) => token_id(id).into_iter().collect(),
        None => Vec::new(),
    };
    let path = folder.join("tokenizer.json");
    let tokenizer =
        Tokenizer::from_json(&read_text(&path)?, file.bos_token_id, eos).map_err(|error| {
            match error {
                Error::Tokenizer(why) => Error::Damaged { path, format: "tokenizer.json", why },
                other => other,
            }
        })?;
    let tensors = read_tensors(folder)?;
    let mut source = FolderSource { folder: folder.to_owned(), family: config.family, tensors };
    source.refuse_foreign_tensors(&config)?;
    let weights = Weights::load(&mut source, &config)?;
    Ok(Loaded { config, tokenizer, weights })
}

/// The configuration of the language model: a Gemma 3 that sees images has it inside its own, and
/// leaves out what is as in the smallest of them.
fn text_model(mut whole: Value) -> Value {
    let Some(outer) = whole.as_object_mut() else { return whole };
    let nested = outer.get("model_type").and_then(Value::as_str) == Some("gemma3");
    if let Some(Value::Object(mut text)) = outer.remove("text_config").filter(|_| nested) {
        for key in ["eos_token_id", "bos_token_id", "_name_or_path"] {
            if let Some(value) = outer.remove(key) {
                text.entry(key).or_insert(value);
            }
        }
        text.entry("model_type").or_insert(json!("gemma3_text"));
        whole = Value::Object(text);
    }
    let Some(file) = whole.as_object_mut() else { return whole };
    let family = file.get("model_type").and_then(Value::as_str).and_then(Family::from_name);
    if family == Some(Family::Gemma3) {
        for (key, usual) in [
            ("vocab_size", json!(262_208)),
            ("num_attention_heads", json!(8)),
            ("num_key_value_heads", json!(4)),
            ("head_dim", json!(256)),
            ("max_position_embeddings", json!(131_072)),
            ("rms_norm_eps", json!(1e-6)),
            ("rope_theta", json!(1e6)),
            ("sliding_window", json!(4096)),
            ("tie_word_embeddings", json!(true)),
        ] {
            file.entry(key).or_insert(usual);
        }
    }
    whole
}

fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Largest `config.json`, `tokenizer.json` or index that is read; the largest tokenizers take some 30 MB.
const MAX_TEXT_BYTES: u64 = 64 << 20;

fn read_text(path: &Path) -> Result<String> {
    let text = read_regular(path, MAX_TEXT_BYTES).and_then(|bytes| {
        String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    });
    text.map_err(|source| Error::Io { path: path.to_owned(), action: "reading", source })
}

fn read_config(path: &Path, folder: &Path, file: &ConfigFile) -> Result<ModelConfig> {
    let unsupported = |what, found: String, supported| Error::Unsupported {
        path: path.to_owned(),
        what,
        found,
        supported,
    };
    let family = Family::from_name(&file.model_type)
        .ok_or_else(|| unsupported("architecture", file.model_type.clone(), FAMILIES))?;
    if file.mlp_bias {
        return Err(unsupported("MLP", "with biases".into(), "MLPs without"));
    }
    let sliding = sliding_layers(path, family, file)?;
    let rotated = file.rope_parameters.as_ref().and_then(|p| p.get("partial_rotary_factor"));
    let rotated = rotated.and_then(Value::as_f64).or(file.partial_rotary_factor);
    if let Some(share) = rotated.filter(|&share| share != 1.0) {
        let found = format!("of {share} of the channels");
        return Err(unsupported("RoPE", found, "RoPE of all channels"));
    }
    if family != Family::Qwen2 && file.attention_bias {
        return Err(unsupported("attention_bias", "true".into(), "biases in qwen2 only"));
    }
    let (act, usual) = match family {
        Family::Gemma3 => (&file.hidden_activation, "gelu_pytorch_tanh"),
        _ => (&file.hidden_act, "silu"),
    };
    if let Some(act) = act.as_ref().filter(|act| *act != usual) {
        return Err(unsupported("activation", act.clone(), usual));
    }
    for (what, cap) in [
        ("attn_logit_softcapping", file.attn_logit_softcapping),
        ("final_logit_softcapping", file.final_logit_softcapping),
    ] {
        if let Some(cap) = cap {
            return Err(unsupported(what, cap.to_string(), "logits as they are"));
        }
    }
    if file.use_bidirectional_attention == Some(true) {
        return Err(unsupported("attention", "in both directions".into(), "causal attention"));
    }
    let heads = file.num_attention_heads;
    let head_dim = file.head_dim.unwrap_or(file.hidden_size / heads.max(1));
    let kv_heads = file.num_key_value_heads.unwrap_or(heads);
    // Gemma 3 has one set per type of layer in transformers 5.
    let parameters = file.rope_parameters.as_ref();
    let parameters = parameters.and_then(|p| p.get("full_attention")).or(parameters);
    let base = parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
    let name = file.name.clone().filter(|name| !name.is_empty());
    let folder_name = || folder.file_name().map(|name| name.to_string_lossy().into_owned());
    Ok(ModelConfig {
        name: name.or_else(folder_name).unwrap_or_else(|| file.model_type.clone()),
        family,
        shape: ModelShape::new(file.num_hidden_layers, heads, kv_heads, head_dim)?,
        hidden: file.hidden_size,
        intermediate: file.intermediate_size,
        vocab: file.vocab_size,
        rope_base: base.or(file.rope_theta).unwrap_or(10_000.0),
        rope_scaling: rope_scaling(path, parameters.or(file.rope_scaling.as_ref()))?,
        rms_eps: file.rms_norm_eps,
        context_length: file.max_position_embeddings,
        tied_embeddings: file.tie_word_embeddings,
        qkv_bias: family == Family::Qwen2,
        sliding,
        query_scale: match file.query_pre_attn_scalar {
            Some(scalar) if family == Family::Gemma3 => (head_dim as f64 / scalar).sqrt(),
            _ => 1.0,
        },
    })
}

/// The layers that slide, where some do.
fn sliding_layers(path: &Path, family: Family, file: &ConfigFile) -> Result<Option<SlidingLayers>> {
    let wrong = |key: &str, expected: &str, found: String| {
        let (key, expected) = (key.to_owned(), expected.to_owned());
        Err(Error::Config { path: path.to_owned(), key, expected, found })
    };
    let layers = file.num_hidden_layers;
    // What no model has is refused before a list of that length is made.
    ModelShape::new(layers, 1, 1, 2)?;
    let slides = match (family, &file.layer_types) {
        (Family::Mistral, _) => vec![file.sliding_window.is_some(); layers],
        (_, Some(types)) => {
            let supported: &[&str] = match family {
                Family::Llama => &["full_attention"],
                _ => &["full_attention", "sliding_attention"],
            };
            if let Some(other) = types.iter().find(|kind| !supported.contains(&kind.as_str())) {
                return Err(Error::Unsupported {
                    path: path.to_owned(),
                    what: "layer type",
                    found: other.clone(),
                    supported: "full_attention; but for llama also sliding_attention",
                });
            }
            if types.len() != layers {
                let found = types.len().to_string();
                return wrong("layer_types", &format!("{layers} of them"), found);
            }
            types.iter().map(|kind| kind == "sliding_attention").collect()
        }
        (Family::Gemma3, None) => match file.sliding_window_pattern.unwrap_or(6) {
            0 => return wrong("sliding_window_pattern", "at least 1", "0".into()),
            pattern => (1..=layers).map(|layer| !layer.is_multiple_of(pattern)).collect(),
        },
        (Family::Llama, None) if file.use_sliding_window => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "attention",
                found: "with a sliding window".into(),
                supported: "full attention in llama models",
            });
        }
        (_, None) => {
            let first = file.max_window_layers.unwrap_or(28);
            (0..layers).map(|layer| file.use_sliding_window && layer >= first).collect()
        }
    };
    if !slides.contains(&true) {
        return Ok(None);
    }
    let Some(window) = file.sliding_window else {
        return wrong("sliding_window", "a count of tokens", "nothing".into());
    };
    Ok(Some(SlidingLayers { window, layers: slides, rope_base: local_base(path, family, file)? }))
}

/// The RoPE base that the sliding layers of a Gemma 3 have for themselves.
fn local_base(path: &Path, family: Family, file: &ConfigFile) -> Result<Option<f64>> {
    if family != Family::Gemma3 {
        return Ok(None);
    }
    let own = file.rope_parameters.as_ref().and_then(|p| p.get("sliding_attention"));
    if rope_scaling(path, own)? != RopeScaling::None {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            what: "RoPE scaling",
            found: "of sliding layers".into(),
            supported: "scaling of global layers",
        });
    }
    let base = own.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
    Ok(Some(base.or(file.rope_local_base_freq).unwrap_or(10_000.0)))
}

fn rope_scaling(path: &Path, value: Option<&Value>) -> Result<RopeScaling> {
    let Some(value) = value.filter(|value| !value.is_null()) else {
        return Ok(RopeScaling::None);
    };
    let number = |key: &str| {
        value.get(key).and_then(Value::as_f64).ok_or_else(|| Error::Config {
            path: path.to_owned(),
            key: format!("rope_scaling.{key}"),
            expected: "a number".into(),
            found: value.get(key).map_or("nothing".into(), Value::to_string),
        })
    };
    let kind = value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str);
    Ok(match kind {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        },
        Some("yarn") => {
            let factor = number("factor")?;
            refuse_yarn_variants(path, value, factor)?;
            RopeScaling::Yarn { factor, original: number("original_max_position_embeddings")? }
        }
        Some(other) => {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "RoPE scaling",
                found: other.to_owned(),
                supported: "none, linear, llama3, yarn",
            });
        }
    })
}

/// Refuses details of YaRN that are not its usual ones: the forward pass would be another.
fn refuse_yarn_variants(path: &Path, value: &Value, factor: f64) -> Result<()> {
    let usual_attention = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
    for (key, usual) in [
        ("attention_factor", json!(usual_attention)),
        ("beta_fast", json!(32.0)),
        ("beta_slow", json!(1.0)),
        // Together they take the place of the attention factor.
        ("mscale", Value::Null),
        ("mscale_all_dim", Value::Null),
        ("truncate", json!(true)),
    ] {
        let found = value.get(key).unwrap_or(&Value::Null);
        let same = match (found.as_f64(), usual.as_f64()) {
            (Some(found), Some(usual)) => (found - usual).abs() < 1e-6,
            _ => *found == usual,
        };
        if !found.is_null() && !same {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                what: "YaRN with",
                found: format!("{key} {found}"),
                supported: "YaRN with its details at their defaults",
            });
        }
    }
    Ok(())
}

/// All tensors of the folder, each once: one `model.safetensors`, or the shards that its index names.
fn read_tensors(folder: &Path) -> Result<HashMap<String, Tensor>> {
    let index = folder.join("model.safetensors.index.json");
    let shards = if index.exists() {
        shard_names(&index)?
    } else {
        BTreeSet::from(["model.safetensors".to_owned()])
    };
    let mut tensors = HashMap::new();
    for shard in shards {
        let path = folder.join(shard);
        let bytes = read_regular(&path, u64::MAX).map_err(|source| Error::Io {
            path: path.clone(),
            action: "reading",
            source,
        })?;
        let loaded = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
        let loaded = loaded.map_err(|e| Error::Damaged {
            path: path.clone(),
            format: "safetensors",
            why: e.to_string(),
        })?;
        // The header is sound: it was just read.
        let header = bytes
            .split_first_chunk()
            .map(|(length, rest)| &rest[..rest.len().min(u64::from_le_bytes(*length) as usize)]);
        if let Some(name) = header.and_then(name_twice) {
            let why = format!("its header has {name:?} twice");
            return Err(Error::Damaged { path, format: "safetensors", why });
        }
        for (name, tensor) in loaded {
            let name = plain_name(name);
            if tensors.contains_key(&name) {
                let why = format!("it has another tensor {name:?}, which must be there once");
                return Err(Error::Damaged { path, format: "safetensors", why });
            }
            tensors.insert(name, tensor);
        }
    }
    Ok(tensors)
}

/// The name of a language model's tensor without the place that it has in one that sees images.
fn plain_name(name: String) -> String {
    if let Some(rest) = name.strip_prefix("model.language_model.") {
        return format!("model.{rest}");
    }
    name.strip_prefix("language_model.").map_or(name.clone(), str::to_owned)
}

fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let damaged =
        |why: String| Error::Damaged { path: index.to_owned(), format: "safetensors index", why };
    let parsed: Index =
        serde_json::from_str(&read_text(index)?).map_err(|e| damaged(e.to_string()))?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    // A shard lies in the folder itself: an index must not reach other files.
    match names.iter().find(|name| Path::new(name).components().count() != 1 || *name == "..") {
        Some(name) => Err(damaged(format!("the shard {name:?} is not a file of the folder"))),
        None => Ok(names),
    }
}

struct FolderSource {
    folder: PathBuf,
    family: Family,
    tensors: HashMap<String, Tensor>,
}

impl FolderSource {
    fn refuse_foreign_tensors(&self, config: &ModelConfig) -> Result<()> {
        let name_of = |part: Part| part.hf_name(self.family);
        // Old files hold RoPE's frequencies, which config.json says too.
        let names = self.tensors.keys().filter(|name| !name.ends_with(".rotary_emb.inv_freq"));
        match weights::foreign(names, "model.layers.", name_of, config) {
            None => Ok(()),
            Some(name) => Err(Error::Unsupported {
                path: self.folder.clone(),
                what: "tensor",
                found: name.clone(),
                supported: weights::SUPPORTED_TENSORS,
            }),
        }
    }

    /// A tensor of the right shape, widened to f32, and given up by the map.
    fn take(&mut self, part: Part, shape: &[usize]) -> Result<Tensor> {
        let name = part.hf_name(self.family);
        let tensor = self.tensors.remove(&name).ok_or_else(|| Error::MissingTensor {
            path: self.folder.clone(),
            name: name.clone(),
        })?;
        if tensor.dims() != shape {
            return Err(Error::TensorShape {
                path: self.folder.clone(),
                name,
                expected: shape.to_vec(),
                found: tensor.dims().to_vec(),
            });
        }
        match tensor.dtype() {
            DType::F32 | DType::F16 | DType::BF16 | DType::F64 => {
                Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
            }
            other => Err(Error::Unsupported {
                path: self.folder.clone(),
                what: "tensor type",
                found: format!("{other:?} of {name}"),
                supported: "F32, F16, BF16, F64",
            }),
        }
    }
}

impl Source for FolderSource {
    fn vector(&mut self, part: Part, len: usize) -> Result<Vec<f32>> {
        let mut values: Vec<f32> = self.take(part, &[len])?.to_vec1()?;
        // Gemma stores by how much the weights of its norms differ from 1; GGUF files hold the sum.
        if self.family == Family::Gemma3 && part.is_norm() {
            values.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(values)
    }

    fn matrix(&mut self, part: Part, rows: usize, cols: usize) -> Result<Matrix> {
        Ok(Matrix::Dense(self.take(part, &[rows, cols])?))
    }
}
