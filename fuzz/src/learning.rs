//! Bytes that claim to be a dump, or a record of learning.

use std::{fs, path::PathBuf, sync::LazyLock};

use leank_core::{Dtype, KvHead, ModelShape, Windows, files::sha256_hex};
use leank_train::{
    Error,
    allocate::{AllocateOptions, Budget, allocate},
    dump::{Dump, HeadData, Manifest},
    learn::{LearnOptions, learn, recorded},
    synthetic::Synthetic,
};

use crate::{
    folder::{Folder, names},
    split,
};

/// The manifest of an activation dump.
pub fn manifest(data: &[u8]) {
    if let Ok(manifest) = Manifest::from_json(data, crate::name()) {
        let json = manifest.to_json(crate::name()).expect("what was read can be written");
        let again =
            Manifest::from_json(&json, crate::name()).expect("what was written can be read");
        assert_eq!(again, manifest);
        for sequence in 0..manifest.sequences.len() {
            assert!(manifest.tokens(sequence) >= manifest.positions);
        }
    }
}

/// Before the id of the manifest in a layer file's header.
const MARK: &[u8] = b"leank.dump\":\"";

/// A whole dump of one layer: the manifest behind its length (two bytes), then the layer's file. The
/// file is marked as this manifest's, which would otherwise keep a fuzzer out.
pub fn dump(data: &[u8]) {
    let Some((manifest, layer)) = split(data) else { return };
    let mut layer = layer.to_vec();
    let id = sha256_hex(manifest);
    if let Some(at) = layer.windows(MARK.len()).position(|bytes| bytes == MARK)
        && let Some(mark) = layer.get_mut(at + MARK.len()..at + MARK.len() + id.len())
    {
        mark.copy_from_slice(id.as_bytes());
    }
    let folder = Folder::of(&[("manifest.json", manifest), ("layer-000.safetensors", &layer)]);
    if let Err(error) = read_all(&folder) {
        names(&error, folder.path());
    }
}

fn read_all(folder: &Folder) -> Result<(), Error> {
    let dump = Dump::open(folder.path())?;
    let (shape, sequences) = (dump.manifest().shape, dump.manifest().sequences.len());
    let mut data = HeadData::default();
    for layer in shape.layer_indices() {
        let layer = dump.layer(layer)?;
        for head in shape.kv_head_indices() {
            for sequence in 0..sequences {
                layer.read(head, sequence, &mut data)?;
                let read = [&data.q, &data.g, &data.k, &data.v];
                assert!(read.into_iter().flatten().all(|x| x.is_finite()));
            }
        }
        assert!(matches!(
            layer.read(KvHead(shape.kv_heads), 0, &mut data),
            Err(Error::OutOfRange { .. })
        ));
    }
    Ok(())
}

/// A dump, and the records of learning from it: where they lie, and what they hold.
struct Learned {
    _folder: Folder,
    dump: Dump,
    options: LearnOptions,
    /// Of the curves, and of the losses in 16, 8 and 4 bits.
    records: [(PathBuf, Vec<u8>); 2],
}

static LEARNED: LazyLock<Learned> = LazyLock::new(|| {
    let folder = Folder::new();
    let synthetic = Synthetic {
        shape: ModelShape::new(1, 2, 2, 8).expect("a small shape"),
        prefixes: vec![24],
        positions: 4,
        draws: 1,
        dtype: Dtype::F32,
        seed: 7,
    };
    let dump = synthetic.write(&folder.path().join("dump")).expect("there is space");
    let options = LearnOptions {
        windows: Windows { sink: 2, recent: 4 },
        step: 4,
        threads: 1,
        precisions: true,
        ..LearnOptions::default()
    };
    learn(&dump, &options, &|_| {}).expect("a sound dump");
    let learned = fs::read_dir(dump.dir().join("learn")).expect("it was made").next();
    let learned = learned.expect("one way of learning").expect("it can be read").path();
    let name = "layer-000.json";
    let records = [learned.join(name), learned.join("precisions").join(name)]
        .map(|path| (path.clone(), fs::read(&path).expect("it was written")));
    Learned { _folder: folder, dump, options, records }
});

/// Before the checksum of a record, in its front.
const SUM: &[u8] = b"{\"sum\":\"";

/// A record of learning, of curves or (first byte odd) of losses in fewer bits. `"@"` stands for the id
/// of its dump, and a checksum is made right.
pub fn record(data: &[u8]) {
    let Some((&kind, text)) = data.split_first() else { return };
    let own = &*LEARNED;
    let (path, sound) = &own.records[usize::from(kind & 1)];
    let mut record = text.to_vec();
    if let Some(at) = record.windows(3).position(|bytes| bytes == b"\"@\"") {
        record.splice(at + 1..at + 2, own.dump.id().bytes());
    }
    let front = SUM.len() + 8;
    if record.starts_with(SUM) && record.len() >= front {
        let sum = format!("{:08x}", crc32fast::hash(&record[front..]));
        record[SUM.len()..front].copy_from_slice(sum.as_bytes());
    }
    fs::write(path, &record).expect("there is space");
    match recorded(&own.dump, &own.options) {
        Ok(curves) => {
            let curves = curves.expect("they are there");
            let shape = own.dump.manifest().shape;
            let budget =
                AllocateOptions { alignment: 4, ..AllocateOptions::new(Budget::KRatio(0.5)) };
            // Counts that are no multiples of the alignment are refused here.
            if let Ok(found) = allocate(&curves, &shape, &budget) {
                for (head, &count) in curves.heads.iter().zip(&found.counts) {
                    assert_eq!(head.kept(count).len(), count);
                }
            }
            let importance = curves.importance();
            assert_eq!(importance.len(), shape.kv_heads * shape.head_dim);
            assert!(importance.iter().all(|x| x.is_finite()), "{importance:?}");
        }
        Err(error) => {
            assert!(matches!(error, Error::Record { .. }), "{error:?}");
            let message = error.to_string();
            assert!(message.contains("layer-000.json"), "no file is named: {message}");
        }
    }
    fs::write(path, sound).expect("there is space");
}
