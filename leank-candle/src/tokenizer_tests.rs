//! Tokenizers that a stranger wrote.

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file;
use leank_train::rng::Rng;
use serde_json::{Value, json};

use crate::testing::{TinyModel, load};
use crate::tokenizer::{byte_level_bpe, guarded, merges_by_score};
use crate::{Error, Model, Precision, Result};

/// The tiny model with another `tokenizer.json`.
fn with(tiny: &TinyModel, change: impl FnOnce(&mut Value)) -> Result<Model> {
    let folder = tiny.write_folder();
    let path = folder.join("tokenizer.json");
    let mut file = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut file);
    std::fs::write(&path, file.to_string()).unwrap();
    load(&folder, Precision::F32)
}

/// The tiny model with another value in one place of `tokenizer.json`.
fn with_value(tiny: &TinyModel, place: &str, value: Value) -> Result<Model> {
    with(tiny, |file| {
        let (object, key) = place.rsplit_once('/').unwrap();
        file.pointer_mut(object).unwrap()[key] = value;
    })
}

#[test]
fn what_would_change_a_texts_tokens_is_not_done() {
    let tiny = TinyModel::llama();
    let text = "the theory of the thing";
    let tokens = tiny.load().tokenizer().encode(text).unwrap();
    let truncation = |length, stride| json!({"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride});
    let padding = |length: u64| json!({"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    for (place, value) in [
        ("/truncation", truncation(3, 0)),
        ("/truncation", truncation(3, 5)),
        ("/padding", padding(64)),
        ("/padding", padding(1 << 40)),
        ("/model/dropout", json!(1.0)),
    ] {
        let model = with_value(&tiny, place, value.clone());
        assert_eq!(model.unwrap().tokenizer().encode(text).unwrap(), tokens, "{place} {value}");
    }
}

#[test]
fn what_the_crate_would_panic_at_is_refused() {
    let tiny = TinyModel::llama();
    let template = |single: Value| json!({"type": "TemplateProcessing", "single": [single], "pair": [], "special_tokens": {}});
    let map = |map: &str| json!({"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": map}]});
    let split =
        json!({"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]});
    for (place, value, words) in [
        ("/model/vocab/x y", json!(0), "are both token 0"),
        ("/model/merges", json!([["the", "the"]]), "\"the the\" is not of two tokens to a third"),
        ("/model/merges", json!(["th th"]), "\"th th\" is not of"),
        ("/model/merges", json!([["th", "x y"]]), "\"th x y\" is not of"),
        ("/model/continuing_subword_prefix", json!("##longer"), "is not of two tokens"),
        ("/model/continuing_subword_prefix", json!("h"), "\"th e\" is not of"),
        (
            "/post_processor",
            template(json!({"SpecialToken": {"id": "<s>", "type_id": 0}})),
            "\"<s>\"",
        ),
        (
            "/post_processor",
            template(json!({"Sequence": {"id": "B", "type_id": 0}})),
            "a single text",
        ),
        ("/post_processor", json!({"type": "Other"}), "unknown type \"Other\""),
        ("/pre_tokenizer", split, "no length"),
        ("/normalizer", map("AAAAAA=="), "precompiled_charsmap"),
        ("/normalizer", map("////////"), "precompiled_charsmap"),
        ("/normalizer", map("é"), "precompiled_charsmap"),
        ("/normalizer", json!({"type": "Precompiled"}), "precompiled_charsmap"),
        (
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": 1}),
            "precompiled_charsmap",
        ),
        // 256 units, the first of which leads beyond them, with a bit that its label has no use for.
        ("/normalizer", map(&format!("AAQAAAD8////{}", "A".repeat(1360))), "precompiled_charsmap"),
        // Four units, of which the first leads to others.
        ("/normalizer", map(&format!("EAAA{}", "A".repeat(23))), "precompiled_charsmap"),
    ] {
        let error = with_value(&tiny, place, value.clone());
        let error = error.unwrap_err();
        assert!(matches!(error, Error::Damaged { format: "tokenizer.json", .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(words), "{place} {value}: {message}");
        assert!(!message.contains("the crate tokenizers failed"), "{place} {value}: {message}");
    }
    // 256 units in which nothing is found: sound.
    let empty = map(&format!("AAQA{}AAA=", "AAAA".repeat(341)));
    let model = with(&tiny, |file| file["normalizer"] = empty).unwrap();
    assert_eq!(model.tokenizer().encode("the").unwrap(), [257]);
}

/// Small files that would take all memory, or time without end.
#[test]
fn what_grows_without_bound_is_refused() {
    let tiny = TinyModel::llama();
    let times =
        |n: usize, list: &str, step: Value| json!({"type": "Sequence", list: vec![step; n]});
    let twice = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let letters = json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let added = |content: &str, rstrip: bool| json!([{"id": 9999, "content": content, "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": true, "special": false}]);
    let grows = "more than 1024 times as long";
    for (place, value, words) in [
        ("/normalizer", times(11, "normalizers", twice.clone()), grows),
        ("/normalizer", json!({"type": "Prepend", "prepend": "a".repeat(1024)}), grows),
        ("/pre_tokenizer", times(11, "pretokenizers", bytes), grows),
        ("/decoder", times(5, "decoders", letters), grows),
        ("/normalizer", json!({"pattern": {"String": "a"}, "content": "aa"}), "unknown type null"),
        (
            "/normalizer",
            json!({"type": "BertNormalizer", "pattern": {"String": "a"}, "content": "aa"}),
            "unknown type \"BertNormalizer\"",
        ),
        (
            "/decoder",
            json!({"type": "Sequence", "decoders": [{"type": "Other"}]}),
            "unknown type \"Other\"",
        ),
        (
            "/decoder",
            json!({"type": "Lowercase", "pattern": {"String": "a"}, "content": "aa"}),
            "unknown type \"Lowercase\"",
        ),
        (
            "/normalizer",
            json!({"type": "Split", "pattern": {"String": "a"}, "content": "aa"}),
            "unknown type \"Split\"",
        ),
        ("/added_tokens", added(&"a".repeat((1 << 25) + 1), false), "of its added tokens"),
        ("/added_tokens", added("\u{a0} a", true), "takes those behind it"),
        ("/model/vocab", json!({"a".repeat(1025): 0}), "a token of 1025 bytes"),
        (
            "/model",
            json!({"type": "Unigram", "unk_id": 0, "vocab": [["a".repeat(129), 0.0]]}),
            "a token of 129 bytes",
        ),
        (
            "/model",
            json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 101, "vocab": {"a": 0}}),
            "words of 101 characters",
        ),
        (
            "/model/merges",
            json!(vec![json!(["t", "h"]); (1 << 28) / 130 + 1]),
            "merges of the tokenizer",
        ),
    ] {
        let error = with_value(&tiny, place, value);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{place}: {error}");
    }
    // Up to 1024 times is done, for texts that are as much shorter.
    let model = with(&tiny, |file| {
        file["normalizer"] = times(5, "normalizers", twice);
        file["pre_tokenizer"] = Value::Null;
    });
    let tokenizer = model.unwrap();
    let tokenizer = tokenizer.tokenizer();
    assert_eq!(tokenizer.encode("a").unwrap().len(), 32);
    let text = "b".repeat(1 << 21);
    assert_eq!(tokenizer.encode(&text).unwrap().len(), 1 << 21);
    let error = tokenizer.encode(&(text + "b")).unwrap_err().to_string();
    assert!(error.contains("a text of 2097153 bytes, more than 2097152"), "{error}");
}

#[test]
fn no_tokens_are_no_text_whatever_the_decoder() {
    let tiny = TinyModel::llama();
    let strip = json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]});
    for decoder in [json!({"type": "BPEDecoder", "suffix": "</w>"}), strip] {
        let model = with(&tiny, |file| {
            file["decoder"] = decoder;
            file["added_tokens"] = json!([{"id": 0, "content": "<s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false}]);
        });
        let model = model.unwrap();
        let special = model.tokenizer().encode("<s>").unwrap();
        let beyond = u32::MAX;
        let shown = model.tokenizer().encode("the").unwrap();
        for none in [&[][..], &special, &[beyond]] {
            assert_eq!(model.tokenizer().decode(none).unwrap(), "", "{none:?}");
        }
        let text = model.tokenizer().decode(&shown).unwrap();
        assert!(text.contains("the"), "{text:?}");
        let mut stream = model.tokenizer().stream();
        let pieces: Vec<_> = shown.iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
    }
}

#[test]
fn merges_with_a_prefix_are_those_of_the_crate() {
    let tiny = TinyModel::llama();
    let model = with(&tiny, |file| {
        file["pre_tokenizer"] = Value::Null;
        let vocab = json!({"t": 0, "##h": 1, "##e": 2, "th": 3, "the": 4});
        let merges = json!(["#version: 0.2", "t ##h", "th ##e"]);
        file["model"] = json!({"type": "BPE", "vocab": vocab, "merges": merges, "continuing_subword_prefix": "##"});
    });
    assert_eq!(model.unwrap().tokenizer().encode("the").unwrap(), [4]);
}

#[test]
fn the_post_processor_says_what_begins_a_text() {
    let tiny = TinyModel::llama();
    let [start, text] = [
        json!({"SpecialToken": {"id": "s", "type_id": 0}}),
        json!({"Sequence": {"id": "A", "type_id": 0}}),
    ];
    let template = |single: Value| json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"s": {"id": "s", "ids": [258], "tokens": ["s"]}}});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let around = |kind: &str| json!({"type": kind, "cls": ["s", 258], "sep": ["e", 259], "trim_offsets": true, "add_prefix_space": false});
    let first = template(json!([start, text]));
    for (processor, begins) in [
        (first.clone(), Some(258)),
        (json!({"type": "Sequence", "processors": [byte_level, first]}), Some(258)),
        (around("BertProcessing"), Some(258)),
        (around("RobertaProcessing"), Some(258)),
        (byte_level.clone(), None),
        (template(json!([text, start])), None),
        (Value::Null, None),
    ] {
        let model = with(&tiny, |file| file["post_processor"] = processor.clone()).unwrap();
        assert_eq!(model.tokenizer().text_start(), begins, "{processor}");
        assert_eq!(model.tokenizer().encode_piece("the").unwrap(), [257], "{processor}");
    }
}

#[test]
fn panics_of_the_crate_are_errors() {
    let error = guarded(|| -> tokenizers::Result<()> { panic!("at {}", 7) }).unwrap_err();
    assert_eq!(error.to_string(), "tokenizer: the crate tokenizers failed: at 7");
    // Takes more letters off than there are.
    let tiny = TinyModel::llama();
    let strip = json!({"type": "Strip", "content": "t", "start": 0, "stop": 9});
    let model = with(&tiny, |file| file["decoder"] = strip).unwrap();
    let error = model.tokenizer().decode(&[b't'.into()]).unwrap_err().to_string();
    assert!(error.contains("the crate tokenizers failed: "), "{error}");
}

#[test]
fn merges_of_a_gguf_file_make_tokens() {
    let tiny = TinyModel::llama();
    for merges in [&["th th"][..], &["x y"], &["t h", "th h"], &["the the"], &["the t"]] {
        let texts = merges.iter().map(|&merge| gguf_file::Value::String(merge.into())).collect();
        let path = tiny.write_gguf_with(GgmlDType::F32, |metadata| {
            metadata.retain(|(key, _)| key != "tokenizer.ggml.merges");
            metadata.push(("tokenizer.ggml.merges".into(), gguf_file::Value::Array(texts)));
        });
        let message = load(&path, Precision::F32).unwrap_err().to_string();
        let words = format!("{:?} is not of two tokens to a third", merges.last().unwrap());
        assert!(message.contains(&words) && message.contains("model.gguf"), "{message}");
    }
}

#[test]
fn merges_take_memory_that_is_bounded() {
    let tokens = ["t", "h", "th"];
    byte_level_bpe(&tokens, &vec!["t h"; 1 << 20], "gpt-2").unwrap();
    let error = byte_level_bpe(&tokens, &vec!["t h"; 1 << 21], "gpt-2").unwrap_err();
    assert!(error.to_string().contains("268435456 bytes at most"), "{error}");
}

#[test]
fn tokens_are_those_of_the_crate() {
    let tiny = TinyModel::llama();
    for (place, value) in [
        ("version", json!("1.0")),
        ("pre_tokenizer", Value::Null),
        ("normalizer", json!({"type": "Lowercase"})),
        ("normalizer", json!({"type": "Replace", "pattern": {"String": "t"}, "content": ""})),
        (
            "pre_tokenizer",
            json!({"type": "Metaspace", "replacement": "e", "prepend_scheme": "first", "split": true}),
        ),
    ] {
        let model = with(&tiny, |file| file[place] = value.clone()).unwrap();
        for text in [
            "",
            " ",
            "t",
            "The theory of <|end|> the<|end|><|start|> 42 Grüße 日本語 🦀\n\n the",
            "the".repeat(3000).as_str(),
        ] {
            let tokens = model.tokenizer().encode_piece(text).unwrap();
            assert_eq!(tokens, model.tokenizer().of_crate(text), "{place} {value} {text}");
        }
    }
}

/// Against trying every place where a token can be split.
#[test]
fn merges_by_score_are_all_there_are() {
    let mut rng = Rng::new(5);
    let mut found = 0;
    for round in 0..50 {
        let mut word = |_| (0..rng.below(6)).map(|_| ["a", "b", "é", "è"][rng.below(4)]).collect();
        let words: Vec<String> = (0..60).map(&mut word).collect();
        let tokens: Vec<&str> = words.iter().map(String::as_str).collect();
        let scores: Vec<f64> = tokens.iter().map(|_| rng.below(9) as f64).collect();
        let types: Vec<u64> = tokens.iter().map(|_| 1 + u64::from(rng.below(9) == 0)).collect();
        let id = |part: &str| (0..60).rev().find(|&id| types[id] == 1 && tokens[id] == part);
        let mut expected = Vec::new();
        for at in (0..60).filter(|&at| types[at] == 1) {
            for (cut, _) in tokens[at].char_indices().skip(1) {
                let (left, right) = tokens[at].split_at(cut);
                expected.extend(id(left).zip(id(right)).map(|(l, r)| (at, l, r)));
            }
        }
        expected.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
        let expected: Vec<(&str, &str)> =
            expected.iter().map(|&(_, l, r)| (tokens[l], tokens[r])).collect();
        found += expected.len();
        let merges = merges_by_score(&tokens, &scores, &types).unwrap();
        let merges: Vec<_> = merges.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
        assert_eq!(merges, expected, "{round}");
    }
    assert!(found > 200, "{found}");
}

#[test]
fn a_text_that_is_too_long_is_named() {
    let model = TinyModel::llama().load();
    let text = "the quick brown fox ".repeat((4 << 20) / 20 + 1);
    for error in [
        model.tokenizer().encode(&text[..(4 << 20) + 1]).unwrap_err(),
        model.tokenizer().encode_piece(&text).unwrap_err(),
    ] {
        assert!(error.to_string().contains("cut it into shorter ones"), "{error}");
    }
    let texts = [crate::Text { name: "long.txt".into(), text }];
    let message = crate::texts::tokenize(&model, &texts, 1, "").unwrap_err().to_string();
    assert!(message.contains("text long.txt: a text of 41943"), "{message}");
}
