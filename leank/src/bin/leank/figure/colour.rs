//! Colours: two themes, lines that the colour-blind can tell apart, and a ramp for heat maps that is
//! even to the eye.

use std::fmt::Write as _;

/// Steps of the ramp.
pub(crate) const LEVELS: usize = 32;
/// Colours of lines; more lines begin anew.
pub(crate) const LINES: usize = 8;

/// A colour by name in the light and in the dark theme.
struct Named {
    name: &'static str,
    light: &'static str,
    dark: &'static str,
}

const fn named(name: &'static str, light: &'static str, dark: &'static str) -> Named {
    Named { name, light, dark }
}

/// Paper, ink, and lines after Okabe & Ito (2008), each a little darker or lighter where the paper
/// asks for it.
const COLOURS: [Named; 22] = [
    named("paper", "#fcfbf8", "#15171b"),
    named("panel", "#f4f2ec", "#1d2026"),
    named("ink", "#1b1c1f", "#ecebe6"),
    named("soft", "#5c5f66", "#a7abb3"),
    named("rule", "#dcd8ce", "#343841"),
    named("grid", "#e7e4dc", "#2a2d34"),
    named("accent", "#1f5f99", "#7db9e8"),
    named("on-accent", "#ffffff", "#10141a"),
    // On a cell that is half accent: dark in both.
    named("on-middle", "#10141a", "#10141a"),
    named("good", "#00735a", "#4fcfa5"),
    named("warn", "#a8480a", "#f0a05a"),
    named("line0", "#0072b2", "#5aaee6"),
    named("line1", "#d55e00", "#f08a3c"),
    named("line2", "#009e73", "#35c79b"),
    named("line3", "#b4589a", "#dd97c3"),
    named("line4", "#c98500", "#e6b33a"),
    named("line5", "#3a9fd6", "#9ad4f5"),
    named("line6", "#8c7f00", "#e3d95a"),
    named("line7", "#6b6e75", "#b9bdc6"),
    named("only-this", "#d55e00", "#f08a3c"),
    named("only-other", "#0072b2", "#5aaee6"),
    named("both", "#a9a59a", "#6d727c"),
];

/// Dashes of lines, so that colour is not all that tells them apart.
const DASHES: [&str; LINES] = ["", "6 3", "2 2", "8 3 2 3", "4 4", "10 4", "1 3", "12 3 3 3"];

/// The variables of both themes and the rules of figures, for the page's style sheet.
pub(crate) fn page_style() -> String {
    let variables = |of: fn(&Named) -> &'static str| {
        let mut all = String::new();
        for colour in &COLOURS {
            let _ = write!(all, "--{}:{};", colour.name, of(colour));
        }
        all
    };
    let (light, dark) = (variables(|colour| colour.light), variables(|colour| colour.dark));
    format!(
        ":root{{color-scheme:light;{light}}}\n\
         @media (prefers-color-scheme:dark){{:root{{color-scheme:dark;{dark}}}}}\n\
         :root[data-theme=light]{{color-scheme:light;{light}}}\n\
         :root[data-theme=dark]{{color-scheme:dark;{dark}}}\n\
         @media print{{:root,:root[data-theme]{{color-scheme:light;{light}}}}}\n{}",
        rules(|colour| format!("var(--{})", colour.name))
    )
}

/// The rules of figures with the colours of both themes: the viewer says which.
pub(crate) fn standalone_style() -> String {
    let (light, dark) = (light_style(), rules(|colour| colour.dark.to_owned()));
    format!("{light}@media (prefers-color-scheme:dark){{{dark}}}")
}

/// The rules of figures with the colours of the light theme.
pub(crate) fn light_style() -> String {
    let font = "text{font-family:system-ui,'Segoe UI','Helvetica Neue',sans-serif;}";
    format!("{font}{}", rules(|colour| colour.light.to_owned()))
}

/// What the classes of figures look like.
fn rules(value: impl Fn(&Named) -> String) -> String {
    let of =
        |name: &str| COLOURS.iter().find(|own| own.name == name).map_or_else(String::new, &value);
    let mut css = String::from(
        ".figure text{font-size:11px;}.figure .small{font-size:9px;}\
         .figure .heading{font-size:16px;font-weight:bold;}.figure .strong{font-weight:bold;}",
    );
    for name in [
        "paper",
        "ink",
        "soft",
        "accent",
        "on-accent",
        "on-middle",
        "good",
        "warn",
        "both",
        "panel",
    ] {
        let _ = write!(css, ".figure .{name}{{fill:{};}}", of(name));
    }
    let _ = write!(
        css,
        ".figure text{{fill:{ink};}}.figure text.soft{{fill:{soft};}}.figure text.on-accent{{fill:{on};}}.figure text.on-middle{{fill:{middle};}}\
         .figure .heading{{fill:{ink};}}.figure .rule{{stroke:{rule};fill:none;}}\
         .figure .grid{{stroke:{grid};fill:none;}}.figure .axis{{stroke:{soft};fill:none;}}\
         .figure .band{{fill:{accent};fill-opacity:0.1;}}.figure .hatch{{stroke:{warn};fill:none;}}\
         .figure .halo{{stroke:{paper};fill:{ink};paint-order:stroke;}}.figure .cursor{{stroke:{ink};fill:none;}}\
         .figure .mute{{stroke:{both};fill:none;}}.figure .faint{{opacity:0.4;}}",
        ink = of("ink"),
        soft = of("soft"),
        on = of("on-accent"),
        middle = of("on-middle"),
        rule = of("rule"),
        grid = of("grid"),
        accent = of("accent"),
        warn = of("warn"),
        paper = of("paper"),
        both = of("both"),
    );
    for (at, dash) in DASHES.iter().enumerate() {
        let colour = of(&format!("line{at}"));
        let _ = write!(css, ".figure .l{at}{{stroke:{colour};fill:none;");
        if !dash.is_empty() {
            let _ = write!(css, "stroke-dasharray:{dash};");
        }
        let _ = write!(
            css,
            "}}.figure .f{at}{{fill:{colour};}}.figure .s{at}{{stroke:{colour};fill:none;}}"
        );
    }
    for name in ["only-this", "only-other", "both"] {
        let _ = write!(css, ".figure .cell-{name}{{stroke:{};fill:none;}}", of(name));
    }
    let _ = write!(css, ".figure .cell-kept{{stroke:{};fill:none;}}", of("accent"));
    for level in 0..LEVELS {
        let colour = ramp(level as f64 / (LEVELS - 1) as f64);
        let _ = write!(css, ".figure .h{level}{{stroke:{colour};fill:none;}}");
    }
    css
}

/// The level of the ramp for a share in 0..=1.
pub(crate) fn level(share: f64) -> usize {
    let share = if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 };
    (share * (LEVELS - 1) as f64).round() as usize
}

/// A colour of the ramp, dark violet over teal to yellow: lightness rises evenly (OKLab), so it reads
/// the same without colour vision and in grey; both ends stand out from light and from dark paper.
fn ramp(share: f64) -> String {
    let mix = |from: f64, to: f64| from + (to - from) * share;
    // Hue goes from violet (300°) down to yellow (98°); chroma is least where it crosses teal.
    let chroma = 0.115 + 0.05 * (2.0 * share - 1.0).powi(2);
    let [r, g, b] = srgb(mix(0.36, 0.90), chroma, mix(300.0, 98.0));
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// OKLCH (hue in degrees) to sRGB, clipped: Björn Ottosson's OKLab, 2020.
fn srgb(lightness: f64, chroma: f64, hue: f64) -> [u8; 3] {
    let (sin, cos) = hue.to_radians().sin_cos();
    let (a, b) = (chroma * cos, chroma * sin);
    let long = (lightness + 0.396_337_777_4 * a + 0.215_803_757_3 * b).powi(3);
    let medium = (lightness - 0.105_561_345_8 * a - 0.063_854_172_8 * b).powi(3);
    let short = (lightness - 0.089_484_177_5 * a - 1.291_485_548_0 * b).powi(3);
    let linear = [
        4.076_741_662_1 * long - 3.307_711_591_3 * medium + 0.230_969_929_2 * short,
        -1.268_438_004_6 * long + 2.609_757_401_1 * medium - 0.341_319_396_5 * short,
        -0.004_196_086_3 * long - 0.703_418_614_7 * medium + 1.707_614_701_0 * short,
    ];
    linear.map(|value| {
        let value = value.clamp(0.0, 1.0);
        let encoded = if value <= 0.003_130_8 {
            12.92 * value
        } else {
            1.055 * value.powf(1.0 / 2.4) - 0.055
        };
        (encoded * 255.0).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance of `#rrggbb` (WCAG 2).
    fn luminance(colour: &str) -> f64 {
        let channel = |at: usize| {
            let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
            if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5)
    }

    fn contrast(a: &str, b: &str) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn oklab_is_the_published_one() {
        // White, black and pure red (L 0.628, C 0.2577, h 29.23°).
        assert_eq!(srgb(1.0, 0.0, 0.0), [255, 255, 255]);
        assert_eq!(srgb(0.0, 0.0, 0.0), [0, 0, 0]);
        let [r, g, b] = srgb(0.627_96, 0.257_68, 29.234);
        assert!(r >= 254 && g <= 2 && b <= 2, "{r} {g} {b}");
    }

    #[test]
    fn the_ramp_becomes_lighter_step_by_step() {
        let all: Vec<f64> =
            (0..LEVELS).map(|level| luminance(&ramp(level as f64 / (LEVELS - 1) as f64))).collect();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{all:?}");
        assert_eq!((level(0.0), level(1.0), level(f64::NAN), level(9.0)), (0, 31, 0, 31));
    }

    #[test]
    fn text_and_lines_stand_out_in_both_themes() {
        let find = |name: &str| COLOURS.iter().find(|own| own.name == name).unwrap();
        let (paper, panel) = (find("paper"), find("panel"));
        for name in ["ink", "soft", "accent", "good", "warn"] {
            let own = find(name);
            for back in [paper, panel] {
                assert!(contrast(own.light, back.light) >= 4.5, "{name} in light");
                assert!(contrast(own.dark, back.dark) >= 4.5, "{name} in dark");
            }
        }
        for at in 0..LINES {
            let own = find(&format!("line{at}"));
            assert!(contrast(own.light, paper.light) >= 2.7, "line{at} in light");
            assert!(contrast(own.dark, paper.dark) >= 2.7, "line{at} in dark");
        }
    }
}
