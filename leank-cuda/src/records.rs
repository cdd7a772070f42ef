//! What kernels take: the structs of `kernels/*.cu`, field by field.

use bytemuck::{Pod, Zeroable};

/// A sequence of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Sequence {
    /// Index of its block table in the tables of the step.
    pub(crate) table: u32,
    /// Position of its first new token.
    pub(crate) start: u32,
    /// New tokens.
    pub(crate) tokens: u32,
    /// Row of its first new token in the step.
    pub(crate) row: u32,
    /// Lean blocks: indices in its block table.
    pub(crate) lean_begin: u32,
    pub(crate) lean_end: u32,
    /// Of the sequences before it in the same list: items (attention) or slices (append).
    pub(crate) before: u32,
    /// Items per KV head.
    pub(crate) tiles: u32,
}

/// A KV head of one layer in lean blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Head {
    pub(crate) offset: u32,
    pub(crate) kept: u16,
    /// Kinds of codes as kernels number them; 0: plain elements.
    pub(crate) k_codes: u8,
    pub(crate) v_codes: u8,
    pub(crate) tiles: u16,
    /// Slices that are read together.
    pub(crate) unit: u16,
    pub(crate) channels: u32,
}

/// Where the blocks of one layer lie in slabs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Blocks {
    /// Full, lean.
    pub(crate) layer_offset: [u64; 2],
    /// Full, lean.
    pub(crate) bytes: [u32; 2],
    pub(crate) full_head: u32,
    pub(crate) block: u32,
    pub(crate) slices: u32,
    pub(crate) padding: u32,
}

/// Activations.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct View {
    pub(crate) data: u64,
    pub(crate) token_stride: u64,
    pub(crate) head_stride: u64,
    pub(crate) dtype: u32,
    pub(crate) aligned: u32,
}

/// Blocks to pack or to copy: table entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Pair {
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// Bytes of a worker's start (`Start`), which only the device writes and reads.
pub(crate) const START_BYTES: usize = 96;

/// Parameters of `cut`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Cut {
    pub(crate) sequences: u64,
    pub(crate) heads: u64,
    pub(crate) starts: u64,
    pub(crate) sequence_count: u32,
    pub(crate) items: u32,
    pub(crate) workers: u32,
    pub(crate) kv_heads: u32,
    pub(crate) rows: u32,
    pub(crate) group: u32,
    pub(crate) block: u32,
    pub(crate) slices: u32,
}

/// Parameters of `attend`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Attend {
    pub(crate) blocks: Blocks,
    pub(crate) sequences: u64,
    pub(crate) tables: u64,
    pub(crate) starts: u64,
    pub(crate) heads: u64,
    pub(crate) channels: u64,
    pub(crate) q: View,
    pub(crate) out: View,
    pub(crate) partial: u64,
    pub(crate) partial_weight: u64,
    pub(crate) workers: u32,
    pub(crate) kv_heads: u32,
    pub(crate) group: u32,
    pub(crate) head_dim: u32,
    pub(crate) scale: f32,
    pub(crate) cap: f32,
    pub(crate) inverse_cap: f32,
    pub(crate) padding: u32,
}

/// Parameters of `append`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Append {
    pub(crate) blocks: Blocks,
    pub(crate) sequences: u64,
    pub(crate) tables: u64,
    pub(crate) heads: u64,
    pub(crate) channels: u64,
    pub(crate) k: View,
    pub(crate) v: View,
    pub(crate) sequence_count: u32,
    pub(crate) head_dim: u32,
}

/// Parameters of `pack` and `copy`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Move {
    pub(crate) layers: u64,
    pub(crate) pairs: u64,
    pub(crate) heads: u64,
    pub(crate) channels: u64,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
}

// The kernels assert the same sizes.
const _: () = {
    assert!(size_of::<View>() == 32 && size_of::<Sequence>() == 32 && size_of::<Head>() == 16);
    assert!(size_of::<Blocks>() == 40 && size_of::<Pair>() == 16 && size_of::<Move>() == 40);
    assert!(size_of::<Cut>() == 56 && size_of::<Attend>() == 192 && size_of::<Append>() == 144);
};
