//! The CUDA backend of leank: a lean KV cache in device memory and its decode attention, one fused
//! launch per layer for all sequences, KV heads and splits.
//!
//! [`Cuda`] is the backend, [`CudaCache`] the cache, [`DeviceView`] what it reads. Building takes
//! neither a GPU nor a CUDA toolkit; kernels are compiled for the device at hand when a cache is
//! made, and kept on disk. One step through it:
//!
//! ```no_run
//! use leank_core::{Backend, Cache, CacheConfig, Layer, ModelMask, ModelShape, StepEntry, ViewShape};
//! use leank_cuda::{Cuda, DeviceView, DeviceViewMut};
//!
//! let cuda = Cuda::new(0)?;
//! let shape = ModelShape::new(1, 8, 2, 128)?;
//! let mut cache = cuda.create(CacheConfig::new(shape, ModelMask::dense(&shape))?)?;
//! let sequence = cache.add_sequence();
//!
//! let stream = cuda.stream();
//! let k = stream.clone_htod(&vec![half::f16::ONE; 2 * 128])?;
//! let q = stream.clone_htod(&vec![half::f16::ONE; 8 * 128])?;
//! let mut out = stream.alloc_zeros::<f32>(8 * 128)?;
//! let (kv_row, q_row) = (ViewShape::contiguous(1, 2, 128), ViewShape::contiguous(1, 8, 128));
//!
//! cache.plan(&[StepEntry::decode(sequence, 1)])?;
//! cache.append(Layer(0), DeviceView::new(&k, kv_row)?, DeviceView::new(&k, kv_row)?)?;
//! cache.attend(Layer(0), DeviceView::new(&q, q_row)?, DeviceViewMut::new(&mut out, q_row)?)?;
//! cache.commit()?;
//! assert_eq!(stream.clone_dtoh(&out)?, vec![1.0; 8 * 128]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! **How it works.** Blocks hold K and V in tiles of 16 x 16 elements in the order in which the lanes
//! of a warp hold operands of matrix instructions, so that a slice of 16 tokens goes from memory to
//! the tensor cores without being rearranged (`kernels/common.cuh`); codes of 8 and 4 bits lie in the same
//! order, beside their scales, and become operands in registers. `plan` uploads the tables of the
//! step and has the device cut the work of every layer into stretches of equally many bytes, one per
//! multiprocessor; `attend` walks over them and merges what it split (`kernels/attend.cu`).
#![deny(unsafe_code)]

// The tests' subject, which tests of faults share, names the crate as its users do.
#[cfg(test)]
extern crate self as leank_cuda;

#[allow(unsafe_code, reason = "launches kernels")]
mod cache;
#[allow(unsafe_code, reason = "calls NVRTC")]
mod compile;
mod cubins;
#[allow(unsafe_code, reason = "calls the driver")]
mod driver;
#[cfg(test)]
mod faults;
mod kernels;
mod probe;
#[allow(unsafe_code, reason = "structs that kernels read as bytes")]
mod records;
mod rows;
mod step;
mod store;
mod tiles;
#[allow(unsafe_code, reason = "takes addresses of device memory")]
mod view;

pub use cache::{CaptureKey, CudaCache};
pub use cudarc;
pub use kernels::{KernelReport, compile_all};
pub use probe::{Device, probe};
pub use view::{DeviceView, DeviceViewMut, Element};

use std::{path::PathBuf, sync::Arc};

use cudarc::driver::{CudaStream, sys::CUdevice_attribute};
use etcetera::BaseStrategy as _;
use leank_core::{
    Backend, CacheConfig, CacheLayout, Dtype, Error, HeadFormat, LayoutRules, LeanFormat, Result,
};

use cubins::CubinCache;
use kernels::{Loader, MOST_TILES, Target, Variant};

/// What kernels ask of block layouts: whole tiles, and copies of whole sectors. K and V of tiles take a
/// multiple of 64 bytes in every format, so that they lie without gaps. For planning where there is no
/// device; a [`Cuda`] says the same.
#[must_use]
pub fn layout_rules() -> LayoutRules {
    LayoutRules {
        k_channel_multiple: tiles::TILE,
        k_token_multiple: tiles::TILE,
        v_channel_multiple: tiles::TILE,
        v_token_multiple: tiles::TILE,
        section_align: tiles::SECTION,
    }
}

/// Where compiled kernels are kept between runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KernelCache {
    /// `leank/kernels` in the user's cache folder, where there is one.
    #[default]
    User,
    /// A folder, made where it is missing.
    Folder(PathBuf),
    /// Nowhere: kernels are compiled in every process.
    Off,
}

/// The CUDA backend: one device and one stream.
#[derive(Clone, Debug)]
pub struct Cuda {
    device: Device,
    stream: Arc<CudaStream>,
    loader: Arc<Loader>,
    target: Target,
    workers: usize,
    poison: bool,
}

impl Cuda {
    /// The backend on a device, with a stream of its own.
    ///
    /// # Errors
    /// As [`probe`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with_kernel_cache(ordinal, KernelCache::User)
    }

    /// The backend on a device, with compiled kernels kept where `kernels` says.
    ///
    /// # Errors
    /// As [`probe`].
    pub fn with_kernel_cache(ordinal: usize, kernels: KernelCache) -> Result<Self> {
        let (device, context) = probe::open(ordinal)?;
        let attribute = |attribute| context.attribute(attribute).map_err(probe::driver);
        let shared = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let multiprocessors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let target = Target {
            capability: device.compute_capability,
            shared: usize::try_from(attribute(shared)?).unwrap_or(0),
        };
        let workers = usize::try_from(attribute(multiprocessors)?).unwrap_or(1).max(1);
        let stream = context.new_stream().map_err(probe::driver)?;
        let folder = match kernels {
            KernelCache::User => etcetera::choose_base_strategy()
                .ok()
                .map(|strategy| strategy.cache_dir().join("leank/kernels")),
            KernelCache::Folder(folder) => Some(folder),
            KernelCache::Off => None,
        };
        let loader = Arc::new(Loader::new(&context, target, CubinCache::new(folder))?);
        Ok(Self { device, stream, loader, target, workers, poison: false })
    }

    /// The same backend with caches that work on `stream`, one of the engine's.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a stream of another context.
    pub fn on_stream(self, stream: Arc<CudaStream>) -> Result<Self> {
        if stream.context() != self.stream.context() {
            let expected = format!("one of device {}", self.device.ordinal);
            return Err(Error::mismatch("stream", expected, "a stream of another context"));
        }
        Ok(Self { stream, ..self })
    }

    /// The same backend with caches that fill new blocks with NaN, so that a test sees whether
    /// anything reads what was not written.
    #[must_use]
    pub fn with_poisoned_blocks(self) -> Self {
        Self { poison: true, ..self }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream of its caches.
    #[must_use]
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Why compiled kernels could not be kept, where that happened: the next process compiles them
    /// again.
    #[must_use]
    pub fn kernel_cache_problem(&self) -> Option<String> {
        self.loader.cubins.problem()
    }

    fn variant(&self, config: &CacheConfig) -> Result<Variant> {
        let unavailable = |what, why: String| Err(Error::Unavailable { what, why });
        let (shape, dtype) = (config.shape, config.dtype);
        if dtype == Dtype::F32 {
            let why = "the CUDA backend stores f16 or bf16".to_owned();
            return unavailable("f32 storage", why);
        }
        if shape.head_dim > MOST_TILES * tiles::TILE {
            let why = format!("the CUDA backend has kernels up to {}", MOST_TILES * tiles::TILE);
            return unavailable("head_dim", format!("{}: {why}", shape.head_dim));
        }
        config.check_formats(&self.name(), &self.lean_formats(dtype))?;
        let layout = CacheLayout::new(config, layout_rules())?;
        if u32::try_from(layout.full_bytes).is_err() {
            let why = format!(
                "a block of one layer takes {} bytes; 4 GiB is the most",
                layout.full_bytes
            );
            return unavailable("this block size", why);
        }
        let plain = HeadFormat::plain(dtype);
        let coded = shape.all_kv_heads().any(|(layer, head)| {
            !config.mask.head(layer, head).is_dead() && config.format(layer, head) != plain
        });
        let soft_cap = config.soft_cap.is_some();
        Ok(Variant { tiles: shape.head_dim.div_ceil(tiles::TILE), dtype, coded, soft_cap })
    }
}

impl Backend for Cuda {
    type Cache = CudaCache;

    fn name(&self) -> String {
        let (major, minor) = self.target.capability;
        format!("cuda:{} ({}, sm_{major}{minor})", self.device.ordinal, self.device.name)
    }

    fn layout_rules(&self) -> LayoutRules {
        layout_rules()
    }

    fn lean_formats(&self, full: Dtype) -> Vec<LeanFormat> {
        match full {
            Dtype::F32 => Vec::new(),
            _ => {
                vec![LeanFormat::Plain(full), LeanFormat::Int8, LeanFormat::Int4, LeanFormat::Fp8]
            }
        }
    }

    fn create(&self, config: CacheConfig) -> Result<Self::Cache> {
        config.validate()?;
        let variant = self.variant(&config)?;
        let kernels = self.loader.kernels(variant)?;
        let stream = Arc::clone(&self.stream);
        let parts =
            cache::Parts { stream, kernels, variant, workers: self.workers, poison: self.poison };
        CudaCache::new(config, parts)
    }
}

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
