//! Mask files as arguments.

use std::{collections::BTreeMap, path::Path};

use leank::{
    Backend as _, CacheConfig, CacheLayout, Layer, LayoutRules, ModelMask,
    cpu::Cpu,
    files::{Format, read_mask},
};

/// The backend whose padding is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Padding {
    /// Blocks of the CPU backend.
    #[default]
    Cpu,
    /// Blocks of the CUDA backend. No device is needed.
    Cuda,
}

impl Padding {
    pub(crate) fn rules(self) -> LayoutRules {
        match self {
            Self::Cpu => Cpu::new().layout_rules(),
            Self::Cuda => leank::cuda::layout_rules(),
        }
    }
}

/// Reads a mask. Scaling factors are none yet.
pub(crate) fn read(path: &Path) -> anyhow::Result<ModelMask> {
    anyhow::ensure!(!path.is_dir(), "{}: is a folder; a mask is a file", path.display());
    if Format::from_path(path)? == Format::Tsv {
        let path = path.display();
        anyhow::bail!(
            "{path}: scaling factors are no mask yet; run `leank convert {path} mask.safetensors \
             --shape LAYERS,KV_HEADS,HEAD_DIM` and give mask.safetensors"
        );
    }
    Ok(read_mask(path, &Default::default())?)
}

/// Formats of the live heads of a layer in lean blocks; `None` for dead heads.
pub(crate) fn formats(mask: &ModelMask, layer: Layer) -> Vec<Option<String>> {
    let format = |(head, own): (usize, &leank::ChannelMask)| {
        (!own.is_dead()).then(|| mask.precision(layer, leank::KvHead(head)).to_string())
    };
    mask.layer(layer).iter().enumerate().map(format).collect()
}

/// Number of live heads by format.
pub(crate) fn heads_by_format(mask: &ModelMask) -> BTreeMap<String, usize> {
    let mut heads = BTreeMap::new();
    for format in (0..mask.layers()).flat_map(|layer| formats(mask, Layer(layer))).flatten() {
        *heads.entry(format).or_insert(0) += 1;
    }
    heads
}

/// Those formats in a few words: the one of all live heads, or how many heads have which.
pub(crate) fn format_words(heads: &BTreeMap<String, usize>) -> String {
    let words: Vec<_> = match heads.len() {
        1 => heads.keys().cloned().collect(),
        _ => heads.iter().map(|(format, heads)| format!("{format} × {heads}")).collect(),
    };
    if words.is_empty() { "–".into() } else { words.join(", ") }
}

/// Bytes of a lean block of a backend against those of a dense one of the same element type: codes,
/// scales and padding.
pub(crate) fn middle_bytes(config: &CacheConfig, padding: Padding) -> leank::Result<f64> {
    let layout = CacheLayout::new(config, padding.rules())?;
    let dense = layout.dense_token_bytes as f64 * layout.block as f64;
    Ok(layout.lean_bytes_all_layers() as f64 / dense)
}
