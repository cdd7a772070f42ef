//! The loop of an engine that keeps its KV cache in leank: `cargo run --release --example embed`.

use std::{num::NonZeroUsize, sync::Arc};

use leank_core::{
    Backend, Cache, CacheConfig, ChannelMask, Dtype, HostView, HostViewMut, Layer, ModelMask,
    ModelShape, Result, StepEntry, ViewShape, Windows,
};
use leank_cpu::{Cpu, Pool};

/// Stands for what the engine computes: K, V and q after RoPE.
fn activations(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((seed * 7919 + i * 104_729) % 2003) as f32 / 1000.0 - 1.0).collect()
}

fn main() -> Result<()> {
    // A mask comes from a file (`leank_core::files::read_mask`); here every head keeps every third channel.
    let shape = ModelShape::new(4, 8, 2, 64)?;
    let kept = ChannelMask::new(64, (0..64).step_by(3).collect())?;
    let heads = vec![kept; shape.layers * shape.kv_heads];
    let mask = ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads)?;
    let windows = Windows { sink: 32, recent: 128 };
    let config = CacheConfig { dtype: Dtype::Bf16, windows, ..CacheConfig::new(shape, mask)? };

    let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let mut cache = Cpu::with_executor(Arc::new(Pool::new(threads)?)).create(config)?;
    let sequence = cache.add_sequence();

    // The prompt, whose attention the engine computes itself, then tokens one by one.
    let mut output = vec![0.0; shape.query_heads * shape.head_dim];
    for (step, tokens) in [(0, 4000)].into_iter().chain((1..=100).map(|step| (step, 1))) {
        let attend = tokens == 1;
        cache.plan(&[StepEntry { sequence, tokens, attend }])?;
        let kv = ViewShape::contiguous(tokens, shape.kv_heads, shape.head_dim);
        let rows = ViewShape::contiguous(1, shape.query_heads, shape.head_dim);
        for layer in (0..shape.layers).map(Layer) {
            let k = activations(step + layer.0, tokens * shape.kv_heads * shape.head_dim);
            let v = activations(step + layer.0 + 50, k.len());
            cache.append(layer, HostView::new(&k[..], kv)?, HostView::new(&v[..], kv)?)?;
            if attend {
                let q = activations(step + layer.0 + 90, output.len());
                let out = HostViewMut::new(&mut output[..], rows)?;
                cache.attend(layer, HostView::new(&q[..], rows)?, out)?;
            }
        }
        cache.commit()?;
    }
    let memory = cache.memory();
    let ratio = memory.whole_kv_ratio().unwrap_or(1.0);
    println!(
        "{} tokens in {} bytes: {ratio:.3} of a dense cache",
        memory.tokens,
        memory.used_bytes()
    );
    println!("last output: {:?} …", &output[..4]);
    Ok(())
}
