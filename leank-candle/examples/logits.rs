//! Writes the tokens of a text and the logits of its last positions, for `tools/compare_hf.py`.
//!
//! ```text
//! cargo run --release -p leank-candle --example logits -- MODEL TEXT OUT.safetensors [TOKENS [LAST [as-stored]]]
//! ```
//! The text is cut to TOKENS (512) tokens; logits are those of the last LAST (64) of them.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use leank_candle::{DenseAttention, LoadOptions, Model, Precision};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, out, rest @ ..] = args.as_slice() else {
        return Err("usage: logits MODEL TEXT OUT.safetensors [TOKENS [LAST [as-stored]]]".into());
    };
    let number = |i: usize, default: usize| match rest.get(i) {
        Some(n) => n.parse(),
        None => Ok(default),
    };
    let (limit, last) = (number(0, 512)?, number(1, 64)?);
    let as_stored = rest.get(2).is_some_and(|word| word == "as-stored");
    let precision = if as_stored { Precision::AsStored } else { Precision::F32 };

    let start = Instant::now();
    let model = Model::load(Path::new(model), LoadOptions::with_precision(precision))?;
    eprintln!("loaded {} in {:.1?}", model.config().name, start.elapsed());
    let mut tokens = model.tokenizer().encode(&std::fs::read_to_string(text)?)?;
    tokens.truncate(limit);
    let last = last.min(tokens.len());

    let start = Instant::now();
    let mut attention = DenseAttention::new(model.config(), tokens.len());
    let (prefix, rest) = tokens.split_at(tokens.len() - last);
    if !prefix.is_empty() {
        attention.prefill(&model, prefix)?;
    }
    let positions: Vec<usize> = (prefix.len()..tokens.len()).collect();
    let logits = model.logits(&model.hidden(rest, &positions, &mut attention)?)?;
    eprintln!("{} tokens in {:.2?}", tokens.len(), start.elapsed());

    let count = tokens.len();
    let tokens = Tensor::from_vec(tokens, count, &Device::Cpu)?;
    let tensors = HashMap::from([("tokens", tokens), ("logits", logits)]);
    candle_core::safetensors::save(&tensors, out)?;
    Ok(())
}
