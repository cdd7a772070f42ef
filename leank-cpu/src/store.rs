//! Block storage: slabs that hold blocks of one kind and layer side by side.
//!
//! A block's number says where it lies, for good. Slabs double up to [`SLAB`] bytes, and from
//! [`HUGE_PAGE`] bytes on they are mappings of their own that ask for huge pages: reading a long
//! cache through 4 KiB pages costs up to a quarter of the bandwidth. The system gives memory page
//! by page as blocks are written, so what is resident follows the blocks in use.

use leank_core::{Block, CacheLayout, Error, Layer, Result};

use crate::SECTION_ALIGN;

/// Largest slab, in bytes, where a block is no larger.
const SLAB: usize = 32 << 20;

/// Bytes of a huge page.
#[cfg(feature = "huge-pages")]
const HUGE_PAGE: usize = 2 << 20;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; SECTION_ALIGN]);

/// Zeroed bytes that start at a multiple of a cache line.
enum Slab {
    Heap(Box<[Line]>),
    #[cfg(feature = "huge-pages")]
    Mapping {
        map: memmap2::MmapMut,
        /// First byte that starts a huge page.
        start: usize,
    },
}

impl Slab {
    /// `None` when there is no memory.
    fn try_new(bytes: usize) -> Option<Self> {
        #[cfg(feature = "huge-pages")]
        if bytes >= HUGE_PAGE {
            let map = memmap2::MmapMut::map_anon(bytes + HUGE_PAGE).ok()?;
            // Where the system has none to give, small ones do.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            let start = map.as_ptr().align_offset(HUGE_PAGE);
            return (start < HUGE_PAGE).then_some(Self::Mapping { map, start });
        }
        let lines = bytes.div_ceil(SECTION_ALIGN);
        bytemuck::allocation::try_zeroed_slice_box(lines).ok().map(Self::Heap)
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(lines) => bytemuck::cast_slice(lines),
            #[cfg(feature = "huge-pages")]
            Self::Mapping { map, start } => &map[*start..],
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(lines) => bytemuck::cast_slice_mut(lines),
            #[cfg(feature = "huge-pages")]
            Self::Mapping { map, start } => &mut map[*start..],
        }
    }

    /// Gives the whole pages of a range back to the system; they read as zeros afterwards.
    fn discard(&mut self, range: std::ops::Range<usize>) {
        #[cfg(all(feature = "huge-pages", target_os = "linux"))]
        if let Self::Mapping { map, start } = self {
            /// No system that Linux runs on has smaller pages; larger ones are refused, which
            /// leaves the memory with us.
            const PAGE: usize = 4096;
            let from = (*start + range.start).next_multiple_of(PAGE);
            let to = (*start + range.end) / PAGE * PAGE;
            if from < to {
                // SAFETY: the mapping is private and anonymous, so that discarded pages read as
                // zeros, and `&mut self` says that nobody else looks at them.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from)
                };
            }
        }
        #[cfg(not(all(feature = "huge-pages", target_os = "linux")))]
        let _ = range;
    }
}

/// Blocks of one kind in one layer.
#[derive(Default)]
struct Slots {
    /// Bytes of a block.
    bytes: usize,
    slabs: Vec<Slab>,
    /// Slab of each block, and its first byte there.
    places: Vec<(usize, usize)>,
}

impl Slots {
    /// Makes room for block `id`.
    fn cover(&mut self, id: usize) -> Option<()> {
        while self.places.len() <= id {
            let most = (SLAB / self.bytes.max(1)).max(1);
            let blocks = self.places.len().clamp(1, most);
            self.slabs.push(Slab::try_new(blocks * self.bytes)?);
            let slab = self.slabs.len() - 1;
            self.places.extend((0..blocks).map(|block| (slab, block * self.bytes)));
        }
        Some(())
    }

    fn block(&self, id: u32) -> &[u8] {
        let (slab, start) = self.places[id as usize];
        &self.slabs[slab].bytes()[start..start + self.bytes]
    }

    fn block_mut(&mut self, id: u32) -> &mut [u8] {
        let (slab, start) = self.places[id as usize];
        &mut self.slabs[slab].bytes_mut()[start..start + self.bytes]
    }

    fn discard(&mut self, id: u32) {
        if let Some(&(slab, start)) = self.places.get(id as usize) {
            self.slabs[slab].discard(start..start + self.bytes);
        }
    }
}

/// Storage of every block of a cache.
pub(crate) struct Store {
    full: Vec<Slots>,
    lean: Vec<Slots>,
}

impl Store {
    pub(crate) fn new(layout: &CacheLayout, layers: usize) -> Self {
        let slots = |bytes| Slots { bytes, ..Slots::default() };
        Self {
            full: (0..layers).map(|_| slots(layout.full_bytes)).collect(),
            lean: (0..layers).map(|layer| slots(layout.layer(Layer(layer)).lean_bytes)).collect(),
        }
    }

    /// Gives storage to a block in every layer.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the system has no memory left.
    pub(crate) fn allocate(&mut self, block: Block) -> Result<()> {
        let (kind, id) = self.kind(block);
        for slots in kind {
            if slots.cover(id as usize).is_none() {
                let bytes = slots.bytes;
                return Err(Error::Unavailable {
                    what: "memory for a block",
                    why: format!(
                        "the system refused {bytes} bytes; release sequences or set a limit"
                    ),
                });
            }
        }
        Ok(())
    }

    /// Takes the storage of a block in every layer.
    pub(crate) fn free(&mut self, block: Block) {
        let (kind, id) = self.kind(block);
        for slots in kind {
            slots.discard(id);
        }
    }

    fn kind(&mut self, block: Block) -> (&mut [Slots], u32) {
        match block {
            Block::Full(id) => (&mut self.full, id),
            Block::Lean(id) => (&mut self.lean, id),
        }
    }

    /// Bytes of a block that has storage.
    pub(crate) fn bytes(&self, layer: Layer, block: Block) -> &[u8] {
        match block {
            Block::Full(id) => self.full[layer.0].block(id),
            Block::Lean(id) => self.lean[layer.0].block(id),
        }
    }

    /// Bytes of a block that has storage, to be written.
    pub(crate) fn bytes_mut(&mut self, layer: Layer, block: Block) -> &mut [u8] {
        match block {
            Block::Full(id) => self.full[layer.0].block_mut(id),
            Block::Lean(id) => self.lean[layer.0].block_mut(id),
        }
    }

    /// A full block to read and a lean one to write, of one layer.
    pub(crate) fn pack_pair(&mut self, layer: Layer, full: u32, lean: u32) -> (&[u8], &mut [u8]) {
        (self.full[layer.0].block(full), self.lean[layer.0].block_mut(lean))
    }

    /// Overwrites what a block holds, so that a test sees whether anybody reads it unwritten.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn poison(&mut self, block: Block) {
        for layer in 0..self.full.len() {
            self.bytes_mut(Layer(layer), block).fill(0xff); // NaN in every element type
        }
    }
}
