//! Block storage: slabs that hold blocks of one kind and layer side by side.
//!
//! Within a slab, K and V of one head lie side by side from block to block: attention walks along a
//! head, and a stream without gaps is what the hardware's prefetchers follow best. A block's number
//! says where it lies, for good. Slabs double up to [`SLAB`] bytes, and from
//! [`HUGE_PAGE`] bytes on they are mappings of their own that ask for huge pages: reading a long
//! cache through 4 KiB pages costs up to a quarter of the bandwidth. The system gives memory page
//! by page as blocks are written, so what is resident follows the blocks in use.

use leank_core::{Block, CacheLayout, Error, KvHead, Layer, ModelShape, Result};

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

/// K and V of one head in the blocks of one kind and layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    /// Bytes of the heads before it.
    pub(crate) offset: usize,
    /// Its own bytes.
    pub(crate) bytes: usize,
}

/// Blocks of one kind in one layer.
#[derive(Default)]
struct Slots {
    /// Bytes of a block.
    bytes: usize,
    slabs: Vec<Slab>,
    /// Where each block lies.
    places: Vec<Place>,
}

#[derive(Clone, Copy)]
struct Place {
    slab: usize,
    /// Number of the block within the slab, which holds `blocks`.
    index: usize,
    blocks: usize,
}

impl Place {
    /// Bytes of a head within the slab.
    fn range(self, head: Head) -> std::ops::Range<usize> {
        let start = self.blocks * head.offset + self.index * head.bytes;
        start..start + head.bytes
    }
}

impl Slots {
    /// Makes room for block `id`.
    fn cover(&mut self, id: usize) -> Option<()> {
        while self.places.len() <= id {
            let most = (SLAB / self.bytes.max(1)).max(1);
            let blocks = self.places.len().clamp(1, most);
            self.slabs.push(Slab::try_new(blocks * self.bytes)?);
            let slab = self.slabs.len() - 1;
            self.places.extend((0..blocks).map(|index| Place { slab, index, blocks }));
        }
        Some(())
    }

    fn head(&self, id: u32, head: Head) -> &[u8] {
        let place = self.places[id as usize];
        &self.slabs[place.slab].bytes()[place.range(head)]
    }

    fn head_mut(&mut self, id: u32, head: Head) -> &mut [u8] {
        let place = self.places[id as usize];
        &mut self.slabs[place.slab].bytes_mut()[place.range(head)]
    }

    fn discard(&mut self, id: u32, heads: &[Head]) {
        if let Some(&place) = self.places.get(id as usize) {
            for &head in heads {
                self.slabs[place.slab].discard(place.range(head));
            }
        }
    }
}

/// The blocks of one head in one layer.
#[derive(Clone, Copy)]
pub(crate) struct HeadStore<'a> {
    full: (&'a Slots, Head),
    lean: (&'a Slots, Head),
}

impl<'a> HeadStore<'a> {
    /// K and V in a block that has storage, as the layout puts them one after the other.
    #[inline(always)]
    pub(crate) fn get(&self, block: Block) -> &'a [u8] {
        let ((slots, head), id) = match block {
            Block::Full(id) => (self.full, id),
            Block::Lean(id) => (self.lean, id),
        };
        slots.head(id, head)
    }
}

/// Storage of every block of a cache.
pub(crate) struct Store {
    full: Vec<Slots>,
    lean: Vec<Slots>,
    full_heads: Vec<Head>,
    /// Per layer.
    lean_heads: Vec<Vec<Head>>,
}

impl Store {
    pub(crate) fn new(layout: &CacheLayout, shape: ModelShape) -> Self {
        let slots = |bytes| Slots { bytes, ..Slots::default() };
        let full_head = |head: KvHead| Head {
            offset: layout.full_k_offset(head),
            bytes: layout.full_head_bytes(),
        };
        let lean_head = |layer: Layer, head: KvHead| Head {
            offset: layout.layer(layer).lean[head.0].k_offset,
            bytes: layout.layer(layer).lean_head_bytes(head),
        };
        let heads = || shape.kv_head_indices();
        Self {
            full: shape.layer_indices().map(|_| slots(layout.full_bytes)).collect(),
            lean: shape.layer_indices().map(|l| slots(layout.layer(l).lean_bytes)).collect(),
            full_heads: heads().map(full_head).collect(),
            lean_heads: shape
                .layer_indices()
                .map(|layer| heads().map(|head| lean_head(layer, head)).collect())
                .collect(),
        }
    }

    /// Gives storage to a block in every layer.
    ///
    /// # Errors
    /// [`Error::SystemMemory`] when the system has no memory left.
    pub(crate) fn allocate(&mut self, block: Block) -> Result<()> {
        let (kind, id) = match block {
            Block::Full(id) => (&mut self.full, id),
            Block::Lean(id) => (&mut self.lean, id),
        };
        for slots in kind {
            if slots.cover(id as usize).is_none() {
                return Err(Error::SystemMemory {
                    what: "blocks of the cache",
                    bytes: slots.bytes as u64,
                });
            }
        }
        Ok(())
    }

    /// Takes the storage of a block in every layer.
    pub(crate) fn free(&mut self, block: Block) {
        for layer in 0..self.full.len() {
            match block {
                Block::Full(id) => self.full[layer].discard(id, &self.full_heads),
                Block::Lean(id) => self.lean[layer].discard(id, &self.lean_heads[layer]),
            }
        }
    }

    /// The blocks of one head.
    pub(crate) fn of_head(&self, layer: Layer, head: KvHead) -> HeadStore<'_> {
        HeadStore {
            full: (&self.full[layer.0], self.full_heads[head.0]),
            lean: (&self.lean[layer.0], self.lean_heads[layer.0][head.0]),
        }
    }

    /// K and V of a head in a block that has storage.
    pub(crate) fn head(&self, layer: Layer, block: Block, head: KvHead) -> &[u8] {
        self.of_head(layer, head).get(block)
    }

    /// The same, to be written.
    pub(crate) fn head_mut(&mut self, layer: Layer, block: Block, head: KvHead) -> &mut [u8] {
        match block {
            Block::Full(id) => self.full[layer.0].head_mut(id, self.full_heads[head.0]),
            Block::Lean(id) => self.lean[layer.0].head_mut(id, self.lean_heads[layer.0][head.0]),
        }
    }

    /// Copies a full block to another one, in every layer.
    pub(crate) fn copy(&mut self, from: u32, to: u32) {
        let mut bytes = Vec::new();
        for layer in (0..self.full.len()).map(Layer) {
            for head in (0..self.full_heads.len()).map(KvHead) {
                bytes.clear();
                bytes.extend_from_slice(self.head(layer, Block::Full(from), head));
                self.head_mut(layer, Block::Full(to), head).copy_from_slice(&bytes);
            }
        }
    }

    /// A head of a full block to read, and of a lean one to write.
    pub(crate) fn pack_pair(
        &mut self,
        layer: Layer,
        (full, lean): (u32, u32),
        head: KvHead,
    ) -> (&[u8], &mut [u8]) {
        (
            self.full[layer.0].head(full, self.full_heads[head.0]),
            self.lean[layer.0].head_mut(lean, self.lean_heads[layer.0][head.0]),
        )
    }

    /// Overwrites what a block holds, so that a test sees whether anybody reads it unwritten.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn poison(&mut self, block: Block) {
        for layer in (0..self.full.len()).map(Layer) {
            for head in (0..self.full_heads.len()).map(KvHead) {
                self.head_mut(layer, block, head).fill(0xff); // NaN in every element type
            }
        }
    }
}
