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
//! **Layout.** K of a block is stored channel by channel, `[channels, tokens]`: the logits of a
//! block's tokens are then vectors, there are no horizontal sums, any number of kept channels costs
//! just itself, and packing a block copies whole rows. V is stored token by token,
//! `[tokens, head_dim]`. Both halves of attention are then the same product, `out[r, lane] += Σ_d
//! left[r, d] · right[d, lane]`, written once for every instruction set ([`Isa`]).
#![deny(unsafe_code)]

mod attend;
mod cache;
#[cfg(feature = "capi")]
#[allow(unsafe_code, reason = "takes pointers from C")]
mod capi;
mod codes;
mod element;
mod executor;
#[allow(unsafe_code, reason = "vectors")]
mod kernel;
mod panels;
#[allow(unsafe_code, reason = "lends a closure to threads")]
mod pool;
mod prefetch;
mod rows;
mod running;
#[allow(unsafe_code, reason = "gives pages back to the system")]
mod store;
mod work;
mod write;

pub use cache::CpuCache;
#[cfg(feature = "rayon")]
pub use executor::Rayon;
pub use executor::{Executor, Serial};
pub use kernel::Isa;
pub use pool::{DEFAULT_SPIN, Pool};
pub use prefetch::Prefetch;

use std::sync::Arc;

use leank_core::{Backend, CacheConfig, Dtype, LayoutRules, LeanFormat, Result};

use kernel::Kernel;

/// Bytes at which K and V of a head start: a cache line.
const SECTION_ALIGN: usize = 64;

/// The CPU backend.
#[derive(Clone, Debug)]
pub struct Cpu {
    isa: Isa,
    kernel: Kernel,
    prefetch: Prefetch,
    executor: Arc<dyn Executor>,
}

impl Default for Cpu {
    fn default() -> Self {
        #[cfg(feature = "rayon")]
        let executor = Arc::new(Rayon);
        #[cfg(not(feature = "rayon"))]
        let executor = Arc::new(Serial);
        Self::with_executor(executor)
    }
}

impl Cpu {
    /// A backend with the best kernel for this CPU and the default executor: the rayon pool of the
    /// caller where the feature `rayon` is on, serial otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A backend that runs the work of a step on `executor`, with the best kernel for this CPU.
    #[must_use]
    pub fn with_executor(executor: Arc<dyn Executor>) -> Self {
        let isa = Isa::best();
        Self { isa, kernel: Kernel::best(), prefetch: Prefetch::best(), executor }
    }

    /// The same backend with the kernel for another instruction set.
    ///
    /// # Errors
    /// [`leank_core::Error::Unavailable`] where this CPU lacks it, or it was not compiled (feature `avx512`).
    pub fn with_isa(self, isa: Isa) -> Result<Self> {
        Ok(Self { isa, kernel: Kernel::new(isa)?, ..self })
    }

    /// The same backend with memory asked for in another way than [`Prefetch::best`].
    #[must_use]
    pub fn with_prefetch(self, prefetch: Prefetch) -> Self {
        Self { prefetch, ..self }
    }

    /// The kernel's instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Backend for Cpu {
    type Cache = CpuCache;

    fn name(&self) -> String {
        let threads = self.executor.threads();
        let plural = if threads == 1 { "" } else { "s" };
        format!("cpu ({} kernel, {threads} thread{plural})", self.isa)
    }

    fn layout_rules(&self) -> LayoutRules {
        let multiple = panels::DEPTH_MULTIPLE;
        LayoutRules {
            k_channel_multiple: multiple,
            v_token_multiple: multiple,
            section_align: SECTION_ALIGN,
            ..LayoutRules::PACKED
        }
    }

    fn lean_formats(&self, _full: Dtype) -> Vec<LeanFormat> {
        LeanFormat::ALL.into_iter().filter(|&format| format != LeanFormat::Fp8).collect()
    }

    fn create(&self, config: CacheConfig) -> Result<Self::Cache> {
        config.validate()?;
        config.check_formats(&self.name(), &self.lean_formats(config.dtype))?;
        let executor = Arc::clone(&self.executor);
        let kernel = (self.kernel, self.prefetch);
        CpuCache::new(config, self.layout_rules(), kernel, executor)
    }
}

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
