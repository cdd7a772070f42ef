//! Losses of lean blocks in 8 and 4 bits: against the definition, through the CPU cache, and learned.

use std::{fs, path::Path};

use leank_core::{
    Backend, Cache, CacheConfig, ChannelMask, DEFAULT_BLOCK, Dtype, HeadPrecision, HostView,
    HostViewMut, KvHead, Layer, ModelMask, ModelShape, Precision, StepEntry, Tensor, ViewShape,
    Windows, quant,
};
use leank_cpu::{Cpu, Isa};
use leank_train::{
    Error,
    allocate::{AllocateOptions, Budget, front},
    dump::{Dump, HeadData},
    learn::{LearnOptions, Method, learn, learn_mask},
    order::{HeadCurve, measure_precisions},
    stats::{HeadEvaluator, HeadMask, MEASURED},
    synthetic::Synthetic,
};

fn dump(path: &Path, prefixes: Vec<usize>, positions: usize) -> Dump {
    let shape = ModelShape::new(2, 4, 2, 40).unwrap();
    Synthetic { shape, prefixes, positions, draws: 2, dtype: Dtype::F16, seed: 7 }
        .write(path)
        .unwrap()
}

/// `C` of kept channels by the definition, in f64: one query at a time over K and V whose middle is
/// packed and read back.
fn naive(
    dump: &Dump,
    head: KvHead,
    windows: Windows,
    kept: &[u16],
    precision: HeadPrecision,
) -> f64 {
    let manifest = dump.manifest();
    let (d, n) = (manifest.shape.head_dim, manifest.positions);
    let group = manifest.shape.group();
    let reader = dump.layer(Layer(1)).unwrap();
    let mut data = HeadData::default();
    let (mut sum, mut count) = (0.0, 0.0);
    for (sequence, info) in manifest.sequences.iter().enumerate() {
        reader.read(head, sequence, &mut data).unwrap();
        let packed = |tensor, values: &[f32], precision: Precision| {
            let mut values = values.to_vec();
            for block in values.chunks_mut(DEFAULT_BLOCK * d) {
                quant::round_trip(precision.format(Dtype::F16), tensor, d, block);
            }
            values
        };
        let k = packed(Tensor::K, &data.k, precision.k);
        let v = packed(Tensor::V, &data.v, precision.v);
        for position in 0..n {
            let seen = info.prefix + position + 1;
            let is_lean = |j: usize| j >= windows.sink && j + windows.recent < seen;
            let output = |q: &[f32], g: &[f32], lean: bool| {
                let row = |values: &[f32], j: usize, x: &[f32], c: usize| {
                    f64::from(values[j * d + c]) * f64::from(x[c])
                };
                let (mut weights, mut total) = (0.0, 0.0);
                for j in 0..seen {
                    let lean = lean && is_lean(j);
                    if lean && kept.is_empty() {
                        continue;
                    }
                    let logit: f64 = match lean {
                        true => kept.iter().map(|&c| row(&k, j, q, usize::from(c))).sum(),
                        false => (0..d).map(|c| row(&data.k, j, q, c)).sum(),
                    };
                    let v = if lean { &v } else { &data.v };
                    let weight = (logit / (d as f64).sqrt()).exp();
                    weights += weight;
                    total += weight * (0..d).map(|c| row(v, j, g, c)).sum::<f64>();
                }
                total / weights
            };
            for draw in 0..manifest.draws {
                let s: f64 = (0..group)
                    .map(|h| {
                        let q = &data.q[(h * n + position) * d..][..d];
                        let g = &data.g[((draw * group + h) * n + position) * d..][..d];
                        output(q, g, true) - output(q, g, false)
                    })
                    .sum();
                sum += s * s;
                count += 1.0;
            }
        }
    }
    sum / count
}

/// Counts in 4 of 40 channels that no order would keep.
fn curve() -> HeadCurve {
    HeadCurve {
        order: (0..40).map(|i| (i * 7 + 3) % 40).collect(),
        counts: vec![0, 8, 24, 40],
        losses: vec![0.0; 4],
        scores: Vec::new(),
    }
}

fn precisions() -> impl Iterator<Item = HeadPrecision> {
    MEASURED.into_iter().flat_map(|k| MEASURED.map(|v| HeadPrecision { k, v }))
}

#[test]
fn losses_are_those_of_the_definition() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(&dir.path().join("dump"), vec![70, 131, 40], 9);
    let layer = dump.layer(Layer(1)).unwrap();
    // Windows that cut blocks and positions' boundaries; all of the middle; nothing of it.
    for (sink, recent) in [(3, 8), (0, 1), (10, 60), (130, 10)] {
        let windows = Windows { sink, recent };
        for head in [KvHead(0), KvHead(1)] {
            let mut evaluator = HeadEvaluator::new(&layer, head, windows);
            let found = measure_precisions(&mut evaluator, &curve()).unwrap();
            for precision in precisions() {
                for count in [0, 8, 24, 40] {
                    let kept = curve().kept(count);
                    let expected = naive(&dump, head, windows, &kept, precision);
                    let found = found.loss(count, precision).unwrap();
                    let off = (found - expected).abs();
                    let what = format!("{windows:?} {head} {precision} {count}");
                    assert!(off <= 2e-4 * expected + 1e-9, "{what}: {found:e}, not {expected:e}");
                }
            }
            // Another evaluation on the same evaluator, before or after, sees none of it.
            let masks = [HeadMask::Dead, HeadMask::Kept(curve().kept(8))];
            let again = evaluator.evaluate(&masks, None).unwrap();
            let fresh = HeadEvaluator::new(&layer, head, windows).evaluate(&masks, None).unwrap();
            assert_eq!(again, fresh);
        }
    }
}

/// `C` of one head by decoding through the CPU cache, where the cache's lean blocks are the middle to
/// the token.
fn through_the_cache(dump: &Dump, head: KvHead, kept: &[u16], precision: HeadPrecision) -> f64 {
    let manifest = dump.manifest();
    let shape = ModelShape::new(1, manifest.shape.group(), 1, manifest.shape.head_dim).unwrap();
    let d = shape.head_dim;
    let reader = dump.layer(Layer(0)).unwrap();
    let mut data = HeadData::default();
    let (mut sum, mut count) = (0.0, 0.0);
    for (sequence, info) in manifest.sequences.iter().enumerate() {
        reader.read(head, sequence, &mut data).unwrap();
        let decode = |mask: ModelMask| {
            let config = CacheConfig {
                windows: Windows { sink: 64, recent: 65 },
                dtype: Dtype::F16,
                ..CacheConfig::new(shape, mask).unwrap()
            };
            // In f32; other kernels multiply codes as integers.
            let cpu = Cpu::new().with_isa(Isa::Portable).unwrap();
            let mut cache = cpu.create(config).unwrap();
            let own = cache.add_sequence();
            let mut out = vec![0.0; shape.query_heads * d];
            let rows = ViewShape::contiguous(1, shape.query_heads, d);
            for (at, tokens, attend) in [(0, info.prefix, false), (info.prefix, 1, true)] {
                cache.plan(&[StepEntry { sequence: own, tokens, attend }]).unwrap();
                let view = ViewShape::contiguous(tokens, 1, d);
                let of = |values| HostView::new(values, view).unwrap();
                let range = at * d..(at + tokens) * d;
                cache.append(Layer(0), of(&data.k[range.clone()]), of(&data.v[range])).unwrap();
                if attend {
                    let q = HostView::new(&data.q[..], rows).unwrap();
                    let out = HostViewMut::new(&mut out[..], rows).unwrap();
                    cache.attend(Layer(0), q, out).unwrap();
                }
                cache.commit().unwrap();
            }
            out
        };
        let heads = vec![ChannelMask::new(d, kept.to_vec()).unwrap()];
        let lean = ModelMask::new(1, 1, d, heads).unwrap().with_precisions(vec![precision]);
        let (lean, full) = (decode(lean.unwrap()), decode(ModelMask::dense(&shape)));
        for g in data.g.chunks_exact(shape.query_heads * d) {
            let change = lean.iter().zip(&full).map(|(lean, full)| f64::from(lean - full));
            let s: f64 = change.zip(g).map(|(change, &g)| change * f64::from(g)).sum();
            sum += s * s;
            count += 1.0;
        }
    }
    sum / count
}

#[test]
fn losses_are_those_of_the_cpu_cache() {
    let dir = tempfile::tempdir().unwrap();
    // One position per sequence that sees whole lean blocks: tokens + 1 − recent is a multiple of 64.
    let dump = dump(&dir.path().join("dump"), vec![256, 320, 512], 1);
    let layer = dump.layer(Layer(0)).unwrap();
    for head in [KvHead(0), KvHead(1)] {
        let mut evaluator = HeadEvaluator::new(&layer, head, Windows { sink: 64, recent: 65 });
        let found = measure_precisions(&mut evaluator, &curve()).unwrap();
        for precision in precisions() {
            for count in [0, 8, 24, 40] {
                let expected = through_the_cache(&dump, head, &curve().kept(count), precision);
                let found = found.loss(count, precision).unwrap();
                // Roots are changes of the probe: the arithmetic's errors are theirs.
                let off = (found.sqrt() - expected.sqrt()).abs();
                let what = format!("{head} {precision} {count}");
                assert!(
                    off <= 1e-6 + 1e-4 * expected.sqrt(),
                    "{what}: {found:e}, not {expected:e}"
                );
                let is_lossless = count == 40 && precision == HeadPrecision::default();
                assert_eq!(expected > 1e-8, !is_lossless, "{what}: {expected:e}");
            }
        }
    }
}

fn options() -> LearnOptions {
    let windows = Windows { sink: 3, recent: 8 };
    LearnOptions { windows, threads: 2, ..LearnOptions::default() }
}

fn spend(share: f64, offer: &str) -> AllocateOptions {
    let offer = offer.parse().unwrap();
    AllocateOptions { alignment: 8, offer, ..AllocateOptions::new(Budget::Bytes(share)) }
}

#[test]
fn masks_say_what_is_stored_in_how_many_bits() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(&dir.path().join("dump"), vec![140, 160], 9);
    let all = "k16,k8,k4,v16,v8,v4";
    let mut last = f64::INFINITY;
    for share in [0.1, 0.2, 0.3, 0.5] {
        let learned = learn_mask(&dump, &options(), &spend(share, all), &|_| {}).unwrap();
        assert!(learned.mask.summary().middle_bytes <= share + 1e-9);
        let own = learned.mask.precisions().expect("codes at so few bytes");
        assert_eq!(own, learned.allocation.precisions);
        let budget = format!("bytes {share}, formats {all}");
        assert_eq!(learned.mask.info().budget.as_ref(), Some(&budget));
        // The loss is that of the mask and its precisions.
        let mut sum = 0.0;
        for layer in [Layer(0), Layer(1)] {
            for head in [KvHead(0), KvHead(1)] {
                let reader = dump.layer(layer).unwrap();
                let mut evaluator = HeadEvaluator::new(&reader, head, options().windows);
                let kept = learned.mask.head(layer, head).kept().to_vec();
                let mask = if kept.is_empty() { HeadMask::Dead } else { HeadMask::Kept(kept) };
                let losses = evaluator.evaluate_precisions(&[mask]).unwrap();
                let own = learned.mask.precision(layer, head);
                sum += losses[precisions().position(|other| other == own).unwrap()];
            }
        }
        let loss = learned.allocation.loss;
        assert!((loss - sum).abs() < 1e-4 * sum, "{loss} {sum}");
        // More choices lose less than fewer, more bytes less than fewer.
        for fewer in ["k16,v16", "k8,v8", "k16,k8,v16,v8"] {
            let fewer = learn_mask(&dump, &options(), &spend(share, fewer), &|_| {}).unwrap();
            assert!(loss <= fewer.allocation.loss, "{share}");
        }
        assert!(loss < last);
        last = loss;
    }
    // 16 bits alone are what they have always been.
    let plain = learn_mask(&dump, &options(), &spend(0.5, "k16,v16"), &|_| {}).unwrap();
    assert_eq!(plain.mask.precisions(), None);

    let curves = learn(&dump, &LearnOptions { precisions: true, ..options() }, &|_| {}).unwrap();
    let front = front(&curves, &dump.manifest().shape, &spend(1.0, all), 100).unwrap();
    let at_most = |share: f64| front.iter().rfind(|point| point.bytes <= share).unwrap();
    let half = learn_mask(&dump, &options(), &spend(0.5, all), &|_| {}).unwrap();
    assert_eq!(at_most(0.5).allocation, half.allocation);
}

#[test]
fn formats_need_curves_and_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(&dir.path().join("dump"), vec![140], 9);
    let refuse = |method, own: &AllocateOptions, why: &str| {
        let options = LearnOptions { method, ..options() };
        let error = learn_mask(&dump, &options, own, &|_| panic!("it ran")).unwrap_err();
        assert!(matches!(error, Error::Options { option: "formats", .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    let bytes = spend(0.2, "k8,v8");
    refuse(Method::Static, &bytes, "use e2 or e1");
    refuse(Method::LeanK, &bytes, "use e2 or e1");
    let ratio = AllocateOptions { budget: Budget::KRatio(0.5), ..bytes };
    refuse(Method::E2, &ratio, "give a budget of bytes");
}

#[test]
fn losses_in_bits_are_recorded_and_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump");
    let dump = dump(&path, vec![140, 160], 9);
    let computed = |own: &AllocateOptions| {
        let phases = std::sync::Mutex::new(std::collections::BTreeMap::new());
        let learned = learn_mask(&dump, &options(), own, &|progress| {
            let computed = progress.total - progress.reused;
            phases.lock().unwrap().insert(progress.phase.to_owned(), computed);
        })
        .unwrap();
        (learned, phases.into_inner().unwrap().into_values().collect::<Vec<_>>())
    };
    // Curves of 16 bits serve the other precisions too.
    assert_eq!(computed(&spend(0.5, "k16,v16")).1, [4]);
    let coded = spend(0.2, "k16,k8,v8");
    let (expected, phases) = computed(&coded);
    assert_eq!(phases, [0, 4]);
    // One measurement serves every offer and budget.
    assert_eq!(computed(&spend(0.1, "k4,v8,v4")).1, [0, 0]);
    let run = fs::read_dir(path.join("learn")).unwrap().next().unwrap().unwrap().path();
    let record = run.join("precisions/layer-001.json");
    let whole = fs::read_to_string(&record).unwrap();
    fs::remove_file(&record).unwrap();
    assert_eq!(computed(&coded), (expected, vec![0, 2]));
    assert_eq!(fs::read_to_string(&record).unwrap(), whole);
    let curve = fs::read_to_string(run.join("layer-001.json")).unwrap();
    let order = |json: &str| {
        json.split_once("\"order\":[").unwrap().1.split_once(',').unwrap().0.to_owned()
    };
    assert_eq!(order(&curve), order(&whole));
    // The order of the first head, turned round.
    let list = whole.split_once("\"order\":[").unwrap().1.split_once(']').unwrap().0;
    let turned: Vec<&str> = list.split(',').rev().collect();
    // As an older leank wrote it, without a checksum.
    let whole = &format!("{{{}", whole.split_once("\",").unwrap().1);
    for (damaged, why) in [
        (whole[..whole.len() / 2].to_owned(), "EOF"),
        (whole.replacen("\"version\":1", "\"version\":2", 1), "its version is 2 where 1"),
        (whole.replacen("\"losses\":[", "\"losses\":[0.5,", 1), "not one finite number"),
        (whole.replacen("\"counts\":[0,", "\"counts\":[1,", 1), "do not ascend"),
        (whole.replacen(list, &turned.join(","), 1), "another order"),
    ] {
        assert_ne!(damaged, *whole, "{why}");
        fs::write(&record, damaged).unwrap();
        let error = learn_mask(&dump, &options(), &coded, &|_| {}).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, Error::Record { .. }), "{message}");
        assert!(message.contains(why) && message.contains("precisions"), "{message}");
    }
}
