//! Models of the Llama and Qwen2 families on candle, with the attention left to the caller.
#![deny(unsafe_code)]

mod attention;
mod config;
mod dense;
mod error;
mod fingerprint;
#[allow(unsafe_code)] // one call of `gemm`, behind checked matrix views
mod gemm;
mod gguf;
mod gguf_file;
mod linear;
mod model;
mod ops;
mod rng;
mod rope;
mod rows;
mod safetensors;
mod tokenizer;
mod weights;

pub use config::{Family, ModelConfig, RopeScaling};
pub use dense::DenseAttention;
pub use error::{Error, Result};
pub use model::{Attention, LoadOptions, Model};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::Precision;
