use leank_core::Precision;
use proptest::prelude::*;

use super::*;
use crate::order::{HeadCurve, PrecisionCurve, measured_counts};

/// As the CPU backend pads.
const PADDED: LayoutRules = LayoutRules {
    k_channel_multiple: 2,
    v_token_multiple: 2,
    section_align: 64,
    ..LayoutRules::PACKED
};

fn curve(d: usize, step: usize, losses: &[f64]) -> HeadCurve {
    let counts = measured_counts(d, step).unwrap();
    let losses = losses[..counts.len()].to_vec();
    HeadCurve { order: (0..d as u16).collect(), counts, losses, scores: Vec::new() }
}

fn curves(heads: Vec<HeadCurve>) -> Curves {
    Curves { heads, precisions: Vec::new() }
}

/// Heads of 48 channels in steps of 16: four losses in 16 bits each, then those of all precisions.
fn curves_in_all_precisions(losses: &[Vec<f64>]) -> Curves {
    let heads: Vec<_> = losses.iter().map(|own| curve(48, 16, own)).collect();
    let both = heads.iter().zip(losses);
    let precisions = both.map(|(curve, own)| PrecisionCurve::new(curve, own[4..].to_vec()));
    Curves { precisions: precisions.collect(), heads }
}

/// The least loss by trying everything.
fn brute(curves: &Curves, options: &AllocateOptions, shape: &ModelShape) -> Option<f64> {
    let d = shape.head_dim;
    let dense = curves.heads.len() * 2 * d * 2 * DEFAULT_BLOCK;
    let limit = match options.budget {
        Budget::KRatio(_) => options.budget.limit(curves.heads.len(), d).unwrap(),
        Budget::Bytes(share) => (dense as f64 * share + 1e-6) as usize,
    };
    let cost = |n: usize, precision: HeadPrecision| match options.budget {
        Budget::KRatio(_) => n,
        Budget::Bytes(_) => {
            options.rules.lean_head_bytes(DEFAULT_BLOCK, d, n, precision.format(Dtype::F16))
        }
    };
    // Least loss of the heads so far for every cost.
    let mut reached = std::collections::BTreeMap::from([(0, 0.0)]);
    for (head, own) in curves.heads.iter().enumerate() {
        let exempt = options.exempt.contains(&Layer(head / shape.kv_heads));
        let mut next = std::collections::BTreeMap::new();
        let plain = [HeadPrecision::default()];
        let offered: Vec<_> = options.offer.precisions().collect();
        let (least, offered) = if exempt { (d, &plain[..]) } else { (0, &offered[..]) };
        for n in (least..=d).step_by(options.alignment) {
            for &precision in offered {
                let plain = n == 0 || precision == HeadPrecision::default();
                let loss = match plain {
                    true => own.loss(n),
                    false => curves.precisions[head].loss(n, precision),
                };
                for (&spent, &before) in &reached {
                    let spent = spent + cost(n, precision);
                    let entry = next.entry(spent).or_insert(f64::INFINITY);
                    *entry = f64::min(*entry, before + loss.unwrap());
                }
            }
        }
        reached = next;
    }
    let losses = reached.into_iter().filter(|&(spent, _)| spent <= limit).map(|(_, loss)| loss);
    losses.min_by(f64::total_cmp)
}

/// Bytes of a block that an allocation takes.
fn bytes(found: &Allocation, d: usize, rules: LayoutRules) -> usize {
    let heads = found.counts.iter().zip(&found.precisions);
    let of = |(&n, own): (&usize, &HeadPrecision)| {
        rules.lean_head_bytes(DEFAULT_BLOCK, d, n, own.format(Dtype::F16))
    };
    heads.map(of).sum()
}

proptest! {
    #[test]
    fn is_exact(
        losses in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 5), 6),
        kv_heads in 1usize..4,
        alignment in prop::sample::select(vec![2usize, 4, 8]),
        share in 0.0..=1.0f64,
        by_bytes in any::<bool>(),
        exempt in prop::option::of(0usize..2),
    ) {
        let layers = 6 / kv_heads;
        let shape = ModelShape::new(layers, kv_heads, kv_heads, 8).unwrap();
        let heads: Vec<_> =
            losses[..layers * kv_heads].iter().map(|own| curve(8, 2, own)).collect();
        let curves = curves(heads);
        let budget = if by_bytes { Budget::Bytes(share) } else { Budget::KRatio(share) };
        let exempt = exempt.map(Layer).into_iter().collect();
        let options = AllocateOptions { alignment, exempt, ..AllocateOptions::new(budget) };
        let limit = budget.limit(curves.heads.len(), 8).unwrap();
        match (allocate(&curves, &shape, &options), brute(&curves, &options, &shape)) {
            (Ok(found), Some(expected)) => {
                prop_assert!((found.loss - expected).abs() < 1e-12);
                // In 16 bits bytes are counted in elements, as the budget's limit is.
                let cost: usize = found.counts.iter().map(|&n| budget.cost(n, 8)).sum();
                prop_assert!(cost <= limit);
                let heads = curves.heads.iter().zip(&found.counts);
                let sum: f64 = heads.map(|(c, &n)| c.loss(n).unwrap()).sum();
                prop_assert!((sum - found.loss).abs() < 1e-12);
                prop_assert_eq!(found.precisions, vec![HeadPrecision::default(); losses.len().min(layers * kv_heads)]);
            }
            (Err(Error::Budget { .. }), None) => {}
            other => prop_assert!(false, "{other:?}"),
        }
    }

    /// Counts, bits of K and bits of V compete for the same bytes.
    #[test]
    fn is_exact_over_formats(
        losses in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 4 + 36), 4),
        alignment in prop::sample::select(vec![16usize, 48]),
        share in 0.0..=1.0f64,
        offer in prop::sample::select(vec!["k16,k8,k4,v16,v8,v4", "k8,v8", "k16,k4,v8", "k4,v16,v4"]),
        padded in any::<bool>(),
        exempt in prop::option::of(0usize..2),
    ) {
        let shape = ModelShape::new(2, 2, 2, 48).unwrap();
        let curves = curves_in_all_precisions(&losses);
        let exempt = exempt.map(Layer).into_iter().collect();
        let rules = if padded { PADDED } else { LayoutRules::PACKED };
        let offer = offer.parse().unwrap();
        let budget = Budget::Bytes(share);
        let options = AllocateOptions { budget, alignment, exempt, offer, rules };
        match (allocate(&curves, &shape, &options), brute(&curves, &options, &shape)) {
            (Ok(found), Some(expected)) => {
                prop_assert!((found.loss - expected).abs() < 1e-12, "{} {expected}", found.loss);
                let dense = 4 * 2 * 48 * 2 * DEFAULT_BLOCK;
                prop_assert!(bytes(&found, 48, rules) as f64 <= share * dense as f64 + 1e-6);
                let loss = |head: usize| {
                    let (n, own) = (found.counts[head], found.precisions[head]);
                    if own == HeadPrecision::default() {
                        return curves.heads[head].loss(n).unwrap();
                    }
                    curves.precisions[head].loss(n, own).unwrap()
                };
                prop_assert!(((0..4).map(loss).sum::<f64>() - found.loss).abs() < 1e-12);
            }
            (Err(Error::Budget { .. }), None) => {}
            other => prop_assert!(false, "{other:?}"),
        }
    }

    /// Every point of a front is the allocation of its bytes, and none is worse than another.
    #[test]
    fn a_front_is_made_of_allocations(
        losses in prop::collection::vec(prop::collection::vec(0.0..1.0f64, 4 + 36), 4),
    ) {
        let shape = ModelShape::new(2, 2, 2, 48).unwrap();
        let curves = curves_in_all_precisions(&losses);
        let offer: Offer = "k16,k8,k4,v16,v8,v4".parse().unwrap();
        let options = AllocateOptions { offer, ..AllocateOptions::new(Budget::Bytes(1.0)) };
        let front = front(&curves, &shape, &options, 50).unwrap();
        prop_assert_eq!(front[0].bytes, 0.0);
        for pair in front.windows(2) {
            prop_assert!(pair[0].bytes < pair[1].bytes);
            prop_assert!(pair[0].allocation.loss > pair[1].allocation.loss);
        }
        for point in front {
            let budget = Budget::Bytes(point.bytes);
            let own = allocate(&curves, &shape, &AllocateOptions { budget, ..options.clone() });
            prop_assert!((own.unwrap().loss - point.allocation.loss).abs() < 1e-12);
        }
    }
}

#[test]
fn a_dead_head_pays_for_another() {
    // By bytes the first head's V is worth two channel counts of the second.
    let curves = curves(vec![curve(4, 2, &[0.1, 0.05, 0.0]), curve(4, 2, &[9.0, 1.0, 0.0])]);
    let shape = ModelShape::new(1, 2, 2, 4).unwrap();
    let options = |budget| AllocateOptions { alignment: 2, ..AllocateOptions::new(budget) };
    let bytes = allocate(&curves, &shape, &options(Budget::Bytes(0.5))).unwrap();
    assert_eq!((bytes.counts, bytes.loss), (vec![0, 4], 0.1));
    let all = allocate(&curves, &shape, &options(Budget::KRatio(0.0))).unwrap();
    assert_eq!((all.counts, all.loss), (vec![4, 4], 0.0));
    let none = allocate(&curves, &shape, &options(Budget::KRatio(1.0))).unwrap();
    assert_eq!(none.counts, [0, 0]);
}

/// Bits of one head pay for channels of another.
#[test]
fn bits_pay_for_channels() {
    let heads = vec![curve(64, 32, &[9.0, 9.0, 0.0]), curve(64, 32, &[9.0, 5.0, 0.0])];
    // [K, counts, V]; the first head hardly minds 8 bits, the second does.
    let first = [[9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 0.0, 0.01, 4.0]; 3].concat();
    let (bad, fine) = ([9.0, 9.0, 9.0, 8.0, 8.0, 8.0, 7.0, 7.0, 7.0], [0.0, 6.0, 6.0]);
    let second = [&bad[..6], &fine, &bad, &bad].concat();
    let precisions =
        vec![PrecisionCurve::new(&heads[0], first), PrecisionCurve::new(&heads[1], second)];
    let curves = Curves { heads, precisions };
    let shape = ModelShape::new(1, 2, 2, 64).unwrap();
    let offer: Offer = "k16,k8,k4,v16,v8,v4".parse().unwrap();
    let options = AllocateOptions {
        alignment: 32,
        offer,
        rules: PADDED,
        ..AllocateOptions::new(Budget::Bytes(0.75))
    };
    let found = allocate(&curves, &shape, &options).unwrap();
    assert_eq!(found.counts, [64, 64]);
    assert_eq!(found.precisions[1], HeadPrecision::default());
    // K in 4 bits costs this head nothing, V in 8 a hundredth.
    assert_eq!(found.precisions[0].k, Precision::Four);
    assert!(bytes(&found, 64, PADDED) <= 3 * 8192);
}

/// Each head alone is possible, and so is the table.
#[test]
fn too_many_choices_are_refused_before_they_are_tried() {
    let choice =
        |cost| Choice { count: cost, precision: HeadPrecision::default(), cost, loss: 0.0 };
    let heads = vec![(0..600).map(choice).collect::<Vec<_>>(); 2];
    let solve = |limit| match Program::solve(&heads, limit) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    assert_eq!(solve(1199), "");
    let message = solve((1 << 26) - 1);
    assert!(message.contains("1200 choices") && message.contains("fewer formats"), "{message}");
    let message = solve((1 << 28) - 1);
    assert!(message.contains("2 heads"), "{message}");
}

#[test]
fn wrong_options_are_named_with_the_mend() {
    let curves = curves(vec![curve(24, 8, &[3.0, 2.0, 1.0, 0.0]); 2]);
    let shape = ModelShape::new(2, 1, 1, 24).unwrap();
    let with = |budget, alignment, exempt: &[usize]| {
        let exempt = exempt.iter().copied().map(Layer).collect();
        let options = AllocateOptions { alignment, exempt, ..AllocateOptions::new(budget) };
        allocate(&curves, &shape, &options).unwrap_err().to_string()
    };
    for alignment in [0, 16, 48, usize::MAX] {
        let message = with(Budget::KRatio(0.5), alignment, &[]);
        assert!(message.contains("does not divide head_dim 24"), "{message}");
        // The step may not have been asked for: what it rules out is said when it matters.
        assert!(message.contains("; 1, 2, 3, 4, 6, 8, 12, 24 would do"), "{message}");
    }
    for alignment in [4, 12] {
        let message = with(Budget::KRatio(0.5), alignment, &[]);
        assert!(message.contains("; 8, 24 would do, or a step that divides"), "{message}");
    }
    let message = with(Budget::KRatio(0.7), 8, &[0]);
    assert!(message.contains("k-ratio 0.7") && message.contains("k-ratio 0.5"), "{message}");
    let message = with(Budget::Bytes(0.4), 8, &[0]);
    assert!(message.contains("ask for bytes 0.5 or more"), "{message}");
    for value in [-0.1, 1.5, f64::NAN] {
        assert!(with(Budget::Bytes(value), 8, &[]).contains("not in 0..=1"));
    }
    assert!(with(Budget::Bytes(0.5), 8, &[2]).contains("layer 2"));

    let offer: Offer = "k8,v8".parse().unwrap();
    let coded = |budget| AllocateOptions {
        alignment: 8,
        offer: offer.clone(),
        ..AllocateOptions::new(budget)
    };
    for (budget, why) in
        [(Budget::KRatio(0.5), "budget of bytes"), (Budget::Bytes(0.5), "were not measured")]
    {
        let error = allocate(&curves, &shape, &coded(budget)).unwrap_err();
        assert!(matches!(error, Error::Options { option: "formats", .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    let options = AllocateOptions { alignment: 8, ..AllocateOptions::new(Budget::KRatio(0.5)) };
    assert!(front(&curves, &shape, &options, 10).is_err());
}
