//! The tables of a step: what kernels must know of its sequences and blocks, in one upload.

use std::sync::Arc;

use bytemuck::cast_slice;
use cudarc::driver::{CudaContext, CudaStream};
use leank_core::{Block, Error, Ledger, Result};

use crate::{
    driver::{Buffer, Driver, Staging},
    records::{Pair, Sequence},
    tiles::TILE,
};

/// What the tables depend on beside the ledger.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dimensions {
    pub(crate) kv_heads: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
    /// Tokens per block.
    pub(crate) block: usize,
}

/// The tables of the step under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    /// Sequences that attend; `before` and `tiles` count items.
    pub(crate) attending: Vec<Sequence>,
    /// All sequences; `before` counts slices to write.
    pub(crate) writing: Vec<Sequence>,
    pub(crate) packs: Vec<Pair>,
    pub(crate) copies: Vec<Pair>,
    /// Table entries of all sequences.
    pub(crate) entries: Vec<u64>,
    /// Query rows per item.
    pub(crate) rows: usize,
    /// Items of attention: sequences times KV heads times tiles of rows.
    pub(crate) items: usize,
    /// Most slices that the new tokens lie in.
    pub(crate) slices: usize,
}

/// Most slices that consecutive tokens can lie in, wherever they begin: one for one token, so that
/// the launch of a decode step is the same whatever the lengths are.
fn most_slices(tokens: usize, block: usize) -> usize {
    let blocks = (tokens + block - 2) / block + 1;
    tokens.min(blocks * block.div_ceil(TILE))
}

impl Tables {
    /// The tables of the step under way; `entry` says where a block lies and `rows`, how many query
    /// rows an item has where a KV head has so many in a sequence.
    ///
    /// # Errors
    /// [`Error::Invalid`] for sequences or steps longer than kernels count.
    pub(crate) fn build(
        ledger: &Ledger,
        dimensions: Dimensions,
        entry: impl Fn(Block) -> u64,
        rows: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let Dimensions { kv_heads, group, block } = dimensions;
        let Some(step) = ledger.step() else { return Ok(Self::default()) };
        let number = |number: usize| {
            // Half of what u32 holds: kernels add tokens to positions.
            let fits = u32::try_from(number).ok().filter(|&number| number <= u32::MAX / 2);
            fits.ok_or_else(|| {
                Error::invalid("step", "it has more than 2^31 tokens, blocks or rows")
            })
        };
        let attending = || step.sequences.iter().filter(|sequence| sequence.attend);
        let longest = attending().map(|sequence| sequence.tokens * group).max().unwrap_or(1);
        let mut tables = Self { rows: rows(longest), ..Self::default() };
        for sequence in &step.sequences {
            let lean = ledger.lean_blocks(sequence.id)?;
            let common = Sequence {
                table: number(tables.entries.len())?,
                start: number(sequence.start)?,
                tokens: number(sequence.tokens)?,
                row: number(sequence.row)?,
                lean_begin: number(lean.start.min(u32::MAX as usize / 2))?,
                lean_end: number(lean.end.min(u32::MAX as usize / 2))?,
                before: 0,
                tiles: 0,
            };
            number(sequence.start + sequence.tokens)?;
            number(sequence.tokens.saturating_mul(group))?;
            tables.entries.extend(ledger.table(sequence.id)?.iter().map(|&block| entry(block)));
            tables.writing.push(Sequence { before: number(tables.slices)?, ..common });
            tables.slices += most_slices(sequence.tokens, block);
            if sequence.attend {
                let tiles = (sequence.tokens * group).div_ceil(tables.rows);
                let before = number(tables.items)?;
                tables.attending.push(Sequence { before, tiles: number(tiles)?, ..common });
                tables.items += kv_heads * tiles;
            }
        }
        number(tables.items)?;
        number(tables.slices)?;
        let pair = |from, to| Pair { from: entry(from), to: entry(to) };
        let packs =
            step.packs.iter().map(|pack| pair(Block::Full(pack.full), Block::Lean(pack.lean)));
        let copies =
            step.copies.iter().map(|copy| pair(Block::Full(copy.from), Block::Full(copy.to)));
        tables.packs = packs.collect();
        tables.copies = copies.collect();
        Ok(tables)
    }
}

/// Numbers of things that the device's tables have room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Room {
    sequences: usize,
    pairs: usize,
    entries: usize,
}

impl Room {
    /// What there is room for from the first step on: growing moves the tables, and graphs that were
    /// captured before must be captured again.
    const LEAST: Self = Self { sequences: 64, pairs: 64, entries: 4096 };

    /// Room for `tables`, where this is too little; doubled, so that it seldom grows.
    fn for_tables(self, tables: &Tables) -> Self {
        let grown = |have: usize, want: usize| {
            if want <= have { have } else { want.next_power_of_two() }
        };
        Self {
            sequences: grown(self.sequences.max(Self::LEAST.sequences), tables.writing.len()),
            pairs: grown(
                self.pairs.max(Self::LEAST.pairs),
                tables.packs.len().max(tables.copies.len()),
            ),
            entries: grown(self.entries.max(Self::LEAST.entries), tables.entries.len()),
        }
    }

    /// Byte offsets of: attending, writing, packs, copies, entries; and the end.
    fn offsets(self) -> [usize; 6] {
        let sequences = self.sequences * size_of::<Sequence>();
        let pairs = self.pairs * size_of::<Pair>();
        let mut end = 0;
        [0, sequences, sequences, pairs, pairs, self.entries * 8].map(|bytes| {
            end += bytes;
            end
        })
    }
}

/// The tables on the device. They stay where they are until they must grow.
#[derive(Debug)]
pub(crate) struct DeviceTables {
    context: Arc<CudaContext>,
    staging: Staging,
    room: Room,
    tables: Buffer,
}

/// Addresses of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Addresses {
    pub(crate) attending: u64,
    pub(crate) writing: u64,
    pub(crate) packs: u64,
    pub(crate) copies: u64,
    pub(crate) entries: u64,
}

impl DeviceTables {
    pub(crate) fn new(context: &Arc<CudaContext>) -> Driver<Self> {
        Ok(Self {
            context: Arc::clone(context),
            staging: Staging::new(context),
            room: Room::default(),
            tables: Buffer::new(context, 0)?,
        })
    }

    pub(crate) fn addresses(&self) -> Addresses {
        let [attending, writing, packs, copies, entries, _] =
            self.room.offsets().map(|offset| self.tables.address() + offset as u64);
        Addresses { attending, writing, packs, copies, entries }
    }

    /// Bytes of device memory.
    pub(crate) fn bytes(&self) -> usize {
        self.tables.bytes()
    }

    /// Copies the tables of a step to the device, in stream order.
    pub(crate) fn upload(&mut self, stream: &CudaStream, tables: &Tables) -> Driver<()> {
        let room = self.room.for_tables(tables);
        if room != self.room {
            self.tables = Buffer::new(&self.context, room.offsets()[5])?;
            self.room = room;
        }
        let offsets = self.room.offsets();
        let parts: [(usize, &[u8]); 5] = [
            (offsets[0], cast_slice(&tables.attending)),
            (offsets[1], cast_slice(&tables.writing)),
            (offsets[2], cast_slice(&tables.packs)),
            (offsets[3], cast_slice(&tables.copies)),
            (offsets[4], cast_slice(&tables.entries)),
        ];
        self.staging.upload(stream, &self.tables, &parts)
    }
}

#[cfg(test)]
mod tests {
    use leank_core::{
        CacheConfig, CacheLayout, ChannelMask, ModelMask, ModelShape, StepEntry, Windows,
    };

    use super::*;
    use crate::layout_rules;

    const DIMENSIONS: Dimensions = Dimensions { kv_heads: 2, group: 7, block: 32 };

    fn ledger() -> Ledger {
        let shape = ModelShape::new(1, 14, 2, 64).unwrap();
        let half = ChannelMask::new(64, (0..32).collect()).unwrap();
        let mask = ModelMask::new(1, 2, 64, vec![half.clone(), half]).unwrap();
        let config = CacheConfig { block: 32, ..CacheConfig::new(shape, mask).unwrap() };
        let layout = CacheLayout::new(&config, layout_rules()).unwrap();
        Ledger::new(&layout, Windows { sink: 32, recent: 64 }, None)
    }

    fn entry(block: Block) -> u64 {
        match block {
            Block::Full(id) => u64::from(id),
            Block::Lean(id) => 1 << 63 | u64::from(id),
        }
    }

    fn build(ledger: &Ledger) -> Tables {
        let rows = |rows| if rows > 8 { 16 } else { 8 };
        Tables::build(ledger, DIMENSIONS, entry, rows).unwrap()
    }

    #[test]
    fn slices_of_new_tokens_are_enough_and_few() {
        for block in [1, 3, 16, 24, 64] {
            for tokens in 1..200 {
                let slice = |position: usize| {
                    position / block * block.div_ceil(TILE) + position % block / TILE
                };
                let needed = |start: usize| slice(start + tokens - 1) - slice(start) + 1;
                let most = (0..block).map(needed).max().unwrap();
                let bound = most_slices(tokens, block);
                assert!(
                    most <= bound && bound <= most + 2 * block.div_ceil(TILE),
                    "{block} {tokens}"
                );
            }
            assert_eq!(most_slices(1, block), 1);
        }
    }

    #[test]
    fn a_step_is_told_as_the_ledger_has_it() {
        let mut ledger = ledger();
        let (a, b, c) = (ledger.add_sequence(), ledger.add_sequence(), ledger.add_sequence());
        ledger.plan(&[StepEntry::store(a, 200), StepEntry::store(b, 33)]).unwrap();
        let stored = build(&ledger);
        assert_eq!((stored.attending.len(), stored.items), (0, 0));
        assert_eq!(stored.writing.len(), 2);
        // Blocks 1 to 3 are older than the recent window, so they are born lean.
        let lean: Vec<bool> = stored.entries.iter().map(|entry| entry >> 63 == 1).collect();
        assert_eq!(lean, [false, true, true, true, false, false, false, false, false]);
        ledger.commit().unwrap();

        ledger
            .plan(&[StepEntry::decode(b, 3), StepEntry::store(c, 1), StepEntry::decode(a, 1)])
            .unwrap();
        let tables = build(&ledger);
        assert_eq!(tables.rows, 16);
        // 21 rows are two tiles; two KV heads.
        let expected = Sequence {
            table: 0,
            start: 33,
            tokens: 3,
            row: 0,
            lean_begin: 1,
            lean_end: 1,
            before: 0,
            tiles: 2,
        };
        assert_eq!(tables.attending[0], expected);
        let of_a = tables.attending[1];
        assert_eq!((of_a.start, of_a.row, of_a.before, of_a.tiles), (200, 4, 4, 1));
        assert_eq!((of_a.table, of_a.lean_begin, of_a.lean_end), (3, 1, 4));
        assert_eq!(tables.items, 6);
        let before: Vec<u32> = tables.writing.iter().map(|sequence| sequence.before).collect();
        assert_eq!(before, [0, 3, 4]);
        assert_eq!(tables.slices, 5);
        assert_eq!(tables.entries.len(), 2 + 1 + 7);
        assert!(tables.packs.is_empty() && tables.copies.is_empty());
    }

    #[test]
    fn packs_and_copies_are_told() {
        let mut ledger = ledger();
        let a = ledger.add_sequence();
        ledger.plan(&[StepEntry::store(a, 158)]).unwrap();
        ledger.commit().unwrap();
        let fork = ledger.fork(a).unwrap();
        ledger.plan(&[StepEntry::decode(fork, 1)]).unwrap();
        let tables = build(&ledger);
        assert_eq!(tables.copies.len(), 1);
        assert_eq!(tables.packs.len(), 1);
        assert_eq!(tables.packs[0].from >> 63, 0);
        assert_eq!(tables.packs[0].to >> 63, 1);
    }

    #[test]
    fn room_grows_by_doubling_and_never_shrinks() {
        let mut tables = Tables { entries: vec![0; 5], ..Tables::default() };
        let mut room = Room::default().for_tables(&tables);
        assert_eq!(room, Room::LEAST);
        tables.entries.resize(4097, 0);
        tables.writing.push(Sequence::default());
        room = room.for_tables(&tables);
        assert_eq!(room, Room { entries: 8192, ..Room::LEAST });
        tables.entries.truncate(1);
        assert_eq!(room.for_tables(&tables), room);
        assert_eq!(room.offsets(), [0, 2048, 4096, 5120, 6144, 6144 + 65536]);
    }
}
