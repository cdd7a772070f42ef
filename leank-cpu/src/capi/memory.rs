//! What comes from C, and goes there: pointers are looked at before they are used.
//!
//! Nobody can check that a pointer that is not NULL points to what it should. That is the caller's
//! promise, made in the header, and the ground of every `SAFETY` comment here.

use std::{
    ffi::{CStr, c_char},
    ptr::NonNull,
};

use leank_core::Error;

use super::status::Result;

fn invalid(what: &'static str, why: impl ToString) -> super::status::Failure {
    Error::invalid(what, why).into()
}

/// Refuses NULL and addresses that no `T` has.
fn check<T>(what: &'static str, pointer: *const T) -> Result<NonNull<T>> {
    let Some(found) = NonNull::new(pointer.cast_mut()) else {
        return Err(invalid(what, "it is NULL; pass the address of one"));
    };
    if !pointer.is_aligned() {
        let why =
            format!("its address is not a multiple of {}, which its type needs", align_of::<T>());
        return Err(invalid(what, why));
    }
    Ok(found)
}

/// What a pointer points to.
///
/// # Safety
/// It points to a `T`, or is NULL, and nobody writes there for `'a`.
pub(super) unsafe fn borrow<'a, T>(what: &'static str, pointer: *const T) -> Result<&'a T> {
    let pointer = check(what, pointer)?;
    // SAFETY: it is not NULL and aligned, and the caller promises the rest.
    Ok(unsafe { pointer.as_ref() })
}

/// `len` elements at a pointer, which may be NULL where there are none.
///
/// # Safety
/// It points to `len` times `T` that nobody writes to for `'a`, or is NULL.
pub(super) unsafe fn slice<'a, T>(
    what: &'static str,
    data: *const T,
    len: usize,
) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    let data = check_many(what, data, len)?;
    // SAFETY: it is not NULL, aligned and no longer than memory can be, and the caller promises the
    // rest.
    Ok(unsafe { std::slice::from_raw_parts(data.as_ptr(), len) })
}

/// The same, to be written.
///
/// # Safety
/// As [`slice`], and nobody else reads or writes there for `'a`.
pub(super) unsafe fn slice_mut<'a, T>(
    what: &'static str,
    data: *mut T,
    len: usize,
) -> Result<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    let data = check_many(what, data, len)?;
    // SAFETY: as in `slice`; the caller promises that nobody else looks.
    Ok(unsafe { std::slice::from_raw_parts_mut(data.as_ptr(), len) })
}

fn check_many<T>(what: &'static str, data: *const T, len: usize) -> Result<NonNull<T>> {
    let data_at = check(what, data)?;
    let bytes = len.checked_mul(size_of::<T>());
    let end = bytes.and_then(|bytes| data.addr().checked_add(bytes));
    if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) || end.is_none() {
        return Err(invalid(what, format!("{len} elements are more than memory can hold")));
    }
    Ok(data_at)
}

/// A place for an answer.
pub(super) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    /// `to` points to room for a `T` that nobody else uses until the call ends, or is NULL.
    pub(super) unsafe fn new(what: &'static str, to: *mut T) -> Result<Self> {
        check(what, to).map(Self)
    }

    pub(super) fn put(&self, value: T) {
        // SAFETY: `new` was promised the room.
        unsafe { self.0.write(value) }
    }
}

/// A place for a handle: NULL until there is one.
pub(super) struct OutHandle<T>(Out<*mut T>);

impl<T> OutHandle<T> {
    /// # Safety
    /// As [`Out::new`].
    pub(super) unsafe fn new(what: &'static str, to: *mut *mut T) -> Result<Self> {
        // SAFETY: the caller's promise.
        let out = unsafe { Out::new(what, to) }?;
        out.put(std::ptr::null_mut());
        Ok(Self(out))
    }

    pub(super) fn put(self, value: T) {
        self.0.put(Box::into_raw(Box::new(value)));
    }
}

/// Takes a handle back.
///
/// # Safety
/// An [`OutHandle`] gave it, and nobody uses it any more; or it is NULL.
pub(super) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: it came from `Box::into_raw`, and the caller promises that it is the last use.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// A string, where there is one.
///
/// # Safety
/// `text` is NULL, or a string that ends with a NUL and that nobody writes to for `'a`.
pub(super) unsafe fn text<'a>(what: &'static str, text: *const c_char) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, and the caller promises the rest.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().map(Some).map_err(|_| invalid(what, format!("{bytes:?} is not UTF-8")))
}

/// Largest struct that is taken for one of ours: a size beyond it was never set.
const MAX_STRUCT: usize = 4096;

/// Options, which start with their size.
///
/// # Safety
/// Any bits make a `T`, and its first field is a `usize`.
pub(super) unsafe trait Options: Copy {
    /// The header's name.
    const NAME: &'static str;
    /// The defaults.
    fn defaults() -> Self;
}

fn check_size<T: Options>(size: usize) -> Result<()> {
    if (size_of::<T>()..=MAX_STRUCT).contains(&size) {
        return Ok(());
    }
    let why = format!(
        "its size is given as {size}, not {} or somewhat more; set it up with its _init function and \
         sizeof",
        size_of::<T>()
    );
    Err(invalid(T::NAME, why))
}

/// Sets options to their defaults; what a newer header has added becomes zero.
///
/// # Safety
/// `to` points to `size` bytes that nobody else uses until the call ends, or is NULL.
pub(super) unsafe fn init<T: Options>(to: *mut T, size: usize) -> Result<()> {
    let to = check(T::NAME, to)?;
    check_size::<T>(size)?;
    // SAFETY: there are `size` bytes.
    unsafe { to.cast::<u8>().write_bytes(0, size) };
    // SAFETY: there is room for a `T`: `size` is no less.
    unsafe { to.write(T::defaults()) };
    // SAFETY: the first field is the size.
    unsafe { to.cast::<usize>().write(size) };
    Ok(())
}

/// Reads options of this header or a newer one, whose additions must be at their defaults, zero.
///
/// # Safety
/// `from` points to as many bytes as its first field says, which nobody writes to during the call, or
/// is NULL.
pub(super) unsafe fn options<T: Options>(from: *const T) -> Result<T> {
    let from = check(T::NAME, from)?;
    // SAFETY: the first field is the size.
    let size = unsafe { from.cast::<usize>().read() };
    check_size::<T>(size)?;
    // SAFETY: the caller promises `size` bytes.
    let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>().as_ptr(), size) };
    if bytes[size_of::<T>()..].iter().any(|&byte| byte != 0) {
        let why =
            "an option is set that this version of the library does not know; leave it at its \
                   default, or use a newer library"
                .into();
        return Err(Error::Unavailable { what: T::NAME, why }.into());
    }
    // SAFETY: `size` is at least that of a `T`, and any bits make one.
    Ok(unsafe { from.read() })
}

/// Writes as much of an answer as the caller's header knows; what a newer one has added becomes zero.
///
/// # Safety
/// `to` points to `size` bytes that nobody else uses until the call ends, or is NULL.
pub(super) unsafe fn answer<T: Copy>(
    what: &'static str,
    to: *mut T,
    size: usize,
    value: &T,
) -> Result<()> {
    let to = check(what, to)?.cast::<u8>();
    let common = size.min(size_of::<T>());
    if common == 0 || size > MAX_STRUCT {
        return Err(invalid(what, format!("its size is given as {size}; pass its sizeof")));
    }
    // SAFETY: both have `common` bytes.
    unsafe { to.copy_from_nonoverlapping(NonNull::from(value).cast(), common) };
    // SAFETY: `common` is no more than `size`.
    let rest = unsafe { to.add(common) };
    // SAFETY: these are the last of `size` bytes.
    unsafe { rest.write_bytes(0, size - common) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ptr::without_provenance;

    use super::*;

    #[test]
    fn what_is_longer_than_memory_is_refused() {
        let most = isize::MAX as usize;
        let fits =
            |at: usize, len| check_many::<u64>("numbers", without_provenance(at), len).is_ok();
        assert!(fits(8, most / 8) && !fits(8, most / 8 + 1) && !fits(8, usize::MAX));
        assert!(check_many::<u8>("bytes", without_provenance(1), most).is_ok());
        assert!(check_many::<u8>("bytes", without_provenance(1), most + 1).is_err());
        // Ends where addresses do, and beyond.
        assert!(fits(usize::MAX - 15, 1) && !fits(usize::MAX - 15, 2));
    }
}
