//! Into the blocks: new rows of K and V, and the packing of full blocks into lean ones.

use leank_core::{Block, CacheConfig, CacheLayout, Dtype, HostView, KvHead, Layer, StepSequence};

use crate::{
    element::{Element, with_element},
    panels::{HeadPlace, PanelsMut, index},
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

    fn place(&self, head: KvHead, block: Block) -> Option<HeadPlace> {
        HeadPlace::of(self.config, self.layout, (self.layer, head), block)
    }

    fn write_key(&mut self, slot: Slot, row: &mut [f32]) {
        let Some(place) = self.place(slot.head, slot.block) else { return };
        self.round(place.k.dtype, row);
        let kept = self.config.mask.head(self.layer, slot.head).kept();
        let bytes = self.store.head_mut(self.layer, slot.block, slot.head);
        with_element!(place.k.dtype, T => {
            let mut k = place.k.panels_mut::<T>(bytes);
            if place.lean {
                k.write_lane(slot.token, kept.iter().map(|&c| T::narrow(row[usize::from(c)])));
            } else {
                k.write_lane(slot.token, row.iter().map(|&x| T::narrow(x)));
            }
        });
    }

    fn write_value(&mut self, slot: Slot, row: &mut [f32]) {
        let Some(place) = self.place(slot.head, slot.block) else { return };
        self.round(place.v.dtype, row);
        let bytes = self.store.head_mut(self.layer, slot.block, slot.head);
        with_element!(place.v.dtype, T => {
            let values = row.iter().map(|&x| T::narrow(x));
            place.v.panels_mut::<T>(bytes).write_row(slot.token, values);
        });
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
        let block = self.layout.block;
        for head in self.config.shape.kv_head_indices() {
            let places = (self.place(head, Block::Full(full)), self.place(head, Block::Lean(lean)));
            let (Some(whole), Some(packed)) = places else { continue };
            let kept = self.config.mask.head(self.layer, head).kept();
            let (from, to) = self.store.pack_pair(self.layer, (full, lean), head);
            with_element!(self.config.dtype, S => {
                with_element!(packed.k.dtype, T => {
                    let (from, to) = (whole.k.of(from).panels::<S>(), packed.k.panels_mut::<T>(to));
                    gather(from.data, from.depth, kept, to);
                });
                with_element!(packed.v.dtype, T => {
                    let (from, to) = (whole.v.of(from).panels::<S>(), packed.v.panels_mut::<T>(to));
                    transfer(from.data, block, to);
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
