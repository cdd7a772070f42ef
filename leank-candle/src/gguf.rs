//! A model from a GGUF file.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Tensor};
use leank_core::ModelShape;

use crate::config::{FAMILIES, Family, ModelConfig, RopeScaling, SlidingLayers};
use crate::gguf_file::{AlignedBytes, GgufFile, TensorEntry, Value};
use crate::linear::Matrix;
use crate::model::Loaded;
use crate::tokenizer::Tokenizer;
use crate::weights::{self, Part, Precision, Source, Weights};
use crate::{Error, Result};

/// Loads a GGUF file.
pub(crate) fn load(path: &Path, precision: Precision) -> Result<Loaded> {
    let file = GgufFile::open(path)?;
    let mut source = GgufSource { config: None, file, precision };
    let config = source.read_config()?;
    config.validate(path)?;
    source.refuse_foreign_tensors(&config)?;
    source.config = Some(config.clone());
    let tokenizer = Tokenizer::from_gguf(&source.file, config.vocab)?;
    let weights = Weights::load(&mut source, &config)?;
    Ok(Loaded { config, tokenizer, weights })
}

/// Factors in the forward pass, with the values that say it has none (or, of the scale, that it is
/// 1/√head_dim).
const FACTORS: [(&str, &[f64]); 7] = [
    ("attention.scale", &[0.0]),
    ("embedding_scale", &[0.0, 1.0]),
    ("residual_scale", &[0.0, 1.0]),
    ("logit_scale", &[0.0, 1.0]),
    ("rope.scaling.attn_factor", &[1.0]),
    ("attn_logit_softcapping", &[0.0]),
    ("final_logit_softcapping", &[0.0]),
];

/// Of Gemma 3, where its files do not say: every sixth layer is global, the others have this base.
const GEMMA3_PATTERN: usize = 6;
const GEMMA3_LOCAL_BASE: f64 = 10_000.0;

/// Details of YaRN, with the values that make it the published one.
const YARN_DETAILS: [(&str, &[f64]); 5] = [
    ("rope.scaling.yarn_attn_factor", &[1.0]),
    ("rope.scaling.yarn_beta_fast", &[32.0]),
    ("rope.scaling.yarn_beta_slow", &[1.0]),
    // -1 leaves it to the kind of scaling.
    ("rope.scaling.yarn_ext_factor", &[1.0, -1.0]),
    ("rope.scaling.yarn_log_multiplier", &[0.0]),
];

struct GgufSource {
    file: GgufFile,
    precision: Precision,
    /// Known once the metadata are read.
    config: Option<ModelConfig>,
}

impl GgufSource {
    fn read_config(&self) -> Result<ModelConfig> {
        let file = &self.file;
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let architecture = file.required("general.architecture", "a name", text)?;
        let family = Family::from_name(&architecture).ok_or_else(|| Error::Unsupported {
            path: file.path.clone(),
            what: "architecture",
            found: architecture.clone(),
            supported: FAMILIES,
        })?;
        let key = |name: &str| format!("{architecture}.{name}");
        let count = |name: &str| file.required(&key(name), "a count", size);
        let layers = count("block_count")?;
        let hidden = count("embedding_length")?;
        let query_heads = count("attention.head_count")?;
        let kv_heads = file
            .optional(&key("attention.head_count_kv"), "a count (the same in every layer)", size)?
            .unwrap_or(query_heads);
        let head_dim = match file.optional(&key("attention.key_length"), "a count", size)? {
            Some(head_dim) => head_dim,
            None => hidden / query_heads.max(1),
        };
        let shape = ModelShape::new(layers, query_heads, kv_heads, head_dim)?;
        self.refuse_variants(family, &architecture, head_dim)?;
        let sliding = match family {
            Family::Gemma3 => Some(self.sliding_layers(&architecture, layers)?),
            _ => None,
        };
        // The largest Gemma 3 scales by the width per head; llama.cpp tells it by its layers too.
        let query_scale = match (family, layers) {
            (Family::Gemma3, 62) => (head_dim as f64 / (hidden as f64 / query_heads as f64)).sqrt(),
            _ => 1.0,
        };
        let file = &self.file;
        let vocab = self.entry(Part::Embedding)?.1.dims[0];
        Ok(ModelConfig {
            name: file
                .optional("general.name", "a text", text)?
                .unwrap_or_else(|| architecture.clone()),
            family,
            shape,
            hidden,
            intermediate: count("feed_forward_length")?,
            vocab,
            rope_base: file
                .optional(&key("rope.freq_base"), "a number", Value::as_f64)?
                .unwrap_or(if family == Family::Gemma3 { 1e6 } else { 10_000.0 }),
            rope_scaling: self.rope_scaling(&architecture, head_dim)?,
            rms_eps: self.file.required(
                &key("attention.layer_norm_rms_epsilon"),
                "a number",
                Value::as_f64,
            )?,
            context_length: self.file.required(&key("context_length"), "a count", size)?,
            tied_embeddings: !self.file.tensors.contains_key(&Part::Output.gguf_name()),
            qkv_bias: family == Family::Qwen2
                || self.file.tensors.contains_key(&Part::QueryBias(0).gguf_name()),
            sliding,
            query_scale,
        })
    }

    /// Which layers of a Gemma 3 slide.
    fn sliding_layers(&self, architecture: &str, layers: usize) -> Result<SlidingLayers> {
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let window =
            self.file.required(&key("attention.sliding_window"), "a count of tokens", size)?;
        let pattern_key = key("attention.sliding_window_pattern");
        let pattern = self.file.optional(&pattern_key, "a count of layers", size)?;
        let pattern = pattern.unwrap_or(GEMMA3_PATTERN);
        if pattern == 0 {
            return Err(Error::Config {
                path: self.file.path.clone(),
                key: pattern_key,
                expected: "at least 1".into(),
                found: "0".into(),
            });
        }
        let base = self.file.optional(&key("rope.freq_base_swa"), "a number", Value::as_f64)?;
        Ok(SlidingLayers {
            window,
            layers: (1..=layers).map(|layer| !layer.is_multiple_of(pattern)).collect(),
            rope_base: Some(base.unwrap_or(GEMMA3_LOCAL_BASE)),
        })
    }

    /// Models that carry a known architecture's name and another forward pass.
    fn refuse_variants(&self, family: Family, architecture: &str, head_dim: usize) -> Result<()> {
        let number = |name: &str| {
            self.file.optional(&format!("{architecture}.{name}"), "a count", Value::as_u64)
        };
        let unsupported = |what, found: String, supported| {
            Err(Error::Unsupported { path: self.file.path.clone(), what, found, supported })
        };
        if let Some(experts) = number("expert_count")?.filter(|&n| n > 0) {
            return unsupported("mixture of", format!("{experts} experts"), "dense MLPs");
        }
        let rotated = number("rope.dimension_count")?;
        if let Some(rotated) = rotated.filter(|&n| n != head_dim as u64) {
            let found = format!("of {rotated} of {head_dim} channels");
            return unsupported("RoPE", found, "RoPE of all channels");
        }
        let value_length = number("attention.value_length")?;
        if let Some(length) = value_length.filter(|&n| n != head_dim as u64) {
            let found = format!("of {length} channels beside keys of {head_dim}");
            return unsupported("a value head", found, "keys and values of the same width");
        }
        let window = number("attention.sliding_window")?;
        if let Some(window) = window.filter(|&n| n > 0 && family != Family::Gemma3) {
            let found = format!("with a sliding window of {window}");
            return unsupported("attention", found, "full attention");
        }
        self.refuse_unusual(architecture, &FACTORS)
    }

    /// Refuses a number that is set to anything but one of its usual values.
    fn refuse_unusual(&self, architecture: &str, numbers: &[(&'static str, &[f64])]) -> Result<()> {
        for &(name, usual) in numbers {
            let key = format!("{architecture}.{name}");
            let value = self.file.optional(&key, "a number", Value::as_f64)?;
            if let Some(value) = value.filter(|value| !usual.contains(value)) {
                return Err(Error::Unsupported {
                    path: self.file.path.clone(),
                    what: name,
                    found: value.to_string(),
                    supported: "models that leave it at its default",
                });
            }
        }
        Ok(())
    }

    fn refuse_foreign_tensors(&self, config: &ModelConfig) -> Result<()> {
        match weights::foreign(self.file.tensors.keys(), "blk.", Part::gguf_name, config) {
            None => Ok(()),
            Some(name) => Err(Error::Unsupported {
                path: self.file.path.clone(),
                what: "tensor",
                found: name.clone(),
                supported: weights::SUPPORTED_TENSORS,
            }),
        }
    }

    fn rope_scaling(&self, architecture: &str, head_dim: usize) -> Result<RopeScaling> {
        let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
        let number = |name: &str| self.file.optional(&key(name), "a number", Value::as_f64);
        if let Some(entry) = self.file.tensors.get("rope_freqs.weight") {
            if entry.dims != [head_dim / 2] {
                return Err(self.shape_error("rope_freqs.weight", &[head_dim / 2], entry));
            }
            return Ok(RopeScaling::Divisors(f32_values(&self.file, "rope_freqs.weight", entry)?));
        }
        let kind = self.file.optional(&key("type"), "a name", |v| v.as_str().map(str::to_owned))?;
        let factor = number("factor")?;
        match (kind.as_deref(), factor) {
            (None | Some("none"), None) | (Some("none"), _) => Ok(RopeScaling::None),
            (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => {
                self.refuse_unusual(architecture, &YARN_DETAILS)?;
                let original = number("original_context_length")?;
                let original = original.ok_or_else(|| Error::Config {
                    path: self.file.path.clone(),
                    key: key("original_context_length"),
                    expected: "a count".into(),
                    found: "nothing".into(),
                })?;
                Ok(RopeScaling::Yarn { factor, original })
            }
            (kind, factor) => Err(Error::Unsupported {
                path: self.file.path.clone(),
                what: "RoPE scaling",
                found: format!("{} with the factor {factor:?}", kind.unwrap_or("none")),
                supported: "none, linear, llama3, yarn, each with its factor",
            }),
        }
    }

    fn entry(&self, part: Part) -> Result<(String, TensorEntry)> {
        let name = part.gguf_name();
        match self.file.tensors.get(&name) {
            Some(entry) => Ok((name, entry.clone())),
            None => Err(Error::MissingTensor { path: self.file.path.clone(), name }),
        }
    }

    fn shape_error(&self, name: &str, expected: &[usize], entry: &TensorEntry) -> Error {
        Error::TensorShape {
            path: self.file.path.clone(),
            name: name.to_owned(),
            expected: expected.to_vec(),
            found: entry.dims.clone(),
        }
    }

    /// Heads whose rows llama.cpp interleaved for its RoPE, if it did so for this tensor.
    fn interleaved_heads(&self, part: Part) -> Option<usize> {
        let config = self.config.as_ref()?;
        match (config.family, part) {
            (Family::Llama | Family::Mistral, Part::Query(_) | Part::QueryBias(_)) => {
                Some(config.shape.query_heads)
            }
            (Family::Llama | Family::Mistral, Part::Key(_) | Part::KeyBias(_)) => {
                Some(config.shape.kv_heads)
            }
            _ => None,
        }
    }
}

impl Source for GgufSource {
    fn vector(&mut self, part: Part, len: usize) -> Result<Vec<f32>> {
        let (name, entry) = self.entry(part)?;
        if entry.dims != [len] {
            return Err(self.shape_error(&name, &[len], &entry));
        }
        let values = f32_values(&self.file, &name, &entry)?;
        Ok(match self.interleaved_heads(part) {
            Some(heads) => uninterleave(&values, heads, 1),
            None => values,
        })
    }

    fn matrix(&mut self, part: Part, rows: usize, cols: usize) -> Result<Matrix> {
        let (name, entry) = self.entry(part)?;
        if entry.dims != [rows, cols] {
            return Err(self.shape_error(&name, &[rows, cols], &entry));
        }
        let mut bytes = self.file.bytes(&name, &entry)?;
        if let Some(heads) = self.interleaved_heads(part) {
            let rows_bytes = bytes.as_ref().len() / rows;
            let ordered = uninterleave(bytes.as_ref(), heads, rows_bytes);
            bytes.as_mut().copy_from_slice(&ordered);
        }
        let kind = self.file.kind(&name, &entry)?;
        let tensor = quantized(&bytes, kind, &entry.dims)?;
        Ok(if self.precision == Precision::F32 || !has_product(kind) {
            Matrix::Dense(tensor.dequantize(&Device::Cpu)?)
        } else {
            Matrix::Quantized(Arc::new(tensor))
        })
    }
}

/// Whether rows of this type are multiplied as they are.
fn has_product(kind: GgmlDType) -> bool {
    !matches!(kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)
}

fn quantized(bytes: &AlignedBytes, kind: GgmlDType, dims: &[usize]) -> Result<QTensor> {
    let storage = QStorage::from_data(Cow::Borrowed(bytes.as_ref()), &Device::Cpu, kind)?;
    Ok(QTensor::new(storage, dims)?)
}

fn f32_values(file: &GgufFile, name: &str, entry: &TensorEntry) -> Result<Vec<f32>> {
    let bytes = file.bytes(name, entry)?;
    let kind = file.kind(name, entry)?;
    let values: Tensor = quantized(&bytes, kind, &entry.dims)?.dequantize(&Device::Cpu)?;
    Ok(values.flatten_all()?.to_vec1()?)
}

/// Undoes llama.cpp's interleaving of the rows of q and k: its row `2i + j` of a head is row
/// `j * head_dim/2 + i` of the original. `width` elements per row; works on bytes of quantized rows
/// as well, since blocks never cross rows.
fn uninterleave<T: Copy>(rows: &[T], heads: usize, width: usize) -> Vec<T> {
    let half = rows.len() / (heads * width) / 2;
    let mut ordered = Vec::with_capacity(rows.len());
    for head in 0..heads {
        for j in 0..2 {
            for i in 0..half {
                let row = head * 2 * half + 2 * i + j;
                ordered.extend_from_slice(&rows[row * width..][..width]);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_is_undone() {
        // Original rows 0..4 of two heads, as llama.cpp's converter stores them.
        let stored = [0, 2, 1, 3, 10, 12, 11, 13];
        assert_eq!(uninterleave(&stored, 2, 1), [0, 1, 2, 3, 10, 11, 12, 13]);
        let wide: Vec<i32> = stored.iter().flat_map(|&x| [x, -x]).collect();
        let want: Vec<i32> = [0, 1, 2, 3, 10, 11, 12, 13].iter().flat_map(|&x| [x, -x]).collect();
        assert_eq!(uninterleave(&wide, 2, 2), want);
    }
}
