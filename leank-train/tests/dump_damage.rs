//! Damage to a dump is refused by name and place, and a killed run loses what it was just writing.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use leank_core::{Dtype, KvHead, Layer, ModelShape, RunRecord};
use leank_train::{
    Error,
    dump::{Dump, DumpWriter, Existing, HeadData, SequenceTensors, layer_file_name},
    synthetic::Synthetic,
};
use proptest::prelude::*;

fn synthetic(seed: u64) -> Synthetic {
    Synthetic {
        shape: ModelShape::new(2, 4, 2, 8).unwrap(),
        prefixes: vec![0, 5, 17],
        positions: 3,
        draws: 2,
        dtype: Dtype::Bf16,
        seed,
    }
}

/// Every activation of a dump, by head, layer and sequence.
fn read_all(path: &Path) -> Result<Vec<[Vec<f32>; 4]>, Error> {
    let dump = Dump::open(path)?;
    let shape = dump.manifest().shape;
    let mut all = Vec::new();
    for layer in shape.layer_indices() {
        let own = dump.layer(layer)?;
        for head in shape.kv_head_indices() {
            for sequence in 0..dump.manifest().sequences.len() {
                let mut data = HeadData::default();
                own.read(head, sequence, &mut data)?;
                all.push([data.q, data.g, data.k, data.v]);
            }
        }
    }
    Ok(all)
}

#[derive(Clone, Debug)]
enum Damage {
    /// A bit is flipped.
    Flip { at: f64, bit: u8 },
    /// Bytes are replaced.
    Overwrite { at: f64, bytes: Vec<u8> },
    /// The end is missing.
    Truncate { at: f64 },
    /// A range moved to another place of the file.
    Copy { from: f64, to: f64, len: usize },
    /// Something follows.
    Extend { bytes: Vec<u8> },
}

fn damages() -> impl Strategy<Value = Damage> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..40);
    prop_oneof![
        4 => (0.0..1.0, 0..8u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        1 => (0.0..1.0, bytes()).prop_map(|(at, bytes)| Damage::Overwrite { at, bytes }),
        1 => (0.0..1.0).prop_map(|at| Damage::Truncate { at }),
        1 => (0.0..1.0, 0.0..1.0, 1..300usize)
            .prop_map(|(from, to, len)| Damage::Copy { from, to, len }),
        1 => bytes().prop_map(|bytes| Damage::Extend { bytes }),
    ]
}

impl Damage {
    /// The bytes after the damage, and the first one that differs.
    fn apply(&self, whole: &[u8]) -> (Vec<u8>, Option<usize>) {
        let mut bytes = whole.to_vec();
        let place = |at: f64| (at * whole.len() as f64) as usize;
        match self {
            &Self::Flip { at, bit } => bytes[place(at)] ^= 1 << bit,
            Self::Overwrite { at, bytes: new } => {
                let at = place(*at);
                let end = whole.len().min(at + new.len());
                bytes[at..end].copy_from_slice(&new[..end - at]);
            }
            &Self::Truncate { at } => bytes.truncate(place(at)),
            &Self::Copy { from, to, len } => {
                let (from, to) = (place(from), place(to));
                let len = len.min(whole.len() - from.max(to));
                bytes.copy_within(from..from + len, to);
            }
            Self::Extend { bytes: new } => bytes.extend(new),
        }
        let first = bytes.iter().zip(whole).position(|(a, b)| a != b);
        let first = first.or((bytes.len() != whole.len()).then_some(bytes.len().min(whole.len())));
        (bytes, first)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 400 }))]

    #[test]
    fn random_damage_is_refused_or_means_nothing(damage in damages(), which in 0..3usize) {
        // Written once: flushing to the disk is what takes time.
        static WHOLE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
            let folder = tempfile::tempdir().unwrap();
            synthetic(7).write(folder.path()).unwrap();
            folder
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump");
        fs::create_dir(&path).unwrap();
        for entry in fs::read_dir(WHOLE.path()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
        }
        let expected = read_all(&path).unwrap();
        let files = ["manifest.json".into(), layer_file_name(Layer(0)), layer_file_name(Layer(1))];
        let file = path.join(&files[which]);
        let whole = fs::read(&file).unwrap();
        let (damaged, first) = damage.apply(&whole);
        fs::write(&file, &damaged).unwrap();
        match read_all(&path) {
            Ok(found) => prop_assert!(found == expected, "{damage:?} was not noticed"),
            Err(error) => {
                let message = error.to_string();
                // A changed manifest is another dump's: its layer files do not belong to it.
                let named = which == 0 || message.contains(&files[which]);
                prop_assert!(named, "{message}");
                if let (Error::Damaged { bytes, .. }, Damage::Flip { .. }) = (error, &damage) {
                    // The checksums themselves stand in the header.
                    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap());
                    let first = first.unwrap() as u64;
                    prop_assert!(first < header || bytes.contains(&first), "{first} {bytes:?}");
                }
            }
        }
    }
}

/// A flipped bit of an activation is found by the head that reads it, and by no other.
#[test]
fn damage_is_found_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    synthetic(7).write(&path).unwrap();
    let file = path.join(layer_file_name(Layer(1)));
    let mut bytes = fs::read(&file).unwrap();
    let offset = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.tensor("g.2").unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    // Draw 1, query head 3 (of KV head 1), position 2, channel 5.
    let at = offset + 2 * (((4 + 3) * 3 + 2) * 8 + 5);
    bytes[at] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let dump = Dump::open(&path).unwrap();
    let layer = dump.layer(Layer(1)).unwrap();
    let mut data = HeadData::default();
    layer.read(KvHead(0), 2, &mut data).unwrap();
    layer.read(KvHead(1), 1, &mut data).unwrap();
    let error = layer.read(KvHead(1), 2, &mut data).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Damaged { bytes, .. } if bytes.contains(&(at as u64))));
    for part in
        ["layer-001.safetensors", "sequence 2, tensor g, draw 1, KV head 1", "copy the file"]
    {
        assert!(message.contains(part), "{message}");
    }
}

fn write(writer: &mut DumpWriter, from: &Synthetic, layer: usize, sequence: usize) {
    let own = from.sequence(Layer(layer), sequence);
    let tensors = SequenceTensors { q: &own.q, k: &own.k, v: &own.v, g: &own.g };
    writer.write(Layer(layer), sequence, tensors).unwrap();
}

fn written(writer: &DumpWriter) -> Vec<(usize, usize)> {
    let all = (0..2).flat_map(|layer| (0..3).map(move |sequence| (layer, sequence)));
    all.filter(|&(layer, sequence)| writer.is_written(Layer(layer), sequence)).collect()
}

/// Copies the growing directory of a writer, as if its process had been killed.
fn kill(writer: DumpWriter, parent: &Path) -> PathBuf {
    let growing = fs::read_dir(parent).unwrap().next().unwrap().unwrap().path();
    let left = parent.join(".dump.partial-killed");
    let aside = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&growing).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), aside.path().join(entry.file_name())).unwrap();
    }
    drop(writer);
    assert_eq!(fs::read_dir(parent).unwrap().count(), 0);
    fs::create_dir(&left).unwrap();
    for entry in fs::read_dir(aside.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), left.join(entry.file_name())).unwrap();
    }
    left
}

#[test]
fn a_killed_dump_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let from = synthetic(7);
    let manifest = |command: &str| {
        let run = RunRecord { command: vec![command.into()], seed: 7, ..RunRecord::default() };
        leank_train::dump::Manifest { run: Some(run), ..from.manifest() }
    };
    let mut writer = DumpWriter::create(&path, manifest("first")).unwrap();
    for (layer, sequence) in [(0, 1), (1, 1), (0, 2), (1, 0)] {
        write(&mut writer, &from, layer, sequence);
    }
    let left = kill(writer, folder.path());
    // The bytes of one never reached the disk, and the last line of the journal is cut off.
    let file = left.join(layer_file_name(Layer(0)));
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 0x40;
    fs::write(&file, bytes).unwrap();
    let journal = left.join("written.txt");
    let lines = fs::read(&journal).unwrap();
    fs::write(&journal, &lines[..lines.len() - 3]).unwrap();

    // Another command of the same work: the texts, the seed and all else are equal.
    let mut writer = DumpWriter::create(&path, manifest("second")).unwrap();
    assert_eq!(written(&writer), [(0, 1), (1, 1)]);
    assert_eq!(writer.manifest().run.as_ref().unwrap().command, ["first"]);
    for (layer, sequence) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
        write(&mut writer, &from, layer, sequence);
    }
    writer.finish().unwrap();
    let names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["dump"]);
    assert!(!path.join("written.txt").exists());

    let whole = folder.path().join("whole");
    let whole = from.write_as(&whole, manifest("first")).unwrap();
    assert_eq!(Dump::open(&path).unwrap().id(), whole.id());
    assert_eq!(read_all(&path).unwrap(), read_all(whole.dir()).unwrap());
}

/// A dump that was killed when its first sequence of layer 0 was written: the folder that it is for, its
/// path, what it is of, and what it left.
fn killed_at_first() -> (tempfile::TempDir, PathBuf, Synthetic, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let from = synthetic(7);
    let mut writer = DumpWriter::create(&path, from.manifest()).unwrap();
    write(&mut writer, &from, 0, 0);
    let left = kill(writer, folder.path());
    (folder, path, from, left)
}

#[test]
fn what_was_left_too_long_is_written_anew() {
    let (_folder, path, from, left) = killed_at_first();
    let file = left.join(layer_file_name(Layer(0)));
    fs::write(&file, [fs::read(&file).unwrap(), vec![0; 1 << 20]].concat()).unwrap();
    let mut writer = DumpWriter::create(&path, from.manifest()).unwrap();
    assert_eq!(written(&writer), []);
    for (layer, sequence) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
        write(&mut writer, &from, layer, sequence);
    }
    writer.finish().unwrap();
    Dump::open(&path).unwrap();
}

/// A line of the journal that no writer wrote, with checksums that are right.
#[test]
fn lines_of_other_layers_and_sequences_mean_nothing() {
    let (_folder, path, from, left) = killed_at_first();
    let journal = left.join("written.txt");
    let line = fs::read_to_string(&journal).unwrap();
    let sums = line.trim_end().rsplit(' ').next().unwrap();
    // Four tensors a sequence: the product wraps to 0, to 4 or to just below 2⁶⁴.
    let sequences = [1 << 62, 1 << 63, (1 << 62) + 1, u64::MAX, u64::MAX / 4, 3];
    let mut lines: String = sequences.map(|sequence| format!("0 {sequence} {sums}\n")).concat();
    for layer in [2, 1 << 62, u64::MAX] {
        lines += &format!("{layer} 0 {sums}\n");
    }
    fs::write(&journal, lines + &line).unwrap();
    let writer = DumpWriter::create(&path, from.manifest()).unwrap();
    assert_eq!(written(&writer), [(0, 0)]);
}

/// What stands in the place of a file of the dump is somebody's who put it there.
#[cfg(unix)]
#[test]
fn links_in_what_is_taken_over_are_not_written_through() {
    for (name, hard) in [
        (layer_file_name(Layer(1)), false),
        (layer_file_name(Layer(1)), true),
        ("written.txt".into(), false),
        ("written.txt".into(), true),
        ("manifest.json".into(), false),
        ("manifest.json".into(), true),
    ] {
        let (folder, path, from, left) = killed_at_first();
        // All that the dump would take for its own.
        let elsewhere = tempfile::tempdir_in(folder.path()).unwrap();
        let target = elsewhere.path().join("thesis");
        fs::rename(left.join(&name), &target).unwrap();
        let whole = fs::read(&target).unwrap();
        if hard {
            fs::hard_link(&target, left.join(&name)).unwrap();
        } else {
            std::os::unix::fs::symlink(&target, left.join(&name)).unwrap();
        }
        let created = DumpWriter::create(&path, from.manifest());
        if name == "manifest.json" {
            // Not known for the same dump: it begins anew.
            let mut writer = created.unwrap();
            assert_eq!(written(&writer), []);
            write(&mut writer, &from, 0, 0);
        } else {
            let error = created.unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::Io { .. }), "{message}");
            assert!(message.contains(&name) && message.contains("a link"), "{message}");
        }
        assert_eq!(fs::read(&target).unwrap(), whole, "{name}");
        assert!(!left.exists(), "the next dump begins anew");
    }
}

/// One that comes while the dump is written.
#[cfg(unix)]
#[test]
fn links_that_come_later_are_not_written_through() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let from = synthetic(7);
    let mut writer = DumpWriter::create(&path, from.manifest()).unwrap();
    let growing = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let put_link = |layer| {
        let file = growing.join(layer_file_name(Layer(layer)));
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/full", &file).unwrap();
    };
    put_link(1);
    let own = from.sequence(Layer(1), 0);
    let tensors = SequenceTensors { q: &own.q, k: &own.k, v: &own.v, g: &own.g };
    let message = writer.write(Layer(1), 0, tensors).unwrap_err().to_string();
    assert!(message.contains("layer-001") && message.contains("a link"), "{message}");
    assert!(!writer.is_written(Layer(1), 0));
}

#[test]
fn what_is_not_the_same_work_is_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    for other in [
        Synthetic { seed: 8, ..synthetic(7) },
        Synthetic { dtype: Dtype::F16, ..synthetic(7) },
        Synthetic { prefixes: vec![0, 5, 18], ..synthetic(7) },
    ] {
        let mut writer = DumpWriter::create(&path, other.manifest()).unwrap();
        write(&mut writer, &other, 1, 0);
        kill(writer, folder.path());
        let writer = DumpWriter::create(&path, synthetic(7).manifest()).unwrap();
        assert_eq!(written(&writer), []);
        assert!(!folder.path().join(".dump.partial-killed").exists());
    }
}

/// Two at once: the second one begins anew.
#[test]
fn a_running_dump_is_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let from = synthetic(7);
    let mut first = DumpWriter::create(&path, from.manifest()).unwrap();
    write(&mut first, &from, 0, 0);
    let second = DumpWriter::create_with(&path, from.manifest(), Existing::Replace).unwrap();
    assert_eq!(written(&second), []);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}
