//! Where elements, codes and scales lie in a slice: the host's side of `kernels/common.cuh`.

use leank_core::{
    CacheLayout, HeadFormat, KvHead, Layer, LeanFormat,
    quant::{INT4_GROUP, Scale},
    saved::Tensor,
};

use crate::records::Head;

/// Tokens and channels of a tile.
pub(crate) const TILE: usize = 16;
/// Bytes of a tile of 16-bit elements.
pub(crate) const TILE_BYTES: usize = TILE * TILE * 2;
/// Bytes of the scales of 16 channels of K, or of 16 tokens of a group of V; K and V of a head take a
/// multiple of it in every format.
pub(crate) const SECTION: usize = TILE * Scale::BYTES;
/// Bytes of a tile of codes of 4 bits.
const CODE_BYTES: usize = TILE * TILE / 2;
/// What is turned where scales lie on the device: the highest bit of the zero.
const TURNED: u32 = 1 << 31;

/// Index of an element in its tile. Rows of a K tile are tokens and its columns channels; rows of
/// a V tile are channels and its columns tokens.
fn in_tile(row: usize, column: usize) -> usize {
    ((row % 8) * 4 + column % 8 / 2) * 8 + (row / 8 + column / 8 * 2) * 2 + column % 2
}

/// Index of a scale among those of 16 channels or tokens, in the order of the lanes that want them.
fn in_scales(i: usize) -> usize {
    i % 8 / 2 * 4 + i / 8 * 2 + i % 2
}

/// Words that a lane has of a tile of codes; 0 of plain elements.
fn words(format: LeanFormat) -> usize {
    match format {
        LeanFormat::Plain(_) => 0,
        format => format.bits() / 4,
    }
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
    /// Words that a lane has of a tile of codes; 0: plain elements.
    k_words: usize,
    v_words: usize,
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
            let offset = layout.full_k_offset(head);
            return Some(Self { offset, k_tiles, v_tiles, k_words: 0, v_words: 0 });
        }
        let head = &layout.layer(layer).lean[head.0];
        let HeadFormat { k, v } = head.format;
        let place = Self {
            offset: head.k_offset,
            k_tiles: head.stored / TILE,
            v_tiles,
            k_words: words(k),
            v_words: words(v),
        };
        (head.kept > 0).then_some(place)
    }

    /// What kernels know of a live head, without what the mask says; `slices`: of a block.
    pub(crate) fn record(&self, slices: usize) -> Head {
        let fits = |unit: &usize| {
            let bytes = self.k_scale_bytes() + unit * self.slice_bytes();
            slices.is_multiple_of(*unit) && bytes <= 2 * self.v_tiles * TILE_BYTES
        };
        let coded = self.k_words + self.v_words > 0;
        let unit = if coded { [4, 2].into_iter().find(fits).unwrap_or(1) } else { 1 };
        Head {
            offset: self.offset as u32,
            kept: 0,
            k_words: self.k_words as u8,
            v_words: self.v_words as u8,
            tiles: self.k_tiles as u16,
            unit: unit as u16,
            channels: 0,
        }
    }

    /// Scales of K, before the slices.
    fn k_scale_bytes(&self) -> usize {
        if self.k_words > 0 { self.k_tiles * SECTION } else { 0 }
    }

    fn tile_bytes(words: usize) -> usize {
        if words > 0 { words * CODE_BYTES } else { TILE_BYTES }
    }

    fn k_bytes(&self) -> usize {
        self.k_tiles * Self::tile_bytes(self.k_words)
    }

    /// Tiles of V that share scales.
    fn group_tiles(&self) -> usize {
        if self.v_words == 1 { INT4_GROUP / TILE } else { self.v_tiles }
    }

    fn slice_bytes(&self) -> usize {
        let groups = if self.v_words > 0 { self.v_tiles.div_ceil(self.group_tiles()) } else { 0 };
        self.k_bytes() + self.v_tiles * Self::tile_bytes(self.v_words) + groups * SECTION
    }

    fn slice(&self, token: usize) -> usize {
        self.offset + self.k_scale_bytes() + token / TILE * self.slice_bytes()
    }

    /// Byte offset in the block of the tile with a token and a channel, and the index in it.
    fn tile(&self, tensor: Tensor, token: usize, channel: usize) -> (usize, usize) {
        let (before, words, index) = match tensor {
            Tensor::K => (0, self.k_words, in_tile(token % TILE, channel % TILE)),
            Tensor::V => (self.k_bytes(), self.v_words, in_tile(channel % TILE, token % TILE)),
        };
        (self.slice(token) + before + channel / TILE * Self::tile_bytes(words), index)
    }

    /// Byte offset in the block of the plain element at a token and a channel (of K: as stored).
    pub(crate) fn element(&self, tensor: Tensor, token: usize, channel: usize) -> usize {
        let (tile, index) = self.tile(tensor, token, channel);
        tile + index * 2
    }

    /// Places of the code at a token and a channel (of K: as stored).
    pub(crate) fn code(&self, tensor: Tensor, token: usize, channel: usize) -> CodePlace {
        let words = if tensor == Tensor::K { self.k_words } else { self.v_words };
        let (tile, index) = self.tile(tensor, token, channel);
        let (lane, i) = (index / 8, index % 8);
        let bit = (i / 2 * 4 + i % 2 * 16 + 3) % 32;
        CodePlace { at: tile + lane * 4 * words, words, bit: bit as u32 }
    }

    /// Places of the scale of a token and a channel (of K: as stored).
    pub(crate) fn scale(&self, tensor: Tensor, token: usize, channel: usize) -> ScalePlace {
        match tensor {
            Tensor::K => {
                let index = channel / TILE * TILE + in_scales(channel % TILE);
                let step = self.offset + index * Scale::BYTES;
                ScalePlace { step, zero: step + 2 }
            }
            Tensor::V => {
                let tiles = self.v_tiles * Self::tile_bytes(self.v_words);
                let group = channel / TILE / self.group_tiles();
                // Four steps of a lane, then their zeros.
                let index = in_scales(token % TILE);
                let own = index / 4 * SECTION / 4 + index % 4 * 2;
                let step = self.slice(token) + self.k_bytes() + tiles + group * SECTION + own;
                ScalePlace { step, zero: step + 8 }
            }
        }
    }
}

/// Where a code lies: its lower half in a word of 32 bits, its upper half in the next one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodePlace {
    at: usize,
    words: usize,
    bit: u32,
}

impl CodePlace {
    fn word(self, word: usize) -> std::ops::Range<usize> {
        self.at + word * 4..self.at + word * 4 + 4
    }

    pub(crate) fn get(self, block: &[u8]) -> u8 {
        let half = |word| {
            let bits = u32::from_le_bytes(block[self.word(word)].try_into().expect("4 bytes"));
            (bits.rotate_right(self.bit) & 15) << (4 * word)
        };
        (0..self.words).map(half).sum::<u32>() as u8
    }

    /// Puts a code where none was put before.
    pub(crate) fn put(self, block: &mut [u8], code: u8) {
        for word in 0..self.words {
            let half = (u32::from(code) >> (4 * word) & 15).rotate_left(self.bit);
            let bytes = &mut block[self.word(word)];
            bytes.iter_mut().zip(half.to_le_bytes()).for_each(|(byte, half)| *byte |= half);
        }
    }
}

/// Where the halves of a scale lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScalePlace {
    step: usize,
    zero: usize,
}

impl ScalePlace {
    pub(crate) fn get(self, block: &[u8]) -> Scale {
        let half = |at: usize| u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
        Scale::from_bits((half(self.step) | half(self.zero) << 16) ^ TURNED)
    }

    pub(crate) fn put(self, block: &mut [u8], scale: Scale) {
        let bytes = (scale.to_bits() ^ TURNED).to_le_bytes();
        block[self.step..self.step + 2].copy_from_slice(&bytes[..2]);
        block[self.zero..self.zero + 2].copy_from_slice(&bytes[2..]);
    }
}

#[cfg(test)]
mod tests {
    use leank_core::{CacheConfig, ChannelMask, Dtype, ModelMask, ModelShape};

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

    /// What of a tile is at bits 3 to 6 and 19 to 22 when its word is turned by 4 times `i` is register
    /// `i` of the operand.
    #[test]
    fn turned_words_are_operands() {
        for lane in 0..32 {
            for i in 0..8 {
                let place =
                    CodePlace { at: lane * 4, words: 1, bit: (i / 2 * 4 + i % 2 * 16 + 3) % 32 };
                let mut tile = [0; CODE_BYTES];
                place.put(&mut tile, 0xfd);
                assert_eq!(place.get(&tile), 0xd);
                let word = u32::from_le_bytes(tile[lane * 4..][..4].try_into().unwrap());
                assert_eq!(word.rotate_right(i / 2 * 4), 0xd << (3 + i % 2 * 16));
            }
        }
    }

    /// Of every format: each byte belongs to one element, code or scale, and none to nobody.
    #[test]
    fn a_block_holds_each_code_and_scale_once() {
        let formats = [LeanFormat::Plain(Dtype::F16), LeanFormat::Int8, LeanFormat::Int4];
        for (k, v) in formats.into_iter().flat_map(|k| formats.map(|v| (k, v))) {
            for (head_dim, block) in [(48, 64), (64, 16), (32, 32)] {
                let shape = ModelShape::new(1, 2, 2, head_dim).unwrap();
                let kept = ChannelMask::new(head_dim, (0..32).collect()).unwrap();
                let mask = ModelMask::new(1, 2, head_dim, vec![kept.clone(), kept]).unwrap();
                let formats = Some(vec![HeadFormat { k, v }; 2]);
                let config = CacheConfig::new(shape, mask).unwrap();
                let config = CacheConfig { block, formats, ..config };
                let layout = CacheLayout::new(&config, layout_rules()).unwrap();
                let mut bytes = vec![0; layout.layer(Layer(0)).lean_bytes];
                let mut put = 0;
                for head in (0..2).map(KvHead) {
                    let place = HeadPlace::of(&layout, head_dim, (Layer(0), head), true).unwrap();
                    for (tensor, format, channels) in [(Tensor::K, k, 32), (Tensor::V, v, head_dim)]
                    {
                        for (token, channel) in
                            (0..block).flat_map(|token| (0..channels).map(move |c| (token, c)))
                        {
                            let group = format.group(tensor);
                            let first = match tensor {
                                Tensor::K => token == 0,
                                Tensor::V => channel % group == 0,
                            };
                            if words(format) == 0 {
                                let at = place.element(tensor, token, channel);
                                assert_eq!(bytes[at..at + 2], [0, 0]);
                                bytes[at..at + 2].fill(0xff);
                                put += 2;
                                continue;
                            }
                            let code = place.code(tensor, token, channel);
                            assert_eq!(code.get(&bytes), 0);
                            code.put(&mut bytes, 0xff);
                            if first {
                                let scale = place.scale(tensor, token, channel);
                                assert_eq!(scale.get(&bytes).to_bits(), TURNED);
                                scale.put(&mut bytes, Scale::from_bits(!TURNED));
                                assert_eq!(scale.get(&bytes).to_bits(), !TURNED);
                                put += Scale::BYTES;
                            }
                        }
                        put += block * channels * format.bits() / 8 * words(format).min(1);
                    }
                }
                assert!(bytes.iter().all(|&byte| byte == 0xff), "{k} {v} {head_dim} {block}");
                assert_eq!(put, bytes.len());
            }
        }
    }

    #[test]
    fn units_are_whole_blocks_where_they_fit() {
        let unit = |kept, k_words, v_words, slices| {
            let place = HeadPlace { offset: 0, k_tiles: kept / TILE, v_tiles: 8, k_words, v_words };
            place.record(slices).unit
        };
        assert_eq!((unit(48, 1, 1, 4), unit(48, 2, 2, 4), unit(128, 2, 2, 4)), (4, 2, 1));
        assert_eq!((unit(48, 1, 1, 2), unit(48, 1, 1, 3), unit(48, 0, 0, 4)), (2, 1, 1));
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
