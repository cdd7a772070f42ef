//! How codes and their scales lie in a block: `[depth, lanes]` like everything (see
//! [`crate::panels`]), with a scale for each row, or for each row of a panel.
//!
//! Lanes that share scales lie behind these: the scales of all rows, then the panels of codes. So what
//! a pass needs comes in the order of memory. A lane's codes of a *step* lie side by side in a word of four
//! bytes, which is what integer dot products multiply and where others pick them with a shift and a mask:
//! in 8 bits the codes of four rows, in 4 bits those of eight, the first four in the lower halves.

use leank_core::quant::{Scale, quantise};

use crate::{
    element::Element,
    panels::{PANEL, Panels},
};

/// The codes of a lane in a step.
pub(crate) type Word = [u8; 4];

/// What decides where codes lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesShape {
    /// Rows, a multiple of eight.
    pub(crate) depth: usize,
    /// Codes of a row.
    pub(crate) lanes: usize,
    /// Lanes that share a scale: all of them, or a panel's.
    pub(crate) group: usize,
    /// The largest code, 255 or 15.
    pub(crate) largest: u8,
}

impl CodesShape {
    /// Rows of a step.
    fn step(self) -> usize {
        if self.largest == 15 { 8 } else { 4 }
    }

    /// Groups of lanes, as the first lane and the number of lanes.
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        let Self { lanes, group, .. } = self;
        (0..lanes).step_by(group).map(move |first| (first, group.min(lanes - first)))
    }

    /// Bytes of `lanes` lanes with their scales.
    fn bytes(self, lanes: usize) -> usize {
        self.depth * Scale::BYTES + self.depth / self.step() * lanes * size_of::<Word>()
    }
}

/// Where the code of a row stands in the word of its step, in bits.
fn shift(row: usize, step: usize) -> usize {
    let row = row % step;
    row % 4 * 8 + row / 4 * 4
}

/// Lanes that share scales.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesGroup<'a> {
    pub(crate) first: usize,
    pub(crate) lanes: usize,
    /// One per row.
    pub(crate) scales: &'a [Scale],
    /// Panels of codes.
    pub(crate) words: &'a [Word],
}

/// Codes and scales of K or V of one head in one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Codes<'a> {
    pub(crate) shape: CodesShape,
    pub(crate) bytes: &'a [u8],
}

impl<'a> Codes<'a> {
    /// In the order of lanes and of memory.
    #[inline(always)]
    pub(crate) fn groups(self) -> impl Iterator<Item = CodesGroup<'a>> {
        let mut rest = self.bytes;
        self.shape.groups().map(move |(first, lanes)| {
            let (group, behind) = rest.split_at(self.shape.bytes(lanes));
            rest = behind;
            let (scales, words) = group.split_at(self.shape.depth * Scale::BYTES);
            let (scales, words) = (bytemuck::cast_slice(scales), bytemuck::cast_slice(words));
            CodesGroup { first, lanes, scales, words }
        })
    }

    /// Takes a row out: a scale for each group, a code for each lane.
    pub(crate) fn row(self, row: usize, scales: &mut Vec<Scale>, codes: &mut Vec<u8>) {
        scales.clear();
        codes.clear();
        let CodesShape { depth, largest, .. } = self.shape;
        let step = self.shape.step();
        for group in self.groups() {
            scales.push(group.scales[row]);
            for first in (0..group.lanes).step_by(PANEL) {
                let width = PANEL.min(group.lanes - first);
                let panel = &group.words[first * depth / step..];
                let words = &panel[row / step * width..][..width];
                let code = |word: &Word| (u32::from_le_bytes(*word) >> shift(row, step)) as u8;
                codes.extend(words.iter().map(|word| code(word) & largest));
            }
        }
    }
}

/// Where rows of codes come from. (A trait, since closures that are called in two places are functions
/// of their own, and so compiled for any CPU.)
pub(crate) trait CodeRows {
    /// Makes the codes of one group of lanes of a row, and its scale; the groups of a row come in
    /// order, one row after the other.
    fn group(&mut self, row: usize, group: usize, codes: &mut [u8]) -> Scale;
}

/// Rows of plain elements, to be quantised.
pub(crate) struct Quantised<'a, T, R> {
    pub(crate) from: Panels<'a, T>,
    /// Which rows.
    pub(crate) rows: R,
    pub(crate) shape: CodesShape,
    /// As long as a row.
    pub(crate) wide: &'a mut [f32],
}

impl<T: Element, R: Iterator<Item = usize>> CodeRows for Quantised<'_, T, R> {
    #[inline(always)]
    fn group(&mut self, _: usize, group: usize, codes: &mut [u8]) -> Scale {
        if group == 0
            && let Some(row) = self.rows.next()
        {
            self.from.read_row(row, self.wide);
        }
        let CodesShape { group: lanes, largest, .. } = self.shape;
        quantise(&self.wide[group * lanes..][..codes.len()], largest, codes)
    }
}

/// Codes and scales of K or V of one head in one block, to be written.
#[derive(Debug)]
pub(crate) struct CodesMut<'a> {
    pub(crate) shape: CodesShape,
    pub(crate) bytes: &'a mut [u8],
}

impl CodesMut<'_> {
    /// Writes `rows` rows. Rows beyond them become zero, with scales of 0: factors of 0 meet no NaN
    /// there. `codes` is memory to work in.
    #[inline(always)]
    pub(crate) fn write(&mut self, rows: usize, codes: &mut Vec<u8>, mut from: impl CodeRows) {
        let CodesShape { depth, lanes: all, group: widest, .. } = self.shape;
        let step = self.shape.step();
        let group_bytes = self.shape.bytes(widest);
        for first_row in (0..depth).step_by(step) {
            codes.clear();
            codes.resize(step * all, 0);
            for (i, codes) in codes.chunks_exact_mut(all).enumerate() {
                let row = first_row + i;
                for (at, codes) in codes.chunks_mut(widest).enumerate() {
                    let scale =
                        if row < rows { from.group(row, at, codes) } else { Scale::from_bits(0) };
                    let scales = &mut self.bytes[at * group_bytes..][..depth * Scale::BYTES];
                    bytemuck::cast_slice_mut::<u8, Scale>(scales)[row] = scale;
                }
            }
            for (at, (first, lanes)) in self.shape.groups().enumerate() {
                let group = &mut self.bytes[at * group_bytes..][..self.shape.bytes(lanes)];
                let words = bytemuck::cast_slice_mut(&mut group[depth * Scale::BYTES..]);
                for lane in (0..lanes).step_by(PANEL) {
                    let width = PANEL.min(lanes - lane);
                    let panel: &mut [Word] = &mut words[lane * depth / step..];
                    let words = &mut panel[first_row / step * width..][..width];
                    let codes = &codes[first + lane..];
                    match step {
                        4 => join::<4>(words, codes, all),
                        _ => join::<8>(words, codes, all),
                    }
                }
            }
        }
    }
}

/// Puts the codes of a step's rows, `stride` apart, into words.
#[inline(always)]
fn join<const STEP: usize>(words: &mut [Word], codes: &[u8], stride: usize) {
    let width = words.len();
    let rows: [&[u8]; STEP] = std::array::from_fn(|i| &codes[i * stride..][..width]);
    for (lane, word) in words.iter_mut().enumerate() {
        let mut joined = 0;
        for (i, row) in rows.iter().enumerate() {
            joined |= u32::from(row[lane]) << shift(i, STEP);
        }
        *word = joined.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Isa,
        kernel::{Kernel, Loops, Simd},
        panels::index,
    };

    /// Packs rows of plain elements.
    struct Pack<'a> {
        to: CodesMut<'a>,
        from: Panels<'a, f32>,
        rows: usize,
    }

    impl Loops for Pack<'_> {
        fn run<S: Simd>(mut self, _: S) {
            let (shape, wide) = (self.to.shape, &mut vec![0.0; self.from.lanes][..]);
            let source = Quantised { from: self.from, rows: 0..self.rows, shape, wide };
            self.to.write(self.rows, &mut Vec::new(), source);
        }
    }

    fn codes_are_those_of_the_definition(kernel: Kernel, shape: CodesShape, rows: usize) {
        let CodesShape { depth, lanes, group, largest } = shape;
        let value =
            |row: usize, lane: usize| ((row * lanes + lane) as f32 * 0.37).sin() * 9.0 - 2.0;
        let mut data = vec![f32::NAN; depth * lanes];
        for row in 0..rows {
            for lane in 0..lanes {
                data[index::<f32>(depth, lanes, row, lane)] = value(row, lane);
            }
        }
        let bytes: usize = shape.groups().map(|(_, lanes)| shape.bytes(lanes)).sum();
        // What nobody writes stays NaN and no code.
        let mut words = vec![u32::MAX; bytes / 4];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        let from = Panels { data: &data, depth, lanes };
        kernel.run(Pack { to: CodesMut { shape, bytes }, from, rows });

        let (mut scales, mut codes) = (Vec::new(), Vec::new());
        for row in 0..depth {
            Codes { shape, bytes }.row(row, &mut scales, &mut codes);
            assert_eq!(scales.len(), lanes.div_ceil(group));
            let groups = scales.iter().zip(codes.chunks(group));
            for (at, (&scale, codes)) in groups.enumerate() {
                let values: Vec<f32> =
                    (0..codes.len()).map(|i| value(row, at * group + i)).collect();
                let mut want = vec![0; codes.len()];
                let want_scale = if row < rows {
                    quantise(&values, largest, &mut want)
                } else {
                    Scale::from_bits(0)
                };
                assert_eq!((scale, codes), (want_scale, &want[..]), "row {row} of {shape:?}");
            }
        }
    }

    #[test]
    fn every_instruction_set_packs_alike() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let kernel = Kernel::new(isa).unwrap();
            for largest in [255, 15] {
                for lanes in [1, 3, 32, 33, 64, 70, 128] {
                    for (depth, rows) in [(8, 8), (8, 1), (24, 20), (64, 64)] {
                        for group in [lanes, PANEL.min(lanes)] {
                            let shape = CodesShape { depth, lanes, group, largest };
                            codes_are_those_of_the_definition(kernel, shape, rows);
                        }
                    }
                }
            }
        }
    }
}
