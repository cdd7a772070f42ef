//! A mask made ready for the products over one sequence.

use std::ops::Range;

use super::{
    HeadMask,
    tile::{Loss, Tile},
};

/// One mask over a sequence: the columns of K that it adds to the logits.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) mask: PartMask,
    /// `[middle, channels]`; empty where all of K is used as it lies.
    pub(super) columns: Vec<f32>,
    /// Added to the logits of the part before, instead of replacing them.
    pub(super) continues: bool,
}

#[derive(Debug)]
pub(super) enum PartMask {
    Dead,
    /// Every channel in order, with weights or without.
    All(Option<Vec<f32>>),
    Some(Vec<u16>),
}

impl Tile<'_> {
    /// Tokens that are in the middle for some position of the sequence.
    fn middle(&self) -> Range<usize> {
        let tokens = self.prefix + self.positions;
        let sink = self.windows.sink.min(tokens);
        sink..tokens.saturating_sub(self.windows.recent).max(sink)
    }

    /// `previous` is the part before, which this one continues where it only adds channels of the
    /// same K.
    pub(super) fn part(&self, loss: Loss<'_>, previous: Option<Loss<'_>>) -> Part {
        let Loss { mask, lean_k } = loss;
        let channels = match mask {
            HeadMask::Kept(channels) if !channels.is_empty() => channels,
            HeadMask::Dead | HeadMask::Kept(_) => {
                return Part { mask: PartMask::Dead, columns: Vec::new(), continues: false };
            }
            HeadMask::Scaled(weights) => {
                assert!(lean_k.is_none(), "weights are for K as dumped");
                assert_eq!(weights.len(), self.d, "one weight per channel");
                let mask = PartMask::All(Some(weights.clone()));
                return Part { mask, columns: Vec::new(), continues: false };
            }
        };
        let same_k =
            |other: Option<&[f32]>| other.map(<[f32]>::as_ptr) == lean_k.map(<[f32]>::as_ptr);
        let tail = match previous {
            Some(Loss { mask: HeadMask::Kept(previous), lean_k })
                if !previous.is_empty() && same_k(lean_k) =>
            {
                channels.strip_prefix(&previous[..])
            }
            _ => None,
        };
        let continues = tail.is_some();
        let channels = tail.unwrap_or(channels);
        if lean_k.is_none() && channels.iter().map(|&c| usize::from(c)).eq(0..self.d) {
            return Part { mask: PartMask::All(None), columns: Vec::new(), continues };
        }
        let mut columns = Vec::with_capacity(self.middle().len() * channels.len());
        for key in self.middle() {
            let row = &lean_k.unwrap_or(&self.data.k)[key * self.d..][..self.d];
            columns.extend(channels.iter().map(|&c| row[usize::from(c)]));
        }
        Part { mask: PartMask::Some(channels.to_vec()), columns, continues }
    }
}

impl Part {
    /// Channels whose products it needs.
    pub(super) fn width(&self, d: usize) -> usize {
        match &self.mask {
            PartMask::Dead => 0,
            PartMask::All(_) => d,
            PartMask::Some(channels) => channels.len(),
        }
    }

    /// Channel of column `column`.
    pub(super) fn channel(&self, column: usize) -> usize {
        match &self.mask {
            PartMask::Some(channels) => usize::from(channels[column]),
            _ => column,
        }
    }

    /// The queries that go with the part's columns, `[width, rows]`.
    pub(super) fn queries<'b>(
        &self,
        q: &'b [f32],
        scratch: &'b mut Vec<f32>,
        rows: usize,
    ) -> &'b [f32] {
        scratch.clear();
        match &self.mask {
            PartMask::Dead | PartMask::All(None) => return q,
            PartMask::All(Some(weights)) => {
                for (q, weight) in q.chunks_exact(rows).zip(weights) {
                    scratch.extend(q.iter().map(|q| q * weight));
                }
            }
            PartMask::Some(channels) => {
                for &c in channels {
                    scratch.extend_from_slice(&q[usize::from(c) * rows..][..rows]);
                }
            }
        }
        scratch
    }
}
