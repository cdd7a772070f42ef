//! The backends under test, with the bounds of docs/guarantees.md.

use leank_core::{Cache as _, Dtype, Error, Layer, Result};
use leank_cpu::{Cpu, CpuCache, Isa};
use leank_cuda::{
    Cuda, CudaCache, DeviceView, DeviceViewMut,
    cudarc::driver::{CudaSlice, DriverError},
};
use leank_testkit::{Rows, Subject};

/// The CPU backend.
pub(super) struct OnCpu(pub(super) Cpu);

impl Subject for OnCpu {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.0
    }

    fn append(&self, cache: &mut CpuCache, layer: Layer, k: &Rows, v: &Rows) -> Result<()> {
        cache.append(layer, k.view(), v.view())
    }

    fn attend(&self, cache: &mut CpuCache, layer: Layer, q: &Rows) -> Result<Rows> {
        let mut out = q.like(f32::NAN);
        cache.attend(layer, q.view(), out.view_mut())?;
        Ok(out)
    }

    fn arithmetic_error(&self, dtype: Dtype) -> f64 {
        let narrow = self.0.isa() == Isa::Avx512Bf16 && dtype == Dtype::Bf16;
        if narrow { 6e-2 } else { 2e-5 }
    }

    fn coded_arithmetic_error(&self) -> f64 {
        if self.0.isa() == Isa::Avx512Bf16 { 5e-3 } else { 2e-5 }
    }
}

/// The CUDA backend.
pub(super) struct OnCuda<'a>(pub(super) &'a Cuda);

impl OnCuda<'_> {
    fn upload(&self, rows: &Rows) -> Result<CudaSlice<f32>> {
        self.0.stream().clone_htod(&rows.data).map_err(|error| self.failed("copying to it", error))
    }

    fn failed(&self, action: &'static str, error: DriverError) -> Error {
        Error::Device { device: self.0.device().to_string(), action, why: error.to_string() }
    }
}

impl Subject for OnCuda<'_> {
    type Backend = Cuda;

    fn backend(&self) -> &Cuda {
        self.0
    }

    fn append(&self, cache: &mut CudaCache, layer: Layer, k: &Rows, v: &Rows) -> Result<()> {
        let (k_data, v_data) = (self.upload(k)?, self.upload(v)?);
        let k = DeviceView::new(&k_data, k.shape())?;
        cache.append(layer, k, DeviceView::new(&v_data, v.shape())?)
    }

    fn attend(&self, cache: &mut CudaCache, layer: Layer, q: &Rows) -> Result<Rows> {
        let mut out = q.like(f32::NAN);
        let (q_data, mut out_data) = (self.upload(q)?, self.upload(&out)?);
        let q = DeviceView::new(&q_data, q.shape())?;
        cache.attend(layer, q, DeviceViewMut::new(&mut out_data, out.shape())?)?;
        let copied = self.0.stream().memcpy_dtoh(&out_data, &mut out.data);
        copied.map_err(|error| self.failed("copying from it", error))?;
        Ok(out)
    }

    fn arithmetic_error(&self, dtype: Dtype) -> f64 {
        if dtype == Dtype::Bf16 { 6e-2 } else { 8e-3 }
    }

    fn coded_arithmetic_error(&self) -> f64 {
        3e-2
    }
}
