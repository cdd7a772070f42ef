//! What only some families have, from whichever file: further norms, sliding layers, a nested
//! configuration, SentencePiece vocabularies.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::loading_tests::{logits, tokens};
use crate::testing::{HIDDEN, LAYERS, TinyModel, load};
use crate::weights::Part;
use crate::{Error, Model, Precision, Result};

#[test]
fn other_forward_passes_of_gemma3_are_refused() {
    for (key, value, expected) in [
        ("attn_logit_softcapping", json!(50.0), "attn_logit_softcapping 50"),
        ("final_logit_softcapping", json!(30.0), "final_logit_softcapping 30"),
        ("use_bidirectional_attention", json!(true), "in both directions"),
        ("hidden_activation", json!("silu"), "activation silu"),
        ("layer_types", json!(["full_attention", "chunked_attention"]), "chunked_attention"),
        ("layer_types", json!(["full_attention"]), "layer_types: expected 2 of them, found 1"),
        ("sliding_window", json!(null), "sliding_window: expected a count of tokens"),
        ("sliding_window", json!(0), "sliding window: expected 1..=268435456"),
        ("sliding_window", json!(1u64 << 63), "sliding window: expected 1..=268435456"),
        ("sliding_window_pattern", json!(0), "sliding_window_pattern: expected at least 1"),
        ("query_pre_attn_scalar", json!(-1.0), "attention scale"),
        ("rope_local_base_freq", json!(0.0), "RoPE base of sliding layers"),
        (
            "rope_parameters",
            json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "RoPE scaling of sliding layers",
        ),
    ] {
        let tiny = TinyModel::gemma3();
        let folder = tiny.write_folder();
        let path = folder.join("config.json");
        let mut config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&path, config.to_string()).unwrap();
        let message = load(&folder, Precision::F32).unwrap_err().to_string();
        assert!(message.contains(expected), "{key}: {message}");
        assert!(message.contains("config.json"), "{message}");
    }
}

#[test]
fn hostile_metadata_of_gemma3_are_named() {
    for (key, value, expected) in [
        ("attention.sliding_window", None, "attention.sliding_window: expected a count"),
        ("attention.sliding_window", Some(Value::U32(0)), "sliding window: expected 1..=268435456"),
        (
            "attention.sliding_window",
            Some(Value::U32(u32::MAX)),
            "sliding window: expected 1..=268435456",
        ),
        ("attention.sliding_window_pattern", Some(Value::U32(0)), "expected at least 1, found 0"),
        ("final_logit_softcapping", Some(Value::F32(30.0)), "final_logit_softcapping 30"),
        ("rope.freq_base_swa", Some(Value::F32(-1.0)), "RoPE base of sliding layers"),
        ("block_count", Some(Value::U32(u32::MAX)), "layers is"),
        ("block_count", Some(Value::U32(1025)), "layers: expected 1..=1024, found 1025"),
    ] {
        let tiny = TinyModel::gemma3();
        let key = format!("gemma3.{key}");
        let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
            metadata.retain(|(name, _)| *name != key);
            metadata.extend(value.map(|value| (key.clone(), value)));
        });
        let message = load(&path, Precision::F32).unwrap_err().to_string();
        assert!(message.contains(expected), "{key}: {message}");
    }
}

#[test]
fn norms_of_the_family_are_needed_and_have_its_shape() {
    for (family, part, gguf, hf) in [
        (0, Part::QueryNorm(1), "blk.1.attn_q_norm.weight", "layers.1.self_attn.q_norm.weight"),
        (0, Part::KeyNorm(0), "blk.0.attn_k_norm.weight", "layers.0.self_attn.k_norm.weight"),
        (
            1,
            Part::PostAttentionNorm(0),
            "blk.0.post_attention_norm.weight",
            "layers.0.post_attention_layernorm.weight",
        ),
        (
            1,
            Part::PostMlpNorm(1),
            "blk.1.post_ffw_norm.weight",
            "layers.1.post_feedforward_layernorm.weight",
        ),
    ] {
        let make = || match family {
            0 => TinyModel::new(crate::Family::Qwen3, true, 3),
            _ => TinyModel::gemma3(),
        };
        let mut missing = make();
        missing.weights.retain(|(there, _)| *there != part);
        let mut wide = make();
        for (_, tensor) in wide.weights.iter_mut().filter(|(there, _)| *there == part) {
            *tensor = Tensor::ones(HIDDEN + 3, DType::F32, &Device::Cpu).unwrap();
        }
        for (tiny, is_missing) in [(missing, true), (wide, false)] {
            for (path, name) in [(tiny.write_gguf(GgmlDType::F32), gguf), (tiny.write_folder(), hf)]
            {
                let error = load(&path, Precision::F32).unwrap_err();
                assert_eq!(matches!(error, Error::MissingTensor { .. }), is_missing, "{error}");
                assert_eq!(matches!(error, Error::TensorShape { .. }), !is_missing, "{error}");
                assert!(error.to_string().contains(name), "{error}");
            }
        }
    }
}

#[test]
fn a_gemma3_inside_one_that_sees_images_is_the_same_model() {
    let tiny = TinyModel::gemma3();
    let plain = tiny.load();
    let folder = tiny.write_folder();
    let (config, tensors) = (folder.join("config.json"), folder.join("model.safetensors"));
    let mut text: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    let eos = text["eos_token_id"].take();
    text.as_object_mut().unwrap().remove("eos_token_id");
    let outer = json!({"model_type": "gemma3", "text_config": text, "eos_token_id": eos});
    std::fs::write(&config, outer.to_string()).unwrap();
    let own = candle_core::safetensors::load(&tensors, &Device::Cpu).unwrap();
    for prefix in ["language_model.model.", "model.language_model."] {
        let renamed =
            own.iter().map(|(name, tensor)| (name.replacen("model.", prefix, 1), tensor.clone()));
        let mut renamed: std::collections::HashMap<_, _> = renamed.collect();
        let vision = Tensor::ones(3, DType::F32, &Device::Cpu).unwrap();
        renamed.insert("vision_tower.layers.0.weight".to_owned(), vision);
        candle_core::safetensors::save(&renamed, &tensors).unwrap();
        let nested = load(&folder, Precision::F32).unwrap();
        let tokens = tokens(30, 8);
        assert_eq!(logits(&nested, &tokens), logits(&plain, &tokens));
        assert_eq!(nested.fingerprint(), plain.fingerprint());
        assert_eq!(nested.tokenizer().eos(), plain.tokenizer().eos());
    }
}

#[test]
fn fingerprints_of_sliding_layers_say_so() {
    let plain = TinyModel::llama().load();
    assert_eq!(plain.fingerprint().sliding, None);
    let gemma = TinyModel::gemma3();
    let fingerprint = gemma.load().fingerprint().clone();
    assert_eq!(fingerprint.shape.layers, LAYERS - 1);
    let sliding = fingerprint.sliding.unwrap();
    assert_eq!((sliding.layers, sliding.window), (1, crate::testing::SLIDING_WINDOW));
    // Another base or pattern is another model.
    for (key, value) in [("rope.freq_base_swa", 50.0), ("rope.freq_base", 50.0)] {
        let key = format!("gemma3.{key}");
        let path = gemma.write_gguf_with(GgmlDType::F32, |metadata| {
            metadata.retain(|(name, _)| *name != key);
            metadata.push((key.clone(), Value::F32(value)));
        });
        let other = load(&path, Precision::F32).unwrap();
        assert!(other.fingerprint().check(&fingerprint, None).is_err(), "{key}");
    }
}

/// A tiny model with a SentencePiece vocabulary.
fn sentence_piece(tiny: &TinyModel, space_prefix: bool, scores: usize) -> Result<Model> {
    let pieces: [(&str, f32, i32); 15] = [
        ("<unk>", 0.0, 2),
        ("<bos>", 0.0, 3),
        ("<eos>", 0.0, 3),
        ("<0xC3>", 0.0, 6),
        ("<0xBC>", 0.0, 6),
        ("▁", -9.0, 1),
        ("t", -9.0, 1),
        ("h", -9.0, 1),
        ("e", -9.0, 1),
        ("th", -1.0, 1),
        ("he", -0.5, 1),
        ("▁t", -3.0, 1),
        ("\n", 0.0, 4),
        ("\n\n", 0.0, 4),
        ("  ", 0.0, 4),
    ];
    let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
        metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
        let mut add = |key: &str, value| metadata.push((format!("tokenizer.ggml.{key}"), value));
        add("model", Value::String("llama".into()));
        let texts = pieces.iter().map(|piece| Value::String(piece.0.into())).collect();
        add("tokens", Value::Array(texts));
        let values = pieces.iter().take(scores).map(|piece| Value::F32(piece.1)).collect();
        add("scores", Value::Array(values));
        add("token_type", Value::Array(pieces.iter().map(|piece| Value::I32(piece.2)).collect()));
        add("unknown_token_id", Value::U32(0));
        add("bos_token_id", Value::U32(1));
        add("eos_token_id", Value::U32(2));
        add("add_space_prefix", Value::Bool(space_prefix));
    });
    load(&path, Precision::F32)
}

#[test]
fn sentence_pieces_join_by_score_and_fall_apart_into_bytes() {
    let tiny = TinyModel::gemma3();
    let model = sentence_piece(&tiny, false, 15).unwrap();
    let encode = |text: &str| model.tokenizer().encode_piece(text).unwrap();
    // "he" has a higher score than "th", and both than "▁t".
    assert_eq!(encode("the"), [6, 10]);
    assert_eq!(encode(" the"), [11, 10]);
    assert_eq!(encode("t\n\nt  ü"), [6, 13, 6, 14, 3, 4]);
    assert_eq!(encode("\n\n\n"), [13, 12]);
    assert_eq!(encode("x"), [0], "neither a token nor bytes");
    assert_eq!(model.tokenizer().encode("t").unwrap(), [1, 6], "BOS unless the file says no");
    for text in ["t\n\nt  ü", " the", "the  e", ""] {
        assert_eq!(model.tokenizer().decode(&encode(text)).unwrap(), text);
        let mut stream = model.tokenizer().stream();
        let mut streamed: String =
            encode(text).into_iter().map(|token| stream.push(token).unwrap()).collect();
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, text);
    }
    let model = sentence_piece(&tiny, true, 15).unwrap();
    let tokens = model.tokenizer().encode_piece("the").unwrap();
    assert_eq!(tokens, [11, 10]);
    assert_eq!(model.tokenizer().decode(&tokens).unwrap(), "the");
    let error = sentence_piece(&tiny, false, 14).unwrap_err().to_string();
    assert!(error.contains("expected 15, found 14 scores"), "{error}");
}
