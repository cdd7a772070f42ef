//! Figures as PNG, with letters that are built in: the same on every machine.

use std::sync::Arc;

use anyhow::Context as _;
use resvg::{
    tiny_skia::{Pixmap, Transform},
    usvg::{Options, Tree, fontdb::Database},
};

use super::Figure;

/// Pixels per unit of a figure.
const SCALE: f32 = 2.0;

/// The bytes of a PNG of the figure as it stands alone.
pub(crate) fn render(figure: &Figure) -> anyhow::Result<Vec<u8>> {
    let mut fonts = Database::new();
    fonts.load_font_data(dejavu::sans_condensed::regular().to_vec());
    fonts.load_font_data(dejavu::sans_condensed::bold().to_vec());
    let family = fonts.faces().find_map(|face| Some(face.families.first()?.0.clone()));
    let font_family = family.unwrap_or_default();
    fonts.set_sans_serif_family(&font_family);
    let options = Options { fontdb: Arc::new(fonts), font_family, ..Options::default() };
    let what = || format!("{}: the figure cannot be drawn as PNG", figure.id);
    let tree = Tree::from_str(&figure.standalone_light(), &options).with_context(what)?;
    let size = tree.size();
    let pixels = |length: f32| (length * SCALE).ceil() as u32;
    let mut pixmap = Pixmap::new(pixels(size.width()), pixels(size.height()))
        .with_context(|| format!("{} by {} is too large; use svg", size.width(), size.height()))
        .with_context(what)?;
    resvg::render(&tree, Transform::from_scale(SCALE, SCALE), &mut pixmap.as_mut());
    pixmap.encode_png().with_context(what)
}

#[cfg(test)]
mod tests {
    use maud::html;

    use super::*;

    fn figure(body: maud::Markup) -> Figure {
        let (title, description) = ("Title".into(), String::new());
        Figure { id: "x", title, description, size: (100.0, 50.0), body }
    }

    #[test]
    fn letters_and_lines_are_drawn() {
        let drawn = |body| {
            let png = render(&figure(body)).unwrap();
            Pixmap::decode_png(&png).unwrap()
        };
        let other_than_paper = |pixmap: &Pixmap| {
            let paper = pixmap.pixels()[0];
            pixmap.pixels().iter().filter(|&&pixel| pixel != paper).count()
        };
        let title = drawn(html! {});
        assert_eq!((title.width(), title.height()), (264, 244));
        let letters = other_than_paper(&title);
        assert!(letters > 100, "the title is missing");
        // Letters that the font lacks would all be the same box.
        let text = |letters: &str| drawn(html! { text y="20" { (letters) } });
        for (at, letter) in "⁻¹²³⁴⁵⁶⁷⁸⁹⁰×±≤≥●½–−\u{2009}".chars().enumerate()
        {
            let missing = text("\u{e123}");
            assert_ne!(text(&letter.to_string()).data(), missing.data(), "{at}: {letter}");
        }
        let line = drawn(html! { path.h31 stroke-width="4" d="M0 10H100" {} });
        // 100 × 4 at twice the size.
        assert_eq!(other_than_paper(&line), letters + 1600);
    }
}
