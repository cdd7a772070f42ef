//! What a model is: the numbers of its configuration, whichever file they came from.

use leank_core::ModelShape;

use crate::{Error, Result};

/// Most layers of a model. The backward pass of the Fisher probe calls itself twice a layer: so many fit
/// into a thread's stack, ten times as many do not. Models of today have 126.
pub(crate) const MAX_LAYERS: usize = 1 << 10;

/// A family of models: the same forward pass with other details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3, SmolLM and their kin: no biases.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3 (dense): RMS norms on every head of q and k, no biases.
    Qwen3,
    /// Mistral: as Llama, but all layers may slide. GGUF files call it `llama`.
    Mistral,
    /// Gemma 3: norms around attention and MLP and on q and k, GeGLU, and sliding layers with a RoPE
    /// base of their own.
    Gemma3,
}

/// The families by name, for messages.
pub(crate) const FAMILIES: &str = "llama, mistral, qwen2, qwen3, gemma3";

impl Family {
    /// The family of a GGUF `general.architecture` or of a `model_type` in `config.json`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "llama" => Some(Self::Llama),
            "qwen2" => Some(Self::Qwen2),
            "qwen3" => Some(Self::Qwen3),
            "mistral" => Some(Self::Mistral),
            "gemma3" | "gemma3_text" => Some(Self::Gemma3),
            _ => None,
        }
    }

    /// The name, as GGUF files and `config.json` spell it (Gemma 3's text model in `config.json`:
    /// `gemma3_text`).
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Mistral => "mistral",
            Self::Gemma3 => "gemma3",
        }
    }

    /// The architecture in GGUF files: one name for models with the same forward pass.
    pub(crate) fn architecture(self) -> &'static str {
        match self {
            Self::Mistral => "llama",
            other => other.name(),
        }
    }

    /// Whether every head of q and k passes an RMS norm before RoPE.
    pub(crate) fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    /// Whether the outputs of attention and MLP pass a norm before they are added.
    pub(crate) fn has_post_norms(self) -> bool {
        self == Self::Gemma3
    }
}

/// Layers that attend to the last tokens only.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SlidingLayers {
    /// Tokens that a query of such a layer sees, itself included.
    pub window: usize,
    /// For every layer of the model, whether it slides; the others are *global*.
    pub layers: Vec<bool>,
    /// RoPE base of these layers where they have their own, without scaling (Gemma 3).
    pub rope_base: Option<f64>,
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

/// Configuration of a model.
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
    /// The layers that slide, where some do.
    pub sliding: Option<SlidingLayers>,
    /// The model's attention scale times √head_dim; 1 in most models. It is folded into the norm of
    /// q, so that whatever attends scales by 1/√head_dim.
    pub query_scale: f64,
}

impl ModelConfig {
    /// The attention shape.
    #[must_use]
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// How many tokens a layer sees, itself included; `None` for a global layer.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        let sliding = self.sliding.as_ref()?;
        sliding.layers.get(layer).is_some_and(|&slides| slides).then_some(sliding.window)
    }

    /// Windows of all layers, as [`ModelConfig::window`].
    #[must_use]
    pub fn windows(&self) -> Vec<Option<usize>> {
        (0..self.shape.layers).map(|layer| self.window(layer)).collect()
    }

    /// The global layers, ascending: those that a lean cache, a dump and a mask hold. Layer `i` of a
    /// mask is the `i`-th of them.
    #[must_use]
    pub fn global_layers(&self) -> Vec<usize> {
        (0..self.shape.layers).filter(|&layer| self.window(layer).is_none()).collect()
    }

    /// The attention shape of the global layers: the shape of a lean cache, a dump and a mask.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when all layers slide, which leaves nothing to a lean cache.
    pub fn global_shape(&self) -> Result<ModelShape> {
        match self.global_layers().len() {
            0 => Err(Error::mismatch(
                "model",
                "global layers, whose cache grows with the context",
                "sliding layers only: a lean cache would have nothing to prune",
            )),
            layers => Ok(ModelShape { layers, ..self.shape }),
        }
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
        if self.shape.layers > MAX_LAYERS {
            return wrong("layers", "1..=1024", self.shape.layers.to_string());
        }
        for (key, n) in [
            ("hidden size", self.hidden),
            ("intermediate size", self.intermediate),
            ("vocabulary", self.vocab),
            ("context length", self.context_length),
            // One that sees something, where no layer slides.
            ("sliding window", self.sliding.as_ref().map_or(1, |sliding| sliding.window)),
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
        if let Some(sliding) = &self.sliding {
            if sliding.layers.len() != self.shape.layers {
                let found = sliding.layers.len().to_string();
                return wrong("kinds of layers", "one per layer", found);
            }
            if let Some(base) = sliding.rope_base.filter(|&base| !positive(base)) {
                return wrong("RoPE base of sliding layers", "a positive number", base.to_string());
            }
        }
        if !positive(self.query_scale) {
            let found = self.query_scale.to_string();
            return wrong("attention scale", "a positive number", found);
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
