//! Writing a dump: streamed into a temporary sibling directory, renamed when whole.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use leank_core::{
    Layer,
    files::{mark_in_use, sha256_hex},
};

use super::{
    convert,
    layout::{DIGEST_LEN, LENGTH_BYTES, Layout, MANIFEST_FILE, Tensor, layer_path, tensor_bytes},
    manifest::Manifest,
    place::{self, Place},
};
use crate::{Error, Result, error::ElementPosition};

/// Values converted at a time, so that writing takes little memory.
const CHUNK: usize = 1 << 18;

/// What to do when there is a dump already where the new one should go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Refuse.
    #[default]
    Refuse,
    /// Replace it when the new one is finished. Only a dump is ever replaced, with the learning
    /// records in it; a directory that is none is refused.
    Replace,
}

/// The activations of one sequence in one layer, row-major f32; see [the module](super) for what
/// they are.
#[derive(Clone, Copy, Debug)]
pub struct SequenceTensors<'a> {
    /// `[query_heads, N, head_dim]`
    pub q: &'a [f32],
    /// `[kv_heads, T + N, head_dim]`
    pub k: &'a [f32],
    /// `[kv_heads, T + N, head_dim]`
    pub v: &'a [f32],
    /// `[R, query_heads, N, head_dim]`
    pub g: &'a [f32],
}

/// Writes a dump, in any order of layers and sequences.
///
/// Nothing appears at the target before [`DumpWriter::finish`]; dropping the writer earlier
/// removes what it wrote.
///
/// ```no_run
/// # fn run(manifest: leank_train::dump::Manifest, q: &[f32], k: &[f32], v: &[f32], g: &[f32])
/// # -> leank_train::Result<()> {
/// use leank_core::Layer;
/// use leank_train::dump::{DumpWriter, SequenceTensors};
///
/// let mut writer = DumpWriter::create("dump".as_ref(), manifest)?;
/// for layer in 0..30 {
///     writer.write(Layer(layer), 0, SequenceTensors { q, k, v, g })?;
/// }
/// writer.finish()
/// # }
/// ```
#[derive(Debug)]
pub struct DumpWriter {
    place: Place,
    manifest: Manifest,
    /// SHA-256 of the manifest's file.
    manifest_id: String,
    layout: Layout,
    layers: Vec<LayerFile>,
    /// Bytes of the whole dump.
    needed: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct LayerFile {
    path: PathBuf,
    /// Byte ranges of the file, by sequence and tensor.
    data: Vec<Range<u64>>,
    /// Digest of each sequence that was written.
    digests: Vec<Option<String>>,
}

impl DumpWriter {
    /// Starts a dump that will stand at `dir`, which must not exist, or be an empty directory.
    ///
    /// # Errors
    /// [`Error::Occupied`] when something is there; [`Error::Manifest`] when the manifest is not
    /// valid; [`Error::Io`], [`Error::DiskFull`] and [`Error::FileTooLarge`].
    pub fn create(dir: &Path, manifest: Manifest) -> Result<Self> {
        Self::create_with(dir, manifest, Existing::Refuse)
    }

    /// As [`DumpWriter::create`], with a choice about a dump that is there already.
    ///
    /// # Errors
    /// As [`DumpWriter::create`].
    pub fn create_with(dir: &Path, manifest: Manifest, existing: Existing) -> Result<Self> {
        manifest.validate(&dir.join(MANIFEST_FILE))?;
        let json = manifest.to_json(dir)?;
        let layout = Layout::new(&manifest, dir)?;
        let manifest_id = sha256_hex(&json);
        let place = Place::create(dir, existing)?;
        let mut writer = Self {
            place,
            manifest,
            manifest_id,
            layout,
            layers: Vec::new(),
            needed: json.len() as u64,
            buffer: Vec::new(),
        };
        let headers: Vec<_> = writer
            .manifest
            .shape
            .layer_indices()
            .map(|layer| writer.header(layer, &"0".repeat(DIGEST_LEN)))
            .collect();
        for header in &headers {
            let file = (header.len() as u64).saturating_add(writer.layout.data_len);
            writer.needed = writer.needed.saturating_add(file);
        }
        let held = writer.write_file(&writer.place.path().join(MANIFEST_FILE), &json)?;
        writer.place.hold(held);
        for (layer, header) in writer.manifest.shape.layer_indices().zip(&headers) {
            let path = layer_path(writer.place.path(), layer);
            writer.write_file(&path, header)?;
            let data = writer.data_ranges(header.len() as u64);
            let digests = vec![None; writer.manifest.sequences.len()];
            writer.layers.push(LayerFile { path, data, digests });
        }
        Ok(writer)
    }

    /// Refuses a `dir` that [`DumpWriter::create_with`] would refuse: to be asked before the work
    /// that comes before writing.
    ///
    /// # Errors
    /// [`Error::Occupied`]; [`Error::Io`] when it cannot be looked into.
    pub fn check_target(dir: &Path, existing: Existing) -> Result<()> {
        place::check_target(dir, existing)
    }

    /// Bytes of the whole dump, known before anything is written.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.needed
    }

    /// What the dump will say about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Writes one sequence of one layer, converted to the dump's dtype.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Length`], [`Error::WriteOrder`] when it is there already,
    /// [`Error::NonFinite`] for NaN, infinity or a value that overflows the dtype, [`Error::Io`],
    /// [`Error::DiskFull`], [`Error::FileTooLarge`].
    pub fn write(
        &mut self,
        layer: Layer,
        sequence: usize,
        tensors: SequenceTensors<'_>,
    ) -> Result<()> {
        let in_range = |what, index, count| {
            if index < count { Ok(()) } else { Err(Error::OutOfRange { what, index, count }) }
        };
        in_range("layer", layer.0, self.layers.len())?;
        in_range("sequence", sequence, self.manifest.sequences.len())?;
        if self.layers[layer.0].digests[sequence].is_some() {
            return Err(Error::WriteOrder { layer, sequence, what: "was written twice" });
        }
        let values = |tensor| match tensor {
            Tensor::Q => tensors.q,
            Tensor::G => tensors.g,
            Tensor::K => tensors.k,
            Tensor::V => tensors.v,
        };
        for tensor in Tensor::ALL {
            let expected = tensor.shape(&self.manifest, sequence).iter().product();
            let found = values(tensor).len();
            if found != expected {
                let what = format!("{} of layer {layer}, sequence {sequence}", tensor.name());
                return Err(Error::Length { what, expected, found });
            }
        }
        let path = self.layers[layer.0].path.clone();
        let mut file =
            OpenOptions::new().write(true).open(&path).map_err(Error::io(&path, "opening"))?;
        let mut digests = String::new();
        for tensor in Tensor::ALL {
            let at = TensorAt { layer, sequence, tensor };
            self.write_tensor(&mut file, at, values(tensor), &mut digests)?;
        }
        self.layers[layer.0].digests[sequence] = Some(sha256_hex(digests.as_bytes()));
        Ok(())
    }

    /// Writes one tensor, and the digest of each of its chunks to `digests`.
    fn write_tensor(
        &mut self,
        file: &mut File,
        at: TensorAt,
        values: &[f32],
        digests: &mut String,
    ) -> Result<()> {
        let LayerFile { path, data, .. } = &self.layers[at.layer.0];
        let start = data[at.sequence * 4 + at.tensor as usize].start;
        let mut buffer = std::mem::take(&mut self.buffer);
        file.seek(SeekFrom::Start(start)).map_err(self.io(path, "seeking"))?;
        for (i, chunk) in values.chunks(CHUNK).enumerate() {
            buffer.clear();
            convert::write(self.manifest.dtype, chunk, &mut buffer).map_err(|bad| {
                Error::NonFinite {
                    at: Box::new(at.position(&self.manifest, i * CHUNK + bad)),
                    value: chunk[bad],
                    mend: if chunk[bad].is_finite() {
                        "it overflows the dump's dtype; dump with --dtype bf16 or f32"
                    } else {
                        "the model itself produced it: check the weights and the forward pass"
                    },
                }
            })?;
            file.write_all(&buffer).map_err(self.io(path, "writing"))?;
            digests.push_str(&sha256_hex(&buffer));
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Makes the dump durable and moves it to its place.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] when a part is missing, [`Error::Occupied`] when the target was taken
    /// meanwhile, [`Error::Io`], [`Error::DiskFull`]; then the temporary directory is removed, and
    /// a dump that was to be replaced is still there. [`Error::Aside`] when it could not be put
    /// back.
    pub fn finish(self) -> Result<()> {
        for (layer, file) in self.manifest.shape.layer_indices().zip(&self.layers) {
            if let Some(sequence) = file.digests.iter().position(Option::is_none) {
                let what = "was not written: write every sequence of every layer before finish";
                return Err(Error::WriteOrder { layer, sequence, what });
            }
            let digests: String = file.digests.iter().flatten().map(String::as_str).collect();
            // As long as the one that holds its place.
            let header = self.header(layer, &sha256_hex(digests.as_bytes()));
            let mut opened = OpenOptions::new()
                .write(true)
                .open(&file.path)
                .map_err(self.io(&file.path, "opening"))?;
            opened.write_all(&header).map_err(self.io(&file.path, "writing"))?;
            opened.sync_all().map_err(self.io(&file.path, "flushing"))?;
        }
        self.place.move_in()
    }

    /// Creates a file with `bytes` in it, flushed to the disk, marked as in use while it is open.
    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<File> {
        let mut file = File::create_new(path).map_err(self.io(path, "creating"))?;
        mark_in_use(&file);
        file.write_all(bytes).map_err(self.io(path, "writing"))?;
        file.sync_all().map_err(self.io(path, "flushing"))?;
        Ok(file)
    }

    fn header(&self, layer: Layer, digest: &str) -> Vec<u8> {
        self.layout.header(&self.manifest, layer, &self.manifest_id, digest)
    }

    fn data_ranges(&self, header: u64) -> Vec<Range<u64>> {
        debug_assert!(header > LENGTH_BYTES);
        let range = |sequence, tensor| {
            let start = header + self.layout.start(tensor, sequence);
            let bytes = tensor_bytes(tensor, &self.manifest, sequence).unwrap_or_default();
            start..start + bytes
        };
        let sequences = 0..self.manifest.sequences.len();
        sequences.flat_map(|s| Tensor::ALL.map(|tensor| range(s, tensor))).collect()
    }

    fn io(&self, path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let (path, needed, data) = (path.to_owned(), self.needed, self.layout.data_len);
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Error::DiskFull { path, needed, source }
            }
            io::ErrorKind::FileTooLarge => Error::FileTooLarge { path, needed: data, source },
            _ => Error::Io { path, action, source },
        }
    }
}

/// Which tensor of a dump.
#[derive(Clone, Copy, Debug)]
pub(super) struct TensorAt {
    pub(super) layer: Layer,
    pub(super) sequence: usize,
    pub(super) tensor: Tensor,
}

impl TensorAt {
    /// Names element `element` of the tensor.
    pub(super) fn position(&self, manifest: &Manifest, element: usize) -> ElementPosition {
        let shape = self.tensor.shape(manifest, self.sequence);
        let (heads, rows, channels) = match shape[..] {
            [.., heads, rows, channels] => (heads, rows, channels),
            _ => unreachable!("tensors of a dump have at least three axes"),
        };
        let head = element / (rows * channels);
        ElementPosition {
            path: None,
            layer: self.layer,
            sequence: self.sequence,
            tensor: self.tensor.name(),
            draw: (self.tensor == Tensor::G).then_some(head / heads),
            head: head % heads,
            row: element / channels % rows,
            channel: element % channels,
        }
    }
}
