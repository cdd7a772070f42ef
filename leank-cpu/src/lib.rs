//! The CPU backend of leank: a lean KV cache in host memory and its decode attention.
//!
//! [`Cpu`] is the backend, [`CpuCache`] the cache. One step through it:
//!
//! ```
//! use leank_core::{
//!     Backend, Cache, CacheConfig, ChannelMask, HostView, HostViewMut, Layer, ModelMask,
//!     ModelShape, StepEntry, ViewShape,
//! };
//! use leank_cpu::Cpu;
//!
//! // One layer, two query heads on one KV head, which keeps 4 of 8 channels.
//! let shape = ModelShape::new(1, 2, 1, 8)?;
//! let mask = ModelMask::new(1, 1, 8, vec![ChannelMask::new(8, vec![0, 2, 5, 7])?])?;
//! let mut cache = Cpu::new().create(CacheConfig::new(shape, mask)?)?;
//! let sequence = cache.add_sequence();
//!
//! // A prompt of 3000 tokens goes straight to where it belongs.
//! let k = vec![0.5f32; 3000 * 8];
//! let rows = ViewShape::contiguous(3000, 1, 8);
//! cache.plan(&[StepEntry::store(sequence, 3000)])?;
//! cache.append(Layer(0), HostView::new(&k[..], rows)?, HostView::new(&k[..], rows)?)?;
//! cache.commit()?;
//!
//! // One token decodes.
//! let (q, mut out) = (vec![1.0f32; 2 * 8], vec![0.0f32; 2 * 8]);
//! let (kv_row, q_row) = (ViewShape::contiguous(1, 1, 8), ViewShape::contiguous(1, 2, 8));
//! cache.plan(&[StepEntry::decode(sequence, 1)])?;
//! cache.append(Layer(0), HostView::new(&k[..8], kv_row)?, HostView::new(&k[..8], kv_row)?)?;
//! cache.attend(Layer(0), HostView::new(&q[..], q_row)?, HostViewMut::new(&mut out[..], q_row)?)?;
//! cache.commit()?;
//! assert!((out[0] - 0.5).abs() < 1e-3);
//! assert!(cache.memory().whole_kv_ratio().unwrap() < 1.0);
//! # Ok::<(), leank_core::Error>(())
//! ```
//!
//! **Layout.** K of a block is stored channel by channel, `[channels, block]`: the logits of a
//! block's tokens are then one vector, there are no horizontal sums, any number of kept channels
//! costs just itself, and packing a block copies whole runs. V is stored token by token,
//! `[block, head_dim]`, which is the order of its weighted sum.
#![forbid(unsafe_code)]

mod attend;
mod cache;
mod element;
mod executor;
mod kernel;
mod store;
mod write;

pub use cache::CpuCache;
pub use executor::Executor;

use leank_core::{Backend, CacheConfig, LayoutRules, Result};

/// Bytes at which K and V of a head start: a cache line.
const SECTION_ALIGN: usize = 64;

/// The CPU backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu {
    executor: Executor,
}

impl Cpu {
    /// A backend with the default executor: the rayon pool of the caller where the feature
    /// `rayon` is on, serial otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A backend that runs the work of a step on `executor`.
    #[must_use]
    pub fn with_executor(executor: Executor) -> Self {
        Self { executor }
    }
}

impl Backend for Cpu {
    type Cache = CpuCache;

    fn name(&self) -> String {
        format!("cpu (portable kernel, {})", self.executor)
    }

    fn layout_rules(&self) -> LayoutRules {
        LayoutRules { k_channel_multiple: 1, section_align: SECTION_ALIGN }
    }

    fn create(&self, config: CacheConfig) -> Result<Self::Cache> {
        CpuCache::new(config, self.layout_rules(), self.executor)
    }
}
