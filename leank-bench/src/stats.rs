//! What is made of times: medians over rounds, ratios within a round.
//!
//! The bandwidth of a shared machine moves by a factor of two for minutes. Only times of the same
//! round were taken under the same conditions, so every ratio is formed within its round first,
//! and the median is over ratios.

use serde::Serialize;

/// Times of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Read bandwidth, bytes per second.
    pub bandwidth: f64,
    /// Seconds per call on the dense cache.
    pub dense: f64,
    /// Seconds per call on the lean cache.
    pub lean: f64,
}

/// One cache over all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Bytes of K and V that one call reads, mean over the layers.
    pub bytes: f64,
    /// Milliseconds per call, median.
    pub ms: f64,
    /// The fastest round.
    pub ms_min: f64,
    /// The slowest round.
    pub ms_max: f64,
    /// 10⁹ bytes of K and V per second, median.
    pub gb_per_s: f64,
    /// Share of the round's read bandwidth, median.
    pub bandwidth_share: f64,
}

/// The median of some numbers, the mean of the middle two of an even count; `None` of none.
#[must_use]
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(lower + (upper - lower) / 2.0)
}

/// The summary of the cache whose time `seconds` picks out of a round; `None` without rounds.
#[must_use]
pub fn summarize(rounds: &[Round], bytes: f64, seconds: impl Fn(&Round) -> f64) -> Option<Summary> {
    let ms = || rounds.iter().map(|round| seconds(round) * 1e3);
    Some(Summary {
        bytes,
        ms: median(ms())?,
        ms_min: ms().fold(f64::INFINITY, f64::min),
        ms_max: ms().fold(0.0, f64::max),
        gb_per_s: median(rounds.iter().map(|round| bytes / seconds(round) / 1e9))?,
        bandwidth_share: median(
            rounds.iter().map(|round| bytes / seconds(round) / round.bandwidth),
        )?,
    })
}

/// Time of the lean cache over that of the dense one, median over rounds; `None` without rounds.
#[must_use]
pub fn time_ratio(rounds: &[Round]) -> Option<f64> {
    median(rounds.iter().map(|round| round.lean / round.dense))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs()
    }

    #[test]
    fn medians() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0]), Some(3.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
        assert_eq!(median([9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([1.0, 100.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn ratios_are_formed_within_a_round() {
        // The machine is twice as slow in the second round: the ratios do not see it, while the
        // ratio of medians of unequal rounds would.
        let rounds = [
            Round { bandwidth: 40e9, dense: 2e-3, lean: 1e-3 },
            Round { bandwidth: 20e9, dense: 4e-3, lean: 2e-3 },
            Round { bandwidth: 40e9, dense: 2e-3, lean: 1.2e-3 },
        ];
        assert!(close(time_ratio(&rounds).unwrap(), 0.5));
        let dense = summarize(&rounds, 40e6, |round| round.dense).unwrap();
        assert!(close(dense.ms, 2.0));
        assert!(close(dense.gb_per_s, 20.0));
        assert!(close(dense.bandwidth_share, 0.5));
        assert!(close(dense.ms_min, 2.0) && close(dense.ms_max, 4.0));
        let lean = summarize(&rounds, 24e6, |round| round.lean).unwrap();
        assert!(close(lean.ms, 1.2));
        assert!(close(lean.gb_per_s, 20.0));
        assert!(close(lean.bandwidth_share, 0.6));
    }

    #[test]
    fn no_rounds_no_summary() {
        assert_eq!(summarize(&[], 1.0, |round| round.dense), None);
        assert_eq!(time_ratio(&[]), None);
    }
}
