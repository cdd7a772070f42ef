//! How K and V of one head lie in a block.
//!
//! Both are matrices `[depth, lanes]` for the kernel's product: K has its stored channels as depth
//! and the block's tokens as lanes, V has the tokens as depth and the channels as lanes. The lanes
//! are cut into panels of [`PANEL`]; a panel is stored row after row, so that one pass of the
//! kernel reads memory in order. In bf16 the rows go in pairs, with the two elements of a lane side
//! by side: that is what `vdpbf16ps` and `bfdot` multiply, and widening it takes one shift or mask.

use leank_core::{Block, CacheConfig, CacheLayout, Dtype, KvHead, Layer};

use crate::element::{Element, plain};

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
    pub(crate) offset: usize,
    /// Rows.
    pub(crate) depth: usize,
    /// Elements of a row.
    pub(crate) lanes: usize,
    /// Type of the elements.
    pub(crate) dtype: Dtype,
}

impl Section {
    fn range(self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.depth * self.lanes * self.dtype.bytes()
    }

    /// What lies there; `head` is the head's part of a block.
    pub(crate) fn of(self, head: &[u8]) -> Matrix<'_> {
        Matrix { section: self, bytes: &head[self.range()] }
    }

    /// Its elements, to be written; `T` is what `dtype` names.
    pub(crate) fn panels_mut<T: Element>(self, head: &mut [u8]) -> PanelsMut<'_, T> {
        let data = bytemuck::cast_slice_mut(&mut head[self.range()]);
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
pub(crate) struct Matrix<'a> {
    section: Section,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Type of the elements.
    pub(crate) fn dtype(&self) -> Dtype {
        self.section.dtype
    }

    /// Rows.
    pub(crate) fn depth(&self) -> usize {
        self.section.depth
    }

    /// Its elements; `T` is what `dtype` names.
    pub(crate) fn panels<T: Element>(self) -> Panels<'a, T> {
        let Section { depth, lanes, .. } = self.section;
        Panels { data: bytemuck::cast_slice(self.bytes), depth, lanes }
    }
}

/// The elements of a matrix.
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
    pub(crate) data: &'a mut [T],
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
    /// Writes one column: every row of one lane; rows beyond those given become zero.
    pub(crate) fn write_lane(&mut self, lane: usize, column: impl Iterator<Item = T>) {
        let zeros = std::iter::repeat(T::narrow(0.0));
        for (row, x) in column.chain(zeros).take(self.depth).enumerate() {
            self.data[index::<T>(self.depth, self.lanes, row, lane)] = x;
        }
    }

    /// Writes one row. The first row of a group zeroes the rest of it, so that a product over
    /// whole groups never meets what nobody wrote.
    pub(crate) fn write_row(&mut self, row: usize, values: impl Iterator<Item = T>) {
        let (depth, lanes) = (self.depth, self.lanes);
        for (lane, x) in values.enumerate() {
            self.data[index::<T>(depth, lanes, row, lane)] = x;
        }
        if row.is_multiple_of(T::STEP) {
            for rest in row + 1..row + T::STEP {
                for lane in 0..lanes {
                    self.data[index::<T>(depth, lanes, rest, lane)] = T::narrow(0.0);
                }
            }
        }
    }
}
