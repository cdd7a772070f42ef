//! Figures as SVG: drawn once, with class names in the place of colours, and shown in a page, which
//! has a light and a dark theme, or as a file that stands alone, which has its colours inside.
//!
//! Whatever is drawn is escaped by [`maud`]; coordinates are finite, since [`scale::Scale`] only gives
//! such ones.

pub(crate) mod cells;
pub(crate) mod colour;
pub(crate) mod front;
pub(crate) mod numbers;
pub(crate) mod plot;
pub(crate) mod png;
pub(crate) mod scale;

use maud::{Markup, html};

/// A finished figure.
pub(crate) struct Figure {
    /// Name of its file, and prefix of the ids in it.
    pub(crate) id: &'static str,
    /// What it shows, in a line.
    pub(crate) title: String,
    /// What is to be seen in it, for those who do not see it.
    pub(crate) description: String,
    /// Width and height, in pixels.
    pub(crate) size: (f64, f64),
    /// What is drawn, without the `svg` element.
    pub(crate) body: Markup,
}

/// Room for the title above a figure that stands alone, and around it.
const TITLE_HEIGHT: f64 = 40.0;
const MARGIN: f64 = 16.0;

impl Figure {
    /// For a page that has the [style](colour::page_style).
    pub(crate) fn inline(&self) -> Markup {
        let (width, height) = self.size;
        html! {
            svg.figure id=(self.id) role="img" aria-label=(self.title)
                aria-describedby={ (self.id) "-desc" }
                width=(width) height=(height) viewBox={ "0 0 " (width) " " (height) } {
                desc id={ (self.id) "-desc" } { (self.description) }
                (self.body)
            }
        }
    }

    /// A file of its own: an SVG document, with its title, that is dark where its viewer asks for it.
    pub(crate) fn standalone(&self) -> String {
        self.document(&colour::standalone_style())
    }

    /// The document in the light theme.
    pub(crate) fn standalone_light(&self) -> String {
        self.document(&colour::light_style())
    }

    fn document(&self, colours: &str) -> String {
        let (width, height) =
            (self.size.0 + 2.0 * MARGIN, self.size.1 + TITLE_HEIGHT + 2.0 * MARGIN);
        let document = html! {
            svg.figure xmlns="http://www.w3.org/2000/svg" role="img" width=(width) height=(height)
                viewBox={ "0 0 " (width) " " (height) } {
                title { (self.title) }
                desc { (self.description) }
                style { (maud::PreEscaped(colours)) }
                rect.paper width=(width) height=(height) {}
                text.heading x=(MARGIN) y=(MARGIN + 18.0) { (self.title) }
                g transform={ "translate(" (MARGIN) " " (MARGIN + TITLE_HEIGHT) ")" } { (self.body) }
            }
        };
        format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}\n", document.into_string())
    }
}

/// A coordinate with one decimal: more is not seen, and costs bytes.
pub(crate) fn round(x: f64) -> f64 {
    if x.is_finite() { (x * 10.0).round() / 10.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_files_stays_text() {
        let figure = Figure {
            id: "x",
            title: "<script>alert(1)</script>".into(),
            description: "a & \"b\"".into(),
            size: (10.0, 10.0),
            body: html! { text { ("</svg>") } },
        };
        for text in [figure.standalone(), figure.inline().into_string()] {
            assert!(!text.contains("<script>"), "{text}");
            assert_eq!(text.matches("</svg>").count(), 1, "{text}");
            assert!(text.contains("a &amp; &quot;b&quot;"), "{text}");
        }
    }

    #[test]
    fn coordinates_are_short_and_finite() {
        assert_eq!(round(1.0 / 3.0), 0.3);
        assert_eq!(round(f64::NAN), 0.0);
        assert_eq!(round(f64::INFINITY), 0.0);
    }
}
