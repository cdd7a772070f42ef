//! Matrix products by cuBLAS.

use std::sync::Arc;

use cudarc::{
    cublas::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType},
    },
    driver::{CudaSlice, CudaStream},
};
use leank_core::Error as CoreError;

use super::{address, kernels::Number};
use crate::{Error, Result, cuda::driver};

/// What cuBLAS may use between its kernels; set by us, so that captured graphs own no memory.
pub(super) const WORKSPACE: usize = 32 << 20;

/// A cuBLAS handle on a stream.
pub(super) struct Gemm {
    handle: sys::cublasHandle_t,
    /// Lives as long as the handle uses it.
    _workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

/// Sizes of a product `y = x Wᵀ`, all row after row: x `[rows, inputs]`, W `[outputs, inputs]`, y
/// `[rows, outputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// The same for cuBLAS, whose matrices lie column after column: yᵀ `[m, n]` = op(A) B with A the
/// matrix W, which lies as Wᵀ `[k, m]` and is transposed, and B = xᵀ `[k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Columns {
    m: i32,
    n: i32,
    k: i32,
    /// Elements from one column of A, B, C to the next.
    lda: i32,
    ldb: i32,
    ldc: i32,
}

impl Product {
    fn columns(self) -> Result<Columns> {
        let number = |number: usize| {
            i32::try_from(number).map_err(|_| {
                Error::option("sizes of a matrix product", "less than 2^31", format!("{self:?}"))
            })
        };
        let (m, n, k) = (number(self.outputs)?, number(self.rows)?, number(self.inputs)?);
        Ok(Columns { m, n, k, lda: k, ldb: k, ldc: m })
    }

    /// Fails where a buffer is too short.
    fn check(self, weight: usize, x: usize, y: usize) -> Result<()> {
        let Self { rows, inputs, outputs } = self;
        if weight < outputs * inputs || x < rows * inputs || y < rows * outputs {
            let found = format!("buffers of {weight}, {x} and {y} elements");
            return Err(Error::option("buffers of a matrix product", format!("{self:?}"), found));
        }
        Ok(())
    }
}

fn failed(error: CublasError) -> Error {
    Error::Device(format!("cuBLAS says {error}"))
}

/// Fails where cuBLAS is missing; cudarc would panic.
fn check_library() -> Result<()> {
    // SAFETY: loads and unloads libcublas, whose constructors are NVIDIA's and take no part in
    // Rust's invariants; nothing else is required.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let why = "libcublas was not found; install the CUDA toolkit's cuBLAS, or PyPI's nvidia-cublas \
               and add its folder nvidia/cu13/lib to LD_LIBRARY_PATH";
    Err(CoreError::Unavailable { what: "cuBLAS", why: why.into() }.into())
}

impl Gemm {
    /// # Errors
    /// [`CoreError::Unavailable`] where cuBLAS is missing, [`Error::Device`] where it fails.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        check_library()?;
        // Its memory must not be taken, nor the handle made, on another context.
        stream.context().bind_to_thread().map_err(driver)?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE).map_err(driver)?;
        let handle = result::create_handle().map_err(failed)?;
        // From here on the handle is destroyed with `gemm`.
        let gemm = Self { handle, _workspace: workspace, stream: Arc::clone(stream) };
        // SAFETY: the handle was just made, and the stream lives as long as `gemm`.
        unsafe { result::set_stream(handle, gemm.stream.cu_stream().cast()) }.map_err(failed)?;
        // After the stream: setting one takes the workspace away.
        let workspace = address(&gemm._workspace) as *mut std::ffi::c_void;
        // SAFETY: so many bytes of device memory, aligned to 256, which live as long as the handle.
        unsafe { sys::cublasSetWorkspace_v2(handle, workspace, WORKSPACE) }
            .result()
            .map_err(failed)?;
        Ok(gemm)
    }

    /// `y = x Wᵀ`, or `y += x Wᵀ` where `add` says so.
    pub(super) fn product<T: Number, O: Number>(
        &self,
        weight: &CudaSlice<T>,
        x: &CudaSlice<T>,
        y: &mut CudaSlice<O>,
        product: Product,
        add: bool,
    ) -> Result<()> {
        product.check(weight.len(), x.len(), y.len())?;
        let Columns { m, n, k, lda, ldb, ldc } = product.columns()?;
        let (alpha, beta) = (1.0f32, f32::from(u8::from(add)));
        let compute = match T::CUBLAS {
            // Sums of f32 as they are: no TF32, whatever the environment says.
            cudaDataType::CUDA_R_32F => cublasComputeType_t::CUBLAS_COMPUTE_32F_PEDANTIC,
            _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        self.stream.context().bind_to_thread().map_err(driver)?;
        // SAFETY: the handle lives; the buffers were checked to hold the matrices, whose element types
        // are those of the slices; alpha and beta are f32, as the compute type wants them, and are
        // read before the call returns.
        let status = unsafe {
            sys::cublasGemmEx(
                self.handle,
                cublasOperation_t::CUBLAS_OP_T,
                cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                (&raw const alpha).cast(),
                address(weight) as *const std::ffi::c_void,
                T::CUBLAS,
                lda,
                address(x) as *const std::ffi::c_void,
                T::CUBLAS,
                ldb,
                (&raw const beta).cast(),
                address(y) as *mut std::ffi::c_void,
                O::CUBLAS,
                ldc,
                compute,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        status.result().map_err(failed)
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // SAFETY: ours, and destroyed once. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What cuBLAS does with these parameters: C = Aᵀ B, column after column.
    fn columns_product(columns: Columns, a: &[f32], b: &[f32], c: &mut [f32]) {
        let [m, n, k] = [columns.m, columns.n, columns.k].map(|size| size as usize);
        let [lda, ldb, ldc] = [columns.lda, columns.ldb, columns.ldc].map(|size| size as usize);
        for i in 0..m {
            for j in 0..n {
                // A is [k, m], element (l, i) at l + i * lda.
                c[i + j * ldc] = (0..k).map(|l| a[l + i * lda] * b[l + j * ldb]).sum();
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        let product = Product { rows: 3, inputs: 5, outputs: 4 };
        let w: Vec<f32> = (0..20).map(|i| (i * i % 7) as f32).collect();
        let x: Vec<f32> = (0..15).map(|i| (i * 3 % 11) as f32).collect();
        let mut y = vec![f32::NAN; 12];
        columns_product(product.columns().unwrap(), &w, &x, &mut y);
        for row in 0..3 {
            for out in 0..4 {
                let want: f32 = (0..5).map(|i| x[row * 5 + i] * w[out * 5 + i]).sum();
                assert_eq!(y[row * 4 + out], want);
            }
        }
    }

    #[test]
    fn short_buffers_and_sizes_beyond_cublas_are_told() {
        let product = Product { rows: 3, inputs: 5, outputs: 4 };
        assert!(product.check(20, 15, 12).is_ok());
        for (weight, x, y) in [(19, 15, 12), (20, 14, 12), (20, 15, 11)] {
            assert!(product.check(weight, x, y).is_err());
        }
        assert!(Product { outputs: 1 << 31, ..product }.columns().is_err());
    }

    /// Where there is no cuBLAS, a typed error says how to get it.
    #[test]
    fn a_missing_library_is_told() {
        match check_library() {
            Ok(()) => eprintln!("this machine has cuBLAS"),
            Err(Error::Cache(CoreError::Unavailable { what: "cuBLAS", why })) => {
                assert!(why.contains("nvidia-cublas"), "{why}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}
