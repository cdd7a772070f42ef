//! The CPU backend as the conformance suite's subject.

use leank_core::{Cache, Dtype, Layer, Result};
use leank_cpu::{Cpu, CpuCache, Isa};
use leank_testkit::{Rows, Subject};

/// Seven suites share the time that one would take.
const CASES: u32 = 64;

pub(crate) struct OnCpu {
    pub(crate) cpu: Cpu,
    /// Random cases per property.
    pub(crate) cases: u32,
}

impl OnCpu {
    pub(crate) fn new(cpu: Cpu) -> Self {
        Self { cpu, cases: CASES }
    }
}

impl Subject for OnCpu {
    type Backend = Cpu;

    fn backend(&self) -> &Cpu {
        &self.cpu
    }

    fn append(&self, cache: &mut CpuCache, layer: Layer, k: &Rows, v: &Rows) -> Result<()> {
        cache.append(layer, k.view(), v.view())
    }

    fn attend(&self, cache: &mut CpuCache, layer: Layer, q: &Rows) -> Result<Rows> {
        let mut out = q.like(f32::NAN);
        cache.attend(layer, q.view(), out.view_mut())?;
        Ok(out)
    }

    fn cases(&self) -> u32 {
        self.cases
    }

    /// Queries and weights that are rounded to bf16 move logits of up to about 20 by some
    /// hundredths.
    fn arithmetic_error(&self, dtype: Dtype) -> f64 {
        let narrow = self.cpu.isa() == Isa::Avx512Bf16 && dtype == Dtype::Bf16;
        if narrow { 6e-2 } else { 2e-5 }
    }

    /// Queries and weights of 16 bits.
    fn coded_arithmetic_error(&self) -> f64 {
        if self.cpu.isa() == Isa::Avx512Bf16 { 5e-3 } else { 2e-5 }
    }
}
