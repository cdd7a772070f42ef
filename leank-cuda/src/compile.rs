//! CUDA sources to machine code, by NVRTC.

use std::ffi::{CString, c_char, c_int};

use cudarc::nvrtc::{result, sys};
use leank_core::Result;

use crate::probe::{libraries, unavailable};

/// Least major version of NVRTC.
const LEAST_MAJOR: i32 = 12;

/// Machine code of one source for one architecture.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// What the compiler said: warnings, and the assembler's account of registers and spills.
    pub(crate) log: String,
}

/// Fails where NVRTC is missing.
pub(crate) fn check_nvrtc() -> Result<()> {
    if libraries::has_nvrtc() {
        return Ok(());
    }
    Err(unavailable(
        "libnvrtc was not found; install the CUDA toolkit's NVRTC (PyPI: nvidia-cuda-nvrtc)",
    ))
}

/// NVRTC's version.
///
/// # Errors
/// [`Error::Unavailable`] where it is missing.
pub(crate) fn nvrtc_version() -> Result<(i32, i32)> {
    check_nvrtc()?;
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the library is there, and writes two integers.
    let status = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    status.result().map_err(|error| unavailable(format!("NVRTC says {error}")))?;
    if major < LEAST_MAJOR {
        let why =
            format!("NVRTC {major}.{minor} was found; {LEAST_MAJOR}.0 is the least: update it");
        return Err(unavailable(why));
    }
    Ok((major, minor))
}

/// A program under compilation, destroyed with this value.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created by `create_program`, destroyed once. There is nothing to do about a
        // failure.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives as long as `self`.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn cubin(&self) -> std::result::Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the program lives, and NVRTC writes one number.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result()?;
        let mut cubin = vec![0u8; size];
        // SAFETY: NVRTC writes the `size` bytes that it asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()) }.result()?;
        Ok(cubin)
    }
}

/// Compiles a source.
///
/// # Errors
/// [`Error::Unavailable`] where NVRTC is missing or does not know the architecture; with the
/// compiler's words where it does not like the source.
pub(crate) fn compile(source: &str, name: &str, options: &[String]) -> Result<Compiled> {
    nvrtc_version()?;
    let c_string = |text: &str| CString::new(text).map_err(|error| unavailable(error.to_string()));
    let (source, c_name) = (c_string(source)?, c_string(name)?);
    let says = |error| unavailable(format!("NVRTC says {error} about {name}"));
    let program = Program(result::create_program(&source, Some(&c_name)).map_err(says)?);
    // SAFETY: the program was just created.
    let compiled = unsafe { result::compile_program(program.0, options) };
    if let Err(error) = compiled {
        let (options, log) = (options.join(" "), program.log());
        let why = format!("NVRTC says {error} about {name} ({options}): {}", log.trim());
        return Err(unavailable(why));
    }
    let cubin = program.cubin().map_err(says)?;
    Ok(Compiled { cubin, log: program.log() })
}
