//! The header of a saved sequence: what it was cached for, and how long it is.

use super::stream::{In, Out, bad};
use crate::{
    CacheConfig, ChannelMask, Dtype, Error, LeanFormat, ModelShape, Result, Windows,
    blocks::MAX_TOKENS,
};

const MAGIC: [u8; 8] = *b"LEANKSEQ";
/// The newest version.
const VERSION: u32 = 2;
/// The newest version that knows plain elements only.
const PLAIN_VERSION: u32 = 1;
/// Longest header that is read. One of the largest models (100 layers of 96 KV heads, head_dim 256)
/// takes a third of a megabyte.
const MAX_HEADER_BYTES: u32 = 16 << 20;
/// Longest description of a model.
const MAX_MODEL_BYTES: usize = 1 << 12;

/// What a header says beyond what must be equal to the cache's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Tokens of the sequence.
    pub(super) tokens: usize,
    /// End of its lean blocks: an index in the block table, not before the sink's end.
    pub(super) packed: usize,
}

impl Header {
    pub(super) fn write(self, config: &CacheConfig, out: &mut Out<'_>) -> Result<()> {
        let fields = self.fields(config)?;
        let mut bytes = Vec::with_capacity(16 + fields.len());
        bytes.extend(MAGIC);
        bytes.extend(version(config).to_le_bytes());
        bytes.extend(length(fields.len())?.to_le_bytes());
        bytes.extend(fields);
        out.section(&bytes)
    }

    fn fields(self, config: &CacheConfig) -> Result<Vec<u8>> {
        let shape = config.shape;
        let mut bytes = Vec::new();
        for n in [shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim, config.block] {
            bytes.extend(length(n)?.to_le_bytes());
        }
        let Windows { sink, recent } = config.windows;
        for n in [window(sink), window(recent), self.tokens as u64, self.packed as u64] {
            bytes.extend(n.to_le_bytes());
        }
        bytes.push(format_code(LeanFormat::Plain(config.dtype)));
        for (layer, head) in shape.all_kv_heads() {
            let format = config.format(layer, head);
            bytes.extend([format_code(format.k), format_code(format.v)]);
        }
        for (layer, head) in shape.all_kv_heads() {
            bytes.extend(mask_bytes(config.mask.head(layer, head)));
        }
        let model = model(config);
        if model.len() > MAX_MODEL_BYTES {
            let why =
                format!("its description takes {} bytes, more than {MAX_MODEL_BYTES}", model.len());
            return Err(Error::invalid("fingerprint of a model", why));
        }
        bytes.extend(length(model.len())?.to_le_bytes());
        bytes.extend(model.as_bytes());
        Ok(bytes)
    }

    /// Reads a header and compares it with the configuration of the cache that it is read for.
    pub(super) fn read(config: &CacheConfig, input: &mut In<'_>) -> Result<Self> {
        let mut start = [0; 16];
        input.fill(&mut start, "its first 16 bytes")?;
        let mut start = Fields(&start);
        if start.array()? != MAGIC {
            return Err(bad("its first bytes are not those of a saved sequence; give one"));
        }
        let version = start.u32()?;
        if !(1..=VERSION).contains(&version) {
            return Err(bad(format!(
                "it is of version {version}, this leank reads versions 1 to {VERSION}; save the \
                 sequence again with this one"
            )));
        }
        let length = start.u32()?;
        if length > MAX_HEADER_BYTES {
            return Err(bad(format!(
                "its header claims {length} bytes, more than {MAX_HEADER_BYTES}: it is damaged"
            )));
        }
        let fields = input.take(length.into(), "its header")?;
        input.check("its header")?;
        let header = Self::parse(config, Fields(&fields))?;
        // Its formats are those of the cache.
        if version < self::version(config) {
            return Err(bad(format!("version {version} has no codes, and it says that it has")));
        }
        Ok(header)
    }

    fn parse(config: &CacheConfig, mut fields: Fields<'_>) -> Result<Self> {
        let shape = ModelShape {
            layers: fields.u32()? as usize,
            query_heads: fields.u32()? as usize,
            kv_heads: fields.u32()? as usize,
            head_dim: fields.u32()? as usize,
        };
        // The lengths of what follows depend on it.
        same("shape of a saved sequence", config.shape, shape)?;
        same("block size of a saved sequence", config.block, fields.u32()? as usize)?;
        let Windows { sink, recent } = config.windows;
        same("sink window of a saved sequence", window(sink), fields.u64()?)?;
        same("recent window of a saved sequence", window(recent), fields.u64()?)?;
        let (tokens, packed) = (fields.u64()?, fields.u64()?);
        let dtype = fields.u8()?;
        let full = LeanFormat::Plain(config.dtype).to_string();
        same("element type of a saved sequence", full, named(dtype))?;
        for (layer, head) in shape.all_kv_heads() {
            let format = config.format(layer, head);
            for format in [format.k, format.v] {
                same("lean format of a saved sequence", format.to_string(), named(fields.u8()?))?;
            }
        }
        fields.masks(config)?;
        let length = fields.u32()? as usize;
        if length > MAX_MODEL_BYTES {
            return Err(bad(format!("a model's description of {length} bytes")));
        }
        let model = String::from_utf8_lossy(fields.bytes(length)?);
        let expected = self::model(config);
        if !model.is_empty() && !expected.is_empty() {
            same("model of a saved sequence", expected.as_str(), &model)?;
        }
        if !fields.0.is_empty() {
            return Err(bad(format!("its header is {} bytes too long", fields.0.len())));
        }
        if tokens > MAX_TOKENS as u64 || packed > tokens.max(sink.div_ceil(config.block) as u64) {
            return Err(bad(format!("{tokens} tokens with lean blocks up to {packed} cannot be")));
        }
        Ok(Self { tokens: tokens as usize, packed: packed as usize })
    }
}

fn length(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::invalid("length in a saved sequence", n))
}

/// A window that is as long as numbers go is the same on machines of any word size.
fn window(tokens: usize) -> u64 {
    if tokens == usize::MAX { u64::MAX } else { tokens as u64 }
}

/// The oldest version that can say what a cache stores.
fn version(config: &CacheConfig) -> u32 {
    let plain = |format| matches!(format, LeanFormat::Plain(_));
    let all_plain = config.shape.all_kv_heads().all(|(layer, head)| {
        let format = config.format(layer, head);
        plain(format.k) && plain(format.v)
    });
    if all_plain { PLAIN_VERSION } else { VERSION }
}

fn format_code(format: LeanFormat) -> u8 {
    match format {
        LeanFormat::Plain(Dtype::F32) => 0,
        LeanFormat::Plain(Dtype::F16) => 1,
        LeanFormat::Plain(Dtype::Bf16) => 2,
        LeanFormat::Int8 => 3,
        LeanFormat::Int4 => 4,
        LeanFormat::Fp8 => 5,
    }
}

fn named(code: u8) -> String {
    let known = LeanFormat::ALL.into_iter().find(|&format| format_code(format) == code);
    known.map_or_else(|| format!("an unknown format ({code})"), |format| format.to_string())
}

/// One bit per channel, bit `c % 8` of byte `c / 8`; 1 is kept.
fn mask_bytes(mask: &ChannelMask) -> Vec<u8> {
    let mut bytes = vec![0; mask.head_dim().div_ceil(8)];
    for &channel in mask.kept() {
        bytes[usize::from(channel / 8)] |= 1 << (channel % 8);
    }
    bytes
}

/// What the cache's mask says of the model; empty where it says nothing.
fn model(config: &CacheConfig) -> String {
    let Some(model) = &config.mask.info().fingerprint else { return String::new() };
    let scaling = model.rope_scaling.as_deref().unwrap_or("none");
    format!(
        "{}, RoPE base {}, scaling {scaling}, configuration {}",
        model.architecture, model.rope_base, model.config_hash
    )
}

fn same<T: PartialEq + ToString>(what: &'static str, expected: T, found: T) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::mismatch(what, expected, found))
}

/// What is left of a header.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let (bytes, rest) =
            self.0.split_at_checked(length).ok_or_else(|| bad("its header is too short"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn masks(&mut self, config: &CacheConfig) -> Result<()> {
        for (layer, head) in config.shape.all_kv_heads() {
            let mask = config.mask.head(layer, head);
            let expected = mask_bytes(mask);
            let found = self.bytes(expected.len())?;
            if found != expected {
                let kept: u32 = found.iter().map(|byte| byte.count_ones()).sum();
                let what = "mask of a saved sequence";
                let of = format!("layer {layer}, KV head {head}");
                let expected = format!("the cache's {} kept channels of {of}", mask.kept_count());
                return Err(Error::mismatch(what, expected, format!("{kept} others there")));
            }
        }
        Ok(())
    }
}
