//! An existing candle model made lean: `dense.rs` is a Llama on candle with candle's own KV cache, `lean.rs` the
//! same with leank's. `diff` of the two is what an engine changes; it is under 100 lines.
//!
//!     cargo run --release -p leank --features candle --example candle_llama
//!
//! Both decode the same tokens of the demonstration model (`leank/demo`) behind a long prompt: with a mask that keeps
//! everything the logits are the same, with the learned one nearly so, from half of the bytes.

mod dense;
mod lean;

use std::{error::Error, path::Path, time::Instant};

use leank::{
    ModelMask,
    candle::{LoadOptions, Model},
    files::read_mask,
};

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let (prompt, decoded) = (1000, 24);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let learned = read_mask(&demo.join("mask.safetensors"), &Default::default())?;
    let text = std::fs::read_to_string(demo.join("measure.txt"))?;
    // Only its tokenizer and its shape.
    let model = Model::load(&demo.join("model"), LoadOptions::default())?;
    let tokens = model.tokenizer().encode(&text)?;
    let everything = ModelMask::dense(&model.config().global_shape()?);

    let mut own = dense::Llama::load(&demo.join("model"))?;
    let mut same = lean::Llama::load(&demo.join("model"), everything)?;
    let mut lean = lean::Llama::load(&demo.join("model"), learned)?;
    own.forward(&tokens[..prompt])?;
    same.forward(&tokens[..prompt])?;
    lean.forward(&tokens[..prompt])?;
    let (mut apart, mut kl, mut seconds) = (0.0f32, 0.0, [0.0; 3]);
    for token in tokens[prompt..prompt + decoded].chunks(1) {
        let (expected, found, lean) = (
            timed(&mut seconds[0], || own.forward(token))?,
            timed(&mut seconds[1], || same.forward(token))?,
            timed(&mut seconds[2], || lean.forward(token))?,
        );
        apart = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(apart, f32::max);
        kl += divergence(&expected, &lean) / decoded as f64;
    }
    let (bytes, dense) = lean.bytes();
    println!("a mask that keeps everything: logits differ by {apart:.1e} at most");
    println!("the learned mask: KL {kl:.4}, {bytes} bytes of cache in place of {dense}");
    let speed = seconds.map(|seconds| decoded as f64 / seconds);
    println!(
        "tokens/s: candle's cache {:.0}, ours {:.0}, lean {:.0}",
        speed[0], speed[1], speed[2]
    );
    // The cache stores bf16.
    if apart > 0.1 || kl > 0.05 || bytes > dense * 3 / 4 {
        return Err("that is not what the lean model should do".into());
    }
    Ok(())
}

fn timed<T>(seconds: &mut f64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    *seconds += start.elapsed().as_secs_f64();
    done
}

/// KL of two distributions, given as logits, in nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let normal = |x: &[f32]| {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = x.iter().map(|x| f64::from(x - most).exp()).sum();
        x.iter().map(|x| f64::from(x - most) - sum.ln()).collect::<Vec<_>>()
    };
    normal(p).iter().zip(normal(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}
