//! The conformance suite: every kernel that was compiled and this CPU can run, and every executor.

mod support;

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use leank_cpu::{Cpu, Executor, Isa, Pool, Prefetch, Serial};
use support::OnCpu;

/// The suite on one instruction set; says so where this CPU lacks it.
macro_rules! kernel {
    ($module:ident, $isa:expr) => {
        mod $module {
            use super::*;

            fn if_available(property: impl Fn(&OnCpu)) {
                match Cpu::with_executor(Arc::new(Serial)).with_isa($isa) {
                    Ok(cpu) => property(&OnCpu::new(cpu)),
                    Err(error) => eprintln!("SKIPPED: {error}"),
                }
            }

            leank_testkit::conformance!(with if_available);
        }
    };
}

kernel!(portable, Isa::Portable);
#[cfg(target_arch = "x86_64")]
kernel!(avx2, Isa::Avx2);
#[cfg(target_arch = "x86_64")]
kernel!(avx512, Isa::Avx512);
#[cfg(target_arch = "x86_64")]
kernel!(avx512_bf16, Isa::Avx512Bf16);
#[cfg(target_arch = "aarch64")]
kernel!(neon, Isa::Neon);

/// Runs the last piece first.
#[derive(Debug)]
struct Backwards;

impl Executor for Backwards {
    fn threads(&self) -> usize {
        7
    }

    fn run(&self, count: usize, piece: &(dyn Fn(usize) + Sync)) {
        (0..count).rev().for_each(piece);
    }
}

mod backwards {
    use super::*;
    pub(super) fn cpu() -> Cpu {
        Cpu::with_executor(Arc::new(Backwards)).with_prefetch(Prefetch::Everything)
    }

    leank_testkit::conformance!(OnCpu::new(cpu()));
}

mod pool {
    use super::*;

    pub(super) fn cpu() -> Cpu {
        let threads = NonZeroUsize::new(3).expect("3");
        let pool = Pool::with_spin(threads, Duration::from_micros(20)).expect("three threads");
        Cpu::with_executor(Arc::new(pool)).with_prefetch(Prefetch::Jumps)
    }

    leank_testkit::conformance!(OnCpu::new(cpu()));
}

#[cfg(feature = "rayon")]
mod rayon {
    use super::*;
    leank_testkit::conformance!(OnCpu::new(Cpu::with_executor(Arc::new(leank_cpu::Rayon))));
}

/// How many threads share the work, and in which order, does not show in a bit.
#[test]
fn executors_are_twins() {
    let serial = OnCpu::new(Cpu::with_executor(Arc::new(Serial)));
    leank_testkit::twins_agree(&serial, &OnCpu::new(backwards::cpu()));
    leank_testkit::twins_agree(&serial, &OnCpu::new(pool::cpu()));
}
