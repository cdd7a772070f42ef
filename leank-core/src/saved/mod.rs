//! Sequences on disk: a stream of bytes that any backend writes and any other reads.
//!
//! An engine saves a long prompt's cache and goes on with it later, in another process, on another
//! machine. [`save`] and [`restore`] own the format: what is in it, in which order, what is checked.
//! A backend hands over and takes plain rows of K and V ([`Rows`], [`BlockStore`]), so the stream
//! does not depend on how a backend lays its blocks out.
//!
//! Blocks come back as what they were, full or lean, and elements bit for bit: a restored sequence
//! gives the same results on the same backend. It shares no blocks with others, even where the
//! saved one did.
//!
//! A stream goes to a file through `files::write_atomic` (feature `files`), which puts it there as
//! a whole or not at all.
//!
//! # Format, versions 1 and 2
//! Version 2 is written where lean blocks hold codes ([`quant`](crate::quant)), version 1 otherwise.
//! They differ in the formats that they may name. All numbers are little-endian. Every part ends with
//! a `u32`: the CRC-32 (zlib's) of all bytes before it since the start of the stream, earlier checksums
//! left out.
//!
//! | part | bytes |
//! |---|---|
//! | header | `LEANKSEQ`, `u32` version, `u32` length of what follows without the checksum; `u32` layers, query heads, KV heads, head_dim, tokens per block; `u64` sink, recent (all ones: everything), tokens of the sequence, end of its lean blocks (index in the block table); `u8` element type (0 f32, 1 f16, 2 bf16); per layer and KV head two `u8`, lean formats of K and V (the element types' numbers; in version 2 also 3 int8, 4 int4, 5 fp8); per layer and KV head ⌈head_dim/8⌉ bytes, bit `c % 8` of byte `c / 8` is 1 where channel `c` is kept; `u32` length and UTF-8 text that identifies the model, or nothing |
//! | per block, per layer | per KV head K `[tokens, channels]`, then V `[tokens, head_dim]`. A full block has all channels in the element type. A lean one has the kept channels, ascending, in the lean formats, and nothing of a dead head. The last block has only the tokens that are there |
//!
//! In int8, int4 and fp8, K is `[channels, tokens]` and V `[tokens, channels]`, so that the groups of elements
//! that share a scale lie in rows. First come the scales of all groups, row by row: a bf16 step, an `i16`
//! zero point. Then come the codes, row after row: in int8 and fp8 a byte each; in int4 two in a byte, the
//! first one in the lower half, across the ends of rows, and the upper half of the last byte is 0 where
//! their number is odd.
//!
//! Blocks before the sink's end are full, those from there to the end of the lean blocks are lean,
//! the others are full. Nothing follows the last block, so several sequences may lie in one stream.
//!
//! # Streams from strangers
//! A stream is read only into a cache of the same shape, windows, block size, types and mask;
//! anything else is an [`Error::Mismatch`]. What is damaged, cut short or impossible is an
//! [`Error::Format`], and so are scales that no packing makes ([`Scale::is_valid`]). Apart from that K
//! and V are taken as they are, as [`Cache::append`](crate::Cache::append) takes them. Storage grows
//! with the blocks that are really there, whatever the header claims. After an error the sequence is
//! gone and its blocks are free.

mod crc;
mod header;
mod stream;

use std::io::{Read, Write};

pub use crate::Tensor;
use crate::{
    Block, CacheConfig, Error, KvHead, Layer, LeanFormat, Ledger, Result, SequenceId,
    blocks::Granted, quant::Scale,
};
use header::Header;
use stream::{In, Out, bad};

/// What the format is called in messages.
const FORMAT: &str = "leank sequence";
/// What the bytes are called in messages: a stream has no path.
const NAME: &str = "the saved sequence";

/// K or V of one head in one block of one layer: plain elements `[tokens, channels]`, little-endian,
/// rows without gaps; or scales and codes as the [format](self) has them.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Rows {
    /// The layer.
    pub layer: Layer,
    /// The KV head; live where the block is lean.
    pub head: KvHead,
    /// The block.
    pub block: Block,
    /// K or V.
    pub tensor: Tensor,
    /// The first tokens of the block; fewer than it can hold only in the last block of a sequence.
    pub tokens: usize,
    /// Channels: the kept ones in ascending order for K of a lean block, `head_dim` otherwise.
    pub channels: usize,
    /// How they are stored.
    pub format: LeanFormat,
}

impl Rows {
    /// Bytes of all rows.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.format.bytes(self.tensor, self.tokens, self.channels)
    }

    /// Bytes of the scales, which come first: none of plain elements.
    #[must_use]
    pub fn scale_bytes(&self) -> usize {
        self.format.scale_bytes(self.tensor, self.tokens, self.channels)
    }

    /// The number of the first scale that no packing makes.
    fn bad_scale(&self, bytes: &[u8]) -> Option<usize> {
        let (scales, _) = bytes[..self.scale_bytes()].as_chunks::<{ Scale::BYTES }>();
        let valid =
            |bits: &[u8; Scale::BYTES]| Scale::from_bits(u32::from_le_bytes(*bits)).is_valid();
        scales.iter().position(|bits| !valid(bits))
    }
}

/// Storage of a backend's blocks, which takes plain rows.
pub trait BlockStore {
    /// Gives storage to a block in every layer; on failure it has none in any.
    ///
    /// # Errors
    /// [`Error::SystemMemory`].
    fn allocate(&mut self, block: Block) -> Result<()>;

    /// Takes the storage of a block in every layer.
    fn free(&mut self, block: Block);

    /// Copies `bytes`, which has [`Rows::bytes`], to rows of a block that has storage.
    ///
    /// # Errors
    /// Those of the device.
    fn write_rows(&mut self, rows: &Rows, bytes: &[u8]) -> Result<()>;
}

/// Writes a sequence to `out`. `read` copies rows of a block to bytes, of which there are
/// [`Rows::bytes`].
///
/// # Errors
/// [`Error::UnknownSequence`]; [`Error::Order`] while a step is under way; [`Error::Io`] when
/// writing fails; those of `read`.
pub fn save(
    ledger: &Ledger,
    config: &CacheConfig,
    sequence: SequenceId,
    mut read: impl FnMut(&Rows, &mut [u8]) -> Result<()>,
    out: &mut dyn Write,
) -> Result<()> {
    ledger.outside_a_step("save")?;
    let (tokens, packed) = (ledger.len(sequence)?, ledger.lean_blocks(sequence)?.end);
    let mut out = Out::new(out);
    Header { tokens, packed }.write(config, &mut out)?;
    let mut bytes = Vec::new();
    for (index, &block) in ledger.table(sequence)?.iter().enumerate() {
        let tokens = (tokens - index * config.block).min(config.block);
        for layer in config.shape.layer_indices() {
            let section = Section { config, layer, block, tokens };
            bytes.resize(section.bytes(), 0);
            let mut rest = &mut bytes[..];
            for rows in section.rows() {
                let (part, behind) = rest.split_at_mut(rows.bytes());
                read(&rows, part)?;
                rest = behind;
            }
            out.section(&bytes)?;
        }
    }
    out.finish()
}

/// Reads a sequence that [`save`] wrote. Reads no byte beyond it.
///
/// # Errors
/// [`Error::Mismatch`] for a sequence of a cache of another configuration, [`Error::Format`] for
/// bytes that are none, damaged or cut short, [`Error::OutOfMemory`], [`Error::SystemMemory`],
/// [`Error::Order`] while a step is under way, [`Error::Io`] when reading fails; those of the
/// storage. Then no sequence was added.
pub fn restore(
    ledger: &mut Ledger,
    config: &CacheConfig,
    store: &mut impl BlockStore,
    input: &mut dyn Read,
) -> Result<SequenceId> {
    ledger.outside_a_step("restore")?;
    let mut input = In::new(input);
    let Header { tokens, packed } = Header::read(config, &mut input)?;
    let mut restoring = ledger.restore(tokens, packed).map_err(|error| match error {
        Error::Invalid { .. } => bad(error),
        error => error,
    })?;
    let mut bytes = Vec::new();
    while let Some(granted) = restoring.next_block()? {
        let Granted { index, block, allocate, .. } = granted;
        granted.reclaim.iter().for_each(|&free| store.free(free));
        if allocate && let Err(error) = store.allocate(block) {
            restoring.no_storage();
            return Err(error);
        }
        for layer in config.shape.layer_indices() {
            let section = Section { config, layer, block, tokens: granted.tokens };
            bytes.resize(section.bytes(), 0);
            let name = format!("block {index}, layer {layer}");
            input.fill(&mut bytes, &name)?;
            input.check(&name)?;
            let mut rest = &bytes[..];
            for rows in section.rows() {
                let (part, behind) = rest.split_at(rows.bytes());
                if let Some(at) = rows.bad_scale(part) {
                    let Rows { head, tensor, .. } = rows;
                    return Err(bad(format!(
                        "scale {at} of {tensor:?} of KV head {head} in {name} is none that packing \
                         makes; save the sequence again"
                    )));
                }
                store.write_rows(&rows, part)?;
                rest = behind;
            }
        }
    }
    Ok(restoring.finish())
}

/// One layer of one block.
#[derive(Clone, Copy)]
struct Section<'a> {
    config: &'a CacheConfig,
    layer: Layer,
    block: Block,
    tokens: usize,
}

impl<'a> Section<'a> {
    fn rows(self) -> impl Iterator<Item = Rows> + use<'a> {
        let Self { config, layer, block, tokens } = self;
        let lean = matches!(block, Block::Lean(_));
        let live = move |head: &KvHead| !(lean && config.mask.head(layer, *head).is_dead());
        config.shape.kv_head_indices().filter(live).flat_map(move |head| {
            [Tensor::K, Tensor::V].map(|tensor| {
                let format = if lean {
                    config.format(layer, head).of(tensor)
                } else {
                    LeanFormat::Plain(config.dtype)
                };
                let channels = match (lean, tensor) {
                    (true, Tensor::K) => config.mask.head(layer, head).kept_count(),
                    _ => config.shape.head_dim,
                };
                Rows { layer, head, block, tensor, tokens, channels, format }
            })
        })
    }

    fn bytes(self) -> usize {
        self.rows().map(|rows| rows.bytes()).sum()
    }
}
