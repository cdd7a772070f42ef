//! `leank_config`: what a cache stores, and what it will take.

use std::ptr;

use leank_core::{
    Backend as _, CacheConfig, DEFAULT_BLOCK, Dtype, Error, HeadFormat, LeanFormat, ModelShape,
    Planner, blocks::MAX_TOKENS,
};

use super::{
    backend::Backend,
    c_struct,
    mask::Mask,
    memory::{self, Options, Out},
    status::{Result, Status, call},
};

/// `LEANK_AUTO`: the mask's windows, or the default ones. (`usize::MAX` is everything.)
pub(super) const AUTO: usize = usize::MAX - 1;
/// `LEANK_NO_LIMIT`.
pub(super) const NO_LIMIT: u64 = u64::MAX;

/// Most KV heads, all layers together: each takes some memory before there is a token.
const MAX_HEADS: usize = 1 << 17;

/// Element types by the header's numbers.
pub(super) fn dtype(what: &'static str, number: i32) -> Result<Dtype> {
    match number {
        0 => Ok(Dtype::F32),
        1 => Ok(Dtype::F16),
        2 => Ok(Dtype::Bf16),
        _ => {
            let why =
                format!("{number} is none of LEANK_F32 (0), LEANK_F16 (1) and LEANK_BF16 (2)");
            Err(Error::invalid(what, why).into())
        }
    }
}

/// Formats of lean blocks by the header's numbers: the element types', and those of codes.
fn lean_format(number: i32) -> Result<LeanFormat> {
    match number {
        0..=2 => dtype("lean format", number).map(LeanFormat::Plain),
        3 => Ok(LeanFormat::Int8),
        4 => Ok(LeanFormat::Int4),
        _ => {
            let why = format!(
                "{number} is none of LEANK_F32 (0), LEANK_F16 (1), LEANK_BF16 (2), LEANK_INT8 (3) and \
                 LEANK_INT4 (4)"
            );
            Err(Error::invalid("lean format", why).into())
        }
    }
}

c_struct! {
    /// Formats of one head in lean blocks.
    Format = "leank_head_format" {
        k: i32,
        v: i32,
    }
}

c_struct! {
    /// Everything about a cache.
    Config = "leank_config" {
        struct_size: usize,
        layers: usize,
        query_heads: usize,
        kv_heads: usize,
        head_dim: usize,
        mask: *const Mask,
        sink: usize,
        recent: usize,
        limit: u64,
        lean_formats: *const Format,
        lean_formats_len: usize,
        dtype: i32,
        block: u32,
        scale: f32,
        soft_cap: f32,
    }
}

// SAFETY: numbers and pointers; the size comes first.
unsafe impl Options for Config {
    const NAME: &'static str = "cache configuration";

    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            layers: 0,
            query_heads: 0,
            kv_heads: 0,
            head_dim: 0,
            mask: ptr::null(),
            sink: AUTO,
            recent: AUTO,
            limit: NO_LIMIT,
            lean_formats: ptr::null(),
            lean_formats_len: 0,
            dtype: 1,
            block: DEFAULT_BLOCK as u32,
            scale: 0.0,
            soft_cap: 0.0,
        }
    }
}

impl Config {
    /// # Safety
    /// The mask is one, and the formats are as many as `self` says; or they are NULL.
    unsafe fn cache_config(&self) -> Result<CacheConfig> {
        let shape = ModelShape::new(self.layers, self.query_heads, self.kv_heads, self.head_dim)?;
        if shape.layers * shape.kv_heads > MAX_HEADS {
            let why = format!("{shape} make more than {MAX_HEADS} KV heads");
            return Err(Error::invalid("model shape", why).into());
        }
        let mut config = if self.mask.is_null() {
            CacheConfig::dense(shape)?
        } else {
            // SAFETY: the caller's promise.
            let mask = unsafe { memory::borrow("mask", self.mask) }?;
            CacheConfig::new(shape, mask.mask.clone())?
        };
        let given = |value: usize, auto: usize| if value == AUTO { auto } else { value };
        config.windows.sink = given(self.sink, config.windows.sink);
        config.windows.recent = given(self.recent, config.windows.recent);
        config.block = self.block as usize;
        config.dtype = dtype("type of the cache", self.dtype)?;
        // Zero stands for none; what is negative or no number is refused by the configuration.
        config.scale = (self.scale != 0.0).then_some(self.scale);
        config.soft_cap = (self.soft_cap != 0.0).then_some(self.soft_cap);
        config.limit = (self.limit != NO_LIMIT).then_some(self.limit);
        if self.lean_formats_len > 0 || !self.lean_formats.is_null() {
            // SAFETY: the caller's promise.
            let formats =
                unsafe { memory::slice("lean formats", self.lean_formats, self.lean_formats_len) }?;
            let both = |f: &Format| Ok(HeadFormat { k: lean_format(f.k)?, v: lean_format(f.v)? });
            config.formats = Some(formats.iter().map(both).collect::<Result<_>>()?);
        }
        config.validate()?;
        Ok(config)
    }
}

/// The configuration at a pointer.
///
/// # Safety
/// It points to options that are what the header asks for, or is NULL.
pub(super) unsafe fn read(config: *const Config) -> Result<CacheConfig> {
    // SAFETY: the caller's promise.
    let config = unsafe { memory::options(config) }?;
    // SAFETY: the caller's promise.
    unsafe { config.cache_config() }
}

/// # Safety
/// As [`read`].
unsafe fn planner(config: *const Config) -> Result<Planner> {
    // SAFETY: the caller's promise.
    let config = unsafe { read(config) }?;
    // SAFETY: NULL is the default backend; the rules are those of all of them.
    let backend = unsafe { Backend::or_default(ptr::null()) }?;
    Ok(Planner::new(&config, backend.cpu.layout_rules())?)
}

/// Sets the defaults.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_config_init(to: *mut Config, size: usize) -> Status {
    // SAFETY: the header asks for it.
    call(|| unsafe { memory::init(to, size) })
}

c_struct! {
    /// What one sequence will take.
    Footprint = "leank_footprint" {
        bytes: u64,
        peak_bytes: u64,
        dense_bytes: u64,
    }
}

/// What one sequence will take.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_config_footprint(
    config: *const Config,
    tokens: usize,
    to: *mut Footprint,
    size: usize,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let found = unsafe { planner(config) }?.footprint(tokens)?;
        let leank_core::Footprint { bytes, peak_bytes, dense_bytes, .. } = found;
        let footprint = Footprint { bytes, peak_bytes, dense_bytes };
        // SAFETY: the header asks for it.
        unsafe { memory::answer("footprint", to, size, &footprint) }
    })
}

/// How many tokens fit.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_config_tokens_within(
    config: *const Config,
    bytes: u64,
    tokens: *mut usize,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let out = unsafe { Out::new("address for the tokens", tokens) }?;
        // SAFETY: the header asks for it.
        let planner = unsafe { planner(config) }?;
        out.put(planner.tokens_within(bytes).unwrap_or(MAX_TOKENS));
        Ok(())
    })
}
