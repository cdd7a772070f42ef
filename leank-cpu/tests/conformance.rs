//! The conformance suite on every executor.

use leank_core::{Cache, Layer, Result};
use leank_cpu::{Cpu, CpuCache, Executor};
use leank_testkit::{Rows, Subject};

struct OnCpu(Cpu);

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
}

mod serial {
    use super::*;
    leank_testkit::conformance!(OnCpu(Cpu::with_executor(Executor::Serial)));
}

#[cfg(feature = "rayon")]
mod rayon {
    use super::*;
    leank_testkit::conformance!(OnCpu(Cpu::with_executor(Executor::Rayon)));
}
