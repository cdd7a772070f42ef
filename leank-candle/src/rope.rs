//! Rotary position embedding: frequencies and tables.

use crate::config::RopeScaling;

/// Cosines and sines of every position, for one model.
///
/// Angles are computed in f64 and rounded once, so positions far out are as exact as the first.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..positions` of heads of `head_dim` channels, an even number, with the
    /// RoPE base `base`.
    #[must_use]
    pub fn new(head_dim: usize, base: f64, scaling: &RopeScaling, positions: usize) -> Self {
        let frequencies = frequencies(head_dim, base, scaling);
        let warmth = warmth(scaling);
        let mut cos = Vec::with_capacity(positions * frequencies.len());
        let mut sin = Vec::with_capacity(positions * frequencies.len());
        for position in 0..positions {
            for frequency in &frequencies {
                let angle = position as f64 * frequency;
                cos.push((angle.cos() * warmth) as f32);
                sin.push((angle.sin() * warmth) as f32);
            }
        }
        Self { half: head_dim / 2, cos, sin }
    }

    /// Cosines, `[positions, head_dim / 2]`; YaRN's factor on q and k is in them.
    #[must_use]
    pub fn cosines(&self) -> &[f32] {
        &self.cos
    }

    /// Sines, as [`RopeTable::cosines`].
    #[must_use]
    pub fn sines(&self) -> &[f32] {
        &self.sin
    }

    /// Channels of a head.
    pub(crate) fn head_dim(&self) -> usize {
        self.half * 2
    }

    /// Positions in the table.
    pub(crate) fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Cosines and sines of a position, one per pair. Panics beyond [`RopeTable::positions`].
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// Angle per token of each pair of channels.
fn frequencies(head_dim: usize, base: f64, scaling: &RopeScaling) -> Vec<f64> {
    let half = head_dim / 2;
    let plain = |pair: usize| base.powf(-(pair as f64) / half as f64);
    let scaled = |pair: usize| {
        let f = plain(pair);
        match scaling {
            RopeScaling::None => f,
            RopeScaling::Linear { factor } => f / factor,
            RopeScaling::Divisors(divisors) => f / f64::from(divisors[pair]),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let turns = original * f / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                f * kept + f / factor * (1.0 - kept)
            }
            RopeScaling::Yarn { factor, original } => {
                // Pairs that turn more than 32 times within the trained context stay, those that
                // turn less than once are interpolated.
                let pair_of = |turns: f64| {
                    half as f64 * (original / (turns * std::f64::consts::TAU)).ln() / base.ln()
                };
                let from = pair_of(32.0).floor().max(0.0);
                let to = pair_of(1.0).ceil().min(head_dim as f64 - 1.0);
                let interpolated = ((pair as f64 - from) / (to - from).max(1e-3)).clamp(0.0, 1.0);
                f * (1.0 - interpolated) + f / factor * interpolated
            }
        }
    };
    (0..half).map(scaled).collect()
}

/// Factor on q and k: YaRN makes the softmax sharper as the context grows.
fn warmth(scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Yarn { factor, .. } if *factor > 1.0 => 0.1 * factor.ln() + 1.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_are_a_geometric_series() {
        let f = frequencies(8, 10_000.0, &RopeScaling::None);
        for (got, want) in f.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - want).abs() < 1e-12);
        }
        let (cos, sin) = (3.0f64.cos() as f32, 3.0f64.sin() as f32);
        let table = RopeTable::new(8, 10_000.0, &RopeScaling::None, 4);
        assert_eq!((table.at(3).0[0], table.at(3).1[0]), (cos, sin));
        assert_eq!(table.positions(), 4);
    }

    #[test]
    fn scalings_keep_high_and_divide_low_frequencies() {
        let plain = frequencies(128, 500_000.0, &RopeScaling::None);
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let yarn = RopeScaling::Yarn { factor: 4.0, original: 8192.0 };
        for (scaling, factor) in [(llama3, 8.0), (yarn, 4.0)] {
            let scaled = frequencies(128, 500_000.0, &scaling);
            assert!((scaled[0] / plain[0] - 1.0).abs() < 1e-12);
            assert!((scaled[63] / plain[63] * factor - 1.0).abs() < 1e-12);
            assert!(scaled.windows(2).all(|w| w[0] > w[1]), "{scaling:?}");
        }
        let linear = frequencies(128, 500_000.0, &RopeScaling::Linear { factor: 2.0 });
        assert_eq!(linear[5], plain[5] / 2.0);
    }
}
