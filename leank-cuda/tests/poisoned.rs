//! A device that fails: alone in its process, whose context it takes along.

mod support;

use leank_core::{
    Backend as _, Cache as _, CacheConfig, Dtype, Error, Layer, ModelShape, StepEntry, ViewShape,
};
use leank_cuda::DeviceView;

#[test]
fn a_failed_launch_poisons_the_cache() {
    let Some(cuda) = support::cuda() else { return };
    let shape = ModelShape::new(1, 2, 2, 64).unwrap();
    let mut cache = cuda.create(CacheConfig::dense(shape).unwrap()).unwrap();
    let id = cache.add_sequence();
    cache.plan(&[StepEntry::decode(id, 1)]).unwrap();
    let rows = ViewShape::contiguous(1, 2, 64);
    // SAFETY: it is not: there is no memory at this address, which the device will find out. What
    // it finds is only read.
    let nowhere = unsafe { DeviceView::from_address(1 << 12, Dtype::F16, rows) };
    cache.append(Layer(0), nowhere, nowhere).unwrap();
    assert!(cuda.stream().synchronize().is_err());
    let error = cache.commit().and_then(|()| cache.plan(&[StepEntry::decode(id, 1)])).unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{error}");
    let error = cache.plan(&[StepEntry::decode(id, 1)]).unwrap_err();
    assert!(matches!(error, Error::Poisoned { .. }), "{error}");
    assert!(error.to_string().contains("make another one"), "{error}");
}
