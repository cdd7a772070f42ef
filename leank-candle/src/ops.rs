//! The pieces of a layer as candle operations with their own gradients.
//!
//! candle's composed operations would do, but its backward pass also computes the gradient of every
//! frozen weight (half of the work of a probe), and its fused ones have no gradient. One operation
//! with both directions serves inference and probe alike, so both run the same forward pass.
//! Inputs are f32 on the CPU and contiguous; what is not contiguous is a typed error.

use std::sync::Arc;

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, Layout, Result as CandleResult, Shape, Storage, Tensor,
};
use rayon::prelude::*;

use crate::gemm::{MatRef, Threads, matmul};
use crate::rope::RopeTable;
use crate::rows;

/// Rows per parallel task of element-wise loops: a task is then some 10 µs.
const ROWS_PER_TASK: usize = 16;

/// Calls `f(i, out, x)` for parts of `task` elements of `out` and `x`, in parallel where there are
/// several: a thread that is not rayon's waits tens of microseconds for one that is.
fn for_parts(
    task: usize,
    out: &mut [f32],
    x: &[f32],
    f: impl Fn(usize, &mut [f32], &[f32]) + Send + Sync,
) {
    if out.len() <= task {
        return f(0, out, x);
    }
    let parts = out.par_chunks_mut(task).zip(x.par_chunks(task)).enumerate();
    parts.for_each(|(i, (out, x))| f(i, out, x));
}

/// The elements of a contiguous f32 tensor's storage.
pub(crate) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> CandleResult<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("expected a contiguous tensor, found {layout:?}"),
    }
}

/// Runs `f` on the elements of a contiguous f32 tensor on the CPU.
pub(crate) fn with_slice<R>(
    tensor: &Tensor,
    f: impl FnOnce(&[f32]) -> CandleResult<R>,
) -> CandleResult<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(contiguous(storage, layout)?),
        _ => candle_core::bail!("expected a tensor on the CPU"),
    }
}

fn last_dim(layout: &Layout) -> CandleResult<(usize, usize)> {
    match layout.dims().split_last() {
        Some((&width, rows)) if width > 0 => Ok((rows.iter().product(), width)),
        _ => candle_core::bail!("expected rows of at least one element, found {layout:?}"),
    }
}

/// `y = x Wᵀ + b` with frozen W `[out, in]` and b `[out]`; x `[tokens, in]`.
#[derive(Clone)]
pub(crate) struct DenseLinear {
    /// `[out, in]`, contiguous f32 on the CPU.
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Arc<[f32]>>,
}

impl CustomOp1 for DenseLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (out_width, in_width) = self.weight.dims2()?;
        let (tokens, width) = layout.shape().dims2()?;
        if width != in_width {
            candle_core::bail!("linear layer: expected rows of {in_width}, found {width}")
        }
        let x = contiguous(x, layout)?;
        let mut out = vec![0f32; tokens * out_width];
        with_slice(&self.weight, |weight| {
            let weight = MatRef::new(weight, out_width, in_width).t();
            matmul(MatRef::new(x, tokens, in_width), weight, &mut out, Threads::All);
            Ok(())
        })?;
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(out_width) {
                row.iter_mut().zip(bias.iter()).for_each(|(y, b)| *y += b);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((tokens, out_width))))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let (out_width, in_width) = self.weight.dims2()?;
        let tokens = grad.dim(0)?;
        let mut out = vec![0f32; tokens * in_width];
        with_slice(grad, |grad| {
            with_slice(&self.weight, |weight| {
                let weight = MatRef::new(weight, out_width, in_width);
                matmul(MatRef::new(grad, tokens, out_width), weight, &mut out, Threads::All);
                Ok(())
            })
        })?;
        Ok(Some(Tensor::from_vec(out, (tokens, in_width), grad.device())?))
    }
}

/// `y = x / rms(x) * w` per row, frozen w.
#[derive(Clone)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Arc<[f32]>,
    pub(crate) eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "frozen-rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (rows, width) = last_dim(layout)?;
        if width != self.weight.len() {
            candle_core::bail!("RMS norm: expected rows of {}, found {width}", self.weight.len())
        }
        let x = contiguous(x, layout)?;
        let mut out = vec![0f32; rows * width];
        let task = ROWS_PER_TASK * width;
        for_parts(task, &mut out, x, |_, out, x| {
            for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                rows::scale_by(x, rows::inverse_rms(x, self.eps), &self.weight, out);
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let width = self.weight.len();
        let mut out = vec![0f32; x.elem_count()];
        // With r = 1/rms: dx = r w g - x r^3 mean(w g x).
        with_slice(x, |x| {
            with_slice(grad, |grad| {
                let row_pairs = x.chunks_exact(width).zip(grad.chunks_exact(width));
                for (out, (x, grad)) in out.chunks_exact_mut(width).zip(row_pairs) {
                    let r = rows::inverse_rms(x, self.eps);
                    rows::scale_by(grad, r, &self.weight, out);
                    let along = rows::dot(out, x) * r * r / width as f32;
                    out.iter_mut().zip(x).for_each(|(o, x)| *o -= x * along);
                }
                Ok(())
            })
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

/// RoPE on `[tokens, heads * head_dim]`, pairs (c, c + head_dim/2) as in Hugging Face's models;
/// result `[tokens, heads, head_dim]`.
#[derive(Clone)]
pub(crate) struct Rope {
    pub(crate) table: Arc<RopeTable>,
    pub(crate) positions: Arc<[usize]>,
}

impl Rope {
    /// Rotates every head of `x` into `out`; backwards with `direction` -1.
    fn rotate(&self, x: &[f32], out: &mut [f32], direction: f32) {
        let head_dim = self.table.head_dim();
        let width = x.len() / self.positions.len().max(1);
        if width == 0 {
            return;
        }
        let task = ROWS_PER_TASK * width;
        for_parts(task, out, x, |i, out, x| {
            let positions = &self.positions[i * ROWS_PER_TASK..];
            let token_rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width));
            for ((out, x), &position) in token_rows.zip(positions) {
                let (cos, sin) = self.table.at(position);
                for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                    let ((low, high), (out_low, out_high)) =
                        (x.split_at(head_dim / 2), out.split_at_mut(head_dim / 2));
                    for c in 0..head_dim / 2 {
                        let sin = sin[c] * direction;
                        out_low[c] = low[c] * cos[c] - high[c] * sin;
                        out_high[c] = high[c] * cos[c] + low[c] * sin;
                    }
                }
            }
        });
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        let head_dim = self.table.head_dim();
        if tokens != self.positions.len() || !width.is_multiple_of(head_dim) {
            candle_core::bail!(
                "RoPE: expected {} rows of heads of {head_dim}, found {layout:?}",
                self.positions.len()
            )
        }
        let mut out = vec![0f32; tokens * width];
        self.rotate(contiguous(x, layout)?, &mut out, 1.0);
        Ok((CpuStorage::F32(out), Shape::from((tokens, width / head_dim, head_dim))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> CandleResult<Option<Tensor>> {
        let mut out = vec![0f32; x.elem_count()];
        with_slice(grad, |grad| {
            self.rotate(grad, &mut out, -1.0);
            Ok(())
        })?;
        Ok(Some(Tensor::from_vec(out, x.shape(), x.device())?))
    }
}

/// `f(gate) * up`, element by element.
#[derive(Clone, Copy)]
pub(crate) enum GatedLinearUnit {
    /// `f` is x · sigmoid(x): SwiGLU.
    Silu,
    /// `f` is the tanh approximation of GELU: GeGLU.
    Gelu,
}

/// Elements per parallel task of [`GatedLinearUnit`].
const GATES_PER_TASK: usize = 1 << 14;

impl CustomOp2 for GatedLinearUnit {
    fn name(&self) -> &'static str {
        "gated-linear-unit"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> CandleResult<(CpuStorage, Shape)> {
        let (gate, up) = (contiguous(gate, gate_layout)?, contiguous(up, up_layout)?);
        if gate.len() != up.len() {
            candle_core::bail!("gated linear unit: {gate_layout:?} and {up_layout:?} differ")
        }
        let mut out = vec![0f32; gate.len()];
        for_parts(GATES_PER_TASK, &mut out, gate, |i, out, gate| {
            let up = &up[i * GATES_PER_TASK..][..gate.len()];
            match self {
                Self::Silu => rows::swiglu(gate, up, out),
                Self::Gelu => rows::geglu(gate, up, out),
            }
        });
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> CandleResult<(Option<Tensor>, Option<Tensor>)> {
        let mut d_gate = vec![0f32; gate.elem_count()];
        let mut d_up = vec![0f32; gate.elem_count()];
        with_slice(gate, |gate| {
            with_slice(up, |up| {
                with_slice(grad, |grad| {
                    let grads = (&mut d_gate[..], &mut d_up[..]);
                    match self {
                        Self::Silu => rows::swiglu_grad((gate, up), grad, grads),
                        Self::Gelu => rows::geglu_grad((gate, up), grad, grads),
                    }
                    Ok(())
                })
            })
        })?;
        let (shape, device) = (gate.shape(), gate.device());
        Ok((
            Some(Tensor::from_vec(d_gate, shape, device)?),
            Some(Tensor::from_vec(d_up, shape, device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use leank_train::rng::Rng;

    use super::*;
    use crate::config::RopeScaling;

    fn random(rng: &mut Rng, n: usize) -> Vec<f32> {
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    /// Checks candle's backward pass through `f` against central differences of `<f(x), w>`.
    fn check_gradient(shape: (usize, usize), f: impl Fn(&Tensor) -> CandleResult<Tensor>) {
        let mut rng = Rng::new(7);
        let n = shape.0 * shape.1;
        let x = random(&mut rng, n);
        let device = Device::Cpu;
        let out_count = f(&Tensor::from_vec(x.clone(), shape, &device).unwrap()).unwrap();
        let w = random(&mut rng, out_count.elem_count());
        let w = Tensor::from_vec(w, out_count.shape(), &device).unwrap();
        let loss = |x: &[f32]| -> f64 {
            let y = f(&Tensor::from_vec(x.to_vec(), shape, &device).unwrap()).unwrap();
            let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let w = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            y.iter().zip(&w).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum()
        };
        let var = Var::from_tensor(&Tensor::from_vec(x.clone(), shape, &device).unwrap()).unwrap();
        let out = (f(var.as_tensor()).unwrap() * &w).unwrap().sum_all().unwrap();
        let grads = out.backward().unwrap();
        let grad = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for i in 0..n {
            let step = 1e-2f32;
            let mut moved = x.clone();
            moved[i] = x[i] + step;
            let above = loss(&moved);
            moved[i] = x[i] - step;
            let numeric = (above - loss(&moved)) / (2.0 * f64::from(step));
            assert!(
                (numeric - f64::from(grad[i])).abs() < 5e-3 * (1.0 + numeric.abs()),
                "element {i}: {numeric} by differences, {} by backward",
                grad[i]
            );
        }
    }

    #[test]
    fn linear_has_the_right_gradient() {
        let mut rng = Rng::new(1);
        let weight = Tensor::from_vec(random(&mut rng, 15), (5, 3), &Device::Cpu).unwrap();
        let op = DenseLinear { weight, bias: Some(random(&mut rng, 5).into()) };
        check_gradient((4, 3), |x| x.apply_op1(op.clone()));
    }

    #[test]
    fn rms_norm_has_the_right_gradient() {
        let weight = random(&mut Rng::new(2), 6).into();
        let op = RmsNorm { weight, eps: 1e-5 };
        check_gradient((3, 6), |x| x.apply_op1(op.clone()));
    }

    #[test]
    fn rope_has_the_right_gradient() {
        let table = Arc::new(RopeTable::new(4, 100.0, &RopeScaling::None, 64));
        let op = Rope { table, positions: vec![0, 5, 63].into() };
        check_gradient((3, 8), |x| x.apply_op1(op.clone()));
    }

    #[test]
    fn gated_linear_units_have_the_right_gradients() {
        let other = random(&mut Rng::new(3), 8);
        let other = Tensor::from_vec(other, (2, 4), &Device::Cpu).unwrap();
        for unit in [GatedLinearUnit::Silu, GatedLinearUnit::Gelu] {
            check_gradient((2, 4), |x| x.apply_op2(&other, unit));
            check_gradient((2, 4), |x| other.apply_op2(x, unit));
        }
    }

    #[test]
    fn wrong_widths_are_errors() {
        let op = RmsNorm { weight: vec![1.0; 6].into(), eps: 1e-5 };
        let x = Tensor::zeros((2, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(x.apply_op1(op).is_err());
    }
}
