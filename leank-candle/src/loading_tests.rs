//! Loaders against each other and against damaged files; the forward pass against itself.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use leank_train::rng::Rng;
use serde_json::json;

use crate::testing::{CONTEXT, HIDDEN, LAYERS, TinyModel, load, vocab};
use crate::weights::Part;
use crate::{Attention, DenseAttention, Error, Model, Precision, Result};

pub(crate) fn tokens(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(vocab()) as u32).collect()
}

fn hidden(model: &Model, tokens: &[u32]) -> Tensor {
    let positions: Vec<usize> = (0..tokens.len()).collect();
    let mut attention = DenseAttention::new(model.config(), tokens.len());
    model.hidden(tokens, &positions, &mut attention).unwrap()
}

pub(crate) fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let logits = model.logits(&hidden(model, tokens)).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn gguf_and_folder_are_one_model() {
    for tiny in TinyModel::all() {
        let folder = tiny.load();
        let gguf = load(&tiny.write_gguf(GgmlDType::F32), Precision::F32).unwrap();
        let tokens = tokens(40, 1);
        // The same numbers in the same order: not a bit may differ.
        assert_eq!(logits(&folder, &tokens), logits(&gguf, &tokens));
        assert_eq!(folder.fingerprint(), gguf.fingerprint());
        assert_eq!(folder.config().shape(), gguf.config().shape());
        assert_eq!(folder.tokenizer().eos(), gguf.tokenizer().eos());
        let f16 = load(&tiny.write_gguf(GgmlDType::F16), Precision::AsStored).unwrap();
        assert!(largest_difference(&logits(&f16, &tokens), &logits(&folder, &tokens)) < 0.1);
    }
}

#[test]
fn other_models_have_other_fingerprints() {
    let one = TinyModel::llama().load();
    let other = TinyModel::new(crate::Family::Llama, true, 99).load();
    assert!(one.fingerprint().check(other.fingerprint(), None).is_err());
}

#[test]
fn quantized_weights_give_the_same_model_in_both_precisions() {
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q4_0] {
        for tiny in TinyModel::all() {
            let path = tiny.write_gguf(kind);
            let tokens = tokens(30, 2);
            let widened = load(&path, Precision::F32).unwrap();
            let stored = load(&path, Precision::AsStored).unwrap();
            assert_eq!(stored.precision(), Precision::AsStored);
            assert_eq!(stored.fingerprint(), tiny.load().fingerprint());
            let wide = logits(&widened, &tokens);
            let spread = wide.iter().map(|x| x * x).sum::<f32>() / wide.len() as f32;
            let difference = largest_difference(&wide, &logits(&stored, &tokens));
            // Activations in 8 bits: some percent of a typical logit, far from a wrong row order.
            assert!(difference < 0.5 * spread.sqrt(), "{kind:?}: {difference} of {spread}");
        }
    }
}

#[test]
fn parts_come_out_as_they_went_in() {
    for tiny in TinyModel::all() {
        let model = tiny.load();
        for (part, tensor) in &tiny.weights {
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(model.weight(*part).unwrap().unwrap(), values, "{part:?}");
        }
        if tiny.tied {
            let embedding = model.weight(Part::Embedding).unwrap();
            assert_eq!(model.weight(Part::Output).unwrap(), embedding);
        }
        // Quantized parts are widened, in the same order of rows.
        let stored = load(&tiny.write_gguf(GgmlDType::Q8_0), Precision::AsStored).unwrap();
        for part in [Part::Query(1), Part::Down(0), Part::Embedding] {
            let (exact, wide) = (model.weight(part).unwrap(), stored.weight(part).unwrap());
            let (exact, wide) = (exact.unwrap(), wide.unwrap());
            let largest = exact.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()));
            assert!(largest_difference(&exact, &wide) < largest / 100.0, "{part:?}");
        }
        let biased = model.config().qkv_bias;
        assert_eq!(model.weight(Part::KeyBias(0)).unwrap().is_some(), biased);
        assert_eq!(stored.weight(Part::KeyBias(0)).unwrap().is_some(), biased);
        assert!(model.weight(Part::Gate(99)).unwrap().is_none());
    }
}

#[test]
fn chunks_and_single_tokens_equal_one_pass() {
    let model = TinyModel::llama().load();
    let tokens = tokens(100, 3);
    let whole = hidden(&model, &tokens);
    for chunk in [1, 7, 64] {
        let mut attention = DenseAttention::new(model.config(), 0);
        let mut parts = Vec::new();
        for piece in tokens.chunks(chunk) {
            let start = attention.len();
            let positions: Vec<usize> = (start..start + piece.len()).collect();
            parts.push(model.hidden(piece, &positions, &mut attention).unwrap());
        }
        let parts = Tensor::cat(&parts, 0).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(largest_difference(&flat(&whole), &flat(&parts)) < 1e-4, "chunks of {chunk}");
        let mut prefilled = DenseAttention::new(model.config(), 0);
        let last = prefilled.prefill(&model, &tokens).unwrap();
        assert!(largest_difference(&flat(&whole.narrow(0, 99, 1).unwrap()), &flat(&last)) < 1e-4);
        assert_eq!(prefilled.len(), attention.len());
    }
}

/// Two sequences in one forward pass.
struct Pair {
    first: (DenseAttention, usize),
    second: DenseAttention,
}

impl Attention for Pair {
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (first, cut) = &mut self.first;
        let part = |t: &Tensor, from: usize, n: usize| t.narrow(0, from, n)?.contiguous();
        let rest = q.dim(0)? - *cut;
        let head =
            first.attend(layer, &part(q, 0, *cut)?, &part(k, 0, *cut)?, &part(v, 0, *cut)?)?;
        let (q, k, v) = (part(q, *cut, rest)?, part(k, *cut, rest)?, part(v, *cut, rest)?);
        Ok(Tensor::cat(&[head, self.second.attend(layer, &q, &k, &v)?], 0)?)
    }
}

#[test]
fn a_batch_equals_its_sequences() {
    let model = TinyModel::qwen2().load();
    let (a, b) = (tokens(23, 4), tokens(9, 5));
    let mut pair = Pair {
        first: (DenseAttention::new(model.config(), 0), a.len()),
        second: DenseAttention::new(model.config(), 0),
    };
    let both: Vec<u32> = a.iter().chain(&b).copied().collect();
    let positions: Vec<usize> = (0..a.len()).chain(0..b.len()).collect();
    let both = model.hidden(&both, &positions, &mut pair).unwrap();
    let both = both.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let single = Tensor::cat(&[hidden(&model, &a), hidden(&model, &b)], 0).unwrap();
    let single = single.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(largest_difference(&both, &single) < 1e-4);
}

#[test]
fn impossible_batches_are_errors() {
    let model = TinyModel::llama().load();
    let mut attention = DenseAttention::new(model.config(), 0);
    let mut run =
        |tokens: &[u32], positions: &[usize]| model.hidden(tokens, positions, &mut attention);
    assert!(matches!(run(&[], &[]), Err(Error::Mismatch { .. })));
    assert!(matches!(run(&[1, 2], &[0]), Err(Error::Mismatch { .. })));
    let vocab = vocab();
    assert!(matches!(run(&[vocab as u32], &[0]), Err(Error::Token { .. })));
    assert!(matches!(run(&[1], &[CONTEXT]), Err(Error::Context { needed: 513, limit: 512, .. })));
    assert!(matches!(run(&[1], &[usize::MAX]), Err(Error::Context { .. })));
    let long = vec![1; CONTEXT + 1];
    assert!(attention.prefill(&model, &long).is_err());
    assert!(attention.is_empty(), "a failed prefill left tokens behind");
}

#[test]
fn a_truncated_gguf_is_an_error_wherever_it_ends() {
    let tiny = TinyModel::llama();
    let path = tiny.write_gguf(GgmlDType::Q8_0);
    let bytes = std::fs::read(&path).unwrap();
    let cut_path = tiny.folder.path().join("cut.gguf");
    // The last tensor's padding may be missing, nothing else.
    let ends = (0..400).chain((400..bytes.len() - 32).step_by(997));
    for end in ends {
        std::fs::write(&cut_path, &bytes[..end]).unwrap();
        let error = load(&cut_path, Precision::F32).expect_err("half a file was taken for a whole");
        assert!(error.to_string().contains("cut.gguf"), "{end}: {error}");
    }
}

#[test]
fn metadata_that_take_many_times_their_size_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bytes.gguf");
    let elements = (1u64 << 24) + 1;
    let mut bytes = [&b"GGUF\x03\0\0\0"[..], &[0; 8], &1u64.to_le_bytes()].concat();
    bytes.extend([&1u64.to_le_bytes()[..], b"x", &9u32.to_le_bytes(), &[0; 4]].concat());
    bytes.extend(elements.to_le_bytes());
    bytes.resize(bytes.len() + elements as usize, 0);
    std::fs::write(&path, bytes).unwrap();
    let error = load(&path, Precision::F32).expect_err("17 million elements").to_string();
    assert!(error.contains("more than 16777216 elements"), "{error}");
}

#[test]
fn damaged_headers_never_panic() {
    let tiny = TinyModel::qwen2();
    let path = tiny.write_gguf(GgmlDType::F32);
    let bytes = std::fs::read(&path).unwrap();
    let damaged_path = tiny.folder.path().join("damaged.gguf");
    let mut rng = Rng::new(6);
    let mut errors = 0;
    for round in 0..600 {
        let mut damaged = bytes.clone();
        for _ in 0..=round % 3 {
            // The header is some 10 kB long: mostly vocabulary, the numbers at its ends.
            let reach = if round % 2 == 0 { 600 } else { 12_000 };
            damaged[rng.below(reach)] = [0, 1, 0x7f, 0xff, rng.next_u64() as u8][rng.below(5)];
        }
        std::fs::write(&damaged_path, &damaged).unwrap();
        errors += usize::from(load(&damaged_path, Precision::F32).is_err());
    }
    assert!(errors > 100, "only {errors} of 600 damaged files were found out");
}

#[test]
fn hostile_metadata_are_named() {
    let cases: [(&str, Value, &str); 11] = [
        ("general.alignment", Value::U32(0), "general.alignment"),
        (
            "general.architecture",
            Value::String("mamba".into()),
            "supported: llama, mistral, qwen2, qwen3, gemma3",
        ),
        ("llama.attention.head_count", Value::U32(0), "query heads is 0"),
        ("llama.attention.head_count_kv", Value::U32(3), "not a multiple of 3 KV heads"),
        ("llama.embedding_length", Value::U32(64), "token_embd.weight has the shape"),
        ("llama.rope.freq_base", Value::F32(f32::NAN), "RoPE base"),
        ("llama.expert_count", Value::U32(8), "8 experts"),
        ("llama.attention.sliding_window", Value::U32(128), "a sliding window of 128"),
        ("llama.logit_scale", Value::F32(16.0), "logit_scale 16 is not supported"),
        ("llama.rope.scaling.attn_factor", Value::F32(0.5), "attn_factor 0.5 is not supported"),
        ("tokenizer.ggml.pre", Value::String("klingon".into()), "klingon"),
    ];
    for (key, value, expected) in cases {
        let tiny = TinyModel::llama();
        let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
            metadata.retain(|(name, _)| name != key);
            metadata.push((key.into(), value));
        });
        let message = load(&path, Precision::F32).unwrap_err().to_string();
        assert!(message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn yarn_in_gguf_is_the_published_one() {
    let load_with = |detail: Option<(&str, f32)>| {
        let tiny = TinyModel::llama();
        let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
            let mut add = |name: &str, value| {
                metadata.push((format!("llama.rope.scaling.{name}"), value));
            };
            add("type", Value::String("yarn".into()));
            add("factor", Value::F32(4.0));
            add("original_context_length", Value::U32(128));
            if let Some((name, value)) = detail {
                add(name, Value::F32(value));
            }
        });
        load(&path, Precision::F32).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(load_with(None), Ok(()));
    assert_eq!(load_with(Some(("yarn_beta_fast", 32.0))), Ok(()));
    for detail in ["yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor", "yarn_log_multiplier"] {
        let message = load_with(Some((detail, 3.0))).unwrap_err();
        assert!(message.contains(&format!("{detail} 3 is not supported")), "{message}");
    }
}

/// Loads the folder of a tiny model with `change` made to its `config.json`.
fn load_configured(change: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
    let tiny = TinyModel::llama();
    let folder = tiny.write_folder();
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    load(&folder, Precision::F32).map(drop)
}

#[test]
fn other_forward_passes_in_config_json_are_refused() {
    let yarn = |details: serde_json::Value| {
        let mut yarn = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        });
        yarn.as_object_mut().unwrap().extend(details.as_object().unwrap().clone());
        yarn
    };
    for (key, value, expected) in [
        ("partial_rotary_factor", json!(0.5), "RoPE of 0.5 of the channels"),
        ("rope_parameters", json!({"partial_rotary_factor": 0.25}), "RoPE of 0.25"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "sliding_attention"),
        ("use_sliding_window", json!(true), "sliding window"),
        ("rope_scaling", yarn(json!({"attention_factor": 1.0})), "attention_factor 1.0"),
        ("rope_scaling", yarn(json!({"beta_fast": 16})), "beta_fast 16"),
        ("rope_scaling", yarn(json!({"beta_slow": 2})), "beta_slow 2"),
        ("rope_scaling", yarn(json!({"mscale": 0.7, "mscale_all_dim": 0.7})), "mscale 0.7"),
        ("rope_parameters", yarn(json!({"truncate": false})), "truncate false"),
    ] {
        let message = load_configured(|config| config[key] = value).unwrap_err().to_string();
        assert!(message.contains(expected), "{key}: {message}");
        assert!(message.contains("config.json") && message.contains("supported: "), "{message}");
    }
    // The defaults, spelled out.
    let usual = json!({
        "beta_fast": 32, "beta_slow": 1.0, "truncate": true, "mscale": null,
        "attention_factor": 0.1 * 4.0f64.ln() + 1.0,
    });
    for (key, value) in [
        ("partial_rotary_factor", json!(1.0)),
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("rope_scaling", yarn(usual)),
    ] {
        assert!(load_configured(|config| config[key] = value.clone()).is_ok(), "{key}: {value}");
    }
}

#[test]
fn tensors_that_would_be_left_out_are_refused() {
    let norm = || Tensor::ones(HIDDEN, DType::F32, &Device::Cpu).unwrap();
    // A third layer beside the two of the configuration; a bias that only qwen2 has.
    for (part, gguf, hf) in [
        (Part::MlpNorm(LAYERS), "blk.2.ffn_norm", "layers.2.post_attention_layernorm"),
        (Part::KeyBias(0), "blk.0.attn_k.bias", "layers.0.self_attn.k_proj.bias"),
    ] {
        let mut tiny = TinyModel::llama();
        tiny.weights.push((part, norm()));
        for (path, name) in [(tiny.write_gguf(GgmlDType::F32), gguf), (tiny.write_folder(), hf)] {
            let error = load(&path, Precision::F32).unwrap_err();
            assert!(matches!(error, Error::Unsupported { what: "tensor", .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

#[test]
fn missing_pieces_are_named() {
    let mut tiny = TinyModel::llama();
    tiny.weights.retain(|(part, _)| *part != Part::Up(LAYERS - 1));
    let check = |path: &Path, expected: &str| {
        let error = load(path, Precision::F32).unwrap_err();
        assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    check(&tiny.write_gguf(GgmlDType::F32), "blk.1.ffn_up.weight");
    check(&tiny.write_folder(), "model.layers.1.mlp.up_proj.weight");

    let gguf = TinyModel::llama();
    let path = gguf.write_gguf_with(GgmlDType::F32, |metadata| {
        metadata.retain(|(key, _)| key != "llama.block_count");
    });
    let error = load(&path, Precision::F32).unwrap_err();
    assert!(error.to_string().contains("llama.block_count: expected a count, found nothing"));
}

#[test]
fn what_is_not_a_model_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.gguf");
    assert!(matches!(load(&path, Precision::F32), Err(Error::Io { .. })));
    for content in [&b""[..], b"GG", b"PK\x03\x04 a zip file", b"GGUF"] {
        std::fs::write(&path, content).unwrap();
        let error = load(&path, Precision::F32).unwrap_err();
        assert!(matches!(error, Error::NotGguf { .. } | Error::Damaged { .. }), "{error}");
    }
    assert!(matches!(load(folder.path(), Precision::F32), Err(Error::Io { .. })));
    std::fs::write(folder.path().join("config.json"), "{\"model_type\": \"llama\"}").unwrap();
    assert!(matches!(load(folder.path(), Precision::F32), Err(Error::Damaged { .. })));
}

#[test]
fn a_damaged_folder_is_an_error() {
    let tiny = TinyModel::llama();
    let folder = tiny.write_folder();
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for end in (0..bytes.len() - 1).step_by(bytes.len() / 60) {
        std::fs::write(&path, &bytes[..end]).unwrap();
        let error = load(&folder, Precision::F32).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{end}: {error}");
    }
    std::fs::write(&path, &bytes).unwrap();
    std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let error = load(&folder, Precision::F32).unwrap_err();
    assert!(matches!(error, Error::Damaged { format: "tokenizer.json", .. }), "{error}");
    let index = folder.join("model.safetensors.index.json");
    std::fs::write(&index, "{\"weight_map\": {\"x\": \"../secret\"}}").unwrap();
    tiny.write_folder();
    let message = load(&folder, Precision::F32).unwrap_err().to_string();
    assert!(message.contains("not a file of the folder"), "{message}");
}

#[test]
fn texts_survive_the_tokenizer() {
    let tiny = TinyModel::llama();
    let folder = tiny.load();
    let gguf = load(&tiny.write_gguf(GgmlDType::F32), Precision::F32).unwrap();
    for text in ["the theory", "", " \n\t x", "42 naïve Grüße", "日本語 🦀🦀", "a<|end|>b"]
    {
        let tokens = gguf.tokenizer().encode(text).unwrap();
        assert_eq!(tokens, folder.tokenizer().encode(text).unwrap(), "{text}");
        assert_eq!(gguf.tokenizer().decode(&tokens).unwrap(), text.replace("<|end|>", ""));
        let mut stream = gguf.tokenizer().stream();
        let mut streamed = String::new();
        for token in tokens {
            let piece = stream.push(token).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "half a character of {text:?}");
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, text.replace("<|end|>", ""));
    }
    let the = gguf.tokenizer().encode("the").unwrap();
    assert_eq!(the, [257], "merges were not applied");
    assert_eq!(gguf.tokenizer().encode("<|end|>").unwrap(), gguf.tokenizer().eos());
    // A character that never ends comes out as a replacement, at the end.
    let mut stream = gguf.tokenizer().stream();
    let crab = gguf.tokenizer().encode("🦀").unwrap();
    assert_eq!(stream.push(crab[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

#[test]
fn bos_goes_in_front_only_where_the_model_wants_it() {
    let tiny = TinyModel::llama();
    let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
        metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
        metadata.push(("tokenizer.ggml.add_bos_token".into(), Value::Bool(true)));
    });
    let model = load(&path, Precision::F32).unwrap();
    assert_eq!(model.tokenizer().encode("the").unwrap(), [258, 257]);
    assert_eq!(model.tokenizer().encode_piece("the").unwrap(), [257]);
    assert_eq!(model.tokenizer().text_start(), Some(258));
    assert_eq!(tiny.load().tokenizer().text_start(), None);
}

#[test]
fn gradients_need_f32_weights() {
    let tiny = TinyModel::llama();
    let model = load(&tiny.write_gguf(GgmlDType::Q8_0), Precision::AsStored).unwrap();
    let options = crate::ProbeOptions {
        prefix: 5,
        probe: leank_train::dump::Probe::Fisher,
        draws: 1,
        seed: 0,
    };
    let error = crate::probe(&model, &tokens(9, 7), &options).unwrap_err();
    assert!(error.to_string().contains("Precision::F32"), "{error}");
    let random = crate::ProbeOptions { probe: leank_train::dump::Probe::Random, ..options };
    assert!(crate::probe(&model, &tokens(9, 7), &random).is_ok());
}
