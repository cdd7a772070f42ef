//! LeanK's rule from importance scores to an aligned mask: one quantile over the whole model,
//! then whole groups of channels per head.

use std::cmp::Ordering;

use crate::{ChannelMask, Error, MaskInfo, ModelMask, ModelShape, Result};

/// Prunes a share of all channels by importance, and rounds each head's count to the alignment.
///
/// LeanK's second stage, made deterministic:
/// 1. Over all `n` channels of the model, those at or above the `ratio`-quantile (with linear
///    interpolation, as `numpy.quantile` has it) are counted: `n − ⌈ratio·(n − 1)⌉`.
/// 2. Each head's count is rounded to the nearest multiple of `alignment`, half upwards. The share
///    that is pruned in the end therefore differs a little from `ratio`.
/// 3. Each head keeps that many of its highest scores.
///
/// Ties go to the lower channel index, between heads to the lower layer and then the lower KV
/// head. LeanK's own code keeps *all* channels that tie at the quantile, so that a model with more
/// zeros than `ratio` asks for would keep everything; here the count is exact.
///
/// `scores` is `[layers, kv_heads, head_dim]` row-major, in any unit: only the order counts.
/// `shape.query_heads` is not used. The mask carries `alignment` and the budget in its
/// [`MaskInfo`], and no scores: see [`ModelMask::with_scores`].
///
/// ```
/// use leank_core::{ModelShape, quantile_and_round};
///
/// // Two KV heads of four channels; the second head's channels matter more.
/// let scores = [0.1, 0.2, 0.0, 0.3, 0.9, 0.8, 0.7, 0.4];
/// let shape = ModelShape::new(1, 2, 2, 4)?;
/// let mask = quantile_and_round(&scores, &shape, 0.5, 2)?;
/// assert!(mask.heads()[0].is_dead());
/// assert_eq!(mask.heads()[1].kept(), [0, 1, 2, 3]);
/// # Ok::<(), leank_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] when the number of scores is not that of the shape; [`Error::Invalid`] for
/// a bad shape, a `ratio` outside 0..=1, an `alignment` that does not divide `head_dim`, or a
/// score that is not finite.
pub fn quantile_and_round(
    scores: &[f32],
    shape: &ModelShape,
    ratio: f64,
    alignment: usize,
) -> Result<ModelMask> {
    check(scores, shape, ratio, alignment)?;
    let kept = kept_at_ratio(scores.len(), ratio);
    let counts = aligned_counts(scores, shape.head_dim, kept, alignment);
    let heads = scores
        .chunks_exact(shape.head_dim)
        .zip(counts)
        .map(|(head, count)| top_channels(head, count))
        .collect::<Result<Vec<_>>>()?;
    let info = MaskInfo {
        alignment: Some(alignment),
        budget: Some(format!("k-ratio {ratio}")),
        ..MaskInfo::default()
    };
    ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads)?.with_info(info)
}

fn check(scores: &[f32], shape: &ModelShape, ratio: f64, alignment: usize) -> Result<()> {
    shape.validate()?;
    let &ModelShape { layers, kv_heads, head_dim, .. } = shape;
    let total = layers * kv_heads * head_dim;
    if scores.len() != total {
        let expected = format!("{layers} layers × {kv_heads} KV heads × {head_dim} = {total}");
        return Err(Error::mismatch("number of scores", expected, scores.len()));
    }
    if !(0.0..=1.0).contains(&ratio) {
        let why = format!("{ratio} is not in 0..=1: it is the share of channels to prune");
        return Err(Error::invalid("ratio", why));
    }
    if alignment == 0 || !head_dim.is_multiple_of(alignment) {
        let why = format!("{alignment} does not divide head_dim {head_dim}; choose a divisor");
        return Err(Error::invalid("alignment", why));
    }
    if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
        let (head, channel) = (at / head_dim, at % head_dim);
        let (layer, kv_head) = (head / kv_heads, head % kv_heads);
        let why = format!(
            "{} at layer {layer}, KV head {kv_head}, channel {channel}; scores must be finite",
            scores[at]
        );
        return Err(Error::invalid("score", why));
    }
    Ok(())
}

/// How many of `channels` channels are at or above the `ratio`-quantile of their scores, with
/// linear interpolation and without ties: the first step of [`quantile_and_round`].
#[must_use]
pub fn kept_at_ratio(channels: usize, ratio: f64) -> usize {
    let pruned = (ratio * channels.saturating_sub(1) as f64).ceil() as usize;
    channels - pruned.min(channels)
}

/// How many channels each head keeps when the `kept` highest scores of all heads count, rounded to
/// the nearest multiple of `alignment`, half upwards: the second step of [`quantile_and_round`].
/// Ties go as there.
///
/// `scores` is `[heads, head_dim]` row-major, finite.
///
/// # Panics
/// When `head_dim` or `alignment` is 0, or `scores` is not whole heads.
#[must_use]
pub fn aligned_counts(
    scores: &[f32],
    head_dim: usize,
    kept: usize,
    alignment: usize,
) -> Vec<usize> {
    assert!(scores.len().is_multiple_of(head_dim), "{} scores of whole heads", scores.len());
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let by_rank = |&a: &usize, &b: &usize| {
        descending(scores[a], scores[b])
            .then((a % head_dim).cmp(&(b % head_dim)))
            .then((a / head_dim).cmp(&(b / head_dim)))
    };
    if kept < scores.len() {
        order.select_nth_unstable_by(kept, by_rank);
        order.truncate(kept);
    }
    let mut counts = vec![0; scores.len() / head_dim];
    for at in order {
        counts[at / head_dim] += 1;
    }
    counts.iter().map(|count| (count + alignment / 2) / alignment * alignment).collect()
}

/// Keeps the `count` highest scores of a head.
fn top_channels(scores: &[f32], count: usize) -> Result<ChannelMask> {
    let mut order: Vec<u16> = (0..scores.len()).map(|channel| channel as u16).collect();
    // Stable, so ties stay in channel order.
    order.sort_by(|&a, &b| descending(scores[usize::from(a)], scores[usize::from(b)]));
    order.truncate(count);
    order.sort_unstable();
    ChannelMask::new(scores.len(), order)
}

/// Highest first. The two zeros are equal, as they are to numpy.
fn descending(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counts(mask: &ModelMask) -> Vec<usize> {
        mask.heads().iter().map(ChannelMask::kept_count).collect()
    }

    #[test]
    fn rounds_half_upwards_per_head() {
        // Above the median: 3 of the first head, 1 of the second; to pairs: 4 and 2.
        let scores = [9.0, 8.0, 7.0, 0.5, 6.0, 0.1, 0.2, 0.3];
        let shape = ModelShape::new(2, 1, 1, 4).unwrap();
        assert_eq!(counts(&quantile_and_round(&scores, &shape, 0.5, 1).unwrap()), [3, 1]);
        assert_eq!(counts(&quantile_and_round(&scores, &shape, 0.5, 2).unwrap()), [4, 2]);
        let mask = quantile_and_round(&scores, &shape, 0.5, 2).unwrap();
        assert_eq!(mask.heads()[1].kept(), [0, 3]);
    }

    #[test]
    fn ties_spread_over_heads_by_channel() {
        let scores = [0.0; 8];
        let shape = ModelShape::new(2, 1, 1, 4).unwrap();
        let mask = quantile_and_round(&scores, &shape, 0.55, 1).unwrap();
        assert_eq!(mask.heads()[0].kept(), [0, 1]);
        assert_eq!(mask.heads()[1].kept(), [0, 1]);
        let signed = [0.0, -0.0, 0.0, -0.0, -0.0, 0.0, -0.0, 0.0];
        assert_eq!(quantile_and_round(&signed, &shape, 0.55, 1).unwrap(), mask);
        for kept in 0..=40 {
            let counts: Vec<_> =
                (0..10).map(|head| kept / 10 + usize::from(head < kept % 10)).collect();
            assert_eq!(aligned_counts(&[0.0; 40], 4, kept, 1), counts);
        }
    }

    #[test]
    fn extremes_and_bad_input() {
        let scores = [1.0, 2.0, 3.0, 4.0];
        let shape = ModelShape::new(1, 1, 1, 4).unwrap();
        assert!(quantile_and_round(&scores, &shape, 0.0, 4).unwrap().heads()[0].keeps_all());
        assert!(quantile_and_round(&scores, &shape, 1.0, 4).unwrap().heads()[0].is_dead());
        for (ratio, alignment) in
            [(-0.1, 1), (1.1, 1), (f64::NAN, 1), (0.5, 0), (0.5, 3), (0.5, 8), (0.5, usize::MAX)]
        {
            let result = quantile_and_round(&scores, &shape, ratio, alignment);
            assert!(result.is_err(), "{ratio} {alignment}");
        }
        assert!(quantile_and_round(&scores[1..], &shape, 0.5, 1).is_err());
        let shape = ModelShape::new(2, 3, 3, 4).unwrap();
        let mut scores = [0.0; 24];
        scores[22] = f32::NAN;
        let message = quantile_and_round(&scores, &shape, 0.5, 1).unwrap_err().to_string();
        assert!(message.contains("layer 1, KV head 2, channel 2"), "{message}");
    }

    proptest! {
        /// Without ties, the count is that of `score >= numpy.quantile(scores, ratio)`.
        #[test]
        fn agrees_with_an_interpolated_quantile(
            order in Just((0..96u32).collect::<Vec<_>>()).prop_shuffle(), ratio in 0.0..=1.0f64,
        ) {
            let scores: Vec<f32> = order.iter().map(|&rank| rank as f32).collect();
            let at = ratio * 95.0;
            let quantile = at.floor() + at.fract();
            let shape = ModelShape::new(3, 2, 2, 16).unwrap();
            let mask = quantile_and_round(&scores, &shape, ratio, 1).unwrap();
            for (head, scores) in mask.heads().iter().zip(scores.chunks(16)) {
                let above: Vec<u16> = (0..16u16)
                    .filter(|&c| f64::from(scores[usize::from(c)]) >= quantile)
                    .collect();
                prop_assert_eq!(head.kept(), above);
            }
        }
    }
}
