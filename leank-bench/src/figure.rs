//! The cost of attention against the context, as a picture.

use std::path::Path;

use plotters::prelude::*;

use crate::{
    Error, Result,
    cpu::{Report, Row},
};

/// Width and height of a panel, in pixels.
const PANEL: (u32, u32) = (460, 340);
const COLUMNS: usize = 2;

/// Colours that the colour-blind can tell apart (Okabe & Ito 2008).
const DENSE: RGBColor = RGBColor(0, 114, 178);
const LEAN: RGBColor = RGBColor(213, 94, 0);

/// Plotters writes one theme and no dashes. Styles win over its attributes, and colours tell what is what.
const STYLE: &str = r##"<style>
polyline[stroke="#0072B2"][stroke-width="1"], polyline[stroke="#D55E00"][stroke-width="1"] { stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #ecebe6 } [fill="#FFFFFF"] { fill: #15171b } [stroke="#FFFFFF"] { stroke: #15171b }
  [stroke="#000000"] { stroke: #a7abb3 } [stroke="#E1E1E1"], [stroke="#C8C8C8"] { stroke: #343841 }
  [stroke="#0072B2"] { stroke: #5aaee6 } [fill="#0072B2"] { fill: #5aaee6 }
  [stroke="#D55E00"] { stroke: #f08a3c } [fill="#D55E00"] { fill: #f08a3c }
}
</style>
"##;

/// One line of a panel: context and milliseconds per call.
type Line = Vec<(f64, f64)>;

/// Draws a report as SVG, a panel per shape, type and number of threads, both axes logarithmic:
/// cost that grows with the context is a line of slope one. Thin dashed lines are where time would be
/// if reading at the measured bandwidth were all. Dark where the viewer asks for it.
///
/// # Errors
/// [`Error::Option`] for a report with a single context, [`Error::Figure`] where it cannot be
/// drawn.
pub fn draw(report: &Report) -> Result<String> {
    let mut panels: Vec<Vec<&Row>> = Vec::new();
    for row in &report.rows {
        let same = |other: &Row| {
            (&other.shape, other.dtype, other.threads, &other.formats)
                == (&row.shape, row.dtype, row.threads, &row.formats)
        };
        match panels.iter_mut().find(|panel| same(panel[0])) {
            Some(panel) => panel.push(row),
            None => panels.push(vec![row]),
        }
    }
    if panels.iter().any(|panel| panel.len() < 2) {
        return Err(Error::option("contexts", "two or more for a figure", "one"));
    }
    let columns = COLUMNS.min(panels.len()).max(1);
    let lines = panels.len().div_ceil(columns);
    let size = (PANEL.0 * columns as u32, PANEL.1 * lines as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(figure)?;
        for (area, rows) in root.split_evenly((lines, columns)).iter().zip(&panels) {
            panel(area, rows).map_err(figure)?;
        }
        root.present().map_err(figure)?;
    }
    let body = svg.find('\n').map_or(0, |end| end + 1);
    svg.insert_str(body, STYLE);
    Ok(svg)
}

/// Draws a report to a file, whole or not at all.
///
/// # Errors
/// Those of [`draw`]; [`leank_core::Error::Io`] for what the system refuses.
pub fn write(report: &Report, path: &Path) -> Result<()> {
    Ok(leank_core::files::write_atomic(path, draw(report)?.as_bytes())?)
}

fn figure(error: impl std::fmt::Display) -> Error {
    Error::Figure { why: error.to_string() }
}

fn panel<DB: DrawingBackend>(
    area: &DrawingArea<DB, plotters::coord::Shift>,
    rows: &[&Row],
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let line = |y: &dyn Fn(&Row) -> f64| -> Line {
        rows.iter().map(|row| (row.context as f64, y(row))).collect()
    };
    let limit = |bytes: f64, row: &Row| bytes / row.bandwidth_gb_per_s / 1e6;
    let lines = [
        ("dense", DENSE, line(&|row| row.dense.ms), line(&|row| limit(row.dense.bytes, row))),
        ("lean", LEAN, line(&|row| row.lean.ms), line(&|row| limit(row.lean.bytes, row))),
    ];
    let all = || lines.iter().flat_map(|(_, _, ms, limit)| ms.iter().chain(limit));
    let least = |pick: fn(&(f64, f64)) -> f64| all().map(pick).fold(f64::INFINITY, f64::min);
    let most = |pick: fn(&(f64, f64)) -> f64| all().map(pick).fold(0.0, f64::max);
    let x = (least(|p| p.0) / 1.2..most(|p| p.0) * 1.2).log_scale();
    let x = x.with_key_points(rows.iter().map(|row| row.context as f64).collect());
    let (low, high) = (least(|p| p.1) / 1.5, most(|p| p.1) * 1.5);
    let y = (low..high).log_scale().with_key_points(round_numbers(low, high));

    let row = rows[0];
    let plural = if row.threads == 1 { "" } else { "s" };
    let formats = match &row.formats[..] {
        "k16v16" => String::new(),
        formats => format!(", {formats}"),
    };
    let title = format!("{} {}{formats}, {} thread{plural}", row.shape, row.dtype, row.threads);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(title, ("sans-serif", 16))
        .x_label_area_size(38)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("context length (tokens)")
        .y_desc("ms per call")
        .x_label_formatter(&|tokens| thousands(*tokens))
        .y_label_formatter(&|ms| format!("{}", *ms as f32))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_desc_style(("sans-serif", 13))
        .label_style(("sans-serif", 12))
        .draw()?;
    for (name, colour, ms, limit) in lines {
        let marks = ms.iter().map(|&point| Circle::new(point, 3, colour.filled()));
        chart.draw_series(marks.collect::<Vec<_>>())?;
        chart
            .draw_series(LineSeries::new(ms, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart
            .draw_series(LineSeries::new(limit, colour.stroke_width(1)))?
            .label(format!("{name}, reading alone"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(1)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .label_font(("sans-serif", 13))
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(200, 200, 200))
        .draw()
}

/// 1, 2 and 5 times the powers of ten between two numbers.
fn round_numbers(low: f64, high: f64) -> Vec<f64> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let powers = (first..=last).flat_map(|power| [1.0, 2.0, 5.0].map(|x| x * 10f64.powi(power)));
    powers.filter(|x| (low..=high).contains(x)).collect()
}

/// `1024` as `1k`.
fn thousands(tokens: f64) -> String {
    if tokens >= 1024.0 && (tokens / 1024.0).fract() == 0.0 {
        return format!("{}k", tokens / 1024.0);
    }
    format!("{tokens}")
}

#[cfg(test)]
mod tests {
    use leank_core::Dtype;

    use super::*;
    use crate::{setting::HeadShape, stats::Summary};

    fn report(contexts: &[usize]) -> Report {
        let summary = |bytes: f64| Summary {
            bytes,
            ms: bytes / 30e6,
            ms_min: bytes / 31e6,
            ms_max: bytes / 29e6,
            gb_per_s: 30.0,
            bandwidth_share: 0.9,
        };
        let row = |threads, context| Row {
            shape: "A".into(),
            heads: HeadShape::A,
            context,
            dtype: Dtype::Bf16,
            formats: "k16v16".into(),
            threads,
            bandwidth_gb_per_s: 33.0,
            dense: summary(context as f64 * 4096.0),
            lean: summary(context as f64 * 2048.0),
            time_ratio: 0.5,
            bytes_ratio: 0.5,
        };
        let threads = [1, 2];
        Report {
            machine: "test".into(),
            cores: 2,
            backend: "cpu".into(),
            rounds: 1,
            footprint: 1,
            rows: threads.iter().flat_map(|&t| contexts.iter().map(move |&c| row(t, c))).collect(),
        }
    }

    #[test]
    fn a_figure_names_what_it_shows() {
        let svg = draw(&report(&[1024, 2048, 4096])).unwrap();
        for text in ["A bf16, 1 thread", "A bf16, 2 threads", "\ndense\n", "\nlean\n"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        // Which of the thin lines is which: two panels, each with its legend.
        assert_eq!(svg.matches("dense, reading alone").count(), 2);
        assert_eq!(svg.matches("lean, reading alone").count(), 2);
        assert!(svg.contains("context length (tokens)") && svg.contains("ms per call"));
        // Three points of two caches in two panels.
        assert_eq!(svg.matches("<circle").count(), 12);
    }

    #[test]
    fn every_colour_has_a_dark_one() {
        let svg = draw(&report(&[1024, 2048])).unwrap();
        let (style, drawn) = svg.split_once("</style>").unwrap();
        for colour in drawn.split("=\"#").skip(1).filter_map(|rest| rest.get(..6)) {
            // Letters are black, all of them, and named by their element.
            assert!(style.contains(&format!("#{colour}")) || colour == "000000", "{colour}");
        }
        assert!(style.ends_with("}\n}\n"), "{style}");
    }

    #[test]
    fn ticks_are_round_numbers() {
        let ticks: Vec<String> =
            round_numbers(0.03, 6.0).iter().map(|&x| (x as f32).to_string()).collect();
        assert_eq!(ticks, ["0.05", "0.1", "0.2", "0.5", "1", "2", "5"]);
        assert_eq!([1000.0, 1024.0, 131_072.0].map(thousands), ["1000", "1k", "128k"]);
    }

    #[test]
    fn one_context_makes_no_line() {
        let error = draw(&report(&[1024])).unwrap_err();
        assert!(error.to_string().contains("two or more"), "{error}");
    }

    #[test]
    fn a_figure_is_written_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cost.svg");
        write(&report(&[1024, 2048]), &path).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("</svg>\n"));
        assert!(write(&report(&[1024]), &path).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let nowhere = folder.path().join("missing/cost.svg");
        let error = write(&report(&[1024, 2048]), &nowhere).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }
}
