//! Section: where in RoPE's spectrum channels are kept.

use maud::html;

use super::{
    grid::Rope,
    input::{Input, Named},
    section::{Block, Section},
};
use crate::{
    figure::{
        Figure, numbers,
        plot::{Axis, Plot},
        round,
        scale::Scale,
    },
    inspect,
};

/// Shares of kept channels by slices of pairs.
pub(crate) fn section(input: &Input) -> Section {
    let masks: Vec<&Named> = std::iter::once(&input.own).chain(&input.other).collect();
    let caption = html! {
        "RoPE turns a pair of channels (c, c + head_dim/2) by base^(−2c/head_dim) per token: pairs on the "
        "left turn fast and tell near positions apart, those on the right hardly turn and carry content. "
        "A bar is the share of KV heads that keep the channels of a slice of pairs."
        @if masks.len() > 1 { " The line is the other mask." }
    };
    let blocks = vec![Block::Figure { figure: figure(input, &masks), caption, cells: None }];
    Section { id: "spectrum", heading: "Along the RoPE spectrum", blocks }
}

fn figure(input: &Input, masks: &[&Named]) -> Figure {
    let shares: Vec<Vec<f64>> = masks.iter().map(|mask| inspect::spectrum(&mask.mask)).collect();
    let slices = shares[0].len();
    let pairs = (input.own.mask.head_dim() / 2).max(1);
    let plot = Plot {
        x: Scale::linear((0.0, slices as f64), (52.0, 708.0)),
        y: Scale::linear((0.0, 1.0), (230.0, 34.0)),
    };
    let rope = Rope::new(input.own.info().fingerprint.as_ref());
    let first = |slice: usize| slice * pairs / slices;
    let name = |slice: usize| match rope {
        Some(rope) => short(rope.wavelength(first(slice) as f64)),
        None => first(slice).to_string(),
    };
    let ticks = (0..slices).step_by(slices.div_ceil(8)).map(|slice| (slice as f64, name(slice)));
    let x_name = if rope.is_some() { "tokens per turn" } else { "first pair of the slice" };
    let x = Axis { name: x_name.into(), ticks: ticks.collect() };
    let y = Axis::new("share kept", [0.0, 0.25, 0.5, 0.75, 1.0], |share| {
        format!("{:.0} %", share * 100.0)
    });
    let width = 656.0 / slices as f64;
    let body = html! {
        (plot.axes(&x, &y))
        @for (slice, share) in shares[0].iter().enumerate() {
            @let top = plot.y.at(*share);
            rect.f0 x=(round(plot.x.at(slice as f64) + 1.5)) y=(round(top)) width=(round(width - 3.0))
                height=(round(230.0 - top)) {
                title { "pairs " (first(slice)) " to " (first(slice + 1)) ": " (numbers::percent(*share)) }
            }
        }
        @if let Some(other) = shares.get(1) {
            @let steps = other.iter().enumerate();
            path.l1 stroke-width="2.2" d=(plot.path(steps.flat_map(|(slice, share)| {
                [(slice as f64, *share), (slice as f64 + 1.0, *share)]
            }))) {}
        }
    };
    Figure {
        id: "rope-spectrum",
        title: "Share kept along the RoPE spectrum".into(),
        description: format!(
            "From {} kept among the fastest pairs to {} among the slowest.",
            numbers::percent(shares[0][0]),
            numbers::percent(shares[0][slices - 1])
        ),
        size: (724.0, 272.0),
        body,
    }
}

/// A wavelength in few letters.
fn short(tokens: f64) -> String {
    match tokens {
        n if !n.is_finite() || n >= 1e7 => numbers::power(n),
        n if n >= 1e4 => format!("{:.0}k", n / 1e3),
        n if n >= 1e3 => format!("{:.1}k", n / 1e3),
        n => format!("{n:.0}"),
    }
}
