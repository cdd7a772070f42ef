//! What `leank eval --json` printed.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use leank::{InputRecord, ModelMask};
use serde::Deserialize;

use crate::{figure::numbers::shown, masks, output};

/// More than any evaluation prints.
const MAX_BYTES: u64 = 16 << 20;

/// The measurements of one mask. Numbers that are none are absent.
#[derive(Debug, Deserialize)]
pub(crate) struct Evaluation {
    /// The mask's file.
    pub(crate) mask: String,
    #[serde(default)]
    pub(crate) texts: Vec<InputRecord>,
    pub(crate) kept_k: f64,
    pub(crate) dead_heads: usize,
    pub(crate) heads: usize,
    pub(crate) heads_by_format: BTreeMap<String, usize>,
    pub(crate) middle_bytes: Option<f64>,
    pub(crate) predicted_kl: Option<f64>,
    pub(crate) whole_kv_ratio: Option<f64>,
    pub(crate) text: Option<Text>,
    #[serde(default)]
    pub(crate) tasks: Vec<Task>,
    pub(crate) cache: Cache,
}

/// On plain text.
#[derive(Debug, Deserialize)]
pub(crate) struct Text {
    pub(crate) sequences: usize,
    pub(crate) kl: Option<f64>,
    pub(crate) kl_standard_error: Option<f64>,
    pub(crate) dense_perplexity: Option<f64>,
    pub(crate) lean_perplexity: Option<f64>,
    pub(crate) top1_agreement: Option<f64>,
}

/// On a retrieval task.
#[derive(Debug, Deserialize)]
pub(crate) struct Task {
    pub(crate) task: String,
    pub(crate) items: usize,
    pub(crate) dense_right: usize,
    pub(crate) lean_right: usize,
}

/// The cache that it was measured on.
#[derive(Debug, Deserialize)]
pub(crate) struct Cache {
    /// Tokens at the end, of all sequences.
    pub(crate) tokens: usize,
}

impl Evaluation {
    /// Whether it measures this mask as it is in its file. Files move, so their names do not tell.
    pub(crate) fn is_of(&self, mask: &ModelMask) -> bool {
        let summary = mask.summary();
        let same = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-9 * b.abs(),
            (a, b) => a.is_none() && b.is_none(),
        };
        same(Some(self.kept_k), Some(summary.kept_k))
            && same(self.predicted_kl, mask.info().predicted_kl)
            && (self.dead_heads, self.heads) == (summary.dead_heads, summary.heads)
            && self.heads_by_format == masks::heads_by_format(mask)
    }

    /// The first number that no measurement gives, with its name. JSON has none that are not finite.
    fn impossible(&self) -> Option<(&'static str, f64)> {
        // A KL of 0 may come out a rounding below.
        const ROUNDING: f64 = -1e-6;
        let text = |of: fn(&Text) -> Option<f64>| self.text.as_ref().and_then(of);
        let all = [
            ("kept_k", Some(self.kept_k)),
            ("middle_bytes", self.middle_bytes),
            ("predicted_kl", self.predicted_kl),
            ("whole_kv_ratio", self.whole_kv_ratio),
            ("text.kl", text(|text| text.kl)),
            ("text.kl_standard_error", text(|text| text.kl_standard_error)),
            ("text.dense_perplexity", text(|text| text.dense_perplexity)),
            ("text.lean_perplexity", text(|text| text.lean_perplexity)),
            ("text.top1_agreement", text(|text| text.top1_agreement)),
        ];
        all.into_iter().find_map(|(name, value)| Some((name, value.filter(|x| *x < ROUNDING)?)))
    }

    /// Tokens of context at the last position.
    pub(crate) fn context(&self) -> Option<usize> {
        self.cache.tokens.checked_div(self.text.as_ref()?.sequences)
    }

    /// The name of the mask's file without its folder and extension, for display.
    pub(crate) fn name(&self) -> String {
        let stem = Path::new(&self.mask).file_stem();
        shown(&stem.map_or(self.mask.clone().into(), |stem| stem.to_string_lossy()))
    }
}

impl Text {
    /// Relative change of perplexity: 0.01 is one percent worse.
    pub(crate) fn perplexity_change(&self) -> Option<f64> {
        Some(self.lean_perplexity? / self.dense_perplexity? - 1.0)
            .filter(|change| change.is_finite())
    }
}

/// All evaluations of the files, in order. Warns where nothing in them is about this mask.
pub(crate) fn read(paths: &[PathBuf], own: &ModelMask) -> anyhow::Result<Vec<Evaluation>> {
    let mut all = Vec::new();
    for path in paths {
        let found = read_one(path)?;
        if found.is_empty() {
            output::note(format_args!("warning: --eval: {}: holds no evaluation", path.display()));
        }
        all.extend(found);
    }
    if !all.is_empty() && !all.iter().any(|evaluation| evaluation.is_of(own)) {
        let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        output::note(format_args!(
            "warning: --eval: {}: no evaluation of this mask as it is in its file; measure it with \
             `leank eval --json`",
            names.join(", ")
        ));
    }
    Ok(all)
}

fn read_one(path: &Path) -> anyhow::Result<Vec<Evaluation>> {
    let what = || format!("--eval: {}: reading failed", path.display());
    let file = std::fs::File::open(path).with_context(what)?;
    let mut json = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut json).with_context(what)?;
    anyhow::ensure!(
        json.len() as u64 <= MAX_BYTES,
        "--eval: {}: larger than any evaluation; give what `leank eval --json` printed",
        path.display()
    );
    let refused = |why: &dyn std::fmt::Display| {
        anyhow::anyhow!("--eval: {}: {why}; give what `leank eval --json` printed", path.display())
    };
    let all: Vec<Evaluation> = serde_json::from_slice(&json).map_err(|error| {
        match field_before(&json, error.line(), error.column()) {
            // The parser does not say which: 1e999.
            Some(field) if error.is_syntax() && error.to_string().contains("out of range") => {
                refused(&format_args!("{field}: {error}"))
            }
            _ => refused(&error),
        }
    })?;
    for (at, evaluation) in all.iter().enumerate() {
        if let Some((field, value)) = evaluation.impossible() {
            return Err(refused(&format_args!(
                "{field} of evaluation {at} is {value}; it cannot be below 0"
            )));
        }
    }
    Ok(all)
}

/// The last name in quotes before a place in a JSON text.
fn field_before(json: &[u8], line: usize, column: usize) -> Option<String> {
    let before = json.split(|&byte| byte == b'\n').take(line.checked_sub(1)?);
    let start: usize = before.map(|line| line.len() + 1).sum();
    let text = String::from_utf8_lossy(json.get(..start + column)?);
    Some(shown(text.rsplit('"').nth(1)?))
}

#[cfg(test)]
mod tests {
    use leank::{ChannelMask, MaskInfo};

    use super::*;

    #[test]
    fn an_evaluation_knows_its_mask() {
        let json = r#"{"mask": "a/b.safetensors", "kept_k": 0.25, "kept_v": 1, "dead_heads": 0,
            "heads": 1, "heads_by_format": {"k16v16": 1}, "middle_bytes": 0.6, "predicted_kl": 0.125,
            "text": {"sequences": 2, "positions": 8, "kl": 0.1, "kl_standard_error": null,
            "dense_perplexity": 10.0, "lean_perplexity": 11.0, "top1_agreement": 1, "more": 1},
            "cache": {"tokens": 64, "bytes": 1}}"#;
        let own: Evaluation = serde_json::from_str(json).unwrap();
        let mask = |predicted_kl| {
            let head = ChannelMask::new(4, vec![1]).unwrap();
            let info = MaskInfo { predicted_kl, ..MaskInfo::default() };
            ModelMask::new(1, 1, 4, vec![head]).unwrap().with_info(info).unwrap()
        };
        assert!(own.is_of(&mask(Some(0.125))));
        assert!(!own.is_of(&mask(Some(0.25))) && !own.is_of(&mask(None)));
        assert_eq!(own.name(), "b");
        assert_eq!(own.context(), Some(32));
        let change = own.text.unwrap().perplexity_change().unwrap();
        assert!((change - 0.1).abs() < 1e-12);
    }
}
