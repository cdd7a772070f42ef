//! Plain rows of a block, for sequences on disk: a layer of a block goes over to the host as a
//! whole, and its rows are picked there.

use cudarc::driver::{CudaStream, DriverError};
use leank_core::{
    Block, CacheConfig, CacheLayout, Error, Layer, Result,
    saved::{BlockStore, Rows},
};

use crate::{driver::Driver, store::Store, tiles::HeadPlace};

/// One layer of one block, in host memory.
pub(crate) struct BlockImage<'a> {
    config: &'a CacheConfig,
    layout: &'a CacheLayout,
    of: Option<(Block, Layer)>,
    bytes: Vec<u8>,
}

impl<'a> BlockImage<'a> {
    pub(crate) fn new(config: &'a CacheConfig, layout: &'a CacheLayout) -> Self {
        Self { config, layout, of: None, bytes: Vec::new() }
    }

    /// Whether it is the block and layer of `rows`.
    pub(crate) fn is_of(&self, rows: &Rows) -> bool {
        self.of == Some((rows.block, rows.layer))
    }

    /// Becomes the block and layer of `rows`, to be filled: zeros.
    pub(crate) fn begin(&mut self, rows: &Rows) -> &mut [u8] {
        let bytes = match rows.block {
            Block::Full(_) => self.layout.full_bytes,
            Block::Lean(_) => self.layout.layer(rows.layer).lean_bytes,
        };
        self.of = Some((rows.block, rows.layer));
        self.bytes.clear();
        self.bytes.resize(bytes, 0);
        &mut self.bytes
    }

    /// Byte offset of each element of `rows`, in the order of the stream.
    fn places(&self, rows: &Rows) -> impl Iterator<Item = usize> + use<> {
        let lean = matches!(rows.block, Block::Lean(_));
        let head = (rows.layer, rows.head);
        let place = HeadPlace::of(self.layout, self.config.shape.head_dim, head, lean);
        let (tensor, channels, tokens) = (rows.tensor, rows.channels, rows.tokens);
        place.into_iter().flat_map(move |place| {
            (0..tokens * channels).map(move |i| place.element(tensor, i / channels, i % channels))
        })
    }

    /// Copies rows out.
    pub(crate) fn get(&self, rows: &Rows, bytes: &mut [u8]) {
        for (to, at) in bytes.chunks_exact_mut(2).zip(self.places(rows)) {
            to.copy_from_slice(&self.bytes[at..at + 2]);
        }
    }

    /// Copies rows in.
    fn put(&mut self, rows: &Rows, bytes: &[u8]) {
        let places = self.places(rows);
        for (from, at) in bytes.chunks_exact(2).zip(places) {
            self.bytes[at..at + 2].copy_from_slice(from);
        }
    }
}

/// The blocks of a cache, to be filled from a saved sequence.
pub(crate) struct Restoring<'a> {
    pub(crate) store: &'a mut Store,
    pub(crate) stream: &'a CudaStream,
    pub(crate) image: BlockImage<'a>,
    /// What `image` holds that the device does not have yet.
    pub(crate) dirty: Option<(Block, Layer)>,
    pub(crate) poison: bool,
}

impl Restoring<'_> {
    /// Writes what is held back.
    pub(crate) fn flush(&mut self) -> Driver<()> {
        let Some((block, layer)) = self.dirty.take() else { return Ok(()) };
        self.store.write(self.stream, block, layer, &self.image.bytes)
    }
}

fn failed(error: DriverError) -> Error {
    let why = error.to_string();
    Error::Device { device: "CUDA".into(), action: "writing a block", why }
}

impl BlockStore for Restoring<'_> {
    fn allocate(&mut self, block: Block) -> Result<()> {
        self.store.allocate(block)?;
        if self.poison {
            self.store.poison(self.stream, block).map_err(failed)?;
        }
        Ok(())
    }

    fn free(&mut self, block: Block) {
        self.store.free(block);
    }

    fn write_rows(&mut self, rows: &Rows, bytes: &[u8]) -> Result<()> {
        if !self.image.is_of(rows) {
            self.flush().map_err(failed)?;
            self.image.begin(rows);
        }
        self.image.put(rows, bytes);
        self.dirty = Some((rows.block, rows.layer));
        Ok(())
    }
}
