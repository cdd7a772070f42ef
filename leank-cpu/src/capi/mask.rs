//! `leank_mask`: the kept channels of a model.

use std::{
    ffi::{CString, c_char},
    ptr,
};

use leank_core::{ChannelMask, Error, ModelMask, ModelShape};

use super::{
    c_struct,
    config::AUTO,
    memory::{self, OutHandle},
    status::{Result, Status, call},
};

/// What `leank_mask` points to.
pub(super) struct Mask {
    pub(super) mask: ModelMask,
    model_id: Option<CString>,
}

impl Mask {
    fn new(mask: ModelMask) -> Self {
        // A name for people: one with a NUL in it is none.
        let model_id = mask.info().model_id.as_deref().and_then(|id| CString::new(id).ok());
        Self { mask, model_id }
    }
}

c_struct! {
    /// Kept channels as lists.
    Kept = "leank_kept" {
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        counts: *const u32,
        counts_len: usize,
        channels: *const u16,
        channels_len: usize,
    }
}

impl Kept {
    /// # Safety
    /// The pointers point to as many numbers as `self` says, or are NULL.
    unsafe fn mask(&self) -> Result<ModelMask> {
        let Self { layers, kv_heads, head_dim, .. } = *self;
        // Before anything is multiplied.
        ModelShape::new(layers, kv_heads, kv_heads, head_dim)?;
        if self.counts_len != layers * kv_heads {
            let expected = format!("{layers} layers × {kv_heads} KV heads");
            return Err(
                Error::mismatch("counts of kept channels", expected, self.counts_len).into()
            );
        }
        // SAFETY: the caller's promise.
        let counts =
            unsafe { memory::slice("counts of kept channels", self.counts, self.counts_len) }?;
        let sum = counts.iter().map(|&count| u64::from(count)).sum::<u64>();
        if sum != self.channels_len as u64 {
            let expected = format!("{sum}, as many as the counts say");
            return Err(Error::mismatch("kept channels", expected, self.channels_len).into());
        }
        // SAFETY: the caller's promise.
        let mut rest = unsafe { memory::slice("kept channels", self.channels, self.channels_len) }?;
        let mut heads = Vec::with_capacity(counts.len());
        for &count in counts {
            let (kept, behind) = rest.split_at(count as usize);
            heads.push(ChannelMask::new(head_dim, kept.to_vec())?);
            rest = behind;
        }
        Ok(ModelMask::new(layers, kv_heads, head_dim, heads)?)
    }
}

/// Makes a mask of lists.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_mask_create(
    kept: *const Kept,
    mask: *mut *mut Mask,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let out = unsafe { OutHandle::new("address for the mask", mask) }?;
        // SAFETY: the header asks for it.
        let kept = unsafe { memory::borrow("kept channels", kept) }?;
        // SAFETY: the header asks for it.
        out.put(Mask::new(unsafe { kept.mask() }?));
        Ok(())
    })
}

/// Reads a mask file.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_mask_read(
    path: *const c_char,
    mask: *mut *mut Mask,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let out = unsafe { OutHandle::new("address for the mask", mask) }?;
        // SAFETY: the header asks for it.
        let path = unsafe { memory::text("path of the mask", path) }?;
        let Some(path) = path else {
            return Err(Error::invalid("path of the mask", "it is NULL; pass a file's name").into());
        };
        out.put(Mask::new(read(path)?));
        Ok(())
    })
}

#[cfg(feature = "capi-files")]
fn read(path: &str) -> Result<ModelMask> {
    use leank_core::files::{ReadOptions, read_mask};
    Ok(read_mask(path.as_ref(), &ReadOptions::default())?)
}

#[cfg(not(feature = "capi-files"))]
fn read(path: &str) -> Result<ModelMask> {
    let why = format!(
        "{path}: the library was built without the feature `capi-files`; build it with that, or hand \
         the kept channels over in memory"
    );
    Err(Error::Unavailable { what: "reading of mask files", why }.into())
}

c_struct! {
    /// What a mask says about itself.
    MaskInfo = "leank_mask_info" {
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        sink: usize,
        recent: usize,
        kept_k: f64,
        kept_v: f64,
        middle_bytes: f64,
        dead_heads: usize,
        model_id: *const c_char,
    }
}

/// Tells about a mask.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_mask_get_info(
    mask: *const Mask,
    info: *mut MaskInfo,
    size: usize,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let Mask { mask, model_id } = unsafe { memory::borrow("mask", mask) }?;
        let (windows, summary) = (mask.info().windows, mask.summary());
        let found = MaskInfo {
            layers: mask.layers(),
            kv_heads: mask.kv_heads(),
            head_dim: mask.head_dim(),
            sink: windows.map_or(AUTO, |windows| windows.sink),
            recent: windows.map_or(AUTO, |windows| windows.recent),
            kept_k: summary.kept_k,
            kept_v: summary.kept_v,
            middle_bytes: summary.middle_bytes,
            dead_heads: summary.dead_heads,
            model_id: model_id.as_ref().map_or(ptr::null(), |id| id.as_ptr()),
        };
        // SAFETY: the header asks for it.
        unsafe { memory::answer("mask info", info, size, &found) }
    })
}

/// Takes a mask back.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_mask_free(mask: *mut Mask) {
    call(|| {
        // SAFETY: the header asks for it.
        unsafe { memory::free(mask) };
        Ok(())
    });
}
