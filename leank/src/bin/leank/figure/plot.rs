//! Axes and lines: the frame of every chart.

use std::fmt::Write as _;

use maud::{Markup, html};

use super::{round, scale::Scale};

/// A chart's inner area with its two axes.
pub(crate) struct Plot {
    /// From left to right.
    pub(crate) x: Scale,
    /// From bottom to top: its range descends.
    pub(crate) y: Scale,
}

/// An axis: what it counts, where its ticks are and what they say.
pub(crate) struct Axis {
    pub(crate) name: String,
    pub(crate) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Ticks at `values`, each as `text` says it.
    pub(crate) fn new(
        name: impl Into<String>,
        values: impl IntoIterator<Item = f64>,
        text: impl Fn(f64) -> String,
    ) -> Self {
        let ticks = values.into_iter().map(|value| (value, text(value))).collect();
        Self { name: name.into(), ticks }
    }
}

impl Plot {
    /// Grid lines, ticks and names. The name of y stands above it, where it need not be turned.
    pub(crate) fn axes(&self, x: &Axis, y: &Axis) -> Markup {
        let (left, right) = self.x.ends();
        let (bottom, top) = self.y.ends();
        html! {
            @for (value, text) in &y.ticks {
                @let at = round(self.y.at(*value));
                path.grid d={ "M" (round(left)) " " (at) "H" (round(right)) } {}
                text.soft x=(round(left - 8.0)) y=(round(at + 3.5)) text-anchor="end" { (text) }
            }
            @for (value, text) in &x.ticks {
                @let at = round(self.x.at(*value));
                path.axis d={ "M" (at) " " (round(bottom)) "v4" } {}
                text.soft x=(at) y=(round(bottom + 17.0)) text-anchor="middle" { (text) }
            }
            path.axis d={ "M" (round(left)) " " (round(bottom)) "H" (round(right)) } {}
            text.soft x=(round(right)) y=(round(bottom + 34.0)) text-anchor="end" { (x.name) }
            text.soft x=(round(left - 8.0)) y=(round(top - 12.0)) { (y.name) }
        }
    }

    /// The path through points, as the attribute `d`. Points that are not finite interrupt it.
    pub(crate) fn path(&self, points: impl IntoIterator<Item = (f64, f64)>) -> String {
        let mut path = String::new();
        let mut pen = 'M';
        for (x, y) in points {
            if !x.is_finite() || !y.is_finite() {
                pen = 'M';
                continue;
            }
            let _ = write!(path, "{pen}{} {}", round(self.x.at(x)), round(self.y.at(y)));
            pen = 'L';
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_gaps_where_there_is_nothing() {
        let scale = |range| Scale::linear((0.0, 10.0), range);
        let plot = Plot { x: scale((0.0, 100.0)), y: scale((100.0, 0.0)) };
        let path = plot.path([(0.0, 0.0), (1.0, 1.0), (2.0, f64::NAN), (3.0, 3.0)]);
        assert_eq!(path, "M0 100L10 90M30 70");
        let axis = Axis::new("x < 1", [5.0], |value| value.to_string());
        let axes = plot.axes(&axis, &Axis::new("y", [], |_| String::new())).into_string();
        assert!(axes.contains("x &lt; 1") && axes.contains("M50 100v4"), "{axes}");
    }
}
