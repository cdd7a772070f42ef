//! LeanK's published masks: `torch.save`d tensors of 0 and 1, `[layers, kv_heads, head_dim]`.
//!
//! Such a file is a zip archive of uncompressed entries under one folder: `data.pkl` (a pickle that
//! describes the tensor), `data/0` (its elements) and `byteorder`. The pickle is never executed:
//! a small machine of our own follows the few steps that `torch.save` writes and refuses the rest.
//!
//! Reads a tensor, a parameter, or a dictionary with one tensor; elements of any of torch's float,
//! integer and bool types of up to 8 bytes; contiguous or strided. Writes f32, which LeanK's loader
//! in MInference expects, in the form that `torch.load(path, weights_only=True)` reads.

mod pickle;
mod torch_zip;

use std::path::Path;

use half::{bf16, f16};

use super::{Format, Source, source::Axes};
use crate::{ModelMask, Result};
use pickle::{Element, TensorSpec};

/// Parses the bytes of a `.pth` file; `name` is for messages. The mask carries no information about
/// its model.
///
/// # Errors
/// [`Error::Format`](crate::Error::Format).
pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<ModelMask> {
    let source = Source { path: name, format: Format::Pth };
    let mut archive = torch_zip::Archive::open(bytes, source)?;
    let tensor = pickle::tensor(&archive.pickle()?).map_err(|why| source.bad(why))?;
    let axes = source.axes(&tensor.shape)?;
    let strides = check_extent(&tensor, &axes, source)?;
    let data = archive.storage(&tensor)?;
    let mut flags = Vec::with_capacity(axes.channels());
    for layer in 0..axes.layers {
        for head in 0..axes.kv_heads {
            let start = strides.offset + layer * strides.layer + head * strides.kv_head;
            for channel in 0..axes.head_dim {
                let value = element(&data, tensor.element, start + channel * strides.channel);
                flags.push(source.flag(value, flags.len(), &axes)?);
            }
        }
    }
    source.mask(&axes, &flags)
}

/// The bytes of a `.pth` file. What the mask says about itself is not in it.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) where a head asks for fewer than 16 bits.
pub fn to_bytes(mask: &ModelMask) -> Result<Vec<u8>> {
    super::check_no_precisions(mask, super::Format::Pth)?;
    let flags = mask.heads().iter().flat_map(|head| head.flags());
    let data: Vec<u8> =
        flags.flat_map(|keep| if keep { 1.0_f32 } else { 0.0 }.to_le_bytes()).collect();
    torch_zip::write(&write_pickle(mask), &data)
}

/// Where an element lies in the storage.
struct Strides {
    offset: usize,
    layer: usize,
    kv_head: usize,
    channel: usize,
}

/// Checks that every element of the tensor lies in its storage, and that the tensor is no larger
/// than it: an expanded one (stride 0) would let a small file ask for much memory.
fn check_extent(tensor: &TensorSpec, axes: &Axes, source: Source<'_>) -> Result<Strides> {
    if axes.channels() as u64 > tensor.elements {
        return Err(source.bad(format!(
            "its tensor of shape {:?} has more elements than the {} stored; if it was expanded, \
             save mask.contiguous()",
            tensor.shape, tensor.elements
        )));
    }
    let outside = || {
        source.bad(format!(
            "its tensor (offset {}, shape {:?}, strides {:?}) reaches beyond the {} elements \
             stored",
            tensor.offset, tensor.shape, tensor.strides, tensor.elements
        ))
    };
    let last = tensor
        .shape
        .iter()
        .zip(&tensor.strides)
        .try_fold(tensor.offset, |at, (&size, &stride)| {
            at.checked_add(size.checked_sub(1)?.checked_mul(stride)?)
        })
        .filter(|&last| last < tensor.elements)
        .ok_or_else(outside)?;
    // Not used to index where its axis has a single element, so it may be anything.
    let stride = |axis: usize| tensor.strides[axis].min(last) as usize;
    Ok(Strides {
        offset: tensor.offset as usize,
        layer: stride(0),
        kv_head: stride(1),
        channel: stride(2),
    })
}

impl Element {
    /// Bytes of one element.
    fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// Element `at` of little-endian `data`, in range by [`check_extent`] and [`Archive::storage`].
///
/// [`Archive::storage`]: torch_zip::Archive::storage
fn element(data: &[u8], kind: Element, at: usize) -> f64 {
    fn bytes<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
        data.as_chunks::<N>().0[at]
    }
    match kind {
        Element::F64 => f64::from_le_bytes(bytes(data, at)),
        Element::F32 => f32::from_le_bytes(bytes(data, at)).into(),
        Element::F16 => f16::from_le_bytes(bytes(data, at)).into(),
        Element::Bf16 => bf16::from_le_bytes(bytes(data, at)).into(),
        Element::I64 => i64::from_le_bytes(bytes(data, at)) as f64,
        Element::I32 => i32::from_le_bytes(bytes(data, at)).into(),
        Element::I16 => i16::from_le_bytes(bytes(data, at)).into(),
        Element::I8 => i8::from_le_bytes(bytes(data, at)).into(),
        Element::U8 | Element::Bool => data[at].into(),
    }
}

/// The pickle that `torch.save` (protocol 2) makes of a contiguous f32 tensor on the CPU.
fn write_pickle(mask: &ModelMask) -> Vec<u8> {
    let mut pickle = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
    let text = |pickle: &mut Vec<u8>, text: &str| {
        pickle.push(b'X');
        pickle.extend((text.len() as u32).to_le_bytes());
        pickle.extend(text.bytes());
    };
    // Sizes of a mask fit: its axes are at most 2^14, 2^14 and 2^12, and it is in memory.
    let int = |pickle: &mut Vec<u8>, value: usize| {
        pickle.extend([0x8a, 8]);
        pickle.extend((value as u64).to_le_bytes());
    };
    text(&mut pickle, "storage");
    pickle.extend(b"ctorch\nFloatStorage\n");
    text(&mut pickle, "0");
    text(&mut pickle, "cpu");
    int(&mut pickle, mask.channels());
    pickle.extend(b"tQ");
    int(&mut pickle, 0);
    let (layers, kv_heads, head_dim) = (mask.layers(), mask.kv_heads(), mask.head_dim());
    for sizes in [[layers, kv_heads, head_dim], [kv_heads * head_dim, head_dim, 1]] {
        for size in sizes {
            int(&mut pickle, size);
        }
        pickle.push(0x87);
    }
    // No gradient wanted, no hooks.
    pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR.");
    pickle
}
