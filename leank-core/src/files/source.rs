//! What every reader shares: where the bytes come from, and flags becoming a mask.

use std::path::Path;

use super::Format;
use crate::{Error, ModelMask, ModelShape, Result};

/// Most KV heads (over all layers) in a file. Each costs some dozen bytes of memory, so that a
/// small file with `head_dim` 1 would otherwise ask for many times its size; the largest models
/// have some thousands.
const MAX_HEADS: usize = 1 << 17;

/// Where bytes come from, for messages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    /// The file, or a name for the bytes.
    pub(super) path: &'a Path,
    /// What it should hold.
    pub(super) format: Format,
}

/// The axes of a mask as a file declares them, checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axes {
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Source<'_> {
    /// An [`Error::Format`] about this source.
    pub(super) fn bad(&self, why: impl ToString) -> Error {
        let (path, format) = (self.path.into(), self.format.name());
        Error::Format { path, format, why: why.to_string() }
    }

    /// Checks that the content is not visibly of another format.
    pub(super) fn expect_content(&self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Err(self.bad("the file is empty"));
        }
        if self.format == Format::Pth && bytes.starts_with(&[0x80, 2, 0x8a, 10]) {
            return Err(self.bad(
                "this is torch.save's format from before PyTorch 1.6; load it and save it again \
                 with a newer PyTorch",
            ));
        }
        if self.format == Format::Native
            && let Some((length, [b'{', ..])) = bytes.split_first_chunk::<8>()
            && let header = u64::from_le_bytes(*length)
            && header > bytes.len() as u64
        {
            return Err(self.bad(format!(
                "it is cut short: its header alone claims {header} bytes, the file has {}",
                bytes.len()
            )));
        }
        match Format::from_content(bytes) {
            Some(found) if found == self.format => Ok(()),
            // Any text looks like this, a licence or an error page as well as a table.
            Some(Format::Tsv) => Err(self.bad(
                "it is a text file; if it is a table of scaling factors, name it .tsv, otherwise \
                 give the mask",
            )),
            Some(found) => Err(self.bad(format!(
                "its content looks like a {found} file; correct the file's extension, or save it \
                 in the format that the extension names"
            ))),
            None => Err(self.bad(
                "its first bytes are not that format's; was the download complete and of the \
                 right file?",
            )),
        }
    }

    /// Checks a shape `[layers, kv_heads, head_dim]` from outside.
    pub(super) fn axes(&self, shape: &[u64]) -> Result<Axes> {
        let &[layers, kv_heads, head_dim] = shape else {
            return Err(self.bad(format!(
                "a mask has three axes [layers, kv_heads, head_dim], this has {}: {shape:?}",
                shape.len()
            )));
        };
        // Saturated sizes are refused by the validation.
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let axes =
            Axes { layers: size(layers), kv_heads: size(kv_heads), head_dim: size(head_dim) };
        ModelShape::new(axes.layers, axes.kv_heads, axes.kv_heads, axes.head_dim)
            .map_err(|error| self.bad(error))?;
        if axes.layers * axes.kv_heads > MAX_HEADS {
            return Err(self.bad(format!(
                "shape {shape:?} means more than {MAX_HEADS} KV heads, which no model has"
            )));
        }
        Ok(axes)
    }

    /// One flag of a mask file.
    #[cfg(feature = "interop")]
    pub(super) fn flag(&self, value: f64, at: usize, axes: &Axes) -> Result<bool> {
        if value == 0.0 || value == 1.0 {
            return Ok(value == 1.0);
        }
        Err(self.bad(format!(
            "{} is {value}, neither 0 nor 1. These look like scaling factors, not a mask: save \
             them as text, numpy.savetxt(\"factors.tsv\", factors.reshape(layers, -1), \
             delimiter=\"\\t\"), and make a mask of the .tsv by LeanK's rule: `leank convert \
             factors.tsv mask.safetensors --shape LAYERS,KV_HEADS,HEAD_DIM`",
            axes.name(at)
        )))
    }

    /// A bare mask from flags in row-major order.
    pub(super) fn mask(&self, axes: &Axes, flags: &[bool]) -> Result<ModelMask> {
        ModelMask::from_flags(axes.layers, axes.kv_heads, axes.head_dim, flags)
            .map_err(|error| self.bad(error))
    }
}

impl Axes {
    /// Channels of all heads. Cannot overflow: the axes were checked.
    #[cfg(feature = "interop")]
    pub(super) fn channels(&self) -> usize {
        self.layers * self.kv_heads * self.head_dim
    }

    /// A flat row-major index in words.
    pub(super) fn name(&self, at: usize) -> String {
        let (head, channel) = (at / self.head_dim, at % self.head_dim);
        let (layer, kv_head) = (head / self.kv_heads, head % self.kv_heads);
        format!("the value at layer {layer}, KV head {kv_head}, channel {channel}")
    }
}
