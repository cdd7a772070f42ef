//! Section: how this mask differs from another one.

use leank::{ChannelMask, KvHead, Layer, ModelMask};
use maud::{Markup, html};

use super::{
    grid::{Grid, Rope},
    importance,
    input::{Input, Named},
    section::{Block, Section},
};
use crate::figure::{
    Figure, cells, numbers,
    plot::{Axis, Plot},
    round,
    scale::Scale,
};

/// Heads that changed most, so many of them.
const MOST_CHANGED: usize = 12;

/// `None` without another mask.
pub(crate) fn section(input: &Input) -> Option<Section> {
    let (own, other) = (&input.own, input.other.as_ref()?);
    let mut blocks = vec![Block::Html(summary(own, other))];
    blocks.push(Block::Figure {
        figure: overlap_figure(&own.mask, &other.mask),
        caption: html! {
            "Overlap of a layer: channels that both keep, of those that either keeps; small dots are its "
            "KV heads. Heads that neither keeps anything of have no dot."
        },
        cells: None,
    });
    if let Some(grid) = Grid::new(&own.mask) {
        let rope = Rope::new(own.info().fingerprint.as_ref());
        blocks.push(Block::Figure {
            figure: difference(own, other, &grid, rope),
            caption: html! {
                "Rows and columns as above. " strong {
                    "Upper half: kept by this mask alone; lower half: by the other alone" }
                "; full: by both; empty: by neither."
            },
            cells: Some(Box::new(importance::cells(&own.mask, Some(&other.mask), grid, rope))),
        });
    }
    blocks.push(Block::Html(changes(&own.mask, &other.mask)));
    Some(Section { id: "comparison", heading: "Compared with another mask", blocks })
}

/// Channels that both keep over channels that either keeps (Jaccard); `None` where neither keeps any.
pub(crate) fn overlap<'a>(
    pairs: impl IntoIterator<Item = (&'a ChannelMask, &'a ChannelMask)>,
) -> Option<f64> {
    let (mut both, mut either) = (0, 0);
    for (a, b) in pairs {
        let shared =
            a.kept().iter().filter(|channel| b.kept().binary_search(channel).is_ok()).count();
        both += shared;
        either += a.kept_count() + b.kept_count() - shared;
    }
    (either > 0).then(|| both as f64 / either as f64)
}

fn pairs<'a>(
    own: &'a ModelMask,
    other: &'a ModelMask,
    layer: Layer,
) -> impl Iterator<Item = (&'a ChannelMask, &'a ChannelMask)> {
    own.layer(layer).iter().zip(other.layer(layer))
}

fn summary(own: &Named, other: &Named) -> Markup {
    let all = overlap(own.mask.heads().iter().zip(other.mask.heads()));
    let (a, b) = (own.mask.summary(), other.mask.summary());
    let budget = |mask: &Named| mask.info().budget.as_deref().map_or("–".into(), numbers::shown);
    let method = |mask: &Named| mask.info().method.as_deref().map_or("–".into(), numbers::shown);
    let predicted =
        |mask: &Named| mask.info().predicted_kl.map_or("–".into(), numbers::significant);
    let ratio = |mask: &Named| {
        mask.whole_kv_ratio(8192).map_or("–".into(), |ratio| format!("{ratio:.3}"))
    };
    let rows = [
        ("file", own.name.clone(), other.name.clone()),
        ("method", method(own), method(other)),
        ("budget", budget(own), budget(other)),
        ("kept K", numbers::percent(a.kept_k), numbers::percent(b.kept_k)),
        ("kept V", numbers::percent(a.kept_v), numbers::percent(b.kept_v)),
        ("dead heads", a.dead_heads.to_string(), b.dead_heads.to_string()),
        (
            "bytes of the middle",
            numbers::percent(own.middle_bytes()),
            numbers::percent(other.middle_bytes()),
        ),
        ("predicted KL", predicted(own), predicted(other)),
        ("whole-KV ratio at 8k", ratio(own), ratio(other)),
    ];
    html! {
        @if let Some(all) = all {
            p { "Of the channels that either mask keeps, both keep " strong { (numbers::percent(all)) } "." }
        }
        @if own.info().fingerprint != other.info().fingerprint {
            p.warning { "The masks do not name the same model: their fingerprints differ." }
        }
        div.scroll tabindex="0" role="region" aria-label="Both masks" {
            table {
                thead { tr {
                    td {}
                    th.left scope="col" { "this mask" }
                    th.left scope="col" { "the other" }
                } }
                tbody {
                    @for (name, own, other) in rows {
                        tr { th.left scope="row" { (name) } td.left { bdi { (own) } } td.left { bdi { (other) } } }
                    }
                }
            }
        }
    }
}

fn overlap_figure(own: &ModelMask, other: &ModelMask) -> Figure {
    let layers = own.layers();
    let band = (800.0 / layers as f64).clamp(4.0, 26.0);
    let right = 52.0 + band * layers as f64;
    let plot = Plot {
        x: Scale::linear((0.0, layers as f64), (52.0, right)),
        y: Scale::linear((0.0, 1.0), (170.0, 30.0)),
    };
    let every = (16.0 / band).ceil().max(1.0) as usize;
    let ticks = (0..layers).step_by(every).map(|layer| (layer as f64 + 0.5, layer.to_string()));
    let x = Axis { name: "layer".into(), ticks: ticks.collect() };
    let y = Axis::new("overlap", [0.0, 0.5, 1.0], |share| format!("{share}"));
    let of_layer: Vec<Option<f64>> =
        (0..layers).map(|layer| overlap(pairs(own, other, Layer(layer)))).collect();
    let body = html! {
        (plot.axes(&x, &y))
        @for (layer, share) in of_layer.iter().enumerate() {
            @let at = round(plot.x.at(layer as f64 + 0.5));
            @for head in pairs(own, other, Layer(layer)).filter_map(|pair| overlap([pair])) {
                circle.both cx=(at) cy=(round(plot.y.at(head))) r="2.2" {}
            }
            @if let Some(share) = share {
                path.s0 stroke-width="3" d={ "M" (round(at - band * 0.36)) " " (round(plot.y.at(*share))) "h" (round(band * 0.72)) } {
                    title { "layer " (layer) ": " (numbers::percent(*share)) }
                }
            }
        }
    };
    let least = of_layer.iter().enumerate().filter_map(|(layer, share)| Some((layer, (*share)?)));
    let least = least.min_by(|a, b| a.1.total_cmp(&b.1));
    Figure {
        id: "overlap",
        title: "Overlap of kept channels by layer".into(),
        description: least.map_or_else(String::new, |(layer, share)| {
            format!("It is least in layer {layer}: {}.", numbers::percent(share))
        }),
        size: (right.max(420.0) + 16.0, 212.0),
        body,
    }
}

fn difference(own: &Named, other: &Named, grid: &Grid, rope: Option<Rope>) -> Figure {
    let mut drawn = cells::Cells::new(grid.cell_width);
    for layer in (0..own.mask.layers()).map(Layer) {
        for (head, (a, b)) in pairs(&own.mask, &other.mask, layer).enumerate() {
            let (a, b) = (a.flags(), b.flags());
            for channel in grid.channels() {
                let look = match (a[channel], b[channel]) {
                    (true, true) => grid.full("cell-both", None),
                    (true, false) => grid.half("cell-only-this", false),
                    (false, true) => grid.half("cell-only-other", true),
                    (false, false) => continue,
                };
                drawn.add(grid.row(layer, KvHead(head)), grid.column(channel), look);
            }
        }
    }
    let y = grid.bottom() + 57.0;
    let body = html! {
        (grid.axes(rope))
        (drawn.finish(f64::from(grid.left), f64::from(grid.top)))
        @for (at, (class, name, shift, width)) in [
            ("cell-both", "both", 0.0, 9.0),
            ("cell-only-this", "this mask alone", -2.0, 4.0),
            ("cell-only-other", "the other alone", 2.0, 4.0),
        ].into_iter().enumerate() {
            // The third below the first: a phone shows all of them.
            @let x = f64::from(grid.left) + [0.0, 100.0, 0.0][at];
            @let y = y + [0.0, 0.0, 18.0][at];
            path class=(class) stroke-width=(width) d={ "M" (x) " " (y + shift) "h36" } {}
            text x=(x + 44.0) y=(y + 4.0) { (name) }
        }
    };
    Figure {
        id: "difference-map",
        title: "Where the two masks differ".into(),
        description: format!("Channels kept by {}, by {}, by both.", own.name, other.name),
        size: (grid.right().max(320.0) + 12.0, y + 36.0),
        body,
    }
}

fn changes(own: &ModelMask, other: &ModelMask) -> Markup {
    let count = |mask: &ModelMask, at: usize| mask.heads()[at].kept_count();
    let mut heads: Vec<usize> = (0..own.heads().len()).collect();
    heads.sort_by_key(|&at| std::cmp::Reverse(count(own, at).abs_diff(count(other, at))));
    heads.truncate(MOST_CHANGED);
    heads.retain(|&at| count(own, at) != count(other, at));
    html! {
        h3 { "KV heads whose counts differ most" }
        @if heads.is_empty() { p { "None: every head keeps as many channels in both." } }
        @else {
            div.scroll tabindex="0" role="region" aria-label="KV heads whose counts differ most" {
                table {
                    thead { tr {
                        th scope="col" { "layer" } th scope="col" { "KV head" }
                        th scope="col" { "this mask" } th scope="col" { "the other" }
                        th scope="col" { "difference" } th scope="col" { "overlap" }
                    } }
                    tbody {
                        @for at in heads {
                            @let (a, b) = (count(own, at), count(other, at));
                            tr {
                                td { (at / own.kv_heads()) } td { (at % own.kv_heads()) }
                                td { (a) } td { (b) }
                                td { (if a < b { "−" } else { "+" }) (a.abs_diff(b)) }
                                td { (overlap([(&own.heads()[at], &other.heads()[at])]).map_or("–".into(), numbers::percent)) }
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_jaccards() {
        let mask = |kept: &[u16]| ChannelMask::new(8, kept.to_vec()).unwrap();
        let (a, b, none) = (mask(&[0, 1, 2]), mask(&[2, 3]), mask(&[]));
        assert_eq!(overlap([(&a, &b)]), Some(0.25));
        assert_eq!(overlap([(&a, &a)]), Some(1.0));
        assert_eq!(overlap([(&a, &none)]), Some(0.0));
        assert_eq!(overlap([(&none, &none)]), None);
        assert_eq!(overlap([(&a, &b), (&a, &a)]), Some(4.0 / 7.0));
    }
}
