//! A thread pool for work that takes microseconds.
//!
//! Pieces are claimed from a counter, so a thread that the system has put aside holds up at most
//! the piece it has begun; nobody waits for a thread that has not come. Threads spin for a while
//! after work, then sleep.

#[cfg(all(test, loom))]
mod model;
mod sync;

use std::{
    any::Any,
    fmt,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use leank_core::{Error, Result};

use crate::Executor;
use sync::{
    AtomicBool, AtomicUsize, Mutex, UnsafeCell, spin_loop,
    thread::{self, JoinHandle, Thread},
};

/// How long threads spin for new work by default: longer than the gap between an engine's layers.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(100);

type Piece<'a> = &'a (dyn Fn(usize) + Sync);

/// The work that is going on; see [`Shared::help`].
struct Shared {
    /// Counts runs; odd while one is open to helpers.
    round: AtomicUsize,
    /// Helpers between entering and leaving.
    inside: AtomicUsize,
    /// Next piece to claim.
    next: AtomicUsize,
    /// The run's closure and the number of pieces. Written only by the thread that holds
    /// `Pool::running`, while no run is open and nobody is inside.
    work: UnsafeCell<Option<(Piece<'static>, usize)>>,
    /// What the first piece that panicked on a helper said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleeping: AtomicUsize,
    spin: Duration,
}

// SAFETY: `work` is written only while nobody else reads it, as its comment says; everything else
// is Sync by itself.
unsafe impl Sync for Shared {}

/// Threads that run pieces of work together with the calling thread.
///
/// ```
/// use std::{num::NonZeroUsize, sync::Arc};
/// use leank_cpu::{Cpu, Pool};
///
/// let pool = Pool::new(NonZeroUsize::new(4).unwrap())?;
/// let cpu = Cpu::with_executor(Arc::new(pool));
/// # Ok::<(), leank_core::Error>(())
/// ```
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held during a run: one at a time.
    running: Mutex<()>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &(self.helpers.len() + 1)).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads` threads, the calling one included, that spin for [`DEFAULT_SPIN`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the system gives no more threads.
    pub fn new(threads: NonZeroUsize) -> Result<Self> {
        Self::with_spin(threads, DEFAULT_SPIN)
    }

    /// A pool whose threads spin for `spin` after work before they sleep. Long spins cost the
    /// cycles of other work on the same cores, short ones a few microseconds per wake-up.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_spin(threads: NonZeroUsize, spin: Duration) -> Result<Self> {
        Self::with_start(threads, spin, |_| ())
    }

    /// The same; each thread but the calling one, numbered from 1, calls `start` first: to pin
    /// itself to a core, to set its priority.
    ///
    /// # Errors
    /// As [`Pool::new`].
    pub fn with_start(
        threads: NonZeroUsize,
        spin: Duration,
        start: impl Fn(usize) + Send + Sync + 'static,
    ) -> Result<Self> {
        let start = Arc::new(start);
        let shared = Arc::new(Shared {
            round: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            work: UnsafeCell::new(None),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            spin,
        });
        let mut pool = Self { shared, helpers: Vec::new(), running: Mutex::new(()) };
        for i in 1..threads.get() {
            let (shared, start) = (Arc::clone(&pool.shared), Arc::clone(&start));
            let helper = thread::Builder::new()
                .name(format!("leank-cpu-{i}"))
                .spawn(move || {
                    start(i);
                    shared.serve();
                })
                .map_err(|error| Error::Unavailable {
                    what: "a thread for the pool",
                    why: format!("{error}; ask for fewer than {threads}"),
                })?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    fn wake(&self) {
        if self.shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.helpers.iter().map(JoinHandle::thread).for_each(Thread::unpark);
        }
    }
}

impl Executor for Pool {
    fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        if count < 2 || self.helpers.is_empty() {
            (0..count).for_each(piece);
            return;
        }
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes, and this function does not return, by value or by
        // panic, before the run is closed and everybody has left (`Close`).
        let erased: Piece<'static> = unsafe { std::mem::transmute::<Piece<'_>, _>(piece) };
        // SAFETY: `running` is held, no run is open and the last one waited until nobody was
        // inside; a helper that enters now finds the round even and does not look.
        shared.work.with_mut(|work| unsafe { *work = Some((erased, count)) });
        shared.next.store(0, Ordering::Relaxed);
        shared.round.fetch_add(1, Ordering::SeqCst);
        let close = Close(shared);
        self.wake();
        let own = catch_unwind(AssertUnwindSafe(|| shared.claim(piece, count)));
        drop(close);
        // Taken in any case: it is this run's, and the next one shall not find it.
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(running);
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }
}

/// Closes a run when dropped, and waits until the last helper has left it.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.round.fetch_add(1, Ordering::SeqCst);
        let mut spins = 0u32;
        while self.0.inside.load(Ordering::SeqCst) > 0 {
            // A helper inside may have lost its core to somebody else, perhaps to us.
            spins += 1;
            if spins.is_multiple_of(1 << 10) { thread::yield_now() } else { spin_loop() }
        }
    }
}

impl Shared {
    fn claim(&self, piece: Piece<'_>, count: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            piece(i);
        }
    }

    /// Takes part in the open run, if there is one.
    fn help(&self) {
        // Who enters before the run is closed is waited for; who enters after sees it closed.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if self.round.load(Ordering::SeqCst) % 2 == 1 {
            // SAFETY: the run is open, and it stays so until this thread has left: `work` is not
            // written, and the closure it points to lives.
            let work = self.work.with(|work| unsafe { *work });
            if let Some((piece, count)) = work {
                let result = catch_unwind(AssertUnwindSafe(|| self.claim(piece, count)));
                if let Err(payload) = result {
                    let mut slot = self.panic.lock().unwrap_or_else(PoisonError::into_inner);
                    slot.get_or_insert(payload);
                }
            }
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    fn serve(&self) {
        let mut seen = 0;
        let mut idle_since = Instant::now();
        while !self.stop.load(Ordering::SeqCst) {
            let round = self.round.load(Ordering::SeqCst);
            if round != seen && round % 2 == 1 {
                seen = round;
                self.help();
                idle_since = Instant::now();
            } else if idle_since.elapsed() < self.spin {
                for _ in 0..32 {
                    spin_loop();
                }
            } else {
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                // A run that opened before `sleeping` rose did not wake us: look once more.
                let round = self.round.load(Ordering::SeqCst);
                let work = round != seen && round % 2 == 1;
                if !work && !self.stop.load(Ordering::SeqCst) {
                    thread::park();
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                idle_since = Instant::now();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper catches the panics of its pieces, so it has nothing to tell.
            let _ = helper.join();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pool(threads: usize, spin: Duration) -> Pool {
        Pool::with_spin(NonZeroUsize::new(threads).unwrap(), spin).unwrap()
    }

    #[test]
    fn every_piece_runs_once() {
        for spin in [Duration::ZERO, DEFAULT_SPIN] {
            let pool = pool(4, spin);
            for count in (0..200).chain([10_000]) {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, &|i| {
                    runs[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1), "{count}");
            }
        }
    }

    #[test]
    fn threads_start_with_what_they_are_told() {
        let started = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&started);
        let start = move |i| log.lock().unwrap().push(i);
        drop(Pool::with_start(NonZeroUsize::new(4).unwrap(), DEFAULT_SPIN, start).unwrap());
        started.lock().unwrap().sort_unstable();
        assert_eq!(*started.lock().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn callers_take_turns() {
        let pool = pool(3, Duration::ZERO);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(7, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 100 * 21);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool(3, DEFAULT_SPIN);
        for bad in [0, 5, 99] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|i| assert!(i != bad, "piece {i}"));
            }));
            assert!(caught.is_err(), "{bad}");
        }
        // A piece of each thread: they wait for one another, though not for ever.
        let came = AtomicUsize::new(0);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(3, &|i| {
                came.fetch_add(1, Ordering::Relaxed);
                let start = Instant::now();
                while came.load(Ordering::Relaxed) < 3 && start.elapsed().as_secs() < 10 {
                    thread::yield_now();
                }
                panic!("piece {i}");
            });
        }));
        assert!(caught.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(10, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 10);
    }
}
