//! Cuts the attention of one layer into pieces.
//!
//! Where a head's blocks are cut depends on nothing but their number in the sequence: results are
//! then the same, bit for bit, on any number of threads and in any batch. Pieces are small enough
//! that threads which claim them one by one finish together.

use std::ops::Range;

use leank_core::{Block, CacheLayout, KvHead, Layer, Ledger, Result};

/// Most query rows of a piece, or one token's where a group is larger: their accumulators stay in the
/// first-level cache.
const PIECE_ROWS: usize = 16;

/// Bytes of full blocks in a piece: ten to twenty microseconds of reading.
const PIECE: usize = 512 << 10;

/// Fewest bytes worth waking other threads for.
const MIN_PARALLEL: usize = 256 << 10;

/// Some query tokens of one sequence on one KV head. Its rows are `[tokens, group]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) head: KvHead,
    /// Row of the first query token in the step.
    pub(crate) row: usize,
    /// Query tokens.
    pub(crate) tokens: usize,
    /// Position of the first query token.
    pub(crate) position: usize,
    /// Blocks that the last query token sees.
    pub(crate) table: &'a [Block],
    /// Pieces that it is cut into.
    pub(crate) pieces: usize,
}

/// Part of a job: some of its blocks.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// Index of the job.
    pub(crate) job: usize,
    /// Its number among the pieces of the job.
    pub(crate) number: usize,
    /// Indices in the job's table.
    pub(crate) blocks: Range<usize>,
}

/// The work of one layer in one step.
#[derive(Debug, Default)]
pub(crate) struct Work<'a> {
    pub(crate) jobs: Vec<Job<'a>>,
    /// In the order of jobs, and of blocks within a job. Every job has at least one.
    pub(crate) pieces: Vec<Piece>,
    /// Bytes of K and V that will be read.
    bytes: usize,
}

impl<'a> Work<'a> {
    /// Cuts the step under way.
    pub(crate) fn cut(
        ledger: &'a Ledger,
        layout: &CacheLayout,
        layer: Layer,
        heads: usize,
        group: usize,
    ) -> Result<Self> {
        let mut work = Self::default();
        let most = (PIECE_ROWS / group).max(1);
        let full = layout.full_head_bytes();
        let count = PIECE.div_ceil(full);
        let step = ledger.step().map_or(&[][..], |step| &step.sequences[..]);
        for sequence in step.iter().filter(|sequence| sequence.attend) {
            let table = ledger.table(sequence.id)?;
            for head in (0..heads).map(KvHead) {
                let lean = layout.layer(layer).lean_head_bytes(head);
                for first in (0..sequence.tokens).step_by(most) {
                    let tokens = most.min(sequence.tokens - first);
                    let position = sequence.start + first;
                    let table = &table[..(position + tokens).div_ceil(layout.block)];
                    let row = sequence.row + first;
                    let job = Job { head, row, tokens, position, table, pieces: 0 };
                    work.push(job, count, |block| match block {
                        Block::Full(_) => full,
                        Block::Lean(_) => lean,
                    });
                }
            }
        }
        Ok(work)
    }

    /// Adds a job in pieces of `count` blocks; those of dead heads that hold nothing are left out.
    fn push(&mut self, mut job: Job<'a>, count: usize, size: impl Fn(Block) -> usize) {
        let before = self.pieces.len();
        for start in (0..job.table.len()).step_by(count) {
            let blocks = start..(start + count).min(job.table.len());
            let bytes: usize = job.table[blocks.clone()].iter().map(|&block| size(block)).sum();
            if bytes > 0 {
                let number = self.pieces.len() - before;
                self.pieces.push(Piece { job: self.jobs.len(), number, blocks });
                self.bytes += bytes;
            }
        }
        job.pieces = self.pieces.len() - before;
        debug_assert!(job.pieces > 0, "a query's own token is whole");
        self.jobs.push(job);
    }

    /// Whether other threads are worth waking.
    pub(crate) fn is_parallel(&self) -> bool {
        self.bytes >= MIN_PARALLEL
    }
}
