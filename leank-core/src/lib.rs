//! Masks, block bookkeeping, backend traits and the f64 oracle of the leank pruned KV cache.
#![forbid(unsafe_code)]

mod error;
#[cfg(feature = "files")]
pub mod files;
mod mask;
mod shape;

pub use error::{Error, Result};
pub use mask::{ChannelMask, Fingerprint, MaskInfo, MaskSummary, ModelMask};
pub use shape::{KvHead, Layer, MAX_HEAD_DIM, ModelShape, QueryHead, Windows};
