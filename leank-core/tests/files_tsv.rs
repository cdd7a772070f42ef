//! Scaling factors as text.
#![cfg(feature = "interop")]

mod files_support;

use files_support::{message, name};
use leank_core::{
    ModelShape,
    files::{ScalingFactors, tsv},
    quantile_and_round,
};
use proptest::prelude::*;

fn scaling(layers: usize, kv_heads: usize, head_dim: usize) -> ScalingFactors {
    let shape = ModelShape::new(layers, kv_heads, kv_heads, head_dim).unwrap();
    ScalingFactors { shape, ratio: 0.5, alignment: 1 }
}

/// What `numpy.savetxt` writes with its default format.
fn savetxt(factors: &[f32], columns: usize, delimiter: &str) -> String {
    let number = |factor: &f32| {
        let text = format!("{factor:.18e}");
        let (mantissa, exponent) = text.split_once('e').unwrap();
        let exponent: i32 = exponent.parse().unwrap();
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    };
    let row = |row: &[f32]| row.iter().map(number).collect::<Vec<_>>().join(delimiter) + "\n";
    factors.chunks(columns).map(row).collect()
}

proptest! {
    #[test]
    fn rows_may_be_layers_or_heads(
        factors in proptest::collection::vec(-0.5..1.5_f32, 3 * 2 * 4),
        ratio in 0.0..=1.0_f64,
        delimiter in prop::sample::select(&["\t", " ", "  ", ","][..]),
        per_head: bool,
    ) {
        let columns = if per_head { 4 } else { 8 };
        let text = savetxt(&factors, columns, delimiter);
        let options = ScalingFactors { ratio, alignment: 2, ..scaling(3, 2, 4) };
        let mask = tsv::from_bytes(text.as_bytes(), name(), &options).unwrap();
        let clipped: Vec<f32> = factors.iter().map(|factor| factor.clamp(0.0, 1.0)).collect();
        let expected = quantile_and_round(&clipped, &options.shape, ratio, 2).unwrap();
        prop_assert_eq!(mask.heads(), expected.heads());
        prop_assert_eq!(mask.scores(), Some(&factors[..]));
    }
}

#[test]
fn the_mask_says_how_it_came_about() {
    let text = "# a header\n\n0.9 0.1\n\r\n 0.2\t0.8 \r\n";
    let mask = tsv::from_bytes(text.as_bytes(), name(), &scaling(2, 1, 2)).unwrap();
    assert_eq!(mask.heads()[0].kept(), [0]);
    assert_eq!(mask.heads()[1].kept(), [1]);
    assert_eq!(mask.info().alignment, Some(1));
    assert_eq!(mask.info().budget.as_deref(), Some("k-ratio 0.5"));
}

#[test]
fn errors_name_the_line() {
    for (text, expected) in [
        ("1\t0\n1\tx\n", "line 2, column 2: `x`"),
        ("1\t0\n\n# c\nnan\t1\n", "line 4, column 1: nan is not finite"),
        ("1\t0\n-inf\t1\n", "line 2, column 1: -inf"),
        ("1\t1e39\n1\t1\n", "line 1, column 2: 1e39"),
        ("1\t0\n1\n", "line 2 has 1 columns, the first row has 2"),
        ("1\t0\n1\t1\t1\n", "4 factors of 2 layers × 1 KV heads × 2 channels"),
        ("1\t0\n1\t1\t1\n", "line 2: the table has more than the 4"),
        ("1\t0\n", "1 rows × 2 columns = 2 factors, 4 expected"),
        ("", "0 rows"),
        ("1\t0\n1\t0\n1\t0\n", "line 3"),
        ("1\n0\n1\n0\n", "transposed"),
        ("1\t0\t1\t0\n", "transposed"),
    ] {
        let message = message(tsv::from_bytes(text.as_bytes(), name(), &scaling(2, 1, 2)));
        assert!(message.contains(expected), "{expected:?} not in: {message}");
    }
    let padded = |length: usize| format!("0.{}1", "0".repeat(length - 3));
    assert!(tsv::from_bytes(padded(64).as_bytes(), name(), &scaling(1, 1, 1)).is_ok());
    assert!(tsv::from_bytes(padded(65).as_bytes(), name(), &scaling(1, 1, 1)).is_err());
    let long = "1".repeat(1000);
    let message_long = message(tsv::from_bytes(long.as_bytes(), name(), &scaling(1, 1, 1)));
    assert!(message_long.contains("1000 characters") && message_long.len() < 300);
    assert!(message(tsv::from_bytes(b"1\xff", name(), &scaling(1, 1, 1))).contains("UTF-8"));
}

#[test]
fn options_are_checked() {
    let good = scaling(2, 1, 2);
    let bad = |options| tsv::from_bytes(b"1 0\n0 1\n", name(), &options).unwrap_err().to_string();
    assert!(bad(ScalingFactors { ratio: 1.5, ..good }).contains("ratio"));
    assert!(bad(ScalingFactors { ratio: f64::NAN, ..good }).contains("ratio"));
    assert!(bad(ScalingFactors { alignment: 3, ..good }).contains("head_dim 2"));
    let shape = ModelShape { layers: 0, ..good.shape };
    assert!(bad(ScalingFactors { shape, ..good }).contains("layers"));
}
