//! Block storage: one allocation per block and layer, aligned to a cache line.

use leank_core::{Block, CacheLayout, Error, Layer, Result};

use crate::SECTION_ALIGN;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; SECTION_ALIGN]);

/// Bytes of one block of one layer.
#[derive(Default)]
struct Bytes(Box<[Line]>);

impl Bytes {
    /// Zeroed storage, or `None` when there is no memory.
    fn try_new(bytes: usize) -> Option<Self> {
        bytemuck::allocation::try_zeroed_slice_box(bytes.div_ceil(SECTION_ALIGN)).ok().map(Self)
    }
}

/// One layer of the blocks of one kind; the block number is the index.
type Slots = Vec<Bytes>;

/// Storage of every block of a cache.
pub(crate) struct Store {
    full: Vec<Slots>,
    lean: Vec<Slots>,
    full_bytes: usize,
    lean_bytes: Vec<usize>,
}

impl Store {
    pub(crate) fn new(layout: &CacheLayout, layers: usize) -> Self {
        let none = || (0..layers).map(|_| Slots::new()).collect();
        let lean_bytes = (0..layers).map(|layer| layout.layer(Layer(layer)).lean_bytes).collect();
        Self { full: none(), lean: none(), full_bytes: layout.full_bytes, lean_bytes }
    }

    /// Gives storage to a block in every layer; on failure it has none in any.
    ///
    /// # Errors
    /// [`Error::SystemMemory`] when the system has no memory left.
    pub(crate) fn allocate(&mut self, block: Block) -> Result<()> {
        for layer in 0..self.full.len() {
            let (slots, id, bytes) = self.slots(layer, block);
            let Some(storage) = Bytes::try_new(bytes) else {
                self.free(block);
                return Err(Error::SystemMemory { what: "a block", bytes: bytes as u64 });
            };
            if slots.len() <= id {
                slots.resize_with(id + 1, Bytes::default);
            }
            slots[id] = storage;
        }
        Ok(())
    }

    /// Takes the storage of a block in every layer.
    pub(crate) fn free(&mut self, block: Block) {
        for layer in 0..self.full.len() {
            let (slots, id, _) = self.slots(layer, block);
            if let Some(slot) = slots.get_mut(id) {
                *slot = Bytes::default();
            }
        }
    }

    fn slots(&mut self, layer: usize, block: Block) -> (&mut Slots, usize, usize) {
        match block {
            Block::Full(id) => (&mut self.full[layer], id as usize, self.full_bytes),
            Block::Lean(id) => (&mut self.lean[layer], id as usize, self.lean_bytes[layer]),
        }
    }

    /// Bytes of a block that has storage.
    pub(crate) fn bytes(&self, layer: Layer, block: Block) -> &[u8] {
        let lines = match block {
            Block::Full(id) => &self.full[layer.0][id as usize],
            Block::Lean(id) => &self.lean[layer.0][id as usize],
        };
        bytemuck::cast_slice(&lines.0)
    }

    /// Bytes of a block that has storage, to be written.
    pub(crate) fn bytes_mut(&mut self, layer: Layer, block: Block) -> &mut [u8] {
        let lines = match block {
            Block::Full(id) => &mut self.full[layer.0][id as usize],
            Block::Lean(id) => &mut self.lean[layer.0][id as usize],
        };
        bytemuck::cast_slice_mut(&mut lines.0)
    }

    /// A full block to read and a lean one to write, of one layer.
    pub(crate) fn pack_pair(&mut self, layer: Layer, full: u32, lean: u32) -> (&[u8], &mut [u8]) {
        let full = &self.full[layer.0][full as usize];
        let lean = &mut self.lean[layer.0][lean as usize];
        (bytemuck::cast_slice(&full.0), bytemuck::cast_slice_mut(&mut lean.0))
    }

    /// Overwrites what a block holds, so that a test sees whether anybody reads it unwritten.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn poison(&mut self, block: Block) {
        for layer in 0..self.full.len() {
            self.bytes_mut(Layer(layer), block).fill(0xff); // NaN in every element type
        }
    }
}
