//! A small random generator whose numbers for a seed never change with a library's version: dumps
//! and masks must be the same for a seed, wherever and whenever they are made.
//!
//! Everything random in leank draws from it: the cuts, tasks and probes of a dump, the shuffles of
//! [`crate::learn::Method::LeanK`], [`crate::synthetic`]. Changing what any method returns changes
//! all of them, so the tests hold the numbers fixed. It is not for secrets.
//!
//! ```
//! use leank_train::rng::Rng;
//!
//! let mut rng = Rng::fork(7, 0);
//! let mut sequences: Vec<usize> = (0..10).collect();
//! rng.shuffle(&mut sequences);
//! // Another part of the same job: independent of how much the first one draws.
//! let noise = Rng::fork(7, 1).normal();
//! # assert!(noise.is_finite());
//! ```

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// The generator of a seed. Seeds that are close give numbers that are not.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// A generator for one part of a job, independent of how much the others draw.
    #[must_use]
    pub fn fork(seed: u64, part: u64) -> Self {
        let mut rng = Self::new(seed ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        rng.next_u64();
        Self::new(rng.next_u64())
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`; 0 for `n` = 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Puts `items` in random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_seed_are_fixed() {
        // First outputs for the seed 0 as published with the algorithm.
        let mut rng = Rng::new(0);
        assert_eq!(rng.next_u64(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(rng.next_u64(), 0x6E78_9E6A_A1B9_65F4);
        // What dumps of this version were made with: see the module's documentation.
        assert_eq!(Rng::fork(3, 5).next_u64(), 0xD863_68FD_FC30_A78A);
        assert_eq!(Rng::new(1).uniform(), 0.5665615751722809);
        let mut rng = Rng::new(2);
        assert_eq!([0; 4].map(|_| rng.below(1000)), [591, 749, 595, 765]);
        let mut items = [0, 1, 2, 3, 4, 5, 6, 7];
        Rng::new(4).shuffle(&mut items);
        assert_eq!(items, [0, 4, 7, 1, 2, 5, 6, 3]);
        // The last bits of logarithm and cosine are the system's.
        assert!((Rng::new(3).normal() - -0.15078931135351334).abs() < 1e-14);
        assert_eq!(Rng::new(5).below(0), 0);
    }

    #[test]
    fn numbers_are_well_spread() {
        let mut rng = Rng::new(0);
        let n = 20_000;
        let normals: Vec<f64> = (0..n).map(|_| rng.normal()).collect();
        let mean = normals.iter().sum::<f64>() / f64::from(n);
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / f64::from(n);
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let mut items: Vec<usize> = (0..50).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
