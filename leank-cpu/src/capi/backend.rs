//! `leank_backend`: a kernel and threads.

use std::{
    ffi::{CString, c_char, c_void},
    num::NonZeroUsize,
    sync::{Arc, OnceLock},
    time::Duration,
};

use leank_core::{Backend as _, Error};

use super::{
    c_struct,
    callback::{Injected, Run},
    memory::{self, Options, OutHandle},
    status::{Result, Status, call},
};
use crate::{Cpu, DEFAULT_SPIN, Executor, Isa, Pool, Serial};

/// Most threads of a pool: a number beyond it was never meant.
const MAX_THREADS: usize = 1024;

/// What `leank_backend` points to.
pub(super) struct Backend {
    pub(super) cpu: Cpu,
    name: CString,
}

impl Backend {
    fn new(cpu: Cpu) -> Self {
        let name = CString::new(cpu.name()).unwrap_or_default();
        Self { cpu, name }
    }

    /// What stands for NULL.
    fn default() -> &'static Self {
        static DEFAULT: OnceLock<Backend> = OnceLock::new();
        DEFAULT.get_or_init(|| Self::new(Cpu::with_executor(Arc::new(Serial))))
    }

    /// # Safety
    /// `backend` is a handle that nobody frees for `'a`, or NULL.
    pub(super) unsafe fn or_default<'a>(backend: *const Self) -> Result<&'a Self> {
        if backend.is_null() {
            return Ok(Self::default());
        }
        // SAFETY: the caller's promise.
        unsafe { memory::borrow("backend", backend) }
    }
}

c_struct! {
    /// How a backend is made.
    BackendOptions = "leank_backend_options" {
        struct_size: usize,
        threads: usize,
        spin_ns: u64,
        isa: *const c_char,
        run: Option<Run>,
        user: *mut c_void,
    }
}

// SAFETY: numbers, pointers and a function that may be NULL; the size comes first.
unsafe impl Options for BackendOptions {
    const NAME: &'static str = "backend options";

    fn defaults() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            threads: 1,
            spin_ns: DEFAULT_SPIN.as_nanos() as u64,
            isa: std::ptr::null(),
            run: None,
            user: std::ptr::null_mut(),
        }
    }
}

impl BackendOptions {
    fn executor(&self) -> Result<Arc<dyn Executor>> {
        let threads = NonZeroUsize::new(self.threads).unwrap_or(NonZeroUsize::MIN);
        if threads.get() > MAX_THREADS {
            let why = format!("{threads} threads, more than {MAX_THREADS}");
            return Err(Error::invalid(Self::NAME, why).into());
        }
        if let Some(run) = self.run {
            return Ok(Arc::new(Injected { run, user: self.user, threads: threads.get() }));
        }
        if threads == NonZeroUsize::MIN {
            return Ok(Arc::new(Serial));
        }
        Ok(Arc::new(Pool::with_spin(threads, Duration::from_nanos(self.spin_ns))?))
    }
}

/// Sets the defaults.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_backend_options_init(
    to: *mut BackendOptions,
    size: usize,
) -> Status {
    // SAFETY: the header asks for it.
    call(|| unsafe { memory::init(to, size) })
}

/// Makes a backend.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_backend_create(
    options: *const BackendOptions,
    backend: *mut *mut Backend,
) -> Status {
    call(|| {
        // SAFETY: the header asks for it.
        let out = unsafe { OutHandle::new("address for the backend", backend) }?;
        // SAFETY: the header asks for it.
        let options = unsafe { memory::options(options) }?;
        // SAFETY: the header asks for it.
        let isa = unsafe { memory::text("instruction set", options.isa) }?;
        let isa = isa.map_or(Ok(Isa::best()), str::parse)?;
        // Threads last: they are the only thing that takes something.
        let cpu = Cpu::with_executor(Arc::new(Serial)).with_isa(isa)?;
        out.put(Backend::new(Cpu { executor: options.executor()?, ..cpu }));
        Ok(())
    })
}

/// The backend's name.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_backend_name(backend: *const Backend) -> *const c_char {
    // SAFETY: the header asks for it.
    let backend = unsafe { Backend::or_default(backend) };
    backend.map_or(c"".as_ptr(), |backend| backend.name.as_ptr())
}

/// Takes a backend back.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn leank_backend_free(backend: *mut Backend) {
    call(|| {
        // SAFETY: the header asks for it.
        unsafe { memory::free(backend) };
        Ok(())
    });
}
