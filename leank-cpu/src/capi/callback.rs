//! Functions of C that leank calls: executors, writers and readers.

use std::{
    any::Any,
    ffi::c_void,
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crate::Executor;

/// `leank_run`'s `piece`.
pub(super) type Piece = unsafe extern "C" fn(context: *mut c_void, i: usize);
/// `leank_run`.
pub(super) type Run =
    unsafe extern "C" fn(user: *mut c_void, count: usize, piece: Piece, context: *mut c_void);
/// `leank_write`.
pub(super) type WriteFn =
    unsafe extern "C" fn(user: *mut c_void, data: *const c_void, len: usize) -> isize;
/// `leank_read`.
pub(super) type ReadFn =
    unsafe extern "C" fn(user: *mut c_void, data: *mut c_void, len: usize) -> isize;

/// The threads of a C runtime.
#[derive(Debug)]
pub(super) struct Injected {
    pub(super) run: Run,
    pub(super) user: *mut c_void,
    pub(super) threads: usize,
}

// SAFETY: the header says that `run` is called with `user` on whatever thread uses the cache.
unsafe impl Send for Injected {}
// SAFETY: as above; and that caches that share it may do so at the same time.
unsafe impl Sync for Injected {}

/// One run, as the pieces see it.
struct Round<'a> {
    piece: &'a (dyn Fn(usize) + Sync),
    /// Pieces that were begun.
    claimed: Box<[AtomicBool]>,
    /// Calls, wrong ones included.
    begun: AtomicUsize,
    ended: AtomicUsize,
    /// What the first piece that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Executor for Injected {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        let round = Round {
            piece,
            claimed: (0..count).map(|_| AtomicBool::new(false)).collect(),
            begun: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            panic: Mutex::new(None),
        };
        let context = (&raw const round).cast_mut().cast();
        // SAFETY: the header says what this function is. `round` outlives it and every call of
        // `run_piece` that it has begun.
        unsafe { (self.run)(self.user, count, run_piece, context) };
        let early = round.wait();
        round.finish(early);
    }
}

/// What C calls for a piece.
///
/// # Safety
/// `context` is that of a run that has not returned.
unsafe extern "C" fn run_piece(context: *mut c_void, i: usize) {
    // SAFETY: the caller's promise, which the header asks for.
    let round = unsafe { &*context.cast_const().cast::<Round<'_>>() };
    round.begun.fetch_add(1, Ordering::SeqCst);
    // Twice would be two threads in one piece.
    if round.claimed.get(i).is_some_and(|claimed| !claimed.swap(true, Ordering::SeqCst))
        && let Err(payload) = catch_unwind(AssertUnwindSafe(|| (round.piece)(i)))
    {
        let mut slot = round.panic.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(payload);
    }
    round.ended.fetch_add(1, Ordering::SeqCst);
}

impl Round<'_> {
    /// Waits for pieces that a runtime in error has left running: they use the caller's stack, and this
    /// value where it lies. Whether there were any.
    fn wait(&self) -> bool {
        let mut early = false;
        while self.ended.load(Ordering::SeqCst) < self.begun.load(Ordering::SeqCst) {
            early = true;
            std::thread::yield_now();
        }
        early
    }

    /// # Panics
    /// When a piece did, and when the pieces did not run once each.
    fn finish(self, early: bool) {
        if let Some(payload) = self.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(payload);
        }
        let count = self.claimed.len();
        let calls = self.begun.into_inner();
        let missing = self.claimed.iter().position(|claimed| !claimed.load(Ordering::SeqCst));
        assert!(
            missing.is_none() && calls == count && !early,
            "the backend's `run` must call piece(context, i) exactly once for every i below {count}, \
             and return when all these calls have returned; it made {calls} calls, {}{}",
            missing.map_or("no piece was left out".into(), |i| format!("piece {i} was left out")),
            if early { ", and some went on after its return" } else { "" },
        );
    }
}

/// Where a sequence is saved to.
pub(super) struct Writer {
    pub(super) write: WriteFn,
    pub(super) user: *mut c_void,
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the header says what this function is; `bytes` lives until it returns.
        let answer = unsafe { (self.write)(self.user, bytes.as_ptr().cast(), bytes.len()) };
        moved("write", answer, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a sequence is restored from.
pub(super) struct Reader {
    pub(super) read: ReadFn,
    pub(super) user: *mut c_void,
}

impl io::Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        // SAFETY: as for the writer.
        let answer = unsafe { (self.read)(self.user, bytes.as_mut_ptr().cast(), bytes.len()) };
        moved("read", answer, bytes.len())
    }
}

/// How many of `len` bytes a callback says it moved.
fn moved(name: &str, answer: isize, len: usize) -> io::Result<usize> {
    match usize::try_from(answer) {
        Ok(bytes) if bytes <= len => Ok(bytes),
        Ok(_) => {
            Err(io::Error::other(format!("the callback `{name}` answered {answer} of {len} bytes")))
        }
        Err(_) => Err(io::Error::other(format!(
            "the callback `{name}` answered {answer}, which stands for failure"
        ))),
    }
}
