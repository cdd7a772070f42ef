//! Layers measured apart are learned from as those of one run.

use std::{
    fs,
    path::{Path, PathBuf},
};

use leank_core::{Dtype, ModelShape, Windows};
use leank_train::{
    Error,
    allocate::{AllocateOptions, Budget},
    dump::Dump,
    learn::{LearnOptions, Method, learn_mask, measure_layers},
    merge::{Merged, merge},
    synthetic::Synthetic,
};

struct Fixture {
    _folder: tempfile::TempDir,
    path: PathBuf,
    dump: Dump,
}

fn fixture(seed: u64) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    let synthetic = Synthetic {
        shape: ModelShape::new(5, 4, 2, 16).unwrap(),
        prefixes: vec![50, 80],
        positions: 8,
        draws: 2,
        dtype: Dtype::F16,
        seed,
    };
    let dump = synthetic.write(&path).unwrap();
    Fixture { _folder: folder, path, dump }
}

fn options(records: &Path, precisions: bool) -> LearnOptions {
    LearnOptions {
        windows: Windows { sink: 4, recent: 8 },
        step: 4,
        threads: 1,
        records: Some(records.to_owned()),
        precisions,
        ..LearnOptions::default()
    }
}

#[test]
fn shards_make_the_mask_of_one_run() {
    let fixture = fixture(1);
    let at = |name: &str| fixture.path.with_file_name(name);
    let budget = AllocateOptions {
        alignment: 4,
        offer: "k16,k8,v16,v4".parse().unwrap(),
        ..AllocateOptions::new(Budget::Bytes(0.3))
    };
    let whole = learn_mask(&fixture.dump, &options(&at("whole"), true), &budget, &|_| {}).unwrap();
    for (name, layers) in [("a", 0..2), ("b", 2..4), ("c", 4..5), ("again", 4..5)] {
        measure_layers(&fixture.dump, &options(&at(name), true), layers, &|_| {}).unwrap();
    }
    let merged = merge(&at("all"), &[at("a"), at("b")]).unwrap();
    // Curves and precisions of each layer.
    assert_eq!(merged, Merged { new: 8, same: 0 });
    let merged = merge(&at("all"), &[at("c"), at("again"), at("a")]).unwrap();
    assert_eq!(merged, Merged { new: 2, same: 6 });
    let computed = std::sync::Mutex::new(Vec::new());
    let found = learn_mask(&fixture.dump, &options(&at("all"), true), &budget, &|progress| {
        computed.lock().unwrap().push(progress.done - progress.reused);
    });
    assert_eq!(found.unwrap(), whole);
    assert!(computed.into_inner().unwrap().iter().all(|&n| n == 0), "nothing was left to measure");
}

#[test]
fn layers_that_are_not_there_are_refused() {
    let fixture = fixture(1);
    let records = fixture.path.with_file_name("records");
    for layers in [3..6, 2..2, 7..9] {
        let error = measure_layers(&fixture.dump, &options(&records, false), layers, &|_| {});
        assert!(matches!(error, Err(Error::Options { option: "layers", .. })));
    }
    let leank = LearnOptions { method: Method::LeanK, ..options(&records, false) };
    let error = measure_layers(&fixture.dump, &leank, 0..2, &|_| {}).unwrap_err();
    assert!(error.to_string().contains("over all layers"), "{error}");
}

#[test]
fn records_that_do_not_belong_together_are_refused() {
    let (one, other) = (fixture(1), fixture(2));
    let at = |name: &str| one.path.with_file_name(name);
    measure_layers(&one.dump, &options(&at("a"), false), 0..2, &|_| {}).unwrap();
    measure_layers(&other.dump, &options(&at("other"), false), 2..3, &|_| {}).unwrap();
    let refused = |into: &str, from: &[&str], words: &[&str]| {
        let from: Vec<_> = from.iter().map(|name| at(name)).collect();
        let error = merge(&at(into), &from).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{error}");
        }
        assert!(!at(into).exists(), "nothing is written after an error");
    };
    refused("all", &["a", "other"], &["another dump", "layer-002.json"]);
    refused("all", &["nothing", "is"], &["no learning record"]);

    let record = |name: &str| {
        let method = fs::read_dir(at(name)).unwrap().next().unwrap().unwrap().path();
        method.join("layer-001.json")
    };
    measure_layers(&one.dump, &options(&at("b"), false), 1..2, &|_| {}).unwrap();
    let whole = fs::read_to_string(record("b")).unwrap();
    fs::write(record("b"), whole.replacen("0.", "0.5", 1)).unwrap();
    refused("all", &["a", "b"], &["layer-001.json", "its checksum is"]);
    // As an older leank wrote them, without a checksum.
    let whole = format!("{{{}", whole.split_once("\",").unwrap().1);
    fs::write(record("b"), whole.replacen("0.", "0.5", 1)).unwrap();
    refused("all", &["a", "b"], &["layer-001.json", "differs from"]);
    fs::write(record("b"), &whole[..whole.len() / 8]).unwrap();
    refused("all", &["a", "b"], &["layer-001.json", "not a usable learning record"]);
    fs::write(record("b"), whole.replacen("\"layer\":1", "\"layer\":3", 1)).unwrap();
    refused("all", &["a", "b"], &["layer-001.json", "of layer 3"]);
}
