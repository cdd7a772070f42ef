//! The statistics against a naive f64 implementation, and against their own meaning.

use leank_core::{Dtype, KvHead, Layer, ModelShape, Windows};
use leank_train::{
    Error,
    dump::{Dump, DumpWriter, HeadData, SequenceTensors},
    stats::{HeadEvaluator, HeadMask, Stats, Want},
    synthetic::Synthetic,
};
use proptest::prelude::*;

/// `C`, `b` and `A` of one head, by the definitions, one query at a time.
/// Also the sizes that bound the errors in f32.
fn naive(
    dump: &Dump,
    layer: Layer,
    head: KvHead,
    windows: Windows,
    mask: &HeadMask,
) -> (Stats, Sizes) {
    let manifest = dump.manifest();
    let (d, n) = (manifest.shape.head_dim, manifest.positions);
    let group = manifest.shape.group();
    let weights: Vec<f64> = match mask {
        HeadMask::Dead => vec![0.0; d],
        HeadMask::Kept(kept) => {
            (0..d).map(|c| f64::from(u8::from(kept.contains(&(c as u16))))).collect()
        }
        HeadMask::Scaled(weights) => weights.iter().map(|&w| f64::from(w)).collect(),
    };
    let (mut loss, mut b, mut a) = (0.0, vec![0.0; d], vec![0.0; d * d]);
    let (mut count, mut sizes) = (0.0, Sizes { output: 0.0, product: 1.0 });
    let reader = dump.layer(layer).unwrap();
    let mut data = HeadData::default();
    for (sequence, info) in manifest.sequences.iter().enumerate() {
        reader.read(head, sequence, &mut data).unwrap();
        let row = |values: &[f32], row: usize| -> Vec<f64> {
            values[row * d..][..d].iter().map(|&x| f64::from(x)).collect()
        };
        for &position in &info.valid {
            let position = position as usize;
            let seen = info.prefix + position + 1;
            for draw in 0..manifest.draws {
                let (mut s, mut z) = (0.0, vec![0.0; d]);
                for h in 0..group {
                    let q = row(&data.q, h * n + position);
                    let g = row(&data.g, (draw * group + h) * n + position);
                    let attend = |weights: Option<&[f64]>| {
                        one_query(&Query { q: &q, g: &g, weights, windows, seen }, &data, d)
                    };
                    let (full, _) = attend(None);
                    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                    sizes.output = sizes.output.max(norm(&g) * norm(&vec![1.0; d]));
                    for k in data.k[..seen * d].chunks_exact(d) {
                        let products = q.iter().zip(k).map(|(q, &k)| (q * f64::from(k)).abs());
                        let largest = products.fold(0.0, f64::max) / (d as f64).sqrt();
                        sizes.product = sizes.product.max(largest);
                    }
                    let dead = matches!(mask, HeadMask::Dead);
                    let (output, own) = attend(Some(if dead { &[] } else { &weights }));
                    s += output - full;
                    z.iter_mut().zip(own).for_each(|(z, own)| *z += own);
                }
                loss += s * s;
                count += 1.0;
                for i in 0..d {
                    b[i] += s * z[i];
                    for j in 0..d {
                        a[i * d + j] += z[i] * z[j];
                    }
                }
            }
        }
    }
    if let HeadMask::Kept(kept) = mask {
        // Channels that are not kept are not asked for.
        let is_kept = |c: usize| kept.contains(&(c as u16));
        for i in (0..d).filter(|&i| !is_kept(i)) {
            b[i] = 0.0;
            for j in 0..d {
                (a[i * d + j], a[j * d + i]) = (0.0, 0.0);
            }
        }
    }
    let mean = |values: Vec<f64>| values.into_iter().map(|v| v / count).collect();
    (Stats { loss: loss / count, b: mean(b), a: mean(a) }, sizes)
}

struct Sizes {
    /// What `s` is a difference of.
    output: f64,
    /// Largest term of a logit, at least 1.
    product: f64,
}

struct Query<'a> {
    q: &'a [f64],
    g: &'a [f64],
    /// None: nothing masked. Empty: dead.
    weights: Option<&'a [f64]>,
    windows: Windows,
    seen: usize,
}

/// `g·o` of one query, and its derivative by the weights.
fn one_query(query: &Query<'_>, data: &HeadData, d: usize) -> (f64, Vec<f64>) {
    let row = |values: &[f32], j: usize, c: usize| f64::from(values[j * d + c]);
    let scale = 1.0 / (d as f64).sqrt();
    // The query's own token is always kept whole.
    let recent = query.windows.recent.max(1);
    let in_middle = |j: usize| j >= query.windows.sink && j + recent < query.seen;
    let logits: Vec<f64> = (0..query.seen)
        .map(|j| {
            let product = |c: usize| query.q[c] * row(&data.k, j, c);
            match query.weights {
                Some([]) if in_middle(j) => f64::NEG_INFINITY,
                Some(weights) if in_middle(j) => {
                    scale * (0..d).map(|c| weights[c] * product(c)).sum::<f64>()
                }
                _ => scale * (0..d).map(product).sum::<f64>(),
            }
        })
        .collect();
    let max = logits.iter().copied().fold(-1e30, f64::max);
    let exps: Vec<f64> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    let p: Vec<f64> = exps.iter().map(|e| if sum > 0.0 { e / sum } else { 0.0 }).collect();
    let gv = |j: usize| (0..d).map(|c| query.g[c] * row(&data.v, j, c)).sum::<f64>();
    let output: f64 = (0..query.seen).map(|j| p[j] * gv(j)).sum();
    let mut z = vec![0.0; d];
    for j in (0..query.seen).filter(|&j| in_middle(j)) {
        let weight = p[j] * (gv(j) - output);
        for (c, z) in z.iter_mut().enumerate() {
            *z += scale * query.q[c] * weight * row(&data.k, j, c);
        }
    }
    (output, z)
}

fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f64, |max, x| max.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        let allowed = 2e-5 * largest + tolerance;
        assert!(error <= allowed, "{what}[{i}]: {found:e}, expected {expected:e} ± {allowed:e}");
    }
}

fn check(dump: &Dump, windows: Windows, mask: &HeadMask) {
    let manifest = dump.manifest();
    let d = manifest.shape.head_dim;
    for layer in manifest.shape.layer_indices() {
        let reader = dump.layer(layer).unwrap();
        for head in manifest.shape.kv_head_indices() {
            let (expected, sizes) = naive(dump, layer, head, windows, mask);
            // s is a difference of f32 outputs: it has an absolute error.
            let s_error = 1e-6 * sizes.output;
            let loss_error = s_error * (2.0 * expected.loss.sqrt() + s_error);
            // z weighs differences of such outputs by the terms of the logits.
            let z_error = sizes.product * s_error;
            let z_max = (0..d).map(|c| expected.a[c * d + c]).fold(0.0, f64::max).sqrt();
            let mut evaluator = HeadEvaluator::new(&reader, head, windows);
            let last = Some((mask, Want::Quadratic));
            // The second evaluation has the reference already.
            for _ in 0..2 {
                let found = evaluator.evaluate(std::slice::from_ref(mask), last).unwrap();
                let stats = found.stats.unwrap();
                assert_close("loss", &found.losses, &[expected.loss], loss_error);
                assert_close("C", &[stats.loss], &[expected.loss], loss_error);
                let b_error = s_error * z_max + z_error * expected.loss.sqrt();
                assert_close("b", &stats.b, &expected.b, b_error);
                let a_error = z_error * (2.0 * z_max + z_error);
                assert_close("A", &stats.a, &expected.a, a_error);
            }
        }
    }
}

fn synthetic(group: usize, d: usize, prefixes: Vec<usize>, positions: usize) -> Synthetic {
    Synthetic {
        shape: ModelShape::new(1, 2 * group, 2, d).unwrap(),
        prefixes,
        positions,
        draws: 2,
        dtype: Dtype::F32,
        seed: (group + d + positions) as u64,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }) })]

    #[test]
    fn agrees_with_the_definitions(
        group in 1usize..4,
        d in 1usize..20,
        prefixes in prop::collection::vec(0usize..60, 1..4),
        positions in 1usize..9,
        sink in 0usize..12,
        recent in 0usize..30,
        kept in any::<u64>(),
        kind in 0..4,
        invalid in any::<u64>(),
        draws in 1usize..4,
    ) {
        let kept: Vec<u16> = (0..d as u16).filter(|c| kept >> c & 1 == 1).collect();
        let mask = match kind {
            0 => HeadMask::Dead,
            1 => HeadMask::Scaled((0..d).map(|c| (c % 5) as f32 / 4.0).collect()),
            _ if kept.is_empty() => HeadMask::Kept((0..d as u16).collect()),
            _ => HeadMask::Kept(kept),
        };
        let own = Synthetic { draws, ..synthetic(group, d, prefixes, positions) };
        let mut manifest = own.manifest();
        for (i, sequence) in manifest.sequences.iter_mut().enumerate() {
            sequence.valid.retain(|p| invalid >> (8 * i + *p as usize) & 3 != 0);
        }
        prop_assume!(manifest.valid_positions() > 0);
        let dir = tempfile::tempdir().unwrap();
        let dump = own.write_as(&dir.path().join("dump"), manifest).unwrap();
        check(&dump, Windows { sink, recent }, &mask);
    }
}

/// Contexts so long that a sequence takes several tiles, with and without valid positions.
#[test]
fn tiles_join() {
    let own = Synthetic { draws: 1, ..synthetic(3, 4, vec![30_000, 40], 300) };
    let mut manifest = own.manifest();
    manifest.sequences[0].valid.retain(|p| p % 3 == 1 && !(150..240).contains(p));
    let dir = tempfile::tempdir().unwrap();
    let dump = own.write_as(&dir.path().join("dump"), manifest).unwrap();
    check(&dump, Windows { sink: 8, recent: 64 }, &HeadMask::Kept(vec![0, 3]));
}

#[test]
fn windows_beyond_the_context_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dump = synthetic(2, 8, vec![0, 9], 5).write(&dir.path().join("dump")).unwrap();
    let reader = dump.layer(Layer(0)).unwrap();
    for windows in [
        Windows::EVERYTHING,
        Windows { sink: usize::MAX, recent: 0 },
        Windows { sink: 9, recent: 5 },
    ] {
        let mut evaluator = HeadEvaluator::new(&reader, KvHead(1), windows);
        let one = HeadMask::Kept(vec![2]);
        let found = evaluator
            .evaluate(&[HeadMask::Dead, one.clone()], Some((&one, Want::Quadratic)))
            .unwrap();
        assert_eq!(found.losses, [0.0, 0.0]);
        assert!(found.stats.unwrap().a.iter().all(|&a| a == 0.0));
    }
}

/// Chains of growing masks only add what is new, and mean the same.
#[test]
fn growing_masks_share_their_products() {
    let dir = tempfile::tempdir().unwrap();
    let dump = synthetic(3, 8, vec![20, 33], 7).write(&dir.path().join("dump")).unwrap();
    let windows = Windows { sink: 2, recent: 4 };
    let reader = dump.layer(Layer(0)).unwrap();
    let order = [5u16, 1, 0, 7, 3, 2, 6, 4];
    let masks: Vec<_> = std::iter::once(HeadMask::Dead)
        .chain([2, 3, 6, 8].map(|n| HeadMask::Kept(order[..n].to_vec())))
        .collect();
    let mut evaluator = HeadEvaluator::new(&reader, KvHead(0), windows);
    let found = evaluator.evaluate(&masks, None).unwrap();
    assert!(found.stats.is_none());
    let expected: Vec<_> =
        masks.iter().map(|mask| naive(&dump, Layer(0), KvHead(0), windows, mask).0.loss).collect();
    assert_close("losses", &found.losses, &expected, 1e-11);
    assert!(found.losses[4] < 1e-12, "nothing is pruned: {:?}", found.losses);
}

/// `b` is half the gradient of `C`, and `A` its curvature where the residual is small.
#[test]
fn b_is_half_the_gradient_of_the_loss() {
    let dir = tempfile::tempdir().unwrap();
    let dump = synthetic(2, 6, vec![25, 40], 6).write(&dir.path().join("dump")).unwrap();
    let windows = Windows { sink: 3, recent: 5 };
    let reader = dump.layer(Layer(0)).unwrap();
    let mut evaluator = HeadEvaluator::new(&reader, KvHead(1), windows);
    let weights = vec![1.0, 0.25, 0.75, 0.0, 0.5, 1.0];
    let mask = HeadMask::Scaled(weights.clone());
    let found = evaluator.evaluate(&[], Some((&mask, Want::Gradient))).unwrap();
    let stats = found.stats.unwrap();
    assert!(stats.a.is_empty());
    let loss = |c: usize, step: f32| {
        let mut weights = weights.clone();
        weights[c] += step;
        naive(&dump, Layer(0), KvHead(1), windows, &HeadMask::Scaled(weights)).0.loss
    };
    let step = 2f32.powi(-10);
    let gradient: Vec<f64> =
        (0..6).map(|c| (loss(c, step) - loss(c, -step)) / (4.0 * f64::from(step))).collect();
    let largest = gradient.iter().fold(0f64, |max, x| max.max(x.abs()));
    assert!(largest > 1e-9);
    for (b, gradient) in stats.b.iter().zip(&gradient) {
        assert!((b - gradient).abs() < 1e-3 * largest, "{:?} {gradient:?}", stats.b);
    }
}

/// Finite activations whose products are not: an error, never a silent number.
#[test]
fn overflow_is_told() {
    for (tensor, value) in [("qk", 1e25), ("gv", 3e38)] {
        let own = Synthetic { draws: 1, ..synthetic(1, 4, vec![20], 2) };
        let mut tensors = own.sequence(Layer(0), 0);
        let changed = match tensor {
            "qk" => [&mut tensors.q, &mut tensors.k],
            _ => [&mut tensors.g, &mut tensors.v],
        };
        for values in changed {
            values.iter_mut().for_each(|x| *x = x.signum() * value);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dump");
        let mut writer = DumpWriter::create(&path, own.manifest()).unwrap();
        let [q, k, v, g] = [&tensors.q, &tensors.k, &tensors.v, &tensors.g];
        writer.write(Layer(0), 0, SequenceTensors { q, k, v, g }).unwrap();
        writer.finish().unwrap();
        let dump = Dump::open(&path).unwrap();
        let reader = dump.layer(Layer(0)).unwrap();
        let windows = Windows { sink: 1, recent: 2 };
        let found = HeadEvaluator::new(&reader, KvHead(0), windows)
            .evaluate(&[HeadMask::Kept(vec![0, 2])], None);
        assert!(matches!(found, Err(Error::Overflow { .. })), "{tensor}: {found:?}");
    }
}
