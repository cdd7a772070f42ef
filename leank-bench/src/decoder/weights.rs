//! A decoder's weights on the device: random, or those of a model.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use half::bf16;
use leank_candle::Part;
use leank_core::Dtype;

use super::{DecoderConfig, kernels::Number};
use crate::{
    Error, Result,
    cuda::{Device, driver},
};

/// Gives the parts of a model, row after row, as [`leank_candle::Model::weight`] does; `None` for the
/// head of a model that takes its embedding for it.
pub type Source<'a> = &'a mut dyn FnMut(Part) -> Result<Option<Vec<f32>>>;

/// One layer. Matrices are `[out, in]`.
pub(super) struct LayerWeights<T> {
    pub(super) attention_norm: CudaSlice<f32>,
    /// Rows of q, then k, then v.
    pub(super) qkv: CudaSlice<T>,
    /// As the rows of `qkv`.
    pub(super) bias: Option<CudaSlice<f32>>,
    pub(super) output: CudaSlice<T>,
    pub(super) mlp_norm: CudaSlice<f32>,
    /// Rows of gate, then up.
    pub(super) gate_up: CudaSlice<T>,
    pub(super) down: CudaSlice<T>,
}

/// All weights.
pub(super) struct Weights<T> {
    pub(super) embedding: CudaSlice<T>,
    pub(super) layers: Vec<LayerWeights<T>>,
    pub(super) norm: CudaSlice<f32>,
    /// `None`: the embedding.
    pub(super) head: Option<CudaSlice<T>>,
}

/// Bytes of the weights with a head of their own.
pub(super) fn bytes(config: &DecoderConfig, element: usize) -> u64 {
    let DecoderConfig { hidden, intermediate, vocab, qkv_bias, .. } = *config;
    let layers = config.shape.layers;
    let matrices = hidden * (config.qkv_width() + config.query_width()) + 3 * hidden * intermediate;
    let bias = if qkv_bias { config.qkv_width() } else { 0 };
    let numbers = 2 * vocab * hidden + layers * matrices;
    let floats = hidden + layers * (2 * hidden + bias);
    (numbers * element + floats * 4) as u64
}

impl Weights<bf16> {
    /// Random matrices with rows of norm 1: what has variance 1 keeps it. Norms do nothing.
    pub(super) fn random(
        stream: &Arc<CudaStream>,
        config: &DecoderConfig,
        seed: u64,
    ) -> Result<Self> {
        let device = Device::new(stream)?;
        let mut seed = seed << 32;
        let mut matrix = |rows: usize, columns: usize, scale: f32| {
            seed += 1;
            device.random(Dtype::Bf16, rows * columns, seed, scale)
        };
        let ones = |len: usize| stream.clone_htod(&vec![1.0f32; len]).map_err(driver);
        let DecoderConfig { hidden, intermediate, vocab, .. } = *config;
        let (qkv, query) = (config.qkv_width(), config.query_width());
        let scale = |inputs: usize| 1.0 / (inputs as f32).sqrt();
        let layer = |_| {
            let zeros = || stream.alloc_zeros(qkv).map_err(driver);
            Ok(LayerWeights {
                attention_norm: ones(hidden)?,
                qkv: matrix(qkv, hidden, scale(hidden))?,
                bias: config.qkv_bias.then(zeros).transpose()?,
                output: matrix(hidden, query, scale(query))?,
                mlp_norm: ones(hidden)?,
                gate_up: matrix(2 * intermediate, hidden, scale(hidden))?,
                down: matrix(hidden, intermediate, scale(intermediate))?,
            })
        };
        let layers = (0..config.shape.layers).map(layer).collect::<Result<_>>()?;
        let (embedding, norm) = (matrix(vocab, hidden, 1.0)?, ones(hidden)?);
        let head = Some(matrix(vocab, hidden, scale(hidden))?);
        // The kernels go with `device`.
        stream.synchronize().map_err(driver)?;
        Ok(Self { embedding, layers, norm, head })
    }
}

impl<T: Number> Weights<T> {
    /// The weights that `source` gives.
    pub(super) fn load(
        stream: &Arc<CudaStream>,
        config: &DecoderConfig,
        source: Source<'_>,
    ) -> Result<Self> {
        let DecoderConfig { hidden, intermediate, vocab, qkv_bias, .. } = *config;
        let (query, kv) = (config.query_width(), config.kv_width());
        let mut parts = |parts: &[(Part, usize)]| joined(source, parts);
        let floats = |values: Vec<f32>| stream.clone_htod(&values).map_err(driver);
        let numbers = |values: Vec<f32>| -> Result<CudaSlice<T>> {
            let numbers: Vec<T> = values.into_iter().map(T::from_f32).collect();
            stream.clone_htod(&numbers).map_err(driver)
        };
        let mut layers = Vec::new();
        for l in 0..config.shape.layers {
            let qkv = [
                (Part::Query(l), query * hidden),
                (Part::Key(l), kv * hidden),
                (Part::Value(l), kv * hidden),
            ];
            let bias =
                [(Part::QueryBias(l), query), (Part::KeyBias(l), kv), (Part::ValueBias(l), kv)];
            let gate_up =
                [(Part::Gate(l), intermediate * hidden), (Part::Up(l), intermediate * hidden)];
            layers.push(LayerWeights {
                attention_norm: floats(parts(&[(Part::AttentionNorm(l), hidden)])?)?,
                qkv: numbers(parts(&qkv)?)?,
                bias: if qkv_bias { Some(floats(parts(&bias)?)?) } else { None },
                output: numbers(parts(&[(Part::AttentionOutput(l), hidden * query)])?)?,
                mlp_norm: floats(parts(&[(Part::MlpNorm(l), hidden)])?)?,
                gate_up: numbers(parts(&gate_up)?)?,
                down: numbers(parts(&[(Part::Down(l), hidden * intermediate)])?)?,
            });
        }
        let norm = floats(parts(&[(Part::OutputNorm, hidden)])?)?;
        let embedding = numbers(parts(&[(Part::Embedding, vocab * hidden)])?)?;
        let head = match source(Part::Output)? {
            Some(head) if head.len() == vocab * hidden => Some(numbers(head)?),
            Some(head) => return Err(wrong_size(Part::Output, vocab * hidden, head.len())),
            None => None,
        };
        Ok(Self { layers, embedding, norm, head })
    }
}

/// Parts one behind the other, each of so many elements.
fn joined(source: Source<'_>, parts: &[(Part, usize)]) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for &(part, len) in parts {
        let values = source(part)?.unwrap_or_default();
        if values.len() != len {
            return Err(wrong_size(part, len, values.len()));
        }
        all.extend(values);
    }
    Ok(all)
}

fn wrong_size(part: Part, expected: usize, found: usize) -> Error {
    Error::option("weights", format!("{expected} of {part:?}"), found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_and_their_sizes_checked() {
        let mut source = |part| {
            Ok(match part {
                Part::Gate(0) => Some(vec![1.0, 2.0]),
                Part::Up(0) => Some(vec![3.0]),
                _ => None,
            })
        };
        let both = joined(&mut source, &[(Part::Gate(0), 2), (Part::Up(0), 1)]).unwrap();
        assert_eq!(both, [1.0, 2.0, 3.0]);
        for wrong in [(Part::Gate(0), 3), (Part::Down(0), 1)] {
            let error = joined(&mut source, &[wrong]).unwrap_err().to_string();
            assert!(error.contains("of Gate(0)") || error.contains("of Down(0)"), "{error}");
        }
    }
}
