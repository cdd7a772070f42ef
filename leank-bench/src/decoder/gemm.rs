//! Matrix products by cuBLAS, through its interface that lets the caller choose among algorithms.
//!
//! Few rows make a product a read of its weights, and cuBLAS's own first choice is not always the
//! fastest then: [`Gemm::tune`] times what it proposes.

use std::{
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    ffi::c_void,
    sync::Arc,
};

use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys::{self, cublasComputeType_t, cudaDataType},
    },
    driver::{CudaSlice, CudaStream},
};
use leank_core::Error as CoreError;

use super::{address, kernels::Number};
use crate::{
    Error, Result,
    cuda::{driver, seconds},
};

/// What cuBLAS may use within a product; ours, so that captured graphs own no memory.
pub(super) const WORKSPACE: usize = 32 << 20;

/// Algorithms asked for, the best by cuBLAS's own judgement first.
const CANDIDATES: usize = 24;

/// Passes over the weights per algorithm when they are timed.
const PASSES: usize = 3;

/// cuBLAS on a stream.
pub(super) struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
    /// Every kind of product that was asked for.
    plans: RefCell<HashMap<Kind, Plan>>,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    product: Product,
    /// Types of weights and x, and of y.
    types: [cudaDataType; 2],
    add: bool,
}

/// A product as cuBLAS describes it, and its algorithms, the one in use first.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of A, B and C.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
    /// How fast they are, once they were timed.
    tuned: Option<Tuned>,
}

/// Seconds of a product: by cuBLAS's first choice, and by the fastest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tuned {
    pub(super) first: f64,
    pub(super) fastest: f64,
}

/// Sizes of a product `y = x Wᵀ`, all row after row: x `[rows, inputs]`, W `[outputs, inputs]`, y
/// `[rows, outputs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// The same for cuBLAS, whose matrices lie column after column: C = yᵀ `[m, n]` = Aᵀ B with A `[k, m]`,
/// which is W as it lies, and B = xᵀ `[k, n]`. Columns have no gaps between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Columns {
    m: usize,
    n: usize,
    k: usize,
}

impl Product {
    fn columns(self) -> Columns {
        Columns { m: self.outputs, n: self.rows, k: self.inputs }
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
    // SAFETY: loads and unloads libcublasLt, whose constructors are NVIDIA's and take no part in
    // Rust's invariants; nothing else is required.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let why = "libcublasLt was not found; install the CUDA toolkit's cuBLAS, or PyPI's nvidia-cublas \
               and add its folder nvidia/cu13/lib to LD_LIBRARY_PATH";
    Err(CoreError::Unavailable { what: "cuBLAS", why: why.into() }.into())
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, kind: Kind) -> Result<Self> {
        let Kind { product, types: [input, output], .. } = kind;
        let compute = match input {
            // Sums of f32 as they are: no TF32, whatever the environment says.
            cudaDataType::CUDA_R_32F => cublasComputeType_t::CUBLAS_COMPUTE_32F_PEDANTIC,
            _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let Columns { m, n, k } = product.columns();
        let null = std::ptr::null_mut();
        let description = result::create_matmul_desc(compute, cudaDataType::CUDA_R_32F);
        // From here on what was made is destroyed with `plan`.
        let mut plan = Self {
            description: description.map_err(failed)?,
            layouts: [null; 3],
            algorithms: Vec::new(),
            tuned: None,
        };
        let matrices = [(input, k, m), (input, k, n), (output, m, n)];
        for (layout, (kind, rows, columns)) in plan.layouts.iter_mut().zip(matrices) {
            let made = result::create_matrix_layout(kind, rows as u64, columns as u64, rows as i64);
            *layout = made.map_err(failed)?;
        }
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the description was just made, and the attribute is such an enum, which is copied.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.description,
                attribute,
                (&raw const TRANSPOSED).cast(),
                size_of_val(&TRANSPOSED),
            )
        }
        .map_err(failed)?;
        plan.algorithms = plan.propose(handle)?;
        Ok(plan)
    }

    /// The algorithms that cuBLAS proposes.
    fn propose(&self, handle: sys::cublasLtHandle_t) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = Preference(result::create_matmul_pref().map_err(failed)?);
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the preference was just made, and the attribute is such a number, which is copied.
        unsafe {
            let bytes = &raw const WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(
                preference.0,
                attribute,
                bytes.cast(),
                size_of::<u64>(),
            )
        }
        .map_err(failed)?;
        let empty = sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let mut found = [empty; CANDIDATES];
        let mut count = 0;
        let [a, b, c] = self.layouts;
        // SAFETY: handle, description, layouts and preference live; cuBLAS writes at most as many
        // results as there is room for, and their number.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.description,
                a,
                b,
                c,
                c,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        }
        .result()
        .map_err(failed)?;
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        let usable = found.filter(|it| it.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = usable.map(|it| it.algo).collect();
        if algorithms.is_empty() {
            return Err(failed(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(algorithms)
    }
}

/// [`WORKSPACE`] as cuBLAS takes it.
static WORKSPACE_BYTES: u64 = WORKSPACE as u64;

/// `CUBLAS_OP_T`, which cudarc does not list here.
static TRANSPOSED: i32 = 1;

/// What algorithms may use, destroyed with this value.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `create_matmul_pref`, destroyed once. There is nothing to do about a failure.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: made by `create_matrix_layout`, destroyed once; as above.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: made by `create_matmul_desc`, destroyed once; as above.
        let _ = unsafe { result::destroy_matmul_desc(self.description) };
    }
}

impl Gemm {
    /// # Errors
    /// [`CoreError::Unavailable`] where cuBLAS is missing, [`Error::Device`] where it fails.
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        check_library()?;
        // The handle must not be made on another context.
        stream.context().bind_to_thread().map_err(driver)?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE).map_err(driver)?;
        let handle = result::create_handle().map_err(failed)?;
        Ok(Self { handle, workspace, stream: Arc::clone(stream), plans: RefCell::default() })
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
        let kind = Kind { product, types: [T::CUBLAS, O::CUBLAS], add };
        self.stream.context().bind_to_thread().map_err(driver)?;
        let mut plans = self.plans.borrow_mut();
        let plan = self.plan(&mut plans, kind)?;
        let addresses = [address(weight), address(x), address(y)];
        // SAFETY: the buffers were checked to hold the matrices, whose element types are those of the
        // slices.
        unsafe { self.launch(plan, &plan.algorithms[0], addresses, add) }.map_err(failed)
    }

    /// The plan of a kind of products, made where there is none yet.
    fn plan<'a>(&self, plans: &'a mut HashMap<Kind, Plan>, kind: Kind) -> Result<&'a mut Plan> {
        Ok(match plans.entry(kind) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Plan::new(self.handle, kind)?),
        })
    }

    /// # Safety
    /// The addresses are those of device memory that holds W, x and y of the plan.
    unsafe fn launch(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [weight, x, y]: [u64; 3],
        add: bool,
    ) -> Result<(), CublasError> {
        let (alpha, beta) = (1.0f32, f32::from(u8::from(add)));
        let [a, b, c] = plan.layouts;
        // SAFETY: handle, description, layouts and algorithm belong together; alpha and beta are f32,
        // as the description wants them, and are read before the call returns; the workspace is used
        // by one product at a time, as all are on one stream; for the matrices see above.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight as *const c_void,
                a,
                x as *const c_void,
                b,
                y as *const c_void,
                c,
                y as *mut c_void,
                c,
                algorithm,
                address(&self.workspace) as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        }
    }

    /// Times the algorithms of a kind of products and keeps the fastest; seconds per product. The
    /// weights are those of all layers, so that none is read from a cache.
    pub(super) fn tune<T: Number, O: Number>(
        &self,
        weights: &[&CudaSlice<T>],
        x: &CudaSlice<T>,
        product: Product,
        add: bool,
    ) -> Result<Tuned> {
        let y = self.stream.alloc_zeros::<O>(product.rows * product.outputs).map_err(driver)?;
        for weight in weights {
            product.check(weight.len(), x.len(), y.len())?;
        }
        let kind = Kind { product, types: [T::CUBLAS, O::CUBLAS], add };
        let mut plans = self.plans.borrow_mut();
        let plan = self.plan(&mut plans, kind)?;
        if let Some(tuned) = plan.tuned {
            return Ok(tuned);
        }
        let pass = |algorithm: &_| {
            weights.iter().try_for_each(|weight| {
                let addresses = [address(*weight), address(x), address(&y)];
                // SAFETY: the buffers were checked above.
                unsafe { self.launch(plan, algorithm, addresses, add) }
            })
        };
        let time = |algorithm: &_| -> Result<f64> {
            // One that cuBLAS proposes and then refuses is none.
            if pass(algorithm).is_err() {
                return Ok(f64::INFINITY);
            }
            let mut least = f64::INFINITY;
            for _ in 0..PASSES {
                let work = || pass(algorithm).map_err(failed);
                least = least.min(seconds(&self.stream, work)?);
            }
            Ok(least / weights.len() as f64)
        };
        let times = plan.algorithms.iter().map(time).collect::<Result<Vec<f64>>>()?;
        let fastest = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0);
        plan.algorithms.swap(0, fastest);
        let tuned = Tuned { first: times[0], fastest: times[fastest] };
        plan.tuned = Some(tuned);
        Ok(tuned)
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

    /// What cuBLAS does with these sizes: C = Aᵀ B, column after column.
    fn columns_product(Columns { m, n, k }: Columns, a: &[f32], b: &[f32], c: &mut [f32]) {
        for i in 0..m {
            for j in 0..n {
                // A is [k, m], element (l, i) at l + i * k.
                c[i + j * m] = (0..k).map(|l| a[l + i * k] * b[l + j * k]).sum();
            }
        }
    }

    #[test]
    fn rows_become_columns() {
        let product = Product { rows: 3, inputs: 5, outputs: 4 };
        let w: Vec<f32> = (0..20).map(|i| (i * i % 7) as f32).collect();
        let x: Vec<f32> = (0..15).map(|i| (i * 3 % 11) as f32).collect();
        let mut y = vec![f32::NAN; 12];
        columns_product(product.columns(), &w, &x, &mut y);
        for row in 0..3 {
            for out in 0..4 {
                let want: f32 = (0..5).map(|i| x[row * 5 + i] * w[out * 5 + i]).sum();
                assert_eq!(y[row * 4 + out], want);
            }
        }
    }

    #[test]
    fn short_buffers_are_told() {
        let product = Product { rows: 3, inputs: 5, outputs: 4 };
        assert!(product.check(20, 15, 12).is_ok());
        for (weight, x, y) in [(19, 15, 12), (20, 14, 12), (20, 15, 11)] {
            assert!(product.check(weight, x, y).is_err());
        }
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
