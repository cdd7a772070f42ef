//! How a call ends: a status, and a message per thread.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use leank_core::Error;

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $number:literal $c:literal,)*) => {
        /// `leank_status`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub(super) enum Status { $($(#[$doc])* $name = $number,)* }

        impl Status {
            /// Every status with its name in the header.
            pub(super) const ALL: &[(Self, &std::ffi::CStr)] = &[$((Self::$name, $c)),*];
        }
    };
}
statuses! {
    Ok = 0 c"LEANK_OK",
    Invalid = 1 c"LEANK_INVALID",
    Mismatch = 2 c"LEANK_MISMATCH",
    UnknownSequence = 3 c"LEANK_UNKNOWN_SEQUENCE",
    Order = 4 c"LEANK_ORDER",
    MemoryLimit = 5 c"LEANK_MEMORY_LIMIT",
    SystemMemory = 6 c"LEANK_SYSTEM_MEMORY",
    Unavailable = 7 c"LEANK_UNAVAILABLE",
    Format = 8 c"LEANK_FORMAT",
    Io = 9 c"LEANK_IO",
    Busy = 10 c"LEANK_BUSY",
    Internal = 11 c"LEANK_INTERNAL",
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// What the Rust side says.
    Error(Error),
    /// The cache is in use.
    Busy,
    /// An earlier call on the cache panicked.
    Poisoned,
    /// This call panicked.
    Panic(String),
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Failure {
    fn status(&self) -> Status {
        match self {
            Self::Error(error) => match error {
                Error::Invalid { .. } => Status::Invalid,
                Error::Mismatch { .. } | Error::OtherModel { .. } => Status::Mismatch,
                Error::UnknownSequence(_) => Status::UnknownSequence,
                Error::Order { .. } => Status::Order,
                Error::OutOfMemory { .. } => Status::MemoryLimit,
                Error::SystemMemory { .. } => Status::SystemMemory,
                Error::Unavailable { .. } => Status::Unavailable,
                Error::Format { .. } => Status::Format,
                Error::Io { .. } => Status::Io,
                _ => Status::Internal,
            },
            Self::Busy => Status::Busy,
            Self::Poisoned | Self::Panic(_) => Status::Internal,
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Error(error) => error.to_string(),
            Self::Busy => "the cache is in use by another call: let one thread use it at a time, \
                           and no callback come back to it"
                .into(),
            Self::Poisoned => {
                "an earlier call on this cache failed inside (LEANK_INTERNAL), so that \
                               it can no longer be trusted: free it and make a new one"
                    .into()
            }
            Self::Panic(what) => format!("a panic was caught: {what}"),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Error(Error::OutOfMemory { missing: bytes, .. })
            | Self::Error(Error::SystemMemory { bytes, .. }) => *bytes,
            _ => 0,
        }
    }
}

/// The last failure of a thread.
struct Last {
    message: CString,
    bytes: u64,
}

thread_local! {
    static LAST: RefCell<Last> = RefCell::new(Last { message: CString::default(), bytes: 0 });
}

/// Runs a call of the ABI: what goes wrong in it, panics included, becomes a status and the thread's
/// last error.
pub(super) fn call(body: impl FnOnce() -> Result<()>) -> Status {
    let caught = catch_unwind(AssertUnwindSafe(body));
    let Err(failure) = caught.unwrap_or_else(|payload| Err(Failure::Panic(said(&*payload)))) else {
        return Status::Ok;
    };
    let text = failure.message().replace('\0', "\u{fffd}");
    let last = Last { message: CString::new(text).unwrap_or_default(), bytes: failure.bytes() };
    // A thread that is ending has no last error any more.
    let _ = LAST.try_with(|slot| slot.replace(last));
    failure.status()
}

/// What a panic said.
fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref().copied()).unwrap_or("no message").to_owned()
}

/// The message of the thread's last failure.
#[unsafe(no_mangle)]
pub(super) extern "C" fn leank_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().message.as_ptr()).unwrap_or(c"".as_ptr())
}

/// The bytes that were missing at the thread's last failure.
#[unsafe(no_mangle)]
pub(super) extern "C" fn leank_last_error_bytes() -> u64 {
    LAST.try_with(|last| last.borrow().bytes).unwrap_or(0)
}

/// The header's name of a status.
#[unsafe(no_mangle)]
pub(super) extern "C" fn leank_status_name(status: i32) -> *const c_char {
    let found = Status::ALL.iter().find(|(known, _)| *known as i32 == status);
    found.map_or(c"unknown", |(_, name)| name).as_ptr()
}
