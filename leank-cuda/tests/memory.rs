//! What a cache takes of the device's memory: alone in its process, so that nothing else gives or takes.

mod support;

use leank_core::{Backend as _, Cache as _, CacheConfig, Dtype, ModelShape, Planner, StepEntry};

#[test]
fn memory_is_what_was_planned() {
    let Some(cuda) = support::cuda() else { return };
    let shape = ModelShape::new(8, 32, 8, 128).unwrap();
    let config = CacheConfig { dtype: Dtype::Bf16, ..CacheConfig::dense(shape).unwrap() };
    let planner = Planner::new(&config, cuda.layout_rules()).unwrap();
    let tokens = 128 << 10;
    let planned = planner.footprint(tokens).unwrap().bytes;
    // Kernels are loaded with the first cache of a kind.
    drop(cuda.create(config.clone()).unwrap());
    let context = cuda.stream().context();
    let (before, _) = context.mem_get_info().unwrap();
    let mut cache = cuda.create(config).unwrap();
    let id = cache.add_sequence();
    cache.plan(&[StepEntry::store(id, tokens)]).unwrap();
    cuda.stream().synchronize().unwrap();
    let (after, _) = context.mem_get_info().unwrap();
    let taken = (before - after) as u64;
    let held = cache.memory().used_bytes() + cache.overhead_bytes();
    eprintln!("planned {planned}, held {held}, taken {taken} bytes");
    assert_eq!(cache.memory().used_bytes(), planned);
    // A slab that is not full, tables, whole pages.
    let slack = planned / 100 + (64 << 20);
    assert!(held.abs_diff(planned) < slack, "held {held}, planned {planned}");
    assert!(taken.abs_diff(held) < slack, "taken {taken}, held {held}");
}
