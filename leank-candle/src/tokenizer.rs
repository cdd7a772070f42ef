//! Text to tokens and back.

use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Prepend, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, Model as _, OffsetReferential, OffsetType, PreTokenizer as _,
    SplitDelimiterBehavior,
};

use crate::gguf_file::{GgufFile, Value};
use crate::{Error, Result, tokenizer_json};

/// What byte-level BPE of Llama 3 and of Qwen2 splits a text into; only the digits differ.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Longest token of a vocabulary in a GGUF file; real ones take 512 bytes at most (runs of spaces). A token
/// has as many merges as places where it can be split into two others.
pub(crate) const MAX_TOKEN_BYTES: usize = 1024;

/// Most memory for the merges of a vocabulary, each `MERGE_BYTES` and the text of its token; of 262 144 real
/// tokens with scores they take some 80 MB.
pub(crate) const MAX_MERGES_BYTES: usize = 1 << 28;
const MERGE_BYTES: usize = 128;

/// Longest text whose tokens are told at once, a million of English: until they are, each byte takes some
/// 140 in memory, a digit that is a token 300.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Most times as long as it is that a tokenizer makes a text of `MAX_TEXT_BYTES`.
const USUAL_GROWTH: usize = 16;

/// Stands for a space in SentencePiece's vocabularies.
const SPACE: &str = "▁";

/// GGUF's token types; only normal ones come out of a merge.
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The tokenizer of a model: byte-level or SentencePiece BPE from a GGUF file's metadata, or any
/// `tokenizer.json`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put before every encoded text, where the model wants it.
    prepend: Option<u32>,
    bos: Option<u32>,
    eos: Vec<u32>,
    /// Longest text in bytes.
    max_text: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab", &self.vocab())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// From the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text is not one.
    pub(crate) fn from_json(text: &str, bos: Option<u32>, eos: Vec<u32>) -> Result<Self> {
        let file = tokenizer_json::read(text)?;
        let inner = guarded(|| Ok(serde_json::from_value(file.content)?))?;
        let prepend = file.first.filter(|id| bos.is_none_or(|bos| bos == *id));
        let max_text = MAX_TEXT_BYTES / file.growth.div_ceil(USUAL_GROWTH);
        Ok(Self { inner, prepend, bos: bos.or(prepend), eos, max_text })
    }

    /// From the metadata of a GGUF file whose embedding has `vocab` rows.
    pub(crate) fn from_gguf(file: &GgufFile, vocab: usize) -> Result<Self> {
        let text = |v: &Value| v.as_str().map(str::to_owned);
        let model = file.required("tokenizer.ggml.model", "a name", text)?;
        let sentence_piece = match &*model {
            "gpt2" => false,
            "llama" => true,
            _ => {
                return Err(Error::Unsupported {
                    path: file.path.clone(),
                    what: "tokenizer",
                    found: model,
                    supported: "gpt2 (byte-level BPE), llama (SentencePiece BPE); for others use a folder with tokenizer.json",
                });
            }
        };
        let tokens = file.required("tokenizer.ggml.tokens", "an array of texts", texts)?;
        if let Some(long) = tokens.iter().find(|token| token.len() > MAX_TOKEN_BYTES) {
            let found = format!("one of {} bytes", long.len());
            let expected = format!("tokens of at most {MAX_TOKEN_BYTES} bytes");
            return Err(Error::mismatch("tokens of the tokenizer", expected, found));
        }
        if tokens.len() > vocab {
            let (expected, found) = (format!("at most {vocab} (the embedding)"), tokens.len());
            return Err(Error::mismatch("tokens of the tokenizer", expected, found));
        }
        let pre = file.optional("tokenizer.ggml.pre", "a name", text)?;
        let mut inner = if sentence_piece {
            sentence_piece_bpe(file, &tokens)?
        } else {
            let merges = file.required("tokenizer.ggml.merges", "an array of texts", texts)?;
            byte_level_bpe(&tokens, &merges, pre.as_deref().unwrap_or("default"))?
        };
        add_special_tokens(&mut inner, file, &tokens)?;
        let id = |key: &str| {
            let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
            file.optional(&format!("tokenizer.ggml.{key}"), "a token", id)
        };
        let bos = id("bos_token_id")?;
        let add_bos = file.optional("tokenizer.ggml.add_bos_token", "true or false", flag)?;
        // Llama's files, with either tokenizer, say nothing and mean yes.
        let add_bos = add_bos.unwrap_or(sentence_piece || pre.as_deref() == Some("llama-bpe"));
        let mut eos: Vec<u32> =
            [id("eos_token_id")?, id("eot_token_id")?].into_iter().flatten().collect();
        eos.dedup();
        let prepend = bos.filter(|_| add_bos);
        if let Some(token) = prepend.filter(|&token| token as usize >= vocab) {
            let expected = format!("one of the {vocab} tokens of the embedding");
            return Err(Error::mismatch("token before every text", expected, token));
        }
        Ok(Self { inner, prepend, bos, eos, max_text: MAX_TEXT_BYTES })
    }

    /// Tokens of the vocabulary.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that begins a text, if the model has one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that the model wants before every text, if any.
    #[must_use]
    pub fn text_start(&self) -> Option<u32> {
        self.prepend
    }

    /// Tokens that end a generation.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The tokens of a text, with BOS in front where the model wants one. Names of special tokens
    /// in the text become these tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when a character cannot be expressed, and for a text of more than 4 MiB (less where the
    /// tokenizer makes texts more than 16 times as long).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let piece = self.encode_piece(text)?;
        Ok(self.prepend.into_iter().chain(piece).collect())
    }

    /// As [`Tokenizer::encode`], without BOS or anything else around: for pieces of a text.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_piece(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() > self.max_text {
            return Err(Error::Tokenizer(format!(
                "a text of {} bytes, more than {}; cut it into shorter ones",
                text.len(),
                self.max_text
            )));
        }
        guarded(|| self.pieces(text))
    }

    /// As `encode_fast` of the crate, which keeps the text and the place of every token until the end: half of
    /// the memory.
    fn pieces(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let (inner, model) = (&self.inner, self.inner.get_model());
        let added = inner.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        let mut ids = Vec::new();
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None)
        {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => ids.extend(model.tokenize(piece)?.iter().map(|token| token.id)),
            }
        }
        Ok(ids)
    }

    #[cfg(test)]
    pub(crate) fn of_crate(&self, text: &str) -> Vec<u32> {
        self.inner.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    /// The text of tokens, special ones left out; bytes that are not UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let (added, model) = (self.inner.get_added_vocabulary(), self.inner.get_model());
        let is_shown = |&id: &u32| {
            let token = added.simple_id_to_token(id).or_else(|| model.id_to_token(id));
            token.is_some_and(|token| !added.is_special_token(&token))
        };
        // Decoders of the crate panic at no tokens.
        if !tokens.iter().any(is_shown) {
            return Ok(String::new());
        }
        guarded(|| self.inner.decode(tokens, true))
    }

    /// A decoder that takes token after token and gives text as soon as it is whole.
    #[must_use]
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), given: 0 }
    }
}

/// Text from tokens one by one; never half a character. See [`Tokenizer::stream`].
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last token whose text was given, and those after it: decoding needs a left neighbour.
    tokens: Vec<u32>,
    /// Tokens at the front whose text was given.
    given: usize,
}

impl TextStream<'_> {
    /// Takes a token and returns the text that it completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        self.text(false)
    }

    /// The text of what is left, unfinished characters as `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the decoder fails.
    pub fn finish(mut self) -> Result<String> {
        self.text(true)
    }

    fn text(&mut self, everything: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.tokens[..self.given])?;
        let whole = self.tokenizer.decode(&self.tokens)?;
        if !everything && whole.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        let new = whole.get(before.len()..).unwrap_or_default().to_owned();
        self.tokens.drain(..self.tokens.len().saturating_sub(1));
        self.given = self.tokens.len();
        Ok(new)
    }
}

/// Calls the crate `tokenizers`, which panics where something in a file is not as it believes: that is an
/// error of the file. (The program's panic hook has told of it then.)
pub(crate) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // What it keeps between calls are finished words: a panic leaves nothing half made.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| Error::Tokenizer(e.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            Err(Error::Tokenizer(format!("the crate tokenizers failed: {text}")))
        }
    }
}

/// Takes the memory of a merge from `room`.
pub(crate) fn take_room(room: &mut usize, token: usize) -> Result<()> {
    let Some(less) = room.checked_sub(MERGE_BYTES + token) else {
        let expected = format!("{MAX_MERGES_BYTES} bytes at most");
        return Err(Error::mismatch("merges of the tokenizer", expected, "more"));
    };
    *room = less;
    Ok(())
}

fn texts(v: &Value) -> Option<Vec<&str>> {
    match v {
        Value::Array(items) => items.iter().map(Value::as_str).collect(),
        _ => None,
    }
}

pub(crate) fn byte_level_bpe(
    tokens: &[&str],
    merges: &[&str],
    pre: &str,
) -> Result<tokenizers::Tokenizer> {
    let failed = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
    let vocab = tokens.iter().zip(0u32..).map(|(&token, id)| (token.to_owned(), id));
    let known: HashSet<&str> = tokens.iter().copied().collect();
    let mut room = MAX_MERGES_BYTES;
    let merges = merges
        .iter()
        .map(|merge| {
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(Error::Tokenizer(format!("{merge:?} is not a merge of two tokens")));
            };
            take_room(&mut room, merge.len())?;
            tokenizer_json::check_merge(left, right, "", |token| known.contains(token))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<Vec<_>>>()?;
    let llama3 = matches!(pre, "llama-bpe" | "llama3" | "llama-v3");
    let model =
        BPE::builder().vocab_and_merges(vocab.collect::<Vocab>(), merges).ignore_merges(llama3);
    let model = guarded(|| model.build())?;
    let split = |pattern: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        Ok(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?.into())
    };
    let bytes = |regex: bool| PreTokenizerWrapper::from(ByteLevel::new(false, true, regex));
    let mut inner = tokenizers::Tokenizer::new(model);
    let steps = match pre {
        "smollm" => vec![Digits::new(true).into(), bytes(true)],
        "qwen2" => {
            inner.with_normalizer(Some(NFC)).map_err(failed)?;
            vec![split(QWEN2_SPLIT)?, bytes(false)]
        }
        _ if llama3 => vec![split(LLAMA3_SPLIT)?, bytes(false)],
        "default" | "gpt-2" => vec![bytes(true)],
        other => {
            return Err(Error::Tokenizer(format!(
                "the pre-tokenizer {other} is not supported; supported: smollm, qwen2, llama-bpe, gpt-2, or a folder with tokenizer.json"
            )));
        }
    };
    inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    inner.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(inner)
}

/// BPE as SentencePiece does it: of all neighbours that form a token together, those whose token has
/// the highest score are joined first; characters that no token has fall apart into bytes.
///
/// GGUF files hold scores and no merges; every way to split a normal token into two is one.
fn sentence_piece_bpe(file: &GgufFile, tokens: &[&str]) -> Result<tokenizers::Tokenizer> {
    let failed = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
    let floats = |v: &Value| match v {
        Value::Array(items) => items.iter().map(Value::as_f64).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    let scores = file.required("tokenizer.ggml.scores", "an array of numbers", floats)?;
    let types = file.required("tokenizer.ggml.token_type", "an array of numbers", numbers)?;
    if scores.len() != tokens.len() || types.len() != tokens.len() {
        let found = format!("{} scores, {} types", scores.len(), types.len());
        return Err(Error::mismatch("tokens of the tokenizer", tokens.len(), found));
    }
    let unknown = file.optional("tokenizer.ggml.unknown_token_id", "a token", Value::as_u64)?;
    let unknown = unknown.and_then(|id| tokens.get(usize::try_from(id).ok()?));
    let vocab: Vocab = tokens.iter().map(|&token| token.to_owned()).zip(0u32..).collect();
    let mut model = BPE::builder()
        .vocab_and_merges(vocab, merges_by_score(tokens, &scores, &types)?)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some(unknown) = unknown {
        model = model.unk_token((*unknown).to_owned());
    }
    let mut inner = tokenizers::Tokenizer::new(guarded(|| model.build())?);
    let prefix = file.optional("tokenizer.ggml.add_space_prefix", "true or false", flag)?;
    let prefix = prefix.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders =
        vec![Replace::new(SPACE, " ").map_err(failed)?.into(), ByteFallback::new().into()];
    decoders.push(Fuse::new().into());
    if prefix {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(failed)?.into());
    inner.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(failed)?;
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(inner)
}

/// Merges of normal tokens into normal tokens, the highest score of the result first.
pub(crate) fn merges_by_score(
    tokens: &[&str],
    scores: &[f64],
    types: &[u64],
) -> Result<Vec<(String, String)>> {
    let normal = || tokens.iter().enumerate().filter(|&(id, _)| types[id] == NORMAL);
    // Of equal tokens the last one counts.
    let ids: HashMap<&str, usize> = normal().map(|(id, &token)| (token, id)).collect();
    let own: Vec<(&str, usize)> = ids.into_iter().collect();
    let places: HashMap<&str, usize> = own.iter().zip(0..).map(|(own, at)| (own.0, at)).collect();
    let beginnings = longest_beginnings(&own, |token| token.as_bytes().to_vec());
    let endings = longest_beginnings(&own, |token| token.bytes().rev().collect());
    let chain =
        |of: &[Option<usize>], at: usize| std::iter::successors(of[at], |&at| of[at]).collect();
    let mut merges = Vec::new();
    let mut room = MAX_MERGES_BYTES;
    for (id, &token) in normal() {
        let at = places[token];
        let [lefts, rights]: [Vec<usize>; 2] = [chain(&beginnings, at), chain(&endings, at)];
        // The longest left part belongs to the shortest right one.
        let mut rights = rights.into_iter().map(|at| own[at]).rev().peekable();
        for (left, left_id) in lefts.into_iter().map(|at| own[at]) {
            let rest = token.len() - left.len();
            while rights.next_if(|(right, _)| right.len() < rest).is_some() {}
            if let Some((_, right_id)) = rights.next_if(|(right, _)| right.len() == rest) {
                take_room(&mut room, token.len())?;
                merges.push((id, left_id, right_id));
            }
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    Ok(merges.into_iter().map(|(_, l, r)| (tokens[l].to_owned(), tokens[r].to_owned())).collect())
}

/// Of each token, as `bytes` gives it, the longest other one that it begins with. That one's longest is the
/// next shorter, and so on: no part is tried that is no token.
fn longest_beginnings(
    tokens: &[(&str, usize)],
    bytes: impl Fn(&str) -> Vec<u8>,
) -> Vec<Option<usize>> {
    let texts: Vec<Vec<u8>> = tokens.iter().map(|(token, _)| bytes(token)).collect();
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_unstable_by(|&a, &b| texts[a].cmp(&texts[b]));
    let mut longest = vec![None; texts.len()];
    // What the last token begins with, the shortest first.
    let mut open: Vec<usize> = Vec::new();
    for at in order {
        while open.pop_if(|last| !texts[at].starts_with(&texts[*last])).is_some() {}
        longest[at] = open.last().copied();
        open.push(at);
    }
    longest
}

fn numbers(v: &Value) -> Option<Vec<u64>> {
    match v {
        Value::Array(items) => items.iter().map(Value::as_u64).collect(),
        _ => None,
    }
}

fn flag(v: &Value) -> Option<bool> {
    match v {
        Value::Bool(flag) => Some(*flag),
        _ => None,
    }
}

/// Tells the tokenizer which tokens are found in a text before any merge.
fn add_special_tokens(
    inner: &mut tokenizers::Tokenizer,
    file: &GgufFile,
    tokens: &[&str],
) -> Result<()> {
    let key = "tokenizer.ggml.token_type";
    let types = file.optional(key, "an array of numbers", numbers)?.unwrap_or_default();
    let of_type = |wanted: u64| {
        let typed = tokens.iter().zip(&types);
        typed.filter(move |&(_, &kind)| kind == wanted).map(|(&token, _)| token.to_owned())
    };
    let special: Vec<_> = of_type(CONTROL).map(|token| AddedToken::from(token, true)).collect();
    let user: Vec<_> = of_type(USER_DEFINED)
        .map(|token| AddedToken::from(token, false).normalized(false))
        .collect();
    let failed = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
    inner.add_special_tokens(special).map_err(failed)?;
    inner.add_tokens(user).map_err(failed)?;
    Ok(())
}
