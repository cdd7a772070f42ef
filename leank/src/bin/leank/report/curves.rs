//! Section: what every count of kept channels costs, and where the loss sits.

use leank::{KvHead, Layer, ModelMask, train::dump::Probe};
use maud::{Markup, html};

use super::{
    input::{Input, Learned},
    section::{Block, Section},
};
use crate::figure::{
    Figure,
    colour::LINES,
    numbers,
    plot::{Axis, Plot},
    round,
    scale::Scale,
};

/// Panels side by side, and the size of one.
const COLUMNS: usize = 5;
const PANEL: (f64, f64) = (176.0, 132.0);
/// Names of heads side by side: as many as a phone is wide.
const LEGEND_COLUMNS: usize = 4;
/// More heads than this are no longer drawn.
const MAX_HEADS: usize = 4096;
/// What is drawn of losses: so many powers of ten below the largest.
const DECADES: f64 = 5.0;

/// Losses of the mask by layer, and the curves they lie on. `None` without a dump.
pub(crate) fn section(input: &Input) -> Option<Section> {
    let learned = input.learned.as_ref()?;
    let mask = &input.own.mask;
    let mut blocks = Vec::new();
    if learned.curves.is_none() {
        blocks.push(Block::Html(html! {
            p.note { "The method leank trains for one budget: it has no curves to show." }
        }));
    } else if mask.layers() * mask.kv_heads() > MAX_HEADS {
        blocks.push(Block::Html(html! { p.note { "Too many KV heads to draw them all." } }));
    } else {
        let unit = unit(learned);
        blocks.push(Block::Figure {
            figure: by_layer(mask, learned, unit),
            caption: html! {
                "What this mask is predicted to cost, by layer: half the loss of its heads, one on the "
                "other. All bars together are the predicted KL."
            },
            cells: None,
        });
        blocks.push(Block::Figure {
            figure: panels(mask, learned, unit),
            caption: html! {
                "A panel is a layer, a line a KV head: exact half loss, measured on the dump, against the "
                "number of channels kept. All panels share their axes. "
                strong { "Dots are what this mask keeps" } ", rings dead heads. Point at a line for its "
                "numbers."
                @if mask.precisions().is_some() {
                    " Lines are for 16 bits; the dots count the bits that this mask asks for."
                }
            },
            cells: None,
        });
    }
    Some(Section { id: "curves", heading: "What pruning costs", blocks })
}

fn unit(learned: &Learned) -> &'static str {
    match learned.manifest.probe {
        Probe::Fisher => "predicted KL, nats",
        _ => "half loss, no unit",
    }
}

/// Half losses of a layer's heads as the mask has them.
pub(crate) fn layer_losses(mask: &ModelMask, learned: &Learned, layer: Layer) -> Vec<Option<f64>> {
    (0..mask.kv_heads()).map(|head| learned.half_loss(mask, layer, KvHead(head))).collect()
}

fn by_layer(mask: &ModelMask, learned: &Learned, unit: &str) -> Figure {
    let layers: Vec<Vec<Option<f64>>> =
        (0..mask.layers()).map(|layer| layer_losses(mask, learned, Layer(layer))).collect();
    let sums: Vec<f64> = layers.iter().map(|own| own.iter().flatten().sum()).collect();
    let most = sums.iter().copied().fold(0.0, f64::max);
    let all: f64 = sums.iter().sum();
    let band = (800.0 / mask.layers() as f64).clamp(4.0, 26.0);
    let right = 60.0 + band * mask.layers() as f64;
    let legend = legend_height(mask);
    let plot = Plot {
        x: Scale::linear((0.0, mask.layers() as f64), (60.0, right)),
        y: Scale::linear(
            (0.0, if most > 0.0 { most * 1.04 } else { 1.0 }),
            (legend + 208.0, legend + 44.0),
        ),
    };
    let every = (16.0 / band).ceil().max(1.0) as usize;
    let names = (0..mask.layers()).step_by(every);
    let x = Axis::new("layer", names.map(|layer| layer as f64 + 0.5), |at| format!("{at:.0}"));
    let x = Axis {
        ticks: x.ticks.iter().map(|(at, _)| (*at, format!("{:.0}", at - 0.5))).collect(),
        ..x
    };
    let y = Axis::new(unit, plot.y.ticks(4), numbers::tick);
    let body = html! {
        (self::legend(mask, 60.0))
        (plot.axes(&x, &y))
        @for (layer, own) in layers.iter().enumerate() {
            (bar(&plot, layer, own, all, band))
        }
    };
    Figure {
        id: "loss-by-layer",
        title: "Predicted loss by layer".into(),
        description: format!(
            "The layer that costs most is layer {}.",
            sums.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(layer, _)| layer)
        ),
        size: (right.max(420.0) + 16.0, legend + 250.0),
        body,
    }
}

fn bar(plot: &Plot, layer: usize, heads: &[Option<f64>], all: f64, band: f64) -> Markup {
    let x = round(plot.x.at(layer as f64) + band * 0.08);
    let measured = heads.iter().enumerate().filter_map(|(head, loss)| Some((head, (*loss)?)));
    // One on the other: each begins where those before it end.
    let stacked = measured.scan(0.0, |below, (head, loss)| {
        let from = *below;
        *below += loss;
        Some((head, from, loss))
    });
    html! {
        @for (head, from, loss) in stacked {
            @let bottom = plot.y.at(from);
            @let top = plot.y.at(from + loss);
            @if loss > 0.0 {
                rect class={ "f" (head % LINES) } x=(x) y=(round(top)) width=(round(band * 0.84))
                    height=(round((bottom - top).max(0.0))) {
                    title {
                        "layer " (layer) ", KV head " (head) ": " (numbers::significant(loss))
                        @if all > 0.0 { ", " (numbers::percent(loss / all)) " of all" }
                    }
                }
            }
        }
    }
}

/// Height of the [`legend`]'s lines.
fn legend_height(mask: &ModelMask) -> f64 {
    let lines = if mask.kv_heads() <= LINES { mask.kv_heads().div_ceil(LEGEND_COLUMNS) } else { 1 };
    12.0 + 16.0 * (lines - 1) as f64
}

/// Colours of heads; many heads share them, and are not named.
fn legend(mask: &ModelMask, left: f64) -> Markup {
    html! {
        @if mask.kv_heads() <= LINES {
            @for head in 0..mask.kv_heads() {
                @let x = left + 66.0 * (head % LEGEND_COLUMNS) as f64;
                @let y = 12.0 + 16.0 * (head / LEGEND_COLUMNS) as f64;
                rect class={ "f" (head) } x=(x) y=(y - 9.0) width="10" height="10" {}
                text x=(x + 15.0) y=(y) { "head " (head) }
            }
        } @else {
            text.soft x=(left) y="12" { "colours: KV head modulo " (LINES) }
        }
    }
}

fn panels(mask: &ModelMask, learned: &Learned, unit: &str) -> Figure {
    let curves = learned.curves.as_ref().map_or(&[][..], |curves| &curves.heads);
    let most = curves.iter().flat_map(|curve| &curve.losses).copied().fold(0.0, f64::max) / 2.0;
    let most = if most > 0.0 { most } else { 1.0 };
    let plot = Plot {
        x: Scale::linear((0.0, mask.head_dim() as f64), (0.0, PANEL.0 - 26.0)),
        y: Scale::log((most * 10f64.powf(-DECADES), most * 1.3), (PANEL.1 - 34.0, 0.0)),
    };
    let rows = mask.layers().div_ceil(COLUMNS);
    let (left, legend) = (52.0, legend_height(mask));
    let top = legend + 40.0;
    let columns = mask.layers().min(COLUMNS) as f64;
    let body = html! {
        (self::legend(mask, left))
        text.soft x="0" y=(legend + 22.0) { (unit) }
        @for layer in 0..mask.layers() {
            @let (column, row) = (layer % COLUMNS, layer / COLUMNS);
            @let place = (left + column as f64 * PANEL.0, top + row as f64 * PANEL.1);
            g transform={ "translate(" (place.0) " " (place.1) ")" } {
                (panel(mask, learned, &plot, Layer(layer)))
                @if column == 0 {
                    @for tick in ticks(&plot) {
                        text.small.soft x="-6" y=(round(plot.y.at(tick) + 3.0)) text-anchor="end" {
                            (numbers::power(tick))
                        }
                    }
                }
            }
        }
        text.soft x=(left + columns * PANEL.0 - 26.0) y=(top + rows as f64 * PANEL.1 + 4.0) text-anchor="end" {
            "channels kept of " (mask.head_dim())
        }
    };
    Figure {
        id: "loss-curves",
        title: "Loss against kept channels, by layer and KV head".into(),
        description:
            "Lines fall as more channels are kept; steep ones belong to heads that matter.".into(),
        size: (left + columns.max(2.0) * PANEL.0, top + rows as f64 * PANEL.1 + 12.0),
        body,
    }
}

/// Ticks of the loss, but for one that the axis of counts would hide.
fn ticks(plot: &Plot) -> Vec<f64> {
    let (bottom, _) = plot.y.ends();
    plot.y.ticks(3).into_iter().filter(|tick| bottom - plot.y.at(*tick) > 4.0).collect()
}

fn panel(mask: &ModelMask, learned: &Learned, plot: &Plot, layer: Layer) -> Markup {
    let (_, right) = plot.x.ends();
    let (bottom, _) = plot.y.ends();
    let first = layer.0 * mask.kv_heads();
    let curves = learned.curves.as_ref().map_or(&[][..], |curves| &curves.heads);
    let d = mask.head_dim();
    html! {
        @for tick in ticks(plot) {
            path.grid d={ "M0 " (round(plot.y.at(tick))) "H" (round(right)) } {}
        }
        path.axis d={ "M0 " (round(bottom)) "H" (round(right)) } {}
        @for count in [0, d / 2, d] {
            text.small.soft x=(round(plot.x.at(count as f64))) y=(bottom + 11.0) text-anchor="middle" { (count) }
        }
        text.strong x=(round(right)) y="6" text-anchor="end" { "layer " (layer) }
        @for (head, curve) in curves[first..].iter().take(mask.kv_heads()).enumerate() {
            @let points = || curve.counts.iter().zip(&curve.losses).map(|(n, loss)| (*n as f64, loss / 2.0));
            path class={ "s" (head % LINES) } stroke-width="1.4" stroke-linejoin="round" d=(plot.path(points())) {
                title {
                    "layer " (layer) ", KV head " (head) ": "
                    @for (count, loss) in points() { (count) " kept " (numbers::significant(loss)) "; " }
                }
            }
        }
        @for head in 0..mask.kv_heads() {
            @let own = mask.head(layer, KvHead(head));
            @if let Some(loss) = learned.half_loss(mask, layer, KvHead(head)) {
                @let x = round(plot.x.at(own.kept_count() as f64));
                @let y = round(plot.y.at(loss));
                @if own.is_dead() {
                    circle class={ "paper s" (head % LINES) } stroke-width="1.6" cx=(x) cy=(y) r="3.2" {}
                } @else {
                    circle class={ "f" (head % LINES) } cx=(x) cy=(y) r="3.4" {}
                }
            }
        }
    }
}
