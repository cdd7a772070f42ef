//! Where elements lie in a slice: the host's side of `kernels/common.cuh`.

use leank_core::{CacheLayout, KvHead, Layer, saved::Tensor};

/// Tokens and channels of a tile.
pub(crate) const TILE: usize = 16;
/// Bytes of a tile of 16-bit elements.
pub(crate) const TILE_BYTES: usize = TILE * TILE * 2;

/// Index of an element in its tile. Rows of a K tile are tokens and its columns channels; rows of
/// a V tile are channels and its columns tokens.
fn in_tile(row: usize, column: usize) -> usize {
    ((row % 8) * 4 + column % 8 / 2) * 8 + (row / 8 + column / 8 * 2) * 2 + column % 2
}

/// K and V of one head in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeadPlace {
    /// Byte offset in the block.
    pub(crate) offset: usize,
    /// Tiles across the channels of K.
    k_tiles: usize,
    /// Tiles across the channels of V.
    v_tiles: usize,
}

impl HeadPlace {
    /// `None` for a dead head in a lean block.
    pub(crate) fn of(
        layout: &CacheLayout,
        head_dim: usize,
        (layer, head): (Layer, KvHead),
        lean: bool,
    ) -> Option<Self> {
        let v_tiles = head_dim.div_ceil(TILE);
        if !lean {
            let k_tiles = layout.full_channels / TILE;
            return Some(Self { offset: layout.full_k_offset(head), k_tiles, v_tiles });
        }
        let head = &layout.layer(layer).lean[head.0];
        let place = Self { offset: head.k_offset, k_tiles: head.stored / TILE, v_tiles };
        (head.kept > 0).then_some(place)
    }

    /// Byte offset in the block of the element at a token and a channel (of K: as stored).
    pub(crate) fn element(&self, tensor: Tensor, token: usize, channel: usize) -> usize {
        let slice = token / TILE * (self.k_tiles + self.v_tiles);
        let (tile, index) = match tensor {
            Tensor::K => (channel / TILE, in_tile(token % TILE, channel % TILE)),
            Tensor::V => (self.k_tiles + channel / TILE, in_tile(channel % TILE, token % TILE)),
        };
        self.offset + (slice + tile) * TILE_BYTES + index * 2
    }
}

#[cfg(test)]
mod tests {
    use leank_core::{CacheConfig, ChannelMask, ModelMask, ModelShape};

    use super::*;
    use crate::layout_rules;

    #[test]
    fn a_tile_holds_each_element_once() {
        let mut seen = [false; TILE * TILE];
        for row in 0..TILE {
            for column in 0..TILE {
                assert!(!std::mem::replace(&mut seen[in_tile(row, column)], true));
            }
        }
    }

    /// The A operand of mma.m16n8k16 as the PTX manual has it: register `i / 2`, element `i % 2`.
    #[test]
    fn lanes_hold_what_the_matrix_instruction_wants() {
        for lane in 0..32 {
            for i in 0..8 {
                let row = lane / 4 + if matches!(i, 0 | 1 | 4 | 5) { 0 } else { 8 };
                let column = lane % 4 * 2 + i % 2 + if i < 4 { 0 } else { 8 };
                assert_eq!(in_tile(row, column), lane * 8 + i);
            }
        }
    }

    #[test]
    fn a_block_holds_each_element_once() {
        let shape = ModelShape::new(1, 3, 3, 40).unwrap();
        let heads = [vec![1, 4, 39], vec![], (0..40).collect()];
        let heads = heads.map(|kept| ChannelMask::new(40, kept).unwrap());
        let mask = ModelMask::new(1, 3, 40, heads.to_vec()).unwrap();
        for block in [16, 24, 64] {
            let config = CacheConfig { block, ..CacheConfig::new(shape, mask.clone()).unwrap() };
            let layout = CacheLayout::new(&config, layout_rules()).unwrap();
            for lean in [false, true] {
                let bytes =
                    if lean { layout.layer(Layer(0)).lean_bytes } else { layout.full_bytes };
                let mut seen = vec![false; bytes / 2];
                for head in (0..3).map(KvHead) {
                    let place = HeadPlace::of(&layout, 40, (Layer(0), head), lean);
                    let kept = if lean { [3, 0, 40][head.0] } else { 40 };
                    assert_eq!(place.is_none(), kept == 0);
                    let Some(place) = place else { continue };
                    for token in 0..block {
                        for (tensor, channels) in [(Tensor::K, kept), (Tensor::V, 40)] {
                            for channel in 0..channels {
                                let at = place.element(tensor, token, channel) / 2;
                                assert!(!std::mem::replace(&mut seen[at], true));
                            }
                        }
                    }
                }
            }
        }
    }
}
