//! Heat maps of many cells as few bytes: cells of one look are one path of strokes, and neighbours
//! are one stroke.

use std::{collections::BTreeMap, fmt::Write as _};

use maud::{Markup, html};

/// How a cell is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Look {
    /// Height of the stroke, in tenths of a pixel.
    pub(crate) height: u32,
    /// Where the middle of the stroke lies below the row's upper edge, in tenths of a pixel.
    pub(crate) middle: u32,
    /// What its class name begins with.
    pub(crate) class: &'static str,
    /// Number behind the class name, where there are many of a kind.
    pub(crate) level: Option<usize>,
}

/// Collects cells row by row, from left to right.
pub(crate) struct Cells {
    width: u32,
    paths: BTreeMap<Look, Path>,
}

#[derive(Default)]
struct Path {
    d: String,
    /// Where the pen is; the stroke that is under way is not yet written.
    pen: (i64, i64),
    stroke: Option<Stroke>,
}

/// Columns `from..to` of a row.
#[derive(Clone, Copy)]
struct Stroke {
    row: i64,
    from: i64,
    to: i64,
}

impl Cells {
    /// Cells of `width` pixels.
    pub(crate) fn new(width: u32) -> Self {
        Self { width, paths: BTreeMap::new() }
    }

    /// Adds the cell in column `column` of the row whose upper edge lies at `row`.
    pub(crate) fn add(&mut self, row: u32, column: u32, look: Look) {
        let path = self.paths.entry(look).or_default();
        let (row, column) = (i64::from(row), i64::from(column));
        match &mut path.stroke {
            Some(stroke) if stroke.row == row && stroke.to == column => stroke.to += 1,
            _ => {
                path.flush(self.width);
                path.stroke = Some(Stroke { row, from: column, to: column + 1 });
            }
        }
    }

    /// The cells, the first at `(left, top)`.
    pub(crate) fn finish(mut self, left: f64, top: f64) -> Markup {
        for path in self.paths.values_mut() {
            path.flush(self.width);
        }
        html! {
            g transform={ "translate(" (left) " " (top) ")" } shape-rendering="crispEdges" {
                @for (look, path) in &self.paths {
                    @let level = look.level.map(|level| level.to_string()).unwrap_or_default();
                    path class={ (look.class) (level) } stroke-width=(f64::from(look.height) / 10.0)
                        transform={ "translate(0 " (f64::from(look.middle) / 10.0) ")" } d=(path.d) {}
                }
            }
        }
    }
}

impl Path {
    /// Writes the stroke under way, relative to where the pen is: short numbers.
    fn flush(&mut self, width: u32) {
        let Some(Stroke { row, from, to }) = self.stroke.take() else { return };
        let width = i64::from(width);
        let (x, y) = (from * width, row);
        let (right, down) = (x - self.pen.0, y - self.pen.1);
        let space = if down < 0 { "" } else { " " };
        let _ = write!(self.d, "m{right}{space}{down}h{}", (to - from) * width);
        self.pen = (to * width, y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_stroke() {
        let look = |level| Look { height: 90, middle: 45, class: "h", level: Some(level) };
        let mut cells = Cells::new(12);
        for (column, level) in [3, 3, 5, 3].into_iter().enumerate() {
            cells.add(0, column as u32, look(level));
        }
        cells.add(10, 0, look(3));
        let drawn = cells.finish(1.0, 2.0).into_string();
        assert!(drawn.contains(r#"d="m0 0h24m12 0h12m-48 10h12""#), "{drawn}");
        assert!(drawn.contains(r#"class="h5" stroke-width="9""#), "{drawn}");
        assert!(drawn.contains(r#"d="m24 0h12""#), "{drawn}");
    }
}
