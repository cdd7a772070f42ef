//! Random cases.

use leank_core::{
    CacheConfig, ChannelMask, Dtype, HeadFormat, LeanFormat, ModelMask, ModelShape, Windows,
};
use proptest::prelude::*;

/// Which channels one KV head keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// None.
    Dead,
    /// All.
    All,
    /// A random set whose size is a multiple of the alignment.
    Some {
        /// Chooses the set.
        seed: u64,
        /// The alignment: 1, 8, 16 or 32, where `head_dim` allows it.
        alignment: usize,
    },
}

/// New tokens of one sequence in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Index of the sequence in the case.
    pub sequence: usize,
    /// New tokens.
    pub tokens: usize,
    /// Whether they attend.
    pub attend: bool,
}

/// A random cache and what happens to it.
#[derive(Clone, Debug)]
pub struct Case {
    /// Attention shape.
    pub shape: ModelShape,
    /// Kept channels per head, layer-major.
    pub heads: Vec<HeadKind>,
    /// Windows.
    pub windows: Windows,
    /// Tokens per block.
    pub block: usize,
    /// Type of full blocks.
    pub dtype: Dtype,
    /// Formats of the heads in lean blocks, where they are not plain elements of `dtype`.
    pub formats: Option<Vec<HeadFormat>>,
    /// Factor on q·k, where it is not the default.
    pub scale: Option<f32>,
    /// Soft-cap.
    pub soft_cap: Option<f32>,
    /// Number of sequences.
    pub sequences: usize,
    /// Steps; each names a sequence at most once.
    pub steps: Vec<Vec<Load>>,
    /// Seed of the activations.
    pub seed: u64,
}

impl Case {
    /// The configuration of the case's cache.
    ///
    /// # Panics
    /// Never for a case that `cases` made.
    #[must_use]
    pub fn config(&self) -> CacheConfig {
        let shape = self.shape;
        let heads = self.heads.iter().map(|kind| channel_mask(*kind, shape.head_dim)).collect();
        let mask = ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads)
            .expect("the case is consistent");
        CacheConfig {
            windows: self.windows,
            block: self.block,
            dtype: self.dtype,
            formats: self.formats.clone(),
            scale: self.scale,
            soft_cap: self.soft_cap,
            ..CacheConfig::new(shape, mask).expect("the case is consistent")
        }
    }
}

fn channel_mask(kind: HeadKind, head_dim: usize) -> ChannelMask {
    match kind {
        HeadKind::Dead => ChannelMask::none(head_dim),
        HeadKind::All => ChannelMask::all(head_dim),
        HeadKind::Some { seed, alignment } => {
            let steps = head_dim / alignment;
            let count = alignment * (seed as usize % (steps + 1));
            // The channels whose hashes are smallest.
            let mut channels: Vec<u16> = (0..head_dim as u16).collect();
            let key = |c: &u16| (seed ^ u64::from(*c)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            channels.sort_by_key(key);
            channels.truncate(count);
            channels.sort_unstable();
            ChannelMask::new(head_dim, channels).expect("channels of the head")
        }
    }
}

fn head_kind() -> impl Strategy<Value = HeadKind> {
    prop_oneof![
        1 => Just(HeadKind::Dead),
        1 => Just(HeadKind::All),
        4 => (any::<u64>(), prop::sample::select(vec![1usize, 8, 16, 32]))
            .prop_map(|(seed, alignment)| HeadKind::Some { seed, alignment }),
    ]
}

/// `small` under Miri, which takes a thousand times as long for everything.
pub(crate) fn or_small(usual: usize, small: usize) -> usize {
    if cfg!(miri) { small } else { usual }
}

fn shape() -> impl Strategy<Value = ModelShape> {
    let head_dim = [1usize, 3, 8, 20, 33, 64, 80, 88, 96, 128, 256];
    let head_dim = prop::sample::select(head_dim[..or_small(11, 5)].to_vec());
    let (layers, group, kv_heads) = (1..or_small(3, 2), 1..or_small(9, 4), 1..or_small(4, 3));
    (layers, group, kv_heads, head_dim).prop_map(|(layers, group, kv_heads, head_dim)| {
        ModelShape::new(layers, group * kv_heads, kv_heads, head_dim).expect("in range")
    })
}

fn windows() -> impl Strategy<Value = Windows> {
    let sink = prop_oneof![Just(0usize), 1..or_small(100, 8)];
    let recent = 1..or_small(150, 12);
    let recent = prop_oneof![2 => Just(0usize), 8 => recent, 1 => Just(usize::MAX)];
    (sink, recent).prop_map(|(sink, recent)| Windows { sink, recent })
}

/// New tokens of one step: mostly one, often a block's edge, sometimes hundreds.
fn tokens(block: usize) -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => Just(1usize),
        2 => 2usize..8,
        2 => prop::sample::select(vec![block, block + 1, (block - 1).max(1), 2 * block]),
        2 => 1..or_small(300, 20),
    ]
}

fn steps(block: usize, sequences: usize) -> impl Strategy<Value = Vec<Vec<Load>>> {
    let load = (0..sequences, tokens(block), prop::bool::weighted(0.7))
        .prop_map(|(sequence, tokens, attend)| Load { sequence, tokens, attend });
    let step = prop::collection::vec(load, 1..=sequences).prop_map(|mut loads| {
        let mut named = Vec::new();
        loads.retain(|load| {
            let first = !named.contains(&load.sequence);
            named.push(load.sequence);
            first
        });
        loads
    });
    prop::collection::vec(step, 1..or_small(8, 4))
}

/// Random cases. `types`: types of full blocks, each with the formats of lean blocks beside them.
///
/// # Panics
/// When there are none.
pub(crate) fn cases(types: Vec<(Dtype, Vec<LeanFormat>)>) -> impl Strategy<Value = Case> {
    let types = prop::sample::select(types);
    let block = prop::sample::select([1usize, 3, 8, 16, 32, 64][..or_small(6, 4)].to_vec());
    let sequences = 1..or_small(4, 3);
    (shape(), block, sequences, types).prop_flat_map(move |(shape, block, sequences, types)| {
        let heads = shape.layers * shape.kv_heads;
        let (dtype, formats) = types;
        let format = prop::sample::select(formats);
        let format = (format.clone(), format).prop_map(|(k, v)| HeadFormat { k, v });
        (
            prop::collection::vec(head_kind(), heads),
            windows(),
            prop::option::weighted(0.5, prop::collection::vec(format, heads)),
            prop::option::weighted(0.3, 0.05f32..0.5),
            prop::option::weighted(0.2, 5.0f32..50.0),
            steps(block, sequences),
            any::<u64>(),
        )
            .prop_map(move |(heads, windows, formats, scale, soft_cap, steps, seed)| {
                Case {
                    heads: heads
                        .into_iter()
                        .map(|kind| fit_alignment(kind, shape.head_dim))
                        .collect(),
                    shape,
                    windows,
                    block,
                    dtype,
                    formats,
                    // Logits as large as those of 128 channels, which bounds on errors are for.
                    scale: scale.map(|scale| scale.min(5.6 / (shape.head_dim as f32).sqrt())),
                    soft_cap,
                    sequences,
                    steps,
                    seed,
                }
            })
    })
}

fn fit_alignment(kind: HeadKind, head_dim: usize) -> HeadKind {
    match kind {
        HeadKind::Some { seed, alignment } if alignment > head_dim => {
            HeadKind::Some { seed, alignment: 1 }
        }
        kind => kind,
    }
}
