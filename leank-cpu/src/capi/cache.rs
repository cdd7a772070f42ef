//! `leank_cache`: sequences and steps.

use std::{
    ffi::c_void,
    sync::{Mutex, TryLockError},
};

use leank_core::{
    Backend as _, Cache as _, Dtype, Elements, ElementsMut, Error, HostView, HostViewMut, Layer,
    SequenceId, StepEntry, ViewShape,
};

use super::{
    backend::Backend,
    c_struct,
    callback::{ReadFn, Reader, WriteFn, Writer},
    config::{self, Config, dtype},
    memory::{self, Out, OutHandle},
    status::{Failure, Result, Status, call},
};
use crate::CpuCache;

/// What `leank_cache` points to.
pub(super) type Handle = Mutex<CpuCache>;

/// The cache, where nobody else is at it.
fn enter<T>(handle: &Handle, body: impl FnOnce(&mut CpuCache) -> Result<T>) -> Result<T> {
    let mut cache = handle.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Failure::Busy,
        TryLockError::Poisoned(_) => Failure::Poisoned,
    })?;
    body(&mut cache)
}

/// A call on a cache.
///
/// # Safety
/// `cache` is a handle that nobody frees during the call, or NULL.
unsafe fn on_cache(cache: *const Handle, body: impl FnOnce(&mut CpuCache) -> Result<()>) -> Status {
    call(|| {
        // SAFETY: the caller's promise.
        let handle = unsafe { memory::borrow("cache", cache) }?;
        enter(handle, body)
    })
}

/// Makes a cache.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_create(
    backend: *const Backend,
    config: *const Config,
    cache: *mut *mut Handle,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let out = unsafe { OutHandle::new("address for the cache", cache) }?;
        // SAFETY: the header asks for it.
        let backend = unsafe { Backend::or_default(backend) }?;
        // SAFETY: the header asks for it.
        let config = unsafe { config::read(config) }?;
        out.put(Mutex::new(backend.cpu.create(config)?));
        Ok(())
    })
}

/// Takes a cache back, unless it is in use.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_free(cache: *mut Handle) {
    call(|| {
        if cache.is_null() {
            return Ok(());
        }
        // SAFETY: the header asks for it.
        let handle = unsafe { memory::borrow("cache", cache) }?;
        if let Err(TryLockError::WouldBlock) = handle.try_lock() {
            return Err(Failure::Busy);
        }
        // SAFETY: the header asks for it, and nobody uses it.
        unsafe { memory::free(cache) };
        Ok(())
    });
}

/// Adds a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_add_sequence(
    cache: *mut Handle,
    sequence: *mut u64,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let out = unsafe { Out::new("address for the sequence", sequence) }?;
        out.put(cache.add_sequence().0);
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Tokens of a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_sequence_len(
    cache: *const Handle,
    sequence: u64,
    tokens: *mut usize,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let out = unsafe { Out::new("address for the tokens", tokens) }?;
        out.put(cache.sequence_len(SequenceId(sequence))?);
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Forks a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_fork(
    cache: *mut Handle,
    sequence: u64,
    twin: *mut u64,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let out = unsafe { Out::new("address for the sequence", twin) }?;
        out.put(cache.fork(SequenceId(sequence))?.0);
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Takes tokens back.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_truncate(
    cache: *mut Handle,
    sequence: u64,
    tokens: usize,
) -> Status {
    let body = |cache: &mut CpuCache| Ok(cache.truncate(SequenceId(sequence), tokens)?);
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Lengths that a sequence can be cut to.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_nearest_lengths(
    cache: *const Handle,
    sequence: u64,
    tokens: usize,
    below: *mut usize,
    above: *mut usize,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let out_below = unsafe { Out::new("address for the length below", below) }?;
        // SAFETY: the header asks for it.
        let out_above = unsafe { Out::new("address for the length above", above) }?;
        let (below, above) = cache.nearest_lengths(SequenceId(sequence), tokens)?;
        out_below.put(below);
        out_above.put(above);
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Forgets a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_release(cache: *mut Handle, sequence: u64) -> Status {
    let body = |cache: &mut CpuCache| Ok(cache.release(SequenceId(sequence))?);
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

c_struct! {
    /// What one sequence does in a step.
    Entry = "leank_entry" {
        sequence: u64,
        tokens: usize,
        attend: i32,
    }
}

/// Plans a step.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_plan(
    cache: *mut Handle,
    entries: *const Entry,
    count: usize,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let entries = unsafe { memory::slice("entries of the step", entries, count) }?;
        let entry = |entry: &Entry| StepEntry {
            sequence: SequenceId(entry.sequence),
            tokens: entry.tokens,
            attend: entry.attend != 0,
        };
        Ok(cache.plan(&entries.iter().map(entry).collect::<Vec<_>>())?)
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

c_struct! {
    /// Activations.
    View = "leank_view" {
        data: *const c_void,
        dtype: i32,
        tokens: usize,
        heads: usize,
        head_dim: usize,
        token_stride: usize,
        head_stride: usize,
    }
}

c_struct! {
    /// Activations to be written.
    ViewMut = "leank_view_mut" {
        data: *mut c_void,
        dtype: i32,
        tokens: usize,
        heads: usize,
        head_dim: usize,
        token_stride: usize,
        head_stride: usize,
    }
}

impl View {
    fn shape(&self) -> ViewShape {
        let Self { tokens, heads, head_dim, token_stride, head_stride, .. } = *self;
        ViewShape { tokens, heads, head_dim, token_stride, head_stride }
    }

    /// Elements that it spans.
    fn span(&self, what: &'static str) -> Result<usize> {
        let shape = self.shape();
        shape.span().ok_or_else(|| {
            Error::invalid(what, format!("{shape:?} spans more than memory can hold")).into()
        })
    }

    /// Addresses that it spans.
    fn addresses(&self, what: &'static str) -> Result<std::ops::Range<usize>> {
        let bytes = self.span(what)?.saturating_mul(dtype(what, self.dtype)?.bytes());
        Ok(self.data.addr()..self.data.addr().saturating_add(bytes))
    }

    /// # Safety
    /// `data` points to the elements that the shape spans, which nobody writes to for `'a`, or is
    /// NULL.
    unsafe fn host<'a>(&self, what: &'static str) -> Result<HostView<'a>> {
        let (data, len) = (self.data, self.span(what)?);
        let elements = match dtype(what, self.dtype)? {
            // SAFETY: the caller's promise.
            Dtype::F32 => Elements::F32(unsafe { memory::slice(what, data.cast(), len) }?),
            // SAFETY: the caller's promise.
            Dtype::F16 => Elements::F16(unsafe { memory::slice(what, data.cast(), len) }?),
            // SAFETY: the caller's promise.
            Dtype::Bf16 => Elements::Bf16(unsafe { memory::slice(what, data.cast(), len) }?),
        };
        Ok(HostView::new(elements, self.shape())?)
    }
}

impl ViewMut {
    fn as_view(&self) -> View {
        let Self { data, dtype, tokens, heads, head_dim, token_stride, head_stride } = *self;
        View { data, dtype, tokens, heads, head_dim, token_stride, head_stride }
    }

    /// # Safety
    /// As [`View::host`], and nobody else reads or writes there for `'a`.
    unsafe fn host<'a>(&self, what: &'static str) -> Result<HostViewMut<'a>> {
        let (data, len) = (self.data, self.as_view().span(what)?);
        let elements = match dtype(what, self.dtype)? {
            // SAFETY: the caller's promise.
            Dtype::F32 => ElementsMut::F32(unsafe { memory::slice_mut(what, data.cast(), len) }?),
            // SAFETY: the caller's promise.
            Dtype::F16 => ElementsMut::F16(unsafe { memory::slice_mut(what, data.cast(), len) }?),
            // SAFETY: the caller's promise.
            Dtype::Bf16 => ElementsMut::Bf16(unsafe { memory::slice_mut(what, data.cast(), len) }?),
        };
        Ok(HostViewMut::new(elements, self.as_view().shape())?)
    }
}

/// Stores K and V.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_append(
    cache: *mut Handle,
    layer: usize,
    k: *const View,
    v: *const View,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let k = unsafe { memory::borrow("view of K", k) }?;
        // SAFETY: the header asks for it.
        let k = unsafe { k.host("view of K") }?;
        // SAFETY: the header asks for it.
        let v = unsafe { memory::borrow("view of V", v) }?;
        // SAFETY: the header asks for it.
        let v = unsafe { v.host("view of V") }?;
        Ok(cache.append(Layer(layer), k, v)?)
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Attends.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_attend(
    cache: *mut Handle,
    layer: usize,
    q: *const View,
    out: *const ViewMut,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let q = unsafe { memory::borrow("view of q", q) }?;
        // SAFETY: the header asks for it.
        let out = unsafe { memory::borrow("view of the output", out) }?;
        let (read, written) =
            (q.addresses("view of q")?, out.as_view().addresses("view of the output")?);
        if read.start.max(written.start) < read.end.min(written.end) {
            let why = "its memory and that of q overlap; give the output memory of its own";
            return Err(Error::invalid("view of the output", why).into());
        }
        // SAFETY: the header asks for it.
        let q = unsafe { q.host("view of q") }?;
        // SAFETY: the header asks for it, and `q` lies elsewhere.
        let out = unsafe { out.host("view of the output") }?;
        Ok(cache.attend(Layer(layer), q, out)?)
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Ends a step.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_commit(cache: *mut Handle) -> Status {
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, |cache| Ok(cache.commit()?)) }
}

/// Takes a step back.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_cancel(cache: *mut Handle) -> Status {
    let body = |cache: &mut CpuCache| {
        cache.cancel();
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

c_struct! {
    /// Bytes held.
    Memory = "leank_memory" {
        tokens: u64,
        full_blocks: u64,
        lean_blocks: u64,
        full_bytes: u64,
        lean_bytes: u64,
        allocated_bytes: u64,
        dense_bytes: u64,
    }
}

/// Tells what is held.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_memory(
    cache: *const Handle,
    to: *mut Memory,
    size: usize,
) -> Status {
    let body = |cache: &mut CpuCache| {
        let held = cache.memory();
        let found = Memory {
            tokens: held.tokens,
            full_blocks: held.blocks.full as u64,
            lean_blocks: held.blocks.lean as u64,
            full_bytes: held.full_bytes,
            lean_bytes: held.lean_bytes,
            allocated_bytes: held.allocated_bytes,
            dense_bytes: held.dense_bytes,
        };
        // SAFETY: the header asks for it.
        unsafe { memory::answer("memory", to, size, &found) }
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

fn no_callback() -> Failure {
    Error::invalid("callback", "it is NULL; pass a function").into()
}

/// Writes a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_save(
    cache: *const Handle,
    sequence: u64,
    write: Option<WriteFn>,
    user: *mut c_void,
) -> Status {
    let body = |cache: &mut CpuCache| {
        let write = write.ok_or_else(no_callback)?;
        Ok(cache.save(SequenceId(sequence), &mut Writer { write, user })?)
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}

/// Reads a sequence.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_cache_restore(
    cache: *mut Handle,
    read: Option<ReadFn>,
    user: *mut c_void,
    sequence: *mut u64,
) -> Status {
    let body = |cache: &mut CpuCache| {
        // SAFETY: the header asks for it.
        let out = unsafe { Out::new("address for the sequence", sequence) }?;
        let read = read.ok_or_else(no_callback)?;
        out.put(cache.restore(&mut Reader { read, user })?.0);
        Ok(())
    };
    // SAFETY: the header asks for it.
    unsafe { on_cache(cache, body) }
}
