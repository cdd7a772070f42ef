//! Block storage: slabs of device memory that hold blocks of one kind.
//!
//! A kernel finds a block by one number, its *table entry* (`kernels/common.cuh`): no list of slabs
//! has to follow the pools to the device. A slab is a row of *runs* of 1, 2, 4... blocks, each laid
//! out layer by layer, so that it can hold any number of blocks: as many as fill the pages that they
//! take. Slabs grow with the cache, from 16 MiB to 128 MiB, so that what is allocated stays within a
//! few per cent of the blocks in use for small caches, and within one for large ones.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};
use leank_core::{Block, CacheLayout, Error, Layer, ModelShape, Result};

use crate::{
    driver::{ALIGN, Buffer, Driver, is_out_of_memory},
    records::Blocks,
    tiles::TILE,
};

/// Fewest and most bytes of a slab, where a block is no larger.
const SLAB: std::ops::RangeInclusive<u64> = 16 << 20..=128 << 20;

/// What the device's memory is handed out in.
const PAGE: u64 = 2 << 20;

/// Most blocks of a run: their numbers take 16 bits of a table entry.
const MOST_BLOCKS: u64 = 1 << 15;

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    slab: usize,
    run: Run,
    number: u64,
    stored: bool,
}

/// Some blocks of a slab that lie together, layer by layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Where it begins in the slab, in bytes: a multiple of [`ALIGN`].
    offset: u64,
    /// It holds two to this power of blocks.
    log: u32,
}

#[derive(Debug)]
struct Slab<B> {
    bytes: u64,
    /// Blocks that have storage.
    stored: usize,
    /// Taken while some block has storage.
    buffer: Option<B>,
}

/// What a slab lies in: device memory, but in tests of the bookkeeping.
trait Storage {
    fn address(&self) -> u64;
    fn bytes(&self) -> usize;
}

impl Storage for Buffer {
    fn address(&self) -> u64 {
        self.address()
    }

    fn bytes(&self) -> usize {
        self.bytes()
    }
}

/// The blocks of one kind.
#[derive(Debug)]
struct Slots<B = Buffer> {
    lean: bool,
    /// Bytes of a block, layer by layer.
    layers: Vec<u64>,
    bytes: u64,
    slabs: Vec<Slab<B>>,
    places: Vec<Place>,
}

/// The runs of a slab of `blocks` blocks of `bytes` bytes each, the largest first, and its bytes.
fn runs(blocks: u64, bytes: u64) -> (Vec<Run>, u64) {
    let mut end = 0;
    let logs = (0..u64::BITS).rev().filter(|log| blocks >> log & 1 == 1);
    let runs = logs.map(|log| {
        let run = Run { offset: end, log };
        end = (end + (bytes << log)).next_multiple_of(ALIGN);
        run
    });
    (runs.collect(), end)
}

/// How many blocks of `bytes` bytes each the next slab holds, after `blocks` blocks: a sixty-fourth
/// to a thirty-second of them, whatever leaves least of the last page.
fn slab_blocks(blocks: usize, bytes: u64) -> u64 {
    let most = (SLAB.end() / bytes.max(1)).clamp(1, MOST_BLOCKS);
    let least = (SLAB.start() / bytes.max(1)).clamp(1, most);
    let most = (blocks as u64 / 32).clamp(least, most);
    // Of small blocks any number will do.
    let candidates = (most / 2 + 1..=most).rev().take(64);
    let left = |&blocks: &u64| {
        let taken = runs(blocks, bytes).1.next_multiple_of(PAGE).max(PAGE);
        (taken - blocks * bytes) as f64 / taken as f64
    };
    candidates.min_by(|a, b| left(a).total_cmp(&left(b))).unwrap_or(most)
}

impl<B: Storage> Slots<B> {
    fn new(lean: bool, layers: Vec<u64>) -> Self {
        let bytes = layers.iter().sum();
        Self { lean, layers, bytes, slabs: Vec::new(), places: Vec::new() }
    }

    /// Gives storage to block `id`; `take` takes bytes of memory.
    fn allocate(&mut self, id: usize, take: impl FnOnce(usize) -> Driver<B>) -> Driver<()> {
        while self.places.len() <= id {
            let slab = self.slabs.len();
            let (runs, bytes) = runs(slab_blocks(self.places.len(), self.bytes), self.bytes);
            self.slabs.push(Slab { bytes, stored: 0, buffer: None });
            for run in runs {
                let place = |number| Place { slab, run, number, stored: false };
                self.places.extend((0..1 << run.log).map(place));
            }
        }
        let place = &mut self.places[id];
        let slab = &mut self.slabs[place.slab];
        if slab.buffer.is_none() {
            slab.buffer = Some(take(slab.bytes as usize)?);
        }
        slab.stored += usize::from(!std::mem::replace(&mut place.stored, true));
        Ok(())
    }

    /// Bytes of the slab of block `id`, which has a place.
    fn slab_bytes(&self, id: usize) -> u64 {
        self.slabs[self.places[id].slab].bytes
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
    fn find(&self, id: u32, layer: Layer) -> Option<(&B, usize)> {
        let Place { slab, run, number, .. } = *self.places.get(id as usize)?;
        let before: u64 = self.layers[..layer.0].iter().sum();
        let offset = run.offset + (before << run.log) + number * self.layers[layer.0];
        Some((self.slabs[slab].buffer.as_ref()?, offset as usize))
    }

    fn entry(&self, id: u32) -> u64 {
        let Some(&Place { slab, run, number, .. }) = self.places.get(id as usize) else { return 0 };
        let slab = self.slabs[slab].buffer.as_ref().map_or(0, B::address);
        table_entry(self.lean, run.log, slab + run.offset, number)
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
        let take = |bytes| Buffer::aligned(&context, bytes);
        slots.allocate(id as usize, take).map_err(|error| {
            if is_out_of_memory(error) {
                let what = "blocks of the cache on the CUDA device";
                // Of blocks without bytes one is asked for.
                let bytes = slots.slab_bytes(id as usize).max(1);
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
    use cudarc::driver::{DriverError, sys::CUresult};

    use super::*;

    #[test]
    fn slabs_grow_with_the_cache() {
        let mib = 1u64 << 20;
        // Small blocks: the smallest slab, then a thirty-second of what is there.
        assert_eq!(slab_blocks(0, 4096), 4096);
        assert_eq!(slab_blocks(1 << 19, 4096), 1 << 14);
        // A block of a 8B model.
        assert_eq!(slab_blocks(0, 8 * mib), 2);
        assert_eq!(slab_blocks(100, 8 * mib), 3);
        assert_eq!(slab_blocks(100_000, 8 * mib), 16);
        // Blocks larger than any slab, and of nothing at all.
        assert_eq!(slab_blocks(100, 1000 * mib), 1);
        assert_eq!(slab_blocks(0, 0), MOST_BLOCKS);
    }

    #[test]
    fn slabs_fill_their_pages() {
        // Lean blocks of Llama-3.1-8B: one takes two and a quarter pages.
        let bytes = 4_734_976;
        let (mut blocks, mut taken) = (0, 0);
        while blocks < 7400 {
            let slab = slab_blocks(blocks, bytes);
            blocks += slab as usize;
            taken += runs(slab, bytes).1.next_multiple_of(PAGE);
        }
        let stored = 7400 * bytes;
        assert!(taken < stored + stored / 100, "{taken} of {stored}");
    }

    #[test]
    fn runs_lie_one_after_the_other() {
        let (runs, bytes) = runs(11, 100_000);
        let ends = |run: &Run| (run.offset + (100_000 << run.log)).next_multiple_of(ALIGN);
        assert_eq!(runs.iter().map(|run| run.log).collect::<Vec<_>>(), [3, 1, 0]);
        assert_eq!(runs[0].offset, 0);
        assert!(runs.windows(2).all(|pair| ends(&pair[0]) == pair[1].offset));
        assert_eq!(ends(&runs[2]), bytes);
    }

    struct Fake(usize);

    impl Storage for Fake {
        fn address(&self) -> u64 {
            0
        }

        fn bytes(&self) -> usize {
            self.0
        }
    }

    /// Whichever slab is refused: blocks that have storage keep it, and the one that has none gets it later.
    #[test]
    fn a_refused_slab_changes_nothing() {
        // A slab for every block, two for every two, ...
        let bytes = 12 << 20;
        let refused = || Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        for refused_at in 0..40 {
            let mut slots = Slots::new(false, vec![bytes / 2; 2]);
            let mut slabs = 0;
            for id in 0..40 {
                let before = slots.allocated();
                let answer = slots.allocate(id, |bytes| {
                    slabs += 1;
                    if slabs == refused_at + 1 { refused() } else { Ok(Fake(bytes)) }
                });
                if answer.is_err() {
                    assert_eq!(slots.allocated(), before);
                    assert!(slots.find(id as u32, Layer(0)).is_none());
                    assert!(slots.slab_bytes(id) >= bytes, "the refused bytes are told");
                    // What was refused is given back, as a cancelled step does.
                    slots.free(id);
                    slots.allocate(id, |bytes| Ok(Fake(bytes))).unwrap();
                }
                let stored = |id| slots.find(id, Layer(1)).is_some();
                assert!((0..=id as u32).all(stored), "block {id}, slab {refused_at}");
            }
            assert!(slots.allocated() >= 40 * bytes);
            (0..40).for_each(|id| slots.free(id));
            assert_eq!(slots.allocated(), 0);
        }
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
