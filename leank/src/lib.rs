//! Decode attention over a KV cache with its useless key channels removed.
//!
//! Decoding with a long context reads the whole KV cache for every token. Most channels of K do
//! not matter, and which ones do not is a static property of the model (LeanK, arXiv 2508.02215):
//! so a mask is learned once, the cache keeps only what matters of all but the first and the most
//! recent tokens, and decoding reads less.
//!
//! This crate is the front door; what it opens is chosen by cargo feature:
//!
//! | feature | brings |
//! |---|---|
//! | (none) | [`leank_core`]: masks and their files, caches' configuration, bookkeeping, the oracle |
//! | `cpu` | the CPU backend, [`cpu`] |
//! | `cuda` | the CUDA backend, `leank::cuda` |
//! | `train` | mask learning, `leank::train` |
//! | `candle` | Llama-family models on candle, `leank::candle` |
//! | `interop` | LeanK's `.pth`, `.npy` and `.tsv` masks |
//! | `cli` (default) | the `leank` command, with all of the above; leave it out to embed leank |
//!
//! An engine replaces its KV cache and its decode attention:
//!
//! ```
//! # #[cfg(feature = "cpu")] {
//! use leank::cpu::Cpu;
//! use leank::{Backend, Cache, CacheConfig, ModelMask, ModelShape};
//!
//! let shape = ModelShape::new(30, 9, 3, 64)?;
//! let mask = ModelMask::dense(&shape); // or leank::files::read_mask(path, ..)?
//! let mut cache = Cpu::new().create(CacheConfig::new(shape, mask)?)?;
//! let sequence = cache.add_sequence();
//! // Per step: cache.plan(..), per layer cache.append(..) and cache.attend(..), cache.commit().
//! # cache.release(sequence)?;
//! # }
//! # Ok::<(), leank::Error>(())
//! ```
//!
//! The whole step is shown in the documentation of the CPU backend.
#![forbid(unsafe_code)]

mod device;

pub use device::Device;
pub use leank_core::*;

#[cfg(feature = "candle")]
pub use leank_candle as candle;
#[cfg(feature = "cpu")]
pub use leank_cpu as cpu;
#[cfg(feature = "cuda")]
pub use leank_cuda as cuda;
#[cfg(feature = "train")]
pub use leank_train as train;

/// Compiles the READMEs' examples with the documentation's.
#[cfg(all(doctest, feature = "cpu"))]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../../README.md")]
#[doc = include_str!("../../docs/integrating.md")]
struct Readme;
