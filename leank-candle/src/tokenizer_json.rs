//! `tokenizer.json`, before the crate `tokenizers` sees it.
//!
//! That crate trusts the file: some contents make it panic, some make it ask for terabytes, and some
//! are for training and batches and would quietly change what a text's tokens are. What is known of them is
//! refused or taken out here.

use std::collections::{HashMap, HashSet};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::Value;

use crate::tokenizer::{MAX_MERGES_BYTES, MAX_TOKEN_BYTES, take_room};
use crate::{Error, Result};

/// Most times as long as it is that steps may make a text. SentencePiece's take 12, and with its map of characters
/// some 400.
const MAX_GROWTH: usize = 1024;

/// Most memory for what the steps make of added tokens.
const MAX_ADDED_BYTES: usize = 1 << 26;

/// Longest word of WordPiece, which tries every part of it at every place; usual is the same.
const MAX_WORD_CHARS: u64 = 100;

/// Longest token of a unigram model, of which all that fit are tried at every place; SentencePiece's have 16 letters.
const MAX_PIECE_BYTES: usize = 128;

/// Fields by which a step makes texts longer, and the types that have them. Where the crate does not know a type, or
/// not in this place, it takes any step for one that has these fields.
const LENGTHENING: [(&str, &[&str]); 8] = [
    ("content", &["Replace", "Strip"]),
    ("pattern", &["Replace", "Split"]),
    ("prepend", &["Prepend"]),
    ("replacement", &["Metaspace"]),
    ("precompiled_charsmap", &["Precompiled"]),
    ("normalizers", &["Sequence"]),
    ("pretokenizers", &["Sequence"]),
    ("decoders", &["Sequence"]),
];

/// A `tokenizer.json` that was looked at.
pub(crate) struct File {
    /// Without what would cut a text's tokens, add to them or leave them to chance.
    pub(crate) content: Value,
    /// The token that the file puts before every text.
    pub(crate) first: Option<u32>,
    /// Most times as long as it is that a text can become before it is cut into tokens.
    pub(crate) growth: usize,
}

pub(crate) fn read(text: &str) -> Result<File> {
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
    check_vocab(&file["model"])?;
    check_merges(&file["model"])?;
    let growth = growth(&file["normalizer"], "normalizers")?
        .saturating_mul(growth(&file["pre_tokenizer"], "pretokenizers")?);
    if growth.max(self::growth(&file["decoder"], "decoders")?) > MAX_GROWTH {
        let what = format!("its steps make a text more than {MAX_GROWTH} times as long");
        return Err(Error::Tokenizer(what));
    }
    check_added(&file["added_tokens"], growth)?;
    Ok(File { content: file, first, growth })
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
/// And what takes the square of a text's length in time, or its cube.
fn check_vocab(model: &Value) -> Result<()> {
    let named = model["vocab"].as_object().into_iter().flatten();
    let scored = model["vocab"].as_array().into_iter().flatten();
    let tokens = named.clone().map(|(token, _)| (token.as_str(), MAX_TOKEN_BYTES));
    let pieces = scored.filter_map(|token| Some((token[0].as_str()?, MAX_PIECE_BYTES)));
    if let Some((long, most)) = tokens.chain(pieces).find(|(token, most)| token.len() > *most) {
        let what = format!("a token of {} bytes, more than {most}", long.len());
        return Err(Error::Tokenizer(what));
    }
    let word = &model["max_input_chars_per_word"];
    if word.as_u64().is_some_and(|chars| chars > MAX_WORD_CHARS) {
        let what = format!("words of {word} characters, more than {MAX_WORD_CHARS}");
        return Err(Error::Tokenizer(what));
    }
    let mut tokens = HashMap::new();
    for (token, id) in named {
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
    let mut room = MAX_MERGES_BYTES;
    for merge in merges {
        let parts = match merge {
            Value::String(line) if line.starts_with("#version") => None,
            Value::String(line) => line.split_once(' '),
            pair => pair[0].as_str().zip(pair[1].as_str()),
        };
        if let Some((left, right)) = parts {
            take_room(&mut room, left.len() + right.len())?;
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

/// Refuses added tokens that take more than there is, in loading or in a text.
fn check_added(tokens: &Value, growth: usize) -> Result<()> {
    let mut bytes = 0usize;
    for token in tokens.as_array().into_iter().flatten() {
        let content = token["content"].as_str().unwrap_or_default();
        bytes = bytes.saturating_add(content.len().saturating_mul(growth));
        if bytes > MAX_ADDED_BYTES {
            return Err(Error::Tokenizer(format!(
                "its steps make more than {MAX_ADDED_BYTES} bytes of its added tokens"
            )));
        }
        // Each space would take all that follow it along.
        if token["rstrip"] == true && content.starts_with(char::is_whitespace) {
            return Err(Error::Tokenizer(format!(
                "the added token {content:?} begins with a space and takes those behind it"
            )));
        }
    }
    Ok(())
}

/// Looks at what is done to a text, or to one of tokens, and at the steps of it in the field `list`; most times as
/// long as it is that it makes a text.
fn growth(step: &Value, list: &str) -> Result<usize> {
    if step.is_null() {
        return Ok(1);
    }
    let kind = step["type"].as_str().unwrap_or_default();
    if step["length"].as_u64() == Some(0) {
        return Err(Error::Tokenizer("it cuts texts into pieces of no length".into()));
    }
    let bytes = |field: &str| step[field].as_str().map_or(0, str::len);
    let unknown = || Error::Tokenizer(format!("a step is of the unknown type {}", step["type"]));
    let is_other =
        |(field, kinds): &(&str, &[&str])| step.get(field).is_some() && !kinds.contains(&kind);
    let mut growth = match kind {
        _ if LENGTHENING.iter().any(is_other) => return Err(unknown()),
        // Bytes that are letters of two; spaces around letters of three; a space in the place of nothing.
        "ByteLevel" | "BertNormalizer" | "BPEDecoder" | "CTC" => 2,
        "Precompiled" => {
            let map = step["precompiled_charsmap"].as_str().and_then(longest_of_charsmap);
            let what = || Error::Tokenizer("its precompiled_charsmap leads beyond itself".into());
            map.ok_or_else(what)?.max(1)
        }
        "Replace" => {
            let content = bytes("content");
            match step["pattern"]["String"].as_str() {
                Some(text) if !text.is_empty() => content.div_ceil(text.len()).max(1),
                // A regular expression may find nothing, before and behind each letter.
                _ => 1 + 2 * content,
            }
        }
        // Once before each piece, which may be a letter.
        "Prepend" => 1 + bytes("prepend"),
        "Metaspace" => 1 + bytes("replacement"),
        "BertPreTokenizer" | "ByteFallback" | "CharDelimiterSplit" | "Digits" | "FixedLength"
        | "Fuse" | "Lowercase" | "NFC" | "NFD" | "NFKC" | "NFKD" | "Nmt" | "Punctuation"
        | "Sequence" | "Split" | "Strip" | "StripAccents" | "UnicodeScripts" | "Whitespace"
        | "WhitespaceSplit" | "WordPiece" => 1,
        _ => return Err(unknown()),
    };
    for step in step[list].as_array().into_iter().flatten() {
        growth = growth.saturating_mul(self::growth(step, list)?);
    }
    Ok(growth)
}

/// The longest text that SentencePiece's map of characters, in base64, puts in the place of others; `None` where it
/// does not stay within itself whatever is looked up: a double-array trie (its bytes as `u32`, then units of 32 bits)
/// whose leaves are places in the text behind it.
fn longest_of_charsmap(map: &str) -> Option<usize> {
    let bytes = BASE64_STANDARD.decode(map).ok()?;
    let (size, rest) = bytes.split_first_chunk::<4>()?;
    let size = u32::from_le_bytes(*size) as usize / 4 * 4;
    let (trie, texts) = rest.split_at_checked(size)?;
    let texts = std::str::from_utf8(texts).ok()?;
    let units: Vec<usize> = trie
        .chunks_exact(4)
        .map(|unit| unit.iter().rev().fold(0, |bits, &byte| bits << 8 | usize::from(byte)))
        .collect();
    let sound = |(at, &unit): (usize, &usize)| {
        let value = 1 << 31;
        let next = at ^ (unit >> 10 << ((unit & 1 << 9) >> 6));
        let leaf = |unit: &usize| texts.is_char_boundary(unit & (value - 1));
        // What is not told for the first one, where every search begins.
        (at != 0 && unit & value != 0)
            || (next | 0xff) < units.len() && (unit & 1 << 8 == 0 || leaf(&units[next]))
    };
    let is_sound = !units.is_empty() && units.iter().enumerate().all(sound);
    is_sound.then(|| texts.split('\0').map(str::len).max().unwrap_or(0))
}
