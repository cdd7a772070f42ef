//! Learning from end to end on made-up dumps.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};

use half::f16;
use leank_core::{Dtype, KvHead, Layer, ModelShape, Windows};
use leank_train::{
    Error,
    allocate::{AllocateOptions, Budget},
    dump::{Dump, layer_file_name},
    learn::{LearnOptions, Learned, Method, learn, learn_mask, recorded},
    order::HeadCurve,
    stats::{HeadEvaluator, HeadMask},
    synthetic::Synthetic,
};

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    dump: Dump,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let dump = Synthetic {
        shape: ModelShape::new(3, 4, 2, 16).unwrap(),
        prefixes: vec![40, 61, 90],
        positions: 9,
        draws: 2,
        dtype: Dtype::F16,
        seed: 5,
    }
    .write(&path)
    .unwrap();
    Fixture { _dir: dir, path, dump }
}

fn options(method: Method) -> LearnOptions {
    LearnOptions {
        method,
        windows: Windows { sink: 3, recent: 8 },
        step: 4,
        threads: 2,
        ..LearnOptions::default()
    }
}

fn budget(budget: Budget) -> AllocateOptions {
    AllocateOptions { alignment: 4, ..AllocateOptions::new(budget) }
}

/// Learns and counts what was computed rather than read.
fn counted(dump: &Dump, options: &LearnOptions, own: &AllocateOptions) -> (Learned, usize) {
    let last = Mutex::new(std::collections::BTreeMap::new());
    let learned = learn_mask(dump, options, own, &|progress| {
        assert!(progress.done <= progress.total);
        let mut last = last.lock().unwrap();
        let entry = last.entry(progress.phase.to_owned()).or_insert(0);
        *entry = (progress.total - progress.reused).max(*entry);
    })
    .unwrap();
    (learned, last.into_inner().unwrap().values().sum())
}

/// All record files under a dump.
fn records(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![path.join("learn")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { directories.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

#[test]
fn every_method_meets_its_budget_and_says_what_it_did() {
    let fixture = fixture();
    for method in Method::ALL {
        for (own, limit) in [(Budget::KRatio(0.5), 0.5), (Budget::Bytes(0.6), 0.6)] {
            let learned = counted(&fixture.dump, &options(method), &budget(own)).0;
            let summary = learned.mask.summary();
            match own {
                Budget::Bytes(_) => assert!(summary.middle_bytes <= limit + 1e-9, "{method}"),
                // Quantile and rounding may miss the ratio either way.
                _ if matches!(method, Method::E2 | Method::E1) => assert_eq!(summary.kept_k, limit),
                _ => assert!((summary.kept_k - limit).abs() < 0.2, "{method} {}", summary.kept_k),
            }
            let info = learned.mask.info();
            assert_eq!(info.method, Some(method.to_string()));
            assert_eq!(info.budget, Some(own.to_string()));
            assert_eq!(info.windows, Some(Windows { sink: 3, recent: 8 }));
            assert_eq!(info.alignment, Some(4));
            assert_eq!(info.fingerprint.as_ref(), Some(&fixture.dump.manifest().fingerprint));
            // A probe without gradients predicts no KL.
            assert_eq!(info.predicted_kl, None);
            learned.mask.check_model(&fixture.dump.manifest().fingerprint).unwrap();
            assert_eq!(learned.mask.scores().unwrap().len(), 3 * 2 * 16);
        }
    }
}

/// Losses of curves and allocations are those of the masks they stand for.
#[test]
fn losses_are_exact() {
    let fixture = fixture();
    for method in Method::ALL {
        let learned = counted(&fixture.dump, &options(method), &budget(Budget::KRatio(0.6))).0;
        let mut sum = 0.0;
        for layer in (0..3).map(Layer) {
            let reader = fixture.dump.layer(layer).unwrap();
            for head in (0..2).map(KvHead) {
                let windows = Windows { sink: 3, recent: 8 };
                let mut evaluator = HeadEvaluator::new(&reader, head, windows);
                let kept = learned.mask.head(layer, head).kept().to_vec();
                sum += evaluator.evaluate(&[HeadMask::Kept(kept)], None).unwrap().losses[0];
            }
        }
        let found = learned.allocation.loss;
        assert!((found - sum).abs() < 1e-4 * sum + 1e-10, "{method}: {found} {sum}");
        assert!(sum > 0.0);
    }
}

/// On dumps where some channels matter more, every method must see it, and the better ones more.
#[test]
fn better_methods_lose_less() {
    let fixture = fixture();
    // By bytes, which no method exceeds: quantile and rounding may miss a K ratio.
    let loss = |method| {
        counted(&fixture.dump, &options(method), &budget(Budget::Bytes(0.7))).0.allocation.loss
    };
    let [e2, e1, fixed, leank] = Method::ALL.map(loss);
    assert!(e2 <= 1.02 * e1, "E2 {e2}, E1 {e1}");
    assert!(e1 < fixed, "E1 {e1}, static {fixed}");
    assert!(e2 < leank, "E2 {e2}, LeanK {leank}");
    let random = {
        let curves = learn(&fixture.dump, &options(Method::E2), &|_| {}).unwrap();
        // The opposite order keeps the least important channels.
        let reader = fixture.dump.layer(Layer(0)).unwrap();
        let mut evaluator = HeadEvaluator::new(&reader, KvHead(0), Windows { sink: 3, recent: 8 });
        let first = &curves.heads[0];
        let worst = HeadMask::Kept(first.order[..8].to_vec());
        evaluator.evaluate(&[worst], None).unwrap().losses[0] / first.loss(8).unwrap()
    };
    assert!(random > 5.0, "{random}");
}

#[test]
fn curves_are_whole() {
    let fixture = fixture();
    for method in [Method::E2, Method::E1, Method::Static] {
        let curves = learn(&fixture.dump, &options(method), &|_| {}).unwrap();
        assert_eq!(curves.heads.len(), 6);
        for HeadCurve { order, counts, losses, .. } in &curves.heads {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..16));
            assert_eq!(counts, &[0, 4, 8, 12, 16]);
            assert_eq!(losses[4], 0.0);
            assert!(losses[..3].iter().all(|&loss| loss > 0.0), "{losses:?}");
        }
    }
}

#[test]
fn nothing_is_computed_twice() {
    let fixture = fixture();
    for method in [Method::E2, Method::E1, Method::Static] {
        let (_, computed) = counted(&fixture.dump, &options(method), &budget(Budget::KRatio(0.5)));
        assert_eq!(computed, 6);
        for other in [Budget::KRatio(0.7), Budget::Bytes(0.4)] {
            assert_eq!(counted(&fixture.dump, &options(method), &budget(other)).1, 0);
        }
        // Other windows are another problem.
        let other = LearnOptions { windows: Windows { sink: 0, recent: 8 }, ..options(method) };
        assert_eq!(counted(&fixture.dump, &other, &budget(Budget::KRatio(0.5))).1, 6);
    }
    let leank = options(Method::LeanK);
    let own = budget(Budget::KRatio(0.5));
    assert_eq!(counted(&fixture.dump, &leank, &own).1, 18);
    assert_eq!(counted(&fixture.dump, &leank, &own).1, 0);
}

#[test]
fn a_killed_run_resumes_to_the_same_mask() {
    for method in Method::ALL {
        let fixture = fixture();
        let own = budget(Budget::Bytes(0.5));
        let expected = counted(&fixture.dump, &options(method), &own).0;
        let all = records(&fixture.path);
        for lost in 1..3 {
            for record in all.iter().filter(|p| p.ends_with(format!("layer-00{lost}.json"))) {
                fs::remove_file(record).unwrap();
                // What it was writing when it was killed.
                fs::write(record.with_file_name(".leank-Ab12Cd.tmp"), "{\"version\":1,").unwrap();
            }
            let (found, computed) = counted(&fixture.dump, &options(method), &own);
            assert!(computed > 0);
            assert_eq!(found, expected, "{method}");
            assert_eq!(records(&fixture.path), all);
        }
    }
}

/// A run that stops at the first broken layer keeps what it finished before.
#[test]
fn a_failed_run_keeps_finished_layers() {
    let fixture = fixture();
    let file = fixture.path.join(layer_file_name(Layer(1)));
    let whole = fs::read(&file).unwrap();
    let mut broken = whole.clone();
    let at = broken.len() - 6;
    broken[at..at + 2].copy_from_slice(&f16::NAN.to_le_bytes());
    fs::write(&file, &broken).unwrap();
    let one_thread = LearnOptions { threads: 1, ..options(Method::E2) };
    let own = budget(Budget::KRatio(0.5));
    let error = learn_mask(&fixture.dump, &one_thread, &own, &|_| {}).unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Damaged { .. }), "{message}");
    for part in ["layer-001.safetensors", "sequence 2, tensor v, KV head 1"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(records(&fixture.path).len(), 1);
    fs::write(&file, &whole).unwrap();
    let (resumed, computed) = counted(&fixture.dump, &one_thread, &own);
    assert_eq!(computed, 4);
    let fresh = LearnOptions { records: Some(fixture.path.join("elsewhere")), ..one_thread };
    assert_eq!(learn_mask(&fixture.dump, &fresh, &own, &|_| {}).unwrap(), resumed);
}

#[test]
fn threads_change_nothing() {
    for method in Method::ALL {
        let fixture = fixture();
        let own = budget(Budget::KRatio(0.6));
        let masks: Vec<_> = [1, 2, 5]
            .map(|threads| {
                let records = Some(fixture.path.join(format!("records-{threads}")));
                let options = LearnOptions { threads, records, ..options(method) };
                learn_mask(&fixture.dump, &options, &own, &|_| {}).unwrap()
            })
            .into();
        assert!(masks.windows(2).all(|pair| pair[0] == pair[1]), "{method}");
    }
}

#[test]
fn what_is_recorded_is_read_and_nothing_is_computed() {
    let fixture = fixture();
    let options = options(Method::E2);
    let in_bits = LearnOptions { precisions: true, ..options.clone() };
    assert_eq!(recorded(&fixture.dump, &options).unwrap(), None);
    assert!(!fixture.path.join("learn").exists(), "reading records writes none");
    let curves = learn(&fixture.dump, &options, &|_| {}).unwrap();
    assert_eq!(recorded(&fixture.dump, &options).unwrap(), Some(curves));
    assert_eq!(recorded(&fixture.dump, &in_bits).unwrap(), None);
    let curves = learn(&fixture.dump, &in_bits, &|_| {}).unwrap();
    assert_eq!(recorded(&fixture.dump, &in_bits).unwrap(), Some(curves));
    // A layer that is damaged, and one that is missing.
    let record = records(&fixture.path).remove(0);
    fs::write(&record, "{}").unwrap();
    assert!(matches!(recorded(&fixture.dump, &options), Err(Error::Record { .. })));
    fs::remove_file(&record).unwrap();
    assert_eq!(recorded(&fixture.dump, &options).unwrap(), None);
    let leank = LearnOptions { method: Method::LeanK, ..options };
    let error = recorded(&fixture.dump, &leank).unwrap_err();
    assert!(error.to_string().contains("no curves"), "{error}");
}

#[test]
fn damaged_records_are_refused_by_name() {
    let fixture = fixture();
    let own = budget(Budget::KRatio(0.5));
    counted(&fixture.dump, &options(Method::E2), &own);
    let record = records(&fixture.path).pop().unwrap();
    let whole = fs::read_to_string(&record).unwrap();
    // As an older leank wrote it, without a checksum: each of its parts is looked at.
    let json = format!("{{{}", whole.split_once("\",").unwrap().1);
    for (damaged, why) in [
        (whole.replacen("\"layer\":2", "\"layer\":1", 1), "its checksum is"),
        (json[..json.len() / 2].to_owned(), "EOF"),
        (json.replacen("\"layer\":2", "\"layer\":1", 1), "its layer is 1 where 2"),
        (json.replacen("\"version\":1", "\"version\":9", 1), "its version is 9"),
        (json.replacen(fixture.dump.id(), "0123", 1), "its dump is 0123"),
        (json.replacen("\"order\":[", "\"order\":[0,", 1), "not a permutation"),
        (json.replacen("\"counts\":[0,", "\"counts\":[1,", 1), "do not ascend"),
        (json.replacen("\"losses\":[", "\"losses\":[1e300,", 1), "not one finite number"),
    ] {
        assert_ne!(damaged, json, "{why}");
        fs::write(&record, damaged).unwrap();
        let error = learn_mask(&fixture.dump, &options(Method::E2), &own, &|_| {}).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Record { .. }), "{message}");
        assert!(message.contains(why) && message.contains("delete the file"), "{message}");
    }
    fs::write(&record, json).unwrap();
    assert!(recorded(&fixture.dump, &options(Method::E2)).unwrap().is_some());
}

#[test]
fn wrong_options_are_refused_before_anything_runs() {
    let fixture = fixture();
    let refuse = |options: &LearnOptions, own: &AllocateOptions, option: &str| {
        let error = learn_mask(&fixture.dump, options, own, &|_| panic!("it ran")).unwrap_err();
        assert!(matches!(error, Error::Options { .. }), "{error}");
        assert!(error.to_string().starts_with(option), "{error}");
    };
    let half = budget(Budget::KRatio(0.5));
    for method in Method::ALL {
        let fine = options(method);
        refuse(&LearnOptions { step: 0, ..fine.clone() }, &half, "step");
        refuse(&LearnOptions { step: 17, ..fine.clone() }, &half, "step");
        refuse(&fine, &AllocateOptions { alignment: 5, ..half.clone() }, "alignment");
        // A step that follows from the alignment is not what is wrong.
        for alignment in [0, 5, 100] {
            let follows = LearnOptions { step: alignment, ..fine.clone() };
            refuse(&follows, &AllocateOptions { alignment, ..half.clone() }, "alignment");
        }
        refuse(&fine, &AllocateOptions { exempt: vec![Layer(3)], ..half.clone() }, "exempt");
        refuse(&fine, &budget(Budget::KRatio(1.01)), "k-ratio");
        refuse(&fine, &budget(Budget::Bytes(f64::NAN)), "bytes");
    }
    assert!("e3".parse::<Method>().is_err());
    for method in Method::ALL {
        assert_eq!(method.to_string().parse::<Method>().unwrap(), method);
    }
}

#[test]
fn exempt_layers_stay_whole() {
    let fixture = fixture();
    for method in Method::ALL {
        let own = AllocateOptions { exempt: vec![Layer(1)], ..budget(Budget::Bytes(0.6)) };
        let learned = counted(&fixture.dump, &options(method), &own).0;
        assert!(learned.mask.layer(Layer(1)).iter().all(|head| head.keeps_all()), "{method}");
        assert!(learned.mask.is_exempt(Layer(1)));
        assert!(learned.mask.summary().middle_bytes <= 0.6);
        let own = AllocateOptions { exempt: vec![Layer(1)], ..budget(Budget::Bytes(0.3)) };
        let error = learn_mask(&fixture.dump, &options(method), &own, &|_| {}).unwrap_err();
        assert!(matches!(error, Error::Budget { .. }), "{error}");
    }
}

#[test]
fn windows_that_leave_no_middle_are_refused() {
    let fixture = fixture();
    let own = budget(Budget::KRatio(0.5));
    // The last of 9 positions after a prefix of 90 sees 99 tokens.
    for windows in [
        Windows::EVERYTHING,
        Windows { sink: 99, recent: 0 },
        Windows { sink: 9, recent: 90 },
        Windows { sink: usize::MAX, recent: usize::MAX },
    ] {
        for method in Method::ALL {
            let all = LearnOptions { windows, ..options(method) };
            let error = learn_mask(&fixture.dump, &all, &own, &|_| panic!("it ran")).unwrap_err();
            assert!(matches!(error, Error::NoMiddle { tokens: 99, .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains(&format!("recent {}", windows.recent)), "{message}");
        }
        let manifest = fixture.dump.manifest();
        assert_eq!(manifest.positions_with_middle(windows), 0);
    }
}

#[test]
fn positions_without_a_middle_are_counted() {
    let fixture = fixture();
    let without = |windows| {
        let options = LearnOptions { windows, ..options(Method::Static) };
        counted(&fixture.dump, &options, &budget(Budget::KRatio(0.5))).0.without_middle
    };
    assert_eq!(without(Windows { sink: 3, recent: 8 }), 0);
    // Position n of the first sequence sees 41 + n tokens: the first five no more than 45.
    assert_eq!(without(Windows { sink: 5, recent: 40 }), 5);
    assert_eq!(without(Windows { sink: 8, recent: 90 }), 26, "all but the last");
}

/// The query's own token is always kept whole.
#[test]
fn no_recent_window_is_one_token() {
    let fixture = fixture();
    for method in Method::ALL {
        let with = |recent| {
            let windows = Windows { sink: 3, recent };
            LearnOptions { windows, ..options(method) }
        };
        let own = budget(Budget::KRatio(0.5));
        let (one, _) = counted(&fixture.dump, &with(1), &own);
        let (none, computed) = counted(&fixture.dump, &with(0), &own);
        assert_eq!((one.mask.heads(), one.allocation), (none.mask.heads(), none.allocation));
        assert_eq!(computed, 0, "the same measurement");
    }
}
