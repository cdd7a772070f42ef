//! The page: one HTML document with its style, its script and its figures inside, that asks for
//! nothing else and, by its content security policy, could not.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use leank::files::sha256_hex;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    facts,
    input::Input,
    section::{Block, Cells, Section},
};
use crate::figure::{Figure, colour, numbers::shown};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// The document.
pub(crate) fn page(input: &Input, sections: &[Section]) -> Markup {
    let model = input.own.info().model_id.as_deref().map_or_else(|| input.own.name.clone(), shown);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy());
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="generator" content=(concat!("leank ", env!("CARGO_PKG_VERSION")));
                title { "Mask report: " (model) }
                // An icon of nothing, so that none is asked for.
                link rel="icon" href="data:,";
                style { (PreEscaped(colour::page_style())) (PreEscaped(STYLE)) }
            }
            body {
                a.skip href="#main" { "To the report" }
                (header(input, &model, sections))
                main id="main" {
                    (facts::findings(input))
                    section aria-labelledby="facts" {
                        h2 id="facts" { "What the mask says of itself" }
                        (facts::facts(input))
                    }
                    @for section in sections { (body(section)) }
                    (missing(input))
                }
                footer { p { "Written by " code { "leank report" } ", version " (env!("CARGO_PKG_VERSION")) "." } }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
}

/// Nothing from elsewhere, and no script but ours: what a file smuggles in would not run.
fn policy() -> String {
    format!(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'; \
         base-uri 'none'; form-action 'none'",
        STANDARD.encode(digest(SCRIPT))
    )
}

/// SHA-256 as bytes.
fn digest(text: &str) -> Vec<u8> {
    let hex = sha256_hex(text.as_bytes());
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap_or_default();
    (0..hex.len()).step_by(2).map(byte).collect()
}

fn header(input: &Input, model: &str, sections: &[Section]) -> Markup {
    let info = input.own.info();
    let how = [info.method.as_deref(), info.budget.as_deref()];
    let how: Vec<String> = how.into_iter().flatten().map(shown).collect();
    html! {
        header {
            div.bar {
                p.kicker { "Mask report" }
                button.script-only type="button" id="theme" { "Light or dark" }
            }
            h1 { bdi { (model) } }
            p.lead {
                (input.own.mask)
                @if !how.is_empty() { " · " bdi { (how.join(", ")) } }
            }
            (facts::headline(input))
            nav aria-label="Parts of the report" {
                @for section in sections {
                    a href={ "#" (section.id) } { (section.heading) }
                }
            }
        }
    }
}

fn body(section: &Section) -> Markup {
    let heading = format!("{}-heading", section.id);
    html! {
        section id=(section.id) aria-labelledby=(heading) {
            h2 id=(heading) { (section.heading) }
            @for block in &section.blocks {
                @match block {
                    Block::Html(markup) => (markup),
                    Block::Figure { figure, caption, cells } => (framed(figure, caption, cells.as_deref())),
                }
            }
        }
    }
}

/// A figure in a box of its own that scrolls where it is wider than the page.
fn framed(figure: &Figure, caption: &Markup, cells: Option<&Cells>) -> Markup {
    html! {
        figure {
            h3 { (figure.title) }
            @if cells.is_some() { output.readout.script-only { "\u{a0}" } }
            div.scroll tabindex="0" role="region" aria-label=(figure.title) data-cells[cells.is_some()] {
                (figure.inline())
                @if let Some(json) = cells.and_then(|cells| serde_json::to_string(cells).ok()) {
                    // Numbers, base64 and our own names: nothing in it could end the element.
                    script type="application/json" { (PreEscaped(json)) }
                }
            }
            figcaption { (caption) }
        }
    }
}

/// What the report could show and was not given.
fn missing(input: &Input) -> Markup {
    let absent = [
        (input.learned.is_none(), "--dump DIR", "loss curves, and where the loss sits"),
        (input.evaluations.is_empty(), "--eval FILE", "whether the predicted KL was measured"),
        (input.other.is_none(), "--compare MASK", "how this mask differs from another"),
    ];
    html! {
        @if absent.iter().any(|(absent, ..)| *absent) {
            section aria-labelledby="absent" {
                h2 id="absent" { "Not in this report" }
                ul {
                    @for (_, flag, what) in absent.iter().filter(|(absent, ..)| *absent) {
                        li { code { (flag) } " shows " (what) "." }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_lets_our_script_run_and_no_other() {
        assert_eq!(
            STANDARD.encode(digest("abc")),
            // SHA-256 of FIPS 180-2's example, in base64.
            "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="
        );
        let policy = policy();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(!policy.contains("script-src 'unsafe-inline'"), "{policy}");
        // What ends a script or asks for something would break the page.
        for odd in ["</script", "http:", "https:", "url(", "@import", "innerHTML"] {
            assert!(!SCRIPT.contains(odd) && !STYLE.contains(odd), "{odd}");
        }
    }
}
