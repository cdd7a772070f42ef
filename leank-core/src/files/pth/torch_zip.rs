//! The zip archive around a saved tensor.

use std::io::{Cursor, Read, Write};

use zip::{
    CompressionMethod, DateTime, ZipArchive, ZipWriter, result::ZipResult, write::SimpleFileOptions,
};

use super::{
    Source,
    pickle::{MAX_PICKLE_BYTES, TensorSpec},
};
use crate::{Error, Result};

/// Most entries of an archive; `torch.save` writes five to eight for one tensor.
const MAX_ENTRIES: u64 = 64;
/// Where PyTorch aligns the elements, so that they can be memory-mapped.
const DATA_ALIGNMENT: u16 = 64;

/// An opened archive whose directory was checked.
pub(super) struct Archive<'a> {
    source: Source<'a>,
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// Folder of the entries, with its slash.
    root: String,
}

impl<'a> Archive<'a> {
    pub(super) fn open(bytes: &'a [u8], source: Source<'a>) -> Result<Self> {
        check_directory_end(bytes, source)?;
        let mut zip = ZipArchive::new(Cursor::new(bytes))
            .map_err(|error| source.bad(format!("{error}; is the file whole?")))?;
        // Overlapping or hidden entries, and headers that contradict the directory.
        zip.validate_header_consistency().map_err(|error| source.bad(error))?;
        let mut roots = Vec::new();
        for index in 0..zip.len() {
            let entry = zip.by_index_raw(index).map_err(|error| source.bad(error))?;
            let name = entry.name().map_err(|error| source.bad(error))?;
            if let Some(root) = name.strip_suffix("data.pkl")
                && root.strip_suffix('/').is_some_and(|folder| !folder.contains('/'))
            {
                roots.push(root.to_owned());
            }
        }
        match <[String; 1]>::try_from(roots) {
            Ok([root]) => Ok(Self { source, zip, root }),
            Err(_) => Err(source.bad("it is a zip archive, but has no entry `*/data.pkl`")),
        }
    }

    /// The pickle, once it is clear that the elements are little-endian.
    pub(super) fn pickle(&mut self) -> Result<Vec<u8>> {
        if let Some(order) = self.entry("byteorder", 16)? {
            match order.trim_ascii() {
                b"little" => {}
                b"big" => {
                    return Err(self.source.bad(
                        "it was saved on a big-endian machine (entry `byteorder`); load it with \
                         PyTorch on a little-endian one and save it again",
                    ));
                }
                _ => return Err(self.source.bad("its entry `byteorder` is not little or big")),
            }
        }
        self.required("data.pkl", MAX_PICKLE_BYTES as u64)
    }

    /// The elements of a tensor's storage: exactly as many as the pickle says.
    pub(super) fn storage(&mut self, tensor: &TensorSpec) -> Result<Vec<u8>> {
        let key = &tensor.key;
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(self.source.bad("the name of its storage is not a number"));
        }
        let bytes = tensor.elements.checked_mul(tensor.element.size() as u64);
        let data = self.required(&format!("data/{key}"), u64::MAX)?;
        if bytes != Some(data.len() as u64) {
            return Err(self.source.bad(format!(
                "its storage of {} elements of {} bytes is {} bytes long",
                tensor.elements,
                tensor.element.size(),
                data.len()
            )));
        }
        Ok(data)
    }

    fn required(&mut self, name: &str, max_bytes: u64) -> Result<Vec<u8>> {
        let entry = self.entry(name, max_bytes)?;
        entry.ok_or_else(|| {
            self.source.bad(format!("it lacks the entry `{}{name}`; is it whole?", self.root))
        })
    }

    /// The content of an entry of at most `max_bytes`, its checksum verified.
    fn entry(&mut self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        let (source, path) = (self.source, format!("{}{name}", self.root));
        let Some(index) = self.zip.index_for_name(&path) else { return Ok(None) };
        let bad = |why: String| source.bad(format!("entry `{path}`: {why}"));
        let entry = self.zip.by_index_raw(index).map_err(|error| bad(error.to_string()))?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(bad("it is compressed or encrypted, which torch.save does not do".into()));
        }
        let size = entry.size();
        // A stored entry's bytes lie in the file, of which the directory check made sure; so
        // nothing larger than the file is ever allocated.
        if size != entry.compressed_size() {
            return Err(bad(format!("its size {size} is not that of the bytes stored")));
        }
        if size > max_bytes {
            return Err(bad(format!("its size {size} is above the {max_bytes} expected")));
        }
        drop(entry);
        let entry = self.zip.by_index(index).map_err(|error| bad(error.to_string()))?;
        let mut content = Vec::new();
        // One byte more, since the checksum is compared at the end of the entry.
        entry
            .take(size.saturating_add(1))
            .read_to_end(&mut content)
            .map_err(|error| bad(error.to_string()))?;
        if content.len() as u64 != size {
            return Err(bad(format!("{} of {size} bytes are there", content.len())));
        }
        Ok(Some(content))
    }
}

/// Checks the records at the archive's end, which say how many entries there are: the `zip` crate
/// reserves memory by them before it looks at an entry.
///
/// One record is expected, with its zip64 twin (PyTorch always writes it). More could mean that
/// programs disagree about what the archive holds.
fn check_directory_end(bytes: &[u8], source: Source<'_>) -> Result<()> {
    let damaged = || source.bad("the end of its zip archive is damaged; is the file whole?");
    let field16 = |at: usize| -> Option<u64> {
        Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?).into())
    };
    let field64 =
        |at: usize| -> Option<u64> { Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?)) };
    let (mut ends, mut ends64) = (0, 0);
    for at in memchr_all(bytes, b"PK") {
        let counts = match bytes.get(at + 2..at + 4) {
            Some([5, 6]) => {
                ends += 1;
                [field16(at + 8), field16(at + 10)]
            }
            Some([6, 6]) => {
                ends64 += 1;
                // A longer record would hold extensions, which are read into memory.
                if field64(at + 4) != Some(44) {
                    return Err(damaged());
                }
                [field64(at + 24), field64(at + 32)]
            }
            _ => continue,
        };
        if let Some(count) = counts.into_iter().flatten().find(|&count| count > MAX_ENTRIES) {
            return Err(source.bad(format!(
                "its zip archive claims {count} entries; torch.save writes a handful for a tensor"
            )));
        }
    }
    if ends != 1 || ends64 > 1 {
        return Err(damaged());
    }
    Ok(())
}

/// Where a two-byte sequence begins.
fn memchr_all<'a>(bytes: &'a [u8], pair: &'a [u8; 2]) -> impl Iterator<Item = usize> + 'a {
    bytes.windows(2).enumerate().filter(move |(_, window)| *window == pair).map(|(at, _)| at)
}

/// An archive as `torch.save` lays it out.
pub(super) fn write(pickle: &[u8], data: &[u8]) -> Result<Vec<u8>> {
    write_entries(pickle, data).map_err(|error| Error::invalid("mask archive", error))
}

fn write_entries(pickle: &[u8], data: &[u8]) -> ZipResult<Vec<u8>> {
    // Fixed time and permissions, so that equal masks give equal files.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        .unix_permissions(0o644);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let aligned = options.with_alignment(DATA_ALIGNMENT);
    for (name, options, content) in [
        ("archive/data.pkl", options, pickle),
        ("archive/byteorder", options, b"little".as_slice()),
        ("archive/data/0", aligned, data),
        ("archive/version", options, b"3\n"),
    ] {
        zip.start_file(name, options)?;
        zip.write_all(content)?;
    }
    Ok(zip.finish()?.into_inner())
}
