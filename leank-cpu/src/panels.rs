//! How K and V of one head lie in a block.
//!
//! Both are matrices `[depth, lanes]` for the kernel's product: K has its stored channels as depth
//! and the block's tokens as lanes, V has the tokens as depth and the channels as lanes. The lanes
//! are cut into panels of [`PANEL`]; a panel is stored row after row, so that one pass of the
//! kernel reads memory in order. In bf16 the rows go in pairs, with the two elements of a lane side
//! by side: that is what `vdpbf16ps` and `bfdot` multiply, and widening it takes one shift or mask.

use leank_core::{Block, CacheConfig, CacheLayout, Dtype, KvHead, Layer};

use crate::element::{Element, convert, plain};

/// Lanes of a panel: two vectors of AVX-512, so that the accumulators of eight query rows fit into
/// registers. Half as many FMAs per broadcast cost less than a pass that leaves gaps in what it
/// reads: the hardware's prefetchers do not follow those.
pub(crate) const PANEL: usize = 32;

/// Rows go in groups of this many in some type: the depth of everything is a multiple.
pub(crate) const DEPTH_MULTIPLE: usize = 2;

/// Where K or V lies in a head's part of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    /// Bytes before it.
    offset: usize,
    /// Rows.
    pub(crate) depth: usize,
    /// Elements of a row.
    lanes: usize,
    /// Type of the elements.
    pub(crate) dtype: Dtype,
}

impl Section {
    fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.depth * self.lanes * self.dtype.bytes()
    }

    /// Its bytes among those of the head.
    pub(crate) fn bytes(self, head: &[u8]) -> &[u8] {
        &head[self.range()]
    }

    /// The same, to be written.
    pub(crate) fn bytes_mut(self, head: &mut [u8]) -> &mut [u8] {
        &mut head[self.range()]
    }

    /// Its elements; `T` is what `dtype` names.
    pub(crate) fn panels<T: Element>(self, head: &[u8]) -> Panels<'_, T> {
        let data = bytemuck::cast_slice(self.bytes(head));
        Panels { data, depth: self.depth, lanes: self.lanes }
    }

    /// Its elements, to be written; `T` is what `dtype` names.
    pub(crate) fn panels_mut<T: Element>(self, head: &mut [u8]) -> PanelsMut<'_, T> {
        let data = bytemuck::cast_slice_mut(self.bytes_mut(head));
        PanelsMut { data, depth: self.depth, lanes: self.lanes }
    }
}

/// Where K and V of one head lie in its part of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadPlace {
    pub(crate) k: Section,
    pub(crate) v: Section,
    /// Whether K has the kept channels only.
    pub(crate) lean: bool,
}

impl HeadPlace {
    /// `None` where none are stored: a dead head in a lean block.
    pub(crate) fn of(
        config: &CacheConfig,
        layout: &CacheLayout,
        (layer, head): (Layer, KvHead),
        block: Block,
    ) -> Option<Self> {
        let lean = matches!(block, Block::Lean(_));
        let packed = layout.layer(layer).lean[head.0];
        if lean && packed.kept == 0 {
            return None;
        }
        let (k_type, v_type, channels, v_offset) = if lean {
            let format = packed.format;
            let v_offset = packed.v_offset - packed.k_offset;
            (plain(format.k), plain(format.v), packed.stored, v_offset)
        } else {
            let v_offset = layout.full_v_offset(head) - layout.full_k_offset(head);
            (config.dtype, config.dtype, layout.full_channels, v_offset)
        };
        let (depth, lanes) = (layout.stored_tokens, config.shape.head_dim);
        Some(Self {
            k: Section { offset: 0, depth: channels, lanes: layout.block, dtype: k_type },
            v: Section { offset: v_offset, depth, lanes, dtype: v_type },
            lean,
        })
    }
}

/// K or V of one head in one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Panels<'a, T> {
    pub(crate) data: &'a [T],
    /// Rows.
    pub(crate) depth: usize,
    /// Elements of a row, all panels together.
    pub(crate) lanes: usize,
}

impl<'a, T> Panels<'a, T> {
    /// The panel that begins with lane `first`, a multiple of [`PANEL`].
    pub(crate) fn panel(&self, first: usize) -> &'a [T] {
        let width = PANEL.min(self.lanes - first);
        &self.data[first * self.depth..][..width * self.depth]
    }
}

/// K or V of one head in one block, to be written.
#[derive(Debug)]
pub(crate) struct PanelsMut<'a, T> {
    data: &'a mut [T],
    pub(crate) depth: usize,
    pub(crate) lanes: usize,
}

/// Index of an element.
pub(crate) fn index<T: Element>(depth: usize, lanes: usize, row: usize, lane: usize) -> usize {
    let first = lane / PANEL * PANEL;
    let width = PANEL.min(lanes - first);
    let step = T::STEP;
    first * depth + (row / step * width + lane - first) * step + row % step
}

impl<T: Element> PanelsMut<'_, T> {
    /// The panel that begins with lane `first`, as rows of groups, and its width.
    fn panel(&mut self, first: usize) -> (&mut [T::Group], usize) {
        let width = PANEL.min(self.lanes - first);
        let panel = &mut self.data[first * self.depth..][..width * self.depth];
        (bytemuck::cast_slice_mut(panel), width)
    }

    /// Writes whole lanes of one panel, from lane `first` on: `columns` is `[lanes, depth]`.
    #[inline(always)]
    pub(crate) fn write_lanes(&mut self, first: usize, columns: &[T]) {
        let groups = self.depth / T::STEP;
        let (panel, width) = self.panel(first / PANEL * PANEL);
        let columns: &[T::Group] = bytemuck::cast_slice(columns);
        let lanes = first % PANEL..first % PANEL + columns.len() / groups;
        for (i, row) in panel.chunks_exact_mut(width).enumerate() {
            for (to, column) in row[lanes.clone()].iter_mut().zip(columns.chunks_exact(groups)) {
                *to = column[i];
            }
        }
    }

    /// Writes whole rows from row `first` on: `rows` is `[rows, lanes]`. The first row of a group
    /// zeroes the rest of it, so that a product over whole groups never meets what nobody wrote.
    #[inline(always)]
    pub(crate) fn write_rows(&mut self, first: usize, rows: &[T]) {
        let lanes = self.lanes;
        let count = rows.len() / lanes;
        let zeros = [T::zeroed(); PANEL];
        for start in (0..lanes).step_by(PANEL) {
            let (panel, width) = self.panel(start);
            let row = |i: usize| &rows[i * lanes + start..][..width];
            let mut i = 0;
            while i < count {
                let (group, step) = ((first + i) / T::STEP, (first + i) % T::STEP);
                let groups = &mut panel[group * width..][..width];
                if step > 0 {
                    let to = groups.iter_mut().map(|group| &mut group.as_mut()[step]);
                    to.zip(row(i)).for_each(|(to, &x)| *to = x);
                    i += 1;
                } else {
                    let next = if i + 1 < count { row(i + 1) } else { &zeros[..] };
                    join::<T>(groups, [row(i), next]);
                    i += T::STEP;
                }
            }
        }
    }

    /// Copies rows of `from`, which has as many lanes; rows beyond them become zero.
    #[inline(always)]
    pub(crate) fn gather<S: Element>(
        &mut self,
        from: Panels<'_, S>,
        rows: impl Iterator<Item = usize> + Clone,
    ) {
        for start in (0..self.lanes).step_by(PANEL) {
            let source: &[S::Group] = bytemuck::cast_slice(from.panel(start));
            let (panel, width) = self.panel(start);
            let mut rows = rows.clone();
            for groups in panel.chunks_exact_mut(width) {
                let mut pair = [[T::zeroed(); PANEL]; DEPTH_MULTIPLE];
                for (lanes, row) in pair[..T::STEP].iter_mut().zip(&mut rows) {
                    let source = &source[row / S::STEP * width..][..width];
                    for (to, group) in lanes.iter_mut().zip(source) {
                        *to = convert(group.as_ref()[row % S::STEP]);
                    }
                }
                join::<T>(groups, [&pair[0], &pair[1]]);
            }
        }
    }
}

/// Puts the rows of a group side by side; types whose rows stand alone ignore the second one.
#[inline(always)]
fn join<T: Element>(groups: &mut [T::Group], rows: [&[T]; DEPTH_MULTIPLE]) {
    for (group, (&a, &b)) in groups.iter_mut().zip(rows[0].iter().zip(rows[1])) {
        let pair = [a, b];
        group.as_mut().copy_from_slice(&pair[..T::STEP]);
    }
}
