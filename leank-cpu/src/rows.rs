//! Plain rows of a block, for sequences on disk.

use leank_core::{
    Block, CacheConfig, CacheLayout, Result,
    saved::{BlockStore, Rows, Tensor},
};

use crate::{
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
    with_element!(section.dtype, T => {
        let from = section.of(from).panels::<T>();
        for (i, to) in bytes.chunks_exact_mut(size_of::<T>()).enumerate() {
            let (token, channel) = (i / rows.channels, i % rows.channels);
            let (row, lane) = match rows.tensor {
                Tensor::K => (channel, token),
                Tensor::V => (token, channel),
            };
            let x = from.data[index::<T>(from.depth, from.lanes, row, lane)];
            x.put_le(to);
        }
    });
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
        with_element!(section.dtype, T => {
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
