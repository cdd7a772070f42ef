//! KV heads over the ranks of a tensor-parallel group: [`HeadPartition`], [`ModelMask::shard`].
//!
//! Every rank has the same number of heads, so weights split evenly. Kept channels do not: dead heads and
//! wide ones come together by chance, and each layer waits for the rank whose heads hold the most bytes.

use crate::{
    ChannelMask, Error, HeadPrecision, KvHead, Layer, MaskInfo, ModelMask, ModelShape, Result,
};

/// Which KV heads each rank of a tensor-parallel group holds, layer by layer.
///
/// ```
/// use leank_core::{ChannelMask, HeadPartition, KvHead, Layer, ModelMask};
///
/// // Four KV heads: two keep everything, two are dead.
/// let heads = [64, 64, 0, 0].map(|kept| ChannelMask::new(64, (0..kept).collect()).unwrap());
/// let mask = ModelMask::new(1, 4, 64, heads.to_vec())?;
///
/// let naive = HeadPartition::contiguous(&mask, 2)?;
/// let balanced = HeadPartition::balanced(&mask, 2)?;
/// assert_eq!(naive.balance(&mask)?.slowest, 2.0);
/// assert_eq!(balanced.balance(&mask)?.slowest, 1.0);
///
/// // A rank loads the rows of Q, K, V (and columns of O) of its heads, and this mask.
/// assert_eq!(balanced.heads(Layer(0), 0), [KvHead(0), KvHead(3)]);
/// let own = mask.shard(&balanced, 0)?;
/// assert_eq!((own.kv_heads(), own.summary().dead_heads), (2, 1));
/// # Ok::<(), leank_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadPartition {
    world: usize,
    kv_heads: usize,
    /// `[layers, kv_heads]`: the heads of the first rank, then those of the second, ...
    order: Vec<KvHead>,
}

/// How evenly a partition spreads the bytes of lean blocks. Sinks and recent windows are the same for
/// every head.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "files", derive(serde::Serialize))]
pub struct Balance {
    /// Bytes of lean blocks of 16-bit elements per rank, each over the mean of the ranks: what memory the
    /// middle takes. All 1 where a mask keeps nothing.
    pub ranks: Vec<f64>,
    /// Time of a step's attention against even ranks: the layers one after the other, each as long as its
    /// heaviest rank takes.
    pub slowest: f64,
}

impl HeadPartition {
    /// The usual split: rank `r` has heads `r * n..(r + 1) * n`, `n = kv_heads / world`.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `world` is 0 or does not divide the KV heads.
    pub fn contiguous(mask: &ModelMask, world: usize) -> Result<Self> {
        check_world(mask.kv_heads(), world)?;
        let heads = (0..mask.layers()).flat_map(|_| (0..mask.kv_heads()).map(KvHead));
        Ok(Self { world, kv_heads: mask.kv_heads(), order: heads.collect() })
    }

    /// A split that evens out the bytes of lean blocks: in every layer, so that no rank is waited for,
    /// then over the layers, so that memory is even too.
    ///
    /// In no layer is its heaviest rank heavier than in [`HeadPartition::contiguous`]. Two heads a rank
    /// are split as evenly as they can be; with more, no exchange of two heads makes a layer's sum of
    /// squares smaller. The same mask gives the same partition everywhere.
    ///
    /// # Errors
    /// As [`HeadPartition::contiguous`].
    pub fn balanced(mask: &ModelMask, world: usize) -> Result<Self> {
        let mut partition = Self::contiguous(mask, world)?;
        let mut totals = vec![0u64; world];
        for (layer, order) in partition.order.chunks_exact_mut(mask.kv_heads()).enumerate() {
            let bytes = mask.lean_bytes(Layer(layer));
            let mut groups = even_groups(&bytes, world);
            // The heaviest heads to the rank that has the least so far.
            groups.sort_by_key(|heads| std::cmp::Reverse(sum(&bytes, heads)));
            let mut ranks: Vec<usize> = (0..world).collect();
            ranks.sort_by_key(|&rank| totals[rank]);
            for (heads, rank) in groups.iter_mut().zip(ranks) {
                heads.sort_unstable();
                totals[rank] += sum(&bytes, heads);
                let own = &mut order[rank * heads.len()..][..heads.len()];
                own.iter_mut().zip(heads).for_each(|(to, head)| *to = KvHead(*head));
            }
        }
        Ok(partition)
    }

    /// Ranks of the group.
    #[must_use]
    pub fn world(&self) -> usize {
        self.world
    }

    /// The heads of a rank in a layer, ascending.
    ///
    /// # Panics
    /// When an index is out of range.
    #[must_use]
    pub fn heads(&self, layer: Layer, rank: usize) -> &[KvHead] {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        let own = self.kv_heads / self.world;
        &self.order(layer)[rank * own..][..own]
    }

    /// All heads of a layer, rank after rank: bring weights into this order once and a contiguous split
    /// of them is this partition. Query heads go with their KV head.
    ///
    /// # Panics
    /// When the index is out of range.
    #[must_use]
    pub fn order(&self, layer: Layer) -> &[KvHead] {
        &self.order[layer.0 * self.kv_heads..][..self.kv_heads]
    }

    /// How even this partition is for a mask.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a mask of another shape.
    pub fn balance(&self, mask: &ModelMask) -> Result<Balance> {
        self.check(mask)?;
        let mut totals = vec![0u64; self.world];
        let mut waited = 0u64;
        for layer in (0..mask.layers()).map(Layer) {
            let bytes = mask.lean_bytes(layer);
            let of = |rank| self.heads(layer, rank).iter().map(|head| bytes[head.0]).sum::<u64>();
            let ranks: Vec<u64> = (0..self.world).map(of).collect();
            waited += ranks.iter().max().copied().unwrap_or(0);
            totals.iter_mut().zip(ranks).for_each(|(total, own)| *total += own);
        }
        let mean = totals.iter().sum::<u64>() as f64 / self.world as f64;
        let over_mean = |bytes: u64| if mean > 0.0 { bytes as f64 / mean } else { 1.0 };
        Ok(Balance {
            ranks: totals.into_iter().map(over_mean).collect(),
            slowest: over_mean(waited),
        })
    }

    fn check(&self, mask: &ModelMask) -> Result<()> {
        let layers = self.order.len() / self.kv_heads;
        if (layers, self.kv_heads) == (mask.layers(), mask.kv_heads()) {
            return Ok(());
        }
        let expected = format!("{layers} layers × {} KV heads", self.kv_heads);
        Err(Error::mismatch("mask against the partition", expected, mask))
    }
}

impl ModelMask {
    /// The mask of one rank: its heads of every layer, in the partition's order, with their precisions
    /// and scores.
    ///
    /// It carries no fingerprint, since a rank's shape is not the model's: check the whole mask against
    /// the model ([`ModelMask::check_model`]) before it is split.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a partition of another shape, [`Error::Invalid`] for a rank that it does
    /// not have.
    pub fn shard(&self, partition: &HeadPartition, rank: usize) -> Result<Self> {
        partition.check(self)?;
        if rank >= partition.world {
            let why = format!("{rank} of {}; ranks count from 0", partition.world);
            return Err(Error::invalid("rank", why));
        }
        let layers = (0..self.layers()).map(Layer);
        let own: Vec<(Layer, KvHead)> = layers
            .flat_map(|layer| partition.heads(layer, rank).iter().map(move |&head| (layer, head)))
            .collect();
        let heads: Vec<ChannelMask> =
            own.iter().map(|&(layer, head)| self.head(layer, head).clone()).collect();
        let precisions: Vec<HeadPrecision> =
            own.iter().map(|&(layer, head)| self.precision(layer, head)).collect();
        let kv_heads = self.kv_heads() / partition.world;
        let mut shard = Self::new(self.layers(), kv_heads, self.head_dim(), heads)?
            .with_precisions(precisions)?
            .with_info(MaskInfo { fingerprint: None, ..self.info().clone() })?;
        if let Some(scores) = self.scores() {
            let of = |&(layer, head): &(Layer, KvHead)| {
                let at = layer.0 * self.kv_heads() + head.0;
                &scores[at * self.head_dim()..][..self.head_dim()]
            };
            shard = shard.with_scores(own.iter().flat_map(of).copied().collect())?;
        }
        Ok(shard)
    }

    /// Bytes of a lean block of 16-bit elements per KV head of a layer.
    fn lean_bytes(&self, layer: Layer) -> Vec<u64> {
        (0..self.kv_heads()).map(|head| self.lean_head_bytes(layer, KvHead(head)) as u64).collect()
    }
}

impl ModelShape {
    /// The shape that one of `world` ranks has: its share of the heads.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `world` is 0 or does not divide the KV heads.
    pub fn shard(&self, world: usize) -> Result<Self> {
        check_world(self.kv_heads, world)?;
        Self::new(self.layers, self.query_heads / world, self.kv_heads / world, self.head_dim)
    }
}

fn check_world(kv_heads: usize, world: usize) -> Result<()> {
    if world > 0 && kv_heads.is_multiple_of(world) {
        return Ok(());
    }
    let why = format!(
        "{world} ranks cannot share {kv_heads} KV heads evenly; take a number that divides them, and where \
         there are more ranks than KV heads, let several ranks hold the same ones"
    );
    Err(Error::invalid("tensor-parallel group", why))
}

/// `world` groups of equally many heads, their bytes as even as exchanges of two heads make them.
fn even_groups(bytes: &[u64], world: usize) -> Vec<Vec<usize>> {
    let size = bytes.len() / world;
    let mut contiguous: Vec<Vec<usize>> =
        (0..world).map(|rank| (rank * size..(rank + 1) * size).collect()).collect();
    let mut greedy = heaviest_first(bytes, world, size);
    exchange(bytes, &mut contiguous);
    exchange(bytes, &mut greedy);
    let heaviest = |groups: &[Vec<usize>]| groups.iter().map(|own| sum(bytes, own)).max();
    if heaviest(&greedy) <= heaviest(&contiguous) { greedy } else { contiguous }
}

fn sum(bytes: &[u64], heads: &[usize]) -> u64 {
    heads.iter().map(|&head| bytes[head]).sum()
}

/// The heaviest head to the lightest group with room, and so on. For two heads a group the optimum is
/// another: the heaviest with the lightest.
fn heaviest_first(bytes: &[u64], world: usize, size: usize) -> Vec<Vec<usize>> {
    let mut heads: Vec<usize> = (0..bytes.len()).collect();
    heads.sort_by_key(|&head| std::cmp::Reverse(bytes[head]));
    if size == 2 {
        return (0..world).map(|i| vec![heads[i], heads[2 * world - 1 - i]]).collect();
    }
    let mut groups = vec![(0, Vec::with_capacity(size)); world];
    for head in heads {
        let open = groups.iter_mut().filter(|(_, own)| own.len() < size);
        if let Some((sum, own)) = open.min_by_key(|(sum, _)| *sum) {
            *sum += bytes[head];
            own.push(head);
        }
    }
    groups.into_iter().map(|(_, own)| own).collect()
}

/// Exchanges heads between groups as long as that brings the groups' sums closer together. It never
/// makes the heaviest group heavier, and ends, since each exchange lowers the sum of squares.
fn exchange(bytes: &[u64], groups: &mut [Vec<usize>]) {
    for group in groups.iter_mut() {
        group.sort_by_key(|&head| bytes[head]);
    }
    let mut sums: Vec<u64> = groups.iter().map(|own| sum(bytes, own)).collect();
    let mut done = false;
    while !done {
        done = true;
        for a in 0..groups.len() {
            for b in 0..groups.len() {
                let apart = |sums: &[u64]| sums[a].saturating_sub(sums[b]);
                while let Some((i, j)) = best_exchange(bytes, &groups[a], &groups[b], apart(&sums))
                {
                    let moved = bytes[groups[a][i]] - bytes[groups[b][j]];
                    (sums[a], sums[b]) = (sums[a] - moved, sums[b] + moved);
                    let head = groups[a][i];
                    groups[a][i] = groups[b][j];
                    groups[b][j] = head;
                    for group in [a, b] {
                        groups[group].sort_by_key(|&head| bytes[head]);
                    }
                    done = false;
                }
            }
        }
    }
}

/// Which head of `from` and which of `to`, both lightest first, bring two groups that are `apart` closest
/// together when they change places. None where none does: what moves must be less than they are apart.
fn best_exchange(
    bytes: &[u64],
    from: &[usize],
    to: &[usize],
    apart: u64,
) -> Option<(usize, usize)> {
    if apart < 2 {
        return None;
    }
    let mut best = None;
    for (i, &head) in from.iter().enumerate() {
        let x = bytes[head];
        // Half of what they are apart is the best to move: the heads on both sides of that.
        let above = to.partition_point(|&other| bytes[other] < x.saturating_sub(apart / 2));
        for j in [above.wrapping_sub(1), above] {
            let Some(y) = to.get(j).map(|&other| bytes[other]) else { continue };
            if y < x && x - y < apart {
                let left = apart.abs_diff(2 * (x - y));
                if best.is_none_or(|(least, _)| left < least) {
                    best = Some((left, (i, j)));
                }
            }
        }
    }
    best.map(|(_, place)| place)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD_DIM: usize = 8;

    fn mask(layers: usize, kv_heads: usize, counts: &[u16]) -> ModelMask {
        let heads =
            counts.iter().map(|&n| ChannelMask::new(HEAD_DIM, (0..n).collect()).unwrap()).collect();
        ModelMask::new(layers, kv_heads, HEAD_DIM, heads).unwrap()
    }

    #[test]
    fn groups_begin_with_the_heaviest_heads() {
        assert_eq!(heaviest_first(&[9, 8, 7, 6, 5, 4], 2, 3), [[0, 3, 4], [1, 2, 5]]);
    }

    #[test]
    fn of_all_exchanges_the_best_is_found() {
        assert_eq!(best_exchange(&[10, 3, 6], &[0], &[1, 2], 10), Some((0, 1)));
        // The first one of two that are as good.
        assert_eq!(best_exchange(&[10, 4, 6], &[0], &[1, 2], 10), Some((0, 0)));
        assert_eq!(best_exchange(&[3, 2], &[0], &[1], 2), Some((0, 0)));
        assert_eq!(best_exchange(&[3, 2], &[0], &[1], 1), None);
    }

    /// The least that the heaviest of `world` equally large groups can have.
    fn least_possible(bytes: &[u64], world: usize) -> u64 {
        fn place(bytes: &[u64], sums: &mut [u64], room: &mut [usize]) -> u64 {
            let Some((first, rest)) = bytes.split_first() else {
                return sums.iter().max().copied().unwrap();
            };
            let mut best = u64::MAX;
            for rank in 0..sums.len() {
                if room[rank] > 0 {
                    room[rank] -= 1;
                    sums[rank] += first;
                    best = best.min(place(rest, sums, room));
                    sums[rank] -= first;
                    room[rank] += 1;
                }
            }
            best
        }
        place(bytes, &mut vec![0; world], &mut vec![bytes.len() / world; world])
    }

    fn masks() -> impl Strategy<Value = (ModelMask, usize)> {
        let shapes = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (8, 8)];
        (prop::sample::select(shapes.to_vec()), 1..5usize).prop_flat_map(
            |((kv_heads, world), layers)| {
                let counts = prop::collection::vec(0..=HEAD_DIM as u16, layers * kv_heads);
                counts.prop_map(move |counts| (mask(layers, kv_heads, &counts), world))
            },
        )
    }

    proptest! {
        #[test]
        fn every_head_has_one_rank_and_shards_are_the_mask((mask, world) in masks()) {
            for partition in [
                HeadPartition::contiguous(&mask, world).unwrap(),
                HeadPartition::balanced(&mask, world).unwrap(),
            ] {
                let shards: Vec<_> = (0..world).map(|rank| mask.shard(&partition, rank).unwrap()).collect();
                for layer in (0..mask.layers()).map(Layer) {
                    let mut seen: Vec<_> = partition.order(layer).to_vec();
                    seen.sort();
                    prop_assert_eq!(seen, (0..mask.kv_heads()).map(KvHead).collect::<Vec<_>>());
                    for (rank, shard) in shards.iter().enumerate() {
                        let heads = partition.heads(layer, rank);
                        prop_assert!(heads.is_sorted());
                        for (own, &head) in shard.layer(layer).iter().zip(heads) {
                            prop_assert_eq!(own, mask.head(layer, head));
                        }
                    }
                }
            }
        }

        #[test]
        fn layers_are_even((mask, world) in masks()) {
            let partition = HeadPartition::balanced(&mask, world).unwrap();
            let naive = HeadPartition::contiguous(&mask, world).unwrap();
            for layer in (0..mask.layers()).map(Layer) {
                let bytes = mask.lean_bytes(layer);
                let heaviest = |partition: &HeadPartition| (0..world).map(|rank| {
                    partition.heads(layer, rank).iter().map(|head| bytes[head.0]).sum::<u64>()
                }).max().unwrap();
                let (found, least) = (heaviest(&partition), least_possible(&bytes, world));
                prop_assert!(found <= heaviest(&naive));
                if mask.kv_heads() == 2 * world {
                    prop_assert_eq!(found, least);
                }
                // No exchange of two heads makes the sum of squares smaller.
                let sums: Vec<u64> = (0..world).map(|rank| {
                    partition.heads(layer, rank).iter().map(|head| bytes[head.0]).sum()
                }).collect();
                for (a, b) in (0..world).flat_map(|a| (0..world).map(move |b| (a, b))) {
                    for from in partition.heads(layer, a) {
                        for to in partition.heads(layer, b) {
                            let moved = bytes[from.0].saturating_sub(bytes[to.0]);
                            prop_assert!(moved == 0 || moved >= sums[a].saturating_sub(sums[b]));
                        }
                    }
                }
                // Local: at worst the largest difference of two heads is left.
                let spread = bytes.iter().max().unwrap() - bytes.iter().min().unwrap();
                prop_assert!(found <= least + spread);
            }
            let (own, naive) = (partition.balance(&mask).unwrap(), naive.balance(&mask).unwrap());
            prop_assert!(own.slowest <= naive.slowest);
            prop_assert!((own.ranks.iter().sum::<f64>() - world as f64).abs() < 1e-9);
            prop_assert!(own.ranks.iter().all(|&rank| rank <= own.slowest + 1e-9));
        }
    }

    #[test]
    fn memory_evens_out_over_the_layers() {
        // In each layer one rank must have the whole head; they take turns.
        let mask = mask(2, 2, &[8, 0, 8, 0]);
        let balance = HeadPartition::balanced(&mask, 2).unwrap().balance(&mask).unwrap();
        assert_eq!((balance.ranks, balance.slowest), (vec![1.0, 1.0], 2.0));
        // Nothing is even.
        let dead = self::mask(2, 2, &[0; 4]);
        let balance = HeadPartition::balanced(&dead, 2).unwrap().balance(&dead).unwrap();
        assert_eq!((balance.ranks, balance.slowest), (vec![1.0, 1.0], 1.0));
    }

    /// As many heads as a shape may have: an hour where each exchange were looked for from the start.
    #[test]
    #[cfg_attr(miri, ignore = "hours")]
    fn many_heads_are_even_soon() {
        let heads = 1 << 14;
        let counts: Vec<u16> =
            (0..heads).map(|head| if head < heads / 2 { 8 } else { head % 7 }).collect();
        let mask = mask(1, usize::from(heads), &counts);
        for world in [2, 64, 4096] {
            let balance = HeadPartition::balanced(&mask, world).unwrap().balance(&mask).unwrap();
            assert!(balance.slowest < 1.1, "{world} ranks: {balance:?}");
        }
    }

    #[test]
    fn the_better_of_two_beginnings_is_taken() {
        // From the heaviest heads on exchanges end with 6656 bytes in the heavier rank, from contiguous ones with half.
        let mask = mask(1, 8, &[5, 8, 5, 6, 4, 1, 6, 3]);
        let partition = HeadPartition::balanced(&mask, 2).unwrap();
        assert_eq!(partition.balance(&mask).unwrap().slowest, 1.0);
        assert_eq!(partition.world(), 2);
    }

    #[test]
    fn a_shard_carries_what_belongs_to_its_heads() {
        let precision = "k8v4".parse::<HeadPrecision>().unwrap();
        let plain = HeadPrecision::default();
        let precisions = vec![plain, precision, plain, plain];
        let whole = mask(2, 2, &[4, 8, 4, 4]).with_precisions(precisions).unwrap();
        let scores: Vec<f32> = (0..32).map(|score| score as f32).collect();
        let info =
            MaskInfo { alignment: Some(4), model_id: Some("M".into()), ..Default::default() };
        let whole = whole.with_scores(scores).unwrap().with_info(info).unwrap();
        let shard = whole.shard(&HeadPartition::contiguous(&whole, 2).unwrap(), 1).unwrap();
        assert_eq!(shard.precision(Layer(0), KvHead(0)), precision);
        let scores: Vec<f32> = (8..16).chain(24..32).map(|score| score as f32).collect();
        assert_eq!(shard.scores(), Some(&scores[..]));
        assert_eq!(shard.info().model_id.as_deref(), Some("M"));
    }

    #[test]
    fn groups_that_do_not_fit_are_refused() {
        let mask = mask(1, 2, &[8, 8]);
        for world in [0, 3, 4] {
            let message = HeadPartition::balanced(&mask, world).unwrap_err().to_string();
            assert!(message.contains(&format!("{world} ranks")), "{message}");
            assert!(ModelShape::new(1, 4, 2, 8).unwrap().shard(world).is_err());
        }
        let nothing = ModelShape { layers: 1, query_heads: 0, kv_heads: 0, head_dim: 8 };
        assert!(nothing.shard(0).is_err());
        let two = HeadPartition::contiguous(&mask, 2).unwrap();
        assert!(mask.shard(&two, 2).unwrap_err().to_string().contains("2 of 2"));
        let other = ModelMask::dense(&ModelShape::new(2, 2, 2, 8).unwrap());
        assert!(other.shard(&two, 0).is_err() && two.balance(&other).is_err());
        assert_eq!(ModelShape::new(1, 4, 2, 8).unwrap().shard(2).unwrap().query_heads, 2);
    }
}
