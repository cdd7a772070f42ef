//! Numbers as people read them.

/// A number with two or three significant digits: `0.0031`, `1.2×10⁻⁵`, `37.8`, `120 000`.
pub(crate) fn significant(x: f64) -> String {
    let size = x.abs();
    match x {
        _ if !x.is_finite() => "–".into(),
        _ if size == 0.0 => "0".into(),
        _ if !(1e-3..1e7).contains(&size) => power(x),
        _ if size < 0.1 => format!("{x:.4}"),
        _ if size < 10.0 => format!("{x:.3}"),
        _ if size < 1000.0 => format!("{x:.1}"),
        _ => grouped(x),
    }
}

/// A tick of an axis: round, so without zeros at its end.
pub(crate) fn tick(x: f64) -> String {
    let size = x.abs();
    if size != 0.0 && !(1e-3..1e6).contains(&size) {
        return power(x).replacen(".0×", "×", 1);
    }
    let text = format!("{x:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// As a product with a power of ten: `1.2×10⁻⁵`.
pub(crate) fn power(x: f64) -> String {
    if !x.is_finite() || x == 0.0 {
        return significant(x);
    }
    let text = format!("{x:.1e}");
    match text.split_once('e') {
        Some(("1.0", exponent)) => format!("10{}", superscript(exponent)),
        Some((digits, exponent)) => format!("{digits}×10{}", superscript(exponent)),
        None => text,
    }
}

fn superscript(digits: &str) -> String {
    let raise = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        '0'..='9' => char::from_u32(0x2070 + u32::from(c) - u32::from('0')).unwrap_or(c),
        other => other,
    };
    digits.chars().map(raise).collect()
}

/// A whole number with a thin space between thousands.
fn grouped(x: f64) -> String {
    let digits = format!("{:.0}", x.abs());
    let mut text = if x < 0.0 { String::from("−") } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{2009}');
        }
        text.push(digit);
    }
    text
}

/// A share as a percentage with one decimal; `–` where it is none.
pub(crate) fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1}\u{a0}%", share * 100.0) } else { "–".into() }
}

/// Tokens, short where that is exact: `512`, `8k`, `1M`.
pub(crate) fn tokens(n: usize) -> String {
    match n {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

/// Text from a file as it may be shown: without what steers the display, and not endless.
pub(crate) fn shown(text: &str) -> String {
    const MOST: usize = 160;
    let is_control = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
    };
    let mut shown: String =
        text.chars().take(MOST).map(|c| if is_control(c) { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (x, text) in [
            (0.0, "0"),
            (0.0031, "0.0031"),
            (1.24e-5, "1.2×10⁻⁵"),
            (1e-4, "10⁻⁴"),
            (3.84, "3.840"),
            (37.84, "37.8"),
            (120_000.0, "120\u{2009}000"),
            (f64::NAN, "–"),
            (f64::INFINITY, "–"),
            (3e300, "3.0×10³⁰⁰"),
        ] {
            assert_eq!(significant(x), text);
        }
        assert_eq!(power(1e-10), "10⁻¹⁰");
        assert_eq!([0.0, 0.005, 0.2, 40.0, 3e-4].map(tick), ["0", "0.005", "0.2", "40", "3×10⁻⁴"]);
        assert_eq!(tokens(8192), "8k");
        assert_eq!(tokens(1 << 20), "1M");
        assert_eq!(tokens(1536 + 1), "1537");
        assert_eq!(percent(0.378), "37.8\u{a0}%");
    }

    #[test]
    fn text_from_files_neither_steers_nor_floods() {
        assert_eq!(shown("a\u{0}b\u{202e}c\nd"), "a\u{fffd}b\u{fffd}c\u{fffd}d");
        assert_eq!(shown(&"é".repeat(1000)).chars().count(), 161);
        assert_eq!(shown("SmolLM2"), "SmolLM2");
    }
}
