//! Section: what the mask saves at which context length.

use maud::{Markup, html};

use super::{
    input::{Input, Named},
    section::{Block, Section},
};
use crate::figure::{
    Figure, numbers,
    plot::{Axis, Plot},
    round,
    scale::Scale,
};

/// Context lengths that are drawn: 2⁶ to 2²⁰, eight to a doubling.
const FIRST: usize = 6;
const LAST: usize = 20;
const PER_DOUBLING: usize = 8;

/// The ratio along context lengths.
pub(crate) fn section(input: &Input) -> Section {
    let masks: Vec<&Named> = std::iter::once(&input.own).chain(&input.other).collect();
    let layout = input.own.plan.planner().layout();
    let windows = input.own.info().windows.unwrap_or_default();
    let caption = html! {
        "Bytes of a lean cache over those of a dense one for one sequence, as " code { "leank plan" }
        " counts them: windows (sink " (windows.sink) ", recent " (windows.recent) "), blocks of "
        (layout.block) " tokens, the last one partly filled, scales and padding. f16 in full blocks."
    };
    let blocks = vec![
        Block::Figure { figure: figure(&masks), caption, cells: None },
        Block::Html(table(&masks)),
    ];
    Section { id: "memory", heading: "Memory by context length", blocks }
}

fn lengths() -> impl Iterator<Item = usize> {
    let steps = FIRST * PER_DOUBLING..=LAST * PER_DOUBLING;
    steps.map(|step| 2f64.powf(step as f64 / PER_DOUBLING as f64).round() as usize)
}

fn figure(masks: &[&Named]) -> Figure {
    let points = |mask: &Named| -> Vec<(f64, f64)> {
        let point = |tokens: usize| Some((tokens as f64, mask.whole_kv_ratio(tokens)?));
        lengths().filter_map(point).collect()
    };
    let lines: Vec<Vec<(f64, f64)>> = masks.iter().map(|mask| points(mask)).collect();
    let most = lines.iter().flatten().map(|point| point.1).fold(1.0, f64::max);
    // A line each above the plot: there a phone shows it, which would not beside the lines' ends.
    let legend = 18.0 * masks.len() as f64;
    let plot = Plot {
        x: Scale::log((64.0, 1_048_576.0), (52.0, 660.0)),
        y: Scale::linear((0.0, most.min(4.0) * 1.04), (legend + 300.0, legend + 34.0)),
    };
    let powers = (FIRST..=LAST).step_by(2).map(|power| (1usize << power) as f64);
    let x = Axis::new("tokens of context", powers, |n| numbers::tokens(n as usize));
    let y = Axis::new("whole-KV ratio", plot.y.ticks(5), |ratio| format!("{ratio:.1}"));
    let body = html! {
        (plot.axes(&x, &y))
        path.axis d={ "M52 " (round(plot.y.at(1.0))) "H660" } {}
        text.soft x="660" y=(round(plot.y.at(1.0) + 14.0)) text-anchor="end" { "a dense cache" }
        @for (at, line) in lines.iter().enumerate() {
            path class={ "l" (at) } stroke-width="2.2" stroke-linejoin="round" d=(plot.path(line.iter().copied())) {}
        }
        @for (at, mask) in masks.iter().enumerate() {
            @let y = 8.0 + 18.0 * at as f64;
            path class={ "l" (at) } stroke-width="2.2" d={ "M52 " (y) "h28" } {}
            text x="88" y=(y + 4.0) { (mask.name.chars().take(34).collect::<String>()) }
        }
    };
    Figure {
        id: "whole-kv-ratio",
        title: "Whole-KV ratio by context length".into(),
        description: "The ratio falls from one towards the share of bytes that the middle keeps."
            .into(),
        size: (676.0, legend + 342.0),
        body,
    }
}

fn table(masks: &[&Named]) -> Markup {
    let lengths: Vec<usize> = (9..=20).map(|power| 1 << power).collect();
    html! {
        details {
            summary { "The same as a table" }
            div.scroll tabindex="0" role="region" aria-label="Whole-KV ratio by context length" {
                table {
                    thead { tr {
                        th.left scope="col" { "tokens" }
                        @for mask in masks { th scope="col" { bdi { (mask.name) } } }
                    } }
                    tbody {
                        @for tokens in lengths {
                            tr {
                                th.left scope="row" { (numbers::tokens(tokens)) }
                                @for mask in masks {
                                    td {
                                        (mask.whole_kv_ratio(tokens).map_or("–".into(), |ratio| format!("{ratio:.3}")))
                                    }
                                }
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
    fn lengths_go_from_64_to_a_million() {
        let all: Vec<usize> = lengths().collect();
        assert_eq!((all[0], all[8], all[112]), (64, 128, 1 << 20));
    }
}
