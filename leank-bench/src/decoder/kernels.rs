//! The decoder's small kernels: what is compiled, and how it is launched.

use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::{
    cublaslt::sys::cudaDataType,
    driver::{
        CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg as _,
        ValidAsZeroBits,
    },
    nvrtc::{self, CompileOptions, Ptx},
};
use half::bf16;
use leank_core::Error as CoreError;

use crate::{Error, Result, cuda::driver};

const SOURCE: &str = include_str!("kernels.cu");

/// Threads of the kernels that go along rows.
const THREADS: u32 = 512;

/// Element types of a decoder's weights and of what goes into its products.
pub trait Number: leank_cuda::Element + DeviceRepr + ValidAsZeroBits + Zeroable + Copy {
    /// cuBLAS's name.
    const CUBLAS: cudaDataType;

    /// Rounds.
    fn from_f32(x: f32) -> Self;
}

impl Number for f32 {
    const CUBLAS: cudaDataType = cudaDataType::CUDA_R_32F;

    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Number for bf16 {
    const CUBLAS: cudaDataType = cudaDataType::CUDA_R_16BF;

    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// Compiles the kernels for weights of a type and an architecture such as `compute_80` or `sm_90`.
///
/// # Errors
/// [`CoreError::Unavailable`] without NVRTC, [`Error::Device`] with the compiler's words.
pub fn compile<T: Number>(architecture: &str) -> Result<Ptx> {
    check_nvrtc()?;
    let options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        format!("-DBF16={}", u8::from(T::CUBLAS == cudaDataType::CUDA_R_16BF)),
    ];
    nvrtc::compile_ptx_with_opts(SOURCE, CompileOptions { options, ..Default::default() })
        .map_err(|error| Error::Device(format!("the decoder's kernels do not compile: {error}")))
}

/// Fails where NVRTC is missing; cudarc would panic.
fn check_nvrtc() -> Result<()> {
    // SAFETY: loads and unloads libnvrtc, whose constructors are NVIDIA's and take no part in Rust's
    // invariants; nothing else is required.
    if unsafe { nvrtc::sys::is_culib_present() } {
        return Ok(());
    }
    let why = "libnvrtc was not found; install the CUDA toolkit's NVRTC (PyPI: nvidia-cuda-nvrtc)";
    Err(CoreError::Unavailable { what: "NVRTC", why: why.into() }.into())
}

/// The kernels on a device.
pub(super) struct Kernels {
    stream: Arc<CudaStream>,
    embed: CudaFunction,
    rms_norm: CudaFunction,
    rope: CudaFunction,
    swiglu: CudaFunction,
    argmax: CudaFunction,
}

/// What [`Kernels::rope`] turns.
pub(super) struct Rotation<'a> {
    /// Bias of q, k and v, where the model has it.
    pub(super) bias: Option<&'a CudaSlice<f32>>,
    pub(super) cosines: &'a CudaSlice<f32>,
    pub(super) sines: &'a CudaSlice<f32>,
    pub(super) positions: &'a CudaSlice<u32>,
    /// Heads of q and k.
    pub(super) rotated: usize,
    /// Heads of q, k and v.
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl Kernels {
    pub(super) fn new<T: Number>(stream: &Arc<CudaStream>) -> Result<Self> {
        // The driver makes machine code of it.
        let module = stream.context().load_module(compile::<T>("compute_80")?).map_err(driver)?;
        let function = |name| module.load_function(name).map_err(driver);
        Ok(Self {
            stream: Arc::clone(stream),
            embed: function("embed")?,
            rms_norm: function("rms_norm")?,
            rope: function("rope")?,
            swiglu: function("swiglu")?,
            argmax: function("argmax")?,
        })
    }

    /// `x[row] = table[tokens[row]]`, rows of `hidden`, a multiple of 4.
    pub(super) fn embed<T: Number>(
        &self,
        table: &CudaSlice<T>,
        tokens: &CudaSlice<u32>,
        x: &mut CudaSlice<f32>,
        (rows, hidden): (usize, usize),
    ) -> Result<()> {
        let width = hidden as u32;
        let mut launch = self.stream.launch_builder(&self.embed);
        launch.arg(table).arg(tokens).arg(x).arg(&width);
        // SAFETY: these are the kernel's parameters; the decoder sized the buffers for so many rows,
        // and tokens are below the vocabulary: the caller's are checked, `argmax` bounds its own.
        unsafe { launch.launch(grid(rows, 1, THREADS)) }.map_err(driver)?;
        Ok(())
    }

    /// RMS norm of each row of `x`, a multiple of 4 wide.
    pub(super) fn rms_norm<T: Number>(
        &self,
        x: &CudaSlice<f32>,
        weight: &CudaSlice<f32>,
        epsilon: f32,
        out: &mut CudaSlice<T>,
        rows: usize,
    ) -> Result<()> {
        let hidden = weight.len() as u32;
        let mut launch = self.stream.launch_builder(&self.rms_norm);
        launch.arg(x).arg(weight).arg(out).arg(&hidden).arg(&epsilon);
        // SAFETY: these are the kernel's parameters; the decoder sized the buffers for so many rows.
        unsafe { launch.launch(grid(rows, 1, THREADS)) }.map_err(driver)?;
        Ok(())
    }

    /// Bias and RoPE, in place.
    pub(super) fn rope<T: Number>(
        &self,
        qkv: &mut CudaSlice<T>,
        rotation: &Rotation<'_>,
        rows: usize,
    ) -> Result<()> {
        let Rotation { bias, cosines, sines, positions, .. } = *rotation;
        let [rotated, all, head_dim] =
            [rotation.rotated, rotation.heads, rotation.head_dim].map(|count| count as u32);
        let heads = if bias.is_some() { all } else { rotated };
        let stride = all * head_dim;
        let bias = bias.map_or(0, super::address);
        let threads = 256;
        let blocks = (heads * head_dim / 2).div_ceil(threads);
        let mut launch = self.stream.launch_builder(&self.rope);
        launch.arg(qkv).arg(&bias).arg(cosines).arg(sines).arg(positions);
        launch.arg(&heads).arg(&rotated).arg(&head_dim).arg(&stride);
        // SAFETY: these are the kernel's parameters; the decoder sized the buffers for so many rows,
        // and positions lie in the table: the caller's are checked, `argmax` bounds its own.
        unsafe { launch.launch(grid(blocks as usize, rows, threads)) }.map_err(driver)?;
        Ok(())
    }

    /// `out = silu(gate) * up`, rows of `width`, a multiple of 4.
    pub(super) fn swiglu<T: Number>(
        &self,
        gate_up: &CudaSlice<T>,
        out: &mut CudaSlice<T>,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let threads = 256;
        let blocks = (width / 4).div_ceil(threads as usize);
        let width = width as u32;
        let mut launch = self.stream.launch_builder(&self.swiglu);
        launch.arg(gate_up).arg(out).arg(&width);
        // SAFETY: these are the kernel's parameters; the decoder sized the buffers for so many rows.
        unsafe { launch.launch(grid(blocks, rows, threads)) }.map_err(driver)?;
        Ok(())
    }

    /// The next token of each row, and its position, one of `count`.
    pub(super) fn argmax(
        &self,
        logits: &CudaSlice<f32>,
        tokens: &mut CudaSlice<u32>,
        positions: &mut CudaSlice<u32>,
        (rows, vocab, count): (usize, usize, usize),
    ) -> Result<()> {
        let (vocab, last) = (vocab as u32, (count - 1) as u32);
        let mut launch = self.stream.launch_builder(&self.argmax);
        launch.arg(logits).arg(tokens).arg(positions).arg(&vocab).arg(&last);
        // SAFETY: these are the kernel's parameters and its number of threads; the decoder sized the
        // buffers for so many rows.
        unsafe { launch.launch(grid(rows, 1, 1024)) }.map_err(driver)?;
        Ok(())
    }
}

fn grid(x: usize, y: usize, threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With NVRTC the kernels compile, and what is no architecture is told; without, how to get it.
    #[test]
    fn kernels_compile_or_a_typed_error_says_why_not() {
        match compile::<bf16>("sm_90") {
            Ok(_) => assert!(matches!(compile::<f32>("sm_1"), Err(Error::Device(_)))),
            Err(Error::Cache(CoreError::Unavailable { what: "NVRTC", why })) => {
                assert!(why.contains("nvidia-cuda-nvrtc"), "{why}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}
