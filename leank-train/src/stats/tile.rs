//! One tile: some positions of one sequence, against all the keys they see.
//!
//! Everything that grows with the context is key-major, `[keys, rows]` with `rows` the group's
//! queries of the tile's positions (`head · positions + position`, padded to whole lanes): logits
//! are then `K · Qᵀ` with K as it lies in the dump, and the contraction over keys is `Kᵀ · PW` with
//! the same K and vectors of contiguous rows.
//!
//! Keys fall into four ranges: sink, middle of every position of the tile, the boundary (middle
//! for some positions, recent for others), and recent for every position.

use std::ops::Range;

use leank_core::Windows;

use super::{
    HeadMask, Totals,
    lanes::{LANES, Sums, raise_to_max},
    part::{Part, PartMask},
    products::{Contraction, Product},
};
use crate::dump::HeadData;

/// Scratch that a tile aims at: small enough for a core's own second cache to help.
const TILE_BYTES: usize = 1 << 20;
/// Scratch that is spent on long contexts for the sake of products with enough rows.
const MAX_TILE_BYTES: usize = 64 << 20;
/// Rows below which reading K and V costs more than what a larger tile costs: a whole panel of the
/// products.
const MIN_ROWS: usize = 48;

/// What a tile is part of: one sequence of one KV head.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    pub(super) data: &'a HeadData,
    pub(super) d: usize,
    pub(super) group: usize,
    pub(super) draws: usize,
    /// Decode positions of the sequence.
    pub(super) positions: usize,
    pub(super) prefix: usize,
    pub(super) windows: Windows,
    /// Other V `[T + N, d]` that the middle may hold, for the losses of all parts.
    pub(super) lean_v: &'a [Vec<f32>],
}

/// A mask whose loss is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loss<'a> {
    pub(super) mask: &'a HeadMask,
    /// K `[T + N, d]` as the middle holds it, where that is not K as dumped.
    pub(super) lean_k: Option<&'a [f32]>,
}

/// Outputs of the unmasked head, read or filled in.
#[derive(Debug)]
pub(super) struct Reference<'a> {
    /// `[draws, stride]`, of which the tile's positions start at `first`.
    pub(super) values: &'a mut [f64],
    pub(super) is_new: bool,
    pub(super) stride: usize,
    pub(super) first: usize,
}

/// The ranges of keys of a tile.
#[derive(Debug)]
struct Keys {
    /// End of the sink.
    sink: usize,
    /// Start of the boundary; `sink..boundary` is the middle of every position.
    boundary: usize,
    /// Start of what is recent for every position.
    recent: usize,
    /// End of what is seen.
    end: usize,
}

/// Buffers that are reused from tile to tile.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    parts: Vec<Part>,
    /// Whether the first part is there only for the reference.
    reference_part: Option<usize>,
    has_last: bool,
    /// Queries times 1/√D, `[d, rows]`.
    q: Vec<f32>,
    /// Queries of a part, `[channels, rows]`.
    q_part: Vec<f32>,
    /// `[d, draws, rows]`
    g: Vec<f32>,
    /// g·v, `[keys, draws, rows]`; where there are other V than the dump's, `[keys, V, draws, rows]`.
    gv: Vec<f32>,
    /// g·v of one V, `[keys, draws, rows]`.
    gv_lean: Vec<f32>,
    /// Full logits of sink and of boundary and recent, `[keys, rows]`.
    full: Vec<f32>,
    /// Masked logits of middle and boundary, `[keys, rows]`.
    masked: Vec<f32>,
    /// Logits of the boundary, `[keys, rows]`.
    mixed: Vec<f32>,
    /// End of the middle and end of what is seen, `[rows]`.
    middle_end: Vec<u32>,
    seen_end: Vec<u32>,
    sums: Sums,
    /// g·o summed over the group, per part `[V, draws, positions]`.
    outputs: Vec<Vec<f64>>,
    /// Contraction over keys `[channels, draws, rows]`, then `z [channels, draws, positions]`.
    contraction: Vec<f32>,
    z: Vec<f32>,
    /// z `[draws, positions, channels]`, channels padded to whole lanes.
    z_samples: Vec<f32>,
    /// z zᵀ of the tile, `[channels, channels]`, the latter padded likewise.
    product: Vec<f32>,
}

impl Buffers {
    /// Prepares the masks for a sequence.
    pub(super) fn gather(
        &mut self,
        tile: &Tile<'_>,
        losses: &[Loss<'_>],
        last: Option<&HeadMask>,
        reference_is_new: bool,
    ) {
        self.parts.clear();
        self.has_last = last.is_some();
        let full = HeadMask::Kept((0..tile.d as u16).collect());
        let whole = |mask| Loss { mask, lean_k: None };
        if reference_is_new && last != Some(&full) {
            self.parts.push(tile.part(whole(&full), None));
            self.reference_part = Some(0);
        } else {
            self.reference_part = reference_is_new.then_some(losses.len());
        }
        let mut previous = None;
        for &loss in losses {
            self.parts.push(tile.part(loss, previous));
            previous = Some(loss);
        }
        if let Some(mask) = last {
            self.parts.push(tile.part(whole(mask), None));
        }
    }
}

/// `values` with `len` elements, all 0.
fn reset(values: &mut Vec<f32>, len: usize) {
    values.clear();
    values.resize(len, 0.0);
}

/// `values` with `len` elements that are about to be overwritten.
fn size(values: &mut Vec<f32>, len: usize) {
    values.resize(len, 0.0);
}

impl Tile<'_> {
    /// V that outputs are computed with: the dump's, then the others.
    fn variants(&self) -> usize {
        1 + self.lean_v.len()
    }

    /// Positions whose tile stays within the scratch.
    pub(super) fn positions_at_once(&self) -> usize {
        let products = self.variants() * self.draws;
        let row = (self.prefix + self.positions) * (1 + products) * size_of::<f32>();
        let rows = (TILE_BYTES / row).max(MIN_ROWS.min(MAX_TILE_BYTES / row));
        // Padding costs as much as rows do.
        let rows = if rows > LANES { rows - rows % LANES } else { rows };
        (rows / self.group).clamp(1, self.positions)
    }

    /// Evaluates every mask on the positions `valid`.
    pub(super) fn run(
        &self,
        valid: &[u32],
        buffers: &mut Buffers,
        reference: Reference<'_>,
        totals: &mut Totals,
    ) {
        let rows = (self.group * valid.len()).next_multiple_of(LANES);
        let keys = self.keys(valid);
        self.load_queries(valid, rows, buffers);
        self.full_products(&keys, rows, buffers);

        buffers.outputs.resize(buffers.parts.len(), Vec::new());
        let parts = std::mem::take(&mut buffers.parts);
        for (i, part) in parts.iter().enumerate() {
            self.logits(part, &keys, rows, buffers);
            let is_last = buffers.has_last && i + 1 == parts.len();
            self.softmax(&keys, part, is_last, buffers);
            let outputs = self.group_sums(valid.len(), &buffers.sums.value, rows);
            buffers.outputs[i] = outputs;
            if is_last {
                self.contract(part, &keys, valid.len(), buffers);
            }
        }
        self.add_up(valid.len(), &parts, buffers, reference, totals);
        buffers.parts = parts;
    }

    fn keys(&self, valid: &[u32]) -> Keys {
        let first = valid.first().map_or(0, |&i| i as usize);
        let last = valid.last().map_or(0, |&i| i as usize);
        let end = self.prefix + last + 1;
        let sink = self.windows.sink.min(end);
        let boundary = (self.prefix + first + 1).saturating_sub(self.windows.recent).max(sink);
        let recent = end.saturating_sub(self.windows.recent).max(boundary);
        Keys { sink, boundary, recent, end }
    }

    /// Queries and probes with rows contiguous, and the limits of what each row sees.
    fn load_queries(&self, valid: &[u32], rows: usize, buffers: &mut Buffers) {
        let (d, n) = (self.d, self.positions);
        let scale = 1.0 / (d as f32).sqrt();
        let Buffers { q, g, middle_end, seen_end, .. } = buffers;
        reset(q, d * rows);
        reset(g, d * self.draws * rows);
        middle_end.clear();
        middle_end.resize(rows, 0);
        seen_end.clear();
        seen_end.resize(rows, 0);
        for head in 0..self.group {
            for (i, &position) in valid.iter().enumerate() {
                let (row, position) = (head * valid.len() + i, position as usize);
                let own = &self.data.q[(head * n + position) * d..][..d];
                for (c, &value) in own.iter().enumerate() {
                    q[c * rows + row] = value * scale;
                }
                for draw in 0..self.draws {
                    let own = ((draw * self.group + head) * n + position) * d;
                    for (c, &value) in self.data.g[own..][..d].iter().enumerate() {
                        g[(c * self.draws + draw) * rows + row] = value;
                    }
                }
                let seen = self.prefix + position + 1;
                // Tokens of a dump are far fewer than u32 counts: see the manifest's limits.
                seen_end[row] = seen as u32;
                middle_end[row] = seen.saturating_sub(self.windows.recent) as u32;
            }
        }
    }

    /// What all masks share: `g·v`, and the full logits of the windows.
    fn full_products(&self, keys: &Keys, rows: usize, buffers: &mut Buffers) {
        let d = self.d;
        self.value_products(keys, rows, buffers);
        let Buffers { q, full, seen_end, .. } = buffers;
        let sink = keys.sink * rows;
        size(full, sink + (keys.end - keys.boundary) * rows);
        let (first, second) = full.split_at_mut(sink);
        for (range, out) in [(0..keys.sink, first), (keys.boundary..keys.end, second)] {
            let k = &self.data.k[range.start * d..range.end * d];
            Product { k, q, rows, adds: false, out }.run();
            for (key, logits) in range.zip(out.chunks_exact_mut(rows)) {
                if key <= self.prefix {
                    continue;
                }
                for (logit, &end) in logits.iter_mut().zip(&*seen_end) {
                    *logit = if key < end as usize { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
    }

    /// `g·v` with the dump's V, then with each of the others where a row's key is in the middle.
    fn value_products(&self, keys: &Keys, rows: usize, buffers: &mut Buffers) {
        let Buffers { g, gv, gv_lean, middle_end, .. } = buffers;
        let wide = self.draws * rows;
        let product = |v: &[f32], out: &mut Vec<f32>| {
            size(out, keys.end * wide);
            let v = &v[..keys.end * self.d];
            Product { k: v, q: g, rows: wide, adds: false, out }.run();
        };
        if self.lean_v.is_empty() {
            return product(&self.data.v, gv);
        }
        let all = self.variants() * wide;
        size(gv, keys.end * all);
        product(&self.data.v, gv_lean);
        for (gv, own) in gv.chunks_exact_mut(all).zip(gv_lean.chunks_exact(wide)) {
            gv.chunks_exact_mut(wide).for_each(|gv| gv.copy_from_slice(own));
        }
        for (i, v) in self.lean_v.iter().enumerate() {
            product(v, gv_lean);
            for key in keys.sink..keys.recent {
                let own = &gv_lean[key * wide..][..wide];
                let gv = &mut gv[key * all + (1 + i) * wide..][..wide];
                for (gv, own) in gv.chunks_exact_mut(rows).zip(own.chunks_exact(rows)) {
                    for ((gv, &own), &end) in gv.iter_mut().zip(own).zip(&*middle_end) {
                        *gv = if key < end as usize { own } else { *gv };
                    }
                }
            }
        }
    }

    /// Masked logits of the middle, and the boundary's mixture.
    fn logits(&self, part: &Part, keys: &Keys, rows: usize, buffers: &mut Buffers) {
        let Buffers { q, q_part, full, masked, mixed, middle_end, .. } = buffers;
        let middle = keys.recent - keys.sink;
        let width = part.width(self.d);
        if !part.continues {
            size(masked, middle * rows);
        }
        if width > 0 {
            let (k, q) = (self.part_keys(part, keys), part.queries(q, q_part, rows));
            Product { k, q, rows, adds: part.continues, out: masked }.run();
        }
        mixed.clear();
        let boundary = keys.boundary..keys.recent;
        let full = full[keys.sink * rows..].chunks_exact(rows);
        let masked = masked[(keys.boundary - keys.sink) * rows..].chunks_exact(rows);
        let is_dead = matches!(part.mask, PartMask::Dead);
        for ((key, full), masked) in boundary.zip(full).zip(masked) {
            let logits = full.iter().zip(masked).zip(&*middle_end);
            mixed.extend(logits.map(|((&full, &masked), &end)| {
                match (key < end as usize, is_dead) {
                    (false, _) => full,
                    (true, false) => masked,
                    (true, true) => f32::NEG_INFINITY,
                }
            }));
        }
    }

    /// K's columns of a part in the middle and boundary of this tile.
    fn part_keys<'b>(&'b self, part: &'b Part, keys: &Keys) -> &'b [f32] {
        let width = part.width(self.d);
        let columns = match part.mask {
            PartMask::All(_) => &self.data.k[keys.sink * width..],
            _ => &part.columns,
        };
        &columns[..(keys.recent - keys.sink) * width]
    }

    /// Softmax sums over all that is seen; for the last part also the weights, in place of
    /// the logits.
    fn softmax(&self, keys: &Keys, part: &Part, is_last: bool, buffers: &mut Buffers) {
        let Buffers { gv, full, masked, mixed, sums, middle_end, .. } = buffers;
        let rows = middle_end.len();
        let products = self.variants() * self.draws;
        let wide = products * rows;
        sums.reset(rows, products);
        let always = (keys.boundary - keys.sink) * rows;
        let middle =
            if matches!(part.mask, PartMask::Dead) { &mut [][..] } else { &mut masked[..always] };
        let (sink, late) = full.split_at(keys.sink * rows);
        let recent = &late[(keys.recent - keys.boundary) * rows..];
        for logits in [sink, &*middle, &*mixed, recent] {
            raise_to_max(logits, &mut sums.max);
        }
        let gv_of = |keys: Range<usize>| keys.start * wide..keys.end * wide;
        sums.add(sink, &gv[gv_of(0..keys.sink)]);
        sums.add(recent, &gv[gv_of(keys.recent..keys.end)]);
        let (middle_gv, boundary_gv) =
            (gv_of(keys.sink..keys.boundary), gv_of(keys.boundary..keys.recent));
        if !is_last {
            sums.add(middle, &gv[middle_gv]);
            sums.add(mixed, &gv[boundary_gv]);
            sums.finish();
            return;
        }
        if !middle.is_empty() {
            sums.add_in_place(middle, &gv[middle_gv]);
        }
        sums.add_in_place(mixed, &gv[boundary_gv]);
        sums.finish();
        // Only what is in the middle depends on the mask.
        for (key, weights) in (keys.boundary..keys.recent).zip(mixed.chunks_exact_mut(rows)) {
            for (weight, &end) in weights.iter_mut().zip(&*middle_end) {
                *weight = if key < end as usize { *weight } else { 0.0 };
            }
        }
    }

    /// `z [channels, draws, positions]` from the weights of middle and boundary.
    fn contract(&self, part: &Part, keys: &Keys, positions: usize, buffers: &mut Buffers) {
        let Buffers { q, gv, masked, mixed, sums, contraction, z, .. } = buffers;
        let rows = sums.weight.len();
        let (width, wide) = (part.width(self.d), self.draws * rows);
        reset(contraction, width * wide);
        reset(z, width * self.draws * positions);
        if width == 0 {
            return;
        }
        let k = self.part_keys(part, keys);
        let always = keys.boundary - keys.sink;
        let (k, k_boundary) = k.split_at(always * width);
        let (gv, gv_boundary) = gv[keys.sink * wide..].split_at(always * wide);
        let weight = &masked[..always * rows];
        for (k, gv, weight) in [(k, gv, weight), (k_boundary, gv_boundary, mixed)] {
            let (mean, out) = (&sums.value[..], &mut contraction[..]);
            Contraction { k, gv, weight, mean, rows, out }.run();
        }
        for (at, z) in z.chunks_exact_mut(positions).enumerate() {
            let (column, draw) = (at / self.draws, at % self.draws);
            let own = &contraction[(column * self.draws + draw) * rows..][..rows];
            let q = &q[part.channel(column) * rows..][..rows];
            for row in 0..self.group * positions {
                z[row % positions] += q[row] * sums.weight[row] * own[row];
            }
        }
    }

    /// `[V, draws, rows]` summed over the group: `[V, draws, positions]`.
    fn group_sums(&self, positions: usize, values: &[f32], rows: usize) -> Vec<f64> {
        let mut sums = vec![0.0; self.variants() * self.draws * positions];
        for (values, sums) in values.chunks_exact(rows).zip(sums.chunks_exact_mut(positions)) {
            for row in 0..self.group * positions {
                sums[row % positions] += f64::from(values[row]);
            }
        }
        sums
    }

    /// Adds the tile's `s` and `z` to the totals.
    fn add_up(
        &self,
        positions: usize,
        parts: &[Part],
        buffers: &mut Buffers,
        reference: Reference<'_>,
        totals: &mut Totals,
    ) {
        let Reference { values, is_new, stride, first } = reference;
        let Buffers { outputs, z, z_samples, product, reference_part, has_last, .. } = buffers;
        let own = |draw: usize| draw * stride + first..draw * stride + first + positions;
        if let (true, Some(part)) = (is_new, *reference_part) {
            let own_v = outputs[part].chunks_exact(positions).take(self.draws);
            for (draw, output) in own_v.enumerate() {
                values[own(draw)].copy_from_slice(output);
            }
        }
        // From outputs to their changes.
        for outputs in &mut *outputs {
            for (at, output) in outputs.chunks_exact_mut(positions).enumerate() {
                output.iter_mut().zip(&values[own(at % self.draws)]).for_each(|(s, o)| *s -= o);
            }
        }
        let samples = self.draws * positions;
        totals.count += samples;
        let squares = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
        let last = parts.len() - usize::from(*has_last);
        let first_loss = last - totals.losses.len() / self.variants();
        let changes = outputs[first_loss..last].iter().flat_map(|s| s.chunks_exact(samples));
        for (total, s) in totals.losses.iter_mut().zip(changes) {
            *total += squares(s);
        }
        let (Some(stats), Some(s)) = (&mut totals.last, outputs.get(last)) else { return };
        stats.loss += squares(s);
        let part = &parts[last];
        let width = part.width(self.d);
        for (column, z) in z.chunks_exact(samples).enumerate() {
            let sum: f64 = z.iter().zip(s).map(|(&z, s)| f64::from(z) * s).sum();
            stats.b[part.channel(column)] += sum;
        }
        if stats.a.is_empty() || width == 0 {
            return;
        }
        let rows = width.next_multiple_of(LANES);
        reset(z_samples, samples * rows);
        for (column, z) in z.chunks_exact(samples).enumerate() {
            z_samples.iter_mut().skip(column).step_by(rows).zip(z).for_each(|(out, z)| *out = *z);
        }
        size(product, width * rows);
        Product { k: z, q: z_samples, rows, adds: false, out: product }.run();
        for (i, row) in product.chunks_exact(rows).enumerate() {
            for (j, &value) in row[..width].iter().enumerate() {
                stats.a[part.channel(i) * self.d + part.channel(j)] += f64::from(value);
            }
        }
    }
}
