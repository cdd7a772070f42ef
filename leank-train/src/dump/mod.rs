//! Activation dumps: what one pass over a model leaves for learning.
//!
//! A dump is a directory with `manifest.json` ([`Manifest`]) and one safetensors file per layer,
//! `layer-000.safetensors` and so on. For every sequence `i` with a prefix of `T_i` tokens and
//! `N` decode positions a layer file holds, row-major and all in the manifest's dtype:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `q.i` | `[query_heads, N, head_dim]` | queries of the decode positions, after RoPE |
//! | `g.i` | `[R, query_heads, N, head_dim]` | probe: gradient at the attention output, per draw |
//! | `k.i` | `[kv_heads, T_i + N, head_dim]` | keys of prefix and positions, after RoPE |
//! | `v.i` | `[kv_heads, T_i + N, head_dim]` | values of the same tokens |
//!
//! Channels are in the order of Hugging Face's RoPE (halves, not interleaved pairs). Decode
//! position `n` stands at token `T_i + n` and sees tokens `0..=T_i + n`.
//!
//! [`DumpWriter`] writes beside the target and renames when all is on the disk, so a directory
//! that [`Dump::open`] accepts is whole. What a killed process left there, the next writer of the
//! same dump goes on with, and the next one of the same name removes. The metadata of a layer file has
//! a checksum for each range that is read at once, so that damage is found where it is; the id of a
//! dump ([`Dump::id`]) covers them. Reading takes one head of one tensor of one sequence at a time, so
//! that memory stays bounded whatever the dump's size.

mod again;
mod convert;
mod journal;
mod layout;
mod manifest;
mod place;
mod reader;
mod sums;
mod writer;

pub use layout::{MANIFEST_FILE, layer_file_name};
pub use manifest::{
    FORMAT_VERSION, MAX_DRAWS, MAX_POSITIONS, MAX_PREFIX, MAX_SEQUENCES, Manifest, Probe,
    SequenceInfo,
};
pub use reader::{Dump, HeadData, LayerDump};
pub use writer::{DumpWriter, Existing, SequenceTensors};
