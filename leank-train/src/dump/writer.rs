//! Writing a dump: streamed into a temporary sibling directory, renamed when whole.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
};

use leank_core::Layer;
use tempfile::TempDir;

use super::{
    convert,
    layout::{LENGTH_BYTES, Layout, MANIFEST_FILE, Tensor, dump_id, layer_path, tensor_bytes},
    manifest::Manifest,
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
    target: PathBuf,
    existing: Existing,
    directory: TempDir,
    manifest: Manifest,
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
    written: Vec<bool>,
}

impl DumpWriter {
    /// Starts a dump that will stand at `dir`, which must not exist, or be an empty directory.
    ///
    /// # Errors
    /// [`Error::Occupied`] when something is there; [`Error::Manifest`] when the manifest is not
    /// valid; [`Error::Io`] and [`Error::DiskFull`].
    pub fn create(dir: &Path, manifest: Manifest) -> Result<Self> {
        Self::create_with(dir, manifest, Existing::Refuse)
    }

    /// As [`DumpWriter::create`], with a choice about a dump that is there already.
    ///
    /// # Errors
    /// As [`DumpWriter::create`].
    pub fn create_with(dir: &Path, manifest: Manifest, existing: Existing) -> Result<Self> {
        Self::check_target(dir, existing)?;
        manifest.validate(&dir.join(MANIFEST_FILE))?;
        let json = manifest.to_json(dir)?;
        let layout = Layout::new(&manifest, dir)?;
        let id = dump_id(&json);

        let parent = match dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(Error::io(parent, "creating the directory"))?;
        let directory = temporary_beside(parent, &target_name(dir)?)
            .map_err(Error::io(parent, "creating a temporary directory"))?;

        let headers: Vec<_> = manifest
            .shape
            .layer_indices()
            .map(|layer| layout.header(&manifest, layer, &id))
            .collect();
        let needed = headers.iter().fold(json.len() as u64, |n, header| {
            n.saturating_add(header.len() as u64).saturating_add(layout.data_len)
        });
        let mut writer = Self {
            target: dir.to_owned(),
            existing,
            directory,
            manifest,
            layers: Vec::new(),
            needed,
            buffer: Vec::new(),
        };
        writer.write_file(&writer.directory.path().join(MANIFEST_FILE), &json)?;
        for (layer, header) in writer.manifest.shape.layer_indices().zip(&headers) {
            let path = layer_path(writer.directory.path(), layer);
            writer.write_file(&path, header)?;
            let data = writer.data_ranges(&layout, header.len() as u64);
            let written = vec![false; writer.manifest.sequences.len()];
            writer.layers.push(LayerFile { path, data, written });
        }
        Ok(writer)
    }

    /// Refuses a `dir` that [`DumpWriter::create_with`] would refuse: to be asked before the work
    /// that comes before writing.
    ///
    /// # Errors
    /// [`Error::Occupied`]; [`Error::Io`] when it cannot be looked into.
    pub fn check_target(dir: &Path, existing: Existing) -> Result<()> {
        target_name(dir)?;
        let mut entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(occupied(dir, "is a file; a dump is a directory: choose another name"));
            }
            Err(error) => return Err(Error::io(dir, "looking into the directory")(error)),
        };
        if entries.next().is_none() {
            return Ok(());
        }
        let is_dump = dir.join(MANIFEST_FILE).is_file();
        match (is_dump, existing) {
            (true, Existing::Replace) => Ok(()),
            (true, Existing::Refuse) => Err(occupied(
                dir,
                "holds a dump already; choose another directory, or replace it (--overwrite)",
            )),
            (false, _) => {
                Err(occupied(dir, "is not empty and holds no dump; choose another directory"))
            }
        }
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
    /// [`Error::DiskFull`].
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
        if self.layers[layer.0].written[sequence] {
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
        for tensor in Tensor::ALL {
            let place = Place { layer, sequence, tensor };
            self.write_tensor(&mut file, place, values(tensor))?;
        }
        self.layers[layer.0].written[sequence] = true;
        Ok(())
    }

    fn write_tensor(&mut self, file: &mut File, place: Place, values: &[f32]) -> Result<()> {
        let LayerFile { path, data, .. } = &self.layers[place.layer.0];
        let start = data[place.sequence * 4 + place.tensor as usize].start;
        let mut buffer = std::mem::take(&mut self.buffer);
        file.seek(SeekFrom::Start(start)).map_err(self.io(path, "seeking"))?;
        for (i, chunk) in values.chunks(CHUNK).enumerate() {
            buffer.clear();
            convert::write(self.manifest.dtype, chunk, &mut buffer).map_err(|at| {
                Error::NonFinite {
                    at: Box::new(self.position(&place, i * CHUNK + at)),
                    value: chunk[at],
                    mend: if chunk[at].is_finite() {
                        "it overflows the dump's dtype; dump with --dtype bf16 or f32"
                    } else {
                        "the model itself produced it: check the weights and the forward pass"
                    },
                }
            })?;
            file.write_all(&buffer).map_err(self.io(path, "writing"))?;
        }
        self.buffer = buffer;
        Ok(())
    }

    /// Makes the dump durable and moves it to its place.
    ///
    /// # Errors
    /// [`Error::WriteOrder`] when a part is missing, [`Error::Occupied`] when the target was taken
    /// meanwhile, [`Error::Io`], [`Error::DiskFull`]. The temporary directory is removed.
    pub fn finish(self) -> Result<()> {
        for (layer, file) in self.layers.iter().enumerate() {
            if let Some(sequence) = file.written.iter().position(|written| !written) {
                let what = "was not written: write every sequence of every layer before finish";
                return Err(Error::WriteOrder { layer: Layer(layer), sequence, what });
            }
            let sync = File::open(&file.path).and_then(|file| file.sync_all());
            sync.map_err(self.io(&file.path, "flushing"))?;
        }
        Self::check_target(&self.target, self.existing)?;
        let rename = |from: &Path, to: &Path| {
            fs::rename(from, to).map_err(Error::io(to, "moving the finished dump into place"))
        };
        if !self.target.exists() {
            rename(self.directory.path(), &self.target)?;
        } else if fs::remove_dir(&self.target).is_ok() {
            // It was empty.
            rename(self.directory.path(), &self.target)?;
        } else {
            // Aside, not away: the old dump goes only after the new one stands.
            let mut old = self.directory.path().as_os_str().to_owned();
            old.push("-replaced");
            let old = PathBuf::from(old);
            rename(&self.target, &old)?;
            rename(self.directory.path(), &self.target)?;
            fs::remove_dir_all(&old).map_err(Error::io(&old, "removing the replaced dump"))?;
        }
        // Moved: nothing is left for the guard to remove.
        let _ = self.directory.keep();
        sync_parent(&self.target)
    }

    /// Creates a file with `bytes` in it, flushed to the disk.
    fn write_file(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = File::create_new(path).map_err(self.io(path, "creating"))?;
        file.write_all(bytes).map_err(self.io(path, "writing"))?;
        file.sync_all().map_err(self.io(path, "flushing"))
    }

    fn data_ranges(&self, layout: &Layout, header: u64) -> Vec<Range<u64>> {
        debug_assert!(header > LENGTH_BYTES);
        let range = |sequence, tensor| {
            let start = header + layout.start(tensor, sequence);
            let bytes = tensor_bytes(tensor, &self.manifest, sequence).unwrap_or_default();
            start..start + bytes
        };
        let sequences = 0..self.manifest.sequences.len();
        sequences.flat_map(|s| Tensor::ALL.map(|tensor| range(s, tensor))).collect()
    }

    fn io(&self, path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let (path, needed) = (path.to_owned(), self.needed);
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Error::DiskFull { path, needed, source }
            }
            _ => Error::Io { path, action, source },
        }
    }

    fn position(&self, place: &Place, element: usize) -> ElementPosition {
        place.position(&self.manifest, element)
    }
}

/// Which tensor of a dump.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) layer: Layer,
    pub(super) sequence: usize,
    pub(super) tensor: Tensor,
}

impl Place {
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

/// A directory that removes itself unless kept, open to others as a plain `mkdir` makes it.
fn temporary_beside(parent: &Path, name: &str) -> io::Result<TempDir> {
    let prefix = format!(".{name}.partial-");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
}

fn occupied(path: &Path, why: &'static str) -> Error {
    Error::Occupied { path: path.to_owned(), why }
}

/// The last part of a dump's path.
fn target_name(dir: &Path) -> Result<String> {
    let name = dir.file_name().ok_or_else(|| occupied(dir, "is not a name for a dump"))?;
    Ok(name.to_string_lossy().into_owned())
}

/// Makes the rename itself durable, where the system can.
fn sync_parent(target: &Path) -> Result<()> {
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if cfg!(unix) {
        let sync = File::open(parent).and_then(|directory| directory.sync_all());
        sync.map_err(Error::io(parent, "flushing the directory"))?;
    }
    Ok(())
}
