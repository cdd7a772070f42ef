//! A report as a plain table.

use std::fmt::{self, Write as _};

use crate::{
    cpu::{Report, Row},
    stats::Summary,
};

/// The heading of [`rows`].
pub const HEADER: &str = "shape      context dtype threads cache     MB/call       ms     GB/s \
                          of read  lean/dense time (bytes)";

/// Prints a [`Report`]: where it was taken, then two lines per setting.
pub struct Table<'a>(pub &'a Report);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { machine, cores, backend, rounds, footprint, .. } = self.0;
        writeln!(f, "{machine}, {cores} cores; {backend}")?;
        let mib = *footprint as f64 / f64::from(1 << 20);
        writeln!(f, "median of {rounds} rounds; caches of at least {mib:.0} MiB\n\n{HEADER}")?;
        self.0.rows.iter().try_for_each(|row| f.write_str(&rows(row)))
    }
}

/// The lines of one setting: the read bandwidth's round mates, dense and lean, which is
/// called by its formats.
#[must_use]
pub fn rows(row: &Row) -> String {
    let ratio = format!("{:.2} ({:.2})", row.time_ratio, row.bytes_ratio);
    line(row, "dense", &row.dense, &format!("read {:.1} GB/s", row.bandwidth_gb_per_s))
        + &line(row, &row.formats, &row.lean, &ratio)
}

fn line(row: &Row, cache: &str, summary: &Summary, last: &str) -> String {
    let mut line = format!(
        "{:<10} {:>7} {:<5} {:>7} {cache:<6}",
        row.shape,
        row.context,
        row.dtype.to_string(),
        row.threads
    );
    // Writing to a string does not fail.
    let _ = writeln!(
        line,
        " {:>10.3} {:>8.3} {:>8.2} {:>5.1} %  {last}",
        summary.bytes / 1e6,
        summary.ms,
        summary.gb_per_s,
        summary.bandwidth_share * 100.0
    );
    line
}

#[cfg(test)]
mod tests {
    use leank_core::Dtype;

    use super::*;
    use crate::setting::HeadShape;

    #[test]
    fn a_row_says_what_was_measured() {
        let summary = |bytes, ms| Summary {
            bytes,
            ms,
            ms_min: ms,
            ms_max: ms,
            gb_per_s: bytes / ms / 1e6,
            bandwidth_share: bytes / ms / 1e6 / 40.0,
        };
        let row = Row {
            shape: "A".into(),
            heads: HeadShape::A,
            context: 2048,
            dtype: Dtype::F16,
            formats: "k8v8".into(),
            threads: 2,
            bandwidth_gb_per_s: 40.0,
            dense: summary(8e6, 0.4),
            lean: summary(4e6, 0.25),
            time_ratio: 0.625,
            bytes_ratio: 0.5,
        };
        let text = rows(&row);
        let words: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        let dense = "A 2048 f16 2 dense 8.000 0.400 20.00 50.0 % read 40.0 GB/s";
        let lean = "A 2048 f16 2 k8v8 4.000 0.250 16.00 40.0 % 0.62 (0.50)";
        assert_eq!(words[0].join(" "), dense);
        assert_eq!(words[1].join(" "), lean);
    }
}
