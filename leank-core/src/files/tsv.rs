//! Scaling factors as LeanK's training writes them: text, `numpy.savetxt(..., delimiter="\t")`.
//!
//! The table is two-dimensional and flattens row by row to `[layers, kv_heads, head_dim]`, so a
//! row is a layer (as LeanK has it) or one KV head. Which model it belongs to, how much to prune
//! and to what alignment the file does not say: [`ScalingFactors`] does. The rule is that of
//! [`quantile_and_round`], on factors clipped to 0..=1 as in LeanK's training; the mask carries the
//! factors as they stand in the file as its scores.

use std::path::Path;

use super::{Format, ScalingFactors, Source};
use crate::{MaskInfo, ModelMask, ModelShape, Result, quantile_and_round};

/// Longest number that is looked at; `numpy.savetxt` writes 24 characters.
const MAX_NUMBER_BYTES: usize = 64;

/// Parses scaling factors and makes a mask of them; `name` is for messages.
///
/// Columns are separated by tabs, spaces or commas; empty lines and lines that begin with `#` are
/// skipped.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format), with the line, for what is not a number, is not finite,
/// or a row that is longer or shorter than the first, and for a table that does not fit the shape;
/// [`Error::Invalid`](crate::Error::Invalid) for a bad shape, ratio or alignment.
pub fn from_bytes(bytes: &[u8], name: &Path, scaling: &ScalingFactors) -> Result<ModelMask> {
    let source = Source { path: name, format: Format::Tsv };
    let ScalingFactors { shape, ratio, alignment } = *scaling;
    shape.validate()?;
    let factors = parse(bytes, source, &shape)?;
    let clipped: Vec<f32> = factors.iter().map(|factor| factor.clamp(0.0, 1.0)).collect();
    let mask = quantile_and_round(&clipped, &shape, ratio, alignment)?;
    let info = MaskInfo { method: Some("leank scaling factors".into()), ..mask.info().clone() };
    mask.with_info(info)?.with_scores(factors)
}

fn parse(bytes: &[u8], source: Source<'_>, shape: &ModelShape) -> Result<Vec<f32>> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| source.bad(format!("it is not text: {error}; save it as UTF-8")))?;
    // A shape of a valid model does not overflow; a size that no file has is found out below.
    let expected = shape.layers * shape.kv_heads * shape.head_dim;
    let (mut factors, mut rows, mut columns) = (Vec::new(), 0, 0);
    for (index, line) in text.lines().enumerate() {
        let line_number = index + 1;
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let before = factors.len();
        for word in line.split([' ', '\t', ',']).filter(|word| !word.is_empty()) {
            if factors.len() == expected {
                return Err(source.bad(format!(
                    "line {line_number}: the table has more than the {expected} factors of {}; \
                     check the shape",
                    axes(shape)
                )));
            }
            factors.push(number(word).map_err(|why| {
                let column = factors.len() - before + 1;
                source.bad(format!("line {line_number}, column {column}: {why}"))
            })?);
        }
        let width = factors.len() - before;
        rows += 1;
        if rows == 1 {
            columns = width;
        } else if width != columns {
            return Err(source.bad(format!(
                "line {line_number} has {width} columns, the first row has {columns}; is the file \
                 whole?"
            )));
        }
    }
    if factors.len() != expected {
        return Err(source.bad(format!(
            "the table has {rows} rows × {columns} columns = {} factors, {expected} expected of \
             {}; check the shape, and whether the file is whole",
            factors.len(),
            axes(shape)
        )));
    }
    if rows != shape.layers && rows != shape.layers * shape.kv_heads {
        return Err(source.bad(format!(
            "the table has {rows} rows; a row is a layer ({} rows) or a KV head ({} rows): check \
             whether the table is transposed",
            shape.layers,
            shape.layers * shape.kv_heads
        )));
    }
    Ok(factors)
}

fn number(word: &str) -> std::result::Result<f32, String> {
    if word.len() > MAX_NUMBER_BYTES {
        return Err(format!("a word of {} characters is not a number", word.len()));
    }
    let number: f32 = word.parse().map_err(|_| format!("`{word}` is not a number"))?;
    if !number.is_finite() {
        return Err(format!("{word} is not finite; the training that wrote it went wrong"));
    }
    Ok(number)
}

fn axes(shape: &ModelShape) -> String {
    let ModelShape { layers, kv_heads, head_dim, .. } = shape;
    format!("{layers} layers × {kv_heads} KV heads × {head_dim} channels")
}
