//! What was measured, and how it is printed.

use std::fmt;

use leank_core::Dtype;
use serde::Serialize;

use crate::stats::median;

/// The heading of a context's lines.
pub const HEADER: &str = "context  variant                  tokens/s       ms    min    max   K and V, MB  of read  \
                          its time over lean's";

/// One variant at one context.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The variant.
    pub name: String,
    /// Milliseconds per step, median over rounds.
    pub ms: f64,
    /// The fastest round.
    pub ms_min: f64,
    /// The slowest round.
    pub ms_max: f64,
    /// Bytes of the cache; a step reads them at least once.
    pub cache_bytes: u64,
    /// Bytes of weights and cache per second over the round's read bandwidth, median.
    pub bandwidth_share: f64,
    /// Its time over the lean cache's, median of the rounds' ratios.
    pub over_lean: f64,
}

/// All variants at one context.
#[derive(Clone, Debug, Serialize)]
pub struct ContextReport {
    /// Tokens that the last step sees.
    pub context: usize,
    /// Read bandwidth, 10⁹ bytes per second, median.
    pub bandwidth_gb_per_s: f64,
    /// The lean cache first.
    pub variants: Vec<Measured>,
}

impl ContextReport {
    /// Of names, cache bytes and seconds per step in each round; the lean cache first.
    pub(super) fn new<'a>(
        context: usize,
        weight_bytes: u64,
        bandwidths: &[f64],
        variants: impl Iterator<Item = ((&'a str, u64), &'a Vec<f64>)>,
    ) -> Self {
        let middle = |values: Vec<f64>| median(values).unwrap_or(f64::NAN);
        let mut lean: Option<&Vec<f64>> = None;
        let mut measured = |((name, cache_bytes), times): ((&str, u64), &'a Vec<f64>)| {
            let lean = *lean.get_or_insert(times);
            let bytes = (weight_bytes + cache_bytes) as f64;
            let shares = times.iter().zip(bandwidths).map(|(time, read)| bytes / time / read);
            Measured {
                name: name.to_owned(),
                ms: middle(times.iter().map(|time| time * 1e3).collect()),
                ms_min: times.iter().copied().fold(f64::INFINITY, f64::min) * 1e3,
                ms_max: times.iter().copied().fold(0.0, f64::max) * 1e3,
                cache_bytes,
                bandwidth_share: middle(shares.collect()),
                over_lean: middle(times.iter().zip(lean).map(|(own, lean)| own / lean).collect()),
            }
        };
        Self {
            context,
            bandwidth_gb_per_s: middle(bandwidths.iter().map(|read| read / 1e9).collect()),
            variants: variants.map(&mut measured).collect(),
        }
    }
}

impl fmt::Display for ContextReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for variant in &self.variants {
            writeln!(
                f,
                "{:>7}  {:<22} {:>10.1} {:>8.2} {:>6.2} {:>6.2} {:>13.1} {:>6.1} %  {:.2}",
                self.context,
                variant.name,
                1e3 / variant.ms,
                variant.ms,
                variant.ms_min,
                variant.ms_max,
                variant.cache_bytes as f64 / 1e6,
                variant.bandwidth_share * 100.0,
                variant.over_lean
            )?;
        }
        write!(f, "         reading memory: {:.1} GB/s", self.bandwidth_gb_per_s)
    }
}

/// Everything, and where it was taken.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeCpuReport {
    /// The processor, as the system names it.
    pub machine: String,
    /// Our backend and kernel.
    pub backend: String,
    /// Threads of every variant.
    pub threads: usize,
    /// The model's own name.
    pub model: String,
    /// Tokens that the model knows.
    pub trained_context: usize,
    /// Whether weights are read as the file holds them.
    pub as_stored: bool,
    /// Storage type of K and V in our caches.
    pub dtype: Dtype,
    /// The mask.
    pub mask: String,
    /// Version of llama-cpp-python, or why it was left out.
    pub llama_cpp: Result<String, String>,
    /// Steps of a round.
    pub tokens: usize,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Bytes of weights that a step reads, beside ours and candle's caches.
    pub weight_bytes: u64,
    /// In the order of the options.
    pub contexts: Vec<ContextReport>,
}

impl fmt::Display for DecodeCpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = if self.as_stored { "as stored" } else { "f32" };
        writeln!(f, "{}, {} threads; {}", self.machine, self.threads, self.backend)?;
        writeln!(
            f,
            "{}, weights {weights}: {:.1} MB per step; our K and V {}, candle's f32; mask {}",
            self.model,
            self.weight_bytes as f64 / 1e6,
            self.dtype,
            self.mask
        )?;
        writeln!(f, "median of {} rounds of {} steps", self.rounds, self.tokens)?;
        match &self.llama_cpp {
            Ok(version) => writeln!(f, "{version}")?,
            Err(why) => writeln!(f, "LLAMA.CPP IS MISSING: {why}")?,
        }
        writeln!(f, "\n{HEADER}")?;
        for context in &self.contexts {
            writeln!(f, "{context}")?;
            if context.context > self.trained_context {
                writeln!(
                    f,
                    "         beyond the model's {} tokens: speed only, the text would be none",
                    self.trained_context
                )?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_formed_within_a_round() {
        // The machine is half as fast in the second round.
        let (lean, dense) = (vec![0.010, 0.020, 0.010], vec![0.015, 0.030, 0.018]);
        let variants = [(("lean", 100_000_000), &lean), (("dense", 250_000_000), &dense)];
        let report =
            ContextReport::new(4096, 50_000_000, &[40e9, 20e9, 40e9], variants.into_iter());
        let [lean, dense] = &report.variants[..] else { panic!("two variants") };
        assert!((lean.over_lean - 1.0).abs() < 1e-12 && (dense.over_lean - 1.5).abs() < 1e-12);
        assert!((lean.bandwidth_share - 0.375).abs() < 1e-12, "{}", lean.bandwidth_share);
        assert!((dense.ms - 18.0).abs() < 1e-9 && (dense.ms_max - 30.0).abs() < 1e-9);

        let whole = DecodeCpuReport {
            machine: "a machine".into(),
            backend: "cpu".into(),
            threads: 2,
            model: "tiny".into(),
            trained_context: 2048,
            as_stored: true,
            dtype: Dtype::Bf16,
            mask: "m.safetensors".into(),
            llama_cpp: Err("no --llama-cpp".into()),
            tokens: 8,
            rounds: 3,
            weight_bytes: 50_000_000,
            contexts: vec![report],
        };
        let text = whole.to_string();
        assert!(text.contains("LLAMA.CPP IS MISSING: no --llama-cpp"), "{text}");
        assert!(text.contains("beyond the model's 2048 tokens"), "{text}");
        let words: Vec<&str> = text.split_whitespace().collect();
        assert!(words.join(" ").contains("4096 dense 55.6 18.00 15.00 30.00 250.0"), "{text}");
    }
}
