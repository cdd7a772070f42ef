//! Calls of the driver that fail when a test asks for it, and what becomes of the cache. The tests need a
//! device; where there is none they are skipped, loudly.

use std::cell::Cell;

use cudarc::driver::{DriverError, sys::CUresult};
use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, Error, Layer, ModelMask, ModelShape,
    Result, SequenceId, StepEntry, ViewShape, Windows,
};

use crate::{Cuda, CudaCache, DeviceView, DeviceViewMut, driver::Driver};

#[path = "../tests/support/subject.rs"]
mod subject;
#[path = "../tests/support/mod.rs"]
mod support;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// Taking memory, on the device or pinned.
    Allocate,
    /// A copy or a fill.
    Copy,
    Launch,
}

thread_local! {
    /// The calls of a kind that succeed before one fails, and how.
    static NEXT: Cell<Option<(Call, usize, CUresult)>> = const { Cell::new(None) };
}

/// Makes the call of a kind after the next `after` of this thread fail, once.
fn inject(call: Call, after: usize, error: CUresult) {
    NEXT.set(Some((call, after, error)));
}

/// The driver is about to be called.
pub(crate) fn pass(call: Call) -> Driver<()> {
    match NEXT.get() {
        Some((kind, 0, error)) if kind == call => {
            NEXT.set(None);
            Err(DriverError(error))
        }
        Some((kind, after, error)) if kind == call => {
            NEXT.set(Some((kind, after - 1, error)));
            Ok(())
        }
        _ => Ok(()),
    }
}

#[test]
fn a_fault_comes_once_and_in_its_turn() {
    inject(Call::Copy, 1, CUresult::CUDA_ERROR_UNKNOWN);
    let passed = [Call::Copy, Call::Launch, Call::Copy, Call::Copy].map(|call| pass(call).is_ok());
    assert_eq!(passed, [true, true, false, true]);
}

#[test]
fn refused_memory_changes_nothing() {
    let Some(cuda) = support::cuda() else { return };
    let refuse = |after| inject(Call::Allocate, after, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    // A life is lived as often as it asks for memory.
    let mut subject = subject::OnCuda::new(cuda);
    subject.cases = 8;
    leank_testkit::refused_memory_changes_nothing(&subject, refuse);
}

/// Something of everything: a prompt, a fork, decoding beyond it, so that blocks are copied and packed, and
/// a sequence that is saved and restored.
fn live(cuda: &Cuda, cache: &mut CudaCache) -> Result<()> {
    let id = cache.add_sequence();
    step(cuda, cache, StepEntry::store(id, 300))?;
    let fork = cache.fork(id)?;
    for _ in 0..40 {
        step(cuda, cache, StepEntry::decode(id, 3))?;
        step(cuda, cache, StepEntry::decode(fork, 1))?;
    }
    let mut saved = Vec::new();
    cache.save(id, &mut saved)?;
    cache.release(id)?;
    let back = cache.restore(&mut &saved[..])?;
    step(cuda, cache, StepEntry::decode(back, 1))
}

fn step(cuda: &Cuda, cache: &mut CudaCache, entry: StepEntry) -> Result<()> {
    let ModelShape { query_heads, kv_heads, head_dim, .. } = cache.config().shape;
    let rows = |heads| ViewShape::contiguous(entry.tokens, heads, head_dim);
    let ones = |heads: usize| {
        let ones = vec![half::f16::ONE; entry.tokens * heads * head_dim];
        cuda.stream().clone_htod(&ones).unwrap()
    };
    let (kv, q, mut out) = (ones(kv_heads), ones(query_heads), ones(query_heads));
    cache.plan(&[entry])?;
    let view = DeviceView::new(&kv, rows(kv_heads))?;
    cache.append(Layer(0), view, view)?;
    let out = DeviceViewMut::new(&mut out, rows(query_heads))?;
    cache.attend(Layer(0), DeviceView::new(&q, rows(query_heads))?, out)?;
    cache.commit()
}

/// Every launch, copy and allocation in turn: the call says that the device failed, every later one that the
/// cache is poisoned; it can still be asked, emptied and dropped, and another one works.
#[test]
fn a_failed_device_poisons_the_cache() {
    let Some(cuda) = support::cuda() else { return };
    let shape = ModelShape::new(1, 4, 2, 64).unwrap();
    let some = ChannelMask::new(64, (0..32).collect()).unwrap();
    let mask = ModelMask::new(1, 2, 64, vec![some, ChannelMask::none(64)]).unwrap();
    let config = CacheConfig {
        windows: Windows { sink: 64, recent: 100 },
        dtype: Dtype::F16,
        ..CacheConfig::new(shape, mask).unwrap()
    };
    for call in [Call::Launch, Call::Copy, Call::Allocate] {
        let mut faults = 0;
        for after in 0.. {
            let mut cache = cuda.create(config.clone()).unwrap();
            inject(call, after, CUresult::CUDA_ERROR_LAUNCH_FAILED);
            let lived = live(cuda, &mut cache);
            let left = NEXT.take();
            let Err(error) = lived else {
                assert!(left.is_some(), "{call:?} {after}: the fault went unnoticed");
                break;
            };
            faults += 1;
            assert!(matches!(error, Error::Device { .. }), "{call:?} {after}: {error}");
            cache.cancel();
            let id = cache.add_sequence();
            for later in [
                cache.plan(&[StepEntry::decode(id, 1)]),
                cache.fork(id).map(drop),
                cache.truncate(id, 0),
                cache.save(id, &mut Vec::new()),
                cache.restore(&mut &[][..]).map(drop),
            ] {
                let error = later.unwrap_err();
                assert!(matches!(error, Error::Poisoned { .. }), "{call:?} {after}: {error}");
            }
            (0..=id.0).map(SequenceId).for_each(|id| drop(cache.release(id)));
            assert_eq!(cache.memory().used_bytes(), 0, "{call:?} {after}");
        }
        assert!(faults > 0, "nothing failed");
    }
    live(cuda, &mut cuda.create(config).unwrap()).unwrap();
}
