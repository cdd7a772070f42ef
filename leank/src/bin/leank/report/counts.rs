//! Section: how many channels each head keeps, and in which format.

use leank::{KvHead, Layer, ModelMask};
use maud::{Markup, html};

use super::{
    input::Input,
    section::{Block, Section},
};
use crate::figure::Figure;

/// Layers side by side.
const BAND: usize = 32;
/// More heads than this are no longer drawn.
const MAX_HEADS: usize = 4096;
const CELL_WIDTH: f64 = 26.0;
const LEFT: f64 = 52.0;

/// A grid of counts.
pub(crate) fn section(input: &Input) -> Section {
    let mask = &input.own.mask;
    let coded = mask.precisions().is_some();
    let block = if mask.layers() * mask.kv_heads() <= MAX_HEADS {
        let caption = html! {
            "A column is a layer, a row a KV head; the number is how many of " (mask.head_dim())
            " channels of K stay. A cross-hatched cell is a dead head: neither its K nor its V is in the "
            "middle."
            @if coded { " Below the number stand the bits of K and of V in lean blocks." }
        };
        Block::Figure { figure: grid(mask, coded), caption, cells: None }
    } else {
        Block::Html(html! { p.note { "Too many KV heads to draw them all." } })
    };
    Section { id: "counts", heading: "Kept channels per head", blocks: vec![block] }
}

fn grid(mask: &ModelMask, coded: bool) -> Figure {
    let height = if coded { 32.0 } else { 22.0 };
    let band_height = mask.kv_heads() as f64 * height + 34.0;
    let bands = mask.layers().div_ceil(BAND);
    let columns = mask.layers().min(BAND) as f64;
    let body = html! {
        defs {
            pattern id="dead" width="5" height="5" patternUnits="userSpaceOnUse" {
                path.hatch d="M0 5L5 0M0 0L5 5" stroke-width="0.6" {}
            }
        }
        @for band in 0..bands {
            @let top = band as f64 * band_height;
            @let first = band * BAND;
            text.soft x="0" y=(top + 12.0) { "layer" }
            @for head in 0..mask.kv_heads() {
                @let y = top + 20.0 + (head as f64 + 0.5) * height;
                text.soft x=(LEFT - 8.0) y=(y + 3.5) text-anchor="end" { "head " (head) }
            }
            @for layer in first..mask.layers().min(first + BAND) {
                @let x = LEFT + (layer - first) as f64 * CELL_WIDTH;
                text.soft x=(x + CELL_WIDTH / 2.0) y=(top + 12.0) text-anchor="middle" { (layer) }
                @for head in 0..mask.kv_heads() {
                    (cell(mask, Layer(layer), KvHead(head), (x, top + 20.0 + head as f64 * height, height)))
                }
            }
        }
    };
    let summary = mask.summary();
    Figure {
        id: "kept-counts",
        title: "Kept channels of K per layer and KV head".into(),
        description: format!(
            "{} of {} KV heads are dead. The table of all KV heads has every count.",
            summary.dead_heads, summary.heads
        ),
        size: (LEFT + columns * CELL_WIDTH + 4.0, bands as f64 * band_height - 10.0),
        body,
    }
}

fn cell(mask: &ModelMask, layer: Layer, head: KvHead, place: (f64, f64, f64)) -> Markup {
    let (x, y, height) = place;
    let own = mask.head(layer, head);
    let share = own.kept_count() as f64 / own.head_dim() as f64;
    let opacity = (share * 90.0).round() / 100.0;
    let text = match opacity {
        0.0..0.5 => "ink",
        0.5..0.8 => "on-middle",
        _ => "on-accent",
    };
    let precision = mask.precision(layer, head);
    let (width, tall) = (CELL_WIDTH - 2.0, height - 2.0);
    let (middle, coded) = (x + CELL_WIDTH / 2.0 - 1.0, mask.precisions().is_some());
    html! {
        g {
            title {
                "layer " (layer) ", KV head " (head) ": "
                @if own.is_dead() { "dead" } @else { (own.kept_count()) " kept, " (precision) }
            }
            @if own.is_dead() {
                rect fill="url(#dead)" x=(x) y=(y) width=(width) height=(tall) {}
                rect.rule x=(x + 0.5) y=(y + 0.5) width=(width - 1.0) height=(tall - 1.0) {}
            } @else {
                rect.panel x=(x) y=(y) width=(width) height=(tall) {}
                rect.accent fill-opacity=(opacity) x=(x) y=(y) width=(width) height=(tall) {}
                text class=(text) x=(middle) y=(y + 14.0) text-anchor="middle" { (own.kept_count()) }
                @if coded {
                    text class={ "small " (text) } x=(middle) y=(y + 25.0) text-anchor="middle" {
                        (precision.k.bits()) "/" (precision.v.bits())
                    }
                }
            }
        }
    }
}
