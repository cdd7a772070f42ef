//! Rows of a block, for sequences on disk: a layer of a block goes over to the host as a
//! whole, and its rows are picked there.

use cudarc::driver::{CudaStream, DriverError};
use leank_core::{
    Block, CacheConfig, CacheLayout, Error, Layer, LeanFormat, Result,
    quant::Scale,
    saved::{BlockStore, Rows, Tensor},
};

use crate::{store::Store, tiles::HeadPlace};

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

    fn place(&self, rows: &Rows) -> Option<HeadPlace> {
        let lean = matches!(rows.block, Block::Lean(_));
        HeadPlace::of(self.layout, self.config.shape.head_dim, (rows.layer, rows.head), lean)
    }

    /// Copies rows out.
    pub(crate) fn get(&self, rows: &Rows, bytes: &mut [u8]) {
        let Some(place) = self.place(rows) else { return };
        if let LeanFormat::Plain(_) = rows.format {
            for (to, (token, channel)) in bytes.chunks_exact_mut(2).zip(elements(rows)) {
                let at = place.element(rows.tensor, token, channel);
                to.copy_from_slice(&self.bytes[at..at + 2]);
            }
            return;
        }
        let (scales, codes) = bytes.split_at_mut(rows.scale_bytes());
        let (scales, _) = scales.as_chunks_mut::<{ Scale::BYTES }>();
        for (to, (token, channel)) in scales.iter_mut().zip(groups(rows)) {
            let scale = place.scale(rows.tensor, token, channel).get(&self.bytes);
            *to = scale.to_bits().to_le_bytes();
        }
        codes.fill(0);
        let bits = rows.format.bits();
        for (i, (token, channel)) in elements(rows).enumerate() {
            let code = place.code(rows.tensor, token, channel).get(&self.bytes);
            codes[i * bits / 8] |= code << (i * bits % 8);
        }
    }

    /// Copies rows in, where there were none.
    fn put(&mut self, rows: &Rows, bytes: &[u8]) {
        let Some(place) = self.place(rows) else { return };
        if let LeanFormat::Plain(_) = rows.format {
            for (from, (token, channel)) in bytes.chunks_exact(2).zip(elements(rows)) {
                let at = place.element(rows.tensor, token, channel);
                self.bytes[at..at + 2].copy_from_slice(from);
            }
            return;
        }
        let (scales, codes) = bytes.split_at(rows.scale_bytes());
        let (scales, _) = scales.as_chunks::<{ Scale::BYTES }>();
        for (from, (token, channel)) in scales.iter().zip(groups(rows)) {
            let scale = Scale::from_bits(u32::from_le_bytes(*from));
            place.scale(rows.tensor, token, channel).put(&mut self.bytes, scale);
        }
        let bits = rows.format.bits();
        for (i, (token, channel)) in elements(rows).enumerate() {
            // The code and, of 4 bits, what lies above it.
            let code = codes[i * bits / 8] >> (i * bits % 8);
            place.code(rows.tensor, token, channel).put(&mut self.bytes, code);
        }
    }
}

/// Token and channel of every element, in the order of the stream.
fn elements(rows: &Rows) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (tokens, channels) = (rows.tokens, rows.channels);
    let across = matches!(rows.format, LeanFormat::Plain(_)) || rows.tensor == Tensor::V;
    (0..tokens * channels)
        .map(move |i| if across { (i / channels, i % channels) } else { (i % tokens, i / tokens) })
}

/// Token and channel of the first element of every group that shares a scale, in the order of the
/// stream.
fn groups(rows: &Rows) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (tensor, group) = (rows.tensor, rows.format.group(rows.tensor));
    elements(rows).filter(move |&(token, channel)| match tensor {
        Tensor::K => token % group == 0,
        Tensor::V => channel % group == 0,
    })
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
    pub(crate) fn flush(&mut self) -> Result<()> {
        let Some((block, layer)) = self.dirty.take() else { return Ok(()) };
        self.store.write(self.stream, block, layer, &self.image.bytes).map_err(failed)
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
            self.flush()?;
            self.image.begin(rows);
        }
        self.image.put(rows, bytes);
        self.dirty = Some((rows.block, rows.layer));
        Ok(())
    }
}
