//! Where a dump's sequences are cut from its texts.

use std::ops::Range;

use leank_train::rng::Rng;

/// A piece of a text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Cut {
    pub(crate) text: usize,
    pub(crate) tokens: Range<usize>,
}

/// Prefix lengths spread evenly over `shortest..=longest`, in a random order.
pub(crate) fn spread_prefixes(
    sequences: usize,
    (shortest, longest): (usize, usize),
    rng: &mut Rng,
) -> Vec<usize> {
    let steps = sequences.saturating_sub(1).max(1);
    let mut prefixes: Vec<usize> = (0..sequences)
        .map(|i| if sequences == 1 { longest } else { shortest + (longest - shortest) * i / steps })
        .collect();
    rng.shuffle(&mut prefixes);
    prefixes
}

/// Random places for sequences of `lengths` tokens in texts of `text_lengths` tokens, each of which
/// holds the longest sequence. Sequences of a text overlap only where it is too short for all of
/// its own; longer texts get more.
pub(crate) fn cut(lengths: &[usize], text_lengths: &[usize], rng: &mut Rng) -> Vec<Cut> {
    let mut room: Vec<i128> = text_lengths.iter().map(|&n| n as i128).collect();
    let mut of_text: Vec<Vec<usize>> = vec![Vec::new(); text_lengths.len()];
    for (sequence, &length) in lengths.iter().enumerate() {
        let widest = (0..room.len()).max_by_key(|&text| (room[text], std::cmp::Reverse(text)));
        if let Some(text) = widest {
            room[text] -= length as i128;
            of_text[text].push(sequence);
        }
    }
    let mut cuts = vec![Cut { text: 0, tokens: 0..0 }; lengths.len()];
    for (text, mut sequences) in of_text.into_iter().enumerate() {
        rng.shuffle(&mut sequences);
        let lengths: Vec<usize> = sequences.iter().map(|&i| lengths[i]).collect();
        for (i, start) in starts(&lengths, text_lengths[text], rng).into_iter().enumerate() {
            cuts[sequences[i]] = Cut { text, tokens: start..start + lengths[i] };
        }
    }
    cuts
}

/// Starts of pieces, in order, within `text` tokens.
fn starts(lengths: &[usize], text: usize, rng: &mut Rng) -> Vec<usize> {
    let total: usize = lengths.iter().sum();
    if total <= text {
        let mut gaps: Vec<usize> = lengths.iter().map(|_| rng.below(text - total + 1)).collect();
        gaps.sort_unstable();
        let before = lengths.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum - n)
        });
        gaps.iter().zip(before).map(|(gap, before)| gap + before).collect()
    } else {
        // One per stratum, so that they overlap as little as they must.
        let count = lengths.len() as f64;
        let place = |(i, n): (usize, &usize)| {
            let share = (i as f64 + rng.uniform()) / count;
            ((text - n) as f64 * share) as usize
        };
        lengths.iter().enumerate().map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_do_not_overlap_where_there_is_room() {
        for seed in 0..50 {
            let mut rng = Rng::new(seed);
            let lengths: Vec<usize> = (0..20).map(|i| 50 + i * 7).collect();
            let texts = [1500, 200, 1700];
            let cuts = cut(&lengths, &texts, &mut rng);
            for (i, a) in cuts.iter().enumerate() {
                assert_eq!(a.tokens.len(), lengths[i]);
                assert!(a.tokens.end <= texts[a.text]);
                for b in &cuts[..i] {
                    let apart = a.tokens.end <= b.tokens.start || b.tokens.end <= a.tokens.start;
                    let crowded = |text: usize| {
                        let used: usize =
                            cuts.iter().filter(|c| c.text == text).map(|c| c.tokens.len()).sum();
                        used > texts[text]
                    };
                    assert!(a.text != b.text || apart || crowded(a.text));
                }
            }
        }
    }

    #[test]
    fn crowded_texts_still_hold_every_piece() {
        let cuts = cut(&[90; 10], &[100], &mut Rng::new(1));
        assert!(cuts.iter().all(|c| c.tokens.end <= 100));
        assert!(cuts.iter().any(|c| c.tokens.start != cuts[0].tokens.start));
    }

    #[test]
    fn prefixes_reach_both_ends() {
        let mut prefixes = spread_prefixes(9, (100, 500), &mut Rng::new(2));
        assert_ne!(prefixes, (0..9).map(|i| 100 + 50 * i).collect::<Vec<_>>());
        prefixes.sort_unstable();
        assert_eq!(prefixes, (0..9).map(|i| 100 + 50 * i).collect::<Vec<_>>());
        assert_eq!(spread_prefixes(1, (100, 500), &mut Rng::new(2)), [500]);
    }
}
