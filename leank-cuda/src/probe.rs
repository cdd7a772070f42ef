//! Whether there is a CUDA device that the backend can run on, found out without panicking:
//! cudarc panics where a library is absent, so the libraries are looked for first.

use std::{fmt, sync::Arc};

use cudarc::{
    driver::{CudaContext, DriverError},
    nvrtc,
};
use leank_core::{Error, Result};

use crate::compile::check_nvrtc;

/// Least compute capability: bf16 and asynchronous copies.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Least CUDA version of the driver, times 1000.
const LEAST_DRIVER: i32 = 12_080;

/// A CUDA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Major and minor compute capability.
    pub compute_capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let gib = self.memory as f64 / (1u64 << 30) as f64;
        write!(f, "CUDA device {}: {}, sm_{major}{minor}, {gib:.1} GiB", self.ordinal, self.name)
    }
}

pub(crate) fn unavailable(why: impl Into<String>) -> Error {
    Error::Unavailable { what: "CUDA", why: why.into() }
}

pub(crate) fn driver(error: DriverError) -> Error {
    unavailable(format!("the driver says {error}; check that `nvidia-smi` works"))
}

/// Looks for device `ordinal`.
///
/// # Errors
/// [`Error::Unavailable`] when the driver or NVRTC is missing, when there is no such device, or
/// when it is older than compute capability 8.0.
pub fn probe(ordinal: usize) -> Result<Device> {
    open(ordinal).map(|(device, _)| device)
}

/// The same, and the device's primary context, which takes a while to make.
pub(crate) fn open(ordinal: usize) -> Result<(Device, Arc<CudaContext>)> {
    if !libraries::has_driver() {
        return Err(unavailable("libcuda was not found; install the NVIDIA driver"));
    }
    let driver_version = libraries::driver_version().map_err(driver)?;
    if driver_version < LEAST_DRIVER {
        let version = |number: i32| format!("{}.{}", number / 1000, number % 1000 / 10);
        let (found, least) = (version(driver_version), version(LEAST_DRIVER));
        return Err(unavailable(format!(
            "the driver knows CUDA {found}; {least} is the least: update it"
        )));
    }
    let count = CudaContext::device_count().map_err(driver)?;
    if ordinal >= usize::try_from(count).unwrap_or(0) {
        let why = format!("there is no device {ordinal}: the driver lists {count}");
        return Err(unavailable(why));
    }
    let context = CudaContext::new(ordinal).map_err(driver)?;
    let compute_capability = context.compute_capability().map_err(driver)?;
    let name = context.name().map_err(driver)?;
    if compute_capability < LEAST_CAPABILITY {
        let (major, minor) = compute_capability;
        let why = format!("{name} has compute capability {major}.{minor}; 8.0 is the least");
        return Err(unavailable(why));
    }
    check_nvrtc()?;
    let memory = context.total_mem().map_err(driver)?;
    Ok((Device { ordinal, name, compute_capability, memory }, context))
}

/// cudarc's own look at whether a library can be loaded.
#[allow(unsafe_code, reason = "loads libraries")]
pub(crate) mod libraries {
    use super::{DriverError, nvrtc};

    pub(crate) fn has_driver() -> bool {
        // SAFETY: loads and unloads libcuda, whose constructors are NVIDIA's and take no part in
        // Rust's invariants; nothing else is required.
        unsafe { cudarc::driver::sys::is_culib_present() }
    }

    /// CUDA version of the driver, times 1000; the library is there.
    pub(crate) fn driver_version() -> Result<i32, DriverError> {
        let mut version = 0;
        // SAFETY: the driver writes one integer.
        unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version) }.result()?;
        Ok(version)
    }

    pub(crate) fn has_nvrtc() -> bool {
        // SAFETY: as for the driver, with libnvrtc.
        unsafe { nvrtc::sys::is_culib_present() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_or_a_reason() {
        match probe(0) {
            Ok(device) => assert!(device.compute_capability >= LEAST_CAPABILITY),
            Err(Error::Unavailable { what: "CUDA", why }) => {
                eprintln!("skipped on this machine: {why}");
                assert!(!why.is_empty());
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_unavailable() {
        assert!(matches!(probe(9_999), Err(Error::Unavailable { .. })));
    }
}
