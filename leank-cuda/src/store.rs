//! Block storage: slabs of device memory that hold blocks of one kind, layer by layer.
//!
//! A kernel finds a block by one number, its *table entry* (`kernels/common.cuh`): no list of slabs
//! has to follow the pools to the device. Slabs grow with the cache, from 2 MiB to 256 MiB, so what
//! is allocated stays within a few per cent of the blocks in use for small caches, and within one
//! for large ones.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use leank_core::{Block, CacheLayout, Error, Layer, ModelShape, Result};

use crate::{
    driver::{Buffer, Driver, is_out_of_memory},
    records::Blocks,
    tiles::TILE,
};

/// Fewest and most bytes of a slab, where a block is no larger.
const SLAB: std::ops::RangeInclusive<u64> = 2 << 20..=256 << 20;

/// Most blocks of a slab: their numbers take 16 bits of a table entry.
const MOST_BLOCKS: u64 = 1 << 15;

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    slab: usize,
    number: u64,
    stored: bool,
}

#[derive(Debug)]
struct Slab {
    /// The slab holds two to this power of blocks.
    log: u32,
    /// Blocks that have storage.
    stored: usize,
    /// Taken while some block has storage.
    buffer: Option<Buffer>,
}

/// The blocks of one kind.
#[derive(Debug)]
struct Slots {
    lean: bool,
    /// Bytes of a block, layer by layer.
    layers: Vec<u64>,
    bytes: u64,
    slabs: Vec<Slab>,
    places: Vec<Place>,
}

/// Two to which power of blocks the next slab holds, after `blocks` blocks of `bytes` bytes each.
fn slab_log(blocks: usize, bytes: u64) -> u32 {
    let most = (SLAB.end() / bytes.max(1)).clamp(1, MOST_BLOCKS);
    let least = (SLAB.start() / bytes.max(1)).clamp(1, most);
    (blocks as u64 / 32).clamp(least, most).ilog2()
}

impl Slots {
    fn new(lean: bool, layers: Vec<u64>) -> Self {
        let bytes = layers.iter().sum();
        Self { lean, layers, bytes, slabs: Vec::new(), places: Vec::new() }
    }

    /// Gives storage to block `id`.
    fn allocate(&mut self, context: &Arc<CudaContext>, id: usize) -> Driver<()> {
        while self.places.len() <= id {
            let log = slab_log(self.places.len(), self.bytes);
            let slab = self.slabs.len();
            self.slabs.push(Slab { log, stored: 0, buffer: None });
            let place = |number| Place { slab, number, stored: false };
            self.places.extend((0..1 << log).map(place));
        }
        let place = &mut self.places[id];
        let slab = &mut self.slabs[place.slab];
        if slab.buffer.is_none() {
            slab.buffer = Some(Buffer::aligned(context, (self.bytes << slab.log) as usize)?);
        }
        slab.stored += usize::from(!std::mem::replace(&mut place.stored, true));
        Ok(())
    }

    /// Bytes of the slab that block `id` lies in, or will.
    fn next_allocation(&self, id: usize) -> u64 {
        let log = self.places.get(id).map_or_else(
            || slab_log(self.places.len(), self.bytes),
            |place| self.slabs[place.slab].log,
        );
        self.bytes << log
    }

    /// Takes the storage of block `id`. Memory goes back when no block of its slab has any.
    fn free(&mut self, id: usize) {
        let Some(place) = self.places.get_mut(id) else { return };
        let slab = &mut self.slabs[place.slab];
        slab.stored -= usize::from(std::mem::replace(&mut place.stored, false));
        if slab.stored == 0 {
            slab.buffer = None;
        }
    }

    /// The slab of a block, and where a layer of it begins in it.
    fn find(&self, id: u32, layer: Layer) -> Option<(&Buffer, usize)> {
        let place = self.places.get(id as usize)?;
        let slab = &self.slabs[place.slab];
        let before: u64 = self.layers[..layer.0].iter().sum();
        let offset = (before << slab.log) + place.number * self.layers[layer.0];
        Some((slab.buffer.as_ref()?, offset as usize))
    }

    fn entry(&self, id: u32) -> u64 {
        let Some(place) = self.places.get(id as usize) else { return 0 };
        let slab = &self.slabs[place.slab];
        let address = slab.buffer.as_ref().map_or(0, Buffer::address);
        table_entry(self.lean, slab.log, address, place.number)
    }

    fn allocated(&self) -> u64 {
        let buffers = self.slabs.iter().filter_map(|slab| slab.buffer.as_ref());
        buffers.map(|buffer| buffer.bytes() as u64).sum()
    }
}

/// What a kernel finds a block by: see `Blocks` in `kernels/common.cuh`.
fn table_entry(lean: bool, log: u32, address: u64, number: u64) -> u64 {
    debug_assert!(
        address.is_multiple_of(1 << 16) && address < 1 << 58 && number < 1 << 16 && log < 32
    );
    u64::from(lean) << 63 | u64::from(log) << 58 | address | number
}

/// Storage of every block of a cache.
#[derive(Debug)]
pub(crate) struct Store {
    context: Arc<CudaContext>,
    full: Slots,
    lean: Slots,
}

impl Store {
    pub(crate) fn new(context: &Arc<CudaContext>, layout: &CacheLayout, shape: ModelShape) -> Self {
        let full = shape.layer_indices().map(|_| layout.full_bytes as u64).collect();
        let lean = shape.layer_indices().map(|layer| layout.layer(layer).lean_bytes as u64);
        Self {
            context: Arc::clone(context),
            full: Slots::new(false, full),
            lean: Slots::new(true, lean.collect()),
        }
    }

    /// Where the blocks of each layer lie in slabs, for kernels.
    pub(crate) fn blocks(layout: &CacheLayout, shape: ModelShape) -> Vec<Blocks> {
        let mut layer_offset = [0, 0];
        let of_layer = |layer: Layer| {
            let bytes = [layout.full_bytes, layout.layer(layer).lean_bytes];
            let blocks = Blocks {
                layer_offset,
                bytes: bytes.map(|bytes| bytes as u32),
                full_head: layout.full_head_bytes() as u32,
                block: layout.block as u32,
                slices: layout.block.div_ceil(TILE) as u32,
                padding: 0,
            };
            layer_offset[0] += bytes[0] as u64;
            layer_offset[1] += bytes[1] as u64;
            blocks
        };
        shape.layer_indices().map(of_layer).collect()
    }

    fn kind(&self, block: Block) -> (&Slots, u32) {
        match block {
            Block::Full(id) => (&self.full, id),
            Block::Lean(id) => (&self.lean, id),
        }
    }

    fn kind_mut(&mut self, block: Block) -> (&mut Slots, u32) {
        match block {
            Block::Full(id) => (&mut self.full, id),
            Block::Lean(id) => (&mut self.lean, id),
        }
    }

    /// Gives storage to a block in every layer.
    ///
    /// # Errors
    /// [`Error::SystemMemory`] when the device has no memory left, [`Error::Device`].
    pub(crate) fn allocate(&mut self, block: Block) -> Result<()> {
        let context = Arc::clone(&self.context);
        let (slots, id) = self.kind_mut(block);
        let bytes = slots.next_allocation(id as usize);
        slots.allocate(&context, id as usize).map_err(|error| {
            if is_out_of_memory(error) {
                let what = "blocks of the cache on the CUDA device";
                return Error::SystemMemory { what, bytes };
            }
            let why = error.to_string();
            Error::Device { device: "CUDA".into(), action: "allocating blocks", why }
        })
    }

    /// Takes the storage of a block in every layer.
    pub(crate) fn free(&mut self, block: Block) {
        let (slots, id) = self.kind_mut(block);
        slots.free(id as usize);
    }

    /// What kernels find a block by.
    pub(crate) fn entry(&self, block: Block) -> u64 {
        let (slots, id) = self.kind(block);
        slots.entry(id)
    }

    /// Bytes of device memory.
    pub(crate) fn allocated(&self) -> u64 {
        self.full.allocated() + self.lean.allocated()
    }

    /// Copies one layer of a block to the host, and waits.
    pub(crate) fn read(
        &self,
        stream: &CudaStream,
        block: Block,
        layer: Layer,
        bytes: &mut [u8],
    ) -> Driver<()> {
        let (slots, id) = self.kind(block);
        slots.find(id, layer).map_or(Ok(()), |(buffer, offset)| buffer.read(stream, offset, bytes))
    }

    /// Copies one layer of a block from the host, and waits.
    pub(crate) fn write(
        &self,
        stream: &CudaStream,
        block: Block,
        layer: Layer,
        bytes: &[u8],
    ) -> Driver<()> {
        let (slots, id) = self.kind(block);
        slots.find(id, layer).map_or(Ok(()), |(buffer, offset)| buffer.write(stream, offset, bytes))
    }

    /// Overwrites what a block holds with NaN, so that a test sees whether anybody reads it
    /// unwritten.
    pub(crate) fn poison(&self, stream: &CudaStream, block: Block) -> Driver<()> {
        let (slots, id) = self.kind(block);
        for layer in 0..slots.layers.len() {
            if let Some((buffer, offset)) = slots.find(id, Layer(layer)) {
                buffer.fill(stream, offset..offset + slots.layers[layer] as usize, 0xff)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_grow_with_the_cache() {
        let mib = 1u64 << 20;
        // Small blocks: the smallest slab, then a thirty-second of what is there.
        assert_eq!(slab_log(0, 4096), 9);
        assert_eq!(slab_log(1 << 20, 4096), 15);
        // A block of a 8B model.
        assert_eq!(slab_log(0, 8 * mib), 0);
        assert_eq!(slab_log(100, 8 * mib), 1);
        assert_eq!(slab_log(100_000, 8 * mib), 5);
        // Blocks larger than any slab, and of nothing at all.
        assert_eq!(slab_log(100, 1000 * mib), 0);
        assert_eq!(slab_log(0, 0), 15);
    }

    #[test]
    fn an_entry_says_where() {
        let entry = table_entry(true, 5, 0x7f12_3456_0000, 17);
        assert_eq!(entry >> 63, 1);
        assert_eq!(entry >> 58 & 31, 5);
        assert_eq!(entry & 0x03ff_ffff_ffff_0000, 0x7f12_3456_0000);
        assert_eq!(entry & 0xffff, 17);
        assert_eq!(table_entry(false, 0, 0, 3), 3);
    }
}
