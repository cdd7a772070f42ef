//! Models of the Llama, Mistral, Qwen2, Qwen3 and Gemma 3 families on candle, with the attention left
//! to the caller.
//!
//! [`Model`] holds everything but the attention: each layer hands its queries, keys and values to an
//! [`Attention`], which may be [`DenseAttention`] (whole and exact, for prompts and as the
//! reference), [`LeanAttention`] (a lean cache) or your own. [`dump()`] runs a model over texts and
//! leaves the activations and [probes](probe()) that `leank-train` learns masks from; [`eval`] says
//! what a mask costs.
//!
//! ```no_run
//! use leank_candle::{DenseAttention, LoadOptions, Model};
//!
//! # fn main() -> leank_candle::Result<()> {
//! let model = Model::load("model.gguf".as_ref(), LoadOptions::default())?;
//! let tokens = model.tokenizer().encode("The capital of Norway is")?;
//! let mut attention = DenseAttention::new(model.config(), tokens.len());
//! let hidden = attention.prefill(&model, &tokens)?;
//! let next = model.logits(&hidden)?.argmax(1)?.to_vec1::<u32>()?;
//! println!("{}", model.tokenizer().decode(&next)?);
//! # Ok(()) }
//! ```
//!
//! Layers that see only the last tokens (*sliding* ones, as in Gemma 3) have no part in this: a lean
//! cache, a dump and a mask hold the *global* layers, numbered among themselves
//! ([`ModelConfig::global_layers`]), and [`SlidingKv`] holds the others.
//!
//! Products run on candle's `gemm`; norms, RoPE, gates and attention are operations of this crate
//! with their own gradients, since candle's backward pass would also differentiate every frozen
//! weight. All of it is f32 on the CPU. Start reading at [`Model::hidden`], then [`probe()`].
#![deny(unsafe_code)]

mod attention;
mod config;
mod cuts;
mod dense;
mod dump;
mod error;
pub mod eval;
mod executor;
#[cfg(test)]
mod family_tests;
mod fingerprint;
#[allow(unsafe_code)] // one call of `gemm`, behind checked matrix views
mod gemm;
mod gguf;
mod gguf_file;
mod lean;
mod linear;
#[cfg(test)]
mod loading_tests;
mod model;
mod ops;
mod probe;
mod quantized;
mod retrieval;
mod rope;
mod rows;
mod safetensors;
mod sliding;
mod tasks;
#[cfg(test)]
mod testing;
mod texts;
mod tokenizer;
mod tokenizer_json;
#[cfg(test)]
mod tokenizer_tests;
mod weights;

pub use config::{Family, ModelConfig, RopeScaling, SlidingLayers};
pub use dense::DenseAttention;
pub use dump::{DumpOptions, DumpProgress, dump, sequences};
pub use error::{Error, Result};
pub use lean::{LeanAttention, SlidingRows, store_prefix};
pub use model::{Attention, LoadOptions, Model};
pub use probe::{LayerProbe, ProbeOptions, SequenceProbe, probe};
pub use rope::RopeTable;
pub use sliding::SlidingKv;
pub use tasks::{Task, TaskItem};
pub use texts::{Sequence, Text};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::{Part, Precision};

/// Compiles the README's examples with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
