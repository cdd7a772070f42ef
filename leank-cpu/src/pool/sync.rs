//! What the pool's protocol is made of: std's, or loom's, which tries its orders (`model.rs`).

#[cfg(not(all(test, loom)))]
pub(super) use plain::*;
#[cfg(all(test, loom))]
pub(super) use watched::*;

#[cfg(not(all(test, loom)))]
mod plain {
    pub(in super::super) use std::{
        hint::spin_loop,
        sync::{
            Mutex,
            atomic::{AtomicBool, AtomicUsize},
        },
        thread,
    };

    /// [`std::cell::UnsafeCell`] with the calls of loom's, which sees when an access begins and ends.
    pub(in super::super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(in super::super) fn new(value: T) -> Self {
            Self(value.into())
        }

        #[inline]
        pub(in super::super) fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
            read(self.0.get())
        }

        #[inline]
        pub(in super::super) fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
            write(self.0.get())
        }
    }
}

#[cfg(all(test, loom))]
mod watched {
    use std::sync::atomic::Ordering;

    use loom::sync::atomic;
    pub(in super::super) use loom::{cell::UnsafeCell, hint::spin_loop, sync::Mutex, thread};

    /// Wraps loom's, which takes `SeqCst` for `AcqRel`: its loads may find an old value. A failed exchange finds
    /// the latest, as loads do of what every access to is `SeqCst`, and writes nothing.
    pub(in super::super) struct AtomicUsize(atomic::AtomicUsize);

    impl AtomicUsize {
        pub(in super::super) fn new(value: usize) -> Self {
            Self(atomic::AtomicUsize::new(value))
        }

        pub(in super::super) fn load(&self, order: Ordering) -> usize {
            assert_eq!(order, Ordering::SeqCst);
            let never = usize::MAX;
            self.0
                .compare_exchange(never, never, Ordering::Acquire, Ordering::Acquire)
                .expect_err("nothing here counts so far")
        }

        pub(in super::super) fn store(&self, value: usize, order: Ordering) {
            self.0.store(value, order);
        }

        pub(in super::super) fn fetch_add(&self, more: usize, order: Ordering) -> usize {
            self.0.fetch_add(more, order)
        }

        pub(in super::super) fn fetch_sub(&self, less: usize, order: Ordering) -> usize {
            self.0.fetch_sub(less, order)
        }
    }

    pub(in super::super) struct AtomicBool(AtomicUsize);

    impl AtomicBool {
        pub(in super::super) fn new(value: bool) -> Self {
            Self(AtomicUsize::new(value.into()))
        }

        pub(in super::super) fn load(&self, order: Ordering) -> bool {
            self.0.load(order) == 1
        }

        pub(in super::super) fn store(&self, value: bool, order: Ordering) {
            self.0.store(value.into(), order);
        }
    }
}
