//! Answers before anything runs: what a cache will take at some length, and what fits.

use crate::{
    BlockCount, CacheConfig, CacheLayout, LayoutRules, Result, Windows, blocks::MAX_TOKENS,
};

/// Predicts the bytes of a sequence, to the byte as [`crate::Ledger::memory`] will count them.
#[derive(Clone, Debug)]
pub struct Planner {
    layout: CacheLayout,
    windows: Windows,
}

/// What one sequence takes at a context length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Footprint {
    /// Context length in tokens.
    pub tokens: usize,
    /// Blocks by kind.
    pub blocks: BlockCount,
    /// Bytes between steps.
    pub bytes: u64,
    /// Most bytes while decoding token by token up to this length: a block that becomes lean is
    /// held in both forms for a moment.
    pub peak_bytes: u64,
    /// Bytes of a dense cache without padding.
    pub dense_bytes: u64,
}

impl Footprint {
    /// Bytes over those of a dense cache; `None` for no tokens.
    #[must_use]
    pub fn whole_kv_ratio(&self) -> Option<f64> {
        (self.dense_bytes > 0).then(|| self.bytes as f64 / self.dense_bytes as f64)
    }
}

impl Planner {
    /// A planner for caches of this configuration on a backend with these rules.
    ///
    /// # Errors
    /// As [`CacheConfig::validate`].
    pub fn new(config: &CacheConfig, rules: LayoutRules) -> Result<Self> {
        Ok(Self { layout: CacheLayout::new(config, rules)?, windows: config.windows })
    }

    /// The layout that the answers rest on.
    #[must_use]
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// What a sequence of `tokens` tokens takes.
    #[must_use]
    pub fn footprint(&self, tokens: usize) -> Footprint {
        let blocks = self.count(tokens);
        let full_until = tokens.div_ceil(self.layout.block);
        let peaks = (0..full_until).map(|index| self.peak_at_block(index, tokens));
        let bytes = blocks.bytes(&self.layout);
        Footprint {
            tokens,
            blocks,
            bytes,
            peak_bytes: peaks.max().unwrap_or(0).max(bytes),
            dense_bytes: tokens as u64 * self.layout.dense_token_bytes as u64,
        }
    }

    /// Most tokens of one sequence, decoded token by token, that never take more than `bytes`.
    /// `None`: more than any model can use (2^32), e.g. where lean blocks take nothing.
    #[must_use]
    pub fn tokens_within(&self, bytes: u64) -> Option<usize> {
        let block = self.layout.block;
        let fits_block = |index: usize| self.peak_at_block(index, (index + 1) * block) <= bytes;
        // The peak never falls from one block to the next: find the first that does not fit.
        let end = MAX_TOKENS / block;
        if fits_block(end) {
            return None;
        }
        let (mut fitting, mut beyond) = (0, end);
        while fitting < beyond {
            let middle = fitting + (beyond - fitting) / 2;
            if fits_block(middle) {
                fitting = middle + 1;
            } else {
                beyond = middle;
            }
        }
        let start = beyond * block;
        let fits = |tokens: &usize| self.peak_at_block(beyond, *tokens) <= bytes;
        Some((start + 1..start + block).take_while(fits).last().unwrap_or(start))
    }

    fn count(&self, tokens: usize) -> BlockCount {
        BlockCount::at(tokens, self.layout.block, self.windows)
    }

    /// Most bytes over the steps that bring a sequence from `index·block` to `min(end, tokens)`
    /// tokens. Within a block the counts change at most twice: at its first token, which takes a
    /// full block, and where an older block becomes lean.
    fn peak_at_block(&self, index: usize, tokens: usize) -> u64 {
        let start = index * self.layout.block;
        let end = (start + self.layout.block).min(tokens);
        let recent = self.windows.recent.max(1) % self.layout.block;
        // Packing happens in the step that ends at a length ≡ recent − 1 (mod block).
        let packing = (start..=end).find(|len| (len + 1) % self.layout.block == recent);
        [Some(start + 1), packing, Some(end)]
            .into_iter()
            .flatten()
            .filter(|&len| len > start && len <= end)
            .map(|len| self.step_bytes(len))
            .max()
            .unwrap_or(0)
    }

    /// Bytes that are reserved while the step to `len` tokens is under way.
    fn step_bytes(&self, len: usize) -> u64 {
        let (before, after) = (self.count(len - 1), self.count(len));
        let fresh = len.div_ceil(self.layout.block) - (len - 1).div_ceil(self.layout.block);
        BlockCount { full: before.full + fresh, lean: after.lean }.bytes(&self.layout)
    }
}
