//! Where elements, codes and scales lie in a slice: the host's side of `kernels/common.cuh`.

use leank_core::{
    CacheLayout, Dtype, HeadFormat, KvHead, Layer, LeanFormat,
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

/// Index of an element in its tile. Rows of a K tile are tokens and its columns channels; rows of
/// a V tile are channels and its columns tokens.
fn in_tile(row: usize, column: usize) -> usize {
    ((row % 8) * 4 + column % 8 / 2) * 8 + (row / 8 + column / 8 * 2) * 2 + column % 2
}

/// Byte offset of the step of a channel or token among the scales of 16.
fn in_scales(i: usize) -> usize {
    (i % 8 / 2 * 8 + i / 8 * 2 + i % 2) * 2
}

/// Where the code of a lane's element begins in its words, in bits.
fn in_words(i: usize, words: usize) -> usize {
    i / 2 % 2 * 8 + i % 2 * 16 + i / 4 * if words == 1 { 4 } else { 32 }
}

/// Words that a lane has of a tile of codes; 0 of plain elements.
fn words(format: LeanFormat) -> usize {
    match format {
        LeanFormat::Plain(_) => 0,
        format => format.bits() / 4,
    }
}

/// Number of a kind of codes in kernels.
fn kind(format: LeanFormat) -> u8 {
    match format {
        LeanFormat::Int4 => 1,
        LeanFormat::Int8 => 2,
        LeanFormat::Fp8 => 3,
        _ => 0,
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
    format: HeadFormat,
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
            // Of all plain types alike.
            let format = HeadFormat::plain(Dtype::F16);
            return Some(Self { offset, k_tiles, v_tiles, format });
        }
        let head = &layout.layer(layer).lean[head.0];
        let (offset, k_tiles) = (head.k_offset, head.stored / TILE);
        (head.kept > 0).then_some(Self { offset, k_tiles, v_tiles, format: head.format })
    }

    /// What kernels know of a live head, without what the mask says; `slices`: of a block.
    pub(crate) fn record(&self, slices: usize) -> Head {
        let fits = |unit: &usize| {
            let bytes = self.k_scale_bytes() + unit * self.slice_bytes();
            slices.is_multiple_of(*unit) && bytes <= 2 * self.v_tiles * TILE_BYTES
        };
        let HeadFormat { k, v } = self.format;
        let coded = kind(k) + kind(v) > 0;
        let unit = if coded { [4, 2].into_iter().find(fits).unwrap_or(1) } else { 1 };
        Head {
            offset: self.offset as u32,
            kept: 0,
            k_codes: kind(k),
            v_codes: kind(v),
            tiles: self.k_tiles as u16,
            unit: unit as u16,
            channels: 0,
        }
    }

    /// Scales of K, before the slices.
    fn k_scale_bytes(&self) -> usize {
        if words(self.format.k) > 0 { self.k_tiles * SECTION } else { 0 }
    }

    fn tile_bytes(format: LeanFormat) -> usize {
        match words(format) {
            0 => TILE_BYTES,
            words => words * CODE_BYTES,
        }
    }

    fn k_bytes(&self) -> usize {
        self.k_tiles * Self::tile_bytes(self.format.k)
    }

    fn v_bytes(&self) -> usize {
        self.v_tiles * Self::tile_bytes(self.format.v)
    }

    /// Tiles of V that share scales.
    fn group_tiles(&self) -> usize {
        if self.format.v == LeanFormat::Int4 { INT4_GROUP / TILE } else { self.v_tiles }
    }

    fn slice_bytes(&self) -> usize {
        let coded = words(self.format.v) > 0;
        let groups = if coded { self.v_tiles.div_ceil(self.group_tiles()) } else { 0 };
        self.k_bytes() + self.v_bytes() + groups * SECTION
    }

    fn slice(&self, token: usize) -> usize {
        self.offset + self.k_scale_bytes() + token / TILE * self.slice_bytes()
    }

    /// Byte offset in the block of the tile with a token and a channel, and the index in it.
    fn tile(&self, tensor: Tensor, token: usize, channel: usize) -> (usize, usize) {
        let (before, index) = match tensor {
            Tensor::K => (0, in_tile(token % TILE, channel % TILE)),
            Tensor::V => (self.k_bytes(), in_tile(channel % TILE, token % TILE)),
        };
        let tile = channel / TILE * Self::tile_bytes(self.format.of(tensor));
        (self.slice(token) + before + tile, index)
    }

    /// Byte offset in the block of the plain element at a token and a channel (of K: as stored).
    pub(crate) fn element(&self, tensor: Tensor, token: usize, channel: usize) -> usize {
        let (tile, index) = self.tile(tensor, token, channel);
        tile + index * 2
    }

    /// Places of the code at a token and a channel (of K: as stored).
    pub(crate) fn code(&self, tensor: Tensor, token: usize, channel: usize) -> CodePlace {
        let words = words(self.format.of(tensor));
        let (tile, index) = self.tile(tensor, token, channel);
        let (lane, i) = (index / 8, index % 8);
        CodePlace { bit: (tile + lane * 4 * words) * 8 + in_words(i, words), bits: 4 * words }
    }

    /// Places of the scale of a token and a channel (of K: as stored).
    pub(crate) fn scale(&self, tensor: Tensor, token: usize, channel: usize) -> ScalePlace {
        let (section, i) = match tensor {
            Tensor::K => (self.offset + channel / TILE * SECTION, channel),
            Tensor::V => {
                let group = channel / TILE / self.group_tiles();
                (self.slice(token) + self.k_bytes() + self.v_bytes() + group * SECTION, token)
            }
        };
        let step = section + in_scales(i % TILE);
        ScalePlace { step, zero: step + 8 }
    }
}

/// Where a code lies in a block: it begins at this bit, of bytes from their lowest bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodePlace {
    bit: usize,
    bits: usize,
}

impl CodePlace {
    /// The bits of a code.
    fn mask(self) -> u8 {
        u8::MAX >> (8 - self.bits)
    }

    pub(crate) fn get(self, block: &[u8]) -> u8 {
        block[self.bit / 8] >> (self.bit % 8) & self.mask()
    }

    /// Puts the lower bits of `code`, as many as codes have, where none was put before.
    pub(crate) fn put(self, block: &mut [u8], code: u8) {
        block[self.bit / 8] |= (code & self.mask()) << (self.bit % 8);
    }
}

/// Where the halves of a scale lie. Zeros are sign and magnitude there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScalePlace {
    step: usize,
    zero: usize,
}

impl ScalePlace {
    pub(crate) fn get(self, block: &[u8]) -> Scale {
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let magnitude = (half(self.zero) & 0x7fff).cast_signed();
        let zero = if half(self.zero) >> 15 == 1 { -magnitude } else { magnitude };
        Scale::from_bits(u32::from(half(self.step)) | u32::from(zero.cast_unsigned()) << 16)
    }

    pub(crate) fn put(self, block: &mut [u8], scale: Scale) {
        let zero = (scale.to_bits() >> 16) as u16;
        let sign = zero & 0x8000;
        let zero = sign | zero.cast_signed().unsigned_abs() & 0x7fff;
        block[self.step..self.step + 2].copy_from_slice(&scale.to_bits().to_le_bytes()[..2]);
        block[self.zero..self.zero + 2].copy_from_slice(&zero.to_le_bytes());
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

    /// The masks of `operand` in `attend.cu` take what belongs to a register from a lane's words.
    #[test]
    fn masked_words_are_operands() {
        for (words, i) in [1, 2].into_iter().flat_map(|words| (0..8).map(move |i| (words, i))) {
            let code: u8 = if words == 1 { 0xd } else { 0xa5 };
            let mut lane = [0; 8];
            CodePlace { bit: in_words(i, words), bits: 4 * words }.put(&mut lane, code);
            let word = |word: usize| u32::from_le_bytes(*lane[4 * word..].first_chunk().unwrap());
            let (low, high, bytes) = (0x000f_000f, 0x00f0_00f0, 0x00ff_00ff);
            let registers = match words {
                1 => [word(0) & low, word(0) >> 8 & low, word(0) & high, word(0) >> 8 & high],
                _ => [word(0) & bytes, word(0) >> 8 & bytes, word(1) & bytes, word(1) >> 8 & bytes],
            };
            let sixteen = if words == 1 && i >= 4 { 16 } else { 1 };
            let mut expected = [0; 4];
            expected[i / 2] = (u32::from(code) * sixteen) << (i % 2 * 16);
            assert_eq!(registers, expected, "{words} {i}");
        }
    }

    /// Of every format: each byte belongs to one element, code or scale, and none to nobody.
    #[test]
    fn a_block_holds_each_code_and_scale_once() {
        let plain = LeanFormat::Plain(Dtype::F16);
        let formats = [plain, LeanFormat::Int8, LeanFormat::Int4, LeanFormat::Fp8];
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
                                assert_eq!(scale.get(&bytes).to_bits(), 0);
                                // Of all bits, with the zero as it lies there.
                                let all = Scale::from_bits(0x8001_ffff);
                                scale.put(&mut bytes, all);
                                assert_eq!(scale.get(&bytes), all);
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
        let unit = |kept, format, slices| {
            let format = HeadFormat { k: format, v: format };
            let place = HeadPlace { offset: 0, k_tiles: kept / TILE, v_tiles: 8, format };
            place.record(slices).unit
        };
        let (four, eight, plain) =
            (LeanFormat::Int4, LeanFormat::Int8, LeanFormat::Plain(Dtype::F16));
        assert_eq!((unit(48, four, 4), unit(48, eight, 4), unit(128, eight, 4)), (4, 2, 1));
        assert_eq!((unit(48, four, 2), unit(48, four, 3), unit(48, plain, 4)), (2, 1, 1));
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
