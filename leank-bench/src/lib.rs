//! Measures what a lean cache is worth on the machine at hand.
//!
//! Decode attention reads the whole cache once per token and computes little, so its limit is the
//! read bandwidth. [`cpu::measure`] times dense and lean attention beside a plain read of memory in
//! the same rounds, and says which share of the bandwidth each reaches:
//!
//! ```
//! use leank_bench::{cpu::{self, CpuOptions}, setting::HeadShape, workload::Variant};
//! use leank_core::Dtype;
//!
//! let options = CpuOptions {
//!     shapes: vec!["B".parse::<HeadShape>()?],
//!     contexts: vec![1024],
//!     dtypes: vec![Dtype::F16],
//!     threads: vec![1],
//!     lean: Variant::Llama,
//!     formats: vec!["k16v16".parse()?, "k8v8".parse()?],
//!     rounds: 1,
//!     millis: 1,
//!     footprint: 1 << 20, // a real run wants many times the last-level cache
//! };
//! let report = cpu::measure(&options, |_| ())?;
//! assert!(report.rows[0].lean.bytes < report.rows[0].dense.bytes);
//! assert!(report.rows[1].lean.bytes < report.rows[0].lean.bytes);
//! # Ok::<(), leank_bench::Error>(())
//! ```
//!
//! - [`setting`]: shapes, masks and data that are measured.
//! - [`workload`]: a filled cache of any host backend, large enough to be cold.
//! - [`bandwidth`]: the read bandwidth that portable code reaches.
//! - [`stats`]: medians over rounds, ratios within a round.
//! - [`worker`]: a cache that answers a line protocol, to be timed beside other libraries.
//! - [`cpu`]: the measurement that `leank-bench cpu` runs; [`table`] prints it, [`figure`] draws it.
//! - [`cuda`]: decode attention on a CUDA device.
//! - [`decode_cpu`]: whole decode steps of a model on the CPU, beside candle's caches and llama.cpp.
//! - [`decode_gpu`]: whole decode steps on it, by the [`decoder`], and their tokens beside the CPU's.
//! - [`accuracy`]: the error against f64, on random data and on a model's activations.
//! - [`soak`]: hours of simulated users on caches whose books and outputs are checked all the while.
//! - [`steps`]: many short sequences against a long one, and a busy core.
//!
//! Criterion benches of single operations are in `benches/`.
#![deny(unsafe_code)]

pub mod accuracy;
pub mod bandwidth;
pub mod cpu;
#[allow(unsafe_code, reason = "launches kernels")]
pub mod cuda;
pub mod decode_cpu;
pub mod decode_gpu;
#[allow(unsafe_code, reason = "launches kernels, calls cuBLAS")]
pub mod decoder;
mod error;
pub mod figure;
pub mod setting;
pub mod soak;
pub mod stats;
pub mod steps;
pub mod table;
pub mod worker;
pub mod workload;

pub use error::{Error, Result};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
