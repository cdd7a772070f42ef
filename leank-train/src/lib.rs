//! Activation dumps and mask learning: from one pass over a model to the channels of K that a
//! lean cache keeps.
//!
//! A [`dump::Dump`] holds, per layer, the queries of some decode positions, the keys and values
//! they attend to, and a probe: the gradient of the model's log-likelihood at the attention
//! output. From it [`learn::learn_mask`] learns which channels each KV head can do without, and
//! spends a budget of channels or of bytes over all heads:
//!
//! ```no_run
//! use leank_train::{
//!     allocate::{AllocateOptions, Budget},
//!     dump::Dump,
//!     learn::{LearnOptions, learn_mask},
//! };
//!
//! # fn main() -> leank_train::Result<()> {
//! let dump = Dump::open("dump".as_ref())?;
//! let budget = AllocateOptions::new(Budget::Bytes(0.55));
//! let learned = learn_mask(&dump, &LearnOptions::default(), &budget, &|_| {})?;
//! println!("predicted KL {:?}", learned.mask.info().predicted_kl);
//! # Ok(())
//! # }
//! ```
//!
//! Where to go next: the format in [`dump`], the mathematics in [`stats`], the elimination in
//! [`order`], the dynamic program in [`allocate`], what it is compared with in [`baseline`] and
//! [`leank`].
//!
//! Learning is parallel over KV heads, deterministic whatever the number of threads, bounded in
//! memory whatever the dump's size, and resumes after a kill from its last finished layer. Machines
//! share the work by layers: [`learn::measure_layers`], then [`merge`].
#![forbid(unsafe_code)]

pub mod allocate;
pub mod baseline;
pub mod dump;
mod error;
pub mod leank;
pub mod learn;
pub mod merge;
pub mod order;
mod records;
pub mod rng;
pub mod stats;
pub mod synthetic;

pub use error::{ElementPosition, Error, Result};
pub use records::{OnProgress, Progress};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
