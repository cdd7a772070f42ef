//! Plain rows of a block, for sequences on disk.

use leank_core::{
    Block, CacheConfig, CacheLayout, LeanFormat, Result,
    quant::Scale,
    saved::{BlockStore, Rows, Tensor},
};

use crate::{
    codes::{CodeRows, Codes, CodesMut},
    element::{Element as _, with_element},
    kernel::Portable,
    panels::{HeadPlace, PANEL, Section, index},
    store::Store,
};

/// Where the elements of some rows lie in their head's part of a block.
fn section(config: &CacheConfig, layout: &CacheLayout, rows: &Rows) -> Option<Section> {
    let place = HeadPlace::of(config, layout, (rows.layer, rows.head), rows.block)?;
    Some(match rows.tensor {
        Tensor::K => place.k,
        Tensor::V => place.v,
    })
}

/// Copies rows of a block that has storage to `bytes`.
pub(crate) fn read_rows(
    store: &Store,
    config: &CacheConfig,
    layout: &CacheLayout,
    rows: &Rows,
    bytes: &mut [u8],
) {
    let Some(section) = section(config, layout, rows) else { return };
    let from = store.head(rows.layer, rows.block, rows.head);
    let LeanFormat::Plain(dtype) = section.format else {
        return read_codes(section.of(from).codes(), rows, bytes);
    };
    with_element!(dtype, T => {
        let from = section.of(from).panels::<T>();
        for (i, to) in bytes.chunks_exact_mut(size_of::<T>()).enumerate() {
            let (token, channel) = (i / rows.channels, i % rows.channels);
            let (row, lane) = rows.tensor.by_row(token, channel);
            let x = from.data[index::<T>(from.depth, from.lanes, row, lane)];
            x.put_le(to);
        }
    });
}

/// Copies scales and codes to `bytes`.
fn read_codes(from: Codes<'_>, rows: &Rows, bytes: &mut [u8]) {
    let (to_scales, to_codes) = bytes.split_at_mut(rows.scale_bytes());
    let mut to_scales = to_scales.as_chunks_mut::<{ Scale::BYTES }>().0.iter_mut();
    let (mut scales, mut codes, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..rows.tensor.by_row(rows.tokens, rows.channels).0 {
        from.row(row, &mut scales, &mut codes);
        let both = scales.iter().zip(to_scales.by_ref());
        both.for_each(|(scale, to)| *to = scale.to_bits().to_le_bytes());
        all.extend_from_slice(&codes);
    }
    // Where codes are halves of bytes, the first one of two is the lower half.
    let per_byte = 8 / rows.format.bits();
    for (to, codes) in to_codes.iter_mut().zip(all.chunks(per_byte)) {
        *to = codes.iter().rev().fold(0, |byte, code| byte << (4 * (per_byte - 1)) | code);
    }
}

/// Rows of scales and codes from a stream.
struct Stored<'a> {
    /// Little-endian, row by row.
    scales: &'a [[u8; Scale::BYTES]],
    codes: Vec<u8>,
    width: usize,
    /// Lanes that share a scale.
    lanes: usize,
}

impl CodeRows for Stored<'_> {
    fn group(&mut self, row: usize, group: usize, codes: &mut [u8]) -> Scale {
        let Self { width, lanes, .. } = *self;
        codes.copy_from_slice(&self.codes[row * width + group * lanes..][..codes.len()]);
        Scale::from_bits(u32::from_le_bytes(self.scales[row * width.div_ceil(lanes) + group]))
    }
}

/// Copies scales and codes from `bytes`.
fn write_codes(mut to: CodesMut<'_>, rows: &Rows, bytes: &[u8]) {
    let (scales, codes) = bytes.split_at(rows.scale_bytes());
    let halves = codes.iter().flat_map(|byte| [byte & 15, byte >> 4]);
    let codes = if rows.format.bits() == 4 { halves.collect() } else { codes.to_vec() };
    let (count, width) = rows.tensor.by_row(rows.tokens, rows.channels);
    let (scales, _) = scales.as_chunks();
    let stored = Stored { scales, codes, width, lanes: to.shape.group };
    to.write(count, &mut Vec::new(), stored);
}

/// The blocks of a cache, to be filled from a saved sequence.
pub(crate) struct Restoring<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
}

impl BlockStore for Restoring<'_> {
    fn allocate(&mut self, block: Block) -> Result<()> {
        self.store.allocate(block)
    }

    fn free(&mut self, block: Block) {
        self.store.free(block);
    }

    fn write_rows(&mut self, rows: &Rows, bytes: &[u8]) -> Result<()> {
        let Some(section) = section(self.config, self.layout, rows) else { return Ok(()) };
        let to = self.store.head_mut(rows.layer, rows.block, rows.head);
        let LeanFormat::Plain(dtype) = section.format else {
            write_codes(section.codes_mut(to), rows, bytes);
            return Ok(());
        };
        with_element!(dtype, T => {
            let mut to = section.panels_mut::<T>(to);
            let width = match rows.tensor {
                Tensor::K => to.depth,
                Tensor::V => to.lanes,
            };
            let mut stored = vec![0.0f32; PANEL.min(rows.tokens) * width];
            let stored: &mut [T] = bytemuck::cast_slice_mut(&mut stored);
            let size = rows.channels * size_of::<T>();
            for (i, bytes) in bytes.chunks(PANEL * size).enumerate() {
                let tokens = bytes.chunks_exact(size);
                let stored = &mut stored[..tokens.len() * width];
                for (row, bytes) in stored.chunks_exact_mut(width).zip(tokens) {
                    let elements = bytes.chunks_exact(size_of::<T>()).map(T::from_le);
                    row.iter_mut().zip(elements).for_each(|(to, x)| *to = x);
                }
                match rows.tensor {
                    Tensor::K => to.write_lanes(Portable, i * PANEL, stored),
                    Tensor::V => to.write_rows(i * PANEL, stored),
                }
            }
        });
        Ok(())
    }
}
