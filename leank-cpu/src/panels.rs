//! How K and V of one head lie in a block.
//!
//! Both are matrices `[depth, lanes]` for the kernel's product: K has its stored channels as depth
//! and the block's tokens as lanes, V has the tokens as depth and the channels as lanes. The lanes
//! are cut into panels of [`PANEL`]; a panel is stored row after row, so that one pass of the
//! kernel reads memory in order. In bf16 the rows go in pairs, with the two elements of a lane side
//! by side: that is what `vdpbf16ps` and `bfdot` multiply, and widening it takes one shift or mask.

use leank_core::{Block, CacheConfig, CacheLayout, HeadFormat, KvHead, Layer, LeanFormat, Tensor};

use crate::{
    codes::{Codes, CodesMut, CodesShape},
    element::{Element, convert},
    kernel::{Right, Simd, transpose},
};

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
    pub(crate) lanes: usize,
    /// How they are stored.
    pub(crate) format: LeanFormat,
    /// Whether it is K or V.
    tensor: Tensor,
}

impl Section {
    fn range(self) -> std::ops::Range<usize> {
        let (tokens, channels) = self.tensor.by_row(self.depth, self.lanes);
        self.offset..self.offset + self.format.bytes(self.tensor, tokens, channels)
    }

    /// `None` for plain elements.
    fn codes(self) -> Option<CodesShape> {
        let Self { depth, lanes, format, tensor, .. } = self;
        let group = format.group(tensor).min(lanes);
        format.largest_code().map(|largest| CodesShape { depth, lanes, group, largest })
    }

    /// What lies there; `head` is the head's part of a block.
    pub(crate) fn of(self, head: &[u8]) -> Matrix<'_> {
        Matrix { section: self, bytes: &head[self.range()] }
    }

    /// Its bytes, to be written.
    pub(crate) fn bytes_mut(self, head: &mut [u8]) -> &mut [u8] {
        &mut head[self.range()]
    }

    /// Its codes, to be written.
    ///
    /// # Panics
    /// When it has plain elements.
    pub(crate) fn codes_mut(self, head: &mut [u8]) -> CodesMut<'_> {
        let shape = self.codes().expect("codes, not plain elements");
        CodesMut { shape, bytes: self.bytes_mut(head) }
    }

    /// Its plain elements, to be written; `T` is what the format names.
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
        let (format, [channels, depth], v_offset) = if lean {
            let depths = [packed.stored, packed.stored_tokens];
            (packed.format, depths, packed.v_offset - packed.k_offset)
        } else {
            let v_offset = layout.full_v_offset(head) - layout.full_k_offset(head);
            let depths = [layout.full_channels, layout.stored_tokens];
            (HeadFormat::plain(config.dtype), depths, v_offset)
        };
        let lanes = config.shape.head_dim;
        let (k, v) = (Tensor::K, Tensor::V);
        Some(Self {
            k: Section {
                offset: 0,
                depth: channels,
                lanes: layout.block,
                format: format.k,
                tensor: k,
            },
            v: Section { offset: v_offset, depth, lanes, format: format.v, tensor: v },
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
    /// How it is stored.
    pub(crate) fn format(&self) -> LeanFormat {
        self.section.format
    }

    /// Rows.
    pub(crate) fn depth(&self) -> usize {
        self.section.depth
    }

    /// Its plain elements; `T` is what the format names.
    pub(crate) fn panels<T: Element>(self) -> Panels<'a, T> {
        let Section { depth, lanes, .. } = self.section;
        Panels { data: bytemuck::cast_slice(self.bytes), depth, lanes }
    }

    /// Its plain elements as the groups of the kernel's product.
    pub(crate) fn groups<G: bytemuck::Pod>(self) -> Right<'a, G> {
        let Section { lanes, .. } = self.section;
        let data: &[G] = bytemuck::cast_slice(self.bytes);
        Right { data, steps: data.len() / lanes, lanes }
    }

    /// Its codes.
    ///
    /// # Panics
    /// When it has plain elements.
    pub(crate) fn codes(self) -> Codes<'a> {
        let shape = self.section.codes().expect("codes, not plain elements");
        Codes { shape, bytes: self.bytes }
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

impl<'a, T: Element> Panels<'a, T> {
    /// The panel that begins with lane `first`, a multiple of [`PANEL`].
    pub(crate) fn panel(&self, first: usize) -> &'a [T] {
        let width = PANEL.min(self.lanes - first);
        &self.data[first * self.depth..][..width * self.depth]
    }

    /// Puts a row in single precision where it is told to.
    #[inline(always)]
    pub(crate) fn read_row(&self, row: usize, to: &mut [f32]) {
        for (i, to) in to.chunks_mut(PANEL).enumerate() {
            let groups: &[T::Group] = bytemuck::cast_slice(self.panel(i * PANEL));
            let groups = &groups[row / T::STEP * to.len()..][..to.len()];
            to.iter_mut().zip(groups).for_each(|(to, group)| {
                *to = group.as_ref()[row % T::STEP].widen();
            });
        }
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

    /// Writes whole lanes of one panel, from lane `first` on: `columns` is `[lanes, depth]` and
    /// starts at a whole word.
    #[inline(always)]
    pub(crate) fn write_lanes<S: Simd>(&mut self, simd: S, first: usize, columns: &[T]) {
        /// Bytes of a word.
        const WORD: usize = size_of::<f32>();
        let words: &[f32] = bytemuck::cast_slice(columns);
        let columns: &[T::Group] = bytemuck::cast_slice(columns);
        let groups = self.depth / T::STEP;
        // Groups in a word.
        let pack = WORD / size_of::<T::Group>();
        let stride = groups / pack;
        let (panel, width) = self.panel(first / PANEL * PANEL);
        let first = first % PANEL;
        let lanes = columns.len() / groups;
        if lanes == 1 {
            let to = panel.chunks_exact_mut(width).map(|row| &mut row[first]);
            return to.zip(columns).for_each(|(to, &group)| *to = group);
        }
        // What goes by whole vectors, both ways.
        let deep = stride / S::LANES * S::LANES;
        let wide = lanes / S::LANES * S::LANES;
        for lane in (0..wide).step_by(S::LANES) {
            for word in (0..deep).step_by(S::LANES) {
                transpose(simd, &words[lane * stride + word..], stride, |i, words| {
                    let row = &mut panel[(word + i) * pack * width..];
                    let words: &[T::Group] = bytemuck::cast_slice(words);
                    for part in 0..pack {
                        let to = &mut row[part * width + first + lane..][..S::LANES];
                        let from = words.chunks_exact(pack).map(|groups| groups[part]);
                        to.iter_mut().zip(from).for_each(|(to, group)| *to = group);
                    }
                });
            }
        }
        for (group, row) in panel.chunks_exact_mut(width).enumerate() {
            let done = if group < deep * pack { wide } else { 0 };
            for lane in done..lanes {
                row[first + lane] = columns[lane * groups + group];
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::{
        Isa,
        kernel::{Kernel, Loops},
    };

    /// What nobody writes stays this: NaN in every type.
    const UNWRITTEN: u8 = 0xff;

    fn unwritten<T: Element>(depth: usize, lanes: usize) -> Vec<T> {
        let words = vec![u32::from_ne_bytes([UNWRITTEN; 4]); depth * lanes];
        bytemuck::cast_slice(&words)[..depth * lanes].to_vec()
    }

    /// Different numbers, in memory that starts at a whole word.
    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32).sin() * 100.0).collect()
    }

    fn stored<T: Element>(wide: &[f32]) -> Vec<f32> {
        let mut words = vec![0.0f32; wide.len()];
        let narrow: &mut [T] = bytemuck::cast_slice_mut(&mut words);
        narrow.iter_mut().zip(wide).for_each(|(to, &x)| *to = T::narrow(x));
        words
    }

    fn same<T: Element>(found: &[T], want: &[T], what: std::fmt::Arguments<'_>) {
        let bytes = bytemuck::cast_slice::<T, u8>;
        assert!(bytes(found) == bytes(want), "{}: {what}", std::any::type_name::<T>());
    }

    /// Lanes from `first` on.
    struct WriteLanes<'a, T> {
        to: PanelsMut<'a, T>,
        first: usize,
        columns: &'a [T],
    }

    impl<T: Element> Loops for WriteLanes<'_, T> {
        fn run<S: Simd>(mut self, simd: S) {
            self.to.write_lanes(simd, self.first, self.columns);
        }
    }

    fn lanes_are_written<T: Element>(kernel: Kernel) {
        for (depth, lanes) in [(2, 8), (14, 40), (34, 64), (80, 40), (96, 100), (128, 64)] {
            for (first, count) in [(0, 32), (0, 1), (3, 2), (5, 27), (32, 8), (35, 5), (96, 4)] {
                if first + count > lanes {
                    continue;
                }
                let words = stored::<T>(&numbers(count * depth));
                let columns = &bytemuck::cast_slice(&words)[..count * depth];
                let mut want = unwritten::<T>(depth, lanes);
                for (i, &x) in columns.iter().enumerate() {
                    want[index::<T>(depth, lanes, i % depth, first + i / depth)] = x;
                }
                let mut data = unwritten::<T>(depth, lanes);
                let to = PanelsMut { data: &mut data, depth, lanes };
                kernel.run(WriteLanes { to, first, columns });
                same(&data, &want, format_args!("{depth}x{lanes}, {count} from {first}"));
            }
        }
    }

    #[test]
    fn lanes_are_written_like_single_elements() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let kernel = Kernel::new(isa).unwrap();
            lanes_are_written::<f32>(kernel);
            lanes_are_written::<f16>(kernel);
            lanes_are_written::<bf16>(kernel);
        }
    }

    fn rows_are_written<T: Element>() {
        for (depth, lanes) in [(2, 20), (8, 33), (66, 80), (64, 96)] {
            for (first, count) in [(0, 1), (1, 1), (0, 2), (1, 4), (3, 5), (2, 6), (33, 31)] {
                if first + count > depth {
                    continue;
                }
                let words = stored::<T>(&numbers(count * lanes));
                let rows: &[T] = &bytemuck::cast_slice(&words)[..count * lanes];
                let mut want = unwritten::<T>(depth, lanes);
                for (i, &x) in rows.iter().enumerate() {
                    let (row, lane) = (first + i / lanes, i % lanes);
                    want[index::<T>(depth, lanes, row, lane)] = x;
                    if T::STEP == 2 && row % 2 == 0 {
                        want[index::<T>(depth, lanes, row + 1, lane)] = T::zeroed();
                    }
                }
                let mut data = unwritten::<T>(depth, lanes);
                PanelsMut { data: &mut data, depth, lanes }.write_rows(first, rows);
                same(&data, &want, format_args!("{depth}x{lanes}, {count} from {first}"));
            }
        }
    }

    #[test]
    fn rows_are_written_like_single_elements() {
        rows_are_written::<f32>();
        rows_are_written::<f16>();
        rows_are_written::<bf16>();
    }

    fn rows_are_gathered<S: Element, T: Element>() {
        for (channels, lanes) in [(34, 8), (80, 64), (96, 33), (128, 100)] {
            for kept in [&[][..], &[1], &[0, 33], &[3, 4, 5, 16, 31], &[0, 2, 7, 8, 9, 20, 32]] {
                let depth = kept.len().next_multiple_of(DEPTH_MULTIPLE);
                let words = stored::<S>(&numbers(channels * lanes));
                let data: &[S] = &bytemuck::cast_slice(&words)[..channels * lanes];
                let from = Panels { data, depth: channels, lanes };
                let mut want = vec![T::zeroed(); depth * lanes];
                for (row, &channel) in kept.iter().enumerate() {
                    for lane in 0..lanes {
                        let x = data[index::<S>(channels, lanes, channel, lane)].widen();
                        want[index::<T>(depth, lanes, row, lane)] = T::narrow(x);
                    }
                }
                let mut data = unwritten::<T>(depth, lanes);
                let mut to = PanelsMut { data: &mut data, depth, lanes };
                to.gather(from, kept.iter().copied());
                same(&data, &want, format_args!("{channels}x{lanes}, {kept:?}"));
            }
        }
    }

    #[test]
    fn rows_are_gathered_like_single_elements() {
        fn to_all<S: Element>() {
            rows_are_gathered::<S, f32>();
            rows_are_gathered::<S, f16>();
            rows_are_gathered::<S, bf16>();
        }
        to_all::<f32>();
        to_all::<f16>();
        to_all::<bf16>();
    }
}
