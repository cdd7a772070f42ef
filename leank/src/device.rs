//! Which backend runs, chosen at run time among those that were compiled in.

use std::fmt;

use crate::{Error, Result};

/// A device that a backend may run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
}

impl Device {
    /// Checks that the device's backend was compiled in and that the device is there.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the reason.
    pub fn check(self) -> Result<()> {
        match self {
            #[cfg(feature = "cpu")]
            Self::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinal) => leank_cuda::probe(ordinal).map(drop),
            #[cfg(not(all(feature = "cpu", feature = "cuda")))]
            missing => Err(missing.not_compiled_in()),
        }
    }

    #[cfg(not(all(feature = "cpu", feature = "cuda")))]
    fn not_compiled_in(self) -> Error {
        let (what, feature) = match self {
            Self::Cpu => ("the CPU backend", "cpu"),
            Self::Cuda(_) => ("the CUDA backend", "cuda"),
        };
        let why = format!("leank was built without the cargo feature `{feature}`");
        Error::Unavailable { what, why }
    }

    /// The first of `wanted` that is available, and why those before it are not, for the caller
    /// to report: a fallback is never silent.
    ///
    /// # Errors
    /// The last device's [`Error::Unavailable`] when none is, and any other error at once.
    pub fn first_available(wanted: &[Self]) -> Result<(Self, Vec<(Self, Error)>)> {
        let mut skipped = Vec::new();
        for &device in wanted {
            match device.check() {
                Ok(()) => return Ok((device, skipped)),
                Err(error @ Error::Unavailable { .. }) => skipped.push((device, error)),
                Err(other) => return Err(other),
            }
        }
        let none = || Error::invalid("devices", "the list of wanted devices is empty");
        Err(skipped.pop().map_or_else(none, |(_, error)| error))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(feature = "cpu")]
    fn a_fallback_comes_with_its_reason() {
        let (device, skipped) =
            Device::first_available(&[Device::Cuda(9_999), Device::Cpu]).unwrap();
        assert_eq!(device, Device::Cpu);
        assert!(matches!(skipped[..], [(Device::Cuda(9_999), Error::Unavailable { .. })]));
    }

    #[test]
    fn nothing_available_is_an_error() {
        let none = Device::first_available(&[Device::Cuda(9_999)]);
        assert!(matches!(none, Err(Error::Unavailable { .. })));
        assert!(Device::first_available(&[]).is_err());
    }
}
