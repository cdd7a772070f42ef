//! The dump format: what is written is read back, and everything else is refused by name.

use std::{
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use leank_core::{Dtype, KvHead, Layer, ModelShape};
use leank_train::{
    Error,
    dump::{Dump, DumpWriter, Existing, HeadData, Probe, SequenceTensors, layer_file_name},
    synthetic::Synthetic,
};

fn tiny(dtype: Dtype) -> Synthetic {
    Synthetic {
        shape: ModelShape::new(2, 4, 2, 8).unwrap(),
        prefixes: vec![0, 5, 17],
        positions: 3,
        draws: 2,
        dtype,
        seed: 7,
    }
}

struct TempDump {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn write(synthetic: &Synthetic) -> TempDump {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    synthetic.write(&path).unwrap();
    TempDump { _dir: dir, path }
}

/// Names in the parent of a dump: nothing temporary may stay.
fn siblings(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path.parent().unwrap()).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn what_is_written_is_read() {
    for (dtype, round) in [
        (Dtype::F32, (|x| x) as fn(f32) -> f32),
        (Dtype::F16, |x| f16::from_f32(x).to_f32()),
        (Dtype::Bf16, |x| bf16::from_f32(x).to_f32()),
    ] {
        let synthetic = tiny(dtype);
        let temp = write(&synthetic);
        assert_eq!(siblings(&temp.path), ["dump"]);
        let dump = Dump::open(&temp.path).unwrap();
        assert_eq!(dump.manifest(), &synthetic.manifest());
        let mut data = HeadData::default();
        for layer in [Layer(1), Layer(0)] {
            let reader = dump.layer(layer).unwrap();
            for sequence in [2, 0, 1] {
                let expected = synthetic.sequence(layer, sequence);
                let (n, t) = (3 * 8, (synthetic.prefixes[sequence] + 3) * 8);
                for head in 0..2 {
                    reader.read(KvHead(head), sequence, &mut data).unwrap();
                    let check = |found: &[f32], expected: &[f32]| {
                        let expected: Vec<_> = expected.iter().map(|&x| round(x)).collect();
                        assert_eq!(found, expected, "{dtype} {layer} {sequence} {head}");
                    };
                    check(&data.q, &expected.q[head * 2 * n..][..2 * n]);
                    check(&data.k, &expected.k[head * t..][..t]);
                    check(&data.v, &expected.v[head * t..][..t]);
                    for draw in 0..2 {
                        let own = &expected.g[(draw * 4 + head * 2) * n..][..2 * n];
                        check(&data.g[draw * 2 * n..][..2 * n], own);
                    }
                }
            }
            assert!(reader.read(KvHead(2), 0, &mut data).is_err());
            assert!(reader.read(KvHead(0), 3, &mut data).is_err());
        }
        assert!(matches!(dump.layer(Layer(2)), Err(Error::OutOfRange { .. })));
    }
}

/// Other programs read the layer files too.
#[test]
fn layer_files_are_safetensors() {
    let synthetic = tiny(Dtype::F32);
    let temp = write(&synthetic);
    let bytes = fs::read(temp.path.join(layer_file_name(Layer(1)))).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let g = tensors.tensor("g.1").unwrap();
    assert_eq!(g.shape(), [2, 4, 3, 8]);
    let expected: Vec<u8> =
        synthetic.sequence(Layer(1), 1).g.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(g.data(), expected);
    assert_eq!((g.data().as_ptr() as usize - bytes.as_ptr() as usize) % 8, 0);
}

#[test]
fn a_taken_target_is_refused() {
    let synthetic = tiny(Dtype::F16);
    let temp = write(&synthetic);
    let create = |path: &Path, existing| {
        DumpWriter::create_with(path, synthetic.manifest(), existing).map(drop)
    };
    let refused = |path: &Path, existing| {
        assert!(matches!(create(path, existing), Err(Error::Occupied { .. })), "{path:?}");
        let early = DumpWriter::check_target(path, existing);
        assert!(matches!(early, Err(Error::Occupied { .. })), "{path:?}");
    };
    refused(&temp.path, Existing::Refuse);
    create(&temp.path, Existing::Replace).unwrap();
    // Dropped without finish: the old dump stands, and nothing else.
    assert_eq!(siblings(&temp.path), ["dump"]);
    Dump::open(&temp.path).unwrap();

    let other = temp.path.with_file_name("other");
    fs::create_dir(&other).unwrap();
    create(&other, Existing::Refuse).unwrap();
    fs::write(other.join("thesis.tex"), "years of work").unwrap();
    refused(&other, Existing::Refuse);
    refused(&other, Existing::Replace);
    refused(&other.join("thesis.tex"), Existing::Replace);
}

#[test]
fn a_dump_is_replaced_when_the_new_one_is_whole() {
    let temp = write(&tiny(Dtype::F16));
    let new = Synthetic { seed: 8, ..tiny(Dtype::Bf16) };
    let mut writer =
        DumpWriter::create_with(&temp.path, new.manifest(), Existing::Replace).unwrap();
    for layer in [Layer(0), Layer(1)] {
        for sequence in 0..3 {
            let own = new.sequence(layer, sequence);
            let tensors = SequenceTensors { q: &own.q, k: &own.k, v: &own.v, g: &own.g };
            writer.write(layer, sequence, tensors).unwrap();
            let again = writer.write(layer, sequence, tensors);
            assert!(matches!(again, Err(Error::WriteOrder { .. })));
        }
    }
    let total = writer.total_bytes();
    writer.finish().unwrap();
    assert_eq!(Dump::open(&temp.path).unwrap().manifest(), &new.manifest());
    assert_eq!(siblings(&temp.path), ["dump"]);
    let files = fs::read_dir(&temp.path).unwrap();
    let found: u64 = files.map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(found, total);
}

#[test]
fn unfinished_dumps_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/dump");
    let synthetic = tiny(Dtype::F16);
    let mut writer = DumpWriter::create(&path, synthetic.manifest()).unwrap();
    let own = synthetic.sequence(Layer(0), 0);
    let tensors = SequenceTensors { q: &own.q, k: &own.k, v: &own.v, g: &own.g };
    writer.write(Layer(0), 0, tensors).unwrap();
    let short = SequenceTensors { k: &own.k[1..], ..tensors };
    assert!(matches!(writer.write(Layer(1), 0, short), Err(Error::Length { .. })));
    assert!(matches!(writer.write(Layer(2), 0, tensors), Err(Error::OutOfRange { .. })));
    assert!(matches!(writer.write(Layer(1), 3, tensors), Err(Error::OutOfRange { .. })));
    let missing = writer.finish().unwrap_err();
    assert!(matches!(missing, Error::WriteOrder { layer: Layer(0), sequence: 1, .. }), "{missing}");
    assert!(siblings(&path).is_empty());
}

#[test]
fn numbers_that_are_not_finite_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let synthetic = tiny(Dtype::F16);
    let mut writer = DumpWriter::create(&dir.path().join("dump"), synthetic.manifest()).unwrap();
    let mut own = synthetic.sequence(Layer(1), 2);
    // Draw 1, query head 3, position 2, channel 5.
    own.g[((4 + 3) * 3 + 2) * 8 + 5] = 1e6;
    let tensors = SequenceTensors { q: &own.q, k: &own.k, v: &own.v, g: &own.g };
    let error = writer.write(Layer(1), 2, tensors).unwrap_err().to_string();
    for part in [
        "layer 1, sequence 2, tensor g, draw 1, query head 3, position 2, channel 5",
        "1000000",
        "--dtype bf16",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn numbers_that_are_not_finite_are_found_when_read() {
    let synthetic = tiny(Dtype::F16);
    let temp = write(&synthetic);
    let file = temp.path.join(layer_file_name(Layer(0)));
    // Otherwise they are damage.
    strip_sums(&file);
    let mut bytes = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let offset = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let k = tensors.tensor("k.1").unwrap().data();
        k.as_ptr() as usize - bytes.as_ptr() as usize
    };
    assert!(offset > header);
    // KV head 1, token 6, channel 3 of 8 tokens.
    let at = offset + 2 * ((8 + 6) * 8 + 3);
    bytes[at..at + 2].copy_from_slice(&f16::NEG_INFINITY.to_le_bytes());
    fs::write(&file, &bytes).unwrap();
    let dump = Dump::open(&temp.path).unwrap();
    let mut data = HeadData::default();
    let layer = dump.layer(Layer(0)).unwrap();
    layer.read(KvHead(0), 1, &mut data).unwrap();
    let error = layer.read(KvHead(1), 1, &mut data).unwrap_err().to_string();
    for part in [
        "layer-000.safetensors",
        "layer 0, sequence 1, tensor k, KV head 1, token 6, channel 3 is -inf",
        "--dtype bf16",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn truncated_layer_files_are_refused() {
    let temp = write(&tiny(Dtype::F16));
    let file = temp.path.join(layer_file_name(Layer(1)));
    let bytes = fs::read(&file).unwrap();
    let mut lengths: Vec<_> = (0..bytes.len()).step_by(37).collect();
    lengths.extend([7, 8, 9, bytes.len() - 1]);
    for length in lengths {
        fs::write(&file, &bytes[..length]).unwrap();
        let error = Dump::open(&temp.path).unwrap_err();
        assert!(matches!(error, Error::LayerFile { .. }), "{length}: {error}");
    }
    fs::write(&file, [&bytes[..], b"x"].concat()).unwrap();
    assert!(matches!(Dump::open(&temp.path), Err(Error::LayerFile { .. })));
    fs::remove_file(&file).unwrap();
    assert!(matches!(Dump::open(&temp.path), Err(Error::Io { .. })));
}

/// Wherever it ends, and also when reading has begun: no signal ends the process.
#[test]
fn files_that_become_shorter_while_they_are_read_are_told() {
    let temp = write(&tiny(Dtype::F16));
    let path = temp.path.join(layer_file_name(Layer(1)));
    let bytes = fs::read(&path).unwrap();
    let dump = Dump::open(&temp.path).unwrap();
    let layer = dump.layer(Layer(1)).unwrap();
    let mut data = HeadData::default();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for length in (0..bytes.len() as u64).rev().step_by(53) {
        file.set_len(length).unwrap();
        let mut read = || {
            for sequence in 0..dump.manifest().sequences.len() {
                for head in dump.manifest().shape.kv_head_indices() {
                    layer.read(head, sequence, &mut data)?;
                }
            }
            Ok(())
        };
        let error: Error = read().unwrap_err();
        assert!(matches!(error, Error::LayerFile { .. }), "{length}: {error}");
        for word in ["layer-001.safetensors", "became shorter", "something else writes to it"] {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}

/// Whatever byte of the header changes, the file is refused or means the same.
#[test]
fn damaged_headers_are_refused() {
    let synthetic = tiny(Dtype::F16);
    let temp = write(&synthetic);
    let file = temp.path.join(layer_file_name(Layer(0)));
    let bytes = fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let read = || -> Result<HeadData, Error> {
        let dump = Dump::open(&temp.path)?;
        let mut data = HeadData::default();
        dump.layer(Layer(0))?.read(KvHead(1), 2, &mut data)?;
        Ok(data)
    };
    let whole = read().unwrap();
    for at in 0..header {
        let flip = [1, 0x10, 0x80][at % 3];
        let mut damaged = bytes.clone();
        damaged[at] ^= flip;
        fs::write(&file, &damaged).unwrap();
        if let Ok(data) = read() {
            assert_eq!((&data.k, &data.q), (&whole.k, &whole.q), "byte {at} ^ {flip}");
        }
    }
}

#[test]
fn a_layer_of_another_dump_is_refused() {
    let temp = write(&tiny(Dtype::F16));
    let other = write(&Synthetic { seed: 8, ..tiny(Dtype::F16) });
    let (zero, one) = (layer_file_name(Layer(0)), layer_file_name(Layer(1)));
    let own = fs::read(temp.path.join(&zero)).unwrap();
    fs::copy(other.path.join(&zero), temp.path.join(&zero)).unwrap();
    let error = Dump::open(&temp.path).unwrap_err();
    assert!(matches!(error, Error::OtherDump { what: "the id of the manifest", .. }), "{error}");
    fs::write(temp.path.join(&zero), &own).unwrap();
    fs::write(temp.path.join(&one), &own).unwrap();
    let error = Dump::open(&temp.path).unwrap_err();
    assert!(matches!(error, Error::OtherDump { what: "the layer", .. }), "{error}");
}

/// Without the optional checksums, as another program may write a layer file.
fn strip_sums(file: &Path) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let metadata = header["__metadata__"].as_object_mut().unwrap();
    let sums = metadata.remove("leank.sums").unwrap();
    // Three sequences, two KV heads, q, k, v and two draws.
    assert_eq!(sums.as_str().unwrap().len(), 3 * 2 * 5 * 8);
    assert_ne!(sums.as_str().unwrap(), "0".repeat(240));
    let mut json = header.to_string().into_bytes();
    json.resize(length, b' ');
    fs::write(file, [&bytes[..8], &json, &bytes[8 + length..]].concat()).unwrap();
}

/// Text of the same name may have changed: then all that the manifest says is the same.
#[test]
fn the_id_covers_the_activations() {
    let synthetic = tiny(Dtype::F16);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, seed| {
        let other = Synthetic { seed, ..tiny(Dtype::F16) };
        other.write_as(&dir.path().join(name), synthetic.manifest()).unwrap()
    };
    let (a, b, changed) = (write("a", 7), write("b", 7), write("changed", 8));
    let manifest = |dump: &Dump| fs::read(dump.dir().join("manifest.json")).unwrap();
    assert_eq!(manifest(&a), manifest(&changed));
    assert_eq!(a.id(), b.id());
    assert_ne!(a.id(), changed.id());

    // A layer that is replaced by one of another dump with the same manifest.
    let layer = layer_file_name(Layer(1));
    fs::copy(changed.dir().join(&layer), b.dir().join(&layer)).unwrap();
    let error = b.layer(Layer(1)).unwrap_err();
    assert!(
        matches!(error, Error::OtherDump { what: "the digest of the checksums", .. }),
        "{error}"
    );
    let mixed = Dump::open(b.dir()).unwrap();
    assert!(mixed.id() != a.id() && mixed.id() != changed.id());

    // Checksums are optional.
    for dump in [&a, &changed] {
        (0..2).for_each(|layer| strip_sums(&dump.dir().join(layer_file_name(Layer(layer)))));
    }
    let bare = Dump::open(a.dir()).unwrap();
    assert_eq!(bare.id(), leank_core::files::sha256_hex(&manifest(&a)));
    assert_eq!(bare.id(), Dump::open(changed.dir()).unwrap().id());
}

#[test]
fn hostile_manifests_are_refused() {
    let temp = write(&tiny(Dtype::F16));
    let file = temp.path.join("manifest.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let open_with = |pointer: &str, value: serde_json::Value| {
        let mut changed = json.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        fs::write(&file, changed.to_string()).unwrap();
        Dump::open(&temp.path).unwrap_err()
    };
    for (pointer, value) in [
        ("/draws", 0u64),
        ("/draws", u64::MAX),
        ("/positions", 0),
        ("/positions", 1 << 40),
        ("/shape/layers", 0),
        ("/shape/layers", 1 << 50),
        ("/shape/kv_heads", 3),
        ("/shape/head_dim", 0),
        ("/shape/head_dim", 4096),
        ("/fingerprint/shape/layers", 3),
        ("/sequences/0/prefix", u64::MAX),
        ("/sequences/0/prefix", 1 << 60),
        ("/sequences/0/valid/0", 1),
        ("/sequences/0/valid/2", 3),
        ("/sequences/0/valid/2", 1 << 33),
        ("/seed", 3),
    ] {
        let error = open_with(pointer, value.into());
        let fits = matches!(error, Error::Manifest { .. } | Error::OtherDump { .. });
        assert!(fits, "{pointer} {value}: {error}");
    }
    let error = open_with("/version", 2.into());
    assert!(matches!(error, Error::Version { found: 2, supported: 1, .. }), "{error}");
    // Sizes that are legal one by one, but not those of the files.
    let error = open_with("/sequences/0/prefix", (1u64 << 27).into());
    assert!(matches!(error, Error::LayerFile { .. } | Error::OtherDump { .. }), "{error}");
    for bytes in [&b""[..], b"{", b"[]", b"{\"version\":1}", b"\xff\xfe"] {
        fs::write(&file, bytes).unwrap();
        assert!(matches!(Dump::open(&temp.path), Err(Error::Manifest { .. })));
    }
}

/// A manifest of so many sequences as their headers may describe, or one more.
fn many_sequences(sequences: usize) -> leank_train::dump::Manifest {
    let synthetic = Synthetic {
        shape: ModelShape::new(1, 1, 1, 1).unwrap(),
        prefixes: vec![0; sequences],
        positions: 1,
        draws: 1,
        ..tiny(Dtype::F16)
    };
    synthetic.manifest()
}

/// Numbers that are possible one by one ask for a header that no reader of safetensors takes.
#[test]
fn headers_beyond_all_are_refused_before_they_are_written_or_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dump").join("manifest.json");
    // 512 bytes each.
    let (most, beyond) = (many_sequences(195_000), many_sequences(196_000));
    most.validate(&file).unwrap();
    let error = DumpWriter::create(&dir.path().join("dump"), beyond.clone()).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Manifest { .. }), "{message}");
    assert!(message.contains("manifest.json") && message.contains("fewer sequences"), "{message}");
    assert!(fs::read_dir(dir.path()).unwrap().next().is_none());

    fs::create_dir(dir.path().join("dump")).unwrap();
    fs::write(&file, serde_json::to_vec(&beyond).unwrap()).unwrap();
    let error = Dump::open(&dir.path().join("dump")).unwrap_err();
    assert!(matches!(error, Error::Manifest { .. }), "{error}");
}

/// On the disk it takes some kilobytes.
#[test]
fn a_sparse_header_gets_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(layer_file_name(Layer(0)));
    let manifest = many_sequences(195_000);
    let data: u64 = 195_000 * 4 * 2;
    fs::write(dir.path().join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    for (header, why) in [(100_000_001, "more than any layer has"), (100_000_000, "not valid")] {
        let mut file = fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, &u64::to_le_bytes(header)).unwrap();
        file.set_len(8 + header + data).unwrap();
        let error = Dump::open(dir.path()).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::LayerFile { .. }), "{message}");
        assert!(message.contains("layer-000") && message.contains(why), "{message}");
    }
}

#[test]
fn probes_have_names() {
    for probe in Probe::ALL {
        assert_eq!(probe.to_string().parse::<Probe>().unwrap(), probe);
        assert_eq!(serde_json::to_value(probe).unwrap(), probe.to_string());
    }
    let message = "Fisher".parse::<Probe>().unwrap_err().to_string();
    assert!(message.contains("fisher and random"), "{message}");
}

#[test]
fn what_a_killed_dump_left_is_removed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let synthetic = tiny(Dtype::F16);
    // Leaked: as if its process had been killed, but for the lock.
    let killed = DumpWriter::create(&path, synthetic.manifest()).unwrap();
    let left = siblings(&path);
    let running = DumpWriter::create(&path, synthetic.manifest()).unwrap();
    assert_eq!(siblings(&path).len(), 2, "both are being written");
    drop(killed);
    // One of another dump, and its own but for the last byte, which would give it another id.
    let json = synthetic.manifest().to_json(&path).unwrap();
    for manifest in [&b"{}"[..], &json[..json.len() - 1]] {
        fs::create_dir(dir.path().join(&left[0])).unwrap();
        fs::write(dir.path().join(&left[0]).join("manifest.json"), manifest).unwrap();
        let next = DumpWriter::create(&path, synthetic.manifest()).unwrap();
        assert!(!siblings(&path).contains(&left[0]), "taken over, or not removed");
        drop(next);
    }
    let names = siblings(&path);
    assert!(names.len() == 1 && names != left, "{names:?}");
    drop(running);
    assert!(siblings(&path).is_empty());
}
