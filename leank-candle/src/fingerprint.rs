//! What tells one model from another.

use half::bf16;
use leank_core::{Fingerprint, Sliding};

use crate::config::ModelConfig;
use crate::weights::Weights;

/// The fingerprint of a model: its shape and RoPE in the open, the rest as a hash.
///
/// The hash covers the widths and all norm weights, rounded to bf16. Every format and quantization
/// keeps norms in full, so a mask learned from one file of a model fits its other files, and
/// fine-tuned siblings that changed a norm are told apart. Of a model with sliding layers the shape is
/// that of its global layers, which is what a mask covers.
pub(crate) fn of(config: &ModelConfig, weights: &Weights) -> Fingerprint {
    let mut bytes = Vec::new();
    for n in [config.hidden, config.intermediate] {
        bytes.extend((n as u64).to_le_bytes());
    }
    bytes.extend((config.rms_eps as f32).to_le_bytes());
    bytes.push(u8::from(config.qkv_bias));
    if let Some(sliding) = &config.sliding {
        bytes.extend((sliding.window as u64).to_le_bytes());
        bytes.extend(sliding.layers.iter().map(|&slides| u8::from(slides)));
        bytes.extend(sliding.rope_base.unwrap_or_default().to_le_bytes());
    }
    for x in weights.norms().flatten() {
        bytes.extend(bf16::from_f32(*x).to_le_bytes());
    }
    Fingerprint {
        architecture: config.family.architecture().to_owned(),
        // Without global layers there is no mask for this fingerprint to be compared with.
        shape: config.global_shape().unwrap_or(config.shape),
        rope_base: config.rope_base,
        rope_scaling: config.rope_scaling.describe(),
        config_hash: leank_core::files::sha256_hex(&bytes),
        sliding: config.sliding.as_ref().map(|sliding| Sliding {
            layers: config.shape.layers - config.global_layers().len(),
            window: sliding.window,
        }),
    }
}
