//! The statistics at the centre of learning: what a mask of one KV head costs.
//!
//! For a KV head, a mask of its channels and windows, let `p` be the softmax over mixed logits
//! (all channels in the windows, masked ones in the middle) and `o_m = pV`. For the query at
//! decode position `i`, summed over the query heads of the group,
//!
//! - `s_i = Σ g_i·(o_m,i − o_i)`: the change of the probe, with `o` the unmasked output;
//! - `w_ij = g_i·(v_j − o_m,i)`;
//! - `z_i[c] = Σ q_i[c]/√D · Σ_{j in the middle} p_ij w_ij k_j[c]`: the derivative of `s_i` by the
//!   weight of channel `c` in the middle.
//!
//! Averaged over valid positions and draws of the probe: the loss `C = E[s²]`, half its gradient
//! `b = E[s z]`, and the Gauss–Newton matrix `A = E[z zᵀ]`. Removing a set `P` of channels then
//! costs about `C − 2 Σ_P b + Σ_{P×P} A`, and `C` is exact at the mask it was computed at.
//!
//! What the middle holds may be kept channels as dumped, or K and V as lean blocks of 8 and 4 bits give
//! them back: [`HeadEvaluator::evaluate_precisions`].
//!
//! **Cost.** With `r` queries in the group, `T` tokens, `R` draws and `n` channels kept of `D`,
//! one evaluation is `2·r·T·(n + R·D + R·n)` operations: masked logits, `g·V`, and the
//! contraction of `p∘w` with K. All three are matrix products. Everything is single-threaded here
//! and in a fixed order, so results do not depend on how heads are spread over threads.

mod lanes;
mod part;
mod products;
mod tile;

use leank_core::{DEFAULT_BLOCK, Dtype, KvHead, Precision, Tensor, Windows, quant};

use crate::{
    Error, Result,
    dump::{HeadData, LayerDump, Manifest},
};
use tile::{Buffers, Loss, Tile};

/// What a KV head sees of its keys in the middle.
#[derive(Clone, Debug, PartialEq)]
pub enum HeadMask {
    /// Nothing: the middle is left out of the softmax.
    Dead,
    /// These channels, each once, in any order; none is as good as [`HeadMask::Dead`].
    Kept(Vec<u16>),
    /// Every channel, times a weight: `head_dim` of them. All-zero weights are not a dead head:
    /// the middle is then seen with logits of 0.
    Scaled(Vec<f32>),
}

/// How much [`HeadEvaluator::evaluate`] computes for the last mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// `C` and `b`.
    Gradient,
    /// `C`, `b` and `A`.
    Quadratic,
}

/// `C`, `b` and `A` of one mask, averaged over valid positions and draws.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// `C = E[s²]`.
    pub loss: f64,
    /// `b = E[s z]`, `[head_dim]`; 0 at channels that a [`HeadMask::Kept`] does not keep.
    pub b: Vec<f64>,
    /// `A = E[z zᵀ]`, `[head_dim, head_dim]`; 0 at channels not kept; empty without
    /// [`Want::Quadratic`].
    pub a: Vec<f64>,
}

/// What [`HeadEvaluator::evaluate`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// `C` of each of the masks whose loss was asked for.
    pub losses: Vec<f64>,
    /// Statistics of the mask given with [`Want`].
    pub stats: Option<Stats>,
}

/// Computes [`Stats`] of one KV head over the sequences of a dump.
///
/// Holds the outputs of the unmasked head (one number per position and draw) and its buffers;
/// activations are read anew at each evaluation.
#[derive(Debug)]
pub struct HeadEvaluator<'a> {
    manifest: &'a Manifest,
    layer: &'a LayerDump<'a>,
    head: KvHead,
    windows: Windows,
    /// Per sequence: `Σ_group g·o` of the unmasked head, `[draws, valid positions]`; empty until
    /// computed.
    reference: Vec<Vec<f64>>,
    data: HeadData,
    lean: Lean,
    buffers: Buffers,
}

/// Precisions that [`HeadEvaluator::evaluate_precisions`] measures K and V in: the dump's own, and
/// those of codes.
pub const MEASURED: [Precision; 3] = [Precision::Sixteen, Precision::Eight, Precision::Four];

/// K and V of a sequence as lean blocks hold them in the precisions of [`MEASURED`] but the first,
/// `[T + N, head_dim]` each.
#[derive(Debug, Default)]
struct Lean {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

impl Lean {
    /// Packs and reads back every block of the sequence, as the cache does.
    fn fill(&mut self, data: &HeadData, d: usize) {
        let packed = |tensor: Tensor, values: &[f32], precision: Precision| {
            let mut values = values.to_vec();
            for block in values.chunks_mut(DEFAULT_BLOCK * d) {
                quant::round_trip(precision.format(Dtype::F32), tensor, d, block);
            }
            values
        };
        let all = |tensor, values: &[f32]| {
            MEASURED[1..].iter().map(|&precision| packed(tensor, values, precision)).collect()
        };
        *self = Self { k: all(Tensor::K, &data.k), v: all(Tensor::V, &data.v) };
    }
}

impl<'a> HeadEvaluator<'a> {
    /// An evaluator of KV head `head` of `layer`. A recent window of 0 tokens means the same as
    /// one of 1.
    #[must_use]
    pub fn new(layer: &'a LayerDump<'a>, head: KvHead, windows: Windows) -> Self {
        let manifest = layer.manifest();
        Self {
            manifest,
            layer,
            head,
            // The query's own token is always kept whole, as in the cache.
            windows: Windows { recent: windows.recent.max(1), ..windows },
            reference: vec![Vec::new(); manifest.sequences.len()],
            data: HeadData::default(),
            lean: Lean::default(),
            buffers: Buffers::default(),
        }
    }

    /// Channels of the head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.manifest.shape.head_dim
    }

    /// Evaluates masks over all sequences: the exact losses of `losses`, and the statistics of
    /// `last` where given.
    ///
    /// `g·V` is computed once for all of them. Masks of `losses` that grow by adding channels at
    /// the end of the previous one's list only cost the products of the channels added.
    ///
    /// # Errors
    /// [`Error::NonFinite`] and [`Error::Io`] from reading; [`Error::Overflow`].
    pub fn evaluate(
        &mut self,
        losses: &[HeadMask],
        last: Option<(&HeadMask, Want)>,
    ) -> Result<Evaluation> {
        let all: Vec<usize> = (0..self.manifest.sequences.len()).collect();
        self.evaluate_on(&all, losses, last)
    }

    /// As [`HeadEvaluator::evaluate`], over some of the sequences.
    ///
    /// # Errors
    /// As [`HeadEvaluator::evaluate`].
    ///
    /// # Panics
    /// When a sequence is out of range, a mask's channels are, or its weights are not `head_dim`.
    pub fn evaluate_on(
        &mut self,
        sequences: &[usize],
        losses: &[HeadMask],
        last: Option<(&HeadMask, Want)>,
    ) -> Result<Evaluation> {
        self.run(sequences, losses, last, false)
    }

    /// The exact losses of masks when lean blocks hold K and V in each of the [`MEASURED`] precisions:
    /// `[K, masks, V]`, K and V in that order.
    ///
    /// Blocks of [`DEFAULT_BLOCK`] tokens are packed and read back by
    /// [`quant::round_trip`] where a cache's blocks lie; the middle is
    /// that of [`HeadEvaluator::evaluate`], to the token. What is kept plain is as dumped.
    ///
    /// # Errors
    /// As [`HeadEvaluator::evaluate`].
    ///
    /// # Panics
    /// When a channel is out of range, or a mask is [`HeadMask::Scaled`].
    pub fn evaluate_precisions(&mut self, masks: &[HeadMask]) -> Result<Vec<f64>> {
        let all: Vec<usize> = (0..self.manifest.sequences.len()).collect();
        Ok(self.run(&all, masks, None, true)?.losses)
    }

    /// Evaluates over sequences; with `coded`, `losses` in all precisions.
    fn run(
        &mut self,
        sequences: &[usize],
        losses: &[HeadMask],
        last: Option<(&HeadMask, Want)>,
        coded: bool,
    ) -> Result<Evaluation> {
        let d = self.head_dim();
        let measured = if coded { MEASURED.len() } else { 1 };
        let mut totals =
            Totals::new(d, losses.len() * measured * measured, last.map(|(_, want)| want));
        for &sequence in sequences {
            let info = &self.manifest.sequences[sequence];
            if info.valid.is_empty() {
                continue;
            }
            self.layer.read(self.head, sequence, &mut self.data)?;
            if coded {
                self.lean.fill(&self.data, d);
            }
            let lean_k = self.lean.k[..].iter().take(measured - 1).map(|k| Some(&k[..]));
            let losses: Vec<Loss<'_>> = std::iter::once(None)
                .chain(lean_k)
                .flat_map(|lean_k| losses.iter().map(move |mask| Loss { mask, lean_k }))
                .collect();
            let tile = Tile {
                data: &self.data,
                d,
                group: self.manifest.shape.group(),
                draws: self.manifest.draws,
                positions: self.manifest.positions,
                prefix: info.prefix,
                windows: self.windows,
                lean_v: if coded { &self.lean.v } else { &[] },
            };
            let reference = &mut self.reference[sequence];
            let is_new = reference.is_empty();
            reference.resize(self.manifest.draws * info.valid.len(), 0.0);
            self.buffers.gather(&tile, &losses, last.map(|(mask, _)| mask), is_new);
            let step = tile.positions_at_once();
            for (i, valid) in info.valid.chunks(step).enumerate() {
                let own = tile::Reference {
                    values: reference,
                    is_new,
                    stride: info.valid.len(),
                    first: i * step,
                };
                tile.run(valid, &mut self.buffers, own, &mut totals);
            }
        }
        totals.finish().ok_or(Error::Overflow { layer: self.layer.layer(), kv_head: self.head })
    }
}

/// Sums over tiles, in f64.
#[derive(Debug)]
struct Totals {
    count: usize,
    losses: Vec<f64>,
    last: Option<Stats>,
}

impl Totals {
    fn new(d: usize, losses: usize, want: Option<Want>) -> Self {
        let last = want.map(|want| Stats {
            loss: 0.0,
            b: vec![0.0; d],
            a: if want == Want::Quadratic { vec![0.0; d * d] } else { Vec::new() },
        });
        Self { count: 0, losses: vec![0.0; losses], last }
    }

    /// Means, unless one is not finite.
    fn finish(mut self) -> Option<Evaluation> {
        let scale = if self.count == 0 { 0.0 } else { 1.0 / self.count as f64 };
        let mut all: Vec<&mut f64> = self.losses.iter_mut().collect();
        if let Some(last) = &mut self.last {
            all.extend(&mut last.b);
            all.extend(&mut last.a);
            all.push(&mut last.loss);
        }
        for value in all {
            *value *= scale;
            if !value.is_finite() {
                return None;
            }
        }
        Some(Evaluation { losses: self.losses, stats: self.last })
    }
}
