//! The kernels: their sources, the constants they are compiled with, and the compiled ones.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::{
    driver::{CudaContext, CudaModule},
    nvrtc::Ptx,
};
use leank_core::{Dtype, Error, Result};

use crate::{
    compile::{self, Compiled},
    cubins::{self, CubinCache},
    driver::Kernel,
};

const COMMON: &str = include_str!("kernels/common.cuh");

/// Largest head_dim, in tiles of 16 channels: the sums of a query row lie in registers.
pub(crate) const MOST_TILES: usize = 16;

/// Multiply of sums in registers: tiles across head_dim times tiles of query rows.
const MOST_SUMS: usize = 16;

/// What attention over a cache is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    /// Tiles of 16 channels across head_dim.
    pub(crate) tiles: usize,
    /// Element type of the cache: f16 or bf16.
    pub(crate) dtype: Dtype,
    /// Whether lean blocks of some head hold codes.
    pub(crate) coded: bool,
    /// Whether logits have a soft-cap.
    pub(crate) soft_cap: bool,
}

impl Variant {
    /// Query rows of an item where a KV head has so many in a sequence's step: 8 or 16.
    pub(crate) fn rows(self, rows: usize) -> usize {
        if rows > 8 && 2 * self.tiles <= MOST_SUMS { 16 } else { 8 }
    }
}

/// What a device offers to kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Major and minor compute capability.
    pub(crate) capability: (i32, i32),
    /// Most bytes of shared memory of a thread block.
    pub(crate) shared: usize,
}

/// The rings of one thread block of `attend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rings {
    warps: usize,
    stages: usize,
    /// Shared memory of a thread block, in bytes.
    shared: usize,
}

impl Rings {
    /// As many warps with rings of three to eight slices as fit; of two where it must be. Codes take
    /// more instructions than memory takes time where there are few warps, so there it is more, as far
    /// as registers suffice.
    fn new(variant: Variant, rows: usize, limit: usize) -> Option<Self> {
        let slice = 2 * variant.tiles * crate::tiles::TILE_BYTES;
        let shared = |warps: usize, stages: usize| {
            let ring = warps * stages * slice;
            let sum_warps = if warps > 8 { warps / 2 } else { warps };
            let sums = sum_warps * 8 * (variant.tiles * 16 + 4) * 4;
            let queries = (rows * (variant.tiles * 16 + 2) + variant.tiles * 16) * 2;
            let queries = queries.next_multiple_of(16);
            let bytes = ring + sums.max(queries) + warps * 8 * 8 + warps * stages * 8;
            bytes.next_multiple_of(128)
        };
        let rings = |warps: usize, least: usize| {
            let stages = (least..=8).rev().find(|&stages| shared(warps, stages) <= limit)?;
            Some(Self { warps, stages, shared: shared(warps, stages) })
        };
        let many = variant.coded && rows == 8 && variant.tiles <= 8;
        let wanted = [(12, 2), (8, 3), (4, 3), (4, 2), (2, 2)].into_iter().skip(usize::from(!many));
        wanted.into_iter().find_map(|(warps, least)| rings(warps, least))
    }
}

/// One source and what it is compiled with.
#[derive(Clone, Debug)]
struct Unit {
    name: &'static str,
    source: String,
    options: Vec<String>,
}

impl Unit {
    fn new(name: &'static str, variant: Variant, target: Target, more: &[(&str, usize)]) -> Self {
        let body = match name {
            "attend.cu" => include_str!("kernels/attend.cu"),
            "blocks.cu" => include_str!("kernels/blocks.cu"),
            _ => include_str!("kernels/cut.cu"),
        };
        let (major, minor) = target.capability;
        let mut options = vec![
            format!("--gpu-architecture=sm_{major}{minor}"),
            "--std=c++17".to_owned(),
            "--ptxas-options=-v".to_owned(),
            format!("-DNV={}", variant.tiles),
            format!("-DBF16={}", u8::from(variant.dtype == Dtype::Bf16)),
            format!("-DCODED={}", u8::from(variant.coded)),
        ];
        options.extend(more.iter().map(|(name, value)| format!("-D{name}={value}")));
        Self { name, source: format!("{COMMON}\n{body}"), options }
    }

    fn compile(&self) -> Result<Compiled> {
        compile::compile(&self.source, self.name, &self.options)
    }
}

fn attend_unit(variant: Variant, rows: usize, target: Target) -> Result<(Unit, Rings)> {
    let rings = Rings::new(variant, rows, target.shared).ok_or_else(|| Error::Unavailable {
        what: "CUDA",
        why: format!(
            "head_dim {} needs more than the {} bytes of shared memory of this device",
            variant.tiles * 16,
            target.shared
        ),
    })?;
    let more = [
        ("CAP", usize::from(variant.soft_cap)),
        ("NT", rows / 8),
        ("WARPS", rings.warps),
        ("STAGES", rings.stages),
        ("SHARED_BYTES", rings.shared),
    ];
    Ok((Unit::new("attend.cu", variant, target, &more), rings))
}

/// The kernels of one variant on one device.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) append: Kernel,
    pub(crate) pack: Kernel,
    pub(crate) copy: Kernel,
    pub(crate) cut: Kernel,
    /// For items of 8 query rows, and of 16 where registers suffice; of 8 again where not.
    attend: [Kernel; 2],
}

impl Kernels {
    /// Attention for items of so many query rows, as [`Variant::rows`] says.
    pub(crate) fn attend(&self, rows: usize) -> &Kernel {
        &self.attend[usize::from(rows > 8)]
    }
}

/// Threads of `append`, of `pack` and `copy`, of `cut`; as in the sources.
const THREADS: (u32, u32, u32) = (128, 256, 1024);

/// Loads kernels, compiling those that no earlier run left on disk. Keeps what it has loaded.
#[derive(Debug)]
pub(crate) struct Loader {
    context: Arc<CudaContext>,
    target: Target,
    nvrtc: (i32, i32),
    pub(crate) cubins: CubinCache,
    loaded: Mutex<HashMap<Variant, Arc<Kernels>>>,
}

impl Loader {
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        target: Target,
        cubins: CubinCache,
    ) -> Result<Self> {
        let context = Arc::clone(context);
        let nvrtc = compile::nvrtc_version()?;
        Ok(Self { context, target, nvrtc, cubins, loaded: Mutex::default() })
    }

    fn module(&self, unit: &Unit) -> Result<Arc<CudaModule>> {
        let key = cubins::key(&unit.source, &unit.options, self.nvrtc);
        let failed = |error: cudarc::driver::DriverError| Error::Device {
            device: "CUDA".into(),
            action: "loading kernels",
            why: error.to_string(),
        };
        let load = |cubin: Vec<u8>| self.context.load_module(Ptx::from_binary(cubin));
        if let Some(cubin) = self.cubins.get(&key)
            && let Ok(module) = load(cubin)
        {
            return Ok(module);
        }
        let compiled = unit.compile()?;
        self.cubins.put(&key, &compiled.cubin);
        load(compiled.cubin).map_err(failed)
    }

    /// The kernels of a variant.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where they cannot be compiled, [`Error::Device`] where they cannot be
    /// loaded.
    pub(crate) fn kernels(&self, variant: Variant) -> Result<Arc<Kernels>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = loaded.get(&variant) {
            return Ok(Arc::clone(kernels));
        }
        let kernel = |module: &Arc<CudaModule>, name: &str, threads, shared| {
            let function = module.load_function(name);
            function.and_then(|function| Kernel::new(function, threads, shared)).map_err(|error| {
                let why = format!("{name}: {error}");
                Error::Device { device: "CUDA".into(), action: "loading a kernel", why }
            })
        };
        let blocks = self.module(&Unit::new("blocks.cu", variant, self.target, &[]))?;
        let cut = self.module(&Unit::new("cut.cu", variant, self.target, &[]))?;
        let attend = |rows| -> Result<Kernel> {
            let (unit, rings) = attend_unit(variant, rows, self.target)?;
            let threads = 32 * rings.warps as u32;
            let kernel = kernel(&self.module(&unit)?, "attend", threads, rings.shared)?;
            Ok(kernel.beginning_early(self.target.capability >= (9, 0)))
        };
        let eight = attend(8)?;
        let more = if variant.rows(16) == 16 { attend(16)? } else { eight.clone() };
        let kernels = Arc::new(Kernels {
            append: kernel(&blocks, "append", THREADS.0, 0)?,
            pack: kernel(&blocks, "pack", THREADS.1, 0)?,
            copy: kernel(&blocks, "copy", THREADS.1, 0)?,
            cut: kernel(&cut, "cut", THREADS.2, 0)?,
            attend: [eight, more],
        });
        loaded.insert(variant, Arc::clone(&kernels));
        Ok(kernels)
    }
}

/// What the compiler says of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelReport {
    /// Source, kernel, and the constants it was compiled with.
    pub name: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of registers that had to go to memory: stores and loads.
    pub spills: (u32, u32),
}

/// Compiles every kernel variant for a compute capability, which takes NVRTC and no GPU: what CI
/// does where there is none. head_dim 64, 96, 128 and 256, and one that needs padding; with codes beside
/// bf16 only.
///
/// # Errors
/// [`Error::Unavailable`] where NVRTC is missing, does not know the architecture, or does not like
/// a source.
pub fn compile_all(capability: (i32, i32)) -> Result<Vec<KernelReport>> {
    let shared = match capability {
        (8, 0 | 7) => 166_912,
        (8 | 12, _) => 101_376,
        _ => 232_448,
    };
    let target = Target { capability, shared };
    let mut reports = Vec::new();
    // Codes take seconds to compile, and hardly differ between types of full blocks.
    for (dtype, coded) in [(Dtype::F16, false), (Dtype::Bf16, false), (Dtype::Bf16, true)] {
        for head_dim in [20usize, 64, 96, 128, 256] {
            let soft_cap = head_dim == 256;
            let variant = Variant { tiles: head_dim.div_ceil(16), dtype, coded, soft_cap };
            let mut units = vec![
                Unit::new("blocks.cu", variant, target, &[]),
                Unit::new("cut.cu", variant, target, &[]),
            ];
            for rows in [8, 16] {
                if variant.rows(rows) == rows {
                    units.push(attend_unit(variant, rows, target)?.0);
                }
            }
            for unit in units {
                let constants: Vec<&str> =
                    unit.options.iter().filter_map(|option| option.strip_prefix("-D")).collect();
                let prefix = format!("{} {}", unit.name, constants.join(" "));
                reports.extend(read_log(&prefix, &unit.compile()?.log));
            }
        }
    }
    Ok(reports)
}

/// The assembler's account of the kernels of one source.
fn read_log(prefix: &str, log: &str) -> Vec<KernelReport> {
    let number_before = |line: &str, what: &str| -> u32 {
        let before = line.split(what).next().unwrap_or_default();
        before.split_whitespace().last().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    let mut reports: Vec<KernelReport> = Vec::new();
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let name = line.split('\'').nth(1).unwrap_or_default();
            let name = format!("{prefix}: {name}");
            reports.push(KernelReport { name, registers: 0, spills: (0, 0) });
        }
        let Some(report) = reports.last_mut() else { continue };
        if line.contains("spill stores") {
            report.spills.0 += number_before(line, " bytes spill stores");
            report.spills.1 += number_before(line, " bytes spill loads");
        }
        if line.contains("Used ") {
            report.registers = number_before(line, " registers");
        }
    }
    reports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_fit_where_they_must() {
        for shared in [101_376, 166_912, 232_448] {
            for tiles in 1..=MOST_TILES {
                let variant = Variant { tiles, dtype: Dtype::F16, coded: false, soft_cap: false };
                let rings = Rings::new(variant, variant.rows(99), shared).unwrap();
                assert!(rings.shared <= shared && rings.stages >= 2, "{rings:?}");
            }
        }
        for (coded, expected) in [(false, (8, 3)), (true, (12, 2))] {
            let variant = Variant { tiles: 8, dtype: Dtype::F16, coded, soft_cap: false };
            let hopper = Rings::new(variant, 8, 232_448).unwrap();
            assert_eq!((hopper.warps, hopper.stages), expected);
        }
    }

    #[test]
    fn a_log_is_read() {
        let log = "\
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function 'copy' for 'sm_90'
ptxas info    : Function properties for copy
ptxas         .     40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 40 bytes cumulative stack size
ptxas info    : Compiling entry function 'append' for 'sm_90'
ptxas         .     8 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 8704 bytes smem";
        let report = |name: &str, registers, spills| KernelReport {
            name: format!("x: {name}"),
            registers,
            spills,
        };
        let expected = [report("copy", 26, (0, 0)), report("append", 32, (24, 28))];
        assert_eq!(read_log("x", log), expected);
    }
}
