//! Writing a dump: streamed into a temporary sibling directory, renamed when whole.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek, SeekFrom, Write as _},
    ops::Range,
    path::{Path, PathBuf},
};

use leank_core::{Layer, files::sha256_hex};

use super::{
    again::open_again,
    convert,
    journal::{Entry, JOURNAL_FILE, Journal},
    layout::{LENGTH_BYTES, Layout, MANIFEST_FILE, Tensor, layer_path, tensor_bytes},
    manifest::Manifest,
    place::{self, Place, create_file},
    sums,
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
/// removes what it wrote. What a killed process wrote of the [same](Manifest::is_same_work) dump is
/// taken over: [`DumpWriter::is_written`] says what need not be computed again.
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
    journal: Journal,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct LayerFile {
    path: PathBuf,
    /// Byte ranges of the file, by sequence and tensor.
    data: Vec<Range<u64>>,
    /// Checksums of each sequence that was written.
    sums: Vec<Option<Vec<u32>>>,
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
        let layout = Layout::new(&manifest, dir)?;
        let is_same = |json: &[u8]| {
            // Whole to the last byte: one that lacks the end of its line is valid, and gives another id.
            let is_whole = |left: &Manifest| left.to_json(dir).is_ok_and(|whole| whole == json);
            Manifest::from_json(json, dir)
                .is_ok_and(|left| left.is_same_work(&manifest) && is_whole(&left))
        };
        let (place, json) = Place::create(dir, existing, manifest.to_json(dir)?, &is_same)?;
        // One that was left has the words of the command that began it.
        let manifest = Manifest::from_json(&json, dir)?;
        let path = place.path().join(JOURNAL_FILE);
        let parts = sums::parts_of_sequence(&manifest);
        let (journal, entries) =
            Journal::open(&path, parts).map_err(Error::io(&path, "opening the journal"))?;
        let mut writer = Self {
            place,
            manifest_id: sha256_hex(&json),
            layout,
            layers: Vec::new(),
            needed: json.len() as u64,
            journal,
            buffer: Vec::new(),
            manifest,
        };
        writer.lay_out()?;
        for entry in entries {
            writer.take_over(entry)?;
        }
        Ok(writer)
    }

    /// Makes the layer files that are not there yet, each with its header.
    fn lay_out(&mut self) -> Result<()> {
        let unwritten = "0".repeat(sums::text_len(&self.manifest));
        let layers: Vec<_> = self.manifest.shape.layer_indices().collect();
        let headers: Vec<_> = layers.iter().map(|&layer| self.header(layer, &unwritten)).collect();
        for header in &headers {
            let file = (header.len() as u64).saturating_add(self.layout.data_len);
            self.needed = self.needed.saturating_add(file);
        }
        for (layer, header) in layers.into_iter().zip(&headers) {
            let path = layer_path(self.place.path(), layer);
            let left =
                open_again(&path, File::options().read(true)).and_then(|file| file.metadata());
            // With its header, and no longer than it will be: a reader wants the exact length.
            let start = header.len() as u64;
            let lengths = start..=start.saturating_add(self.layout.data_len);
            let is_there = match left {
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                left => lengths.contains(&left.map_err(Error::io(&path, "opening"))?.len()),
            };
            if !is_there {
                let _ = fs::remove_file(&path);
                create_file(&path, header).map_err(self.io(&path, "creating"))?;
            }
            let data = self.data_ranges(header.len() as u64);
            let sums = vec![None; self.manifest.sequences.len()];
            self.layers.push(LayerFile { path, data, sums });
        }
        Ok(())
    }

    /// Believes a line of a killed run's journal if the bytes are there.
    fn take_over(&mut self, entry: Entry) -> Result<()> {
        let Entry { layer: Layer(layer), sequence, sums } = entry;
        let tensors = Tensor::ALL.len();
        let Some(file) = self.layers.get_mut(layer) else { return Ok(()) };
        // A damaged line may name any sequence.
        let Some(ranges) = file.data.chunks_exact(tensors).nth(sequence) else { return Ok(()) };
        let mut opened = open_again(&file.path, File::options().read(true))
            .map_err(Error::io(&file.path, "opening"))?;
        let mut found = Vec::with_capacity(sums.len());
        for (range, tensor) in ranges.iter().zip(Tensor::ALL) {
            let parts = sums::parts(tensor, &self.manifest);
            self.buffer.resize(((range.end - range.start) / parts as u64) as usize, 0);
            opened.seek(SeekFrom::Start(range.start)).map_err(Error::io(&file.path, "seeking"))?;
            for _ in 0..parts {
                match opened.read_exact(&mut self.buffer) {
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    read => read.map_err(Error::io(&file.path, "reading"))?,
                }
                found.push(crc32fast::hash(&self.buffer));
            }
        }
        if found == sums {
            file.sums[sequence] = Some(sums);
        }
        Ok(())
    }

    /// Whether a sequence of a layer is written: by this writer, or by a killed one before it.
    #[must_use]
    pub fn is_written(&self, layer: Layer, sequence: usize) -> bool {
        let file = self.layers.get(layer.0);
        file.and_then(|file| file.sums.get(sequence)).is_some_and(Option::is_some)
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
        if self.is_written(layer, sequence) {
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
            open_again(&path, File::options().write(true)).map_err(Error::io(&path, "opening"))?;
        let mut sums = Vec::new();
        for tensor in Tensor::ALL {
            let at = TensorAt { layer, sequence, tensor };
            self.write_tensor(&mut file, at, values(tensor), &mut sums)?;
        }
        let entry = Entry { layer, sequence, sums };
        let journal = self.place.path().join(JOURNAL_FILE);
        self.journal.add(&entry).map_err(self.io(&journal, "writing"))?;
        self.layers[layer.0].sums[sequence] = Some(entry.sums);
        Ok(())
    }

    /// Writes one tensor, and the checksum of each of its parts to `sums`.
    fn write_tensor(
        &mut self,
        file: &mut File,
        at: TensorAt,
        values: &[f32],
        sums: &mut Vec<u32>,
    ) -> Result<()> {
        let LayerFile { path, data, .. } = &self.layers[at.layer.0];
        let start = data[at.sequence * 4 + at.tensor as usize].start;
        let mut buffer = std::mem::take(&mut self.buffer);
        file.seek(SeekFrom::Start(start)).map_err(self.io(path, "seeking"))?;
        let part = values.len() / sums::parts(at.tensor, &self.manifest);
        for (n, values) in values.chunks(part.max(1)).enumerate() {
            let mut sum = crc32fast::Hasher::new();
            for (i, chunk) in values.chunks(CHUNK).enumerate() {
                buffer.clear();
                convert::write(self.manifest.dtype, chunk, &mut buffer).map_err(|bad| {
                    let at = at.position(&self.manifest, n * part + i * CHUNK + bad);
                    Error::NonFinite {
                        at: Box::new(at),
                        value: chunk[bad],
                        mend: if chunk[bad].is_finite() {
                            "it overflows the dump's dtype; dump with --dtype bf16 or f32"
                        } else {
                            "the model itself produced it: check the weights and the forward pass"
                        },
                    }
                })?;
                file.write_all(&buffer).map_err(self.io(path, "writing"))?;
                sum.update(&buffer);
            }
            sums.push(sum.finalize());
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
            if let Some(sequence) = file.sums.iter().position(Option::is_none) {
                let what = "was not written: write every sequence of every layer before finish";
                return Err(Error::WriteOrder { layer, sequence, what });
            }
            let sums = file.sums.iter().flatten().flatten().copied();
            // As long as the one that holds its place.
            let header = self.header(layer, &sums::to_text(sums));
            let mut opened = open_again(&file.path, File::options().write(true))
                .map_err(self.io(&file.path, "opening"))?;
            opened.write_all(&header).map_err(self.io(&file.path, "writing"))?;
            opened.sync_all().map_err(self.io(&file.path, "flushing"))?;
        }
        let target = self.place.move_in()?;
        // Afterwards, so that a run that is killed here loses nothing. Where it stays it does no harm.
        let _ = fs::remove_file(target.join(JOURNAL_FILE));
        Ok(())
    }

    fn header(&self, layer: Layer, sums: &str) -> Vec<u8> {
        self.layout.header(&self.manifest, layer, &self.manifest_id, sums)
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
    /// Names part `part` of the tensor: what one KV head and its group have in it.
    pub(super) fn part_name(&self, manifest: &Manifest, part: usize) -> String {
        let (kv_heads, tensor) = (manifest.shape.kv_heads, self.tensor.name());
        let (draw, head) = (part / kv_heads, part % kv_heads);
        let draw = if self.tensor == Tensor::G { format!(", draw {draw}") } else { String::new() };
        format!("sequence {}, tensor {tensor}{draw}, KV head {head}", self.sequence)
    }

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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::synthetic::Synthetic;

    /// `/dev/full` stands for a full disk.
    #[test]
    fn a_full_disk_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let synthetic = Synthetic {
            shape: leank_core::ModelShape::new(2, 4, 2, 8).unwrap(),
            prefixes: vec![5],
            positions: 3,
            draws: 2,
            dtype: leank_core::Dtype::F16,
            seed: 7,
        };
        let manifest = synthetic.manifest();
        let mut writer = DumpWriter::create(&folder.path().join("dump"), manifest).unwrap();
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let own = synthetic.sequence(Layer(0), 0);
        let at = TensorAt { layer: Layer(0), sequence: 0, tensor: Tensor::Q };
        let error = writer.write_tensor(&mut full, at, &own.q, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::DiskFull { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(&writer.total_bytes().to_string()), "{message}");
        assert!(message.contains("layer-000"), "{message}");
        drop(writer);
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
    }
}
