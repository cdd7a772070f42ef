//! The C ABI of the backend, for runtimes in C and C++. Its documentation is `include/leank.h`, which
//! declares every function and type here.
//!
//! | module | holds |
//! |---|---|
//! | `status` | [`status::call`], through which every call goes: panics and errors become numbers |
//! | `memory` | what comes from C and goes there: pointers, strings, slices, structs that grow |
//! | `callback` | executors, readers and writers that C hands in |
//! | `backend`, `mask`, `config`, `cache` | the functions and their types |
//!
//! A cache is a mutex that is only ever *tried*: a second thread, or a callback that comes back to the
//! cache it runs under, is told so instead of racing or waiting for itself, and a panic poisons it.
//! Numbers that C calls enums are plain integers here, since C may pass any.

mod backend;
mod cache;
mod callback;
mod config;
mod mask;
mod memory;
mod status;
#[cfg(test)]
mod tests;

use std::ffi::c_char;

/// The header lets threads share these.
const fn shared<T: Send + Sync>() {}
const _: () = shared::<backend::Backend>();
const _: () = shared::<mask::Mask>();
const _: () = shared::<cache::Handle>();

/// Version of the library.
#[unsafe(no_mangle)]
extern "C" fn leank_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// A struct of the header, and where its fields lie, so that a test can compare.
macro_rules! c_struct {
    ($(#[$doc:meta])* $rust:ident = $c:literal { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        #[repr(C)]
        pub(super) struct $rust {
            $($(#[$field_doc])* pub(super) $field: $ty,)*
        }

        #[cfg(test)]
        impl $rust {
            /// The header's name and size; name, offset and size of each field.
            pub(super) const LAYOUT: (&str, usize, &[(&str, usize, usize)]) = (
                $c,
                size_of::<Self>(),
                &[$((stringify!($field), std::mem::offset_of!(Self, $field), size_of::<$ty>())),*],
            );
        }
    };
}
use c_struct;
