//! What a model is: the numbers of its configuration, whichever file they came from.

use leank_core::ModelShape;

use crate::{Error, Result};

/// A family of models: the same forward pass with other details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3, SmolLM and their kin: no biases.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
}

/// The families by name, for messages.
pub(crate) const FAMILIES: &str = "llama, qwen2";

impl Family {
    /// The family of a GGUF `general.architecture` or of a `model_type` in `config.json`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "llama" => Some(Self::Llama),
            "qwen2" => Some(Self::Qwen2),
            _ => None,
        }
    }

    /// The name, as GGUF and `config.json` spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }
}

/// How RoPE frequencies are changed to reach longer contexts than the model was trained on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by a factor, a smooth ramp between.
    Llama3 {
        /// The factor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low frequencies.
        low: f64,
        /// Wavelengths below `original / high` are untouched.
        high: f64,
        /// Context length of the training.
        original: f64,
    },
    /// YaRN: low frequencies divided by a factor, a ramp over pairs, and warmer logits.
    Yarn {
        /// The factor of the low frequencies.
        factor: f64,
        /// Context length of the training.
        original: f64,
    },
    /// A divisor per pair of channels, as GGUF files of Llama 3.1 store it (`rope_freqs.weight`).
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// In words, for a fingerprint; [`None`] when there is no scaling.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Linear { factor } => Some(format!("linear {factor}")),
            // A GGUF file holds llama3's divisors and not its parameters, so both get one name.
            Self::Llama3 { .. } | Self::Divisors(_) => Some("llama3".to_owned()),
            Self::Yarn { factor, original } => Some(format!("yarn {factor} from {original}")),
        }
    }
}

/// Configuration of a model of the Llama or Qwen2 family.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Name of the model, for people.
    pub name: String,
    /// Family.
    pub family: Family,
    /// Layers, heads and `head_dim`.
    pub shape: ModelShape,
    /// Width of the hidden state.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// RoPE base (theta).
    pub rope_base: f64,
    /// RoPE scaling.
    pub rope_scaling: RopeScaling,
    /// Added to the mean square in RMS norms.
    pub rms_eps: f64,
    /// Longest context, in tokens.
    pub context_length: usize,
    /// Whether the output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
}

impl ModelConfig {
    /// The attention shape.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Channels of all query heads of a layer.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.shape.query_heads * self.shape.head_dim
    }

    /// Channels of all KV heads of a layer.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Checks numbers that came from a file.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Core`] for numbers that no model has.
    pub(crate) fn validate(&self, path: &std::path::Path) -> Result<()> {
        self.shape.validate()?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let wrong = |key: &str, expected: &str, found: String| {
            Err(Error::Config {
                path: path.to_owned(),
                key: key.to_owned(),
                expected: expected.to_owned(),
                found,
            })
        };
        for (key, n) in [
            ("hidden size", self.hidden),
            ("intermediate size", self.intermediate),
            ("vocabulary", self.vocab),
            ("context length", self.context_length),
        ] {
            // Far above every real model: a hostile header must not reach an allocation.
            if n == 0 || n > 1 << 28 {
                return wrong(key, "1..=268435456", n.to_string());
            }
        }
        if !self.shape.head_dim.is_multiple_of(2) {
            return wrong("head_dim", "an even number", self.shape.head_dim.to_string());
        }
        if !positive(self.rope_base) {
            return wrong("RoPE base", "a positive number", self.rope_base.to_string());
        }
        if !self.rms_eps.is_finite() || self.rms_eps < 0.0 {
            return wrong("RMS norm epsilon", "a small positive number", self.rms_eps.to_string());
        }
        let scaling_ok = match &self.rope_scaling {
            RopeScaling::None => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 { factor, low, high, original } => {
                [*factor, *low, *high, *original].into_iter().all(positive) && high > low
            }
            RopeScaling::Yarn { factor, original } => positive(*factor) && positive(*original),
            RopeScaling::Divisors(divisors) => {
                divisors.len() == self.shape.head_dim / 2
                    && divisors.iter().all(|&d| positive(f64::from(d)))
            }
        };
        if !scaling_ok {
            let found = format!("{:?}", self.rope_scaling);
            return wrong("RoPE scaling", "positive numbers, one divisor per pair", found);
        }
        Ok(())
    }
}
