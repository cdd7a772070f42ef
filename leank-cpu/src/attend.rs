//! Attention of one layer over a planned step: cuts it into tiles and runs the kernel on each.

use leank_core::{
    Block, CacheConfig, CacheLayout, HostView, HostViewMut, KvHead, Layer, Ledger, Result,
    StepSequence,
};

use crate::{
    element::{Element, plain, with_element},
    executor::Executor,
    kernel::{Keys, MAX_ROWS, Tile},
    store::Store,
};

/// Everything that the tiles of one layer read.
#[derive(Clone, Copy)]
pub(crate) struct LayerView<'a> {
    pub(crate) config: &'a CacheConfig,
    pub(crate) layout: &'a CacheLayout,
    pub(crate) store: &'a Store,
    pub(crate) layer: Layer,
}

/// Some query tokens of one sequence on one KV head. Its rows are `[tokens, group]`.
struct Piece<'a> {
    head: KvHead,
    /// Row of the first query token in the step.
    row: usize,
    /// Query tokens.
    tokens: usize,
    /// Position of the first query token.
    position: usize,
    table: &'a [Block],
}

impl LayerView<'_> {
    pub(crate) fn attend(
        self,
        ledger: &Ledger,
        executor: Executor,
        q: HostView<'_>,
        mut out: HostViewMut<'_>,
    ) -> Result<()> {
        let step = ledger.step().map_or(&[][..], |step| &step.sequences[..]);
        let mut pieces = Vec::new();
        for sequence in step.iter().filter(|sequence| sequence.attend) {
            self.cut(sequence, ledger.table(sequence.id)?, &mut pieces);
        }
        let outputs = executor.map(pieces.len(), |i| self.run(&pieces[i], q));
        let group = self.config.shape.group();
        let head_dim = self.config.shape.head_dim;
        for (piece, output) in pieces.iter().zip(&outputs) {
            for (row, values) in output.chunks_exact(head_dim).enumerate() {
                let (token, head) = (piece.row + row / group, piece.head.0 * group + row % group);
                out.write_row(token, head, values);
            }
        }
        Ok(())
    }

    fn cut<'a>(&self, sequence: &StepSequence, table: &'a [Block], pieces: &mut Vec<Piece<'a>>) {
        let most = (MAX_ROWS / self.config.shape.group()).max(1);
        for head in self.config.shape.kv_head_indices() {
            for first in (0..sequence.tokens).step_by(most) {
                pieces.push(Piece {
                    head,
                    row: sequence.row + first,
                    tokens: most.min(sequence.tokens - first),
                    position: sequence.start + first,
                    table,
                });
            }
        }
    }

    /// The output of a piece, `[tokens, group, head_dim]`.
    fn run(&self, piece: &Piece<'_>, q: HostView<'_>) -> Vec<f32> {
        let shape = self.config.shape;
        let (group, head_dim, block) = (shape.group(), shape.head_dim, self.layout.block);
        let rows = piece.tokens * group;
        let queries = self.scaled_queries(piece, q);
        let lean_queries = self.kept_of(piece.head, &queries);
        let mut tile = Tile::new(rows, head_dim, block, self.config.soft_cap);

        // Positions that the last row sees; no block beyond them is touched.
        let end = piece.position + piece.tokens;
        for (index, &id) in piece.table[..end.div_ceil(block)].iter().enumerate() {
            let start = index * block;
            let tokens = (end - start).min(block);
            let seen =
                |row: usize| (piece.position + row / group + 1).saturating_sub(start).min(block);
            let bytes = self.store.bytes(self.layer, id);
            match id {
                Block::Full(_) => with_element!(self.config.dtype, T => {
                    let len = block * head_dim;
                    let k = elements::<T>(bytes, self.layout.full_k_offset(piece.head), len);
                    let v = elements::<T>(bytes, self.layout.full_v_offset(piece.head), len);
                    tile.score(&queries, Keys { data: k, block }, tokens);
                    tile.accumulate(v, block, seen);
                }),
                Block::Lean(_) => {
                    let head = self.layout.layer(self.layer).lean[piece.head.0];
                    if head.kept == 0 {
                        continue;
                    }
                    let (k_type, v_type) = (plain(head.format.k), plain(head.format.v));
                    with_element!(k_type, T => {
                        let k = elements::<T>(bytes, head.k_offset, block * head.kept);
                        tile.score(&lean_queries, Keys { data: k, block }, tokens);
                    });
                    with_element!(v_type, T => {
                        let v = elements::<T>(bytes, head.v_offset, block * head_dim);
                        tile.accumulate(v, block, seen);
                    });
                }
            }
        }
        tile.finish()
    }

    /// Query rows of a piece times the scale, `[tokens, group, head_dim]`.
    fn scaled_queries(&self, piece: &Piece<'_>, q: HostView<'_>) -> Vec<f32> {
        let shape = self.config.shape;
        let group = shape.group();
        let mut queries = vec![0.0; piece.tokens * group * shape.head_dim];
        for (row, values) in queries.chunks_exact_mut(shape.head_dim).enumerate() {
            q.read_row(piece.row + row / group, piece.head.0 * group + row % group, values);
        }
        let scale = self.config.scale();
        queries.iter_mut().for_each(|x| *x *= scale);
        queries
    }

    /// The kept channels of each row.
    fn kept_of(&self, head: KvHead, queries: &[f32]) -> Vec<f32> {
        let kept = self.config.mask.head(self.layer, head).kept();
        let rows = queries.chunks_exact(self.config.shape.head_dim);
        rows.flat_map(|row| kept.iter().map(|&c| row[usize::from(c)])).collect()
    }
}

/// `len` elements that start `offset` bytes into a block.
pub(crate) fn elements<T: Element>(bytes: &[u8], offset: usize, len: usize) -> &[T] {
    bytemuck::cast_slice(&bytes[offset..offset + len * size_of::<T>()])
}

/// `len` elements that start `offset` bytes into a block, to be written.
pub(crate) fn elements_mut<T: Element>(bytes: &mut [u8], offset: usize, len: usize) -> &mut [T] {
    bytemuck::cast_slice_mut(&mut bytes[offset..offset + len * size_of::<T>()])
}
