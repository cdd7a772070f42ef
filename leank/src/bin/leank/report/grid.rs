//! Layers × KV heads × channels on paper: rows are KV heads, columns channels in the order of RoPE's
//! frequencies.

use std::f64::consts::TAU;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use leank::{Fingerprint, KvHead, Layer, ModelMask};
use maud::{Markup, html};
use serde::Serialize;

use crate::figure::{cells::Look, numbers, round};

/// Most rows that are drawn: one more is no longer looked at.
const MAX_ROWS: usize = 2048;
/// Most channels that are drawn: what is beyond makes pages too large to open.
const MAX_CHANNELS: usize = 1 << 19;

/// Where the cells of a heat map lie, in pixels.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Grid {
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Of the first cell.
    pub(crate) left: u32,
    pub(crate) top: u32,
    pub(crate) cell_width: u32,
    pub(crate) row_height: u32,
    /// From one KV head to the next.
    pub(crate) pitch: u32,
    /// Between two layers.
    pub(crate) layer_gap: u32,
    /// Whether the halves of a pair stand side by side.
    pub(crate) paired: bool,
}

impl Grid {
    /// For a mask; `None` where it has more heads or channels than a figure can show.
    pub(crate) fn new(mask: &ModelMask) -> Option<Self> {
        let (layers, kv_heads, head_dim) = (mask.layers(), mask.kv_heads(), mask.head_dim());
        let rows = layers * kv_heads;
        if rows > MAX_ROWS || rows * head_dim > MAX_CHANNELS {
            return None;
        }
        let row_height = match rows {
            0..=128 => 9,
            129..=256 => 6,
            257..=384 => 4,
            _ => 3,
        };
        let cell_width = (800 / head_dim).clamp(1, 12) as u32;
        let pitch = row_height + u32::from(row_height > 3);
        let layer_gap = if row_height > 4 { 5 } else { 2 };
        let (left, top, paired) = (40, 44, head_dim.is_multiple_of(2));
        Some(Self {
            layers,
            kv_heads,
            head_dim,
            left,
            top,
            cell_width,
            row_height,
            pitch,
            layer_gap,
            paired,
        })
    }

    /// Upper edge of a row, below the first one's.
    pub(crate) fn row(&self, layer: Layer, head: KvHead) -> u32 {
        let layer_pitch = self.kv_heads as u32 * self.pitch + self.layer_gap;
        layer.0 as u32 * layer_pitch + head.0 as u32 * self.pitch
    }

    /// The column of a channel.
    pub(crate) fn column(&self, channel: usize) -> u32 {
        let half = self.head_dim / 2;
        let column = if self.paired { 2 * (channel % half) + channel / half } else { channel };
        column as u32
    }

    /// Channels in the order of their columns.
    pub(crate) fn channels(&self) -> impl Iterator<Item = usize> + use<> {
        let (half, paired) = (self.head_dim / 2, self.paired);
        (0..self.head_dim).map(move |at| if paired { at / 2 + at % 2 * half } else { at })
    }

    /// Right edge of the cells.
    pub(crate) fn right(&self) -> f64 {
        f64::from(self.left + self.cell_width * self.head_dim as u32)
    }

    /// Lower edge of the cells.
    pub(crate) fn bottom(&self) -> f64 {
        let last = self.row(Layer(self.layers - 1), KvHead(self.kv_heads - 1));
        f64::from(self.top + last + self.row_height)
    }

    /// A cell that fills its row.
    pub(crate) fn full(&self, class: &'static str, level: Option<usize>) -> Look {
        Look { height: self.row_height * 10, middle: self.row_height * 5, class, level }
    }

    /// A line in the middle of its row.
    pub(crate) fn thin(&self, class: &'static str, level: Option<usize>) -> Look {
        let height = if self.row_height > 4 { 20 } else { 10 };
        Look { height, ..self.full(class, level) }
    }

    /// Whether rows are so low that the lines of pruned channels would outshine the cells.
    pub(crate) fn is_dense(&self) -> bool {
        self.row_height < 6
    }

    /// The upper or the lower half of a row.
    pub(crate) fn half(&self, class: &'static str, lower: bool) -> Look {
        let height = (self.row_height / 2).max(1);
        let middle = if lower { self.row_height * 10 - height * 5 } else { height * 5 };
        Look { height: height * 10, middle, class, level: None }
    }

    /// Numbers of layers on the left, wavelengths above and pairs below.
    pub(crate) fn axes(&self, rope: Option<Rope>) -> Markup {
        let (top, bottom) = (f64::from(self.top), self.bottom());
        let pair_width = f64::from(self.cell_width) * if self.paired { 2.0 } else { 1.0 };
        let columns = if self.paired { self.head_dim / 2 } else { self.head_dim };
        let x = |pair: f64| round(f64::from(self.left) + (pair + 0.5) * pair_width);
        let block = self.kv_heads as u32 * self.pitch;
        let every = [1, 2, 5, 10, 20, 50, 100, 200, 500].into_iter();
        let pitch = f64::from(block + self.layer_gap);
        let every = every.clone().find(|n| f64::from(*n) * pitch >= 12.0).unwrap_or(1000) as usize;
        let step = (columns / 8).max(1);
        html! {
            text.soft x="0" y=(round(top - 8.0)) { "layer" }
            @for layer in (0..self.layers).step_by(every) {
                @let middle = f64::from(self.top + self.row(Layer(layer), KvHead(0)) + block / 2);
                text x=(self.left - 8) y=(middle + 4.0) text-anchor="end" { (layer) }
            }
            @if let Some(rope) = rope {
                text.soft x=(self.left) y="11" { "tokens per turn of a channel pair under RoPE" }
                @for (pair, name) in rope.ticks(columns) {
                    path.axis d={ "M" (x(pair)) " " (top - 3.0) "v-5" } {}
                    text x=(x(pair)) y=(top - 11.0) text-anchor="middle" { (name) }
                }
            }
            @for pair in (0..columns).step_by(step) {
                path.axis d={ "M" (x(pair as f64)) " " (bottom + 3.0) "v4" } {}
                text.soft x=(x(pair as f64)) y=(bottom + 19.0) text-anchor="middle" { (pair) }
            }
            text.soft x=(self.right()) y=(bottom + 34.0) text-anchor="end" {
                @if self.paired { "channel pair (c, c + head_dim/2)" } @else { "channel" }
            }
        }
    }
}

/// RoPE of a model: the angle by which a pair of channels turns per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rope {
    base: f64,
    head_dim: usize,
}

impl Rope {
    /// Where the fingerprint says a base that is one.
    pub(crate) fn new(fingerprint: Option<&Fingerprint>) -> Option<Self> {
        let own = fingerprint?;
        let (base, head_dim) = (own.rope_base, own.shape.head_dim);
        let usable = base.is_finite() && base > 1.0 && head_dim.is_multiple_of(2);
        usable.then_some(Self { base, head_dim })
    }

    /// Tokens in which a pair turns once.
    pub(crate) fn wavelength(&self, pair: f64) -> f64 {
        TAU * self.base.powf(2.0 * pair / self.head_dim as f64)
    }

    /// Powers of ten among the wavelengths, with the pair, as a fraction, that has each.
    fn ticks(&self, pairs: usize) -> Vec<(f64, String)> {
        let pair = |tokens: f64| (tokens / TAU).ln() / self.base.ln() * self.head_dim as f64 / 2.0;
        let tick = |power: i32| {
            let tokens = 10f64.powi(power);
            let at = pair(tokens);
            let name = match power {
                0..3 => format!("{tokens:.0}"),
                3..6 => format!("{:.0}k", tokens / 1e3),
                6..9 => format!("{:.0}M", tokens / 1e6),
                _ => numbers::power(tokens),
            };
            (at <= pairs as f64 - 1.0).then_some((at, name))
        };
        (1..=12).map_while(tick).collect()
    }
}

/// A bit per channel, least significant first, in base64.
pub(crate) fn kept_bits(mask: &ModelMask) -> String {
    let flags: Vec<bool> = mask.heads().iter().flat_map(|head| head.flags()).collect();
    let byte = |bits: &[bool]| bits.iter().rev().fold(0u8, |byte, &bit| byte << 1 | u8::from(bit));
    STANDARD.encode(flags.chunks(8).map(byte).collect::<Vec<u8>>())
}

/// Numbers, f32 little-endian in base64.
pub(crate) fn floats(values: &[f32]) -> String {
    STANDARD.encode(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
}

#[cfg(test)]
mod tests {
    use leank::{ChannelMask, ModelShape};

    use super::*;

    fn dense(layers: usize, heads: usize, head_dim: usize) -> ModelMask {
        ModelMask::dense(&ModelShape::new(layers, heads, heads, head_dim).unwrap())
    }

    #[test]
    fn pairs_stand_side_by_side() {
        let grid = Grid::new(&dense(2, 2, 8)).unwrap();
        assert_eq!([0, 4, 1, 5, 3, 7].map(|c| grid.column(c)), [0, 1, 2, 3, 6, 7]);
        assert_eq!(grid.channels().collect::<Vec<_>>(), [0, 4, 1, 5, 2, 6, 3, 7]);
        assert!(grid.channels().map(|c| grid.column(c)).eq(0..8));
        let odd = Grid::new(&dense(1, 1, 7)).unwrap();
        assert!(odd.channels().map(|c| odd.column(c)).eq(0..7));
    }

    #[test]
    fn rows_follow_each_other_at_every_size() {
        for (layers, heads, head_dim) in [(30, 3, 64), (80, 8, 128), (1, 1, 1), (2, 1, 4096)] {
            let grid = Grid::new(&dense(layers, heads, head_dim)).unwrap();
            let rows: Vec<u32> = (0..layers)
                .flat_map(|l| (0..heads).map(move |h| (l, h)))
                .map(|(l, h)| grid.row(Layer(l), KvHead(h)))
                .collect();
            assert!(rows.windows(2).all(|pair| pair[1] >= pair[0] + grid.row_height));
            assert!(grid.right() <= 4200.0 && grid.bottom() < 2300.0, "{grid:?}");
        }
        assert!(Grid::new(&dense(4096, 1, 64)).is_none(), "too many heads");
        assert!(Grid::new(&dense(1024, 1, 4096)).is_none(), "too many channels");
    }

    #[test]
    fn wavelengths_are_those_of_rope() {
        let fingerprint = |rope_base| Fingerprint {
            architecture: "llama".into(),
            shape: ModelShape::new(1, 1, 1, 64).unwrap(),
            rope_base,
            rope_scaling: None,
            config_hash: String::new(),
            sliding: None,
        };
        let rope = Rope::new(Some(&fingerprint(1e4))).unwrap();
        assert!((rope.wavelength(0.0) - TAU).abs() < 1e-9);
        assert!((rope.wavelength(16.0) - TAU * 100.0).abs() < 1e-6);
        for (pair, name) in rope.ticks(32) {
            let tokens = rope.wavelength(pair);
            let expected = if name == "1k" {
                1e3
            } else if name == "10k" {
                1e4
            } else {
                name.parse().unwrap()
            };
            assert!((tokens / expected - 1.0).abs() < 1e-9, "{name}: {tokens}");
        }
        assert_eq!(rope.ticks(32).len(), 4);
        for odd in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1.0] {
            assert_eq!(Rope::new(Some(&fingerprint(odd))), None);
        }
    }

    #[test]
    fn bits_are_in_the_order_of_channels() {
        let head = ChannelMask::new(8, vec![0, 3]).unwrap();
        let mask = ModelMask::new(1, 2, 8, vec![head, ChannelMask::all(8)]).unwrap();
        assert_eq!(STANDARD.decode(kept_bits(&mask)).unwrap(), [0b1001, 0xff]);
        assert_eq!(STANDARD.decode(floats(&[1.0])).unwrap(), 1f32.to_le_bytes());
    }
}
