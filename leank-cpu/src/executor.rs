//! Where the independent pieces of a step run.

use std::fmt;

/// Runs pieces of work. Implement it to put them on threads of your own; [`Serial`], [`Rayon`] and
/// [`crate::Pool`] are at hand.
///
/// [`Rayon`]: crate::Rayon
pub trait Executor: fmt::Debug + Send + Sync {
    /// Threads that may run pieces at the same time: for names in reports. How work is cut, and so what comes
    /// out, does not depend on it.
    fn threads(&self) -> usize;

    /// Calls `piece(i)` exactly once for every `i < count`, in any order, on any threads, and
    /// returns when all are done.
    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync));
}

/// On the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Executor for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(piece);
    }
}

/// On the rayon pool that the caller is in.
///
/// Waking sleeping rayon threads takes tens of microseconds; [`crate::Pool`] takes less than one
/// while its threads still spin.
#[cfg(feature = "rayon")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rayon;

#[cfg(feature = "rayon")]
impl Executor for Rayon {
    fn threads(&self) -> usize {
        rayon::current_num_threads()
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        use std::sync::atomic::{AtomicUsize, Ordering};

        let next = AtomicUsize::new(0);
        let claim = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                piece(i);
            }
        };
        rayon::scope(|scope| {
            for _ in 1..self.threads().min(count) {
                scope.spawn(|_| claim());
            }
            claim();
        });
    }
}
