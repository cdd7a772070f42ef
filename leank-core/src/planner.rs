//! Answers before anything runs: what a cache will take at some length, and what fits.

use crate::{
    BlockCount, CacheConfig, CacheLayout, Error, LayoutRules, Result, Windows, blocks::MAX_TOKENS,
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
    /// As [`CacheConfig::validate`]; [`Error::Invalid`] for rules that pad so much that the bytes of
    /// [`MAX_TOKENS`] tokens cannot be counted.
    pub fn new(config: &CacheConfig, rules: LayoutRules) -> Result<Self> {
        let layout = CacheLayout::new(config, rules)?;
        // In a step both forms of a block may be held. What fits here fits everywhere below.
        let blocks = (MAX_TOKENS / layout.block + 2) as u64;
        let both_forms = layout.full_bytes_all_layers().checked_add(layout.lean_bytes_all_layers());
        let most = both_forms.and_then(|bytes| bytes.checked_mul(blocks));
        let dense = (layout.dense_token_bytes as u64).checked_mul(MAX_TOKENS as u64);
        if most.is_none() || dense.is_none() {
            let why = format!("{} takes more bytes than any memory has", config.shape);
            return Err(Error::invalid("model shape", why));
        }
        Ok(Self { layout, windows: config.windows })
    }

    /// The layout that the answers rest on.
    #[must_use]
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// What a sequence of `tokens` tokens takes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more than [`MAX_TOKENS`] tokens.
    pub fn footprint(&self, tokens: usize) -> Result<Footprint> {
        if tokens > MAX_TOKENS {
            let why = format!("{tokens} tokens, more than the {MAX_TOKENS} a sequence can have");
            return Err(Error::invalid("context length", why));
        }
        let blocks = self.count(tokens);
        Ok(Footprint {
            tokens,
            blocks,
            bytes: blocks.bytes(&self.layout),
            peak_bytes: self.peak_bytes(tokens),
            dense_bytes: tokens as u64 * self.layout.dense_token_bytes as u64,
        })
    }

    /// Most tokens of one sequence, decoded token by token, that never take more than `bytes`.
    /// `None`: as many as a sequence can have ([`MAX_TOKENS`]), e.g. where lean blocks take
    /// nothing.
    #[must_use]
    pub fn tokens_within(&self, bytes: u64) -> Option<usize> {
        let fits = |tokens| self.peak_bytes(tokens) <= bytes;
        if fits(MAX_TOKENS) {
            return None;
        }
        let (mut fitting, mut beyond) = (0, MAX_TOKENS);
        while beyond - fitting > 1 {
            let middle = usize::midpoint(fitting, beyond);
            if fits(middle) { fitting = middle } else { beyond = middle }
        }
        Some(fitting)
    }

    fn count(&self, tokens: usize) -> BlockCount {
        BlockCount::at(tokens, self.layout.block, self.windows)
    }

    /// Most bytes over the steps that bring a sequence, token by token, to `tokens`.
    ///
    /// A block further on, a step holds one block more, and at most one full block less: it never
    /// takes less than the same step a block before. So the last block's worth of steps decides.
    /// Among them the bytes rise at two only: at the first token of a block, which takes a full
    /// block, and where an older block becomes lean.
    fn peak_bytes(&self, tokens: usize) -> u64 {
        let block = self.layout.block;
        let first = tokens.saturating_sub(block) + 1;
        // The last length up to `tokens` that leaves this remainder.
        let last = |remainder: usize| tokens.checked_sub((tokens + block - remainder) % block);
        // A block becomes lean in the step that ends at a length ≡ recent − 1 (mod block).
        let packing = last((self.windows.recent.max(1) - 1) % block);
        [Some(first), last(1 % block), packing]
            .into_iter()
            .flatten()
            .filter(|len| (first..=tokens).contains(len))
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ChannelMask, ModelMask, ModelShape};

    const RULES: LayoutRules =
        LayoutRules { k_channel_multiple: 4, section_align: 32, ..LayoutRules::PACKED };

    fn planner(block: usize, windows: Windows, kept: u16) -> Planner {
        let shape = ModelShape::new(1, 1, 1, 16).unwrap();
        let head = ChannelMask::new(16, (0..kept).collect()).unwrap();
        let mask = ModelMask::new(1, 1, 16, vec![head]).unwrap();
        let config = CacheConfig { windows, block, ..CacheConfig::new(shape, mask).unwrap() };
        Planner::new(&config, RULES).unwrap()
    }

    proptest! {
        /// The last block's worth of steps has the most that any step took.
        #[test]
        fn the_peak_is_that_of_all_steps(
            block in 1usize..12,
            sink in 0usize..30,
            recent in prop_oneof![0usize..40, Just(usize::MAX)],
            kept in 0u16..=16,
            tokens in 0usize..300,
        ) {
            let planner = planner(block, Windows { sink, recent }, kept);
            let steps = (1..=tokens).map(|len| planner.step_bytes(len));
            let footprint = planner.footprint(tokens).unwrap();
            prop_assert_eq!(footprint.peak_bytes, steps.max().unwrap_or(0));
            prop_assert!(footprint.bytes <= footprint.peak_bytes);
        }
    }

    #[test]
    fn any_context_is_answered_at_once() {
        for windows in [Windows { sink: 32, recent: 128 }, Windows::EVERYTHING] {
            let planner = planner(1, windows, 4);
            let longest = planner.footprint(MAX_TOKENS).unwrap();
            assert_eq!(longest.blocks.full + longest.blocks.lean, MAX_TOKENS);
            assert!(longest.peak_bytes >= longest.bytes);
            assert_eq!(planner.tokens_within(longest.peak_bytes), None);
            assert!(planner.tokens_within(longest.peak_bytes - 1).unwrap() < MAX_TOKENS);
            for tokens in [MAX_TOKENS + 1, usize::MAX] {
                let message = planner.footprint(tokens).unwrap_err().to_string();
                assert!(message.contains("context length"), "{message}");
            }
        }
    }

    #[test]
    fn models_whose_bytes_cannot_be_counted_are_refused() {
        // Not by a shape alone: a backend pads each head to 64 MiB.
        let shape = ModelShape::new(16, 16, 16, 1).unwrap();
        let config = CacheConfig { block: 1, ..CacheConfig::dense(shape).unwrap() };
        let rules = LayoutRules { section_align: 1 << 26, ..RULES };
        let error = Planner::new(&config, rules).unwrap_err().to_string();
        assert!(error.contains("16 layers"), "{error}");
    }

    #[test]
    fn a_footprint_compares_with_a_dense_cache() {
        // Per token and head 16 channels of K and V in f16: 64 bytes; a lean block keeps half of K.
        let planner = planner(4, Windows { sink: 4, recent: 8 }, 8);
        let footprint = planner.footprint(20).unwrap();
        assert_eq!(footprint.blocks, BlockCount { full: 3, lean: 2 });
        assert_eq!((footprint.tokens, footprint.dense_bytes), (20, 20 * 64));
        assert_eq!(footprint.bytes, 3 * 4 * 64 + 2 * 4 * 48);
        assert_eq!(footprint.whole_kv_ratio(), Some(1152.0 / 1280.0));
        assert_eq!(planner.footprint(0).unwrap().whole_kv_ratio(), None);
    }
}
