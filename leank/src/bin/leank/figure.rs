//! A front of bytes against predicted loss, as a picture.

use plotters::prelude::*;

/// Width and height, in pixels.
const SIZE: (u32, u32) = (640, 420);
/// What is drawn of losses: so many powers of ten below the largest.
const DECADES: i32 = 5;
/// Colours that the colour-blind can tell apart (Okabe & Ito 2008).
const COLOURS: [RGBColor; 2] = [RGBColor(213, 94, 0), RGBColor(0, 114, 178)];

/// A named line of points (share of the dense middle's bytes, loss).
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Draws at most two lines as SVG, loss on a logarithmic axis; `loss` is that axis' name.
pub(crate) fn draw(lines: &[Line], loss: &str) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        chart(&root, lines, loss)
            .map_err(|error| anyhow::anyhow!("the figure cannot be drawn: {error}"))?;
    }
    Ok(svg)
}

fn chart<DB: DrawingBackend>(
    root: &DrawingArea<DB, plotters::coord::Shift>,
    lines: &[Line],
    loss: &str,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    root.fill(&WHITE)?;
    let all = || lines.iter().flat_map(|line| &line.points);
    let most = all().map(|point| point.1).fold(0.0, f64::max).max(f64::MIN_POSITIVE * 1e9);
    let least = most * 10f64.powi(-DECADES);
    let right = all().map(|point| point.0).fold(0.1, f64::max);
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..right, (least..most * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("bytes of the middle, share of a dense one")
        .y_desc(loss)
        .x_label_formatter(&|x| format!("{:.2}", x))
        .y_label_formatter(&|y| format!("{y:.0e}"))
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_desc_style(("sans-serif", 13))
        .label_style(("sans-serif", 12))
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS) {
        let points = line.points.iter().copied().filter(|point| point.1 >= least);
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 13))
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    root.present()
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
        let svg = draw(&[line("k16,v16", 1.0), line("all", 0.1)], "predicted KL (nats)").unwrap();
        for text in ["k16,v16", "all", "predicted KL (nats)", "share of a dense one"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(svg.ends_with("</svg>\n"));
        // Nothing to lose, and nothing at all.
        let flat = Line { name: "flat".into(), points: vec![(0.0, 0.0)] };
        assert!(draw(&[flat], "loss").is_ok());
        assert!(draw(&[], "loss").is_ok());
    }
}
