//! Block storage: slabs that hold blocks of one kind and layer side by side.
//!
//! Within a slab, K and V of one head lie side by side from block to block: attention walks along a
//! head, and a stream without gaps is what the hardware's prefetchers follow best. A block's number
//! says where it lies, for good. Slabs double up to [`SLAB`] bytes, and from
//! [`HUGE_PAGE`] bytes on they are mappings of their own that ask for huge pages: reading a long
//! cache through 4 KiB pages costs up to a quarter of the bandwidth. The system gives memory page
//! by page as blocks are written, so what is resident follows the blocks in use.

use leank_core::{Block, CacheLayout, Error, KvHead, Layer, ModelShape, Result};

use crate::{SECTION_ALIGN, running::Line};

/// Largest slab, in bytes, where a block is no larger.
const SLAB: usize = 32 << 20;

/// Bytes of a huge page.
#[cfg(feature = "huge-pages")]
const HUGE_PAGE: usize = 2 << 20;

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
            let pages = whole_pages(range, rustix::param::page_size());
            if !pages.is_empty() {
                // SAFETY: the mapping is private and anonymous, so that discarded pages read as
                // zeros, and `&mut self` says that nobody else looks at them. Both ends are ends of
                // the system's pages, as `start` is, so nothing beside the range is discarded.
                let _ = unsafe {
                    map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        *start + pages.start,
                        pages.len(),
                    )
                };
            }
        }
        #[cfg(not(all(feature = "huge-pages", target_os = "linux")))]
        let _ = range;
    }
}

/// The pages that lie in a range as a whole.
#[cfg(all(feature = "huge-pages", target_os = "linux"))]
fn whole_pages(range: std::ops::Range<usize>, page: usize) -> std::ops::Range<usize> {
    range.start.next_multiple_of(page)..range.end / page * page
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
pub(crate) struct Slots {
    /// Bytes of a block.
    bytes: usize,
    heads: Vec<Head>,
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
    fn new(bytes: usize, heads: impl Iterator<Item = Head>) -> Self {
        Self { bytes, heads: heads.collect(), slabs: Vec::new(), places: Vec::new() }
    }

    /// Makes room for block `id`; fails with the bytes that the system refused.
    fn cover(&mut self, id: usize) -> std::result::Result<(), usize> {
        while self.places.len() <= id {
            let most = (SLAB / self.bytes.max(1)).max(1);
            let blocks = self.places.len().clamp(1, most);
            let bytes = blocks * self.bytes;
            self.slabs.push(Slab::try_new(bytes).ok_or(bytes)?);
            let slab = self.slabs.len() - 1;
            self.places.extend((0..blocks).map(|index| Place { slab, index, blocks }));
        }
        Ok(())
    }

    /// Slab and bytes of a head in a block.
    fn find(&self, id: u32, head: KvHead) -> (usize, std::ops::Range<usize>) {
        let place = self.places[id as usize];
        (place.slab, place.range(self.heads[head.0]))
    }

    /// K and V of a head in a block that has storage, as the layout puts them one after the other.
    pub(crate) fn head(&self, id: u32, head: KvHead) -> &[u8] {
        let (slab, range) = self.find(id, head);
        &self.slabs[slab].bytes()[range]
    }

    /// The same, to be written.
    pub(crate) fn head_mut(&mut self, id: u32, head: KvHead) -> &mut [u8] {
        let (slab, range) = self.find(id, head);
        &mut self.slabs[slab].bytes_mut()[range]
    }

    /// Several heads of blocks to be written at the same time, each with what `wanted` says beside
    /// it. They come in the order of memory.
    ///
    /// # Panics
    /// When a head of a block is wanted twice.
    pub(crate) fn heads_mut<T>(
        &mut self,
        wanted: impl Iterator<Item = (u32, KvHead, T)>,
    ) -> Vec<(T, &mut [u8])> {
        let found = wanted.map(|(id, head, with)| (self.find(id, head), with));
        let mut found: Vec<_> = found.collect();
        found.sort_unstable_by_key(|((slab, range), _)| (*slab, range.start));
        let mut parts = Vec::with_capacity(found.len());
        let mut found = found.into_iter().peekable();
        for (index, slab) in self.slabs.iter_mut().enumerate() {
            let (mut rest, mut before) = (slab.bytes_mut(), 0);
            while let Some(((_, range), with)) = found.next_if(|((slab, _), _)| *slab == index) {
                let (own, behind) = rest.split_at_mut(range.end - before);
                parts.push((with, &mut own[range.start - before..]));
                (rest, before) = (behind, range.end);
            }
        }
        parts
    }

    fn copy(&mut self, from: u32, to: u32) {
        let [from, to] = [from, to].map(|id| self.places[id as usize]);
        for &head in &self.heads {
            let (source, target) = (from.range(head), to.range(head));
            if from.slab == to.slab {
                self.slabs[to.slab].bytes_mut().copy_within(source, target.start);
            } else if let Ok([a, b]) = self.slabs.get_disjoint_mut([from.slab, to.slab]) {
                b.bytes_mut()[target].copy_from_slice(&a.bytes()[source]);
            }
        }
    }

    fn discard(&mut self, id: u32) {
        if let Some(&place) = self.places.get(id as usize) {
            for &head in &self.heads {
                self.slabs[place.slab].discard(place.range(head));
            }
        }
    }
}

/// The blocks of one head in one layer.
#[derive(Clone, Copy)]
pub(crate) struct HeadStore<'a> {
    full: &'a Slots,
    lean: &'a Slots,
    head: KvHead,
}

impl<'a> HeadStore<'a> {
    /// See [`Slots::head`].
    #[inline]
    pub(crate) fn get(&self, block: Block) -> &'a [u8] {
        match block {
            Block::Full(id) => self.full.head(id, self.head),
            Block::Lean(id) => self.lean.head(id, self.head),
        }
    }
}

/// Storage of every block of a cache, by layer.
pub(crate) struct Store {
    pub(crate) full: Vec<Slots>,
    pub(crate) lean: Vec<Slots>,
}

impl Store {
    pub(crate) fn new(layout: &CacheLayout, shape: ModelShape) -> Self {
        let full_head = |head: KvHead| Head {
            offset: layout.full_k_offset(head),
            bytes: layout.full_head_bytes(),
        };
        let lean_head = |layer: Layer, head: KvHead| Head {
            offset: layout.layer(layer).lean[head.0].k_offset,
            bytes: layout.layer(layer).lean_head_bytes(head),
        };
        let heads = || shape.kv_head_indices();
        let full = |_| Slots::new(layout.full_bytes, heads().map(full_head));
        let lean = |layer| {
            let heads = heads().map(|head| lean_head(layer, head));
            Slots::new(layout.layer(layer).lean_bytes, heads)
        };
        Self {
            full: shape.layer_indices().map(full).collect(),
            lean: shape.layer_indices().map(lean).collect(),
        }
    }

    /// Gives storage to a block in every layer.
    ///
    /// # Errors
    /// [`Error::SystemMemory`] when the system has no memory left.
    pub(crate) fn allocate(&mut self, block: Block) -> Result<()> {
        let (kind, id) = self.kind_mut(block);
        for slots in kind {
            slots.cover(id as usize).map_err(|bytes| Error::SystemMemory {
                what: "blocks of the cache",
                bytes: bytes as u64,
            })?;
        }
        Ok(())
    }

    /// Takes the storage of a block in every layer.
    pub(crate) fn free(&mut self, block: Block) {
        let (kind, id) = self.kind_mut(block);
        kind.iter_mut().for_each(|slots| slots.discard(id));
    }

    fn kind_mut(&mut self, block: Block) -> (&mut [Slots], u32) {
        match block {
            Block::Full(id) => (&mut self.full, id),
            Block::Lean(id) => (&mut self.lean, id),
        }
    }

    /// The blocks of one head.
    pub(crate) fn of_head(&self, layer: Layer, head: KvHead) -> HeadStore<'_> {
        HeadStore { full: &self.full[layer.0], lean: &self.lean[layer.0], head }
    }

    /// See [`Slots::head`].
    pub(crate) fn head(&self, layer: Layer, block: Block, head: KvHead) -> &[u8] {
        self.of_head(layer, head).get(block)
    }

    /// The same, to be written.
    pub(crate) fn head_mut(&mut self, layer: Layer, block: Block, head: KvHead) -> &mut [u8] {
        let (kind, id) = self.kind_mut(block);
        kind[layer.0].head_mut(id, head)
    }

    /// Copies a full block to another one, in every layer.
    pub(crate) fn copy(&mut self, from: u32, to: u32) {
        self.full.iter_mut().for_each(|slots| slots.copy(from, to));
    }

    /// Overwrites what a block holds, so that a test sees whether anybody reads it unwritten.
    #[cfg(any(test, debug_assertions))]
    pub(crate) fn poison(&mut self, block: Block) {
        let (kind, id) = self.kind_mut(block);
        for slots in kind {
            for head in (0..slots.heads.len()).map(KvHead) {
                slots.head_mut(id, head).fill(0xff); // NaN in every element type
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[cfg(all(feature = "huge-pages", target_os = "linux"))]
    use leank_core::{CacheConfig, LayoutRules, saved::BlockStore as _};

    use super::*;
    #[cfg(all(feature = "huge-pages", target_os = "linux"))]
    use crate::rows::Restoring;

    /// More than any machine can address, on the heap and in a mapping.
    #[test]
    fn memory_that_is_not_there_is_refused() {
        assert!(Slab::try_new(1 << 60).is_none());
        let heads = [Head { offset: 0, bytes: 1 << 60 }];
        let mut slots = Slots::new(1 << 60, heads.into_iter());
        assert_eq!(slots.cover(0), Err(1 << 60));
        assert_eq!((slots.places.len(), slots.slabs.len()), (0, 0));
    }

    #[cfg(all(feature = "huge-pages", target_os = "linux"))]
    #[test]
    fn pages_are_whole_whatever_their_size() {
        assert_eq!(whole_pages(4096..12_288, 4096), 4096..12_288);
        assert_eq!(whole_pages(64..600_064, 4096), 4096..598_016);
        assert_eq!(whole_pages(64..600_064, 1 << 16), 65_536..589_824);
        assert!(whole_pages(64..100_000, 1 << 16).is_empty());
        assert!(whole_pages(64..8000, 1 << 16).is_empty());
    }

    /// Whole pages of a block, and nothing of its neighbours; in a slab that is a mapping, of heads that end
    /// within pages.
    #[cfg(all(feature = "huge-pages", target_os = "linux"))]
    #[test]
    fn what_is_given_back_is_zero_and_nothing_else() {
        let slots = || {
            let heads =
                [Head { offset: 0, bytes: 600_000 }, Head { offset: 600_000, bytes: 300_064 }];
            let mut slots = Slots::new(900_064, heads.into_iter());
            slots.cover(7).unwrap();
            assert!(matches!(slots.slabs[slots.places[5].slab], Slab::Mapping { .. }));
            (0..8).for_each(|id| slots.head_mut(id, KvHead(0)).fill(7));
            (0..8).for_each(|id| slots.head_mut(id, KvHead(1)).fill(7));
            slots
        };
        let mut store = Store { full: vec![slots(), slots()], lean: vec![slots(), slots()] };
        store.free(Block::Full(5));
        // As a restoration that fails does.
        let shape = ModelShape { layers: 2, query_heads: 2, kv_heads: 2, head_dim: 64 };
        let config = CacheConfig::dense(shape).unwrap();
        let layout = CacheLayout::new(&config, LayoutRules::PACKED).unwrap();
        let mut restoring = Restoring { store: &mut store, config: &config, layout: &layout };
        restoring.free(Block::Lean(6));

        let kinds = [(&store.full, 5), (&store.lean, 6)];
        let all = kinds.iter().flat_map(|(kind, free)| kind.iter().map(move |slots| (slots, free)));
        for (slots, free) in all {
            for (id, head) in (0..8).flat_map(|id| [(id, KvHead(0)), (id, KvHead(1))]) {
                let bytes = slots.head(id, head);
                let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
                assert_eq!(zeros + bytes.iter().filter(|&&byte| byte == 7).count(), bytes.len());
                if id == *free {
                    let page = rustix::param::page_size();
                    assert!(zeros.is_multiple_of(page) && zeros + 2 * page > bytes.len());
                } else {
                    assert_eq!(zeros, 0, "block {id}");
                }
            }
        }
    }
}
