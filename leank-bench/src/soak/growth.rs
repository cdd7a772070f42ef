//! Memory over time: whether it grows.

use std::fs;

use serde::Serialize;

/// Bytes of this process that are in memory; `None` where the system does not say (other than Linux).
pub(super) fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// How some memory changed over a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Growth {
    /// Which memory.
    pub memory: &'static str,
    /// Bytes at the end of the warm-up, the run's first quarter.
    pub first: u64,
    /// Bytes at the end.
    pub last: u64,
    /// Most bytes after the warm-up.
    pub most: u64,
    /// Bytes a minute after it, by least squares.
    pub slope: f64,
    /// Bytes that the slope makes of the time after it.
    pub grown: f64,
}

/// Samples of one memory.
#[derive(Clone, Debug)]
pub(super) struct Samples {
    memory: &'static str,
    /// Seconds and bytes.
    taken: Vec<(f64, u64)>,
}

impl Samples {
    /// None yet. Space for them is taken at once, so that they are no growth themselves.
    pub(super) fn new(memory: &'static str) -> Self {
        Self { memory, taken: Vec::with_capacity(1 << 14) }
    }

    pub(super) fn push(&mut self, seconds: f64, bytes: u64) {
        self.taken.push((seconds, bytes));
    }

    /// `None` where too few were taken to tell.
    pub(super) fn growth(&self) -> Option<Growth> {
        let (end, last) = *self.taken.last()?;
        let warm = self.taken.partition_point(|(seconds, _)| *seconds < end / 4.0);
        let after = &self.taken[warm..];
        let (begin, first) = *after.first()?;
        let n = after.len() as f64;
        let mean = |value: fn(&(f64, u64)) -> f64| after.iter().map(value).sum::<f64>() / n;
        let (time, bytes) = (mean(|at| at.0), mean(|at| at.1 as f64));
        let (mut products, mut squares) = (0.0, 0.0);
        for (seconds, held) in after {
            products += (seconds - time) * (*held as f64 - bytes);
            squares += (seconds - time).powi(2);
        }
        let slope = if squares > 0.0 { products / squares } else { return None };
        Some(Growth {
            memory: self.memory,
            first,
            last,
            most: after.iter().map(|(_, bytes)| *bytes).max()?,
            slope: slope * 60.0,
            grown: slope * (end - begin),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn growth(bytes: impl Fn(u64) -> u64) -> Growth {
        let mut samples = Samples::new("memory");
        (0..=600).for_each(|second| samples.push(second as f64, bytes(second)));
        samples.growth().unwrap()
    }

    #[test]
    fn a_leak_is_seen_behind_noise_and_warming_up_is_none() {
        let noise = |second: u64| second.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 44; // up to 1 MiB
        // Filled in the first two minutes, then flat.
        let flat = growth(|second| (second.min(120) << 20) + noise(second));
        assert!(flat.grown.abs() < 3e5, "{flat:?}");
        assert!(flat.first >= 120 << 20 && flat.most < 122 << 20, "{flat:?}");
        let leak = growth(|second| (100 << 20) + (second << 12) + noise(second));
        assert!((leak.slope / (60.0 * 4096.0) - 1.0).abs() < 0.2, "{leak:?}");
        assert!((leak.grown / (450.0 * 4096.0) - 1.0).abs() < 0.2, "{leak:?}");
        assert!(Samples::new("none").growth().is_none());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_written_is_resident() {
        let before = resident().unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = resident().unwrap();
        drop(held);
        assert!(after > before + (32 << 20), "{before} {after}");
    }
}
