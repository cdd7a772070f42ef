//! Into the blocks: new rows of K and V, and the packing of full blocks into lean ones.

use leank_core::{
    Block, CacheConfig, CacheLayout, Dtype, Error, HostView, KvHead, Layer, Result, StepSequence,
};

use crate::{
    attend::{elements, elements_mut},
    element::{Element, plain, with_element},
    store::Store,
};

/// Writes to the blocks of one layer.
pub(crate) struct LayerWriter<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) store: &'a mut Store,
    pub(crate) layer: Layer,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    K,
    V,
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
    /// Writes the new tokens of one sequence to the blocks that `table` names.
    pub(crate) fn append(
        &mut self,
        sequence: &StepSequence,
        table: &[Block],
        k: HostView<'_>,
        v: HostView<'_>,
    ) -> Result<()> {
        let block = self.layout.block;
        let mut row = vec![0.0; self.config.shape.head_dim];
        for token in 0..sequence.tokens {
            let position = sequence.start + token;
            for head in self.config.shape.kv_head_indices() {
                let slot = Slot { head, block: table[position / block], token: position % block };
                k.read_row(sequence.row + token, head.0, &mut row);
                self.admit(Part::K, head, position, &mut row)?;
                self.write_key(slot, &row);
                v.read_row(sequence.row + token, head.0, &mut row);
                self.admit(Part::V, head, position, &mut row)?;
                self.write_value(slot, &row);
            }
        }
        Ok(())
    }

    /// Rounds a row to the type of full blocks, and refuses it where it is not finite in every
    /// type that it will ever be stored in. Rows that go straight to lean blocks are rounded the
    /// same way, so that the road by which a token came does not show.
    fn admit(&self, part: Part, head: KvHead, position: usize, row: &mut [f32]) -> Result<()> {
        let full = self.config.dtype;
        let lean = self.lean_type(part, head);
        let mut finite = true;
        for x in row.iter_mut() {
            *x = full.round(*x);
            finite &= lean.round(*x).is_finite();
        }
        if finite {
            return Ok(());
        }
        let channel = row.iter().position(|x| !lean.round(*x).is_finite()).unwrap_or(0);
        let types = if full == lean { full.to_string() } else { format!("{full} and {lean}") };
        let why = format!(
            "layer {}, KV head {head}, token {position}, channel {channel} is not finite in {types}; store in bf16 or f32 where a model exceeds f16, otherwise mend what computes it",
            self.layer
        );
        let what = match part {
            Part::K => "K",
            Part::V => "V",
        };
        Err(Error::invalid(what, why))
    }

    fn lean_type(&self, part: Part, head: KvHead) -> Dtype {
        let format = self.config.format(self.layer, head);
        match part {
            Part::K => plain(format.k),
            Part::V => plain(format.v),
        }
    }

    fn write_key(&mut self, slot: Slot, row: &[f32]) {
        let block = self.layout.block;
        match slot.block {
            Block::Full(_) => {
                let offset = self.layout.full_k_offset(slot.head);
                let bytes = self.store.bytes_mut(self.layer, slot.block);
                with_element!(self.config.dtype, T => {
                    let k = elements_mut::<T>(bytes, offset, block * row.len());
                    for (column, &x) in k.chunks_exact_mut(block).zip(row) {
                        column[slot.token] = T::narrow(x);
                    }
                });
            }
            Block::Lean(_) => {
                let dtype = self.lean_type(Part::K, slot.head);
                let head = self.layout.layer(self.layer).lean[slot.head.0];
                let kept = self.config.mask.head(self.layer, slot.head).kept();
                let bytes = self.store.bytes_mut(self.layer, slot.block);
                with_element!(dtype, T => {
                    let k = elements_mut::<T>(bytes, head.k_offset, block * head.kept);
                    for (column, &c) in k.chunks_exact_mut(block).zip(kept) {
                        column[slot.token] = T::narrow(row[usize::from(c)]);
                    }
                });
            }
        }
    }

    fn write_value(&mut self, slot: Slot, row: &[f32]) {
        let (dtype, offset) = match slot.block {
            Block::Full(_) => (self.config.dtype, self.layout.full_v_offset(slot.head)),
            Block::Lean(_) => {
                let head = self.layout.layer(self.layer).lean[slot.head.0];
                if head.kept == 0 {
                    return;
                }
                (self.lean_type(Part::V, slot.head), head.v_offset)
            }
        };
        let bytes = self.store.bytes_mut(self.layer, slot.block);
        with_element!(dtype, T => {
            let offset = offset + slot.token * row.len() * size_of::<T>();
            for (stored, &x) in elements_mut::<T>(bytes, offset, row.len()).iter_mut().zip(row) {
                *stored = T::narrow(x);
            }
        });
    }

    /// Packs a full block into a lean one.
    pub(crate) fn pack(&mut self, full: u32, lean: u32) {
        let (block, head_dim) = (self.layout.block, self.config.shape.head_dim);
        for head in self.config.shape.kv_head_indices() {
            let kept = self.config.mask.head(self.layer, head).kept();
            if kept.is_empty() {
                continue;
            }
            let packed = self.layout.layer(self.layer).lean[head.0];
            let (k_type, v_type) = (plain(packed.format.k), plain(packed.format.v));
            let (k_offset, v_offset) =
                (self.layout.full_k_offset(head), self.layout.full_v_offset(head));
            let (from, to) = self.store.pack_pair(self.layer, full, lean);
            with_element!(self.config.dtype, S => {
                let k = elements::<S>(from, k_offset, block * head_dim);
                let v = elements::<S>(from, v_offset, block * head_dim);
                with_element!(k_type, T => {
                    let out = elements_mut::<T>(to, packed.k_offset, block * kept.len());
                    for (column, &c) in out.chunks_exact_mut(block).zip(kept) {
                        convert(&k[usize::from(c) * block..][..block], column);
                    }
                });
                with_element!(v_type, T => {
                    convert(v, elements_mut::<T>(to, packed.v_offset, block * head_dim));
                });
            });
        }
    }
}

/// Copies where the types are the same, rounds where they are not.
fn convert<S: Element, T: Element>(from: &[S], to: &mut [T]) {
    if std::any::TypeId::of::<S>() == std::any::TypeId::of::<T>() {
        to.copy_from_slice(bytemuck::cast_slice(from));
        return;
    }
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::narrow(from.widen());
    }
}
