//! The pool's protocol under loom: every order in which threads can come, and every value that the memory
//! model lets them read, for a few threads and pieces.
//!
//! ```sh
//! RUSTFLAGS='--cfg loom' cargo test -p leank-cpu --no-default-features --lib pool::model
//! ```

use std::sync::{Arc, atomic::Ordering};

use loom::{cell::UnsafeCell, sync::atomic, thread};

use super::*;

/// Tries every order with at most `preemptions` switches away from a thread that could have gone on.
fn every_order(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.check(model);
}

/// Threads that go to sleep at once.
fn pool(threads: usize) -> Pool {
    Pool::with_spin(NonZeroUsize::new(threads).unwrap(), Duration::ZERO).unwrap()
}

/// Memory of which loom sees each access.
struct Watched(UnsafeCell<usize>);

// SAFETY: loom ends the test at the first access that is not ordered with another one, of which one
// writes.
unsafe impl Sync for Watched {}

impl Watched {
    fn new() -> Self {
        Self(UnsafeCell::new(0))
    }

    fn get(&self) -> usize {
        // SAFETY: as for `Sync`.
        self.0.with(|value| unsafe { *value })
    }

    fn add(&self) {
        // SAFETY: as for `Sync`.
        self.0.with_mut(|value| unsafe { *value += 1 });
    }
}

/// Each piece runs once, sees what the caller wrote before, and is seen by it afterwards; nobody is in a
/// piece any more when the run has returned.
fn run(pool: &Pool, count: usize) {
    let lent = Watched::new();
    lent.add();
    let runs: Vec<Watched> = (0..count).map(|_| Watched::new()).collect();
    pool.run(count, &|i| {
        assert_eq!(lent.get(), 1);
        runs[i].add();
    });
    lent.add();
    assert!(runs.iter().all(|runs| runs.get() == 1));
}

#[test]
fn one_helper_and_two_runs() {
    every_order(5, || {
        let pool = pool(2);
        run(&pool, 2);
        run(&pool, 3);
    });
}

#[test]
fn two_helpers_and_two_runs() {
    every_order(3, || {
        let pool = pool(3);
        run(&pool, 3);
        run(&pool, 2);
    });
}

#[test]
fn two_callers_take_turns() {
    every_order(3, || {
        let pool = Arc::new(pool(2));
        let other = Arc::clone(&pool);
        let other = thread::spawn(move || run(&other, 2));
        run(&pool, 2);
        other.join().unwrap();
    });
}

/// Two pieces that wait for each other: they end only when the helper comes, asleep or not.
#[test]
fn a_helper_that_falls_asleep_is_woken() {
    every_order(6, || {
        let pool = pool(2);
        let came = [(); 2].map(|()| atomic::AtomicBool::new(false));
        pool.run(2, &|i| {
            came[i].store(true, Ordering::Release);
            while !came[1 - i].load(Ordering::Acquire) {
                thread::yield_now();
            }
        });
    });
}

#[test]
fn a_pool_without_work_ends() {
    every_order(6, || drop(pool(3)));
}

/// A run whose pieces all panic, on one thread or on both, leaves nothing to the next.
#[test]
fn panics_end_with_their_run() {
    every_order(5, || {
        let pool = pool(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|i| resume_unwind(Box::new(i)));
        }));
        assert!(caught.is_err());
        run(&pool, 2);
    });
}

/// What a piece says that panics, on whichever thread, and the others' writes reach the caller.
#[test]
fn panics_reach_the_caller() {
    every_order(6, || {
        let pool = pool(2);
        let runs = [(); 3].map(|()| Watched::new());
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(3, &|i| {
                runs[i].add();
                if i == 1 {
                    // Without the hook, which would print it for every order.
                    resume_unwind(Box::new(i));
                }
            });
        }));
        assert_eq!(*caught.unwrap_err().downcast::<usize>().unwrap(), 1);
        let ran = runs.each_ref().map(Watched::get);
        assert!(ran.iter().all(|&runs| runs <= 1) && ran[..2] == [1, 1], "{ran:?}");
    });
}
