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
    // This mask's own last: nothing may lie on it. Its label is placed first: it has the best place.
    let mut points: Vec<&Point<'_>> = points.iter().collect();
    points.sort_by_key(|own| own.own);
    let names: Vec<String> = points.iter().map(|own| label(own)).collect();
    let at = |own: &Point<'_>| (plot.x.at(own.predicted), plot.y.at(own.measured));
    let marks: Vec<(f64, f64)> = points.iter().map(|own| at(own)).collect();
    let places = label_places(&marks, &names, (plot.x.ends(), plot.y.ends()));
    let body = html! {
        path.band d={ (plot.path(band)) "Z" } {}
        (plot.axes(&x, &y))
        path.mute d=(plot.path(ends)) {}
        @for own in &points { (error_bar(&plot, own)) }
        @for (own, place) in points.iter().zip(&marks) { (mark(own, *place)) }
        @for (name, (x, y, anchor)) in names.iter().zip(places) {
            text.halo stroke-width="3" x=(round(x)) y=(round(y)) text-anchor=(anchor) { (name) }
        }
    };
    Figure {
        id: "predicted-measured",
        title: "Predicted against measured KL".into(),
        description: format!("{} masks; the table below has their numbers.", points.len()),
        size: (500.0, 446.0),
        body,
    }
}

fn label(own: &Point<'_>) -> String {
    own.evaluation.name().chars().take(28).collect()
}

fn error_bar(plot: &Plot, own: &Point<'_>) -> Markup {
    let (low, high) = (own.measured - own.error, own.measured + own.error);
    html! {
        path.axis stroke-width="1.4"
            d={ "M" (round(plot.x.at(own.predicted))) " " (round(plot.y.at(low))) "V" (round(plot.y.at(high))) } {}
    }
}

fn mark(own: &Point<'_>, (x, y): (f64, f64)) -> Markup {
    let class = if own.own { "f1" } else { "paper s0" };
    html! {
        circle class=(class) stroke-width="2" cx=(round(x)) cy=(round(y)) r="5" {
            title {
                (own.evaluation.name()) ": predicted " (numbers::significant(own.predicted)) ", measured "
                (numbers::significant(own.measured))
            }
        }
    }
}

/// Where labels stand, by x, y of the baseline and anchor: beside their marks, above or below where
/// another label or mark is in the way. The last mark's label chooses first. `ends` are those of the
/// plot's axes.
fn label_places(
    marks: &[(f64, f64)],
    names: &[String],
    ends: ((f64, f64), (f64, f64)),
) -> Vec<(f64, f64, &'static str)> {
    /// Least and most x, least and most y.
    type Area = (f64, f64, f64, f64);
    const HEIGHT: f64 = 13.0;
    let ((left, right), (bottom, top)) = ends;
    let shared = |a: &Area, b: &Area| {
        (a.1.min(b.1) - a.0.max(b.0)).max(0.0) * (a.3.min(b.3) - a.2.max(b.2)).max(0.0)
    };
    // A letter of 11 pixels is some 6.5 wide.
    let width = |name: &str| name.chars().count() as f64 * 6.5;
    let mut taken: Vec<Area> =
        marks.iter().map(|(x, y)| (x - 6.0, x + 6.0, y - 6.0, y + 6.0)).collect();
    let mut places = vec![(0.0, 0.0, "start"); marks.len()];
    for (at, (&(x, y), name)) in marks.iter().zip(names).enumerate().rev() {
        let mut best: Option<(f64, Area, &'static str)> = None;
        for step in [0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0] {
            for anchor in ["start", "end"] {
                let (from, to) = match anchor {
                    "start" => (x + 10.0, x + 10.0 + width(name)),
                    _ => (x - 10.0 - width(name), x - 10.0),
                };
                let middle = y + step * HEIGHT;
                let area = (from, to, middle - HEIGHT / 2.0, middle + HEIGHT / 2.0);
                let covered: f64 = taken.iter().map(|other| shared(&area, other)).sum();
                let inside = (left, right + 12.0, top, bottom);
                let outside = (to - from) * HEIGHT - shared(&area, &inside);
                let wrong = covered + outside;
                if best.is_none_or(|(least, ..)| wrong < least - 1e-6) {
                    best = Some((wrong, area, anchor));
                }
            }
        }
        if let Some((_, area, anchor)) = best {
            let x = if anchor == "start" { area.0 } else { area.1 };
            places[at] = (x, area.3 - 2.5, anchor);
            taken.push(area);
        }
    }
    places
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
                    th scope="col" { "whole\u{2011}KV ratio" }
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
            th.left.two-lines scope="row" {
                bdi { (own.name()) }
                @if own.is_of(&input.own.mask) { " " span.note { "(this mask)" } }
            }
            td { (own.context().map_or("–".into(), |tokens| tokens.to_string())) }
            td { (share(own.middle_bytes)) }
            td { (number(own.predicted_kl)) }
            td.two-lines {
                @match text.map(|text| text.kl) {
                    Some(None) => "not finite",
                    kl => (number(kl.flatten())),
                }
                @if let Some(error) = text.and_then(|text| text.kl_standard_error) {
                    " " span.note { "±\u{a0}" (numbers::significant(error)) }
                }
            }
            td { @if let Some(ratio) = ratio { "×" (format!("{ratio:.2}")) } @else { "–" } }
            td { (change(text.and_then(Text::perplexity_change))) }
            td { (share(text.and_then(|text| text.top1_agreement))) }
            td { (number(own.whole_kv_ratio)) }
            @for name in tasks {
                td.two-lines {
                    @if let Some(task) = own.tasks.iter().find(|task| task.task == *name) {
                        (task.lean_right) "\u{a0}of\u{a0}" (task.items) " " span.note { "dense " (task.dense_right) }
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

#[cfg(test)]
mod tests {
    use super::*;

    const ENDS: ((f64, f64), (f64, f64)) = ((64.0, 484.0), (404.0, 34.0));

    fn places(marks: &[(f64, f64)], names: &[&str]) -> Vec<(f64, f64, &'static str)> {
        let names: Vec<String> = names.iter().map(|&name| name.into()).collect();
        label_places(marks, &names, ENDS)
    }

    #[test]
    fn labels_do_not_cover_each_other_and_the_last_has_the_best_place() {
        // All at one point: the label beside it is the last mark's.
        let all = places(&[(200.0, 200.0); 6], &["bits", "k50", "k80", "norms", "other", "own"]);
        assert_eq!(all[5], (210.0, 204.0, "start"));
        for (at, a) in all.iter().enumerate() {
            for b in &all[at + 1..] {
                assert!(a.2 != b.2 || (a.1 - b.1).abs() >= 13.0, "{all:?}");
            }
        }
        // Far apart: all beside their marks, on the left where there is no room on the right.
        let apart = places(&[(100.0, 100.0), (480.0, 300.0)], &["a", "a-long-name"]);
        assert_eq!(apart, [(110.0, 104.0, "start"), (470.0, 304.0, "end")]);
        // Never on another's mark.
        let near = places(&[(225.0, 200.0), (200.0, 200.0)], &["a", "long-name"]);
        assert_ne!(near[1], (210.0, 204.0, "start"));
    }
}
