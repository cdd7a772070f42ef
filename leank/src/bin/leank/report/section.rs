//! The parts that a report is put together from.

use maud::Markup;
use serde::Serialize;

use crate::figure::Figure;

/// A part of the page under its own heading.
pub(crate) struct Section {
    /// Where links lead.
    pub(crate) id: &'static str,
    pub(crate) heading: &'static str,
    pub(crate) blocks: Vec<Block>,
}

/// What stands in a section, from top to bottom.
pub(crate) enum Block {
    /// Text, tables.
    Html(Markup),
    /// A figure with what is to be known to read it.
    Figure { figure: Figure, caption: Markup, cells: Option<Box<Cells>> },
}

/// What the pointer reads off a heat map: where its cells lie and what is behind them.
#[derive(Serialize)]
pub(crate) struct Cells {
    #[serde(flatten)]
    pub(crate) grid: super::grid::Grid,
    /// Scores, f32 little-endian in base64; absent where there are none.
    pub(crate) scores: Option<String>,
    /// A bit per channel, least significant first, in base64: kept.
    pub(crate) kept: String,
    /// The same of the mask to compare with.
    pub(crate) other: Option<String>,
    /// Tokens per turn of each pair of channels.
    pub(crate) wavelengths: Vec<f64>,
}

impl Section {
    /// Its figures.
    pub(crate) fn figures(&self) -> impl Iterator<Item = &Figure> {
        self.blocks.iter().filter_map(|block| match block {
            Block::Figure { figure, .. } => Some(figure),
            Block::Html(_) => None,
        })
    }
}
