//! Section: how much every channel matters, and which are kept.

use leank::{KvHead, Layer, ModelMask};
use maud::{Markup, html};

use super::{
    grid::{self, Grid, Rope},
    input::Input,
    section::{Block, Cells, Section},
};
use crate::figure::{Figure, cells, colour, numbers, round, scale::Scale};

/// Most powers of ten that colours span.
const DECADES: f64 = 5.0;

/// Heat map of scores, and all heads as a table.
pub(crate) fn section(input: &Input) -> Section {
    let mask = &input.own.mask;
    let mut blocks = Vec::new();
    match Grid::new(mask) {
        Some(grid) => {
            let rope = Rope::new(input.own.info().fingerprint.as_ref());
            let range = mask.scores().and_then(range);
            let figure = heat_map(mask, &grid, rope, range);
            let caption = caption(range.is_some(), rope.is_some());
            blocks.push(Block::Figure {
                figure,
                caption,
                cells: Some(Box::new(cells(mask, None, grid, rope))),
            });
        }
        None => blocks.push(Block::Html(html! {
            p.note {
                "This mask has " (mask.layers() * mask.kv_heads()) " KV heads of " (mask.head_dim())
                " channels: too many to draw them all. "
                code { "leank inspect --json" } " lists what is kept."
            }
        })),
    }
    blocks.push(Block::Html(table(mask)));
    Section { id: "importance", heading: "Importance of every channel", blocks }
}

/// What the pointer reads off.
pub(crate) fn cells(
    mask: &ModelMask,
    other: Option<&ModelMask>,
    grid: Grid,
    rope: Option<Rope>,
) -> Cells {
    let pairs = mask.head_dim() / 2;
    let wavelength =
        |rope: Rope| (0..pairs).map(|pair| rope.wavelength(pair as f64).round()).collect();
    Cells {
        grid,
        scores: mask.scores().map(grid::floats),
        kept: grid::kept_bits(mask),
        other: other.map(grid::kept_bits),
        wavelengths: rope.map(wavelength).unwrap_or_default(),
    }
}

/// What colours span: from low to high among the positive scores, a few odd ones at either end left
/// out, at most [`DECADES`] apart; `None` where none is positive.
fn range(scores: &[f32]) -> Option<(f64, f64)> {
    let mut positive: Vec<f64> =
        scores.iter().filter(|score| **score > 0.0).map(|score| f64::from(*score)).collect();
    positive.sort_by(f64::total_cmp);
    let last = positive.len().checked_sub(1)?;
    let at = |share: f64| positive[(share * last as f64).round() as usize];
    let (low, high) = (at(0.01), at(0.998));
    Some((low.max(high * 10f64.powf(-DECADES)).min(high * 0.999), high))
}

fn heat_map(
    mask: &ModelMask,
    grid: &Grid,
    rope: Option<Rope>,
    range: Option<(f64, f64)>,
) -> Figure {
    let scale = Scale::log(range.unwrap_or((0.1, 1.0)), (0.0, 1.0));
    let score = |at: usize| mask.scores().map_or(0.0, |scores| f64::from(scores[at]));
    let mut drawn = cells::Cells::new(grid.cell_width);
    for layer in (0..mask.layers()).map(Layer) {
        for (head, own) in mask.layer(layer).iter().enumerate() {
            let flags = own.flags();
            let first = (layer.0 * mask.kv_heads() + head) * mask.head_dim();
            for channel in grid.channels() {
                let (class, faint, level) = match range {
                    Some(_) => {
                        ("h", "faint h", Some(colour::level(scale.at(score(first + channel)))))
                    }
                    None => ("cell-kept", "faint cell-kept", None),
                };
                let look = match flags[channel] {
                    true => grid.full(class, level),
                    false if grid.is_dense() => grid.thin(faint, level),
                    false => grid.thin(class, level),
                };
                drawn.add(grid.row(layer, KvHead(head)), grid.column(channel), look);
            }
        }
    }
    let body = html! {
        (grid.axes(rope))
        (drawn.finish(f64::from(grid.left), f64::from(grid.top)))
        (legend(range, grid.left, grid.bottom() + 52.0))
    };
    let summary = mask.summary();
    Figure {
        id: "importance-map",
        title: "Importance of every channel of K".into(),
        description: format!(
            "A row per KV head of {mask}, a column per channel; {} of K's channels are kept. The table \
             below says the same in words.",
            numbers::percent(summary.kept_k)
        ),
        size: (grid.right().max(320.0) + 12.0, grid.bottom() + 104.0),
        body,
    }
}

/// The ramp with its ends, and below it the two kinds of cells: a phone shows all of it.
fn legend(range: Option<(f64, f64)>, left: u32, top: f64) -> Markup {
    let width = 6.0;
    let ramp_width = width * colour::LEVELS as f64;
    let left = f64::from(left);
    let (line, text) = if range.is_some() { (38.0, 42.0) } else { (5.0, 9.0) };
    let class =
        |level: usize| if range.is_some() { format!("h{level}") } else { "cell-kept".into() };
    html! {
        g transform={ "translate(0 " (round(top)) ")" } {
            @if let Some((least, most)) = range {
                g shape-rendering="crispEdges" {
                    @for level in 0..colour::LEVELS {
                        path class={ "h" (level) } stroke-width="10"
                            d={ "M" (left + width * level as f64) " 5h" (width) } {}
                    }
                }
                text.soft x=(left) y="24" { "≤ " (numbers::power(least)) }
                text.soft x=(left + ramp_width) y="24" text-anchor="end" { "≥ " (numbers::power(most)) }
                text.soft x=(left + ramp_width + 8.0) y="9" { "score" }
            }
            path class=(class(22)) stroke-width="9" d={ "M" (left) " " (line) "h36" } {}
            text x=(left + 44.0) y=(text) { "kept" }
            path class=(class(9)) stroke-width="2" d={ "M" (left + 92.0) " " (line) "h36" } {}
            text x=(left + 136.0) y=(text) { "pruned" }
        }
    }
}

fn caption(scores: bool, rope: bool) -> Markup {
    html! {
        "Each row is a KV head (of a layer, the first on top), each column a channel; both halves of a "
        "RoPE pair stand side by side, fast pairs on the left"
        @if rope { ", with the tokens per full turn above" }
        ". " strong { "A full cell is kept, a thin line pruned." }
        @if scores {
            " Colour is the score on a logarithmic scale, comparable between heads."
        } @else {
            " This file carries no scores, so all cells have one colour."
        }
        span.script-only { " Point, tap or use the arrow keys to read a cell." }
    }
}

/// Every head: what it keeps.
fn table(mask: &ModelMask) -> Markup {
    /// More rows are no longer read.
    const MOST: usize = 4096;
    let heads = mask.layers() * mask.kv_heads();
    html! {
        details {
            summary { "All KV heads as a table" }
            @if heads > MOST {
                p.note { "The first " (MOST) " of " (heads) " KV heads." }
            }
            div.scroll tabindex="0" role="region" aria-label="All KV heads" {
                table {
                    thead { tr {
                        th scope="col" { "layer" }
                        th scope="col" { "KV head" }
                        th scope="col" { "kept" }
                        th scope="col" { "format" }
                        th.left scope="col" { "kept channels" }
                    } }
                    tbody {
                        @for at in 0..heads.min(MOST) {
                            @let (layer, head) = (Layer(at / mask.kv_heads()), KvHead(at % mask.kv_heads()));
                            @let own = mask.head(layer, head);
                            tr {
                                td { (layer) }
                                td { (head) }
                                td { (own.kept_count()) }
                                td { @if own.is_dead() { "dead" } @else { (mask.precision(layer, head)) } }
                                td.left { (ranges(own.kept())) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Ascending numbers with runs as ranges: `0–3, 7`. Of very many runs, the first.
fn ranges(kept: &[u16]) -> String {
    const MOST: usize = 128;
    let run = |run: &[u16]| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}–{last}"),
        [] => String::new(),
    };
    let runs = || kept.chunk_by(|a, b| a + 1 == *b);
    let mut text = runs().take(MOST).map(run).collect::<Vec<_>>().join(", ");
    if runs().nth(MOST).is_some() {
        text.push_str(", …");
    }
    text
}

#[cfg(test)]
mod tests {
    use leank::{ChannelMask, ModelShape};

    use super::*;

    #[test]
    fn runs_are_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0–2, 5, 7–8");
        assert_eq!(ranges(&[]), "");
        let every_other: Vec<u16> = (0..4096).step_by(2).collect();
        assert!(ranges(&every_other).ends_with("254, …"));
    }

    #[test]
    fn colours_span_what_scores_do_not_more_than_five_decades() {
        assert_eq!(range(&[0.0, -1.0]), None);
        let (least, most) = range(&[1e-30, 0.5, 2.0]).unwrap();
        assert!((least - 2e-5).abs() < 1e-9 && most == 2.0);
        // One score out of a thousand does not wash out the others.
        let mut many = vec![1.0; 1000];
        many[7] = 1e9;
        assert_eq!(range(&many).unwrap().1, 1.0);
        let (least, most) = range(&[3.0, 3.0]).unwrap();
        assert!(least < most);
    }

    #[test]
    fn a_large_model_takes_few_bytes_and_a_cell_is_where_it_belongs() {
        let shape = ModelShape::new(80, 8, 8, 128).unwrap();
        let heads = (0..640).map(|h| ChannelMask::new(128, (0..h % 128).collect()).unwrap());
        let mask = ModelMask::new(80, 8, 128, heads.collect()).unwrap();
        // Every cell has another colour than its neighbour: the worst there is.
        let scores = (0..80 * 8 * 128).map(|i| 10f32.powi(-((i * 7919) % 5))).collect();
        let mask = mask.with_scores(scores).unwrap();
        let grid = Grid::new(&mask).unwrap();
        let figure = heat_map(&mask, &grid, None, mask.scores().and_then(range));
        let svg = figure.inline().into_string();
        assert!(svg.len() < 900_000, "{} bytes", svg.len());
        let dense = ModelMask::dense(&shape);
        let svg = heat_map(&dense, &grid, None, None).inline().into_string();
        assert!(svg.contains("cell-kept"), "a mask without scores shows what is kept");
        assert_eq!(svg.matches("h768").count(), 640, "a stroke per head that keeps everything");
    }
}
