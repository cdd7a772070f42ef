//! The masks published with LeanK, where a copy of them lies beside the checkout (`../shared/masks`
//! from the repository's root). They are not part of this repository.
#![cfg(feature = "interop")]

use std::path::{Path, PathBuf};

use leank_core::{
    ChannelMask, ModelMask,
    files::{Format, ReadOptions, read_mask, to_bytes},
};

fn published(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/masks").join(name);
    if !path.is_file() {
        eprintln!("SKIPPED: {} is not there; put LeanK's published masks there", path.display());
        return None;
    }
    Some(path)
}

/// Heads that keep 0, 32, 64 and 96 channels; all others are an error.
fn heads_by_count(mask: &ModelMask) -> [usize; 4] {
    let count = |kept| mask.heads().iter().filter(|head| head.kept_count() == kept).count();
    let counts = [0, 32, 64, 96].map(count);
    assert_eq!(counts.iter().sum::<usize>(), mask.heads().len(), "other counts occur");
    counts
}

fn check(name: &str, axes: [usize; 3], counts: [usize; 4], pruned: [f64; 2]) {
    let Some(path) = published(name) else { return };
    let mask = read_mask(&path, &ReadOptions::default()).unwrap();
    assert_eq!([mask.layers(), mask.kv_heads(), mask.head_dim()], axes);
    assert_eq!(heads_by_count(&mask), counts);
    let summary = mask.summary();
    let percent = |kept: f64| 100.0 * (1.0 - kept);
    assert!((percent(summary.kept_k) - pruned[0]).abs() < 0.005, "{summary:?}");
    assert!((percent(summary.kept_v) - pruned[1]).abs() < 0.005, "{summary:?}");

    // What we write holds the same elements as what was published.
    let own = to_bytes(&mask, Format::Pth).unwrap();
    let elements: Vec<u8> = mask
        .heads()
        .iter()
        .flat_map(ChannelMask::flags)
        .flat_map(|keep| f32::from(u8::from(keep)).to_le_bytes())
        .collect();
    let holds = |bytes: &[u8]| bytes.windows(elements.len()).any(|window| window == elements);
    assert!(holds(&std::fs::read(&path).unwrap()) && holds(&own));
}

#[test]
fn llama_3_1_8b() {
    check("llama3.1-8b-instruct.pth", [32, 8, 128], [47, 120, 67, 22], [68.75, 18.36]);
}

#[test]
fn qwen_2_5_7b() {
    check("qwen2.5-7b-instruct.pth", [28, 4, 128], [35, 34, 33, 10], [70.98, 31.25]);
}
