//! NumPy arrays of 0 and 1, `[layers, kv_heads, head_dim]`.
//!
//! Reads `bool`, signed and unsigned integers, `float32` and `float64`, of either byte order, in C
//! and in Fortran order. Writes `bool` in C order, since that is what NumPy indexes with:
//! `k[..., mask[layer, head]]` are the kept channels. LeanK's loader in MInference wants the
//! `.pth` instead, or `torch.from_numpy(mask).float()`.

use std::path::Path;

use npyz::{NpyFile, Order, TypeChar, WriterBuilder};

use super::{Format, Source, source::Axes};
use crate::{Error, ModelMask, Result};

/// Largest header. NumPy's own of such an array is 128 bytes.
const MAX_HEADER_BYTES: usize = 4 << 10;
/// Most digits of a size in the header; three such sizes cannot overflow a `u64` together.
const MAX_SIZE_DIGITS: usize = 6;

/// Parses the bytes of an `.npy` file; `name` is for messages. The mask carries no information
/// about its model.
///
/// # Errors
/// [`Error::Format`].
pub fn from_bytes(bytes: &[u8], name: &Path) -> Result<ModelMask> {
    let source = Source { path: name, format: Format::Npy };
    let header_end = check_header(bytes, source)?;
    // A slice reader: after the header it holds the data.
    let file = NpyFile::new(bytes).map_err(|error| source.bad(error))?;
    let axes = source.axes(file.shape())?;
    let npyz::DType::Plain(dtype) = file.dtype() else {
        return Err(source.bad("it holds records, not numbers"));
    };
    let (kind, item_bytes) = (dtype.type_char(), dtype.size_field());
    let expected = axes.channels() as u64 * item_bytes;
    let found = (bytes.len() - header_end) as u64;
    if expected != found {
        return Err(source.bad(format!(
            "its shape {:?} of type {dtype} takes {expected} bytes, and {found} follow the header; \
             is the file whole?",
            file.shape()
        )));
    }
    match (kind, item_bytes) {
        (TypeChar::Bool, _) => read::<bool>(file, &axes, source, |v| f64::from(u8::from(v))),
        (TypeChar::Uint, 1) => read::<u8>(file, &axes, source, f64::from),
        (TypeChar::Uint, 2) => read::<u16>(file, &axes, source, f64::from),
        (TypeChar::Uint, 4) => read::<u32>(file, &axes, source, f64::from),
        (TypeChar::Uint, 8) => read::<u64>(file, &axes, source, |v| v as f64),
        (TypeChar::Int, 1) => read::<i8>(file, &axes, source, f64::from),
        (TypeChar::Int, 2) => read::<i16>(file, &axes, source, f64::from),
        (TypeChar::Int, 4) => read::<i32>(file, &axes, source, f64::from),
        (TypeChar::Int, 8) => read::<i64>(file, &axes, source, |v| v as f64),
        (TypeChar::Float, 4) => read::<f32>(file, &axes, source, f64::from),
        (TypeChar::Float, 8) => read::<f64>(file, &axes, source, |v| v),
        _ => Err(source.bad(format!(
            "type {dtype} is not read; save it as bool: numpy.save(path, mask.astype(bool))"
        ))),
    }
}

/// The bytes of an `.npy` file: `bool`, C order. What the mask says about itself is not in it.
///
/// # Errors
/// [`Error::Invalid`] where a head asks for fewer than 16 bits.
pub fn to_bytes(mask: &ModelMask) -> Result<Vec<u8>> {
    super::check_no_precisions(mask, super::Format::Npy)?;
    let shape = [mask.layers(), mask.kv_heads(), mask.head_dim()].map(|n| n as u64);
    let flags = mask.heads().iter().flat_map(|head| head.flags());
    let mut bytes = Vec::new();
    let write = |bytes: &mut Vec<u8>| {
        let options = npyz::WriteOptions::<bool>::new().default_dtype().shape(&shape);
        let mut writer = options.writer(bytes).begin_nd()?;
        writer.extend(flags)?;
        writer.finish()
    };
    write(&mut bytes).map_err(|error| Error::invalid("mask", error))?;
    Ok(bytes)
}

fn read<T: npyz::Deserialize>(
    file: NpyFile<&[u8]>,
    axes: &Axes,
    source: Source<'_>,
    to_f64: fn(T) -> f64,
) -> Result<ModelMask> {
    let order = file.order();
    let values = file.data::<T>().map_err(|error| source.bad(error))?;
    let mut flags = vec![false; axes.channels()];
    for (stored, value) in values.enumerate() {
        let value = value.map_err(|error| source.bad(error))?;
        let at = match order {
            Order::C => stored,
            // The first axis runs fastest.
            Order::Fortran => {
                let (layer, rest) = (stored % axes.layers, stored / axes.layers);
                let (head, channel) = (rest % axes.kv_heads, rest / axes.kv_heads);
                (layer * axes.kv_heads + head) * axes.head_dim + channel
            }
        };
        flags[at] = source.flag(to_f64(value), at, axes)?;
    }
    source.mask(axes, &flags)
}

/// Checks that the header is short and of the one form that NumPy writes for a plain array, and
/// returns where it ends.
///
/// `npyz` parses the header as a Python literal by recursive descent, and multiplies sizes as they
/// come: deep nesting and huge sizes must not reach it.
fn check_header(bytes: &[u8], source: Source<'_>) -> Result<usize> {
    let truncated = || source.bad("it ends within the header; is the file whole?");
    let Some(([b'\x93', b'N', b'U', b'M', b'P', b'Y', major, _], rest)) =
        bytes.split_first_chunk::<8>()
    else {
        return Err(source.bad("it does not begin as an .npy file does"));
    };
    let (start, length) = match major {
        1 => {
            let length = rest.first_chunk::<2>().ok_or_else(truncated)?;
            (10, usize::from(u16::from_le_bytes(*length)))
        }
        2 | 3 => {
            let length = rest.first_chunk::<4>().ok_or_else(truncated)?;
            (12, u32::from_le_bytes(*length) as usize)
        }
        _ => return Err(source.bad(format!("version {major} is not known; versions 1 to 3 are"))),
    };
    if length > MAX_HEADER_BYTES {
        return Err(
            source.bad(format!("its header claims {length} bytes, more than {MAX_HEADER_BYTES}"))
        );
    }
    let header = bytes.get(start..start + length).ok_or_else(truncated)?;
    check_literal(header).map_err(|why| source.bad(why))?;
    Ok(start + length)
}

/// A dictionary of quoted words, `True`/`False`, and one tuple of at most three short integers.
fn check_literal(header: &[u8]) -> std::result::Result<(), String> {
    let (mut quote, mut depth, mut sizes, mut digits) = (None, 0_u32, 0_usize, 0_usize);
    for &byte in header {
        if let Some(open) = quote {
            if byte == open {
                quote = None;
            } else if !(byte.is_ascii_alphanumeric() || b"_<>|=".contains(&byte)) {
                return Err(format!("unexpected byte {byte:#04x} in a word of its header"));
            }
            continue;
        }
        digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
        sizes += usize::from(digits == 1);
        match byte {
            b'\'' | b'"' => quote = Some(byte),
            b'{' | b'(' => depth += 1,
            b'}' | b')' => depth = depth.saturating_sub(1),
            b' ' | b'\n' | b',' | b':' => {}
            b'0'..=b'9' if digits <= MAX_SIZE_DIGITS => {}
            b'0'..=b'9' => return Err("a size in its header is not that of a mask".into()),
            byte if byte.is_ascii_alphabetic() => {}
            _ => return Err(format!("its header is not that of a plain array ({byte:#04x})")),
        }
        if depth > 2 || sizes > 3 {
            return Err("its header is not that of an array with three axes \
                        [layers, kv_heads, head_dim]"
                .into());
        }
    }
    Ok(())
}
