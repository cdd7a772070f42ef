//! Masks, block bookkeeping, backend traits and the f64 oracle of the leank pruned KV cache.
//!
//! Most channels of the K cache do not matter, and which ones do not is a static property of the
//! model (LeanK, arXiv 2508.02215). This crate says what that means, and nothing about how fast it
//! is done:
//!
//! - [`ModelMask`] holds the kept channels of every KV head; [`files`] reads and writes masks.
//! - [`HeadPartition`] spreads the heads of a mask over the ranks of a tensor-parallel group.
//! - [`CacheConfig`], [`CacheLayout`] and [`Planner`] say what a cache stores and what it takes.
//! - [`quant`] says what codes of 8 and 4 bits in lean blocks stand for.
//! - [`Ledger`] keeps the books of blocks and sequences, as a pure state machine.
//! - [`saved`] is the format of sequences on disk.
//! - [`Backend`] and [`Cache`] are what `leank-cpu` and `leank-cuda` implement.
//! - [`oracle`] is the reference that every backend is tested against.
//!
//! ```
//! use leank_core::{CacheConfig, ChannelMask, LayoutRules, ModelMask, ModelShape, Planner};
//!
//! // One layer, two KV heads: one keeps 16 of 64 channels, one is dead.
//! let shape = ModelShape::new(1, 8, 2, 64)?;
//! let heads = vec![ChannelMask::new(64, (0..16).collect())?, ChannelMask::none(64)];
//! let config = CacheConfig::new(shape, ModelMask::new(1, 2, 64, heads)?)?;
//!
//! let rules = LayoutRules { section_align: 64, ..LayoutRules::PACKED };
//! let footprint = Planner::new(&config, rules)?.footprint(32_768)?;
//! assert!(footprint.whole_kv_ratio().unwrap() < 0.32);
//! # Ok::<(), leank_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod backend;
pub mod blocks;
mod config;
mod error;
#[cfg(feature = "files")]
pub mod files;
mod format;
mod layout;
mod mask;
pub mod oracle;
mod planner;
mod progress;
pub mod quant;
mod quantile;
mod run;
pub mod saved;
mod shape;
mod shard;
mod view;

pub use backend::{Backend, Cache};
pub use blocks::{
    Block, BlockCopy, BlockCount, Ledger, Memory, Pack, SequenceId, Step, StepEntry, StepSequence,
};
pub use config::{CacheConfig, DEFAULT_BLOCK, MAX_BLOCK};
pub use error::{Error, Result, mend};
pub use format::{Dtype, HeadFormat, HeadPrecision, LeanFormat, Precision, Tensor, widen_f16};
pub use layout::{CacheLayout, LayerLayout, LayoutRules, LeanHead};
pub use mask::{ChannelMask, Fingerprint, MaskInfo, MaskSummary, ModelMask, Sliding};
pub use planner::{Footprint, Planner};
pub use progress::Progress;
pub use quantile::{aligned_counts, kept_at_ratio, quantile_and_round};
pub use run::{InputRecord, RunRecord};
pub use shape::{KvHead, Layer, MAX_HEAD_DIM, ModelShape, QueryHead, Windows};
pub use shard::{Balance, HeadPartition};
pub use view::{Borrowed, Elements, ElementsMut, HostView, HostViewMut, View, ViewShape};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
