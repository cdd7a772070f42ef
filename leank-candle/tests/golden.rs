//! Logits of tiny random models as Hugging Face transformers computed them.
//!
//! `tools/compare_tiny.py --write leank-candle/tests/golden` made the folders: each a model as
//! transformers saves it, with tokens and their logits in `golden.safetensors`.

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use leank_candle::{DenseAttention, Family, LoadOptions, Model};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The model and the text's tokens with their logits.
fn golden(name: &str) -> (Model, Vec<u32>, Tensor) {
    let model = Model::load(&folder(name), LoadOptions::default()).unwrap();
    let path = folder(name).join("golden.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    (model, tensors["tokens"].to_vec1().unwrap(), tensors["logits"].clone())
}

#[test]
fn logits_are_those_of_transformers() {
    for (name, family) in [
        ("mistral-sliding", Family::Mistral),
        ("qwen3-yarn", Family::Qwen3),
        ("qwen3-sliding", Family::Qwen3),
        ("gemma3-linear", Family::Gemma3),
    ] {
        let (model, tokens, want) = golden(name);
        assert_eq!(model.config().family, family);
        assert_eq!(
            model.tokenizer().encode("the quick brown fox, the lazy dog. ").unwrap(),
            tokens,
            "{name}"
        );
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let mut attention = DenseAttention::new(model.config(), 0);
        let hidden = model.hidden(&tokens, &positions, &mut attention).unwrap();
        let logits = model.logits(&hidden).unwrap();
        assert_eq!(logits.dims(), want.dims());
        let difference = (logits - want).unwrap().abs().unwrap().max_all().unwrap();
        let difference: f32 = difference.to_scalar().unwrap();
        assert!(difference < 2e-5, "{name}: {difference}");
    }
}

#[test]
fn sliding_layers_are_where_transformers_has_them() {
    let of = |name: &str| {
        let model = Model::load(&folder(name), LoadOptions::default()).unwrap();
        (model.config().windows(), model.config().global_layers())
    };
    assert_eq!(of("gemma3-linear"), (vec![Some(9), Some(9), None], vec![2]));
    assert_eq!(of("qwen3-sliding"), (vec![None, Some(9)], vec![0]));
    assert_eq!(of("mistral-sliding"), (vec![Some(9); 2], vec![]));
    assert_eq!(of("qwen3-yarn"), (vec![None; 2], vec![0, 1]));
    // Nothing is left to a lean cache where every layer slides.
    let model = Model::load(&folder("mistral-sliding"), LoadOptions::default()).unwrap();
    let error = model.config().global_shape().unwrap_err().to_string();
    assert!(error.contains("sliding layers only"), "{error}");
}
