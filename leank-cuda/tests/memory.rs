//! What a cache takes of the device's memory: alone in its process, so that nothing else gives or takes.

mod support;

use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, Dtype, ModelMask, ModelShape, Planner,
    StepEntry,
};

#[test]
fn memory_is_what_was_planned() {
    let Some(cuda) = support::cuda() else { return };
    let shape = ModelShape::new(32, 32, 8, 128).unwrap();
    // Blocks of two and a bit of the pages that the device hands out.
    let heads = (0..32 * 8).map(|head| match head % 8 {
        0 => ChannelMask::none(128),
        1..=5 => ChannelMask::new(128, (0..32).collect()).unwrap(),
        _ => ChannelMask::new(128, (0..64).collect()).unwrap(),
    });
    let mask = ModelMask::new(32, 8, 128, heads.collect()).unwrap();
    for (config, sequences) in
        [(CacheConfig::dense(shape).unwrap(), 1), (CacheConfig::new(shape, mask).unwrap(), 2)]
    {
        let config = CacheConfig { dtype: Dtype::Bf16, ..config };
        let planner = Planner::new(&config, cuda.layout_rules()).unwrap();
        let tokens = 64 << 10;
        let planned = planner.footprint(tokens).unwrap().bytes * sequences;
        // Kernels are loaded with the first cache of a kind.
        drop(cuda.create(config.clone()).unwrap());
        let context = cuda.stream().context();
        let (before, _) = context.mem_get_info().unwrap();
        let mut cache = cuda.create(config).unwrap();
        let entry = |_| StepEntry::store(cache.add_sequence(), tokens);
        let entries: Vec<_> = (0..sequences).map(entry).collect();
        cache.plan(&entries).unwrap();
        cuda.stream().synchronize().unwrap();
        let (after, _) = context.mem_get_info().unwrap();
        let taken = (before - after) as u64;
        let held = cache.memory().used_bytes() + cache.overhead_bytes();
        eprintln!("planned {planned}, held {held}, taken {taken} bytes");
        assert_eq!(cache.memory().used_bytes(), planned);
        // A slab that is not full, tables, whole pages.
        assert!(
            held.abs_diff(planned) < planned / 100 + (128 << 20),
            "held {held}, planned {planned}"
        );
        assert!(taken.abs_diff(held) < planned / 100, "taken {taken}, held {held}");
    }
}
