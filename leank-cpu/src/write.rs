//! Into the blocks: new rows of K and V, and the packing of full blocks into lean ones.
//!
//! Each piece of work writes one head of one block, so pieces run side by side, in any order.

use std::sync::{Mutex, PoisonError};

use bytemuck::Zeroable as _;
use leank_core::{
    Block, CacheConfig, CacheLayout, Dtype, HostView, KvHead, Layer, LeanFormat, Ledger, Pack,
    Result,
};

use crate::{
    codes::Quantised,
    element::{Element, convert, with_element},
    executor::Executor,
    kernel::{Kernel, Loops, Simd},
    panels::{HeadPlace, Matrix, PANEL, Section},
    running::Line,
    store::Store,
};

/// Fewest bytes of full blocks worth waking other threads for: writing them takes some 80
/// microseconds, waking rayon's threads 15 to 50.
const MIN_PARALLEL: usize = 512 << 10;

/// Writes to the blocks of a cache.
#[derive(Clone, Copy)]
pub(crate) struct Writer<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) kernel: Kernel,
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

/// Rows of K or V that come in.
struct Rows<'a> {
    view: HostView<'a>,
    /// The channels that will be stored; all of them without.
    kept: Option<&'a [u16]>,
    /// Elements of a row in storage; those beyond the channels are zero.
    width: usize,
}

/// What a piece of work works in.
#[derive(Default)]
struct Scratch {
    /// One row in single precision.
    wide: Vec<f32>,
    /// Rows of a panel as they will be stored: memory for elements of any type.
    stored: Vec<f32>,
    /// Codes of one row.
    codes: Vec<u8>,
    /// A full block of one head, on the way to a lean one with codes.
    block: Vec<Line>,
}

/// A full block of one head to be packed.
struct Whole<'a> {
    kept: &'a [u16],
    whole: HeadPlace,
    packed: HeadPlace,
    from: &'a [u8],
}

/// One head of a block of plain elements, to be written.
struct Plain<'a> {
    place: HeadPlace,
    /// Of K and V.
    types: [Dtype; 2],
    /// The channels of K that are stored; all of them without.
    kept: Option<&'a [u16]>,
    bytes: &'a mut [u8],
}

/// Writing new tokens of one head to a block of plain elements.
struct Appending<'a> {
    writer: Writer<'a>,
    run: &'a Run,
    to: Plain<'a>,
    views: [HostView<'a>; 2],
    scratch: &'a mut Scratch,
}

/// Packing one head of a block.
struct Packing<'a> {
    block: Whole<'a>,
    bytes: &'a mut [u8],
    scratch: &'a mut Scratch,
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
        self.for_each(runs, elements, |scratch, (run, bytes)| {
            self.write_run(&run, bytes, [k, v], scratch);
        });
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
                let kept = self.config.mask.head(layer, head).kept();
                Some((lean, head, Whole { kept, whole, packed, from }))
            };
            let heads = |pack| shape.kv_head_indices().map(move |head| (pack, head));
            packings.extend(lean.heads_mut(packs.iter().flat_map(heads).filter_map(of_head)));
        }
        let elements = 2 * packings.len() * self.layout.block * shape.head_dim;
        self.for_each(packings, elements, |scratch, (block, bytes)| {
            self.kernel.run(Packing { block, bytes, scratch });
        });
    }

    /// Does pieces of work that write so many elements of full blocks together.
    fn for_each<T: Send>(
        self,
        pieces: Vec<T>,
        elements: usize,
        work: impl Fn(&mut Scratch, T) + Sync,
    ) {
        if elements * self.config.dtype.bytes() < MIN_PARALLEL {
            let mut scratch = Scratch::default();
            return pieces.into_iter().for_each(|piece| work(&mut scratch, piece));
        }
        let pieces: Vec<_> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
        self.executor.run(pieces.len(), &|i| {
            let piece = pieces[i].lock().unwrap_or_else(PoisonError::into_inner).take();
            piece.into_iter().for_each(|piece| work(&mut Scratch::default(), piece));
        });
    }

    fn place(self, layer: Layer, head: KvHead, block: Block) -> Option<HeadPlace> {
        HeadPlace::of(self.config, self.layout, (layer, head), block)
    }
}

impl Loops for Appending<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { writer, run, to, views: [k, v], scratch } = self;
        let Plain { place, types, kept, bytes } = to;
        with_element!(types[0], T => {
            let mut to = place.k.panels_mut::<T>(bytes);
            let from = Rows { view: k, kept, width: to.depth };
            writer.write(run, from, scratch, |first, rows| to.write_lanes(simd, first, rows));
        });
        with_element!(types[1], T => {
            let mut to = place.v.panels_mut::<T>(bytes);
            let from = Rows { view: v, kept: None, width: to.lanes };
            writer.write(run, from, scratch, |first, rows| to.write_rows(first, rows));
        });
    }
}

impl Writer<'_> {
    /// Writes new tokens of one head to one block.
    fn write_run(
        self,
        run: &Run,
        bytes: &mut [u8],
        views: [HostView<'_>; 2],
        scratch: &mut Scratch,
    ) {
        let (config, place) = (self.config, run.place);
        let kept = config.mask.head(run.layer, run.head).kept();
        if let (LeanFormat::Plain(k), LeanFormat::Plain(v)) = (place.k.format, place.v.format) {
            let to = Plain { place, types: [k, v], kept: place.lean.then_some(kept), bytes };
            return self.kernel.run(Appending { writer: self, run, to, views, scratch });
        }
        // Scales need all tokens of the block, which come together: blocks that are not written as a
        // whole are full ones.
        let Some(whole) = self.place(run.layer, run.head, Block::Full(0)) else { return };
        let mut block = std::mem::take(&mut scratch.block);
        block.resize(self.layout.full_head_bytes().div_ceil(size_of::<Line>()), Line::zeroed());
        let from = bytemuck::cast_slice_mut(&mut block);
        let to = Plain { place: whole, types: [config.dtype; 2], kept: None, bytes: from };
        self.kernel.run(Appending { writer: self, run, to, views, scratch });
        let from = bytemuck::cast_slice(&block);
        let packing = Whole { kept, whole, packed: place, from };
        self.kernel.run(Packing { block: packing, bytes, scratch });
        scratch.block = block;
    }

    /// Hands over rows `[tokens, width]` as they will be stored, those of a panel of lanes at a
    /// time, with the index of the first token in its block.
    #[inline(always)]
    fn write<T: Element>(
        self,
        run: &Run,
        from: Rows<'_>,
        scratch: &mut Scratch,
        mut write: impl FnMut(usize, &[T]),
    ) {
        let Rows { view, kept, width } = from;
        let Scratch { wide, stored, .. } = scratch;
        wide.resize(self.config.shape.head_dim, 0.0);
        stored.clear();
        stored.resize((PANEL.min(run.tokens) * width * size_of::<T>()).div_ceil(4), 0.0);
        let rows: &mut [T] = bytemuck::cast_slice_mut(stored);
        let mut done = 0;
        while done < run.tokens {
            let first = run.first + done;
            let tokens = (PANEL - first % PANEL).min(run.tokens - done);
            for (i, row) in rows.chunks_exact_mut(width).take(tokens).enumerate() {
                view.read_row(run.row + done + i, run.head.0, wide);
                let count = kept.map_or(wide.len(), |kept| compact(wide, kept));
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
}

impl Loops for Packing<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Self { block: Whole { kept, whole, packed, from }, bytes, scratch } = self;
        // K and V of full blocks are of one type.
        let LeanFormat::Plain(full) = whole.k.format else { return };
        with_element!(full, S => {
            let kept = kept.iter().copied().map(usize::from);
            pack::<S>(whole.k.of(from), packed.k, kept, (bytes, scratch));
            if whole.v.format == packed.v.format {
                packed.v.bytes_mut(bytes).copy_from_slice(whole.v.of(from).bytes);
            } else {
                let tokens = 0..whole.k.lanes;
                pack::<S>(whole.v.of(from), packed.v, tokens, (bytes, scratch));
            }
        });
    }
}

/// Packs the rows of a full block's K or V, whose elements are `S`.
#[inline(always)]
fn pack<S: Element>(
    from: Matrix<'_>,
    to: Section,
    rows: impl ExactSizeIterator<Item = usize> + Clone,
    (bytes, scratch): (&mut [u8], &mut Scratch),
) {
    let from = from.panels::<S>();
    if let LeanFormat::Plain(dtype) = to.format {
        return with_element!(dtype, T => to.panels_mut::<T>(bytes).gather(from, rows));
    }
    let Scratch { wide, codes, .. } = scratch;
    let mut to = to.codes_mut(bytes);
    wide.clear();
    wide.resize(to.shape.lanes, 0.0);
    let shape = to.shape;
    to.write(rows.len(), codes, Quantised { from, rows, shape, wide });
}

/// Moves the kept channels to the front; their number.
#[inline(always)]
fn compact(row: &mut [f32], kept: &[u16]) -> usize {
    for (i, &channel) in kept.iter().enumerate() {
        row[i] = row[usize::from(channel)];
    }
    kept.len()
}
