//! Mask files: our own format, and those of the projects around.
//!
//! | extension | holds | read | written |
//! |---|---|---|---|
//! | `.safetensors` ([`native`]) | the mask, its scores and its [`MaskInfo`](crate::MaskInfo) | yes | yes |
//! | `.pth`, `.pt` ([`pth`]) | LeanK's masks: one `torch.save`d tensor of 0 and 1 | yes | yes |
//! | `.npy` ([`npy`]) | a NumPy array of 0 and 1 | yes | yes |
//! | `.tsv`, `.txt` ([`tsv`]) | LeanK's *scaling factors*, which [`ScalingFactors`] turns into a mask | yes | no |
//!
//! Only the native file keeps what a mask needs to be used safely (which model it belongs to, the
//! windows it was learned for). The others are bare numbers: convert them once and keep the native
//! one. They need the cargo feature `interop`.
//!
//! ```
//! use leank_core::files::{ReadOptions, read_mask, write_mask};
//! use leank_core::{ModelMask, ModelShape};
//!
//! # let dir = tempfile::tempdir()?;
//! let path = dir.path().join("mask.safetensors");
//! let mask = ModelMask::dense(&ModelShape::new(30, 9, 3, 64)?);
//! write_mask(&path, &mask)?;
//! assert_eq!(read_mask(&path, &ReadOptions::default())?, mask);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Files from strangers
//! Masks are passed around, so each reader takes its input for hostile: the file's size is capped
//! before it is read ([`MAX_FILE_BYTES`]), every size in it is checked against the bytes that are
//! there before anything is allocated, and no code in it is ever run, which a `.pth` invites to.
//! What does not fit is an [`Error::Format`] that names the file and the mend. Each reader has a
//! fuzz target.
//!
//! # Writing
//! A file is written beside its target and renamed over it, so that a reader sees the old or the
//! new one, never a half, and a full disk costs nothing. Equal masks give equal bytes. What a killed
//! process leaves beside the target, [`remove_leftovers`] finds.

mod io;
mod names;
pub mod native;
#[cfg(feature = "interop")]
pub mod npy;
#[cfg(feature = "interop")]
pub mod pth;
mod source;
#[cfg(feature = "interop")]
pub mod tsv;

use std::{
    fmt::{self, Write as _},
    io::{ErrorKind, Read as _},
    path::Path,
};

use sha2::{Digest, Sha256};

pub use io::{
    MAX_FILE_BYTES, Staged, abandoned, mark_in_use, open_regular, read_regular, remove_leftovers,
    write_atomic,
};
pub use names::name_twice;
use source::Source;

use crate::{Error, ModelMask, ModelShape, Result};

/// The formats of mask files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// safetensors with metadata: `.safetensors`.
    Native,
    /// LeanK's `torch.save`d tensor: `.pth` or `.pt`.
    Pth,
    /// A NumPy array: `.npy`.
    Npy,
    /// Scaling factors as text: `.tsv` or `.txt`.
    Tsv,
}

impl Format {
    /// The format that a file's extension names.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an extension that none of them has.
    pub fn from_path(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|ext| ext.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "safetensors" => Ok(Self::Native),
            "pth" | "pt" => Ok(Self::Pth),
            "npy" => Ok(Self::Npy),
            "tsv" | "txt" => Ok(Self::Tsv),
            _ => Err(Error::invalid(
                "mask file name",
                format!(
                    "{}: the extension tells the format; use .safetensors, .pth, .pt, .npy, .tsv \
                     or .txt",
                    path.display()
                ),
            )),
        }
    }

    /// The format that a file's first bytes show, where they show one.
    #[must_use]
    pub fn from_content(bytes: &[u8]) -> Option<Self> {
        if bytes.starts_with(b"PK\x03\x04") {
            return Some(Self::Pth);
        }
        if bytes.starts_with(b"\x93NUMPY") {
            return Some(Self::Npy);
        }
        // safetensors: the length of a JSON object, then the object. Before the test for text,
        // since a short length is one printable byte and seven zeros.
        if let Some((length, [b'{', ..])) = bytes.split_first_chunk::<8>()
            && u64::from_le_bytes(*length) <= bytes.len() as u64
        {
            return Some(Self::Native);
        }
        let start = &bytes[..bytes.len().min(1024)];
        let is_text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
        (!start.is_empty() && start.iter().all(is_text)).then_some(Self::Tsv)
    }

    /// What the format is called in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "safetensors mask",
            Self::Pth => "torch.save mask",
            Self::Npy => "NumPy mask",
            Self::Tsv => "scaling factor",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file does not say itself.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// How to make a mask of scaling factors. Needed for `.tsv` only, ignored for the others.
    pub scaling: Option<ScalingFactors>,
}

/// How to make a mask of scaling factors: see [`quantile_and_round`](crate::quantile_and_round).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalingFactors {
    /// Shape of the model; `query_heads` is not used and may equal `kv_heads`.
    pub shape: ModelShape,
    /// Share of all K channels to prune, 0..=1. LeanK: 0.7.
    pub ratio: f64,
    /// Kept counts become multiples of this; it must divide `head_dim`. LeanK: 32.
    pub alignment: usize,
}

/// Reads a mask; the extension tells the format, and the content must be of it.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read; [`Error::Format`] when its content is not what the
/// extension says, or is damaged, or larger than [`MAX_FILE_BYTES`]; [`Error::Invalid`] for an
/// unknown extension and for a `.tsv` without [`ReadOptions::scaling`]; [`Error::Unavailable`]
/// when the build lacks the feature `interop`.
pub fn read_mask(path: &Path, options: &ReadOptions) -> Result<ModelMask> {
    let source = Source { path, format: Format::from_path(path)? };
    let bytes = io::read_capped(source)?;
    source.expect_content(&bytes)?;
    parse(&bytes, source, options)
}

/// Writes a mask in the format that the extension tells, all or nothing.
///
/// A symbolic link at `path` is replaced, its target left alone.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written; [`Error::Invalid`] for an extension that is
/// unknown or read only, and as [`to_bytes`]; [`Error::Unavailable`] when the build lacks the
/// feature `interop`.
pub fn write_mask(path: &Path, mask: &ModelMask) -> Result<()> {
    let format = Format::from_path(path)?;
    write_atomic(path, &to_bytes(mask, format)?)
}

/// Refuses a mask that a file of bare flags would forget the half of.
#[cfg(feature = "interop")]
fn check_no_precisions(mask: &ModelMask, format: Format) -> Result<()> {
    let Some(precisions) = mask.precisions() else { return Ok(()) };
    let coded = precisions.iter().filter(|&&head| head != Default::default()).count();
    Err(Error::invalid(
        "mask format",
        format!(
            "a {format} file cannot say that {coded} of {} heads ask for 8 or 4 bits in lean blocks; \
             write .safetensors",
            precisions.len()
        ),
    ))
}

/// The bytes of a mask's file in `format`.
///
/// # Errors
/// [`Error::Invalid`] for [`Format::Tsv`], which is only read, for metadata that cannot be written,
/// and for formats other than [`Format::Native`] where a head asks for fewer than 16 bits, which
/// they cannot say; [`Error::Unavailable`] when the build lacks the feature `interop`.
pub fn to_bytes(mask: &ModelMask, format: Format) -> Result<Vec<u8>> {
    match format {
        Format::Native => native::to_bytes(mask),
        #[cfg(feature = "interop")]
        Format::Pth => pth::to_bytes(mask),
        #[cfg(feature = "interop")]
        Format::Npy => npy::to_bytes(mask),
        Format::Tsv => Err(Error::invalid(
            "mask format",
            ".tsv holds scaling factors, which a mask is not; write .safetensors, .npy or .pth",
        )),
        #[cfg(not(feature = "interop"))]
        Format::Pth | Format::Npy => Err(without_interop(format)),
    }
}

fn parse(bytes: &[u8], source: Source<'_>, options: &ReadOptions) -> Result<ModelMask> {
    #[cfg(not(feature = "interop"))]
    let _ = options;
    match source.format {
        Format::Native => native::from_bytes(bytes, source.path),
        #[cfg(feature = "interop")]
        Format::Pth => pth::from_bytes(bytes, source.path),
        #[cfg(feature = "interop")]
        Format::Npy => npy::from_bytes(bytes, source.path),
        #[cfg(feature = "interop")]
        Format::Tsv => {
            let scaling = options.scaling.as_ref().ok_or_else(|| {
                Error::invalid(
                    "mask file",
                    format!(
                        "{}: scaling factors become a mask only with the model's shape, a ratio \
                         and an alignment; convert it first, or give them",
                        source.path.display()
                    ),
                )
            })?;
            tsv::from_bytes(bytes, source.path, scaling)
        }
        #[cfg(not(feature = "interop"))]
        format => Err(without_interop(format)),
    }
}

#[cfg(not(feature = "interop"))]
fn without_interop(format: Format) -> Error {
    let why = "leank-core was built without the feature `interop`".to_owned();
    Error::Unavailable { what: format.name(), why }
}

/// SHA-256 of `bytes`, 64 lower-case hexadecimal digits: how fingerprints and file identities are
/// written.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a regular file in hexadecimal, read piece by piece.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_of_file(path: &Path) -> Result<String> {
    let io = |action| move |source| Error::Io { path: path.into(), action, source };
    let mut file = open_regular(path).map_err(io("opening"))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&buffer[..n]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(io("reading")(error)),
        }
    }
}

fn hex(digest: &[u8]) -> String {
    let mut hex = String::with_capacity(2 * digest.len());
    for byte in digest {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_the_standards() {
        // The example of FIPS 180-2, appendix B.1.
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn files_hash_as_their_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(sha256_of_file(&path).unwrap(), sha256_hex(&bytes));
        assert!(matches!(sha256_of_file(folder.path()), Err(Error::Io { .. })));
    }

    #[test]
    fn content_tells_formats_apart() {
        let content = Format::from_content;
        assert_eq!(content(b"PK\x03\x04...."), Some(Format::Pth));
        assert_eq!(content(b"\x93NUMPY\x01\x00"), Some(Format::Npy));
        assert_eq!(content(b"\x20\0\0\0\0\0\0\0{"), None, "longer than the file");
        assert_eq!(content(b"\x01\0\0\0\0\0\0\0{"), Some(Format::Native));
        assert_eq!(content(b"0.5\t1.0\n"), Some(Format::Tsv));
        assert_eq!(content(b"\x80\x02"), None);
        assert_eq!(content(b""), None);
    }
}
