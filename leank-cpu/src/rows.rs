//! Plain rows of a block, for sequences on disk.

use leank_core::{
    Block, CacheLayout, Dtype, Result,
    saved::{BlockStore, Rows, Tensor},
};

use crate::{
    element::{Element as _, plain, with_element},
    panels::index,
    store::Store,
    write::{elements, panels_mut},
};

/// Where the elements of some rows lie in their head's part of a block.
struct Place {
    offset: usize,
    depth: usize,
    lanes: usize,
    dtype: Dtype,
}

impl Place {
    fn of(layout: &CacheLayout, rows: &Rows) -> Self {
        let lean = layout.layer(rows.layer).lean[rows.head.0];
        let is_lean = matches!(rows.block, Block::Lean(_));
        let dtype = plain(rows.format);
        match rows.tensor {
            Tensor::K => {
                let depth = if is_lean { lean.stored } else { layout.full_channels };
                Self { offset: 0, depth, lanes: layout.block, dtype }
            }
            Tensor::V => {
                let offset = if is_lean {
                    lean.v_offset - lean.k_offset
                } else {
                    layout.full_v_offset(rows.head) - layout.full_k_offset(rows.head)
                };
                Self { offset, depth: layout.stored_tokens, lanes: rows.channels, dtype }
            }
        }
    }
}

/// Copies rows of a block that has storage to `bytes`.
pub(crate) fn read_rows(store: &Store, layout: &CacheLayout, rows: &Rows, bytes: &mut [u8]) {
    let place = Place::of(layout, rows);
    let from = store.head(rows.layer, rows.block, rows.head);
    with_element!(place.dtype, T => {
        let from = elements::<T>(from, place.offset, place.depth * place.lanes);
        for (i, to) in bytes.chunks_exact_mut(size_of::<T>()).enumerate() {
            let (token, channel) = (i / rows.channels, i % rows.channels);
            let (row, lane) = match rows.tensor {
                Tensor::K => (channel, token),
                Tensor::V => (token, channel),
            };
            let x = from[index::<T>(place.depth, place.lanes, row, lane)];
            x.put_le(to);
        }
    });
}

/// The blocks of a cache, to be filled from a saved sequence.
pub(crate) struct Restoring<'a> {
    pub(crate) store: &'a mut Store,
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
        let place = Place::of(self.layout, rows);
        let to = self.store.head_mut(rows.layer, rows.block, rows.head);
        with_element!(place.dtype, T => {
            let mut to = panels_mut::<T>(to, place.offset, place.depth, place.lanes);
            let size = size_of::<T>();
            for (token, row) in bytes.chunks_exact(rows.channels * size).enumerate() {
                let values = row.chunks_exact(size).map(T::from_le);
                match rows.tensor {
                    Tensor::K => to.write_lane(token, values),
                    Tensor::V => to.write_row(token, values),
                }
            }
        });
        Ok(())
    }
}
