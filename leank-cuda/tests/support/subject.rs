//! The CUDA backend as the conformance suite's subject.

use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::CudaSlice;
use half::{bf16, f16};
use leank_core::{Cache, Dtype, Layer, Result, quant::INT4_GROUP};
use leank_cuda::{Cuda, CudaCache, DeviceView, DeviceViewMut};
use leank_testkit::{Rows, Subject};

/// Hands rows over as f32 and as the cache's own type in turn: they are rounded to it in any case.
pub(crate) struct OnCuda {
    cuda: &'static Cuda,
    uploads: AtomicUsize,
    /// Random cases per property.
    pub(crate) cases: u32,
}

/// Rows on the device.
enum Uploaded {
    F32(CudaSlice<f32>),
    F16(CudaSlice<f16>),
    Bf16(CudaSlice<bf16>),
}

impl OnCuda {
    pub(crate) fn new(cuda: &'static Cuda) -> Self {
        Self { cuda, uploads: AtomicUsize::new(0), cases: 192 }
    }

    fn upload(&self, cache: &CudaCache, rows: &Rows) -> Uploaded {
        let stream = self.cuda.stream();
        let own = self.uploads.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        let data = rows.data.iter();
        match cache.config().dtype {
            Dtype::F16 if own => {
                let data: Vec<f16> = data.map(|&x| f16::from_f32(x)).collect();
                Uploaded::F16(stream.clone_htod(&data).expect("it fits"))
            }
            Dtype::Bf16 if own => {
                let data: Vec<bf16> = data.map(|&x| bf16::from_f32(x)).collect();
                Uploaded::Bf16(stream.clone_htod(&data).expect("it fits"))
            }
            _ => Uploaded::F32(stream.clone_htod(&rows.data).expect("it fits")),
        }
    }
}

impl Uploaded {
    fn view(&self, rows: &Rows) -> DeviceView<'_> {
        match self {
            Self::F32(data) => DeviceView::new(data, rows.shape()),
            Self::F16(data) => DeviceView::new(data, rows.shape()),
            Self::Bf16(data) => DeviceView::new(data, rows.shape()),
        }
        .expect("rows fit their own shape")
    }
}

impl Subject for OnCuda {
    type Backend = Cuda;

    fn backend(&self) -> &Cuda {
        self.cuda
    }

    fn cases(&self) -> u32 {
        self.cases
    }

    fn append(&self, cache: &mut CudaCache, layer: Layer, k: &Rows, v: &Rows) -> Result<()> {
        let (k_data, v_data) = (self.upload(cache, k), self.upload(cache, v));
        cache.append(layer, k_data.view(k), v_data.view(v))
    }

    fn attend(&self, cache: &mut CudaCache, layer: Layer, q: &Rows) -> Result<Rows> {
        let q_data = self.upload(cache, q);
        let stream = self.cuda.stream();
        let mut out = q.like(f32::NAN);
        let mut out_data = stream.clone_htod(&out.data).expect("it fits");
        let out_view = DeviceViewMut::new(&mut out_data, q.shape())?;
        cache.attend(layer, q_data.view(q), out_view)?;
        out.data = stream.clone_dtoh(&out_data).expect("the device works");
        Ok(out)
    }

    fn dtypes(&self) -> &[Dtype] {
        &[Dtype::F16, Dtype::Bf16]
    }

    /// Where the work is cut depends on the whole step.
    fn rounds_alike_in_any_batch(&self) -> bool {
        false
    }

    /// Queries and weights are rounded to the cache's type, which moves logits of up to about 20.
    fn arithmetic_error(&self, dtype: Dtype) -> f64 {
        match dtype {
            Dtype::Bf16 => 6e-2,
            _ => 8e-3,
        }
    }

    /// Weights and their products with steps are rounded to bf16, whatever full blocks are.
    fn coded_arithmetic_error(&self) -> f64 {
        3e-2
    }

    /// Zeros of two groups are multiplied at once, and 0 · NaN is NaN.
    fn spoiled_channels(&self) -> usize {
        2 * INT4_GROUP
    }
}
