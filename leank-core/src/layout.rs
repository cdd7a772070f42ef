//! Where things lie inside a block, in bytes: the single source of every size that the planner
//! predicts, the ledger counts and the backends allocate.

use crate::{CacheConfig, HeadFormat, KvHead, Layer, LeanFormat, Result, Tensor};

/// What a backend asks of block layouts. The padding it causes is counted in every size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayoutRules {
    /// Stored channels of K per live head are a multiple of this.
    pub k_channel_multiple: usize,
    /// Stored tokens of K per block are a multiple of this.
    pub k_token_multiple: usize,
    /// Stored channels of V per live head are a multiple of this.
    pub v_channel_multiple: usize,
    /// Stored tokens of V per block are a multiple of this.
    pub v_token_multiple: usize,
    /// K and V of each head start at a multiple of this many bytes.
    pub section_align: usize,
}

impl LayoutRules {
    /// No padding at all.
    pub const PACKED: Self = Self {
        k_channel_multiple: 1,
        k_token_multiple: 1,
        v_channel_multiple: 1,
        v_token_multiple: 1,
        section_align: 1,
    };

    /// Where K and V of a head lie in a lean block when the head begins at byte `offset`, and where the
    /// head ends. `format` is not looked at for a dead head, which has neither.
    fn lean_head(self, offset: usize, head: Head) -> (LeanHead, usize) {
        let Head { block, head_dim, kept, format } = head;
        let align = |bytes: usize| bytes.next_multiple_of(self.section_align);
        let rows = |rows: usize, format: LeanFormat| match format {
            LeanFormat::Plain(_) => rows,
            _ => rows.next_multiple_of(CODE_ROWS),
        };
        let stored = rows(kept.next_multiple_of(self.k_channel_multiple), format.k);
        let stored_tokens = rows(block.next_multiple_of(self.v_token_multiple), format.v);
        let k_tokens = block.next_multiple_of(self.k_token_multiple);
        let v_offset = offset + align(format.k.bytes(Tensor::K, k_tokens, stored));
        let v_channels =
            if kept == 0 { 0 } else { head_dim.next_multiple_of(self.v_channel_multiple) };
        let end = v_offset + align(format.v.bytes(Tensor::V, stored_tokens, v_channels));
        (LeanHead { kept, stored, stored_tokens, k_offset: offset, v_offset, format }, end)
    }

    /// Bytes of a head that keeps `kept` channels in a lean block of `block` tokens: codes, scales and
    /// padding; 0 for a dead head.
    #[must_use]
    pub fn lean_head_bytes(
        self,
        block: usize,
        head_dim: usize,
        kept: usize,
        format: HeadFormat,
    ) -> usize {
        self.lean_head(0, Head { block, head_dim, kept, format }).1
    }
}

/// What decides the bytes of a head in a lean block.
struct Head {
    block: usize,
    head_dim: usize,
    kept: usize,
    format: HeadFormat,
}

/// Channels of K and tokens of V that are stored as codes are a multiple of this: kernels take so many
/// of a lane at a time.
const CODE_ROWS: usize = 8;

/// One KV head inside a lean block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeanHead {
    /// Kept channels.
    pub kept: usize,
    /// Stored channels: `kept` padded to [`LayoutRules::k_channel_multiple`], and to a multiple of 8
    /// where K is codes.
    pub stored: usize,
    /// Stored tokens of V: the block padded to [`LayoutRules::v_token_multiple`], and to a multiple of
    /// 8 where V is codes.
    pub stored_tokens: usize,
    /// Byte offset of K. A dead head has no K and no V.
    pub k_offset: usize,
    /// Byte offset of V.
    pub v_offset: usize,
    /// Storage formats.
    pub format: HeadFormat,
}

/// Block layouts of one layer.
#[derive(Clone, Debug)]
pub struct LayerLayout {
    /// Bytes of a lean block; 0 where every head is dead.
    pub lean_bytes: usize,
    /// Heads inside a lean block.
    pub lean: Vec<LeanHead>,
}

impl LayerLayout {
    /// Bytes of K and V of a head in a lean block.
    ///
    /// # Panics
    /// When the index is out of range.
    #[must_use]
    pub fn lean_head_bytes(&self, head: KvHead) -> usize {
        let end = self.lean.get(head.0 + 1).map_or(self.lean_bytes, |next| next.k_offset);
        end - self.lean[head.0].k_offset
    }
}

/// Block layouts of a whole cache.
#[derive(Clone, Debug)]
pub struct CacheLayout {
    /// Tokens per block.
    pub block: usize,
    /// Stored channels of K of one head in a full block: `head_dim` padded to
    /// [`LayoutRules::k_channel_multiple`].
    pub full_channels: usize,
    /// Stored tokens of V in a full block: `block` padded to [`LayoutRules::v_token_multiple`].
    pub stored_tokens: usize,
    /// Bytes of a full block of one layer: per head K, then V.
    pub full_bytes: usize,
    /// Bytes that a dense cache takes per token, all layers, no padding.
    pub dense_token_bytes: usize,
    full_k_section: usize,
    full_v_section: usize,
    layers: Vec<LayerLayout>,
}

impl CacheLayout {
    /// The layout of a cache under a backend's rules.
    ///
    /// # Errors
    /// As [`CacheConfig::validate`].
    pub fn new(config: &CacheConfig, rules: LayoutRules) -> Result<Self> {
        config.validate()?;
        let shape = config.shape;
        let element = config.dtype.bytes();
        let align = |bytes: usize| bytes.next_multiple_of(rules.section_align);
        let full_channels = shape.head_dim.next_multiple_of(rules.k_channel_multiple);
        let k_tokens = config.block.next_multiple_of(rules.k_token_multiple);
        let stored_tokens = config.block.next_multiple_of(rules.v_token_multiple);
        let stored_v_channels = shape.head_dim.next_multiple_of(rules.v_channel_multiple);
        let full_k_section = align(k_tokens * full_channels * element);
        let full_v_section = align(stored_tokens * stored_v_channels * element);
        let layers = shape.layer_indices().map(|layer| {
            let mut offset = 0;
            let lean = shape.kv_head_indices().map(|head| {
                let kept = config.mask.head(layer, head).kept_count();
                let format = config.format(layer, head);
                let own = Head { block: config.block, head_dim: shape.head_dim, kept, format };
                let (lean, end) = rules.lean_head(offset, own);
                offset = end;
                lean
            });
            let lean = lean.collect();
            LayerLayout { lean, lean_bytes: offset }
        });
        Ok(Self {
            block: config.block,
            full_channels,
            stored_tokens,
            full_bytes: shape.kv_heads * (full_k_section + full_v_section),
            dense_token_bytes: 2 * shape.layers * shape.kv_heads * shape.head_dim * element,
            full_k_section,
            full_v_section,
            layers: layers.collect(),
        })
    }

    /// Block layouts of one layer.
    ///
    /// # Panics
    /// When the index is out of range.
    #[must_use]
    pub fn layer(&self, layer: Layer) -> &LayerLayout {
        &self.layers[layer.0]
    }

    /// Byte offset of K of a head in a full block.
    #[must_use]
    pub fn full_k_offset(&self, head: KvHead) -> usize {
        head.0 * self.full_head_bytes()
    }

    /// Byte offset of V of a head in a full block.
    #[must_use]
    pub fn full_v_offset(&self, head: KvHead) -> usize {
        self.full_k_offset(head) + self.full_k_section
    }

    /// Bytes of K and V of a head in a full block.
    #[must_use]
    pub fn full_head_bytes(&self) -> usize {
        self.full_k_section + self.full_v_section
    }

    /// Bytes of a full block, all layers.
    #[must_use]
    pub fn full_bytes_all_layers(&self) -> u64 {
        self.full_bytes as u64 * self.layers.len() as u64
    }

    /// Bytes of a lean block, all layers.
    #[must_use]
    pub fn lean_bytes_all_layers(&self) -> u64 {
        self.layers.iter().map(|layer| layer.lean_bytes as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ChannelMask, Dtype, ModelMask, ModelShape};

    fn rules() -> impl Strategy<Value = LayoutRules> {
        (1usize..6, 1usize..6, 1usize..6, 1usize..6, 1usize..65).prop_map(
            |(kc, kt, vc, vt, align)| LayoutRules {
                k_channel_multiple: kc,
                k_token_multiple: kt,
                v_channel_multiple: vc,
                v_token_multiple: vt,
                section_align: align,
            },
        )
    }

    proptest! {
        /// Sections lie one behind the other, aligned, each with room for its rows and less than one more
        /// step of every padding.
        #[test]
        fn sections_tile_a_block(
            rules in rules(),
            block in 1usize..70,
            head_dim in 1usize..40,
            kept in prop::collection::vec(0usize..41, 6),
            formats in prop::collection::vec(prop::sample::select(LeanFormat::ALL.to_vec()), 12),
            dtype in prop::sample::select(Dtype::ALL.to_vec()),
        ) {
            let shape = ModelShape::new(2, 3, 3, head_dim).unwrap();
            let mask = |&n: &usize| ChannelMask::new(head_dim, (0..n.min(head_dim) as u16).collect());
            let heads = kept.iter().map(|n| mask(n).unwrap()).collect();
            let mask = ModelMask::new(2, 3, head_dim, heads).unwrap();
            let formats: Vec<_> =
                formats.chunks(2).map(|pair| HeadFormat { k: pair[0], v: pair[1] }).collect();
            let config = CacheConfig {
                block,
                dtype,
                formats: Some(formats.clone()),
                ..CacheConfig::new(shape, mask).unwrap()
            };
            let layout = CacheLayout::new(&config, rules).unwrap();
            let pad = |n: usize, to: usize| n.div_ceil(to) * to;
            let section = |bytes: usize| pad(bytes, rules.section_align);
            let k_tokens = pad(block, rules.k_token_multiple);
            let v_tokens = pad(block, rules.v_token_multiple);
            let v_channels = pad(head_dim, rules.v_channel_multiple);

            prop_assert_eq!(layout.full_channels, pad(head_dim, rules.k_channel_multiple));
            prop_assert_eq!(layout.stored_tokens, v_tokens);
            let mut end = 0;
            for head in shape.kv_head_indices() {
                prop_assert_eq!(layout.full_k_offset(head), end);
                let v = end + section(k_tokens * layout.full_channels * dtype.bytes());
                prop_assert_eq!(layout.full_v_offset(head), v);
                end = v + section(v_tokens * v_channels * dtype.bytes());
                prop_assert_eq!(layout.full_head_bytes() * (head.0 + 1), end);
            }
            prop_assert_eq!(layout.full_bytes, end);
            prop_assert_eq!(layout.full_bytes_all_layers(), 2 * end as u64);
            prop_assert_eq!(layout.dense_token_bytes, 2 * 6 * head_dim * dtype.bytes());

            let mut all_layers = 0;
            for layer in shape.layer_indices() {
                let of_layer = layout.layer(layer);
                let mut end = 0;
                for head in shape.kv_head_indices() {
                    let lean = of_layer.lean[head.0];
                    let kept = config.mask.head(layer, head).kept_count();
                    let format = formats[layer.0 * 3 + head.0];
                    let codes = |rows: usize, format| {
                        if matches!(format, LeanFormat::Plain(_)) { rows } else { pad(rows, 8) }
                    };
                    let stored = codes(pad(kept, rules.k_channel_multiple), format.k);
                    let stored_tokens = codes(v_tokens, format.v);
                    let v_channels = if kept == 0 { 0 } else { v_channels };
                    let k_bytes = section(format.k.bytes(Tensor::K, k_tokens, stored));
                    let v_bytes = section(format.v.bytes(Tensor::V, stored_tokens, v_channels));
                    let (k_offset, v_offset) = (end, end + k_bytes);
                    prop_assert_eq!(
                        lean,
                        LeanHead { kept, stored, stored_tokens, k_offset, v_offset, format }
                    );
                    prop_assert_eq!(of_layer.lean_head_bytes(head), k_bytes + v_bytes);
                    let alone = rules.lean_head_bytes(block, head_dim, kept, format);
                    prop_assert_eq!(alone, k_bytes + v_bytes);
                    prop_assert!(kept > 0 || alone == 0, "nothing of a dead head is stored");
                    end = v_offset + v_bytes;
                }
                prop_assert_eq!(of_layer.lean_bytes, end);
                all_layers += end as u64;
            }
            prop_assert_eq!(layout.lean_bytes_all_layers(), all_layers);
        }
    }
}
