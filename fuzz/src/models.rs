//! Bytes that claim to be a model.

use std::path::Path;

use leank_candle::{
    DenseAttention, Error, LeanAttention, LoadOptions, Model, Precision, SlidingKv, SlidingRows,
    store_prefix,
};
use leank_core::{Backend as _, Cache as _, CacheConfig, StepEntry};
use leank_cpu::Cpu;

use crate::{
    folder::{Folder, names},
    split,
};

/// Most tokens that a model which could be loaded is run over.
const MAX_TOKENS: usize = 6;

/// One token per letter; what a folder's model is loaded with.
const TOKENIZER: &str = r#"{"version":"1.0","model":{"type":"BPE","vocab":{"a":0,"b":1,"c":2,"d":3,
    "e":4,"f":5,"g":6,"h":7},"merges":[]}}"#;

/// A GGUF file.
pub fn gguf(data: &[u8]) {
    let folder = Folder::of(&[("model.gguf", data)]);
    let path = folder.path().join("model.gguf");
    load(&path, LoadOptions::default());
    load(&path, LoadOptions::with_precision(Precision::AsStored));
}

/// A model in a folder: `config.json` behind its length (two bytes), then `model.safetensors`.
pub fn model_folder(data: &[u8]) {
    let Some((config, weights)) = split(data) else { return };
    let folder = Folder::of(&[
        ("config.json", config),
        ("tokenizer.json", TOKENIZER.as_bytes()),
        ("model.safetensors", weights),
    ]);
    load(folder.path(), LoadOptions::default());
}

/// Loads a model, or is refused by name; runs what could be loaded.
fn load(path: &Path, options: LoadOptions) {
    let model = match Model::load(path, options) {
        Ok(model) => model,
        Err(error) => return names(&error, path),
    };
    let Ok(mut tokens) = model.tokenizer().encode("abc dé") else { return };
    tokens.truncate(MAX_TOKENS);
    let mut attention = DenseAttention::new(model.config(), tokens.len());
    match attention.prefill(&model, &tokens).and_then(|hidden| model.logits(&hidden)) {
        Ok(logits) => {
            let vocab = model.config().vocab;
            assert_eq!(logits.dims(), [1, vocab]);
            // As a generation would, whatever is the most likely.
            let text = model.tokenizer().decode(&[0, vocab as u32 - 1]);
            drop(text);
            if let Err(error) = go_on(&model, &attention) {
                // No room for them, or no global layer.
                let refused = matches!(
                    error,
                    Error::Core(_) | Error::Context { .. } | Error::Mismatch { .. }
                );
                assert!(refused, "{error}");
            }
        }
        Err(Error::Token { .. } | Error::Context { .. } | Error::Mismatch { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Three more tokens from a lean cache, with sliding layers beside it.
fn go_on(model: &Model, prompt: &DenseAttention) -> Result<(), Error> {
    let mut cache = Cpu::new().create(CacheConfig::dense(model.config().global_shape()?)?)?;
    let sequence = cache.add_sequence();
    store_prefix(&mut cache, sequence, prompt)?;
    let mut sliding = SlidingKv::of(prompt)?;
    for position in prompt.len()..prompt.len() + 3 {
        cache.plan(&[StepEntry::decode(sequence, 1)])?;
        let rows = vec![SlidingRows { kv: &mut sliding, rows: 1 }];
        let mut attention = LeanAttention::with_sliding(&mut cache, rows);
        let hidden = model.hidden(&[0], &[position], &mut attention)?;
        cache.commit()?;
        assert_eq!(model.logits(&hidden)?.dims(), [1, model.config().vocab]);
    }
    Ok(())
}
