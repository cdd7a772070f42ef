//! Where every tensor of a layer file lies: shared by writer and reader.

use std::path::{Path, PathBuf};

use leank_core::{Dtype, Layer};
use serde_json::{Map, Value, json};

use super::{manifest::Manifest, sums};
use crate::{Error, Result};

/// Name of the manifest within a dump's directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Keys of the safetensors metadata of a layer file.
pub(super) const META_LAYER: &str = "leank.layer";
pub(super) const META_DUMP: &str = "leank.dump";
/// Optional: the checksums of the layer's data; see [`super::sums`].
pub(super) const META_SUMS: &str = "leank.sums";
/// Length of the number in front of a safetensors header.
pub(super) const LENGTH_BYTES: u64 = 8;

/// Name of a layer's file within a dump's directory.
#[must_use]
pub fn layer_file_name(layer: Layer) -> String {
    format!("layer-{:03}.safetensors", layer.0)
}

/// One of the four tensors of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tensor {
    Q,
    G,
    K,
    V,
}

impl Tensor {
    pub(super) const ALL: [Self; 4] = [Self::Q, Self::G, Self::K, Self::V];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q => "q",
            Self::G => "g",
            Self::K => "k",
            Self::V => "v",
        }
    }

    pub(super) fn shape(self, manifest: &Manifest, sequence: usize) -> Vec<usize> {
        let shape = &manifest.shape;
        let (n, d) = (manifest.positions, shape.head_dim);
        match self {
            Self::Q => vec![shape.query_heads, n, d],
            Self::G => vec![manifest.draws, shape.query_heads, n, d],
            Self::K | Self::V => vec![shape.kv_heads, manifest.tokens(sequence), d],
        }
    }
}

/// Offsets of all tensors of a layer file, relative to the end of its header.
#[derive(Debug)]
pub(super) struct Layout {
    /// Start of each tensor, `sequence * 4 + tensor`, in [`Tensor::ALL`]'s order.
    starts: Vec<u64>,
    /// Bytes of all tensors.
    pub(super) data_len: u64,
}

impl Layout {
    /// The layout that the writer uses.
    ///
    /// # Errors
    /// [`Error::Manifest`] when the sizes overflow.
    pub(super) fn new(manifest: &Manifest, path: &Path) -> Result<Self> {
        let mut starts = Vec::with_capacity(manifest.sequences.len() * 4);
        let mut end = 0u64;
        for sequence in 0..manifest.sequences.len() {
            for tensor in Tensor::ALL {
                starts.push(end);
                end = tensor_bytes(tensor, manifest, sequence)
                    .and_then(|bytes| end.checked_add(bytes))
                    .filter(|&end| end <= i64::MAX as u64)
                    .ok_or_else(|| Error::Manifest {
                        path: path.to_owned(),
                        why: format!("the sizes overflow at sequence {sequence}"),
                    })?;
            }
        }
        Ok(Self { starts, data_len: end })
    }

    pub(super) fn start(&self, tensor: Tensor, sequence: usize) -> u64 {
        self.starts[sequence * 4 + tensor as usize]
    }

    /// The same layout with offsets as a file gives them.
    pub(super) fn with_starts(starts: Vec<u64>, data_len: u64) -> Self {
        Self { starts, data_len }
    }

    /// The safetensors header of a layer, its length in front, padded to a multiple of 8.
    /// `manifest_id` and the text of the data's checksums go into its metadata.
    pub(super) fn header(
        &self,
        manifest: &Manifest,
        layer: Layer,
        manifest_id: &str,
        sums: &str,
    ) -> Vec<u8> {
        let mut entries = Map::new();
        let layer = layer.0.to_string();
        entries.insert(
            "__metadata__".into(),
            json!({ META_LAYER: layer, META_DUMP: manifest_id, META_SUMS: sums }),
        );
        for sequence in 0..manifest.sequences.len() {
            for tensor in Tensor::ALL {
                let start = self.start(tensor, sequence);
                let at = sequence * 4 + tensor as usize + 1;
                let end = self.starts.get(at).copied().unwrap_or(self.data_len);
                entries.insert(
                    format!("{}.{sequence}", tensor.name()),
                    json!({
                        "dtype": dtype_name(manifest.dtype),
                        "shape": tensor.shape(manifest, sequence),
                        "data_offsets": [start, end],
                    }),
                );
            }
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        header
    }
}

/// Bytes of one tensor, unless they overflow.
pub(super) fn tensor_bytes(tensor: Tensor, manifest: &Manifest, sequence: usize) -> Option<u64> {
    let shape = tensor.shape(manifest, sequence);
    shape.iter().try_fold(manifest.dtype.bytes() as u64, |n, &d| n.checked_mul(d as u64))
}

/// Longest header of any layer file: what the crate `safetensors` and its kin read at most.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// Bytes that the writer's header of a layer takes at most: 120 a tensor, then the checksums.
pub(super) fn needed_header(manifest: &Manifest) -> u64 {
    let sums = (sums::DIGITS * sums::parts_of_sequence(manifest)) as u64;
    (1 << 10) + (4 * 120 + sums) * manifest.sequences.len() as u64
}

/// Longest header that is read: several times what the writer makes.
pub(super) fn max_header(manifest: &Manifest) -> u64 {
    ((1 << 16) + 4 * needed_header(manifest)).min(MAX_HEADER)
}

/// The dtype's name in a safetensors header.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
    }
}

/// The dtype as safetensors' reader names it.
pub(super) fn safetensors_dtype(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    }
}

/// Path of a layer's file.
pub(super) fn layer_path(dir: &Path, layer: Layer) -> PathBuf {
    dir.join(layer_file_name(layer))
}
