//! Into the blocks: new rows of K and V, and the packing of full blocks into lean ones.

use leank_core::{Block, CacheConfig, CacheLayout, Dtype, HostView, KvHead, Layer, StepSequence};

use crate::{
    element::{Element, plain, with_element},
    panels::{PanelsMut, index},
    store::Store,
};

/// Writes to the blocks of one layer.
pub(crate) struct LayerWriter<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) store: &'a mut Store,
    pub(crate) layer: Layer,
}

/// Where one token of one head lies.
#[derive(Clone, Copy)]
struct Slot {
    head: KvHead,
    block: Block,
    /// Index of the token in its block.
    token: usize,
}

impl LayerWriter<'_> {
    /// Writes the new tokens of one sequence to the blocks that `table` names. Values are stored
    /// as they are, rounded; rows that go straight to lean blocks are rounded to the type of full
    /// ones first, so that the road by which a token came does not show.
    pub(crate) fn append(
        &mut self,
        sequence: &StepSequence,
        table: &[Block],
        k: HostView<'_>,
        v: HostView<'_>,
    ) {
        let block = self.layout.block;
        let mut row = vec![0.0; self.config.shape.head_dim];
        for token in 0..sequence.tokens {
            let position = sequence.start + token;
            for head in self.config.shape.kv_head_indices() {
                let slot = Slot { head, block: table[position / block], token: position % block };
                k.read_row(sequence.row + token, head.0, &mut row);
                self.write_key(slot, &mut row);
                v.read_row(sequence.row + token, head.0, &mut row);
                self.write_value(slot, &mut row);
            }
        }
    }

    fn write_key(&mut self, slot: Slot, row: &mut [f32]) {
        let block = self.layout.block;
        match slot.block {
            Block::Full(_) => {
                let bytes = self.store.head_mut(self.layer, slot.block, slot.head);
                with_element!(self.config.dtype, T => {
                    let mut k = panels_mut::<T>(bytes, 0, self.layout.full_channels, block);
                    k.write_lane(slot.token, row.iter().map(|&x| T::narrow(x)));
                });
            }
            Block::Lean(_) => {
                let head = self.layout.layer(self.layer).lean[slot.head.0];
                if head.kept == 0 {
                    return;
                }
                let dtype = plain(head.format.k);
                self.round(dtype, row);
                let kept = self.config.mask.head(self.layer, slot.head).kept();
                let bytes = self.store.head_mut(self.layer, slot.block, slot.head);
                with_element!(dtype, T => {
                    let mut k = panels_mut::<T>(bytes, 0, head.stored, block);
                    let column = kept.iter().map(|&c| T::narrow(row[usize::from(c)]));
                    k.write_lane(slot.token, column);
                });
            }
        }
    }

    fn write_value(&mut self, slot: Slot, row: &mut [f32]) {
        let (dtype, offset) = match slot.block {
            Block::Full(_) => (self.config.dtype, self.full_v_offset(slot.head)),
            Block::Lean(_) => {
                let head = self.layout.layer(self.layer).lean[slot.head.0];
                if head.kept == 0 {
                    return;
                }
                let dtype = plain(head.format.v);
                self.round(dtype, row);
                (dtype, head.v_offset - head.k_offset)
            }
        };
        let depth = self.layout.stored_tokens;
        let bytes = self.store.head_mut(self.layer, slot.block, slot.head);
        with_element!(dtype, T => {
            let values = row.iter().map(|&x| T::narrow(x));
            panels_mut::<T>(bytes, offset, depth, row.len()).write_row(slot.token, values);
        });
    }

    /// Where V of a head in a full block begins, after its K.
    fn full_v_offset(&self, head: KvHead) -> usize {
        self.layout.full_v_offset(head) - self.layout.full_k_offset(head)
    }

    /// Rounds to the type of full blocks what will be rounded to `dtype`.
    fn round(&self, dtype: Dtype, row: &mut [f32]) {
        let full = self.config.dtype;
        if full != dtype {
            row.iter_mut().for_each(|x| *x = full.round(*x));
        }
    }

    /// Packs a full block into a lean one.
    pub(crate) fn pack(&mut self, full: u32, lean: u32) {
        let (block, head_dim) = (self.layout.block, self.config.shape.head_dim);
        let (channels, tokens) = (self.layout.full_channels, self.layout.stored_tokens);
        for head in self.config.shape.kv_head_indices() {
            let kept = self.config.mask.head(self.layer, head).kept();
            if kept.is_empty() {
                continue;
            }
            let packed = self.layout.layer(self.layer).lean[head.0];
            let v_offset = self.full_v_offset(head);
            let (from, to) = self.store.pack_pair(self.layer, (full, lean), head);
            with_element!(self.config.dtype, S => {
                let k = elements::<S>(from, 0, block * channels);
                let v = elements::<S>(from, v_offset, tokens * head_dim);
                with_element!(plain(packed.format.k), T => {
                    let out = panels_mut::<T>(to, 0, packed.stored, block);
                    gather(k, channels, kept, out);
                });
                with_element!(plain(packed.format.v), T => {
                    let out = panels_mut::<T>(to, packed.v_offset - packed.k_offset, tokens, head_dim);
                    transfer(v, block, out);
                });
            });
        }
    }
}

/// Copies the kept rows of K; rows beyond them become zero.
fn gather<S: Element, T: Element>(from: &[S], channels: usize, kept: &[u16], to: PanelsMut<'_, T>) {
    let PanelsMut { data, depth, lanes } = to;
    let sources = kept.iter().map(|&channel| Some(usize::from(channel)));
    for (row, source) in sources.chain(std::iter::repeat(None)).take(depth).enumerate() {
        for lane in 0..lanes {
            let x = source.map_or(0.0, |c| from[index::<S>(channels, lanes, c, lane)].widen());
            data[index::<T>(depth, lanes, row, lane)] = T::narrow(x);
        }
    }
}

/// Copies V. Between types it goes element by element, and rows beyond the block's tokens become
/// zero: only some types write them.
fn transfer<S: Element, T: Element>(from: &[S], tokens: usize, to: PanelsMut<'_, T>) {
    let PanelsMut { data, depth, lanes } = to;
    if std::any::TypeId::of::<S>() == std::any::TypeId::of::<T>() {
        data.copy_from_slice(bytemuck::cast_slice(from));
        return;
    }
    for row in 0..depth {
        for lane in 0..lanes {
            let written = row < tokens;
            let x = if written { from[index::<S>(depth, lanes, row, lane)].widen() } else { 0.0 };
            data[index::<T>(depth, lanes, row, lane)] = T::narrow(x);
        }
    }
}

/// `len` elements that start `offset` bytes into a head's part of a block.
pub(crate) fn elements<T: Element>(bytes: &[u8], offset: usize, len: usize) -> &[T] {
    bytemuck::cast_slice(&bytes[offset..offset + len * size_of::<T>()])
}

/// K or V in a head's part of a block, to be written.
pub(crate) fn panels_mut<T: Element>(
    bytes: &mut [u8],
    offset: usize,
    depth: usize,
    lanes: usize,
) -> PanelsMut<'_, T> {
    let end = offset + depth * lanes * size_of::<T>();
    PanelsMut { data: bytemuck::cast_slice_mut(&mut bytes[offset..end]), depth, lanes }
}
