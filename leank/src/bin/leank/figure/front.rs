//! A front of bytes against predicted loss.

use maud::html;

use super::{
    Figure, numbers,
    plot::{Axis, Plot},
    round,
    scale::Scale,
};

/// What is drawn of losses: so many powers of ten below the largest.
const DECADES: i32 = 5;

/// A named line of points (share of the dense middle's bytes, loss).
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines, the loss on a logarithmic axis; `loss` is that axis' name.
pub(crate) fn front(lines: &[Line], loss: &str) -> Figure {
    let all = || lines.iter().flat_map(|line| &line.points);
    let most = all().map(|point| point.1).fold(0.0, f64::max).max(1e-290);
    let least = most * 10f64.powi(-DECADES);
    let right = all().map(|point| point.0).fold(0.1, f64::max);
    let plot = Plot {
        x: Scale::linear((0.0, right), (64.0, 624.0)),
        y: Scale::log((least, most * 1.5), (320.0, 30.0)),
    };
    let x = Axis::new("bytes of the middle, share of a dense one", plot.x.ticks(6), |x| {
        format!("{x:.1}")
    });
    let y = Axis::new(loss, plot.y.ticks(6), numbers::power);
    let body = html! {
        (plot.axes(&x, &y))
        @for (at, line) in lines.iter().enumerate() {
            @let points = line.points.iter().copied().filter(|point| point.1 >= least);
            path class={ "l" (at) } stroke-width="2" d=(plot.path(points)) {}
            @let y = 42.0 + 18.0 * at as f64;
            path class={ "l" (at) } stroke-width="2" d={ "M380 " (round(y)) "h28" } {}
            text x="416" y=(round(y + 4.0)) { (line.name) }
        }
    };
    let names: Vec<_> = lines.iter().map(|line| line.name.as_str()).collect();
    Figure {
        id: "front",
        title: "Bytes against predicted loss".into(),
        description: format!("Lines: {}. The loss falls as bytes rise.", names.join("; ")),
        size: (640.0, 362.0),
        body,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_names_what_it_shows() {
        let line = |name: &str, scale: f64| {
            let points = [0.0, 0.1, 0.5, 1.0].map(|x| (x, scale * (1.0 - x)));
            Line { name: name.into(), points: points.into() }
        };
        let svg =
            front(&[line("k16,v16", 1.0), line("all", 0.1)], "predicted KL (nats)").standalone();
        assert!(svg.contains("@media (prefers-color-scheme:dark){"), "no dark theme");
        for text in ["k16,v16", "all", "predicted KL (nats)", "share of a dense one"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(svg.ends_with("</svg>\n"));
        // Nothing to lose, and nothing at all.
        let flat = Line { name: "flat".into(), points: vec![(0.0, 0.0)] };
        for svg in [front(&[flat], "loss").standalone(), front(&[], "loss").standalone()] {
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
