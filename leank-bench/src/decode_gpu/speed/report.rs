//! What is reported of timed steps.

use std::fmt;

use leank_core::{Dtype, Windows};
use serde::Serialize;

use crate::{decode_gpu::MemorySize, decoder::Products};

/// What the project wants to reach in 16 bits: time of a dense step over that of a lean one at one
/// batch, and tokens per second of lean over dense in one memory.
pub const TARGETS: (f64, f64) = (1.45, 1.6);

/// One cache at one batch.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// `dense` or `lean`.
    pub cache: &'static str,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub context: usize,
    /// Bytes of K and V at that context.
    pub cache_bytes: u64,
    /// Milliseconds per step, median over rounds.
    pub ms: f64,
    /// The fastest round.
    pub ms_min: f64,
    /// The slowest round.
    pub ms_max: f64,
    /// Tokens per second of all sequences.
    pub tokens_per_s: f64,
    /// Share of a step that attention takes: what is saved by leaving it out.
    pub attention_share: f64,
    /// Milliseconds of all products of a step for themselves.
    pub products: Products,
    /// Bytes of weights, activations and cache at its largest, by plan.
    pub planned_bytes: u64,
    /// Most bytes of the device that these, captured graphs and cuBLAS's code took, by what was free.
    pub device_bytes: u64,
    /// Milliseconds per step of each round.
    pub rounds_ms: Vec<f64>,
}

/// Both caches in one memory, each at the largest batch that fits.
#[derive(Clone, Debug, Serialize)]
pub struct InMemory {
    /// Bytes for weights, activations and cache.
    pub bytes: u64,
    /// The dense cache.
    pub dense: Measured,
    /// The lean cache.
    pub lean: Measured,
    /// Tokens per second, lean over dense.
    pub ratio: f64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct SpeedReport {
    /// The device.
    pub device: String,
    /// Layers.
    pub layers: usize,
    /// Bytes of weights, RoPE table and cuBLAS's workspace.
    pub decoder_bytes: u64,
    /// The lean cache's mask.
    pub mask: String,
    /// Formats of its lean blocks where they are not the mask's.
    pub formats: Option<String>,
    /// The lean cache's windows.
    pub windows: Windows,
    /// Storage type of K and V.
    pub dtype: Dtype,
    /// Whether what is between plan and commit was a CUDA graph.
    pub graphs: bool,
    /// Steps per round.
    pub steps: usize,
    /// Rounds.
    pub rounds: usize,
    /// The batch that was asked for.
    pub asked_batch: usize,
    /// Whether both caches were there at once, and rounds alternated.
    pub together: bool,
    /// The dense cache.
    pub dense: Measured,
    /// The lean cache at the same batch.
    pub lean: Measured,
    /// Time per step, dense over lean.
    pub ratio: f64,
    /// The comparison in one memory.
    pub in_memory: Option<InMemory>,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        write!(
            f,
            "{:<5} {:>5} {:>8} {:>9.2} {:>9.3} {:>9.1} {:>8.1} % {:>8.3} {:>11.2} {:>7.2}",
            self.cache,
            self.batch,
            self.context,
            gib(self.cache_bytes),
            self.ms,
            self.tokens_per_s,
            self.attention_share * 100.0,
            self.products.fastest_ms,
            gib(self.planned_bytes),
            gib(self.device_bytes),
        )
    }
}

/// The heading of [`Measured`]'s lines.
pub const HEADER: &str =
    "cache batch  context cache GiB   ms/step  tokens/s  attention products GiB planned   taken";

impl fmt::Display for SpeedReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Windows { sink, recent } = self.windows;
        writeln!(f, "{}", self.device)?;
        writeln!(
            f,
            "Llama-3.1-8B's shape, {} layers, random bf16 weights: {}; K and V {}, mask {}{}{}, \
             sink {sink}, recent {recent}",
            self.layers,
            MemorySize(self.decoder_bytes),
            self.dtype,
            self.mask,
            if self.formats.is_some() { " in " } else { "" },
            self.formats.as_deref().unwrap_or_default(),
        )?;
        writeln!(
            f,
            "median of {} rounds of {} steps{}; {}",
            self.rounds,
            self.steps,
            if self.graphs { " by CUDA graphs" } else { "" },
            if self.together { "rounds alternate" } else { "one cache after the other" },
        )?;
        if self.dense.batch < self.asked_batch {
            writeln!(
                f,
                "the device holds {} of the {} sequences asked for in a dense cache: both are timed at {}",
                self.dense.batch, self.asked_batch, self.dense.batch
            )?;
        }
        writeln!(f, "\n{HEADER}\n{}\n{}", self.dense, self.lean)?;
        let (step, rate) = TARGETS;
        writeln!(
            f,
            "time per step, dense over lean: {:.3} (wanted in 16 bits: {step})",
            self.ratio
        )?;
        let Some(InMemory { bytes, dense, lean, ratio }) = &self.in_memory else { return Ok(()) };
        writeln!(f, "\nin {} each:\n{dense}\n{lean}", MemorySize(*bytes))?;
        writeln!(f, "tokens per second, lean over dense: {ratio:.3} (wanted in 16 bits: {rate})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(cache: &'static str, batch: usize, ms: f64) -> Measured {
        Measured {
            cache,
            batch,
            context: 32768,
            cache_bytes: 3 << 30,
            ms,
            ms_min: ms,
            ms_max: ms,
            tokens_per_s: batch as f64 / ms * 1e3,
            attention_share: 0.75,
            products: Products { first_ms: 6.0, fastest_ms: 5.5 },
            planned_bytes: 5 << 30,
            device_bytes: 6 << 30,
            rounds_ms: vec![ms],
        }
    }

    #[test]
    fn a_report_says_what_was_measured() {
        let (dense, lean) = (measured("dense", 10, 20.0), measured("lean", 10, 10.0));
        let report = SpeedReport {
            device: "a device".into(),
            layers: 32,
            decoder_bytes: 15 << 30,
            mask: "llama".into(),
            formats: Some("k8v4".into()),
            windows: Windows { sink: 128, recent: 768 },
            dtype: Dtype::Bf16,
            graphs: true,
            steps: 64,
            rounds: 3,
            asked_batch: 10,
            together: false,
            dense: dense.clone(),
            lean: lean.clone(),
            ratio: 2.0,
            in_memory: None,
        };
        let text = report.to_string();
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            words(&text).contains("dense 10 32768 3.00 20.000 500.0 75.0 % 5.500 5.00 6.00"),
            "{text}"
        );
        assert!(text.contains("dense over lean: 2.000 (wanted in 16 bits: 1.45)"), "{text}");
        assert!(text.contains("mask llama in k8v4, sink 128"), "{text}");
        assert!(!text.contains("asked for") && !text.contains("tokens per second"), "{text}");

        let in_memory = Some(InMemory { bytes: 72 << 30, dense, lean, ratio: 2.0 });
        let text = SpeedReport { asked_batch: 16, in_memory, ..report }.to_string();
        assert!(text.contains("holds 10 of the 16 sequences asked for"), "{text}");
        assert!(text.contains("in 72.00 GiB each:"), "{text}");
        assert!(text.contains("lean over dense: 2.000 (wanted in 16 bits: 1.6)"), "{text}");
    }
}
