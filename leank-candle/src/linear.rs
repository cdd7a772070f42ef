//! Linear layers and embeddings, dense or quantized.

use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{Device, Tensor};

use crate::ops::{DenseLinear, with_slice};
use crate::quantized::{Product, is_ours};
use crate::{Error, Result};

/// A frozen matrix `[rows, columns]`.
#[derive(Clone)]
pub(crate) enum Matrix {
    /// f32, contiguous, on the CPU.
    Dense(Tensor),
    /// As the GGUF file holds it.
    Quantized(Arc<QTensor>),
}

/// `y = x Wᵀ + b`.
#[derive(Clone)]
pub(crate) enum Linear {
    Dense(DenseLinear),
    Quantized { weight: Arc<QTensor>, bias: Option<Tensor> },
}

impl Linear {
    /// A layer from its `[out, in]` matrix and bias `[out]`.
    pub(crate) fn new(weight: Matrix, bias: Option<Vec<f32>>) -> Result<Self> {
        Ok(match weight {
            Matrix::Dense(weight) => {
                Self::Dense(DenseLinear { weight, bias: bias.map(Into::into) })
            }
            Matrix::Quantized(weight) => {
                let bias = bias.map(|bias| {
                    let n = bias.len();
                    Tensor::from_vec(bias, (1, n), &Device::Cpu)
                });
                Self::Quantized { weight, bias: bias.transpose()? }
            }
        })
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(op) => Ok(x.apply_op1(op.clone())?),
            Self::Quantized { .. } if x.track_op() => Err(no_gradient()),
            Self::Quantized { weight, bias } => {
                let y = if is_ours(weight.dtype()) {
                    x.apply_op1_no_bwd(&Product(weight))?
                } else {
                    x.apply_op1_no_bwd(weight.as_ref())?
                };
                Ok(match bias {
                    Some(bias) => y.broadcast_add(bias)?,
                    None => y,
                })
            }
        }
    }

    /// Bytes of the matrix as it is held.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Dense(op) => (op.weight.elem_count() * size_of::<f32>()) as u64,
            Self::Quantized { weight, .. } => weight.storage_size_in_bytes() as u64,
        }
    }

    /// The matrix, row after row, widened to f32.
    pub(crate) fn weight(&self) -> Result<Vec<f32>> {
        match self {
            Self::Dense(op) => Ok(op.weight.flatten_all()?.to_vec1()?),
            Self::Quantized { weight, .. } => widen(weight),
        }
    }

    /// The bias, where there is one.
    pub(crate) fn bias(&self) -> Result<Option<Vec<f32>>> {
        Ok(match self {
            Self::Dense(op) => op.bias.as_ref().map(|bias| bias.to_vec()),
            Self::Quantized { bias: None, .. } => None,
            Self::Quantized { bias: Some(bias), .. } => Some(bias.flatten_all()?.to_vec1()?),
        })
    }

    /// `[tokens, out]` gradient of the output to `[tokens, in]` gradient of the input.
    pub(crate) fn backward(&self, grad: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(op) => Ok(grad.contiguous()?.matmul(&op.weight)?),
            Self::Quantized { .. } => Err(no_gradient()),
        }
    }
}

fn widen(matrix: &QTensor) -> Result<Vec<f32>> {
    Ok(matrix.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

fn no_gradient() -> Error {
    Error::option(
        "precision",
        "gradients need f32 weights and this model was loaded as stored; load it with Precision::F32",
    )
}

impl Matrix {
    /// The elements, row after row, widened to f32.
    pub(crate) fn values(&self) -> Result<Vec<f32>> {
        match self {
            Self::Dense(matrix) => Ok(matrix.flatten_all()?.to_vec1()?),
            Self::Quantized(matrix) => widen(matrix),
        }
    }

    /// Rows `tokens` of the matrix, `[tokens, columns]` f32. The tokens must be in range.
    pub(crate) fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        match self {
            Self::Dense(matrix) => {
                let width = matrix.dim(1)?;
                let rows: Vec<f32> = with_slice(matrix, |matrix| {
                    let row = |&token: &u32| &matrix[token as usize * width..][..width];
                    Ok(tokens.iter().flat_map(row).copied().collect())
                })?;
                Ok(Tensor::from_vec(rows, (tokens.len(), width), &Device::Cpu)?)
            }
            Self::Quantized(matrix) => Ok(matrix.embedding(&Tensor::new(tokens, &Device::Cpu)?)?),
        }
    }
}
