//! How codes and their scales lie in a block: `[depth, lanes]` like everything (see
//! [`crate::panels`]), with a scale for each row, or for each row of a panel.
//!
//! Lanes that share scales lie behind these: the scales of all rows, then the panels of codes. So what
//! a pass needs comes in the order of memory. In 4 bits two rows of a panel share their bytes, the first
//! one in the lower halves.

use leank_core::quant::{Scale, quantise};

use crate::panels::PANEL;

/// What decides where codes lie.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesShape {
    /// Rows, a multiple of two.
    pub(crate) depth: usize,
    /// Codes of a row.
    pub(crate) lanes: usize,
    /// Lanes that share a scale: all of them, or a panel's.
    pub(crate) group: usize,
    /// The largest code; 15: two rows share their bytes.
    pub(crate) largest: u8,
}

impl CodesShape {
    /// Rows that share bytes.
    fn rows_per_byte(self) -> usize {
        if self.largest < 16 { 2 } else { 1 }
    }

    /// Groups of lanes, as the first lane and the number of lanes.
    fn groups(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.lanes)
            .step_by(self.group)
            .map(move |first| (first, self.group.min(self.lanes - first)))
    }

    /// Bytes of `lanes` lanes with their scales.
    fn bytes(self, lanes: usize) -> usize {
        self.depth * Scale::BYTES + self.depth / self.rows_per_byte() * lanes
    }
}

/// Lanes that share scales.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CodesGroup<'a> {
    pub(crate) first: usize,
    pub(crate) lanes: usize,
    /// One per row.
    pub(crate) scales: &'a [Scale],
    /// Panels of codes.
    pub(crate) codes: &'a [u8],
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
            let (scales, codes) = group.split_at(self.shape.depth * Scale::BYTES);
            CodesGroup { first, lanes, scales: bytemuck::cast_slice(scales), codes }
        })
    }

    /// Takes a row out: a scale for each group, a code for each lane.
    pub(crate) fn row(self, row: usize, scales: &mut Vec<Scale>, codes: &mut Vec<u8>) {
        scales.clear();
        codes.clear();
        let packed = self.shape.rows_per_byte();
        for group in self.groups() {
            scales.push(group.scales[row]);
            for first in (0..group.lanes).step_by(PANEL) {
                let width = PANEL.min(group.lanes - first);
                let panel = &group.codes[first * self.shape.depth / packed..];
                let bytes = &panel[row / packed * width..][..width];
                codes.extend(
                    bytes.iter().map(|byte| byte >> (row % packed * 4) & self.shape.largest),
                );
            }
        }
    }
}

/// Codes and scales of K or V of one head in one block, to be written.
#[derive(Debug)]
pub(crate) struct CodesMut<'a> {
    pub(crate) shape: CodesShape,
    pub(crate) bytes: &'a mut [u8],
}

impl CodesMut<'_> {
    /// Quantises `rows` rows, which `row` puts where it is told to; rows beyond them become zero, with
    /// scales of 0. `wide` and `codes` hold a row.
    #[inline(always)]
    pub(crate) fn quantise(
        &mut self,
        rows: usize,
        (wide, codes): (&mut Vec<f32>, &mut Vec<u8>),
        mut row: impl FnMut(usize, &mut [f32]),
    ) {
        let CodesShape { lanes, group, largest, .. } = self.shape;
        wide.clear();
        wide.resize(lanes, 0.0);
        codes.clear();
        codes.resize(lanes, 0);
        for i in 0..rows {
            row(i, wide);
            let groups = wide.chunks(group).zip(codes.chunks_mut(group));
            for (at, (values, codes)) in groups.enumerate() {
                let scale = quantise(values, largest, codes);
                self.put(i, at, scale, codes);
            }
        }
        self.clear_from(rows);
    }

    /// Writes one group of a row. Rows that share bytes come in their order.
    #[inline(always)]
    pub(crate) fn put(&mut self, row: usize, group: usize, scale: Scale, codes: &[u8]) {
        let CodesShape { depth, group: lanes, .. } = self.shape;
        let packed = self.shape.rows_per_byte();
        // Groups before it are all of `lanes` lanes.
        let before = if group == 0 { 0 } else { group * self.shape.bytes(lanes) };
        let (scales, panels) = self.bytes[before..].split_at_mut(depth * Scale::BYTES);
        bytemuck::cast_slice_mut::<u8, Scale>(scales)[row] = scale;
        for (i, codes) in codes.chunks(PANEL).enumerate() {
            let panel = &mut panels[i * PANEL * depth / packed..];
            let bytes = &mut panel[row / packed * codes.len()..][..codes.len()];
            if row.is_multiple_of(packed) {
                bytes.copy_from_slice(codes);
            } else {
                bytes.iter_mut().zip(codes).for_each(|(byte, code)| *byte |= code << 4);
            }
        }
    }

    /// Zeroes the rows from `row` on, scales too: factors of 0 meet no NaN there.
    pub(crate) fn clear_from(&mut self, row: usize) {
        let zeros = vec![0; self.shape.group];
        for row in row..self.shape.depth {
            for (at, (_, lanes)) in self.shape.groups().enumerate() {
                self.put(row, at, Scale::from_bits(0), &zeros[..lanes]);
            }
        }
    }
}
