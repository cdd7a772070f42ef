//! Reading a dump: everything is checked at [`Dump::open`], then read one range at a time.
//!
//! Not mapped: a file that another process shortens, or a disk that fails, is then an error that names the
//! file, where a mapping would end the process with SIGBUS.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use leank_core::{
    KvHead, Layer,
    files::{name_twice, open_regular, read_regular, sha256_hex},
};
use safetensors::tensor::Metadata;

use super::{
    convert,
    layout::{
        LENGTH_BYTES, Layout, MANIFEST_FILE, META_DUMP, META_LAYER, META_SUMS, Tensor, layer_path,
        max_header, safetensors_dtype,
    },
    manifest::Manifest,
    sums,
    writer::TensorAt,
};
use crate::{Error, Result};

/// Largest manifest that is read.
pub(super) const MAX_MANIFEST: u64 = 1 << 28;

/// Bytes that are read and converted at a time: few enough for the stack and the first caches.
const CHUNK: usize = 1 << 15;

/// A dump on disk, validated: its manifest, and the size and header of every layer file.
#[derive(Debug)]
pub struct Dump {
    dir: PathBuf,
    id: String,
    /// SHA-256 of the manifest's file: what layer files are marked with.
    manifest_id: String,
    manifest: Manifest,
    /// Digest of each layer's checksums at [`Dump::open`], where its file has some.
    digests: Vec<Option<String>>,
}

impl Dump {
    /// Opens and validates the dump at `dir`. No activation is read yet.
    ///
    /// # Errors
    /// [`Error::Io`] when a file is missing or unreadable, [`Error::Manifest`],
    /// [`Error::Version`], [`Error::LayerFile`] for a file whose size or header does not fit the
    /// manifest, [`Error::OtherDump`] for a file of another dump or layer.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let json =
            read_regular(&path, MAX_MANIFEST).map_err(Error::io(&path, "opening the dump"))?;
        let manifest = Manifest::from_json(&json, &path)?;
        let (manifest_id, digests) = (sha256_hex(&json), Vec::new());
        let mut dump =
            Self { dir: dir.to_owned(), id: manifest_id.clone(), manifest_id, manifest, digests };
        for layer in dump.manifest.shape.layer_indices() {
            let digest = dump.layer(layer)?.digest();
            dump.digests.push(digest);
        }
        if dump.digests.iter().any(Option::is_some) {
            let digests = dump.digests.iter().map(|own| own.as_deref().unwrap_or_default());
            let all: Vec<&str> = std::iter::once(&dump.manifest_id[..]).chain(digests).collect();
            dump.id = sha256_hex(all.join("\n").as_bytes());
        }
        Ok(dump)
    }

    /// What the dump says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The dump's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Identity of the dump, 64 hexadecimal digits: a SHA-256 of its manifest and of its layers'
    /// checksums; no activation is read for it. In a dump without checksums (they are optional) only
    /// the manifest counts.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Opens one layer, its file validated anew.
    ///
    /// # Errors
    /// As [`Dump::open`]; [`Error::OtherDump`] also when the file was replaced since;
    /// [`Error::OutOfRange`].
    pub fn layer(&self, layer: Layer) -> Result<LayerDump<'_>> {
        let count = self.manifest.shape.layers;
        if layer.0 >= count {
            return Err(Error::OutOfRange { what: "layer", index: layer.0, count });
        }
        let path = layer_path(&self.dir, layer);
        let file = open_regular(&path).map_err(Error::io(&path, "opening"))?;
        let header = Header { dump: self, layer, path: &path };
        let (layout, data_start, sums) = header.read(&file)?;
        Ok(LayerDump { dump: self, layer, path, file, layout, data_start, sums })
    }
}

/// Reads and checks the header of one layer file.
struct Header<'a> {
    dump: &'a Dump,
    layer: Layer,
    path: &'a Path,
}

impl Header<'_> {
    fn fail<T>(&self, why: String) -> Result<T> {
        Err(Error::LayerFile { path: self.path.to_owned(), why })
    }

    /// Offsets of the tensors, where their data begins, and its checksums.
    fn read(&self, mut file: &File) -> Result<(Layout, u64, Option<Vec<u32>>)> {
        let manifest = &self.dump.manifest;
        let expected = Layout::new(manifest, self.path)?;
        let size = file.metadata().map_err(Error::io(self.path, "asking for the size"))?.len();
        let mut length = [0; LENGTH_BYTES as usize];
        if size < LENGTH_BYTES {
            return self.fail(format!("it has {size} bytes, too few for a safetensors header"));
        }
        file.read_exact(&mut length).map_err(Error::io(self.path, "reading"))?;
        let length = u64::from_le_bytes(length);
        if length > max_header(manifest) {
            return self.fail(format!("its header claims {length} bytes, more than any layer has"));
        }
        let data_start = LENGTH_BYTES + length;
        let whole = data_start.checked_add(expected.data_len);
        if whole != Some(size) {
            let whole = whole.map_or("more".into(), |n| n.to_string());
            return self.fail(format!("it has {size} bytes where {whole} are expected"));
        }
        let mut json = Vec::new();
        // Memory comes with the bytes: the length is the file's own word, and a sparse one has none.
        let read = file.take(length).read_to_end(&mut json);
        if read.map_err(Error::io(self.path, "reading the header"))? as u64 != length {
            return self.fail("it became shorter while it was read".into());
        }
        let metadata: Metadata = match serde_json::from_slice(&json) {
            Ok(metadata) => metadata,
            Err(error) => return self.fail(format!("its header is not valid: {error}")),
        };
        if let Some(name) = name_twice(&json) {
            return self.fail(format!("its header has {name:?} twice"));
        }
        let sums = self.check_identity(&metadata)?;
        let starts = self.check_tensors(&metadata)?;
        Ok((Layout::with_starts(starts, expected.data_len), data_start, sums))
    }

    /// Checks that the file belongs here; the checksums of its data, where it has some.
    fn check_identity(&self, metadata: &Metadata) -> Result<Option<Vec<u32>>> {
        let layer = self.layer.to_string();
        let own = metadata.metadata().as_ref();
        let get = |key: &str| own.and_then(|own| own.get(key)).map(String::as_str);
        let other = |what, expected: &str, found: &str| {
            let (expected, found) = (expected.to_owned(), found.to_owned());
            Err(Error::OtherDump { path: self.path.to_owned(), what, expected, found })
        };
        for (key, what, expected) in [
            (META_DUMP, "the id of the manifest", &self.dump.manifest_id),
            (META_LAYER, "the layer", &layer),
        ] {
            match get(key) {
                Some(found) if found == expected => {}
                Some(found) => return other(what, expected, found),
                None => return self.fail(format!("its metadata lacks {key}")),
            }
        }
        let manifest = &self.dump.manifest;
        let count = manifest.sequences.len() * sums::parts_of_sequence(manifest);
        let sums = match get(META_SUMS) {
            None => None,
            Some(text) => match sums::from_text(text, count) {
                None => return self.fail(format!("{META_SUMS} is not {count} checksums")),
                sums => sums,
            },
        };
        let digest = sums.as_deref().map(digest);
        match self.dump.digests.get(self.layer.0) {
            Some(opened) if *opened != digest => {
                let name = |digest: &Option<String>| digest.clone().unwrap_or("missing".into());
                other("the digest of the checksums", &name(opened), &name(&digest))
            }
            _ => Ok(sums),
        }
    }

    /// Starts of all tensors. Their sizes are checked against the shapes and against each other
    /// by safetensors' own parser (contiguous, no holes), so equal shapes are enough here.
    fn check_tensors(&self, metadata: &Metadata) -> Result<Vec<u64>> {
        let manifest = &self.dump.manifest;
        let dtype = safetensors_dtype(manifest.dtype);
        let count = metadata.tensors().len();
        if count != 4 * manifest.sequences.len() {
            let expected = 4 * manifest.sequences.len();
            return self.fail(format!("it has {count} tensors where {expected} are expected"));
        }
        let mut starts = Vec::with_capacity(count);
        for sequence in 0..manifest.sequences.len() {
            for tensor in Tensor::ALL {
                let name = format!("{}.{sequence}", tensor.name());
                let Some(info) = metadata.info(&name) else {
                    return self.fail(format!("tensor {name} is missing"));
                };
                let shape = tensor.shape(manifest, sequence);
                if info.dtype != dtype || info.shape != shape {
                    return self.fail(format!(
                        "tensor {name} is {:?} {:?} where {dtype:?} {shape:?} is expected",
                        info.dtype, info.shape
                    ));
                }
                starts.push(info.data_offsets.0 as u64);
            }
        }
        if metadata.data_len() as u64 != Layout::new(manifest, self.path)?.data_len {
            return self.fail("its tensors do not fill the file".into());
        }
        Ok(starts)
    }
}

/// One layer of a dump, open for reading.
#[derive(Debug)]
pub struct LayerDump<'a> {
    dump: &'a Dump,
    layer: Layer,
    path: PathBuf,
    file: File,
    layout: Layout,
    data_start: u64,
    /// Of every part, by sequence.
    sums: Option<Vec<u32>>,
}

fn digest(sums: &[u32]) -> String {
    sha256_hex(sums::to_text(sums.iter().copied()).as_bytes())
}

/// What one KV head and its group of query heads hold in one sequence, as f32.
///
/// Reused from sequence to sequence, so that nothing is allocated in the long run.
#[derive(Clone, Debug, Default)]
pub struct HeadData {
    /// `[group, N, head_dim]`
    pub q: Vec<f32>,
    /// `[R, group, N, head_dim]`
    pub g: Vec<f32>,
    /// `[T + N, head_dim]`
    pub k: Vec<f32>,
    /// `[T + N, head_dim]`
    pub v: Vec<f32>,
}

impl<'a> LayerDump<'a> {
    /// What the dump says about itself.
    #[must_use]
    pub fn manifest(&self) -> &'a Manifest {
        &self.dump.manifest
    }

    fn digest(&self) -> Option<String> {
        self.sums.as_deref().map(digest)
    }

    /// The layer's index.
    #[must_use]
    pub fn layer(&self) -> Layer {
        self.layer
    }

    /// Reads what `head` and its group hold in one sequence.
    ///
    /// # Errors
    /// [`Error::Damaged`] for bytes that are not those that were written; [`Error::NonFinite`] for NaN
    /// or infinity, named to the channel; [`Error::Io`]; [`Error::OutOfRange`].
    pub fn read(&self, head: KvHead, sequence: usize, data: &mut HeadData) -> Result<()> {
        let manifest = &self.dump.manifest;
        let shape = &manifest.shape;
        for (what, index, count) in
            [("KV head", head.0, shape.kv_heads), ("sequence", sequence, manifest.sequences.len())]
        {
            if index >= count {
                return Err(Error::OutOfRange { what, index, count });
            }
        }
        let query_row = manifest.positions * shape.head_dim;
        let key_row = manifest.tokens(sequence) * shape.head_dim;
        let group = shape.group();

        data.q.resize(group * query_row, 0.0);
        data.k.resize(key_row, 0.0);
        data.v.resize(key_row, 0.0);
        data.g.resize(manifest.draws * group * query_row, 0.0);
        for (tensor, out) in
            [(Tensor::Q, &mut data.q), (Tensor::K, &mut data.k), (Tensor::V, &mut data.v)]
        {
            self.part(TensorAt { layer: self.layer, sequence, tensor }, head.0, out)?;
        }
        for (draw, g) in data.g.chunks_exact_mut(group * query_row).enumerate() {
            let place = TensorAt { layer: self.layer, sequence, tensor: Tensor::G };
            self.part(place, draw * shape.kv_heads + head.0, g)?;
        }
        Ok(())
    }

    /// Reads part `part` of a tensor, which `out` takes exactly.
    fn part(&self, place: TensorAt, part: usize, out: &mut [f32]) -> Result<()> {
        let manifest = &self.dump.manifest;
        let dtype = manifest.dtype;
        let len = (out.len() * dtype.bytes()) as u64;
        let offset =
            self.data_start + self.layout.start(place.tensor, place.sequence) + part as u64 * len;
        let first = part * out.len();
        let (mut bytes, mut at) = ([0; CHUNK], offset);
        let (mut sum, mut finite) = (crc32fast::Hasher::new(), true);
        for out in out.chunks_mut(CHUNK / dtype.bytes()) {
            let bytes = &mut bytes[..out.len() * dtype.bytes()];
            read_at(&self.file, bytes, at).map_err(|error| self.not_read(error))?;
            at += bytes.len() as u64;
            if self.sums.is_some() {
                sum.update(bytes);
            }
            finite &= convert::read(dtype, bytes, out);
        }
        if let Some(sums) = &self.sums {
            let of_sequence = place.sequence * sums::parts_of_sequence(manifest);
            let at = of_sequence + sums::first_part(place.tensor, manifest) + part;
            let found = sum.finalize();
            if found != sums[at] {
                return Err(Error::Damaged {
                    path: self.path.clone(),
                    bytes: offset..offset + len,
                    what: place.part_name(manifest, part),
                    expected: sums[at],
                    found,
                });
            }
        }
        if finite {
            return Ok(());
        }
        let bad = out.iter().position(|value| !value.is_finite()).unwrap_or_default();
        let mut at = place.position(manifest, first + bad);
        at.path = Some(self.path.clone());
        Err(Error::NonFinite {
            at: Box::new(at),
            value: out[bad],
            mend: "dump again; if the model overflows f16, with --dtype bf16",
        })
    }

    /// Why activations could not be read. The file had them all when it was opened.
    fn not_read(&self, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let why = "it became shorter while it was read; something else writes to it".into();
            return Error::LayerFile { path: self.path.clone(), why };
        }
        Error::io(&self.path, "reading")(error)
    }
}

/// Fills `bytes` from `offset` on, whatever else is read from the file at the same time.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset);
    #[cfg(not(unix))]
    {
        // Threads share the file's cursor.
        static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut file = file;
        io::Seek::seek(&mut file, io::SeekFrom::Start(offset))?;
        file.read_exact(bytes)
    }
}
