//! The native mask file: safetensors with what a mask needs to be used rightly.
//!
//! - U8 tensor `mask` `[layers, kv_heads, head_dim]`, row-major, 0 or 1 (1 = kept);
//! - optional F32 tensor `scores` of the same shape, finite;
//! - in version 2, U8 tensor `bits` `[layers, kv_heads, 2]`: bits of an element of K and of V in lean
//!   blocks, 4, 8 or 16, where 16 is what the cache's full blocks have ([`Precision`]);
//! - metadata key `leank`: a JSON object with `"version"` (1 or 2) and the fields of [`MaskInfo`], each
//!   optional.
//!
//! Any safetensors library can read the tensors. Fields and tensors that this version does not
//! know are ignored, so that later ones may add some; what would change the *meaning* raises the
//! version, and a newer version than ours is an error, never a guess. A mask that asks for 16 bits
//! everywhere is written as version 1, which earlier ones read.

use std::{collections::HashMap, path::Path};

use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo, TensorView},
};
use serde::{Deserialize, Serialize};

use super::{Format, Source, source::Axes};
use crate::{Error, HeadPrecision, MaskInfo, ModelMask, Precision, Result};

/// The newest version that is read and written.
pub const VERSION: u64 = 2;
/// The version of masks that ask for 16 bits everywhere.
const PLAIN_VERSION: u64 = 1;
/// Largest safetensors header: JSON costs some ten times its size in memory while it is parsed. A run
/// over thousands of texts has its record in it.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Largest predicted KL, far above what any distributions of tokens differ by.
const MAX_PREDICTED_KL: f64 = 1e6;
const METADATA_KEY: &str = "leank";

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

#[derive(Serialize, Deserialize)]
struct MetadataJson {
    version: u64,
    #[serde(flatten)]
    info: MaskInfo,
}

/// Parses the bytes of a native file; `name` is for messages.
///
/// # Errors
/// [`Error::Format`].
pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<ModelMask> {
    let source = Source { path: name, format: Format::Native };
    if let Some(length) = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length))
        && length > MAX_HEADER_BYTES
    {
        return Err(source.bad(format!(
            "its header claims {length} bytes, more than {MAX_HEADER_BYTES}: not a mask, or damaged"
        )));
    }
    // Checks that every tensor's range is that of its shape and that the ranges tile the file.
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| source.bad(format!("{error}; is the file whole?")))?;
    if let Some(name) = super::name_twice(&bytes[8..8 + header]) {
        return Err(source.bad(format!("its header has {name:?} twice: it is damaged")));
    }
    let file = Tensors { source, metadata: &metadata, data: &bytes[8 + header..] };
    let MetadataJson { version, info } = file.metadata_json()?;
    let (axes, mask) = file.mask()?;
    let mask = if version > PLAIN_VERSION {
        mask.with_precisions(file.precisions(&axes)?).map_err(|error| source.bad(error))?
    } else {
        mask
    };
    let with_scores = match file.scores(&axes)? {
        Some(scores) => mask.with_scores(scores),
        None => Ok(mask),
    };
    with_scores.and_then(|mask| mask.with_info(info)).map_err(|error| source.bad(error))
}

/// The bytes of a native file. Equal masks give equal bytes.
///
/// # Errors
/// [`Error::Invalid`] when the metadata holds a number that JSON cannot (not finite), or is longer
/// than a reader takes.
pub fn to_bytes(mask: &ModelMask) -> Result<Vec<u8>> {
    let shape = vec![mask.layers(), mask.kv_heads(), mask.head_dim()];
    let flags: Vec<u8> = mask.heads().iter().flat_map(|head| head.flags()).map(u8::from).collect();
    let scores: Option<Vec<u8>> =
        mask.scores().map(|scores| scores.iter().flat_map(|score| score.to_le_bytes()).collect());
    let view = |dtype, bytes| {
        TensorView::new(dtype, shape.clone(), bytes)
            .map_err(|error| Error::invalid("mask tensor", error))
    };
    let mut tensors = vec![("mask", view(Dtype::U8, &flags)?)];
    if let Some(scores) = &scores {
        tensors.push(("scores", view(Dtype::F32, scores)?));
    }
    let bits: Option<Vec<u8>> = mask.precisions().map(|precisions| {
        precisions.iter().flat_map(|head| [head.k.bits(), head.v.bits()]).collect()
    });
    if let Some(bits) = &bits {
        let shape = vec![mask.layers(), mask.kv_heads(), 2];
        let view = TensorView::new(Dtype::U8, shape, bits);
        tensors.push(("bits", view.map_err(|error| Error::invalid("mask tensor", error))?));
    }
    let version = if bits.is_some() { VERSION } else { PLAIN_VERSION };
    let json = metadata_json(version, mask.info())?;
    // In the header it is a string: quotes take two bytes there. The tensors take a few hundred.
    let in_header = json.len() + json.matches(['"', '\\']).count() + 4096;
    if in_header as u64 > MAX_HEADER_BYTES {
        let why = format!("it is {} bytes long; leave out run records (`runs`)", json.len());
        return Err(Error::invalid("mask metadata", why));
    }
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), json)]);
    safetensors::serialize(tensors, Some(metadata)).map_err(|error| Error::invalid("mask", error))
}

fn metadata_json(version: u64, info: &MaskInfo) -> Result<String> {
    let numbers = [
        ("predicted KL", info.predicted_kl),
        ("RoPE base", info.fingerprint.as_ref().map(|fingerprint| fingerprint.rope_base)),
    ];
    for (name, number) in numbers {
        if let Some(number) = number.filter(|number| !number.is_finite()) {
            let why = format!("the {name} is {number}; a mask file holds finite numbers only");
            return Err(Error::invalid("mask metadata", why));
        }
    }
    serde_json::to_string(&MetadataJson { version, info: info.clone() })
        .map_err(|error| Error::invalid("mask metadata", error))
}

/// An opened file: its header is checked, its data is not looked at yet.
struct Tensors<'a> {
    source: Source<'a>,
    metadata: &'a Metadata,
    data: &'a [u8],
}

impl<'a> Tensors<'a> {
    fn metadata_json(&self) -> Result<MetadataJson> {
        let source = self.source;
        let json = self.metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY));
        let json = json.ok_or_else(|| {
            source.bad(format!(
                "it has no metadata key `{METADATA_KEY}`; if these are a model's weights, give a \
                 mask; if this is a mask from elsewhere, add the metadata {{\"{METADATA_KEY}\": \
                 \"{{\\\"version\\\": {PLAIN_VERSION}}}\"}}"
            ))
        })?;
        let damaged = |error| source.bad(format!("its metadata `{METADATA_KEY}`: {error}"));
        let Versioned { version } = serde_json::from_str(json).map_err(damaged)?;
        if version == 0 {
            return Err(
                source.bad("it is of format version 0, which there never was: it is damaged")
            );
        }
        if version > VERSION {
            return Err(source.bad(format!(
                "it is of format version {version}, this leank reads up to {VERSION}; update leank"
            )));
        }
        let json: MetadataJson = serde_json::from_str(json).map_err(damaged)?;
        let predicted = json.info.predicted_kl;
        if let Some(kl) = predicted.filter(|kl| !(0.0..=MAX_PREDICTED_KL).contains(kl)) {
            let range = format!("it is 0 to {MAX_PREDICTED_KL} nats");
            return Err(source.bad(format!("its metadata says a predicted KL of {kl}; {range}")));
        }
        Ok(json)
    }

    fn mask(&self) -> Result<(Axes, ModelMask)> {
        let source = self.source;
        let info = self.tensor("mask", Dtype::U8)?.ok_or_else(|| {
            source.bad("it has no tensor `mask`; is this the file of a mask, not of a model?")
        })?;
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        let axes = source.axes(&shape)?;
        let bytes = self.bytes(info)?;
        if let Some(at) = bytes.iter().position(|&byte| byte > 1) {
            let (what, value) = (axes.name(at), bytes[at]);
            return Err(source.bad(format!("{what} is {value}, neither 0 nor 1")));
        }
        let flags: Vec<bool> = bytes.iter().map(|&byte| byte == 1).collect();
        Ok((axes, source.mask(&axes, &flags)?))
    }

    fn scores(&self, axes: &Axes) -> Result<Option<Vec<f32>>> {
        let Some(info) = self.tensor("scores", Dtype::F32)? else { return Ok(None) };
        let expected = [axes.layers, axes.kv_heads, axes.head_dim];
        if info.shape != expected {
            let found = &info.shape;
            return Err(self
                .source
                .bad(format!("tensor `scores` has shape {found:?}, the mask {expected:?}")));
        }
        let (chunks, _) = self.bytes(info)?.as_chunks::<4>();
        Ok(Some(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }

    fn precisions(&self, axes: &Axes) -> Result<Vec<HeadPrecision>> {
        let source = self.source;
        let info = self.tensor("bits", Dtype::U8)?.ok_or_else(|| {
            source.bad(format!("it has no tensor `bits`, which masks of version {VERSION} have"))
        })?;
        let expected = [axes.layers, axes.kv_heads, 2];
        if info.shape != expected {
            let found = &info.shape;
            return Err(source.bad(format!("tensor `bits` has shape {found:?}, not {expected:?}")));
        }
        let (heads, _) = self.bytes(info)?.as_chunks::<2>();
        let precision = |(at, &[k, v]): (usize, &[u8; 2])| {
            let named = |tensor, bits| {
                Precision::from_bits(bits).ok_or_else(|| {
                    let (layer, head) = (at / axes.kv_heads, at % axes.kv_heads);
                    source.bad(format!(
                        "{tensor} of layer {layer}, KV head {head} asks for {bits} bits; this leank \
                         knows 16, 8 and 4"
                    ))
                })
            };
            Ok(HeadPrecision { k: named("K", k)?, v: named("V", v)? })
        };
        heads.iter().enumerate().map(precision).collect()
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> Result<Option<&'a TensorInfo>> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        if info.dtype != dtype {
            let found = info.dtype;
            return Err(self
                .source
                .bad(format!("tensor `{name}` is of type {found}, expected {dtype}")));
        }
        Ok(Some(info))
    }

    fn bytes(&self, info: &TensorInfo) -> Result<&'a [u8]> {
        let (start, end) = info.data_offsets;
        self.data.get(start..end).ok_or_else(|| self.source.bad("a tensor lies outside the file"))
    }
}
