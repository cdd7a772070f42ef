//! What tells one model from another.

use half::bf16;
use leank_core::Fingerprint;

use crate::config::ModelConfig;
use crate::weights::Weights;

/// The fingerprint of a model: its shape and RoPE in the open, the rest as a hash.
///
/// The hash covers the widths and all norm weights, rounded to bf16. Every format and quantization
/// keeps norms in full, so a mask learned from one file of a model fits its other files, and
/// fine-tuned siblings of the same shape are told apart.
pub(crate) fn of(config: &ModelConfig, weights: &Weights) -> Fingerprint {
    let mut bytes = Vec::new();
    for n in [config.hidden, config.intermediate] {
        bytes.extend((n as u64).to_le_bytes());
    }
    bytes.extend((config.rms_eps as f32).to_le_bytes());
    bytes.push(u8::from(config.qkv_bias));
    for x in weights.norms().flatten() {
        bytes.extend(bf16::from_f32(*x).to_le_bytes());
    }
    Fingerprint {
        architecture: config.family.name().to_owned(),
        shape: config.shape,
        rope_base: config.rope_base,
        rope_scaling: config.rope_scaling.describe(),
        config_hash: leank_core::files::sha256_hex(&bytes),
    }
}
