//! `tokenizer.json`, before the crate `tokenizers` sees it.
//!
//! That crate trusts the file: some contents make it panic, some make it ask for terabytes, and some
//! are for training and batches and would quietly change what a text's tokens are. What is known of them is
//! refused or taken out here.

use std::collections::{HashMap, HashSet};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::Value;

use crate::{Error, Result};

/// A tokenizer as its file says it, without what would cut a text's tokens, add to them or leave them to
/// chance; and the token that the file puts before every text.
pub(crate) fn read(text: &str) -> Result<(Value, Option<u32>)> {
    let mut file: Value =
        serde_json::from_str(text).map_err(|e| Error::Tokenizer(e.to_string()))?;
    let mut first = None;
    if let Some(file) = file.as_object_mut() {
        file.remove("truncation");
        file.remove("padding");
        first = file.remove("post_processor").map(|p| first_token(&p)).transpose()?.flatten();
        if let Some(model) = file.get_mut("model").and_then(Value::as_object_mut) {
            // In training only, merges are left out by chance.
            model.remove("dropout");
        }
    }
    check_ids(&file["model"]["vocab"])?;
    check_merges(&file["model"])?;
    check_steps(&file["normalizer"], "normalizers")?;
    check_steps(&file["pre_tokenizer"], "pretokenizers")?;
    Ok((file, first))
}

/// The token that a post-processor puts first.
fn first_token(processor: &Value) -> Result<Option<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let wrong = |what: String| Error::Tokenizer(format!("its post-processor {what}"));
    if processor.is_null() {
        return Ok(None);
    }
    match processor["type"].as_str() {
        Some("TemplateProcessing") => {
            let special = &processor["special_tokens"];
            let mut first = None;
            for (at, piece) in processor["single"].as_array().into_iter().flatten().enumerate() {
                if let Some(name) = piece["SpecialToken"]["id"].as_str() {
                    let ids = special[name]["ids"].as_array();
                    let ids = ids.and_then(|ids| ids.iter().map(id).collect::<Option<Vec<_>>>());
                    let ids = ids.ok_or_else(|| wrong(format!("does not say what {name:?} is")))?;
                    first = first.or(ids.first().copied().filter(|_| at == 0));
                } else if piece["Sequence"]["id"].as_str() != Some("A") {
                    return Err(wrong(format!("puts {piece} around a single text")));
                }
            }
            Ok(first)
        }
        Some("BertProcessing" | "RobertaProcessing") => {
            let first = id(&processor["cls"][1]);
            first.map(Some).ok_or_else(|| wrong("has no first token".into()))
        }
        Some("Sequence") => {
            // A later one puts its token before an earlier one's.
            let steps = processor["processors"].as_array().into_iter().flatten().rev();
            steps.map(first_token).find_map(Result::transpose).transpose()
        }
        Some("ByteLevel") => Ok(None),
        _ => Err(wrong(format!("is of the unknown type {}", processor["type"]))),
    }
}

/// Refuses two tokens of one id: the crate's hash tables choose which of them it is, another one in each process.
fn check_ids(vocab: &Value) -> Result<()> {
    let mut tokens = HashMap::new();
    for (token, id) in vocab.as_object().into_iter().flatten() {
        if let Some(other) = id.as_u64().and_then(|id| tokens.insert(id, token)) {
            let two = format!("{other:?} and {token:?} are both token {id}");
            return Err(Error::Tokenizer(two));
        }
    }
    Ok(())
}

fn check_merges(model: &Value) -> Result<()> {
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array())
    else {
        return Ok(());
    };
    let vocab: HashSet<&str> = vocab.keys().map(String::as_str).collect();
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for merge in merges {
        let parts = match merge {
            Value::String(line) if line.starts_with("#version") => None,
            Value::String(line) => line.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        if let Some((left, right)) = parts {
            check_merge(left, right, prefix, |token| vocab.contains(token))?;
        }
    }
    Ok(())
}

/// Refuses a merge that is not of two tokens to a third, where `prefix` marks tokens within a word: the crate
/// joins such ones in memory that is as long as the longest token.
pub(crate) fn check_merge(
    left: &str,
    right: &str,
    prefix: &str,
    is_token: impl Fn(&str) -> bool,
) -> Result<()> {
    let joined = right.strip_prefix(prefix).map(|rest| format!("{left}{rest}"));
    if is_token(left) && is_token(right) && joined.as_deref().is_some_and(is_token) {
        return Ok(());
    }
    let merge = format!("{left} {right}");
    Err(Error::Tokenizer(format!("the merge {merge:?} is not of two tokens to a third")))
}

/// Looks at what is done to a text before its merges, and at the steps of it in the field `list`.
fn check_steps(step: &Value, list: &str) -> Result<()> {
    if step["length"].as_u64() == Some(0) {
        return Err(Error::Tokenizer("it cuts texts into pieces of no length".into()));
    }
    if let Some(map) = step["precompiled_charsmap"].as_str()
        && !is_charsmap(map)
    {
        return Err(Error::Tokenizer("its precompiled_charsmap leads beyond itself".into()));
    }
    step[list].as_array().into_iter().flatten().try_for_each(|step| check_steps(step, list))
}

/// Whether SentencePiece's map of characters, in base64, stays within itself whatever is looked up: a
/// double-array trie (its bytes as `u32`, then units of 32 bits) whose leaves are places in the text behind it.
fn is_charsmap(map: &str) -> bool {
    let Ok(bytes) = BASE64_STANDARD.decode(map) else { return false };
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else { return false };
    let size = u32::from_le_bytes(*size) as usize / 4 * 4;
    let Some((trie, texts)) = rest.split_at_checked(size) else { return false };
    let Ok(texts) = std::str::from_utf8(texts) else { return false };
    let units: Vec<usize> = trie
        .chunks_exact(4)
        .map(|unit| unit.iter().rev().fold(0, |bits, &byte| bits << 8 | usize::from(byte)))
        .collect();
    let sound = |(at, &unit): (usize, &usize)| {
        let value = 1 << 31;
        let next = at ^ (unit >> 10 << ((unit & 1 << 9) >> 6));
        let leaf = |unit: &usize| texts.is_char_boundary(unit & (value - 1));
        unit & value != 0
            || (next | 0xff) < units.len() && (unit & 1 << 8 == 0 || leaf(&units[next]))
    };
    !units.is_empty() && units.iter().enumerate().all(sound)
}
