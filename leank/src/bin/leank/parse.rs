//! Arguments of our own kinds.

use std::{
    num::NonZeroUsize,
    ops::{Range, RangeInclusive},
    thread::available_parallelism,
};

use leank::{ModelShape, blocks::MAX_TOKENS};

/// A share in 0..=1.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (0.0..=1.0).contains(&share) {
        return Ok(share);
    }
    Err(format!("{share} is not in 0..=1"))
}

/// A KL in nats.
pub(crate) fn nats(text: &str) -> Result<f64, String> {
    let nats: f64 = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if nats.is_finite() && nats >= 0.0 {
        return Ok(nats);
    }
    Err(format!("{nats} is no KL: it is 0 or more, and finite"))
}

/// A number of threads that can be started in no time.
pub(crate) fn threads(text: &str) -> Result<NonZeroUsize, String> {
    let threads: NonZeroUsize =
        text.parse().map_err(|_| format!("`{text}` is not a number of threads, 1 or more"))?;
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let most = cores.saturating_mul(4).max(64);
    if threads.get() <= most {
        return Ok(threads);
    }
    Err(format!("this machine runs {cores} at the same time; take at most {most}"))
}

/// Lengths: `2048`, or `1024..3584` with both ends.
pub(crate) fn lengths(text: &str) -> Result<RangeInclusive<usize>, String> {
    let number = |text: &str| {
        text.trim_start_matches('=').parse().map_err(|_| format!("`{text}` is not a length"))
    };
    let (from, to) = match text.split_once("..") {
        Some((from, to)) => (number(from)?, number(to)?),
        None => (number(text)?, number(text)?),
    };
    if from > to {
        return Err(format!("{from}..{to} ends before it starts"));
    }
    Ok(from..=to)
}

/// Layers: `4`, or `4..8`, of which the last one is 7.
pub(crate) fn layers(text: &str) -> Result<Range<usize>, String> {
    let number = |text: &str| text.parse::<usize>().map_err(|_| format!("`{text}` is not a layer"));
    let (from, to) = match text.split_once("..") {
        Some((from, to)) => (number(from)?, number(to)?),
        None => (number(text)?, number(text)?.saturating_add(1)),
    };
    if from >= to {
        return Err(format!(
            "there is no layer in {from}..{to}; the second number is not included"
        ));
    }
    Ok(from..to)
}

/// A number of channels, or `auto`.
pub(crate) fn alignment(text: &str) -> Result<Align, String> {
    match text {
        "auto" => Ok(Align::Auto),
        number => number
            .parse()
            .map(Align::Of)
            .map_err(|_| format!("`{number}` is neither a number of channels nor auto")),
    }
}

/// What kept counts are multiples of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    /// Of the channels between two measurements.
    Auto,
    /// Of this.
    Of(usize),
}

/// A context length that a cache may have.
pub(crate) fn context(text: &str) -> Result<usize, String> {
    let tokens: usize = text.parse().map_err(|_| format!("`{text}` is not a length"))?;
    if tokens > MAX_TOKENS {
        return Err(format!("a sequence holds at most {MAX_TOKENS} tokens"));
    }
    Ok(tokens)
}

/// Bytes: `4096`, `512MiB`, `16GiB`, `2GB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        unit => return Err(format!("`{unit}` is no unit of bytes; use KiB, MiB, GiB or TiB")),
    };
    let number: f64 = digits.parse().map_err(|_| format!("`{text}` is not a number of bytes"))?;
    let bytes = number * unit as f64;
    if !(0.0..1e18).contains(&bytes) {
        return Err(format!("{text} is out of range"));
    }
    Ok(bytes as u64)
}

/// `LAYERS,KV_HEADS,HEAD_DIM`. Query heads do not matter to a mask.
pub(crate) fn mask_shape(text: &str) -> Result<ModelShape, String> {
    let parts: Vec<usize> = text
        .split(',')
        .map(|part| part.trim().parse().map_err(|_| format!("`{part}` is not a number")))
        .collect::<Result<_, _>>()?;
    let [layers, kv_heads, head_dim] = parts[..] else {
        return Err(format!("`{text}` is not LAYERS,KV_HEADS,HEAD_DIM"));
    };
    ModelShape::new(layers, kv_heads, kv_heads, head_dim).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_bytes() {
        assert_eq!(lengths("1024..3584"), Ok(1024..=3584));
        assert_eq!(lengths("7"), Ok(7..=7));
        assert!(lengths("9..3").is_err() && lengths("x").is_err());
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("10"), Ok(10));
        assert_eq!(context("131072"), Ok(131_072));
        assert!(context("4294967297").is_err() && context("-1").is_err());
        assert!(nats("0").is_ok() && nats("nan").is_err() && nats("-1").is_err());
        assert!(threads("1").is_ok() && threads("0").is_err() && threads("1000000").is_err());
        assert!(bytes("1 parsec").is_err() && bytes("-1").is_err());
        assert!(mask_shape("32,8,128").is_ok() && mask_shape("32,8").is_err());
    }
}
