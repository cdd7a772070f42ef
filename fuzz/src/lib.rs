//! What the fuzz targets do with their bytes, callable without a fuzzer: `cargo test` runs every
//! seed through its target.
//!
//! Each function panics when something does not hold. Readers must refuse or read, never panic;
//! what they read must survive being written and read again.

mod cache_life;
mod cache_ops;
mod cache_world;
mod folder;
mod kernels;
mod learning;
mod models;
mod saved_sequence;
mod tokenizers;

use std::{
    io::{Cursor, Write},
    path::Path,
};

use leank_core::{
    Error, ModelMask, ModelShape, Result,
    files::{ScalingFactors, native, npy, pth, tsv},
};
use zip::{ZipWriter, write::SimpleFileOptions};

pub use cache_ops::cache_ops;
pub use kernels::kernel;
pub use learning::{dump, manifest, record};
pub use models::{gguf, model_folder};
pub use saved_sequence::saved_sequence;
pub use tokenizers::{SOUND as SOUND_TOKENIZERS, sound as sound_tokenizer, tokenizer};

/// A target takes any bytes.
pub type Target = fn(&[u8]);

/// The targets by name: the names of `fuzz_targets/` and `seeds/`.
pub const TARGETS: [(&str, Target); 13] = [
    ("mask_native", mask_native),
    ("mask_pth", mask_pth),
    ("mask_npy", mask_npy),
    ("mask_tsv", mask_tsv),
    ("gguf", gguf),
    ("model_folder", model_folder),
    ("tokenizer", tokenizer),
    ("manifest", manifest),
    ("dump", dump),
    ("record", record),
    ("kernel", kernel),
    ("cache_ops", cache_ops),
    ("saved_sequence", saved_sequence),
];

fn name() -> &'static Path {
    Path::new("fuzzed bytes")
}

/// An input of two parts: the length of the first in two bytes, both parts.
fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk()?;
    Some(rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len())))
}

/// Two parts as one input.
///
/// # Panics
/// When the first is 64 KiB or longer.
#[must_use]
pub fn join(first: &[u8], second: &[u8]) -> Vec<u8> {
    let length = u16::try_from(first.len()).expect("short");
    [&length.to_le_bytes()[..], first, second].concat()
}

/// Checks that a reader's errors are of its file, and that what it reads survives a round trip.
fn read_twice(
    first: Result<ModelMask>,
    write: fn(&ModelMask) -> Result<Vec<u8>>,
    read: fn(&[u8], &Path) -> Result<ModelMask>,
) {
    match first {
        Ok(mask) => {
            let bytes = write(&mask).expect("what was read can be written");
            assert_eq!(read(&bytes, name()).expect("what was written can be read"), mask);
        }
        Err(error) => assert!(matches!(error, Error::Format { .. }), "{error:?}"),
    }
}

/// A native mask file.
pub fn mask_native(data: &[u8]) {
    read_twice(native::from_bytes(data, name()), native::to_bytes, native::from_bytes);
}

/// A `.pth` as it is; or, where it is no archive, the pickle in a sound archive, which the
/// archive's checksums would otherwise keep a fuzzer from.
pub fn mask_pth(data: &[u8]) {
    let archive;
    let bytes = if data.starts_with(b"PK") {
        data
    } else {
        archive = torch_archive(data, &[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
        &archive
    };
    read_twice(pth::from_bytes(bytes, name()), pth::to_bytes, pth::from_bytes);
}

/// A torch archive of a pickle and a storage of f32.
///
/// # Panics
/// Never: it is written to memory.
pub fn torch_archive(pickle: &[u8], values: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in [("a/data.pkl", pickle), ("a/data/0", &data)] {
        zip.start_file(name, SimpleFileOptions::default()).expect("a new entry");
        zip.write_all(content).expect("memory takes it");
    }
    zip.finish().expect("memory takes it").into_inner()
}

/// An `.npy` file.
pub fn mask_npy(data: &[u8]) {
    read_twice(npy::from_bytes(data, name()), npy::to_bytes, npy::from_bytes);
}

/// Scaling factors: five bytes for the shape, ratio and alignment, then the text.
pub fn mask_tsv(data: &[u8]) {
    let Some((&[layers, kv_heads, head_dim, ratio, alignment], text)) =
        data.split_first_chunk::<5>()
    else {
        return;
    };
    // Zeros and numbers that do not fit are among them on purpose.
    let [layers, kv_heads, head_dim] = [layers % 5, kv_heads % 4, head_dim % 17].map(usize::from);
    let shape = ModelShape { layers, query_heads: kv_heads, kv_heads, head_dim };
    let (ratio, alignment) = (f64::from(ratio) / 250.0, usize::from(alignment % 9));
    match tsv::from_bytes(text, name(), &ScalingFactors { shape, ratio, alignment }) {
        Ok(mask) => {
            assert!(mask.heads().iter().all(|head| head.kept_count().is_multiple_of(alignment)));
            assert_eq!(mask.scores().map(<[f32]>::len), Some(mask.channels()));
            read_twice(Ok(mask), native::to_bytes, native::from_bytes);
        }
        Err(error) => {
            assert!(matches!(error, Error::Format { .. } | Error::Invalid { .. }), "{error:?}")
        }
    }
}
