//! What fits into how much memory.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// Bytes of memory; parses from a number with an optional `KiB`, `MiB` or `GiB`.
///
/// ```
/// use leank_bench::decode_gpu::MemorySize;
/// assert_eq!("1.5GiB".parse::<MemorySize>()?, MemorySize(3 << 29));
/// # Ok::<(), leank_bench::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let units = [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
        let (number, unit) = units
            .into_iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)))
            .unwrap_or((text, 1));
        let bytes = number.trim().parse::<f64>().ok().map(|number| number * unit as f64);
        // Numbers below 2^53 are exact.
        match bytes.filter(|bytes| *bytes >= 1.0 && *bytes < (1u64 << 53) as f64) {
            Some(bytes) => Ok(Self(bytes as u64)),
            None => Err(Error::option("memory", "bytes such as 72GiB", format!("`{text}`"))),
        }
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} GiB", self.0 as f64 / (1u64 << 30) as f64)
    }
}

/// The largest number from 1 to `most` that fits, where all smaller ones do too; `None` where 1 does
/// not.
pub(super) fn largest(most: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut fitting, mut beyond) = (0, most + 1);
    while beyond - fitting > 1 {
        let middle = usize::midpoint(fitting, beyond);
        if fits(middle) { fitting = middle } else { beyond = middle }
    }
    (fitting > 0).then_some(fitting)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes) in
            [("72GiB", 72 << 30), ("0.5MiB", 1 << 19), ("64 KiB", 1 << 16), ("1000", 1000)]
        {
            assert_eq!(text.parse::<MemorySize>().unwrap().0, bytes, "{text}");
        }
        for text in ["", "GiB", "72GB", "-1GiB", "0", "nan", "inf", "1e30"] {
            let error = text.parse::<MemorySize>().unwrap_err().to_string();
            assert!(error.contains("72GiB"), "{text}: {error}");
        }
        assert_eq!(MemorySize(3 << 29).to_string(), "1.50 GiB");
    }

    #[test]
    fn the_largest_that_fits() {
        for limit in 0..20 {
            let expected = (limit > 0).then_some(limit.min(16));
            assert_eq!(largest(16, |n| n <= limit), expected, "{limit}");
        }
        assert_eq!(largest(0, |_| true), None);
    }
}
