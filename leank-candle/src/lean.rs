//! The lean cache as a model's attention: the bridge from candle tensors to `leank-core`.

use candle_core::{Device, Tensor};
use leank_core::{Cache, HostView, HostViewMut, Layer, ViewShape};

use crate::model::Attention;
use crate::ops::with_slice;
use crate::{Error, Result};

/// Attention through a lean cache on the host, for the step that the cache has planned.
///
/// The rows of a forward pass are those of the step: the new tokens of its sequences, one after the
/// other. Plan before, commit after:
///
/// ```no_run
/// # use leank_candle::{LeanAttention, Model};
/// # use leank_core::{Cache, HostView, HostViewMut, StepEntry, SequenceId};
/// # fn step<C>(model: &Model, cache: &mut C, id: SequenceId, token: u32) -> leank_candle::Result<()>
/// # where C: for<'a> Cache<View<'a> = HostView<'a>, ViewMut<'a> = HostViewMut<'a>> {
/// let position = cache.sequence_len(id)?;
/// cache.plan(&[StepEntry::decode(id, 1)])?;
/// let hidden = model.hidden(&[token], &[position], &mut LeanAttention::new(cache))?;
/// cache.commit()?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LeanAttention<'a, C> {
    cache: &'a mut C,
}

impl<'a, C> LeanAttention<'a, C>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    /// Attention through `cache`.
    pub fn new(cache: &'a mut C) -> Self {
        Self { cache }
    }
}

impl<C> Attention for LeanAttention<'_, C>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    fn attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let shape_of = |tensor: &Tensor| -> Result<ViewShape> {
            let (tokens, heads, head_dim) = tensor.dims3()?;
            Ok(ViewShape::contiguous(tokens, heads, head_dim))
        };
        let (q_shape, k_shape, v_shape) = (shape_of(q)?, shape_of(k)?, shape_of(v)?);
        let layer = Layer(layer);
        let mut out = vec![0.0f32; q.elem_count()];
        // The closures speak candle's error; ours is carried out beside it.
        let mut result = Ok(());
        with_slice(k, |k| {
            with_slice(v, |v| {
                with_slice(q, |q| {
                    result = (|| -> leank_core::Result<()> {
                        let (k, v) = (HostView::new(k, k_shape)?, HostView::new(v, v_shape)?);
                        self.cache.append(layer, k, v)?;
                        let out = HostViewMut::new(&mut out[..], q_shape)?;
                        self.cache.attend(layer, HostView::new(q, q_shape)?, out)
                    })();
                    Ok(())
                })
            })
        })?;
        result.map_err(Error::from)?;
        Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
    }
}

/// Puts the first tokens of a densely computed sequence into a lean cache, where they go straight
/// to lean blocks as far as the windows allow: how a prompt enters.
///
/// # Errors
/// [`Error::Core`] with what the cache says, e.g. that it has too little memory; then the sequence
/// is as before. [`Error::Mismatch`] when the shapes differ.
pub fn store_prefix<C>(
    cache: &mut C,
    sequence: leank_core::SequenceId,
    dense: &crate::DenseAttention,
) -> Result<()>
where
    C: for<'v> Cache<View<'v> = HostView<'v>, ViewMut<'v> = HostViewMut<'v>>,
{
    let shape = dense.shape();
    if shape != cache.config().shape {
        return Err(Error::mismatch("shape of the cache", shape, cache.config().shape));
    }
    let tokens = dense.len();
    let view = ViewShape::head_major(tokens, shape.kv_heads, shape.head_dim);
    cache.plan(&[leank_core::StepEntry::store(sequence, tokens)])?;
    let stored = (0..shape.layers).try_for_each(|layer| -> Result<()> {
        let (k, v) = dense.packed_kv(layer)?;
        let (k, v) = (HostView::new(&k[..], view)?, HostView::new(&v[..], view)?);
        Ok(cache.append(Layer(layer), k, v)?)
    });
    if let Err(error) = stored {
        cache.cancel();
        return Err(error);
    }
    Ok(cache.commit()?)
}
