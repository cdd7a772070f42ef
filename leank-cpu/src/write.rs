//! Into the blocks: new rows of K and V, and the packing of full blocks into lean ones.
//!
//! Each piece of work writes one head of one block, so pieces run side by side, in any order.

use std::sync::{Mutex, PoisonError};

use leank_core::{Block, CacheConfig, CacheLayout, HostView, KvHead, Layer, Ledger, Pack, Result};

use crate::{
    element::{Element, convert, with_element},
    executor::Executor,
    panels::{HeadPlace, PANEL},
    store::Store,
};

/// Fewest bytes of full blocks worth waking other threads for.
const MIN_PARALLEL: usize = 256 << 10;

/// Writes to the blocks of a cache.
#[derive(Clone, Copy)]
pub(crate) struct Writer<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) executor: &'a dyn Executor,
}

/// New tokens of one head that go to one block.
struct Run {
    layer: Layer,
    head: KvHead,
    place: HeadPlace,
    /// Index of the first one in the block.
    first: usize,
    /// Its row in the step.
    row: usize,
    tokens: usize,
}

/// A full block of one head to be packed.
struct Packing<'a> {
    layer: Layer,
    head: KvHead,
    whole: HeadPlace,
    packed: HeadPlace,
    from: &'a [u8],
}

impl Writer<'_> {
    /// Writes the new tokens of the step under way to the blocks of a layer. Values are stored as
    /// they are, rounded; rows that go straight to lean blocks are rounded to the type of full
    /// ones first, so that the road by which a token came does not show.
    pub(crate) fn append(
        self,
        ledger: &Ledger,
        store: &mut Store,
        layer: Layer,
        [k, v]: [HostView<'_>; 2],
    ) -> Result<()> {
        let block = self.layout.block;
        let (mut full, mut lean) = (Vec::new(), Vec::new());
        for sequence in ledger.step().map_or(&[][..], |step| &step.sequences) {
            let table = ledger.table(sequence.id)?;
            let mut position = sequence.start;
            let end = sequence.start + sequence.tokens;
            while position < end {
                let first = position % block;
                let tokens = (block - first).min(end - position);
                let row = sequence.row + position - sequence.start;
                let to = table[position / block];
                for head in self.config.shape.kv_head_indices() {
                    let Some(place) = self.place(layer, head, to) else { continue };
                    let run = Run { layer, head, place, first, row, tokens };
                    match to {
                        Block::Full(id) => full.push((id, head, run)),
                        Block::Lean(id) => lean.push((id, head, run)),
                    }
                }
                position += tokens;
            }
        }
        let mut runs = store.full[layer.0].heads_mut(full.into_iter());
        runs.extend(store.lean[layer.0].heads_mut(lean.into_iter()));
        let elements = 2 * k.shape().tokens * k.shape().heads * k.shape().head_dim;
        self.for_each(runs, elements, |(run, bytes)| self.write(&run, bytes, [k, v]));
        Ok(())
    }

    /// Packs full blocks into lean ones, in every layer.
    pub(crate) fn pack(self, packs: &[Pack], store: &mut Store) {
        let shape = self.config.shape;
        let Store { full, lean } = store;
        let mut packings = Vec::new();
        for (layer, (full, lean)) in shape.layer_indices().zip(full.iter().zip(lean)) {
            let of_head = |(&Pack { full: id, lean }, head)| {
                let whole = self.place(layer, head, Block::Full(id))?;
                let packed = self.place(layer, head, Block::Lean(lean))?;
                let from = full.head(id, head);
                Some((lean, head, Packing { layer, head, whole, packed, from }))
            };
            let heads = |pack| shape.kv_head_indices().map(move |head| (pack, head));
            packings.extend(lean.heads_mut(packs.iter().flat_map(heads).filter_map(of_head)));
        }
        let elements = 2 * packings.len() * self.layout.block * shape.head_dim;
        self.for_each(packings, elements, |(packing, bytes)| self.pack_head(&packing, bytes));
    }

    /// Does pieces of work that write so many elements of full blocks together.
    fn for_each<T: Send>(self, pieces: Vec<T>, elements: usize, work: impl Fn(T) + Sync) {
        if elements * self.config.dtype.bytes() < MIN_PARALLEL {
            return pieces.into_iter().for_each(work);
        }
        let pieces: Vec<_> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
        self.executor.run(pieces.len(), &|i| {
            let piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner).take();
            piece.into_iter().for_each(&work);
        });
    }

    fn place(self, layer: Layer, head: KvHead, block: Block) -> Option<HeadPlace> {
        HeadPlace::of(self.config, self.layout, (layer, head), block)
    }

    fn write(self, run: &Run, bytes: &mut [u8], [k, v]: [HostView<'_>; 2]) {
        let kept = self.config.mask.head(run.layer, run.head).kept();
        with_element!(run.place.k.dtype, T => {
            let mut to = run.place.k.panels_mut::<T>(bytes);
            let kept = run.place.lean.then_some(kept);
            self.write_rows(run, k, kept, to.depth, |first, rows| to.write_lanes(first, rows));
        });
        with_element!(run.place.v.dtype, T => {
            let mut to = run.place.v.panels_mut::<T>(bytes);
            self.write_rows(run, v, None, to.lanes, |first, rows| to.write_rows(first, rows));
        });
    }

    /// Hands over rows `[tokens, width]` as they will be stored, those of a panel of lanes at a
    /// time, with the index of the first token in its block. Channels beyond the view's are zero.
    fn write_rows<T: Element>(
        self,
        run: &Run,
        from: HostView<'_>,
        kept: Option<&[u16]>,
        width: usize,
        mut write: impl FnMut(usize, &[T]),
    ) {
        let mut wide = vec![0.0; self.config.shape.head_dim];
        let mut rows = vec![T::zeroed(); PANEL.min(run.tokens) * width];
        let mut done = 0;
        while done < run.tokens {
            let first = run.first + done;
            let tokens = (PANEL - first % PANEL).min(run.tokens - done);
            for (i, row) in rows.chunks_exact_mut(width).take(tokens).enumerate() {
                from.read_row(run.row + done + i, run.head.0, &mut wide);
                let count = kept.map_or(wide.len(), |kept| compact(&mut wide, kept));
                with_element!(self.config.dtype, Full => {
                    for (to, &x) in row.iter_mut().zip(&wide[..count]) {
                        *to = convert::<Full, T>(Full::narrow(x));
                    }
                });
            }
            write(first, &rows[..tokens * width]);
            done += tokens;
        }
    }

    fn pack_head(self, packing: &Packing<'_>, bytes: &mut [u8]) {
        let Packing { whole, packed, from, .. } = *packing;
        let kept = self.config.mask.head(packing.layer, packing.head).kept();
        with_element!(self.config.dtype, S => {
            with_element!(packed.k.dtype, T => {
                let kept = kept.iter().copied().map(usize::from);
                packed.k.panels_mut::<T>(bytes).gather(whole.k.panels::<S>(from), kept);
            });
            if whole.v.dtype == packed.v.dtype {
                packed.v.bytes_mut(bytes).copy_from_slice(whole.v.bytes(from));
            } else {
                with_element!(packed.v.dtype, T => {
                    let tokens = 0..self.layout.block;
                    packed.v.panels_mut::<T>(bytes).gather(whole.v.panels::<S>(from), tokens);
                });
            }
        });
    }
}

/// Moves the kept channels to the front; their number.
fn compact(row: &mut [f32], kept: &[u16]) -> usize {
    for (i, &channel) in kept.iter().enumerate() {
        row[i] = row[usize::from(channel)];
    }
    kept.len()
}
