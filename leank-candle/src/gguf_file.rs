//! Reads GGUF headers and tensor bytes, without trusting a number in them.
//!
//! candle has a reader too; it divides by the file's alignment and multiplies its dimensions
//! unchecked, and a damaged file must be an error here, never a panic.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use leank_core::files::open_regular;

use crate::{Error, Result};

/// Largest nesting of arrays; no writer nests them at all.
const MAX_DEPTH: usize = 4;

/// Most elements of all arrays together, ten times what the largest vocabularies have: an element of one
/// byte takes 32 in memory.
const MAX_ELEMENTS: usize = 1 << 24;

/// Longest text of the metadata; templates of conversations take some ten thousand bytes.
const MAX_TEXT_BYTES: usize = 1 << 24;

/// A metadata value; integers and floats of all widths as the widest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

impl Value {
    /// A number that is not negative.
    pub(crate) fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(n) => Some(*n),
            Self::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub(crate) fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            Self::Unsigned(n) => Some(*n as f64),
            Self::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// For messages: never a whole vocabulary.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Array(items) => format!("an array of {}", items.len()),
            Self::Text(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
            other => format!("{other:?}"),
        }
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(crate) struct TensorEntry {
    /// Rows first.
    pub(crate) dims: Vec<usize>,
    /// GGML's number of the type.
    pub(crate) kind: u32,
    offset: u64,
}

/// An open GGUF file.
pub(crate) struct GgufFile {
    pub(crate) path: PathBuf,
    pub(crate) metadata: HashMap<String, Value>,
    pub(crate) tensors: HashMap<String, TensorEntry>,
    file: File,
    len: u64,
    data_start: u64,
}

impl GgufFile {
    /// Opens a file and reads its header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let file = open_regular(path).map_err(io("opening"))?;
        let len = file.metadata().map_err(io("reading the length"))?.len();
        let mut header = Header { path, reader: BufReader::new(file), at: 0, len, elements: 0 };
        let (metadata, tensors) = header.read_all()?;
        let alignment = match metadata.get("general.alignment").map(Value::as_u64) {
            None => 32,
            Some(Some(n)) if n > 0 && n <= 1 << 20 => n,
            Some(_) => return Err(header.damaged("general.alignment is not in 1..=1048576")),
        };
        let data_start = header.at.next_multiple_of(alignment);
        let file = header.reader.into_inner();
        let file = Self { path: path.to_owned(), metadata, tensors, file, len, data_start };
        file.check_places()?;
        Ok(file)
    }

    /// Refuses tensors that share bytes: no writer makes them, and a small file could stand for many
    /// times its size. Tensors of types that are not known here are no part of any model.
    fn check_places(&self) -> Result<()> {
        // In the order of the file: which one is told of does not change from run to run.
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|&(name, entry)| (entry.offset, name));
        let mut places = Vec::with_capacity(tensors.len());
        for (name, entry) in tensors {
            if let Ok(kind) = self.kind(name, entry) {
                let (start, bytes) = self.place(name, entry, kind)?;
                places.push((start, start + bytes, name));
            }
        }
        match places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => {
                let (one, other) = (pair[0].2, pair[1].2);
                Err(self.damaged(format!("the tensors {one} and {other} overlap")))
            }
            None => Ok(()),
        }
    }

    fn damaged(&self, why: String) -> Error {
        Error::Damaged { path: self.path.clone(), format: "GGUF", why }
    }

    /// The bytes of a tensor, in 8-byte aligned memory (blocks hold f16 scales that are read in
    /// place).
    pub(crate) fn bytes(&self, name: &str, entry: &TensorEntry) -> Result<AlignedBytes> {
        let (start, bytes) = self.place(name, entry, self.kind(name, entry)?)?;
        let io = |source| Error::Io { path: self.path.clone(), action: "reading a tensor", source };
        let too_large = || {
            let why = format!("memory is too small for the {bytes} bytes of {name}");
            io(std::io::Error::new(std::io::ErrorKind::OutOfMemory, why))
        };
        let mut memory = AlignedBytes::new(bytes as usize).ok_or_else(too_large)?;
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start)).map_err(io)?;
        file.read_exact(memory.as_mut()).map_err(io)?;
        Ok(memory)
    }

    /// Where the bytes of a tensor begin, and their number: they lie within the file.
    fn place(&self, name: &str, entry: &TensorEntry, kind: GgmlDType) -> Result<(u64, u64)> {
        let elements = entry.dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let columns = entry.dims.last().copied().unwrap_or(0);
        let Some(elements) = elements.filter(|_| columns.is_multiple_of(kind.block_size())) else {
            return Err(
                self.damaged(format!("tensor {name} has the impossible shape {:?}", entry.dims))
            );
        };
        let bytes = (elements / kind.block_size() as u64).checked_mul(kind.type_size() as u64);
        let start = self.data_start.checked_add(entry.offset);
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        let (Some(start), Some(bytes), Some(end)) = (start, bytes, end) else {
            return Err(self.damaged(format!("tensor {name} lies beyond any file")));
        };
        if end > self.len {
            let why = format!(
                "tensor {name} ends at byte {end}, the file has {}: it was cut short",
                self.len
            );
            return Err(self.damaged(why));
        }
        Ok((start, bytes))
    }

    /// The type of a tensor.
    pub(crate) fn kind(&self, name: &str, entry: &TensorEntry) -> Result<GgmlDType> {
        Ok(match entry.kind {
            0 => GgmlDType::F32,
            1 => GgmlDType::F16,
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            30 => GgmlDType::BF16,
            other => {
                return Err(Error::Unsupported {
                    path: self.path.clone(),
                    what: "tensor type",
                    found: format!("{other} of {name}"),
                    supported: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K",
                });
            }
        })
    }

    /// A metadata value that must be there.
    pub(crate) fn required<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        self.optional(key, expected, get)?
            .ok_or_else(|| self.wrong(key, expected, "nothing".into()))
    }

    /// A metadata value that may be missing but must not be wrong.
    pub(crate) fn optional<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| self.wrong(key, expected, value.describe()))
    }

    fn wrong(&self, key: &str, expected: &str, found: String) -> Error {
        Error::Config {
            path: self.path.clone(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found,
        }
    }
}

/// Bytes in memory aligned to 8.
pub(crate) struct AlignedBytes {
    words: Box<[u64]>,
    len: usize,
}

impl AlignedBytes {
    /// None where memory is too small: the length is a file's, which may be sparse.
    pub(crate) fn new(len: usize) -> Option<Self> {
        let words = bytemuck::allocation::try_zeroed_slice_box(len.div_ceil(8)).ok()?;
        Some(Self { words, len })
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

impl AsMut<[u8]> for AlignedBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// A header being read.
struct Header<'a, R> {
    path: &'a Path,
    reader: R,
    at: u64,
    len: u64,
    /// Of the arrays so far.
    elements: usize,
}

type Contents = (HashMap<String, Value>, HashMap<String, TensorEntry>);

impl<R: Read> Header<'_, R> {
    fn damaged(&self, why: impl Into<String>) -> Error {
        Error::Damaged { path: self.path.to_owned(), format: "GGUF", why: why.into() }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        if self.len - self.at < N as u64 {
            return Err(
                self.damaged(format!("the file ends within its header, at byte {}", self.len))
            );
        }
        self.reader.read_exact(&mut bytes).map_err(|source| Error::Io {
            path: self.path.to_owned(),
            action: "reading the header",
            source,
        })?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things of at least `size` bytes each: never more than the file has room for.
    fn count(&mut self, what: &str, size: u64) -> Result<usize> {
        let n = self.u64()?;
        let room = (self.len - self.at) / size;
        if n > room {
            return Err(self.damaged(format!(
                "it announces {n} {what}, the rest of the file holds {room} at most"
            )));
        }
        Ok(n as usize)
    }

    fn text(&mut self) -> Result<String> {
        let n = self.count("bytes of text", 1)?;
        if n > MAX_TEXT_BYTES {
            return Err(self.damaged(format!("a text of {n} bytes, more than {MAX_TEXT_BYTES}")));
        }
        let mut bytes = vec![0; n];
        self.reader.read_exact(&mut bytes).map_err(|source| Error::Io {
            path: self.path.to_owned(),
            action: "reading the header",
            source,
        })?;
        self.at += n as u64;
        // Vocabularies of some files hold broken UTF-8; a byte-level vocabulary never does.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_DEPTH => {
                let kind = self.u32()?;
                let size = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    _ => 8,
                };
                let n = self.count("array elements", size)?;
                self.elements = self.elements.saturating_add(n);
                if self.elements > MAX_ELEMENTS {
                    let why = format!("its arrays have more than {MAX_ELEMENTS} elements");
                    return Err(self.damaged(why));
                }
                // Grows as it reads: an element in memory is larger than in the file.
                let mut items = Vec::new();
                for _ in 0..n {
                    items.push(self.value(kind, depth + 1)?);
                }
                Value::Array(items)
            }
            9 => return Err(self.damaged("arrays are nested too deep")),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.damaged(format!("{other} is not a type of metadata"))),
        })
    }

    fn read_all(&mut self) -> Result<Contents> {
        let start = self.len.min(4) as usize;
        let mut magic = [0; 4];
        self.reader.read_exact(&mut magic[..start]).map_err(|source| Error::Io {
            path: self.path.to_owned(),
            action: "reading",
            source,
        })?;
        self.at = start as u64;
        if &magic != b"GGUF" {
            let found = match start {
                0 => "nothing (it is empty)".to_owned(),
                n => format!("{:?}", String::from_utf8_lossy(&magic[..n])),
            };
            return Err(Error::NotGguf { path: self.path.to_owned(), found });
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::Unsupported {
                path: self.path.to_owned(),
                what: "GGUF version",
                found: version.to_string(),
                supported: "versions 2 and 3, little-endian",
            });
        }
        let tensor_count = self.count("tensors", 24)?;
        let value_count = self.count("metadata entries", 13)?;
        let mut metadata = HashMap::new();
        for _ in 0..value_count {
            let key = self.text()?;
            let kind = self.u32()?;
            let value = self.value(kind, 0)?;
            // Programs would disagree about which of two counts.
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.damaged(format!("it says {key} twice")));
            }
        }
        let mut tensors = HashMap::new();
        for _ in 0..tensor_count {
            let name = self.text()?;
            let entry = self.tensor_entry()?;
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(self.damaged(format!("it has the tensor {name} twice")));
            }
        }
        Ok((metadata, tensors))
    }

    fn tensor_entry(&mut self) -> Result<TensorEntry> {
        let rank = self.u32()?;
        if rank == 0 || rank > 4 {
            return Err(self.damaged(format!("a tensor has {rank} dimensions")));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            let dim = self.u64()?;
            let dim = usize::try_from(dim)
                .map_err(|_| self.damaged(format!("a tensor has a dimension of {dim}")))?;
            dims.push(dim);
        }
        dims.reverse();
        Ok(TensorEntry { dims, kind: self.u32()?, offset: self.u64()? })
    }
}
