//! What blocks cost: [`BlockCount`] and [`Memory`].

use crate::{CacheLayout, Windows};

/// Blocks of a sequence of some length, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCount {
    /// Full blocks.
    pub full: usize,
    /// Lean blocks.
    pub lean: usize,
}

impl BlockCount {
    /// Blocks of a sequence of `len` tokens between steps.
    #[must_use]
    pub fn at(len: usize, block: usize, windows: Windows) -> Self {
        let all = len.div_ceil(block);
        let past = (len + 1).saturating_sub(windows.recent.max(1)) / block;
        let lean = past.min(all).saturating_sub(windows.sink.div_ceil(block));
        Self { full: all - lean, lean }
    }

    /// Bytes of these blocks, all layers.
    #[must_use]
    pub fn bytes(&self, layout: &CacheLayout) -> u64 {
        self.full as u64 * layout.full_bytes_all_layers()
            + self.lean as u64 * layout.lean_bytes_all_layers()
    }
}

/// Bytes that a cache holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Tokens of all sequences; one that several share counts for each.
    pub tokens: u64,
    /// Blocks in use.
    pub blocks: BlockCount,
    /// Bytes of full blocks in use.
    pub full_bytes: u64,
    /// Bytes of lean blocks in use.
    pub lean_bytes: u64,
    /// Bytes of block storage held, free blocks included.
    pub allocated_bytes: u64,
    /// Bytes that a dense cache without padding takes for the same tokens, shared ones once: what
    /// sharing saves is not the mask's doing.
    pub dense_bytes: u64,
}

impl Memory {
    /// Bytes of the blocks in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.full_bytes + self.lean_bytes
    }

    /// Bytes in use over those of a dense cache: windows, padding and partly filled blocks
    /// included. `None` for an empty cache.
    #[must_use]
    pub fn whole_kv_ratio(&self) -> Option<f64> {
        (self.dense_bytes > 0).then(|| self.used_bytes() as f64 / self.dense_bytes as f64)
    }
}
