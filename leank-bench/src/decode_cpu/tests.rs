//! A tiny model from end to end.

use std::path::Path;

use candle_core::{
    Device, Tensor,
    quantized::{
        GgmlDType, QTensor,
        gguf_file::{self, Value},
    },
};
use leank_core::Dtype;

use super::*;
use crate::setting::Published;

const SHAPE: ModelShape = ModelShape { layers: 2, query_heads: 6, kv_heads: 2, head_dim: 16 };
const HIDDEN: usize = 64;
const CONTEXT: usize = 512;

/// A random llama in Q4_1.
fn write_model(path: &Path) {
    let mut random = Rng::new(1);
    let mut tensors: Vec<(String, QTensor)> = Vec::new();
    let mut add = |name: String, dims: &[usize]| {
        let (middle, spread) = match dims {
            [_, cols] => (0.0, 1.2 / (*cols as f64).sqrt()),
            _ => (1.0, 0.1),
        };
        let count = dims.iter().product();
        let values = (0..count).map(|_| (middle + spread * random.normal()) as f32).collect();
        let tensor = Tensor::from_vec::<_, f32>(values, dims, &Device::Cpu).unwrap();
        let kind = if dims.len() == 1 { GgmlDType::F32 } else { GgmlDType::Q4_1 };
        tensors.push((format!("{name}.weight"), QTensor::quantize(&tensor, kind).unwrap()));
    };
    let (q, kv) = (SHAPE.query_heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim);
    add("token_embd".into(), &[256, HIDDEN]);
    add("output_norm".into(), &[HIDDEN]);
    for layer in 0..SHAPE.layers {
        for (name, dims) in [
            ("attn_norm", &[HIDDEN][..]),
            ("ffn_norm", &[HIDDEN]),
            ("attn_q", &[q, HIDDEN]),
            ("attn_k", &[kv, HIDDEN]),
            ("attn_v", &[kv, HIDDEN]),
            ("attn_output", &[HIDDEN, q]),
            ("ffn_gate", &[HIDDEN, HIDDEN]),
            ("ffn_up", &[HIDDEN, HIDDEN]),
            ("ffn_down", &[HIDDEN, HIDDEN]),
        ] {
            add(format!("blk.{layer}.{name}"), dims);
        }
    }
    // One token per byte, printable or not: no text is read.
    let tokens = (0..256).map(|i| Value::String(char::from_u32(256 + i).unwrap().to_string()));
    let number = |n: usize| Value::U32(n as u32);
    let metadata = [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", number(SHAPE.layers)),
        ("llama.context_length", number(CONTEXT)),
        ("llama.embedding_length", number(HIDDEN)),
        ("llama.feed_forward_length", number(HIDDEN)),
        ("llama.attention.head_count", number(SHAPE.query_heads)),
        ("llama.attention.head_count_kv", number(SHAPE.kv_heads)),
        ("llama.attention.key_length", number(SHAPE.head_dim)),
        ("llama.attention.value_length", number(SHAPE.head_dim)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.rope.freq_base", Value::F32(1000.0)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("smollm".into())),
        ("tokenizer.ggml.tokens", Value::Array(tokens.collect())),
        ("tokenizer.ggml.merges", Value::Array(Vec::new())),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> =
        tensors.iter().map(|(name, tensor)| (&name[..], tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// A model in a folder that lives as long as the first of the two.
fn tiny() -> (tempfile::TempDir, DecodeCpuOptions) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.gguf");
    write_model(&model);
    let options = DecodeCpuOptions {
        model,
        precision: Precision::AsStored,
        mask: MaskChoice::Published(Published::Llama),
        formats: None,
        dtype: Dtype::Bf16,
        contexts: vec![300, 1400],
        tokens: 2,
        rounds: 2,
        probe: 1 << 20,
        llama_cpp: None,
    };
    (folder, options)
}

#[test]
fn every_cache_gives_the_same_logits() {
    let (_folder, options) = tiny();
    // As stored, activations are rounded to 16 bits, and a sum that differs in its last bit may round otherwise.
    for (precision, bound) in [(Precision::AsStored, 1e-3), (Precision::F32, 1e-4)] {
        let model = Model::load(&options.model, LoadOptions::with_precision(precision)).unwrap();
        let shape = model.config().shape;
        assert_eq!(shape, SHAPE);
        let dense = CacheConfig { dtype: Dtype::F32, ..CacheConfig::dense(shape).unwrap() };
        let mut dense = Ours::new(&model, dense, 0).unwrap();
        let mut concat = Candle::<Concat>::new(&model, 0, 1).unwrap();
        let mut interleaved = Candle::<Interleaved>::new(&model, 0, 1).unwrap();
        let mut random = Rng::new(2);
        let mut last = Vec::new();
        for position in 0..200 {
            let token = random.below(256) as u32;
            let want = dense.step(token).unwrap();
            assert_ne!(want, last, "logits that depend on the tokens");
            let others = [concat.step(token).unwrap(), interleaved.step(token).unwrap()];
            for (name, got) in ["concatenated", "interleaved"].into_iter().zip(others) {
                for (got, want) in got.iter().zip(&want) {
                    let near = (got - want).abs() < bound * (1.0 + want.abs());
                    assert!(near, "{name}, position {position}: {got} and {want}");
                }
            }
            last = want;
        }
    }
}

#[test]
fn a_run_measures_every_variant_at_every_context() {
    let (_folder, options) = tiny();
    let mut seen = Vec::new();
    let report = measure(&options, |context| seen.push(context.context)).unwrap();
    assert_eq!(seen, options.contexts);
    // Q4_1: 20 bytes for 32 weights.
    let (q, kv) = (SHAPE.query_heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim);
    let layer = HIDDEN * (2 * q + 2 * kv + 3 * HIDDEN);
    assert_eq!(report.weight_bytes, ((SHAPE.layers * layer + 256 * HIDDEN) / 32 * 20) as u64);
    for context in &report.contexts {
        let names: Vec<&str> = context.variants.iter().map(|variant| &variant.name[..]).collect();
        let all = ["lean", "dense", "candle, concatenated", "candle, interleaved"];
        assert_eq!(names, all);
        let bytes: Vec<u64> = context.variants.iter().map(|variant| variant.cache_bytes).collect();
        let elements =
            (context.context * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 2) as u64;
        assert_eq!(bytes[2..], [4 * elements; 2], "all tokens, in f32");
        assert!(bytes[1] >= 2 * elements, "whole blocks of bf16");
        assert!(context.variants.iter().all(|variant| variant.ms > 0.0));
    }
    // Sink 128 and recent 768 leave nothing between them in the short one.
    let lean = |i: usize| &report.contexts[i].variants;
    assert_eq!(lean(0)[0].cache_bytes, lean(0)[1].cache_bytes);
    assert!(lean(1)[0].cache_bytes < lean(1)[1].cache_bytes);
    let text = report.to_string();
    assert!(text.contains("LLAMA.CPP IS MISSING"), "{text}");
    assert!(text.contains("beyond the model's 512 tokens"), "{text}");
}

#[test]
fn llama_cpp_that_does_not_start_is_told() {
    let (_folder, options) = tiny();
    let python = Some("no/such/python".into());
    let options = DecodeCpuOptions { llama_cpp: python, contexts: vec![64], ..options };
    let report = measure(&options, |_| ()).unwrap();
    assert_eq!(report.contexts[0].variants.len(), 4);
    assert!(report.llama_cpp.unwrap_err().contains("no/such/python"));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let (folder, options) = tiny();
    let other = folder.path().join("other.safetensors");
    let mask = CacheConfig::dense(ModelShape { layers: 3, ..SHAPE }).unwrap().mask;
    leank_core::files::write_mask(&other, &mask).unwrap();
    for (bad, mend) in [
        (DecodeCpuOptions { contexts: vec![], ..options.clone() }, "contexts"),
        (DecodeCpuOptions { rounds: 0, ..options.clone() }, "rounds"),
        (DecodeCpuOptions { tokens: 0, ..options.clone() }, "tokens"),
        (DecodeCpuOptions { contexts: vec![6], ..options.clone() }, "more than the 6 tokens"),
        (DecodeCpuOptions { mask: MaskChoice::File(other), ..options.clone() }, "layers"),
    ] {
        let error = measure(&bad, |_| ()).unwrap_err().to_string();
        assert!(error.contains(mend), "{mend}: {error}");
    }
}
