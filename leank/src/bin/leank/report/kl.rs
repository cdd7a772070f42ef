//! Section: whether what learning predicts is what was measured.

use maud::{Markup, html};

use super::{
    evaluations::{Evaluation, Text},
    input::Input,
    section::{Block, Section},
};
use crate::figure::{
    Figure, numbers,
    plot::{Axis, Plot},
    round,
    scale::Scale,
};

/// A prediction with what was measured for it.
struct Point<'a> {
    evaluation: &'a Evaluation,
    predicted: f64,
    measured: f64,
    error: f64,
    own: bool,
}

/// Points and a table. `None` without evaluations.
pub(crate) fn section(input: &Input) -> Option<Section> {
    if input.evaluations.is_empty() {
        return None;
    }
    let mut blocks = Vec::new();
    let points: Vec<Point<'_>> =
        input.evaluations.iter().filter_map(|own| point(input, own)).collect();
    if !points.is_empty() {
        blocks.push(Block::Figure {
            figure: scatter(&points),
            caption: html! {
                "A point is a mask; bars are one standard error over sequences. In the band the "
                "measured KL is within a factor of two of what was predicted. The full point is this mask."
            },
            cells: None,
        });
    }
    blocks.push(Block::Html(table(input)));
    Some(Section { id: "measured", heading: "Predicted and measured", blocks })
}

fn point<'a>(input: &Input, evaluation: &'a Evaluation) -> Option<Point<'a>> {
    let text = evaluation.text.as_ref()?;
    let (predicted, measured) = (evaluation.predicted_kl?, text.kl?);
    let own = evaluation.is_of(&input.own.mask);
    let error = text.kl_standard_error.unwrap_or(0.0).max(0.0);
    (predicted > 0.0 && measured > 0.0).then_some(Point {
        evaluation,
        predicted,
        measured,
        error,
        own,
    })
}

fn scatter(points: &[Point<'_>]) -> Figure {
    let values = || points.iter().flat_map(|own| [own.predicted, own.measured]);
    let least = values().fold(f64::INFINITY, f64::min) / 3.0;
    let most = values().fold(0.0, f64::max) * 3.0;
    let plot = Plot {
        x: Scale::log((least, most), (64.0, 484.0)),
        y: Scale::log((least, most), (404.0, 34.0)),
    };
    let x = Axis::new("predicted KL, nats per token", plot.x.ticks(5), numbers::tick);
    let y = Axis::new("measured KL, nats per token", plot.y.ticks(5), numbers::tick);
    let ends = [(least, least), (most, most)];
    let band = [
        (least, least * 2.0),
        (most / 2.0, most),
        (most, most),
        (most, most / 2.0),
        (least * 2.0, least),
        (least, least),
    ];
    let body = html! {
        path.band d={ (plot.path(band)) "Z" } {}
        (plot.axes(&x, &y))
        path.mute d=(plot.path(ends)) {}
        @for own in points { (mark(&plot, own)) }
    };
    Figure {
        id: "predicted-measured",
        title: "Predicted against measured KL".into(),
        description: format!("{} masks; the table below has their numbers.", points.len()),
        size: (500.0, 446.0),
        body,
    }
}

fn mark(plot: &Plot, own: &Point<'_>) -> Markup {
    let (x, y) = (round(plot.x.at(own.predicted)), round(plot.y.at(own.measured)));
    let (low, high) = (own.measured - own.error, own.measured + own.error);
    let class = if own.own { "f1" } else { "paper s0" };
    let right = x < 380.0;
    html! {
        g {
            title {
                (own.evaluation.name()) ": predicted " (numbers::significant(own.predicted)) ", measured "
                (numbers::significant(own.measured))
            }
            path.axis stroke-width="1.4"
                d={ "M" (x) " " (round(plot.y.at(low))) "V" (round(plot.y.at(high))) } {}
            circle class=(class) stroke-width="2" cx=(x) cy=(y) r="5" {}
            text.halo stroke-width="3" y=(y + 4.0)
                x=(if right { x + 10.0 } else { x - 10.0 })
                text-anchor=(if right { "start" } else { "end" }) {
                (own.evaluation.name().chars().take(28).collect::<String>())
            }
        }
    }
}

fn table(input: &Input) -> Markup {
    let tasks: Vec<&str> = {
        let all = input.evaluations.iter().flat_map(|own| &own.tasks);
        let mut names: Vec<&str> = all.map(|task| task.task.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        names.truncate(8);
        names
    };
    html! {
        div.scroll tabindex="0" role="region" aria-label="Evaluations" {
            table {
                thead { tr {
                    th.left scope="col" { "mask" }
                    th scope="col" { "context" }
                    th scope="col" { "middle" }
                    th scope="col" { "predicted KL" }
                    th scope="col" { "measured KL" }
                    th scope="col" { "ratio" }
                    th scope="col" { "perplexity" }
                    th scope="col" { "same top-1" }
                    th scope="col" { "whole-KV ratio" }
                    @for task in &tasks { th scope="col" { (numbers::shown(task)) } }
                } }
                tbody { @for own in &input.evaluations { (row(input, own, &tasks)) } }
            }
        }
    }
}

fn row(input: &Input, own: &Evaluation, tasks: &[&str]) -> Markup {
    let number = |value: Option<f64>| value.map_or("–".into(), numbers::significant);
    let share = |value: Option<f64>| value.map_or("–".into(), numbers::percent);
    let text = own.text.as_ref();
    let ratio =
        text.and_then(|text| Some(text.kl? / own.predicted_kl?)).filter(|ratio| ratio.is_finite());
    html! {
        tr.own[own.is_of(&input.own.mask)] {
            th.left scope="row" {
                bdi { (own.name()) }
                @if own.is_of(&input.own.mask) { " (this mask)" }
            }
            td { (own.context().map_or("–".into(), |tokens| tokens.to_string())) }
            td { (share(own.middle_bytes)) }
            td { (number(own.predicted_kl)) }
            td {
                (number(text.and_then(|text| text.kl)))
                @if let Some(error) = text.and_then(|text| text.kl_standard_error) {
                    " ± " (numbers::significant(error))
                }
            }
            td { @if let Some(ratio) = ratio { "×" (format!("{ratio:.2}")) } @else { "–" } }
            td { (change(text.and_then(Text::perplexity_change))) }
            td { (share(text.and_then(|text| text.top1_agreement))) }
            td { (number(own.whole_kv_ratio)) }
            @for name in tasks {
                td {
                    @if let Some(task) = own.tasks.iter().find(|task| task.task == *name) {
                        (task.lean_right) " of " (task.items) " (dense " (task.dense_right) ")"
                    } @else { "–" }
                }
            }
        }
    }
}

/// A relative change with its sign.
pub(crate) fn change(share: Option<f64>) -> String {
    match share {
        Some(share) if share.is_finite() => {
            let sign = if share < 0.0 { "−" } else { "+" };
            format!("{sign}{:.2}\u{a0}%", share.abs() * 100.0)
        }
        _ => "–".into(),
    }
}
